"""big_transfer's .h5 files: Keras 2 weights of its subclassed model.

Keras reads such a file by position: the root attribute `layer_names` orders
the layers, each layer's `weight_names` its arrays, at /<layer>/<weight name>.
In a unit they are gamma, beta and kernel of a, of b and of c; in unit01 the
projection comes last. The names, `block1/unit01/a/group_norm/gamma:0` and the
like, perhaps behind the model's own name, say the same; where they are there,
they and the positions must agree. The head's kernel is (features, classes).

Source: google-research/big_transfer, bit_tf2/models.py.
"""

import collections
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

from bit_tf import errors, presets
from bit_tf.checkpoints import checkpoint, hdf5, layout, rename
from bit_tf.checkpoints.facts import Facts

__all__ = ["NAME", "LOOKS_FOR", "sniff", "read"]

NAME = "big_transfer_h5"
LOOKS_FOR = "an HDF5 file (.h5) of Keras 2 weights, with layer_names"

_NOTE = (
    "The layout is inferred from big_transfer's code; no published file was "
    "seen."
)
_LAYERS = "layer_names"
_WEIGHTS = "weight_names"
_HEAD = "head/dense"
_LETTERS = "abc"
_LEAF = re.compile(r"(?:.*/)?(gamma|beta|kernel|bias)(?:_[0-9]+)?(?::0)?")


class _Row(NamedTuple):
    """One array, in the order in which Keras reads them.

    Attributes:
      layer: such as "block1".
      weight: its name there.
      named: the canonical name that these say, or None.
    """

    layer: str
    weight: str
    named: str | None

    @property
    def path(self) -> str:
        return f"{self.layer}/{self.weight}"


def sniff(path: str | os.PathLike[str]) -> bool:
    """Whether a file looks like one of this format; never raises on garbage.

    True for an HDF5 file whose root lists layers, as Keras 2 writes, and for
    one so damaged that HDF5 cannot tell: `read` then says what is wrong.
    """
    if not hdf5.is_hdf5(path):
        return False
    return hdf5.can_open(path, _LAYERS) or not hdf5.can_open(path)


def read(path: str | os.PathLike[str]) -> checkpoint.Checkpoint:
    """Opens a checkpoint: reads the file's groups, names and shapes.

    The architecture is that of the groups and shapes, whatever the file is
    called.

    Returns:
      A `Checkpoint`; arrays that no layer lists are its `extra`.

    Raises:
      FileNotFoundError: there is no such file.
      CheckpointFormatError: the file is not HDF5, is truncated or damaged, or
        holds what is not read (see `hdf5.datasets`); an array that is listed
        is not there, or its name and its position disagree.
      CheckpointMismatchError: names or shapes are not those of a BiT-ResNet.
    """
    path = Path(path)
    stored = hdf5.datasets(path)
    rows = _rows(path)
    missing = [
        _shown(row.named, row.path) for row in rows if row.path not in stored
    ]
    if missing:
        raise errors.CheckpointFormatError(
            f"{path}: each name in {_WEIGHTS} is that of an array. Received: "
            f"{len(missing)} without one. {checkpoint.REMEDY}\n"
            + "\n".join(f"− {name}" for name in missing)
        )
    by_name = any(row.named for row in rows)
    names = (
        {row.path: row.named for row in rows if row.named}
        if by_name
        else _by_position(path, rows)
    )
    entries, extra = rename.collect(
        path, rename.CANONICAL, stored, lambda name: names.get(name) or ""
    )
    result = checkpoint.Checkpoint(
        path,
        entries,
        format=NAME,
        facts=Facts("google", presets.PRESETS["big_transfer eval"]),
        extra=extra,
        notes=(_NOTE,),
        spell=_Spelling(rows, names).spell,
    )
    if by_name:
        _check_positions(path, rows, result)
    return result


def _shown(canonical: str | None, path: str) -> str:
    shown = layout.printable(path)
    return f"{canonical} ({shown})" if canonical else shown


def _rows(path: Path) -> list[_Row]:
    """The arrays in Keras' order.

    Raises:
      CheckpointFormatError: the attributes do not list them.
    """
    layers = hdf5.texts(path, _LAYERS).get("")
    weights = hdf5.texts(path, _WEIGHTS)
    if layers is None:
        raise errors.CheckpointFormatError(
            f"{path}: the root of Keras 2 weights has an attribute {_LAYERS}. "
            "Received: none. If Keras 3 wrote the file, its name must end in "
            ".weights.h5 or .keras."
        )
    rows = []
    for layer in layers:
        if layer not in weights:
            raise errors.CheckpointFormatError(
                f"{path}: each layer in {_LAYERS} is a group with an attribute "
                f"{_WEIGHTS}. Received: {layout.printable(layer)} without "
                f"one. {checkpoint.REMEDY}"
            )
        rows += [
            _Row(layer, weight, _canonical(layer, weight))
            for weight in weights[layer]
        ]
    counts = collections.Counter(row.path for row in rows)
    for row in rows:
        if counts[row.path] > 1:
            raise errors.CheckpointFormatError(
                f"{path}: an array is listed once. Received: "
                f"{_shown(row.named, row.path)} twice. {checkpoint.REMEDY}"
            )
    return rows


def _canonical(layer: str, weight: str) -> str | None:
    """What a weight's name says, such as "resnet/group_norm/gamma:0"."""
    _, found, inner = f"/{weight}".partition(f"/{layer}/")
    if not found or not inner.endswith(":0"):
        return None
    scope = "head/conv2d" if layer == _HEAD else layer
    name = rename.google_spelling(f"{scope}/{inner.removesuffix(':0')}")
    return rename.CANONICAL.canonical(name)


def _in_order(blocks: Iterable[int], head: bool) -> list[str]:
    """Canonical names in the order in which Keras writes the arrays."""
    names = [layout.ROOT_KERNEL]
    for block, units in enumerate(blocks, start=1):
        for unit in range(1, units + 1):
            scope = f"block{block}/unit{unit:02d}"
            for letter in _LETTERS:
                names += [
                    f"{scope}/{letter}/group_norm/gamma",
                    f"{scope}/{letter}/group_norm/beta",
                    f"{scope}/{letter}/standardized_conv2d/kernel",
                ]
            if unit == 1:
                names.append(f"{scope}/a/proj/standardized_conv2d/kernel")
    names += ["group_norm/gamma", "group_norm/beta"]
    return names + [layout.HEAD_KERNEL, layout.HEAD_BIAS] * head


def _by_position(path: Path, rows: list[_Row]) -> dict[str, str]:
    """Path → canonical name, told by the counts of arrays alone.

    Raises:
      CheckpointMismatchError: the counts are not a BiT-ResNet's, or the last
        part of a name says another kind of array.
    """
    counts = collections.Counter(row.layer for row in rows)
    wanted = [1, None, None, None, None, 2, 2]
    fits = len(counts) in (6, 7) and all(
        count == want or (want is None and count > 9 and count % 9 == 1)
        for count, want in zip(counts.values(), wanted, strict=False)
    )
    if not fits:
        found = ", ".join(
            f"{layout.printable(layer)}: {count}"
            for layer, count in list(counts.items())[:10]
        )
        raise errors.CheckpointMismatchError(
            f"{path}: names that are not big_transfer's are read by position, "
            "and the layers then have 1 array, four times 9 for each unit and "
            "1 more, 2, and with a head 2 more. Received: "
            f"{len(counts)} layers with arrays ({found}). It is another "
            "model's file, or an array is missing."
        )
    blocks = [count // 9 for count in list(counts.values())[1:5]]
    names = {}
    order = _in_order(blocks, len(counts) == 7)
    for row, name in zip(rows, order, strict=True):
        leaf = _LEAF.fullmatch(row.weight)
        if leaf and leaf[1] != name.rpartition("/")[2]:
            raise errors.CheckpointMismatchError(
                f"{path}: by its position this array is {name}. Received: "
                f"{layout.printable(row.path)}, which says {leaf[1]}. Its "
                "layer lists the arrays in another order than big_transfer."
            )
        names[row.path] = name
    return names


def _check_positions(
    path: Path, rows: list[_Row], result: checkpoint.Checkpoint
) -> None:
    order = _in_order(result.blocks, bool(result.num_classes))
    listed = [row for row in rows if row.named]
    for row, name in zip(listed, order, strict=True):
        if row.named != name:
            raise errors.CheckpointFormatError(
                f"{path}: names and positions agree, for Keras loads by "
                f"position. Received: {_shown(row.named, row.path)} in the "
                f"place of {name}. The file was not written by big_transfer; "
                "save it again from the model."
            )


class _Spelling:
    """Canonical name → dataset path, in the way of this file's others."""

    def __init__(self, rows: list[_Row], names: Mapping[str, str]):
        self._paths = {name: path for path, name in names.items()}
        prefixes = collections.Counter(
            f"/{row.weight}".partition(f"/{row.layer}/")[0]
            for row in rows
            if row.named
        )
        self._prefix = prefixes.most_common(1)[0][0] if prefixes else ""

    def spell(self, canonical: str) -> str:
        name = canonical.replace("head/conv2d", _HEAD)
        layer = _HEAD if name.startswith(_HEAD) else name.partition("/")[0]
        path = f"{layer}{self._prefix}/{name}:0"
        return self._paths.get(canonical, path)
