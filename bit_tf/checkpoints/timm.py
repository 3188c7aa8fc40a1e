"""timm's weights: one .safetensors file, as timm itself writes it.

Source: timm, models/resnetv2.py and models/_helpers.py. `pytorch` reads it.
"""

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from bit_tf import errors, files
from bit_tf.checkpoints import (
    checkpoint,
    layout,
    pytorch,
    rename,
    safetensors_file,
)
from bit_tf.checkpoints.facts import KEY, facts_of

__all__ = ["write"]


def write(
    arrays: Mapping[str, np.ndarray], path: str | os.PathLike[str]
) -> None:
    """Writes a file for `timm.create_model("resnetv2_…_bit",
    checkpoint_path=path, num_classes=…)`.

    The arrays are taken one at a time; the file appears whole or not at all,
    and two writes of the same arrays give the same bytes. Its metadata hold
    the facts, which this package's reader honours: timm itself standardizes
    kernels with an epsilon of 1e-8 and pads its pooling with zeros, whatever
    is recorded there.

    Args:
      arrays: canonical name → float array, head (C, N). If it has an attribute
        `shapes`, no array is made to learn its shape.
      path: the file to write or to replace.

    Raises:
      CheckpointMismatchError: names or shapes are not those of a BiT-ResNet.
      CheckpointFormatError: an array is not float or holds NaN or infinity, or
        labels do not fit.
      OSError: the file cannot be written.
    """
    path = Path(path)
    checkpoint.require_place(path)
    shapes = checkpoint.checked_shapes(arrays)
    facts = facts_of(arrays)
    if layout.HEAD_KERNEL not in shapes:
        facts = dataclasses.replace(facts, labels=None)
    with files.new_file(path) as file:
        safetensors_file.write(
            file,
            *safetensors_file.encoded(rename.TIMM, arrays, shapes),
            {"format": "pt", KEY: facts.to_json()},
        )
        written = pytorch.read(file.name)
        if written.shapes != shapes or written.facts != facts:
            raise errors.CheckpointFormatError(
                f"{path}: what was written must read back the same. Received: "
                f"{written.facts} for {facts}. The disk or its file system is "
                "at fault; write elsewhere."
            )
