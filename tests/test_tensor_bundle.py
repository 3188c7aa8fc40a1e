"""TensorFlow's checkpoint container: what it says, and what it may not."""

import itertools
import os
import shutil
import struct
import subprocess
import sys

import foreign
import helpers
import numpy as np
import pytest
import tensorflow as tf
from tensorflow.core.protobuf import tensor_bundle_pb2

from bit_tf import errors
from bit_tf.checkpoints import tensor_bundle, tf_hub

INDEX = "variables/variables.index"
BETA = b"group_norm/beta"


def after(crc, data):
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    return crc


AFTER = [after(byte, b"\0") for byte in range(256)]


def crc32c(data):
    """Masked, as TensorFlow stores it."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc = crc >> 8 ^ AFTER[crc & 0xFF ^ byte]
    crc ^= 0xFFFFFFFF
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def varint(number):
    out = b""
    while number > 127:
        out += bytes([number & 127 | 128])
        number >>= 7
    return out + bytes([number])


def row(key, value, shared=0):
    sizes = map(varint, (shared, len(key), len(value)))
    return b"".join((*sizes, key, value))


def block(rows, kind=0, restarts=(0,)):
    body = b"".join(itertools.starmap(row, rows))
    places = (*restarts, len(restarts))
    body += struct.pack(f"<{len(places)}I", *places) + bytes([kind])
    return body + struct.pack("<I", crc32c(body))


def table(rows, kind=0, restarts=(0,), times=1):
    """An index with right checksums, whatever it says."""
    data = block(rows, kind, restarts)
    handle = varint(0) + varint(len(data) - 5)
    tail = block([(b"\xff", handle)] * times)
    footer = varint(0) * 2 + varint(len(data)) + varint(len(tail) - 5)
    mark = struct.pack("<Q", 0xDB4775248B80FB57)
    return data + tail + footer.ljust(40, b"\0") + mark


def header(**changes):
    values = {"num_shards": 1} | changes
    return tensor_bundle_pb2.BundleHeaderProto(**values).SerializeToString()


def entry(shape=(2, 3), **changes):
    proto = tensor_bundle_pb2.BundleEntryProto(
        **({"dtype": 1, "size": 24, "crc32c": 1} | changes)
    )
    for size in shape:
        proto.shape.dim.add(size=size)
    return proto


def sliced(*extents):
    proto = entry(size=0)
    part = proto.slices.add()
    for start, length in extents:
        part.extent.add(start=start, length=length)
    return proto


def unknown_rank():
    proto = entry()
    proto.shape.unknown_rank = True
    return proto


# Each of the first three ends the process of TensorFlow's own reader.
HOSTILE = {
    "negative size": entry((-5, 3)),
    "product too large": entry((2**62, 3)),
    "many dimensions": entry((2, 3, *[1] * 300)),
    "empty and huge": entry((0, 2**63 - 1), size=0),
    "more than its bytes": entry((2**40, 3)),
    "many texts": entry((2**40,), dtype=7),
    "unknown rank": unknown_rank(),
    "no dtype": entry(dtype=0),
    "unknown dtype": entry(dtype=9999),
    "negative dtype": entry(dtype=-1),
    "a reference": entry(dtype=101),
    "negative offset": entry(offset=-8),
    "negative bytes": entry(size=-24),
    "another shard": entry(shard_id=7),
    "negative shard": entry(shard_id=-1),
    "part outside": sliced((1, 2), (0, 3)),
    "part before": sliced((-1, 2), (0, 3)),
    "negative part": sliced((0, -2), (0, 3)),
    "start without a length": sliced((1, None), (0, 3)),
    "part of another rank": sliced((0, 2)),
    "parts missing": sliced((0, 1), (0, 3)),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_entries_do_not_reach_tensorflow(tmp_path, name):
    prefix = tmp_path / "variables" / "variables"
    prefix.parent.mkdir()
    rows = [(b"", header()), (b"the/key", HOSTILE[name].SerializeToString())]
    (tmp_path / INDEX).write_bytes(table(rows))
    with pytest.raises(errors.CheckpointFormatError, match="the/key"):
        tf_hub.read(tmp_path)


HEADERS = {
    "no header": [(b"a", entry().SerializeToString())],
    "big endian": [(b"", header(endianness=1))],
    "many shards": [(b"", header(num_shards=10**9))],
    "no shards": [(b"", header(num_shards=0))],
    "no message": [(b"", b"\xff\xff")],
    "no message in an entry": [(b"", header()), (b"a", b"\xff\xff")],
    "nothing": [],
    "twice": [(b"", header()), *[(b"a", entry().SerializeToString())] * 2],
}


@pytest.mark.parametrize("name", HEADERS)
def test_hostile_headers(tmp_path, name):
    (tmp_path / "variables").mkdir()
    (tmp_path / INDEX).write_bytes(table(HEADERS[name]))
    with pytest.raises(errors.CheckpointFormatError, match="index"):
        tf_hub.read(tmp_path)


def test_hostile_tables(tmp_path):
    (tmp_path / "variables").mkdir()
    mark = struct.pack("<Q", 0xDB4775248B80FB57)
    far = b"".join(map(varint, (0, 0, 2**60, 2**60)))
    endless = b"\xff" * 40
    for data in (
        table([(b"", header())], kind=1),
        far.ljust(40, b"\0") + mark,
        endless + mark,
        b"\0" * 40 + mark,
    ):
        (tmp_path / INDEX).write_bytes(data)
        with pytest.raises(errors.CheckpointFormatError, match="index"):
            tf_hub.read(tmp_path)


def test_the_table_that_these_tests_write_is_tensorflows(tmp_path):
    prefix = tmp_path / "variables"
    values = np.arange(6, dtype="f4").reshape(2, 3)
    proto = entry(crc32c=crc32c(values.tobytes()))
    rows = [(b"", header()), (b"key", proto.SerializeToString())]
    (tmp_path / "variables.index").write_bytes(table(rows))
    shard = tmp_path / "variables.data-00000-of-00001"
    shard.write_bytes(values.tobytes())
    (found,) = tensor_bundle.variables(prefix).values()
    assert (found.shape, found.size, found.shard) == ((2, 3), 24, shard)
    reader = tf.train.load_checkpoint(str(prefix))
    np.testing.assert_array_equal(reader.get_tensor("key"), values)
    np.testing.assert_array_equal(tensor_bundle.load(found, "key"), values)


def save(prefix, rows):
    """Written by TensorFlow: (name, slice, array) each."""
    names, slices, tensors = zip(*rows, strict=True)
    tf.raw_ops.SaveV2(
        prefix=str(prefix),
        tensor_names=names,
        shape_and_slices=slices,
        tensors=tensors,
    )
    return prefix.with_name(f"{prefix.name}.data-00000-of-00001")


SIZES = [0, 1, 2, 3, 63, 64, 65, 127, 1000, (1 << 20) - 1, 1 << 20, 3_000_001]


def test_arrays_of_any_size(tmp_path, rng):
    rows = [
        (f"{size:08}", "", rng.integers(0, 256, size, "u1")) for size in SIZES
    ]
    shard = save(tmp_path / "m", rows)
    found = tensor_bundle.variables(tmp_path / "m")
    assert list(found) == [name for name, _, _ in rows]
    for name, _, array in rows:
        np.testing.assert_array_equal(
            tensor_bundle.load(found[name], name), array
        )
    data = shard.read_bytes()
    for name, variable in found.items():
        start, size = variable.offset, variable.size
        for position in {start, start + size // 2, start + size - 1}:
            if not size:
                continue
            changed = bytearray(data)
            changed[position] ^= 1 << position % 8
            shard.write_bytes(changed)
            for other in found:
                if other != name:
                    tensor_bundle.load(found[other], other)
            with pytest.raises(errors.CheckpointFormatError, match=name):
                tensor_bundle.load(variable, name)


DTYPES = [
    "bfloat16 float16 float32 float64 int8 int16 int32 int64",
    "uint8 uint16 uint32 uint64 bool complex64 complex128",
]


@pytest.mark.parametrize("name", " ".join(DTYPES).split())
def test_arrays_of_any_dtype(tmp_path, rng, name):
    array = tf.cast(rng.integers(0, 100, (2, 3, 1)), name)
    save(tmp_path / "m", [("key", "", array), ("one", "", array[0, 1, 0])])
    found = tensor_bundle.variables(tmp_path / "m")
    for key, expected in (("key", array), ("one", array[0, 1, 0])):
        read = tensor_bundle.load(found[key], key)
        assert found[key].dtype == read.dtype == expected.numpy().dtype
        np.testing.assert_array_equal(read, expected.numpy(), strict=True)


def test_dtypes_that_are_never_weights(tmp_path):
    floats = tf.dtypes.experimental
    rows = [
        (dtype.name, "", tf.cast([0.0, 1.0], dtype))
        for dtype in (floats.float8_e5m2, floats.float8_e4m3fn)
    ]
    rows.append(("words", "", tf.constant(["a", "bc"])))
    save(tmp_path / "m", rows)
    found = tensor_bundle.variables(tmp_path / "m")
    assert {variable.dtype for variable in found.values()} == {np.dtype("O")}


@pytest.mark.parametrize("size", [0, 1, 127, 128, 20_000, 1_500_000])
def test_texts(tmp_path, size):
    expected = os.urandom(size)
    shard = save(tmp_path / "m", [("key", "", expected)])
    (variable,) = tensor_bundle.variables(tmp_path / "m").values()
    assert tensor_bundle.text(variable, "key") == expected
    data = shard.read_bytes()
    for position in sorted({*range(9), len(data) - 1} & {*range(len(data))}):
        changed = bytearray(data)
        changed[position] ^= 0x81
        shard.write_bytes(changed)
        with pytest.raises(errors.CheckpointFormatError, match="key"):
            tensor_bundle.text(variable, "key")
    shard.write_bytes(data[:-1])
    with pytest.raises(errors.CheckpointFormatError, match="key"):
        tensor_bundle.text(variable, "key")


def test_a_text_of_another_length(tmp_path):
    data = b"\5sum!four"
    proto = entry((), dtype=7, size=len(data))
    proto.crc32c = crc32c(b"\5\0\0\0sum!four")
    rows = [(b"", header()), (b"key", proto.SerializeToString())]
    (tmp_path / "m.index").write_bytes(table(rows))
    (tmp_path / "m.data-00000-of-00001").write_bytes(data)
    (variable,) = tensor_bundle.variables(tmp_path / "m").values()
    with pytest.raises(errors.CheckpointFormatError, match="key"):
        tensor_bundle.text(variable, "key")


def test_what_is_no_single_text(tmp_path):
    rows = [("a", "", ["x", "y"]), ("b", "", np.zeros((), "f4"))]
    save(tmp_path / "m", rows)
    for key, variable in tensor_bundle.variables(tmp_path / "m").items():
        with pytest.raises(errors.CheckpointFormatError, match="one text"):
            tensor_bundle.text(variable, key)


@pytest.mark.parametrize(
    ("shape", "cuts"),
    [
        ((200, 3), (63, 64, 65, 127, 128)),
        ((20_000,), (8191, 8192, 8193)),
        ((2_200_000,), (1_048_575, 1_048_577, 2_100_000)),
    ],
)
@pytest.mark.parametrize("name", [b"a/key", b"\xff\0b\0\0\xff\xffc\1"])
def test_parts_that_tensorflow_wrote(tmp_path, rng, shape, cuts, name):
    array = rng.integers(0, 256, shape, "u1")
    rows = []
    whole = " ".join(map(str, shape))
    for start, stop in itertools.pairwise((0, *cuts, shape[0])):
        rest = ":-" * (len(shape) - 1)
        place = f"{whole} {start},{stop - start}{rest}"
        rows.append((name, place, array[start:stop]))
    save(tmp_path / "m", rows[::-1])
    (variable,) = tensor_bundle.variables(tmp_path / "m").values()
    assert len(variable.parts) == len(rows)
    tensor_bundle.require_data({"x": variable})
    np.testing.assert_array_equal(
        tensor_bundle.load(variable, "x"), array, strict=True
    )


def test_parts_of_a_grid(tmp_path, rng):
    array = rng.normal(size=(4, 6)).astype("f4")
    rows = [
        ("w", f"4 6 {a},2:{b},{c}", array[a : a + 2, b : b + c])
        for a, (b, c) in itertools.product((0, 2), ((0, 1), (1, 5)))
    ]
    shard = save(tmp_path / "m", rows)
    (variable,) = tensor_bundle.variables(tmp_path / "m").values()
    np.testing.assert_array_equal(tensor_bundle.load(variable, "w"), array)
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    with pytest.raises(errors.CheckpointFormatError, match="the w"):
        tensor_bundle.load(variable, "the w")
    shard.write_bytes(data[:-1])
    with pytest.raises(errors.CheckpointFormatError, match="which ends at"):
        tensor_bundle.require_data({"w": variable})


def test_many_parts(tmp_path):
    rows = [("w", f"1001 {n},1", np.zeros(1, "f4")) for n in range(1001)]
    save(tmp_path / "m", rows)
    with pytest.raises(errors.CheckpointFormatError, match="1000 parts"):
        tensor_bundle.variables(tmp_path / "m")
    save(tmp_path / "m", [("w", f"1000 {n},1", [0.0]) for n in range(1000)])
    (variable,) = tensor_bundle.variables(tmp_path / "m").values()
    assert len(variable.parts) == 1000


def test_keys_that_are_long_together(tmp_path):
    value = entry().SerializeToString()
    rows = [(b"", header()), (b"a" * 50_000, value)]
    rows += [(b"b", value, 50_000 + number) for number in range(1500)]
    (tmp_path / "m.index").write_bytes(table(rows))
    with pytest.raises(errors.CheckpointFormatError, match="keys have up to"):
        tensor_bundle.variables(tmp_path / "m")


def test_blocks_are_read_once(tmp_path):
    (tmp_path / "m.index").write_bytes(table([(b"", header())], times=2))
    with pytest.raises(errors.CheckpointFormatError, match="follow each other"):
        tensor_bundle.variables(tmp_path / "m")


@pytest.fixture(scope="module")
def arrays():
    return helpers.random_arrays((1, 1, 1, 1), 32, 10)


@pytest.fixture(scope="module")
def partitioned(arrays, tmp_path_factory):
    """A model one of whose variables is kept in two parts."""
    path = tmp_path_factory.mktemp("parts") / "model"
    (path / "variables").mkdir(parents=True)
    (path / "saved_model.pb").touch()
    rows = []
    for name, array in foreign.hub_names(arrays).items():
        if name.encode() == BETA:
            rows += [
                (name, "1024 0,512", array[:512]),
                (name, "1024 512,512", array[512:]),
            ]
        else:
            rows.append((name, "", array))
    save(path / "variables" / "variables", rows)
    return path


def reference(proto, parts):
    proto.dtype = 101


def overlap(proto, parts):
    proto.slices[1].extent[0].start = 0


def half_overlap(proto, parts):
    proto.slices[1].extent[0].start = 256


def all_and_nothing(proto, parts):
    proto.slices[0].extent[0].ClearField("length")
    proto.slices[1].extent[0].length = 0


def other_dtype(proto, parts):
    parts[0].dtype = 3


def other_rank(proto, parts):
    parts[0].shape.dim[0].size = 2
    parts[0].shape.dim.add(size=256)


def other_size(proto, parts):
    parts[0].shape.dim[0].size = 256
    parts[0].size = 1024


def parts_in_parts(proto, parts):
    parts[0].slices.add().extent.add(start=0, length=512)


def no_part(proto, parts):
    proto.slices[0].extent[0].length = 100
    proto.slices[1].extent[0].start = 100
    proto.slices[1].extent[0].length = 924


CHANGES = {
    reference: "a dtype is one",
    overlap: "do not overlap",
    half_overlap: "dtype float32 is there. Received: nothing",
    all_and_nothing: "(1024,) and dtype float32 is there. Received: nothing",
    other_dtype: "(512,) of dtype int32",
    other_rank: "Received: (2, 256)",
    other_size: "Received: (256,)",
    parts_in_parts: "a part has no parts itself",
    no_part: "dtype float32 is there. Received: nothing",
}

READ_ALL = """
import sys
from bit_tf import errors
from bit_tf.checkpoints import tf_hub
for path in sys.argv[1:]:
    try:
        read = tf_hub.read(path)
        print(len([read[name] for name in read]))
    except errors.CheckpointFormatError as error:
        print(ascii(str(error)))
"""


def read_all(*paths):
    """What a process of its own says of each path."""
    done = subprocess.run(
        [sys.executable, "-c", READ_ALL, *map(str, paths)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.splitlines()


def rows_of(path):
    return list(tensor_bundle.rows((path / INDEX).read_bytes()))


def test_parts_and_dtypes_that_end_tensorflows_process(
    tmp_path, partitioned, arrays
):
    paths = [shutil.copytree(partitioned, tmp_path / "as it is")]
    for change in CHANGES:
        path = tmp_path / change.__name__
        shutil.copytree(partitioned, path)
        rows = dict(rows_of(path))
        protos = {
            key: tensor_bundle_pb2.BundleEntryProto.FromString(value)
            for key, value in rows.items()
            if key
        }
        parts = [key for key in protos if key.startswith(b"\0")]
        assert len(parts) == 2
        change(protos[BETA], [protos[key] for key in parts])
        for key, proto in protos.items():
            rows[key] = proto.SerializeToString()
        (path / INDEX).write_bytes(table(rows.items()))
        paths.append(path)
    first, *lines = read_all(*paths)
    assert first == str(len(arrays))
    for line, word in zip(lines, CHANGES.values(), strict=True):
        assert word in line
        assert BETA.decode() in line


def test_parts_that_are_there_and_overlap(tmp_path):
    rows = [(b"", header())]
    ordered = b"\0" + b"key" + b"\0\1" + b"\1\1"
    whole = entry((4,), size=0)
    for start in (0, 1):
        whole.slices.add().extent.add(start=start, length=2)
        part = entry((2,), size=8).SerializeToString()
        rows.append((ordered + bytes([0x80 | start, 0x82]), part))
    rows.append((b"key", whole.SerializeToString()))
    (tmp_path / "m.index").write_bytes(table(rows))
    with pytest.raises(errors.CheckpointFormatError, match="do not overlap"):
        tensor_bundle.variables(tmp_path / "m")
    whole.slices.pop()
    (tmp_path / "m.index").write_bytes(
        table([*rows[:-1], (b"key", whole.SerializeToString())])
    )
    with pytest.raises(errors.CheckpointFormatError, match="make up the shape"):
        tensor_bundle.variables(tmp_path / "m")
    whole.slices.add().extent.add(start=2, length=2)
    rows[2] = (ordered + b"\x82\x82", part)
    rows[3] = (b"key", whole.SerializeToString())
    (tmp_path / "m.index").write_bytes(table(rows))
    assert len(tensor_bundle.variables(tmp_path / "m")["key"].parts) == 2


def test_a_row_that_only_restart_points_reach(tmp_path, partitioned, arrays):
    path = shutil.copytree(partitioned, tmp_path / "m")
    rows = rows_of(path)
    (place,) = (n for n, (key, _) in enumerate(rows) if key == BETA)
    key, value = rows[place + 1]
    hidden = tensor_bundle_pb2.BundleEntryProto.FromString(value)
    for _ in range(2):
        hidden.shape.dim.add(size=2**62)
    inner = row(BETA + b"!", b"") + row(key, hidden.SerializeToString())
    # An unknown field of the message before holds the row.
    rows[place] = (BETA, rows[place][1] + b"\x7a" + varint(len(inner)) + inner)
    start = b"".join(itertools.starmap(row, rows)).index(inner)
    (path / INDEX).write_bytes(table(rows, restarts=(0, start)))
    assert read_all(path) == [str(len(arrays))]
