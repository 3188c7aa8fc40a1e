"""A training step: forward, backward and SGD with momentum.

    python -m benchmarks training

R50x1 with 1000 classes, batch 16 at 128 × 128: bit_tf's step of fine-tuning,
and transformers' BiT in torch, in turns, in one process. Peak memory is that
of fresh processes, one a way, less what the process had with its libraries and
a tiny network: the weights, their gradients and momentum are in it.
"""

import functools
import os
import pathlib
import statistics
from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks import memory, peers, processes, timing

__all__ = ["BATCH", "CLASSES", "SIDE", "measure"]

BATCH, SIDE, CLASSES, ROUNDS = 16, 128, 1000, 11
_RATE, _MOMENTUM = 0.003, 0.9
Step = Callable[[], float]


def measure(
    folder: pathlib.Path,
    architecture: str = "R50x1",
    batch: int = BATCH,
    side: int = SIDE,
    rounds: int = ROUNDS,
    compiled: bool = True,
) -> dict[str, Any]:
    """Images a second and memory of every way.

    Args:
      folder: is not used: weights are random.
      architecture: a name of variants.
      batch: pictures a step.
      side: of the pictures.
      rounds: how often each is timed.
      compiled: whether torch.compile is among them.
    """
    ways: dict[str, Callable[..., Step]] = {
        "bit_tf": ours,
        "bit_tf, recomputing": functools.partial(ours, recompute=True),
    }
    if peers.installed("torch", "transformers"):
        ways["transformers (torch)"] = torch
        if compiled:
            ways["transformers (torch.compile)"] = functools.partial(
                torch, compiled=True
            )
    calls = {
        name: make(architecture, batch, side) for name, make in ways.items()
    }
    times = timing.in_turns(calls, rounds, again=0)
    rows = []
    for name, make in ways.items():
        seconds = statistics.median(times[name])
        before, after = processes.fresh(_peak, make, architecture, batch, side)
        rows.append(
            {
                "": name,
                "ms": 1000 * seconds,
                "images/s": batch / seconds,
                "bit_tf is … × as fast": timing.ratio(
                    times["bit_tf"], times[name]
                ),
                "MB a picture": (after - before) / batch / 1e6,
            }
        )
    return {
        "machine": timing.machine(),
        "tables": {f"batch {batch}, {side} × {side}": rows},
        "not_installed": peers.missing(),
    }


def ours(
    architecture: str, batch: int, side: int, recompute: bool = False
) -> Step:
    """The step of bit-tf finetune."""
    import tensorflow as tf

    import bit_tf
    from bit_tf import distribution, hyperrule, models, training_step

    model = bit_tf.create_model(architecture, num_classes=CLASSES)
    on = distribution.default()
    trainer = training_step.Trainer(
        model,
        model.trainable_variables,
        on,
        distribution.place(on),
        hyperrule.derive(20_000, side, side, batch_size=batch),
        micro_batches=1,
    )
    pictures, labels = _data(batch, side)
    pictures = tf.constant(pictures)
    targets = tf.one_hot(labels, CLASSES)
    if recompute:
        # The first step compiles.
        with models.recompute(model):
            trainer.step(pictures, targets, _RATE)
    return lambda: trainer.step(pictures, targets, _RATE)[0]


def torch(
    architecture: str, batch: int, side: int, compiled: bool = False
) -> Step:
    """transformers' BiT, channels last."""
    import torch
    import transformers

    from bit_tf import variants

    torch.set_num_threads(os.cpu_count() or 1)
    row = variants.architecture(architecture)
    config = transformers.BitConfig(
        depths=list(row.blocks),
        num_labels=CLASSES,
        embedding_size=row.stem_width,
        hidden_sizes=[4 * row.stem_width * 2**block for block in range(4)],
    )
    model = transformers.BitForImageClassification(config).train()
    model = model.to(memory_format=torch.channels_last)
    run = torch.compile(model) if compiled else model
    optimizer = torch.optim.SGD(model.parameters(), _RATE, momentum=_MOMENTUM)
    pictures, labels = _data(batch, side)
    x = torch.from_numpy(pictures).permute(0, 3, 1, 2)
    targets = torch.from_numpy(labels)

    def step() -> float:
        optimizer.zero_grad(set_to_none=True)
        logits = run(pixel_values=2 * x - 1).logits
        loss = torch.nn.functional.cross_entropy(logits, targets)
        loss.backward()
        optimizer.step()
        return loss.item()

    return step


def _data(batch: int, side: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    pictures = rng.random((batch, side, side, 3), np.float32)
    return pictures, rng.integers(0, CLASSES, batch)


def _peak(
    make: Callable[..., Step], architecture: str, batch: int, side: int
) -> tuple[int, int]:
    """Peak bytes of this process with its libraries, and after two steps."""
    small = make("testing", 1, 32)
    small()
    before = memory.peak_bytes(os.getpid())
    step = make(architecture, batch, side)
    step()
    step()
    return before, memory.peak_bytes(os.getpid())
