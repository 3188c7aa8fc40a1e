"""`python -m benchmarks`: it times one network, and its tables are whole."""

import json
import os
import pathlib
import subprocess
import sys

import helpers
import numpy as np
import pytest
import reference
import tensorflow as tf

from benchmarks import __main__ as command
from benchmarks import (
    gpu,
    peers,
    plain_graphs,
    processes,
    settings,
    startup,
    timing,
)
from bit_tf import variants


@pytest.fixture(scope="module")
def testing():
    """(blocks, arrays) of the tiny network."""
    row = variants.architecture("testing")
    return row.blocks, helpers.random_arrays(row.blocks, row.stem_width, 0)


def test_the_baseline_is_bit(testing, tmp_path):
    blocks, arrays = testing
    plain_graphs.save_baseline(arrays, blocks, tmp_path / "model")
    model = tf.saved_model.load(str(tmp_path / "model"))
    pictures = helpers.random_images(2, 65, 40) / np.float32(255)
    expected = reference.forward(arrays, pictures)["pre_logits"]
    found = model(tf.constant(pictures))
    assert helpers.relative_error(found, expected) <= 1e-5


def test_convolutions_without_norms_are_as_many(testing, tmp_path):
    blocks, arrays = testing
    plain_graphs.save_without_norms(arrays, blocks, tmp_path / "model")
    model = tf.saved_model.load(str(tmp_path / "model"))
    pictures = tf.constant(helpers.random_images(1, 64, 64) / np.float32(255))
    found = model(pictures).numpy()
    assert np.isfinite(found).all()
    assert found.std() > 0
    kernels = [name for name in arrays if name.endswith("conv2d/kernel")]
    assert len(model.weights) == len(kernels)


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_the_onnx_graph_is_bit(testing, tmp_path, runtime):
    for name in ("onnx", runtime):
        reason = f"no {name}; pip install 'bit-tf[bench]'"
        pytest.importorskip(name, reason=reason)
    blocks, arrays = testing
    path = tmp_path / "graph.onnx"
    plain_graphs.write_onnx(arrays, blocks, path)
    pictures = helpers.random_images(1, 40, 33) / np.float32(255)
    pictures = pictures.astype(np.float32)
    start = (
        peers._onnxruntime(path)
        if runtime == "onnxruntime"
        else peers._openvino(path, "f32")
    )
    found = start(1, 40, 33)(pictures)
    expected = reference.forward(arrays, pictures)["pre_logits"]
    assert helpers.relative_error(found, expected) <= 1e-5


@pytest.mark.parametrize(
    ("name", "side", "expected"),
    [
        ("R50x1", 224, 4.09),
        ("R50x1", 480, 18.77),
        ("R50x3", 128, 11.79),
        ("R101x1", 448, 31.20),
        ("R101x3", 448, 277.95),
        ("R152x2", 224, 45.81),
        ("R152x4", 480, 839.25),
    ],
)
def test_multiply_accumulates(name, side, expected):
    """As published (in units of 10⁹), which count a head of 1000 classes."""
    row = variants.architecture(name)
    found = timing.multiply_accumulates(name, side, side)
    assert (found + 1000 * row.feature_dim) / 1e9 == pytest.approx(
        expected, abs=0.006
    )


def test_everybody_has_a_turn_in_every_round():
    calls = []
    times = timing.in_turns(
        {name: lambda name=name: calls.append(name) for name in "abc"},
        rounds=3,
        warm=1,
        pause=0,
    )
    assert "".join(calls) == "abc" + "aabbcc" + "bbccaa" + "ccaabb"
    assert [len(seconds) for seconds in times.values()] == [3, 3, 3]


def test_a_ratio_is_of_neighbours():
    """A machine that slows down for a while does not matter."""
    ours, theirs = [1.0, 10.0, 1.0], [2.0, 20.0, 2.0]
    assert timing.ratio(ours, theirs) == 2.0


def test_the_matrix_product_is_counted():
    found = timing.matrix_product(tries=1)
    assert 1e9 < found < 1e15


@pytest.mark.slow
@pytest.mark.parametrize("name", ["inference", "scaling"])
def test_quick(name, tmp_path, capsys):
    if name == "scaling":
        pytest.importorskip("matplotlib", reason="needs bit-tf[plot]")
    assert command.main([name, "--quick", "--output", str(tmp_path)]) == 0
    found = json.loads((tmp_path / f"{name}.json").read_text())
    text = (tmp_path / f"{name}.md").read_text()
    assert text in capsys.readouterr().out
    assert found["machine"]["cores"] == os.cpu_count()
    for title, rows in found["tables"].items():
        assert title in text
        if title.startswith("bfloat16"):
            assert 0.999 < rows[0]["least cosine"] < 1
        else:
            assert all(row["ms"] > 0 for row in rows)
    if name == "scaling":
        assert (tmp_path / "scaling.png").read_bytes()[:4] == b"\x89PNG"
        return
    rows, _ = found["tables"].values()
    by_name = {row[""]: row for row in rows}
    assert by_name["bit_tf encode"]["bit_tf encode is … × as fast"] == 1
    for row in rows:
        if row[""].startswith(("bit_tf", "TF2")):
            bound = 0.05 if "bfloat16" in row[""] else 1e-5
            assert row["relative error"] <= bound
    assert ("transformers (torch)" in by_name) == peers.installed(
        "torch", "transformers"
    )


@pytest.mark.slow
def test_training_quick(tmp_path):
    assert command.main(["training", "--quick", "--output", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "training.json").read_text())
    (rows,) = found["tables"].values()
    assert rows[0][""] == "bit_tf"
    assert rows[0]["MB a picture"] > 0


@pytest.mark.slow
def test_startup_quick(tmp_path):
    assert command.main(["startup", "--quick", "--output", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "startup.json").read_text())
    ours, bare = found["tables"]["testing"]
    assert ours["seconds of the process"] > ours["import"] > 0
    assert bare["ours takes … × as long"] > 0


@pytest.mark.slow
def test_embed_quick(tmp_path):
    assert command.main(["embed", "--quick", "--output", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "embed.json").read_text())
    ((row,),) = found["tables"].values()
    assert row["images"] == 8
    assert row["seconds / (both / cores)"] > 0


@pytest.mark.slow
def test_export_quick(tmp_path):
    assert command.main(["export", "--quick", "--output", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "export.json").read_text())
    ((row,),) = found["tables"].values()
    assert (row["architecture"], row["features"]) == ("testing", 1024)
    assert row["seconds"] > 0
    assert 0.1 < row["peak GB, convert"] < 10
    assert 0.1 < row["peak GB, verify"] < 10


@pytest.mark.slow
def test_settings_quick(tmp_path):
    assert command.main(["settings", "--quick", "--output", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "settings.json").read_text())
    (rows,) = found["tables"].values()
    assert [row[""] for row in rows] == list(settings.SETTINGS)
    assert rows[0]["× as fast as it is"] == 1


def test_the_convolution_has_as_many_bytes(tmp_path):
    startup.save_convolution(tmp_path / "model", 1_000_000)
    size = sum(
        path.stat().st_size for path in (tmp_path / "model").rglob("*data*")
    )
    assert size == pytest.approx(1_000_000, rel=0.01)


def test_peers_that_are_not_installed_are_named(monkeypatch):
    monkeypatch.setattr(peers, "installed", lambda *modules: False)
    assert len(peers.missing()) == 3


def test_help():
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks", "--help"],
        cwd=pathlib.Path(__file__).parents[1],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0
    assert "inference" in done.stdout


@pytest.mark.slow
def test_without_a_gpu(capsys):
    assert command.main(["gpu"]) == 0
    assert "No GPU" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("work", ["features", "training"])
def test_the_model_on_jax(work):
    """What runs on a GPU, on a CPU."""
    found = processes.fresh(gpu._jax, "testing", work, 2, 32)
    assert min(found["seconds"]) > 0


@pytest.mark.gpu
def test_on_a_gpu(tmp_path):
    """Needs a GPU and jax for it: pytest -m gpu."""
    assert command.main(["gpu", "--output", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "gpu.json").read_text())
    for rows in found["tables"].values():
        assert rows[0]["images/s"] > 0
