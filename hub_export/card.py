"""The typed description of an exported model, stored as card.json in it."""

import dataclasses
import json
import os
import pathlib
import platform
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import bit_tf
from bit_tf import variants
from bit_tf.checkpoints.tf_hub import CARD_FILE

__all__ = [
    "CARD_FILE",
    "PROVENANCE_FILE",
    "Card",
    "Parent",
    "Provenance",
    "TASKS",
    "constants",
    "input_text",
    "output_text",
    "read",
    "save",
    "versions",
]

# By whether there is a head.
TASKS = {False: "image-feature-vector", True: "image-classification"}

PROVENANCE_FILE = pathlib.PurePath("assets.extra", "provenance.json")


@dataclasses.dataclass(frozen=True)
class Card:
    """What a user must know to call the model.

    Attributes:
      architecture: such as "R50x1", or "custom".
      feature_dim: length of the feature vector; 0 if there is none.
      num_classes: outputs of the head; 0 for features.
      params: number of weights.
      task: "image-feature-vector" or "image-classification".
      input: dtype, shape, range and layout of the pictures.
      output: what `__call__` returns.
      probabilities: "softmax", "sigmoid", or None without a head.
      labels: where the class names came from, or None.
      output_stride: of the last block, or None if that is not known.
      numerics: the constants inside (see variants.NUMERICS); {} if they are
        not known.
      preset: how the weights' publisher prepared pictures (see
        presets.Preset), or None if that is not known.
      citations: papers.
    """

    architecture: str
    feature_dim: int
    num_classes: int
    params: int
    task: str
    input: str
    output: str
    probabilities: str | None
    labels: str | None
    output_stride: int | None
    numerics: dict
    preset: dict | None = None
    citations: tuple[str, ...] = (variants.BIT,)

    @classmethod
    def from_dict(cls, found: Mapping[str, Any]) -> "Card":
        """Reads what `save` wrote; raises TypeError for other keys."""
        return cls(**{**found, "citations": tuple(found.get("citations", ()))})


@dataclasses.dataclass(frozen=True)
class Parent:
    """A SavedModel that an exported model was made around.

    Attributes:
      handle: a URL, the handle it was published under, or its folder's name.
      sha256: of its content (see hub.content_hash), or None.
    """

    handle: str
    sha256: str | None = None


@dataclasses.dataclass(frozen=True)
class Provenance:
    """Where an exported model came from.

    Attributes:
      source: the checkpoint file's name, or None for a model made in Python.
      name: the published name that it was found by, or None.
      numerics: the checkpoint's own constants, a name in variants.NUMERICS;
        the card has those that the model computes with.
      numerics_chosen: "source" for its own, or what was asked for instead.
      sha256: of that file.
      format: the reader that read it.
      extra_arrays: names of arrays in the file that are no part of BiT.
      notes: what its reader found worth saying.
      versions: of the packages that wrote the SavedModel.
      parents: the SavedModels inside, whose weights may have been trained on.
    """

    source: str | None = None
    name: str | None = None
    numerics: str | None = None
    numerics_chosen: str | None = None
    sha256: str | None = None
    format: str | None = None
    extra_arrays: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    versions: dict[str, str] = dataclasses.field(default_factory=dict)
    parents: tuple[Parent, ...] = ()

    @classmethod
    def from_dict(cls, found: Mapping[str, Any]) -> "Provenance":
        """Reads what `save` wrote; raises TypeError for other keys."""
        tuples = {
            name: tuple(found.get(name, ()))
            for name in ("extra_arrays", "notes")
        }
        parents = tuple(Parent(**row) for row in found.get("parents", ()))
        return cls(**{**found, **tuples, "parents": parents})


def constants(numerics: str) -> dict[str, Any]:
    """A card's `numerics`, by a name in variants.NUMERICS."""
    row = variants.numerics(numerics)
    return {
        "name": row.name,
        "ws_epsilon": row.ws_epsilon,
        "gn_epsilon": row.gn_epsilon,
        "pool_border": str(row.pool_border),
    }


def input_text(shape: Sequence[int | None] = (None, None, None, 3)) -> str:
    """A card's `input`, for pictures of that shape."""
    names = ("n", "height", "width", "3")
    sizes = ", ".join(
        name if size is None else str(size)
        for name, size in zip(names, shape, strict=True)
    )
    free = " of any size" if shape[1] is None and shape[2] is None else ""
    return (
        f"RGB pictures [{sizes}]{free}, float32 in [0, 1] or uint8 in "
        "[0, 255]; scaled inside"
    )


def output_text(
    num_classes: int, feature_dim: int, dtypes: Iterable[str] = ("float32",)
) -> str:
    """A card's `output`.

    Args:
      num_classes: 0 for features.
      feature_dim: length of the feature vector.
      dtypes: in which the layers compute.
    """
    text = (
        f"logits float32 [n, {num_classes}]"
        if num_classes
        else f"features float32 [n, {feature_dim}]"
    )
    others = " and ".join(sorted(set(dtypes) - {"float32"}))
    return f"{text}, computed in {others}" if others else text


def versions() -> dict[str, str]:
    """Versions of what writes a SavedModel."""
    import keras
    import numpy
    import tensorflow as tf

    return {
        "bit-tf": bit_tf.__version__,
        "keras": keras.__version__,
        "numpy": numpy.__version__,
        "python": platform.python_version(),
        "tensorflow": tf.__version__,
    }


def save(
    card: Card, provenance: Provenance, directory: str | os.PathLike
) -> None:
    """Writes both as JSON into a SavedModel's assets.extra/."""
    for file, value in ((CARD_FILE, card), (PROVENANCE_FILE, provenance)):
        path = pathlib.Path(directory) / file
        path.parent.mkdir(exist_ok=True)
        text = json.dumps(dataclasses.asdict(value), indent=2, sort_keys=True)
        path.write_text(text + "\n", encoding="utf-8")


def read(directory: str | os.PathLike) -> tuple[dict, dict]:
    """The card and the provenance in a SavedModel, as plain dicts."""
    return tuple(
        json.loads((pathlib.Path(directory) / file).read_text("utf-8"))
        for file in (CARD_FILE, PROVENANCE_FILE)
    )
