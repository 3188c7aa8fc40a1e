"""Pictures → a directory of vectors, on one machine, whatever happens to it.

    sources → plan on disk → read → decode and resize → model → part-*.parquet

All of these overlap, also over the borders of shards. A shard appears whole,
by rename, and is then noted in the plan: who is killed loses the shard in hand.
Batches never cross a shard, so that a run that is taken up again has the bytes
of an unbroken one.
"""

import contextlib
import dataclasses
import itertools
import json
import os
import re
import time
from collections.abc import Iterable, Iterator
from typing import Any

from absl import logging

from bit_tf import errors, files, items
from bit_tf.embed_engine import Engine, Summary, noted, read_shard
from bit_tf.embed_model import Encoder
from bit_tf.embed_plan import FILE_NAME, Plan, part_name
from bit_tf.embedding_table import Facts, Row
from bit_tf.errors import DatasetError
from bit_tf.presets import Preset

__all__ = ["Summary", "run"]

_LOCK = "_embed.lock"
# The plan that takes the other's place, once all sources are listed.
_NEXT = "_embed.next.sqlite"
_STAGING = re.compile(
    r"\.part-[0-9]+\.parquet\.[0-9a-f]{16}\.tmp|"
    r"_embed\.next\.sqlite(-journal)?"
)
_OURS = re.compile(
    r"part-[0-9]+\.parquet|_embed\.(sqlite|sqlite-journal|lock)|"
    + _STAGING.pattern
)


def run(
    sources: str
    | os.PathLike[str]
    | Iterable[str | os.PathLike[str]]
    | Iterable[items.Item],
    output: str | os.PathLike[str],
    *,
    model: str | os.PathLike[str],
    preset: str | Preset | None = None,
    batch: int = 8,
    shard: int = 1024,
    float16: bool = False,
    top: int | None = None,
    precision: str = "float32",
    retry_errors: bool = False,
    overwrite: bool = False,
    progress: bool = True,
    column: str | None = None,
    data_dir: str | os.PathLike[str] | None = None,
    split: str | None = None,
    **reader: Any,
) -> Summary:
    """Writes a vector, or an error, for every picture of some sources.

    What the directory has is not done again: sources may be added, and a run
    that was stopped is taken up by the same call. Another process that works
    in the directory is waited for.

    Args:
      sources: as bit_tf.items.find takes them; or items, with ids that are
        the same on every run.
      output: a directory, which is made; or one that this function made.
      model: a TF-Hub handle, a directory or a .tar.gz archive.
      preset: how pictures are prepared; None is what the model's card says, or
        else "big_transfer eval".
      batch: pictures of a batch, at most.
      shard: rows of a file, of items that are new.
      float16: whether vectors are kept in half precision.
      top: classes of each picture, of a classifier; 0 is none, None is 5 of a
        classifier and 0 of another model.
      precision: see bit_tf.BitMedium2Vec.
      retry_errors: whether rows with an error are done again.
      overwrite: whether all that the directory has is made anew; it is
        removed once the sources are listed.
      progress: whether a bar is shown, on a terminal.
      column, data_dir, split: of bit_tf.items.find.
      reader: options of bit_tf.items.Reader.

    Returns:
      What was done.

    Raises:
      DatasetError: sources that are none; a directory with other things, or
        with vectors of another model, preset, type or precision; a full disk.
      HandleError: there is no such model, or it has no classes and top is not
        0.
      UnknownNameError: there is no such preset or precision.
      MissingExtraError: pyarrow is not installed.
    """
    start = time.monotonic()
    if top is not None and (type(top) is not int or top < 0):
        raise DatasetError(
            "top is an integer of 0 or more, or None. Received: "
            f"{errors.brief(top)}. Pass such a number."
        )
    for name, value in {"batch": batch, "shard": shard}.items():
        if type(value) is not int or value < 1:
            raise DatasetError(
                f"{name} is an integer of 1 or more. Received: "
                f"{errors.brief(value)}. Pass such a number."
            )
    errors.import_extra("pyarrow.parquet", "parquet")
    output = os.path.abspath(os.fsdecode(output))
    found = _found(sources, column=column, data_dir=data_dir, split=split)
    _require_ours(output, overwrite)
    os.makedirs(output, exist_ok=True)
    with files.locked(os.path.join(output, _LOCK), f"embeds into {output}"):
        _require_ours(output, overwrite)
        encoder = Encoder(model, preset, top, precision)
        facts = encoder.facts(float16)
        _sweep(output)
        path = os.path.join(output, FILE_NAME)
        with items.Reader(**reader) as opened, contextlib.ExitStack() as stack:
            if overwrite:
                following = os.path.join(output, _NEXT)
                with Plan(following) as plan:
                    plan.add(found, shard)
                _clear(output)
                os.replace(following, path)
            plan = stack.enter_context(Plan(path))
            _require_facts(plan, facts, output)
            if not overwrite:
                plan.add(found, shard)
            _look(plan, facts, output)
            engine = Engine(
                plan,
                facts,
                output,
                encoder=encoder,
                reader=opened,
                batch=batch,
                retry_errors=retry_errors,
            )
            with _explained(output, plan, facts):
                engine.run(progress)
    return dataclasses.replace(engine.summary, seconds=time.monotonic() - start)


def _found(sources: Any, **options: Any) -> Iterator[items.Item]:
    """The items of sources, or those that were given.

    Raises:
      DatasetError: there are none, or they are of another type.
    """
    if isinstance(sources, (str, bytes, os.PathLike)):
        sources = [sources]
    try:
        given = iter(sources)
    except TypeError:
        given = iter([sources])
    first = next(given, None)
    if first is None:
        return items.find([])
    given = itertools.chain([first], given)
    if isinstance(first, items.Item):
        return map(_checked, given)
    named = list(given)
    items.require_use(named, column=options["column"], split=options["split"])
    return items.find(named, **options)


def _checked(item: Any) -> items.Item:
    """An item that can be kept."""
    try:
        if not isinstance(item, items.Item):
            raise TypeError("no bit_tf.items.Item")
        (item.id + item.source).encode()
        json.dumps(list(item.location))
    except (TypeError, ValueError) as error:
        raise DatasetError(
            "Pictures are sources, or items with an id and a source of text "
            "and a location of JSON's types. Received: "
            f"{errors.brief(item)} ({error}). Mend it, or leave it out."
        ) from error
    return item


def _require_ours(output: str, overwrite: bool) -> None:
    """Refuses a directory that this engine did not make.

    Raises:
      DatasetError: as said.
    """
    try:
        names = sorted(os.listdir(output))
    except FileNotFoundError:
        return
    except OSError as error:
        raise DatasetError(
            "Vectors are written into a directory. Received: "
            f"{output!r} ({error.strerror}). Name another."
        ) from error
    foreign = [name for name in names if not _OURS.fullmatch(name)]
    if overwrite and foreign:
        raise DatasetError(
            "--overwrite removes what bit-tf embed wrote, in a directory with "
            f"nothing else. Received: {output!r} with {errors.brief(foreign)}. "
            "Move it away, or name another directory."
        )
    known = FILE_NAME in names
    rest = [n for n in names if n != _LOCK and not _STAGING.fullmatch(n)]
    if not known and not overwrite and rest:
        raise DatasetError(
            "Vectors are written into a new directory, an empty one, or one "
            f"that bit-tf embed made ({FILE_NAME}). Received: {output!r} with "
            f"{errors.brief(names)}. Name another"
            + ("." if foreign else ", or have it made anew with --overwrite.")
        )


def _clear(output: str) -> None:
    """Removes the table, but for its plan, which says whose the rest is."""
    names = [name for name in os.listdir(output) if _OURS.fullmatch(name)]
    for name in sorted(names):
        if name not in (_LOCK, FILE_NAME, _NEXT):
            os.unlink(os.path.join(output, name))


def _sweep(output: str) -> None:
    """Removes what a killed run was writing; the lock is held."""
    for name in os.listdir(output):
        if _STAGING.fullmatch(name):
            os.unlink(os.path.join(output, name))


def _require_facts(plan: Plan, facts: Facts, output: str) -> None:
    """Refuses another model than that of the directory, and notes it.

    Raises:
      DatasetError: it is another.
    """
    text = plan.get("facts")
    if text is None:
        plan.put("facts", json.dumps(dataclasses.asdict(facts)))
        return
    values = json.loads(text)
    values["preset"] = Preset(**values["preset"])
    Facts(**values).require_same(
        facts,
        repr(output),
        "Name another directory, or have it made anew with --overwrite.",
    )


def _look(
    plan: Plan, facts: Facts, output: str, *, undone_only: bool = False
) -> None:
    """Brings the plan to what the directory has.

    A file is taken that was written and not noted; a shard is undone whose
    file is missing or damaged.

    Args:
      plan: of the directory.
      facts: of its table.
      output: the directory.
      undone_only: whether shards that are noted as done are believed to be.
    """
    for shard in plan.shards():
        if undone_only and shard.done:
            continue
        path = os.path.join(output, part_name(shard.number))
        try:
            size = os.path.getsize(path)
        except FileNotFoundError:
            size = -1
        if shard.done and shard.size == size and _is_parquet(path):
            continue
        rows = None if size < 0 else _whole(path, facts, plan.ids(shard))
        if rows is not None:
            plan.finish(shard, size=size, **noted(rows))
        elif shard.done:
            plan.reopen(shard)


def _is_parquet(path: str) -> bool:
    """Whether a file of the right size has its end, too."""
    arrow = errors.import_extra("pyarrow", "parquet")
    parquet = errors.import_extra("pyarrow.parquet", "parquet")
    try:
        parquet.read_metadata(path)
    except (OSError, arrow.ArrowException):
        return False
    return True


def _whole(path: str, facts: Facts, ids: list[str]) -> list[Row] | None:
    """A shard's rows; None if it is damaged, or not that of these ids."""
    try:
        rows = read_shard(path, facts)
    except DatasetError:
        return None
    return rows if [row.id for row in rows] == ids else None


@contextlib.contextmanager
def _explained(output: str, plan: Plan, facts: Facts) -> Iterator[None]:
    """Says how to go on where a run cannot.

    Args:
      output: the directory.
      plan: of the directory.
      facts: of its table.

    Raises:
      DatasetError: the directory cannot be written, as with a full disk.
    """
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        # A file may have been written that was not noted.
        with contextlib.suppress(DatasetError, OSError):
            _look(plan, facts, output, undone_only=True)
        total, done = plan.counts()
        logging.warning(
            "Stopped: %d of %d images are done in %s; the same command goes "
            "on from there.",
            done,
            total,
            output,
        )
        raise
    except OSError as error:
        if isinstance(error, errors.BitTfError):
            raise
        raise DatasetError(
            "A directory of vectors can be written. Received: "
            f"{output!r} ({error.strerror or error}). What is finished stays; "
            "make room, and run the same command again."
        ) from error
