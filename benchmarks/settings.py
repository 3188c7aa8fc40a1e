"""What TensorFlow's settings do to the speed of `encode`.

    python -m benchmarks settings

R50x1, one picture and eight of 224 × 224, each setting in a process of its own,
all of them in turns: medians of all processes, and how many times as fast each
is as what bit_tf leaves as it is.
"""

import os
import pathlib
import statistics
import time
from typing import Any
from unittest import mock

import numpy as np

from benchmarks import peers, processes, timing

__all__ = ["SETTINGS", "measure"]

_SIDE = 224
_ROUNDS = 15
# Name → environment, and threads within an operation or None. Operations are
# started one after the other whatever is set.
SETTINGS: dict[str, tuple[dict[str, str], int | None]] = {
    "as it is": ({}, None),
    "without oneDNN": ({"TF_ENABLE_ONEDNN_OPTS": "0"}, None),
    "one thread an operation": ({}, 1),
    "twice as many threads as cores": ({}, 2 * (os.cpu_count() or 1)),
    "memory in large pages": (
        {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"},
        None,
    ),
}


def measure(
    folder: pathlib.Path,
    architecture: str = "R50x1",
    batches: tuple[int, ...] = (1, 8),
    turns: int = 3,
) -> dict[str, Any]:
    """A table of each batch.

    Args:
      folder: an empty one, for the network's files.
      architecture: a name of variants.
      batches: of pictures of 224 × 224.
      turns: processes of every setting.
    """
    files = peers.make_files(folder, architecture)
    found: dict[str, list[list[float]]] = {name: [] for name in SETTINGS}
    for _ in range(turns):
        for name, (environment, threads) in SETTINGS.items():
            with mock.patch.dict(os.environ, environment):
                found[name].append(
                    processes.fresh(_seconds, str(files.ours), batches, threads)
                )
    tables = {}
    for index, batch in enumerate(batches):
        seconds = {
            name: statistics.median(turn[index] for turn in done)
            for name, done in found.items()
        }
        tables[f"batch {batch}, {_SIDE} × {_SIDE}"] = [
            {
                "": name,
                "ms": 1000 * value,
                "× as fast as it is": seconds["as it is"] / value,
            }
            for name, value in seconds.items()
        ]
    return {"machine": timing.machine(), "tables": tables}


def _seconds(
    model: str,
    batches: tuple[int, ...],
    threads: int | None,
) -> list[float]:
    """Medians of this process, which has not started TensorFlow."""
    import tensorflow as tf

    import bit_tf

    if threads is not None:
        tf.config.threading.set_intra_op_parallelism_threads(threads)
    encoder = bit_tf.BitMedium2Vec(model)
    rng = np.random.default_rng(0)
    found = []
    for batch in batches:
        pictures = list(rng.random((batch, _SIDE, _SIDE, 3), np.float32))
        seconds = []
        for _ in range(_ROUNDS + 2):
            start = time.perf_counter()
            encoder.bulk_encode(pictures)
            seconds.append(time.perf_counter() - start)
        found.append(statistics.median(seconds[2:]))
    return found
