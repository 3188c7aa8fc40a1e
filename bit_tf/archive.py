"""Model archives: reproducible packing, and safe unpacking of any."""

import gzip
import hashlib
import os
import pathlib
import shutil
import stat
import tarfile
import zlib
from collections.abc import Iterator
from typing import BinaryIO

from bit_tf import errors, files

__all__ = ["is_archive", "pack", "unpack"]

_SUFFIXES = (".tar.gz", ".tgz", ".tar")
_CHUNK = 2**20
# 94 MB of random weights of R50x1's size: level 1 takes 2.8 s and gives
# 87.3 MB, 6 takes 3.0 s and gives 87.0, 9 takes 3.6 s and gives 87.0 (zlib
# 1.2.13, one core).
_LEVEL = 6
# Limits of a member's name, far below those of file systems for the path of
# the directory that it is unpacked in and the name together.
_MAX_NAME = 1000
_MAX_PART = 255
_MAX_DEPTH = 32
_NAMES = (
    f"names of up to {_MAX_NAME} bytes and {_MAX_DEPTH} parts, each of up to "
    f"{_MAX_PART} bytes"
)
# Bytes of all extended headers of an archive, and how many a member may have.
_MAX_EXTENDED = 2**20
_MAX_CHAIN = 8


def is_archive(path: str | os.PathLike) -> bool:
    """Whether the file's name is that of a tar archive."""
    return os.fspath(path).endswith(_SUFFIXES)


def pack(
    directory: str | os.PathLike, path: str | os.PathLike
) -> tuple[int, str]:
    """Packs a SavedModel's directory, the same bytes every time.

    Names are relative to the directory and sorted, and each folder comes
    before what it holds, as tensorflow_hub needs it. Owners, times and
    permissions are not taken over. The bytes depend on the files, their names
    and zlib's version alone.

    Args:
      directory: holds regular files and directories only, under names of UTF-8
        that do not begin with a dot, which tfhub.dev refused.
      path: the .tar.gz file; it is replaced when the archive is whole.

    Returns:
      (bytes, SHA-256 in hexadecimal digits) of the archive.

    Raises:
      ArchiveError: there is something else in the directory, or nothing; or a
        file changed while it was read.
      OSError: a file cannot be read, or the archive not written.
    """
    import tqdm

    directory = pathlib.Path(directory)
    members = list(_members(directory, pathlib.PurePosixPath()))
    if not members:
        raise errors.ArchiveError(
            "A model's archive holds its files. Received: "
            f"{os.fspath(directory)!r}, which is empty."
        )
    with (
        files.new_file(path) as file,
        tqdm.tqdm(
            desc=os.path.basename(path),
            total=sum(member.size for member in members),
            unit="B",
            unit_scale=True,
            unit_divisor=1024,
            delay=1,
            disable=None,
        ) as bar,
    ):
        sink = _Hashing(file)
        # Without a name and a time in its header.
        with (
            gzip.GzipFile("", "wb", _LEVEL, sink, mtime=0) as compressed,
            tarfile.TarFile(
                mode="w",
                fileobj=compressed,
                format=tarfile.PAX_FORMAT,
                copybufsize=_CHUNK,
            ) as packed,
        ):
            for member in members:
                if member.isdir():
                    packed.addfile(member)
                    continue
                with _Source(directory / member.name, member, bar) as source:
                    packed.addfile(member, source)
        return sink.size, sink.hash.hexdigest()


def _members(
    directory: pathlib.Path, parent: pathlib.PurePosixPath
) -> Iterator[tarfile.TarInfo]:
    """The members of an archive, in its order."""
    for name in sorted(os.listdir(directory / parent)):
        relative = parent / name
        found = os.lstat(directory / relative)
        folder = stat.S_ISDIR(found.st_mode)
        if not folder and not stat.S_ISREG(found.st_mode):
            raise errors.ArchiveError(
                "A model's archive holds regular files and directories. "
                f"Received: {str(relative)!r} in {os.fspath(directory)!r}, "
                "which is a link, a device or the like. Copy what it points "
                "to, or remove it."
            )
        if name.startswith(".") or not _is_utf8(name):
            raise errors.ArchiveError(
                "Names in a model's archive are UTF-8 and do not begin with a "
                f"dot. Received: {str(relative)!r} in "
                f"{os.fspath(directory)!r}. Rename or remove it."
            )
        if not _is_short(str(relative)):
            raise errors.ArchiveError(
                f"A model's archive holds {_NAMES}. Received: "
                f"{errors.brief(str(relative))} in {os.fspath(directory)!r}. "
                "Rename or move it."
            )
        member = tarfile.TarInfo(str(relative))
        member.type = tarfile.DIRTYPE if folder else tarfile.REGTYPE
        member.mode = 0o755 if folder else 0o644
        member.size = 0 if folder else found.st_size
        yield member
        if folder:
            yield from _members(directory, relative)


def _is_utf8(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def _is_short(name: str) -> bool:
    """Whether a member's name is within the limits."""
    parts = name.split("/")
    return (
        len(os.fsencode(name)) <= _MAX_NAME
        and len(parts) <= _MAX_DEPTH
        and all(len(os.fsencode(part)) <= _MAX_PART for part in parts)
    )


class _Hashing:
    """A file to write: what goes there is counted and hashed."""

    def __init__(self, file: BinaryIO):
        self._file = file
        self.hash = hashlib.sha256()
        self.size = 0

    def write(self, data) -> int:
        self.hash.update(data)
        self.size += len(data)
        return self._file.write(data)

    def flush(self) -> None:
        self._file.flush()


class _Source:
    """A file to read, which must have its member's size at the end."""

    def __init__(self, path: pathlib.Path, member: tarfile.TarInfo, bar):
        self._path, self._member, self._bar = path, member, bar

    def __enter__(self) -> "_Source":
        descriptor = os.open(self._path, os.O_RDONLY | os.O_NOFOLLOW)
        self._file = open(descriptor, "rb", buffering=0)
        self._read = 0
        return self

    def read(self, size: int = -1, /) -> bytes:
        data = self._file.read(size)
        self._read += len(data)
        self._bar.update(len(data))
        if len(data) < size:
            raise self._changed()
        return data

    def __exit__(self, kind, error, trace) -> None:
        with self._file:
            if kind is None and self._file.read(1):
                raise self._changed()

    def _changed(self) -> errors.ArchiveError:
        return errors.ArchiveError(
            "A model's files stay as they are while they are packed. Received: "
            f"{str(self._path)!r} of {self._member.size} bytes, which changed. "
            "Pack it again."
        )


def unpack(
    path: str | os.PathLike,
    directory: str | os.PathLike,
    *,
    overwrite: bool = False,
    max_bytes: int = 16 * 2**30,
    max_members: int = 10_000,
) -> None:
    """Unpacks an archive into a new directory, all of it or nothing.

    Only regular files and directories are accepted, under relative names
    without "..", of up to 1000 bytes and 32 parts. Files with holes in the
    format of GNU tar are refused, and extended headers of over 1 MiB in all.
    File modes, owners and times are not taken over.

    Args:
      path: a .tar, .tar.gz or .tgz file.
      directory: appears by rename, and must not exist, unless overwrite.
      overwrite: whether what is at `directory` is replaced.
      max_bytes: limit of the unpacked size.
      max_members: limit of the number of members.

    Raises:
      ArchiveError: the archive is damaged, hostile, or over a limit.
      FileNotFoundError: there is no such archive.
    """
    with files.new_directory(directory, overwrite) as staging:
        try:
            with _Archive.open(path, "r:*") as archive:
                _extract(archive, pathlib.Path(staging), max_bytes, max_members)
                _drain(archive)
        except errors.ArchiveError:
            raise
        except (
            tarfile.TarError,
            EOFError,
            zlib.error,
            gzip.BadGzipFile,
            FileExistsError,
            NotADirectoryError,
            RecursionError,
            ValueError,
        ) as error:
            raise errors.ArchiveError(
                f"{os.fspath(path)!r} is not a whole tar archive: {error}. "
                "Download it again."
            ) from error


class _Member(tarfile.TarInfo):
    """A member of which only name, type, size and data are read.

    What tarfile reads into memory whole, and what it parses in quadratic time
    or worse, is limited or refused.
    """

    def _proc_member(self, archive):
        if self.size < 0:
            raise tarfile.ReadError(f"{self.name!r} has {self.size} bytes")
        if self.type == tarfile.GNUTYPE_SPARSE:
            raise _sparse(self.name)
        if self.type in _PAX or self.type in _LONG:
            archive.count_extended(self)
        if self.type in _PAX:
            return self._read_pax(archive)
        return super()._proc_member(archive)  # type: ignore[misc]

    def _read_pax(self, archive: "_Archive") -> tarfile.TarInfo:
        """The member after an extended header, with its name and size."""
        data = archive.fileobj.read(self._block(self.size))  # type: ignore
        records = dict(_records(data[: self.size]))
        if any(keyword.startswith("GNU.sparse.") for keyword in records):
            raise _sparse(self.name)
        try:
            member = self.fromtarfile(archive)
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(str(error)) from error
        # A name or size of all members would be none.
        if self.type == tarfile.XGLTYPE:
            return member
        if "path" in records:
            member.name = records["path"].rstrip("/")
        if "size" in records:
            member.size = int(records["size"])
            if member.size < 0:
                raise tarfile.ReadError(f"a size of {member.size} bytes")
            blocks = member._block(member.size)  # type: ignore[attr-defined]
            archive.offset = member.offset_data + blocks * member.isreg()
        return member


class _Archive(tarfile.TarFile):
    """An archive whose members are forgotten when the next one is read."""

    tarinfo = _Member

    def __init__(self, *args, **options):
        self._extended = self._chain = 0
        super().__init__(*args, **options)

    def count_extended(self, header: tarfile.TarInfo) -> None:
        """Counts an extended header, which is about to be read.

        Raises:
          ArchiveError: there are too many, or too large ones.
        """
        self._extended += header.size
        self._chain += 1
        if self._extended > _MAX_EXTENDED or self._chain > _MAX_CHAIN:
            raise errors.ArchiveError(
                f"The extended headers of an archive may have {_MAX_EXTENDED} "
                f"bytes, and a member {_MAX_CHAIN} of them. Received more, at "
                f"{header.name!r} of {header.size} bytes."
            )

    def each(self) -> Iterator[tarfile.TarInfo]:
        """The members, in the archive's order."""
        while (member := self.next()) is not None:
            self._chain = 0
            self.members.clear()  # type: ignore[attr-defined]
            yield member


_PAX = (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE)
_LONG = (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK)


def _records(data: bytes) -> Iterator[tuple[str, str]]:
    """(keyword, value) of a PAX header's records, "LENGTH KEYWORD=VALUE\\n".

    Raises:
      ReadError: it is damaged.
    """
    start = 0
    while start < len(data) and data[start]:
        length, _, _ = data[start : start + 20].partition(b" ")
        end = start + int(length) if length.isdigit() else 0
        keyword, equals, value = data[start + len(length) + 1 : end].partition(
            b"="
        )
        if not equals or not value.endswith(b"\n") or end > len(data):
            raise tarfile.ReadError("an extended header is damaged")
        yield (
            keyword.decode("utf-8", "surrogateescape"),
            value[:-1].decode("utf-8", "surrogateescape"),
        )
        start = end


def _sparse(name: str) -> errors.ArchiveError:
    return errors.ArchiveError(
        "Files in an archive are stored whole. Received: "
        f"{errors.brief(name)}, with holes. Pack it without --sparse."
    )


def _drain(archive: tarfile.TarFile) -> None:
    """Reads what follows the last member, so that gzip checks its sum."""
    if archive.fileobj is None:
        return
    for _ in range(64):
        if not archive.fileobj.read(_CHUNK):
            return
    raise errors.ArchiveError(
        "An archive ends after its last member. Received: over 64 MiB more."
    )


def _extract(
    archive: _Archive,
    directory: pathlib.Path,
    max_bytes: int,
    max_members: int,
) -> None:
    total = count = 0
    for count, member in enumerate(archive.each(), start=1):
        parts = pathlib.PurePosixPath(member.name).parts
        if (
            member.name.startswith("/")
            or ".." in parts
            or "\0" in member.name
            or not _is_short(member.name)
        ):
            raise errors.ArchiveError(
                f"Members must lie inside the archive's directory, under "
                f"{_NAMES}. Received: {errors.brief(member.name)}."
            )
        if not (member.isreg() or member.isdir()):
            raise errors.ArchiveError(
                "Members must be regular files or directories. Received: "
                f"{member.name!r}, of tar type {member.type!r}."
            )
        total += member.size
        if total > max_bytes or count > max_members:
            raise errors.ArchiveError(
                f"An archive may hold {max_members} members and {max_bytes} "
                f"bytes. Received more, at {member.name!r}."
            )
        path = directory.joinpath(*parts)
        if member.isdir():
            path.mkdir(parents=True, exist_ok=True)
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        source = archive.extractfile(member)
        if source is None or path.is_dir():
            raise errors.ArchiveError(
                f"{member.name!r} is both a file and a directory."
            )
        with source, open(path, "wb") as sink:
            shutil.copyfileobj(source, sink, _CHUNK)
        if path.stat().st_size != member.size:
            raise errors.ArchiveError(
                f"{member.name!r} is cut short. Download the archive again."
            )
    if not count:
        raise errors.ArchiveError("An archive holds at least one member.")
