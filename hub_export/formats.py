"""Checkpoint → any format that is written: what `convert --to` names."""

import dataclasses
import os
import pathlib
import tempfile
from collections.abc import Sequence

import tqdm

from bit_tf import checkpoints, errors, labels, published
from bit_tf.checkpoints import checkpoint as checkpoint_module
from hub_export import sources

__all__ = ["FORMATS", "convert"]

SAVED_MODEL = "savedmodel"
FOLDED = "keras-folded"
FORMATS = (SAVED_MODEL, *checkpoints.FORMATS, FOLDED)


def convert(
    source: str | os.PathLike,
    path: str | os.PathLike,
    to: str,
    *,
    head: bool = True,
    numerics: str | None = None,
    class_labels: str | Sequence | None = "auto",
    overwrite: bool = False,
) -> dict:
    """Writes a checkpoint in another format, read back and checked.

    Args:
      source: whatever bit_tf.load_model takes.
      path: the file to write; a directory for "transformers".
      to: a name of `checkpoints.FORMATS`, whose arrays go through one at a
        time; or "keras-folded", a .keras of Keras' own layers.
      head: False leaves the classifier out.
      numerics: constants of a source instead of the checkpoint's own.
      class_labels: one name a class; or "ilsvrc2012", "imagenet21k"; or "auto",
        the checkpoint's own, else the set whose number of classes fits; or
        None.
      overwrite: replace an existing file, or directory of the same format.

    Returns:
      What `sources.describe` reports, and bytes: what was written.

    Raises:
      ExportError: `path` exists, or could not be written; or the source is a
        model around a SavedModel.
      CheckpointError: the source cannot be used.
      VerificationError: a folded model does not give the model's values.
    """
    target = pathlib.Path(path)
    if to not in FORMATS or to == SAVED_MODEL:
        raise errors.ExportError(
            f"Formats are {', '.join(FORMATS[1:])}. Received: {to!r}."
        )
    if os.path.lexists(target) and not overwrite:
        raise errors.ExportError(
            f"Nothing is written over unless asked. {str(target)!r} exists; "
            "choose another, or pass overwrite=True (--overwrite)."
        )
    if sources.around_saved_model(source) is not None:
        raise errors.ExportError(
            f"--to {to} writes arrays of a BiT-ResNet. Received: "
            f"{published.shown(source)!r}, a model around a SavedModel, which "
            "computes as a program and not by a known architecture. Convert "
            "it with --to savedmodel; if BiT is inside, that directory can be "
            f"converted with --to {to}."
        )
    checkpoint = published.open_checkpoint(source)
    sources.require_apart(path, checkpoint.path)
    facts = dataclasses.replace(
        checkpoint.facts,
        numerics=numerics or checkpoint.facts.numerics,
        labels=_labels(checkpoint, class_labels, to) if head else None,
    )
    try:
        if to == "transformers":
            # The writer itself refuses a directory that is not its own.
            _write(checkpoint, target, to, head, facts)
        else:
            checkpoint_module.require_place(target)
            with tempfile.TemporaryDirectory(
                dir=target.parent, prefix=f".{target.name}."
            ) as directory:
                staging = pathlib.Path(directory, target.name)
                _write(checkpoint, staging, to, head, facts)
                _publish(staging, target, overwrite)
    except OSError as error:
        if isinstance(error, errors.BitTfError):
            raise
        raise errors.ExportError(
            f"{str(target)!r} could not be written: {error}. No part of it "
            "was left behind; check the path, its permissions and the free "
            "space."
        ) from error
    return {
        "bytes": _size(target),
        **sources.describe(checkpoint, numerics),
    }


def _write(checkpoint, path: pathlib.Path, to: str, head: bool, facts) -> None:
    if to == FOLDED:
        from bit_tf import folded, models

        model = models.from_checkpoint(
            checkpoint, head=head, numerics=facts.numerics
        )
        folded.write(model, path, facts=facts)
        return
    arrays = _Watched(checkpoint, facts, head=head)
    with arrays.bar:
        checkpoints.write(arrays, path, format=to)


class _Watched(checkpoints.Selection):
    """Shows on a terminal how many of the arrays have been read."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        # Only of what takes time.
        self.bar = tqdm.tqdm(
            total=len(self), unit="array", delay=1, disable=None, leave=False
        )

    def __getitem__(self, name):
        array = super().__getitem__(name)
        self.bar.update()
        return array


def _publish(
    staging: pathlib.Path, target: pathlib.Path, overwrite: bool
) -> None:
    """Gives a finished file its name, which another may have taken since."""
    if overwrite:
        os.replace(staging, target)
        return
    try:
        # Unlike a rename, a link never replaces anything.
        os.link(staging, target)
    except FileExistsError as error:
        raise errors.ExportError(
            f"Nothing is written over unless asked. {str(target)!r} appeared "
            "while it was converted; choose another, or pass overwrite=True "
            "(--overwrite)."
        ) from error
    except OSError:
        # Some file systems have no links.
        os.rename(staging, target)


def _labels(checkpoint: checkpoints.Checkpoint, class_labels, to: str):
    if isinstance(class_labels, str) and class_labels == "auto":
        class_labels = checkpoint.facts.labels
        # Hugging Face's is the only format that needs a name for each class.
        if class_labels is None and to == "transformers":
            class_labels = labels.of_count(checkpoint.num_classes)
    if class_labels is None or not checkpoint.num_classes:
        return None
    if isinstance(class_labels, str):
        class_labels = labels.label_set(class_labels)
    try:
        return labels.check(class_labels, checkpoint.num_classes)
    except (TypeError, ValueError) as error:
        raise errors.ExportError(str(error)) from error


def _size(path: pathlib.Path) -> int:
    if path.is_dir():
        return sum(file.stat().st_size for file in path.iterdir())
    return path.stat().st_size
