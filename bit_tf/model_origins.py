"""Where a model came from, for records such as metrics.json."""

import os
import weakref
from typing import Any

import keras
import numpy as np

from bit_tf import keras_layer, published, variants
from bit_tf.checkpoints import Checkpoint

__all__ = ["describe", "note", "of_checkpoint", "of_hub", "origin", "precision"]

# Keras would track an attribute of the model.
_ORIGINS: weakref.WeakKeyDictionary[keras.Model, dict[str, Any]] = (
    weakref.WeakKeyDictionary()
)


def note(model: keras.Model, origin: dict[str, Any]) -> None:
    """Records what `of_checkpoint`, `of_hub` or JSON's types say."""
    _ORIGINS[model] = origin


def origin(model: keras.Model) -> dict[str, Any]:
    """What was recorded of a model, or that it is the user's own."""
    return dict(_ORIGINS.get(model, {"source": None, "kind": "own"}))


def of_checkpoint(
    source: str | os.PathLike[str], opened: Checkpoint
) -> dict[str, Any]:
    """The origin of a model with a checkpoint's weights."""
    known = variants.find_architecture(opened.blocks, opened.stem_width)
    return {
        "source": published.shown(source),
        "kind": "checkpoint",
        "format": opened.format,
        "architecture": known and known.name,
        "checkpoint": opened,
    }


def of_hub(handle: str) -> dict[str, Any]:
    """The origin of a model around a SavedModel."""
    shown = published.shown(handle)
    return {"source": shown, "kind": "saved model", "handle": shown}


def describe(model: keras.Model) -> dict[str, Any]:
    """Facts of a model and of its source, for records such as metrics.json.

    Returns:
      JSON's types: "source" as it may be shown, "kind" and, as far as they
      apply, "format", "architecture", "sha256" of a checkpoint, "handle" and
      "content_hash" of a SavedModel, "seed" of random weights; "parameters";
      "trainable_parameters"; "precision", the dtype policy's name.
    """
    found = origin(model)
    opened = found.pop("checkpoint", None)
    if opened is not None:
        found["sha256"] = opened.sha256()
    for layer in model.layers:
        if isinstance(layer, keras_layer.KerasLayer):
            found["content_hash"] = layer.content_hash
    sizes = {
        id(variable): int(np.prod(variable.shape, dtype=np.int64))
        for variable in model.variables
        if keras.backend.is_float_dtype(
            keras.backend.standardize_dtype(variable.dtype)
        )
    }
    found["parameters"] = sum(sizes.values())
    found["trainable_parameters"] = sum(
        sizes.get(id(variable), 0) for variable in model.trainable_variables
    )
    found["precision"] = precision(model)
    return found


def precision(model: keras.Model) -> str:
    """The name of the dtype policy of the model's last layer."""
    return (model.layers or [model])[-1].dtype_policy.name
