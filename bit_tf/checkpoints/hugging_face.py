"""The JSON files beside Hugging Face weights, and a directory of them.

config.json and preprocessor_config.json of transformers' BiT, and timm's
config.json, say what the arrays do not: options of the architecture, classes,
and how pictures are prepared. A field that is absent has transformers' default.

Source: transformers, models/bit/configuration_bit.py, modeling_bit.py and
image_processing_bit.py; timm, models/_hub.py, data/config.py and
data/transforms_factory.py.
"""

import dataclasses
import json
import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from bit_tf import errors, files, labels, presets, variants
from bit_tf.checkpoints import (
    checkpoint,
    layout,
    rename,
    safetensors_file,
)
from bit_tf.checkpoints.facts import KEY, Facts, facts_of
from bit_tf.labels import Label
from bit_tf.presets import Preset

__all__ = [
    "check_options",
    "is_timm",
    "read_config",
    "recorded_facts",
    "timm_facts",
    "transformers_facts",
    "write",
]

Shape = tuple[int, ...]

CONFIG = "config.json"
PREPROCESSOR = "preprocessor_config.json"
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
# Defaults of BitImageProcessor; mean and standard deviation are CLIP's.
_PROCESSOR: dict[str, Any] = {
    "do_resize": True,
    "size": {"shortest_edge": 224},
    "resample": 3,
    "do_center_crop": True,
    "crop_size": {"height": 224, "width": 224},
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "do_pad": False,
}
_PROCESSORS = (
    "BitImageProcessor",
    "BitImageProcessorFast",
    "BitImageProcessorPil",
    "BitFeatureExtractor",
)
_METHODS = {2: "bilinear", 3: "bicubic"}
_TIMM_FIELDS = ("input_size", "crop_pct", "interpolation", "mean", "std")
_TIMM_NAME = re.compile(r"resnetv2_(\d+x\d+)_bit")
_MAX_JSON = 1 << 26
_HALVES = [0.5, 0.5, 0.5]


def read_config(directory: Path) -> dict[str, Any] | None:
    """Reads a directory's config.json; None if it has none.

    Raises:
      CheckpointFormatError: it is no JSON object.
    """
    return _read_json(directory / CONFIG)


def is_timm(config: Mapping[str, Any]) -> bool:
    """Whether a config.json is timm's and not transformers'."""
    return "architecture" in config and "model_type" not in config


def recorded_facts(path: Path, value: Any) -> Facts | None:
    """Reads the facts under `KEY` in a file, as JSON or its text; None is None.

    Args:
      path: the file, for messages.

    Raises:
      CheckpointFormatError: they are none.
    """
    if value is None:
        return None
    text = value if isinstance(value, str) else json.dumps(value)
    try:
        return Facts.from_json(text)
    except errors.CheckpointFormatError as error:
        raise errors.CheckpointFormatError(f"{path}: {error}") from error


def check_options(directory: Path, config: Mapping[str, Any]) -> None:
    """Refuses options of transformers' config.json that BiT does not have.

    `output_stride` may be another where the facts of this package beside it
    say the same: transformers gives up strides without dilating.

    Raises:
      CheckpointFormatError: naming every such option, its value, and the one
        that is supported.
    """
    path = directory / CONFIG
    recorded = recorded_facts(path, config.get(KEY))
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


def transformers_facts(
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
    if config is None or is_timm(config):
        notes = (
            f"No {CONFIG} of transformers: layer type, padding and labels "
            "could not be checked.",
        )
        names = None if recorded is None else recorded.labels
    else:
        _check_architecture(path, config, weights)
        recorded = recorded or recorded_facts(path, config.get(KEY))
        names = _labels(path, config, weights.num_classes, recorded)
    preset, more = _preset(directory, recorded)
    facts = dataclasses.replace(
        recorded or Facts("timm"),
        preset=preset,
        labels=names if weights.num_classes else None,
    )
    return facts, notes + more


def timm_facts(
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
        raise _damaged(path, "pretrained_cfg", fields)
    preset, why = _timm_preset(path, fields)
    if why:
        notes += (f"{CONFIG}: {why}; the preset is not known.",)
    arguments = config.get("model_args") or {}
    stride = 32
    if isinstance(arguments, dict):
        stride = arguments.get("output_stride", 32)
    if stride not in (32, 16, 8):
        raise _damaged(path, "output_stride", stride)
    names = _timm_labels(path, {**fields, **config})
    if not weights.num_classes:
        names = None
    return Facts("timm", preset, names, stride), notes


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
        _write_json(directory / CONFIG, config)
        _write_json(directory / PREPROCESSOR, _processor(facts.preset))
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
    config = read_config(directory) or {}
    check_options(directory, config)
    found, _ = transformers_facts(directory, config, written)
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
            - {CONFIG, PREPROCESSOR, WEIGHTS}
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
    return [label.name for label in _checked(path, found, num_classes)]


def _checked(path: Path, found: Any, num_classes: int) -> tuple[Label, ...]:
    try:
        return labels.check(found, num_classes)
    except ValueError as error:
        raise errors.CheckpointFormatError(f"{path}: {error}") from error


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
            raise _damaged(path, "id2label", found)
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
    _checked(path, names, num_classes)
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
            map(_is_count, said[name])
        ):
            raise _damaged(path, name, said[name])
    for name in ("embedding_size", "width_factor"):
        if not _is_count(said[name]):
            raise _damaged(path, name, said[name])
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


def _preset(
    directory: Path, recorded: Facts | None
) -> tuple[Preset | None, tuple[str, ...]]:
    """Reads preprocessor_config.json, where the record does not say it."""
    path = directory / PREPROCESSOR
    fields = _read_json(path)
    if fields is None:
        if recorded is not None:
            return recorded.preset, ()
        return None, (
            f"No {PREPROCESSOR}: how pictures were prepared is not known.",
        )
    preset, why = _processor_preset(path, fields)
    if recorded is not None:
        # Unless somebody has changed it since, the record says it in full.
        before = _processor(recorded.preset)
        if (preset, why) == _processor_preset(path, before):
            return recorded.preset, ()
    return preset, (
        (f"{PREPROCESSOR}: {why}; the preset is not known.",) if why else ()
    )


def _processor(preset: Preset | None) -> dict[str, Any]:
    """preprocessor_config.json for a preset, as near as it can say it."""
    fields: dict[str, Any] = {
        "image_processor_type": "BitImageProcessor",
        "do_convert_rgb": True,
        "do_resize": preset is not None and preset.resize != "none",
    }
    if preset is not None and preset.resize != "none":
        size = preset.size
        fields["size"] = (
            {"height": size, "width": size}
            if preset.resize == "squash"
            else {"shortest_edge": size}
        )
        fields["resample"] = 2 if preset.method == "bilinear" else 3
    crop = None if preset is None else preset.crop
    fields["do_center_crop"] = crop is not None
    if crop is not None:
        fields["crop_size"] = {"height": crop, "width": crop}
    fields |= {
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": _HALVES,
        "image_std": _HALVES,
    }
    return fields


def _processor_preset(
    path: Path, found: Mapping[str, Any]
) -> tuple[Preset | None, str]:
    """Gives the preset, or why there is none.

    Raises:
      CheckpointFormatError: the file is damaged, or prepares other pixels.
    """
    kind = found.get("image_processor_type") or found.get(
        "feature_extractor_type", _PROCESSORS[0]
    )
    if kind not in _PROCESSORS:
        return None, f"it is of a {errors.brief(kind)}"
    fields = {
        name: default if found.get(name) is None else found[name]
        for name, default in _PROCESSOR.items()
    }
    switches = [name for name in fields if name.startswith("do_")]
    for name in switches:
        if not isinstance(fields[name], bool):
            raise _damaged(path, name, fields[name])
    _check_pixels(
        path,
        fields,
        {
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "do_normalize": True,
            "image_mean": _HALVES,
            "image_std": _HALVES,
        },
    )
    if fields["do_pad"]:
        return None, "it pads pictures"
    resize, size = "none", None
    method = "bilinear"
    if fields["do_resize"]:
        resize, size = _size(path, fields["size"])
        if resize not in ("shortest_edge", "squash"):
            return None, f"its size is {errors.brief(fields['size'])}"
        resample = fields["resample"]
        if type(resample) is not int or resample not in _METHODS:
            return None, f"its resample is {errors.brief(resample)}"
        method = _METHODS[resample]
    crop = None
    if fields["do_center_crop"]:
        cut = fields["crop_size"]
        kind, crop = _size(path, cut, "crop_size")
        if kind != "squash" and not _is_count(cut):
            return None, f"its crop_size is {errors.brief(cut)}"
        if size is not None and crop is not None and crop > size:
            return None, f"it pads pictures of {size} pixels to {crop}"
    return _row(resize, size, crop, method, "floor", "transformers", path), ""


def _size(path: Path, value: Any, name: str = "size") -> tuple[str, int | None]:
    """Gives how to resize, "" for another way, and the edge in pixels."""
    if _is_count(value):
        return "shortest_edge", value
    if not isinstance(value, dict):
        raise _damaged(path, name, value)
    edges = {key: edge for key, edge in value.items() if edge is not None}
    if not edges or not all(map(_is_count, edges.values())):
        raise _damaged(path, name, value)
    if edges.keys() == {"shortest_edge"}:
        return "shortest_edge", edges["shortest_edge"]
    if edges.keys() == {"height", "width"} and len(set(edges.values())) == 1:
        return "squash", edges["height"]
    return "", None


def _timm_preset(
    path: Path, fields: Mapping[str, Any]
) -> tuple[Preset | None, str]:
    """Gives the preset of timm's pretrained_cfg, or why there is none."""
    absent = [name for name in _TIMM_FIELDS if fields.get(name) is None]
    if absent:
        return None, f"it does not say {', '.join(absent)}"
    _check_pixels(path, fields, {"mean": _HALVES, "std": _HALVES})
    shape = fields["input_size"]
    if not isinstance(shape, list) or not all(map(_is_count, shape)):
        raise _damaged(path, "input_size", shape)
    if len(shape) != 3 or shape[0] != 3 or shape[1] != shape[2]:
        return None, f"its input_size is {shape}"
    share = fields["crop_pct"]
    if type(share) not in (int, float) or not 0 < share < 100:
        raise _damaged(path, "crop_pct", share)
    crop = shape[1]
    edge = math.floor(crop / share)
    if crop > edge:
        return None, f"it pads pictures of {edge} pixels to {crop}"
    if fields["interpolation"] not in _METHODS.values():
        return None, f"its interpolation is {fields['interpolation']!r}"
    mode = fields.get("crop_mode") or "center"
    if mode not in ("center", "squash"):
        return None, f"its crop_mode is {errors.brief(mode)}"
    resize = "squash" if mode == "squash" else "shortest_edge"
    method = fields["interpolation"]
    return _row(resize, edge, crop, method, "round", "timm", path), ""


def _timm_labels(
    path: Path, config: Mapping[str, Any]
) -> tuple[Label, ...] | None:
    """Reads label_names, in the order of the classes, and their meanings."""
    names = config.get("label_names")
    if isinstance(names, dict):
        if sorted(names) != sorted(map(str, range(len(names)))):
            raise _damaged(path, "label_names", names)
        names = [names[str(index)] for index in range(len(names))]
    if not names:
        return None
    if not isinstance(names, list) or not all(
        isinstance(name, str) for name in names
    ):
        raise _damaged(path, "label_names", names)
    meanings = config.get("label_descriptions") or {}
    if not isinstance(meanings, dict):
        raise _damaged(path, "label_descriptions", meanings)
    if all(isinstance(meanings.get(name), str) for name in names):
        found = tuple(Label(name, meanings[name]) for name in names)
    else:
        found = tuple(Label("", name) for name in names)
    return _checked(path, found, len(found))


def _contradictions(
    config: Mapping[str, Any], weights: checkpoint.Checkpoint
) -> tuple[str, ...]:
    """Notes on what timm's config.json says against the arrays."""
    notes = []
    name = config["architecture"]
    match = _TIMM_NAME.match(name) if isinstance(name, str) else None
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


def _check_pixels(
    path: Path, fields: Mapping[str, Any], expected: Mapping[str, Any]
) -> None:
    problems = [
        f"{name}: {errors.brief(fields[name])}; BiT's is {value}"
        for name, value in expected.items()
        if not _near(fields[name], value)
    ]
    if problems:
        raise errors.CheckpointFormatError(
            f"{path}: BiT sees pixels in [-1, 1], pixel / 127.5 - 1, and with "
            "other ones it gives other features. Received:\n"
            + "\n".join(problems)
            + "\nCorrect the file if the weights are BiT's all the same."
        )


def _near(value: Any, expected: Any) -> bool:
    if isinstance(expected, list):
        if not isinstance(value, list):
            value = [value] * len(expected)
        return len(value) == len(expected) and all(map(_near, value, expected))
    if isinstance(value, bool) or isinstance(expected, bool):
        return value is expected
    return isinstance(value, (int, float)) and math.isclose(
        value, expected, rel_tol=1e-6
    )


def _row(
    resize: Any,
    size: int | None,
    crop: int | None,
    method: Any,
    offset: Any,
    family: str,
    path: Path,
) -> Preset:
    """The published preset of these numbers, or one of their own name."""
    parts: list[Any] = [family]
    parts += ["not resized"] if resize == "none" else [resize, size, method]
    if crop is not None:
        parts += ["crop", crop]
    found = Preset(
        " ".join(map(str, parts)),
        resize,
        size,
        crop,
        method,
        True,
        path.name,
        offset,
    )
    try:
        found.check()
    except ValueError as error:
        raise errors.CheckpointFormatError(f"{path}: {error}") from error
    for row in presets.PRESETS.values():
        if dataclasses.replace(found, name=row.name, source=row.source) == row:
            return row
    return found


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 < value < 2**31


def _equal(value: Any, expected: Any) -> bool:
    return type(value) is type(expected) and value == expected


def _damaged(path: Path, name: str, value: Any) -> errors.CheckpointFormatError:
    return errors.CheckpointFormatError(
        f"{path}: {name} is not what its format says. Received: "
        f"{errors.brief(value)}. Correct it, or download the file again."
    )


def _read_json(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        if path.stat().st_size > _MAX_JSON:
            raise ValueError(f"it has over {_MAX_JSON} bytes")
        return safetensors_file.json_object(path.read_bytes())
    except ValueError as error:
        raise errors.CheckpointFormatError(
            f"{path}: it must be a JSON object. Received another: {error}. "
            "Correct it, or download it again."
        ) from error


def _write_json(path: Path, value: dict[str, Any]) -> None:
    text = json.dumps(value, ensure_ascii=False, indent=2)
    path.write_text(text + "\n", encoding="utf-8", newline="\n")
