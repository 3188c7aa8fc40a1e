"""Checkpoint files: canonical name → float32 array, and back.

A format is one module beside this one, with

    NAME        the format's name
    LOOKS_FOR   what `sniff` looks for, in words
    sniff       path → whether the file looks like it; never raises on garbage
    read        path → Checkpoint
    write       arrays, path → None, if the format can be written

and a row in the tables below.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from bit_tf import errors
from bit_tf.checkpoints import checkpoint, google_npz
from bit_tf.checkpoints.checkpoint import Checkpoint

__all__ = ["Checkpoint", "read", "write"]

_READERS = (google_npz,)
_WRITERS = {".npz": google_npz}


def read(path: str | os.PathLike[str]) -> Checkpoint:
    """Opens a checkpoint of any known format, told by its contents.

    Returns:
      A lazy mapping, canonical name → float32 array; see `Checkpoint`.

    Raises:
      FileNotFoundError: there is no such file.
      CheckpointFormatError: no reader knows the file, or it is damaged.
      CheckpointMismatchError: names or shapes are not those of a BiT-ResNet.
    """
    path = Path(path)
    checkpoint.require_file(path)
    for reader in _READERS:
        if reader.sniff(path):
            return reader.read(path)
    looks = checkpoint.begins_like(path)
    tried = "\n".join(
        f"{reader.NAME}: not {reader.LOOKS_FOR}" for reader in _READERS
    )
    if looks == "a zip archive":
        looks += (
            ", but either its directory, at its end, is missing or damaged, "
            "as in a truncated file, or its members are no arrays"
        )
    raise errors.CheckpointFormatError(
        f"{path}: a checkpoint has one of the known formats. Received: "
        f"{path.stat().st_size} bytes that begin like {looks}. "
        f"{checkpoint.REMEDY} Tried:\n{tried}"
    )


def write(
    arrays: Mapping[str, np.ndarray] | Any, path: str | os.PathLike[str]
) -> None:
    """Writes a checkpoint in the format that the path's extension names.

    Args:
      arrays: canonical name → float array, such as a `Checkpoint`, or a Keras
        model of this package.
      path: where to; `.npz` is Google's format. An existing file is replaced
        when the new one is whole.

    Raises:
      CheckpointFormatError: no writer has this extension, or an array is not
        float and finite.
      CheckpointMismatchError: names or shapes are not those of a BiT-ResNet.
      OSError: the file cannot be written.
    """
    path = Path(path)
    writer = _WRITERS.get(path.suffix.lower())
    if writer is None:
        raise errors.CheckpointFormatError(
            "A checkpoint's format is chosen by its extension. Received: "
            f"{path.name!r}. Known are: {', '.join(sorted(_WRITERS))}."
        )
    source: Any = arrays
    if hasattr(source, "layers") and not hasattr(source, "keys"):
        from bit_tf import models

        source = models.canonical_arrays(source)
    writer.write(source, path)
