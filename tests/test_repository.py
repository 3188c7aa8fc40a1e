"""A version appears whole or not at all, whatever happens to its publisher."""

import json
import os
import pathlib
import shutil
import stat
import subprocess
import sys

import fake_publications as fake
import pytest

from bit_tf import errors, files, handles
from hub_export import repository, tree

MODEL = handles.Handle.parse(fake.MODEL)


@pytest.fixture(autouse=True)
def _faked(monkeypatch):
    fake.patch(monkeypatch)


@pytest.fixture
def plain_pages(monkeypatch):
    fake.patch_pages(monkeypatch)


def run(*arguments):
    process = subprocess.run(
        [sys.executable, fake.__file__, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert process.returncode == 0, process.stderr
    return process.stdout.splitlines()


def test_a_version_and_all_around_it(tmp_path):
    root = tmp_path / "new" / "root"
    found = fake.publish(root, title="Ours", url="https://x.org/hub/")
    assert found.handle == MODEL.at(1)
    assert fake.assert_whole(root) == [MODEL.at(1)]
    folder = tree.directory(root, found.handle)
    assert {path.name for path in folder.iterdir()} == {
        "card.md",
        "entry.json",
        "index.html",
        "model",
        "model.tar.gz",
    }
    assert os.readlink(root / f"{fake.MODEL}/1.tar.gz") == "1/model.tar.gz"
    assert tree.read(root, found.handle) == found
    index = json.loads((root / "index.json").read_bytes())
    assert index == {
        "schema": 1,
        "title": "Ours",
        "url": "https://x.org/hub",
        "entries": [json.loads(found.to_json())],
    }
    text = (root / "assets/docs/google/models/bit/m-r50x1/1.md").read_text()
    assert f"https://x.org/hub/{fake.MODEL}/1.tar.gz" in text


def test_versions_and_the_index(tmp_path):
    fake.publish(tmp_path, f"{fake.MODEL}/3", url="https://x.org")
    fake.publish(tmp_path, fake.CLASSIFIER)
    fake.publish(tmp_path, f"{fake.MODEL}/1")
    assert fake.publish(tmp_path).handle.version == 4
    assert fake.publish(tmp_path, f"{fake.MODEL}/20").handle.version == 20
    assert fake.publish(tmp_path, version=5).handle.version == 5
    found = fake.assert_whole(tmp_path)
    assert [handle.path.removeprefix(fake.MODEL) for handle in found] == [
        "/1",
        "/3",
        "/4",
        "/5",
        "/20",
        "/ilsvrc2012_classification/1",
    ]
    index = json.loads((tmp_path / "index.json").read_bytes())
    rows = [(row["handle"], row["version"]) for row in index["entries"]]
    assert rows == sorted(rows)
    # Kept from the first time.
    assert index["url"] == "https://x.org"
    newest = (tmp_path / fake.MODEL / "entry.json").read_bytes()
    assert handles.Release.parse(newest).handle == MODEL.at(20)


def test_a_version_is_immutable(tmp_path):
    fake.publish(tmp_path)
    before = fake.snapshot(tmp_path)
    with pytest.raises(errors.ExportError, match=r"immutable.*as version 2"):
        fake.publish(tmp_path, f"{fake.MODEL}/1")
    assert fake.snapshot(tmp_path) == before


def test_the_highest_number_has_none_after_it(tmp_path):
    fake.publish(tmp_path, f"{fake.MODEL}/999999999")
    with pytest.raises(errors.ExportError, match="nine digits"):
        fake.publish(tmp_path)
    assert fake.publish(tmp_path, version=1).handle.version == 1


def test_permissions_whatever_the_umask(tmp_path):
    root = tmp_path / "root"
    before = os.umask(0o077)
    try:
        fake.publish(root)
    finally:
        os.umask(before)
    for path in [root, *root.rglob("*")]:
        if path.is_symlink():
            continue
        private = ".locks" in path.parts or ".staging" in path.parts
        if not private:
            mode = 0o755 if path.is_dir() else 0o644
            assert stat.S_IMODE(path.stat().st_mode) == mode, path
    for name in (".locks", ".staging"):
        assert stat.S_IMODE((root / name).stat().st_mode) == 0o700


@pytest.mark.parametrize("kind", ["other files", "a file", "a later schema"])
def test_what_is_no_repository_is_left_alone(tmp_path, kind):
    root = tmp_path / "root"
    if kind == "a file":
        root.write_text("mine")
    else:
        root.mkdir()
        (root / "photo.jpg").write_text("mine")
    if kind == "a later schema":
        index = {"schema": 2, "title": "x", "url": None, "entries": []}
        (root / "index.json").write_text(json.dumps(index))
    before = fake.snapshot(tmp_path)
    with pytest.raises(errors.ExportError):
        fake.publish(root)
    after = fake.snapshot(tmp_path)
    for name in ("root/.locks", "root/.staging"):
        after.pop(name, None)
    after = {name: v for name, v in after.items() if ".locks/" not in name}
    assert after == before


def test_a_hidden_file_does_not_make_a_directory_somebody_elses(tmp_path):
    (tmp_path / ".git").mkdir()
    fake.publish(tmp_path)
    assert tree.released(tmp_path) == [MODEL.at(1)]


@pytest.mark.parametrize(
    "name",
    ["google/BIT/m-r50x1", "google/bit/M-R50X1", "google/bit/m-r50x1/a/x"],
)
def test_names_that_some_file_systems_fold(tmp_path, name):
    fake.publish(tmp_path)
    fake.publish(tmp_path, "google/bit/m-r50x1/A/x")
    before = fake.snapshot(tmp_path)
    with pytest.raises(errors.ExportError, match="case of letters"):
        fake.publish(tmp_path, name)
    after = fake.snapshot(tmp_path)
    changed = {name for name in after if after.get(name) != before.get(name)}
    assert all(name.startswith(".locks") for name in changed)


@pytest.mark.parametrize("kind", ["link", "dead link", "file"])
def test_a_folder_that_is_none(tmp_path, kind):
    root, other = tmp_path / "root", tmp_path / "other"
    root.mkdir()
    if kind == "file":
        (root / "google").write_text("mine")
    else:
        if kind == "link":
            other.mkdir()
        (root / "google").symlink_to(other)
    (root / ".locks").mkdir()
    with pytest.raises(errors.ExportError, match="a link or a file"):
        fake.publish(root)
    assert not other.exists() or list(other.iterdir()) == []


@pytest.mark.parametrize(
    "path", ["2", "2/notes.txt", "2.tar.gz", "link", "own link"]
)
def test_what_is_in_the_way_is_not_lost(tmp_path, path):
    fake.publish(tmp_path)
    model = tmp_path / fake.MODEL
    if path.endswith("link"):
        target = "2/model.tar.gz" if path == "own link" else "1/model.tar.gz"
        (model / "2.tar.gz").symlink_to(target)
    elif path == "2":
        (model / path).mkdir()
    else:
        (model / path).parent.mkdir(exist_ok=True)
        (model / path).write_text("mine")
    before = fake.snapshot(model)
    if path == "own link":
        # Left by a publisher that was killed before the rename.
        assert fake.publish(tmp_path).handle.version == 2
        fake.assert_whole(tmp_path)
        return
    with pytest.raises(errors.ExportError, match="no published version"):
        fake.publish(tmp_path)
    assert fake.snapshot(model) == before
    assert fake.publish(tmp_path, version=3).handle.version == 3


@pytest.mark.parametrize("damage", ["cut", "empty", "other", "gone"])
def test_a_damaged_entry_stops_everything(tmp_path, damage):
    fake.publish(tmp_path)
    fake.publish(tmp_path, fake.CLASSIFIER)
    path = tmp_path / fake.MODEL / "1" / "entry.json"
    if damage == "other":
        shutil.copy(tmp_path / fake.CLASSIFIER / "1" / "entry.json", path)
    elif damage == "gone":
        path.unlink()
        path.mkdir()
    else:
        text = path.read_text()
        path.write_text("" if damage == "empty" else text[: len(text) // 2])
    before = fake.snapshot(tmp_path)
    if damage == "gone":
        with pytest.raises(errors.ExportError, match="no published version"):
            fake.publish(tmp_path, version=1)
        return
    for work in (repository.refresh, fake.publish):
        with pytest.raises(errors.ExportError, match=r"entry\.json") as caught:
            work(tmp_path)
        assert str(path) in str(caught.value)
    assert fake.snapshot(tmp_path) == before


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"schema": 1}', "\xff"])
def test_a_damaged_index_is_not_guessed(tmp_path, text):
    fake.publish(tmp_path, url="https://x.org")
    (tmp_path / "index.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(errors.ExportError, match="delete it"):
        fake.publish(tmp_path)
    (tmp_path / "index.json").unlink()
    assert fake.publish(tmp_path).handle.version == 2
    fake.assert_whole(tmp_path)
    assert repository.index(tmp_path).url is None


def test_a_first_publication_that_fails_keeps_address_and_title(
    tmp_path, monkeypatch
):
    def fail(*arguments, **options):
        raise errors.VerificationError("as if")

    with monkeypatch.context() as patched:
        patched.setattr(repository, "commit", fail)
        with pytest.raises(errors.VerificationError):
            fake.publish(tmp_path, title="Ours", url="https://x.org")
    assert tree.released(tmp_path) == []
    assert repository.index(tmp_path).title == "Ours"
    fake.publish(tmp_path)
    fake.assert_whole(tmp_path)
    assert repository.index(tmp_path).url == "https://x.org"


def test_address_and_title_are_written_first(tmp_path, monkeypatch):
    written = []
    replace = repository.replace_file

    def note(path, content):
        written.append(path.name)
        return replace(path, content)

    monkeypatch.setattr(repository, "replace_file", note)
    fake.publish(tmp_path, title="Ours")
    assert written[0] == "index.json"


def test_an_unfinished_repository(tmp_path):
    assert not repository.is_unfinished(tmp_path)
    (tmp_path / ".locks").mkdir()
    assert repository.is_unfinished(tmp_path)
    fake.publish(tmp_path)
    assert not repository.is_unfinished(tmp_path)


def test_refresh_writes_what_differs_only(tmp_path):
    fake.publish(tmp_path)
    times = {
        path: path.lstat().st_mtime_ns
        for path in tmp_path.rglob("*")
        if ".locks" not in path.parts
    }
    repository.refresh(tmp_path)
    assert times == {path: path.lstat().st_mtime_ns for path in times}
    (tmp_path / "index.html").write_text("damaged")
    (tmp_path / fake.MODEL / "index.html").unlink()
    repository.refresh(tmp_path)
    fake.assert_whole(tmp_path)


def test_refresh_removes_what_belongs_to_versions_that_are_gone(tmp_path):
    fake.publish(tmp_path)
    fake.publish(tmp_path)
    fake.publish(tmp_path, "else/where/model")
    (tmp_path / "else" / "readme.txt").write_text("mine")
    shutil.rmtree(tmp_path / fake.MODEL / "2")
    shutil.rmtree(tmp_path / "else" / "where" / "model" / "1")
    half = tmp_path / "google" / f".index.html.{16 * '0'}.tmp"
    half.write_text("half a page")
    (tmp_path / "google" / ".mine.tmp").write_text("mine")
    found = repository.refresh(tmp_path)
    assert [one.handle for one in found] == [MODEL.at(1)]
    left = {path.name for path in tmp_path.rglob("*") if path.is_file()}
    assert {"readme.txt", ".mine.tmp"} <= left
    assert not half.exists()
    assert not os.path.lexists(tmp_path / fake.MODEL / "2.tar.gz")
    assert not (tmp_path / "else" / "where").exists()
    assert not (tmp_path / "assets/docs/else").exists()
    (tmp_path / "google" / ".mine.tmp").unlink()
    fake.assert_whole(tmp_path)


@pytest.mark.parametrize(
    "url", ["x.org", "ftp://x.org", "https://", "https://a b", "https://x/?q"]
)
def test_addresses_that_are_none(tmp_path, url):
    with pytest.raises(errors.ExportError, match="address"):
        fake.publish(tmp_path / "root", url=url)
    assert not (tmp_path / "root").exists()


@pytest.mark.parametrize("title", ["", "two\nlines", "x" * 201, 7])
def test_titles_that_are_none(tmp_path, title):
    with pytest.raises(errors.ExportError, match="title"):
        fake.publish(tmp_path / "root", title=title)
    assert not (tmp_path / "root").exists()


def test_long_names(tmp_path):
    name = "/".join(["a"] + ["x" * 100] * 7)
    for _ in range(2):
        fake.publish(tmp_path, name)
    assert fake.assert_whole(tmp_path)[-1].version == 2


def test_left_overs_of_this_model_only_are_removed(tmp_path):
    fake.publish(tmp_path)
    staging = tmp_path / ".staging"
    old = staging / f"google%2Fbit%2Fm-r50x1.{16 * 'a'}"
    others = [
        staging / f"google%2Fbit%2Fm-r50x1.{16 * 'a'}.{16 * 'b'}",
        staging / f"google%2Fbit%2Fm-r50x3.{16 * 'a'}",
        staging / "mine",
    ]
    for path in [old, *others]:
        (path / "model").mkdir(parents=True)
    fake.publish(tmp_path)
    assert sorted(staging.iterdir()) == sorted(others)


def test_a_failure_leaves_nothing(tmp_path, monkeypatch):
    fake.publish(tmp_path)
    before = fake.snapshot(tmp_path)

    def fail(*arguments, **options):
        raise errors.VerificationError("as if")

    monkeypatch.setattr(repository, "commit", fail)
    with pytest.raises(errors.VerificationError, match="as if"):
        fake.publish(tmp_path)
    assert fake.snapshot(tmp_path) == before


def test_what_failed_after_the_rename_is_said(tmp_path, monkeypatch):
    fake.publish(tmp_path)
    replace = repository.replace_file

    def fail(path, content):
        same = repository.same_file(path, content)
        if path == tmp_path / "index.json" and not same:
            raise OSError(28, "No space left on device")
        return replace(path, content)

    monkeypatch.setattr(repository, "replace_file", fail)
    with pytest.raises(errors.ExportError, match="is published, but not in"):
        fake.publish(tmp_path)
    monkeypatch.undo()
    with fake.faked():
        assert fake.assert_readable(tmp_path) == [MODEL.at(1), MODEL.at(2)]
        # Also one that fails brings it up to date.
        with pytest.raises(errors.ExportError, match="immutable"):
            fake.publish(tmp_path, version=2)
        fake.assert_whole(tmp_path)


def test_an_unwritable_root(tmp_path, monkeypatch):
    def fail(*arguments, **options):
        raise PermissionError(13, "Permission denied", str(tmp_path))

    monkeypatch.setattr(files.os, "rename", fail)
    with pytest.raises(errors.ExportError, match="Permission denied"):
        fake.publish(tmp_path)
    assert tree.released(tmp_path) == []
    assert list((tmp_path / ".staging").iterdir()) == []


def test_a_crash_at_every_step(tmp_path, plain_pages):
    (count,) = map(int, run("crash", tmp_path))
    assert count > 60
    first = fake.snapshot(tmp_path / "start" / fake.MODEL / "1")
    seen = set()
    for number in range(count):
        root = tmp_path / str(number)
        found = fake.assert_readable(root)
        seen.add(len(found))
        assert [MODEL.at(1), MODEL.at(2)][: len(found)] == found
        assert fake.snapshot(root / fake.MODEL / "1") == first
        assert fake.publish(root).handle.version == len(found) + 1
        assert fake.assert_whole(root) == [*found, MODEL.at(len(found) + 1)]
        shutil.rmtree(root)
    assert seen == {1, 2}


def test_ten_publishers_of_one_version(tmp_path, plain_pages):
    lines = run("race", tmp_path / "root", 10)
    assert sorted(line.split(":")[0] for line in lines) == ["lost"] * 9 + [
        "won"
    ]
    for line in lines:
        if line != "won":
            assert "immutable" in line
    assert fake.assert_whole(tmp_path / "root") == [MODEL.at(7)]


def test_a_full_disk(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(disk)],
        capture_output=True,
    )
    if mounted.returncode:
        pytest.skip(
            "no tmpfs could be mounted; run as root: "
            "pytest tests/test_repository.py"
        )
    try:
        root = disk / "root"
        fake.publish(root)

        def fill():
            for _ in range(50):
                fake.publish(root)

        with pytest.raises(errors.ExportError, match="No space left"):
            fill()
        found = fake.assert_readable(root)
        assert 1 < len(found) < 50
        assert list((root / ".staging").iterdir()) == []
        # With room again, it goes on.
        subprocess.run(
            ["mount", "-o", "remount,size=1m", str(disk)], check=True
        )
        fake.publish(root)
        assert fake.assert_whole(root)[:-1] == found
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_folders_are_made_for_everybody(tmp_path):
    path = pathlib.Path(tmp_path, "a", "b", "c")
    before = os.umask(0o077)
    try:
        repository.make_folder(path)
    finally:
        os.umask(before)
    for folder in (path, path.parent, path.parent.parent):
        assert stat.S_IMODE(folder.stat().st_mode) == 0o755
