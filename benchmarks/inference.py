"""Pictures to features: ours against every peer, in turns, in one process.

    python -m benchmarks inference

For each batch and size: median milliseconds, images a second, the share of the
matrix product's speed that was measured in the same run, the error relative to
our Keras model, and how many times as fast ours is (`encode`, and `__call__`),
as the median over rounds of the ratio of two neighbouring times.
"""

import functools
import os
import pathlib
import statistics
from typing import Any

import numpy as np

from benchmarks import memory, peers, timing

__all__ = ["SHAPES", "measure"]

# Batch, side, rounds.
SHAPES = ((1, 224, 31), (8, 224, 11), (1, 480, 15))
_OURS = ("bit_tf encode", "bit_tf __call__")


def measure(
    folder: pathlib.Path,
    architecture: str = "R50x1",
    shapes=SHAPES,
    compiled: bool = True,
) -> dict[str, Any]:
    """Tables of all shapes.

    Args:
      folder: an empty one, for the network's files.
      architecture: a name of variants.
      shapes: (batch, side, rounds) each.
      compiled: see peers.peers.
    """
    files = peers.make_files(folder, architecture)
    ways = peers.peers(files, compiled)
    found: dict[str, Any] = {"machine": timing.machine(), "tables": {}}
    peak = {"float32": timing.matrix_product()}
    peak["bfloat16"] = timing.matrix_product("bfloat16")
    found["matrix_product_flops"] = peak
    for batch, side, rounds in shapes:
        rng = np.random.default_rng(0)
        pictures = rng.random((batch, side, side, 3), np.float32)
        calls = {way.name: way.start(batch, side, side) for way in ways}
        expected = calls["bit_tf Keras model"](pictures)
        work = 2 * batch * timing.multiply_accumulates(architecture, side, side)
        errors = {
            way.name: _relative(calls[way.name](pictures), expected)
            for way in ways
        }
        times = timing.in_turns(
            {
                name: functools.partial(call, pictures)
                for name, call in calls.items()
            },
            rounds,
        )
        rows = []
        for way in ways:
            seconds = statistics.median(times[way.name])
            row = {
                "": way.name,
                "ms": 1000 * seconds,
                "images/s": batch / seconds,
                "of matrix product": work / seconds / peak[way.dtype],
                "relative error": errors[way.name] if way.exact else None,
            }
            for ours in _OURS:
                row[f"{ours} is … × as fast"] = timing.ratio(
                    times[ours], times[way.name]
                )
            rows.append(row)
        found["tables"][f"batch {batch}, {side} × {side}"] = rows
    found["tables"]["bfloat16, vectors of the demo's 360 digits"] = [
        _bfloat16_error(folder / "digits")
    ]
    found["not_installed"] = peers.missing()
    found["peak_bytes"] = memory.peak_bytes(os.getpid())
    return found


def _bfloat16_error(path: pathlib.Path) -> dict[str, float]:
    """Of trained weights, which do not magnify it as random ones do.

    Args:
      path: a new one, for the demo's model.
    """
    from bit_tf import hub
    from hub_export import digits, saved_model

    saved_model.convert(str(digits.DATA / digits.CHECKPOINT), path, head=False)
    pictures, _ = digits.held_out()
    full, half = (
        hub.picture_function(
            hub.load(path), "", "", str(path), precision=precision
        )[0](pictures).numpy()
        for precision in ("float32", "bfloat16")
    )
    lengths = np.linalg.norm(full, axis=1)
    cosine = (full * half).sum(1) / lengths / np.linalg.norm(half, axis=1)
    relative = np.linalg.norm(full - half, axis=1) / lengths
    return {
        "least cosine": float(cosine.min()),
        "median cosine": float(np.median(cosine)),
        "median relative error": float(np.median(relative)),
        "largest relative error": float(relative.max()),
    }


def _relative(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))
