"""From weights to a version: options, facts, processes, and `publish --all`."""

import hashlib
import json
import os
import pathlib
import random
import re
import shutil
import signal
import subprocess
import sys
import time
import zipfile

import fake_publications as fake
import file_server
import helpers
import pytest

from bit_tf import (
    archive,
    checkpoints,
    errors,
    handles,
    labels,
    variants,
)
from hub_export import (
    card,
    entry,
    publishing,
    random_weights,
    repository,
    saved_model,
    tree,
    verification,
)

MODEL = handles.Handle.parse(fake.MODEL)
CLASSIFIER = handles.Handle.parse(fake.CLASSIFIER)
NAMES = tuple(labels.Label(f"n{i:08}", f"name {i}") for i in range(10))


@pytest.fixture
def faked(monkeypatch):
    fake.patch(monkeypatch)


@pytest.fixture(scope="module")
def published(small_npz, tmp_path_factory):
    """A repository with a classifier, and what was said of its making."""
    root = tmp_path_factory.mktemp("published") / "root"
    said = []
    publishing.publish(
        small_npz,
        root,
        fake.CLASSIFIER,
        class_labels=NAMES,
        l2=1e-4,
        numerics="timm",
        probabilities="sigmoid",
        license="MIT",
        datasets=["digits", "letters", "digits"],
        say=said.append,
    )
    return root, said


def test_a_checkpoint_is_published(published, small_npz):
    root, said = published
    found = tree.read(root, CLASSIFIER.at(1))
    assert found.card.num_classes == found.graph.labels == 10
    assert found.card.probabilities == "sigmoid"
    assert found.card.numerics["name"] == "timm"
    assert found.graph.outputs == 10
    assert found.graph.relative_error <= found.graph.tolerance
    assert found.graph.regularization_losses > 0
    assert found.provenance.source == small_npz.name
    assert found.publication.license == "mit"
    assert found.publication.datasets == ("digits", "letters")
    assert found.publication.description == (
        "Scores of 10 classes for images, from BiT testing, converted from "
        "small.npz."
    )
    assert found.archive.path == f"{fake.CLASSIFIER}/1.tar.gz"
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", found.published)
    assert [line.split()[0] for line in said] == [
        "Making",
        "Packing",
        "Loading",
        "Committing",
    ]
    assert fake.assert_whole(root) == [found.handle]
    model = tree.directory(root, found.handle) / handles.MODEL_FOLDER
    assert labels.read_saved_model(model) == NAMES
    page = (model.parent / tree.PAGE_FILE).read_text("utf-8")
    assert "name 3" in page
    assert published[0].joinpath(f"{fake.CLASSIFIER}/1.tar.gz").is_symlink()


@pytest.mark.slow
def test_what_was_published_verifies(published):
    root, _ = published
    reports = verification.verify(root)
    assert len(reports) == 2
    for report in reports:
        assert report.ok, report.table()


def start_conversion(source, path, seed):
    """A fresh process that exports with the options of `published`.

    Golden values depend on what computes them, in their last digits.
    """
    code = (
        "import sys\n"
        "from bit_tf import labels\n"
        "from hub_export import saved_model\n"
        "names = [labels.Label(f'n{i:08}', f'name {i}') for i in range(10)]\n"
        "saved_model.convert(sys.argv[1], sys.argv[2], class_labels=names,\n"
        "    l2=1e-4, numerics='timm', probabilities='sigmoid', verify=False)\n"
    )
    return subprocess.Popen(
        [sys.executable, "-c", code, os.fspath(source), os.fspath(path)],
        env={
            **os.environ,
            "PYTHONHASHSEED": str(seed),
            "TF_ENABLE_ONEDNN_OPTS": "0",
            "TF_NUM_INTRAOP_THREADS": "1",
        },
        stderr=subprocess.PIPE,
        text=True,
    )


def test_saved_models_are_reproducible(published, small_npz, tmp_path):
    root, _ = published
    first = tree.read(root, CLASSIFIER.at(1))
    with start_conversion(small_npz, tmp_path / "model", 1) as process:
        assert process.wait() == 0, process.stderr.read()
    found = publishing._files(tmp_path / "model")
    changed = {file.path for file in set(first.files) ^ set(found)}
    assert changed == {str(entry.PUBLICATION_FILE)}
    assert "fingerprint.pb" in {file.path for file in found}


@pytest.mark.slow
def test_archives_are_reproducible(small_npz, tmp_path):
    """In fresh processes, and by publications after other work here."""
    packed = set()
    for seed in (1, 2):
        path = tmp_path / str(seed)
        with start_conversion(small_npz, path, seed) as process:
            assert process.wait() == 0, process.stderr.read()
        packed.add(archive.pack(path, tmp_path / f"{seed}.tar.gz"))
    assert len(packed) == 1
    hashes = set()
    for name in ("one", "two"):
        found = publishing.publish(small_npz, tmp_path / name, fake.MODEL)
        hashes.add(found.archive.sha256)
        saved_model.convert(small_npz, tmp_path / f"{name}.model")
    assert len(hashes) == 1


@pytest.mark.slow
@pytest.mark.skipif(
    len(os.sched_getaffinity(0)) < 2,
    reason="needs two cores; then pytest -m slow tests/test_publishing.py",
)
def test_any_number_of_cores_gives_the_same(tmp_path):
    source = tmp_path / "r50x1.npz"
    random_weights.write_checkpoint("R50x1", source)
    job = publishing._Job.of(source, MODEL, None, None, None, {})
    cores = os.sched_getaffinity(0)
    made = []
    for chosen in (cores, {min(cores)}):
        staging = tmp_path / str(len(chosen))
        staging.mkdir()
        os.sched_setaffinity(0, chosen)
        try:
            publishing._make(job, staging)
        finally:
            os.sched_setaffinity(0, cores)
        made.append(publishing._files(staging))
    assert made[0] == made[1]


def test_a_saved_model_is_published_as_it_is(published, tmp_path, monkeypatch):
    """From a directory or an archive; no graph is made anew."""
    root, _ = published
    folder = tree.directory(root, CLASSIFIER.at(1))
    first = tree.read(root, CLASSIFIER.at(1))
    report = verification.Report("as if", (), first.graph)
    monkeypatch.setattr(verification, "check_model", lambda path: report)
    copy = tmp_path / "copy"
    for source in (folder / "model", folder / "model.tar.gz"):
        found = publishing.publish(source, copy, fake.CLASSIFIER)
        changed = {file.path for file in set(first.files) ^ set(found.files)}
        again = found.handle.version == 2
        assert changed == ({str(entry.PUBLICATION_FILE)} if again else set())
        assert (found.archive.sha256 == first.archive.sha256) != again
        assert found.publication.license == "mit"
        assert found.publication.description == first.publication.description
    assert fake.assert_whole(copy) == [CLASSIFIER.at(1), CLASSIFIER.at(2)]


def test_a_versions_folder_is_its_saved_model(published, tmp_path):
    folder = tree.directory(published[0], CLASSIFIER.at(1))
    for source in (folder, str(folder)):
        job = publishing._Job.of(source, MODEL, None, None, None, {})
        assert job.source == folder / handles.MODEL_FOLDER
    cut = tmp_path / "1"
    cut.mkdir()
    (cut / handles.ENTRY_FILE).write_text("{}")
    with pytest.raises(FileNotFoundError, match="model"):
        publishing._Job.of(cut, MODEL, None, None, None, {})


def test_a_penalty_that_is_not_kept_is_said(
    published, features_export, tmp_path
):
    folder = tree.directory(published[0], CLASSIFIER.at(1))
    said = []
    for number, (source, l2) in enumerate(
        [(folder / "model.tar.gz", 0.0), (folder / "model", 1e-4)]
    ):
        notes = publishing._convert(
            tmp_path / str(number),
            source=str(source),
            name=False,
            head=False,
            class_labels=None,
            probabilities=None,
            l2=l2,
            numerics=None,
        )
        said.append(publishing._NO_PENALTY in notes)
    assert said == [True, False]
    assert not publishing._has_penalty(features_export)
    assert not publishing._has_penalty(tmp_path)


@pytest.mark.slow
def test_weights_changed_in_place_are_published_as_a_checkpoint(
    small_export, tmp_path
):
    """The remedy that a failed comparison names."""
    source = tmp_path / "source"
    shutil.copytree(small_export, source)
    shutil.rmtree(source / "assets.extra")
    found = publishing.publish(source, tmp_path / "root", fake.CLASSIFIER)
    assert found.provenance.format == "tf_hub"
    assert found.graph.outputs == 10


@pytest.mark.slow
def test_the_head_of_a_saved_model_is_dropped(small_export, tmp_path):
    found = publishing.publish(small_export, tmp_path / "root", fake.MODEL)
    assert (found.card.num_classes, found.graph.outputs) == (0, 1024)
    assert found.provenance.format == "tf_hub"


def test_a_head_that_is_not_there(tmp_path):
    source = tmp_path / "features.npz"
    checkpoints.write(helpers.random_arrays(*helpers.TESTING), source)
    with pytest.raises(errors.ExportError, match="--head none"):
        publishing._convert(
            tmp_path / "model",
            source=str(source),
            name=True,
            head=True,
            class_labels="auto",
            probabilities=None,
            l2=0.0,
            numerics=None,
        )
    assert list(tmp_path.iterdir()) == [source]


def test_a_link_in_a_saved_model(tmp_path):
    source = tmp_path / "source"
    fake.make_model(source, "fake")
    (source / "variables" / "passwd").symlink_to("/etc/passwd")
    with pytest.raises(errors.ExportError, match="a link"):
        publishing.publish(source, tmp_path / "root", fake.MODEL)
    (source / "variables" / "passwd").unlink()
    (source / ".hidden").write_text("mine")
    with pytest.raises(errors.ArchiveError, match="dot"):
        publishing.publish(source, tmp_path / "root", fake.MODEL)
    assert tree.released(tmp_path / "root") == []


def test_a_model_that_fails_its_check(tmp_path, monkeypatch, faked):
    for name in ("golden", "interface"):
        check = verification.Check(name, "failed", "too far")
        monkeypatch.setattr(
            verification,
            "check_model",
            lambda directory, check=check: verification.Report(
                "m", (check,), None
            ),
        )
        with pytest.raises(errors.VerificationError, match="too far") as caught:
            fake.publish(tmp_path)
        # What was fine-tuned in place is published as a checkpoint.
        told = "remove assets.extra/" in str(caught.value)
        assert told == (name == "golden")
        assert tree.released(tmp_path) == []


def test_a_model_without_golden_values(tmp_path, monkeypatch, faked):
    import dataclasses

    good = fake._check_model

    def without(directory):
        report = good(directory)
        graph = dataclasses.replace(report.graph, relative_error=None)
        return dataclasses.replace(report, graph=graph)

    monkeypatch.setattr(verification, "check_model", without)
    with pytest.raises(errors.VerificationError, match="golden values"):
        fake.publish(tmp_path)


def test_an_archive_that_unpacks_to_something_else(
    tmp_path, monkeypatch, faked
):
    unpack = archive.unpack

    def damaged(path, directory, **options):
        unpack(path, directory, **options)
        (pathlib.Path(directory) / "saved_model.pb").write_bytes(b"other")

    monkeypatch.setattr(archive, "unpack", damaged)
    with pytest.raises(errors.VerificationError, match=r"saved_model\.pb"):
        fake.publish(tmp_path)
    assert tree.released(tmp_path) == []


BAD = {
    "handle": ({"handle": "m-r50x1"}, errors.HandleError, "publisher/name"),
    "publisher": ({"handle": "Big_Co/m"}, errors.HandleError, "publisher"),
    "version": ({"version": 0}, errors.HandleError, "handle"),
    "version of another type": ({"version": "1"}, errors.ExportError, "number"),
    "versions": (
        {"handle": "a/b/2", "version": 1},
        errors.ExportError,
        "the same in the handle",
    ),
    "head": ({"head": "yes"}, errors.ExportError, "'keep' or 'none'"),
    "licence": ({"license": "a\nb"}, errors.ExportError, "licence is one line"),
    "licence's type": ({"license": 1}, errors.ExportError, "licence is one"),
    "long licence": ({"license": "x" * 101}, errors.ExportError, "100 char"),
    "data set": ({"datasets": [""]}, errors.ExportError, "data set is one"),
    "description": ({"description": " "}, errors.ExportError, "description is"),
    "l2": ({"l2": -1.0}, errors.ExportError, "l2 must be"),
    "l2's type": ({"l2": "1"}, errors.ExportError, "l2 must be"),
    "numerics": ({"numerics": "x"}, errors.UnknownNameError, "Numerics"),
    "labels": ({"class_labels": "x"}, errors.UnknownNameError, "Label sets"),
    "a label": ({"class_labels": ["a\tb"]}, errors.ExportError, "one line"),
    "probabilities": ({"probabilities": "x"}, errors.ExportError, "softmax"),
    "option": ({"licence": "mit"}, TypeError, "licence"),
    "source": ({"source": "no-such.npz"}, FileNotFoundError, "no-such"),
    "path": ({"source": pathlib.Path("no-such")}, FileNotFoundError, "no-such"),
    "name": ({"source": "BiT-M-R50x9"}, errors.UnknownNameError, "R50x1"),
}


@pytest.mark.parametrize("name", BAD)
def test_refused_before_anything_is_written(name, tmp_path, small_npz):
    options, kind, text = BAD[name]
    options = {"source": small_npz, "handle": fake.MODEL, **options}
    with pytest.raises(kind, match=text):
        publishing.publish(repository=tmp_path / "root", **options)
    assert not (tmp_path / "root").exists()


def test_errors_of_the_fresh_process_come_back(tmp_path):
    source = tmp_path / "broken.npz"
    source.write_bytes(b"PK nothing")
    with pytest.raises(errors.CheckpointFormatError) as caught:
        publishing.publish(source, tmp_path / "root", fake.MODEL)
    assert str(source) in str(caught.value)
    assert tree.released(tmp_path / "root") == []
    assert list((tmp_path / "root" / ".staging").iterdir()) == []


def test_exceptions_there_and_back():
    for error in (
        errors.DownloadError("one: two"),
        errors.VerificationError("a\nb"),
        FileNotFoundError(2, "No such file", pathlib.Path("x")),
        OSError("plain"),
        MemoryError("much"),
    ):
        back = publishing._error(
            **json.loads(json.dumps(publishing._told(error)))
        )
        assert type(back) is type(error)
        assert str(back).replace("PosixPath('x')", "'x'") == str(error).replace(
            "PosixPath('x')", "'x'"
        )


def test_the_facts_of_published_weights(tmp_path, monkeypatch, faked):
    made = fake._make

    def named(name):
        def make(job, staging):
            made(job, staging)
            path = staging / "model" / card.PROVENANCE_FILE
            found = json.loads(path.read_text()) | {"name": name}
            path.write_text(json.dumps(found))
            return []

        return make

    expected = {
        "BiT-M-R50x1": ("apache-2.0", ["imagenet-21k"]),
        "BiT-S-R50x1": ("apache-2.0", ["imagenet-ilsvrc-2012-cls"]),
        "BiT-M-R50x1-ILSVRC2012": (
            "apache-2.0",
            ["imagenet-21k", "imagenet-ilsvrc-2012-cls"],
        ),
        "distill/R50x1_224": ("apache-2.0", ["imagenet-ilsvrc-2012-cls"]),
        "google/bit-50": (None, ["imagenet-ilsvrc-2012-cls"]),
        "unknown": (None, []),
    }
    for name, (license, datasets) in expected.items():
        monkeypatch.setattr(publishing, "_make", named(name))
        found = fake.publish(tmp_path).publication
        assert (found.license, list(found.datasets)) == (license, datasets)
        assert f"converted from {name}." in found.description
    given = fake.publish(tmp_path, license="mit", datasets=[]).publication
    assert (given.license, given.datasets) == ("mit", ())


def test_the_time_of_reproducible_builds(tmp_path, monkeypatch, faked):
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "86400")
    assert fake.publish(tmp_path).published == "1970-01-02T00:00:00Z"
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "soon")
    with pytest.raises(errors.ExportError, match="SOURCE_DATE_EPOCH"):
        fake.publish(tmp_path)


def test_a_plan_lists_what_publish_writes(tmp_path, faked, monkeypatch):
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "86400")
    root = tmp_path / "root"
    for _ in range(2):
        before = fake.snapshot(tmp_path)
        plan = publishing.plan(
            pathlib.Path(__file__), root, fake.MODEL, url="https://x.org"
        )
        assert fake.snapshot(tmp_path) == before
        found = fake.publish(root, url="https://x.org")
        assert plan.entry == found
        after = fake.snapshot(tmp_path)
        written = {
            name.removeprefix("root/")
            for name in after
            if after[name] != before.get(name) and "/.locks/" not in name
        }
        planned = {file.path: file for file in plan.files}
        assert written == planned.keys()
        for path, file in planned.items():
            content = (root / path).read_bytes()
            assert file.size == len(content)
            assert file.sha256 == hashlib.sha256(content).hexdigest()
    with pytest.raises(errors.ExportError, match="immutable"):
        publishing.plan(pathlib.Path(__file__), root, fake.MODEL, version=1)


def test_the_command(call, tmp_path, faked):
    root = tmp_path / "root"
    source = ["publish", __file__, "--repository", root]
    target = ["--handle", fake.MODEL]
    code, out, err = call("hub-export", *source, *target, "--dry-run")
    assert code == 0
    assert not root.exists()
    last = out.splitlines()[-1]
    assert last.startswith(f"{fake.MODEL}/1 would be published")
    assert f"{fake.MODEL}/1/model/saved_model.pb" in out
    names = tmp_path / "names.txt"
    names.write_text("".join(f"{letter}\n" for letter in "abcdefghij"))
    code, out, err = call(
        "hub-export",
        *source,
        *target,
        *("--labels", names, "--license", "MIT", "--dataset", "digits"),
        *("--dataset", "letters", "--title", "Ours", "--url", "https://x.org"),
    )
    assert code == 0, err
    found = tree.read(root, MODEL.at(1))
    assert found.publication.datasets == ("digits", "letters")
    assert repository.index(root).title == "Ours"
    assert f"Published  {fake.MODEL}/1" in out
    assert found.archive.sha256 in out
    assert f'hub.load("https://x.org/{fake.MODEL}/1")' in out
    assert "Committing" in err
    code, out, err = call("hub-export", *source, *target, "--json")
    assert handles.Release.parse(out).handle == MODEL.at(2)
    code, out, err = call("hub-export", *source, *target)
    # The address that the repository was given before.
    assert f'hub.load("https://x.org/{fake.MODEL}/3")' in out
    for text in ("no-such-file", tmp_path, "a\0b"):
        code, out, err = call("hub-export", *source, *target, "--labels", text)
        assert (code, out) == (1, "")
        assert "--labels is auto" in err
    code, out, err = call("hub-export", *source, "--handle", f"{fake.MODEL}/2")
    assert (code, out) == (1, "")
    assert "immutable" in err


@pytest.mark.parametrize(
    "options",
    [
        [],
        ["x.npz"],
        ["--handle", "a/b"],
        ["x.npz", "--all", "M"],
        ["--all", "M", "--handle", "a/b"],
        ["--all", "M", "--head", "none"],
        ["--all", "M", "--dry-run"],
        ["--all", "X"],
        ["x.npz", "--handle", "a/b", "--version", "0"],
        ["x.npz", "--handle", "a/b", "--architecture", "R50x1"],
        ["x.npz", "--refresh"],
        ["--refresh", "--all", "M"],
    ],
)
def test_wrong_usage(call, tmp_path, options):
    root = tmp_path / "root"
    code, out, err = call(
        "hub-export", "publish", "--repository", root, *options
    )
    assert (code, out) == (2, "")
    assert "error:" in err
    assert not root.exists()


def test_refresh(call, tmp_path, small_npz, faked):
    root = tmp_path / "root"
    refresh = ["publish", "--refresh", "--repository", root]
    code, _, err = call("hub-export", *refresh)
    assert (code, root.exists()) == (1, False)
    assert "is refreshed" in err
    # Of a first publication that was stopped.
    (root / ".locks").mkdir(parents=True)
    assert call("hub-export", *refresh, "--title", "Ours")[0] == 0
    assert repository.index(root).title == "Ours"
    publishing.publish(small_npz, root, fake.MODEL)
    page, index = root / "index.html", root / handles.INDEX_FILE
    before = page.read_bytes(), index.read_bytes()
    page.write_text("defaced")
    assert call("hub-export", *refresh)[0] == 0
    assert (page.read_bytes(), index.read_bytes()) == before
    assert call("hub-export", *refresh, "--url", "https://x.org")[0] == 0
    assert repository.index(root).url == "https://x.org"


def test_a_family_goes_on_where_it_stopped(tmp_path, faked, monkeypatch):
    root = tmp_path / "root"
    made = fake._make

    def fail(job, staging):
        if job.source == "BiT-M-R50x3":
            raise errors.DownloadError("as if")
        return made(job, staging)

    monkeypatch.setattr(publishing, "_make", fail)
    with pytest.raises(errors.DownloadError, match="as if"):
        publishing.publish_all("M", root)
    names = [
        f"{fake.MODEL}/1",
        f"{fake.MODEL}/ilsvrc2012_classification/1",
        f"{fake.MODEL}/imagenet21k_classification/1",
    ]
    assert [handle.path for handle in tree.released(root)] == names
    monkeypatch.setattr(publishing, "_make", made)
    said = []
    found = publishing.publish_all("M", root, say=said.append)
    assert sum("there already" in line for line in said) == 3
    known = {
        address.removeprefix(handles.TFHUB)
        for row in variants.list_models("BiT-M-*")
        for address in (row.handle, row.feature_handle)
        if address
    }
    assert {handle.path for handle in tree.released(root)} == known
    assert len(found) == len(known) - 3 == 12
    assert publishing.publish_all("M", root) == []
    small = publishing.publish_all("S", root, architectures=["R101x1"])
    assert [one.handle.path for one in small] == [
        "google/bit/s-r101x1/1",
        "google/bit/s-r101x1/ilsvrc2012_classification/1",
    ]
    for one in small:
        head = one.handle.name.endswith("classification")
        assert bool(one.card.num_classes) == head


@pytest.mark.parametrize(
    ("family", "options", "text"),
    [
        ("L", {}, "Families"),
        ("M", {"architectures": ["R152x2"]}, "architectures of BiT-M"),
        ("M", {"head": "none"}, "head"),
    ],
)
def test_what_is_no_family(tmp_path, family, options, text):
    with pytest.raises(errors.BitTfError, match=text):
        publishing.publish_all(family, tmp_path / "root", **options)
    assert not (tmp_path / "root").exists()


def start(*arguments):
    """A command line in a process and a session of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "hub_export", *map(str, arguments)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def group(process):
    """Other processes of the session that a process leads."""
    found = []
    for path in pathlib.Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[3]) == process.pid and fields[0] != "Z":
            found.append(int(path.parent.name))
    return [number for number in found if number != process.pid]


def converting(process, root):
    """Whether a publisher's fresh process is at work."""
    return group(process) and list(root.glob(".staging/*"))


def wait(condition, seconds=60):
    stop = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < stop, "nothing happened"
        time.sleep(0.05)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_the_fresh_process(tmp_path, small_npz, number):
    root = tmp_path / "root"
    process = start(
        "publish", small_npz, "--repository", root, "--handle", fake.MODEL
    )
    with process:
        wait(lambda: converting(process, root))
        time.sleep(0.5)
        process.send_signal(number)
        assert process.wait(60) != 0
        wait(lambda: not group(process))
    assert list((root / ".staging").iterdir()) == []
    assert tree.released(root) == []


@pytest.mark.slow
def test_the_fresh_process_ends_with_its_parent(tmp_path, small_npz):
    root = tmp_path / "root"
    process = start(
        "publish", small_npz, "--repository", root, "--handle", fake.MODEL
    )
    with process:
        wait(lambda: converting(process, root))
        process.kill()
        wait(lambda: not group(process))
    assert tree.released(root) == []


@pytest.mark.slow
def test_killed_at_twenty_moments(tmp_path, small_npz, features_export):
    """kill -9 of a real publication, anywhere; then another one."""
    start_root = tmp_path / "start"
    command = ["publish", small_npz, "--handle", fake.MODEL, "--repository"]
    began = time.monotonic()
    with start(*command, start_root) as process:
        assert process.wait() == 0, process.stderr.read()
    whole = time.monotonic() - began
    rng = random.Random(0)
    killed = tries = 0
    while killed < 20:
        tries += 1
        assert tries < 60, f"{killed} of {tries} were killed in time"
        root = tmp_path / "root"
        shutil.copytree(start_root, root, symlinks=True)
        began = time.monotonic()
        with start(*command, root) as process:
            try:
                process.wait(whole * (killed + rng.random()) / 20)
            except subprocess.TimeoutExpired:
                process.kill()
                killed += 1
            else:
                # The machine has less to do than before.
                whole = time.monotonic() - began
            process.wait()
            wait(lambda process=process: not group(process))
        before = fake.assert_readable(root)
        # As it is, without another conversion.
        found = publishing.publish(features_export, root, fake.MODEL)
        assert found.handle.version == before[-1].version + 1
        for report in verification.verify(root, quick=True):
            assert report.ok, report.table()
        assert fake.assert_whole(root) == [*before, found.handle]
        if killed == 20:
            for report in verification.verify(root):
                assert report.ok, report.table()
        shutil.rmtree(root)


@pytest.mark.slow
def test_ten_real_publishers_of_one_version(tmp_path, small_npz):
    root = tmp_path / "root"
    command = ("publish", small_npz, "--repository", root)
    command += ("--handle", f"{fake.MODEL}/1")
    processes = [start(*command) for _ in range(10)]
    codes = []
    for process in processes:
        with process:
            text = process.stderr.read()
            codes.append(process.wait())
            assert codes[-1] == 0 or "immutable" in text, text
    assert sorted(codes) == [0] + [1] * 9
    for report in verification.verify(root):
        assert report.ok, report.table()


def pad(path, size):
    """Gives a zip archive the size that is expected, by its comment."""
    with zipfile.ZipFile(path, "a") as file:
        file.comment = bytes(size - path.stat().st_size)
    assert path.stat().st_size == size


@pytest.mark.slow
def test_a_real_family(tmp_path, monkeypatch):
    """R50x1's two checkpoints of random weights, from a server."""
    with file_server.running() as server:
        for name, classes in (
            ("BiT-M-R50x1", 21843),
            ("BiT-M-R50x1-ILSVRC2012", 1000),
        ):
            path = tmp_path / f"{name}.npz"
            random_weights.write_checkpoint("R50x1", path, classes)
            size = variants.variant(name).size
            if size is not None:
                pad(path, size)
            server.bodies[f"/{path.name}"] = path.read_bytes()
            path.unlink()
        monkeypatch.setenv("BIT_TF_MODELS_URL", server.url)
        root = tmp_path / "root"
        with start(
            "publish",
            "--all",
            "M",
            "--architecture",
            "R50x1",
            "--repository",
            root,
        ) as process:
            text = process.stderr.read()
            assert process.wait() == 0, text
        assert [handle.path for handle in tree.released(root)] == [
            f"{fake.MODEL}/1",
            f"{fake.MODEL}/ilsvrc2012_classification/1",
            f"{fake.MODEL}/imagenet21k_classification/1",
        ]
        outputs = [
            tree.read(root, handle).graph.outputs
            for handle in tree.released(root)
        ]
        assert outputs == [2048, 1000, 21843]
        for report in verification.verify(root, quick=True):
            assert report.ok, report.table()
