"""Which variables a layer trains, by their names."""

import keras
import numpy as np
import pytest
import tensorflow as tf
import toy_saved_model

from bit_tf import errors, hub
from bit_tf.hub import KerasLayer

PICTURES = np.random.default_rng(0).random((4, 8, 8, 3), np.float32)
LABELS = np.arange(4) % 3
NAMES = ["block1/kernel", "block1/gamma", "block2/kernel", "head/kernel"]


def blocks_model(path):
    """A chain of four products, with a penalty of each and one of the ends."""
    root = tf.train.Checkpoint()
    weights = [
        tf.Variable(
            tf.random.stateless_uniform([3, 3], [0, seed]), name=NAMES[seed]
        )
        for seed in range(4)
    ]
    steps = tf.Variable(0, trainable=False, name="steps")

    @tf.function(
        input_signature=[
            tf.TensorSpec([None, None, None, 3], tf.float32),
            tf.TensorSpec([], tf.bool),
        ]
    )
    def call(images, training):
        steps.assign_add(tf.cast(training, tf.int32))
        found = tf.reduce_mean(images, [1, 2])
        for weight in weights:
            found = found @ weight
        return found

    def penalty(*some):
        return tf.function(
            lambda: tf.add_n([tf.nn.l2_loss(weight) for weight in some]),
            input_signature=[],
        )

    root.__call__ = call
    root.variables = [*weights, steps]
    root.trainable_variables = weights
    root.regularization_losses = [
        *map(penalty, weights),
        penalty(weights[0], weights[3]),
    ]
    tf.saved_model.save(root, str(path))


@pytest.fixture(scope="module")
def blocks(tmp_path_factory):
    path = tmp_path_factory.mktemp("blocks") / "model"
    blocks_model(path)
    return str(path)


def trained(layer):
    return [weight.name for weight in layer.trainable_weights]


def compiled(layer, rate=0.1):
    model = keras.Sequential([keras.Input((None, None, 3)), layer])
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.SGD(rate), loss)
    return model


def changed(layer, step):
    """Names of the variables that a step changes."""
    before = [np.array(weight) for weight in layer.weights]
    step()
    return [
        weight.name
        for weight, value in zip(layer.weights, before, strict=True)
        if not np.array_equal(weight, value)
    ]


PATTERNS = {
    "block2|head": ["block2_kernel", "head_kernel"],
    "^block1": ["block1_kernel", "block1_gamma"],
    "^block1/": ["block1_kernel", "block1_gamma"],
    "block1_k": ["block1_kernel"],
    # An expression with a "/" is not also searched in names with "_".
    "^(?!block[12]/)": ["head_kernel"],
    "^(?!block[12]_)": ["head_kernel"],
    "(?i)HEAD": ["head_kernel"],
    ".*": ["block1_kernel", "block1_gamma", "block2_kernel", "head_kernel"],
    "": ["block1_kernel", "block1_gamma", "block2_kernel", "head_kernel"],
}


@pytest.mark.parametrize("pattern", PATTERNS)
def test_only_what_a_pattern_is_found_in_is_trained(blocks, pattern):
    layer = KerasLayer(blocks, trainable=pattern)
    assert trained(layer) == PATTERNS[pattern]
    assert layer.trainable is True
    assert layer.trainable_pattern == pattern
    assert len(layer.weights) == len(layer.variables) == 5
    assert len(layer.non_trainable_weights) == 5 - len(PATTERNS[pattern])
    model = compiled(layer)
    assert len(model.trainable_weights) == len(PATTERNS[pattern])
    found = changed(layer, lambda: model.train_on_batch(PICTURES, LABELS))
    assert found == [*PATTERNS[pattern], "steps"]


def test_penalties_of_what_is_trained(blocks):
    layer = KerasLayer(blocks, trainable=True)
    one, two, three, four = (
        float(tf.nn.l2_loss(weight)) for weight in layer.weights[:4]
    )
    for pattern, expected in [
        (".*", one + two + three + four + (one + four)),
        ("gamma|block2", two + three),
        # The one that reads two variables counts with either of them.
        ("head", four + (one + four)),
        ("block1/k", one + (one + four)),
        ("block1_k|head", one + four + (one + four)),
        (".*", one + two + three + four + (one + four)),
    ]:
        layer.trainable = pattern
        assert np.isclose(sum(map(float, layer.losses)), expected)
        model = compiled(layer)
        assert np.isclose(
            model.evaluate(PICTURES, LABELS, verbose=0)
            - float(model.loss(LABELS, layer(PICTURES))),
            expected,
            rtol=1e-4,
        )
    layer.trainable = False
    assert layer.losses == []


def test_freezing_keeps_the_pattern(blocks):
    layer = KerasLayer(blocks, trainable="block2")
    model = compiled(layer)
    for owner in (layer, model):
        # Keras ignores it where the model itself is what it is set to.
        owner.trainable = False
        assert trained(layer) == [] == layer.losses == model.trainable_weights
        assert layer.trainable is False
        assert layer.trainable_pattern == "block2"
        compiled(layer)
        owner.trainable = True
        assert trained(layer) == ["block2_kernel"]
    layer.trainable = True
    assert trained(layer) == ["block2_kernel"]
    # One that is set later counts, also on a frozen layer.
    layer.trainable = False
    layer.trainable = "head"
    assert trained(layer) == ["head_kernel"]
    layer.trainable = ".*"
    assert len(trained(layer)) == 4
    model = compiled(layer)
    found = changed(layer, lambda: model.fit(PICTURES, LABELS, verbose=0))
    assert len(found) == 5


def test_training_mode_is_that_of_any_trained_layer(blocks):
    layer = KerasLayer(blocks, trainable="head")
    layer(PICTURES, training=True)
    assert int(layer.weights[4].numpy()) == 1
    layer.trainable = False
    layer(PICTURES, training=True)
    assert int(layer.weights[4].numpy()) == 1


def test_layers_of_one_object_choose_each_by_itself(blocks):
    loaded = hub.load(blocks)
    layers = {
        pattern: KerasLayer(loaded, trainable=pattern)
        for pattern in ("head", "block1", True, False)
    }
    assert trained(layers["head"]) == ["head_kernel"]
    assert trained(layers["block1"]) == ["block1_kernel", "block1_gamma"]
    assert len(trained(layers[True])) == 4
    assert trained(layers[False]) == []
    model = compiled(layers["block1"])
    found = changed(
        layers[False], lambda: model.train_on_batch(PICTURES, LABELS)
    )
    assert found == ["block1_kernel", "block1_gamma", "steps"]
    layers["block1"].trainable = False
    assert trained(layers["head"]) == ["head_kernel"]
    assert len(trained(layers[True])) == 4


def test_weights_of_one_name(tmp_path):
    toy_saved_model.save(tmp_path / "toy")
    layer = KerasLayer(tmp_path / "toy", trainable="^w$", output_key="logits")
    assert [weight.shape for weight in layer.trainable_weights] == [(3, 4)]
    layer.trainable = "^w_1$"
    assert [weight.shape for weight in layer.trainable_weights] == [(4,)]


def test_patterns_that_cannot_be_used(blocks):
    layer = KerasLayer(blocks, trainable="head")
    for pattern in ("block[", "(?P<", "a{1}{2}{99999999999}"):
        with pytest.raises(ValueError, match="block1_gamma") as caught:
            layer.trainable = pattern
        assert "Received: " in str(caught.value)
        with pytest.raises(ValueError, match="block1_gamma"):
            KerasLayer(blocks, trainable=pattern)
    for pattern, names in {
        "block4": "block1_gamma",
        "block4/": "block1/gamma",
        "block1_kernel/": "block1/kernel",
        # Not among those that can be trained.
        "steps": "head_kernel",
    }.items():
        with pytest.raises(errors.UnknownNameError, match=names):
            layer.trainable = pattern
        with pytest.raises(errors.UnknownNameError, match=names):
            KerasLayer(blocks, trainable=pattern)
    for value in (["head"], b"head", 0.5, tf.constant(True)):
        with pytest.raises(ValueError, match="regular expression such as"):
            layer.trainable = value
        with pytest.raises(ValueError, match="regular expression such as"):
            KerasLayer(blocks, trainable=value)
    # Nothing of it counts.
    assert trained(layer) == ["head_kernel"]
    assert layer.trainable_pattern == "head"
    with pytest.raises(errors.HandleError, match="trainable_variables"):
        KerasLayer(lambda x: x, trainable="head")
    frozen = KerasLayer(lambda x: x)
    with pytest.raises(errors.UnknownNameError, match="no names"):
        frozen.trainable = "head"
    for value in (np.bool_(True), 1, True):
        layer.trainable = value
        assert layer.trainable is True


class Many:
    """An object of 99 variables, as one that was loaded has them."""

    def __init__(self):
        self.variables = self.trainable_variables = [
            tf.Variable(1.0, name=f"block{index}/kernel") for index in range(99)
        ]

    def __call__(self, images):
        return images * self.variables[0]


def test_a_long_list_of_names_is_cut_short():
    with pytest.raises(errors.UnknownNameError) as caught:
        KerasLayer(Many(), trainable="gamma")
    message = str(caught.value)
    assert "'block0_kernel', " in message
    assert "and 91 more" in message
    assert len(message) < 500


def test_a_pattern_is_saved(blocks, tmp_path):
    layer = KerasLayer(blocks, trainable="block2|head", name="hub")
    model = compiled(layer)
    model.fit(PICTURES, LABELS, verbose=0)
    for trainable in (True, False):
        layer.trainable = trainable
        model.save(tmp_path / "model.keras")
        copy = keras.saving.load_model(
            tmp_path / "model.keras", safe_mode=False
        ).get_layer("hub")
        assert copy.get_config() == layer.get_config()
        assert copy.trainable is trainable
        assert trained(copy) == trained(layer)
        copy.trainable = True
        assert trained(copy) == ["block2_kernel", "head_kernel"]


def test_training_goes_on_after_loading(blocks, tmp_path):
    """The optimizer's slots are those of what the pattern chooses."""
    layer = KerasLayer(blocks, trainable="block2")
    model = compiled(layer)
    model.compile(keras.optimizers.Adam(0.01), model.loss)
    model.fit(PICTURES, LABELS, verbose=0)
    model.save(tmp_path / "model.keras")
    copy = keras.saving.load_model(tmp_path / "model.keras", safe_mode=False)
    for one in (model, copy):
        one.fit(PICTURES, LABELS, verbose=0)
    assert len(copy.optimizer.variables) == len(model.optimizer.variables) == 4
    assert np.allclose(copy(PICTURES), model(PICTURES), atol=1e-7)
