"""The command `hub-export`: one module a sub-command, each with `register`."""

from bit_tf.commands import program
from hub_export.commands import convert, demo

__all__ = ["main"]


def main() -> None:
    """Runs `hub-export`."""
    program.run(
        "hub-export",
        "Make BiT SavedModels.",
        (demo, convert),
    )
