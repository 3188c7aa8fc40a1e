import gzip
import hashlib
import io
import os
import shutil
import tarfile
import time
import tracemalloc

import pytest

from bit_tf import archive, errors


def write(path, members, mode="w:gz"):
    """A tar archive of (TarInfo, bytes)."""
    with tarfile.open(path, mode) as file:
        for member, data in members:
            member.size = len(data)
            file.addfile(member, io.BytesIO(data))
    return path


def entry(name, type_=tarfile.REGTYPE, linkname=""):
    member = tarfile.TarInfo(name)
    member.type = type_
    member.linkname = linkname
    return member


@pytest.mark.parametrize("mode", ["w:gz", "w"])
def test_a_whole_archive_is_unpacked(tmp_path, mode):
    path = write(
        tmp_path / "model.tar.gz",
        [
            (entry(".", tarfile.DIRTYPE), b""),
            (entry("./variables", tarfile.DIRTYPE), b""),
            (entry("./variables/variables.index"), b"index"),
            (entry("./saved_model.pb"), b"graph"),
            (entry("orphan/file"), b"its folder has no entry"),
        ],
        mode,
    )
    archive.unpack(path, tmp_path / "out")
    assert (tmp_path / "out/variables/variables.index").read_bytes() == b"index"
    assert (tmp_path / "out/saved_model.pb").read_bytes() == b"graph"
    assert (tmp_path / "out/orphan/file").exists()


HOSTILE = {
    "parent": entry("../evil"),
    "parent inside": entry("a/../../evil"),
    "absolute": entry("/tmp/evil"),
    "symlink": entry("link", tarfile.SYMTYPE, "/etc/passwd"),
    "symlink inside": entry("link", tarfile.SYMTYPE, "saved_model.pb"),
    "hard link": entry("link", tarfile.LNKTYPE, "/etc/passwd"),
    "device": entry("device", tarfile.CHRTYPE),
    "fifo": entry("fifo", tarfile.FIFOTYPE),
    "file over a directory": entry("variables"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_members_are_refused(tmp_path, name):
    path = write(
        tmp_path / "model.tar.gz",
        [
            (entry("variables", tarfile.DIRTYPE), b""),
            (entry("saved_model.pb"), b"graph"),
            (HOSTILE[name], b""),
        ],
    )
    with pytest.raises((errors.ArchiveError, OSError)) as caught:
        archive.unpack(path, tmp_path / "out" / "model")
    assert isinstance(caught.value, errors.ArchiveError), caught.value
    assert HOSTILE[name].name in str(caught.value)
    assert list((tmp_path / "out").iterdir()) == []
    assert not (tmp_path / "evil").exists()


def test_names_that_cannot_be(tmp_path):
    for members in (
        [(entry("a"), b"x"), (entry("a/b"), b"y")],
        [(entry("a"), b"x"), (entry("a", tarfile.DIRTYPE), b"")],
        [(entry("n" * 300), b"x")],
        [],
    ):
        path = write(tmp_path / "model.tar.gz", members)
        with pytest.raises(errors.ArchiveError):
            archive.unpack(path, tmp_path / "out")
        assert not (tmp_path / "out").exists()


def test_a_large_extended_header_is_refused(tmp_path):
    member = entry("file")
    member.pax_headers = {"comment": "x" * (2 * 2**20)}
    path = tmp_path / "model.tar.gz"
    with tarfile.open(path, "w:gz", format=tarfile.PAX_FORMAT) as file:
        file.addfile(member)
    with pytest.raises(errors.ArchiveError, match="extended header"):
        archive.unpack(path, tmp_path / "out")


def pax(path, members):
    """An archive of (name, extended header's records)."""
    with tarfile.open(path, "w:gz", format=tarfile.PAX_FORMAT) as file:
        for name, records in members:
            member = entry(name)
            member.pax_headers = records
            file.addfile(member)
    return path


def extended(data, type_=tarfile.XHDTYPE):
    """A raw extended header."""
    header = entry("header", type_)
    header.size = len(data)
    blocks = -(-len(data) // 512) * 512
    return header.tobuf(tarfile.USTAR_FORMAT) + data.ljust(blocks, b"\0")


def raw(path, *blocks):
    """An archive of blocks, and one file."""
    file = entry("file").tobuf(tarfile.USTAR_FORMAT)
    with gzip.open(path, "wb") as sink:
        for block in (*blocks, file, bytes(1024)):
            sink.write(block)
    return path


def gnu_sparse(count):
    """A member with holes in GNU tar's old format, and a chain of blocks."""
    row = b"00000000001\0" * 2
    header = bytearray(
        entry("s", tarfile.GNUTYPE_SPARSE).tobuf(tarfile.GNU_FORMAT)
    )
    header[386:482] = row * 4
    header[482:483] = b"\1"
    header[483:495] = b"00000000001\0"
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    block = (row * 21).ljust(512, b"\1")
    return bytes(header) + block * count


def test_extended_headers_are_small_in_all(tmp_path):
    path = pax(
        tmp_path / "model.tar.gz",
        [(f"f{i}", {"comment": "x" * 200_000}) for i in range(100)],
    )
    tracemalloc.start()
    try:
        with pytest.raises(errors.ArchiveError, match="extended headers"):
            archive.unpack(path, tmp_path / "out")
        assert tracemalloc.get_traced_memory()[1] < 8 * 2**20
    finally:
        tracemalloc.stop()
    path = raw(tmp_path / "chain.tar.gz", *[extended(b"")] * 20)
    with pytest.raises(errors.ArchiveError, match="extended headers"):
        archive.unpack(path, tmp_path / "out")
    path = pax(
        tmp_path / "many.tar.gz",
        [(f"f{i}", {"mtime": "1.5", "comment": "ä"}) for i in range(3000)],
    )
    archive.unpack(path, tmp_path / "out")
    assert len(os.listdir(tmp_path / "out")) == 3000


@pytest.mark.parametrize(
    "records",
    [
        {"GNU.sparse.map": "0,1," * 1000 + "0,1"},
        {"GNU.sparse.size": "5"},
        {"GNU.sparse.major": "1", "GNU.sparse.minor": "0"},
        None,
    ],
)
def test_files_with_holes_are_refused(tmp_path, records):
    path = tmp_path / "model.tar.gz"
    if records is None:
        raw(path, gnu_sparse(100_000))
    else:
        pax(path, [("s", records)])
    tracemalloc.start()
    try:
        with pytest.raises(errors.ArchiveError, match="with holes"):
            archive.unpack(path, tmp_path / "out")
        assert tracemalloc.get_traced_memory()[1] < 8 * 2**20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    "data",
    [
        b"1" * 900_000,
        b"0 path=x\n",
        b"99 path=x\n",
        b"9 path=xy",
        b"9 pathxy\n",
        b"9" * 5000 + b" path=x\n",
        b"11 size=-5\n",
        b"12 size=abc\n",
        b"path=x\n",
    ],
    ids=lambda data: data[:12],
)
def test_damaged_extended_headers(tmp_path, data):
    path = raw(tmp_path / "model.tar.gz", extended(data))
    start = time.monotonic()
    with pytest.raises(errors.ArchiveError, match="not a whole tar archive"):
        archive.unpack(path, tmp_path / "out")
    assert time.monotonic() - start < 5


def test_a_negative_size_is_refused(tmp_path):
    header = bytearray(extended(b""))
    header[124:136] = b"\xff" * 12
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    path = raw(tmp_path / "model.tar.gz", bytes(header))
    with pytest.raises(errors.ArchiveError, match="-1 bytes"):
        archive.unpack(path, tmp_path / "out")


def test_extended_names_and_sizes_are_read(tmp_path):
    name = "variables/" + "n" * 200 + "/größe\udcff"
    for number, format in enumerate((tarfile.PAX_FORMAT, tarfile.GNU_FORMAT)):
        path = tmp_path / f"{number}.tar"
        with tarfile.open(path, "w", format=format) as file:
            member = entry(name)
            member.size = 700
            if format == tarfile.PAX_FORMAT:
                # Those of all members are passed over.
                file.fileobj.write(extended(b"10 path=x\n", tarfile.XGLTYPE))
                file.offset = file.fileobj.tell()
                member.pax_headers = {"size": "700"}
            file.addfile(member, io.BytesIO(b"x" * 700))
            file.addfile(entry("after"))
        archive.unpack(path, tmp_path / f"out{number}")
        out = tmp_path / f"out{number}"
        assert (out / name).read_bytes() == b"x" * 700
        assert (out / "after").exists()


@pytest.mark.parametrize(
    "name",
    ["a\0b", "/".join(["d" * 200] * 30), "/".join("a" * 40), "n" * 256],
    ids=["NUL", "long", "deep", "long part"],
)
def test_impossible_names_are_refused(tmp_path, name):
    path = pax(tmp_path / "model.tar.gz", [("file", {"path": name})])
    with pytest.raises(errors.ArchiveError, match="up to 1000 bytes and 32"):
        archive.unpack(path, tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["model.tar.gz"]


def test_what_could_not_be_unpacked_is_not_packed(tmp_path):
    (tmp_path / "model" / "/".join("a" * 33)).mkdir(parents=True)
    with pytest.raises(errors.ArchiveError, match="32 parts"):
        archive.pack(tmp_path / "model", tmp_path / "model.tar.gz")
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_a_wrong_checksum_is_found(tmp_path):
    path = write(tmp_path / "model.tar.gz", [(entry("file"), os.urandom(999))])
    content = bytearray(path.read_bytes())
    content[-8] ^= 1
    path.write_bytes(content)
    with pytest.raises(errors.ArchiveError, match="CRC"):
        archive.unpack(path, tmp_path / "out")


def test_limits(tmp_path):
    path = write(
        tmp_path / "bomb.tar.gz", [(entry("zeros"), bytes(10 * 2**20))]
    )
    assert os.path.getsize(path) < 2**20
    with pytest.raises(errors.ArchiveError, match="1048576 bytes"):
        archive.unpack(path, tmp_path / "out", max_bytes=2**20)
    path = write(
        tmp_path / "many.tar", [(entry(f"{i}"), b"") for i in range(20)], "w"
    )
    with pytest.raises(errors.ArchiveError, match="10 members"):
        archive.unpack(path, tmp_path / "out", max_members=10)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("keep", [0, 5, 100, -1000, -20])
def test_damaged_archives_leave_nothing(tmp_path, keep):
    data = os.urandom(200_000)
    path = write(tmp_path / "model.tar.gz", [(entry("saved_model.pb"), data)])
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(errors.ArchiveError, match="not a whole tar archive"):
        archive.unpack(path, tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model.tar.gz"]


def test_missing_archive(tmp_path):
    with pytest.raises(FileNotFoundError):
        archive.unpack(tmp_path / "none.tar.gz", tmp_path / "out")


def make_model(path):
    """A directory such as a SavedModel's."""
    (path / "variables").mkdir(parents=True)
    (path / "assets" / "empty").mkdir(parents=True)
    (path / "assets.extra").mkdir()
    (path / "saved_model.pb").write_bytes(b"graph" * 1000)
    (path / "variables" / "variables.index").write_bytes(b"index")
    data = path / "variables" / "variables.data-00000-of-00001"
    data.write_bytes(os.urandom(3 * 2**20 + 7))
    (path / "assets" / "größen.txt").write_bytes(b"10")
    return path


def content(path):
    return {
        found.relative_to(path).as_posix(): found.read_bytes()
        if found.is_file()
        else None
        for found in path.rglob("*")
    }


def test_what_is_packed_unpacks(tmp_path):
    model = make_model(tmp_path / "model")
    path = tmp_path / "model.tar.gz"
    size, digest = archive.pack(model, path)
    packed = path.read_bytes()
    assert (size, digest) == (len(packed), hashlib.sha256(packed).hexdigest())
    archive.unpack(path, tmp_path / "out")
    assert content(tmp_path / "out") == content(model)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "model",
        "model.tar.gz",
        "out",
    ]


def test_members_are_as_tensorflow_hub_needs_them(tmp_path):
    model = make_model(tmp_path / "model")
    archive.pack(model, tmp_path / "model.tar.gz")
    with tarfile.open(tmp_path / "model.tar.gz") as packed:
        members = packed.getmembers()
    assert [member.name for member in members] == [
        "assets",
        "assets/empty",
        "assets/größen.txt",
        "assets.extra",
        "saved_model.pb",
        "variables",
        "variables/variables.data-00000-of-00001",
        "variables/variables.index",
    ]
    for member in members:
        assert (member.uid, member.gid, member.mtime) == (0, 0, 0)
        assert (member.uname, member.gname) == ("", "")
        assert member.mode == (0o755 if member.isdir() else 0o644)
        assert member.isdir() or member.type == tarfile.REGTYPE
        # Extended headers only where a name is not ASCII.
        assert bool(member.pax_headers) == (not member.name.isascii())
    header = (tmp_path / "model.tar.gz").read_bytes()[:10]
    # No name, no time.
    assert header[3] == 0
    assert header[4:8] == bytes(4)


@pytest.mark.slow
def test_tensorflow_hub_unpacks_it(tmp_path):
    from tensorflow_hub import resolver

    model = make_model(tmp_path / "model")
    archive.pack(model, tmp_path / "model.tar.gz")
    (tmp_path / "out").mkdir()
    with open(tmp_path / "model.tar.gz", "rb") as file:
        resolver.DownloadManager("x").download_and_uncompress(
            file, str(tmp_path / "out")
        )
    assert content(tmp_path / "out") == content(model)


def test_packing_is_reproducible(tmp_path):
    model = make_model(tmp_path / "model")
    first = archive.pack(model, tmp_path / "first")
    copy = tmp_path / "copy"
    copy.mkdir()
    # Made in another order, by another user, at another time.
    for name in sorted(content(model), reverse=True):
        if (model / name).is_file():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(model / name, copy / name)
            (copy / name).chmod(0o600)
            os.utime(copy / name, (1, 2))
    (copy / "assets" / "empty").mkdir(mode=0o700)
    (copy / "assets.extra").mkdir(mode=0o700)
    assert archive.pack(copy, tmp_path / "elsewhere.tar.gz") == first


@pytest.mark.parametrize("kind", ["link", "folder link", "fifo", "hidden"])
def test_what_is_not_packed(tmp_path, kind):
    model = make_model(tmp_path / "model")
    path = model / "assets" / "strange"
    if kind == "link":
        path.symlink_to(model / "saved_model.pb")
    elif kind == "folder link":
        path.symlink_to(model / "variables")
    elif kind == "fifo":
        os.mkfifo(path)
    else:
        path = model / "assets" / ".strange"
        path.mkdir()
    with pytest.raises(errors.ArchiveError, match="strange"):
        archive.pack(model, tmp_path / "model.tar.gz")
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_what_cannot_be_packed(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(errors.ArchiveError, match="empty"):
        archive.pack(tmp_path / "empty", tmp_path / "out")
    with pytest.raises(FileNotFoundError):
        archive.pack(tmp_path / "none", tmp_path / "out")
    with open(os.path.join(os.fsencode(tmp_path), b"empty", b"\xff"), "w"):
        pass
    with pytest.raises(errors.ArchiveError, match="UTF-8"):
        archive.pack(tmp_path / "empty", tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["empty"]


@pytest.mark.parametrize("change", [-5, 5, None])
def test_a_file_that_changes_while_it_is_packed(tmp_path, monkeypatch, change):
    model = make_model(tmp_path / "model")
    path = model / "variables" / "variables.index"
    members = archive._members

    def changed(directory, parent):
        yield from members(directory, parent)
        if parent.parts:
            return
        if change is None:
            path.unlink()
            path.symlink_to("/etc/passwd")
        else:
            path.write_bytes(bytes(5 + change))

    monkeypatch.setattr(archive, "_members", changed)
    with pytest.raises((errors.ArchiveError, OSError)) as caught:
        archive.pack(model, tmp_path / "out")
    assert str(path) in str(caught.value)
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_packing_takes_little_memory(tmp_path):
    model = make_model(tmp_path / "model")
    with open(model / "assets.extra" / "large", "wb") as file:
        file.truncate(200 * 2**20)
    tracemalloc.start()
    try:
        archive.pack(model, tmp_path / "model.tar.gz")
        assert tracemalloc.get_traced_memory()[1] < 16 * 2**20
    finally:
        tracemalloc.stop()
