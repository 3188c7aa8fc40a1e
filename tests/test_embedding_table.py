import dataclasses
import os

import numpy as np
import pytest

from bit_tf import embedding_table, errors, presets
from bit_tf.embedding_table import Facts, Row

arrow = pytest.importorskip(
    "pyarrow", reason="no pyarrow; pip install 'bit-tf[parquet]'"
)
from pyarrow import dataset, parquet  # noqa: E402

FACTS = Facts(
    model="https://example.org/m",
    model_hash="0123456789abcdef" * 4,
    preset=presets.preset("timm in21k"),
    version="1.2.3",
    dim=6,
)


def rows(facts, count=5, seed=0):
    """Rows of which the second has an error."""
    random = np.random.default_rng(seed)
    found = []
    for number in range(count):
        vector = random.normal(size=facts.dim).astype(np.float32)
        found.append(
            Row(
                f"id {number}",
                f"source {number}",
                "ab" * 32,
                number + 1,
                number + 2,
                vector,
                ["cat", "dog"] if facts.top else None,
                [0.75, 0.25] if facts.top else None,
            )
        )
    if count > 1:
        found[1] = Row("id 1", "source 1", error="It is none.")
    return found


def same(found, expected, facts):
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert one._replace(embedding=None) == other._replace(embedding=None)
        assert (one.embedding is None) == (other.embedding is None)
        if one.embedding is not None:
            assert one.embedding.dtype == np.float32
            kind = np.float16 if facts.float16 else np.float32
            kept = other.embedding.astype(kind).astype(np.float32)
            assert np.array_equal(one.embedding, kept)


def test_a_vector_has_a_length():
    found = FACTS.schema()
    place = found.get_field_index("embedding")
    field = arrow.field("embedding", arrow.list_(arrow.float32()))
    found = found.set(place, field)
    for dim in (b"-1", b"0"):
        changed = found.with_metadata(found.metadata | {b"dim": dim})
        with pytest.raises(errors.DatasetError, match="dim"):
            Facts.of(changed)


def test_a_flipped_bit_is_noticed(tmp_path):
    path = tmp_path / "part-00000.parquet"
    embedding_table.write(path, rows(FACTS), FACTS)
    data = bytearray(path.read_bytes())
    vector = rows(FACTS)[3].embedding.tobytes()
    place = data.find(vector[:8])
    assert place > 0
    data[place] ^= 1
    path.write_bytes(data)
    with pytest.raises((OSError, arrow.ArrowException)):
        embedding_table.parquet_file(path).read()


@pytest.mark.parametrize("float16", [False, True])
@pytest.mark.parametrize("top", [0, 2])
@pytest.mark.parametrize("count", [0, 1, 5, 600])
def test_what_is_written_is_read(float16, top, count, tmp_path):
    precision = "bfloat16" if top else "float32"
    facts = dataclasses.replace(
        FACTS, float16=float16, top=top, precision=precision
    )
    expected = rows(facts, count)
    path = tmp_path / "part-00000.parquet"
    embedding_table.write(path, iter(expected), facts)
    same(embedding_table.rows_of(parquet.read_table(path)), expected, facts)
    assert embedding_table.read_facts(path) == facts
    assert embedding_table.read_facts(tmp_path) == facts
    file = parquet.ParquetFile(path)
    assert file.num_row_groups == -(-count // embedding_table.ROW_GROUP)
    assert os.listdir(tmp_path) == ["part-00000.parquet"]


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"embedding": None}, "no vector"),
        ({"embedding": np.ones(1)}, r"\(1,\)"),
        ({"embedding": np.ones([1, 6])}, r"\(1, 6\)"),
        ({"embedding": np.ones(5)}, r"\(5,\)"),
    ],
    ids=["none", "one", "matrix", "short"],
)
def test_rows_of_another_form_are_refused(change, what):
    row = rows(FACTS, 1)[0]._replace(**change)
    with pytest.raises(errors.DatasetError, match=what):
        embedding_table.record_batch([row], FACTS)


def test_no_infinity_is_written():
    facts = dataclasses.replace(FACTS, float16=True)
    found = rows(facts, 4)
    for row, value in zip(found[2:], [np.inf, 65520], strict=True):
        row.embedding[2] = value
    found[0].embedding[2] = 65519
    batch = embedding_table.record_batch(found, facts)
    read = embedding_table.rows_of(batch)
    assert [row.error is None for row in read] == [True, False, False, False]
    assert read[0].embedding[2] == 65504


@pytest.mark.parametrize("dim", [0, -1])
def test_a_table_has_numbers(dim):
    schema = FACTS.schema().remove(5)
    kind = arrow.list_(arrow.float32())
    schema = schema.insert(5, arrow.field("embedding", kind))
    metadata = {**schema.metadata, b"dim": str(dim).encode()}
    with pytest.raises(errors.DatasetError, match=f"dim {dim}"):
        Facts.of(schema.with_metadata(metadata))


def test_parts_are_in_the_order_of_their_numbers(tmp_path):
    names = [f"part-{n:05d}.parquet" for n in (0, 9, 99_999, 100_000, 200_000)]
    for name in reversed([*names, "part-a-1.parquet", "part-b-0.parquet"]):
        (tmp_path / name).touch()
    found = [
        os.path.basename(path) for path in embedding_table.part_paths(tmp_path)
    ]
    assert found == [*names, "part-a-1.parquet", "part-b-0.parquet"]


def test_the_columns():
    schema = dataclasses.replace(FACTS, top=3).schema()
    assert [(field.name, str(field.type)) for field in schema] == [
        ("id", "string"),
        ("source", "string"),
        ("sha256", "string"),
        ("width", "int32"),
        ("height", "int32"),
        ("embedding", "fixed_size_list<item: float>[6]"),
        ("names", "list<item: string>"),
        ("scores", "list<item: float>"),
        ("error", "string"),
    ]
    assert schema.metadata[b"model"] == b"https://example.org/m"
    assert schema.metadata[b"dim"] == b"6"
    assert schema.metadata[b"preset"] == b"timm in21k"
    half = dataclasses.replace(FACTS, float16=True).schema()
    assert "halffloat" in str(half.field("embedding").type)
    assert "names" not in half.names


def test_a_directory_is_one_table_without_private_files(tmp_path):
    for number in range(3):
        path = tmp_path / f"part-{number:05d}.parquet"
        embedding_table.write(path, rows(FACTS, 4, seed=number), FACTS)
    (tmp_path / "_embed.sqlite").write_bytes(b"of another kind")
    (tmp_path / "_embed.lock").write_bytes(b"")
    table = dataset.dataset(tmp_path).to_table()
    assert table.num_rows == 12
    bad = table.filter(dataset.field("error").is_valid())
    assert bad.column("embedding").to_pylist() == [[None] * 6] * 3
    assert embedding_table.part_paths(tmp_path) == [
        str(tmp_path / f"part-{number:05d}.parquet") for number in range(3)
    ]


def test_shards_that_differ(tmp_path):
    other = dataclasses.replace(FACTS, model_hash="f" * 64, model="other")
    embedding_table.write(tmp_path / "part-0.parquet", rows(FACTS), FACTS)
    embedding_table.write(tmp_path / "part-1.parquet", rows(other), other)
    with pytest.raises(errors.DatasetError, match=r"ffffffffffff.*part-1"):
        embedding_table.read_facts(tmp_path)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"model_hash": "f" * 64}, "model"),
        ({"preset": presets.preset("tfhub")}, "preset"),
        ({"dim": 7}, "d 6"),
        ({"float16": True}, "float16"),
        ({"top": 5}, "classes"),
        ({"precision": "bfloat16"}, "precision float32.*precision bfloat16"),
    ],
    ids=["model", "preset", "dim", "float16", "top", "precision"],
)
def test_other_facts_are_refused(change, named):
    other = dataclasses.replace(FACTS, **change)
    with pytest.raises(errors.DatasetError, match=named) as raised:
        FACTS.require_same(other, "The index", "Build another.")
    assert "The index" in str(raised.value)
    assert "Build another." in str(raised.value)
    other.require_same(other, "x", "y")


def test_the_same_model_elsewhere_is_the_same():
    other = dataclasses.replace(FACTS, model="/elsewhere", version="9")
    FACTS.require_same(other, "x", "y")


def test_files_that_are_no_tables(tmp_path):
    good = tmp_path / "good.parquet"
    embedding_table.write(good, rows(FACTS), FACTS)
    foreign = tmp_path / "foreign.parquet"
    parquet.write_table(arrow.table({"id": ["a"]}), foreign)
    changed = tmp_path / "changed.parquet"
    table = parquet.read_table(good)
    parquet.write_table(table.drop_columns(["sha256"]), changed)
    preset = tmp_path / "preset.parquet"
    parquet.write_table(
        table.replace_schema_metadata(
            {**table.schema.metadata, b"preset_json": b'{"name": 3}'}
        ),
        preset,
    )
    short = tmp_path / "short.parquet"
    short.write_bytes(good.read_bytes()[:-20])
    empty = tmp_path / "empty"
    empty.mkdir()
    missing = tmp_path / "none.parquet"
    for path in (foreign, changed, preset, short, empty, missing):
        with pytest.raises(errors.DatasetError, match=path.name):
            embedding_table.read_facts(path)


def test_a_failure_leaves_what_was_there(tmp_path):
    path = tmp_path / "part-00000.parquet"
    embedding_table.write(path, rows(FACTS), FACTS)
    before = path.read_bytes()

    def broken():
        yield from rows(FACTS)
        raise OSError("no more")

    with pytest.raises(OSError, match="no more"):
        embedding_table.write(path, broken(), FACTS)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == [path.name]
