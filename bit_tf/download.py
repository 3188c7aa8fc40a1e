"""Reads pictures' bytes within limits of time, bytes and addresses."""

import base64
import binascii
import contextlib
import datetime
import email.utils
import functools
import http.client
import io
import ipaddress
import os
import re
import socket
import ssl
import stat
import string
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from typing import Any

from bit_tf.errors import (
    ImageDecodeError,
    ImageError,
    ImageFetchError,
    ImageTooLargeError,
    brief,
)

__all__ = [
    "MAX_BYTES",
    "TIMEOUT",
    "Abort",
    "read_source",
    "read_url",
    "retry_after",
]

# What a picture may take unless the caller says otherwise: bytes, seconds.
MAX_BYTES = 64 * 2**20
TIMEOUT = 20.0

_MAX_REDIRECTS = 5
_CHUNK = 64 * 1024
_NAT64 = ipaddress.ip_network("64:ff9b::/96")


class Abort:
    """Ends transfers early, from another thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._transfers: set[_Transfer] = set()
        self._set = False

    def set(self) -> None:
        """Ends the transfers under way, and those that would begin later."""
        with self._lock:
            self._set = True
            for transfer in self._transfers:
                transfer.abort()

    def is_set(self) -> bool:
        """Whether `set` was called."""
        return self._set

    @contextlib.contextmanager
    def _watching(self, transfer: "_Transfer") -> Iterator[None]:
        with self._lock:
            self._transfers.add(transfer)
            if self._set:
                transfer.abort()
        try:
            yield
        finally:
            with self._lock:
                self._transfers.discard(transfer)
            transfer.close()


def read_url(
    url: str,
    *,
    max_bytes: int = MAX_BYTES,
    timeout: float = TIMEOUT,
    public_only: bool = False,
    abort: Abort | None = None,
) -> bytes:
    """Reads the body behind an http or https URL.

    Up to five redirects are followed; each goes through the same checks as
    the first address. User name and password in the URL are sent as basic
    authentication. The look-up of a host's name is the system's: its time
    counts, but it cannot be interrupted.

    Args:
      url: "http://…" or "https://…", with spaces percent-encoded.
      max_bytes: the largest body that is accepted, in bytes.
      timeout: seconds, for each operation on the socket and for the whole
        transfer, redirects included.
      public_only: for URLs that strangers send: refuses hosts whose address
        is not a public one, judged by the connected socket before a byte is
        sent, and uses no proxy. Otherwise the environment's proxies are used.
      abort: ends the transfer when it is set, at once.

    Returns:
      The body, whole.

    Raises:
      ImageFetchError: the URL is malformed or refused, the server does not
        answer 200, or the body does not arrive whole and in time. It says
        which status, and whether the server or the connection may recover.
      ImageTooLargeError: the body is, or says that it is, over max_bytes.
    """
    transfer = _Transfer(timeout, public_only)
    watch = Abort() if abort is None else abort
    with watch._watching(transfer):
        return _followed(url, transfer, max_bytes)


def _followed(url: str, transfer: "_Transfer", max_bytes: int) -> bytes:
    """The body that a URL or its redirects lead to."""
    opener = _opener(transfer)
    address = url
    for _ in range(_MAX_REDIRECTS + 1):
        request, shown = _request(address)
        try:
            with opener.open(request, timeout=transfer.remaining()) as response:
                target = response.headers.get("Location")
                if response.status in (301, 302, 303, 307, 308) and target:
                    address = _redirected(request.full_url, address, target)
                    continue
                return _body(response, shown, max_bytes)
        except (ImageFetchError, ImageTooLargeError):
            raise
        except urllib.error.URLError as error:
            if isinstance(error.reason, ImageFetchError):
                raise error.reason from None
            raise _failure(error.reason, shown, transfer) from error
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise _failure(error, shown, transfer) from error
    raise ImageFetchError(
        f"At most {_MAX_REDIRECTS} redirects are followed. Received: more, "
        f"the last from {_shown(address)}. Give the picture's final address."
    )


class _Transfer:
    """Until when one transfer may last, and which hosts it may reach."""

    def __init__(self, timeout: float, public_only: bool):
        self.timeout = timeout
        self.public_only = public_only
        self.deadline = time.monotonic() + timeout
        self._lock = threading.Lock()
        self._open: socket.socket | None = None

    def abort(self) -> None:
        """Has what waits for the socket fail now; for another thread."""
        self.deadline = float("-inf")
        with self._lock, contextlib.suppress(OSError):
            if self._open is not None:
                self._open.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Gives up the means to abort; the connection closes by itself."""
        self._keep(None)

    def _keep(self, sock: socket.socket | None) -> None:
        # A duplicate, since TLS takes over the socket itself.
        with self._lock:
            if self._open is not None:
                self._open.close()
            self._open = None if sock is None else sock.dup()

    def remaining(self) -> float:
        """Seconds that the next operation may take.

        Raises:
          TimeoutError: none are left.
        """
        left = self.deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError("the time for the whole transfer is over")
        return left

    def connect(self, host: str, port: int) -> socket.socket:
        """Opens a socket to the first address of a host that answers."""
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        for *_, address in found:
            self.check(address)
        failure = OSError(f"no address was found for {host}")
        for family, kind, protocol, _, address in found:
            sock = socket.socket(family, kind, protocol)
            try:
                self._keep(sock)
                sock.settimeout(self.remaining())
                sock.connect(address)
                self.check(sock.getpeername())
            except OSError as error:
                sock.close()
                failure = error
            else:
                return sock
        raise failure

    def check(self, address: tuple) -> None:
        """Raises ImageFetchError for an address that is not public."""
        if self.public_only and not _is_public(str(address[0])):
            raise ImageFetchError(
                "Only hosts with public addresses may be read here. Received: "
                f"a host at {address[0]}. Use a public URL, or send the "
                "picture's bytes."
            )


def _is_public(address: str) -> bool:
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        inner = ip.ipv4_mapped or ip.sixtofour
        if ip in _NAT64:
            inner = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
        elif ip.teredo:
            inner = ip.teredo[1]
        elif ip.is_site_local:
            return False
        ip = inner or ip
    return ip.is_global and not (
        ip.is_loopback
        or ip.is_link_local
        or ip.is_multicast
        or ip.is_reserved
        or ip.is_unspecified
    )


class _TimedReader(io.RawIOBase):
    """A socket's bytes, with the deadline checked before each read."""

    def __init__(self, sock: socket.socket, transfer: _Transfer):
        self._sock = sock
        self._raw = sock.makefile("rb", buffering=0)
        self._transfer = transfer

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        self._sock.settimeout(self._transfer.remaining())
        return self._raw.readinto(buffer)

    def close(self) -> None:
        self._raw.close()
        super().close()


class _Response(http.client.HTTPResponse):
    def __init__(self, transfer, sock, *args, **kwargs):
        super().__init__(sock, *args, **kwargs)
        self.fp.close()
        self.fp = io.BufferedReader(_TimedReader(sock, transfer))


class _Connection(http.client.HTTPConnection):
    """Opens its socket through the transfer, which checks the address."""

    transfer: _Transfer

    def connect(self) -> None:
        self.sock = self.transfer.connect(self.host, self.port)
        if self._tunnel_host:  # type: ignore[attr-defined]
            self._tunnel()  # type: ignore[attr-defined]


class _SecureConnection(http.client.HTTPSConnection, _Connection):
    """HTTPSConnection.connect wraps the socket of _Connection.connect."""


class _Handler(urllib.request.AbstractHTTPHandler):
    """Opens http and https, and returns a response whatever its status."""

    http_request = https_request = (
        urllib.request.AbstractHTTPHandler.do_request_
    )

    def __init__(self, transfer: _Transfer):
        super().__init__()
        self._transfer = transfer

    def http_open(self, req):
        return self.do_open(functools.partial(self._make, _Connection), req)

    def https_open(self, req):
        make = functools.partial(self._make, _SecureConnection)
        return self.do_open(make, req)

    def _make(self, kind, host, **kwargs):
        connection = kind(host, **kwargs)
        connection.transfer = self._transfer
        connection.response_class = functools.partial(_Response, self._transfer)
        return connection


def _opener(transfer: _Transfer) -> urllib.request.OpenerDirector:
    """An opener of http and https alone, which follows no redirect."""
    opener = urllib.request.OpenerDirector()
    opener.addheaders = []
    if not transfer.public_only:
        opener.add_handler(urllib.request.ProxyHandler())
    opener.add_handler(urllib.request.UnknownHandler())
    opener.add_handler(_Handler(transfer))
    return opener


def _request(url: str) -> tuple[urllib.request.Request, str]:
    """A request for a URL, and the URL as it may be shown."""
    shown = _shown(url)
    if not re.match(r"https?://", url, re.IGNORECASE):
        raise ImageFetchError(
            f"Only http:// and https:// URLs are read. Received: {shown}. "
            "Download the picture first and give its path."
        )
    malformed = ImageFetchError(
        "A URL has the form https://host[:port]/path, without spaces or "
        f"control characters. Received: {shown}. Percent-encode what is "
        "special in it."
    )
    if re.search(r"[\x00-\x20\x7f\\\ud800-\udfff]", url):
        raise malformed
    try:
        parts = urllib.parse.urlsplit(url)
        port = parts.port
        host = (parts.hostname or "").encode("idna").decode("ascii")
    except ValueError:
        # Its text, and so the chained traceback, may quote the password.
        raise malformed from None
    if not host:
        raise malformed
    netloc = f"[{host}]" if ":" in host else host
    if port is not None:
        netloc += f":{port}"
    safe = string.punctuation
    request = urllib.request.Request(  # noqa: S310
        urllib.parse.urlunsplit(
            (
                parts.scheme.lower(),
                netloc,
                urllib.parse.quote(parts.path, safe=safe) or "/",
                urllib.parse.quote(parts.query, safe=safe),
                "",
            )
        ),
        headers={"User-Agent": "bit-tf", "Accept-Encoding": "identity"},
    )
    if parts.username is not None:
        pair = f"{parts.username}:{parts.password or ''}"
        token = base64.b64encode(urllib.parse.unquote_to_bytes(pair)).decode()
        request.add_unredirected_header("Authorization", f"Basic {token}")
    return request, shown


def _redirected(requested: str, address: str, location: str) -> str:
    """The address that a Location header leads to.

    A user and password stay with the host that they were given for.
    """
    target = urllib.parse.quote(
        location.strip(), safe=string.punctuation, encoding="iso-8859-1"
    )
    try:
        joined = urllib.parse.urljoin(requested, target)
        old, new = (urllib.parse.urlsplit(text) for text in (requested, joined))
    except ValueError:
        return target
    if (old.scheme, old.netloc) == (new.scheme, new.netloc):
        given = urllib.parse.urlsplit(address).netloc
        return urllib.parse.urlunsplit(new._replace(netloc=given))
    return joined


def _body(response: Any, shown: str, max_bytes: int) -> bytes:
    if response.status != 200:
        raise ImageFetchError(
            "A picture's URL must answer with status 200. Received: "
            f"{response.status} {response.reason} from {shown}. Check the "
            "address in a browser.",
            status=response.status,
            retry_after=retry_after(response.headers.get("Retry-After")),
        )
    encoding = response.headers.get("Content-Encoding", "identity")
    if encoding.strip().lower() not in ("", "identity"):
        raise ImageFetchError(
            "A body is read as it is, without content encoding. Received: "
            f"{encoding} from {shown}. Download the picture and give its path."
        )
    declared = response.length
    too_large = ImageTooLargeError(
        f"A picture may have at most {max_bytes} bytes. Received: more from "
        f"{shown}. Make the picture smaller, or raise max_bytes."
    )
    if declared is not None and declared > max_bytes:
        raise too_large
    body = bytearray()
    while chunk := response.read(_CHUNK):
        body += chunk
        if len(body) > max_bytes:
            raise too_large
    if declared is not None and len(body) < declared:
        raise ImageFetchError(
            f"A body must arrive whole. Received: {len(body)} of {declared} "
            f"bytes from {shown}. Try again.",
            transient=True,
        )
    return bytes(body)


def _failure(
    reason: BaseException | str, shown: str, transfer: _Transfer
) -> ImageFetchError:
    """The failure of one transfer, in our terms."""
    if isinstance(reason, TimeoutError):
        return ImageFetchError(
            f"A URL must be read within {transfer.timeout} seconds. Received: "
            f"less than the whole of {shown} by then. Try again, or raise "
            "timeout.",
            transient=True,
        )
    return ImageFetchError(
        f"A URL must answer with a picture. Received: {reason!r} from "
        f"{shown}. Check the address and the connection.",
        transient=_may_pass(reason),
    )


def _may_pass(reason: BaseException | str) -> bool:
    """Whether a failure of the connection may be gone on another try."""
    if isinstance(reason, socket.gaierror):
        return reason.errno == socket.EAI_AGAIN
    if isinstance(reason, ssl.SSLCertVerificationError):
        return False
    return isinstance(reason, (OSError, http.client.IncompleteRead))


def _shown(url: str) -> str:
    """A URL without user, password, query and fragment, cut to 200."""
    try:
        parts = urllib.parse.urlsplit(url)
        malformed = parts.port == 0 or not parts.netloc
    except ValueError:
        malformed = True
    if malformed:
        text = re.sub(r"//.*@", "//", url, flags=re.DOTALL).partition("?")[0]
    else:
        host = parts.netloc.rpartition("@")[2]
        query = "?…" if parts.query else ""
        text = f"{parts.scheme}://{host}{parts.path}{query}"
    return repr(text[:200])


def retry_after(value: str | None) -> float | None:
    """Seconds to wait according to a Retry-After, or None if it says none."""
    if value is None:
        return None
    if value.strip().isdecimal():
        return float(value)
    try:
        date = email.utils.parsedate_to_datetime(value)
        if date.tzinfo is None:
            date = date.replace(tzinfo=datetime.UTC)
        left = date - datetime.datetime.now(datetime.UTC)
    except (ValueError, OverflowError):
        return None
    return max(left.total_seconds(), 0.0)


def read_source(
    source: Any,
    *,
    max_bytes: int = MAX_BYTES,
    timeout: float = TIMEOUT,
    public_only: bool = False,
) -> bytes:
    """Reads the bytes of a picture from wherever they are.

    Args:
      source: a path; an http, https or data URL; bytes; or a binary file
        object, read from where it stands.
      max_bytes: the most that is accepted, in bytes.
      timeout: seconds for an http or https URL, as in read_url.
      public_only: as in read_url.

    Raises:
      ImageFetchError: a path, file or URL that cannot be read.
      ImageDecodeError: a malformed data URL, or a file that gives no bytes.
      ImageTooLargeError: more than max_bytes.
    """
    if isinstance(source, (bytes, bytearray, memoryview)):
        data = bytes(source)
    elif isinstance(source, os.PathLike):
        data = _read_path(os.fsdecode(source), max_bytes)
    elif not isinstance(source, str):
        data = _read_file(source, max_bytes)
    elif source[:5].lower() == "data:":
        data = _read_data_url(source)
    elif re.match(r"[a-z][a-z0-9+.-]+://", source, re.IGNORECASE):
        data = read_url(
            source,
            max_bytes=max_bytes,
            timeout=timeout,
            public_only=public_only,
        )
    else:
        data = _read_path(source, max_bytes)
    if len(data) > max_bytes:
        raise ImageTooLargeError(
            f"A picture may have at most {max_bytes} bytes. Received: more. "
            "Make the picture smaller, or raise max_bytes."
        )
    return data


def _read_data_url(text: str) -> bytes:
    head, comma, body = text[5:].partition(",")
    malformed = (
        "A data URL has the form data:image/png;base64,… or data:,… with "
        f"percent-encoded bytes. Received: {brief(text)}. Encode it so."
    )
    if not comma:
        raise ImageDecodeError(malformed)
    data = urllib.parse.unquote_to_bytes(body)
    if not head.strip().lower().endswith(";base64"):
        return data
    data = re.sub(rb"\s+", b"", data)
    try:
        return base64.b64decode(data + b"=" * (-len(data) % 4), validate=True)
    except binascii.Error as error:
        raise ImageDecodeError(malformed) from error


def _read_path(path: str, max_bytes: int) -> bytes:
    unreadable = "A path leads to a regular file that can be read. Received: "
    remedy = "Check the path and its permissions."
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise ImageFetchError(
                f"{unreadable}{brief(path)}, which is a directory or a "
                "device. Give the path of a picture."
            )
        with open(path, "rb") as file:
            return _read_file(file, max_bytes)
    except ImageError:
        raise
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or error
        raise ImageFetchError(
            f"{unreadable}{brief(path)} ({why}). {remedy}"
        ) from error


def _read_file(file: Any, max_bytes: int) -> bytes:
    data = bytearray()
    while len(data) <= max_bytes:
        try:
            part = file.read(2**20)
        except (
            OSError,
            ValueError,
            TypeError,
            AttributeError,
            RuntimeError,
            LookupError,
        ) as error:
            raise ImageFetchError(
                "A file object must be open for reading. Received: "
                f"{brief(file)} ({error}). Open it with mode 'rb'."
            ) from error
        if not isinstance(part, (bytes, bytearray, memoryview)):
            raise ImageDecodeError(
                "A file object must give bytes. Received: "
                f"{type(part).__name__} from {brief(file)}. Open it with "
                "mode 'rb'."
            )
        if not part:
            break
        data += part
    return bytes(data)
