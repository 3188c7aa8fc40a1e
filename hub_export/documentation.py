"""tfhub.dev's documentation of versions, publishers and collections.

It is Markdown of this form, which `documentation_check` checks:

    # Module google/bit/m-r50x1/1              the handle
    <blank>
    Feature vectors of BiT-M R50x1.            a short description
    <blank>
    <!-- task: image-feature-vector -->        tags, up to the first heading
    <blank>
    ## Overview                                free text
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence

from bit_tf import handles
from hub_export import description, documentation_tags
from hub_export.entry import Entry

__all__ = [
    "collection_page",
    "collection_path",
    "model_page",
    "path_of",
    "publisher_page",
    "publisher_path",
]

_NETWORKS = {
    "R50x1": "resnet50-v2",
    "R50x3": "resnet50x3-v2",
    "R101x1": "resnet101-v2",
    "R101x3": "resnet101x3-v2",
    "R152x4": "resnet152x4-v2",
}


def path_of(handle: handles.Handle) -> str:
    """Where the documentation of a version lies below assets/docs/."""
    return f"{handle.publisher}/models/{handle.name}/{handle.version}.md"


def publisher_path(publisher: str) -> str:
    """Where the documentation of a publisher lies below assets/docs/."""
    return f"{publisher}/{publisher}.md"


def collection_path(publisher: str, collection: str) -> str:
    """Where the documentation of a collection lies below assets/docs/."""
    return f"{publisher}/collections/{collection}/1.md"


def model_page(entry: Entry, url: str | None = None) -> str:
    """The documentation of a version.

    Tags that the format has no value for, such as an architecture or a data
    set of one's own, are left out; the text states them.

    Args:
      entry: of the version.
      url: the repository's public address; without it paths are relative to
        its root, and HOST stands for it in code.
    """
    card, publication = entry.card, entry.publication
    asset = f"{entry.handle}{handles.ARCHIVE_SUFFIX}"
    tags = {
        "asset-path": [description.address(asset, url) if url else asset],
        "dataset": sorted(set(publication.datasets)),
        "fine-tunable": [
            "true" if entry.graph.trainable_variables else "false"
        ],
        "format": ["saved_model_2"],
        "license": [publication.license or ""],
        "network-architecture": [_NETWORKS.get(card.architecture, "")],
        "task": [card.task],
    }
    summary = _text(description.summary(entry))
    lines = [f"# Module {entry.handle}", "", summary, ""]
    lines += [*_tag_lines(tags), "", "## Overview", ""]
    licence = publication.license or "not stated"
    lines += _rows([*description.model_facts(entry), ("Licence", licence)])
    lines += ["", "## Input", "", *_rows(description.input_facts(entry))]
    lines += ["", "## Outputs", "", "| Call | Output | Shape |"]
    lines += ["| --- | --- | --- |"]
    lines += [
        f"| {' | '.join(_text(part) for part in output)} |"
        for output in description.outputs(entry)
    ]
    lines += ["", "## Usage"]
    for example in description.examples(entry, url):
        lines += ["", f"### {_text(example.title)}", ""]
        code = description.clean(example.code)
        lines += [f"```{example.language}", code, "```"]
    if not url:
        host = description.HOST
        lines += ["", f"{host} stands for the address of this repository."]
    for title, rows in (
        ("Archive", description.size_facts(entry)),
        ("Provenance", description.provenance_facts(entry)),
        ("Parity", description.parity_facts(entry)),
    ):
        lines += ["", f"## {title}", "", *_rows(rows)]
    if card.citations:
        lines += ["", "## Citations", ""]
        lines += [f"- {_text(paper)}" for paper in card.citations]
    return "\n".join([*lines, ""])


def publisher_page(
    publisher: str, entries: Iterable[Entry], url: str | None = None
) -> str:
    """The documentation of a publisher.

    Args:
      publisher: such as "google".
      entries: of the publisher's versions.
      url: as in `model_page`; without it links go to the other files.
    """
    models = description.newest(entries)
    lines = [f"# Publisher {publisher}", _text(publisher), ""]
    lines += ["## Models", "", *_items(models, "", url)]
    return "\n".join([*lines, ""])


def collection_page(
    publisher: str,
    collection: str,
    entries: Iterable[Entry],
    url: str | None = None,
) -> str:
    """The documentation of a collection.

    Args:
      publisher: such as "google".
      collection: such as "bit".
      entries: of the collection's versions, one at least.
      url: as in `publisher_page`.
    """
    models = description.newest(entries)
    cards = [entry.card for entry in models]
    tags = {
        "dataset": sorted(
            {name for entry in models for name in entry.publication.datasets}
        ),
        "network-architecture": sorted(
            {_NETWORKS.get(card.architecture, "") for card in cards}
        ),
        "task": sorted({card.task for card in cards}),
    }
    lines = [f"# Collection {publisher}/{collection}/1", ""]
    count = "1 model" if len(models) == 1 else f"{len(models)} models"
    lines += [f"{count} of {_text(publisher)}.", ""]
    lines += [*_tag_lines(tags), "", "## Models", ""]
    lines += _items(models, "../../", url)
    return "\n".join([*lines, ""])


def _items(models: Sequence[Entry], up: str, url: str | None) -> Iterator[str]:
    """A list of models; `up` leads to their publisher's folder."""
    for entry in models:
        _, _, below = path_of(entry.handle).partition("/")
        link = description.address(entry.handle, url) if url else f"{up}{below}"
        summary = _text(description.summary(entry))
        yield f"- [{_text(entry.handle.path)}]({link}): {summary}"


def _rows(facts: Iterable[tuple[str, str]]) -> Iterator[str]:
    """A table of two columns."""
    yield "| | |"
    yield "| --- | --- |"
    for name, value in facts:
        yield f"| {_text(name)} | {_text(value)} |"


def _text(text: str) -> str:
    """Text for Markdown that shows it as it is, in one line.

    It can begin no heading, list, tag, comment, link, table or HTML.
    """
    text = " ".join(description.clean(text).split())
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    text = re.sub(r"([\\`*\[\]|~$]|(?<!\w)_|_(?!\w))", r"\\\1", text)
    text = re.sub(r"^([-+=#])", r"\\\1", text)
    return re.sub(r"^(\d+)([.)])(?=\s|$)", r"\1\\\2", text)


def _tag_lines(tags: Mapping[str, Iterable[str]]) -> Iterator[str]:
    """A line for every value that the format knows."""
    for key, values in sorted(tags.items()):
        for value in values:
            if not documentation_tags.wrong(key, value):
                yield f"<!-- {key}: {value} -->"
