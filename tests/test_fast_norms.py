"""The quick variance: the same values, or it is not used."""

import helpers
import keras
import numpy as np
import pytest
import reference
import tensorflow as tf

from bit_tf import fast_norms, frozen_graph, hub, layers

CHANNELS = 64


def normalization(epsilon=1e-5):
    """(a function of pictures, its values in float64)."""
    layer = layers.GroupNormalization(epsilon=epsilon)
    layer.build((None, None, None, CHANNELS))
    rng = np.random.default_rng(1)
    gamma = rng.uniform(0.5, 1.5, CHANNELS).astype(np.float32)
    beta = rng.standard_normal(CHANNELS).astype(np.float32)
    layer.gamma.assign(gamma)
    layer.beta.assign(beta)
    spec = tf.TensorSpec([None, None, None, CHANNELS], tf.float32)
    function = tf.function(lambda x: layer(x)).get_concrete_function(spec)

    def expected(x):
        # A function does not keep the layer's variables; this one does.
        gamma, beta = map(np.asarray, (layer.gamma, layer.beta))
        return reference.group_norm(x.astype(np.float64), gamma, beta, epsilon)

    return function, expected


def pictures(mean, side=56, seed=0):
    rng = np.random.default_rng(seed)
    noise = rng.standard_normal((2, side, side + 3, CHANNELS))
    return (noise + mean).astype(np.float32)


@pytest.fixture
def exact(monkeypatch):
    """A list that gets an item for every graph that is made."""
    made = []
    wrap = tf.compat.v1.wrap_function

    def noted(call, signature):
        made.append(signature)
        return wrap(call, signature)

    monkeypatch.setattr(tf.compat.v1, "wrap_function", noted)
    return made


@pytest.mark.parametrize(
    ("mean", "bound"), [(0, 1e-6), (3, 1e-6), (9, 1e-5), (100, 1e-5)]
)
def test_values_whatever_the_mean_is(mean, bound):
    function, expected = normalization()
    frozen = frozen_graph.freeze(function)
    x = pictures(mean)
    assert helpers.relative_error(frozen(tf.constant(x)), expected(x)) <= bound


def test_without_a_limit_a_large_mean_would_cost_digits(monkeypatch):
    monkeypatch.setattr(fast_norms, "LIMIT", np.inf)
    function, expected = normalization()
    frozen = frozen_graph.freeze(function)
    x = pictures(100)
    assert helpers.relative_error(frozen(tf.constant(x)), expected(x)) > 1e-4


def test_the_first_formula_is_there_when_it_is_needed(exact):
    function, _ = normalization()
    frozen = frozen_graph.freeze(function)
    before = len(exact)
    frozen(tf.constant(pictures(3)))
    assert len(exact) == before
    for _ in range(2):
        frozen(tf.constant(pictures(100)))
    assert len(exact) == before + 1


def test_one_picture_of_many_needs_it(exact):
    function, expected = normalization()
    frozen = frozen_graph.freeze(function)
    before = len(exact)
    x = pictures(0)
    x[1] += 100
    assert helpers.relative_error(frozen(tf.constant(x)), expected(x)) <= 1e-5
    assert len(exact) == before + 1


@pytest.mark.parametrize("value", [0.0, 1.0, 100.0])
def test_flat_pictures(value):
    function, _ = normalization()
    frozen = frozen_graph.freeze(function)
    x = tf.fill([1, 9, 7, CHANNELS], value)
    assert helpers.relative_error(frozen(x), function(x)) <= 1e-5


def test_what_is_no_number_stays_none():
    function, _ = normalization()
    frozen = frozen_graph.freeze(function)
    x = pictures(0)
    x[0, 3, 3, 5] = np.nan
    found = frozen(tf.constant(x)).numpy()
    assert np.isnan(found[0, ..., 4:6]).all()
    assert np.isfinite(found[1]).all()


def test_inside_another_function():
    function, expected = normalization()
    frozen = frozen_graph.freeze(function)
    x = pictures(100)
    found = tf.function(lambda x: frozen(x))(tf.constant(x))
    assert helpers.relative_error(found, expected(x)) <= 1e-5


def test_every_normalization_of_a_model(features_export):
    model = hub.load(features_export)
    function = tf.function(lambda x: model(x)).get_concrete_function(
        tf.TensorSpec([None, None, None, 3], tf.float32)
    )
    graph = frozen_graph._Graph(function)
    left, output, _ = graph.rest(graph.computed())
    found, worst = fast_norms.rewritten(left, output)
    before = [node.op for node in left.node]
    after = [node.op for node in found.node]
    assert after.count("EuclideanNorm") == 2 * before.count("Relu")
    assert before.count("StopGradient") == before.count("Relu")
    assert "StopGradient" not in after
    assert worst.endswith(":0")


def test_other_graphs_are_left_alone():
    def call(x):
        shift = tf.reduce_mean(x[:, :1], 2, keepdims=True)

        def mean(y):
            y = tf.reduce_mean(y, 1, keepdims=True)
            return tf.reduce_mean(y, 2, keepdims=True)

        # Around two different numbers it is no variance.
        difference = mean(tf.square(x - shift)) - tf.square(mean(x) - 1.0)
        variance = tf.maximum(difference, 0.0)
        grouped = tf.reshape(variance, [-1, 8, 8])
        total = tf.reduce_mean(grouped + tf.square(grouped), -1) + 1e-5
        return tf.math.rsqrt(total)

    spec = tf.TensorSpec([None, None, None, CHANNELS], tf.float32)
    function = tf.function(call).get_concrete_function(spec)
    graph = frozen_graph._Graph(function)
    left, output, _ = graph.rest(graph.computed())
    assert fast_norms.rewritten(left, output) is None
    x = tf.constant(pictures(1))
    frozen = frozen_graph.freeze(function)
    np.testing.assert_allclose(frozen(x), function(x), 1e-5)


def test_a_function_that_counts_its_calls_is_called_once():
    layer = layers.GroupNormalization()
    layer.build((None, None, None, CHANNELS))
    count = tf.Variable(0)

    def call(x):
        count.assign_add(1)
        return layer(x) + 0.0 * tf.cast(count, tf.float32)

    spec = tf.TensorSpec([None, None, None, CHANNELS], tf.float32)
    frozen = frozen_graph.freeze(tf.function(call).get_concrete_function(spec))
    frozen(tf.constant(pictures(100)))
    assert int(count) == 1


def test_mixed_precision():
    """The statistics are float32 there, too."""
    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        layer = layers.GroupNormalization()
    finally:
        keras.config.set_dtype_policy("float32")
    layer.build((None, None, None, CHANNELS))
    spec = tf.TensorSpec([None, None, None, CHANNELS], tf.bfloat16)
    function = tf.function(lambda x: layer(x)).get_concrete_function(spec)
    frozen = frozen_graph.freeze(function)
    x = tf.cast(pictures(3), tf.bfloat16)
    found = tf.cast(frozen(x), tf.float32)
    expected = tf.cast(function(x), tf.float32)
    assert helpers.relative_error(found, expected) <= 5e-3
