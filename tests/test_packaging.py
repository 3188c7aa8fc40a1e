"""The wheel and the sdist hold what they must, and work elsewhere."""

import os
import pathlib
import shutil
import subprocess
import sys
import tarfile
import zipfile

import pytest

ROOT = pathlib.Path(__file__).parent.parent
DATA = {
    "bit_tf/data/ilsvrc2012.tsv",
    "bit_tf/data/imagenet21k.tsv",
    "bit_tf/py.typed",
    "hub_export/data/digits.npz",
    "hub_export/data/digits_heldout.npz",
    "hub_export/data/nginx.conf.template",
    "hub_export/data/pages/front.html",
    "hub_export/data/pages/script.js",
    "hub_export/data/pages/style.css",
    "hub_export/data/pages/version.html",
    "hub_export/data/tfhub_tags.json",
    "hub_export/py.typed",
}

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def dist(tmp_path_factory):
    """A folder with the sdist, and the wheel built from the sdist."""
    folder = tmp_path_factory.mktemp("dist")
    source = folder / "source"
    shutil.copytree(
        ROOT, source, ignore=shutil.ignore_patterns(".*", "build", "*.egg-info")
    )
    build("sdist", source, folder)
    (sdist,) = folder.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder / "unpacked", filter="data")
    (unpacked,) = (folder / "unpacked").iterdir()
    build("wheel", unpacked, folder)
    return folder


def build(kind, source, folder):
    subprocess.run(
        [
            *(sys.executable, "-c"),
            f"from setuptools.build_meta import *; build_{kind}(r'{folder}')",
        ],
        cwd=source,
        check=True,
        capture_output=True,
    )


def test_contents(dist):
    (wheel,) = dist.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    sources = {
        path.relative_to(ROOT).as_posix()
        for package in ("bit_tf", "hub_export")
        for path in (ROOT / package).rglob("*.py")
    }
    assert sources | DATA <= names
    assert not any(name.startswith(("tests", "benchmarks")) for name in names)
    assert any(name.endswith("/LICENSE") for name in names)


def test_the_wheel_runs_the_demo_elsewhere(dist, tmp_path):
    (wheel,) = dist.glob("*.whl")
    site = tmp_path / "site"
    subprocess.run(
        [
            *(sys.executable, "-m", "pip", "install", "--quiet", "--no-deps"),
            *("--no-index", "--target", str(site), str(wheel)),
        ],
        check=True,
    )
    code = (
        "import bit_tf, hub_export, sys\n"
        f"assert bit_tf.__file__.startswith({str(site)!r}), bit_tf.__file__\n"
        "sys.argv = ['hub-export', 'demo', '--directory', 'made']\n"
        "from hub_export.commands import main; main()\n"
    )
    process = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(site)},
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr
    assert "held-out digits are right" in process.stdout
    assert (tmp_path / "made" / "neighbours.png").stat().st_size > 10_000
