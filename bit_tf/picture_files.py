"""Labelled picture files: class folders, and lists in CSV files."""

import collections
import csv
import os
import pathlib
import re
import statistics
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from absl import logging
from PIL import Image

from bit_tf import download, errors, images
from bit_tf.errors import DatasetError, ImageError

__all__ = [
    "REMEDY",
    "SUFFIXES",
    "FileSource",
    "Found",
    "as_text",
    "check_classes",
    "from_csv",
    "from_folder",
]

# Of the files that are taken for pictures, in lower case.
SUFFIXES = frozenset(
    ".jpg .jpeg .jpe .jfif .png .gif .bmp .dib .webp .tif .tiff .ppm .pgm "
    ".pbm .pnm .ico .jp2 .j2k .jpx .avif".split()
)
_SPLITS = {
    "train": "train",
    "training": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "test": "test",
}
_PATHS = ("path", "image", "file")
_SAMPLE = 200
_ORIENTATION, _TURNED = 0x0112, (5, 6, 7, 8)
_SHOWN = 5
# Ends what is said of a file that cannot be used.
REMEDY = (
    "Mend the file, or leave out all that are damaged: bad_images='skip' "
    "(--bad-images skip; look first which: bit-tf finetune … --bad-images "
    "skip --dry-run)."
)


class Found(NamedTuple):
    """What a folder or a list holds.

    Attributes:
      class_names: of the labels 0, 1, ….
      splits: "train", "validation", "test", those that exist.
    """

    class_names: tuple[str, ...]
    splits: dict[str, "FileSource"]


class FileSource:
    """Pictures in files, in a fixed order, with their labels."""

    def __init__(
        self, paths: Sequence[str], identifiers: Sequence[str], labels: Iterable
    ) -> None:
        self._paths = paths
        self._identifiers = identifiers
        self.labels = np.asarray(list(labels), np.int64)

    def identifier(self, position: int) -> str:
        """The file's name below the dataset's root."""
        return self._identifiers[position]

    def read(self, position: int) -> bytes:
        """The bytes of one file.

        Raises:
          ImageError: it cannot be read; the message names it.
        """
        path = self._paths[position]
        try:
            return download.read_source(pathlib.Path(path))
        except ImageError as error:
            raise _named(error, path) from error

    def records(self, order: Iterable[int]) -> Iterator[bytes]:
        """The bytes of files in this order; raises as `read` does."""
        return map(self.read, order)

    def picture(self, record: bytes, position: int) -> np.ndarray:
        """uint8 [h, w, 3] of a file's bytes.

        Raises:
          ImageError: they are no whole picture; the message names the file.
        """
        try:
            return images.decode(record)
        except ImageError as error:
            raise _named(error, self._paths[position]) from error

    def stamp(self, position: int) -> tuple[int, int]:
        """(bytes, time of the last change in ns): others for other pixels."""
        try:
            facts = os.stat(self._paths[position])
        except OSError:
            return 0, 0
        return facts.st_size, facts.st_mtime_ns

    def typical_size(self, positions: np.ndarray) -> tuple[int, int] | None:
        """The median (height, width) in the headers of up to 200 files."""
        step = max(1, len(positions) // _SAMPLE)
        sizes = [
            size
            for position in positions[::step][:_SAMPLE]
            if (size := _size(self._paths[position])) is not None
        ]
        if not sizes:
            return None
        heights, widths = zip(*sizes, strict=True)
        return (
            round(statistics.median(heights)),
            round(statistics.median(widths)),
        )


def from_folder(
    directory: str | os.PathLike[str],
    class_names: Sequence[str] | None = None,
) -> Found:
    """The pictures of class folders.

    `directory` has a folder for each class, or folders "train" or "training",
    "validation", "valid" or "val", and "test", with class folders in each.
    Pictures may lie deeper in a class folder. Links are followed. What is
    hidden, or no picture by its suffix, is left out, with one warning.

    Args:
      directory: the root.
      class_names: all classes in their order; by default the names of the
        class folders of train (of test, where there is no train), sorted; as
        numbers, if all are integers.

    Raises:
      DatasetError: no such folder, no class folders, an empty one, fewer than
        two classes, or a class that train does not have.
    """
    root = os.path.abspath(directory)
    if not os.path.isdir(root):
        what = "a file" if os.path.exists(root) else "nothing"
        raise DatasetError(
            "folder: names a directory of class folders. Received: "
            f"{os.fspath(directory)!r}, where there is {what}. Check the path; "
            "a list of files is csv:FILE."
        )
    ignored: list[str] = []
    folders = _split_folders(root, _folders(root, ignored), ignored)
    names = None if class_names is None else list(class_names)
    splits = {}
    for split, folder in folders.items():
        by_class = {
            as_text(entry.name): entry for entry in _folders(folder, ignored)
        }
        if names is None:
            names = _sorted(by_class)
            _warn_of_case(names)
        _check_known(by_class, names, folder)
        check_classes(names, folder)
        files: list[tuple[str, int]] = []
        for name in sorted(by_class):
            entry = by_class[name]
            found = sorted(_pictures(entry.path, ignored, ()))
            if not found:
                raise DatasetError(
                    "A class folder holds at least one picture. Received: the "
                    f"empty class folder {entry.path!r}. Put pictures there, "
                    "or remove it."
                )
            label = names.index(name)
            files += [(path, label) for path in found]
        paths = [path for path, _ in files]
        splits[split] = FileSource(
            paths,
            [as_text(pathlib.Path(os.path.relpath(p, root))) for p in paths],
            [label for _, label in files],
        )
    # The root is looked at twice where it is the folder of train.
    ignored = sorted(set(ignored))
    if ignored:
        logging.warning(
            "%d files below %s were ignored, which are no pictures by their "
            "suffix or lie outside class folders, such as %s",
            len(ignored),
            root,
            as_text(ignored[0]),
        )
    return Found(tuple(names or ()), splits)


def from_csv(
    file: str | os.PathLike[str], class_names: Sequence[str] | None = None
) -> Found:
    """The pictures that a CSV file lists.

    UTF-8, commas, a header. Columns: `path` (or `image`, or `file`), relative
    to the CSV file; `label`, a name; and if wanted `split`: train, validation
    or test, otherwise all is train.

    Args:
      file: the CSV file.
      class_names: all classes in their order. Where the labels are integers
        and the names are not, they are positions in it. By default the
        distinct labels, sorted; as numbers, if all are integers.

    Raises:
      DatasetError: the file cannot be read, or a line (whose number is said)
        has no picture or no label that exists.
    """
    rows = list(_rows(file))
    if not rows:
        raise DatasetError(
            "A list of pictures has lines below its header. Received: "
            f"{os.fspath(file)!r} without any. List pictures."
        )
    names, label_of = _labels_of(rows, class_names, file)
    check_classes(names, os.fspath(file))
    root = os.path.dirname(os.path.abspath(file))
    _check_rows(rows, root, file)
    splits = {}
    for split in dict.fromkeys(_SPLITS.values()):
        chosen = [row for row in rows if row.split == split]
        if chosen:
            splits[split] = FileSource(
                [os.path.join(root, row.path) for row in chosen],
                [as_text(row.path) for row in chosen],
                [label_of[row.label] for row in chosen],
            )
    return Found(tuple(names), splits)


def check_classes(names: Sequence[str], where: str) -> None:
    """Refuses fewer than two classes, and a name twice.

    Raises:
      DatasetError: as said; `where` is named.
    """
    counts = collections.Counter(names)
    twice = [name for name, count in counts.items() if count > 1]
    if len(names) < 2 or twice:
        raise DatasetError(
            "A dataset has two classes or more, each with its own name. "
            f"Received: {errors.brief(list(twice or names))}"
            f"{' twice' if twice else ''} in {where!r}. Add pictures of "
            "another class, or name the classes apart."
        )


class _Row(NamedTuple):
    line: int
    path: str
    label: str
    split: str


def _rows(file: str | os.PathLike[str]) -> Iterator[_Row]:
    shown = repr(os.fspath(file))
    try:
        with open(file, encoding="utf-8-sig", newline="") as stream:
            reader = csv.reader(stream, strict=True)
            try:
                yield from _parsed(reader, shown)
            except csv.Error as error:
                raise DatasetError(
                    "A list of pictures is CSV with commas and quotes. "
                    f"Received: {shown}, line {reader.line_num}: {error}. "
                    "Mend the line."
                ) from error
    except UnicodeDecodeError as error:
        raise DatasetError(
            f"A list of pictures is UTF-8 text. Received: {shown}, which is "
            f"not ({error.reason} at byte {error.start}). Save it as UTF-8."
        ) from error
    except OSError as error:
        raise DatasetError(
            f"csv: names a file that can be read. Received: {shown} "
            f"({error.strerror}). Check the path."
        ) from error


def _parsed(reader, shown: str) -> Iterator[_Row]:
    header = [name.strip().lower() for name in next(reader, [])]
    paths = [name for name in _PATHS if name in header]
    if len(paths) != 1 or header.count(paths[0]) + header.count("label") != 2:
        raise DatasetError(
            "The header of a list of pictures has one column 'path' (or "
            "'image', or 'file') and one 'label', with commas between. "
            f"Received: {errors.brief(header)} in {shown}. Mend the header."
        )
    for cells in reader:
        if not any(cells):
            continue
        where = f"{shown}, line {reader.line_num}"
        if len(cells) != len(header):
            raise DatasetError(
                f"Each line has as many cells as the header: {len(header)}. "
                f"Received: {len(cells)} in {where}. Quote cells with commas."
            )
        row = dict(zip(header, cells, strict=True))
        path, label = row[paths[0]], row["label"].strip()
        split = row.get("split", "train").strip().lower()
        if not path or not label or split not in _SPLITS:
            raise DatasetError(
                "A line has a path, a label, and where there is such a "
                f"column a split: {', '.join(_SPLITS)}. Received: "
                f"{errors.brief(cells)} in {where}. Mend the line."
            )
        yield _Row(reader.line_num, path, label, _SPLITS[split])


def _labels_of(
    rows: list[_Row],
    class_names: Sequence[str] | None,
    file: str | os.PathLike[str],
) -> tuple[list[str], Mapping[str, int]]:
    """Class names, and label as written → position among them."""
    written = {row.label for row in rows}
    numbers = all(map(_is_integer, written))
    if class_names is None:
        names = _sorted(written)
        _warn_of_case(names)
    else:
        names = list(class_names)
    label_of = {name: index for index, name in enumerate(names)}
    if numbers and not any(map(_is_integer, names)):
        label_of = {
            text: int(text) for text in written if 0 <= int(text) < len(names)
        }
    for row in rows:
        if row.label not in label_of:
            guesses = errors.near(names, row.label)
            hint = f" Did you mean {guesses[0]!r}?" if guesses else ""
            raise DatasetError(
                f"A label is one of {len(names)} class names, or a number "
                f"from 0 to {len(names) - 1}. Received: {row.label!r} in "
                f"{os.fspath(file)!r}, line {row.line}.{hint} Mend the line "
                "or the class names."
            )
    return names, label_of


def _sorted(names: Iterable[str]) -> list[str]:
    """In order; as numbers, if all are integers."""
    found = sorted(names)
    if all(map(_is_integer, found)):
        found.sort(key=int)
    return found


def _is_integer(text: str) -> bool:
    return re.fullmatch(r"-?[0-9]{1,9}", text) is not None


def _check_rows(
    rows: list[_Row], root: str, file: str | os.PathLike[str]
) -> None:
    """Refuses files that are missing, and one with two labels."""
    missing = []
    seen: dict[str, _Row] = {}
    for row in rows:
        try:
            there = os.path.isfile(os.path.join(root, row.path))
        except ValueError:
            there = False
        if not there:
            missing.append(f"{row.path!r} (line {row.line})")
        first = seen.setdefault(row.path, row)
        if first.label != row.label:
            raise DatasetError(
                "A picture has one label. Received: "
                f"{row.path!r} in {os.fspath(file)!r}, as {first.label!r} on "
                f"line {first.line} and as {row.label!r} on line {row.line}. "
                "Remove one."
            )
        if first.split != row.split:
            logging.warning(
                "%s is in %s (line %d) and in %s (line %d) of %s",
                row.path,
                first.split,
                first.line,
                row.split,
                row.line,
                file,
            )
    if missing:
        more = "" if len(missing) <= _SHOWN else ", …"
        raise DatasetError(
            "Paths in a list of pictures are files, relative to the list. "
            f"Received: {len(missing)} that are not there in "
            f"{os.fspath(file)!r}: {', '.join(missing[:_SHOWN])}{more}. Mend "
            "the paths."
        )


def _split_folders(
    root: str, entries: list[os.DirEntry], ignored: list[str]
) -> dict[str, str]:
    """Split → its folder; all is train where no folder is a split's."""
    named = [entry for entry in entries if entry.name.lower() in _SPLITS]
    if not named or (
        len(named) < len(entries)
        and "train" not in {_SPLITS[entry.name.lower()] for entry in named}
    ):
        return {"train": root}
    found: dict[str, str] = {}
    for entry in entries:
        split = _SPLITS.get(entry.name.lower())
        if split is None:
            ignored.extend(_pictures(entry.path, ignored, ()))
        elif split in found:
            raise DatasetError(
                f"There is one folder for {split}. Received: {found[split]!r} "
                f"and {entry.path!r}. Merge them, or rename one."
            )
        else:
            found[split] = entry.path
    return {
        split: found[split]
        for split in dict.fromkeys(_SPLITS.values())
        if split in found
    }


def _check_known(
    by_class: Mapping[str, os.DirEntry], names: Sequence[str], folder: str
) -> None:
    if not by_class:
        raise DatasetError(
            "A dataset folder has one folder for each class. Received: "
            f"{folder!r} without folders. Put each class in its own."
        )
    other = sorted(set(by_class) - set(names))
    if other:
        raise DatasetError(
            f"The classes are {errors.brief(list(names))}. Received: "
            f"{errors.brief(other)} in {folder!r}. Rename or remove the "
            "folder, or add such pictures to train."
        )


def _warn_of_case(names: Sequence[str]) -> None:
    seen: dict[str, str] = {}
    for name in names:
        first = seen.setdefault(name.casefold(), name)
        if first != name:
            logging.warning(
                "Two classes differ only in case: %r and %r", first, name
            )


def _entries(folder: str) -> list[os.DirEntry]:
    """Visible entries, sorted by name."""
    try:
        with os.scandir(folder) as entries:
            visible = [e for e in entries if not e.name.startswith(".")]
    except OSError as error:
        raise DatasetError(
            "All folders of a dataset can be read. Received: "
            f"{folder!r} ({error.strerror}). Check its permissions."
        ) from error
    return sorted(visible, key=lambda entry: entry.name)


def _folders(folder: str, ignored: list[str]) -> list[os.DirEntry]:
    entries = _entries(folder)
    ignored += [entry.path for entry in entries if not entry.is_dir()]
    return [entry for entry in entries if entry.is_dir()]


def _pictures(
    folder: str, ignored: list[str], above: tuple[tuple[int, int], ...]
) -> Iterator[str]:
    """Paths of picture files below a folder; a link back up is not taken."""
    facts = os.stat(folder)
    here = (facts.st_dev, facts.st_ino)
    if here in above:
        return
    for entry in _entries(folder):
        if entry.is_dir():
            yield from _pictures(entry.path, ignored, (*above, here))
        elif os.path.splitext(entry.name)[1].lower() in SUFFIXES and (
            entry.is_file() or not os.path.exists(entry.path)
        ):
            yield entry.path
        else:
            ignored.append(entry.path)


def _size(path: str) -> tuple[int, int] | None:
    """(height, width) as a file's header says, turned as its EXIF says."""
    if not os.path.isfile(path):
        return None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(path) as picture:
                width, height = picture.size
                turned = picture.getexif().get(_ORIENTATION) in _TURNED
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return None
    return (width, height) if turned else (height, width)


def as_text(path: str | os.PathLike[str]) -> str:
    """A path as text, whatever its bytes."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def _named(error: ImageError, path: str) -> ImageError:
    """The same error, naming the file, and what to do about such files."""
    return type(error)(f"{as_text(path)!r}: {error} {REMEDY}")
