"""A directory of vectors that can be searched: LanceDB, embedded.

    index.build("vectors", "index")             # of bit-tf embed
    found = index.open("index")
    hits = found.search(vector, k=10, where="width > 500")

Below ivf_pq.EXACT_BELOW rows a search compares the query with every vector.
At and above, an IVF-PQ index finds the candidates.

The directory holds one LanceDB table, `vectors.lance`, with the columns and
the metadata of bit_tf.embedding_table. Its tag `whole` is the version that is
read: what another process adds is seen when all of it is there, and what a
killed one left is undone by the next. Nobody else should change the table.
"""

import contextlib
import dataclasses
import numbers
import os
import pathlib
import re
import shutil
import urllib.parse
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from bit_tf import embedding_table, errors, files, ivf_pq, near_duplicates
from bit_tf.embedding_table import Facts, Row
from bit_tf.errors import DatasetError
from bit_tf.index_rows import Counts, Rows, quoted, require_direction

__all__ = [
    "Hit",
    "Index",
    "Stats",
    "add",
    "build",
    "open",
]

_TABLE, _WHOLE = "vectors", "whole"
# Where in its source Rust raised an error.
_RUST = re.compile(r",? \S+\.rs:\d+(:\d+)?")
# Characters of a path that LanceDB does not take, and those of ASCII that its
# store of objects does not percent-encode.
_NO_NAME = re.compile("[\x00-\x1f\x7f\ud800-\udfff]")
_AS_THEY_ARE = " !$&'()+,/:;=@"
# The folders of a table of Lance.
_PARTS = {
    *("_deletions", "_indices", "_refs", "_transactions", "_versions"),
    "data",
}
# Texts and names in an SQL expression.
_QUOTES = re.compile(r"""'(?:[^']|'')*'|"(?:[^"]|"")*"|`[^`]*`""")


class Hit(NamedTuple):
    """A row that was found.

    Attributes:
      score: the cosine to the query, in [-1, 1]; higher is nearer.
      row: with its vector, float32 [d].
    """

    score: float
    row: Row


@dataclasses.dataclass(frozen=True)
class Stats:
    """What an index holds.

    Attributes:
      rows: all of them.
      indexed: rows in the IVF-PQ index.
      unindexed: rows that are searched exactly.
      num_partitions, num_sub_vectors: of the IVF-PQ index; None without one.
      bytes: of the directory on the disk.
      index_bytes: of these, the IVF-PQ index.
    """

    rows: int
    indexed: int
    unindexed: int
    num_partitions: int | None
    num_sub_vectors: int | None
    bytes: int
    index_bytes: int


def build(
    vectors: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    directory: str | os.PathLike[str],
    *,
    overwrite: bool = False,
    progress: bool = True,
) -> Counts:
    """Makes an index of what `bit-tf embed` wrote.

    It appears whole, by rename, or not at all. Rows with an error are left
    out. Of rows with the same id, picture and vector one is kept. A second
    process that builds there waits for the first.

    Args:
      vectors: a directory of part-*.parquet, a Parquet file, or several.
      directory: where to make it.
      overwrite: replaces an index that is there.
      progress: shows a bar on a terminal.

    Returns:
      How many rows were added and left out.

    Raises:
      DatasetError: `vectors` are no tables of vectors, are damaged or of
        several models, hold one id with different vectors, or a vector
        without a direction; or `directory` is there.
      MissingExtraError: lancedb or pyarrow is not installed.
      OSError: the index cannot be written.
    """
    _lancedb()
    target = _path(directory)
    source = Rows.of(vectors)
    _require_free(target, overwrite)
    os.makedirs(os.path.dirname(target), exist_ok=True)
    with _lock(target):
        _require_free(target, overwrite)
        with (
            files.new_directory(target, overwrite) as staging,
            _without_twin(staging),
            _lance_errors(directory),
        ):
            table = _connect(staging).create_table(
                _TABLE, schema=source.facts.schema()
            )
            counts = source.enter(table, progress)
            ivf_pq.keep(table, source.facts.dim)
            table.tags.create(_WHOLE, table.version)
        _sweep(target)
    return counts


def add(
    vectors: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    directory: str | os.PathLike[str],
    *,
    progress: bool = True,
) -> Counts:
    """Adds what `bit-tf embed` wrote to an index.

    All of it is added, or nothing. A row whose id is there already, with the
    same picture and vector, is left as it is; with another it replaces the one
    that is there. A second process that adds waits for the first.

    Args:
      vectors: as in `build`, of the index's model and preset.
      directory: of the index.
      progress: shows a bar on a terminal.

    Returns:
      How many rows were added, replaced and left out.

    Raises:
      DatasetError: as in `build`; the vectors are not of the index's model,
        preset and type; or there is no index.
      MissingExtraError: lancedb or pyarrow is not installed.
      OSError: the index cannot be written.
    """
    target = _path(directory)
    source = Rows.of(vectors)
    _open_table(target)
    with _lock(target), _without_twin(target):
        table, facts = _open_table(target)
        facts.require_same(
            source.facts,
            f"The index {os.fsdecode(directory)!r}",
            "Embed the pictures with the index's model and preset, or build "
            "another index.",
        )
        with _lance_errors(directory):
            whole = table.tags.get_version(_WHOLE)
            table.checkout_latest()
            if table.version != whole:
                table.checkout(whole)
                table.restore()
            with _undone(target):
                counts = source.enter(table, progress)
                written = ivf_pq.keep(table, facts.dim)
                table.tags.update(_WHOLE, table.version)
            if written:
                # Nothing is lost where it fails: another time will do.
                with contextlib.suppress(OSError, RuntimeError, ValueError):
                    ivf_pq.clean(table)
                    table.tags.update(_WHOLE, table.version)
    return counts


def open(directory: str | os.PathLike[str]) -> "Index":
    """Opens an index to search it.

    Raises:
      DatasetError: there is none, or it is damaged.
      MissingExtraError: lancedb or pyarrow is not installed.
    """
    return Index(directory)


class Index:
    """An open index, as it is now: what is added later is not seen.

    Args:
      directory: of `build`.

    Attributes:
      directory: as passed.
      facts: what made the vectors.

    Raises:
      DatasetError: there is no index, or it is damaged.
      MissingExtraError: lancedb or pyarrow is not installed.
    """

    facts: Facts

    def __init__(self, directory: str | os.PathLike[str]):
        self.directory = os.fsdecode(directory)
        path = _path(directory)
        self._place = os.path.join(path, f"{_TABLE}.lance")
        self._table, self.facts = _open_table(path)
        self._identity = _identity(self._place)
        with _lance_errors(directory):
            self._rows = self._table.count_rows()
            self._built = ivf_pq.find(self._table)

    def __len__(self) -> int:
        return self._rows

    def search(
        self,
        vector: Any,
        k: int = 10,
        where: str | None = None,
        *,
        exact: bool = False,
    ) -> list[Hit]:
        """The rows nearest to a vector, by cosine.

        Args:
          vector: [d], finite and not all zeros.
          k: how many, at least 1.
          where: an SQL expression over the columns that a row must fulfil,
            such as "width > 500 AND source LIKE '%cat%'".
          exact: compares with every vector even if there is an IVF-PQ index.

        Returns:
          At most k, the nearest first; those equally near in the order of
          their ids. Which of them come, where k cuts between them, is open.

        Raises:
          DatasetError: the vector cannot be compared, k is below 1, or the
            expression is none over these columns.
        """
        query = self._query(vector)
        if not isinstance(k, numbers.Integral) or isinstance(k, bool) or k < 1:
            raise DatasetError(
                "k is an integer of 1 or more. Received: "
                f"{errors.brief(k)}. Pass such a number."
            )
        if where is not None:
            self._require_one(where)
        k = min(int(k), max(1, self._rows))
        cells = None if exact else self._cells(k)

        def found(most: int | None) -> Any:
            search = self._nearby(query, k, cells, most, ivf_pq.REFINE_FACTOR)
            search = search.select([*self._table.schema.names, "_distance"])
            if where is not None:
                search = search.where(where)
            return search.to_arrow()

        with self._expression(where):
            table = found(cells)
            if cells is not None and table.num_rows < k:
                # A filter left few in these cells. To look into as many as it
                # takes costs several times as much even where it takes none.
                table = found(0)
        rows = embedding_table.rows_of(table)
        hits = [
            Hit(_cosine(query, row.embedding), row)
            for row in rows
            if row.embedding is not None
        ]
        return sorted(hits, key=lambda hit: (-hit.score, hit.row.id))

    def row(self, id: str) -> Row:
        """A row with its vector.

        Raises:
          DatasetError: there is none of that id.
        """
        if not isinstance(id, str):
            raise DatasetError(
                f"An id is text. Received: {errors.brief(id)}. Pass its text."
            )
        # What is no text is escaped in ids.
        id = id.encode("utf-8", "backslashreplace").decode()
        with self._errors():
            found = (
                self._table.search()
                .where(f"id = {quoted(id)}")
                .limit(1)
                .to_arrow()
            )
            if found.num_rows:
                return embedding_table.rows_of(found)[0]
            some = self._table.search().select(["id"]).limit(10_000).to_arrow()
        ids = some.column("id").to_pylist()
        shown = " or ".join(map(repr, errors.near(ids, id) or ids[:3]))
        raise DatasetError(
            "An id is one of the column `id` of the index. Received: "
            f"{errors.brief(id)}, which {self.directory!r} does not have. "
            f"It has {shown or 'no rows'}."
        )

    def stats(self) -> Stats:
        """What is in it, and how large it is.

        Raises:
          DatasetError: it cannot be read.
        """
        built = self._built
        with _lance_errors(self.directory):
            size = sum(
                path.stat().st_size
                for path in pathlib.Path(self.directory).rglob("*")
                if path.is_file()
            )
        return Stats(
            rows=self._rows,
            indexed=built.rows if built else 0,
            unindexed=self._rows - (built.rows if built else 0),
            num_partitions=built.num_partitions if built else None,
            num_sub_vectors=built.num_sub_vectors if built else None,
            bytes=size,
            index_bytes=built.bytes if built else 0,
        )

    def near_duplicates(
        self, threshold: float = 0.95, progress: bool = True
    ) -> list[near_duplicates.Group]:
        """Rows that are nearly the same picture.

        Two rows are in one group if their cosine is at least the threshold,
        or if others in between connect them. Without an IVF-PQ index all
        pairs are compared; with one, each row with the nearest that it finds,
        so that some may be missed.

        Args:
          threshold: in (0, 1].
          progress: shows a bar on a terminal.

        Returns:
          The groups of two rows and more, the largest first.

        Raises:
          DatasetError: the threshold is not in (0, 1], or the index cannot be
            read.
        """
        if not isinstance(threshold, numbers.Real) or not 0 < threshold <= 1:
            raise DatasetError(
                "A threshold is a cosine above 0, up to 1. Received: "
                f"{errors.brief(threshold)}."
            )
        nearest = None if self._built is None else self._nearest
        with self._errors():
            return near_duplicates.find(
                self._table, self.facts.dim, threshold, nearest, progress
            )

    def _nearest(self, vectors: np.ndarray, k: int) -> tuple:
        """The k nearest rows of each vector, as near_duplicates asks."""
        cells = self._cells(k)
        search = self._nearby(list(vectors), k, cells, cells, refine_factor=2)
        found = search.select(["_distance"]).with_row_id(True).to_arrow()
        # LanceDB does not number the rows of a single vector.
        which = (
            found.column("query_index").to_numpy()
            if len(vectors) > 1
            else np.zeros(found.num_rows, int)
        )
        return (
            which,
            found.column("_rowid").to_numpy(),
            1 - found.column("_distance").to_numpy(),
        )

    def _cells(self, k: int) -> int | None:
        """How many cells are looked into; None compares with every vector."""
        if self._built is None:
            return None
        return ivf_pq.cells(self._built, self._rows, k)

    def _nearby(
        self,
        vector: np.ndarray | list[np.ndarray],
        k: int,
        cells: int | None,
        most: int | None,
        refine_factor: int,
    ) -> Any:
        """LanceDB's query for the k nearest rows.

        Args:
          vector: float32 [d], or several.
          k: how many.
          cells: as `_cells` says.
          most: cells that are looked into if those hold fewer than k rows; 0
            is all.
          refine_factor: whole vectors that are compared, for every row wanted.
        """
        search = (
            self._table.search(vector, vector_column_name=ivf_pq.COLUMN)
            .distance_type("cosine")
            .limit(k)
        )
        if cells is None:
            return search.bypass_vector_index()
        return (
            search.minimum_nprobes(cells)
            .maximum_nprobes(most)
            .refine_factor(refine_factor)
        )

    def _query(self, vector: Any) -> np.ndarray:
        try:
            query = np.asarray(vector, np.float32)
        except (TypeError, ValueError, OverflowError):
            query = np.empty(0, np.float32)
        if query.shape != (self.facts.dim,):
            raise DatasetError(
                f"A query of this index is a vector of {self.facts.dim} "
                f"numbers. Received: {errors.brief(vector)}. Embed a picture "
                "with the index's model."
            )
        require_direction(query[None], ["the query"])
        return query

    def _is_replaced(self) -> bool:
        return _identity(self._place) != self._identity

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            with _lance_errors(self.directory):
                yield
        except (DatasetError, FileNotFoundError) as error:
            if not self._is_replaced():
                raise
            raise DatasetError(
                "An open index stays where it is. Received: "
                f"{self.directory!r}, which was replaced or removed since. "
                "Open it again."
            ) from error

    def _require_one(self, where: str) -> None:
        """Refuses a filter of which LanceDB would read only the beginning."""
        if not isinstance(where, str) or ";" in _QUOTES.sub("", where):
            raise self._no_filter(where, "one expression, without ;")

    def _no_filter(self, where: object, reason: str) -> DatasetError:
        columns = ", ".join(self._table.schema.names)
        return DatasetError(
            f"A filter is an SQL expression over the columns {columns}, such "
            "as \"width > 500 AND source LIKE '%cat%'\". Received: "
            f"{where!r} ({reason})."
        )

    @contextlib.contextmanager
    def _expression(self, where: str | None) -> Iterator[None]:
        """Explains what Lance says of a filter."""
        with self._errors():
            try:
                yield
            except (ValueError, RuntimeError) as error:
                if where is None or self._is_replaced():
                    raise
                raise self._no_filter(where, _message(error)) from error


def _lancedb():
    return errors.import_extra("lancedb", "index")


def _connect(directory: str):
    return _lancedb().connect(directory)


def _path(directory: str | os.PathLike[str]) -> str:
    """The whole path of an index.

    Raises:
      DatasetError: it has a name that LanceDB does not take.
    """
    named = os.fsdecode(directory)
    if not named:
        raise DatasetError(
            "An index is a directory. Received: an empty name. Name one."
        )
    path = named if "\0" in named else os.path.realpath(named)
    if _NO_NAME.search(path):
        raise DatasetError(
            "The path of an index is text without control characters. "
            f"Received: {path!r}. Name another."
        )
    return path


@contextlib.contextmanager
def _without_twin(directory: str) -> Iterator[None]:
    """Removes the empty folders that LanceDB makes when it makes a tag.

    Their path is the table's, once more percent-encoded.
    """
    encoded = urllib.parse.quote(directory, safe=_AS_THEY_ARE)
    encoded = encoded.replace("~", "%7E")
    place = pathlib.Path(encoded, f"{_TABLE}.lance", "_refs", "tags")
    new = [path for path in (place, *place.parents) if not path.exists()]
    try:
        yield
    finally:
        if encoded != directory:
            for path in new:
                with contextlib.suppress(OSError):
                    path.rmdir()


def _open_table(directory: str) -> tuple[Any, Facts]:
    """The table as it was last whole, and what made it."""
    place = pathlib.Path(directory, f"{_TABLE}.lance")
    if not place.is_dir():
        raise DatasetError(
            "An index is a directory that bit-tf index build made. Received: "
            f"{directory!r}, which is none. Make it with: bit-tf index build "
            "VECTORS --index DIR"
        )
    with _lance_errors(directory):
        table = _connect(directory).open_table(_TABLE)
        table.checkout(_WHOLE)
        return table, Facts.of(table.schema, repr(directory))


def _require_free(directory: str, overwrite: bool) -> None:
    """Refuses to build where something is that must not be replaced."""
    if not os.path.lexists(directory):
        return
    if os.path.isdir(directory) and not os.listdir(directory):
        return
    if not _is_index(directory):
        raise DatasetError(
            "An index is built in a directory of its own. Received: "
            f"{directory!r}, which holds something else. Name another."
        )
    if not overwrite:
        raise DatasetError(
            "An index is built where there is none. Received: "
            f"{directory!r}, which is one. Add to it with bit-tf index add, "
            "or replace it with --overwrite."
        )


def _is_index(directory: str) -> bool:
    """Whether a directory holds an index, whole or damaged, and no more."""
    place = os.path.join(directory, f"{_TABLE}.lance")
    if not os.path.isdir(place) or len(os.listdir(directory)) > 1:
        return False
    try:
        Facts.of(_connect(directory).open_table(_TABLE).schema)
    except DatasetError:
        return False
    except (OSError, RuntimeError, ValueError):
        return _PARTS.issuperset(os.listdir(place))
    return True


def _identity(place: str) -> tuple[int, int] | None:
    """What tells a folder from another at its path; None if none is there."""
    try:
        found = os.stat(place)
    except OSError:
        return None
    return found.st_dev, found.st_ino


def _lock(directory: str) -> contextlib.AbstractContextManager[None]:
    return files.locked(f"{directory}.lock", f"changes the index {directory}")


@contextlib.contextmanager
def _undone(directory: str) -> Iterator[None]:
    """Removes the files that failed work wrote, so that a full disk is not.

    What a killed process wrote stays until LanceDB cleans up, and is not read.
    """
    place = pathlib.Path(directory)
    before = {path for path in place.rglob("*") if path.is_file()}
    try:
        yield
    except BaseException:
        for path in place.rglob("*"):
            if path not in before and path.is_file():
                path.unlink(missing_ok=True)
        raise


def _sweep(directory: str) -> None:
    """Removes what killed processes left beside an index, under its lock."""
    folder, name = os.path.split(directory)
    left = re.compile(rf"\.{re.escape(name)}\.[0-9a-f]{{16}}\.tmp")
    for other in filter(left.fullmatch, os.listdir(folder)):
        if os.path.isdir(os.path.join(folder, other)):
            shutil.rmtree(os.path.join(folder, other), ignore_errors=True)


def _cosine(a: np.ndarray, b: np.ndarray) -> float:
    a, b = a.astype(np.float64), b.astype(np.float64)
    cosine = a @ b / (np.linalg.norm(a) * np.linalg.norm(b))
    return float(np.clip(cosine, -1.0, 1.0))


@contextlib.contextmanager
def _lance_errors(directory: str | os.PathLike[str]) -> Iterator[None]:
    """Turns what LanceDB raises into our exceptions."""
    try:
        yield
    except (errors.BitTfError, FileNotFoundError):
        raise
    except (RuntimeError, ValueError) as error:
        raise DatasetError(
            "An index is whole, and there is room beside it. Received: "
            f"{os.fsdecode(directory)!r}, of which LanceDB says: "
            f"{_message(error)}. Look at the disk, or build it anew with: "
            "bit-tf index build VECTORS --index DIR --overwrite"
        ) from error


def _message(error: Exception) -> str:
    return _RUST.sub("", str(error)).strip().rstrip(".")
