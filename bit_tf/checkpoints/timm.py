"""timm's weights: config.json beside them, and one .safetensors file.

The file is written here as timm itself writes it; `pytorch` reads it. Of the
config.json, which timm's own publishing makes, this reads what arrays do not
say: classes, stride, and how pictures are prepared.

Source: timm, models/resnetv2.py, models/_helpers.py and models/_hub.py.
"""

import dataclasses
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from bit_tf import errors, files, variants
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

__all__ = ["is_timm", "read_facts", "write"]

_NAME = re.compile(r"resnetv2_(\d+x\d+)_bit")


def is_timm(config: Mapping[str, Any]) -> bool:
    """Whether a config.json is timm's and not transformers'."""
    return "architecture" in config and "model_type" not in config


def read_facts(
    directory: Path,
    config: Mapping[str, Any] | None,
    weights: checkpoint.Checkpoint,
    recorded: Facts | None = None,
) -> tuple[Facts, tuple[str, ...]]:
    """What the files beside timm's weights say of them.

    Args:
      directory: where the weights lie.
      config: its config.json; None without.
      weights: the arrays, for their architecture.
      recorded: facts of this package in the weights' own file, which count
        more.

    Returns:
      (facts, notes)

    Raises:
      CheckpointFormatError: config.json is damaged, or it prepares pixels in
        another way than BiT's.
    """
    if recorded is not None:
        return recorded, ()
    path = directory / CONFIG
    if config is None or not is_timm(config):
        return Facts("timm"), (
            f"No {CONFIG} of timm: how pictures were prepared is not known."
            if config is None
            else f"{CONFIG} is not timm's, and was not used.",
        )
    notes = _contradictions(config, weights)
    fields = config.get("pretrained_cfg") or config
    if not isinstance(fields, dict):
        raise json_files.damaged(path, "pretrained_cfg", fields)
    preset, why = processors.from_timm(path, fields)
    if why:
        notes += (f"{CONFIG}: {why}; the preset is not known.",)
    arguments = config.get("model_args") or {}
    stride = 32
    if isinstance(arguments, dict):
        stride = arguments.get("output_stride", 32)
    if stride not in (32, 16, 8):
        raise json_files.damaged(path, "output_stride", stride)
    names = _labels(path, {**fields, **config})
    if not weights.num_classes:
        names = None
    return Facts("timm", preset, names, stride), notes


def write(
    arrays: Mapping[str, np.ndarray], path: str | os.PathLike[str]
) -> None:
    """Writes a file for `timm.create_model("resnetv2_…_bit",
    checkpoint_path=path, num_classes=…)`.

    The arrays are taken one at a time; the file appears whole or not at all,
    and two writes of the same arrays give the same bytes. Its metadata hold
    the facts, which this package's reader honours: timm itself standardizes
    kernels with an epsilon of 1e-8 and pads its pooling with zeros, whatever
    is recorded there.

    Args:
      arrays: canonical name → float array, head (C, N). If it has an attribute
        `shapes`, no array is made to learn its shape.
      path: the file to write or to replace.

    Raises:
      CheckpointMismatchError: names or shapes are not those of a BiT-ResNet.
      CheckpointFormatError: an array is not float or holds NaN or infinity, or
        labels do not fit.
      OSError: the file cannot be written.
    """
    path = Path(path)
    checkpoint.require_place(path)
    shapes = checkpoint.checked_shapes(arrays)
    facts = facts_of(arrays)
    if layout.HEAD_KERNEL not in shapes:
        facts = dataclasses.replace(facts, labels=None)
    with files.new_file(path) as file:
        safetensors_file.write(
            file,
            *safetensors_file.encoded(rename.TIMM, arrays, shapes),
            {"format": "pt", KEY: facts.to_json()},
        )
        _read_back(Path(file.name), shapes, facts)


def _read_back(
    path: Path, shapes: Mapping[str, tuple[int, ...]], facts: Facts
) -> None:
    opened = safetensors_file.tensors(path)
    entries, extra = rename.collect(path, rename.TIMM, opened.entries)
    found = json_files.recorded_facts(path, opened.metadata.get(KEY))
    written = checkpoint.Checkpoint(
        path,
        entries,
        format=rename.TIMM.name,
        facts=found or Facts(),
        extra=extra,
    )
    if written.shapes != shapes or extra or found != facts:
        raise errors.CheckpointFormatError(
            f"{path}: what was written must read back the same. Received: "
            f"{found} for {facts}. The disk or its file system is at fault; "
            "write elsewhere."
        )


def _labels(path: Path, config: Mapping[str, Any]) -> tuple[Label, ...] | None:
    """Reads label_names, in the order of the classes, and their meanings."""
    names = config.get("label_names")
    if isinstance(names, dict):
        if sorted(names) != sorted(map(str, range(len(names)))):
            raise json_files.damaged(path, "label_names", names)
        names = [names[str(index)] for index in range(len(names))]
    if not names:
        return None
    if not isinstance(names, list) or not all(
        isinstance(name, str) for name in names
    ):
        raise json_files.damaged(path, "label_names", names)
    meanings = config.get("label_descriptions") or {}
    if not isinstance(meanings, dict):
        raise json_files.damaged(path, "label_descriptions", meanings)
    if all(isinstance(meanings.get(name), str) for name in names):
        found = tuple(Label(name, meanings[name]) for name in names)
    else:
        found = tuple(Label("", name) for name in names)
    return json_files.checked_labels(path, found, len(found))


def _contradictions(
    config: Mapping[str, Any], weights: checkpoint.Checkpoint
) -> tuple[str, ...]:
    """Notes on what timm's config.json says against the arrays."""
    notes = []
    name = config["architecture"]
    match = _NAME.match(name) if isinstance(name, str) else None
    known = variants.ARCHITECTURES.get(f"R{match[1]}") if match else None
    if known is None or (known.blocks, known.stem_width) != (
        weights.blocks,
        weights.stem_width,
    ):
        notes.append(
            f"{CONFIG} says {errors.brief(name)}; the arrays have blocks "
            f"{weights.blocks} and a stem of {weights.stem_width} channels."
        )
    classes = config.get("num_classes", weights.num_classes)
    if classes != weights.num_classes:
        notes.append(
            f"{CONFIG} says {errors.brief(classes)} classes; the arrays have "
            f"{weights.num_classes}."
        )
    if config.get("global_pool", "avg") not in ("avg", "", None):
        notes.append(
            f"{CONFIG} pools by {errors.brief(config['global_pool'])}; "
            "this model takes the mean."
        )
    arguments = config.get("model_args")
    if arguments and (
        not isinstance(arguments, dict)
        or arguments.keys() - {"output_stride", "num_classes"}
    ):
        notes.append(
            f"{CONFIG} has model_args, which were not checked: "
            f"{errors.brief(arguments)}."
        )
    return tuple(notes)
