import hashlib
import json
import os
import pathlib
import sys

import pytest

from bit_tf import cache_records, errors

BODY = b"a file of weights"


def sha256(data):
    return hashlib.sha256(data).hexdigest()


def test_the_cache_directory(monkeypatch, tmp_path):
    monkeypatch.setenv("BIT_TF_CACHE", "~/models")
    assert cache_records.cache_directory() == pathlib.Path.home() / "models"
    monkeypatch.setenv("BIT_TF_CACHE", "")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    if sys.platform == "linux":
        assert cache_records.cache_directory() == tmp_path / "bit-tf"
    assert "bit-tf" in str(cache_records.cache_directory())


def test_the_record_of_a_file(tmp_path):
    path = tmp_path / "weights.npz"
    path.write_bytes(BODY)
    assert cache_records.record_of(path) is None
    cache_records.adopt(cache_records.Place(path), None)
    record = cache_records.record_of(path)
    assert record == tmp_path / "weights.npz.json"
    assert json.loads(record.read_text()) == {
        "url": None,
        "size": len(BODY),
        "sha256": sha256(BODY),
        "etag": None,
        "downloaded": None,
    }
    path.unlink()
    assert cache_records.record_of(path) is None
    for folder in (tmp_path, "/", ".", ""):
        assert cache_records.record_of(folder) is None
    (tmp_path / "own.npz").write_bytes(b"x")
    (tmp_path / "own.npz.json").write_text("{}")
    assert cache_records.record_of(tmp_path / "own.npz") is None


def linked(folder, name, data, blob, chain=False):
    """A file as huggingface_hub keeps it."""
    blobs = folder / "blobs"
    blobs.mkdir(parents=True, exist_ok=True)
    if chain:
        (folder / "store").mkdir()
        (folder / "store" / sha256(b"other")).write_bytes(data)
        (blobs / blob).symlink_to(folder / "store" / sha256(b"other"))
    else:
        (blobs / blob).write_bytes(data)
    path = folder / "snapshots" / "commit" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.symlink_to(os.path.relpath(blobs / blob, path.parent))
    return path


@pytest.mark.parametrize("chain", [False, True])
def test_blobs_are_compared_with_their_names(tmp_path, chain):
    path = linked(tmp_path, "a.safetensors", BODY, sha256(BODY), chain)
    record = tmp_path / "cache" / "record.json"
    cache_records.compare([path], record)
    path.write_bytes(BODY[:-1] + b"?")
    with pytest.raises(errors.DownloadError, match=sha256(BODY)) as caught:
        cache_records.compare([path], record)
    assert f"Delete {path.resolve()} to" in str(caught.value)
    assert not record.parent.exists()


def test_other_files_are_compared_with_their_first_content(tmp_path):
    """Small ones, copies, and links elsewhere than to blobs."""
    first = linked(tmp_path, "a.bin", b"1", "0" * 40)
    copy = first.with_name("b.bin")
    copy.write_bytes(b"2")
    elsewhere = first.with_name("c.bin")
    (tmp_path / sha256(b"?")).write_bytes(b"3")
    elsewhere.symlink_to(tmp_path / sha256(b"?"))
    record = tmp_path / "cache" / "huggingface" / "a--b@commit.json"
    cache_records.compare([first, copy], record)
    cache_records.compare([elsewhere], record)
    hashes = {"a.bin": b"1", "b.bin": b"2", "c.bin": b"3"}
    assert json.loads(record.read_text()) == {
        "sha256": {name: sha256(data) for name, data in hashes.items()}
    }
    for path in (first, copy, elsewhere):
        cache_records.compare([path], record)
        path.write_bytes(b"4")
        with pytest.raises(errors.DownloadError, match=path.name) as caught:
            cache_records.compare([path], record)
        assert f"Delete {path.resolve()} to" in str(caught.value)
        assert f"delete {record} as well" in str(caught.value)
    for text in ("", "[]", "{}", '{"sha256": {"a.bin": 1}}', "[" * 100_000):
        record.write_text(text)
        with pytest.raises(errors.DownloadError, match="is damaged") as caught:
            cache_records.compare([first], record)
        assert str(record) in str(caught.value)
    with pytest.raises(errors.DownloadError, match="BIT_TF_CACHE"):
        cache_records.compare([first], first / "record.json")
    with pytest.raises(errors.DownloadError, match="No such file"):
        cache_records.compare([tmp_path / "none"], tmp_path / "record.json")
