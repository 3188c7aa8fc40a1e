"""Ways to run one R50x1 of random weights: ours, and what it is compared with.

All have the same weights, made by hub_export.random_weights, and two threads
on two cores. A peer that is not installed is left out, and said so.
"""

import importlib.util
import os
import pathlib
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from benchmarks import plain_graphs
from bit_tf import checkpoints, variants

__all__ = ["Files", "Peer", "installed", "make_files", "missing", "peers"]

Call = Callable[[np.ndarray], np.ndarray]


class Files(NamedTuple):
    """One network in every format that is run.

    Attributes:
      architecture: a name of variants.
      checkpoint: Google's .npz.
      ours: our SavedModel of features.
      baseline: see plain_graphs.save_baseline.
      without_norms: see plain_graphs.save_without_norms.
      transformers: a directory as Hugging Face has it.
      onnx: a file; None where onnx is not installed.
    """

    architecture: str
    checkpoint: pathlib.Path
    ours: pathlib.Path
    baseline: pathlib.Path
    without_norms: pathlib.Path
    transformers: pathlib.Path
    onnx: pathlib.Path | None


class Peer(NamedTuple):
    """A way to run the network.

    Attributes:
      name: shown.
      start: (batch, height, width) → a function of such pictures, float32
        [n, h, w, 3] in [0, 1], that returns float32 [n, d].
      dtype: what it computes in.
      exact: whether its values are those of our model.
    """

    name: str
    start: Callable[[int, int, int], Call]
    dtype: str = "float32"
    exact: bool = True


def make_files(folder: pathlib.Path, architecture: str = "R50x1") -> Files:
    """Writes the network in every format."""
    from hub_export import random_weights, saved_model

    row = variants.architecture(architecture)
    weights = dict(random_weights.RandomWeights(row.blocks, row.stem_width))
    found = Files(
        architecture,
        folder / "weights.npz",
        folder / "ours",
        folder / "baseline",
        folder / "without_norms",
        folder / "transformers",
        folder / "graph.onnx" if importlib.util.find_spec("onnx") else None,
    )
    checkpoints.write(weights, found.checkpoint)
    checkpoints.write(weights, found.transformers, format="transformers")
    saved_model.convert(found.checkpoint, found.ours, head=False)
    plain_graphs.save_baseline(weights, row.blocks, found.baseline)
    plain_graphs.save_without_norms(weights, row.blocks, found.without_norms)
    if found.onnx:
        plain_graphs.write_onnx(weights, row.blocks, found.onnx)
    return found


def installed(*modules: str) -> bool:
    return all(map(importlib.util.find_spec, modules))


def missing() -> list[str]:
    """Peers that are not installed."""
    needs = {
        "transformers (torch)": ("torch", "transformers"),
        "ONNX Runtime": ("onnx", "onnxruntime"),
        "OpenVINO": ("onnx", "openvino"),
    }
    return [name for name, modules in needs.items() if not installed(*modules)]


def peers(files: Files, compiled: bool = True) -> list[Peer]:
    """Ours first, then what is compared with it.

    Args:
      files: from `make_files`.
      compiled: whether torch.compile is among them, which takes its time.
    """
    found = [
        Peer("bit_tf encode", _encode(files)),
        Peer("bit_tf bulk", _bulk(files)),
        Peer("bit_tf __call__", _saved_model(files.ours)),
        Peer("bit_tf Keras model", _keras(files)),
        Peer("bit_tf encode bfloat16", _encode(files, "bfloat16"), "bfloat16"),
        Peer("TF2-style baseline", _saved_model(files.baseline)),
        Peer(
            "convolutions and ReLU alone",
            _frozen(files.without_norms),
            exact=False,
        ),
    ]
    if installed("torch", "transformers"):
        found.append(Peer("transformers (torch)", _torch(files)))
        if compiled:
            found.append(
                Peer(
                    "transformers (torch.compile)",
                    _torch(files, compiled=True),
                )
            )
        found.append(
            Peer(
                "transformers (torch) bfloat16",
                _torch(files, dtype="bfloat16"),
                "bfloat16",
            )
        )
    if files.onnx and installed("onnxruntime"):
        found.append(Peer("ONNX Runtime", _onnxruntime(files.onnx)))
    if files.onnx and installed("openvino"):
        found.append(Peer("OpenVINO", _openvino(files.onnx, "f32")))
        found.append(
            Peer(
                "OpenVINO bfloat16",
                _openvino(files.onnx, "bf16"),
                "bfloat16",
            )
        )
    return found


def _encode(files: Files, precision: str = "float32"):
    def start(batch: int, height: int, width: int) -> Call:
        import bit_tf

        encoder = bit_tf.BitMedium2Vec(str(files.ours), precision=precision)
        return lambda pictures: np.array(encoder.bulk_encode(list(pictures)))

    return start


def _bulk(files: Files):
    def start(batch: int, height: int, width: int) -> Call:
        from bit_tf import embed_model

        encoder = embed_model.Encoder(str(files.ours), "tfhub")

        def call(pictures):
            batch = [
                embed_model.Prepared(picture, width, height, "")
                for picture in pictures
            ]
            return np.stack([one.embedding for one in encoder.encode(batch)])

        return call

    return start


def _saved_model(path: pathlib.Path):
    def start(batch: int, height: int, width: int) -> Call:
        import tensorflow as tf

        from bit_tf import hub

        model = hub.load(path)
        return lambda pictures: model(tf.constant(pictures)).numpy()

    return start


def _frozen(path: pathlib.Path):
    def start(batch: int, height: int, width: int) -> Call:
        import tensorflow as tf

        from bit_tf import hub

        function, _ = hub.picture_function(hub.load(path), "", "", str(path))
        return lambda pictures: function(tf.constant(pictures)).numpy()

    return start


def _keras(files: Files):
    def start(batch: int, height: int, width: int) -> Call:
        import tensorflow as tf

        import bit_tf

        model = bit_tf.load_model(files.checkpoint, head=False)
        function = tf.function(lambda x: model(x, training=False))
        return lambda pictures: function(tf.constant(pictures)).numpy()

    return start


def _torch(files: Files, dtype: str = "float32", compiled: bool = False):
    def start(batch: int, height: int, width: int) -> Call:
        import torch
        import transformers

        torch.set_num_threads(os.cpu_count() or 1)
        kind = getattr(torch, dtype)
        model = transformers.BitModel.from_pretrained(files.transformers)
        model = model.eval().to(kind).to(memory_format=torch.channels_last)
        run = torch.compile(model) if compiled else model

        def call(pictures):
            with torch.inference_mode():
                # A view: pictures already lie channels last.
                x = torch.from_numpy(pictures).permute(0, 3, 1, 2)
                found = run(pixel_values=(2 * x - 1).to(kind)).pooler_output
                return found.float().flatten(1).numpy()

        return call

    return start


def _onnxruntime(path: pathlib.Path):
    def start(batch: int, height: int, width: int) -> Call:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = os.cpu_count() or 1
        session = onnxruntime.InferenceSession(
            str(path),
            options,
            providers=["CPUExecutionProvider"],
        )

        def call(pictures):
            x = np.ascontiguousarray(pictures.transpose(0, 3, 1, 2))
            return session.run(None, {"images": x})[0]

        return call

    return start


def _openvino(path: pathlib.Path, precision: str):
    def start(batch: int, height: int, width: int) -> Call:
        import openvino

        model = openvino.Core().read_model(str(path))
        model.reshape([batch, 3, height, width])
        compiled = openvino.compile_model(
            model,
            "CPU",
            {
                "PERFORMANCE_HINT": "LATENCY",
                "INFERENCE_PRECISION_HINT": precision,
            },
        )

        def call(pictures):
            x = np.ascontiguousarray(pictures.transpose(0, 3, 1, 2))
            return np.array(compiled(x)[0])

        return call

    return start
