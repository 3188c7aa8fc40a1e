"""Fine-tuned models as one `.keras` file, with labels and preset.

A `models.ResNetV2` is written as bit_tf.checkpoints writes it; a model around
a SavedModel as Keras does, with the facts in metadata.json.
"""

import contextlib
import dataclasses
import json
import os
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import keras
from absl import logging

from bit_tf import (
    errors,
    files,
    hub,
    keras_layer,
    labels,
    model_origins,
    models,
    published,
    relocation,
)
from bit_tf.checkpoints import Facts, json_files, keras_file
from bit_tf.checkpoints import facts as checkpoint_facts
from bit_tf.checkpoints import read as read_checkpoint

__all__ = [
    "check",
    "hub_layer",
    "is_around_saved_model",
    "load",
    "named",
    "place",
    "save",
]

# Beside the facts in metadata.json: where the SavedModel lies.
_PARENT = "bit_tf_parent"
_MAX_JSON = 1 << 24
# (class, registered name, module) of all that `save` writes but ResNetV2.
_KINDS = {
    ("Sequential", None, "keras"),
    ("Sequential", "Sequential", "keras"),
    ("InputLayer", None, "keras.layers"),
    ("DTypePolicy", None, "keras"),
    ("KerasLayer", "bit_tf>KerasLayer", "bit_tf.keras_layer"),
    ("Head", "bit_tf>Head", "bit_tf.models"),
}


def save(
    model: keras.Model, path: str | os.PathLike[str], facts: Facts
) -> None:
    """Writes a model of this module as one `.keras` file.

    The file appears whole or not at all. A SavedModel is named by its handle,
    and one on this disk also by its place relative to the file, so that both
    may be moved together; the weights are all in the file.

    Args:
      model: from `classifier` or `load`.
      path: the file to write or to replace; it ends in ".keras".
      facts: labels and preset to record.

    Raises:
      CheckpointFormatError: the path has another ending.
      TypeError: the model is of another kind.
      OSError: the file cannot be written.
    """
    path = Path(path)
    keras_file.require_suffix(path)
    if isinstance(model, models.ResNetV2):
        arrays = models.canonical_arrays(model)
        arrays.facts = dataclasses.replace(
            facts, numerics=model.numerics, output_stride=model.output_stride
        )
        keras_file.write(arrays, path)
        return
    layer = hub_layer(model)
    if layer is None:
        raise TypeError(
            "What is saved here is a model of transfer.classifier. Received: "
            f"{type(model).__name__}. Save it with its own save()."
        )
    parent: dict[str, str] = {"handle": layer.get_config()["handle"]}
    if os.path.exists(parent["handle"]):
        parent["relative"] = os.path.relpath(
            os.path.realpath(parent["handle"]), os.path.realpath(path.parent)
        )
    with (
        tempfile.TemporaryDirectory(
            dir=path.parent, prefix=f".{path.name}."
        ) as directory,
        files.new_file(path) as file,
    ):
        plain = Path(directory, "model.keras")
        model.save(plain)
        described = json.loads(keras_file.metadata(facts))
        described[_PARENT] = parent
        with (
            zipfile.ZipFile(plain) as source,
            zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as target,
        ):
            for info in source.infolist():
                member = keras_file.member(info.filename, info.file_size)
                if info.filename == keras_file.METADATA:
                    target.writestr(
                        keras_file.member(info.filename), json.dumps(described)
                    )
                    continue
                with source.open(info) as read, target.open(member, "w") as to:
                    while chunk := read.read(1 << 20):
                        to.write(chunk)


def load(path: str | os.PathLike[str]) -> tuple[keras.Model, Facts]:
    """Reads what `save` wrote.

    A file around a SavedModel makes this fetch and run the SavedModel that it
    names, which a log line tells. Nothing else that a file may name is run:
    one that holds any other layer is refused.

    Returns:
      (the model, its labels and preset)

    Raises:
      FileNotFoundError: there is no such file.
      CheckpointError: it is damaged, or of another kind.
      HandleError: the SavedModel is not there, or is another one now.
    """
    path = Path(path)
    if not is_around_saved_model(path):
        opened = read_checkpoint(path)
        model: keras.Model = models.from_checkpoint(opened)
        model_origins.note(model, model_origins.of_checkpoint(path, opened))
        return model, named(opened.facts, opened.num_classes)
    facts, parent = _recorded(path)
    with _moved(path, parent) as handle:
        logging.info(
            "%s is around the SavedModel %s", path, published.shown(handle)
        )
        try:
            model = keras.saving.load_model(
                path, compile=False, safe_mode=False
            )
        except errors.BitTfError:
            raise
        except (
            AttributeError,
            KeyError,
            OSError,
            TypeError,
            ValueError,
            zipfile.BadZipFile,
            zlib.error,
        ) as error:
            raise _refused(path, f"one that Keras cannot load ({error})") from (
                error
            )
    layer = hub_layer(model)
    if layer is None:
        raise _refused(path, "another order of layers")
    if facts.labels is not None:
        count = model.output_shape[-1]
        if len(facts.labels) != count:
            raise _refused(
                path, f"{len(facts.labels)} labels for {count} classes"
            )
    origin = model_origins.of_hub(str(layer.handle))
    model_origins.note(model, {**origin, "source": str(path)})
    return model, facts


def is_around_saved_model(path: str | os.PathLike[str]) -> bool:
    """Whether a file is a `.keras` archive of a Sequential model.

    Raises:
      CheckpointFormatError: it is such an archive, and damaged.
    """
    if not os.path.isfile(path) or not keras_file.sniff(path):
        return False
    config = _member(Path(path), keras_file.CONFIG)
    return config.get("registered_name") in (None, "Sequential")


def place(path: str | os.PathLike[str], handle: str) -> str:
    """The handle that `load` uses for one that a file names.

    Args:
      path: of a file around a SavedModel.
      handle: as its layer has it.

    Raises:
      CheckpointFormatError: `load` refuses the file.
    """
    path = Path(path)
    _, parent = _recorded(path)
    with _moved(path, parent):
        return relocation.moved(handle)


def _recorded(path: Path) -> tuple[Facts, Any]:
    """(facts, where the SavedModel lies) of a file that `check` passes."""
    check(path)
    described = _member(path, keras_file.METADATA)
    facts = json_files.recorded_facts(
        f"{path}: {keras_file.METADATA}", described.get(checkpoint_facts.KEY)
    )
    if facts is None:
        raise _refused(path, f"a {keras_file.METADATA} without labels")
    return facts, described.get(_PARENT)


def check(path: Path) -> None:
    """Refuses a file that names anything but what `save` writes.

    Raises:
      CheckpointFormatError: it does.
    """
    todo: list[Any] = [_member(path, keras_file.CONFIG)]
    while todo:
        value = todo.pop()
        if isinstance(value, list):
            todo += value
        if not isinstance(value, dict):
            continue
        todo += value.values()
        if "class_name" in value:
            kind = tuple(
                value.get(key)
                for key in ("class_name", "registered_name", "module")
            )
            try:
                known = kind in _KINDS
            except TypeError:
                known = False
            if not known:
                raise _refused(path, f"one with {errors.brief(kind)}")


def named(facts: Facts, num_classes: int) -> Facts:
    """Facts with the labels of a published label set, if it fits."""
    known = labels.of_count(num_classes)
    if facts.labels is not None or known is None:
        return facts
    return dataclasses.replace(facts, labels=labels.label_set(known))


def hub_layer(model: keras.Model) -> keras_layer.KerasLayer | None:
    """The SavedModel's layer of a model that `save` writes, or None."""
    layers = [
        layer
        for layer in model.layers
        if not isinstance(layer, keras.layers.InputLayer)
    ]
    if (
        isinstance(model, keras.Sequential)
        and len(layers) == 2
        and isinstance(layers[0], keras_layer.KerasLayer)
        and isinstance(layers[1], models.Head)
    ):
        return layers[0]
    return None


@contextlib.contextmanager
def _moved(path: Path, parent: Any) -> Iterator[str]:
    """Has a SavedModel found beside the file, where it was moved with it.

    Yields:
      The handle that is used.
    """
    parent = parent if isinstance(parent, dict) else {}
    handle, relative = parent.get("handle"), parent.get("relative")
    if isinstance(handle, str) and isinstance(relative, str):
        there = os.path.normpath(path.resolve().parent / relative)
        if not os.path.exists(handle) and os.path.exists(there):
            with hub.relocated({handle: there}):
                yield there
            return
    yield str(handle)


def _refused(path: Path, what: str) -> errors.CheckpointFormatError:
    return errors.CheckpointFormatError(
        f"{path}: a fine-tuned model is a .keras file of a ResNetV2, or of a "
        f"KerasLayer and a Head, as transfer.save writes it. Received: {what}. "
        "Save the model again, or load it with keras.saving.load_model if you "
        "trust it."
    )


def _member(path: Path, name: str) -> dict[str, Any]:
    """A JSON object in the archive."""
    try:
        with zipfile.ZipFile(path) as opened, opened.open(name) as file:
            return json_files.json_object(
                file.read(_MAX_JSON + 1)[:_MAX_JSON], constants=True
            )
    except (
        zipfile.BadZipFile,
        zlib.error,
        EOFError,
        KeyError,
        NotImplementedError,
        RecursionError,
        RuntimeError,
        ValueError,
    ) as error:
        raise _refused(path, f"{name} that cannot be read ({error})") from error
