"""The largest model converts within bounds. See benchmarks/memory.py."""

import pathlib
import shutil

import pytest

from benchmarks import memory

NEEDED = 12 * 2**30


def room(folder):
    """Bytes free in memory and on the disk, whichever are fewer."""
    info = dict(
        line.split(":")
        for line in pathlib.Path("/proc/meminfo").read_text().splitlines()
    )
    available = int(info["MemAvailable"].split()[0]) * 1024
    return min(available, shutil.disk_usage(folder).free)


@pytest.mark.slow
def test_r152x4_with_the_largest_head(tmp_path):
    if room(tmp_path) < NEEDED:
        pytest.skip(
            reason="needs 12 GiB of free memory and disk: pytest -m slow "
            "tests/test_memory.py --basetemp=DIRECTORY"
        )
    result = memory.measure("R152x4", 21843, tmp_path)
    assert result["weights"] == 4 * 1_107_299_923
    assert result["peaks"].keys() == {"convert", "verify"}
    for name, peak in result["peaks"].items():
        assert peak <= 2.2 * result["weights"], name
    assert list(tmp_path.iterdir()) == []
