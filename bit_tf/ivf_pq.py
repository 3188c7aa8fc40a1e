"""The index of many vectors: cells by k-means, and compressed vectors in them.

LanceDB calls it IVF-PQ. A search looks into the cells nearest to the query,
takes the candidates whose compressed vectors are nearest, and compares the
query with the whole vectors of these. Rows that are not in the index yet are
searched exactly beside it.
"""

import dataclasses
import datetime
import math
import re
from typing import Any

from bit_tf import errors

__all__ = [
    "COLUMN",
    "EXACT_BELOW",
    "REFINE_FACTOR",
    "Built",
    "Parameters",
    "cells",
    "clean",
    "find",
    "keep",
    "parameters",
]

# Rows from which there is an index.
EXACT_BELOW = 100_000
# The column of vectors.
COLUMN = "embedding"
# Whole vectors that a search compares, for every row wanted.
REFINE_FACTOR = 20

# Cells that a search looks into at least, and the rows in them for every row
# wanted.
_CELLS, _CANDIDATES = 16, 40
# How much longer it takes to read vectors here and there than one by one.
_SCATTERED = 4

_NAME = re.compile(r"ivf(\d+)_pq(\d+)")
# When rows that were added go into the index: their share of all, or how many
# pieces the table is in.
_UNINDEXED, _FRAGMENTS = 0.1, 200
# How long what somebody may still read is kept.
_KEPT = datetime.timedelta(days=1)
# LanceDB cleans up whenever it optimizes, and refuses if it would remove a
# version with a tag.
_ALL = datetime.timedelta(days=36500)


@dataclasses.dataclass(frozen=True)
class Parameters:
    """How an index is made.

    Attributes:
      num_partitions: cells into which k-means divides the vectors.
      num_sub_vectors: bytes of a compressed vector; divides its length.
      sample_rate: vectors of each cell from which k-means learns.
      max_iterations: of k-means.
    """

    num_partitions: int
    num_sub_vectors: int
    sample_rate: int
    max_iterations: int


@dataclasses.dataclass(frozen=True)
class Built:
    """An index as it is.

    Attributes:
      name: of LanceDB's.
      num_partitions, num_sub_vectors: as in Parameters.
      rows: that are in it.
      bytes: on the disk.
    """

    name: str
    num_partitions: int
    num_sub_vectors: int
    rows: int
    bytes: int


def parameters(rows: int, dim: int) -> Parameters:
    """How many rows are indexed; measured with benchmarks/search.py.

    Args:
      rows: of the table.
      dim: d, the length of a vector.
    """
    partitions = max(1, round(math.sqrt(rows)))
    # Lance compares sub-vectors of 16 or 8 numbers the fastest.
    width = next(width for width in (16, 8, 4, 2, 1) if dim % width == 0)
    return Parameters(
        num_partitions=partitions,
        num_sub_vectors=dim // width,
        sample_rate=64,
        max_iterations=20,
    )


def cells(built: Built, rows: int, k: int) -> int | None:
    """How many cells a search looks into.

    Args:
      built: the index.
      rows: of the table.
      k: how many rows are wanted.

    Returns:
      None where so many are wanted that it is faster to compare with all.
    """
    candidates = _CANDIDATES * k
    if candidates > rows // _SCATTERED:
        return None
    wanted = math.ceil(candidates * built.num_partitions / rows)
    return min(built.num_partitions, max(_CELLS, wanted))


def find(table: Any) -> Built | None:
    """The index of a LanceDB table."""
    for found in table.list_indices():
        match = _NAME.fullmatch(found.name)
        if match:
            return Built(
                found.name,
                int(match[1]),
                int(match[2]),
                found.num_indexed_rows or 0,
                found.size_bytes or 0,
            )
    return None


def keep(table: Any, dim: int) -> bool:
    """Makes the index if there are enough rows, or brings it up to date.

    It is made anew when the table has grown to four times the rows.

    Args:
      table: a LanceDB table; it gets new versions.
      dim: d, the length of a vector.

    Returns:
      Whether much was written anew, so that `clean` is worth its time.
    """
    written = table.stats()["fragment_stats"]["num_fragments"] > _FRAGMENTS
    if written:
        table.optimize(cleanup_older_than=_ALL)
    rows, built = table.count_rows(), find(table)
    if rows < EXACT_BELOW:
        if built is not None:
            table.drop_index(built.name)
        return written
    wanted = parameters(rows, dim)
    if built is None or wanted.num_partitions >= 2 * built.num_partitions:
        _make(table, wanted)
        if built is not None:
            table.drop_index(built.name)
            written = True
    elif rows - built.rows > _UNINDEXED * rows:
        table.optimize(cleanup_older_than=_ALL)
        written = True
    return written


def clean(table: Any) -> None:
    """Removes files that only versions of more than a day ago have.

    Args:
      table: a LanceDB table, of which no old version has a tag; it may get
        new versions with the same rows.
    """
    table.optimize(cleanup_older_than=_KEPT)


def _make(table: Any, chosen: Parameters) -> None:
    lance = errors.import_extra("lancedb.index", "index")
    table.create_index(
        COLUMN,
        config=lance.IvfPq(
            distance_type="cosine",
            num_partitions=chosen.num_partitions,
            num_sub_vectors=chosen.num_sub_vectors,
            sample_rate=chosen.sample_rate,
            max_iterations=chosen.max_iterations,
        ),
        # A later process reads the parameters here, which Lance does not tell.
        name=f"ivf{chosen.num_partitions}_pq{chosen.num_sub_vectors}",
        replace=True,
    )
