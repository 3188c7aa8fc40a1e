"""What a SavedModel is, as one hash of the files that make it."""

import hashlib
import os
import pathlib
from collections.abc import Iterator
from typing import Any

from bit_tf import errors, files, integrity

__all__ = ["content_hash", "stamp"]

_GRAPHS = ("saved_model.pb", "saved_model.pbtxt", "saved_model.cpb")
# Folder → how names of its files begin that belong to the model.
_FOLDERS = {"assets": "", "variables": "variables."}
_CHUNK = 2**22

# Directory → (stamp of its files, hash).
_KNOWN: dict[str, tuple[tuple, str]] = {}


def content_hash(directory: str | os.PathLike[str]) -> str:
    """What tells one SavedModel from another, wherever it lies.

    It is the SHA-256 of the path, size and SHA-256 of each file that makes the
    model: the graph, `variables/` and `assets/`. What may lie beside them
    (`assets.extra/`, fingerprint.pb, a page, an entry of a repository) does not
    count, so that a model has the same hash where it was exported, in a
    repository, and in a cache. A model that is read again unchanged is not
    hashed again by the same process.

    Args:
      directory: of a SavedModel, such as `bit_tf.hub.resolve` returns.

    Returns:
      64 hexadecimal digits.

    Raises:
      HandleError: there is no SavedModel, or it cannot be read.
      ArchiveError: there is something in it that is no regular file.
    """
    directory = os.fsdecode(directory)
    now = stamp(directory)
    before, found = _KNOWN.get(directory, (None, ""))
    if before != now:
        whole = hashlib.sha256()
        for path, *_ in now:
            size, digest = _measure(directory, path)
            line = f"{path}\0{size}\0{digest}\n"
            whole.update(line.encode(errors="surrogateescape"))
        found = whole.hexdigest()
        # Who changes it meanwhile has it read again.
        _KNOWN[directory] = now, found
    return found


def stamp(directory: str | os.PathLike[str]) -> tuple[tuple[Any, ...], ...]:
    """What changes with any file of a model, without reading them.

    Args:
      directory: of a SavedModel.

    Returns:
      A row a file, sorted: its path, size, time of modification and inode.

    Raises:
      HandleError: there is no SavedModel, or it cannot be read.
      ArchiveError: there is something in it that is no regular file.
    """
    directory = os.fsdecode(directory)
    rows = _remote(directory) if _is_remote(directory) else _local(directory)
    try:
        found = tuple(sorted(rows))
    except OSError as error:
        raise _unreadable(directory, error) from error
    if not any(row[0] in _GRAPHS for row in found):
        raise errors.HandleError(
            "A SavedModel's directory has saved_model.pb. Received: "
            f"{directory!r} without it. Pass the directory that "
            "bit_tf.hub.resolve returns."
        )
    return found


def _is_remote(directory: str) -> bool:
    return "://" in directory


def _local(directory: str) -> Iterator[tuple[Any, ...]]:
    root = pathlib.Path(directory)
    paths = [name for name in _GRAPHS if (root / name).exists()]
    for folder, prefix in _FOLDERS.items():
        paths += [
            f"{folder}/{name}"
            for name in integrity.regular_files(root / folder)
            if name.startswith(prefix)
        ]
    for path in paths:
        found = os.stat(root / path)
        yield path, found.st_size, found.st_mtime_ns, found.st_ino


def _remote(directory: str) -> Iterator[tuple[Any, ...]]:
    """The same of a directory that TensorFlow reads in place, as on gs://."""
    import tensorflow as tf

    directory = directory.rstrip("/")
    try:
        paths = [
            name
            for name in _GRAPHS
            if tf.io.gfile.exists(f"{directory}/{name}")
        ]
        for folder, prefix in _FOLDERS.items():
            for where, _, names in tf.io.gfile.walk(f"{directory}/{folder}"):
                below = where.rstrip("/")[len(directory) + 1 :]
                inside = [f"{below}/{name}" for name in names]
                start = f"{folder}/{prefix}"
                paths += [path for path in inside if path.startswith(start)]
        for path in paths:
            found = tf.io.gfile.stat(f"{directory}/{path}")
            yield path, found.length, found.mtime_nsec, 0
    except tf.errors.OpError as error:
        raise _unreadable(directory, error) from error


def _measure(directory: str, path: str) -> tuple[int, str]:
    """(bytes, SHA-256 in hexadecimal digits) of a file of a model."""
    if not _is_remote(directory):
        try:
            return files.measure(os.path.join(directory, path))
        except OSError as error:
            raise _unreadable(directory, error) from error
    import tensorflow as tf

    digest, size = hashlib.sha256(), 0
    try:
        with tf.io.gfile.GFile(f"{directory.rstrip('/')}/{path}", "rb") as file:
            while chunk := file.read(_CHUNK):
                digest.update(chunk)
                size += len(chunk)
    except tf.errors.OpError as error:
        raise _unreadable(directory, error) from error
    return size, digest.hexdigest()


def _unreadable(directory: str, error: Exception) -> errors.HandleError:
    return errors.HandleError(
        "A SavedModel's files can be read. Received: "
        f"{directory!r}, where one cannot: {error}. Look at the disk and at "
        "the permissions, or export or download it anew."
    )
