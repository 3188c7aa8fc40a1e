"""Names of pictures in lists: text, CSV, TSV and Parquet."""

import csv
import os
from collections.abc import Iterator, Sequence
from typing import Any

from bit_tf import errors
from bit_tf.errors import DatasetError
from bit_tf.picture_paths import is_picture, require_file

__all__ = ["SUFFIXES", "read"]

SUFFIXES = (".txt", ".csv", ".tsv", ".parquet")
_COLUMNS = ("path", "url", "source", "image", "file")
# Characters; a longer line is no list of names.
_LONGEST = 2**20
# Bytes of a list's beginning that tell text from other files.
_LOOKED_AT = 2**16
_BATCH = 1024


def read(file: str, column: str | None = None) -> Iterator[tuple[int, str]]:
    """The names in a list, in its order, a few in memory at a time.

    Args:
      file: ends in one of SUFFIXES. Text is UTF-8; other bytes are kept as
        os.fsdecode gives them.
      column: of a list with columns; by default the first of path, url,
        source, image and file that it has, or its only one.

    Yields:
      (line or, of Parquet, row from 1; path or URL). Where a row has none,
      the name is "".

    Raises:
      DatasetError: the file cannot be read, or has no such column.
    """
    suffix = os.path.splitext(file)[1].lower()
    try:
        require_file(file)
        if suffix == ".parquet":
            yield from _parquet(file, column)
        elif suffix == ".txt":
            for number, line in _lines(file):
                name = line.strip()
                if name and not name.startswith("#"):
                    yield number, _with_blanks(line, name, file)
        else:
            yield from _csv(file, column, "\t" if suffix == ".tsv" else ",")
    except OSError as error:
        raise DatasetError(
            f"A list of pictures is a file that can be read. Received: "
            f"{file!r} ({error.strerror or error}). Check the path."
        ) from error


def _with_blanks(line: str, name: str, file: str) -> str:
    """The name in a line, with the blanks around it if a file has them."""
    whole = line.rstrip("\r\n")
    folder = os.path.dirname(file)
    if whole != name and os.path.lexists(os.path.join(folder, whole)):
        return whole
    return name


def _lines(file: str) -> Iterator[tuple[int, str]]:
    """(number, line with its end), whatever its bytes."""
    with open(file, "rb") as beginning:
        if b"\0" in beginning.read(_LOOKED_AT):
            raise DatasetError(
                "A list of pictures is text in UTF-8, a name a line. "
                f"Received: {file!r}, which has a byte 0. Save it as UTF-8 "
                "text."
            )
    with open(
        file, encoding="utf-8-sig", errors="surrogateescape", newline=""
    ) as stream:
        number = 0
        while line := stream.readline(_LONGEST):
            number += 1
            if len(line) == _LONGEST or "\0" in line:
                raise DatasetError(
                    "A list of pictures is text in UTF-8, a name a line. "
                    f"Received: {file!r}, whose line {number} is none. Save "
                    "it as UTF-8 text."
                )
            yield number, line


def _csv(
    file: str, column: str | None, delimiter: str
) -> Iterator[tuple[int, str]]:
    reader = csv.reader(
        (line for _, line in _lines(file)), delimiter=delimiter, strict=True
    )
    try:
        header = [name.strip() for name in next(reader, [])]
        _check_header(header, file)
        index = header.index(_chosen(header, column, file))
        for cells in reader:
            if any(cells):
                name = cells[index].strip() if index < len(cells) else ""
                yield reader.line_num, name
    except csv.Error as error:
        raise DatasetError(
            "A list of pictures is CSV with commas (.tsv: tabs) and quotes. "
            f"Received: {file!r}, line {reader.line_num}: {error}. Mend the "
            "line."
        ) from error


def _check_header(header: Sequence[str], file: str) -> None:
    """Refuses a first row that is no header, or has other separators."""
    names = [name for name in header if "://" in name or is_picture(name)]
    if names:
        raise DatasetError(
            "A list of pictures begins with a header, the columns' names. "
            f"Received: {file!r}, which begins with {errors.brief(names[0])}. "
            "Add a header such as path; or name it .txt, where there is a "
            "name a line."
        )
    if len(header) == 1 and any(mark in header[0] for mark in ";\t|,"):
        raise DatasetError(
            "A list of pictures is CSV with commas (.tsv: tabs). Received: "
            f"{file!r}, whose header is {errors.brief(header[0])}. Write it "
            "with commas, or name it .tsv."
        )


def _parquet(file: str, column: str | None) -> Iterator[tuple[int, str]]:
    arrow = errors.import_extra("pyarrow", "parquet")
    parquet = errors.import_extra("pyarrow.parquet", "parquet")
    number = 0
    try:
        with parquet.ParquetFile(file) as table:
            chosen = _chosen(table.schema_arrow.names, column, file)
            _check_type(arrow, table.schema_arrow.field(chosen), file)
            for batch in table.iter_batches(_BATCH, columns=[chosen]):
                for value in batch.column(0).to_pylist():
                    number += 1
                    yield number, "" if value is None else os.fsdecode(value)
    except (arrow.ArrowException, UnicodeDecodeError) as error:
        raise DatasetError(
            f"A .parquet list is a Parquet file that is whole. Received: "
            f"{file!r}, after row {number}: {errors.brief(str(error))}. Write "
            "it again."
        ) from error


def _check_type(arrow: Any, field: Any, file: str) -> None:
    kind = field.type
    if arrow.types.is_dictionary(kind):
        kind = kind.value_type
    texts = (
        arrow.types.is_string,
        arrow.types.is_large_string,
        arrow.types.is_binary,
        arrow.types.is_large_binary,
    )
    if not any(test(kind) for test in texts):
        raise DatasetError(
            "A column of paths or URLs holds text. Received: "
            f"{field.name!r} of {file!r}, of type {field.type}. Name another "
            "with --column (column)."
        )


def _chosen(header: Sequence[str], column: str | None, file: str) -> str:
    """The name, as the header has it, of the column with the pictures."""
    if column is not None:
        if header.count(column) == 1:
            return column
        guesses = " or ".join(map(repr, errors.near(header, column)))
        hint = f"Did you mean {guesses}?" if guesses else "Mend the name."
        wanted = f"one column {column!r}"
    else:
        by_case = {name.lower(): name for name in reversed(header)}
        for usual in _COLUMNS:
            if usual in by_case:
                return by_case[usual]
        if len(header) == 1 and header[0]:
            return header[0]
        wanted = f"a column of {', '.join(_COLUMNS)}, or a single one"
        hint = "Name the column with --column (column)."
    raise DatasetError(
        f"A list of pictures has {wanted}, named in its header. Received: "
        f"{errors.brief(list(header))} in {file!r}. {hint}"
    )
