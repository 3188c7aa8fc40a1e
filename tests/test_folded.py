"""The model of built-in layers: parity, and a process that has Keras alone."""

import json
import os
import subprocess
import sys
import zipfile

import helpers
import keras
import numpy as np
import pytest
import reference

from bit_tf import errors, folded, labels, models, presets, variants
from bit_tf.checkpoints import keras_file
from bit_tf.checkpoints.facts import Facts

BLOCKS = (1, 2, 1, 2)
# Loads a model in a process without bit_tf and runs it.
STOCK = """
import sys
sys.modules["bit_tf"] = None
import keras
import numpy as np
model = keras.saving.load_model(sys.argv[1])
np.save(sys.argv[3], model(np.load(sys.argv[2])))
print(sorted(name for name in sys.modules if name.startswith("bit_tf.")))
print({type(layer).__module__.split(".")[0] for layer in model.layers})
"""


def filled(num_classes=10, blocks=BLOCKS, **options):
    """A model with random weights."""
    model = models.ResNetV2(blocks, 32, num_classes, **options)
    weights = helpers.random_arrays(blocks, 32, num_classes)
    # Beside one that is nearly constant, the epsilon of a kernel matters.
    weights["block2/unit01/b/standardized_conv2d/kernel"] *= 1e-3
    for name, variable in models.canonical_variables(model).items():
        variable.assign(weights[name])
    return model


@pytest.fixture(scope="module")
def pictures():
    return helpers.random_images(2, 65, 94).astype(np.float32) / 255


@pytest.mark.parametrize("output_stride", [32, 16, 8])
@pytest.mark.parametrize("numerics", variants.NUMERICS)
def test_outputs_are_the_models(numerics, output_stride, pictures):
    model = filled(numerics=numerics, output_stride=output_stride)
    other = folded.fold(model)
    assert other.output_shape == (None, 10)
    other = keras.Model(
        other.input, [other.get_layer("pre_logits").output, other.output]
    )
    wanted = models.endpoints(model, ["pre_logits", "logits"])
    for size in [(65, 94), (64, 33), (2, 3)]:
        resized = np.resize(pictures, (2, *size, 3))
        for one, two in zip(
            other(resized), wanted(resized).values(), strict=True
        ):
            assert helpers.relative_error(one, two) <= 1e-5


def test_numerics_and_strides_differ_by_more_than_the_bound(pictures):
    """Else the test above would pass with any constants."""
    outputs = [
        folded.fold(filled(**options))(pictures)
        for options in (
            {},
            {"numerics": "big_vision"},
            {"numerics": "timm"},
            {"output_stride": 16},
            {"output_stride": 8},
        )
    ]
    for index, one in enumerate(outputs):
        for other in outputs[:index]:
            assert helpers.relative_error(one, other) > 1e-4


def test_without_a_head(pictures):
    model = filled(0)
    other = folded.fold(model)
    assert other.output_shape == (None, model.feature_dim)
    assert other.layers[-1].name == "pre_logits"
    assert helpers.relative_error(other(pictures), model(pictures)) <= 1e-5


def test_against_the_reference(pictures):
    model = filled(numerics="big_vision")
    constants = variants.NUMERICS["big_vision"]
    expected = reference.forward(
        dict(models.canonical_arrays(model)),
        pictures[:1],
        ws_epsilon=constants.ws_epsilon,
        gn_epsilon=constants.gn_epsilon,
        border=constants.pool_border,
    )
    found = folded.fold(model)(pictures[:1])
    assert helpers.relative_error(found, expected["logits"]) <= 1e-5


@pytest.mark.parametrize("border", [0.0, -np.inf])
@pytest.mark.parametrize("size", [(1, 1), (2, 5), (8, 9)])
def test_pooling_border(border, size):
    x = -1 - np.random.default_rng(0).random((2, *size, 4), np.float32)
    found = folded._pool(keras.ops.convert_to_tensor(x), border)
    np.testing.assert_array_equal(found, reference.max_pool(x, border))
    assert (np.asarray(found).max() == 0) == (border == 0)


def test_another_border_is_refused():
    with pytest.raises(ValueError, match="-inf"):
        folded._pool(keras.Input((8, 8, 4)), 1.0)


def test_kernels_are_standardized():
    model = filled()
    other = folded.fold(model)
    kernel = np.asarray(model.get_layer("block2").units[1].conv_b.kernel)
    expected = reference.standardize(kernel.astype(np.float64), 1e-10)
    found = np.asarray(other.get_layer("block2_unit02_b_conv").kernel)
    assert found.dtype == np.float32
    assert helpers.relative_error(found, expected) <= 1e-7
    convolutions = [
        layer
        for layer in other.layers
        if isinstance(layer, keras.layers.Conv2D)
    ]
    assert len(convolutions) == 1 + 3 * sum(BLOCKS) + 4
    assert not any(layer.use_bias for layer in convolutions)


def test_every_layer_is_keras_own():
    model = filled(numerics="big_vision", output_stride=8)
    other = folded.fold(model)
    assert type(other) is keras.Model or type(other).__module__.startswith(
        "keras."
    )
    for layer in other.layers:
        assert type(layer).__module__.startswith("keras.src.layers.")
    names = [layer.name for layer in other.layers]
    assert len(names) == len(set(names))
    assert not any("/" in name for name in names)
    assert other.count_params() == model.count_params()


def test_global_settings_do_not_matter(pictures):
    model = filled()
    expected = folded.fold(model)(pictures)
    try:
        keras.config.set_dtype_policy("mixed_bfloat16")
        keras.config.set_image_data_format("channels_first")
        other = folded.fold(model)
        found = other(pictures)
    finally:
        keras.config.set_dtype_policy("float32")
        keras.config.set_image_data_format("channels_last")
    assert {layer.compute_dtype for layer in other.layers[1:]} == {"float32"}
    np.testing.assert_array_equal(found, expected)


@pytest.mark.slow
def test_a_stock_process_loads_the_file(tmp_path, pictures):
    model = filled(numerics="big_vision", output_stride=16)
    folded.write(model, tmp_path / "a.keras")
    assert list(tmp_path.iterdir()) == [tmp_path / "a.keras"]
    np.save(tmp_path / "pictures.npy", pictures)
    process = subprocess.run(
        [
            *(sys.executable, "-I", "-W", "ignore", "-c", STOCK),
            *(tmp_path / "a.keras", tmp_path / "pictures.npy"),
            tmp_path / "outputs.npy",
        ],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "KERAS_BACKEND": "tensorflow"},
    )
    assert process.stdout.splitlines() == ["[]", "{'keras'}"]
    found = np.load(tmp_path / "outputs.npy")
    assert helpers.relative_error(found, model(pictures)) <= 1e-5


def test_the_file(tmp_path, monkeypatch):
    """Keras' three members, our facts among them, the same bytes each time."""
    monkeypatch.setattr(folded, "_run_alone", run_here)
    model = filled(num_classes=2, blocks=(1, 1, 1, 1), output_stride=16)
    facts = Facts(
        "google",
        presets.PRESETS["timm in1k"],
        (labels.Label("a", "b"), labels.Label("c", "é")),
        16,
    )
    folded.write(model, tmp_path / "a.keras", facts=facts)
    folded.write(model, tmp_path / "b.keras", facts=facts)
    folded.write(model, tmp_path / "c.keras")
    one, other = tmp_path / "a.keras", tmp_path / "b.keras"
    assert one.read_bytes() == other.read_bytes()
    for name, recorded in (
        ("a", facts),
        ("c", Facts("google", output_stride=16)),
    ):
        with zipfile.ZipFile(tmp_path / f"{name}.keras") as archive:
            assert sorted(archive.namelist()) == [
                "config.json",
                "metadata.json",
                "model.weights.h5",
            ]
            found = json.loads(archive.read("metadata.json"))
            # Keras 3.12 does not know this argument.
            assert b"quantization_config" not in archive.read("config.json")
        assert found["keras_version"] == keras.__version__
        assert Facts.from_json(found["bit_tf"]) == recorded
    loaded = keras.saving.load_model(one)
    for found, wanted in zip(
        loaded.weights, folded.fold(model).weights, strict=True
    ):
        np.testing.assert_array_equal(found, wanted)
    with pytest.raises(errors.CheckpointFormatError, match=r"bit_tf\.folded"):
        keras_file.read(one)


def run_here(staged, folder, pictures, path):
    """In place of the process, which takes its time."""
    other = keras.saving.load_model(staged)
    features = keras.Model(other.input, other.get_layer("pre_logits").output)
    return {
        "pre_logits": np.asarray(features(pictures)),
        "output": np.asarray(other(pictures)),
    }


def test_mixed_precision_is_compared_in_float32(tmp_path, monkeypatch):
    monkeypatch.setattr(folded, "_run_alone", run_here)
    model = filled(0, blocks=(1, 1, 1, 1), dtype="mixed_bfloat16")
    folded.write(model, tmp_path / "a.keras")
    other = keras.saving.load_model(tmp_path / "a.keras")
    assert {layer.compute_dtype for layer in other.layers} == {"float32"}


@pytest.mark.parametrize("change", ["kernel", "nan", "layer"])
def test_what_differs_is_not_written(tmp_path, monkeypatch, change):
    model = filled(blocks=(1, 1, 1, 1))
    fold = folded.fold

    def broken(model):
        other = fold(model)
        if change == "layer":
            return keras.Model(
                other.input,
                models.Head(10, name="own")(
                    other.get_layer("pre_logits").output
                ),
            )
        kernel = other.get_layer("block3_unit01_c_conv").kernel
        kernel.assign(kernel * (np.nan if change == "nan" else 1.01))
        return other

    monkeypatch.setattr(folded, "fold", broken)
    if change != "layer":
        monkeypatch.setattr(folded, "_run_alone", run_here)
    (tmp_path / "a.keras").write_bytes(b"before")
    with pytest.raises(errors.VerificationError) as error:
        folded.write(model, tmp_path / "a.keras")
    assert ("fresh process must load" in str(error.value)) == (
        change == "layer"
    )
    assert list(tmp_path.iterdir()) == [tmp_path / "a.keras"]
    assert (tmp_path / "a.keras").read_bytes() == b"before"


def test_paths_are_judged_first(tmp_path):
    model = models.ResNetV2((1, 1, 1, 1), 32)
    with pytest.raises(errors.CheckpointFormatError, match=r"\.keras"):
        folded.write(model, tmp_path / "a.h5")
    with pytest.raises(FileNotFoundError):
        folded.write(model, tmp_path / "no" / "a.keras")
