"""The largest model converts within bounds. See benchmarks/memory.py."""

import pathlib
import shutil

import pytest

from benchmarks import memory


def room(folder):
    """Bytes free in memory and on the disk, whichever are fewer."""
    info = dict(
        line.split(":")
        for line in pathlib.Path("/proc/meminfo").read_text().splitlines()
    )
    available = int(info["MemAvailable"].split()[0]) * 1024
    return min(available, shutil.disk_usage(folder).free)


def needs(folder, size):
    if room(folder) < size:
        pytest.skip(
            reason=f"needs {size >> 30} GiB of free memory and disk: pytest "
            "-m slow tests/test_memory.py --basetemp=DIRECTORY"
        )


@pytest.mark.slow
def test_r152x4_with_the_largest_head(tmp_path):
    needs(tmp_path, 12 * 2**30)
    (result,) = memory.measure("R152x4", 21843, tmp_path)
    weights = 4 * 1_107_299_923
    assert weights < result["bytes"] < 1.01 * weights
    assert result["peaks"].keys() == {"convert", "verify"}
    for name, peak in result["peaks"].items():
        assert peak <= 2.2 * weights, name
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_array_formats_stream(tmp_path):
    needs(tmp_path, 5 * 2**30)
    formats = ["timm", "keras", "transformers", "npz"]
    results = list(memory.measure("R50x3", 21843, tmp_path, formats))
    assert [result["to"] for result in results] == formats
    for result in results:
        assert result["bytes"] > 4 * 345_399_315
        assert result["peaks"]["convert"] <= 1.6 * result["bytes"], result
    assert list(tmp_path.iterdir()) == []
