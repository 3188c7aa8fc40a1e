"""Rows of a LanceDB table that are nearly the same picture."""

import collections
import hashlib
import tempfile
from collections.abc import Callable, Iterator, Sequence
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from tqdm import tqdm

from bit_tf.embedding_table import Row
from bit_tf.index_rows import vectors

__all__ = [
    "Group",
    "Member",
    "find",
]

# Rows that are compared with as many others at once, and bytes of them.
_BLOCK, _BLOCK_BYTES = 4096, 2**26
# How many of the nearest of an index a row is compared with, and of how many
# rows at once.
_NEAREST, _AT_ONCE = 32, 64
# What rounding of float32 products takes from a cosine, at most.
_ROUNDING = 1e-5


class Member(NamedTuple):
    """A row of a group.

    Attributes:
      score: its cosine to the nearest other member.
      same_file: whether another member has the same bytes.
      row: without its vector.
    """

    score: float
    same_file: bool
    row: Row


class Group(NamedTuple):
    """Rows that are nearly the same picture, in the order of their ids."""

    members: list[Member]


def find(
    table: Any,
    dim: int,
    threshold: float,
    nearest: Callable[[np.ndarray, int], tuple] | None,
    progress: bool,
) -> list[Group]:
    """Groups of rows whose cosines reach a threshold, the largest first.

    Args:
      table: a LanceDB table with the columns of embedding_table.
      dim: d, the length of a vector.
      threshold: in (0, 1]; cosines are compared to 1e-5.
      nearest: (vectors [n, d], k) → the k nearest rows of each, as arrays: of
        which of the n, row ids, cosines; None compares all pairs.
      progress: shows a bar on a terminal.
    """
    row_ids = np.sort(
        np.concatenate(
            [
                np.empty(0, np.uint64),
                *(
                    batch.column("_rowid").to_numpy()
                    for batch in _scan(table, ["_rowid"])
                ),
            ]
        )
    )
    links = _Links(len(row_ids))
    with (
        tempfile.TemporaryFile() as file,
        tqdm(
            total=len(row_ids),
            unit="row",
            disable=None if progress else True,
        ) as bar,
    ):
        if nearest is None:
            numbers = _write_units(table, row_ids, links, file)
            _compare_all(file, numbers, dim, threshold - _ROUNDING, links, bar)
        else:
            for numbers, values in _batches(table, row_ids, _AT_ONCE):
                which, found, cosines = nearest(values, _NEAREST)
                others = np.searchsorted(row_ids, found)
                near = (cosines >= threshold - _ROUNDING) & (
                    others != numbers[which]
                )
                for place in np.unique(which[near]):
                    mine = near & (which == place)
                    links.join(int(numbers[place]), others[mine], cosines[mine])
                bar.update(len(numbers))
    return _groups(table, row_ids, links)


class _Links:
    """Which rows belong together: a union-find over their numbers.

    Attributes:
      best: the cosine of each row to its nearest, −1 where none was near.
    """

    def __init__(self, count: int):
        self._parent = np.arange(count)
        self.best = np.full(count, -1.0, np.float32)

    def root(self, number: int) -> int:
        parent = self._parent
        while parent[number] != number:
            parent[number] = parent[parent[number]]
            number = parent[number]
        return int(number)

    def roots(self, numbers: np.ndarray) -> np.ndarray:
        """The roots of many; these are shortcut."""
        found = self._parent[numbers]
        while True:
            above = self._parent[found]
            if np.array_equal(above, found):
                break
            found = above
        self._parent[numbers] = found
        return found

    def join(
        self, number: int, others: np.ndarray, cosines: np.ndarray
    ) -> None:
        """Puts rows into the group of one."""
        if not len(others):
            return
        self.best[number] = max(self.best[number], cosines.max())
        self.best[others] = np.maximum(self.best[others], cosines)
        mine = self.root(number)
        for other in np.unique(self.roots(others)):
            theirs = self.root(int(other))
            # The smallest number is the root, whatever the order.
            mine, theirs = min(mine, theirs), max(mine, theirs)
            self._parent[theirs] = mine

    def groups(self) -> np.ndarray:
        """The number of each row's group; −1 where it is alone."""
        roots = self.roots(np.arange(len(self._parent)))
        _, inverse, counts = np.unique(
            roots, return_inverse=True, return_counts=True
        )
        return np.where(counts[inverse] > 1, inverse, -1)


def _write_units(
    table: Any, row_ids: np.ndarray, links: _Links, file: BinaryIO
) -> np.ndarray:
    """Writes the vectors, of length 1, to a file, equal ones once.

    Returns:
      The number of the row of each.
    """
    first: dict[bytes, int] = {}
    kept = []
    for numbers, values in _batches(table, row_ids, _BLOCK):
        lengths = np.linalg.norm(
            values.astype(np.float64), axis=1, keepdims=True
        )
        units = (values / lengths).astype(np.float32)
        for number, unit in zip(map(int, numbers), units, strict=True):
            digest = hashlib.blake2b(unit.tobytes(), digest_size=16).digest()
            same = first.setdefault(digest, number)
            if same == number:
                kept.append(number)
                file.write(unit.tobytes())
            else:
                links.join(same, np.array([number]), np.ones(1, np.float32))
    return np.array(kept, int)


def _compare_all(
    file: BinaryIO,
    numbers: np.ndarray,
    dim: int,
    threshold: float,
    links: _Links,
    bar: Any,
) -> None:
    """Joins all pairs of rows whose cosine reaches the threshold."""
    size = max(1, min(_BLOCK, _BLOCK_BYTES // (4 * dim)))
    bar.reset(len(numbers) * (len(numbers) + 1) // 2)
    bar.unit, bar.unit_scale = "pair", True

    def block(start: int) -> np.ndarray:
        file.seek(4 * dim * start)
        count = min(size, len(numbers) - start)
        data = file.read(4 * dim * count)
        return np.frombuffer(data, np.float32).reshape(count, dim)

    for top in range(0, len(numbers), size):
        rows = block(top)
        for left in range(top, len(numbers), size):
            columns = rows if left == top else block(left)
            cosines = rows @ columns.T
            if left == top:
                cosines[np.tril_indices(len(rows))] = -1
            near = cosines >= threshold
            for row in np.flatnonzero(near.any(axis=1)):
                others = np.flatnonzero(near[row])
                links.join(
                    int(numbers[top + row]),
                    numbers[left + others],
                    cosines[row, others],
                )
            bar.update(
                len(rows) * (len(rows) + 1) // 2
                if left == top
                else cosines.size
            )


def _groups(table: Any, row_ids: np.ndarray, links: _Links) -> list[Group]:
    belongs = links.groups()
    rows: dict[int, list[tuple[float, Row]]] = collections.defaultdict(list)
    columns = [
        name
        for name in table.schema.names
        if name not in ("embedding", "error")
    ]
    for batch in _scan(table, [*columns, "_rowid"]):
        numbers = np.searchsorted(row_ids, batch.column("_rowid").to_numpy())
        chosen = np.flatnonzero(belongs[numbers] >= 0)
        found = [
            Row(**cells)
            for cells in batch.select(columns).take(chosen).to_pylist()
        ]
        for number, row in zip(numbers[chosen], found, strict=True):
            score = float(min(1.0, links.best[number]))
            rows[int(belongs[number])].append((score, row))
    groups = []
    for pairs in rows.values():
        files = collections.Counter(row.sha256 for _, row in pairs)
        groups.append(
            Group(
                [
                    Member(
                        score, bool(row.sha256) and files[row.sha256] > 1, row
                    )
                    for score, row in sorted(pairs, key=lambda pair: pair[1].id)
                ]
            )
        )
    return sorted(
        groups, key=lambda group: (-len(group.members), group.members[0].row.id)
    )


def _scan(table: Any, columns: Sequence[str]) -> Iterator[Any]:
    """Batches of all rows with these columns and, if asked, `_rowid`."""
    names = [name for name in columns if name != "_rowid"] or ["id"]
    search = table.search().select(names)
    if "_rowid" in columns:
        search = search.with_row_id(True)
    yield from search.to_batches(batch_size=1024)


def _batches(
    table: Any, row_ids: np.ndarray, size: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(numbers [n], vectors [n, d]) of all rows, n up to the size."""
    for batch in _scan(table, ["embedding", "_rowid"]):
        numbers = np.searchsorted(row_ids, batch.column("_rowid").to_numpy())
        values = vectors(batch.column("embedding"))
        for start in range(0, len(numbers), size):
            chosen = slice(start, start + size)
            yield numbers[chosen], values[chosen]
