import helpers
import keras
import numpy as np
import pytest
import reference

from bit_tf import layers


def data(shape, ratio, rng):
    """float32 whose groups' means are `ratio` times their spread."""
    signs = np.where(rng.random((1, 1, 1, shape[-1])) < 0.5, -1, 1)
    return (rng.standard_normal(shape) + ratio * signs).astype(np.float32)


@pytest.mark.parametrize(
    ("ratio", "bound"), [(0, 1e-6), (10, 1e-5), (100, 3e-4)]
)
@pytest.mark.parametrize(
    "shape",
    [(1, 112, 112, 32), (2, 56, 56, 64), (1, 7, 7, 2048), (3, 5, 4, 64)],
)
def test_group_norm_against_float64(shape, ratio, bound, rng):
    # One mean a group: channels of a group share their sign.
    x = data((*shape[:-1], 32), ratio, rng)
    x = np.repeat(x, shape[-1] // 32, axis=-1)
    x = (x + 0.1 * rng.standard_normal(shape)).astype(np.float32)
    gamma = rng.standard_normal(shape[-1]).astype(np.float32)
    beta = rng.standard_normal(shape[-1]).astype(np.float32)
    layer = layers.GroupNormalization()
    layer.build(shape)
    layer.gamma.assign(gamma)
    layer.beta.assign(beta)
    expected = reference.group_norm(
        x.astype(np.float64), gamma.astype(np.float64), beta, 1e-5
    )
    assert helpers.relative_error(layer(x), expected) <= bound


@pytest.mark.parametrize(
    ("ratio", "bound"), [(0, 1e-6), (10, 1e-5), (100, 3e-4)]
)
@pytest.mark.parametrize(
    "shape", [(7, 7, 3, 32), (3, 3, 64, 64), (1, 1, 512, 64)]
)
def test_standardization_against_float64(shape, ratio, bound, rng):
    kernel = (0.02 * data(shape, ratio, rng)).astype(np.float32)
    layer = layers.StandardizedConv2D(shape[3], shape[0])
    layer.build((None, None, None, shape[2]))
    layer.kernel.assign(kernel)
    expected = reference.standardize(kernel.astype(np.float64), 1e-10)
    assert (
        helpers.relative_error(layer.standardized_kernel(), expected) <= bound
    )


@pytest.mark.parametrize("corner", [-10, 0, 10])
@pytest.mark.parametrize(("ratio", "bound"), [(10, 1e-5), (75, 3e-4)])
def test_group_norm_with_an_outlier(ratio, bound, corner, rng):
    """A pixel like no other, in any place, does not spoil the statistics."""
    for place in [(0, 0), (56, 56), (111, 3)]:
        x = (rng.standard_normal((1, 112, 112, 32)) + ratio).astype(np.float32)
        x[0, place[0], place[1]] = corner
        expected = reference.group_norm(x.astype(np.float64), 1, 0, 1e-5)
        found = layers.GroupNormalization()(x)
        assert helpers.relative_error(found, expected) <= bound


@pytest.mark.parametrize("size", [1, 2, 7, 8, 9])
@pytest.mark.parametrize("kernel_size", [1, 3, 7])
@pytest.mark.parametrize(("strides", "rate"), [(1, 1), (2, 1), (1, 2), (1, 4)])
def test_convolution_pads_every_side(size, kernel_size, strides, rate, rng):
    x = rng.standard_normal((2, size, size + 1, 4)).astype(np.float32)
    layer = layers.StandardizedConv2D(
        8, kernel_size, strides=strides, dilation_rate=rate
    )
    y = layer(x)
    expected = reference.conv(
        x.astype(np.float64),
        reference.standardize(np.asarray(layer.kernel, np.float64), 1e-10),
        strides,
        rate,
    )
    assert y.shape == layer.compute_output_shape(x.shape)
    assert helpers.relative_error(y, expected) <= 1e-5


def test_gradients_of_statistics_are_exact(rng):
    """The shift inside channel_moments must not leak into gradients."""
    import tensorflow as tf

    x = rng.standard_normal((2, 5, 6, 64)) + 3
    weights = rng.standard_normal(x.shape)
    layer = layers.GroupNormalization(activation="relu")

    def loss(x):
        return np.sum(
            weights * np.maximum(reference.group_norm(x, 1.0, 0.0, 1e-5), 0)
        )

    variable = tf.Variable(x, dtype=tf.float32)
    with tf.GradientTape() as tape:
        value = tf.reduce_sum(layer(variable) * weights.astype(np.float32))
    gradient = tape.gradient(value, variable).numpy()
    for index in [(0, 0, 0, 0), (0, 0, 0, 5), (1, 4, 5, 63), (1, 2, 2, 10)]:
        step = np.zeros_like(x)
        step[index] = 1e-5
        expected = (loss(x + step) - loss(x - step)) / 2e-5
        assert gradient[index] == pytest.approx(expected, rel=2e-3, abs=2e-4)


def test_statistics_stay_float32_under_mixed_bfloat16(rng):
    """bfloat16 rounds inputs and outputs (2⁻⁸), never the statistics."""
    x = (rng.standard_normal((1, 64, 64, 32)) + 2).astype(np.float32)
    rounded = keras.ops.convert_to_numpy(
        keras.ops.cast(keras.ops.cast(x, "bfloat16"), "float32")
    )
    layer = layers.GroupNormalization(dtype="mixed_bfloat16")
    y = layer(x)
    assert keras.backend.standardize_dtype(y.dtype) == "bfloat16"
    assert layer.gamma.dtype == "float32"
    expected = reference.group_norm(rounded.astype(np.float64), 1, 0, 1e-5)
    y = keras.ops.convert_to_numpy(keras.ops.cast(y, "float32"))
    assert np.max(np.abs(y - expected) / (np.abs(expected) + 1e-3)) < 2**-8
    conv = layers.StandardizedConv2D(8, 3, dtype="mixed_bfloat16")
    conv.build((None, None, None, 8))
    exact = reference.standardize(np.asarray(conv.kernel, np.float64), 1e-10)
    kernel = keras.ops.cast(conv.standardized_kernel(), "float32")
    kernel = keras.ops.convert_to_numpy(kernel)
    assert np.max(np.abs(kernel - exact) / (np.abs(exact) + 1e-3)) < 2**-8


def test_gradients_under_mixed_bfloat16_are_near(rng):
    import tensorflow as tf

    x = (rng.standard_normal((2, 16, 16, 32)) + 2).astype(np.float32)
    weights = rng.standard_normal((2, 16, 16, 8)).astype(np.float32)
    gradients = []
    for dtype in ("float32", "mixed_bfloat16"):
        norm = layers.GroupNormalization(activation="relu", dtype=dtype)
        conv = layers.StandardizedConv2D(8, 3, dtype=dtype)
        norm.build(x.shape)
        conv.build(x.shape)
        conv.kernel.assign(
            0.1 * np.sin(np.arange(9 * 32 * 8)).reshape(3, 3, 32, 8)
        )
        variables = [v.value for v in [*norm.weights, *conv.weights]]
        with tf.GradientTape() as tape:
            y = tf.cast(conv(norm(x)), tf.float32)
            loss = tf.reduce_sum(y * weights)
        gradients.append(tape.gradient(loss, variables))
    for exact, found in zip(*gradients, strict=True):
        assert found.dtype == tf.float32
        assert helpers.relative_error(found, exact) < 0.1


@pytest.mark.parametrize(
    "layer",
    [
        layers.GroupNormalization(16, 1e-3, "relu", name="n"),
        layers.StandardizedConv2D(8, 3, 2, 1, 1e-8, name="c"),
    ],
)
def test_config_round_trip(layer):
    copy = type(layer).from_config(layer.get_config())
    assert copy.get_config() == layer.get_config()


def test_errors():
    with pytest.raises(ValueError, match=r"multiple of `groups`.*33 channels"):
        layers.GroupNormalization().build((None, 8, 8, 33))
    with pytest.raises(ValueError, match="kernel_size must be odd"):
        layers.StandardizedConv2D(8, 2)
