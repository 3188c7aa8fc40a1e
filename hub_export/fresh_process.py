"""Work on a SavedModel in a Python process of its own.

Nothing of this process helps there, and nothing that happens there, up to a
crash of TensorFlow, happens here. The module that does the work is run as
`python -m MODULE DIRECTORY`, and its `main` is `serve`.
"""

import argparse
import collections
import dataclasses
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import IO, Any

from bit_tf import errors

__all__ = ["Outcome", "call", "serve"]

# oneDNN's caches and a second executor thread take memory for speed, which a
# check on two pictures does not need.
_FRUGAL = {
    "TF_CPP_MIN_LOG_LEVEL": "3",
    "TF_ENABLE_ONEDNN_OPTS": "0",
    "TF_NUM_INTEROP_THREADS": "1",
    "PYTHONWARNINGS": "",
}
# What is kept of the end of each stream; bytes.
_KEPT = 2**20
# Seconds in which a stream ends after its process.
_PATIENCE = 10.0
_ATTACHED = "--attached"
_COMMAND = (sys.executable, "-P", "-m")


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How such a process ended.

    Attributes:
      answer: the last JSON object that it gave, or None.
      fault: why it failed, on one line, or None if it did not.
    """

    answer: Any
    fault: str | None


def call(
    module: str,
    directory: str | os.PathLike[str],
    seconds: float | None = None,
    *,
    shown: bool = False,
) -> Outcome:
    """Runs a module on a directory.

    Args:
      module: its `main` calls `serve`.
      directory: given to it.
      seconds: after which the process is killed; None for no limit.
      shown: whether its stderr is this process's, as progress bars need it,
        and no part of a fault.
    """
    process = subprocess.Popen(
        # Absolute, because a name may begin with "-".
        [*_COMMAND, module, _ATTACHED, os.path.abspath(os.fspath(directory))],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=None if shown else subprocess.PIPE,
        env={**os.environ, **_FRUGAL},
    )
    with process:
        stdout = _Tail(process.stdout)
        stderr = None if shown else _Tail(process.stderr)
        try:
            process.wait(seconds)
            fault = _fault(process.returncode)
        except subprocess.TimeoutExpired:
            fault = f"it was stopped after {seconds:.0f} s"
        finally:
            process.kill()
            process.wait()
            lines, others = stdout.lines(), stderr.lines() if stderr else []
    if fault is not None and (why := _reason(lines, others)):
        fault += f": {why}"
    answers = [found for line in lines if (found := _object(line)) is not None]
    if fault is None and not answers:
        fault = "exit 0 without an answer"
    return Outcome(answers[-1] if answers else None, fault)


def serve(
    work: Callable[[str, Callable[[Any], None]], None],
    description: str | None = None,
    argv: list[str] | None = None,
) -> int:
    """The `main` of a module that `call` runs.

    What else is printed, also by TensorFlow, goes to stderr. A BitTfError is
    printed on the last line instead of an answer.

    Args:
      work: takes the directory and a function that gives an answer, of JSON's
        types; the last one counts.
      description: for --help.
      argv: arguments; those of the process unless given.

    Returns:
      The exit code, 0 or 1.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("directory")
    parser.add_argument(_ATTACHED, action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.attached:
        threading.Thread(target=_end_with_parent, daemon=True).start()
    sys.stdout.flush()
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as answers:
        os.dup2(2, 1)

        def say(text: str) -> None:
            print(text, file=answers, flush=True)

        try:
            work(arguments.directory, lambda answer: say(json.dumps(answer)))
        except errors.BitTfError as error:
            say(" ".join(str(error).split()))
            return 1
    return 0


class _Tail:
    """The end of a stream, read in a thread so that its writer never waits."""

    def __init__(self, stream: IO[bytes] | None):
        assert stream is not None
        self._descriptor = stream.fileno()
        self._chunks: collections.deque[bytes] = collections.deque()
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        size = 0
        while chunk := os.read(self._descriptor, 2**16):
            self._chunks.append(chunk)
            size += len(chunk)
            while size - len(self._chunks[0]) > _KEPT:
                size -= len(self._chunks.popleft())

    def lines(self) -> list[str]:
        """Those that are not empty, once the stream has ended.

        A process that was started there and goes on is not waited for.
        """
        self._thread.join(_PATIENCE)
        text = b"".join(self._chunks).decode(errors="backslashreplace")
        return [line for line in text.splitlines() if line.strip()]


def _end_with_parent() -> None:
    """Ends this process when the parent's end of stdin is closed."""
    while os.read(0, 1):
        pass
    os._exit(1)


def _fault(returncode: int) -> str | None:
    if returncode >= 0:
        return f"exit {returncode}" if returncode else None
    try:
        return f"killed by {signal.Signals(-returncode).name}"
    except ValueError:
        return f"killed by signal {-returncode}"


def _reason(stdout: list[str], stderr: list[str]) -> str:
    """What a process that failed said last."""
    said = [line for line in stdout if _object(line) is None]
    return (said or stderr or [""])[-1].strip()[:2000]


def _object(line: str) -> Any:
    try:
        found = json.loads(line)
    except ValueError:
        return None
    return found if isinstance(found, dict) else None
