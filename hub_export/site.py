"""A copy of a repository for hosts that serve plain files.

A bucket or a plain web server follows no links, and need not hold a version's
archive twice: a site has real files only, `N.tar.gz` but no `N/model.tar.gz`,
and no names that begin with a dot.
"""

import contextlib
import dataclasses
import fcntl
import hashlib
import os
import pathlib
from collections.abc import Callable, Iterator

from bit_tf import errors, files, handles
from hub_export import entry, tree
from hub_export import repository as repositories

__all__ = ["Result", "site"]

_CHUNK = 2**20


@dataclasses.dataclass(frozen=True)
class Result:
    """What was done to a site.

    Attributes:
      copied: versions that it did not have.
      kept: versions that it had.
      others: versions that it has and the repository has not; left alone.
    """

    copied: tuple[handles.Handle, ...]
    kept: tuple[handles.Handle, ...]
    others: tuple[handles.Handle, ...]


def site(
    repository: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    url: str | None = None,
    say: Callable[[str], object] | None = None,
) -> Result:
    """Copies a repository into a directory for static hosts.

    Versions that are there already are kept. Missing ones are copied, each
    file compared with its hash on the way, and appear by a rename; the pages
    follow, and index.json is the last. What is stopped half-way is finished
    by the next run.

    Args:
      repository: the directory that `publish` wrote.
      out: a new or empty directory, or one that this function made.
      url: the public address of its root; the default is the repository's.
      say: is called with a line of text for every version that is copied.

    Returns:
      Which versions were copied, kept, or found beside them.

    Raises:
      ExportError: `repository` is none, or damaged; `out` holds something
        else, or another version under the same handle; or files cannot be
        written.
    """
    root = pathlib.Path(os.path.realpath(repository))
    target = pathlib.Path(os.path.realpath(out))
    if not tree.is_repository(root):
        raise errors.ExportError(
            f"A site is a copy of a repository, which has {handles.INDEX_FILE}."
            f" Received: {os.fspath(repository)!r}, which has none. Publish a "
            "model there first: hub-export publish"
        )
    _require_place(root, target)
    index = repositories.index(root)
    url = index.url if url is None else repositories.checked_url(url)
    found = repositories.entries(root)
    empty = repositories.derived([], url, index.title)[handles.INDEX_FILE]
    with repositories.writing(target), contextlib.ExitStack() as stack:
        repositories.make_folder(target)
        stack.enter_context(_exclusive(target))
        _require_place(root, target)
        there = {one.handle: one for one in repositories.entries(target)}
        _require_same(found, there, target)
        if not tree.is_repository(target):
            # Tells a copy that was stopped from a directory of something else.
            repositories.replace_file(target / handles.INDEX_FILE, empty)
        for one in found:
            if not _holds(target, there, one):
                if say is not None:
                    say(f"Copying {one.handle} …")
                _copy(root, target, one)
        ours = {one.handle for one in found}
        others = [one for one in there.values() if one.handle not in ours]
        content = repositories.derived([*found, *others], url, index.title)
        repositories.remove_left_overs(
            {(target / path).parent for path in content}
        )
        for path, data in content.items():
            repositories.replace_file(target / path, data)
    return Result(
        tuple(one for one in sorted(ours) if one not in there),
        tuple(one for one in sorted(ours) if one in there),
        tuple(sorted(one.handle for one in others)),
    )


@contextlib.contextmanager
def _exclusive(target: pathlib.Path) -> Iterator[None]:
    """Has other copies into the same directory wait, without a file there."""
    descriptor = os.open(target, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _require_place(root: pathlib.Path, target: pathlib.Path) -> None:
    """Refuses a directory that has something else in it."""
    if root == target or root in target.parents or target in root.parents:
        raise errors.ExportError(
            "A site lies outside of the repository that it is a copy of. "
            f"Received: {str(target)!r} and {str(root)!r}. Name another "
            "directory."
        )
    names = []
    with repositories.writing(target), contextlib.suppress(FileNotFoundError):
        names = sorted(
            name
            for name in os.listdir(target)
            if not repositories.is_left_over(name)
        )
    if not names:
        return
    hidden = [name for name in names if name.startswith(".")]
    if hidden or not tree.is_repository(target):
        raise errors.ExportError(
            "A site is written to a new or empty directory, or to an earlier "
            f"site, which has {handles.INDEX_FILE} and no names that begin "
            f"with a dot. Received: {str(target)!r}, which has "
            f"{', '.join((hidden or names)[:5])}. Name another directory."
        )
    repositories.index(target)


def _require_same(
    found: list[entry.Entry],
    there: dict[handles.Handle, entry.Entry],
    target: pathlib.Path,
) -> None:
    for one in found:
        other = there.get(one.handle, one)
        if other != one:
            raise errors.ExportError(
                "A version is immutable once it is published. Received: "
                f"{one.handle} of {one.published} with the SHA-256 "
                f"{one.archive.sha256}, while {str(target)!r} has that of "
                f"{other.published} with {other.archive.sha256}. Publish it "
                "as another version, or name another directory."
            )


def _holds(
    target: pathlib.Path,
    there: dict[handles.Handle, entry.Entry],
    one: entry.Entry,
) -> bool:
    try:
        size = tree.archive(target, one.handle).stat().st_size
    except FileNotFoundError:
        return False
    return one.handle in there and size == one.archive.size


def _copy(root: pathlib.Path, target: pathlib.Path, one: entry.Entry) -> None:
    """Copies a version: its archive, then its folder, each by a rename."""
    source = tree.directory(root, one.handle)
    folder = tree.directory(target, one.handle)
    repositories.make_folder(folder.parent)
    repositories.remove_left_overs([folder.parent])
    with files.new_file(tree.archive(target, one.handle)) as sink:
        os.fchmod(sink.fileno(), 0o644)
        _copy_file(source / tree.ARCHIVE_FILE, sink, one.archive)
    if folder.exists():
        return
    with files.new_directory(folder) as staging:
        os.chmod(staging, 0o755)
        rows: list[tuple[str, handles.File | None]] = [
            (f"{handles.MODEL_FOLDER}/{file.path}", file) for file in one.files
        ]
        rows += [
            (name, None)
            for name in (tree.PAGE_FILE, tree.CARD_FILE, handles.ENTRY_FILE)
        ]
        for path, file in rows:
            copy = pathlib.Path(staging, path)
            repositories.make_folder(copy.parent)
            with open(copy, "xb") as sink:
                os.fchmod(sink.fileno(), 0o644)
                _copy_file(source / path, sink, file)


def _copy_file(
    source: pathlib.Path, sink, expected: handles.File | None
) -> None:
    """Copies a file, and compares it with what its version's entry says."""
    digest, size = hashlib.sha256(), 0
    with open(source, "rb") as file:
        while chunk := file.read(_CHUNK):
            sink.write(chunk)
            digest.update(chunk)
            size += len(chunk)
    if expected is not None and (size, digest.hexdigest()) != (
        expected.size,
        expected.sha256,
    ):
        raise errors.ExportError(
            "The files of a version stay as they were published. Received: "
            f"{str(source)!r} of {size} bytes with the SHA-256 "
            f"{digest.hexdigest()}, which had {expected.size} bytes and "
            f"{expected.sha256}. Restore it from a copy of the repository."
        )
