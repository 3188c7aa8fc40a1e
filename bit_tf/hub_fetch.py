"""One model from one web address into the cache of tensorflow_hub.

A repository's entry of the model, if it has one, tells the archive's size and
SHA-256; the archive is downloaded, resumed if it was cut, compared, unpacked
within limits, and put in its place by a rename.
"""

import hashlib
import json
import os
import pathlib
import re
import time
import urllib.parse

from bit_tf import (
    archive,
    cache_records,
    cached_download,
    errors,
    files,
    handles,
    hub_cache,
    hub_install,
)

__all__ = [
    "check_archive",
    "description",
    "fetch",
    "is_versioned",
    "newest",
    "release",
]

# An entry has a row for each file and each class of a model.
_MAX_ENTRY = 2**26
_CHUNK = 2**18
_CHINA = "https://hub.tensorflow.google.cn/"
# tensorflow_hub asks this mirror instead.
_CHINA_ARCHIVES = "https://gcs.tensorflow.google.cn/tfhub-modules/"


def fetch(
    handle: str,
    *,
    root: pathlib.Path,
    address: str | None = None,
    replace: bool = False,
) -> pathlib.Path:
    """Downloads a model into the cache.

    Of processes that want the same one at once, one downloads it and the
    others wait.

    Args:
      handle: the http or https handle under which it is kept.
      root: the cache.
      address: where it is fetched from; the handle unless given.
      replace: whether a model that seems whole is fetched again.

    Returns:
      Its directory.

    Raises:
      DownloadError: it could not be fetched whole, or is not what its entry
        says; then nothing of it is kept.
      ArchiveError: the archive is damaged or hostile.
      HandleError: there is no SavedModel in it, its entry is damaged or of
        another model, or the cache cannot be written.
    """
    name = hub_cache.key(handle)
    folder = hub_cache.downloads(root)
    lock = folder / f"{name}.lock"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with files.locked(lock, f"downloads {hub_cache.shown(handle)}"):
            found = None if replace else hub_cache.find(handle, root)
            if found is not None:
                return found.path
            try:
                _install(handle, address or handle, root, replace)
            finally:
                # Whoever waits for it looks into the cache first.
                lock.unlink(missing_ok=True)
    except errors.BitTfError:
        raise
    except (OSError, NotImplementedError) as error:
        raise errors.HandleError(
            "The cache is a directory with room that can be written. "
            f"Received: {str(root)!r}: {error}. Set TFHUB_CACHE_DIR to one."
        ) from error
    return root / name


def _install(
    handle: str, address: str, root: pathlib.Path, replace: bool
) -> None:
    published = release(address)
    expected = None
    if published is not None:
        version = published.handle.version if is_versioned(address) else None
        _require_handle(address, published.handle.at(version))
        expected = {file.path: file for file in published.files}
    name = hub_cache.key(handle)
    folder = hub_cache.downloads(root)
    place = cache_records.Place(
        folder / f"{name}.{hub_cache.key(address)[:8]}.tar.gz"
    )
    try:
        cached_download.cached(
            _archive_address(address, published),
            size=None if published is None else published.size,
            directory=folder,
            name=place.file.name,
            attempts=4,
            backoff=0.5,
            setting="TFHUB_CACHE_DIR",
        )
    except errors.DownloadError:
        if not place.part.exists():
            _forget(place)
        raise
    try:
        record = cache_records.read(place)
        found = handles.File(place.file.name, record["size"], record["sha256"])
        shown = hub_cache.shown(address)
        _require_hash(found, published, shown)
        hub_install.install_one(
            name,
            handle,
            place.file,
            root=root,
            origin=shown,
            archive=found,
            expected=expected,
            existing="replace" if replace else "keep",
        )
    except errors.BitTfError as error:
        # On a full disk, the archive may be right.
        if not isinstance(error.__cause__, OSError):
            _forget(place)
        raise
    _forget(place)


def _forget(place: cache_records.Place) -> None:
    for path in (place.file, place.record, place.lock, place.note, place.part):
        path.unlink(missing_ok=True)


def _require_handle(address: str, found: handles.Handle) -> None:
    path = urllib.parse.urlsplit(address).path.rstrip("/")
    path = path.removesuffix(handles.ARCHIVE_SUFFIX)
    if not f"/{path}".endswith(f"/{found}"):
        raise errors.HandleError(
            "The entry of a model names its handle. Received at "
            f"{hub_cache.shown(handles.entry_url(address))}: an entry of "
            f"{found}. Check the address, or ask its publisher."
        )


def _require_hash(
    found: handles.File, published: handles.Release | None, shown: str
) -> None:
    if published is not None and (found.size, found.sha256) != (
        published.size,
        published.sha256,
    ):
        raise errors.DownloadError(
            f"The archive of {published.handle} has {published.size} bytes "
            f"with the SHA-256 {published.sha256}, as its entry says. Received "
            f"from {shown}: {found.size} bytes with {found.sha256}, which were "
            "deleted. Try again; if it stays so, ask its publisher."
        )


def check_archive(
    path: str | os.PathLike[str], published: handles.Release | None
) -> handles.File:
    """The size and SHA-256 of a local archive, compared with its entry.

    Raises:
      ArchiveError: they differ from the entry's.
      OSError: it cannot be read.
    """
    path = pathlib.Path(path)
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        found = handles.File(path.name, file.tell(), digest)
    if published is not None and (found.size, found.sha256) != (
        published.size,
        published.sha256,
    ):
        raise errors.ArchiveError(
            f"The archive of {published.handle} has {published.size} bytes "
            f"with the SHA-256 {published.sha256}, as its entry says. "
            f"Received: {str(path)!r} with {found.size} bytes and "
            f"{found.sha256}. Copy it again."
        )
    return found


def is_versioned(address: str) -> bool:
    """Whether an address is that of one version for ever."""
    path = urllib.parse.urlsplit(address).path.rstrip("/")
    last = path.rpartition("/")[2]
    return last.isdigit() or archive.is_archive(path)


def newest(address: str, *, timeout: float = 30.0) -> int | None:
    """The newest version of a model, as its repository tells.

    Args:
      address: without a version.
      timeout: seconds in which the server must answer.

    Returns:
      None if there is no repository.

    Raises:
      DownloadError: the server cannot be reached.
      HandleError: the repository's entry is damaged or of another model.
    """
    published = release(address, timeout=timeout)
    if published is None:
        return None
    _require_handle(address, published.handle.at(None))
    return published.handle.version


def release(address: str, *, timeout: float = 30.0) -> handles.Release | None:
    """What a repository says of the model at an address.

    Args:
      address: http or https.
      timeout: seconds in which the server must answer.

    Returns:
      None if there is no entry.

    Raises:
      DownloadError: the server cannot be reached.
      HandleError: the entry is damaged, or of a later schema.
    """
    found = description(address, timeout=timeout)
    return None if found is None else handles.Release.from_json(found)


def description(address: str, *, timeout: float = 30.0) -> dict | None:
    """The JSON object of `release`, as it came.

    tfhub.dev, Google's mirrors and Kaggle are not asked: they have no entries.

    Args:
      address: http or https.
      timeout: seconds in which the server must answer.

    Returns:
      None if there is no entry.

    Raises:
      DownloadError: the server cannot be reached.
    """
    host = urllib.parse.urlsplit(address).hostname or ""
    if handles.known(address) or host.removeprefix("www.") == "kaggle.com":
        return None
    body = _get(_entry_address(address), timeout)
    try:
        found = None if body is None else json.loads(body)
    except (ValueError, RecursionError):
        return None
    # Some servers answer every address with a page or an object of theirs.
    return found if isinstance(found, dict) and "schema" in found else None


def _get(url: str, timeout: float) -> bytes | None:
    """The body of a small file; None if there is none.

    Raises:
      DownloadError: the server cannot be reached, or fails again and again.
    """
    import requests

    shown = cached_download.shown(url)
    why: BaseException | None = None
    for wait in (0.0, 0.5, 1.5):
        time.sleep(wait)
        try:
            with requests.get(
                url,
                headers={"User-Agent": "bit-tf"},
                timeout=timeout,
                stream=True,
            ) as response:
                status = response.status_code
                if status == 429 or status >= 500:
                    reason = f"it answered {status} {response.reason}"
                    continue
                if status != 200:
                    return None
                body = b""
                for chunk in response.iter_content(_CHUNK):
                    body += chunk
                    if len(body) > _MAX_ENTRY:
                        return None
                return body
        except requests.RequestException as error:
            why, reason = cached_download.root_cause(error)
            if isinstance(error, requests.ConnectionError | requests.Timeout):
                break
        except (OSError, ValueError) as error:
            # A REQUESTS_CA_BUNDLE that does not exist; a malformed redirect.
            why, reason = None, type(error).__name__
            break
    raise errors.DownloadError(
        f"{shown} could not be read: {reason}. Check the address and the "
        "network."
    ) from why


def _entry_address(address: str) -> str:
    """Where the entry is, with what else a query has, such as a token."""
    parts = urllib.parse.urlsplit(handles.entry_url(address))
    return urllib.parse.urlunsplit(parts._replace(query=_own_query(address)))


def _own_query(address: str) -> str:
    """The query of an address without that of tensorflow_hub."""
    pairs = urllib.parse.parse_qsl(
        urllib.parse.urlsplit(address).query, keep_blank_values=True
    )
    query = [pair for pair in pairs if pair[0] != handles.FORMAT_QUERY]
    return urllib.parse.urlencode(query)


def _archive_address(address: str, published: handles.Release | None) -> str:
    """Where the archive is: in a repository a file, elsewhere an answer.

    Buckets and other servers of plain files pass a query over.
    """
    if published is not None:
        parts = urllib.parse.urlsplit(address)
        path = parts.path.rstrip("/").removesuffix(handles.ARCHIVE_SUFFIX)
        if not is_versioned(path):
            path = f"{path}/{published.handle.version}"
        parts = parts._replace(
            path=f"{path}{handles.ARCHIVE_SUFFIX}",
            query=_own_query(address),
            fragment="",
        )
        return urllib.parse.urlunsplit(parts)
    if address.startswith(_CHINA):
        name = re.split("[?#]", address.removeprefix(_CHINA))[0].rstrip("/")
        return f"{_CHINA_ARCHIVES}{name}{handles.ARCHIVE_SUFFIX}"
    return handles.with_query(address)
