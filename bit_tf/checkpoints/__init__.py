"""Checkpoint files: canonical name → float32 array, and back.

A format that is read is one module beside this one, with

    NAME        the format's name
    LOOKS_FOR   what `sniff` looks for, in words
    sniff       path → whether it looks like it; never raises on garbage
    read        path → Checkpoint

and one that is written has `write`: arrays, path → None. Both have a row in
the tables below. Beside them are the containers that several formats share.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from bit_tf import errors
from bit_tf.checkpoints import (
    big_transfer_h5,
    checkpoint,
    flax_npz,
    google_npz,
    hugging_face,
    keras_file,
    paddle,
    pytorch,
    tf_hub,
    timm,
)
from bit_tf.checkpoints.checkpoint import Checkpoint, Selection
from bit_tf.checkpoints.facts import Facts

__all__ = ["Checkpoint", "FORMATS", "Facts", "Selection", "read", "write"]

# In the order of asking: Google's is any archive of nothing but arrays.
_READERS: tuple[Any, ...] = (
    keras_file,
    flax_npz,
    google_npz,
    pytorch,
    paddle,
    big_transfer_h5,
    tf_hub,
)
_WRITERS: dict[str, Any] = {
    "npz": google_npz,
    "timm": timm,
    "transformers": hugging_face,
    "keras": keras_file,
}
_SUFFIXES = {
    ".npz": "npz",
    ".safetensors": "timm",
    ".keras": "keras",
    "": "transformers",
}

FORMATS = tuple(_WRITERS)


def read(path: str | os.PathLike[str]) -> Checkpoint:
    """Opens a checkpoint of any known format, told by its contents.

    Args:
      path: a file; or the directory of a Hugging Face repository or of a
        SavedModel.

    Returns:
      A lazy mapping, canonical name → float32 array; see `Checkpoint`.

    Raises:
      FileNotFoundError: there is no such file.
      CheckpointFormatError: no reader knows the file, or it is damaged.
      CheckpointMismatchError: names or shapes are not those of a BiT-ResNet.
      MissingExtraError: the format needs a package that is not installed.
    """
    # The current directory may change while the checkpoint is in use.
    path = Path(os.path.abspath(path))
    if not path.is_dir():
        checkpoint.require_file(path)
    for reader in _READERS:
        if reader.sniff(path):
            return reader.read(path)
    tried = "\n".join(
        f"{reader.NAME}: not {reader.LOOKS_FOR}" for reader in _READERS
    )
    raise errors.CheckpointFormatError(
        f"{path}: a checkpoint has one of the known formats. Received: "
        f"{_described(path)}. {checkpoint.REMEDY} Tried:\n{tried}"
    )


def _described(path: Path) -> str:
    if path.is_dir():
        names = sorted(entry.name for entry in path.iterdir())
        shown = ", ".join(names[:10]) + (" …" if len(names) > 10 else "")
        return f"a directory of {len(names)} entries ({shown})"
    looks = checkpoint.begins_like(path)
    if looks == "a zip archive":
        looks += (
            ", but either its directory, at its end, is missing or damaged, "
            "as in a truncated file, or its members are no arrays"
        )
    return f"{path.stat().st_size} bytes that begin like {looks}"


def write(
    arrays: Mapping[str, np.ndarray] | Any,
    path: str | os.PathLike[str],
    *,
    format: str | None = None,
    facts: Facts | None = None,
) -> None:
    """Writes a checkpoint.

    Args:
      arrays: canonical name → float array, such as a `Checkpoint`, or a Keras
        model of this package.
      path: where to. What exists there is replaced when the new one is whole;
        of directories only an empty one or a Hugging Face model's.
      format: "npz", Google's; "timm", one .safetensors file; "transformers", a
        Hugging Face directory; "keras", this package's model in a .keras file.
        By default the path's extension tells: .npz, .safetensors, .keras, or
        none for a directory.
      facts: what is said of the weights instead of what the arrays' own source
        said.

    Raises:
      CheckpointFormatError: no such format, or an array is not float and
        finite.
      CheckpointMismatchError: names or shapes are not those of a BiT-ResNet.
      OSError: the file cannot be written.
    """
    path = Path(path)
    if format is None:
        format = _SUFFIXES.get(path.suffix.lower())
    if format not in _WRITERS:
        raise errors.CheckpointFormatError(
            f"A checkpoint's format is one of {', '.join(_WRITERS)}, or chosen "
            "by the path's extension, "
            f"{', '.join(filter(None, _SUFFIXES))}, or none for a directory. "
            f"Received: {format or path.name!r}."
        )
    source: Any = arrays
    if hasattr(source, "layers") and not hasattr(source, "keys"):
        from bit_tf import models

        source = models.canonical_arrays(source)
    if facts is not None:
        source = Selection(source, facts)
    _WRITERS[format].write(source, path)
