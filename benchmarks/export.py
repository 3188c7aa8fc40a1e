"""Time and peak memory of making a SavedModel, by architecture.

    python -m benchmarks export

For each, `hub-export convert` of random weights with 1000 classes: seconds,
and the peak resident size of the process that writes and of the one that
verifies, beside the larger of the checkpoint and the SavedModel (Linux' /proc).
"""

import pathlib
from collections.abc import Iterable
from typing import Any

from benchmarks import memory, timing
from bit_tf import variants

__all__ = ["ARCHITECTURES", "CLASSES", "measure"]

ARCHITECTURES = ("R50x1", "R101x1", "R50x3", "R152x2", "R101x3", "R152x4")
CLASSES = 1000


def measure(
    folder: pathlib.Path, architectures: Iterable[str] = ARCHITECTURES
) -> dict[str, Any]:
    """One table, a row an architecture.

    Args:
      folder: an empty one, for one checkpoint and one SavedModel at a time.
      architectures: names of variants.
    """
    rows = []
    for name in architectures:
        row = variants.architecture(name)
        where = folder / name
        (found,) = memory.measure(name, CLASSES, where)
        rows.append(
            {
                "architecture": name,
                "features": row.feature_dim,
                "GB": found["bytes"] / 1e9,
                "seconds": found["seconds"],
                **{
                    f"peak GB, {kind}": peak / 1e9
                    for kind, peak in sorted(found["peaks"].items())
                },
            }
        )
        memory.remove(where)
    return {
        "machine": timing.machine(),
        "tables": {f"with {CLASSES} classes": rows},
    }
