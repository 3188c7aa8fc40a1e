import io
import json
import os
import re
import signal
import subprocess
import sys
import time

import helpers
import numpy as np
import pytest
import tiny_models
from file_server import FileServer, Reply, running
from PIL import Image

from bit_tf import embed, embedding_table, items

pytest.importorskip(
    "pyarrow", reason="no pyarrow; pip install 'bit-tf[parquet]'"
)
from pyarrow import dataset, parquet

PRESET = "big_transfer eval 128"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_models.save(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "in"
    (folder / "below").mkdir(parents=True)
    for number in range(6):
        pixels = helpers.random_images(1, 20, 30, seed=number)[0]
        below = "below" if number % 2 else "."
        Image.fromarray(pixels).save(folder / below / f"{number}.png")
    return folder


@pytest.fixture
def no_proxy(monkeypatch):
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


@pytest.fixture
def embedded(call, model):
    def run(*arguments):
        options = ("--model", model, "--preset", PRESET)
        return call("bit-tf", "embed", *arguments, *options)

    return run


def test_a_directory(embedded, folder, tmp_path):
    out = tmp_path / "out"
    code, stdout, stderr = embedded(folder, "--output", out, "--shard", 4)
    assert (code, stdout) == (0, "")
    assert "6 images: 6 encoded, 0 duplicates, 0 errors" in stderr
    assert sorted(os.listdir(out)) == [
        *("_embed.lock", "_embed.sqlite"),
        *("part-00000.parquet", "part-00001.parquet"),
    ]
    assert dataset.dataset(str(out)).to_table().num_rows == 6
    code, stdout, _ = embedded(folder, "--output", out, "--json")
    summary = json.loads(stdout)
    assert code == 0
    assert (summary["skipped"], summary["encoded"]) == (6, 0)

    (folder / "bad.png").write_bytes(b"not a picture")
    code, stdout, stderr = embedded(folder, "--output", out, "--json")
    assert code == 1
    assert json.loads(stdout)["errors"] == 1
    assert embedded(folder, "--output", out)[0] == 0
    assert embedded(folder, "--output", out, "--retry-errors")[0] == 1
    code, _, stderr = embedded(
        *(folder, "--output", out, "--overwrite"),
        *("--float16", "--precision", "bfloat16"),
    )
    assert code == 1
    assert "7 images: 6 encoded" in stderr
    facts = embedding_table.read_facts(out)
    assert facts.float16
    assert facts.precision == "bfloat16"


def test_another_preset_is_refused(call, model, embedded, folder, tmp_path):
    out = tmp_path / "out"
    embedded(folder, "--output", out)
    code, _, stderr = call(
        *("bit-tf", "embed", folder, "--output", out),
        *("--model", model, "--preset", "tfhub"),
    )
    assert code == 1
    assert "bit-tf: error: Vectors of one table" in stderr
    assert "--overwrite" in stderr


def test_options_reach_the_reader(embedded, folder, tmp_path, monkeypatch):
    made = []
    reader = items.Reader

    def noted(**options):
        made.append(options)
        return reader(**options)

    monkeypatch.setattr(items, "Reader", noted)
    options = ("--connections", 3, "--per-host", 2, "--retries", 0)
    for output in (tmp_path / "out", "-"):
        code, _, _ = embedded(
            folder, "--output", output, *options, "--timeout", 1.5
        )
        assert code == 0
    assert (
        made
        == [{"connections": 3, "per_host": 2, "retries": 0, "timeout": 1.5}] * 2
    )


def test_the_column_of_a_list(embedded, folder, tmp_path):
    table = tmp_path / "list.csv"
    table.write_text("a,b\nin/0.png,in/2.png\n")
    out = tmp_path / "out"
    code, _, _ = embedded(table, "--output", out, "--column", "b")
    assert code == 0
    found = dataset.dataset(str(out)).to_table().column("id").to_pylist()
    assert found == [str(folder / "2.png")]


@pytest.mark.parametrize("kind", ["lines", "npy", "parquet"])
def test_sources_without_a_directory(kind, embedded, model, folder, tmp_path):
    listed = tmp_path / "list.txt"
    listed.write_text("in/0.png\nin/none.png\n")
    single = folder / "2.png"
    sources = [folder / "below", listed, single, folder / "[4-5].png"]
    if kind == "npy":
        sources.remove(listed)
    output = "-" if kind == "lines" else tmp_path / f"x.{kind}"
    code, stdout, stderr = embedded(*sources, "--output", output)
    names = [
        *(f"below/{number}.png" for number in (1, 3, 5)),
        *(["0.png", "none.png"] if kind != "npy" else []),
        *("2.png", "4.png"),
    ]
    assert code == (0 if kind == "npy" else 1)
    assert ("none.png" in stderr) == (kind != "npy")
    encoder = embed.ImageEncoder(model, PRESET)
    expected = [
        encoder.encode(folder / name) for name in names if name != "none.png"
    ]
    if kind == "npy":
        found = np.load(output)
    else:
        if kind == "lines":
            rows = [json.loads(line) for line in stdout.splitlines()]
        else:
            rows = parquet.read_table(output).to_pylist()
        assert [row["source"] for row in rows] == [
            str(folder / name) for name in names
        ]
        bad = [row for row in rows if row.get("error")]
        assert [row["source"][-8:] for row in bad] == ["none.png"]
        found = [row["embedding"] for row in rows if not row.get("error")]
    assert helpers.relative_error(found, expected) <= 1e-5


def test_an_output_in_capitals(embedded, folder, tmp_path):
    for name in ("X.NPY", "X.Parquet"):
        assert embedded(folder, "--output", tmp_path / name)[0] == 0
    assert np.load(tmp_path / "X.NPY").shape == (6, 8)
    assert parquet.read_table(tmp_path / "X.Parquet").num_rows == 6


def test_options_hold_for_a_url_that_is_given(embedded, no_proxy):
    with running(FileServer) as server:
        server.reply = lambda method, path: Reply(503)
        start = time.monotonic()
        code, stdout, _ = embedded(f"{server.url}/a.png", "--retries", 0)
        assert code == 1
        assert "503" in json.loads(stdout)["error"]
        assert len(server.seen) == 1
        embedded(f"{server.url}/a.png", "--retries", 1)
        assert len(server.seen) == 3
        assert time.monotonic() - start < 10


@pytest.mark.parametrize("option", ["--column", "--split"])
@pytest.mark.parametrize("output", ["-", "out"])
def test_options_without_a_use(option, output, embedded, folder, tmp_path):
    output = output if output == "-" else tmp_path / output
    code, _, stderr = embedded(folder, "--output", output, option, "x")
    assert code == 1
    assert f"{option} (" in stderr
    assert not (tmp_path / "out").exists()


def test_the_first_errors_are_shown(embedded, folder, tmp_path):
    for number in range(7):
        (folder / f"bad{number}.png").write_bytes(b"none %d" % number)
    out = tmp_path / "out"
    code, _, stderr = embedded(folder, "--output", out, "--shard", 4)
    assert code == 1
    shown = re.findall(r"bit-tf: error: .*/(bad[0-9])\.png: ", stderr)
    assert shown == [f"bad{number}" for number in range(5)]
    assert "2 other errors" in stderr
    code, _, stderr = embedded(folder, "--output", out)
    assert code == 0
    assert "13 done before, of them 7 with an error" in stderr
    assert "bad0" not in stderr


def test_standard_input(embedded, folder, tmp_path, monkeypatch):
    data = (folder / "0.png").read_bytes()
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
    code, stdout, _ = embedded("-")
    assert code == 0
    assert json.loads(stdout)["source"] == "-"
    code, _, stderr = embedded("-", "--output", tmp_path / "out")
    assert code == 1
    assert "stdin" in stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "option",
    [
        *(("--shard", 3), ("--float16",), ("--top", 0), ("--retry-errors",)),
        *(("--overwrite",), ("--json",), ("--runner", "DirectRunner")),
    ],
    ids=lambda option: option[0],
)
def test_options_of_directories(option, embedded, folder):
    code, _, stderr = embedded(folder, *option)
    assert code == 1
    assert f"{option[0]} needs --output DIR" in stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ("--output", ""),
        ("--output", "x.csv"),
        ("--output", "/none/such/x.parquet"),
        ("--top", "-1"),
        ("--shard", "0"),
        ("--connections", "0"),
        *(("--timeout", text) for text in ("0", "-1", "nan", "inf", "1e10")),
        ("--direct_num_workers=2",),
    ],
    ids=" ".join,
)
def test_wrong_usage(arguments, embedded, folder):
    code, stdout, stderr = embedded(folder, *arguments)
    assert code == 2
    assert stdout == ""
    assert "usage:" in stderr


def test_an_output_that_cannot_be(embedded, folder, tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    code, _, stderr = embedded(folder, "--output", file)
    assert code == 1
    assert "--output is a directory" in stderr
    assert file.read_text() == ""


def test_a_runner_takes_over(embedded, folder, tmp_path, monkeypatch):
    pytest.importorskip(
        "apache_beam", reason="no Beam; pip install 'bit-tf[beam]'"
    )
    from bit_tf import bulk, embed_run

    called = []

    def run(sources, output, **options):
        called.append((sources, output, options))
        return embed_run.Summary(images=3, encoded=3, seconds=1.0)

    monkeypatch.setattr(bulk, "run", run)
    code, _, stderr = embedded(
        *(folder, "--output", tmp_path / "out", "--runner", "DirectRunner"),
        *("--direct_num_workers=2", "--batch", 4),
    )
    assert code == 0
    assert "3 encoded" in stderr
    ((sources, output, options),) = called
    assert (sources, output) == ([str(folder)], str(tmp_path / "out"))
    assert options["beam_options"] == [
        *("--runner=DirectRunner", "--direct_num_workers=2"),
    ]
    assert (options["batch"], options["preset"]) == (4, PRESET)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stopped_by_a_signal(number, model, folder, tmp_path):
    many = tmp_path / "many"
    many.mkdir()
    for index in range(600):
        pixels = helpers.random_images(1, 8, 8, seed=index)[0]
        Image.fromarray(pixels).resize((200, 200)).save(many / f"{index}.png")
    out = tmp_path / "out"
    command = [sys.executable, "-m", "bit_tf", "embed", str(many)]
    command += ["--output", str(out), "--model", str(model), "--shard", "16"]
    command += ["--preset", "big_transfer eval"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    while not (out / "part-00001.parquet").exists():
        assert process.poll() is None
        time.sleep(0.01)
    start = time.monotonic()
    process.send_signal(number)
    _, stderr = process.communicate(timeout=120)
    assert time.monotonic() - start < 60
    assert process.returncode == (1 if number == signal.SIGINT else 143)
    found = re.search(r"Stopped: (\d+) of 600 images are done", stderr)
    assert found, stderr
    assert "Traceback" not in stderr
    table = dataset.dataset(str(out)).to_table()
    assert table.num_rows == int(found[1])
    assert not [name for name in os.listdir(out) if "tmp" in name]
