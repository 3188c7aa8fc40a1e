"""How near `bit-tf embed` comes to the speed of its parts, and its memory.

    python -m benchmarks.embed --images 2000 --side 224
    python -m benchmarks.embed --memory
    python -m benchmarks.embed --decoding

The first makes JPEGs from scikit-learn's two photos (seeded crops, mirrored or
not, 200 to 1500 pixels at the longer side, of quality 60 to 95) and a
SavedModel of random weights. One process measures the CPU seconds of decoding
and resizing all of them, in one thread, and of the model on all batches, in
turns of some batches; a fresh one measures the wall time of embed_run.run, and
of it what is left after the model was loaded and the pictures were listed.
Prints both, divided by what the parts would take if all cores were always
busy, and the peak memory.

The second embeds 10 000 and 1 000 000 tiny pictures of a .tar with a model that
returns a constant, each in a fresh process, and prints the peak memory (VmHWM
of Linux' /proc).

The third compares two ways to decode ahead: a pool of threads, as the engine
has it, and tf.data.
"""

import argparse
import concurrent.futures
import io
import json
import os
import pathlib
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

from benchmarks import memory, processes, timing
from bit_tf import errors, presets, variants

__all__ = [
    "alone",
    "decoded",
    "main",
    "make_constant",
    "make_model",
    "make_pictures",
    "make_stubs",
    "measure",
    "speed",
    "together",
]

# Pictures that are prepared before the model gets them.
_TURN = 64
_STUBS = (10_000, 1_000_000)


def make_pictures(folder: pathlib.Path, count: int, seed: int = 0) -> None:
    """JPEGs in a folder: crops and transforms of scikit-learn's two photos."""
    import numpy as np

    from bit_tf import images

    datasets = errors.import_extra("sklearn.datasets", "test")
    photos = [images.to_pil(p) for p in datasets.load_sample_images().images]
    folder.mkdir(parents=True)
    draw = np.random.default_rng(seed)
    for number in range(count):
        photo = photos[draw.integers(len(photos))]
        part = draw.uniform(0.4, 1.0, 2)
        width, height = (int(s) for s in part * photo.size)
        left = int(draw.integers(photo.width - width + 1))
        top = int(draw.integers(photo.height - height + 1))
        picture = photo.crop((left, top, left + width, top + height))
        scale = np.exp(draw.uniform(np.log(200), np.log(1500)))
        scale /= max(width, height)
        picture = picture.resize(
            (max(1, round(width * scale)), max(1, round(height * scale)))
        )
        if draw.random() < 0.5:
            picture = picture.transpose(0)
        quality = int(draw.integers(60, 96))
        picture.save(folder / f"{number:06d}.jpg", quality=quality)


def make_model(path: pathlib.Path, architecture: str) -> None:
    """A SavedModel of features, of random weights."""
    from bit_tf import checkpoints
    from hub_export import random_weights, saved_model

    row = variants.architecture(architecture)
    weights = random_weights.RandomWeights(row.blocks, row.stem_width)
    file = path.with_suffix(".npz")
    checkpoints.write(dict(weights), file)
    saved_model.convert(file, path, head=False)


def make_constant(path: pathlib.Path, dim: int = 2048) -> None:
    """A SavedModel that says the same of all pictures."""
    import tensorflow as tf

    model = tf.Module()

    @tf.function(
        input_signature=[tf.TensorSpec([None, None, None, 3], tf.float32)]
    )
    def call(images):
        return tf.ones([tf.shape(images)[0], dim])

    model.__call__ = call
    tf.saved_model.save(model, str(path))


def make_stubs(path: pathlib.Path, count: int) -> None:
    """A .tar of distinct pictures of 2 × 2 pixels."""
    with tarfile.open(path, "w") as archive:
        for number in range(count):
            pixels = number.to_bytes(12, "big")
            data = b"P6 2 2 255\n" + pixels
            member = tarfile.TarInfo(f"{number:07d}.ppm")
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
            # It would keep all of them.
            archive.members.clear()


def alone(
    folder: str, model: str, side: int, batch: int
) -> tuple[float, float]:
    """CPU seconds of decoding and resizing, and of the model."""
    from bit_tf import embed_model, input_pipeline

    preset = input_pipeline.evaluation_preset(side)
    encoder = embed_model.Encoder(model, preset)
    paths = sorted(pathlib.Path(folder).iterdir())
    first = [encoder.prepare(path.read_bytes()) for path in paths[:batch]]
    encoder.encode(first)
    decoding = encoding = 0.0
    for start in range(0, len(paths), _TURN):
        data = [path.read_bytes() for path in paths[start : start + _TURN]]
        begin = time.process_time()
        prepared = [encoder.prepare(one) for one in data]
        middle = time.process_time()
        for at in range(0, len(prepared), batch):
            encoder.encode(prepared[at : at + batch])
        decoding += middle - begin
        encoding += time.process_time() - middle
    return decoding, encoding


def together(
    sources: list[str],
    output: str,
    model: str,
    side: int | None,
    batch: int,
    shard: int,
) -> dict[str, Any]:
    """Seconds of embed_run.run, and of the engine in it; peak bytes."""
    from bit_tf import embed_engine, embed_run, input_pipeline

    seconds = []
    run = embed_engine.Engine.run

    def timed(self, progress: bool = True) -> None:
        start = time.perf_counter()
        run(self, progress)
        seconds.append(time.perf_counter() - start)

    embed_engine.Engine.run = timed  # type: ignore[method-assign]
    preset = (
        presets.preset("tfhub")
        if side is None
        else input_pipeline.evaluation_preset(side)
    )
    summary = embed_run.run(
        sources,
        output,
        model=model,
        preset=preset,
        batch=batch,
        shard=shard,
        progress=True,
    )
    return {
        "images": summary.images,
        "encoded": summary.encoded,
        "duplicates": summary.duplicates,
        "errors": summary.errors,
        "seconds": summary.seconds,
        "engine_seconds": seconds[0],
        "peak_bytes": memory.peak_bytes(os.getpid()),
    }


def decoded(folder: str, side: int, way: str) -> tuple[float, float]:
    """(wall, CPU) seconds of decoding and resizing all, a way to do it ahead.

    Args:
      folder: of pictures.
      side: of the squares they become.
      way: "threads" or "tf.data".
    """
    from bit_tf import images, input_pipeline

    preset = input_pipeline.evaluation_preset(side)
    paths = sorted(pathlib.Path(folder).iterdir())
    all_data = [path.read_bytes() for path in paths]

    def prepare(data: bytes):
        return images.preprocess(images.decode(data), preset)

    make = _by_threads if way == "threads" else _by_tf_data
    # Both have their libraries loaded.
    for _ in make(prepare, all_data[:8]):
        pass
    wall, cpu = time.perf_counter(), time.process_time()
    count = sum(1 for _ in make(prepare, all_data))
    assert count == len(paths)
    return time.perf_counter() - wall, time.process_time() - cpu


def _by_threads(
    prepare: Callable[[bytes], Any], data: list[bytes]
) -> Iterator[Any]:
    threads = os.cpu_count() or 1
    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        waiting: list[concurrent.futures.Future] = []
        for one in data:
            waiting.append(pool.submit(prepare, one))
            if len(waiting) == 32:
                yield waiting.pop(0).result()
        for future in waiting:
            yield future.result()


def _by_tf_data(
    prepare: Callable[[bytes], Any], data: list[bytes]
) -> Iterator[Any]:
    import tensorflow as tf

    from bit_tf import pipeline_errors

    threads = os.cpu_count() or 1
    dataset = tf.data.Dataset.from_generator(
        lambda: iter(data), output_signature=tf.TensorSpec([], tf.string)
    )
    dataset = pipeline_errors.mapped(
        dataset,
        lambda one: pipeline_errors.numpy_call(prepare, [one], tf.float32),
        threads,
    )
    for picture in dataset.prefetch(32):
        yield picture.numpy()


def speed(
    where: pathlib.Path,
    architecture: str = "R50x1",
    images: int = 2000,
    side: int = 224,
    batch: int = 8,
    shard: int = 1024,
    seed: int = 0,
) -> dict[str, Any]:
    """The wall time of the whole, and the CPU seconds of its parts.

    Args:
      where: an empty folder, for pictures, model and vectors.
      architecture: a name of variants.
      images: how many pictures.
      side: that they are resized to, in pixels.
      batch: pictures of a batch.
      shard: rows of a file.
      seed: of the pictures.
    """
    model, folder = where / "model", where / "pictures"
    processes.fresh(make_model, model, architecture)
    make_pictures(folder, images, seed)
    decoding, encoding = processes.fresh(
        alone, str(folder), str(model), side, batch
    )
    found = processes.fresh(
        together,
        [str(folder)],
        str(where / "out"),
        str(model),
        side,
        batch,
        shard,
    )
    cores = os.cpu_count() or 1
    ideal = (decoding + encoding) / cores
    return {
        "cores": cores,
        "decode_cpu_seconds": decoding,
        "model_cpu_seconds": encoding,
        **found,
        "ratio": found["seconds"] / ideal,
        "engine_ratio": found["engine_seconds"] / ideal,
    }


def measure(folder: pathlib.Path, **options: Any) -> dict[str, Any]:
    """What `speed` found, as tables."""
    found = speed(folder, **options)
    return {
        "machine": timing.machine(),
        "tables": {
            "JPEGs to vectors": [
                {
                    "images": found["images"],
                    "seconds": found["seconds"],
                    "CPU seconds of decoding, alone": found[
                        "decode_cpu_seconds"
                    ],
                    "CPU seconds of the model, alone": found[
                        "model_cpu_seconds"
                    ],
                    "seconds / (both / cores)": found["ratio"],
                    "peak bytes": found["peak_bytes"],
                }
            ]
        },
    }


def _speed(args, where: pathlib.Path) -> dict[str, Any]:
    return speed(
        where,
        args.architecture,
        args.images,
        args.side,
        args.batch,
        args.shard,
        args.seed,
    )


def _memory(args, where: pathlib.Path) -> dict[str, Any]:
    model = where / "model"
    processes.fresh(make_constant, model)
    found: dict[str, Any] = {}
    for count in args.stubs:
        archive = where / f"{count}.tar"
        make_stubs(archive, count)
        out = str(where / f"out{count}")
        found[str(count)] = processes.fresh(
            together, [str(archive)], out, str(model), None, 64, 1024
        )
        archive.unlink()
    small, *_, large = (row["peak_bytes"] for row in found.values())
    return {**found, "growth": large / small - 1}


def _decoding(args, where: pathlib.Path) -> dict[str, Any]:
    folder = where / "pictures"
    make_pictures(folder, args.images, args.seed)
    found: dict[str, Any] = {}
    for _ in range(3):
        for way in ("threads", "tf.data"):
            wall, cpu = processes.fresh(decoded, str(folder), args.side, way)
            row = found.setdefault(way, {"wall": [], "cpu": []})
            row["wall"].append(wall)
            row["cpu"].append(cpu)
    return found


def main(argv: list[str] | None = None) -> int:
    """Prints JSON; exits with 1 if a picture got an error."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--side", type=int, default=224)
    parser.add_argument("--architecture", default="R50x1")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--shard", type=int, default=1024)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--decoding", action="store_true")
    parser.add_argument(
        "--stubs", type=int, nargs="+", default=list(_STUBS), metavar="N"
    )
    args = parser.parse_args(argv)
    run = _speed
    if args.memory or args.decoding:
        run = _memory if args.memory else _decoding
    with tempfile.TemporaryDirectory() as where:
        found = run(args, pathlib.Path(where))
    print(json.dumps(found, indent=2))
    return 1 if found.get("errors") else 0


if __name__ == "__main__":
    sys.exit(main())
