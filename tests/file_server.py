"""A web server on 127.0.0.1 that serves bytes, and misbehaves on request."""

import contextlib
import dataclasses
import http.server
import threading
import urllib.parse

__all__ = ["FileServer", "Reply", "Seen", "running"]


@dataclasses.dataclass
class Reply:
    """How one GET is answered; as a good server does, unless said otherwise.

    Attributes:
      status: sent instead of 200 or 206, with `body`.
      body: sent instead of the file.
      headers: added or, where the value is None, left out.
      cut: the part of the body after which the connection is closed.
      stall: seconds of silence after the part `cut`.
      hold: waited for before the body.
      ignore_range: whether the whole file is sent whatever was asked for.
    """

    status: int | None = None
    body: bytes | None = None
    headers: dict[str, str | None] = dataclasses.field(default_factory=dict)
    cut: float | None = None
    stall: float = 0.0
    hold: threading.Event | None = None
    ignore_range: bool = False


@dataclasses.dataclass
class Seen:
    """One request that arrived, and how many bytes of body it was given."""

    method: str
    target: str
    headers: dict[str, str]
    sent: int = 0

    @property
    def range(self) -> str | None:
        return self.headers.get("range")


class FileServer(http.server.ThreadingHTTPServer):
    """Serves `bodies`, path → bytes.

    Attributes:
      url: the address, without a slash at the end.
      etags: path → ETag; the others get one made from their length.
      replies: answers to the next GETs, in turn; then come good ones.
      seen: every request, in the order of arrival.
    """

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.bodies: dict[str, bytes] = {}
        self.etags: dict[str, str | None] = {}
        self.replies: list[Reply] = []
        self.seen: list[Seen] = []
        self.closing = threading.Event()

    def handle_error(self, request, client_address):
        """Clients may hang up."""

    def reply(self, method: str, path: str) -> Reply:
        """How a request is answered."""
        if method == "GET" and self.replies:
            return self.replies.pop(0)
        return Reply()

    def answer(self, handler) -> None:
        """Answers one GET or HEAD."""
        seen = Seen(
            handler.command,
            handler.path,
            {name.lower(): v for name, v in handler.headers.items()},
        )
        self.seen.append(seen)
        path = urllib.parse.urlsplit(handler.path).path
        reply = self.reply(seen.method, path)
        body = self.bodies.get(path)
        if reply.status is not None or reply.body is not None:
            status, body = reply.status or 200, reply.body or b""
            headers: dict[str, str | None] = {}
        elif body is None:
            status, body, headers = 404, b"not found", {}
        else:
            status, body, headers = self._file(path, body, seen, reply)
        headers["Content-Length"] = str(len(body))
        self._send(handler, seen, reply, status, headers | reply.headers, body)

    def _file(self, path, body, seen, reply):
        etag = self.etags.get(path, f'"{len(body)}"')
        headers = {
            "Content-Type": "application/octet-stream",
            "ETag": etag,
            "Accept-Ranges": "bytes",
        }
        valid = seen.headers.get("if-range") in (None, etag)
        if seen.range is None or reply.ignore_range or not valid:
            return 200, body, headers
        start = int(seen.range.removeprefix("bytes=").rstrip("-"))
        if start >= len(body):
            return 416, b"", headers | {"Content-Range": f"bytes */{len(body)}"}
        headers["Content-Range"] = f"bytes {start}-{len(body) - 1}/{len(body)}"
        return 206, body[start:], headers

    def _send(self, handler, seen, reply, status, headers, body):
        handler.send_response(status)
        for name, value in headers.items():
            if value is not None:
                handler.send_header(name, value)
        handler.end_headers()
        if seen.method == "HEAD":
            return
        if reply.hold:
            handler.wfile.flush()
            reply.hold.wait(60)
        stop = len(body) if reply.cut is None else int(reply.cut * len(body))
        handler.wfile.write(body[:stop])
        handler.wfile.flush()
        seen.sent = stop
        if reply.stall:
            self.closing.wait(reply.stall)
        if stop < len(body) or headers.get("Content-Length") is None:
            handler.close_connection = True


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: FileServer

    def do_GET(self):
        self.server.answer(self)

    do_HEAD = do_GET

    def log_message(self, *args):
        """Is quiet."""


@contextlib.contextmanager
def running(kind: type[FileServer] = FileServer):
    """A server in a thread of this process."""
    with kind() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        try:
            yield server
        finally:
            server.closing.set()
            server.shutdown()
            thread.join()
