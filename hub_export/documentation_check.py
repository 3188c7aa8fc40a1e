"""Whether a Markdown file has the form of tfhub.dev's documentation."""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from bit_tf import errors, handles
from hub_export import documentation_tags
from hub_export.description import clean

__all__ = ["check", "tags"]


class _Kind(NamedTuple):
    """A kind of file.

    Attributes:
      header: its first line.
      required: tags that it must have.
      optional: tags that it may have.
    """

    header: re.Pattern
    required: frozenset[str]
    optional: frozenset[str]


_PUBLISHER = r"(?P<publisher>[a-z\d-]+)"
_NAME = r"(?P<name>[\w.-]+(?:/[\w.-]+)*)/(?P<version>\d+)"
_KINDS = {
    "Module": _Kind(
        re.compile(f"# Module {_PUBLISHER}/{_NAME}", re.ASCII),
        frozenset(["asset-path", "fine-tunable", "format", "task"]),
        frozenset(
            [
                "colab",
                "dataset",
                "interactive-visualizer",
                "language",
                "license",
                "network-architecture",
            ]
        ),
    ),
    "Publisher": _Kind(
        re.compile(f"# Publisher {_PUBLISHER}", re.ASCII),
        frozenset(),
        frozenset(),
    ),
    "Collection": _Kind(
        re.compile(f"# Collection {_PUBLISHER}/{_NAME}", re.ASCII),
        frozenset(["task"]),
        frozenset(["dataset", "language", "network-architecture"]),
    ),
}
_TAG = re.compile(r"<!--\s*(?P<key>[\w\s-]+?)\s*:\s*(?P<value>.+?)\s*-->")
_REPEATED = ("dataset", "language", "network-architecture", "task")
_MODEL_LINK = re.compile(
    r"https?://[^\s()]+/[\w.-]+/[\w./-]+|\]\([./]*models/[\w./-]+\.md\)"
)
_LONGEST_DESCRIPTION = 700


def check(text: str, path: str) -> None:
    """Checks a file of documentation, without the network.

    Args:
      text: of the file.
      path: below assets/docs/, such as "google/models/bit/m-r50x1/1.md".

    Raises:
      HandleError: it does not follow the format; the message lists every
        problem with its line.
    """
    problems = sorted(_problems(text.split("\n"), path))
    if problems:
        listed = "".join(
            f"\n  line {number}: {clean(problem)}"
            for number, problem in problems
        )
        raise errors.HandleError(
            "Documentation follows tfhub.dev's format: a first line with the "
            "handle, a short description, and tags up to the first heading. "
            f"Received: {path} with{listed}\nCorrect these lines, or what "
            "they were made from."
        )


def tags(text: str) -> set[tuple[str, str]]:
    """The tags of a file, each as (key, value), up to its first heading."""
    lines = text.split("\n")
    found = set()
    for line in lines[1:]:
        if line.startswith("#"):
            break
        match = _TAG.fullmatch(line.strip())
        if match:
            found.add((match["key"], match["value"]))
    return found


def _problems(lines: Sequence[str], path: str) -> Iterator[tuple[int, str]]:
    """(line, what is wrong) of all; lines are counted from 1."""
    for number, line in enumerate(lines, 1):
        if "\r" in line:
            yield number, r"lines end in \n, without \r"
            return
    name, kind = "", None
    first = lines[0].replace("&zwnj;", "")
    for name, kind in _KINDS.items():
        match = kind.header.fullmatch(first)
        if match:
            yield from _header_problems(name, match.groupdict(), path)
            break
    else:
        yield (
            1,
            "the first line is '# Module publisher/name/version', "
            "'# Publisher publisher' or '# Collection publisher/name/1', the "
            f"publisher of a-z, 0-9 and '-', not {errors.brief(lines[0])}",
        )
        name, kind = _guess(path)
    heading = next(
        (
            index
            for index, line in enumerate(lines)
            if index and line.startswith("#")
        ),
        len(lines),
    )
    start = 2 if len(lines) > 1 and not lines[1].strip() else 1
    end = start
    while end < heading and lines[end] and not lines[end].startswith("<!--"):
        end += 1
    description = " ".join(lines[start:end]).strip()
    if not description:
        yield 2, "a short description follows the first line"
    elif len(description) > _LONGEST_DESCRIPTION:
        yield (
            start + 1,
            f"a description has up to {_LONGEST_DESCRIPTION} characters, not "
            f"{len(description)}",
        )
    yield from _tag_problems(lines, end, heading, name, kind)
    yield from _body_problems(lines, heading, name)


def _guess(path: str) -> tuple[str, _Kind]:
    """The kind of a file whose first line does not tell."""
    parts = path.split("/")
    name = "Publisher" if len(parts) == 2 else "Module"
    if parts[1:2] == ["collections"]:
        name = "Collection"
    return name, _KINDS[name]


def _header_problems(
    kind: str, found: Mapping[str, str], path: str
) -> Iterator[tuple[int, str]]:
    publisher = found["publisher"]
    if kind == "Publisher":
        wanted = f"{publisher}/{publisher}.md"
    else:
        name, version = found["name"], found["version"]
        if kind == "Collection" and version != "1":
            yield 1, f"a collection has the version 1, not {version}"
        if any(part.startswith(".") for part in name.split("/")):
            yield 1, f"no part of a name begins with a dot, as in {name!r}"
        elif kind == "Module":
            try:
                handles.Handle.parse(f"{publisher}/{name}/{version}")
            except errors.HandleError as error:
                yield 1, str(error)
        folder = "models" if kind == "Module" else "collections"
        wanted = f"{publisher}/{folder}/{name}/{version}.md"
    if path != wanted:
        yield 1, f"a file with this first line is {wanted}, not {path}"


def _tag_problems(
    lines: Sequence[str], start: int, heading: int, name: str, kind: _Kind
) -> Iterator[tuple[int, str]]:
    """Of the lines between the description and the first heading."""
    found: dict[str, set[str]] = {}
    known = kind.required | kind.optional
    for number, line in enumerate(lines[start:heading], start + 1):
        match = _TAG.fullmatch(line)
        if not line or (
            name == "Publisher" and line.startswith("[![Icon URL]]")
        ):
            continue
        if not match or "-->" in match["value"] or "<!--" in match["value"]:
            yield (
                number,
                "before the first heading stand lines of the form "
                f"'<!-- key: value -->' alone, not {errors.brief(line)}",
            )
            continue
        key, value = match["key"], match["value"]
        if key not in known:
            some = errors.near(known, key) or sorted(known)
            hint = f"; it has {', '.join(some)}" if some else ""
            yield number, f"a {name} has no tag {key!r}{hint}"
            continue
        values = found.setdefault(key, set())
        if value in values or (values and key not in _REPEATED):
            yield number, f"the tag {key} is repeated"
        values.add(value)
        wrong = documentation_tags.wrong(key, value)
        if wrong:
            yield number, wrong
    for key in sorted(kind.required - set(found)):
        yield start + 1, f"a {name} must have the tag {key}"


def _body_problems(
    lines: Sequence[str], heading: int, name: str
) -> Iterator[tuple[int, str]]:
    """Of the lines from the first heading on."""
    keys = {key for kind in _KINDS.values() for key in kind.required}
    keys |= {key for kind in _KINDS.values() for key in kind.optional}
    fence, opened = "", 0
    for number, line in enumerate(lines[heading:], heading + 1):
        match = re.match(r" {0,3}(`{3,}|~{3,})", line)
        if fence:
            if match and match[1].startswith(fence) and not line.strip("`~ "):
                fence = ""
            continue
        if match:
            fence = match[1]
            continue
        tag = _TAG.match(line)
        if tag and tag["key"] in keys:
            yield number, f"the tag {tag['key']} stands after the first heading"
        for mark in re.findall(r"<!--|-->", line):
            opened = (opened or number) if mark == "<!--" else 0
    if opened:
        yield opened, "the comment that begins here does not end"
    if name == "Collection" and not any(map(_MODEL_LINK.search, lines)):
        yield heading, "a collection links to a model of it"
