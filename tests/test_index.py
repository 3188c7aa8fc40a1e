"""The index: what goes in, what is found, and what it refuses."""

import dataclasses
import datetime
import os
import signal
import sqlite3
import subprocess
import sys
import time

import numpy as np
import pytest

from benchmarks import search
from bit_tf import (
    embedding_table,
    errors,
    index,
    index_rows,
    ivf_pq,
    near_duplicates,
    presets,
)
from bit_tf.embedding_table import Row

pytest.importorskip("lancedb", reason="no lancedb; pip install 'bit-tf[index]'")

DIM = 16
FACTS = embedding_table.Facts(
    model="some/model",
    model_hash="a" * 64,
    preset=presets.PRESETS["tfhub"],
    version="0.1",
    dim=DIM,
    top=2,
)


def vectors(count, seed=0):
    """float32 [count, DIM], the same beginning for every count."""
    rng = np.random.default_rng(seed)
    return rng.normal(size=(count, DIM)).astype(np.float32)


def rows(first, last, seed=0):
    """Rows number first to last."""
    found = vectors(last, seed)
    return [
        Row(
            id=f"it's/{number}",
            source=f"folder/{number}.jpg",
            sha256=f"{number:064x}",
            width=number,
            height=10,
            embedding=found[number],
            names=["cat", "dog"],
            scores=[0.75, 0.25],
        )
        for number in range(first, last)
    ]


def write(path, found, facts=FACTS, per_file=None):
    """A directory of Parquet files, as `bit-tf embed` makes."""
    path.mkdir(exist_ok=True)
    size = per_file or max(1, len(found))
    for number, start in enumerate(range(0, max(1, len(found)), size)):
        embedding_table.write(
            path / f"part-{number:05}.parquet",
            found[start : start + size],
            facts,
        )
    return path


def order(query, found):
    """(id, cosine) of rows, by brute force."""
    query = query.astype(np.float64)
    cosines = {
        row.id: row.embedding.astype(np.float64)
        @ query
        / np.linalg.norm(row.embedding.astype(np.float64))
        / np.linalg.norm(query)
        for row in found
    }
    return sorted(cosines.items(), key=lambda pair: -pair[1])


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """300 rows and one with an error."""
    folder = tmp_path_factory.mktemp("small")
    bad = Row("bad", "bad.jpg", error="no picture")
    write(folder / "vectors", [*rows(0, 300), bad], per_file=100)
    counts = index.build(folder / "vectors", folder / "index", progress=False)
    assert dataclasses.astuple(counts) == (300, 0, 0, 1)
    return folder


@pytest.fixture(scope="module")
def opened(small):
    return index.open(small / "index")


@pytest.fixture
def few(monkeypatch):
    """An index of 1000 rows and more is IVF-PQ, and is used."""
    monkeypatch.setattr(ivf_pq, "EXACT_BELOW", 1000)
    monkeypatch.setattr(ivf_pq, "_CANDIDATES", 4)
    monkeypatch.setattr(ivf_pq, "_SCATTERED", 1)

    def parameters(count, dim):
        return ivf_pq.Parameters(max(1, count // 600), 8, 256, 10)

    monkeypatch.setattr(ivf_pq, "parameters", parameters)


def test_finds_the_nearest_with_all_columns(opened):
    assert len(opened) == 300
    assert opened.facts == FACTS
    query = vectors(1, seed=5)[0]
    hits = opened.search(query, k=7)
    expected = order(query, rows(0, 300))[:7]
    assert [hit.row.id for hit in hits] == [id for id, _ in expected]
    np.testing.assert_allclose(
        [hit.score for hit in hits], [cosine for _, cosine in expected]
    )
    (number,) = [int(hit.row.id.partition("/")[2]) for hit in hits[:1]]
    np.testing.assert_array_equal(
        hits[0].row.embedding, rows(0, 300)[number].embedding
    )
    assert hits[0].row._replace(embedding=None) == rows(0, 300)[
        number
    ]._replace(embedding=None)


def test_scores_are_cosines_of_any_length(opened):
    query = vectors(8)[7]
    for factor in (1, 1e-6, -1e6):
        hits = opened.search(query * np.float32(factor), k=10**30)
        assert len(hits) == 300
        scores = [hit.score for hit in hits]
        assert scores == sorted(scores, reverse=True)
        assert -1 <= scores[-1] <= scores[0] <= 1
        assert hits[0 if factor > 0 else -1].row.id == "it's/7"
    assert abs(hits[-1].score + 1) < 1e-6


def test_where_is_applied_before(opened):
    query = vectors(1, seed=6)[0]
    hits = opened.search(
        query, k=5, where="width > 200 AND source LIKE '%7.jpg' AND id <> 'x'"
    )
    chosen = [row for row in rows(201, 300) if row.source.endswith("7.jpg")]
    expected = [id for id, _ in order(query, chosen)[:5]]
    assert [hit.row.id for hit in hits] == expected
    assert opened.search(query, where="width < 0") == []


@pytest.mark.parametrize(
    "where", ["nosuch > 1", "", "width", "id = 'x' OR", "width LIKE 3"]
)
def test_a_bad_filter_is_explained(opened, where):
    with pytest.raises(errors.DatasetError) as caught:
        opened.search(vectors(1)[0], where=where)
    message = str(caught.value)
    assert "id, source, sha256, width, height" in message
    assert repr(where) in message
    assert ".rs:" not in message


@pytest.mark.parametrize(
    "vector",
    [
        np.zeros(DIM),
        np.full(DIM, np.nan),
        np.full(DIM, np.inf),
        np.ones(DIM + 1),
        np.ones((1, DIM)),
        "text",
        None,
    ],
    ids=["zeros", "nan", "infinite", "long", "batch", "text", "none"],
)
def test_a_query_is_a_vector_with_a_direction(opened, vector):
    with pytest.raises(errors.DatasetError, match="Received"):
        opened.search(vector)


def test_k_is_at_least_one(opened):
    with pytest.raises(errors.DatasetError, match="Received: 0"):
        opened.search(vectors(1)[0], k=0)


@pytest.mark.parametrize("k", ["3", None, 2.5, float("nan"), True], ids=repr)
def test_k_is_an_integer(opened, k):
    with pytest.raises(errors.DatasetError, match="integer"):
        opened.search(vectors(1)[0], k=k)
    assert len(opened.search(vectors(1)[0], k=np.int64(3))) == 3


def test_arguments_of_another_type(opened, tmp_path):
    with pytest.raises(errors.DatasetError, match="Received: 5"):
        opened.row(5)
    with pytest.raises(errors.DatasetError, match=r"Received: '0\.9'"):
        opened.near_duplicates("0.9")
    with pytest.raises(errors.DatasetError, match="vector of"):
        opened.search([10**400] * DIM)
    with pytest.raises(errors.DatasetError, match="Received: 7"):
        opened.search(vectors(1)[0], where=7)
    with pytest.raises(errors.DatasetError, match="Received: None"):
        index.build(None, tmp_path / "index")


def test_a_filter_is_one_expression(opened):
    query = vectors(1)[0]
    for where in ("width > 100; drop table x", "width > 1;"):
        with pytest.raises(errors.DatasetError, match="without ;"):
            opened.search(query, where=where)
    assert opened.search(query, where="id = 'a;''b' OR \"id\" = ';'") == []


@pytest.mark.parametrize(
    "name",
    [
        "é",
        "h#x",
        "q?x",
        "pct%41",
        "brack[1]",
        "star*",
        "a~b {c}|",
        "!$&'()+,;=@",
    ],
)
def test_any_name(tmp_path, name):
    folder = tmp_path / name
    folder.mkdir()
    write(tmp_path / "vectors", rows(0, 3))
    write(tmp_path / "more", rows(3, 5))
    index.build(tmp_path / "vectors", folder / name)
    index.add(tmp_path / "more", folder / name)
    assert len(index.open(folder / name)) == 5
    assert sorted(os.listdir(folder)) == [name, f"{name}.lock"]
    assert sorted(os.listdir(tmp_path)) == sorted([name, "more", "vectors"])


@pytest.mark.parametrize(
    "name", ["", "new\nline", "nul\0", "\udc80"], ids=ascii
)
def test_names_that_lancedb_does_not_take(tmp_path, monkeypatch, name):
    write(tmp_path / "vectors", rows(0, 3))
    monkeypatch.chdir(tmp_path)
    message = "control characters" if name else "empty name"
    for action in (index.build, index.add):
        with pytest.raises(errors.DatasetError, match=message):
            action(tmp_path / "vectors", name)
    with pytest.raises(errors.DatasetError, match=message):
        index.open(name)
    assert os.listdir(tmp_path) == ["vectors"]


def test_no_room_for_the_ids(tmp_path, monkeypatch):
    write(tmp_path / "vectors", rows(0, 3))

    def full(*arguments):
        raise sqlite3.OperationalError("database or disk is full")

    monkeypatch.setattr(index_rows._Known, "_enter", full)
    with pytest.raises(errors.DatasetError, match="SQLITE_TMPDIR"):
        index.build(tmp_path / "vectors", tmp_path / "index")


def test_row_by_id(opened):
    row = opened.row("it's/12")
    assert row.width == 12
    np.testing.assert_array_equal(row.embedding, vectors(13)[12])
    with pytest.raises(errors.DatasetError, match=r"it's/12"):
        opened.row("it's/1212")
    with pytest.raises(errors.DatasetError, match="does not have"):
        opened.row("x' OR 1=1 --")


def test_ids_are_any_text(tmp_path):
    ids = ["", "a\x00b", "é\u202e", "' OR 1=1", "\\", '"', "%", "x" * 9999]
    found = [
        row._replace(id=id)
        for id, row in zip(ids, rows(0, len(ids)), strict=True)
    ]
    write(tmp_path / "vectors", found)
    index.build(tmp_path / "vectors", tmp_path / "index")
    counts = index.add(tmp_path / "vectors", tmp_path / "index")
    assert counts.same == len(ids)
    opened = index.open(tmp_path / "index")
    assert [opened.row(id).width for id in ids] == list(range(len(ids)))
    with pytest.raises(errors.DatasetError, match="does not have"):
        opened.row("\udc80")


def test_no_rows(tmp_path):
    bad = Row("bad", "bad.jpg", error="no picture")
    write(tmp_path / "vectors", [bad])
    assert index.build(tmp_path / "vectors", tmp_path / "index").errors == 1
    opened = index.open(tmp_path / "index")
    assert opened.search(vectors(1)[0]) == []
    assert opened.near_duplicates(progress=False) == []
    with pytest.raises(errors.DatasetError, match="no rows"):
        opened.row("bad")
    assert opened.stats().rows == 0


def test_stats(opened):
    stats = opened.stats()
    assert (stats.rows, stats.indexed, stats.unindexed) == (300, 0, 300)
    assert stats.num_partitions is None
    assert stats.index_bytes == 0
    assert stats.bytes > 300 * DIM * 4


def test_float16(tmp_path):
    facts = dataclasses.replace(FACTS, float16=True)
    write(tmp_path / "vectors", rows(0, 50), facts)
    index.build(tmp_path / "vectors", tmp_path / "index")
    found = index.open(tmp_path / "index")
    assert found.facts == facts
    query = rows(0, 50)[3].embedding
    hits = found.search(query, k=50)
    assert hits[0].row.id == "it's/3"
    expected = dict(order(query, rows(0, 50)))
    for score, row in hits:
        assert abs(score - expected[row.id]) < 2e-3


def test_add(tmp_path):
    write(tmp_path / "first", rows(0, 40))
    index.build(tmp_path / "first", tmp_path / "index")
    before = index.open(tmp_path / "index")
    more = rows(30, 60)
    more[0] = more[0]._replace(sha256="f" * 64)
    more[1] = more[1]._replace(embedding=-more[1].embedding)
    write(tmp_path / "more", more, per_file=7)
    counts = index.add(tmp_path / "more", tmp_path / "index", progress=False)
    assert dataclasses.astuple(counts) == (20, 2, 8, 0)
    after = index.open(tmp_path / "index")
    assert len(after) == 60
    assert after.row("it's/30").sha256 == "f" * 64
    np.testing.assert_array_equal(
        after.row("it's/31").embedding, more[1].embedding
    )
    # What was open sees what there was.
    assert len(before.search(vectors(1)[0], k=100)) == 40
    assert before.row("it's/30").sha256 != "f" * 64
    again = index.add(tmp_path / "more", tmp_path / "index")
    assert dataclasses.astuple(again) == (0, 0, 30, 0)


def test_small_chunks_give_the_same_index(tmp_path, monkeypatch):
    monkeypatch.setattr(index_rows, "_CHUNK", 1000)
    write(tmp_path / "vectors", rows(0, 50), per_file=20)
    index.build(tmp_path / "vectors", tmp_path / "index")
    changed = [row._replace(sha256="e" * 64) for row in rows(0, 30)]
    write(tmp_path / "more", changed)
    index.add(tmp_path / "more", tmp_path / "index")
    found = index.open(tmp_path / "index").search(vectors(1)[0], k=99)
    assert len(found) == 50
    assert sum(hit.row.sha256 == "e" * 64 for hit in found) == 30


def test_one_id_with_two_vectors_is_refused(tmp_path):
    write(tmp_path / "one", rows(0, 5))
    write(tmp_path / "two", rows(4, 9))
    both = [tmp_path / "one", tmp_path / "two"]
    counts = index.build(both, tmp_path / "same")
    assert dataclasses.astuple(counts) == (9, 0, 1, 0)
    write(tmp_path / "two", rows(4, 9, seed=1))
    with pytest.raises(errors.DatasetError, match="it's/4"):
        index.build(both, tmp_path / "index")
    assert sorted(os.listdir(tmp_path)) == [
        "index.lock",
        "one",
        "same",
        "same.lock",
        "two",
    ]


@pytest.mark.parametrize("bad", [0.0, np.nan, np.inf, -np.inf])
def test_a_vector_without_a_direction_is_refused(tmp_path, bad, monkeypatch):
    found = rows(0, 5)
    vector = np.zeros(DIM, np.float32)
    vector[3] = bad
    found[2] = found[2]._replace(embedding=vector)
    with monkeypatch.context() as patch:
        # Tables of this package hold none that is not finite.
        patch.setattr(embedding_table, "checked", lambda row, facts: row)
        write(tmp_path / "vectors", found)
    with pytest.raises(errors.DatasetError, match="it's/2"):
        index.build(tmp_path / "vectors", tmp_path / "index")
    assert not (tmp_path / "index").exists()
    write(tmp_path / "good", rows(0, 2))
    index.build(tmp_path / "good", tmp_path / "index")
    with pytest.raises(errors.DatasetError, match="it's/2"):
        index.add(tmp_path / "vectors", tmp_path / "index")
    assert len(index.open(tmp_path / "index")) == 2


def test_what_fails_leaves_nothing(tmp_path, monkeypatch):
    target = tmp_path / "index"
    write(tmp_path / "vectors", rows(0, 10))
    index.build(tmp_path / "vectors", target)

    def there():
        return {path for path in target.rglob("*") if path.is_file()}

    before = there()
    changed = [row._replace(sha256="e" * 64) for row in rows(0, 3)]
    write(tmp_path / "more", [*changed, *rows(10, 40, seed=1)], per_file=5)
    write(tmp_path / "others", rows(10, 90))
    with monkeypatch.context() as patch:
        patch.setattr(index_rows, "_CHUNK", 1000)

        def fail(*arguments):
            assert len(list(target.rglob("*.lance"))) > 3
            raise OSError("disk full")

        patch.setattr(ivf_pq, "keep", fail)
        for _ in range(2):
            with pytest.raises(OSError, match="disk full"):
                index.add(tmp_path / "more", target)
            assert there() == before
    assert len(index.open(target).search(vectors(1)[0], k=99)) == 10
    counts = index.add(tmp_path / "others", target)
    assert dataclasses.astuple(counts) == (80, 0, 0, 0)
    found = {
        hit.row.id: hit.row
        for hit in index.open(target).search(vectors(1)[0], k=99)
    }
    assert len(found) == 90
    for row in rows(0, 90):
        assert found[row.id].sha256 == row.sha256
        np.testing.assert_array_equal(found[row.id].embedding, row.embedding)


@pytest.mark.parametrize(
    "change",
    [
        {"model_hash": "b" * 64},
        {"preset": presets.PRESETS["timm in1k"]},
        {"dim": DIM // 2},
        {"float16": True},
        {"top": 0},
    ],
    ids=lambda change: next(iter(change)),
)
def test_vectors_of_another_kind_are_refused(small, tmp_path, change):
    facts = dataclasses.replace(FACTS, **change)
    other = [
        row._replace(embedding=row.embedding[: facts.dim]) for row in rows(0, 3)
    ]
    write(tmp_path / "other", other, facts)
    with pytest.raises(errors.DatasetError) as caught:
        index.add(tmp_path / "other", small / "index")
    message = str(caught.value)
    if "model_hash" in change:
        assert "aaaa" in message
        assert "bbbb" in message
    elif "preset" in change:
        assert "tfhub" in message
        assert "timm in1k" in message
    with pytest.raises(errors.DatasetError):
        index.build([small / "vectors", tmp_path / "other"], tmp_path / "index")


def test_a_handle_by_another_name_is_the_same_model(tmp_path):
    write(tmp_path / "one", rows(0, 3))
    write(
        tmp_path / "two",
        rows(3, 6),
        dataclasses.replace(FACTS, model="elsewhere", version="9"),
    )
    index.build(tmp_path / "one", tmp_path / "index")
    index.add(tmp_path / "two", tmp_path / "index")
    found = index.open(tmp_path / "index")
    assert (len(found), found.facts) == (6, FACTS)


def test_what_is_there_is_not_replaced_unasked(tmp_path):
    write(tmp_path / "vectors", rows(0, 5))
    write(tmp_path / "more", rows(5, 9))
    target = tmp_path / "index"
    target.mkdir()
    index.build(tmp_path / "vectors", target)
    with pytest.raises(errors.DatasetError, match="--overwrite"):
        index.build(tmp_path / "more", target)
    index.build(tmp_path / "more", target, overwrite=True)
    assert len(index.open(target)) == 4
    for name in ("file", "folder"):
        mine = tmp_path / name
        if name == "file":
            mine.write_text("mine")
        else:
            mine.mkdir()
            (mine / "note.txt").write_text("mine")
        with pytest.raises(errors.DatasetError, match="something else"):
            index.build(tmp_path / "more", mine, overwrite=True)
        assert mine.exists()
    assert (tmp_path / "folder" / "note.txt").read_text() == "mine"


def test_an_open_index_was_replaced(tmp_path):
    write(tmp_path / "vectors", rows(0, 5))
    target = tmp_path / "index"
    index.build(tmp_path / "vectors", target)
    old = index.open(target)
    index.build(tmp_path / "vectors", target, overwrite=True)
    for call in (
        lambda: old.search(vectors(1)[0], where="width >= 0"),
        lambda: old.search(vectors(1)[0]),
        lambda: old.row("it's/1"),
        lambda: old.near_duplicates(progress=False),
    ):
        with pytest.raises(errors.DatasetError, match="Open it again"):
            call()


def test_only_an_index_is_replaced(tmp_path):
    import lancedb
    import pyarrow

    write(tmp_path / "vectors", rows(0, 5))
    target = tmp_path / "index"
    index.build(tmp_path / "vectors", target)
    (target / "precious.txt").write_text("mine")
    foreign = tmp_path / "foreign"
    lancedb.connect(foreign).create_table(
        "vectors", pyarrow.table({"mine": [1, 2]})
    )
    damaged = tmp_path / "damaged"
    (damaged / "vectors.lance").mkdir(parents=True)
    (damaged / "vectors.lance" / "note.txt").write_text("mine")
    for other in (target, foreign, damaged):
        before = {path for path in other.rglob("*") if path.is_file()}
        with pytest.raises(errors.DatasetError, match="something else"):
            index.build(tmp_path / "vectors", other, overwrite=True)
        assert {p for p in other.rglob("*") if p.is_file()} == before
    (target / "precious.txt").unlink()
    for manifest in target.glob("vectors.lance/_versions/*"):
        manifest.unlink()
    index.build(tmp_path / "vectors", target, overwrite=True)
    assert len(index.open(target)) == 5


def test_a_row_has_a_source(tmp_path):
    write(tmp_path / "vectors", [rows(0, 1)[0]._replace(source=None)])
    with pytest.raises(errors.DatasetError, match="has a source"):
        index.build(tmp_path / "vectors", tmp_path / "index")


def test_what_is_no_index_or_no_table_is_refused(small, tmp_path):
    with pytest.raises(errors.DatasetError, match="index build"):
        index.open(tmp_path / "none")
    with pytest.raises(errors.DatasetError, match="index build"):
        index.add(small / "vectors", tmp_path / "none")
    assert os.listdir(tmp_path) == []
    with pytest.raises(errors.DatasetError, match="embed"):
        index.build(tmp_path, tmp_path / "index")
    with pytest.raises(errors.DatasetError, match="none"):
        index.build([], tmp_path / "index")
    part = tmp_path / "part-00000.parquet"
    whole = (small / "vectors" / "part-00000.parquet").read_bytes()
    for data in (b"", b"PAR1", whole[: len(whole) // 2]):
        part.write_bytes(data)
        with pytest.raises(errors.DatasetError, match="Parquet"):
            index.build(part, tmp_path / "index")
    # The footer is whole, and pages are not.
    footer = len(whole) - 8 - int.from_bytes(whole[-8:-4], "little")
    part.write_bytes(b"PAR1" + b"\xff" * (footer - 4) + whole[footer:])
    with pytest.raises(errors.DatasetError, match="Parquet"):
        index.build(part, tmp_path / "index")
    assert sorted(os.listdir(tmp_path)) == [
        "index.lock",
        "part-00000.parquet",
    ]


def test_a_damaged_index_is_an_error_of_ours(small, tmp_path):
    write(tmp_path / "vectors", rows(0, 5))
    index.build(tmp_path / "vectors", tmp_path / "index")
    place = tmp_path / "index" / "vectors.lance"
    (data,) = (place / "data").iterdir()
    data.write_bytes(data.read_bytes()[:100])
    with pytest.raises(errors.DatasetError, match="overwrite"):
        index.open(tmp_path / "index").search(vectors(1)[0])
    for manifest in (place / "_versions").glob("*.manifest"):
        manifest.unlink()
    with pytest.raises(errors.DatasetError, match="overwrite"):
        index.open(tmp_path / "index")


def test_ivf_pq(tmp_path, monkeypatch, few):
    write(tmp_path / "vectors", rows(0, 1200))
    index.build(tmp_path / "vectors", tmp_path / "index")
    found = index.open(tmp_path / "index")
    stats = found.stats()
    assert (stats.indexed, stats.unindexed) == (1200, 0)
    assert (stats.num_partitions, stats.num_sub_vectors) == (2, 8)
    assert 1200 * 8 < stats.index_bytes < stats.bytes
    assert found._cells(10) == 2
    # Both cells are looked into, and enough is refined to be exact.
    for query in vectors(5, seed=3):
        expected = [id for id, _ in order(query, rows(0, 1200))[:10]]
        assert [hit.row.id for hit in found.search(query)] == expected
        exact = found.search(query, exact=True)
        assert [hit.row.id for hit in exact] == expected
    # Fewer rows than k fulfil the filter, in whatever cell.
    monkeypatch.setattr(ivf_pq, "_CELLS", 1)
    assert found._cells(10) == 1
    for query in vectors(5, seed=3):
        hits = found.search(query, where="width IN (3, 7, 700, 1199)")
        assert {hit.row.width for hit in hits} == {3, 7, 700, 1199}

    write(tmp_path / "few", rows(1200, 1250))
    index.add(tmp_path / "few", tmp_path / "index")
    found = index.open(tmp_path / "index")
    assert (found.stats().indexed, found.stats().unindexed) == (1200, 50)
    assert found.search(rows(0, 1250)[1234].embedding)[0].row.width == 1234

    write(tmp_path / "many", rows(1250, 1500))
    index.add(tmp_path / "many", tmp_path / "index")
    found = index.open(tmp_path / "index")
    assert (found.stats().indexed, found.stats().unindexed) == (1500, 0)

    write(tmp_path / "double", rows(1500, 2400))
    index.add(tmp_path / "double", tmp_path / "index")
    stats = index.open(tmp_path / "index").stats()
    assert (stats.num_partitions, stats.indexed) == (4, 2400)


def test_the_limit_is_passed_by_adding(tmp_path, few):
    write(tmp_path / "vectors", rows(0, 600))
    index.build(tmp_path / "vectors", tmp_path / "index")
    assert index.open(tmp_path / "index").stats().indexed == 0
    write(tmp_path / "more", rows(600, 1000))
    index.add(tmp_path / "more", tmp_path / "index")
    assert index.open(tmp_path / "index").stats().indexed == 1000


def test_old_versions_go_when_much_is_added(tmp_path, monkeypatch, few):
    monkeypatch.setattr(ivf_pq, "_KEPT", datetime.timedelta(seconds=1))
    write(tmp_path / "vectors", rows(0, 1200))
    index.build(tmp_path / "vectors", tmp_path / "index")
    versions = tmp_path / "index" / "vectors.lance" / "_versions"
    old = {name for name in os.listdir(versions) if "manifest" in name}
    time.sleep(1.5)
    write(tmp_path / "more", rows(1200, 1500))
    index.add(tmp_path / "more", tmp_path / "index")
    found = index.open(tmp_path / "index")
    assert (len(found), found.stats().indexed) == (1500, 1500)
    assert found.search(rows(0, 1500)[1234].embedding)[0].row.width == 1234
    assert not old & set(os.listdir(versions))


def test_parameters():
    chosen = ivf_pq.parameters(200_000, 2048)
    assert (chosen.num_partitions, chosen.num_sub_vectors) == (447, 128)
    for dim in (16, 24, 100, 1024, 2047, 8192):
        assert dim % ivf_pq.parameters(100_000, dim).num_sub_vectors == 0
    assert ivf_pq.EXACT_BELOW == 100_000


def test_cells():
    built = ivf_pq.Built("ivf447_pq128", 447, 128, 200_000, 1)
    assert ivf_pq.cells(built, 200_000, 1) == 16
    assert ivf_pq.cells(built, 200_000, 10) == 16
    assert 16 < ivf_pq.cells(built, 200_000, 1000) < 447
    # The more are wanted, the less it pays to read them here and there.
    assert ivf_pq.cells(built, 200_000, 2000) is None


def near(count, of, noise, seed):
    """Rows whose vectors are nearly that of a row."""
    rng = np.random.default_rng(seed)
    return [
        of._replace(
            id=f"near/{seed}/{number}",
            sha256=f"{seed}{number:063x}",
            embedding=of.embedding
            + rng.normal(scale=noise, size=DIM).astype(np.float32),
        )
        for number in range(count)
    ]


@pytest.mark.parametrize("approximate", [False, True], ids=["exact", "ivf"])
def test_near_duplicates(tmp_path, monkeypatch, few, approximate):
    if approximate:
        monkeypatch.setattr(ivf_pq, "EXACT_BELOW", 300)
    # No two of these have a cosine of 0.99.
    # One more than a batch of the index.
    base = rows(0, 312 if approximate else 400)
    copy = base[9]._replace(id="copy")
    found = [
        *base,
        *near(3, base[7], 0.01, 1),
        *near(5, base[8], 0.01, 2),
        copy,
    ]
    write(tmp_path / "vectors", found)
    index.build(tmp_path / "vectors", tmp_path / "index")
    # Blocks of fewer rows than there are.
    monkeypatch.setattr(near_duplicates, "_BLOCK", 64)
    opened = index.open(tmp_path / "index")
    assert bool(opened.stats().indexed) == approximate
    groups = opened.near_duplicates(0.99, progress=False)
    ids = [[member.row.id for member in group.members] for group in groups]
    assert ids == [
        ["it's/8", *(f"near/2/{number}" for number in range(5))],
        ["it's/7", *(f"near/1/{number}" for number in range(3))],
        ["copy", "it's/9"],
    ]
    assert all(0.99 < m.score <= 1 for g in groups for m in g.members)
    assert [member.score for member in groups[2].members] == [1, 1]
    assert [member.same_file for member in groups[2].members] == [True] * 2
    assert not any(member.same_file for member in groups[0].members)
    assert groups[0].members[0].row.names == ["cat", "dog"]
    same = opened.near_duplicates(1, progress=False)
    assert [m.row.id for m in same[0].members] == ["copy", "it's/9"]
    assert len(same) == 1


def test_near_duplicates_are_those_of_brute_force(opened):
    found = vectors(300).astype(np.float64)
    units = found / np.linalg.norm(found, axis=1, keepdims=True)
    cosines = units @ units.T
    np.fill_diagonal(cosines, -1)
    group = list(range(300))
    for a, b in np.argwhere(cosines >= 0.7):
        old, new = group[a], group[b]
        group = [new if number == old else number for number in group]
    expected: dict = {}
    for number, root in enumerate(group):
        expected.setdefault(root, set()).add(f"it's/{number}")
    groups = opened.near_duplicates(0.7, progress=False)
    assert {frozenset(m.row.id for m in g.members) for g in groups} == {
        frozenset(ids) for ids in expected.values() if len(ids) > 1
    }
    for member in groups[0].members:
        number = int(member.row.id.partition("/")[2])
        assert abs(member.score - cosines[number].max()) < 1e-5


@pytest.mark.parametrize("threshold", [0, 1.01, float("nan")])
def test_a_threshold_is_a_cosine(opened, threshold):
    with pytest.raises(errors.DatasetError, match="Received"):
        opened.near_duplicates(threshold)


CHILD = """
import os, signal, sys
from bit_tf import index, index_rows, ivf_pq

action, vectors, directory, moment = sys.argv[1:]
def die(*args, **options):
    os.kill(os.getpid(), signal.SIGKILL)
if moment == "entered":
    ivf_pq.keep = die
elif moment == "chunk":
    index_rows._CHUNK = 1000
    stored = index_rows._Known.judge
    calls = []
    def judge(*args):
        calls.append(1)
        if len(calls) == 3:
            die()
        return stored(*args)
    index_rows._Known.judge = judge
getattr(index, action)(vectors, directory, progress=False)
"""


def child(*arguments, **options):
    return subprocess.Popen(
        [sys.executable, "-c", CHILD, *map(str, arguments)], **options
    )


@pytest.mark.parametrize(
    "moment", [pytest.param("chunk", marks=pytest.mark.slow), "entered"]
)
def test_killed_while_it_is_built(tmp_path, moment):
    write(tmp_path / "vectors", rows(0, 60), per_file=20)
    target = tmp_path / "index"
    process = child("build", tmp_path / "vectors", target, moment)
    assert process.wait(60) == -signal.SIGKILL
    assert not target.exists()
    assert any(".tmp" in name for name in os.listdir(tmp_path))
    index.build(tmp_path / "vectors", target)
    assert len(index.open(target)) == 60
    assert sorted(os.listdir(tmp_path)) == ["index", "index.lock", "vectors"]


@pytest.mark.parametrize(
    "moment", ["chunk", pytest.param("entered", marks=pytest.mark.slow)]
)
def test_killed_while_it_is_added_to(tmp_path, moment):
    write(tmp_path / "vectors", rows(0, 10))
    target = tmp_path / "index"
    index.build(tmp_path / "vectors", target)
    changed = [row._replace(sha256="e" * 64) for row in rows(0, 5)]
    write(tmp_path / "more", [*changed, *rows(10, 60)], per_file=20)
    process = child("add", tmp_path / "more", target, moment)
    assert process.wait(60) == -signal.SIGKILL
    after = index.open(target)
    assert len(after.search(vectors(1)[0], k=99)) == 10
    assert after.row("it's/3").sha256 != "e" * 64
    counts = index.add(tmp_path / "more", target)
    assert dataclasses.astuple(counts) == (50, 5, 0, 0)
    assert len(index.open(target)) == 60


@pytest.mark.slow
def test_two_at_once(tmp_path):
    write(tmp_path / "vectors", rows(0, 10))
    write(tmp_path / "one", rows(10, 40))
    write(tmp_path / "two", rows(40, 70))
    target = tmp_path / "index"
    index.build(tmp_path / "vectors", target)
    processes = [
        child("add", tmp_path / name, target, "never")
        for name in ("one", "two")
    ]
    assert [process.wait(60) for process in processes] == [0, 0]
    found = index.open(target).search(vectors(1)[0], k=99)
    assert {hit.row.width for hit in found} == set(range(70))


def test_a_second_waits_for_the_first(tmp_path):
    write(tmp_path / "vectors", rows(0, 10))
    write(tmp_path / "more", rows(10, 40))
    target = tmp_path / "index"
    index.build(tmp_path / "vectors", target)
    with index._lock(str(target)):
        process = child(
            *("add", tmp_path / "more", target, "never"),
            stderr=subprocess.PIPE,
            text=True,
        )
        assert "Waiting" in process.stderr.readline()
        assert process.poll() is None
        assert len(index.open(target)) == 10
    process.communicate(timeout=60)
    assert process.returncode == 0
    assert len(index.open(target)) == 40


@pytest.mark.slow
def test_killed_at_any_moment(tmp_path):
    write(tmp_path / "vectors", rows(0, 10))
    write(tmp_path / "more", rows(10, 3000), per_file=100)
    target = tmp_path / "index"
    index.build(tmp_path / "vectors", target)
    rng = np.random.default_rng(0)
    for _ in range(12):
        process = child("add", tmp_path / "more", target, "never")
        try:
            process.wait(rng.uniform(0.8, 2.5))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        assert len(index.open(target)) in (10, 3000)
        if len(index.open(target)) == 3000:
            index.build(tmp_path / "vectors", target, overwrite=True)
    index.add(tmp_path / "more", target)
    assert len(index.open(target)) == 3000


def test_benchmark_in_small(few, tmp_path):
    settings = search.Settings(
        rows=1000, dim=16, clusters=10, queries=20, exact_queries=4
    )
    result = search.run(settings, tmp_path)
    assert result.indexed == 1000
    assert result.recall > 0.9
    assert result.vector_bytes == 64_000
    assert "recall@10" in search.table(settings, result)


def test_needs_its_extra(monkeypatch, tmp_path):
    write(tmp_path / "vectors", rows(0, 1))
    monkeypatch.setitem(sys.modules, "lancedb", None)
    with pytest.raises(errors.MissingExtraError, match=r"bit-tf\[index\]"):
        index.build(tmp_path / "vectors", tmp_path / "index")
