"""Keras model → reusable SavedModel, complete and checked, or nothing.

The interface is TF Hub's "reusable SavedModel": `__call__`, `variables`,
`trainable_variables`, `regularization_losses`.
"""

import contextlib
import dataclasses
import math
import os
import pathlib
import uuid
from collections.abc import Iterator, Sequence

import keras
import tensorflow as tf

from bit_tf import (
    errors,
    files,
    hub,
    labels,
    models,
    presets,
    published,
    variants,
)
from bit_tf.images import to_unit_range
from hub_export import card, golden, sources

__all__ = ["convert", "export"]

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
INPUT = (
    "RGB pictures [n, height, width, 3] of any size, float32 in [0, 1] or "
    "uint8 in [0, 255]; scaled inside"
)


def export(
    model: models.ResNetV2,
    path: str | os.PathLike,
    *,
    class_labels: str | Sequence | None = "auto",
    probabilities: str | None = None,
    l2: float = 0.0,
    preset: presets.Preset | None = None,
    provenance: card.Provenance | None = None,
    overwrite: bool = False,
    verify: bool = True,
) -> dict:
    """Writes a reusable SavedModel.

    `__call__(images, training=False)` takes float32 [n, h, w, 3] in [0, 1] or
    uint8 in [0, 255] and returns logits, or features where the model has no
    head; `endpoints(images)` returns a dict of every endpoint. Signatures:
    serving_default → output_1, image_feature_vector → features, and with a
    head image_classification → logits, probabilities. Variables have the
    canonical names, and all are trainable, also those of layers frozen in
    `model`: freezing is the consumer's. Outputs are float32. Nothing appears at
    `path` before the result was loaded in a fresh process and gave the model's
    own values.

    Args:
      model: from create_model or load_model, on the TensorFlow backend.
      path: the directory to make.
      class_labels: one name a class; or "ilsvrc2012", "imagenet21k"; or "auto",
        the set whose number of classes fits, if any; or None.
      probabilities: "softmax" or "sigmoid"; by default labels.activation.
      l2: factor of the sum of squares of every kernel, offered to those who
        fine-tune as `regularization_losses`; 0 offers none.
      preset: how the weights' publisher prepared pictures, for the record.
      provenance: what is known of the weights' source.
      overwrite: replace an existing SavedModel or empty directory.
      verify: load back in a fresh process.

    Returns:
      The verification's report: relative error, counts, signatures.

    Raises:
      ExportError: `path` exists, the backend is not TensorFlow, or the files
        could not be written.
      VerificationError: the files do not give the model's values.
    """
    if keras.backend.backend() != "tensorflow":
        raise errors.ExportError(
            "SavedModels are written on Keras' TensorFlow backend. Received: "
            f"{keras.backend.backend()!r}. Set KERAS_BACKEND=tensorflow before "
            "keras is imported, and load the weights there."
        )
    if not isinstance(model, models.ResNetV2):
        raise errors.ExportError(
            "export takes a model of bit_tf.create_model or bit_tf.load_model. "
            f"Received: {type(model).__name__}."
        )
    if isinstance(class_labels, str) and class_labels == "auto":
        class_labels = labels.of_count(model.num_classes)
    classes = _labels(class_labels, model.num_classes)
    if probabilities is None:
        probabilities = labels.activation(model.num_classes)
    if probabilities not in ("softmax", "sigmoid"):
        raise errors.ExportError(
            "probabilities must be 'softmax' or 'sigmoid'. "
            f"Received: {probabilities!r}."
        )
    if not 0 <= l2 < math.inf:
        raise errors.ExportError(
            f"l2 must be a finite number of 0 or more. Received: {l2!r}."
        )
    with _staged(path, overwrite) as directory:
        with _unit_by_unit(model):
            root, signatures = _serving_objects(model, probabilities, l2)
            tf.saved_model.save(root, directory, signatures=signatures)
        _derive_id(directory)
        if classes:
            labels.write_saved_model(classes, directory)
        golden.save(golden.make(model), directory)
        card.save(
            _card(model, class_labels, classes, probabilities, preset),
            provenance or card.Provenance(versions=card.versions()),
            directory,
        )
        report = golden.check_in_fresh_process(directory) if verify else {}
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


def _labels(class_labels, num_classes: int):
    if class_labels is None or not num_classes:
        return None
    if isinstance(class_labels, str):
        class_labels = labels.label_set(class_labels)
    try:
        return labels.check(class_labels, num_classes)
    except (TypeError, ValueError) as error:
        raise errors.ExportError(str(error)) from error


def _card(model, class_labels, classes, probabilities, preset) -> card.Card:
    known = variants.find_architecture(model.blocks, model.stem_width)
    constants = variants.NUMERICS[model.numerics]
    head = bool(model.num_classes)
    if classes and not isinstance(class_labels, str):
        class_labels = "custom"
    return card.Card(
        architecture=known.name if known else "custom",
        feature_dim=model.feature_dim,
        num_classes=model.num_classes,
        params=model.count_params(),
        task="image-classification" if head else "image-feature-vector",
        input=INPUT,
        output=f"logits float32 [n, {model.num_classes}]"
        if head
        else f"features float32 [n, {model.feature_dim}]",
        probabilities=probabilities if head else None,
        labels=class_labels if classes else None,
        output_stride=model.output_stride,
        numerics={
            "name": constants.name,
            "ws_epsilon": constants.ws_epsilon,
            "gn_epsilon": constants.gn_epsilon,
            "pool_border": str(constants.pool_border),
        },
        preset=preset and dataclasses.asdict(preset),
    )


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
    """Traces a model too large to freeze with one function for every unit.

    TensorFlow's executor starts whatever is ready, so in one flat graph the
    kernels of the whole model are standardized at once, and take as much
    memory again as the weights. A function's body waits for its arguments.
    """
    units = []
    if 4 * model.count_params() > hub.FREEZE_LIMIT:
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


def _serving_objects(model: models.ResNetV2, probabilities: str, l2: float):
    """(object to save, its signatures)."""
    network = models.endpoints(model, models.endpoint_names(model))
    output = "logits" if model.num_classes else "pre_logits"

    @tf.function(
        input_signature=[tf.TensorSpec([None, None, None, 3], tf.float32)]
    )
    def forward(images):
        return {
            name: tf.cast(value, tf.float32)
            for name, value in network(images).items()
        }

    @tf.function
    def call(images, training=False):
        del training  # BiT computes the same in training and inference.
        return forward(to_unit_range(images))[output]

    @tf.function
    def all_endpoints(images, training=False):
        del training
        return forward(to_unit_range(images))

    for function in (call, all_endpoints):
        for dtype in (tf.float32, tf.uint8):
            spec = tf.TensorSpec([None, None, None, 3], dtype, name="images")
            for training in (False, True):
                function.get_concrete_function(spec, training=training)

    specs = [tf.TensorSpec([None, None, None, 3], tf.float32, name="images")]

    @tf.function(input_signature=specs)
    def serving_default(images):
        return {"output_1": forward(images)[output]}

    @tf.function(input_signature=specs)
    def image_feature_vector(images):
        return {"features": forward(images)["pre_logits"]}

    @tf.function(input_signature=specs)
    def image_classification(images):
        logits = forward(images)["logits"]
        squash = {"softmax": tf.nn.softmax, "sigmoid": tf.nn.sigmoid}
        return {
            "logits": logits,
            "probabilities": squash[probabilities](logits),
        }

    signatures = {
        "serving_default": serving_default,
        "image_feature_vector": image_feature_vector,
    }
    if model.num_classes:
        signatures["image_classification"] = image_classification

    named = models.canonical_variables(model)
    variables = [variable.value for variable in named.values()]
    kernels = [
        variable.value for name, variable in named.items() if "kernel" in name
    ]

    def penalty(kernel):
        @tf.function(input_signature=[])
        def loss():
            return l2 * tf.reduce_sum(tf.square(kernel))

        return loss

    root = tf.train.Checkpoint()
    for node, function in (
        (root, call),
        (tf.train.Checkpoint(), all_endpoints),
    ):
        node.__call__ = function
        node.variables = variables
        node.trainable_variables = list(variables)
        node.regularization_losses = (
            [penalty(kernel) for kernel in kernels] if l2 else []
        )
        if node is not root:
            root.endpoints = node
    return root, signatures
