"""The first day online, rehearsed. See benchmarks/published.py."""

import collections
import dataclasses
import hashlib
import importlib.util
import json
import math
import os
import pathlib
import shutil
import subprocess
import sys
import tarfile
import zipfile

import file_server
import helpers
import numpy as np
import pytest
from PIL import Image

from benchmarks import published
from benchmarks.published import AS_EXPECTED, DIFFERS
from bit_tf import checkpoints, errors, images, labels, models, variants
from hub_export import digits, random_weights

CLASSES = labels.label_set("ilsvrc2012")


@pytest.fixture
def row(small_npz):
    """A published name of the small checkpoint."""
    return dataclasses.replace(
        variants.variant("BiT-M-R50x1"), architecture="testing", num_classes=10
    )


def test_known_sizes():
    def size(name):
        return published.expected_bytes(variants.variant(name))

    assert size("BiT-M-R50x1-ILSVRC2012") == (102_242_668, "published")
    assert size("BiT-M-R50x1") == (273_071_896, "inferred from the shapes")
    assert size("google/bit-50") == (None, "no size is published")
    text = published.weights_expected(variants.variant("google/bit-50"))
    assert text.startswith("no size is published; 153 arrays")


def test_weights(row, small_npz):
    found = published.describe_weights(row, checkpoints.read(small_npz))
    assert found.verdict == AS_EXPECTED
    data = small_npz.read_bytes()
    assert found.measured == (
        f"{len(data)} bytes; SHA-256 {hashlib.sha256(data).hexdigest()}; "
        "45 arrays; each used once; all finite; no others"
    )


def test_weights_of_another_size(row, small_npz):
    checkpoint = checkpoints.read(small_npz)
    size = small_npz.stat().st_size
    for published_size, words in ((size, AS_EXPECTED), (size + 1, DIFFERS)):
        other = dataclasses.replace(row, size=published_size)
        found = published.describe_weights(other, checkpoint)
        assert found.verdict == words
        assert f"{size} bytes" in found.measured
    more = dataclasses.replace(row, architecture="R50x1", size=size)
    assert published.describe_weights(more, checkpoint).verdict == DIFFERS


@pytest.mark.parametrize("damage", ["extra", "nan"])
def test_weights_with_other_arrays(row, small_arrays, tmp_path, damage):
    arrays = {f"resnet/{name}": array for name, array in small_arrays.items()}
    if damage == "extra":
        arrays["resnet/global|step"] = np.float32([1])
    else:
        gamma = arrays["resnet/group_norm/gamma"].copy()
        gamma[3] = np.nan
        arrays["resnet/group_norm/gamma"] = gamma
    path = tmp_path / "other.npz"
    np.savez(path, **arrays)
    same_size = dataclasses.replace(row, size=path.stat().st_size)
    found = published.describe_weights(same_size, checkpoints.read(path))
    assert found.verdict == DIFFERS
    wanted = {
        "extra": "others: resnet/global|step",
        "nan": "NOT all finite; no others",
    }
    assert wanted[damage] in found.measured
    assert "; each used once" in found.measured


@pytest.mark.parametrize("change", ["more", "fewer", "twice"])
def test_arrays_that_the_reader_does_not_tell(
    row, small_npz, monkeypatch, change
):
    checkpoint = checkpoints.read(small_npz)
    names = list(checkpoint.sources.values())
    found = {"more": [*names, "x"], "fewer": names[1:], "twice": names[:1]}
    found["twice"] += names
    monkeypatch.setattr(published, "stored_names", lambda path: found[change])
    result = published.describe_weights(row, checkpoint)
    assert result.verdict == DIFFERS
    assert "NOT each used once" in result.measured


def test_stored_names(tmp_path):
    np.savez(tmp_path / "a.npz", **{"b/c": np.zeros(1), "d": np.zeros(2)})
    assert published.stored_names(tmp_path / "a.npz") == ["b/c", "d"]
    header = json.dumps({"__metadata__": {"x": "y"}, "one": {}, "two": {}})
    data = len(header).to_bytes(8, "little") + header.encode()
    (tmp_path / "model.safetensors").write_bytes(data)
    names = ["one", "two"]
    assert published.stored_names(tmp_path / "model.safetensors") == names
    assert published.stored_names(tmp_path) == names
    (tmp_path / "weights.bin").write_bytes(b"")
    assert published.stored_names(tmp_path / "weights.bin") is None
    (tmp_path / "model.safetensors").unlink()
    assert published.stored_names(tmp_path) is None


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (0.0, AS_EXPECTED),
        (9e-3, AS_EXPECTED),
        (1.1e-2, DIFFERS),
        (-1.1e-2, DIFFERS),
        (math.nan, DIFFERS),
    ],
)
def test_known_logits(photos, change, words):
    seen = []

    def function(pictures):
        seen.append(pictures)
        logits = np.zeros((1, 1000), np.float32)
        logits[0, :3] = -0.65258133, -0.52634168, -1.43975902
        logits[0, 1] += change
        return logits

    found = published.compare_logits(function, photos[0])
    assert found.verdict == words
    assert "-0.65258" in found.measured
    if change:
        assert f"difference {abs(change):.1e}" in found.measured
    (pixels,) = seen
    assert pixels.dtype == np.float32
    np.testing.assert_array_equal(
        pixels, images.preprocess(photos[0], "hf bit-50")[None]
    )


def test_known_logits_without_a_picture(tmp_path):
    row = published.run(
        published.Check(
            "what",
            "expected",
            lambda: published.compare_logits(None, tmp_path / "none.jpg"),
        )
    )
    assert (row.what, row.expected) == ("what", "expected")
    assert row.verdict.startswith("failed: ImageFetchError: ")
    assert "none.jpg" in row.verdict
    assert row.bad


@pytest.mark.parametrize("head", [True, False])
def test_the_network_is_the_keras_model(small_npz, head):
    pictures = helpers.random_images(2, 64, 48) / np.float32(255)
    function = published.network(checkpoints.read(small_npz), head)
    model = models.load_model(small_npz, head=head)
    error = helpers.relative_error(function(pictures), model(pictures))
    assert error <= 1e-5


def test_parity(small_npz, small_arrays, features_export, tmp_path):
    module = published.hub_module(
        str(features_export), "image_feature_vector", "features"
    )
    pictures = helpers.random_images(2, 64, 64) / np.float32(255)

    def compared(path, head=False):
        ours = published.network(checkpoints.read(path), head)
        return published.compare_outputs(ours, module, pictures)

    found = compared(small_npz)
    assert found.verdict == AS_EXPECTED
    assert found.measured.endswith(" over 2 × 1024")
    # One weight of two million.
    changed = dict(small_arrays)
    name = "block3/unit01/b/standardized_conv2d/kernel"
    changed[name] = changed[name].copy()
    changed[name][1, 1, 5, 6] += 2
    checkpoints.write(changed, tmp_path / "changed.npz")
    found = compared(tmp_path / "changed.npz")
    assert found.verdict == DIFFERS
    assert 1e-4 < float(found.measured.split()[2]) < 1
    found = compared(small_npz, head=True)
    assert found == ("shapes (2, 10) here, (2, 1024) there", DIFFERS)


def test_the_relative_error():
    ones = np.ones((2, 3), np.float32)
    for factor, words in ((1 + 9e-5, AS_EXPECTED), (1 + 2e-4, DIFFERS)):
        found = published.compare_outputs(
            lambda x, factor=factor: x * np.float32(factor), lambda x: x, ones
        )
        assert found.verdict == words, found
    found = published.compare_outputs(lambda x: x * np.nan, lambda x: x, ones)
    assert found.verdict == DIFFERS


def test_modules_that_are_none(tmp_path, small_export):
    with pytest.raises(errors.HandleError, match="no such path"):
        published.hub_module("none/such", "x", "y")
    with pytest.raises(errors.HandleError, match="SavedModel"):
        published.hub_module(str(tmp_path), "x", "y")
    # A picture so small that the function itself fails.
    function = published.hub_module(
        str(small_export), "image_classification", "logits"
    )
    with pytest.raises(errors.HandleError, match=r"\(1, 8, 8, 5\)"):
        function(np.zeros((1, 8, 8, 5), np.float32))


@pytest.mark.parametrize(
    ("right", "n"), [(0, 10), (5, 10), (10, 10), (1, 1), (40193, 50000)]
)
def test_wilson(right, n):
    stats = pytest.importorskip(
        "scipy.stats", reason="needs scipy: pip install scipy, then pytest"
    )
    test = stats.binomtest(right, n)
    wanted = test.proportion_ci(method="wilson")
    assert published.wilson(right, n) == pytest.approx(
        (wanted.low, wanted.high), abs=1e-12
    )


def test_wilson_by_hand():
    # Agresti and Coull 1998: none of ten, and half of them.
    assert published.wilson(0, 10) == pytest.approx((0, 0.2775), abs=1e-4)
    assert published.wilson(5, 10) == pytest.approx((0.2366, 0.7634), abs=1e-4)


def test_class_names():
    for name, index in (
        ("n01440764", 0),
        ("n15075141", 999),
        ("0", 0),
        ("007", 7),
        ("999", 999),
    ):
        assert published.class_index(name, CLASSES) == index
    for name in ("1000", "-1", "tench", "n00000000", "²", "1.0", "", "n1"):
        with pytest.raises(errors.UnknownNameError, match="0 to 999") as error:
            published.class_index(name, CLASSES)
        assert repr(name) in str(error.value)
    # Labels without ids leave the index.
    plain = labels.parse("zero\none\n")
    assert published.class_index("1", plain) == 1
    with pytest.raises(errors.UnknownNameError, match="0 to 1"):
        published.class_index("2", plain)


def test_folders(tmp_path):
    for name in (
        "n01443537/b.png",
        "n01443537/a.png",
        "n01443537/.hidden",
        "n01443537/deeper/c.png",
        "0/x.jpg",
        ".cache/y",
        "notes.txt",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    assert published.labelled_pictures(tmp_path, CLASSES) == [
        (tmp_path / "0" / "x.jpg", 0),
        (tmp_path / "n01443537" / "a.png", 1),
        (tmp_path / "n01443537" / "b.png", 1),
    ]
    with pytest.raises(errors.UnknownNameError, match="without any"):
        published.labelled_pictures(tmp_path / ".cache", CLASSES)
    (tmp_path / "goldfish").mkdir()
    with pytest.raises(errors.UnknownNameError, match="'goldfish'"):
        published.labelled_pictures(tmp_path, CLASSES)


def coloured(folder, right, wrong):
    """[(file, class)] of ten pictures, of which a stub knows `right`."""
    found = []
    for index in range(right + wrong):
        level = 250 if (index % 2 == 1) == (index < right) else 5
        path = folder / f"{index}.png"
        Image.new("RGB", (40, 30), (level, level, level)).save(path)
        found.append((path, index % 2))
    return found


def by_brightness(pictures):
    assert pictures.shape[1:] == (480, 480, 3)
    assert len(pictures) <= 8
    bright = pictures.mean((1, 2, 3))
    return np.stack([1 - bright, bright], axis=-1)


@pytest.mark.parametrize(
    ("right", "wrong", "words"),
    [(8, 2, AS_EXPECTED), (0, 10, DIFFERS), (2, 8, DIFFERS)],
)
def test_top_1_of_known_predictions(tmp_path, right, wrong, words):
    pictures = coloured(tmp_path, right, wrong)
    found = published.top_1(
        by_brightness, "big_transfer eval", pictures, num_classes=2
    )
    low, high = published.wilson(right, 10)
    assert found.measured.startswith(
        f"{10 * right:.3f} % of n = 10; 95 % interval (Wilson) "
        f"{100 * low:.3f} to {100 * high:.3f} %"
    )
    assert found.verdict == words
    # A folder of some classes says nothing of the published number.
    found = published.top_1(by_brightness, "big_transfer eval", pictures, 3)
    assert found.verdict == "not compared: pictures of 2 of the 3 classes"


def test_top_1_of_digits(tmp_path):
    """The packages' own checkpoint, against a count by the Keras model."""
    checkpoint = pathlib.Path(str(digits.DATA / digits.CHECKPOINT))
    pictures, truth = digits.held_out()
    folder = tmp_path / "digits"
    for index, (picture, label) in enumerate(
        zip(pictures[:60], truth, strict=False)
    ):
        (folder / str(label)).mkdir(parents=True, exist_ok=True)
        images.to_pil(picture).save(folder / str(label) / f"{index}.png")
    # What it has not learned: a seven among the ones.
    seven = next((folder / "7").iterdir())
    shutil.copy(seven, folder / "1" / "wrong.png")
    found = published.labelled_pictures(folder, labels.parse("d\n" * 10))
    assert len(found) == 61
    counts = collections.Counter(int(label) for label in truth[:60])
    assert collections.Counter(i for _, i in found) == counts + (
        collections.Counter([1])
    )
    model = models.load_model(checkpoint)
    scores = model(np.stack([images.preprocess(p, "tfhub") for p, _ in found]))
    right = int((np.argmax(scores, -1) == [i for _, i in found]).sum())
    assert 50 < right < 61
    result = published.top_1(
        published.network(checkpoints.read(checkpoint), True),
        "tfhub",
        found,
        10,
    )
    assert result.measured.startswith(f"{100 * right / 61:.3f} % of n = 61;")


def test_top_1_of_what_is_no_picture(tmp_path):
    (tmp_path / "x.png").write_bytes(b"text")
    with pytest.raises(errors.ImageDecodeError):
        published.top_1(by_brightness, "tfhub", [(tmp_path / "x.png", 0)], 2)


def test_once():
    calls = []

    def make():
        calls.append(1)
        return []

    once = published.Once(make)
    assert once() is once()
    assert len(calls) == 1

    def fail():
        calls.append(1)
        raise errors.DownloadError("no network")

    once = published.Once(fail)
    for _ in range(2):
        with pytest.raises(errors.DownloadError, match="no network"):
            once()
    assert len(calls) == 2


def test_only_failures_on_purpose_are_rows():
    def mistake():
        raise TypeError("a defect")

    with pytest.raises(TypeError, match="a defect"):
        published.run(published.Check("what", "expected", mistake))


def test_the_table():
    rows = [
        published.Row("a|b", "1", "2\n3", DIFFERS),
        published.Row("c", "", "", "not run: no folder"),
        published.Row("d", "", "", "failed: x"),
        published.Row("e", "", "", AS_EXPECTED),
    ]
    assert published.table({"date": "today", "machine": "m | n"}, rows) == (
        "- date: today\n"
        "- machine: m \\| n\n"
        "\n"
        "| Check | Expected | Measured | Verdict |\n"
        "|---|---|---|---|\n"
        "| a\\|b | 1 | 2 3 | differs |\n"
        "| c | – | – | not run: no folder |\n"
        "| d | – | – | failed: x |\n"
        "| e | – | – | as expected |\n"
    )
    assert [row.bad for row in rows] == [True, False, True, False]


def test_random_pictures_are_fixed():
    pictures = published.random_pictures()
    assert pictures.shape == (2, 224, 224, 3)
    assert pictures.dtype == np.float32
    assert 0 <= pictures.min() < 0.01 < 0.99 < pictures.max() <= 1
    np.testing.assert_array_equal(pictures, published.random_pictures())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--weights", "BiT-M-R50x2"], "Did you mean"),
        (["--weights", "here"], "Published weights"),
        (["--weights", "google/bit-50"], "also a path"),
        (["--pictures", "none"], "none"),
        (["--pictures", "folder"], "'goldfish'"),
        (["--output", "none/table.md"], "not a directory"),
        (["--json", "none/table.json"], "not a directory"),
        (["--nonsense"], "unrecognized"),
    ],
)
def test_usage(tmp_path, monkeypatch, capsys, arguments, words):
    (tmp_path / "folder" / "goldfish").mkdir(parents=True)
    if "google/bit-50" in arguments:
        (tmp_path / "google" / "bit-50").mkdir(parents=True)
    (tmp_path / "here").write_bytes(b"")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        published.main(arguments)
    assert stopped.value.code == 2
    captured = capsys.readouterr()
    assert words in captured.err
    assert captured.out == ""


@pytest.fixture
def offline(monkeypatch, tmp_path):
    """A server on this machine as the bucket, and empty caches."""
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.setenv(name, "127.0.0.1")
    for name in ("BIT_TF_CACHE", "HF_HOME", "TFHUB_CACHE_DIR"):
        monkeypatch.setenv(name, str(tmp_path / name))
    monkeypatch.setenv("HF_HUB_DISABLE_TELEMETRY", "1")
    for name in ("HF_HUB_OFFLINE", "HF_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")


@pytest.fixture
def small_bucket(offline, monkeypatch, small_npz):
    """The default weights' names, with the small checkpoint behind each."""
    rows = {
        name: dataclasses.replace(
            variants.variant(name),
            architecture="testing",
            num_classes=10,
            size=None,
            repository=None,
            url=f"{variants.BUCKET}{name}.npz",
        )
        for name in published.WEIGHTS
    }
    monkeypatch.setattr(variants, "_table", lambda: rows)
    with file_server.running() as server:
        monkeypatch.setenv("BIT_TF_MODELS_URL", f"{server.url}/bucket")
        for name in rows:
            server.bodies[f"/bucket/{name}.npz"] = small_npz.read_bytes()
        yield server


@pytest.fixture
def arguments(small_export, features_export, photos, tmp_path):
    folder = tmp_path / "pictures"
    for name, photo in zip(("n01440764", "1", "2"), photos, strict=True):
        (folder / name).mkdir(parents=True)
        shutil.copy(photo, folder / name)
    return [
        *("--hub-module", str(features_export)),
        *("--hub-classifier", str(small_export)),
        *("--coco-image", str(photos[0])),
        *("--pictures", str(folder)),
    ]


@pytest.mark.slow
def test_the_whole_table(small_bucket, arguments, tmp_path, capsys):
    """Every row, of small stand-ins for what is published."""
    files = ["--output", str(tmp_path / "t.md"), "--json"]
    files.append(str(tmp_path / "t.json"))
    # The stand-in has not the published logits.
    assert published.main([*arguments, *files]) == 1
    captured = capsys.readouterr()
    assert (tmp_path / "t.md").read_text("utf-8") == captured.out
    document = json.loads((tmp_path / "t.json").read_text("utf-8"))
    assert document.keys() == {
        *("command", "date", "machine", "versions", "rows")
    }
    assert "python -m benchmarks.published" in document["command"]
    assert str(tmp_path) in document["command"]
    assert document["versions"].keys() > {"tensorflow", "keras", "bit-tf"}
    rows = document["rows"]
    subset = "not compared: pictures of 3 of the 10 classes"
    assert [row["verdict"] for row in rows] == [
        *[AS_EXPECTED] * 3,
        DIFFERS,
        *[AS_EXPECTED] * 4,
        *[subset] * 2,
    ]
    assert [row["what"] for row in rows[:3]] == list(published.WEIGHTS)
    lines = captured.out.splitlines()
    cells = [line.strip("|").split(" | ") for line in lines if line[:2] == "| "]
    assert [len(row) for row in cells] == [4] * (1 + len(rows))
    assert rows[0]["measured"] == cells[1][2]
    assert "of n = 3;" in rows[-1]["measured"]
    assert captured.err.count("…") >= len(rows)
    assert [seen.target for seen in small_bucket.seen] == [
        f"/bucket/{name}.npz" for name in published.WEIGHTS
    ]


def test_one_bad_download(small_bucket, arguments, small_npz, capsys):
    """Changes, and one that is not there: the other rows go on."""
    features, _, ported = (f"/bucket/{name}.npz" for name in published.WEIGHTS)
    body = bytearray(small_npz.read_bytes())
    with zipfile.ZipFile(small_npz) as archive:
        name = "resnet/block2/unit01/b/standardized_conv2d/kernel.npy"
        body[archive.getinfo(name).header_offset + 9999] ^= 0x40
    small_bucket.bodies[features] = bytes(body)
    small_bucket.bodies.pop(ported)
    assert published.main(arguments) == 1
    out = capsys.readouterr().out.splitlines()
    words = [
        line.strip("| ").split(" | ")[-1].split(":")[0]
        for line in out
        if line.startswith("| ")
    ][1:]
    assert words == [
        *("failed", AS_EXPECTED, "failed"),
        "failed",
        *("failed", "failed", AS_EXPECTED, AS_EXPECTED),
        *("not compared", "failed"),
    ]
    assert "CRC-32" in "".join(out)
    targets = [seen.target for seen in small_bucket.seen]
    assert targets.count(ported) == 1


def test_some_weights_only(small_bucket, arguments, capsys):
    arguments = arguments[:-2]
    code = published.main([*arguments, "--weights", published.CLASSIFIER])
    out = capsys.readouterr().out
    rows = [
        line.strip("| ").split(" | ")
        for line in out.splitlines()
        if line.startswith("| ")
    ][1:]
    verdicts = [row[-1] for row in rows]
    assert code == 0
    assert verdicts == [
        AS_EXPECTED,
        "not run: google/bit-50 is not among --weights",
        *["not run: BiT-M-R50x1 is not among --weights"] * 2,
        *[AS_EXPECTED] * 2,
        "not run: no folder is given with --pictures",
        "not run: google/bit-50 is not among --weights",
    ]
    assert len(small_bucket.seen) == 1


def packed(directory, path):
    """A SavedModel as TF-Hub serves it, in bytes."""
    with tarfile.open(path, "w:gz", compresslevel=1) as archive:
        archive.add(directory, ".")
    return path.read_bytes()


def repository(arrays, directory):
    """Random weights as transformers publishes them: {file: bytes}."""
    import test_transformers
    import transformers

    blocks = (3, 4, 6, 3)
    config = transformers.BitConfig(depths=list(blocks), num_labels=1000)
    model = transformers.BitForImageClassification(config)
    model.load_state_dict(
        test_transformers.state_dict(arrays, blocks), strict=True
    )
    model.save_pretrained(directory)
    (directory / "preprocessor_config.json").write_text(
        json.dumps(
            {
                "image_processor_type": "BitImageProcessor",
                "do_resize": True,
                "size": {"shortest_edge": 448},
                "resample": 2,
                "do_center_crop": True,
                "crop_size": {"height": 448, "width": 448},
                "do_rescale": True,
                "rescale_factor": 1 / 255,
                "do_normalize": True,
                "image_mean": [0.5, 0.5, 0.5],
                "image_std": [0.5, 0.5, 0.5],
            }
        )
    )
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.skipif(
    not (
        importlib.util.find_spec("torch")
        and importlib.util.find_spec("transformers")
    ),
    reason="needs torch and transformers: "
    "pip install -c constraints.txt '.[oracle]', then pytest -m slow",
)
def test_full_size(offline, tmp_path, monkeypatch):
    """Another process, and files of the published names and sizes."""
    import test_published

    from hub_export import saved_model

    paths = {}
    for name, classes, seed in (
        (published.FEATURES, 21843, 1),
        (published.CLASSIFIER, 1000, 2),
    ):
        weights = random_weights.RandomWeights((3, 4, 6, 3), 64, classes, seed)
        paths[name] = tmp_path / f"{name}.npz"
        checkpoints.write(weights, paths[name])
    features, classifier = tmp_path / "features", tmp_path / "classifier"
    saved_model.convert(
        paths[published.FEATURES], features, head=False, verify=False
    )
    saved_model.convert(paths[published.CLASSIFIER], classifier, verify=False)
    ported = random_weights.RandomWeights((3, 4, 6, 3), 64, 1000, 3)
    hugging_face = repository(dict(ported), tmp_path / "repository")
    monkeypatch.setattr(
        test_published, "REPOSITORIES", {"google/bit-50": hugging_face}
    )
    sample = pytest.importorskip(
        "sklearn.datasets",
        reason="needs scikit-learn: pip install -c constraints.txt '.[test]', "
        "then pytest -m slow",
    ).load_sample_image("china.jpg")
    Image.fromarray(sample).save(tmp_path / "china.png")
    folder = tmp_path / "pictures" / "n01440764"
    folder.mkdir(parents=True)
    shutil.copy(tmp_path / "china.png", folder)
    with file_server.running(test_published.HubServer) as server:
        for name, path in paths.items():
            server.bodies[f"/bucket/{name}.npz"] = path.read_bytes()
        server.bodies["/google/bit/m-r50x1/1"] = packed(
            features, tmp_path / "features.tar.gz"
        )
        server.bodies["/coco.png"] = (tmp_path / "china.png").read_bytes()
        process = subprocess.run(
            [
                *(sys.executable, "-m", "benchmarks.published"),
                *("--hub-module", f"{server.url}/google/bit/m-r50x1/1"),
                *("--hub-classifier", str(classifier)),
                *("--coco-image", f"{server.url}/coco.png"),
                *("--pictures", str(folder.parent)),
                *("--json", str(tmp_path / "table.json")),
            ],
            env={
                **os.environ,
                "BIT_TF_MODELS_URL": f"{server.url}/bucket",
                "HF_ENDPOINT": server.url,
                "PYTHONPATH": str(pathlib.Path(__file__).parents[1]),
            },
            capture_output=True,
            text=True,
            timeout=1800,
        )
        asked = [seen.target for seen in server.seen]
    assert process.returncode == 1, process.stderr
    assert process.stdout.startswith("- command: python -m benchmarks")
    rows = json.loads((tmp_path / "table.json").read_text("utf-8"))["rows"]
    subset = "not compared: pictures of 1 of the 1000 classes"
    assert [row["verdict"] for row in rows] == [
        *[AS_EXPECTED] * 3,
        DIFFERS,
        *[AS_EXPECTED] * 4,
        *[subset] * 2,
    ], process.stdout
    assert "273071896 bytes" in rows[0]["measured"]
    assert "102242668 bytes" in rows[1]["measured"]
    assert "153 arrays" in rows[2]["measured"]
    assert "/google/bit/m-r50x1/1?tf-hub-format=compressed" in asked


@pytest.mark.network
def test_what_is_published(tmp_path, monkeypatch, capsys):
    """Needs the internet; half a gigabyte."""
    for name in ("BIT_TF_MODELS_URL", "HF_ENDPOINT", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    code = published.main([])
    out = capsys.readouterr().out
    assert code == 0, out
    assert out.count(f"| {AS_EXPECTED} |") == 8, out
