"""The pipeline of `bit-tf embed` on one machine: what a plan has left.

One thread reads, and has pictures decoded by some threads; the caller's thread
makes batches of them, in order, has the model run in others, and writes shards.
"""

import collections
import concurrent.futures
import dataclasses
import hashlib
import itertools
import os
import threading
from collections.abc import Iterator, Sequence
from typing import Any

from tqdm import tqdm

from bit_tf import embedding_table, errors, items
from bit_tf.embed_model import Encoded, Encoder, Prepared
from bit_tf.embed_plan import Place, Plan, Shard, part_name
from bit_tf.embedding_table import Facts, Row
from bit_tf.errors import DatasetError, ImageError

__all__ = ["Engine", "Summary", "noted", "read_shard"]

# Items that are read at once.
_WINDOW = 128
# Bytes that wait for the model: of pictures, decoded or not.
_HELD = 256 * 2**20
# Batches that are in the model at once: what one does not do in parallel, the
# other fills.
_MODEL_CALLS = 2
# Row groups of earlier shards that are kept for duplicates.
_GROUPS = 8
# Errors that a summary holds.
_SHOWN = 5


@dataclasses.dataclass(frozen=True)
class Summary:
    """What a run did.

    Attributes:
      images: rows of the directory, after this run.
      encoded: rows that got a vector from the model.
      duplicates: rows that got the vector of the same bytes.
      errors: rows that got an error.
      skipped: rows that were done before.
      seconds: of this run.
      skipped_errors: of the rows that were done before, those with an error.
      first_errors: (source, error) of the first rows that got one; none where
        Apache Beam ran.
    """

    images: int = 0
    encoded: int = 0
    duplicates: int = 0
    errors: int = 0
    skipped: int = 0
    seconds: float = 0.0
    skipped_errors: int = 0
    first_errors: tuple[tuple[str, str], ...] = ()

    def __str__(self) -> str:
        done = self.encoded + self.duplicates + self.errors
        rate = done / self.seconds if self.seconds else 0.0
        old = ""
        if self.skipped_errors:
            old = f", of them {self.skipped_errors} with an error"
        return (
            f"{self.images} images: {self.encoded} encoded, "
            f"{self.duplicates} duplicates, {self.errors} errors, "
            f"{self.skipped} done before{old}; {self.seconds:.1f} s, "
            f"{rate:.1f} images/s"
        )


class _Work:
    """A shard in hand.

    Attributes:
      shard: of the plan.
      items: its items, in order.
      again: the rows to be done; the others stay as the file has them.
      rows: row → what was found.
      copies: row → what is known of it, and where the same bytes are.
      hashes: SHA-256 of rows that others may copy from.
    """

    def __init__(
        self, shard: Shard, found: list[items.Item], again: Sequence[int]
    ):
        self.shard = shard
        self.items = found
        self.again = again
        self.rows: dict[int, Row] = {}
        self.copies: dict[int, tuple[Row, Place]] = {}
        self.hashes: list[str] = []

    @property
    def complete(self) -> bool:
        """Whether nothing is under way."""
        return len(self.rows) + len(self.copies) == len(self.again)


@dataclasses.dataclass
class _Task:
    """A picture on its way to the model.

    Attributes:
      work: its shard.
      number: of its row.
      row: what is known of it; with an error, it is done.
      copy: where the same bytes are, if they are not decoded again.
      prepared: the picture, else.
      size: bytes that it holds.
    """

    work: _Work
    number: int
    row: Row
    copy: Place | None = None
    prepared: concurrent.futures.Future[Prepared] | None = None
    size: int = 0

    @property
    def ready(self) -> bool:
        return self.prepared is None or self.prepared.done()


@dataclasses.dataclass
class _Batch:
    """Pictures in the model."""

    tasks: list[_Task]
    encoded: concurrent.futures.Future[list[Encoded]]


class _Ahead:
    """What waits for the model: bounded in number and bytes."""

    def __init__(self, count: int, size: int):
        self._count, self._size = count, size
        self._tasks = self._bytes = 0
        self._changed = threading.Condition()
        self.stopped = False

    def enter(self, size: int) -> None:
        """Waits for room for a task, which there is if there is no other.

        Args:
          size: bytes that it will hold, as far as is known.
        """
        with self._changed:
            self._changed.wait_for(
                lambda: (
                    self.stopped
                    or self._tasks == 0
                    or (
                        self._tasks < self._count
                        and self._bytes + size <= self._size
                    )
                )
            )
            self._tasks += 1
            self._bytes += size

    def grow(self, size: int) -> None:
        """Counts bytes that a task came to hold, or holds no more."""
        with self._changed:
            self._bytes += size
            self._changed.notify()

    def leave(self, size: int) -> None:
        """Gives back a task's room."""
        with self._changed:
            self._tasks -= 1
            self._bytes -= size
            self._changed.notify()

    def stop(self) -> None:
        """Lets nobody wait any more."""
        with self._changed:
            self.stopped = True
            self._changed.notify_all()


class Engine:
    """One run over what a plan has left.

    Args:
      plan: of the directory.
      facts: of its table.
      output: the directory.
      encoder: prepares and encodes.
      reader: reads.
      batch: pictures of a batch, at most.
      retry_errors: whether rows of finished shards with an error are done
        again.

    Attributes:
      summary: what was done, but for the time.
    """

    def __init__(
        self,
        plan: Plan,
        facts: Facts,
        output: str,
        *,
        encoder: Encoder,
        reader: items.Reader,
        batch: int,
        retry_errors: bool = False,
    ):
        self._plan = plan
        self._facts = facts
        self._output = output
        self._encoder = encoder
        self._reader = reader
        self._batch = batch
        self._retry = retry_errors
        threads = os.cpu_count() or 1
        self._feeder = concurrent.futures.ThreadPoolExecutor(1)
        # tf.data takes 2.4 times the CPU seconds of this (benchmarks/embed.py
        # --decoding, at 224 pixels), and cannot bound bytes.
        self._decoders = concurrent.futures.ThreadPoolExecutor(threads)
        self._models = concurrent.futures.ThreadPoolExecutor(_MODEL_CALLS)
        self._ahead = _Ahead(4 * max(batch, threads), _HELD)
        # Guards what the threads below hand to the caller's.
        self._changed = threading.Condition()
        self._tasks: collections.deque[_Task] = collections.deque()
        self._fed = False
        self._batches: collections.deque[_Batch] = collections.deque()
        self._works: collections.deque[_Work] = collections.deque()
        # Tasks of the first shard that is not fed whole, by the size of their
        # pictures.
        self._groups: dict[tuple[int, ...], list[_Task]] = {}
        self._grouped = 0
        # SHA-256 → place, in shards that are not finished.
        self._places: dict[str, Place] = {}
        self._copied: collections.OrderedDict[tuple[int, int], list[Row]] = (
            collections.OrderedDict()
        )
        self.summary = Summary()

    def run(self, progress: bool = True) -> None:
        """Does all; what is finished stays, whatever happens.

        Args:
          progress: whether a bar is shown, on a terminal.

        Raises:
          OSError: a shard could not be written.
          DatasetError: the plan could not be written, or an earlier shard,
            whose vectors are copied, is damaged.
        """
        total, done = self._plan.counts()
        bad = self._plan.erroneous()
        if self._retry:
            done, bad = done - bad, 0
        self.summary = Summary(images=total, skipped=done, skipped_errors=bad)
        with tqdm(
            total=total,
            initial=done,
            unit="image",
            disable=None if progress else True,
        ) as bar:
            feeder = self._feeder.submit(self._feed)
            try:
                while (event := self._next()) is not None:
                    if isinstance(event, _Task):
                        self._take(event)
                    else:
                        self._keep(event)
                    while self._works and self._works[0].complete:
                        bar.update(self._finish(self._works.popleft()))
                feeder.result()
            finally:
                self._ahead.stop()
                if not feeder.done():
                    self._reader.close()
                for pool in (self._feeder, self._decoders, self._models):
                    pool.shutdown(cancel_futures=True)

    def _feed(self) -> None:
        """Reads all that is to be done, and has it decoded."""
        slots: collections.deque[tuple[_Work, int]] = collections.deque()

        def wanted() -> Iterator[items.Item]:
            for work in self._shards():
                with self._changed:
                    self._works.append(work)
                for number in work.again:
                    slots.append((work, number))
                    yield work.items[number]

        try:
            for item, data in self._reader.read_all(wanted(), window=_WINDOW):
                task = self._begin(*slots.popleft(), item, data)
                if task is None:
                    return
                with self._changed:
                    self._tasks.append(task)
                    self._changed.notify()
        finally:
            with self._changed:
                self._fed = True
                self._changed.notify()

    def _shards(self) -> Iterator[_Work]:
        """What is left to do, as it is asked for."""
        for shard in self._plan.shards():
            again: Sequence[int] = range(shard.count)
            if shard.done:
                if not (self._retry and shard.errors):
                    continue
                rows = read_shard(self._path(shard), self._facts)
                again = [
                    number
                    for number, row in enumerate(rows)
                    if row.error is not None
                ]
                if not again:
                    continue
            yield _Work(shard, self._plan.items(shard), again)

    def _begin(
        self, work: _Work, number: int, item: items.Item, data
    ) -> _Task | None:
        """Starts a picture, once there is room; None if all is to stop."""
        row = Row(item.id, item.source)
        task = _Task(work, number, row)
        digest = ""
        if isinstance(data, ImageError):
            task.row = row._replace(error=str(data))
        else:
            digest = hashlib.sha256(data).hexdigest()
            task.row = row._replace(sha256=digest)
            task.copy = self._places.get(digest) or self._plan.seen(
                digest, work.shard.number
            )
            if task.copy is None:
                task.size = len(data) + self._encoder.size_of(data)
        self._ahead.enter(task.size)
        if self._ahead.stopped:
            return None
        if digest and task.copy is None:
            self._places[digest] = Place(work.shard.number, number)
            work.hashes.append(digest)
            task.prepared = self._decoders.submit(self._prepare, task, data)
            task.prepared.add_done_callback(self._notify)
        return task

    def _prepare(self, task: _Task, data: bytes) -> Prepared:
        prepared = self._encoder.prepare(data, task.row.sha256)
        more = prepared.picture.nbytes - task.size
        task.size += more
        self._ahead.grow(more)
        return prepared

    def _notify(self, _: object) -> None:
        with self._changed:
            self._changed.notify()

    def _next(self) -> _Task | _Batch | None:
        """The next picture or batch that is ready; None at the end."""
        with self._changed:
            while True:
                if self._batches and self._batches[0].encoded.done():
                    return self._batches.popleft()
                if (
                    self._tasks
                    and len(self._batches) <= _MODEL_CALLS
                    and self._tasks[0].ready
                ):
                    return self._tasks.popleft()
                if self._fed and not self._tasks and not self._batches:
                    return None
                self._changed.wait()

    def _take(self, task: _Task) -> None:
        """Puts a picture into a batch, and starts those that are full."""
        work = task.work
        try:
            if task.prepared is not None:
                prepared = task.prepared.result()
                task.row = task.row._replace(
                    width=prepared.width, height=prepared.height
                )
                group = self._groups.setdefault(prepared.picture.shape, [])
                group.append(task)
                self._grouped += prepared.picture.nbytes
                if len(group) == self._batch:
                    self._encode(prepared.picture.shape)
            elif task.copy is not None:
                work.copies[task.number] = task.row, task.copy
            else:
                work.rows[task.number] = task.row
        except ImageError as error:
            work.rows[task.number] = task.row._replace(error=str(error))
        self._ahead.leave(task.size)
        if task.number == work.again[-1] or self._grouped > _HELD:
            for shape in list(self._groups):
                self._encode(shape)

    def _encode(self, shape: tuple[int, ...]) -> None:
        """Starts a batch of the pictures of one size."""
        tasks = self._groups.pop(shape)
        pictures = []
        for task in tasks:
            assert task.prepared is not None
            pictures.append(task.prepared.result())
            task.prepared = None
            self._grouped -= pictures[-1].picture.nbytes
        encoded = self._models.submit(self._encoder.encode, pictures)
        self._batches.append(_Batch(tasks, encoded))
        encoded.add_done_callback(self._notify)

    def _keep(self, batch: _Batch) -> None:
        """Keeps what the model said."""
        for task, found in zip(
            batch.tasks, batch.encoded.result(), strict=True
        ):
            row = task.row._replace(
                embedding=found.embedding,
                names=found.names,
                scores=found.scores,
            )
            task.work.rows[task.number] = embedding_table.checked(
                row, self._facts
            )

    def _finish(self, work: _Work) -> int:
        """Writes a shard, and notes it; how many pictures were done."""
        shard, path = work.shard, self._path(work.shard)
        encoded = sum(row.error is None for row in work.rows.values())
        rows = work.rows
        if len(work.again) < shard.count:
            rows = {
                **dict(enumerate(read_shard(path, self._facts))),
                **work.rows,
            }
        duplicates = 0
        for number, (row, place) in sorted(work.copies.items()):
            other = (
                rows[place.row]
                if place.shard == shard.number
                else self._earlier(place)
            )
            rows[number] = other._replace(id=row.id, source=row.source)
            duplicates += other.error is None
        table = [rows[number] for number in range(shard.count)]
        embedding_table.write(path, table, self._facts)
        self._plan.finish(shard, size=os.path.getsize(path), **noted(table))
        for digest in work.hashes:
            del self._places[digest]
        done = len(work.again)
        before = self.summary
        self.summary = dataclasses.replace(
            before,
            encoded=before.encoded + encoded,
            duplicates=before.duplicates + duplicates,
            errors=before.errors + done - encoded - duplicates,
            first_errors=(before.first_errors + _failed(table, work.again))[
                :_SHOWN
            ],
        )
        return done

    def _earlier(self, place: Place) -> Row:
        """A row of a shard that is finished."""
        group, number = divmod(place.row, embedding_table.ROW_GROUP)
        key = place.shard, group
        if key not in self._copied:
            path = os.path.join(self._output, part_name(place.shard))
            self._copied[key] = read_shard(path, self._facts, group)
            if len(self._copied) > _GROUPS:
                self._copied.popitem(last=False)
        self._copied.move_to_end(key)
        return self._copied[key][number]

    def _path(self, shard: Shard) -> str:
        return os.path.join(self._output, part_name(shard.number))


def _failed(
    table: Sequence[Row], numbers: Sequence[int]
) -> tuple[tuple[str, str], ...]:
    """(source, error) of the first of some rows that have one."""
    found = ((table[number].source, table[number].error) for number in numbers)
    failed = ((source, error) for source, error in found if error is not None)
    return tuple(itertools.islice(failed, _SHOWN))


def read_shard(path: str, facts: Facts, group: int | None = None) -> list[Row]:
    """The rows of a shard.

    Args:
      path: of its file.
      facts: those it must have.
      group: one row group, instead of all.

    Raises:
      DatasetError: it is damaged, or of another model.
    """
    arrow = errors.import_extra("pyarrow", "parquet")
    try:
        with embedding_table.parquet_file(path) as file:
            Facts.of(file.schema_arrow, repr(path)).require_same(
                facts, repr(path), "Write it anew."
            )
            table = (
                file.read(use_threads=False)
                if group is None
                else file.read_row_group(group, use_threads=False)
            )
            return embedding_table.rows_of(table)
    except (OSError, arrow.ArrowException) as error:
        raise DatasetError(
            f"A shard is a whole Parquet file. Received: {path!r} "
            f"({errors.brief(str(error))}). Remove it, and run the same "
            "command again."
        ) from error


def noted(rows: Sequence[Row]) -> dict[str, Any]:
    """What the plan notes of a shard's rows."""
    return {
        "errors": sum(row.error is not None for row in rows),
        "encoded": [
            (row.sha256, number)
            for number, row in enumerate(rows)
            if row.error is None
        ],
    }
