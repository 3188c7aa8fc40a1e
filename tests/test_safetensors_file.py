"""Our .safetensors container, against bytes by hand and the library."""

import json
import struct
import tracemalloc

import numpy as np
import pytest

from bit_tf import errors
from bit_tf.checkpoints import safetensors_file

NEEDS = "needs safetensors: pip install 'bit-tf[oracle]'"
A = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
B = {"dtype": "F32", "shape": [1, 2], "data_offsets": [8, 16]}
DATA = struct.pack("<4f", 1, 2, 3, 4)


def packed(header, data=DATA):
    """A file by hand: the header's length, the header, the data."""
    if not isinstance(header, bytes):
        header = json.dumps(header).encode()
    return struct.pack("<Q", len(header)) + header + data


def place(tmp_path, raw, name="x.safetensors"):
    path = tmp_path / name
    path.write_bytes(raw)
    return path


def save(path, arrays, metadata):
    with open(path, "x+b") as file:
        safetensors_file.write(
            file,
            {name: array.shape for name, array in arrays.items()},
            arrays.__getitem__,
            metadata,
        )
    return path


def some_arrays():
    rng = np.random.default_rng(0)
    return {
        "z": rng.standard_normal((3, 4, 5)).astype(np.float32),
        "b.weight": rng.standard_normal((7,)).astype(np.float32),
        "B": np.float32([[-0.0, 1e-45], [3.4e38, np.nan]]),
        'ä\x01"\\\x7f/': rng.standard_normal(()).astype(np.float32),
        "empty": np.zeros((0, 3), np.float32),
        "transposed": rng.standard_normal((9, 8)).astype(np.float32).T,
    }


def test_bytes_by_hand(tmp_path):
    path = place(
        tmp_path,
        packed({"b": B, "a": A, "__metadata__": {"format": "pt"}}),
    )
    assert safetensors_file.sniff(path)
    opened = safetensors_file.tensors(path)
    assert opened.metadata == {"format": "pt"}
    assert opened.extra == opened.notes == ()
    assert set(opened.entries) == {"a", "b"}
    entry = opened.entries["b"]
    assert (entry.shape, entry.dtype, entry.source) == ((1, 2), "<f4", "b")
    array = entry.load()
    np.testing.assert_array_equal(array, np.float32([[3, 4]]), strict=True)
    assert array.flags.writeable
    array[:] = 0
    assert entry.load()[0, 0] == 3


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("F16", "<f2"),
        ("BF16", "bfloat16"),
        ("F64", "<f8"),
        ("I64", "<i8"),
        ("BOOL", "bool"),
        ("U8", "u1"),
        ("F8_E4M3", "float8_e4m3fn"),
        ("C64", "<c8"),
    ],
)
def test_dtypes(tmp_path, name, dtype):
    import ml_dtypes

    dtype = np.dtype(getattr(ml_dtypes, dtype, dtype))
    expected = np.array([0, 1, 1, 0]).astype(dtype)
    row = {
        "dtype": name,
        "shape": [4],
        "data_offsets": [0, expected.nbytes],
    }
    path = place(tmp_path, packed({"x": row}, expected.tobytes()))
    entry = safetensors_file.tensors(path).entries["x"]
    assert entry.dtype == dtype
    np.testing.assert_array_equal(entry.load(), expected, strict=True)


@pytest.mark.parametrize(
    "metadata", [{}, {"format": "pt"}, {"k": 'ü"\n'}], ids=str
)
def test_the_library_writes_the_same_bytes(tmp_path, metadata):
    numpy = pytest.importorskip("safetensors.numpy", reason=NEEDS)
    arrays = {
        name: np.ascontiguousarray(array)
        for name, array in some_arrays().items()
        if array.shape != (8, 9)
    }
    path = save(tmp_path / "ours", arrays, metadata)
    numpy.save_file(arrays, tmp_path / "theirs", metadata or None)
    assert path.read_bytes() == (tmp_path / "theirs").read_bytes()


def test_the_library_reads_what_is_written(tmp_path):
    numpy = pytest.importorskip("safetensors.numpy", reason=NEEDS)
    arrays = some_arrays()
    path = save(tmp_path / "ours", arrays, {"a": "b"})
    theirs = numpy.load_file(path)
    assert theirs.keys() == arrays.keys()
    for name, array in arrays.items():
        np.testing.assert_array_equal(theirs[name], array, strict=True)


def test_what_the_library_writes_is_read(tmp_path):
    numpy = pytest.importorskip("safetensors.numpy", reason=NEEDS)
    rng = np.random.default_rng(0)
    arrays = {
        f"{dtype}.{rank}": rng.integers(0, 2, (2, 3, 5)[:rank]).astype(dtype)
        for dtype in ("f2", "f4", "f8", "i1", "i8", "u4", "?")
        for rank in (0, 1, 3)
    }
    numpy.save_file(arrays, tmp_path / "x", {"a": "ü", "b": "c"})
    opened = safetensors_file.tensors(tmp_path / "x")
    assert opened.metadata == {"a": "ü", "b": "c"}
    assert opened.entries.keys() == arrays.keys()
    for name, array in arrays.items():
        np.testing.assert_array_equal(
            opened.entries[name].load(), array, strict=True
        )


def test_write_and_read(tmp_path):
    arrays = some_arrays()
    opened = safetensors_file.tensors(save(tmp_path / "x", arrays, {"a": "b"}))
    assert opened.metadata == {"a": "b"}
    assert opened.entries.keys() == arrays.keys()
    for name, array in arrays.items():
        np.testing.assert_array_equal(
            opened.entries[name].load(), array, strict=True
        )


def test_write_wants_the_promised_shape(tmp_path):
    with (
        open(tmp_path / "x", "x+b") as file,
        pytest.raises(
            errors.CheckpointMismatchError, match=r"kernel.*promised"
        ),
    ):
        safetensors_file.write(
            file, {"kernel": (2,)}, lambda name: np.zeros(3, np.float32), {}
        )


def changed(row=A, **fields):
    return {**row, **fields}


DAMAGED = {
    "hole": ({"a": A, "b": changed(B, data_offsets=[9, 17])}, "b: .*begin"),
    "overlap": ({"a": A, "b": changed(B, data_offsets=[4, 12])}, "b: .*begin"),
    "twice the same": ({"a": A, "b": changed(B, data_offsets=[0, 8])}, "b: "),
    "not to the end": ({"a": A}, "8 bytes are of no tensor"),
    "cut": (
        {"a": A, "b": changed(B, shape=[3, 2], data_offsets=[8, 32])},
        "b: .*after the file's end at 16",
    ),
    "smaller": ({"a": changed(shape=[1]), "b": B}, "a: F32 of shape"),
    "larger": ({"a": changed(shape=[2**40, 2**40]), "b": B}, "a: F32 of shape"),
    "huge": ({"a": changed(shape=[10**4000]), "b": B}, "a: no shape"),
    "overflow": ({"a": changed(shape=[2**62] * 32), "b": B}, "a: F32"),
    "rank": ({"a": changed(shape=[1] * 33), "b": B}, "a: no shape"),
    "negative": ({"a": changed(shape=[-2]), "b": B}, "a: no shape"),
    "two negatives": ({"a": changed(shape=[-1, -2]), "b": B}, "a: no shape"),
    "float size": ({"a": changed(shape=[2.0]), "b": B}, "a: no shape"),
    "bool size": ({"a": changed(shape=[True]), "b": B}, "a: no shape"),
    "shape is text": ({"a": changed(shape="2"), "b": B}, "a: no shape"),
    "no shape": ({"a": {"dtype": "F32"}, "b": B}, "a: no shape"),
    "backwards": ({"a": changed(data_offsets=[8, 0]), "b": B}, "a: no data_"),
    "bool offset": (
        {"a": changed(data_offsets=[False, 8]), "b": B},
        "a: no data_offsets",
    ),
    "one offset": ({"a": changed(data_offsets=[8]), "b": B}, "a: no data_"),
    "dtype": ({"a": changed(dtype="F31"), "b": B}, "a: unknown dtype 'F31'"),
    "dtype of no text": ({"a": changed(dtype=[]), "b": B}, "a: unknown dtype"),
    "half bytes": ({"a": changed(dtype="F4", shape=[3]), "b": B}, "a: F4"),
    "row": ({"a": [1], "b": B}, "a: no object"),
    "metadata": ({"a": A, "b": B, "__metadata__": {"a": 1}}, "text to text"),
    "metadata list": ({"a": A, "b": B, "__metadata__": []}, "text to text"),
    "list": (b"[1, 2]", "JSON object"),
    "two objects": (b'{"a": 1}{}', "JSON object.*Extra data"),
    "space before": (b' {"a": 1}', "JSON object"),
    "not UTF-8": (b'{"\xff": 1}', "JSON object.*utf-8"),
    "NaN": (b'{"a": NaN}', "NaN is not JSON"),
    "twice": (b'{"a": {}, "a": {}}', "'a' occurs twice"),
    "deep": (b'{"a":' + b"[" * 200_000, "nested too deeply"),
    "long number": (b'{"a": ' + b"1" * 5000 + b"}", "JSON object"),
    "control": ({"\x1b[31m": changed(shape=[3])}, r"'\\x1b\[31m': F32"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_damaged_and_hostile_headers_are_refused(tmp_path, case):
    header, message = DAMAGED[case]
    path = place(tmp_path, packed(header))
    tracemalloc.start()
    with pytest.raises(errors.CheckpointFormatError, match=message) as caught:
        safetensors_file.tensors(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert str(path) in str(caught.value)
    assert len(str(caught.value)) < 2000
    assert peak < 40 * 2**20


@pytest.mark.parametrize("length", [0, 1, 16, 2**27, 2**63, 2**64 - 1])
def test_wrong_lengths_are_refused(tmp_path, length):
    raw = struct.pack("<Q", length) + packed({"a": A, "b": B})[8:]
    path = place(tmp_path, raw)
    with pytest.raises(errors.CheckpointFormatError):
        safetensors_file.tensors(path)


def test_the_library_refuses_the_same_or_fewer(tmp_path):
    safetensors = pytest.importorskip("safetensors", reason=NEEDS)
    # It reads these, and says nothing of them.
    lenient = {"twice", "space before", "bool size"}
    for case, (header, _) in DAMAGED.items():
        path = place(tmp_path, packed(header), f"{len(case)}{case[:9]}")
        if case in lenient:
            continue
        with (
            pytest.raises(safetensors.SafetensorError),
            safetensors.safe_open(path, "numpy") as file,
        ):
            file.keys()


def test_many_problems_are_cut_short(tmp_path):
    header = {f"t{i}": changed(shape=[3]) for i in range(1000)}
    with pytest.raises(errors.CheckpointFormatError, match="and 950 more"):
        safetensors_file.tensors(place(tmp_path, packed(header)))


def test_garbage_is_not_sniffed(tmp_path):
    raw = packed({"a": A, "b": B})
    header = 8 + int.from_bytes(raw[:8], "little")
    for cut in range(header):
        assert not safetensors_file.sniff(place(tmp_path, raw[:cut]))
    for seed in range(50):
        random = np.random.default_rng(seed).bytes(100)
        assert not safetensors_file.sniff(place(tmp_path, random))
    assert not safetensors_file.sniff(tmp_path)
    assert not safetensors_file.sniff(tmp_path / "none")
    assert not safetensors_file.sniff("\0")


def test_every_truncation_is_an_error(tmp_path):
    raw = packed({"a": A, "b": B})
    for cut in range(len(raw)):
        path = place(tmp_path, raw[:cut])
        with pytest.raises(errors.CheckpointFormatError) as caught:
            safetensors_file.tensors(path)
        if cut >= len(raw) - len(DATA):
            assert "\nb: its data end" in str(caught.value)
            cut_too = cut < len(raw) - 8
            assert ("\na: its data end" in str(caught.value)) == cut_too


def test_a_file_that_changes_is_an_error_and_not_a_crash(tmp_path):
    raw = packed({"a": A, "b": B})
    path = place(tmp_path, raw)
    load = safetensors_file.tensors(path).entries["b"].load
    path.write_bytes(raw[:-1])
    with pytest.raises(errors.CheckpointFormatError, match="b cannot be read"):
        load()
    path.write_bytes(packed({"b": A, "a": B}))
    with pytest.raises(errors.CheckpointFormatError, match=r"b cannot.*opened"):
        load()
    path.write_bytes(raw)
    assert load()[0, 0] == 3


def test_one_tensor_needs_the_memory_of_one(tmp_path):
    arrays = {f"t{i}": np.full((500, 500), i, np.float32) for i in range(20)}
    path = save(tmp_path / "x", arrays, {})
    tracemalloc.start()
    array = safetensors_file.tensors(path).entries["t7"].load()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (array == 7).all()
    assert peak < 1.3 * array.nbytes


def test_writing_needs_the_memory_of_one(tmp_path):
    shapes = {f"t{i}": (1024, 1024) for i in range(10)}

    def make(name):
        return np.full((1024, 1024), int(name[1:]), np.float32).T

    tracemalloc.start()
    with open(tmp_path / "x", "x+b") as file:
        safetensors_file.write(file, shapes, make, {})
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1.6 * 2**22
    opened = safetensors_file.tensors(tmp_path / "x")
    assert (opened.entries["t3"].load() == 3).all()


def test_a_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError):
        safetensors_file.tensors(tmp_path / "none")
    with pytest.raises(FileNotFoundError):
        safetensors_file.sharded(tmp_path / "none.index.json")
    with pytest.raises(errors.CheckpointFormatError, match="a directory"):
        safetensors_file.tensors(tmp_path)


@pytest.fixture
def shards(tmp_path):
    """An index of two shards, written by hand: (its path, its weight_map)."""
    one = {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}
    place(tmp_path, packed({"a": A, "b": B}), "m-1-of-2.safetensors")
    place(tmp_path, packed({"c": one}), "m-2-of-2.safetensors")
    return tmp_path / "m.safetensors.index.json", {
        "a": "m-1-of-2.safetensors",
        "b": "m-1-of-2.safetensors",
        "c": "m-2-of-2.safetensors",
    }


def index(path, where, **more):
    path.write_text(json.dumps({"weight_map": where, **more}))
    return path


def test_shards(shards):
    path, where = shards
    index(path, where, metadata={"total_size": 32})
    opened = safetensors_file.sharded(path)
    assert opened.entries.keys() == {"a", "b", "c"}
    assert opened.entries["c"].load().tolist() == [1, 2, 3, 4]
    assert opened.entries["b"].load().tolist() == [[3, 4]]


def test_index_and_shards_must_agree(shards):
    path, where = shards
    first, second = where["a"], where["c"]
    for change, message in (
        ({**where, "d": first}, f"d is not in {first}"),
        ({"a": first, "c": second}, f"b is in {first}.*no file"),
        ({**where, "b": second}, f"b is in {first}; .*{second}"),
        ({**where, "d": "gone.safetensors"}, "Missing: gone.safetensors"),
        ({"a": first, "b": first}, None),
    ):
        index(path, change)
        if message is None:
            assert safetensors_file.sharded(path).entries.keys() == {"a", "b"}
            continue
        with pytest.raises(errors.CheckpointFormatError, match=message):
            safetensors_file.sharded(path)


@pytest.mark.parametrize(
    "name",
    [
        "../x.safetensors",
        "/etc/passwd",
        "a/b.safetensors",
        "a\\b.safetensors",
        "C:x",
        "..",
        ".",
        "",
        "a\0b",
        "a\nb",
        7,
        None,
    ],
)
def test_shards_lie_beside_their_index(shards, name):
    path, where = shards
    index(path, {**where, "stem": name})
    with pytest.raises(
        errors.CheckpointFormatError, match=r"stem in .*no plain"
    ):
        safetensors_file.sharded(path)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        '{"weight_map": []}',
        '{"weight_map": {}}',
        '{"weight_map": {"a": "x", "a": "y"}}',
        '{"weight_map": ' + "[" * 100_000,
        "\ufeff{}",
    ],
    ids=range(8),
)
def test_a_damaged_index(tmp_path, text):
    path = tmp_path / "m.index.json"
    path.write_text(text)
    with pytest.raises(errors.CheckpointFormatError, match="index of shards"):
        safetensors_file.sharded(path)
