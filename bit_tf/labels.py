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
    "activation",
    "check",
    "decode_predictions",
    "label_set",
    "of_count",
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
    errors.lookup(LABEL_SETS, name, "Label sets")
    data = importlib.resources.files("bit_tf") / "data" / f"{name}.tsv"
    return parse(data.read_text(encoding="utf-8"))


def of_count(num_classes: int) -> str | None:
    """The published label set of that many classes, or None."""
    names = {count: name for name, count in LABEL_SETS.items()}
    return names.get(num_classes)


def activation(num_classes: int) -> str:
    """What turns a head's logits into probabilities, told by its size.

    "sigmoid" for ImageNet-21k, which was trained with many labels a picture;
    else "softmax".
    """
    return "sigmoid" if of_count(num_classes) == "imagenet21k" else "softmax"


def parse(text: str) -> tuple[Label, ...]:
    """Classes from lines of "name" or "id<TAB>name"."""
    labels = []
    for line in text.removeprefix("\ufeff").removesuffix("\n").split("\n"):
        line = line.removesuffix("\r")
        id_, tab, name = line.partition("\t")
        labels.append(Label(id_, name) if tab else Label("", line))
    return tuple(labels)


def check(labels, num_classes: int) -> tuple[Label, ...]:
    """Names of a head's classes, each a Label or a str.

    Raises:
      ValueError: not one name a class, or names that are not one line of text.
    """
    found = tuple(
        Label("", label) if isinstance(label, str) else label
        for label in labels
    )
    for label in found:
        if (
            not isinstance(label, Label)
            or not label.name.strip()
            or any(
                c in "\t\n\r" or "\ud800" <= c <= "\udfff"
                for c in label.id + label.name
            )
        ):
            raise ValueError(
                "A label is one line of text, or a labels.Label. "
                f"Received: {label!r}."
            )
    if len(found) != num_classes:
        raise ValueError(
            f"Labels must name each of the {num_classes} classes. "
            f"Received: {len(found)} labels."
        )
    return found


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
      UnknownNameError: no label set has that number of classes.
      ValueError: scores of another shape, labels that do not fit, or top < 1.
    """
    import numpy as np

    scores = np.asarray(scores)
    if scores.ndim != 2:
        raise ValueError(
            "scores must have the shape [images, classes]. "
            f"Received: {scores.shape}."
        )
    if top < 1:
        raise ValueError(f"top must be at least 1. Received: {top}.")
    classes = scores.shape[1]
    if labels is None:
        name = of_count(classes)
        if name is None:
            raise errors.UnknownNameError(
                f"No label set has {classes} classes (known: {LABEL_SETS}). "
                "Pass labels=[...], one name a class."
            )
        labels = label_set(name)
    else:
        labels = check(labels, classes)
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
                "".join(f"{line}\n" for line in lines),
                encoding="utf-8",
                newline="\n",
            )


def read_saved_model(directory: str | os.PathLike) -> tuple[Label, ...] | None:
    """The classes stored in a SavedModel's assets/, or None.

    Raises:
      HandleError: the files there are damaged.
    """
    assets = pathlib.Path(directory) / "assets"
    if not (assets / _NAMES_FILE).is_file():
        return None
    ids: list[str] = []
    try:
        names = _lines(assets / _NAMES_FILE)
        if (assets / _IDS_FILE).is_file():
            ids = _lines(assets / _IDS_FILE)
    except UnicodeDecodeError as error:
        raise errors.HandleError(
            f"Labels in {assets} must be UTF-8 text: {error}. The SavedModel "
            "is damaged; get it again."
        ) from error
    if ids and len(ids) != len(names):
        raise errors.HandleError(
            f"{_IDS_FILE} must have a line for every line of {_NAMES_FILE}. "
            f"Received: {len(ids)} and {len(names)} in {assets}."
        )
    pairs = zip(ids or [""] * len(names), names, strict=True)
    return tuple(Label(id_, name) for id_, name in pairs)


def _lines(path: pathlib.Path) -> list[str]:
    return path.read_text(encoding="utf-8").removesuffix("\n").split("\n")
