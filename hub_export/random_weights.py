"""Random weights in the published layout, for trying things at full size."""

import pathlib
from collections.abc import Iterator, Mapping

import numpy as np

from bit_tf import checkpoints, labels, variants
from bit_tf.checkpoints import layout

__all__ = ["RandomWeights", "write_checkpoint"]


class RandomWeights(Mapping[str, np.ndarray]):
    """Canonical name → float32 array, made when asked for, equal every time.

    Residual branches are small beside their shortcuts, as training makes them:
    of equal size, they would amplify the rounding of any float32 network.

    Args:
      blocks: units in each block.
      stem_width: channels of the root convolution.
      num_classes: outputs of the head; 0 for none.
      seed: any integer.

    Attributes:
      shapes: name → shape.
    """

    def __init__(self, blocks, stem_width, num_classes=0, seed=0):
        self.shapes = layout.expected_shapes(blocks, stem_width, num_classes)
        self._seeds = {
            name: (seed, index) for index, name in enumerate(self.shapes)
        }

    def __getitem__(self, name: str) -> np.ndarray:
        shape = self.shapes[name]
        rng = np.random.default_rng(self._seeds[name])
        values = rng.standard_normal(shape, np.float32)
        if name.endswith("c/group_norm/gamma"):
            mean, spread = 0.3, 0.03
        elif name.endswith("gamma"):
            mean, spread = 1.0, 0.1
        elif name.endswith(("beta", "bias")):
            mean, spread = 0.0, 0.1
        elif name == layout.HEAD_KERNEL:
            mean, spread = 0.0, shape[0] ** -0.5
        else:
            mean, spread = 0.0, 0.02
        values *= np.float32(spread)
        values += np.float32(mean)
        return values

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)


def write_checkpoint(
    architecture: str,
    path: pathlib.Path,
    num_classes: int = labels.LABEL_SETS["ilsvrc2012"],
    seed: int = 0,
) -> None:
    """Writes a full-size checkpoint of random weights, in Google's layout."""
    row = variants.architecture(architecture)
    weights = RandomWeights(row.blocks, row.stem_width, num_classes, seed)
    checkpoints.write(weights, path)
