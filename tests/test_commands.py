"""The command lines, in this process (see `call`) and in fresh ones."""

import contextvars
import dataclasses
import json
import os
import shutil
import subprocess
import sys
import types

import helpers
import numpy as np
import pytest

import bit_tf
from bit_tf import errors, images, presets, relocation
from bit_tf.checkpoints import tf_hub
from hub_export import fresh_process, publishing


def test_models(call):
    code, out, _ = call("bit-tf", "models")
    assert code == 0
    assert "BiT-M-R50x1 " in out
    assert "68.3M" in out
    assert len(out.splitlines()) == 1 + 18
    code, out, _ = call("bit-tf", "models", "vtab/*run0-dtd", "--json")
    rows = json.loads(out)
    assert [row["num_classes"] for row in rows] == [47] * 5


@pytest.mark.parametrize(
    "arguments",
    [
        ("bit-tf",),
        ("bit-tf", "nonsense"),
        ("bit-tf", "embed"),
        ("bit-tf", "classify", "x.png", "--top", "many"),
        ("bit-tf", "classify", "x.png", "--top", "0"),
        ("bit-tf", "classify", "x.png", "--batch", "2"),
        ("bit-tf", "embed", "x.png", "--batch", "0"),
        ("bit-tf", "embed", "x.png", "--preset", "none such"),
        ("bit-tf", "embed", "x.png", "--output", "x.csv"),
        ("bit-tf", "embed", "x.png", "--output", "/none/such/x.npy"),
        ("hub-export", "convert", "only-one"),
        ("hub-export", "convert", "a", "b", "--to", "gif"),
        ("hub-export", "demo", "x.npz", "--random", "R50x1"),
    ],
)
def test_wrong_usage_exits_2(call, arguments):
    code, out, err = call(*arguments)
    assert code == 2
    assert out == ""
    assert "usage:" in err


def test_embed_json_lines(call, features_export, photos):
    code, out, _ = call(
        "bit-tf",
        "embed",
        *photos,
        *("--model", features_export, "--preset", "tfhub"),
    )
    assert code == 0
    rows = [json.loads(line) for line in out.splitlines()]
    assert [row["source"] for row in rows] == [str(p) for p in photos]
    encoder = bit_tf.BitMedium2Vec(features_export)
    for row, path in zip(rows, photos, strict=True):
        assert row["model"] == str(features_export)
        assert row["preset"] == "tfhub"
        assert row["precision"] == "float32"
        error = helpers.relative_error(row["embedding"], encoder.encode(path))
        assert error <= 1e-5


def test_embed_files(call, features_export, photos, tmp_path):
    options = ("--model", features_export, "--preset", "big_transfer eval 128")
    bad = tmp_path / "bad.png"
    bad.write_bytes(b"not a picture")
    npy, table = tmp_path / "x.npy", tmp_path / "x.parquet"

    code, _, _ = call("bit-tf", "embed", *photos, *options, "--output", npy)
    assert code == 0
    vectors = np.load(npy)
    assert vectors.shape == (3, 1024)
    assert vectors.dtype == np.float32
    encoder = bit_tf.BitMedium2Vec(features_export, "big_transfer eval 128")
    expected = [encoder.encode(path) for path in photos]
    assert helpers.relative_error(vectors, expected) <= 1e-5

    code, _, err = call(
        "bit-tf", "embed", *photos, bad, *options, "--output", table
    )
    assert code == 1
    assert str(bad) in err
    from pyarrow import parquet

    rows = parquet.read_table(table)
    assert rows.column("source").to_pylist() == [str(p) for p in [*photos, bad]]
    assert rows.schema.metadata[b"preset"] == b"big_transfer eval 128"
    assert rows.schema.metadata[b"precision"] == b"float32"
    assert rows.schema.metadata[b"model"] == str(features_export).encode()
    assert rows.schema.field("embedding").type.list_size == 1024
    found = rows.column("embedding").to_pylist()
    assert found[3] == [None] * 1024
    assert helpers.relative_error(found[:3], expected) <= 1e-5
    assert rows.column("error").to_pylist()[:3] == [None] * 3
    assert "Received" in rows.column("error").to_pylist()[3]

    before = npy.read_bytes()
    code, _, err = call(
        "bit-tf", "embed", *photos, bad, *options, "--output", npy
    )
    assert code == 1
    assert "Nothing was written" in err
    assert npy.read_bytes() == before
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["bad.png", "x.npy", "x.parquet"]


def test_embed_errors(call, photos, tmp_path):
    code, _, err = call(
        "bit-tf", "embed", photos[0], "--model", tmp_path / "none"
    )
    assert code == 1
    assert "no such path" in err


def test_classify(call, small_export, photos, tmp_path):
    options = ("--model", small_export, "--preset", "tfhub", "--top", 3)
    code, out, _ = call("bit-tf", "classify", *photos[:2], *options)
    assert code == 0
    lines = out.splitlines()
    assert lines[0] == str(photos[0])
    assert len(lines) == 2 * 4
    code, out, err = call(
        *("bit-tf", "classify", photos[0], tmp_path / "none.png"),
        *options,
        "--json",
    )
    assert code == 1
    good, bad = map(json.loads, out.splitlines())
    assert [row["name"] for row in good["classes"]] == [
        line.split()[1] for line in lines[1:4]
    ]
    assert "none.png" in bad["source"]
    assert "none.png" in err


@pytest.mark.parametrize("command", ["classify", "embed"])
@pytest.mark.parametrize("recorded", [None, "big_transfer eval 128"])
def test_the_models_own_preset(
    command,
    recorded,
    call,
    photos,
    monkeypatch,
    small_export,
    features_export,
    tmp_path,
):
    """Unless told otherwise, pictures are prepared as the card says."""
    model = tmp_path / "model"
    shutil.copytree(
        small_export if command == "classify" else features_export, model
    )
    card = model / tf_hub.CARD_FILE
    said = json.loads(card.read_text())
    said["preset"] = recorded and dataclasses.asdict(presets.preset(recorded))
    card.write_text(json.dumps(said))
    used = []
    preprocess = images.preprocess
    monkeypatch.setattr(
        images,
        "preprocess",
        lambda image, preset: (
            used.append(preset.name) or preprocess(image, "tfhub")
        ),
    )
    options = ("bit-tf", command, photos[0], "--model", model)
    assert call(*options)[0] == 0
    assert call(*options, "--preset", "timm in1k")[0] == 0
    assert used == [recorded or "big_transfer eval", "timm in1k"]
    said["preset"] = "big_transfer eval"
    card.write_text(json.dumps(said))
    code, _, err = call(*options)
    assert code == 1
    assert "Remove or correct it" in err


@pytest.mark.parametrize(
    ("arguments", "step"),
    [
        (("bit-tf", "evaluate", "--dataset", "x", "--model", "x"), "_check"),
        (
            ("bit-tf", "finetune", "--model=x", "--dataset=x", "--output=x"),
            "_require_output",
        ),
        (("hub-export", "convert", "x", "y"), "program.quiet_tensorflow"),
        (("hub-export", "publish", "x", "--repository", "y"), "_problem"),
    ],
    ids=["evaluate", "finetune", "convert", "publish"],
)
def test_relocate(arguments, step, call, monkeypatch):
    """The moves are in force while the command runs, and no longer."""
    seen = []

    def stop(*_):
        seen.append(relocation.moved("https://old.example/x/1"))
        seen.append(relocation.moved("/a/x"))
        raise errors.BitTfError("far enough")

    package = arguments[0].replace("-", "_")
    monkeypatch.setattr(f"{package}.commands.{arguments[1]}.{step}", stop)
    options = ("--relocate", "https://old.example=/m", "--relocate", "/a=/b")
    code, _, err = call(*arguments, *options)
    assert (code, seen) == (1, ["/m/x/1", "/b/x"]), err
    assert relocation.moved("/a/x") == "/a/x"
    code, _, err = call(*arguments, "--relocate", "/a")
    assert code == 2
    assert "must be OLD=NEW" in err


def test_moves_reach_the_process_that_publishes(tmp_path, monkeypatch):
    seen = []

    def fresh(module, directory, **_):
        answers = []
        clean = contextvars.Context()
        clean.run(publishing._work, str(directory), answers.append)
        return fresh_process.Outcome(answers[0], None)

    monkeypatch.setattr(fresh_process, "call", fresh)
    monkeypatch.setattr(
        publishing,
        "_convert",
        lambda path, **_: seen.append(relocation.moved("/a/x")) or [],
    )
    monkeypatch.setattr(publishing, "_SAME_EVERYWHERE", {})
    job = types.SimpleNamespace(
        source="x", head=False, options=publishing.Options()
    )
    with (
        relocation.relocated({"/a": "/outer"}),
        relocation.relocated({"/a": "/b"}),
    ):
        assert publishing._make(job, tmp_path) == []
    assert seen == ["/b/x"]


def test_convert(call, small_npz, tmp_path):
    names = tmp_path / "names.txt"
    names.write_text("".join(f"class {i}\n" for i in range(10)))
    out_directory = tmp_path / "out"
    code, out, _ = call(
        *("hub-export", "convert", small_npz, out_directory),
        *("--labels", names, "--json"),
    )
    assert code == 0
    report = json.loads(out)
    assert report["variables"] == 45
    assert report["relative_error"] < 1e-5
    written = (out_directory / "assets" / "labels.txt").read_text()
    assert written == names.read_text()
    code, _, err = call("hub-export", "convert", small_npz, out_directory)
    assert code == 1
    assert "--overwrite" in err
    code, out, _ = call(
        *("hub-export", "convert", small_npz, out_directory, "--overwrite"),
        *("--head", "none", "--numerics", "timm"),
    )
    assert code == 0
    assert "43 variables" in out
    from hub_export import card

    assert card.read(out_directory)[0]["numerics"]["ws_epsilon"] == 1e-8


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "existing file"),
        (b"", "empty"),
        (b"<html>404</html>", "google_npz"),
        (b"PK\x03\x04 and no more", "google_npz"),
    ],
)
def test_convert_of_bad_files(call, tmp_path, content, message):
    path = tmp_path / "bad.npz"
    if content is not None:
        path.write_bytes(content)
    code, out, err = call("hub-export", "convert", path, tmp_path / "out")
    assert code == 1
    assert out == ""
    assert message.lower() in err.lower()
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_installed_commands_speak_cleanly(features_export, photos):
    """In fresh processes: results on stdout and nothing else anywhere."""
    binaries = os.path.dirname(sys.executable)
    process = subprocess.run(
        [
            *(os.path.join(binaries, "bit-tf"), "embed", str(photos[0])),
            *("--model", str(features_export), "--preset", "tfhub"),
        ],
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr
    assert len(json.loads(process.stdout)["embedding"]) == 1024
    assert process.stderr == ""
    process = subprocess.run(
        [os.path.join(binaries, "bit-tf"), "embed", "-"],
        input=b"",
        capture_output=True,
        env={**os.environ, "TFHUB_CACHE_DIR": "/nonexistent/cache"},
    )
    assert process.returncode == 1
    assert process.stdout == b""
    assert b"bit-tf: error: No model could be fetched" in process.stderr
    assert b"Traceback" not in process.stderr


def test_missing_extra_is_named(call, photos, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    code, _, err = call("bit-tf", "embed", photos[0], "--output", "x.parquet")
    assert code == 1
    assert "pip install 'bit-tf[parquet]'" in err


def test_a_closed_pipe_is_no_error():
    binaries = os.path.dirname(sys.executable)
    process = subprocess.Popen(
        [os.path.join(binaries, "bit-tf"), "models", "*", "--json"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    process.stdout.read(10)
    process.stdout.close()
    assert process.stderr.read() == b""
    process.stderr.close()
    assert process.wait() == 1


def test_sigterm_leaves_nothing(small_npz, tmp_path):
    out = tmp_path / "out"
    code = (
        "import os, signal, sys\n"
        "from hub_export import golden\n"
        "def stop(path):\n"
        "    assert os.listdir(os.path.dirname(sys.argv[-1]))\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "golden.check_in_fresh_process = stop\n"
        "from hub_export.commands import main; main()\n"
    )
    process = subprocess.run(
        [sys.executable, "-c", code, "convert", str(small_npz), str(out)],
        capture_output=True,
    )
    assert process.returncode == 143, process.stderr
    assert os.listdir(tmp_path) == []


def test_the_current_directory_is_not_imported(
    call, small_npz, tmp_path, monkeypatch
):
    (tmp_path / "numpy.py").write_text("raise SystemExit('shadowed')")
    monkeypatch.chdir(tmp_path)
    code, _, err = call("hub-export", "convert", small_npz, "out")
    assert code == 0, err


def test_extra_arrays_are_named(call, small_npz, tmp_path):
    with np.load(small_npz) as file:
        arrays = dict(file)
    np.savez(tmp_path / "more.npz", **arrays, global_step=np.zeros(3))
    code, _, err = call(
        "hub-export", "convert", tmp_path / "more.npz", tmp_path / "out"
    )
    assert code == 0
    assert "global_step" in err


def test_overwrite_spares_what_is_not_a_saved_model(call, small_npz, tmp_path):
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("years")
    checkpoint = tmp_path / "copy.npz"
    checkpoint.write_bytes(small_npz.read_bytes())
    for target in (mine, checkpoint, tmp_path):
        code, _, err = call(
            "hub-export", "convert", checkpoint, target, "--overwrite"
        )
        assert code == 1
        assert "is neither" in err
    assert (mine / "thesis.txt").read_text() == "years"
    assert checkpoint.read_bytes() == small_npz.read_bytes()


def test_a_signal_that_a_callback_loses_stops_the_program(tmp_path):
    code = """
import os, signal, sys, time, types, weakref
from bit_tf.commands import program

class Thing:
    pass

def lost(reference):
    os.kill(os.getpid(), {number})
    time.sleep(0.01)

def run(args):
    thing = Thing()
    reference = weakref.ref(thing, lost)
    del thing
    for _ in range(200):
        time.sleep(0.05)
    open({path!r}, "w").close()
    return 0

def register(subparsers):
    subparsers.add_parser("go").set_defaults(run=run)

signal.signal(signal.SIGINT, signal.default_int_handler)
program.run("x", "y", [types.SimpleNamespace(register=register)])
"""
    path = tmp_path / "done"
    for number, expected in ((15, 143), (2, 1)):
        script = code.format(number=number, path=str(path))
        process = subprocess.run(
            [sys.executable, "-c", script, "go"], capture_output=True
        )
        assert process.returncode == expected, process.stderr
        assert not path.exists()
