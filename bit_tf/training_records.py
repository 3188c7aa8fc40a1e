"""What a training run writes: its state, its history, its logs."""

import contextlib
import json
import os
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import keras
import tensorflow as tf

from bit_tf import distribution, errors, event_log, files, training_state

__all__ = ["Records", "no_number"]

_STATE = pathlib.PurePath("state", "state.npz")
_LOCK = pathlib.PurePath("state", "lock")
_HISTORY, _LOGS = "history.jsonl", "logs"


class Records:
    """What a run writes: its state, history.jsonl, TensorBoard's logs.

    Args:
      output: the directory; None writes nothing.
      where: only the chief writes.
      settings: what must be the same when the run goes on.
      variables: of the state.
    """

    def __init__(
        self,
        output: str | os.PathLike[str] | None,
        where: distribution.Place,
        settings: Mapping[str, Any],
        variables: Mapping[str, keras.Variable],
    ):
        self._output = None if output is None else pathlib.Path(output)
        self._writes = output is not None and where.is_chief
        self._settings, self._variables = settings, variables
        self._stack = contextlib.ExitStack()
        self._history: Any = None
        self._events: event_log.EventLog | None = None
        self.saved = 0

    def __enter__(self) -> "Records":
        if self._output is not None and self._writes:
            (self._output / _STATE).parent.mkdir(parents=True, exist_ok=True)
            self._stack.enter_context(
                files.locked(self._output / _LOCK, "fine-tunes here")
            )
            # Of processes that were killed while they wrote.
            state = self._output / _STATE
            for path in state.parent.glob(f".{state.name}.*.tmp"):
                path.unlink(missing_ok=True)
        return self

    def __exit__(self, *error) -> None:
        self._stack.close()

    def begin(self, restart: bool) -> list[dict[str, Any]]:
        """Restores the state, if there is one; the rows until there."""
        if self._output is None:
            return []
        path = self._output / _STATE
        if restart and self._writes:
            path.unlink(missing_ok=True)
            with _disk(self._output, self.saved):
                event_log.discard(self._output / _LOGS)
        state = None if restart else training_state.read(path)
        rows: list[dict[str, Any]] = []
        if state is not None:
            lines = training_state.differences(state.settings, self._settings)
            if lines:
                raise errors.TrainingError(
                    "A run goes on with the settings that it began with. "
                    f"Received for {str(self._output)!r}, which is at step "
                    f"{state.step} (before → now):\n" + "\n".join(lines) + "\n"
                    "Give the same settings, another output directory, or "
                    "discard the earlier run with --restart (restart=True)."
                )
            training_state.restore(state, self._variables)
            rows, self.saved = state.rows, state.step
        if self._writes:
            with _disk(self._output, self.saved):
                with files.new_file(self._output / _HISTORY) as file:
                    file.writelines(_line(row) for row in rows)
                history = (self._output / _HISTORY).open("ab")
                self._history = self._stack.enter_context(history)
                self._events = self._stack.enter_context(
                    event_log.EventLog(self._output / _LOGS, len(rows) + 1)
                )
        return rows

    def log(self, row: dict[str, Any]) -> None:
        """Adds a step to history.jsonl and to TensorBoard's logs."""
        if not self._writes:
            return
        assert self._output is not None
        assert self._events is not None
        with _disk(self._output, self.saved):
            self._history.write(_line(row))
            self._history.flush()
            self._events.scalars(
                row["step"],
                {
                    name: value
                    for name, value in row.items()
                    if name not in ("step", "seconds")
                },
            )

    def save(self, rows: list[dict[str, Any]]) -> None:
        """Replaces the state."""
        if not self._writes:
            return
        assert self._output is not None
        try:
            with _disk(self._output, self.saved):
                training_state.write(
                    self._output / _STATE,
                    len(rows),
                    self._settings,
                    rows,
                    self._variables,
                )
        except FloatingPointError:
            raise no_number(
                f"weights that are no numbers after step {len(rows)}",
                rows[-1]["learning_rate"],
                self,
            ) from None
        self.saved = len(rows)

    @property
    def kept(self) -> str:
        """What a message says of the state."""
        if not self._writes or not self.saved:
            return "No state was written before."
        return f"The state of step {self.saved} is kept in {self._output}."


def no_number(
    received: str, rate: float, records: Records
) -> errors.TrainingError:
    return errors.TrainingError(
        f"A loss is a finite number. Received: {received}, with a learning "
        f"rate of {rate:.3g}. {records.kept} Try a smaller "
        "--base-learning-rate; --precision float32 instead of mixed_bfloat16; "
        "and see that pictures are in [0, 1], as bit_tf.images gives them, and "
        "that the model's own weights are finite (bit-tf inspect). A larger "
        "--batch-size, in --micro-batches, makes steps less random."
    )


def _line(row: Mapping[str, Any]) -> bytes:
    return (json.dumps(row) + "\n").encode()


@contextlib.contextmanager
def _disk(output: pathlib.Path, saved: int) -> Iterator[None]:
    try:
        yield
    except (OSError, tf.errors.OpError) as error:
        state = f"the state of step {saved} is" if saved else "no state was"
        raise errors.TrainingError(
            f"A run writes into {str(output)!r}. Received: {error}; {state} "
            "kept. Make room there, and run the same again: it goes on from "
            "its last state."
        ) from error
