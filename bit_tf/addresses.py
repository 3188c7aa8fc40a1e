"""Where a model is, as somebody has written it: paths and addresses."""

import os
import re
import urllib.parse
import urllib.request

from bit_tf import errors, handles

__all__ = ["KINDS", "absolute", "as_address", "local_path", "public", "require"]

KINDS = "A model handle is a directory, a .tar.gz archive or a URL."


def as_address(text: str) -> str:
    """The address that somebody meant.

    Args:
      text: an address, or a handle of `variants` without "https://tfhub.dev/".

    Raises:
      HandleError: it is none.
    """
    if "://" in text:
        require(text, "A model's address")
        return text
    try:
        handle = handles.Handle.parse(text)
    except errors.HandleError:
        handle = None
    if handle and handles.kaggle_twin(handle.at(handle.version or 1)):
        return f"{handles.TFHUB}{handle}"
    raise errors.HandleError(
        f"{KINDS} Received: {text!r}, and no such path exists."
    )


def absolute(handle: str) -> str:
    """The same handle, whatever the current directory is when it is read.

    Args:
      handle: an address, or a handle of `variants` without
        "https://tfhub.dev/", or the path of something that is or was there.

    Raises:
      HandleError: it is a malformed address.
    """
    if os.path.exists(handle):
        return os.path.abspath(handle)
    try:
        return as_address(handle)
    except errors.HandleError:
        if "://" in handle:
            raise
        return os.path.abspath(handle)


def require(text: str, what: str) -> None:
    """Checks that an address is well formed.

    Args:
      text: the address.
      what: whose it is, for the message.

    Raises:
      HandleError: it is malformed; nothing secret in it is shown.
    """
    try:
        text.encode()
        # Its port is read by nobody else before a request is made.
        _ = urllib.parse.urlsplit(text).port
    except ValueError:
        plain = re.sub("//[^/]*@", "//", re.split("[?#]", text)[0])
        raise errors.HandleError(
            f"{what} is a URL of the form https://host[:port]/path, in UTF-8. "
            f"Received: {errors.brief(plain)}. Correct it."
        ) from None


def public(handle: str) -> str:
    """A handle without user, password, query and fragment.

    Only the query that tensorflow_hub adds itself stays.

    Args:
      handle: an address or a path.
    """
    try:
        parts = urllib.parse.urlsplit(handle)
    except ValueError:
        return re.sub("//[^/]*@", "//", re.split("[?#]", handle)[0])
    if parts.scheme not in ("http", "https"):
        return handle
    host = parts.netloc.rpartition("@")[2]
    plain = urllib.parse.urlunsplit((parts.scheme, host, parts.path, "", ""))
    whole = urllib.parse.urlunsplit(parts._replace(netloc=host))
    return whole if whole == handles.with_query(plain) else plain


def local_path(url: str) -> str:
    """The path that a file:// address means.

    Raises:
      HandleError: the address is malformed.
    """
    require(url, "A file's address")
    return urllib.request.url2pathname(urllib.parse.urlsplit(url).path)
