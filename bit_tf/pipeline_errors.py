"""Python functions in tf.data pipelines, whose errors come out as they were.

TensorFlow turns an exception of a Python function into an error of its own,
with a traceback as its text. A function called through `numpy_call` keeps its
exception aside, as a generator does through `generate`, and `raised` finds it
again.
"""

import itertools
import re
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import tensorflow as tf

from bit_tf import errors
from bit_tf.errors import BitTfError, DatasetError

__all__ = ["generate", "iterate", "mapped", "numpy_call", "raised"]

_KEPT = 100
_FROM_DATA = "IteratorGetNext"
_MARK = "bit_tf pipeline error "
_BAD_DATA = (
    tf.errors.DataLossError,
    tf.errors.FailedPreconditionError,
    tf.errors.InvalidArgumentError,
    tf.errors.NotFoundError,
    tf.errors.UnknownError,
)

_kept: dict[int, BitTfError] = {}
_numbers = itertools.count(1)
_lock = threading.Lock()


def mapped(
    dataset: tf.data.Dataset,
    function: Callable[..., Any],
    parallel: int | None = tf.data.AUTOTUNE,
) -> tf.data.Dataset:
    """dataset.map in order, whose function is traced as it is written.

    AutoGraph would wrap its errors, and take longer.
    """
    return dataset.map(
        tf.autograph.experimental.do_not_convert(function),
        num_parallel_calls=parallel,
        deterministic=None if parallel is None else True,
    )


def numpy_call(
    function: Callable[..., Any], inputs: Sequence[Any], dtype: tf.DType
) -> tf.Tensor:
    """tf.numpy_function of a pure function, whose errors `raised` knows."""

    def call(*values: Any) -> Any:
        try:
            return function(*values)
        except BitTfError as error:
            raise _marked(error) from None

    return tf.numpy_function(call, inputs, dtype, stateful=False)


def generate(
    make: Callable[[], Iterable[Any]], signature: Any
) -> tf.data.Dataset:
    """tf.data.Dataset.from_generator, whose errors `raised` knows."""

    def run() -> Iterator[Any]:
        try:
            yield from make()
        except BitTfError as error:
            raise _marked(error) from None

    return tf.data.Dataset.from_generator(run, output_signature=signature)


def raised(error: BaseException) -> BaseException:
    """What a Python function of a pipeline raised, where `error` stems from it.

    Args:
      error: of iterating over a dataset.

    Returns:
      The original; DatasetError for what else is wrong with the data; or
      `error` itself, where it has another cause.
    """
    found = re.search(rf"{_MARK}(\d+)\.", str(error))
    if found:
        with _lock:
            return _kept.get(int(found[1]), error)
    if isinstance(error, _BAD_DATA) and _FROM_DATA in error.message:
        text = error.message.partition("[[")[0].rpartition("}}")[2].strip()
        return DatasetError(
            "All examples of a dataset can be read and decoded. Received: "
            f"{errors.brief(text)}. Leave out what is damaged: "
            "bad_images='skip' (--bad-images skip); of a tf.data.Dataset, "
            "its ignore_errors()."
        )
    return error


def iterate(dataset: Any) -> Iterator[Any]:
    """The elements of a dataset, whose errors are those of this package.

    Raises:
      ImageError: a picture that cannot be used; the message names it.
      DatasetError: other data that cannot be read.
    """
    iterator = iter(dataset)
    while True:
        try:
            element = next(iterator)
        except StopIteration:
            return
        except tf.errors.OpError as error:
            known = raised(error).with_traceback(None)
            error.__context__ = None
            break
        yield element
    # Who keeps the error must not keep the iterator, in its tracebacks: at the
    # end of the process it would wait for Python functions that no longer run.
    del iterator
    raise known


def _marked(error: BitTfError) -> RuntimeError:
    """Keeps the error, and gives one whose text leads back to it."""
    with _lock:
        number = next(_numbers)
        _kept[number] = error
        for old in list(_kept)[:-_KEPT]:
            del _kept[old]
    return RuntimeError(f"{_MARK}{number}.")
