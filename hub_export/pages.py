"""The pages of a repository, for browsers: rendered once, plain files.

Links are relative and name index.html, so that the tree works under any
prefix, on a server, in a bucket, and from a disk. Everything can be read
without the script, which adds filters and buttons; nothing is asked of another
host.
"""

import functools
import importlib.resources
import posixpath
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jinja2
import markupsafe

from bit_tf import errors, handles
from bit_tf.labels import Label
from hub_export import description, documentation, tree
from hub_export.contradictions import contradictions, mistyped
from hub_export.entry import Entry

__all__ = ["CONTENT_SECURITY_POLICY", "repository_files", "version_files"]

# That of the <meta> tag in every page; a server may send it as a header, too.
CONTENT_SECURITY_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src data:; "
    "base-uri 'none'; form-action 'none'"
)
_FRONT = "index.html"
_ASSETS = {"assets/script.js": "script.js", "assets/style.css": "style.css"}
# Sizes of archives, to filter by: the smallest is below the first limit.
_GROUPS = (
    (100_000_000, "up to 100 MB"),
    (1_000_000_000, "100 MB to 1 GB"),
)
_LARGEST_GROUP = "over 1 GB"


def version_files(
    entry: Entry, labels: Sequence[Label] | None, url: str | None = None
) -> dict[str, bytes]:
    """What a version's folder holds for readers: its page and its card.

    Args:
      entry: of the version.
      labels: the class names inside the SavedModel, or None.
      url: the repository's public address; without it HOST stands for it in
        code, which the page's script replaces.

    Returns:
      {name in the folder: content}

    Raises:
      VerificationError: the card contradicts the graph or the labels.
      HandleError: `url` is no plain web address.
    """
    problems = contradictions(entry)
    count = None if labels is None else len(labels)
    if not problems and count != entry.graph.labels:
        problems = [
            f"The SavedModel has {entry.graph.labels} labels. "
            f"Received: {count}."
        ]
    if problems:
        raise errors.VerificationError(
            f"A page says what is true of its model. Received for "
            f"{entry.handle}: {' '.join(problems)} Export the model anew, or "
            "correct its card."
        )
    return {
        tree.PAGE_FILE: _version_page(entry, labels, url),
        tree.CARD_FILE: _encoded(documentation.model_page(entry, url)),
    }


def repository_files(
    entries: Iterable[Entry],
    url: str | None = None,
    title: str = "BiT models",
) -> dict[str, bytes]:
    """All that is made anew from the versions, but index.json and entry.json.

    A page for the front, and for every folder above versions: publishers,
    collections, models; what these need; tfhub.dev's documentation.

    Args:
      entries: of every version.
      url: as in `version_files`.
      title: of the repository.

    Returns:
      {path below the repository's root: content}

    Raises:
      HandleError: an entry has values of wrong types, or `url` is no plain
        web address.
    """
    entries = sorted(entries, key=lambda entry: entry.handle)
    for entry in entries:
        problems = mistyped(entry)
        if problems:
            raise errors.HandleError(
                f"An entry has the attributes that hub_export.entry.Entry "
                f"describes. Received for {entry.handle}: "
                f"{' '.join(problems)} Publish the version anew."
            )
    site = _Site(entries, url, title)
    files = {_FRONT: site.front()}
    for folder in site.folders:
        files[f"{folder}/{tree.PAGE_FILE}"] = site.folder(folder)
    for path, name in _ASSETS.items():
        files[path] = _data(name)
    for path, text in _documentation(entries, url).items():
        files[f"assets/docs/{path}"] = _encoded(text)
    return files


def _documentation(
    entries: Sequence[Entry], url: str | None
) -> Mapping[str, str]:
    """tfhub.dev's documentation: path below assets/docs/ → text."""
    files = {}
    publishers: dict[str, list[Entry]] = {}
    collections: dict[tuple[str, str], list[Entry]] = {}
    for entry in entries:
        handle = entry.handle
        publishers.setdefault(handle.publisher, []).append(entry)
        key = handle.publisher, handle.collection
        collections.setdefault(key, []).append(entry)
        files[documentation.path_of(handle)] = documentation.model_page(
            entry, url
        )
    for publisher, some in publishers.items():
        path = documentation.publisher_path(publisher)
        files[path] = documentation.publisher_page(publisher, some, url)
    for key, some in collections.items():
        path = documentation.collection_path(*key)
        files[path] = documentation.collection_page(*key, some, url)
    return files


class _Step(NamedTuple):
    """A part of the way to a page: its name, and its page unless it is this."""

    name: str
    path: str | None


class _Site:
    """Renders the pages of a repository.

    Args:
      entries: of every version, in the order of their handles.
      url: the repository's public address, or None.
      title: of the repository.

    Attributes:
      folders: path → the entries below it, for every folder above versions.
    """

    def __init__(self, entries: Sequence[Entry], url: str | None, title: str):
        self._entries = entries
        self._url = url
        self._title = title
        self.folders: dict[str, list[Entry]] = {}
        # Of every model, the newest first.
        self._versions: dict[str, list[Entry]] = {}
        for entry in entries:
            path = entry.handle.at(None).path
            self._versions.setdefault(path, []).insert(0, entry)
            parts = path.split("/")
            for depth in range(1, len(parts) + 1):
                folder = "/".join(parts[:depth])
                self.folders.setdefault(folder, []).append(entry)

    def front(self) -> bytes:
        publishing = description.Example(
            "publish",
            "Publish a model",
            "sh",
            "hub-export publish CHECKPOINT --repository . "
            "--handle PUBLISHER/NAME",
        )
        return _render(
            "front.html",
            _FRONT,
            self._url,
            name=self._title,
            description=self._title,
            steps=[_Step(self._title, None)],
            versions=self._entries,
            folders=[
                self._fold(path)
                for path in self.folders
                if path.count("/") < 2 and path not in self._versions
            ],
            example=publishing,
            **self._listed(self._entries),
        )

    def folder(self, path: str) -> bytes:
        """The page of a publisher, collection, model, or what lies between."""
        if path in self._versions:
            return self._model(path)
        depth = path.count("/")
        kind = ("Publisher", "Collection", "Folder")[min(depth, 2)]
        publisher, _, name = path.partition("/")
        documents = (
            documentation.publisher_path(publisher),
            documentation.collection_path(publisher, name),
            None,
        )[min(depth, 2)]
        below = [
            other
            for other in self.folders
            if posixpath.dirname(other) == path and other not in self._versions
        ]
        return _render(
            "folder.html",
            f"{path}/{tree.PAGE_FILE}",
            self._url,
            name=path,
            description=f"{kind} {path}",
            steps=_steps(path),
            kind=kind,
            documentation=documents and f"assets/docs/{documents}",
            folders=[self._fold(other) for other in below],
            **self._listed(self.folders[path]),
        )

    def _model(self, path: str) -> bytes:
        versions = self._versions[path]
        newest = versions[0]
        others = [
            entry
            for entry in self.folders[path]
            if entry.handle.at(None) != newest.handle.at(None)
        ]
        return _render(
            "model.html",
            f"{path}/{tree.PAGE_FILE}",
            self._url,
            name=path,
            description=description.summary(newest),
            steps=_steps(path),
            summary=description.summary(newest),
            newest=_version_row(newest),
            example=description.examples(newest, self._url)[0],
            versions=[_version_row(entry) for entry in versions],
            **self._listed(others),
        )

    def _fold(self, path: str) -> Mapping[str, Any]:
        """What a list of folders says of one."""
        return {
            "path": path,
            "page": f"{path}/{tree.PAGE_FILE}",
            "count": len(description.newest(self.folders[path])),
        }

    def _listed(self, entries: Iterable[Entry]) -> Mapping[str, Any]:
        """The table of models, and what it can be filtered by."""
        rows = [self._row(entry) for entry in description.newest(entries)]
        names = {
            "architecture": "Architecture",
            "head": "Head",
            "publisher": "Publisher",
            "group": "Archive",
        }
        facets = []
        for key, name in names.items():
            found = [row[key] for row in rows]
            groups = [text for _, text in _GROUPS]
            order = {text: index for index, text in enumerate(groups)}
            values = sorted(
                set(found), key=lambda text: (order.get(text, len(order)), text)
            )
            facets.append(
                {
                    "key": "size" if key == "group" else key,
                    "name": name,
                    "options": [
                        (value, found.count(value)) for value in values
                    ],
                }
            )
        return {"rows": rows, "facets": facets}

    def _row(self, entry: Entry) -> Mapping[str, Any]:
        model = entry.handle.at(None)
        count = len(self._versions[model.path])
        group = next(
            (text for limit, text in _GROUPS if entry.archive.size <= limit),
            _LARGEST_GROUP,
        )
        return {
            "handle": str(entry.handle),
            "name": str(model),
            "page": f"{entry.handle}/{tree.PAGE_FILE}",
            "model": f"{model}/{tree.PAGE_FILE}",
            "summary": description.summary(entry),
            "architecture": entry.card.architecture,
            "head": "classification" if entry.card.num_classes else "features",
            "outputs": _outputs_in_words(entry),
            "publisher": entry.handle.publisher,
            "size": description.file_size(entry.archive.size),
            "bytes": entry.archive.size,
            "group": group,
            "versions": count,
            "published": entry.published,
        }


def _version_row(entry: Entry) -> Mapping[str, Any]:
    return {
        "handle": entry.handle,
        "page": f"{entry.handle}/{tree.PAGE_FILE}",
        "archive": f"{entry.handle}{handles.ARCHIVE_SUFFIX}",
        "published": entry.published,
        "size": description.file_size(entry.archive.size),
        "sha256": entry.archive.sha256,
    }


def _version_page(
    entry: Entry, labels: Sequence[Label] | None, url: str | None
) -> bytes:
    handle = entry.handle
    archive = f"{handle}{handles.ARCHIVE_SUFFIX}"
    archive_name = posixpath.basename(archive)
    sum_line = f"{entry.archive.sha256}  {archive_name}"
    check = description.Example(
        "check", "sha256sum", "sh", f"echo '{sum_line}' | sha256sum --check"
    )
    return _render(
        "version.html",
        f"{handle}/{tree.PAGE_FILE}",
        url,
        name=str(handle),
        description=description.summary(entry),
        steps=_steps(str(handle)),
        entry=entry,
        summary=description.summary(entry),
        outputs_in_words=_outputs_in_words(entry),
        size=description.file_size(entry.archive.size),
        archive=archive,
        archive_name=archive_name,
        archive_address=description.address(archive, url),
        model=f"{handle.at(None)}/{tree.PAGE_FILE}",
        card=f"{handle}/{tree.CARD_FILE}",
        description_file=f"{handle}/{handles.ENTRY_FILE}",
        examples=description.examples(entry, url),
        input_facts=description.input_facts(entry),
        outputs=description.outputs(entry),
        model_facts=description.model_facts(entry),
        size_facts=description.size_facts(entry),
        provenance_facts=description.provenance_facts(entry),
        parity_facts=description.parity_facts(entry),
        labels=labels,
        identified=bool(labels) and any(label.id for label in labels or ()),
        check=check,
    )


def _outputs_in_words(entry: Entry) -> str:
    if entry.card.num_classes:
        return _counted(entry.card.num_classes, "class")
    return f"features, {entry.card.feature_dim}"


def _steps(path: str) -> list[_Step]:
    """The way from the front page to a folder's page."""
    parts = path.split("/")
    steps = [_Step("Models", _FRONT)]
    for depth in range(1, len(parts)):
        folder = "/".join(parts[:depth])
        steps.append(_Step(parts[depth - 1], f"{folder}/{tree.PAGE_FILE}"))
    return [*steps, _Step(parts[-1], None)]


def _counted(things: Any, name: str) -> str:
    """A number of things, or of those in a sequence: "1 model", "2 models"."""
    count = things if isinstance(things, int) else len(things)
    plural = f"{name}es" if name.endswith("s") else f"{name}s"
    return f"{count} {name if count == 1 else plural}"


def _hosted(code: str) -> markupsafe.Markup:
    """Code in which the script can find what stands for the address."""
    host = markupsafe.Markup('<span class="host">{}</span>').format(
        description.HOST
    )
    parts = description.clean(code).split(f"{description.HOST}/")
    return markupsafe.Markup("{}/").format(host).join(parts)


def _breakable(text: str) -> markupsafe.Markup:
    """Text that may be broken after a slash or underscore."""
    parts = re.split("(?<=[/_])", description.clean(text))
    return markupsafe.Markup("<wbr>").join(parts)


def _relative(page: str) -> Callable[[str], str]:
    """Turns paths below the root into links from a page."""
    folder = posixpath.dirname(page) or "."
    return lambda path: posixpath.relpath(path, folder)


def _render(template: str, page: str, url: str | None, **facts: Any) -> bytes:
    link = _relative(page)
    text = (
        _environment()
        .get_template(template)
        .render(
            link=link,
            root=f"{link('.')}/",
            url=url,
            host=description.HOST,
            policy=CONTENT_SECURITY_POLICY,
            **facts,
        )
    )
    return _encoded(text)


def _encoded(text: str) -> bytes:
    return text.encode("utf-8")


def _data(name: str) -> bytes:
    data = importlib.resources.files("hub_export") / "data" / "pages" / name
    return data.read_bytes()


@functools.cache
def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(lambda name: _data(name).decode("utf-8")),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        finalize=_printable,
    )
    environment.filters["breakable"] = _breakable
    environment.filters["counted"] = _counted
    environment.filters["hosted"] = _hosted
    return environment


def _printable(value: Any) -> Any:
    """Text of users without control characters."""
    if isinstance(value, str) and not isinstance(value, markupsafe.Markup):
        return description.clean(value)
    return value
