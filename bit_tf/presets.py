"""How each publisher of weights prepared pictures: one named preset each."""

import dataclasses
from typing import Literal

from bit_tf import errors

__all__ = ["PRESETS", "Preset", "preset"]


@dataclasses.dataclass(frozen=True)
class Preset:
    """How the makers of one checkpoint prepared pictures.

    Attributes:
      name: its key in PRESETS.
      resize: "squash" to (size, size), the "shortest_edge" to size with the
        aspect ratio kept, or "none".
      size: pixels of the resized edge.
      crop: pixels of the square cut from the centre.
      method: "bilinear" or "bicubic".
      antialias: True is Pillow's filter, False is TensorFlow's.
      source: where the numbers come from.
      offset: whether half a pixel of the crop's offset is rounded to even, as
        torchvision does, or down, as transformers does.
    """

    name: str
    resize: Literal["squash", "shortest_edge", "none"]
    size: int | None
    crop: int | None
    method: Literal["bilinear", "bicubic"]
    antialias: bool
    source: str
    offset: Literal["round", "floor"] = "round"

    def check(self) -> None:
        """Refuses what is no preset, such as one read from a file.

        Raises:
          ValueError: an attribute is not what the class says.
        """
        sides = [side for side in (self.size, self.crop) if side is not None]
        right = (
            isinstance(self.name, str)
            and isinstance(self.source, str)
            and self.resize in ("squash", "shortest_edge", "none")
            and (self.size is None) == (self.resize == "none")
            and all(type(side) is int and 0 < side < 2**16 for side in sides)
            and self.method in ("bilinear", "bicubic")
            and isinstance(self.antialias, bool)
            and self.offset in ("round", "floor")
        )
        if not right:
            raise ValueError(
                "A preset has the attributes that presets.Preset describes. "
                f"Received: {self}."
            )


_BIG = "google-research/big_transfer, input_pipeline_tf2_or_jax.py"
_TIMM = "timm, default_cfgs of resnetv2.py; edge floor(size / crop_pct)"
_EDGE: Literal["shortest_edge"] = "shortest_edge"
_ROWS = (
    Preset("big_transfer eval", "squash", 480, None, "bilinear", False, _BIG),
    Preset(
        "big_transfer eval 128", "squash", 128, None, "bilinear", False, _BIG
    ),
    Preset(
        "tfhub", "none", None, None, "bilinear", False, "tfhub.dev/google/bit"
    ),
    Preset("timm in21k", _EDGE, 256, 224, "bilinear", True, _TIMM),
    Preset("timm in1k", _EDGE, 448, 448, "bilinear", True, _TIMM),
    Preset("timm in1k 480", _EDGE, 480, 480, "bilinear", True, _TIMM),
    Preset("timm distilled", _EDGE, 256, 224, "bicubic", True, _TIMM),
    Preset("timm teacher 384", _EDGE, 384, 384, "bicubic", True, _TIMM),
    Preset(
        "hf bit-50",
        _EDGE,
        448,
        448,
        "bilinear",
        True,
        "huggingface.co/google/bit-50, preprocessor_config.json",
        "floor",
    ),
    Preset(
        "big_vision fewshot",
        "squash",
        256,
        224,
        "bilinear",
        False,
        "google-research/big_vision, evaluators/fewshot_lsr.py",
    ),
    Preset(
        "vectorhub",
        "none",
        None,
        None,
        "bilinear",
        False,
        "vectorhub, bit_medium.py; its pixels in 0..255 were a defect that is "
        "not repeated",
    ),
)

PRESETS: dict[str, Preset] = {row.name: row for row in _ROWS}


def preset(name: str) -> Preset:
    """The preset of this name.

    Raises:
      UnknownNameError: there is none; the message lists all.
    """
    return errors.lookup(PRESETS, name, "Presets")
