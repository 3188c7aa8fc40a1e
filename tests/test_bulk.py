"""Vectors by Apache Beam: the same rows, whatever runs the pipeline."""

import hashlib
import json
import os
import pathlib
import shutil
import subprocess
import sys

import helpers
import numpy as np
import pytest
from PIL import Image

from bit_tf import errors, presets

SMALL = presets.Preset(
    name="small",
    resize="squash",
    size=32,
    crop=None,
    method="bilinear",
    antialias=False,
    source="these tests",
)
IN_MEMORY = ["--runner=DirectRunner"]
PROCESSES = [
    "--runner=DirectRunner",
    "--direct_num_workers=2",
    "--direct_running_mode=multi_processing",
]
PORTABLE = ["--runner=PortableRunner", "--job_endpoint=embed"]
# Of pictures, and of those that are none.
GOOD, BAD = 20, 3


@pytest.fixture(scope="module", autouse=True)
def extras():
    for name, extra in (("apache_beam", "beam"), ("pyarrow", "parquet")):
        pytest.importorskip(
            name, reason=f"needs {name}: pip install 'bit-tf[{extra}]'"
        )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Pictures, and files that are none."""
    path = tmp_path_factory.mktemp("pictures")
    for index in range(GOOD):
        pixels = helpers.random_images(1, 40, 30 + index % 3, seed=index)[0]
        Image.fromarray(pixels).save(path / f"{index:02}.png")
    (path / "empty.jpg").write_bytes(b"")
    (path / "text.png").write_bytes(b"no picture")
    whole = (path / "00.png").read_bytes()
    (path / "cut.png").write_bytes(whole[: len(whole) // 2])
    return path


@pytest.fixture(scope="module")
def run(small_export, folder):
    """bulk.run with a small model, preset and batch; it stays loaded."""
    from bit_tf import bulk, bulk_steps

    forget = bulk_steps.forget

    def call(output, sources=(folder,), beam_options=IN_MEMORY, **arguments):
        arguments = {
            "model": small_export,
            "preset": SMALL,
            "batch": 4,
            "shard": 8,
            **arguments,
        }
        return bulk.run(
            list(map(str, sources)),
            output,
            beam_options=beam_options,
            **arguments,
        )

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bulk_steps, "forget", lambda: None)
        yield call
    forget()


@pytest.fixture(scope="module")
def finished(run, tmp_path_factory):
    """(directory, summary) of a run in memory."""
    output = tmp_path_factory.mktemp("bulk") / "vectors"
    return output, run(output)


def rows(output):
    """The rows of a directory, by id."""
    from pyarrow import dataset

    from bit_tf import embedding_table

    found = embedding_table.rows_of(dataset.dataset(output).to_table())
    by_id = {row.id: row for row in found}
    assert len(by_id) == len(found)
    return by_id


def same(first, second):
    """Whether two tables have the same rows, vectors to 1e-5."""
    assert first.keys() == second.keys()
    for name, row in first.items():
        other = second[name]
        assert row[:5] == other[:5]
        assert row.error == other.error
        assert row.names == other.names
        if row.error is None:
            found = helpers.relative_error(row.embedding, other.embedding)
            assert found <= 1e-5
            np.testing.assert_allclose(row.scores, other.scores, 1e-5)
        else:
            assert row.embedding is None


def test_rows_are_those_of_the_local_engine(
    finished, small_export, folder, tmp_path
):
    from pyarrow import dataset

    from bit_tf import embed_run

    output, summary = finished
    local = embed_run.run(
        [str(folder)],
        tmp_path / "local",
        model=small_export,
        preset=SMALL,
        progress=False,
    )
    assert (summary.encoded, summary.errors) == (GOOD, BAD)
    assert (local.encoded, local.errors) == (GOOD, BAD)
    assert (summary.images, summary.skipped) == (GOOD + BAD, 0)
    same(rows(output), rows(tmp_path / "local"))
    ours = dataset.dataset(output).schema
    assert ours.equals(
        dataset.dataset(tmp_path / "local").schema, check_metadata=True
    )


def test_dead_letters_say_what_was_wrong(finished, folder):
    output, _ = finished
    lines = [
        json.loads(line)
        for path in sorted((output / "_errors").iterdir())
        for line in path.read_text().splitlines()
    ]
    kinds = {os.path.basename(line["source"]): line["kind"] for line in lines}
    assert len(lines) == BAD
    assert kinds == dict.fromkeys(
        ["empty.jpg", "text.png", "cut.png"], "ImageDecodeError"
    )
    table = rows(output)
    for line in lines:
        assert line["id"] == str(folder / os.path.basename(line["id"]))
        assert line["message"] == table[line["id"]].error


def test_vectors_that_are_not_finite(run, folder, tmp_path, monkeypatch):
    from bit_tf import embed_model

    encode = embed_model.Encoder.encode

    def odd(self, batch):
        found = encode(self, batch)
        for one, picture in zip(found, batch, strict=True):
            if picture.sha256 == bad:
                one.embedding[3] = np.nan
        return found

    monkeypatch.setattr(embed_model.Encoder, "encode", odd)
    path = sorted(folder.glob("0*.png"))[1]
    bad = hashlib.sha256(path.read_bytes()).hexdigest()
    summary = run(tmp_path / "out")
    assert (summary.encoded, summary.errors) == (GOOD - 1, BAD + 1)
    table = rows(tmp_path / "out")
    assert sum(row.error is not None for row in table.values()) == BAD + 1
    lines = [
        json.loads(line)
        for name in (tmp_path / "out" / "_errors").iterdir()
        for line in name.read_text().splitlines()
    ]
    assert [line["id"] for line in lines if line["kind"] == "Vector"] == [
        str(path)
    ]


def test_files_are_numbered_and_nothing_else_is_left(finished):
    output, _ = finished
    names = sorted(os.listdir(output))
    parts = [name for name in names if name.startswith("part-")]
    assert names == ["_bulk.lock", "_errors", *parts]
    shards = [name.rpartition("-of-") for name in parts]
    assert {end for _, _, end in shards} == {"00003.parquet"}
    assert [int(start[-5:]) for start, _, _ in shards] == [0, 1, 2]
    assert len({start[:-6] for start, _, _ in shards}) == 1


def test_another_run_does_what_is_missing(run, folder, tmp_path):
    output = tmp_path / "vectors"
    first = run(output, sorted(folder.glob("0*.png")))
    before = {path: path.read_bytes() for path in output.glob("part-*")}
    second = run(output, [folder])
    assert (first.encoded, first.skipped) == (10, 0)
    assert (second.encoded, second.errors, second.skipped) == (10, BAD, 10)
    third = run(output, [folder, folder])
    assert (third.encoded, third.errors, third.skipped) == (0, 0, GOOD + BAD)
    assert third.images == GOOD + BAD == len(rows(output))
    for path, data in before.items():
        assert path.read_bytes() == data


def test_errors_are_done_again(run, folder, tmp_path):
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for index in range(2):
        (pictures / f"{index}.png").write_bytes(
            (folder / f"0{index}.png").read_bytes()[: 100 if index else None]
        )
    output = tmp_path / "vectors"
    assert run(output, [pictures]).errors == 1
    (pictures / "1.png").write_bytes((folder / "01.png").read_bytes())
    assert run(output, [pictures]).skipped == 2
    again = run(output, [pictures], retry_errors=True)
    assert (again.encoded, again.errors, again.skipped) == (1, 0, 1)
    assert [row.error for row in rows(output).values()] == [None, None]
    assert not os.listdir(output / "_errors")


def cut_and_mended(folder, pictures):
    """Writes four pictures, two of them cut, and mends them when called."""
    pictures.mkdir()

    def write(*cut):
        for index in range(4):
            data = (folder / f"0{index}.png").read_bytes()
            name = pictures / f"{index}.png"
            name.write_bytes(data[:100] if index in cut else data)

    write(1, 3)
    return write


def test_errors_of_other_sources_stay(run, folder, tmp_path):
    write = cut_and_mended(folder, tmp_path / "pictures")
    output = tmp_path / "vectors"
    paths = sorted((tmp_path / "pictures").iterdir())
    assert run(output, paths).errors == 2
    write()
    again = run(output, paths[:2], retry_errors=True)
    assert (again.encoded, again.skipped) == (1, 1)
    found = rows(output)
    assert [bool(found[str(path)].error) for path in paths] == [
        *(False, False, False, True)
    ]
    letters = [
        json.loads(line)["id"]
        for path in (output / "_errors").iterdir()
        for line in path.read_text().splitlines()
    ]
    assert letters == [str(paths[3])]
    assert "_retry" not in os.listdir(output)


def test_killed_before_old_errors_are_dropped(
    run, folder, tmp_path, monkeypatch
):
    from bit_tf import bulk_output

    write = cut_and_mended(folder, tmp_path / "pictures")
    output = tmp_path / "vectors"
    paths = sorted((tmp_path / "pictures").iterdir())
    run(output, paths)
    write(3)
    calls = []
    drop = bulk_output.drop_old_errors

    def die(directory):
        calls.append(directory)
        if len(calls) == 2:
            raise KeyboardInterrupt
        drop(directory)

    with monkeypatch.context() as patch:
        patch.setattr(bulk_output, "drop_old_errors", die)
        with pytest.raises(KeyboardInterrupt):
            run(output, paths, retry_errors=True)
    assert run(output, paths).skipped == 4
    found = rows(output)
    assert [bool(found[str(path)].error) for path in paths] == [
        *(False, False, False, True)
    ]


@pytest.fixture
def copied(finished, tmp_path):
    """A copy of the finished directory."""
    return pathlib.Path(shutil.copytree(finished[0], tmp_path / "vectors"))


def refused(run, output, message, **arguments):
    before = sorted(os.listdir(output))
    with pytest.raises(errors.DatasetError, match=message):
        run(output, **arguments)
    assert sorted(os.listdir(output)) == before


def test_vectors_of_another_type_are_refused(run, copied):
    refused(run, copied, "float16", float16=True)
    refused(run, copied, "precision bfloat16", precision="bfloat16")


@pytest.mark.slow
def test_vectors_of_another_model_or_preset_are_refused(
    run, copied, features_export
):
    refused(run, copied, "preset", preset="tfhub")
    refused(run, copied, "classes", top=2)
    refused(run, copied, "model", model=features_export)


@pytest.mark.slow
def test_overwrite_removes_tables_of_another_preset(run, folder, copied):
    first = folder / "00.png"
    assert run(copied, [first], preset="tfhub", overwrite=True).encoded == 1
    assert list(rows(copied)) == [str(first)]
    assert not os.listdir(copied / "_errors")


def test_foreign_directories_are_refused(run, tmp_path):
    from bit_tf import embed_plan

    for name in ("photo.jpg", embed_plan.FILE_NAME):
        output = tmp_path / name.strip("_")
        output.mkdir()
        (output / name).write_bytes(b"")
        for overwrite in (False, True):
            with pytest.raises(errors.DatasetError, match=r"Received: .*Name|"):
                run(output, overwrite=overwrite)
        assert os.listdir(output) == [name]


def test_a_damaged_table_is_refused(run, copied):
    path = next(copied.glob("part-*.parquet"))
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(errors.DatasetError, match="whole Parquet file"):
        run(copied)


def test_a_damaged_table_is_refused_with_retries(run, copied):
    path = next(copied.glob("part-*.parquet"))
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(errors.DatasetError, match="whole Parquet file"):
        run(copied, retry_errors=True)


@pytest.mark.parametrize(
    "wrong",
    [
        {"model": "/no/such/model"},
        {"preset": "no such"},
        {"beam_options": ["--runner=DataflowRunner"]},
        {"top": -1},
        {"top": 1.5},
        {"retries": -1},
        {"connections": 0},
        {"threads": 0},
        {"float16": "yes"},
        {"conections": 3},
    ],
    ids=lambda wrong: "-".join(map(str, wrong.items())),
)
@pytest.mark.parametrize("how", ["overwrite", "retry_errors"])
def test_nothing_is_removed_before_all_is_right(run, copied, wrong, how):
    before = {path: path.is_file() for path in copied.rglob("*")}
    with pytest.raises((errors.BitTfError, ValueError, TypeError)):
        run(copied, **{how: True}, **wrong)
    assert {path: path.is_file() for path in copied.rglob("*")} == before


@pytest.mark.parametrize(
    ("name", "kind", "message"),
    [
        ("foo://bar/x", errors.DatasetError, "gs://"),
        ("s3://bucket/x", errors.MissingExtraError, r"apache-beam\[aws\]"),
        ("file:///tmp/x", errors.DatasetError, "file://"),
    ],
    ids=["unknown", "no-extra", "file"],
)
def test_file_systems_that_beam_cannot_write(
    run, monkeypatch, name, kind, message
):
    from bit_tf import beam_modules

    known = beam_modules.filesystems.FileSystems.get_filesystem

    def get(path):
        if path.startswith("s3:"):
            raise ValueError("not installed")
        return known(path)

    monkeypatch.setattr(
        beam_modules.filesystems.FileSystems, "get_filesystem", get
    )
    with pytest.raises(kind, match=message):
        run(name)


def test_names_are_no_patterns(run, folder, tmp_path):
    other = tmp_path / "out1"
    run(other, [folder / "text.png"])
    output = tmp_path / "out[1]"
    run(output, [folder / "text.png", folder / "00.png"])
    summary = run(output, [folder / "01.png"], overwrite=True)
    assert (summary.encoded, summary.skipped) == (1, 0)
    assert list(rows(output)) == [str(folder / "01.png")]
    assert not os.listdir(output / "_errors")
    assert len(os.listdir(other / "_errors")) == 1


def test_sources_are_one_or_come_one_by_one(
    run, folder, small_export, tmp_path
):
    from bit_tf import bulk

    arguments = {"model": small_export, "preset": SMALL}
    one = bulk.run(folder / "00.png", tmp_path / "one", **arguments)
    assert (one.encoded, one.errors) == (1, 0)
    two = (str(folder / f"0{index}.png") for index in range(2))
    assert bulk.run(two, tmp_path / "two", **arguments).encoded == 2


def test_a_killed_run_is_gone_on_with(run, folder, copied, finished):
    """What a kill -9 leaves: some shards, and one that was being written."""
    lost = sorted(copied.glob("part-*.parquet"))[1]
    lost.unlink()
    litter = copied / f".{lost.name}.0123456789abcdef.tmp"
    litter.write_bytes(b"PAR1")
    summary = run(copied)
    assert summary.skipped + summary.encoded + summary.errors == GOOD + BAD
    assert summary.skipped not in (0, GOOD + BAD)
    assert not litter.exists()
    same(rows(copied), rows(finished[0]))


def test_a_bug_fails_the_pipeline(run, tmp_path, monkeypatch):
    from bit_tf import embed_model

    def broken(self, batch):
        raise ZeroDivisionError("of this test")

    monkeypatch.setattr(embed_model.Encoder, "encode", broken)
    with pytest.raises(errors.BitTfError, match="ZeroDivisionError"):
        run(tmp_path / "vectors")
    assert not list((tmp_path / "vectors").glob("part-*"))


def test_wrong_arguments_are_told_at_once(run, tmp_path):
    output = tmp_path / "vectors"
    for arguments in ({"batch": 0}, {"shard": True}):
        with pytest.raises(errors.DatasetError, match="1 or more"):
            run(output, **arguments)
    with pytest.raises(errors.DatasetError, match="nothing"):
        run(output, [tmp_path / "none"])
    with pytest.raises(TypeError):
        run(output, conections=3)


def test_names_that_are_no_text(run, folder, tmp_path):
    pictures = os.fsencode(tmp_path / "pictures")
    os.mkdir(pictures)
    path = os.path.join(pictures, b"caf\xe9.png")
    with open(path, "wb") as file:
        file.write((folder / "00.png").read_bytes())
    summary = run(tmp_path / "vectors", [os.fsdecode(pictures)])
    assert (summary.encoded, summary.errors) == (1, 0)
    (name,) = rows(tmp_path / "vectors")
    assert name.endswith("caf\\xe9.png")


def test_embed_in_a_pipeline_of_ones_own(finished, folder, small_export):
    import apache_beam as beam
    from apache_beam.testing.util import assert_that

    from bit_tf import bulk, items

    wanted = rows(finished[0])

    def check(found):
        same({row.id: row for row in found}, wanted)

    options = bulk.options(IN_MEMORY)
    with beam.Pipeline(options=options) as pipeline:
        found = (
            pipeline
            | beam.Create(list(items.find([str(folder)])))
            | bulk.Embed(small_export, preset=SMALL, batch=4, top=None)
        )
        assert_that(found, check)


def test_metrics_count_and_time(run, small_export, folder, tmp_path):
    import apache_beam as beam

    from bit_tf import bulk, bulk_steps

    pipeline = beam.Pipeline(options=bulk.options(IN_MEMORY))
    bulk.build(
        pipeline,
        [str(folder)],
        tmp_path / "vectors",
        model=small_export,
        preset=SMALL,
    )
    result = pipeline.run()
    result.wait_until_finish()
    found = result.metrics().query()
    counters = {
        metric.key.metric.name: metric.result
        for metric in found["counters"]
        if metric.key.metric.namespace == bulk_steps.NAMESPACE
    }
    assert (counters["images"], counters["encoded"]) == (GOOD + BAD, GOOD)
    assert counters["errors"] == BAD
    counts = {
        metric.key.metric.name: metric.result.count
        for metric in found["distributions"]
    }
    assert counts["read_ms"] == counts["decode_ms"] == GOOD + BAD
    assert counts["model_ms"] >= GOOD // 8


def test_a_shard_must_arrive_in_one_bundle(tmp_path):
    from bit_tf import bulk_steps

    write = bulk_steps.Write(str(tmp_path), "run", None)
    write.start_bundle()
    row = (bulk_steps.Row("a", "a", error="none"), "ImageDecodeError")
    assert not list(write.process(bulk_steps.Handled(0, 1, 2, [row])))
    with pytest.raises(RuntimeError, match="one bundle"):
        write.finish_bundle()


def test_shards_are_near_their_size_and_fixed():
    from bit_tf import bulk_steps, items

    assert bulk_steps.shard_count(1, 1024) == 1
    assert bulk_steps.shard_count(2000, 1024) == 16
    assert bulk_steps.shard_count(10**6, 1024) == 977
    sizes = [0] * 10
    for index in range(10000):
        item = items.Item(f"/photos/{index}.jpg", "", ("file", ""))
        number, _ = bulk_steps.numbered(bulk_steps.by_id(item), 10)
        sizes[number] += 1
    assert max(sizes) < 1100
    examples = [
        items.Item(f"tfds:a/{i}", "", ("tfds", "a", None, "test", i))
        for i in range(100)
    ]
    numbers = {
        bulk_steps.numbered(bulk_steps.by_id(e), 10)[0] for e in examples
    }
    assert len(numbers) == 1


@pytest.mark.parametrize(
    ("given", "kind", "message"),
    [
        (["--direct_num_worker=2"], errors.UnknownNameError, "num_workers'"),
        (["--runner=Direkt"], errors.UnknownNameError, "DirectRunner"),
        (["--direct_running_mode=x"], errors.BitTfError, "multi_processing"),
        (["photos"], errors.BitTfError, "--name=value"),
        (["-h"], errors.BitTfError, "--name=value"),
        (
            [*PORTABLE, "--sparkling=2"],
            errors.UnknownNameError,
            "Received: '--sparkling'",
        ),
    ],
    ids=["option", "runner", "value", "no-option", "help", "embed"],
)
def test_wrong_options_of_beam(given, kind, message):
    from bit_tf import bulk

    with pytest.raises(kind, match=message):
        bulk.options(given)


def test_options_of_a_job_server_are_left_to_it():
    from bit_tf import bulk

    bulk.options(["--runner=FlinkRunner", "--sparkling=2"])


def test_processes_share_the_cores(monkeypatch):
    from bit_tf import bulk_options

    monkeypatch.setattr(bulk_options, "cores", lambda: 8)
    for given, share in (
        ([], None),
        (["--runner=DataflowRunner"], None),
        (["--direct_running_mode=multi_processing"], 8),
        (PROCESSES, 4),
        ([*PROCESSES[1:], "--direct_num_workers=0"], 1),
        ([*PROCESSES[1:], "--direct_num_workers=100"], 1),
    ):
        assert bulk_options.threads_of(bulk_options.options(given)) == share


@pytest.mark.slow
def test_command_line(call, finished, small_export, folder, tmp_path):
    # The command line's preset has a name.
    output = tmp_path / "vectors"
    arguments = ("embed", folder, "--output", output, "--model", small_export)
    arguments += ("--preset", "tfhub", "--runner", "DirectRunner")
    code, out, err = call("bit-tf", *arguments, "--direct_num_worker=1")
    assert (code, out) == (1, "")
    assert "'--direct_num_workers'" in err
    code, out, err = call(
        "bit-tf", *arguments, "--direct_num_workers=1", "--json"
    )
    assert code == 1
    assert f"{GOOD} encoded" in err
    found = json.loads(out)
    assert (found["encoded"], found["errors"]) == (GOOD, BAD)
    assert len(rows(output)) == GOOD + BAD


def test_unknown_options_without_a_runner(call, tmp_path):
    for arguments in (
        [
            "embed",
            "a.jpg",
            "--output",
            tmp_path / "v",
            "--direct_num_workers=1",
        ],
        ["models", "--runner", "DirectRunner"],
    ):
        code, out, err = call("bit-tf", *arguments)
        assert (code, out) == (2, "")
        assert "unrecognized arguments" in err


@pytest.mark.slow
@pytest.mark.parametrize(
    "beam_options", [PROCESSES, PORTABLE], ids=["processes", "portable"]
)
def test_rows_are_the_same_with(beam_options, run, finished, tmp_path):
    output = tmp_path / "vectors"
    summary = run(output, beam_options=beam_options)
    assert (summary.encoded, summary.errors) == (GOOD, BAD)
    same(rows(output), rows(finished[0]))


@pytest.mark.slow
def test_nothing_is_fetched(finished, folder, small_export, tmp_path):
    """No name is looked up and no address called but this machine's."""
    script = tmp_path / "offline.py"
    script.write_text(
        """
import sys

calls = []

def watch(event, arguments):
    if event == "socket.connect":
        address = arguments[1]
        if isinstance(address, tuple) and address[0] not in HERE:
            calls.append(address)
    if event == "socket.getaddrinfo" and arguments[0] not in HERE:
        calls.append(arguments)
    if event == "urllib.Request":
        calls.append(arguments)

HERE = (None, "", "localhost", "127.0.0.1", "::1")
sys.addaudithook(watch)
from bit_tf import bulk
folder, output, model, *options = sys.argv[1:]
print(bulk.run([folder], output, model=model, preset="tfhub",
               beam_options=options, progress=False))
assert not calls, calls
"""
    )
    for number, options in enumerate((IN_MEMORY, PORTABLE)):
        output = tmp_path / str(number)
        done = subprocess.run(
            [sys.executable, script, folder, output, small_export, *options],
            capture_output=True,
            text=True,
            timeout=100,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        )
        assert done.returncode == 0, done.stderr[-3000:]
        assert f"{GOOD} encoded" in done.stdout
