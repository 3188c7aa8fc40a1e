"""Paths of pictures: folders with all below them, globs, braces."""

import errno
import fnmatch
import os
import re
import stat
from collections.abc import Iterator

from absl import logging

from bit_tf import errors
from bit_tf.errors import DatasetError
from bit_tf.picture_files import SUFFIXES, as_text

__all__ = [
    "check",
    "expand",
    "guess",
    "is_pattern",
    "is_picture",
    "matches",
    "require_file",
    "walk",
]

_MAGIC = re.compile(r"[*?\[]")
_BRACES = re.compile(r"\{([^{}]*(?:,|\.\.)[^{}]*)\}")
_RANGE = re.compile(r"([0-9]{1,18})\.\.([0-9]{1,18})")
_MOST = 1_000_000


def is_picture(name: str) -> bool:
    """Whether a file's name is visible and has a picture's suffix."""
    base = name.rpartition("/")[2]
    return (
        not base.startswith(".")
        and os.path.splitext(base)[1].lower() in SUFFIXES
    )


def require_file(path: str) -> None:
    """Refuses what would be waited for, such as a named pipe.

    Raises:
      OSError: it is no regular file, or not there.
    """
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise OSError(errno.EINVAL, "not a regular file", path)


def is_pattern(path: str) -> bool:
    """Whether a path has wildcards or braces."""
    return bool(_MAGIC.search(path) or _BRACES.search(path))


def guess(path: str) -> str:
    """What somebody may have meant by a path that is not there."""
    folder, name = os.path.split(path.rstrip("/"))
    try:
        near = errors.near(os.listdir(folder or "."), name)
    except (OSError, ValueError):
        return "Check the path."
    names = " or ".join(repr(as_text(os.path.join(folder, n))) for n in near)
    return f"Did you mean {names}?" if near else "Check the path."


def walk(folder: str) -> Iterator[str]:
    """Paths of the picture files in a folder and below, in order.

    Links are followed, but no folder is entered twice. A folder that cannot
    be read comes as a path itself. A log line says how many files were passed
    over.

    Args:
      folder: the root, as paths shall begin.

    Raises:
      DatasetError: the root cannot be read.
    """
    entered: set[tuple[int, int]] = set()
    passed = 0
    example = ""
    levels = [iter([folder])]
    while levels:
        path = next(levels[-1], None)
        if path is None:
            levels.pop()
        elif not path.endswith("/") and path != folder:
            yield path
        else:
            try:
                facts = os.stat(path)
                if (facts.st_dev, facts.st_ino) in entered:
                    continue
                entered.add((facts.st_dev, facts.st_ino))
                found, over, last = _entries(path)
            except OSError as error:
                if path == folder:
                    raise DatasetError(
                        "A folder of pictures can be read. Received: "
                        f"{as_text(folder)!r} ({error.strerror}). Check its "
                        "permissions."
                    ) from error
                logging.warning(
                    "%s cannot be read: %s", as_text(path), error.strerror
                )
                yield path
                continue
            passed += over
            example = example or last
            levels.append(iter(found))
    if passed:
        logging.warning(
            "%d files below %s were passed over, which are hidden or no "
            "pictures by their suffix, such as %s",
            passed,
            as_text(folder),
            as_text(example),
        )


def _entries(folder: str) -> tuple[list[str], int, str]:
    """Sorted paths, folders with a slash at the end; how many were not taken.

    A link that leads nowhere is a picture if its suffix says so.
    """
    found = []
    passed = 0
    example = ""
    with os.scandir(folder) as entries:
        for entry in entries:
            path = os.path.join(folder, entry.name)
            if not entry.name.startswith(".") and _is_dir(entry):
                found.append(f"{path}/")
            elif is_picture(entry.name):
                found.append(path)
            else:
                passed += 1
                example = min(example or path, path)
    found.sort(key=lambda path: path.rstrip("/"))
    return found, passed, example


def _is_dir(entry: os.DirEntry) -> bool:
    try:
        return entry.is_dir()
    except OSError:
        return False


def expand(pattern: str) -> Iterator[str]:
    """The alternatives of {a,b} and {000..127}, in order.

    Numbers keep the digits of the first, as a shell does.

    Raises:
      DatasetError: a range that ends before it begins, or over a million.
    """
    found = _BRACES.search(pattern)
    if found is None:
        yield pattern
        return
    numbers = _RANGE.fullmatch(found[1])
    choices: Iterator[str]
    if numbers:
        first, last = int(numbers[1]), int(numbers[2])
        if not 0 <= last - first < _MOST:
            raise DatasetError(
                "A range is {first..last}, upwards, of up to a million. "
                f"Received: {errors.brief(pattern)}. Mend it."
            )
        width = len(numbers[1])
        choices = (f"{n:0{width}d}" for n in range(first, last + 1))
    else:
        choices = iter(found[1].split(","))
    for choice in choices:
        yield from expand(
            pattern[: found.start()] + choice + pattern[found.end() :]
        )


def check(pattern: str) -> None:
    """Refuses a pattern of which an alternative matches nothing.

    Raises:
      DatasetError: as said; the first such alternative is named.
    """
    for one in expand(pattern):
        if next(matches(one), None) is None:
            raise DatasetError(
                "A glob matches at least one path, and so does each of its "
                f"alternatives in braces. Received: {as_text(one)!r}, which "
                f"matches none. {guess(one)}"
            )


def matches(pattern: str) -> Iterator[str]:
    """Paths that match a glob, each folder's in order; ** is any folders.

    Hidden names match only where the pattern has the dot.
    """
    root = "/" if pattern.startswith("/") else ""
    parts = [part for part in pattern.split("/") if part]
    return _matches(root, parts)


def _matches(folder: str, parts: list[str]) -> Iterator[str]:
    if not parts:
        yield folder
        return
    part, rest = parts[0], parts[1:]
    if part == "**":
        for below in _folders(folder):
            yield from _matches(below, rest or ["*"])
    elif not _MAGIC.search(part):
        path = os.path.join(folder, part)
        if os.path.lexists(path):
            yield from _matches(path, rest)
    else:
        fits = re.compile(fnmatch.translate(part)).match
        for name in _names(folder):
            hidden = name.startswith(".") and not part.startswith(".")
            if fits(name) and not hidden:
                yield from _matches(os.path.join(folder, name), rest)


def _folders(folder: str) -> Iterator[str]:
    """A folder and all below it but for links and hidden ones, in order."""
    todo = [folder]
    while todo:
        one = todo.pop()
        yield one
        paths = [
            os.path.join(one, name)
            for name in _names(one)
            if not name.startswith(".")
        ]
        todo += [
            path
            for path in reversed(paths)
            if os.path.isdir(path) and not os.path.islink(path)
        ]


def _names(folder: str) -> list[str]:
    try:
        return sorted(os.listdir(folder or "."))
    except OSError:
        return []
