"""TF-Hub's models: SavedModel directories, and tar archives of them.

Only the variables are read. No graph is loaded and no operation runs, so that
a model which would do harm when loaded is harmless here. Names are those of
Google's .npz files, perhaps behind a scope such as `keras_layer/`; the head's
kernel is (1, 1, features, classes) or (features, classes). Modules of the
older TF1 Hub format keep their variables in the same way, by name.
"""

import collections
import dataclasses
import functools
import gzip
import io
import json
import os
import re
import shutil
import tarfile
import tempfile
import weakref
import zlib
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path, PurePath
from typing import Any, NamedTuple

from bit_tf import archive, errors, labels, presets
from bit_tf.checkpoints import (
    checkpoint,
    json_files,
    layout,
    npz,
    rename,
    tensor_bundle,
)
from bit_tf.checkpoints.facts import Facts

__all__ = [
    "CARD_FILE",
    "LOOKS_FOR",
    "NAME",
    "read",
    "recorded_preset",
    "sniff",
]

NAME = "tf_hub"
LOOKS_FOR = "a SavedModel directory, nor a tar archive of one"

# What this package's own exports say of themselves.
CARD_FILE = PurePath("assets.extra", "card.json")

_NOTE = (
    "The variables' names are inferred from public re-saves; no published "
    "module was seen."
)
_PREFIX = PurePath("variables", "variables")
_GRAPH = "saved_model.pb"
_MODEL_FILES = (_GRAPH, "tfhub_module.pb", "variables.index")
_OBJECTS = "_CHECKPOINTABLE_OBJECT_GRAPH"
_VALUE = "VARIABLE_VALUE"
_SLOT_KEY = ".OPTIMIZER_SLOT"
_MAX_CARD = 1 << 20
_MAX_GRAPH = 1 << 31
_SNIFFED = 4 << 20
_MAX_SHOWN = 3
_MAX_SCOPES = 16
_MAX_NAME = 512
_STATE = re.compile(
    r"(?:.*/)?(?:save_counter|global_step|iter|iterations|learning_rate|decay"
    r"|momentum|rho|beta_[12]|beta[12]_power)"
    r"|.*/(?:Momentum|momentum|velocity|Adam(?:_1)?|RMSProp(?:_1)?|rms|vhat"
    r"|[mv]|Adagrad|Adadelta(?:_1)?|Ftrl(?:_1)?)"
    r"|(?:.*/)?(?:Adam|AdamW|adam|adamw|SGD|sgd|RMSprop|rmsprop|Adagrad"
    r"|adagrad|optimizer|loss_scale)(?:_[0-9]+)?/.*"
)


class _Named(NamedTuple):
    """A variable: its key in the index, its name, and what it is."""

    key: str
    name: str
    slot: bool
    variable: tensor_bundle.Variable

    @property
    def shown(self) -> str:
        name = layout.printable(self.name)
        if self.key == self.name:
            return name
        return f"{name} ({layout.printable(self.key)})"


def sniff(path: str | os.PathLike[str]) -> bool:
    """Whether a path looks like a SavedModel's; never raises on garbage.

    True for a directory with saved_model.pb and variables/variables.index,
    and for a tar archive, told by its name, which has a SavedModel's file
    among the members of its first 4 MiB.
    """
    try:
        path = Path(path)
        if path.is_dir():
            root = _root(path)
            return (root / _GRAPH).is_file() and tensor_bundle.index_file(
                root / _PREFIX
            ).is_file()
        return archive.is_archive(path) and any(
            PurePath(name).name in _MODEL_FILES for name in _members(path)
        )
    except (OSError, ValueError):
        return False


def read(path: str | os.PathLike[str]) -> checkpoint.Checkpoint:
    """Opens a SavedModel: reads the index of its variables.

    An archive is unpacked into a temporary directory, which is removed with
    the `Checkpoint`. What a model of this package says of itself in
    assets.extra/card.json and assets/ is honoured.

    Returns:
      A `Checkpoint`; variables that are no part of the layout are its `extra`,
      except an optimizer's state, which `notes` tells.

    Raises:
      FileNotFoundError: nothing is at the path.
      ArchiveError: the archive is damaged or hostile.
      CheckpointFormatError: there are no variables, they are damaged or cut
        short, or two models' variables are there. Damage inside an array's
        data is found, by its checksum, when the array is read.
      CheckpointMismatchError: names or shapes are not those of a BiT-ResNet.
    """
    path = Path(path)
    if path.is_dir():
        return _read(path, path)
    checkpoint.require_file(path)
    if not archive.is_archive(path):
        raise errors.CheckpointFormatError(
            f"{path}: a TF-Hub model is a directory, or an archive named "
            ".tar.gz, .tgz or .tar. Received: a file of another name. Give "
            "the directory that holds saved_model.pb."
        )
    folder = tempfile.mkdtemp(prefix="bit_tf_")
    try:
        archive.unpack(path, Path(folder, "model"))
        result = _read(path, Path(folder, "model"))
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    weakref.finalize(result, shutil.rmtree, folder, ignore_errors=True)
    return result


def _members(path: Path) -> Iterable[str]:
    """Names in an archive's first bytes; the rest is not decompressed."""
    names = []
    try:
        with open(path, "rb") as file:
            opened: Any = file
            if file.read(2) == b"\x1f\x8b":
                opened = gzip.GzipFile(fileobj=file)
            file.seek(0)
            start = _first(opened)
        with tarfile.open(fileobj=io.BytesIO(start), mode="r:") as members:
            for member in members:
                names.append(member.name)
    # tarfile reads a chain of extended headers by recursion.
    except (
        tarfile.TarError,
        EOFError,
        OverflowError,
        OSError,
        RecursionError,
        ValueError,
    ):
        return names
    return names


def _first(file: Any) -> bytes:
    parts: list[bytes] = []
    left = _SNIFFED
    try:
        while left and (part := file.read(min(left, 1 << 16))):
            parts.append(part)
            left -= len(part)
    except (EOFError, zlib.error, gzip.BadGzipFile):
        return b"".join(parts)
    return b"".join(parts)


def _root(directory: Path) -> Path:
    """The directory that holds the model: this one, or its only one."""
    inside = list(directory.iterdir())
    if len(inside) == 1 and (inside[0] / _GRAPH).is_file():
        return inside[0]
    return directory


def _read(path: Path, directory: Path) -> checkpoint.Checkpoint:
    root = _root(directory)
    prefix = root / _PREFIX
    if not tensor_bundle.index_file(prefix).is_file():
        raise errors.CheckpointFormatError(
            f"{path}: a SavedModel keeps its variables in "
            "variables/variables.index. Received: a directory without that "
            "file. If the model was frozen, get the one that it was made of."
        )
    try:
        return _checkpoint(path, root, prefix)
    except errors.CheckpointFormatError as error:
        if str(error).startswith(str(path)):
            raise
        raise errors.CheckpointFormatError(f"{path}: {error}") from error


def _checkpoint(path: Path, root: Path, prefix: Path) -> checkpoint.Checkpoint:
    variables, state = _without_state(_named(root, prefix))
    scope = _scope(variables)
    entries: dict[str, checkpoint.Entry] = {}
    chosen: dict[str, _Named] = {}
    extra: list[str] = []
    texts: list[str] = []
    for row in variables:
        name = _spelled(row.name.removeprefix(scope))
        if not row.name.startswith(scope) or not layout.claims(name):
            numbers = not row.variable.dtype.hasobject
            (extra if numbers else texts).append(row.name)
            continue
        if name in chosen:
            raise errors.CheckpointFormatError(
                f"an array has one name. Received: {chosen[name].shown} and "
                f"{row.shown}, which are both {name}. Remove one of them."
            )
        chosen[name] = row
        entries[name] = checkpoint.Entry(
            row.variable.shape,
            row.variable.dtype,
            functools.partial(
                tensor_bundle.load, row.variable, f"{path}: {row.shown}"
            ),
            row.name,
        )
    if (head := entries.get(layout.HEAD_KERNEL)) is not None:
        entries[layout.HEAD_KERNEL] = npz.squeezed(head)
    tensor_bundle.require_data(
        {row.shown: row.variable for row in chosen.values()}
    )
    facts, foreign = _facts(root, layout.HEAD_BIAS in entries)
    skipped = tuple(
        f"skipped {what}: {_listed(names)}"
        for what, names in (
            ("optimizer state and counters", state),
            ("texts and resources", texts),
        )
        if names
    )
    shards = {
        piece.shard
        for row in chosen.values()
        for piece in tensor_bundle.pieces(row.variable)
    }
    return checkpoint.Checkpoint(
        path,
        entries,
        format=NAME,
        facts=facts,
        extra=tuple(sorted(extra)),
        notes=(*foreign, *skipped),
        files=(tensor_bundle.index_file(prefix), *sorted(shards)),
        spell=lambda name: f"{scope}{name}",
    )


def _spelled(name: str) -> str:
    # big_transfer's TensorFlow code names its head so.
    return re.sub("^head/dense/", "head/conv2d/", rename.google_spelling(name))


def _scope(variables: Iterable[_Named]) -> str:
    """What stands before the layout's names, such as "keras_layer/".

    Raises:
      CheckpointFormatError: two models are there.
    """
    counts: collections.Counter[str] = collections.Counter()
    for row in variables:
        parts = row.name.split("/")
        for start in range(max(0, len(parts) - _MAX_SCOPES), len(parts)):
            if layout.claims(_spelled("/".join(parts[start:]))):
                counts["".join(f"{part}/" for part in parts[:start])] += 1
                break
    if not counts:
        return ""
    (first, most), *others = counts.most_common(2)
    if others and others[0][1] == most:
        raise errors.CheckpointFormatError(
            "a SavedModel holds one model. Received: the variables of "
            f"several, under {first!r} and {others[0][0]!r}. Save one of them "
            "by itself."
        )
    return first


def _without_state(
    rows: Iterable[_Named],
) -> tuple[list[_Named], list[str]]:
    """The variables that may be weights; names of state and counters."""
    kept, state = [], []
    for row in rows:
        if row.slot or _SLOT_KEY in row.key or _STATE.fullmatch(row.name):
            state.append(row.name)
        elif row.key != _OBJECTS:
            kept.append(row)
    return kept, state


def _listed(names: list[str]) -> str:
    shown = ", ".join(map(layout.printable, sorted(names)[:_MAX_SHOWN]))
    more = ", …" if len(names) > _MAX_SHOWN else ""
    return f"{shown}{more} ({len(names)} variables)"


def _named(root: Path, prefix: Path) -> list[_Named]:
    """The variables, by the names that their model gave them."""
    found = tensor_bundle.variables(prefix)
    names: dict[str, str] = {}
    slots: set[str] = set()
    if _OBJECTS in found:
        names, slots = _object_names(root, _objects(found[_OBJECTS]))
    return [
        _Named(key, names.get(key) or key, key in slots, variable)
        for key, variable in found.items()
    ]


def _objects(variable: tensor_bundle.Variable) -> Any:
    from google.protobuf import message
    from tensorflow.core.protobuf import trackable_object_graph_pb2 as proto

    tensor_bundle.require_data({_OBJECTS: variable})
    value = tensor_bundle.text(variable, _OBJECTS)
    try:
        return proto.TrackableObjectGraph.FromString(value)
    except message.DecodeError as error:
        raise errors.CheckpointFormatError(
            f"{_OBJECTS} is a protocol message. Received: another text "
            f"({error}). {checkpoint.REMEDY}"
        ) from error


def _object_names(root: Path, graph: Any) -> tuple[dict[str, str], set[str]]:
    """(key → name, keys of optimizers' slots), as the object graph says.

    Where it gives no full name, the SavedModel's own graph of objects does;
    else the path through the objects is the name.
    """
    nodes = graph.nodes
    slotted = {
        slot.slot_variable_node_id
        for node in nodes
        for slot in node.slot_variables
    }
    names: dict[str, str] = {}
    slots: set[str] = set()
    nameless: dict[int, str] = {}
    for number, node in enumerate(nodes):
        for attribute in node.attributes:
            key = attribute.checkpoint_key
            if attribute.name == _VALUE:
                names[key] = attribute.full_name.removesuffix(":0")
                if number in slotted:
                    slots.add(key)
                if not names[key]:
                    nameless[number] = key
    if nameless:
        paths = dict(_paths(nodes, nameless))
        saved = _saved_names(root, set(paths.values()))
        for number, key in nameless.items():
            path = paths.get(number, "")
            names[key] = saved.get(path, path).removesuffix(":0")
    return names, slots


def _paths(nodes: Any, chosen: Iterable[int]) -> Iterator[tuple[int, str]]:
    """(number of a node, its shortest path through the objects).

    Nodes that are not reached, or whose path is longer than `_MAX_NAME`, are
    left out.
    """
    came: dict[int, tuple[int, str]] = {0: (-1, "")} if len(nodes) else {}
    queue = collections.deque(came)
    while queue:
        number = queue.popleft()
        for child in nodes[number].children:
            if child.node_id in came or not 0 <= child.node_id < len(nodes):
                continue
            came[child.node_id] = number, child.local_name
            queue.append(child.node_id)
    for number in chosen:
        parts: list[str] = []
        length, node = 0, number
        while node > 0 and node in came and length <= _MAX_NAME:
            node, part = came[node]
            parts.append(part)
            length += len(part) + 1
        if node == 0 and length <= _MAX_NAME:
            yield number, "/".join(reversed(parts))


def _saved_names(root: Path, paths: Collection[str]) -> dict[str, str]:
    """Path through the objects → variable's name, as saved_model.pb says.

    The file is parsed as a message; nothing of it is loaded or run.
    """
    from google.protobuf import message
    from tensorflow.core.protobuf import saved_model_pb2 as proto

    path = root / _GRAPH
    if not path.is_file() or path.stat().st_size >= _MAX_GRAPH:
        return {}
    try:
        model = proto.SavedModel.FromString(path.read_bytes())
    except message.DecodeError:
        return {}
    if not model.meta_graphs:
        return {}
    nodes = model.meta_graphs[0].object_graph_def.nodes
    named = (n for n, node in enumerate(nodes) if node.variable.name)
    return {
        path: nodes[number].variable.name
        for number, path in _paths(nodes, named)
        if path in paths
    }


def recorded_preset(directory: str | os.PathLike) -> presets.Preset | None:
    """How pictures are prepared for a model, as its card says.

    Args:
      directory: of a SavedModel, also of one that is not BiT's.

    Returns:
      None where it has no card, or one that does not say it.

    Raises:
      CheckpointFormatError: its card is damaged.
    """
    file = Path(directory) / CARD_FILE
    if not file.is_file():
        return None
    try:
        with open(file, "rb") as opened:
            said = json_files.json_object(opened.read(_MAX_CARD)).get("preset")
        if said is None:
            return None
        found = presets.Preset(**said)
        found.check()
    except (AttributeError, TypeError, ValueError, RecursionError) as error:
        raise errors.CheckpointFormatError(
            f"{CARD_FILE} is a JSON object whose preset tells how pictures are "
            f"prepared. Received: another, in {os.fspath(directory)!r} "
            f"({error}). Remove or correct it."
        ) from error
    return found


def _facts(root: Path, head: bool) -> tuple[Facts, tuple[str, ...]]:
    """The model's facts, and a note if this package did not write it.

    Raises:
      CheckpointFormatError: its card or its labels are damaged.
    """
    try:
        classes = labels.read_saved_model(root) if head else None
    except errors.HandleError as error:
        raise errors.CheckpointFormatError(str(error)) from error
    file = root / CARD_FILE
    if not file.is_file():
        return Facts("google", presets.PRESETS["tfhub"], classes), (_NOTE,)
    try:
        with open(file, "rb") as opened:
            card = json_files.json_object(opened.read(_MAX_CARD))
        said = {
            "numerics": card["numerics"]["name"],
            "output_stride": card["output_stride"],
            "preset": card.get("preset"),
        }
        found = Facts.from_json(json.dumps(said))
    except (LookupError, TypeError, ValueError, RecursionError) as error:
        raise errors.CheckpointFormatError(
            f"{CARD_FILE} is a JSON object with numerics.name, "
            f"output_stride and preset. Received: another ({error}). Remove or "
            "correct it."
        ) from error
    return dataclasses.replace(found, labels=classes), ()
