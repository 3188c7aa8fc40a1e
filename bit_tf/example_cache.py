"""Undecoded examples of a split, kept where each can be read at once."""

import hashlib
import os
import threading
from collections.abc import Callable

import numpy as np
from tqdm import tqdm

from bit_tf import errors, files
from bit_tf.errors import DatasetError
from bit_tf.split import Split, is_random_access

__all__ = ["Reader", "in_memory", "is_in_memory", "on_disk"]

Reader = Callable[[int], bytes]

_MAGIC = b"bit_tf examples 1\n"
_lock = threading.Lock()


def is_in_memory(split: Split) -> bool:
    """Whether `in_memory` has all records of the split already."""
    return len(_kept(split)) == split.size


def in_memory(split: Split) -> Reader:
    """Keeps records in memory, for as long as the split lives.

    Those of files as they are first asked for; those of a stream all at once.

    Returns:
      Position in the source → record.
    """
    kept = _kept(split)
    source = split.source
    if not is_random_access(source):
        with _lock:
            if not is_in_memory(split):
                # Ascending, a stream holds nothing back.
                order = sorted(split.positions.tolist())
                found = zip(order, source.records(order), strict=True)
                kept.update(list(found))
        return kept.__getitem__
    read = source.read

    def look_up(position: int) -> bytes:
        record = kept.get(position)
        if record is None:
            record = kept[position] = read(position)
        return record

    return look_up


def _kept(split: Split) -> dict[int, bytes]:
    return vars(split).setdefault("_records", {})


def on_disk(
    split: Split, directory: str | os.PathLike[str], progress: bool = True
) -> Reader:
    """Keeps records in one file of a directory, made if it is not there.

    Its name is a hash of the split and of the sizes and times of its files, so
    that what has changed is read anew. Two processes may ask at once.

    Returns:
      Position in the source → record.

    Raises:
      OSError: the file cannot be written or read.
      DatasetError: it is damaged.
    """
    os.makedirs(directory, exist_ok=True)
    digest = hashlib.sha256(split.fingerprint.encode())
    stamps = [split.source.stamp(at) for at in split.positions.tolist()]
    digest.update(np.array(stamps, np.int64).tobytes())
    path = os.path.join(directory, f"{digest.hexdigest()[:32]}.examples")
    if not os.path.exists(path):
        with files.locked(f"{path}.lock", "writes the cache of examples"):
            if not os.path.exists(path):
                _write(split, path, progress)
    ends = _ends(path, split.size)
    index_of = {at: i for i, at in enumerate(split.positions.tolist())}

    def look_up(position: int) -> bytes:
        index = index_of[position]
        start = int(ends[index - 1]) if index else 0
        with open(path, "rb") as file:
            file.seek(len(_MAGIC) + start)
            record = file.read(int(ends[index]) - start)
        if len(record) != ends[index] - start:
            raise _damaged(path)
        return record

    return look_up


def _write(split: Split, path: str, progress: bool) -> None:
    """The records one after another, then int64 [n]: where each ends."""
    ends = []
    end = 0
    with files.new_file(path) as file:
        file.write(_MAGIC)
        for record in tqdm(
            split.source.records(split.positions.tolist()),
            total=split.size,
            desc=f"cache of {split.name}",
            unit=" examples",
            leave=False,
            disable=None if progress else True,
        ):
            file.write(record)
            end += len(record)
            ends.append(end)
        file.write(np.array(ends, "<i8").tobytes())


def _ends(path: str, size: int) -> np.ndarray:
    with open(path, "rb") as file:
        magic = file.read(len(_MAGIC))
        total = file.seek(0, os.SEEK_END)
        file.seek(max(total - 8 * size, 0))
        ends = np.frombuffer(file.read(), "<i8")
    right = (
        magic == _MAGIC
        and len(ends) == size
        and (np.diff(ends, prepend=0) >= 0).all()
        and len(_MAGIC) + ends[-1] + 8 * size == total
    )
    if not right:
        raise _damaged(path)
    return ends


def _damaged(path: str) -> DatasetError:
    return DatasetError(
        "A cache of examples is whole, as it was written. Received: "
        f"{errors.brief(path)}, which is not. Remove the file."
    )
