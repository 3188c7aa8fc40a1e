"""A split of labelled pictures, which is divided before any is decoded."""

import functools
import hashlib
import json
import math
from collections.abc import Iterable, Sequence
from typing import Any, Protocol, TypeGuard

import numpy as np

from bit_tf import errors
from bit_tf.errors import DatasetError

__all__ = [
    "InGraph",
    "RandomAccess",
    "Source",
    "Split",
    "is_in_graph",
    "is_random_access",
    "require",
]


class Source(Protocol):
    """Where pictures and labels come from, by position from 0.

    A record is one undecoded example, as bytes.
    """

    @property
    def labels(self) -> np.ndarray:
        """int64 [n]."""

    def identifier(self, position: int) -> str:
        """A name for people."""

    def records(self, order: Iterable[int]) -> Iterable[bytes]:
        """Records in this order, each position at most once."""

    def picture(self, record: bytes, position: int) -> np.ndarray:
        """uint8 in [0, 255] or float32 in [0, 1], [h, w, 3]."""

    def stamp(self, position: int) -> tuple[int, int]:
        """Numbers that change when the picture does."""

    def typical_size(self, positions: np.ndarray) -> tuple[int, int] | None:
        """A (height, width) to derive the resolution of training from."""


class RandomAccess(Source, Protocol):
    """A source that gives any record at once, from several threads."""

    def read(self, position: int) -> bytes:
        """One record."""


class InGraph(Source, Protocol):
    """A source of a stream, which decodes records in TensorFlow."""

    @property
    def sizes(self) -> np.ndarray:
        """int64 [n]: bytes of records."""

    def tensor(self, record: Any, position: Any) -> Any:
        """The picture of a record, all as tensors."""


def is_random_access(source: Source) -> TypeGuard[RandomAccess]:
    """Whether a source gives any record at once."""
    return hasattr(type(source), "read")


def is_in_graph(source: Source) -> TypeGuard[InGraph]:
    """Whether a source decodes records in TensorFlow."""
    return hasattr(type(source), "tensor")


def require(name: str, value: Any, least: int, most: float = math.inf) -> None:
    """Refuses what is no integer in a range.

    Raises:
      DatasetError: as said; the message has the name.
    """
    right = isinstance(value, (int, np.integer)) and type(value) is not bool
    if not (right and least <= value <= most):
        upper = "" if most == math.inf else f" and at most {most}"
        raise DatasetError(
            f"{name} is an integer of {least} or more{upper}. Received: "
            f"{errors.brief(value)}. Choose such."
        )


class Split:
    """Labelled pictures in a fixed order."""

    def __init__(
        self,
        name: str,
        source: Source,
        class_names: Sequence[str],
        positions: np.ndarray | None = None,
    ) -> None:
        """Reads nothing.

        Args:
          name: such as "train".
          source: of pictures and labels.
          class_names: of the labels 0, 1, ….
          positions: int64 [n], those of the source in this split, each once;
            None is all.
        """
        self.name = name
        self.source = source
        self.class_names = tuple(class_names)
        self._positions = positions

    def __repr__(self) -> str:
        return f"<Split {self.name!r} of {self.num_classes} classes>"

    def __len__(self) -> int:
        return self.size

    @property
    def size(self) -> int:
        """Number of examples."""
        return len(self.positions)

    @property
    def num_classes(self) -> int:
        """Number of classes, also of those without an example."""
        return len(self.class_names)

    @functools.cached_property
    def positions(self) -> np.ndarray:
        """int64 [size]: where the examples are in the source."""
        if self._positions is None:
            return np.arange(len(self.source.labels))
        return self._positions

    @functools.cached_property
    def labels(self) -> np.ndarray:
        """int64 [size], in [0, num_classes), read without decoding pictures.

        Raises:
          DatasetError: a label is out of range.
        """
        labels = self.source.labels[self.positions]
        wrong = np.flatnonzero((labels < 0) | (labels >= self.num_classes))
        if len(wrong):
            raise DatasetError(
                f"Labels lie in [0, {self.num_classes - 1}], one for each "
                f"class. Received: {labels[wrong[0]]} in "
                f"{self.source.identifier(int(self.positions[wrong[0]]))!r}, "
                f"and {len(wrong)} such labels in all. Mend them, or give all "
                "class names."
            )
        labels.flags.writeable = False
        return labels

    @functools.cached_property
    def identifiers(self) -> tuple[str, ...]:
        """A name for each example: of its file, or like "train/17"."""
        return tuple(map(self.source.identifier, self.positions.tolist()))

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 in hexadecimal digits of names, labels and their order."""
        digest = hashlib.sha256()
        for part in (self.class_names, self.identifiers, self.labels.tolist()):
            digest.update(json.dumps(part).encode() + b"\n")
        return digest.hexdigest()

    def picture(self, index: int) -> np.ndarray:
        """One picture as it is stored.

        Args:
          index: in [0, size).

        Returns:
          uint8 in [0, 255] or float32 in [0, 1], [h, w, 3].

        Raises:
          ImageError, DatasetError: it cannot be read; the message names it.
        """
        return self.pictures([index])[0]

    def pictures(self, indices: Sequence[int]) -> list[np.ndarray]:
        """Pictures in this order; of a stream, in one pass.

        Raises:
          ImageError, DatasetError: as `picture` does.
        """
        chosen = self._chosen(indices)
        order = self.positions[chosen].tolist()
        records = self.source.records(order)
        return [
            self.source.picture(record, position)
            for position, record in zip(order, records, strict=True)
        ]

    def take(self, indices: Sequence[int] | np.ndarray) -> "Split":
        """The examples at these distinct indices, in this order.

        Raises:
          DatasetError: an index is out of range, or there twice.
        """
        return self._part(self.name, self._chosen(indices))

    def few_shot_indices(self, per_class: int, seed: int) -> np.ndarray:
        """Which examples `few_shot` takes: int64 [n], ascending."""
        require("per_class", per_class, 1)
        require("seed", seed, 0)
        few = []
        found = []
        for label, members in enumerate(self._members()):
            if len(members) < per_class:
                few.append(f"{self.class_names[label]!r} ({len(members)})")
            order = np.random.default_rng([seed, label]).permutation(members)
            found.append(order[:per_class])
        if few:
            more = ", …" if len(few) > 5 else ""
            raise DatasetError(
                f"{per_class} examples a class need as many of each in "
                f"{self.name}. Received: fewer of {', '.join(few[:5])}{more}. "
                "Ask for fewer, or add pictures."
            )
        return np.sort(np.concatenate(found))

    def few_shot(self, per_class: int, seed: int) -> "Split":
        """As many examples of each class, drawn by seed.

        Those of a smaller number are among those of a larger one.

        Args:
          per_class: examples of each class, 1 or more.
          seed: 0 or more.

        Raises:
          DatasetError: a class has fewer examples.
        """
        return self._part(self.name, self.few_shot_indices(per_class, seed))

    def split_off(self, amount: float, seed: int) -> tuple["Split", "Split"]:
        """Divides the examples, in each class by the same share.

        Args:
          amount: how many go to the second part: a count, if an integer, or a
            fraction between 0 and 1. Each class keeps at least one.
          seed: 0 or more.

        Returns:
          (what stays, what is split off, named "validation")

        Raises:
          DatasetError: one part would be empty.
        """
        require("seed", seed, 0)
        whole = isinstance(amount, (int, np.integer))
        count = int(amount) if whole else round(amount * self.size)
        members = self._members()
        most = np.array([max(len(group) - 1, 0) for group in members])
        if isinstance(amount, bool) or not 1 <= count <= most.sum():
            raise DatasetError(
                "What is split off has at least one example, and leaves one "
                f"of each class: between 1 and {most.sum()} of {self.size}. "
                f"Received: {amount!r}. Choose another amount."
            )
        ideal = np.array([len(group) for group in members]) * count / self.size
        counts = np.minimum(np.floor(ideal).astype(np.int64), most)
        while counts.sum() < count:
            # The largest remainder first; of equals, the first class.
            rest = np.where(counts < most, ideal - counts, -np.inf)
            counts[np.argmax(rest)] += 1
        away = [
            np.random.default_rng([seed, label]).permutation(group)[:number]
            for label, (group, number) in enumerate(
                zip(members, counts, strict=True)
            )
        ]
        held_out = np.sort(np.concatenate(away))
        rest = np.setdiff1d(np.arange(self.size), held_out)
        return self._part(self.name, rest), self._part("validation", held_out)

    def _members(self) -> list[np.ndarray]:
        """Indices of each class, ascending."""
        order = np.argsort(self.labels, kind="stable")
        ends = np.cumsum(np.bincount(self.labels, minlength=self.num_classes))
        return np.split(order, ends[:-1])

    def _chosen(self, indices: Sequence[int] | np.ndarray) -> np.ndarray:
        chosen = np.asarray(indices)
        size = self.size
        if not chosen.size:
            chosen = chosen.astype(np.int64)
        right = (
            chosen.ndim == 1
            and chosen.dtype.kind in "iu"
            and len(np.unique(chosen)) == len(chosen)
            and (not chosen.size or 0 <= chosen.min() <= chosen.max() < size)
        )
        if not right:
            raise DatasetError(
                f"Indices are distinct integers in [0, {size}). "
                f"Received: {errors.brief(indices)}. Choose such."
            )
        return chosen

    def _part(self, name: str, indices: np.ndarray) -> "Split":
        return Split(
            name, self.source, self.class_names, self.positions[indices]
        )
