"""Handles, their spellings, and the part of an entry that consumers read."""

import json

import pytest

from bit_tf import errors, handles, variants

SHA = "0" * 64
ENTRY = {
    "schema": 1,
    "handle": "google/bit/m-r50x1",
    "version": 2,
    "archive": {"path": "x", "size": 5, "sha256": SHA},
    "files": [{"path": "assets/a", "size": 0, "sha256": SHA}],
    "more": "is passed over",
}
TFHUB = "https://tfhub.dev/google/bit/m-r50x1/ilsvrc2012_classification/1"
KAGGLE = (
    "https://www.kaggle.com/models/google/bit/TensorFlow2/"
    "m-r50x1-ilsvrc2012-classification/1"
)


@pytest.mark.parametrize(
    ("text", "publisher", "name", "version"),
    [
        ("google/bit/m-r50x1/1", "google", "bit/m-r50x1", 1),
        ("google/bit/m-r50x1", "google", "bit/m-r50x1", None),
        ("a/b", "a", "b", None),
        ("a/b/c_d/e.f/12", "a", "b/c_d/e.f", 12),
    ],
)
def test_parse(text, publisher, name, version):
    handle = handles.Handle.parse(text)
    assert handle == handles.Handle(publisher, name, version)
    assert handle.path == str(handle) == text
    assert handle.collection == name.split("/")[0]


@pytest.mark.parametrize(
    "text",
    [
        *("", "google", "google/1", "/google/bit", "google/bit/", "a//b"),
        *("a/../b", "a/.b", "a/b/01", "a/b/0", "a/1/2/b", "a/b\n", "a/b c"),
        *("assets/x", "Assets/x", "healthz/x", "a/b.tar.gz", "a/b.HTML"),
        *("a/b/c.json/1", "ä/b", "a/" + "b" * 101, "a/" * 9 + "b", None),
        *("https://tfhub.dev/google/bit", "a/b/9999999999", "a\\b/c"),
    ],
)
def test_what_is_no_handle(text):
    with pytest.raises(errors.HandleError, match="publisher/name"):
        handles.Handle.parse(text)


def test_every_published_handle_parses_and_has_a_twin():
    for row in variants.list_models():
        for address in (row.handle, row.feature_handle):
            if address is None:
                continue
            handle = handles.known(address)
            assert f"{handles.TFHUB}{handle}" == address
            assert handles.known(handles.kaggle_twin(handle)) == handle


def test_spellings_are_the_same_from_each_of_them():
    found = handles.spellings(TFHUB)
    assert found[0] == TFHUB
    assert KAGGLE in found
    assert (
        "https://kaggle.com/models/google/bit/frameworks/tensorFlow2/"
        "variations/m-r50x1-ilsvrc2012-classification/versions/1"
    ) in found
    assert (
        "https://storage.googleapis.com/tfhub-modules/"
        + ("google/bit/m-r50x1/ilsvrc2012_classification/1.tar.gz")
        in found
    )
    http = KAGGLE.replace("https", "http")
    plain = TFHUB.replace("https", "http")
    for text in (KAGGLE, http, TFHUB, plain):
        assert {text, f"{text}/", f"{text}?tf-hub-format=compressed"} <= {
            *found
        }
    assert len(found) == len(set(found)) > 15
    for address in found:
        again = handles.spellings(address)
        assert again[0] == address
        assert set(again) == set(found)
        assert handles.known(address) == handles.known(TFHUB)


@pytest.mark.parametrize(
    "address",
    [
        "https://example.com/google/bit/m-r50x1/1",
        "https://tfhub.dev.example.com/google/bit/m-r50x1/1",
        "https://tfhub.dev:8443/google/bit/m-r50x1/1",
        "https://tfhub.dev/google",
        "https://www.kaggle.com/models/google/bit/PyTorch/m-r50x1/1",
        "https://www.kaggle.com/models/else/x/TensorFlow2/y/1",
        "https://[::1",
        "gs://bucket/google/bit/m-r50x1/1",
    ],
)
def test_other_addresses_are_not_known(address):
    assert handles.known(address) is None
    assert handles.spellings(address)[0] == address
    assert not any("r50x1/1.tar" in a for a in handles.spellings(address)[1:])


def test_spellings_on_another_host():
    assert set(handles.spellings("http://hub:80/a/b/1/")) == {
        "http://hub:80/a/b/1",
        "http://hub:80/a/b/1/",
        "http://hub:80/a/b/1?tf-hub-format=compressed",
    }
    assert handles.spellings("https://h/x.tar.gz?token=1")[1:] == (
        "https://h/x.tar.gz?token=1&tf-hub-format=compressed",
    )


def test_a_kaggle_model_without_a_known_twin_is_respelled():
    found = handles.spellings(
        "https://www.kaggle.com/models/me/mine/tensorFlow2/v/3"
    )
    assert (
        "https://www.kaggle.com/models/me/mine/frameworks/TensorFlow2/"
        "variations/v/versions/3"
    ) in found
    assert not any("tfhub" in address for address in found)


def test_no_version_has_no_twin():
    handle = handles.Handle.parse("google/bit/m-r50x1")
    assert handles.kaggle_twin(handle) is None
    assert "https://tfhub.dev/google/bit/m-r50x1/" in handles.spellings(
        "https://tfhub.dev/google/bit/m-r50x1"
    )


@pytest.mark.parametrize(
    "address",
    [
        "http://h/p/a/b/1",
        "http://h/p/a/b/1/",
        "http://h/p/a/b/1.tar.gz",
        "http://h/p/a/b/1?tf-hub-format=compressed#x",
    ],
)
def test_entry_url(address):
    assert handles.entry_url(address) == "http://h/p/a/b/1/entry.json"


def test_release():
    release = handles.Release.parse(json.dumps(ENTRY))
    assert release.handle.path == "google/bit/m-r50x1/2"
    assert (release.size, release.sha256) == (5, SHA)
    assert release.files == (handles.File("assets/a", 0, SHA),)


@pytest.mark.parametrize(
    "change",
    [
        {"schema": 2},
        {"schema": None},
        {"handle": "google"},
        {"handle": "google/bit/m-r50x1/2"},
        {"version": "2"},
        {"version": True},
        {"version": 0},
        {"archive": None},
        {"archive": {"size": 5}},
        {"archive": {"size": -1, "sha256": SHA}},
        {"archive": {"size": 5, "sha256": SHA.upper() + "g"}},
        {"files": 5},
        {"files": [{"path": "../a", "size": 0, "sha256": SHA}]},
        {"files": [{"path": "/a", "size": 0, "sha256": SHA}]},
        {"files": [{"path": 3, "size": 0, "sha256": SHA}]},
    ],
)
def test_what_is_no_release(change):
    with pytest.raises(errors.HandleError, match="entry is a JSON object"):
        handles.Release.from_json(ENTRY | change)


@pytest.mark.parametrize("text", [b"<html>", "[" * 100_000, b"\xff", "[]"])
def test_what_is_no_json(text):
    with pytest.raises(errors.HandleError, match="entry is"):
        handles.Release.parse(text)
