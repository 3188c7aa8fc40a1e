"""Models around SavedModels become SavedModels of their own."""

import dataclasses
import json
import os
import pathlib
import shutil
import subprocess
import sys

import helpers
import keras
import numpy as np
import pytest
import tensorflow as tf

from bit_tf import (
    checkpoints,
    errors,
    handles,
    hub,
    labels,
    models,
    presets,
    transfer,
)
from bit_tf.keras_layer import KerasLayer
from hub_export import (
    card,
    contradictions,
    description,
    documentation,
    golden,
    publishing,
    saved_model,
    sources,
    verification,
)

PICTURES = helpers.random_images(2, 40, 33)
FLOATS = PICTURES.astype(np.float32) / np.float32(255)
NAMES = labels.check(["ant", "bee", "cat"], 3)
MOMENTUM = 0.5
# Of BiT's 50 layers, each fused in another way; other models differ less.
ROUNDING = 5e-6


def save_toy(folder, table=None):
    """Another publisher's SavedModel: 16 features, batch normalization."""
    rng = np.random.default_rng(0)
    kernel = tf.Variable(
        rng.normal(size=(3, 16)).astype(np.float32), name="toy/kernel"
    )
    scale = tf.Variable(tf.ones(16), name="toy/scale")
    moving = tf.Variable(tf.zeros(16), False, name="toy/moving_mean")

    @tf.function
    def call(images, training=False):
        x = tf.reduce_mean(images, [1, 2]) @ kernel
        mean = moving
        if training:
            mean = tf.reduce_mean(x, 0)
            moving.assign(MOMENTUM * moving + (1 - MOMENTUM) * mean)
        x = (x - mean) * scale
        if table is not None:
            x += tf.cast(table.lookup(tf.constant("second")), tf.float32)
        return x

    @tf.function(input_signature=[])
    def loss():
        return 0.01 * tf.reduce_sum(tf.square(kernel))

    spec = tf.TensorSpec([None, None, None, 3], tf.float32)
    for training in (False, True):
        call.get_concrete_function(spec, training=training)
    root = tf.train.Checkpoint()
    if table is not None:
        root.table = table
    root.__call__ = call
    root.variables = [kernel, scale, moving]
    root.trainable_variables = [kernel, scale]
    root.regularization_losses = [loss]
    tf.saved_model.save(root, str(folder / "toy"))
    return folder / "toy"


def table_of(names):
    """(a table that reads a file, the file)."""
    names.write_text("first\nsecond\n")
    reader = tf.lookup.TextFileInitializer(
        str(names),
        tf.string,
        tf.lookup.TextFileIndex.WHOLE_LINE,
        tf.int64,
        tf.lookup.TextFileIndex.LINE_NUMBER,
    )
    return tf.lookup.StaticHashTable(reader, -1), names


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    return save_toy(tmp_path_factory.mktemp("toy"))


def around(handle, head=True, seed=0, **options):
    """A classifier as transfer.classifier makes them, its head not zero."""
    layer = KerasLayer(
        handle, name="features", **{"trainable": True, **options}
    )
    layers = [keras.Input((None, None, 3)), layer]
    if head:
        layers.append(models.Head(3, name="head"))
    model = keras.Sequential(layers, name="classifier")
    if head:
        kernel = model.layers[-1].dense.kernel
        rng = np.random.default_rng(seed)
        kernel.assign(rng.normal(size=kernel.shape) * 0.1)
    return model


def export(model, path, **options):
    """Without the fresh process, which takes seconds."""
    saved_model.export(model, path, **{"verify": False, **options})
    return tf.saved_model.load(str(path))


def names_of(variables):
    return [variable.name.removesuffix(":0") for variable in variables]


def gradients(call, variables):
    weights = np.random.default_rng(1).normal(size=(2, 3))
    with tf.GradientTape() as tape:
        loss = tf.reduce_sum(call(tf.constant(FLOATS)) * weights)
    return tape.gradient(loss, list(variables))


@pytest.fixture(scope="module")
def bit(features_export, tmp_path_factory):
    """(model around BiT, directory of its export)."""
    folder = tmp_path_factory.mktemp("bit")
    parent = folder / "parent"
    shutil.copytree(features_export, parent)
    model = around(parent)
    model.layers[0].trainable = "block4"
    saved_model.export(
        model,
        folder / "out",
        class_labels=["ant", "bee", "cat"],
        preset=presets.PRESETS["big_transfer eval"],
        verify=False,
    )
    # What was exported needs no file of its parent.
    shutil.rmtree(parent)
    return model, folder / "out"


@pytest.fixture(scope="module")
def loaded(bit):
    return tf.saved_model.load(str(bit[1]))


def test_forward_equals_the_model(bit, loaded):
    expected = bit[0](FLOATS)
    for images in (tf.constant(PICTURES), tf.constant(FLOATS)):
        for training in (False, True):
            found = loaded(images, training=training)
            assert found.dtype == tf.float32
            assert helpers.relative_error(found, expected) <= ROUNDING
        assert helpers.relative_error(loaded(images), expected) <= ROUNDING
    for function in loaded.__call__.concrete_functions:
        assert function.structured_outputs.shape.as_list() == [None, 3]


def test_signatures_and_endpoints(bit, loaded, features_export):
    logits = bit[0](FLOATS)
    parent = tf.saved_model.load(str(features_export))
    endpoints = parent.endpoints(tf.constant(FLOATS))
    found = {
        name: signature(images=tf.constant(FLOATS))
        for name, signature in loaded.signatures.items()
    }
    expected = {
        "serving_default": {"output_1": logits},
        "image_feature_vector": {"features": endpoints["pre_logits"]},
        "image_classification": {
            "logits": logits,
            "probabilities": tf.nn.softmax(logits),
        },
    }
    assert found.keys() == expected.keys()
    for name, outputs in expected.items():
        assert found[name].keys() == outputs.keys()
        for output, value in outputs.items():
            assert (
                helpers.relative_error(found[name][output], value) <= ROUNDING
            )
    own = loaded.endpoints(tf.constant(PICTURES), training=True)
    assert own.keys() == endpoints.keys() | {"logits"}
    for name, value in {**endpoints, "logits": logits}.items():
        assert helpers.relative_error(own[name], value) <= ROUNDING, name


@pytest.mark.slow
def test_gradients_reach_every_variable(bit, loaded, small_arrays):
    assert sorted(names_of(loaded.variables)) == sorted(small_arrays)
    # All may be trained, also what was frozen in the model.
    assert names_of(loaded.trainable_variables) == names_of(loaded.variables)
    model = bit[0]
    values = [weight.value for weight in model.weights]
    for found, expected in zip(
        gradients(loaded, loaded.trainable_variables),
        gradients(lambda x: model(x, training=True), values),
        strict=True,
    ):
        assert helpers.relative_error(found, expected) <= 1e-5
        assert np.any(found)


def test_the_model_is_left_as_it_was(bit):
    model = bit[0]
    layer = model.layers[0]
    assert layer.trainable_pattern == "block4"
    assert len(layer.trainable_weights) == 10
    assert all("call" not in vars(each) for each in model._flatten_layers())
    assert model.layers[1].dense.kernel.value.name.startswith("classifier/head")


def test_what_lies_beside_the_graph(bit, features_export):
    _, directory = bit
    said = card.Card.from_dict(card.read(directory)[0])
    came = card.Provenance.from_dict(card.read(directory)[1])
    assert (said.architecture, said.feature_dim) == ("testing", 1024)
    assert (said.num_classes, said.labels) == (3, "custom")
    assert said.output == "logits float32 [n, 3]"
    assert said.preset["name"] == "big_transfer eval"
    parent = card.read(features_export)[0]
    assert said.params == parent["params"] + 3 * 1024 + 3
    assert said.numerics == parent["numerics"]
    assert said.output_stride == 32
    digest = hub.content_hash(features_export)
    assert came.parents == (card.Parent("parent", digest),)
    assert labels.read_saved_model(directory) == NAMES
    values = golden.read(directory)
    assert values.features.shape == (2, 1024)


def test_it_reads_as_a_checkpoint(bit):
    model, directory = bit
    found = checkpoints.read(directory)
    assert (found.num_classes, found.extra) == (3, ())
    assert found.facts.labels == NAMES
    again = models.from_checkpoint(found)
    assert helpers.relative_error(again(FLOATS), model(FLOATS)) <= 1e-5


def squared(layer):
    return [keras.layers.Lambda(lambda t: t**2), layer, models.Head(3)]


def normalized_features(layer):
    return [layer, keras.layers.UnitNormalization()]


@pytest.mark.parametrize("layers", [squared, normalized_features])
def test_what_computes_more_reads_as_no_checkpoint(
    features_export, tmp_path, layers
):
    model = keras.Sequential(
        [keras.Input((None, None, 3)), *layers(KerasLayer(features_export))]
    )
    before = [weight.value.name for weight in model.weights]
    found = export(model, tmp_path / "out")
    assert [weight.value.name for weight in model.weights] == before
    result = found(tf.constant(FLOATS))
    np.testing.assert_allclose(result, model(FLOATS), 1e-4, 1e-6)
    assert card.read(tmp_path / "out")[0]["architecture"] == "custom"
    with pytest.raises(errors.CheckpointError):
        checkpoints.read(tmp_path / "out")


def test_a_head_on_top_of_a_classifier(tmp_path, small_export):
    """Its features are those of the classifier, not its logits."""
    model = keras.Sequential(
        [
            keras.Input((None, None, 3)),
            KerasLayer(small_export),
            keras.layers.Dense(4),
        ]
    )
    found = export(model, tmp_path / "out")
    assert card.read(tmp_path / "out")[0]["feature_dim"] == 1024
    assert golden.check(tmp_path / "out")["relative_error"] < 1e-5
    endpoints = found.endpoints(tf.constant(FLOATS))
    assert endpoints["pre_logits"].shape == (2, 1024)
    np.testing.assert_allclose(endpoints["logits"], model(FLOATS), 1e-4, 1e-5)
    features = found.signatures["image_feature_vector"](tf.constant(FLOATS))
    np.testing.assert_allclose(
        features["features"], endpoints["pre_logits"], 1e-4, 1e-5
    )


@pytest.mark.parametrize(
    ("added", "head", "task"),
    [
        (keras.layers.BatchNormalization, None, "image-feature-vector"),
        (keras.layers.LayerNormalization, True, "image-classification"),
        (lambda: keras.layers.Dense(5), False, "image-feature-vector"),
    ],
    ids=["normalization", "named_head", "projection"],
)
def test_what_is_a_head(toy, tmp_path, added, head, task):
    model = keras.Sequential(
        [keras.Input((None, None, 3)), KerasLayer(toy), added()]
    )
    export(model, tmp_path / "out", head=head, class_labels=None)
    said, _ = card.read(tmp_path / "out")
    width = model.output_shape[-1]
    assert said["task"] == task
    assert said["num_classes"] == (width if head else 0)
    assert said["feature_dim"] == (16 if head else width)
    found = tf.saved_model.load(str(tmp_path / "out"))
    result = found(tf.constant(PICTURES))
    assert helpers.relative_error(result, model(FLOATS)) <= 1e-6


def test_head_and_labels_must_agree(toy, tmp_path):
    with pytest.raises(errors.ExportError, match="head=False"):
        export(
            around(toy), tmp_path / "out", head=False, probabilities="softmax"
        )
    network = models.create_model("testing", 3)
    with pytest.raises(errors.ExportError, match="3 classes"):
        export(network, tmp_path / "out", head=False)
    assert list(tmp_path.iterdir()) == []


def test_a_classifier_alone_stays_what_it_was(toy, tmp_path):
    preset = presets.PRESETS["big_transfer eval 128"]
    export(
        around(toy),
        tmp_path / "first",
        class_labels=NAMES,
        probabilities="sigmoid",
        preset=preset,
    )
    export(around(tmp_path / "first", head=False), tmp_path / "out")
    first, said = (card.read(tmp_path / name)[0] for name in ("first", "out"))
    for name in ("labels", "preset", "probabilities", "num_classes"):
        assert said[name] == first[name]
    assert said["probabilities"] == "sigmoid"
    assert labels.read_saved_model(tmp_path / "out") == NAMES


def test_batch_normalization_of_another_publisher(toy, tmp_path):
    model = around(toy)
    found = export(model, tmp_path / "out")
    assert sorted(names_of(found.variables)) == [
        "head/conv2d/bias",
        "head/conv2d/kernel",
        "toy/kernel",
        "toy/moving_mean",
        "toy/scale",
    ]
    assert "toy/moving_mean" not in names_of(found.trainable_variables)
    assert len(found.trainable_variables) == 4
    values = [variable.value for variable in model.trainable_variables]
    for gradient, expected in zip(
        gradients(found, found.trainable_variables),
        gradients(model, values),
        strict=True,
    ):
        assert helpers.relative_error(gradient, expected) <= 1e-6
    (loss,) = found.regularization_losses
    assert float(loss()) == pytest.approx(float(model.losses[0]))
    said, came = card.read(tmp_path / "out")
    assert said["architecture"] == "custom"
    assert (said["feature_dim"], said["num_classes"]) == (16, 3)
    assert (said["numerics"], said["output_stride"]) == ({}, None)
    assert said["citations"] == []
    assert [row["handle"] for row in came["parents"]] == ["toy"]
    assert not hasattr(found, "endpoints")
    mean = next(v for v in found.variables if "moving" in v.name)
    for training in (False, True):
        # The export has variables of its own, which begin alike.
        before = mean.numpy()
        expected = model(FLOATS, training=training)
        result = found(tf.constant(FLOATS), training=training)
        assert helpers.relative_error(result, expected) <= 1e-6
        assert np.array_equal(mean, before) != training
    assert np.array_equal(mean, model.layers[0].resolved_object.variables[2])
    again = export(model, tmp_path / "again")
    moved = next(v for v in again.variables if "moving" in v.name)
    assert np.array_equal(moved, mean)
    assert np.any(moved)


def test_what_was_frozen_may_be_trained_in_the_export(toy, tmp_path):
    model = around(toy, trainable=False)
    model.layers[1].trainable = False
    found = export(model, tmp_path / "out")
    assert len(found.trainable_variables) == 4
    mean = next(v for v in found.variables if "moving" in v.name)
    found(tf.constant(FLOATS), training=True)
    assert np.any(mean)
    assert [layer.trainable for layer in model.layers] == [False, False]
    assert model.trainable_variables == []


def test_a_grandchild_names_its_direct_parent(toy, tmp_path):
    export(around(toy, head=False), tmp_path / "child")
    model = around(tmp_path / "child")
    kernel = model.layers[0].trainable_weights[0]
    before = kernel.numpy()
    model.compile(keras.optimizers.SGD(0.1), "mse")
    model.fit(FLOATS, np.zeros((2, 3)), verbose=0)
    assert not np.array_equal(kernel, before)
    found = export(model, tmp_path / "grandchild")
    parents = card.read(tmp_path / "grandchild")[1]["parents"]
    digest = hub.content_hash(tmp_path / "child")
    assert parents == [{"handle": "child", "sha256": digest}]
    shutil.rmtree(tmp_path / "child")
    for training in (False, True):
        result = found(tf.constant(FLOATS), training=training)
        expected = model(FLOATS, training=training)
        assert helpers.relative_error(result, expected) <= 1e-6
    assert len(found.regularization_losses) == 1


def test_a_table_and_its_file_come_along(tmp_path):
    table, names = table_of(tmp_path / "names.txt")
    model = around(save_toy(tmp_path, table))
    found = export(model, tmp_path / "out")
    shutil.rmtree(tmp_path / "toy")
    names.unlink()
    assert (tmp_path / "out/assets/names.txt").is_file()
    assert golden.check(tmp_path / "out")["relative_error"] < 1e-6
    result = found(tf.constant(FLOATS))
    assert helpers.relative_error(result, model(FLOATS)) <= 1e-6


class Subclassed(keras.Model):
    def __init__(self, handle):
        super().__init__()
        self.inner = KerasLayer(handle)
        self.norm = keras.layers.BatchNormalization()
        self.dense = keras.layers.Dense(3, kernel_regularizer="l2")

    def call(self, images, training=None):
        return self.dense(self.norm(self.inner(images), training=training))


def functional(handle):
    images = keras.Input((None, None, 3))
    x = keras.layers.Rescaling(0.5)(images)
    x = KerasLayer(handle)(x)
    return keras.Model(images, keras.layers.Dense(3)(x))


def nested(handle):
    inner = keras.Sequential([keras.Input((None, None, 3)), KerasLayer(handle)])
    return keras.Sequential(
        [keras.Input((None, None, 3)), inner, keras.layers.Dense(3)]
    )


def twice(handle):
    images, layer = keras.Input((None, None, 3)), KerasLayer(handle)
    halved = keras.layers.Rescaling(0.5)(images)
    both = keras.layers.Concatenate()([layer(images), layer(halved)])
    return keras.Model(images, keras.layers.Dense(3)(both))


@pytest.mark.parametrize(
    ("make", "feature_dim"),
    [(functional, 16), (nested, 16), (Subclassed, 16), (twice, 0)],
    ids=["functional", "nested", "subclassed", "twice"],
)
def test_kinds_of_models(toy, tmp_path, make, feature_dim):
    model = make(toy)
    expected = model(FLOATS)
    found = export(model, tmp_path / "out")
    result = found(tf.constant(PICTURES))
    assert helpers.relative_error(result, expected) <= 1e-6
    assert card.read(tmp_path / "out")[0]["feature_dim"] == feature_dim
    assert ("image_feature_vector" in found.signatures) == bool(feature_dim)
    assert golden.check(tmp_path / "out")["relative_error"] < 1e-5
    trained = gradients(found, found.trainable_variables)
    assert all(gradient is not None for gradient in trained)


@pytest.mark.slow
def test_features_alone(features_export, small_export, tmp_path):
    """What a SavedModel returns by itself is what it says it returns."""
    for parent, head in ((features_export, 0), (small_export, 10)):
        model = around(parent, head=False)
        found = export(model, tmp_path / f"out{head}", class_labels=None)
        said, _ = card.read(tmp_path / f"out{head}")
        assert (said["num_classes"], said["feature_dim"]) == (head, 1024)
        assert said["architecture"] == "testing"
        assert golden.check(tmp_path / f"out{head}")["relative_error"] < 1e-5
        assert len(found.endpoints(tf.constant(FLOATS))) == 6 + bool(head)
    assert len(found.regularization_losses) == 18


def test_a_frozen_signature(toy, tmp_path):
    export(around(toy, head=False), tmp_path / "child")
    layer = KerasLayer(
        tmp_path / "child",
        signature="image_feature_vector",
        output_key="features",
    )
    model = keras.Sequential(
        [keras.Input((None, None, 3)), layer, keras.layers.Dense(3)]
    )
    found = export(model, tmp_path / "out")
    assert len(found.trainable_variables) == 2
    assert len(found.variables) == 5
    result = found(tf.constant(FLOATS))
    assert helpers.relative_error(result, model(FLOATS)) <= 1e-6


def test_a_loaded_object_is_a_parent_without_a_handle(toy, tmp_path):
    export(around(hub.load(toy)), tmp_path / "out")
    came = card.read(tmp_path / "out")[1]
    assert came["parents"] == []
    assert "whose handle is not known" in came["notes"][0]


def test_other_precision_and_fixed_size(toy, tmp_path):
    model = keras.Sequential(
        [
            keras.Input((32, 48, 3)),
            KerasLayer(toy, dtype="mixed_bfloat16"),
            models.Head(3, dtype="mixed_bfloat16"),
        ]
    )
    model.layers[-1].dense.bias.assign([1.0, 2.0, 3.0])
    found = export(model, tmp_path / "out")
    pictures = helpers.random_images(2, 32, 48)
    result = found(tf.constant(pictures))
    assert result.dtype == tf.float32
    expected = tf.cast(model(pictures / np.float32(255)), tf.float32)
    assert helpers.relative_error(result, expected) <= 1e-2
    said, _ = card.read(tmp_path / "out")
    assert said["input"].startswith("RGB pictures [n, 32, 48, 3], float32")
    assert said["output"] == "logits float32 [n, 3], computed in bfloat16"
    assert golden.read(tmp_path / "out").images.shape == (2, 32, 48, 3)
    assert {v.dtype for v in found.variables} == {tf.float32}


def test_penalty(toy, tmp_path):
    with pytest.raises(errors.ExportError, match="1 of them"):
        export(around(toy), tmp_path / "out", l2=0.1)
    loaded = tf.saved_model.load(str(toy))
    loaded.regularization_losses = []
    model = around(loaded)
    found = export(model, tmp_path / "out", l2=0.5)
    kernels = [loaded.variables[0], model.layers[-1].dense.kernel]
    assert [float(loss()) for loss in found.regularization_losses] == (
        pytest.approx([0.5 * np.sum(np.square(k)) for k in kernels], rel=1e-5)
    )


def no_layer(toy):
    return keras.Sequential([keras.Input((8, 8, 3)), keras.layers.Flatten()])


def two_inputs(toy):
    both = [keras.Input((None, None, 3)) for _ in range(2)]
    layer = KerasLayer(toy)
    return keras.Model(both, layer(both[0]) + layer(both[1]))


def text(toy):
    words = keras.Input((), dtype="string")
    images = keras.layers.Lambda(
        lambda x: tf.zeros([tf.size(x), 8, 8, 3]), output_shape=(8, 8, 3)
    )(words)
    return keras.Model(words, KerasLayer(toy)(images))


def integers(toy):
    images = keras.Input((None, None, 3), dtype="uint8")
    return keras.Model(
        images, KerasLayer(toy)(keras.ops.cast(images, "float32"))
    )


def maps(toy):
    images = keras.Input((None, None, 3))
    vector = KerasLayer(toy)(images)
    return keras.Model(images, keras.ops.reshape(vector, (-1, 4, 4)))


def several(toy):
    images = keras.Input((None, None, 3))
    vector = KerasLayer(toy)(images)
    return keras.Model(images, {"a": vector, "b": vector})


def squashed(toy):
    return keras.Sequential(
        [
            keras.Input((None, None, 3)),
            KerasLayer(toy),
            keras.layers.Dense(3, activation="softmax"),
        ]
    )


def unbuilt(toy):
    return keras.Sequential([KerasLayer(toy), models.Head(3)])


def failing(toy):
    class Failing(keras.Model):
        def __init__(self):
            super().__init__()
            self.inner = KerasLayer(toy)

        def call(self, images):
            raise ValueError("on purpose")

    return Failing()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (no_layer, r"contains a bit_tf.hub.KerasLayer.*Received: Sequential"),
        (two_inputs, "one input of floats.*Export a model of one"),
        (text, "one input of floats.*string"),
        (integers, r"uint8 \[None.*keras.Sequential\("),
        (maps, r"one tensor of floats \[n, d\].*\[2, 4, 4\]"),
        (several, "one tensor of floats.*dict"),
        (squashed, "returns logits.*linear"),
        (unbuilt, r"keras.Input\(\(None, None, 3\)\)"),
        (failing, "on purpose"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_refused(toy, tmp_path, make, message):
    with pytest.raises(errors.ExportError, match=f"(?s){message}"):
        saved_model.export(make(toy), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_parent_is_not_written_over(toy, tmp_path):
    shutil.copytree(toy, tmp_path / "toy")
    model = around(tmp_path / "toy")
    with pytest.raises(errors.ExportError, match="what is read"):
        saved_model.export(model, tmp_path / "toy", overwrite=True)
    assert (tmp_path / "toy" / "saved_model.pb").is_file()


def test_a_parent_is_where_it_was_when_it_was_loaded(
    toy, tmp_path, monkeypatch
):
    shutil.copytree(toy, tmp_path / "gone")
    monkeypatch.chdir(tmp_path)
    model = around("gone")
    monkeypatch.chdir("/")
    saved_model.export(model, tmp_path / "out", verify=False)
    shutil.rmtree(tmp_path / "gone")
    with pytest.raises(errors.ExportError, match=r"'features'.*Put it back"):
        saved_model.export(model, tmp_path / "other", verify=False)
    assert not (tmp_path / "other").exists()


def test_labels_that_a_saved_model_reads_itself(tmp_path):
    table, _ = table_of(tmp_path / "labels.txt")
    model = around(save_toy(tmp_path, table))
    with pytest.raises(errors.ExportError, match="name of their own"):
        export(model, tmp_path / "out", class_labels=["a", "b", "c"])
    assert not (tmp_path / "out").exists()


def test_nothing_appears_before_it_was_verified(toy, tmp_path, monkeypatch):
    def check(directory):
        assert os.path.isfile(os.path.join(directory, "saved_model.pb"))
        assert not (tmp_path / "out").exists()
        raise errors.VerificationError("on purpose")

    monkeypatch.setattr(golden, "check_in_fresh_process", check)
    with pytest.raises(errors.VerificationError, match="on purpose"):
        saved_model.export(around(toy), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def fine_tuned(toy, tmp_path_factory):
    """A file of transfer.save around the toy."""
    path = tmp_path_factory.mktemp("fine_tuned") / "model.keras"
    facts = checkpoints.Facts(
        labels=NAMES, preset=presets.PRESETS["big_transfer eval 128"]
    )
    transfer.save(around(toy), path, facts)
    return path


def test_a_fine_tuned_file_converts(fine_tuned, toy, tmp_path, call):
    code, out, err = call("hub-export", "convert", fine_tuned, tmp_path / "out")
    assert code == 0, err
    assert f"is around {toy}, which is fetched and run" in err
    assert "signatures image_classification" in out
    said, came = card.read(tmp_path / "out")
    assert said["labels"] == "custom"
    assert said["preset"]["name"] == "big_transfer eval 128"
    assert labels.read_saved_model(tmp_path / "out") == NAMES
    assert came["source"] == "model.keras"
    assert len(came["sha256"]) == 64
    assert came["parents"][0]["sha256"] == hub.content_hash(toy)
    model, _ = transfer.load(fine_tuned)
    found = tf.saved_model.load(str(tmp_path / "out"))
    result = found(tf.constant(FLOATS))
    assert helpers.relative_error(result, model(FLOATS)) <= 1e-6


def test_its_head_may_be_dropped(fine_tuned, tmp_path):
    report = saved_model.convert(
        fine_tuned, tmp_path / "out", head=False, verify=False
    )
    assert (report["format"], report["arrays"]) == ("keras", 3)
    said, _ = card.read(tmp_path / "out")
    assert said["task"] == "image-feature-vector"
    assert said["labels"] is None
    assert said["preset"]["name"] == "big_transfer eval 128"
    model, _ = transfer.load(fine_tuned)
    found = tf.saved_model.load(str(tmp_path / "out"))(tf.constant(FLOATS))
    assert helpers.relative_error(found, model.layers[0](FLOATS)) <= 1e-6


def test_features_of_mixed_precision_are_not_rounded(toy, tmp_path):
    model = keras.Sequential(
        [
            keras.Input((None, None, 3)),
            KerasLayer(toy, dtype="mixed_bfloat16"),
            models.Head(3, name="head", dtype="mixed_bfloat16"),
        ]
    )
    transfer.save(model, tmp_path / "model.keras", checkpoints.Facts())
    saved_model.convert(
        tmp_path / "model.keras", tmp_path / "out", head=False, verify=False
    )
    found = tf.saved_model.load(str(tmp_path / "out"))(tf.constant(FLOATS))
    exact = KerasLayer(toy)(FLOATS)
    assert helpers.relative_error(found, exact) <= 1e-6
    assert golden.read(tmp_path / "out").tolerance < 1e-3


@pytest.mark.parametrize("to", ["npz", "timm", "keras", "keras-folded"])
def test_no_other_format_holds_it(fine_tuned, tmp_path, call, to):
    code, _, err = call(
        *("hub-export", "convert", fine_tuned, tmp_path / "out", "--to", to)
    )
    assert code == 1
    assert "computes as a program" in err
    assert "--to savedmodel" in err
    assert list(tmp_path.iterdir()) == []


def test_its_constants_are_its_own(fine_tuned, tmp_path):
    with pytest.raises(errors.ExportError, match="part of its functions"):
        saved_model.convert(fine_tuned, tmp_path / "out", numerics="timm")


def test_what_is_around_a_saved_model(fine_tuned, small_npz, toy, tmp_path):
    found = sources.around_saved_model(fine_tuned)
    assert found == (fine_tuned, (str(toy),))
    assert sources.around_saved_model(str(fine_tuned)) == found
    for other in (small_npz, toy, "BiT-M-R50x1", "google/bit/m-r50x1/1"):
        assert sources.around_saved_model(other) is None
    content = fine_tuned.read_bytes()
    (tmp_path / "cut.keras").write_bytes(content[: len(content) // 2])
    with pytest.raises(errors.CheckpointFormatError):
        saved_model.convert(tmp_path / "cut.keras", tmp_path / "out")
    plain = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2)])
    plain.save(tmp_path / "plain.keras")
    assert sources.around_saved_model(tmp_path / "plain.keras") is None
    with pytest.raises(errors.CheckpointFormatError, match="ResNetV2"):
        saved_model.convert(tmp_path / "plain.keras", tmp_path / "out")


def test_a_fine_tuned_network_of_this_package(tmp_path):
    """Labels, preset, frozen layers and mixed precision, through a file."""
    model = models.create_model("testing", 3, dtype="mixed_bfloat16")
    model.get_layer("block1").trainable = False
    model.get_layer("head").dense.bias.assign([1.0, 2.0, 3.0])
    facts = checkpoints.Facts(
        labels=NAMES, preset=presets.PRESETS["big_transfer eval 128"]
    )
    transfer.save(model, tmp_path / "model.keras", facts)
    saved_model.convert(
        tmp_path / "model.keras", tmp_path / "out", verify=False
    )
    said, came = card.read(tmp_path / "out")
    assert said["preset"]["name"] == "big_transfer eval 128"
    assert said["labels"] == "custom"
    assert said["output"] == "logits float32 [n, 3]"
    assert came["parents"] == []
    assert labels.read_saved_model(tmp_path / "out") == NAMES
    found = tf.saved_model.load(str(tmp_path / "out"))
    assert {v.dtype for v in found.variables} == {tf.float32}
    assert len(found.trainable_variables) == len(found.variables) == 45
    with_float32 = models.load_model(tmp_path / "model.keras", dtype="float32")
    result = found(tf.constant(FLOATS))
    assert helpers.relative_error(result, with_float32(FLOATS)) <= 1e-5


def test_the_parent_is_told():
    parents = (
        card.Parent("https://tfhub.dev/google/bit/m-r50x1/1", "a" * 64),
        card.Parent("other"),
    )
    entry = helpers.make_entry("me/bit/flowers/1")
    entry = dataclasses.replace(
        entry, provenance=dataclasses.replace(entry.provenance, parents=parents)
    )
    facts = dict(description.provenance_facts(entry))
    assert facts["Made around"] == (
        "https://tfhub.dev/google/bit/m-r50x1/1 (SHA-256 of its content "
        f"{'a' * 64}); other"
    )
    assert "a" * 64 in documentation.model_page(entry)
    assert not contradictions.mistyped(entry)
    assert type(entry).parse(entry.to_json()) == entry
    wrong = dataclasses.replace(
        entry,
        provenance=dataclasses.replace(
            entry.provenance, parents=(card.Parent(5, None),)
        ),
    )
    assert contradictions.mistyped(wrong) == [
        "provenance.parents.handle must be str. Received: 5."
    ]
    before = json.loads(json.dumps(dataclasses.asdict(entry.provenance)))
    del before["parents"]
    assert card.Provenance.from_dict(before).parents == ()


def test_what_is_not_known_is_not_told():
    entry = helpers.make_entry("me/net/1", 3, labels=None)
    unknown = dataclasses.replace(
        entry.card, feature_dim=0, output_stride=None, numerics={}
    )
    facts = dict(
        description.model_facts(dataclasses.replace(entry, card=unknown))
    )
    assert facts["Feature vector"] == "none"
    assert not {"Output stride", "Numerics"} & facts.keys()


CONVERT = """
import sys
from hub_export import saved_model
saved_model.convert(sys.argv[1], sys.argv[2], verify=False)
"""


@pytest.mark.slow
def test_two_processes_write_the_same_bytes(fine_tuned, tmp_path):
    found = []
    for seed in ("1", "2"):
        path = tmp_path / seed
        subprocess.run(
            [sys.executable, "-c", CONVERT, str(fine_tuned), str(path)],
            check=True,
            env={
                **os.environ,
                "PYTHONHASHSEED": seed,
                "TF_NUM_INTRAOP_THREADS": "1",
            },
            capture_output=True,
        )
        found.append(publishing._files(path))
    assert found[0] == found[1]


CONSUMER = """
import sys, warnings
warnings.simplefilter("ignore")
import numpy as np, tensorflow_hub as hub, tf_keras
path, data = sys.argv[1:]
pictures = np.load(data)
layer = hub.KerasLayer(path, trainable=True)
first = tf_keras.layers.InputLayer((None, None, 3))
model = tf_keras.Sequential([first, layer])
np.save(data + ".out.npy", model.predict(pictures, verbose=0))
model.compile(tf_keras.optimizers.SGD(0.1), "mse")
weights = layer.trainable_weights
before = [v.numpy() for v in weights]
model.fit(pictures, np.ones((2, 3)), verbose=0)
assert all((a != v.numpy()).any() for a, v in zip(before, weights))
"""


@pytest.mark.slow
def test_tensorflow_hub_loads_and_trains_it(bit, tmp_path):
    model, directory = bit
    np.save(tmp_path / "x.npy", FLOATS)
    process = subprocess.run(
        [
            *(sys.executable, "-c", CONSUMER),
            *(str(directory), str(tmp_path / "x.npy")),
        ],
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr[-2000:]
    found = np.load(tmp_path / "x.npy.out.npy")
    assert helpers.relative_error(found, model(FLOATS)) <= 1e-5


@pytest.mark.slow
def test_published_and_used_again(fine_tuned, toy, tmp_path):
    root = tmp_path / "root"
    said = []
    made = publishing.publish(
        fine_tuned, root, "me/net/toy_classification", say=said.append
    )
    assert f"Note: model.keras is around {toy}, which is fetched and run." in (
        said
    )
    assert made.publication.description == (
        "Scores of 3 classes for images, from a network, converted from "
        "model.keras, made around toy."
    )
    assert made.card.architecture == "custom"
    assert made.provenance.parents[0].sha256 == hub.content_hash(toy)
    for report in verification.verify(root):
        assert report.ok, report.table()
    folder = root / "me/net/toy_classification/1"
    assert "Made around" in (folder / "index.html").read_text("utf-8")
    directory = pathlib.Path(hub.resolve(folder))
    model, _ = transfer.load(fine_tuned)
    again = keras.Sequential(
        [keras.Input((None, None, 3)), KerasLayer(folder, trainable=True)]
    )
    assert helpers.relative_error(again(FLOATS), model(FLOATS)) <= 1e-6
    # What was published is told by its handle, not by where it lies.
    saved_model.export(again, tmp_path / "next", verify=False)
    came = card.read(tmp_path / "next")[1]
    assert came["parents"] == [
        {
            "handle": "me/net/toy_classification/1",
            "sha256": hub.content_hash(directory),
        }
    ]
    assert handles.Handle.parse(came["parents"][0]["handle"]).version == 1
