"""What both commands share: parsing, errors, exit codes.

Exit codes: 0 done, 1 failed, 2 used wrongly. Results go to stdout, everything
else to stderr.
"""

import argparse
import io
import os
import signal
import sys
import types
import warnings
from collections.abc import Sequence

from absl import app, logging
from absl.flags import argparse_flags

import bit_tf
from bit_tf import archive, errors, relocation

__all__ = [
    "add_dataset_options",
    "add_relocate",
    "expect_tensorflow",
    "positive",
    "quiet_tensorflow",
    "require_directory",
    "run",
]


def run(
    name: str, description: str, commands: Sequence[types.ModuleType]
) -> None:
    """Parses the command line, runs the sub-command, and exits.

    Args:
      name: the program's.
      description: one line.
      commands: modules with `register(subparsers)`, which adds a parser whose
        default `run` takes the parsed arguments and returns the exit code.
        A default `takes_rest` names an argument, with which options that the
        parser does not know are no mistake: `run` finds them in `args.rest`.
    """

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
        args, rest = parser.parse_known_args(argv[1:])
        option = getattr(args, "takes_rest", None)
        if rest and (option is None or getattr(args, option) is None):
            parser.error(f"unrecognized arguments: {' '.join(rest)}")
        args.rest = rest
        return args

    def main(args) -> int:
        signal.signal(signal.SIGTERM, _stop)
        sys.unraisablehook = _raise_again
        for stream in (sys.stdout, sys.stderr):
            # What a terminal cannot show is escaped, not an error.
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="backslashreplace")
        try:
            with relocation.relocated(dict(getattr(args, "relocate", ()))):
                code = args.run(args)
            sys.stdout.flush()
            return code
        except BrokenPipeError:
            # Python flushes stdout once more at exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 1
        except (errors.BitTfError, OSError) as error:
            print(f"{name}: error: {error}", file=sys.stderr)
            return 1
        except KeyboardInterrupt:
            print(f"{name}: interrupted", file=sys.stderr)
            return 1

    app.run(main, flags_parser=parse)


def add_dataset_options(parser) -> None:
    """Adds what says how a dataset is found and read; each may be None."""
    parser.add_argument(
        "--data-dir", metavar="DIR", help="of TensorFlow Datasets"
    )
    parser.add_argument(
        "--manual-dir",
        metavar="DIR",
        help="of files that TensorFlow Datasets cannot download",
    )
    parser.add_argument(
        "--bad-images",
        choices=["raise", "skip"],
        help="what happens to pictures that cannot be read (raise)",
    )


def add_relocate(parser) -> None:
    """Adds --relocate, in force while the command runs."""
    parser.add_argument(
        "--relocate",
        type=_move,
        action="append",
        default=[],
        metavar="OLD=NEW",
        help="where a SavedModel lies now that a .keras file names: a handle "
        "or the beginning of one, and what takes its place; may be repeated",
    )


def _move(text: str) -> tuple[str, str]:
    """An argument that is a handle, "=", and another."""
    old, _, new = text.partition("=")
    if not old or not new:
        raise argparse.ArgumentTypeError(
            f"must be OLD=NEW, such as https://old.example=/models, not {text}"
        )
    return old, new


def _stop(number, frame):
    """Unwinds, so that temporary files are removed and children stopped."""
    sys.exit(128 + number)


def positive(text: str) -> int:
    """An argument that is a whole number of 1 or more."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, not {text}")
    return number


def require_directory(output: str) -> None:
    """Refuses an --output that is no directory, nor can be made one.

    Raises:
      BitTfError: as said, or it cannot be written to.
    """
    if not output:
        raise errors.BitTfError(
            "--output is a directory. Received: an empty name. Name one."
        )
    if not os.path.lexists(output):
        parent = os.path.dirname(os.path.abspath(output))
        while not os.path.lexists(parent):
            parent = os.path.dirname(parent)
        if os.path.isdir(parent) and os.access(parent, os.W_OK):
            return
        raise errors.BitTfError(
            "--output is a directory that can be made. Received: "
            f"{output!r}, below {parent!r}, which cannot be written to. Name "
            "another."
        )
    if not os.path.isdir(output):
        raise errors.BitTfError(
            f"--output is a directory. Received: {output!r}, which is a file. "
            "Name another."
        )
    if not os.access(output, os.W_OK):
        raise errors.BitTfError(
            f"--output can be written to. Received: {output!r}, which cannot. "
            "Name another, or change its permissions."
        )


def _raise_again(unraisable) -> None:
    """Raises a signal's exception anew where Python had to drop it.

    A signal may arrive in a callback of the garbage collector, from which no
    exception gets out.
    """
    lost = unraisable.exc_value
    if not isinstance(lost, (SystemExit, KeyboardInterrupt)):
        sys.__unraisablehook__(unraisable)
        return

    def again(number, frame):
        raise lost

    signal.signal(signal.SIGALRM, again)
    signal.setitimer(signal.ITIMER_REAL, 0.05)


def expect_tensorflow(source: str) -> None:
    """Calls `quiet_tensorflow` if reading the source may need TensorFlow.

    Of what is on the disk SavedModels and their archives do.
    """
    if os.path.exists(source) and not (
        os.path.isfile(os.path.join(source, "saved_model.pb"))
        or archive.is_archive(source)
    ):
        return
    quiet_tensorflow()


def quiet_tensorflow() -> None:
    """Imports TensorFlow, and keeps its and tensorflow_hub's notes away.

    Some are written by C++ before TensorFlow reads any setting, straight to
    the file descriptor.
    """
    logging.set_verbosity(logging.WARNING)
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    warnings.filterwarnings("ignore", message="pkg_resources is deprecated")
    sys.stderr.flush()
    stderr = os.dup(2)
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        import tensorflow as tf

        tf.config.get_visible_devices()
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)
