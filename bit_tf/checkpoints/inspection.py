"""What a checkpoint holds, in words and numbers."""

import dataclasses
import math
import sys
from typing import Any

import numpy as np

from bit_tf import variants
from bit_tf.checkpoints import checkpoint

__all__ = ["inspect", "statistics"]

_CHUNK = 1 << 20


def statistics(array: np.ndarray) -> dict[str, float | int | None]:
    """Describes the values of an array of any float dtype.

    Args:
      array: of any shape.

    Returns:
      min, max, mean and std (biased, in float64) of the values that are finite
      in float32, None where there are none; and the numbers of NaN and of
      values that are infinite there.
    """
    count = nan = infinite = 0
    low, high, mean, squares = math.inf, -math.inf, 0.0, 0.0
    flat = array.reshape(-1)
    for start in range(0, flat.size, _CHUNK):
        values = flat[start : start + _CHUNK].astype(np.float64)
        with np.errstate(over="ignore"):
            finite = np.isfinite(values.astype(np.float32))
        if not finite.all():
            bad = int(np.isnan(values).sum())
            nan += bad
            infinite += int(values.size - finite.sum()) - bad
            values = values[finite]
            if not values.size:
                continue
        low, high = min(low, values.min()), max(high, values.max())
        # Two parts' moments become the whole's (Chan, Golub, LeVeque 1979).
        part, n = float(values.mean()), values.size
        squares += float(np.square(values - part).sum())
        squares += (part - mean) ** 2 * count * n / (count + n)
        mean += (part - mean) * n / (count + n)
        count += n
    found = {"nan": nan, "infinite": infinite}
    if not count:
        return {"min": None, "max": None, "mean": None, "std": None, **found}
    return {
        "min": float(low),
        "max": float(high),
        "mean": mean,
        "std": math.sqrt(squares / count),
        **found,
    }


def inspect(
    source: checkpoint.Checkpoint, *, values: bool = True
) -> dict[str, Any]:
    """Describes a checkpoint, its arrays one at a time.

    Args:
      source: from `checkpoints.read`.
      values: read every array, for its statistics; False reads none.

    Returns:
      A dict that JSON can hold: path, format, bytes, architecture (None if it
      was never published), blocks, stem_width, feature_dim, num_classes,
      params, numerics, preset, labels (how many), output_stride, extra, notes,
      finite (None without values), and arrays: a list of name, source,
      dtype, shape, and with values what `statistics` gives.

    Raises:
      CheckpointFormatError: the file is damaged.
    """
    from tqdm import tqdm

    known = variants.find_architecture(source.blocks, source.stem_width)
    facts = source.facts
    constants = dataclasses.asdict(variants.numerics(facts.numerics))
    constants["pool_border"] = str(constants["pool_border"])
    arrays: list[dict[str, Any]] = []
    # On a terminal alone, and not for what takes no time.
    progress = tqdm(
        source, unit="array", delay=1, disable=None, file=sys.stderr
    )
    for name in progress if values else source:
        row = {
            "name": name,
            "source": source.sources[name] or name,
            "dtype": str(source.dtypes[name]),
            "shape": list(source.shapes[name]),
        }
        arrays.append(row | (statistics(source.stored(name)) if values else {}))
    return {
        "path": str(source.path),
        "format": source.format,
        "bytes": _size(source),
        "architecture": known.name if known else None,
        "blocks": list(source.blocks),
        "stem_width": source.stem_width,
        "feature_dim": 32 * source.stem_width,
        "num_classes": source.num_classes,
        "params": sum(math.prod(shape) for shape in source.shapes.values()),
        "numerics": constants,
        "preset": facts.preset and dataclasses.asdict(facts.preset),
        "labels": facts.labels and len(facts.labels),
        "output_stride": facts.output_stride,
        "extra": list(source.extra),
        "notes": list(source.notes),
        "finite": not any(row["nan"] or row["infinite"] for row in arrays)
        if values
        else None,
        "arrays": arrays,
    }


def _size(source: checkpoint.Checkpoint) -> int:
    if source.path.is_dir():
        files = (path for path in source.path.rglob("*") if path.is_file())
        return sum(path.stat().st_size for path in files)
    return source.path.stat().st_size
