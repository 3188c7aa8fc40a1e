"""The write side of a repository of models; `tree` is the read side.

A publisher claims a model, fills a folder in .staging/, and commits it: the
folder becomes the version by one rename. What lies outside of such folders is
derived from their entries, and `refresh` makes it anew. The system releases
the locks of a publisher that dies, and the next one goes on from there.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import pathlib
import re
import secrets
import shutil
import urllib.parse
from collections.abc import Iterable, Iterator
from typing import Any

from bit_tf import errors, files, handles
from hub_export import entry, tree

__all__ = [
    "DEFAULT_TITLE",
    "Index",
    "checked_url",
    "awaits_version",
    "claim",
    "commit",
    "derived",
    "entries",
    "free_version",
    "index",
    "is_left_over",
    "is_unfinished",
    "make_folder",
    "one_line",
    "refresh",
    "remove_left_overs",
    "replace_file",
    "require_root",
    "same_file",
    "write_empty_index",
    "writing",
]

DEFAULT_TITLE = "Models"
_LOCKS = ".locks"
_STAGING = ".staging"
_MAX_TITLE = 200
# Of a file's name, which may have 255 bytes.
_MAX_NAME = 150
# What bit_tf.files writes before it is renamed.
_LEFT_OVER = re.compile(r"\..+\.[0-9a-f]{16}\.tmp")


@dataclasses.dataclass(frozen=True)
class Index:
    """What index.json says of the whole repository.

    Attributes:
      title: of its front page.
      url: the public address of its root, without a final slash, or None.
      entries: of all versions, as JSON's objects.
    """

    title: str = DEFAULT_TITLE
    url: str | None = None
    entries: tuple[Any, ...] = ()


def require_root(root: str | os.PathLike[str]) -> None:
    """Refuses a directory that has something else in it.

    Raises:
      ExportError: it is neither new, nor empty but for names that begin with
        a dot, nor a repository.
    """
    with writing(root):
        try:
            names = set(os.listdir(root))
        except FileNotFoundError:
            return
    others = sorted(name for name in names if not name.startswith("."))
    if others and handles.INDEX_FILE not in names and _LOCKS not in names:
        raise errors.ExportError(
            "A repository is a directory of its own, new or empty at first. "
            f"Received: {os.fspath(root)!r}, which has no {handles.INDEX_FILE} "
            f"but {', '.join(others[:5])}. Name another directory."
        )


def is_unfinished(root: str | os.PathLike[str]) -> bool:
    """Whether it is a repository whose index.json was never written."""
    return os.path.isdir(os.path.join(root, _LOCKS)) and not tree.is_repository(
        root
    )


@contextlib.contextmanager
def writing(
    root: str | os.PathLike[str],
    what: str = "A repository is a directory with room that can be read and "
    "written",
    remedy: str = "What had been published is still there; check the free "
    "space and the permissions, and publish again",
) -> Iterator[None]:
    """Turns what the system says into an error with a remedy.

    Args:
      root: what is written.
      what: the rule, without its full stop.
      remedy: likewise.

    Raises:
      ExportError: an OSError came out of the block.
    """
    try:
        yield
    except errors.BitTfError:
        raise
    except (OSError, NotImplementedError) as error:
        raise errors.ExportError(
            f"{what}. Received: {os.fspath(root)!r}: {error}. {remedy}."
        ) from error


@contextlib.contextmanager
def claim(
    root: str | os.PathLike[str], handle: handles.Handle
) -> Iterator[pathlib.Path]:
    """Keeps other publishers of the same model waiting.

    The repository is made if there is none. What publishers of this model
    that died have left is removed.

    Args:
      root: of the repository.
      handle: of the model; its version does not matter.

    Yields:
      An empty folder on the repository's file system, to stage a version in;
      it is removed afterwards unless it was committed.

    Raises:
      ExportError: `root` holds something else or cannot be written, or the
        name cannot be a new one (see `free_version`).
    """
    root = pathlib.Path(os.path.abspath(root))
    require_root(root)
    model = handle.at(None)
    name = _quoted(model)
    staging = root / _STAGING / f"{name}.{secrets.token_hex(8)}"
    with contextlib.ExitStack() as stack:
        with writing(root):
            make_folder(root)
            for private in (_LOCKS, _STAGING):
                (root / private).mkdir(mode=0o700, exist_ok=True)
            stack.enter_context(
                files.locked(
                    root / _LOCKS / f"{name}.lock", f"publishes {model}"
                )
            )
            _require_name(root, model)
            for old in (root / _STAGING).iterdir():
                if re.fullmatch(re.escape(name) + r"\.[0-9a-f]{16}", old.name):
                    shutil.rmtree(old)
            staging.mkdir(mode=0o755)
        stack.callback(shutil.rmtree, staging, ignore_errors=True)
        yield staging


def free_version(
    root: str | os.PathLike[str], handle: handles.Handle
) -> handles.Handle:
    """The version that a publisher may take.

    Args:
      root: of the repository, which may not exist yet.
      handle: without a version for the one after the newest; with any number
        that is not there for that one.

    Raises:
      ExportError: the version is there, something else is in its place, or a
        name differs from another one only in the case of its letters.
    """
    _require_name(root, handle)
    there = tree.versions(root, handle)
    after = there[-1] + 1 if there else 1
    if handle.version is None:
        try:
            handle = handles.Handle.parse(handle.at(after).path)
        except errors.HandleError as error:
            raise errors.ExportError(
                f"A version is a number of up to nine digits. Received: "
                f"{after}, the one after the newest of {handle}. Give a lower "
                "one that is free."
            ) from error
    if handle.version in there:
        raise errors.ExportError(
            f"A version is immutable once it is published. Received: {handle}, "
            f"which is in {os.fspath(root)!r} already. Publish it as version "
            f"{after}, or leave the version out for the next one."
        )
    link = tree.archive(root, handle)
    in_way = [tree.directory(root, handle)] + (
        [] if awaits_version(link) else [link]
    )
    for path in filter(os.path.lexists, in_way):
        raise errors.ExportError(
            "A version takes a place where nothing is. Received: "
            f"{str(path)!r}, which is no published version. Look at it, and "
            "move or remove it."
        )
    return handle


def commit(
    root: str | os.PathLike[str],
    handle: handles.Handle,
    staging: pathlib.Path,
    *,
    url: str | None = None,
    title: str | None = None,
) -> None:
    """Makes a staged folder a version, at one instant, and refreshes the rest.

    Args:
      root: of the repository.
      handle: with its version, from `free_version`.
      staging: from `claim`, with all that belongs into a version's folder.
      url, title: as in `refresh`.

    Raises:
      ExportError: the version's place was taken, or the files could not be
        written; the message says if the version is there all the same.
    """
    root = pathlib.Path(os.path.abspath(root))
    with writing(root):
        _open_up(staging)
        files.sync_tree(staging)
        files.sync(staging.parent)
    with _exclusive(root):
        free_version(root, handle)
        folder = tree.directory(root, handle)
        with writing(root):
            make_folder(folder.parent)
            link = tree.archive(root, handle)
            # First, so that a version's folder and archive appear at once.
            if not os.path.lexists(link):
                os.symlink(_target(handle), link)
                files.sync(folder.parent)
            os.rename(staging, folder)
            files.sync(folder.parent)
        try:
            _refresh(root, url, title)
        except errors.BitTfError as error:
            raise errors.ExportError(
                f"{handle} is published, but not in {handles.INDEX_FILE} and "
                f"the pages of the repository yet: {error} They are brought "
                "up to date by the next publication."
            ) from error


def refresh(
    root: str | os.PathLike[str],
    *,
    url: str | None = None,
    title: str | None = None,
) -> list[entry.Entry]:
    """Derives again what lies outside of the versions' folders.

    Args:
      root: of the repository.
      url: the public address of its root; None keeps what index.json says.
      title: of its front page; likewise.

    Returns:
      The entries of all versions, in the order of their handles.

    Raises:
      ExportError: an entry or index.json is damaged, in which case nothing is
        changed; or a file cannot be written.
    """
    root = pathlib.Path(os.path.abspath(root))
    require_root(root)
    with writing(root):
        make_folder(root)
        (root / _LOCKS).mkdir(mode=0o700, exist_ok=True)
    with _exclusive(root):
        return _refresh(root, url, title)


def entries(root: str | os.PathLike[str]) -> list[entry.Entry]:
    """The entries of all versions, in the order of their handles.

    Raises:
      ExportError: one of them is damaged; the message names it.
    """
    found = []
    for handle in tree.released(root):
        try:
            found.append(tree.read(root, handle))
        except (errors.HandleError, OSError) as error:
            path = tree.directory(root, handle) / handles.ENTRY_FILE
            raise errors.ExportError(
                f"Every version of a repository has an entry that can be read. "
                f"Received: {str(path)!r}: {error} Restore it from a copy of "
                "the repository, or move the folder away."
            ) from error
    return found


def index(root: str | os.PathLike[str]) -> Index:
    """What index.json says; the defaults where there is none.

    Raises:
      ExportError: it is damaged, or of a later schema.
    """
    path = pathlib.Path(root) / handles.INDEX_FILE
    try:
        found = json.loads(path.read_bytes())
        if found["schema"] != handles.SCHEMA:
            raise ValueError(f"schema {found['schema']!r}")
        url = found["url"]
        return Index(
            one_line("A title", found["title"]),
            None if url is None else checked_url(url),
            tuple(found["entries"]),
        )
    except FileNotFoundError:
        return Index()
    except (
        LookupError,
        OSError,
        RecursionError,
        TypeError,
        ValueError,
        errors.ExportError,
    ) as error:
        raise errors.ExportError(
            f"A repository's {handles.INDEX_FILE} is a JSON object of schema "
            f"{handles.SCHEMA} with title, url and entries. Received: "
            f"{str(path)!r} ({type(error).__name__}: {error}). Update bit-tf; "
            "or if it is damaged delete it, and it is made anew from the "
            "versions' entries, with the title and the address that are given "
            "then."
        ) from error


def derived(
    found: Iterable[entry.Entry], url: str | None, title: str
) -> dict[str, bytes]:
    """All files of a repository outside of its versions' folders.

    Args:
      found: the entries of all versions.
      url: the public address of its root, without a final slash, or None.
      title: of its front page.

    Returns:
      Path below the root → content; index.json is the last one.
    """
    from hub_export import pages

    found = sorted(found, key=lambda one: one.handle)
    content = dict(pages.repository_files(found, url, title))
    for one in found:
        # The newest of a model comes last, and stays.
        path = f"{one.handle.at(None)}/{handles.ENTRY_FILE}"
        content[path] = one.to_json().encode()
    rows = [one.to_dict() for one in found]
    whole = {
        "schema": handles.SCHEMA,
        "title": title,
        "url": url,
        "entries": rows,
    }
    text = json.dumps(whole, indent=2, sort_keys=True, ensure_ascii=False)
    content[handles.INDEX_FILE] = f"{text}\n".encode()
    return content


def checked_url(url: str) -> str:
    """The public address of a repository's root, without a final slash.

    Raises:
      ExportError: it is no such address.
    """
    try:
        parts = urllib.parse.urlsplit(url)
        right = (
            parts.scheme in ("http", "https")
            and parts.hostname
            and parts.username is None
            and parts.port != 0
            and not re.search(r"[\s?#\\<>\"'`]", url)
            and url.isascii()
            and url.isprintable()
        )
    except (AttributeError, TypeError, ValueError):
        right = False
    if not right:
        raise errors.ExportError(
            "The address of a repository is of the form "
            "https://host[:port]/path, without user, spaces, quotes, '?' and "
            f"'#'. Received: {errors.brief(url)}."
        )
    return url.rstrip("/")


def one_line(what: str, text: str, longest: int = _MAX_TITLE) -> str:
    """A text without space around it.

    Args:
      what: it is, for messages.
      text: to be checked.
      longest: characters that it may have.

    Raises:
      ExportError: it is not one line of text, or longer.
    """
    if (
        not isinstance(text, str)
        or not text.isprintable()
        or not 0 < len(text.strip()) <= longest
    ):
        raise errors.ExportError(
            f"{what} is one line of 1 to {longest} characters. "
            f"Received: {errors.brief(text)}."
        )
    return text.strip()


def make_folder(path: pathlib.Path) -> None:
    """Makes a folder that everybody can read, with its parents.

    Raises:
      OSError: it cannot be made.
    """
    missing = []
    while not path.is_dir():
        missing.append(path)
        path = path.parent
    for folder in reversed(missing):
        folder.mkdir(exist_ok=True)
        folder.chmod(0o755)
        files.sync(folder.parent)


def replace_file(path: pathlib.Path, content: bytes) -> bool:
    """Writes a file that everybody can read, if it is not the same already.

    Returns:
      Whether it was written.

    Raises:
      OSError: it cannot be written.
    """
    if same_file(path, content):
        return False
    make_folder(path.parent)
    with files.new_file(path) as file:
        os.fchmod(file.fileno(), 0o644)
        file.write(content)
    return True


def write_empty_index(root: pathlib.Path, url: str | None, title: str) -> None:
    """Keeps the address and the title until there are versions to list.

    It also tells what was stopped from a directory of something else.

    Raises:
      OSError: it cannot be written.
    """
    content = derived([], url, title)[handles.INDEX_FILE]
    replace_file(root / handles.INDEX_FILE, content)


def is_left_over(name: str) -> bool:
    """Whether it is the name of a file that was not put in its place."""
    return _LEFT_OVER.fullmatch(name) is not None


def remove_left_overs(folders: Iterable[pathlib.Path]) -> None:
    """Removes what writers that died have left in folders.

    No other process may write there.

    Raises:
      OSError: it cannot be removed.
    """
    for folder in folders:
        for old in list(folder.glob(".*.tmp")):
            if is_left_over(old.name):
                shutil.rmtree(old) if old.is_dir() else old.unlink()


def same_file(path: pathlib.Path, content: bytes) -> bool:
    """Whether a file is there and has this content."""
    try:
        return path.stat().st_size == len(content) and (
            path.read_bytes() == content
        )
    except (FileNotFoundError, NotADirectoryError):
        return False


def _refresh(
    root: pathlib.Path, url: str | None, title: str | None
) -> list[entry.Entry]:
    before = index(root)
    url = before.url if url is None else checked_url(url)
    title = before.title if title is None else one_line("A title", title)
    found = entries(root)
    content = derived(found, url, title)
    with writing(root):
        if not tree.is_repository(root):
            write_empty_index(root, url, title)
        _remove_rest(root, before, found, content)
        for path, data in content.items():
            replace_file(root / path, data)
    return found


def _remove_rest(
    root: pathlib.Path,
    before: Index,
    found: Iterable[entry.Entry],
    content: Iterable[str],
) -> None:
    """Removes what was derived from versions that are gone, or left half."""
    there = {one.handle for one in found}
    once = []
    for row in before.entries:
        with contextlib.suppress(errors.HandleError):
            once.append(entry.Entry.from_dict(row))
    gone = [one.handle for one in once if one.handle not in there]
    if gone:
        once_derived = derived(once, before.url, before.title)
        for path in sorted(set(once_derived) - set(content)):
            (root / path).unlink(missing_ok=True)
            _prune(root, (root / path).parent)
    for handle in gone:
        if awaits_version(tree.archive(root, handle)):
            tree.archive(root, handle).unlink()
        _prune(root, tree.directory(root, handle.at(None)))
    remove_left_overs({(root / path).parent for path in content})


def _prune(root: pathlib.Path, folder: pathlib.Path) -> None:
    """Removes a folder, and those around it, as far as they are empty."""
    with contextlib.suppress(OSError):
        while folder != root:
            folder.rmdir()
            folder = folder.parent


@contextlib.contextmanager
def _exclusive(root: pathlib.Path) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        with writing(root):
            # No model has this name: its own has a "%2F".
            lock = root / _LOCKS / "repository.lock"
            stack.enter_context(
                files.locked(lock, f"writes {handles.INDEX_FILE} of {root}")
            )
        yield


def _quoted(model: handles.Handle) -> str:
    """The name of a model's lock and staging folders.

    Names that differ in the case of letters share it, as they share a folder
    on some file systems.
    """
    name = urllib.parse.quote(model.path.lower(), safe="")
    if len(name) > _MAX_NAME:
        digest = hashlib.sha256(name.encode()).hexdigest()[:16]
        name = f"{name[:_MAX_NAME]}-{digest}"
    return name


def _require_name(root: str | os.PathLike[str], handle: handles.Handle) -> None:
    """Refuses names that some file systems would take for another one."""
    folder = pathlib.Path(root)
    for part in handle.at(None).path.split("/"):
        try:
            names = os.listdir(folder)
        except FileNotFoundError:
            return
        except OSError as error:
            raise errors.ExportError(
                f"A model's folder can be read. Received: {error}."
            ) from error
        for name in names:
            if name != part and name.lower() == part.lower():
                raise errors.ExportError(
                    "Names in a repository differ in more than the case of "
                    "letters, which some file systems do not keep apart. "
                    f"Received: {handle.at(None)}, where there is "
                    f"{str(folder / name)!r}. Spell it likewise, or choose "
                    "another name."
                )
        folder = folder / part
        if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
            raise errors.ExportError(
                "A model's folder is a directory in the repository itself. "
                f"Received: {str(folder)!r}, which is a link or a file. Choose "
                "another name, or remove it."
            )


def _target(handle: handles.Handle) -> str:
    """What a version's public archive is a link to."""
    return f"{handle.version}/{tree.ARCHIVE_FILE}"


def awaits_version(link: pathlib.Path) -> bool:
    """Whether an archive's link is in place, and its version is not.

    So a publisher leaves it that stops between the two.
    """
    version = link.name.removesuffix(handles.ARCHIVE_SUFFIX)
    return (
        link.is_symlink()
        and os.readlink(link) == f"{version}/{tree.ARCHIVE_FILE}"
        and not link.exists()
    )


def _open_up(staging: pathlib.Path) -> None:
    """Lets everybody read a folder, whatever the umask is."""
    for folder, _, names in os.walk(staging):
        os.chmod(folder, 0o755)
        for name in names:
            os.chmod(os.path.join(folder, name), 0o644)
