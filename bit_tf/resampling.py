"""tf.image.resize without antialias, in NumPy: which pixels, how much of each.

Half-pixel centres, float32 coordinates; see TensorFlow's
resize_bilinear_op.cc and resize_bicubic_op.cc.
"""

import numpy as np

__all__ = ["bicubic_taps", "bilinear_taps", "resample"]


def _places(size: int, out: int) -> np.ndarray:
    """Where the centres of `out` pixels fall among `size`, as in TF."""
    scale = np.float32(size) / np.float32(out)
    half = np.float32(0.5)
    return (np.arange(out, dtype=np.float32) + half) * scale - half


def bilinear_taps(size: int, out: int) -> tuple[np.ndarray, np.ndarray]:
    """Indices and weights [2, out] of tf.image.resize."""
    place = _places(size, out)
    low = np.floor(place)
    weight = place - low
    indices = np.stack(
        [np.maximum(low, 0), np.minimum(np.ceil(place), size - 1)]
    )
    return indices.astype(np.intp), np.stack([1 - weight, weight])


def bicubic_taps(size: int, out: int) -> tuple[np.ndarray, np.ndarray]:
    """Indices and weights [4, out] of tf.image.resize.

    Keys' kernel, a = -0.5, from a table of 1024 steps; taps outside the
    picture weigh nothing, and the others are scaled to a sum of one.
    """
    place = _places(size, out)
    low = np.floor(place)
    step = np.rint((place - low) * 1024) / 1024
    taps = np.arange(-1, 3)[:, None]
    x = np.abs(taps - step.astype(np.float64))
    near = (1.5 * x - 2.5) * x * x + 1
    far = ((-0.5 * x + 2.5) * x - 4) * x + 2
    indices = low.astype(np.intp) + taps
    inside = (indices >= 0) & (indices < size)
    weights = np.where(x <= 1, near, far) * inside
    weights /= weights.sum(axis=0)
    return indices.clip(0, size - 1), weights.astype(np.float32)


def resample(
    image: np.ndarray, indices: np.ndarray, weights: np.ndarray
) -> np.ndarray:
    """Weighted sums of the rows of a picture, in float32."""
    total = np.zeros((indices.shape[1], *image.shape[1:]), np.float32)
    for index, weight in zip(indices, weights, strict=True):
        total += image[index] * weight[:, None, None]
    return total
