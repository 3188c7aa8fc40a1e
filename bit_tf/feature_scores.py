"""Scores a model's features on labelled pictures, by probe and neighbours.

Features are computed once, of the pictures that are needed.
"""

import dataclasses
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from bit_tf import data, errors, evaluate, presets, probe, transfer

__all__ = ["DEFAULT_PRESET", "NEIGHBOURS", "markdown", "score"]

# That of the probe's source.
DEFAULT_PRESET = "big_vision fewshot"
NEIGHBOURS = (1, 5, 20)


def score(
    source: str | os.PathLike[str],
    dataset: data.Dataset,
    *,
    split: str | None = None,
    preset: str | presets.Preset = DEFAULT_PRESET,
    batch_size: int = 32,
    shots: Iterable[int] | None = None,
    seeds: Iterable[int] = probe.SEEDS,
    l2: float | Sequence[float] = probe.L2,
    neighbours: Iterable[int] | None = None,
    temperature: float | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Scores features by few-shot probes and by nearest neighbours.

    Args:
      source: whatever transfer.feature_model takes.
      dataset: with a "train" split, from which examples come.
      split: what is scored; without it see evaluate.scored_split.
      preset: how pictures are prepared.
      batch_size, progress: see evaluate.predict.
      shots: examples a class of the probe (probe.few_shot); () for none. None
        means those of probe.SHOTS for which every class has enough examples.
      seeds, l2: see probe.few_shot.
      neighbours: k of probe.nearest_neighbours; () for none. None means those
        of NEIGHBOURS for which there are enough training examples.
      temperature: see probe.nearest_neighbours.

    Returns:
      JSON's types: "model" (transfer.describe), "dataset", "split",
      "examples", "train_examples", "classes", "preset", "feature_length";
      "few_shot" and "nearest_neighbours", as probe returns them, without the
      shots and k of "not_possible"; "temperature".

    Raises:
      DatasetError: there is no such split, no "train", or a class has fewer
        examples than asked for.
      and what transfer.feature_model and evaluate.predict raise.
    """
    test = evaluate.scored_split(dataset, split)
    train = evaluate.scored_split(dataset, "train")
    if test is train:
        raise errors.DatasetError(
            "Features are scored on other pictures than those that train the "
            "probe or are the neighbours. Received: the split 'train' for "
            "both. Score another split (--split)."
        )
    row = evaluate.preset_for(preset)
    seeds = list(seeds)
    possible, lacking = _possible_shots(train, shots, seeds)
    ks, too_large = _possible_neighbours(train, neighbours)
    chosen = np.arange(train.size)
    if not ks and np.ndim(l2) == 0:
        # Other training pictures would be looked at for nothing.
        chosen = np.unique(
            np.concatenate(
                [
                    train.few_shot_indices(count, seed)
                    for count in possible
                    for seed in seeds
                ]
            )
        )
    model = transfer.feature_model(source)
    features, labels = {}, {}
    for part in (train.take(chosen), test):
        features[part.name], labels[part.name] = evaluate.predict(
            model,
            part,
            preset=row,
            batch_size=batch_size,
            progress=progress,
        )
        evaluate.require_finite(features[part.name], source)
    four = (
        features[train.name],
        labels[train.name],
        features[test.name],
        labels[test.name],
    )
    result = {
        "model": transfer.describe(model),
        "dataset": dataset.name,
        "split": test.name,
        "examples": test.size,
        "train_examples": train.size,
        "classes": train.num_classes,
        "preset": dataclasses.asdict(row),
        "feature_length": four[0].shape[1],
        "few_shot": [],
        "nearest_neighbours": [],
        "not_possible": {"shots": lacking, "k": too_large},
        "temperature": temperature,
    }
    if possible:
        result["few_shot"] = probe.few_shot(
            *four,
            num_classes=train.num_classes,
            subset=lambda count, seed: np.searchsorted(
                chosen, train.few_shot_indices(count, seed)
            ),
            shots=possible,
            seeds=seeds,
            l2=l2,
        )
    if ks:
        result["nearest_neighbours"] = probe.nearest_neighbours(
            *four,
            num_classes=train.num_classes,
            k=ks,
            temperature=temperature,
        )
    return result


def markdown(result: Mapping[str, Any]) -> str:
    """What `score` returned as tables."""
    lines = [
        f"{result['model']['source']} on {result['dataset']}: "
        f"{result['examples']} pictures of {result['split']}, "
        f"{result['classes']} classes, {result['feature_length']} features, "
        f"preset {result['preset']['name']!r}",
    ]
    if result["few_shot"]:
        lines += [
            "",
            "| examples a class | min | median | max | subsets | l2 |",
            "|---:|---:|---:|---:|---:|---|",
        ]
        for row in result["few_shot"]:
            cells = [str(row["examples_per_class"])]
            cells += [f"{100 * row[key]:.1f}%" for key in _SPREAD]
            cells.append(str(len(row["runs"])))
            strengths = sorted({run["l2"] for run in row["runs"]})
            cells.append(", ".join(f"{value:g}" for value in strengths))
            lines.append(f"| {' | '.join(cells)} |")
        if result["few_shot"][0]["l2_chosen_on"]:
            lines += [
                "",
                "Each subset's l2 is the best on "
                f"{result['few_shot'][0]['l2_chosen_on']}.",
            ]
    if result["nearest_neighbours"]:
        vote = "the same"
        if result["temperature"] is not None:
            vote = f"exp(similarity / {result['temperature']:g})"
        lines += [
            "",
            f"Nearest of {result['train_examples']} training pictures, each "
            f"vote weighs {vote}:",
            "",
            "| k | top-1 |",
            "|---:|---:|",
        ]
        lines += [
            f"| {row['k']} | {100 * row['top1']:.1f}% |"
            for row in result["nearest_neighbours"]
        ]
    for name, numbers in result["not_possible"].items():
        if numbers:
            lines += [
                "",
                f"Not possible with so few training pictures: {name} "
                f"{', '.join(map(str, numbers))}.",
            ]
    return "\n".join(lines) + "\n"


_SPREAD = ("min", "median", "max")


def _possible_shots(
    train: data.Split, shots: Iterable[int] | None, seeds: Sequence[int]
) -> tuple[list[int], list[int]]:
    """(shots, those of the usual ones that are too many)."""
    if shots is not None:
        asked = list(shots)
        for count in asked:
            train.few_shot_indices(count, seeds[0])
        return asked, []
    # Every class has one, or what the split says of it is the answer.
    train.few_shot_indices(1, seeds[0])
    fewest = np.bincount(train.labels, minlength=train.num_classes).min()
    return (
        [count for count in probe.SHOTS if count <= fewest],
        [count for count in probe.SHOTS if count > fewest],
    )


def _possible_neighbours(
    train: data.Split, neighbours: Iterable[int] | None
) -> tuple[list[int], list[int]]:
    if neighbours is None:
        return (
            [k for k in NEIGHBOURS if k <= train.size],
            [k for k in NEIGHBOURS if k > train.size],
        )
    asked = list(neighbours)
    if any(k > train.size for k in asked):
        raise errors.DatasetError(
            "k is at most the number of training examples, "
            f"{train.size}. Received: {asked}. Ask for fewer neighbours."
        )
    return asked, []
