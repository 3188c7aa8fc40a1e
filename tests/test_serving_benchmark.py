import json
import os
import shutil
import subprocess
import sys

import pytest
import repositories

from benchmarks import serving
from bit_tf import archive, handles

needs_nginx = pytest.mark.skipif(
    shutil.which("nginx", path=f"{os.environ['PATH']}:/usr/sbin") is None,
    reason="no nginx; apt-get install nginx-light, then pytest "
    "tests/test_serving_benchmark.py",
)


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    return serving.make_tree(tmp_path_factory.mktemp("benchmark"), "testing")


def test_a_tree_is_made_once(target, tmp_path):
    packed = target.root / f"{serving.HANDLE}{handles.ARCHIVE_SUFFIX}"
    before = packed.stat().st_mtime_ns
    assert packed.stat().st_size == target.size
    archive.unpack(packed, tmp_path / "unpacked")
    names = {path.name for path in (tmp_path / "unpacked").rglob("*.*")}
    assert names == {"saved_model.pb", "variables.data-00000-of-00001"}
    again = serving.make_tree(target.root.parent, "testing")
    assert again == target
    assert packed.stat().st_mtime_ns == before


def test_a_tree_that_was_not_finished_is_made_anew(tmp_path):
    (tmp_path / "testing" / "benchmark").mkdir(parents=True)
    (tmp_path / "testing-model").mkdir()
    made = serving.make_tree(tmp_path, "testing")
    assert made.root.joinpath("index.json").is_file()


@needs_nginx
def test_measure(target):
    lines = []
    result = serving.measure(
        target, downloads=8, clients=4, rounds=2, say=lines.append
    )
    assert result.wrong == 0
    assert len(result.ours) == len(result.nginx) == 2
    assert all(rate > 0 for rate in result.ours + result.nginx)
    assert result.ratio > 0
    assert 0 < result.memory_one <= result.memory_all
    assert len(lines) == 4
    text = serving.report(result)
    assert "wrong:   0\n" in text
    assert "8 downloads of" in text


def test_a_wrong_body_is_counted(target):
    with repositories.serving(target.root) as hub:
        right = (target.sha256, target.size)
        assert serving.download(hub.port, *right)
        assert not serving.download(hub.port, "0" * 64, target.size)
        assert not serving.download(hub.port, target.sha256, 1)
        packed = target.root / f"{serving.HANDLE}{handles.ARCHIVE_SUFFIX}"
        moved = packed.rename(packed.with_name("moved"))
        try:
            assert not serving.download(hub.port, *right)
        finally:
            moved.rename(packed)


def test_the_median_of_ratios():
    result = serving.Result(1, 2, 3, ours=[1, 3, 5], nginx=[2, 3, 50])
    assert result.ratio == 0.5


@pytest.mark.slow
@needs_nginx
def test_command(tmp_path):
    """200 downloads of R50x1's size by 32 clients: what must hold."""
    process = subprocess.run(
        [
            *(sys.executable, "-m", "benchmarks.serving", "--json"),
            *("--directory", str(tmp_path), "--rounds", "1"),
        ],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    found = json.loads(process.stdout)
    assert found["wrong"] == 0
    assert found["downloads"] == 200
    assert found["clients"] == 32
    assert found["size"] > 80_000_000
    assert found["ratio"] >= 0.3
    assert found["memory_all"] - found["memory_one"] <= 64 * 2**20
