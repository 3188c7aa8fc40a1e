"""Publications of files that only look like SavedModels, without TensorFlow.

`python fake_publications.py crash DIRECTORY` publishes in one forked process
after the other, each of which dies at a later call to the file system;
`crash_site DIRECTORY ROOT` copies a repository in that way; `race DIRECTORY
COUNT` publishes one version from that many processes at once.
"""

import builtins
import contextlib
import itertools
import json
import os
import pathlib
import shutil
import sys

import helpers
import pytest

from bit_tf import errors, files, handles
from hub_export import (
    card,
    pages,
    publishing,
    repository,
    site,
    tree,
    verification,
)

MODEL = "google/bit/m-r50x1"
CLASSIFIER = f"{MODEL}/ilsvrc2012_classification"
# What a process must not do if it is to leave no trace.
_OS = ("chmod", "fsync", "mkdir", "rename", "replace", "rmdir", "symlink")
_OS += ("fchmod", "unlink")
KILLED = 9


def make_model(path, name, head=False):
    """A directory with the files of a SavedModel, and a card."""
    described = helpers.make_entry(
        "a/b/1", 10 if head else 0, "testing", labels=None
    )
    (path / "variables").mkdir(parents=True)
    (path / "saved_model.pb").write_bytes(b"graph of " + name.encode())
    (path / "variables" / "variables.index").write_bytes(b"index")
    (path / "variables" / "variables.data-00000-of-00001").write_bytes(
        bytes(1000)
    )
    provenance = card.Provenance(source=name, sha256="1" * 64)
    card.save(described.card, provenance, path)


def _make(job, staging):
    make_model(staging / handles.MODEL_FOLDER, "fake", job.head)
    return []


def _check_model(directory, *, description=None, quick=False):
    num_classes = card.read(directory)[0]["num_classes"]
    found = helpers.make_entry("a/b/1", num_classes, "testing", labels=None)
    check = verification.Check("golden", "passed", "as if")
    return verification.Report(str(directory), (check,), found.graph)


def patch(monkeypatch):
    """Publications neither convert nor load anything."""
    monkeypatch.setattr(publishing, "_make", _make)
    monkeypatch.setattr(verification, "check_model", _check_model)
    # A disk's own business, of which these tests have many.
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@contextlib.contextmanager
def faked():
    """The same, for a while."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        patch(monkeypatch)
        yield


def _repository_files(entries, url=None, title=None):
    text = f"{title} {url} {[one.handle.path for one in entries]}".encode()
    models = {one.handle.at(None).path for one in entries}
    return dict.fromkeys(
        ("index.html", *(f"{one}/index.html" for one in models)), text
    )


def patch_pages(monkeypatch):
    """Pages around versions are quick to make, for tests of very many."""
    monkeypatch.setattr(pages, "repository_files", _repository_files)


def publish(root, handle=MODEL, **options):
    """Publishes a fake; its source is any file that exists."""
    return publishing.publish(pathlib.Path(__file__), root, handle, **options)


def snapshot(root):
    """Path → content of everything below a directory, links as such."""
    found = {}
    for path in sorted(root.rglob("*")):
        name = path.relative_to(root).as_posix()
        if path.is_symlink():
            found[name] = os.readlink(path)
        else:
            found[name] = path.read_bytes() if path.is_file() else None
    return found


def assert_readable(root):
    """A reader finds whole versions only, each under all of its names."""
    found = tree.released(root)
    for handle in found:
        described = tree.read(root, handle)
        folder = tree.directory(root, handle)
        assert files.measure(tree.archive(root, handle)) == (
            described.archive.size,
            described.archive.sha256,
        )
        for file in described.files:
            path = folder / handles.MODEL_FOLDER / file.path
            assert files.measure(path) == (file.size, file.sha256)
        assert [file.path for file in described.pages] == [
            tree.CARD_FILE,
            tree.PAGE_FILE,
        ]
        for file in described.pages:
            path = folder / file.path
            assert files.measure(path) == (file.size, file.sha256)
    if tree.is_repository(root):
        index = json.loads((root / handles.INDEX_FILE).read_bytes())
        for row in index["entries"]:
            listed = handles.Release.from_json(row)
            assert listed.handle in found
    return found


def assert_whole(root):
    """Everything derived is as the versions have it, and nothing is left."""
    found = assert_readable(root)
    index = repository.index(root)
    content = repository.derived(
        repository.entries(root), index.url, index.title
    )
    for path, data in content.items():
        assert (root / path).read_bytes() == data, path
    assert list((root / ".staging").iterdir()) == []
    assert {path.name for path in root.glob(".*")} == {".locks", ".staging"}
    left = [
        path
        for path in root.rglob(".*")
        if path.name not in (".locks", ".staging")
    ]
    assert left == []
    for path in root.rglob("*"):
        if path.is_symlink():
            assert path.exists(), f"{path} points nowhere"
    return found


def _die_at(number):
    """Ends this process at that call to the file system, before it."""
    calls = itertools.count()

    def counted(function):
        def call(*arguments, **options):
            if next(calls) == number:
                os._exit(KILLED)
            return function(*arguments, **options)

        return call

    for name in _OS:
        setattr(os, name, counted(getattr(os, name)))
    opened = counted(builtins.open)

    def open_(file, mode="r", *arguments, **options):
        writes = set(mode) & set("wxa+")
        function = opened if writes else plain
        return function(file, mode, *arguments, **options)

    plain, builtins.open = builtins.open, open_


def _forked(work):
    """The process id of a fork of this process that does some work."""
    process = os.fork()
    if process:
        return process
    code = 1
    try:
        code = work()
    finally:
        sys.stdout.flush()
        os._exit(code)


def crash(directory):
    """Prints how many publications were killed before one got through."""
    start = directory / "start"
    publish(start, f"{MODEL}/1")

    def work(root):
        publish(root, MODEL)

    _crash(directory, work, start)


def crash_site(directory, root):
    """Prints how many copies of a repository were killed."""
    _crash(directory, lambda out: site.site(root, out))


def _crash(directory, work, start=None):
    for number in itertools.count():
        path = directory / str(number)
        if start is not None:
            shutil.copytree(start, path, symlinks=True)

        def doomed(path=path, number=number):
            _die_at(number)
            work(path)
            return 0

        _, status = os.waitpid(_forked(doomed), 0)
        code = os.waitstatus_to_exitcode(status)
        if code != KILLED:
            assert code == 0, code
            print(number)
            return


def race(directory, count):
    """Prints what became of each of the publishers, a line each."""
    reading, writing = os.pipe()

    def work():
        os.close(writing)
        os.read(reading, 1)
        try:
            publish(directory, f"{MODEL}/7")
            print("won", flush=True)
        except errors.ExportError as error:
            print(f"lost: {error}", flush=True)
        return 0

    processes = [_forked(work) for _ in range(int(count))]
    os.close(reading)
    os.close(writing)
    for process in processes:
        os.waitpid(process, 0)


def main(kind, directory, *arguments):
    kinds = {"crash": crash, "crash_site": crash_site, "race": race}
    with pytest.MonkeyPatch.context() as monkeypatch:
        patch(monkeypatch)
        patch_pages(monkeypatch)
        kinds[kind](pathlib.Path(directory), *arguments)


if __name__ == "__main__":
    main(*sys.argv[1:])
