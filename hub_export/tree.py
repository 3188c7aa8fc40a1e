"""Where everything lies in a repository of models.

    index.json                              every version's entry
    index.html  assets/                     front page, its style and script
    google/index.html                       the publisher's page
    google/bit/index.html                   the collection's
    google/bit/m-r50x1/index.html           the model's, with its versions
    google/bit/m-r50x1/entry.json           the newest version's entry
    google/bit/m-r50x1/1.tar.gz             → 1/model.tar.gz
    google/bit/m-r50x1/1/                   a version, never changed:
        index.html  card.md  entry.json     its page, card and description
        model.tar.gz  model/                its SavedModel, packed and not
    assets/docs/                            cards as tfhub.dev's documentation

A version's folder appears by one rename; what is outside of such folders is
made anew from them. Names that begin with a dot are the publisher's own.
"""

import os
import pathlib
from collections.abc import Iterator

from bit_tf import errors, handles
from hub_export import entry

__all__ = [
    "ARCHIVE_FILE",
    "CARD_FILE",
    "PAGE_FILE",
    "archive",
    "directory",
    "is_repository",
    "newest",
    "read",
    "released",
    "versions",
]

ARCHIVE_FILE = "model.tar.gz"
CARD_FILE = "card.md"
PAGE_FILE = "index.html"


def directory(
    root: str | os.PathLike[str], handle: handles.Handle
) -> pathlib.Path:
    """The folder of a version, or of a model without one."""
    return pathlib.Path(root, *handle.path.split("/"))


def archive(
    root: str | os.PathLike[str], handle: handles.Handle
) -> pathlib.Path:
    """The archive of a version, under its public name."""
    return pathlib.Path(f"{directory(root, handle)}{handles.ARCHIVE_SUFFIX}")


def is_repository(path: str | os.PathLike[str]) -> bool:
    """Whether a directory is a repository's root."""
    return os.path.isfile(os.path.join(path, handles.INDEX_FILE))


def versions(root: str | os.PathLike[str], handle: handles.Handle) -> list[int]:
    """The published versions of a model, the oldest first."""
    folder = directory(root, handle.at(None))
    return sorted(found.version or 0 for found in _released(folder, handle))


def newest(
    root: str | os.PathLike[str], handle: handles.Handle
) -> handles.Handle | None:
    """The newest version of a model, or None if it was never published."""
    found = versions(root, handle)
    return handle.at(found[-1]) if found else None


def released(root: str | os.PathLike[str]) -> list[handles.Handle]:
    """Every published version, in the order of names, then versions."""
    found: list[handles.Handle] = []
    for folder, names, _ in os.walk(root):
        names[:] = [name for name in names if not name.startswith(".")]
        relative = pathlib.PurePath(folder).relative_to(root).as_posix()
        try:
            handle = handles.Handle.parse(relative)
        except errors.HandleError:
            if relative.split("/")[0] == "assets":
                names.clear()
            continue
        if handle.version is not None:
            names.clear()
            continue
        found += _released(pathlib.Path(folder), handle)
    return sorted(found)


def read(root: str | os.PathLike[str], handle: handles.Handle) -> entry.Entry:
    """The entry of a published version.

    Raises:
      HandleError: it is damaged, or of another handle.
      FileNotFoundError: the version is not there.
    """
    path = directory(root, handle) / handles.ENTRY_FILE
    found = entry.Entry.parse(path.read_bytes())
    if found.handle != handle:
        raise errors.HandleError(
            f"{path} describes {handle}. Received: an entry of "
            f"{found.handle}. Publish the version anew in a repository of its "
            "own; a version is never moved."
        )
    return found


def _released(
    folder: pathlib.Path, handle: handles.Handle
) -> Iterator[handles.Handle]:
    try:
        names = os.listdir(folder)
    except (FileNotFoundError, NotADirectoryError):
        return
    for name in names:
        if name.isdigit() and os.path.isfile(
            folder / name / handles.ENTRY_FILE
        ):
            try:
                yield handles.Handle.parse(f"{handle.at(None).path}/{name}")
            except errors.HandleError:
                continue
