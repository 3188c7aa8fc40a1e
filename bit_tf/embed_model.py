"""Bytes of pictures → vectors and classes: the work of one process.

What runs it, on one machine or on many, has the same vectors of the same
batches.
"""

import hashlib
import os
import threading
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import tensorflow as tf

import bit_tf
from bit_tf import conv_precision, errors, hub, images, labels, model_hash
from bit_tf.checkpoints import tf_hub
from bit_tf.embedding_table import Facts
from bit_tf.presets import Preset

__all__ = ["DEFAULT_PRESET", "DEFAULT_TOP", "Encoded", "Encoder", "Prepared"]

DEFAULT_PRESET = "big_transfer eval"
DEFAULT_TOP = 5

# Three of float32.
_BYTES_OF_PIXEL = 12
_FEATURES = ("image_feature_vector", "features")
_CLASSES = ("image_classification", "probabilities")


class Prepared(NamedTuple):
    """A picture that the model can take.

    Attributes:
      picture: float32 [h, w, 3] in [0, 1].
      width, height: of the decoded picture, before the preset; in pixels.
      sha256: of its bytes, 64 hexadecimal digits.
    """

    picture: np.ndarray
    width: int
    height: int
    sha256: str


class Encoded(NamedTuple):
    """What the model says of a picture.

    Attributes:
      embedding: float32 [d].
      names: of the likeliest classes, best first; None without a classifier.
      scores: their probabilities; None without a classifier.
    """

    embedding: np.ndarray
    names: list[str] | None
    scores: list[float] | None


class Encoder:
    """Bytes of pictures → vectors, and classes if the model is a classifier.

    `prepare` may run in any number of threads.

    Args:
      model: a TF-Hub handle, a directory, or a .tar.gz archive of a SavedModel.
      preset: how pictures are prepared, one or a name of images.PRESETS; None
        is what the model's card says, or else "big_transfer eval".
      top: how many classes a picture gets, of a model that has both the
        signature image_feature_vector and image_classification; 0 is none,
        and None is 5 of such a model and 0 of others.
      precision: see frozen_graph.freeze.

    Attributes:
      preset: the one that is used.
      dim: d, the length of a vector.
      top: the number of classes that is used.

    Raises:
      HandleError: there is no such model, or it has no classes and top is not
        0.
      UnknownNameError: there is no such preset or precision.
      CheckpointFormatError: its card is damaged, and `preset` is None.
    """

    def __init__(
        self,
        model: str | os.PathLike[str],
        preset: str | Preset | None = None,
        top: int | None = 0,
        precision: str = "float32",
    ):
        self._handle = os.fsdecode(model)
        self._precision = conv_precision.require(precision)
        directory = hub.resolve(model)
        if preset is None:
            preset = tf_hub.recorded_preset(directory) or DEFAULT_PRESET
        self.preset = (
            preset if isinstance(preset, Preset) else images.preset(preset)
        )
        self._hash = model_hash.content_hash(directory)
        loaded = hub.load(self._handle, directory=directory)
        signatures = getattr(loaded, "signatures", {})
        classifies = _FEATURES[0] in signatures and _CLASSES[0] in signatures
        if top is None:
            top = DEFAULT_TOP if classifies else 0
        if top < 0:
            raise ValueError(f"top is 0 or more. Received: {top}.")
        if top and not classifies:
            raise errors.HandleError(
                "Classes need a model with the signatures "
                f"{_FEATURES[0]} and {_CLASSES[0]}. Received: "
                f"{self._handle!r} with {sorted(signatures) or 'none'}. Choose "
                "another model, or leave them out with top=0 (--top 0)."
            )
        self._first = threading.Lock()
        self._optimized = False
        self._labels: Sequence[labels.Label] = ()
        self._function, self.dim = hub.picture_function(
            loaded, *_FEATURES, self._handle, precision
        )
        if top:
            self._function, width = hub.picture_function(
                _Joined(loaded), "", "", self._handle, precision
            )
            self._labels = _class_labels(
                directory, width - self.dim, self._handle
            )
        self.top = min(top, len(self._labels))

    def facts(self, float16: bool = False) -> Facts:
        """What a table of these vectors says of itself.

        Args:
          float16: whether it keeps them in half precision.
        """
        return Facts(
            model=self._handle,
            model_hash=self._hash,
            preset=self.preset,
            version=bit_tf.__version__,
            dim=self.dim,
            float16=float16,
            top=self.top,
            precision=self._precision,
        )

    def prepare(self, data: bytes, sha256: str | None = None) -> Prepared:
        """Decodes and resizes a picture.

        Args:
          data: a picture file's bytes.
          sha256: of them, if it is known.

        Raises:
          ImageError: it is no whole picture, or one that the preset cannot
            take.
        """
        pixels = images.decode(data)
        height, width = pixels.shape[:2]
        return Prepared(
            images.preprocess(pixels, self.preset),
            width,
            height,
            sha256 or hashlib.sha256(data).hexdigest(),
        )

    def size_of(self, data: bytes) -> int:
        """Bytes that `prepare` will return, as far as the header tells.

        Args:
          data: a picture file's bytes; 0 is what it returns of one that has no
            header.
        """
        side = self.preset.crop
        if side is None and self.preset.resize == "squash":
            side = self.preset.size
        if side is not None:
            return side * side * _BYTES_OF_PIXEL
        height, width = images.measure(data)
        if self.preset.size is not None and min(height, width) > 0:
            scale = self.preset.size / min(height, width)
            height, width = round(height * scale), round(width * scale)
        return height * width * _BYTES_OF_PIXEL

    def encode(self, batch: Sequence[Prepared]) -> list[Encoded]:
        """Runs the model.

        Pictures of one size are one batch of the model; the same ones in the
        same order give the same vectors.

        Args:
          batch: what `prepare` returned.

        Returns:
          One for each, in their order.

        Raises:
          HandleError: the model cannot take them.
        """
        found: list[Encoded | None] = [None] * len(batch)
        by_size: dict[tuple[int, ...], list[int]] = {}
        for index, prepared in enumerate(batch):
            by_size.setdefault(prepared.picture.shape, []).append(index)
        for indices in by_size.values():
            stacked = np.stack([batch[index].picture for index in indices])
            try:
                output = self._run(tf.constant(stacked)).numpy()
            except tf.errors.OpError as error:
                raise errors.HandleError(
                    "A model takes pictures as the preset makes them. "
                    f"Received from {self._handle!r}, for pictures of shape "
                    f"{list(stacked.shape)}: {error.message}. Choose another "
                    "preset or a smaller batch."
                ) from error
            vectors = np.ascontiguousarray(output[:, : self.dim])
            classes: list = [None] * len(indices)
            if self.top:
                classes = labels.decode_predictions(
                    output[:, self.dim :], self.top, self._labels
                )
            for index, vector, rows in zip(
                indices, vectors, classes, strict=True
            ):
                names = rows and [name for _, name, _ in rows]
                scores = rows and [score for _, _, score in rows]
                found[index] = Encoded(vector, names, scores)
        return found  # type: ignore[return-value]

    def _run(self, pictures: tf.Tensor) -> tf.Tensor:
        """The model, whose first call optimizes its graph.

        Two first calls at once would do so twice, in twice the memory.
        """
        if not self._optimized:
            with self._first:
                output = self._function(pictures)
                self._optimized = True
                return output
        return self._function(pictures)


class _Joined:
    """Vectors and probabilities of a model, side by side.

    TensorFlow merges what both signatures compute alike, once they are frozen
    in one graph.
    """

    def __init__(self, model):
        self._signatures = model.signatures

    def __call__(self, pixels):
        outputs = []
        for signature, output in (_FEATURES, _CLASSES):
            served = self._signatures[signature]
            (argument,) = served.structured_input_signature[1]
            outputs.append(served(**{argument: pixels})[output])
        return tf.concat(outputs, axis=1)


def _class_labels(
    directory: str, count: int, handle: str
) -> Sequence[labels.Label]:
    """A name for each of the model's classes; numbers where it has none."""
    own = labels.read_saved_model(directory)
    if own and len(own) != count:
        raise errors.HandleError(
            f"assets/labels.txt must name each of the {count} classes. "
            f"Received: {len(own)} lines in {handle!r}."
        )
    return own or [labels.Label("", str(i)) for i in range(count)]
