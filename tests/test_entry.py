"""The typed description of a published version, and its JSON."""

import copy
import dataclasses
import json

import helpers
import pytest

from bit_tf import errors, handles
from hub_export import entry


def test_json_there_and_back():
    first = helpers.make_entry("google/bit/m-r50x1/1", num_classes=0)
    assert entry.Entry.parse(first.to_json()) == first
    release = handles.Release.parse(first.to_json())
    assert release.handle == first.handle
    assert (release.size, release.sha256) == (
        first.archive.size,
        first.archive.sha256,
    )
    assert release.files == first.files
    assert first.unpacked_size == sum(file.size for file in release.files)


def test_json_is_the_same_whatever_the_order():
    first = helpers.make_entry("google/bit/m-r50x1/1", num_classes=10)
    found = json.loads(first.to_json())
    turned = dict(reversed(found.items()))
    assert entry.Entry.from_dict(turned).to_json() == first.to_json()


def test_publication_is_saved_in_the_model(tmp_path):
    first = helpers.make_entry("google/bit/m-r50x1/1").publication
    first.save(tmp_path)
    found = json.loads((tmp_path / entry.PUBLICATION_FILE).read_text("utf-8"))
    assert entry.Publication.from_dict(found) == first


@pytest.mark.parametrize(
    "name", [f.name for f in dataclasses.fields(entry.Graph)]
)
def test_a_graph_without_an_attribute_is_refused(name):
    found = helpers.make_entry("a/b/1").to_dict()
    found = copy.deepcopy(found)
    del found["graph"][name]
    with pytest.raises(errors.HandleError, match="entry"):
        entry.Entry.from_dict(found)


@pytest.mark.parametrize(
    "name",
    [
        "handle",
        "version",
        "license",
        "card",
        "provenance",
        "graph",
        "published",
    ],
)
def test_an_entry_without_an_attribute_is_refused(name):
    found = helpers.make_entry("a/b/1").to_dict()
    del found[name]
    with pytest.raises(errors.HandleError, match="entry"):
        entry.Entry.from_dict(found)
