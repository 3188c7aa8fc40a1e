"""What is known of the SavedModel of a `hub.KerasLayer`."""

import contextlib
import dataclasses
import json
import os
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

from bit_tf import (
    checkpoints,
    errors,
    hub,
    keras_layer,
    labels,
    presets,
    published,
    variants,
)
from hub_export import card, description, entry, golden

__all__ = ["Origin", "of"]


@dataclasses.dataclass(frozen=True)
class Origin:
    """What is known of a SavedModel inside.

    Attributes:
      handle: as others may see it; None for an object.
      sha256: of its content (see hub.content_hash), or None.
      directory: where it lies, or None.
      architecture, output_stride, numerics, citations: as in card.Card.
      is_classifier: whether it says that it returns logits.
      class_labels: the name of its classes' set, or the classes, or None.
      probabilities: what it says turns its logits into them, or None.
      preset: how its pictures were prepared, or None.
      tolerance: the relative error that its golden values allow.
    """

    handle: str | None = None
    sha256: str | None = None
    directory: pathlib.Path | None = None
    architecture: str = "custom"
    output_stride: int | None = None
    numerics: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    citations: tuple[str, ...] = ()
    is_classifier: bool = False
    class_labels: str | tuple[labels.Label, ...] | None = None
    probabilities: str | None = None
    preset: presets.Preset | None = None
    tolerance: float = 0.0


def of(layer: keras_layer.KerasLayer) -> Origin:
    """What is known of the SavedModel of a layer.

    Raises:
      ExportError: there is none any more at its handle, or another.
    """
    try:
        return _of(layer)
    except (errors.ArchiveError, errors.HandleError) as error:
        raise errors.ExportError(
            "An exported model records which SavedModels it was made around. "
            f"Received: the layer {layer.name!r}, whose SavedModel is not what "
            f"was loaded: {error} Put it back where it was."
        ) from error


def _of(layer: keras_layer.KerasLayer) -> Origin:
    model, handle = layer.resolved_object, layer.handle
    classifies = "image_classification" in getattr(model, "signatures", {})
    if handle is None:
        return Origin(is_classifier=classifies and layer._signature is None)
    # Absolute, but for a layer that cannot be saved for other reasons.
    with contextlib.suppress(errors.BitTfError):
        handle = str(layer.get_config()["handle"])
    directory = pathlib.Path(hub.resolve(handle))
    known = Origin(
        _shown(handle, directory), layer.content_hash, directory=directory
    )
    classes = None
    with contextlib.suppress(errors.HandleError):
        classes = labels.read_saved_model(directory)
        classifies = classifies or classes is not None
    said = _read(directory / card.CARD_FILE, card.Card.from_dict)
    if said is not None and _is_sound(said):
        classifies = bool(said.num_classes)
        known = dataclasses.replace(
            known,
            architecture=said.architecture,
            output_stride=said.output_stride,
            numerics=said.numerics,
            citations=said.citations,
            probabilities=said.probabilities,
            preset=_preset(said),
        )
        if said.labels in labels.LABEL_SETS and classes == labels.label_set(
            said.labels
        ):
            known = dataclasses.replace(known, class_labels=said.labels)
        elif classes is not None and len(classes) == said.num_classes:
            known = dataclasses.replace(known, class_labels=classes)
    elif (found := _checkpoint(directory)) is not None:
        row = variants.find_architecture(found.blocks, found.stem_width)
        known = dataclasses.replace(
            known,
            architecture=row.name if row else "custom",
            output_stride=found.facts.output_stride,
            numerics=card.constants(found.facts.numerics),
            citations=(variants.BIT,),
        )
    with contextlib.suppress(errors.VerificationError):
        if (values := golden.read(directory)) is not None:
            known = dataclasses.replace(known, tolerance=values.tolerance)
    return dataclasses.replace(
        known, is_classifier=classifies and layer._signature is None
    )


def _shown(handle: str, directory: pathlib.Path) -> str:
    """A handle as others may see it: nothing of this machine's paths.

    A SavedModel on this disk is told by the handle under which it was
    published, or else by its folder's or archive's name.
    """
    if not os.path.exists(handle) and not handle.startswith("file://"):
        return published.shown(hub.as_address(handle))
    release = _read(
        directory / entry.PUBLICATION_FILE, entry.Publication.from_dict
    )
    if release is not None:
        return str(release.handle)
    return pathlib.Path(handle).absolute().name


def _read(path: pathlib.Path, from_dict: Callable[[Any], Any]) -> Any:
    """What a JSON file of this package describes; None where it is not one."""
    try:
        return from_dict(json.loads(path.read_bytes()))
    except (
        AttributeError,
        LookupError,
        OSError,
        RecursionError,
        TypeError,
        ValueError,
    ):
        return None


def _is_sound(said: card.Card) -> bool:
    """Whether what is taken from a card has the types that it should have."""
    return (
        isinstance(said.architecture, str)
        and type(said.num_classes) is int
        and (said.output_stride is None or type(said.output_stride) is int)
        and isinstance(said.numerics, dict)
        and all(isinstance(paper, str) for paper in said.citations)
        and said.probabilities in (None, "softmax", "sigmoid")
        and (said.labels is None or isinstance(said.labels, str))
    )


def _preset(said: card.Card) -> presets.Preset | None:
    """A card's preset; None where that is not one."""
    try:
        return description.recommended_preset(said)
    except (TypeError, ValueError):
        return None


def _checkpoint(directory: pathlib.Path) -> checkpoints.Checkpoint | None:
    """A SavedModel's weights, if they are BiT's."""
    try:
        return checkpoints.read(directory)
    except (errors.BitTfError, OSError):
        return None
