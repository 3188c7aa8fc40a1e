"""The container of TensorFlow's checkpoints: an index and its data shards.

The index, `<prefix>.index`, is a sorted table of key → BundleEntryProto in
blocks, each with its CRC-32C. Index and data are read here, in Python, because
TensorFlow's own reader ends the process at a shape or a dtype that cannot be,
and takes a path for a pattern. Each array has a checksum, which is compared.

Source: tensorflow/core/util/tensor_bundle, tensorflow/core/lib/io/format.cc,
tensorflow/core/lib/strings/ordered_code.cc.
"""

import functools
import math
import mmap
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from bit_tf import errors
from bit_tf.checkpoints import checkpoint, layout

__all__ = [
    "Part",
    "Variable",
    "index_file",
    "load",
    "pieces",
    "require_data",
    "rows",
    "text",
    "variables",
    "varint",
]

_MAGIC = struct.pack("<Q", 0xDB4775248B80FB57)
_FOOTER = 48
_BLOCK_END = struct.Struct("<BI")
_MAX_INDEX = 1 << 26
_MAX_RANK = 32
_MAX_BYTES = 2**62
_MAX_PARTS = 1000
_TEXT = np.dtype(object)
# TensorFlow's dtypes by number; the rest of those it has are never weights.
_DTYPES = {
    1: "<f4",
    2: "<f8",
    3: "<i4",
    4: "u1",
    5: "<i2",
    6: "i1",
    8: "<c8",
    9: "<i8",
    10: "?",
    14: "bfloat16",
    17: "<u2",
    18: "<c16",
    19: "<f2",
    22: "<u4",
    23: "<u8",
}
# Data are summed in lanes of 2**6 bytes side by side, a mebibyte at a time.
_LANE = 6
_CHUNK = 1 << 20


class Variable(NamedTuple):
    """What the index says of one array.

    Attributes:
      shape, dtype: as stored; dtype object for texts and whatever else is no
        array of numbers.
      shard: the data file's path.
      offset, size: its bytes there; 0 and 0 for one that is kept in parts.
      crc32c: masked checksum of its bytes.
      parts: what a partitioned variable is made of; they cover it and do not
        overlap.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    shard: Path
    offset: int
    size: int
    crc32c: int = 0
    parts: tuple["Part", ...] = ()


class Part(NamedTuple):
    """A part of a variable: its place in the whole, and its data."""

    place: tuple[slice, ...]
    variable: Variable


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
    lines = {}
    for name, whole in chosen.items():
        for variable in pieces(whole):
            shard, end = variable.shard, variable.offset + variable.size
            if shard not in sizes:
                sizes[shard] = shard.stat().st_size if shard.is_file() else -1
            if sizes[shard] < 0:
                lines[name] = f"− {name}: there is no file {shard.name}"
            elif end > sizes[shard]:
                lines[name] = (
                    f"− {name}: bytes {variable.offset} to {end} of "
                    f"{shard.name}, which ends at {sizes[shard]}"
                )
    if lines:
        raise errors.CheckpointFormatError(
            "The data of every variable are in the files beside the index. "
            f"Received: {len(lines)} of {len(chosen)} are not. "
            f"{checkpoint.REMEDY}\n" + "\n".join(lines.values())
        )


def pieces(variable: Variable) -> tuple[Variable, ...]:
    """What lies in the data files: a variable's parts, or itself."""
    if not variable.parts:
        return (variable,)
    return tuple(part.variable for part in variable.parts)


def load(variable: Variable, shown: str) -> np.ndarray:
    """Reads one array of numbers and compares its checksum.

    Args:
      variable: one of `variables`, not of dtype object.
      shown: its name in messages.

    Raises:
      OSError: its data cannot be read.
      CheckpointFormatError: they are damaged, or end too early.
    """
    if not variable.parts:
        return _plain(variable, shown)
    whole = np.empty(variable.shape, variable.dtype)
    for place, part in variable.parts:
        whole[place] = _plain(part, shown)
    return whole


def text(variable: Variable, shown: str) -> bytes:
    """Reads one text and compares its checksum.

    Args:
      variable: one of `variables`.
      shown: its name in messages.

    Raises:
      OSError: its data cannot be read.
      CheckpointFormatError: they are damaged, or end too early, or it is no
        single text.
    """
    if variable.dtype != _TEXT or variable.shape or variable.parts:
        raise errors.CheckpointFormatError(
            f"{shown} is one text. Received: dtype {variable.dtype} and shape "
            f"{errors.brief(variable.shape)}. {checkpoint.REMEDY}"
        )
    data = _bytes(variable, shown).tobytes()
    try:
        length, start = varint(data, 0)
    except IndexError:
        length, start = len(data), 0
    checksum, value = data[start : start + 4], data[start + 4 :]
    # TensorFlow sums the length as a number of fixed size.
    number = length.to_bytes(4 if length < 1 << 32 else 8, "little")
    summed = _masked(_crc32c(number + checksum + value))
    if length != len(value) or summed != variable.crc32c:
        raise _changed(variable, shown)
    return value


def _plain(variable: Variable, shown: str) -> np.ndarray:
    data = _bytes(variable, shown)
    if variable.crc32c != _masked(_crc32c(data)):
        raise _changed(variable, shown)
    return data.view(variable.dtype).reshape(variable.shape)


def _bytes(variable: Variable, shown: str) -> np.ndarray:
    data = np.fromfile(
        variable.shard, np.uint8, variable.size, offset=variable.offset
    )
    if data.size != variable.size:
        raise errors.CheckpointFormatError(
            f"{shown} has {variable.size} bytes in {variable.shard.name}. "
            f"Received: {data.size}. {checkpoint.REMEDY}"
        )
    return data


def _changed(variable: Variable, shown: str) -> errors.CheckpointFormatError:
    return errors.CheckpointFormatError(
        f"{shown} has the checksum that the index tells. Received: bytes "
        f"{variable.offset} to {variable.offset + variable.size} of "
        f"{variable.shard.name} that have changed. {checkpoint.REMEDY}"
    )


def _variables(prefix: Path, data: bytes) -> dict[str, Variable]:
    from google.protobuf import message
    from tensorflow.core.protobuf import tensor_bundle_pb2 as bundle

    found: dict[bytes, Variable] = {}
    sliced: dict[bytes, Any] = {}
    header = None
    left = _MAX_INDEX
    for key, value in rows(data):
        shown = _shown(key)
        # Keys share their beginnings, so that short rows may make long keys.
        left -= len(key)
        if left < 0:
            raise errors.CheckpointFormatError(
                f"keys have up to {_MAX_INDEX} bytes together. Received: more, "
                f"from {errors.brief(shown)} on."
            )
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
        if entry.slices:
            if _is_part(key):
                raise errors.CheckpointFormatError(
                    f"{shown}: a part has no parts itself. Received: "
                    f"{len(entry.slices)}."
                )
            sliced[key] = entry.slices
    if header is None:
        raise errors.CheckpointFormatError(
            "an index begins with a header. Received: an empty one."
        )
    for key, slices in sliced.items():
        try:
            parts = _parts(key, slices, found)
        except errors.CheckpointFormatError as error:
            raise errors.CheckpointFormatError(
                f"{_shown(key)}: {error}"
            ) from None
        found[key] = found[key]._replace(offset=0, size=0, parts=parts)
    return {
        key.decode("utf-8", "backslashreplace"): variable
        for key, variable in found.items()
        if not _is_part(key)
    }


def _is_part(key: bytes) -> bool:
    return key.startswith(b"\0")


def _shown(key: bytes) -> str:
    return layout.printable(key.decode("utf-8", "backslashreplace"))


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
    """Checks one entry; a whole's parts are looked up by `_parts`.

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
    if dtype == _TEXT:
        if not entry.slices and math.prod(shape) > max(1, entry.size):
            raise errors.CheckpointFormatError(
                f"each text has a length. Received: {entry.size} bytes for "
                f"shape {errors.brief(shape)}."
            )
    elif not entry.slices and entry.size != nbytes:
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
        entry.crc32c,
    )


def _dtype(number: int) -> np.dtype:
    import ml_dtypes
    from tensorflow.core.framework import types_pb2

    known = types_pb2.DataType.values()
    # From 101 on they are references to the others.
    if number not in known or not 0 < number <= 100:
        raise errors.CheckpointFormatError(
            f"a dtype is one that this TensorFlow knows. Received: number "
            f"{number}."
        )
    name = _DTYPES.get(number)
    if name is None:
        return _TEXT
    return np.dtype(getattr(ml_dtypes, name, name))


def _parts(
    key: bytes, slices: Any, found: Mapping[bytes, Variable]
) -> tuple[Part, ...]:
    """The parts of a whole, which cover it and do not overlap.

    Raises:
      CheckpointFormatError: without the key.
    """
    whole = found[key]
    if len(slices) > _MAX_PARTS:
        raise errors.CheckpointFormatError(
            f"a variable has up to {_MAX_PARTS} parts. Received: {len(slices)}."
        )
    parts = []
    for proto in slices:
        extents = [
            (extent.start, extent.length if extent.HasField("length") else -1)
            for extent in proto.extent
        ]
        place = _place(whole.shape, extents)
        part = found.get(_part_key(key, extents))
        shape = tuple(side.stop - side.start for side in place)
        if part is None or (part.shape, part.dtype) != (shape, whole.dtype):
            kept = "nothing"
            if part is not None:
                kept = f"{errors.brief(part.shape)} of dtype {part.dtype}"
            raise errors.CheckpointFormatError(
                f"a part of shape {errors.brief(shape)} and dtype "
                f"{whole.dtype} is there. Received: {kept}."
            )
        parts.append(Part(place, part))
    _check_cover(whole.shape, [part.place for part in parts])
    return tuple(parts)


def _place(
    shape: tuple[int, ...], extents: list[tuple[int, int]]
) -> tuple[slice, ...]:
    """Where a part lies in the whole; (0, −1) stands for all of an axis."""
    place = [
        slice(start, start + (size if (start, length) == (0, -1) else length))
        for size, (start, length) in zip(shape, extents, strict=False)
    ]
    if len(extents) != len(shape) or not all(
        0 <= side.start <= side.stop <= size
        for size, side in zip(shape, place, strict=True)
    ):
        raise errors.CheckpointFormatError(
            f"a part lies inside the shape {errors.brief(shape)}. Received: "
            f"(start, length) {errors.brief(extents)}."
        )
    return tuple(place)


def _check_cover(
    shape: tuple[int, ...], places: list[tuple[slice, ...]]
) -> None:
    total = sum(
        math.prod(side.stop - side.start for side in place) for place in places
    )
    if total != math.prod(shape):
        raise errors.CheckpointFormatError(
            f"parts make up the shape {errors.brief(shape)}. Received: "
            f"{total} values."
        )
    starts, stops = (
        np.array([[getattr(side, end) for side in place] for place in places])
        for end in ("start", "stop")
    )
    for number in range(len(places)):
        first = np.maximum(starts[number], starts[number + 1 :])
        last = np.minimum(stops[number], stops[number + 1 :])
        if (first < last).all(axis=1).any():
            raise errors.CheckpointFormatError(
                f"parts do not overlap. Received: part {number} and a later "
                "one do."
            )


def _part_key(key: bytes, extents: list[tuple[int, int]]) -> bytes:
    """A part's key: 0, the whole's key, the rank, and the extents."""
    escaped = b"\0\xff".join(
        piece.replace(b"\xff", b"\xff\0") for piece in key.split(b"\0")
    )
    rank = len(extents)
    return b"".join(
        (
            b"\0",
            escaped,
            b"\0\1",
            bytes([1, rank] if rank else [0]),
            *(_signed(number) for extent in extents for number in extent),
        )
    )


def _signed(number: int) -> bytes:
    """TensorFlow's encoding of whole numbers whose order is that of bytes."""
    bits = (number if number >= 0 else ~number).bit_length()
    length = bits // 7 + 1
    ones = (1 << length) - 1 << 7 * length
    mask = (1 << 8 * length) - 1
    return (number & mask ^ ones).to_bytes(length, "big")


def rows(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """(key, value) of all of an index's blocks, in its order.

    The key b"" has a BundleHeaderProto, each other one a BundleEntryProto.

    Args:
      data: the bytes of the index file.

    Raises:
      CheckpointFormatError: they are damaged or cut short.
    """
    footer = data[-_FOOTER:]
    if len(footer) < _FOOTER or not footer.endswith(_MAGIC):
        raise errors.CheckpointFormatError(
            "an index ends with TensorFlow's mark; this one is cut short or "
            f"something else. Received: {len(data)} bytes."
        )
    try:
        position = 0
        for _ in range(2):
            _, position = varint(footer, position)
        start, position = varint(footer, position)
        size, position = varint(footer, position)
        end = 0
        for _, handle in _block(data, start, size):
            start, position = varint(handle, 0)
            size, _ = varint(handle, position)
            if start < end:
                raise errors.CheckpointFormatError(
                    "blocks follow each other. Received: one at byte "
                    f"{start}, after one that ends at {end}."
                )
            end = start + size
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
        shared, position = varint(block, position)
        added, position = varint(block, position)
        length, position = varint(block, position)
        if shared > len(key) or position + added + length > len(block):
            raise IndexError
        key = key[:shared] + block[position : position + added]
        position += added
        yield key, block[position : position + length]
        position += length


def varint(data: bytes | mmap.mmap, position: int) -> tuple[int, int]:
    """(number of variable length, position after it).

    Raises:
      IndexError: there is none.
    """
    number = shift = 0
    while shift < 64:
        byte = data[position]
        position += 1
        number |= (byte & 0x7F) << shift
        if byte < 0x80:
            return number, position
        shift += 7
    raise IndexError


def _crc32c(data: bytes | np.ndarray) -> int:
    """CRC-32C of bytes, or of an array of uint8 [n]."""
    octets = np.frombuffer(data, np.uint8)
    register = np.uint32(0xFFFFFFFF)
    for start in range(0, octets.size, _CHUNK):
        piece = octets[start : start + _CHUNK]
        for log in range(piece.size.bit_length()):
            if piece.size >> log & 1:
                register = _zeros(register, log)
        register = register ^ _remainder(piece)
    return int(register) ^ 0xFFFFFFFF


def _remainder(octets: np.ndarray) -> np.uint32:
    """The register after some bytes, if it was 0: zeros before add nothing."""
    lanes = 1 << max(0, (octets.size - 1).bit_length() - _LANE)
    padded = np.zeros(lanes << _LANE, np.uint8)
    padded[padded.size - octets.size :] = octets
    words = padded.view("<u2").reshape(lanes, -1).T
    registers = np.zeros(lanes, np.uint32)
    table = _pairs()
    for word in np.ascontiguousarray(words):
        registers = table[(registers ^ word) & 0xFFFF] ^ registers >> 16
    log = _LANE
    while registers.size > 1:
        registers = _zeros(registers[::2], log) ^ registers[1::2]
        log += 1
    return registers[0]


def _zeros(registers: Any, log: int) -> Any:
    """Registers (uint32) after 2**log more bytes of 0."""
    first, second, third, fourth = _tables(log)
    return (
        first[registers & 0xFF]
        ^ second[registers >> 8 & 0xFF]
        ^ third[registers >> 16 & 0xFF]
        ^ fourth[registers >> 24]
    )


@functools.cache
def _tables(log: int) -> np.ndarray:
    """What `_zeros` makes of each byte of a register; uint32 [4, 256]."""
    places = np.arange(0, 32, 8, dtype=np.uint32)[:, None]
    registers = np.arange(256, dtype=np.uint32) << places
    if log:
        return _zeros(_zeros(registers, log - 1), log - 1)
    for _ in range(8):
        odd = registers & 1
        registers = np.where(odd, 0x82F63B78, np.uint32(0)) ^ registers >> 1
    return registers


@functools.cache
def _pairs() -> np.ndarray:
    """What two bytes of 0 make of each 16 bits; uint32 [65536]."""
    return _zeros(np.arange(1 << 16, dtype=np.uint32), 1)


def _masked(crc: int) -> int:
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF
