"""The directory of a Beam pipeline's tables, in any file system of Beam's."""

import contextlib
import datetime
import io
import os
import re
import secrets
import threading
from collections.abc import Iterator

import tqdm

from bit_tf import embedding_table, errors, files
from bit_tf.beam_modules import filesystem, filesystems
from bit_tf.embedding_table import Facts
from bit_tf.errors import DatasetError

__all__ = [
    "ERRORS",
    "check",
    "count",
    "drop_errors",
    "is_remote",
    "join",
    "locked",
    "new_name",
    "parts",
    "progress",
    "put",
    "read_ids",
    "remove",
]

# The folder of dead letters. Readers of Parquet pass over names with "_".
ERRORS = "_errors"
_LOCK = "_bulk.lock"
_LOCAL_ENGINE = "_embed.sqlite"
# What a process left that was killed while it wrote.
_LITTER = re.compile(r"\.part-.*\.(parquet|jsonl)\.[0-9a-f]{16}\.tmp")
_OURS = re.compile(
    r"part-[^/]*\.parquet|_errors|_bulk\.lock|_unfinished-.*|" + _LITTER.pattern
)
_OF = re.compile(r"-of-([0-9]+)\.parquet")


def is_remote(path: str) -> bool:
    """Whether a path is of a file system other than this machine's."""
    return filesystems.FileSystems.get_scheme(path) is not None


def join(folder: str, name: str) -> str:
    """A path in a folder of any file system."""
    return filesystems.FileSystems.join(folder, name)


def new_name() -> str:
    """A run's, which no other has: the time, UTC, and a random end."""
    now = datetime.datetime.now(datetime.UTC)
    return f"{now:%Y%m%dT%H%M%SZ}-{secrets.token_hex(2)}"


def parts(output: str) -> list[str]:
    """The tables that a directory has, sorted; none if it is not there.

    Raises:
      DatasetError: it is a file, or the local engine's.
    """
    if not is_remote(output):
        if not os.path.lexists(output):
            return []
        found = embedding_table.part_paths(output)
    else:
        found = _match(join(output, "part-*.parquet"))
    if filesystems.FileSystems.exists(join(output, _LOCAL_ENGINE)):
        raise DatasetError(
            "A directory has the tables of one engine, which keeps account of "
            f"them. Received: {output!r}, in which bit-tf embed wrote without "
            "--runner. Go on without it, or name another directory."
        )
    return found


def check(output: str, found: list[str], facts: Facts) -> None:
    """Refuses a directory that vectors with these facts must not go to.

    Args:
      output: the directory.
      found: its tables. Of those in a remote one only the first is read here;
        `read_ids` reads the others.
      facts: of the vectors to come.

    Raises:
      DatasetError: it holds other files, or vectors of another model or preset.
    """
    if not is_remote(output):
        _refuse_foreign(output)
    remedy = "Name another directory, or write all anew with --overwrite."
    if found and is_remote(output):
        with _open(found[0]) as file:
            _facts(file, found[0]).require_same(facts, repr(found[0]), remedy)
    elif found:
        embedding_table.read_facts(output).require_same(
            facts, repr(output), remedy
        )


def read_ids(path: str, facts: Facts) -> Iterator[str]:
    """The ids of a table.

    Raises:
      DatasetError: it is no table with these facts.
    """
    parquet = errors.import_extra("pyarrow.parquet", "parquet")
    with _open(path) as file:
        _facts(file, path).require_same(
            facts, repr(path), "Move it away, or name another directory."
        )
        for batch in parquet.ParquetFile(file).iter_batches(columns=["id"]):
            yield from batch.column(0).to_pylist()


def count(found: list[str]) -> tuple[int, int]:
    """(rows, rows with an error) of tables, by their footers."""
    parquet = errors.import_extra("pyarrow.parquet", "parquet")
    rows = failed = 0
    for path in found:
        with _open(path) as file:
            footer = parquet.ParquetFile(file).metadata
        column = footer.schema.names.index("error")
        rows += footer.num_rows
        for number in range(footer.num_row_groups):
            group = footer.row_group(number)
            failed += (
                group.num_rows - group.column(column).statistics.null_count
            )
    return rows, failed


def put(folder: str, name: str, data: bytes) -> str:
    """Writes a file that appears whole, or takes the place of its like.

    Returns:
      Its path.

    Raises:
      OSError: it cannot be written.
    """
    path = join(folder, name)
    if not is_remote(folder):
        os.makedirs(folder, exist_ok=True)
        with files.new_file(path) as file:
            file.write(data)
        return path
    systems = filesystems.FileSystems
    staging = join(folder, f"_unfinished-{secrets.token_hex(8)}-{name}")
    with systems.create(
        staging, compression_type=filesystem.CompressionTypes.UNCOMPRESSED
    ) as file:
        file.write(data)
    systems.rename([staging], [path])
    return path


def remove(output: str) -> None:
    """Removes the tables of a directory and its dead letters.

    Raises:
      DatasetError: it holds other files.
    """
    found = parts(output)
    if not is_remote(output):
        _refuse_foreign(output)
    found += _match(join(join(output, ERRORS), "part-*.jsonl"))
    if found:
        filesystems.FileSystems.delete(found)


def drop_errors(output: str) -> None:
    """Removes the rows with an error, and their dead letters.

    Raises:
      DatasetError: a table is damaged, or none of these.
    """
    parquet = errors.import_extra("pyarrow.parquet", "parquet")
    for path in parts(output):
        if not count([path])[1]:
            continue
        with _open(path) as file:
            facts = _facts(file, path)
            table = parquet.read_table(file)
        kept = table.filter(table.column("error").is_null())
        name = os.path.basename(path)
        letters = join(join(output, ERRORS), name.replace(".parquet", ".jsonl"))
        gone = _match(letters)
        if kept.num_rows:
            data = io.BytesIO()
            embedding_table.write(data, embedding_table.rows_of(kept), facts)
            put(output, name, data.getvalue())
        else:
            gone.append(path)
        if gone:
            filesystems.FileSystems.delete(gone)


@contextlib.contextmanager
def locked(output: str) -> Iterator[None]:
    """Keeps other runs out of a directory of this machine.

    What a killed run left unfinished is removed.

    Raises:
      DatasetError: it holds other files.
      OSError: it cannot be made.
    """
    if is_remote(output):
        yield
        return
    parts(output)
    _refuse_foreign(output)
    os.makedirs(output, exist_ok=True)
    lock = os.path.join(output, _LOCK)
    with files.locked(lock, f"writes vectors to {output}"):
        for folder in (output, os.path.join(output, ERRORS)):
            if os.path.isdir(folder):
                for name in filter(_LITTER.fullmatch, os.listdir(folder)):
                    os.unlink(os.path.join(folder, name))
        yield


@contextlib.contextmanager
def progress(output: str, run_name: str, shown: bool) -> Iterator[None]:
    """Shows the shards of a run as they appear in a local directory.

    Args:
      output: the directory; a remote one is not watched.
      run_name: of the files.
      shown: False is no bar; True is one where stderr is a terminal.
    """
    bar = tqdm.tqdm(unit="shard", disable=None if shown else True)
    done = threading.Event()

    def watch() -> None:
        while not done.wait(0.5):
            names = [
                name
                for name in os.listdir(output)
                if name.startswith(f"part-{run_name}-")
            ]
            if names:
                found = _OF.search(names[0])
                bar.total = int(found[1]) if found else None
                bar.update(len(names) - bar.n)

    if bar.disable or is_remote(output):
        with bar:
            yield
        return
    thread = threading.Thread(target=watch, daemon=True)
    with bar:
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()


def _refuse_foreign(output: str) -> None:
    """A directory with files of somebody else is not written to."""
    if not os.path.isdir(output):
        return
    foreign = [n for n in sorted(os.listdir(output)) if not _OURS.fullmatch(n)]
    if foreign:
        raise DatasetError(
            "Vectors go to a directory of their own. Received: "
            f"{output!r}, which has {errors.brief(foreign[0])}. Name another."
        )


def _facts(file, path: str) -> Facts:
    arrow = errors.import_extra("pyarrow", "parquet")
    parquet = errors.import_extra("pyarrow.parquet", "parquet")
    try:
        schema = parquet.read_schema(file)
    except (OSError, arrow.ArrowException) as error:
        raise DatasetError(
            "A table of vectors is a whole Parquet file. Received: "
            f"{path!r} ({errors.brief(str(error))}). Move it away."
        ) from error
    file.seek(0)
    return Facts.of(schema, repr(path))


def _open(path: str):
    return filesystems.FileSystems.open(
        path, compression_type=filesystem.CompressionTypes.UNCOMPRESSED
    )


def _match(pattern: str) -> list[str]:
    found = filesystems.FileSystems.match([pattern])[0].metadata_list
    return sorted(file.path for file in found)
