"""What every conversion says and asks of the source that it reads."""

import os
import pathlib
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from bit_tf import checkpoints, errors, published
from bit_tf.checkpoints import keras_file, layout

__all__ = ["Around", "around_saved_model", "describe", "require_apart"]


class Around(NamedTuple):
    """A .keras file of a model around a SavedModel.

    It is no checkpoint: what the model computes is in the SavedModel, which
    `bit_tf.transfer.load` fetches and runs.

    Attributes:
      path: of the file.
      handles: those that it names, as they may be shown.
    """

    path: pathlib.Path
    handles: tuple[str, ...]

    def note(self) -> str:
        """What is fetched and run to convert it, for people.

        Raises:
          ExportError: `bit_tf.transfer.load` refuses the file.
        """
        from bit_tf import transfer_file

        try:
            used = [
                transfer_file.place(self.path, handle)
                for handle in _handles(keras_file.config(self.path))
            ]
        except errors.CheckpointFormatError as error:
            raise errors.ExportError(
                f"{error} Then write it with hub_export.export(model, path)."
            ) from error
        named = " and ".join(_shown(used))
        return f"{self.path.name} is around {named}, which is fetched and run."


def around_saved_model(source: str | os.PathLike) -> Around | None:
    """The file of a model around a SavedModel, if a source is one.

    Args:
      source: whatever bit_tf.load_model takes.

    Raises:
      CheckpointFormatError: it is a .keras file, and damaged.
      DownloadError: it is a URL, and could not be fetched whole.
    """
    path = pathlib.Path(source)
    if isinstance(source, str) and not path.is_file():
        if not source.lower().startswith(("http://", "https://")):
            return None
        if not source.lower().partition("?")[0].endswith(".keras"):
            return None
        path = published.locate(source).path
    if not path.is_file() or not keras_file.sniff(path):
        return None
    handles = _shown(_handles(keras_file.config(path)))
    return Around(path, handles) if handles else None


def _shown(handles: Iterable[str]) -> tuple[str, ...]:
    shown = map(published.shown, handles)
    return tuple(dict.fromkeys(map(layout.printable, shown)))


def _handles(config: Any) -> Iterator[str]:
    """The handles of all KerasLayers in a config."""
    todo = [config]
    while todo:
        value = todo.pop()
        if isinstance(value, dict):
            inner = value.get("config")
            if value.get("class_name") == "KerasLayer" and isinstance(
                inner, dict
            ):
                yield str(inner.get("handle"))
            todo += reversed(value.values())
        elif isinstance(value, list):
            todo += reversed(value)


def describe(
    checkpoint: checkpoints.Checkpoint, numerics: str | None = None
) -> dict:
    """What a conversion reports of its source.

    Args:
      checkpoint: what was read.
      numerics: the constants that were asked for instead of its own.
    """
    return {
        "format": checkpoint.format,
        "arrays": len(checkpoint),
        "extra_arrays": list(checkpoint.extra),
        "notes": list(checkpoint.notes),
        "numerics": numerics or checkpoint.facts.numerics,
    }


def require_apart(path: str | os.PathLike, source: pathlib.Path) -> None:
    """Refuses to write over a file or model that is read, or what holds it.

    Raises:
      ExportError: `source` is at `path`, or inside of it.
    """
    target, source = pathlib.Path(path).resolve(), source.resolve()
    if target == source or target in source.parents:
        raise errors.ExportError(
            "What is overwritten must not hold what is read. Received: "
            f"{str(source)!r} at or inside {os.fspath(path)!r}."
        )
