"""What a SavedModel's graph is and does, found out in a fresh process.

`python -m hub_export.graph DIRECTORY` loads the SavedModel, asks it for its
interface, its golden values and a step of gradient descent, prints one JSON
object for each of these findings, which includes the earlier ones, and exits
0. What the process cannot survive is a finding too.
"""

import dataclasses
import itertools
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from bit_tf import errors, labels
from hub_export import entry, fresh_process, golden

__all__ = [
    "ABSENT",
    "CHECKS",
    "Check",
    "FAILED",
    "PASSED",
    "examine",
    "inspect",
    "main",
]

PASSED, FAILED, ABSENT = "passed", "failed", "absent"
# What `examine` checks, in this order.
CHECKS = ("interface", "golden", "gradient")
# Of the pictures where the model takes any size: some models take none as
# small as the first.
_SIZES = (64, 224)
# The largest change of a weight in a step, relative to the largest weight of
# its variable.
_STEP = 0.01
# Seconds for everything; R152x4 takes a minute on two cores.
_TIME_LIMIT = 1800.0
# Weights from which gradients are traced and not run: standardized kernels
# need several times the memory of the weights, R152x4 19 GB.
_LARGE = 2**28
_MOST_NAMED = 3


@dataclasses.dataclass(frozen=True)
class Check:
    """One finding.

    Attributes:
      name: of what was checked.
      status: "passed", "failed", or "absent" where there is nothing to check.
      detail: what was found; in one line, as it was found, so that a terminal
        must be protected from it.
    """

    name: str
    status: str
    detail: str


def inspect(directory: str | os.PathLike[str]) -> entry.Graph:
    """What a fresh process finds in a SavedModel.

    Raises:
      VerificationError: it is no reusable SavedModel of pictures, does not
        give its golden values, or cannot be trained.
    """
    found, checks = examine(directory)
    problems = [check for check in checks if check.status == FAILED]
    if problems or found is None:
        what = "; ".join(f"{check.name}: {check.detail}" for check in problems)
        raise errors.VerificationError(
            "A fresh process must be able to use the SavedModel. Received: "
            f"{os.fspath(directory)!r}: {what}"
        )
    return found


def examine(
    directory: str | os.PathLike[str], seconds: float = _TIME_LIMIT
) -> tuple[entry.Graph | None, tuple[Check, ...]]:
    """What a fresh process finds in a SavedModel; a bad one raises nothing.

    Args:
      directory: of a SavedModel whose operations were checked.
      seconds: after which the process is killed.

    Returns:
      (what was found, or None if the interface fails; a finding for each of
      `CHECKS`)
    """
    outcome = fresh_process.call("hub_export.graph", directory, seconds)
    answer = outcome.answer or {"graph": None, "checks": []}
    found = {row["name"]: Check(**row) for row in answer["checks"]}
    fault = f"the process that tried it failed: {outcome.fault}"
    for name in CHECKS:
        if name not in found:
            found[name] = Check(name, FAILED, fault)
            fault = "not reached"
    graph = answer["graph"]
    return (
        graph and entry.Graph.from_dict(graph),
        tuple(found[name] for name in CHECKS),
    )


def _work(directory: str, answer: Callable[[Any], None]) -> None:
    graph = None
    checks: list[Check] = []

    def tell(name: str, status: str, detail: str) -> None:
        checks.append(Check(name, status, " ".join(detail.split())))
        answer(
            {
                "graph": graph and dataclasses.asdict(graph),
                "checks": [dataclasses.asdict(check) for check in checks],
            }
        )

    model = _load(directory)
    interface = _Interface(model)
    try:
        values, damage = golden.read(directory), ""
    except errors.VerificationError as error:
        values, damage = None, str(error)
    graph = interface.graph(_labels(directory))
    tell("interface", *interface.finding())
    if damage:
        tell("golden", FAILED, damage)
    elif values is None:
        tell("golden", ABSENT, "no golden values")
    elif graph is None:
        tell("golden", FAILED, "the interface failed")
    else:
        try:
            relative_error = golden.compare(model, values)
        except errors.VerificationError as error:
            tell("golden", FAILED, str(error))
        else:
            graph = dataclasses.replace(
                graph,
                relative_error=relative_error,
                tolerance=values.tolerance,
            )
            tell(
                "golden",
                PASSED,
                f"relative error {relative_error:.1e}, up to "
                f"{values.tolerance:g} is right",
            )
    tell("gradient", *_gradient(interface))


def _faults() -> tuple[type[Exception], ...]:
    """What TensorFlow raises for models that it cannot load or run."""
    import tensorflow as tf

    return (
        ArithmeticError,
        AssertionError,
        AttributeError,
        LookupError,
        MemoryError,
        NotImplementedError,
        OSError,
        RuntimeError,
        TypeError,
        ValueError,
        tf.errors.OpError,
    )


def _load(directory: str) -> Any:
    import tensorflow as tf

    try:
        return tf.saved_model.load(directory)
    except _faults() as error:
        raise errors.VerificationError(
            f"it could not be loaded: {_said(error)}"
        ) from error


def _labels(directory: str) -> int | None:
    try:
        found = labels.read_saved_model(directory)
    except errors.HandleError:
        return None
    return None if found is None else len(found)


def _said(error: Exception) -> str:
    """An exception in one line; TensorFlow's have many, the first says it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    # Errors from inside of a tf.function begin so, and end with the cause.
    if lines and lines[0].startswith("in user code"):
        lines = [line for line in lines if "Error: " in line] or lines[-1:]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:300]


class _Interface:
    """The reusable interface of a loaded model, as far as it has it.

    Attributes:
      model: what was loaded.
      problems: what it lacks.
      notes: what is worth saying beside.
      spec: of the pictures that `__call__` takes, or None.
      options: arguments of `__call__` for training.
      variables: all.
      trainable_variables: those to train.
    """

    def __init__(self, model: Any):
        self.model = model
        self.problems: list[str] = []
        self.notes: list[str] = []
        self.spec: Any = None
        self.options: dict[str, bool] = {}
        self.variables = self._attribute("variables")
        self.trainable_variables = self._attribute("trainable_variables")
        self._losses = self._attribute("regularization_losses")
        self._dtypes: list[str] = []
        self._outputs: int | None = None
        self._signatures = self._read_signatures()
        self._endpoints: dict[str, tuple[int | None, ...]] = {}
        if not callable(model):
            served = ", ".join(sorted(self._signatures)) or "none"
            self.problems.append(
                "it has no __call__, which hub layers use (keras.Model.export "
                f"and TensorFlow 1 write such); signatures: {served}"
            )
            return
        self._read_call()
        self._read_variables()
        self._read_losses()
        self._read_endpoints()

    def graph(self, labels: int | None) -> entry.Graph | None:
        """What was found, or None where that is not a model of pictures.

        Without golden values.
        """
        if self.spec is None or self._outputs is None:
            return None
        return entry.Graph(
            dtypes=tuple(sorted(self._dtypes)),
            input_shape=tuple(self.spec.shape),
            outputs=self._outputs,
            params=sum(_size(variable) for variable in self.variables),
            variables=len(self.variables),
            trainable_variables=len(self.trainable_variables),
            regularization_losses=len(self._losses),
            signatures=self._signatures,
            endpoints=self._endpoints,
            labels=labels,
            relative_error=None,
            tolerance=None,
        )

    def finding(self) -> tuple[str, str]:
        """(status, detail)"""
        if self.problems:
            return FAILED, "; ".join(self.problems)
        parts = [
            f"{' and '.join(sorted(self._dtypes))} {_shown(self.spec.shape)} → "
            f"{self._outputs}",
            f"{len(self.variables)} variables, "
            f"{len(self.trainable_variables)} trainable",
            f"{len(self._losses)} regularization losses",
            *self.notes,
        ]
        return PASSED, "; ".join(parts)

    def pictures(self, size: int, number: int = 2) -> Any:
        """A batch that `__call__` takes; of `size` where that is free."""
        import tensorflow as tf

        n, height, width, channels = self.spec.shape
        shape = (n or number, height or size, width or size, channels or 3)
        values = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
        if self.spec.dtype == tf.uint8:
            return tf.constant(values)
        return tf.constant(values / 255, self.spec.dtype)

    def trace(self, dtype: Any = None, **options: Any) -> Any:
        """What the model returns, as symbolic tensors; nothing is run.

        Raises:
          one of `_faults()`.
        """
        return self._traced(self.model, dtype, options).structured_outputs

    def _traced(self, function: Any, dtype: Any, options: Mapping) -> Any:
        import tensorflow as tf

        spec = tf.TensorSpec(self.spec.shape, dtype or self.spec.dtype)
        return tf.function(
            lambda pictures: function(pictures, **options), autograph=False
        ).get_concrete_function(spec)

    def _attribute(self, name: str) -> list[Any]:
        """A list that may be left out where it is empty."""
        found = getattr(self.model, name, None)
        if found is None:
            self.notes.append(f"no attribute {name}")
            return []
        try:
            return list(found)
        except TypeError:
            self.problems.append(f"{name} is no list")
            return []

    def _read_signatures(self) -> dict[str, dict[str, tuple]]:
        found: dict[str, dict[str, tuple]] = {}
        signatures = getattr(self.model, "signatures", {})
        for name, function in sorted(signatures.items()):
            outputs = function.structured_outputs
            found[name] = {
                output: _shape(outputs[output]) for output in sorted(outputs)
            }
        return found

    def _read_call(self) -> None:
        import tensorflow as tf

        call = self.model.__call__
        specs = [
            spec
            for function in getattr(call, "concrete_functions", [])
            if (spec := _first_argument(function)) is not None
        ]
        pictures = [spec for spec in specs if _of_pictures(spec)]
        if not pictures:
            received = ", ".join(dict.fromkeys(map(_spec_shown, specs)))
            self.problems.append(
                "__call__ must take pictures [n, height, width, 3] as its only "
                f"input; it takes {received or 'no tensor'}"
            )
            return
        # Floating point first: it is what all consumers send.
        dtypes = sorted(
            {spec.dtype for spec in pictures},
            key=lambda dtype: (dtype != tf.float32, dtype.is_integer),
        )
        self.spec = next(spec for spec in pictures if spec.dtype == dtypes[0])
        choices: tuple[dict[str, bool], ...] = ({},)
        if "training" in _argument_names(call):
            choices = ({"training": False}, {"training": True}, {})
            self.options = {"training": True}
        else:
            self.notes.append("no argument training")
        shapes: list[Any] = []
        for dtype in dtypes:
            for options in choices:
                try:
                    shapes.append(self.trace(dtype, **options))
                except _faults() as error:
                    spelled = ", ".join(
                        f"{name}={value}" for name, value in options.items()
                    )
                    why = (
                        "there is no such trace"
                        if "matching concrete function" in str(error)
                        else _said(error)
                    )
                    self.problems.append(
                        f"__call__({dtype.name} pictures"
                        f"{spelled and ', ' + spelled}) fails: {why}"
                    )
                    if options == self.options:
                        self.options = {}
                else:
                    self._dtypes.append(dtype.name)
        self._dtypes = sorted(set(self._dtypes))
        if shapes:
            self._read_outputs(shapes)

    def _read_outputs(self, outputs: Sequence[Any]) -> None:
        import tensorflow as tf

        if not all(isinstance(output, tf.Tensor) for output in outputs):
            self.problems.append(
                "__call__ must return one tensor; it returns "
                f"{type(outputs[0]).__name__}"
            )
            return
        lasts = {_shape(output)[-1:] for output in outputs}
        if len(lasts) == 1 and (last := lasts.pop()) not in ((), (None,)):
            (self._outputs,) = last
            return
        self.problems.append(
            "the last dimension of what __call__ returns must be static; it "
            f"is {' or '.join(sorted({_shown(o.shape) for o in outputs}))}"
        )
        try:
            found = np.shape(self.run())
        except _faults() as error:
            self.problems.append(f"__call__ fails: {_said(error)}")
            return
        if found:
            self._outputs = int(found[-1])

    def run(self) -> np.ndarray:
        """What the model gives for some pictures."""
        import tensorflow as tf

        for size in _SIZES:
            try:
                return np.asarray(self.model(self.pictures(size)))
            except tf.errors.InvalidArgumentError:
                if size == _SIZES[-1]:
                    raise
        raise AssertionError("unreachable")

    def _read_variables(self) -> None:
        import tensorflow as tf

        for name in ("variables", "trainable_variables"):
            values = getattr(self, name)
            wrong = [v for v in values if not isinstance(v, tf.Variable)]
            if wrong:
                self.problems.append(
                    f"{name} holds what is no variable: "
                    f"{type(wrong[0]).__name__}"
                )
                setattr(self, name, [v for v in values if v not in wrong])
        listed = {variable.ref() for variable in self.variables}
        for what, others in (
            ("trainable_variables holds", self.trainable_variables),
            ("__call__ uses", self._used()),
        ):
            names = [v.name for v in others if v.ref() not in listed]
            if names:
                self.problems.append(
                    f"{what} what is not among `variables`: {_some(names)}"
                )

    def _used(self) -> list[Any]:
        functions = getattr(self.model.__call__, "concrete_functions", [])
        found = {
            variable.ref(): variable
            for function in functions
            for variable in function.graph.variables
        }
        return list(found.values())

    def _read_losses(self) -> None:
        for number, loss in enumerate(self._losses):
            try:
                value = np.asarray(loss())
            except _faults() as error:
                self.problems.append(
                    f"regularization_losses[{number}] fails: {_said(error)}"
                )
                return
            if value.shape != () or not np.isfinite(value):
                self.problems.append(
                    f"regularization_losses[{number}] must give a finite "
                    f"number; it gives {errors.brief(value)}"
                )
                return

    def _read_endpoints(self) -> None:
        endpoints = getattr(self.model, "endpoints", None)
        if self.spec is None or not callable(endpoints):
            return
        try:
            found = self._traced(endpoints, None, {}).structured_outputs
            self._endpoints = {
                name: _shape(found[name]) for name in sorted(found)
            }
        except _faults() as error:
            self.problems.append(f"endpoints fails: {_said(error)}")


def _first_argument(function: Any) -> Any:
    """The spec of a trace's only tensor, but for switches like `training`."""
    import tensorflow as tf

    found = [
        spec
        for spec in tf.nest.flatten(function.structured_input_signature)
        if isinstance(spec, tf.TensorSpec)
    ]
    switches = found[1:]
    if not found or any(s.dtype != tf.bool or s.shape.rank for s in switches):
        return None
    return found[0]


def _of_pictures(spec: Any) -> bool:
    right = spec.dtype.is_floating or spec.dtype.name == "uint8"
    return right and spec.shape.rank == 4 and spec.shape[-1] in (3, None)


def _argument_names(function: Any) -> Sequence[str]:
    from tensorflow.python.util import tf_inspect

    spec = tf_inspect.getfullargspec(function)
    return [*spec.args, *spec.kwonlyargs]


def _shape(tensor: Any) -> tuple[int | None, ...]:
    """() where nothing is known."""
    return () if tensor.shape.rank is None else tuple(tensor.shape)


def _shown(shape: Any) -> str:
    if shape.rank is None:
        return "[…]"
    return f"[{', '.join('?' if d is None else str(d) for d in shape)}]"


def _spec_shown(spec: Any) -> str:
    return f"{spec.dtype.name} {_shown(spec.shape)}"


def _size(variable: Any) -> int:
    return int(variable.shape.num_elements() or 0)


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(itertools.islice(names, _MOST_NAMED))
    more = len(names) - _MOST_NAMED
    return f"{shown} and {more} more" if more > 0 else shown


def _gradient(interface: _Interface) -> tuple[str, str]:
    """(status, detail) of a step of gradient descent, or two.

    The first one leaves most of a model as it is whose head is still zero.
    """
    import tensorflow as tf

    variables = interface.trainable_variables
    if interface.spec is None:
        return FAILED, "the interface failed"
    if not variables:
        return ABSENT, "no trainable variables"
    for size in _SIZES:
        pictures = interface.pictures(size)
        try:
            if sum(map(_size, variables)) > _LARGE:
                return _traced(interface, variables, pictures)
            return _trained(interface, variables, pictures)
        except tf.errors.InvalidArgumentError as error:
            if size == _SIZES[-1]:
                return FAILED, _said(error)
        except _faults() as error:
            return FAILED, _said(error)
    raise AssertionError("unreachable")


def _traced(
    interface: _Interface, variables: Sequence[Any], pictures: Any
) -> tuple[str, str]:
    """(status, detail) of gradients that are not run."""
    import tensorflow as tf

    missing: list[str] = []

    def gradients(pictures):
        found = _gradients(interface, variables, pictures)
        missing.append(_missing(variables, found))

    tf.function(gradients, autograph=False).get_concrete_function(pictures)
    if missing[0]:
        return FAILED, missing[0]
    return PASSED, (
        f"each of {len(variables)} trainable variables has a gradient, which "
        f"was not run: over {_LARGE:,} weights take too much memory"
    )


def _gradients(
    interface: _Interface, variables: Sequence[Any], pictures: Any
) -> list[Any]:
    """The gradient of each variable, or None."""
    import tensorflow as tf

    with tf.GradientTape() as tape:
        outputs = interface.model(pictures, **interface.options)
        loss = tf.add_n([_weighted(o) for o in tf.nest.flatten(outputs)])
    return tape.gradient(loss, variables)


def _missing(variables: Sequence[Any], gradients: Sequence[Any]) -> str:
    """Which variables have no gradient; "" if all have one."""
    names = [
        variable.name
        for variable, gradient in zip(variables, gradients, strict=True)
        if gradient is None
    ]
    if not names:
        return ""
    return (
        f"{len(names)} of {len(variables)} trainable variables have no "
        f"gradient: {_some(names)}"
    )


def _trained(
    interface: _Interface, variables: Sequence[Any], pictures: Any
) -> tuple[str, str]:
    import tensorflow as tf

    # Graphs that run once or twice are not worth optimizing.
    tf.config.optimizer.set_experimental_options(
        {"disable_meta_optimizer": True}
    )
    names = [variable.name for variable in variables]
    before = _flat(interface.model(pictures))
    changed = np.zeros(len(variables), bool)
    for _ in range(2):
        gradients = _gradients(interface, variables, pictures)
        if missing := _missing(variables, gradients):
            return FAILED, missing
        for number in reversed(range(len(variables))):
            # Popped, so that its memory is free for the next.
            finite, moved = _moved(variables[number], gradients.pop())
            if not finite:
                return FAILED, (
                    f"the gradient of {names[number]} is not finite"
                )
            changed[number] |= moved
        if changed.all():
            break
    if not changed.all():
        same = list(itertools.compress(names, ~changed))
        return FAILED, (
            f"the gradient of {len(same)} of {len(names)} trainable variables "
            f"is zero: {_some(same)}"
        )
    after = _flat(interface.model(pictures))
    if np.array_equal(before, after) or not np.isfinite(after).all():
        return FAILED, (
            "a step of gradient descent must change what __call__ gives, into "
            f"finite numbers; it was {errors.brief(before[:3])}, and is "
            f"{errors.brief(after[:3])}"
        )
    return PASSED, (
        f"a step changed each of {len(names)} trainable variables, and the "
        "output"
    )


def _flat(outputs: Any) -> np.ndarray:
    import tensorflow as tf

    return np.concatenate(
        [np.ravel(np.asarray(o, np.float64)) for o in tf.nest.flatten(outputs)]
    )


def _weighted(output: Any) -> Any:
    """A number on which each element of an output has another effect."""
    import tensorflow as tf

    output = tf.cast(tf.reshape(output, [-1]), tf.float32)
    count = tf.range(tf.size(output), dtype=tf.int32)
    return tf.reduce_sum(output * tf.cos(tf.cast(count, tf.float32)))


def _moved(variable: Any, gradient: Any) -> tuple[bool, bool]:
    """Moves a variable against its gradient: (finite, changed)."""
    import tensorflow as tf

    gradient = tf.convert_to_tensor(gradient)
    if not tf.reduce_all(tf.math.is_finite(gradient)):
        return False, False
    steepest = tf.reduce_max(tf.abs(gradient))
    if steepest == 0:
        return True, False
    before = variable.read_value()
    largest = tf.reduce_max(tf.abs(before))
    scale = largest if largest > 0 else tf.ones_like(largest)
    after = variable.assign_sub(
        gradient * (_STEP * scale / steepest), read_value=True
    )
    return True, bool(tf.reduce_any(after != before))


def main(argv: list[str] | None = None) -> int:
    """Prints what `examine` gathers; see above."""
    return fresh_process.serve(_work, __doc__, argv)


if __name__ == "__main__":
    sys.exit(main())
