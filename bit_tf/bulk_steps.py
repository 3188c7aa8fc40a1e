"""The steps of a Beam pipeline that makes vectors, each for itself."""

import collections
import concurrent.futures
import contextlib
import dataclasses
import hashlib
import io
import json
import os
import threading
import time
from collections.abc import Generator, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from bit_tf import bulk_output, embedding_table, errors, items
from bit_tf.beam_modules import Metrics, beam, inference
from bit_tf.bulk_options import cores
from bit_tf.embed_model import Encoder, Prepared
from bit_tf.embedding_table import Facts, Row
from bit_tf.items import Item
from bit_tf.presets import Preset

__all__ = [
    "NAMESPACE",
    "EncoderHandler",
    "Handled",
    "Picture",
    "Pictures",
    "ReadAndDecode",
    "Write",
    "by_id",
    "first",
    "forget",
    "ids",
    "load",
    "missing",
    "numbered",
    "rows_of",
    "shard_count",
]

# Of the pipeline's metrics.
NAMESPACE = "bit_tf"
# Few pictures are still divided into about this many shards, so that every
# worker has some, but not into smaller ones than this.
_SHARDS = 32
_LEAST = 128
# Consecutive examples of a dataset of TFDS that are read together.
_SLICE = 128
# The kind of error of a vector that no table can keep.
_UNFIT = "Vector"

_lock = threading.Lock()
_encoders: dict[tuple, Encoder] = {}


class Picture(NamedTuple):
    """An item before the model.

    Attributes:
      item: the item.
      prepared: the picture, or what was wrong with it.
      sha256: of its bytes; None if they were not read.
    """

    item: Item
    prepared: Prepared | errors.ImageError
    sha256: str | None


@dataclasses.dataclass(frozen=True)
class Pictures:
    """A batch of one shard's pictures, before the model.

    Attributes:
      shard: its number.
      shards: how many there are.
      total: items of this shard.
      entries: at most a batch of them.
    """

    shard: int
    shards: int
    total: int
    entries: list[Picture]

    def __len__(self) -> int:
        return len(self.entries)


@dataclasses.dataclass(frozen=True)
class Handled:
    """The same batch after the model.

    Attributes:
      shard, shards, total: as those of Pictures.
      rows: each a row and the kind of its error, "" if there is none.
    """

    shard: int
    shards: int
    total: int
    rows: list[tuple[Row, str]]


class EncoderHandler(inference.ModelHandler):
    """What RunInference calls: Pictures → Handled, one for one.

    The model is loaded once a process and shared by its threads.

    Args:
      model: a TF-Hub handle, a SavedModel directory or an archive.
      preset: how pictures are prepared; None is the model card's.
      top: how many classes a row names.
      facts: what made the table; a worker that finds another model at the
        handle refuses. None takes what is there.
      threads: of TensorFlow; None leaves its default, all cores.
      precision: see bit_tf.BitMedium2Vec.
    """

    def __init__(
        self,
        model: str | os.PathLike[str],
        preset: str | Preset | None = None,
        top: int | None = None,
        facts: Facts | None = None,
        threads: int | None = None,
        precision: str = "float32",
    ):
        super().__init__()
        self._model = model
        self._preset = preset
        self._top = top
        self._facts = facts
        self._threads = threads
        self._precision = precision

    def load_model(self) -> Encoder:
        return load(
            self._model,
            self._preset,
            self._top,
            self._facts,
            self._threads,
            self._precision,
        )

    def run_inference(
        self,
        batch: Any,
        model: Encoder,
        inference_args: Mapping[str, Any] | None = None,
    ) -> Iterator[Handled]:
        start = time.monotonic()
        facts = self._facts or model.facts()
        good = [
            entry.prepared
            for entry in batch.entries
            if isinstance(entry.prepared, Prepared)
        ]
        encoded = iter(model.encode(good) if good else ())
        rows = []
        for item, prepared, sha256 in batch.entries:
            row, kind = Row(item.id, item.source, sha256), ""
            if isinstance(prepared, Prepared):
                row = Row(
                    *row[:3], prepared.width, prepared.height, *next(encoded)
                )
                row = embedding_table.checked(row, facts)
                kind = _UNFIT if row.error is not None else ""
            else:
                row = row._replace(error=str(prepared))
                kind = type(prepared).__name__
            rows.append((row, kind))
        if good:
            _distribution("model_ms").update(_milliseconds(start))
        _counter("images").inc(len(rows))
        bad = sum(1 for _, kind in rows if kind)
        _counter("encoded").inc(len(rows) - bad)
        _counter("errors").inc(bad)
        yield Handled(batch.shard, batch.shards, batch.total, rows)

    def get_num_bytes(self, batch: Any) -> int:
        return sum(
            entry.prepared.picture.nbytes
            for entry in batch.entries
            if isinstance(entry.prepared, Prepared)
        )

    def get_metrics_namespace(self) -> str:
        return NAMESPACE

    def should_skip_batching(self) -> bool:
        # They come as batches, each of one shard.
        return True


class ReadAndDecode(beam.DoFn):
    """(shard's number, packed items) → Pictures.

    Reading and decoding run ahead in threads while the model, which runners
    put behind this step in one thread, is at work.
    """

    def __init__(
        self,
        handler: EncoderHandler,
        batch: int,
        threads: int | None,
        options: dict[str, Any],
    ):
        super().__init__()
        self._handler = handler
        self._batch = batch
        self._threads = threads
        self._options = options

    def setup(self) -> None:
        self._encoder = self._handler.load_model()
        self._reader = items.Reader(**self._options)
        self._reader.__enter__()

    def teardown(self) -> None:
        self._reader.__exit__(None, None, None)

    def process(
        self, element: tuple[int, Iterable[str]], shards: int
    ) -> Iterator[Pictures]:
        number, packed = element
        # In one order, so that a shard that is tried again has the same
        # batches, and archives are read from front to back.
        todo = sorted(map(_unpack, packed), key=_place)
        entries: list[Picture] = []
        with contextlib.closing(self._decoded(todo)) as decoded:
            for entry in decoded:
                entries.append(entry)
                if len(entries) == self._batch:
                    yield Pictures(number, shards, len(todo), entries)
                    entries = []
        if entries:
            yield Pictures(number, shards, len(todo), entries)

    def _decoded(self, todo: list[Item]) -> Generator[Picture, None, None]:
        ahead = 2 * self._batch
        futures: collections.deque = collections.deque()
        pool = concurrent.futures.ThreadPoolExecutor(self._threads or cores())
        read = self._reader.read_all(todo)
        more = True
        try:
            while more or futures:
                while more and len(futures) < ahead:
                    start = time.monotonic()
                    pair = next(read, None)
                    if pair is None:
                        more = False
                        break
                    _distribution("read_ms").update(_milliseconds(start))
                    futures.append(pool.submit(self._prepare, *pair))
                if futures:
                    picture, milliseconds = futures.popleft().result()
                    if milliseconds is not None:
                        _distribution("decode_ms").update(milliseconds)
                    yield picture
        finally:
            pool.shutdown(cancel_futures=True)
            read.close()

    def _prepare(
        self, item: Item, data: bytes | errors.ImageError
    ) -> tuple[Picture, int | None]:
        if isinstance(data, errors.ImageError):
            return Picture(item, data, None), None
        start = time.monotonic()
        sha256 = hashlib.sha256(data).hexdigest()
        prepared: Prepared | errors.ImageError
        try:
            prepared = self._encoder.prepare(data, sha256)
        except errors.ImageError as error:
            prepared = error
        return Picture(item, prepared, sha256), _milliseconds(start)


class Write(beam.DoFn):
    """Handled → names of files, each a whole shard."""

    def __init__(self, output: str, run_name: str, facts: Facts):
        super().__init__()
        self._output = output
        self._run = run_name
        self._facts = facts

    def start_bundle(self) -> None:
        self._open: dict[int, list[tuple[Row, str]]] = {}

    def process(self, handled: Handled) -> Iterator[str]:
        rows = self._open.setdefault(handled.shard, [])
        rows += handled.rows
        if len(rows) == handled.total:
            del self._open[handled.shard]
            name = f"{self._run}-{handled.shard:05}-of-{handled.shards:05}"
            yield self._write(name, rows)

    def finish_bundle(self) -> None:
        if self._open:
            raise RuntimeError(
                "A shard's batches must reach the step that writes them in "
                "one bundle, which runners do that fuse steps. Received: only "
                f"a part of the shards {sorted(self._open)}. Use another "
                "runner, or bulk.Embed with a writer of your own."
            )

    def _write(self, name: str, rows: list[tuple[Row, str]]) -> str:
        dead = [(row, kind) for row, kind in rows if kind]
        if dead:
            lines = [
                json.dumps(
                    {
                        "id": row.id,
                        "source": row.source,
                        "kind": kind,
                        "message": row.error,
                    }
                )
                for row, kind in dead
            ]
            bulk_output.put(
                bulk_output.join(self._output, bulk_output.ERRORS),
                f"part-{name}.jsonl",
                ("\n".join(lines) + "\n").encode(),
            )
        table = io.BytesIO()
        embedding_table.write(table, [row for row, _ in rows], self._facts)
        return bulk_output.put(
            self._output, f"part-{name}.parquet", table.getvalue()
        )


def load(
    model: str | os.PathLike[str],
    preset: str | Preset | None,
    top: int | None,
    facts: Facts | None = None,
    threads: int | None = None,
    precision: str = "float32",
) -> Encoder:
    """This process' encoder, made once: see EncoderHandler.

    Raises:
      DatasetError: it is not the one that `facts` are of.
      HandleError: there is no such model.
    """
    model = os.fsdecode(model)
    key = (model, preset, top, precision)
    with _lock:
        if key not in _encoders:
            if threads is not None:
                _limit(threads)
            _encoders.clear()
            _encoders[key] = Encoder(model, preset, top, precision)
        encoder = _encoders[key]
    if facts is not None:
        facts.require_same(
            encoder.facts(float16=facts.float16),
            "The process that started the pipeline",
            "Have every worker read the same model.",
        )
    return encoder


def _limit(threads: int) -> None:
    import tensorflow as tf

    # A process that used TensorFlow before keeps what it has.
    with contextlib.suppress(RuntimeError):
        tf.config.threading.set_intra_op_parallelism_threads(threads)
        tf.config.threading.set_inter_op_parallelism_threads(threads)


def forget() -> None:
    """Lets go of this process' encoder."""
    with _lock:
        _encoders.clear()


def _pack(item: Item) -> str:
    # File names may hold surrogates, which Beam's coder of text refuses.
    return json.dumps([item.id, item.source, list(item.location)])


def _unpack(text: str) -> Item:
    name, source, location = json.loads(text)
    return Item(name, source, tuple(location))


def by_id(item: Item) -> tuple[str, str]:
    """Item → (id, packed item)."""
    return item.id, _pack(item)


def first(group: tuple[str, Iterable[str]]) -> tuple[str, str]:
    """(id, packed items) → (id, one of them, always the same)."""
    return group[0], min(group[1])


def missing(
    group: tuple[str, Mapping[str, Iterable]],
) -> Iterator[tuple[str, str]]:
    """(id, packed items and whether a table has it) → (id, one), if not."""
    name, values = group
    packed = list(values["wanted"])
    if not packed:
        return
    if any(True for _ in values["done"]):
        _counter("skipped").inc()
    else:
        yield name, min(packed)


def _place(item: Item) -> tuple[str, ...]:
    """What sorts items by where they are."""
    numbers_as_text = (
        f"{part:020}" if isinstance(part, int) else str(part)
        for part in item.location
    )
    return *numbers_as_text, item.id


def shard_count(count: int, shard: int) -> int:
    """How many shards of at most about `shard` items there are."""
    size = min(shard, max(_LEAST, count // _SHARDS))
    return -(-count // size)


def numbered(pair: tuple[str, str], shards: int) -> tuple[int, str]:
    """(id, packed item) → (its shard's number, packed item).

    Neighbours in a dataset of TFDS, which is read in slices, stay together.
    """
    item = _unpack(pair[1])
    key = item.id
    if item.location[0] == "tfds":
        key = json.dumps([*item.location[:-1], item.location[-1] // _SLICE])
    digest = hashlib.blake2b(key.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") % shards, pair[1]


def rows_of(handled: Handled) -> Iterator[Row]:
    """A batch's rows."""
    for row, _ in handled.rows:
        yield row


def ids(
    path: str, facts: Facts, retry_errors: bool
) -> Iterator[tuple[str, bool]]:
    """The ids of a table that are done, as keys."""
    for name, failed in bulk_output.read_ids(path, facts):
        if not (failed and retry_errors):
            yield name, True


def _counter(name: str):
    return Metrics.counter(NAMESPACE, name)


def _distribution(name: str):
    return Metrics.distribution(NAMESPACE, name)


def _milliseconds(start: float) -> int:
    return round(1000 * (time.monotonic() - start))
