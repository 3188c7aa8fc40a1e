"""The server of a repository: read-only, over the files of its tree.

    GET /google/bit/m-r50x1/1?tf-hub-format=compressed    the archive
    GET /google/bit/m-r50x1/1.tar.gz                      the archive
    GET /google/bit/m-r50x1?tf-hub-format=compressed      the newest one
    GET /google/bit/m-r50x1/1?tf-hub-format=uncompressed  303, a gs:// address
    GET /google/bit/m-r50x1/1/                            the page
    GET /google/bit/m-r50x1/1/entry.json                  any file of the tree
    GET /healthz                                          "ok"

Every request looks at the tree anew, so that what is published while the
server runs is served at once. A folder without its final slash is redirected
to it, since pages have relative links; archives never are.
"""

import base64
import logging
import os
import re
import time
import urllib.parse
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from bit_tf import errors, handles
from hub_export import (
    access_log,
    http_conditions,
    pages,
    repository,
    served_files,
    tree,
)

if TYPE_CHECKING:
    from starlette.applications import Starlette
    from starlette.datastructures import Headers
    from starlette.responses import Response
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

__all__ = ["MAX_HEADER", "PAGE_HEADERS", "application", "checked_bucket"]

# Bytes of a request's line and headers.
MAX_HEADER = 16 * 2**10

_METHODS = ("GET", "HEAD")
_BUCKET = re.compile(r"gs://[a-z0-9][a-z0-9_.-]{1,220}[a-z0-9]")
_ABSOLUTE_FORM = re.compile(r"https?://[^/]*", re.IGNORECASE)

# Of every page of HTML.
PAGE_HEADERS = {
    # What a <meta> tag cannot say is added.
    "Content-Security-Policy": f"{pages.CONTENT_SECURITY_POLICY}; "
    "frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
}
_IMMUTABLE = "public, max-age=31536000, immutable"
# Kept by caches, which ask each time whether it is still the newest.
_MUTABLE = "no-cache"

_KEPT_BY_304 = ("ETag", "Cache-Control", "Content-Location", "Last-Modified")

_GZIP = "application/gzip"
_BYTES = "application/octet-stream"
_TYPES = {
    ".css": "text/css; charset=utf-8",
    ".gz": _GZIP,
    ".html": "text/html; charset=utf-8",
    ".ico": "image/x-icon",
    ".js": "text/javascript; charset=utf-8",
    ".json": "application/json",
    ".md": "text/markdown; charset=utf-8",
    ".png": "image/png",
    ".svg": "image/svg+xml",
    ".txt": "text/plain; charset=utf-8",
    ".xml": "application/xml",
}

_log = logging.getLogger(__name__)


def application(
    root: str | os.PathLike[str],
    *,
    bucket: str | None = None,
    root_path: str = "",
    limit: int = 512,
) -> "Starlette":
    """The application that serves a repository, for any ASGI server.

    Args:
      root: a repository, or what `hub-export site` made of one.
      bucket: where a copy of the tree lies for clients that ask for
        uncompressed models, "gs://name" or "gs://name/prefix"; None if
        nowhere.
      root_path: the path under which a proxy publishes this server, such as
        "/hub"; the proxy may strip it from requests or not.
      limit: requests that are answered at the same time; others get 503.

    Raises:
      HandleError: one of them is something else.
      MissingExtraError: starlette is not installed.
    """
    errors.import_extra("starlette", "serve")
    from starlette.applications import Starlette
    from starlette.middleware import Middleware
    from starlette.routing import Mount

    files = served_files.Files(_real_root(root))
    prefix = _checked_root_path(root_path, files)
    served = _Served(files, checked_bucket(bucket))
    return Starlette(
        routes=[Mount("/", app=served)],
        middleware=[Middleware(_Edge, prefix=prefix, limit=limit)],
    )


def _real_root(root: str | os.PathLike[str]) -> str:
    if repository.is_unfinished(root):
        raise errors.HandleError(
            "What is served is a repository of models, which holds "
            f"{handles.INDEX_FILE}. Received: {os.fspath(root)!r}, in which "
            "the first publication was not finished. Publish again, as "
            "before, or make the index and pages of what is there with: "
            "hub-export publish --refresh --repository DIR"
        )
    if not tree.is_repository(root):
        raise errors.HandleError(
            "What is served is a repository of models, which holds "
            f"{handles.INDEX_FILE}. Received: {os.fspath(root)!r}, which has "
            "none. Make one with: hub-export publish CHECKPOINT --repository "
            "DIR --handle PUBLISHER/NAME"
        )
    return os.path.realpath(root)


def checked_bucket(bucket: str | None) -> str | None:
    """A bucket, or None, without a final slash.

    Args:
      bucket: see `application`.

    Raises:
      HandleError: it is spelled otherwise.
    """
    if bucket is None:
        return None
    base, *parts = re.split("(?<=[^/])/(?=[^/])", bucket.removesuffix("/"))
    if not (
        _BUCKET.fullmatch(base)
        and all(map(served_files.COMPONENT.fullmatch, parts))
    ):
        raise errors.HandleError(
            "A bucket is gs://name or gs://name/prefix, in Google's spelling. "
            f"Received: {errors.brief(bucket)}."
        )
    return "/".join([base, *parts])


def _checked_root_path(root_path: str, files: "served_files.Files") -> str:
    prefix = root_path.rstrip("/")
    first, *parts = prefix.split("/")
    if first or not all(map(served_files.COMPONENT.fullmatch, parts)):
        raise errors.HandleError(
            "A root path is empty, or begins with a slash and is of letters, "
            f"digits, '_', '-' and '.', such as /hub. Received: "
            f"{errors.brief(root_path)}."
        )
    if parts and os.path.lexists(os.path.join(files.root, parts[0])):
        raise errors.HandleError(
            "A root path begins with no name of the repository's root, so "
            "that one can be told from the other. Received: "
            f"{root_path!r}, and {parts[0]!r} is there. Choose another."
        )
    return prefix


class _Served:
    """The application behind `_Edge`: one request, one answer.

    Args:
      files: those of the repository.
      bucket: "gs://name/prefix" without a final slash, or None.
    """

    def __init__(self, files: served_files.Files, bucket: str | None):
        self._files = files
        self._bucket = bucket

    async def __call__(
        self, scope: "Scope", receive: "Receive", send: "Send"
    ) -> None:
        from starlette.concurrency import run_in_threadpool
        from starlette.datastructures import Headers

        # Disks may be slow to say what they have.
        answer = await run_in_threadpool(
            self._answer,
            scope["method"],
            scope["path"],
            scope["query_string"],
            Headers(scope=scope),
        )
        await answer(scope, receive, send)

    def _answer(
        self, method: str, path: str, query: bytes, headers: "Headers"
    ) -> "Response | served_files.Download":
        """Every status that this server answers with, but for 503 of `_Edge`.

        Args:
          method: as the client wrote it.
          path: decoded once, without the root path.
          query: not decoded.
          headers: of the request.
        """
        from starlette.responses import PlainTextResponse

        try:
            if method not in _METHODS:
                raise served_files.RequestError(
                    405,
                    "This server is read-only.",
                    {"Allow": ", ".join(_METHODS)},
                )
            if _has_body(headers):
                raise served_files.RequestError(
                    400, "A request of GET or HEAD has no body."
                )
            parts, slash = _components(path)
            format = _format(query)
            if format is None:
                if parts == ["healthz"] and not slash:
                    return self._health()
                if (handle := _archive_handle(parts)) is not None:
                    return self._archive(handle, headers)
                if self._files.is_folder(parts):
                    page = [*parts, tree.PAGE_FILE]
                    if slash:
                        return self._file(page, headers)
                    with self._files.open(page):
                        return _to_folder(path)
                if slash:
                    raise served_files.missing()
                return self._file(parts, headers)
            handle, newest = self._asked(parts, slash)
            if format == "compressed":
                location = _last(handle) if newest else None
                if location and not slash:
                    location = f"{parts[-1]}/{location}"
                return self._archive(handle, headers, location)
            if self._bucket is None:
                raise served_files.RequestError(
                    406,
                    "This server has no uncompressed models. Ask for "
                    f"?{handles.FORMAT_QUERY}=compressed, as tensorflow_hub "
                    "does unless TFHUB_MODEL_LOAD_FORMAT=UNCOMPRESSED.",
                )
            # tensorflow_hub opens the whole body as a path, and would follow
            # a Location.
            return PlainTextResponse(
                f"{self._bucket}/{handle}/{handles.MODEL_FOLDER}",
                303,
                {"Cache-Control": _MUTABLE},
            )
        except served_files.RequestError as refused:
            return PlainTextResponse(
                f"{refused.text}\n", refused.status, refused.headers
            )

    def _health(self) -> "Response":
        from starlette.responses import PlainTextResponse

        well = tree.is_repository(self._files.root)
        return PlainTextResponse(
            "ok\n" if well else f"There is no {handles.INDEX_FILE}.\n",
            200 if well else 503,
            {"Cache-Control": "no-store"},
        )

    def _asked(
        self, parts: Sequence[str], slash: bool
    ) -> tuple[handles.Handle, bool]:
        """The version that a handle with a query means.

        Returns:
          (handle with a version, whether it was chosen as the newest)
        """
        handle = _archive_handle(parts)
        if handle is None:
            try:
                handle = handles.Handle.parse("/".join(parts))
            except errors.HandleError as error:
                raise served_files.missing(
                    "A model's handle is publisher/name/version, such as "
                    "google/bit/m-r50x1/1."
                ) from error
        if handle.version is not None:
            # A clear answer also for a bucket's address.
            self._released(handle)
            return handle, False
        newest = self._files.newest(handle)
        if newest is None:
            raise served_files.missing(
                f"No version of {handle} is published here."
            )
        return newest, True

    def _released(self, handle: handles.Handle) -> handles.Release:
        try:
            return self._files.release(handle)
        except served_files.RequestError as refused:
            if refused.status != 404:
                raise
            raise served_files.missing(
                f"{handle} is not published here."
            ) from refused

    def _archive(
        self,
        handle: handles.Handle,
        headers: "Headers",
        location: str | None = None,
    ) -> "Response | served_files.Download":
        """The archive of a version.

        Args:
          handle: with a version.
          headers: of the request.
          location: the archive's own, relative address, where the request's
            may mean another archive later.
        """
        release = self._released(handle)
        name = f"{_last(handle)}"
        file = self._files.open([*handle.path.split("/")[:-1], name])
        if file.size != release.size:
            file.close()
            _log.error(
                "%s%s is damaged: it has %d bytes, and %d in its entry",
                handle,
                handles.ARCHIVE_SUFFIX,
                file.size,
                release.size,
            )
            raise served_files.damaged()
        digest = base64.b64encode(bytes.fromhex(release.sha256)).decode()
        described = {
            "Content-Type": _GZIP,
            "ETag": f'"{release.sha256}"',
            "Repr-Digest": f"sha-256=:{digest}:",
            "Cache-Control": _MUTABLE if location else _IMMUTABLE,
        }
        if location:
            described["Content-Location"] = location
        return _answer_with(file, described, headers)

    def _file(
        self, parts: Sequence[str], headers: "Headers"
    ) -> "Response | served_files.Download":
        """Any other file."""
        file = self._files.open(parts)
        suffix = os.path.splitext(parts[-1])[1].lower()
        described = {
            "Content-Type": _TYPES.get(suffix, _BYTES),
            "ETag": f'"{file.stamp}"',
            "Cache-Control": _MUTABLE,
        }
        if described["Content-Type"].startswith("text/html"):
            described |= PAGE_HEADERS
        inside = _inside_version(parts)
        if inside:
            described["Cache-Control"] = _IMMUTABLE
        if inside[:1] == [handles.MODEL_FOLDER]:
            # A SavedModel of others must not act as a page of this host.
            described["Content-Type"] = _BYTES
            described["Content-Security-Policy"] = "sandbox"
        return _answer_with(file, described, headers)


def _to_folder(path: str) -> "Response":
    """A redirection to the same path with a final slash."""
    from starlette.responses import RedirectResponse

    # Relative, and so right under any root path.
    name = path.rpartition("/")[2]
    return RedirectResponse(f"{name}/", 301, {"Cache-Control": _MUTABLE})


def _has_body(headers: "Headers") -> bool:
    return (
        headers.get("content-length", "0").strip("0") != ""
        or "transfer-encoding" in headers
    )


def _components(path: str) -> tuple[list[str], bool]:
    """The parts of a path, and whether it ends in a slash.

    Raises:
      RequestError: a part is no plain name.
    """
    first, *parts = path.split("/")
    slash = parts[-1:] == [""]
    if slash:
        parts.pop()
    if first or not all(map(served_files.COMPONENT.fullmatch, parts)):
        raise served_files.missing()
    return parts, slash


def _format(query: bytes) -> str | None:
    """What the query says of the format, or None if it says nothing.

    Raises:
      RequestError: it is not one that is known.
    """
    try:
        pairs = urllib.parse.parse_qsl(
            query.decode("latin-1"), keep_blank_values=True, max_num_fields=64
        )
    except ValueError as error:
        raise served_files.RequestError(
            400, "A query has up to 64 fields."
        ) from error
    found = {value for name, value in pairs if name == handles.FORMAT_QUERY}
    if not found:
        return None
    if found not in ({"compressed"}, {"uncompressed"}):
        raise served_files.RequestError(
            400,
            f"{handles.FORMAT_QUERY} is compressed or uncompressed.",
        )
    return found.pop()


def _archive_handle(parts: Sequence[str]) -> handles.Handle | None:
    """The version whose archive lies at a path, or None."""
    path = "/".join(parts)
    if parts[-1:] == [tree.ARCHIVE_FILE]:
        path = "/".join(parts[:-1])
    elif path.endswith(handles.ARCHIVE_SUFFIX):
        path = path.removesuffix(handles.ARCHIVE_SUFFIX)
    else:
        return None
    try:
        handle = handles.Handle.parse(path)
    except errors.HandleError:
        return None
    return handle if handle.version is not None else None


def _last(handle: handles.Handle) -> str:
    return f"{handle.version}{handles.ARCHIVE_SUFFIX}"


def _inside_version(parts: Sequence[str]) -> list[str]:
    """The parts after a version's folder, [] if there is none."""
    for number in range(3, len(parts)):
        if parts[number - 1].isdigit() and parts[0] != "assets":
            return list(parts[number:])
    return []


def _answer_with(
    file: served_files.Opened, described: dict[str, str], headers: "Headers"
) -> "Response | served_files.Download":
    """An open file, a part of it, or word that the client has it.

    Args:
      file: closed when the answer is sent.
      described: Content-Type, ETag (a strong one) and other headers.
      headers: of the request.
    """
    from starlette.responses import PlainTextResponse, Response

    described |= {
        "Last-Modified": http_conditions.http_date(file.modified),
        "Accept-Ranges": "bytes",
    }
    etag = described["ETag"]
    status = http_conditions.precondition(headers, etag, file.modified)
    if status is not None:
        file.close()
        kept = {
            name: value
            for name, value in described.items()
            if name in _KEPT_BY_304
        }
        if status == 304:
            return Response(None, status, kept)
        return PlainTextResponse("This is another file now.\n", status, kept)
    start, stop, status = 0, file.size, 200
    if http_conditions.range_applies(headers, etag, file.modified):
        asked = http_conditions.byte_range(headers["range"], file.size)
        if asked is not None:
            start, stop = asked
            status = 206
            described["Content-Range"] = f"bytes {start}-{stop - 1}/{file.size}"
            if start >= stop:
                size = file.size
                file.close()
                return PlainTextResponse(
                    f"This file has {size} bytes.\n",
                    416,
                    {"Content-Range": f"bytes */{size}"},
                )
    described["Content-Length"] = str(stop - start)
    return served_files.Download(file, status, described, start, stop)


def _header_size(scope: "Scope") -> int:
    """Bytes of a request's line and headers, as they were sent."""
    target = scope.get("raw_path") or scope["path"].encode()
    line = f"{scope['method']} ? HTTP/1.1\r\n\r\n"
    return (
        len(line)
        + len(target)
        + len(scope["query_string"])
        + sum(len(name) + len(value) + 4 for name, value in scope["headers"])
    )


class _Edge:
    """What surrounds every request: limit, paths, headers, access log.

    Args:
      app: what answers.
      prefix: removed from the beginning of paths.
      limit: requests at the same time.
    """

    def __init__(self, app: "ASGIApp", prefix: str, limit: int):
        self._app = app
        self._prefix = prefix
        self._limit = limit
        self._active = 0

    async def __call__(
        self, scope: "Scope", receive: "Receive", send: "Send"
    ) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        from starlette.datastructures import Headers, MutableHeaders
        from starlette.responses import PlainTextResponse

        started = time.perf_counter()
        status, sent = 0, 0
        # The rest of such a request would be read as another one.
        close = _has_body(Headers(scope=scope))
        # A server may take more at once, if it comes in one piece.
        oversized = _header_size(scope) > MAX_HEADER
        close = close or oversized

        async def note(message: "Message") -> None:
            nonlocal status, sent
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(raw=list(message["headers"]))
                headers["x-content-type-options"] = "nosniff"
                if close:
                    headers["connection"] = "close"
                message = {**message, "headers": headers.raw}
            elif scope["method"] != "HEAD":
                sent += len(message.get("body", b""))
            await send(message)

        # Clients of proxies send the whole address.
        path = _ABSOLUTE_FORM.sub("", scope["path"], count=1) or "/"
        prefix = self._prefix or scope.get("root_path", "")
        app: Any = self._app
        if oversized:
            app = PlainTextResponse(
                f"A request has up to {MAX_HEADER} bytes of headers.\n", 431
            )
        elif self._active >= self._limit:
            busy = served_files.busy()
            app = PlainTextResponse(f"{busy.text}\n", busy.status, busy.headers)
        elif not path.startswith("/"):
            # "*" and "host:port" are no paths.
            missing = served_files.missing()
            app = PlainTextResponse(f"{missing.text}\n", missing.status)
        elif prefix and path == prefix:
            app = _to_folder(path)
        elif path.startswith(f"{prefix}/"):
            path = path.removeprefix(prefix)
        self._active += 1
        try:
            await app({**scope, "path": path, "root_path": ""}, receive, note)
        finally:
            self._active -= 1
            access_log.note_request(
                scope, status, sent, time.perf_counter() - started
            )
