"""Splits: labels, few-shot subsets, what is split off, bad data."""

import shutil

import helpers
import numpy as np
import pytest
from PIL import Image

from bit_tf import data, images, picture_files
from bit_tf.errors import DatasetError, ImageDecodeError, ImageRangeError


def fill(root, counts, size=6):
    """A folder of so many pictures of each class."""
    for name, count in counts.items():
        folder = root / name
        folder.mkdir(parents=True)
        for index in range(count):
            pixels = helpers.random_images(1, size, size + 1, seed=index)[0]
            Image.fromarray(pixels).save(folder / f"{index:04}.png")
    return root


@pytest.fixture
def unread(monkeypatch):
    """No picture can be decoded."""

    def decode(*values, **options):
        raise AssertionError("a picture was decoded")

    monkeypatch.setattr(images, "decode", decode)


@pytest.fixture
def folder(tmp_path):
    return fill(tmp_path / "pictures", {"a": 20, "b": 10, "c": 6})


@pytest.fixture
def train(folder):
    return data.open_dataset(f"folder:{folder}").splits["train"]


def labelled(pictures, labels):
    """A tf.data.Dataset of pictures of any size."""
    import tensorflow as tf

    return tf.data.Dataset.from_generator(
        lambda: zip(pictures, labels, strict=True),
        output_signature=(
            tf.TensorSpec((None, None, None), pictures[0].dtype),
            tf.TensorSpec((), tf.int32),
        ),
    )


def test_open_folder(folder, unread):
    dataset = data.open_dataset(f"folder:{folder}")
    assert dataset.name == f"folder:{folder}"
    assert dataset.class_names == ("a", "b", "c")
    assert list(dataset.splits) == ["train"]
    assert dataset.image_size == (6, 7)
    train = dataset.splits["train"]
    assert (train.name, train.size, len(train)) == ("train", 36, 36)
    assert (train.class_names, train.num_classes) == (("a", "b", "c"), 3)
    assert train.labels.dtype == np.int64
    assert train.labels.tolist() == [0] * 20 + [1] * 10 + [2] * 6
    assert train.identifiers[20] == "b/0000.png"


def test_picture(train, folder):
    expected = np.asarray(Image.open(folder / "b/0001.png"))
    assert np.array_equal(train.picture(21), expected)
    pictures = train.take([21, 0]).pictures([1, 0])
    assert np.array_equal(pictures[1], expected)
    assert not np.array_equal(pictures[0], expected)


def test_labels_are_read_only(train):
    with pytest.raises(ValueError, match="read-only"):
        train.labels[0] = 1


def test_few_shot(train, unread):
    few = train.few_shot(5, seed=3)
    assert np.bincount(few.labels).tolist() == [5, 5, 5]
    assert few.identifiers == tuple(sorted(few.identifiers))
    again = train.few_shot(5, seed=3)
    assert few.fingerprint == again.fingerprint
    assert few.identifiers != train.few_shot(5, seed=4).identifiers
    assert set(train.few_shot(1, 3).identifiers) < set(few.identifiers)
    indices = train.few_shot_indices(5, 3)
    assert train.take(indices).fingerprint == few.fingerprint


def test_few_shot_of_too_few(train):
    assert train.few_shot(6, seed=0).size == 18
    with pytest.raises(DatasetError, match=r"fewer of 'c' \(6\)\."):
        train.few_shot(7, seed=0)
    with pytest.raises(DatasetError, match=r"'b' \(10\), 'c' \(6\)"):
        train.few_shot(11, seed=0)


@pytest.mark.parametrize("value", [0, -1, 1.5, True, "1", None])
def test_few_shot_arguments(train, value):
    with pytest.raises(DatasetError, match="per_class is an integer"):
        train.few_shot(value, seed=0)
    if value != 0:
        with pytest.raises(DatasetError, match="seed is an integer"):
            train.few_shot(1, seed=value)


@pytest.mark.parametrize(
    ("amount", "counts"),
    [(0.25, [5, 2, 2]), (18, [10, 5, 3]), (1, [1, 0, 0]), (33, [19, 9, 5])],
    ids=str,
)
def test_split_off(train, unread, amount, counts):
    kept, held_out = train.split_off(amount, seed=1)
    found = np.bincount(held_out.labels, minlength=3)
    assert abs(found - counts).max() <= 1
    assert found.sum() == sum(counts)
    assert (np.bincount(kept.labels, minlength=3) >= 1).all()
    assert sorted(kept.identifiers + held_out.identifiers) == sorted(
        train.identifiers
    )
    assert (kept.name, held_out.name) == ("train", "validation")
    _, again = train.split_off(amount, seed=1)
    assert again.fingerprint == held_out.fingerprint
    _, other = train.split_off(amount, seed=2)
    assert other.fingerprint != held_out.fingerprint


@pytest.mark.parametrize("amount", [0, 34, 0.0, 0.99, 1.0, -3, True])
def test_split_off_too_much(train, amount):
    with pytest.raises(DatasetError, match="between 1 and 33 of 36"):
        train.split_off(amount, seed=0)


@pytest.mark.parametrize(
    "indices", [[0, 0], [36], [-1], [0.5], [[0]], ["a"]], ids=str
)
def test_take_refuses(train, indices):
    with pytest.raises(DatasetError, match=r"distinct integers in \[0, 36\)"):
        train.take(indices)


def test_take_keeps_the_order(train):
    taken = train.take([30, 2]).take([1, 0])
    assert taken.labels.tolist() == [0, 2]
    assert taken.identifiers == ("a/0002.png", "c/0000.png")
    assert train.take([]).size == 0


def test_fingerprint(train, folder, tmp_path):
    shutil.copytree(folder, tmp_path / "copy")
    copy = data.open_dataset(f"folder:{tmp_path}/copy").splits["train"]
    assert copy.fingerprint == train.fingerprint
    assert train.take(range(35)).fingerprint != train.fingerprint
    (tmp_path / "copy/c").rename(tmp_path / "copy/d")
    other = data.open_dataset(f"folder:{tmp_path}/copy").splits["train"]
    assert other.fingerprint != train.fingerprint


@pytest.mark.parametrize("spec", ["folder:", "csv:", 7, None, {}])
def test_no_dataset(spec):
    with pytest.raises(DatasetError, match="Received"):
        data.open_dataset(spec)


def test_open_csv(folder):
    path = folder / "list.csv"
    path.write_text("path,label\na/0000.png,x\nb/0000.png,y\n")
    dataset = data.open_dataset(f"csv:{path}")
    assert dataset.class_names == ("x", "y")
    dataset = data.open_dataset(f"csv:{path}", class_names=["y", "x", "z"])
    assert dataset.splits["train"].labels.tolist() == [1, 0]


def test_a_damaged_picture_among_1000(tmp_path, monkeypatch):
    root = fill(tmp_path / "pictures", {"a": 500, "b": 500}, size=2)
    bad = root / "b/0123.png"
    bad.write_bytes(bad.read_bytes()[:40])
    warned = []
    monkeypatch.setattr(
        data.logging,
        "warning",
        lambda text, *values: warned.append(text % values),
    )
    train = data.open_dataset(f"folder:{root}").splits["train"]
    assert train.size == 1000
    assert not warned
    with pytest.raises(ImageDecodeError, match=r"b/0123\.png"):
        train.picture(623)
    spec = f"folder:{root}"
    train = data.open_dataset(spec, bad_images="skip").splits["train"]
    assert train.size == 999
    assert "b/0123.png" not in train.identifiers
    (warning,) = warned
    assert "Left out of train" in warning
    assert "b/0123.png" in warning
    # What is done already is not advised.
    assert "--bad-images" not in warning
    with pytest.raises(DatasetError, match="'raise' or 'skip'"):
        data.open_dataset(spec, bad_images="drop")


def test_all_pictures_damaged(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "0.png").write_bytes(b"")
    with pytest.raises(DatasetError, match=r"2 in train.*all damaged"):
        data.open_dataset(f"folder:{tmp_path}", bad_images="skip")


@pytest.mark.parametrize("kind", ["uint8", "float16", "grey", "flat"])
def test_tf_data(kind):
    import tensorflow as tf

    pictures = [helpers.random_images(1, 5 + i, 7, seed=i)[0] for i in range(4)]
    expected = pictures
    if kind.startswith("float"):
        pictures = [images.as_float(p).astype(kind) for p in pictures]
        expected = [p.astype(np.float32) for p in pictures]
    elif kind in ("grey", "flat"):
        pictures = [p[..., :1] for p in pictures]
        expected = [np.repeat(p, 3, -1) for p in pictures]
    dataset = labelled(pictures, [2, 0, 1, 2])
    if kind == "flat":
        dataset = dataset.map(lambda image, label: (image[..., 0], label))
    if kind == "grey":
        dataset = dataset.map(
            lambda image, label: {"image": image, "label": label}
        )
    opened = data.open_dataset({"test": dataset, "train": dataset})
    assert list(opened.splits) == ["train", "test"]
    assert opened.class_names == ("0", "1", "2")
    assert opened.image_size == (6, 7)
    train = opened.splits["train"]
    assert train.labels.tolist() == [2, 0, 1, 2]
    assert train.identifiers[3] == "train/3"
    for index, picture in enumerate(train.pictures(range(4))):
        assert picture.dtype == expected[index].dtype
        np.testing.assert_array_equal(picture, expected[index])
    reversed_pictures = train.pictures([3, 0])
    np.testing.assert_array_equal(reversed_pictures[0], expected[3])
    fixed = tf.data.Dataset.from_tensor_slices(
        (np.zeros((4, 9, 8, 3), np.uint8), [0, 1, 0, 1])
    )
    assert data.open_dataset(fixed).image_size == (9, 8)


@pytest.fixture(scope="module")
def bad_datasets():
    import tensorflow as tf

    pictures = np.zeros((4, 5, 5, 3), np.uint8)
    good = tf.data.Dataset.from_tensor_slices((pictures, [0, 1, 0, 1]))
    of = tf.data.Dataset.from_tensor_slices
    return {
        "infinite": (good.repeat(), "finite.*repeat"),
        "batched": (good.batch(2), "unbatch"),
        "string labels": (of((pictures, list("abab"))), "StringLookup"),
        "one-hot": (of((pictures, np.eye(4))), "argmax|one integer"),
        "float labels": (of((pictures, [0.0, 1, 0, 1])), "one integer"),
        "encoded": (of(([b"x"] * 4, [0, 1, 0, 1])), "Decode the pictures"),
        "no label": (good.map(lambda image, label: image), "image.*label"),
        "empty": (good.take(0), "two classes|at least one"),
        "one class": (of((pictures, [0] * 4)), "two classes"),
        "negative": (of((pictures, [0, 1, -1, 1])), r"-1 in 'train/2'"),
        "split": ({"dev": good}, "Splits are"),
        "array": (pictures, "tf.data.Dataset"),
        "beyond": (
            {"train": good, "test": of((pictures, [0, 1, 2, 1]))},
            r"\[0, 1\].*Received: 2 in 'test/2'",
        ),
    }


@pytest.mark.parametrize(
    "name",
    "infinite,batched,string labels,one-hot,float labels,encoded,no label,"
    "empty,one class,negative,split,array,beyond".split(","),
)
def test_bad_tf_data(bad_datasets, name):
    dataset, message = bad_datasets[name]
    with pytest.raises(DatasetError, match=message):
        data.open_dataset(dataset)


def test_labels_out_of_class_names():
    pictures = [np.zeros((4, 4, 3), np.uint8)] * 3
    dataset = labelled(pictures, [0, 1, 2])
    opened = data.open_dataset(dataset, class_names=["a", "b", "c", "d"])
    assert opened.class_names == ("a", "b", "c", "d")
    with pytest.raises(DatasetError, match=r"Received: 2 in 'train/2'"):
        data.open_dataset(dataset, class_names=["a", "b"])


@pytest.mark.parametrize("value", [2.0, float("nan")])
def test_floats_out_of_range(value):
    pictures = [np.full((4, 4, 3), v, np.float32) for v in (0.5, value)]
    opened = data.open_dataset(labelled(pictures, [0, 1]))
    train = opened.splits["train"]
    assert train.picture(0).max() == 0.5
    with pytest.raises(ImageRangeError, match=r"train/1: .*lie in \[0, 1\]"):
        train.picture(1)
    spec = labelled(pictures, [0, 1])
    skipped = data.open_dataset(spec, bad_images="skip").splits["train"]
    assert skipped.identifiers == ("train/0",)


def test_a_dataset_that_is_shuffled_anew():
    pictures = [np.full((4, 4, 3), i, np.uint8) for i in range(50)]
    dataset = labelled(pictures, range(50)).shuffle(50)
    train = data.open_dataset(dataset).splits["train"]
    with pytest.raises(DatasetError, match="same order each time"):
        train.pictures(range(50))


def test_a_dataset_that_loses_examples():
    count = [6]
    pictures = [np.zeros((4, 4, 3), np.uint8)] * 6

    import tensorflow as tf

    dataset = tf.data.Dataset.from_generator(
        lambda: ((pictures[i], i % 2) for i in range(count[0])),
        output_signature=(
            tf.TensorSpec((None, None, 3), tf.uint8),
            tf.TensorSpec((), tf.int32),
        ),
    )
    train = data.open_dataset(dataset).splits["train"]
    count[0] = 4
    with pytest.raises(DatasetError, match="fewer than 6 examples"):
        train.picture(5)


def test_stream_is_not_held_in_memory():
    """Of pictures that are not wanted, nothing is kept."""
    pictures = [np.zeros((4, 4, 3), np.uint8)] * 6
    train = data.open_dataset(labelled(pictures, [0, 1] * 3)).splits["train"]
    train.pictures([5, 1])
    assert not [
        name for name, value in vars(train.source).items() if value is pictures
    ]
    assert not hasattr(train, "_records")


def test_splits_need_no_pictures(folder, unread):
    train = data.open_dataset(f"folder:{folder}").splits["train"]
    kept, held_out = train.split_off(0.3, 0)
    assert kept.few_shot(2, 0).fingerprint != held_out.fingerprint
    assert isinstance(train.source, picture_files.FileSource)
