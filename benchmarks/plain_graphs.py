"""BiT's graph, written plainly from its arrays for what it is compared with.

`forward` walks the network and asks for every operation. Three answer: the
official TensorFlow 2 code's way (moments, and kernels standardized in every
call), the same convolutions and ReLU without normalization, and ONNX.
"""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np

__all__ = ["forward", "save_baseline", "save_without_norms", "write_onnx"]

_GROUPS = 32
_NORM_EPSILON = 1e-5
_KERNEL_EPSILON = 1e-10


class Operations(Protocol):
    """What a way of writing graphs has to know."""

    def scale(self, x: Any) -> Any:
        """2x − 1."""

    def conv(self, x: Any, name: str, stride: int = 1) -> Any:
        """The convolution whose kernel is at name, padded symmetrically."""

    def norm_relu(self, x: Any, name: str) -> Any:
        """Group normalization and ReLU."""

    def pool(self, x: Any) -> Any:
        """Padded by one zero, the maximum of 3 × 3 at stride 2."""

    def add(self, x: Any, y: Any) -> Any: ...

    def mean(self, x: Any) -> Any:
        """Over all pixels: [n, c]."""


def forward(build: Operations, x: Any, blocks: Sequence[int]) -> Any:
    """Pictures → features."""
    x = build.pool(build.conv(build.scale(x), "root_block", 2))
    for block, units in enumerate(blocks, 1):
        for unit in range(1, units + 1):
            scope = f"block{block}/unit{unit:02d}"
            stride = 2 if unit == 1 and block > 1 else 1
            y = build.norm_relu(x, f"{scope}/a/group_norm")
            if unit == 1:
                x = build.conv(y, f"{scope}/a/proj", stride)
            y = build.conv(y, f"{scope}/a")
            y = build.norm_relu(y, f"{scope}/b/group_norm")
            y = build.conv(y, f"{scope}/b", stride)
            y = build.norm_relu(y, f"{scope}/c/group_norm")
            x = build.add(x, build.conv(y, f"{scope}/c"))
    return build.mean(build.norm_relu(x, "group_norm"))


def standardized(kernel: np.ndarray) -> np.ndarray:
    """A kernel with mean 0 and variance 1 in every filter."""
    mean = kernel.mean((0, 1, 2), np.float64)
    variance = kernel.var((0, 1, 2), np.float64)
    return ((kernel - mean) / np.sqrt(variance + _KERNEL_EPSILON)).astype(
        np.float32
    )


class _Baseline:
    """As big_transfer's bit_tf2 computes."""

    def __init__(self, arrays: Mapping[str, np.ndarray], module: Any):
        import tensorflow as tf

        self._variables = {}
        for name in arrays:
            if not name.startswith("head/"):
                self._variables[name] = tf.Variable(arrays[name], name=name)
        module.weights = list(self._variables.values())

    def scale(self, x):
        return 2.0 * x - 1.0

    def kernel(self, name):
        import tensorflow as tf

        kernel = self._variables[f"{name}/standardized_conv2d/kernel"]
        mean, variance = tf.nn.moments(kernel, [0, 1, 2], keepdims=True)
        return (kernel - mean) / tf.sqrt(variance + _KERNEL_EPSILON)

    def conv(self, x, name, stride=1):
        import tensorflow as tf

        kernel = self.kernel(name)
        border = (kernel.shape[0] - 1) // 2
        if border:
            x = tf.pad(x, [[0, 0], [border] * 2, [border] * 2, [0, 0]])
        return tf.nn.conv2d(x, kernel, stride, "VALID")

    def norm_relu(self, x, name):
        import tensorflow as tf

        gamma = self._variables[f"{name}/gamma"]
        beta = self._variables[f"{name}/beta"]
        shape = tf.shape(x)
        split = (_GROUPS, x.shape[-1] // _GROUPS)
        grouped = tf.reshape(x, [shape[0], shape[1], shape[2], *split])
        mean, variance = tf.nn.moments(grouped, [1, 2, 4], keepdims=True)
        grouped = tf.nn.batch_normalization(
            grouped,
            mean,
            variance,
            tf.reshape(beta, split),
            tf.reshape(gamma, split),
            _NORM_EPSILON,
        )
        return tf.nn.relu(tf.reshape(grouped, shape))

    def pool(self, x):
        import tensorflow as tf

        x = tf.pad(x, [[0, 0], [1, 1], [1, 1], [0, 0]])
        return tf.nn.max_pool2d(x, 3, 2, "VALID")

    def add(self, x, y):
        return x + y

    def mean(self, x):
        import tensorflow as tf

        return tf.reduce_mean(x, [1, 2])


class _WithoutNorms(_Baseline):
    """The same convolutions with constant kernels, and ReLU."""

    def __init__(self, arrays: Mapping[str, np.ndarray], module: Any):
        import tensorflow as tf

        self._kernels = {}
        for name in arrays:
            if name.endswith("standardized_conv2d/kernel"):
                kernel = standardized(arrays[name])
                # Values would grow from unit to unit, past what floats hold.
                kernel *= np.float32((2 / kernel[..., 0].size) ** 0.5)
                self._kernels[name] = tf.Variable(kernel, trainable=False)
        module.weights = list(self._kernels.values())

    def kernel(self, name):
        return self._kernels[f"{name}/standardized_conv2d/kernel"]

    def norm_relu(self, x, name):
        import tensorflow as tf

        return tf.nn.relu(x)


def save_baseline(
    arrays: Mapping[str, np.ndarray],
    blocks: Sequence[int],
    path: pathlib.Path,
) -> None:
    """A SavedModel of features, as the official TensorFlow 2 code computes."""
    _save(_Baseline, arrays, blocks, path)


def save_without_norms(
    arrays: Mapping[str, np.ndarray],
    blocks: Sequence[int],
    path: pathlib.Path,
) -> None:
    """A SavedModel of the convolutions and ReLU alone: no model of anything."""
    _save(_WithoutNorms, arrays, blocks, path)


def _save(kind, arrays, blocks, path) -> None:
    import tensorflow as tf

    module = tf.Module()
    build = kind(arrays, module)
    module.__call__ = tf.function(
        lambda images: forward(build, images, blocks),
        input_signature=[tf.TensorSpec([None, None, None, 3], tf.float32)],
        autograph=False,
    )
    tf.saved_model.save(module, str(path))


class _Onnx:
    """Nodes of an ONNX graph, channels first."""

    def __init__(self, arrays: Mapping[str, np.ndarray]):
        self._arrays = arrays
        self.nodes: list[Any] = []
        self.initializers: dict[str, np.ndarray] = {}

    def constant(self, name: str, value: Any) -> str:
        self.initializers[name] = np.asarray(value)
        return name

    def node(self, kind: str, inputs: Sequence[str], **attributes) -> str:
        from onnx import helper

        output = f"{kind.lower()}_{len(self.nodes)}"
        self.nodes.append(
            helper.make_node(kind, list(inputs), [output], **attributes)
        )
        return output

    def scale(self, x):
        x = self.node("Mul", [x, self.constant("two", np.float32(2))])
        return self.node("Sub", [x, self.constant("one", np.float32(1))])

    def conv(self, x, name, stride=1):
        name = f"{name}/standardized_conv2d/kernel"
        kernel = standardized(self._arrays[name]).transpose(3, 2, 0, 1)
        border = (kernel.shape[2] - 1) // 2
        return self.node(
            "Conv",
            [x, self.constant(name, np.ascontiguousarray(kernel))],
            pads=[border] * 4,
            strides=[stride] * 2,
        )

    def norm_relu(self, x, name):
        gamma = self._arrays[f"{name}/gamma"]
        beta = self._arrays[f"{name}/beta"]
        ones = self.constant("ones", np.ones(_GROUPS, np.float32))
        zeros = self.constant("zeros", np.zeros(_GROUPS, np.float32))
        groups = self.constant("groups", np.array([0, _GROUPS, -1], np.int64))
        shape = self.node("Shape", [x])
        y = self.node("Reshape", [x, groups])
        y = self.node(
            "InstanceNormalization", [y, ones, zeros], epsilon=_NORM_EPSILON
        )
        y = self.node("Reshape", [y, shape])
        gamma = self.constant(f"{name}/gamma", gamma.reshape(-1, 1, 1))
        beta = self.constant(f"{name}/beta", beta.reshape(-1, 1, 1))
        y = self.node("Add", [self.node("Mul", [y, gamma]), beta])
        return self.node("Relu", [y])

    def pool(self, x):
        # MaxPool itself pads with −∞, and optimizers merge the two (ONNX
        # Runtime from pull request 18136 on) unless the zero is computed.
        border = self.constant("pads", np.array([0, 0, 1, 1] * 2, np.int64))
        size = self.node("Size", [x])
        zero = self.node("Sub", [size, size])
        zero = self.node("Cast", [zero], to=1)
        x = self.node("Pad", [x, border, zero])
        return self.node("MaxPool", [x], kernel_shape=[3, 3], strides=[2, 2])

    def add(self, x, y):
        return self.node("Add", [x, y])

    def mean(self, x):
        return self.node("Flatten", [self.node("GlobalAveragePool", [x])])


def write_onnx(
    arrays: Mapping[str, np.ndarray],
    blocks: Sequence[int],
    path: pathlib.Path,
) -> None:
    """An ONNX file of features: float32 [n, 3, h, w] in [0, 1] → [n, d].

    Raises:
      ImportError: onnx is not installed.
    """
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    build = _Onnx(arrays)
    output = forward(build, "images", blocks)
    size = arrays["group_norm/gamma"].size
    graph = helper.make_graph(
        build.nodes,
        "bit",
        [
            helper.make_tensor_value_info(
                "images", TensorProto.FLOAT, ["n", 3, "h", "w"]
            )
        ],
        [helper.make_tensor_value_info(output, TensorProto.FLOAT, ["n", size])],
        [
            numpy_helper.from_array(value, name)
            for name, value in build.initializers.items()
        ],
    )
    model = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8
    )
    onnx.checker.check_model(model)
    onnx.save(model, str(path))
