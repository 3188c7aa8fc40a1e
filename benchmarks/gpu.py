"""A GPU: the Keras model on JAX against transformers (and timm) in torch.

    python -m benchmarks gpu

Features at 224 × 224 (batch 64) and 480 × 480 (batch 16), and a training step
with 1000 classes at 224 × 224 (batch 32), of R50x1 and R152x2, in bfloat16:
milliseconds, images a second, and the share of what a large bfloat16 matrix
product reaches on the same GPU. Each way runs in a process of its own, since
JAX and torch both take a GPU's memory, and TensorFlow is not needed. Without a
GPU it says so.
"""

import functools
import os
import pathlib
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks import peers, processes, timing
from bit_tf import variants

__all__ = ["measure"]

_ARCHITECTURES = ("R50x1", "R152x2")
# (what, batch, side).
_WORK = (
    ("features", 64, 224),
    ("features", 16, 480),
    ("training", 32, 224),
)
_CLASSES, _RATE, _MOMENTUM = 1000, 0.003, 0.9
# Side of the matrices whose product is the peak.
_SIDE = 8192
_WARM, _ROUNDS = 5, 20
# Forward and backward, beside forward.
_PASSES = {"features": 1, "training": 3}


def measure(folder: pathlib.Path) -> dict[str, Any]:
    """Tables of all work; `unavailable` says why there are none.

    Args:
      folder: is not used: weights are random.
    """
    found: dict[str, Any] = {"machine": timing.machine(), "tables": {}}
    ways: dict[str, Callable[..., dict[str, Any]]] = {}
    if peers.installed("jax"):
        ways["bit_tf (Keras on JAX)"] = _jax
    if peers.installed("torch", "transformers"):
        for compiled in (False, True):
            name = "torch.compile" if compiled else "torch"
            ways[f"transformers ({name}, channels last)"] = functools.partial(
                _torch, "transformers", compiled
            )
    if peers.installed("torch", "timm"):
        for compiled in (False, True):
            name = "torch.compile" if compiled else "torch"
            ways[f"timm ({name}, channels last)"] = functools.partial(
                _torch, "timm", compiled
            )
    device = processes.fresh(_device)
    if device is None:
        found["unavailable"] = (
            "No GPU that JAX can use was found. Install jax[cuda13] on a "
            "machine with one."
        )
        return found
    found["device"], found["matrix_product_flops"] = device
    for architecture in _ARCHITECTURES:
        for work, batch, side in _WORK:
            rows = []
            for name, way in ways.items():
                try:
                    row = processes.fresh(way, architecture, work, batch, side)
                except Exception as error:  # noqa: BLE001
                    # Another library's failure is its row.
                    row = {"failed": f"{type(error).__name__}: {error}"[:200]}
                rows.append(
                    {
                        "": name,
                        **_of(row, architecture, work, batch, side, device[1]),
                    }
                )
            title = f"{architecture}, {work}, batch {batch}, {side} × {side}"
            found["tables"][title] = rows
    return found


def _of(
    row: dict[str, Any],
    architecture: str,
    work: str,
    batch: int,
    side: int,
    peak: float,
) -> dict[str, Any]:
    """A table's row."""
    if "failed" in row:
        return {"ms": None, "images/s": None, "of matrix product": None, **row}
    flops = (
        2
        * batch
        * _PASSES[work]
        * timing.multiply_accumulates(architecture, side, side)
    )
    seconds = statistics.median(row["seconds"])
    return {
        "ms": 1000 * seconds,
        "images/s": batch / seconds,
        "of matrix product": flops / seconds / peak,
        "failed": None,
    }


def _device() -> tuple[str, float] | None:
    """(name, bfloat16 operations a second) of the GPU, if there is one."""
    try:
        import jax
        import jax.numpy as jnp

        devices = jax.devices("gpu")
    except (ImportError, RuntimeError):
        return None
    matrix = jnp.ones((_SIDE, _SIDE), jnp.bfloat16)
    product = jax.jit(jnp.matmul)
    seconds = _timed(lambda: product(matrix, matrix).block_until_ready())
    return devices[0].device_kind, 2 * _SIDE**3 / min(seconds)


def _timed(call: Callable[[], Any]) -> list[float]:
    for _ in range(_WARM):
        call()
    seconds = []
    for _ in range(_ROUNDS):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return seconds


def _pictures(batch: int, side: int) -> np.ndarray:
    rng = np.random.default_rng(0)
    return rng.random((batch, side, side, 3), np.float32)


def _jax(architecture: str, work: str, batch: int, side: int) -> dict[str, Any]:
    """The Keras model, compiled by XLA."""
    os.environ["KERAS_BACKEND"] = "jax"
    import jax
    import keras

    import bit_tf

    classes = _CLASSES if work == "training" else 0
    model = bit_tf.create_model(
        architecture, num_classes=classes, dtype="mixed_bfloat16"
    )
    pictures = jax.device_put(_pictures(batch, side))
    if work == "features":
        state = (
            [v.value for v in model.trainable_variables],
            [v.value for v in model.non_trainable_variables],
        )

        @jax.jit
        def run(state, pictures):
            found, _ = model.stateless_call(*state, pictures)
            return found

        call = functools.partial(run, state, pictures)
        return {"seconds": _timed(lambda: call().block_until_ready())}
    optimizer = keras.optimizers.SGD(_RATE, momentum=_MOMENTUM)
    optimizer.build(model.trainable_variables)
    labels = jax.device_put(
        np.random.default_rng(0).integers(0, _CLASSES, batch)
    )

    def loss(trainable, rest, pictures, labels):
        logits, rest = model.stateless_call(
            trainable, rest, pictures, training=True
        )
        likelihood = jax.nn.log_softmax(logits.astype("float32"))
        chosen = jax.numpy.take_along_axis(likelihood, labels[:, None], 1)
        return -chosen.mean(), rest

    gradient = jax.value_and_grad(loss, has_aux=True)

    @functools.partial(jax.jit, donate_argnums=0)
    def step(state, pictures, labels):
        trainable, rest, moments = state
        (value, rest), found = gradient(trainable, rest, pictures, labels)
        trainable, moments = optimizer.stateless_apply(
            moments, found, trainable
        )
        return (trainable, rest, moments), value

    state = [
        [v.value for v in variables]
        for variables in (
            model.trainable_variables,
            model.non_trainable_variables,
            optimizer.variables,
        )
    ]

    def once():
        nonlocal state
        state, value = step(state, pictures, labels)
        value.block_until_ready()

    return {"seconds": _timed(once)}


def _torch(
    library: str,
    compiled: bool,
    architecture: str,
    work: str,
    batch: int,
    side: int,
) -> dict[str, Any]:
    """transformers or timm, channels last, under bfloat16 autocast."""
    import torch

    training = work == "training"
    model = _torch_model(library, architecture, training)
    model = model.cuda().to(memory_format=torch.channels_last).train(training)
    run = torch.compile(model) if compiled else model
    pictures = torch.from_numpy(_pictures(batch, side)).permute(0, 3, 1, 2)
    pictures = 2 * pictures.cuda() - 1
    labels = torch.randint(0, _CLASSES, (batch,), device="cuda")
    optimizer = torch.optim.SGD(model.parameters(), _RATE, momentum=_MOMENTUM)

    def forward():
        with torch.autocast("cuda", torch.bfloat16):
            found = run(pictures)
        return getattr(found, "logits", getattr(found, "pooler_output", found))

    def features():
        with torch.inference_mode():
            forward()
        torch.cuda.synchronize()

    def step():
        optimizer.zero_grad(set_to_none=True)
        loss = torch.nn.functional.cross_entropy(forward().float(), labels)
        loss.backward()
        optimizer.step()
        torch.cuda.synchronize()

    return {"seconds": _timed(step if training else features)}


def _torch_model(library: str, architecture: str, training: bool) -> Any:
    """A model with random weights."""
    row = variants.architecture(architecture)
    if library == "timm":
        import timm

        size, width = architecture[1:].split("x")
        return timm.create_model(
            f"resnetv2_{size}x{width}_bit",
            num_classes=_CLASSES if training else 0,
        )
    import transformers

    config = transformers.BitConfig(
        depths=list(row.blocks),
        num_labels=_CLASSES,
        embedding_size=row.stem_width,
        hidden_sizes=[4 * row.stem_width * 2**block for block in range(4)],
    )
    if training:
        return transformers.BitForImageClassification(config)
    return transformers.BitModel(config)
