"""The container of .npz checkpoints: a zip archive of .npy members.

The reader opens headers only; it takes nothing from a pickle, and reads an
array when it is asked for. Which members are whose is the business of the
formats beside this file.
"""

import ast
import functools
import math
import os
import re
import struct
import zipfile
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from bit_tf import errors
from bit_tf.checkpoints import checkpoint, layout

__all__ = ["SUFFIX", "comment", "entries", "keys", "squeezed"]

SUFFIX = ".npy"

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


def keys(path: str | os.PathLike[str]) -> tuple[list[str], bool]:
    """What an archive holds; never raises on garbage.

    Returns:
      (names of the arrays, without ".npy"; whether nothing else is there).
      ([], False) if it is not a zip archive.
    """
    try:
        with open(path, "rb") as file:
            if file.read(4) != b"PK\x03\x04":
                return [], False
            with zipfile.ZipFile(file) as archive:
                members = archive.namelist()
    except _ZIP_ERRORS:
        return [], False
    found = [m.removesuffix(SUFFIX) for m in members if m.endswith(SUFFIX)]
    return found, len(found) == len(members)


def comment(path: str | os.PathLike[str]) -> bytes:
    """The archive's comment; b"" if it has none."""
    with zipfile.ZipFile(path) as archive:
        return archive.comment


def entries(
    path: Path,
    translator: Callable[[Sequence[str]], Callable[[str], str | None]],
) -> tuple[dict[str, checkpoint.Entry], tuple[str, ...]]:
    """Opens the archive's arrays: reads its directory and array headers.

    Args:
      path: the file.
      translator: all keys, members' names without ".npy" → (key → canonical
        name, or None for what is no part of the layout and is not opened).

    Returns:
      (canonical name → entry of the stored shape, other keys, sorted)

    Raises:
      CheckpointFormatError: the file is not a zip archive, is damaged, or
        holds arrays that are not float. Damage inside an array's data is
        found, by its checksum, when the array is read.
    """
    checkpoint.require_file(path)
    found = {}
    problems: list[str] = []
    with open(path, "rb") as file:
        members, extra = _members(path, file, translator)
        for name, member in members.items():
            try:
                header = _header(file, member)
            except errors.CheckpointFormatError as error:
                problems.append(f"{name}: {error}")
                continue
            found[name] = checkpoint.Entry(
                header.shape,
                header.dtype,
                functools.partial(_load, path, name, member, header),
                member.key,
            )
    if problems:
        raise errors.CheckpointFormatError(
            f"{path}: {len(problems)} of {len(members)} arrays cannot be "
            f"read. {checkpoint.REMEDY}\n" + "\n".join(problems)
        )
    return found, extra


def squeezed(head: checkpoint.Entry) -> checkpoint.Entry:
    """A classifier's kernel (1, 1, C, N) as (C, N); others as they are."""
    shape, load = head.shape, head.load
    if len(shape) != 4 or shape[:2] != (1, 1):
        return head
    return head._replace(
        shape=shape[2:], load=lambda: load().reshape(shape[2:])
    )


class _Member(NamedTuple):
    """Where an array lies in the archive, as the directory says."""

    key: str
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


def _members(
    path: Path,
    file: BinaryIO,
    translator: Callable[[Sequence[str]], Callable[[str], str | None]],
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
    canonical = translator(
        [info.filename.removesuffix(SUFFIX) for info in infos]
    )
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
        key = filename.removesuffix(SUFFIX)
        name = canonical(key) if filename.endswith(SUFFIX) else None
        if name is None:
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
        key=info.filename.removesuffix(SUFFIX),
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


def _load(
    path: Path, name: str, member: _Member, header: _Header
) -> np.ndarray:
    try:
        with open(path, "rb") as file:
            return _data(file, member, header)
    except errors.CheckpointFormatError as error:
        raise errors.CheckpointFormatError(
            f"{path}: {name} cannot be read: {error}. {checkpoint.REMEDY}"
        ) from error


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
