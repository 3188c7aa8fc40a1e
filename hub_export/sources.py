"""What every conversion says and asks of the checkpoint that it reads."""

import os
import pathlib

from bit_tf import checkpoints, errors

__all__ = ["describe", "require_apart"]


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
    """Refuses to write over the checkpoint that is read, or what holds it.

    Raises:
      ExportError: `source` is at `path`, or inside of it.
    """
    target, source = pathlib.Path(path).resolve(), source.resolve()
    if target == source or target in source.parents:
        raise errors.ExportError(
            "What is overwritten must not hold the checkpoint. Received: "
            f"{str(source)!r} at or inside {os.fspath(path)!r}."
        )
