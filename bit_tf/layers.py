"""Weight-standardized convolution and group normalization.

Both come down to one reduction, `channel_moments`. Everything is written in
keras.ops, so it runs on every Keras backend; the layout is always
channels-last, whatever keras.config says.
"""

import keras
from keras import ops

__all__ = ["GroupNormalization", "StandardizedConv2D", "channel_moments"]


def channel_moments(x):
    """Mean and biased variance of every channel, from sums in one pass.

    The squares are taken around the mean of the middle row. Any number would
    give the same result: a typical one keeps the difference of two large sums
    from cancelling where a mean is far larger than its spread. Rows are summed
    before columns, so that rounding errors grow with the height plus the
    width, not with their product.

    Args:
      x: float [n, h, w, c].

    Returns:
      (mean, variance), each float32 [n, 1, 1, c].
    """
    x = ops.cast(x, "float32")
    row = ops.shape(x)[1] // 2
    shift = ops.stop_gradient(
        ops.mean(x[:, row : row + 1], axis=2, keepdims=True)
    )
    mean = _mean_over_pixels(x)
    mean_square = _mean_over_pixels(ops.square(x - shift))
    return mean, ops.maximum(mean_square - ops.square(mean - shift), 0.0)


def _mean_over_pixels(x):
    return ops.mean(ops.mean(x, axis=1, keepdims=True), axis=2, keepdims=True)


@keras.saving.register_keras_serializable(package="bit_tf")
class GroupNormalization(keras.layers.Layer):
    """Group normalization over channels-last pictures, then an activation.

    float [n, h, w, c] → the same shape. Statistics and the multiply-add are
    float32 also under mixed precision. Source: arXiv:1803.08494.

    Args:
      groups: number of groups; must divide c.
      epsilon: added to the variance, inside the root.
      activation: applied to the result, such as "relu"; None for none.
    """

    def __init__(self, groups=32, epsilon=1e-5, activation=None, **kwargs):
        super().__init__(**kwargs)
        self.groups = groups
        self.epsilon = epsilon
        self.activation = keras.activations.get(activation)

    def build(self, input_shape):
        channels = input_shape[-1]
        if channels is None or channels % self.groups:
            raise ValueError(
                "The number of channels must be a multiple of `groups`. "
                f"Received: {channels} channels, groups={self.groups}."
            )
        self.gamma = self.add_weight(
            name="gamma", shape=(channels,), initializer="ones", autocast=False
        )
        self.beta = self.add_weight(
            name="beta", shape=(channels,), initializer="zeros", autocast=False
        )

    def call(self, inputs):
        channels = inputs.shape[-1]
        mean, variance = channel_moments(inputs)
        split = (self.groups, channels // self.groups)
        by_group = (-1, 1, 1, *split)
        mean = ops.reshape(mean, by_group)
        variance = ops.reshape(variance, by_group)
        group_mean = ops.mean(mean, axis=-1, keepdims=True)
        group_variance = ops.mean(
            variance + ops.square(mean - group_mean), axis=-1, keepdims=True
        )
        gamma = ops.reshape(self.gamma, split)
        beta = ops.reshape(self.beta, split)
        scale = gamma * ops.rsqrt(group_variance + self.epsilon)
        offset = beta - group_mean * scale
        by_channel = (-1, 1, 1, channels)
        outputs = ops.cast(inputs, "float32") * ops.reshape(scale, by_channel)
        outputs = outputs + ops.reshape(offset, by_channel)
        return ops.cast(self.activation(outputs), self.compute_dtype)

    def compute_output_shape(self, input_shape):
        return input_shape

    def get_config(self):
        return {
            **super().get_config(),
            "groups": self.groups,
            "epsilon": self.epsilon,
            "activation": keras.activations.serialize(self.activation),
        }


@keras.saving.register_keras_serializable(package="bit_tf")
class StandardizedConv2D(keras.layers.Layer):
    """Convolution whose kernel has mean 0 and variance 1 in every filter.

    float [n, h, w, c] → float [n, ⌈h/strides⌉, ⌈w/strides⌉, filters]. Padding
    is symmetric zeros, dilation_rate · (kernel_size − 1) / 2 on every side,
    also at stride 2, where TensorFlow's SAME would shift even sizes by a
    pixel. No bias. Source: arXiv:1903.10520.

    Args:
      filters: number of output channels.
      kernel_size: side of the kernel, odd.
      strides: step in both directions.
      dilation_rate: distance of the kernel's taps.
      epsilon: added to the variance, inside the root.
      kernel_initializer: for random weights.
    """

    def __init__(
        self,
        filters,
        kernel_size,
        strides=1,
        dilation_rate=1,
        epsilon=1e-10,
        kernel_initializer="he_normal",
        **kwargs,
    ):
        super().__init__(**kwargs)
        if kernel_size % 2 == 0:
            raise ValueError(
                "kernel_size must be odd, so that padding can be symmetric. "
                f"Received: kernel_size={kernel_size}."
            )
        self.filters = filters
        self.kernel_size = kernel_size
        self.strides = strides
        self.dilation_rate = dilation_rate
        self.epsilon = epsilon
        self.kernel_initializer = keras.initializers.get(kernel_initializer)

    def build(self, input_shape):
        self.kernel = self.add_weight(
            name="kernel",
            shape=(
                self.kernel_size,
                self.kernel_size,
                input_shape[-1],
                self.filters,
            ),
            initializer=self.kernel_initializer,
            autocast=False,
        )

    def standardized_kernel(self):
        """The kernel that is convolved: compute dtype, HWIO."""
        size, _, channels, filters = self.kernel.shape
        mean, variance = channel_moments(
            ops.reshape(self.kernel, (1, size * size, channels, filters))
        )
        # The kernel's only other copy waits for the variance. TensorFlow's
        # executor starts what is ready, so with (kernel − mean) · scale two
        # copies of every kernel of a model would stand in memory at once.
        scale = ops.rsqrt(variance + self.epsilon)
        kernel = self.kernel * scale - mean * scale
        return ops.cast(kernel, self.compute_dtype)

    def call(self, inputs):
        border = self.dilation_rate * (self.kernel_size - 1) // 2
        padding = "valid"
        if border and self.strides == 1:
            padding = "same"
        elif border:
            inputs = ops.pad(
                inputs, [[0, 0], [border, border], [border, border], [0, 0]]
            )
        return ops.conv(
            inputs,
            self.standardized_kernel(),
            strides=self.strides,
            padding=padding,
            data_format="channels_last",
            dilation_rate=self.dilation_rate,
        )

    def compute_output_shape(self, input_shape):
        batch, height, width, _ = input_shape
        return (
            batch,
            None if height is None else -(-height // self.strides),
            None if width is None else -(-width // self.strides),
            self.filters,
        )

    def get_config(self):
        return {
            **super().get_config(),
            "filters": self.filters,
            "kernel_size": self.kernel_size,
            "strides": self.strides,
            "dilation_rate": self.dilation_rate,
            "epsilon": self.epsilon,
            "kernel_initializer": keras.initializers.serialize(
                self.kernel_initializer
            ),
        }
