"""tensorflow_hub's cache: what is found in it, what is put there."""

import json
import os
import pathlib
import shutil
import socket
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import tiny_models

from bit_tf import (
    archive,
    errors,
    files,
    handles,
    hub_cache,
    hub_install,
    integrity,
)

HANDLE = "https://tfhub.dev/google/bit/m-r50x1/1"
OTHER = "http://127.0.0.1:1/a/b/1"
INDEX = "variables/variables.index"
SHARD = "variables/variables.data-00000-of-00001"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_models.save(tmp_path_factory.mktemp("model") / "model")


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    return tiny_models.save(tmp_path_factory.mktemp("other") / "model", 1)


@pytest.fixture
def copy(model, tmp_path):
    return shutil.copytree(model, tmp_path / "copy")


def put(root, handle, model, **options):
    """Installs a model under one handle: its entry."""
    places = {hub_cache.key(handle): handle}
    outcome = hub_install.install(
        places, model, root=root, origin="here", **options
    )
    entry = hub_cache.entry(root, hub_cache.key(handle))
    return entry, outcome[entry.key]


def kinds(problems):
    return [problem.kind for problem in problems]


def empty(path):
    shutil.rmtree(path)
    path.mkdir()


def as_file(path):
    shutil.rmtree(path)
    path.write_text("not a directory")


def dangling(path):
    shutil.rmtree(path)
    path.symlink_to(path.with_name("nowhere"))


def looped(path):
    shutil.rmtree(path)
    path.symlink_to(path)


def looped_inside(path):
    (path / "variables" / "again").symlink_to(path)


def cut(name, size):
    def damage(path):
        os.truncate(path / name, size)

    damage.__name__ = f"cut {name} to {size}"
    return damage


def lost(name):
    def damage(path):
        (path / name).unlink()

    damage.__name__ = f"lost {name}"
    return damage


def without_variables(path):
    shutil.rmtree(path / "variables")


def zeros(path):
    size = (path / "saved_model.pb").stat().st_size
    (path / "saved_model.pb").write_bytes(bytes(size))


def page(path):
    (path / "saved_model.pb").write_text("<!doctype html><p>Log in")


def flipped_index(path):
    data = bytearray((path / INDEX).read_bytes())
    data[10] ^= 1
    (path / INDEX).write_bytes(data)


def lost_asset(path):
    next((path / "assets").iterdir()).unlink()


DAMAGES = [
    ("empty", empty),
    ("no directory", as_file),
    ("no directory", dangling),
    ("link loop", looped),
    ("link loop", looped_inside),
    ("no graph", lost("saved_model.pb")),
    ("damaged graph", cut("saved_model.pb", 0)),
    ("damaged graph", cut("saved_model.pb", 100)),
    ("damaged graph", zeros),
    ("damaged graph", page),
    ("no index", lost(INDEX)),
    ("no index", without_variables),
    ("damaged index", cut(INDEX, 0)),
    ("damaged index", cut(INDEX, 60)),
    ("damaged index", flipped_index),
    ("short data", lost(SHARD)),
    ("short data", cut(SHARD, 10)),
    ("missing file", lost_asset),
]


@pytest.mark.parametrize(
    ("kind", "damage"),
    DAMAGES,
    ids=[f"{damage.__name__}" for _, damage in DAMAGES],
)
@pytest.mark.parametrize("recorded", [False, True])
def test_damage_is_found_by_names_and_sizes(copy, kind, damage, recorded):
    expected = integrity.contents(copy) if recorded else None
    assert integrity.examine(copy, expected=expected) == []
    damage(copy)
    found = integrity.examine(copy, expected=expected)
    # With a record, a wrong size is found also of what is not looked into.
    assert kinds(found)[0] == kind
    assert all(problem.breaks for problem in found)


def test_changed_bytes_are_found_by_reading(copy):
    expected = integrity.contents(copy)
    path = copy / SHARD
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    for options in ({"expected": expected}, {}):
        assert integrity.examine(copy, **options) == []
        (problem,) = integrity.examine(copy, thorough=True, **options)
        assert problem.kind == "changed bytes"
        assert "variables" in str(problem)


def test_every_cut_of_a_graph_is_found(copy):
    path = copy / "saved_model.pb"
    data = path.read_bytes()
    for size in range(0, len(data), 97):
        path.write_bytes(data[:size])
        assert kinds(integrity.examine(copy))[0] == "damaged graph", size


def test_random_bytes_do_not_stop_it(copy):
    rng = np.random.default_rng(0)
    for name in ("saved_model.pb", INDEX):
        data = (copy / name).read_bytes()
        for _ in range(150):
            changed = np.frombuffer(data, np.uint8).copy()
            where = rng.integers(0, len(data), 3)
            changed[where] = rng.integers(0, 256, 3)
            (copy / name).write_bytes(changed.tobytes())
            integrity.examine(copy)
        (copy / name).write_bytes(data)


def test_other_saved_models(tmp_path):
    import tensorflow as tf

    # TensorFlow 1 has no file of variables where there are none.
    graph = tf.Graph()
    with graph.as_default(), tf.compat.v1.Session(graph=graph) as session:
        builder = tf.compat.v1.saved_model.Builder(str(tmp_path / "one"))
        builder.add_meta_graph_and_variables(session, ["serve"])
        builder.save()
    tf.saved_model.save(tf.Module(), str(tmp_path / "two"))
    text = tmp_path / "text"
    text.mkdir()
    (text / "saved_model.pbtxt").write_text("saved_model_schema_version: 1")
    for name in ("one", "two", "text"):
        for thorough in (False, True):
            path = tmp_path / name
            assert integrity.examine(path, thorough=thorough) == [], name


def test_the_names_are_those_of_tensorflow_hub(tmp_path, monkeypatch, model):
    from tensorflow_hub import compressed_module_resolver, resolver

    monkeypatch.setenv("TFHUB_CACHE_DIR", str(tmp_path))
    directory = compressed_module_resolver._module_dir(HANDLE)
    assert directory == str(tmp_path / hub_cache.key(HANDLE))
    assert hub_cache.directory() == tmp_path
    assert hub_cache.directory(tmp_path / "x") == tmp_path / "x"
    shutil.copytree(model, directory)
    resolver._write_module_descriptor_file(HANDLE, directory)
    (entry,) = hub_cache.entries(tmp_path)
    assert entry.described == entry.handle == HANDLE
    assert hub_cache.examine(entry, thorough=True) == []
    theirs = entry.descriptor.read_text().split("\n")
    hub_cache.write_descriptor(entry, HANDLE)
    ours = entry.descriptor.read_text().split("\n")
    for a, b in zip(theirs, ours, strict=True):
        assert a.partition(": ")[0] == b.partition(": ")[0]
    assert ours[0] == theirs[0]
    assert ours[2] == theirs[2]
    text = resolver._lock_file_contents("abc")
    pathlib.Path(resolver._lock_filename(directory)).write_text(text)
    assert entry.download.task == "abc"
    assert entry.download.living
    monkeypatch.setenv("TFHUB_CACHE_DIR", "gs://bucket")
    with pytest.raises(errors.HandleError, match="gs://bucket"):
        hub_cache.directory()


def test_a_handle_is_known_without_a_descriptor(tmp_path, model):
    kaggle = handles.kaggle_twin(handles.known(HANDLE))
    for handle in (HANDLE, kaggle, OTHER):
        entry, _ = put(tmp_path, handle, model)
        assert kinds(hub_cache.examine(entry)) == []
        entry.record.unlink()
        entry.descriptor.unlink()
        (entry,) = [
            e for e in hub_cache.entries(tmp_path) if e.key == entry.key
        ]
        known = handle != OTHER
        assert entry.handle == (handle if known else None)
        assert entry.shown == (handle if known else entry.key)
        # Nobody could write it anew.
        expected = ["descriptor"] if known else []
        assert kinds(hub_cache.examine(entry)) == expected


@pytest.mark.parametrize(
    "text", [b"", b"Module: \n", b"\xff\xfe", b"Module: https://x/y/1\n", b"M"]
)
def test_descriptors_of_something_else(tmp_path, model, text):
    entry, _ = put(tmp_path, HANDLE, model)
    entry.descriptor.write_bytes(text)
    entry = hub_cache.entry(tmp_path, entry.key)
    assert kinds(hub_cache.examine(entry)) == ["descriptor"]
    assert entry.handle == HANDLE


def dead_pid():
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_locks_and_temporary_folders(tmp_path):
    entry = hub_cache.Entry(tmp_path, hub_cache.key(HANDLE))
    folder = tmp_path / f"{entry.key}.abc.tmp"
    (folder / "variables").mkdir(parents=True)

    def look(text):
        entry.lock.write_text(text)
        found = hub_cache.entry(tmp_path, entry.key)
        return found.download, kinds(hub_cache.examine(found))

    host = socket.gethostname()
    download, found = look(f"{host}.{os.getpid()}.abc")
    assert download.living
    assert found == []
    # What arrives for another task is no part of this download.
    assert look(f"{host}.{os.getpid()}.abd")[1] == ["left over"]
    download, found = look(f"{host}.{dead_pid()}.abc")
    assert not download.living
    assert found == ["stale lock", "left over"]
    assert look(f"elsewhere.com.{dead_pid()}.abc")[1] == []
    assert look("garbage")[0].living
    old = time.time() - hub_cache.IDLE - 10
    for text in (f"{host}.{os.getpid()}.abc", "elsewhere.1.abc", "garbage"):
        entry.lock.write_text(text)
        for path in (entry.lock, folder, folder / "variables"):
            os.utime(path, (old, old))
        found = hub_cache.entry(tmp_path, entry.key)
        assert kinds(hub_cache.examine(found)) == ["stale lock", "left over"]
    entry.lock.unlink()
    entry.lock.mkdir()
    assert hub_cache.entry(tmp_path, entry.key).download.living
    os.utime(entry.lock, (old, old))
    assert not hub_cache.entry(tmp_path, entry.key).download.living
    entry.lock.rmdir()
    # Clocks differ, but not by hours.
    entry.lock.write_text("elsewhere.1.abd")
    for ahead, living in ((30, True), (7200, False)):
        os.utime(entry.lock, (time.time() + ahead,) * 2)
        found = hub_cache.entry(tmp_path, entry.key)
        assert found.download.living == living
    problem, left = hub_cache.examine(found)
    assert problem.kind == "stale lock"
    assert "in the future" in problem.text
    assert left.kind == "left over"
    # It goes on where anything arrives.
    entry.lock.write_text("elsewhere.1.abc")
    os.utime(entry.lock, (old, old))
    (folder / "variables" / "new").write_text("")
    assert hub_cache.entry(tmp_path, entry.key).download.living


def test_left_overs(tmp_path):
    key = hub_cache.key(HANDLE)
    old = time.time() - 100
    names = [
        f".{key}.00.tmp",
        f".{key}.00.whole",
        f"..{key}.00.whole.00.tmp",
        f".{key}.descriptor.txt.00.tmp",
        f"{key}.descriptor.txt",
        f"{key}.record.json",
        f"{key}.lock.tmp00",
    ]
    for name in names:
        (tmp_path / name).write_text("")
        os.utime(tmp_path / name, (old, old))
    (tmp_path / f"{key}.lock.tmp01").write_text("")
    (tmp_path / "somebody's.txt").write_text("")
    (entry,) = hub_cache.entries(tmp_path)
    assert sorted(hub_cache.leftovers(entry)) == sorted(names)
    with hub_cache.writing(tmp_path):
        hidden = [name for name in names if name.startswith(".")]
        found = [problem.text for problem in hub_cache.examine(entry)]
        assert sorted(found) == sorted(set(names) - set(hidden))


def test_install_links_and_records(tmp_path, model):
    places = {hub_cache.key(text): text for text in handles.spellings(HANDLE)}
    packed = tmp_path / "model.tar.gz"
    size, digest = archive.pack(model, packed)
    root = tmp_path / "new" / "cache"
    outcome = hub_install.install(
        places,
        packed,
        root=root,
        origin="here",
        archive=handles.File("model.tar.gz", size, digest),
    )
    assert outcome == dict.fromkeys(places, "installed")
    entries = hub_cache.entries(root)
    assert {entry.handle for entry in entries} == set(places.values())
    inodes = {(entry.path / SHARD).stat().st_ino for entry in entries}
    assert len(inodes) == 1
    for entry in entries:
        assert integrity.contents(entry.path) == integrity.contents(model)
        assert entry.files == integrity.contents(model)
        assert entry.recorded["source"] == "here"
        assert entry.recorded["archive"] == [size, digest]
        assert hub_cache.examine(entry, thorough=True) == []
    assert sorted(os.listdir(root))[0] == ".writer.lock"
    assert not [name for name in os.listdir(root) if name.endswith("tmp")]
    kaggle = handles.kaggle_twin(handles.known(HANDLE))
    assert hub_cache.find(kaggle, root).key == hub_cache.key(kaggle)
    shutil.rmtree(root / hub_cache.key(kaggle))
    assert hub_cache.find(kaggle, root).handle in places.values()


def test_links_through_a_link_to_the_cache(tmp_path, model):
    (tmp_path / "real").mkdir()
    root = tmp_path / "link"
    root.symlink_to(tmp_path / "real")
    first, _ = put(root, HANDLE, model)
    second, _ = put(root, OTHER, first.path)
    assert os.path.samefile(first.path / SHARD, second.path / SHARD)
    # What lies elsewhere is not shared.
    assert not os.path.samefile(first.path / SHARD, model / SHARD)


@pytest.mark.parametrize("step", ["_require_same", "_require_whole"])
def test_what_is_not_checked_is_not_restored(
    tmp_path, model, monkeypatch, step
):
    key = hub_cache.key(HANDLE)
    seen = []

    def check(*args, **options):
        entry = hub_cache.entry(tmp_path, key)
        seen.append((hub_cache.set_aside(entry), len(entry.names)))

    monkeypatch.setattr(hub_install, step, check)
    put(tmp_path, HANDLE, model)
    # It is there, under a name that nobody takes for a model's.
    assert seen == [(None, 1)]


def test_a_failed_replacement_changes_nothing(
    tmp_path, model, other, monkeypatch
):
    entry, _ = put(tmp_path, HANDLE, model)
    rename = os.rename

    def fail(source, target):
        if str(source).endswith(".whole") and target == entry.path:
            raise OSError("no")
        rename(source, target)

    monkeypatch.setattr(os, "rename", fail)
    with pytest.raises(errors.HandleError, match="no"):
        put(tmp_path, HANDLE, other, existing="replace")
    entry = hub_cache.entry(tmp_path, entry.key)
    assert hub_cache.examine(entry, thorough=True) == []
    assert integrity.contents(entry.path) == integrity.contents(model)
    # Nobody knows any more which one a record was of.
    assert sorted(entry.names) == [entry.key, entry.descriptor.name]


def test_copies_where_there_are_no_hard_links(tmp_path, model, monkeypatch):
    def link(*args, **options):
        raise PermissionError("no links")

    monkeypatch.setattr(os, "link", link)
    places = {hub_cache.key(text): text for text in (HANDLE, OTHER)}
    hub_install.install(places, model, root=tmp_path, origin="here")
    inodes = set()
    for key in places:
        assert integrity.contents(tmp_path / key) == integrity.contents(model)
        inodes.add((tmp_path / key / SHARD).stat().st_ino)
    assert len(inodes) == 2


def test_what_is_there_already(tmp_path, model, other):
    entry, outcome = put(tmp_path, HANDLE, model)
    assert outcome == "installed"
    assert put(tmp_path, HANDLE, other)[1] == "kept"
    assert put(tmp_path, HANDLE, model, existing="refuse")[1] == "kept"
    with pytest.raises(errors.HandleError, match="--overwrite"):
        put(tmp_path, HANDLE, other, existing="refuse")
    assert integrity.contents(entry.path) == integrity.contents(model)
    assert put(tmp_path, HANDLE, other, existing="replace")[1] == "installed"
    assert integrity.contents(entry.path) == integrity.contents(other)
    for damage in (empty, as_file, dangling, looped, cut(SHARD, 3)):
        damage(entry.path)
        entry, outcome = put(tmp_path, HANDLE, model)
        assert outcome == "installed"
        assert hub_cache.examine(entry, thorough=True) == []
        empty(entry.path)
        put(tmp_path, HANDLE, other)
    entry.lock.write_text(f"{socket.gethostname()}.{os.getpid()}.ab")
    assert put(tmp_path, HANDLE, model)[1] == "busy"


def test_what_is_not_installed(tmp_path, model, copy, other):
    root = tmp_path / "cache"
    expected = integrity.contents(other)
    with pytest.raises(errors.DownloadError, match=r"files are those of its"):
        put(root, HANDLE, model, expected=expected)
    cut(SHARD, 3)(copy)
    with pytest.raises(errors.HandleError, match="short data"):
        put(root, HANDLE, copy)
    os.mkfifo(copy / "pipe")
    with pytest.raises(errors.ArchiveError, match="regular files"):
        put(root, HANDLE, copy)
    (copy / "pipe").unlink()
    (copy / "up").symlink_to(tmp_path)
    with pytest.raises(errors.ArchiveError, match="regular files"):
        put(root, HANDLE, copy)
    assert os.listdir(root) == [".writer.lock"]


def test_secrets_are_neither_recorded_nor_shown(tmp_path, model):
    for handle in (
        "http://user:secret@127.0.0.1:1/a/b/1",
        "http://127.0.0.1:1/a/b/1?token=secret",
    ):
        entry, _ = put(tmp_path, handle, model)
        assert "secret" not in entry.shown
        assert hub_cache.examine(entry) == []
        for name in entry.names:
            path = tmp_path / name
            if path.is_file():
                assert "secret" not in path.read_text()
        assert hub_cache.find(handle, tmp_path).key == entry.key


def test_writers_wait_for_each_other(tmp_path):
    order = []

    def write():
        with hub_cache.writing(tmp_path):
            order.append("second")

    with hub_cache.writing(tmp_path):
        thread = threading.Thread(target=write)
        thread.start()
        time.sleep(0.2)
        order.append("first")
    thread.join()
    assert order == ["first", "second"]


KILLER = """
import json, os, pathlib, shutil, sys
sys.path.insert(0, sys.argv[5])
from bit_tf import hub_cache, hub_install, integrity

root, old, new = map(pathlib.Path, sys.argv[1:4])
handle = sys.argv[4]
key = hub_cache.key(handle)
names = ("rename", "replace", "unlink", "rmdir", "mkdir", "fsync", "link")


def put(model):
    hub_install.install(
        {key: handle}, model, root=root, origin="here", existing="replace"
    )


def stop_at(number):
    count = 0

    def counted(real):
        def call(*args, **options):
            nonlocal count
            count += 1
            if count == number:
                os._exit(9)
            return real(*args, **options)

        return call

    for name in names:
        setattr(os, name, counted(getattr(os, name)))


contents = [integrity.contents(old), integrity.contents(new)]
number = 0
while True:
    number += 1
    shutil.rmtree(root, ignore_errors=True)
    put(old)
    child = os.fork()
    if not child:
        stop_at(number)
        put(new)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    stopped = os.waitstatus_to_exitcode(status) == 9
    entry = hub_cache.entry(root, key)
    there = entry.exists
    if not there:
        aside = hub_cache.set_aside(entry)
        os.rename(root / aside, entry.path)
    problems = hub_cache.damage(entry, thorough=False)
    assert not problems, (number, problems)
    found = integrity.contents(entry.path)
    assert found in contents, number
    recorded = entry.files
    assert recorded in ({}, found), number
    print(number, there, contents.index(found), bool(recorded))
    if not stopped:
        break
"""


def test_nothing_whole_is_lost_when_a_writer_is_killed(tmp_path, model, other):
    """At any step of replacing one whole model by another."""
    root = pathlib.Path(__file__).parent.parent
    done = subprocess.run(
        [sys.executable, "-c", KILLER, tmp_path, model, other, HANDLE, root],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    rows = [line.split() for line in done.stdout.splitlines()]
    assert len(rows) > 20
    # Both are seen, and the moment in which both lie aside.
    assert {row[2] for row in rows} == {"0", "1"}
    assert {row[1] for row in rows} == {"True", "False"}
    # What is restored can be compared.
    assert "True" in {row[3] for row in rows if row[1] == "False"}


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 64 kB."""
    path = tmp_path / "disk"
    path.mkdir()
    options = ["-t", "tmpfs", "-o", "size=64k", "tmpfs", str(path)]
    if subprocess.run(["mount", *options], capture_output=True).returncode:
        pytest.skip("mounting needs root; run the tests as root to run it")
    yield path
    subprocess.run(["umount", path], check=True)


def test_a_full_or_read_only_disk(small_disk, model, tmp_path):
    big = shutil.copytree(model, tmp_path / "big")
    (big / "assets" / "noise").write_bytes(os.urandom(2**16))
    entry, _ = put(small_disk, HANDLE, model)
    before = sorted(os.listdir(small_disk))
    with pytest.raises(errors.HandleError, match="TFHUB_CACHE_DIR"):
        put(small_disk, HANDLE, big, existing="replace")
    assert sorted(os.listdir(small_disk)) == before
    assert hub_cache.examine(entry, thorough=True) == []
    remount = ["mount", "-o", "remount,ro", str(small_disk)]
    subprocess.run(remount, check=True)
    assert hub_cache.find(HANDLE, small_disk).key == entry.key
    assert hub_cache.examine(entry, thorough=True) == []
    with pytest.raises(errors.HandleError, match="TFHUB_CACHE_DIR"):
        put(small_disk, OTHER, model)


def test_records_that_are_damaged_are_no_records(tmp_path, model):
    entry, _ = put(tmp_path, HANDLE, model)
    for value in (b"", b"[]", b'{"files": 3}', b'{"files": {"a": [1]}}'):
        entry.record.write_bytes(value)
        entry = hub_cache.entry(tmp_path, entry.key)
        assert entry.files == {}
        assert hub_cache.examine(entry, thorough=True) == []
    with files.new_file(entry.record) as file:
        rows = {"nothing": [3, "0" * 64]}
        file.write(json.dumps({"files": rows}).encode())
    entry = hub_cache.entry(tmp_path, entry.key)
    assert kinds(hub_cache.examine(entry)) == ["missing file"]
