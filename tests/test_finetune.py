"""The loop of fine-tuning: resume, interrupts, and what goes wrong."""

import dataclasses
import json
import random
import signal
import threading
import time

import filelock
import finetune_process
import keras
import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

import bit_tf
from bit_tf import (
    data,
    errors,
    finetune,
    hyperrule,
    training_state,
    training_step,
)

RULE = dataclasses.replace(
    hyperrule.derive(24, 24, 24, batch_size=8),
    resolution=hyperrule.Resolution(18, 16),
    peak_learning_rate=0.1,
)
STATE = "state/state.npz"


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


@pytest.fixture(scope="module")
def splits(pictures):
    return data.open_dataset(f"folder:{pictures}").splits


def run(splits, steps=6, model=None, rule=RULE, **options):
    """(model, history) of a tiny network, from the same weights."""
    model = finetune_process.tiny() if model is None else model
    history = finetune.finetune(
        model,
        splits["train"],
        rule=rule,
        steps=steps,
        progress=False,
        **options,
    )
    return model, history


def values(model):
    return [variable.numpy() for variable in model.variables]


def same(one, other):
    return all(map(np.array_equal, values(one), values(other)))


def shown(logs):
    """{step: values} as TensorBoard keeps them."""
    kept = {}
    start = tf.compat.v1.SessionLog.START
    for path in sorted(logs.iterdir()):
        for record in tf.data.TFRecordDataset(str(path)):
            event = tf.compat.v1.Event.FromString(record.numpy())
            if event.session_log.status == start:
                kept = {s: v for s, v in kept.items() if s < event.step}
            if event.summary.value:
                assert event.step not in kept
                kept[event.step] = {
                    value.tag: value.simple_value
                    for value in event.summary.value
                }
    return kept


def interrupted(monkeypatch, after, action):
    """Has something happen inside of a step, counted from 1."""
    whole = training_step.Trainer.step
    count = 0

    def step(self, *arguments):
        nonlocal count
        count += 1
        if count == after:
            action()
        return whole(self, *arguments)

    monkeypatch.setattr(training_step.Trainer, "step", step)


@pytest.mark.parametrize(
    ("steps", "supports"),
    [
        (500, (100, 200, 300, 400, 500)),
        (10, (2, 4, 6, 8, 10)),
        (6, (1, 2, 4, 5, 6)),
        (5, (1, 2, 3, 4, 5)),
        (2, (0, 1, 1, 2, 2)),
        (1, (0, 0, 1, 1, 1)),
    ],
)
def test_schedule_of_other_steps(steps, supports):
    rule = hyperrule.derive(24, 24, 24)
    found = finetune.with_steps(rule, steps)
    assert found.supports == supports
    assert found.steps == steps
    for step in range(steps):
        assert 0 <= found.learning_rate(step) <= found.peak_learning_rate
    assert dataclasses.replace(found, supports=rule.supports) == rule


@pytest.mark.parametrize(
    ("steps", "supports"),
    [
        (10, (1, 3, 6, 9, 10)),
        (7, (1, 2, 4, 6, 7)),
        (5, (1, 2, 3, 4, 5)),
        (4, (0, 1, 2, 4, 4)),
    ],
)
def test_phases_stay_apart(steps, supports):
    """A warm-up of a twentieth does not vanish while there are steps for it."""
    rule = hyperrule.derive(100_000, 24, 24)
    assert finetune.with_steps(rule, steps).supports == supports
    for count in (5, 11, 999, rule.steps):
        found = finetune.with_steps(rule, count).supports
        assert len({0, *found}) == 6
        assert list(found) == sorted(found)
    assert finetune.with_steps(rule, rule.steps) == rule
    no_warm_up = dataclasses.replace(rule, supports=(0, 3, 6, 9, 10))
    assert finetune.with_steps(no_warm_up, 5).supports[0] == 0


@pytest.mark.parametrize("steps", [0, -3, 1.5])
def test_no_steps(steps):
    with pytest.raises(ValueError, match="steps must be 1 or more"):
        finetune.with_steps(RULE, steps)


def test_what_a_run_leaves(splits, tmp_path):
    model, history = run(
        splits,
        steps=10,
        output=tmp_path,
        validation=splits["test"],
        evaluate_every=4,
    )
    rows = history.rows
    assert [row["step"] for row in rows] == list(range(1, 11))
    rule = finetune.with_steps(RULE, 10)
    assert [row["learning_rate"] for row in rows] == [
        rule.learning_rate(step) for step in range(10)
    ]
    assert rows[0]["loss"] == pytest.approx(np.log(3), abs=1e-6)
    assert rows[-1]["loss"] < 0.99 * rows[0]["loss"]
    scored = {r["step"]: r["validation_top1"] for r in rows if len(r) > 4}
    assert list(scored) == [4, 8, 10]
    assert all(value * 6 == round(value * 6) for value in scored.values())
    lines = (tmp_path / "history.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == rows
    found = shown(tmp_path / "logs")
    assert list(found) == list(range(1, 11))
    assert set(found[4]) == {"loss", "learning_rate", "validation_top1"}
    assert found[3]["loss"] == pytest.approx(rows[2]["loss"])
    again, later = run(splits, steps=10, output=tmp_path)
    assert later.resumed_from == 10
    assert later.rows == rows
    assert same(model, again)


@pytest.fixture(scope="module")
def whole_batches(splits):
    return run(splits, steps=4)


@pytest.mark.parametrize("parts", [3, 50])
def test_micro_batches(parts, splits, whole_batches):
    """Also those that do not divide the batch."""
    whole, expected = whole_batches
    model, history = run(splits, steps=4, micro_batches=parts)
    for one, other in zip(values(whole), values(model), strict=True):
        np.testing.assert_allclose(one, other, atol=2e-6)
    assert [row["loss"] for row in history.rows] == pytest.approx(
        [row["loss"] for row in expected.rows], abs=1e-6
    )
    assert not same(model, finetune_process.tiny())


def test_recomputing(splits, whole_batches):
    """Needs units of ours; a model without them says so."""
    model = bit_tf.create_model("testing", num_classes=3)
    other = bit_tf.create_model("testing", num_classes=3)
    other.set_weights(model.get_weights())
    _, expected = run(splits, steps=2, model=model)
    _, history = run(splits, steps=2, model=other, recompute=True)
    assert [row["loss"] for row in history.rows] == pytest.approx(
        [row["loss"] for row in expected.rows], abs=1e-5
    )
    for one, again in zip(values(model), values(other), strict=True):
        np.testing.assert_allclose(one, again, atol=1e-5)
    with pytest.raises(errors.TrainingError, match="micro_batches"):
        run(splits, steps=2, recompute=True)


def test_first_steps_by_hand(splits):
    """SGD with momentum, as Keras' tape gives it for the same batches."""
    from bit_tf import input_pipeline

    rule = dataclasses.replace(RULE, supports=(1, 2, 3, 4, 5))
    found, _ = run(
        splits,
        steps=None,
        rule=rule,
        model=finetune_process.tiny(penalty=keras.regularizers.L2(0.1)),
        seed=5,
        flip=False,
        crop=False,
    )
    model = finetune_process.tiny()
    velocity = [0.0 for _ in model.trainable_variables]
    batches = input_pipeline.training_batches(
        splits["train"],
        resize=18,
        crop=16,
        batch_size=8,
        seed=5,
        flip=False,
        random_crop=False,
        steps=5,
    )
    for step, (x, y) in enumerate(batches):
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(
                tf.keras.losses.categorical_crossentropy(
                    y, model(x), from_logits=True
                )
            )
            loss += 0.1 * tf.reduce_sum(model.variables[0].value ** 2)
        rate = hyperrule.learning_rate(step, (1, 2, 3, 4, 5), 0.1)
        gradients = tape.gradient(
            loss, [v.value for v in model.trainable_variables]
        )
        for index, variable in enumerate(model.trainable_variables):
            velocity[index] = 0.9 * velocity[index] - rate * gradients[index]
            variable.assign_add(velocity[index])
    for one, other in zip(values(found), values(model), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-6)


def test_frozen(splits):
    start = finetune_process.tiny(penalty=keras.regularizers.L2(0.1))
    model, _ = run(
        splits,
        model=finetune_process.tiny(penalty=keras.regularizers.L2(0.1)),
        freeze="convolution",
    )
    before, after = values(start), values(model)
    assert [
        np.array_equal(*pair) for pair in zip(before, after, strict=True)
    ] == [
        True,
        True,
        False,
        False,
    ]
    assert len(model.trainable_variables) == 4


def test_unbroken_and_resumed(splits, tmp_path, monkeypatch):
    """The same bits, wherever it was broken off, mixup and all."""
    rule = dataclasses.replace(RULE, mixup_alpha=0.3)
    options = {"rule": rule, "deterministic": True, "seed": 7}
    whole, expected = run(splits, **options)

    class Killed(BaseException):
        pass

    def kill():
        raise Killed

    for after in (3, 3):
        with monkeypatch.context() as patch:
            interrupted(patch, after, kill)
            with pytest.raises(Killed):
                run(splits, output=tmp_path, checkpoint_every=2, **options)
        # What a killed process logged after its last state.
        with (tmp_path / "history.jsonl").open("a") as file:
            file.write('{"step": 99')
        (tmp_path / "state" / ".state.npz.0123.tmp").write_bytes(b"half")
    model, history = run(splits, output=tmp_path, **options)
    assert history.resumed_from == 4
    assert [row["loss"] for row in history.rows] == [
        row["loss"] for row in expected.rows
    ]
    assert same(model, whole)
    assert len((tmp_path / "history.jsonl").read_text().splitlines()) == 6
    logged = shown(tmp_path / "logs")
    assert list(logged) == [1, 2, 3, 4, 5, 6]
    assert [row["loss"] for row in logged.values()] == pytest.approx(
        [row["loss"] for row in expected.rows]
    )
    assert sorted(path.name for path in (tmp_path / "state").iterdir()) == [
        "lock",
        "state.npz",
    ]
    other, _ = run(splits, **options | {"seed": 8})
    assert not same(other, whole)


def test_determinism_is_given_back(splits):
    from tensorflow.python.framework import config

    assert not config.is_op_determinism_enabled()
    run(splits, steps=1, deterministic=True)
    assert not config.is_op_determinism_enabled()


@pytest.mark.parametrize(
    ("number", "raised"),
    [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit)],
    ids=["ctrl-c", "sigterm"],
)
def test_interrupts(number, raised, splits, tmp_path, monkeypatch):
    def leave(*_):
        raise SystemExit(143)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        with monkeypatch.context() as patch:
            interrupted(patch, 3, lambda: signal.raise_signal(number))
            with pytest.raises(raised):
                run(splits, output=tmp_path, checkpoint_every=100)
        assert signal.getsignal(signal.SIGTERM) is leave
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGTERM, before)
    assert training_state.read(tmp_path / STATE).step == 3
    _, history = run(splits, output=tmp_path)
    assert history.resumed_from == 3


def test_second_interrupt_is_at_once(splits, tmp_path, monkeypatch):
    def twice():
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    interrupted(monkeypatch, 3, twice)
    with pytest.raises(KeyboardInterrupt):
        run(splits, output=tmp_path, checkpoint_every=100)
    assert not (tmp_path / STATE).exists()


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"seed": 1}, "seed: 0 → 1"),
        ({"steps": 7}, "rule.supports"),
        ({"flip": False}, "flip: True → False"),
        ({"freeze": "head"}, "freeze: None → 'head'"),
        ({"deterministic": True}, "deterministic: False → True"),
        ({"rule": dataclasses.replace(RULE, batch_size=4)}, "rule.batch_size"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "told",
)
def test_other_settings(change, told, splits, finished):
    with pytest.raises(errors.TrainingError, match="--restart") as caught:
        run(splits, output=finished, **change)
    assert told in str(caught.value)
    assert len(str(caught.value).splitlines()) == 3


@pytest.fixture(scope="module")
def finished(splits, tmp_path_factory):
    output = tmp_path_factory.mktemp("finished")
    run(splits, output=output)
    return output


def test_other_model_and_data(splits, finished):
    with pytest.raises(errors.TrainingError, match="model: '"):
        run(splits, output=finished, model=finetune_process.tiny(seed=1))
    fewer = {"train": splits["train"].few_shot(4, 0)}
    with pytest.raises(errors.TrainingError, match="data: '"):
        run(fewer, output=finished)
    # These change no result.
    run(splits, output=finished, micro_batches=2, checkpoint_every=1)


def test_restart(splits, tmp_path):
    run(splits, steps=2, output=tmp_path)
    _, history = run(splits, steps=3, output=tmp_path, restart=True)
    assert (history.resumed_from, len(history.rows)) == (0, 3)
    assert len(list((tmp_path / "logs").iterdir())) == 1


def test_restart_spares_what_others_wrote(splits, tmp_path):
    run(splits, steps=2, output=tmp_path)
    logs = tmp_path / "logs"
    others = {
        "events.out.tfevents.1700000000.host.12.0.v2",
        "thesis.txt",
        "events.out.tfevents.00001700000000000000.folder.1",
    }
    for name in others:
        path = logs / name
        if "folder" in name:
            path.mkdir()
        else:
            path.write_text("mine")
    (logs / "train").mkdir()
    (logs / "train" / "events.out.tfevents.1").write_text("mine")
    before = {path.name for path in logs.iterdir()}
    run(splits, steps=3, output=tmp_path, restart=True)
    after = {path.name for path in logs.iterdir()}
    (old,) = before - after
    (new,) = after - before
    assert old not in others
    assert before & after == others | {"train"}
    assert (logs / "train" / "events.out.tfevents.1").read_text() == "mine"
    assert old < new


def test_damaged_state(splits, finished, tmp_path):
    raw = (finished / STATE).read_bytes()
    path = tmp_path / STATE
    path.parent.mkdir()
    middle = len(raw) // 2
    for found in (
        b"",
        b"PK",
        raw[:middle],
        raw[:-1],
        raw[:middle] + bytes([raw[middle] ^ 1]) + raw[middle + 1 :],
    ):
        path.write_bytes(found)
        with pytest.raises(errors.TrainingError, match="--restart"):
            run(splits, output=tmp_path)


def test_loss_that_is_no_number(splits, tmp_path):
    rule = dataclasses.replace(RULE, peak_learning_rate=1e25)
    with pytest.raises(errors.TrainingError) as caught:
        run(splits, rule=rule, steps=40, output=tmp_path, checkpoint_every=1)
    for part in ("finite number", "--base-learning-rate", "[0, 1]", "state of"):
        assert part in str(caught.value)
    kept = training_state.read(tmp_path / STATE)
    assert all(np.isfinite(row["loss"]) for row in kept.rows)
    with np.load(tmp_path / STATE) as arrays:
        for name in arrays.files:
            if name.startswith("model"):
                assert np.isfinite(arrays[name]).all()


class Huge(keras.layers.Layer):
    """Has memory for two pictures at once."""

    def call(self, inputs):
        def want(count):
            if count > 2:
                raise MemoryError("OOM when allocating")
            return np.float32(0)

        count = tf.shape(inputs)[0]
        nothing = tf.numpy_function(want, [count], tf.float32)
        return inputs + tf.reshape(nothing, [])


def test_not_enough_memory(splits, tmp_path):
    def model():
        inner = finetune_process.tiny()
        return keras.Sequential([keras.Input((None, None, 3)), Huge(), inner])

    with pytest.raises(errors.TrainingError) as caught:
        run(splits, steps=2, model=model(), output=tmp_path)
    for part in ("8 of 16 × 16", "--micro-batches 2", "mixed_bfloat16"):
        assert part in str(caught.value)
    _, history = run(
        splits, steps=2, model=model(), output=tmp_path, micro_batches=4
    )
    assert len(history.rows) == 2


def test_full_disk(splits, tmp_path, monkeypatch):
    run(splits, steps=6, output=tmp_path)
    whole = training_state.write

    def fail(path, step, *rest):
        if step > 2:
            raise OSError(28, "No space left on device")
        whole(path, step, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(training_state, "write", fail)
        with pytest.raises(errors.TrainingError, match="Make room") as caught:
            run(splits, output=tmp_path, restart=True, checkpoint_every=2)
    assert "state of step 2 is kept" in str(caught.value)
    _, history = run(splits, output=tmp_path)
    assert history.resumed_from == 2


def test_one_at_a_time(splits, tmp_path):
    (tmp_path / "state").mkdir()
    finished = []
    with filelock.FileLock(tmp_path / "state" / "lock"):
        thread = threading.Thread(
            target=lambda: finished.append(
                run(splits, steps=1, output=tmp_path)
            )
        )
        thread.start()
        time.sleep(1)
        assert not (tmp_path / "history.jsonl").exists()
    thread.join(60)
    assert len(finished) == 1


def test_arguments_that_do_not_fit(splits):
    with pytest.raises(errors.TrainingError, match="3 classes"):
        run(splits, model=finetune_process.tiny(classes=4))
    with pytest.raises(errors.DatasetError, match="without any"):
        run({"train": splits["train"].take([])})
    for parts in (0, -1, 1.5):
        with pytest.raises(ValueError, match="micro_batches"):
            run(splits, micro_batches=parts)
    loud = finetune_process.tiny(activity_regularizer="l2")
    with pytest.raises(errors.TrainingError, match="activity_regularizer"):
        run(splits, model=loud)


def test_mixed_precision(splits):
    model = finetune_process.tiny(dtype="mixed_bfloat16")
    model, history = run(splits, steps=10, model=model)
    assert {variable.dtype for variable in model.variables} == {"float32"}
    assert history.rows[-1]["loss"] < 0.99 * history.rows[0]["loss"]


@pytest.mark.slow
def test_killed_at_random(pictures, tmp_path):
    """kill -9 at any time; going on gives the bits of an unbroken run."""
    options = {"steps": 40, "deterministic": True, "checkpoint_every": 1}
    with finetune_process.Run(pictures, tmp_path / "whole", **options) as one:
        code, expected, err = one.result()
    assert code == 0, err
    rng = random.Random(time.time_ns())
    output = tmp_path / "killed"
    for _ in range(2):
        with finetune_process.Run(
            pictures, output, slow=0.02, **options
        ) as one:
            while not (output / STATE).exists():
                assert one.process.poll() is None, one.result()
                time.sleep(0.01)
            time.sleep(rng.uniform(0, 0.5))
    reached = training_state.read(output / STATE).step
    with finetune_process.Run(pictures, output, **options) as one:
        code, found, err = one.result()
    assert code == 0, err
    assert found == expected, f"broken off at step {reached}"
    assert finetune_process.losses(output) == finetune_process.losses(
        tmp_path / "whole"
    )
