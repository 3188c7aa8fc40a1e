"""A rendered repository of many kinds of models, without their SavedModels."""

import dataclasses

import helpers

from bit_tf import handles, labels, presets
from hub_export import pages

HOSTILE = "<script>alert(1)</script> <b>x</b> & \"q\" 'a' {{ 7*7 }} \u202e\x1b"
# What a repository has besides the rendered files, for links.
WRITTEN_ELSEWHERE = ("index.json", "entry.json")


def replaced(entry, part, **fields):
    """The entry with other values in its publication, card, graph, …"""
    value = dataclasses.replace(getattr(entry, part), **fields)
    return dataclasses.replace(entry, **{part: value})


def kinds():
    """An entry of every kind, several of one handle."""
    make = helpers.make_entry
    squash = dataclasses.asdict(presets.preset("big_transfer eval"))
    edge = dataclasses.asdict(presets.preset("hf bit-50"))
    whole = make("google/bit/m-r50x1/1")
    found = [
        whole,
        make("google/bit/m-r50x1/ilsvrc2012_classification/1", 1000),
        make("google/bit/m-r50x1/imagenet21k_classification/3", 21843),
        make("me/net/9", 5, "testing", "custom"),
        make("me/net/10", 5, "R152x2", None),
        replaced(whole, "card", preset=squash),
        replaced(whole, "card", preset=edge),
        replaced(whole, "publication", license=None, datasets=()),
        replaced(whole, "publication", license="cc-by-4.0", description=" "),
        replaced(whole, "publication", datasets=("my photos", "imagenet-21k")),
        replaced(whole, "graph", relative_error=None, tolerance=None),
        replaced(whole, "graph", trainable_variables=0, endpoints={}),
        replaced(
            whole,
            "provenance",
            source=None,
            name=None,
            sha256=None,
            versions={},
        ),
    ]
    fixed = replaced(whole, "graph", input_shape=(None, 64, 96, 3))
    fixed = replaced(fixed, "graph", dtypes=("uint8",))
    found.append(
        replaced(fixed, "card", input="RGB [n, 64, 96, 3], uint8 in [0, 255]")
    )
    return found


def entries():
    """{entry: class names or None}, in no order."""
    make = helpers.make_entry
    found = []
    for name in ("R50x1", "R50x3", "R101x1", "R101x3", "R152x4"):
        handle = f"google/bit/m-{name.lower()}"
        for path, classes in (
            (f"{handle}/1", 0),
            (f"{handle}/ilsvrc2012_classification/1", 1000),
        ):
            found.append(make(path, classes, name))
    found.append(make("google/bit/m-r50x1/imagenet21k_classification/1", 21843))
    squash = dataclasses.asdict(presets.preset("big_transfer eval"))
    newest = make("google/bit/m-r50x1/10")
    found.append(replaced(newest, "card", preset=squash))
    found[-1] = dataclasses.replace(found[-1], published="2027-01-02T03:04:05Z")
    found.append(make("google/bit/m-r50x1/9"))
    found.append(make("google/experts/bit/r50x1/in21k/animal/1"))
    hostile = make("me/flowers_classification/1", 3, "testing", "custom")
    hostile = replaced(
        hostile,
        "publication",
        description=HOSTILE,
        license=HOSTILE,
        datasets=(HOSTILE,),
    )
    hostile = replaced(
        hostile, "provenance", source=HOSTILE, notes=(HOSTILE, "two")
    )
    hostile = replaced(
        hostile,
        "card",
        citations=(HOSTILE, "javascript:alert(1)", "https://example.org/p?a&b"),
    )
    hostile = dataclasses.replace(
        hostile, files=(handles.File("assets/<i>.txt", 5, "6" * 64),)
    )
    found.append(hostile)
    bare = make("other/net/1", 12, "testing", None)
    bare = replaced(
        bare, "publication", description="W" * 150, license=None, datasets=()
    )
    bare = replaced(bare, "graph", relative_error=None, tolerance=None)
    found.append(bare)
    return found


def names(entry):
    """The class names inside an entry's SavedModel."""
    if entry.card.labels == "custom":
        return tuple(
            labels.Label("", f"{HOSTILE} {n}")
            for n in range(entry.graph.labels)
        )
    return entry.card.labels and labels.label_set(entry.card.labels)


def files(url=None):
    """{path: content} of the repository's rendered files."""
    found = pages.repository_files(entries(), url)
    for entry in entries():
        for name, data in pages.version_files(entry, names(entry), url).items():
            found[f"{entry.handle}/{name}"] = data
    return found


def write(found, root):
    """Writes files below a directory."""
    for path, data in found.items():
        target = root / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(data)
