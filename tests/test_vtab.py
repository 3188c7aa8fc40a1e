"""VTAB's table, its labels at every edge, and all tasks on made-up data."""

import dataclasses
import json
import pathlib
import re
import types

import numpy as np
import pytest

from bit_tf import errors, hyperrule, variants

TASKS = list(variants.VTAB_TASKS)


@pytest.fixture(scope="module")
def tasks():
    from bit_tf import vtab_tasks

    return vtab_tasks


# As google-research/task_adaptation computes them, for TFDS' real sizes.
SPLITS = {
    "caltech101": ("train[2754:2954]", "test"),
    "cifar100": ("train[45000:45200]", "test"),
    "dtd": ("validation[:200]", "test"),
    "oxford_flowers102": ("validation[:200]", "test"),
    "oxford_iiit_pet": ("train[2944:3144]", "test"),
    "sun397": ("validation[:200]", "test"),
    "svhn": ("train[65931:66131]", "test"),
    "patch_camelyon": ("validation[:200]", "test"),
    "eurosat": ("train[16200:16400]", "train[21600:]"),
    "resisc45": ("train[18900:19100]", "train[25200:]"),
    "diabetic_retinopathy": ("validation[:200]", "test"),
    "clevr-count": ("train[63000:63200]", "validation"),
    "clevr-distance": ("train[63000:63200]", "validation"),
    "dmlab": ("validation[:200]", "test"),
    "kitti-distance": ("validation[:200]", "test"),
    "dsprites-orientation": ("train[589824:590024]", "train[663552:]"),
    "dsprites-xpos": ("train[589824:590024]", "train[663552:]"),
    "smallnorb-azimuth": ("test[:200]", "test[12150:]"),
    "smallnorb-elevation": ("test[:200]", "test[12150:]"),
}
NO_FLIP = {"dsprites-orientation", "dsprites-xpos", "smallnorb-azimuth"}
NO_CROP = {
    *("clevr-count", "clevr-distance", "dmlab", "kitti-distance"),
    "dsprites-xpos",
}


def test_table_has_the_tasks_of_the_published_weights(tasks):
    assert list(tasks.TASKS) == TASKS
    groups = [row.group for row in tasks.TASKS.values()]
    assert groups == ["natural"] * 7 + ["specialized"] * 4 + ["structured"] * 8
    assert sorted(set(groups)) == list(tasks.GROUPS)
    with pytest.raises(TypeError):
        tasks.TASKS["mine"] = None


@pytest.mark.parametrize("name", TASKS)
def test_row(tasks, name):
    row = tasks.TASKS[name]
    assert row.name == name
    assert (row.flip, row.crop) == (name not in NO_FLIP, name not in NO_CROP)
    validation, test = SPLITS[name]
    assert row.splits() == {
        "train800": "train[:800]",
        "val200": validation,
        "train800val200": f"train[:800]+{validation}",
        "test": test,
    }
    if row.class_names is not None:
        assert len(set(row.class_names)) == row.classes
    else:
        assert list(row.features.values()) == [row.classes]


@pytest.mark.parametrize("name", TASKS)
def test_rule_has_the_size_of_the_published_weights(tasks, name):
    rule = tasks.TASKS[name].rule()
    classes, side = variants.VTAB_TASKS[name]
    assert tasks.TASKS[name].classes == classes
    assert rule.resolution.crop == side
    assert (rule.steps, rule.mixup_alpha, rule.examples) == (500, 0.0, 1000)
    assert tasks.TASKS[name].rule(64).steps == 4000


def test_splits_follow_the_sizes_of_another_version(tasks):
    splits = tasks.TASKS["caltech101"].splits({"train": 3059, "test": 6085})
    assert splits["val200"] == "train[2753:2953]"
    splits = tasks.TASKS["eurosat"].splits({"train": 1001})
    assert splits["val200"] == "train[600:800]"
    assert splits["test"] == "train[800:]"


def write_metadata(row, data_dir, sizes=None):
    """What TFDS writes beside a prepared dataset, but the dataset."""
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core import naming
    from tensorflow_datasets.core import splits as tfds_splits

    builder = tfds.builder(row.builder, data_dir=data_dir)
    folder = pathlib.Path(builder.data_dir)
    if folder.exists():
        return builder
    folder.mkdir(parents=True)
    template = naming.ShardedFileTemplate(
        data_dir=folder, dataset_name=builder.name, filetype_suffix="tfrecord"
    )
    sizes = row.examples if sizes is None else sizes
    splits = [
        tfds_splits.SplitInfo(
            name=name,
            shard_lengths=[count],
            num_bytes=1,
            filename_template=template,
        )
        for name, count in sizes.items()
    ]
    builder.info.set_splits(tfds_splits.SplitDict(splits))
    builder.info.set_file_format("tfrecord")
    builder.info.write_to_directory(folder)
    return builder


@pytest.fixture(scope="module")
def prepared(tasks, tmp_path_factory):
    """A data_dir with the metadata of all tasks, as TFDS publishes them."""
    data_dir = tmp_path_factory.mktemp("tfds")
    for row in tasks.TASKS.values():
        write_metadata(row, data_dir)
    return data_dir


def test_check_of_the_real_metadata(tasks, prepared):
    rows = tasks.check(data_dir=prepared)
    assert [row["task"] for row in rows] == TASKS
    assert [row["problems"] for row in rows] == [[]] * 19
    assert all(row["ok"] for row in rows)
    assert {row["task"]: row["sizes"]["test"] for row in rows} == {
        "caltech101": 6084,
        "cifar100": 10_000,
        "dtd": 1880,
        "oxford_flowers102": 6149,
        "oxford_iiit_pet": 3669,
        "sun397": 21_750,
        "svhn": 26_032,
        "patch_camelyon": 32_768,
        "eurosat": 5400,
        "resisc45": 6300,
        "diabetic_retinopathy": 42_670,
        "clevr-count": 15_000,
        "clevr-distance": 15_000,
        "dmlab": 22_735,
        "kitti-distance": 711,
        "dsprites-orientation": 73_728,
        "dsprites-xpos": 73_728,
        "smallnorb-azimuth": 12_150,
        "smallnorb-elevation": 12_150,
    }
    assert {row["sizes"]["train"] for row in rows} == {1000}
    json.dumps(rows, allow_nan=False)


def test_check_without_metadata(tasks, tmp_path):
    rows = tasks.check(["svhn", "dtd", "svhn"], data_dir=tmp_path)
    assert [(row["task"], row["ok"]) for row in rows] == [
        ("dtd", True),
        ("svhn", True),
    ]
    assert rows[0]["sizes"] == {}
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "changes", "problem"),
    [
        ("dtd", {"builder": "dtdd"}, "builder dtdd: Dataset dtdd not found"),
        ("sun397", {"builder": "sun397/mine"}, "BuilderConfig mine not found"),
        ("dtd", {"builder": "dtd:9.*.*"}, "cannot be loaded at version"),
        ("dtd", {"features": {"texture": 47}}, "no feature 'texture' among"),
        ("dtd", {"features": {"label": 48}}, "'label' has 47 classes, not 48"),
        (
            "dtd",
            {"features": {"file_name": 47}},
            "'file_name' is no class label but Text",
        ),
        ("dtd", {"builder": "mnist"}, "'label' has 10 classes, not 47"),
        ("dtd", {"builder": "ag_news_subset"}, "no picture 'image' among"),
        (
            "cifar100",
            {"picture": (28, 28)},
            "pictures are (32, 32), not (28, 28)",
        ),
        (
            "kitti-distance",
            {"features": {"objects/kind": 8}},
            "no feature 'objects/kind' among",
        ),
        (
            "kitti-distance",
            {"first_names": ("Car", "Tram")},
            "begins with ('Car', 'Van'), not ('Car', 'Tram')",
        ),
    ],
    ids=[
        *("builder", "config", "version", "feature", "classes", "text"),
        *("other", "picture", "size", "nested", "names"),
    ],
)
def test_check_finds(tasks, monkeypatch, tmp_path, name, changes, problem):
    wrong = dataclasses.replace(tasks.TASKS[name], **changes)
    monkeypatch.setattr(tasks, "TASKS", {**tasks.TASKS, name: wrong})
    (row,) = tasks.check(name, data_dir=tmp_path)
    assert not row["ok"]
    assert problem in "; ".join(row["problems"])
    assert "\n" not in "; ".join(row["problems"])
    with pytest.raises(errors.DatasetError, match=re.escape(name)) as caught:
        tasks.require_as_tabled([wrong], tmp_path)
    assert problem in str(caught.value)


@pytest.mark.parametrize(
    ("sizes", "problems"),
    [
        ({"train": 3059}, ["no split test among train"]),
        (
            {"train": 3059, "test": 6085},
            [
                "split train has 3059 pictures, not 3060",
                "split test has 6085 pictures, not 6084",
            ],
        ),
        (
            {"train": 999, "test": 6084},
            [
                "split train has 999 pictures, not 3060",
                "Requested slice [899:1099] incompatible with 999 examples.",
            ],
        ),
    ],
    ids=["split", "version", "few"],
)
def test_check_finds_sizes(tasks, tmp_path, sizes, problems):
    row = tasks.TASKS["caltech101"]
    write_metadata(row, tmp_path, sizes)
    (found,) = tasks.check("caltech101", data_dir=tmp_path)
    assert found["problems"] == problems
    assert not found["ok"]


def test_unknown_task_is_suggested(tasks):
    with pytest.raises(errors.UnknownNameError) as caught:
        tasks.check("cifar-100")
    assert "Did you mean 'cifar100'" in str(caught.value)
    for wrong in ("", "All", ["all", "dtd"], [], [3], "diabetic"):
        with pytest.raises(errors.UnknownNameError, match=r"[tT]asks"):
            tasks.check(wrong)


def clevr(count=3, distances=(20.0,)):
    depth = np.asarray(distances, np.float32)
    return {
        "objects": {
            "size": np.zeros(count, np.int64),
            "pixel_coords": np.stack([0 * depth, 0 * depth, depth], 1),
        }
    }


@pytest.mark.parametrize("count", range(3, 11))
def test_clevr_count(tasks, count):
    label = tasks.clevr_count(clevr(count))
    assert int(label) == count - 3
    names = tasks.TASKS["clevr-count"].class_names
    assert names[int(label)] == f"{count} objects"


CLEVR_EDGES = [
    *((0.001, 0), (7.999, 0), (8.0, 0), (8.001, 1), (8.5, 1), (8.501, 2)),
    *((9.0, 2), (9.001, 3), (9.5, 3), (9.501, 4), (10.0, 4), (10.001, 5)),
    *((99.0, 5), (100.0, 5)),
]


@pytest.mark.parametrize(("distance", "label"), CLEVR_EDGES)
def test_clevr_distance(tasks, distance, label):
    example = clevr(3, [150.0, distance, 101.0])
    assert int(tasks.clevr_distance(example)) == label


def test_clevr_distance_out_of_range_is_no_class(tasks):
    assert int(tasks.clevr_distance(clevr(3, [0.0]))) == -1
    assert int(tasks.clevr_distance(clevr(3, [100.5]))) == 6


def kitti(*objects):
    kinds = np.asarray([kind for kind, _ in objects], np.int64)
    depth = np.asarray([depth for _, depth in objects], np.float32)
    return {
        "objects": {
            "type": kinds,
            "location": np.stack([0 * depth, 0 * depth, depth], 1),
        }
    }


KITTI_EDGES = [
    *((-3.0, 0), (0.0, 0), (8.0, 0), (8.001, 1), (20.0, 1), (20.001, 2)),
    *((500.0, 2), (999.0, 2)),
]


@pytest.mark.parametrize("kind", range(3))
@pytest.mark.parametrize(("distance", "label"), KITTI_EDGES)
def test_kitti_distance(tasks, kind, distance, label):
    example = kitti((kind, 999.0), (kind, distance), (5, -50.0))
    assert int(tasks.kitti_distance(example)) == label


def test_kitti_without_a_vehicle_is_the_last_class(tasks):
    assert int(tasks.kitti_distance(kitti())) == 3
    others = kitti(*((kind, 1.0) for kind in range(3, 8)))
    assert int(tasks.kitti_distance(others)) == 3


@pytest.mark.parametrize(
    ("feature", "values"), [("label_orientation", 40), ("label_x_position", 32)]
)
def test_dsprites_labels(tasks, feature, values):
    import tensorflow as tf

    label = tasks.sixteenths(feature, values)
    found = [int(label({feature: np.int64(i)})) for i in range(values)]
    # As task_adaptation computes it, in float32.
    there = tf.math.floordiv(tf.range(values, dtype=tf.float32), values / 16)
    assert found == there.numpy().tolist()
    assert sorted(set(found)) == list(range(16))


def test_dsprites_pictures_are_black_and_white(tasks):
    picture = np.zeros((4, 4, 1), np.uint8)
    picture[1, 2] = 1
    found = np.asarray(tasks.sprite(picture))
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, np.repeat(picture, 3, -1))


def test_label_maps_run_in_graphs(tasks):
    import tensorflow as tf

    for function, example in (
        (tasks.clevr_count, clevr(5)),
        (tasks.clevr_distance, clevr(3, [9.2])),
        (tasks.kitti_distance, kitti((0, 12.0))),
    ):
        label = tf.function(function)(
            tf.nest.map_structure(tf.constant, example)
        )
        assert (label.dtype, label.shape) == (tf.int64, [])
        assert int(label) == int(function(example))


SIDES = (20, 24)


def invented(feature, index):
    """An example of a feature, which is what `index` makes it."""
    import tensorflow_datasets as tfds

    rng = np.random.default_rng(index)
    kinds = tfds.features
    if isinstance(feature, kinds.FeaturesDict):
        return {key: invented(feature[key], index) for key in feature}
    if isinstance(feature, kinds.Sequence):
        count = 3 + index % 8
        return [invented(feature.feature, index + i) for i in range(count)]
    if isinstance(feature, kinds.Image):
        sides = [
            side or given
            for side, given in zip(feature.shape, (*SIDES, 3), strict=True)
        ]
        return rng.integers(0, 256, sides, np.uint8)
    if isinstance(feature, kinds.ClassLabel):
        return index % feature.num_classes
    if isinstance(feature, kinds.BBoxFeature):
        return kinds.BBox(0.0, 0.0, 1.0, 1.0)
    if isinstance(feature, kinds.Text):
        return f"text {index}"
    # Distances above 0.
    return rng.uniform(0.5, 30, feature.shape).astype(feature.np_dtype)


@pytest.fixture
def mock_data(monkeypatch, tmp_path):
    """TFDS with so many invented examples of each dataset.

    As tfds.testing.mock_data makes them, but with nested features that fit
    together: those it makes itself have a length each.
    """
    import contextlib

    import tensorflow as tf
    import tensorflow_datasets as tfds

    stack = contextlib.ExitStack()

    def start(count=6):
        def as_dataset(self, split, decoders=None, read_config=None, **others):
            features = self.info.features
            examples = [
                features.serialize_example(
                    features.encode_example(invented(features, index))
                )
                for index in range(count)
            ]
            if isinstance(decoders, tfds.decode.PartialDecoding):
                features = decoders.extract_features(features)
                decoders = decoders.decoders
            return tf.data.Dataset.from_tensor_slices(examples).map(
                lambda one: features.deserialize_example(one, decoders=decoders)
            )

        stack.enter_context(
            tfds.testing.mock_data(
                as_dataset_fn=as_dataset, data_dir=str(tmp_path / "tfds")
            )
        )

    with stack:
        yield start


@pytest.fixture(scope="module")
def vtab():
    from bit_tf import vtab

    return vtab


# One of each kind of label and picture; the others are slow.
LOADED = {
    *("caltech101", "cifar100", "clevr-count", "clevr-distance"),
    *("kitti-distance", "dsprites-orientation", "smallnorb-azimuth"),
}


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(
            name, id=name, marks=[] if name in LOADED else [pytest.mark.slow]
        )
        for name in TASKS
    ],
)
def test_load(vtab, mock_data, name):
    mock_data(6)
    dataset = vtab.load(name, progress=False)
    row = vtab.TASKS[name]
    assert list(dataset.splits) == ["train", "test"]
    assert len(dataset.class_names) == row.classes
    if row.class_names is not None:
        assert dataset.class_names == row.class_names
    train = dataset.splits["train"]
    assert train.size == 6
    assert set(train.labels.tolist()) <= set(range(row.classes))
    picture = train.picture(0)
    assert picture.shape == (*(row.picture or SIDES), 3)
    if name.startswith("dsprites"):
        assert picture.dtype == np.float32
        assert set(np.unique(picture)) == {0.0, 1.0}
    else:
        assert picture.dtype == np.uint8
    if row.label_map is None:
        assert train.labels.tolist() == [i % row.classes for i in range(6)]
    if name == "clevr-count":
        assert train.labels.tolist() == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize(
    "name",
    [
        *("cifar10", "cifar100", "oxford_iiit_pet", "oxford_flowers102"),
        *("imagenet2012", "imagenet2012_real"),
    ],
)
def test_other_datasets_of_the_recipes_load(name, tmp_path):
    import tensorflow_datasets as tfds

    from bit_tf import data

    with tfds.testing.mock_data(num_examples=3, data_dir=str(tmp_path)):
        dataset = data.open_dataset(name, progress=False)
        for split in dataset.splits.values():
            assert split.size == 3
            assert split.labels.max() < len(dataset.class_names)
            assert split.picture(2).shape[2] == 3


STEPS = 2
QUICK = ["cifar100", "svhn", "dsprites-xpos"]


def require_results(results, names, examples, divided=1):
    assert list(results["tasks"]) == [name for name in TASKS if name in names]
    assert results["missing"] == [name for name in TASKS if name not in names]
    for name, found in results["tasks"].items():
        assert found["steps"] == STEPS
        assert found["examples"] == examples
        assert found["crop"] == variants.VTAB_TASKS[name][1] // divided
        assert found["random_flip"] == (name not in NO_FLIP)
        assert found["random_crop"] == (name not in NO_CROP)
        assert round(found["top1"] * examples, 6) % 1 == 0
        assert np.isfinite(found["loss"])


@pytest.fixture
def quick_run(vtab, mock_data, small_npz, tmp_path):
    """Runs tasks for two steps of four pictures."""
    mock_data(6)

    def run(tasks, output=None, **others):
        settings = {"batch_size": 4, "steps": STEPS, "progress": False}
        source = others.pop("source", small_npz)
        return vtab.run(source, tasks, output=output, **(settings | others))

    return run


@pytest.mark.slow
def test_run_and_resume(vtab, quick_run, monkeypatch, tmp_path):
    output = tmp_path / "vtab"
    results = quick_run("svhn", output)
    require_results(results, ["svhn"], 6)
    assert set(results["scores"].values()) == {None}
    assert results["model"]["architecture"] == "testing"
    assert results == json.loads((output / "results.json").read_text())
    assert vtab.markdown(results) == (output / "results.md").read_text()
    assert sorted(path.name for path in output.iterdir()) == [
        *(".lock", "results.json", "results.md")
    ]
    # What is finished is not done again; the others are.
    classes = []
    classifier = vtab.transfer.classifier

    def recorded(source, num_classes, **others):
        classes.append(num_classes)
        return classifier(source, num_classes, **others)

    changes = []
    finetune = vtab.finetune.finetune

    def trained(*arguments, **others):
        changes.append((others["flip"], others["crop"]))
        return finetune(*arguments, **others)

    monkeypatch.setattr(vtab.transfer, "classifier", recorded)
    monkeypatch.setattr(vtab.finetune, "finetune", trained)
    again = quick_run(QUICK, output)
    assert classes == [100, 16]
    assert changes == [(True, True), (False, False)]
    require_results(again, QUICK, 6)
    assert again["tasks"]["svhn"] == results["tasks"]["svhn"]


@pytest.mark.slow
def test_all_tasks_end_to_end(tasks, quick_run, monkeypatch, tmp_path):
    rule = tasks.Task.rule

    def small(task, batch_size):
        side = variants.VTAB_TASKS[task.name][1]
        found = rule(task, batch_size)
        assert found.resolution.crop == side
        resolution = hyperrule.Resolution(side // 8 + 4, side // 8)
        return dataclasses.replace(found, resolution=resolution)

    monkeypatch.setattr(tasks.Task, "rule", small)
    results = quick_run("all", tmp_path / "vtab")
    require_results(results, TASKS, 6, divided=8)
    shares = [found["top1"] for found in results["tasks"].values()]
    assert results["scores"]["all"] == pytest.approx(np.mean(shares))
    assert results["scores"]["natural"] == pytest.approx(np.mean(shares[:7]))
    assert results["missing"] == []


@pytest.mark.slow
def test_an_interrupted_task_goes_on(vtab, quick_run, monkeypatch, tmp_path):
    output = tmp_path / "vtab"
    with monkeypatch.context() as patch:

        def stopped(*arguments, **others):
            raise KeyboardInterrupt

        patch.setattr(vtab.evaluate, "predict", stopped)
        with pytest.raises(KeyboardInterrupt):
            quick_run("svhn", output)
    assert not (output / "results.json").exists()
    assert (output / "unfinished" / "svhn").is_dir()
    resumed = []
    finetune = vtab.finetune.finetune

    def recorded(*arguments, **others):
        history = finetune(*arguments, **others)
        resumed.append(history.resumed_from)
        return history

    monkeypatch.setattr(vtab.finetune, "finetune", recorded)
    interrupted = quick_run("svhn", output)["tasks"]["svhn"]
    assert resumed == [STEPS]
    assert not (output / "unfinished").exists()
    unbroken = quick_run("svhn")["tasks"]["svhn"]
    assert resumed == [STEPS, 0]
    assert interrupted["loss"] == pytest.approx(unbroken["loss"], rel=1e-4)


@pytest.fixture
def finished(vtab, small_npz, tmp_path):
    """Writes results of tasks, and has `run` read them."""
    output = tmp_path / "finished"
    output.mkdir()
    settings = {
        "source": str(small_npz),
        "batch_size": 512,
        "steps": None,
        "seed": 0,
        "dtype": None,
    }

    def run(names, asked=None, **changes):
        results = {
            "format": 1,
            "settings": settings,
            "model": None,
            "tasks": {
                name: {
                    "group": vtab.TASKS[name].group,
                    "examples": 100 + number,
                    "top1": number / 20,
                }
                for number, name in enumerate(names, 1)
            },
        }
        text = json.dumps(results | changes)
        (output / "results.json").write_text(text)
        return vtab.run(small_npz, asked or names, output=output)

    run.output = output
    run.settings = settings
    return run


def test_scores(vtab, finished):
    results = finished(TASKS, "all")
    assert results["scores"] == {
        "natural": pytest.approx(0.2),
        "specialized": pytest.approx(0.475),
        "structured": pytest.approx(0.775),
        "all": pytest.approx(0.5),
    }
    text = vtab.markdown(results)
    assert "| clevr-count | structured | 112 | 60.0 % |\n" in text
    assert "| natural | 7 of 7 | 20.0 % |\n" in text
    assert "| all | 19 of 19 | 50.0 % |\n" in text
    assert "Not done" not in text
    assert "not comparable" not in text


def test_incomplete_groups_have_no_score(vtab, finished):
    names = [name for name in TASKS if name not in ("eurosat", "dmlab")]
    results = finished(names)
    assert results["scores"] == {
        "natural": pytest.approx(0.2),
        "specialized": None,
        "structured": None,
        "all": None,
    }
    assert results["missing"] == ["eurosat", "dmlab"]
    text = vtab.markdown(results)
    assert "| specialized | 3 of 4 | – |\n" in text
    assert "| all | 17 of 19 | – |\n" in text
    assert "Not done: eurosat, dmlab.\n" in text


def test_markdown_says_what_is_not_comparable(vtab, finished):
    results = finished(["dtd"])
    results["settings"]["steps"] = 2
    assert "2 steps a task" in vtab.markdown(results)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": 2}, "format 2, not 1"),
        ({"settings": None}, "no object 'settings'"),
        ({"tasks": []}, "no object 'tasks'"),
        ({"tasks": {"mnist": {"top1": 0.5}}}, "no task 'mnist'"),
        ({"tasks": {"dtd": 0.5}}, "top1 None of dtd"),
        ({"tasks": {"dtd": {"top1": 1.5}}}, "top1 1.5 of dtd"),
        ({"tasks": {"dtd": {"top1": float("nan")}}}, "NaN is not JSON"),
        ({"settings": {"seed": 1}}, "seed 1, not 0"),
        ({"settings": {"seed": 1}}, "Choose another folder"),
    ],
    ids=[
        *("format", "settings", "tasks", "name", "number", "range", "nan"),
        *("seed", "remedy"),
    ],
)
def test_other_results_are_refused(finished, changes, message):
    with pytest.raises(errors.TrainingError, match=re.escape(message)):
        finished(["dtd"], **changes)


def test_a_truncated_file_is_refused(vtab, finished, small_npz):
    finished(["dtd"])
    path = finished.output / "results.json"
    whole = path.read_bytes()
    for size in (0, 1, len(whole) // 2):
        path.write_bytes(whole[:size])
        with pytest.raises(errors.TrainingError, match="or remove the file"):
            vtab.run(small_npz, "dtd", output=finished.output)
        assert path.read_bytes() == whole[:size]


def test_another_model_is_refused(finished, mock_data):
    mock_data(2)
    model = {"source": "small.npz", "sha256": "0" * 64}
    with pytest.raises(errors.TrainingError, match=r"sha256.*another folder"):
        finished(["dtd"], "svhn", model=model)


def test_bad_arguments_come_first(vtab, small_npz, tmp_path, monkeypatch):
    monkeypatch.setattr(vtab.transfer, "classifier", None)
    with pytest.raises(errors.UnknownNameError, match="'cifar100'"):
        vtab.run(small_npz, ["cifar10"], output=tmp_path / "a")
    with pytest.raises(errors.BitTfError):
        vtab.run("BiT-Q-R50x1", "cifar100", output=tmp_path / "a")
    with pytest.raises(FileNotFoundError):
        vtab.run(tmp_path / "none.npz", "cifar100", output=tmp_path / "a")
    workers = types.SimpleNamespace(workers=2)
    monkeypatch.setattr(vtab.distribution, "place", lambda on: workers)
    with pytest.raises(errors.TrainingError, match="2 workers"):
        vtab.run(small_npz, "cifar100", output=tmp_path / "a")
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize(
    ("task", "asked", "devices", "parts"),
    [
        ("dtd", None, 1, 16),
        ("dtd", None, 2, 8),
        ("cifar100", None, 1, 2),
        ("dtd", 3, 1, 3),
    ],
)
def test_batches_are_divided_to_fit_memory(
    vtab, quick_run, monkeypatch, task, asked, devices, parts
):
    class TrainedError(Exception):
        pass

    def finetune(model, split, *, micro_batches, **others):
        raise TrainedError(micro_batches)

    import tensorflow as tf

    monkeypatch.setattr(vtab.finetune, "finetune", finetune)
    monkeypatch.setattr(
        type(tf.distribute.get_strategy()), "num_replicas_in_sync", devices
    )
    with pytest.raises(TrainedError, match=rf"^{parts}$"):
        quick_run(task, batch_size=512, micro_batches=asked)


def test_several_workers_do_not_wait_for_each_other(vtab, monkeypatch):
    cluster = {"worker": ["127.0.0.1:1", "127.0.0.1:2"]}
    task = {"type": "worker", "index": 0}
    monkeypatch.setenv(
        "TF_CONFIG", json.dumps({"cluster": cluster, "task": task})
    )
    monkeypatch.setattr(vtab.distribution, "strategy", None)
    with pytest.raises(errors.TrainingError, match=r"2 workers.*TF_CONFIG"):
        vtab.strategy()


def test_a_dataset_that_is_not_there(vtab, tmp_path):
    with pytest.raises(errors.DatasetError, match="svhn_cropped"):
        vtab.load("svhn", data_dir=tmp_path, download=False, progress=False)


def test_sizes_of_the_prepared_version_count(
    vtab, tasks, monkeypatch, tmp_path
):
    row = tasks.TASKS["caltech101"]
    write_metadata(row, tmp_path, {"train": 3059, "test": 6085})
    asked = []
    monkeypatch.setattr(
        vtab.data,
        "from_tfds",
        lambda builder, splits, **others: asked.append(splits),
    )
    vtab.load("caltech101", data_dir=tmp_path)
    splits = {"train": "train[:800]+train[2753:2953]", "test": "test"}
    assert asked == [splits]
    # A version that is downloaded only now.
    monkeypatch.setattr(
        vtab.data,
        "from_tfds",
        lambda builder, splits, **others: (
            asked.append(splits),
            write_metadata(
                row, tmp_path / "new", {"train": 3059, "test": 6085}
            ),
        ),
    )
    vtab.load("caltech101", data_dir=tmp_path / "new")
    assert [found["train"] for found in asked[1:]] == [
        "train[:800]+train[2754:2954]",
        "train[:800]+train[2753:2953]",
    ]
