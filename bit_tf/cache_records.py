"""What the cache remembers of its files, and compares them with.

Beside a file `name` in the cache lie:

    name.json        its record: url, size, sha256, etag, downloaded
    name.part        what has arrived of it so far
    name.part.json   what `name.part` is a part of
    name.lock        held by the process that downloads it
"""

import dataclasses
import datetime
import json
import os
import pathlib
import re
from collections.abc import Iterable, Mapping
from typing import Any

from bit_tf import errors, files

__all__ = [
    "Place",
    "adopt",
    "cache_directory",
    "checked",
    "compare",
    "junk",
    "read",
    "read_json",
    "record_of",
    "write",
    "write_json",
]

# The longest beginning in which a web page is looked for; bytes.
_HEAD = 2**12


def cache_directory() -> pathlib.Path:
    """The cache: $BIT_TF_CACHE, or the user's cache folder of this system.

    Raises:
      DownloadError: $BIT_TF_CACHE begins with "~" and a name nobody has.
    """
    if chosen := os.environ.get("BIT_TF_CACHE"):
        try:
            return pathlib.Path(chosen).expanduser()
        except RuntimeError as error:
            raise errors.DownloadError(
                "BIT_TF_CACHE is the path of a directory. Received: "
                f"{chosen!r}: {error} Set it to another one."
            ) from error
    import platformdirs

    return platformdirs.user_cache_path("bit-tf")


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a file lies in the cache, and what is kept beside it."""

    file: pathlib.Path

    @property
    def record(self) -> pathlib.Path:
        return self._beside(".json")

    @property
    def part(self) -> pathlib.Path:
        return self._beside(".part")

    @property
    def note(self) -> pathlib.Path:
        return self._beside(".part.json")

    @property
    def lock(self) -> pathlib.Path:
        return self._beside(".lock")

    def _beside(self, suffix: str) -> pathlib.Path:
        return self.file.with_name(self.file.name + suffix)


def record_of(path: str | os.PathLike[str]) -> pathlib.Path | None:
    """The record beside a file of the cache; None if it has none."""
    place = Place(pathlib.Path(path))
    if not place.file.is_file() or not place.record.is_file():
        return None
    return place.record if "sha256" in read_json(place.record) else None


def checked(place: Place, address: str, size: int | None) -> pathlib.Path:
    """The file, after a comparison with its record.

    Args:
      place: where it lies.
      address: the URL that is asked for, as it may be shown.
      size: bytes of the file, if they are known beforehand.

    Raises:
      DownloadError: they differ, or the record is of another URL or damaged.
      OSError: one of them cannot be read.
    """
    record = read(place)
    if record["url"] not in (None, address):
        raise errors.DownloadError(
            f"{place.file} was downloaded from {record['url']}. Received: "
            f"{address}. Use another name or directory for this one, or delete "
            f"the file and {place.record.name}."
        )
    if size not in (None, record["size"]):
        raise errors.DownloadError(
            f"The file at {address} has {size} bytes. Received: {place.file} "
            f"with {record['size']}, according to its record. Delete the file "
            f"and {place.record.name} to download it again."
        )
    found, digest = files.measure(place.file)
    if (found, digest) != (record["size"], record["sha256"]):
        raise errors.DownloadError(
            f"{place.file} was changed or damaged since it was recorded: "
            f"expected {record['size']} bytes with the SHA-256 "
            f"{record['sha256']}. Received: {found} bytes, {digest}. Delete it "
            "to download it again."
        )
    return place.file


def read(place: Place) -> dict[str, Any]:
    """The record of a file: its url, or None, its size and its sha256.

    Raises:
      DownloadError: it is damaged, or there is none.
      OSError: it cannot be read.
    """
    record = read_json(place.record)
    if not (
        isinstance(record.get("url", 0), str | None)
        and type(record.get("size")) is int
        and isinstance(record.get("sha256"), str)
    ):
        raise _damaged(
            place.record,
            "url, size and sha256",
            f"and {place.file.name} to download the file again",
        )
    return record


def write(
    place: Place,
    size: int,
    sha256: str,
    url: str | None = None,
    etag: str | None = None,
) -> None:
    """Records a file.

    Args:
      place: where it lies.
      size: its bytes.
      sha256: of all of them, in hexadecimal digits.
      url: where it was downloaded from just now, as it may be shown; None if
        it was not downloaded.
      etag: the server's strong ETag of it, if it gave one.

    Raises:
      OSError: the record cannot be written.
    """
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    write_json(
        place.record,
        {
            "url": url,
            "size": size,
            "sha256": sha256,
            "etag": etag,
            "downloaded": None if url is None else now,
        },
    )


def adopt(place: Place, expected: int | None) -> None:
    """Records a file that did not come by a download.

    Args:
      place: where it lies.
      expected: its bytes, if they are known beforehand.

    Raises:
      DownloadError: it has another size, or is junk.
      OSError: it cannot be read, or the record not written.
    """
    if reason := junk(place.file):
        raise errors.DownloadError(
            f"A file in the cache is a checkpoint. Received: {place.file}, "
            f"{reason}, which was not downloaded here. Delete it to download "
            "it."
        )
    size, digest = files.measure(place.file)
    if expected not in (None, size):
        raise errors.DownloadError(
            f"{place.file.name} has {expected} bytes. Received: {place.file} "
            f"with {size}, which was not downloaded here. Delete it to "
            "download it."
        )
    write(place, size, digest)


def junk(path: pathlib.Path) -> str | None:
    """What a file is if it is certainly not what was asked for.

    Returns:
      Words for a message, or None.

    Raises:
      OSError: it cannot be read.
    """
    with open(path, "rb") as file:
        head = file.read(_HEAD)
    if not head:
        return "an empty file"
    # Byte order marks and the zeros of UTF-16 count as whitespace.
    text = head.replace(b"\0", b"").lstrip(b"\xef\xbb\xbf\xff\xfe \t\r\n\f")
    if text.lower().startswith((b"<!doctype", b"<html", b"<?xml")):
        return "a web page (HTML or XML), as log-in pages of networks are"
    return None


def read_json(path: pathlib.Path) -> dict[str, Any]:
    """The object in a file; {} if it holds anything else, or is not there.

    Raises:
      OSError: it cannot be read.
    """
    try:
        value = json.loads(path.read_bytes())
    except (FileNotFoundError, RecursionError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def write_json(path: pathlib.Path, value: Mapping[str, Any]) -> None:
    """Writes an object to a file, which appears whole.

    Raises:
      OSError: it cannot be written.
    """
    with files.new_file(path) as file:
        file.write(json.dumps(value, indent=2).encode() + b"\n")


def compare(
    paths: Iterable[pathlib.Path], record: str | os.PathLike[str]
) -> None:
    """Compares files in huggingface_hub's cache with what they were at first.

    A link to a blob that is named by a SHA-256, as those of big files are, is
    compared with this name; any other file with the record of its first use,
    which is made here.

    Args:
      paths: files, each of another name.
      record: JSON, name → SHA-256, with its path.

    Raises:
      DownloadError: a file was changed or damaged, or the record was; or one
        of them cannot be read or written.
    """
    record = pathlib.Path(record)
    try:
        known = _read_hashes(record)
        new = {}
        for path in paths:
            _, digest = files.measure(path)
            named = _blob(path)
            expected = named or known.get(path.name)
            if expected is None:
                new[path.name] = digest
            elif digest != expected:
                also = (
                    ""
                    if named
                    else "; if its repository has another one now, delete "
                    f"{record} as well"
                )
                raise errors.DownloadError(
                    f"{path} was changed or damaged since it was downloaded: "
                    f"expected the SHA-256 {expected}. Received: {digest}. "
                    f"Delete {os.path.realpath(path)} to download it "
                    f"again{also}."
                )
        if new:
            record.parent.mkdir(parents=True, exist_ok=True)
            write_json(record, {"sha256": known | new})
    except errors.DownloadError:
        raise
    except OSError as error:
        raise errors.DownloadError(
            "Weights from Hugging Face can be read, and their hashes written "
            f"to {record}. Received: {error}. Set BIT_TF_CACHE to a directory "
            "with room that can be written, and HF_HOME to one that can be "
            "read."
        ) from error


def _read_hashes(record: pathlib.Path) -> dict[str, str]:
    if not record.exists():
        return {}
    hashes = read_json(record).get("sha256")
    if not isinstance(hashes, dict) or not all(
        isinstance(digest, str) for digest in hashes.values()
    ):
        raise _damaged(record, "the SHA-256 of files", "to record them anew")
    return hashes


def _blob(path: pathlib.Path) -> str | None:
    """The SHA-256 that names what a file is a link to, if one does."""
    if not path.is_symlink():
        return None
    # One step: the blob itself may be a link to a store of other names.
    blob = pathlib.PurePath(os.readlink(path))
    is_hash = re.fullmatch("[0-9a-f]{64}", blob.name)
    return blob.name if is_hash and blob.parent.name == "blobs" else None


def _damaged(
    record: pathlib.Path, content: str, remedy: str
) -> errors.DownloadError:
    return errors.DownloadError(
        f"A record in the cache is JSON with {content}. Received: {record}, "
        f"which is damaged. Delete it {remedy}."
    )
