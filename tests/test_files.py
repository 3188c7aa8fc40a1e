import errno
import hashlib
import os
import pathlib
import re
import stat
import sys
import threading
import time

import pytest

from bit_tf import files


def test_a_file_appears_whole_or_not_at_all(tmp_path):
    path = tmp_path / "file"
    with files.new_file(path) as file:
        file.write(b"one")
        assert not path.exists()
    assert path.read_bytes() == b"one"

    class Stopped(Exception):
        pass

    def fail():
        with files.new_file(path) as file:
            file.write(b"two")
            raise Stopped

    with pytest.raises(Stopped):
        fail()
    assert path.read_bytes() == b"one"
    with files.new_file(path) as file:
        file.write(b"three")
    assert path.read_bytes() == b"three"
    assert os.listdir(tmp_path) == ["file"]
    assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~umask()


def umask():
    value = os.umask(0)
    os.umask(value)
    return value


def test_a_directory_appears_whole_or_not_at_all(tmp_path):
    path = tmp_path / "a" / "b"
    with files.new_directory(path) as staging:
        with open(os.path.join(staging, "file"), "w") as file:
            file.write("one")
        assert not path.exists()
    assert (path / "file").read_text() == "one"
    assert stat.S_IMODE(path.stat().st_mode) == 0o777 & ~umask()
    with (
        pytest.raises(OSError, match="not empty"),
        files.new_directory(path) as staging,
    ):
        pass
    assert (path / "file").read_text() == "one"
    with files.new_directory(path, overwrite=True):
        pass
    assert list(path.iterdir()) == []
    assert os.listdir(path.parent) == ["b"]


def test_a_failed_rename_puts_the_old_directory_back(tmp_path, monkeypatch):
    path = tmp_path / "path"
    path.mkdir()
    (path / "file").write_text("old")
    rename, calls = os.rename, []

    def fail(source, target):
        calls.append(target)
        if len(calls) == 2:
            raise OSError(5, "Input/output error")
        rename(source, target)

    monkeypatch.setattr(files, "_exchange", lambda one, other: False)
    monkeypatch.setattr(files.os, "rename", fail)
    with (
        pytest.raises(OSError, match="Input/output"),
        files.new_directory(path, overwrite=True),
    ):
        pass
    assert (path / "file").read_text() == "old"
    assert os.listdir(tmp_path) == ["path"]


@pytest.mark.skipif(
    sys.platform != "linux",
    reason="exchanges names on Linux alone; run pytest tests/test_files.py "
    "there",
)
def test_something_is_there_at_any_moment(tmp_path, monkeypatch):
    path = tmp_path / "path"
    path.mkdir()
    (path / "file").write_text("old")

    def fail(source, target):
        raise AssertionError("there is nothing between two renames")

    monkeypatch.setattr(files.os, "rename", fail)
    with files.new_directory(path, overwrite=True) as staging:
        pathlib.Path(staging, "file").write_text("new")
    assert (path / "file").read_text() == "new"
    assert os.listdir(tmp_path) == ["path"]


def test_what_cannot_be_replaced(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(OSError), files.new_directory("/", overwrite=True):
        pass
    with pytest.raises(OSError), files.new_file("/"):
        pass
    with (
        pytest.raises(IsADirectoryError, match=re.escape(f"'{tmp_path}'")),
        files.new_file(tmp_path),
    ):
        pytest.fail("nothing is written for a name that is taken")


@pytest.mark.parametrize("kind", ["file", "link", "broken link"])
def test_overwriting_what_is_no_directory(tmp_path, kind):
    path, other = tmp_path / "path", tmp_path / "other"
    if kind == "file":
        path.write_text("old")
    else:
        other.mkdir()
        path.symlink_to(other)
        (other / "file").write_text("stays")
    if kind == "broken link":
        path.unlink()
        path.symlink_to(tmp_path / "nowhere")
    with files.new_directory(path, overwrite=True):
        pass
    assert path.is_dir()
    assert not path.is_symlink()
    if kind == "link":
        assert (other / "file").read_text() == "stays"


def test_the_names_in_a_directory_are_synced_too(tmp_path, monkeypatch):
    synced = []
    sync = os.fsync

    def recorded(descriptor):
        synced.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        sync(descriptor)

    monkeypatch.setattr(files.os, "fsync", recorded)
    with files.new_file(tmp_path / "file") as file:
        file.write(b"one")
    assert synced[-1] == str(tmp_path)
    assert len(synced) == 2
    synced.clear()
    with files.new_directory(tmp_path / "folder") as staging:
        for name in ("a", "b"):
            with open(os.path.join(staging, name), "w"):
                pass
    assert [os.path.basename(path) for path in synced[:-2]] == ["a", "b"] or [
        os.path.basename(path) for path in synced[:-2]
    ] == ["b", "a"]
    assert synced[-1] == str(tmp_path)


def test_file_systems_that_cannot_sync_a_directory(tmp_path, monkeypatch):
    def refuse(descriptor):
        raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(files.os, "fsync", refuse)
    files.sync(tmp_path)

    def fail(descriptor):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(files.os, "fsync", fail)
    with pytest.raises(OSError, match="Input/output"):
        files.sync(tmp_path)


def test_a_lock_keeps_others_waiting(tmp_path, caplog):
    inside = []

    def work(name):
        with files.locked(tmp_path / "lock", "works"):
            inside.append(name)
            assert len(inside) == 1
            time.sleep(0.1)
            inside.remove(name)
            done.append(name)

    done = []
    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(done) == [0, 1, 2, 3]


def test_measure(tmp_path):
    (tmp_path / "file").write_bytes(b"abc")
    digest = hashlib.sha256(b"abc").hexdigest()
    assert files.measure(tmp_path / "file") == (3, digest)
    with pytest.raises(FileNotFoundError):
        files.measure(tmp_path / "none")
