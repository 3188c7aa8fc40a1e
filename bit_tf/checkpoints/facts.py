"""What travels with weights beside the arrays, and how files record it."""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from bit_tf import errors, variants
from bit_tf.labels import Label, check
from bit_tf.presets import Preset

__all__ = ["Facts", "KEY", "facts_of"]

# Under this name other tools' files hold `Facts.to_json`.
KEY = "bit_tf"


@dataclasses.dataclass(frozen=True)
class Facts:
    """What a source says of its weights.

    Attributes:
      numerics: whose epsilons and padding the weights need, a name in
        variants.NUMERICS.
      preset: how its publisher prepared pictures, or None if that is not
        known.
      labels: its classes as the file names them, or None.
      output_stride: 32, 16 or 8 (see models.ResNetV2).
    """

    numerics: str = "google"
    preset: Preset | None = None
    labels: tuple[Label, ...] | None = None
    output_stride: int = 32

    def to_json(self) -> str:
        """One line of JSON, without the labels that are None."""
        found: dict[str, Any] = {
            "numerics": self.numerics,
            "output_stride": self.output_stride,
        }
        if self.preset is not None:
            found["preset"] = dataclasses.asdict(self.preset)
        if self.labels is not None:
            found["labels"] = [[label.id, label.name] for label in self.labels]
        return json.dumps(found, sort_keys=True, ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str | bytes) -> "Facts":
        """Reads what `to_json` wrote.

        Raises:
          CheckpointFormatError: it is something else.
        """
        try:
            return cls._from_dict(json.loads(text))
        except (
            AttributeError,
            KeyError,
            TypeError,
            ValueError,
            RecursionError,
        ) as error:
            raise errors.CheckpointFormatError(
                "What bit_tf records in a file is a JSON object of numerics, "
                f"preset, labels and output_stride. Received: "
                f"{errors.brief(text)} ({error}). Remove or correct it."
            ) from error

    @classmethod
    def _from_dict(cls, found: Mapping[str, Any]) -> "Facts":
        preset = found.get("preset")
        if preset is not None:
            preset = Preset(**preset)
            preset.check()
        labels = found.get("labels")
        if labels is not None:
            labels = check(
                [Label(*_texts(pair)) for pair in labels], len(labels)
            )
        output_stride = found.get("output_stride", 32)
        if type(output_stride) is not int or output_stride not in (32, 16, 8):
            raise ValueError(f"output_stride {output_stride!r}")
        return cls(
            variants.numerics(found["numerics"]).name,
            preset,
            labels,
            output_stride,
        )


def facts_of(arrays: Any) -> Facts:
    """The facts of a Checkpoint or a model's arrays, or else Google's."""
    return getattr(arrays, "facts", Facts())


def _texts(pair: Any) -> list[str]:
    if not isinstance(pair, list) or not all(isinstance(t, str) for t in pair):
        raise TypeError(f"a label is a list of two texts, not {pair!r}")
    return pair
