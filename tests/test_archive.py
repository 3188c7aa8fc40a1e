import io
import os
import tarfile

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
