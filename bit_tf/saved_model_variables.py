"""The variables of a SavedModel as a Keras layer's, trained in place."""

import re
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import keras
import tensorflow as tf

from bit_tf import distributed_call, errors

__all__ = ["SavedModelVariables"]

# The Keras variables of each tf.Variable, by its id and whether they are for
# training. Layers of one loaded object share them, so that a model of several
# trains each weight once. Models train what says of itself that it is
# trainable, whatever its layer says: a frozen layer has variables of its own.
_WRAPPERS: weakref.WeakValueDictionary[tuple[int, bool], keras.Variable] = (
    weakref.WeakValueDictionary()
)
# Of the names that a message lists.
_MANY = 8


class SavedModelVariables:
    """Two lists of Keras variables, for training and frozen, and a choice.

    Both lists hold the SavedModel's own tf.Variables, those that it says are
    trained first.

    Attributes:
      training: list of keras.Variable; those trained are trainable.
      frozen: list of keras.Variable.
      pattern: the regular expression that chooses among those trained, or None
        for all of them.
    """

    def __init__(self, model: Any, layer: str, shown: str):
        """Wraps the variables of a loaded object.

        Args:
          model: with `variables`, `trainable_variables` and
            `regularization_losses`, or some of them.
          layer: the name of the layer.
          shown: the model, for messages.

        Raises:
          HandleError: these are not what reusable SavedModels have.
        """
        self._shown = shown
        trained = _unique(getattr(model, "trainable_variables", ()))
        others = _unique(getattr(model, "variables", ()))
        variables = list({**trained, **others}.values())
        for variable in variables:
            if not isinstance(variable, tf.Variable):
                raise errors.HandleError(
                    "A reusable SavedModel's `variables` are "
                    f"tf.Variables. Received: {shown}, with one of "
                    f"type {type(variable).__name__}."
                )
        self.pattern: str | None = None
        self._count = len(trained)
        self._chosen: Sequence[int] = range(self._count)
        with keras.name_scope(layer):
            self.training = _wrapped(variables, self._count)
            self.frozen = _wrapped(variables, 0)
        self._names = _numbered(map(_name, variables))
        self._penalties = list(getattr(model, "regularization_losses", ()))
        for penalty in self._penalties:
            if not callable(penalty):
                raise errors.HandleError(
                    "`regularization_losses` lists functions without "
                    f"arguments. Received: {shown}, with "
                    f"{errors.brief(penalty)}."
                )
        self._share_penalties()

    def listed(self, trainable: bool) -> list[keras.Variable]:
        """The layer's weights, in an order that is always the same.

        Args:
          trainable: whether those chosen are among them as trainable.
        """
        weights = list(self.frozen)
        for index in self._chosen if trainable else ():
            weights[index] = self.training[index]
        return weights

    def named(self) -> Iterator[tuple[str, keras.Variable]]:
        """(name, unique in the layer, and variable) of every one."""
        # Layers that share a variable share its name, which another of
        # this layer's may have.
        names = _numbered(variable.name for variable in self.training)
        return zip(names, self.training, strict=True)

    def set_trainable(self, trainable: bool) -> None:
        """Has those chosen say of themselves that they are trainable.

        Args:
          trainable: otherwise nothing is said: layers may share them.
        """
        for index in self._chosen if trainable else ():
            self.training[index].trainable = True

    def choose(self, pattern: str) -> None:
        """Chooses those of the variables trained that a pattern is found in.

        Args:
          pattern: a regular expression. One with a "/" is searched in names
            of the SavedModel, such as "block4/unit01/a/kernel", others in
            those of Keras, such as "block4_unit01_a_kernel".

        Raises:
          ValueError: it is malformed.
          UnknownNameError: it is found in none.
        """
        names = self._names
        if "/" not in pattern:
            names = [name for name, _ in self.named()]
        names = names[: self._count]
        try:
            expression = re.compile(pattern)
        except (re.error, RecursionError, OverflowError) as error:
            raise ValueError(
                "trainable is True, False or a regular expression that is "
                f"searched in names such as {_some(names)}. Received: "
                f"{errors.brief(pattern)} ({error}). Correct it."
            ) from error
        chosen = [
            index for index, name in enumerate(names) if expression.search(name)
        ]
        if not chosen:
            raise errors.UnknownNameError(
                "trainable, as a regular expression, is found in the name of a "
                f"trainable variable of {self._shown}. Received: "
                f"{errors.brief(pattern)}, which is in none of {_some(names)}. "
                "Correct it, or pass True or False."
            )
        self.pattern = pattern
        self._chosen = chosen
        self._share_penalties()

    def _share_penalties(self) -> None:
        """Has each variable bring the losses that are of it."""
        # Keras asks for the penalty of a variable where it is trained. One of
        # several variables is counted once, with the first of them that is.
        losses = _by_variable(
            self._penalties, self.training[: self._count], self._chosen
        )
        for index, functions in losses.items():
            self.training[index].regularizer = _Penalty(functions)
        for index in self._chosen:
            weight = self.training[index]
            if index not in losses and isinstance(weight.regularizer, _Penalty):
                weight.regularizer = None


class _Penalty(keras.regularizers.Regularizer):
    """The sum of losses that read the variable by themselves.

    Args:
      losses: functions without arguments → float32 [].
    """

    def __init__(self, losses: list[Callable]):
        self._losses = losses

    def __call__(self, x):
        return distributed_call.run(
            lambda: tf.add_n([loss() for loss in self._losses])
        )


def _unique(variables: Iterable[Any]) -> dict[int, Any]:
    return {id(variable): variable for variable in variables}


def _wrapped(
    variables: list[tf.Variable], trained: int
) -> list[keras.Variable]:
    """The Keras variables of a layer.

    Args:
      variables: of the SavedModel.
      trained: how many of them, from the first, are for training.
    """
    names: set[str] = set()
    return [
        _wrapper(variable, index < trained, names)
        for index, variable in enumerate(variables)
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
        wrapper = keras.Variable(
            variable,
            dtype=variable.dtype,
            trainable=trainable,
            autocast=False,
            name=_unused(_name(variable).replace("/", "_"), names),
        )
        # Before version 3.10, Keras holds a copy.
        wrapper._value = variable
        _WRAPPERS[key] = wrapper
    names.add(wrapper.name)
    return wrapper


def _name(variable: tf.Variable) -> str:
    return re.sub(r":\d+$", "", variable.name)


def _numbered(names: Iterable[str]) -> list[str]:
    """The names, with a number at those that came before."""
    used: set[str] = set()
    return [_unused(name, used) for name in names]


def _unused(name: str, names: set[str]) -> str:
    """The name, numbered if it is among those already used; it is then."""
    found, count = name, 0
    while found in names:
        count += 1
        found = f"{name}_{count}"
    names.add(found)
    return found


def _some(names: list[str]) -> str:
    """Names for a message, from all over the list where there are many."""
    if not names:
        return "no names, as it has no trainable variables"
    step = -(-len(names) // _MANY)
    more = len(names) - len(names[::step])
    listed = ", ".join(map(repr, names[::step]))
    return f"{listed} and {more} more" if more else listed


def _by_variable(
    penalties: list[Callable],
    wrappers: list[keras.Variable],
    chosen: Sequence[int],
) -> dict[int, list[Callable]]:
    """Index of a variable → the penalties that it brings.

    A penalty goes with the first variable chosen that it reads; or else with
    the first that it reads; or, if that is not known, with the first chosen.
    """
    found: dict[int, list[Callable]] = {}
    indices = {
        id(wrapper.value): index for index, wrapper in enumerate(wrappers)
    }
    for penalty in penalties if wrappers else ():
        traces = getattr(penalty, "concrete_functions", ())
        read = [
            indices[id(variable)]
            for trace in traces
            for variable in trace.variables
            if id(variable) in indices
        ]
        trained = [index for index in read if index in chosen]
        first = (trained or read or chosen)[0]
        found.setdefault(first, []).append(penalty)
    return found
