"""What both commands share: parsing, errors, exit codes.

Exit codes: 0 done, 1 failed, 2 used wrongly. Results go to stdout, everything
else to stderr.
"""

import argparse
import sys
import warnings
from collections.abc import Sequence
from typing import Protocol

from absl import app
from absl.flags import argparse_flags

import bit_tf
from bit_tf import errors

__all__ = ["Command", "quiet_tensorflow", "run"]


class Command(Protocol):
    """A module of one sub-command."""

    @staticmethod
    def register(subparsers) -> None:
        """Adds the sub-command; its default `run` takes the parsed arguments
        and returns the exit code."""


def run(name: str, description: str, commands: Sequence[Command]) -> None:
    """Parses the command line, runs the sub-command, and exits."""

    def parse(argv):
        parser = argparse_flags.ArgumentParser(
            prog=name,
            description=description,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        parser.add_argument(
            "--version", action="version", version=bit_tf.__version__
        )
        subparsers = parser.add_subparsers(
            dest="command",
            required=True,
            metavar="COMMAND",
            parser_class=argparse.ArgumentParser,
        )
        for command in commands:
            command.register(subparsers)
        return parser.parse_args(argv[1:])

    def main(args) -> int:
        try:
            return args.run(args)
        except (errors.BitTfError, OSError) as error:
            print(f"{name}: error: {error}", file=sys.stderr)
            return 1
        except BrokenPipeError:
            return 1
        except KeyboardInterrupt:
            print(f"{name}: interrupted", file=sys.stderr)
            return 1

    app.run(main, flags_parser=parse)


def quiet_tensorflow() -> None:
    """Keeps start-up messages of TensorFlow and tensorflow_hub off stderr."""
    import os

    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    warnings.filterwarnings("ignore", message="pkg_resources is deprecated")
