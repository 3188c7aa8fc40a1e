"""Pages of pictures that were found, in one HTML file without scripts."""

import base64
import dataclasses
import functools
import importlib.resources
import io
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jinja2

from bit_tf import errors, images, items, picture_files, tar_items
from bit_tf.embedding_table import Facts, Row
from bit_tf.errors import ImageError
from bit_tf.index import Hit
from bit_tf.items import Item
from bit_tf.near_duplicates import Group

__all__ = ["duplicates", "printable", "results"]

# Pixels of the longer edge of a picture on a page.
_EDGE = 160
_QUALITY = 80
# Groups on a page, and pictures of a group.
_GROUPS, _MEMBERS = 100, 24
_CLASSES = 3
_URL = re.compile(r"https?://", re.IGNORECASE)
_TFDS = re.compile(r"tfds:(.+)/([^/]+)/(\d+)(?:#(.+))?")
# What ends lines or turns their direction, beside what cannot be seen.
_CONTROLS = re.compile(
    r"[\x00-\x1f\x7f-\x9f\ud800-\udfff\u2028-\u202e\u2066-\u2069]"
)


class _Picture(NamedTuple):
    """A data URL, or why there is none."""

    url: str = ""
    reason: str = ""


@dataclasses.dataclass(frozen=True)
class _Card:
    """One row of a page."""

    source: str
    id: str
    picture: _Picture
    score: float | None = None
    rank: int = 0
    note: str = ""
    classes: Sequence[tuple[str, float]] = ()
    size: str = ""

    @property
    def link(self) -> str:
        return self.source if _URL.match(self.source) else ""


@dataclasses.dataclass(frozen=True)
class _Section:
    title: str
    cards: Sequence[_Card]
    note: str = ""


def results(
    query: str,
    data: bytes | None,
    hits: Sequence[Hit],
    facts: Facts,
    *,
    where: str | None = None,
    fetch: bool = False,
    data_dir: str | None = None,
) -> str:
    """A page of a query and the rows nearest to it.

    Pictures are read from where they were when they were embedded; where that
    fails, the page says why.

    Args:
      query: its name.
      data: the query's bytes; None where it is the source of a row.
      hits: the nearest first.
      facts: of the index.
      where: the filter that was used.
      fetch: whether pictures that are URLs are fetched.
      data_dir: where TFDS keeps datasets.

    Returns:
      HTML.
    """
    rows = [hit.row for hit in hits]
    sources = [row.source for row in rows]
    if data is None:
        sources.append(query)
    shown = _thumbnails(sources, fetch, data_dir)
    own = shown[query] if data is None else _thumbnail(data)
    cards = [
        _card(row, shown, score=score, rank=rank)
        for rank, (score, row) in enumerate(hits, 1)
    ]
    asked = [("filter", where)] if where else []
    return _render(
        "Search by picture",
        [*asked, *_facts(facts)],
        [
            _Section("Query", [_Card(query, query, own)]),
            _Section(
                "Nearest pictures",
                cards,
                "Scores are cosines: 1 is the same direction."
                if cards
                else "No picture was found.",
            ),
        ],
    )


def duplicates(
    groups: Sequence[Group],
    facts: Facts,
    threshold: float,
    *,
    fetch: bool = False,
    data_dir: str | None = None,
) -> str:
    """A page of groups of nearly equal pictures.

    It shows the first 100 groups, and of each 24 pictures, and says how many
    there are.

    Args:
      groups: the largest first.
      facts: of the index.
      threshold: with which they were found.
      fetch, data_dir: as in `results`.

    Returns:
      HTML.
    """
    shown_groups = [group.members[:_MEMBERS] for group in groups[:_GROUPS]]
    shown = _thumbnails(
        [member.row.source for members in shown_groups for member in members],
        fetch,
        data_dir,
    )
    sections = []
    for members, group in zip(shown_groups, groups, strict=False):
        count = len(group.members)
        more = count - len(members)
        sections.append(
            _Section(
                f"{count} pictures",
                [
                    _card(
                        member.row,
                        shown,
                        score=member.score,
                        note="same file" if member.same_file else "",
                    )
                    for member in members
                ],
                f"{more} more are not shown." if more else "",
            )
        )
    more = len(groups) - len(shown_groups)
    if more or not groups:
        text = f"{more} smaller groups" if more else "No near-duplicates"
        note = "--json gives all of them." if more else "No pair is so near."
        sections.append(_Section(text, [], note))
    return _render(
        "Near-duplicates",
        [
            ("groups", str(len(groups))),
            ("pictures", str(sum(len(g.members) for g in groups))),
            ("cosine at least", f"{threshold:g}"),
            *_facts(facts),
        ],
        sections,
    )


def printable(text: str) -> str:
    """Text without what a terminal or a page would obey, escaped."""
    return _CONTROLS.sub(lambda match: ascii(match[0])[1:-1], text)


def _facts(facts: Facts) -> list[tuple[str, str]]:
    return [
        ("model", facts.model),
        ("model hash", facts.model_hash),
        ("preset", facts.preset.name),
        ("precision", facts.precision),
    ]


def _card(
    row: Row,
    shown: Mapping[str, _Picture],
    *,
    score: float,
    rank: int = 0,
    note: str = "",
) -> _Card:
    classes = zip(row.names or (), row.scores or (), strict=True)
    return _Card(
        row.source,
        row.id,
        shown[row.source],
        score=score,
        rank=rank,
        note=note,
        classes=list(classes)[:_CLASSES],
        size=f"{row.width} × {row.height}" if row.width else "",
    )


def _thumbnails(
    sources: Iterable[str], fetch: bool, data_dir: str | None
) -> dict[str, _Picture]:
    """The picture of each source, or the reason why there is none."""
    shown: dict[str, _Picture] = {}
    found: list[Item] = []
    sources = list(dict.fromkeys(sources))
    members = _members(sources)
    for source in sources:
        dataset = _TFDS.fullmatch(source)
        if _URL.match(source):
            if not fetch:
                shown[source] = _Picture(reason="A URL; --fetch fetches it.")
                continue
            location: tuple[Any, ...] = ("url", source)
        elif dataset:
            name, part, index, feature = dataset.groups()
            location = ("tfds", name, data_dir, part, int(index), feature)
        else:
            location = members.get(source, ("file", source))
        found.append(Item(source, source, location))
    try:
        with items.Reader(retries=0) as reader:
            for item, data in reader.read_all(found):
                shown[item.source] = (
                    _Picture(reason=str(data))
                    if isinstance(data, ImageError)
                    else _thumbnail(data)
                )
    except errors.DatasetError as error:
        for item in found:
            shown.setdefault(item.source, _Picture(reason=str(error)))
    return shown


def _members(sources: Iterable[str]) -> dict[str, tuple[Any, ...]]:
    """Where the pictures are that sources name in tar archives."""
    wanted: dict[str, set[str]] = {}
    for source in sources:
        archive, mark, _ = source.partition(".tar#")
        if mark and not _URL.match(source):
            wanted.setdefault(f"{archive}.tar", set()).add(source)
    places: dict[str, tuple[Any, ...]] = {}
    for archive, names in wanted.items():
        try:
            for member in tar_items.members(archive):
                shown = picture_files.as_text(f"{archive}#{member.name}")
                if shown in names:
                    places[shown] = (
                        "tar",
                        archive,
                        member.offset,
                        member.size,
                    )
                    names.discard(shown)
                if not names:
                    break
        except errors.DatasetError:
            continue
    return places


def _thumbnail(data: bytes) -> _Picture:
    try:
        pixels = images.decode(data)
        height, width = pixels.shape[:2]
        scale = min(1.0, _EDGE / max(height, width))
        small = images.resize(
            pixels,
            max(1, round(height * scale)),
            max(1, round(width * scale)),
            antialias=True,
        )
        file = io.BytesIO()
        images.to_pil(small).save(file, "JPEG", quality=_QUALITY)
    except ImageError as error:
        return _Picture(reason=str(error))
    text = base64.b64encode(file.getvalue()).decode()
    return _Picture(f"data:image/jpeg;base64,{text}")


def _render(
    title: str,
    facts: Sequence[tuple[str, str]],
    sections: Sequence[_Section],
) -> str:
    return _template().render(title=title, facts=facts, sections=sections)


@functools.cache
def _template() -> jinja2.Template:
    data = importlib.resources.files("bit_tf") / "data" / "search.html"
    environment = jinja2.Environment(
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        finalize=lambda value: (
            printable(value) if isinstance(value, str) else value
        ),
    )
    return environment.from_string(data.read_text(encoding="utf-8"))
