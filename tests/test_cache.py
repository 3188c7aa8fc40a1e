"""hub-export cache: list, verify, repair, seed, rm."""

import io
import json
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import time

import file_server
import numpy as np
import pytest
import tensorflow_hub
import tiny_models

from bit_tf import archive, errors, handles, hub_cache, hub_install, integrity
from hub_export import cache

ROOT = pathlib.Path(__file__).parent.parent
NAME = "google/bit/m-r50x1/1"
TFHUB = f"https://tfhub.dev/{NAME}"
INDEX = "variables/variables.index"
SHARD = "variables/variables.data-00000-of-00001"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_models.save(tmp_path_factory.mktemp("model") / "model")


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    return tiny_models.save(tmp_path_factory.mktemp("other") / "model", 1)


@pytest.fixture(scope="module")
def packed(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("packed") / "model.tar.gz"
    archive.pack(model, path)
    return path


@pytest.fixture
def root(tmp_path, monkeypatch):
    monkeypatch.setenv("TFHUB_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def web():
    with file_server.running() as server:
        yield server


@pytest.fixture
def run(call):
    """Runs `hub-export cache`: (exit code, what it printed as JSON)."""

    def cache_command(*arguments):
        code, out, err = call("hub-export", "cache", *arguments, "--json")
        assert code in (0, 1), err
        return code, json.loads(out) if out else err

    return cache_command


def dead_pid():
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def with_asset_lost(entry):
    next((entry.path / "assets").iterdir()).unlink()


def empty(entry):
    shutil.rmtree(entry.path)
    entry.path.mkdir()


def as_file(entry):
    shutil.rmtree(entry.path)
    entry.path.write_text("")


def with_link_loop(entry):
    shutil.rmtree(entry.path / "variables")
    (entry.path / "variables").symlink_to("variables")


def with_stale_lock(entry):
    text = f"{socket.gethostname()}.{dead_pid()}.abc"
    entry.lock.write_text(text)


def with_temporary_folder(entry):
    folder = entry.root / f"{entry.key}.abc.tmp"
    shutil.copytree(entry.path / "assets", folder / "assets")


def with_left_overs(entry):
    (entry.root / f".{entry.key}.0123456789abcdef.tmp").mkdir()


def with_other_descriptor(entry):
    entry.descriptor.write_text("Module: https://tfhub.dev/other/model/1\n")


DAMAGES = [
    ("empty", empty),
    ("no directory", as_file),
    ("no graph", lambda entry: (entry.path / "saved_model.pb").unlink()),
    ("damaged graph", lambda e: os.truncate(e.path / "saved_model.pb", 99)),
    ("no index", lambda entry: (entry.path / INDEX).unlink()),
    ("damaged index", lambda entry: flip(entry.path / INDEX)),
    ("short data", lambda entry: os.truncate(entry.path / SHARD, 9)),
    ("short data", lambda entry: (entry.path / SHARD).unlink()),
    ("changed bytes", lambda entry: flip(entry.path / SHARD)),
    ("missing file", with_asset_lost),
    ("link loop", with_link_loop),
    ("stale lock", with_stale_lock),
    ("left over", with_temporary_folder),
    ("left over", with_left_overs),
    ("descriptor", with_other_descriptor),
]


def test_every_damage_is_found_and_repaired(web, packed, model, root, run):
    """Entries that tensorflow_hub made, and loads again afterwards."""
    made = {}
    for number, (kind, damage) in enumerate(DAMAGES):
        web.bodies[f"/a/model{number}/1"] = packed.read_bytes()
        handle = f"{web.url}/a/model{number}/1"
        assert tensorflow_hub.resolve(handle) == str(
            root / hub_cache.key(handle)
        )
        entry = hub_cache.entry(root, hub_cache.key(handle))
        made[handle] = kind, damage, entry
    whole, found = run("verify")
    assert whole == 0
    assert len(found["entries"]) == len(DAMAGES)
    for _, damage, entry in made.values():
        damage(entry)
    code, found = run("verify")
    assert code == 1
    rows = {row["key"]: row for row in found["entries"]}
    for kind, _, entry in made.values():
        row = rows[entry.key]
        assert [problem["kind"] for problem in row["problems"]] == [kind]
        broken = kind in integrity.BREAKING
        assert row["state"] == ("broken" if broken else "whole")
    before = sorted(os.listdir(root))
    _, planned = run("repair", "--dry-run")
    assert sorted(os.listdir(root)) == before
    code, done = run("repair")
    assert code == 0, done
    assert {step["key"] for step in done["steps"]} == set(rows)
    actions = [(step["key"], step["action"]) for step in done["steps"]]
    assert actions == [(s["key"], s["action"]) for s in planned["steps"]]
    code, found = run("verify")
    assert code == 0, found
    assert run("repair") == (
        0,
        {"cache": str(root), "dry_run": False, "steps": []},
    )
    requests = len(web.seen)
    for handle, (_, _, entry) in made.items():
        assert tensorflow_hub.resolve(handle) == str(entry.path)
        assert integrity.contents(entry.path) == integrity.contents(model)
    loaded = tiny_models.features(tensorflow_hub.load(handle))
    expected = tiny_models.features(tensorflow_hub.load(str(model)))
    assert np.array_equal(loaded, expected)
    assert len(web.seen) == requests


def test_what_cannot_be_fetched_is_left(web, packed, root, run, call):
    for name in ("lost", "gone", "fine"):
        web.bodies[f"/a/{name}/1"] = packed.read_bytes()
        tensorflow_hub.resolve(f"{web.url}/a/{name}/1")
    lost, gone, _ = (
        hub_cache.entry(root, hub_cache.key(f"{web.url}/a/{name}/1"))
        for name in ("lost", "gone", "fine")
    )
    web.bodies.clear()
    (lost.path / INDEX).unlink()
    empty(gone)
    code, found = run("repair")
    assert code == 1
    steps = {step["key"]: step for step in found["steps"]}
    assert steps[lost.key]["action"] == "left"
    assert "404" in steps[lost.key]["detail"]
    assert (lost.path / "saved_model.pb").exists()
    # An empty directory is nothing to keep.
    assert steps[gone.key]["action"] == "removed"
    assert not gone.path.exists()
    code, out, _ = call("hub-export", "cache", "repair")
    assert code == 1
    assert f"left: {web.url}/a/lost/1" in out
    code, out, _ = call("hub-export", "cache", "verify")
    assert code == 1
    assert f"✗ broken      {web.url}/a/lost/1" in out
    assert "no index" in out
    assert f"✓ whole       {web.url}/a/fine/1" in out


def test_what_nobody_knows_is_removed(root, model, run):
    shutil.copytree(model, root / ("0" * 40))
    shutil.copytree(model, root / ("1" * 40))
    (root / ("1" * 40) / "saved_model.pb").unlink()
    code, found = run("verify")
    assert code == 1
    states = {row["handle"]: row["state"] for row in found["entries"]}
    assert states == {"0" * 40: "whole", "1" * 40: "broken"}
    code, found = run("repair")
    assert code == 0
    assert [step["action"] for step in found["steps"]] == ["removed"]
    assert [e.key for e in hub_cache.entries(root)] == ["0" * 40]


def test_repair_links_another_spelling(root, model, run):
    run("seed", f"{NAME}={model}")
    spellings = handles.spellings(TFHUB)
    lost = hub_cache.entry(root, hub_cache.key(spellings[3]))
    (lost.path / SHARD).unlink()
    code, found = run("repair", TFHUB)
    assert code == 0
    assert [step["action"] for step in found["steps"]] == ["linked"]
    keep = root / hub_cache.key(spellings[0]) / SHARD
    assert (lost.path / SHARD).stat().st_ino == keep.stat().st_ino
    assert run("verify")[0] == 0


def test_a_missing_descriptor_is_written_anew(root, model, run):
    run("seed", f"{NAME}={model}")
    entry = hub_cache.entry(root, hub_cache.key(TFHUB))
    entry.descriptor.unlink()
    entry.record.unlink()
    assert run("verify", NAME)[0] == 1
    _, found = run("repair", NAME)
    assert [step["action"] for step in found["steps"]] == ["rewritten"]
    assert hub_cache.entry(root, entry.key).described == TFHUB
    assert run("verify")[0] == 0


def test_a_model_that_lies_aside_is_put_back(root, model, run):
    run("seed", f"{NAME}={model}")
    entry = hub_cache.entry(root, hub_cache.key(TFHUB))
    aside = hub_cache.rename_away(entry.path, "old")
    assert run("verify", entry.key)[0] == 1
    _, planned = run("repair", entry.key, "--dry-run")
    assert aside.exists()
    code, found = run("repair", entry.key)
    assert found["steps"] == planned["steps"]
    assert code == 0
    actions = [(step["action"], step["detail"]) for step in found["steps"]]
    assert actions == [("restored", aside.name)]
    assert integrity.contents(entry.path) == integrity.contents(model)
    assert run("verify")[0] == 0


def test_unpacked_archives(root, packed, run, tmp_path):
    from bit_tf import hub

    path = tmp_path / "model.tar.gz"
    shutil.copy(packed, path)
    where = pathlib.Path(hub.resolve(path))
    _, found = run("verify")
    assert [row["handle"] for row in found["entries"]] == [str(path)]
    flip(where / SHARD)
    assert run("verify")[0] == 1
    code, found = run("repair")
    assert (code, found["steps"][0]["action"]) == (0, "fetched")
    assert run("verify")[0] == 0
    flip(where / SHARD)
    path.unlink()
    code, found = run("repair")
    assert (code, found["steps"][0]["action"]) == (0, "removed")
    assert not where.exists()


def test_a_living_download_is_left_alone(root, model, run):
    root.mkdir()
    handle = "http://127.0.0.1:9/a/b/1"
    key = hub_cache.key(handle)
    lock = root / f"{key}.lock"
    lock.write_text(f"{socket.gethostname()}.{os.getpid()}.abc")
    shutil.copytree(model, root / f"{key}.abc.tmp")
    (root / key).mkdir()
    before = sorted(root.rglob("*"))
    code, found = run("ls")
    assert found["entries"][0]["state"] == "downloading"
    assert run("verify")[0] == 0
    code, found = run("repair")
    assert (code, found["steps"][0]["action"]) == (1, "busy")
    code, found = run("seed", f"{handle}={model}")
    assert code == 1
    actions = {step["key"]: step["action"] for step in found["steps"]}
    assert actions.pop(key) == "busy"
    assert set(actions.values()) == {"installed"}
    for name in actions:
        assert run("rm", name)[0] == 0
    assert run("rm", key)[0] == 1
    left = set(root.rglob("*")) - {root / ".writer.lock"}
    assert sorted(left) == before


def test_two_writers_at_once(root, model, other):
    """Many processes seed and remove; each sees whole models only."""
    code = (
        "import sys\n"
        "from bit_tf import handles, hub_cache, hub_install\n"
        "import pathlib\n"
        "root, *models = map(pathlib.Path, sys.argv[1:])\n"
        "handle = 'http://127.0.0.1:9/a/b/1'\n"
        "key = hub_cache.key(handle)\n"
        "for number in range(10):\n"
        "    hub_install.install({key: handle}, models[number % 2], root=root,"
        " origin='x', existing='replace')\n"
        "    with hub_cache.writing(root):\n"
        "        entry = hub_cache.entry(root, key)\n"
        "        assert not hub_cache.examine(entry) or not entry.exists\n"
        "        if number % 5 == 4: hub_cache.remove(entry)\n"
    )
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code, root, model, other],
            cwd=ROOT,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(3)
    ]
    for process in processes:
        _, err = process.communicate(timeout=120)
        # Each may have waited for another, and says so.
        assert process.returncode == 0, err
    assert not [e for e in hub_cache.entries(root) if hub_cache.leftovers(e)]


OFFLINE = """
import json, socket, sys

def refuse(*args, **options):
    raise OSError("no network in this test")

socket.socket.connect = socket.socket.connect_ex = refuse
socket.getaddrinfo = socket.create_connection = refuse

import numpy as np
import tensorflow as tf
import tensorflow_hub

pictures = tf.ones([1, 4, 4, 3])
*seeded, other = sys.argv[1:]
for handle in seeded:
    output = tensorflow_hub.load(handle)(pictures)
    print(json.dumps(np.asarray(output).tolist()))
try:
    tensorflow_hub.load(other)
except OSError as error:
    print(error)
"""


def test_seeded_models_load_offline_in_every_spelling(root, model, run):
    code, found = run("seed", f"{NAME}={model}")
    assert code == 0
    spellings = handles.spellings(TFHUB)
    assert len(found["steps"]) == len(spellings)
    missing = f"{TFHUB[:-1]}2"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", OFFLINE, *spellings, missing],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    *lines, last = done.stdout.splitlines()
    expected = tiny_models.features(tensorflow_hub.load(str(model)))
    assert len(lines) == len(spellings)
    for line in lines:
        assert np.array_equal(np.float32(json.loads(line)), expected)
    assert "no network in this test" in last


def test_sources_of_seeds(root, model, other, tmp_path, web, run, call):
    published = tiny_models.as_published(model, NAME, tmp_path)
    repository = tmp_path / "repository"
    published.write(repository)
    version = repository / NAME
    published.serve(web)
    handle = f"{web.url}/x/y/1"
    expected = integrity.contents(model)

    def seed(source):
        code, found = run("seed", f"{handle}={source}")
        if code == 0:
            path = root / hub_cache.key(handle)
            assert integrity.contents(path) == expected
            shutil.rmtree(root)
        return code, found

    plain = tmp_path / "plain.tar.gz"
    plain.write_bytes(published.archive)
    for source in (
        model,
        plain,
        f"{version}.tar.gz",
        version,
        f"{web.url}/{NAME}",
    ):
        assert seed(source)[0] == 0, source
    shutil.copytree(model, version / "model")
    assert seed(version)[0] == 0
    # What differs from its entry is refused.
    flip(version / "model" / SHARD)
    code, message = seed(version)
    assert (code, "files are those of its entry" in message) == (1, True)
    archive.pack(other, f"{version}.tar.gz")
    code, message = seed(f"{version}.tar.gz")
    assert (code, "SHA-256" in message) == (1, True)
    # So is what is broken without an entry.
    broken = shutil.copytree(version / "model", tmp_path / "broken")
    code, message = seed(broken)
    assert (code, "changed bytes" in message) == (1, True)
    assert not [e for e in hub_cache.entries(root) if e.exists]
    for pair in ("google/bit/m-r50x1/1", f"{NAME}={tmp_path}/none", "=x"):
        assert call("hub-export", "cache", "seed", pair)[0] == 2
    code, _, err = call("hub-export", "cache", "seed", f"gs://a/b={model}")
    assert (code, "http and https" in err) == (1, True)


def test_a_seed_from_a_repositorys_model_is_compared(
    root, model, tmp_path, run, monkeypatch
):
    published = tiny_models.as_published(model, NAME, tmp_path)
    repository = tmp_path / "repository"
    published.write(repository)
    source = shutil.copytree(model, repository / NAME / "model")
    (tmp_path / "link").symlink_to(source)
    monkeypatch.chdir(source)
    sources = (source, f"{source}/", tmp_path / "link", ".")
    for text in sources:
        assert run("seed", f"{NAME}={text}")[0] == 0, text
        shutil.rmtree(root)
    # Without its entry nobody would see it.
    (source / "assets" / "more").write_text("x")
    for text in sources:
        code, message = run("seed", f"{NAME}={text}")
        assert (code, "files are those of its entry" in message) == (1, True)
    assert not [e for e in hub_cache.entries(root) if e.exists]


def test_verify_says_what_is_not_compared(
    root, model, web, packed, tmp_path, run, call, monkeypatch
):
    def look(*arguments):
        code, found = run("verify", *arguments)
        (row,) = found["entries"]
        kinds = [problem["kind"] for problem in row["problems"]]
        return code, row["compared"], kinds

    words = "not compared: no record of the graph and the assets"
    run("seed", f"{NAME}={model}")
    run("rm", *(set(os.listdir(root)) & set(KEYS) - {KEYS[0]}))
    assert look() == (0, "record", [])
    assert words not in call("hub-export", "cache", "verify")[1]
    assert run("ls")[1]["entries"][0]["compared"] == ""
    # As tensorflow_hub itself leaves an entry.
    entry = hub_cache.entry(root, KEYS[0])
    entry.record.unlink()
    assert look() == (0, "checksums", [])
    assert words in call("hub-export", "cache", "verify")[1]
    graph = entry.path / "saved_model.pb"
    data = graph.read_bytes()
    asset = next((entry.path / "assets").iterdir())
    asset.write_bytes(bytes(asset.stat().st_size))
    assert look() == (0, "checksums", [])
    published = tiny_models.as_published(model, NAME, tmp_path)
    repository = tmp_path / "repository"
    published.write(repository)
    # Mirrors of the web are not asked.
    monkeypatch.setenv("BIT_TF_HUB_MIRRORS", f"{web.url} {repository}")
    assert look() == (1, "", ["changed bytes"])
    assert run("repair", "--offline")[0] == 0
    assert look() == (0, "record", [])
    entry.record.unlink()
    assert look() == (0, "entry", [])
    assert words not in call("hub-export", "cache", "verify")[1]
    # The mirror may have another model of that handle.
    graph.write_bytes(data + b"\x10\x01")
    assert look()[1:] in (("checksums", []), ("", ["damaged graph"]))
    graph.write_bytes(data)
    (entry.path / "assets" / "more").write_text("")
    assert look() == (0, "checksums", [])
    assert web.seen == []


KEYS = [hub_cache.key(text) for text in handles.spellings(TFHUB)]


def test_seed_replaces_only_if_it_is_told_to(root, model, other, run, call):
    assert run("seed", f"{NAME}={model}")[0] == 0
    code, found = run("seed", f"{NAME}={model}")
    assert {step["action"] for step in found["steps"]} == {"kept"}
    shutil.rmtree(root / hub_cache.key(TFHUB))
    code, message = run("seed", f"{NAME}={other}")
    assert (code, "--overwrite" in message) == (1, True)
    assert not (root / hub_cache.key(TFHUB)).exists()
    assert run("seed", f"{NAME}={other}", "--overwrite")[0] == 0
    for spelling in handles.spellings(TFHUB):
        path = root / hub_cache.key(spelling)
        assert integrity.contents(path) == integrity.contents(other)


def hostile(path, name, **attributes):
    with tarfile.open(path, "w:gz") as file:
        good = tarfile.TarInfo("saved_model.pb")
        file.addfile(good, io.BytesIO())
        member = tarfile.TarInfo(name)
        data = attributes.pop("data", b"")
        member.size = len(data)
        for attribute, value in attributes.items():
            setattr(member, attribute, value)
        file.addfile(member, io.BytesIO(data))
    return path


@pytest.mark.parametrize(
    ("name", "attributes"),
    [
        ("../escaped", {"data": b"x"}),
        ("/tmp/escaped-from-the-cache", {"data": b"x"}),
        ("a/../../escaped", {"data": b"x"}),
        ("link", {"type": tarfile.SYMTYPE, "linkname": "/etc/passwd"}),
        ("link", {"type": tarfile.LNKTYPE, "linkname": "/etc/passwd"}),
        ("device", {"type": tarfile.CHRTYPE, "devmajor": 1, "devminor": 5}),
        ("pipe", {"type": tarfile.FIFOTYPE}),
    ],
)
def test_hostile_archives_are_refused(root, tmp_path, run, name, attributes):
    path = hostile(tmp_path / "x.tar.gz", name, **attributes)
    before = sorted(tmp_path.iterdir())
    code, message = run("seed", f"{NAME}={path}")
    assert code == 1
    assert "Received" in message
    assert os.listdir(root) == [".writer.lock"]
    shutil.rmtree(root)
    assert sorted(tmp_path.iterdir()) == before
    assert not os.path.exists("/tmp/escaped-from-the-cache")


def test_a_bomb_is_refused(root, tmp_path, monkeypatch):
    def unpack(path, directory, **options):
        options.setdefault("max_bytes", 2**20)
        real(path, directory, **options)

    real = archive.unpack
    monkeypatch.setattr(archive, "unpack", unpack)
    path = hostile(tmp_path / "x.tar.gz", "zeros", data=bytes(2**21))
    with pytest.raises(errors.ArchiveError, match="may hold"):
        cache.seeded(NAME, path, root=root)
    assert os.listdir(root) == [".writer.lock"]


def test_ls_and_rm(root, model, packed, web, run, call):
    run("seed", f"{NAME}={model}")
    web.bodies["/a/b/1"] = packed.read_bytes()
    tensorflow_hub.resolve(f"{web.url}/a/b/1")
    code, found = run("ls")
    size = sum(file.size for file in integrity.contents(model).values())
    count = len(handles.spellings(TFHUB))
    assert found["bytes"] == 2 * size
    assert len(found["entries"]) == count + 1
    row = found["entries"][0]
    assert (row["state"], row["size"]) == ("whole", size)
    assert row["files"] == len(integrity.contents(model))
    assert 0 <= row["age"] < 100
    _, out, _ = call("hub-export", "cache", "ls")
    assert f"{TFHUB} and {count - 1} other spellings" in out
    assert f"2 models in {count + 1} entries" in out
    one = handles.spellings(TFHUB)[5]
    code, found = run("rm", hub_cache.key(one))
    # The model's files are there under other names.
    assert code == 0
    assert 0 < found["freed"] < size / 2
    kaggle = handles.kaggle_twin(handles.known(TFHUB))
    code, found = run("rm", kaggle)
    assert code == 0
    assert found["freed"] > size
    assert len(found["steps"]) == count - 1
    code, message = run("rm", kaggle)
    assert (code, "hub-export cache ls" in message) == (1, True)
    assert call("hub-export", "cache", "rm")[0] == 2
    assert call("hub-export", "cache", "rm", "--all", NAME)[0] == 2
    assert run("rm", "--all")[1]["freed"] > size
    assert [name for name in os.listdir(root) if name[0] != "."] == []
    assert run("ls")[1]["entries"] == []
    assert run("rm", "--all")[0] == 0


def test_the_cache_can_be_chosen(root, model, run, tmp_path, call):
    elsewhere = tmp_path / "elsewhere"
    run("seed", f"{NAME}={model}", "--cache", elsewhere)
    assert not root.exists()
    assert run("verify", "--cache", elsewhere)[0] == 0
    assert run("verify")[1]["entries"] == []
    (tmp_path / "file").write_text("")
    code, _, err = call(
        "hub-export", "cache", "ls", "--cache", tmp_path / "file"
    )
    assert (code, "file" in err) == (1, True)


def test_left_overs_of_dead_writers_and_downloads(root, web, tmp_path, model):
    """An interrupted download is kept until its model is there."""
    large = shutil.copytree(model, tmp_path / "large")
    (large / "assets" / "noise").write_bytes(os.urandom(2**21))
    published = tiny_models.as_published(large, NAME, tmp_path)
    published.serve(web)
    handle = f"{web.url}/{NAME}"
    web.replies = [
        file_server.Reply(),
        file_server.Reply(cut=0.5),
        *[file_server.Reply(status=503)] * 3,
    ]
    from bit_tf import hub

    with pytest.raises(errors.HandleError):
        hub.resolve(handle)
    (row,) = cache.listed(root)
    assert (row.state, row.problems) == ("absent", ())
    assert row.partial > 2**18
    assert cache.repaired(root) == []
    places = {hub_cache.key(handle): handle}
    hub_install.install(places, large, root=root, origin="x")
    (step,) = cache.repaired(root)
    assert ".part" in step.detail
    assert os.listdir(hub_cache.downloads(root)) == []


SEED = (
    "import sys; from hub_export import cache; import pathlib\n"
    "print('ready', flush=True)\n"
    "cache.seeded(sys.argv[1], sys.argv[2], root=pathlib.Path(sys.argv[3]),"
    " overwrite=True)"
)


@pytest.mark.slow
def test_kill_while_seeding(root, model, other, tmp_path):
    """At random moments; afterwards repair leaves whole models only."""
    large = [
        shutil.copytree(p, tmp_path / p.parent.name) for p in (model, other)
    ]
    for path in large:
        (path / "assets" / "noise").write_bytes(os.urandom(2**25))
    contents = [integrity.contents(path) for path in large]
    cache.seeded(NAME, large[0], root=root)
    rng = np.random.default_rng(0)
    killed = 0
    for number in range(20):
        process = subprocess.Popen(
            [sys.executable, "-c", SEED, NAME, large[(number + 1) % 2], root],
            cwd=ROOT,
            stdout=subprocess.PIPE,
        )
        process.stdout.readline()
        time.sleep(float(rng.uniform(0.05, 4.0)))
        process.send_signal(signal.SIGKILL)
        killed += process.wait() == -signal.SIGKILL
        process.stdout.close()
        steps = cache.repaired(root, offline=True)
        assert all(step.done for step in steps), steps
        rows = cache.listed(root, thorough=True)
        assert [row for row in rows if row.problems] == []
        whole = [row for row in rows if row.state == "whole"]
        assert len(whole) == len(handles.spellings(TFHUB))
        for row in whole:
            assert integrity.contents(root / row.key) in contents
    assert killed > 10
