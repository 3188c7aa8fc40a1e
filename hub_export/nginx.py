"""nginx in place of the server: the configuration of a static site."""

import importlib.resources
import os
import re
import string

from bit_tf import errors
from hub_export import server

__all__ = ["nginx_configuration"]


class _Template(string.Template):
    delimiter = "%"


def nginx_configuration(
    root: str | os.PathLike[str],
    *,
    server_name: str = "_",
    listen: str = "8080",
    bucket: str | None = None,
) -> str:
    """A `server` block for nginx, which serves a static site.

    Args:
      root: the directory that `hub-export site` made, as nginx sees it; it
        need not be there.
      server_name: as nginx takes it; "_" for any.
      listen: likewise, such as "127.0.0.1:8080".
      bucket: see `server.application`.

    Raises:
      HandleError: one of them cannot be written into a configuration.
    """
    path = os.path.abspath(root)
    if re.search(r"[\x00-\x1f\x7f\"\\$]", path):
        raise errors.HandleError(
            "nginx takes a path without quotation marks, backslashes, '$' and "
            f"control characters. Received: {errors.brief(path)}."
        )
    if not re.fullmatch(r"[A-Za-z0-9.*_-]+( [A-Za-z0-9.*_-]+)*", server_name):
        raise errors.HandleError(
            "A server name is one or more host names with spaces between, or "
            f"'_' for any. Received: {errors.brief(server_name)}."
        )
    if not re.fullmatch(r"[A-Za-z0-9.:*_/\[\]-]+( [a-z0-9_=]+)*", listen):
        raise errors.HandleError(
            "nginx listens at an address, a port or both, such as 8080 or "
            f"127.0.0.1:8080. Received: {errors.brief(listen)}."
        )
    text = importlib.resources.files("hub_export").joinpath(
        "data", "nginx.conf.template"
    )
    return _Template(text.read_text(encoding="utf-8")).substitute(
        root=path,
        server_name=server_name,
        listen=listen,
        bucket=server.checked_bucket(bucket) or "",
        content_security_policy=server.PAGE_HEADERS["Content-Security-Policy"],
    )
