"""A new model in the cache of tensorflow_hub, complete or not at all."""

import contextlib
import os
import pathlib
import secrets
import shutil
from collections.abc import Iterator, Mapping
from typing import Any

from bit_tf import archive as archives
from bit_tf import cache_records, errors, files, handles, hub_cache, integrity

__all__ = ["install", "install_one"]


def install(
    places: Mapping[str, str | None],
    source: str | os.PathLike[str],
    *,
    root: pathlib.Path,
    origin: str,
    archive: handles.File | None = None,
    expected: Mapping[str, handles.File] | None = None,
    existing: str = "keep",
    check: str | None = "quick",
) -> dict[str, str]:
    """Puts one model into the cache, under each of several names.

    It appears whole under each; the files are hard links of one another
    where the file system has them. What is broken in a place is removed when
    the new model is complete.

    Args:
      places: names (`key`) → handle, or None for an archive's own.
      source: the directory of a SavedModel, or a tar archive.
      root: the cache.
      origin: where it came from, as it may be shown.
      archive: the archive's size and SHA-256, if it came as one; recorded.
      expected: path → file, if it is known what the model is made of.
      existing: what happens to whole models of other content in the places:
        "keep" them, "refuse" to do anything, or "replace" them and also those
        that are equal.
      check: "quick", "thorough", or None for an archive that may hold anything.

    Returns:
      key → "installed"; "kept" if a whole model is there; "busy" if
      tensorflow_hub is downloading there.

    Raises:
      ArchiveError: the archive is damaged or hostile.
      DownloadError: its files are not those expected.
      HandleError: it is no whole SavedModel; the cache cannot be written or
        has no room; or there are other models and "refuse".
    """
    with hub_cache.writing(root), contextlib.ExitStack() as stack:
        outcome = {}
        for name in places:
            found = hub_cache.Entry(root, name)
            running = found.download
            if running and running.living:
                outcome[name] = "busy"
            elif (
                existing == "keep"
                and found.exists
                and not hub_cache.damage(found)
            ):
                outcome[name] = "kept"
        todo = [name for name in places if name not in outcome]
        if not todo:
            return outcome
        staged = stack.enter_context(_staging(root, todo[0]))
        _fill(staged, source, root, expected)
        found_files = integrity.contents(staged)
        _require_same(found_files, expected, origin)
        if check:
            _require_whole(staged, origin, check == "thorough")
        if existing == "refuse":
            todo = _without_equal(root, todo, found_files, outcome)
            _require_alone(root, todo)
        copies = dict.fromkeys(todo[:1], staged)
        for name in todo[1:]:
            copies[name] = stack.enter_context(_staging(root, name))
            with files.new_directory(copies[name]) as folder:
                _copy_tree(staged, pathlib.Path(folder), link=True)
        record = {
            "source": origin,
            "archive": archive and [archive.size, archive.sha256],
            "files": {
                path: [file.size, file.sha256]
                for path, file in found_files.items()
            },
        }
        for name in todo:
            _put(
                hub_cache.Entry(root, name), copies[name], places[name], record
            )
            outcome[name] = "installed"
        return outcome


def install_one(
    name: str,
    handle: str | None,
    source: str | os.PathLike[str],
    *,
    root: pathlib.Path,
    **options: Any,
) -> pathlib.Path:
    """Puts a model into the cache under one name.

    Args:
      name: `key` of the handle, or an archive's own name.
      handle: None for an archive's own.
      source: as for `install`.
      root: as for `install`.
      **options: as for `install`.

    Returns:
      Its directory.

    Raises:
      HandleError: tensorflow_hub is downloading there; else as `install`.
    """
    outcome = install({name: handle}, source, root=root, **options)
    if outcome[name] == "busy":
        raise errors.HandleError(
            "A model is put where no other program is putting one. Received: "
            f"{hub_cache.Entry(root, name).lock}, the lock of a download by "
            "tensorflow_hub. Wait for its end, or stop it."
        )
    return root / name


@contextlib.contextmanager
def _staging(root: pathlib.Path, name: str) -> Iterator[pathlib.Path]:
    """A path for what is about to become `name`; it is empty after.

    Nobody takes what a killed process leaves there for a complete model.
    """
    path = root / f".{name}.{secrets.token_hex(8)}.tmp"
    try:
        yield path
    finally:
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def _fill(
    staged: pathlib.Path,
    source: str | os.PathLike[str],
    root: pathlib.Path,
    expected: Mapping[str, handles.File] | None,
) -> None:
    """Makes the first copy of a model."""
    source = pathlib.Path(source)
    if not source.is_dir():
        if expected:
            total = sum(file.size for file in expected.values())
            archives.unpack(source, staged, max_bytes=total)
        else:
            archives.unpack(source, staged)
        return
    with files.new_directory(staged) as folder:
        inside = root.resolve() in source.resolve().parents
        _copy_tree(source, pathlib.Path(folder), link=inside)


def _copy_tree(
    source: pathlib.Path, target: pathlib.Path, link: bool = False
) -> None:
    """Copies a model, or makes hard links of its files where that can be."""
    for relative in integrity.regular_files(source):
        path = target / relative
        path.parent.mkdir(parents=True, exist_ok=True)
        if link:
            try:
                os.link(source / relative, path)
                continue
            except OSError:
                pass
        shutil.copyfile(source / relative, path)


def _require_same(
    found: Mapping[str, handles.File],
    expected: Mapping[str, handles.File] | None,
    origin: str,
) -> None:
    if not expected or found == expected:
        return
    lines = [f"− {path}" for path in sorted(expected.keys() - found.keys())]
    lines += [f"+ {path}" for path in sorted(found.keys() - expected.keys())]
    lines += [
        f"− {path}: {expected[path].size} bytes, SHA-256 "
        f"{expected[path].sha256}\n+ {path}: {found[path].size} bytes, SHA-256 "
        f"{found[path].sha256}"
        for path in sorted(expected.keys() & found.keys())
        if expected[path] != found[path]
    ]
    raise errors.DownloadError(
        f"A model's files are those of its entry ({handles.ENTRY_FILE}). "
        f"Received from {origin} others, so none was kept. Ask its publisher.\n"
        + "\n".join(lines)
    )


def _require_whole(path: pathlib.Path, origin: str, thorough: bool) -> None:
    problems = integrity.examine(path, thorough=thorough)
    if problems:
        listed = "; ".join(map(str, problems))
        raise errors.HandleError(
            "The cache holds whole SavedModels. Received: the one of "
            f"{origin}, which is not: {listed}. Get another copy of it."
        )


def _without_equal(
    root: pathlib.Path,
    todo: list[str],
    found: Mapping[str, handles.File],
    outcome: dict[str, str],
) -> list[str]:
    """Names whose entries hold something else; the others are "kept"."""
    left = []
    for name in todo:
        there = hub_cache.Entry(root, name)
        if there.exists and not hub_cache.damage(there):
            has = integrity.contents(there.path)
            if has == found:
                outcome[name] = "kept"
                continue
        left.append(name)
    return left


def _require_alone(root: pathlib.Path, todo: list[str]) -> None:
    there = [hub_cache.Entry(root, name) for name in todo]
    others = [
        found.shown
        for found in there
        if found.exists and not hub_cache.damage(found)
    ]
    if others:
        raise errors.HandleError(
            "A whole model in the cache is not replaced by another. Received "
            f"one with other files for {', '.join(others)}. Nothing was "
            "changed; use --overwrite to replace it."
        )


def _put(
    found: hub_cache.Entry,
    staged: pathlib.Path,
    handle: str | None,
    record: Mapping[str, Any],
) -> None:
    """Puts a complete directory in an entry's place.

    Killed in between, it leaves either model in place, or both aside. The new
    one is only then aside under a name that others restore, and its record is
    in place before it.
    """
    named = handle and hub_cache.shown(handle)
    with _staging(found.root, found.key) as new_record:
        cache_records.write_json(new_record, {"handle": named, **record})
        found.record.unlink(missing_ok=True)
        if handle is not None and hub_cache.is_open(handle):
            hub_cache.write_descriptor(found, handle)
        old = None
        whole = hub_cache.rename_away(staged, "whole")
        try:
            if found.exists:
                old = hub_cache.rename_away(found.path, "old")
            os.replace(new_record, found.record)
            os.rename(whole, found.path)
        except OSError:
            # Under this name, it is removed.
            os.rename(whole, staged)
            found.record.unlink(missing_ok=True)
            if old:
                os.rename(old, found.path)
            raise
    files.sync(found.root)
    if old is None:
        return
    # What is half removed must not be restored.
    old = hub_cache.rename_away(old, "tmp")
    if old.is_dir() and not old.is_symlink():
        shutil.rmtree(old, ignore_errors=True)
    else:
        old.unlink()
