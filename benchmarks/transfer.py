"""Transfer in miniature: a hub layer against a network from scratch.

    python -m benchmarks.transfer
    python -m benchmarks.transfer --shots 5 --seeds 3 --json

A small BiT is trained on scikit-learn's digits 0 to 4 and published to a hub
on this machine, from which a hub layer brings it into a classifier of the
digits 5 to 9. It learns from 1, 5 and 10 examples a class; beside it learn the
same network from random weights, and a logistic regression on the pixels. Each
of them sees the same examples, drawn anew for every seed, and is scored on all
test digits. The learning rates of the two networks are chosen for each number
of examples on other draws and other digits than those that are reported, from
the same list. Prints a Markdown table.

Five classes teach a network little that a sixth has use for. So it is trained
to tell the digits in their eight symmetries (turned by quarters, mirrored) as
40 classes, each picture a little rotated, scaled, sheared and shifted.

The digits (UCI ML hand-written digits, CC BY 4.0) have 8 × 8 pixels and are
easy: this shows that transfer works from end to end, and is no benchmark of
BiT.
"""

import argparse
import contextlib
import dataclasses
import gc
import json
import os
import pathlib
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from PIL import Image
from tqdm import tqdm

from benchmarks import serving
from bit_tf import data, errors, hyperrule, images
from hub_export import digits

__all__ = ["Pool", "Result", "Settings", "main", "run", "symmetries", "table"]

HANDLE = "digits/zero-to-four/1"
KNOWN, NEW = (0, 1, 2, 3, 4), (5, 6, 7, 8, 9)
TRANSFER, SCRATCH, PIXELS = "hub layer", "from scratch", "linear on pixels"
# Where the digits of NEW go; the first is what is drawn from.
_SHARES = {"train": 0.5, "validation": 0.2, "test": 0.3}
_CROP = digits.SIDE
_RESIZE = _CROP + 4
_TUNING_SEEDS = (1000, 1001)
_SYMMETRIES = 8


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is run.

    Attributes:
      shots: examples a class.
      seeds: each draws other examples.
      learning_rates: from which the networks' are chosen.
      steps: of fine-tuning, and of training from scratch.
      batch_size: of both.
      epochs: of the training on digits 0 to 4.
    """

    shots: tuple[int, ...] = (1, 5, 10)
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    learning_rates: tuple[float, ...] = (0.003, 0.01, 0.03, 0.1)
    steps: int = 100
    batch_size: int = 25
    epochs: int = 60


@dataclasses.dataclass(frozen=True)
class Result:
    """Accuracies on the test digits.

    Attributes:
      method: TRANSFER, SCRATCH or PIXELS.
      shots: examples a class.
      learning_rate: that was chosen; None for the regression.
      accuracies: one for every seed, in [0, 1].
    """

    method: str
    shots: int
    learning_rate: float | None
    accuracies: tuple[float, ...]


class Pool:
    """The digits 5 to 9 as a folder of PNG files, opened.

    Args:
      directory: where to write them.
    """

    def __init__(self, directory: pathlib.Path):
        pixels, labels = _digits(NEW)
        order = np.random.default_rng(0).permutation(len(labels))
        ends = np.cumsum([*_SHARES.values()]) * len(labels)
        parts = np.split(order, ends.round().astype(int)[:-1])
        for name, part in zip(_SHARES, parts, strict=True):
            for index in part:
                folder = directory / name / digits.NAMES[labels[index]]
                folder.mkdir(parents=True, exist_ok=True)
                picture = images.to_pil(digits.pictures(pixels[index][None])[0])
                picture.save(folder / f"{index:04}.png")
        self.splits = data.open_dataset(
            f"folder:{directory}", progress=False
        ).splits


def run(settings: Settings, directory: pathlib.Path) -> list[Result]:
    """Trains, publishes, serves, transfers.

    Args:
      settings: what to run.
      directory: for files of all kinds.
    """
    _publish(_pretrain(directory, settings.epochs), directory / "hub")
    pool = Pool(directory / "digits")
    found = []
    runs = len(settings.shots) * (
        2 * len(settings.learning_rates) * len(_TUNING_SEEDS)
        + 3 * len(settings.seeds)
    )
    with (
        tqdm(total=runs, unit="run", disable=None) as bar,
        _hub(directory) as address,
    ):
        makers = {TRANSFER: lambda seed: _transferred(address)}
        makers[SCRATCH] = _from_scratch
        for shots in settings.shots:
            for method, make in makers.items():
                rate = _tuned(pool, make, shots, settings, bar)
                found.append(
                    Result(
                        method,
                        shots,
                        rate,
                        tuple(
                            _accuracy(
                                pool, "test", make, shots, seed, rate, settings
                            )
                            for seed in _told(settings.seeds, bar)
                        ),
                    )
                )
            found.append(
                Result(
                    PIXELS,
                    shots,
                    None,
                    tuple(
                        _linear(pool, shots, seed)
                        for seed in _told(settings.seeds, bar)
                    ),
                )
            )
    return found


def table(results: Sequence[Result]) -> str:
    """Markdown: a row for each number of examples and method."""
    by_shots: dict[int, dict[str, Result]] = {}
    for result in results:
        by_shots.setdefault(result.shots, {})[result.method] = result
    lines = [
        "| examples a class | method | min | median | max | better than from "
        "scratch |",
        "|---|---|---|---|---|---|",
    ]
    for shots, methods in by_shots.items():
        for method, result in methods.items():
            cells = " | ".join(
                f"{100 * number:.1f} %"
                for number in (
                    min(result.accuracies),
                    statistics.median(result.accuracies),
                    max(result.accuracies),
                )
            )
            paired = ""
            if method != SCRATCH and SCRATCH in methods:
                others = methods[SCRATCH].accuracies
                gains = [
                    one - other
                    for one, other in zip(
                        result.accuracies, others, strict=True
                    )
                ]
                paired = (
                    f"{sum(gain > 0 for gain in gains)} of {len(gains)} seeds, "
                    f"median {100 * statistics.median(gains):+.1f}"
                )
            lines.append(f"| {shots} | {method} | {cells} | {paired} |")
    return "\n".join(lines)


def _digits(of: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """([n, 8, 8] of 0..16, labels [n]) of some of the digits."""
    datasets = errors.import_extra("sklearn.datasets", "test")
    found = datasets.load_digits()
    chosen = np.isin(found.target, of)
    return found.images[chosen], found.target[chosen]


def _pretrain(directory: pathlib.Path, epochs: int) -> pathlib.Path:
    """Trains on the known digits, and writes a checkpoint."""
    import keras

    from bit_tf import checkpoints, models

    pixels, labels = _digits(KNOWN)
    keras.utils.set_random_seed(0)
    model = models.create_model("testing", _SYMMETRIES * len(KNOWN))
    digits.fit(
        model,
        digits.pictures(pixels),
        labels,
        epochs=epochs,
        seed=0,
        change=symmetries,
    )
    path = directory / "zero-to-four.npz"
    checkpoints.write(model, path)
    return path


def symmetries(
    x: np.ndarray, y: np.ndarray, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Digits in one of their eight symmetries each, and askew.

    Args:
      x: float32 [n, s, s, 3] in [0, 1], black around the digits.
      y: labels [n], below len(KNOWN).
      rng: what is drawn from it.

    Returns:
      (pictures like x, labels below 8 · len(KNOWN))
    """
    chosen = rng.integers(0, _SYMMETRIES, len(x))
    turned = [
        np.rot90(picture[:, ::-1] if one >= 4 else picture, one % 4)
        for picture, one in zip(x, chosen, strict=True)
    ]
    askew = np.stack([_askew(picture, rng) for picture in turned])
    return askew, y + len(KNOWN) * chosen


def _askew(picture: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A picture that is rotated by up to 23°, scaled, sheared and shifted."""
    side = len(picture)
    angle = rng.uniform(-0.4, 0.4)
    scale = rng.uniform(0.8, 1.25)
    rotation = np.array(
        [[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]]
    )
    matrix = rotation / scale + [[0, rng.uniform(-0.3, 0.3)], [0, 0]]
    center = np.full(2, side / 2)
    offset = center - matrix @ center + rng.uniform(-4, 4, 2)
    found = images.to_pil(picture).transform(
        (side, side),
        Image.Transform.AFFINE,
        tuple(np.column_stack([matrix, offset]).ravel()),
        Image.Resampling.BILINEAR,
    )
    return images.as_float(np.asarray(found))


def _publish(checkpoint: pathlib.Path, repository: pathlib.Path) -> None:
    from hub_export import publishing

    publishing.publish(
        checkpoint,
        repository,
        HANDLE,
        head="none",
        description="A small BiT that was trained on digits from 0 to 4.",
        license="cc-by-4.0",
    )


@contextlib.contextmanager
def _hub(directory: pathlib.Path) -> Iterator[str]:
    """The handle at a server of the repository; its cache is one of its own."""
    before = os.environ.get("TFHUB_CACHE_DIR")
    os.environ["TFHUB_CACHE_DIR"] = str(directory / "cache")
    try:
        with serving.served(directory / "hub") as (port, _):
            yield f"http://127.0.0.1:{port}/{HANDLE}"
    finally:
        if before is None:
            del os.environ["TFHUB_CACHE_DIR"]
        else:
            os.environ["TFHUB_CACHE_DIR"] = before


def _transferred(handle: str):
    from bit_tf import transfer

    return transfer.classifier(handle, len(NEW))


def _from_scratch(seed: int):
    import keras

    from bit_tf import models

    keras.utils.set_random_seed(seed)
    return models.create_model("testing", len(NEW))


def _tuned(
    pool: Pool, make: Callable, shots: int, settings: Settings, bar: tqdm
) -> float:
    """The learning rate that is best on the validation digits."""
    scores = {
        rate: statistics.mean(
            _accuracy(pool, "validation", make, shots, seed, rate, settings)
            for seed in _told(_TUNING_SEEDS, bar)
        )
        for rate in settings.learning_rates
    }
    return max(scores, key=lambda rate: scores[rate])


def _accuracy(
    pool: Pool,
    scored: str,
    make: Callable,
    shots: int,
    seed: int,
    rate: float,
    settings: Settings,
) -> float:
    """Trains on a draw, and scores on a split."""
    import keras

    from bit_tf import evaluate, finetune, input_pipeline

    keras.utils.clear_session()
    # Graphs of models hold each other.
    gc.collect()
    model = make(seed)
    train = pool.splits["train"].few_shot(shots, seed)
    phases = (1, 2, 3, 4, 5)
    rule = hyperrule.Rule(
        examples=train.size,
        resolution=hyperrule.Resolution(_RESIZE, _CROP),
        mixup_alpha=0.0,
        batch_size=settings.batch_size,
        supports=tuple(
            max(phase, phase * settings.steps // len(phases))
            for phase in phases
        ),
        peak_learning_rate=rate,
    )
    finetune.finetune(
        model, train, rule=rule, seed=seed, flip=False, progress=False
    )
    outputs, labels = evaluate.predict(
        model,
        pool.splits[scored],
        preset=input_pipeline.evaluation_preset(_CROP),
        batch_size=128,
        progress=False,
    )
    return float(np.mean(outputs.argmax(-1) == labels))


def _linear(pool: Pool, shots: int, seed: int) -> float:
    """Logistic regression on what the networks see."""
    linear_model = errors.import_extra("sklearn.linear_model", "test")
    train = pool.splits["train"].few_shot(shots, seed)
    model = linear_model.LogisticRegression(max_iter=1000)
    model.fit(_pixels(train), train.labels)
    test = pool.splits["test"]
    return float(model.score(_pixels(test), test.labels))


def _pixels(split: data.Split) -> np.ndarray:
    return np.stack(
        [
            images.as_float(split.picture(index))[..., 0].ravel()
            for index in range(split.size)
        ]
    )


def _told(seeds: Sequence[int], bar: tqdm) -> Iterator[int]:
    for seed in seeds:
        yield seed
        bar.update()


def main(argv: Sequence[str] | None = None) -> int:
    default = Settings()
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.transfer",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--shots", type=int, nargs="+", default=default.shots)
    parser.add_argument("--seeds", type=int, default=len(default.seeds))
    parser.add_argument("--steps", type=int, default=default.steps)
    parser.add_argument("--epochs", type=int, default=default.epochs)
    parser.add_argument(
        "--learning-rates",
        type=float,
        nargs="+",
        default=default.learning_rates,
        help="from which the best is chosen (default: %(default)s)",
    )
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args(argv)
    settings = dataclasses.replace(
        default,
        shots=tuple(args.shots),
        seeds=tuple(range(args.seeds)),
        steps=args.steps,
        epochs=args.epochs,
        learning_rates=tuple(args.learning_rates),
    )
    # Keras prints an epoch's loss to stdout, where the results go.
    with (
        tempfile.TemporaryDirectory() as directory,
        contextlib.redirect_stdout(sys.stderr),
    ):
        results = run(settings, pathlib.Path(directory))
    if args.json:
        print(json.dumps([dataclasses.asdict(result) for result in results]))
    else:
        print(table(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
