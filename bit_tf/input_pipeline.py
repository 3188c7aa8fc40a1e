"""Batches of pictures for training and evaluation.

What step t of training sees is a function of the split, the seed and t alone:
a run that is taken up again, and the workers of one that is spread out, get
the bytes that one unbroken process gets.

Sources: google-research/big_transfer, input_pipeline_tf2_or_jax.py (resize,
crop, mixup; there every picture is mirrored, here every other one).
"""

import dataclasses
import functools
import itertools
import math
import os
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import tensorflow as tf

from bit_tf import batch_plan, errors, example_cache, images, pipeline_errors
from bit_tf.errors import DatasetError
from bit_tf.pipeline_errors import iterate, raised
from bit_tf.presets import Preset
from bit_tf.split import Split, is_in_graph, is_random_access, require

__all__ = [
    "evaluation_batches",
    "evaluation_preset",
    "iterate",
    "raised",
    "training_batches",
]

# Bytes of undecoded examples among which a stream is shuffled.
_SHUFFLED = 256 * 2**20
_PREFETCHED = 2
_BIG_TRANSFER = "google-research/big_transfer, input_pipeline_tf2_or_jax.py"


def evaluation_preset(crop: int) -> Preset:
    """How pictures are tested after training on crops of a size.

    Squashed to (crop, crop), bilinear, without antialias.

    Args:
      crop: pixels.
    """
    preset = Preset(
        f"big_transfer {crop}",
        "squash",
        crop,
        None,
        "bilinear",
        False,
        _BIG_TRANSFER,
    )
    preset.check()
    return preset


def training_batches(
    split: Split,
    *,
    resize: int,
    crop: int,
    batch_size: int,
    seed: int,
    flip: bool = True,
    random_crop: bool = True,
    mixup_alpha: float = 0.0,
    first_step: int = 0,
    steps: int | None = None,
    shard: tuple[int, int] = (0, 1),
    cache: bool | str | os.PathLike[str] | None = None,
) -> tf.data.Dataset:
    """Batches for training, of which step t's depends on split, seed and t.

    Each epoch sees every example once, in another order; a batch may lie in
    two epochs. Files are shuffled as a whole. A stream is, if its undecoded
    examples take up to 256 MiB, which are then held in memory; else among as
    many as fit there, so that what lies far apart stays so.

    Args:
      split: its examples.
      resize: side of the square to which pictures are squashed, bilinear
        without antialias, before a crop.
      crop: side of what is cut from it at random; without random_crop,
        pictures are squashed to it.
      batch_size: of the global batch, over all shards.
      seed: 0 or more.
      flip: whether half of the pictures are mirrored, left to right.
      random_crop: see `crop`.
      mixup_alpha: α of Beta(α, α), from which each batch draws its λ; an
        example becomes λ times itself and 1 − λ times the one before it in
        the global batch, and its label likewise. 0, and a batch of one,
        mix nothing.
      first_step: of the first batch, from 0.
      steps: number of the last step plus one; None is without end.
      shard: (i, n): rows [i, i + 1) · batch_size / n of each batch.
      cache: True keeps undecoded examples in memory, a directory on disk. The
        batches are the same.

    Returns:
      (float32 [b, crop, crop, 3] in [0, 1], float32 [b, classes]), where b is
      batch_size / n. Errors of `iterate` name the picture.

    Raises:
      DatasetError: an argument is out of its range, or there are no examples.
      OSError: the cache cannot be written.
    """
    _check(
        split,
        resize=resize,
        crop=crop,
        batch_size=batch_size,
        seed=seed,
        mixup_alpha=mixup_alpha,
        first_step=first_step,
        steps=steps,
        shard=shard,
    )
    plan = batch_plan.Plan(
        split,
        batch_size=batch_size,
        seed=seed,
        room=resize - crop if random_crop else 0,
        mixup_alpha=mixup_alpha,
        shard=shard,
        buffer=_buffer(split),
    )
    batch = plan.rows_per_shard
    side = resize if random_crop else crop
    stop = np.iinfo(np.int64).max if steps is None else steps

    rows = pipeline_errors.generate(
        lambda: map(plan.draws, range(first_step, stop)),
        (
            tf.TensorSpec([plan.rows_drawn], tf.int64),
            tf.TensorSpec([plan.rows_drawn, 3], tf.int64),
        ),
    ).unbatch()
    recipes = pipeline_errors.generate(
        lambda: map(plan.recipe, range(first_step, stop)),
        (
            tf.TensorSpec([], tf.float32),
            tf.TensorSpec([], tf.int64),
            tf.TensorSpec([batch, split.num_classes], tf.float32),
        ),
    )
    records = _records(
        split, cache, lambda: plan.epochs(first_step, stop), hold=True
    )

    def prepare(position, draw, *record):
        image = _picture(split.source, records.get(position, record), position)
        image = _squashed(images.to_unit_range(image), side)
        image = image[draw[0] : draw[0] + crop, draw[1] : draw[1] + crop]
        image = tf.ensure_shape(image, (crop, crop, 3))
        if flip:
            image = tf.cond(
                draw[2] == 1, lambda: tf.reverse(image, [1]), lambda: image
            )
        return image

    pictures = pipeline_errors.mapped(records.beside(rows), prepare)
    pictures = pictures.batch(plan.rows_drawn, drop_remainder=True)

    def finish(pictures, recipe):
        ratio, first, labels = recipe
        if not plan.mixes:
            return pictures, labels
        own = pictures[plan.start : plan.start + batch]
        before = tf.concat([pictures[first][None], own[:-1]], axis=0)
        return batch_plan.mixup(own, before, ratio), labels

    batches = tf.data.Dataset.zip((pictures, recipes))
    batches = pipeline_errors.mapped(batches, finish, _PREFETCHED)
    return batches.prefetch(_PREFETCHED).with_options(_options())


def evaluation_batches(
    split: Split, *, preset: Preset, batch_size: int
) -> tf.data.Dataset:
    """All examples of a split in order, each once.

    Pictures are those of images.preprocess(picture, preset).

    Args:
      split: its examples.
      preset: one whose results have one size.
      batch_size: 1 or more; the last batch is what is left.

    Returns:
      (float32 [b, s, s, 3] in [0, 1], int64 [b]). Errors of `iterate` name the
      picture.

    Raises:
      DatasetError: the preset gives pictures of many sizes, or the batch is
        empty.
    """
    require("batch_size", batch_size, 1)
    side = preset.crop
    if side is None and preset.resize == "squash":
        side = preset.size
    if side is None:
        raise DatasetError(
            "Batches need a preset whose results have one size. Received: "
            f"{errors.brief(preset)}. Choose another, such as 'big_transfer "
            "eval'."
        )
    positions = split.positions
    labels = split.labels
    records = _records(split, None, lambda: [positions.tolist()], hold=False)
    rows = tf.data.Dataset.from_tensor_slices((positions, labels))
    in_graph = (preset.resize, preset.method) == ("squash", "bilinear") and (
        not preset.antialias and preset.crop in (None, preset.size)
    )

    def prepare(position, label, *record):
        image = _picture(split.source, records.get(position, record), position)
        if in_graph:
            image = _squashed(images.to_unit_range(image), side)
        else:
            image = pipeline_errors.numpy_call(
                functools.partial(images.preprocess, preset=preset),
                [image],
                tf.float32,
            )
        return tf.ensure_shape(image, (side, side, 3)), label

    batches = pipeline_errors.mapped(records.beside(rows), prepare)
    batches = batches.batch(batch_size).prefetch(_PREFETCHED)
    return batches.with_options(_options())


@dataclasses.dataclass(frozen=True)
class _Records:
    """Undecoded examples: to be looked up, or as they come.

    Attributes:
      read: position → record, or None.
      stream: a dataset of records beside the rows, or None.
    """

    read: example_cache.Reader | None
    stream: tf.data.Dataset | None

    def beside(self, rows: tf.data.Dataset) -> tf.data.Dataset:
        """Rows, each with the next record of the stream if there is one."""
        if self.stream is None:
            return rows
        both = tf.data.Dataset.zip((rows, self.stream))
        return pipeline_errors.mapped(
            both, lambda row, record: (*row, record), None
        )

    def get(self, position: tf.Tensor, record: tuple) -> tf.Tensor:
        """The record at a position; `record` holds what is beside it."""
        if self.read is None:
            return record[0]
        read = self.read

        def call(position):
            # An array of bytes would lose zeros at their end.
            return np.array(read(int(position)), object)

        record = pipeline_errors.numpy_call(call, [position], tf.string)
        return tf.ensure_shape(record, ())


def _records(
    split: Split,
    cache: bool | str | os.PathLike[str] | None,
    epochs: Callable[[], Iterable[list[int]]],
    *,
    hold: bool,
) -> _Records:
    """How to get records.

    Args:
      split: whose.
      cache: as training_batches takes it.
      epochs: positions in the order of a stream, a list for each pass.
      hold: whether a stream may be held in memory if it is small.
    """
    source = split.source
    if cache is True:
        return _Records(example_cache.in_memory(split), None)
    if cache:
        return _Records(example_cache.on_disk(split, cache), None)
    if is_random_access(source):
        return _Records(source.read, None)
    if example_cache.is_in_memory(split) or (
        hold and _bytes(split) <= _SHUFFLED
    ):
        return _Records(example_cache.in_memory(split), None)
    stream = pipeline_errors.generate(
        lambda: itertools.chain.from_iterable(map(source.records, epochs())),
        tf.TensorSpec([], tf.string),
    )
    return _Records(None, stream)


def _picture(source: Any, record: tf.Tensor, position: tf.Tensor) -> tf.Tensor:
    """uint8 or float32 [h, w, 3]."""
    if is_in_graph(source):
        return source.tensor(record, position)
    image = pipeline_errors.numpy_call(
        lambda record, position: source.picture(record, int(position)),
        [record, position],
        tf.uint8,
    )
    return tf.ensure_shape(image, (None, None, 3))


def _squashed(image: tf.Tensor, side: int) -> tf.Tensor:
    """images.resize without antialias, bilinear, in a graph."""
    image = tf.image.resize(image, (side, side), "bilinear", antialias=False)
    return tf.clip_by_value(image, 0.0, 1.0)


def _bytes(split: Split) -> int:
    """Of all undecoded examples of a stream; 0 for files."""
    source = split.source
    if not is_in_graph(source):
        return 0
    return int(source.sizes[split.positions].sum())


def _buffer(split: Split) -> int:
    """Among how many examples a split is shuffled."""
    total = _bytes(split)
    if total <= _SHUFFLED:
        return split.size
    return max(2, _SHUFFLED * split.size // total)


def _options() -> tf.data.Options:
    options = tf.data.Options()
    options.deterministic = True
    # Shards are made here, of the global batch.
    options.experimental_distribute.auto_shard_policy = (
        tf.data.experimental.AutoShardPolicy.OFF
    )
    return options


def _check(
    split: Split,
    *,
    resize: int,
    crop: int,
    batch_size: int,
    seed: int,
    mixup_alpha: float,
    first_step: int,
    steps: int | None,
    shard: tuple[int, int],
) -> None:
    require("crop", crop, 1)
    require("resize", resize, crop)
    require("batch_size", batch_size, 1)
    require("seed", seed, 0)
    require("first_step", first_step, 0)
    if steps is not None:
        require("steps", steps, 0)
    if not 0 <= mixup_alpha < math.inf:
        raise DatasetError(
            "mixup_alpha is 0, which mixes nothing, or positive. Received: "
            f"{mixup_alpha!r}."
        )
    index, number = shard
    if not 0 <= index < number or batch_size % number:
        raise DatasetError(
            f"A shard is (i, n) with 0 ≤ i < n, and n divides the batch of "
            f"{batch_size}. Received: {shard!r}. Choose such a batch."
        )
    if not split.size:
        raise DatasetError(
            "Training needs at least one example. Received: an empty "
            f"{split.name}. Choose another split."
        )
