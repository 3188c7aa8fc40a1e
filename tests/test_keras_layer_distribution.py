"""Layers under tf.distribute, on two logical CPUs of a fresh process."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import toy_saved_model

pytestmark = pytest.mark.slow

SCRIPT = """
import json, sys
import keras
import numpy as np
import tensorflow as tf
from bit_tf import errors
from bit_tf.hub import KerasLayer

toy, folder = sys.argv[1:]
cpu, = tf.config.list_physical_devices("CPU")
two = [tf.config.LogicalDeviceConfiguration()] * 2
tf.config.set_logical_device_configuration(cpu, two)
strategy = tf.distribute.MirroredStrategy(["cpu:0", "cpu:1"])
rng = np.random.default_rng(0)
pictures = rng.random((8, 8, 8, 3), np.float32)
labels = np.arange(8) % 4
batches = tf.data.Dataset.from_tensor_slices((pictures, labels)).batch(8)
found = {}

def make(layer=None, trainable=True):
    layer = layer or KerasLayer(toy, trainable=trainable, output_key="logits")
    model = keras.Sequential([
        keras.Input((None, None, 3)), layer,
        keras.layers.Dense(4, kernel_initializer="identity")])
    model.compile(keras.optimizers.SGD(0.02, momentum=0.9),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    return model

def fit(model):
    runs = [model.fit(batches, verbose=0, shuffle=False) for _ in range(3)]
    return [run.history["loss"][0] for run in runs]

def values(model):
    return [np.array(v.numpy()).tolist() for v in model.weights]

def record(name, model, losses):
    found[name] = {"losses": losses, "weights": values(model)}

def penalties(layer):
    return [float(loss) for loss in layer.losses]

def step_by_hand(model):
    optimizer, weights = model.optimizer, model.trainable_variables
    optimizer.build(weights)

    def replica_step(x, y):
        with tf.GradientTape() as tape:
            each = keras.losses.sparse_categorical_crossentropy(
                y, model(x, training=True), from_logits=True)
            loss = tf.reduce_sum(each) / 8
            loss += tf.add_n(model.losses) / strategy.num_replicas_in_sync
        optimizer.apply(tape.gradient(loss, weights), weights)
        return loss

    @tf.function
    def step(x, y):
        each = strategy.run(replica_step, args=(x, y))
        return strategy.reduce("SUM", each, axis=None)

    return [float(step(x, y)) for _ in range(3)
        for x, y in strategy.experimental_distribute_dataset(batches)]

single = make()
found["before"] = values(single)
record("single", single, fit(single))
pattern = make(trainable="^w$")
record("pattern", pattern, fit(pattern))

with strategy.scope():
    mirrored = make()
    layer = mirrored.layers[0]
    assert layer.weights[0].value._distribute_strategy is strategy
    for weight, variable in zip(
            layer.weights, layer.resolved_object.variables, strict=True):
        assert weight.value is variable
        assert isinstance(variable, tf.distribute.DistributedValues)
    inside = layer(pictures)
    found["inside"] = penalties(layer)
found["outside"] = penalties(layer)
assert np.allclose(inside, layer(pictures), atol=1e-6)
layer.trainable = "^w$"
found["of the kernel"] = penalties(layer)
layer.trainable = "^w_1$"
found["of the bias"] = penalties(layer)
layer.trainable = ".*"
record("mirrored", mirrored, fit(mirrored))
expected = mirrored.predict(pictures, batch_size=4, verbose=0)
found["evaluated"] = mirrored.evaluate(batches, verbose=0)
for replica in range(2):
    copies = [strategy.experimental_local_results(w.value)[replica].numpy()
        for w in layer.weights]
    assert all(map(np.array_equal, copies, layer.get_weights()))

with strategy.scope():
    model = make(trainable="^w$")
record("mirrored pattern", model, fit(model))
with strategy.scope():
    model = make()
    losses = step_by_hand(model)
record("by hand", model, losses)

# Saved, and loaded with and without the strategy.
mirrored.save(folder + "/model.keras")
def load():
    return keras.saving.load_model(folder + "/model.keras", safe_mode=False)
copy = load()
assert np.allclose(copy(pictures), expected, atol=1e-5)
with strategy.scope():
    again = load()
assert np.allclose(again.predict(pictures, verbose=0), expected, atol=1e-5)
assert np.allclose(fit(again), fit(copy), atol=1e-5)
mirrored.export(folder + "/exported", verbose=False)
exported = tf.saved_model.load(folder + "/exported")
expected = mirrored.predict(pictures, verbose=0)
assert np.allclose(exported.serve(pictures), expected, atol=1e-5)

# Made outside.
outside = KerasLayer(toy, trainable=True, output_key="logits")
for other in (strategy, tf.distribute.OneDeviceStrategy("cpu:1")):
    with other.scope():
        try:
            make(outside)
        except errors.TrainingError as error:
            assert "with strategy.scope():" in str(error), error
            found["refused"] = found.get("refused", 0) + 1
outside.trainable = False
with strategy.scope():
    model = make(outside)
before = outside.get_weights()
losses = fit(model)
assert losses[2] < losses[0]
assert all(map(np.array_equal, before, outside.get_weights()))
with tf.distribute.OneDeviceStrategy("cpu:1").scope():
    model = make()
record("one device", model, fit(model))
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("distribution")
    toy_saved_model.save(folder / "toy")
    process = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(folder / "toy"), str(folder)],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3"},
    )
    assert process.returncode == 0, process.stderr[-5000:]
    return json.loads(process.stdout.splitlines()[-1])


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("mirrored", "single"),
        ("mirrored pattern", "pattern"),
        ("by hand", "single"),
        ("one device", "single"),
    ],
)
def test_steps_are_those_of_one_device(found, name, expected):
    run, other = found[name], found[expected]
    assert np.allclose(run["losses"], other["losses"], atol=1e-5)
    for one, two in zip(run["weights"], other["weights"], strict=True):
        assert np.allclose(one, two, atol=1e-5)
    frozen = 1 if expected == "pattern" else None
    for index, before in enumerate(found["before"]):
        same = np.array_equal(run["weights"][index], before)
        assert same == (index == frozen), index


def test_penalties_are_counted_once_and_by_variable(found):
    kernel, bias = (np.array(value) for value in found["before"][:2])
    expected = [np.sum(kernel**2), 2 * np.sum(bias**2)]
    assert np.allclose(found["inside"], expected)
    assert np.allclose(found["outside"], expected)
    assert np.allclose(found["of the kernel"], expected[:1])
    assert np.allclose(found["of the bias"], expected[1:])


def test_layers_of_another_scope_are_not_trained(found):
    assert found["refused"] == 2


def test_evaluation(found):
    assert found["evaluated"] < found["mirrored"]["losses"][-1]
