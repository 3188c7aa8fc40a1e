"""Google's .npz: round trips, sizes to the byte, laziness, atomicity."""

import errno
import hashlib
import os
import tracemalloc
import zipfile
from collections.abc import Mapping

import helpers
import numpy as np
import pytest

from bit_tf import checkpoints, errors, files
from bit_tf.checkpoints import checkpoint, facts, google_npz, layout

TINY = (1, 1, 1, 1)
GAMMA = "block2/unit01/b/group_norm/gamma"
KERNEL = "block4/unit01/b/standardized_conv2d/kernel"
R50, R101, R152 = (3, 4, 6, 3), (3, 4, 23, 3), (3, 8, 36, 3)
SIZES = [
    (R50, 1, 102_242_668),
    (R50, 3, 869_321_580),
    (R101, 1, 178_256_468),
    (R101, 3, 1_551_830_100),
    (R152, 2, 945_476_668),
    (R152, 4, 3_746_270_104),
]


class Lazy(Mapping):
    """Arrays made when asked for; counts them and may fail at one."""

    def __init__(self, shapes, fail_at=None):
        self.shapes = shapes
        self.made = []
        self.fail_at = fail_at

    def __getitem__(self, name):
        self.made.append(name)
        if name == self.fail_at:
            raise RuntimeError("no such variable")
        return np.full(self.shapes[name], 0.5, np.float32)

    def __iter__(self):
        return iter(self.shapes)

    def __len__(self):
        return len(self.shapes)


@pytest.fixture(scope="module")
def arrays():
    return helpers.random_arrays(TINY, 32, 10)


@pytest.fixture(scope="module")
def path(arrays, tmp_path_factory):
    path = tmp_path_factory.mktemp("npz") / "tiny.npz"
    google_npz.write(arrays, path)
    return path


def same(read, arrays):
    assert list(read) == sorted(arrays)
    for name, array in read.items():
        assert array.dtype == np.float32
        assert array.dtype.isnative
        assert array.flags.c_contiguous
        assert array.flags.writeable
        np.testing.assert_array_equal(
            array, np.asarray(arrays[name], np.float32), strict=True
        )
    return True


@pytest.mark.parametrize("num_classes", [0, 1, 10])
def test_round_trip_is_bit_identical(tmp_path, num_classes):
    arrays = helpers.random_arrays((1, 2, 1, 3), 32, num_classes)
    arrays[GAMMA][:3] = [-0.0, 1e-45, 3.4e38]
    google_npz.write(arrays, tmp_path / "a.npz")
    read = google_npz.read(tmp_path / "a.npz")
    for name, array in read.items():
        assert array.tobytes() == arrays[name].tobytes()
    assert len(read) == len(arrays)


def test_attributes(path):
    read = checkpoints.read(str(path))
    assert (read.blocks, read.stem_width, read.num_classes) == (TINY, 32, 10)
    assert (read.format, read.facts.numerics, read.extra) == (
        "google_npz",
        "google",
        (),
    )
    assert read.path == path
    assert read.shapes == layout.expected_shapes(TINY, 32, 10)
    assert list(read.shapes) == list(read)
    assert set(read.dtypes.values()) == {np.dtype("float32")}
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert read.sha256() == read.sha256() == digest
    assert "tiny.npz" in repr(read)
    assert read == read
    assert read != checkpoints.read(path)
    with pytest.raises(KeyError):
        read["head"]


def test_two_writes_give_the_same_bytes(arrays, path, tmp_path, monkeypatch):
    shuffled = dict(reversed(arrays.items()))
    monkeypatch.setenv("TZ", "Asia/Tokyo")
    checkpoints.write(shuffled, tmp_path / "again.NPZ")
    assert (tmp_path / "again.NPZ").read_bytes() == path.read_bytes()
    checkpoints.write(checkpoints.read(path), tmp_path / "copy.npz")
    assert (tmp_path / "copy.npz").read_bytes() == path.read_bytes()


def test_a_checkpoint_may_be_written_onto_itself(path, tmp_path):
    copy = tmp_path / "a.npz"
    copy.write_bytes(path.read_bytes())
    checkpoints.write(checkpoints.read(copy), copy)
    assert copy.read_bytes() == path.read_bytes()


def test_the_published_layout(arrays, path):
    with zipfile.ZipFile(path) as archive:
        infos = archive.infolist()
        assert archive.testzip() is None
    names = [info.filename for info in infos]
    assert names == sorted(f"resnet/{name}.npy" for name in arrays)
    for info in infos:
        assert info.compress_type == zipfile.ZIP_STORED
        assert info.date_time == (1980, 1, 1, 0, 0, 0)
        assert info.extra == b""
        assert info.flag_bits == 0
    data = path.read_bytes()
    assert b"\x93NUMPY\x01\x00" in data
    for info in infos:
        local = data[info.header_offset : info.header_offset + 30]
        assert local[28:30] == b"\0\0"


def test_numpy_reads_it(arrays, path):
    with np.load(path, allow_pickle=False) as read:
        assert len(read.files) == len(arrays)
        for name, array in arrays.items():
            stored = read[f"resnet/{name}"]
            if name == "head/conv2d/kernel":
                assert stored.shape == (1, 1, 1024, 10)
            assert stored.dtype.str == "<f4"
            np.testing.assert_array_equal(stored.reshape(array.shape), array)


@pytest.mark.parametrize(("blocks", "width", "size"), SIZES)
def test_published_sizes(blocks, width, size):
    shapes = layout.expected_shapes(blocks, 64 * width, 1000)
    assert google_npz.file_size(shapes) == size


@pytest.mark.parametrize(
    ("blocks", "stem_width", "num_classes"),
    [(TINY, 32, 0), (TINY, 32, 10), ((2, 1, 3, 1), 64, 123)],
)
def test_computed_size_is_the_file_size(
    tmp_path, blocks, stem_width, num_classes
):
    shapes = layout.expected_shapes(blocks, stem_width, num_classes)
    google_npz.write(Lazy(shapes), tmp_path / "a.npz")
    size = (tmp_path / "a.npz").stat().st_size
    assert google_npz.file_size(shapes) == size


@pytest.mark.parametrize(
    "limit", [200, 5_000, 300_000, 1_000_000, 2_400_000, 4_000_000]
)
def test_sizes_with_zip64(tmp_path, monkeypatch, arrays, limit):
    monkeypatch.setattr(zipfile, "ZIP64_LIMIT", limit)
    google_npz.write(arrays, tmp_path / "a.npz")
    assert same(google_npz.read(tmp_path / "a.npz"), arrays)


def test_r50x1_with_1000_classes_to_the_byte(tmp_path):
    shapes = layout.expected_shapes(R50, 64, 1000)
    source = Lazy(shapes)
    tracemalloc.start()
    try:
        checkpoints.write(source, tmp_path / "BiT-S-R50x1.npz")
        read = checkpoints.read(tmp_path / "BiT-S-R50x1.npz")
        written = tracemalloc.get_traced_memory()[1]
        for name in read:
            assert read[name].shape == shapes[name]
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert (tmp_path / "BiT-S-R50x1.npz").stat().st_size == 102_242_668
    assert source.made == list(shapes)
    assert len(read) == 153
    largest = 4 * 3 * 3 * 512 * 512
    assert written < 2.5 * largest
    assert peak < 3.5 * largest


def test_opening_reads_no_data(path):
    checkpoints.read(path)
    tracemalloc.start()
    try:
        read = checkpoints.read(path)
        opened = tracemalloc.get_traced_memory()[1]
        shape = read["head/conv2d/bias"].shape
        small = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert shape == (10,)
    assert opened < 400_000
    assert small < 400_000
    assert path.stat().st_size > 4_000_000


def test_each_access_reads_anew(path):
    read = checkpoints.read(path)
    first = read[GAMMA]
    first[:] = 0
    assert read[GAMMA].all()
    assert GAMMA in read
    assert "nothing" not in read


@pytest.mark.parametrize("existing", [b"old", None])
@pytest.mark.parametrize("name", ["block1/unit01/a/group_norm/beta", KERNEL])
def test_a_mapping_that_fails_leaves_nothing(tmp_path, existing, name):
    target = tmp_path / "a.npz"
    if existing:
        target.write_bytes(existing)
    shapes = layout.expected_shapes(TINY, 32, 10)
    with pytest.raises(RuntimeError, match="no such variable"):
        google_npz.write(Lazy(shapes, fail_at=name), target)
    assert os.listdir(tmp_path) == (["a.npz"] if existing else [])
    assert not existing or target.read_bytes() == existing


@pytest.mark.parametrize("room", [0, 10, 100, 1_000_000, 4_400_000, 10**9])
def test_a_full_disk_leaves_the_old_file(tmp_path, monkeypatch, arrays, room):
    target = tmp_path / "a.npz"
    target.write_bytes(b"old")
    real = open
    used = 0

    def full_disk(path, mode="r", **kwargs):
        file = real(path, mode, buffering=0, **kwargs)
        if "x" not in mode:
            return file

        class Full:
            def write(self, data):
                nonlocal used
                used += memoryview(data).nbytes
                if used > room:
                    raise OSError(errno.ENOSPC, "No space left on device")
                return file.write(data)

            def __getattr__(self, name):
                return getattr(file, name)

            def __enter__(self):
                return self

            def __exit__(self, *raised):
                file.close()

        return Full()

    monkeypatch.setattr(files, "open", full_disk, raising=False)
    if room < 10**9:
        with pytest.raises(OSError, match="No space left") as raised:
            google_npz.write(arrays, target)
        assert raised.value.errno == errno.ENOSPC
        assert target.read_bytes() == b"old"
    else:
        google_npz.write(arrays, target)
        assert same(google_npz.read(target), arrays)
    assert os.listdir(tmp_path) == ["a.npz"]


@pytest.mark.parametrize("function", ["fsync", "replace"])
def test_a_failure_at_the_end(tmp_path, monkeypatch, arrays, function):
    def fail(*args):
        raise OSError(errno.EIO, "Input/output error")

    (tmp_path / "a.npz").write_bytes(b"old")
    monkeypatch.setattr(files.os, function, fail)
    with pytest.raises(OSError, match="Input/output"):
        google_npz.write(arrays, tmp_path / "a.npz")
    assert (tmp_path / "a.npz").read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a.npz"]


def test_what_is_written_is_read_back(tmp_path, monkeypatch, arrays):
    monkeypatch.setattr(google_npz, "file_size", lambda shapes: 1)
    with pytest.raises(errors.CheckpointFormatError, match="read back"):
        google_npz.write(arrays, tmp_path / "a.npz")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_not_written(tmp_path, arrays, value):
    bad = dict(arrays)
    bad[KERNEL] = bad[KERNEL].copy()
    bad[KERNEL][2, 2, 255, 255] = value
    with pytest.raises(errors.CheckpointFormatError, match=KERNEL):
        google_npz.write(bad, tmp_path / "a.npz")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("dtype", [int, object, str, complex, bool])
def test_other_dtypes_are_not_written(tmp_path, arrays, dtype):
    bad = arrays | {GAMMA: arrays[GAMMA].real.astype(dtype)}
    with pytest.raises(errors.CheckpointFormatError, match=GAMMA):
        google_npz.write(bad, tmp_path / "a.npz")
    assert os.listdir(tmp_path) == []


def test_other_names_and_shapes_are_not_written(tmp_path, arrays):
    without = {n: a for n, a in arrays.items() if n != GAMMA}
    reshaped = arrays | {KERNEL: arrays[KERNEL].transpose(3, 2, 0, 1)}
    extra = arrays | {"step": np.float32(1)}
    for bad, name in ((without, GAMMA), (reshaped, "OIHW"), (extra, "step")):
        with pytest.raises(errors.CheckpointMismatchError, match=name):
            google_npz.write(bad, tmp_path / "a.npz")
    with pytest.raises(errors.CheckpointMismatchError):
        google_npz.write({}, tmp_path / "a.npz")
    assert os.listdir(tmp_path) == []


def test_shapes_that_were_promised_are_kept(tmp_path):
    shapes = layout.expected_shapes(TINY, 32, 10)
    source = Lazy(dict(shapes))
    broken = dict(shapes) | {GAMMA: (65,)}
    source.shapes, promised = broken, shapes

    class Promise(Lazy):
        def __getitem__(self, name):
            return source[name]

    with pytest.raises(errors.CheckpointMismatchError, match=GAMMA):
        google_npz.write(Promise(promised), tmp_path / "a.npz")
    assert os.listdir(tmp_path) == []


def test_targets_that_cannot_be(tmp_path, arrays):
    with pytest.raises(IsADirectoryError):
        google_npz.write(arrays, tmp_path)
    with pytest.raises(FileNotFoundError, match="not a directory"):
        google_npz.write(arrays, tmp_path / "none" / "a.npz")
    with pytest.raises(errors.CheckpointFormatError, match=r"\.npz"):
        checkpoints.write(arrays, tmp_path / "a.ckpt")
    with pytest.raises(errors.CheckpointFormatError, match="ckpt"):
        checkpoints.write(arrays, tmp_path / "a.npz", format="ckpt")
    assert os.listdir(tmp_path) == []


@pytest.mark.skipif(os.name != "posix", reason="POSIX permissions")
def test_the_file_has_the_usual_permissions(tmp_path, arrays):
    google_npz.write(arrays, tmp_path / "a.npz")
    (tmp_path / "usual").touch()
    usual = (tmp_path / "usual").stat().st_mode
    assert (tmp_path / "a.npz").stat().st_mode == usual


def stored(arrays):
    """Keys and shapes as Google's files have them."""
    result = {f"resnet/{name}": array for name, array in arrays.items()}
    head = "resnet/head/conv2d/kernel"
    result[head] = result[head][None, None]
    return result


def numbered(arrays):
    names = enumerate(arrays)
    old, new = "/standardized_conv2d/", "/standardized_conv2d_{}/"
    return {
        f"resnet/{name.replace(old, new.format(i))}": arrays[name]
        for i, name in names
    }


VARIANTS = {
    "savez": (np.savez, stored),
    "compressed": (np.savez_compressed, stored),
    "canonical names": (np.savez, dict),
    "squeezed head": (
        np.savez,
        lambda a: {f"resnet/{n}": v for n, v in a.items()},
    ),
    "numbered": (np.savez, numbered),
    "Fortran order": (
        np.savez,
        lambda a: {n: np.asfortranarray(v) for n, v in stored(a).items()},
    ),
    "compressed Fortran order": (
        np.savez_compressed,
        lambda a: {n: np.asfortranarray(v) for n, v in stored(a).items()},
    ),
    "big endian": (
        np.savez,
        lambda a: {n: v.astype(">f4") for n, v in stored(a).items()},
    ),
    "big endian, Fortran order": (
        np.savez,
        lambda a: {
            n: np.asfortranarray(v.astype(">f8")) for n, v in stored(a).items()
        },
    ),
    "float64": (
        np.savez,
        lambda a: {n: v.astype(np.float64) for n, v in stored(a).items()},
    ),
}


@pytest.mark.parametrize("kind", VARIANTS)
def test_variants_that_are_read(tmp_path, arrays, kind):
    save, change = VARIANTS[kind]
    save(tmp_path / "a.npz", **change(arrays))
    read = checkpoints.read(tmp_path / "a.npz")
    assert same(read, arrays)
    assert read.extra == ()
    assert read.shapes == layout.expected_shapes(TINY, 32, 10)


def test_float16(tmp_path, arrays):
    half = {n: v.astype(np.float16) for n, v in arrays.items()}
    np.savez(tmp_path / "a.npz", **stored(half))
    read = checkpoints.read(tmp_path / "a.npz")
    assert read.dtypes[GAMMA] == np.float16
    assert same(read, half)


@pytest.mark.parametrize("version", [(1, 0), (2, 0), (3, 0)])
def test_versions_of_npy(tmp_path, arrays, version):
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        for name, array in stored(arrays).items():
            with archive.open(f"{name}.npy", "w") as member:
                header = f"{{'descr': '<f4', 'fortran_order': False, 'shape': \
({', '.join(f'{n}L' for n in array.shape)},)}}\n".encode()
                width = 2 if version[0] == 1 else 4
                member.write(b"\x93NUMPY" + bytes(version))
                member.write(len(header).to_bytes(width, "little") + header)
                member.write(array.tobytes())
    assert same(checkpoints.read(tmp_path / "a.npz"), arrays)


def test_extra_arrays_are_reported(tmp_path, arrays):
    keys = {
        "resnet/global_step": np.array(3),
        "resnet/head/conv2d/kernel/Momentum": np.zeros(3),
        "opt/objects": np.array([{}], dtype=object),
        "block1/unit01/a/group_norm/gamma": np.zeros(3),
    }
    np.savez(tmp_path / "a.npz", **stored(arrays), **keys)
    with zipfile.ZipFile(tmp_path / "a.npz", "a") as archive:
        archive.writestr("README.txt", "hello")
        archive.mkdir("empty")
        archive.writestr("../../evil.npy", b"evil")
        archive.writestr("/etc/evil.npy", b"evil")
    read = checkpoints.read(tmp_path / "a.npz")
    assert same(read, arrays)
    assert set(read.extra) == {
        *keys,
        "README.txt",
        "empty/",
        "../../evil",
        "/etc/evil",
    }
    assert list(read.extra) == sorted(read.extra)


def test_sniff(tmp_path, path):
    assert google_npz.sniff(path)
    np.savez(tmp_path / "any.npz", weights=np.zeros(3))
    assert google_npz.sniff(tmp_path / "any.npz")
    with zipfile.ZipFile(tmp_path / "torch.bin", "w") as archive:
        archive.writestr("archive/data.pkl", b"")
        archive.writestr("archive/data/0.npy", b"")
    assert not google_npz.sniff(tmp_path / "torch.bin")
    (tmp_path / "cut.npz").write_bytes(path.read_bytes()[:-100])
    (tmp_path / "zero").write_bytes(b"")
    (tmp_path / "zip").write_bytes(b"PK\x03\x04")
    for name in ("cut.npz", "zero", "zip", "missing", "."):
        assert not google_npz.sniff(tmp_path / name)


def test_unknown_files_say_what_was_tried(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("hello.txt", b"")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "hello.txt").write_bytes(b"hello")
    for name in ("a.npz", "folder", "folder/hello.txt"):
        with pytest.raises(errors.CheckpointFormatError) as raised:
            checkpoints.read(tmp_path / name)
        for reader in checkpoints._READERS:
            assert f"\n{reader.NAME}: not " in str(raised.value)


@pytest.mark.parametrize("read", [checkpoints.read, google_npz.read])
def test_missing_files(tmp_path, read):
    with pytest.raises(FileNotFoundError, match="existing file") as raised:
        read(tmp_path / "BiT-M-R50x1.npz")
    assert raised.value.filename.endswith("BiT-M-R50x1.npz")


def test_a_file_replaced_after_opening_is_noticed(tmp_path, arrays):
    google_npz.write(arrays, tmp_path / "a.npz")
    read = checkpoints.read(tmp_path / "a.npz")
    other = helpers.random_arrays(TINY, 32, 10, seed=1)
    google_npz.write(other, tmp_path / "a.npz")
    with pytest.raises(errors.CheckpointFormatError, match=GAMMA):
        read[GAMMA]


def test_other_readers_entries():
    shapes = layout.expected_shapes(TINY, 32, 0)
    entries = {
        name: (shape, np.dtype("f4"), lambda shape=shape: np.ones(shape, "f8"))
        for name, shape in shapes.items()
    }
    made = checkpoint.Checkpoint(
        "a.safetensors",
        entries,
        format="timm",
        facts=facts.Facts("timm"),
        extra=("x",),
    )
    assert (made.format, made.facts.numerics, made.extra) == (
        "timm",
        "timm",
        ("x",),
    )
    assert same(made, {n: np.ones(s, "f4") for n, s in shapes.items()})
    entries[GAMMA] = ((64,), np.dtype("f4"), lambda: np.ones(65))
    made = checkpoint.Checkpoint(
        "a.safetensors", entries, format="timm", facts=facts.Facts("timm")
    )
    with pytest.raises(errors.CheckpointFormatError, match=GAMMA):
        made[GAMMA]
    entries[GAMMA] = ((64,), np.dtype("i8"), lambda: np.ones(64, "i8"))
    entries[KERNEL] = (shapes[KERNEL], np.dtype("O"), lambda: None)
    with pytest.raises(errors.CheckpointFormatError) as raised:
        checkpoint.Checkpoint(
            "a.safetensors", entries, format="timm", facts=facts.Facts("timm")
        )
    assert GAMMA in str(raised.value)
    assert KERNEL in str(raised.value)


def test_exported_names():
    for module in (checkpoints, checkpoint, google_npz, layout):
        assert all(hasattr(module, name) for name in module.__all__)
