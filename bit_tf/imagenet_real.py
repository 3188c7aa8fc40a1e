"""Scores classifiers of ImageNet by ReaL's labels.

ReaL reassessed ImageNet's validation pictures: each has a set of right
classes, which may be empty. Source: arXiv:2006.07159; the dataset is
imagenet2012_real of TensorFlow Datasets.
"""

import dataclasses
import os
from typing import Any

import numpy as np

from bit_tf import data, errors, evaluate, metrics, presets

__all__ = ["DATASET", "label_sets", "score"]

DATASET = "imagenet2012_real"
_SPLIT = "validation"


def score(
    source: str | os.PathLike[str],
    *,
    dataset: str = DATASET,
    data_dir: str | os.PathLike[str] | None = None,
    manual_dir: str | os.PathLike[str] | None = None,
    download: bool = True,
    preset: str | presets.Preset | None = None,
    batch_size: int = 32,
    progress: bool = True,
) -> evaluate.Evaluation:
    """Scores a classifier of the 1000 classes on the validation pictures.

    Args:
      source: whatever transfer.open_classifier takes.
      dataset: DATASET, or one of its versions.
      data_dir, manual_dir, download: see data.open_dataset. The pictures are
        one of the files that people have to download.
      preset, batch_size, progress: see evaluate.evaluate.

    Returns:
      As evaluate.evaluate, for ImageNet's own labels; `report` also has
      "real", from metrics.real.

    Raises:
      DatasetError: the dataset is not there, is another one, or the model has
        other classes.
      and what transfer.open_classifier and evaluate.predict raise.
    """
    place: dict[str, Any] = {
        "data_dir": data_dir,
        "manual_dir": manual_dir,
        "download": download,
        "progress": progress,
    }
    named = data.from_tfds(
        dataset, {"test": _SPLIT}, label="original_label", **place
    )
    # Through a transform all features are read, as label_sets does.
    opened = data.from_tfds(
        dataset,
        {"test": _SPLIT},
        transform=lambda example: (example["image"], example["original_label"]),
        class_names=named.class_names,
        **place,
    )
    original, sets = label_sets(dataset, data_dir)
    if not np.array_equal(original, opened.splits["test"].labels):
        raise errors.DatasetError(
            "A dataset gives the same examples in the same order each time it "
            f"is read. Received: {dataset!r} with other labels the second "
            "time. Prepare it again."
        )
    found = evaluate.evaluate(
        source,
        opened,
        split="test",
        preset=preset,
        batch_size=batch_size,
        progress=progress,
    )
    report = {
        **found.report,
        "split": _SPLIT,
        "real": metrics.real(found.outputs, sets),
    }
    return dataclasses.replace(found, report=report)


def label_sets(
    dataset: str = DATASET, data_dir: str | os.PathLike[str] | None = None
) -> tuple[np.ndarray, list[np.ndarray]]:
    """ImageNet's label and the set of ReaL's, of every validation picture.

    Args:
      dataset: DATASET, or one of its versions, which has been prepared.
      data_dir: where TFDS keeps datasets; by default where TFDS says.

    Returns:
      (int64 [n], n arrays of int64), in the order of the files; no picture is
      decoded.

    Raises:
      DatasetError: the dataset has no such labels.
    """
    import tensorflow_datasets as tfds

    builder = tfds.builder(dataset, data_dir=data_dir)
    needed = {"image", "original_label", "real_label"}
    if not needed <= set(builder.info.features):
        raise errors.DatasetError(
            f"ReaL's datasets have the features {', '.join(sorted(needed))}. "
            f"Received: {dataset!r} with "
            f"{', '.join(sorted(builder.info.features))}. Use {DATASET!r}."
        )
    # The same order as that of data.from_tfds: file by file.
    examples = builder.as_dataset(
        split=_SPLIT,
        shuffle_files=False,
        decoders={"image": tfds.decode.SkipDecoding()},
        read_config=tfds.ReadConfig(
            try_autocache=False, interleave_cycle_length=1
        ),
    )
    original, sets = [], []
    for example in examples.as_numpy_iterator():
        original.append(example["original_label"])
        sets.append(np.asarray(example["real_label"], np.int64))
    return np.asarray(original, np.int64), sets
