"""Pictures found in folders, lists, archives, datasets; read ahead in order."""

import io
import json
import os
import pathlib
import pickle
import sqlite3
import subprocess
import sys
import tarfile
import threading
import time

import pytest
from file_server import FileServer, Reply, running

from bit_tf import items, picture_paths, tar_items
from bit_tf.errors import (
    DatasetError,
    ImageError,
    ImageFetchError,
    ImageTooLargeError,
)
from bit_tf.items import Item, Reader, find


def put(folder, *names, data=None):
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(name.encode() if data is None else data)


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def ids(*sources, **options):
    found = list(find(sources, **options))
    assert found == list(find(sources, **options))
    for item in found:
        assert json.loads(json.dumps(item.location)) == list(item.location)
        assert pickle.loads(pickle.dumps(item)) == item
        item.id.encode()
        item.source.encode()
    return [item.id for item in found]


def refused(*sources, **options):
    """What is said at once of sources."""
    with pytest.raises(DatasetError) as caught:
        find(sources, **options)
    assert "Received: " in str(caught.value)
    return str(caught.value)


def contents(sources, **options):
    """{id: bytes, or what is said}."""
    with Reader(**options) as reader:
        return {
            item.id: str(data) if isinstance(data, ImageError) else data
            for item, data in reader.read_all(find(sources))
        }


def test_a_folder_in_order(here, caplog):
    put(
        here / "photos",
        *("b.JPG", "a/2.png", "a/10.png", "a.jpg", "c/d/e.webp", "z.tiff"),
        *(".hidden.jpg", ".git/x.jpg", "notes.txt", "a/Thumbs.db", "d.tar"),
    )
    (here / "photos" / "empty").mkdir()
    expected = "a/10.png a/2.png a.jpg b.JPG c/d/e.webp z.tiff".split()
    assert ids("photos") == [f"photos/{name}" for name in expected]
    assert ids("photos/") == ids("photos")
    assert ids("./photos")[0] == "./photos/a/10.png"
    assert ids(str(here / "photos"))[0] == str(here / "photos/a/10.png")
    passed = "5 files below photos were passed over"
    assert passed in caplog.text
    first = next(find(["photos"]))
    assert first == Item(
        "photos/a/10.png",
        "photos/a/10.png",
        ("file", str(here / "photos/a/10.png")),
    )
    assert ids(pathlib.Path("photos")) == ids("photos")
    assert [item.id for item in find("photos")] == ids("photos")


def test_links(here):
    put(here / "photos", "a.jpg", "sub/b.jpg")
    put(here / "other", "c.jpg")
    for name, target in {
        "photos/loop": "..",
        "photos/sub/up": "../../photos",
        "photos/z": "../other",
        "photos/zz": "../other",
        "photos/one.jpg": "a.jpg",
        "photos/broken.jpg": "nothing.jpg",
        "photos/self.jpg": "self.jpg",
    }.items():
        os.symlink(target, here / name)
    found = ids("photos")
    assert [i for i in found if i.endswith("c.jpg")] == [
        "photos/loop/other/c.jpg"
    ]
    assert [i for i in found if i.endswith("b.jpg")] == ["photos/sub/b.jpg"]
    assert {"photos/one.jpg", "photos/broken.jpg"} <= set(found)
    assert len(found) == len(set(found)) == 6
    read = contents(["photos"])
    assert read["photos/one.jpg"] == b"a.jpg"
    assert "No such file" in read["photos/broken.jpg"]


def test_a_very_deep_folder(here):
    folder = os.open(".", os.O_RDONLY)
    for _ in range(1050):
        os.mkdir("d", dir_fd=folder)
        below = os.open("d", os.O_RDONLY, dir_fd=folder)
        os.close(folder)
        folder = below
    os.close(folder)
    put(here, "a.jpg")
    assert ids(".") == ["./a.jpg"]
    assert ids("**/*.jpg") == ["a.jpg"]
    subprocess.run(["rm", "-r", "d"], check=True, cwd=here)


def test_a_folder_that_cannot_be_read(here, monkeypatch, caplog):
    put(here / "photos", "a.jpg", "b/c.jpg", "d.jpg")
    entries = picture_paths._entries

    def fail(path):
        if path == bad:
            raise PermissionError(13, "Permission denied")
        return entries(path)

    monkeypatch.setattr(picture_paths, "_entries", fail)
    bad = "photos/b/"
    assert ids("photos") == ["photos/a.jpg", bad, "photos/d.jpg"]
    assert "photos/b/ cannot be read: Permission denied" in caplog.text
    assert "is a directory" in contents(["photos"])[bad]
    bad = "photos"
    assert "Permission denied" in refused("photos")


def test_names_that_are_no_text(here):
    name = b"caf\xe9.jpg"
    (here / "photos").mkdir()
    pathlib.Path(os.fsdecode(b"photos/" + name)).write_bytes(b"1")
    put(here / "photos", "new\nline.jpg", "snow\u2603.jpg", " .jpg")
    found = list(find(["photos"]))
    assert [item.source for item in found] == [
        "photos/ .jpg",
        "photos/caf\\xe9.jpg",
        "photos/new\nline.jpg",
        "photos/snow\u2603.jpg",
    ]
    again = Item(*json.loads(json.dumps(found[1])))
    with Reader() as reader:
        assert reader.read(again) == b"1"
    (here / "list.txt").write_bytes(b"photos/" + name + b"\n")
    assert contents(["list.txt"]) == {"photos/caf\\xe9.jpg": b"1"}


def test_names_that_look_like_others(here):
    raw = [
        b"\xff.jpg",
        b"\\xff.jpg",
        b"\\x5cxff.jpg",
        b"\\\xff.jpg",
        b"\\a.jpg",
    ]
    for name in raw:
        pathlib.Path(os.fsdecode(name)).write_bytes(name)
    read = contents(["."])
    assert sorted(read.values()) == sorted(raw)
    assert set(read) >= {"./\\xff.jpg", "./\\x5cxff.jpg", "./\\a.jpg"}
    with tarfile.open("a.tar", "w") as archive:
        for name in raw:
            archive.add(os.fsdecode(name))
    assert sorted(contents(["a.tar"]).values()) == sorted(raw)


def test_a_file_is_a_picture_whatever_its_suffix(here):
    put(here, "a.jpg", "b", ".c")
    assert ids("a.jpg", "b", ".c", "a.jpg") == ["a.jpg", "b", ".c", "a.jpg"]


def test_globs(here, caplog):
    put(
        here,
        *("p/a1.jpg", "p/a2.jpg", "p/b1.png", "p/q/c.jpg", "p/q/r/d.jpg"),
        *("p/.h.jpg", "p/list.txt", "p/.i/e.jpg", "p/[x].jpg", "p/s.tar"),
    )
    assert ids("p/a?.jpg") == ["p/a1.jpg", "p/a2.jpg"]
    assert ids("p/[ab]1.*") == ["p/a1.jpg", "p/b1.png"]
    every = "p/[x].jpg p/a1.jpg p/a2.jpg p/b1.png p/q/c.jpg p/q/r/d.jpg".split()
    assert ids("p/*") == every
    assert sorted(ids("p/**")) == every
    assert sorted(ids("**/*.jpg")) == [i for i in every if i[-3:] == "jpg"]
    assert ids("p/**/c.jpg") == ["p/q/c.jpg"]
    assert ids("*/q") == ["p/q/c.jpg", "p/q/r/d.jpg"]
    assert ids("p/[x].jpg") == ["p/[x].jpg"]
    assert ids("p/{b1.png,a{1..2}.jpg}") == ids("p/b1.png", "p/a?.jpg")
    assert ids("{p,p}/a1.jpg") == ["p/a1.jpg"]


def test_globs_that_match_nothing(here):
    put(here, "s/notes.md")
    write_tar("s/data-000.tar", [("0.jpg", b"x")])
    assert "'s/data-001.tar'" in refused("s/data-{000..001}.tar")
    assert "matches none" in refused("s/*.jpg")
    assert "at least one picture" in refused("s/*.md")
    assert "at least one picture" in refused("s/*")
    assert "upwards" in refused("{5..3}.jpg")
    assert "upwards" in refused("{0..99999999999}.jpg")


def test_lists_of_a_glob(here):
    put(here, "one.txt", data=b"a.jpg")
    put(here, "two.txt", data=b"b.jpg")
    assert ids("*.txt") == ["a.jpg", "b.jpg"]
    assert "at least one picture" in refused("*")


LIST = b"""\xef\xbb\xbf# pictures
a.jpg\r

  sub/b c.jpg\t
http://h/1.jpg?x=1#2
https://me:secret@h/2.jpg
/abs/d.png
#last.jpg
gone.jpg"""


def test_a_text_list(here):
    put(here / "lists", "all.txt", data=LIST)
    put(here / "lists", "a.jpg", "sub/b c.jpg")
    found = list(find(["lists/all.txt"]))
    assert [item.id for item in found] == [
        "lists/a.jpg",
        "lists/sub/b c.jpg",
        "http://h/1.jpg?x=1#2",
        "https://h/2.jpg",
        "/abs/d.png",
        "lists/gone.jpg",
    ]
    assert found[3].location == ("url", "https://me:secret@h/2.jpg")
    assert all("secret" not in item.id + item.source for item in found)
    os.chdir("lists")
    read = contents(["all.txt"], retries=0, timeout=1)
    assert read["a.jpg"] == b"a.jpg"
    assert read["sub/b c.jpg"] == b"sub/b c.jpg"
    assert "No such file" in read["gone.jpg"]


@pytest.mark.parametrize(
    ("name", "text", "column", "expected"),
    [
        ("l.csv", "path\na.jpg\n", None, ["a.jpg"]),
        ("l.csv", "label,Path\n1,a.jpg\n\n,b.jpg", None, ["a.jpg", "b.jpg"]),
        ("l.csv", "url,path\nhttp://h/x,a.jpg", None, ["a.jpg"]),
        ("l.csv", "url,path\nhttp://h/x,a.jpg", "url", ["http://h/x"]),
        ("l.csv", "photo\na.jpg", None, ["a.jpg"]),
        ("l.csv", 'n,url\n1,"http://h/a,b"', None, ["http://h/a,b"]),
        ("l.csv", 'path,n\n"a\nb.jpg",1', None, ["a\nb.jpg"]),
        (
            "l.csv",
            "n,path\n1\n2,a.jpg\n3,",
            None,
            ["l.csv#2", "a.jpg", "l.csv#4"],
        ),
        ("l.tsv", "n\tsource\n1\ta,b.jpg\r\n", None, ["a,b.jpg"]),
        ("L.CSV", "image\na.jpg", None, ["a.jpg"]),
    ],
    ids=lambda value: None if value is None else f"{value!s:.20}",
)
def test_csv(here, name, text, column, expected):
    put(here, name, data=text.encode())
    assert ids(name, column=column) == expected


@pytest.mark.parametrize(
    ("name", "data", "column", "words"),
    [
        ("l.csv", b"pfad,n\na,1", None, "a column of path, url"),
        ("l.csv", b"a.jpg\nb.jpg", None, "begins with 'a.jpg'"),
        ("l.csv", b"http://h/a,1\n", None, "begins with 'http://h/a'"),
        ("l.csv", b"path;n\na.jpg;1", None, "commas"),
        ("l.tsv", b"path,n\na.jpg,1", None, "tabs"),
        ("l.txt", b"a.jpg\nb\0.jpg", None, "byte 0"),
        ("l.csv", b"photo,n\na,1", "photos", "Did you mean 'photo'"),
        ("l.csv", b"photo,photo\na,1", "photo", "one column 'photo'"),
        ("l.csv", b"", None, "a single one"),
        ("l.csv", b"path\n", None, "at least one picture"),
        ("l.csv", b'path\n"a.jpg', None, "line 2"),
        ("l.csv", b'path\n"a"b', None, "line 2"),
        ("l.csv", b"path\n" + b"a" * 200_000, None, "line 2"),
        ("l.txt", b"\n# nothing\n", None, "at least one picture"),
        ("l.txt", "a.jpg".encode("utf-16"), None, "UTF-8"),
        ("l.txt", b"a" * 3_000_000, None, "line 1"),
        ("l.parquet", b"PAR1 no", None, "Parquet file that is whole"),
        ("l.parquet", b"", None, "Parquet file that is whole"),
        ("l.tar", b"no archive" * 100, None, "at its beginning"),
        ("l.tar", b"", None, "at its beginning"),
        ("l.tar", b"\0" * 10240, None, "at least one picture"),
        ("l.tar.gz", b"", None, "not compressed"),
        ("l.tgz", b"", None, "decompress"),
    ],
    ids=lambda value: None if value is None else f"{value!s:.25}",
)
def test_damaged_lists(here, name, data, column, words):
    put(here, name, data=data)
    assert words in refused(name, column=column)


@pytest.mark.parametrize("suffix", [".txt", ".csv", ".parquet", ".tar"])
def test_a_pipe_is_no_list(here, suffix):
    if suffix == ".parquet":
        pytest.importorskip(
            "pyarrow", reason="no pyarrow; pip install 'bit-tf[parquet]'"
        )
    os.mkfifo("pipe" + suffix)
    assert "not a regular file" in refused("pipe" + suffix)


def test_names_with_blanks_in_a_list(here):
    put(here, " a.jpg", "b.jpg", "c.jpg ")
    put(here, "l.txt", data=b" a.jpg\n b.jpg\nc.jpg \n")
    assert ids("l.txt") == [" a.jpg", "b.jpg", "c.jpg "]


def test_places_do_not_depend_on_where_one_is(here):
    put(here / "x", "a.jpg", "l.txt", data=b"a.jpg")
    with tarfile.open("x/a.tar", "w") as archive:
        archive.add("x/a.jpg", "m.jpg")
    os.chdir("x")
    found = list(find([".", "a.jpg", "l.txt", "a.tar"]))
    assert {item.location[1] for item in found} == {
        *(f"{here}/x/{name}" for name in ("./a.jpg", "a.jpg", "a.tar"))
    }
    os.chdir("/")
    with Reader() as reader:
        assert {reader.read(item) for item in found} == {b"a.jpg"}


def test_a_member_and_a_file_of_its_name(here):
    put(here, "x.png", "a.tar#x.png", "l.csv#2")
    put(here, "l.csv", data=b"n,path\n1\n")
    with tarfile.open("a.tar", "w") as archive:
        archive.add("x.png")
    found = ids("a.tar", "a.tar#x.png", "l.csv", "l.csv#2")
    assert found == ["a.tar#x.png", "a.tar\\x23x.png", "l.csv#2", "l.csv\\x232"]


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("http://u:p@h/x", "http://h/x"),
        ("http://h1?x=a@b/c", "http://h1?x=a@b/c"),
        ("http://h1#a@b/c", "http://h1#a@b/c"),
        ("http://h:80/a@b", "http://h:80/a@b"),
        ("http://[::1]:80/a@b", "http://[::1]:80/a@b"),
        ("http://u:p@[::1]/a", "http://[::1]/a"),
        ("http://u:p/w@host/x", "http://***@host/x"),
    ],
)
def test_passwords_are_not_shown(url, shown):
    assert ids(url) == [shown]


@pytest.mark.parametrize("sources", [3, [3], [None]], ids=str)
def test_sources_of_another_type(sources):
    with pytest.raises(DatasetError, match="list of texts"):
        find(sources)


def test_unknown_sources(here):
    put(here, "photo.jpg")
    (here / "empty").mkdir()
    assert "Did you mean 'photo.jpg'" in refused("foto.jpg")
    assert "Check the path" in refused("nowhere/at/all")
    assert "at least one picture" in refused("empty")
    assert "none" in refused()
    assert "Download it" in refused("s3://bucket/a.jpg")
    assert "Download it" in refused("https://h/a.tar")
    assert "Download it" in refused("http://[::1/x")
    assert "Download it" in refused("https://h/a.csv?x=1")
    assert "secret" not in refused("https://me:secret@h/a.csv")
    refused("photo.jpg", "nothing.jpg")
    refused("nul\0.jpg")
    refused("")
    assert ids("https://h/a?b=c.csv") == ["https://h/a?b=c.csv"]


@pytest.fixture
def arrow():
    return pytest.importorskip(
        "pyarrow", reason="needs pyarrow: pip install 'bit-tf[parquet]'"
    )


def test_parquet(here, arrow):
    from pyarrow import parquet

    names = ["a.jpg", None, "http://h/b", "c.jpg"]
    table = arrow.table(
        {
            "n": [1, 2, 3, 4],
            "path": arrow.array(names).dictionary_encode(),
            "raw": [name and name.encode() for name in names],
            "large": arrow.array(names, arrow.large_string()),
        }
    )
    (here / "lists").mkdir()
    parquet.write_table(table, "lists/l.parquet", row_group_size=3)
    expected = ["lists/a.jpg", "lists/l.parquet#2", "http://h/b", "lists/c.jpg"]
    for column in (None, "path", "raw", "large"):
        assert ids("lists/l.parquet", column=column) == expected
    assert "of type int64" in refused("lists/l.parquet", column="n")
    assert "Did you mean 'path'" in refused("lists/l.parquet", column="Paths")
    whole = (here / "lists/l.parquet").read_bytes()
    put(here, "cut.parquet", data=whole[:-20])
    assert "whole" in refused("cut.parquet")


def write_tar(path, members, **options):
    """members: (name, bytes) or TarInfo."""
    with tarfile.open(path, "w", **options) as archive:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                archive.addfile(member)
            else:
                info = tarfile.TarInfo(member[0])
                info.size = len(member[1])
                archive.addfile(info, io.BytesIO(member[1]))


def special(name, kind, target=""):
    info = tarfile.TarInfo(name)
    info.type = kind
    info.linkname = target
    return info


LONG = "d" * 90 + "/" + "e" * 120 + ".jpg"


@pytest.mark.parametrize(
    "form", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT], ids=["pax", "gnu"]
)
def test_an_archive(here, form):
    (here / "s").mkdir()
    write_tar(
        "s/a.tar",
        [
            ("0.jpg", b"zero"),
            ("0.cls", b"3"),
            ("0.json", b"{}"),
            special("dir.jpg", tarfile.DIRTYPE),
            special("link.jpg", tarfile.SYMTYPE, "0.jpg"),
            special("hard.jpg", tarfile.LNKTYPE, "0.jpg"),
            special("fifo.jpg", tarfile.FIFOTYPE),
            (LONG, b"long" * 1000),
            ("._0.jpg", b"resource"),
            ("x/snow\u2603.PNG", b"snow"),
            (os.fsdecode(b"caf\xe9.jpg"), b"bytes"),
            ("0.jpg", b"again"),
            ("0.jpg", b"third"),
            ("empty.jpg", b""),
        ],
        format=form,
        encoding="utf-8",
        errors="surrogateescape",
    )
    read = contents(["s/a.tar"])
    shown = [name.removeprefix("s/a.tar#") for name in read]
    assert shown[:4] == ["0.jpg", LONG, "x/snow\u2603.PNG", "caf\\xe9.jpg"]
    assert shown[4].startswith("0.jpg@")
    assert shown[5].startswith("0.jpg@")
    assert shown[6] == "empty.jpg"
    assert list(read.values()) == [
        *(b"zero", b"long" * 1000, b"snow", b"bytes", b"again", b"third", b"")
    ]
    assert ids("s/a.tar") == list(read)


def test_shards(here):
    for number in range(12):
        write_tar(f"data-{number:03}.tar", [(f"{number}.jpg", b"x")])
    expected = [f"data-{n:03}.tar#{n}.jpg" for n in range(12)]
    assert ids("data-{000..011}.tar") == expected
    assert ids("data-*.tar") == expected
    assert ids("data-{003,001}.tar") == [expected[3], expected[1]]


def test_an_archive_that_is_cut(here, caplog):
    write_tar("a.tar", [(f"{n}.jpg", b"x" * 700) for n in range(3)])
    whole = (here / "a.tar").read_bytes()
    # Each member takes a header and two blocks.
    for size in range(100, 3 * 1536 + 512, 256):
        put(here, "cut.tar", data=whole[:size])
        found, said = until_it_fails("cut.tar")
        begun, rest = divmod(size, 1536)
        complete = begun + (rest >= 512 + 700)
        assert found == [f"cut.tar#{n}.jpg" for n in range(complete)]
        if rest:
            # A member whose header is there is named, though it is cut.
            last = begun if rest >= 512 else begun - 1
            where = f"after the member '{last}.jpg'"
            if last < 0:
                where = "at its beginning"
            assert f"'cut.tar', which ends or is damaged {where}" in said
        else:
            assert said is None
            assert "has no end mark" in caplog.text
            caplog.clear()


def until_it_fails(source):
    """What is found, and what is said then; None if all is well."""
    found = []
    try:
        for item in find([source]):
            found.append(item.id)
    except DatasetError as error:
        return found, str(error)
    return found, None


def test_an_archive_that_is_damaged(here):
    write_tar("a.tar", [(f"{n}.jpg", b"x" * 700) for n in range(3)])
    whole = bytearray((here / "a.tar").read_bytes())
    whole[1536:1540] = b"\xff" * 4
    put(here, "a.tar", data=bytes(whole))
    found = find(["a.tar"])
    assert next(found).id == "a.tar#0.jpg"
    with pytest.raises(DatasetError, match=r"after the member '0.jpg'"):
        next(found)


def test_an_archive_with_a_huge_header(here):
    info = tarfile.TarInfo("././@PaxHeader")
    info.type = tarfile.XHDTYPE
    info.size = 2**30
    with open("a.tar", "wb") as file:
        file.write(info.tobuf())
        file.truncate(2**30 + 10240)
    assert "a header of 1073741824 bytes" in refused("a.tar")


def test_an_archive_is_gone_through_by_several_threads(here):
    write_tar("a.tar", [(f"{n}.jpg", b"x") for n in range(6)])
    found = find(["a.tar"])
    names = []
    for _ in range(6):
        thread = threading.Thread(target=lambda: names.append(next(found).id))
        thread.start()
        thread.join()
    assert names == [f"a.tar#{n}.jpg" for n in range(6)]


def test_an_archive_without_room_for_its_names(here, monkeypatch):
    write_tar("a.tar", [("0.jpg", b"x")])

    def full(self, name):
        raise sqlite3.OperationalError("database or disk is full")

    monkeypatch.setattr(tar_items._Names, "has", full)
    assert "disk is full" in refused("a.tar")


def test_members_that_are_gone(here):
    write_tar("a.tar", [("0.jpg", b"x" * 700)])
    (item,) = find(["a.tar"])
    with Reader(max_bytes=699) as reader, pytest.raises(ImageTooLargeError):
        reader.read(item)
    put(here, "a.tar", data=b"x" * 600)
    assert "Has the archive changed" in tar_error(item)
    (here / "a.tar").unlink()
    assert "No such file" in tar_error(item)


def tar_error(item):
    with Reader() as reader, pytest.raises(ImageFetchError) as caught:
        reader.read(item)
    return str(caught.value)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """A folder where TFDS keeps a small dataset, and its pictures' bytes."""
    import numpy as np
    import tensorflow_datasets as tfds

    folder = tmp_path_factory.mktemp("tfds")
    place = folder / "shades" / "2.1.0"
    place.mkdir(parents=True)
    identity = tfds.core.dataset_info.DatasetIdentity(
        name="shades",
        version=tfds.core.Version("2.1.0"),
        data_dir=str(place),
        module_name="",
    )
    picture = tfds.features.Image(shape=(None, None, 3))
    features = {"image": picture, "mask": picture, "n": np.int64}
    info = tfds.core.DatasetInfo(
        builder=identity, features=tfds.features.FeaturesDict(features)
    )
    writer = tfds.core.SequentialWriter(info, max_examples_per_shard=4)
    writer.initialize_splits(["train", "test"])
    for split, size in {"train": 10, "test": 3}.items():
        for index in range(size):
            pixels = np.full((2, 2, 3), index, np.uint8)
            row = {"image": pixels, "mask": 255 - pixels, "n": index}
            writer.add_examples({split: [row]})
    writer.close_all()
    return folder


def shade(data):
    from bit_tf import images

    return int(images.decode(data)[0, 0, 0])


def test_a_dataset(dataset):
    found = list(find(["tfds:shades"], data_dir=dataset))
    expected = [f"tfds:shades:2.1.0/train/{n}" for n in range(10)]
    expected += [f"tfds:shades:2.1.0/test/{n}" for n in range(3)]
    assert [item.id for item in found] == expected
    assert ids("tfds:shades:2.1.0", data_dir=dataset) == expected
    wanted = [*range(10), *range(3)]
    mixed = [9, 0, 1, 12, 2, 8, 4, 4]
    with pickle.loads(pickle.dumps(Reader())) as reader:
        whole = list(reader.read_all(found, window=4))
        assert [item for item, _ in whole] == found
        assert [shade(data) for _, data in whole] == wanted
        some = reader.read_all([found[n] for n in mixed])
        assert [shade(d) for _, d in some] == [wanted[n] for n in mixed]
        place = ("tfds", "shades:2.1.0", str(dataset), "train", 10, None)
        (gone,) = reader.read_all([Item("gone", "gone", place)])
        assert isinstance(gone[1], ImageFetchError)


@pytest.mark.parametrize(
    ("split", "expected"),
    [
        ("test", ["test/0", "test/1", "test/2"]),
        ("train[8:]+test[:1]", ["train/8", "train/9", "test/0"]),
        ("train[:20%]", ["train/0", "train/1"]),
    ],
)
def test_splits_of_a_dataset(dataset, split, expected):
    found = ids("tfds:shades", data_dir=dataset, split=split)
    assert found == [f"tfds:shades:2.1.0/{name}" for name in expected]


def test_another_picture_of_a_dataset(dataset):
    options = {"data_dir": dataset, "split": "test", "column": "mask"}
    found = list(find(["tfds:shades"], **options))
    assert found[2].id == "tfds:shades:2.1.0/test/2#mask"
    with Reader() as reader:
        assert shade(reader.read(found[2])) == 253


def test_datasets_that_are_not_there(dataset):
    def said(name="tfds:shades", **options):
        return refused(name, data_dir=dataset, **options)

    assert "'valid'" in said(split="valid")
    assert "Requested slice" in said(split="train[:99]")
    assert "at least one picture" in said(split="train[3:3]")
    assert "feature 'photo'" in said(column="photo")
    assert "Image feature" in said(column="n")
    assert "no_such_data_set" in said("tfds:no_such_data_set")


def test_a_dataset_that_is_damaged(dataset, tmp_path):
    import shutil

    copy = tmp_path / "tfds"
    shutil.copytree(dataset, copy)
    found = list(find(["tfds:shades"], data_dir=copy, split="test"))
    (record,) = copy.glob("shades/2.1.0/*test*")
    record.write_bytes(record.read_bytes()[:-7])
    with Reader() as reader:
        outcomes = [data for _, data in reader.read_all(found)]
    assert [shade(data) for data in outcomes[:2]] == [0, 1]
    assert isinstance(outcomes[2], ImageFetchError)
    record.unlink()
    with Reader() as reader:
        outcomes = [data for _, data in reader.read_all(found)]
    assert all(isinstance(data, ImageFetchError) for data in outcomes)


class Watched:
    """Items of files, which know how many were taken."""

    def __init__(self, folder, count):
        self.folder = folder
        self.count = count
        self.taken = 0

    def __iter__(self):
        for number in range(self.count):
            self.taken += 1
            path = str(self.folder / f"{number}.jpg")
            yield Item(path, path, ("file", path))


def readers():
    """The threads that read."""
    return {t for t in threading.enumerate() if "_work" in t.name}


def test_reading_in_order(here):
    put(here, *(f"{n}.jpg" for n in range(0, 300, 2)))
    watched = Watched(here, 300)
    before = readers()
    with Reader() as reader:
        for number, (item, data) in enumerate(
            reader.read_all(watched, window=7)
        ):
            assert item.id.endswith(f"/{number}.jpg")
            assert watched.taken <= number + 7
            if number % 2:
                assert isinstance(data, ImageFetchError)
                assert f"{number}.jpg" in str(data)
            else:
                assert data == f"{number}.jpg".encode()
    assert watched.taken == 300
    assert readers() <= before


def test_places_that_cannot_be_read(here):
    put(here, "a.jpg")
    places = [
        *(
            ("file", "."),
            ("file", ""),
            ("file", "nul\0"),
            ("file", "/dev/zero"),
        ),
        *(("cloud", "a"), ("tar", "a.jpg", 0, 99), ("tar", "a.jpg", -5, 2)),
        *(("tar", ".", 0, 1), ("url", "nonsense"), ("url", "http://\udcff/")),
        *(
            ("url", "file:///etc/passwd"),
            ("url", "http://[::1"),
            ("file", "a.jpg"),
        ),
    ]
    places[:0] = [
        *((), ("file",), ("file", 3), ("url", 5), ("url", "a", "b"), None),
        *(("tar", "a.jpg"), ("tar", "a.jpg", 0, -1), ("tfds", "a"), "file"),
        ("tar", "a.jpg", 0.0, 1),
    ]
    found = [Item(str(n), "", place) for n, place in enumerate(places)]
    with Reader(retries=0, max_bytes=1000) as reader:
        *bad, good = [data for _, data in reader.read_all(found)]
        assert good == b"a.jpg"
        for item, outcome in zip(found, bad, strict=False):
            assert isinstance(outcome, ImageError), item
            assert "Received: " in str(outcome)
            with pytest.raises(type(outcome)):
                reader.read(item)
    with pytest.raises(ValueError, match="at least 1"):
        next(Reader().read_all([], window=0))


def test_large_files(here):
    put(here, "a.jpg", data=b"x" * 1001)
    with Reader(max_bytes=1000) as reader:
        ((_, outcome),) = reader.read_all(find(["a.jpg"]))
    assert isinstance(outcome, ImageTooLargeError)


def test_what_finding_raises_comes_after_what_was_found(here):
    put(here, "0.jpg", "1.jpg")

    def broken():
        yield from Watched(here, 2)
        raise DatasetError("broken")

    with Reader() as reader:
        pairs = reader.read_all(broken())
        assert [next(pairs)[1], next(pairs)[1]] == [b"0.jpg", b"1.jpg"]
        with pytest.raises(DatasetError, match="broken"):
            next(pairs)


def test_bytes_ahead_are_bounded(here, monkeypatch):
    put(here, *(f"{n}.jpg" for n in range(40)), data=b"x" * 1000)
    monkeypatch.setattr(items, "_HELD", 5000)
    read = []
    read_source = items.download.read_source

    def noted(path, **options):
        read.append(path.name)
        return read_source(path, **options)

    monkeypatch.setattr(items.download, "read_source", noted)
    with Reader() as reader:
        pairs = reader.read_all(Watched(here, 40), window=30)
        for number in range(40):
            _, data = next(pairs)
            assert len(data) == 1000
            time.sleep(0.01)
            # What waits, what was taken, and what four threads had begun.
            assert len(read) <= number + 1 + 5 + 4
        assert next(pairs, None) is None
    assert sorted(read) == sorted(f"{n}.jpg" for n in range(40))


class Web(FileServer):
    """Answers by path; /slow waits until the event is set."""

    def __init__(self):
        super().__init__()
        self.event = threading.Event()

    def reply(self, method, path):
        if path.startswith("/slow"):
            return Reply(body=b"slow", hold=self.event)
        status = int(path[1:4])
        if status == 302:
            return Reply(302, headers={"Location": path})
        return Reply(status, path.encode())


@pytest.fixture
def web(monkeypatch):
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    with running(Web) as server:
        yield server


def test_urls_and_files_together(here, web):
    put(here, "a.jpg")
    lines = [
        *(f"{web.url}/200/1", "a.jpg", f"{web.url}/404", f"{web.url}/302"),
        *(f"{web.url}/200/2", "gone.jpg", "ftp://h/a", f"{web.url}/200/1"),
    ]
    put(here, "list.txt", data="\n".join(lines).encode())
    with Reader(retries=0) as reader:
        outcomes = [d for _, d in reader.read_all(find(["list.txt"]))]
    good = [data for data in outcomes if isinstance(data, bytes)]
    assert good == [b"/200/1", b"a.jpg", b"/200/2", b"/200/1"]
    assert outcomes[2].status == 404
    assert "redirects" in str(outcomes[3])
    assert "No such file" in str(outcomes[5])
    assert "Only http" in str(outcomes[6])


def test_what_follows_a_slow_one_is_read_meanwhile(web):
    urls = [f"{web.url}/slow", *(f"{web.url}/200/{n}" for n in range(20))]
    with Reader(per_host=2) as reader:
        pairs = reader.read_all(find(urls), window=10)
        timer = threading.Timer(0.5, web.event.set)
        timer.start()
        assert next(pairs)[1] == b"slow"
        assert {s.target for s in web.seen} >= {f"/200/{n}" for n in range(9)}
        assert [d for _, d in pairs] == [b"/200/%d" % n for n in range(20)]
        timer.join()


def test_what_is_waited_for_begins_however_much_waits(here, web, monkeypatch):
    monkeypatch.setattr(items, "_HELD", 2500)
    put(here, *(f"{n}.jpg" for n in range(20)), data=b"x" * 1000)
    urls = [f"{web.url}/slow/1", f"{web.url}/slow/2"]
    outcomes = []

    def run():
        found = [*find(urls), *Watched(here, 20)]
        outcomes.extend(len(data) for _, data in reader.read_all(found))

    with Reader(per_host=1) as reader:
        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        time.sleep(0.2)
        web.event.set()
        thread.join(5)
    assert outcomes == [4, 4] + [1000] * 20


def test_leaving_early_is_quick(web):
    before = readers()
    with Reader() as reader:
        pairs = reader.read_all(
            find([f"{web.url}/200"] + [f"{web.url}/slow"] * 9)
        )
        assert next(pairs)[1] == b"/200"
        begun = time.monotonic()
        pairs.close()
        assert time.monotonic() - begun < 0.5
        assert (
            reader.read(next(find([f"{web.url}/200/again"]))) == b"/200/again"
        )
    assert time.monotonic() - begun < 1.5
    assert readers() <= before
    web.event.set()


def test_two_threads_share_a_reader(here, web):
    put(here, *(f"{n}.jpg" for n in range(100)))
    results = {}

    def run(number, reader):
        found = [*Watched(here, 50), *find([f"{web.url}/200/{number}"] * 20)]
        results[number] = [data for _, data in reader.read_all(found)]

    with Reader(per_host=2) as reader:
        threads = [
            threading.Thread(target=run, args=(n, reader)) for n in range(4)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(20)
    expected = [f"{n}.jpg".encode() for n in range(50)]
    for number in range(4):
        assert results[number] == expected + [b"/200/%d" % number] * 20


def test_a_reader_keeps_its_options_when_pickled(here):
    put(here, "a.jpg")
    with Reader(max_bytes=3) as first:
        first.read_all(find(["a.jpg"]))
        again = pickle.loads(pickle.dumps(first))
    (item,) = find(["a.jpg"])
    with again, pytest.raises(ImageTooLargeError, match="at most 3 bytes"):
        again.read(item)
    with pytest.raises(RuntimeError, match="closed"):
        again.read(item)


MEASURE = """
import sys, tracemalloc
from bit_tf import items
tracemalloc.start()
n = sum(1 for _ in items.find([sys.argv[1]]))
print(n, tracemalloc.get_traced_memory()[1], "tensorflow" in sys.modules)
"""


def peak(source):
    """(number of items, bytes at the most, whether TensorFlow was loaded)."""
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, source],
        check=True,
        capture_output=True,
        text=True,
    )
    count, size, loaded = done.stdout.split()
    return int(count), int(size), loaded


def test_memory_of_a_list(here):
    for count in (1_000, 50_000):
        lines = "".join(f"folder/{n}.jpg\n" for n in range(count))
        put(here, f"{count}.txt", data=lines.encode())
    few, many = peak("1000.txt"), peak("50000.txt")
    assert (few[0], many[0]) == (1_000, 50_000)
    assert many[1] < few[1] + 2**18
    assert many[2] == "False"


@pytest.mark.slow
def test_memory_of_a_million(here):
    for count in (10_000, 1_000_000):
        with open(f"{count}.txt", "w") as file:
            file.writelines(f"folder/{n}.jpg\n" for n in range(count))
    few, many = peak("10000.txt"), peak("1000000.txt")
    assert many[0] == 1_000_000
    assert many[1] < few[1] + 2**20


@pytest.mark.slow
def test_memory_of_a_large_archive(here):
    for count in (5_000, 50_000):
        with open(f"{count}.tar", "wb") as file:
            for number in range(count):
                file.write(tarfile.TarInfo(f"{number}.jpg").tobuf())
            file.write(b"\0" * 1024)
    few, many = peak("5000.tar"), peak("50000.tar")
    assert many[0] == 50_000
    assert many[1] < few[1] + 2**20
