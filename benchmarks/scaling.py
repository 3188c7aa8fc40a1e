"""How the time of a vector grows with the picture and with the batch.

    python -m benchmarks scaling --output DIR

R50x1 from 64 × 64 to 1024 × 1024, one picture at a time, and 1 to 32 pictures
of 128 × 128. Writes scaling.png beside the tables: milliseconds over pixels
and over the batch, both axes logarithmic, with the line of equal cost.
"""

import functools
import pathlib
import statistics
from typing import Any

import numpy as np

from benchmarks import peers, timing
from bit_tf import errors

__all__ = ["BATCHES", "SIDES", "measure", "plot"]

SIDES = (64, 96, 128, 192, 256, 384, 512, 768, 1024)
BATCHES = (1, 2, 4, 8, 16, 32)
_SIDE = 128


def measure(
    folder: pathlib.Path,
    architecture: str = "R50x1",
    sides=SIDES,
    batches=BATCHES,
    rounds: int = 5,
) -> dict[str, Any]:
    """Milliseconds of every side, and of every batch.

    Args:
      folder: an empty one, for the network's files.
      architecture: a name of variants.
      sides: of one picture, in pixels.
      batches: of pictures of 128 × 128.
      rounds: how often each is timed.
    """
    import bit_tf

    files = peers.make_files(folder, architecture)
    encoder = bit_tf.BitMedium2Vec(model_url=str(files.ours))
    rng = np.random.default_rng(0)

    def times(shapes: dict[int, tuple[int, ...]]) -> dict[int, float]:
        calls = {}
        for key, shape in shapes.items():
            pictures = list(rng.random((*shape, 3), np.float32))
            calls[str(key)] = functools.partial(encoder.bulk_encode, pictures)
        found = timing.in_turns(calls, rounds)
        return {key: statistics.median(found[str(key)]) for key in shapes}

    by_side = times({side: (1, side, side) for side in sides})
    by_batch = times({batch: (batch, _SIDE, _SIDE) for batch in batches})
    return {
        "machine": timing.machine(),
        "tables": {
            "one picture": [
                {
                    "side": side,
                    "ms": 1000 * seconds,
                    "µs / 1000 pixels": 1e9 * seconds / side**2,
                }
                for side, seconds in by_side.items()
            ],
            f"pictures of {_SIDE} × {_SIDE}": [
                {
                    "batch": batch,
                    "ms": 1000 * seconds,
                    "ms a picture": 1000 * seconds / batch,
                }
                for batch, seconds in by_batch.items()
            ],
        },
    }


def plot(found: dict[str, Any], path: pathlib.Path) -> None:
    """Draws `measure`'s two tables.

    Raises:
      MissingExtraError: matplotlib is not installed.
    """
    errors.import_extra("matplotlib", "plot")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure((9, 4), layout="constrained")
    FigureCanvasAgg(figure)
    one, many = found["tables"].values()
    for axis, xs, ys, label in zip(
        figure.subplots(1, 2),
        ([row["side"] ** 2 for row in one], [row["batch"] for row in many]),
        ([row["ms"] for row in one], [row["ms"] for row in many]),
        ("pixels of one picture", f"pictures of {_SIDE} × {_SIDE}"),
        strict=True,
    ):
        axis.loglog(xs, ys, "o-", label="measured")
        axis.loglog(
            xs,
            [ys[-1] * x / xs[-1] for x in xs],
            "--",
            color="grey",
            label="in proportion to the last",
        )
        axis.set_xlabel(label)
        axis.set_ylabel("milliseconds")
        axis.grid(True, which="both", alpha=0.3)
        axis.legend()
    figure.savefig(path, dpi=120)
