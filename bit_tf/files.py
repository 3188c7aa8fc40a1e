"""Files and directories that appear whole, by rename, or not at all."""

import contextlib
import os
import pathlib
import secrets
import shutil
from collections.abc import Iterator
from typing import BinaryIO

__all__ = ["new_directory", "new_file"]


@contextlib.contextmanager
def new_file(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """A file to write, which replaces `path` when the block succeeds.

    Yields:
      A binary file, readable too, in the directory of `path`.

    Raises:
      OSError: it cannot be written; what was at `path` is still there.
    """
    staging = _sibling(pathlib.Path(os.path.abspath(path)))
    try:
        with open(staging, "x+b") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(staging, path)
    finally:
        staging.unlink(missing_ok=True)


@contextlib.contextmanager
def new_directory(
    path: str | os.PathLike[str], overwrite: bool = False
) -> Iterator[str]:
    """A directory to fill, which becomes `path` when the block succeeds.

    Args:
      path: must not exist then, unless overwrite.
      overwrite: what was at `path` is removed after the rename.

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
        _sync(staging)
        if overwrite and os.path.lexists(path):
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
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _sibling(path: pathlib.Path) -> pathlib.Path:
    if not path.name:
        raise IsADirectoryError(f"{path} cannot be replaced; name another.")
    return path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")


def _remove(path: pathlib.Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink()


def _sync(directory: pathlib.Path) -> None:
    for folder, _, names in os.walk(directory):
        for name in [*names, "."]:
            descriptor = os.open(os.path.join(folder, name), os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
