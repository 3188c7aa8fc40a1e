"""What every reader returns: a lazy, complete and consistent mapping."""

import dataclasses
import errno
import hashlib
import os
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import numpy as np

from bit_tf import errors
from bit_tf.checkpoints import layout
from bit_tf.checkpoints.facts import Facts

__all__ = [
    "Checkpoint",
    "Entry",
    "REMEDY",
    "Selection",
    "as_float32",
    "begins_like",
    "checked_shapes",
    "require_file",
    "require_place",
    "take",
]

REMEDY = "Download the file again and compare its size with the published one."

_CHUNK = 1 << 20
_MAX_EXTRA_SHOWN = 50
_SIGNATURES = (
    (b"PK", "a zip archive"),
    (b"\x1f\x8b", "gzip: decompress it first"),
    (b"\x89HDF\r\n\x1a\n", "HDF5 (.h5)"),
    (b"\x93NUMPY", "one .npy array, not an archive of them"),
    (b"\xfd7zXZ", "xz: decompress it first"),
    (b"\x80", "a Python pickle"),
    (b"version https://git-lfs", "a Git LFS pointer, not the file itself"),
    (b"<", "a web page (HTML or XML), such as an error page saved as a file"),
)


class Entry(NamedTuple):
    """One array of a checkpoint that has not been read yet.

    Attributes:
      shape: in the canonical layout.
      dtype: as the file stores it, of any byte order.
      load: reads the array, of this shape and of a dtype that is a float.
      source: its name, as the file spells it.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    load: Callable[[], np.ndarray]
    source: str = ""


class Checkpoint(Mapping[str, np.ndarray]):
    """A checkpoint: canonical name → float32 array, read when asked for.

    Every access reads the file again and keeps nothing, so that a model of
    gigabytes needs the memory of its largest array. Names, shapes and dtypes
    are compared with the layout when the object is made; the values are
    examined when they are read.

    Attributes:
      path: the file, or the directory of a format that is one.
      format: the reader's name, such as "google_npz".
      facts: whose constants the weights need, how pictures were prepared,
        class names.
      notes: what a user should know: skipped parts, layouts that are inferred,
        constants that are assumed.
      shapes: canonical name → shape, in the mapping's order (sorted).
      dtypes: canonical name → dtype in the file. The arrays are float32.
      sources: canonical name → name as the file spells it.
      extra: names in the file that are no part of the layout, as the file
        spells them. They are not in the mapping.
      blocks: units in each of the four blocks, such as (3, 4, 6, 3).
      stem_width: channels of the stem, 64 × the width factor.
      num_classes: outputs of the head; 0 without a head.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        entries: Mapping[str, Entry],
        *,
        format: str,
        facts: Facts,
        extra: tuple[str, ...] = (),
        notes: tuple[str, ...] = (),
        files: Iterable[str | os.PathLike[str]] | None = None,
        spell: Callable[[str], str] = str,
    ):
        """Checks the names, shapes and dtypes of all arrays.

        Args:
          path: the file, for messages and `sha256`.
          entries: canonical name → what `Entry` says.
          format: the reader's name.
          facts, extra, notes: see the attributes.
          files: where the arrays are; `path` if None. None of them may change
            while the object is used.
          spell: canonical name → the name that the file should have for it.

        Raises:
          CheckpointMismatchError: names or shapes are not those of a
            BiT-ResNet, with every difference.
          CheckpointFormatError: an array is not of a float dtype, or labels
            do not fit.
        """
        self.path = Path(path)
        self._stamps = {
            Path(file): _stamp(Path(file))
            for file in ([path] if files is None else files)
        }
        self.format = format
        self.facts = facts
        self.notes = tuple(notes)
        self.extra = tuple(extra)
        self._entries = {
            name: Entry(*entry) for name, entry in sorted(entries.items())
        }
        self.shapes: Mapping[str, tuple[int, ...]] = MappingProxyType(
            {name: tuple(entry.shape) for name, entry in self._entries.items()}
        )
        self.dtypes: Mapping[str, np.dtype] = MappingProxyType(
            {name: entry.dtype for name, entry in self._entries.items()}
        )
        self.sources: Mapping[str, str] = MappingProxyType(
            {name: entry.source for name, entry in self._entries.items()}
        )
        self._sha256: str | None = None
        problems = [
            _dtype_problem(self._shown(name), dtype)
            for name, dtype in self.dtypes.items()
            if not _is_float(dtype)
        ]
        if problems:
            raise errors.CheckpointFormatError(
                f"{self.path}: weights are float16, float32 or float64.\n"
                + "\n".join(problems)
            )
        try:
            detected = layout.detect(self.shapes)
            layout.check(
                self.shapes,
                layout.expected_shapes(
                    detected.blocks, detected.stem_width, detected.num_classes
                ),
                spell=spell,
            )
        except errors.CheckpointMismatchError as error:
            raise errors.CheckpointMismatchError(
                f"{self.path}: {error}{_listed(self.extra)}"
            ) from None
        self.blocks = detected.blocks
        self.stem_width = detected.stem_width
        self.num_classes = detected.num_classes
        labels = facts.labels
        if labels is not None and len(labels) != self.num_classes:
            raise errors.CheckpointFormatError(
                f"{self.path}: labels name each class. Received: "
                f"{len(labels)} labels for {self.num_classes} classes. Correct "
                "or remove them."
            )

    def _shown(self, name: str) -> str:
        source = self.sources[name]
        if source in ("", name):
            return layout.printable(name)
        return f"{name} ({layout.printable(source)})"

    def __getitem__(self, name: str) -> np.ndarray:
        """Reads one array.

        Returns:
          A new float32 array in C order and of native byte order.

        Raises:
          KeyError: no array of the layout has this name.
          CheckpointFormatError: the file is damaged there, or the array holds
            NaN, infinity, or values that float32 cannot hold.
        """
        array = self.stored(name)
        try:
            return as_float32(self._shown(name), array)
        except errors.CheckpointFormatError as error:
            raise errors.CheckpointFormatError(
                f"{self.path}: {error} {REMEDY}"
            ) from None

    def stored(self, name: str) -> np.ndarray:
        """Reads one array as the file stores it, in the canonical layout.

        Returns:
          An array of the file's dtype, whatever values it holds.

        Raises:
          KeyError: no array of the layout has this name.
          CheckpointFormatError: the file is damaged there, or it was changed
            or removed since it was opened.
        """
        entry = self._entries[name]
        for file, stamp in self._stamps.items():
            if _stamp(file) != stamp:
                raise errors.CheckpointFormatError(
                    f"{file}: a checkpoint must stay as it is while it is "
                    f"read. Received: a change before {self._shown(name)} was. "
                    "Open it again."
                )
        try:
            array = entry.load()
        except OSError as error:
            if isinstance(error, errors.BitTfError):
                raise
            raise errors.CheckpointFormatError(
                f"{self.path}: {self._shown(name)} cannot be read: {error}. "
                "Check the file and its permissions."
            ) from error
        if array.shape != entry.shape:
            raise errors.CheckpointFormatError(
                f"{self.path}: {self._shown(name)} must have shape "
                f"{entry.shape}. Received: {array.shape}. {REMEDY}"
            )
        return array

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    # Mapping's own comparison would read both files whole.
    def __eq__(self, other: object) -> bool:
        return self is other

    __hash__ = object.__hash__

    # A copy would share the files, and may outlive what keeps them.
    def __copy__(self) -> "Checkpoint":
        return self

    def __deepcopy__(self, memo: object) -> "Checkpoint":
        return self

    def __reduce__(self):
        raise TypeError(
            "A Checkpoint cannot be pickled, because it is an opened file. "
            f"Send its path, {str(self.path)!r}, and open that."
        )

    def __repr__(self) -> str:
        return (
            f"Checkpoint({str(self.path)!r}, format={self.format!r}, "
            f"blocks={self.blocks}, stem_width={self.stem_width}, "
            f"num_classes={self.num_classes})"
        )

    def sha256(self) -> str:
        """Gives the file's SHA-256 in hexadecimal, computed once.

        A directory's is that of the lines "SHA-256, two spaces, path" of its
        files, as sha256sum prints them, in the order of their paths.
        """
        if self._sha256 is None:
            if self.path.is_dir():
                lines = [
                    f"{_sha256(file)}  {file.relative_to(self.path)}\n"
                    for file in sorted(self.path.rglob("*"))
                    if file.is_file()
                ]
                text = "".join(lines).encode()
                self._sha256 = hashlib.sha256(text).hexdigest()
            else:
                self._sha256 = _sha256(self.path)
        return self._sha256


class Selection(Mapping[str, np.ndarray]):
    """The arrays of another mapping, with facts of their own.

    Args:
      arrays: canonical name → array; if it has an attribute `shapes`, no array
        is made to learn its shape.
      facts: what is said of these arrays.
      head: False leaves the classifier out, and its labels.

    Attributes:
      shapes: canonical name → shape.
      facts: what is said of the arrays.
      config: the Keras configuration of the model they come from, or None.
    """

    def __init__(
        self,
        arrays: Mapping[str, np.ndarray],
        facts: Facts,
        *,
        head: bool = True,
    ):
        shapes = getattr(arrays, "shapes", None)
        if shapes is None:
            shapes = {name: np.shape(arrays[name]) for name in arrays}
        self.shapes = {
            name: tuple(shape)
            for name, shape in shapes.items()
            if head or name not in (layout.HEAD_KERNEL, layout.HEAD_BIAS)
        }
        self.facts = facts
        if not head:
            self.facts = dataclasses.replace(facts, labels=None)
        self.config = getattr(arrays, "config", None)
        if self.config is not None:
            self.config = self.config | {
                "numerics": facts.numerics,
                "output_stride": facts.output_stride,
            }
            if not head:
                self.config["num_classes"] = 0
        self._arrays = arrays

    def __getitem__(self, name: str) -> np.ndarray:
        if name not in self.shapes:
            raise KeyError(name)
        return self._arrays[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)


def _stamp(path: Path) -> tuple[int, ...] | None:
    """What changes when a file is written or replaced; None if it is gone."""
    try:
        found = path.stat()
    except OSError:
        return None
    if stat.S_ISDIR(found.st_mode):
        return None
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def as_float32(name: str, array: np.ndarray) -> np.ndarray:
    """Converts weights to float32 in C order, of native byte order.

    Args:
      name: the array's canonical name, for messages.
      array: bfloat16, float16, float32 or float64, of any byte and memory
        order. It is returned as it is if nothing has to change.

    Raises:
      CheckpointFormatError: another dtype, or a value that is not finite in
        float32.
    """
    if not _is_float(array.dtype):
        raise errors.CheckpointFormatError(
            "Weights are float16, float32 or float64. "
            + _dtype_problem(name, array.dtype)
        )
    with np.errstate(over="ignore"):
        result = np.ascontiguousarray(array, dtype=np.float32)
    result = result.reshape(array.shape)
    flat = result.reshape(-1)
    for start in range(0, flat.size, _CHUNK):
        finite = np.isfinite(flat[start : start + _CHUNK])
        if not finite.all():
            index = start + int(np.argmin(finite))
            received = array[np.unravel_index(index, array.shape)]
            raise errors.CheckpointFormatError(
                f"Weights must be finite in float32. Received: {name} holds "
                f"{received} at position {index} of {flat.size}."
            )
    return result


def require_file(path: Path) -> None:
    """Refuses what is not a file, before a reader opens it.

    Raises:
      FileNotFoundError: nothing is at the path.
      CheckpointFormatError: a directory is there, or a device.
    """
    if not path.exists():
        raise FileNotFoundError(
            errno.ENOENT,
            "A checkpoint must be an existing file; look for a misspelt path, "
            "or download it. Received",
            str(path),
        )
    if not path.is_file():
        kind = "a directory" if path.is_dir() else "a device or a pipe"
        raise errors.CheckpointFormatError(
            f"{path}: a checkpoint is a file. Received: {kind}. Give the path "
            "of the file itself."
        )


def require_place(path: Path) -> None:
    """Refuses to write a file where none can be.

    Raises:
      IsADirectoryError, FileNotFoundError: with the remedy.
    """
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a directory; give a file's path.")
    if not path.parent.is_dir():
        raise FileNotFoundError(
            f"{path.parent} is not a directory; make it before writing "
            f"{path.name}."
        )


def checked_shapes(
    arrays: Mapping[str, np.ndarray],
) -> dict[str, tuple[int, ...]]:
    """The shapes of arrays to write, compared with the layout, and sorted.

    Args:
      arrays: canonical name → array. If it has an attribute `shapes`, no array
        is made to learn its shape.

    Raises:
      CheckpointMismatchError: names or shapes are not those of a BiT-ResNet.
    """
    shapes = getattr(arrays, "shapes", None)
    if shapes is None:
        shapes = {name: np.shape(arrays[name]) for name in arrays}
    shapes = {name: tuple(map(int, shape)) for name, shape in shapes.items()}
    detected = layout.detect(shapes)
    layout.check(
        shapes,
        layout.expected_shapes(
            detected.blocks, detected.stem_width, detected.num_classes
        ),
    )
    return dict(sorted(shapes.items()))


def take(
    arrays: Mapping[str, np.ndarray], name: str, shape: tuple[int, ...]
) -> np.ndarray:
    """One array to write: float32, finite, and of the promised shape.

    Raises:
      CheckpointMismatchError: it has another shape.
      CheckpointFormatError: it is not float, or holds NaN or infinity.
    """
    array = np.asarray(arrays[name])
    if array.shape != shape:
        raise errors.CheckpointMismatchError(
            f"{name} must have the shape that was promised, {shape}. "
            f"Received: {array.shape}."
        )
    return as_float32(name, array)


def begins_like(path: str | os.PathLike[str]) -> str:
    """Says in words what a file's first bytes look like.

    Raises:
      OSError: the file cannot be read.
    """
    with open(path, "rb") as file:
        start = file.read(512).removeprefix(b"\xef\xbb\xbf").lstrip()
    if not start:
        return "nothing: it is empty or blank"
    for signature, text in _SIGNATURES:
        if start.startswith(signature):
            return text
    return f"unknown bytes, {start[:8].hex(' ')}"


def _is_float(dtype: np.dtype) -> bool:
    return dtype.name in ("bfloat16", "float16", "float32", "float64")


def _dtype_problem(shown: str, dtype: np.dtype) -> str:
    return f"Received: {shown} of dtype {dtype}."


def _listed(extra: tuple[str, ...]) -> str:
    if not extra:
        return ""
    lines = [f"+ {layout.printable(name)}" for name in extra[:_MAX_EXTRA_SHOWN]]
    if len(extra) > len(lines):
        lines.append(f"… and {len(extra) - len(lines)} more")
    return (
        "\nThe file also holds, outside the layout (a missing array may be one "
        "of them, renamed):\n" + "\n".join(lines)
    )
