"""config.json beside Hugging Face weights, and a directory of both.

The config.json of transformers' BiT says what the arrays do not: options of
the architecture, and classes. A field that is absent has transformers' default.

Source: transformers, models/bit/configuration_bit.py and modeling_bit.py.
"""

import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from bit_tf import errors, files, labels
from bit_tf.checkpoints import (
    checkpoint,
    json_files,
    layout,
    processors,
    rename,
    safetensors_file,
)
from bit_tf.checkpoints.facts import KEY, Facts, facts_of
from bit_tf.checkpoints.json_files import CONFIG
from bit_tf.labels import Label

__all__ = ["check_options", "read_facts", "write"]

Shape = tuple[int, ...]

WEIGHTS = "model.safetensors"

# What BitConfig allows and BiT is; these are the defaults there, too.
_OPTIONS: dict[str, Any] = {
    "model_type": "bit",
    "layer_type": "preactivation",
    "global_padding": None,
    "num_groups": 32,
    "hidden_act": "relu",
    "num_channels": 3,
    "embedding_dynamic_padding": False,
    "output_stride": 32,
}
_ARCHITECTURE: dict[str, Any] = {
    "depths": [3, 4, 6, 3],
    "embedding_size": 64,
    "hidden_sizes": [256, 512, 1024, 2048],
    "width_factor": 1,
}


def check_options(directory: Path, config: Mapping[str, Any]) -> None:
    """Refuses options of transformers' config.json that BiT does not have.

    `output_stride` may be another where the facts of this package beside it
    say the same: transformers gives up strides without dilating.

    Raises:
      CheckpointFormatError: naming every such option, its value, and the one
        that is supported.
    """
    path = directory / CONFIG
    recorded = json_files.recorded_facts(path, config.get(KEY))
    supported = dict(_OPTIONS)
    if recorded and config.get("output_stride") == recorded.output_stride:
        del supported["output_stride"]
    problems = [
        f"{name}: {errors.brief(config[name])}; supported is "
        f"{json.dumps(expected)}"
        for name, expected in supported.items()
        if not _equal(config.get(name, expected), expected)
    ]
    if problems:
        raise errors.CheckpointFormatError(
            f"{path}: these weights belong to a network that is not BiT, and "
            "which would give other features. Received:\n" + "\n".join(problems)
        )


def read_facts(
    directory: Path,
    config: Mapping[str, Any] | None,
    weights: checkpoint.Checkpoint,
    recorded: Facts | None = None,
) -> tuple[Facts, tuple[str, ...]]:
    """What the files beside transformers' weights say of them.

    Args:
      directory: where the weights lie.
      config: its config.json, which `check_options` has passed; None without.
      weights: the arrays, for their architecture.
      recorded: facts of this package in the weights' own file.

    Returns:
      (facts, notes)

    Raises:
      CheckpointFormatError: a file is damaged, its labels do not fit the head,
        or it prepares pixels in another way than BiT's.
      CheckpointMismatchError: config.json describes another architecture.
    """
    path = directory / CONFIG
    notes: tuple[str, ...] = ()
    if config is None:
        notes = (
            f"No {CONFIG} of transformers: layer type, padding and labels "
            "could not be checked.",
        )
        names = None if recorded is None else recorded.labels
    else:
        _check_architecture(path, config, weights)
        recorded = recorded or json_files.recorded_facts(path, config.get(KEY))
        names = _labels(path, config, weights.num_classes, recorded)
    preset, more = processors.read_preset(directory, recorded)
    facts = dataclasses.replace(
        recorded or Facts("timm"),
        preset=preset,
        labels=names if weights.num_classes else None,
    )
    return facts, notes + more


def write(
    arrays: Mapping[str, np.ndarray],
    path: str | os.PathLike[str],
) -> None:
    """Writes a directory that transformers' `from_pretrained` reads.

    It holds model.safetensors, config.json and preprocessor_config.json: a
    BitForImageClassification, or a BitModel without a head. The arrays are
    taken one at a time; the directory appears whole or not at all, and two
    writes of the same arrays give the same bytes.

    transformers itself standardizes kernels with an epsilon of 1e-8, pads its
    pooling with zeros, resizes with antialiasing and has stride 32. Where the
    facts say otherwise, they are kept in config.json under "bit_tf", which
    this package's reader honours and transformers passes over. Classes without
    names get "LABEL_0" …; of classes of one name, label2id has the last, as in
    the published files.

    Args:
      arrays: canonical name → float array, head (C, N). If it has an attribute
        `shapes`, no array is made to learn its shape.
      path: the directory. One that is empty, or holds nothing but such three
        files, is replaced.

    Raises:
      FileExistsError: something else is at the path.
      CheckpointMismatchError: names or shapes are not those of a BiT-ResNet.
      CheckpointFormatError: an array is not float or holds NaN or infinity, or
        labels do not fit.
      OSError: the directory cannot be written.
    """
    path = Path(path)
    _require_replaceable(path)
    shapes = checkpoint.checked_shapes(arrays)
    detected = layout.detect(shapes)
    facts = facts_of(arrays)
    scheme = rename.TRANSFORMERS
    if not detected.num_classes:
        facts = dataclasses.replace(facts, labels=None)
        scheme = rename.TRANSFORMERS_BARE
    config = _config(path, detected, facts)
    with files.new_directory(path, os.path.lexists(path)) as staging:
        directory = Path(staging)
        json_files.write(directory / CONFIG, config)
        json_files.write(
            directory / processors.PREPROCESSOR,
            processors.to_transformers(facts.preset),
        )
        with open(directory / WEIGHTS, "x+b") as file:
            safetensors_file.write(
                file,
                *safetensors_file.encoded(scheme, arrays, shapes),
                {"format": "pt"},
            )
        _read_back(directory, scheme, shapes, facts)


def _read_back(
    directory: Path,
    scheme: rename.Scheme,
    shapes: Mapping[str, Shape],
    facts: Facts,
) -> None:
    path = directory / WEIGHTS
    opened = safetensors_file.tensors(path)
    entries, extra = rename.collect(path, scheme, opened.entries)
    written = checkpoint.Checkpoint(
        path, entries, format=scheme.name, facts=Facts(), extra=extra
    )
    config = json_files.read(directory / CONFIG) or {}
    check_options(directory, config)
    found, _ = read_facts(directory, config, written)
    if written.shapes != shapes or extra or found != facts:
        raise errors.CheckpointFormatError(
            f"{directory}: what was written must read back the same. Received: "
            f"{found} for {facts}. The disk or its file system is at fault; "
            "write elsewhere."
        )


def _require_replaceable(path: Path) -> None:
    if not os.path.lexists(path):
        return
    if path.is_dir():
        others = sorted(
            {item.name for item in path.iterdir()}
            - {CONFIG, processors.PREPROCESSOR, WEIGHTS}
        )
        if not others:
            return
        what = f"a directory that holds {', '.join(others[:5])}"
    else:
        what = "a file"
    raise FileExistsError(
        f"{path}: a new model's directory does not exist, is empty, or holds "
        f"such a model's files only. Received: {what}. Name another path."
    )


def _config(
    path: Path, detected: layout.Detected, facts: Facts
) -> dict[str, Any]:
    stem, num_classes = detected.stem_width, detected.num_classes
    config: dict[str, Any] = {
        "architectures": [
            "BitForImageClassification" if num_classes else "BitModel"
        ],
        **_OPTIONS,
        "depths": list(detected.blocks),
        "embedding_size": stem,
        "hidden_sizes": [4 * stem << block for block in range(4)],
        "width_factor": 1,
        "drop_path_rate": 0.0,
    }
    if num_classes:
        names = _names(path, num_classes, facts.labels)
        config["id2label"] = {
            str(index): name for index, name in enumerate(names)
        }
        config["label2id"] = {name: index for index, name in enumerate(names)}
        if facts.labels == _published(names):
            facts = dataclasses.replace(facts, labels=None)
    config[KEY] = json.loads(facts.to_json())
    return config


def _names(
    path: Path, num_classes: int, found: tuple[Label, ...] | None
) -> list[str]:
    if found is None:
        return [f"LABEL_{index}" for index in range(num_classes)]
    return [
        label.name
        for label in json_files.checked_labels(path, found, num_classes)
    ]


def _published(names: list[str]) -> tuple[Label, ...]:
    """Labels of these names, with WordNet's ids if they are a published set."""
    known = labels.of_count(len(names))
    if known is not None:
        found = labels.label_set(known)
        if names == [label.name for label in found]:
            return found
    return tuple(Label("", name) for name in names)


def _labels(
    path: Path,
    config: Mapping[str, Any],
    num_classes: int,
    recorded: Facts | None,
) -> tuple[Label, ...] | None:
    """Reads id2label, whose placeholders "LABEL_0" … are no labels."""
    if not num_classes:
        return None
    before = None if recorded is None else recorded.labels
    found = config.get("id2label")
    if found is None:
        count = config.get("num_labels", num_classes)
        names: list[Any] = []
    else:
        if not isinstance(found, dict):
            raise json_files.damaged(path, "id2label", found)
        count = len(found)
        names = [found.get(str(index)) for index in range(count)]
        for index, name in enumerate(names):
            if not isinstance(name, str):
                raise errors.CheckpointFormatError(
                    f"{path}: id2label has a text for each of 0 … "
                    f"{count - 1}. Received: {errors.brief(name)} for {index}. "
                    "Correct it."
                )
    if count != num_classes:
        raise errors.CheckpointFormatError(
            f"{path}: labels name each class. Received: {errors.brief(count)} "
            f"labels for a head of {num_classes} classes. Correct id2label, or "
            "take the weights that belong to it."
        )
    if not names:
        return before
    if all(name == f"LABEL_{index}" for index, name in enumerate(names)):
        names = []
    if before is not None and [label.name for label in before] == names:
        return before
    if not names:
        return None
    json_files.checked_labels(path, names, num_classes)
    return _published(names)


def _check_architecture(
    path: Path, config: Mapping[str, Any], weights: checkpoint.Checkpoint
) -> None:
    said = {
        name: config.get(name, default)
        for name, default in _ARCHITECTURE.items()
    }
    for name in ("depths", "hidden_sizes"):
        if not isinstance(said[name], list) or not all(
            map(json_files.is_count, said[name])
        ):
            raise json_files.damaged(path, name, said[name])
    for name in ("embedding_size", "width_factor"):
        if not json_files.is_count(said[name]):
            raise json_files.damaged(path, name, said[name])
    stem = weights.stem_width
    found = {
        "depths": (said["depths"], list(weights.blocks)),
        "embedding_size": (said["embedding_size"], stem),
        "hidden_sizes × width_factor": (
            [
                _divisible(n * said["width_factor"])
                for n in said["hidden_sizes"]
            ],
            [4 * stem << block for block in range(4)],
        ),
    }
    problems = [
        f"≠ {name}: {errors.brief(text)}, and the arrays have {arrays}"
        for name, (text, arrays) in found.items()
        if text != arrays
    ]
    if problems:
        raise errors.CheckpointMismatchError(
            f"{path}: it describes the weights beside it. Received another "
            "architecture than that of the arrays; put the files together "
            "that belong together.\n" + "\n".join(problems)
        )


def _divisible(channels: int) -> int:
    """The number of channels that transformers makes of that many."""
    return (channels + 4) // 8 * 8


def _equal(value: Any, expected: Any) -> bool:
    return type(value) is type(expected) and value == expected
