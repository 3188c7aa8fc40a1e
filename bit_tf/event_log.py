"""TensorBoard's logs, written without the package tensorboard."""

import contextlib
import os
import pathlib
import re
import socket
import time
from collections.abc import Mapping

import tensorflow as tf

__all__ = ["EventLog", "discard"]

_VERSION = "brain.Event:2"
_FIRST = 1
# TensorFlow's own names have ten digits.
_OURS = re.compile(r"events\.out\.tfevents\.[0-9]{20}\..+\.[0-9]+")


class EventLog:
    """A file of scalars by step, as TensorBoard reads them.

    Args:
      directory: where a new file is made; several together are one run.
      first_step: the first that this file tells of. TensorBoard forgets what
        older files say of it and of later ones, and keeps the earlier.

    Raises:
      OSError, tf.errors.OpError: it cannot be written; also by the methods.
    """

    def __init__(
        self, directory: str | os.PathLike[str], first_step: int = _FIRST
    ):
        directory = pathlib.Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        # TensorBoard reads files in the order of their names.
        name = (
            f"events.out.tfevents.{time.time_ns():020}.{socket.gethostname()}."
            f"{os.getpid()}"
        )
        self._writer = tf.io.TFRecordWriter(str(directory / name))
        self._write(tf.compat.v1.Event(file_version=_VERSION))
        self._write(
            tf.compat.v1.Event(
                step=first_step,
                session_log=tf.compat.v1.SessionLog(
                    status=tf.compat.v1.SessionLog.START
                ),
            )
        )

    def __enter__(self) -> "EventLog":
        return self

    def __exit__(self, *error) -> None:
        self._writer.close()

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Writes the values of a step, to be seen at once."""
        summary = tf.compat.v1.Summary(
            value=[
                tf.compat.v1.Summary.Value(tag=tag, simple_value=value)
                for tag, value in values.items()
            ]
        )
        self._write(tf.compat.v1.Event(step=step, summary=summary))

    def _write(self, event: "tf.compat.v1.Event") -> None:
        event.wall_time = time.time()
        self._writer.write(event.SerializeToString())
        self._writer.flush()


def discard(directory: str | os.PathLike[str]) -> None:
    """Removes the files of all `EventLog`s in a directory, and nothing else.

    The directory goes too, if it is empty then.
    """
    directory = pathlib.Path(directory)
    if not directory.is_dir():
        return
    for path in directory.iterdir():
        if _OURS.fullmatch(path.name) and not path.is_dir():
            path.unlink(missing_ok=True)
    with contextlib.suppress(OSError):
        directory.rmdir()
