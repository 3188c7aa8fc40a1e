"""Calls of a loaded SavedModel under tf.distribute."""

from collections.abc import Callable
from typing import Any

import tensorflow as tf

__all__ = ["is_own", "run"]


def run(function: Callable[[], Any]) -> Any:
    """What a function returns that calls a loaded SavedModel.

    One that was loaded under the scope of a strategy can be called by its
    replicas, and outside of the scope, but not in between, where a model is
    made. There every replica calls it, and the first one's result counts.

    Args:
      function: without arguments, returning a nest of tensors.
    """
    if (
        not tf.distribute.has_strategy()
        or not tf.distribute.in_cross_replica_context()
        or not tf.executing_eagerly()
    ):
        return function()
    strategy = tf.distribute.get_strategy()
    return strategy.experimental_local_results(strategy.run(function))[0]


def is_own(variable: tf.Variable) -> bool:
    """Whether the strategy in whose scope this is called can train it."""
    if not tf.distribute.has_strategy():
        return True
    strategy = tf.distribute.get_strategy()
    return strategy.extended.variable_created_in_scope(variable)
