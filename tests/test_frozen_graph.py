"""What depends on weights alone is computed once; the rest stays as it was."""

import gc
import weakref

import helpers
import numpy as np
import pytest
import tensorflow as tf

import bit_tf
from bit_tf import frozen_graph, hub
from hub_export import saved_model

PICTURES = tf.random.stateless_uniform([2, 8, 7, 3], [1, 2])
SPEC = tf.TensorSpec([None, None, None, 3], tf.float32)


def concrete(call, spec=SPEC):
    return tf.function(call).get_concrete_function(spec)


def inside(frozen):
    """The function that a frozen one calls."""
    return frozen._fast or frozen._exact


def nodes(frozen):
    """The operations of a frozen function, by how many there are."""
    found = {}
    for node in inside(frozen).graph.as_graph_def().node:
        found[node.op] = found.get(node.op, 0) + 1
    return found


def test_the_model_has_the_same_values(features_export):
    model = hub.load(features_export)
    function = concrete(lambda pictures: model(pictures))
    frozen = frozen_graph.freeze(function)
    pictures = helpers.random_images(2, 40, 33, seed=1) / np.float32(255)
    expected = function(tf.constant(pictures))
    found = frozen(tf.constant(pictures))
    assert helpers.relative_error(found, expected) <= 1e-5
    left = nodes(frozen)
    assert "ReadVariableOp" not in left
    # Of each normalization one: the standardization of kernels has none left.
    assert left["Rsqrt"] == left["Relu"]
    assert left["Conv2D"] > left["Relu"]


def test_variables_are_let_go():
    module = tf.Module()
    module.weight = tf.Variable(tf.ones([3, 500, 100]))
    alive = weakref.ref(module.weight)

    def call(x):
        return tf.reduce_sum(module.weight) * tf.reduce_mean(x)

    frozen = frozen_graph.freeze(concrete(call))
    del module.weight
    gc.collect()
    assert alive() is None
    assert float(frozen(tf.ones([1, 2, 2, 3]))) == 150_000


@pytest.mark.parametrize("size", [4, 20_000])
def test_small_arrays_are_constants(size):
    weight = tf.Variable(tf.linspace(0.0, 1.0, size))
    function = concrete(lambda x: tf.reduce_mean(x) * tf.exp(-weight))
    frozen = frozen_graph.freeze(function)
    assert "Exp" not in nodes(frozen)
    assert len(inside(frozen).captured_inputs) == (size > 4)
    expected = np.exp(-np.linspace(0, 1, size))
    np.testing.assert_allclose(frozen(tf.ones([1, 1, 1, 3])), expected, 1e-5)


def test_weights_are_computed_in_parts(features_export, monkeypatch):
    computed = []
    compute = frozen_graph._Graph._compute

    def noted(self, names):
        computed.append(names)
        return compute(self, names)

    monkeypatch.setattr(frozen_graph._Graph, "_compute", noted)
    monkeypatch.setattr(frozen_graph, "_AT_ONCE", 2**20)
    model = hub.load(features_export)
    function = concrete(lambda pictures: model(pictures))
    frozen = frozen_graph.freeze(function)
    pictures = tf.random.stateless_uniform([1, 40, 40, 3], [3, 4])
    assert helpers.relative_error(frozen(pictures), function(pictures)) <= 1e-5
    assert len(computed) > 2
    names = [name for part in computed for name in part]
    assert len(names) == len(set(names))


def test_a_model_traced_unit_by_unit(small_npz, tmp_path, monkeypatch):
    monkeypatch.setattr(saved_model, "LARGE", 0)
    saved_model.export(
        bit_tf.load_model(small_npz), tmp_path / "out", verify=False
    )
    model = hub.load(tmp_path / "out")
    function = concrete(lambda pictures: model(pictures))
    frozen = frozen_graph.freeze(function)
    assert "StatefulPartitionedCall" not in nodes(frozen)
    pictures = tf.random.stateless_uniform([1, 40, 40, 3], [3, 4])
    assert helpers.relative_error(frozen(pictures), function(pictures)) <= 1e-5


def test_branches_and_loops():
    weight = tf.Variable([2.0, 3.0])
    limit = tf.Variable(3)

    def call(x):
        def more(index, total):
            factor = tf.cast(index, tf.float32) + 1.0
            return index + 1, total + factor * weight * tf.reduce_mean(x)

        _, total = tf.while_loop(
            lambda index, _: index < limit, more, (0, tf.zeros([2]))
        )
        return tf.cond(
            tf.reduce_mean(x) > 0.5,
            lambda: total * weight + 1.0,
            lambda: total - 2.0 * weight,
        )

    function = concrete(call)
    frozen = frozen_graph.freeze(function)
    for value in (0.25, 1.0):
        pictures = tf.fill([1, 2, 2, 3], value)
        np.testing.assert_allclose(frozen(pictures), function(pictures), 1e-6)


def test_a_variable_that_the_function_changes():
    count = tf.Variable(0.0)
    weight = tf.Variable(2.0)

    def call(x):
        count.assign_add(1.0)
        return count * weight + 0.0 * tf.reduce_mean(x)

    frozen = frozen_graph.freeze(concrete(call))
    assert [float(frozen(PICTURES)) for _ in range(3)] == [2.0, 4.0, 6.0]
    count.assign(9.0)
    weight.assign(7.0)
    assert float(frozen(PICTURES)) == 20.0


def test_what_is_computed_twice_is_computed_once(small_export):
    """Two signatures, called side by side, share the network."""
    model = hub.load(small_export)

    def call(x):
        return tf.concat(
            [
                model.signatures["image_feature_vector"](x)["features"],
                model.signatures["image_classification"](x)["logits"],
            ],
            axis=1,
        )

    both = frozen_graph.freeze(concrete(call))
    alone = frozen_graph.freeze(concrete(lambda x: model(x)))
    assert nodes(both)["Conv2D"] == nodes(alone)["Conv2D"]
    captured = len(inside(alone).captured_inputs)
    assert len(inside(both).captured_inputs) == captured
    pictures = tf.random.stateless_uniform([1, 40, 40, 3], [3, 4])
    assert helpers.relative_error(both(pictures), call(pictures)) <= 1e-5


def test_different_work_is_not_merged():
    weight = tf.Variable(tf.ones([3]))

    def call(x):
        first = tf.random.uniform([]) + tf.reduce_sum(weight)
        second = tf.random.uniform([]) + tf.reduce_sum(weight)
        up = tf.reduce_sum(tf.cast(x, tf.float32), axis=[0, 1, 2])
        down = tf.reduce_sum(tf.cast(-x, tf.float32), axis=[0, 1, 2])
        return tf.concat([[first - second], up, down], axis=0)

    frozen = frozen_graph.freeze(concrete(call))
    difference, *sums = np.asarray(frozen(tf.ones([1, 1, 2, 3])))
    assert difference != 0
    assert sums == [2.0] * 3 + [-2.0] * 3


def test_a_table_lives_on():
    module = tf.Module()
    module.table = tf.lookup.StaticHashTable(
        tf.lookup.KeyValueTensorInitializer([1, 2], [10.0, 20.0]), -1.0
    )
    weight = tf.Variable(2.0)

    def call(x):
        key = tf.cast(tf.reduce_mean(x), tf.int32)
        return weight * module.table.lookup(key)

    frozen = frozen_graph.freeze(concrete(call))
    del module.table
    gc.collect()
    for key, value in ((1, 20.0), (2, 40.0), (3, -2.0)):
        assert float(frozen(tf.fill([1, 1, 1, 3], float(key)))) == value


def test_randomness_stays_random():
    weight = tf.Variable(tf.ones([50]))

    def call(x):
        return weight * tf.random.uniform([50]) + 0.0 * tf.reduce_mean(x)

    frozen = frozen_graph.freeze(concrete(call))
    assert np.any(np.asarray(frozen(PICTURES)) != np.asarray(frozen(PICTURES)))


def test_captured_tensors_and_text():
    offset = tf.fill([70_000], 2.0)
    words = tf.constant(["a", "bb"])

    def call(x):
        length = tf.strings.length(tf.strings.join([words, words]))
        scale = tf.cast(tf.reduce_sum(length), tf.float32)
        return scale * tf.reduce_mean(x) + offset

    function = concrete(call)
    frozen = frozen_graph.freeze(function)
    np.testing.assert_allclose(frozen(PICTURES), function(PICTURES), 1e-6)


def test_what_does_not_depend_on_the_picture():
    weight = tf.Variable([1.0, 2.0])
    frozen = frozen_graph.freeze(concrete(lambda x: tf.square(weight)))
    np.testing.assert_array_equal(frozen(PICTURES), [1.0, 4.0])
    same = frozen_graph.freeze(concrete(lambda x: x))
    np.testing.assert_array_equal(same(PICTURES), PICTURES)
