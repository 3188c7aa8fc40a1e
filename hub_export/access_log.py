"""The server's access log: a line a request.

Lines are ASCII, and nothing that a client sends ends one, closes a quotation
in it, or acts on a terminal.
"""

import logging
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from starlette.types import Scope

__all__ = ["LOG", "note_dropped", "note_request"]

LOG = logging.getLogger("hub_export.server.access")


def note_request(
    scope: "Scope", status: int, sent: int, seconds: float
) -> None:
    """Notes a request that was answered.

    Args:
      scope: of ASGI, of type "http".
      status: 0 if no answer was begun, which servers make 500.
      sent: bytes of the body.
      seconds: from the request's headers to the answer's end.
    """
    if not LOG.isEnabledFor(logging.INFO):
        return
    target = scope.get("raw_path") or scope["path"].encode()
    if scope["query_string"]:
        target += b"?" + scope["query_string"]
    client = scope.get("client") or ("-", 0)
    line = f"{scope['method']} {target.decode('latin-1')}"
    LOG.info(
        '%s "%s HTTP/%s" %d %d %.1f ms',
        _printable(str(client[0])),
        _printable(line),
        scope.get("http_version", "?"),
        status or 500,
        sent,
        seconds * 1e3,
    )


def note_dropped(client: str, what: str, status: int) -> None:
    """Notes a connection that the server gives up.

    Args:
      client: its address.
      what: the reason.
      status: the reason's status of HTTP, 0 if it has none.
    """
    LOG.info('%s "-" %d 0 (%s)', client, status, what)


def _printable(text: str) -> str:
    """Without what could end a line or a quotation, or move a cursor."""
    return text.encode("unicode_escape").decode("ascii").replace('"', "\\x22")
