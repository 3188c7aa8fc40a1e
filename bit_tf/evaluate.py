"""Scores classifiers on labelled pictures: all of them, in order."""

import dataclasses
import json
import math
import os
import re
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from tqdm import tqdm

from bit_tf import (
    charts,
    data,
    errors,
    input_pipeline,
    labels,
    metrics,
    presets,
    published,
    transfer,
)

__all__ = [
    "CHARTS",
    "DEFAULT_PRESET",
    "Evaluation",
    "align",
    "draw",
    "evaluate",
    "mistake_items",
    "predict",
    "preset_for",
    "require_finite",
    "scored_split",
    "to_json",
]

DEFAULT_PRESET = "big_transfer eval"
_FUNCTIONS: weakref.WeakKeyDictionary[keras.Model, Callable[[Any], Any]] = (
    weakref.WeakKeyDictionary()
)
CHARTS = ("confusion_matrix.png", "reliability.png", "mistakes.png")


@dataclasses.dataclass(frozen=True, eq=False)
class Evaluation:
    """A classifier's outputs for one split, and what they are worth.

    Attributes:
      report: JSON's types: "model" (transfer.describe), "dataset", "split",
        "classes_matched" ("by name" or "by index"), "preset", and all of
        metrics.classification; of imagenet_real.score also "real".
      outputs: float32 [n, classes], in the order of the dataset's classes.
      labels: int64 [n].
      split: what was scored.
      activation: "softmax" or "sigmoid".
    """

    report: dict[str, Any]
    outputs: np.ndarray
    labels: np.ndarray
    split: data.Split
    activation: str


def predict(
    model: Any,
    split: data.Split,
    *,
    preset: str | presets.Preset,
    batch_size: int = 32,
    progress: bool = True,
    strategy: tf.distribute.Strategy | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """A model's outputs for every picture of a split, in order.

    All batches that the model sees have one size: the last is filled up, and
    what was filled in is cut off again.

    Args:
      model: a Keras model, or any callable of tensors, such as the function of
        hub.picture_function: float32 [n, h, w, 3] in [0, 1] → [n, d].
      split: of pictures.
      preset: how pictures are prepared, of a fixed size.
      batch_size: pictures at a time, over all devices of this machine.
      progress: whether a bar is shown, on a terminal.
      strategy: under whose scope the model was made. Of several machines, each
        that calls this computes all outputs on its own devices.

    Returns:
      (outputs float32 [n, d], labels int64 [n])

    Raises:
      DatasetError: the split is empty, or a picture cannot be used.
      ImageError: a picture cannot be read.
      UnknownNameError: no such preset.
      BitTfError: there is not enough memory.
      ValueError: batch_size is not positive, the preset has no fixed size, or
        the model returns no vector a picture.
    """
    if batch_size < 1:
        raise ValueError(
            f"batch_size must be 1 or more. Received: {batch_size}."
        )
    if not split.size:
        raise errors.DatasetError(
            "Pictures are scored, one or more. Received: the split "
            f"{split.name!r} without any. Choose another split."
        )
    preset = preset_for(preset)
    compute, devices = _compiled(model, strategy)
    size = devices * math.ceil(min(batch_size, split.size) / devices)
    batches = input_pipeline.evaluation_batches(
        split, preset=preset, batch_size=size
    )
    outputs, found = [], []
    with tqdm(
        total=split.size, unit="image", disable=None if progress else True
    ) as bar:
        for pictures, some in input_pipeline.iterate(batches):
            count = len(some)
            try:
                values = compute(_filled(pictures, size))
            except (tf.errors.ResourceExhaustedError, MemoryError) as error:
                raise errors.BitTfError(
                    "A batch of pictures must fit into memory. Received: "
                    f"{size} of {pictures.shape[1]} × {pictures.shape[2]} "
                    "pixels, for which there is not enough. Use a smaller "
                    "batch size (--batch-size), or a preset of a smaller size."
                ) from error
            if values.ndim != 2 or len(values) != size:
                raise ValueError(
                    "A model of pictures returns one vector a picture, [n, d]. "
                    f"Received: shape {values.shape} for {size} pictures."
                )
            outputs.append(values[:count])
            found.append(np.asarray(some, np.int64))
            bar.update(count)
    return np.concatenate(outputs), np.concatenate(found)


def evaluate(
    source: str | os.PathLike[str],
    dataset: data.Dataset,
    *,
    split: str | None = None,
    preset: str | presets.Preset | None = None,
    batch_size: int = 32,
    progress: bool = True,
) -> Evaluation:
    """Scores a classifier on one split of a dataset.

    Args:
      source: whatever transfer.open_classifier takes.
      dataset: its classes are those of the model, by name in any order, or by
        index where one of both names none.
      split: "train", "validation" or "test"; without it see `scored_split`.
      preset: how pictures are prepared; without it as the model says, or else
        DEFAULT_PRESET.
      batch_size, progress: see `predict`.

    Raises:
      DatasetError: the classes do not fit, or there is no such split.
      BitTfError: an output is not finite.
      and what transfer.open_classifier and `predict` raise.
    """
    chosen = scored_split(dataset, split)
    if preset is not None:
        preset = preset_for(preset)
    model, facts = transfer.open_classifier(source)
    # One without a size suits a picture at a time.
    if preset is None and facts.preset is not None and facts.preset.size:
        preset = facts.preset
    preset = preset_for(preset)
    classes = model.output_shape[-1]
    columns, how = align(facts.labels, chosen.class_names, classes)
    outputs, true = predict(
        model, chosen, preset=preset, batch_size=batch_size, progress=progress
    )
    require_finite(outputs, source)
    outputs = outputs[:, columns]
    activation = labels.activation(classes)
    report = {
        "model": transfer.describe(model),
        "dataset": dataset.name,
        "split": chosen.name,
        "classes_matched": how,
        "preset": dataclasses.asdict(preset),
        "activation": activation,
        **metrics.classification(
            outputs, true, chosen.class_names, activation=activation
        ),
    }
    return Evaluation(report, outputs, true, chosen, activation)


def scored_split(dataset: data.Dataset, name: str | None = None) -> data.Split:
    """The split of that name; without a name "test", or else "validation".

    Raises:
      DatasetError: there is none.
    """
    for choice in [name] if name else ["test", "validation"]:
        if choice in dataset.splits:
            return dataset.splits[choice]
    raise errors.DatasetError(
        f"What is scored is the split {name or 'test or validation'!r}. "
        f"Received: {dataset.name} with {', '.join(dataset.splits)}. Choose "
        "one of these (--split)."
    )


def require_finite(outputs: np.ndarray, source: str | os.PathLike[str]) -> None:
    """Refuses outputs of a broken model.

    Args:
      outputs: [n, d].
      source: the model, for the message.

    Raises:
      BitTfError: one is not finite.
    """
    wrong = int((~np.isfinite(outputs).all(axis=1)).sum())
    if wrong:
        raise errors.BitTfError(
            "A model's outputs are finite numbers. Received from "
            f"{published.shown(source)!r}: NaN or infinity for {wrong} of "
            f"{len(outputs)} pictures. Its weights are damaged, or were "
            "trained at too high a learning rate."
        )


def preset_for(preset: str | presets.Preset | None) -> presets.Preset:
    """A preset whose pictures are all of one size.

    Args:
      preset: one, its name, or None for DEFAULT_PRESET.

    Raises:
      UnknownNameError: no such preset, or it keeps each picture's size.
    """
    if not isinstance(preset, presets.Preset):
        preset = presets.preset(preset or DEFAULT_PRESET)
    if preset.size is None or (
        preset.resize == "shortest_edge" and preset.crop is None
    ):
        fixed = [
            row.name
            for row in presets.PRESETS.values()
            if row.crop or row.resize == "squash"
        ]
        raise errors.UnknownNameError(
            "Batches of pictures need a preset that makes them of one size: "
            f"{', '.join(map(repr, fixed))}. Received: {preset.name!r}, which "
            "does not."
        )
    return preset


def align(
    own: Sequence[labels.Label] | None,
    class_names: Sequence[str],
    outputs: int,
) -> tuple[np.ndarray, str]:
    """Where a model's output for each of a dataset's classes is.

    Names are compared by letters and numbers alone, without case. Classes that
    have a WordNet id may go by it, as in ImageNet's own folders. Where one of
    both has no names, but the numbers from 0 in any order, or the model has
    nothing, classes go by index: that of a number is the number.

    Args:
      own: the model's classes, if it says so.
      class_names: the dataset's.
      outputs: how many the model has.

    Returns:
      (indices into the outputs, one a class; "by name" or "by index")

    Raises:
      DatasetError: they are not the same classes.
    """
    count = len(class_names)
    if own is not None and len(own) == outputs == count:
        names = [label.name for label in own]
        theirs = [_plain(name) for name in class_names]
        for mine, wanted in (
            (names, class_names),
            ([_plain(name) for name in names], theirs),
            ([_plain(label.id) for label in own], theirs),
        ):
            places = {name: index for index, name in enumerate(mine)}
            if len(places) == count and places.keys() == set(wanted):
                return np.asarray([places[name] for name in wanted]), "by name"
    shown = None if own is None else [label.name for label in own]
    if outputs == count:
        own_numbers = None if shown is None else _indices(shown, count)
        numbers = _indices(class_names, count)
        if own is None or own_numbers is not None or numbers is not None:
            columns = np.arange(count)
            if own_numbers is not None:
                columns = np.argsort(own_numbers)
            return columns if numbers is None else columns[numbers], "by index"
    known = {_plain(text) for row in own or () for text in (row.name, row.id)}
    unknown = [name for name in class_names if _plain(name) not in known]
    differ = ""
    if shown and unknown:
        differ = f" The model lacks: {_listed(unknown)}."
    raise errors.DatasetError(
        "A classifier is scored on the classes that it has. Received: a model "
        f"of {outputs} classes ({_listed(shown) if shown else 'nameless'}) and "
        f"a dataset of {count} ({_listed(class_names)}).{differ} Fine-tune the "
        "model on this dataset (bit-tf finetune), or score its features "
        "instead (--probe, --knn)."
    )


def mistake_items(
    split: data.Split,
    outputs: np.ndarray,
    true: np.ndarray,
    *,
    count: int = 25,
    activation: str = "softmax",
) -> list[tuple[np.ndarray, str, str, float, str]]:
    """What charts.mistakes draws: the surest mistakes, with their pictures.

    Args:
      split: that was scored.
      outputs: [n, classes] in the order of the split's classes.
      true: [n].
      count: how many at most.
      activation: see metrics.probabilities.

    Raises:
      as metrics.mistakes and `split.pictures`.
    """
    worst = metrics.mistakes(outputs, true, count, activation=activation)
    if not worst:
        return []
    pictures = split.pictures([found.example for found in worst])
    return [
        (
            picture,
            split.class_names[found.label],
            split.class_names[found.predicted],
            found.probability,
            str(split.identifiers[found.example]),
        )
        for found, picture in zip(worst, pictures, strict=True)
    ]


def draw(
    report: Mapping[str, Any],
    items: Sequence[tuple[np.ndarray, str, str, float, str]],
    directory: str | os.PathLike[str],
) -> list[str]:
    """Draws the charts of a report, CHARTS.

    Args:
      report: with all of metrics.classification.
      items: of `mistake_items`.
      directory: which exists.

    Returns:
      Paths of the files. Of thousands of classes there is no confusion
      matrix.

    Raises:
      MissingExtraError: matplotlib is not installed.
      OSError: a file cannot be written.
    """
    paths = [os.path.join(directory, name) for name in CHARTS]
    names = [row["name"] for row in report["per_class"]]
    if report["confusion"] is None:
        paths.pop(0)
    else:
        charts.confusion_matrix(report["confusion"], names, paths[0])
    charts.reliability(report["calibration"], paths[-2])
    charts.mistakes(items, paths[-1])
    return paths


def to_json(report: Mapping[str, Any]) -> str:
    """A report as strict JSON text, rows of numbers on one line each."""
    text = json.dumps(report, indent=2, ensure_ascii=False, allow_nan=False)
    return re.sub(
        r"\[\n\s+[-+\d.eE,\s]+\]",
        lambda found: (
            re.sub(r"\s+", " ", found[0]).replace("[ ", "[").replace(" ]", "]")
        ),
        text + "\n",
    )


def _compiled(
    model: Any, strategy: tf.distribute.Strategy | None
) -> tuple[Callable[[Any], np.ndarray], int]:
    """A function of a whole batch, and the devices among which it is split."""
    if strategy is None:
        call = _function(model) if isinstance(model, keras.Model) else model
        return lambda pictures: _floats(call(pictures)), 1
    call = model
    if isinstance(model, keras.Model):

        def call(pictures):
            return model(pictures, training=False)

    @tf.function(autograph=False, reduce_retracing=True)
    def run(parts):
        return strategy.run(call, args=(parts,))

    def distributed(values: Sequence[Any]) -> Any:
        # Of several machines, this is asked for the devices of this one alone.
        rest = iter(values)
        return strategy.experimental_distribute_values_from_function(
            lambda context: next(rest)
        )

    everywhere = [tf.zeros([])] * strategy.num_replicas_in_sync
    devices = len(strategy.experimental_local_results(distributed(everywhere)))

    def compute(pictures: Any) -> np.ndarray:
        parts = distributed(tf.split(pictures, devices))
        results = strategy.experimental_local_results(run(parts))
        return np.concatenate([_floats(result) for result in results])

    return compute, devices


def _function(model: keras.Model) -> Callable[[Any], Any]:
    """A model's graph, which is kept: models are scored again and again."""
    if model not in _FUNCTIONS:
        # A function that held the model would keep it for ever.
        weak: Callable[[], Any] = weakref.ref(model)

        @tf.function(autograph=False, reduce_retracing=True)
        def call(pictures):
            return weak()(pictures, training=False)

        _FUNCTIONS[model] = call
    return _FUNCTIONS[model]


def _floats(tensor: Any) -> np.ndarray:
    return np.asarray(tf.cast(tensor, tf.float32))


def _filled(pictures: Any, size: int) -> tf.Tensor:
    """A batch of `size` pictures: the last one is repeated."""
    pictures = tf.convert_to_tensor(pictures)
    missing = size - len(pictures)
    if not missing:
        return pictures
    return tf.concat([pictures, tf.repeat(pictures[-1:], missing, 0)], 0)


def _indices(names: Sequence[str], count: int) -> np.ndarray | None:
    """Names that are the numbers below `count`, in any order, as numbers."""
    numbers = [
        int(name)
        for name in names
        if name.isascii() and name.isdecimal() and len(name) < 10
    ]
    if len(names) != count or sorted(numbers) != list(range(count)):
        return None
    return np.asarray(numbers)


def _plain(name: str) -> str:
    return "".join(letter for letter in name.casefold() if letter.isalnum())


def _listed(names: Sequence[str]) -> str:
    some = ", ".join(errors.brief(name) for name in names[:5])
    more = len(names) - 5
    return f"{some} and {more} more" if more > 0 else some
