"""What `bit-tf embed` is to do in a directory, and what is done.

The plan lies on disk: memory does not grow with the number of pictures. It
divides them into shards once; a run that is taken up again has the same ones.
"""

import contextlib
import dataclasses
import json
import os
import re
import sqlite3
import threading
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from bit_tf.errors import DatasetError
from bit_tf.items import Item

__all__ = ["FILE_NAME", "Place", "Plan", "Shard", "part_name"]

FILE_NAME = "_embed.sqlite"

_SCHEMA = 1
# KiB of the database in memory.
_CACHE = 8192
_TABLES = (
    "CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL)",
    "CREATE TABLE items (position INTEGER PRIMARY KEY, id TEXT UNIQUE NOT "
    "NULL, source TEXT, location TEXT)",
    "CREATE TABLE shards (number INTEGER PRIMARY KEY, first INTEGER NOT NULL, "
    "count INTEGER NOT NULL, done INTEGER NOT NULL DEFAULT 0, size INTEGER, "
    "errors INTEGER NOT NULL DEFAULT 0)",
    "CREATE TABLE seen (sha256 BLOB PRIMARY KEY, shard INTEGER NOT NULL, "
    "row INTEGER NOT NULL) WITHOUT ROWID",
)
_URL = re.compile("https?://", re.IGNORECASE)


@dataclasses.dataclass(frozen=True)
class Shard:
    """A file of the table.

    Attributes:
      number: from 0.
      first: the position of its first item, from 1.
      count: items, and rows.
      done: whether the file was written.
      size: of the file, in bytes; None before it was written.
      errors: its rows with an error.
    """

    number: int
    first: int
    count: int
    done: bool
    size: int | None
    errors: int


class Place(NamedTuple):
    """Where the vector of some bytes is: a shard, and a row in it from 0."""

    shard: int
    row: int


def part_name(number: int) -> str:
    """The file's name of a shard."""
    return f"part-{number:05d}.parquet"


class Plan:
    """The plan of one directory; any thread may ask it.

    Args:
      path: of the file, which is made if it is not there.

    Raises:
      DatasetError: it is damaged, of a later version, or cannot be written.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self._path = os.fspath(path)
        self._lock = threading.RLock()
        with self._checked():
            _make(self._path)
            self._database = sqlite3.connect(
                self._path, isolation_level=None, check_same_thread=False
            )
        try:
            with self._checked():
                self._database.execute(f"PRAGMA cache_size = -{_CACHE}")
            with self._transaction() as run:
                known = run("PRAGMA user_version").fetchone()[0]
                if known == 0:
                    for table in _TABLES:
                        run(table)
                    run(
                        "INSERT INTO meta VALUES ('folder', ?)",
                        [json.dumps(_here())],
                    )
                    run(f"PRAGMA user_version = {_SCHEMA}")
                elif known != _SCHEMA:
                    raise DatasetError(
                        f"A plan is of version {_SCHEMA}. Received: "
                        f"{self._path!r} of version {known}. Go on with the "
                        "bit_tf that made it, or write all anew with "
                        "--overwrite."
                    )
            # Paths of ids are relative to it.
            self._folder = json.loads(self.get("folder") or '""')
        except BaseException:
            self._database.close()
            raise

    def __enter__(self) -> "Plan":
        return self

    def __exit__(self, *exc_info: object) -> None:
        with self._lock:
            self._database.close()

    def get(self, key: str) -> str | None:
        """What was kept under a key by `put`."""
        rows = self._rows("SELECT value FROM meta WHERE key = ?", key)
        return rows[0][0] if rows else None

    def put(self, key: str, value: str) -> None:
        """Keeps a text under a key."""
        with self._transaction() as run:
            run("INSERT OR REPLACE INTO meta VALUES (?, ?)", (key, value))

    def add(self, found: Iterable[Item], shard: int) -> int:
        """Adds items that are new at the end, and divides them into shards.

        All of them, or none if this is interrupted. Of an item that is there,
        the place is that of now.

        Args:
          found: taken as they come; of one id the last counts, at the place of
            the first.
          shard: items of a shard.

        Returns:
          How many are new.

        Raises:
          DatasetError: an id is there with the path of another file or
            archive; or what iterating raises.
        """
        with self._transaction() as run:
            (planned,) = run(
                "SELECT coalesce(sum(count), 0) FROM shards"
            ).fetchone()
            (number,) = run(
                "SELECT coalesce(max(number) + 1, 0) FROM shards"
            ).fetchone()
            for item in found:
                values = self._packed(item)
                added = run(
                    "INSERT INTO items (id, source, location) "
                    "VALUES (?, ?, ?) ON CONFLICT (id) DO NOTHING",
                    values,
                )
                if not added.rowcount:
                    known = run(
                        "SELECT id, source, location FROM items WHERE id = ?",
                        [item.id],
                    ).fetchone()
                    if known != values:
                        _require_same_place(self._unpacked(*known), item)
                        run(
                            "UPDATE items SET source = ?, location = ? "
                            "WHERE id = ?",
                            [*values[1:], item.id],
                        )
            (total,) = run("SELECT count(*) FROM items").fetchone()
            for first in range(planned, total, shard):
                run(
                    "INSERT INTO shards (number, first, count) "
                    "VALUES (?, ?, ?)",
                    (number, first + 1, min(shard, total - first)),
                )
                number += 1
        return total - planned

    def shards(self) -> Iterator[Shard]:
        """All shards, in order; what is changed meanwhile may be seen."""
        last = -1
        while rows := self._rows(
            "SELECT number, first, count, done, size, errors FROM shards "
            "WHERE number > ? ORDER BY number LIMIT 1000",
            last,
        ):
            for number, first, count, done, size, errors in rows:
                yield Shard(number, first, count, bool(done), size, errors)
            last = rows[-1][0]

    def counts(self) -> tuple[int, int]:
        """(items, those in shards that are done)."""
        ((total, done),) = self._rows(
            "SELECT coalesce(sum(count), 0), "
            "coalesce(sum(CASE WHEN done THEN count END), 0) FROM shards"
        )
        return total, done

    def erroneous(self) -> int:
        """Rows with an error of shards that are done."""
        ((count,),) = self._rows(
            "SELECT coalesce(sum(errors), 0) FROM shards WHERE done"
        )
        return count

    def items(self, shard: Shard) -> list[Item]:
        """The items of a shard, in order."""
        rows = self._rows(
            "SELECT id, source, location FROM items "
            "WHERE position >= ? AND position < ? ORDER BY position",
            shard.first,
            shard.first + shard.count,
        )
        return [self._unpacked(*row) for row in rows]

    def ids(self, shard: Shard) -> list[str]:
        """The ids of a shard's items, in order."""
        return [item.id for item in self.items(shard)]

    def seen(self, sha256: str, before: int) -> Place | None:
        """Where the vector of these bytes is, in an earlier shard.

        Args:
          sha256: of them, in hexadecimal digits.
          before: the number of a shard.
        """
        rows = self._rows(
            "SELECT shard, row FROM seen WHERE sha256 = ? AND shard < ?",
            bytes.fromhex(sha256),
            before,
        )
        return Place(*rows[0]) if rows else None

    def finish(
        self,
        shard: Shard,
        *,
        size: int,
        errors: int,
        encoded: Iterable[tuple[str, int]],
    ) -> None:
        """Notes that a shard's file is there.

        Args:
          shard: which.
          size: of the file, in bytes.
          errors: its rows with an error.
          encoded: (SHA-256, row) of its rows with a vector.
        """
        with self._transaction() as run:
            for sha256, row in encoded:
                # What is earliest stays: later shards copy from it.
                run(
                    "INSERT INTO seen VALUES (?, ?, ?) ON CONFLICT (sha256) "
                    "DO UPDATE SET shard = excluded.shard, row = excluded.row "
                    "WHERE excluded.shard < shard",
                    (bytes.fromhex(sha256), shard.number, row),
                )
            run(
                "UPDATE shards SET done = 1, size = ?, errors = ? "
                "WHERE number = ?",
                (size, errors, shard.number),
            )

    def reopen(self, shard: Shard) -> None:
        """Notes that a shard's file is not there, or not good."""
        with self._transaction() as run:
            run("DELETE FROM seen WHERE shard = ?", (shard.number,))
            run(
                "UPDATE shards SET done = 0, size = NULL WHERE number = ?",
                (shard.number,),
            )

    def _rows(self, statement: str, *values: object) -> list[tuple]:
        with self._lock, self._checked():
            return self._database.execute(statement, values).fetchall()

    def _packed(self, item: Item) -> tuple[str, str | None, str | None]:
        """An item's columns, without what follows from its id."""
        location = list(item.location)
        usual = self._usual(item.id)
        return (
            item.id,
            None if item.source == item.id else item.source,
            None if location == usual else json.dumps(location),
        )

    def _unpacked(
        self, id_: str, source: str | None, location: str | None
    ) -> Item:
        place = self._usual(id_) if location is None else json.loads(location)
        return Item(id_, id_ if source is None else source, tuple(place))

    def _usual(self, id_: str) -> list[str]:
        if _URL.match(id_):
            return ["url", id_]
        return ["file", os.path.join(self._folder, id_)]

    @contextlib.contextmanager
    def _transaction(self):
        with self._lock:
            try:
                with self._checked():
                    self._database.execute("BEGIN IMMEDIATE")
                    yield self._database.execute
                    self._database.execute("COMMIT")
            except BaseException:
                with contextlib.suppress(sqlite3.Error):
                    self._database.execute("ROLLBACK")
                raise

    @contextlib.contextmanager
    def _checked(self):
        try:
            yield
        except sqlite3.Error as error:
            raise DatasetError(
                "The plan of a directory of vectors can be read and written. "
                f"Received: {self._path!r} ({error}). Make room, or see to "
                "its permissions, and run the same command again; a damaged "
                "one is made anew, with all vectors, by --overwrite."
            ) from error


def _make(path: str) -> None:
    """Makes a file that its owner alone reads: URLs may hold passwords."""
    # What is wrong with the path, the database says.
    with contextlib.suppress(OSError):
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600))


def _here() -> str:
    """The working directory, or "" where it is gone."""
    try:
        return os.getcwd()
    except OSError:
        return ""


def _require_same_place(known: Item, found: Item) -> None:
    """Refuses two files of one name.

    Raises:
      DatasetError: as said.
    """
    places = [
        location[1:2] if location[:1] in (("file",), ("tar",)) else None
        for location in map(tuple, (known.location, found.location))
    ]
    if places[0] != places[1]:
        raise DatasetError(
            f"An id means one picture. Received: {found.id!r} for "
            f"{list(found.location)}, which was {list(known.location)} "
            "before. Run from the same directory as before, or name sources "
            "by absolute paths in another directory of vectors."
        )
