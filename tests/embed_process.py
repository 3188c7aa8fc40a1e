"""Runs of embed_run in processes that may be killed, without a start of each.

One process imports TensorFlow once, and forks a child for each run. It reads a
JSON object a line, the arguments of embed_run.run and `rows`, and answers with
the child's number, then with its status. The child kills itself after `rows`
rows, counted as they are prepared, if it is not null.
"""

import contextlib
import json
import os
import pathlib
import signal
import subprocess
import sys

__all__ = ["PRESET", "Nursery", "nursery"]

REPOSITORY = pathlib.Path(__file__).parent.parent
PRESET = ("tiny", "squash", 16, None, "bilinear", False, "a test")


class Nursery:
    """The process that forks."""

    def __init__(self, process):
        self._process = process

    def start(self, arguments):
        """Begins a run; the number of its process."""
        self._process.stdin.write(json.dumps(arguments) + "\n")
        self._process.stdin.flush()
        return int(self._process.stdout.readline())

    def wait(self):
        """The status of the run: its exit code, or minus the signal."""
        return int(self._process.stdout.readline())


@contextlib.contextmanager
def nursery(log):
    """A Nursery, whose standard error goes to a file."""
    with (
        open(log, "w", encoding="utf-8") as errors,
        subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            cwd=REPOSITORY,
            env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        ) as process,
    ):
        try:
            yield Nursery(process)
        finally:
            process.stdin.close()
            process.wait(timeout=60)


def main():
    from bit_tf import embed_run, presets

    for line in sys.stdin:
        arguments = json.loads(line)
        after = arguments.pop("kill_after", None)
        child = os.fork()
        if child == 0:
            os.dup2(2, 1)
            signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
            if after is not None:
                signal.signal(
                    signal.SIGALRM,
                    lambda *_: os.kill(os.getpid(), signal.SIGKILL),
                )
                signal.setitimer(signal.ITIMER_REAL, after)
            status = 1
            try:
                summary = embed_run.run(
                    preset=presets.Preset(*PRESET), **arguments
                )
                print(summary, file=sys.stderr, flush=True)
                status = 0
            finally:
                os._exit(status)
        print(child, flush=True)
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


if __name__ == "__main__":
    main()
