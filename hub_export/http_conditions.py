"""Conditional and partial requests, as RFC 9110 has them.

If-Match, If-None-Match, If-Modified-Since, If-Unmodified-Since, If-Range and
Range. `headers` are the request's, in starlette's class.
"""

import datetime
import email.utils
import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from starlette.datastructures import Headers

__all__ = ["byte_range", "http_date", "precondition", "range_applies"]

_RANGE = re.compile(r"bytes=([0-9]*)-([0-9]*)", re.ASCII)
_ETAG = re.compile(r'(?:W/)?"[^"]*"')
# Larger than any file.
_HUGE = 10**18


def http_date(seconds: int) -> str:
    """A time as headers have it: "Sun, 06 Nov 1994 08:49:37 GMT".

    Args:
      seconds: since 1970.
    """
    return email.utils.formatdate(seconds, usegmt=True)


def precondition(headers: "Headers", etag: str, modified: int) -> int | None:
    """What a request's conditions say of a file, in the order of 13.2.2.

    Args:
      headers: of the request.
      etag: the file's, a strong one, with its quotation marks.
      modified: when it was, in whole seconds since 1970.

    Returns:
      304 where the client has the file, 412 where it asks for another one,
      None where it is to be sent.
    """
    matching = _tags(headers, "if-match")
    if matching is not None:
        if etag not in matching and "*" not in matching:
            return 412
    else:
        since = _date(headers.get("if-unmodified-since"))
        if since is not None and modified > since:
            return 412
    matching = _tags(headers, "if-none-match")
    if matching is not None:
        known = {tag.removeprefix("W/") for tag in matching}
        return 304 if etag in known or "*" in known else None
    since = _date(headers.get("if-modified-since"))
    return 304 if since is not None and modified <= since else None


def _tags(headers: "Headers", name: str) -> set[str] | None:
    values = headers.getlist(name)
    if not values:
        return None
    text = ",".join(values)
    return {"*"} if text.strip() == "*" else set(_ETAG.findall(text))


def _date(value: str | None) -> float | None:
    try:
        date = email.utils.parsedate_to_datetime(value or "")
        return date.replace(tzinfo=date.tzinfo or datetime.UTC).timestamp()
    except (ValueError, OverflowError):
        return None


def range_applies(headers: "Headers", etag: str, modified: int) -> bool:
    """Whether the answer is a part of the file, by Range and If-Range.

    Args:
      headers: of the request.
      etag: see `precondition`.
      modified: likewise.
    """
    if len(headers.getlist("range")) != 1:
        return False
    return headers.get("if-range") in (None, etag, http_date(modified))


def byte_range(value: str, size: int) -> tuple[int, int] | None:
    """The part of a file that a Range header asks for.

    Args:
      value: such as "bytes=0-99", "bytes=100-" or "bytes=-100".
      size: of the file, in bytes.

    Returns:
      (start, stop), where start >= stop if the file has no such part; None
      where the header is to be ignored, as are several ranges: no client of
      archives asks for them.
    """
    match = _RANGE.fullmatch(value.strip())
    if match is None or match.groups() == ("", ""):
        return None
    first, last = match.groups()
    if not first:
        return max(size - _number(last), 0), size
    start, end = _number(first), _number(last) if last else _HUGE
    if end < start:
        return None
    return start, min(end + 1, size)


def _number(digits: str) -> int:
    digits = digits.lstrip("0") or "0"
    return int(digits) if len(digits) <= 18 else _HUGE
