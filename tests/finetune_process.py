"""Fine-tunes a tiny network in a process of its own, which may be killed.

python tests/finetune_process.py '{"data": DIR, "output": DIR, "steps": 9}'
"""

import json
import os
import pathlib
import socket
import subprocess
import sys

__all__ = ["Run", "cluster", "losses", "tiny"]

REPOSITORY = pathlib.Path(__file__).parent.parent


def tiny(classes=3, seed=0, penalty=None, **options):
    """float32 [n, h, w, 3] → logits, from the same weights every time."""
    import keras

    from bit_tf import models

    return keras.Sequential(
        [
            keras.Input((None, None, 3)),
            keras.layers.Conv2D(
                8,
                3,
                strides=2,
                activation="relu",
                kernel_initializer=keras.initializers.HeNormal(seed=seed),
                kernel_regularizer=penalty,
                name="convolution",
                **options,
            ),
            keras.layers.GlobalAveragePooling2D(),
            models.Head(classes, name="head", **options),
        ],
        name="tiny",
    )


class Run:
    """A process that fine-tunes.

    Args:
      data: folder of pictures.
      output: directory.
      config: of TF_CONFIG, or None.
      **options: of `main`.
    """

    def __init__(self, data, output, config=None, **options):
        environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
        environment.pop("TF_CONFIG", None)
        if config is not None:
            environment["TF_CONFIG"] = json.dumps(config)
        self.output = pathlib.Path(output)
        options |= {"data": str(data), "output": str(output)}
        self.process = subprocess.Popen(
            [sys.executable, __file__, json.dumps(options)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.process.kill()
        self.process.communicate()

    def result(self, timeout=120):
        """(exit code, stdout, stderr), when it has ended."""
        out, err = self.process.communicate(timeout=timeout)
        return self.process.returncode, out.strip(), err


def cluster(workers):
    """TF_CONFIG of each worker on this machine."""
    sockets = [socket.socket() for _ in range(workers)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    addresses = [f"127.0.0.1:{one.getsockname()[1]}" for one in sockets]
    for one in sockets:
        one.close()
    return [
        {
            "cluster": {"worker": addresses},
            "task": {"type": "worker", "index": index},
        }
        for index in range(workers)
    ]


def losses(output):
    """Of all steps in history.jsonl."""
    lines = (pathlib.Path(output) / "history.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


def main(
    data,
    output,
    steps,
    cpus=1,
    batch=8,
    deterministic=False,
    checkpoint_every=1,
    micro_batches=1,
    slow=0.0,
):
    os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
    import dataclasses
    import time

    import tensorflow as tf

    if cpus > 1:
        devices = tf.config.list_physical_devices("CPU")
        tf.config.set_logical_device_configuration(
            devices[0], [tf.config.LogicalDeviceConfiguration()] * cpus
        )
    from bit_tf import data as datasets
    from bit_tf import (
        distribution,
        errors,
        finetune,
        hyperrule,
        training_state,
        training_step,
    )

    if slow:
        whole = training_step.Trainer.step

        def step(self, *arguments):
            time.sleep(slow)
            return whole(self, *arguments)

        training_step.Trainer.step = step
    try:
        strategy = distribution.strategy()
        rule = dataclasses.replace(
            hyperrule.derive(24, 24, 24, batch_size=batch),
            resolution=hyperrule.Resolution(18, 16),
            mixup_alpha=0.1,
            peak_learning_rate=0.1,
        )
        splits = datasets.open_dataset(f"folder:{data}").splits
        with strategy.scope():
            model = tiny()
        finetune.finetune(
            model,
            splits["train"],
            rule=rule,
            validation=splits["test"],
            output=output,
            seed=3,
            micro_batches=micro_batches,
            strategy=strategy,
            steps=steps,
            checkpoint_every=checkpoint_every,
            deterministic=deterministic,
        )
    except errors.BitTfError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        sys.exit(1)
    print(type(strategy).__name__, training_state.fingerprint(model.variables))


if __name__ == "__main__":
    main(**json.loads(sys.argv[1]))
