import contextlib
import hashlib
import http.server
import io
import os
import pathlib
import random
import shutil
import subprocess
import threading
import time

import embed_process
import helpers
import numpy as np
import pytest
import tiny_models
from PIL import Image

from bit_tf import (
    embed,
    embed_engine,
    embed_plan,
    embed_run,
    embedding_table,
    errors,
    items,
    presets,
)

pytest.importorskip(
    "pyarrow", reason="no pyarrow; pip install 'bit-tf[parquet]'"
)
from pyarrow import dataset, parquet

PRESET = presets.Preset(*embed_process.PRESET)
EDGE = presets.Preset(
    "edge", "shortest_edge", 24, None, "bilinear", True, "a test"
)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_models.save(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def other_model(tmp_path_factory):
    return tiny_models.save(tmp_path_factory.mktemp("models") / "other", 1)


@pytest.fixture
def run(model, tmp_path):
    """embed_run.run of a tiny model, in small shards and batches."""

    def call(*sources, output=tmp_path / "out", **options):
        options = {
            "model": model,
            "preset": PRESET,
            "shard": 8,
            "batch": 3,
            "progress": False,
            **options,
        }
        return embed_run.run([str(s) for s in sources], output, **options)

    return call


def png(seed, height=20, width=24):
    file = io.BytesIO()
    pixels = helpers.random_images(1, height, width, seed=seed)[0]
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def pictures(folder, count, first=0):
    folder.mkdir(exist_ok=True)
    for number in range(first, first + count):
        path = folder / f"{number:04d}.png"
        path.write_bytes(png(number, 12 + number % 3))
    return folder


def table(directory):
    return dataset.dataset(str(directory)).to_table()


def rows(directory):
    return embedding_table.rows_of(table(directory))


def contents(directory):
    """Name → bytes of the shards."""
    return {
        name: (directory / name).read_bytes()
        for name in sorted(os.listdir(directory))
        if name.startswith("part-")
    }


def counts(summary):
    return (
        summary.images,
        summary.encoded,
        summary.duplicates,
        summary.errors,
        summary.skipped,
    )


def test_a_folder_becomes_a_table(run, model, tmp_path):
    folder = pictures(tmp_path / "in", 20)
    (folder / "0007.png").write_bytes(b"not a picture")
    assert counts(run(folder)) == (20, 19, 0, 1, 0)
    out = tmp_path / "out"
    assert sorted(os.listdir(out)) == [
        "_embed.lock",
        "_embed.sqlite",
        *(f"part-{number:05d}.parquet" for number in range(3)),
    ]
    facts = embedding_table.read_facts(out)
    assert (facts.dim, facts.preset, facts.top) == (8, PRESET, 0)
    encoder = embed.ImageEncoder(model, preset=PRESET)
    found = rows(out)
    assert [row.id for row in found] == sorted(
        str(path) for path in folder.iterdir()
    )
    for number, row in enumerate(found):
        path = folder / f"{number:04d}.png"
        data = path.read_bytes()
        assert row.source == str(path)
        assert row.sha256 == hashlib.sha256(data).hexdigest()
        if number == 7:
            assert "Received" in row.error
            assert row.embedding is None
            assert row.width is None
            continue
        assert row.error is None
        assert (row.width, row.height) == (24, 12 + number % 3)
        expected = encoder.encode(data)
        assert helpers.relative_error(row.embedding, expected) <= 1e-5


def test_only_what_is_missing_is_done(run, tmp_path):
    folder = pictures(tmp_path / "in", 18)
    out = tmp_path / "out"
    run(folder)
    before = contents(out)
    assert counts(run(folder)) == (18, 0, 0, 0, 18)
    assert contents(out) == before

    pictures(folder, 3, first=18)
    (folder / "0000a.png").write_bytes(png(99))
    assert counts(run(folder)) == (22, 4, 0, 0, 18)
    after = contents(out)
    assert {name: after[name] for name in before} == before
    assert [row.id[-9:] for row in rows(out)[18:]] == [
        "0000a.png",
        *("/0018.png", "/0019.png", "/0020.png"),
    ]

    # Another source is added to what is there.
    more = pictures(tmp_path / "more", 2, first=50)
    assert counts(run(more)) == (24, 2, 0, 0, 22)


@pytest.mark.parametrize(
    "damage", ["missing", "truncated", "flipped", "foreign", "swapped"]
)
def test_damaged_shards_are_done_again(damage, run, tmp_path):
    folder = pictures(tmp_path / "in", 18)
    out = tmp_path / "out"
    run(folder)
    before = contents(out)
    victim = out / "part-00001.parquet"
    data = bytearray(victim.read_bytes())
    if damage == "missing":
        victim.unlink()
    elif damage == "truncated":
        victim.write_bytes(data[:-100])
    elif damage == "flipped":
        data[-6] ^= 0xFF
        victim.write_bytes(data)
    elif damage == "foreign":
        victim.write_bytes(b"x" * 10)
    else:
        victim.write_bytes((out / "part-00002.parquet").read_bytes())
    assert counts(run(folder)) == (18, 8, 0, 0, 10)
    assert contents(out) == before


def test_a_shard_that_was_not_noted_is_taken(run, tmp_path, monkeypatch):
    """Killed between the rename and the note, nothing is lost."""
    folder = pictures(tmp_path / "in", 18)
    out = tmp_path / "out"
    finish = embed_plan.Plan.finish

    def killed(self, shard, **facts):
        if shard.number == 1:
            raise RuntimeError("killed")
        finish(self, shard, **facts)

    monkeypatch.setattr(embed_plan.Plan, "finish", killed)
    with pytest.raises(RuntimeError, match="killed"):
        run(folder)
    before = contents(out)
    assert len(before) == 2
    monkeypatch.setattr(embed_plan.Plan, "finish", finish)
    assert counts(run(folder)) == (18, 2, 0, 0, 16)
    assert {name: contents(out)[name] for name in before} == before


def test_a_stop_counts_a_shard_that_was_not_noted(run, tmp_path, monkeypatch):
    """A signal that comes between the rename and the note."""
    folder = pictures(tmp_path / "in", 18)
    finish = embed_plan.Plan.finish
    said = []

    def stopped(self, shard, **facts):
        if shard.number == 1 and not said:
            said.append("")
            raise KeyboardInterrupt
        finish(self, shard, **facts)

    monkeypatch.setattr(embed_plan.Plan, "finish", stopped)
    monkeypatch.setattr(
        embed_run.logging, "warning", lambda text, *of: said.append(text % of)
    )
    with pytest.raises(KeyboardInterrupt):
        run(folder)
    assert said[-1].startswith("Stopped: 16 of 18 images are done")
    assert counts(run(folder)) == (18, 2, 0, 0, 16)


def test_a_stop_stays_one_where_nothing_can_be_noted(
    run, tmp_path, monkeypatch
):
    look = embed_run._look

    def locked(*args, undone_only=False):
        if undone_only:
            raise errors.DatasetError("the plan is locked")
        look(*args)

    def stopped(*args, **facts):
        raise KeyboardInterrupt

    monkeypatch.setattr(embed_run, "_look", locked)
    monkeypatch.setattr(embed_plan.Plan, "finish", stopped)
    with pytest.raises(KeyboardInterrupt):
        run(pictures(tmp_path / "in", 2))


def test_leftovers_of_a_killed_run_are_swept(run, tmp_path):
    folder = pictures(tmp_path / "in", 2)
    run(folder)
    leftover = tmp_path / "out" / f".part-00001.parquet.{'0a' * 8}.tmp"
    leftover.write_bytes(b"half")
    run(folder)
    assert not leftover.exists()


def test_the_same_bytes_are_encoded_once(run, tmp_path, monkeypatch):
    folder = pictures(tmp_path / "in", 20)
    for name in ("0003a", "0015a", "0019a"):
        shutil.copy(folder / "0003.png", folder / f"{name}.png")
    for name in ("0001a", "0019b"):
        (folder / f"{name}.png").write_bytes(b"the same, and no picture")
    prepared = []
    prepare = embed_engine.Encoder.prepare

    def counted(self, data, sha256=None):
        prepared.append(data)
        return prepare(self, data, sha256)

    monkeypatch.setattr(embed_engine.Encoder, "prepare", counted)
    assert counts(run(folder)) == (25, 20, 3, 2, 0)
    assert prepared.count((folder / "0003.png").read_bytes()) == 1
    found = {row.id[-9:].lstrip("/"): row for row in rows(tmp_path / "out")}
    first = found["0003.png"]
    for name in ("0003a.png", "0015a.png", "0019a.png"):
        row = found[name]
        assert np.array_equal(row.embedding, first.embedding)
        assert row[2:5] == first[2:5]
        assert row.source.endswith(name)
    assert found["0001a.png"].error == found["0019b.png"].error

    # Those of an earlier run are copied, too.
    prepared.clear()
    shutil.copy(folder / "0003.png", folder / "0030.png")
    assert counts(run(folder)) == (26, 0, 1, 0, 25)
    assert prepared == []


def test_a_source_that_is_named_twice_counts_once(run, tmp_path):
    folder = pictures(tmp_path / "in", 3)
    assert run(folder, folder, folder / "0001.png").images == 3


def test_errors_are_done_again_on_request(run, tmp_path):
    folder = pictures(tmp_path / "in", 20)
    good = {}
    for name in ("0002.png", "0013.png", "0014.png"):
        good[name] = (folder / name).read_bytes()
        (folder / name).write_bytes(b"not a picture")
    run(folder)
    before = contents(tmp_path / "out")
    (folder / "0002.png").write_bytes(good["0002.png"])
    (folder / "0013.png").write_bytes(good["0013.png"])
    assert counts(run(folder)) == (20, 0, 0, 0, 20)
    assert counts(run(folder, retry_errors=True)) == (20, 2, 0, 1, 17)
    after = contents(tmp_path / "out")
    assert after["part-00002.parquet"] == before["part-00002.parquet"]
    found = rows(tmp_path / "out")
    assert [n for n, row in enumerate(found) if row.error] == [14]
    assert counts(run(folder, retry_errors=True)) == (20, 0, 0, 1, 19)
    clean = tmp_path / "clean"
    (folder / "0014.png").write_bytes(good["0014.png"])
    run(folder, retry_errors=True)
    run(folder, output=clean)
    assert [row.id for row in rows(clean)] == [row.id for row in found]
    for one, other in zip(rows(clean), rows(tmp_path / "out"), strict=True):
        error = helpers.relative_error(one.embedding, other.embedding)
        assert error <= 1e-5


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"preset": "big_transfer eval 128"}, "big_transfer eval 128"),
        ({"float16": True}, "float16"),
        ({"precision": "bfloat16"}, "bfloat16"),
    ],
    ids=["preset", "type", "precision"],
)
def test_another_way_is_refused(change, named, run, tmp_path):
    folder = pictures(tmp_path / "in", 2)
    run(folder)
    before = contents(tmp_path / "out")
    with pytest.raises(errors.DatasetError, match=named) as raised:
        run(folder, **change)
    assert "--overwrite" in str(raised.value)
    assert contents(tmp_path / "out") == before
    run(folder, overwrite=True, **change)
    assert table(tmp_path / "out").num_rows == 2


def test_another_model_is_refused(run, model, other_model, tmp_path):
    folder = pictures(tmp_path / "in", 2)
    run(folder)
    with pytest.raises(errors.DatasetError) as raised:
        run(folder, model=other_model)
    assert str(model) in str(raised.value)
    assert str(other_model) in str(raised.value)
    # The same one elsewhere is the same.
    moved = shutil.copytree(model, tmp_path / "moved")
    pictures(folder, 1, first=5)
    assert counts(run(folder, model=moved)) == (3, 1, 0, 0, 2)


def test_what_is_not_ours_is_left_alone(run, tmp_path):
    folder = pictures(tmp_path / "in", 2)
    out = tmp_path / "out"
    out.mkdir()
    foreign = out / "thesis.txt"
    foreign.write_text("the only copy")
    for overwrite in (False, True):
        with pytest.raises(errors.DatasetError, match=r"thesis\.txt"):
            run(folder, overwrite=overwrite)
    foreign.unlink()
    (out / "part-00000.parquet").write_bytes(b"of another program")
    with pytest.raises(errors.DatasetError, match="--overwrite"):
        run(folder)
    assert os.listdir(out) == ["part-00000.parquet"]
    assert counts(run(folder, overwrite=True)) == (2, 2, 0, 0, 0)
    foreign.write_text("the only copy")
    assert counts(run(folder)) == (2, 0, 0, 0, 2)
    with pytest.raises(errors.DatasetError, match=r"thesis\.txt"):
        run(folder, overwrite=True)
    assert foreign.read_text() == "the only copy"


def test_a_bad_source_leaves_nothing(run, tmp_path):
    with pytest.raises(errors.DatasetError, match="none"):
        run(tmp_path / "none")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("name", ["batch", "shard"])
@pytest.mark.parametrize("value", [0, "8", True, 2.0])
def test_numbers_are_checked(name, value, run, tmp_path):
    with pytest.raises(errors.DatasetError, match=name):
        run(tmp_path, **{name: value})


def test_half_precision(run, tmp_path):
    folder = pictures(tmp_path / "in", 5)
    run(folder)
    run(folder, output=tmp_path / "half", float16=True)
    kind = table(tmp_path / "half").schema.field("embedding").type
    assert "halffloat" in str(kind)
    for one, half in zip(
        rows(tmp_path / "out"), rows(tmp_path / "half"), strict=True
    ):
        assert np.array_equal(
            half.embedding, one.embedding.astype(np.float16).astype(np.float32)
        )


def test_names_that_are_no_text(run, tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    path = os.fsencode(folder) + b"/caf\xe9.png"
    try:
        with open(path, "wb") as file:
            file.write(png(0))
    except OSError:
        pytest.skip("the file system takes no such names; run it on another")
    assert counts(run(folder)) == (1, 1, 0, 0, 0)
    (row,) = rows(tmp_path / "out")
    assert row.id.endswith(r"caf\xe9.png")
    assert counts(run(folder)) == (1, 0, 0, 0, 1)
    (tmp_path / "out" / "part-00000.parquet").unlink()
    assert counts(run(folder)) == (1, 1, 0, 0, 0)


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    """A SavedModel with vectors and classes, of one convolution."""
    import tensorflow as tf

    path = tmp_path_factory.mktemp("models") / "classifier"
    model = tf.Module()
    draw = np.random.default_rng(0)
    model.kernel = tf.Variable(draw.normal(size=(3, 3, 3, 8)), dtype="float32")
    model.head = tf.Variable(draw.normal(size=(8, 4)), dtype="float32")

    @tf.function(
        input_signature=[tf.TensorSpec([None, None, None, 3], name="images")]
    )
    def vectors(images):
        found = tf.nn.relu(tf.nn.conv2d(images, model.kernel, 2, "SAME"))
        return {"features": tf.reduce_mean(found, [1, 2])}

    @tf.function(input_signature=vectors.input_signature)
    def classes(images):
        logits = vectors(images)["features"] @ model.head
        return {"logits": logits, "probabilities": tf.nn.softmax(logits)}

    signatures = {"image_feature_vector": vectors}
    signatures["image_classification"] = classes
    tf.saved_model.save(model, str(path), signatures)
    (path / "assets").mkdir(exist_ok=True)
    (path / "assets" / "labels.txt").write_text("ant\nbee\ncat\ndog\n")
    return path


@pytest.mark.parametrize("top", [None, 3, 0])
def test_classes_of_a_classifier(top, run, classifier, tmp_path):
    from bit_tf import classify

    folder = pictures(tmp_path / "in", 4)
    (folder / "0002.png").write_bytes(b"not a picture")
    run(folder, top=top, model=classifier)
    count = {None: 4, 3: 3, 0: 0}[top]
    assert embedding_table.read_facts(tmp_path / "out").top == count
    assert ("names" in table(tmp_path / "out").schema.names) == (count > 0)
    found = rows(tmp_path / "out")
    assert found[2].names is None
    assert found[2].scores is None
    model = classify.Classifier(classifier, PRESET)
    encoder = embed.ImageEncoder(classifier, PRESET)
    for number in (0, 1, 3):
        path = folder / f"{number:04d}.png"
        if count:
            expected = model.classify(path, count)
            _, names, scores = zip(*expected, strict=True)
            assert found[number].names == list(names)
            assert np.allclose(found[number].scores, scores, rtol=1e-5)
        error = helpers.relative_error(
            found[number].embedding, encoder.encode(path)
        )
        assert error <= 1e-5


def test_classes_need_a_classifier(run, tmp_path):
    folder = pictures(tmp_path / "in", 1)
    with pytest.raises(errors.HandleError, match="--top 0"):
        run(folder, top=2)


def convolutions(encoder):
    """How many convolutions the graph has that runs a batch."""
    import tensorflow as tf
    from tensorflow.python.eager import context

    context.context().enable_run_metadata()
    try:
        encoder._function(tf.zeros([2, 32, 32, 3]))
        metadata = context.context().export_run_metadata()
    finally:
        context.context().disable_run_metadata()
    return max(
        sum("Conv2D" in node.op for node in graph.node)
        for graph in metadata.partition_graphs
    )


def test_one_pass_gives_vectors_and_classes(classifier):
    assert convolutions(embed_engine.Encoder(classifier, PRESET, 0)) == 1
    assert convolutions(embed_engine.Encoder(classifier, PRESET, 5)) == 1


@pytest.mark.slow
def test_one_pass_of_a_network(small_export):
    alone = convolutions(embed_engine.Encoder(small_export, PRESET, 0))
    assert convolutions(embed_engine.Encoder(small_export, PRESET, 5)) == alone


def test_two_at_once(run, tmp_path):
    folder = pictures(tmp_path / "in", 30)
    found = []

    def work():
        found.append(counts(run(folder)))

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(found) == [(30, 0, 0, 0, 30), (30, 30, 0, 0, 0)]


def test_items_instead_of_sources(model, tmp_path):
    def found():
        for number in range(5):
            path = tmp_path / f"{number}.png"
            path.write_bytes(png(number))
            yield items.Item(f"n{number}", "shown", ("file", str(path)))

    summary = embed_run.run(
        found(), tmp_path / "out", model=model, preset=PRESET, progress=False
    )
    assert summary.encoded == 5
    found_rows = rows(tmp_path / "out")
    assert [row.id for row in found_rows] == [f"n{n}" for n in range(5)]
    assert {row.source for row in found_rows} == {"shown"}


@pytest.mark.parametrize("given", [pathlib.Path, str, os.fsencode])
@pytest.mark.parametrize("form", ["one", "list", "generator"])
def test_sources_in_other_forms(given, form, model, tmp_path):
    source = given(pictures(tmp_path / "in", 2))
    sources = {
        "one": source,
        "list": [source],
        "generator": (one for one in [source]),
    }[form]
    summary = embed_run.run(
        sources, tmp_path / "out", model=model, preset=PRESET, progress=False
    )
    assert summary.encoded == 2


@pytest.mark.parametrize(
    "sources",
    [
        (),
        3,
        [3],
        [None],
        ["in", 3],
        [items.Item("a", "a", ("file", "a")), "in"],
        [items.Item("\udcff", "a", ("file", "a"))],
        [items.Item("a", "\udcff", ("file", "a"))],
        [items.Item(3, "a", ("file", "a"))],
        [items.Item("a", "a", ("file", b"a"))],
        [items.Item("a", "a", None)],
    ],
    ids=str,
)
def test_sources_that_are_none(sources, model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pictures(tmp_path / "in", 1)
    with pytest.raises(errors.DatasetError, match="Received: "):
        embed_run.run(
            iter(sources) if isinstance(sources, tuple) else sources,
            tmp_path / "out",
            model=model,
            preset=PRESET,
            progress=False,
        )


@pytest.mark.parametrize("top", ["5", -1, 1.0, True])
def test_top_is_checked(top, run, tmp_path):
    with pytest.raises(errors.DatasetError, match="top"):
        run(tmp_path, top=top)


def test_relative_sources_of_another_directory(run, tmp_path, monkeypatch):
    for number, name in enumerate("xy"):
        (tmp_path / name).mkdir()
        pictures(tmp_path / name / "in", 3, first=10 * number)
    monkeypatch.chdir(tmp_path / "x")
    assert run("in").encoded == 3
    (tmp_path / "y" / "in" / "0000.png").write_bytes(png(77))
    monkeypatch.chdir(tmp_path / "y")
    with pytest.raises(errors.DatasetError, match="absolute") as raised:
        run("in")
    for name in "xy":
        assert str(tmp_path / name / "in" / "0000.png") in str(raised.value)
    # What is left is found from anywhere.
    (tmp_path / "out" / "part-00000.parquet").unlink()
    assert counts(run(tmp_path / "y" / "in")) == (7, 7, 0, 0, 0)


def test_overwrite_removes_nothing_before_all_is_listed(run, tmp_path):
    folder = pictures(tmp_path / "in", 3)
    run(folder)
    before = contents(tmp_path / "out")
    listed = tmp_path / "l.csv"
    listed.write_text('path\nin/0000.png\n"in/0001.png')
    for options in ({}, {"timeout": 0}):
        with pytest.raises(ValueError, match="Received: "):
            run(folder if options else listed, overwrite=True, **options)
        assert contents(tmp_path / "out") == before
    assert counts(run(folder)) == (3, 0, 0, 0, 3)
    assert "_embed.next.sqlite" not in os.listdir(tmp_path / "out")
    assert counts(run(folder, overwrite=True)) == (3, 3, 0, 0, 0)


def test_a_failing_model_is_not_a_row(run, tmp_path, monkeypatch):
    folder = pictures(tmp_path / "in", 30)
    encode = embed_engine.Encoder.encode
    calls = []

    def failing(self, batch):
        calls.append(batch)
        if len(calls) == 5:
            raise RuntimeError("a bug")
        return encode(self, batch)

    monkeypatch.setattr(embed_engine.Encoder, "encode", failing)
    before = threading.active_count()
    with pytest.raises(RuntimeError, match="a bug"):
        run(folder)
    assert threading.active_count() <= before + 1
    monkeypatch.setattr(embed_engine.Encoder, "encode", encode)
    assert run(folder).images == 30
    assert all(row.error is None for row in rows(tmp_path / "out"))


@pytest.fixture
def held_pictures(monkeypatch):
    """How many pictures waited for a slow model, whenever one came."""
    held, most = set(), []
    prepare = embed_engine.Encoder.prepare
    encode = embed_engine.Encoder.encode

    def counted(self, data, sha256=None):
        held.add(sha256)
        most.append(len(held))
        return prepare(self, data, sha256)

    def slow(self, batch):
        time.sleep(0.02)
        held.difference_update([one.sha256 for one in batch])
        return encode(self, batch)

    monkeypatch.setattr(embed_engine.Encoder, "prepare", counted)
    monkeypatch.setattr(embed_engine.Encoder, "encode", slow)
    return most


def test_little_is_held(run, tmp_path, held_pictures):
    """Pictures wait for the model in a bounded number."""
    folder = pictures(tmp_path / "in", 120)
    run(folder, shard=1000, batch=4)
    assert max(held_pictures) <= 4 * max(4, os.cpu_count() or 1) + 8 * 4


@pytest.mark.parametrize(
    "preset",
    ["tfhub", EDGE],
    ids=["none", "edge"],
)
def test_few_bytes_are_held(preset, run, tmp_path, monkeypatch, held_pictures):
    """Pictures that decoding makes larger are counted before it."""
    folder = tmp_path / "in"
    folder.mkdir()
    for number in range(40):
        whole = Image.new("RGB", (200, 24), (number, 0, 0))
        whole.save(folder / f"{number:02d}.png")
    size = 200 * 24 * 12
    monkeypatch.setattr(embed_engine, "_HELD", 4 * size)
    assert run(folder, preset=preset, shard=1000, batch=1).encoded == 40
    # Four that wait, and what is in or on its way to the model.
    assert max(held_pictures) <= 4 + 4


def test_numbers_that_are_not_finite(run, tmp_path, monkeypatch):
    folder = pictures(tmp_path / "in", 9)
    names = {}
    for path in folder.iterdir():
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        names[digest] = path.name
    values = {"0001.png": np.nan, "0002.png": -np.inf, "0003.png": -1e5}
    encode = embed_engine.Encoder.encode

    def odd(self, batch):
        found = encode(self, batch)
        for one, picture in zip(found, batch, strict=True):
            one.embedding[3] = values.get(names[picture.sha256], 1.0)
        return found

    monkeypatch.setattr(embed_engine.Encoder, "encode", odd)
    assert counts(run(folder)) == (9, 7, 0, 2, 0)
    assert counts(run(folder, output=tmp_path / "half", float16=True)) == (
        *(9, 6, 0, 3, 0),
    )
    for out, bad in (("out", 2), ("half", 3)):
        found = rows(tmp_path / out)
        assert [n for n, row in enumerate(found) if row.error] == [
            *range(1, 1 + bad)
        ]
        assert all(
            np.isfinite(row.embedding).all() for row in found if not row.error
        )
        assert all("finite" in row.error for row in found[1:3])
        assert found[1].width is None
    assert "--float16" in found[3].error
    assert "one of 100000" in found[3].error


def test_a_flipped_bit_among_the_vectors(run, tmp_path):
    folder = pictures(tmp_path / "in", 8)
    run(folder)
    path = tmp_path / "out" / "part-00000.parquet"
    data = bytearray(path.read_bytes())
    column = parquet.read_metadata(path).row_group(0).column(5)
    data[column.data_page_offset + column.total_compressed_size - 9] ^= 1
    path.write_bytes(data)
    facts = embedding_table.read_facts(path)
    with pytest.raises(errors.DatasetError, match="whole Parquet file"):
        embed_engine.read_shard(str(path), facts)


@contextlib.contextmanager
def small_disk(path, size):
    """A file system of some bytes."""
    path.mkdir()
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(path)],
        capture_output=True,
    )
    if made.returncode:
        pytest.skip("cannot mount a tmpfs; run it as root on Linux")
    try:
        yield path
    finally:
        subprocess.run(["umount", str(path)], check=True)


def test_a_full_disk(run, tmp_path):
    folder = pictures(tmp_path / "in", 60)
    whole = tmp_path / "whole"
    run(folder, output=whole)
    with small_disk(tmp_path / "disk", 400 * 1024) as disk:
        out = disk / "out"
        out.mkdir()
        # A part of the plan and of the shards has room.
        filler = disk / "filler"
        filler.write_bytes(b"x" * 328 * 1024)
        with pytest.raises(errors.DatasetError, match="room"):
            run(folder, output=out)
        assert not [name for name in os.listdir(out) if "tmp" in name]
        done = contents(out)
        expected = contents(whole)
        assert done == {name: expected[name] for name in done}
        filler.unlink()
        assert run(folder, output=out).skipped == 8 * len(done)
        assert contents(out) == expected


@pytest.fixture(scope="module")
def nursery(tmp_path_factory):
    log = tmp_path_factory.mktemp("log") / "stderr.txt"
    with embed_process.nursery(log) as found:
        yield found


@pytest.mark.slow
def test_killed_at_any_moment(run, model, nursery, tmp_path):
    folder = pictures(tmp_path / "in", 100)
    for number in range(0, 100, 7):
        shutil.copy(folder / "0003.png", folder / f"{number:04d}x.png")
        (folder / f"{number:04d}y.png").write_bytes(b"none %d" % number)
    whole = tmp_path / "whole"
    options = {"shard": 6, "batch": 4}
    run(folder, output=whole, **options)
    expected = contents(whole)
    arguments = {"model": str(model), "sources": [str(folder)], **options}
    out = tmp_path / "out"
    start = time.monotonic()
    nursery.start({**arguments, "output": str(out)})
    assert nursery.wait() == 0
    unbroken = time.monotonic() - start
    assert contents(out) == expected

    chance = random.Random(6)
    kills = 0
    while kills < 20:
        shutil.rmtree(out)
        status = -9
        while status != 0:
            after = chance.uniform(0.02, unbroken)
            nursery.start(
                {**arguments, "output": str(out), "kill_after": after}
            )
            status = nursery.wait()
            assert status in (0, -9)
            kills += status == -9
        assert contents(out) == expected
        assert table(out).equals(table(whole))
        assert not [name for name in os.listdir(out) if "tmp" in name]


class Poison(http.server.BaseHTTPRequestHandler):
    """404, a redirect to itself, or silence."""

    def do_GET(self):
        if self.path.startswith("/silent"):
            self.server.ended.wait(5)
            return
        if self.path.startswith("/loop"):
            self.send_response(302)
            self.send_header("Location", self.path)
        else:
            self.send_response(404)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *arguments):
        pass


@contextlib.contextmanager
def poison():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Poison)
    server.ended = threading.Event()
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.ended.set()
        server.shutdown()
        thread.join()
        server.server_close()


def bomb():
    """A PNG of 40 000 × 40 000 pixels, in few bytes."""
    file = io.BytesIO()
    Image.new("1", (40_000, 40_000)).save(file, "PNG")
    return file.getvalue()


@pytest.mark.slow
def test_poison_among_many(run, features_export, tmp_path):
    folder = pictures(tmp_path / "in", 940)
    bad = tmp_path / "bad"
    bad.mkdir()
    bombs = bomb()
    names = [str(path) for path in sorted(folder.iterdir())]
    chance = random.Random(0)
    with poison() as url:
        for number in range(10):
            whole = png(2000 + number)
            made = {
                "truncated": whole[: len(whole) // 2],
                # A comment at the end: no two have the same bytes.
                "bomb": bombs + b"%d" % number,
                "wrong": b"%%PDF-1.4 %d" % number,
            }
            for kind, data in made.items():
                path = bad / f"{kind}{number}.png"
                path.write_bytes(data)
                names.append(str(path))
            for kind in ("missing", "silent", "loop"):
                names.append(f"{url}/{kind}{number}.png")
        chance.shuffle(names)
        listed = tmp_path / "names.txt"
        listed.write_text("\n".join(names))
        summary = run(
            listed,
            model=features_export,
            shard=128,
            batch=8,
            timeout=0.5,
            retries=1,
            per_host=10,
        )
    assert counts(summary) == (1000, 940, 0, 60, 0)
    found = rows(tmp_path / "out")
    assert [row.id for row in found] == names
    encoder = embed.BitMedium2Vec(features_export, preset=PRESET)
    vectors = {row.id: row.embedding for row in found if row.error is None}
    assert sorted(vectors) == sorted(str(path) for path in folder.iterdir())
    for path, vector in vectors.items():
        error = helpers.relative_error(vector, encoder.encode(path))
        assert error <= 1e-5
    for row in found:
        if row.error is not None:
            assert row.embedding is None
            assert "Received" in row.error
