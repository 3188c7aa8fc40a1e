"""JSON files beside weights: bounded and strict reading, and what it finds.

Nothing here knows a format; each format's own module says which fields there
are.
"""

import json
from pathlib import Path
from typing import Any

from bit_tf import errors, labels
from bit_tf.checkpoints.facts import Facts
from bit_tf.labels import Label

__all__ = [
    "CONFIG",
    "checked_labels",
    "damaged",
    "is_count",
    "json_object",
    "read",
    "read_object",
    "recorded_facts",
    "write",
]

# What both timm and transformers call the file beside their weights.
CONFIG = "config.json"

_LIMIT = 1 << 26


def json_object(raw: bytes, *, constants: bool = False) -> dict[str, Any]:
    """Reads a JSON object, strictly: UTF-8, no key twice, no NaN.

    Args:
      raw: the whole text.
      constants: also take NaN and Infinity, which Python's writer makes.

    Raises:
      ValueError: it is something else, or nested too deeply.
    """
    try:
        found = json.loads(
            raw.decode("utf-8"),
            object_pairs_hook=_unique,
            parse_constant=None if constants else _refuse_constant,
        )
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if not isinstance(found, dict):
        raise ValueError(f"it is of type {type(found).__name__}")
    return found


def read_object(path: Path, limit: int = _LIMIT) -> dict[str, Any]:
    """Reads a file of at most `limit` bytes that is a JSON object.

    Raises:
      ValueError: it is something else or longer; without the file's path.
    """
    size = path.stat().st_size
    if size > limit:
        raise ValueError(f"{size} bytes, over the limit of {limit}")
    return json_object(path.read_bytes())


def read(path: Path) -> dict[str, Any] | None:
    """Reads a file that is a JSON object; None if there is no such file.

    Raises:
      CheckpointFormatError: it is something else, or too long.
    """
    if not path.is_file():
        return None
    try:
        return read_object(path)
    except ValueError as error:
        raise errors.CheckpointFormatError(
            f"{path}: it must be a JSON object. Received another: {error}. "
            "Correct it, or download it again."
        ) from error


def write(path: Path, value: dict[str, Any]) -> None:
    """Writes a JSON object, indented, in UTF-8, the same everywhere."""
    text = json.dumps(value, ensure_ascii=False, indent=2)
    path.write_text(text + "\n", encoding="utf-8", newline="\n")


def recorded_facts(where: str | Path, value: Any) -> Facts | None:
    """Reads the facts under `KEY` in a file, as JSON or its text; None is None.

    Args:
      where: the file, for messages.

    Raises:
      CheckpointFormatError: they are none.
    """
    if value is None:
        return None
    text = value if isinstance(value, str) else json.dumps(value)
    try:
        return Facts.from_json(text)
    except errors.CheckpointFormatError as error:
        raise errors.CheckpointFormatError(f"{where}: {error}") from error


def checked_labels(
    path: Path, found: Any, num_classes: int
) -> tuple[Label, ...]:
    """Labels that fit a head, in the form of `labels.check`.

    Raises:
      CheckpointFormatError: they do not.
    """
    try:
        return labels.check(found, num_classes)
    except ValueError as error:
        raise errors.CheckpointFormatError(f"{path}: {error}") from error


def is_count(value: Any) -> bool:
    """Whether a value is an integer in [1, 2**31)."""
    return type(value) is int and 0 < value < 2**31


def damaged(path: Path, name: str, value: Any) -> errors.CheckpointFormatError:
    """The error to raise for a field that holds something else."""
    return errors.CheckpointFormatError(
        f"{path}: {name} is not what its format says. Received: "
        f"{errors.brief(value)}. Correct it, or download the file again."
    )


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        for name, _ in pairs:
            if name in seen:
                raise ValueError(f"the name {errors.brief(name)} occurs twice")
            seen.add(name)
    return found


def _refuse_constant(text: str) -> Any:
    raise ValueError(f"{text} is not JSON")
