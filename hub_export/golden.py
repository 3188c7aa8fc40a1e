"""Golden values: what a SavedModel gave when it was made, kept inside it.

`python -m hub_export.golden DIRECTORY` loads the SavedModel, compares, prints
one JSON object on the last line of stdout, and exits 0 or 1. Exports run it in
a fresh process, so that nothing of the process that wrote the files helps.
"""

import os
import pathlib
import sys
import zipfile
import zlib
from typing import Any, NamedTuple

import numpy as np

from bit_tf import errors, images
from hub_export import fresh_process

__all__ = [
    "FILE",
    "Values",
    "check",
    "check_in_fresh_process",
    "compare",
    "main",
    "make",
    "pictures",
    "read",
    "save",
    "tolerance",
]

FILE = pathlib.PurePath("assets.extra", "golden.npz")
# Relative errors by compute dtype. Between machines and thread counts sums are
# taken in another order; 16-bit layers round each of them.
TOLERANCES = {"float32": 5e-4, "bfloat16": 0.1, "float16": 0.02}
# What golden values may take, unpacked; bytes.
_MAX_SIZE = 2**28


class Values(NamedTuple):
    """What `read` gives.

    Attributes:
      images: uint8 [n, h, w, 3].
      features: float32 [n, d]; None of a model without a feature vector.
      output: float32 [n, d or classes], of `__call__`.
      tolerance: the relative error that is allowed.
    """

    images: np.ndarray
    features: np.ndarray | None
    output: np.ndarray
    tolerance: float


def make(model) -> dict[str, np.ndarray]:
    """Runs a Keras model on fixed pictures, layer by layer.

    Args:
      model: a bit_tf model, that takes uint8 [n, h, w, 3].

    Returns:
      {"images": uint8 [2, 64, 64, 3], "features": float32 [2, d], "output":
      float32 [2, d or classes], "tolerance": a relative error}
    """
    from keras import ops

    from bit_tf import models

    images = pictures()
    features = models.endpoints(model, ["pre_logits"])(images)["pre_logits"]
    return {
        "images": images,
        "features": np.asarray(ops.cast(features, "float32")),
        "output": np.asarray(ops.cast(model(images), "float32")),
        "tolerance": np.asarray(
            tolerance(model.get_layer("root_block").compute_dtype)
        ),
    }


def pictures(height: int = 64, width: int = 64) -> np.ndarray:
    """The fixed pictures, uint8 [2, height, width, 3]."""
    y, x, c = np.meshgrid(
        np.arange(height), np.arange(width), np.arange(3), indexing="ij"
    )
    both = np.stack([x * 3 + y * (c + 1), (x * y) // (8 + c) + 37 * c])
    return both.astype(np.uint8)


def tolerance(dtype: str) -> float:
    """The relative error that is allowed where layers compute in a dtype."""
    return TOLERANCES.get(dtype, TOLERANCES["float32"])


def save(values: dict[str, np.ndarray], directory: str | os.PathLike) -> None:
    """Writes golden values into a SavedModel's assets.extra/."""
    path = pathlib.Path(directory) / FILE
    path.parent.mkdir(exist_ok=True)
    np.savez(path, **values)  # type: ignore[arg-type]


def read(directory: str | os.PathLike) -> Values | None:
    """The golden values in a SavedModel, or None.

    Raises:
      VerificationError: they are damaged.
    """
    path = pathlib.Path(directory) / FILE
    if not path.is_file():
        return None
    try:
        with zipfile.ZipFile(path) as members:
            size = sum(member.file_size for member in members.infolist())
        if size > _MAX_SIZE:
            raise ValueError(f"{size} bytes, over the limit of {_MAX_SIZE}")
        with np.load(path, allow_pickle=False) as file:
            values = Values(
                file["images"],
                file.get("features"),
                file["output"],
                float(file["tolerance"]),
            )
        shown, *vectors = (array for array in values[:3] if array is not None)
        if shown.dtype != np.uint8 or shown.shape[3:] != (3,):
            raise ValueError(f"images {shown.dtype} {shown.shape}")
        if any(a.dtype != np.float32 or a.ndim != 2 for a in vectors):
            raise ValueError("features or output are no float32 [n, d]")
        if not 0 < values.tolerance <= max(TOLERANCES.values()):
            raise ValueError(f"tolerance {values.tolerance}")
    except (
        AttributeError,
        EOFError,
        LookupError,
        MemoryError,
        NotImplementedError,
        OSError,
        RuntimeError,
        SyntaxError,
        TypeError,
        ValueError,
        zipfile.BadZipFile,
        zlib.error,
    ) as error:
        raise errors.VerificationError(
            f"Golden values are an .npz archive of images, features, output "
            f"and tolerance. Received in {FILE}: another file "
            f"({type(error).__name__}: {error}). Get the SavedModel again."
        ) from error
    return values


def compare(model: Any, values: Values) -> float:
    """The largest relative error of a loaded SavedModel.

    Raises:
      VerificationError: it gives other values, or cannot be asked for them.
    """
    import tensorflow as tf

    integers = tf.constant(values.images)
    floats = tf.constant(images.as_float(values.images))
    served: Any = getattr(model, "signatures", {}).get("image_feature_vector")
    if served is None and values.features is not None:
        raise errors.VerificationError(
            "A SavedModel with golden features has the signature "
            "image_feature_vector. Received: one without."
        )
    questions: list[tuple[str, np.ndarray, Any]] = [
        ("uint8 pictures", values.output, lambda: model(integers)),
        ("float32 pictures", values.output, lambda: model(floats)),
    ]
    if values.features is not None:
        questions.append(
            (
                "image_feature_vector",
                values.features,
                lambda: served(images=floats)["features"],
            )
        )
    found = []
    for name, wanted, ask in questions:
        try:
            output = np.asarray(ask())
        except (LookupError, TypeError, ValueError, tf.errors.OpError) as error:
            raise errors.VerificationError(
                f"For {name} the SavedModel must give its golden values. "
                f"Received: {type(error).__name__}: {error}"
            ) from error
        if output.shape != wanted.shape:
            raise errors.VerificationError(
                f"For {name} the output's shape must be {wanted.shape}. "
                f"Received: {output.shape}."
            )
        found.append(_relative_error(output, wanted))
        if not found[-1] <= values.tolerance:
            raise errors.VerificationError(
                f"For {name} the output must equal the golden values to a "
                f"relative error of {values.tolerance}. Received: {found[-1]}. "
                "The SavedModel is damaged, or was changed after its export."
            )
    return max(found)


def check(directory: str | os.PathLike) -> dict:
    """Loads a SavedModel and compares it with its golden values.

    Args:
      directory: a SavedModel with golden values in assets.extra/.

    Returns:
      {"relative_error": …, "variables": …, "trainable_variables": …,
      "signatures": […]}

    Raises:
      VerificationError: there are no golden values, or others come out.
    """
    import tensorflow as tf

    values = read(directory)
    if values is None:
        raise errors.VerificationError(
            f"A verified SavedModel holds golden values in {FILE}. "
            f"Received: {os.fspath(directory)!r}, which has none."
        )
    model = tf.saved_model.load(os.fspath(directory))
    return {
        "relative_error": compare(model, values),
        "variables": len(model.variables),
        "trainable_variables": len(model.trainable_variables),
        "signatures": sorted(model.signatures),
    }


def _relative_error(a: np.ndarray, b: np.ndarray) -> float:
    scale = float(np.linalg.norm(b))
    difference = float(np.linalg.norm(a - b))
    return difference / scale if scale else difference


def check_in_fresh_process(directory: str | os.PathLike) -> dict:
    """Runs `check` in a new Python process.

    Raises:
      VerificationError: the process failed; the message holds its own.
    """
    outcome = fresh_process.call("hub_export.golden", directory)
    if outcome.fault is not None:
        raise errors.VerificationError(
            f"A fresh process could not confirm {os.fspath(directory)!r} "
            f"({outcome.fault})"
        )
    return outcome.answer


def main(argv: list[str] | None = None) -> int:
    """Runs `check`; see above."""
    return fresh_process.serve(
        lambda directory, answer: answer(check(directory)), check.__doc__, argv
    )


if __name__ == "__main__":
    sys.exit(main())
