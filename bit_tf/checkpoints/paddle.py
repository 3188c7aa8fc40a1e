"""PaddleNLP's model_state.pdparams: a pickle of NumPy arrays.

`paddle.save` writes a dictionary, name → array or (the parameter's own name,
array). Names are those of transformers, kernels OIHW, and the classifier's
kernel is (C, N). Protocols 2 and 3 cut arrays of more than 1 GiB in slices.

Source: PaddleNLP, paddlenlp/transformers/bit; Paddle, framework/io.py and
fluid/io.py.
"""

import functools
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from bit_tf import errors
from bit_tf.checkpoints import checkpoint, layout, rename, restricted_pickle
from bit_tf.checkpoints.facts import Facts
from bit_tf.checkpoints.restricted_pickle import StoredArray

__all__ = ["NAME", "LOOKS_FOR", "sniff", "read"]

NAME = "paddle"
LOOKS_FOR = (
    "a Python pickle that is whole, with its last opcode '.' at its end, or a "
    "directory with model_state.pdparams"
)

_FILE = "model_state.pdparams"
_TABLE = "StructuredToParameterName@@"
_SLICED = "UnpackBigParamInfor@@"
# Files that torch.save wrote before it wrote zip archives begin so.
_TORCH = b"\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."
_NOTE = "The layout is inferred: no published file of this format was seen."


def sniff(path: str | os.PathLike[str]) -> bool:
    """Whether a file looks like one of this format; never raises on garbage.

    True for a pickle of protocols 2 to 5 whose last byte is its last opcode,
    and for a directory that holds a model_state.pdparams like that. Files that
    torch.save wrote are none.
    """
    try:
        with open(_file(Path(path)), "rb") as file:
            start = file.read(2 + len(_TORCH))
            if (
                len(start) < 4
                or start[0] != 0x80
                or start[1] not in restricted_pickle.PROTOCOLS
                or start[2:] == _TORCH
            ):
                return False
            file.seek(-1, os.SEEK_END)
            return file.read(1) == b"."
    except (OSError, ValueError):
        return False


def read(path: str | os.PathLike[str]) -> checkpoint.Checkpoint:
    """Opens a checkpoint: reads the pickle without its arrays' data.

    Nothing that the pickle names is imported or called. An array is read from
    the file when it is asked for.

    Args:
      path: the file, or a directory that holds model_state.pdparams.

    Returns:
      A `Checkpoint` of the file; its `extra` are the names that are no part of
      the layout.

    Raises:
      FileNotFoundError: there is no such file.
      CheckpointFormatError: the file is no pickle, is damaged, would import or
        call something else than arrays need, or holds arrays that are not
        float.
      CheckpointMismatchError: names or shapes are not those of a BiT-ResNet.
    """
    path = _file(Path(path))
    content = restricted_pickle.read(path)
    if type(content) is not dict:
        raise errors.CheckpointFormatError(
            f"{path}: a .pdparams file holds a dictionary, name → array. "
            f"Received: a pickle of {restricted_pickle.kind(content)}. Give "
            "the file of the model's weights."
        )
    notes = [_NOTE]
    table = content.pop(_TABLE, None)
    if table is not None:
        count = f" ({len(table)} names)" if isinstance(table, dict) else ""
        notes.append(f"skipped Paddle's bookkeeping: {_TABLE}{count}")
    sliced = content.pop(_SLICED, {})
    problems: list[str] = []
    stored, others = _arrays(path, content, problems)
    stored = _joined(stored, sliced, problems)
    scheme = (
        rename.identify([*stored, *others], (rename.PADDLE, rename.PADDLE_BARE))
        or rename.PADDLE
    )
    for name, value in others.items():
        if scheme.canonical(name) is not None:
            problems.append(f"{name}: it is {value}, not an array")
    for name, entry in stored.items():
        if entry.dtype == np.uint16 and scheme.canonical(name) is not None:
            problems.append(
                f"{name}: it is of dtype uint16, as which Paddle writes "
                "bfloat16; save the model as float32"
            )
    if problems:
        raise errors.CheckpointFormatError(
            f"{path}: {len(problems)} of {len(content)} values cannot be "
            "read, because weights are arrays of float16, float32 or float64, "
            f"whole. {checkpoint.REMEDY}\n" + "\n".join(sorted(problems))
        )
    entries, extra = rename.collect(path, scheme, stored)
    return checkpoint.Checkpoint(
        path,
        entries,
        format=NAME,
        facts=Facts("timm"),
        extra=tuple(sorted([*extra, *others])),
        notes=tuple(notes),
        spell=scheme.spell,
    )


def _file(path: Path) -> Path:
    return path / _FILE if path.is_dir() else path


def _arrays(
    path: Path, content: Mapping[str, Any], problems: list[str]
) -> tuple[dict[str, checkpoint.Entry], dict[str, str]]:
    """The arrays, and the kinds of other values; adds what cannot be read."""
    stored: dict[str, checkpoint.Entry] = {}
    others: dict[str, str] = {}
    for name, value in content.items():
        if type(value) is tuple and len(value) == 2:
            value = value[1]
        if not isinstance(value, StoredArray):
            others[name] = restricted_pickle.kind(value)
        elif value.problem:
            problems.append(f"{layout.printable(name)}: {value.problem}")
        else:
            load = functools.partial(_load, path, name, value)
            stored[name] = checkpoint.Entry(
                value.shape, value.dtype, load, name
            )
    return stored, others


def _load(path: Path, name: str, array: StoredArray) -> np.ndarray:
    try:
        return array.read()
    except errors.CheckpointFormatError as error:
        raise errors.CheckpointFormatError(
            f"{path}: {layout.printable(name)} cannot be read: {error}. "
            f"{checkpoint.REMEDY}"
        ) from error


def _joined(
    stored: Mapping[str, checkpoint.Entry], sliced: Any, problems: list[str]
) -> dict[str, checkpoint.Entry]:
    """The arrays, with those that were cut put together."""
    result = dict(stored)
    if type(sliced) is not dict:
        problems.append(f"{_SLICED}: it is no dictionary")
        return result
    for name, info in sliced.items():
        match info:
            case {"OriginShape": tuple(shape), "slices": list(names)} if all(
                type(size) is int and size >= 0 for size in shape
            ) and all(type(part) is str for part in names):
                pass
            case _:
                problems.append(
                    f"{layout.printable(name)}: {_SLICED} does not say its "
                    "shape and slices"
                )
                continue
        # Each slice is taken away, so that none is used twice.
        parts = [result.pop(part, None) for part in names]
        whole = [part for part in parts if part is not None]
        if (
            len(whole) != len(parts)
            or name in result
            or len({part.dtype for part in whole}) != 1
            or sum(math.prod(part.shape) for part in whole) != math.prod(shape)
        ):
            problems.append(
                f"{layout.printable(name)}: its {len(names)} slices, of which "
                f"{len(whole)} are there, do not make shape {shape}"
            )
            continue
        dtype = whole[0].dtype
        result[name] = checkpoint.Entry(
            shape, dtype, functools.partial(_join, shape, dtype, whole), name
        )
    return result


def _join(
    shape: tuple[int, ...], dtype: np.dtype, parts: list[checkpoint.Entry]
) -> np.ndarray:
    joined = np.empty(math.prod(shape), dtype)
    end = 0
    for part in parts:
        start, end = end, end + math.prod(part.shape)
        joined[start:end] = part.load().reshape(-1)
    return joined.reshape(shape)
