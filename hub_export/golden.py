"""Golden values: what a SavedModel gave when it was made, kept inside it.

`python -m hub_export.golden DIRECTORY` loads the SavedModel, compares, prints
one JSON object on the last line of stdout, and exits 0 or 1. Exports run it in
a fresh process, so that nothing of the process that wrote the files helps.
"""

import argparse
import json
import os
import pathlib
import subprocess
import sys

import numpy as np

from bit_tf import errors, images

__all__ = ["FILE", "check", "check_in_fresh_process", "make", "save"]

FILE = pathlib.PurePath("assets.extra", "golden.npz")
# Relative errors by compute dtype. Between machines and thread counts sums are
# taken in another order; 16-bit layers round each of them.
TOLERANCES = {"float32": 1e-4, "bfloat16": 0.1, "float16": 0.02}
# oneDNN's caches and a second executor thread take memory for speed, which a
# check on two pictures does not need.
_FRUGAL = {
    "TF_CPP_MIN_LOG_LEVEL": "3",
    "TF_ENABLE_ONEDNN_OPTS": "0",
    "TF_NUM_INTEROP_THREADS": "1",
}


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

    y, x, c = np.meshgrid(
        np.arange(64), np.arange(64), np.arange(3), indexing="ij"
    )
    pictures = np.stack([x * 3 + y * (c + 1), (x * y) // (8 + c) + 37 * c])
    pictures = pictures.astype(np.uint8)
    features = models.endpoints(model, ["pre_logits"])(pictures)["pre_logits"]
    return {
        "images": pictures,
        "features": np.asarray(ops.cast(features, "float32")),
        "output": np.asarray(ops.cast(model(pictures), "float32")),
        "tolerance": np.asarray(
            TOLERANCES[model.get_layer("root_block").compute_dtype]
        ),
    }


def save(values: dict[str, np.ndarray], directory: str | os.PathLike) -> None:
    """Writes golden values into a SavedModel's assets.extra/."""
    path = pathlib.Path(directory) / FILE
    path.parent.mkdir(exist_ok=True)
    np.savez(path, **values)  # type: ignore[arg-type]


def check(directory: str | os.PathLike) -> dict:
    """Loads a SavedModel and compares it with its golden values.

    Args:
      directory: a SavedModel with golden values in assets.extra/.

    Returns:
      {"relative_error": …, "trainable_variables": …, "signatures": […]}

    Raises:
      VerificationError: there are no golden values, or others come out.
    """
    import tensorflow as tf

    path = pathlib.Path(directory) / FILE
    if not path.is_file():
        raise errors.VerificationError(
            f"A verified SavedModel holds golden values in {FILE}. "
            f"Received: {os.fspath(directory)!r}, which has none."
        )
    with np.load(path, allow_pickle=False) as file:
        pictures, expected = file["images"], file["output"]
        features, tolerance = file["features"], float(file["tolerance"])
    model = tf.saved_model.load(os.fspath(directory))
    floats = tf.constant(images.as_float(pictures))
    served = model.signatures["image_feature_vector"]
    found = {}
    for name, output, wanted in (
        ("uint8 pictures", model(tf.constant(pictures)), expected),
        ("float32 pictures", model(floats), expected),
        ("image_feature_vector", served(images=floats)["features"], features),
    ):
        output = np.asarray(output)
        if output.shape != wanted.shape:
            raise errors.VerificationError(
                f"For {name} the output's shape must be {wanted.shape}. "
                f"Received: {output.shape}."
            )
        found[name] = _relative_error(output, wanted)
        if not found[name] <= tolerance:
            raise errors.VerificationError(
                f"For {name} the output must equal the golden values to a "
                f"relative error of {tolerance}. Received: {found[name]}. The "
                "SavedModel is damaged, or was changed after its export."
            )
    return {
        "relative_error": max(found.values()),
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
    process = subprocess.run(
        [sys.executable, "-P", "-m", "hub_export.golden", os.fspath(directory)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **_FRUGAL, "PYTHONWARNINGS": ""},
    )
    lines = process.stdout.splitlines()
    if process.returncode or not lines:
        reason = (lines or process.stderr.strip().splitlines() or ["?"])[-1]
        raise errors.VerificationError(
            f"A fresh process could not confirm {os.fspath(directory)!r} "
            f"(exit {process.returncode}): {reason}"
        )
    return json.loads(lines[-1])


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=check.__doc__)
    parser.add_argument("directory")
    try:
        report = check(parser.parse_args(argv).directory)
    except errors.BitTfError as error:
        print(error)
        return 1
    print(json.dumps(report))
    return 0


if __name__ == "__main__":
    sys.exit(main())
