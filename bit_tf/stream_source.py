"""Labelled pictures of a tf.data.Dataset, which are read one after another.

Examples stay undecoded until they are used; a record is one example in
TensorFlow's serialization, so that records of any structure can be held,
shuffled, and written.
"""

import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import tensorflow as tf
from tqdm import tqdm

from bit_tf import images, pipeline_errors
from bit_tf.errors import DatasetError, ImageError, brief
from bit_tf.pipeline_errors import mapped

__all__ = ["StreamSource", "from_dataset"]

_BATCH = 256
_CHUNK = 32
_SAMPLE = 32


class StreamSource:
    """Examples that a dataset gives, in the same order each time."""

    def __init__(
        self,
        name: str,
        examples: tf.data.Dataset,
        to_pair: Callable[[Any], tuple[tf.Tensor, tf.Tensor]],
        *,
        progress: bool = True,
    ) -> None:
        """Reads nothing yet.

        Args:
          name: of examples, "train" for "train/17".
          examples: undecoded, finite, in the same order each time.
          to_pair: (picture, label) of an example, in TensorFlow's operations.
          progress: whether a terminal shows how far the first pass is.
        """
        self._name = name
        self._progress = progress
        self._to_pair = to_pair
        self._examples = examples
        self._spec = examples.element_spec
        self._components = tf.nest.flatten(self._spec, expand_composites=True)

    @property
    def labels(self) -> np.ndarray:
        """int64 [n], from one pass without decoding what labels do not need."""
        return self._pass[0]

    @property
    def sizes(self) -> np.ndarray:
        """int64 [n]: bytes of each record, without what serialization adds."""
        return self._pass[1]

    @functools.cached_property
    def _pass(self) -> tuple[np.ndarray, np.ndarray]:
        facts = mapped(
            self._examples,
            lambda *example: (self._label(example), _bytes(example)),
        )
        labels, sizes = [], []
        with tqdm(
            desc=f"labels of {self._name}",
            unit=" examples",
            leave=False,
            disable=None if self._progress else True,
        ) as bar:
            for label, size in pipeline_errors.iterate(facts.batch(_BATCH)):
                labels.append(label.numpy().astype(np.int64))
                sizes.append(size.numpy())
                bar.update(len(labels[-1]))
        if not labels:
            empty = np.zeros(0, np.int64)
            return empty, empty
        return np.concatenate(labels), np.concatenate(sizes)

    def first_label(self) -> int | None:
        """That of the first example; None where there is none."""
        first = mapped(
            self._examples.take(1),
            lambda *example: self._label(example),
            None,
        )
        for label in pipeline_errors.iterate(first):
            return int(label)
        return None

    def identifier(self, position: int) -> str:
        """The split's name and the position, such as "train/17"."""
        return f"{self._name}/{position}"

    def records(self, order: Iterable[int]) -> Iterator[bytes]:
        """Examples of one pass in this order, each position at most once.

        What comes before its turn is held until then.

        Raises:
          DatasetError: the dataset has other examples than at its first pass.
        """
        order = np.asarray(list(order), np.int64)
        labels = self.labels
        wanted = np.zeros(len(labels), bool)
        wanted[order] = True
        held: dict[int, bytes] = {}
        stream = enumerate(self._records())
        for position in order.tolist():
            while position not in held:
                at, found = next(stream, (-1, None))
                if found is None or at >= len(labels):
                    what = "fewer" if found is None else "more"
                    raise self._changed(f"{what} than {len(labels)} examples")
                record, label = found
                if label != labels[at]:
                    raise self._changed(
                        f"label {label} where {labels[at]} was, in "
                        f"{self.identifier(at)},"
                    )
                if wanted[at]:
                    held[at] = record
            yield held.pop(position)

    def tensor(self, record: tf.Tensor, position: tf.Tensor) -> tf.Tensor:
        """The picture of a record: uint8 or float32 [h, w, 3]."""
        image, _ = self._to_pair(self._example(record))
        image = tf.convert_to_tensor(image)
        shape = image.shape
        if image.dtype == tf.uint8 and shape.rank == 3 and shape[-1] == 3:
            return image

        def call(image: np.ndarray, position: int) -> np.ndarray:
            try:
                return _rgb(image)
            except ImageError as error:
                name = self.identifier(position)
                raise type(error)(f"{name}: {error}") from error

        dtype = tf.float32 if image.dtype.is_floating else tf.uint8
        result = pipeline_errors.numpy_call(call, [image, position], dtype)
        height, width = shape[:2] if shape.rank in (2, 3) else (None, None)
        return tf.ensure_shape(result, (height, width, 3))

    def picture(self, record: bytes, position: int) -> np.ndarray:
        """The same in NumPy.

        Raises:
          ImageError: the picture's dtype, shape or range is not accepted.
          DatasetError: it cannot be decoded.
        """
        one = tf.data.Dataset.from_tensors((tf.constant(record), position))
        try:
            (image,) = pipeline_errors.iterate(mapped(one, self.tensor, None))
        except DatasetError as error:
            name = self.identifier(position)
            raise DatasetError(f"{name}: {error}") from error
        return image.numpy()

    def stamp(self, position: int) -> tuple[int, int]:
        """(bytes of the record, 0)."""
        return int(self.sizes[position]), 0

    def typical_size(self, positions: np.ndarray) -> tuple[int, int] | None:
        """(height, width): of all, or the median of the first 32 pictures."""
        pictures = mapped(
            self._examples,
            lambda *example: self._to_pair(_single(example))[0],
        )
        image = pictures.element_spec
        if image.shape.rank in (2, 3) and image.shape[:2].is_fully_defined():
            return image.shape[0], image.shape[1]
        first = [
            image.shape[:2]
            for image in pipeline_errors.iterate(pictures.take(_SAMPLE))
        ]
        if not first:
            return None
        height, width = np.median(np.stack(first), axis=0)
        return round(height), round(width)

    def _label(self, example: tuple) -> tf.Tensor:
        _, label = self._to_pair(_single(example))
        label = tf.convert_to_tensor(label)
        if not label.dtype.is_integer or label.shape.rank not in (0, None):
            remedy = "Map them to integers"
            if label.dtype == tf.string:
                remedy = (
                    "Map names to integers, with tf.keras.layers.StringLookup "
                    "or a table"
                )
            elif label.shape.rank == 1:
                remedy = "Unbatch the dataset, or take tf.argmax of one-hot"
            raise DatasetError(
                "A label is one integer, the position of its class. Received: "
                f"labels of dtype {label.dtype.name} and shape {label.shape} "
                f"in {self._name}. {remedy}."
            )
        return tf.cast(label, tf.int64)

    def _records(self) -> Iterator[tuple[bytes, int]]:
        pairs = mapped(
            self._examples,
            lambda *example: (_serialized(example), self._label(example)),
        )
        # One by one, most of the time would go into Python's iteration.
        chunks = pairs.batch(_CHUNK).prefetch(1)
        for records, labels in pipeline_errors.iterate(chunks):
            yield from zip(records.numpy(), labels.numpy(), strict=True)

    def _example(self, record: tf.Tensor) -> Any:
        parts = tf.io.parse_tensor(record, tf.string)
        tensors = []
        for index, spec in enumerate(self._components):
            tensor = tf.io.parse_tensor(parts[index], spec.dtype)
            tensors.append(tf.ensure_shape(tensor, spec.shape))
        return tf.nest.pack_sequence_as(
            self._spec, tensors, expand_composites=True
        )

    def _changed(self, what: str) -> DatasetError:
        return DatasetError(
            "A dataset gives the same examples in the same order each time it "
            f"is read. Received: {what} at a later pass over {self._name}. "
            "Remove its shuffle(), or save the dataset first."
        )


def from_dataset(name: str, dataset: Any, progress: bool) -> StreamSource:
    """The source of a split that somebody made with tf.data.

    Args:
      name: of the split.
      dataset: a finite tf.data.Dataset of (image, label), or of mappings with
        these keys, unbatched.
      progress: whether a terminal shows how far the first pass is.

    Raises:
      DatasetError: it is something else.
    """
    if not isinstance(dataset, tf.data.Dataset):
        raise DatasetError(
            f"A split is a tf.data.Dataset. Received: {brief(dataset)} of type "
            f"{type(dataset).__name__} as {name}. Make one of it, or name a "
            "dataset: 'cifar10', 'folder:DIR' or 'csv:FILE'."
        )
    if int(dataset.cardinality()) == tf.data.INFINITE_CARDINALITY:
        raise DatasetError(
            "A split is finite, for every epoch sees every example once. "
            f"Received: an infinite dataset as {name}. Remove its repeat(), "
            "or add take()."
        )
    image, _ = _pair(dataset.element_spec)
    shape = getattr(image, "shape", tf.TensorShape(None))
    if shape.rank not in (2, 3, None) or getattr(image, "dtype", None) in (
        tf.string,
        None,
    ):
        raise DatasetError(
            "A picture is [h, w, 3], uint8 in [0, 255] or floats in [0, 1]. "
            f"Received: {image} in {name}. Decode the pictures, and unbatch() "
            "batches."
        )
    return StreamSource(name, dataset, _pair, progress=progress)


def _pair(example: Any) -> tuple[Any, Any]:
    if isinstance(example, dict) and {"image", "label"} <= set(example):
        return example["image"], example["label"]
    if isinstance(example, tuple) and len(example) == 2:
        return example[0], example[1]
    raise DatasetError(
        "A dataset gives (image, label), or a mapping with 'image' and "
        f"'label'. Received: {brief(example)}. Map it to one of these."
    )


def _single(example: tuple) -> Any:
    """What a dataset's map passes, as one structure."""
    return example[0] if len(example) == 1 else example


def _serialized(example: tuple) -> tf.Tensor:
    parts = tf.nest.flatten(example, expand_composites=True)
    return tf.io.serialize_tensor(
        tf.stack([tf.io.serialize_tensor(part) for part in parts])
    )


def _bytes(example: tuple) -> tf.Tensor:
    total = tf.zeros((), tf.int64)
    for part in tf.nest.flatten(example, expand_composites=True):
        if part.dtype == tf.string:
            total += tf.cast(tf.reduce_sum(tf.strings.length(part)), tf.int64)
        else:
            total += tf.size(part, tf.int64) * part.dtype.size
    return total


def _rgb(image: np.ndarray) -> np.ndarray:
    if image.dtype.kind != "f":
        return images.decode(image)
    if image.ndim == 2:
        image = image[..., None]
    if image.shape[-1] == 1:
        image = np.repeat(image, 3, axis=-1)
    return images.as_float(image)
