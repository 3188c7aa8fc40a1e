"""What is wrong with a SavedModel's directory; nothing of it is run.

Names and sizes are looked at always, bytes on request. The graph and the index
of the variables are walked over here, without TensorFlow, which takes seconds
to load.

Source: tensorflow/core/protobuf/saved_model.proto, meta_graph.proto,
tensor_bundle.proto
"""

import dataclasses
import errno
import hashlib
import mmap
import os
import pathlib
import stat
from collections.abc import Iterator, Mapping
from typing import Any

from bit_tf import errors, files, handles

__all__ = [
    "BREAKING",
    "Problem",
    "compared",
    "contents",
    "examine",
    "regular_files",
]

_GRAPH = "saved_model.pb"
_GRAPH_TEXT = "saved_model.pbtxt"
# Numbers of the fields of SavedModel, MetaGraphDef and AssetFileDef.
_SAVED_MODEL_FIELDS = (1, 2)
_META_GRAPH, _SAVER, _ASSET_FILE, _OBJECT_GRAPH, _FILE_NAME = 2, 3, 6, 7, 2
# Those of BundleHeaderProto and BundleEntryProto.
_NUM_SHARDS, _SHARD_ID, _OFFSET, _SIZE = 1, 3, 4, 5

# Kinds of problems with which a model cannot be used.
BREAKING = (
    "unreadable",
    "no directory",
    "link loop",
    "empty",
    "no graph",
    "damaged graph",
    "no index",
    "damaged index",
    "short data",
    "missing file",
    "changed bytes",
)


@dataclasses.dataclass(frozen=True)
class Problem:
    """Something wrong with a model, or beside it in the cache.

    Attributes:
      kind: one of BREAKING, or "stale lock", "left over", "descriptor".
      text: one line that says what was found.
    """

    kind: str
    text: str

    @property
    def breaks(self) -> bool:
        """Whether the model cannot be used."""
        return self.kind in BREAKING

    def __str__(self) -> str:
        return f"{self.kind}: {self.text}"


def contents(path: str | os.PathLike[str]) -> dict[str, handles.File]:
    """Path → file of all files of a model.

    Raises:
      OSError: one cannot be read.
    """
    found = {}
    for relative in regular_files(pathlib.Path(path)):
        size, digest = files.measure(pathlib.Path(path, relative))
        found[relative] = handles.File(relative, size, digest)
    return found


def examine(
    path: str | os.PathLike[str],
    *,
    expected: Mapping[str, handles.File] | None = None,
    thorough: bool = False,
    structure: bool = True,
) -> list[Problem]:
    """What is wrong with a SavedModel's directory; nothing of it is run.

    Args:
      path: the directory.
      expected: path → file, if it is known what the model is made of.
      thorough: whether all bytes are read, and compared with those expected or
        else with the checksums of the variables. TensorFlow is loaded then.
      structure: whether it must be a SavedModel, and not only what is expected.
    """
    return _guarded(
        pathlib.Path(path),
        _faults if structure else _differences,
        expected or {},
        thorough,
    )


def compared(
    path: str | os.PathLike[str], expected: Mapping[str, handles.File]
) -> list[Problem]:
    """How a SavedModel's directory differs from what is expected, in all bytes.

    TensorFlow is not loaded. What this process has read and found right is
    read again only after a change of any file's size, times or inode.

    Args:
      path: the directory.
      expected: path → file, of all its files.
    """
    path = pathlib.Path(os.path.abspath(path))
    return examine(path, expected=expected) or _guarded(
        path, _other_bytes, expected, True
    )


# Directory → (stamp of its files, what was expected), as found right.
_RIGHT: dict[pathlib.Path, tuple[Any, Mapping[str, handles.File]]] = {}


def _other_bytes(
    path: pathlib.Path, expected: Mapping[str, handles.File], thorough: bool
) -> list[Problem]:
    try:
        stamp = _stamp(path)
        if _RIGHT.get(path) == (stamp, expected):
            return []
        more = sorted({row[0] for row in stamp} - expected.keys())
    except errors.ArchiveError as error:
        return [Problem("changed bytes", str(error))]
    problems = _differences(path, expected, thorough) + [
        Problem("changed bytes", f"{name}: not expected") for name in more
    ]
    # Whoever changes it meanwhile has it read again.
    if not problems:
        _RIGHT[path] = stamp, dict(expected)
    return problems


def _stamp(path: pathlib.Path) -> tuple[tuple[str | int, ...], ...]:
    """What changes with any file of a directory."""
    rows = []
    for relative in regular_files(path):
        found = os.stat(path / relative)
        rows.append(
            (
                relative,
                found.st_dev,
                found.st_ino,
                found.st_size,
                found.st_mtime_ns,
                found.st_ctime_ns,
            )
        )
    return tuple(rows)


def regular_files(path: pathlib.Path) -> Iterator[str]:
    """Paths of a directory's files, sorted.

    Raises:
      ArchiveError: there is something else, or a link to a folder.
      OSError: a link leads nowhere.
    """
    found = []
    for folder, folders, names in os.walk(path):
        for name in names + folders:
            where = pathlib.Path(folder, name)
            mode = where.stat().st_mode
            if name in folders and not where.is_symlink():
                continue
            if not stat.S_ISREG(mode):
                raise errors.ArchiveError(
                    "A model holds regular files and directories. Received: "
                    f"{str(where)!r}, which is something else. Copy what it "
                    "points to, or remove it."
                )
            found.append(where.relative_to(path).as_posix())
    yield from sorted(found)


def _guarded(path: pathlib.Path, check, expected, thorough) -> list[Problem]:
    """The problems of a directory, whatever lies at its path."""
    try:
        if not stat.S_ISDIR(os.stat(path).st_mode):
            return [Problem("no directory", "a file lies in its place")]
        if not os.listdir(path):
            return [Problem("empty", "the directory is empty")]
        return check(path, expected, thorough)
    except FileNotFoundError as error:
        if os.path.islink(path):
            return [Problem("no directory", "a link to nothing")]
        return [Problem("missing file", str(error))]
    except OSError as error:
        kind = "link loop" if error.errno == errno.ELOOP else "unreadable"
        return [Problem(kind, str(error))]


def _faults(
    path: pathlib.Path, expected: Mapping[str, handles.File], thorough: bool
) -> list[Problem]:
    loops = [
        Problem("link loop", f"{name} is a link that leads to itself")
        for name in _loops(path)
    ]
    if loops:
        return loops
    graph, problems = _graph(path, thorough and not expected)
    problems += _bundle(path, graph, thorough and not expected)
    named = {problem.text.partition(":")[0] for problem in problems}
    problems += [
        problem
        for problem in _differences(path, expected, thorough)
        if problem.text.partition(":")[0] not in named
    ]
    return problems


def _differences(
    path: pathlib.Path, expected: Mapping[str, handles.File], thorough: bool
) -> list[Problem]:
    """How files differ from those expected."""
    problems = []
    for relative, file in expected.items():
        where = path / relative
        try:
            size = os.stat(where).st_size
        except (FileNotFoundError, NotADirectoryError):
            problems.append(Problem("missing file", f"{relative}: not there"))
            continue
        if size != file.size:
            text = f"{relative}: {size} bytes, not {file.size}"
            problems.append(Problem("changed bytes", text))
        elif thorough:
            with open(where, "rb") as opened:
                digest = hashlib.file_digest(opened, "sha256").hexdigest()
            if digest != file.sha256:
                text = f"{relative}: SHA-256 {digest}, not {file.sha256}"
                problems.append(Problem("changed bytes", text))
    return problems


def _loops(path: pathlib.Path) -> Iterator[str]:
    """Links in a directory that lead to themselves or to what holds them."""
    for folder, folders, names in os.walk(path):
        for name in [*folders, *names]:
            link = os.path.join(folder, name)
            if not os.path.islink(link):
                continue
            try:
                os.stat(link)
            except OSError as error:
                if error.errno != errno.ELOOP:
                    continue
            else:
                target = os.path.realpath(link)
                if not os.path.isdir(link) or not os.path.realpath(
                    folder
                ).startswith(target):
                    continue
            yield os.path.relpath(link, path)


@dataclasses.dataclass(frozen=True)
class _Graph:
    """What matters here of a saved_model.pb.

    Attributes:
      variables: whether it has files of variables. Those of TensorFlow 2 always
        have, be it for the names of no variable.
      assets: paths of the files that it needs.
    """

    variables: bool = False
    assets: tuple[str, ...] = ()


def _graph(path: pathlib.Path, parse: bool) -> tuple[_Graph, list[Problem]]:
    file = path / _GRAPH
    if not file.is_file():
        if (path / _GRAPH_TEXT).is_file():
            return _Graph(), []
        text = f"{_GRAPH}: not there"
        return _Graph(), [Problem("no graph", text)]
    try:
        graph = _read_graph(file)
        if parse:
            _parse_graph(file)
    except (ValueError, IndexError) as error:
        return _Graph(), [Problem("damaged graph", f"{_GRAPH}: {error}")]
    problems = [
        Problem("missing file", f"{name}: not there")
        for name in graph.assets
        if not (path / name).is_file()
    ]
    return graph, problems


def _read_graph(file: pathlib.Path) -> _Graph:
    """Walks over the outer fields of a SavedModel message.

    Raises:
      ValueError: it is damaged, cut short or something else.
      IndexError: likewise.
    """
    size = file.stat().st_size
    if not size:
        raise ValueError("empty")
    graphs, variables = 0, False
    assets: list[str] = []
    with (
        open(file, "rb") as opened,
        mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as data,
    ):
        for number, start, stop in _fields(data, 0, size):
            if number not in _SAVED_MODEL_FIELDS:
                raise ValueError(f"no SavedModel at byte {start}")
            if number != _META_GRAPH:
                continue
            graphs += 1
            for inner, first, last in _fields(data, start, stop):
                variables |= inner in (_SAVER, _OBJECT_GRAPH)
                if inner == _ASSET_FILE:
                    assets += [
                        data[a:b].decode("utf-8", "replace")
                        for field, a, b in _fields(data, first, last)
                        if field == _FILE_NAME
                    ]
    if not graphs:
        raise ValueError(f"{size} bytes without a graph")
    return _Graph(variables, tuple(f"assets/{name}" for name in assets))


def _parse_graph(file: pathlib.Path) -> None:
    """Parses all of a SavedModel message.

    Raises:
      ValueError: it is damaged.
    """
    from google.protobuf import message
    from tensorflow.core.protobuf import saved_model_pb2 as proto

    try:
        proto.SavedModel.FromString(file.read_bytes())
    except message.DecodeError as error:
        raise ValueError(f"no SavedModel message ({error})") from error


def _fields(
    data: bytes | mmap.mmap, start: int, end: int
) -> Iterator[tuple[int, int, int]]:
    """(number, start, end) of the fields of a message in protobuf's format.

    Raises:
      ValueError: it is damaged or cut short.
      IndexError: likewise.
    """
    from bit_tf.checkpoints import tensor_bundle

    while start < end:
        tag, begin = tensor_bundle.varint(data, start)
        kind = tag & 7
        if kind == 0:
            _, stop = tensor_bundle.varint(data, begin)
        elif kind in (1, 5):
            stop = begin + (8 if kind == 1 else 4)
        elif kind == 2:
            length, begin = tensor_bundle.varint(data, begin)
            stop = begin + length
        else:
            raise ValueError(f"no field at byte {start}")
        if not tag >> 3 or stop > end:
            raise ValueError(
                f"the field at byte {start} ends at {stop}, not before {end}"
            )
        yield tag >> 3, begin, stop
        start = stop


def _bundle(
    path: pathlib.Path, graph: _Graph, checksums: bool
) -> list[Problem]:
    """What is wrong with the files of the variables."""
    from bit_tf.checkpoints import tensor_bundle

    folder = path / "variables"
    prefix = folder / "variables"
    index = tensor_bundle.index_file(prefix)
    shown = index.relative_to(path).as_posix()
    if not index.is_file():
        if graph.variables or (folder.exists() and os.listdir(folder)):
            return [Problem("no index", f"{shown}: not there")]
        return []
    try:
        ends = _ends(index.read_bytes())
    except (errors.CheckpointFormatError, ValueError, IndexError) as error:
        return [Problem("damaged index", f"{shown}: {error}")]
    problems = []
    for number, end in sorted(ends.items()):
        name = f"variables.data-{number:05d}-of-{len(ends):05d}"
        shard = folder / name
        size = shard.stat().st_size if shard.is_file() else -1
        if size < end:
            has = f"{size} bytes" if size >= 0 else "not there"
            problems.append(
                Problem(
                    "short data",
                    f"variables/{name}: {has}; the index tells of {end}",
                )
            )
    if checksums and not problems:
        problems = _checksums(prefix)
    return problems


def _ends(data: bytes) -> dict[int, int]:
    """Number of each shard → the bytes that it has, as the index tells.

    Raises:
      CheckpointFormatError, ValueError, IndexError: the index is damaged.
    """
    from bit_tf.checkpoints import tensor_bundle

    ends: dict[int, int] = {}
    for name, value in tensor_bundle.rows(data):
        numbers = {}
        for field, start, _ in _fields(value, 0, len(value)):
            if field in (_NUM_SHARDS, _SHARD_ID, _OFFSET, _SIZE):
                numbers[field], _ = tensor_bundle.varint(value, start)
        if not name:
            shards = numbers.get(_NUM_SHARDS, 0)
            if not 0 < shards < 100_000:
                raise ValueError(f"{shards} shards")
            ends = dict.fromkeys(range(shards), 0)
            continue
        shard = numbers.get(_SHARD_ID, 0)
        if shard not in ends:
            raise ValueError(f"shard {shard} of {len(ends)}")
        end = numbers.get(_OFFSET, 0) + numbers.get(_SIZE, 0)
        ends[shard] = max(ends[shard], end)
    if not ends:
        raise ValueError("no header")
    return ends


def _checksums(prefix: pathlib.Path) -> list[Problem]:
    from bit_tf.checkpoints import tensor_bundle

    try:
        for name, variable in tensor_bundle.variables(prefix).items():
            if not variable.dtype.hasobject:
                tensor_bundle.load(variable, name)
            elif not variable.shape and not variable.parts:
                tensor_bundle.text(variable, name)
    except errors.CheckpointFormatError as error:
        return [Problem("changed bytes", f"variables: {error}")]
    return []
