"""The cache of tensorflow_hub: list, verify, repair, fill and empty it."""

import contextlib
import dataclasses
import os
import pathlib
import re
import time
from collections.abc import Iterable, Sequence
from typing import Any

from bit_tf import (
    archive,
    errors,
    handles,
    hub,
    hub_cache,
    hub_fetch,
    hub_install,
    integrity,
)
from hub_export import tree

__all__ = ["Row", "Step", "listed", "removed", "repaired", "seeded", "used"]


@dataclasses.dataclass(frozen=True)
class Row:
    """What the cache has under one name.

    Attributes:
      key: the name.
      handle: what it is, as it may be shown; the name where nobody knows.
      model: the same for all spellings of one handle.
      state: "whole", "broken", "downloading", or "absent" if there is no
        model, but something else.
      size: bytes of the model's files.
      files: their number.
      age: seconds since it came.
      partial: bytes of a download that is not complete.
      problems: what is wrong with it.
      compared: what all its bytes were compared with: its "record"; the
        "entry" that a mirror on this disk has; or the "checksums" that the
        variables have, but not the graph and the assets. "" if they were not
        read.
    """

    key: str
    handle: str
    model: str
    state: str
    size: int
    files: int
    age: float
    partial: int
    problems: tuple[integrity.Problem, ...]
    compared: str = ""

    def to_dict(self) -> dict[str, Any]:
        """JSON's types only."""
        return {**dataclasses.asdict(self), "age": round(self.age)}


@dataclasses.dataclass(frozen=True)
class Step:
    """Something that was done in the cache, or would be.

    Attributes:
      key: the entry's name.
      handle: what it is, as it may be shown.
      action: "fetched", "linked", "restored", "removed", "rewritten",
        "installed", "kept", "left" or "busy".
      detail: one line, or more where much was tried.
      done: whether nothing is left to do.
    """

    key: str
    handle: str
    action: str
    detail: str
    done: bool = True

    def to_dict(self) -> dict[str, Any]:
        """JSON's types only."""
        return dataclasses.asdict(self)


def listed(
    root: pathlib.Path,
    chosen: Sequence[str] | None = None,
    *,
    thorough: bool = False,
) -> list[Row]:
    """What the cache has, in the order of the handles.

    Args:
      root: the cache.
      chosen: handles in any spelling, or names of entries; all unless given.
      thorough: whether all bytes are read; TensorFlow is loaded then.

    Raises:
      HandleError: the cache has nothing of one that was chosen.
      OSError: the cache cannot be read.
    """
    damage = _Damage(thorough)
    rows = [
        _row(entry, damage(entry), damage.compared(entry))
        for entry in _chosen(root, chosen)
    ]
    return sorted(rows, key=lambda row: (row.model, row.handle, row.key))


def used(root: pathlib.Path, rows: Iterable[Row]) -> int:
    """Bytes that the models take on the disk: shared files count once."""
    inodes = {}
    for row in rows:
        for found in _stats(root / row.key).values():
            inodes[found.st_dev, found.st_ino] = found.st_size
    return sum(inodes.values())


def repaired(
    root: pathlib.Path,
    chosen: Sequence[str] | None = None,
    *,
    dry_run: bool = False,
    offline: bool | None = None,
) -> list[Step]:
    """Mends what is broken, and removes what is left over.

    A broken model is linked from another spelling, or fetched as `hub.fetch`
    does, and replaced when the new one is complete. One that nobody knows the
    handle of is removed, so that tensorflow_hub downloads it again. What is
    being downloaded is left alone.

    Args:
      root: the cache.
      chosen: handles in any spelling, or names of entries; all unless given.
      dry_run: whether it is only told what would be done.
      offline: whether models are taken from this disk only.

    Raises:
      HandleError: the cache has nothing of one that was chosen, or cannot be
        written.
      OSError: the cache cannot be read.
    """
    repair = _Repair(root, dry_run, offline)
    for entry in _chosen(root, chosen):
        repair.tidy(entry)
    # What is whole of other spellings is known only then.
    for entry in _chosen(root, chosen, missing=True):
        repair.mend(entry)
    return repair.steps


def seeded(
    handle: str,
    source: str | os.PathLike[str],
    *,
    root: pathlib.Path,
    overwrite: bool = False,
) -> list[Step]:
    """Puts a model into the cache, under every spelling of a handle.

    Args:
      handle: an http or https address, or a handle of `bit_tf.variants`
        without "https://tfhub.dev/".
      source: the directory of a SavedModel, an archive, the folder of a
        version in a repository or the model in it, or whatever `hub.resolve`
        takes. It is compared with its entry in the repository, where there is
        one.
      root: the cache.
      overwrite: whether whole models of other content are replaced.

    Returns:
      A step for each spelling.

    Raises:
      ArchiveError: the archive is damaged, hostile, or not that of its entry.
      DownloadError: the files are not those of the entry.
      HandleError: it is no whole SavedModel, or no handle; there are other
        models; or the cache cannot be written.
    """
    address = hub.as_address(handle)
    if not re.match("https?://[^/]", address, re.IGNORECASE):
        raise errors.HandleError(
            "The cache keeps models of http and https addresses. Received: "
            f"{errors.brief(handle)}."
        )
    found = _source(os.fsdecode(source), root)
    places = {hub_cache.key(text): text for text in handles.spellings(address)}
    outcome = hub_install.install(
        places,
        found.path,
        root=root,
        origin=found.origin,
        archive=found.archive,
        expected=found.expected,
        existing="replace" if overwrite else "refuse",
        check="thorough",
    )
    return [
        Step(
            name,
            hub_cache.shown(places[name]),
            action,
            _OUTCOMES[action],
            action != "busy",
        )
        for name, action in outcome.items()
    ]


def removed(
    root: pathlib.Path, chosen: Sequence[str] | None
) -> tuple[list[Step], int]:
    """Removes entries from the cache.

    Args:
      root: the cache.
      chosen: handles in any spelling, or names of entries; None for all.

    Returns:
      (a step for each entry, bytes that were freed). What is being downloaded
      is left alone.

    Raises:
      HandleError: the cache has nothing of one that was chosen, or cannot be
        written.
      OSError: the cache cannot be read.
    """
    steps = []
    entries = _chosen(root, chosen)
    if not entries:
        return [], 0
    links: dict[tuple[int, int], list[int]] = {}
    with hub_cache.writing(root):
        for entry in entries:
            # Another command may have changed it meanwhile.
            entry = hub_cache.entry(root, entry.key)
            if busy := _busy(entry):
                steps.append(
                    Step(entry.key, entry.shown, "busy", busy, done=False)
                )
                continue
            shown = entry.shown
            for name in entry.names:
                for found in _stats(root / name).values():
                    inode = found.st_dev, found.st_ino
                    row = links.setdefault(
                        inode, [found.st_size, found.st_nlink]
                    )
                    row[1] -= 1
            hub_cache.remove(entry)
            names = ", ".join(entry.names)
            steps.append(Step(entry.key, shown, "removed", names))
    return steps, sum(size for size, left in links.values() if left <= 0)


_OUTCOMES = {
    "installed": "complete",
    "kept": "the same model is there",
    "busy": "tensorflow_hub is downloading there; seed again after its end",
}


def _chosen(
    root: pathlib.Path,
    chosen: Sequence[str] | None,
    missing: bool = False,
) -> list[hub_cache.Entry]:
    """The entries that somebody means.

    Args:
      root: the cache.
      chosen: handles or names; None for all.
      missing: whether one that the cache has nothing of is passed over.
    """
    entries = hub_cache.entries(root)
    if chosen is None:
        return entries
    names: dict[str, None] = {}
    there = {entry.key for entry in entries}
    for text in chosen:
        found = [text] if text in there else []
        if not found and not re.fullmatch(r"(sha256-)?[0-9a-f]{40,64}", text):
            keys = map(hub_cache.key, handles.spellings(hub.as_address(text)))
            found = [name for name in keys if name in there]
        if not found and not missing:
            raise errors.HandleError(
                "What is chosen is in the cache, under any spelling. Received: "
                f"{hub_cache.shown(text)!r}, of which {str(root)!r} has "
                "nothing. See: hub-export cache ls"
            )
        names.update(dict.fromkeys(found))
    return [entry for entry in entries if entry.key in names]


class _Damage:
    """What is wrong with models; those that share their files are read once.

    Args:
      thorough: whether all bytes are read.
    """

    def __init__(self, thorough: bool):
        self._thorough = thorough
        self._known: dict[Any, list[integrity.Problem]] = {}
        self._described: dict[str, dict[str, handles.File]] = {}

    def compared(self, entry: hub_cache.Entry) -> str:
        """What all bytes of an entry are compared with; see `Row`."""
        if not self._thorough or not entry.exists:
            return ""
        if entry.files:
            return "record"
        return "entry" if self._expected(entry) else "checksums"

    def _expected(self, entry: hub_cache.Entry) -> dict[str, handles.File]:
        """The files of a model without a record, if a mirror tells them.

        The mirror's model may be another of the same handle, made anew: it is
        the same if paths and sizes are.
        """
        if not self._thorough or entry.files or entry.handle is None:
            return {}
        model = _model(entry)
        if model not in self._described:
            self._described[model] = hub.described_files(entry.handle)
        found = self._described[model]
        has = {
            pathlib.PurePath(path).as_posix(): stat.st_size
            for path, stat in _stats(entry.path).items()
        }
        same = has == {path: file.size for path, file in found.items()}
        return found if same else {}

    def __call__(self, entry: hub_cache.Entry) -> list[integrity.Problem]:
        if not entry.exists:
            return []
        expected = self._expected(entry)
        inodes = tuple(
            (path, found.st_dev, found.st_ino)
            for path, found in _stats(entry.path).items()
        )
        same = inodes, tuple(sorted((entry.files or expected).items()))
        if not inodes or same not in self._known:
            self._known[same] = hub_cache.damage(
                entry, thorough=self._thorough, expected=expected
            )
        return self._known[same]


def _model(entry: hub_cache.Entry) -> str:
    """The shortest spelling of a handle; of tfhub.dev, where it has one."""
    if entry.handle is None:
        return entry.shown
    known = handles.known(entry.handle)
    if known is not None:
        return f"{handles.TFHUB}{known}"
    spellings = handles.spellings(entry.handle)
    return hub_cache.shown(min(spellings, key=lambda text: (len(text), text)))


def _row(
    entry: hub_cache.Entry, damage: list[integrity.Problem], compared: str
) -> Row:
    problems = [*damage, *hub_cache.litter(entry)]
    stats = _stats(entry.path)
    state = "whole" if entry.exists else "absent"
    if any(problem.breaks for problem in problems):
        state = "broken"
    # An empty directory is what tensorflow_hub downloads to as well.
    if _busy(entry) and state != "whole":
        state, problems = "downloading", []
    age = time.time() - entry.path.lstat().st_mtime if entry.exists else 0.0
    partial = sum(
        found.st_size
        for name in entry.names
        if name != entry.key
        for found in _stats(entry.root / name).values()
        if not name.endswith((".json", ".txt", ".lock"))
    )
    return Row(
        entry.key,
        entry.shown,
        _model(entry),
        state,
        sum(found.st_size for found in stats.values()),
        len(stats),
        max(0.0, age),
        partial,
        tuple(problems),
        compared if state == "whole" else "",
    )


def _stats(path: pathlib.Path) -> dict[str, os.stat_result]:
    """Of a file, or of all files of a directory; nothing is followed."""
    if path.is_symlink() or not path.is_dir():
        return {"": path.lstat()} if os.path.lexists(path) else {}
    found = {}
    for folder, _, names in os.walk(path):
        for name in sorted(names):
            # What somebody removes meanwhile is not there.
            with contextlib.suppress(OSError):
                file = os.path.join(folder, name)
                found[os.path.relpath(file, path)] = os.lstat(file)
    return found


def _busy(entry: hub_cache.Entry) -> str | None:
    """Who is downloading an entry; None if nobody is."""
    running = entry.download
    if running and running.living:
        return f"tensorflow_hub of {running.holder} is downloading it"
    for name in entry.names:
        lock = os.path.dirname(name) and name.endswith(".lock")
        if lock and hub_cache.held(entry.root / name):
            return "another process is downloading it"
    return None


@dataclasses.dataclass(frozen=True)
class _Source:
    """Where a model is taken from.

    Attributes:
      path: a directory or an archive.
      origin: as it may be shown.
      archive: the archive's size and hash, if it is one.
      expected: path → file, where an entry tells them.
    """

    path: pathlib.Path
    origin: str
    archive: handles.File | None = None
    expected: dict[str, handles.File] | None = None


def _source(text: str, root: pathlib.Path) -> _Source:
    """What somebody wrote as the source of a model."""
    path = pathlib.Path(text)
    if path.is_dir():
        origin = str(path.absolute())
        if not (path / handles.ENTRY_FILE).is_file():
            return _Source(path, origin, None, _files(_published_beside(path)))
        published = _published(path)
        model = path / handles.MODEL_FOLDER
        if model.is_dir():
            return _Source(model, origin, None, _files(published))
        packed = path / tree.ARCHIVE_FILE
        if not packed.is_file():
            packed = pathlib.Path(f"{path}{handles.ARCHIVE_SUFFIX}")
        return _packed(packed, published)
    if path.is_file() and archive.is_archive(path):
        folder = pathlib.Path(text.removesuffix(handles.ARCHIVE_SUFFIX))
        if path.name == tree.ARCHIVE_FILE:
            folder = path.parent
        return _packed(path, _published(folder))
    return _Source(
        pathlib.Path(hub.resolve(text, cache=root)), hub_cache.shown(text)
    )


def _packed(path: pathlib.Path, published: handles.Release | None) -> _Source:
    found = hub_fetch.check_archive(path, published)
    return _Source(path, str(path.absolute()), found, _files(published))


def _published(folder: pathlib.Path) -> handles.Release | None:
    """The entry of a repository in a version's folder, or None."""
    path = folder / handles.ENTRY_FILE
    return handles.Release.parse(path.read_bytes()) if path.is_file() else None


def _published_beside(model: pathlib.Path) -> handles.Release | None:
    """The entry of a model's directory in a repository, or None."""
    for path in (pathlib.Path(os.path.abspath(model)), model.resolve()):
        if path.name == handles.MODEL_FOLDER:
            published = _published(path.parent)
            if published is not None:
                return published
    return None


def _files(
    published: handles.Release | None,
) -> dict[str, handles.File] | None:
    if published is None:
        return None
    return {file.path: file for file in published.files}


class _Repair:
    """One pass over the cache.

    Attributes:
      steps: what was done, or would be.
    """

    def __init__(self, root: pathlib.Path, dry_run: bool, offline: bool | None):
        self.steps: list[Step] = []
        self._root = root
        self._dry_run = dry_run
        self._offline = offline
        self._damage = _Damage(thorough=True)
        # Models that could not be fetched.
        self._lost: set[str] = set()

    def tidy(self, entry: hub_cache.Entry) -> None:
        """Removes what is left over beside a model."""
        busy = _busy(entry)
        problems = hub_cache.examine(entry)
        if busy:
            if problems:
                self._step(entry, "busy", busy, done=False)
            return
        if not problems and not self._downloads(entry):
            return
        if self._dry_run:
            self._tidy(entry)
            return
        with hub_cache.writing(self._root):
            # Nobody else is writing now, so that what is left over is so.
            self._tidy(hub_cache.entry(self._root, entry.key))

    def mend(self, entry: hub_cache.Entry) -> None:
        """Replaces a model that is broken."""
        if not entry.exists or _busy(entry):
            return
        problems = self._damage(entry)
        if not problems:
            return
        found = "; ".join(map(str, problems))
        handle = entry.handle
        if handle is not None:
            self._fetch(entry, handle, found)
        elif entry.key.startswith("sha256-"):
            self._unpack(entry, found)
        else:
            self._remove(entry, f"its handle is unknown; {found}")

    def _tidy(self, entry: hub_cache.Entry) -> None:
        aside = None if entry.exists else hub_cache.set_aside(entry)
        if aside is not None:
            self._step(entry, "restored", aside)
            if not self._dry_run:
                os.rename(self._root / aside, entry.path)
                entry = hub_cache.entry(self._root, entry.key)
        names = hub_cache.leftovers(entry)
        if aside is not None:
            # In a dry run, they still seem to belong to nothing.
            needed = (aside, entry.descriptor.name, entry.record.name)
            names = [name for name in names if name not in needed]
        if entry.exists and not hub_cache.damage(entry):
            names += self._downloads(entry)
        running = entry.download
        if running and not running.living:
            names.append(entry.lock.name)
        problems = hub_cache.descriptor_problems(entry)
        rewrite = bool(problems) and entry.handle is not None
        if problems and not rewrite:
            names.append(entry.descriptor.name)
        if names:
            self._step(entry, "removed", ", ".join(names))
        if rewrite:
            self._step(entry, "rewritten", entry.descriptor.name)
        if self._dry_run:
            return
        hub_cache.remove(entry, names)
        if rewrite and entry.handle is not None:
            hub_cache.write_descriptor(entry, entry.handle)

    def _downloads(self, entry: hub_cache.Entry) -> list[str]:
        """Names of downloads for a model that is there."""
        return [name for name in entry.names if os.path.dirname(name)]

    def _fetch(self, entry: hub_cache.Entry, handle: str, found: str) -> None:
        model = _model(entry)
        other = self._other(entry, handle)
        if other is not None:
            self._step(entry, "linked", f"from {other.key}; {found}")
            if not self._dry_run:
                self._link(entry, handle, other)
            return
        if self._dry_run:
            self._step(entry, "fetched", found)
            return
        why = "see above"
        try:
            if model not in self._lost:
                hub.fetch(
                    handle,
                    offline=self._offline,
                    cache=self._root,
                    replace=True,
                )
                self._step(entry, "fetched", found)
                return
        except errors.BitTfError as error:
            self._lost.add(model)
            why = str(error)
        if os.path.isdir(entry.path) and not os.listdir(entry.path):
            self._remove(entry, "it is empty; tensorflow_hub fetches it again")
        else:
            self._step(entry, "left", f"{found}\n{why}", done=False)

    def _other(
        self, entry: hub_cache.Entry, handle: str
    ) -> hub_cache.Entry | None:
        """A whole entry of another spelling."""
        for spelling in handles.spellings(handle):
            name = hub_cache.key(spelling)
            other = hub_cache.Entry(self._root, name)
            if name != entry.key and other.exists and not self._damage(other):
                return other
        return None

    def _link(
        self, entry: hub_cache.Entry, handle: str, other: hub_cache.Entry
    ) -> None:
        size_and_hash = other.recorded.get("archive")
        hub_install.install_one(
            entry.key,
            handle,
            other.path,
            root=self._root,
            origin=str(other.recorded.get("source", other.shown)),
            archive=handles.File(other.key, *size_and_hash)
            if size_and_hash
            else None,
            existing="replace",
        )

    def _unpack(self, entry: hub_cache.Entry, found: str) -> None:
        """Replaces an unpacked archive, if the archive is still there."""
        source = pathlib.Path(str(entry.recorded.get("source")))
        try:
            packed = hub_fetch.check_archive(source, None)
        except OSError:
            packed = None
        if packed is None or f"sha256-{packed.sha256}" != entry.key:
            self._remove(entry, f"its archive is gone; {found}")
            return
        self._step(entry, "fetched", f"from {source}; {found}")
        if not self._dry_run:
            hub_install.install_one(
                entry.key,
                None,
                source,
                root=self._root,
                origin=str(source),
                archive=packed,
                existing="replace",
                check=None,
            )

    def _remove(self, entry: hub_cache.Entry, why: str) -> None:
        self._step(entry, "removed", why)
        if not self._dry_run:
            with hub_cache.writing(self._root):
                hub_cache.remove(hub_cache.entry(self._root, entry.key))

    def _step(
        self,
        entry: hub_cache.Entry,
        action: str,
        detail: str,
        done: bool = True,
    ) -> None:
        self.steps.append(Step(entry.key, entry.shown, action, detail, done))
