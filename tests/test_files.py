import os
import stat

import pytest

from bit_tf import files


def test_a_file_appears_whole_or_not_at_all(tmp_path):
    path = tmp_path / "file"
    with files.new_file(path) as file:
        file.write(b"one")
        assert not path.exists()
    assert path.read_bytes() == b"one"

    class Stopped(Exception):
        pass

    def fail():
        with files.new_file(path) as file:
            file.write(b"two")
            raise Stopped

    with pytest.raises(Stopped):
        fail()
    assert path.read_bytes() == b"one"
    with files.new_file(path) as file:
        file.write(b"three")
    assert path.read_bytes() == b"three"
    assert os.listdir(tmp_path) == ["file"]
    assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~umask()


def umask():
    value = os.umask(0)
    os.umask(value)
    return value


def test_a_directory_appears_whole_or_not_at_all(tmp_path):
    path = tmp_path / "a" / "b"
    with files.new_directory(path) as staging:
        with open(os.path.join(staging, "file"), "w") as file:
            file.write("one")
        assert not path.exists()
    assert (path / "file").read_text() == "one"
    assert stat.S_IMODE(path.stat().st_mode) == 0o777 & ~umask()
    with (
        pytest.raises(OSError, match="not empty"),
        files.new_directory(path) as staging,
    ):
        pass
    assert (path / "file").read_text() == "one"
    with files.new_directory(path, overwrite=True):
        pass
    assert list(path.iterdir()) == []
    assert os.listdir(path.parent) == ["b"]


@pytest.mark.parametrize("kind", ["file", "link", "broken link"])
def test_overwriting_what_is_no_directory(tmp_path, kind):
    path, other = tmp_path / "path", tmp_path / "other"
    if kind == "file":
        path.write_text("old")
    else:
        other.mkdir()
        path.symlink_to(other)
        (other / "file").write_text("stays")
    if kind == "broken link":
        path.unlink()
        path.symlink_to(tmp_path / "nowhere")
    with files.new_directory(path, overwrite=True):
        pass
    assert path.is_dir()
    assert not path.is_symlink()
    if kind == "link":
        assert (other / "file").read_text() == "stays"
