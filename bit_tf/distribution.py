"""On which devices and machines a model is trained."""

import contextlib
import json
import os
import re
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from bit_tf import errors

__all__ = [
    "Place",
    "default",
    "guarded",
    "place",
    "require_agreement",
    "strategy",
    "wait",
    "workers",
]

_LOST = (
    tf.errors.UnavailableError,
    tf.errors.AbortedError,
    tf.errors.CancelledError,
    tf.errors.DeadlineExceededError,
    tf.errors.InternalError,
)


class Place:
    """A process among those that train one model.

    Attributes:
      index: of this worker, from 0; worker 0 is the chief, which writes.
      workers: processes that train, each with its own devices.
      replicas: of the model, over all workers.
      local: replicas of this worker.
    """

    def __init__(self, on: tf.distribute.Strategy):
        self.replicas = on.num_replicas_in_sync
        self.index, self.workers = 0, 1
        resolver = on.cluster_resolver
        if isinstance(on, tf.distribute.MultiWorkerMirroredStrategy):
            spec = resolver.cluster_spec().as_dict() if resolver else {}
            chiefs = len(spec.get("chief", ()))
            self.workers = max(1, chiefs + len(spec.get("worker", ())))
            if self.workers > 1:
                self.index = resolver.task_id + (
                    chiefs if resolver.task_type == "worker" else 0
                )
        self.local = self.replicas // self.workers

    @property
    def is_chief(self) -> bool:
        """Whether this worker writes files."""
        return self.index == 0


def default() -> tf.distribute.Strategy:
    """TensorFlow's strategy of one device, or that whose scope this is in."""
    return tf.distribute.get_strategy()


def place(on: tf.distribute.Strategy) -> Place:
    """Where this process stands in a strategy."""
    return Place(on)


def strategy(
    devices: Sequence[str] | None = None, *, tpu: str | None = None
) -> tf.distribute.Strategy:
    """The strategy for what there is.

    With $TF_CONFIG of several workers a MultiWorkerMirroredStrategy, which
    must be made before TensorFlow does anything else, and which waits until
    all workers are there; on several GPUs, or logical CPUs where there is no
    GPU, a MirroredStrategy; on one device TensorFlow's default. Models are
    made under its `scope()`.

    Args:
      devices: such as ["gpu:0", "gpu:1"], instead of all.
      tpu: the name or address of a Cloud TPU, "" or "local" for that of this
        machine: a TPUStrategy. No test of this package runs it, for want of a
        TPU.

    Raises:
      TrainingError: $TF_CONFIG is malformed, or there is no such device.
    """
    if tpu is not None:
        return _tpu(tpu)
    if workers() > 1:
        if devices is not None:
            raise errors.TrainingError(
                "Each worker of $TF_CONFIG uses all its devices. Received: "
                f"devices={list(devices)}. Choose them by "
                "CUDA_VISIBLE_DEVICES."
            )
        try:
            return tf.distribute.MultiWorkerMirroredStrategy()
        except (RuntimeError, ValueError, tf.errors.OpError) as error:
            raise errors.TrainingError(
                "Workers begin together, each with its own $TF_CONFIG, before "
                f"TensorFlow does anything else. Received: {error}"
            ) from error
    if devices is None:
        found = tf.config.list_logical_devices(
            "GPU"
        ) or tf.config.list_logical_devices("CPU")
        names = [device.name for device in found]
        if len(names) < 2:
            return tf.distribute.get_strategy()
    else:
        names = _known(devices)
    if len(names) == 1:
        return tf.distribute.OneDeviceStrategy(names[0])
    return tf.distribute.MirroredStrategy(names)


@contextlib.contextmanager
def guarded(where: Place) -> Iterator[None]:
    """Tells that a worker was lost, in what TensorFlow raises then.

    Raises:
      TrainingError: another worker has gone.
    """
    try:
        yield
    except _LOST as error:
        if where.workers == 1:
            raise
        lines = [line.strip() for line in str(error).splitlines()]
        told = [line for line in lines if "aborted by" in line] or lines[:1]
        raise errors.TrainingError(
            f"All {where.workers} workers train together until the end. "
            f"Received: one does not answer ({told[0][:200]}). The last state "
            "is kept; start all workers again, and they go on from it."
        ) from error


def _known(devices: Sequence[str]) -> list[str]:
    """Names of devices as TensorFlow spells them.

    Raises:
      TrainingError: one of them is not there, or is there twice, or none is.
    """
    known = [device.name for device in tf.config.list_logical_devices()]
    names = [
        re.sub("^/?(device:)?", "/device:", str(name), flags=re.IGNORECASE)
        for name in devices
    ]
    found = [
        spelling
        for name in names
        for spelling in known
        if spelling.lower() == name.lower()
    ]
    if len(set(found)) < len(names) or not names:
        raise errors.TrainingError(
            f"Devices are some of {', '.join(known)}, each once. Received: "
            f"{list(devices)}."
        )
    return found


def workers() -> int:
    """Of how many workers $TF_CONFIG tells; 1, if there is none.

    Raises:
      TrainingError: it is malformed.
    """
    text = os.environ.get("TF_CONFIG", "").strip()
    if not text:
        return 1
    try:
        cluster: Any = json.loads(text).get("cluster", {})
        return sum(len(cluster.get(name, ())) for name in ("chief", "worker"))
    except (AttributeError, TypeError, ValueError) as error:
        raise errors.TrainingError(
            'TF_CONFIG is JSON such as {"cluster": {"worker": ["host:port", '
            '…]}, "task": {"type": "worker", "index": 0}}. Received: '
            f"{errors.brief(text)} ({error}). Correct or unset it."
        ) from error


def _tpu(name: str) -> tf.distribute.Strategy:
    try:
        resolver = tf.distribute.cluster_resolver.TPUClusterResolver.connect(
            name
        )
        return tf.distribute.TPUStrategy(resolver)
    except (RuntimeError, ValueError, OSError, tf.errors.OpError) as error:
        raise errors.TrainingError(
            "A TPU is given by its name, its address, or 'local'. Received: "
            f"{name!r}, which cannot be used: {error}"
        ) from error


def require_agreement(
    on: tf.distribute.Strategy,
    where: Place,
    settings: Mapping[str, Any],
    step: int,
) -> None:
    """Compares what the workers are about to do.

    Raises:
      TrainingError: not all of them begin at the same step with the same
        settings.
    """
    if where.workers == 1:
        return
    text = json.dumps(dict(settings), sort_keys=True)
    # Both are whole numbers that float32 holds.
    mine = [float(step), float(zlib.crc32(text.encode()) & 0xFFFFFF)]
    found = np.unique(_gathered(on, mine), axis=0)
    if len(found) > 1:
        raise errors.TrainingError(
            "All workers begin at one step with the same model, data and "
            "settings, and see one output directory on a shared disk. "
            f"Received: step {step} here, and steps "
            f"{sorted({int(row[0]) for row in found})} over all, with "
            f"{len({row[1] for row in found})} different settings. Give every "
            "worker the same command line."
        )


def wait(on: tf.distribute.Strategy, where: Place) -> None:
    """Returns when all workers have called it.

    Raises:
      TrainingError: another worker has gone.
    """
    if where.workers > 1:
        with guarded(where):
            _gathered(on, [0.0])


def _gathered(
    on: tf.distribute.Strategy, values: Sequence[float]
) -> np.ndarray:
    """float32 [replicas, n]: every replica's numbers."""

    @tf.function(autograph=False)
    def gathered():
        def replica():
            context = tf.distribute.get_replica_context()
            return context.all_gather(tf.constant([values]), axis=0)

        return on.experimental_local_results(on.run(replica))[0]

    return gathered().numpy()
