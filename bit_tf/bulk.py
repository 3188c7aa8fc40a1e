"""Vectors of many pictures as an Apache Beam pipeline, on one machine or many.

    bulk.run(["photos/"], "vectors/", model=handle,
             beam_options=["--runner=DirectRunner"])

The steps: find the items | leave out what the directory has | divide into
shards | read and decode | RunInference | write. The tables are those of
bit_tf.embed_run. Items are divided into shards by a hash of their ids before
they are read: what a worker does twice, because a runner tried it again, has
the same file name and the same rows, and a shard that is written stays, however
the pipeline ends.

The model handler is one of our own: Beam's for TensorFlow loads Keras models
only (https://github.com/apache/beam/issues/30616), and these are SavedModels.
"""

import _thread
import contextlib
import dataclasses
import json
import os
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from bit_tf import bulk_output, bulk_steps, errors, items
from bit_tf.beam_modules import MetricsFilter, beam, inference
from bit_tf.bulk_options import options, threads_of
from bit_tf.bulk_steps import EncoderHandler, ReadAndDecode, Write
from bit_tf.embed_engine import Summary
from bit_tf.embedding_table import Facts
from bit_tf.errors import DatasetError
from bit_tf.items import Item
from bit_tf.presets import Preset

__all__ = ["Embed", "EncoderHandler", "build", "options", "run"]


class Embed(beam.PTransform):
    """Items → rows of a table, in no order.

    Args:
      model: a TF-Hub handle, a SavedModel directory or an archive; every
        worker must find it.
      preset: how pictures are prepared, one or a name; None is the model
        card's, or else "big_transfer eval".
      batch: pictures a batch.
      shard: pictures that are divided together, at most about that many.
      top: how many classes a row names; None is five for a classifier, none
        for another model.
      facts: see EncoderHandler.
      threads: of TensorFlow and of decoding in each process; None is as many
        as there are cores.
      precision: see bit_tf.BitMedium2Vec.
      reader: options of bit_tf.items.Reader.
    """

    def __init__(
        self,
        model: str | os.PathLike[str],
        *,
        preset: str | Preset | None = None,
        batch: int = 8,
        shard: int = 1024,
        top: int | None = None,
        facts: Facts | None = None,
        threads: int | None = None,
        precision: str = "float32",
        reader: Mapping[str, Any] | None = None,
    ):
        super().__init__()
        self._shard = shard
        self._handler = EncoderHandler(
            model, preset, top, facts, threads, precision
        )
        self._read = ReadAndDecode(
            self._handler, batch, threads, dict(reader or {})
        )

    def expand(self, pcoll):
        return (
            pcoll
            | "Pack" >> beam.Map(bulk_steps.by_id)
            | "OfOneId" >> beam.GroupByKey()
            | "First"
            >> beam.Map(bulk_steps.first).with_output_types(tuple[str, str])
            | "Handle" >> _Handle(self._shard, self._read, self._handler)
            | "Rows" >> beam.FlatMap(bulk_steps.rows_of)
        )


class _Handle(beam.PTransform):
    """(id, packed item), each once → Handled."""

    def __init__(self, shard: int, read: "ReadAndDecode", handler):
        super().__init__()
        self._shard = shard
        self._read = read
        self._handler = handler

    def expand(self, pcoll):
        shards = (
            pcoll
            | "Count" >> beam.combiners.Count.Globally()
            | "Divide" >> beam.Map(bulk_steps.shard_count, self._shard)
        )
        count = beam.pvalue.AsSingleton(shards)
        return (
            pcoll
            | "Number" >> beam.Map(bulk_steps.numbered, count)
            | "Shards" >> beam.GroupByKey()
            | "ReadAndDecode" >> beam.ParDo(self._read, count)
            | "RunInference" >> inference.RunInference(self._handler)
        )


def build(
    pipeline,
    sources,
    output: str | os.PathLike[str],
    *,
    model: str | os.PathLike[str],
    preset: str | Preset | None = None,
    batch: int = 8,
    shard: int = 1024,
    float16: bool = False,
    top: int | None = None,
    threads: int | None = None,
    precision: str = "float32",
    column: str | None = None,
    split: str | None = None,
    data_dir: str | None = None,
    run_name: str | None = None,
    **reader,
):
    """Adds the whole way from sources to files to a pipeline.

    Args:
      pipeline: a beam.Pipeline.
      sources: one or several, each whatever bit_tf.items.find takes; or a
        PCollection of Items.
      output: a directory, of any file system that Beam knows. Items whose ids
        its tables have are left out.
      model, preset, batch, threads, precision: see Embed.
      shard: rows of a file, about, and at most a little more.
      float16: whether vectors are kept in half precision.
      top: how many classes a row names; None is five for a classifier, none
        for another model.
      column, split, data_dir: see bit_tf.items.find.
      run_name: in the files' names; None takes the time and a random end.
      **reader: options of bit_tf.items.Reader.

    Returns:
      A PCollection of the names of the files, each as it is written.

    Raises:
      DatasetError: the directory has vectors of another model or preset, or is
        the local engine's.
      HandleError: there is no such model.
    """
    plan = _Plan.checked(
        output,
        model=model,
        preset=preset,
        batch=batch,
        shard=shard,
        float16=float16,
        top=top,
        threads=threads,
        precision=precision,
        **reader,
    )
    bulk_output.check(plan.output, bulk_output.parts(plan.output), plan.facts)
    search = {"column": column, "split": split, "data_dir": data_dir}
    return plan.add(
        pipeline, sources, search, run_name or bulk_output.new_name()
    )


@dataclasses.dataclass(frozen=True)
class _Plan:
    """What a pipeline is to do; all of it was checked."""

    output: str
    facts: Facts
    handler: EncoderHandler
    read: ReadAndDecode
    shard: int

    @classmethod
    def checked(
        cls,
        output: str | os.PathLike[str],
        *,
        model: str | os.PathLike[str],
        preset: str | Preset | None = None,
        batch: int = 8,
        shard: int = 1024,
        float16: bool = False,
        top: int | None = None,
        threads: int | None = None,
        precision: str = "float32",
        **reader,
    ) -> "_Plan":
        """Checks the arguments of `build` and loads the model."""
        for name, value, least, optional in (
            ("batch", batch, 1, False),
            ("shard", shard, 1, False),
            ("top", top, 0, True),
            ("threads", threads, 1, True),
        ):
            if value is None and optional:
                continue
            if type(value) is not int or value < least:
                raise DatasetError(
                    f"{name} is an integer of {least} or more. Received: "
                    f"{errors.brief(value)}. Pass such a number."
                )
        if type(float16) is not bool:
            raise DatasetError(
                f"float16 is True or False. Received: {errors.brief(float16)}. "
                "Pass one of them."
            )
        # Its options are checked here, not by the workers.
        items.Reader(**reader).close()
        output = os.fsdecode(output)
        bulk_output.require_system(output)
        model = os.fsdecode(model)
        encoder = bulk_steps.load(model, preset, top, precision=precision)
        facts = encoder.facts(float16=float16)
        handler = EncoderHandler(model, preset, top, facts, threads, precision)
        read = ReadAndDecode(handler, batch, threads, reader)
        return cls(output, facts, handler, read, shard)

    def add(
        self,
        pipeline,
        sources,
        search: Mapping[str, Any],
        run_name: str,
        retry_errors: bool = False,
    ):
        """Adds the steps to a pipeline: see `build`."""
        if isinstance(sources, beam.PCollection):
            found = sources
        else:
            found = (
                pipeline
                | "Sources" >> beam.Create(list(map(_as_json, _list(sources))))
                | "Spread" >> beam.Reshuffle()
                | "Find" >> beam.FlatMap(_find, **search)
            )
        finished = bulk_output.parts(self.output)
        done = (
            pipeline
            | "Finished" >> beam.Create(finished, reshuffle=True)
            | "ReadIds"
            >> beam.FlatMap(bulk_steps.ids, self.facts, retry_errors)
        )
        wanted = found | "Pack" >> beam.Map(bulk_steps.by_id)
        return (
            {"wanted": wanted, "done": done}
            | "ById" >> beam.CoGroupByKey()
            | "Missing" >> beam.FlatMap(bulk_steps.missing)
            | "Handle" >> _Handle(self.shard, self.read, self.handler)
            | "Write" >> beam.ParDo(Write(self.output, run_name, self.facts))
        )


def run(
    sources: str | os.PathLike[str] | Iterable[str | os.PathLike[str]],
    output: str | os.PathLike[str],
    *,
    model: str | os.PathLike[str],
    beam_options: Sequence[str] = (),
    overwrite: bool = False,
    retry_errors: bool = False,
    column: str | None = None,
    split: str | None = None,
    data_dir: str | None = None,
    progress: bool = True,
    **arguments,
) -> Summary:
    """Runs the pipeline to its end.

    Args:
      sources: one or several, each whatever bit_tf.items.find takes; every
        worker must find them.
      output: a directory, of any file system that Beam knows.
      model: a TF-Hub handle, a SavedModel directory or an archive.
      beam_options: as on a command line, such as "--runner=DataflowRunner".
      overwrite: whether tables that are there are removed first, once the
        arguments, the runner and the model were found to be good.
      retry_errors: whether pictures of `sources` that have rows with an error
        are done again; these rows go when the pipeline is done.
      column, split, data_dir: see bit_tf.items.find.
      progress: whether stderr shows the shards that are written, if it is a
        terminal and the directory is on this machine.
      **arguments: preset, batch, shard, float16, top, threads, precision, and
        options of bit_tf.items.Reader: see build.

    Returns:
      What was done, by the runner's counters, or where it has none by the
      files. `images` and `skipped` are those of the sources; `duplicates` is
      0, since the same bytes are encoded as often as they come.

    Raises:
      DatasetError: no pictures are found, or the directory's vectors are of
        another model or preset.
      HandleError: there is no such model.
      MissingExtraError: Beam lacks the package of the output's file system.
      UnknownNameError: Beam has no such option or runner.
      BitTfError: the pipeline failed.
    """
    start = time.monotonic()
    output = os.fsdecode(output)
    bulk_output.require_system(output)
    sources = _list(sources)
    chosen = options(beam_options)
    arguments.setdefault("threads", threads_of(chosen))
    search: dict[str, Any] = {
        "column": column,
        "split": split,
        "data_dir": data_dir,
    }
    # What is wrong with the sources is told before any worker starts.
    items.find(sources, **search)
    with bulk_output.locked(output):
        name = bulk_output.new_name()
        try:
            pipeline = _pipeline(chosen)
            plan = _Plan.checked(output, model=model, **arguments)
            if overwrite:
                bulk_output.remove(output)
            else:
                finished = bulk_output.parts(output)
                bulk_output.check(output, finished, plan.facts)
                bulk_output.drop_old_errors(output)
            if retry_errors:
                bulk_output.expect_retries(output)
            plan.add(pipeline, sources, search, name, retry_errors)
            result = _finish(pipeline, output, name, progress)
            bulk_output.drop_old_errors(output)
            return _summary(result, output, name, time.monotonic() - start)
        finally:
            bulk_steps.forget()


def _pipeline(chosen):
    try:
        return beam.Pipeline(options=chosen)
    except (ImportError, ValueError) as error:
        raise errors.BitTfError(
            "A runner has its package and the options that it must have. "
            f"Received: {error}. See docs/bulk.md."
        ) from error


def _finish(pipeline, output: str, name: str, progress: bool):
    """The result of a pipeline that has run.

    Raises:
      BitTfError: it failed.
    """
    goes_on = (
        f"Shards that are written stay in {output!r}; the same command goes on "
        "from there."
    )
    try:
        with (
            _workers_watched(goes_on),
            bulk_output.progress(output, name, progress),
        ):
            result = pipeline.run()
            state = result.wait_until_finish()
    except errors.BitTfError:
        raise
    except Exception as error:
        raise errors.BitTfError(
            "A Beam pipeline runs to its end. Received: "
            f"{type(error).__name__}: {error}. {goes_on}"
        ) from error
    if state not in (None, "DONE"):
        raise errors.BitTfError(
            f"A Beam pipeline ends as DONE. Received: {state}. See the "
            f"runner's log. {goes_on}"
        )
    return result


@contextlib.contextmanager
def _workers_watched(goes_on: str) -> Iterator[None]:
    """Ends the pipeline when a process of the DirectRunner is gone.

    The runner itself would wait for it for ever.

    Raises:
      BitTfError: one was killed, such as for its memory.
    """
    before = threading.excepthook
    lost: list[BaseException] = []

    def noticed(arguments: threading.ExceptHookArgs) -> None:
        thread, error = arguments.thread, arguments.exc_value
        # The thread in which Beam waits for a worker's process.
        if error and thread and thread.name == "run_worker" and not lost:
            lost.append(error)
            _thread.interrupt_main()
        else:
            before(arguments)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    threading.excepthook = noticed
    try:
        yield
    except KeyboardInterrupt:
        if not lost:
            raise
        raise errors.BitTfError(
            "The processes of a pipeline live until its end. Received: "
            f"{lost[0]}. If memory ran out, take fewer of them. {goes_on}"
        ) from lost[0]
    finally:
        threading.excepthook = before


def _summary(result, output: str, name: str, seconds: float) -> Summary:
    """What was done, by the runner's counters, or else by the files."""
    found = result.metrics().query(
        MetricsFilter().with_namespace(bulk_steps.NAMESPACE)
    )
    counters = {
        metric.key.metric.name: metric.result for metric in found["counters"]
    }
    if "encoded" in counters or "skipped" in counters:
        encoded = counters.get("encoded", 0)
        failed = counters.get("errors", 0)
        skipped = counters.get("skipped", 0)
    else:
        paths = bulk_output.parts(output)
        new = [path for path in paths if f"part-{name}-" in path]
        rows, failed = bulk_output.count(new)
        encoded = rows - failed
        skipped = bulk_output.count(paths)[0] - rows
    return Summary(
        images=encoded + failed + skipped,
        encoded=encoded,
        errors=failed,
        skipped=skipped,
        seconds=seconds,
    )


def _list(sources) -> list[str]:
    """Sources as a list; one may come alone."""
    if isinstance(sources, str | os.PathLike):
        return [os.fsdecode(sources)]
    return [os.fsdecode(source) for source in sources]


def _as_json(source: str) -> str:
    # Names may hold surrogates, which Beam's coder of text refuses.
    return json.dumps(source)


def _find(source: str, **search) -> Iterator[Item]:
    return items.find([json.loads(source)], **search)
