"""Fine-tuning from a dataset's name to a scored model: `bit-tf finetune`."""

import dataclasses
import os
import pathlib
import platform
from collections.abc import Mapping
from importlib import metadata
from typing import Any

import keras
import tensorflow as tf

from bit_tf import (
    charts,
    data,
    distribution,
    errors,
    evaluate,
    files,
    finetune,
    hyperrule,
    input_pipeline,
    labels,
    metrics,
    published,
    transfer,
)
from bit_tf.checkpoints import Facts

__all__ = ["Prepared", "Result", "Settings", "frozen", "prepare", "run"]

MODEL, METRICS = "model.keras", "metrics.json"
_CURVES = "learning_curves.png"
_PACKAGES = ("bit-tf", "tensorflow", "keras", "numpy")
_SCORED = 32


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is to be done; None is as BiT-HyperRule says, or nothing.

    Attributes:
      model: see transfer.classifier.
      dataset: see data.open_dataset; also data_dir, manual_dir, bad_images.
      examples_per_class: to train on, drawn by seed.
      validation: fraction of the training examples that is held out where
        there is no validation split.
      rule_source, batch_size, base_learning_rate: see hyperrule.derive.
      steps: see finetune.with_steps.
      resize, crop_size: pixels.
      mixup_alpha, flip, crop, seed, freeze, evaluate_every, checkpoint_every,
        deterministic: see finetune.finetune.
      download: whether TFDS may download data that are missing.
      precision: a dtype policy.
      from_scratch: whether weights are random.
    """

    model: str
    dataset: Any
    data_dir: str | None = None
    manual_dir: str | None = None
    bad_images: str = "raise"
    examples_per_class: int | None = None
    validation: float | None = None
    rule_source: str = "code"
    batch_size: int = hyperrule.BATCH_SIZE
    steps: int | None = None
    base_learning_rate: float = hyperrule.BASE_LEARNING_RATE
    resize: int | None = None
    crop_size: int | None = None
    mixup_alpha: float | None = None
    flip: bool = True
    crop: bool = True
    seed: int = 0
    freeze: str | None = None
    precision: str = "float32"
    from_scratch: bool = False
    evaluate_every: int | None = None
    checkpoint_every: int | None = None
    deterministic: bool = False
    download: bool = True


@dataclasses.dataclass(frozen=True, eq=False)
class Prepared:
    """Data and model, looked at before anything is trained.

    Attributes:
      settings: what was asked for.
      look: at the model.
      dataset: as it was opened.
      splits: those that are used: "train", and if there are any "validation"
        and "test".
      image_size: (height, width) that is typical, or None.
      rule: that is followed.
    """

    settings: Settings
    look: transfer.Look
    dataset: data.Dataset
    splits: Mapping[str, data.Split]
    image_size: tuple[int, int] | None
    rule: hyperrule.Rule

    @property
    def sizes(self) -> dict[str, int]:
        """Examples of each split."""
        return {name: split.size for name, split in self.splits.items()}

    @property
    def class_names(self) -> tuple[str, ...]:
        """Of the labels 0, 1, …."""
        return self.dataset.class_names


@dataclasses.dataclass(frozen=True, eq=False)
class Result:
    """What a run made.

    Attributes:
      model: with its head.
      metrics: what metrics.json has; {} of a worker that is not the chief.
      history: of training.
    """

    model: keras.Model
    metrics: dict[str, Any]
    history: finetune.History


def prepare(settings: Settings) -> Prepared:
    """Opens the data, looks at the model, and derives the rule.

    The model's weights are neither downloaded nor loaded.

    Raises:
      DatasetError: the data cannot be used, or no pictures are for training.
      TrainingError: settings do not go together.
      and what transfer.look raises.
    """
    look = transfer.look(settings.model)
    if look.kind == "architecture" and not settings.from_scratch:
        raise errors.UnknownNameError(
            "An architecture has no weights. Received: --model "
            f"{settings.model}. Name published weights, such as BiT-M-"
            f"{settings.model}, or pass --from-scratch."
        )
    dataset = data.open_dataset(
        settings.dataset,
        data_dir=settings.data_dir,
        manual_dir=settings.manual_dir,
        bad_images=settings.bad_images,
        download=settings.download,
    )
    splits = dict(dataset.splits)
    if "train" not in splits:
        raise errors.DatasetError(
            "Fine-tuning needs a split named train. Received: "
            f"{', '.join(splits)} of {dataset.name}. Name one so."
        )
    try:
        labels.check(dataset.class_names, len(dataset.class_names))
    except ValueError as error:
        raise errors.DatasetError(
            f"Classes become labels of a model. {error} Rename that class of "
            f"{dataset.name}."
        ) from error
    if settings.validation is not None:
        if "validation" in splits:
            raise errors.DatasetError(
                "--validation holds out examples where there is no validation "
                f"split. Received: {settings.validation:g}, and {dataset.name} "
                f"has {splits['validation'].size} for validation. Leave it out."
            )
        splits["train"], splits["validation"] = splits["train"].split_off(
            settings.validation, settings.seed
        )
    if settings.examples_per_class is not None:
        splits["train"] = splits["train"].few_shot(
            settings.examples_per_class, settings.seed
        )
    size = dataset.image_size
    sides = (settings.resize, settings.crop_size)
    if size is None and None in sides:
        raise errors.DatasetError(
            "Sizes of pictures follow from the size of those of the dataset. "
            f"Received: {dataset.name}, whose pictures could not be measured. "
            "Pass --resize and --crop, such as 512 and 480."
        )
    order = ("train", "validation", "test")
    return Prepared(
        settings,
        look,
        dataset,
        {name: splits[name] for name in order if name in splits},
        size,
        _rule(settings, splits["train"].size, size, look.architecture),
    )


def frozen(prepared: Prepared) -> tuple[int, int] | None:
    """How many of the model's variables are frozen, and of how many.

    None where nothing is to be frozen, or the model is not on this disk: then
    `run` looks, before it trains.

    Raises:
      as transfer.classifier and transfer.variables_to_train do.
    """
    if prepared.settings.freeze is None or not prepared.look.here:
        return None
    model = _model(prepared)
    kept = transfer.variables_to_train(model, prepared.settings.freeze)
    count = len(model.trainable_variables)
    return count - len(kept), count


def run(
    prepared: Prepared,
    output: str | os.PathLike[str],
    *,
    strategy: tf.distribute.Strategy,
    micro_batches: int = 1,
    recompute: bool = False,
    restart: bool = False,
    progress: bool = True,
) -> Result:
    """Trains, scores, and writes all that there is to keep.

    Into `output` go model.keras, metrics.json, history.jsonl, TensorBoard's
    logs, the state, and charts. Scored is the test split, else the validation
    split, else nothing.

    Args:
      prepared: of `prepare`.
      output: the directory.
      strategy: of `distribution.strategy`.
      micro_batches, recompute, restart, progress: see finetune.finetune.

    Raises:
      MissingExtraError: matplotlib is not installed.
      and what transfer.classifier, finetune.finetune and evaluate.predict
      raise.
    """
    charts.require()
    settings, rule, splits = prepared.settings, prepared.rule, prepared.splits
    where = distribution.place(strategy)
    with strategy.scope():
        model = _model(prepared)
    described = transfer.describe(model)
    if restart and where.is_chief:
        for name in (MODEL, METRICS, _CURVES, *evaluate.CHARTS):
            pathlib.Path(output, name).unlink(missing_ok=True)
    history = finetune.finetune(
        model,
        splits["train"],
        rule=rule,
        validation=splits.get("validation"),
        output=output,
        seed=settings.seed,
        freeze=settings.freeze,
        micro_batches=micro_batches,
        recompute=recompute,
        flip=settings.flip,
        crop=settings.crop,
        strategy=strategy,
        evaluate_every=settings.evaluate_every,
        checkpoint_every=settings.checkpoint_every,
        deterministic=settings.deterministic,
        restart=restart,
        progress=progress,
    )
    found: dict[str, Any] = {}
    if where.is_chief:
        preset = input_pipeline.evaluation_preset(rule.resolution.crop)
        facts = Facts(
            preset=preset,
            labels=tuple(
                labels.Label("", name) for name in prepared.class_names
            ),
        )
        # The weights first: what follows can be made from them again.
        transfer.save(model, os.path.join(output, MODEL), facts)
        scored = next(
            (name for name in ("test", "validation") if name in splits), None
        )
        found = {
            "scored_on": scored,
            "note": None if scored else "train only, no test split",
        }
        if scored is not None:
            found |= _scored(
                model, splits[scored], preset, output, strategy, progress
            )
        charts.learning_curves(history.rows, os.path.join(output, _CURVES))
        found |= {
            "dataset": prepared.dataset.name,
            "sizes": prepared.sizes,
            "train_fingerprint": splits["train"].fingerprint,
            "class_names": list(prepared.class_names),
            "rule": dataclasses.asdict(rule),
            "settings": _told(prepared),
            "micro_batches": micro_batches,
            "recompute": recompute,
            "replicas": where.replicas,
            "preset": dataclasses.asdict(preset),
            "model": described,
            "steps": rule.steps,
            "seed": settings.seed,
            "seconds": round(sum(row["seconds"] for row in history.rows), 3),
            "versions": _versions(),
        }
        with files.new_file(os.path.join(output, METRICS)) as file:
            file.write(evaluate.to_json(found).encode())
    # The chief's devices are no use to the others, but they must not go.
    distribution.wait(strategy, where)
    return Result(model, found, history)


def _model(prepared: Prepared) -> keras.Model:
    """What is trained, in the scope of the strategy that is in force."""
    settings = prepared.settings
    return transfer.classifier(
        settings.model,
        len(prepared.class_names),
        dtype=None if settings.precision == "float32" else settings.precision,
        scratch=settings.from_scratch,
        seed=settings.seed,
    )


def _told(prepared: Prepared) -> dict[str, Any]:
    """The settings, of JSON's types."""
    found = {
        field.name: getattr(prepared.settings, field.name)
        for field in dataclasses.fields(prepared.settings)
    }
    # It may be tf.data.Datasets, which cannot be written.
    found["dataset"] = prepared.dataset.name
    found["model"] = published.shown(prepared.settings.model)
    return {
        name: os.fspath(value) if isinstance(value, os.PathLike) else value
        for name, value in found.items()
    }


def _rule(
    settings: Settings,
    examples: int,
    size: tuple[int, int] | None,
    architecture: str | None,
) -> hyperrule.Rule:
    height, width = size or (480, 480)
    rule = hyperrule.derive(
        examples,
        height,
        width,
        batch_size=settings.batch_size,
        base_learning_rate=settings.base_learning_rate,
        source=settings.rule_source,
        architecture=architecture,
    )
    # One side alone keeps the proportion of both.
    resize, crop = rule.resolution.resize, rule.resolution.crop
    if settings.crop_size is not None and settings.resize is None:
        resize = max(
            settings.crop_size, round(resize * settings.crop_size / crop)
        )
    elif settings.resize is not None and settings.crop_size is None:
        crop = max(1, round(crop * settings.resize / resize))
    resize = settings.resize or resize
    crop = settings.crop_size or crop
    if settings.crop and crop > resize:
        raise errors.TrainingError(
            "A crop is not larger than the picture that it is cut from. "
            f"Received: --crop {crop} of --resize {resize}. Make --resize "
            "larger, or leave it out."
        )
    alpha = settings.mixup_alpha
    rule = dataclasses.replace(
        rule,
        resolution=hyperrule.Resolution(resize, crop),
        mixup_alpha=rule.mixup_alpha if alpha is None else alpha,
    )
    if settings.steps is not None:
        rule = finetune.with_steps(rule, settings.steps)
    return rule


def _scored(
    model: keras.Model,
    split: data.Split,
    preset: Any,
    output: str | os.PathLike[str],
    strategy: tf.distribute.Strategy,
    progress: bool,
) -> dict[str, Any]:
    """metrics.classification of a split, whose charts are drawn."""
    outputs, true = evaluate.predict(
        model,
        split,
        preset=preset,
        batch_size=_SCORED,
        progress=progress,
        strategy=strategy,
    )
    report = metrics.classification(outputs, true, split.class_names)
    evaluate.draw(report, evaluate.mistake_items(split, outputs, true), output)
    return report


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found
