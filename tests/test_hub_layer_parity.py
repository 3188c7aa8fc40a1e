"""One SavedModel in tensorflow_hub's layer of Keras 2 and in ours of Keras 3.

The public idioms of tensorflow_hub's documentation, each in both.
"""

import helpers
import keras
import numpy as np
import pytest
import tensorflow as tf
import tensorflow_hub
import tf_keras
import toy_saved_model

from bit_tf.hub import KerasLayer

PICTURES = helpers.random_images(4, 32, 32)
FLOATS = PICTURES.astype(np.float32) / np.float32(255)
LABELS = np.arange(4) % 3


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    path = tmp_path_factory.mktemp("toy") / "model"
    toy_saved_model.save(path)
    return str(path)


@pytest.fixture(scope="module")
def shapeless(tmp_path_factory):
    """A SavedModel that does not know how long its vectors are."""
    path = tmp_path_factory.mktemp("shapeless") / "model"
    root = tf.train.Checkpoint()
    weight = tf.Variable(tf.random.stateless_uniform([3, 5], [0, 1]))

    @tf.function(
        input_signature=[tf.TensorSpec([None, None, None, 3], tf.float32)]
    )
    def call(images):
        size = 5 + 0 * tf.shape(images)[1]
        return tf.reshape(tf.reduce_mean(images, [1, 2]) @ weight, [-1, size])

    root.__call__ = call
    root.variables = root.trainable_variables = [weight]
    tf.saved_model.save(root, str(path))
    return str(path)


def theirs(handle, **options):
    return tensorflow_hub.KerasLayer(handle, **options)


def ours(handle, **options):
    return KerasLayer(handle, **options)


def in_sequential(framework, layer, head):
    inputs = framework.Input((None, None, 3))
    return framework.Sequential([inputs, layer, head])


def in_functional(framework, layer, head):
    inputs = framework.Input((None, None, 3))
    return framework.Model(inputs, head(layer(inputs)))


def both(put, handle, *, rate=0.03, **options):
    """(Keras 2 model, Keras 3 model) with a Dense layer of the same values."""
    models, width = [], 3
    for framework, layer in ((tf_keras, theirs), (keras, ours)):
        head = framework.layers.Dense(width)
        model = put(framework, layer(handle, **options), head)
        kernel, _ = head.get_weights()
        values = np.random.default_rng(0).normal(size=kernel.shape)
        head.set_weights([values * 0.1, np.zeros(width)])
        loss = framework.losses.SparseCategoricalCrossentropy(from_logits=True)
        optimizer = framework.optimizers.SGD(rate, momentum=0.9)
        model.compile(optimizer, loss)
        models.append(model)
    return models


def named(model):
    """{name: variable}; of the layer's in the SavedModel's order."""
    layer, head = model.layers[-2:]
    return {
        **{f"hub {n}": v for n, v in enumerate(layer.trainable_weights)},
        **{f"head {n}": v for n, v in enumerate(head.trainable_weights)},
    }


def gradients(model):
    variables = named(model)
    with tf.GradientTape() as tape:
        outputs = model(FLOATS, training=True)
        loss = tf.reduce_sum(outputs * np.cos(np.arange(outputs.shape[1])))
        loss += tf.add_n(model.losses) if model.losses else 0.0
    return dict(
        zip(variables, tape.gradient(loss, [*variables.values()]), strict=True)
    )


def assert_near(found, expected, limit):
    """Each of two dicts' values, by relative error."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        one, other = np.array(found[name]), np.array(value)
        assert helpers.relative_error(one, other) <= limit, name


def assert_same_training(models, steps=5, outputs=1e-4):
    """Both lose as much at each step, and end with the same weights."""
    losses = [
        [
            model.fit(FLOATS, LABELS, shuffle=False, verbose=0).history["loss"][
                0
            ]
            for _ in range(steps)
        ]
        for model in models
    ]
    assert np.allclose(losses[1], losses[0], rtol=outputs)
    assert losses[1][-1] < losses[1][0]
    assert_near(named(models[1]), named(models[0]), outputs)


@pytest.mark.slow
def test_bit_features(features_export):
    """Forward to 1e-6, gradients to 1e-5, five SGD steps to 1e-4."""
    models = both(
        in_sequential, str(features_export), trainable=True, rate=0.001
    )
    features = [model.layers[-2] for model in models]
    for pictures in (FLOATS, PICTURES):
        expected, found = (np.array(layer(pictures)) for layer in features)
        assert found.shape == (4, 1024)
        assert helpers.relative_error(found, expected) <= 1e-6
    expected, found = (model(FLOATS) for model in models)
    assert helpers.relative_error(found, expected) <= 1e-6
    expected, found = map(gradients, models)
    assert len(found) == 43 + 2
    assert_near(found, expected, 1e-5)
    before = {name: np.array(value) for name, value in named(models[1]).items()}
    assert_same_training(models)
    for name, value in named(models[1]).items():
        assert not np.array_equal(value, before[name]), name


@pytest.mark.parametrize(
    "trainable", [pytest.param(False, marks=pytest.mark.slow), True]
)
def test_sequential(toy, trainable):
    """Sequential([KerasLayer(handle), Dense]), frozen and trained."""
    models = both(in_sequential, toy, output_key="logits", trainable=trainable)
    assert len(named(models[1])) == 2 + 2 * trainable
    assert np.allclose(models[1](FLOATS), models[0](FLOATS), rtol=1e-6)
    assert_near(*map(gradients, models[::-1]), 1e-5)
    assert_same_training(models)
    assert np.allclose(
        sum(map(float, models[1].losses)),
        sum(map(float, models[0].losses)),
        rtol=1e-5,
    )


def test_functional_with_a_static_last_dimension(shapeless):
    """output_shape tells a Dense layer what the SavedModel does not."""

    def of_four(framework, layer, head):
        # Theirs forgets the shape where it does not know the batch.
        inputs = framework.Input((None, None, 3), batch_size=4)
        return framework.Model(inputs, head(layer(inputs)))

    options = {"output_shape": [5], "trainable": True}
    models = both(of_four, shapeless, **options)
    for model in models:
        assert tuple(model.layers[1].output.shape) == (4, 5)
    assert np.allclose(models[1](FLOATS), models[0](FLOATS), rtol=1e-6)
    assert_near(*map(gradients, models[::-1]), 1e-5)
    layer, head = KerasLayer(shapeless, **options), keras.layers.Dense(3)
    model = in_functional(keras, layer, head)
    assert layer.output.shape == (None, 5)
    assert model(FLOATS).shape == (4, 3)
    for framework, layer in ((tf_keras, theirs), (keras, ours)):
        with pytest.raises(ValueError, match="defined"):
            of_four(framework, layer(shapeless), framework.layers.Dense(3))


def test_signature_with_output_key(toy):
    """One output of a signature, beside a Dense layer that is trained."""
    models = both(
        in_functional, toy, signature="serving_default", output_key="means"
    )
    assert len(named(models[1])) == 2
    assert np.allclose(models[1](FLOATS), models[0](FLOATS), rtol=1e-6)
    assert_near(*map(gradients, models[::-1]), 1e-5)
    options = {"signature": "serving_default"}
    found, expected = (
        layer(toy, signature_outputs_as_dict=True, **options)(FLOATS)
        for layer in (ours, theirs)
    )
    assert_near(found, expected, 1e-6)
    for layer in (ours, theirs):
        with pytest.raises(ValueError):
            layer(toy, **options)


def test_outputs_in_a_dict(toy):
    """All the outputs of a SavedModel, each used in one functional model."""
    found = []
    for framework, layer in ((tf_keras, theirs), (keras, ours)):
        inputs = framework.Input((None, None, 3))
        outputs = layer(toy, arguments={"scale": 3.0})(inputs)
        assert set(outputs) == {"logits", "means"}
        model = framework.Model(inputs, outputs)
        found.append(model.predict(FLOATS, verbose=0))
    assert_near(found[1], found[0], 1e-6)


@pytest.mark.parametrize("way", ["tf.saved_model.save", "export"])
def test_nested_in_a_saved_model(toy, tmp_path, way):
    """A model around the layer, saved whole with weights of its own."""
    models = both(in_sequential, toy, output_key="logits", trainable=True)
    for model in models:
        model.set_weights([value + 1 for value in model.get_weights()])
    outputs = []
    for name, model in zip(("theirs", "ours"), models, strict=True):
        path = str(tmp_path / name)
        if way == "export" and model is models[1]:
            model.export(path, verbose=False)
        else:
            tf.saved_model.save(model, path)
        again = tf.saved_model.load(path)
        served = again.signatures["serving_default"](tf.constant(FLOATS))
        (output,) = served.values()
        assert np.allclose(output, model(FLOATS), rtol=1e-6)
        outputs.append(output)
    assert helpers.relative_error(outputs[1], outputs[0]) <= 1e-6
