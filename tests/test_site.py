"""Copies of a repository for hosts of plain files."""

import dataclasses
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
def _faked(monkeypatch):
    fake.patch(monkeypatch)


@pytest.fixture
def plain_pages(monkeypatch):
    fake.patch_pages(monkeypatch)


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
    assert result == site.Result((MODEL.at(1), CLASSIFIER.at(1)), (), (), ())
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
    "path",
    [
        "model.tar.gz",
        "model/saved_model.pb",
        "entry.json",
        "card.md",
        "index.html",
    ],
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


@pytest.mark.parametrize("kind", ["link", "pipe", "folder", "linked folder"])
@pytest.mark.parametrize("path", ["index.html", "model/saved_model.pb"])
def test_what_is_no_file_of_a_version_is_not_copied(root, tmp_path, kind, path):
    """Links are not followed, even to the right content; pipes do not hang."""
    bad = tree.directory(root, CLASSIFIER.at(1)) / path
    other = tmp_path / "other"
    if kind == "linked folder":
        bad.parent.rename(other)
        bad.parent.symlink_to(other)
    else:
        bad.rename(other)
        if kind == "link":
            bad.symlink_to(other)
        elif kind == "pipe":
            os.mkfifo(bad)
        else:
            bad.mkdir()
    with pytest.raises(errors.ExportError, match="regular files") as caught:
        site.site(root, tmp_path / "out")
    name = fake.CLASSIFIER if kind == "linked folder" else str(bad)
    assert name in str(caught.value)
    assert tree.released(tmp_path / "out") == [MODEL.at(1)]


def test_an_entry_without_hashes_of_its_pages(root, tmp_path):
    path = tree.directory(root, MODEL.at(1)) / "entry.json"
    described = tree.read(root, MODEL.at(1))
    path.write_text(dataclasses.replace(described, pages=()).to_json())
    with pytest.raises(errors.ExportError, match="hashes of its page"):
        site.site(root, tmp_path / "out")
    assert tree.released(tmp_path / "out") == []


DAMAGES = {
    "no archive": lambda folder: folder.with_name("1.tar.gz").unlink(),
    "a short archive": lambda folder: os.truncate(
        folder.with_name("1.tar.gz"), 10
    ),
    "no page": lambda folder: (folder / "index.html").unlink(),
    "an empty card": lambda folder: os.truncate(folder / "card.md", 0),
    "no entry": lambda folder: (folder / "entry.json").unlink(),
    "no model": lambda folder: shutil.rmtree(folder / "model"),
    "a short model": lambda folder: os.truncate(
        folder / "model" / "saved_model.pb", 1
    ),
    "one too many": lambda folder: (folder / "model" / "x").write_text("x"),
    "a folder too many": lambda folder: (folder / "2").mkdir(),
    "a link": lambda folder: (
        (folder / "model").rename(folder.parents[4] / "model"),
        (folder / "model").symlink_to(folder.parents[4] / "model"),
    ),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_version_that_is_not_whole_is_repaired(root, tmp_path, call, name):
    out = tmp_path / "out"
    site.site(root, out)
    DAMAGES[name](tree.directory(out, MODEL.at(1)))
    code, text, err = call("hub-export", "site", root, out)
    assert code == 0, err
    assert text == f"{out}: 0 versions copied, 1 kept, 1 repaired\n"
    assert f"Copying {fake.MODEL}/1 again, of which " in err
    assert_site(root, out)
    assert site.site(root, out).repaired == ()


def test_hidden_names_at_any_depth_are_refused(root, tmp_path):
    out = tmp_path / "out"
    site.site(root, out)
    (out / fake.MODEL / "1" / ".htpasswd").write_text("mine")
    before = fake.snapshot(out)
    with pytest.raises(errors.ExportError, match=r"1/\.htpasswd"):
        site.site(root, out)
    assert fake.snapshot(out) == before


def test_a_hidden_name_of_a_version_is_refused(root, tmp_path):
    path = tree.directory(root, MODEL.at(1)) / "entry.json"
    path.write_text(path.read_text().replace("saved_model.pb", ".hidden.pb"))
    with pytest.raises(errors.ExportError, match=r"\.hidden\.pb"):
        site.site(root, tmp_path / "out")


def test_an_unfinished_repository(tmp_path):
    (tmp_path / "root" / ".locks").mkdir(parents=True)
    with pytest.raises(errors.ExportError, match="Publish again"):
        site.site(tmp_path / "root", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_errors_of_the_system_are_a_sites(root, tmp_path, monkeypatch):
    def fail(*arguments, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(site, "_copy", fail)
    with pytest.raises(errors.ExportError, match="No space") as caught:
        site.site(root, tmp_path / "out")
    assert str(caught.value).startswith("A site is a directory")
    assert "publish" not in str(caught.value)


def test_a_configuration_for_nginx(root, tmp_path, call):
    out, file = tmp_path / "out", tmp_path / "nginx.conf"
    command = "hub-export", "site", root, out, "--nginx"
    code, _, err = call(*command, file, "--url", "https://y.org/")
    assert code == 0, err
    text = file.read_text()
    assert str(out) in text
    assert "server_name y.org;" in text
    code, _, err = call(*command, file, "--url", "http://[::1]:8080")
    assert code == 0, err
    assert "server_name _;" in file.read_text()
    code, _, err = call(*command, tmp_path)
    assert code == 1
    assert "directory" in err
    assert "configuration of nginx" in err
    assert "publish" not in err


def test_nginx_serves_no_address_with_a_path(root, tmp_path, call):
    out, file = tmp_path / "out", tmp_path / "nginx.conf"
    command = "hub-export", "site", root, out, "--nginx", file
    code, text, err = call(*command, "--url", "https://y.org/hub")
    assert (code, text) == (2, "")
    assert "https://y.org/hub" in err
    repository.refresh(root, url="https://x.org/models")
    code, text, err = call(*command)
    assert (code, text) == (2, "")
    assert "https://x.org/models" in err
    assert not out.exists()
    assert not file.exists()


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
