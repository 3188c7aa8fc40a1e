"""`bit-tf index` and `bit-tf search`, from pictures to a page."""

import dataclasses
import io
import json
import re
import subprocess
import sys

import helpers
import numpy as np
import pytest
from PIL import Image

from bit_tf import embed_model, embedding_table, index
from bit_tf.embedding_table import Row

pytest.importorskip("lancedb", reason="no lancedb; pip install 'bit-tf[index]'")


@pytest.fixture(scope="module")
def folder(tmp_path_factory, small_export):
    """Twelve pictures, their vectors, and an index of them."""
    path = tmp_path_factory.mktemp("search")
    encoder = embed_model.Encoder(small_export, "tfhub", top=2)
    found = []
    for number in range(12):
        name = path / f"photo{number}.png"
        pixels = helpers.random_images(1, 40, 40 + number, seed=number)[0]
        Image.fromarray(pixels).save(name)
        prepared = encoder.prepare(name.read_bytes())
        (encoded,) = encoder.encode([prepared])
        row = Row(
            id=f"picture {number}",
            source=str(name),
            sha256=prepared.sha256,
            width=prepared.width,
            height=prepared.height,
            embedding=encoded.embedding,
            names=encoded.names,
            scores=encoded.scores,
        )
        found.append(row)
    found.append(found[3]._replace(id="copy of 3"))
    found.append(Row("bad", "bad.png", error="no picture"))
    (path / "vectors").mkdir()
    embedding_table.write(
        path / "vectors" / "part-00000.parquet", found, encoder.facts()
    )
    index.build(path / "vectors", path / "index", progress=False)
    return path


def lines(text):
    return [json.loads(line) for line in text.splitlines()]


def test_build_add_stats(call, folder, tmp_path):
    target = tmp_path / "index"
    vectors = folder / "vectors"
    code, out, err = call(
        "bit-tf", "index", "build", vectors, "--index", target
    )
    assert (code, err) == (0, "")
    assert out == (
        "13 added, 0 replaced, 0 there already, 1 without a vector left out\n"
    )
    code, out, err = call(
        "bit-tf", "index", "build", vectors, "--index", target
    )
    assert (code, out) == (1, "")
    assert "--overwrite" in err
    code, out, _ = call(
        *("bit-tf", "index", "build", vectors, "--index", target),
        *("--overwrite", "--json"),
    )
    assert json.loads(out)["added"] == 13
    code, out, _ = call(
        "bit-tf", "index", "add", vectors, "--index", target, "--json"
    )
    assert json.loads(out) == {
        "added": 0,
        "replaced": 0,
        "same": 13,
        "errors": 1,
    }
    code, out, _ = call("bit-tf", "index", "stats", "--index", target)
    assert code == 0
    assert re.search(r"^rows +13$", out, re.MULTILINE)
    assert re.search(r"^preset +tfhub$", out, re.MULTILINE)
    assert "exact" in out
    code, out, _ = call("bit-tf", "index", "stats", "--index", target, "--json")
    stats = json.loads(out)
    assert stats["rows"] == 13
    assert stats["facts"]["dim"] == 1024
    assert stats["facts"]["preset"]["name"] == "tfhub"


@pytest.mark.parametrize("query", ["path", "stdin", "id"])
def test_search(call, folder, monkeypatch, tmp_path, query):
    argument = folder / "photo5.png"
    if query == "stdin":
        stdin = io.TextIOWrapper(io.BytesIO(argument.read_bytes()))
        monkeypatch.setattr(sys, "stdin", stdin)
        argument = "-"
    elif query == "id":
        argument = "id:picture 5"
    page = tmp_path / "out.html"
    code, out, err = call(
        *("bit-tf", "search", argument, "--index", folder / "index"),
        *("-k", "4", "--json", "--html", page),
    )
    assert (code, err) == (0, "")
    hits = lines(out)
    assert len(hits) == 4
    assert (hits[0]["id"], hits[0]["width"]) == ("picture 5", 45)
    assert hits[0]["score"] == pytest.approx(1, abs=1e-6)
    scores = [hit["score"] for hit in hits]
    assert scores == sorted(scores, reverse=True)
    assert len(hits[0]["names"]) == len(hits[0]["scores"]) == 2
    assert page.read_text().count("data:image/jpeg;base64") == 5


def test_a_query_is_as_precise_as_the_index(
    call, folder, small_export, tmp_path
):
    encoder = embed_model.Encoder(small_export, "tfhub", precision="bfloat16")
    source = folder / "photo5.png"
    prepared = encoder.prepare(source.read_bytes())
    (encoded,) = encoder.encode([prepared])
    row = Row("a", str(source), prepared.sha256, 45, 40, encoded.embedding)
    (tmp_path / "vectors").mkdir()
    embedding_table.write(
        tmp_path / "vectors" / "part-0.parquet", [row], encoder.facts()
    )
    target = tmp_path / "index"
    code, out, _ = call(
        *("bit-tf", "index", "build", tmp_path / "vectors"),
        *("--index", target),
    )
    assert code == 0
    assert (
        "bfloat16 in convolutions"
        in call("bit-tf", "index", "stats", "--index", target)[1]
    )
    _, out, _ = call("bit-tf", "search", source, "--index", target, "--json")
    (hit,) = lines(out)
    # Of a float32 query it would be less by 1e-5.
    assert hit["score"] == pytest.approx(1, abs=1e-6)


def test_search_prints_names_and_filters(call, folder):
    code, out, _ = call(
        *("bit-tf", "search", "id:picture 3", "--index", folder / "index"),
        *("--where", "width > 42 AND id LIKE '%3'"),
    )
    assert code == 0
    first, second = out.splitlines()
    assert re.fullmatch(r"  1\.0000  copy of 3  [a-j]", first)
    assert re.fullmatch(r"  1\.0000  picture 3  [a-j]", second)
    code, out, err = call(
        *("bit-tf", "search", "id:picture 3", "--index", folder / "index"),
        *("--where", "wide > 42"),
    )
    assert (code, out) == (1, "")
    assert "width" in err
    assert "Traceback" not in err


def test_search_errors(call, folder, tmp_path):
    text = tmp_path / "notes.txt"
    text.write_text("no picture")
    for arguments, said in (
        ([text, "--index", folder / "index"], "notes.txt"),
        ([tmp_path / "none.png", "--index", folder / "index"], "none.png"),
        (["id:nobody", "--index", folder / "index"], "nobody"),
        ([folder / "photo5.png", "--index", tmp_path / "no"], "index build"),
    ):
        code, out, err = call("bit-tf", "search", *arguments)
        assert (code, out) == (1, "")
        assert said in err
        assert err.startswith("bit-tf: error: ")
    code, *_ = call("bit-tf", "search", "x", "--index", "y", "-k", "0")
    assert code == 2


def test_another_model_is_refused(call, folder, small_export, tmp_path):
    """The handle leads to another model than when the index was made."""
    facts = index.open(folder / "index").facts
    other = dataclasses.replace(facts, model_hash="0" * 64)
    vectors = tmp_path / "part.parquet"
    row = index.open(folder / "index").row("picture 5")
    embedding_table.write(vectors, [row], other)
    index.build(vectors, tmp_path / "index")
    photo = folder / "photo5.png"
    for more in ([], ["--model", small_export]):
        code, out, err = call(
            *("bit-tf", "search", photo, "--index", tmp_path / "index"), *more
        )
        assert (code, out) == (1, "")
        assert "000000000000" in err
        assert facts.model_hash[:12] in err
    # What is in the index needs no model.
    code, out, _ = call(
        *("bit-tf", "search", "id:picture 5"), *("--index", tmp_path / "index")
    )
    assert code == 0
    assert "picture 5" in out


def test_the_model_may_have_moved(call, folder, small_export, tmp_path):
    moved = tmp_path / "moved"
    moved.symlink_to(small_export)
    code, out, _ = call(
        *("bit-tf", "search", folder / "photo5.png", "-k", "1", "--json"),
        *("--index", folder / "index", "--model", moved),
    )
    assert code == 0
    assert lines(out)[0]["id"] == "picture 5"


def test_duplicates(call, folder, tmp_path):
    page = tmp_path / "out.html"
    arguments = [
        *("bit-tf", "index", "duplicates", "--index", folder / "index"),
        *("--threshold", "0.99999", "--html", page),
    ]
    code, out, _ = call(*arguments)
    assert code == 0
    assert out == (
        "group 1: 2 pictures\n"
        "    1.0000  copy of 3  (same file)\n"
        "    1.0000  picture 3  (same file)\n"
    )
    assert page.read_text().count("data:image/jpeg;base64") == 2
    _, out, _ = call(*arguments, "--json")
    (group,) = lines(out)
    assert [member["id"] for member in group["members"]] == [
        "copy of 3",
        "picture 3",
    ]
    assert group["members"][0]["same_file"] is True
    for threshold in ("0", "1.5", "nan", "x"):
        code, *_ = call(*arguments, "--threshold", threshold)
        assert code == 2


def test_no_duplicates(call, folder, tmp_path):
    opened = index.open(folder / "index")
    some = [opened.row(f"picture {number}") for number in range(2)]
    embedding_table.write(tmp_path / "two.parquet", some, opened.facts)
    index.build(tmp_path / "two.parquet", tmp_path / "index", progress=False)
    code, out, err = call(
        *("bit-tf", "index", "duplicates", "--index", tmp_path / "index"),
        *("--threshold", "1"),
    )
    assert (code, out) == (0, "")
    assert err == "No two of 2 pictures have a cosine of 1 or more.\n"


def test_a_page_that_cannot_be_written(call, folder, tmp_path):
    code, _, err = call(
        *("bit-tf", "search", "id:picture 3", "--index", folder / "index"),
        *("--html", tmp_path / "none" / "out.html"),
    )
    assert code == 1
    assert "none" in err


@pytest.mark.slow
def test_a_process_ends_cleanly(folder):
    """Warnings are errors, and LanceDB's threads do not hold it up."""
    found = subprocess.run(
        [
            *(sys.executable, "-W", "error", "-m", "bit_tf", "search"),
            *("id:picture 1", "--index", folder / "index", "-k", "1"),
        ],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert found.stderr == ""
    assert "picture 1" in found.stdout


def test_vectors_are_those_of_the_model(folder, small_export):
    row = index.open(folder / "index").row("picture 2")
    encoder = embed_model.Encoder(small_export, "tfhub")
    data = (folder / "photo2.png").read_bytes()
    (encoded,) = encoder.encode([encoder.prepare(data)])
    assert helpers.relative_error(row.embedding, encoded.embedding) < 1e-6
    assert np.all(np.isfinite(row.embedding))
