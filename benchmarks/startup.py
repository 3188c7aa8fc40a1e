"""Seconds from the start of Python to the first vector.

    python -m benchmarks startup

Each round starts fresh processes: one that makes the first vector of R50x1 by
BitMedium2Vec, and one that imports TensorFlow and runs a SavedModel of a single
convolution with as many bytes of weights. Says where ours spends its time.
"""

import pathlib
import statistics
import subprocess
import sys
from typing import Any

from benchmarks import memory, peers, timing

__all__ = ["measure", "save_convolution"]

_OURS = """
import sys, time
start = time.perf_counter()
import numpy, bit_tf
bit_tf.BitMedium2Vec
imported = time.perf_counter()
encoder = bit_tf.BitMedium2Vec(model_url=sys.argv[1])
loaded = time.perf_counter()
vector = encoder.encode(numpy.zeros((224, 224, 3), numpy.float32))
first = time.perf_counter()
encoder.encode(numpy.zeros((224, 224, 3), numpy.float32))
print(imported - start, loaded - imported, first - loaded,
      time.perf_counter() - first)
"""
_BARE = """
import sys, time
start = time.perf_counter()
import tensorflow as tf
imported = time.perf_counter()
model = tf.saved_model.load(sys.argv[1])
loaded = time.perf_counter()
model(tf.zeros([1, 224, 224, 3])).numpy()
first = time.perf_counter()
model(tf.zeros([1, 224, 224, 3])).numpy()
print(imported - start, loaded - imported, first - loaded,
      time.perf_counter() - first)
"""
_PARTS = ("import", "load", "first", "second")


def measure(
    folder: pathlib.Path, architecture: str = "R50x1", rounds: int = 7
) -> dict[str, Any]:
    """Seconds, and what they are spent on.

    Args:
      folder: an empty one, for the models.
      architecture: a name of variants.
      rounds: pairs of processes.
    """
    files = peers.make_files(folder, architecture)
    bare = folder / "convolution"
    save_convolution(bare, memory.size(files.ours))
    programs = {
        "bit_tf.BitMedium2Vec": (_OURS, files.ours),
        "one convolution, TensorFlow alone": (_BARE, bare),
    }
    parts: dict[str, list[list[float]]] = {name: [] for name in programs}

    def run(name: str) -> None:
        program, path = programs[name]
        done = subprocess.run(
            [sys.executable, "-c", program, str(path)],
            check=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        parts[name].append(list(map(float, done.stdout.split())))

    times = timing.in_turns(
        {name: (lambda name=name: run(name)) for name in programs},
        rounds,
        warm=1,
        again=0,
    )
    ours = "bit_tf.BitMedium2Vec"
    rows = [
        {
            "": name,
            "seconds of the process": statistics.median(times[name]),
            **{
                part: statistics.median(seconds)
                for part, seconds in zip(
                    _PARTS, zip(*parts[name][1:], strict=True), strict=True
                )
            },
            "ours takes … × as long": 1
            / timing.ratio(times[ours], times[name]),
        }
        for name in programs
    ]
    return {"machine": timing.machine(), "tables": {architecture: rows}}


def save_convolution(path: pathlib.Path, size: int) -> None:
    """A SavedModel of one convolution with that many bytes of weights.

    Most of them are of a kernel that is never applied.
    """
    import tensorflow as tf

    module = tf.Module()
    module.kernel = tf.Variable(tf.ones([7, 7, 3, 64]))
    module.rest = tf.Variable(tf.zeros([max(0, size // 4 - 7 * 7 * 3 * 64)]))
    module.__call__ = tf.function(
        lambda x: tf.nn.conv2d(x, module.kernel, 2, "SAME"),
        input_signature=[tf.TensorSpec([None, None, None, 3], tf.float32)],
    )
    tf.saved_model.save(module, str(path))
