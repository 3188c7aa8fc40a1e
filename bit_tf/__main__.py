"""`python -m bit_tf` is the command `bit-tf`."""

from bit_tf.commands import main

__all__ = ["main"]

if __name__ == "__main__":
    main()
