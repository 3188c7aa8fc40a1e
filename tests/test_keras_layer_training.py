"""Keras' own tools around a layer: checkpoints, accumulation, clones."""

import keras
import numpy as np
import pytest
import toy_saved_model

from bit_tf.hub import KerasLayer

RANDOM = np.random.default_rng(0)
PICTURES = RANDOM.random((8, 8, 8, 3), np.float32)
LABELS = np.arange(8) % 4
RATE = 0.02


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    path = tmp_path_factory.mktemp("toy") / "model"
    toy_saved_model.save(path)
    return str(path)


class Subclassed(keras.Model):
    def __init__(self, hub, head):
        super().__init__()
        self.hub, self.head = hub, head

    def call(self, inputs):
        return self.head(self.hub(inputs))


def in_sequential(hub, head):
    return keras.Sequential([keras.Input((None, None, 3)), hub, head])


def in_functional(hub, head):
    inputs = keras.Input((None, None, 3))
    return keras.Model(inputs, head(hub(inputs)))


def in_subclassed(hub, head):
    model = Subclassed(hub, head)
    model(PICTURES[:1])
    return model


KINDS = {
    "sequential": in_sequential,
    "functional": in_functional,
    "subclassed": in_subclassed,
}


def make(toy, kind="sequential", trainable="^w$", optimizer=None, **options):
    """A model whose values before training are always the same."""
    hub = KerasLayer(
        toy, trainable=trainable, output_key="logits", name="hub", **options
    )
    head = keras.layers.Dense(
        4,
        name="head",
        kernel_initializer=keras.initializers.RandomUniform(seed=1),
    )
    model = KINDS[kind](hub, head)
    model.compile(
        optimizer or keras.optimizers.SGD(RATE, momentum=0.9),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )
    model.optimizer.build(model.trainable_variables)
    return model


def fit(model, epochs=1, **options):
    options = {"batch_size": 4, "shuffle": False, "verbose": 0, **options}
    return model.fit(PICTURES, LABELS, epochs=epochs, **options).history["loss"]


def shift(model):
    """Gives every weight other values, sooner than training does."""
    model.set_weights([value + 1 for value in model.get_weights()])


def same(one, other):
    pairs = zip(one.weights, other.weights, strict=True)
    return all(np.array_equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("kind", KINDS)
def test_weights_files(toy, tmp_path, kind):
    model = make(toy, kind)
    shift(model)
    model.save_weights(tmp_path / "model.weights.h5")
    for trainable in ("^w$", True, False):
        copy = make(toy, kind, trainable)
        if trainable != "^w$":
            # The file has the optimizer's slots of what was trained.
            copy.optimizer = None
        assert not same(copy, model)
        copy.load_weights(tmp_path / "model.weights.h5")
        assert same(copy, model)
        assert np.array_equal(copy(PICTURES), model(PICTURES))


def test_model_checkpoints(toy, tmp_path):
    """Of whole models and of weights alone, each loaded and trained on."""
    model = make(toy)
    callbacks = [
        keras.callbacks.ModelCheckpoint(tmp_path / "{epoch}.keras"),
        keras.callbacks.ModelCheckpoint(
            tmp_path / "best.weights.h5",
            "loss",
            save_best_only=True,
            save_weights_only=True,
        ),
    ]
    losses = fit(model, epochs=3, callbacks=callbacks)
    assert losses[2] < losses[1] < losses[0]
    last = keras.saving.load_model(tmp_path / "3.keras", safe_mode=False)
    assert same(last, model)
    best = make(toy)
    best.load_weights(tmp_path / "best.weights.h5")
    assert same(best, model)
    first = keras.saving.load_model(tmp_path / "1.keras", safe_mode=False)
    assert np.allclose(fit(first, epochs=2), losses[1:], atol=1e-6)


class StopError(Exception):
    pass


def test_backup_and_restore(toy, tmp_path):
    """A run that dies goes on where it was, with its optimizer's state."""
    whole = make(toy)
    expected = fit(whole, epochs=4)

    class Die(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            if epoch == 2:
                raise StopError

    backup = keras.callbacks.BackupAndRestore(tmp_path / "backup")
    with pytest.raises(StopError):
        fit(make(toy), epochs=4, callbacks=[backup, Die()])
    model = make(toy)
    backup = keras.callbacks.BackupAndRestore(tmp_path / "backup")
    found = fit(model, epochs=4, callbacks=[backup])
    assert np.allclose(found, expected[2:], atol=1e-6)
    for one, other in zip(model.weights, whole.weights, strict=True):
        assert np.allclose(one, other, atol=1e-6)


@pytest.mark.parametrize("kind", ["sequential", "functional"])
def test_clones(toy, kind):
    """A clone has variables of its own, as they are in the SavedModel."""
    model = make(toy, kind)
    before = model(PICTURES)
    fresh = make(toy, kind)
    shift(model)
    clone = keras.models.clone_model(model)
    hub = clone.get_layer("hub")
    assert hub.resolved_object is not model.get_layer("hub").resolved_object
    assert hub.get_config() == model.get_layer("hub").get_config()
    assert len(clone.trainable_weights) == 3
    assert same(hub, fresh.get_layer("hub"))
    clone.get_layer("head").set_weights(fresh.get_layer("head").get_weights())
    assert np.array_equal(clone(PICTURES), before)
    clone.set_weights(model.get_weights())
    assert np.array_equal(clone(PICTURES), model(PICTURES))


def test_evaluate_and_predict(toy):
    model = make(toy)
    loss = model.evaluate(PICTURES, LABELS, batch_size=3, verbose=0)
    outputs = model.predict(PICTURES, batch_size=3, verbose=0)
    assert np.allclose(outputs, model(PICTURES), atol=1e-6)
    expected = float(model.loss(LABELS, outputs)) + sum(
        map(float, model.losses)
    )
    assert np.isclose(loss, expected, rtol=1e-5)


@pytest.mark.parametrize(
    "trainable", ["^w$", pytest.param(True, marks=pytest.mark.slow)]
)
def test_gradient_accumulation_is_one_big_batch(toy, trainable):
    big = make(toy, trainable=trainable)
    small = make(
        toy,
        trainable=trainable,
        optimizer=keras.optimizers.SGD(
            RATE, momentum=0.9, gradient_accumulation_steps=4
        ),
    )
    for _ in range(3):
        fit(big, batch_size=8)
        before = [np.array(weight) for weight in small.trainable_weights]
        for start in (0, 2, 4):
            part = slice(start, start + 2)
            small.train_on_batch(PICTURES[part], LABELS[part])
        for one, other in zip(small.trainable_weights, before, strict=True):
            assert np.array_equal(one, other)
        small.train_on_batch(PICTURES[6:], LABELS[6:])
        for one, other in zip(
            small.trainable_weights, big.trainable_weights, strict=True
        ):
            assert not np.array_equal(one, before)
            assert np.allclose(one, other, atol=1e-6)


@pytest.mark.parametrize(
    "policy",
    [
        pytest.param("mixed_bfloat16", marks=pytest.mark.slow),
        "mixed_float16",
    ],
)
def test_mixed_precision_of_a_whole_model(toy, policy):
    """Trained in half precision around the layer as in full, nearly."""
    exact = make(toy)
    losses = fit(exact, epochs=3)
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy(policy)
    try:
        model = make(toy)
        hub = model.get_layer("hub")
        assert hub.compute_dtype == policy.removeprefix("mixed_")
        assert isinstance(
            model.optimizer, keras.optimizers.LossScaleOptimizer
        ) == (policy == "mixed_float16")
        found = fit(model, epochs=3)
    finally:
        keras.config.set_dtype_policy(before)
    assert {weight.dtype for weight in model.trainable_weights} == {"float32"}
    assert np.allclose(found, losses, rtol=0.05)
    assert found[-1] < found[0]
    for one, other in zip(
        model.trainable_weights, exact.trainable_weights, strict=True
    ):
        assert np.allclose(one, other, atol=0.05)


def test_a_step_whose_gradients_overflow_changes_nothing(toy):
    """What loss scaling is for; the scale is halved."""
    optimizer = keras.optimizers.LossScaleOptimizer(
        keras.optimizers.SGD(0.1), initial_scale=2.0**126
    )
    model = make(toy, trainable=True, optimizer=optimizer)
    before = [np.array(weight) for weight in model.trainable_weights]
    model.train_on_batch(PICTURES * 1e4, LABELS)
    for weight, value in zip(model.trainable_weights, before, strict=True):
        assert np.array_equal(weight, value)
    assert float(optimizer.dynamic_scale) == 2.0**125
