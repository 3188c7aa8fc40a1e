"""Datasets of TFDS: prepared ones, mocked ones, and what is no dataset."""

import numpy as np
import pytest

from bit_tf import data
from bit_tf.errors import DatasetError

SIZES = {"train": 10, "validation": 4, "test": 6}


@pytest.fixture(scope="module")
def tfds():
    import tensorflow_datasets

    return tensorflow_datasets


@pytest.fixture(scope="module")
def prepared(tfds, tmp_path_factory):
    """A folder where TFDS keeps small datasets."""
    folder = tmp_path_factory.mktemp("tfds")

    def store(name, splits, features, examples):
        (folder / name / "2.1.0").mkdir(parents=True)
        identity = tfds.core.dataset_info.DatasetIdentity(
            name=name,
            version=tfds.core.Version("2.1.0"),
            data_dir=str(folder / name / "2.1.0"),
            module_name="",
        )
        info = tfds.core.DatasetInfo(
            builder=identity, features=tfds.features.FeaturesDict(features)
        )
        writer = tfds.core.SequentialWriter(info, max_examples_per_shard=4)
        writer.initialize_splits(list(splits))
        for split, size in splits.items():
            columns = examples(size)
            for index in range(size):
                row = {key: column[index] for key, column in columns.items()}
                writer.add_examples({split: [row]})
        writer.close_all()

    def pictures(size):
        rows = np.arange(size, dtype=np.uint8)[:, None, None, None]
        return np.broadcast_to(rows, (size, 5, 4, 3)).copy()

    store(
        "shades",
        SIZES,
        {
            "image": tfds.features.Image(shape=(None, None, 3)),
            "label": tfds.features.ClassLabel(names=["even", "odd"]),
            "number": np.int64,
        },
        lambda size: {
            "image": pictures(size),
            "label": np.arange(size) % 2,
            "number": np.arange(size),
        },
    )
    store(
        "greys",
        {"train": 4, "test": 2},
        {
            "photo": tfds.features.Image(shape=(5, 4, 1)),
            "kind": {"fine": tfds.features.ClassLabel(num_classes=4)},
            "label": tfds.features.ClassLabel(num_classes=2),
            "mask": tfds.features.Image(shape=(5, 4, 3)),
        },
        lambda size: {
            "photo": pictures(size)[..., :1],
            "kind": [{"fine": index} for index in range(size)],
            "label": np.full(size, -1 if size == 2 else 0),
            "mask": pictures(size),
        },
    )
    store(
        "texts",
        {"train": 2},
        {"text": tfds.features.Text(), "label": np.int64},
        lambda size: {"text": ["a"] * size, "label": np.arange(size)},
    )
    return folder


@pytest.fixture
def opened(prepared):
    def run(name, **options):
        return data.open_dataset(name, data_dir=prepared, **options)

    return run


@pytest.mark.parametrize("version", [":2", ":2.1.*"])
def test_version(opened, version):
    dataset = opened(f"shades{version}", progress=False)
    assert list(dataset.splits) == list(SIZES)


def test_by_name(opened):
    dataset = opened("shades:2.*")
    assert dataset.name == "shades:2.*"
    assert dataset.class_names == ("even", "odd")
    assert {k: s.size for k, s in dataset.splits.items()} == SIZES
    assert dataset.image_size == (5, 4)
    train = dataset.splits["train"]
    assert train.labels.tolist() == [0, 1] * 5
    assert train.identifiers[7] == "train/7"
    picture = train.picture(7)
    assert picture.shape == (5, 4, 3)
    assert picture.dtype == np.uint8
    assert set(picture.flat) == {7}


def test_labels_are_read_without_decoding_pictures(opened, monkeypatch, tfds):
    import tensorflow as tf

    def decode(self, example):
        return tf.ensure_shape(tf.io.decode_png(b"no picture"), (5, 4, 3))

    monkeypatch.setattr(tfds.features.Image, "decode_example", decode)
    train = opened("shades").splits["train"]
    assert train.labels.tolist() == [0, 1] * 5
    assert train.few_shot(2, 0).size == 4


def test_batches(opened):
    from bit_tf import input_pipeline

    train = opened("shades").splits["train"].take([1, 8, 3, 4])
    batches = input_pipeline.training_batches(
        train,
        resize=3,
        crop=2,
        batch_size=4,
        seed=0,
        steps=3,
    )
    for pictures, labels in input_pipeline.iterate(batches):
        shades = np.rint(pictures[:, 0, 0, 0].numpy() * 255).astype(int)
        assert sorted(shades) == [1, 3, 4, 8]
        assert labels.numpy().argmax(axis=-1).tolist() == (shades % 2).tolist()


def test_chosen_splits(prepared):
    dataset = data.from_tfds(
        "shades",
        {"train": "train[:4]+validation[2:]", "test": "test[50%:]"},
        data_dir=prepared,
    )
    train, test = dataset.splits.values()
    shades = [picture.max() for picture in train.pictures(range(train.size))]
    assert shades == [0, 1, 2, 3, 2, 3]
    assert [p.max() for p in test.pictures(range(3))] == [3, 4, 5]


def test_chosen_features(prepared):
    dataset = data.from_tfds(
        "greys",
        {"train": "train"},
        image="photo",
        label="kind/fine",
        data_dir=prepared,
    )
    train = dataset.splits["train"]
    assert dataset.class_names == ("0", "1", "2", "3")
    assert train.labels.tolist() == [0, 1, 2, 3]
    assert train.picture(2).shape == (5, 4, 3)
    assert set(train.picture(2).flat) == {2}


@pytest.mark.parametrize(
    "needs", [None, ["image", "number"]], ids=["all", "two"]
)
def test_transform(prepared, needs):
    import tensorflow as tf

    def transform(example):
        assert needs is None or set(example) == set(needs)
        image = tf.cast(example["image"], tf.float32) / 10
        return image, example["number"] // 5

    options = {"transform": transform, "needs": needs, "data_dir": prepared}
    dataset = data.from_tfds(
        "shades", {"train": "train"}, num_classes=2, **options
    )
    train = dataset.splits["train"]
    assert dataset.class_names == ("0", "1")
    assert train.labels.tolist() == [0] * 5 + [1] * 5
    assert train.picture(7).dtype == np.float32
    np.testing.assert_allclose(train.picture(7), 0.7, atol=1e-6)
    dataset = data.from_tfds(
        "shades", {"train": "train"}, class_names=["low", "high"], **options
    )
    assert dataset.class_names == ("low", "high")
    with pytest.raises(DatasetError, match="class_names nor num_classes"):
        data.from_tfds("shades", {"train": "train"}, **options)


def test_split_without_labels_is_left_out(prepared, monkeypatch):
    from bit_tf import tfds_source

    warned = []
    monkeypatch.setattr(
        tfds_source.logging,
        "warning",
        lambda text, *values: warned.append(text % values),
    )
    found = tfds_source.find("greys", image="photo", data_dir=prepared)
    assert list(found.splits) == ["train"]
    assert warned == ["test of greys has no labels, and is left out"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("cifar11", "Did you mean 'cifar10"),
        ("oxford_flower102", "Did you mean 'oxford_flowers102'"),
        ("no such dataset", "Received: 'no such dataset'"),
        ("zzz", "Choose one"),
        ("cifar10:9.*", "Mend the name"),
        ("cifar10/plain", "Mend the name"),
        ("greys", "has one picture. .* kind .*, mask .Image., photo"),
        ("texts", "has one picture. .*label .Tensor., text"),
    ],
)
def test_no_dataset(opened, name, message):
    with pytest.raises(DatasetError, match=message):
        opened(name, download=False)


def test_a_path_is_told_from_a_name(opened, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    (tmp_path / "list.csv").write_text("")
    for name in ("photos", str(tmp_path / "photos")):
        with pytest.raises(DatasetError, match=f"mean 'folder:{name}'"):
            opened(name)
    with pytest.raises(DatasetError, match=r"mean 'csv:list\.csv'"):
        opened("list.csv")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"splits": {"train": "dev"}}, "'dev' of 'shades/2.1.0'"),
        ({"image": "photo"}, "has the feature 'photo'.*image .Image."),
        ({"label": "label/fine"}, "has the feature 'label/fine'"),
        ({"label": "number"}, "ClassLabel. Received: 'number'"),
    ],
    ids=["split", "image", "path", "label"],
)
def test_bad_choices(prepared, options, message):
    options = {"splits": {"train": "train"}, **options}
    with pytest.raises(DatasetError, match=message):
        data.from_tfds("shades", data_dir=prepared, **options)


def test_what_is_not_there(tmp_path):
    with pytest.raises(DatasetError, match="could not find data"):
        data.open_dataset("cifar10", data_dir=tmp_path, download=False)


def test_manual_download(tfds, tmp_path, monkeypatch, capsys):
    """The builder's own instructions are shown."""
    builder = tfds.core.DatasetBuilder

    def download_and_prepare(self, download_config=None):
        print("preparing")
        assert download_config.manual_dir == str(tmp_path / "by hand")
        raise AssertionError("Manual directory does not exist or is empty.")

    monkeypatch.setattr(builder, "download_and_prepare", download_and_prepare)
    options = {"data_dir": tmp_path, "manual_dir": tmp_path / "by hand"}
    with pytest.raises(DatasetError, match=r"--manual-dir.*image-net\.org"):
        data.open_dataset("imagenet2012", **options)
    with pytest.raises(DatasetError, match="Check the network"):
        data.open_dataset("cifar10", **options)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("error", ["NonMatchingChecksumError", "ImportError"])
def test_download_that_fails(tfds, tmp_path, monkeypatch, error):
    managers = tfds.core.download.download_manager
    kind = getattr(managers, error, ImportError)

    def download_and_prepare(self, download_config=None):
        raise kind("it failed")

    monkeypatch.setattr(
        tfds.core.DatasetBuilder, "download_and_prepare", download_and_prepare
    )
    with pytest.raises(DatasetError, match="it failed"):
        data.open_dataset("cifar10", data_dir=tmp_path)


@pytest.mark.parametrize("name", ["cifar10", "oxford_flowers102:2.*"])
def test_mock_data(tfds, tmp_path, name):
    from bit_tf import input_pipeline

    with tfds.testing.mock_data(num_examples=5, data_dir=str(tmp_path)):
        dataset = data.open_dataset(name, data_dir=tmp_path)
        train = dataset.splits["train"]
        assert train.size == 5
        assert len(dataset.class_names) == (10 if name == "cifar10" else 102)
        batches = input_pipeline.training_batches(
            train, resize=8, crop=6, batch_size=4, seed=0, steps=2
        )
        shapes = [x.shape for x, _ in input_pipeline.iterate(batches)]
    assert shapes == [(4, 6, 6, 3)] * 2


def test_bad_images_are_skipped(prepared):
    import tensorflow as tf

    def transform(example):
        text = tf.where(
            example["number"] == 3, b"no picture", tf.io.encode_png(plain)
        )
        return tf.io.decode_png(text, 3), example["label"]

    plain = tf.zeros((4, 4, 3), tf.uint8)
    dataset = data.from_tfds(
        "shades",
        {"train": "train"},
        transform=transform,
        num_classes=2,
        data_dir=prepared,
    )
    train = dataset.splits["train"]
    assert train.size == 10
    with pytest.raises(DatasetError, match="train/3"):
        train.picture(3)
    kept = data._without_bad(dataset, progress=False).splits["train"]
    assert kept.size == 9
    assert "train/3" not in kept.identifiers
