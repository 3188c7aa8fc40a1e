"""Weights → a version in a repository: made, packed, checked, and committed.

`python -m hub_export.publishing DIRECTORY` makes the SavedModel that
DIRECTORY/request.json asks for. Publications run it in a fresh process: names
inside of a graph depend on what a process did before, and an archive is to
have the same bytes every time.
"""

import builtins
import contextlib
import dataclasses
import datetime
import hashlib
import json
import math
import os
import pathlib
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from bit_tf import (
    archive,
    errors,
    files,
    handles,
    labels,
    published,
    relocation,
    variants,
)
from hub_export import (
    card,
    documentation,
    documentation_check,
    entry,
    fresh_process,
    sources,
    tree,
)
from hub_export import repository as repositories

__all__ = [
    "FAMILIES",
    "HEADS",
    "Options",
    "Plan",
    "plan",
    "publish",
    "publish_all",
]

# Whose vectors and logits were published, on which data the weights saw.
FAMILIES = ("M", "S")
HEADS = ("keep", "none")
_LICENSE = "apache-2.0"
_DATASETS = {
    "imagenet21k": "imagenet-21k",
    "ilsvrc2012": "imagenet-ilsvrc-2012-cls",
}
_REQUEST = "request.json"
_NO_PENALTY = (
    "The L2 penalty of the SavedModel that it was made from is not kept; give "
    "the penalty's factor to have one (--l2)."
)
# With other numbers of threads, and on a GPU, the golden values' last digits
# are others.
_SAME_EVERYWHERE = {
    "CUDA_VISIBLE_DEVICES": "-1",
    "KERAS_BACKEND": "tensorflow",
    "TF_NUM_INTRAOP_THREADS": "1",
}
_MAX_LINE = 100
_MAX_DESCRIPTION = 500

Say = Callable[[str], object]


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a publication would write.

    Attributes:
      entry: of the version.
      files: those of the version, then those around it that would change, each
        with its path below the repository's root.
    """

    entry: entry.Entry
    files: tuple[handles.File, ...]


def publish(
    source: str | os.PathLike[str],
    repository: str | os.PathLike[str],
    handle: str | handles.Handle,
    *,
    version: int | None = None,
    url: str | None = None,
    title: str | None = None,
    say: Say | None = None,
    **options: Any,
) -> entry.Entry:
    """Publishes weights as a new version of a model.

    The SavedModel is made in a fresh process, packed, loaded and checked in
    another one, and its archive unpacked and compared, before anything of it
    appears. Then the version's folder appears by one rename, and the pages and
    the index of the repository are brought up to date. A version is immutable.
    Another publisher of the same model waits.

    Args:
      source: whatever bit_tf.load_model takes, or a SavedModel of this
        package, which is published as it is if its head is as asked for and
        no other option changes it.
      repository: a directory, which is made if there is none.
      handle: such as "google/bit/m-r50x1", perhaps with a version.
      version: the default is the one after the newest, or the handle's.
      url: the public address of the repository's root; the default is the one
        it was given before.
      title: of the repository's front page; likewise.
      say: is called with a line of text at every step.
      **options: those of `Options`.

    Returns:
      The version's entry.

    Raises:
      ExportError: the version is there already, an option cannot be used, the
        weights lack the head that was asked for, or files cannot be written.
      VerificationError: what was made is not as it should be.
      HandleError: the handle is malformed.
      and what bit_tf.load_model raises. Nothing of the version appears then,
      unless the message says that only the pages around it are missing.
    """
    say = say or _silent
    job = _Job.of(source, handle, version, url, title, options)
    root = pathlib.Path(os.path.abspath(repository))
    repositories.require_root(root)
    with repositories.claim(root, job.handle) as staging:
        # What a publisher that died has left undone, and what would be lost
        # with this one.
        repositories.refresh(root, url=job.url, title=job.title)
        chosen = repositories.free_version(root, job.handle)
        found = _stage(job, chosen, staging, repositories.index(root), say)
        say(f"Committing {chosen} …")
        repositories.commit(root, chosen, staging, url=job.url, title=job.title)
    return found


def plan(
    source: str | os.PathLike[str],
    repository: str | os.PathLike[str],
    handle: str | handles.Handle,
    *,
    version: int | None = None,
    url: str | None = None,
    title: str | None = None,
    say: Say | None = None,
    **options: Any,
) -> Plan:
    """Does all that `publish` does, but for the commit, in a temporary folder.

    Args:
      source, repository, handle, version, url, title, say, **options: as in
        `publish`.

    Returns:
      What `publish` would write.

    Raises:
      as `publish` does.
    """
    say = say or _silent
    job = _Job.of(source, handle, version, url, title, options)
    root = pathlib.Path(os.path.abspath(repository))
    repositories.require_root(root)
    chosen = repositories.free_version(root, job.handle)
    others = repositories.entries(root)
    index = repositories.index(root)
    with contextlib.ExitStack() as stack:
        with repositories.writing(tempfile.gettempdir()):
            staging = pathlib.Path(
                stack.enter_context(
                    tempfile.TemporaryDirectory(prefix="hub-export-")
                )
            )
        found = _stage(job, chosen, staging, index, say)
        made = [
            dataclasses.replace(file, path=f"{chosen}/{file.path}")
            for file in _files(staging)
        ]
    made.append(found.archive)
    content = repositories.derived(
        [*others, found], job.url or index.url, job.title or index.title
    )
    for path, data in sorted(content.items()):
        if not repositories.same_file(root / path, data):
            made.append(
                handles.File(path, len(data), hashlib.sha256(data).hexdigest())
            )
    return Plan(found, tuple(made))


def publish_all(
    family: str,
    repository: str | os.PathLike[str],
    *,
    architectures: Iterable[str] | None = None,
    say: Say | None = None,
    **options: Any,
) -> list[entry.Entry]:
    """Publishes the models of a family under the names that Google gave them.

    For every architecture those are the feature vector and all classifiers, as
    version 1, from Google's weights. One that is there already is passed over,
    so that what was stopped can be run again.

    Args:
      family: "M", trained on ImageNet-21k, or "S", on ILSVRC-2012.
      repository: as in `publish`.
      architectures: such as ["R50x1"]; all that Google published unless given.
      say: as in `publish`.
      **options: of `publish`, but for those that differ from model to model.

    Returns:
      The entries of what was published now.

    Raises:
      UnknownNameError: there is no such family, or it has no such
        architecture.
      and what `publish` raises; what was published before stays.
    """
    say = say or _silent
    for name in ("version", "head", "description"):
        if options.get(name) is not None:
            raise errors.ExportError(
                "A whole family is published with heads, versions and "
                f"descriptions of its own. Received: {name}="
                f"{errors.brief(options[name])}. Leave it out, or publish one "
                "model at a time."
            )
    made = []
    models = list(_family(family, architectures))
    if tree.is_repository(repository):
        repositories.refresh(repository)
    for source, handle in models:
        if handle.version in tree.versions(repository, handle):
            say(f"{handle} is there already.")
            continue
        say(f"{handle}:")
        made.append(publish(source, repository, handle, say=say, **options))
    return made


def _family(
    family: str, architectures: Iterable[str] | None
) -> Iterator[tuple[str, handles.Handle]]:
    """(published name of the weights, handle with a version) of each model."""
    errors.lookup({name: name for name in FAMILIES}, family, "Families")
    rows: dict[str, list[tuple[str, handles.Handle]]] = {}
    for row in variants.list_models(f"BiT-{family}-*"):
        for address in (row.feature_handle, row.handle):
            if address is not None:
                path = address.removeprefix(handles.TFHUB)
                found = row.name, handles.Handle.parse(path)
                rows.setdefault(row.architecture, []).append(found)
    if isinstance(architectures, str):
        architectures = [architectures]
    chosen = rows if architectures is None else list(architectures)
    for name in chosen:
        errors.lookup(rows, name, f"Published architectures of BiT-{family}")
    for name in chosen:
        yield from rows[name]


def _silent(line: str) -> None:
    """Says nothing."""


@dataclasses.dataclass(frozen=True)
class Options:
    """How a model is made, and what is said of it.

    Attributes:
      head: "keep" or "none"; by default a handle whose name ends in
        "_classification" keeps the head, and any other publishes features.
      class_labels, probabilities, l2, numerics: as in
        hub_export.saved_model.convert.
      description: one or two sentences; by default made from the facts.
      license: an SPDX identifier, such as "apache-2.0"; by default that of
        Google's weights if it is them, else none is stated.
      datasets: what the weights were trained on, such as "imagenet-21k"; by
        default what is known of published weights.
    """

    head: str | None = None
    class_labels: str | Sequence[str | labels.Label] | None = "auto"
    probabilities: str | None = None
    l2: float = 0.0
    numerics: str | None = None
    description: str | None = None
    license: str | None = None
    datasets: Sequence[str] | None = None


@dataclasses.dataclass(frozen=True)
class _Job:
    """A publication that was asked for, each part of it checked.

    Attributes:
      source: what the weights are read from.
      handle: perhaps with a version.
      url, title: of the repository; None for those that it has.
      head: whether the model has one.
      options: their texts in the form in which they are stored.
    """

    source: str | os.PathLike[str]
    handle: handles.Handle
    url: str | None
    title: str | None
    head: bool
    options: Options

    @classmethod
    def of(
        cls,
        source: str | os.PathLike[str],
        handle: str | handles.Handle,
        version: int | None,
        url: str | None,
        title: str | None,
        options: dict[str, Any],
    ) -> "_Job":
        """Checks what can be checked before any work.

        Raises:
          ExportError, HandleError, UnknownNameError, FileNotFoundError: it
            cannot be done.
        """
        asked = _versioned(handle, version)
        known = {field.name for field in dataclasses.fields(Options)}
        for name in options.keys() - known:
            raise TypeError(f"publish has no option {name!r}.")
        chosen = _checked(Options(**options))
        head = chosen.head or (
            "keep" if asked.name.endswith("_classification") else "none"
        )
        _require_documentable(asked)
        _require_source(source)
        if os.path.isfile(os.path.join(source, handles.ENTRY_FILE)):
            # A version's folder, which has its SavedModel in it.
            source = pathlib.Path(source, handles.MODEL_FOLDER)
            os.stat(source)
        return cls(
            source,
            asked,
            None if url is None else repositories.checked_url(url),
            None if title is None else repositories.one_line("A title", title),
            head == "keep",
            chosen,
        )

    @property
    def name(self) -> str:
        """The source, as it may be shown."""
        return published.shown(self.source)


def _versioned(
    handle: str | handles.Handle, version: int | None
) -> handles.Handle:
    found = handles.Handle.parse(
        handle.path if isinstance(handle, handles.Handle) else handle
    )
    if version is None:
        return found
    if type(version) is not int or found.version not in (None, version):
        raise errors.ExportError(
            "A version is a number, and the same in the handle if it is there "
            f"too. Received: {found} with the version "
            f"{errors.brief(version)}."
        )
    return handles.Handle.parse(f"{found.at(None)}/{version}")


def _checked(options: Options) -> Options:
    if options.head is not None and options.head not in HEADS:
        raise errors.ExportError(
            f"head is 'keep' or 'none'. Received: {options.head!r}. Without "
            "it, a handle that ends in _classification keeps the head."
        )
    if options.probabilities not in (None, "softmax", "sigmoid"):
        raise errors.ExportError(
            "probabilities must be 'softmax' or 'sigmoid'. "
            f"Received: {options.probabilities!r}."
        )
    if options.numerics is not None:
        variants.numerics(options.numerics)
    if (
        isinstance(options.l2, bool)
        or not isinstance(options.l2, (int, float))
        or not 0 <= options.l2 < math.inf
    ):
        raise errors.ExportError(
            "l2 must be a finite number of 0 or more. "
            f"Received: {options.l2!r}."
        )
    classes = options.class_labels
    if isinstance(classes, str):
        if classes != "auto":
            labels.label_set(classes)
    elif classes is not None:
        try:
            classes = labels.check(classes, len(classes))
        except (TypeError, ValueError) as error:
            raise errors.ExportError(str(error)) from error
    license = _line("A licence", options.license)
    if license is not None and re.fullmatch("[A-Za-z0-9.+-]+", license):
        license = license.lower()
    datasets = options.datasets
    if isinstance(datasets, str):
        datasets = [datasets]
    if datasets is not None:
        lines = [_line("A data set", dataset) for dataset in datasets]
        datasets = tuple(dict.fromkeys(filter(None, lines)))
    return dataclasses.replace(
        options,
        class_labels=classes,
        description=_line(
            "A description", options.description, _MAX_DESCRIPTION
        ),
        license=license,
        datasets=datasets,
    )


def _line(what: str, text: str | None, longest: int = _MAX_LINE) -> str | None:
    return None if text is None else repositories.one_line(what, text, longest)


def _require_documentable(handle: handles.Handle) -> None:
    """Refuses a handle that tfhub.dev's documentation cannot have.

    Raises:
      HandleError: with the rule.
    """
    if handle.version is None:
        handle = handle.at(1)
    tags = {
        "asset-path": f"{handle}{handles.ARCHIVE_SUFFIX}",
        "fine-tunable": "true",
        "format": "saved_model_2",
        "task": "image-classification",
    }
    lines = "".join(f"<!-- {key}: {text} -->\n" for key, text in tags.items())
    documentation_check.check(
        f"# Module {handle}\n\nA model of images.\n\n{lines}",
        documentation.path_of(handle),
    )


def _require_source(source: str | os.PathLike[str]) -> None:
    """Refuses a path where nothing is; looks for nothing on the network."""
    if not isinstance(source, str):
        os.stat(source)
        return
    if re.match(r"[a-z][a-z\d+.-]*://", source, re.IGNORECASE):
        return
    with contextlib.suppress(errors.UnknownNameError):
        variants.variant(source)
        return
    published.locate(source)


def _stage(
    job: _Job,
    handle: handles.Handle,
    staging: pathlib.Path,
    index: repositories.Index,
    say: Say,
) -> entry.Entry:
    """Fills a version's folder with all that belongs there, and checks it.

    Args:
      job: what is to be published.
      handle: with its version.
      staging: an empty folder.
      index: of the repository.
      say: as in `publish`.
    """
    from hub_export import pages

    model = staging / handles.MODEL_FOLDER
    say(f"Making a SavedModel of {job.name} …")
    around = sources.around_saved_model(job.source)
    if around is not None:
        say(f"Note: {around.note()}")
    for note in _make(job, staging):
        say(f"Note: {note}")
    publication = _publication(job, handle, model)
    with repositories.writing(staging):
        publication.save(model)
        say("Packing it …")
        packed = archive.pack(model, staging / tree.ARCHIVE_FILE)
        made = _files(model)
    say("Loading and checking it in a fresh process …")
    found = _described(publication, model, packed, made)
    _check_archive(staging, made)
    # Of no address: a version outlives the host that it was published on.
    written = pages.version_files(found, labels.read_saved_model(model))
    found = found.with_pages(written)
    documentation_check.check(
        written[tree.CARD_FILE].decode(), documentation.path_of(handle)
    )
    written[handles.ENTRY_FILE] = found.to_json().encode()
    with repositories.writing(staging):
        for name, content in written.items():
            repositories.replace_file(staging / name, content)
    return found


def _make(job: _Job, staging: pathlib.Path) -> list[str]:
    """Makes the SavedModel in a fresh process.

    Returns:
      What a user should know of the weights.

    Raises:
      ExportError: the process died.
      and what it raised itself.
    """
    options = job.options
    classes: Any = options.class_labels
    if classes is not None and not isinstance(classes, str):
        classes = [dataclasses.astuple(label) for label in classes]
    request = {
        "source": os.fspath(job.source),
        "name": isinstance(job.source, str),
        "head": job.head,
        "class_labels": classes,
        "probabilities": options.probabilities,
        "l2": options.l2,
        "numerics": options.numerics,
        "moves": relocation.moves_in_force(),
    }
    path = staging / _REQUEST
    with (
        repositories.writing(staging),
        open(os.open(path, os.O_WRONLY | os.O_CREAT, 0o600), "w") as file,
    ):
        json.dump(request, file)
    outcome = fresh_process.call("hub_export.publishing", staging, shown=True)
    path.unlink(missing_ok=True)
    if outcome.fault is not None:
        raise errors.ExportError(
            "The process that makes the SavedModel ends with an answer. "
            f"Received from it: {outcome.fault}. What it printed is above; a "
            "process that was killed may have needed more memory."
        )
    if outcome.answer["error"] is not None:
        raise _error(**outcome.answer["error"])
    return outcome.answer["notes"]


def _publication(
    job: _Job, handle: handles.Handle, model: pathlib.Path
) -> entry.Publication:
    """What is said of a model: what was given, else what is known."""
    description, provenance = _cards(model)
    before = _published_before(model)
    row = None
    if provenance.name is not None:
        with contextlib.suppress(errors.UnknownNameError):
            row = variants.variant(provenance.name)
    license, datasets = job.options.license, job.options.datasets
    if license is None:
        license = before.license if before else None
        if license is None and row is not None and row.url is not None:
            license = _LICENSE
    if datasets is None:
        datasets = before.datasets if before else ()
        if not datasets and row is not None:
            datasets = _datasets(row)
    text = job.options.description
    if text is None:
        text = (
            before.description if before else _sentence(description, provenance)
        )
    return entry.Publication(handle, text, license, tuple(datasets))


def _cards(model: pathlib.Path) -> tuple[card.Card, card.Provenance]:
    try:
        said, came = card.read(model)
        return card.Card.from_dict(said), card.Provenance.from_dict(came)
    except (
        AttributeError,
        KeyError,
        OSError,
        TypeError,
        ValueError,
        RecursionError,
    ) as error:
        raise errors.ExportError(
            "A SavedModel of this package says what it is in "
            f"{card.CARD_FILE} and {card.PROVENANCE_FILE}. Received: other "
            f"files ({type(error).__name__}: {error}). Convert its checkpoint "
            "anew."
        ) from error


def _published_before(model: pathlib.Path) -> entry.Publication | None:
    """What the publisher of a SavedModel said, if it was published before."""
    path = model / entry.PUBLICATION_FILE
    if not path.exists():
        return None
    try:
        found = entry.Publication.from_dict(json.loads(path.read_bytes()))
        return dataclasses.replace(
            found,
            description=str(
                _line("A description", found.description, _MAX_DESCRIPTION)
            ),
            license=_line("A licence", found.license),
            datasets=tuple(
                str(_line("A data set", name)) for name in found.datasets
            ),
        )
    except (
        AttributeError,
        KeyError,
        OSError,
        RecursionError,
        TypeError,
        ValueError,
        errors.ExportError,
    ) as error:
        raise errors.ExportError(
            f"{entry.PUBLICATION_FILE} of a SavedModel holds what its "
            f"publisher said. Received: another file ({error}). Remove it."
        ) from error


def _datasets(row: variants.Variant) -> tuple[str, ...]:
    """What published weights were trained on, as far as their name says it."""
    known = {row.labels} if row.labels else set()
    if re.search("BiT-M-|in21k", row.name):
        known.add("imagenet21k")
    return tuple(text for name, text in _DATASETS.items() if name in known)


def _sentence(said: card.Card, came: card.Provenance) -> str:
    """A description made from the facts."""
    network = f"BiT {said.architecture}"
    if said.architecture == "custom":
        network = "a BiT ResNet-v2"
        if came.parents and variants.BIT not in said.citations:
            network = "a network"
    source = came.name or came.source
    named = source is not None and source.isprintable()
    origin = f", converted from {source}" if named else ""
    handles = [parent.handle for parent in came.parents]
    if handles and all(handle.isprintable() for handle in handles):
        origin += f", made around {' and '.join(handles)}"
    text = (
        f"Scores of {said.num_classes} classes for images, from {network}"
        if said.num_classes
        else f"Feature vectors of {said.feature_dim} numbers for images, from "
        f"{network}"
    )
    whole = f"{text}{origin}."
    return whole if len(whole) <= _MAX_DESCRIPTION else f"{text}."


def _described(
    publication: entry.Publication,
    model: pathlib.Path,
    packed: tuple[int, str],
    made: tuple[handles.File, ...],
) -> entry.Entry:
    """The entry of a model that was loaded and found to be as it should be.

    Raises:
      VerificationError: it is not; the message has the table of all checks.
    """
    from hub_export import verification

    handle = publication.handle
    report = verification.check_model(model)
    found = report.graph
    if not report.ok or found is None or found.relative_error is None:
        remedy = ""
        if any(
            check.name == "golden" and check.status == "failed"
            for check in report.checks
        ):
            remedy = (
                "\nIf the weights of a published SavedModel were changed in "
                "place, its golden values are those of the weights before: "
                "remove assets.extra/ from it, and it is read as a checkpoint "
                "and made anew; or publish the checkpoint of the training."
            )
        raise errors.VerificationError(
            "A model is published if it passes every check, and gives its "
            f"golden values. Received: {handle}, which was not published:\n"
            f"{report.table()}{remedy}"
        )
    said, came = _cards(model)
    return entry.Entry(
        publication=publication,
        card=said,
        provenance=came,
        graph=found,
        archive=handles.File(f"{handle}{handles.ARCHIVE_SUFFIX}", *packed),
        files=made,
        published=_now(),
    )


def _check_archive(
    staging: pathlib.Path, made: tuple[handles.File, ...]
) -> None:
    """Unpacks the archive again, and compares every file.

    Raises:
      VerificationError: they differ from the model's.
    """
    with (
        repositories.writing(staging),
        tempfile.TemporaryDirectory(dir=staging) as folder,
    ):
        unpacked = pathlib.Path(folder, handles.MODEL_FOLDER)
        archive.unpack(staging / tree.ARCHIVE_FILE, unpacked)
        found = _files(unpacked)
    if found != made:
        raise errors.VerificationError(
            "A model's archive unpacks to the model's files. Received: "
            f"{sorted({file.path for file in set(made) ^ set(found)})}, which "
            "differ. Check the disk and the memory, and publish again."
        )


def _files(folder: pathlib.Path) -> tuple[handles.File, ...]:
    """All files of a folder, in the order of their paths."""
    return tuple(
        handles.File(path, *files.measure(folder / path))
        for path in sorted(
            found.relative_to(folder).as_posix()
            for found in folder.rglob("*")
            if found.is_file()
        )
    )


def _now() -> str:
    """The time in UTC, or $SOURCE_DATE_EPOCH's, for reproducible entries."""
    given = os.environ.get("SOURCE_DATE_EPOCH")
    try:
        now = (
            datetime.datetime.fromtimestamp(int(given), datetime.UTC)
            if given
            else datetime.datetime.now(datetime.UTC)
        )
    except (OSError, OverflowError, ValueError) as error:
        raise errors.ExportError(
            "SOURCE_DATE_EPOCH is a number of seconds since 1970. Received: "
            f"{errors.brief(given)}. Correct or unset it."
        ) from error
    return now.strftime("%Y-%m-%dT%H:%M:%SZ")


def _work(directory: str, answer: Callable[[Any], None]) -> None:
    """Makes the SavedModel that a request asks for; answers with its error."""
    os.environ.update(_SAME_EVERYWHERE)
    folder = pathlib.Path(directory)
    request = json.loads((folder / _REQUEST).read_text(encoding="utf-8"))
    try:
        with contextlib.ExitStack() as stack:
            for moves in request.pop("moves"):
                stack.enter_context(relocation.relocated(moves))
            notes = _convert(folder / handles.MODEL_FOLDER, **request)
    except (errors.BitTfError, OSError, MemoryError) as error:
        answer({"error": _told(error), "notes": []})
    else:
        answer({"error": None, "notes": notes})


def _convert(
    path: pathlib.Path,
    *,
    source: str,
    name: bool,
    head: bool,
    class_labels: Any,
    **options: Any,
) -> list[str]:
    """Makes a SavedModel at `path`, or copies the one that is there.

    Args:
      path: the directory to make.
      source: what the weights are read from.
      name: False if it is a path, whatever else it looks like.
      head: whether the model is to have one.
      class_labels: "auto", the name of a set, pairs of id and name, or None.
      **options: of saved_model.convert.

    Returns:
      What a user should know of the weights.
    """
    weights: str | pathlib.Path = source if name else pathlib.Path(source)
    unchanged = class_labels == "auto" and options == {
        "probabilities": None,
        "l2": 0.0,
        "numerics": None,
    }
    if unchanged and _copied(weights, path, head):
        return []
    from bit_tf.commands import program

    if sources.around_saved_model(weights) is not None:
        num_classes = None
    else:
        program.expect_tensorflow(source)
        num_classes = published.open_checkpoint(weights).num_classes
    if head and num_classes == 0:
        raise errors.ExportError(
            "A model with a head is published from weights that have one. "
            f"Received: {published.shown(weights)!r}, which has none. Publish "
            "features (--head none), under a handle that does not end in "
            "_classification."
        )
    if class_labels is not None and not isinstance(class_labels, str):
        class_labels = [labels.Label(*pair) for pair in class_labels]
    program.quiet_tensorflow()
    from hub_export import saved_model

    report = saved_model.convert(
        weights,
        path,
        head=head,
        class_labels=class_labels,
        # The publisher checks it in a process of its own.
        verify=False,
        **options,
    )
    notes = report["notes"]
    if not options["l2"]:
        with _saved_model(weights, path.parent) as found:
            if found is not None and _has_penalty(found):
                notes = [*notes, _NO_PENALTY]
    return notes


def _copied(source: str | pathlib.Path, path: pathlib.Path, head: bool) -> bool:
    """Copies a SavedModel of this package, if it is one and its head fits."""
    with _saved_model(source, path.parent) as found:
        if found is None or not (found / card.CARD_FILE).is_file():
            return False
        if bool(_cards(found)[0].num_classes) != head:
            return False
        with repositories.writing(path.parent):
            _copy(found, path)
    return True


@contextlib.contextmanager
def _saved_model(
    source: str | pathlib.Path, beside: pathlib.Path
) -> Iterator[pathlib.Path | None]:
    """The directory that a source is, or whose archive it is, or None.

    Args:
      source: what weights are read from.
      beside: where an archive is unpacked, until the block ends.
    """
    if not os.path.exists(source):
        if not str(source).lower().startswith(("http://", "https://")):
            yield None
            return
        source = published.locate(source).path
    found = pathlib.Path(source)
    if not found.is_file():
        yield found
    elif not archive.is_archive(found):
        yield None
    else:
        with tempfile.TemporaryDirectory(dir=beside) as folder:
            unpacked = pathlib.Path(folder, "source")
            archive.unpack(found, unpacked)
            yield unpacked


def _has_penalty(directory: pathlib.Path) -> bool:
    """Whether a SavedModel offers regularization losses."""
    from tensorflow.core.protobuf import saved_model_pb2

    path = directory / "saved_model.pb"
    if not path.is_file():
        return False
    message = saved_model_pb2.SavedModel.FromString(path.read_bytes())
    for graph in message.meta_graphs:
        nodes = graph.object_graph_def.nodes
        for child in nodes[0].children if nodes else ():
            if child.local_name == "regularization_losses":
                return bool(nodes[child.node_id].children)
    return False


def _copy(source: pathlib.Path, path: pathlib.Path) -> None:
    """Copies regular files and folders; `archive.pack` knows the rules."""
    path.mkdir()
    for found in sorted(source.iterdir()):
        if found.is_symlink() or not (found.is_dir() or found.is_file()):
            raise errors.ExportError(
                "A SavedModel holds regular files and directories. Received: "
                f"{str(found)!r}, which is a link, a device or the like. Copy "
                "what it points to (cp -rL), or remove it."
            )
        if found.is_dir():
            _copy(found, path / found.name)
        else:
            shutil.copyfile(found, path / found.name)


def _told(error: BaseException) -> dict[str, Any]:
    """An exception for another process."""
    arguments: list[Any] = [str(error)]
    if isinstance(error, OSError) and error.errno is not None:
        arguments = [error.errno, error.strerror]
        if error.filename is not None:
            arguments.append(os.fsdecode(error.filename))
    return {"kind": type(error).__name__, "arguments": arguments}


def _error(kind: str, arguments: list[Any]) -> Exception:
    """The exception of another process, with the same message."""
    for module in (errors, builtins):
        found = getattr(module, kind, None)
        if isinstance(found, type) and issubclass(found, Exception):
            return found(*arguments)
    return errors.ExportError(f"{kind}: {arguments[0]}")


def main() -> int:
    return fresh_process.serve(_work, __doc__)


if __name__ == "__main__":
    sys.exit(main())
