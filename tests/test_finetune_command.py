"""`bit-tf finetune`: a folder of pictures → a classifier of one's own."""

import dataclasses
import json
import os
import pathlib
import re
import shlex
import subprocess
import sys

import numpy as np
import pytest
import tensorflow as tf
import toy_hub
from PIL import Image

from bit_tf import (
    distribution,
    errors,
    handles,
    hub,
    hyperrule,
    transfer,
    transfer_run,
)
from bit_tf.commands import finetune as commands_finetune

SMALL = ["--batch-size", 8, "--steps", 6, "--crop", 16]
RESULTS = {
    "confusion_matrix.png",
    "history.jsonl",
    "learning_curves.png",
    "logs",
    "metrics.json",
    "mistakes.png",
    "model.keras",
    "reliability.png",
    "state",
}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Three classes by colour: 8 for training and 3 for test of each."""
    folder = tmp_path_factory.mktemp("my photos")
    rng = np.random.default_rng(0)
    for split, count in (("train", 8), ("test", 3)):
        for label, name in enumerate(("red oak", "green", "blau ü")):
            place = folder / split / name
            place.mkdir(parents=True)
            for index in range(count):
                pixels = rng.integers(0, 180, (20, 24, 3), dtype=np.uint8)
                pixels[..., label] += 75
                Image.fromarray(pixels).save(place / f"{index}.png")
    return folder


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    return toy_hub.save(tmp_path_factory.mktemp("hub") / "toy")


@pytest.fixture
def finetune(call, toy, pictures):
    """Runs the command on the toy and the pictures."""

    def run(*arguments, model=toy, dataset=f"folder:{pictures}"):
        return call(
            "bit-tf",
            "finetune",
            "--model",
            model,
            "--dataset",
            dataset,
            *SMALL,
            *arguments,
        )

    return run


def values(out):
    """The lines "name: value" of a table."""
    pairs = (line.split(":", 1) for line in out.splitlines())
    return {name.strip(): value.strip() for name, value in pairs}


def test_whole_run(finetune, toy, pictures, tmp_path):
    output = tmp_path / "my run"
    code, out, err = finetune("--output", output, "--validation", 0.25)
    assert code == 0, err
    told = values(out)
    assert told["train"] == "18 examples"
    assert told["validation"] == "6 examples"
    assert told["test"] == "9 examples"
    assert told["cost"] == "6 × 8 = 48 pictures, 2.7 times each"
    assert told["accuracy"].endswith("of 9 test examples")
    found = {path.name for path in output.iterdir()}
    assert found == RESULTS

    report = json.loads((output / "metrics.json").read_text())
    assert report["scored_on"] == "test"
    assert report["examples"] == 9
    assert np.sum(report["confusion"]) == 9
    assert report["class_names"] == ["blau ü", "green", "red oak"]
    assert report["sizes"] == {"train": 18, "validation": 6, "test": 9}
    assert report["rule"]["batch_size"] == 8
    assert report["rule"]["resolution"] == {"resize": 20, "crop": 16}
    assert report["settings"]["validation"] == 0.25
    assert report["model"]["handle"] == toy
    assert report["model"]["content_hash"] == hub.content_hash(toy)
    assert report["versions"]["keras"]
    assert report["seconds"] > 0

    model, facts = transfer.open_classifier(output / "model.keras")
    assert [label.name for label in facts.labels] == report["class_names"]
    assert (facts.preset.size, facts.preset.resize) == (16, "squash")
    assert model(np.zeros([1, 16, 16, 3], np.float32)).shape == (1, 3)

    convert, publish = (
        shlex.split(told[name]) for name in ("convert", "publish")
    )
    assert convert[:2] == ["hub-export", "convert"]
    assert convert[2:] == [
        str(output / "model.keras"),
        str(output / "saved_model"),
    ]
    assert publish[2] == str(output / "model.keras")
    handle = handles.Handle.parse(publish[publish.index("--handle") + 1])
    assert handle.path.endswith("my-photos0_classification")

    # Run again, it goes on from the end.
    (output / "metrics.json").unlink()
    code, _, err = finetune("--output", output, "--validation", 0.25)
    assert code == 0, err
    assert json.loads((output / "metrics.json").read_text()) == report
    code, _, err = finetune("--output", output)
    assert code == 1
    assert "data: '" in err
    assert "--restart" in err


def test_training_split_alone(finetune, pictures, tmp_path):
    """The batch is larger than the data, and there is nothing to score."""
    code, out, err = finetune(
        "--output",
        tmp_path / "out",
        "--examples-per-class",
        2,
        "--no-crop",
        "--no-flip",
        "--mixup",
        0.2,
        "--precision",
        "mixed_bfloat16",
        dataset=f"folder:{pictures / 'train'}",
    )
    assert code == 0, err
    told = values(out)
    assert told["train"] == "6 examples"
    assert told["pictures"] == "squashed to 16, not mirrored"
    assert told["mixup"] == "α 0.2"
    assert "of the head alone" in told["precision"]
    assert told["accuracy"] == "not known: train only, no test split"
    report = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert report["scored_on"] is None
    assert report["note"] == "train only, no test split"
    assert not (tmp_path / "out" / "confusion_matrix.png").exists()


def test_dry_run(finetune, tmp_path, monkeypatch):
    monkeypatch.setattr(
        "bit_tf.cached_download.cached", lambda *_, **__: pytest.fail("fetches")
    )
    monkeypatch.setenv(
        "TF_CONFIG", '{"cluster": {"worker": ["127.0.0.1:1", "127.0.0.1:2"]}}'
    )
    code, out, err = finetune(
        "--output", tmp_path / "out", "--dry-run", model="BiT-M-R50x1"
    )
    assert code == 0, err
    told = values(out)
    assert told["model"] == "BiT-M-R50x1, R50x1, downloaded if need be"
    assert told["batch"] == "8 examples, on 1 device"
    assert told["learning rate"] == (
        "4.688e-05 after 1 step of warm-up, ÷ 10 after 2, 4 "
        "(6 steps: too few for all decays)"
    )
    assert not (tmp_path / "out").exists()
    assert {line[14] for line in out.splitlines()} == {" "}
    assert all(line[15] != " " for line in out.splitlines())


@pytest.mark.parametrize(
    ("supports", "told"),
    [
        (
            (100, 200, 300, 400, 500),
            "0.003 after 100 steps of warm-up, ÷ 10 after 200, 300, 400",
        ),
        (
            (1, 2, 2, 3, 5),
            "0.003 after 1 step of warm-up, ÷ 100 after 2, ÷ 10 after 3",
        ),
        (
            (1, 2, 2, 3, 4),
            "0.003 after 1 step of warm-up, ÷ 100 after 2 "
            "(4 steps: too few for all decays)",
        ),
        ((0, 0, 1, 1, 1), "0.003 (1 step: too few for all decays)"),
    ],
    ids=["whole", "two at once", "last", "one step"],
)
def test_schedule_in_words(supports, told):
    rule = hyperrule.derive(24, 24, 24)
    rule = dataclasses.replace(rule, supports=supports)
    assert commands_finetune._schedule(rule) == told


def test_frozen_in_dry_run(finetune, call, pictures, small_npz, tmp_path):
    rest = ("--output", tmp_path / "out", "--dry-run", "--freeze")
    code, out, err = finetune(*rest, "block[1-3]", model=small_npz)
    assert code == 0, err
    model = transfer.classifier(small_npz, 3)
    names = transfer.trainable_names(model)
    frozen = [name for name in names if re.search("block[1-3]", name)]
    assert 0 < len(frozen) < len(names)
    assert values(out)["frozen"] == (
        f"'block[1-3]', {len(frozen)} of {len(names)} variables"
    )
    code, out, err = finetune(*rest, "blok", model=small_npz)
    assert code == 1
    assert "'blok', which matches none" in err
    assert out == ""
    code, out, err = finetune(*rest, "blok", model="BiT-M-R50x1")
    assert code == 0, err
    assert values(out)["frozen"] == "'blok'"
    assert not (tmp_path / "out").exists()


def test_memory_by_default(call, pictures, tmp_path):
    code, out, _ = call(
        *("bit-tf", "finetune", "--model", "R50x1", "--from-scratch"),
        *("--dataset", f"folder:{pictures}", "--output", tmp_path / "out"),
        *("--dry-run", "--resize", 512, "--crop", 480),
    )
    assert code == 0
    told = values(out)
    assert told["batch"] == "512 examples, on 1 device"
    assert told["at once"] == "32 a device (--micro-batches 16)"
    assert told["steps"] == "500"
    assert told["cost"].startswith("500 × 512 = 256,000 pictures")
    assert "random weights" in told["model"]


@pytest.mark.parametrize(
    ("arguments", "options", "told"),
    [
        ([], {"dataset": "folder:/no/such"}, "/no/such"),
        ([], {"dataset": "cifar11"}, "cifar10"),
        ([], {"model": "BiT-M-R50x11"}, "BiT-M-R50x1"),
        ([], {"model": "no.npz"}, "no.npz"),
        ([], {"model": "R50x1"}, "--from-scratch"),
        (["--examples-per-class", 9], {}, "9 examples a class"),
        (["--resize", 8, "--no-flip"], {}, "--crop 16 of --resize 8"),
        (["--freeze", "nothing"], {}, "matches none"),
        (["--from-scratch"], {}, "Random weights are for"),
    ],
    ids=[
        "folder",
        "dataset",
        "name",
        "file",
        "architecture",
        "examples",
        "crop",
        "no match",
        "scratch",
    ],
)
def test_refused_before_training(
    arguments, options, told, finetune, tmp_path, monkeypatch
):
    monkeypatch.setattr(
        "bit_tf.training_step.Trainer.step", lambda *_: pytest.fail("trains")
    )
    code, _, err = finetune("--output", tmp_path / "out", *arguments, **options)
    assert code == 1
    assert told in err
    assert "Traceback" not in err
    assert not (tmp_path / "out" / "model.keras").exists()


@pytest.mark.parametrize(
    "arguments",
    [
        ["--batch-size", 0],
        ["--validation", 1],
        ["--mixup", -1],
        ["--base-learning-rate", "nan"],
        ["--seed", -1],
        ["--rule-source", "book"],
        ["--freeze", "("],
        ["--freeze", "a{99999999999}"],
    ],
    ids=lambda value: " ".join(map(str, value)),
)
def test_used_wrongly(arguments, finetune, tmp_path):
    code, _, err = finetune("--output", tmp_path / "out", *arguments)
    assert code == 2
    assert arguments[0] in err


def test_output_with_other_content(finetune, tmp_path):
    (tmp_path / "thesis.tex").write_text("mine")
    code, _, err = finetune("--output", tmp_path)
    assert code == 1
    assert "'thesis.tex'" in err
    assert os.listdir(tmp_path) == ["thesis.tex"]
    code, _, err = finetune("--output", tmp_path / "thesis.tex")
    assert code == 1
    assert "which is a file" in err
    code, _, err = finetune("--output", tmp_path / "thesis.tex" / "out")
    assert code == 1
    assert "cannot be written to" in err


@pytest.mark.parametrize(
    "found",
    [
        ["logs/mine.txt"],
        ["confusion_matrix.png"],
        ["state/terraform.tfstate"],
        ["metrics.json", "thesis.tex"],
    ],
    ids=["logs", "chart", "state", "metrics"],
)
def test_directory_of_somebody_else(found, finetune, tmp_path):
    """Names that a run uses do not make it a run's."""
    for name in found:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("mine")
    for more in ([], ["--restart"]):
        code, _, err = finetune("--output", tmp_path, *more)
        assert code == 1
        assert "--output is a new or empty directory" in err
    for name in found:
        assert (tmp_path / name).read_text() == "mine"


def test_result_without_state(finetune, tmp_path, monkeypatch):
    """It is replaced only with --restart, and then gone at once."""
    for name in (
        "model.keras",
        "metrics.json",
        "history.jsonl",
        "mistakes.png",
    ):
        (tmp_path / name).write_text("old")
    (tmp_path / "logs").mkdir()
    code, _, err = finetune("--output", tmp_path)
    assert code == 1
    assert "'model.keras' and no state" in err
    assert "--restart" in err
    assert (tmp_path / "metrics.json").read_text() == "old"
    assert not (tmp_path / "state").exists()

    def fail(*_):
        raise errors.TrainingError("broken off")

    with monkeypatch.context() as patch:
        patch.setattr("bit_tf.training_step.Trainer.step", fail)
        code, _, err = finetune("--output", tmp_path, "--restart")
    assert code == 1
    assert "broken off" in err
    assert {path.name for path in tmp_path.iterdir()} == {
        "history.jsonl",
        "logs",
        "state",
    }
    assert (tmp_path / "history.jsonl").read_text() == ""


def test_stream_of_pictures(toy, tmp_path):
    """A tf.data.Dataset cannot be written to metrics.json; its name can."""
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 255, (6, 20, 20, 3), dtype=np.uint8)
    dataset = tf.data.Dataset.from_tensor_slices((pixels, [0, 1] * 3))
    prepared = transfer_run.prepare(
        transfer_run.Settings(
            pathlib.Path(toy),
            {"train": dataset, "test": dataset},
            data_dir=tmp_path,
            batch_size=4,
            steps=1,
            crop_size=16,
        )
    )
    transfer_run.run(
        prepared,
        tmp_path / "out",
        strategy=distribution.default(),
        progress=False,
    )
    report = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert report["settings"]["dataset"] == report["dataset"]
    assert report["settings"]["dataset"] == "tf.data.Dataset"
    assert report["settings"]["model"] == str(toy)
    assert report["settings"]["data_dir"] == str(tmp_path)


def test_no_password_is_written(toy, tmp_path, monkeypatch):
    monkeypatch.setattr("bit_tf.hub.resolve", lambda handle: str(toy))
    pixels = np.zeros((4, 20, 20, 3), np.uint8)
    prepared = transfer_run.prepare(
        transfer_run.Settings(
            "https://me:secret@hub.example/toy/1?token=secret",
            tf.data.Dataset.from_tensor_slices((pixels, [0, 1] * 2)),
            batch_size=2,
            steps=1,
            crop_size=16,
        )
    )
    transfer_run.run(
        prepared,
        tmp_path / "out",
        strategy=distribution.default(),
        progress=False,
    )
    report = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert report["settings"]["model"] == "https://hub.example/toy/1"
    for path in (tmp_path / "out").rglob("*"):
        assert path.is_dir() or b"secret" not in path.read_bytes(), path


def test_charts_are_asked_for_first(finetune, tmp_path, monkeypatch):
    def missing(module, extra):
        raise errors.MissingExtraError(f"pip install 'bit-tf[{extra}]'")

    monkeypatch.setattr(errors, "import_extra", missing)
    code, _, err = finetune("--output", tmp_path / "out", dataset="folder:no")
    assert code == 1
    assert "bit-tf[plot]" in err


def test_second_validation(pictures, small_npz, tmp_path):
    (tmp_path / "train").symlink_to(pictures / "train")
    (tmp_path / "val").symlink_to(pictures / "test")
    settings = transfer_run.Settings(
        str(small_npz), f"folder:{tmp_path}", validation=0.5
    )
    with pytest.raises(errors.DatasetError, match="has 9 for validation"):
        transfer_run.prepare(settings)


@pytest.mark.parametrize(
    ("given", "sides"),
    [
        ({}, (160, 128)),
        ({"resize": 80}, (80, 64)),
        ({"crop_size": 64}, (80, 64)),
        ({"resize": 70, "crop_size": 70}, (70, 70)),
    ],
    ids=["rule", "resize", "crop", "both"],
)
def test_sizes_of_pictures(given, sides, pictures, small_npz):
    prepared = transfer_run.prepare(
        transfer_run.Settings(str(small_npz), f"folder:{pictures}", **given)
    )
    found = prepared.rule.resolution
    assert (found.resize, found.crop) == sides


@pytest.mark.slow
def test_checkpoint_in_a_process(pictures, small_npz, tmp_path):
    """The command as a user runs it, twice, with bit-identical weights."""
    command = [
        *(sys.executable, "-m", "bit_tf", "finetune"),
        *("--model", small_npz, "--dataset", f"folder:{pictures}"),
        *("--output", "out", "--freeze", "root_block|block[1-3]"),
        *("--deterministic", *SMALL),
    ]
    found = []
    for name in ("one", "two"):
        folder = tmp_path / name
        folder.mkdir()
        done = subprocess.run(
            list(map(str, command)),
            cwd=folder,
            env={**os.environ, "PYTHONPATH": os.getcwd()},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert done.stderr == ""
        found.append((folder / "out" / "model.keras").read_bytes())
    assert found[0] == found[1]
    model, _ = transfer.load(folder / "out" / "model.keras")
    start = transfer.classifier(small_npz, 3)
    changed = [
        name
        for name, variable in transfer.trainable_names(model).items()
        if (variable.numpy() != transfer.trainable_names(start)[name]).any()
    ]
    assert {name.split("/")[0] for name in changed} == {
        "block4",
        "group_norm",
        "head",
    }
