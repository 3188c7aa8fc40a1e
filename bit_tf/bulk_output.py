"""The directory of a Beam pipeline's tables, in any file system of Beam's."""

import contextlib
import datetime
import io
import json
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
    "drop_old_errors",
    "expect_retries",
    "is_remote",
    "join",
    "locked",
    "new_name",
    "parts",
    "progress",
    "put",
    "read_ids",
    "remove",
    "require_system",
]

# The folder of dead letters. Readers of Parquet pass over names with "_".
ERRORS = "_errors"
_LOCK = "_bulk.lock"
_LOCAL_ENGINE = "_embed.sqlite"
# Is there while an id may have rows in two tables.
_RETRY = "_retry"
# File systems of Beam's, and the extra of apache-beam that brings them.
_EXTRAS = {"gs": "gcp", "s3": "aws", "azfs": "azure", "hdfs": "hadoop"}
# What a process left that was killed while it wrote.
_LITTER = re.compile(r"\.(part-.*\.(parquet|jsonl)|_retry)\.[0-9a-f]{16}\.tmp")
_OURS = re.compile(
    r"part-[^/]*\.parquet|_errors|_bulk\.lock|_retry|_unfinished-.*|"
    + _LITTER.pattern
)
_OF = re.compile(r"-of-([0-9]+)\.parquet")


def is_remote(path: str) -> bool:
    """Whether a path is of a file system other than this machine's."""
    return filesystems.FileSystems.get_scheme(path) is not None


def require_system(output: str) -> None:
    """Refuses a directory of a file system that Beam cannot write to.

    Raises:
      DatasetError: Beam knows none of that name, or takes the directory's name
        as a pattern.
      MissingExtraError: Beam knows it, and its package is not installed.
    """
    scheme = filesystems.FileSystems.get_scheme(output)
    if scheme is None:
        return
    if scheme == "file":
        raise DatasetError(
            "A directory of this machine is a path. Received: "
            f"{output!r}. Leave out 'file://'."
        )
    try:
        filesystems.FileSystems.get_filesystem(output)
    except ValueError as error:
        if scheme in _EXTRAS:
            raise errors.MissingExtraError(
                f"{scheme}:// needs the file system of Apache Beam that an "
                f"extra of it brings. Received: {output!r}. Install it with: "
                f"pip install 'apache-beam[{_EXTRAS[scheme]}]'"
            ) from error
        known = ", ".join(f"{name}://" for name in _EXTRAS)
        raise DatasetError(
            "A directory is a path, or of a file system of Apache Beam's, such "
            f"as {known}. Received: {output!r}. Name another."
        ) from error
    if any(mark in output for mark in "*?[]"):
        raise DatasetError(
            "The name of a directory in a file system of Apache Beam's is "
            f"without *, ?, [ and ]. Received: {output!r}. Name another."
        )


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


def read_ids(path: str, facts: Facts) -> Iterator[tuple[str, bool]]:
    """The ids of a table, each with whether its row has an error.

    Raises:
      DatasetError: it is no table with these facts, or damaged.
    """
    with _open(path) as file:
        _facts(file, path).require_same(
            facts, repr(path), "Move it away, or name another directory."
        )
        yield from _ids(file, path)


def _ids(file, path: str) -> Iterator[tuple[str, bool]]:
    with _whole(path), embedding_table.parquet_file(file) as table:
        for batch in table.iter_batches(columns=["id", "error"]):
            failed = batch.column("error").is_valid().to_pylist()
            yield from zip(batch.column("id").to_pylist(), failed, strict=True)


def count(found: list[str]) -> tuple[int, int]:
    """(rows, rows with an error) of tables, by their footers.

    Raises:
      DatasetError: one is damaged.
    """
    rows = failed = 0
    for path in found:
        with _open(path) as file, _whole(path):
            footer = embedding_table.parquet_file(file).metadata
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
    _delete([*found, *_letters(output)])
    _delete(_there(output, _RETRY))


def expect_retries(output: str) -> None:
    """Notes that rows with an error may get others beside them."""
    put(output, _RETRY, b"")


def drop_old_errors(output: str) -> None:
    """Removes rows with an error whose ids later tables have too.

    Nothing is done unless `expect_retries` noted that there may be some. Their
    dead letters go with them.

    Raises:
      DatasetError: a table is damaged, or none of these.
    """
    note = _there(output, _RETRY)
    if not note:
        return
    found = parts(output)
    # Names begin with the time; the newest table has the latest row of an id.
    failed: dict[str, str] = {}
    old: dict[str, set[str]] = {}
    done: set[str] = set()
    for path in found:
        if count([path])[1]:
            with _open(path) as file:
                for name, bad in _ids(file, path):
                    if bad:
                        if name in failed:
                            old.setdefault(failed[name], set()).add(name)
                        failed[name] = path
    for path in found:
        with _open(path) as file:
            for name, bad in _ids(file, path):
                if not bad and name in failed:
                    done.add(name)
    for name in done:
        old.setdefault(failed[name], set()).add(name)
    for path, names in old.items():
        _without(output, path, names)
    _delete(note)


def _without(output: str, path: str, ids: set[str]) -> None:
    """Removes rows with an error from a table, and their dead letters."""
    with _open(path) as file, _whole(path):
        facts = _facts(file, path)
        table = embedding_table.parquet_file(file).read()
    kept = [
        row
        for row in embedding_table.rows_of(table)
        if row.error is None or row.id not in ids
    ]
    if kept:
        data = io.BytesIO()
        embedding_table.write(data, kept, facts)
        put(output, os.path.basename(path), data.getvalue())
    else:
        _delete([path])
    name = os.path.basename(path).replace(".parquet", ".jsonl")
    for letters in _there(join(output, ERRORS), name):
        with _open(letters) as file:
            lines = file.read().splitlines(keepends=True)
        rest = [line for line in lines if json.loads(line)["id"] not in ids]
        if rest:
            put(join(output, ERRORS), name, b"".join(rest))
        else:
            _delete([letters])


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
    parquet = errors.import_extra("pyarrow.parquet", "parquet")
    with _whole(path):
        schema = parquet.read_schema(file)
        file.seek(0)
    return Facts.of(schema, repr(path))


@contextlib.contextmanager
def _whole(path: str) -> Iterator[None]:
    """Turns what pyarrow raises for a damaged file into our exception."""
    arrow = errors.import_extra("pyarrow", "parquet")
    try:
        yield
    except (OSError, arrow.ArrowException) as error:
        raise DatasetError(
            "A table of vectors is a whole Parquet file. Received: "
            f"{path!r} ({errors.brief(str(error))}). Move it away."
        ) from error


def _open(path: str):
    return filesystems.FileSystems.open(
        path, compression_type=filesystem.CompressionTypes.UNCOMPRESSED
    )


def _there(folder: str, name: str) -> list[str]:
    """The path of a file in a folder, if it is there."""
    path = join(folder, name)
    return [path] if filesystems.FileSystems.exists(path) else []


def _letters(output: str) -> list[str]:
    folder = join(output, ERRORS)
    if is_remote(output):
        return _match(join(folder, "part-*.jsonl"))
    if not os.path.isdir(folder):
        return []
    return [
        os.path.join(folder, name)
        for name in sorted(os.listdir(folder))
        if name.startswith("part-") and name.endswith(".jsonl")
    ]


def _delete(paths: list[str]) -> None:
    # Beam takes names as patterns, of this machine's files too.
    for path in paths:
        if not is_remote(path):
            os.unlink(path)
    remote = [path for path in paths if is_remote(path)]
    if remote:
        filesystems.FileSystems.delete(remote)


def _match(pattern: str) -> list[str]:
    found = filesystems.FileSystems.match([pattern])[0].metadata_list
    return sorted(file.path for file in found)
