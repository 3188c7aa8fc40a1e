"""The container of TensorFlow's checkpoints: an index and its data shards.

The index, `<prefix>.index`, is a sorted table of key → BundleEntryProto in
blocks, each with its CRC-32C. It is read here, in Python, because TensorFlow's
own reader ends the process at a shape that cannot be. What has passed is then
read by TensorFlow, one array at a time and by its checksum.

Source: tensorflow/core/util/tensor_bundle, tensorflow/core/lib/io/format.cc.
"""

import functools
import math
import os
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from bit_tf import errors
from bit_tf.checkpoints import checkpoint, layout

__all__ = ["Variable", "index_file", "load", "require_data", "variables"]

_MAGIC = struct.pack("<Q", 0xDB4775248B80FB57)
_FOOTER = 48
_BLOCK_END = struct.Struct("<BI")
_MAX_INDEX = 1 << 26
_MAX_RANK = 32
_MAX_BYTES = 2**62
_TEXTS = (7, 20, 21)  # DT_STRING, DT_RESOURCE, DT_VARIANT


class Variable(NamedTuple):
    """What the index says of one array.

    Attributes:
      shape, dtype: as stored; dtype object for texts and whatever else is no
        array of numbers.
      shard: the data file's path.
      offset, size: its bytes there; 0 and 0 for one that is kept in parts.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    shard: Path
    offset: int
    size: int


def index_file(prefix: Path) -> Path:
    """The path of a checkpoint's index."""
    return prefix.with_name(f"{prefix.name}.index")


def variables(prefix: Path) -> dict[str, Variable]:
    """Reads the index; no data.

    Args:
      prefix: path of the checkpoint, without `.index`.

    Returns:
      key → variable, in the order of the keys. A partitioned variable is
      listed whole, its parts are not.

    Raises:
      FileNotFoundError: there is no index.
      CheckpointFormatError: it is damaged, cut short, or claims what cannot
        be.
    """
    path = index_file(prefix)
    checkpoint.require_file(path)
    try:
        if path.stat().st_size > _MAX_INDEX:
            raise errors.CheckpointFormatError(
                f"an index has up to {_MAX_INDEX} bytes. Received: "
                f"{path.stat().st_size}."
            )
        return _variables(prefix, path.read_bytes())
    except errors.CheckpointFormatError as error:
        raise errors.CheckpointFormatError(
            f"{path}: {error} {checkpoint.REMEDY}"
        ) from error


def require_data(chosen: Mapping[str, Variable]) -> None:
    """Compares the places of arrays with the sizes of the data files.

    Args:
      chosen: name for messages → variable.

    Raises:
      CheckpointFormatError: with the name of each array that is not there.
    """
    sizes: dict[Path, int] = {}
    lines = []
    for name, variable in chosen.items():
        shard = variable.shard
        if shard not in sizes:
            sizes[shard] = shard.stat().st_size if shard.is_file() else -1
        if sizes[shard] < 0:
            lines.append(f"− {name}: there is no file {shard.name}")
        elif variable.offset + variable.size > sizes[shard]:
            lines.append(
                f"− {name}: bytes {variable.offset} to "
                f"{variable.offset + variable.size} of {shard.name}, which "
                f"ends at {sizes[shard]}"
            )
        elif (total := _beside(shard)) < _nbytes(variable):
            lines.append(
                f"− {name}: parts of {_nbytes(variable)} bytes together, of "
                f"which {total} are there"
            )
    if lines:
        raise errors.CheckpointFormatError(
            "The data of every variable are in the files beside the index. "
            f"Received: {len(lines)} of {len(chosen)} are not. "
            f"{checkpoint.REMEDY}\n" + "\n".join(lines)
        )


def _nbytes(variable: Variable) -> int:
    if variable.dtype.hasobject:
        return 0
    return math.prod(variable.shape) * variable.dtype.itemsize


def _beside(shard: Path) -> int:
    """Bytes of all data files of a checkpoint."""
    start = shard.name.rpartition(".data-")[0]
    return sum(
        file.stat().st_size
        for file in shard.parent.iterdir()
        if file.name.startswith(f"{start}.data-")
    )


def load(prefix: Path, key: str, shown: str) -> Any:
    """Reads one variable by TensorFlow, which compares its checksum.

    Args:
      prefix: path of the checkpoint.
      key: one of `variables`.
      shown: its name in messages.

    Returns:
      An array; bytes for a scalar text.

    Raises:
      CheckpointFormatError: its data are damaged or not there.
    """
    import tensorflow as tf

    try:
        reader = tf.train.load_checkpoint(os.path.abspath(prefix))
        return reader.get_tensor(key)
    # TensorFlow's Python layer turns some of its errors into Python's.
    except (
        tf.errors.OpError,
        ValueError,
        LookupError,
        TypeError,
        RuntimeError,
        MemoryError,
    ) as error:
        said = layout.printable(" ".join(str(error).split())[:300])
        raise errors.CheckpointFormatError(
            f"{shown} cannot be read. Received: {said}. {checkpoint.REMEDY}"
        ) from error


def _variables(prefix: Path, data: bytes) -> dict[str, Variable]:
    from google.protobuf import message
    from tensorflow.core.protobuf import tensor_bundle_pb2 as bundle

    found: dict[bytes, Variable] = {}
    header = None
    for key, value in _rows(data):
        shown = layout.printable(key.decode("utf-8", "backslashreplace"))
        try:
            if header is None:
                header = bundle.BundleHeaderProto.FromString(value)
                _check_header(key, header, bundle)
                continue
            entry = bundle.BundleEntryProto.FromString(value)
        except message.DecodeError as error:
            raise errors.CheckpointFormatError(
                f"an entry is a protocol message. Received: {shown}, which is "
                f"not one ({error})."
            ) from error
        if key in found:
            raise errors.CheckpointFormatError(
                f"a key is there once. Received: {shown} twice."
            )
        try:
            found[key] = _variable(prefix, entry, header.num_shards)
        except errors.CheckpointFormatError as error:
            raise errors.CheckpointFormatError(f"{shown}: {error}") from None
    if header is None:
        raise errors.CheckpointFormatError(
            "an index begins with a header. Received: an empty one."
        )
    # A part's key begins with a zero byte.
    return {
        key.decode("utf-8", "backslashreplace"): variable
        for key, variable in found.items()
        if not key.startswith(b"\0")
    }


def _check_header(key: bytes, header: Any, bundle: Any) -> None:
    if (
        key
        or header.endianness != bundle.BundleHeaderProto.LITTLE
        or not 0 < header.num_shards < 100_000
    ):
        raise errors.CheckpointFormatError(
            "an index begins with a header of little-endian data in 1 to "
            f"99999 shards. Received: key {key!r}, {header.num_shards} shards, "
            f"endianness {header.endianness}."
        )


def _variable(prefix: Path, entry: Any, shards: int) -> Variable:
    """Checks one entry, so that TensorFlow's reader survives it.

    Raises:
      CheckpointFormatError: without the key.
    """
    shape = tuple(dim.size for dim in entry.shape.dim)
    dtype = _dtype(entry.dtype)
    nbytes = math.prod(shape) * dtype.itemsize
    if (
        entry.shape.unknown_rank
        or len(shape) > _MAX_RANK
        or min(shape, default=0) < 0
        or not 0 <= nbytes <= _MAX_BYTES
        or max(shape, default=0) > _MAX_BYTES
    ):
        raise errors.CheckpointFormatError(
            f"a shape has up to {_MAX_RANK} sizes of 0 or more. Received: "
            f"{errors.brief(shape)}."
        )
    if (
        not 0 <= entry.shard_id < shards
        or entry.offset < 0
        or not 0 <= entry.size <= _MAX_BYTES
    ):
        raise errors.CheckpointFormatError(
            f"data lie in one of {shards} shards. Received: shard "
            f"{entry.shard_id}, offset {entry.offset}, size {entry.size}."
        )
    if entry.slices:
        _check_parts(shape, entry.slices)
    elif dtype.hasobject:
        if math.prod(shape) > max(1, entry.size):
            raise errors.CheckpointFormatError(
                f"each text has a length. Received: {entry.size} bytes for "
                f"shape {errors.brief(shape)}."
            )
    elif entry.size != nbytes:
        raise errors.CheckpointFormatError(
            f"an array of shape {errors.brief(shape)} and dtype {dtype} has "
            f"{nbytes} bytes. Received: {entry.size}."
        )
    shard = f"{prefix.name}.data-{entry.shard_id:05d}-of-{shards:05d}"
    return Variable(
        shape,
        dtype,
        prefix.with_name(shard),
        entry.offset,
        entry.size,
    )


def _dtype(number: int) -> np.dtype:
    import tensorflow as tf

    if number in _TEXTS:
        return np.dtype(object)
    try:
        return np.dtype(tf.as_dtype(number).as_numpy_dtype)
    except (TypeError, KeyError) as error:
        raise errors.CheckpointFormatError(
            f"a dtype is one that this TensorFlow knows. Received: number "
            f"{number}."
        ) from error


def _check_parts(shape: tuple[int, ...], parts: Any) -> None:
    """Checks that parts lie inside the whole and have its size together."""
    total = 0
    for part in parts:
        sizes = []
        for size, extent in zip(shape, part.extent, strict=False):
            start, length = extent.start, extent.length
            if not extent.HasField("length"):
                length = size - start
            if start < 0 or length < 0 or start + length > size:
                sizes = [-1]
                break
            sizes.append(length)
        if len(part.extent) != len(shape) or -1 in sizes:
            raise errors.CheckpointFormatError(
                f"a part lies inside the shape {errors.brief(shape)}. "
                f"Received: {errors.brief(str(part))}."
            )
        total += math.prod(sizes)
    if total != math.prod(shape):
        raise errors.CheckpointFormatError(
            f"parts make up the shape {errors.brief(shape)}. Received: "
            f"{total} values."
        )


def _rows(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """(key, value) of all the table's blocks, in the table's order."""
    footer = data[-_FOOTER:]
    if len(footer) < _FOOTER or not footer.endswith(_MAGIC):
        raise errors.CheckpointFormatError(
            "an index ends with TensorFlow's mark; this one is cut short or "
            f"something else. Received: {len(data)} bytes."
        )
    try:
        position = 0
        for _ in range(2):
            _, position = _varint(footer, position)
        start, position = _varint(footer, position)
        size, position = _varint(footer, position)
        for _, handle in _block(data, start, size):
            start, position = _varint(handle, 0)
            size, _ = _varint(handle, position)
            yield from _block(data, start, size)
    except IndexError:
        raise errors.CheckpointFormatError(
            "a table's numbers and texts lie inside its blocks. Received: one "
            "that goes on after its block."
        ) from None


def _block(data: bytes, start: int, size: int) -> Iterator[tuple[bytes, bytes]]:
    end = start + size
    if end + _BLOCK_END.size > len(data) or size < 8:
        raise errors.CheckpointFormatError(
            f"a block lies inside the index's {len(data)} bytes. Received: "
            f"bytes {start} to {end}."
        )
    kind, checksum = _BLOCK_END.unpack_from(data, end)
    if checksum != _masked(_crc32c(data[start : end + 1])):
        raise errors.CheckpointFormatError(
            f"a block has its checksum. Received: bytes {start} to {end} that "
            "have changed."
        )
    if kind:
        raise errors.CheckpointFormatError(
            f"blocks are stored, not compressed. Received: kind {kind}."
        )
    (restarts,) = struct.unpack_from("<I", data, end - 4)
    block = data[start : max(start, end - 4 - 4 * restarts)]
    position, key = 0, b""
    while position < len(block):
        shared, position = _varint(block, position)
        added, position = _varint(block, position)
        length, position = _varint(block, position)
        if shared > len(key) or position + added + length > len(block):
            raise IndexError
        key = key[:shared] + block[position : position + added]
        position += added
        yield key, block[position : position + length]
        position += length


def _varint(data: bytes, position: int) -> tuple[int, int]:
    """A number and the position after it; IndexError if there is none."""
    number = shift = 0
    while shift < 64:
        byte = data[position]
        position += 1
        number |= (byte & 0x7F) << shift
        if byte < 0x80:
            return number, position
        shift += 7
    raise IndexError


@functools.cache
def _crc_table() -> tuple[int, ...]:
    table = []
    for value in range(256):
        for _ in range(8):
            value = value >> 1 ^ (0x82F63B78 if value & 1 else 0)
        table.append(value)
    return tuple(table)


def _crc32c(data: bytes) -> int:
    table = _crc_table()
    crc = 0xFFFFFFFF
    for byte in data:
        crc = crc >> 8 ^ table[(crc ^ byte) & 0xFF]
    return crc ^ 0xFFFFFFFF


def _masked(crc: int) -> int:
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF
