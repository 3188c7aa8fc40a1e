"""What `bit-tf inspect` tells."""

import json
import math
import os
import subprocess
import sys

import helpers
import numpy as np
import pytest

from bit_tf import checkpoints
from bit_tf.checkpoints import inspection

GAMMA = "block3/unit01/b/group_norm/gamma"
TINY = helpers.TESTING


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, ">f4"])
def test_statistics(rng, dtype):
    array = (rng.standard_normal((7, 300, 1000)) * 3 + 100).astype(dtype)
    found = inspection.statistics(array)
    wide = array.astype(np.float64)
    assert found["min"] == wide.min()
    assert found["max"] == wide.max()
    assert found["mean"] == pytest.approx(wide.mean(), rel=1e-12)
    assert found["std"] == pytest.approx(wide.std(), rel=1e-9)
    assert (found["nan"], found["infinite"]) == (0, 0)


def test_statistics_of_what_is_not_finite():
    array = np.array([1, np.nan, 3, np.inf, -np.inf, np.nan], np.float32)
    assert inspection.statistics(array) == {
        "min": 1.0,
        "max": 3.0,
        "mean": 2.0,
        "std": 1.0,
        "nan": 2,
        "infinite": 2,
    }
    nothing = inspection.statistics(np.full((1 << 20) + 1, np.nan, np.float32))
    assert nothing["mean"] is None
    assert nothing["nan"] == (1 << 20) + 1


def test_every_array_is_told(call, small_npz, small_arrays):
    code, out, err = call("bit-tf", "inspect", small_npz, "--json")
    report = json.loads(out)
    assert (code, err) == (0, "")
    assert report["format"] == "google_npz"
    assert report["architecture"] == "testing"
    assert report["num_classes"] == 10
    assert report["params"] == sum(map(np.size, small_arrays.values()))
    assert report["bytes"] == small_npz.stat().st_size
    assert report["numerics"]["ws_epsilon"] == 1e-10
    assert report["preset"]["name"] == "big_transfer eval"
    assert report["finite"] is True
    rows = {row["name"]: row for row in report["arrays"]}
    assert rows.keys() == small_arrays.keys()
    for name, array in small_arrays.items():
        assert rows[name]["shape"] == list(array.shape)
        assert rows[name]["source"] == f"resnet/{name}"
        assert rows[name]["dtype"] == "float32"
        assert math.isclose(rows[name]["max"], array.max())
        assert math.isclose(rows[name]["std"], array.std(), rel_tol=1e-5)


def test_the_table(call, small_npz, small_arrays):
    code, out, _ = call("bit-tf", "inspect", small_npz)
    assert code == 0
    assert "google_npz" in out
    assert "10 classes" in out
    for name in small_arrays:
        assert f"\n{name} " in out
    code, out, _ = call("bit-tf", "inspect", small_npz, "--no-values")
    assert code == 0
    assert "MEAN" not in out


def test_values_that_are_not_finite(call, tmp_path, small_arrays):
    path = tmp_path / "nan.npz"
    array = small_arrays[GAMMA].copy()
    array[:3] = np.nan, np.inf, np.nan
    spelled = {
        f"resnet/{name}": values
        for name, values in {**small_arrays, GAMMA: array}.items()
    }
    np.savez(path, **spelled)
    code, out, err = call("bit-tf", "inspect", path, "--json")
    report = json.loads(out)
    assert code == 1
    assert "not finite" in err
    assert report["finite"] is False
    (row,) = [row for row in report["arrays"] if row["nan"]]
    assert (row["name"], row["nan"], row["infinite"]) == (GAMMA, 2, 1)
    code, out, err = call("bit-tf", "inspect", path, "--no-values", "--json")
    assert (code, json.loads(out)["finite"]) == (0, None)


def test_no_checkpoint(call, tmp_path):
    path = tmp_path / "x.npz"
    path.write_bytes(b"<html>")
    code, out, err = call("bit-tf", "inspect", path)
    assert (code, out) == (1, "")
    assert "web page" in err
    code, out, err = call("bit-tf", "inspect", tmp_path / "none.npz")
    assert code == 1
    assert "existing file" in err


def test_a_file_of_another_architecture_than_its_name(call, tmp_path):
    # So it is with two of the published .h5 files.
    path = tmp_path / "BiT-S-R50x3.npz"
    checkpoints.write(helpers.random_arrays(*TINY, 10), path)
    code, out, _ = call("bit-tf", "inspect", path, "--json")
    (note,) = json.loads(out)["notes"]
    assert code == 0
    assert "'BiT-S-R50x3' is R50x3 with 1000 classes" in note
    assert "testing with 10 classes" in note


def test_values_beyond_float32(call, tmp_path, small_arrays):
    path = tmp_path / "wide.npz"
    wide = {name: a.astype(np.float64) for name, a in small_arrays.items()}
    wide[GAMMA][:2] = 1e308, -1e308
    np.savez(path, **{f"resnet/{name}": array for name, array in wide.items()})
    code, out, err = call("bit-tf", "inspect", path, "--json")
    assert code == 1
    assert "RuntimeWarning" not in err
    report = json.loads(out, parse_constant=pytest.fail)
    (row,) = [row for row in report["arrays"] if row["infinite"]]
    assert (row["name"], row["infinite"]) == (GAMMA, 2)
    assert row["max"] < 1e10


def test_names_that_would_move_the_cursor(call, tmp_path, small_arrays):
    path = tmp_path / "odd.npz"
    spelled = {f"resnet/{name}": a for name, a in small_arrays.items()}
    np.savez(path, **spelled, **{"a\x1b[2J\nfile: /etc": np.zeros(1)})
    for arguments in (
        ("bit-tf", "inspect", path),
        ("hub-export", "convert", path, tmp_path / "x.npz", "--to", "npz"),
    ):
        code, out, err = call(*arguments)
        assert code == 0, err
        assert "\x1b" not in out + err
        assert "\nfile: /etc" not in out + err
        assert r"a\x1b[2J\nfile: /etc" in out + err


def test_a_terminal_without_unicode(small_npz):
    run = subprocess.run(
        [
            *(sys.executable, "-c"),
            "from bit_tf.commands import main; main()",
            *("inspect", small_npz, "--no-values"),
        ],
        capture_output=True,
        env=os.environ | {"PYTHONIOENCODING": "ascii"},
    )
    assert run.returncode == 0, run.stderr
    assert rb"7\xd77\xd73\xd732" in run.stdout
