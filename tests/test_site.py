"""Copies of a repository for hosts of plain files."""

import json
import os
import shutil
import stat
import subprocess
import sys

import fake_publications as fake
import pytest

from bit_tf import errors, files, handles
from hub_export import repository, site, tree

MODEL = handles.Handle.parse(fake.MODEL)
CLASSIFIER = handles.Handle.parse(fake.CLASSIFIER)


@pytest.fixture(autouse=True)
def _faked():
    with fake.faked():
        yield


@pytest.fixture
def plain_pages():
    with fake.plain_pages():
        yield


@pytest.fixture
def root(tmp_path):
    path = tmp_path / "root"
    fake.publish(path, title="Ours", url="https://x.org")
    fake.publish(path, fake.CLASSIFIER)
    return path


def assert_site(root, out, url="https://x.org"):
    """A site has the repository's files, all of them real, and no others."""
    found = tree.released(out)
    expected = {}
    for handle in found:
        described = tree.read(root, handle)
        assert tree.read(out, handle) == described
        expected[described.archive.path] = described.archive.sha256
        folder = f"{handle}/{handles.MODEL_FOLDER}"
        for file in described.files:
            expected[f"{folder}/{file.path}"] = file.sha256
        for name in ("index.html", "card.md", "entry.json"):
            path = tree.directory(root, handle) / name
            expected[f"{handle}/{name}"] = files.measure(path)[1]
    content = repository.derived(repository.entries(out), url, "Ours")
    there = {
        path.relative_to(out).as_posix(): path
        for path in out.rglob("*")
        if not path.is_dir()
    }
    assert there.keys() == expected.keys() | content.keys()
    for name, path in there.items():
        assert not path.is_symlink()
        assert stat.S_IMODE(path.stat().st_mode) == 0o644
        if name in content:
            assert path.read_bytes() == content[name]
        else:
            assert files.measure(path)[1] == expected[name], name
    for path in out.rglob("*"):
        assert not path.name.startswith(".")
    return found


def test_a_copy_of_real_files(root, tmp_path):
    out = tmp_path / "www" / "out"
    before = os.umask(0o077)
    try:
        result = site.site(root, out)
    finally:
        os.umask(before)
    assert assert_site(root, out) == [MODEL.at(1), CLASSIFIER.at(1)]
    assert result == site.Result((MODEL.at(1), CLASSIFIER.at(1)), (), ())
    for path in [out, *out.rglob("*")]:
        if path.is_dir():
            assert stat.S_IMODE(path.stat().st_mode) == 0o755


def test_what_is_there_is_kept(root, tmp_path):
    out = tmp_path / "out"
    site.site(root, out)
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    result = site.site(root, out)
    assert result.copied == ()
    assert {path: path.stat().st_mtime_ns for path in before} == before
    fake.publish(root)
    said = []
    result = site.site(root, out, say=said.append)
    assert result.copied == (MODEL.at(2),)
    assert result.kept == (MODEL.at(1), CLASSIFIER.at(1))
    assert said == [f"Copying {fake.MODEL}/2 …"]
    assert_site(root, out)
    for path in before:
        if f"{fake.MODEL}/1" in str(path):
            assert path.stat().st_mtime_ns == before[path]


def test_another_address(root, tmp_path):
    out = tmp_path / "out"
    site.site(root, out, url="https://y.org/hub/")
    assert_site(root, out, "https://y.org/hub")
    text = (out / "assets/docs/google/models/bit/m-r50x1/1.md").read_text()
    assert f"https://y.org/hub/{fake.MODEL}/1.tar.gz" in text
    assert repository.index(root).url == "https://x.org"


def test_another_version_under_the_same_handle(root, tmp_path):
    out, other = tmp_path / "out", tmp_path / "other"
    site.site(root, out)
    fake.publish(other, description="Another one.")
    before = fake.snapshot(out)
    with pytest.raises(errors.ExportError, match="immutable"):
        site.site(other, out)
    assert fake.snapshot(out) == before


def test_versions_that_the_repository_has_not(root, tmp_path, call):
    out = tmp_path / "out"
    fake.publish(root)
    site.site(root, out)
    shutil.copytree(root, tmp_path / "full", symlinks=True)
    shutil.rmtree(root / fake.MODEL / "2")
    code, text, err = call("hub-export", "site", root, out)
    assert code == 0
    assert f"left alone: {fake.MODEL}/2" in err
    assert text == f"{out}: 0 versions copied, 2 kept\n"
    assert len(assert_site(tmp_path / "full", out)) == 3


@pytest.mark.parametrize(
    "kind", ["other", "repository", "inside", "around", "damaged", "file"]
)
def test_directories_that_are_no_place(root, tmp_path, kind):
    out = tmp_path / "out"
    if kind == "inside":
        out = root / "site"
    elif kind == "around":
        out = tmp_path
    elif kind == "repository":
        fake.publish(out)
    elif kind == "file":
        out.write_text("mine")
    else:
        out.mkdir()
        (out / "mine.txt").write_text("mine")
        if kind == "damaged":
            (out / "index.json").write_text("{}")
    before = fake.snapshot(tmp_path)
    with pytest.raises(errors.ExportError):
        site.site(root, out)
    assert fake.snapshot(tmp_path) == before


def test_a_directory_that_is_no_repository(tmp_path):
    for path in (tmp_path, tmp_path / "none"):
        with pytest.raises(errors.ExportError, match="Publish a model there"):
            site.site(path, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "path", ["model.tar.gz", "model/saved_model.pb", "entry.json", "card.md"]
)
def test_a_damaged_repository(root, tmp_path, path):
    out = tmp_path / "out"
    damaged = tree.directory(root, CLASSIFIER.at(1)) / path
    if path == "card.md":
        damaged.unlink()
    else:
        content = bytearray(damaged.read_bytes())
        content[len(content) // 2] ^= 0x80
        damaged.write_bytes(content)
    with pytest.raises(errors.ExportError) as caught:
        site.site(root, out)
    assert str(damaged) in str(caught.value)
    assert not tree.directory(out, CLASSIFIER.at(1)).exists()
    if path != "entry.json":
        # What was sound is there, and it goes on once the rest is.
        assert tree.released(out) == [MODEL.at(1)]
    shutil.rmtree(tree.directory(root, CLASSIFIER.at(1)))
    (root / fake.CLASSIFIER / "1.tar.gz").unlink()
    fake.publish(root, fake.CLASSIFIER)
    site.site(root, out)
    assert len(assert_site(root, out)) == 2


def test_an_archive_that_was_lost(root, tmp_path):
    out = tmp_path / "out"
    site.site(root, out)
    tree.archive(out, MODEL.at(1)).unlink()
    result = site.site(root, out)
    assert MODEL.at(1) in result.kept
    assert_site(root, out)


def test_a_configuration_for_nginx(root, tmp_path, call):
    out, file = tmp_path / "out", tmp_path / "nginx.conf"
    options = ("--url", "https://y.org/hub", "--nginx", file)
    code, _, err = call("hub-export", "site", root, out, *options)
    assert code == 0, err
    text = file.read_text()
    assert str(out) in text
    assert "server_name y.org;" in text
    code, _, err = call("hub-export", "site", root, out, "--nginx", tmp_path)
    assert code == 1
    assert "directory" in err


def test_strangers_in_a_version_are_not_copied(root, tmp_path):
    folder = tree.directory(root, MODEL.at(1))
    (folder / ".secret").write_text("mine")
    (folder / "model" / "link").symlink_to("/etc/passwd")
    site.site(root, tmp_path / "out")
    assert_site(root, tmp_path / "out")


def test_a_copy_that_is_killed_at_every_step(tmp_path, plain_pages):
    root = tmp_path / "root"
    fake.publish(root, title="Ours", url="https://x.org")
    (count,) = subprocess.run(
        [sys.executable, fake.__file__, "crash_site", tmp_path, root],
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
    ).stdout.split()
    assert int(count) > 40
    for number in range(int(count)):
        out = tmp_path / str(number)
        if out.exists():
            for handle in tree.released(out):
                described = tree.read(out, handle)
                archive = tree.archive(out, handle)
                assert files.measure(archive)[1] == described.archive.sha256
            if tree.is_repository(out):
                index = json.loads((out / "index.json").read_bytes())
                listed = {row["handle"] for row in index["entries"]}
                names = {one.at(None).path for one in tree.released(out)}
                assert listed <= names
        site.site(root, out)
        assert assert_site(root, out) == [MODEL.at(1)]
        shutil.rmtree(out)
