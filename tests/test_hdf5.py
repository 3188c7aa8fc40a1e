"""HDF5 as a container: what is read, and what is never followed."""

import ctypes
import io
import os
import random
import sys
import tracemalloc

import h5py
import ml_dtypes
import numpy as np
import pytest

from bit_tf import errors
from bit_tf.checkpoints import hdf5

VALUES = np.arange(12, dtype=np.float32).reshape(3, 4)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "weights.h5"


def make(path, fill):
    with h5py.File(path, "w") as file:
        fill(file)
    return path


def refused(path, *words):
    """datasets() refuses the file, with these words in the message."""
    with pytest.raises(errors.CheckpointFormatError) as caught:
        hdf5.datasets(path)
    for word in (str(path), *words):
        assert word in str(caught.value)
    return str(caught.value)


class Watch:
    """Tells whether anything opened a file, by the kernel's own word."""

    OPENED = 0x20

    def __init__(self, path):
        if not sys.platform.startswith("linux"):
            pytest.skip("inotify tells who opens a file: run on Linux")
        libc = ctypes.CDLL(None, use_errno=True)
        self.descriptor = libc.inotify_init1(os.O_NONBLOCK)
        added = libc.inotify_add_watch(
            self.descriptor, os.fsencode(path), self.OPENED
        )
        if self.descriptor < 0 or added < 0:
            pytest.skip("inotify gives no watch: raise max_user_instances")

    def opened(self):
        try:
            return bool(os.read(self.descriptor, 4096))
        except BlockingIOError:
            return False


def opener(path):
    return lambda: io.FileIO(path)


def test_arrays_are_read_as_stored(path):
    stored = {
        "a/deep/er": VALUES,
        "a/f2": VALUES.astype("<f2"),
        "a/f8": VALUES.astype(">f8"),
        "b/i1": VALUES.astype("i1"),
        "b/u2": VALUES.astype(">u2"),
        "b/true": VALUES > 3,
        "c/scalar": np.array(7.5, "f4"),
        "c/none": np.zeros((0, 3), "f4"),
        "kernel:0": VALUES.T.copy(),
    }

    def fill(file):
        for name, array in stored.items():
            file.create_dataset(name, data=array)

    make(path, fill)
    for source in (path, str(path), opener(path)):
        found = hdf5.datasets(source)
        assert list(found) == sorted(stored)
        for name, entry in found.items():
            array = entry.load()
            assert (entry.source, entry.shape) == (name, stored[name].shape)
            assert entry.dtype == array.dtype == stored[name].dtype
            np.testing.assert_array_equal(array, stored[name], strict=True)
            assert array is not entry.load()


def test_a_file_object_needs_no_file(path):
    make(path, lambda file: file.create_dataset("x", data=VALUES))
    data = path.read_bytes()
    path.unlink()
    found = hdf5.datasets(lambda: io.BytesIO(data))
    np.testing.assert_array_equal(found["x"].load(), VALUES, strict=True)
    with pytest.raises(errors.CheckpointFormatError, match="truncated"):
        hdf5.datasets(lambda: io.BytesIO(data[:-200]))


@pytest.mark.parametrize(
    "options",
    [
        {"chunks": (2, 3)},
        {"compression": "gzip"},
        {"compression": 9, "shuffle": True, "fletcher32": True},
        {"chunks": (3, 4), "maxshape": (None, None)},
    ],
)
def test_chunks_and_compression(path, options, rng):
    array = rng.normal(size=(70, 40)).astype("f4")

    def fill(file):
        file.create_dataset("x", data=array, **options)
        file.create_dataset("zeros", data=np.zeros((50, 50)), **options)

    found = hdf5.datasets(make(path, fill))
    np.testing.assert_array_equal(found["x"].load(), array, strict=True)
    assert not found["zeros"].load().any()


def test_bfloat16_as_keras_marks_it(path):
    array = np.array([1, -2.5, 3e38], ml_dtypes.bfloat16)

    def fill(file):
        file.create_dataset("x", data=array).attrs["dtype"] = "bfloat16"

    entry = hdf5.datasets(make(path, fill))["x"]
    assert entry.dtype == entry.load().dtype == np.dtype(ml_dtypes.bfloat16)
    assert entry.load().tobytes() == array.tobytes()
    make(path, lambda file: file.create_dataset("x", data=array))
    refused(path, "x", "|V2")


class Counted(io.FileIO):
    count = 0

    def readinto(self, buffer):
        size = super().readinto(buffer)
        Counted.count += size
        return size


def test_a_load_reads_one_array(path):
    size = 1 << 20

    def fill(file):
        for index in range(12):
            file.create_dataset(
                f"x{index}", data=np.full(size // 4, index, "f4")
            )

    make(path, fill)
    Counted.count = 0
    found = hdf5.datasets(lambda: Counted(path))
    assert Counted.count < size // 4
    Counted.count = 0
    tracemalloc.start()
    array = found["x7"].load()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (array == 7).all()
    assert size <= Counted.count < 1.25 * size
    assert peak < 2.5 * size


def test_lists_of_names(path):
    names = ("a/gamma:0", "größe")

    def fill(file):
        file.attrs["names"] = list(names)
        for kind in ("fixed", "empty", "other"):
            file.create_group(f"in/{kind}")
        file["in/fixed"].attrs["names"] = np.array(
            [name.encode() for name in names]
        )
        file["in/empty"].attrs["names"] = []
        file.create_dataset("in/data", data=VALUES).attrs["names"] = ["no"]

    assert hdf5.texts(make(path, fill), "names") == {
        "": names,
        "in/empty": (),
        "in/fixed": names,
    }
    assert hdf5.texts(path, "other") == {}


@pytest.mark.parametrize(
    "value",
    [
        7,
        [1.5, 2.5],
        "one name",
        [["a"], ["b"]],
        np.array([b"\xff\xfe"]),
        h5py.Empty("f4"),
    ],
    ids=str,
)
def test_what_is_no_list_of_names(path, value):
    def fill(file):
        file.create_group("layer").attrs["names"] = value

    make(path, fill)
    with pytest.raises(errors.CheckpointFormatError):
        hdf5.texts(path, "names")


def test_references_in_a_list_of_names(path):
    def fill(file):
        file.create_group("layer")
        file.attrs.create(
            "names", np.array([file["layer"].ref]), dtype=h5py.ref_dtype
        )

    make(path, fill)
    with pytest.raises(errors.CheckpointFormatError, match="@names"):
        hdf5.texts(path, "names")


def test_an_external_link_is_not_followed(path, tmp_path):
    other = make(
        tmp_path / "secret.h5",
        lambda file: file.create_dataset("x", data=VALUES),
    )

    def fill(file):
        file["layer/x"] = h5py.ExternalLink(str(other), "/x")

    make(path, fill)
    watch = Watch(other)
    refused(path, "layer/x", "external link", "secret.h5")
    with pytest.raises(errors.CheckpointFormatError):
        hdf5.texts(path, "names")
    assert hdf5.can_open(path)
    assert not watch.opened()
    with h5py.File(path) as file:
        assert file["layer/x"].shape == VALUES.shape
    assert watch.opened()


def test_external_storage_is_not_read(path, tmp_path):
    other = tmp_path / "secret.bin"
    other.write_bytes(VALUES.tobytes())

    def fill(file):
        file.create_dataset(
            "layer/x", VALUES.shape, "f4", external=[(str(other), 0, 48)]
        )

    make(path, fill)
    watch = Watch(other)
    refused(path, "layer/x", "external storage")
    assert not watch.opened()
    with h5py.File(path) as file:
        assert (file["layer/x"][()] == VALUES).all()
    assert watch.opened()


@pytest.mark.parametrize("limit", [3, None])
def test_a_virtual_dataset_is_not_read(path, tmp_path, limit):
    other = make(
        tmp_path / "secret.h5",
        lambda file: file.create_dataset(
            "x", data=VALUES, chunks=(3, 4), maxshape=(None, 4)
        ),
    )

    def fill(file):
        here = h5py.VirtualLayout((3, 4), "f4", maxshape=(limit, 4))
        there = h5py.VirtualSource(
            str(other), "x", shape=(3, 4), maxshape=(limit, 4)
        )
        unlimited = slice(0, h5py.h5s.UNLIMITED if limit is None else 3)
        here[unlimited] = there[unlimited]
        file.create_virtual_dataset("layer/x", here)

    make(path, fill)
    watch = Watch(other)
    refused(path, "layer/x", "virtual dataset")
    assert not watch.opened()
    with h5py.File(path) as file:
        assert (file["layer/x"][()] == VALUES).all()
    assert watch.opened()


@pytest.mark.parametrize("target", ["/a/x", "/nowhere", "/a/y", "/"])
def test_soft_links_are_not_followed(path, target):
    def fill(file):
        file["a/x"] = VALUES
        file["a/y"] = h5py.SoftLink(target)

    make(path, fill)
    refused(path, "a/y", "soft link")


def test_an_object_has_one_name(path):
    def cycle(file):
        file.create_group("a/b")
        file["a/b/again"] = file["a"]

    def root(file):
        file["again"] = file["/"]

    def twice(file):
        file["x"] = VALUES
        file["y"] = file["x"]

    for fill, name in ((cycle, "a/b/again"), (root, "again"), (twice, "y")):
        make(path, fill)
        refused(path, name, "second name")


def test_depth_is_bounded(path):
    make(path, lambda file: file.create_group("/".join("a" * 100)))
    refused(path, "a/a/a", "deep")


def typed(dtype, data=None):
    def fill(file):
        file.create_dataset("layer/x", (2,), dtype, data=data)

    return fill


@pytest.mark.parametrize(
    "fill",
    [
        typed(h5py.vlen_dtype("f4")),
        typed(h5py.string_dtype(), ["a", "b"]),
        typed("S8", [b"a", b"b"]),
        typed(h5py.ref_dtype),
        typed(h5py.regionref_dtype),
        typed([("a", "f4"), ("b", "i4")]),
        typed("c8"),
        typed(np.dtype(("f4", (3,)))),
        typed("V7"),
        lambda file: file.create_dataset("layer/x", data=h5py.Empty("f4")),
        lambda file: file.__setitem__("layer/x", np.dtype("f4")),
    ],
)
def test_types_that_are_no_arrays_of_numbers(path, fill):
    make(path, fill)
    refused(path, "layer/x")


def test_a_pickle_in_a_file_is_only_bytes(path, tmp_path):
    victim = tmp_path / "victim"
    attack = b"cos\nsystem\n(S'touch " + os.fsencode(victim) + b"'\ntR."

    def fill(file):
        file.create_dataset("layer/x", data=np.void(attack))

    refused(make(path, fill), "layer/x", "dtype")
    assert not victim.exists()


def test_huge_shapes_are_refused_before_any_memory(path):
    def unwritten(file):
        file.create_dataset("layer/x", (1 << 40,), "f4")

    def chunked(file):
        file.create_dataset("layer/x", (1 << 40,), "f4", chunks=(1 << 20,))

    def partly(file):
        x = file.create_dataset("layer/x", (4, 10), "f4", chunks=(1, 10))
        x[:3] = 1

    def bomb(file):
        x = file.create_dataset(
            "layer/x", (10**7,), "f4", chunks=(10**7,), compression="gzip"
        )
        x.id.write_direct_chunk((0,), b"x" * 99)

    def swollen(file):
        x = file.create_dataset(
            "layer/x", (4,), "f4", chunks=(4,), compression="gzip"
        )
        x.id.write_direct_chunk((0,), bytes(4000))

    def oversized(file):
        # A megabyte stored, a gigabyte to inflate, for 16 bytes.
        x = file.create_dataset(
            "layer/x",
            (4,),
            "f4",
            maxshape=(None,),
            chunks=(2**28,),
            compression="gzip",
        )
        x.id.write_direct_chunk((0,), bytes(2**21))

    for fill in (unwritten, chunked, partly, bomb, swollen, oversized):
        make(path, fill)
        tracemalloc.start()
        refused(path, "layer/x")
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 10**6


def test_a_shape_that_was_changed(path):
    odd = np.zeros((1237, 3), "f4")
    make(path, lambda file: file.create_dataset("layer/x", data=odd))
    data = path.read_bytes()
    old = (1237).to_bytes(8, "little")
    assert data.count(old) in (1, 2)
    for new in (1236, 1238, 2**20, 2**45):
        path.write_bytes(data.replace(old, new.to_bytes(8, "little")))
        refused(path, "layer/x")


def test_filters_that_might_be_plugins(path):
    def unknown(file):
        plan = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        plan.set_chunk((12,))
        plan.set_filter(307, h5py.h5z.FLAG_OPTIONAL, (9,))
        made = h5py.h5d.create(
            file.id,
            b"x",
            h5py.h5t.IEEE_F32LE,
            h5py.h5s.create_simple((12,)),
            plan,
        )
        made.write_direct_chunk((0,), bytes(48))

    def twice(file):
        plan = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        plan.set_chunk((12,))
        plan.set_deflate(9)
        plan.set_deflate(9)
        space = h5py.h5s.create_simple((12,))
        made = h5py.h5d.create(file.id, b"x", h5py.h5t.IEEE_F32LE, space, plan)
        made.write(h5py.h5s.ALL, h5py.h5s.ALL, np.zeros(12, "f4"))

    def lzf(file):
        file.create_dataset("x", data=VALUES, compression="lzf")

    for fill, name in ((unknown, "307"), (twice, "[1, 1]"), (lzf, "32000")):
        make(path, fill)
        refused(path, "x", "filters", name)


def test_damaged_data_name_the_array(path, rng):
    array = rng.normal(size=5000).astype("f4")

    def fill(file):
        file.create_dataset("good", data=array)
        file.create_dataset("bad/zip", data=array, compression="gzip")
        file.create_dataset("bad/sum", data=array, fletcher32=True)

    make(path, fill)
    with h5py.File(path) as file:
        places = [
            file[f"bad/{name}"].id.get_chunk_info(0).byte_offset
            for name in ("zip", "sum")
        ]
    data = bytearray(path.read_bytes())
    for place in places:
        data[place + 500 : place + 520] = bytes(20)
    path.write_bytes(data)
    found = hdf5.datasets(path)
    np.testing.assert_array_equal(found["good"].load(), array)
    for name in ("bad/zip", "bad/sum"):
        with pytest.raises(errors.CheckpointFormatError, match=name):
            found[name].load()


def test_a_file_that_changes_after_it_was_opened(path):
    make(path, lambda file: file.create_dataset("x", data=VALUES))
    entry = hdf5.datasets(path)["x"]
    make(path, lambda file: file.create_dataset("x", data=VALUES.T))
    with pytest.raises(errors.CheckpointFormatError, match="x is not what"):
        entry.load()
    make(path, lambda file: file.create_dataset("y", data=VALUES))
    with pytest.raises(errors.CheckpointFormatError):
        entry.load()
    path.unlink()
    with pytest.raises(FileNotFoundError):
        entry.load()


def test_truncated_and_garbage(path, tmp_path, rng):
    make(path, lambda file: file.create_dataset("layer/x", data=VALUES))
    data = path.read_bytes()
    for cut in [*range(0, len(data), len(data) // 40), len(data) - 1]:
        path.write_bytes(data[:cut])
        assert not hdf5.can_open(path)
        refused(path)
    path.write_bytes(rng.bytes(4000))
    assert not hdf5.is_hdf5(path)
    refused(path, "unknown bytes")
    path.write_bytes(b"<!DOCTYPE html>")
    refused(path, "a web page")
    path.write_bytes(data[:8] + rng.bytes(4000))
    assert hdf5.is_hdf5(path)
    assert not hdf5.can_open(path)
    refused(path, "damaged")
    for other in (tmp_path, tmp_path / "missing", "nul\0"):
        assert not hdf5.is_hdf5(other)
        assert not hdf5.can_open(other)
    with pytest.raises(errors.CheckpointFormatError, match="directory"):
        hdf5.datasets(tmp_path)
    with pytest.raises(FileNotFoundError):
        hdf5.datasets(tmp_path / "missing")


def test_flipped_bytes_raise_only_our_errors(path):
    def fill(file):
        for name in ("a/x", "a/y", "b"):
            file.create_dataset(name, data=VALUES)
        file["a"].attrs["names"] = ["x", "y"]

    make(path, fill)
    data = path.read_bytes()
    chance = random.Random(0)
    refusals = 0
    for _ in range(120):
        changed = bytearray(data)
        place = chance.randrange(len(data))
        changed[place] ^= chance.randrange(1, 256)
        path.write_bytes(changed)
        hdf5.can_open(path, "names")
        try:
            hdf5.texts(path, "names")
            for entry in hdf5.datasets(path).values():
                entry.load()
        except errors.CheckpointFormatError:
            refusals += 1
    assert refusals
