"""`python -m hub_export` is the command `hub-export`."""

from hub_export.commands import main

__all__ = ["main"]

if __name__ == "__main__":
    main()
