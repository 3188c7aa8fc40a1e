"""Unpacking of model archives that may be damaged or hostile."""

import gzip
import os
import pathlib
import shutil
import tarfile
import zlib

from bit_tf import errors, files

__all__ = ["is_archive", "unpack"]

_SUFFIXES = (".tar.gz", ".tgz", ".tar")
_CHUNK = 2**20


def is_archive(path: str | os.PathLike) -> bool:
    """Whether the file's name is that of a tar archive."""
    return os.fspath(path).endswith(_SUFFIXES)


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
    without "..". File modes, owners and times are not taken over.

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
            with tarfile.open(path, "r:*", tarinfo=_Member) as archive:
                _extract(archive, pathlib.Path(staging), max_bytes, max_members)
                _drain(archive)
        except (
            tarfile.TarError,
            EOFError,
            zlib.error,
            gzip.BadGzipFile,
            FileExistsError,
            NotADirectoryError,
            RecursionError,
            UnicodeError,
        ) as error:
            raise errors.ArchiveError(
                f"{os.fspath(path)!r} is not a whole tar archive: {error}. "
                "Download it again."
            ) from error


class _Member(tarfile.TarInfo):
    """A member whose extended header, which is read whole, is small."""

    _EXTENDED = (
        tarfile.XHDTYPE,
        tarfile.XGLTYPE,
        tarfile.SOLARIS_XHDTYPE,
        tarfile.GNUTYPE_LONGNAME,
        tarfile.GNUTYPE_LONGLINK,
    )

    def _proc_member(self, archive):
        if self.type in self._EXTENDED and self.size > _CHUNK:
            raise errors.ArchiveError(
                f"An extended header may have {_CHUNK} bytes. Received: "
                f"{self.size}, before {self.name!r}."
            )
        return super()._proc_member(archive)  # type: ignore[misc]


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
    archive: tarfile.TarFile,
    directory: pathlib.Path,
    max_bytes: int,
    max_members: int,
) -> None:
    total = count = 0
    for count, member in enumerate(archive, start=1):
        parts = pathlib.PurePosixPath(member.name).parts
        if (
            member.name.startswith("/")
            or ".." in parts
            or any(len(os.fsencode(part)) > 255 for part in parts)
        ):
            raise errors.ArchiveError(
                "Members must lie inside the archive's directory, under names "
                "of up to 255 bytes. "
                f"Received: {member.name!r}."
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
