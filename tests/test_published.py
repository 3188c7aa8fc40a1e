import hashlib
import json
import os
import pathlib
import subprocess
import sys

import file_server
import foreign
import helpers
import numpy as np
import pytest
from file_server import Reply

import bit_tf
from bit_tf import checkpoints, errors, presets, published, variants
from hub_export import random_weights

REVISION = "0123456789abcdef0123456789abcdef01234567"
CONFIG = {"config.json": b"{}", "preprocessor_config.json": b"{}"}
REPOSITORIES = {
    "timm/resnetv2_50x1_bit.goog_in21k": {
        **CONFIG,
        "model.safetensors": b"tensors" * 1000,
        "pytorch_model.bin": b"pickle",
        "README.md": b"text",
    },
    "google/bit-50": {**CONFIG, "pytorch_model.bin": b"pickle" * 9},
    "some/sharded": {
        "config.json": b"{}",
        "model.safetensors.index.json": b"{}",
        "model-00001-of-00002.safetensors": b"one",
        "model-00002-of-00002.safetensors": b"two",
        "tf_model.h5": b"other",
    },
    "some/lfs": {"config.json": b"{}", "model.safetensors": b"big" * 1000},
    "some/empty": {"config.json": b"{}", "flax_model.msgpack": b"other"},
}
REFUSALS = {
    "some/private": (401, {"X-Error-Message": "Invalid credentials"}),
    "some/gated": (403, {"X-Error-Code": "GatedRepo"}),
    "some/busy": (429, {"Retry-After": "0"}),
    "some/gone": (404, {"X-Error-Code": "RepoNotFound"}),
}


@pytest.fixture
def cache(tmp_path, monkeypatch):
    directory = tmp_path / "cache"
    monkeypatch.setenv("BIT_TF_CACHE", str(directory))
    monkeypatch.delenv("BIT_TF_MODELS_URL", raising=False)
    # Names must not depend on what lies in the current directory.
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return directory


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with file_server.running() as running:
        yield running


@pytest.fixture
def bucket(server, cache, monkeypatch):
    """The server as $BIT_TF_MODELS_URL, and where its files are kept."""
    base = f"{server.url}/mirror"
    monkeypatch.setenv("BIT_TF_MODELS_URL", base)
    digest = hashlib.sha256(base.encode()).hexdigest()
    return cache / f"bit_models-{digest[:8]}"


def test_paths(cache, tmp_path):
    file = tmp_path / "BiT-M-R50x1.npz"
    file.write_bytes(b"x")
    assert published.locate(str(file)) == (file, None)
    assert published.locate(file) == (file, None)
    assert published.locate(str(tmp_path)) == (tmp_path, None)
    # What exists goes before a published name; a PathLike is never one.
    pathlib.Path("BiT-M-R50x3").write_bytes(b"x")
    found = published.locate("BiT-M-R50x3")
    assert found.path == pathlib.Path("BiT-M-R50x3")
    assert found.variant is None
    name = pathlib.Path("BiT-M-R50x1")
    assert published.locate(name) == (name, None)
    assert not cache.exists()


@pytest.mark.parametrize("slash", ["", "/"])
@pytest.mark.parametrize(
    ("source", "file"),
    [
        ("BiT-M-R50x1", "BiT-M-R50x1.npz"),
        ("BiT-M-R50x1.npz", "BiT-M-R50x1.npz"),
        ("BiT-S-R101x1.h5", "BiT-S-R101x1.h5"),
        ("BiT-M-R152x4-ILSVRC2012.h5", "BiT-M-R152x4-ILSVRC2012.h5"),
        ("vtab/BiT-M-R50x1-run0-dtd", "vtab/BiT-M-R50x1-run0-dtd.npz"),
        ("distill/R50x1_224.npz", "distill/R50x1_224.npz"),
    ],
)
def test_published_names(server, bucket, monkeypatch, source, file, slash):
    monkeypatch.setenv("BIT_TF_MODELS_URL", f"{server.url}/mirror{slash}")
    server.bodies[f"/mirror/{file}"] = file.encode()
    path, row = published.locate(source)
    assert path == bucket / file
    assert path.read_bytes() == file.encode()
    assert row == variants.variant(file)
    published.locate(source)
    assert len(server.seen) == 1


def test_known_sizes_are_asked_for(server, bucket):
    name = "BiT-M-R50x1-ILSVRC2012"
    server.bodies[f"/mirror/{name}.npz"] = b"short"
    with pytest.raises(errors.DownloadError, match="102242668"):
        published.locate(name)
    assert not (bucket / f"{name}.npz").exists()
    # That is the size of the .npz only.
    server.bodies[f"/mirror/{name}.h5"] = b"short"
    assert published.locate(f"{name}.h5").path.read_bytes() == b"short"


def test_the_bucket_and_its_mirrors_are_kept_apart(server, cache, monkeypatch):
    calls = []

    def cached(url, **options):
        calls.append((url, options))
        return options["directory"] / options["name"]

    monkeypatch.setattr(published.cached_download, "cached", cached)
    default = "https://storage.googleapis.com/bit_models"
    name = "vtab/BiT-M-R50x1-run0-dtd"
    for base in (
        "",
        default,
        f"{default}/",
        "http://a/",
        "http://a",
        "http://b",
    ):
        monkeypatch.setenv("BIT_TF_MODELS_URL", base)
        published.locate(name)
    urls = [url.removesuffix(f"/{name}.npz") for url, _ in calls]
    assert urls == [default] * 3 + ["http://a"] * 2 + ["http://b"]
    folders = [options["directory"] for _, options in calls]
    assert folders[:3] == [cache / "bit_models"] * 3
    assert folders[3] == folders[4] != folders[5]
    assert {options["name"] for _, options in calls} == {f"{name}.npz"}


@pytest.mark.parametrize(
    "base",
    [
        "nonsense",
        "ftp://x/",
        "file:///tmp",
        "http://",
        "https://[",
        "http://h:port",
        " http://h/",
        "http://h/a b",
        "http://h/?token=hush",
        "http://h/#hush",
        "http://user:hush@[::1",
        "user:hush@h/x",
    ],
)
def test_a_bucket_that_cannot_be(cache, monkeypatch, base):
    monkeypatch.setenv("BIT_TF_MODELS_URL", base)
    with pytest.raises(errors.DownloadError, match="BIT_TF_MODELS_URL") as e:
        published.locate("BiT-M-R50x1")
    assert "hush" not in str(e.value)
    assert "hush" in base or repr(base) in str(e.value)
    assert not cache.exists()


def test_a_bucket_with_a_password(server, cache, monkeypatch):
    base = server.url.replace("http://", "HTTP://user:hush@") + "//"
    monkeypatch.setenv("BIT_TF_MODELS_URL", base)
    server.bodies["/BiT-M-R50x1.npz"] = b"x"
    assert published.locate("BiT-M-R50x1").path.read_bytes() == b"x"
    assert server.seen[0].headers["authorization"].startswith("Basic ")


@pytest.mark.parametrize(
    ("source", "told"),
    [
        ("https://u:hush@H.org:8/a/m.npz?t=hush#x", "https://h.org:8/a/m.npz"),
        ("HTTP://hush@[::1]/m.npz", "http://[::1]/m.npz"),
        ("http://u:hu/sh@h/m.npz", "http://…"),
        ("https://user:hush@[::1", "https://…"),
        ("ftp://user:hush@h/m.npz", "ftp://…"),
        ("hf://owner/name@v1", "hf://owner/name@v1"),
        ("BiT-M-R50x1", "BiT-M-R50x1"),
        ("a?b#c@d.npz", "a?b#c@d.npz"),
        (pathlib.Path("a?b.npz"), "a?b.npz"),
    ],
)
def test_sources_are_shown_without_secrets(source, told):
    assert published.shown(source) == told


def test_every_file_of_the_bucket_has_its_published_address(cache, monkeypatch):
    monkeypatch.setattr(
        published.cached_download,
        "cached",
        lambda url, size, **options: pathlib.Path(f"{url}|{size}"),
    )
    rows = [row for row in variants.list_models() if row.url]
    assert len(rows) == 311
    for row in rows:
        path = published.locate(row.name).path
        assert path == pathlib.Path(f"{row.url}|{row.size}")


def test_failures_are_errors(server, bucket):
    with pytest.raises(errors.DownloadError, match="404"):
        published.locate("BiT-M-R50x1")
    assert len(server.seen) == 1
    assert not list(bucket.glob("*.npz"))


@pytest.mark.parametrize(
    "source",
    [
        "BiT-M-R50x2",
        "bit-m-r50x1.npz",
        "BiT-M-R50x1.h6",
        "distill/R50x1_224.h5",
        "timm/resnetv2_50x1_bit.goog_in22k",
        "google/bit-50.npz",
    ],
)
def test_near_misses(cache, source):
    with pytest.raises(errors.UnknownNameError, match="Did you mean '") as e:
        published.locate(source)
    assert str(e.value).startswith(
        "Neither a file nor published weights have this name. Received: "
        f"{source!r}."
    )


def test_near_misses_name_the_right_one(cache):
    with pytest.raises(errors.UnknownNameError, match="'BiT-M-R50x1'"):
        published.locate("bit-m-r50x1")


def test_nothing_at_all(cache):
    with pytest.raises(FileNotFoundError, match=r"a path or a name.*: ''$"):
        published.locate("")


@pytest.mark.parametrize("source", ["weights.npz", "/no/such/path", "a\0b"])
def test_what_is_nothing(cache, source):
    with pytest.raises(FileNotFoundError, match="existing file") as caught:
        published.locate(source)
    assert not isinstance(caught.value, errors.BitTfError)


def test_addresses_of_files(server, cache):
    server.bodies["/a/model.npz"] = b"a"
    server.bodies["/b/model.npz"] = b"b"
    server.bodies["/My%20Model.SAFETENSORS"] = b"c"
    paths = []
    for path in (
        "/a/model.npz",
        "/b/model.npz?x=1#y",
        "/My%20Model.SAFETENSORS",
    ):
        url = server.url + path
        found = published.locate(url)
        assert found.variant is None
        digest = hashlib.sha256(url.encode()).hexdigest()[:8]
        assert found.path.name.startswith(f"{digest}-")
        assert found.path.parent == cache / "files"
        paths.append(found.path)
    assert [path.read_bytes() for path in paths] == [b"a", b"b", b"c"]
    assert paths[0].name.endswith("-model.npz")
    assert paths[2].name.endswith("-My_Model.SAFETENSORS")
    assert published.locate(url).path == paths[2]
    assert len(server.seen) == 3
    with pytest.raises(errors.DownloadError, match="404"):
        published.locate(f"{server.url}/none.h5")


def test_other_addresses_are_handles(server, cache, monkeypatch, tmp_path):
    from bit_tf import hub

    handles = []

    def resolve(handle):
        handles.append(handle)
        return str(tmp_path)

    monkeypatch.setattr(hub, "resolve", resolve)
    address = "https://tfhub.dev/google/bit/m-r50x1/1"
    assert published.locate(address) == (tmp_path, None)
    expert = "experts/bit/r50x1/in21k/bird"
    path, row = published.locate(expert)
    assert (path, row.name) == (tmp_path, expert)
    assert handles == [address, f"https://tfhub.dev/google/{expert}/1"]


def test_handles_keep_their_own_error(server, cache, monkeypatch, tmp_path):
    monkeypatch.setenv("TFHUB_CACHE_DIR", str(tmp_path / "hub"))
    with pytest.raises(errors.HandleError):
        published.locate(f"{server.url}/google/bit/m-r50x1/1")


def test_weights_must_be_what_their_name_says():
    row = variants.variant("BiT-S-R101x1.h5")
    right = ((3, 4, 23, 3), 64, 1000)
    published.check(row, *right, "x.h5")
    published.check(None, (1, 1, 1, 1), 32, 3, "x.h5")
    for wrong, told in (
        (((3, 4, 6, 3), 64, 1000), "R50x1 with 1000"),
        (((3, 4, 23, 3), 192, 1000), "R101x3 with 1000"),
        (((3, 4, 23, 3), 64, 21843), "R101x1 with 21843"),
        (((3, 4, 23, 3), 64, 0), "R101x1 with 0"),
        (((9, 4, 23, 3), 64, 1000), r"blocks \(9, 4, 23, 3\)"),
    ):
        with pytest.raises(errors.CheckpointMismatchError, match=told) as e:
            published.check(row, *wrong, "x.h5")
        assert "'BiT-S-R101x1' is R101x1 with 1000 classes" in str(e.value)
        assert "x.h5" in str(e.value)


class HubServer(file_server.FileServer):
    """What huggingface_hub asks of its server, for REPOSITORIES."""

    def __init__(self):
        super().__init__()
        for name, files in REPOSITORIES.items():
            self._describe(name, files)

    def reply(self, method, path):
        for name, (status, headers) in REFUSALS.items():
            if path.startswith(f"/api/models/{name}/"):
                return Reply(status=status, headers=headers)
        return Reply(headers={"X-Repo-Commit": REVISION})

    def _describe(self, name, files):
        info = {
            "_id": "0",
            "id": name,
            "sha": REVISION,
            "siblings": [{"rfilename": file} for file in files],
        }
        tree = [
            {
                "type": "file",
                "path": f,
                "size": len(data),
                "oid": _oid(name, data),
            }
            for f, data in files.items()
        ]
        api = f"/api/models/{name}"
        for revision in ("main", "v2", REVISION):
            self.bodies[f"{api}/revision/{revision}"] = json.dumps(
                info
            ).encode()
            self.bodies[f"{api}/tree/{revision}"] = json.dumps(tree).encode()
        for file, data in files.items():
            path = f"/{name}/resolve/{REVISION}/{file}"
            self.bodies[path] = data
            self.etags[path] = f'"{_oid(name, data)}"'


def _oid(name, data):
    if name == "some/lfs":
        return hashlib.sha256(data).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


CLIENT = """
import json, os, sys
from bit_tf import errors, published
results = {}
for source in sys.argv[1:]:
    try:
        path, row = published.locate(source)
    except errors.BitTfError as error:
        assert error.__cause__ or "Received" in str(error)
        results[source] = type(error).__name__, str(error)
    else:
        results[source] = sorted(os.listdir(path)), row and row.name
assert "tensorflow" not in sys.modules and "torch" not in sys.modules
print(json.dumps(results))
"""


def locate(*sources, **environment):
    """What another process gets, with its standard error empty."""
    process = subprocess.run(
        [sys.executable, "-W", "error", "-c", CLIENT, *sources],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert process.returncode == 0, process.stderr
    return json.loads(process.stdout), process.stderr


@pytest.fixture
def hugging_face(tmp_path, monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("HF_HUB_DISABLE_TELEMETRY", "1")
    for name in ("HF_HUB_OFFLINE", "HF_TOKEN", "TQDM_POSITION"):
        monkeypatch.delenv(name, raising=False)
    with file_server.running(HubServer) as running:
        monkeypatch.setenv("HF_ENDPOINT", running.url)
        yield running


def test_hugging_face(hugging_face, cache):
    sources = [
        "timm/resnetv2_50x1_bit.goog_in21k",
        "google/bit-50",
        "hf://google/bit-50",
        "hf://some/sharded@v2",
        "hf://some/empty",
        "hf://some/sharded@v3",
        *(f"hf://{name}" for name in REFUSALS),
        "hf://name",
        "hf://a/b/c",
    ]
    found, stderr = locate(*sources)
    timm = ["config.json", "model.safetensors", "preprocessor_config.json"]
    assert found[sources[0]] == [timm, sources[0]]
    bit_50 = ["config.json", "preprocessor_config.json", "pytorch_model.bin"]
    assert found["google/bit-50"] == [bit_50, "google/bit-50"]
    assert found["hf://google/bit-50"] == [bit_50, None]
    assert found["hf://some/sharded@v2"] == [
        sorted(set(REPOSITORIES["some/sharded"]) - {"tf_model.h5"}),
        None,
    ]
    for source in sources[4:]:
        kind, message = found[source]
        assert source.removeprefix("hf://").partition("@")[0] in message
        malformed = source in ("hf://name", "hf://a/b/c")
        assert kind == ("UnknownNameError" if malformed else "DownloadError")
    assert "404" in found["hf://some/gone"][1]
    assert "401" in found["hf://some/private"][1]
    assert "403" in found["hf://some/gated"][1]
    assert "429" in found["hf://some/busy"][1]
    assert "neither" in found["hf://some/empty"][1]
    asked = [seen.target for seen in hugging_face.seen]
    assert not [target for target in asked if "flax_model" in target]
    assert not [target for target in asked if "README" in target]
    assert stderr == ""
    records = sorted(path.name for path in (cache / "huggingface").iterdir())
    assert records == [
        f"google--bit-50@{REVISION}.json",
        f"some--sharded@{REVISION}.json",
        f"timm--resnetv2_50x1_bit.goog_in21k@{REVISION}.json",
    ]
    # What was fetched once is there without a network.
    hugging_face.seen.clear()
    again, _ = locate(
        sources[0], *sources[1:2], "hf://some/new", HF_HUB_OFFLINE="1"
    )
    assert again[sources[0]] == found[sources[0]]
    assert again[sources[1]] == found[sources[1]]
    assert "HF_HUB_OFFLINE" in again["hf://some/new"][1]
    assert hugging_face.seen == []


@pytest.mark.parametrize("name", ["some/lfs", "some/sharded"])
def test_hugging_face_is_compared_ever_after(
    hugging_face, cache, tmp_path, name
):
    source = f"hf://{name}"
    assert locate(source)[0][source][0] == sorted(
        set(REPOSITORIES[name]) - {"tf_model.h5"}
    )
    record = cache / "huggingface" / f"some--sharded@{REVISION}.json"
    assert record.exists() == (name == "some/sharded")
    (file,) = (
        path
        for path in (tmp_path / "hf").glob(f"**/snapshots/{REVISION}/*")
        if path.name.startswith("model") and "2-of" not in path.name
        if path.suffix == ".safetensors"
    )
    data = bytearray(file.read_bytes())
    data[1] ^= 1
    file.write_bytes(data)
    for environment in ({}, {"HF_HUB_OFFLINE": "1"}):
        kind, message = locate(source, **environment)[0][source]
        assert kind == "DownloadError"
        assert "changed or damaged" in message
        assert f"Delete {file.resolve()} to" in message
        assert hashlib.sha256(data).hexdigest() in message
    file.resolve().unlink()
    kind, _ = locate(source)[0][source]
    assert isinstance(kind, list)
    data[1] ^= 1
    assert file.read_bytes() == data


def test_hugging_face_that_is_not_there(hugging_face, cache):
    with file_server.running() as gone:
        url = gone.url
    found, _ = locate("google/bit-50", HF_ENDPOINT=url)
    kind, message = found["google/bit-50"]
    assert kind == "DownloadError"
    assert "network" in message


def test_hugging_face_needs_an_extra(cache, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(errors.MissingExtraError, match=r"bit-tf\[huggingface"):
        published.locate("google/bit-50")


def test_how_a_bad_download_is_got_rid_of(server, bucket, small_npz, tmp_path):
    """What is no checkpoint, or another one, may once have been sent."""
    url, good = f"{server.url}/m.npz", small_npz.read_bytes()
    server.bodies["/m.npz"] = good
    server.replies = [Reply(status=200, body=b"busy, come later")]
    with pytest.raises(errors.CheckpointFormatError) as caught:
        published.open_checkpoint(url)
    path = published.locate(url).path
    assert f"delete both {path} and {path}.json" in str(caught.value)
    path.unlink()
    path.with_name(f"{path.name}.json").unlink()
    assert published.open_checkpoint(url).num_classes == 10
    server.bodies["/mirror/BiT-M-R50x1.npz"] = good
    with pytest.raises(errors.CheckpointMismatchError) as caught:
        published.open_checkpoint("BiT-M-R50x1")
    path = bucket / "BiT-M-R50x1.npz"
    assert f"delete both {path} and {path}.json" in str(caught.value)
    assert path.exists()
    # A file of one's own has no record.
    own = tmp_path / "own.npz"
    own.write_bytes(b"damaged")
    with pytest.raises(errors.CheckpointFormatError) as caught:
        published.open_checkpoint(own)
    assert "delete both" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "row", "blocks"),
    [
        ("BiT-S-R50x3.h5", "R50x3", (1, 2, 1, 1)),
        ("BiT-S-R101x1.h5", "R101x1", (1, 1, 1, 1)),
    ],
)
def test_files_published_under_a_wrong_name(
    server, bucket, tmp_path, call, name, row, blocks
):
    """Two of the .h5 files hold another architecture than their names say."""
    path = tmp_path / name
    arrays = helpers.random_arrays(blocks, 32, 1000)
    foreign.big_transfer_h5(path, arrays)
    server.bodies[f"/mirror/{name}"] = path.read_bytes()
    with pytest.raises(errors.CheckpointMismatchError, match=f"is {row} with"):
        bit_tf.load_model(name)
    # The file itself is read as what it holds, and a note says so.
    found = published.open_checkpoint(path)
    assert (found.blocks, found.stem_width) == (blocks, 32)
    assert any(
        f"{name.removesuffix('.h5')!r} is {row}" in n for n in found.notes
    )
    code, _, err = call(
        *("hub-export", "convert", path, tmp_path / "x.npz", "--to", "npz")
    )
    assert code == 0
    assert f"is {row} with 1000 classes" in err
    code, _, err = call(
        *("hub-export", "convert", name, tmp_path / "y.npz", "--to", "npz")
    )
    assert code == 1
    assert f"is {row} with 1000 classes" in err
    assert not (tmp_path / "y.npz").exists()


@pytest.mark.parametrize(
    ("name", "preset"),
    [
        ("distill/R50x1_224", "timm distilled"),
        ("BiT-S-R50x1", "big_transfer eval"),
        ("distill/R50x1_160", None),
    ],
)
def test_what_is_known_of_published_weights(
    server, bucket, small_npz, monkeypatch, name, preset
):
    monkeypatch.setattr(published, "check", lambda *_: None)
    server.bodies[f"/mirror/{name}.npz"] = small_npz.read_bytes()
    facts = published.open_checkpoint(name).facts
    assert facts.preset == (preset and presets.PRESETS[preset])
    assert facts.numerics == "google"


def test_no_password_gets_into_an_export(
    server, cache, small_npz, tmp_path, call
):
    server.bodies["/m.npz"] = small_npz.read_bytes()
    url = server.url.replace("://", "://user:s3cret@") + "/m.npz?token=s3cret"
    code, out, err = call("hub-export", "convert", url, tmp_path / "hub")
    assert code == 0, err
    assert "s3cret" not in out + err
    for path in (tmp_path / "hub", cache):
        for file in path.rglob("*"):
            assert not file.is_file() or b"s3cret" not in file.read_bytes()
    provenance = tmp_path / "hub" / "assets.extra" / "provenance.json"
    assert json.loads(provenance.read_text())["name"] == server.url + "/m.npz"


def test_a_published_name_is_converted(server, bucket, tmp_path, call):
    name = "BiT-M-R50x1-ILSVRC2012"
    path = tmp_path / "made.npz"
    row = variants.variant(name)
    random_weights.write_checkpoint(row.architecture, path, row.num_classes)
    assert path.stat().st_size == row.size
    server.bodies[f"/mirror/{name}.npz"] = path.read_bytes()
    code, out, err = call(
        *("hub-export", "convert", name, tmp_path / "x.safetensors"),
        *("--to", "timm"),
    )
    assert code == 0, err
    assert "153 arrays, each used once" in out
    found = checkpoints.read(tmp_path / "x.safetensors")
    made = checkpoints.read(path)
    assert found.facts == made.facts
    for array in ("head/conv2d/kernel", "block4/unit03/c/group_norm/beta"):
        np.testing.assert_array_equal(found[array], made[array], strict=True)
    # A near miss names the right one; nothing is made of a failed download.
    code, out, err = call(
        *("hub-export", "convert", "BiT-M-R50x1-ILSVRC12", tmp_path / "y"),
    )
    assert code == 1
    assert f"Did you mean {name!r}" in err
    server.bodies.clear()
    code, out, err = call(
        *("hub-export", "demo", "BiT-S-R50x1", "--directory", tmp_path / "d"),
    )
    assert code == 1
    assert "404" in err
    assert not (tmp_path / "d" / "saved_model").exists()


@pytest.mark.network
def test_the_real_bucket(cache):
    """Needs the internet; 102 MB."""
    name = "BiT-M-R50x1-ILSVRC2012"
    path, row = published.locate(name)
    assert path.stat().st_size == row.size
