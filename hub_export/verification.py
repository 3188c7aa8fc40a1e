"""Whether a published model is what it should be, byte for byte and in use.

Nothing here raises for a bad model: each finding is a check in a report, and
what depends on a failed check says so.
"""

import collections
import contextlib
import dataclasses
import filecmp
import fnmatch
import json
import os
import pathlib
import stat
import tarfile
import tempfile
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeVar

from bit_tf import (
    archive,
    cached_download,
    errors,
    files,
    handles,
    hub_fetch,
    labels,
)
from hub_export import card as cards
from hub_export import (
    documentation,
    documentation_check,
    entry,
    graph,
    operations,
    repository,
    tree,
)
from hub_export.contradictions import contradictions, mistyped
from hub_export.description import clean, file_size, newest
from hub_export.graph import ABSENT, FAILED, PASSED, Check

__all__ = [
    "CHECKS",
    "Check",
    "REPOSITORY_CHECKS",
    "Report",
    "check_model",
    "verify",
]

Kind = TypeVar("Kind")

# Of a model, in the order of a report.
CHECKS = (
    "hash",
    "files",
    "operations",
    "interface",
    "gradient",
    "golden",
    "card",
    "page",
)
# Of what a repository has beside its models.
REPOSITORY_CHECKS = ("index", "archives", "entries", "pages", "staging")

# What an archive of a SavedModel may hold; * is any text, also with "/".
_ALLOWED = (
    "saved_model.pb",
    "saved_model.pbtxt",
    "tfhub_module.pb",
    "keras_metadata.pb",
    "fingerprint.pb",
    "assets/*",
    "assets.extra/*",
    "variables/variables.*",
)
_FOLDERS = ("assets/", "assets.extra/", "variables/")
_NESTED = ("assets/", "assets.extra/")
_GRAPHS = ("saved_model.pb", "saved_model.pbtxt")
_TF1_HUB = "tfhub_module.pb"
_QUICK = "not looked at (quick)"
_MARKS = {PASSED: "✓", FAILED: "✗", ABSENT: "–"}
_MOST_NAMED = 5
# Of a JSON file that is read whole, and of zeros after an archive; bytes.
_MAX_TEXT = 2**24
_CHUNK = 2**20
_TAR_TYPES = (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.DIRTYPE)


@dataclasses.dataclass(frozen=True)
class Report:
    """What was found at one target.

    Attributes:
      target: a path, or an address without password and query.
      checks: in the order of `CHECKS` or `REPOSITORY_CHECKS`.
      graph: what a fresh process found in the SavedModel, or None if it was
        not loaded, or is no reusable model of pictures.
    """

    target: str
    checks: tuple[Check, ...]
    graph: entry.Graph | None = None

    @property
    def ok(self) -> bool:
        """Whether no check failed."""
        return all(check.status != FAILED for check in self.checks)

    def table(self) -> str:
        """A line for the target and one for each check, safe to print."""
        width = max(len(check.name) for check in self.checks)
        lines = [_printable(self.target)]
        lines += [
            f"  {_MARKS[check.status]} {check.name:{width}}  "
            f"{_printable(check.detail)}"
            for check in self.checks
        ]
        return "\n".join(line.rstrip() for line in lines)

    def to_dict(self) -> dict[str, Any]:
        """JSON's types only."""
        return {
            "target": self.target,
            "ok": self.ok,
            "checks": [dataclasses.asdict(check) for check in self.checks],
            "graph": self.graph and dataclasses.asdict(self.graph),
        }


def check_model(
    directory: str | os.PathLike[str],
    *,
    description: entry.Entry | None = None,
    quick: bool = False,
) -> Report:
    """Checks a SavedModel's directory.

    Args:
      directory: not written to.
      description: its entry, where there is one.
      quick: leave out what needs the graph to be loaded.
    """
    findings = _Findings(os.fspath(directory))
    _look(findings, pathlib.Path(directory), description, quick)
    return findings.report()


def verify(
    target: str | os.PathLike[str], *, quick: bool = False
) -> list[Report]:
    """Checks whatever holds models.

    Args:
      target: a SavedModel's directory; a .tar.gz, .tgz or .tar archive; a
        version's folder in a repository, a model's, or the whole repository;
        or a handle with http:// or https://, whose archive is downloaded into
        a temporary directory.
      quick: leave out what needs a graph to be loaded.

    Returns:
      A report for each model, and for a repository itself the first one.

    Raises:
      HandleError: the target is none of these.
      DownloadError: nothing could be fetched from the handle.
    """
    text = os.fsdecode(target)
    if text.startswith(("http://", "https://")):
        return [_handle(text, quick)]
    if text.startswith("file://"):
        text = urllib.request.url2pathname(urllib.parse.urlsplit(text).path)
    path = pathlib.Path(text)
    if path.is_dir():
        if tree.is_repository(path):
            return _repository(path, quick)
        if (path / handles.ENTRY_FILE).is_file():
            return _published(path, quick)
        return [check_model(path, quick=quick)]
    if path.is_file() and archive.is_archive(path):
        return [_archive(path, quick)]
    raise errors.HandleError(
        "What is verified is a handle (https://…), a SavedModel's directory, "
        "a .tar.gz, .tgz or .tar archive, or a repository of models or a part "
        f"of one. Received: {errors.brief(text)}, which is "
        f"{'another file' if path.exists() else 'not there'}."
    )


class _Findings:
    """A report in the making: what was found, by the check's name."""

    def __init__(self, target: str, names: Iterable[str] = CHECKS):
        self.graph: entry.Graph | None = None
        self._target = target
        self._names = tuple(names)
        self._problems = collections.defaultdict[str, list[str]](list)
        self._details = collections.defaultdict[str, list[str]](list)
        self._absent: dict[str, str] = {}

    def fail(self, name: str, *problems: str) -> None:
        self._problems[name] += problems

    def note(self, name: str, detail: str) -> None:
        self._details[name].append(detail)

    def absent(self, why: str, *names: str) -> None:
        """Says why nothing was checked, unless something was."""
        for name in names:
            self._absent.setdefault(name, why)

    def fail_rest(self, why: str) -> None:
        """Fails what cannot be checked any more."""
        for name in self._names:
            if not {name} & {*self._problems, *self._details, *self._absent}:
                self.fail(name, why)

    def failed(self, name: str) -> bool:
        return bool(self._problems[name])

    def report(self) -> Report:
        return Report(
            self._target,
            tuple(self._check(name) for name in self._names),
            self.graph,
        )

    def _check(self, name: str) -> Check:
        problems, details = self._problems[name], self._details[name]
        if problems:
            return Check(name, FAILED, _listed(problems))
        if details:
            return Check(name, PASSED, "; ".join(details))
        return Check(name, ABSENT, self._absent.get(name, "nothing to check"))


def _listed(problems: list[str]) -> str:
    shown = "; ".join(problems[:_MOST_NAMED])
    more = len(problems) - _MOST_NAMED
    return f"{shown}; and {more} more" if more > 0 else shown


def _printable(text: str) -> str:
    """Text that a terminal shows and does not obey."""
    return clean(" ".join(text.split()))


# --- a SavedModel's directory


def _look(
    findings: _Findings,
    directory: pathlib.Path,
    description: entry.Entry | None,
    quick: bool,
) -> None:
    """Checks a SavedModel's directory."""
    there = _listing(directory)
    _check_files(findings, there)
    if description is None:
        findings.absent("no index entry", "hash")
    else:
        _check_hashes(findings, directory, there, description.files)
    findings.absent("not in a repository", "page")
    if any(_is_special(found.st_mode) for found in there.values()):
        findings.fail("operations", "not read: not all are regular files")
        findings.fail_rest("not loaded")
        return
    reusable = _check_operations(findings, directory)
    if quick:
        findings.absent(_QUICK, "interface", "gradient", "golden", "card")
        return
    if findings.failed("operations"):
        findings.fail_rest("not loaded")
        return
    if not reusable or _TF1_HUB in there:
        findings.fail(
            "interface",
            "a model of TensorFlow 1 cannot be a reusable SavedModel; "
            "hub-export convert reads its weights",
        )
        findings.fail("gradient", "not loaded")
        findings.fail("golden", "not loaded")
    else:
        findings.graph, checks = graph.examine(directory)
        for check in checks:
            if check.status == FAILED:
                findings.fail(check.name, check.detail)
            elif check.status == PASSED:
                findings.note(check.name, check.detail)
            else:
                findings.absent(check.detail, check.name)
    _check_card(findings, directory, description)


def _listing(directory: pathlib.Path) -> dict[str, os.stat_result]:
    """Path in the directory → what is there; links are not followed."""
    found = {}
    for folder, names, others in os.walk(directory):
        for name in [*names, *others]:
            path = pathlib.Path(folder, name)
            relative = path.relative_to(directory).as_posix()
            found[relative] = path.lstat()
    return dict(sorted(found.items()))


def _is_special(mode: int) -> bool:
    """Whether to open it may wait for ever, or do something."""
    return not (stat.S_ISREG(mode) or stat.S_ISDIR(mode) or stat.S_ISLNK(mode))


def _misplaced(path: str, found: os.stat_result) -> str | None:
    """Why something must not be in a SavedModel, or None."""
    if any(part.startswith(".") for part in path.split("/")):
        return "has a name that begins with a dot"
    if not path.isprintable():
        return "has a name that cannot be shown"
    if stat.S_ISLNK(found.st_mode):
        return "is a link"
    if _is_special(found.st_mode):
        return "is no regular file"
    if stat.S_ISDIR(found.st_mode):
        path = f"{path}/"
        allowed = path in _FOLDERS or path.startswith(_NESTED)
    else:
        allowed = any(fnmatch.fnmatchcase(path, name) for name in _ALLOWED)
    return None if allowed else "is no part of a SavedModel"


def _check_files(
    findings: _Findings, there: Mapping[str, os.stat_result]
) -> None:
    sizes = []
    for path, found in there.items():
        if why := _misplaced(path, found):
            findings.fail("files", f"{path!r} {why}")
        elif stat.S_ISREG(found.st_mode):
            sizes.append(found.st_size)
    if not any(name in there for name in _GRAPHS):
        findings.fail("files", f"{_GRAPHS[0]} is missing")
    if "variables" in there and "variables/variables.index" not in there:
        findings.fail("files", "variables/variables.index is missing")
    size = file_size(sum(sizes))
    findings.note("files", f"{len(sizes)} files, {size}")


def _check_hashes(
    findings: _Findings,
    directory: pathlib.Path,
    there: Mapping[str, os.stat_result],
    expected: Iterable[handles.File],
    where: str = "",
) -> None:
    """Compares files with those of an entry."""
    wanted = {file.path: file for file in expected}
    for path, file in wanted.items():
        shown = f"{where}{path!r}"
        if path not in there:
            findings.fail("hash", f"{shown} is missing")
        elif stat.S_ISREG(there[path].st_mode):
            try:
                size, sha256 = files.measure(directory / path)
            except OSError as error:
                findings.fail("hash", f"{shown} cannot be read: {error}")
                continue
            if size != file.size:
                findings.fail(
                    "hash",
                    f"{shown} has {size} bytes, its entry says {file.size}",
                )
            elif sha256 != file.sha256:
                findings.fail(
                    "hash", f"{shown} has another SHA-256 than its entry says"
                )
    for path, found in there.items():
        # What must not be there at all is for the other check.
        if (
            path not in wanted
            and stat.S_ISREG(found.st_mode)
            and _misplaced(path, found) is None
        ):
            findings.fail("hash", f"{where}{path!r} is not in the entry")
    findings.note("hash", f"{where}{len(wanted)} files as in the entry")


def _check_operations(findings: _Findings, directory: pathlib.Path) -> bool:
    """Whether it is a SavedModel of TensorFlow 2."""
    try:
        found = operations.read(directory)
    except errors.VerificationError as error:
        findings.fail("operations", str(error))
        return False
    findings.fail("operations", *found.problems)
    findings.note("operations", f"{found.total} of {found.kinds} kinds")
    return found.reusable


def _check_card(
    findings: _Findings,
    directory: pathlib.Path,
    description: entry.Entry | None,
) -> None:
    """Compares the card with the graph, and the entry with both."""
    if not os.path.lexists(directory / cards.CARD_FILE):
        if description is None:
            findings.absent("no card", "card")
        else:
            findings.fail("card", f"{cards.CARD_FILE} is missing")
        return
    try:
        said = _description(directory, description)
        labels.read_saved_model(directory)
    except (errors.HandleError, OSError) as error:
        findings.fail("card", str(error))
        return
    if description is not None:
        for name in ("publication", "card", "provenance"):
            if getattr(said, name) != getattr(description, name):
                findings.fail(
                    "card", f"the entry's {name} is not the SavedModel's"
                )
    if findings.graph is not None:
        if description is not None:
            findings.fail("card", *_graph_problems(findings, description))
        said = dataclasses.replace(said, graph=findings.graph)
        findings.fail("card", *contradictions(said))
        findings.note("card", f"{said.card.architecture}, {said.card.task}")
    else:
        findings.fail("card", *mistyped(said))
        findings.note("card", "not compared with the graph")


def _graph_problems(
    findings: _Findings, description: entry.Entry
) -> Iterator[str]:
    """Where the graph is not that of the entry."""
    assert findings.graph is not None
    found = json.loads(json.dumps(dataclasses.asdict(findings.graph)))
    said = json.loads(json.dumps(dataclasses.asdict(description.graph)))
    measured = ["relative_error"]
    if findings.failed("golden"):
        measured.append("tolerance")
    for name in sorted(found.keys() - set(measured)):
        if found[name] != said[name]:
            yield (
                f"the entry says {name} {errors.brief(said[name])}, the graph "
                f"has {errors.brief(found[name])}"
            )


def _description(
    directory: pathlib.Path, description: entry.Entry | None
) -> entry.Entry:
    """What a SavedModel's own files say, in the form of an entry.

    Raises:
      HandleError: a file is damaged or missing.
    """
    publication = entry.Publication(handles.Handle("local", "model", 1), "")
    if description is not None or (directory / entry.PUBLICATION_FILE).exists():
        publication = _parsed(
            directory, entry.PUBLICATION_FILE, entry.Publication.from_dict
        )
    return entry.Entry(
        publication,
        _parsed(directory, cards.CARD_FILE, cards.Card.from_dict),
        _parsed(directory, cards.PROVENANCE_FILE, cards.Provenance.from_dict),
        entry.Graph((), (), 0, 0, 0, 0, 0, {}, {}, None, None, None),
        handles.File("", 0, ""),
        (),
        "",
    )


def _parsed(
    directory: pathlib.Path,
    path: pathlib.PurePath,
    from_dict: Callable[[Any], Kind],
) -> Kind:
    """What a small JSON file in a SavedModel describes.

    Raises:
      HandleError: it is missing or damaged.
    """
    try:
        size = (directory / path).stat().st_size
        if size > _MAX_TEXT:
            raise ValueError(f"{size} bytes; the limit is {_MAX_TEXT}")
        return from_dict(json.loads((directory / path).read_bytes()))
    except (
        AttributeError,
        LookupError,
        OSError,
        RecursionError,
        TypeError,
        ValueError,
    ) as error:
        raise errors.HandleError(
            f"{path} cannot be read ({type(error).__name__}: {error})"
        ) from error


# --- archives and handles


@contextlib.contextmanager
def _unpacked(
    findings: _Findings, path: pathlib.Path
) -> Iterator[pathlib.Path | None]:
    """An archive's content in a temporary directory, or None if it is bad."""
    with tempfile.TemporaryDirectory(prefix="hub-export-") as folder:
        directory = pathlib.Path(folder, "model")
        try:
            archive.unpack(path, directory)
            findings.fail("files", *_member_problems(path))
        except errors.ArchiveError as error:
            findings.fail("files", f"not unpacked: {error}")
            yield None
            return
        except OSError as error:
            findings.fail(
                "files",
                f"not unpacked: {error}; set TMPDIR to a directory with more "
                "room",
            )
            yield None
            return
        yield directory


def _member_problems(path: pathlib.Path) -> Iterator[str]:
    """What is not right in an archive that could be unpacked."""
    folders, seen = {"."}, set()
    with tarfile.open(path, "r:*") as members:
        for member in members:
            name = str(pathlib.PurePosixPath(member.name))
            parent = str(pathlib.PurePosixPath(name).parent)
            if member.type not in _TAR_TYPES or member.issparse():
                yield f"{name!r} is no plain file or directory"
            if name in seen:
                yield f"{name!r} is there twice"
            elif parent not in folders:
                yield f"{name!r} comes before its folder"
            seen.add(name)
            if member.isdir():
                folders.add(name)
        rest = members.fileobj
        while rest is not None and (chunk := rest.read(_CHUNK)):
            if chunk.strip(b"\0"):
                yield "other bytes follow the archive's end"
                return


def _check_archive(
    findings: _Findings, path: pathlib.Path, description: entry.Entry | None
) -> None:
    """Compares an archive's bytes with its entry."""
    size, sha256 = files.measure(path)
    if description is None:
        findings.absent(f"no index entry; SHA-256 {sha256}", "hash")
        return
    for what, found, said in (
        ("bytes", size, description.archive.size),
        ("SHA-256", sha256, description.archive.sha256),
    ):
        if found != said:
            findings.fail(
                "hash",
                f"the archive has the {what} {found}, its entry says {said}",
            )
            break
    findings.note("hash", f"archive {sha256}")


def _look_into(
    findings: _Findings,
    path: pathlib.Path,
    description: entry.Entry | None,
    quick: bool,
) -> None:
    """Checks an archive and the SavedModel in it."""
    _check_archive(findings, path, description)
    with _unpacked(findings, path) as directory:
        if directory is None:
            findings.absent("not in a repository", "page")
            findings.fail_rest("not unpacked")
        else:
            _look(findings, directory, description, quick)


def _archive(path: pathlib.Path, quick: bool) -> Report:
    findings = _Findings(os.fspath(path))
    description = None
    numbered = path.name.removesuffix(handles.ARCHIVE_SUFFIX)
    for folder in (path.parent, path.parent / numbered):
        # A model's folder has the entry of its newest version, whose archive
        # another one is not.
        if folder == path.parent and path.name != tree.ARCHIVE_FILE:
            continue
        if (folder / handles.ENTRY_FILE).is_file():
            description = _read_entry(findings, folder / handles.ENTRY_FILE)
    _look_into(findings, path, description, quick)
    return findings.report()


def _read_entry(findings: _Findings, path: pathlib.Path) -> entry.Entry | None:
    try:
        return _checked(entry.Entry.parse(path.read_bytes()))
    except (errors.HandleError, OSError) as error:
        findings.fail("hash", f"{path.name}: {error}")
        return None


def _checked(description: entry.Entry) -> entry.Entry:
    """An entry whose values have the right types.

    Raises:
      HandleError: they have not.
    """
    if problems := mistyped(description):
        raise errors.HandleError(" ".join(problems))
    return description


def _handle(address: str, quick: bool) -> Report:
    findings = _Findings(cached_download.shown(address))
    with tempfile.TemporaryDirectory(prefix="hub-export-") as folder:
        path = cached_download.cached(
            handles.with_query(address), directory=folder, name="model.tar.gz"
        )
        description = None
        try:
            found = hub_fetch.description(address)
            if found is not None:
                description = _checked(entry.Entry.from_dict(found))
        except errors.HandleError as error:
            findings.fail("hash", str(error))
        if description is not None:
            where = urllib.parse.urlsplit(address).path.rstrip("/")
            where = where.removesuffix(handles.ARCHIVE_SUFFIX)
            one = description.handle
            if not f"{where}/".endswith((f"/{one}/", f"/{one.at(None)}/")):
                findings.fail("card", f"the entry there is that of {one}")
        _look_into(findings, path, description, quick)
    return findings.report()


# --- repositories


def _published(folder: pathlib.Path, quick: bool) -> list[Report]:
    """Reports of a version's folder, or of all versions in a model's."""
    folder = pathlib.Path(os.path.abspath(folder))
    if os.path.lexists(_packed(folder)) or folder.name.isdigit():
        return [_version(folder, quick)]
    versions = [
        path.parent
        for path in folder.glob(f"*/{handles.ENTRY_FILE}")
        if path.parent.name.isdigit()
    ]
    if not versions:
        raise errors.HandleError(
            "A model in a repository has versions, in folders of a number "
            f"with an {handles.ENTRY_FILE}. Received: {os.fspath(folder)!r}, "
            "which has none."
        )
    return [
        _version(version, quick)
        for version in sorted(versions, key=lambda path: int(path.name))
    ]


def _version(
    folder: pathlib.Path, quick: bool, target: str | None = None
) -> Report:
    findings = _Findings(target or os.fspath(folder))
    description = _read_entry(findings, folder / handles.ENTRY_FILE)
    packed = _packed(folder)
    model = folder / handles.MODEL_FOLDER
    _check_page(findings, folder, description)
    if not packed.is_file():
        findings.fail("hash", f"{packed.name} is missing")
        if model.is_dir():
            _look(findings, model, description, quick)
        findings.fail_rest("no model")
    elif not model.is_dir():
        _look_into(findings, packed, description, quick)
    else:
        _check_archive(findings, packed, description)
        with _unpacked(findings, packed) as directory:
            if directory is not None and description is not None:
                _check_hashes(
                    findings,
                    directory,
                    _listing(directory),
                    description.files,
                    "in the archive ",
                )
        _look(findings, model, description, quick)
    return findings.report()


def _packed(folder: pathlib.Path) -> pathlib.Path:
    """A version's archive; a site has it under its public name only."""
    packed = folder / tree.ARCHIVE_FILE
    if os.path.lexists(packed):
        return packed
    return folder.with_name(f"{folder.name}{handles.ARCHIVE_SUFFIX}")


def _check_page(
    findings: _Findings, folder: pathlib.Path, description: entry.Entry | None
) -> None:
    """Checks a version's card.md and page."""
    page = folder / tree.PAGE_FILE
    if not page.is_file() or not page.stat().st_size:
        findings.fail("page", f"{page.name} is missing or empty")
    if description is None:
        findings.fail("page", "there is no entry to compare it with")
        return
    try:
        text = (folder / tree.CARD_FILE).read_text(encoding="utf-8")
        documentation_check.check(
            text, documentation.path_of(description.handle)
        )
    except (errors.HandleError, OSError, ValueError) as error:
        findings.fail("page", f"{tree.CARD_FILE}: {error}")
        return
    # The rest of its words may be those of an earlier release.
    ending = f"{description.handle}{handles.ARCHIVE_SUFFIX}"
    wanted = documentation_check.tags(documentation.model_page(description))
    for key, value in sorted(wanted ^ documentation_check.tags(text)):
        if key != "asset-path":
            findings.fail(
                "page",
                f"{tree.CARD_FILE}: the tag {clean(key)}: {clean(value)} is "
                + ("missing" if (key, value) in wanted else "not the entry's"),
            )
        elif value != ending and not value.endswith(f"/{ending}"):
            findings.fail(
                "page",
                f"{tree.CARD_FILE}: asset-path is another than {ending}",
            )
    findings.note("page", f"{tree.CARD_FILE} follows the format and the entry")


def _repository(root: pathlib.Path, quick: bool) -> list[Report]:
    import tqdm

    released = tree.released(root)
    reports = [_root(root, released)]
    for handle in tqdm.tqdm(
        released, desc=root.name, unit="version", disable=None
    ):
        folder = tree.directory(root, handle)
        report = _version(folder, quick, os.fspath(folder))
        reports.append(report)
    return reports


def _root(root: pathlib.Path, released: list[handles.Handle]) -> Report:
    """What a repository has beside its models."""
    findings = _Findings(os.fspath(root), REPOSITORY_CHECKS)
    entries = _check_entries(findings, root, released)
    _check_index(findings, root, entries)
    for handle in released:
        _check_public_archive(findings, root, handle)
    findings.note("archives", f"{len(released)} under their public names")
    left = sorted(path.name for path in root.glob(".staging/*"))
    if left:
        findings.note(
            "staging",
            f"{len(left)} left by publishers that are at work or were "
            "stopped; the next one removes what is not needed",
        )
    findings.absent("nothing left over", "staging")
    return findings.report()


def _check_entries(
    findings: _Findings, root: pathlib.Path, released: list[handles.Handle]
) -> list[entry.Entry]:
    found = []
    for handle in released:
        try:
            found.append(_checked(tree.read(root, handle)))
        except (errors.HandleError, OSError) as error:
            findings.fail("entries", f"{handle}: {error}")
    for one in newest(found):
        path = tree.directory(root, one.handle.at(None)) / handles.ENTRY_FILE
        if not repository.same_file(path, one.to_json().encode()):
            name = path.relative_to(root)
            findings.fail("entries", f"{name} is not that of {one.handle}")
    findings.note("entries", f"{len(found)} of versions, and of the newest")
    return found


def _check_index(
    findings: _Findings, root: pathlib.Path, entries: list[entry.Entry]
) -> None:
    """Compares the index and all derived files with the versions' entries."""
    try:
        index = repository.index(root)
    except errors.ExportError as error:
        findings.fail("index", str(error))
        findings.fail("pages", "the index cannot be read")
        return
    listed = {}
    for row in index.entries:
        try:
            release = handles.Release.from_json(row)
        except errors.HandleError as error:
            findings.fail("index", str(error))
        else:
            listed[release.handle] = row
    there = {one.handle: json.loads(one.to_json()) for one in entries}
    for handle in sorted({*listed, *there}):
        if handle not in there:
            findings.fail("index", f"{handle} is listed and not published")
        elif handle not in listed:
            findings.fail("index", f"{handle} is published and not listed")
        elif listed[handle] != there[handle]:
            findings.fail("index", f"{handle} has another entry than its own")
    findings.note("index", f"{len(listed)} versions")
    try:
        derived = repository.derived(entries, index.url, index.title)
    except errors.BitTfError as error:
        findings.fail("pages", str(error))
        return
    names = [path for path in derived if not path.endswith(_INDEXED)]
    for path in names:
        if not (root / path).is_file():
            findings.fail("pages", f"{path} is missing")
        elif not repository.same_file(root / path, derived[path]):
            findings.fail(
                "pages",
                f"{path} is not what the entries give; hub-export publish "
                "--refresh makes it anew",
            )
    findings.note("pages", f"{len(names)} files as the entries give them")


_INDEXED = (handles.INDEX_FILE, handles.ENTRY_FILE)


def _check_public_archive(
    findings: _Findings, root: pathlib.Path, handle: handles.Handle
) -> None:
    public = tree.archive(root, handle)
    packed = _packed(tree.directory(root, handle))
    name = public.relative_to(root)
    inside = pathlib.Path(os.path.realpath(root))
    if not pathlib.Path(os.path.realpath(public)).is_relative_to(inside):
        findings.fail("archives", f"{name} leads out of the repository")
    elif not public.is_file() or not packed.is_file():
        findings.fail("archives", f"{name} leads to no archive")
    elif not os.path.samefile(public, packed) and not filecmp.cmp(
        public, packed, shallow=False
    ):
        findings.fail("archives", f"{name} is not {handle}/{packed.name}")
