"""Scores of models on small folders of pictures."""

import dataclasses
import gc
import json
import subprocess
import sys
import weakref

import helpers
import keras
import numpy as np
import pytest
import tensorflow as tf
import tensorflow_datasets as tfds
from PIL import Image

from bit_tf import (
    checkpoints,
    data,
    errors,
    evaluate,
    feature_scores,
    hub,
    imagenet_real,
    images,
    input_pipeline,
    labels,
    metrics,
    presets,
    probe,
    transfer,
)

SMALL = input_pipeline.evaluation_preset(32)
CLASSES = "abcdefghij"
# A SavedModel of ours takes pictures of any size, and is slow on large ones.
FAST = ("--preset", "big_transfer eval 128")


def write_pictures(root, counts):
    """Folders of pictures: {split: examples}, classes in turn."""
    seed = 0
    for split, count in counts.items():
        for index in range(count):
            folder = root / split / CLASSES[index % 10]
            folder.mkdir(parents=True, exist_ok=True)
            pixels = helpers.random_images(1, 24, 24 + index % 5, seed=seed)[0]
            Image.fromarray(pixels).save(folder / f"{index:03}.png")
            seed += 1


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("pictures") / "letters"
    write_pictures(root, {"train": 50, "test": 37})
    return root


@pytest.fixture(scope="module")
def dataset(folder):
    return data.open_dataset(f"folder:{folder}")


def tiny(outputs):
    """A model that is quick to make and to run."""
    return keras.Sequential(
        [
            keras.Input((None, None, 3)),
            keras.layers.AveragePooling2D(8),
            keras.layers.GlobalMaxPooling2D(),
            keras.layers.Dense(
                outputs, kernel_initializer=keras.initializers.HeNormal(seed=1)
            ),
        ]
    )


@pytest.fixture
def tiny_classifier(monkeypatch):
    """Has every source be a model of ten classes without names."""
    model = tiny(10)
    monkeypatch.setattr(
        transfer, "open_classifier", lambda source: (model, checkpoints.Facts())
    )
    return model


@pytest.fixture
def tiny_features(monkeypatch):
    """Has every source be a model of twenty features."""
    model = tiny(20)
    monkeypatch.setattr(transfer, "feature_model", lambda source: model)
    return model


@pytest.fixture(scope="module")
def fine_tuned(small_npz, tmp_path_factory):
    """A .keras file with labels in another order, and a preset."""
    model, facts = transfer.open_classifier(str(small_npz))
    path = tmp_path_factory.mktemp("model") / "model.keras"
    names = tuple(labels.Label("", name.upper()) for name in reversed(CLASSES))
    facts = dataclasses.replace(facts, labels=names, preset=SMALL)
    transfer.save(model, path, facts)
    return path


class Recorder:
    """Means of the colours, with the sizes of the batches."""

    def __init__(self):
        self.sizes = []

    def __call__(self, pictures):
        assert pictures.dtype == tf.float32
        self.sizes.append(len(pictures))
        return tf.reduce_mean(pictures, axis=(1, 2))


def by_hand(function, split, preset=SMALL):
    pictures = [
        images.preprocess(split.picture(index), preset)
        for index in range(split.size)
    ]
    return np.asarray(function(tf.constant(np.stack(pictures))))


@pytest.mark.parametrize("batch_size", [5, 16, 37, 64])
def test_all_37_pictures_are_scored(dataset, batch_size):
    test = dataset.splits["test"]
    model = Recorder()
    outputs, true = evaluate.predict(
        model, test, preset=SMALL, batch_size=batch_size
    )
    assert outputs.shape == (37, 3)
    assert outputs.dtype == np.float32
    assert true.dtype == np.int64
    assert true.tolist() == test.labels.tolist()
    np.testing.assert_allclose(
        outputs, by_hand(Recorder(), test), rtol=0, atol=1e-6
    )
    # The model never sees a batch of another size.
    assert len(set(model.sizes)) == 1
    assert sum(model.sizes) - 37 < batch_size


@pytest.mark.slow
def test_keras_models_and_functions_of_hubs_agree(dataset, features_export):
    test = dataset.splits["test"].take([0, 5, 11])
    model = transfer.feature_model(str(features_export))
    function, length = hub.picture_function(
        hub.load(features_export), "image_feature_vector", "features", "x"
    )
    options = {"preset": SMALL, "batch_size": 2}
    outputs, _ = evaluate.predict(model, test, **options)
    assert outputs.shape == (3, length)
    again, _ = evaluate.predict(function, test, **options)
    assert helpers.relative_error(again, outputs) < 1e-5
    expected = by_hand(function, test)
    assert helpers.relative_error(outputs, expected) < 1e-5


def test_under_a_strategy(dataset):
    test = dataset.splits["test"].take(range(7))
    strategy = tf.distribute.OneDeviceStrategy("/cpu:0")
    with strategy.scope():
        model = keras.Sequential(
            [keras.Input((32, 32, 3)), keras.layers.GlobalAveragePooling2D()]
        )
    options = {"preset": SMALL, "batch_size": 4}
    outputs, _ = evaluate.predict(model, test, strategy=strategy, **options)
    np.testing.assert_allclose(
        outputs, by_hand(Recorder(), test), rtol=0, atol=1e-6
    )


TWO_DEVICES = """
import sys
import numpy as np
import tensorflow as tf
(cpu,) = tf.config.list_physical_devices("CPU")
tf.config.set_logical_device_configuration(
    cpu, [tf.config.LogicalDeviceConfiguration()] * 2
)
from bit_tf import data, evaluate, input_pipeline, transfer
test = data.open_dataset("folder:" + sys.argv[1]).splits["test"]
options = {"preset": input_pipeline.evaluation_preset(32), "batch_size": 15}
alone, _ = evaluate.predict(
    transfer.open_classifier(sys.argv[2])[0], test, **options
)
strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
with strategy.scope():
    model, _ = transfer.open_classifier(sys.argv[2])
both, labels = evaluate.predict(model, test, strategy=strategy, **options)
assert strategy.num_replicas_in_sync == 2
assert both.shape == (37, 10), both.shape
assert labels.tolist() == test.labels.tolist()
assert np.abs(both - alone).max() < 1e-5 * np.abs(alone).max()
"""


@pytest.mark.slow
def test_two_devices_give_what_one_gives(folder, small_npz):
    process = subprocess.run(
        [sys.executable, "-c", TWO_DEVICES, folder, small_npz],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert process.returncode == 0, process.stderr


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda x: x, r"one vector a picture.*\(2, 32, 32, 3\)"),
        (lambda x: tf.zeros([1, 5]), r"one vector a picture.*\(1, 5\)"),
    ],
    ids=["pictures", "one row"],
)
def test_models_of_something_else(dataset, model, message):
    test = dataset.splits["test"].take([1, 2])
    with pytest.raises(ValueError, match=message):
        evaluate.predict(model, test, preset=SMALL)


def test_too_little_memory(dataset):
    def model(pictures):
        raise tf.errors.ResourceExhaustedError(None, None, "OOM")

    with pytest.raises(errors.BitTfError, match=r"37 of 32 × 32.*--batch-size"):
        evaluate.predict(
            model, dataset.splits["test"], preset=SMALL, batch_size=64
        )


def test_a_bad_picture_is_named_and_its_iterator_let_go(tmp_path):
    """Else the process may hang at its end, in the iterator's destructor."""
    write_pictures(tmp_path / "letters", {"test": 20})
    path = tmp_path / "letters" / "test" / "c" / "002.png"
    path.write_bytes(path.read_bytes()[:200])
    test = data.open_dataset(f"folder:{tmp_path / 'letters'}").splits["test"]
    batches = input_pipeline.evaluation_batches(
        test, preset=SMALL, batch_size=4
    )
    alive = []

    class Watched:
        def __iter__(self):
            iterator = iter(batches)
            alive.append(weakref.ref(iterator))
            alive.append(weakref.ref(iterator._iterator_resource))
            return iterator

    with pytest.raises(errors.ImageDecodeError, match=r"c/002\.png") as caught:
        list(input_pipeline.iterate(Watched()))
    gc.collect()
    assert [reference() for reference in alive] == [None, None]
    assert caught.value


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "1 or more. Received: 0"),
        ({"preset": "tfhub"}, "of one size.*Received: 'tfhub'"),
        ({"preset": "nonsense"}, "Presets are"),
    ],
)
def test_bad_options(dataset, options, message):
    with pytest.raises(ValueError, match=message):
        evaluate.predict(
            Recorder(), dataset.splits["test"], **{"preset": SMALL, **options}
        )
    with pytest.raises(errors.DatasetError, match="without any"):
        evaluate.predict(
            Recorder(), dataset.splits["test"].take([]), preset=SMALL
        )


def test_a_model_without_names_is_scored_by_index(dataset, tiny_classifier):
    found = evaluate.evaluate("tiny", dataset, preset=SMALL)
    test = dataset.splits["test"]
    expected = by_hand(tiny_classifier, test)
    np.testing.assert_allclose(found.outputs, expected, atol=1e-5)
    report = json.loads(evaluate.to_json(found.report))
    assert report == found.report
    assert report["classes_matched"] == "by index"
    assert report["split"] == "test"
    assert report["examples"] == 37
    assert report["preset"]["name"] == SMALL.name
    assert report["activation"] == "softmax"
    assert np.sum(report["confusion"]) == 37
    assert [row["name"] for row in report["per_class"]] == list(CLASSES)
    measured = metrics.classification(expected, test.labels, list(CLASSES))
    assert report["top1"] == measured["top1"]
    assert report["loss"] == pytest.approx(measured["loss"], rel=1e-4)


def test_classes_in_another_order_are_mapped(dataset, fine_tuned, small_npz):
    found = evaluate.evaluate(fine_tuned, dataset)
    assert found.report["classes_matched"] == "by name"
    # Its own preset, and not the usual one of 480 pixels.
    assert found.report["preset"]["name"] == SMALL.name
    assert found.report["model"]["architecture"] == "testing"
    model, _ = transfer.open_classifier(str(small_npz))
    plain = by_hand(model, dataset.splits["test"])
    assert helpers.relative_error(found.outputs, plain[:, ::-1]) < 1e-5


@pytest.mark.slow
def test_a_saved_model_is_scored(dataset, small_export, small_npz):
    found = evaluate.evaluate(str(small_export), dataset, preset=SMALL)
    assert found.report["classes_matched"] == "by name"
    plain = evaluate.evaluate(str(small_npz), dataset, preset=SMALL)
    assert helpers.relative_error(found.outputs, plain.outputs) < 1e-4


def names(*texts):
    return [labels.Label("", text) for text in texts]


SORTED_AS_TEXT = ("0", "1", "10", "2", "3", "4", "5", "6", "7", "8", "9")
SORTED_AS_NUMBERS = [0, 1, 10, 2, 3, 4, 5, 6, 7, 8, 9]
WORDNET = [labels.Label("n02", "cat"), labels.Label("n01", "dog")]


@pytest.mark.parametrize(
    ("own", "theirs", "columns", "how"),
    [
        (names("a", "b"), ("a", "b"), [0, 1], "by name"),
        (names("b", "c", "a"), ("a", "b", "c"), [2, 0, 1], "by name"),
        (names("Big Cat", "dog"), ("dog", "big_cat"), [1, 0], "by name"),
        (WORDNET, ("n01", "n02"), [1, 0], "by name"),
        (WORDNET, ("cat", "dog"), [0, 1], "by name"),
        (None, ("a", "b"), [0, 1], "by index"),
        (names("0", "1"), ("a", "b"), [0, 1], "by index"),
        (names("cat", "dog"), ("0", "1"), [0, 1], "by index"),
        (names("1", "0"), ("0", "1"), [1, 0], "by name"),
        (None, SORTED_AS_TEXT, SORTED_AS_NUMBERS, "by index"),
        (names(*CLASSES, "k"), SORTED_AS_TEXT, SORTED_AS_NUMBERS, "by index"),
        (
            names(*SORTED_AS_TEXT),
            (*CLASSES, "k"),
            np.argsort(SORTED_AS_NUMBERS).tolist(),
            "by index",
        ),
        (names(*SORTED_AS_TEXT), SORTED_AS_TEXT, list(range(11)), "by name"),
        (names("02", "00", "01"), ("1", "2", "0"), [2, 0, 1], "by index"),
        (None, ("1", "2"), [0, 1], "by index"),
        (names("!", "?"), ("?", "!"), [1, 0], "by name"),
        (names("цветок", "木"), ("木", "Цветок"), [1, 0], "by name"),
    ],
)
def test_align(own, theirs, columns, how):
    found = evaluate.align(own, theirs, len(theirs))
    assert (found[0].tolist(), found[1]) == (columns, how)


@pytest.mark.parametrize(
    ("own", "theirs", "outputs", "message"),
    [
        (names("a", "b"), ("a", "c"), 2, r"'a', 'b'.*'a', 'c'.*lacks: 'c'"),
        (names("a", "b"), ("a", "b", "c"), 2, "of 2 .*of 3 .*lacks: 'c'"),
        (names("a", "b", "c"), ("a", "b"), 3, "of 3 classes.*of 2"),
        (None, ("a", "b", "c"), 21843, "of 21843 classes .nameless.*of 3"),
        (names("a", "a"), ("a", "b"), 2, "lacks: 'b'"),
        (names("a", "b"), ("1", "2"), 2, "lacks: '1', '2'"),
        (names("a", "b"), ("0", "0"), 2, "lacks: '0', '0'"),
        (None, tuple("abcdefgh"), 7, "'e' and 3 more"),
    ],
)
def test_other_classes_are_no_classes(own, theirs, outputs, message):
    with pytest.raises(errors.DatasetError, match=f"{message}.*--probe"):
        evaluate.align(own, theirs, outputs)


def test_pictures_of_mistakes_are_read_in_one_pass(folder):
    split = data.open_dataset(f"folder:{folder}").splits["test"]
    outputs = np.zeros((split.size, 10), np.float32)
    outputs[np.arange(split.size), (split.labels + 1) % 10] = 1
    outputs[[5, 9, 20], (split.labels[[5, 9, 20]] + 1) % 10] = [3, 4, 2]
    passes = []
    records = split.source.records

    def recorded(order):
        passes.append(list(order))
        return records(order)

    split.source.records = recorded
    items = evaluate.mistake_items(split, outputs, split.labels, count=3)
    assert len(passes) == 1
    assert [item[-1] for item in items] == [
        split.identifiers[index] for index in (9, 5, 20)
    ]
    for index, item in zip((9, 5, 20), items, strict=True):
        np.testing.assert_array_equal(item[0], split.picture(index))
        assert item[1] == split.class_names[split.labels[index]]
    # A stream would be gone through for nothing.
    passes.clear()
    right = np.eye(10)[split.labels]
    assert evaluate.mistake_items(split, right, split.labels) == []
    assert not passes


def test_splits(dataset):
    assert evaluate.scored_split(dataset).name == "test"
    assert evaluate.scored_split(dataset, "train").name == "train"
    only = data.Dataset(
        "x", dataset.class_names, {"validation": dataset.splits["train"]}
    )
    assert evaluate.scored_split(only) is dataset.splits["train"]
    for missing in (None, "test"):
        bare = data.Dataset(
            "x", dataset.class_names, {"train": dataset.splits["train"]}
        )
        with pytest.raises(errors.DatasetError, match=r"x with train.*--split"):
            evaluate.scored_split(bare, missing)


def test_a_broken_model(dataset, tiny_classifier, tiny_features):
    for model, score in (
        (tiny_classifier, evaluate.evaluate),
        (tiny_features, feature_scores.score),
    ):
        kernel, bias = model.get_weights()
        bias[3] = np.nan
        model.set_weights([kernel, bias])
        with pytest.raises(errors.BitTfError, match=r"'x/y': NaN.*of \d+ pict"):
            score("x/y", dataset, preset=SMALL)


def test_json_has_a_line_a_row():
    report = {"confusion": [[1, 2], [3, 4]], "x": {"name": "[\n 1"}, "n": None}
    text = evaluate.to_json(report)
    assert json.loads(text) == report
    assert "[1, 2],\n" in text
    with pytest.raises(ValueError, match=r"nan|NaN"):
        evaluate.to_json({"loss": float("nan")})


def test_features_are_scored(dataset, tiny_features):
    found = feature_scores.score("tiny", dataset, preset=SMALL, seeds=[0, 1])
    json.dumps(found, allow_nan=False)
    assert [row["examples_per_class"] for row in found["few_shot"]] == [1, 5]
    assert [row["k"] for row in found["nearest_neighbours"]] == [1, 5, 20]
    assert found["not_possible"] == {"shots": [10, 25], "k": []}
    assert found["train_examples"] == 50
    train, test = dataset.splits["train"], dataset.splits["test"]
    chosen = train.few_shot_indices(1, 1)
    few = by_hand(tiny_features, train.take(chosen))
    ridge = probe.Ridge.fit(few, train.labels[chosen], 10)
    guesses = ridge.scores(by_hand(tiny_features, test)).argmax(axis=1)
    assert found["few_shot"][0]["runs"][1] == {
        "seed": 1,
        "top1": (guesses == test.labels).mean(),
        "l2": 1024.0,
    }
    text = feature_scores.markdown(found)
    assert "| 5 |" in text
    assert "Not possible with so few training pictures: shots 10, 25." in text


def test_only_the_pictures_needed_are_read(dataset, tiny_features, monkeypatch):
    read = {}
    predict = evaluate.predict

    def counted(model, split, **options):
        read[split.name] = split.size
        return predict(model, split, **options)

    monkeypatch.setattr(evaluate, "predict", counted)
    options = {"preset": SMALL, "shots": [1], "seeds": [0, 1]}
    alone = feature_scores.score("tiny", dataset, neighbours=(), **options)
    assert 10 < read["train"] <= 20
    beside = feature_scores.score("tiny", dataset, neighbours=[1], **options)
    assert read == {"train": 50, "test": 37}
    assert alone["few_shot"] == beside["few_shot"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shots": [6]}, "6 examples a class.*fewer of 'a' .5."),
        ({"neighbours": [51]}, r"at most.*50. Received: \[51\]"),
        ({"split": "train"}, "'train' for both"),
        ({"split": "validation"}, "with train, test"),
    ],
)
def test_bad_feature_scores_end_before_the_model_is_read(
    dataset, options, message
):
    with pytest.raises(errors.DatasetError, match=message):
        feature_scores.score("no such model", dataset, **options)


@pytest.fixture
def thousand(monkeypatch):
    """Has every source be a model of ImageNet's classes."""
    facts = checkpoints.Facts(labels=labels.label_set("ilsvrc2012"))
    monkeypatch.setattr(
        transfer, "open_classifier", lambda source: (tiny(1000), facts)
    )
    return "thousand"


@pytest.fixture
def mocked():
    """TFDS with eleven random examples."""
    with tfds.testing.mock_data(num_examples=11):
        yield


def test_real(mocked, thousand):
    found = imagenet_real.score(thousand, preset=SMALL, batch_size=4)
    report = found.report
    assert report["examples"] == 11
    assert report["dataset"] == "imagenet2012_real"
    assert report["classes_matched"] == "by name"
    original, sets = imagenet_real.label_sets()
    assert original.tolist() == found.labels.tolist()
    assert any(len(labels) > 1 for labels in sets)
    best = found.outputs.argmax(axis=1)
    assert report["real"] == {
        "examples": sum(len(right) > 0 for right in sets),
        "skipped": sum(len(right) == 0 for right in sets),
        "top1": np.mean(
            [
                choice in right
                for choice, right in zip(best, sets, strict=True)
                if len(right)
            ]
        ),
    }


def test_real_labels_are_those_of_our_label_set():
    builder = tfds.builder("imagenet2012_real")
    theirs = builder.info.features["original_label"].names
    assert theirs == [row.id for row in labels.label_set("ilsvrc2012")]


def test_real_of_another_dataset(mocked, thousand):
    with pytest.raises(errors.DatasetError, match="original_label"):
        imagenet_real.score(thousand, dataset="cifar10")


@pytest.mark.parametrize(
    "model",
    ["tiny_classifier", pytest.param("small_npz", marks=pytest.mark.slow)],
)
def test_command_writes_report_and_charts(
    call, folder, tmp_path, request, model
):
    model = request.getfixturevalue(model)
    code, out, err = call(
        *("bit-tf", "evaluate", "--model", model),
        *("--dataset", f"folder:{folder}", "--batch-size", 16, *FAST),
        *("--output", tmp_path / "out"),
    )
    assert code == 0, err
    assert "37 pictures of test, 10 classes, matched by index" in out
    assert "top-1" in out
    report = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert report["examples"] == 37
    assert f"{100 * report['top1']:.1f}%" in out
    files = {path.name for path in (tmp_path / "out").iterdir()}
    assert files == {"metrics.json", *evaluate.CHARTS}
    for name in evaluate.CHARTS:
        with Image.open(tmp_path / "out" / name) as picture:
            picture.load()


def test_command_scores_features(call, folder, tiny_features, tmp_path):
    code, out, err = call(
        *("bit-tf", "evaluate", "--model", "tiny"),
        *("--dataset", f"folder:{folder}", "--probe", "--knn", *FAST),
        *("--shots", 1, 2, "--seeds", 2, "--l2", 1, 100, "--k", 3),
        *("--temperature", 0.07, "--output", tmp_path / "out"),
    )
    assert code == 0, err
    result = json.loads((tmp_path / "out" / "features.json").read_text())
    assert [len(row["runs"]) for row in result["few_shot"]] == [2, 2]
    assert result["few_shot"][0]["l2_chosen_on"]
    assert [row["k"] for row in result["nearest_neighbours"]] == [3]
    assert (tmp_path / "out" / "features.md").read_text() == out
    assert "exp(similarity / 0.07)" in out


def test_command_of_real(call, mocked, thousand):
    code, out, err = call(
        *("bit-tf", "evaluate", "--model", thousand, "--real", *FAST)
    )
    assert code == 0, err
    assert "ReaL top-1" in out
    assert "the 20 worst classes" in out


def test_command_of_vtab(call, monkeypatch, tmp_path):
    from bit_tf import vtab

    seen = {}

    def run(source, tasks, **options):
        seen.update(options, source=source, tasks=tasks)
        return {"tasks": {}, "scores": {}}

    devices = object()
    monkeypatch.setattr(vtab.distribution, "strategy", lambda: devices)
    monkeypatch.setattr(vtab, "run", run)
    monkeypatch.setattr(vtab, "markdown", lambda results: "| a table |\n")
    code, out, _ = call(
        *("bit-tf", "evaluate", "--model", "BiT-M-R50x1", "--vtab", "dtd"),
        *("svhn", "--steps", 3, "--output", tmp_path / "out"),
    )
    assert (code, out) == (0, "| a table |\n")
    assert seen == {
        "source": "BiT-M-R50x1",
        "tasks": ["dtd", "svhn"],
        "output": str(tmp_path / "out"),
        "data_dir": None,
        "manual_dir": None,
        "batch_size": 512,
        "micro_batches": None,
        "steps": 3,
        "seed": 0,
        "strategy": devices,
    }


def test_dry_run_of_vtab(call, tmp_path):
    arguments = ("bit-tf", "evaluate", "--model", "BiT-M-R50x1", "--dry-run")
    places = ("--data-dir", tmp_path, "--output", tmp_path / "out")
    code, out, err = call(*arguments, *places, "--vtab", "dtd", "cifar100")
    assert code == 0, err
    assert list(tmp_path.iterdir()) == []
    assert [line.split()[:2] for line in out.splitlines()] == [
        ["cifar100", "ok"],
        ["dtd", "ok"],
    ]
    code, _, err = call(*arguments, *places, "--vtab", "cifar10")
    assert code == 1
    assert "Did you mean 'cifar100'" in err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "arguments",
    [
        (),
        ("--dataset", "x", "--vtab", "dtd"),
        ("--dataset", "x", "--real", "--split", "test"),
        ("--dataset", "x", "--probe", "--vtab", "dtd"),
        ("--dataset", "x", "--real", "--knn"),
        ("--dataset", "x", "--shots", "1"),
        ("--dataset", "x", "--knn", "--l2", "1"),
        ("--dataset", "x", "--probe", "--k", "1"),
        ("--dataset", "x", "--probe", "--l2", "0"),
        ("--dataset", "x", "--probe", "--l2", "nan"),
        ("--dataset", "x", "--knn", "--temperature", "-1"),
        ("--dataset", "x", "--steps", "3"),
        ("--dataset", "x", "--dry-run"),
        ("--dataset", "x", "--split", "train[:10]"),
        ("--dataset", "x", "--preset", "tfhub"),
        ("--vtab", "dtd", "--preset", "timm in1k"),
        ("--vtab", "dtd", "--seed", "-1"),
        ("--vtab", "dtd", "--bad-images", "skip"),
        ("--real", "--bad-images", "skip"),
        ("--dataset", "x", "--real", "--bad-images", "raise"),
        ("--vtab",),
    ],
    ids=" ".join,
)
def test_wrong_usage(call, arguments):
    code, out, err = call("bit-tf", "evaluate", "--model", "m", *arguments)
    assert (code, out) == (2, "")
    assert "usage:" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--dataset", "folder:/no/such"), "/no/such"),
        (("--dataset", "FOLDER", "--split", "validation"), "with train, test"),
        (("--dataset", "FOLDER", "--probe", "--shots", "9"), "9 examples"),
        (
            ("--dataset", "FOLDER", "--output", "FOLDER/test/a/000.png"),
            "--output is a directory. Received: ",
        ),
        (
            ("--dataset", "FOLDER", "--output", "FOLDER/test/a/000.png/x"),
            "--output is a directory that can be made",
        ),
        (("--dataset", "FOLDER", "--output", ""), "an empty name"),
    ],
)
def test_errors_are_one_line(call, folder, arguments, message):
    arguments = [text.replace("FOLDER/", f"{folder}/") for text in arguments]
    arguments = [
        text.replace("FOLDER", f"folder:{folder}") for text in arguments
    ]
    code, out, err = call(
        "bit-tf", "evaluate", "--model", "no such", *arguments, *FAST
    )
    assert (code, out) == (1, "")
    assert err.startswith("bit-tf: error: ")
    assert message in err


@pytest.mark.parametrize(
    "arguments", [(), ("--probe",)], ids=["classifier", "probe"]
)
def test_nothing_is_left_of_a_failure(call, folder, tmp_path, arguments):
    code, _, err = call(
        *("bit-tf", "evaluate", "--model", "no such", *arguments, *FAST),
        *("--dataset", f"folder:{folder}", "--output", tmp_path / "new/out"),
    )
    assert (code, err.count("\n")) == (1, 1)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "arguments",
    [("--dataset", "FOLDER"), ("--dataset", "FOLDER", "--knn"), ("--real",)],
    ids=["classifier", "knn", "real"],
)
@pytest.mark.parametrize("name", ["state", "model.keras"])
def test_results_of_fine_tuning_are_not_replaced(
    call, folder, tiny_classifier, tmp_path, arguments, name
):
    (tmp_path / name).mkdir()
    (tmp_path / "metrics.json").write_text("mine")
    arguments = [
        text.replace("FOLDER", f"folder:{folder}") for text in arguments
    ]
    code, out, err = call(
        *("bit-tf", "evaluate", "--model", "tiny", *arguments, *FAST),
        *("--output", tmp_path),
    )
    assert (code, out) == (1, "")
    assert f"'bit-tf finetune' has written '{name}'" in err
    assert (tmp_path / "metrics.json").read_text() == "mine"
    assert len(list(tmp_path.iterdir())) == 2


def test_presets_of_the_command_have_a_size():
    for row in presets.PRESETS.values():
        if row.size:
            assert evaluate.preset_for(row) is row


def test_a_model_is_traced_once_and_let_go(dataset):
    model = tiny(3)
    for _ in range(2):
        evaluate.predict(model, dataset.splits["test"], preset=SMALL)
    call = evaluate._FUNCTIONS[model]
    assert call.experimental_get_tracing_count() == 1
    gone = weakref.ref(model)
    del model, call
    gc.collect()
    assert gone() is None
