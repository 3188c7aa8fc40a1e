"""Class folders and CSV lists, good and bad."""

import os
import pathlib

import helpers
import numpy as np
import pytest
from PIL import Image

from bit_tf import errors, picture_files
from bit_tf.errors import DatasetError


@pytest.fixture
def warned(monkeypatch):
    """The warnings that are logged."""
    found = []
    monkeypatch.setattr(
        picture_files.logging,
        "warning",
        lambda text, *values: found.append(text % values),
    )
    return found


def save(path, height=8, width=6, mode="RGB", **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = helpers.random_images(1, height, width)[0]
    Image.fromarray(pixels).convert(mode).save(path, **options)
    return path


def write(folder, text, encoding="utf-8"):
    for name in ("a.png", "b.png", "two words.png"):
        save(folder / name)
    path = folder / "list.csv"
    path.write_bytes(text.encode(encoding))
    return path


def listed(found, split="train"):
    source = found.splits[split]
    return [
        (source.identifier(at), int(label))
        for at, label in enumerate(source.labels)
    ]


def test_class_folders(tmp_path, warned):
    for name in ("dog/b.png", "dog/deep/er/a.PNG", "cat/1.jpg", "cat/0.jpeg"):
        save(tmp_path / name)
    (tmp_path / "cat/.hidden.png").write_bytes(b"")
    (tmp_path / ".git").mkdir()
    (tmp_path / "cat/notes.txt").write_text("notes")
    (tmp_path / "README").write_text("notes")
    found = picture_files.from_folder(tmp_path)
    assert found.class_names == ("cat", "dog")
    assert list(found.splits) == ["train"]
    assert listed(found) == [
        ("cat/0.jpeg", 0),
        ("cat/1.jpg", 0),
        ("dog/b.png", 1),
        ("dog/deep/er/a.PNG", 1),
    ]
    (warning,) = warned
    assert "2 files" in warning


@pytest.mark.parametrize(
    ("train", "validation"),
    [("train", "validation"), ("training", "valid"), ("Train", "val")],
)
def test_split_folders(tmp_path, warned, train, validation):
    for name in (
        f"{train}/a/0.png",
        f"{train}/b/0.png",
        f"{validation}/b/0.png",
    ):
        save(tmp_path / name)
    save(tmp_path / "test/a/1.png")
    save(tmp_path / "extra/c/1.png")
    found = picture_files.from_folder(tmp_path)
    assert found.class_names == ("a", "b")
    assert list(found.splits) == ["train", "validation", "test"]
    assert listed(found, "validation") == [(f"{validation}/b/0.png", 1)]
    assert listed(found, "test") == [("test/a/1.png", 0)]
    assert "1 files" in warned[0]


def test_only_test(tmp_path):
    save(tmp_path / "test/a/0.png")
    save(tmp_path / "test/b/0.png")
    found = picture_files.from_folder(tmp_path)
    assert list(found.splits) == ["test"]


def test_a_class_may_be_called_val(tmp_path):
    for name in ("val", "cat"):
        save(tmp_path / name / "0.png")
    assert picture_files.from_folder(tmp_path).class_names == ("cat", "val")


@pytest.mark.parametrize(
    ("names", "ordered"),
    [
        ("0 1 2 10 11", "0 1 2 10 11"),
        ("1 9 10 100", "1 9 10 100"),
        ("08 9 10", "08 9 10"),
        ("2 10 x", "10 2 x"),
    ],
)
def test_integers_are_sorted_as_numbers(tmp_path, names, ordered):
    for name in names.split():
        save(tmp_path / "train" / name / "0.png")
        save(tmp_path / "test" / name / "0.png")
    found = picture_files.from_folder(tmp_path)
    assert found.class_names == tuple(ordered.split())
    for split in ("train", "test"):
        for name, label in listed(found, split):
            assert name == f"{split}/{found.class_names[label]}/0.png"


def test_class_names_fix_the_order(tmp_path):
    for name in ("a", "b"):
        save(tmp_path / name / "0.png")
    found = picture_files.from_folder(tmp_path, ["b", "c", "a"])
    assert found.class_names == ("b", "c", "a")
    assert listed(found) == [("a/0.png", 2), ("b/0.png", 0)]
    with pytest.raises(DatasetError, match=r"Received: \['a'\]"):
        picture_files.from_folder(tmp_path, ["b", "c"])


def test_links_are_followed_without_loops(tmp_path):
    save(tmp_path / "elsewhere/0.png")
    root = tmp_path / "root"
    save(root / "b/1.png")
    (root / "a").symlink_to(tmp_path / "elsewhere")
    (root / "b/loop").symlink_to(root / "b")
    (root / "b/up").symlink_to(root / "b/nested/back")
    found = picture_files.from_folder(root)
    assert listed(found) == [("a/0.png", 0), ("b/1.png", 1)]


def test_what_is_no_file_is_not_opened(tmp_path, warned):
    save(tmp_path / "a/0.png", 4, 5)
    save(tmp_path / "b/0.png", 4, 5)
    os.mkfifo(tmp_path / "b/pipe.png")
    (tmp_path / "b/link.png").symlink_to(tmp_path / "b/pipe.png")
    (tmp_path / "b/zero.png").symlink_to("/dev/zero")
    source = picture_files.from_folder(tmp_path).splits["train"]
    assert len(source.labels) == 2
    assert source.typical_size(np.arange(2)) == (4, 5)
    assert "3 files" in warned[0]


def test_broken_link_is_named(tmp_path):
    save(tmp_path / "a/0.png")
    save(tmp_path / "b/0.png")
    (tmp_path / "b/1.png").symlink_to(tmp_path / "nowhere.png")
    source = picture_files.from_folder(tmp_path).splits["train"]
    with pytest.raises(errors.ImageFetchError, match=r"b/1\.png"):
        source.read(2)


@pytest.mark.parametrize(
    "name",
    [
        "two words",
        "ünï-码",
        "new\nline",
        "quo'te\"",
        "-rf",
        "%s",
        os.fsdecode(b"\xff"),
    ],
    ids=["space", "unicode", "newline", "quotes", "dash", "percent", "bytes"],
)
def test_odd_names(tmp_path, name):
    save(tmp_path / name / f"{name}.png")
    save(tmp_path / "zebra" / f"{name}.png")
    found = picture_files.from_folder(tmp_path)
    source = found.splits["train"]
    for at in range(2):
        assert source.picture(source.read(at), at).shape == (8, 6, 3)
        source.identifier(at).encode("utf-8")
    for text in found.class_names:
        text.encode("utf-8")
    assert len(found.class_names) == 2


def test_names_that_differ_in_case(tmp_path, warned):
    for name in ("Cat", "cat"):
        save(tmp_path / name / "0.PNG")
        save(tmp_path / name / "0.png")
    found = picture_files.from_folder(tmp_path)
    assert found.class_names == ("Cat", "cat")
    assert [label for _, label in listed(found)] == [0, 0, 1, 1]
    assert "differ only in case: 'Cat' and 'cat'" in warned[0]


def make_empty_class(root):
    save(root / "a/0.png")
    (root / "b").mkdir()


def make_one_class(root):
    save(root / "a/0.png")


def make_one_class_in_train(root):
    save(root / "train/a/0.png")
    save(root / "test/a/0.png")


def make_other_class(root):
    for name in ("train/a", "train/b", "test/a", "test/c"):
        save(root / name / "0.png")


def make_twice(root):
    for name in ("train/a", "train/b", "val/a", "valid/a"):
        save(root / name / "0.png")


def make_no_folders(root):
    save(root / "0.png")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (make_empty_class, "empty class folder '.*/b'"),
        (make_one_class, r"two classes or more.*Received: \['a'\]"),
        (make_one_class_in_train, r"two classes or more.*Received: \['a'\]"),
        (make_other_class, r"Received: \['c'\] in '.*/test'"),
        (make_twice, "one folder for validation"),
        (make_no_folders, "without folders"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_bad_folders(tmp_path, make, message):
    make(tmp_path)
    with pytest.raises(DatasetError, match=message):
        picture_files.from_folder(tmp_path)


def test_folder_that_is_none(tmp_path):
    with pytest.raises(DatasetError, match="where there is nothing"):
        picture_files.from_folder(tmp_path / "no")
    path = save(tmp_path / "file.png")
    with pytest.raises(DatasetError, match="where there is a file"):
        picture_files.from_folder(path)


def test_files_are_decoded_whatever_their_mode(tmp_path):
    root = tmp_path / "root"
    save(root / "a/cmyk.jpg", mode="CMYK")
    save(root / "a/palette.gif", mode="P")
    save(root / "b/grey.png", mode="L")
    grey = np.full((8, 6), 40000, np.uint16)
    Image.fromarray(grey).save(root / "b/sixteen.png")
    source = picture_files.from_folder(root).splits["train"]
    for at, record in enumerate(source.records(range(4))):
        picture = source.picture(record, at)
        assert picture.shape == (8, 6, 3)
        assert picture.dtype == np.uint8
    assert set(picture.flat) == {156}


@pytest.mark.parametrize("damage", ["empty", "text", "truncated"])
def test_damaged_file_is_named(tmp_path, damage):
    path = save(tmp_path / "a/bad name.jpg", 64, 64)
    save(tmp_path / "b/0.png")
    data = path.read_bytes()
    path.write_bytes(
        {"empty": b"", "text": b"hello", "truncated": data[:-300]}[damage]
    )
    source = picture_files.from_folder(tmp_path).splits["train"]
    with pytest.raises(
        errors.ImageDecodeError, match=r"a/bad name\.jpg"
    ) as caught:
        source.picture(source.read(0), 0)
    assert "--bad-images skip" in str(caught.value)
    assert "--bad-images skip --dry-run" in str(caught.value)


def test_typical_size(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    save(tmp_path / "a/0.jpg", 10, 40, exif=exif)
    save(tmp_path / "a/1.png", 20, 30)
    save(tmp_path / "b/2.png", 30, 20)
    (tmp_path / "b/3.png").write_bytes(b"")
    source = picture_files.from_folder(tmp_path).splits["train"]
    assert source.typical_size(np.arange(4)) == (30, 20)
    assert source.typical_size(np.arange(1)) == (40, 10)
    assert source.typical_size(np.array([3])) is None


@pytest.mark.parametrize(
    "header", ["path,label", "label, Image ", "file,label,x"]
)
def test_csv(tmp_path, header):
    rows = {
        "path,label": 'b.png,dog\n"two words.png","a, cat"\n\n',
        "label, Image ": 'dog,b.png\n"a, cat",two words.png\n',
        "file,label,x": 'b.png,dog,1\r\ntwo words.png,"a, cat",2\r\n',
    }[header]
    path = write(tmp_path, f"{header}\n{rows}", "utf-8-sig")
    found = picture_files.from_csv(path)
    assert found.class_names == ("a, cat", "dog")
    assert listed(found) == [("b.png", 1), ("two words.png", 0)]
    source = found.splits["train"]
    assert source.picture(source.read(0), 0).shape == (8, 6, 3)


def test_csv_splits_and_numbers(tmp_path):
    text = "path,label,split\na.png,10,train\nb.png,9,Train\na.png,10,val\n"
    found = picture_files.from_csv(write(tmp_path, text))
    assert found.class_names == ("9", "10")
    assert listed(found) == [("a.png", 1), ("b.png", 0)]
    assert listed(found, "validation") == [("a.png", 1)]


def test_csv_numbers_are_positions_in_class_names(tmp_path):
    path = write(tmp_path, "path,label\na.png,2\nb.png,0\n")
    found = picture_files.from_csv(path, ["x", "y", "z"])
    assert found.class_names == ("x", "y", "z")
    assert listed(found) == [("a.png", 2), ("b.png", 0)]
    with pytest.raises(DatasetError, match=r"from 0 to 1.*'2'.*line 2"):
        picture_files.from_csv(path, ["x", "y"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "header"),
        ("path;label\na.png;x\n", "header"),
        ("path,image,label\n", "header"),
        ("path,label\n", "without any"),
        ("path,label\na.png,x\nb.png\n", "line 3"),
        ("path,label\na.png,x\nb.png,\n", "line 3"),
        ("path,label,split\na.png,x,train\nb.png,y,dev\n", "line 3"),
        ('path,label\na.png,"x\n', "line 2"),
        ('path,label\na.png,"x"y\n', "line 2"),
        ("path,label\na.png,x\na.png,y\n", "line 2 and as 'y' on line 3"),
        ("path,label\na.png,x\nc.png,y\n", r"'c.png' \(line 3\)"),
        ("path,label\na.png,x\n.,y\n", r"'.' \(line 3\)"),
        ("path,label\na.png,x\nb.png,x\n", "two classes or more"),
        ("path,label\na.png,x\nb\0.png,y\n", "line"),
        ("path,label\na.png,café\n", "UTF-8"),
    ],
    ids=map(str, range(15)),
)
def test_bad_csv(tmp_path, text, message):
    encoding = "latin-1" if "é" in text else "utf-8"
    path = write(tmp_path, text, encoding)
    with pytest.raises(DatasetError, match=message):
        picture_files.from_csv(path)


def test_csv_suggests_a_class(tmp_path):
    path = write(tmp_path, "path,label\na.png,dogg\n")
    with pytest.raises(DatasetError, match="Did you mean 'dog'"):
        picture_files.from_csv(path, ["cat", "dog"])


@pytest.mark.parametrize("name", ["no.csv", ""])
def test_csv_that_cannot_be_read(tmp_path, name):
    with pytest.raises(DatasetError, match="file that can be read"):
        picture_files.from_csv(tmp_path / name)


def test_stamp_changes_with_the_file(tmp_path):
    path = save(tmp_path / "a/0.png")
    save(tmp_path / "b/0.png")
    source = picture_files.from_folder(tmp_path).splits["train"]
    before = source.stamp(0)
    path.write_bytes(path.read_bytes() + b"\0")
    assert source.stamp(0) != before
    pathlib.Path(path).unlink()
    assert source.stamp(0) == (0, 0)
