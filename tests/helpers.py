"""What several tests need: random weights, pictures, errors, processes."""

import numpy as np

from hub_export import random_weights

# blocks and stem width of variants.ARCHITECTURES["testing"]
TESTING = ((1, 1, 1, 1), 32)


def random_arrays(blocks, stem_width, num_classes=0, seed=0):
    """Weights in the published layout: {canonical name: float32 array}."""
    weights = random_weights.RandomWeights(
        blocks, stem_width, num_classes, seed
    )
    return dict(weights)


def random_images(n, height, width, seed=0):
    """uint8 [n, height, width, 3]: smooth shapes with some noise."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width] / 32.0
    waves = rng.uniform(-2, 2, (n, 3, 3))
    images = [
        [np.sin(a * x + b * y + c) for a, b, c in channels]
        for channels in waves
    ]
    images = np.moveaxis(np.asarray(images), 1, -1) * 80 + 128
    images = images + rng.normal(0, 10, images.shape)
    return np.clip(images, 0, 255).astype(np.uint8)


def relative_error(a, b):
    """‖a − b‖₂ / ‖b‖₂ over the whole output."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    assert a.shape == b.shape
    return np.linalg.norm(a - b) / np.linalg.norm(b)
