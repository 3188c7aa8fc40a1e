"""Which network a task starts from: checkpoints and hubs' models alike.

A checkpoint becomes a `models.ResNetV2`; a SavedModel of a hub stays what it
is, inside a `hub.KerasLayer`. Either gets a new head of zeros, as BiT-HyperRule
wants, and is saved as one `.keras` file with the names of its classes and the
way in which pictures are prepared.
"""

import contextlib
import dataclasses
import os
import re
import zlib
from typing import Any

import keras
from absl import logging

from bit_tf import (
    errors,
    hub,
    keras_layer,
    labels,
    model_origins,
    models,
    published,
    variants,
)
from bit_tf.checkpoints import Checkpoint, Facts
from bit_tf.checkpoints import read as read_checkpoint
from bit_tf.model_origins import describe
from bit_tf.model_sources import Kind, Look, Source, kind_of, look
from bit_tf.transfer_file import hub_layer, load, named, save

__all__ = [
    "Look",
    "classifier",
    "describe",
    "feature_model",
    "load",
    "look",
    "open_classifier",
    "save",
    "trainable_names",
    "variables_to_train",
]

_FEATURES, _HEAD = "features", "head"


def classifier(
    source: Source,
    num_classes: int,
    *,
    dtype=None,
    scratch: bool = False,
    seed: int = 0,
) -> keras.Model:
    """A network of pictures with a new head of zeros.

    Args:
      source: whatever `published.open_checkpoint` takes, whose old head is
        dropped; or a SavedModel by URL, directory or .tar.gz; or a `.keras`
        file that `save` wrote; or with `scratch` the name of an architecture.
        A SavedModel with a head is read as a checkpoint, if it is BiT's.
      num_classes: 1 or more.
      dtype: a dtype policy, such as "mixed_bfloat16". A SavedModel computes as
        it was saved, whatever it is.
      scratch: whether the same network gets random weights.
      seed: of those weights.

    Returns:
      float32 [n, h, w, 3] in [0, 1] → logits [n, num_classes], float32 unless
      the policy computes in another.

    Raises:
      HandleError: there is no SavedModel at the handle, or none that can be
        trained and returns features.
      UnknownNameError: an architecture without `scratch`; or no such name.
      and what `models.load_model` raises.
    """
    if type(num_classes) is not int or num_classes < 1:
        raise ValueError(
            "num_classes is the number of classes, 1 or more. Received: "
            f"{num_classes!r}."
        )
    kind = kind_of(source)
    if scratch:
        return _random(source, kind, num_classes, dtype, seed)
    if kind == "architecture":
        raise errors.UnknownNameError(
            "An architecture has no weights. Received: "
            f"{os.fspath(source)!r}. Name published weights, such as "
            "'BiT-M-R50x1', or ask for random weights (scratch=True, "
            "--from-scratch)."
        )
    if kind == "checkpoint":
        opened = published.open_checkpoint(source)
        return _resnet(opened, num_classes, source, dtype)
    if kind == "transfer":
        return _again(source, num_classes, dtype)
    handle = os.fspath(source)
    layer = _features(handle, dtype)
    if isinstance(layer, Checkpoint):
        return _resnet(layer, num_classes, source, dtype)
    model = keras.Sequential(
        [
            keras.Input((None, None, 3)),
            layer,
            models.Head(num_classes, name=_HEAD, dtype=dtype),
        ],
        name="classifier",
    )
    model_origins.note(model, model_origins.of_hub(handle))
    return model


def feature_model(source: Source, *, dtype=None) -> keras.Model:
    """A network of pictures without a head.

    Args:
      source: see `classifier`; not the name of an architecture.
      dtype: a dtype policy.

    Returns:
      float32 [n, h, w, 3] in [0, 1] → float [n, d], `pre_logits`.

    Raises:
      as `classifier`.
    """
    kind = kind_of(source)
    if kind == "transfer":
        loaded, _ = load(source)
        return _features_of(loaded, os.fspath(source))
    if kind == "hub":
        handle = os.fspath(source)
        layer = _features(handle, dtype)
        if not isinstance(layer, Checkpoint):
            layer.trainable = False
            return _alone(layer, handle)
        opened = layer
    elif kind == "architecture":
        raise errors.UnknownNameError(
            "Features are those of weights, and an architecture has none. "
            f"Received: {os.fspath(source)!r}. Name published weights, such as "
            "'BiT-M-R50x1'."
        )
    else:
        opened = published.open_checkpoint(source)
    model = models.from_checkpoint(opened, head=False, dtype=dtype)
    model_origins.note(model, model_origins.of_checkpoint(source, opened))
    return model


def open_classifier(source: Source) -> tuple[keras.Model, Facts]:
    """A model with its head, and what is known of it.

    Args:
      source: a `.keras` file that `save` wrote, a checkpoint with a head, or a
        SavedModel with one by URL, directory or .tar.gz.

    Returns:
      (float32 [n, h, w, 3] in [0, 1] → logits [n, classes], facts: its labels
      are None only where neither the source nor a published label set of that
      size names the classes)

    Raises:
      HandleError, CheckpointMismatchError: it has no head.
      and what `classifier` raises.
    """
    kind = kind_of(source)
    if kind == "transfer":
        return load(source)
    if kind == "hub":
        return _open_hub(os.fspath(source))
    if kind == "architecture":
        raise errors.UnknownNameError(
            "A classifier has weights, and an architecture has none. "
            f"Received: {os.fspath(source)!r}. Pass a file or published "
            "weights with a head, such as 'BiT-M-R50x1'."
        )
    opened = published.open_checkpoint(source)
    if not opened.num_classes:
        raise errors.CheckpointMismatchError(
            "A classifier is a checkpoint with a head. Received: "
            f"{published.shown(source)!r}, which has none. Fine-tune it with "
            "bit-tf finetune, or score its features with bit-tf evaluate "
            "--probe."
        )
    model = models.from_checkpoint(opened)
    model_origins.note(model, model_origins.of_checkpoint(source, opened))
    return model, named(opened.facts, opened.num_classes)


def trainable_names(model: keras.Model) -> dict[str, keras.Variable]:
    """The model's trainable variables by the names that `freeze` looks at.

    Those of a ResNetV2 are canonical, such as
    "block1/unit01/a/standardized_conv2d/kernel"; those of a SavedModel are
    "features/" and the name that it gives them; others are Keras' paths.
    """
    canonical = {}
    if isinstance(model, models.ResNetV2):
        canonical = {
            id(variable): name
            for name, variable in models.canonical_variables(model).items()
        }
    for layer in model.layers:
        if isinstance(layer, keras_layer.KerasLayer):
            for variable in layer.weights:
                inner = variable.value.name.partition(":")[0]
                canonical[id(variable)] = f"{layer.name}/{inner}"
    found: dict[str, keras.Variable] = {}
    for variable in model.trainable_variables:
        path = variable.path.removeprefix(f"{model.name}/")
        name = canonical.get(id(variable), path)
        while name in found:
            name += "_"
        found[name] = variable
    return found


def variables_to_train(
    model: keras.Model, freeze: str | None = None
) -> list[keras.Variable]:
    """The model's trainable variables but for the frozen ones.

    Args:
      model: from `classifier`.
      freeze: a regular expression, searched in the names of
        `trainable_names`, such as "root_block|block[1-3]"; None freezes none.

    Raises:
      UnknownNameError: the expression is malformed, or matches no name, or
        all.
    """
    named = trainable_names(model)
    if freeze is None:
        return list(named.values())
    try:
        pattern = re.compile(freeze)
    except (re.error, TypeError) as error:
        raise errors.UnknownNameError(
            "What is frozen is named by a regular expression, such as "
            f"'root_block|block[1-3]'. Received: {freeze!r} ({error})."
        ) from error
    kept = [v for name, v in named.items() if not pattern.search(name)]
    if len(kept) in (0, len(named)):
        tops = dict.fromkeys("/".join(name.split("/")[:2]) for name in named)
        raise errors.UnknownNameError(
            "What is frozen is some of a model's variables, not all. Received: "
            f"{freeze!r}, which matches {'none' if kept else 'all'} of "
            f"{len(named)}. Their names begin with: "
            f"{', '.join(list(tops)[:20])}."
        )
    return kept


def _random(
    source: Source, kind: Kind, num_classes: int, dtype, seed: int
) -> models.ResNetV2:
    """The network of a source, with random weights."""
    facts = Facts()
    row = None
    if kind == "architecture":
        row = variants.architecture(os.fspath(source))
    elif kind == "checkpoint" and not os.path.exists(source):
        # A published name says it all, without a download.
        with contextlib.suppress(errors.UnknownNameError):
            found = variants.variant(os.fspath(source))
            row = variants.architecture(found.architecture)
            facts = Facts(found.numerics)
    if row is None and kind != "checkpoint":
        raise errors.HandleError(
            "Random weights are for networks of this package: a checkpoint, a "
            "published name, or an architecture such as 'R50x1'. Received: "
            f"{published.shown(source)!r}, a SavedModel. Name its "
            "architecture instead."
        )
    if row is None:
        opened = published.open_checkpoint(source)
        blocks, stem_width = opened.blocks, opened.stem_width
        facts = opened.facts
        row = variants.find_architecture(blocks, stem_width)
    else:
        blocks, stem_width = row.blocks, row.stem_width
    model = models.ResNetV2(
        blocks,
        stem_width,
        num_classes,
        numerics=facts.numerics,
        output_stride=facts.output_stride,
        dtype=dtype,
        name=row.name if row else "resnetv2",
    )
    for name, variable in models.canonical_variables(model).items():
        if name.endswith("kernel") and not name.startswith("head/"):
            mixed = zlib.crc32(f"{seed}/{name}".encode())
            initializer = keras.initializers.HeNormal(seed=mixed)
            variable.assign(initializer(variable.shape))
    model_origins.note(
        model,
        {
            "source": published.shown(source),
            "kind": "random weights",
            "architecture": model.name,
            "seed": seed,
        },
    )
    return model


def _resnet(
    opened: Checkpoint, num_classes: int, source: Source, dtype
) -> models.ResNetV2:
    """The network of a checkpoint with a head of its own."""
    for note in opened.notes:
        logging.warning("%s: %s", published.shown(source), note)
    known = variants.find_architecture(opened.blocks, opened.stem_width)
    model = models.ResNetV2(
        opened.blocks,
        opened.stem_width,
        num_classes,
        output_stride=opened.facts.output_stride,
        numerics=opened.facts.numerics,
        dtype=dtype,
        name=known.name if known else "resnetv2",
    )
    for name, variable in models.canonical_variables(model).items():
        if not name.startswith("head/"):
            variable.assign(opened[name])
    model_origins.note(model, model_origins.of_checkpoint(source, opened))
    return model


def _again(source: Source, num_classes: int, dtype) -> keras.Model:
    """A model of `save`, with a new head in place of its own."""
    loaded, _ = load(source)
    layer = hub_layer(loaded)
    assert layer is not None
    layer.trainable = True
    model = keras.Sequential(
        [
            keras.Input((None, None, 3)),
            layer,
            models.Head(num_classes, name=_HEAD, dtype=dtype),
        ],
        name="classifier",
    )
    model_origins.note(model, model_origins.origin(loaded))
    return model


def _features_of(loaded: keras.Model, source: str) -> keras.Model:
    layer = hub_layer(loaded)
    assert layer is not None
    layer.trainable = False
    model = _alone(layer, str(layer.handle))
    origin = model_origins.origin(model)
    model_origins.note(model, {**origin, "source": source})
    return model


def _alone(layer: keras.layers.Layer, handle: str) -> keras.Model:
    model = keras.Sequential(
        [keras.Input((None, None, 3)), layer], name="feature_model"
    )
    model_origins.note(model, model_origins.of_hub(handle))
    return model


def _features(handle: str, dtype) -> keras_layer.KerasLayer | Checkpoint:
    """The layer of a SavedModel of features; one with a head as a checkpoint.

    Raises:
      HandleError: it has a head and is not BiT's; it cannot be trained; or its
        output is no vector a picture.
    """
    directory = hub.resolve(handle)
    signatures, _ = _told(directory)
    if "image_classification" in signatures or labels.read_saved_model(
        directory
    ):
        try:
            opened = read_checkpoint(directory)
        except errors.CheckpointError as error:
            raise errors.HandleError(
                "A network that is fine-tuned returns features, not the logits "
                f"of other classes. Received: {handle!r}, which has a head, "
                "and whose weights are not BiT's. Publishers have a twin of "
                "such a model without the head, often under the address that "
                "ends in 'feature_vector'; pass that."
            ) from error
        logging.warning(
            "%s has a head, which is dropped: its weights are read as a "
            "checkpoint. Its twin without a head is trained as it is.",
            handle,
        )
        return opened
    layer = keras_layer.KerasLayer(
        handle, trainable=True, name=_FEATURES, dtype=dtype
    )
    shape = _output_shape(layer)
    if shape is None or len(shape) != 2 or shape[-1] is None:
        raise errors.HandleError(
            "A network that is fine-tuned returns a vector of a fixed length "
            "for a picture of any size, float32 [n, d]. Received: "
            f"{handle!r}, which returns {shape}. Pass a model of feature "
            "vectors."
        )
    return layer


def _output_shape(layer: keras_layer.KerasLayer) -> Any:
    """The shape that the layer's output has, or what it is instead."""
    try:
        output = layer(keras.KerasTensor((None, None, None, 3), "float32"))
    except (TypeError, ValueError) as error:
        return f"an error for pictures ({errors.brief(str(error))})"
    shape = getattr(output, "shape", None)
    return type(output).__name__ if shape is None else tuple(shape)


def _told(directory: str) -> tuple[set[str], Facts]:
    """(names of signatures, facts) of a SavedModel, without running it."""
    from tensorflow.python.saved_model import loader_impl

    try:
        parsed = loader_impl.parse_saved_model(directory)
    except OSError as error:
        raise errors.HandleError(
            f"{directory!r} does not hold a SavedModel: {error}"
        ) from error
    found = {
        name for graph in parsed.meta_graphs for name in graph.signature_def
    }
    facts = Facts()
    with contextlib.suppress(errors.CheckpointError):
        facts = read_checkpoint(directory).facts
    return found, facts


def _open_hub(handle: str) -> tuple[keras.Model, Facts]:
    directory = hub.resolve(handle)
    signatures, facts = _told(directory)
    names = labels.read_saved_model(directory) or facts.labels
    layer = keras_layer.KerasLayer(handle, name="classifier")
    shape = _output_shape(layer)
    count = shape[-1] if isinstance(shape, tuple) and len(shape) == 2 else None
    is_classifier = (
        "image_classification" in signatures
        or names is not None
        or (count is not None and labels.of_count(count) is not None)
    )
    if count is None or not is_classifier:
        raise errors.HandleError(
            "A classifier returns logits float32 [n, classes], and says so by "
            "the signature image_classification, by labels, or by a published "
            f"number of classes. Received: {handle!r}, which returns {shape} "
            "and does not. Fine-tune it with bit-tf finetune, or score its "
            "features with bit-tf evaluate --probe."
        )
    model = _alone(layer, handle)
    return model, named(dataclasses.replace(facts, labels=names), count)
