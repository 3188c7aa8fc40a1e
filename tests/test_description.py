import json

import helpers
import pytest
import sample_site
from sample_site import replaced

from bit_tf import errors
from hub_export import description


@pytest.mark.parametrize(
    "url",
    [
        "example.org",
        "ftp://example.org",
        "https://example.org/?q=1",
        "https://example.org/#x",
        "https://example.org/a b",
        'https://example.org/"',
        "https://example.org/\n",
        "https://exa'mple.org/`",
        "javascript:alert(1)",
        "https://",
        "",
        7,
    ],
)
def test_addresses_that_are_none(url):
    with pytest.raises(errors.HandleError, match="Received"):
        description.address("google/bit/m-r50x1/1", url)


@pytest.mark.parametrize(
    "url",
    ["http://127.0.0.1:8080", "https://example.org/a/b/", "http://[::1]:80/x"],
)
def test_addresses(url):
    found = description.address("a/b/1", url)
    assert found == f"{url.rstrip('/')}/a/b/1"


def test_shapes_are_spelled():
    entry = helpers.make_entry("me/net/1", 0, "testing")
    shapes = {"block1": (None, None, None, 128), "x": (2, None, None, None, 7)}
    shapes["y"] = (None, None, None, None)
    found = description.outputs(replaced(entry, "graph", endpoints=shapes))
    spelled = [output.shape for output in found[-3:]]
    assert spelled == ["[n, h, w, 128]", "[2, h, w, ?, 7]", "[n, h, w, ?]"]
    assert ("Shape", "[n, height, width, 3]") in description.input_facts(entry)


@pytest.mark.parametrize(
    ("size", "words"),
    [
        (0, "0 bytes"),
        (999, "999 bytes"),
        (1000, "1 kB"),
        (84_601_267, "84.6 MB"),
        (999_600_000, "1 GB"),
        (3_746_270_104, "3.75 GB"),
        (10**18, "1e+06 TB"),
    ],
)
def test_file_size(size, words):
    assert description.file_size(size) == words


@pytest.mark.parametrize("entry", sample_site.kinds())
def test_examples_are_python_and_shell(entry):
    found = description.examples(entry, "https://example.org/hub")
    assert len({example.name for example in found}) == len(found)
    for example in found:
        assert f"https://example.org/hub/{entry.handle}" in example.code
        if example.language == "python":
            compile(example.code, example.name, "exec")
    names = {example.name for example in found}
    assert {
        "hub-load",
        "keras-2",
        "keras-3",
        "encoder",
        "embed",
        "curl",
    } <= names
    assert ("classify" in names) == bool(entry.card.num_classes)
    code = json.dumps([example.code for example in found])
    trainable = bool(entry.graph.trainable_variables)
    assert ("trainable=True" in code) == trainable
