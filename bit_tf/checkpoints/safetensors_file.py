"""The container of .safetensors files: a JSON header, then the data.

    8 bytes     length of the header, little-endian
    header      {name: {"dtype", "shape", "data_offsets"}, …} in JSON, and
                {"__metadata__": {text: text}}
    data        without holes, to the end of the file

The reader opens the header only and reads a tensor when it is asked for, with
a seek and a read: a file that shrinks meanwhile is an error and not the end of
the process, as with a memory map. The writer makes one array at a time. Both
need no other package. A list of shards, `*.safetensors.index.json`, is read
here for every format that has shards.

Source: huggingface/safetensors, README.md and safetensors/src/tensor.rs.
"""

import functools
import io
import json
import math
import os
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TypeGuard

import numpy as np

from bit_tf import errors
from bit_tf.checkpoints import checkpoint, json_files, layout, rename

__all__ = [
    "Opened",
    "encoded",
    "sharded",
    "sniff",
    "tensors",
    "write",
]

Shape = tuple[int, ...]

METADATA = "__metadata__"

_FIELDS = ("dtype", "shape", "data_offsets")

# Name of a dtype: bits, NumPy's name or that of ml_dtypes.
_DTYPES = {
    "BOOL": (8, "bool"),
    "F4": (4, "float4_e2m1fn"),
    "F6_E2M3": (6, "float6_e2m3fn"),
    "F6_E3M2": (6, "float6_e3m2fn"),
    "U8": (8, "uint8"),
    "I8": (8, "int8"),
    "F8_E5M2": (8, "float8_e5m2"),
    "F8_E4M3": (8, "float8_e4m3fn"),
    "F8_E8M0": (8, "float8_e8m0fnu"),
    "F8_E4M3FNUZ": (8, "float8_e4m3fnuz"),
    "F8_E5M2FNUZ": (8, "float8_e5m2fnuz"),
    "I16": (16, "<i2"),
    "U16": (16, "<u2"),
    "F16": (16, "<f2"),
    "BF16": (16, "bfloat16"),
    "I32": (32, "<i4"),
    "U32": (32, "<u4"),
    "F32": (32, "<f4"),
    "C64": (64, "<c8"),
    "F64": (64, "<f8"),
    "I64": (64, "<i8"),
    "U64": (64, "<u8"),
}
_MAX_HEADER = 100_000_000
_MAX_RANK = 32
_MAX_SIZE = 2**62
_MAX_SHOWN = 50
_CHUNK = 1 << 20


class Opened(NamedTuple):
    """A container's tensors, not read yet.

    Attributes:
      entries: name → tensor as it is stored.
      metadata: what else the file says, text → text.
      extra: names of what is no tensor.
      notes: what a user should know.
      files: where they are.
    """

    entries: dict[str, checkpoint.Entry]
    metadata: dict[str, str]
    extra: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    files: tuple[Path, ...] = ()


class _Tensor(NamedTuple):
    """One row of the header; offsets count from the data's beginning."""

    name: str
    dtype: str
    shape: Shape
    begin: int
    end: int


class _Header(NamedTuple):
    """What a file says of itself; `start` is where its data begin."""

    start: int
    crc: int
    tensors: tuple[_Tensor, ...]
    metadata: dict[str, str]


def sniff(path: str | os.PathLike[str]) -> bool:
    """Whether a file looks like a .safetensors; never raises on garbage."""
    try:
        with open(path, "rb") as file:
            start = file.read(9)
            size = os.fstat(file.fileno()).st_size
    except (OSError, ValueError):
        return False
    length = int.from_bytes(start[:8], "little")
    return start[8:] == b"{" and length <= _MAX_HEADER and 8 + length <= size


def tensors(path: str | os.PathLike[str]) -> Opened:
    """Opens a file: reads its header and checks it against the file's size.

    Raises:
      FileNotFoundError: there is no such file.
      CheckpointFormatError: the file is damaged, truncated or hostile. The
        message names each tensor that is concerned.
    """
    path = Path(path)
    checkpoint.require_file(path)
    try:
        with open(path, "rb") as file:
            header = _header(file)
    except errors.CheckpointFormatError as error:
        raise errors.CheckpointFormatError(f"{path}: {error}") from None
    entries = {
        row.name: checkpoint.Entry(
            row.shape,
            _dtype(row.dtype),
            functools.partial(_load, path, row, header.start, header.crc),
            row.name,
        )
        for row in header.tensors
    }
    return Opened(entries, header.metadata, files=(path,))


def sharded(
    path: str | os.PathLike[str],
    open_shard: Callable[[Path], Opened] = tensors,
) -> Opened:
    """Opens the shards that an index lists: {"weight_map": {tensor: file}}.

    Args:
      path: the index, `*.index.json`; the shards lie beside it.
      open_shard: opens one of them.

    Raises:
      FileNotFoundError: there is no such file.
      CheckpointFormatError: the index is damaged, names a file that is
        elsewhere or missing, or index and shards disagree in a tensor.
    """
    path = Path(path)
    checkpoint.require_file(path)
    where = _weight_map(path)
    files = sorted(set(where.values()))
    missing = [name for name in files if not (path.parent / name).is_file()]
    if missing:
        raise errors.CheckpointFormatError(
            f"{path}: every shard lies beside its index. Missing: "
            f"{', '.join(missing[:_MAX_SHOWN])}. Download them too."
        )
    found = Opened(
        {}, {}, files=(path, *(path.parent / name for name in files))
    )
    problems = []
    for file in files:
        shard = open_shard(path.parent / file)
        for name, entry in shard.entries.items():
            if where.get(name) != file:
                problems.append(
                    f"{layout.printable(name)} is in {file}; the index has it "
                    f"in {where.get(name, 'no file')}"
                )
            found.entries[name] = entry
        problems += [
            f"{layout.printable(name)} is not in {file}"
            for name, expected in where.items()
            if expected == file and name not in shard.entries
        ]
        found.metadata.update(shard.metadata)
        found = found._replace(
            extra=found.extra + shard.extra, notes=found.notes + shard.notes
        )
    if problems:
        raise errors.CheckpointFormatError(
            f"{path}: each tensor is in the shard that the index names for "
            f"it. {checkpoint.REMEDY}{_listed(problems)}"
        )
    return found


def encoded(
    scheme: rename.Scheme,
    arrays: Mapping[str, np.ndarray],
    shapes: Mapping[str, Shape],
) -> tuple[dict[str, Shape], Callable[[str], np.ndarray]]:
    """What `write` needs for arrays under a source's names and layouts.

    Args:
      scheme: the source.
      arrays: canonical name → float array.
      shapes: canonical name → shape.

    Returns:
      (stored name → shape, stored name → array)
    """
    names = {scheme.spell(name): name for name in shapes}

    def make(stored: str) -> np.ndarray:
        name = names[stored]
        return scheme.encode(name, checkpoint.take(arrays, name, shapes[name]))

    return {
        stored: scheme.stored_shape(name, shapes[name])
        for stored, name in names.items()
    }, make


def write(
    file: BinaryIO,
    shapes: Mapping[str, Shape],
    make: Callable[[str], np.ndarray],
    metadata: Mapping[str, str],
) -> None:
    """Writes float32 tensors, with the order and bytes of the library's.

    What was written is read back, but for the data.

    Args:
      file: new, to be written and read.
      shapes: name → shape.
      make: name → array of that shape; called once for each, in order.
      metadata: text → text.

    Raises:
      CheckpointMismatchError: an array has another shape than was promised.
      CheckpointFormatError: the header does not read back.
    """
    shapes = {name: tuple(shape) for name, shape in sorted(shapes.items())}
    header: dict[str, Any] = {}
    if metadata:
        header[METADATA] = dict(sorted(metadata.items()))
    end = 0
    for name, shape in shapes.items():
        begin, end = end, end + 4 * math.prod(shape)
        header[name] = {
            "dtype": "F32",
            "shape": shape,
            "data_offsets": (begin, end),
        }
    raw = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    file.write(len(raw).to_bytes(8, "little") + raw)
    for name, shape in shapes.items():
        _write_data(file, name, make(name), shape)
    file.flush()
    file.seek(0)
    written = {row.name: row.shape for row in _header(file).tensors}
    file.seek(0, io.SEEK_END)
    if written != shapes:
        raise errors.CheckpointFormatError(
            "What was written must read back the same. Received: "
            f"{len(written)} tensors for {len(shapes)}. The disk or its file "
            "system is at fault; write elsewhere."
        )


def _write_data(
    file: BinaryIO, name: str, array: np.ndarray, shape: Shape
) -> None:
    if array.shape != shape:
        raise errors.CheckpointMismatchError(
            f"{name} must have the shape that was promised, {shape}. "
            f"Received: {array.shape}."
        )
    # Views of other layouts are copied in parts: the array is there already.
    rows = array if array.ndim else array[None]
    step = max(1, _CHUNK // max(1, rows[:1].nbytes))
    for start in range(0, len(rows), step):
        part = np.ascontiguousarray(rows[start : start + step], "<f4")
        file.write(part.reshape(-1).view(np.uint8).data)


def _header(file: BinaryIO) -> _Header:
    """Reads and checks a header.

    Raises:
      CheckpointFormatError: without the file's path.
    """
    size = os.fstat(file.fileno()).st_size
    prefix = file.read(8)
    length = int.from_bytes(prefix, "little")
    if len(prefix) < 8 or length > min(_MAX_HEADER, size - 8):
        raise errors.CheckpointFormatError(
            "A .safetensors file begins with the length of its header, at "
            f"most {_MAX_HEADER} bytes, which follows. Received: {size} bytes "
            f"that begin with {prefix.hex(' ') or 'nothing'}. "
            + checkpoint.REMEDY
        )
    raw = file.read(length)
    if not raw.startswith(b"{"):
        raise errors.CheckpointFormatError(
            "The header of a .safetensors file is a JSON object. Received: "
            f"{errors.brief(raw[:40])}. {checkpoint.REMEDY}"
        )
    try:
        found = json_files.json_object(raw)
    except ValueError as error:
        raise errors.CheckpointFormatError(
            "The header of a .safetensors file is a JSON object. Received "
            f"another: {error}. {checkpoint.REMEDY}"
        ) from error
    metadata = found.pop(METADATA, None)
    if metadata is None:
        metadata = {}
    if not isinstance(metadata, dict) or not all(
        isinstance(value, str) for value in metadata.values()
    ):
        raise errors.CheckpointFormatError(
            f"{METADATA} maps text to text. Received: {errors.brief(metadata)}."
        )
    return _Header(
        8 + length,
        zlib.crc32(prefix + raw),
        _rows(found, size - 8 - length),
        metadata,
    )


def _rows(found: Mapping[str, Any], size: int) -> tuple[_Tensor, ...]:
    """Checks the header's rows against each other and the data's size."""
    rows = []
    problems = []
    for name, fields in found.items():
        try:
            rows.append(_row(name, fields))
        except ValueError as error:
            problems.append(f"{layout.printable(name)}: {error}")
    if not problems:
        rows.sort(key=lambda row: (row.begin, row.end))
        problems = _gaps(rows, size)
    if problems:
        raise errors.CheckpointFormatError(
            "The header of a .safetensors file tells each tensor's dtype, "
            "shape and place, which together are the file's data, "
            f"{size} bytes. {checkpoint.REMEDY}{_listed(problems)}"
        )
    return tuple(rows)


def _row(name: str, fields: Any) -> _Tensor:
    """Reads one row; a ValueError says what is wrong."""
    if not isinstance(fields, dict):
        raise ValueError(f"no object, {errors.brief(fields)}")
    dtype, shape, offsets = (fields.get(field) for field in _FIELDS)
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        raise ValueError(f"unknown dtype {errors.brief(dtype)}")
    if not _counts(shape) or len(shape) > _MAX_RANK:
        raise ValueError(f"no shape, {errors.brief(shape)}")
    if not _counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise ValueError(f"no data_offsets, {errors.brief(offsets)}")
    bits = math.prod(shape) * _DTYPES[dtype][0]
    begin, end = offsets
    if bits != 8 * (end - begin):
        raise ValueError(
            f"{dtype} of shape {errors.brief(tuple(shape))} needs "
            f"{errors.brief(bits)} bits, and its data_offsets, {begin} to "
            f"{end}, hold {8 * (end - begin)}"
        )
    return _Tensor(name, dtype, tuple(shape), begin, end)


def _counts(value: Any) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(
        type(count) is int and 0 <= count <= _MAX_SIZE for count in value
    )


def _gaps(rows: list[_Tensor], size: int) -> list[str]:
    """Names tensors that overlap, leave holes, or are cut off."""
    problems = []
    position = 0
    for row in rows:
        shown = layout.printable(row.name)
        if row.begin != position:
            problems.append(
                f"{shown}: its data begin at byte {row.begin}, and those "
                f"before it end at {position}"
            )
        position = max(position, row.end)
        if row.end > size:
            problems.append(
                f"{shown}: its data end at byte {row.end}, after the file's "
                f"end at {size}"
            )
    if position < size:
        problems.append(f"{size - position} bytes are of no tensor")
    return problems


def _dtype(name: str) -> np.dtype:
    text = _DTYPES[name][1]
    if not text.startswith(("bfloat", "float")):
        return np.dtype(text)
    import ml_dtypes

    # Older versions lack the smallest ones, which are no weights anyway.
    return np.dtype(getattr(ml_dtypes, text, np.void))


def _load(path: Path, row: _Tensor, start: int, crc: int) -> np.ndarray:
    buffer = np.empty(row.end - row.begin, np.uint8)
    with open(path, "rb") as file:
        unchanged = zlib.crc32(file.read(start)) == crc
        file.seek(start + row.begin)
        count = file.readinto(buffer.data)
    if not unchanged or count != buffer.size:
        raise errors.CheckpointFormatError(
            f"{path}: {layout.printable(row.name)} cannot be read: "
            + (
                f"its data end after {count} of {buffer.size} bytes"
                if unchanged
                else "the file is not what it was when it was opened"
            )
            + f". {checkpoint.REMEDY}"
        )
    return buffer.view(_dtype(row.dtype)).reshape(row.shape)


def _weight_map(path: Path) -> dict[str, str]:
    try:
        where = json_files.read_object(path, _MAX_HEADER).get("weight_map")
        if not isinstance(where, dict) or not where:
            raise ValueError(f"a weight_map of {errors.brief(where)}")
        for name, file in where.items():
            if not isinstance(file, str) or not _plain(file):
                raise ValueError(
                    f"{layout.printable(name)} in {errors.brief(file)}, which "
                    "is no plain file name"
                )
    except ValueError as error:
        raise errors.CheckpointFormatError(
            f'{path}: an index of shards is a JSON object with "weight_map", '
            "tensor → name of a file beside it. Received another: "
            f"{error}. {checkpoint.REMEDY}"
        ) from error
    return where


def _plain(name: str) -> bool:
    return (
        name not in ("", ".", "..")
        and name.isprintable()
        and not any(mark in name for mark in "/\\:")
    )


def _listed(problems: list[str]) -> str:
    lines = problems[:_MAX_SHOWN]
    if len(problems) > len(lines):
        lines.append(f"… and {len(problems) - len(lines)} more")
    return "".join(f"\n{line}" for line in lines)
