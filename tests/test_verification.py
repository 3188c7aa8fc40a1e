import contextlib
import dataclasses
import gzip
import io
import json
import os
import shutil
import socket
import tarfile
import tempfile

import file_server
import pytest
import test_operations

from bit_tf import archive, errors, files, handles, labels
from hub_export import card as cards
from hub_export import (
    documentation,
    entry,
    golden,
    graph,
    pages,
    repository,
    site,
    tree,
    verification,
)

HANDLE = handles.Handle.parse("google/bit/testing/ilsvrc2012_classification/1")


@pytest.fixture(scope="module")
def published(small_export, tmp_path_factory):
    """(root of a repository of one version, its entry, its report)."""
    root = tmp_path_factory.mktemp("repository")
    folder = tree.directory(root, HANDLE)
    model = folder / handles.MODEL_FOLDER
    shutil.copytree(small_export, model)
    publication = entry.Publication(HANDLE, "A test.", "apache-2.0")
    publication.save(model)
    report = verification.check_model(model)
    assert report.ok, report.table()
    card, provenance = cards.read(model)
    size, sha256 = archive.pack(model, folder / tree.ARCHIVE_FILE)
    name = f"{HANDLE}{handles.ARCHIVE_SUFFIX}"
    one = entry.Entry(
        publication,
        cards.Card.from_dict(card),
        cards.Provenance.from_dict(provenance),
        report.graph,
        handles.File(name, size, sha256),
        tuple(
            handles.File(
                path.relative_to(model).as_posix(),
                *files.measure(path),
            )
            for path in sorted(model.rglob("*"))
            if path.is_file()
        ),
        "2026-11-21T18:00:00Z",
    )
    one = describe(root, one)
    return root, one, report


def describe(root, one):
    """Writes all that is made from an entry."""
    folder = tree.directory(root, one.handle)
    classes = labels.read_saved_model(folder / handles.MODEL_FOLDER)
    written = pages.version_files(one, classes)
    one = one.with_pages(written)
    (folder / handles.ENTRY_FILE).write_text(one.to_json())
    for name, content in written.items():
        (folder / name).write_bytes(content)
    for name, content in repository.derived([one], None, "Models").items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    public = tree.archive(root, one.handle)
    if not os.path.lexists(public):
        public.symlink_to(f"{one.handle.version}/{tree.ARCHIVE_FILE}")
    return one


@pytest.fixture
def root(published, tmp_path):
    """A copy to damage."""
    copy = tmp_path / "copy"
    shutil.copytree(published[0], copy, symlinks=True)
    return copy


@pytest.fixture
def folder(root):
    return tree.directory(root, HANDLE)


@pytest.fixture
def examined(published, monkeypatch):
    """Takes the undamaged model's report for what a fresh process finds."""
    _, _, report = published
    checks = tuple(c for c in report.checks if c.name in graph.CHECKS)
    asked = []

    def examine(directory):
        asked.append(directory)
        return report.graph, checks

    monkeypatch.setattr(graph, "examine", examine)
    return asked


def statuses(report):
    return {check.name: check.status for check in report.checks}


def failed(report):
    return {c.name: c.detail for c in report.checks if c.status == "failed"}


def details(report):
    return {check.name: check.detail for check in report.checks}


def test_a_good_model(published):
    *_, report = published
    assert tuple(check.name for check in report.checks) == verification.CHECKS
    assert statuses(report) == {
        "hash": "absent",
        "files": "passed",
        "operations": "passed",
        "interface": "passed",
        "gradient": "passed",
        "golden": "passed",
        "card": "passed",
        "page": "absent",
    }
    found = report.graph
    assert found.dtypes == ("float32", "uint8")
    assert found.input_shape == (None, None, None, 3)
    assert found.outputs == found.labels == 10
    assert found.variables == found.trainable_variables == 45
    assert found.params == 2017578
    assert found.regularization_losses == 18
    assert found.signatures["image_classification"] == {
        "logits": (None, 10),
        "probabilities": (None, 10),
    }
    assert found.endpoints["pre_logits"] == (None, 1024)
    assert found.relative_error <= found.tolerance == 5e-4
    assert "45 variables, 45 trainable" in report.table()
    assert json.loads(json.dumps(report.to_dict()))["graph"]["outputs"] == 10


def test_a_good_version_and_repository(published, examined):
    root, _, _ = published
    whole, report = verification.verify(root)
    assert whole.ok, whole.table()
    names = tuple(check.name for check in whole.checks)
    assert names == verification.REPOSITORY_CHECKS
    assert report.ok, report.table()
    assert set(statuses(report).values()) == {"passed"}
    assert len(examined) == 1
    folder = tree.directory(root, HANDLE)
    for target in (folder, folder.parent):
        (again,) = verification.verify(target)
        assert again.checks == report.checks


def test_a_public_archive(published, examined):
    root, one, _ = published
    public = tree.archive(root, HANDLE)
    for target in (
        public,
        public.resolve(),
        f"file://{public}",
        os.fsencode(public),
    ):
        (report,) = verification.verify(target)
        assert report.ok, report.table()
        assert details(report)["hash"].startswith(
            f"archive {one.archive.sha256}"
        )
        assert statuses(report)["page"] == "absent"


def test_quick_loads_nothing(published, examined):
    _, report = verification.verify(published[0], quick=True)
    assert report.ok
    assert examined == []
    assert [c.name for c in report.checks if c.status == "absent"] == [
        "interface",
        "gradient",
        "golden",
        "card",
    ]


# --- damage of a SavedModel's directory


def flip(path, place=0.5):
    content = bytearray(path.read_bytes())
    content[int(place * len(content))] ^= 1
    path.write_bytes(content)


def rewrite(path, **values):
    found = json.loads(path.read_text())
    path.write_text(json.dumps({**found, **values}))


def data(model):
    return model / "variables" / "variables.data-00000-of-00001"


DAMAGE = {
    "variables": (lambda model: flip(data(model)), {"hash"}),
    "golden values": (lambda model: flip(model / golden.FILE), {"hash"}),
    "cut": (lambda model: os.truncate(data(model), 1000), {"hash"}),
    "label": (lambda model: flip(model / "assets/labels.txt"), {"hash"}),
    "missing label": (
        lambda model: (model / "assets/labels.txt").unlink(),
        {"hash"},
    ),
    "no index": (
        lambda model: (model / "variables/variables.index").unlink(),
        {"files", "hash"},
    ),
    "no graph": (
        lambda model: (model / "saved_model.pb").unlink(),
        {"files", "hash", "operations"},
    ),
    "extra asset": (
        lambda model: (model / "assets/more.txt").write_text(""),
        {"hash"},
    ),
    "extra file": (
        lambda model: (model / "notes.txt").write_text(""),
        {"files"},
    ),
    "extra folder": (lambda model: (model / "notes").mkdir(), {"files"}),
    "dot file": (
        lambda model: (model / "assets/.hidden").write_text(""),
        {"files"},
    ),
    "dot folder": (lambda model: (model / ".git").mkdir(), {"files"}),
    "control characters": (
        lambda model: (model / "assets/a\x1b[2Jb").write_text(""),
        {"files"},
    ),
    "link": (
        lambda model: (model / "assets/link").symlink_to("labels.txt"),
        {"files"},
    ),
    "pipe": (
        lambda model: os.mkfifo(model / "assets/pipe"),
        {"files", "operations"},
    ),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_found_where_it_is(folder, name):
    damage, checks = DAMAGE[name]
    damage(folder / handles.MODEL_FOLDER)
    (report,) = verification.verify(folder, quick=True)
    wrong = failed(report)
    rest = {"interface", "gradient", "golden", "card"} if name == "pipe" else ()
    assert set(wrong) == checks | set(rest), report.table()
    assert not report.ok
    assert "\x1b" not in report.table()


def test_links_to_what_never_ends(folder):
    model = folder / handles.MODEL_FOLDER
    (model / cards.CARD_FILE).unlink()
    (model / cards.CARD_FILE).symlink_to("/dev/zero")
    report = verification.check_model(model)
    assert "'assets.extra/card.json' is a link" in failed(report)["files"]
    assert "not read" in failed(report)["operations"]


def test_a_socket_is_not_opened(folder):
    with contextlib.closing(socket.socket(socket.AF_UNIX)) as listener:
        # Addresses of sockets are short.
        before = os.getcwd()
        os.chdir(folder / handles.MODEL_FOLDER)
        try:
            (folder / handles.MODEL_FOLDER / "saved_model.pb").unlink()
            listener.bind("saved_model.pb")
        finally:
            os.chdir(before)
        report = verification.check_model(folder / handles.MODEL_FOLDER)
    assert "not read" in failed(report)["operations"]


CARD_CHANGES = [
    ({"num_classes": 11}, "11"),
    ({"params": 1}, "params"),
    ({"feature_dim": 2048}, "feature_dim"),
    ({"task": "image-feature-vector"}, "task"),
    ({"labels": None}, "labels"),
    ({"input": "float32 [n, 224, 224, 3]"}, "input"),
    ({"num_classes": "10"}, "num_classes must be int"),
    ({"more": 1}, "cannot be read (TypeError"),
]


@pytest.mark.parametrize(("values", "text"), CARD_CHANGES)
def test_a_card_that_is_not_true(folder, examined, values, text):
    model = folder / handles.MODEL_FOLDER
    rewrite(model / cards.CARD_FILE, **values)
    report = verification.check_model(model)
    assert set(failed(report)) == {"card"}, report.table()
    assert text in failed(report)["card"]


@pytest.mark.parametrize(
    ("file", "values", "what"),
    [
        (cards.CARD_FILE, {"citations": ["no"]}, "card"),
        (cards.PROVENANCE_FILE, {"source": "other.npz"}, "provenance"),
        (entry.PUBLICATION_FILE, {"license": "mit"}, "publication"),
        (entry.PUBLICATION_FILE, {"version": 2}, "publication"),
    ],
)
def test_an_entry_of_another_card(
    published, folder, examined, file, values, what
):
    _, one, _ = published
    model = folder / handles.MODEL_FOLDER
    rewrite(model / file, **values)
    report = verification.check_model(model, description=one)
    assert set(failed(report)) == {"card", "hash"}
    assert (
        failed(report)["card"] == f"the entry's {what} is not the SavedModel's"
    )


@pytest.mark.parametrize(
    "file", [cards.CARD_FILE, cards.PROVENANCE_FILE, entry.PUBLICATION_FILE]
)
@pytest.mark.parametrize(
    "content", ["", "[]", '{"more": 1}', "[" * 10**5, None]
)
def test_descriptions_that_cannot_be_read(
    published, folder, examined, file, content
):
    model = folder / handles.MODEL_FOLDER
    if content is None:
        (model / file).unlink()
    else:
        (model / file).write_text(content)
    report = verification.check_model(model, description=published[1])
    assert set(failed(report)) == {"card", "hash"}, report.table()
    assert str(file) in failed(report)["card"]


def test_a_graph_of_another_entry(published, folder, examined):
    _, one, _ = published
    other = dataclasses.replace(one.graph, params=7, labels=9)
    description = dataclasses.replace(one, graph=other)
    report = verification.check_model(
        folder / handles.MODEL_FOLDER, description=description
    )
    assert failed(report) == {
        "card": "the entry says labels 9, the graph has 10; "
        f"the entry says params 7, the graph has {one.graph.params}"
    }


def test_labels_that_do_not_fit(folder, examined):
    model = folder / handles.MODEL_FOLDER
    (model / "assets/wordnet_ids.txt").write_text("n1\n")
    assert set(failed(verification.check_model(model))) == {"card"}


def test_a_model_that_does_something_else_is_not_loaded(tmp_path, examined):
    import tensorflow as tf

    evil = tmp_path / "evil"

    def deed(images):
        tf.io.write_file(str(evil), "text")
        return images

    tf.saved_model.save(test_operations.Model(deed), tmp_path / "model")
    report = verification.check_model(tmp_path / "model")
    assert failed(report) == {
        "operations": "WriteFile reads or writes files",
        "interface": "not loaded",
        "gradient": "not loaded",
        "golden": "not loaded",
        "card": "not loaded",
    }
    assert examined == []
    assert not evil.exists()


def test_modules_of_tensorflow_1(folder, examined):
    model = folder / handles.MODEL_FOLDER
    (model / "tfhub_module.pb").write_bytes(b"\x08\x03")
    report = verification.check_model(model)
    assert set(failed(report)) == {"interface", "gradient", "golden"}
    assert "TensorFlow 1" in failed(report)["interface"]
    assert examined == []


def test_a_model_of_elsewhere(folder, examined):
    """Without a card, and with files of its own."""
    model = folder / handles.MODEL_FOLDER
    shutil.rmtree(model / "assets.extra")
    (model / "assets" / "more").mkdir()
    (model / "assets" / "more" / "words.txt").write_text("")
    report = verification.check_model(model)
    assert report.ok
    assert details(report)["card"] == "no card"
    assert details(report)["hash"] == "no index entry"


@pytest.mark.slow(reason="Run with: pytest -m slow")
def test_damage_that_a_fresh_process_finds(folder):
    model = folder / handles.MODEL_FOLDER
    data(model).write_bytes(data(model).read_bytes()[::-1])
    report = verification.check_model(model)
    wrong = failed(report)
    assert set(wrong) == {"interface", "gradient", "golden"}
    assert "could not be loaded" in wrong["interface"]
    assert wrong["gradient"] == wrong["golden"] == "not reached"


@pytest.mark.slow(reason="Run with: pytest -m slow")
def test_golden_values_of_another_model(folder):
    model = folder / handles.MODEL_FOLDER
    values = golden.read(model)._asdict()
    golden.save({**values, "output": values["output"] * 1.01}, model)
    report = verification.check_model(model)
    assert set(failed(report)) == {"golden"}
    assert "relative error of" in failed(report)["golden"]
    flip(model / golden.FILE)
    report = verification.check_model(model)
    assert set(failed(report)) == {"golden"}
    assert "Golden values are an .npz archive" in failed(report)["golden"]


def test_golden_values_that_are_none(small_export, tmp_path):
    path = tmp_path / golden.FILE
    path.parent.mkdir()
    assert golden.read(tmp_path) is None
    good = golden.read(small_export)._asdict()
    import numpy as np

    for change in (
        {"images": good["images"].astype(np.float32)},
        {"images": good["images"][..., :2]},
        {"output": good["output"].astype(np.complex64)},
        {"features": good["features"][0]},
        {"tolerance": np.float32(np.inf)},
        {"tolerance": np.float32(np.nan)},
        {"tolerance": np.zeros(2)},
        {"features": np.asarray([{}], object)},
    ):
        golden.save({**good, **change}, tmp_path)
        with pytest.raises(errors.VerificationError, match=r"golden\.npz"):
            golden.read(tmp_path)
    content = (small_export / golden.FILE).read_bytes()
    for damaged in (b"", b"text", content[:1000], content[:-30]):
        path.write_bytes(damaged)
        with pytest.raises(errors.VerificationError, match=r"golden\.npz"):
            golden.read(tmp_path)


# --- damage of a version and of a repository


def replace(folder, old, new):
    path = folder / tree.CARD_FILE
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


VERSION_DAMAGE = {
    "archive": (lambda f: flip(f / tree.ARCHIVE_FILE, 0.999), "hash"),
    "no archive": (lambda f: (f / tree.ARCHIVE_FILE).unlink(), "hash"),
    "entry": (lambda f: (f / handles.ENTRY_FILE).write_text("{}"), "hash"),
    "types in the entry": (
        lambda f: rewrite(f / handles.ENTRY_FILE, description=5),
        "hash",
    ),
    "card": (lambda f: (f / tree.CARD_FILE).write_text("# Text"), "page"),
    "another task": (
        lambda f: replace(
            f, "task: image-classification", "task: image-feature-vector"
        ),
        "page",
    ),
    "another archive": (
        lambda f: replace(f, "/1.tar.gz -->", "/2.tar.gz -->"),
        "page",
    ),
    "another licence": (
        lambda f: replace(f, "license: apache-2.0", "license: mit"),
        "page",
    ),
    "no card": (lambda f: (f / tree.CARD_FILE).unlink(), "page"),
    "no page": (lambda f: (f / tree.PAGE_FILE).unlink(), "page"),
    "empty page": (lambda f: (f / tree.PAGE_FILE).write_text(""), "page"),
}


@pytest.mark.parametrize("name", VERSION_DAMAGE)
def test_damage_of_a_version(folder, name):
    damage, check = VERSION_DAMAGE[name]
    damage(folder)
    (report,) = verification.verify(folder, quick=True)
    assert check in failed(report), report.table()
    assert failed(report).keys() <= {check, "files", "page"}


def test_an_archive_of_other_files(published, folder):
    """Its entry knows the archive, and not what is in it."""
    _, one, _ = published
    model = folder / handles.MODEL_FOLDER
    text = (model / "assets/labels.txt").read_text()
    (model / "assets/labels.txt").write_text(text.upper())
    size, sha256 = archive.pack(model, folder / tree.ARCHIVE_FILE)
    (model / "assets/labels.txt").write_text(text)
    file = handles.File(one.archive.path, size, sha256)
    one = dataclasses.replace(one, archive=file)
    (folder / handles.ENTRY_FILE).write_text(one.to_json())
    (report,) = verification.verify(folder, quick=True)
    assert failed(report)["hash"] == (
        "in the archive 'assets/labels.txt' has another SHA-256 than its "
        "entry says"
    )


def test_a_version_without_an_unpacked_model(folder, examined):
    shutil.rmtree(folder / handles.MODEL_FOLDER)
    (report,) = verification.verify(folder)
    assert failed(report) == {"hash": "model/ is missing"}
    assert len(examined) == 1


def test_a_version_whose_model_is_a_link(folder, tmp_path, examined):
    model = folder / handles.MODEL_FOLDER
    model.rename(tmp_path / "elsewhere")
    model.symlink_to(tmp_path / "elsewhere")
    (report,) = verification.verify(folder)
    assert failed(report) == {"files": "'model' is a link"}
    assert str(tmp_path / "elsewhere") not in examined


FOLDER_DAMAGE = {
    "file": (lambda f: (f / "notes.txt").write_text(""), "'notes.txt' is no"),
    "dot file": (lambda f: (f / ".hidden").write_text(""), "'.hidden' is no"),
    "version": (
        lambda f: shutil.copytree(f, f / "2", symlinks=True),
        "'2' is no part of a version",
    ),
    "private folder": (
        lambda f: os.chmod(f / "model/assets", 0o700),
        "'model/assets' has the mode 0700",
    ),
    "private variables": (
        lambda f: os.chmod(data(f / "model"), 0o600),
        "'model/variables/variables.data-00000-of-00001' has the mode 0600",
    ),
    "private page": (
        lambda f: os.chmod(f / tree.PAGE_FILE, 0o640),
        "'index.html' has the mode 0640",
    ),
}


@pytest.mark.parametrize("name", FOLDER_DAMAGE)
def test_what_a_versions_folder_must_not_have(root, folder, name):
    damage, problem = FOLDER_DAMAGE[name]
    damage(folder)
    whole, report = verification.verify(root, quick=True)
    assert whole.ok, whole.table()
    assert set(failed(report)) == {"files"}
    assert failed(report)["files"].startswith(problem)


def test_a_card_that_leads_to_another_host(folder):
    path = folder / tree.CARD_FILE
    path.write_text(path.read_text().replace("//", "//evil.example.org/"))
    assert "evil" in path.read_text()
    (report,) = verification.verify(folder, quick=True)
    assert failed(report) == {
        "page": "card.md is not the one that was published"
    }


@pytest.mark.parametrize("name", [tree.PAGE_FILE, tree.CARD_FILE])
@pytest.mark.parametrize("more", ["\n", ""])
def test_a_page_that_was_changed(folder, name, more):
    path = folder / name
    text = path.read_text()
    assert "A test." in text
    path.write_text(text.replace("A test.", "A tEst.") + more)
    (report,) = verification.verify(folder, quick=True)
    assert f"{name} is not the one" in failed(report)["page"]


@pytest.mark.parametrize("name", [tree.PAGE_FILE, tree.CARD_FILE])
@pytest.mark.parametrize("kind", ["pipe", "link", "endless link", "large"])
def test_a_page_that_is_no_page(folder, name, kind, tmp_path):
    path = folder / name
    if kind == "large":
        os.truncate(path, 2**40)
    elif kind == "link":
        path.rename(tmp_path / name)
        path.symlink_to(tmp_path / name)
    else:
        path.unlink()
        os.mkfifo(path) if kind == "pipe" else path.symlink_to("/dev/zero")
    (report,) = verification.verify(folder, quick=True)
    why = "the limit" if kind == "large" else "no regular file"
    assert why in failed(report)["page"]


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda rows: rows.clear(), "the entry has no hash of card.md"),
        (
            lambda rows: rows.append({**rows[0], "path": "other.html"}),
            "other.html is in the entry, and no page of a version",
        ),
    ],
)
def test_an_entry_of_other_pages(folder, change, problem):
    path = folder / handles.ENTRY_FILE
    found = json.loads(path.read_text())
    change(found["pages"])
    path.write_text(json.dumps(found))
    (report,) = verification.verify(folder, quick=True)
    assert set(failed(report)) == {"page"}
    assert problem in failed(report)["page"]


def test_a_site_for_static_hosts(root, tmp_path):
    """It has an archive under its public name only."""
    site.site(root, tmp_path / "site")
    for report in verification.verify(tmp_path / "site", quick=True):
        assert report.ok, report.table()
    public = tree.archive(tmp_path / "site", HANDLE)
    os.truncate(public, 1000)
    _, report = verification.verify(tmp_path / "site", quick=True)
    assert {"hash", "files"} <= failed(report).keys()


def republish(folder):
    """Has the entry tell the hashes of the page and card that are there."""
    path = folder / handles.ENTRY_FILE
    one = entry.Entry.parse(path.read_text())
    names = (tree.PAGE_FILE, tree.CARD_FILE)
    one = one.with_pages({name: (folder / name).read_bytes() for name in names})
    path.write_text(one.to_json())


def test_a_card_with_an_address(published, folder):
    _, one, _ = published
    text = documentation.model_page(one, "https://models.example.org/hub")
    (folder / tree.CARD_FILE).write_text(text)
    republish(folder)
    (report,) = verification.verify(folder, quick=True)
    assert report.ok, report.table()


def test_a_card_in_the_words_of_another_release(folder):
    replace(folder, "## Overview", "## Overview of it\n\nOther words.")
    republish(folder)
    (report,) = verification.verify(folder, quick=True)
    assert report.ok, report.table()


def test_a_card_that_was_published_with_other_tags(folder):
    replace(folder, "license: apache-2.0", "license: mit")
    republish(folder)
    (report,) = verification.verify(folder, quick=True)
    assert "the tag license: mit is not" in failed(report)["page"]


def index_rows(root, change):
    path = root / handles.INDEX_FILE
    found = json.loads(path.read_text())
    change(found["entries"])
    path.write_text(json.dumps(found))


def relink(root, target):
    public = tree.archive(root, HANDLE)
    public.unlink()
    public.symlink_to(target)


ROOT_DAMAGE = {
    "unlisted": (lambda r: index_rows(r, list.clear), "index"),
    "another entry": (
        lambda r: index_rows(r, lambda rows: rows[0].update(description="B")),
        "index",
    ),
    "listed, not there": (
        lambda r: index_rows(
            r, lambda rows: rows.append({**rows[0], "version": 2})
        ),
        "index",
    ),
    "listed, damaged": (
        lambda r: index_rows(r, lambda rows: rows.append({})),
        "index",
    ),
    "archive out of the tree": (
        lambda r: relink(
            r, shutil.copy(tree.archive(r, HANDLE), r.with_name("outside"))
        ),
        "archives",
    ),
    "no archive": (lambda r: tree.archive(r, HANDLE).unlink(), "archives"),
    "loop": (lambda r: relink(r, "1.tar.gz"), "archives"),
    "newest entry": (
        lambda r: (
            tree.directory(r, HANDLE.at(None)) / handles.ENTRY_FILE
        ).write_text("{}"),
        "entries",
    ),
    "front page": (lambda r: (r / "index.html").unlink(), "pages"),
    "collection": (
        lambda r: (r / "google/bit/index.html").write_text("other"),
        "pages",
    ),
    "stray file": (lambda r: (r / "google/a").write_text(""), "tree"),
    "stray folder": (lambda r: (r / "backup").mkdir(), "tree"),
    "stray style": (lambda r: (r / "assets/a.css").write_text(""), "tree"),
    "hidden name": (lambda r: (r / "google/.git").mkdir(), "tree"),
    "no version": (
        lambda r: (tree.directory(r, HANDLE.at(2)) / "model").mkdir(
            parents=True
        ),
        "tree",
    ),
    "archive of no version": (
        lambda r: tree.archive(r, HANDLE.at(2)).write_text(""),
        "tree",
    ),
    "link of no version": (
        lambda r: tree.archive(r, HANDLE.at(2)).symlink_to("1/model.tar.gz"),
        "tree",
    ),
    "front page elsewhere": (
        lambda r: (
            (r / "index.html").rename(r.with_name("outside")),
            (r / "index.html").symlink_to(r.with_name("outside")),
        ),
        "tree",
    ),
    "version elsewhere": (
        lambda r: (
            tree.directory(r, HANDLE).rename(r.with_name("outside")),
            tree.directory(r, HANDLE).symlink_to(r.with_name("outside")),
            relink(r, "1/model.tar.gz"),
        ),
        "tree archives",
    ),
    "private folder": (lambda r: os.chmod(r / "google/bit", 0o700), "tree"),
    "private page": (lambda r: os.chmod(r / "index.html", 0o600), "tree"),
}


@pytest.mark.parametrize("name", ROOT_DAMAGE)
def test_damage_of_a_repository(root, name):
    damage, check = ROOT_DAMAGE[name]
    damage(root)
    whole, report = verification.verify(root, quick=True)
    assert set(failed(whole)) == {*check.split()}, whole.table()
    assert report.ok


def test_what_is_in_the_tree_is_named(root):
    tree.directory(root, HANDLE.at(2)).mkdir()
    (root / "backup").mkdir()
    (root / "backup" / "file").write_text("")
    os.chmod(root / "assets", 0o700)
    whole, _ = verification.verify(root, quick=True)
    assert failed(whole) == {
        "tree": "'assets' has the mode 0700, which keeps web servers out; "
        "chmod -R a+rX; 'backup' belongs to no version; remove it; "
        f"'{HANDLE.at(2)}' is no version: it has no entry.json"
    }


def test_types_in_an_entry(root, folder):
    rewrite(folder / handles.ENTRY_FILE, description=5)
    whole, report = verification.verify(root, quick=True)
    assert "description must be str" in failed(whole)["entries"]
    assert "hash" in failed(report)


def test_a_model_without_versions(root, folder):
    shutil.rmtree(folder)
    with pytest.raises(errors.HandleError, match="which has none"):
        verification.verify(folder.parent)


def test_a_damaged_index(root):
    (root / handles.INDEX_FILE).write_text("[]")
    whole, report = verification.verify(root, quick=True)
    assert {"index", "pages"} == set(failed(whole))
    assert report.ok


def test_a_damaged_version_does_not_hide_others(root):
    second = tree.directory(root, HANDLE.at(2))
    shutil.copytree(tree.directory(root, HANDLE), second)
    whole, first, other = verification.verify(root, quick=True)
    assert "entries" in failed(whole)
    assert first.ok
    assert other.target == str(second)


def test_what_publishers_left(root):
    (root / ".staging" / "one").mkdir(parents=True)
    (root / "google" / f".index.html.{'0' * 16}.tmp").write_text("")
    tree.archive(root, HANDLE.at(2)).symlink_to("2/model.tar.gz")
    whole, _ = verification.verify(root, quick=True)
    assert whole.ok, whole.table()
    assert "3 left by publishers" in details(whole)["staging"]


# --- archives


def tarred(path, members, mode="w:gz", **options):
    """An archive of (name or TarInfo, bytes)."""
    with tarfile.open(path, mode, **options) as file:
        for member, content in members:
            if isinstance(member, str):
                member = tarfile.TarInfo(member)
            member.size = len(content)
            file.addfile(member, io.BytesIO(content))
    return path


def member(name, type_=tarfile.REGTYPE, linkname="", **fields):
    found = tarfile.TarInfo(name)
    found.type, found.linkname = type_, linkname
    for field, value in fields.items():
        setattr(found, field, value)
    return found


def folder_of(name):
    return member(name, tarfile.DIRTYPE), b""


GRAPH = ("saved_model.pb", b"graph")
HOSTILE = {
    "traversal": [("../evil", b""), GRAPH],
    "traversal inside": [("assets/../../evil", b""), GRAPH],
    "absolute": [("/tmp/evil", b""), GRAPH],
    "link": [(member("assets", tarfile.SYMTYPE, "/"), b""), GRAPH],
    "through a link": [
        (member("assets", tarfile.SYMTYPE, ".."), b""),
        ("assets/evil", b""),
        GRAPH,
    ],
    "hard link": [(member("assets", tarfile.LNKTYPE, "/etc/passwd"), b"")],
    "device": [(member("assets", tarfile.CHRTYPE, devmajor=1), b"")],
    "pipe": [(member("saved_model.pb", tarfile.FIFOTYPE), b"")],
    "file before its folder": [("assets/labels.txt", b""), GRAPH],
    "twice": [GRAPH, GRAPH],
    "twice by another name": [GRAPH, ("./saved_model.pb", b"other")],
    "dot name": [GRAPH, (".hidden", b"")],
    "dot folder": [GRAPH, folder_of(".git"), (".git/config", b"")],
    "control characters": [GRAPH, ("evil\x1b]0;title\x07", b"")],
    "another file": [GRAPH, ("setup.py", b"")],
    "file as a folder": [("assets", b""), ("assets/labels.txt", b""), GRAPH],
    "sparse": [
        (
            member(
                "saved_model.pb",
                pax_headers={
                    "GNU.sparse.map": "0,1",
                    "GNU.sparse.size": "2",
                    "GNU.sparse.numblocks": "1",
                },
            ),
            b"x",
        )
    ],
    "nothing": [],
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_archives_are_refused(tmp_path, name):
    path = tmp_path / "in" / "model.tar.gz"
    path.parent.mkdir()
    tarred(path, HOSTILE[name])
    (report,) = verification.verify(path)
    assert "files" in failed(report), report.table()
    assert not report.ok
    assert "\x1b" not in report.table()
    assert os.listdir(tmp_path) == ["in"]
    assert os.listdir(path.parent) == ["model.tar.gz"]


def header_of(size):
    """A member's header alone, which claims to have a large extension."""
    found = member("long", tarfile.XHDTYPE)
    found.size = size
    return found.tobuf(tarfile.USTAR_FORMAT)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"text",
        gzip.compress(b""),
        gzip.compress(bytes(1024)),
        gzip.compress(header_of(2**31) + bytes(10**6)),
        gzip.compress(member("big").tobuf()[:400]),
    ],
    # gzip has the time in its header, and ids must be the same everywhere.
    ids=["empty", "text", "nothing", "zeros", "a huge name", "cut"],
)
def test_what_is_no_archive(tmp_path, content):
    path = tmp_path / "model.tar.gz"
    path.write_bytes(content)
    (report,) = verification.verify(path)
    assert "files" in failed(report)
    assert failed(report)["interface"] == "not unpacked"
    assert statuses(report)["page"] == "absent"


def test_bombs(tmp_path, monkeypatch):
    limits = {**archive.unpack.__kwdefaults__, "max_members": 20}
    monkeypatch.setattr(archive.unpack, "__kwdefaults__", limits)
    many = [folder_of(f"assets{n}") for n in range(21)]
    (report,) = verification.verify(tarred(tmp_path / "many.tar.gz", many))
    assert "20 members" in failed(report)["files"]
    big = member("saved_model.pb")
    big.size = 2**40
    (tmp_path / "big.tar.gz").write_bytes(gzip.compress(big.tobuf()))
    (report,) = verification.verify(tmp_path / "big.tar.gz")
    assert "bytes. Received more" in failed(report)["files"]


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        (lambda content: content[:-100], "not a whole tar archive"),
        (lambda content: content + b"garbage", "not a whole tar archive"),
        (
            lambda content: content + gzip.compress(b"garbage"),
            "other bytes follow the archive's end",
        ),
    ],
)
def test_damage_of_an_archive(published, tmp_path, damage, problem):
    root, _, _ = published
    content = tree.archive(root, HANDLE).read_bytes()
    path = tmp_path / "model.tar.gz"
    path.write_bytes(content)
    (report,) = verification.verify(path, quick=True)
    assert report.ok
    path.write_bytes(damage(content))
    (report,) = verification.verify(path, quick=True)
    assert problem in failed(report)["files"]


@pytest.mark.parametrize(
    ("target", "why"),
    [
        ("missing", "is not there"),
        ("https:/x", "is not there"),
        ("gs://a/b", "is not there"),
        ("", "is empty"),
        ("file", "is another file"),
        ("folder", "is a directory without index.json, entry.json and saved_"),
    ],
)
def test_what_cannot_be_verified(tmp_path, monkeypatch, target, why):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "index.html").write_text("")
    with pytest.raises(errors.HandleError, match=why) as caught:
        verification.verify(target)
    assert "\n" not in str(caught.value)


def test_a_publisher_is_no_target(root):
    with pytest.raises(errors.HandleError, match="which is a directory"):
        verification.verify(root / "google")


# --- handles


@pytest.fixture
def server(published):
    root, one, _ = published
    with file_server.running() as server:
        content = tree.archive(root, HANDLE).read_bytes()
        for path in (f"/{HANDLE}", f"/{HANDLE}.tar.gz", "/hub/x.tar.gz"):
            server.bodies[path] = content
        server.bodies[f"/{HANDLE}/entry.json"] = one.to_json().encode()
        yield server


@pytest.mark.parametrize("suffix", ["", ".tar.gz"])
def test_a_handle(published, server, examined, tmp_path, suffix, monkeypatch):
    monkeypatch.setenv("TFHUB_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    target = f"{server.url}/{HANDLE}{suffix}"
    (report,) = verification.verify(target.replace("//", "//me:secret@"))
    assert report.ok, report.table()
    assert report.target == target
    assert statuses(report)["hash"] == "passed"
    assert statuses(report)["page"] == "absent"
    assert server.seen[0].target.endswith("?tf-hub-format=compressed")
    assert os.listdir(tmp_path) == []


def test_a_handle_without_an_entry(server, examined):
    (report,) = verification.verify(f"{server.url}/hub/x.tar.gz")
    assert report.ok
    assert statuses(report)["hash"] == "absent"
    assert details(report)["hash"].startswith("no index entry; SHA-256 ")


def test_a_handle_with_an_entry_of_a_later_schema(server):
    later = json.dumps({"schema": 2}).encode()
    server.bodies[f"/{HANDLE}/entry.json"] = later
    (report,) = verification.verify(f"{server.url}/{HANDLE}", quick=True)
    assert "schema 2" in failed(report)["hash"]


def test_a_handle_with_the_entry_of_another(published, server, examined):
    entry_file = server.bodies[f"/{HANDLE}/entry.json"]
    server.bodies["/hub/x/entry.json"] = entry_file
    (report,) = verification.verify(f"{server.url}/hub/x.tar.gz")
    assert failed(report) == {"card": f"the entry there is that of {HANDLE}"}


def test_a_handle_that_serves_other_bytes(server, tmp_path):
    path = tarred(tmp_path / "x.tar.gz", [GRAPH])
    server.bodies[f"/{HANDLE}"] = path.read_bytes()
    (report,) = verification.verify(f"{server.url}/{HANDLE}", quick=True)
    assert "its entry says" in failed(report)["hash"]


def test_a_handle_that_is_not_there(server):
    with pytest.raises(errors.DownloadError, match="404") as caught:
        verification.verify(f"{server.url}/google/bit/other/1")
    assert "by other means and give its path." in str(caught.value)
    assert tempfile.gettempdir() not in str(caught.value)


def test_a_handle_of_a_host_that_is_not_there(monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    with contextlib.closing(socket.socket()) as silent:
        silent.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{silent.getsockname()[1]}/a/b/1"
        with pytest.raises(errors.DownloadError, match="attempts") as caught:
            verification.verify(address)
    assert "by other means and give its path." in str(caught.value)
    assert tempfile.gettempdir() not in str(caught.value)


# --- the command


def test_the_command(call, published, folder, tmp_path):
    root, _, _ = published
    code, out, _ = call("hub-export", "verify", "--quick", root)
    assert code == 0
    assert "✓ hash" in out
    assert "– interface" in out
    (folder / tree.PAGE_FILE).unlink()
    code, out, err = call(
        "hub-export", "verify", "--quick", "--json", folder, "missing"
    )
    assert code == 1
    found = json.loads(out)
    assert not found["ok"]
    (report,) = found["reports"]
    assert [c["name"] for c in report["checks"] if c["status"] == "failed"] == [
        "page"
    ]
    assert "not there" in found["errors"][0]
    assert "not there" in err
    code, out, _ = call("hub-export", "verify", "--quick", folder)
    assert code == 1
    assert "✗ page" in out
