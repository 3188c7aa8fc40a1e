"""The command `hub-export`: one module a sub-command, each with `register`."""

from bit_tf.commands import program
from hub_export.commands import (
    cache,
    convert,
    demo,
    publish,
    serve,
    site,
    verify,
)

__all__ = ["main"]


def main() -> None:
    """Runs `hub-export`."""
    program.run(
        "hub-export",
        "Make and publish BiT SavedModels.",
        (demo, convert, publish, site, serve, verify, cache),
    )
