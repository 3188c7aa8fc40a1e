"""The values that the tags of tfhub.dev's documentation may have."""

import functools
import importlib.resources
import json
from collections.abc import Mapping

from bit_tf import errors, handles

__all__ = ["wrong"]

_COLAB = "https://colab.research.google.com/"


def wrong(key: str, value: str) -> str:
    """What is wrong with a tag's value, or ""."""
    known = _values().get(key)
    if known is not None and value not in known:
        some = sorted(known) if len(known) < 10 else errors.near(known, value)
        hint = f"; perhaps {' or '.join(some)}" if some else ""
        return f"{key} has no value {errors.brief(value)}{hint}"
    if key == "asset-path" and not (
        value == "legacy"
        or (value.endswith(handles.ARCHIVE_SUFFIX) and " " not in value)
    ):
        return (
            f"asset-path ends in {handles.ARCHIVE_SUFFIX}, not "
            f"{errors.brief(value)}"
        )
    if key == "colab" and not value.startswith(_COLAB):
        return f"colab begins with {_COLAB}, not {errors.brief(value)}"
    return ""


@functools.cache
def _values() -> Mapping[str, frozenset[str]]:
    """Tag → the values that it may have; no row where any may be."""
    data = importlib.resources.files("hub_export") / "data" / "tfhub_tags.json"
    table = json.loads(data.read_text(encoding="utf-8"))
    table["fine-tunable"] = ("true", "false")
    table["format"] = ("hub", "saved_model", "saved_model_2")
    return {key: frozenset(values) for key, values in table.items()}
