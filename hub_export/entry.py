"""The one typed description of a published version, kept as its entry.json.

Pages, documentation and index.json are made from it, and `verify` compares it
with the SavedModel. Of its JSON, `handles.Release` is what consumers read.
"""

import dataclasses
import hashlib
import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any

from bit_tf import errors, handles
from hub_export.card import Card, Provenance

__all__ = ["PUBLICATION_FILE", "Entry", "Graph", "Publication"]

PUBLICATION_FILE = pathlib.PurePath("assets.extra", "publication.json")


@dataclasses.dataclass(frozen=True)
class Publication:
    """What its publisher says of a model; stored as publication.json in it.

    Attributes:
      handle: with its version.
      description: one or two sentences.
      license: an SPDX identifier in lower case, such as "apache-2.0", or None
        if it was not stated.
      datasets: what it was trained on, such as "imagenet-21k".
    """

    handle: handles.Handle
    description: str
    license: str | None = None
    datasets: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        return {
            "handle": self.handle.at(None).path,
            "version": self.handle.version,
            "description": self.description,
            "license": self.license,
            "datasets": list(self.datasets),
        }

    @classmethod
    def from_dict(cls, found: Mapping[str, Any]) -> "Publication":
        handle = handles.Handle.parse(found["handle"])
        version = found["version"]
        return cls(
            # Parsed, so that a version of another kind is refused.
            handles.Handle.parse(f"{handle.path}/{version}"),
            found["description"],
            found["license"],
            tuple(found["datasets"]),
        )

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Writes it into a SavedModel's assets.extra/."""
        path = pathlib.Path(directory) / PUBLICATION_FILE
        path.parent.mkdir(exist_ok=True)
        path.write_text(_dumped(self.to_dict()), encoding="utf-8")


@dataclasses.dataclass(frozen=True)
class Graph:
    """What a fresh process found in a SavedModel.

    Attributes:
      dtypes: of the pictures that `__call__` takes, sorted.
      input_shape: of the pictures; None where any number fits.
      outputs: the last dimension of what `__call__` returns.
      params: number of weights.
      variables: number of `variables`.
      trainable_variables: likewise.
      regularization_losses: likewise.
      signatures: name → {output: shape}.
      endpoints: name → shape of what `endpoints` returns; {} without one.
      labels: number of class names in assets/, or None without any.
      relative_error: the largest difference to the golden values, or None
        where there are none.
      tolerance: what it may be, or None.
    """

    dtypes: tuple[str, ...]
    input_shape: tuple[int | None, ...]
    outputs: int
    params: int
    variables: int
    trainable_variables: int
    regularization_losses: int
    signatures: Mapping[str, Mapping[str, tuple[int | None, ...]]]
    endpoints: Mapping[str, tuple[int | None, ...]]
    labels: int | None
    relative_error: float | None
    tolerance: float | None

    @classmethod
    def from_dict(cls, found: Mapping[str, Any]) -> "Graph":
        fields = dict(found)
        for name in ("dtypes", "input_shape"):
            fields[name] = tuple(fields[name])
        fields["endpoints"] = _shapes(fields["endpoints"])
        fields["signatures"] = {
            name: _shapes(outputs)
            for name, outputs in fields["signatures"].items()
        }
        return cls(**fields)


@dataclasses.dataclass(frozen=True)
class Entry:
    """A published version.

    Attributes:
      publication: what its publisher says.
      card: what a user must know, as in the SavedModel.
      provenance: where the weights came from, as in the SavedModel.
      graph: what was found in the SavedModel.
      archive: the path in the repository, bytes and SHA-256 of the archive.
      files: of the SavedModel, in the order of their paths.
      published: when, in UTC, such as "2026-11-21T18:00:00Z".
      pages: of the version's folder, its page and card, by their names there.
    """

    publication: Publication
    card: Card
    provenance: Provenance
    graph: Graph
    archive: handles.File
    files: tuple[handles.File, ...]
    published: str
    pages: tuple[handles.File, ...] = ()

    def with_pages(self, written: Mapping[str, bytes]) -> "Entry":
        """The same with the hashes of a page and a card, name → content."""
        pages = tuple(
            handles.File(
                name, len(content), hashlib.sha256(content).hexdigest()
            )
            for name, content in sorted(written.items())
        )
        return dataclasses.replace(self, pages=pages)

    @property
    def handle(self) -> handles.Handle:
        """With its version."""
        return self.publication.handle

    @property
    def unpacked_size(self) -> int:
        """Bytes of the SavedModel."""
        return sum(file.size for file in self.files)

    def to_dict(self) -> dict[str, Any]:
        """JSON's types only; `handles.Release.from_json` takes it too."""
        return {
            "schema": handles.SCHEMA,
            **self.publication.to_dict(),
            "archive": dataclasses.asdict(self.archive),
            "files": [dataclasses.asdict(file) for file in self.files],
            "pages": [dataclasses.asdict(file) for file in self.pages],
            "card": dataclasses.asdict(self.card),
            "provenance": dataclasses.asdict(self.provenance),
            "graph": dataclasses.asdict(self.graph),
            "published": self.published,
        }

    def to_json(self) -> str:
        """The text of an entry.json."""
        return _dumped(self.to_dict())

    @classmethod
    def from_dict(cls, found: Any) -> "Entry":
        """Reads what `to_dict` gave.

        Raises:
          HandleError: it is something else, or of a later schema.
        """
        handles.Release.from_json(found)
        try:
            entry = cls(
                Publication.from_dict(found),
                Card.from_dict(found["card"]),
                Provenance.from_dict(found["provenance"]),
                Graph.from_dict(found["graph"]),
                handles.File(**found["archive"]),
                tuple(handles.File(**row) for row in found["files"]),
                found["published"],
                tuple(handles.File(**row) for row in found["pages"]),
            )
            # Types that JSON has, but this class has not.
            entry.to_json()
        except (
            AttributeError,
            LookupError,
            TypeError,
            ValueError,
        ) as error:
            raise errors.HandleError(
                "A version's entry has the attributes that "
                "hub_export.entry.Entry describes. Received: another "
                f"({type(error).__name__}: {error}). Publish the version anew."
            ) from error
        return entry

    @classmethod
    def parse(cls, text: str | bytes) -> "Entry":
        """Reads an entry.json.

        Raises:
          HandleError: it is something else.
        """
        handles.Release.parse(text)
        return cls.from_dict(json.loads(text))


def _shapes(found: Mapping[str, Any]) -> dict[str, tuple[int | None, ...]]:
    return {name: tuple(shape) for name, shape in found.items()}


def _dumped(value: Mapping[str, Any]) -> str:
    text = json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False)
    return f"{text}\n"
