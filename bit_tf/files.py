"""Files and directories that appear whole, by rename, or not at all."""

import contextlib
import ctypes
import errno
import hashlib
import os
import pathlib
import secrets
import shutil
from collections.abc import Iterator
from typing import BinaryIO

__all__ = [
    "locked",
    "measure",
    "new_directory",
    "new_file",
    "sync",
    "sync_tree",
]

# What file systems answer that cannot sync a directory.
_NO_SYNC = (errno.EINVAL, errno.ENOTSUP)
# Of Linux: what relative paths are relative to, and a flag of renameat2.
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2


@contextlib.contextmanager
def new_file(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """A file to write, which replaces `path` when the block succeeds.

    Yields:
      A binary file, readable too, in the directory of `path`.

    Raises:
      OSError: it cannot be written, or is a directory; what was at `path` is
        still there.
    """
    if os.path.isdir(path):
        code = errno.EISDIR
        raise IsADirectoryError(code, os.strerror(code), os.fspath(path))
    staging = _sibling(pathlib.Path(os.path.abspath(path)))
    try:
        with open(staging, "x+b") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(staging, path)
        sync(staging.parent)
    finally:
        staging.unlink(missing_ok=True)


@contextlib.contextmanager
def new_directory(
    path: str | os.PathLike[str], overwrite: bool = False
) -> Iterator[str]:
    """A directory to fill, which becomes `path` when the block succeeds.

    Args:
      path: must not exist then, unless overwrite.
      overwrite: what was at `path` is removed after the rename. Where the
        system can exchange two names, something is there at any moment.

    Yields:
      The path of an empty directory beside `path`; its parents are made.

    Raises:
      OSError: it cannot be written, or something appeared at `path`
        meanwhile; what was at `path` is still there.
    """
    path = pathlib.Path(os.path.abspath(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    staging = _sibling(path)
    staging.mkdir()
    try:
        yield str(staging)
        sync_tree(staging)
        if overwrite and os.path.lexists(path) and _exchange(staging, path):
            _remove(staging)
        elif overwrite and os.path.lexists(path):
            old = _sibling(path)
            os.rename(path, old)
            try:
                os.rename(staging, path)
            except OSError:
                os.rename(old, path)
                raise
            _remove(old)
        else:
            os.rename(staging, path)
        sync(path.parent)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


@contextlib.contextmanager
def locked(path: str | os.PathLike[str], work: str) -> Iterator[None]:
    """Keeps other processes out, and waits for one that is in.

    The system releases the lock of a process that dies.

    Args:
      path: the lock's file, which stays where it is.
      work: what is done under the lock, for a message, such as "publishes".

    Raises:
      OSError: the file cannot be made.
      NotImplementedError: the file system has no locks.
    """
    import filelock
    from absl import logging

    lock = filelock.FileLock(path)
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        logging.warning("Waiting for another process that %s", work)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def measure(path: str | os.PathLike[str]) -> tuple[int, str]:
    """(bytes, SHA-256 in hexadecimal digits) of a file.

    Raises:
      OSError: it cannot be read.
    """
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return file.tell(), digest


def sync_tree(directory: str | os.PathLike[str]) -> None:
    """Has the disk keep all files and folders of a directory, and itself.

    Raises:
      OSError: it could not.
    """
    for folder, _, names in os.walk(directory):
        for name in [*names, "."]:
            sync(os.path.join(folder, name))


def sync(path: str | os.PathLike[str]) -> None:
    """Has the disk keep a file, or a directory's names.

    Raises:
      OSError: it could not.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _NO_SYNC:
            raise
    finally:
        os.close(descriptor)


def _sibling(path: pathlib.Path) -> pathlib.Path:
    if not path.name:
        raise IsADirectoryError(f"{path} cannot be replaced; name another.")
    return path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")


def _exchange(one: pathlib.Path, other: pathlib.Path) -> bool:
    """Exchanges two names at once; False where that cannot be done."""
    try:
        rename = ctypes.CDLL(None).renameat2
    except (AttributeError, OSError, TypeError):
        return False
    paths = os.fsencode(one), os.fsencode(other)
    failed = rename(
        *(_AT_FDCWD, paths[0], _AT_FDCWD, paths[1], _RENAME_EXCHANGE)
    )
    return not failed


def _remove(path: pathlib.Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink()
