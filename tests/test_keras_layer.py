import os
import subprocess
import sys

import helpers
import keras
import numpy as np
import pytest
import tensorflow as tf
import tiny_models
import toy_saved_model

import bit_tf
from bit_tf import errors, hub, models
from bit_tf.keras_layer import KerasLayer

PICTURES = helpers.random_images(4, 32, 32)
FLOATS = PICTURES.astype(np.float32) / np.float32(255)
LABELS = np.arange(4)


def images(dtype="uint8"):
    return keras.Input((None, None, 3), dtype=dtype)


def compiled(model, optimizer=None, **options):
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer or keras.optimizers.SGD(0.1), loss, **options)
    return model


def changed(variables, before):
    """Which variables have another value than before."""
    return [
        not np.array_equal(variable, value)
        for variable, value in zip(variables, before, strict=True)
    ]


def arrays(variables):
    return [np.array(variable) for variable in variables]


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    path = tmp_path_factory.mktemp("toy") / "model"
    toy_saved_model.save(path)
    return str(path)


@pytest.fixture
def loaded_toy(toy):
    return hub.load(toy)


def logits(toy, **options):
    return KerasLayer(toy, output_key="logits", **options)


def test_reached_through_hub():
    assert hub.KerasLayer is KerasLayer


def test_values_are_the_saved_models(features_export):
    model = hub.load(features_export)
    layer = KerasLayer(features_export)
    for pictures in (PICTURES, FLOATS):
        expected = model(pictures)
        assert np.array_equal(layer(pictures), expected)
        assert np.array_equal(layer(tf.constant(pictures)), expected)
        assert np.array_equal(layer(pictures, training=True), expected)
    assert np.array_equal(layer(FLOATS.astype(np.float64)), expected)
    assert layer.supports_jit
    assert layer.trainable_weights == []
    assert len(layer.weights) == len(model.variables)
    assert layer.count_params() == sum(
        variable.shape.num_elements() for variable in model.variables
    )
    assert layer(images()).shape == (None, 1024)
    assert layer.compute_output_shape((None, 64, 64, 3)) == (None, 1024)
    with pytest.raises(errors.ImageRangeError, match="float32 or uint8"):
        layer(PICTURES.astype(np.int32))
    with pytest.raises(errors.ImageRangeError, match=r"keras\.Input"):
        layer(images("int64"))


class Subclassed(keras.Model):
    def __init__(self, layer, head):
        super().__init__()
        self.layer, self.head = layer, head

    def call(self, inputs):
        return self.head(self.layer(inputs))


def in_sequential(layer, head, dtype):
    return keras.Sequential([images(dtype), layer, head])


def in_functional(layer, head, dtype):
    inputs = images(dtype)
    return keras.Model(inputs, head(layer(inputs)))


def in_subclassed(layer, head, dtype):
    return Subclassed(layer, head)


@pytest.mark.parametrize("dtype", ["uint8", "float32"])
@pytest.mark.parametrize("put", [in_sequential, in_functional, in_subclassed])
def test_in_models(toy, put, dtype):
    layer, head = logits(toy), keras.layers.Dense(3)
    model = put(layer, head, dtype)
    pictures = PICTURES if dtype == "uint8" else FLOATS
    found = model(pictures)
    assert np.allclose(found, head(logits(toy)(pictures)), rtol=1e-6)
    assert np.allclose(model.predict(pictures, verbose=0), found, rtol=1e-5)
    if put is not in_subclassed:
        assert model.output_shape == (None, 3)
        assert layer.output.shape == (None, 4)
        assert layer.output.dtype == "float32"


def test_sequential_without_an_input_takes_the_layers_dtype(toy):
    layer = logits(toy, dtype="uint8")
    model = keras.Sequential([layer, keras.layers.Dense(2)])
    expected = layer(PICTURES)
    head = model.layers[1]
    assert np.array_equal(model(PICTURES), head(expected))
    assert model.inputs[0].dtype == "uint8"
    assert keras.backend.standardize_dtype(expected.dtype) == "float32"


@pytest.mark.slow
def test_gradients_and_training(features_export, small_npz):
    """Every variable is trained, in place, as the Keras model's are."""
    original = bit_tf.load_model(small_npz, head=False)
    layer = KerasLayer(features_export, trainable=True)
    target = np.random.default_rng(0).normal(size=(4, 1024))

    def gradients(call, variables):
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean((call(FLOATS) - target) ** 2)
        return tape.gradient(loss, variables)

    named = {
        name.replace("/", "_"): variable
        for name, variable in models.canonical_variables(original).items()
    }
    expected = dict(
        zip(named, gradients(original, list(named.values())), strict=True)
    )
    assert {weight.name for weight in layer.trainable_weights} == set(named)
    found = gradients(layer, layer.trainable_weights)
    for weight, gradient in zip(layer.trainable_weights, found, strict=True):
        assert helpers.relative_error(gradient, expected[weight.name]) <= 1e-4

    # The function and its gradient are traced: a step costs little more.
    model = compiled(
        in_functional(layer, keras.layers.Dense(4), "uint8"), run_eagerly=True
    )
    before = arrays(model.weights)
    model.fit(PICTURES, LABELS, verbose=0)
    assert all(changed(model.weights, before))
    for weight, variable in zip(
        layer.weights, layer.resolved_object.variables, strict=True
    ):
        assert weight.value is variable


OPTIMIZERS = {
    "SGD": lambda: keras.optimizers.SGD(0.1, momentum=0.9),
    "Adam": lambda: keras.optimizers.Adam(0.1, clipnorm=1.0, use_ema=True),
    "AdamW": lambda: keras.optimizers.AdamW(0.1, gradient_accumulation_steps=2),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_optimizers(toy, optimizer):
    layer = logits(toy, trainable=True)
    model = keras.Sequential([images(), layer])
    compiled(model, OPTIMIZERS[optimizer]())
    before = arrays(layer.weights)
    history = model.fit(PICTURES, LABELS, batch_size=1, epochs=9, verbose=0)
    assert changed(layer.weights, before) == [True, True, True]
    losses = history.history["loss"]
    assert losses[-1] < losses[0]


def test_weights_are_listed_as_kerass(toy):
    layer = logits(toy, trainable=True, name="toy")
    names = ["w", "w_1", "scope_steps"]
    assert [weight.name for weight in layer.weights] == names
    assert [weight.path for weight in layer.weights] == [
        f"toy/{name}" for name in names
    ]
    assert layer.trainable_weights == layer.weights[:2]
    assert layer.non_trainable_weights == layer.weights[2:]
    assert layer.count_params() == 12 + 4 + 1
    lines = []
    keras.Sequential([images(), layer]).summary(
        print_fn=lambda text, **_: lines.append(text), show_trainable=True
    )
    assert "Total params: 17" in "".join(lines)
    values = [np.full([3, 4], 2.0), np.full([4], 3.0), np.int32(7)]
    layer.set_weights(values)
    for variable, value in zip(
        layer.resolved_object.variables, values, strict=True
    ):
        assert np.array_equal(variable, value)
    assert np.allclose(
        layer(FLOATS), FLOATS.mean((1, 2)).sum(1)[:, None] * 2 + 3
    )


def test_freezing_after_construction(toy):
    layer = logits(toy)
    head = keras.layers.Dense(4)
    model = compiled(in_sequential(layer, head, "uint8"))
    assert model.trainable_weights == head.weights
    before = arrays(layer.weights)
    model.fit(PICTURES, LABELS, verbose=0)
    assert not any(changed(layer.weights, before))
    for owner in (layer, model):
        # Keras ignores it where the model itself is what it is set to.
        model.trainable = owner is layer
        owner.trainable = True
        assert len(layer.trainable_weights) == 2
        compiled(model).fit(PICTURES, LABELS, verbose=0)
        assert all(changed(layer.weights, before))
        before = arrays(layer.weights)
        owner.trainable = False
        assert layer.trainable_weights == [] == layer.losses
        assert len(layer.non_trainable_weights) == 3
        layer(PICTURES, training=True)
        assert not any(changed(layer.weights, before))


@pytest.mark.parametrize("first", [True, False])
def test_layers_of_one_object_are_frozen_each_by_itself(loaded_toy, first):
    layers = {
        trainable: logits(loaded_toy, trainable=trainable)
        for trainable in (first, not first)
    }
    trained, frozen = layers[True], layers[False]
    kernel, bias, _ = loaded_toy.variables
    for _ in range(2):
        assert [weight.value for weight in trained.trainable_weights] == [
            kernel,
            bias,
        ]
        assert len(trained.weights) == len(frozen.weights) == 3
        assert frozen.trainable_weights == [] == frozen.losses
        assert len(trained.losses) == 2
        for layer in layers.values():
            model = compiled(keras.Sequential([images(), layer]))
            wanted = layer is trained
            assert len(model.trainable_weights) == 2 * wanted
            before = arrays(loaded_toy.variables)
            if wanted:
                model.train_on_batch(PICTURES, LABELS)
            else:
                with pytest.warns(UserWarning, match="any trainable weights"):
                    model.train_on_batch(PICTURES, LABELS)
            assert changed(loaded_toy.variables, before) == [wanted] * 3
        # Another time, with one frozen and the other trained.
        trained, frozen = frozen, trained
        frozen.trainable = False
        trained.trainable = True
    # In one model, the variable is trained through the trainable layer.
    inputs = images()
    model = keras.Model(inputs, trained(inputs) + frozen(inputs))
    compiled(model, keras.optimizers.SGD(1.0))
    assert len(model.trainable_weights) == len(model.losses) == 2
    before = bias.numpy()
    with tf.GradientTape() as tape:
        loss = model.compute_loss(PICTURES, LABELS, model(PICTURES))
    gradient = tape.gradient(loss, bias)
    model.train_on_batch(PICTURES, LABELS)
    assert np.allclose(bias, before - gradient, atol=1e-5)
    # A frozen weight stays so when another layer is made.
    trained.trainable_weights[0].trainable = False
    logits(loaded_toy, trainable=True)
    assert len(trained.trainable_weights) == len(trained.losses) == 1
    # As Keras has it: unfreezing a layer is unfreezing all of it.
    trained.trainable = False
    trained.trainable = True
    assert len(trained.trainable_weights) == 2


def test_weights_of_a_frozen_layer_fit_a_trainable_one(toy, tmp_path):
    frozen = keras.Sequential([images(), logits(toy)])
    frozen.set_weights([np.ones((3, 4)), np.full(4, 2.0), np.int32(5)])
    frozen.save_weights(tmp_path / "frozen.weights.h5")
    trained = keras.Sequential([images(), logits(toy, trainable=True)])
    trained.load_weights(tmp_path / "frozen.weights.h5")
    for found, value in zip(trained.weights, frozen.weights, strict=True):
        assert np.array_equal(found, value)
        assert found.name == value.name


def test_training_mode(toy):
    """Only in training, and only where the layer is trainable."""
    layer = logits(toy)
    steps = layer.weights[2]
    for trainable, training, expected in [
        (False, True, 0),
        (True, False, 0),
        (True, None, 0),
        (True, True, 1),
        (True, tf.constant(False), 1),
        (True, tf.constant(True), 2),
        (False, tf.constant(True), 2),
    ]:
        layer.trainable = trainable
        layer(PICTURES, training=training)
        assert int(steps.numpy()) == expected
    layer.trainable = True
    model = compiled(keras.Sequential([images(), layer]))
    model.predict(PICTURES, verbose=0)
    model.evaluate(PICTURES, LABELS, verbose=0)
    assert int(steps.numpy()) == 2
    model.fit(PICTURES, LABELS, batch_size=2, verbose=0)
    assert int(steps.numpy()) == 4


def test_functions_say_whether_they_take_training(caplog):
    seen = []

    def function(inputs, training):
        seen.append(training)
        return inputs

    KerasLayer(function)(FLOATS, training=True)
    KerasLayer(tf.function(function))(FLOATS)
    assert seen == [False, False]
    assert np.array_equal(KerasLayer(lambda x: 2 * x)(FLOATS), 2 * FLOATS)
    layer = KerasLayer(lambda x: x)
    layer.trainable = True
    for _ in range(2):
        assert np.array_equal(layer(FLOATS), FLOATS)
    assert caplog.text.count("has no trainable weights") == 1


@pytest.mark.slow
def test_regularization_losses_of_an_export(small_export):
    layer = KerasLayer(small_export, trainable=True)
    kernels = [
        weight for weight in layer.weights if weight.name.endswith("kernel")
    ]
    expected = 1e-4 * sum(np.sum(np.square(kernel)) for kernel in kernels)
    assert len(layer.losses) == len(kernels)
    assert np.isclose(sum(map(float, layer.losses)), expected, rtol=1e-5)
    # One penalty follows the variable that it is of.
    kernels[0].trainable = False
    assert len(layer.losses) == len(kernels) - 1
    layer.trainable = False
    assert layer.losses == []


def test_regularization_losses_count_once_in_training(toy):
    layer = logits(toy, trainable=True)
    inputs = images()
    # Two calls in one model, which is one set of weights.
    model = keras.Model(inputs, (layer(inputs) + layer(inputs)) / 2)
    compiled(model, keras.optimizers.SGD(0.0))
    kernel, bias = (weight.numpy() for weight in layer.trainable_weights)
    penalty = np.sum(kernel**2) + 2 * np.sum(bias**2)
    assert np.isclose(sum(map(float, model.losses)), penalty)
    scores = layer(PICTURES)
    loss = float(model.loss(LABELS, scores))
    for found in (
        model.evaluate(PICTURES, LABELS, verbose=0),
        model.train_on_batch(PICTURES, LABELS),
    ):
        assert np.isclose(found, loss + penalty)
    layer.trainable = False
    compiled(model)
    assert np.isclose(model.evaluate(PICTURES, LABELS, verbose=0), loss)
    # They are trained: without other loss, weights shrink.
    layer.trainable = True
    with tf.GradientTape() as tape:
        total = tf.add_n(layer.losses)
    gradients = tape.gradient(total, layer.trainable_weights)
    assert np.allclose(gradients[0], 2 * kernel)
    assert np.allclose(gradients[1], 4 * bias)
    # One penalty follows the variable that it is of.
    layer.trainable_weights[0].trainable = False
    assert np.isclose(sum(map(float, layer.losses)), 2 * np.sum(bias**2))


@pytest.mark.slow
def test_signatures_of_an_export(small_export):
    model = hub.load(small_export)
    expected = model.signatures["image_classification"](tf.constant(FLOATS))
    layer = KerasLayer(
        small_export,
        signature="image_classification",
        output_key="probabilities",
    )
    assert np.array_equal(layer(FLOATS), expected["probabilities"])
    assert layer(images("float32")).shape == (None, 10)
    assert np.array_equal(layer(FLOATS, training=True), layer(FLOATS))
    with pytest.raises(errors.ImageRangeError, match="takes float32"):
        layer(PICTURES)
    layer = KerasLayer(
        small_export,
        signature="image_classification",
        signature_outputs_as_dict=True,
    )
    found = layer(FLOATS.astype(np.float64))
    assert set(found) == set(expected)
    assert np.array_equal(found["logits"], expected["logits"])


def test_signatures(toy):
    expected = hub.load(toy).signatures["serving_default"](tf.constant(FLOATS))
    layer = KerasLayer(toy, signature="serving_default", output_key="logits")
    assert np.array_equal(layer(FLOATS, training=True), expected["logits"])
    assert layer(images("float32")).shape == (None, 4)
    with pytest.raises(errors.ImageRangeError, match="takes float32"):
        layer(PICTURES)
    layer = KerasLayer(
        toy, signature="serving_default", signature_outputs_as_dict=True
    )
    found = layer(FLOATS.astype(np.float64))
    assert set(found) == set(expected) == {"logits", "means"}
    assert np.array_equal(found["means"], expected["means"])

    inputs = {
        "images": keras.Input((None, None, 3), name="images"),
        "other": keras.Input((3,), name="other"),
    }
    layer = KerasLayer(toy, signature="both", output_key="sum")
    values = {"images": FLOATS, "other": np.ones((4, 3), np.float32)}
    found = keras.Model(inputs, layer(inputs))(values)
    assert np.allclose(found, FLOATS.mean((1, 2)) + 1)
    with pytest.raises(errors.HandleError, match="'images', 'other'"):
        layer(FLOATS)
    layer = KerasLayer(
        toy,
        signature="both",
        output_key="sum",
        arguments={"other": tf.ones([1, 3])},
    )
    assert np.allclose(layer(FLOATS), found)


def test_signatures_are_not_trained(toy):
    with pytest.raises(errors.HandleError, match="cannot be trained"):
        KerasLayer(toy, True, signature="both", output_key="sum")
    layer = KerasLayer(toy, signature="serving_default", output_key="means")
    model = keras.Sequential([images("float32"), layer])
    model.trainable = False
    model.trainable = True
    with pytest.raises(errors.HandleError, match="cannot be trained"):
        model(FLOATS)


def test_output_key_and_arguments(toy, tmp_path):
    assert set(KerasLayer(toy)(FLOATS)) == {"logits", "means"}
    plain = logits(toy)(FLOATS)
    tripled = logits(toy, arguments={"scale": 3.0})
    assert np.allclose(tripled(FLOATS), 3 * plain)
    assert tripled(images()).shape == (None, 4)
    with pytest.raises(errors.UnknownNameError, match="Did you mean 'logits'"):
        KerasLayer(toy, output_key="logit")(FLOATS)
    with pytest.raises(errors.HandleError, match="for models that return"):
        KerasLayer(tiny_models.save(tmp_path / "tiny"), output_key="features")(
            FLOATS
        )
    with pytest.raises(ValueError, match="matching concrete function"):
        logits(toy, arguments={"scale": 4.0})(FLOATS)


def test_output_shape(tmp_path):
    module = tf.Module()

    def call(images):
        size = 3 + 0 * tf.shape(images)[1]
        return {"a": tf.ones([tf.shape(images)[0], size]), "b": images[:, 0]}

    shape = tf.TensorSpec([None, None, None, 3], tf.float32)
    module.__call__ = tf.function(call, input_signature=[shape])
    tf.saved_model.save(module, str(tmp_path / "model"))
    layer = KerasLayer(tmp_path / "model", output_key="a")
    assert layer(images("float32")).shape == (None, None)
    for given in ([3], (3,), tf.TensorShape([3])):
        layer = KerasLayer(
            tmp_path / "model", output_key="a", output_shape=given
        )
        assert layer(images("float32")).shape == (None, 3)
        assert layer.compute_output_shape((2, 8, 8, 3)) == (2, 3)
        assert layer(FLOATS).shape == (4, 3)
    layer = KerasLayer(
        tmp_path / "model", output_shape={"a": [3], "b": (None, 3)}
    )
    found = layer(images("float32"))
    assert (found["a"].shape, found["b"].shape) == ((None, 3), (None, None, 3))
    assert layer.compute_output_shape((2, 8, 8, 3)) == {
        "a": (2, 3),
        "b": (2, None, 3),
    }
    copy = KerasLayer.from_config(layer.get_config())
    assert copy.compute_output_shape((2, 8, 8, 3))["b"] == (2, None, 3)
    with pytest.raises(ValueError, match="compatible"):
        KerasLayer(tmp_path / "model", output_key="a", output_shape=[7])(FLOATS)
    with pytest.raises(ValueError, match="one example's output"):
        KerasLayer(tmp_path / "model", output_shape="3")


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
def test_mixed_precision(toy, policy):
    dtype = policy.removeprefix("mixed_")
    layer = logits(toy, trainable=True, dtype=policy)
    # Float32 goes in as it is: only what comes out is cast.
    for pictures in (PICTURES, FLOATS):
        found = layer(pictures)
        expected = tf.cast(logits(toy)(pictures), dtype)
        assert keras.backend.standardize_dtype(found.dtype) == dtype
        assert np.array_equal(found, expected)
    found = np.asarray(layer(tf.cast(FLOATS, dtype)), np.float32)
    assert (
        helpers.relative_error(found, np.asarray(expected, np.float32)) < 0.01
    )
    assert {weight.dtype for weight in layer.trainable_weights} == {"float32"}
    inputs = images("float32")
    x = keras.layers.Rescaling(1.0, dtype=policy)(inputs)
    assert x.dtype == dtype
    x = layer(x)
    assert x.dtype == dtype
    x = keras.layers.Dense(4, dtype=policy)(x)
    outputs = keras.layers.Activation("linear", dtype="float32")(x)
    optimizer = keras.optimizers.SGD(0.1)
    if policy == "mixed_float16":
        optimizer = keras.optimizers.LossScaleOptimizer(optimizer)
    model = compiled(keras.Model(inputs, outputs), optimizer)
    before = arrays(layer.weights)
    model.fit(FLOATS, LABELS, verbose=0)
    assert all(changed(layer.weights, before))
    found = tf.cast(layer(FLOATS), "float32")
    assert np.all(np.isfinite(found))


def test_keras_file(toy, tmp_path):
    layer = logits(
        toy, arguments={"scale": 3.0}, trainable=True, dtype="mixed_bfloat16"
    )
    frozen = logits(toy, name="frozen")
    inputs = images()
    outputs = keras.layers.Dense(4)(layer(inputs) + frozen(inputs))
    model = compiled(keras.Model(inputs, outputs))
    model.fit(PICTURES, LABELS, verbose=0)
    model.save(tmp_path / "model.keras")
    copy = keras.saving.load_model(tmp_path / "model.keras", safe_mode=False)
    assert np.array_equal(copy(PICTURES), model(PICTURES))
    for name in (layer.name, "frozen"):
        config = model.get_layer(name).get_config()
        assert copy.get_layer(name).get_config() == config
    assert len(copy.trainable_weights) == len(model.trainable_weights) == 4
    assert not copy.get_layer("frozen").trainable
    copy.fit(PICTURES, LABELS, verbose=0)
    assert not np.array_equal(copy(PICTURES), model(PICTURES))
    model.save_weights(tmp_path / "model.weights.h5")
    copy.load_weights(tmp_path / "model.weights.h5")
    assert np.array_equal(copy(PICTURES), model(PICTURES))
    with pytest.raises(errors.BitTfError, match="safe_mode=False"):
        keras.saving.load_model(tmp_path / "model.keras")
    clone = keras.models.clone_model(model)
    clone.set_weights(model.get_weights())
    assert np.array_equal(clone(PICTURES), model(PICTURES))


LOAD = """
import sys
import numpy as np
import keras
from bit_tf.hub import KerasLayer
model = keras.saving.load_model(sys.argv[1], safe_mode=False)
np.save(sys.argv[2], model(np.load(sys.argv[3])))
"""


@pytest.mark.slow
def test_keras_file_in_a_fresh_process(toy, tmp_path):
    model = keras.Sequential([images(), logits(toy)])
    model.layers[0].set_weights([np.ones((3, 4)), np.ones(4), np.int32(5)])
    model.save(tmp_path / "model.keras")
    np.save(tmp_path / "x.npy", PICTURES)
    process = subprocess.run(
        [
            *(sys.executable, "-c", LOAD, str(tmp_path / "model.keras")),
            *(str(tmp_path / "y.npy"), str(tmp_path / "x.npy")),
        ],
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr[-3000:]
    assert np.array_equal(np.load(tmp_path / "y.npy"), model(PICTURES))


def test_weights_of_another_model(toy, tmp_path):
    layer = logits(toy)
    model = keras.Sequential([images(), layer])
    module = tf.Module()
    module.w = tf.Variable(tf.ones([3, 5]), name="w")
    module.extra = tf.Variable(tf.ones([2]), name="extra")
    module.variables_ = None
    spec = tf.TensorSpec([None, None, None, 3], tf.uint8)
    module.__call__ = tf.function(
        lambda x: tf.reduce_mean(tf.cast(x, tf.float32), [1, 2]) @ module.w,
        input_signature=[spec],
    )
    root = tf.train.Checkpoint(variables=[module.w, module.extra])
    root.__call__ = module.__call__
    tf.saved_model.save(root, str(tmp_path / "other"))
    other = keras.Sequential([images(), KerasLayer(tmp_path / "other")])
    other.save_weights(tmp_path / "other.weights.h5")
    before = arrays(layer.weights)
    with pytest.raises(ValueError) as caught:
        model.load_weights(tmp_path / "other.weights.h5")
    message = str(caught.value)
    for line in ("− w (3, 4)", "+ w (3, 5)", "− w_1 (4,)", "+ extra (2,)"):
        assert line in message
    assert not any(changed(layer.weights, before))


def test_a_loaded_object(loaded_toy, toy, tmp_path):
    layer = logits(loaded_toy, trainable=True)
    assert np.array_equal(layer(PICTURES), logits(toy)(PICTURES))
    assert layer.resolved_object is loaded_toy
    with pytest.raises(errors.BitTfError, match=r"KerasLayer\(handle\)"):
        layer.get_config()
    # Two layers of one object are one set of weights, trained once.
    means = KerasLayer(loaded_toy, output_key="means", trainable=True)
    inputs = images()
    outputs = layer(inputs) + keras.layers.Dense(4)(means(inputs))
    model = compiled(keras.Model(inputs, outputs), keras.optimizers.SGD(1.0))
    assert len(model.trainable_weights) == 4
    assert len(model.losses) == 2
    model.save_weights(tmp_path / "model.weights.h5")
    model.load_weights(tmp_path / "model.weights.h5")
    bias = loaded_toy.variables[1]
    before = np.array(bias)
    with tf.GradientTape() as tape:
        loss = model.compute_loss(PICTURES, LABELS, model(PICTURES))
    gradient = tape.gradient(loss, bias)
    model.train_on_batch(PICTURES, LABELS)
    assert np.allclose(bias, before - gradient, atol=1e-5)


def test_sub_objects(features_export):
    model = hub.load(features_export)
    layer = KerasLayer(model.endpoints, output_key="block1", trainable=True)
    expected = model.endpoints(PICTURES)["block1"]
    assert np.array_equal(layer(PICTURES), expected)
    assert layer(images()).shape == (None, None, None, 128)
    assert len(layer.trainable_weights) == len(model.trainable_variables)


def test_a_model_with_the_layer_is_exported(toy, tmp_path):
    layer = logits(toy, trainable=True)
    model = in_sequential(layer, keras.layers.Dense(2), "uint8")
    layer.trainable_weights[0].assign(np.ones((3, 4)))
    model.export(tmp_path / "exported", verbose=False)
    again = tf.saved_model.load(str(tmp_path / "exported"))
    assert np.array_equal(again.serve(PICTURES), model(PICTURES))


def test_texts(tmp_path):
    root = tf.train.Checkpoint()
    table = tf.Variable(tf.random.stateless_uniform([8, 5], [0, 1]))
    root.variables = root.trainable_variables = [table]

    @tf.function(input_signature=[tf.TensorSpec([None], tf.string)])
    def call(texts):
        return tf.gather(table, tf.strings.to_hash_bucket_fast(texts, 8))

    root.__call__ = call
    tf.saved_model.save(root, str(tmp_path / "model"))
    texts = np.array(["a", "bc", "def", "a"])
    for options in ({}, {"dtype": "string"}):
        layer = KerasLayer(tmp_path / "model", trainable=True, **options)
        assert layer.compute_output_shape((None,)) == (None, 5)
        assert not layer.supports_jit
        model = [layer, keras.layers.Dense(4)]
        if not options:
            model = [keras.Input((), dtype="string"), *model]
        model = compiled(keras.Sequential(model))
        found = model(tf.constant(texts))
        assert np.allclose(found[0], found[3])
        before = arrays(model.trainable_weights)
        model.fit(tf.constant(texts), LABELS, verbose=0)
        assert changed(model.trainable_weights, before)[0]


def test_models_that_are_not_reusable(tmp_path):
    inputs = keras.Input((4,))
    model = keras.Model(inputs, keras.layers.Dense(2)(inputs))
    model.export(tmp_path / "plain", verbose=False)
    for trainable in (False, True):
        with pytest.raises(errors.HandleError, match="'serving_default'"):
            KerasLayer(tmp_path / "plain", trainable)
    layer = KerasLayer(
        tmp_path / "plain", signature="serve", output_key="output_0"
    )
    values = np.ones((2, 4), np.float32)
    assert np.allclose(layer(values), model(values))
    with pytest.raises(errors.HandleError, match="cannot be trained"):
        KerasLayer(
            tmp_path / "plain", True, signature="serve", output_key="output_0"
        )

    module = tf.Module()
    module.weight = tf.Variable(tf.ones([3, 5]))
    spec = tf.TensorSpec([None, None, None, 3], tf.float32)
    module.__call__ = tf.function(
        lambda x: tf.reduce_mean(x, [1, 2]) @ module.weight,
        input_signature=[spec],
    )
    tf.saved_model.save(module, str(tmp_path / "bare"))
    assert np.allclose(
        KerasLayer(tmp_path / "bare")(FLOATS),
        FLOATS.mean((1, 2)).sum(1)[:, None],
        rtol=1e-5,
    )
    with pytest.raises(errors.HandleError, match="trainable_variables"):
        KerasLayer(tmp_path / "bare", True)
    with pytest.raises(errors.HandleError, match="signature='x'"):
        KerasLayer(lambda x: x, signature="x", output_key="y")


def test_errors(toy, tmp_path):
    with pytest.raises(errors.HandleError, match="no such path"):
        KerasLayer(tmp_path / "none")
    with pytest.raises(errors.HandleError, match="Received: 5"):
        KerasLayer(5)
    with pytest.raises(errors.HandleError, match="it is a layer"):
        KerasLayer(keras.layers.Dense(2))
    with pytest.raises(errors.UnknownNameError, match="'serving_default'"):
        KerasLayer(toy, signature="serving", output_key="logits")
    for options in ({}, {"output_key": "a", "signature_outputs_as_dict": True}):
        with pytest.raises(ValueError, match="not both"):
            KerasLayer(toy, signature="serving_default", **options)
    with pytest.raises(ValueError, match="no signature"):
        KerasLayer(toy, signature_outputs_as_dict=True)
    with pytest.raises(ValueError, match="passed by the layer"):
        KerasLayer(toy, arguments={"training": True})
    with pytest.raises(ValueError, match="dict of keyword arguments"):
        KerasLayer(toy, arguments=[1])
    layer = logits(toy, arguments={"scale": tf.constant(1.0)})
    with pytest.raises(errors.BitTfError, match="JSON"):
        layer.get_config()
    options = tf.saved_model.LoadOptions()
    assert logits(toy, load_options=options)(PICTURES).shape == (4, 4)
    with pytest.raises(ValueError, match="load_options"):
        KerasLayer(lambda x: x, load_options=options)

    class Strange:
        variables = (1,)
        regularization_losses = ()

        def __call__(self, inputs):
            return inputs

    with pytest.raises(errors.HandleError, match="of type int"):
        KerasLayer(Strange())
    Strange.variables, Strange.regularization_losses = (), (1.0,)
    with pytest.raises(errors.HandleError, match="without arguments"):
        KerasLayer(Strange())


def test_another_backend(toy, monkeypatch):
    monkeypatch.setattr(keras.backend, "backend", lambda: "jax")
    with pytest.raises(errors.BitTfError, match="KERAS_BACKEND=tensorflow"):
        KerasLayer(toy)


@pytest.mark.slow
def test_another_backend_in_a_fresh_process(toy):
    code = (
        "import sys\n"
        "from bit_tf import errors, keras_layer\n"
        "try:\n"
        "    keras_layer.KerasLayer(sys.argv[1])\n"
        "except errors.BitTfError as error:\n"
        "    assert 'KERAS_BACKEND=tensorflow' in str(error)\n"
        "    sys.exit(5)\n"
    )
    process = subprocess.run(
        [sys.executable, "-c", code, toy],
        capture_output=True,
        text=True,
        env={**os.environ, "KERAS_BACKEND": "jax"},
    )
    assert process.returncode == 5, process.stderr[-3000:]
