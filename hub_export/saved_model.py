"""Keras model → reusable SavedModel, complete and checked, or nothing."""

import contextlib
import dataclasses
import math
import os
import pathlib
import uuid
from collections.abc import Iterator, Sequence

import keras
import numpy as np
import tensorflow as tf

from bit_tf import (
    errors,
    files,
    labels,
    models,
    presets,
    published,
    transfer,
    variants,
)
from bit_tf.checkpoints import keras_file
from hub_export import card, golden, origins, reexport, reusable, sources

__all__ = ["LARGE", "convert", "export"]

# Bytes of weights from which a model is traced unit by unit.
LARGE = 2**31 - 2**24

# What a SavedModel's directory holds.
_OURS = {
    "assets",
    "assets.extra",
    "fingerprint.pb",
    "keras_metadata.pb",
    "saved_model.pb",
    "tfhub_module.pb",
    "variables",
}


def export(
    model: models.ResNetV2 | keras.Model,
    path: str | os.PathLike,
    *,
    class_labels: str | Sequence | None = "auto",
    probabilities: str | None = None,
    head: bool | None = None,
    l2: float = 0.0,
    preset: presets.Preset | None = None,
    provenance: card.Provenance | None = None,
    overwrite: bool = False,
    verify: bool = True,
) -> dict:
    """Writes a reusable SavedModel.

    Of a ResNetV2: `__call__(images, training=False)` takes float32
    [n, h, w, 3] in [0, 1] or uint8 in [0, 255] and returns logits, or features
    where the model has no head; `endpoints(images)` returns a dict of every
    endpoint. Signatures: serving_default → output_1, image_feature_vector →
    features, and with a head image_classification → logits, probabilities.
    Variables have the canonical names, and all are trainable, also those of
    layers frozen in `model`: freezing is the consumer's. Outputs are float32.
    Nothing appears at `path` before the result was loaded in a fresh process
    and gave the model's own values.

    Of a Keras model that contains a `hub.KerasLayer`, the same: the SavedModel
    inside goes into the new one with its variables as they are now, its
    regularization losses, what `training` means to it and, if it has them, its
    endpoints; the new one records its handle and hash, and needs none of its
    files. What the model adds is a head, and the output logits, if that has
    weights and does not end with a normalization; else, and of a SavedModel of
    features alone, the output is features. `head` says it of a model of which
    this is not true, such as a projection. image_feature_vector is there if
    one vector a picture comes from one SavedModel inside. Of a model that is
    one SavedModel alone, labels, probabilities and preset are that one's unless
    others are given.

    Args:
      model: from create_model or load_model; or a Keras model of pictures
        [n, h, w, 3] in [0, 1] → [n, d] that contains a `hub.KerasLayer`. On
        the TensorFlow backend.
      path: the directory to make.
      class_labels: one name a class; or "ilsvrc2012", "imagenet21k"; or "auto",
        the set whose number of classes fits, if any; or None.
      probabilities: "softmax" or "sigmoid"; by default labels.activation.
      head: whether the outputs are logits of classes; found out unless given.
      l2: factor of the sum of squares of every kernel, offered to those who
        fine-tune as `regularization_losses`; 0 adds none. Around a SavedModel
        kernels are the trainable arrays of two dimensions and more, and there
        must be no other losses.
      preset: how the weights' publisher prepared pictures, for the record.
      provenance: what is known of the weights' source; parents and notes of
        SavedModels inside are added.
      overwrite: replace an existing SavedModel or empty directory.
      verify: load back in a fresh process.

    Returns:
      The verification's report: relative error, counts, signatures.

    Raises:
      ExportError: `path` exists, the backend is not TensorFlow, the model is
        of another kind, a SavedModel inside is not at its handle any more, or
        the files could not be written.
      VerificationError: the files do not give the model's values.
    """
    if keras.backend.backend() != "tensorflow":
        raise errors.ExportError(
            "SavedModels are written on Keras' TensorFlow backend. Received: "
            f"{keras.backend.backend()!r}. Set KERAS_BACKEND=tensorflow before "
            "keras is imported, and load the weights there."
        )
    if not 0 <= l2 < math.inf:
        raise errors.ExportError(
            f"l2 must be a finite number of 0 or more. Received: {l2!r}."
        )
    if probabilities not in (None, "softmax", "sigmoid"):
        raise errors.ExportError(
            "probabilities must be 'softmax' or 'sigmoid'. "
            f"Received: {probabilities!r}."
        )
    named = probabilities or class_labels not in (None, "auto")
    if named and head is False:
        raise errors.ExportError(
            "Class labels and probabilities are of logits. Received: "
            f"class_labels={errors.brief(class_labels)}, "
            f"probabilities={probabilities!r} and head=False, which says that "
            "the outputs are features. Leave one of them out."
        )
    _check_target(path, overwrite)
    provenance = provenance or card.Provenance(versions=card.versions())
    found: _ResNet | reexport.Model
    told = origins.Origin()
    if isinstance(model, models.ResNetV2):
        if head not in (None, bool(model.num_classes)):
            raise errors.ExportError(
                "The head of a ResNetV2 is part of it. Received: "
                f"head={head!r}, and a model of {model.num_classes} classes. "
                "Load it with load_model(…, head=False), or create it with "
                "num_classes."
            )
        found = _ResNet(model)
    elif reexport.is_around(model):
        found = reexport.Model(model, head=True if named else head)
        told = found.told
        for directory in found.directories:
            sources.require_apart(path, directory)
        provenance = dataclasses.replace(
            provenance,
            parents=found.parents,
            notes=(*provenance.notes, *found.notes),
        )
    else:
        raise errors.ExportError(
            "export takes a model of bit_tf.create_model or bit_tf.load_model, "
            "or a Keras model that contains a bit_tf.hub.KerasLayer. "
            f"Received: {type(model).__name__}."
        )
    if isinstance(class_labels, str) and class_labels == "auto":
        class_labels = told.class_labels or labels.of_count(found.num_classes)
    classes = _labels(class_labels, found.num_classes)
    if probabilities is None:
        probabilities = told.probabilities or labels.activation(
            found.num_classes
        )
    preset = preset or told.preset
    with _staged(path, overwrite) as staging:
        with found.objects(probabilities, l2) as objects:
            tf.saved_model.save(
                objects.root, staging, signatures=objects.signatures
            )
        _derive_id(staging)
        if classes:
            _write_labels(classes, staging)
            if not isinstance(class_labels, str):
                class_labels = "custom"
        golden.save(found.golden_values(), staging)
        card.save(
            found.card(
                objects.params,
                probabilities=probabilities if found.num_classes else None,
                labels=class_labels if classes else None,
                preset=preset and dataclasses.asdict(preset),
            ),
            provenance,
            staging,
        )
        report = golden.check_in_fresh_process(staging) if verify else {}
    return report


def convert(
    source: str | os.PathLike,
    path: str | os.PathLike,
    *,
    head: bool = True,
    numerics: str | None = None,
    class_labels: str | Sequence | None = "auto",
    **options,
) -> dict:
    """Checkpoint → reusable SavedModel (see `export` for the rest).

    Args:
      source: whatever bit_tf.load_model takes.
      path: the directory to make.
      head: False publishes features.
      numerics: constants of a source instead of the checkpoint's own.
      class_labels: as in `export`; "auto" takes the checkpoint's own first.
      **options: of `export`.

    Returns:
      The verification's report, and the checkpoint's: format, arrays,
      extra_arrays, notes, numerics.
    """
    _check_target(path, options.get("overwrite", False))
    around = sources.around_saved_model(source)
    if around is not None:
        return _convert_around(
            around, path, source, head, numerics, class_labels, options
        )
    checkpoint = published.open_checkpoint(source)
    sources.require_apart(path, checkpoint.path)
    model = models.from_checkpoint(checkpoint, head=head, numerics=numerics)
    if isinstance(class_labels, str) and class_labels == "auto" and head:
        class_labels = checkpoint.facts.labels or "auto"
    provenance = card.Provenance(
        source=checkpoint.path.name,
        name=None if os.path.exists(source) else published.shown(source),
        sha256=checkpoint.sha256(),
        format=checkpoint.format,
        numerics=checkpoint.facts.numerics,
        numerics_chosen=numerics or "source",
        extra_arrays=checkpoint.extra,
        notes=checkpoint.notes,
        versions=card.versions(),
    )
    report = export(
        model,
        path,
        class_labels=class_labels,
        preset=checkpoint.facts.preset,
        provenance=provenance,
        **options,
    )
    return report | sources.describe(checkpoint, numerics)


def _convert_around(
    around: sources.Around,
    path: str | os.PathLike,
    source: str | os.PathLike,
    head: bool,
    numerics: str | None,
    class_labels: str | Sequence | None,
    options: dict,
) -> dict:
    """`convert` of a .keras file that bit_tf.transfer.save wrote."""
    sources.require_apart(path, around.path)
    if numerics is not None:
        raise errors.ExportError(
            "The constants of a SavedModel are part of its functions. "
            f"Received: numerics={numerics!r} for {published.shown(source)!r}, "
            "a model around one. Leave numerics out."
        )
    model, facts = transfer.load(around.path)
    if not head:
        inner = model.layers[:-1]
        for layer in inner:
            # Mixed precision would round what the SavedModel returns.
            layer.dtype_policy = keras.DTypePolicy(layer.variable_dtype)
        model = keras.Sequential(
            [keras.Input(model.input_shape[1:]), *inner], name=model.name
        )
        class_labels, options = None, {**options, "probabilities": None}
    elif isinstance(class_labels, str) and class_labels == "auto":
        class_labels = facts.labels or "auto"
    provenance = card.Provenance(
        source=around.path.name,
        name=None if os.path.exists(source) else published.shown(source),
        sha256=files.measure(around.path)[1],
        format=keras_file.NAME,
        versions=card.versions(),
    )
    report = export(
        model,
        path,
        class_labels=class_labels,
        preset=facts.preset,
        provenance=provenance,
        **options,
    )
    said, came = card.read(path)
    return report | {
        "format": keras_file.NAME,
        "arrays": len(model.weights),
        "extra_arrays": [],
        "notes": came["notes"],
        "numerics": said["numerics"].get("name"),
    }


def _labels(class_labels, num_classes: int):
    if class_labels is None or not num_classes:
        return None
    if isinstance(class_labels, str):
        class_labels = labels.label_set(class_labels)
    try:
        return labels.check(class_labels, num_classes)
    except (TypeError, ValueError) as error:
        raise errors.ExportError(str(error)) from error


def _write_labels(classes: Sequence[labels.Label], directory: str) -> None:
    if labels.read_saved_model(directory) is not None:
        raise errors.ExportError(
            "Class names are kept in assets/ under a name of their own. "
            "Received: a SavedModel inside of the model, which reads a file of "
            "that name. Pass class_labels=None (--labels none)."
        )
    labels.write_saved_model(classes, directory)


def _check_target(path: str | os.PathLike, overwrite: bool) -> None:
    """Refuses to replace anything but what an export has made."""
    target = pathlib.Path(path)
    if not os.path.lexists(target):
        return
    if not overwrite:
        raise errors.ExportError(
            f"A directory is never written over unless asked. {str(target)!r} "
            "exists; choose another, or pass overwrite=True (--overwrite)."
        )
    names = set()
    if target.is_dir():
        names = {entry.name for entry in target.iterdir()}
        if not names:
            return
    if "saved_model.pb" not in names or names - _OURS:
        others = ", ".join(sorted(names - _OURS)[:5]) or "no saved_model.pb"
        raise errors.ExportError(
            "Only a SavedModel, with nothing of anybody else's in it, or an "
            f"empty directory is written over. {str(target)!r} is neither "
            f"({others}); choose another path, or remove it."
        )


@contextlib.contextmanager
def _staged(path: str | os.PathLike, overwrite: bool) -> Iterator[str]:
    """A temporary sibling that becomes `path` when the block succeeds."""
    _check_target(path, overwrite)
    target = pathlib.Path(path)
    try:
        with files.new_directory(target, overwrite) as directory:
            yield directory
    except (OSError, tf.errors.OpError) as error:
        raise errors.ExportError(
            f"The SavedModel could not be written to {str(target)!r}: {error}. "
            "No part of it was left behind; check the free space, and that no "
            "other process writes there."
        ) from error


@contextlib.contextmanager
def _unit_by_unit(model: models.ResNetV2) -> Iterator[None]:
    """Traces a large model with one function for every unit.

    TensorFlow's executor starts whatever is ready, so in one flat graph the
    kernels of the whole model are standardized at once, and take as much
    memory again as the weights. A function's body waits for its arguments.
    """
    units = []
    if 4 * model.count_params() > LARGE:
        units = [
            unit
            for layer in model.layers
            if isinstance(layer, models.Block)
            for unit in layer.units
        ]
    for unit in units:
        unit.call = tf.function(  # type: ignore[method-assign]
            unit.call, experimental_attributes={"_noinline": True}
        )
    try:
        yield
    finally:
        for unit in units:
            del unit.call


def _derive_id(directory: str) -> None:
    """Gives a SavedModel an id made from its hashes instead of a random one.

    Nothing else in it differs between two exports of the same weights.
    """
    from tensorflow.core.protobuf import fingerprint_pb2

    path = pathlib.Path(directory, "fingerprint.pb")
    if not path.is_file():
        return
    found = fingerprint_pb2.FingerprintDef.FromString(path.read_bytes())
    found.ClearField("uuid")
    hashes = found.SerializeToString(deterministic=True).hex()
    found.uuid = str(uuid.uuid5(uuid.NAMESPACE_OID, hashes).int)
    path.write_bytes(found.SerializeToString(deterministic=True))


class _ResNet:
    """A BiT-ResNet, with what `reexport.Model` has for other models."""

    def __init__(self, model: models.ResNetV2):
        self._model = model
        self.num_classes: int = model.num_classes

    def golden_values(self) -> dict[str, np.ndarray]:
        return golden.make(self._model)

    @contextlib.contextmanager
    def objects(
        self, probabilities: str, l2: float
    ) -> Iterator[reusable.Objects]:
        with _unit_by_unit(self._model):
            yield reusable.assemble(self._parts(l2), probabilities)

    def card(self, params: int, **facts) -> card.Card:
        model = self._model
        known = variants.find_architecture(model.blocks, model.stem_width)
        dtype = model.get_layer("root_block").compute_dtype
        return card.Card(
            architecture=known.name if known else "custom",
            feature_dim=model.feature_dim,
            num_classes=model.num_classes,
            params=params,
            task=card.TASKS[bool(model.num_classes)],
            input=card.input_text(),
            output=card.output_text(
                model.num_classes, model.feature_dim, [dtype]
            ),
            output_stride=model.output_stride,
            numerics=card.constants(model.numerics),
            **facts,
        )

    def _parts(self, l2: float) -> reusable.Parts:
        model = self._model
        network = models.endpoints(model, models.endpoint_names(model))
        output = "logits" if model.num_classes else "pre_logits"
        shape = (None, None, None, 3)

        @tf.function(input_signature=[tf.TensorSpec(shape, tf.float32)])
        def forward(images):
            return {
                name: tf.cast(value, tf.float32)
                for name, value in network(images).items()
            }

        # BiT computes the same in training and inference.
        def call(images, training):
            del training
            found = forward(images)
            return {"output": found[output], "features": found["pre_logits"]}

        def endpoints(images, training):
            del training
            return forward(images)

        named = models.canonical_variables(model)
        variables = [variable.value for variable in named.values()]
        kernels = [
            variable.value
            for name, variable in named.items()
            if "kernel" in name
        ]
        return reusable.Parts(
            shape=shape,
            num_classes=model.num_classes,
            call=call,
            has_features=True,
            endpoints=endpoints,
            variables=variables,
            trainable_variables=variables,
            losses=[reusable.square(k, l2) for k in kernels] if l2 else [],
        )
