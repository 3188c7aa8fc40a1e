"""The files that a server may send: found, opened, and sent.

They are the regular files whose real place is below the root. What may not be
sent, or cannot be, raises a `RequestError`, which says how to answer.
"""

import asyncio
import dataclasses
import errno
import functools
import logging
import os
import re
import stat
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from bit_tf import errors, handles
from hub_export import tree

if TYPE_CHECKING:
    from starlette.types import Receive, Scope, Send

__all__ = [
    "COMPONENT",
    "Download",
    "Files",
    "Opened",
    "RequestError",
    "busy",
    "damaged",
    "missing",
    "read_cached",
]

# A name in a path: not ".", ".." or a hidden one.
COMPONENT = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,254}", re.ASCII)

# 32 clients at once: half the throughput at 32 KiB, no more of it at 512 KiB.
_CHUNK = 128 * 2**10
_MAX_ENTRY = 2**24

# The server's, which hub_export.serving sends to stderr.
_log = logging.getLogger("hub_export.server")


class RequestError(Exception):
    """A request that is answered with a status and a line of text.

    Args:
      status: of HTTP.
      text: the line, without its end.
      headers: of the answer, besides those of its text.
    """

    def __init__(
        self, status: int, text: str, headers: Mapping[str, str] | None = None
    ):
        super().__init__(text)
        self.status = status
        self.text = text
        self.headers = headers or {}


def missing(text: str = "There is nothing here.") -> RequestError:
    """404: there is nothing, or nothing that may be served."""
    return RequestError(404, text)


def damaged() -> RequestError:
    """500: the files of a version contradict each other; log how."""
    return RequestError(
        500, "This version is damaged on the server, which has logged how."
    )


def busy() -> RequestError:
    """503: too many requests or open files; another time may do."""
    return RequestError(
        503,
        "This server has as many requests as it takes at once. Try again.",
        {"Retry-After": "5"},
    )


@dataclasses.dataclass
class Opened:
    """A file that is served, open; `close` must be called.

    Attributes:
      descriptor: for os.pread.
      size: bytes.
      modified: whole seconds since 1970.
      stamp: changes when the file is replaced.
    """

    descriptor: int
    size: int
    modified: int
    stamp: str

    def close(self) -> None:
        os.close(self.descriptor)

    def __enter__(self) -> "Opened":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


class Files:
    """The regular files whose real place is below a root.

    Args:
      root: a real path, resolved once.
    """

    def __init__(self, root: str):
        self.root = root

    def real(self, parts: Sequence[str]) -> str:
        """The real path of what lies at a relative one.

        Raises:
          RequestError: that is outside of the root, or has a name that begins
            with a dot.
        """
        path = os.path.realpath(os.path.join(self.root, *parts))
        below = os.path.relpath(path, self.root)
        if below != "." and not all(
            map(COMPONENT.fullmatch, below.split(os.sep))
        ):
            raise missing()
        return path

    def open(self, parts: Sequence[str]) -> Opened:
        """Opens a file.

        Raises:
          RequestError: there is none that may be served.
        """
        path = self.real(parts)
        try:
            # Non-blocking for what may be a pipe.
            descriptor = os.open(
                path,
                os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK,
            )
        except OSError as error:
            raise self._refused(path, error) from error
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode):
            os.close(descriptor)
            raise missing()
        stamp = (found.st_ino, found.st_mtime_ns, found.st_size)
        return Opened(
            descriptor,
            found.st_size,
            int(found.st_mtime),
            "-".join(f"{number:x}" for number in stamp),
        )

    def is_folder(self, parts: Sequence[str]) -> bool:
        """Whether there is a folder."""
        return os.path.isdir(self.real(parts))

    def release(self, handle: handles.Handle) -> handles.Release:
        """What a version's entry says of it.

        Raises:
          RequestError: there is none, or it is damaged.
        """
        parts = [*handle.path.split("/"), handles.ENTRY_FILE]
        try:
            with self.open(parts) as file:
                size = min(file.size, _MAX_ENTRY)
                found = _parsed(os.pread(file.descriptor, size, 0))
        except errors.HandleError as error:
            _log.error("%s is damaged: %s", "/".join(parts), error)
            raise damaged() from error
        if found.handle != handle:
            _log.error("%s is of %s", "/".join(parts), found.handle)
            raise damaged()
        return found

    def newest(self, handle: handles.Handle) -> handles.Handle | None:
        """The newest version of a model."""
        if not self.is_folder(handle.path.split("/")):
            return None
        return tree.newest(self.root, handle)

    def _refused(self, path: str, error: OSError) -> RequestError:
        if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOMEM):
            _log.error("%s cannot be opened: %s", path, error)
            return busy()
        if error.errno not in (
            errno.ENOENT,
            errno.ENOTDIR,
            errno.ELOOP,
            errno.ENAMETOOLONG,
        ):
            _log.error("%s cannot be opened: %s", path, error)
        return missing()


@functools.lru_cache(maxsize=256)
def _parsed(text: bytes) -> handles.Release:
    return handles.Release.parse(text)


class Download:
    """An answer whose body is a part of an open file, which it closes.

    Args:
      file: the file.
      status: 200 or 206.
      headers: all of them.
      start: the first byte.
      stop: the one after the last.
    """

    def __init__(
        self,
        file: Opened,
        status: int,
        headers: Mapping[str, str],
        start: int,
        stop: int,
    ):
        self._file = file
        self._status = status
        self._headers = [
            (name.lower().encode("latin-1"), value.encode("latin-1"))
            for name, value in headers.items()
        ]
        self._start = start
        self._stop = stop

    async def __call__(
        self, scope: "Scope", receive: "Receive", send: "Send"
    ) -> None:
        with self._file:
            await send(
                {
                    "type": "http.response.start",
                    "status": self._status,
                    "headers": self._headers,
                }
            )
            if scope["method"] == "HEAD" or self._start == self._stop:
                await send({"type": "http.response.body", "body": b""})
                return
            # Servers drop what is sent to a client that is gone.
            gone = asyncio.ensure_future(_disconnected(receive))
            try:
                await self._send(send, gone)
            finally:
                gone.cancel()

    async def _send(self, send: "Send", gone: asyncio.Future) -> None:
        at = self._start
        while at < self._stop and not gone.done():
            count = min(self._stop - at, _CHUNK)
            chunk = read_cached(self._file.descriptor, count, at)
            if chunk is None:
                from starlette.concurrency import run_in_threadpool

                chunk = await run_in_threadpool(
                    os.pread, self._file.descriptor, count, at
                )
            if not chunk:
                # The server then closes the connection, so that the client
                # knows.
                _log.error("A file became shorter while it was sent")
                return
            at += len(chunk)
            await send(
                {
                    "type": "http.response.body",
                    "body": chunk,
                    "more_body": at < self._stop,
                }
            )
            # A fast client must not keep others, and word that it has gone,
            # from their turn.
            await asyncio.sleep(0)


async def _disconnected(receive: "Receive") -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


_scratch = bytearray(_CHUNK)


def read_cached(descriptor: int, count: int, at: int) -> bytes | None:
    """Bytes of a file, or None where the disk must be waited for."""
    flag = getattr(os, "RWF_NOWAIT", None)
    if flag is None:
        return None
    with memoryview(_scratch) as view, view[:count] as part:
        try:
            return bytes(part[: os.preadv(descriptor, [part], at, flag)])
        except OSError as error:
            if error.errno in (errno.EAGAIN, errno.EOPNOTSUPP, errno.ENOSYS):
                return None
            raise
