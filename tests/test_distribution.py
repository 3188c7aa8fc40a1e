"""Several devices and machines give what one gives, or a clear error."""

import json
import time

import finetune_process
import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

from bit_tf import distribution, errors

ONE = tf.distribute.get_strategy


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Three classes that differ in colour: 8 and 2 pictures of each."""
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for split, count in (("train", 8), ("test", 2)):
        for label in range(3):
            place = folder / split / f"class{label}"
            place.mkdir(parents=True)
            for index in range(count):
                pixels = rng.integers(0, 200, (20, 24, 3), dtype=np.uint8)
                pixels[..., label] += 55
                Image.fromarray(pixels).save(place / f"{index}.png")
    return folder


def alone(pictures, output, **options):
    """The loss of each step of an unbroken run in one process."""
    with finetune_process.Run(pictures, output, **options) as run:
        code, out, err = run.result()
    assert code == 0, err
    assert out.startswith("_DefaultDistributionStrategy")
    return finetune_process.losses(output)


@pytest.mark.slow
def test_two_devices_of_one_machine(pictures, tmp_path):
    expected = alone(pictures, tmp_path / "one", steps=12)
    with finetune_process.Run(
        pictures, tmp_path / "two", steps=12, cpus=2, micro_batches=2
    ) as run:
        code, out, err = run.result()
    assert code == 0, err
    assert out.startswith("MirroredStrategy")
    found = finetune_process.losses(tmp_path / "two")
    assert len(found) == 12
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert found[-1] < found[0] - 0.01


@pytest.mark.slow
def test_two_workers(pictures, tmp_path):
    """They give the loss of one; a killed one ends both; both go on."""
    steps = 25
    expected = alone(pictures, tmp_path / "one", steps=steps)
    output = tmp_path / "two"

    def start(index, **options):
        return finetune_process.Run(
            pictures, output, configs[index], steps=steps, **options
        )

    configs = finetune_process.cluster(2)
    with start(0, slow=0.2) as chief, start(1) as other:
        deadline = time.monotonic() + 90
        while not (output / "state" / "state.npz").exists():
            assert time.monotonic() < deadline
            assert chief.process.poll() is None, chief.result()[2]
            time.sleep(0.05)
        other.process.kill()
        killed = time.monotonic()
        code, _, err = chief.result(timeout=60)
    assert time.monotonic() - killed < 60
    assert code == 1
    assert "TrainingError: All 2 workers train together" in err
    assert "start all workers again" in err
    broken = len(finetune_process.losses(output))
    assert 1 <= broken < steps

    configs = finetune_process.cluster(2)
    with start(0) as chief, start(1) as other:
        results = [chief.result(), other.result()]
    assert [code for code, _, _ in results] == [0, 0], results
    assert {out.split()[0] for _, out, _ in results} == {
        "CollectiveAllReduceStrategy"
    }
    assert len({out for _, out, _ in results}) == 1
    found = finetune_process.losses(output)
    assert len(found) == steps
    np.testing.assert_allclose(found, expected, atol=1e-4)


@pytest.mark.slow
def test_workers_that_differ(pictures, tmp_path):
    configs = finetune_process.cluster(2)
    with (
        finetune_process.Run(
            pictures, tmp_path / "out", configs[0], steps=3
        ) as chief,
        finetune_process.Run(
            pictures, tmp_path / "out", configs[1], steps=4
        ) as other,
    ):
        results = [chief.result(), other.result()]
    for code, _, err in results:
        assert code == 1
        assert "TrainingError: All workers begin at one step" in err
        assert "with 2 different settings" in err
    assert not (tmp_path / "out" / "state" / "state.npz").exists()


def test_one_device():
    on = distribution.strategy()
    where = distribution.place(on)
    assert on is ONE()
    assert (where.index, where.workers, where.replicas, where.local) == (
        0,
        1,
        1,
        1,
    )
    assert where.is_chief
    distribution.wait(on, where)
    distribution.require_agreement(on, where, {}, 0)


def test_named_device():
    on = distribution.strategy(["cpu:0"])
    assert isinstance(on, tf.distribute.OneDeviceStrategy)
    assert distribution.place(on).replicas == 1


@pytest.mark.parametrize("devices", [["gpu:7", "gpu:8"], ["nonsense"]])
def test_unknown_devices(devices):
    with pytest.raises(errors.TrainingError, match="Devices are some of"):
        distribution.strategy(devices)


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"cluster": 3}', '{"cluster": {"worker": 3}}']
)
def test_malformed_configuration(text, monkeypatch):
    monkeypatch.setenv("TF_CONFIG", text)
    with pytest.raises(errors.TrainingError, match="TF_CONFIG is JSON such as"):
        distribution.strategy()


def test_configuration_of_one_worker(monkeypatch):
    text = json.dumps({"cluster": {"worker": ["127.0.0.1:1"]}})
    monkeypatch.setenv("TF_CONFIG", text)
    assert distribution.strategy() is ONE()


def test_workers_after_tensorflow_began(monkeypatch):
    tf.zeros([])
    (config, _) = finetune_process.cluster(2)
    monkeypatch.setenv("TF_CONFIG", json.dumps(config))
    with pytest.raises(errors.TrainingError, match="Workers begin together"):
        distribution.strategy()


def test_no_tpu():
    with pytest.raises(errors.TrainingError, match="A TPU is given by"):
        distribution.strategy(tpu="local")


class Several(distribution.Place):
    def __init__(self):
        super().__init__(ONE())
        self.workers = 2


def test_lost_worker():
    error = tf.errors.UnavailableError(
        None, None, "Graph\n Collective ops is aborted by: gone\n[[node]]"
    )
    with (
        pytest.raises(errors.TrainingError, match="aborted by: gone"),
        distribution.guarded(Several()),
    ):
        raise error
    with (
        pytest.raises(tf.errors.UnavailableError),
        distribution.guarded(distribution.place(ONE())),
    ):
        raise error
