import functools
import http.server
import pathlib
import tarfile
import threading

import numpy as np
import pytest
import tensorflow as tf

from bit_tf import errors, hub


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


def test_freezing_keeps_values_and_respects_the_limit(
    features_export, monkeypatch
):
    model = hub.load(features_export)
    pictures = tf.random.stateless_uniform([2, 40, 33, 3], [1, 2])
    expected = np.asarray(model(pictures))
    function, width = hub.picture_function(model, "none", "none", "handle")
    assert width == 1024
    assert np.linalg.norm(function(pictures) - expected) <= 1e-5 * (
        np.linalg.norm(expected)
    )
    assert not hasattr(function, "captured_inputs")
    monkeypatch.setattr(hub, "FREEZE_LIMIT", 0)
    function, _ = hub.picture_function(model, "none", "none", "handle")
    assert len(function.captured_inputs) == len(model.variables)
    assert np.allclose(function(pictures), expected, rtol=1e-5)


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
