"""Image embeddings with vectorhub's encoder interface.

    encoder = BitMedium2Vec()
    vector = encoder.encode("cat.jpg")

Names and arguments are those of vectorhub.encoders.image.tfhub. Its defects
are not: pixels are scaled, batches are batches, grey and transparent pictures
are converted, and an error is an error, never a vector. Its collection methods
(add_documents, search, retrieve_documents, delete_collection) spoke to a cloud
service that is gone: colab/bit_embeddings.ipynb shows a search over vectors.
"""

import concurrent.futures
import copy
import math
import os
import warnings
from collections.abc import Iterable, Iterator, Sequence
from typing import ClassVar

import numpy as np
import tensorflow as tf

from bit_tf import conv_precision, errors, hub, images, variants
from bit_tf.presets import Preset

__all__ = ["BitMedium2Vec", "BitSmall2Vec", "ImageEncoder"]


class ImageEncoder:
    """Pictures → vectors, with any reusable SavedModel of pictures.

    Args:
      model_url: a TF-Hub handle, a directory, or a .tar.gz archive.
      preset: how pictures are prepared, one or a name of images.PRESETS;
        "tfhub" keeps each one's size, as vectorhub did.
      precision: "float32"; or "bfloat16", in which convolutions are quicker on
        a processor that has it, and vectors differ: by 1 % at most of the
        demo's digits, by more of weights that are less well trained. A model
        of up to 64 MiB in bfloat16, such as R50x1, takes 1 GB more memory.

    Attributes:
      precision: as passed.
      model_url: as passed.
      model_name: the end of the handle, such as "m-r50x1".
      urls: the published handles, which need no warning.
      model: the loaded SavedModel.
      vector_length: d.

    Raises:
      HandleError: there is no such model.
      UnknownNameError: there is no such preset or precision.
    """

    # Published handles: their facts, as in vectorhub.
    urls: ClassVar[dict[str, dict[str, int]]] = {
        row.feature_handle: {
            "vector_length": variants.architecture(row.architecture).feature_dim
        }
        for row in variants.list_models()
        if row.feature_handle
    }
    __name__ = "bit"
    _model_id = "image/bit"
    _description = "BiT image features."

    def __init__(
        self,
        model_url: str | os.PathLike,
        preset: str | Preset = "tfhub",
        precision: str = "float32",
    ):
        self.precision = conv_precision.require(precision)
        self.model_url = os.fsdecode(model_url)
        if "://" in self.model_url and self.model_url not in self.urls:
            warnings.warn(
                f"{self.model_url} is not one of the published BiT modules in "
                f"{type(self).__name__}.urls; its own vector_length is used.",
                stacklevel=3,
            )
        self.model_name = _model_name(self.model_url)
        self.preset = (
            preset if isinstance(preset, Preset) else images.preset(preset)
        )
        self.model = hub.load(model_url)
        self._function, self.vector_length = hub.picture_function(
            self.model,
            "image_feature_vector",
            "features",
            self.model_url,
            precision,
        )

    @property
    def definition(self) -> dict:
        """vectorhub's model card, as a dict."""
        return {
            "model_id": self._model_id,
            "model_name": self.model_name,
            "vector_length": self.vector_length,
            "paper": variants.BIT,
            "repo": self.model_url,
            "installation": "pip install bit-tf",
            "release_date": "2019-12-24",
            "category": "image",
            "short_description": self._describe(),
            "example": f"{type(self).__name__}().encode('photo.jpg')",
        }

    def _describe(self) -> str:
        if self.model_url in self.urls:
            return self._description
        return f"Image features of {self.model_url}."

    @property
    def zero_vector(self) -> list[float]:
        """`vector_length` zeros, for callers who mark missing pictures so."""
        return [0.0] * self.vector_length

    def read(self, image) -> np.ndarray:
        """A picture's pixels: uint8 [h, w, 3], RGB.

        Args:
          image: a path, URL, data: URL, bytes, file object, PIL image or array.

        Raises:
          ImageError: it cannot be read; the message says why.
        """
        return images.decode(image)

    def encode(self, image) -> list[float]:
        """A picture's vector.

        Args:
          image: whatever `read` takes or returns; a float array must be in
            [0, 1], and is not rounded to 8 bits.

        Raises:
          ImageError: it cannot be read.
        """
        return self._encode_batch([self._prepare(image)])[0].tolist()

    def bulk_encode(
        self,
        images: Iterable,
        threads: int = 10,
        chunks: int = 10,
        on_error: str = "raise",
    ) -> list:
        """Vectors of many pictures, in their order, in batches.

        Args:
          images: each whatever `encode` takes, or the ImageError of one that
            could not be read before. Pictures of one size share a batch.
          threads: how many pictures are read at once.
          chunks: pictures a batch.
          on_error: "raise", or "return" to find the exception in the place of
            a vector.

        Returns:
          A list with a list of floats (or an exception) for every picture.

        Raises:
          ImageError: a picture cannot be read, and on_error is "raise".
        """
        return list(self.iterate(images, threads, chunks, on_error))

    def iterate(
        self,
        images: Iterable,
        threads: int = 10,
        chunks: int = 10,
        on_error: str = "raise",
    ) -> Iterator:
        """As `bulk_encode`, one by one, holding few pictures at a time."""
        if on_error not in ("raise", "return"):
            raise ValueError(
                f"on_error must be 'raise' or 'return'. Received: {on_error!r}."
            )
        if threads < 1 or chunks < 1:
            raise ValueError(
                "threads and chunks must be at least 1. "
                f"Received: threads={threads}, chunks={chunks}."
            )
        if isinstance(images, str | bytes | os.PathLike):
            raise errors.ImageRangeError(
                "bulk_encode takes a list of pictures. "
                f"Received: {type(images).__name__}; use encode for one."
            )

        return self._iterate(images, threads, chunks, on_error == "return")

    def _iterate(
        self, images: Iterable, threads: int, chunks: int, return_errors: bool
    ) -> Iterator:
        def prepare(image):
            try:
                if isinstance(image, errors.ImageError):
                    raise image
                return self._prepare(image)
            except errors.ImageError as error:
                if return_errors:
                    return error
                raise

        window: list = []
        with concurrent.futures.ThreadPoolExecutor(threads) as pool:
            for image in images:
                window.append(image)
                if len(window) == 4 * max(threads, chunks):
                    yield from self._encode_window(
                        pool.map(prepare, window), chunks
                    )
                    window = []
            yield from self._encode_window(pool.map(prepare, window), chunks)

    def _encode_window(self, prepared: Iterable, chunks: int) -> list:
        results = list(prepared)
        by_size: dict[tuple, list[int]] = {}
        for index, item in enumerate(results):
            if isinstance(item, np.ndarray):
                by_size.setdefault(item.shape, []).append(index)
        for indices in by_size.values():
            for start in range(0, len(indices), chunks):
                batch = indices[start : start + chunks]
                vectors = self._encode_batch([results[i] for i in batch])
                for index, vector in zip(batch, vectors, strict=True):
                    results[index] = vector.tolist()
        return results

    def _prepare(self, image) -> np.ndarray:
        return images.preprocess(image, self.preset)

    def _encode_batch(self, batch: Sequence[np.ndarray]) -> np.ndarray:
        return np.asarray(self._function(tf.constant(np.stack(batch))))

    def encode_documents(
        self,
        fields: Sequence[str],
        documents: Sequence[dict],
        missing_treatment=None,
    ) -> list[dict]:
        """Writes `<field>_<__name__>_vector_` into every document.

        Args:
          fields: names; dots reach into nested documents.
          documents: changed in place.
          missing_treatment: for documents without the field: None skips them,
            "zero_vector" writes zeros, any other value is written as it is.
            Where the path to the field is no document, one is made.

        Returns:
          `documents`.

        Raises:
          ImageError: a field's picture cannot be read; no document of that
            field was changed.
        """
        documents = list(documents)
        for field in [fields] if isinstance(fields, str) else fields:
            path = field.split(".")
            parents = [_parent(document, path) for document in documents]
            present = [p for p in parents if p is not None and path[-1] in p]
            vectors = iter(self.bulk_encode([p[path[-1]] for p in present]))
            for document, parent in zip(documents, parents, strict=True):
                if parent is not None and path[-1] in parent:
                    vector = next(vectors)
                elif missing_treatment is None:
                    continue
                elif isinstance(missing_treatment, str) and (
                    missing_treatment == "zero_vector"
                ):
                    vector = self.zero_vector
                else:
                    vector = copy.copy(missing_treatment)
                target = document
                for key in path[:-1]:
                    if not isinstance(target.get(key), dict):
                        target[key] = {}
                    target = target[key]
                target[f"{path[-1]}_{self.__name__}_vector_"] = vector
        return documents

    def encode_chunk_documents(
        self,
        chunk_field: str,
        fields: Sequence[str],
        documents: Sequence[dict],
        missing_treatment=None,
    ) -> list[dict]:
        """As `encode_documents`, for the list of documents in a field.

        Args:
          chunk_field: name of a field that holds a list of documents.
          fields: names inside each of them.
          documents: changed in place.
          missing_treatment: as in `encode_documents`.
        """
        documents = list(documents)
        chunks = [c for d in documents for c in d.get(chunk_field) or []]
        self.encode_documents(fields, chunks, missing_treatment)
        return documents

    def to_grayscale(
        self, sample: np.ndarray, rgb_weights: Sequence[float] | None = None
    ) -> np.ndarray:
        """[h, w, 3] → float [h, w], by default with ITU-R 601 weights."""
        if sample.ndim != 3:
            raise errors.ImageRangeError(
                "to_grayscale takes one picture, [h, w, 3]. "
                f"Received: shape {sample.shape}."
            )
        if rgb_weights is None:
            rgb_weights = (0.2989, 0.5870, 0.1140)
        return np.dot(sample[..., :3], rgb_weights)

    def show_image(self, sample: np.ndarray) -> None:
        """Draws a picture with matplotlib (extra "plot")."""
        plot = errors.import_extra("matplotlib.pyplot", "plot")
        plot.imshow(sample, cmap="gray" if sample.ndim == 2 else None)
        plot.axis("off")
        plot.show()

    def image_resize(
        self,
        image_array: np.ndarray,
        width: int = 0,
        height: int = 0,
        rescale: float = 0,
        resize_mode: str = "symmetry",
    ) -> np.ndarray:
        """Resizes a picture, bilinear with antialiasing.

        Args:
          image_array: uint8 or float in [0, 1], [h, w, 3].
          width, height: in pixels; with one of them the other keeps the
            picture's proportions.
          rescale: a factor instead of width and height.
          resize_mode: vectorhub's, "symmetry" only.

        Raises:
          ValueError: no size, or both kinds, or another mode.
        """
        if resize_mode != "symmetry":
            raise ValueError(
                f"resize_mode must be 'symmetry'. Received: {resize_mode!r}."
            )
        negative = min(width, height, rescale) < 0
        if negative or bool(rescale) == bool(width or height):
            raise ValueError(
                "Give either rescale, or width and height, as positive "
                "numbers. Received: "
                f"width={width}, height={height}, rescale={rescale}."
            )
        old_height, old_width = image_array.shape[:2]
        if rescale:
            width, height = old_width * rescale, old_height * rescale
        width = width or old_width * height / old_height
        height = height or old_height * width / old_width
        return images.resize(
            image_array,
            max(1, math.floor(height + 0.5)),
            max(1, math.floor(width + 0.5)),
            method="bilinear",
            antialias=True,
        )


class BitMedium2Vec(ImageEncoder):
    """BiT-M: features of weights trained on ImageNet-21k (see ImageEncoder)."""

    __name__ = "bit_medium"
    _model_id = "image/bit-medium"
    _description = "BiT-M image features, trained on ImageNet-21k."

    def __init__(
        self,
        model_url: str | os.PathLike = "https://tfhub.dev/google/bit/m-r50x1/1",
        preset: str | Preset = "tfhub",
        precision: str = "float32",
    ):
        super().__init__(model_url, preset, precision)


class BitSmall2Vec(ImageEncoder):
    """BiT-S: features of weights trained on ILSVRC-2012 (see ImageEncoder)."""

    __name__ = "bit_small"
    _model_id = "image/bit-small"
    _description = "BiT-S image features, trained on ILSVRC-2012."

    def __init__(
        self,
        model_url: str | os.PathLike = "https://tfhub.dev/google/bit/s-r50x1/1",
        preset: str | Preset = "tfhub",
        precision: str = "float32",
    ):
        super().__init__(model_url, preset, precision)


def _model_name(handle: str) -> str:
    parts = [part for part in handle.split("?")[0].split("/") if part]
    if len(parts) > 1 and parts[-1].isdigit():
        parts.pop()
    return parts[-1].removesuffix(".tar.gz") if parts else handle


def _parent(document: dict, path: Sequence[str]) -> dict | None:
    parent: object = document
    for key in path[:-1]:
        parent = parent.get(key) if isinstance(parent, dict) else None
    return parent if isinstance(parent, dict) else None
