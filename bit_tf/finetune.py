"""Fine-tuning: one loop for one device, several, and several machines.

SGD with momentum and the learning rate of BiT-HyperRule on a softmax
cross-entropy. A run is a function of its model, data, rule and seed; it can be
killed at any moment and goes on from its last state.
"""

import contextlib
import dataclasses
import itertools
import math
import os
import re
import time
from collections.abc import Callable, Iterator
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from absl import logging
from tqdm import tqdm

from bit_tf import (
    data,
    distribution,
    errors,
    evaluate,
    hyperrule,
    input_pipeline,
    interrupts,
    model_origins,
    models,
    training_records,
    training_state,
    training_step,
    transfer,
)

__all__ = ["History", "finetune", "with_steps"]

_MEMORY = (tf.errors.ResourceExhaustedError, MemoryError)
# Pictures that are scored at a time.
_SCORED = 32
# How often an unbroken run writes its state, at most and at least; steps.
_CHECKPOINTS = 20
_LONGEST = 100


@dataclasses.dataclass
class History:
    """What a run did.

    Attributes:
      rows: one a step: "step" (how many were done then, from 1), "loss" (mean
        cross-entropy of the global batch, in nats), "learning_rate", "seconds"
        (of this step); "validation_top1" in [0, 1] where it was measured.
      resumed_from: steps that were done before this call.
      seconds: of this call.
    """

    rows: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    resumed_from: int = 0
    seconds: float = 0.0


def with_steps(rule: hyperrule.Rule, steps: int) -> hyperrule.Rule:
    """The same rule in another number of steps, its schedule in proportion.

    What is some steps apart stays so by one step or more, if there are as many
    steps; with fewer of them parts of the schedule coincide.

    Raises:
      ValueError: there are no steps.
    """
    if type(steps) is not int or steps < 1:
        raise ValueError(f"steps must be 1 or more. Received: {steps!r}.")
    found = [round(support * steps / rule.steps) for support in rule.supports]
    apart = [
        after > before
        for before, after in itertools.pairwise((0, *rule.supports))
    ]
    if sum(apart) <= steps:
        last = 0
        for index, support in enumerate(found):
            highest = steps - sum(apart[index + 1 :])
            last = min(max(support, last + apart[index]), highest)
            found[index] = last
    return dataclasses.replace(rule, supports=tuple(found))


def finetune(
    model: keras.Model,
    train: data.Split,
    *,
    rule: hyperrule.Rule,
    validation: data.Split | None = None,
    output: str | os.PathLike[str] | None = None,
    seed: int = 0,
    freeze: str | None = None,
    micro_batches: int = 1,
    recompute: bool = False,
    flip: bool = True,
    crop: bool = True,
    strategy: tf.distribute.Strategy | None = None,
    steps: int | None = None,
    evaluate_every: int | None = None,
    checkpoint_every: int | None = None,
    deterministic: bool = False,
    restart: bool = False,
    cache: bool | str | None = None,
    progress: bool = True,
) -> History:
    """Trains a model in place.

    With `output` it writes there a state from which a later call with the same
    arguments goes on, history.jsonl, and TensorBoard's logs. After SIGTERM and
    Ctrl-C it ends the step, writes its state, and stops as ever.

    Args:
      model: from `transfer.classifier`, made under the strategy's scope; takes
        float32 [n, h, w, 3] in [0, 1] and returns logits of train's classes.
      train: pictures to learn from.
      rule: steps, batch, learning rates, mixup and sizes of pictures.
      validation: scored every `evaluate_every` steps and at the end.
      output: a directory, made if need be; of several machines the same on a
        shared disk.
      seed: of the order of pictures and how they are changed.
      freeze: what is not trained, see `transfer.variables_to_train`.
      micro_batches: parts into which each replica divides its batch, one after
        the other, so that it takes less memory; the result is the same up to
        rounding.
      recompute: whether gradients take less memory and more time, see
        `models.recompute`; the result is the same.
      flip: whether pictures are mirrored at random.
      crop: whether they are cropped at random; else squashed to the crop's
        size.
      strategy: from `distribution.strategy`; the one in whose scope this is
        called, unless given.
      steps: instead of the rule's, see `with_steps`.
      evaluate_every: steps; a tenth of them unless given.
      checkpoint_every: steps; a twentieth of them, at most 100, unless given.
      deterministic: whether operations are chosen such that a run that was
        interrupted ends with the very same bits as one that was not. Sets
        Keras' and TensorFlow's global seeds.
      restart: whether an earlier state in `output` is discarded.
      cache: of encoded pictures, see `input_pipeline.training_batches`.
      progress: whether a bar is shown, on a terminal.

    Returns:
      The history, of interrupted calls too.

    Raises:
      TrainingError: the loss is no number; memory does not suffice; a worker
        was lost; the state in `output` is damaged or of other settings; or
        arguments do not go together.
      DatasetError, ImageError: a picture cannot be used.
      OSError: nothing can be written to `output`.
    """
    started = time.monotonic()
    if steps is not None:
        rule = with_steps(rule, steps)
    on = tf.distribute.get_strategy() if strategy is None else strategy
    where = distribution.place(on)
    _check(model, train, rule, where, micro_batches, on)
    variables = transfer.variables_to_train(model, freeze)
    with contextlib.ExitStack() as stack:
        if deterministic:
            stack.enter_context(_deterministic(seed))
        stack.enter_context(_frozen(model, variables))
        if recompute:
            stack.enter_context(models.recompute(model))
        stack.enter_context(distribution.guarded(where))
        settings = {
            "model": training_state.fingerprint(model.variables),
            "data": train.fingerprint,
            "classes": list(train.class_names),
            "rule": dataclasses.asdict(rule),
            "seed": seed,
            "freeze": freeze,
            "flip": flip,
            "crop": crop,
            "precision": model_origins.precision(model),
            "deterministic": deterministic,
        }
        trainer = training_step.Trainer(
            model, variables, on, where, rule, micro_batches
        )
        records = training_records.Records(
            output, where, settings, trainer.state_variables
        )
        stack.enter_context(records)
        rows = records.begin(restart)
        distribution.require_agreement(on, where, settings, len(rows))
        first = len(rows)
        history = History(rows, resumed_from=first)
        if first:
            logging.info("Goes on after step %d of %d.", first, rule.steps)
        batches = input_pipeline.training_batches(
            train,
            resize=rule.resolution.resize,
            crop=rule.resolution.crop,
            batch_size=rule.batch_size,
            seed=seed,
            flip=flip,
            random_crop=crop,
            mixup_alpha=rule.mixup_alpha,
            first_step=first,
            steps=rule.steps,
            shard=(where.index, where.workers),
            cache=cache,
        )
        every = checkpoint_every or min(
            _LONGEST, max(1, rule.steps // _CHECKPOINTS)
        )
        score_every = evaluate_every or max(1, rule.steps // 10)
        score = _scorer(model, validation, rule, on)
        stop = stack.enter_context(interrupts.interrupts())
        bar = stack.enter_context(
            tqdm(
                total=rule.steps,
                initial=first,
                unit="step",
                disable=None if progress and where.is_chief else True,
            )
        )
        steps_left = iter(input_pipeline.iterate(batches))
        for step in range(first, rule.steps):
            begun = time.monotonic()
            pictures, targets = next(steps_left)
            rate = rule.learning_rate(step)
            with _memory(rule, micro_batches, where, records):
                loss, total = trainer.step(pictures, targets, rate)
            _require_number(loss, total, step, rate, records)
            row = {
                "step": step + 1,
                "loss": loss,
                "learning_rate": rate,
                "seconds": round(time.monotonic() - begun, 4),
            }
            last = step + 1 == rule.steps
            if (
                validation is not None
                and where.is_chief
                and (last or (step + 1) % score_every == 0)
            ):
                row["validation_top1"] = score()
            rows.append(row)
            records.log(row)
            bar.update()
            bar.set_postfix(
                loss=f"{loss:.4f}",
                lr=f"{rate:.2g}",
                images=f"{rule.batch_size / max(row['seconds'], 1e-4):.0f}/s",
            )
            if last or stop or (step + 1) % every == 0:
                records.save(rows)
            if stop:
                stop.again()
    history.seconds = time.monotonic() - started
    return history


def _is_memory(error: BaseException) -> bool:
    # What the libraries of a GPU lack comes as other kinds.
    return isinstance(error, _MEMORY) or bool(
        re.search("out of memory|OOM|failed to allocate", str(error), re.I)
    )


@contextlib.contextmanager
def _memory(
    rule: hyperrule.Rule,
    micro_batches: int,
    where: distribution.Place,
    records: training_records.Records,
) -> Iterator[None]:
    try:
        yield
    except (tf.errors.OpError, MemoryError) as error:
        if not _is_memory(error):
            raise
        size = math.ceil(rule.batch_size / where.replicas / micro_batches)
        side = rule.resolution.crop
        raise errors.TrainingError(
            "A device must have memory for the pictures that it computes at "
            f"once. Received: {size} of {side} × {side} pixels, for which "
            f"there is not enough. {records.kept} Divide the batch further: "
            f"--micro-batches {micro_batches * 2} (micro_batches) gives the "
            "same result; or use --precision mixed_bfloat16, a smaller "
            "--batch-size, or a smaller model."
        ) from error


def _require_number(
    loss: float,
    total: float,
    step: int,
    rate: float,
    records: training_records.Records,
) -> None:
    if not math.isfinite(loss) or not math.isfinite(total):
        received = (
            f"{loss if math.isfinite(total) else total} at step {step + 1}"
        )
        raise training_records.no_number(f"a loss of {received}", rate, records)


def _check(
    model: keras.Model,
    train: data.Split,
    rule: hyperrule.Rule,
    where: distribution.Place,
    micro_batches: int,
    on: tf.distribute.Strategy,
) -> None:
    """Refuses what would go wrong at the first step or later.

    Raises:
      TrainingError: arguments do not go together.
      DatasetError: there are no pictures.
    """
    if not train.size:
        raise errors.DatasetError(
            "A model learns from one picture or more. Received: the split "
            f"{train.name!r} without any."
        )
    if type(micro_batches) is not int or micro_batches < 1:
        raise ValueError(
            f"micro_batches must be 1 or more. Received: {micro_batches!r}."
        )
    outputs = getattr(model, "output_shape", None)
    classes = outputs[-1] if isinstance(outputs, tuple) else None
    if classes != train.num_classes:
        raise errors.TrainingError(
            "A model has one output a class. Received: outputs of shape "
            f"{outputs}, and {train.num_classes} classes. Make the model with "
            f"transfer.classifier(source, {train.num_classes})."
        )
    if rule.batch_size % where.replicas:
        below = rule.batch_size // where.replicas * where.replicas
        raise errors.TrainingError(
            "The batch is divided among all replicas of the model evenly. "
            f"Received: {rule.batch_size} for {where.replicas}. Use "
            f"--batch-size {below or where.replicas}."
        )
    for variable in model.variables:
        if not on.extended.variable_created_in_scope(variable.value):
            raise errors.TrainingError(
                "A model is made under the scope of the strategy that trains "
                f"it. Received: {variable.path!r}, which was made outside of "
                f"{type(on).__name__}'s. Make the model in "
                "`with strategy.scope():`."
            )


def _scorer(
    model: keras.Model,
    split: data.Split | None,
    rule: hyperrule.Rule,
    on: tf.distribute.Strategy,
) -> Callable[[], float]:
    """A function that measures accuracy on a split."""

    # Traced once, not for every measurement.
    @tf.function(autograph=False, reduce_retracing=True)
    def call(pictures):
        return model(pictures, training=False)

    def score() -> float:
        assert split is not None
        outputs, true = evaluate.predict(
            call,
            split,
            preset=input_pipeline.evaluation_preset(rule.resolution.crop),
            batch_size=min(_SCORED, rule.batch_size),
            progress=False,
            strategy=on if on.num_replicas_in_sync > 1 else None,
        )
        return float((np.argmax(outputs, axis=1) == true).mean())

    return score


@contextlib.contextmanager
def _frozen(
    model: keras.Model, variables: list[keras.Variable]
) -> Iterator[None]:
    """Has the model count as its own penalties those of what is trained."""
    kept = {id(variable) for variable in variables}
    others = [v for v in model.trainable_variables if id(v) not in kept]
    for variable in others:
        variable.trainable = False
    try:
        yield
    finally:
        for variable in others:
            variable.trainable = True


@contextlib.contextmanager
def _deterministic(seed: int) -> Iterator[None]:
    """Has TensorFlow compute the same bits every time."""
    from tensorflow.python.framework import config

    was = config.is_op_determinism_enabled()
    keras.utils.set_random_seed(seed)
    tf.config.experimental.enable_op_determinism()
    try:
        yield
    finally:
        if not was:
            config.disable_op_determinism()
