"""The demo's data: handwritten digits, and how its checkpoint was trained.

`python -m hub_export.digits DIRECTORY` trains the `testing` architecture on
scikit-learn's digits (UCI ML hand-written digits, CC BY 4.0) and writes the
two files of hub_export/data: digits.npz, a checkpoint in Google's layout, and
digits_heldout.npz, the pictures it has not seen.
"""

import argparse
import importlib.resources
import pathlib
import sys
from collections.abc import Callable

import numpy as np

from bit_tf import errors, images

__all__ = [
    "CHECKPOINT",
    "NAMES",
    "SIDE",
    "fit",
    "held_out",
    "pictures",
    "shifted",
    "train",
]

DATA = importlib.resources.files("hub_export") / "data"
CHECKPOINT = "digits.npz"
HELD_OUT = "digits_heldout.npz"
NAMES = tuple("zero one two three four five six seven eight nine".split())
SIDE = 32


def pictures(digits: np.ndarray) -> np.ndarray:
    """[n, 8, 8] of 0..16 → float32 RGB [n, 32, 32, 3] in [0, 1]."""
    small = np.repeat(digits[..., None] / np.float32(16), 3, axis=-1)
    return np.stack(
        [
            images.resize(
                digit.astype(np.float32),
                SIDE,
                SIDE,
                method="bilinear",
                antialias=True,
            )
            for digit in small
        ]
    )


def held_out() -> tuple[np.ndarray, np.ndarray]:
    """(float32 [360, 32, 32, 3] in [0, 1], labels [360]), unseen so far."""
    with (
        (DATA / HELD_OUT).open("rb") as file,
        np.load(file, allow_pickle=False) as arrays,
    ):
        return pictures(arrays["digits"]), arrays["labels"]


def train(directory: pathlib.Path, epochs: int, seed: int) -> float:
    """Trains, writes both files, and returns the accuracy on held-out digits.

    The split depends on nothing but its own fixed seed.
    """
    import keras

    from bit_tf import checkpoints, models

    datasets = errors.import_extra("sklearn.datasets", "test")
    data = datasets.load_digits()
    order = np.random.default_rng(0).permutation(len(data.target))
    unseen, seen = order[:360], order[360:]
    x = pictures(data.images)
    y = data.target
    keras.utils.set_random_seed(seed)
    model = models.create_model("testing", len(NAMES))
    fit(model, x[seen], y[seen], epochs=epochs, seed=seed)
    _, accuracy = model.evaluate(x[unseen], y[unseen], verbose=0)
    directory.mkdir(parents=True, exist_ok=True)
    checkpoints.write(model, directory / CHECKPOINT)
    np.savez_compressed(
        directory / HELD_OUT,
        digits=data.images[unseen].astype(np.uint8),
        labels=y[unseen].astype(np.uint8),
    )
    return accuracy


def shifted(
    x: np.ndarray, y: np.ndarray, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """The pictures of a batch, all by the same few pixels; labels as ever."""
    return np.roll(x, rng.integers(-4, 5, 2), (1, 2)), y


def fit(
    model,
    x: np.ndarray,
    y: np.ndarray,
    *,
    epochs: int,
    seed: int,
    change: Callable[
        [np.ndarray, np.ndarray, np.random.Generator],
        tuple[np.ndarray, np.ndarray],
    ] = shifted,
) -> None:
    """Trains a classifier on digits that look different in every epoch.

    Args:
      model: a keras.Model, float32 [n, 32, 32, 3] → logits.
      x: of `pictures`.
      y: labels [n].
      epochs: passes over the digits.
      seed: of their order and of the changes.
      change: (pictures, labels, generator) → those of a batch to learn from.
    """
    import keras

    batch = 64
    steps = epochs * (len(y) // batch)
    model.compile(
        keras.optimizers.SGD(
            keras.optimizers.schedules.CosineDecay(
                0.0, steps, warmup_target=0.03, warmup_steps=steps // 10
            ),
            momentum=0.9,
        ),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
        jit_compile=False,
    )
    rng = np.random.default_rng(seed)

    def batches():
        for _ in range(epochs):
            shuffled = rng.permutation(len(y))
            for start in range(0, len(shuffled) - batch + 1, batch):
                chosen = shuffled[start : start + batch]
                yield change(x[chosen], y[chosen], rng)

    model.fit(
        batches(),
        steps_per_epoch=len(y) // batch,
        epochs=epochs,
        shuffle=False,  # batches() does.
        verbose=2,
    )


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("directory", type=pathlib.Path)
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    accuracy = train(args.directory, args.epochs, args.seed)
    print(f"accuracy on 360 held-out digits: {accuracy:.4f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
