"""Big files from the web, each downloaded once into a cache and checked.

A file in the cache appears whole, by a rename, or not at all; what lies beside
it is listed in `cache_records`.
"""

import errno
import hashlib
import os
import pathlib
import re
import shutil
import ssl
import time
import urllib.parse
from collections.abc import Mapping
from typing import BinaryIO

from bit_tf import cache_records, download, errors, files

__all__ = ["cached", "root_cause", "shown"]

_CHUNK = 2**18
# Bytes that make an attempt a success, though the connection was cut again.
_PROGRESS = 2**20
# The longest wait between two attempts, whatever a server asks for; seconds.
_MAX_WAIT = 120.0
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_CONTENT_RANGE = re.compile(r"bytes (\d+)-\d+/(\d+|\*)")


def cached(
    url: str,
    *,
    size: int | None = None,
    directory: str | os.PathLike[str] | None = None,
    name: str | None = None,
    attempts: int = 5,
    backoff: float = 1.0,
    timeout: float = 30.0,
    setting: str = "BIT_TF_CACHE",
    temporary: bool = False,
) -> pathlib.Path:
    """The local path of a file, downloaded if the cache does not have it.

    A file in the cache is compared with its record at every call, by size and
    SHA-256; one that somebody put there is recorded as it is. A download that
    was cut is resumed, also that of an earlier process, if the server can
    tell whether its file is still the same; of processes that want the same
    file at once, one downloads it and the others wait. User, password and
    query of the URL are sent, but neither recorded nor shown. Neither an empty
    file nor a web page is taken for the file.

    Args:
      url: "http://…" or "https://…".
      size: bytes of the file, if they are known beforehand.
      directory: where it is kept; `cache_records.cache_directory()` unless
        given.
      name: its path in `directory`, with "/" between folders; the last part
        of the URL's path unless given.
      attempts: how often in a row the server may be asked in vain.
      backoff: seconds before the second attempt; doubled each time. A
        server's Retry-After goes first, up to two minutes.
      timeout: seconds in which a connection must be made, and any byte come.
      setting: the environment variable with the directory, for messages.
      temporary: whether the caller removes the directory afterwards, so that
        messages do not speak of files in it.

    Raises:
      DownloadError: the file could not be fetched whole; it or its record was
        changed or damaged; the server gives other bytes than it once did; or
        the cache cannot be written or has no room.
    """
    address = shown(url)
    folder = pathlib.Path(directory or cache_records.cache_directory())
    place = cache_records.Place(folder / _relative(address, name))
    try:
        # Without the lock, so that a cache may be read-only once it is full.
        if place.file.exists() and place.record.exists():
            return cache_records.checked(place, address, size)
        place.file.parent.mkdir(parents=True, exist_ok=True)
        with files.locked(place.lock, f"downloads {place.file}"):
            if not place.file.exists():
                part = _Part(place, address, size, setting, temporary)
                _Download(url, part, timeout).run(attempts, backoff)
                _finish(place, part)
                return place.file
            if not place.record.exists():
                cache_records.adopt(place, size)
            return cache_records.checked(place, address, size)
    except errors.DownloadError:
        raise
    except (OSError, NotImplementedError) as error:
        raise errors.DownloadError(
            "The cache is a directory with room that can be read and written. "
            f"Received: {folder}: {error}. Set {setting} to one."
        ) from error


def shown(url: str) -> str:
    """The URL without user, password, query and fragment.

    Raises:
      DownloadError: it is not an http or https URL.
    """
    try:
        parts = urllib.parse.urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError:
        # Its text, and so the chained traceback, may quote the password.
        host, parts, port = None, urllib.parse.urlsplit(""), None
    if host is None or parts.scheme not in ("http", "https"):
        raise errors.DownloadError(
            "A file is downloaded from an address of the form "
            "https://host[:port]/path. Received: one with the scheme "
            f"{parts.scheme!r} and the host {host!r}. Download the file by "
            "other means and give its path."
        )
    netloc = f"[{host}]" if ":" in host else host
    if port is not None:
        netloc += f":{port}"
    return urllib.parse.urlunsplit((parts.scheme, netloc, parts.path, "", ""))


def _relative(address: str, name: str | None) -> pathlib.PurePosixPath:
    if name is None:
        path = urllib.parse.urlsplit(address).path
        name = urllib.parse.unquote(path.rpartition("/")[2])
    relative = pathlib.PurePosixPath(name)
    if (
        not relative.parts
        or relative.is_absolute()
        or ".." in relative.parts
        or "\0" in name
        or "\\" in name
    ):
        raise errors.DownloadError(
            "A file in the cache has a relative name without '..'. Received: "
            f"{name!r} for {address}. Give another one as `name`."
        )
    return relative


class _Part:
    """What has arrived of a file so far, on disk and in a running hash.

    Attributes:
      shown: the URL, without what must not be shown.
      size: bytes of the whole file if the caller knows them.
      setting: the environment variable with the cache's directory.
      temporary: whether nothing is kept there.
      length: bytes that have arrived.
      total: bytes of the whole file if the server said so.
      validator: the server's strong ETag or Last-Modified of the file, which
        tells later whether it is still the same; None if it gave neither.
      hash: SHA-256 of what has arrived.
    """

    def __init__(
        self,
        place: cache_records.Place,
        address: str,
        size: int | None,
        setting: str,
        temporary: bool,
    ):
        self.place = place
        self.shown = address
        self.size = size
        self.setting = setting
        self.temporary = temporary
        self.length = 0
        self.total: int | None = None
        self.validator: str | None = None
        self.hash = hashlib.sha256()
        self._resume()

    @property
    def expected(self) -> int | None:
        """Bytes of the whole file, as far as anybody knows them."""
        return self.total if self.size is None else self.size

    @property
    def complete(self) -> bool:
        return bool(self.length) and self.length == self.expected

    @property
    def resumable(self) -> bool:
        return bool(self.length and self.validator)

    def _resume(self) -> None:
        """Goes on where an earlier process was stopped, if that can be."""
        note = cache_records.read_json(self.place.note)
        total, validator = note.get("total"), note.get("validator")
        if (
            note.get("url") != self.shown
            or not isinstance(validator, str)
            or not (total is None or type(total) is int)
            or (total is not None and self.size not in (None, total))
        ):
            return
        try:
            with open(self.place.part, "rb") as file:
                hashlib.file_digest(file, lambda: self.hash)
                self.length = file.tell()
        except FileNotFoundError:
            return
        self.total, self.validator = total, validator
        if self.expected is not None and self.length > self.expected:
            self.clear()

    def clear(self) -> None:
        """Forgets all that has arrived."""
        self.place.part.unlink(missing_ok=True)
        self.place.note.unlink(missing_ok=True)
        self.length, self.total, self.validator = 0, None, None
        self.hash = hashlib.sha256()

    def begin(self, total: int | None, validator: str | None) -> None:
        """Starts anew with what the server says of its file."""
        # First the bytes go, lest they be taken for a part of this file.
        self.clear()
        self.total, self.validator = total, validator
        cache_records.write_json(
            self.place.note,
            {"url": self.shown, "validator": validator, "total": total},
        )

    def goes_on(self, content_range: str) -> bool:
        """Whether a Content-Range begins where the part ends."""
        match = _CONTENT_RANGE.fullmatch(content_range.strip())
        if match is None or int(match[1]) != self.length:
            return False
        if match[2] == "*":
            return True
        if self.expected not in (None, int(match[2])):
            return False
        self.total = int(match[2])
        return True

    def append(self, file: BinaryIO, chunk: bytes) -> None:
        file.write(chunk)
        self.hash.update(chunk)
        self.length += len(chunk)

    def require_room(self) -> None:
        """Raises DownloadError if the rest does not fit on the disk."""
        if self.expected is None:
            return
        missing = self.expected - self.length
        free = shutil.disk_usage(self.place.file.parent).free
        if free < missing:
            raise self.no_room(f"{free} are free")

    def no_room(self, why: str) -> errors.DownloadError:
        if self.expected is None:
            needed = f"more than {self.length} bytes"
        else:
            needed = f"{self.expected - self.length} more bytes"
        kept = (
            f" {self.place.part} is kept and resumed; it may be deleted."
            if self.length and not self.temporary
            else ""
        )
        return errors.DownloadError(
            f"{self.place.file.name} from {self.shown} needs {needed} in "
            f"{self.place.file.parent}. Received: {why}. Make room there, or "
            f"set {self.setting} to a directory on a larger disk.{kept}"
        )

    def refused(self, why: str) -> errors.DownloadError:
        return errors.DownloadError(
            f"{self.place.file.name} could not be fetched from {self.shown}: "
            f"{why}. Check the address and your access to it, or "
            f"{self.by_hand}."
        )

    @property
    def by_hand(self) -> str:
        """What to do about a file that cannot be fetched."""
        place = f"put it at {self.place.file}"
        return "download the file by other means and " + (
            "give its path" if self.temporary else place
        )


class _AttemptError(Exception):
    """One attempt failed, and another may succeed."""

    def __init__(self, reason: str, wait: float | None = None):
        super().__init__(reason)
        self.wait = wait


class _Download:
    """One download, over as many connections as it takes."""

    def __init__(self, url: str, part: _Part, timeout: float):
        self._url = url
        self._part = part
        self._timeout = timeout

    def run(self, attempts: int, backoff: float) -> None:
        """Completes the part.

        Raises:
          DownloadError: it cannot be.
        """
        import requests
        import tqdm

        part = self._part
        best, failures = part.length, 0
        with (
            requests.Session() as session,
            tqdm.tqdm(
                desc=part.place.file.name,
                total=part.expected,
                initial=part.length,
                unit="B",
                unit_scale=True,
                unit_divisor=1024,
                disable=None,
            ) as bar,
        ):
            while not part.complete:
                try:
                    self._attempt(session, bar)
                    return
                except _AttemptError as problem:
                    gained = part.length - best >= _PROGRESS
                    failures = 1 if gained else failures + 1
                    best = max(best, part.length)
                    if failures >= attempts:
                        raise self._given_up(failures, problem) from (
                            problem.__cause__
                        )
                    wait = problem.wait
                if wait is None:
                    wait = min(backoff * 2 ** (failures - 1), _MAX_WAIT)
                time.sleep(wait)

    def _given_up(self, failures: int, problem: _AttemptError):
        part = self._part
        of_all = "" if part.expected is None else f" of {part.expected}"
        goes_on = part.resumable and not part.temporary
        resumed = " The next download goes on there." if goes_on else ""
        return errors.DownloadError(
            f"{part.place.file.name} could not be fetched whole from "
            f"{part.shown}: {failures} attempts in a row failed, the last "
            f"because {problem}. Received: {part.length}{of_all} bytes."
            f"{resumed} Check the network and try again, or {part.by_hand}."
        )

    def _attempt(self, session, bar) -> None:
        """Asks the server once for what is missing.

        Raises:
          _AttemptError: it may be worth to ask again.
          DownloadError: it is not.
        """
        import requests

        with self._response(session) as response:
            self._begin(response)
            part = self._part
            part.require_room()
            bar.reset(total=part.expected)
            bar.update(part.length)
            try:
                with open(part.place.part, "ab") as file:
                    for chunk in response.iter_content(_CHUNK):
                        part.append(file, chunk)
                        bar.update(len(chunk))
                        if part.length > (part.expected or part.length):
                            break
                    file.flush()
                    os.fsync(file.fileno())
            except requests.RequestException as error:
                root, reason = root_cause(error)
                raise _AttemptError(reason) from root
            except OSError as error:
                if error.errno in _FULL:
                    raise part.no_room(str(error)) from error
                raise
        if part.expected is not None and part.length > part.expected:
            received, expected = part.length, part.expected
            part.clear()
            raise self._wrong_size(expected, f"more than {received}")
        if part.total is not None and part.length < part.total:
            raise _AttemptError("the connection was cut")
        if part.size is not None and part.length < part.size:
            received = part.length
            part.clear()
            raise self._wrong_size(part.size, str(received))

    def _response(self, session):
        import requests

        part = self._part
        headers = {"Accept-Encoding": "identity", "User-Agent": "bit-tf"}
        if part.length and part.validator:
            headers["Range"] = f"bytes={part.length}-"
            headers["If-Range"] = part.validator
        redirects: list[tuple[str, str]] = []

        def note(response, *args, **options):
            if response.is_redirect:
                redirects.append((response.url, response.headers["Location"]))

        try:
            return session.get(
                self._url,
                headers=headers,
                stream=True,
                timeout=self._timeout,
                hooks={"response": note},
            )
        except requests.TooManyRedirects as error:
            raise part.refused("it redirects without end") from error
        except ValueError:
            # Its text, and so the chained traceback, may quote the password.
            raise part.refused(_fault(self._url, redirects)) from None
        except requests.RequestException as error:
            root, reason = root_cause(error)
            if rejected := _certificate(error):
                raise part.refused(
                    "its certificate could not be verified "
                    f"({rejected.verify_message}). If your network has a "
                    "certificate authority of its own, set REQUESTS_CA_BUNDLE "
                    "to the file of its certificate; otherwise somebody else "
                    "may be answering"
                ) from root
            raise _AttemptError(reason) from root
        except OSError as error:
            # A REQUESTS_CA_BUNDLE that does not exist.
            raise part.refused(str(error)) from error

    def _begin(self, response) -> None:
        """Judges the headers, and whether the body goes on or starts anew."""
        part, status = self._part, response.status_code
        headers = response.headers
        if status == 416:
            part.clear()
            raise _AttemptError("it refused the range that was missing", 0.0)
        if status in (408, 429) or status >= 500:
            wait = download.retry_after(headers.get("Retry-After"))
            raise _AttemptError(
                f"it answered {status} {response.reason}",
                None if wait is None else min(wait, _MAX_WAIT),
            )
        if status != 200 and not (status == 206 and part.resumable):
            raise self._part.refused(f"it answered {status} {response.reason}")
        kind = headers.get("Content-Type", "").partition(";")[0].strip()
        if kind.lower() in ("text/html", "application/xhtml+xml"):
            raise self._part.refused(
                f"it sent a web page ({kind}), as log-in pages of networks do"
            )
        if headers.get("Content-Encoding", "identity") != "identity":
            raise self._part.refused(
                f"it sent the file encoded: {headers['Content-Encoding']}"
            )
        length = headers.get("Content-Length", "")
        validator = _validator(headers)
        if status == 206:
            goes_on = part.goes_on(headers.get("Content-Range", ""))
            if not goes_on or validator not in (None, part.validator):
                part.clear()
                raise _AttemptError("it sent another range or file", 0.0)
        else:
            total = int(length) if length.isdecimal() else None
            if total is not None and part.size not in (None, total):
                raise self._wrong_size(part.size, str(total))
            part.begin(total, validator)
        if part.expected is None and not getattr(
            response.raw, "chunked", False
        ):
            raise self._part.refused(
                "it does not say how long the file is, so that a cut one "
                "could not be told from a whole one"
            )

    def _wrong_size(self, size: int | None, received: str):
        part = self._part
        return errors.DownloadError(
            f"{part.place.file.name} has {size} bytes. Received from "
            f"{part.shown}: {received} bytes, so this is another file. Nothing "
            "of it was kept; check the address."
        )


def _validator(headers: Mapping[str, str]) -> str | None:
    return _etag(headers.get("ETag")) or headers.get("Last-Modified")


def _etag(validator: str | None) -> str | None:
    """A validator if it is a strong ETag, else None."""
    # A weak one only promises a file that means the same.
    return validator if validator and validator.startswith('"') else None


def root_cause(error: Exception) -> tuple[BaseException, str]:
    """(exception, text): what lies behind an error of requests.

    The error's own text may quote the query.
    """
    inner = error.args[0] if error.args else None
    root = getattr(inner, "reason", None)
    if not isinstance(root, BaseException):
        root = inner if isinstance(inner, BaseException) else error
    text = str(root.args[0]) if root.args else type(root).__name__
    return root, text


def _certificate(
    error: BaseException | None,
) -> ssl.SSLCertVerificationError | None:
    """The verification that failed, if that lies behind an error."""
    while error is not None:
        if isinstance(error, ssl.SSLCertVerificationError):
            return error
        error = error.__cause__ or error.__context__
    return None


def _fault(url: str, redirects: list[tuple[str, str]]) -> str:
    """What is wrong where requests found a setting or address malformed.

    Args:
      url: where the first request went.
      redirects: (address, its Location) of each answer that led elsewhere.
    """
    import requests

    what = "the address"
    try:
        if redirects:
            what = "it redirects to an address that"
            url = urllib.parse.urljoin(*redirects[-1])
            if not re.match("https?:", url, re.IGNORECASE):
                return f"{what} is not http or https"
        shown(url)
        requests.Request("GET", url).prepare()
        proxies = requests.utils.get_environ_proxies(url)
        proxy = requests.utils.select_proxy(url, proxies)
    except (ValueError, errors.DownloadError):
        proxy = None
    if proxy is None:
        return f"{what} is malformed"
    scheme = urllib.parse.urlsplit(url).scheme
    names = [
        name
        for name, value in os.environ.items()
        if name.lower() in (f"{scheme}_proxy", "all_proxy") and value == proxy
    ]
    where = " and ".join(names) or "the system's settings"
    if proxy.lower().startswith("socks"):
        return (
            f"the proxy set by {where} is one of SOCKS, which needs: "
            "pip install 'requests[socks]'"
        )
    return (
        f"the proxy set by {where} is not of the form http://host:port or "
        "https://host:port"
    )


def _finish(place: cache_records.Place, part: _Part) -> None:
    """Records a complete part and puts it in place.

    Raises:
      DownloadError: its bytes are not those of the record, or junk.
    """
    if junk := cache_records.junk(place.part):
        part.clear()
        raise part.refused(f"it sent {junk}")
    digest = part.hash.hexdigest()
    if place.record.exists():
        record = cache_records.read(place)
        if digest != record["sha256"]:
            part.clear()
            raise errors.DownloadError(
                f"A published file stays the same. Received from {part.shown}: "
                f"{part.length} bytes with the SHA-256 {digest}, and not the "
                f"{record['size']} bytes with {record['sha256']} of the first "
                "download, so it was not put in place. If the new file is "
                f"right, delete {place.record} and download again."
            )
    else:
        cache_records.write(
            place, part.length, digest, part.shown, _etag(part.validator)
        )
    os.replace(place.part, place.file)
    place.note.unlink(missing_ok=True)
