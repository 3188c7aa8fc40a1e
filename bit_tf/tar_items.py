"""Pictures in tar archives, found by their headers and read in place."""

import hashlib
import io
import os
import sqlite3
import tarfile
from collections.abc import Iterator
from typing import NamedTuple

from absl import logging

from bit_tf import errors
from bit_tf.errors import DatasetError, ImageFetchError, ImageTooLargeError
from bit_tf.picture_files import as_text
from bit_tf.picture_paths import is_picture, require_file

__all__ = ["COMPRESSED", "Member", "members", "read"]

COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".tar.zst")
# The most that one header may take in memory, in bytes.
_LARGEST_HEADER = 2**20
_BLOCK = 512


class Member(NamedTuple):
    """One picture of an archive.

    Attributes:
      name: as the archive has it; where it has it again, "@" and the offset
        follow.
      offset: of its first byte in the archive.
      size: in bytes.
    """

    name: str
    offset: int
    size: int


def members(path: str) -> Iterator[Member]:
    """The picture files of an uncompressed archive, in its order.

    Only headers are read, and few are held. Links, sparse files and what is
    hidden or no picture by its suffix are passed over.

    Raises:
      DatasetError: it cannot be read, is no tar archive, or ends or is
        damaged after a member, which is named.
    """
    last = None
    try:
        require_file(path)
        with _Headers(io.FileIO(path)) as headers, _Names() as names:
            length = os.fstat(headers.fileno()).st_size
            with tarfile.open(
                fileobj=headers,
                mode="r:",
                encoding="utf-8",
                errors="surrogateescape",
            ) as archive:
                while (info := archive.next()) is not None:
                    # The archive keeps them all otherwise.
                    archive.members = []  # type: ignore[attr-defined]
                    if last is not None and info.offset <= last.offset:
                        raise tarfile.ReadError("a member of negative size")
                    last = info
                    if info.offset_data + info.size > length:
                        raise tarfile.ReadError("unexpected end of data")
                    if (
                        info.isreg()
                        and not info.issparse()
                        and is_picture(info.name)
                    ):
                        name = info.name
                        if names.has(name):
                            name += f"@{info.offset_data}"
                        yield Member(name, info.offset_data, info.size)
                _check_end(headers, archive.offset, path)
    except OSError as error:
        raise DatasetError(
            "An archive is a file that can be read. Received: "
            f"{as_text(path)!r} ({error.strerror or error}). Check the path."
        ) from error
    except sqlite3.Error as error:
        raise DatasetError(
            "The names in a large archive are kept in a temporary file "
            f"meanwhile. Received: {error}, at {as_text(path)!r}. Make room, "
            "or set SQLITE_TMPDIR to a folder that has some."
        ) from error
    except (tarfile.TarError, ValueError, OverflowError) as error:
        where = "at its beginning"
        if last is not None:
            where = f"after the member {as_text(last.name)!r}"
        raise DatasetError(
            "A .tar file is an uncompressed tar archive that is whole. "
            f"Received: {as_text(path)!r}, which ends or is damaged {where} "
            f"({errors.brief(str(error))}). Fetch or write it again."
        ) from error


def _check_end(headers: "_Headers", offset: int, path: str) -> None:
    """Tells the end of an archive from a header that could not be read."""
    headers.seek(offset)
    block = headers.read(_BLOCK)
    if block.strip(b"\0") or 0 < len(block) < _BLOCK:
        raise tarfile.ReadError("no header where one should be")
    if not block:
        logging.warning("%s has no end mark; it may be cut", as_text(path))


class _Headers(io.BufferedReader):
    """A file of which no large part is read at once."""

    def read(self, size: int | None = -1) -> bytes:
        if size is None or not 0 <= size <= _LARGEST_HEADER:
            raise tarfile.ReadError(f"a header of {size} bytes")
        return super().read(size)


class _Names:
    """The names that came before, on disk where they are many."""

    def __enter__(self) -> "_Names":
        # One thread at a time, which need not be the same.
        self._table = sqlite3.connect(
            "", isolation_level=None, check_same_thread=False
        )
        self._table.execute("PRAGMA journal_mode = OFF")
        self._table.execute("CREATE TABLE names (hash INTEGER PRIMARY KEY)")
        self._table.execute("BEGIN")
        return self

    def __exit__(self, *exception: object) -> None:
        self._table.close()

    def has(self, name: str) -> bool:
        """Whether it came before; it is kept."""
        digest = hashlib.blake2b(os.fsencode(name), digest_size=8).digest()
        number = int.from_bytes(digest, "big", signed=True)
        added = self._table.execute(
            "INSERT OR IGNORE INTO names VALUES (?)", [number]
        )
        return added.rowcount == 0


def read(path: str, offset: int, size: int, max_bytes: int) -> bytes:
    """The bytes of one member.

    Raises:
      ImageFetchError: the archive cannot be read there.
      ImageTooLargeError: the member has more than max_bytes.
    """
    if size > max_bytes:
        raise ImageTooLargeError(
            f"A picture may have at most {max_bytes} bytes. Received: {size} "
            f"in {as_text(path)!r}. Make the picture smaller, or raise "
            "max_bytes."
        )
    why = "it ends before"
    try:
        require_file(path)
        with open(path, "rb") as file:
            file.seek(offset)
            data = file.read(size)
    except (OSError, ValueError, OverflowError) as error:
        data, why = b"", str(getattr(error, "strerror", None) or error)
    if len(data) < size or why != "it ends before":
        raise ImageFetchError(
            "A member of an archive is read where it was found. Received: "
            f"{as_text(path)!r}, {size} bytes from {offset}: {why}. Has the "
            "archive changed? Find its pictures again."
        )
    return data
