"""The whole path on one machine, each step told with its time.

checkpoint → SavedModel → hub.load, hub.KerasLayer → vectors, names, a picture.
"""

import contextlib
import pathlib
import time
import warnings
from collections.abc import Callable, Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from bit_tf import (
    classify,
    embed,
    errors,
    files,
    images,
    published,
    variants,
)
from hub_export import digits, random_weights, saved_model

__all__ = ["run"]

NEIGHBOURS = 6
TILE = 96


def run(
    directory: pathlib.Path,
    *,
    checkpoint: str | pathlib.Path | None = None,
    random: str | None = None,
    photos: Sequence[str] = (),
    preset: str = "big_transfer eval",
    say: Callable[[str], None] = print,
) -> pathlib.Path:
    """Runs the demo.

    Args:
      directory: for the SavedModel and the picture; made if need be.
      checkpoint: whatever bit_tf.load_model takes; by default the package's
        own, trained on digits.
      random: an architecture: writes random weights for it, and uses them.
      photos: paths or URLs; by default the package's held-out digits.
      preset: how photos are resized, a name of images.PRESETS.
      say: gets every line that is told.

    Returns:
      The path of the picture of nearest neighbours.

    Raises:
      BitTfError: a step failed.
    """
    if random is not None:
        variants.architecture(random)
    pictures, captions = _read_photos(photos, preset)
    directory.mkdir(parents=True, exist_ok=True)
    model_directory = directory / "saved_model"
    own = checkpoint is None and random is None
    names: str | Sequence[str] = "auto"
    step = _Steps(say)
    if own:
        checkpoint = pathlib.Path(str(digits.DATA / digits.CHECKPOINT))
        names = digits.NAMES
        say("Checkpoint: this project's own, trained on 1437 digits.")
    elif random is not None:
        checkpoint = directory / f"RANDOM-{random}.npz"
        say("THE WEIGHTS ARE RANDOM: VECTORS AND NAMES MEAN NOTHING.")
        with step(f"Write a random {random} checkpoint, {checkpoint}"):
            random_weights.write_checkpoint(random, checkpoint)
    assert checkpoint is not None
    with step(f"Read {checkpoint}"):
        source = published.open_checkpoint(checkpoint)
    for note in source.notes:
        say(f"   {note}")
    row = variants.find_architecture(source.blocks, source.stem_width)
    say(
        f"   {row.name if row else 'an unpublished architecture'}, "
        f"{source.num_classes or 'no'} classes, {len(source)} arrays"
    )
    with step(f"Convert and export to {model_directory}, verify"):
        report = saved_model.convert(
            checkpoint, model_directory, class_labels=names, overwrite=True
        )
    say(
        "   loaded in a fresh process, it gives the checkpoint's values to "
        f"{report['relative_error']:.0e}"
    )

    truth = None
    if not photos:
        held_out, truth = digits.held_out()
        pictures = list(held_out)
        captions = [digits.NAMES[label] for label in truth]
    batch = np.stack(pictures)

    with step("Load with bit_tf.BitMedium2Vec"):
        encoder = embed.BitMedium2Vec(model_directory)
    with step(f"Embed {len(batch)} pictures"):
        vectors = np.asarray(encoder.bulk_encode(list(batch), chunks=16))
    say(f"   vectors of length {encoder.vector_length}")
    with step("Load with hub.load and hub.KerasLayer, compare"):
        error = _compare(model_directory, batch[:2])
    say(f"   the same outputs to {error:.0e}")

    if source.num_classes:
        with step("Classify"):
            classifier = classify.Classifier(model_directory, "tfhub")
            chunks = [batch[i : i + 16] for i in range(0, len(batch), 16)]
            best = [
                prediction[0]
                for chunk in chunks
                for prediction in classifier.classify_batch(chunk, top=1)
            ]
        if own and truth is not None:
            right = np.mean(
                [
                    name == digits.NAMES[label]
                    for (_, name, _), label in zip(best, truth, strict=True)
                ]
            )
            say(f"   {right:.1%} of {len(truth)} held-out digits are right")
        else:
            for caption, (_, name, score) in zip(
                captions[:NEIGHBOURS], best, strict=False
            ):
                say(f"   {caption}: {name} ({score:.2f})")

    path = directory / "neighbours.png"
    with step(f"Draw nearest neighbours to {path}"):
        firsts = [captions.index(c) for c in dict.fromkeys(captions)]
        draw_neighbours(batch, vectors, captions, path, firsts[:10])
    if random is not None:
        say("REMEMBER: THE WEIGHTS WERE RANDOM.")
    return path


class _Steps:
    """Tells numbered steps and how long each took."""

    def __init__(self, say: Callable[[str], None]):
        self._say = say
        self._count = 0

    @contextlib.contextmanager
    def __call__(self, text: str):
        self._count += 1
        start = time.perf_counter()
        yield
        seconds = time.perf_counter() - start
        self._say(f"{self._count}. {text}: {seconds:.1f} s")


def _read_photos(photos: Sequence[str], preset: str):
    """(pictures of one size, their captions)"""
    pictures = [images.preprocess(photo, preset) for photo in photos]
    captions = [pathlib.PurePath(photo).name for photo in photos]
    if len({picture.shape for picture in pictures}) > 1:
        raise errors.ImageRangeError(
            "The demo compares photos of one size. Received: photos of several "
            f"sizes, which the preset {preset!r} keeps. Choose another preset."
        )
    if len(pictures) <= NEIGHBOURS:
        pictures, captions = _with_parts(pictures, captions)
    return pictures, captions


def _with_parts(pictures, captions):
    """Adds mirrored and half pictures, so that few photos have neighbours."""
    more, names = list(pictures), list(captions)
    for picture, caption in zip(pictures, captions, strict=True):
        height, width = picture.shape[:2]
        for name, part in (
            ("mirrored", picture[:, ::-1]),
            ("left half", picture[:, : width // 2]),
            ("right half", picture[:, width // 2 :]),
        ):
            more.append(
                images.resize(
                    np.ascontiguousarray(part),
                    height,
                    width,
                    method="bilinear",
                    antialias=False,
                )
            )
            names.append(f"{caption}, {name}")
    return more, names


def _compare(directory: pathlib.Path, batch: np.ndarray) -> float:
    """Relative difference of hub.KerasLayer (tf_keras) and hub.load."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="pkg_resources is deprecated")
        import tensorflow_hub
        import tf_keras
    loaded = tensorflow_hub.load(str(directory))
    expected = np.asarray(loaded(batch))
    model = tf_keras.Sequential(
        [
            tf_keras.layers.InputLayer(input_shape=(None, None, 3)),
            tensorflow_hub.KerasLayer(str(directory), trainable=True),
        ]
    )
    found = np.asarray(model(batch))
    error = float(np.linalg.norm(found - expected) / np.linalg.norm(expected))
    if not error <= 1e-5:
        raise errors.VerificationError(
            "hub.KerasLayer and hub.load must give the same outputs to 1e-5. "
            f"Received: a relative difference of {error}."
        )
    return error


def draw_neighbours(
    pictures: np.ndarray,
    vectors: np.ndarray,
    captions: Sequence[str],
    path: pathlib.Path,
    queries: Sequence[int],
) -> None:
    """Draws pictures, each with the nearest others by cosine similarity.

    Args:
      pictures: float [n, h, w, 3] in [0, 1].
      vectors: float [n, d].
      captions: n texts.
      path: the PNG to write.
      queries: indices of the pictures that get a row.
    """
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    rows = len(queries)
    columns = min(NEIGHBOURS, len(pictures) - 1) + 1
    gap, text = 12, 18
    canvas = Image.new(
        "RGB",
        (columns * (TILE + gap) + 3 * gap, rows * (TILE + text + gap) + gap),
        "white",
    )
    draw = ImageDraw.Draw(canvas)
    font = ImageFont.load_default(size=11)
    for row, query in enumerate(queries):
        similarity = unit @ unit[query]
        similarity[query] = -np.inf
        nearest = np.argsort(-similarity)[: columns - 1]
        for column, index in enumerate([query, *nearest]):
            tile = images.to_pil(pictures[index])
            scale = TILE / max(tile.size)
            tile = tile.resize(
                [max(1, round(side * scale)) for side in tile.size],
                Image.Resampling.NEAREST if scale > 1 else None,
            )
            x = gap + column * (TILE + gap) + (2 * gap if column else 0)
            y = gap + row * (TILE + text + gap)
            canvas.paste(tile, (x, y))
            label = captions[index]
            if column:
                label = f"{similarity[index]:.3f} {label}"
            while draw.textlength(label, font=font) > TILE + gap / 2:
                label = label[:-2].rstrip("…") + "…"
            draw.text((x, y + TILE + 2), label, fill="black", font=font)
        edge = gap + TILE + 1.5 * gap
        draw.line([(edge, y), (edge, y + TILE)], fill="grey")
    with files.new_file(path) as file:
        canvas.save(file, format="PNG")
