"""Where everything lies in a repository."""

import helpers
import pytest

from bit_tf import errors, handles
from hub_export import tree


def put(root, handle):
    found = helpers.make_entry(handle)
    folder = tree.directory(root, found.handle)
    folder.mkdir(parents=True)
    (folder / handles.ENTRY_FILE).write_text(found.to_json(), "utf-8")
    return found


def test_released_versions(tmp_path):
    names = ["a/b/2", "a/b/10", "a/b/c_classification/1", "z/y/1"]
    for name in names:
        put(tmp_path, name)
    (tmp_path / "a" / "b" / "3").mkdir()  # no entry: not published
    (tmp_path / "a" / "b" / "07").mkdir()
    put(tmp_path / ".staging", "a/b/11")
    put(tmp_path / "assets", "docs/b/1")
    put(tmp_path / "a" / "b" / "2" / "model", "a/b/5")
    assert [handle.path for handle in tree.released(tmp_path)] == names
    model = handles.Handle.parse("a/b")
    assert tree.versions(tmp_path, model) == [2, 10]
    assert tree.newest(tmp_path, model).path == "a/b/10"
    assert tree.newest(tmp_path, handles.Handle.parse("no/body")) is None
    assert tree.versions(tmp_path, model.at(2)) == [2, 10]


def test_paths(tmp_path):
    handle = handles.Handle.parse("a/b/2")
    assert tree.directory(tmp_path, handle) == tmp_path / "a" / "b" / "2"
    assert tree.archive(tmp_path, handle) == tmp_path / "a" / "b" / "2.tar.gz"


def test_read(tmp_path):
    found = put(tmp_path, "a/b/2")
    assert tree.read(tmp_path, found.handle) == found
    (tmp_path / "a" / "b" / "2").rename(tmp_path / "a" / "b" / "3")
    with pytest.raises(errors.HandleError, match="never moved"):
        tree.read(tmp_path, found.handle.at(3))
    with pytest.raises(FileNotFoundError):
        tree.read(tmp_path, found.handle)
