"""Google's .npz files: zip archives of one .npy member an array.

Members are named `resnet/` + canonical name + `.npy`, and the head's kernel
is (1, 1, features, classes). The reader opens headers only; it takes nothing
from a pickle. The writer gives the bytes that the published files have: a
stored zip without zip64 fields where none are needed, which `numpy.savez`
does not.

Source: google-research/big_transfer, bit_pytorch/models.py; the names
`standardized_conv2d_<N>` from google-research/big_vision, models/bit_paper.py.
"""

import ast
import io
import math
import os
import re
import struct
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from bit_tf import errors, files
from bit_tf.checkpoints import checkpoint, layout

__all__ = ["NAME", "LOOKS_FOR", "sniff", "read", "write", "file_size"]

NAME = "google_npz"
LOOKS_FOR = "a zip archive of .npy members"

_PREFIX = "resnet/"
_SUFFIX = ".npy"
_NUMBERED = re.compile(r"/standardized_conv2d_[0-9]+/")
_FLOAT = re.compile(r"[<>=|]?f[248]")
_CHUNK = 1 << 20
_MAX_HEADER = 10_000
_MAX_RANK = 32
_MAX_SIZE = 2**62
_MAX_DEFLATE_RATIO = 1032
_ENCRYPTED = 0x1 | 0x40 | 0x2000
_LOCAL = struct.Struct("<4s5H3I2H")

# What zipfile raises on damaged directories, beside BadZipFile.
_ZIP_ERRORS = (
    zipfile.BadZipFile,
    zipfile.LargeZipFile,
    NotImplementedError,
    OSError,
    ValueError,
    OverflowError,
    IndexError,
    EOFError,
    struct.error,
)


def sniff(path: str | os.PathLike[str]) -> bool:
    """Whether a file looks like one of this format; never raises on garbage.

    True for a zip archive with a BiT root kernel among its members, or with
    nothing but .npy members.
    """
    try:
        with open(path, "rb") as file:
            if file.read(4) != b"PK\x03\x04":
                return False
            with zipfile.ZipFile(file) as archive:
                members = archive.namelist()
    except _ZIP_ERRORS:
        return False
    keys = [m.removesuffix(_SUFFIX) for m in members if m.endswith(_SUFFIX)]
    return any(
        _canonical(key.removeprefix(_PREFIX)) == layout.ROOT_KERNEL
        for key in keys
    ) or (bool(keys) and len(keys) == len(members))


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
    checkpoint.require_file(path)
    with open(path, "rb") as file:
        members, extra = _members(path, file)
        problems: list[str] = []
        entries = {}
        for name, member in members.items():
            try:
                header = _header(file, member)
            except errors.CheckpointFormatError as error:
                problems.append(f"{name}: {error}")
                continue
            entries[name] = _entry(path, name, member, header)
    if problems:
        raise errors.CheckpointFormatError(
            f"{path}: {len(problems)} of {len(members)} arrays cannot be "
            f"read. {checkpoint.REMEDY}\n" + "\n".join(problems)
        )
    return checkpoint.Checkpoint(
        path, entries, format=NAME, numerics="google", extra=extra
    )


def write(
    arrays: Mapping[str, np.ndarray], path: str | os.PathLike[str]
) -> None:
    """Writes a checkpoint as the published ones are, to the byte.

    The arrays are taken one at a time, so that a mapping which makes them when
    asked, such as a `Checkpoint`, needs the memory of one. The file appears at
    once and whole, or not at all: what was at the path stays until then. Two
    writes of the same arrays give the same bytes.

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
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a directory; give a file's path.")
    if not path.parent.is_dir():
        raise FileNotFoundError(
            f"{path.parent} is not a directory; make it before writing "
            f"{path.name}."
        )
    if hasattr(arrays, "shapes"):
        shapes = {name: tuple(s) for name, s in arrays.shapes.items()}
    else:
        shapes = {name: np.shape(arrays[name]) for name in arrays}
    detected = layout.detect(shapes)
    layout.check(
        shapes,
        layout.expected_shapes(
            detected.blocks, detected.stem_width, detected.num_classes
        ),
    )
    with files.new_file(path) as file:
        with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
            for name in sorted(shapes):
                _write_member(archive, name, shapes[name], arrays[name])
        file.flush()
        _read_back(Path(file.name), shapes)


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
        filename = len(_PREFIX + name + _SUFFIX)
        wide = 2 * (size > limit) + (offset > limit)
        directory += 46 + filename + (4 + 8 * wide if wide else 0)
        offset += 30 + filename + size + (20 if size * 1.05 > limit else 0)
    end = 22 + (76 if offset > limit or directory > limit else 0)
    return offset + directory + end


class _Member(NamedTuple):
    """Where an array lies in the archive, as the directory says."""

    filename: bytes
    offset: int
    deflated: bool
    compressed: int
    size: int
    crc: int


class _Header(NamedTuple):
    """What a .npy header says; `length` counts the header's bytes."""

    shape: tuple[int, ...]
    dtype: np.dtype
    fortran: bool
    length: int

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def _canonical(key: str) -> str:
    return _NUMBERED.sub("/standardized_conv2d/", key)


def _members(
    path: Path, file: BinaryIO
) -> tuple[dict[str, _Member], tuple[str, ...]]:
    """Reads the archive's directory: the layout's members, and other keys."""
    length = file.seek(0, os.SEEK_END)
    try:
        with zipfile.ZipFile(file) as archive:
            infos = archive.infolist()
    except _ZIP_ERRORS as error:
        looks = checkpoint.begins_like(path)
        cause = (
            "a zip archive whose directory, at its end, is missing or "
            "damaged: the file is truncated or corrupt"
            if looks == "a zip archive"
            else looks
        )
        raise errors.CheckpointFormatError(
            f"{path}: a .npz checkpoint is a zip archive. Received: "
            f"{length} bytes that begin like {cause}. {checkpoint.REMEDY} "
            f"({error})"
        ) from error
    prefixed = any(info.filename.startswith(_PREFIX) for info in infos)
    members: dict[str, _Member] = {}
    spelled: dict[str, str] = {}
    seen: set[str] = set()
    extra: list[str] = []
    for info in infos:
        filename = info.filename
        shown = layout.printable(filename)
        if filename in seen:
            raise errors.CheckpointFormatError(
                f"{path}: names in an archive are unique. Received: "
                f"{shown} twice. {checkpoint.REMEDY}"
            )
        seen.add(filename)
        key = filename.removesuffix(_SUFFIX)
        name = _canonical(key.removeprefix(_PREFIX))
        if (
            not filename.endswith(_SUFFIX)
            or key.startswith(_PREFIX) != prefixed
            or not layout.claims(name)
        ):
            extra.append(key)
            continue
        if name in members:
            raise errors.CheckpointFormatError(
                f"{path}: an array has one name. Received: {spelled[name]} "
                f"and {shown}, which are both {name}. Remove one of them."
            )
        members[name] = _member(path, name, info, length)
        spelled[name] = shown
    return members, tuple(sorted(extra))


def _member(
    path: Path, name: str, info: zipfile.ZipInfo, length: int
) -> _Member:
    """Checks one entry of the directory against the file's length."""
    problem = ""
    method = info.compress_type
    if info.flag_bits & _ENCRYPTED:
        problem = "it is encrypted"
    elif method not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        problem = (
            f"its compression method is {method}, and only stored (0) and "
            "deflated (8) arrays are read; write it again with numpy.savez"
        )
    elif (
        info.header_offset < 0
        or info.header_offset + _LOCAL.size + info.compress_size > length
    ):
        problem = f"it lies outside the file's {length} bytes"
    elif method == zipfile.ZIP_STORED and info.compress_size != info.file_size:
        problem = (
            f"it is stored, yet its two sizes differ, {info.compress_size} "
            f"and {info.file_size}"
        )
    elif info.file_size > _MAX_DEFLATE_RATIO * info.compress_size:
        problem = (
            f"{info.compress_size} bytes cannot inflate to {info.file_size}"
        )
    if problem:
        raise errors.CheckpointFormatError(
            f"{path}: {name} cannot be read: {problem}. {checkpoint.REMEDY}"
        )
    return _Member(
        filename=info.orig_filename.encode(
            "utf-8" if info.flag_bits & 0x800 else "cp437", "replace"
        ),
        offset=info.header_offset,
        deflated=method == zipfile.ZIP_DEFLATED,
        compressed=info.compress_size,
        size=info.file_size,
        crc=info.CRC,
    )


class _Stream:
    """Reads a member forwards and sums its CRC.

    `ZipFile.open` would parse the whole directory again for each array, or
    hold the file open for as long as the checkpoint lives.
    """

    def __init__(self, file: BinaryIO, member: _Member):
        file.seek(member.offset)
        local = file.read(_LOCAL.size)
        if len(local) < _LOCAL.size or not local.startswith(b"PK\x03\x04"):
            raise errors.CheckpointFormatError(
                f"no array begins at byte {member.offset}"
            )
        fields = _LOCAL.unpack(local)
        filename = file.read(fields[-2])
        if filename != member.filename:
            raise errors.CheckpointFormatError(
                f"the archive's directory and the array's own record differ "
                f"in its name, {ascii(filename)[1:]}"
            )
        file.seek(fields[-1], os.SEEK_CUR)
        self.crc = 0
        self._file = file
        self._left = member.compressed
        self._inflate = zlib.decompressobj(-15) if member.deflated else None

    def read(self, size: int) -> bytes:
        """Reads `size` bytes, fewer only at the member's end."""
        if self._inflate is None:
            data = self._raw(size)
        else:
            parts = []
            while size and not self._inflate.eof:
                raw = self._inflate.unconsumed_tail or self._raw(_CHUNK)
                try:
                    part = self._inflate.decompress(raw, size)
                except zlib.error as error:
                    raise errors.CheckpointFormatError(
                        f"its compressed data are damaged ({error})"
                    ) from error
                if not raw and not part:
                    break
                parts.append(part)
                size -= len(part)
            data = b"".join(parts)
        self.crc = zlib.crc32(data, self.crc)
        return data

    def _raw(self, size: int) -> bytes:
        data = self._file.read(min(size, self._left))
        self._left -= len(data)
        return data


def _header(file: BinaryIO, member: _Member) -> _Header:
    """Reads and checks a .npy header, and the member's size by it.

    Raises:
      CheckpointFormatError: without the array's name.
    """
    header = _parse_header(_Stream(file, member))
    if header.length + header.nbytes != member.size:
        raise errors.CheckpointFormatError(
            f"its header promises {header.nbytes} bytes of data, shape "
            f"{header.shape}, and {member.size - header.length} are there"
        )
    return header


def _parse_header(stream: _Stream) -> _Header:
    start = stream.read(8)
    if len(start) < 8 or not start.startswith(b"\x93NUMPY"):
        raise errors.CheckpointFormatError(
            "it is not a .npy array: its first bytes are "
            f"{start.hex(' ') or 'missing'}"
        )
    major, minor = start[6:]
    if major not in (1, 2, 3) or minor:
        raise errors.CheckpointFormatError(
            f".npy versions 1.0, 2.0 and 3.0 are read, not {major}.{minor}"
        )
    width = 2 if major == 1 else 4
    length = int.from_bytes(stream.read(width), "little")
    if length > _MAX_HEADER:
        raise errors.CheckpointFormatError(
            f"its .npy header claims {length} bytes, over the limit of "
            f"{_MAX_HEADER}"
        )
    raw = stream.read(length)
    if len(raw) < length:
        raise errors.CheckpointFormatError("it ends within its .npy header")
    shape, descr, fortran = _parse_fields(
        raw.decode("utf-8" if major == 3 else "latin-1", "replace")
    )
    if not _FLOAT.fullmatch(descr):
        raise errors.CheckpointFormatError(
            "weights are float16, float32 or float64 (f2, f4, f8); its dtype "
            f"is {layout.printable(descr[:80])}"
            + (
                ", Python objects, whose pickle is never opened"
                if "O" in descr
                else ""
            )
        )
    return _Header(shape, np.dtype(descr), fortran, 8 + width + length)


def _parse_fields(text: str) -> tuple[tuple[int, ...], str, bool]:
    """Gives shape, descr and fortran_order of a header's dictionary."""
    shown = ascii(text.strip()[:120])
    damaged = errors.CheckpointFormatError(
        f"its .npy header is damaged: {shown}"
    )
    # No number or float type needs an escape, and a bad one makes Python warn.
    if "\\" in text:
        raise damaged
    try:
        # Python 2 wrote long integers as 64L.
        fields = ast.literal_eval(re.sub(r"([0-9])L\b", r"\1", text.strip()))
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        raise damaged from None
    if not isinstance(fields, dict) or fields.keys() != {
        "descr",
        "fortran_order",
        "shape",
    }:
        raise damaged
    shape, fortran = fields["shape"], fields["fortran_order"]
    if not isinstance(fortran, bool) or not isinstance(shape, tuple):
        raise damaged
    if len(shape) > _MAX_RANK or any(
        type(size) is not int or not 0 <= size <= _MAX_SIZE for size in shape
    ):
        raise errors.CheckpointFormatError(
            f"a shape is at most {_MAX_RANK} integers from 0 to {_MAX_SIZE}; "
            f"its .npy header says {shown}"
        )
    descr = fields["descr"]
    return shape, descr if isinstance(descr, str) else repr(descr), fortran


def _entry(
    path: Path, name: str, member: _Member, header: _Header
) -> checkpoint.Entry:
    shape = header.shape
    if name == layout.HEAD_KERNEL and len(shape) == 4 and shape[:2] == (1, 1):
        shape = shape[2:]

    def load() -> np.ndarray:
        try:
            with open(path, "rb") as file:
                return _data(file, member, header).reshape(shape)
        except errors.CheckpointFormatError as error:
            raise errors.CheckpointFormatError(
                f"{path}: {name} cannot be read: {error}. {checkpoint.REMEDY}"
            ) from error

    return checkpoint.Entry(shape, header.dtype, load)


def _data(file: BinaryIO, member: _Member, header: _Header) -> np.ndarray:
    """Reads an array whole and compares its checksum.

    Raises:
      CheckpointFormatError: without the array's name.
    """
    stream = _Stream(file, member)
    if _parse_header(stream) != header:
        raise errors.CheckpointFormatError(
            "its header is not what it was when the file was opened"
        )
    buffer = np.empty(header.nbytes, np.uint8)
    for start in range(0, header.nbytes, _CHUNK):
        wanted = min(_CHUNK, header.nbytes - start)
        chunk = stream.read(wanted)
        if len(chunk) < wanted:
            raise errors.CheckpointFormatError(
                f"its data end after {start + len(chunk)} of "
                f"{header.nbytes} bytes"
            )
        buffer[start : start + wanted] = np.frombuffer(chunk, np.uint8)
    if stream.read(1):
        raise errors.CheckpointFormatError(
            f"its data go on after {header.nbytes} bytes"
        )
    if stream.crc != member.crc:
        raise errors.CheckpointFormatError(
            f"its checksum (CRC-32) is {stream.crc:08x}, and the archive says "
            f"{member.crc:08x}: its bytes have changed"
        )
    values = buffer.view(header.dtype)
    if header.fortran:
        return values.reshape(header.shape[::-1]).T
    return values.reshape(header.shape)


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
    archive: zipfile.ZipFile,
    name: str,
    shape: tuple[int, ...],
    array: np.ndarray,
) -> None:
    if np.shape(array) != shape:
        raise errors.CheckpointMismatchError(
            f"{name} must have the shape that was promised, {shape}. "
            f"Received: {np.shape(array)}."
        )
    values = checkpoint.as_float32(name, np.asarray(array))
    values = values.astype("<f4", copy=False)
    header = _npy_header(name, shape)
    info = zipfile.ZipInfo(_PREFIX + name + _SUFFIX, (1980, 1, 1, 0, 0, 0))
    info.create_system = 3
    info.external_attr = 0o644 << 16
    # A known size keeps zipfile from making room for zip64.
    info.file_size = len(header) + values.nbytes
    with archive.open(info, "w") as member:
        member.write(header)
        member.write(values.data)


def _read_back(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> None:
    written = read(path)
    size = path.stat().st_size
    if written.shapes != dict(sorted(shapes.items())) or size != file_size(
        shapes
    ):
        raise errors.CheckpointFormatError(
            f"{path}: what was written must read back the same. Received: "
            f"{size} bytes for {file_size(shapes)}. The disk or its file "
            "system is at fault; write elsewhere."
        )
