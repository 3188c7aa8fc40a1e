import helpers
import keras
import numpy as np
import pytest
import reference
import tensorflow as tf

import bit_tf
from bit_tf import checkpoints, errors, models
from bit_tf.checkpoints import layout


def build(arrays, blocks, stem_width, num_classes=0, **options):
    """A model with these weights."""
    model = models.ResNetV2(blocks, stem_width, num_classes, **options)
    for name, variable in models.canonical_variables(model).items():
        variable.assign(arrays[name])
    return model


@pytest.fixture(scope="module")
def small(small_npz):
    return bit_tf.load_model(small_npz)


@pytest.mark.parametrize("size", [(64, 64), (65, 97), (33, 20), (20, 9)])
def test_every_endpoint_against_the_oracle(small, small_arrays, size):
    pictures = helpers.random_images(2, *size)
    expected = reference.forward(small_arrays, pictures / 255)
    found = bit_tf.endpoints(small, models.ENDPOINTS)(pictures)
    assert list(found) == list(expected) == list(models.ENDPOINTS)
    for name, value in expected.items():
        assert helpers.relative_error(found[name], value) <= 1e-5, name


@pytest.fixture(scope="module")
def r50x1():
    arrays = helpers.random_arrays((3, 4, 6, 3), 64, 1000)
    return arrays, build(arrays, (3, 4, 6, 3), 64, 1000)


@pytest.mark.parametrize("size", [(224, 224), (225, 225), (97, 131)])
def test_r50x1_against_the_oracle(r50x1, size):
    arrays, model = r50x1
    pictures = helpers.random_images(1, *size)
    expected = reference.forward(arrays, pictures / 255)
    features = bit_tf.endpoints(model, ["pre_logits"])(pictures)["pre_logits"]
    assert helpers.relative_error(features, expected["pre_logits"]) <= 1e-5
    assert helpers.relative_error(model(pictures), expected["logits"]) <= 1e-5


@pytest.mark.parametrize("output_stride", [32, 16, 8])
def test_output_stride(output_stride):
    # Two units a block, since the first and the later ones dilate otherwise.
    arrays = helpers.random_arrays((2, 2, 2, 2), 32)
    model = build(arrays, (2, 2, 2, 2), 32, output_stride=output_stride)
    pictures = helpers.random_images(1, 128, 160)
    expected = reference.forward(arrays, pictures / 255, output_stride)
    found = bit_tf.endpoints(model, ["block4"])(pictures)["block4"]
    assert found.shape[1:3] == (128 // output_stride, 160 // output_stride)
    assert helpers.relative_error(found, expected["block4"]) <= 1e-5
    assert (
        helpers.relative_error(model(pictures), expected["pre_logits"]) < 1e-5
    )


@pytest.mark.parametrize("numerics", ["google", "big_vision", "timm"])
def test_constants_come_with_the_source(small_npz, small_arrays, numerics):
    # A small spread makes the epsilons visible.
    constants = bit_tf.variants.NUMERICS[numerics]
    arrays = {
        name: array * (1e-3 if name.endswith("kernel") else 1)
        for name, array in small_arrays.items()
    }
    model = build(arrays, *helpers.TESTING, 10, numerics=numerics)
    pictures = helpers.random_images(1, 40, 40)
    expected = reference.forward(
        arrays,
        pictures / 255,
        ws_epsilon=constants.ws_epsilon,
        gn_epsilon=constants.gn_epsilon,
        border=constants.pool_border,
    )
    stem = bit_tf.endpoints(model, ["stem"])(pictures)["stem"]
    assert helpers.relative_error(stem, expected["stem"]) <= 1e-5
    assert helpers.relative_error(model(pictures), expected["logits"]) <= 1e-4
    google = build(arrays, *helpers.TESTING, 10)
    differs = helpers.relative_error(google(pictures), expected["logits"])
    assert (differs > 1e-4) == (numerics != "google")
    loaded = bit_tf.load_model(small_npz, numerics=numerics)
    assert loaded.numerics == numerics


def test_integers_are_scaled_however_the_model_is_called(small):
    pictures = helpers.random_images(2, 40, 40)
    floats = pictures.astype(np.float32) / np.float32(255)
    expected = np.asarray(small(floats))
    inside = keras.Input((None, None, 3), dtype="uint8")
    outer = keras.Model(inside, small(inside))
    for found in (
        small(pictures),
        small(keras.ops.convert_to_tensor(pictures)),
        small.predict(pictures, verbose=0),
        small.predict_on_batch(pictures),
        keras.Sequential([inside, small])(pictures),
        outer(pictures),
        bit_tf.endpoints(small, "logits")(pictures)["logits"],
    ):
        assert helpers.relative_error(found, expected) <= 1e-5
    assert helpers.relative_error(small(floats * 255), expected) > 0.1
    with pytest.raises(errors.ImageRangeError, match="uint8"):
        small(pictures.astype(np.int32))


def test_a_new_head_is_zero_and_features_have_none():
    model = bit_tf.create_model("testing", num_classes=3)
    pictures = helpers.random_images(2, 32, 32)
    assert np.all(np.asarray(model(pictures)) == 0)
    model = bit_tf.create_model("testing")
    assert model(pictures).shape == (2, 1024) == (2, model.feature_dim)


def test_shapes_of_any_size():
    model = bit_tf.create_model("testing")
    for height, width in [(1, 1), (2, 3), (31, 64)]:
        assert model(np.zeros((1, height, width, 3), np.float32)).shape == (
            1,
            1024,
        )
    assert model.output_shape == (None, 1024)


def test_freezing_by_name(small_npz):
    model = bit_tf.load_model(small_npz)
    pictures = helpers.random_images(4, 32, 32)
    model.get_layer("root_block").trainable = False
    model.get_layer("block1").trainable = False
    before = {**model_arrays(model)}
    model.compile(
        keras.optimizers.SGD(0.1),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        jit_compile=False,
    )
    model.fit(pictures, np.arange(4), verbose=0)
    for name, value in model_arrays(model).items():
        frozen = name.startswith(("root_block/", "block1/"))
        assert np.array_equal(before[name], value) == frozen, name


def model_arrays(model):
    return dict(models.canonical_arrays(model))


def test_keras_file_round_trip(small_npz, tmp_path):
    model = bit_tf.load_model(small_npz, output_stride=16, numerics="timm")
    model.get_layer("block2").trainable = False
    model.get_layer("block3").units[0].trainable = False
    model.save(tmp_path / "model.keras")
    copy = keras.saving.load_model(tmp_path / "model.keras")
    assert isinstance(copy, models.ResNetV2)
    assert not copy.get_layer("block3").units[0].trainable
    assert len(copy.trainable_weights) == len(model.trainable_weights)
    assert copy.get_config() == model.get_config()
    assert not copy.get_layer("block2").trainable
    assert copy.get_layer("block1").trainable
    pictures = helpers.random_images(1, 50, 64)
    assert np.array_equal(copy(pictures), model(pictures))
    part = bit_tf.endpoints(model, ["block3", "logits"])
    part.save(tmp_path / "part.keras")
    copy = keras.saving.load_model(tmp_path / "part.keras")
    assert np.array_equal(copy(pictures)["block3"], part(pictures)["block3"])


def test_mixed_bfloat16_is_near(small_npz, small):
    model = bit_tf.load_model(small_npz, dtype="mixed_bfloat16")
    pictures = helpers.random_images(2, 64, 64)
    found = model(pictures)
    assert keras.backend.standardize_dtype(found.dtype) == "bfloat16"
    found = keras.ops.cast(found, "float32")
    assert helpers.relative_error(found, small(pictures)) < 0.05
    for layer in model._flatten_layers():
        for weight in layer.weights:
            assert weight.dtype == "float32"


def test_names_do_not_depend_on_where_a_model_is_built():
    with keras.name_scope("elsewhere"):
        model = bit_tf.create_model("testing", 2)
    assert sorted(models.canonical_variables(model)) == sorted(
        layout.expected_shapes(*helpers.TESTING, 2)
    )


def test_model_writes_what_it_read(small, small_arrays, tmp_path):
    checkpoints.write(small, tmp_path / "again.npz")
    again = checkpoints.read(tmp_path / "again.npz")
    assert set(again) == set(small_arrays)
    for name, array in small_arrays.items():
        assert np.array_equal(again[name], array), name


def test_head_can_be_dropped(small_npz, small):
    model = bit_tf.load_model(small_npz, head=False)
    pictures = helpers.random_images(1, 40, 40)
    expected = bit_tf.endpoints(small, ["pre_logits"])(pictures)["pre_logits"]
    assert np.array_equal(model(pictures), expected)


def test_assignment_is_all_or_nothing(small_npz):
    model = bit_tf.create_model("testing", 7)
    before = model_arrays(model)
    with pytest.raises(errors.CheckpointMismatchError) as caught:
        models.assign(model, checkpoints.read(small_npz))
    assert "head/conv2d/kernel" in str(caught.value)
    assert "head/conv2d/bias" in str(caught.value)
    for name, value in model_arrays(model).items():
        assert np.array_equal(before[name], value)


def test_unused_arrays_are_reported(small_npz, tmp_path, monkeypatch):
    with np.load(small_npz) as file:
        arrays = dict(file)
    np.savez(tmp_path / "more.npz", **arrays, global_step=np.zeros(3))
    told = []
    monkeypatch.setattr(
        models.logging, "warning", lambda text, *values: told.append(values)
    )
    bit_tf.load_model(tmp_path / "more.npz")
    assert told == [(str(tmp_path / "more.npz"), "global_step")]


@pytest.mark.parametrize("dtype", ["float64", "bfloat16", "float16"])
def test_weights_are_float32(dtype):
    with pytest.raises(ValueError, match="Weights are float32"):
        bit_tf.create_model("testing", dtype=dtype)


def test_a_file_may_have_a_published_name(small_npz, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "BiT-M-R50x1").write_bytes(small_npz.read_bytes())
    assert bit_tf.load_model("BiT-M-R50x1").num_classes == 10


def test_errors(small, small_npz):
    for name in (None, 5, ["R50x1"]):
        with pytest.raises(errors.UnknownNameError, match="R50x1"):
            bit_tf.create_model(name)
    with pytest.raises(ValueError, match="num_classes"):
        bit_tf.create_model("testing", "10")
    with pytest.raises(ValueError, match="four blocks"):
        models.ResNetV2((1, 1, 1), 32)
    with pytest.raises(errors.UnknownNameError, match="R50x1"):
        bit_tf.create_model("R50")
    with pytest.raises(ValueError, match="num_classes"):
        bit_tf.create_model("testing", -1)
    with pytest.raises(ValueError, match="output_stride must be 32, 16 or 8"):
        bit_tf.create_model("testing", output_stride=4)
    with pytest.raises(errors.UnknownNameError, match=r"block1.*'block5'"):
        bit_tf.endpoints(small, ["block5"])
    with pytest.raises(errors.UnknownNameError, match="logits"):
        bit_tf.endpoints(bit_tf.create_model("testing"), ["logits"])
    with pytest.raises(FileNotFoundError):
        bit_tf.load_model("no such file.npz")
    with pytest.raises(errors.UnknownNameError, match="google"):
        bit_tf.create_model("testing", numerics="gogle")
    for options in ({"output_stride": 0}, {"head": "none"}, {"numerics": ""}):
        with pytest.raises(ValueError, match="Received"):
            bit_tf.load_model(small_npz, **options)
    with pytest.raises(errors.UnknownNameError, match="mean 'BiT-M-R50x1'"):
        bit_tf.load_model("BiT-M-R50-x1")


def test_a_gradient_that_computes_again():
    """The same gradients; every convolution of a unit stands there twice."""
    model = bit_tf.create_model("testing", num_classes=3)
    rng = np.random.default_rng(0)
    for variable in model.trainable_variables:
        variable.assign(variable + 0.1 * rng.standard_normal(variable.shape))
    pictures = tf.constant(helpers.random_images(2, 40, 33) / np.float32(255))

    def gradients():
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(tf.square(model(pictures, training=True)))
        values = [variable.value for variable in model.trainable_variables]
        return tape.gradient(loss, values)

    def convolutions():
        graph = tf.function(gradients).get_concrete_function().graph
        found = list(graph.as_graph_def().node)
        for function in graph.as_graph_def().library.function:
            found += function.node_def
        return sum(node.op == "Conv2D" for node in found)

    expected, once = gradients(), convolutions()
    with models.recompute(model):
        found, twice = gradients(), convolutions()
    assert twice > 1.5 * once
    for one, other in zip(found, expected, strict=True):
        assert helpers.relative_error(one, other) <= 1e-5
    assert convolutions() == once
    with (
        pytest.raises(errors.TrainingError, match="has none"),
        models.recompute(keras.Sequential([keras.layers.Flatten()])),
    ):
        pass
