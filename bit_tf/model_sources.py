"""What somebody names as the model that a task starts from."""

import contextlib
import dataclasses
import os
import re
from pathlib import Path
from typing import Literal

from bit_tf import archive, errors, hub, published, transfer_file, variants

__all__ = ["Kind", "Look", "Source", "kind_of", "look"]

Source = str | os.PathLike[str]
Kind = Literal["architecture", "checkpoint", "hub", "transfer"]


@dataclasses.dataclass(frozen=True)
class Look:
    """What is known of a source before anything is downloaded or run.

    Attributes:
      source: as it may be shown.
      kind: "architecture" (a name without weights), "checkpoint", "hub" (a
        SavedModel), or "transfer" (a `.keras` file around a SavedModel).
      architecture: a name in variants.ARCHITECTURES, or None.
      here: whether the weights are on this disk.
    """

    source: str
    kind: Kind
    architecture: str | None
    here: bool


def look(source: Source) -> Look:
    """Tells what a source is, without a download.

    Args:
      source: see transfer.classifier.

    Raises:
      FileNotFoundError, UnknownNameError, HandleError, CheckpointError: there
        is no such source, or what is on this disk cannot be used.
    """
    kind = kind_of(source)
    shown = published.shown(source)
    text = os.fspath(source)
    here = os.path.exists(text)
    if kind == "architecture":
        return Look(shown, kind, text, True)
    if kind == "transfer":
        transfer_file.check(Path(text))
    name = None
    if kind == "checkpoint":
        row = None
        if not here and isinstance(source, str):
            with contextlib.suppress(errors.UnknownNameError):
                row = variants.variant(source)
        if row is not None:
            name = row.architecture
        elif here or not re.match(r"[a-z]+://", text, re.IGNORECASE):
            found = published.open_checkpoint(source)
            known = variants.find_architecture(found.blocks, found.stem_width)
            name = known.name if known else None
    elif kind == "hub":
        if not here:
            hub.as_address(text)
        for row in variants.list_models():
            if text in (row.handle, row.feature_handle):
                name = row.architecture
    return Look(shown, kind, name, here)


def kind_of(source: Source) -> Kind:
    """What kind of source it is, see `Look`; nothing is downloaded."""
    text = os.fspath(source)
    if os.path.isfile(text):
        if transfer_file.is_around_saved_model(text):
            return "transfer"
        return "hub" if archive.is_archive(text) else "checkpoint"
    if os.path.isdir(text):
        inner = hub.resolve(text)
        graphs = ("saved_model.pb", "saved_model.pbtxt")
        is_graph = any(
            os.path.isfile(os.path.join(inner, name)) for name in graphs
        )
        return "hub" if is_graph else "checkpoint"
    if not isinstance(source, str) or source.startswith("hf://"):
        return "checkpoint"
    if "://" in text:
        is_web = re.match("https?://", text, re.IGNORECASE)
        is_file = is_web and published.is_file(text)
        return "checkpoint" if is_file else "hub"
    if text in variants.ARCHITECTURES:
        return "architecture"
    try:
        variants.variant(text)
    except errors.UnknownNameError:
        with contextlib.suppress(errors.HandleError):
            hub.as_address(text)
            return "hub"
    return "checkpoint"
