"""bfloat16: only convolutions, within its own bound, and never unnoticed."""

import pathlib

import helpers
import numpy as np
import pytest
import tensorflow as tf

import bit_tf
from bit_tf import conv_precision, embed_model, frozen_graph, hub, layers
from bit_tf.errors import UnknownNameError
from hub_export import digits, saved_model

SPEC = tf.TensorSpec([None, None, None, 3], tf.float32)
FEATURES = ("image_feature_vector", "features")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A SavedModel of trained weights, with a head."""
    path = tmp_path_factory.mktemp("trained") / "model"
    saved_model.convert(str(digits.DATA / digits.CHECKPOINT), path)
    return path


def concrete(call):
    return tf.function(call).get_concrete_function(SPEC)


def function(path, precision, signature=FEATURES):
    return hub.picture_function(hub.load(path), *signature, "model", precision)[
        0
    ]


def test_vectors_of_trained_weights(trained):
    pictures, _ = digits.held_out()
    full = function(trained, "float32")(pictures).numpy()
    half = function(trained, "bfloat16")(pictures).numpy()
    lengths = np.linalg.norm(full, axis=1), np.linalg.norm(half, axis=1)
    cosine = (full * half).sum(1) / lengths[0] / lengths[1]
    error = np.linalg.norm(full - half, axis=1) / lengths[0]
    assert cosine.min() >= 0.9999
    assert error.max() <= 0.015
    # It is another one.
    assert np.median(error) >= 1e-3


def test_classes_of_trained_weights(trained):
    pictures, labels = digits.held_out()
    signature = ("image_classification", "probabilities")
    right = {}
    for precision in conv_precision.PRECISIONS:
        call = function(trained, precision, signature)
        right[precision] = call(pictures).numpy().argmax(1) == labels
    assert (right["float32"] == right["bfloat16"]).mean() >= 0.99


def test_only_convolutions(trained):
    half = function(trained, "bfloat16")
    for graph in (half._fast.graph, half._left):
        nodes = graph.node if graph is half._left else graph.as_graph_def().node
        kinds: dict[str, set[int]] = {}
        for node in nodes:
            kinds.setdefault(node.op, set()).add(node.attr["T"].type)
        assert kinds["Conv2D"] == {tf.bfloat16.as_datatype_enum}
        for op in ("Mean", "Rsqrt", "AddV2", "MaxPool"):
            assert tf.bfloat16.as_datatype_enum not in kinds[op]


@pytest.mark.parametrize("limit", [0, 2**26])
def test_many_kernels_are_no_constants(limit, monkeypatch, trained):
    monkeypatch.setattr(frozen_graph, "_KERNELS", limit)
    half = function(trained, "bfloat16")
    captured = [tensor.dtype for tensor in half._fast.captured_inputs]
    assert (tf.bfloat16 in captured) == (limit == 0)
    full = function(trained, "float32")
    x = tf.constant(helpers.random_images(2, 40, 33, seed=1) / np.float32(255))
    assert 1e-4 < helpers.relative_error(half(x), full(x)) < 0.03


def test_where_the_first_formula_is_needed():
    """Its convolutions are bfloat16, too."""
    kernel = tf.Variable(tf.random.stateless_normal([3, 3, 64, 64], [0, 1]))
    layer = layers.GroupNormalization()
    layer.build((None, None, None, 64))

    def call(x):
        x = layer(tf.tile(x, [1, 1, 1, 22])[..., :64])
        return tf.nn.conv2d(x, kernel, 1, "SAME")

    frozen = frozen_graph.freeze(concrete(call), "bfloat16")
    x = tf.random.stateless_normal([2, 9, 7, 3], [1, 1])
    for mean, is_there in ((0.0, False), (1000.0, True)):
        found, expected = frozen(x + mean), call(x + mean)
        assert 1e-4 < helpers.relative_error(found, expected) < 0.01
        assert (frozen._exact is not None) == is_there


def test_a_convolution_at_the_end():
    """The output's type is the function's."""
    kernel = tf.Variable(tf.random.stateless_normal([1, 1, 3, 4], [0, 1]))

    def call(x):
        return tf.nn.conv2d(x, kernel, 1, "VALID")

    function = tf.compat.v1.wrap_function(call, [SPEC])
    x = tf.random.stateless_normal([2, 5, 4, 3], [1, 1])
    half = tf.nn.conv2d(
        tf.cast(x, tf.bfloat16), tf.cast(kernel, tf.bfloat16), 1, "VALID"
    )
    for given in (function, concrete(call)):
        found = frozen_graph.freeze(given, "bfloat16")(x)
        np.testing.assert_array_equal(found, tf.cast(half, tf.float32))


def test_a_kernel_that_is_computed_from_the_picture():
    def call(x):
        kernel = tf.reshape(tf.reduce_mean(x, [0, 1, 2]), [1, 1, 3, 1])
        return tf.nn.conv2d(x, kernel, 1, "VALID") + tf.nn.conv2d(
            x, 2.0 * kernel, 1, "VALID"
        )

    function = concrete(call)
    frozen = frozen_graph.freeze(function, "bfloat16")
    x = tf.random.stateless_uniform([2, 5, 4, 3], [1, 1])
    assert 0 < helpers.relative_error(frozen(x), function(x)) < 0.01


def test_a_kernel_that_others_use_too():
    """It stays float32 for them."""
    kernel = tf.Variable(tf.random.stateless_normal([3, 3, 64, 64], [0, 1]))

    def call(x):
        x = tf.tile(x, [1, 1, 1, 22])[..., :64]
        y = tf.nn.conv2d(x, kernel, 1, "SAME")
        return tf.nn.conv2d_transpose(y, kernel, tf.shape(x), 1)

    function = concrete(call)
    frozen = frozen_graph.freeze(function, "bfloat16")
    x = tf.random.stateless_normal([2, 5, 4, 3], [1, 1])
    assert 0 < helpers.relative_error(frozen(x), function(x)) < 0.01


def test_an_unknown_precision(trained):
    for call in (
        lambda: bit_tf.BitMedium2Vec(trained, precision="half"),
        lambda: embed_model.Encoder(trained, precision="half"),
        lambda: frozen_graph.freeze(None, "half"),
    ):
        with pytest.raises(
            UnknownNameError, match=r"float32, bfloat16.*'half'"
        ):
            call()


@pytest.mark.filterwarnings("ignore:.*is not one of the published")
def test_encoders(trained):
    pictures, _ = digits.held_out()
    full = bit_tf.BitMedium2Vec(trained)
    half = bit_tf.BitMedium2Vec(trained, precision="bfloat16")
    error = helpers.relative_error(
        np.array(half.encode(pictures[0])), np.array(full.encode(pictures[0]))
    )
    assert 1e-4 < error < 0.03
    encoder = embed_model.Encoder(trained, precision="bfloat16")
    assert encoder.facts().precision == "bfloat16"


@pytest.mark.parametrize(
    ("text", "warns"),
    [
        ("flags\t\t: fpu avx2 avx512f\n", True),
        ("flags\t\t: fpu avx512f avx512_bf16\n", False),
        ("Features\t: fp asimd bf16\n", False),
        ("", False),
        (None, False),
    ],
)
def test_a_processor_without_it_is_told(text, warns, monkeypatch):
    def read_text(path, *args):
        if text is None:
            raise FileNotFoundError(path)
        return text

    said = []
    monkeypatch.setattr(pathlib.Path, "read_text", read_text)
    monkeypatch.setattr(conv_precision.logging, "warning", said.append)
    conv_precision._warn_if_slow.__wrapped__()
    assert bool(said) == warns
