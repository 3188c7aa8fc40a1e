import functools
import http.server
import os
import pathlib
import shutil
import socket
import subprocess
import sys
import tarfile
import threading
import time

import file_server
import helpers
import numpy as np
import pytest
import tensorflow as tf
import tiny_models

from bit_tf import errors, handles, hub, hub_cache, integrity


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TFHUB_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def model_archive(features_export, tmp_path_factory):
    path = tmp_path_factory.mktemp("archive") / "model.tar.gz"
    with tarfile.open(path, "w:gz") as file:
        file.add(features_export, ".")
    return path


class Handler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


@pytest.fixture
def server(model_archive):
    handler = functools.partial(Handler, directory=model_archive.parent)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def features(model):
    return np.asarray(model(tf.zeros([1, 32, 32, 3])))


def test_directory_archive_and_url_give_one_model(
    features_export, model_archive, server, cache
):
    expected = features(hub.load(features_export))
    assert expected.shape == (1, 1024)
    for handle in (str(model_archive), f"{server}/model.tar.gz"):
        assert np.array_equal(features(hub.load(handle)), expected)
    assert hub.resolve(features_export) == str(features_export)
    resolved = hub.resolve(model_archive)
    assert resolved.startswith(str(cache))
    assert hub.resolve(model_archive) == resolved


def test_a_changed_archive_is_unpacked_anew(model_archive, tmp_path, cache):
    path = tmp_path / "model.tar.gz"
    path.write_bytes(model_archive.read_bytes())
    first = hub.resolve(path)
    with tarfile.open(path, "w:gz") as file:
        file.add(__file__, "other.txt")
    assert hub.resolve(path) != first


def test_a_half_swept_cache_is_mended(model_archive, features_export, cache):
    resolved = pathlib.Path(hub.resolve(model_archive))
    expected = features(hub.load(features_export))
    for lost in ("saved_model.pb", "variables/variables.index"):
        (resolved / lost).unlink()
        assert np.array_equal(features(hub.load(model_archive)), expected)


def test_a_cache_that_cannot_be_written(model_archive, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TFHUB_CACHE_DIR", str(tmp_path / "file" / "cache"))
    with pytest.raises(errors.HandleError, match="TFHUB_CACHE_DIR"):
        hub.resolve(model_archive)


def test_file_urls_and_bytes(features_export):
    path = str(features_export)
    assert hub.resolve(features_export.as_uri()) == path
    assert hub.resolve(path.encode()) == path


def save(module, call, path, *signature):
    module.__call__ = tf.function(call)
    for training in (False, True):
        module.__call__.get_concrete_function(*signature, training=training)
    tf.saved_model.save(module, str(path))
    return hub.load(path)


@pytest.mark.parametrize("default", [False, True])
def test_models_run_in_inference_mode(tmp_path, default):
    def call(images, training=default):
        mean = tf.reduce_mean(images, [1, 2])
        return mean * 100 if training else mean

    spec = tf.TensorSpec([None, None, None, 3], tf.float32)
    loaded = save(tf.Module(), call, tmp_path / "model", spec)
    function, _ = hub.picture_function(loaded, "x", "y", "model")
    assert np.allclose(function(tf.ones([1, 4, 4, 3])), 1)


def test_models_that_take_something_else(tmp_path):
    def call(images, training):
        return tf.reduce_mean(tf.cast(images, tf.float32), [1, 2])

    spec = tf.TensorSpec([None, None, None, 3], tf.uint8)
    loaded = save(tf.Module(), call, tmp_path / "integers", spec)
    with pytest.raises(errors.HandleError, match=r"takes float32"):
        hub.picture_function(loaded, "x", "y", "integers")
    module = tf.Module()

    @tf.function
    def two(a, b):
        return {"other": a + b}

    spec = tf.TensorSpec([None, None, None, 3], tf.float32)
    tf.saved_model.save(
        module,
        str(tmp_path / "two"),
        signatures={"features": two.get_concrete_function(spec, spec)},
    )
    loaded = hub.load(tmp_path / "two")
    with pytest.raises(errors.HandleError, match="alone"):
        hub.picture_function(loaded, "features", "features", "two")


def test_errors(tmp_path, server, cache):
    file = tmp_path / "model.npz"
    file.write_bytes(b"PK")
    with pytest.raises(errors.HandleError, match="hub-export convert"):
        hub.resolve(file)
    with pytest.raises(errors.HandleError, match="no such path exists"):
        hub.resolve(tmp_path / "nothing")
    with pytest.raises(errors.HandleError, match=r"none\.tar\.gz.*404"):
        hub.resolve(f"{server}/none.tar.gz")
    with pytest.raises(errors.HandleError, match="No model could be fetched"):
        hub.resolve("http://127.0.0.1:9/google/bit/m-r50x1/1")
    with pytest.raises(errors.HandleError, match="does not hold a SavedModel"):
        hub.load(tmp_path)


def test_a_function_of_pictures(features_export):
    model = hub.load(features_export)
    pictures = tf.random.stateless_uniform([2, 40, 33, 3], [1, 2])
    expected = np.asarray(model(pictures))
    function, width = hub.picture_function(model, "none", "none", "handle")
    assert width == 1024
    assert helpers.relative_error(function(pictures), expected) <= 1e-5


def test_models_of_others(tmp_path):
    """A module with nothing but __call__, as Google's have."""
    module = tf.Module()
    module.weight = tf.Variable(tf.ones([3, 5]))

    def call(images):
        return tf.reduce_mean(images, [1, 2]) @ module.weight

    module.__call__ = tf.function(
        call,
        input_signature=[tf.TensorSpec([None, None, None, 3], tf.float32)],
    )
    tf.saved_model.save(module, str(tmp_path / "bare"))
    loaded = hub.load(tmp_path / "bare")
    function, width = hub.picture_function(loaded, "x", "y", "bare")
    assert width == 5
    assert np.allclose(function(tf.ones([2, 4, 4, 3])), 3)

    module.__call__ = tf.function(
        lambda images: images,
        input_signature=[tf.TensorSpec([None, None, None, 3], tf.float32)],
    )
    tf.saved_model.save(module, str(tmp_path / "map"))
    loaded = hub.load(tmp_path / "map")
    with pytest.raises(errors.HandleError, match=r"one vector a picture"):
        hub.picture_function(loaded, "x", "y", "map")
    tf.saved_model.save(tf.Module(), str(tmp_path / "empty"))
    with pytest.raises(errors.HandleError, match="neither"):
        hub.picture_function(hub.load(tmp_path / "empty"), "x", "y", "empty")


NAME = "google/bit/m-r50x1/1"
TFHUB = f"https://tfhub.dev/{NAME}"
SHARD = "variables/variables.data-00000-of-00001"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return tiny_models.save(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="module")
def published(tiny, tmp_path_factory):
    return tiny_models.as_published(
        tiny, NAME, tmp_path_factory.mktemp("published")
    )


@pytest.fixture
def web():
    with file_server.running() as server:
        yield server


@pytest.fixture
def internet(web, monkeypatch, cache):
    """tfhub.dev, Kaggle and two mirrors, all on one server of this machine."""
    # These tables are made once, of the real addresses.
    assert handles.kaggle_twin(handles.known(TFHUB))
    hub_cache._known_keys()
    monkeypatch.setattr(handles, "TFHUB", f"{web.url}/tfhub/")
    bases = (f"{web.url}/kaggle/models/",)
    monkeypatch.setattr(handles, "_KAGGLE_BASES", bases)
    mirrors = f"{web.url}/first {web.url}/second/,"
    monkeypatch.setenv("BIT_TF_HUB_MIRRORS", mirrors)
    return web


def asked(server, start=0):
    """Which paths were asked for, without the query."""
    return [seen.target.partition("?")[0] for seen in server.seen[start:]]


def test_mirrors_go_first_in_their_order(internet, published, tiny, cache):
    published.serve(internet, "/second")
    published.serve(internet, "/tfhub")
    handle = f"{internet.url}/tfhub/{NAME}"
    path = hub.resolve(handle)
    assert path == str(cache / hub_cache.key(handle))
    assert asked(internet) == [
        f"/first/{NAME}/entry.json",
        f"/first/{NAME}",
        f"/second/{NAME}/entry.json",
        f"/second/{NAME}.tar.gz",
    ]
    assert integrity.contents(path) == integrity.contents(tiny)
    entry = hub_cache.find(handle, cache)
    assert entry.described == handle
    assert entry.recorded["source"] == f"{internet.url}/second/{NAME}"
    assert hub.resolve(handle) == hub.resolve(f"{handle}/") == path
    assert hub.resolve(NAME) == path
    assert len(internet.seen) == 4
    assert os.listdir(hub_cache.downloads(cache)) == []
    # It is where tensorflow_hub looks for it.
    import tensorflow_hub

    assert tensorflow_hub.resolve(handle) == path
    assert len(internet.seen) == 4


def test_then_the_handle_and_its_twin(internet, published, cache):
    published.serve(internet, "/tfhub", entry=False)
    handle = f"{internet.url}/tfhub/{NAME}"
    assert hub.resolve(handle).endswith(hub_cache.key(handle))
    # tfhub.dev has no entries, so it is not asked for one.
    assert asked(internet)[-1] == f"/tfhub/{NAME}"
    assert f"/tfhub/{NAME}/entry.json" not in asked(internet)
    shutil.rmtree(cache)
    internet.bodies.clear()
    twin = "/kaggle/models/google/bit/TensorFlow2/m-r50x1/1"
    internet.bodies[twin] = published.archive
    start = len(internet.seen)
    path = hub.resolve(handle)
    assert path == str(cache / hub_cache.key(handle))
    archives = [
        name for name in asked(internet, start) if not name.endswith(".json")
    ]
    assert archives[-2:] == [f"/tfhub/{NAME}", twin]
    assert hub_cache.find(handle, cache).recorded["source"].endswith(twin)


def test_a_kaggle_handle_has_its_twin_on_tfhub(cache):
    kaggle = handles.kaggle_twin(handles.known(TFHUB))
    names = [name for name, _ in hub._sources(kaggle)]
    assert names == [f"the handle {kaggle}", f"its twin {TFHUB}"]
    other = kaggle.replace("www.", "").replace("TensorFlow2", "tensorflow2")
    assert [source for _, source in hub._sources(other)] == [other, TFHUB]
    assert [source for _, source in hub._sources(TFHUB)] == [TFHUB, kaggle]


def test_one_error_lists_all_that_was_tried(internet, tiny, cache):
    handle = f"{internet.url}/tfhub/{NAME}"
    broken = cache / hub_cache.key(handle)
    shutil.copytree(tiny, broken)
    (broken / SHARD).unlink()
    with pytest.raises(errors.HandleError) as caught:
        hub.resolve(handle)
    rows = [
        line for line in str(caught.value).split("\n") if line.startswith("- ")
    ]
    assert len(rows) == 5
    for row, words in zip(
        rows,
        (
            ("the cache", str(cache), "short data", SHARD),
            ("the mirror", f"/first/{NAME}", "404"),
            ("the mirror", f"/second/{NAME}", "404"),
            ("the handle", f"/tfhub/{NAME}", "404"),
            ("its twin", "/TensorFlow2/m-r50x1/1", "404"),
        ),
        strict=True,
    ):
        for word in words:
            assert word in row
    assert "BIT_TF_HUB_MIRRORS" in str(caught.value)
    assert "hub-export cache seed" in str(caught.value)
    assert broken.exists()


def test_broken_entries_are_passed_over_and_replaced(
    internet, published, tiny, cache
):
    published.serve(internet, "/first")
    handle = f"{internet.url}/tfhub/{NAME}"
    path = pathlib.Path(hub.resolve(handle))
    os.truncate(path / SHARD, 5)
    assert hub.resolve(handle) == str(path)
    assert integrity.contents(path) == integrity.contents(tiny)
    (path / "saved_model.pb").unlink()
    other = f"{handle}/"
    assert hub.resolve(other) == str(cache / hub_cache.key(other))
    # The broken one is passed over for the other spelling.
    start = len(internet.seen)
    assert hub.resolve(handle) == hub.resolve(other)
    assert len(internet.seen) == start


@pytest.mark.parametrize("what", ["archive", "size", "file"])
def test_what_differs_from_its_entry_is_not_kept(
    web, published, tiny, cache, what
):
    published.serve(web)
    entry = published.entry
    digest = b'"sha256": "'
    if what == "archive":
        start = entry.index(digest) + len(digest)
        entry = entry[:start] + b"0" * 64 + entry[start + 64 :]
        words = ["0" * 64, r"which were\s+deleted"]
    elif what == "size":
        size = str(len(published.archive)).encode()
        entry = entry.replace(size, size + b"1")
        words = ["another file"]
    else:
        start = entry.rindex(digest) + len(digest)
        entry = entry[:start] + b"0" * 64 + entry[start + 64 :]
        words = ["0" * 64, "others, so none was kept"]
    web.bodies[f"/{NAME}/entry.json"] = entry
    for word in words:
        with pytest.raises(errors.HandleError, match=word):
            hub.resolve(f"{web.url}/{NAME}")
    left = os.listdir(hub_cache.downloads(cache))
    assert not [name for name in left if not name.endswith(".lock")]
    assert not (cache / hub_cache.key(f"{web.url}/{NAME}")).exists()
    published.serve(web)
    hub.resolve(f"{web.url}/{NAME}")


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"<html><p>Log in</p></html>", "web page"),
        (b"not an archive", "not a whole tar archive"),
        (None, "404"),
    ],
)
def test_what_is_no_model(web, cache, body, message):
    if body is not None:
        web.bodies["/a/b/1"] = body
    with pytest.raises(errors.HandleError, match=message):
        hub.resolve(f"{web.url}/a/b/1")
    assert hub_cache.entries(cache) in (
        [],
        [e for e in hub_cache.entries(cache) if not e.exists],
    )
    with tarfile.open(cache / "x.tar.gz", "w:gz") as file:
        file.add(__file__, "other.txt")
    web.bodies["/a/b/1"] = (cache / "x.tar.gz").read_bytes()
    with pytest.raises(errors.HandleError, match="no graph"):
        hub.resolve(f"{web.url}/a/b/1")


def test_entries_of_something_else(web, published, cache):
    published.serve(web, "/x")
    web.bodies["/x/a/b/1/entry.json"] = published.entry
    with pytest.raises(errors.HandleError, match=f"entry of {NAME}"):
        hub.resolve(f"{web.url}/x/a/b/1")
    web.bodies[f"/x/{NAME}/entry.json"] = b'{"schema": 99}'
    with pytest.raises(errors.HandleError, match="schema 1"):
        hub.resolve(f"{web.url}/x/{NAME}")
    for body in (b"{}", b"[1]", b"<html>", b"\xff"):
        web.bodies[f"/x/{NAME}/entry.json"] = body
        hub.resolve(f"{web.url}/x/{NAME}")
        shutil.rmtree(cache)


def test_a_cut_download_is_resumed(web, tiny, cache, tmp_path):
    large = shutil.copytree(tiny, tmp_path / "large")
    (large / "assets" / "noise").write_bytes(os.urandom(2**21))
    published = tiny_models.as_published(large, NAME, tmp_path)
    published.serve(web)
    address = f"{web.url}/{NAME}.tar.gz"
    cut = file_server.Reply(cut=0.5)
    whole = file_server.Reply()
    web.replies = [whole, cut, *[file_server.Reply(status=503)] * 3]
    with pytest.raises(errors.HandleError, match="goes on there"):
        hub.resolve(address)
    path = hub.resolve(address)
    start = int(web.seen[-1].range.removeprefix("bytes=").rstrip("-"))
    assert start > len(published.archive) // 4
    assert integrity.contents(path) == integrity.contents(large)


RESOLVE = "import sys; from bit_tf import hub; print(hub.resolve(sys.argv[1]))"


def resolving(address):
    """A process that resolves a handle."""
    return subprocess.Popen(
        [sys.executable, "-c", RESOLVE, address],
        cwd=pathlib.Path(__file__).parent.parent,
        stdout=subprocess.PIPE,
        text=True,
    )


def test_two_processes_download_once(web, published, cache):
    published.serve(web)
    hold = threading.Event()
    entry, archive = file_server.Reply(), file_server.Reply(hold=hold)
    web.replies = [entry, archive]
    processes = [resolving(f"{web.url}/{NAME}") for _ in range(2)]
    threading.Timer(1.5, hold.set).start()
    paths = {process.communicate(timeout=60)[0] for process in processes}
    assert paths == {f"{cache / hub_cache.key(f'{web.url}/{NAME}')}\n"}
    assert asked(web).count(f"/{NAME}.tar.gz") == 1


def test_resolve_loads_no_tensorflow(web, published, cache):
    published.serve(web)
    code = (
        "import sys\nfrom bit_tf import hub\n"
        "for _ in range(2): hub.resolve(sys.argv[1])\n"
        "print({'tensorflow', 'keras'} & set(sys.modules))"
    )
    found = subprocess.run(
        [sys.executable, "-c", code, f"{web.url}/{NAME}"],
        cwd=pathlib.Path(__file__).parent.parent,
        capture_output=True,
        text=True,
    )
    assert found.stdout == "set()\n", found.stderr


def test_a_download_of_tensorflow_hub_is_awaited(web, tiny, cache, monkeypatch):
    monkeypatch.setattr(hub, "_POLL", 0.05)
    address = f"{web.url}/{NAME}"
    entry = hub_cache.Entry(cache, hub_cache.key(address))
    cache.mkdir()
    entry.lock.write_text(f"{socket.gethostname()}.{os.getpid()}.abc")

    def finish():
        shutil.copytree(tiny, cache / f"{entry.key}.abc.tmp")
        (cache / f"{entry.key}.abc.tmp").rename(entry.path)
        entry.lock.unlink()

    timer = threading.Timer(0.3, finish)
    timer.start()
    assert hub.resolve(address) == str(entry.path)
    timer.join()
    assert web.seen == []


def in_time(function, *args):
    """What a function returns within seconds."""
    found = []
    thread = threading.Thread(
        target=lambda: found.append(function(*args)), daemon=True
    )
    thread.start()
    thread.join(10)
    assert found, "it still waits"
    return found[0]


def test_a_download_that_does_not_go_on_is_not_awaited_for_ever(
    published, cache, web, monkeypatch
):
    published.serve(web)
    address = f"{web.url}/{NAME}"
    key = hub_cache.key(address)
    cache.mkdir()
    lock = cache / f"{key}.lock"
    # A lock from a machine whose clock is a year ahead.
    lock.write_text("elsewhere.1.abc")
    future = time.time() + 3e7
    os.utime(lock, (future, future))
    assert in_time(hub.resolve, address) == str(cache / key)
    shutil.rmtree(cache)
    # A clock that stands still.
    running = hub_cache.Download("elsewhere", "abc", 5.0, 0.0, True)
    monkeypatch.setattr(hub_cache.Entry, "download", running)
    monkeypatch.setattr(hub, "_POLL", 0.05)
    monkeypatch.setattr(hub, "_STUCK", 0.2)
    assert in_time(hub._awaited, address, cache) is None


def test_offline(internet, published, tiny, cache, monkeypatch, tmp_path):
    published.serve(internet, "/first")
    handle = f"{internet.url}/tfhub/{NAME}"
    monkeypatch.setenv("BIT_TF_HUB_OFFLINE", "1")
    with pytest.raises(errors.HandleError) as caught:
        hub.resolve(handle)
    assert str(caught.value).count("not asked, in offline mode") == 4
    assert internet.seen == []
    with pytest.raises(errors.HandleError, match="offline mode"):
        hub.resolve("gs://bucket/model")
    path = hub.resolve(handle, offline=False)
    start = len(internet.seen)
    assert hub.resolve(handle) == path
    monkeypatch.setenv("BIT_TF_HUB_OFFLINE", "0")
    assert hub.resolve(handle, offline=True) == path
    assert len(internet.seen) == start


def test_a_mirror_on_this_disk(published, tiny, cache, monkeypatch, tmp_path):
    repository = tmp_path / "repository"
    published.write(repository)
    monkeypatch.setenv("BIT_TF_HUB_MIRRORS", f"{tmp_path}/none,{repository}")
    # Without an unpacked model, its archive is used.
    path = hub.resolve(TFHUB, offline=True)
    assert path == str(cache / hub_cache.key(TFHUB))
    assert integrity.contents(path) == integrity.contents(tiny)
    shutil.rmtree(cache)
    model = repository / NAME / "model"
    shutil.copytree(tiny, model)
    monkeypatch.setenv("BIT_TF_HUB_MIRRORS", repository.as_uri())
    assert hub.resolve(TFHUB, offline=True) == str(model)
    assert hub.resolve(NAME, offline=True) == str(model)
    assert hub.resolve(NAME.removesuffix("/1"), offline=True) == str(model)
    assert not cache.exists()
    os.truncate(model / SHARD, 3)
    assert hub.resolve(TFHUB, offline=True) == path
    assert integrity.contents(path) == integrity.contents(tiny)
    shutil.rmtree(cache)
    archive = repository / f"{NAME}.tar.gz"
    archive.write_bytes(archive.read_bytes()[:-9] + b"123456789")
    with pytest.raises(errors.HandleError, match="SHA-256"):
        hub.resolve(TFHUB, offline=True)
    archive.unlink()
    with pytest.raises(errors.HandleError, match="is not whole"):
        hub.resolve(TFHUB, offline=True)
    # Another host's path means another model.
    with pytest.raises(errors.HandleError) as caught:
        hub.resolve(f"http://127.0.0.1:9/{NAME}", offline=True)
    assert "mirror " not in str(caught.value)


def flip(path):
    """Changes a byte, but neither the size nor the time."""
    found = path.stat()
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(found.st_atime_ns, found.st_mtime_ns))


@pytest.mark.parametrize("name", [SHARD, "saved_model.pb"])
def test_a_mirror_on_this_disk_is_read_before_use(
    published, tiny, cache, monkeypatch, tmp_path, name
):
    repository = tmp_path / "repository"
    published.write(repository)
    monkeypatch.setenv("BIT_TF_HUB_MIRRORS", str(repository))
    model = shutil.copytree(tiny, repository / NAME / "model")
    assert hub.resolve(TFHUB, offline=True) == str(model)
    data = (model / name).read_bytes()
    flip(model / name)
    # It is damaged with its size kept, so its archive is used.
    path = hub.resolve(TFHUB, offline=True)
    assert path == str(cache / hub_cache.key(TFHUB))
    assert integrity.contents(path) == integrity.contents(tiny)
    shutil.rmtree(cache)
    (repository / f"{NAME}.tar.gz").unlink()
    with pytest.raises(errors.HandleError, match=f"is not whole.*{name}"):
        hub.resolve(TFHUB, offline=True)
    (model / name).write_bytes(data)
    assert hub.resolve(TFHUB, offline=True) == str(model)
    # What is not in the entry may be read instead of what is.
    (model / "saved_model.pbtxt").write_text("")
    with pytest.raises(errors.HandleError, match=r"saved_model\.pbtxt"):
        hub.resolve(TFHUB, offline=True)


def test_a_mirror_on_this_disk_is_read_once(tiny, tmp_path, monkeypatch):
    model = shutil.copytree(tiny, tmp_path / "model")
    expected = integrity.contents(model)
    read = []
    real = integrity._differences

    def count(path, expected, thorough):
        read.append(thorough)
        return real(path, expected, thorough)

    monkeypatch.setattr(integrity, "_differences", count)
    for _ in range(3):
        assert integrity.compared(model, expected) == []
    assert read.count(True) == 1
    flip(model / SHARD)
    for _ in range(2):
        (problem,) = integrity.compared(model, expected)
        assert problem.kind == "changed bytes"
    os.mkfifo(model / "pipe")
    assert integrity.compared(model, expected)
    assert integrity.compared(tmp_path / "none", expected)


def test_the_paths_of_mirrors(published, tiny, cache, monkeypatch, tmp_path):
    repository = tmp_path / "one, two"
    published.write(repository)
    model = shutil.copytree(tiny, repository / NAME / "model")
    for text in (str(repository), f" {repository} ", repository.as_uri()):
        monkeypatch.setenv("BIT_TF_HUB_MIRRORS", text)
        assert hub.resolve(TFHUB, offline=True) == str(model), text
    url = f"/none {repository.as_uri().replace(',', '%2C')}"
    monkeypatch.setenv("BIT_TF_HUB_MIRRORS", url)
    assert hub.resolve(TFHUB, offline=True) == str(model)
    for text in ("https://[::1/hub", "file://[::1/hub"):
        monkeypatch.setenv("BIT_TF_HUB_MIRRORS", text)
        with pytest.raises(errors.HandleError, match=r"::1/hub"):
            hub.resolve(TFHUB, offline=True)


def test_a_folder_of_plain_files_is_a_mirror(published, tiny, cache, tmp_path):
    """A bucket: no answer but to the paths of files."""
    published.write(tmp_path / "bucket")
    handler = functools.partial(Handler, directory=tmp_path / "bucket")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        address = f"http://127.0.0.1:{server.server_port}/{NAME}"
        plain = address.removesuffix("/1")
        try:
            with pytest.MonkeyPatch.context() as patch:
                mirror = address.removesuffix(f"/{NAME}")
                patch.setenv("BIT_TF_HUB_MIRRORS", mirror)
                # The newest version is that of the mirror.
                for handle in (TFHUB, TFHUB.removesuffix("/1")):
                    path = hub.resolve(handle)
                    assert path == str(cache / hub_cache.key(TFHUB))
                    shutil.rmtree(cache)
            for handle in (address, f"{address}/", plain, f"{plain}/"):
                path = hub.resolve(handle)
                assert integrity.contents(path) == integrity.contents(tiny)
                shutil.rmtree(cache)
            # So does what is kept under a handle without a version.
            path = hub.fetch(plain)
            assert path == str(cache / hub_cache.key(plain))
            assert integrity.contents(path) == integrity.contents(tiny)
        finally:
            server.shutdown()
            thread.join()


def test_a_host_that_does_not_answer_is_not_waited_for_long(
    tiny, cache, monkeypatch
):
    monkeypatch.setattr(hub, "_PATIENCE", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        base = f"http://127.0.0.1:{silent.getsockname()[1]}"
        plain, versioned = f"{base}/a/b", f"{base}/c/d"
        shutil.copytree(tiny, cache / hub_cache.key(plain))
        entry = hub_cache.Entry(cache, hub_cache.key(f"{versioned}/3"))
        shutil.copytree(tiny, entry.path)
        hub_cache.write_descriptor(entry, f"{versioned}/3")
        start = time.monotonic()
        for address, key in (
            (plain, hub_cache.key(plain)),
            (f"{plain}/", hub_cache.key(plain)),
            (versioned, entry.key),
        ):
            assert hub.resolve(address) == str(cache / key)
        assert time.monotonic() - start < 10


def test_the_newest_version(web, tiny, published, cache, tmp_path):
    newer = tiny_models.as_published(tiny, f"{NAME[:-1]}12", tmp_path)
    address = f"{web.url}/hub/{NAME.removesuffix('/1')}"
    with pytest.raises(errors.HandleError, match="404"):
        hub.resolve(address)
    published.serve(web, "/hub")
    first = hub.resolve(address)
    assert first == str(cache / hub_cache.key(f"{address}/1"))
    newer.serve(web, "/hub")
    last = hub.resolve(f"{address}/")
    assert last == str(cache / hub_cache.key(f"{address}/12"))
    start = len(web.seen)
    assert hub.resolve(address) == last
    # It is asked which one is the newest, and no more.
    assert [path[-10:] for path in asked(web, start)] == ["entry.json"]
    assert hub.resolve(f"{address}/1") == first
    assert hub.resolve(address, offline=True) == last
    web.bodies.clear()
    assert hub.resolve(address) == last
    assert not (cache / hub_cache.key(address)).exists()
    # Without a repository, an address without a version is one like others.
    web.bodies["/plain"] = published.archive
    path = hub.resolve(f"{web.url}/plain")
    assert path == str(cache / hub_cache.key(f"{web.url}/plain"))
    assert hub.resolve(f"{web.url}/plain") == path


def test_what_is_secret_in_a_handle_is_not_shown(web, published, cache):
    address = f"{web.url.replace('//', '//user:hidden@')}/{NAME}?token=hidden"
    with pytest.raises(errors.HandleError) as caught:
        hub.resolve(address)
    assert "hidden" not in str(caught.value)
    published.serve(web)
    path = hub.resolve(address)
    assert web.seen[-1].target == f"/{NAME}.tar.gz?token=hidden"
    assert "authorization" in web.seen[-1].headers
    for file in pathlib.Path(cache).rglob("*"):
        assert "hidden" not in str(file)
        if file.suffix in (".json", ".txt"):
            assert "hidden" not in file.read_text()
    assert hub.resolve(address) == path


def test_handles_without_a_host(cache):
    assert hub.as_address(NAME) == TFHUB
    assert hub.as_address("https://x/y") == "https://x/y"
    for text in ("google/bit/r50x1/1", "nobody/model/1", "google", ""):
        with pytest.raises(errors.HandleError, match="no such path exists"):
            hub.as_address(text)


@pytest.mark.parametrize(
    "text",
    [
        "https://[::1/google/bit/m-r50x1/1",
        "https://x.invalid/\udcff/1",
        "https://user:hidden@x.invalid:port/a/b/1?token=hidden",
        "http://x.invalid:99999/a/b/1",
        "gs://[bucket/model",
        "file://[::1/model",
    ],
)
def test_addresses_that_are_none(cache, text):
    for find in (hub.resolve, hub.fetch, hub.load):
        with pytest.raises(errors.HandleError, match="Received") as caught:
            find(text)
        assert "hidden" not in str(caught.value)
        str(caught.value).encode()


def test_the_folder_of_a_version_is_its_model(published, tiny, tmp_path):
    published.write(tmp_path)
    version = tmp_path / NAME
    # There is nothing but the entry yet.
    assert hub.resolve(version) == str(version)
    shutil.copytree(tiny, version / "model")
    for text in (version, f"{version}/", version.as_uri()):
        assert os.path.samefile(hub.resolve(text), version / "model")
    expected = tiny_models.features(hub.load(tiny))
    assert np.array_equal(tiny_models.features(hub.load(version)), expected)


def test_uncompressed_goes_to_the_cache_and_mirrors_first(
    published, tiny, cache, tmp_path, monkeypatch
):
    import tensorflow_hub

    published.write(tmp_path / "repository")
    monkeypatch.setattr(tensorflow_hub, "resolve", "gs://x?{}".format)
    monkeypatch.setenv("TFHUB_MODEL_LOAD_FORMAT", "UNCOMPRESSED")
    with pytest.raises(errors.HandleError, match="not asked, in offline mode"):
        hub.resolve(TFHUB, offline=True)
    monkeypatch.setenv("BIT_TF_HUB_MIRRORS", str(tmp_path / "repository"))
    path = hub.resolve(TFHUB)
    assert path == str(cache / hub_cache.key(TFHUB))
    monkeypatch.delenv("BIT_TF_HUB_MIRRORS")
    assert hub.resolve(f"{TFHUB}/") == path
    assert hub.resolve(TFHUB, offline=True) == path
    other = f"{TFHUB[:-1]}2"
    assert hub.resolve(other) == f"gs://x?{other}"


def test_uncompressed_is_left_to_tensorflow_hub(cache, monkeypatch):
    import tensorflow_hub

    monkeypatch.setattr(tensorflow_hub, "resolve", "gs://x?{}".format)
    monkeypatch.setenv("TFHUB_MODEL_LOAD_FORMAT", "UNCOMPRESSED")
    assert hub.resolve(TFHUB) == f"gs://x?{TFHUB}"
    monkeypatch.delenv("TFHUB_MODEL_LOAD_FORMAT")
    assert hub.resolve("gs://bucket/model") == "gs://x?gs://bucket/model"


def test_the_keras_layer_is_loaded_late():
    from bit_tf import keras_layer

    assert hub.KerasLayer is keras_layer.KerasLayer
    with pytest.raises(AttributeError, match="no attribute 'no_such'"):
        hub.no_such  # noqa: B018
