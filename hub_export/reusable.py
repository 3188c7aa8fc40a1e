"""Functions and variables → the objects of a reusable SavedModel.

The interface is TF Hub's "reusable SavedModel": `__call__`, `variables`,
`trainable_variables`, `regularization_losses`; and the signatures and
`endpoints` of this package.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import tensorflow as tf

from bit_tf.images import to_unit_range

__all__ = ["Objects", "Parts", "assemble", "square"]

_SQUASH = {"softmax": tf.nn.softmax, "sigmoid": tf.nn.sigmoid}


@dataclasses.dataclass(frozen=True)
class Parts:
    """What a reusable SavedModel of pictures is made of.

    Attributes:
      shape: of the pictures, such as (None, None, None, 3).
      num_classes: length of the logits; 0 where the output is features.
      call: (float32 pictures in [0, 1], training) → float32 tensors by name:
        "output" [n, d], and "features" [n, d] where has_features.
      has_features: whether there is a feature vector.
      endpoints: the same pictures → every endpoint by name; or None.
      variables: those that `call` uses, the trainable ones among them.
      trainable_variables: what consumers may train.
      losses: functions without arguments → float32 [].
      resources: tables, files and the like that `call` may need.
    """

    shape: tuple[int | None, ...]
    num_classes: int
    call: Callable[[Any, bool], Mapping[str, Any]]
    has_features: bool
    endpoints: Callable[[Any, bool], Mapping[str, Any]] | None
    variables: Sequence[tf.Variable]
    trainable_variables: Sequence[tf.Variable]
    losses: Sequence[Callable[[], Any]] = ()
    resources: Sequence[Any] = ()


@dataclasses.dataclass(frozen=True)
class Objects:
    """What tf.saved_model.save takes.

    Attributes:
      root: the object to save.
      signatures: by name.
      variables: all that the root lists.
    """

    root: tf.train.Checkpoint
    signatures: Mapping[str, Any]
    variables: tuple[tf.Variable, ...]

    @property
    def params(self) -> int:
        """Number of weights."""
        return sum(variable.shape.num_elements() for variable in self.variables)


def square(variable: tf.Variable, factor: float) -> Callable[[], Any]:
    """A penalty: the factor times the sum of squares."""
    return lambda: factor * tf.reduce_sum(tf.square(variable))


def assemble(parts: Parts, probabilities: str) -> Objects:
    """Traces every function of a reusable SavedModel.

    Args:
      parts: what it is made of.
      probabilities: what turns logits into them, "softmax" or "sigmoid".
    """
    functions = [_call(parts)]
    if parts.endpoints is not None:
        functions.append(_endpoints(parts.endpoints))
    variables = {id(variable): variable for variable in parts.variables}
    captured: set[int] = set()
    for function in functions:
        for dtype in (tf.float32, tf.uint8):
            spec = tf.TensorSpec(parts.shape, dtype, name="images")
            for training in (False, True):
                trace = function.get_concrete_function(spec, training=training)
                for variable in trace.graph.variables:
                    variables.setdefault(id(variable), variable)
                captured.update(map(id, trace.captured_inputs))

    root = tf.train.Checkpoint()
    for node, function in zip(
        (root, tf.train.Checkpoint()), functions, strict=False
    ):
        node.__call__ = function
        node.variables = list(variables.values())
        node.trainable_variables = list(parts.trainable_variables)
        node.regularization_losses = [_loss(loss) for loss in parts.losses]
        if node is not root:
            root.endpoints = node
    needed = [r for r in parts.resources if id(_tensor(r)) in captured]
    if needed:
        root.resources = needed
    return Objects(
        root, _signatures(parts, probabilities), tuple(variables.values())
    )


def _tensor(resource: Any) -> Any:
    """What functions capture of a resource."""
    if isinstance(resource, tf.saved_model.Asset):
        return resource.asset_path
    return resource.resource_handle


def _call(parts: Parts):
    @tf.function(autograph=False)
    def call(images, training=False):
        return parts.call(to_unit_range(images), training)["output"]

    return call


def _endpoints(run: Callable[[Any, bool], Mapping[str, Any]]):
    @tf.function(autograph=False)
    def all_endpoints(images, training=False):
        return dict(run(to_unit_range(images), training))

    return all_endpoints


def _loss(loss: Callable[[], Any]):
    @tf.function(input_signature=[], autograph=False)
    def penalty():
        return loss()

    return penalty


def _signatures(parts: Parts, probabilities: str) -> dict[str, Any]:
    spec = tf.TensorSpec(parts.shape, tf.float32, name="images")

    @tf.function(input_signature=[spec], autograph=False)
    def serving_default(images):
        return {"output_1": parts.call(images, False)["output"]}

    @tf.function(input_signature=[spec], autograph=False)
    def image_feature_vector(images):
        return {"features": parts.call(images, False)["features"]}

    @tf.function(input_signature=[spec], autograph=False)
    def image_classification(images):
        logits = parts.call(images, False)["output"]
        return {
            "logits": logits,
            "probabilities": _SQUASH[probabilities](logits),
        }

    found = {"serving_default": serving_default}
    if parts.has_features:
        found["image_feature_vector"] = image_feature_vector
    if parts.num_classes:
        found["image_classification"] = image_classification
    return found
