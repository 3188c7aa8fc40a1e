"""Which SavedModel a layer has: its hash, and files that name it."""

import contextlib
import os
import shutil
import threading

import helpers
import keras
import numpy as np
import pytest
import tensorflow as tf
import tiny_models
import toy_saved_model

from bit_tf import archive, errors, hub, hub_cache
from bit_tf.hub import KerasLayer

PICTURES = helpers.random_images(2, 8, 8).astype(np.float32) / 255


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    path = tmp_path_factory.mktemp("toy") / "model"
    toy_saved_model.save(path)
    return path


@pytest.fixture
def tiny(tmp_path):
    return tiny_models.save(tmp_path / "tiny")


def model_of(handle, **options):
    layer = KerasLayer(handle, name="hub", **options)
    return keras.Sequential([keras.Input((None, None, 3)), layer])


def load(path):
    return keras.saving.load_model(path, safe_mode=False)


def test_the_hash_is_of_what_makes_the_model(tiny, tmp_path):
    expected = hub.content_hash(tiny)
    assert len(expected) == 64
    assert int(expected, 16)
    assert hub.content_hash(str(tiny)) == hub.content_hash(tiny) == expected
    copy = tmp_path / "elsewhere"
    shutil.copytree(tiny, copy)
    # What repositories, caches and file systems leave in a directory.
    (copy / "assets.extra").mkdir()
    (copy / "assets.extra" / "card.json").write_text("{}")
    (copy / "README.md").write_text("A model.")
    (copy / "fingerprint.pb").unlink()
    (copy / "variables" / ".nfs000").write_text("x")
    assert hub.content_hash(copy) == expected
    graph = copy / "saved_model.pb"
    graph.write_bytes(graph.read_bytes() + b"\n")
    seen = [expected, hub.content_hash(copy)]
    (copy / "assets" / "new.txt").write_text("x")
    seen.append(hub.content_hash(copy))
    (copy / "assets" / "new.txt").rename(copy / "assets" / "newer.txt")
    seen.append(hub.content_hash(copy))
    (copy / "variables" / "variables.data-00001-of-00001").touch()
    seen.append(hub.content_hash(copy))
    assert len(set(seen)) == len(seen)


def test_one_changed_byte_of_the_same_size_and_time(tiny):
    """As a copy tool that keeps times would leave it."""
    data = tiny / "variables" / "variables.data-00000-of-00001"
    before, found = data.stat(), hub.content_hash(tiny)
    content = bytearray(data.read_bytes())
    content[5] ^= 1
    replacement = data.with_name("new")
    replacement.write_bytes(content)
    os.utime(replacement, ns=(before.st_atime_ns, before.st_mtime_ns))
    replacement.replace(data)
    assert hub.content_hash(tiny) != found


def test_a_model_is_hashed_once(tiny, monkeypatch):
    found = hub.content_hash(tiny)
    with monkeypatch.context() as patch:
        patch.setattr("bit_tf.files.measure", None)
        assert hub.content_hash(tiny) == found
        with pytest.raises(TypeError):
            hub.content_hash(shutil.copytree(tiny, f"{tiny}-copy"))


def test_the_hash_in_a_repository_and_in_a_cache(tiny, tmp_path, monkeypatch):
    expected = hub.content_hash(tiny)
    handle = "https://tfhub.dev/google/bit/m-r50x1/1"
    published = tiny_models.as_published(tiny, "google/bit/m-r50x1/1", tmp_path)
    published.write(tmp_path / "repository")
    monkeypatch.setenv("TFHUB_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("BIT_TF_HUB_MIRRORS", str(tmp_path / "repository"))
    monkeypatch.setenv("BIT_TF_HUB_OFFLINE", "1")
    directory = hub.resolve(handle)
    assert hub_cache.find(handle, tmp_path / "cache") is not None
    assert hub.content_hash(directory) == expected
    layer = KerasLayer("google/bit/m-r50x1/1")
    assert layer.handle == "google/bit/m-r50x1/1"
    assert layer.content_hash == expected
    # What is there in the current directory later does not count.
    assert layer.get_config()["handle"] == handle
    archive.pack(tiny, tmp_path / "model.tar.gz")
    assert KerasLayer(tmp_path / "model.tar.gz").content_hash == expected


@pytest.mark.slow
def test_publishing_keeps_the_hash(features_export, tmp_path):
    from hub_export import publishing

    expected = hub.content_hash(features_export)
    publishing.publish(
        features_export,
        tmp_path / "hub",
        "me/small",
        url="https://hub.example",
        license="apache-2.0",
        datasets=["digits"],
    )
    version = tmp_path / "hub" / "me" / "small" / "1"
    assert hub.content_hash(hub.resolve(version)) == expected
    packed = hub.resolve(
        f"{version}.tar.gz", cache=tmp_path / "cache", offline=True
    )
    assert hub.content_hash(packed) == expected


def test_directories_that_have_no_hash(tiny, tmp_path):
    for path in (tmp_path / "none", tmp_path, tiny / "saved_model.pb"):
        with pytest.raises(errors.HandleError, match=r"saved_model\.pb"):
            hub.content_hash(path)
    (tiny / "assets" / "folder").symlink_to(tmp_path)
    with pytest.raises(errors.ArchiveError, match="regular files"):
        hub.content_hash(tiny)
    (tiny / "assets" / "folder").unlink()
    (tiny / "assets" / "dangling").symlink_to(tmp_path / "none")
    with pytest.raises(errors.HandleError, match="can be read"):
        hub.content_hash(tiny)


def test_directories_that_tensorflow_reads_in_place(tiny):
    expected = hub.content_hash(tiny)
    place = "ram://models/tiny"
    for path in tiny.rglob("*"):
        if path.is_file():
            name = f"{place}/{path.relative_to(tiny)}"
            tf.io.gfile.makedirs(name.rpartition("/")[0])
            with tf.io.gfile.GFile(name, "wb") as file:
                file.write(path.read_bytes())
    try:
        assert hub.content_hash(place) == expected
        assert hub.content_hash(f"{place}/") == expected
        layer = KerasLayer(place)
        assert layer.content_hash == expected
        assert layer.get_config()["handle"] == place
    finally:
        tf.io.gfile.rmtree("ram://models")
    with pytest.raises(errors.HandleError, match=r"saved_model\.pb"):
        hub.content_hash(place)


def test_the_hash_of_a_layer(tiny, tmp_path):
    layer = KerasLayer(tiny)
    assert layer.handle == str(tiny)
    assert layer.content_hash == hub.content_hash(tiny)
    # Made once, and kept when the files have gone.
    shutil.rmtree(tiny)
    assert layer.get_config()["content_hash"] == layer.content_hash
    of_object = KerasLayer(lambda images: images)
    assert of_object.handle is None
    assert of_object.content_hash is None


@pytest.mark.parametrize("change", ["gone", "another"])
def test_files_that_changed_since_they_were_loaded(
    tiny, tmp_path, caplog, change
):
    model = model_of(tiny)
    shutil.rmtree(tiny)
    if change == "another":
        tiny_models.save(tiny, seed=1)
    layer = model.get_layer("hub")
    with pytest.raises(errors.HandleError, match=str(tiny)):
        layer.content_hash  # noqa: B018
    # The weights are saved all the same.
    model.save(tmp_path / "model.keras")
    assert "'hub' is saved without the hash" in caplog.text
    assert layer.get_config()["content_hash"] is None
    if change == "another":
        # Nothing tells that it is another.
        assert load(tmp_path / "model.keras").get_layer("hub").content_hash


def test_another_model_is_not_taken_for_the_saved_one(toy, tiny, tmp_path):
    model = model_of(toy, output_key="logits")
    layer = model.get_layer("hub")
    layer.weights[1].assign(np.full(4, 7.0))
    model.save(tmp_path / "model.keras")
    config = layer.get_config()
    assert config["content_hash"] == hub.content_hash(toy)
    moved = tmp_path / "moved"
    shutil.copytree(toy, moved)
    with hub.relocated({toy: moved}):
        copy = load(tmp_path / "model.keras")
        assert np.allclose(copy(PICTURES), model(PICTURES))
        # It is at home there from now on.
        assert copy.get_layer("hub").handle == str(moved)
        shutil.rmtree(moved)
        shutil.copytree(tiny, moved)
        with pytest.raises(errors.HandleError) as caught:
            load(tmp_path / "model.keras")
    message = str(caught.value)
    assert hub.content_hash(toy)[:12] in message
    assert hub.content_hash(tiny)[:12] in message
    assert f"relocated({{'{toy}': NEW_HANDLE}})" in message
    with pytest.raises(errors.HandleError, match="whose hash is given"):
        KerasLayer(toy, content_hash="0" * 64)
    assert KerasLayer(toy, content_hash=config["content_hash"]).content_hash
    with pytest.raises(ValueError, match="content_hash is for handles"):
        KerasLayer(lambda x: x, content_hash="0" * 64)


def test_files_of_before_there_were_hashes(toy):
    config = KerasLayer(toy, trainable=True).get_config()
    del config["content_hash"], config["trainable_pattern"]
    layer = KerasLayer.from_config(config)
    assert layer.trainable
    assert layer.get_config()["content_hash"] == hub.content_hash(toy)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"handle": 5}, "names its SavedModel's handle. Received: 5"),
        ({"handle": None}, "names its SavedModel's handle"),
        ({"handle": ""}, "no such path"),
        ({"handle": "a\0b"}, "no such path"),
        ({"content_hash": 5}, "and not 5…"),
        ({"trainable_pattern": "block["}, "regular expression"),
        ({"trainable_pattern": ["w"]}, "regular expression"),
        ({"trainable_pattern": "gamma"}, "is found in the name"),
    ],
    ids=map(str, range(8)),
)
def test_damaged_configs(toy, change, message):
    config = {**KerasLayer(toy).get_config(), **change}
    with pytest.raises((errors.BitTfError, ValueError), match=message):
        KerasLayer.from_config(config)


def test_the_current_directory_does_not_matter(toy, tmp_path, monkeypatch):
    monkeypatch.chdir(toy.parent)
    model = model_of("model", output_key="logits")
    layer = model.get_layer("hub")
    assert layer.handle == "model"
    monkeypatch.chdir(tmp_path)
    model.save(tmp_path / "model.keras")
    assert layer.get_config()["handle"] == str(toy)
    assert np.array_equal(load("model.keras")(PICTURES), model(PICTURES))


MOVES = [
    ("https://a.example/x/1", {"https://a.example/x/1": "/m"}, "/m"),
    ("https://a.example/x/1", {"https://a.example/x/1/": "/m/"}, "/m"),
    (
        "https://a.example/x/1",
        {"https://a.example": "https://b.example/hub"},
        "https://b.example/hub/x/1",
    ),
    ("https://a.example/x/1", {"https://a.example/": "/hub/"}, "/hub/x/1"),
    ("https://a.example/x/1", {"https://a.exam": "/m"}, None),
    ("https://a.example/x/12", {"https://a.example/x/1": "/m"}, None),
    (
        "https://a.example/x/1",
        {"https://a.example": "/all", "https://a.example/x": "/x"},
        "/x/1",
    ),
    ("/models/x", {"/models": "/new"}, "/new/x"),
    ("/models/x", {"/": "/new"}, "/new/models/x"),
    (
        "https://tfhub.dev/google/bit/m-r50x1/1",
        {"google/bit/m-r50x1/1": "/m"},
        "/m",
    ),
    (
        "/m",
        {"/m": "google/bit/m-r50x1/1"},
        "https://tfhub.dev/google/bit/m-r50x1/1",
    ),
    (
        "https://me:secret@a.example/x/1?token=secret",
        {"https://a.example/x/1": "/m"},
        "/m",
    ),
    (
        "https://a.example/x/1",
        {"https://me:secret@a.example": "https://you:other@b.example"},
        "https://you:other@b.example/x/1",
    ),
]


@pytest.mark.parametrize(
    ("handle", "moves", "expected"), MOVES, ids=map(str, range(len(MOVES)))
)
def test_relocated(handle, moves, expected):
    from bit_tf import relocation

    assert relocation.moved(handle) == handle
    with hub.relocated(moves):
        assert relocation.moved(handle) == (expected or handle)
    assert relocation.moved(handle) == handle


def test_relocations_in_relocations(tmp_path, monkeypatch):
    from bit_tf import relocation

    monkeypatch.chdir(tmp_path)
    seen = {}
    with hub.relocated({"/a": "/outer", "/b": "relative"}):
        monkeypatch.chdir("/")
        with contextlib.suppress(RuntimeError), hub.relocated({"/a": "/inner"}):
            assert relocation.moved("/a/x") == "/inner/x"
            assert relocation.moved("/b") == str(tmp_path / "relative")
            thread = threading.Thread(
                target=lambda: seen.update(found=relocation.moved("/a/x"))
            )
            thread.start()
            thread.join()
            raise RuntimeError
        assert relocation.moved("/a/x") == "/outer/x"
    assert relocation.moved("/a/x") == "/a/x"
    assert seen == {"found": "/a/x"}


@pytest.mark.parametrize(
    "moves", [None, "a", [("a", "b")], {"": "/b"}, {"/a": None}, {5: "/b"}]
)
def test_what_is_no_relocation(moves):
    with (
        pytest.raises(ValueError, match="dict of old handles"),
        hub.relocated(moves),
    ):
        pass


def test_layers_made_by_code_are_not_relocated(toy):
    with hub.relocated({toy: "/nowhere"}):
        assert KerasLayer(toy).handle == str(toy)


def test_a_handle_where_nothing_is(tiny, tmp_path):
    model = model_of(tiny)
    model.save(tmp_path / "model.keras")
    tiny.rename(tmp_path / "there")
    with pytest.raises(errors.HandleError) as caught:
        load(tmp_path / "model.keras")
    message = str(caught.value)
    assert "no such path" in message
    assert f"with bit_tf.hub.relocated({{'{tiny}': NEW_HANDLE}}):" in message
    with hub.relocated({tmp_path / "tiny": tmp_path / "there"}):
        copy = load(tmp_path / "model.keras")
    assert np.array_equal(copy(PICTURES), model(PICTURES))
