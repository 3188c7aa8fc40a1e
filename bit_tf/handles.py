"""Hub handles: what they are made of, and every address of one model.

    https://tfhub.dev/google/bit/m-r50x1/1
    └── host ───────┘ └ path: publisher / name / version

A repository of models (hub_export.repository) is a tree of files under the
same paths. This module also has the part of its index that a consumer needs:
where a version lies, how large it is, and its hashes.
"""

import dataclasses
import functools
import json
import re
import urllib.parse
from collections.abc import Mapping, Sequence
from typing import Any

from bit_tf import errors, variants

__all__ = [
    "ARCHIVE_SUFFIX",
    "ENTRY_FILE",
    "FORMAT_QUERY",
    "INDEX_FILE",
    "MODEL_FOLDER",
    "SCHEMA",
    "TFHUB",
    "File",
    "Handle",
    "Release",
    "entry_url",
    "kaggle_twin",
    "known",
    "spellings",
    "with_query",
]

TFHUB = "https://tfhub.dev/"
_OTHER_TFHUB = ("http://tfhub.dev/", "https://www.tfhub.dev/")
_CHINA = "https://hub.tensorflow.google.cn/"
_TFHUB_BUCKET = "https://storage.googleapis.com/tfhub-modules/"
_KAGGLE_BASES = tuple(
    f"{scheme}://{host}/models/"
    for scheme in ("https", "http")
    for host in ("www.kaggle.com", "kaggle.com")
)
# Every client of tensorflow_hub appends this query.
FORMAT_QUERY = "tf-hub-format"

# In a repository: the version's description and its SavedModel are inside the
# version's folder, its archive has the version's path and this suffix.
INDEX_FILE = "index.json"
ENTRY_FILE = "entry.json"
MODEL_FOLDER = "model"
ARCHIVE_SUFFIX = ".tar.gz"
# The version of the JSON in both files.
SCHEMA = 1

_COMPONENT = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}")
_NUMBER = re.compile(r"[1-9][0-9]{0,8}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
# Folders of a repository that belong to no publisher.
_RESERVED = ("assets", "healthz")
# Suffixes of a repository's files, which no folder may look like.
_SUFFIXES = (".gz", ".html", ".json", ".md", ".tar", ".tgz")
_MOST_PARTS = 8


@dataclasses.dataclass(frozen=True, order=True)
class Handle:
    """A model of a publisher, with or without a version.

    Attributes:
      publisher: such as "google".
      name: such as "bit/m-r50x1" or "bit/m-r50x1/ilsvrc2012_classification".
      version: 1 or more; None is the newest.
    """

    publisher: str
    name: str
    version: int | None = None

    @classmethod
    def parse(cls, text: str) -> "Handle":
        """Reads "publisher/name" or "publisher/name/version".

        Publisher and the parts of the name are of letters, digits, "_", "-"
        and ".", begin with a letter or digit, and are no plain numbers.

        Raises:
          HandleError: it is something else.
        """
        parts = text.split("/") if isinstance(text, str) else [""]
        version = None
        if len(parts) > 2 and _NUMBER.fullmatch(parts[-1]):
            version = int(parts.pop())
        right = (
            2 <= len(parts) <= _MOST_PARTS
            and all(
                _COMPONENT.fullmatch(part)
                and not part.isdigit()
                and not part.lower().endswith(_SUFFIXES)
                for part in parts
            )
            and parts[0].lower() not in _RESERVED
        )
        if not right:
            raise errors.HandleError(
                "A handle is publisher/name or publisher/name/version, such as "
                "google/bit/m-r50x1/1. Each part begins with a letter or "
                "digit, has up to 100 letters, digits, '_', '-' and '.', is "
                f"no number but for the version, and ends in none of "
                f"{', '.join(_SUFFIXES)}; the publisher is none of "
                f"{', '.join(_RESERVED)}. Received: {errors.brief(text)}."
            )
        return cls(parts[0], "/".join(parts[1:]), version)

    @property
    def path(self) -> str:
        """ "publisher/name", and "/version" if there is one."""
        end = "" if self.version is None else f"/{self.version}"
        return f"{self.publisher}/{self.name}{end}"

    @property
    def collection(self) -> str:
        """The first part of the name, such as "bit"."""
        return self.name.partition("/")[0]

    def at(self, version: int | None) -> "Handle":
        """The same model in this version."""
        return dataclasses.replace(self, version=version)

    def __str__(self) -> str:
        return self.path


@dataclasses.dataclass(frozen=True)
class File:
    """A file of a SavedModel: its path there, its bytes, and their SHA-256."""

    path: str
    size: int
    sha256: str


@dataclasses.dataclass(frozen=True)
class Release:
    """What a consumer must know of a published version.

    Attributes:
      handle: with its version.
      size: bytes of the archive.
      sha256: of the archive, in hexadecimal digits.
      files: those of the SavedModel, in the order of their paths.
    """

    handle: Handle
    size: int
    sha256: str
    files: tuple[File, ...]

    @classmethod
    def from_json(cls, found: Any) -> "Release":
        """Reads the object of an entry.json, or one of those in index.json.

        Keys that are not needed here are passed over.

        Raises:
          HandleError: it is something else, or of a later schema.
        """
        try:
            if found["schema"] != SCHEMA:
                raise ValueError(f"schema {found['schema']!r}")
            handle = Handle.parse(found["handle"])
            version, archive = found["version"], found["archive"]
            if handle.version is not None or not _positive(version):
                raise ValueError(f"version {version!r}")
            files = tuple(
                File(_relative(row["path"]), *_content(row))
                for row in found["files"]
            )
            return cls(handle.at(version), *_content(archive), files)
        except (LookupError, TypeError, ValueError) as error:
            raise errors.HandleError(
                f"A version's entry is a JSON object of schema {SCHEMA} with "
                "handle, version, archive and files. Received: another "
                f"({type(error).__name__}: {error}). Update bit-tf, or publish "
                "the version anew."
            ) from error

    @classmethod
    def parse(cls, text: str | bytes) -> "Release":
        """Reads an entry.json.

        Raises:
          HandleError: it is something else.
        """
        try:
            found = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise errors.HandleError(
                f"A version's entry is JSON. Received: {errors.brief(text)} "
                f"({error})."
            ) from error
        return cls.from_json(found)


def _positive(value: Any) -> bool:
    return type(value) is int and value > 0


def _content(row: Mapping[str, Any]) -> tuple[int, str]:
    size, sha256 = row["size"], row["sha256"]
    if type(size) is not int or size < 0:
        raise ValueError(f"size {size!r}")
    if not isinstance(sha256, str) or not _SHA256.fullmatch(sha256):
        raise ValueError(f"sha256 {sha256!r}")
    return size, sha256


def _relative(path: Any) -> str:
    parts = path.split("/") if isinstance(path, str) else [""]
    if any(part in ("", ".", "..") or "\0" in part for part in parts):
        raise ValueError(f"path {path!r}")
    return path


def with_query(address: str, format: str = "compressed") -> str:
    """The address as tensorflow_hub asks for it."""
    parts = urllib.parse.urlsplit(address)
    query = f"{FORMAT_QUERY}={format}"
    if parts.query:
        query = f"{parts.query}&{query}"
    return urllib.parse.urlunsplit(parts._replace(query=query, fragment=""))


def entry_url(address: str) -> str:
    """Where a repository keeps the entry of the model at an address.

    Args:
      address: of a version, of a model (its entry is that of the newest
        version), or of an archive.
    """
    parts = urllib.parse.urlsplit(address)
    path = parts.path.rstrip("/").removesuffix(ARCHIVE_SUFFIX)
    parts = parts._replace(path=f"{path}/{ENTRY_FILE}", query="", fragment="")
    return urllib.parse.urlunsplit(parts)


def known(address: str) -> Handle | None:
    """The handle on tfhub.dev that an address is one of the spellings of.

    Args:
      address: of tfhub.dev, of its mirrors, or of Kaggle; Kaggle's only for
        the handles of `variants`, whose twins are known.

    Returns:
      None for any other address.
    """
    host, path = _split(address)
    kaggle = _kaggle_parts(host, path)
    if kaggle is not None:
        row = _by_twin().get(kaggle[:3])
        return row and row.at(kaggle[3])
    for base in (TFHUB, _CHINA, _TFHUB_BUCKET):
        base_host, base_path = _split(base)
        if host == base_host and path.startswith(base_path):
            path = path.removeprefix(base_path).strip("/")
            if base == _TFHUB_BUCKET:
                path = path.removesuffix(ARCHIVE_SUFFIX)
            try:
                return Handle.parse(path)
            except errors.HandleError:
                return None
    return None


def kaggle_twin(handle: Handle) -> str | None:
    """The address on Kaggle of a handle on tfhub.dev, or None.

    Only the handles of `variants` have one that is known.
    """
    if handle.at(None) not in _by_twin().values():
        return None
    return next(iter(_kaggle_spellings(*_twin(handle), handle.version)), None)


def spellings(address: str) -> tuple[str, ...]:
    """Every address that is known to mean the same model.

    tensorflow_hub keeps each under a name of its own in its cache.

    Args:
      address: an http or https address of a model.

    Returns:
      The address itself first; for one of tfhub.dev and Kaggle those on both,
      for any other host the same address; with and without a final slash and
      tensorflow_hub's query.
    """
    found = [address]
    handle = known(address)
    host, address_path = _split(address)
    kaggle = _kaggle_parts(host, address_path)
    if not host:
        return (address,)
    if handle is not None:
        path = handle.path
        for base in (TFHUB, *_OTHER_TFHUB, _CHINA):
            found += _forms(f"{base}{path}")
        found += [f"{_TFHUB_BUCKET}{path}{ARCHIVE_SUFFIX}"]
        if kaggle_twin(handle) is not None:
            found += _kaggle_spellings(*_twin(handle), handle.version)
    elif kaggle is not None:
        found += _kaggle_spellings(*kaggle)
    else:
        parts = urllib.parse.urlsplit(address)
        pairs = urllib.parse.parse_qsl(parts.query, keep_blank_values=True)
        query = [pair for pair in pairs if pair[0] != FORMAT_QUERY]
        plain = urllib.parse.urlunsplit(
            parts._replace(
                path=parts.path.rstrip("/"),
                query=urllib.parse.urlencode(query),
                fragment="",
            )
        )
        if query or plain.endswith(ARCHIVE_SUFFIX):
            found += [plain, with_query(plain)]
        else:
            found += _forms(plain)
    return tuple(dict.fromkeys(found))


def _forms(address: str) -> list[str]:
    """An address without a query, and the others of the same model."""
    return [address, f"{address}/", with_query(address)]


def _split(address: str) -> tuple[str, str]:
    """(host[:port], path) of a web address; ("", "") of anything else.

    Without "www.", a scheme's own port, query, fragment and final slash.
    """
    try:
        parts = urllib.parse.urlsplit(address)
        host, port = parts.hostname or "", parts.port
    except ValueError:
        return "", ""
    if parts.scheme not in ("http", "https"):
        return "", ""
    if port not in (None, 80, 443):
        host = f"{host}:{port}"
    return host.removeprefix("www."), parts.path.rstrip("/")


_KAGGLE_PATH = re.compile(
    r"/models/(?P<owner>[^/]+)/(?P<model>[^/]+)"
    r"(?:/frameworks)?/tensorflow2"
    r"(?:/variations)?/(?P<variation>[^/]+)"
    r"(?:/versions)?/(?P<version>[1-9][0-9]{0,8})",
    re.IGNORECASE,
)


# Kaggle's owner, model, variation.
_Names = tuple[str, str, str]


def _kaggle_parts(host: str, path: str) -> tuple[str, str, str, int] | None:
    """(owner, model, variation, version) of a TensorFlow 2 model on Kaggle."""
    match = _KAGGLE_PATH.fullmatch(path)
    if host != "kaggle.com" or match is None:
        return None
    owner, model, variation, version = match.groups()
    return owner.lower(), model.lower(), variation.lower(), int(version)


def _twin(handle: Handle) -> "_Names":
    """Kaggle's (owner, model, variation) of a handle with a name of parts."""
    model, _, variation = handle.name.partition("/")
    return handle.publisher, model, re.sub("[/_]", "-", variation).lower()


@functools.cache
def _by_twin() -> Mapping["_Names", Handle]:
    """Kaggle's names → handle without version, of all published ones."""
    found = {}
    for row in variants.list_models():
        for address in (row.handle, row.feature_handle):
            if address is not None:
                handle = Handle.parse(address.removeprefix(TFHUB)).at(None)
                found[_twin(handle)] = handle
    return found


def _kaggle_spellings(
    owner: str, model: str, variation: str, version: int | None
) -> Sequence[str]:
    if version is None:
        return []
    found = []
    for base in _KAGGLE_BASES:
        for framework in ("TensorFlow2", "tensorFlow2", "tensorflow2"):
            found += _forms(
                f"{base}{owner}/{model}/{framework}/{variation}/{version}"
            )
            found += _forms(
                f"{base}{owner}/{model}/frameworks/{framework}/variations/"
                f"{variation}/versions/{version}"
            )
    return found
