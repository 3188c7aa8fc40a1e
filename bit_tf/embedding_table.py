"""Tables of vectors: Parquet files that say which model made them.

A directory of them holds `part-*.parquet`, which any Parquet reader takes as
one table. The schema's metadata says what made the vectors.

A row without a vector holds a list of d nulls, not a null: pyarrow before 26
writes nulls among lists of fixed size, but cannot read them (arrow issue
35692). `error IS NULL` tells the rows with a vector.
"""

import dataclasses
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from bit_tf import errors, files
from bit_tf.errors import DatasetError
from bit_tf.presets import Preset

__all__ = [
    "ROW_GROUP",
    "Facts",
    "Row",
    "checked",
    "parquet_file",
    "part_paths",
    "read_facts",
    "record_batch",
    "rows_of",
    "schema",
    "write",
]

# Rows of a row group.
ROW_GROUP = 256
# What is rounded to infinity in half precision.
_HALF_OVERFLOWS = 65520
_PART = re.compile(r"part-[0-9A-Za-z._-]*\.parquet")
_KEYS = ("model", "model_hash", "preset", "preset_json", "version", "dim")


class Row(NamedTuple):
    """A picture of a table, or what was wrong with it.

    Attributes:
      id: unique in the table.
      source: what a human would open.
      sha256: of the bytes, 64 hexadecimal digits; None if they were not read.
      width, height: in pixels, of the decoded picture as shown; None on error.
      embedding: float32 [d]; None on error (see above).
      names: of the likeliest classes, best first; None on error or without a
        classifier.
      scores: their probabilities, in [0, 1].
      error: why there is no vector; None if there is one.
    """

    id: str
    source: str
    sha256: str | None = None
    width: int | None = None
    height: int | None = None
    embedding: np.ndarray | None = None
    names: Sequence[str] | None = None
    scores: Sequence[float] | None = None
    error: str | None = None


@dataclasses.dataclass(frozen=True)
class Facts:
    """What made the vectors of a table.

    Attributes:
      model: its handle, as it was given.
      model_hash: bit_tf.model_hash.content_hash of it.
      preset: how pictures were prepared.
      version: of bit_tf.
      dim: d, the length of a vector.
      float16: whether vectors are kept in half precision.
      top: how many classes a picture has in `names`; 0 is no such columns.
      precision: that the model multiplied in, of conv_precision.PRECISIONS.
    """

    model: str
    model_hash: str
    preset: Preset
    version: str
    dim: int
    float16: bool = False
    top: int = 0
    precision: str = "float32"

    def schema(self):
        """The pyarrow.Schema of a table with these facts.

        Raises:
          MissingExtraError: pyarrow is not installed.
        """
        return schema(
            self.dim,
            model={
                "model": self.model,
                "model_hash": self.model_hash,
                "preset": self.preset.name,
                "preset_json": json.dumps(dataclasses.asdict(self.preset)),
                "version": self.version,
                "dim": str(self.dim),
                "top": str(self.top),
                "precision": self.precision,
            },
            float16=self.float16,
            classes=self.top > 0,
        )

    @classmethod
    def of(cls, found, where: str = "a table") -> "Facts":
        """The facts in a pyarrow.Schema's metadata.

        Args:
          found: of a file that was written with `Facts.schema`.
          where: its name in messages.

        Raises:
          DatasetError: it was not.
        """
        metadata = found.metadata or {}
        missing = [key for key in _KEYS if key.encode() not in metadata]
        try:
            if missing:
                raise ValueError(f"no {' and no '.join(missing)}")
            text = {key: metadata[key.encode()].decode() for key in _KEYS}
            preset = Preset(**json.loads(text["preset_json"]))
            preset.check()
            kind = str(found.field("embedding").type)
            facts = cls(
                model=text["model"],
                model_hash=text["model_hash"],
                preset=preset,
                version=text["version"],
                dim=int(text["dim"]),
                float16="halffloat" in kind,
                top=int(metadata.get(b"top", b"0")),
                precision=metadata.get(b"precision", b"float32").decode(),
            )
            if facts.dim < 1:
                raise ValueError(f"dim {facts.dim}")
            expected = facts.schema()
            if not found.equals(expected):
                raise ValueError(
                    f"columns {errors.brief(_columns(found))} in the place of "
                    f"{_columns(expected)}"
                )
        except (ValueError, TypeError, KeyError) as error:
            raise DatasetError(
                "A table of vectors has the columns and the metadata that "
                f"bit-tf embed writes. Received: {where} ({error}). Write it "
                "with: bit-tf embed SOURCE --output DIR"
            ) from error
        return facts

    def require_same(self, other: "Facts", where: str, remedy: str) -> None:
        """Refuses vectors that cannot be kept or compared with these.

        The handle may be another, if the model is the same, and the version
        of bit_tf.

        Args:
          other: of what is to be added.
          where: the name of what has these facts, in the message.
          remedy: what to do, a sentence.

        Raises:
          DatasetError: they differ; the message says both.
        """
        mine, others = self._compared(), other._compared()
        different = [key for key in mine if mine[key][0] != others[key][0]]
        if different:
            have = ", ".join(f"{key} {mine[key][1]}" for key in different)
            received = ", ".join(f"{key} {others[key][1]}" for key in different)
            raise DatasetError(
                "Vectors of one table are of one model, preset, type and "
                f"precision. "
                f"{where} has {have}. Received: {received}. {remedy}"
            )

    def _compared(self) -> dict[str, tuple[Any, str]]:
        """What must be the same, and how a message shows it."""
        preset = dataclasses.asdict(self.preset)
        del preset["source"]
        shown = ", ".join(f"{key}={preset[key]!r}" for key in preset)
        kind = "float16" if self.float16 else "float32"
        return {
            "model": (
                self.model_hash,
                f"{self.model} (hash {self.model_hash[:12]}…)",
            ),
            "preset": (preset, f"({shown})"),
            "d": (self.dim, str(self.dim)),
            "type": (kind, kind),
            "precision": (self.precision, self.precision),
            "classes": (self.top, str(self.top)),
        }


def schema(
    dim: int,
    *,
    model: Mapping[str, str],
    float16: bool = False,
    classes: bool = False,
):
    """The columns of a table of vectors.

    Args:
      dim: d, the length of a vector.
      model: the metadata: what made the vectors (see Facts.schema).
      float16: whether vectors are kept in half precision.
      classes: whether there are names and scores.

    Returns:
      A pyarrow.Schema.

    Raises:
      MissingExtraError: pyarrow is not installed.
    """
    arrow = errors.import_extra("pyarrow", "parquet")
    kind = arrow.float16() if float16 else arrow.float32()
    fields = [
        ("id", arrow.string()),
        ("source", arrow.string()),
        ("sha256", arrow.string()),
        ("width", arrow.int32()),
        ("height", arrow.int32()),
        ("embedding", arrow.list_(kind, dim)),
    ]
    if classes:
        fields += [
            ("names", arrow.list_(arrow.string())),
            ("scores", arrow.list_(arrow.float32())),
        ]
    fields.append(("error", arrow.string()))
    return arrow.schema(fields, metadata=dict(model))


def checked(row: Row, facts: Facts) -> Row:
    """A row that a table can hold.

    Returns:
      The row; with an error in the place of its vector, if that has numbers
      that are not finite, or that half precision cannot hold.

    Raises:
      DatasetError: it has neither a vector nor an error, or a vector of
        another length.
    """
    if row.embedding is None and row.error is not None:
        return row
    vector = np.asarray(row.embedding)
    if row.embedding is None or vector.shape != (facts.dim,):
        what = "no vector" if row.embedding is None else f"{vector.shape}"
        raise DatasetError(
            f"A row has an error, or a vector of shape ({facts.dim},). "
            f"Received: {what} of {row.id!r}. Encode it with this model."
        )
    infinite = np.count_nonzero(~np.isfinite(vector))
    largest = float(np.max(np.abs(vector), initial=0))
    if infinite:
        error = (
            "A model gives finite numbers. Received: a vector with "
            f"{infinite} of {facts.dim} that are not. Choose another model or "
            "preset, or leave the picture out."
        )
    elif facts.float16 and largest >= _HALF_OVERFLOWS:
        error = (
            "Half precision (--float16) holds numbers up to 65504. Received: "
            f"a vector with one of {largest:.6g}. Leave out --float16."
        )
    else:
        return row
    return Row(row.id, row.source, row.sha256, error=error)


def record_batch(rows: Sequence[Row], facts: Facts):
    """Rows as a pyarrow.RecordBatch; see `checked`.

    Raises:
      DatasetError: a row has neither a vector nor an error, or a vector of
        another length.
      MissingExtraError: pyarrow is not installed.
    """
    arrow = errors.import_extra("pyarrow", "parquet")
    expected = facts.schema()
    rows = [checked(row, facts) for row in rows]
    kind = np.float16 if facts.float16 else np.float32
    vectors = np.zeros((len(rows), facts.dim), kind)
    missing = np.zeros((len(rows), facts.dim), bool)
    for number, row in enumerate(rows):
        if row.embedding is None:
            missing[number] = True
        else:
            vectors[number] = row.embedding
    values = arrow.array(vectors.reshape(-1), mask=missing.reshape(-1))
    arrays = [
        arrow.FixedSizeListArray.from_arrays(values, facts.dim).cast(field.type)
        if field.name == "embedding"
        else arrow.array([getattr(row, field.name) for row in rows], field.type)
        for field in expected
    ]
    return arrow.RecordBatch.from_arrays(arrays, schema=expected)


def rows_of(batch) -> list[Row]:
    """The rows of a pyarrow.RecordBatch or Table; its inverse."""
    columns = {
        name: batch.column(name).to_pylist()
        for name in batch.schema.names
        if name in Row._fields and name != "embedding"
    }
    vectors = batch.column("embedding")
    width = vectors.type.list_size
    if hasattr(vectors, "combine_chunks"):
        vectors = vectors.combine_chunks()
    values = np.asarray(vectors.flatten()).reshape(-1, width)
    values = values.astype(np.float32, copy=False)
    rows = []
    for number in range(batch.num_rows):
        cells: dict[str, Any] = {
            name: column[number] for name, column in columns.items()
        }
        if cells["error"] is None:
            cells["embedding"] = values[number]
        rows.append(Row(**cells))
    return rows


def write(target, rows: Iterable[Row], facts: Facts) -> None:
    """Writes one Parquet file.

    Args:
      target: a path, at which the file appears whole by rename; or a binary
        file object.
      rows: taken as they come.
      facts: what made them.

    Raises:
      MissingExtraError: pyarrow is not installed.
      OSError: it cannot be written; what was at the path is still there.
    """
    parquet = errors.import_extra("pyarrow.parquet", "parquet")
    if isinstance(target, str | os.PathLike):
        with files.new_file(target) as file:
            write(file, rows, facts)
        return
    # Floats repeat too rarely for a dictionary of them.
    with parquet.ParquetWriter(
        target,
        facts.schema(),
        compression="zstd",
        use_dictionary=["names.list.element"],
        write_page_checksum=True,
    ) as writer:
        group: list[Row] = []
        for row in rows:
            group.append(row)
            if len(group) == ROW_GROUP:
                writer.write_batch(record_batch(group, facts))
                group = []
        if group:
            writer.write_batch(record_batch(group, facts))


def parquet_file(file):
    """A pyarrow.parquet.ParquetFile that notices damaged pages.

    Args:
      file: a path, or a binary file object.

    Raises:
      MissingExtraError: pyarrow is not installed.
      OSError or pyarrow.ArrowException: it cannot be read; what it reads later
        raises too.
    """
    parquet = errors.import_extra("pyarrow.parquet", "parquet")
    return parquet.ParquetFile(file, page_checksum_verification=True)


def part_paths(directory: str | os.PathLike[str]) -> list[str]:
    """The shards of a directory, `part-*.parquet`, in the order of numbers.

    Raises:
      DatasetError: it is no directory that can be read.
    """
    try:
        names = sorted(
            filter(_PART.fullmatch, os.listdir(directory)), key=_by_number
        )
    except OSError as error:
        raise DatasetError(
            "A table of vectors is a directory of part-*.parquet, or one such "
            f"file. Received: {os.fspath(directory)!r} ({error.strerror}). "
            "Write one with: bit-tf embed SOURCE --output DIR"
        ) from error
    return [os.path.join(directory, name) for name in names]


def _by_number(name: str) -> list[str | int]:
    """Sorts part-100000 after part-99999."""
    parts = re.split("([0-9]+)", name)
    return [int(part) if n % 2 else part for n, part in enumerate(parts)]


def read_facts(path: str | os.PathLike[str]) -> Facts:
    """What made a table.

    Args:
      path: a Parquet file, or a directory of them, of which all must agree.

    Raises:
      DatasetError: it is no table of vectors, is damaged, or its files differ.
      MissingExtraError: pyarrow is not installed.
    """
    path = os.fsdecode(path)
    if not os.path.isdir(path):
        return _facts_of_file(path)
    paths = part_paths(path)
    if not paths:
        raise DatasetError(
            "A table of vectors has part-*.parquet. Received: "
            f"{path!r} without one. Write it with: bit-tf embed SOURCE "
            "--output DIR"
        )
    first = _facts_of_file(paths[0])
    for other in paths[1:]:
        first.require_same(
            _facts_of_file(other),
            repr(paths[0]),
            f"Move {other!r} away, or write all anew with --overwrite.",
        )
    return first


def _facts_of_file(path: str) -> Facts:
    arrow = errors.import_extra("pyarrow", "parquet")
    parquet = errors.import_extra("pyarrow.parquet", "parquet")
    try:
        found = parquet.read_schema(path)
    except (OSError, arrow.ArrowException) as error:
        raise DatasetError(
            "A table of vectors is a whole Parquet file. Received: "
            f"{path!r} ({errors.brief(str(error))}). Write it anew, or restore "
            "it."
        ) from error
    return Facts.of(found, repr(path))


def _columns(found) -> str:
    return ", ".join(f"{field.name} {field.type}" for field in found)
