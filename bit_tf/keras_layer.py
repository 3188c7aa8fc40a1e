"""A Keras 3 layer for any reusable SavedModel, `bit_tf.hub.KerasLayer`.

It takes the arguments of `tensorflow_hub.KerasLayer`, which is a layer of
Keras 2 and cannot be part of a Keras 3 model.
"""

import json
import types
from collections.abc import Mapping
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from absl import logging

from bit_tf import (
    distributed_call,
    errors,
    layer_source,
    saved_model_variables,
)

__all__ = ["KerasLayer"]


@keras.saving.register_keras_serializable(package="bit_tf")
class KerasLayer(keras.layers.Layer):
    """A reusable SavedModel as a layer, on Keras' TensorFlow backend.

    Input and output are those of the SavedModel. For BiT: RGB pictures
    [n, h, w, 3] of any size, float32 in [0, 1] or uint8 in [0, 255] →
    float32 [n, d]. Integers reach the SavedModel as they are; floats of a
    precision that it does not take are cast to one that it takes. Floats that
    it returns are cast to the layer's compute dtype, so that the layer can
    stand in a model of mixed precision; the SavedModel itself always computes
    as it was saved.

    Inside a functional or Sequential model it is the outer one that casts its
    inputs to what `keras.Input` says. To feed it uint8 pictures, begin it with
    `keras.Input((None, None, 3), dtype="uint8")`; without an Input, Sequential
    takes this layer's `dtype`, so that `KerasLayer(handle, dtype="uint8")` as
    the first layer says the same. With such a `dtype`, or "string", outputs
    are not cast.

    The SavedModel's variables are trained in place. `training=True` reaches
    the SavedModel if it takes `training`, the layer is trainable, and the
    model around it is training. Of its `regularization_losses`, those of what
    is trained are among the losses. Layers of one loaded object share its
    variables, and are trainable or frozen each by itself: a variable is trained
    in models with a trainable layer of it. After a change of what is trained,
    a model is compiled again, as Keras has it.

    A model with this layer can be saved as `.keras`, with the weights, the
    handle and the SavedModel's hash. A path among the handles is saved as an
    absolute one. To load such a file, import this class first, so that Keras
    knows it. As that fetches and runs the SavedModel at the handle that the
    file names, it takes `keras.saving.load_model(path, safe_mode=False)`, and
    `bit_tf.hub.relocated` where the SavedModel has moved. Another SavedModel
    than the one saved is refused.

    Under tf.distribute, make the layer in the scope of the strategy. State that
    is not trained, such as moving averages, is each replica's own there; the
    first one's is saved.

    Args:
      handle: whatever `bit_tf.hub.resolve` takes; or an object that
        `bit_tf.hub.load` returned, one of its sub-objects such as `endpoints`,
        or any callable that takes and returns tensors.
      trainable: whether training changes the SavedModel's
        `trainable_variables`; or a regular expression such as "block4|head",
        for those of them in whose names it is found. One with a "/" is searched
        in the names that the SavedModel has ("block4/unit01/a/kernel"), others
        in those of `weights` ("block4_unit01_a_kernel"). Not possible through
        a signature.
      arguments: further keyword arguments for every call, as a dict; values
        that JSON can hold, if the layer is to be saved.
      signature: the name of a signature to call instead of `__call__`. One of
        the next two must be given with it. A signature of several inputs is
        called with a dict of them.
      signature_outputs_as_dict: True returns all the signature's outputs.
      output_key: the output to return, where there is a dict of them.
      output_shape: shape of one example's output, such as [2048], or a nest of
        them like that of the outputs, for SavedModels that do not know it.
      load_options: a tf.saved_model.LoadOptions; not saved with the layer.
      content_hash: what `bit_tf.hub.content_hash` gives for the SavedModel
        that must be at the handle; any is taken unless given.
      **kwargs: `name` and `dtype` of keras.layers.Layer.

    Raises:
      HandleError: there is no SavedModel at the handle, or another one than
        `content_hash` says; it cannot be called; or it cannot be trained and
        `trainable` is not False.
      UnknownNameError: it has no such signature, or no trainable variable in
        whose name `trainable` is found.
      ValueError: an argument is malformed.
      BitTfError: Keras' backend is not TensorFlow.
    """

    _trainable: bool

    def __init__(
        self,
        handle: Any,
        trainable: bool | str = False,
        arguments: Mapping[str, Any] | None = None,
        signature: str | None = None,
        signature_outputs_as_dict: bool | None = None,
        output_key: str | None = None,
        output_shape: Any = None,
        load_options: tf.saved_model.LoadOptions | None = None,
        content_hash: str | None = None,
        **kwargs,
    ):
        if keras.backend.backend() != "tensorflow":
            raise errors.BitTfError(
                "SavedModels run on Keras' TensorFlow backend. Received: "
                f"{keras.backend.backend()!r}. Set KERAS_BACKEND=tensorflow "
                "before keras is imported, or load the weights with "
                "bit_tf.load_model, which runs on every backend."
            )
        # Keras would cast every float to the dtype of mixed precision.
        super().__init__(
            trainable=_is_trainable(trainable), autocast=False, **kwargs
        )
        self._source = layer_source.LayerSource(handle)
        self._arguments = _arguments(arguments)
        self._signature = signature
        self._signature_outputs_as_dict = bool(signature_outputs_as_dict)
        self._output_key = output_key
        self._output_shape = None
        if output_shape is not None:
            self._output_shape = _shapes(output_shape)
        if signature is None and self._signature_outputs_as_dict:
            raise ValueError(
                "signature_outputs_as_dict goes with a signature. Received: "
                "signature_outputs_as_dict=True and no signature; pass one, or "
                "leave it out: what `__call__` returns is returned as it is."
            )
        if signature is not None and (
            self._signature_outputs_as_dict == (output_key is not None)
        ):
            raise ValueError(
                "A signature needs output_key or signature_outputs_as_dict="
                f"True, not both. Received: signature={signature!r}, "
                f"output_key={output_key!r}, signature_outputs_as_dict="
                f"{signature_outputs_as_dict!r}."
            )
        self._model = self._source.load(load_options, content_hash)
        self._check_callable()
        self._check_trainable()
        if self._trainable and not hasattr(self._model, "trainable_variables"):
            raise errors.HandleError(
                "A model that is trained offers `trainable_variables`, as "
                f"reusable SavedModels do. Received: {self._shown()}, which "
                "has none. Pass trainable=False, or make a reusable SavedModel "
                "with hub_export.export."
            )
        self._takes_training = signature is None and _takes_training(
            self._model
        )
        self._input_names, self._input_dtypes = self._inputs()
        # XLA, which Keras turns on by itself on a GPU, knows no strings.
        self.supports_jit = not any(
            "string" in dtypes for dtypes in self._input_dtypes
        )
        self._variables = saved_model_variables.SavedModelVariables(
            self._model, self.name, self._shown()
        )
        if isinstance(trainable, str):
            self._variables.choose(trainable)
        # TensorFlow saves what Keras tracks.
        self._wrappers = self._variables.training
        self._warned = False
        self.built = True

    @property
    def resolved_object(self) -> Any:
        """What was loaded from the handle, or the object given as one."""
        return self._model

    @property
    def handle(self) -> str | None:
        """The handle as it was given; None for an object."""
        return self._source.handle

    @property
    def content_hash(self) -> str | None:
        """`bit_tf.hub.content_hash` of the SavedModel; None for an object.

        It is made when it is first asked for.

        Raises:
          HandleError: the SavedModel's files have changed since they were
            loaded, or cannot be read any more.
          ArchiveError: there is something in it that is no regular file.
        """
        return self._source.content_hash

    @property
    def trainable(self) -> bool:
        """Whether training changes the model's `trainable_variables`.

        Set it to True, False or a regular expression, as in the constructor.
        An expression stays until there is another: False freezes all
        variables, and True, set on this layer or on a model around it, has
        those trained again that it chose. To train all of them after that, set
        ".*".
        """
        return self._trainable

    @trainable.setter
    def trainable(self, value: bool | str) -> None:
        trainable = _is_trainable(value)
        if isinstance(value, str):
            self._variables.choose(value)
        # Layer's would freeze the weights of layers that share them.
        self._trainable = trainable
        self._variables.set_trainable(trainable)

    @property
    def trainable_pattern(self) -> str | None:
        """The regular expression that chooses what is trained, if any."""
        return self._variables.pattern

    @property
    def weights(self) -> list[keras.Variable]:
        """The model's variables, in an order that does not change.

        A variable is listed as another keras.Variable while the layer trains
        it than while it does not; both hold the same tf.Variable.
        """
        return self._variables.listed(self._trainable)

    @property
    def variables(self) -> list[keras.Variable]:
        """The same as `weights`."""
        return self.weights

    def call(self, inputs, training=None):
        """The model's outputs.

        Args:
          inputs: a tensor, or a nest of them, as the model takes it.
          training: whether the model around this layer is training.

        Raises:
          ImageRangeError: the model does not take inputs of this dtype.
          UnknownNameError: it has no output of the name `output_key`.
          HandleError: the layer is trainable and calls a signature; or the
            inputs or outputs are not the dict that they should be.
          TrainingError: the layer is trainable and was not made in the scope
            of the tf.distribute strategy that is in use.
        """
        self._check_trainable()
        self._check_strategy()
        if self.trainable and not self.trainable_weights and not self._warned:
            self._warned = True
            logging.warning(
                "%s is trainable, and has no trainable weights.", self.name
            )
        inputs = self._cast_inputs(inputs)
        outputs = distributed_call.run(lambda: self._run(inputs, training))
        if self._output_key is not None:
            outputs = self._pick(outputs)
        if self._output_shape is not None:
            outputs = self._with_shape(outputs, inputs)
        return keras.tree.map_structure(self._cast_output, outputs)

    def _run(self, inputs, training):
        """The SavedModel's own outputs."""
        arguments = dict(self._arguments)
        if self._signature is not None:
            function = self._model.signatures[self._signature]
            return function(**self._named(inputs), **arguments)
        if not self._takes_training:
            return self._model(inputs, **arguments)

        def run(training: bool):
            return self._model(inputs, training=training, **arguments)

        if not self.trainable or training is None:
            return run(False)
        if tf.is_tensor(training):
            return tf.cond(
                tf.cast(training, tf.bool),
                lambda: run(True),
                lambda: run(False),
            )
        return run(bool(training))

    def _named(self, inputs) -> dict[str, Any]:
        """The signature's inputs by name."""
        if isinstance(inputs, Mapping):
            return dict(inputs)
        if len(self._input_names) != 1:
            raise errors.HandleError(
                "A signature of several inputs is called with a dict of them. "
                f"Received: one value for {self._signature!r} of "
                f"{self._shown()}, which takes "
                f"{', '.join(map(repr, self._input_names)) or 'none'}."
            )
        return {self._input_names[0]: inputs}

    def _pick(self, outputs):
        if not isinstance(outputs, Mapping):
            raise errors.HandleError(
                "output_key is for models that return a dict. Received: "
                f"output_key={self._output_key!r}, and {self._shown()} "
                f"returned {type(outputs).__name__}. Leave output_key out."
            )
        return errors.lookup(
            outputs, self._output_key, f"Outputs of {self._shown()}"
        )

    def _cast_inputs(self, inputs):
        """Floats in a precision that the SavedModel takes, others as they are.

        Raises:
          ImageRangeError: the SavedModel takes no such dtype.
        """
        leaves = keras.tree.flatten(inputs)
        dtypes = self._accepted(len(leaves))
        return keras.tree.pack_sequence_as(
            inputs, list(map(self._cast_input, leaves, dtypes))
        )

    def _accepted(self, count: int) -> list[list[str]]:
        """The dtypes that traces take, for each of so many input tensors."""
        traces = [trace for trace in self._input_dtypes if len(trace) == count]
        return [
            sorted({trace[index] for trace in traces} - {None})
            for index in range(count)
        ]

    def _cast_input(self, tensor, accepted: list[str]):
        dtype = keras.backend.standardize_dtype(tensor.dtype)
        if dtype in accepted:
            return tensor
        wanted = _float_dtype(accepted, self.variable_dtype)
        if keras.backend.is_float_dtype(dtype) and wanted:
            return tf.cast(tensor, wanted)
        if accepted:
            raise errors.ImageRangeError(
                f"{self._shown()} takes {' or '.join(accepted)}. Received: "
                f"{dtype}. Cast the input and, for pictures, scale it to the "
                "range of the model. In a functional or Sequential model, the "
                "dtype is that of its keras.Input."
            )
        return tensor

    def _cast_output(self, tensor):
        if (
            tf.is_tensor(tensor)
            and tensor.dtype.is_floating
            and keras.backend.is_float_dtype(self.compute_dtype)
        ):
            return tf.cast(tensor, self.compute_dtype)
        return tensor

    def _with_shape(self, outputs, inputs):
        """Outputs that know the shape that the user has given."""
        # Keras keeps a dict as a kind of its own, which matches no other.
        shapes = _shapes(self._output_shape)
        batch = keras.tree.flatten(inputs)[0].shape[:1]

        def set_shape(tensor, shape):
            tensor.set_shape(batch.concatenate(shape))
            return tensor

        return keras.tree.map_structure_up_to(
            outputs, set_shape, outputs, shapes
        )

    def compute_output_spec(self, *args, **kwargs):
        # Layer's would take the dtype of outputs for the layer's.
        return keras.Operation.compute_output_spec(self, *args, **kwargs)

    def compute_output_shape(self, input_shape):
        shapes: list[Any] = []
        keras.tree.map_shape_structure(shapes.append, input_shape)
        if self._output_shape is not None:
            batch = tuple(shapes[0])[:1]
            return keras.tree.map_shape_structure(
                lambda shape: (*batch, *shape), _shapes(self._output_shape)
            )
        dtypes = iter(self._accepted(len(shapes)))

        def tensor(shape):
            accepted = next(dtypes)
            dtype = _float_dtype(accepted, self.variable_dtype)
            return keras.KerasTensor(shape, dtype or accepted[0])

        outputs = self.compute_output_spec(
            keras.tree.map_shape_structure(tensor, input_shape)
        )
        return keras.tree.map_structure(lambda output: output.shape, outputs)

    def get_config(self) -> dict[str, Any]:
        """The arguments of this layer, but for `load_options`.

        `handle` is an address or absolute path. `content_hash` is None, after
        a warning, where the SavedModel's files cannot be read any more.

        Raises:
          BitTfError: it was made from an object instead of a handle, or its
            arguments cannot be written as JSON.
        """
        arguments = dict(self._arguments)
        try:
            json.dumps(arguments)
        except (TypeError, ValueError) as error:
            raise errors.BitTfError(
                "The arguments of a layer that is saved are of values that "
                f"JSON can hold. Received: {errors.brief(arguments)} ({error})."
            ) from error
        return {
            **super().get_config(),
            "trainable_pattern": self.trainable_pattern,
            **self._source.config(f"layer {self.name!r}"),
            "arguments": arguments or None,
            "signature": self._signature,
            "signature_outputs_as_dict": self._signature_outputs_as_dict
            or None,
            "output_key": self._output_key,
            "output_shape": None
            if self._output_shape is None
            else keras.tree.map_shape_structure(
                list, _shapes(self._output_shape)
            ),
        }

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "KerasLayer":
        """A layer from its config: the model is fetched from the handle.

        The handle is what `bit_tf.hub.relocated` says.

        Raises:
          HandleError: there is no SavedModel at the handle, or another than
            the one saved.
          BitTfError: Keras' safe mode is on.
        """
        from keras.src.saving import serialization_lib

        if serialization_lib.in_safe_mode():
            raise errors.BitTfError(
                "A KerasLayer runs the SavedModel at its handle, and a "
                "SavedModel is a program. Received: a saved model that names "
                f"{errors.brief(config.get('handle'))}, in Keras' safe mode. "
                "If you trust the file and the handle, pass safe_mode=False to "
                "the loading function."
            )
        config = dict(config)
        config["handle"] = layer_source.found(
            config["handle"], config.get("content_hash")
        )
        trainable = config.get("trainable", False)
        pattern = config.pop("trainable_pattern", None)
        if pattern is not None:
            config["trainable"] = pattern
        if isinstance(config.get("dtype"), dict):
            config["dtype"] = keras.dtype_policies.deserialize(config["dtype"])
        # Layer's would make a TypeError of every error.
        layer = cls(**config)
        if pattern is not None:
            layer.trainable = trainable
        return layer

    def save_own_variables(self, store) -> None:
        for name, variable in self._variables.named():
            store[name] = variable.numpy()

    def load_own_variables(self, store) -> None:
        """Assigns every weight, after a look at all names and shapes.

        Raises:
          CheckpointMismatchError: the weights are those of another SavedModel.
        """
        weights = dict(self._variables.named())
        expected = {
            name: tuple(variable.shape) for name, variable in weights.items()
        }
        found = {name: store[name].shape for name in store.keys()}  # noqa: SIM118
        lines = [
            f"{sign} {name} {shapes[name]}"
            for sign, shapes, others in (
                ("−", expected, found),
                ("+", found, expected),
            )
            for name in shapes
            if others.get(name) != shapes[name]
        ]
        if lines:
            raise errors.CheckpointMismatchError(
                f"Weights saved of a layer are loaded into a layer of the same "
                f"SavedModel. Received: {len(found)} weights for "
                f"{self._shown()}, which differ in (− expected, + found):\n"
                + "\n".join(lines)
            )
        for name, variable in weights.items():
            variable.assign(store[name])

    def _shown(self) -> str:
        """The model, for messages."""
        return self._source.shown

    def _check_strategy(self) -> None:
        if not all(
            distributed_call.is_own(weight.value)
            for weight in self.trainable_weights
        ):
            raise errors.TrainingError(
                "A trainable layer is made in the scope of the tf.distribute "
                f"strategy that trains it. Received: {self.name!r}, which was "
                "made in another or in none. Make the layer, and the model "
                "around it, in a block `with strategy.scope():`."
            )

    def _check_callable(self) -> None:
        signatures = getattr(self._model, "signatures", {})
        if self._signature is not None:
            if not signatures:
                raise errors.HandleError(
                    "A signature is one of a SavedModel's. Received: "
                    f"signature={self._signature!r}, and {self._shown()} has "
                    "none. Leave signature out."
                )
            errors.lookup(
                signatures, self._signature, f"Signatures of {self._shown()}"
            )
        elif isinstance(self._model, keras.layers.Layer):
            raise errors.HandleError(
                "KerasLayer is for models that are not Keras 3's. Received: "
                f"{self._shown()}. Use it as it is: it is a layer."
            )
        elif not callable(self._model):
            names = ", ".join(map(repr, signatures))
            raise errors.HandleError(
                "A reusable SavedModel is called through its `__call__`. "
                f"Received: {self._shown()}, which has none, as those that "
                "keras.Model.export writes have not. "
                + (
                    f"It has the signatures {names}: pass signature=… and "
                    "output_key=…, with trainable=False."
                    if names
                    else "Make a reusable SavedModel with hub_export.export."
                )
            )

    def _check_trainable(self) -> None:
        """Also for each call, since `trainable` may be set at any time."""
        if self.trainable and self._signature is not None:
            raise errors.HandleError(
                "A signature cannot be trained: it has neither a training "
                "mode nor losses. Received: trainable=True and "
                f"signature={self._signature!r}. Leave signature out, so that "
                "`__call__` is used, or set trainable=False on this layer."
            )

    def _inputs(self) -> tuple[tuple[str, ...], tuple[tuple, ...]]:
        """(names of a signature's inputs, dtypes of the input by trace)."""
        if self._signature is not None:
            function = self._model.signatures[self._signature]
            specs = {
                name: spec
                for name, spec in function.structured_input_signature[1].items()
                if name not in self._arguments
            }
            return tuple(sorted(specs)), (_dtypes(specs),)
        traces = getattr(_function(self._model), "concrete_functions", ())
        firsts = (trace.structured_input_signature[0][:1] for trace in traces)
        return (), tuple(_dtypes(first) for first in firsts if first)


def _is_trainable(value: Any) -> bool:
    """
    Raises:
      ValueError: it is neither a truth value nor a pattern.
    """
    if not isinstance(value, (bool, int, np.bool_, str, type(None))):
        raise ValueError(
            "trainable is True, False or a regular expression such as "
            f"'block4|head'. Received: {errors.brief(value)}."
        )
    return isinstance(value, str) or bool(value)


def _arguments(arguments: Mapping[str, Any] | None) -> dict[str, Any]:
    if arguments is None:
        return {}
    if not isinstance(arguments, Mapping) or not all(
        isinstance(name, str) for name in arguments
    ):
        raise ValueError(
            "arguments is a dict of keyword arguments. Received: "
            f"{errors.brief(arguments)}."
        )
    if "training" in arguments:
        raise ValueError(
            "`training` is passed by the layer: True where it is trainable and "
            "the model around it is training. Received: it in arguments; leave "
            "it out."
        )
    return dict(arguments)


def _shapes(shapes: Any) -> Any:
    """A nest of shapes as tuples, from tuples, lists and tf.TensorShapes."""
    if isinstance(shapes, tf.TensorShape):
        return tuple(shapes.as_list())
    if isinstance(shapes, Mapping):
        return {name: _shapes(shape) for name, shape in shapes.items()}
    if isinstance(shapes, (list, tuple)):
        if all(size is None or isinstance(size, int) for size in shapes):
            return tuple(shapes)
        return [_shapes(shape) for shape in shapes]
    raise ValueError(
        "output_shape is the shape of one example's output, such as [2048], or "
        f"a dict or list of such. Received: {errors.brief(shapes)}."
    )


def _function(model: Any) -> Any:
    """What a call runs: a function itself, or an object's `__call__`."""
    if isinstance(
        model,
        (
            types.FunctionType,
            types.MethodType,
            tf.types.experimental.PolymorphicFunction,
        ),
    ):
        return model
    return model.__call__


def _takes_training(model: Any) -> bool:
    """Whether what a call runs has an argument `training`."""
    from tensorflow.python.util import tf_inspect

    spec = tf_inspect.getfullargspec(_function(model))
    return "training" in [*spec.args, *spec.kwonlyargs]


def _dtypes(specs: Any) -> tuple[str | None, ...]:
    """Names of the dtypes of a nest of tf.TypeSpecs; None for other values."""
    dtypes = [
        getattr(spec, "dtype", None) for spec in keras.tree.flatten(specs)
    ]
    return tuple(dtype and dtype.name for dtype in dtypes)


def _float_dtype(accepted: list[str], default: str) -> str | None:
    """The dtype that floats are cast to, if any."""
    if not accepted:
        return default if keras.backend.is_float_dtype(default) else "float32"
    if "float32" in accepted:
        return "float32"
    return next(filter(keras.backend.is_float_dtype, accepted), None)
