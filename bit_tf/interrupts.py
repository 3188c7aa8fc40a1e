"""Signals that stop a training run after its step, not in it."""

import contextlib
import signal
import threading
import types
from collections.abc import Iterator
from typing import Any

from absl import logging

__all__ = ["Interrupt", "interrupts"]


class Interrupt:
    """Whether SIGTERM or Ctrl-C came; true once it did."""

    def __init__(self) -> None:
        self._number: int | None = None
        self._before: dict[int, Any] = {}

    def __bool__(self) -> bool:
        return self._number is not None

    def install(self) -> None:
        """Takes the signals, if this is the main thread."""
        if threading.current_thread() is not threading.main_thread():
            return
        for number in (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, self._note)

    def restore(self) -> None:
        """Gives the signals back."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()

    def again(self) -> None:
        """Does what the signal would have done."""
        assert self._number is not None
        self.restore()
        signal.raise_signal(self._number)

    def _note(self, number: int, frame: types.FrameType | None) -> None:
        logging.warning("Stops after this step, and writes the state.")
        self._number = number
        # The second time it is meant.
        self.restore()


@contextlib.contextmanager
def interrupts() -> Iterator[Interrupt]:
    """Notes SIGTERM and Ctrl-C in the block, instead of what they do."""
    found = Interrupt()
    found.install()
    try:
        yield found
    finally:
        found.restore()
