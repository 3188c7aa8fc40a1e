"""Class names: ImageNet's two label sets, and those inside SavedModels."""

import dataclasses
import functools
import importlib.resources
import os
import pathlib

from bit_tf import errors

__all__ = [
    "LABEL_SETS",
    "Label",
    "decode_predictions",
    "label_set",
    "parse",
    "read_saved_model",
    "write_saved_model",
]

# Name: number of classes.
LABEL_SETS = {"ilsvrc2012": 1000, "imagenet21k": 21843}

_NAMES_FILE = "labels.txt"
_IDS_FILE = "wordnet_ids.txt"


@dataclasses.dataclass(frozen=True)
class Label:
    """A class: its WordNet id (or "" if it has none) and its name."""

    id: str
    name: str


@functools.cache
def label_set(name: str) -> tuple[Label, ...]:
    """The classes of a published label set, in the order of the logits.

    Args:
      name: "ilsvrc2012" (1000 classes) or "imagenet21k" (21843).

    Raises:
      UnknownNameError: there is no such set.
    """
    if name not in LABEL_SETS:
        raise errors.UnknownNameError(
            f"Label sets are {', '.join(LABEL_SETS)}. Received: {name!r}."
        )
    data = importlib.resources.files("bit_tf") / "data" / f"{name}.tsv"
    return parse(data.read_text(encoding="utf-8"))


def parse(text: str) -> tuple[Label, ...]:
    """Classes from lines of "name" or "id<TAB>name"."""
    labels = []
    for line in text.splitlines():
        id_, tab, name = line.partition("\t")
        labels.append(Label(id_, name) if tab else Label("", line))
    return tuple(labels)


def decode_predictions(scores, top: int = 5, labels=None):
    """The classes of the highest scores.

    Args:
      scores: [n, classes] logits or probabilities, of any array library.
      top: how many classes an image.
      labels: a sequence of Label or str; without it the label set whose number
        of classes fits, 1000 or 21843.

    Returns:
      For every image a list of (WordNet id, name, score), best first.

    Raises:
      UnknownNameError: the number of classes fits no label set or `labels`.
    """
    import numpy as np

    scores = np.asarray(scores)
    if scores.ndim != 2:
        raise errors.UnknownNameError(
            "scores must have the shape [images, classes]. "
            f"Received: {scores.shape}."
        )
    classes = scores.shape[1]
    if labels is None:
        by_count = {count: name for name, count in LABEL_SETS.items()}
        if classes not in by_count:
            raise errors.UnknownNameError(
                f"No label set has {classes} classes (known: {LABEL_SETS}). "
                "Pass labels=[...], one name a class."
            )
        labels = label_set(by_count[classes])
    if len(labels) != classes:
        raise errors.UnknownNameError(
            f"labels must name each of the {classes} classes. "
            f"Received: {len(labels)} labels."
        )
    labels = [Label("", x) if isinstance(x, str) else x for x in labels]
    return [
        [
            (labels[index].id, labels[index].name, float(row[index]))
            for index in np.argsort(-row, kind="stable")[:top]
        ]
        for row in scores
    ]


def write_saved_model(labels, directory: str | os.PathLike) -> None:
    """Writes classes into a SavedModel's assets/: names, and ids if any."""
    assets = pathlib.Path(directory) / "assets"
    assets.mkdir(exist_ok=True)
    for file, lines in (
        (_NAMES_FILE, [label.name for label in labels]),
        (_IDS_FILE, [label.id for label in labels]),
    ):
        if any(lines):
            (assets / file).write_text(
                "".join(f"{line}\n" for line in lines), encoding="utf-8"
            )


def read_saved_model(directory: str | os.PathLike) -> tuple[Label, ...] | None:
    """The classes stored in a SavedModel's assets/, or None."""
    assets = pathlib.Path(directory) / "assets"
    if not (assets / _NAMES_FILE).is_file():
        return None
    names = (assets / _NAMES_FILE).read_text(encoding="utf-8").splitlines()
    ids = [""] * len(names)
    if (assets / _IDS_FILE).is_file():
        ids = (assets / _IDS_FILE).read_text(encoding="utf-8").splitlines()
    return tuple(Label(i, n) for i, n in zip(ids, names, strict=True))
