"""Whether a published model is what it should be, byte for byte and in use.

Nothing here raises for a bad model: each finding is a check in a report, and
what depends on a failed check says so.
"""

import contextlib
import dataclasses
import fnmatch
import hashlib
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
    repository_check,
    tree,
)
from hub_export.contradictions import contradictions, mistyped
from hub_export.description import clean, file_size
from hub_export.graph import FAILED, PASSED, Check
from hub_export.report import Findings, Report

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
REPOSITORY_CHECKS = repository_check.CHECKS
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
# By any of these a directory is a SavedModel, whole or not.
_OF_A_MODEL = (*_GRAPHS, _TF1_HUB, "variables", "assets.extra")
_QUICK = "not looked at (quick)"
# Of a JSON file that is read whole, and of zeros after an archive; bytes.
_MAX_TEXT = 2**24
_CHUNK = 2**20
# What a version's folder holds, each a plain file or a directory.
_OF_A_VERSION = {
    tree.PAGE_FILE: stat.S_ISREG,
    tree.CARD_FILE: stat.S_ISREG,
    handles.ENTRY_FILE: stat.S_ISREG,
    tree.ARCHIVE_FILE: stat.S_ISREG,
    handles.MODEL_FOLDER: stat.S_ISDIR,
}
_TAR_TYPES = (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.DIRTYPE)


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
    findings = Findings(os.fspath(directory), CHECKS)
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
    why = "another file" if path.exists() else "not there"
    if not text:
        why = "empty"
    elif path.is_dir():
        if tree.is_repository(path):
            return _repository(path, quick)
        if (path / handles.ENTRY_FILE).is_file():
            return _published(path, quick)
        if any(os.path.lexists(path / name) for name in _OF_A_MODEL):
            return [check_model(path, quick=quick)]
        why = (
            f"a directory without {handles.INDEX_FILE}, {handles.ENTRY_FILE} "
            f"and {_GRAPHS[0]}"
        )
    elif path.is_file() and archive.is_archive(path):
        return [_archive(path, quick)]
    raise errors.HandleError(
        "What is verified is a handle (https://…), a SavedModel's directory, "
        "a .tar.gz, .tgz or .tar archive, or a repository of models or a part "
        f"of one. Received: {errors.brief(text)}, which is {why}."
    )


# --- a SavedModel's directory


def _look(
    findings: Findings,
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
    if any(_is_special(_led_to(directory / path)) for path in there):
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


def _led_to(path: pathlib.Path) -> int:
    """The mode of what is there, or of what a link there leads to."""
    try:
        return path.stat().st_mode
    except OSError:
        return path.lstat().st_mode


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
    findings: Findings, there: Mapping[str, os.stat_result]
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
    findings: Findings,
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


def _check_operations(findings: Findings, directory: pathlib.Path) -> bool:
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
    findings: Findings,
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
    findings: Findings, description: entry.Entry
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
    findings: Findings, path: pathlib.Path
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
    findings: Findings, path: pathlib.Path, description: entry.Entry | None
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
    findings: Findings,
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
    findings = Findings(os.fspath(path), CHECKS)
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


def _read_entry(findings: Findings, path: pathlib.Path) -> entry.Entry | None:
    try:
        return repository_check.checked(entry.Entry.parse(_content(path)))
    except (errors.HandleError, OSError) as error:
        findings.fail("hash", f"{path.name}: {error}")
        return None


def _content(path: pathlib.Path) -> bytes:
    """What a small file has in it.

    Raises:
      OSError: it is no plain file, is too large, or cannot be read.
    """
    found = path.lstat()
    if not stat.S_ISREG(found.st_mode):
        raise OSError("it is no regular file")
    if found.st_size > _MAX_TEXT:
        raise OSError(f"{found.st_size} bytes; the limit is {_MAX_TEXT}")
    return path.read_bytes()


def _handle(address: str, quick: bool) -> Report:
    findings = Findings(cached_download.shown(address), CHECKS)
    with tempfile.TemporaryDirectory(prefix="hub-export-") as folder:
        path = cached_download.cached(
            handles.with_query(address),
            directory=folder,
            name="model.tar.gz",
            setting="TMPDIR",
            temporary=True,
        )
        description = None
        try:
            found = hub_fetch.description(address)
            if found is not None:
                description = repository_check.checked(
                    entry.Entry.from_dict(found)
                )
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
    if (
        os.path.lexists(repository_check.packed_archive(folder))
        or folder.name.isdigit()
    ):
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
    findings = Findings(target or os.fspath(folder), CHECKS)
    description = _read_entry(findings, folder / handles.ENTRY_FILE)
    packed = repository_check.packed_archive(folder)
    model = folder / handles.MODEL_FOLDER
    unpacked = model.is_dir() and not model.is_symlink()
    if not os.path.lexists(model):
        findings.fail("hash", f"{model.name}/ is missing")
    _check_folder(findings, folder)
    _check_page(findings, folder, description)
    if not packed.is_file():
        findings.fail("hash", f"{packed.name} is missing")
        if unpacked:
            _look(findings, model, description, quick)
        findings.fail_rest("no model")
    elif not unpacked:
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


def _check_folder(findings: Findings, folder: pathlib.Path) -> None:
    """Checks what there is in a version's folder, and who can read it."""
    for path, found in _listing(folder).items():
        if "/" not in path:
            is_right = _OF_A_VERSION.get(path)
            if is_right is None:
                findings.fail("files", f"{path!r} is no part of a version")
            elif not is_right(found.st_mode):
                findings.fail(
                    "files",
                    f"{path!r} is {repository_check.kind(found.st_mode)}",
                )
        if closed := repository_check.why_closed(found.st_mode):
            findings.fail("files", f"{path!r} {closed}")


def _check_page(
    findings: Findings, folder: pathlib.Path, description: entry.Entry | None
) -> None:
    """Checks a version's card.md and page."""
    if description is None:
        findings.fail("page", "there is no entry to compare it with")
        return
    wanted = {file.path: file for file in description.pages}
    for name in sorted({tree.PAGE_FILE, tree.CARD_FILE} ^ wanted.keys()):
        findings.fail(
            "page",
            f"{clean(name)} is in the entry, and no page of a version"
            if name in wanted
            else f"the entry has no hash of {name}",
        )
    for name in (tree.PAGE_FILE, tree.CARD_FILE):
        try:
            content = _content(folder / name)
        except FileNotFoundError:
            findings.fail("page", f"{name} is missing")
            continue
        except OSError as error:
            findings.fail("page", f"{name}: {error}")
            continue
        file = wanted.get(name)
        if file is not None and (
            len(content) != file.size
            or hashlib.sha256(content).hexdigest() != file.sha256
        ):
            findings.fail("page", f"{name} is not the one that was published")
        if name == tree.CARD_FILE:
            _check_words(findings, content, description)
    findings.note("page", f"{tree.CARD_FILE} follows the format and the entry")


def _check_words(
    findings: Findings, content: bytes, description: entry.Entry
) -> None:
    """Checks the text of a card.md."""
    try:
        text = content.decode()
        documentation_check.check(
            text, documentation.path_of(description.handle)
        )
    except (errors.HandleError, ValueError) as error:
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


def _repository(root: pathlib.Path, quick: bool) -> list[Report]:
    import tqdm

    released = tree.released(root)
    reports = [repository_check.check(root, released)]
    for handle in tqdm.tqdm(
        released, desc=root.name, unit="version", disable=None
    ):
        folder = tree.directory(root, handle)
        report = _version(folder, quick, os.fspath(folder))
        reports.append(report)
    return reports
