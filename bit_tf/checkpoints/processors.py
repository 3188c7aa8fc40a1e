"""How pictures are prepared, as transformers' and timm's JSON files say it.

transformers has preprocessor_config.json beside the weights; timm has the
pretrained_cfg of its config.json. Both are read as a `Preset`, and a `Preset`
is written as the former. A field that is absent has transformers' default.

Source: transformers, models/bit/image_processing_bit.py; timm, data/config.py
and data/transforms_factory.py.
"""

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bit_tf import errors, presets
from bit_tf.checkpoints import json_files
from bit_tf.checkpoints.facts import Facts
from bit_tf.presets import Preset

__all__ = [
    "PREPROCESSOR",
    "from_timm",
    "from_transformers",
    "read_preset",
    "to_transformers",
]

PREPROCESSOR = "preprocessor_config.json"

# Defaults of BitImageProcessor; mean and standard deviation are CLIP's.
_DEFAULTS: dict[str, Any] = {
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
_HALVES = [0.5, 0.5, 0.5]


def read_preset(
    directory: Path, recorded: Facts | None
) -> tuple[Preset | None, tuple[str, ...]]:
    """Reads preprocessor_config.json, where the record does not say it.

    Args:
      directory: where the file lies, if there is one.
      recorded: facts of this package, whose preset says more than the file
        can, and counts unless the file has been changed since.

    Returns:
      (preset or None, notes)

    Raises:
      CheckpointFormatError: the file is damaged, or prepares other pixels.
    """
    path = directory / PREPROCESSOR
    fields = json_files.read(path)
    if fields is None:
        if recorded is not None:
            return recorded.preset, ()
        return None, (
            f"No {PREPROCESSOR}: how pictures were prepared is not known.",
        )
    preset, why = from_transformers(path, fields)
    if recorded is not None:
        # Unless somebody has changed it since, the record says it in full.
        before = to_transformers(recorded.preset)
        if (preset, why) == from_transformers(path, before):
            return recorded.preset, ()
    return preset, (
        (f"{PREPROCESSOR}: {why}; the preset is not known.",) if why else ()
    )


def to_transformers(preset: Preset | None) -> dict[str, Any]:
    """The fields of preprocessor_config.json, as near as they can say it."""
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


def from_transformers(
    path: Path, found: Mapping[str, Any]
) -> tuple[Preset | None, str]:
    """Gives the preset of preprocessor_config.json, or why there is none.

    Args:
      path: the file, for messages.
      found: its fields.

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
        for name, default in _DEFAULTS.items()
    }
    switches = [name for name in fields if name.startswith("do_")]
    for name in switches:
        if not isinstance(fields[name], bool):
            raise json_files.damaged(path, name, fields[name])
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
        if kind != "squash" and not json_files.is_count(cut):
            return None, f"its crop_size is {errors.brief(cut)}"
        if size is not None and crop is not None and crop > size:
            return None, f"it pads pictures of {size} pixels to {crop}"
    return _row(resize, size, crop, method, "floor", "transformers", path), ""


def from_timm(
    path: Path, fields: Mapping[str, Any]
) -> tuple[Preset | None, str]:
    """Gives the preset of timm's pretrained_cfg, or why there is none.

    Args:
      path: the file, for messages.
      fields: those of the pretrained_cfg.

    Raises:
      CheckpointFormatError: the file is damaged, or prepares other pixels.
    """
    absent = [name for name in _TIMM_FIELDS if fields.get(name) is None]
    if absent:
        return None, f"it does not say {', '.join(absent)}"
    _check_pixels(path, fields, {"mean": _HALVES, "std": _HALVES})
    shape = fields["input_size"]
    if not isinstance(shape, list) or not all(map(json_files.is_count, shape)):
        raise json_files.damaged(path, "input_size", shape)
    if len(shape) != 3 or shape[0] != 3 or shape[1] != shape[2]:
        return None, f"its input_size is {shape}"
    share = fields["crop_pct"]
    if type(share) not in (int, float) or not 0.01 <= share < 100:
        raise json_files.damaged(path, "crop_pct", share)
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


def _size(path: Path, value: Any, name: str = "size") -> tuple[str, int | None]:
    """Gives how to resize, "" for another way, and the edge in pixels."""
    if json_files.is_count(value):
        return "shortest_edge", value
    if not isinstance(value, dict):
        raise json_files.damaged(path, name, value)
    edges = {key: edge for key, edge in value.items() if edge is not None}
    if not edges or not all(map(json_files.is_count, edges.values())):
        raise json_files.damaged(path, name, value)
    if edges.keys() == {"shortest_edge"}:
        return "shortest_edge", edges["shortest_edge"]
    if edges.keys() == {"height", "width"} and len(set(edges.values())) == 1:
        return "squash", edges["height"]
    return "", None


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
    if isinstance(value, int):
        # An integer may be too large for a float.
        return value == expected
    return isinstance(value, float) and math.isclose(
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
