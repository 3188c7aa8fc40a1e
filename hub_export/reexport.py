"""A Keras model around SavedModels → the parts of a new SavedModel.

A `hub.KerasLayer` inside of the model is what it always is, functions and
variables of a loaded SavedModel. They are saved again with what the model adds
to them, so that the result needs no file of its parents.
"""

import contextlib
import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from bit_tf import (
    errors,
    images,
    keras_layer,
    models,
    variants,
)
from bit_tf.checkpoints import layout, rename
from hub_export import card, golden, origins, reusable

__all__ = ["Model", "is_around"]

# Sides of the pictures that a model is tried with where it takes any: some
# models take none as small as the first.
_SIZES = (64, 224)
_FEATURES = "pre_logits"
# Endpoints that may be what `__call__` returns.
_OUTPUTS = ("logits", _FEATURES)
_FAULTS = (
    ArithmeticError,
    AttributeError,
    LookupError,
    NotImplementedError,
    RuntimeError,
    TypeError,
    ValueError,
    tf.errors.OpError,
)


def is_around(model: Any) -> bool:
    """Whether a model is a Keras model that contains a `hub.KerasLayer`."""
    return isinstance(model, keras.Model) and bool(_inner_layers(model))


class Model:
    """A Keras model that contains `hub.KerasLayer`s, looked at and tried.

    What it adds to the SavedModels inside is a head, and its outputs are
    logits, if that has weights and does not end with a normalization; else
    they are features. Of a model that is one SavedModel alone, outputs are what
    that one's are.

    Args:
      model: pictures [n, h, w, 3] → [n, d].
      head: whether the outputs are logits in any case, or in none.

    Attributes:
      shape: of the pictures, such as (None, None, None, 3).
      num_classes: length of the logits; 0 for features.
      feature_dim: length of the feature vector; 0 if there is none.
      parents: what the SavedModels inside were loaded from.
      directories: where these lie.
      notes: what is worth saying of them.
      told: what is known of the SavedModel that the model is alone.

    Raises:
      ExportError: it is no such model.
    """

    def __init__(self, model: keras.Model, *, head: bool | None = None):
        self._model = model
        self._layers = _inner_layers(model)
        self._one = self._layers[0] if len(self._layers) == 1 else None
        self.shape = _input_shape(model)
        # The endpoint that is the SavedModel's own output.
        self._output: str | None = None
        self._has_endpoints = False
        pictures, tried = self._try()
        known = {id(layer): origins.of(layer) for layer in self._layers}
        self._origin = known[id(self._one)] if self._one else None
        self._is_plain = self._is_its_network(pictures, tried)
        if head is None:
            head = (
                known[id(self._layers[0])].is_classifier
                if tried.alone
                else bool(self._own_weights()) and not _is_normalized(model)
            )
        if head:
            _require_logits(model)
        features: Any = tried.output
        # Those of a classifier inside are what comes before its logits.
        self._taps = head and (tried.alone or self._output == "logits")
        if head:
            features = tried.inner
            if self._taps:
                features = tried.endpoints.get(_FEATURES)
        if features is not None and len(features.shape) != 2:
            features = None
        self._has_features = features is not None
        self.told = origins.Origin()
        if tried.alone and self._origin is not None:
            self.told = self._origin
        self.num_classes = int(tried.output.shape[-1]) if head else 0
        self.feature_dim = 0 if features is None else int(features.shape[-1])
        tolerances = [origin.tolerance for origin in known.values()]
        tolerances += map(golden.tolerance, self._compute_dtypes())
        self._golden_values = {
            "images": pictures,
            "output": _numbers(tried.output),
            "tolerance": np.asarray(max(tolerances)),
        }
        if features is not None:
            self._golden_values["features"] = _numbers(features)
        self.parents = tuple(
            dict.fromkeys(
                card.Parent(origin.handle, origin.sha256)
                for origin in known.values()
                if origin.handle is not None
            )
        )
        self.directories = tuple(
            origin.directory
            for origin in known.values()
            if origin.directory is not None
        )
        self.notes = tuple(
            f"The layer {layer.name!r} was made from a loaded object, whose "
            "handle is not known."
            for layer in self._layers
            if known[id(layer)].handle is None
        )

    def golden_values(self) -> dict[str, np.ndarray]:
        """What the model gave when it was tried; see golden.save."""
        return self._golden_values

    @contextlib.contextmanager
    def objects(
        self, probabilities: str, l2: float
    ) -> Iterator[reusable.Objects]:
        """What is saved of the model, while the block runs.

        All layers are traced as if none was frozen, and what may be trained
        is: freezing is the consumer's. Variables beside the SavedModels have
        the names that they would have without the model around their layer:
        with another no reader would take them for parts of a BiT-ResNet.
        Those of a BiT-ResNet inside are named otherwise where the model
        computes more than it and a head, so that nobody reads it as that. The
        model is left as it was.

        Args:
          probabilities: what turns logits into them.
          l2: as in saved_model.export.

        Raises:
          ExportError: it cannot be traced; or it has penalties of its own
            beside `l2`.
        """
        prefix = f"{self._model.name}/"
        names = {
            variable.ref(): name.removeprefix(prefix)
            for variable, name in _names(_values(self._own_weights()))
        }
        if not self._is_plain:
            inner = [v for layer in self._layers for v in layer.weights]
            names |= {
                variable.ref(): name.replace("/", ".")
                for variable, name in _names(_values(inner))
                if _is_claimed(name)
            }
        # Functions are traced once more while they are saved.
        with _thawed(self._model, self._layers), _renamed(names):
            parts = self._parts(l2)
            try:
                objects = reusable.assemble(parts, probabilities)
            except _FAULTS as error:
                raise errors.ExportError(
                    "An exported model takes pictures of any number and, "
                    "unless its Input says other, of any size. Received: "
                    f"{_named(self._model)}, which could not be traced with "
                    f"{list(self.shape)}: {_said(error)}"
                ) from error
            yield objects

    def _parts(self, l2: float) -> reusable.Parts:
        trainable = _values(self._model.trainable_variables)
        losses = self._losses()
        if l2:
            if losses:
                raise errors.ExportError(
                    "l2 is for models without regularization losses. "
                    f"Received: l2={l2!r}, and a model with {len(losses)} "
                    "of them, which are kept as they are. Leave l2 out."
                )
            losses = [
                reusable.square(variable, l2)
                for variable in trainable
                if variable.shape.rank > 1
            ]
        return reusable.Parts(
            shape=self.shape,
            num_classes=self.num_classes,
            call=tf.function(self._call, autograph=False),
            has_features=self._has_features,
            endpoints=tf.function(self._endpoints, autograph=False)
            if self._has_endpoints
            else None,
            variables=_values(self._model.weights),
            trainable_variables=trainable,
            losses=losses,
            resources=_resources(self._layers),
        )

    def card(self, params: int, **facts: Any) -> card.Card:
        """The card, as far as the model tells it.

        Args:
          params: number of weights.
          **facts: probabilities, labels and preset.
        """
        origin = self._origin or origins.Origin()
        row = variants.ARCHITECTURES.get(origin.architecture)
        is_row = (
            self._is_plain
            and row is not None
            and (self.feature_dim, params)
            == (row.feature_dim, row.count_params(self.num_classes))
        )
        return card.Card(
            architecture=origin.architecture if is_row else "custom",
            feature_dim=self.feature_dim,
            num_classes=self.num_classes,
            params=params,
            task=card.TASKS[bool(self.num_classes)],
            input=card.input_text(self.shape),
            output=card.output_text(
                self.num_classes, self.feature_dim, self._compute_dtypes()
            ),
            output_stride=origin.output_stride,
            numerics=dict(origin.numerics),
            citations=origin.citations,
            **facts,
        )

    def _try(self) -> tuple[np.ndarray, "_Run"]:
        """(uint8 pictures, what the model gives for them)."""
        height, width = self.shape[1:3]
        for size in _SIZES:
            pictures = golden.pictures(height or size, width or size)
            floats = tf.constant(images.as_float(pictures))
            try:
                found = self._run(floats, False, self._one is not None)
                break
            except _FAULTS as error:
                if size == _SIZES[-1] or None not in (height, width):
                    raise errors.ExportError(
                        "An exported model takes float32 pictures in [0, 1], "
                        f"{list(self.shape)}. Received: {_named(self._model)}, "
                        f"which does not: {_said(error)}"
                    ) from error
        shape = getattr(found.output, "shape", None)
        if (
            shape is None
            or len(shape) != 2
            or shape[0] != len(pictures)
            or not shape[1]
            or not found.output.dtype.is_floating
        ):
            received = type(found.output).__name__
            if shape is not None:
                received = f"{found.output.dtype.name} {list(shape)}"
            raise errors.ExportError(
                "An exported model returns one tensor of floats [n, d], a "
                f"vector for each picture. Received: {_named(self._model)}, "
                f"which returns {received} for {len(pictures)} pictures. "
                "Export one of its outputs, averaged over the pixels if it is "
                "a map."
            )
        self._width = int(shape[1])
        self._has_endpoints = bool(found.endpoints)
        for name in _OUTPUTS:
            endpoint = found.endpoints.get(name)
            if endpoint is not None and _equal(endpoint, found.inner):
                self._output = name
                break
        return pictures, found

    def _is_its_network(self, pictures: np.ndarray, tried: "_Run") -> bool:
        """Whether a reader of the weights would compute what the model does.

        So it is where the SavedModel inside is given the pictures as they are,
        and what it returns is the output, or one linear layer's input.
        """
        layer = self._one
        if (
            layer is None
            or layer._signature is not None
            or tried.inputs is None
            or not np.array_equal(
                _numbers(tried.inputs), images.as_float(pictures)
            )
        ):
            return False
        if tried.alone:
            return self._output is not None or not tried.endpoints
        others = [
            other
            for other in self._model._flatten_layers(include_self=False)
            if other is not layer
            and not isinstance(other, keras.Model | keras.layers.InputLayer)
        ]
        if others and isinstance(others[0], models.Head):
            others.remove(others[0].dense)
            head = others[0].dense
        else:
            head = others[0] if others else None
        if (
            len(others) != 1
            or not isinstance(head, keras.layers.Dense)
            or head.activation is not keras.activations.linear
            or (tried.endpoints and self._output != _FEATURES)
        ):
            return False
        expected = _numbers(tried.inner) @ np.asarray(head.kernel)
        if head.bias is not None:
            expected += np.asarray(head.bias)
        found = _numbers(tried.output)
        if expected.shape != found.shape:
            return False
        tolerance = max(map(golden.tolerance, self._compute_dtypes()))
        scale = max(float(np.abs(found).max()), 1e-6)
        return float(np.abs(expected - found).max()) <= tolerance * scale

    def _run(self, pictures, training: bool, endpoints: bool) -> "_Run":
        """Runs the model, and looks at the SavedModel inside while it does.

        Args:
          pictures: float32 in [0, 1].
          training: as of any Keras model.
          endpoints: whether the SavedModel's endpoints are wanted.
        """
        calls: list[tuple[Any, Any, Mapping[str, Any]]] = []
        layer = self._one
        if layer is None:
            return _Run(self._model(pictures, training=training))
        run = layer.call

        def call(inputs, training=None):
            found: Mapping[str, Any] = {}
            if endpoints:
                found = _endpoints_of(
                    layer.resolved_object, inputs, bool(training)
                )
            if self._output is not None and self._output in found:
                # Computed once: what the layer returns is among them.
                outputs = tf.cast(found[self._output], layer.compute_dtype)
            else:
                outputs = run(inputs, training=training)
            calls.append((inputs, outputs, found))
            return outputs

        layer.call = call  # type: ignore[method-assign]
        try:
            output = self._model(pictures, training=training)
        finally:
            del layer.call
        if len(calls) != 1:
            return _Run(output)
        inputs, inner, found = calls[0]
        graph = getattr(output, "graph", None)
        if not tf.is_tensor(inner) or getattr(inner, "graph", None) != graph:
            # Made in a function of the model's own, and known there alone.
            return _Run(output)
        return _Run(output, inner, found, inner is output, inputs)

    def _call(self, pictures, training):
        taps = self._has_features and self._taps
        return self._outputs(self._run(pictures, training, taps))

    def _outputs(self, found: "_Run") -> dict[str, Any]:
        """The output, and the features where there are any."""
        output = tf.cast(found.output, tf.float32)
        output.set_shape([None, self._width])
        outputs = {"output": output}
        if self._has_features:
            features = output
            if self.num_classes:
                features = found.inner
                if self._taps:
                    features = found.endpoints[_FEATURES]
                features = tf.cast(features, tf.float32)
                features.set_shape([None, self.feature_dim])
            outputs["features"] = features
        return outputs

    def _endpoints(self, pictures, training):
        found = self._run(pictures, training, True)
        outputs = {
            name: tf.cast(value, tf.float32)
            for name, value in found.endpoints.items()
            if name not in _OUTPUTS
        }
        own = self._outputs(found)
        if self._has_features:
            outputs[_FEATURES] = own["features"]
        if self.num_classes:
            outputs["logits"] = own["output"]
        return outputs

    def _losses(self) -> list[Callable[[], Any]]:
        """The penalties of the SavedModels and of the other layers."""
        losses = []
        for variable in self._model.trainable_variables:
            if variable.regularizer is not None:
                losses.append(_penalty(variable))
        return losses

    def _own_weights(self) -> list[keras.Variable]:
        """Those that are no SavedModel's."""
        inner = {id(v) for layer in self._layers for v in layer.weights}
        return [v for v in self._model.weights if id(v) not in inner]

    def _compute_dtypes(self) -> set[str]:
        """Of the layers with weights; a SavedModel's is that of its output."""
        found = {
            layer.compute_dtype
            for layer in self._model._flatten_layers(include_self=False)
            if layer.weights
        }
        return set(filter(keras.backend.is_float_dtype, found)) or {"float32"}


@dataclasses.dataclass(frozen=True)
class _Run:
    """What a model gave.

    Attributes:
      output: of the model.
      inner: of the SavedModel inside, where there is one that ran once.
      endpoints: its endpoints, where they were asked for and are there.
      alone: whether the model returns what the SavedModel returned.
      inputs: of the SavedModel inside, where `inner` is known.
    """

    output: Any
    inner: Any = None
    endpoints: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    alone: bool = False
    inputs: Any = None


def _inner_layers(model: keras.Model) -> list[keras_layer.KerasLayer]:
    return [
        layer
        for layer in model._flatten_layers(include_self=False)
        if isinstance(layer, keras_layer.KerasLayer)
    ]


def _input_shape(model: keras.Model) -> tuple[int | None, ...]:
    """The shape of the pictures that a model takes.

    Raises:
      ExportError: it takes something else.
    """
    if isinstance(model, keras.Sequential) and not model.built:
        raise errors.ExportError(
            "A Sequential model that is exported knows its input. Received: "
            f"{_named(model)}, which was never called. Begin it with "
            "keras.Input((None, None, 3))."
        )
    # Only functional models have declared what they take.
    declared = keras.tree.flatten(getattr(model, "inputs", None) or [])
    if not declared:
        return (None, None, None, 3)
    shape, dtype = tuple(declared[0].shape), declared[0].dtype
    if (
        len(declared) != 1
        or len(shape) != 4
        or shape[0] is not None
        or shape[3] not in (3, None)
        or not keras.backend.is_float_dtype(dtype)
    ):
        received = ", ".join(
            f"{tensor.dtype} {list(tensor.shape)}" for tensor in declared
        )
        remedy = "Export a model of one such input"
        if len(declared) == 1 and dtype == "uint8":
            remedy = (
                "The export takes uint8 pictures too, and scales them. Give "
                "the same layers another input: keras.Sequential([keras.Input("
                "(None, None, 3)), *model.layers])"
            )
        raise errors.ExportError(
            "An exported model takes pictures: one input of floats in [0, 1], "
            f"[None, height, width, 3]. Received: {_named(model)}, which takes "
            f"{received}. {remedy}."
        )
    return (*shape[:3], 3)


def _require_logits(model: keras.Model) -> None:
    """Refuses a head that ends with a softmax or sigmoid.

    Raises:
      ExportError: it does.
    """
    last = _last_layer(model)
    if last is None:
        return
    squashes = (keras.activations.softmax, keras.activations.sigmoid)
    if (
        isinstance(last, keras.layers.Softmax)
        or getattr(last, "activation", None) in squashes
    ):
        raise errors.ExportError(
            "An exported classifier returns logits, and its signature "
            "image_classification their probabilities too. Received: "
            f"{_named(model)}, whose layer {last.name!r} returns "
            "probabilities. Take its activation away, which leaves the weights "
            "as they are: layer.activation = keras.activations.linear, or a "
            "model without the last layer; then compile it with a loss of "
            "from_logits=True."
        )


def _last_layer(model: keras.Model) -> Any:
    """What the output of a functional model comes from; None of another."""
    last: Any = model
    while isinstance(last, keras.Model):
        outputs = keras.tree.flatten(getattr(last, "outputs", None) or [])
        if len(outputs) != 1:
            return None
        last = outputs[0]._keras_history.operation
    return last


def _is_normalized(model: keras.Model) -> bool:
    """Whether a model ends with a normalization, as features do."""
    return type(_last_layer(model)).__name__.endswith("Normalization")


@contextlib.contextmanager
def _thawed(
    model: keras.Model, layers: Sequence[keras_layer.KerasLayer]
) -> Iterator[None]:
    """Has every layer train that can, and leaves all as they were."""
    everything = model._flatten_layers()
    flags = [(layer, layer.trainable) for layer in everything]
    flags += [(variable, variable.trainable) for variable in model.variables]
    patterns = [(layer, layer.trainable_pattern) for layer in layers]
    try:
        # Each by itself: one that is set to what it is passes nothing on.
        for layer in everything:
            layer.trainable = True
            for variable in layer._trainable_variables:
                variable.trainable = True
        for layer, pattern in patterns:
            able = hasattr(layer.resolved_object, "trainable_variables")
            if layer._signature is not None or not able:
                layer.trainable = False
            elif pattern is not None:
                layer.trainable = ".*"
        yield
    finally:
        for layer, pattern in patterns:
            if pattern is not None:
                layer.trainable = pattern
        # Those that hold others come first, and would set them too.
        for thing, flag in flags:
            thing.trainable = flag


def _names(
    variables: Sequence[tf.Variable],
) -> Iterator[tuple[tf.Variable, str]]:
    """(variable, name) of those that have one; a strategy's have none."""
    for variable in variables:
        if name := getattr(variable, "_handle_name", ""):
            yield variable, name


def _is_claimed(name: str) -> bool:
    """Whether a reader of checkpoints takes a name for BiT's, in any scope."""
    parts = rename.google_spelling(name.removesuffix(":0")).split("/")
    return any(
        layout.claims("/".join(parts[start:])) for start in range(len(parts))
    )


@contextlib.contextmanager
def _renamed(names: Mapping[Any, str]) -> Iterator[None]:
    """Gives variables other names while the block runs."""
    before = {key: key.deref()._handle_name for key in names}
    try:
        for key, name in names.items():
            key.deref()._handle_name = name
        yield
    finally:
        for key, name in before.items():
            key.deref()._handle_name = name


def _resources(layers: Sequence[keras_layer.KerasLayer]) -> list[Any]:
    """Tables, files and the like of loaded SavedModels."""
    from tensorflow.python.trackable import base, resource

    kinds = (resource.CapturableResource, tf.saved_model.Asset)
    found: dict[int, Any] = {}
    for layer in layers:
        if isinstance(layer.resolved_object, base.Trackable):
            view = tf.train.TrackableView(layer.resolved_object)
            for thing in view.descendants():
                if isinstance(thing, kinds):
                    found[id(thing)] = thing
    return list(found.values())


def _endpoints_of(model: Any, inputs: Any, training: bool) -> Mapping[str, Any]:
    """A SavedModel's endpoints; {} without such as this package's have."""
    endpoints = getattr(model, "endpoints", None)
    if not callable(endpoints):
        return {}
    try:
        found = endpoints(inputs, training=training)
    except _FAULTS:
        return {}
    if not isinstance(found, Mapping) or not all(
        tf.is_tensor(value) and value.dtype.is_floating
        for value in found.values()
    ):
        return {}
    return found


def _values(variables: Sequence[keras.Variable]) -> list[tf.Variable]:
    """The tf.Variables of Keras', each once."""
    values = [variable.value for variable in variables]
    return list({id(value): value for value in values}.values())


def _penalty(variable: keras.Variable) -> Callable[[], Any]:
    return lambda: tf.cast(variable.regularizer(variable), tf.float32)


def _numbers(tensor: Any) -> np.ndarray:
    return np.asarray(tf.cast(tensor, tf.float32))


def _equal(a: Any, b: Any) -> bool:
    """Whether two eager tensors are the same up to rounding."""
    if b is None or a.shape != b.shape:
        return False
    return np.allclose(_numbers(tf.cast(a, b.dtype)), _numbers(b), 1e-5, 1e-6)


def _named(model: keras.Model) -> str:
    return f"{type(model).__name__} {model.name!r}"


def _said(error: Exception) -> str:
    """The first lines, which say what went wrong, without colours."""
    text = re.sub(r"\x1b\[[\d;]*m", "", str(error))
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return f"{type(error).__name__}: {' '.join(lines[:3])}"[:500]
