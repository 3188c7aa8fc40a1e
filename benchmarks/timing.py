"""Times in turns, what they are compared with, and where they were taken."""

import importlib.metadata
import json
import os
import pathlib
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from bit_tf import files, variants

__all__ = [
    "in_turns",
    "machine",
    "markdown",
    "matrix_product",
    "multiply_accumulates",
    "ratio",
    "write",
]

# Packages whose versions matter.
_PACKAGES = (
    *("bit-tf", "tensorflow", "keras", "numpy", "torch", "transformers"),
    *("onnxruntime", "openvino", "jax", "timm"),
)
# Side of the matrices whose product is the peak.
_SIDE = 2048
_FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "amx_tile")


def in_turns(
    calls: Mapping[str, Callable[[], Any]],
    rounds: int,
    warm: int = 2,
    pause: float = 0.05,
    again: int = 1,
) -> dict[str, list[float]]:
    """Seconds of every call, round by round, all of them in every round.

    Args:
      calls: name → what is timed.
      rounds: how often.
      warm: calls of each before, not timed.
      pause: seconds between ways, in which the threads of one library that
        wait busily for work fall asleep.
      again: calls in every turn that come first and are not timed: they bring
        back what others drove from the caches.
    """
    for call in calls.values():
        for _ in range(warm):
            call()
    found: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(rounds):
        # Nobody is always behind the same other.
        names = list(calls)
        at = number % len(names)
        for name in names[at:] + names[:at]:
            time.sleep(pause)
            for _ in range(again):
                calls[name]()
            start = time.perf_counter()
            calls[name]()
            found[name].append(time.perf_counter() - start)
    return found


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """How many times as fast ours is: the median of the rounds' ratios."""
    return statistics.median(
        their / our for our, their in zip(ours, theirs, strict=True)
    )


def multiply_accumulates(architecture: str, height: int, width: int) -> int:
    """Of the convolutions for one picture, without a head."""
    row = variants.architecture(architecture)

    def halved(*sides: int) -> tuple[int, ...]:
        return tuple(-(-side // 2) for side in sides)

    sides = halved(height, width)
    total = sides[0] * sides[1] * 7 * 7 * 3 * row.stem_width
    sides = halved(*sides)
    inputs = row.stem_width
    for block, units in enumerate(row.blocks):
        middle = row.stem_width * 2**block
        for unit in range(units):
            before = sides[0] * sides[1]
            if unit == 0 and block > 0:
                sides = halved(*sides)
            after = sides[0] * sides[1]
            total += before * inputs * middle
            total += after * (9 * middle * middle + middle * 4 * middle)
            if unit == 0:
                total += after * inputs * 4 * middle
            inputs = 4 * middle
    return total


def matrix_product(dtype: str = "float32", tries: int = 5) -> float:
    """Floating-point operations a second of TensorFlow's matrix product."""
    import tensorflow as tf

    matrix = tf.cast(tf.random.stateless_normal([_SIDE, _SIDE], [0, 1]), dtype)
    product = tf.function(tf.matmul)
    seconds = []
    for _ in range(tries + 1):
        start = time.perf_counter()
        product(matrix, matrix).numpy()
        seconds.append(time.perf_counter() - start)
    return 2 * _SIDE**3 / min(seconds[1:])


def machine() -> dict[str, Any]:
    """The processor, its cores and flags, and versions of what is installed."""
    text = ""
    path = pathlib.Path("/proc/cpuinfo")
    if path.exists():
        text = path.read_text()
    facts = dict(
        map(str.strip, line.split(":", 1))
        for line in text.splitlines()
        if ":" in line
    )
    flags = facts.get("flags", "").split()
    versions = {}
    for name in _PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "processor": facts.get("model name", platform.processor()),
        "cores": os.cpu_count(),
        "flags": [flag for flag in _FLAGS if flag in flags],
        "python": platform.python_version(),
        "system": platform.platform(),
        "versions": versions,
    }


def markdown(rows: Iterable[Mapping[str, Any]]) -> str:
    """A table of rows with the same keys."""
    rows = list(rows)
    if not rows:
        return ""
    names = list(rows[0])
    lines = [names, ["---"] * len(names)]
    lines += [[_text(row.get(name)) for name in names] for row in rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def write(
    folder: str | os.PathLike[str] | None, name: str, found: Mapping[str, Any]
) -> None:
    """Prints a benchmark's tables; writes them as markdown and JSON, too.

    Args:
      folder: where to; None only prints.
      name: of the benchmark.
      found: {"machine": …, "tables": {title: rows}, …}.
    """
    here = found["machine"]
    versions = ", ".join(f"{k} {v}" for k, v in here["versions"].items())
    lines = [
        f"# python -m benchmarks {name}",
        "",
        f"{here['processor']}, {here['cores']} cores "
        f"({', '.join(here['flags'])}); Python {here['python']}; {versions}",
    ]
    for title, rows in found["tables"].items():
        lines += ["", f"{title}:", "", markdown(rows)]
    text = "\n".join(lines) + "\n"
    print(text, flush=True)
    if folder is not None:
        os.makedirs(folder, exist_ok=True)
        for suffix, data in (
            (".md", text),
            (".json", json.dumps(found, indent=2) + "\n"),
        ):
            with files.new_file(pathlib.Path(folder, name + suffix)) as file:
                file.write(data.encode())


def _text(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.2e}" if abs(value) < 0.001 else f"{value:.4g}"
    return str(value)
