"""Google's .npz files: zip archives of one .npy member an array.

Members are named `resnet/` + canonical name + `.npy`, and the head's kernel
is (1, 1, features, classes). The reader opens headers only; it takes nothing
from a pickle. The writer gives the bytes that the published files have: a
stored zip without zip64 fields where none are needed, which `numpy.savez`
does not.

Source: google-research/big_transfer, bit_pytorch/models.py; the names
`standardized_conv2d_<N>` from google-research/big_vision, models/bit_paper.py.
"""

import dataclasses
import io
import math
import os
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
from absl import logging

from bit_tf import errors, files, labels, presets
from bit_tf.checkpoints import checkpoint, layout, npz, rename
from bit_tf.checkpoints.facts import Facts, facts_of

__all__ = ["NAME", "LOOKS_FOR", "sniff", "read", "write", "file_size"]

NAME = "google_npz"
LOOKS_FOR = "a zip archive of .npy members"

_PREFIX = "resnet/"
_MAX_COMMENT = 2**16 - 1
_FACTS = Facts("google", presets.PRESETS["big_transfer eval"])


def sniff(path: str | os.PathLike[str]) -> bool:
    """Whether a file looks like one of this format; never raises on garbage.

    True for a zip archive with a BiT root kernel among its members, or with
    nothing but .npy members.
    """
    keys, nothing_else = npz.keys(path)
    return any(
        rename.google_spelling(key) == layout.ROOT_KERNEL for key in keys
    ) or (bool(keys) and nothing_else)


def read(path: str | os.PathLike[str]) -> checkpoint.Checkpoint:
    """Opens a checkpoint: reads the archive's directory and array headers.

    Keys begin with `resnet/`; keys of an archive in which none does are taken
    as canonical names. `standardized_conv2d_<N>` is read as
    `standardized_conv2d`, and a head's kernel of (1, 1, C, N) as (C, N).
    Stored and deflated archives are read, with arrays in C or Fortran order.

    Returns:
      A `Checkpoint`; members that are no part of the layout are its `extra`.

    Raises:
      FileNotFoundError: there is no such file.
      CheckpointFormatError: the file is not a zip archive, is damaged, or
        holds arrays that are not float. Damage inside an array's data is
        found, by its checksum, when the array is read.
      CheckpointMismatchError: names or shapes are not those of a BiT-ResNet.
    """
    path = Path(path)
    entries, extra = npz.entries(path, _translator)
    if (head := entries.get(layout.HEAD_KERNEL)) is not None:
        entries[layout.HEAD_KERNEL] = npz.squeezed(head)
    return checkpoint.Checkpoint(
        path,
        entries,
        format=NAME,
        facts=_read_facts(path),
        extra=extra,
    )


def _translator(keys: Sequence[str]) -> Callable[[str], str | None]:
    prefixed = any(key.startswith(_PREFIX) for key in keys)

    def canonical(key: str) -> str | None:
        name = rename.google_spelling(key)
        mine = key.startswith(_PREFIX) == prefixed and layout.claims(name)
        return name if mine else None

    return canonical


def write(
    arrays: Mapping[str, np.ndarray], path: str | os.PathLike[str]
) -> None:
    """Writes a checkpoint as the published ones are, to the byte.

    The arrays are taken one at a time, so that a mapping which makes them when
    asked, such as a `Checkpoint`, needs the memory of one. The file appears at
    once and whole, or not at all: what was at the path stays until then. Two
    writes of the same arrays give the same bytes. Other constants than
    Google's and labels of one's own, which this format has no place for, are
    kept in the archive's comment; labels of over 64 kB are not, and a warning
    says so.

    Args:
      arrays: canonical name → float array, head (C, N). If it has an attribute
        `shapes`, no array is made to learn its shape.
      path: the file to write or to replace.

    Raises:
      CheckpointMismatchError: names or shapes are not those of a BiT-ResNet.
      CheckpointFormatError: an array is not float or holds NaN or infinity.
      OSError: the file cannot be written.
    """
    path = Path(path)
    checkpoint.require_place(path)
    shapes = checkpoint.checked_shapes(arrays)
    comment = _comment(facts_of(arrays))
    with files.new_file(path) as file:
        with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
            archive.comment = comment
            for name, shape in shapes.items():
                _write_member(
                    archive, name, checkpoint.take(arrays, name, shape)
                )
        file.flush()
        _read_back(Path(file.name), shapes, len(comment))


def file_size(shapes: Mapping[str, tuple[int, ...]]) -> int:
    """Gives the size in bytes of the file that `write` makes.

    Args:
      shapes: canonical name → shape.
    """
    limit = zipfile.ZIP64_LIMIT
    offset = directory = 0
    for name in sorted(shapes):
        size = len(_npy_header(name, shapes[name])) + 4 * math.prod(
            shapes[name]
        )
        filename = len(_PREFIX + name + npz.SUFFIX)
        wide = 2 * (size > limit) + (offset > limit)
        directory += 46 + filename + (4 + 8 * wide if wide else 0)
        offset += 30 + filename + size + (20 if size * 1.05 > limit else 0)
    end = 22 + (76 if offset > limit or directory > limit else 0)
    return offset + directory + end


def _stored_shape(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    return (1, 1, *shape) if name == layout.HEAD_KERNEL else shape


def _npy_header(name: str, shape: tuple[int, ...]) -> bytes:
    stream = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        stream,
        {
            "descr": "<f4",
            "fortran_order": False,
            "shape": tuple(int(n) for n in _stored_shape(name, shape)),
        },
    )
    return stream.getvalue()


def _write_member(
    archive: zipfile.ZipFile, name: str, array: np.ndarray
) -> None:
    values = array.astype("<f4", copy=False)
    header = _npy_header(name, array.shape)
    info = zipfile.ZipInfo(_PREFIX + name + npz.SUFFIX, (1980, 1, 1, 0, 0, 0))
    info.create_system = 3
    info.external_attr = 0o644 << 16
    # A known size keeps zipfile from making room for zip64.
    info.file_size = len(header) + values.nbytes
    with archive.open(info, "w") as member:
        member.write(header)
        member.write(values.data)


def _comment(facts: Facts) -> bytes:
    """What the archive's comment must say: nothing, of Google's own facts."""
    published = facts.labels and labels.of_count(len(facts.labels))
    if published and facts.labels == labels.label_set(published):
        # The number of classes tells.
        facts = dataclasses.replace(facts, labels=None)
    if facts in (_FACTS, dataclasses.replace(_FACTS, preset=None)):
        return b""
    comment = facts.to_json().encode()
    if len(comment) <= _MAX_COMMENT:
        return comment
    logging.warning(
        "An .npz has room for %d bytes of labels. These %d are not kept: "
        "write a .safetensors file or another format beside it.",
        _MAX_COMMENT,
        len(facts.labels or ()),
    )
    return _comment(dataclasses.replace(facts, labels=None))


def _read_facts(path: Path) -> Facts:
    comment = npz.comment(path)
    # Other programs write comments of their own.
    if not comment.startswith(b"{") or b'"numerics":' not in comment:
        return _FACTS
    return Facts.from_json(comment)


def _read_back(
    path: Path, shapes: Mapping[str, tuple[int, ...]], comment: int
) -> None:
    written = read(path)
    size, promised = path.stat().st_size, file_size(shapes) + comment
    if written.shapes != shapes or size != promised:
        raise errors.CheckpointFormatError(
            f"{path}: what was written must read back the same. Received: "
            f"{size} bytes for {promised}. The disk or its file "
            "system is at fault; write elsewhere."
        )
