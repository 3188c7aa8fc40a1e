"""Whether a repository has what its versions' entries give, and nothing else.

What is inside of a version's folder is for `verification`.
"""

import contextlib
import filecmp
import json
import os
import pathlib
import stat
from collections.abc import Container, Iterable, Iterator

from bit_tf import errors, handles
from hub_export import entry, repository, tree
from hub_export.contradictions import mistyped
from hub_export.description import newest
from hub_export.report import Findings, Report

__all__ = ["CHECKS", "check", "checked", "kind", "packed_archive", "why_closed"]

CHECKS = (
    "index",
    "archives",
    "entries",
    "pages",
    "tree",
    "staging",
)
_INDEXED = (handles.INDEX_FILE, handles.ENTRY_FILE)


def check(root: pathlib.Path, released: list[handles.Handle]) -> Report:
    """Checks what a repository has beside its models.

    Args:
      root: of the repository.
      released: its versions, of which only the entries are read here.
    """
    findings = Findings(os.fspath(root), CHECKS)
    entries = _check_entries(findings, root, released)
    derived = _check_index(findings, root, entries)
    for handle in released:
        _check_public_archive(findings, root, handle)
    findings.note("archives", f"{len(released)} under their public names")
    left = sorted(path.name for path in root.glob(".staging/*"))
    if derived is None or len(entries) < len(released):
        findings.absent("not compared: what is to be there is unknown", "tree")
    else:
        left += _check_tree(findings, root, released, derived)
    if left:
        findings.note(
            "staging",
            f"{len(left)} left by publishers that are at work or were "
            "stopped; the next one removes what is not needed",
        )
    findings.absent("nothing left over", "staging")
    return findings.report()


def _check_tree(
    findings: Findings,
    root: pathlib.Path,
    released: list[handles.Handle],
    derived: Iterable[str],
) -> list[str]:
    """Compares the paths outside of versions' folders with those to be there.

    Args:
      findings: takes what is wrong.
      root: of the repository.
      released: its versions.
      derived: paths of the files that are made from their entries.

    Returns:
      What publishers that were stopped have left.
    """
    wanted = dict.fromkeys(derived, stat.S_ISREG)
    for handle in released:
        wanted[tree.archive(".", handle).as_posix()] = stat.S_ISREG
        wanted[handle.path] = stat.S_ISDIR
    versions = {handle.path for handle in released}
    archives = {f"{path}{handles.ARCHIVE_SUFFIX}" for path in versions}
    for path in list(wanted):
        for parent in pathlib.PurePosixPath(path).parents[:-1]:
            wanted[parent.as_posix()] = stat.S_ISDIR
    left = []
    for path, found in _outside(root, wanted.keys() - versions):
        mode = found.st_mode
        if stat.S_ISLNK(mode) and path in archives:
            continue
        if repository.is_left_over(pathlib.PurePath(path).name) or (
            path.endswith(handles.ARCHIVE_SUFFIX)
            and repository.awaits_version(root / path)
        ):
            left.append(path)
        elif path not in wanted:
            findings.fail("tree", f"{path!r} {_stray(path, mode)}")
        elif not wanted[path](mode):
            findings.fail("tree", f"{path!r} is {kind(mode)}")
        elif path not in versions and (closed := why_closed(mode)):
            findings.fail("tree", f"{path!r} {closed}")
    findings.note("tree", "nothing but versions and what is derived from them")
    return left


def _outside(
    root: pathlib.Path, inner: Container[str]
) -> Iterator[tuple[str, os.stat_result]]:
    """What lies in a repository's root and the folders `inner`.

    Names in the root that begin with a dot are the publisher's own.
    """
    for folder, names, others in os.walk(root):
        if os.path.samefile(folder, root):
            names[:] = [name for name in names if not name.startswith(".")]
            others = [name for name in others if not name.startswith(".")]
        for name in sorted([*names, *others]):
            path = pathlib.Path(folder, name)
            relative = path.relative_to(root).as_posix()
            # Publishers at work rename and remove their files.
            with contextlib.suppress(FileNotFoundError):
                yield relative, path.lstat()
            if name in names and relative not in inner:
                names.remove(name)


def _stray(path: str, mode: int) -> str:
    """Why something has no place in a repository."""
    if stat.S_ISDIR(mode) and pathlib.PurePath(path).name.isdigit():
        return f"is no version: it has no {handles.ENTRY_FILE}"
    return "belongs to no version; remove it"


def _check_entries(
    findings: Findings, root: pathlib.Path, released: list[handles.Handle]
) -> list[entry.Entry]:
    found = []
    for handle in released:
        try:
            found.append(checked(tree.read(root, handle)))
        except (errors.HandleError, OSError) as error:
            findings.fail("entries", f"{handle}: {error}")
    for one in newest(found):
        path = tree.directory(root, one.handle.at(None)) / handles.ENTRY_FILE
        if not repository.same_file(path, one.to_json().encode()):
            name = path.relative_to(root)
            findings.fail("entries", f"{name} is not that of {one.handle}")
    findings.note("entries", f"{len(found)} of versions, and of the newest")
    return found


def _check_index(
    findings: Findings, root: pathlib.Path, entries: list[entry.Entry]
) -> Iterable[str] | None:
    """Compares the index and all derived files with the versions' entries.

    Returns:
      The paths of all derived files, or None if they are not known.
    """
    try:
        index = repository.index(root)
    except errors.ExportError as error:
        findings.fail("index", str(error))
        findings.fail("pages", "the index cannot be read")
        return None
    listed = {}
    for row in index.entries:
        try:
            release = handles.Release.from_json(row)
        except errors.HandleError as error:
            findings.fail("index", str(error))
        else:
            listed[release.handle] = row
    there = {one.handle: json.loads(one.to_json()) for one in entries}
    for handle in sorted({*listed, *there}):
        if handle not in there:
            findings.fail("index", f"{handle} is listed and not published")
        elif handle not in listed:
            findings.fail("index", f"{handle} is published and not listed")
        elif listed[handle] != there[handle]:
            findings.fail("index", f"{handle} has another entry than its own")
    findings.note("index", f"{len(listed)} versions")
    try:
        derived = repository.derived(entries, index.url, index.title)
    except errors.BitTfError as error:
        findings.fail("pages", str(error))
        return None
    names = [path for path in derived if not path.endswith(_INDEXED)]
    for path in names:
        if not (root / path).is_file():
            findings.fail("pages", f"{path} is missing")
        elif not repository.same_file(root / path, derived[path]):
            findings.fail(
                "pages",
                f"{path} is not what the entries give; hub-export publish "
                "--refresh makes it anew",
            )
    findings.note("pages", f"{len(names)} files as the entries give them")
    return derived


def _check_public_archive(
    findings: Findings, root: pathlib.Path, handle: handles.Handle
) -> None:
    public = tree.archive(root, handle)
    packed = packed_archive(tree.directory(root, handle))
    name = public.relative_to(root)
    inside = pathlib.Path(os.path.realpath(root))
    if not pathlib.Path(os.path.realpath(public)).is_relative_to(inside):
        findings.fail("archives", f"{name} leads out of the repository")
    elif not public.is_file() or not packed.is_file():
        findings.fail("archives", f"{name} leads to no archive")
    elif not os.path.samefile(public, packed) and not filecmp.cmp(
        public, packed, shallow=False
    ):
        findings.fail("archives", f"{name} is not {handle}/{packed.name}")


def checked(description: entry.Entry) -> entry.Entry:
    """An entry whose values have the right types.

    Raises:
      HandleError: they have not.
    """
    if problems := mistyped(description):
        raise errors.HandleError(" ".join(problems))
    return description


def kind(mode: int) -> str:
    """What is there in the place of something else."""
    if stat.S_ISLNK(mode):
        return "a link"
    if stat.S_ISDIR(mode):
        return "a directory"
    return "a file" if stat.S_ISREG(mode) else "no regular file"


def why_closed(mode: int) -> str | None:
    """Why a web server may not read it, or None."""
    needed = 0o005 if stat.S_ISDIR(mode) else 0o004
    if stat.S_ISLNK(mode) or mode & needed == needed:
        return None
    return (
        f"has the mode {stat.S_IMODE(mode):04o}, which keeps web servers out; "
        "chmod -R a+rX"
    )


def packed_archive(folder: pathlib.Path) -> pathlib.Path:
    """A version's archive; a site has it under its public name only."""
    packed = folder / tree.ARCHIVE_FILE
    if os.path.lexists(packed):
        return packed
    return folder.with_name(f"{folder.name}{handles.ARCHIVE_SUFFIX}")
