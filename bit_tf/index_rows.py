"""Rows of Parquet files on their way into an index."""

import contextlib
import dataclasses
import hashlib
import os
import sqlite3
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from tqdm import tqdm

from bit_tf import embedding_table, errors
from bit_tf.embedding_table import Facts
from bit_tf.errors import DatasetError

__all__ = ["Counts", "Rows", "quoted", "require_direction", "vectors"]

# Bytes of vectors, about, that are held, and go into the table at once.
_CHUNK = 2**27
_BATCH = 1024
# Between which lengths of vectors cosines can be had in float32.
_SHORTEST, _LONGEST = 1e-15, 1e15


@dataclasses.dataclass
class Counts:
    """What became of the rows of a table of vectors.

    Attributes:
      added: that are new.
      replaced: whose id was there with another picture or vector.
      same: that were there already.
      errors: that hold no vector but an error.
    """

    added: int = 0
    replaced: int = 0
    same: int = 0
    errors: int = 0


@dataclasses.dataclass(frozen=True)
class Rows:
    """Tables of vectors that one model made.

    Attributes:
      paths: of Parquet files, in order.
      facts: of all of them.
    """

    paths: tuple[str, ...]
    facts: Facts

    @classmethod
    def of(
        cls, vectors: str | os.PathLike[str] | Sequence[str | os.PathLike[str]]
    ) -> "Rows":
        """Those of a directory of part-*.parquet, a file, or several.

        Raises:
          DatasetError: one of them is no table of vectors, or of another
            model or preset than the first.
          MissingExtraError: pyarrow is not installed.
        """
        if isinstance(vectors, str | os.PathLike):
            vectors = [vectors]
        if not isinstance(vectors, Iterable):
            raise DatasetError(
                "An index is made of tables of vectors, by their paths. "
                f"Received: {errors.brief(vectors)}. Pass a path, or several."
            )
        names = [os.fsdecode(name) for name in vectors]
        if not names:
            raise DatasetError(
                "An index is made of one table of vectors or more. Received: "
                "none. Write one with: bit-tf embed SOURCE --output DIR"
            )
        found = [embedding_table.read_facts(name) for name in names]
        for name, facts in zip(names[1:], found[1:], strict=True):
            found[0].require_same(
                facts,
                repr(names[0]),
                f"Leave {name!r} out, or embed it with the same model.",
            )
        paths = [
            path
            for name in names
            for path in (
                embedding_table.part_paths(name)
                if os.path.isdir(name)
                else [name]
            )
        ]
        return cls(tuple(paths), found[0])

    def enter(self, table: Any, progress: bool) -> Counts:
        """Puts the rows into a LanceDB table of their schema.

        Args:
          table: it gets several new versions.
          progress: shows a bar on a terminal.

        Returns:
          What became of the rows.

        Raises:
          DatasetError: a file is damaged, one id has two vectors among these
            rows, or a vector has no direction.
        """
        arrow = errors.import_extra("pyarrow", "index")
        counts = Counts()
        chunk: list[Any] = []
        replaced: list[str] = []

        def flush() -> None:
            for start in range(0, len(replaced), _BATCH):
                ids = replaced[start : start + _BATCH]
                table.delete(_any_of(ids))
            if chunk:
                table.add(arrow.Table.from_batches(chunk))
            replaced.clear()
            chunk.clear()

        with (
            _sqlite_errors(),
            tqdm(
                total=self._count(),
                unit="row",
                disable=None if progress else True,
            ) as bar,
            _Known(table) as known,
        ):
            for path, batch in self._batches():
                good = batch.filter(batch.column("error").is_null())
                counts.errors += batch.num_rows - good.num_rows
                _check(good, path)
                keep = known.judge(good, path, counts, replaced)
                if any(keep):
                    chunk.append(good.filter(arrow.array(keep)))
                if sum(part.nbytes for part in chunk) >= _CHUNK:
                    flush()
                bar.update(batch.num_rows)
            flush()
        return counts

    def _count(self) -> int:
        return sum(_file(path).metadata.num_rows for path in self.paths)

    def _batches(self) -> Iterator[tuple[str, Any]]:
        arrow = errors.import_extra("pyarrow", "index")
        size = max(1, min(_BATCH, _CHUNK // (8 * self.facts.dim)))
        for path in self.paths:
            try:
                for batch in _file(path).iter_batches(size):
                    # The handle may be another name of the same model.
                    yield path, batch.replace_schema_metadata()
            except (OSError, arrow.ArrowException) as error:
                raise _damaged(path, error) from error


class _Known:
    """The ids of a table and of what is put into it, on the disk.

    Memory does not grow with their number.

    Args:
      table: a LanceDB table.
    """

    def __init__(self, table: Any):
        self._table = table

    def __enter__(self) -> "_Known":
        # A file without a name, which is gone however this process ends.
        self._data = sqlite3.connect("")
        self._data.executescript(
            "PRAGMA journal_mode = OFF; PRAGMA synchronous = OFF; "
            "CREATE TABLE known (id TEXT PRIMARY KEY, digest BLOB) "
            "WITHOUT ROWID"
        )
        for batch in self._table.search().select(["id"]).to_batches():
            self._data.executemany(
                "INSERT INTO known VALUES (?, NULL)",
                ((id,) for id in batch.column("id").to_pylist()),
            )
        return self

    def __exit__(self, *_: object) -> None:
        self._data.close()

    def judge(
        self, batch: Any, path: str, counts: Counts, replaced: list[str]
    ) -> list[bool]:
        """Which rows of a batch are to be added.

        Args:
          batch: a pyarrow.RecordBatch without nulls.
          path: where it is from.
          counts: is counted up.
          replaced: gets the ids of rows to delete before.
        """
        ids = batch.column("id").to_pylist()
        digests = _digests(batch)
        marks = [self._enter(*pair) for pair in zip(ids, digests, strict=True)]
        old = [id for id, mark in zip(ids, marks, strict=True) if mark is None]
        there = self._stored(old)
        keep = []
        for id, digest, mark in zip(ids, digests, marks, strict=True):
            if mark is None:
                same = there[id] == digest
                counts.same += same
                counts.replaced += not same
                if not same:
                    replaced.append(id)
                keep.append(not same)
            elif mark == b"":
                counts.added += 1
                keep.append(True)
            elif mark == digest:
                counts.same += 1
                keep.append(False)
            else:
                raise DatasetError(
                    "An id has one vector. Received: "
                    f"{errors.brief(id)} with two, the second in {path!r}. "
                    "Leave one of the files out."
                )
        return keep

    def _enter(self, id: str, digest: bytes) -> bytes | None:
        """The digest of that id before: b"" is new, None is in the table."""
        found = self._data.execute(
            "SELECT digest FROM known WHERE id = ?", (id,)
        ).fetchone()
        if found is None or found[0] is None:
            self._data.execute("REPLACE INTO known VALUES (?, ?)", (id, digest))
        return b"" if found is None else found[0]

    def _stored(self, ids: Sequence[str]) -> dict[str, bytes]:
        """The digests of rows in the table."""
        if not ids:
            return {}
        rows = self._table.search().where(_any_of(ids))
        stored: dict[str, bytes] = {}
        for batch in rows.select(["id", "sha256", "embedding"]).to_batches():
            found = batch.column("id").to_pylist()
            stored.update(zip(found, _digests(batch), strict=True))
        return stored


@contextlib.contextmanager
def _sqlite_errors() -> Iterator[None]:
    try:
        yield
    except sqlite3.Error as error:
        raise DatasetError(
            "The ids of an index are kept in a temporary file meanwhile. "
            f"Received: {error}, in {tempfile.gettempdir()!r}. Make room, or "
            "set SQLITE_TMPDIR to a folder that has some."
        ) from error


def _file(path: str):
    arrow = errors.import_extra("pyarrow", "index")
    try:
        return embedding_table.parquet_file(path)
    except (OSError, arrow.ArrowException) as error:
        raise _damaged(path, error) from error


def _damaged(path: str, error: Exception) -> DatasetError:
    return DatasetError(
        "A table of vectors is a whole Parquet file. Received: "
        f"{path!r} ({errors.brief(str(error))}). Write it anew with bit-tf "
        "embed, or restore it."
    )


def _check(batch: Any, path: str) -> None:
    """Refuses rows without an id, and vectors without a direction."""
    if batch.column("id").null_count:
        raise DatasetError(
            f"A row has an id. Received: one without, in {path!r}. Write the "
            "file anew with bit-tf embed."
        )
    if batch.column("source").null_count:
        raise DatasetError(
            f"A row has a source. Received: one without, in {path!r}. Write "
            "the file anew with bit-tf embed."
        )
    require_direction(
        vectors(batch.column("embedding")),
        batch.column("id").to_pylist(),
    )


def _digests(batch: Any) -> list[bytes]:
    """What tells rows of one id apart: the picture and the vector."""
    values = vectors(batch.column("embedding"), exact=True)
    return [
        hashlib.blake2b(
            (sha256 or "").encode() + vector.tobytes(), digest_size=16
        ).digest()
        for sha256, vector in zip(
            batch.column("sha256").to_pylist(), values, strict=True
        )
    ]


def _any_of(ids: Sequence[str]) -> str:
    return f"id IN ({', '.join(map(quoted, ids))})"


def vectors(column: Any, exact: bool = False) -> np.ndarray:
    """A pyarrow column of vectors, none of them null, as [n, d].

    Args:
      column: a fixed_size_list of float32 or halffloat.
      exact: keeps half precision; else float32.
    """
    values = column.flatten().to_numpy(zero_copy_only=False)
    values = values.reshape(len(column), column.type.list_size)
    return values if exact else values.astype(np.float32, copy=False)


def require_direction(values: np.ndarray, names: Sequence[str]) -> None:
    """Refuses vectors that have no cosine.

    Args:
      values: [n, d].
      names: of the n, for the message.

    Raises:
      DatasetError: one is not finite, or has a length of almost nothing.
    """
    with np.errstate(all="ignore"):
        lengths = np.linalg.norm(values.astype(np.float64), axis=1)
    bad = np.flatnonzero(~((lengths > _SHORTEST) & (lengths < _LONGEST)))
    if len(bad):
        raise DatasetError(
            "A vector is finite and not all zeros, so that it has a cosine. "
            f"Received: {errors.brief(names[bad[0]])} of length "
            f"{lengths[bad[0]]:g}. "
            "Look at its picture and at the model, and embed it anew."
        )


def quoted(text: str) -> str:
    """A text in an SQL expression."""
    return "'" + text.replace("'", "''") + "'"
