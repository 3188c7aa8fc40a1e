"""BiT's forward pass in NumPy, float64, written from the papers alone.

The oracle of the tests: it shares no code with bit_tf. Speed is no aim, but
convolutions go through matrix products, so that R50x1 is bearable.
"""

import numpy as np


def moments(x, axes):
    mean = x.mean(axis=axes, keepdims=True)
    return mean, ((x - mean) ** 2).mean(axis=axes, keepdims=True)


def standardize(kernel, epsilon):
    mean, variance = moments(kernel, (0, 1, 2))
    return (kernel - mean) / np.sqrt(variance + epsilon)


def conv(x, kernel, stride=1, dilation=1):
    """x [n, h, w, c], kernel [k, k, c, d], symmetric zero padding."""
    k = kernel.shape[0]
    pad = dilation * (k - 1) // 2
    x = np.pad(x, [(0, 0), (pad, pad), (pad, pad), (0, 0)])
    span = dilation * (k - 1) + 1
    height = (x.shape[1] - span) // stride + 1
    width = (x.shape[2] - span) // stride + 1
    out = np.zeros((x.shape[0], height, width, kernel.shape[3]))
    for i in range(k):
        for j in range(k):
            top, left = i * dilation, j * dilation
            window = x[
                :,
                top : top + (height - 1) * stride + 1 : stride,
                left : left + (width - 1) * stride + 1 : stride,
            ]
            out += window @ kernel[i, j]
    return out


def group_norm(x, gamma, beta, epsilon, groups=32):
    n, h, w, c = x.shape
    grouped = x.reshape(n, h * w, groups, c // groups)
    mean, variance = moments(grouped, (1, 3))
    normed = ((grouped - mean) / np.sqrt(variance + epsilon)).reshape(x.shape)
    return normed * gamma + beta


def max_pool(x, border):
    x = np.pad(x, [(0, 0), (1, 1), (1, 1), (0, 0)], constant_values=border)
    height, width = (x.shape[1] - 3) // 2 + 1, (x.shape[2] - 3) // 2 + 1
    windows = [
        x[:, i : i + 2 * height - 1 : 2, j : j + 2 * width - 1 : 2]
        for i in range(3)
        for j in range(3)
    ]
    return np.max(windows, axis=0)


def forward(
    weights,
    images,
    output_stride=32,
    ws_epsilon=1e-10,
    gn_epsilon=1e-5,
    border=0.0,
):
    """Every endpoint.

    Args:
      weights: canonical name → array.
      images: [n, h, w, 3] in [0, 1].

    Returns:
      {endpoint: float64 array}
    """

    class Scope:
        def __init__(self, prefix=""):
            self.prefix = prefix

        def __truediv__(self, name):
            return Scope(f"{self.prefix}{name}/")

        def __getitem__(self, name):
            return np.asarray(weights[self.prefix + name], np.float64)

        def __contains__(self, name):
            return self.prefix + name in weights

        def conv(self, x, **options):
            kernel = self["standardized_conv2d/kernel"]
            return conv(x, standardize(kernel, ws_epsilon), **options)

        def norm_relu(self, x):
            scope = self / "group_norm"
            normed = group_norm(x, scope["gamma"], scope["beta"], gn_epsilon)
            return np.maximum(normed, 0)

    root, out = Scope(), {}
    x = 2 * np.asarray(images, np.float64) - 1
    x = max_pool((root / "root_block").conv(x, stride=2), border)
    out["stem"] = x
    reached, rate = 4, 1
    for block in range(1, 5):
        stride, first_rate = (1 if block == 1 else 2), rate
        if reached * stride > output_stride:
            rate, stride = rate * stride, 1
        reached *= stride
        index = 1
        while f"block{block}/unit{index:02d}/a/group_norm/gamma" in root:
            unit = root / f"block{block}" / f"unit{index:02d}"
            step = stride if index == 1 else 1
            y = (unit / "a").norm_relu(x)
            if index == 1:
                x = (unit / "a" / "proj").conv(y, stride=step)
            y = (unit / "a").conv(y)
            y = (unit / "b").conv(
                (unit / "b").norm_relu(y),
                stride=step,
                dilation=first_rate if index == 1 else rate,
            )
            y = (unit / "c").conv((unit / "c").norm_relu(y))
            x = x + y
            index += 1
        out[f"block{block}"] = x
    out["pre_logits"] = root.norm_relu(x).mean(axis=(1, 2))
    if "head/conv2d/kernel" in root:
        head = root / "head" / "conv2d"
        out["logits"] = out["pre_logits"] @ head["kernel"] + head["bias"]
    return out
