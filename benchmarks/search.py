"""How good and how fast a search by the IVF-PQ index is, beside exact search.

    python -m benchmarks.search --rows 200000 --dim 2048 --clusters 2000
    python -m benchmarks.search --rows 200000 --directory /tmp/big --json

Vectors are drawn from clusters: the centres are independent standard normal
vectors, and every vector is the centre of a cluster drawn at random plus
`noise` times another standard normal vector. With noise 1 two vectors of one
cluster have a cosine of about 1/2, all of them within a few hundredths, so
that the nearest ten are hard to tell from the next; two of different clusters
have one of about 0. Queries are drawn alike and are not among the rows.

They are written as `bit-tf embed` writes them and indexed by
bit_tf.index.build. Recall is the share of the true ten nearest (by NumPy,
float32, over all rows) among the ten that are found. Times are medians of one
search with its ten rows read: by the index, by LanceDB without the index, and
by NumPy over normalized vectors in memory, taken in turns in one process.
Prints a Markdown table.
"""

import argparse
import dataclasses
import json
import os
import pathlib
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from tqdm import tqdm

import bit_tf
from bit_tf import embedding_table, index, ivf_pq, presets
from bit_tf.embedding_table import Row

__all__ = ["Result", "Settings", "main", "run", "table"]

_PART = 8192


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is run.

    Attributes:
      rows: vectors in the index.
      dim: their length.
      clusters: from which they are drawn.
      noise: standard deviation around a centre.
      queries: searched by the index.
      exact_queries: of these, searched exactly as well.
      k: how many nearest are asked for.
      seed: of all that is random.
    """

    rows: int = 200_000
    dim: int = 2048
    clusters: int = 2000
    noise: float = 1.0
    queries: int = 200
    exact_queries: int = 20
    k: int = 10
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class Result:
    """What was measured.

    Attributes:
      recall: of the true k nearest, in [0, 1].
      index_seconds: median time of a search by the index.
      exact_seconds: by LanceDB without it.
      numpy_seconds: by NumPy.
      build_seconds: of index.build.
      build_peak_bytes: the largest resident size until then.
      vector_bytes: of all vectors in float32.
      directory_bytes: of the index's directory.
      index_bytes: of these, the IVF-PQ index.
      indexed: rows in it.
      parameters: of it; None below ivf_pq.EXACT_BELOW rows.
    """

    recall: float
    index_seconds: float
    exact_seconds: float
    numpy_seconds: float
    build_seconds: float
    build_peak_bytes: int
    vector_bytes: int
    directory_bytes: int
    index_bytes: int
    indexed: int
    parameters: ivf_pq.Parameters | None


class _Draw:
    """Vectors from clusters, the same for the same seed."""

    def __init__(self, settings: Settings):
        self._settings = settings
        self._centres = self._normal(0, 0, settings.clusters)

    def part(self, number: int) -> np.ndarray:
        """float32 [n, dim]: the rows of one Parquet file."""
        count = min(_PART, self._settings.rows - number * _PART)
        return self._near(1, number, count)

    def parts(self) -> Iterator[np.ndarray]:
        for number in range(-(-self._settings.rows // _PART)):
            yield self.part(number)

    def queries(self) -> np.ndarray:
        return self._near(2, 0, self._settings.queries)

    def _near(self, kind: int, number: int, count: int) -> np.ndarray:
        rng = np.random.default_rng([self._settings.seed, 3, kind, number])
        chosen = rng.integers(self._settings.clusters, size=count)
        noise = self._normal(kind, number, count)
        return self._centres[chosen] + np.float32(self._settings.noise) * noise

    def _normal(self, kind: int, number: int, count: int) -> np.ndarray:
        rng = np.random.default_rng([self._settings.seed, kind, number])
        return rng.standard_normal(
            (count, self._settings.dim), dtype=np.float32
        )


def run(settings: Settings, directory: pathlib.Path) -> Result:
    """Draws, writes, builds, searches.

    Args:
      settings: what is run.
      directory: an empty one.
    """
    draw = _Draw(settings)
    _write(draw, settings, directory / "vectors")
    start = time.perf_counter()
    index.build(directory / "vectors", directory / "index")
    build_seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    opened = index.open(directory / "index")
    stats = opened.stats()
    queries = draw.queries()
    units = np.empty((settings.rows, settings.dim), np.float32)
    for number, part in enumerate(draw.parts()):
        units[number * _PART :][: len(part)] = _normalized(part)
    ways: dict[str, Callable[[np.ndarray], Sequence[int]]] = {
        "index": lambda query: _ids(opened.search(query, settings.k)),
        "exact": lambda query: _ids(
            opened.search(query, settings.k, exact=True)
        ),
        "numpy": lambda query: _nearest(units, query, settings.k),
    }
    for way in ways.values():
        way(queries[0])
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    found = 0
    step = max(1, settings.queries // settings.exact_queries)
    for number, query in enumerate(tqdm(queries, disable=None)):
        answers = {}
        for name, way in ways.items():
            if name == "exact" and number % step:
                continue
            start = time.perf_counter()
            answers[name] = set(way(query))
            seconds[name].append(time.perf_counter() - start)
        found += len(answers["index"] & answers["numpy"])
    medians = {
        name: statistics.median(times) for name, times in seconds.items()
    }
    return Result(
        recall=found / (settings.k * settings.queries),
        index_seconds=medians["index"],
        exact_seconds=medians["exact"],
        numpy_seconds=medians["numpy"],
        build_seconds=build_seconds,
        build_peak_bytes=peak,
        vector_bytes=4 * settings.rows * settings.dim,
        directory_bytes=stats.bytes,
        index_bytes=stats.index_bytes,
        indexed=stats.indexed,
        parameters=ivf_pq.parameters(settings.rows, settings.dim)
        if stats.indexed
        else None,
    )


def _write(draw: _Draw, settings: Settings, directory: pathlib.Path) -> None:
    """Writes the vectors as `bit-tf embed` does."""
    facts = embedding_table.Facts(
        model="drawn at random",
        model_hash="0" * 64,
        preset=presets.PRESETS["tfhub"],
        version=bit_tf.__version__,
        dim=settings.dim,
    )
    directory.mkdir()
    for number, part in enumerate(tqdm(draw.parts(), disable=None)):
        first = number * _PART
        embedding_table.write(
            directory / f"part-{number:05}.parquet",
            (
                Row(
                    id=str(first + place),
                    source=f"drawn/{first + place}.jpg",
                    sha256=f"{first + place:064x}",
                    width=1,
                    height=1,
                    embedding=vector,
                )
                for place, vector in enumerate(part)
            ),
            facts,
        )


def _ids(hits: Sequence[index.Hit]) -> list[int]:
    return [int(hit.row.id) for hit in hits]


def _nearest(units: np.ndarray, query: np.ndarray, k: int) -> list[int]:
    cosines = units @ query
    return np.argpartition(-cosines, k)[:k].tolist()


def _normalized(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def table(settings: Settings, result: Result) -> str:
    """The result as a Markdown table."""
    rows = [
        ("rows × dim", f"{settings.rows} × {settings.dim}"),
        ("clusters, noise", f"{settings.clusters}, {settings.noise:g}"),
        ("parameters", str(result.parameters or "none: exact")),
        (f"recall@{settings.k}", f"{result.recall:.4f}"),
        ("search by the index", f"{1000 * result.index_seconds:.1f} ms"),
        ("exact search, LanceDB", f"{1000 * result.exact_seconds:.1f} ms"),
        ("exact search, NumPy", f"{1000 * result.numpy_seconds:.1f} ms"),
        (
            "times as fast as LanceDB exact",
            f"{result.exact_seconds / result.index_seconds:.1f}",
        ),
        (
            "times as fast as NumPy",
            f"{result.numpy_seconds / result.index_seconds:.1f}",
        ),
        ("build", f"{result.build_seconds:.0f} s"),
        ("peak memory of build", f"{result.build_peak_bytes / 1e9:.2f} GB"),
        ("bytes of the vectors", str(result.vector_bytes)),
        ("bytes of the directory", str(result.directory_bytes)),
        ("bytes of the IVF-PQ index", str(result.index_bytes)),
    ]
    lines = ["| | |", "| --- | --- |"]
    return "\n".join([*lines, *(f"| {a} | {b} |" for a, b in rows)])


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description="Recall and time of search.")
    for field in dataclasses.fields(Settings):
        parser.add_argument(
            f"--{field.name.replace('_', '-')}",
            type=type(field.default),
            default=field.default,
            help="%(default)s",
        )
    parser.add_argument(
        "--directory", help="where to write (a temporary directory)"
    )
    parser.add_argument("--json", action="store_true")
    args = vars(parser.parse_args(arguments))
    folder, as_json = args.pop("directory"), args.pop("json")
    settings = Settings(**args)
    with tempfile.TemporaryDirectory(dir=folder) as directory:
        result = run(settings, pathlib.Path(directory))
    if as_json:
        row = dataclasses.asdict(settings) | dataclasses.asdict(result)
        print(json.dumps(row | {"cores": os.cpu_count()}, indent=2))
    else:
        print(table(settings, result))


if __name__ == "__main__":
    sys.exit(main())
