"""A copy of a repository for hosts that serve plain files.

A bucket or a plain web server follows no links, and need not hold a version's
archive twice: a site has real files only, `N.tar.gz` but no `N/model.tar.gz`,
and no names that begin with a dot.
"""

import contextlib
import dataclasses
import errno
import fcntl
import hashlib
import os
import pathlib
import stat
from collections.abc import Callable, Iterator
from typing import BinaryIO

from bit_tf import errors, files, handles
from hub_export import entry, tree
from hub_export import repository as repositories

__all__ = ["Result", "site"]

_CHUNK = 2**20
_WRITING = (
    "A site is a directory with room that can be read and written",
    "What had been copied is still there; check the free space and the "
    "permissions, and run it again",
)


@dataclasses.dataclass(frozen=True)
class Result:
    """What was done to a site.

    Attributes:
      copied: versions that it did not have.
      kept: versions that it had.
      repaired: versions that it had, but not whole, and that were copied
        again.
      others: versions that it has and the repository has not; left alone.
    """

    copied: tuple[handles.Handle, ...]
    kept: tuple[handles.Handle, ...]
    repaired: tuple[handles.Handle, ...]
    others: tuple[handles.Handle, ...]


def site(
    repository: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    url: str | None = None,
    say: Callable[[str], object] | None = None,
) -> Result:
    """Copies a repository into a directory for static hosts.

    Versions that are there already are kept if the names and the sizes of
    their files are right; hashes are for `verify`. Others are copied, each
    file compared with its hash on the way, and appear by a rename; the pages
    follow, and index.json is the last. What is stopped half-way is finished
    by the next run.

    Args:
      repository: the directory that `publish` wrote.
      out: a new or empty directory, or one that this function made.
      url: the public address of its root; the default is the repository's.
      say: is called with a line of text for every version that is copied.

    Returns:
      Which versions were copied, kept, repaired, or found beside them.

    Raises:
      ExportError: `repository` is none, or damaged, or a link is in the place
        of a version's file; `out` holds something else, a name that begins
        with a dot, or another version under the same handle; or files cannot
        be written.
    """
    root = pathlib.Path(os.path.realpath(repository))
    target = pathlib.Path(os.path.realpath(out))
    if repositories.is_unfinished(root):
        raise errors.ExportError(
            "A site is a copy of a repository, which has "
            f"{handles.INDEX_FILE}. Received: {os.fspath(repository)!r}, in "
            "which the first publication was not finished. Publish again, as "
            "before."
        )
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
    repaired = []
    with _writing(target), contextlib.ExitStack() as stack:
        repositories.make_folder(target)
        stack.enter_context(_exclusive(target))
        _require_place(root, target)
        there = {one.handle: one for one in repositories.entries(target)}
        _require_same(found, there, target)
        if not tree.is_repository(target):
            repositories.write_empty_index(target, url, index.title)
        for one in found:
            wrong = _difference(root, target, one)
            if wrong is None:
                continue
            again = ""
            if os.path.lexists(tree.directory(target, one.handle)):
                repaired.append(one.handle)
                again = f" again, of which {wrong}"
            if say is not None:
                say(f"Copying {one.handle}{again} …")
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
        tuple(sorted(ours - there.keys() - set(repaired))),
        tuple(
            one for one in sorted(ours) if one in there and one not in repaired
        ),
        tuple(sorted(repaired)),
        tuple(sorted(one.handle for one in others)),
    )


def _writing(target: pathlib.Path) -> contextlib.AbstractContextManager[None]:
    return repositories.writing(target, *_WRITING)


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
    names, hidden = [], []
    with _writing(target), contextlib.suppress(FileNotFoundError):
        names = sorted(
            name
            for name in os.listdir(target)
            if not repositories.is_left_over(name)
        )
        if tree.is_repository(target):
            hidden = sorted(_hidden(target))
    if not names:
        return
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


def _hidden(target: pathlib.Path) -> Iterator[str]:
    """Paths whose last name begins with a dot, at any depth."""
    for folder, names, others in os.walk(target):
        names[:] = [one for one in names if not repositories.is_left_over(one)]
        for name in [*names, *others]:
            if name.startswith(".") and not repositories.is_left_over(name):
                yield os.path.relpath(os.path.join(folder, name), target)


def _content(one: entry.Entry) -> dict[str, handles.File]:
    """Path in a version's folder → what is there, but for its entry.

    Raises:
      ExportError: its entry has no hashes of its page and card, or a site
        cannot have its files.
    """
    if {file.path for file in one.pages} != {tree.PAGE_FILE, tree.CARD_FILE}:
        raise errors.ExportError(
            "A version's entry has the hashes of its page and of its card. "
            f"Received: {one.handle}, with those of "
            f"{sorted(file.path for file in one.pages)}. Publish it anew, as "
            "another version."
        )
    found = {f"{handles.MODEL_FOLDER}/{file.path}": file for file in one.files}
    for path in found:
        if any(name.startswith(".") for name in path.split("/")):
            raise errors.ExportError(
                "A site has no names that begin with a dot, which hosts do "
                f"not send. Received: {path!r} of {one.handle}. Publish it "
                "anew without, as another version."
            )
    return found | {file.path: file for file in one.pages}


def _difference(
    root: pathlib.Path, target: pathlib.Path, one: entry.Entry
) -> str | None:
    """What is wrong with the names and the sizes of a version, or None."""
    archive = tree.archive(target, one.handle)
    folder = tree.directory(target, one.handle)
    sizes = {path: file.size for path, file in _content(one).items()}
    source = tree.directory(root, one.handle) / handles.ENTRY_FILE
    sizes[handles.ENTRY_FILE] = source.lstat().st_size
    parts = {parent.as_posix() for path in sizes for parent in _parents(path)}
    paths = {
        found.relative_to(folder).as_posix(): found
        for found in folder.rglob("*")
    }
    for name in sorted(paths.keys() - sizes.keys() - parts):
        return f"{name} is no part"
    rows = [(archive.name, archive, one.archive.size)]
    rows += [(name, folder / name, size) for name, size in sizes.items()]
    for name, path, size in rows:
        try:
            found = path.lstat()
        except (FileNotFoundError, NotADirectoryError):
            return f"{name} was missing"
        if not stat.S_ISREG(found.st_mode):
            return f"{name} was no regular file"
        if found.st_size != size:
            return f"{name} had {found.st_size} bytes instead of {size}"
    for name in sorted(parts):
        if (folder / name).is_symlink():
            return f"{name} was a link"
    return None


def _parents(path: str) -> tuple[pathlib.PurePosixPath, ...]:
    """The folders around a path, from itself up; the outermost is "."."""
    return tuple(pathlib.PurePosixPath(path).parents)


def _copy(root: pathlib.Path, target: pathlib.Path, one: entry.Entry) -> None:
    """Copies a version: its archive, then its folder, each by a rename."""
    handle = one.handle
    folder = tree.directory(target, handle)
    repositories.make_folder(folder.parent)
    repositories.remove_left_overs([folder.parent])
    archive = tree.archive(target, handle)
    if archive.is_dir() and not archive.is_symlink():
        raise errors.ExportError(
            "A version's archive takes a place where nothing is, or a file. "
            f"Received: {str(archive)!r}, a directory. Move or remove it."
        )
    with files.new_file(archive) as sink:
        os.fchmod(sink.fileno(), 0o644)
        _copy_file(root, f"{handle}/{tree.ARCHIVE_FILE}", sink, one.archive)
    with files.new_directory(folder, overwrite=True) as staging:
        os.chmod(staging, 0o755)
        rows: dict[str, handles.File | None] = dict(_content(one))
        rows[handles.ENTRY_FILE] = None
        for path, file in rows.items():
            copy = pathlib.Path(staging, path)
            repositories.make_folder(copy.parent)
            with open(copy, "xb") as sink:
                os.fchmod(sink.fileno(), 0o644)
                _copy_file(root, f"{handle}/{path}", sink, file)


def _copy_file(
    root: pathlib.Path, path: str, sink, expected: handles.File | None
) -> None:
    """Copies a file, and compares it with what its version's entry says.

    Args:
      root: of the repository.
      path: below it; no part of it may be a link.
      sink: the copy, open.
      expected: its size and hash, where they are known.
    """
    digest, size = hashlib.sha256(), 0
    with _opened(root, path) as file:
        while chunk := file.read(_CHUNK):
            sink.write(chunk)
            digest.update(chunk)
            size += len(chunk)
            if expected is not None and size > expected.size:
                break
    if expected is not None and (size, digest.hexdigest()) != (
        expected.size,
        expected.sha256,
    ):
        received = (
            f"more than {expected.size} bytes"
            if size > expected.size
            else f"{size} bytes with the SHA-256 {digest.hexdigest()}"
        )
        raise errors.ExportError(
            "The files of a version stay as they were published. Received: "
            f"{str(root / path)!r} of {received}, which had {expected.size} "
            f"bytes and {expected.sha256}. Restore it from a copy of the "
            "repository."
        )


def _opened(root: pathlib.Path, path: str) -> BinaryIO:
    """Opens a regular file of the repository; follows no link below it.

    Raises:
      ExportError: it is something else, or not there.
    """
    whole = root / path
    folders = [root.joinpath(one) for one in _parents(path)[:-1]]
    if any(folder.is_symlink() for folder in folders):
        kind = "behind a link"
    else:
        try:
            # Else to open a pipe waits for who writes into it.
            flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK
            descriptor = os.open(whole, flags)
        except FileNotFoundError:
            kind = "not there"
        except OSError as error:
            if error.errno != errno.ELOOP:
                raise
            kind = "a link"
        else:
            if stat.S_ISREG(os.fstat(descriptor).st_mode):
                return open(descriptor, "rb")
            os.close(descriptor)
            kind = "no regular file"
    raise errors.ExportError(
        "The files of a version are regular files in its own folder. "
        f"Received: {str(whole)!r}, which is {kind}. Restore it from a copy of "
        "the repository."
    )
