"""The cache of tensorflow_hub: what lies in it, and what is broken.

    <sha1 of the handle>/              the model; there if it is not empty
    <sha1>.descriptor.txt              its handle
    <sha1>.lock                        HOST.PID.UUID of who downloads it
    <sha1>.<uuid>.tmp/                 what has arrived of it

What this package adds:

    <sha1>.record.json                 its source, and its files' SHA-256
    sha256-<digest>/                   an unpacked archive of this disk
    .<name>.<hex>.whole                complete, about to become <name>
    .<name>.<hex>.old                  was <name>, about to be removed
    ..., ending in .tmp                incomplete
    .downloads/                        archives that are being downloaded
    .writer.lock                       held by who changes any of this

Source: tensorflow_hub/resolver.py, compressed_module_resolver.py
"""

import contextlib
import dataclasses
import datetime
import functools
import hashlib
import math
import os
import pathlib
import re
import secrets
import shutil
import socket
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from bit_tf import (
    cache_records,
    cached_download,
    errors,
    files,
    handles,
    integrity,
    variants,
)

__all__ = [
    "IDLE",
    "Download",
    "Entry",
    "damage",
    "descriptor_problems",
    "directory",
    "downloads",
    "entries",
    "entry",
    "examine",
    "find",
    "held",
    "is_open",
    "key",
    "leftovers",
    "litter",
    "remove",
    "rename_away",
    "set_aside",
    "shown",
    "write_descriptor",
    "writing",
]

# tensorflow_hub takes a lock away from a download that has been idle so long;
# seconds.
IDLE = 600
# The longest that a file which replaces another lies beside it, and the most
# by which clocks differ; seconds.
_MOMENT = 60
_MAX_DESCRIPTOR = 2**16
_DESCRIPTOR = ".descriptor.txt"
_LOCK = ".lock"
_RECORD = ".record.json"
_NAME = re.compile(
    r"(?P<hidden>\.*)(?P<key>[0-9a-f]{40}|sha256-[0-9a-f]{64})(?P<rest>\..+)?"
)
_TEMPORARY = re.compile(r"\.(?P<task>[0-9a-f]+)\.tmp")
_MOMENTARY = re.compile(r"\.(?:lock|descriptor\.txt)\.tmp[0-9a-f]+")


@dataclasses.dataclass(frozen=True)
class Download:
    """A download by tensorflow_hub, as its lock tells.

    Attributes:
      holder: who holds the lock, such as "host (PID 12)".
      task: the UUID in the names of what has arrived.
      changed: when anything last arrived, by the clock of the file system;
        seconds since the epoch.
      idle: seconds since then; infinite where all times are in the future,
        by more than clocks differ.
      living: whether it may still go on.
    """

    holder: str
    task: str
    changed: float
    idle: float
    living: bool


@dataclasses.dataclass(frozen=True)
class Entry:
    """All that the cache has under one name.

    Attributes:
      root: the cache.
      key: the SHA-1 of the handle, or "sha256-" and that of an archive.
      names: of files and folders in the cache that belong to it.
    """

    root: pathlib.Path
    key: str
    names: tuple[str, ...] = ()

    @property
    def path(self) -> pathlib.Path:
        """The model's directory."""
        return self.root / self.key

    @property
    def exists(self) -> bool:
        """Whether there is anything at the model's path."""
        return os.path.lexists(self.path)

    @property
    def descriptor(self) -> pathlib.Path:
        return self.root / f"{self.key}{_DESCRIPTOR}"

    @property
    def lock(self) -> pathlib.Path:
        return self.root / f"{self.key}{_LOCK}"

    @property
    def record(self) -> pathlib.Path:
        return self.root / f"{self.key}{_RECORD}"

    @functools.cached_property
    def described(self) -> str | None:
        """The handle in the descriptor; "" if that is unreadable."""
        try:
            with open(self.descriptor, "rb") as file:
                text = file.read(_MAX_DESCRIPTOR).decode("utf-8", "replace")
        except FileNotFoundError:
            return None
        except OSError:
            return ""
        match = re.match(r"Module: (\S+)\r?(\n|$)", text)
        return match[1] if match else ""

    @functools.cached_property
    def recorded(self) -> dict[str, Any]:
        """The record; {} if there is none that can be read."""
        try:
            found = cache_records.read_json(self.record)
        except OSError:
            return {}
        rows = found.get("files")
        right = isinstance(rows, dict) and all(
            isinstance(row, list)
            and len(row) == 2
            and type(row[0]) is int
            and isinstance(row[1], str)
            for row in rows.values()
        )
        return found if right else {}

    @property
    def files(self) -> dict[str, handles.File]:
        """Path → the file that the record tells; {} without a record."""
        return {
            path: handles.File(path, *row)
            for path, row in self.recorded.get("files", {}).items()
        }

    @property
    def handle(self) -> str | None:
        """The handle that it is of, if anything tells it."""
        for handle in (self.described, self.recorded.get("handle")):
            if isinstance(handle, str) and key(handle) == self.key:
                return handle
        return _known_keys().get(self.key)

    @property
    def shown(self) -> str:
        """What it is, as it may be shown."""
        handle = self.handle or self.recorded.get("handle")
        if self.key.startswith("sha256-"):
            handle = self.recorded.get("source")
        return shown(handle) if isinstance(handle, str) else self.key

    @property
    def download(self) -> Download | None:
        """The download by tensorflow_hub that has its lock there."""
        try:
            times = [os.lstat(self.lock).st_mtime]
            with open(self.lock, "rb") as file:
                text = file.read(_MAX_DESCRIPTOR).decode("utf-8", "replace")
        except FileNotFoundError:
            return None
        except OSError:
            text = ""
        host, pid, task = (["", "", *text.rsplit(".", 2)])[-3:]
        if re.fullmatch("[0-9a-f]+", task):
            for folder, _, _ in os.walk(self.root / f"{self.key}.{task}.tmp"):
                times += _times(folder)
        now = time.time()
        past = [when for when in times if when <= now + _MOMENT]
        idle = max(0.0, now - max(past)) if past else math.inf
        living = idle <= IDLE and not (
            host == socket.gethostname() and _is_dead(pid)
        )
        return Download(
            f"{host!r} (PID {pid[:20]!r})", task, max(times), idle, living
        )


def directory(chosen: str | os.PathLike[str] | None = None) -> pathlib.Path:
    """The cache: as chosen, or the one that tensorflow_hub uses.

    That is $TFHUB_CACHE_DIR, the flag --tfhub_cache_dir, or tfhub_modules in
    the system's folder of temporary files.

    Raises:
      HandleError: it is on no local file system, such as gs://….
    """
    from absl import flags

    found = os.fspath(chosen) if chosen else os.environ.get("TFHUB_CACHE_DIR")
    if not found and "tfhub_cache_dir" in flags.FLAGS:
        found = flags.FLAGS["tfhub_cache_dir"].value
    if not found:
        found = os.path.join(tempfile.gettempdir(), "tfhub_modules")
    if "://" in found:
        raise errors.HandleError(
            "The cache is a directory of this machine. Received: "
            f"TFHUB_CACHE_DIR={found!r}. Set it to such a directory."
        )
    return pathlib.Path(os.path.abspath(found))


def downloads(root: pathlib.Path) -> pathlib.Path:
    """The folder of archives that are being downloaded."""
    return root / ".downloads"


def key(handle: str) -> str:
    """The name of a handle's entry."""
    return hashlib.sha1(handle.encode(), usedforsecurity=False).hexdigest()


def shown(handle: str) -> str:
    """A handle without what must not be shown, on one line."""
    try:
        plain = cached_download.shown(handle)
    except errors.DownloadError:
        plain = handle
    else:
        if handle in (handles.with_query(plain), plain):
            plain = handle
    return plain if plain.isprintable() else ascii(plain)


def entries(root: pathlib.Path) -> list[Entry]:
    """Everything that the cache has, by name.

    Raises:
      OSError: the cache cannot be read; it may be missing, however.
    """
    found: dict[str, list[str]] = {}
    for folder in (root, downloads(root)):
        try:
            names = sorted(os.listdir(folder))
        except FileNotFoundError:
            continue
        for name in names:
            match = _NAME.fullmatch(name)
            if match:
                path = os.path.relpath(folder / name, root)
                found.setdefault(match["key"], []).append(path)
    return [Entry(root, name, tuple(found[name])) for name in sorted(found)]


def entry(root: pathlib.Path, name: str) -> Entry:
    """All that the cache has under one name, which may be nothing.

    Raises:
      OSError: the cache cannot be read.
    """
    for found in entries(root):
        if found.key == name:
            return found
    return Entry(root, name)


def find(handle: str, root: pathlib.Path) -> Entry | None:
    """The entry of a model under any spelling of its handle.

    Returns:
      One whose model is whole, as far as names and sizes tell; None if there
      is none.
    """
    for spelling in handles.spellings(handle):
        found = Entry(root, key(spelling))
        if found.exists and not damage(found):
            return found
    return None


def examine(found: Entry, *, thorough: bool = False) -> list[integrity.Problem]:
    """What is wrong with an entry.

    Args:
      found: one of `entries`.
      thorough: whether all bytes are read and compared, with the record or
        else with the checksums of the variables. TensorFlow is loaded then,
        but no model is run.
    """
    problems = damage(found, thorough=thorough) if found.exists else []
    return problems + litter(found)


def damage(
    found: Entry,
    *,
    thorough: bool = False,
    expected: Mapping[str, handles.File] | None = None,
) -> list[integrity.Problem]:
    """What is wrong with an entry's model.

    Args:
      found: one of `entries`.
      thorough: whether all bytes are read.
      expected: path → file, for a model without a record.
    """
    recorded = found.files
    return integrity.examine(
        found.path,
        expected=recorded or expected,
        thorough=thorough,
        # An archive of this disk may hold anything.
        structure=not (recorded and found.key.startswith("sha256-")),
    )


def held(path: pathlib.Path) -> bool:
    """Whether another process, or another part of this one, holds a lock."""
    import filelock

    if not path.exists():
        return False
    lock = filelock.FileLock(path)
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        return True
    except (OSError, NotImplementedError):
        return False
    lock.release()
    return False


@contextlib.contextmanager
def writing(root: pathlib.Path) -> Iterator[None]:
    """The right to change entries, which one process has at a time.

    Raises:
      HandleError: the cache cannot be written, or has no room; also when the
        block raises an OSError that is none of `errors`.
    """
    try:
        root.mkdir(parents=True, exist_ok=True)
        with files.locked(_writer_lock(root), f"changes the cache {root}"):
            yield
    except errors.BitTfError:
        raise
    except (OSError, NotImplementedError) as error:
        raise errors.HandleError(
            "The cache is a directory with room that can be written. "
            f"Received: {str(root)!r}: {error}. Make room there, or set "
            "TFHUB_CACHE_DIR to another one."
        ) from error


def remove(found: Entry, names: Iterable[str] | None = None) -> list[str]:
    """Removes what the cache has under one name; call it in `writing`.

    Args:
      found: one of `entries`.
      names: some of its names; all of them unless given.

    Returns:
      The names that were removed.

    Raises:
      OSError: something could not be removed.
    """
    chosen = tuple(found.names if names is None else names)
    # The record goes first, so that it is never that of another model.
    for name in sorted(chosen, key=lambda name: not name.endswith(_RECORD)):
        path = found.root / name
        if name == found.key:
            # A reader sees all of a model, or nothing.
            path = rename_away(path, "tmp")
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    return list(chosen)


def write_descriptor(found: Entry, handle: str) -> None:
    """Writes what tensorflow_hub writes beside a model.

    Raises:
      OSError: it cannot be written.
    """
    now = datetime.datetime.now()
    text = (
        f"Module: {handle}\nDownload Time: {now}\n"
        f"Downloader Hostname: {socket.gethostname()} (PID:{os.getpid()})"
    )
    with files.new_file(found.descriptor) as file:
        file.write(text.encode())


def set_aside(found: Entry) -> str | None:
    """The name of a complete model that a stopped process left aside."""
    for suffix in (".whole", ".old"):
        for name in found.names:
            if name.startswith(f".{found.key}.") and name.endswith(suffix):
                return name
    return None


def leftovers(found: Entry) -> list[str]:
    """Names of an entry that nobody needs any more.

    Those of this package count only while nobody is `writing`.
    """
    running = found.download
    task = running.task if running and running.living else None
    left = []
    for name in found.names:
        match = _NAME.fullmatch(name)
        if match is None:
            continue
        rest = match["rest"] or ""
        temporary = _TEMPORARY.fullmatch(rest)
        path = found.root / name
        if match["hidden"]:
            left.append(name)
        elif temporary:
            if temporary["task"] != task:
                left.append(name)
        elif _MOMENTARY.fullmatch(rest):
            if time.time() - max(_times(path), default=0.0) > _MOMENT:
                left.append(name)
        elif rest in (_DESCRIPTOR, _RECORD) and not (found.exists or task):
            left.append(name)
    return left


def _writer_lock(root: pathlib.Path) -> pathlib.Path:
    return root / ".writer.lock"


def rename_away(path: pathlib.Path, suffix: str) -> pathlib.Path:
    match = _NAME.match(path.name)
    name = match["key"] if match else path.name
    away = path.with_name(f".{name}.{secrets.token_hex(8)}.{suffix}")
    os.rename(path, away)
    return away


def litter(found: Entry) -> list[integrity.Problem]:
    """What is wrong beside an entry's model."""
    problems = []
    running = found.download
    if running and not running.living:
        since = f"idle for {running.idle:.0f} s"
        if math.isinf(running.idle):
            since = "with a time in the future"
        problems.append(
            integrity.Problem(
                "stale lock",
                f"{found.lock.name} of {running.holder}, {since}",
            )
        )
    busy = held(_writer_lock(found.root))
    problems += [
        integrity.Problem("left over", name)
        for name in leftovers(found)
        if not (busy and name.startswith("."))
    ]
    return problems + descriptor_problems(found)


def descriptor_problems(found: Entry) -> list[integrity.Problem]:
    """What is wrong with the descriptor beside a model."""
    if not found.exists or found.key.startswith("sha256-"):
        return []
    described = found.described
    if described is None:
        if found.handle is None or not is_open(found.handle):
            return []
        text = f"there is no {found.descriptor.name}"
    elif described == "":
        text = f"{found.descriptor.name} names no handle"
    elif key(described) != found.key:
        text = f"{found.descriptor.name} names {shown(described)}, of another"
    else:
        return []
    return [integrity.Problem("descriptor", text)]


def is_open(handle: str) -> bool:
    """Whether a handle holds nothing that must not be shown or written."""
    return shown(handle) == handle


@functools.cache
def _known_keys() -> Mapping[str, str]:
    """Name → spelling, of all published models."""
    return {
        key(spelling): spelling
        for row in variants.list_models()
        for address in (row.handle, row.feature_handle)
        if address is not None
        for spelling in handles.spellings(address)
    }


def _is_dead(pid: str) -> bool:
    """Whether no process of this machine has a number."""
    if not re.fullmatch("[1-9][0-9]{0,8}", pid):
        return False
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return True
    except OSError:
        return False
    return False


def _times(path: str | os.PathLike[str]) -> list[float]:
    """When a file, or a folder and each of its files, last changed; seconds."""
    try:
        times = [os.stat(path).st_mtime]
        if os.path.isdir(path):
            with os.scandir(path) as found:
                times += [item.stat().st_mtime for item in found]
    except OSError:
        return []
    return times
