"""The server's process: `serve`, and what uvicorn lacks for it.

It listens, limits what a connection may take of time and memory, logs, and
stops at signals. What is answered is in hub_export.server.
"""

import asyncio
import contextlib
import logging
import os
import resource
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from bit_tf import errors
from hub_export import access_log, server

if TYPE_CHECKING:
    from uvicorn.protocols.http.h11_impl import H11Protocol
else:
    # Mixed into uvicorn's class where that is installed.
    H11Protocol = object

__all__ = [
    "HEADER_SECONDS",
    "KEEP_ALIVE_SECONDS",
    "STALL_SECONDS",
    "serve",
]

# A connection is closed when its request is not whole after this time, …
HEADER_SECONDS = 10.0
# … its client has taken no byte of an answer for this time, …
STALL_SECONDS = 60.0
# … or no other request comes for this time.
KEEP_ALIVE_SECONDS = 20


class _Guarded(H11Protocol):
    """What uvicorn's protocol lacks: limits of time, and their log lines."""

    _most: int
    _deadline: float | None = None
    _unsent = 0
    _taken = 0.0

    def connection_made(self, transport) -> None:
        super().connection_made(transport)
        if len(self.connections) > self._most:
            # Even an answer costs memory.
            transport.abort()
            return
        self._deadline = self.loop.time() + HEADER_SECONDS
        self._watch()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.conn.their_state is not _h11().IDLE:
            self._deadline = None
        elif self._deadline is None:
            self._deadline = self.loop.time() + HEADER_SECONDS

    def resume_writing(self) -> None:
        self._taken = self.loop.time()
        super().resume_writing()

    def _watch(self) -> None:
        now, transport = self.loop.time(), self.transport
        if transport.is_closing() and not transport.get_write_buffer_size():
            return
        if self._deadline is not None and now > self._deadline:
            self._note("slow headers", 408)
            self._deadline = None
            # What was answered before may still be on its way.
            transport.close()
        unsent = transport.get_write_buffer_size()
        if not unsent or unsent != self._unsent:
            self._unsent, self._taken = unsent, now
        elif now - self._taken > STALL_SECONDS:
            self._note("slow client", 0)
            transport.abort()
            return
        self.loop.call_later(1.0, self._watch)

    def send_400_response(self, msg: str) -> None:
        self._note("malformed request", 400)
        h11 = _h11()
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            super().send_400_response(msg)
        else:
            # In the middle of another answer.
            self.transport.abort()

    def _note(self, what: str, status: int) -> None:
        client = self.client[0] if self.client else "-"
        access_log.note_dropped(client, what, status)


def _h11() -> Any:
    import h11

    return h11


def serve(
    root: str | os.PathLike[str],
    *,
    host: str = "127.0.0.1",
    port: int = 8080,
    bucket: str | None = None,
    root_path: str = "",
    access_log: bool = True,
    grace: int = 30,
    limit: int = 512,
    ready: Callable[[str], None] = lambda address: None,
) -> None:
    """Serves a repository until SIGTERM or SIGINT.

    Logs go to stderr, a line a request. Downloads that run when a signal
    comes may end; nothing new is accepted.

    Args:
      root: see `server.application`.
      host: the address or name to listen at.
      port: 0 for any that is free.
      bucket: likewise.
      root_path: likewise.
      access_log: whether requests are logged.
      grace: seconds that running downloads are given.
      limit: see `server.application`.
      ready: called with the address, such as "http://127.0.0.1:8080/", as
        soon as clients can connect.

    Raises:
      HandleError: root, bucket or root_path is something else.
      OSError: the port cannot be listened at.
      MissingExtraError: starlette or uvicorn is not installed.
    """
    for module in ("starlette", "uvicorn"):
        errors.import_extra(module, "serve")
    import uvicorn
    from uvicorn.protocols.http.h11_impl import H11Protocol

    # Each connection may wait for its next request.
    connections = 2 * limit
    app = server.application(
        root, bucket=bucket, root_path=root_path, limit=limit
    )
    _raise_file_limit(connections + limit + 64)
    guarded = type("Guarded", (_Guarded, H11Protocol), {"_most": connections})
    running = uvicorn.Server(
        uvicorn.Config(
            app,
            http=guarded,
            ws="none",
            loop="asyncio",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_keep_alive=KEEP_ALIVE_SECONDS,
            timeout_graceful_shutdown=grace,
            h11_max_incomplete_event_size=server.MAX_HEADER,
        )
    )
    with (
        _listening(host, port) as listener,
        _logging(access_log),
        _stopped_by_signals(running),
    ):
        name, number = listener.getsockname()[:2]
        name = f"[{name}]" if ":" in name else name
        ready(f"http://{name}:{number}{root_path.rstrip('/')}/")
        running.run(sockets=[listener])


def _raise_file_limit(needed: int) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return
    if hard != resource.RLIM_INFINITY and hard < needed:
        raise OSError(
            f"So many requests at once need {needed} open files. Received: a "
            f"system that permits {hard}. Raise it (ulimit -n, or systemd's "
            "LimitNOFILE), or lower --limit-concurrency."
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))


def _listening(host: str, port: int) -> socket.socket:
    """A socket that listens.

    Raises:
      OSError: it cannot.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        return socket.create_server(address[:2], family=family, backlog=1024)
    except (OSError, OverflowError, UnicodeError) as error:
        raise OSError(
            "A server listens at an address of this machine, at a port from 0 "
            "to 65535 that is free; those below 1024 are the system's. "
            f"Received: host {host!r}, port {port}: "
            f"{getattr(error, 'strerror', None) or error}. Choose another "
            "--port (0 for any), or stop what listens there."
        ) from error


@contextlib.contextmanager
def _logging(requests: bool) -> Iterator[None]:
    """Log lines of the server, and failures of the others, go to stderr."""
    handler = logging.StreamHandler(sys.stderr)
    formatter = logging.Formatter(
        "%(asctime)s %(message)s", "%Y-%m-%dT%H:%M:%SZ"
    )
    formatter.converter = time.gmtime
    handler.setFormatter(formatter)
    handler.addFilter(_is_no_cancellation)
    levels = {
        logging.getLogger(server.__name__): logging.INFO,
        access_log.LOG: logging.INFO if requests else logging.WARNING,
        logging.getLogger("asyncio"): logging.ERROR,
        logging.getLogger("uvicorn.error"): logging.ERROR,
    }
    before = {log: (log.level, log.propagate) for log in levels}
    for log, level in levels.items():
        log.setLevel(level)
        log.propagate = False
        log.addHandler(handler)
    try:
        yield
    finally:
        for log, (level, propagate) in before.items():
            log.removeHandler(handler)
            log.setLevel(level)
            log.propagate = propagate


def _is_no_cancellation(record: logging.LogRecord) -> bool:
    """False for the downloads that uvicorn ends after the grace."""
    info = record.exc_info
    return not (info and isinstance(info[1], asyncio.CancelledError))


@contextlib.contextmanager
def _stopped_by_signals(running: Any) -> Iterator[None]:
    """Signals stop the server, also those that uvicorn raises once more."""
    before = {
        number: signal.signal(number, running.handle_exit)
        for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
