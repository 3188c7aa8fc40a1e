"""Image classification with any SavedModel that has a head."""

import os

import numpy as np
import tensorflow as tf

from bit_tf import errors, hub, images, labels
from bit_tf.checkpoints import tf_hub
from bit_tf.presets import Preset

__all__ = ["Classifier"]


class Classifier:
    """Pictures → class names and probabilities.

    Args:
      model_url: a TF-Hub handle, a directory, or a .tar.gz archive, of a model
        with a head. One without the signature image_classification must return
        logits of a published label set (1000 or 21843 classes).
      preset: how pictures are prepared, one or a name of images.PRESETS; None
        is what the model's card says, or else "big_transfer eval".

    Attributes:
      preset: the one that is used.
      labels: the model's classes; numbers where it names none.

    Raises:
      HandleError: there is no such model, or it has no head.
      CheckpointFormatError: its card is damaged, and `preset` is None.
    """

    def __init__(
        self,
        model_url: str | os.PathLike,
        preset: str | Preset | None = None,
    ):
        handle = os.fspath(model_url)
        directory = hub.resolve(model_url)
        if preset is None:
            preset = tf_hub.recorded_preset(directory) or "big_transfer eval"
        self.preset = (
            preset if isinstance(preset, Preset) else images.preset(preset)
        )
        model = hub.load(directory)
        self._function, count = hub.picture_function(
            model, "image_classification", "probabilities", handle
        )
        own = labels.read_saved_model(directory)
        self._activation = lambda scores: scores
        if "image_classification" not in getattr(model, "signatures", {}):
            known = labels.of_count(count)
            if known is None:
                raise errors.HandleError(
                    "A classifier has the signature image_classification, or "
                    f"returns logits of {list(labels.LABEL_SETS.values())} "
                    f"classes. Received from {handle!r}: {count} outputs and "
                    "no such signature. For its vectors, use: bit-tf embed"
                )
            squash = {"softmax": tf.nn.softmax, "sigmoid": tf.nn.sigmoid}
            self._activation = squash[labels.activation(count)]
            own = own or labels.label_set(known)
        if own and len(own) != count:
            raise errors.HandleError(
                f"assets/labels.txt must name each of the {count} classes. "
                f"Received: {len(own)} lines in {handle!r}."
            )
        self.labels = own or [labels.Label("", str(i)) for i in range(count)]

    def classify(self, image, top: int = 5) -> list[tuple[str, str, float]]:
        """The likeliest classes of a picture, best first.

        Args:
          image: whatever images.decode takes.
          top: how many.

        Returns:
          (WordNet id or "", name, probability) for each.

        Raises:
          ImageError: the picture cannot be read.
        """
        return self.classify_batch([image], top)[0]

    def classify_batch(self, pictures, top: int = 5) -> list:
        """As `classify`, for pictures that the preset makes of one size."""
        batch = np.stack([images.preprocess(p, self.preset) for p in pictures])
        scores = self._activation(self._function(tf.constant(batch)))
        return labels.decode_predictions(scores, top, self.labels)
