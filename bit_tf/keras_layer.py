"""A Keras 3 layer for any reusable SavedModel, `bit_tf.hub.KerasLayer`.

It takes the arguments of `tensorflow_hub.KerasLayer`, which is a layer of
Keras 2 and cannot be part of a Keras 3 model.
"""

import json
import os
import re
import types
import weakref
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from typing import Any

import keras
import tensorflow as tf
from absl import logging

from bit_tf import errors, hub

__all__ = ["KerasLayer"]

# The Keras variables of each tf.Variable, by its id and whether they are for
# training. Layers of one loaded object share them, so that a model of several
# trains each weight once. Models train what says of itself that it is
# trainable, whatever its layer says: a frozen layer has variables of its own.
_WRAPPERS: weakref.WeakValueDictionary[tuple[int, bool], keras.Variable] = (
    weakref.WeakValueDictionary()
)


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
    model around it is training. Its `regularization_losses` are among the
    losses while the layer is trainable. Layers of one loaded object share its
    variables, and are trainable or frozen each by itself: a variable is trained
    in models with a trainable layer of it.

    A model with this layer can be saved as `.keras`, with the weights. To load
    one, import this class first, so that Keras knows it. As that fetches and
    runs the SavedModel at the handle that the file names, it takes
    `keras.saving.load_model(path, safe_mode=False)`.

    Args:
      handle: whatever `bit_tf.hub.resolve` takes; or an object that
        `bit_tf.hub.load` returned, one of its sub-objects such as `endpoints`,
        or any callable that takes and returns tensors.
      trainable: whether training changes the SavedModel's
        `trainable_variables`. Not possible through a signature.
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
      **kwargs: `name` and `dtype` of keras.layers.Layer.

    Raises:
      HandleError: there is no SavedModel at the handle, it cannot be called,
        or it cannot be trained and `trainable` is True.
      UnknownNameError: it has no such signature.
      BitTfError: Keras' backend is not TensorFlow.
    """

    def __init__(
        self,
        handle: Any,
        trainable: bool = False,
        arguments: Mapping[str, Any] | None = None,
        signature: str | None = None,
        signature_outputs_as_dict: bool | None = None,
        output_key: str | None = None,
        output_shape: Any = None,
        load_options: tf.saved_model.LoadOptions | None = None,
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
        super().__init__(trainable=trainable, autocast=False, **kwargs)
        self._handle = handle
        if isinstance(handle, (str, bytes, os.PathLike)):
            self._handle = os.fsdecode(handle)
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
        self._model = _load(self._handle, load_options)
        self._check_callable()
        self._check_trainable()
        if trainable and not hasattr(self._model, "trainable_variables"):
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
        self._wrap_variables()
        self._warned = False
        self.built = True

    @property
    def resolved_object(self) -> Any:
        """What was loaded from the handle, or the object given as one."""
        return self._model

    @property
    def trainable(self) -> bool:
        """Whether training changes the model's `trainable_variables`."""
        return self._trainable

    @trainable.setter
    def trainable(self, value: bool) -> None:
        # Layer's would freeze the weights of layers that share them.
        self._trainable = bool(value)
        for weight in self.weights[: self._trained_count]:
            weight.trainable = self._trainable

    @property
    def weights(self) -> list[keras.Variable]:
        """The model's variables, those that are trained first.

        A variable is listed as another keras.Variable while the layer is
        trainable than while it is not; both hold the same tf.Variable.
        """
        return list(self._wrappers if self._trainable else self._frozen())

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
        """
        self._check_trainable()
        if self.trainable and not self.trainable_weights and not self._warned:
            self._warned = True
            logging.warning(
                "%s is trainable, and has no trainable weights.", self.name
            )
        outputs = self._run(self._cast_inputs(inputs), training)
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

        Raises:
          BitTfError: it was made from an object instead of a handle, or its
            arguments cannot be written as JSON.
        """
        if not isinstance(self._handle, str):
            raise errors.BitTfError(
                "A layer is saved by its model's handle. Received: a layer "
                f"{self.name!r} that was made from a loaded object. Make it "
                "with the handle itself, KerasLayer(handle), or save the "
                "weights alone, with save_weights."
            )
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
            "handle": self._handle,
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

        Raises:
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
        return super().from_config(config)

    def save_own_variables(self, store) -> None:
        for name, variable in self._named_weights():
            store[name] = variable.numpy()

    def load_own_variables(self, store) -> None:
        """Assigns every weight, after a look at all names and shapes.

        Raises:
          CheckpointMismatchError: the weights are those of another SavedModel.
        """
        weights = dict(self._named_weights())
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

    def _named_weights(self) -> Iterator[tuple[str, keras.Variable]]:
        # Layers that share a variable share its name, which another of
        # this layer's may have.
        names: set[str] = set()
        for variable in self._wrappers:
            yield _unused(variable.name, names), variable

    def _shown(self) -> str:
        """The model, for messages."""
        if isinstance(self._handle, str):
            return repr(self._handle)
        return f"an object of type {type(self._handle).__name__}"

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

    def _wrap_variables(self) -> None:
        """Lists the SavedModel's variables as weights of this layer."""
        training = _unique(getattr(self._model, "trainable_variables", ()))
        others = _unique(getattr(self._model, "variables", ()))
        variables = list({**training, **others}.values())
        with keras.name_scope(self.name):
            for variable in variables:
                if not isinstance(variable, tf.Variable):
                    raise errors.HandleError(
                        "A reusable SavedModel's `variables` are "
                        f"tf.Variables. Received: {self._shown()}, with one of "
                        f"type {type(variable).__name__}."
                    )
            wrappers = _wrapped(variables, training)
            frozen = _wrapped(variables, ())
        self._wrappers = wrappers
        # Keras would track a list, and checkpoints have each variable twice.
        self._frozen = lambda: frozen
        self._trained_count = len(training)
        penalties = list(getattr(self._model, "regularization_losses", ()))
        for penalty in penalties:
            if not callable(penalty):
                raise errors.HandleError(
                    "`regularization_losses` lists functions without "
                    f"arguments. Received: {self._shown()}, with "
                    f"{errors.brief(penalty)}."
                )
        owners = wrappers[: len(training)]
        for wrapper, losses in _by_variable(penalties, owners):
            # Keras asks for the penalty of a variable where it is trained.
            wrapper.regularizer = _Penalty(losses)


class _Penalty(keras.regularizers.Regularizer):
    """The sum of losses that read the variable by themselves.

    Args:
      losses: functions without arguments → float32 [].
    """

    def __init__(self, losses: list[Callable]):
        self._losses = losses

    def __call__(self, x):
        return tf.add_n([loss() for loss in self._losses])


def _load(handle: Any, options: tf.saved_model.LoadOptions | None) -> Any:
    if not isinstance(handle, str):
        if options is not None:
            raise ValueError(
                "load_options is for handles that are loaded. Received: "
                f"load_options with an object of type {type(handle).__name__}."
            )
        if callable(handle) or hasattr(handle, "signatures"):
            return handle
        raise errors.HandleError(
            "A layer is made from a handle, or from an object that was loaded "
            f"from one. Received: {errors.brief(handle)}."
        )
    return hub.load(handle, options=options)


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


def _unique(variables: Iterable[Any]) -> dict[int, Any]:
    return {id(variable): variable for variable in variables}


def _wrapped(
    variables: Iterable[tf.Variable], training: Container[int]
) -> list[keras.Variable]:
    """The Keras variables of a layer.

    Args:
      variables: of the SavedModel.
      training: ids of those that are for training.
    """
    names: set[str] = set()
    return [
        _wrapper(variable, id(variable) in training, names)
        for variable in variables
    ]


def _wrapper(
    variable: tf.Variable, trainable: bool, names: set[str]
) -> keras.Variable:
    """The Keras variable that holds this very tf.Variable.

    Args:
      variable: of the SavedModel.
      trainable: whether it is for training.
      names: those that the layer has used; the new one is added.
    """
    key = id(variable), trainable
    wrapper = _WRAPPERS.get(key)
    if wrapper is None:
        name = re.sub(r":\d+$", "", variable.name).replace("/", "_")
        wrapper = keras.Variable(
            variable,
            dtype=variable.dtype,
            trainable=trainable,
            autocast=False,
            name=_unused(name, names),
        )
        # Before version 3.10, Keras holds a copy.
        wrapper._value = variable
        _WRAPPERS[key] = wrapper
    names.add(wrapper.name)
    return wrapper


def _unused(name: str, names: set[str]) -> str:
    """The name, numbered if it is among those already used; it is then."""
    found, count = name, 0
    while found in names:
        count += 1
        found = f"{name}_{count}"
    names.add(found)
    return found


def _by_variable(
    penalties: list[Callable], wrappers: list[keras.Variable]
) -> Iterator[tuple[keras.Variable, list[Callable]]]:
    """Each penalty with the first variable that it reads, or the very first."""
    found: dict[int, list[Callable]] = {}
    indices = {
        id(wrapper.value): index for index, wrapper in enumerate(wrappers)
    }
    for penalty in penalties if wrappers else ():
        traces = getattr(penalty, "concrete_functions", ())
        read = [variable for trace in traces for variable in trace.variables]
        index = next((indices[id(v)] for v in read if id(v) in indices), 0)
        found.setdefault(index, []).append(penalty)
    for index, losses in found.items():
        yield wrappers[index], losses
