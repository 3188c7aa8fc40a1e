"""PaddleNLP's .pdparams: pickles of arrays, and pickles that are attacks."""

import collections
import contextlib
import copyreg
import os
import pathlib
import pickle
import random
import struct
import time
import tracemalloc

import helpers
import numpy as np
import pytest
from foreign import paddle as spelled

from bit_tf import errors
from bit_tf.checkpoints import layout, paddle, rename, restricted_pickle

FORMAT = errors.CheckpointFormatError
MISMATCH = errors.CheckpointMismatchError
PROTOCOLS = (2, 3, 4, 5)
TABLE = "StructuredToParameterName@@"
SLICED = "UnpackBigParamInfor@@"

NORM = "bit.encoder.stages.0.layers.0.norm2.weight"
GAMMA = "block1/unit01/b/group_norm/gamma"
CONV = "bit.encoder.stages.1.layers.0.conv2.weight"
ROOT = "bit.embedder.convolution.weight"
HEAD = "classifier.1.weight"
BIAS = "classifier.1.bias"


TINY = helpers.random_arrays((1, 1, 1, 1), 32, 10)
VALID = spelled(TINY)


def save(path, content, protocol=4):
    path.write_bytes(pickle.dumps(content, protocol))
    return path


@pytest.fixture
def path(tmp_path):
    return tmp_path / "model_state.pdparams"


class Tensor:
    """Pickled as paddle.save does: (tuple, ((name, array),))."""

    def __init__(self, name, array):
        self.pair = name, array

    def __reduce__(self):
        return tuple, (self.pair,)


class Call:
    """Pickled as a call."""

    def __init__(self, function, *args, state=None):
        self.call = (function, args) if state is None else (
            function, args, state,
        )  # fmt: skip

    def __reduce__(self):
        return self.call


def same(read, arrays):
    assert list(read) == sorted(arrays)
    for name, array in read.items():
        assert array.dtype == np.float32
        assert array.flags.c_contiguous
        assert array.flags.writeable
        assert array.tobytes() == arrays[name].tobytes(), name
    return True


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize(
    ("blocks", "num_classes"),
    [((1, 1, 1, 1), 10), ((1, 2, 1, 3), 7), ((1, 1, 1, 1), 0)],
)
def test_reads_what_pickle_wrote(path, protocol, blocks, num_classes):
    arrays = helpers.random_arrays(blocks, 32, num_classes)
    arrays[GAMMA][:3] = [-0.0, 1e-45, 3.4e38]
    save(path, spelled(arrays), protocol)
    assert paddle.sniff(path)
    read = paddle.read(str(path))
    assert same(read, arrays)
    assert (read.blocks, read.num_classes) == (blocks, num_classes)
    assert (read.format, read.extra) == ("paddle", ())
    assert (read.facts.numerics, read.facts.preset) == ("timm", None)
    assert "no published file" in " ".join(read.notes)
    assert read.sources[GAMMA] == NORM


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_tensors_as_paddle_reduces_them(path, protocol):
    content = collections.OrderedDict(
        (name, Tensor(f"conv2d_{i}.w_0", array))
        for i, (name, array) in enumerate(VALID.items())
    )
    content[TABLE] = {name: f"p{i}" for i, name in enumerate(VALID)}
    read = paddle.read(save(path, content, protocol))
    assert same(read, TINY)
    assert read.extra == ()
    assert f"{TABLE} ({len(VALID)} names)" in " ".join(read.notes)


def test_a_model_without_the_prefix(path):
    arrays = helpers.random_arrays((1, 1, 1, 1), 32, 0)
    content = spelled(arrays, rename.PADDLE_BARE)
    assert "norm.weight" in content
    assert same(paddle.read(save(path, content)), arrays)


def test_a_directory(path):
    save(path, VALID)
    (path.parent / "config.json").write_text("{}")
    assert paddle.sniff(path.parent)
    read = paddle.read(path.parent)
    assert same(read, TINY)
    assert read.path == path
    path.unlink()
    assert not paddle.sniff(path.parent)
    with pytest.raises(FileNotFoundError):
        paddle.read(path.parent)


@pytest.mark.parametrize("protocol", [2, 3])
@pytest.mark.parametrize("name", [b"numpy.core", b"numpy._core"])
def test_names_of_numpy_1_and_2(path, protocol, name):
    data = pickle.dumps(VALID, protocol)
    for found in (b"numpy.core", b"numpy._core"):
        data = data.replace(b"c" + found + b".multiarray\n_", b"c@\n_")
    assert b"c@\n_" in data
    path.write_bytes(data.replace(b"c@\n_", b"c" + name + b".multiarray\n_"))
    assert same(paddle.read(path), TINY)


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("dtype", [">f4", "<f2", ">f2", "<f8", ">f8"])
def test_other_floats_and_orders(path, protocol, dtype):
    content = {
        name: np.asfortranarray(array.astype(dtype))
        for name, array in VALID.items()
    }
    read = paddle.read(save(path, content, protocol))
    assert read.dtypes[GAMMA] == np.dtype(dtype)
    for name, array in read.items():
        expected = TINY[name].astype(dtype).astype(np.float32)
        np.testing.assert_array_equal(array, expected, strict=True)


def test_arrays_with_gaps(path):
    content = {
        name: np.repeat(array, 2, axis=0)[::2] for name, array in VALID.items()
    }
    for protocol in PROTOCOLS:
        assert same(paddle.read(save(path, content, protocol)), TINY)


def text(value):
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def by_hand(name, shape, data=None, dtype="f4", order="<", fortran=False):
    """Opcodes that put one array; without data, their length only."""
    size = struct.pack("<I", 4 * int(np.prod(shape)))
    sizes = b"".join(b"J" + struct.pack("<i", n) for n in shape)
    start = (
        text(name)
        + b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\n"
        + b"K\0\x85C\1b\x87R(K\1("
        + sizes
        + b"tcnumpy\ndtype\n"
        + text(dtype)
        + b"\x89\x88\x87R(K\3"
        + text(order)
        + b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\0tb"
        + (b"\x88" if fortran else b"\x89")
        + b"B"
        + size
    )
    return start, (b"" if data is None else data) + b"tb"


def test_bytes_written_by_hand(path):
    opcodes = b"".join(
        b"".join(by_hand(name, array.shape, array.astype("<f4").tobytes()))
        for name, array in VALID.items()
    )
    path.write_bytes(b"\x80\3}(" + opcodes + b"u.")
    assert pickle.loads(path.read_bytes()).keys() == VALID.keys()
    assert same(paddle.read(path), TINY)


def test_r50x1_is_opened_without_its_data(path):
    shapes = layout.expected_shapes((3, 4, 6, 3), 64, 1000)
    with open(path, "wb") as file:
        file.write(b"\x80\3}(")
        for name, shape in shapes.items():
            stored = rename.PADDLE.stored_shape(name, shape)
            start, end = by_hand(rename.PADDLE.spell(name), stored)
            file.write(start)
            file.seek(4 * int(np.prod(shape)), os.SEEK_CUR)
            file.write(end)
        file.write(b"u.")
    tracemalloc.start()
    try:
        read = paddle.read(path)
        opened = tracemalloc.get_traced_memory()[1]
        array = read["block4/unit01/b/standardized_conv2d/kernel"]
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert path.stat().st_size > 102_000_000
    assert (read.shapes, len(read)) == (shapes, 153)
    assert array.shape == (3, 3, 512, 512)
    assert opened < 2_000_000
    assert peak < 2.5 * array.nbytes


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_small_array_takes_little_memory(path, protocol):
    save(path, VALID, protocol)
    paddle.read(path)
    tracemalloc.start()
    try:
        assert paddle.read(path)[GAMMA].shape == (32,)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert path.stat().st_size > 4_000_000
    assert peak < 700_000


def test_each_access_reads_anew(path):
    read = paddle.read(save(path, VALID))
    kernel = "root_block/standardized_conv2d/kernel"
    for name in (GAMMA, kernel):
        read[name][:] = 0
        assert read[name].any()


def test_a_file_that_changes_meanwhile(path):
    read = paddle.read(save(path, VALID))
    name = "root_block/standardized_conv2d/kernel"
    assert read[name].any()
    data = path.read_bytes()
    path.write_bytes(data[:-1])
    with pytest.raises(FORMAT, match=f"{ROOT}.* was. Open it again"):
        read[name]
    path.write_bytes(data)
    os.utime(path, ns=(0, 0))
    with pytest.raises(FORMAT, match="Open it again"):
        read[name]


# Slices.


def sliced(name, pieces, shape=None):
    array = VALID[name]
    content = {key: value for key, value in VALID.items() if key != name}
    slices = np.array_split(array.reshape(-1), pieces)
    names = [f"{name}@@.{i}" for i in range(pieces)]
    content.update(zip(names, slices, strict=True))
    content[SLICED] = {
        name: {"OriginShape": shape or array.shape, "slices": names}
    }
    return content


@pytest.mark.parametrize("protocol", [2, 3])
@pytest.mark.parametrize("pieces", [1, 2, 5])
def test_slices_are_put_together(path, protocol, pieces):
    read = paddle.read(save(path, sliced(CONV, pieces), protocol))
    assert same(read, TINY)
    assert read.extra == ()


def change_slices(change):
    content = sliced(CONV, 3)
    change(content, content[SLICED][CONV])
    return content


BAD_SLICES = {
    "shape": lambda content, info: info.update(OriginShape=(64, 64, 3, 4)),
    "dropped": lambda content, info: content.pop(f"{CONV}@@.1"),
    "not listed": lambda content, info: info["slices"].pop(),
    "twice": lambda content, info: info.update(
        slices=[f"{CONV}@@.0"] * 3, OriginShape=(3 * 12288,)
    ),
    "dtype": lambda content, info: content.update({
        f"{CONV}@@.0": content[f"{CONV}@@.0"].astype(np.float64)
    }),
    "no names": lambda content, info: info.update(slices=[3, None]),
    "no list": lambda content, info: info.update(slices=f"{CONV}@@.0"),
    "no shape": lambda content, info: info.pop("OriginShape"),
    "negative": lambda content, info: info.update(OriginShape=(-1, -36864)),
    "text": lambda content, info: info.update(OriginShape="64"),
    "whole, too": lambda content, info: content.update({CONV: VALID[CONV]}),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_SLICES)
def test_slices_that_do_not_fit(path, case):
    save(path, change_slices(BAD_SLICES[case]))
    with pytest.raises(FORMAT, match=f"{CONV}: "):
        paddle.read(path)


def test_slices_that_are_no_dictionary(path):
    save(path, VALID | {SLICED: [1]})
    with pytest.raises(FORMAT, match=SLICED):
        paddle.read(path)


# Mutations of one array.


def put(name, change):
    return lambda: VALID | {name: change(VALID[name])}


def moved(old, new):
    return lambda: {
        (new if name == old else name): array for name, array in VALID.items()
    }


def with_nan(array):
    array = array.copy()
    array.reshape(-1)[5] = np.nan
    return array


STRUCTURED = np.zeros(32, [("a", "<f4"), ("b", "<i4")])
MUTATIONS = {
    "renamed": (moved(NORM, f"{NORM}s"), MISMATCH, rf"− {GAMMA} \({NORM}\)"),
    "renamed root": (
        moved(ROOT, "stem"), MISMATCH, "− root_block.*(.|\n)*stem"
    ),
    "dropped": (
        lambda: {k: v for k, v in VALID.items() if k != NORM},
        MISMATCH,
        rf"− {GAMMA} \({NORM}\)",
    ),
    "HWIO": (
        put(CONV, lambda a: a.transpose(2, 3, 1, 0)), MISMATCH, f"≠ .*{CONV}"
    ),
    "torch's head": (put(HEAD, lambda a: a.T), MISMATCH, f"≠ .*{HEAD}"),
    "shorter": (put(NORM, lambda a: a[:-1]), MISMATCH, f"≠ .*{NORM}"),
    "no axes": (put(NORM, lambda a: a[0]), MISMATCH, f"≠ .*{NORM}"),
    "an array of no axes": (
        put(NORM, lambda a: np.array(a[0])), MISMATCH, f"≠ .*{NORM}"
    ),
    "empty": (put(NORM, lambda a: a[:0]), MISMATCH, f"≠ .*{NORM}"),
    "int32": (put(NORM, lambda a: a.astype(np.int32)), FORMAT, NORM),
    "bool": (put(NORM, lambda a: a.astype(bool)), FORMAT, NORM),
    "complex": (put(NORM, lambda a: a.astype(complex)), FORMAT, NORM),
    "bfloat16": (
        put(NORM, lambda a: a.astype(np.uint16)), FORMAT, f"{NORM}.*bfloat16"
    ),
    "objects": (
        put(NORM, lambda a: a.astype(object)),
        FORMAT,
        f"{NORM}: its dtype is 'O8', Python objects",
    ),
    "structured": (
        put(NORM, lambda a: STRUCTURED), FORMAT, f"{NORM}: its dtype is 'V8'"
    ),
    "text": (put(NORM, lambda a: a.astype(str)), FORMAT, f"{NORM}: its dtype"),
    "times": (
        put(NORM, lambda a: a.astype("M8[s]")), FORMAT, f"{NORM}: its dtype"
    ),
    "a list": (put(NORM, lambda a: a.tolist()), FORMAT, f"{NORM}: .* list"),
    "None": (put(NORM, lambda a: None), FORMAT, f"{NORM}: it is None"),
    "nan": (put(NORM, with_nan), FORMAT, f"{NORM}.* nan at position 5"),
    "inf": (put(CONV, lambda a: a / 0.0), FORMAT, CONV),
    "another depth": (
        lambda: VALID | {NORM.replace("layers.0", "layers.1"): VALID[NORM]},
        MISMATCH,
        r"stages\.0\.layers\.1\.",
    ),
}  # fmt: skip


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("case", MUTATIONS)
def test_mutations_are_refused_by_name(path, case, protocol):
    make, error, message = MUTATIONS[case]
    with np.errstate(all="ignore"):
        content = make()
    save(path, content, protocol)
    with pytest.raises(error, match=message):
        dict(paddle.read(path))


def test_all_problems_are_told_at_once(path):
    save(path, VALID | {NORM: VALID[NORM].astype(object), CONV: None})
    with pytest.raises(FORMAT, match=f"(?s)2 of .*{NORM}.*{CONV}"):
        paddle.read(path)


def test_names_of_other_things_are_extra(path):
    read = paddle.read(save(path, VALID | {
        "ema.decay": np.float32(0.5), "epoch": 3, "opt": {"lr": [0.1, None]},
    }))  # fmt: skip
    assert same(read, TINY)
    assert read.extra == ("ema.decay", "epoch", "opt")


@pytest.mark.parametrize("content", [[], 3, None, "x", (VALID,), VALID[NORM]])
def test_what_is_no_dictionary(path, content):
    with pytest.raises(FORMAT, match="holds a dictionary"):
        paddle.read(save(path, content))


# Attacks.


def opcodes(*parts):
    return b"\x80\2" + b"".join(parts) + b"."


def call(module, name, *args):
    packed = b"".join(map(text, args))
    return f"c{module}\n{name}\n(".encode() + packed + b"tR"


SMALL = {name: VALID[name] for name in (NORM, BIAS)}


def attacks(target):
    """Pickles that make a file, by plain pickle; case → bytes."""
    touch = f"touch {target}"
    evil = Call(os.system, touch)
    code = f"open({str(target)!r}, 'w').close()"
    system = call("builtins", "getattr").replace(
        b"(tR", b"(" + call("builtins", "__import__", "os") + text("system")
    ) + b"tR"  # fmt: skip
    valid = pickle.dumps(SMALL, 2)
    extension = 0x71
    copyreg.add_extension("posix", "system", extension)
    try:
        registered = pickle.dumps(Call(os.system, touch), 2)
    finally:
        copyreg.remove_extension("posix", "system", extension)
    assert b"\x82" in registered
    objects = np.array([Call(os.system, touch)], object)
    found = {
        "exec": pickle.dumps(Call(exec, code), 3),
        "eval": pickle.dumps(Call(eval, code), 2),
        "python 2's names": opcodes(call("__builtin__", "eval", code)),
        "getattr": opcodes(system, text(touch), b"\x85R"),
        "dtype": valid.replace(
            b"cnumpy\ndtype\n",
            call("posix", "system", touch) + b"0cnumpy\ndtype\n",
            1,
        ),
        "dtype's code": valid.replace(
            text("f4"), call("posix", "system", touch) + b"0" + text("f4"), 1
        ),
        "array's type": valid.replace(
            b"cnumpy\nndarray\n",
            call("posix", "system", touch) + b"0cnumpy\nndarray\n",
            1,
        ),
        "setstate": opcodes(
            b"ctypes\nSimpleNamespace\n)\x81}",
            text("__setstate__"),
            b"cposix\nsystem\nsb",
            text(touch),
            b"b",
        ),
        "an opcode of old": opcodes(b"(", text(touch), b"iposix\nsystem\n"),
        "another": opcodes(b"(cposix\nsystem\n", text(touch), b"o"),
        "new object": opcodes(
            b"csubprocess\nPopen\n(", text("touch"), text(str(target)),
            b"l\x85R",
        ),
        "map": opcodes(
            b"cbuiltins\nlist\ncbuiltins\nmap\ncposix\nsystem\n(",
            text(touch),
            b"l\x86R\x85R",
        ),
        "reconstructor": pickle.dumps(
            Call(copyreg._reconstructor, Path, object, None), 2
        ),
        "extension": registered,
    }  # fmt: skip
    for protocol in PROTOCOLS:
        for where, content in {
            "the top": evil,
            "a value": SMALL | {NORM: evil},
            "the first": {"first": evil} | SMALL,
            "a tensor": SMALL | {NORM: Tensor("conv2d_0.w_0", evil)},
            "the table": SMALL | {TABLE: {"a": evil}},
            "a key": SMALL | {evil: 1},
            "a list": SMALL | {"x": [[({"y": evil},)]]},
            "a state": SMALL | {"x": Call(list, state=evil)},
            "objects": SMALL | {NORM: objects},
            "the slices": SMALL | {SLICED: evil},
        }.items():
            found[f"{where} {protocol}"] = pickle.dumps(content, protocol)
    return found


class Path:
    """Anything that a pickle may name."""


CASES = sorted(attacks(pathlib.Path("x")))


@pytest.mark.skipif(
    os.name != "posix", reason="the attacks use a shell; run on Linux"
)
@pytest.mark.parametrize("case", CASES)
def test_attacks_execute_nothing(path, case):
    target = path.with_name("executed")
    path.write_bytes(attacks(target)[case])
    assert paddle.sniff(path)
    with pytest.raises(FORMAT, match="nothing was executed") as raised:
        paddle.read(path)
    assert str(path) in str(raised.value)
    assert os.listdir(path.parent) == [path.name]


@pytest.mark.skipif(
    os.name != "posix", reason="the attacks use a shell; run on Linux"
)
@pytest.mark.parametrize(
    "case",
    [
        case
        for case in CASES
        if case not in ("extension", "reconstructor", "map", "new object")
    ],
)
def test_the_attacks_are_real(tmp_path, case):
    target = tmp_path / "executed"
    # Some fail after the harm is done.
    with contextlib.suppress(
        TypeError, AttributeError, ValueError, pickle.UnpicklingError
    ):
        pickle.loads(attacks(target)[case])
    for _ in range(200):
        if target.exists():
            break
        time.sleep(0.01)
    assert target.exists()


def test_an_attack_is_told_with_the_name_beside_it(path):
    save(path, VALID | {NORM: Call(os.system, "true")})
    with pytest.raises(FORMAT, match=rf"'\w+\.system' near '{NORM}'"):
        paddle.read(path)


ARRAY = (
    b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\0\x85C\1b\x87R"
)
F4 = b"cnumpy\ndtype\n" + text("f4") + b"\x89\x88\x87R"
ODD = {
    "an array's dictionary": ARRAY + b"}b",
    "a type's dictionary": b"cnumpy\nndarray\n}" + text("a") + b"K\1sb",
    "a function's attributes": b"c_codecs\nencode\nN}"
    + text("__code__") + b"K\1s\x86b",
    "a list's state": b"]}b",
    "a dictionary's": b"}}b",
    "an ordered dictionary's": b"ccollections\nOrderedDict\n)R}b",
    "two states": F4 + (b"(K\3" + text("<")
    + b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\0tb") * 2,
    "two states for an array": ARRAY
    + (b"(K\1K\0\x85" + F4 + b"\x89C\0tb") * 2,
    "another codec": call("_codecs", "encode", "x", "rot13"),
    "another codec of the interpreter": call("_codecs", "encode", "x", "utf-8"),
    "a tuple of text": call("builtins", "tuple", "abc"),
    "many bytes": b"cbuiltins\nbytearray\nJ\xff\xff\xff\x7f\x85R",
    "a list of a list": b"cbuiltins\nlist\n]\x85R",
    "a tuple of a list": b"cbuiltins\ntuple\n]\x85R",
    "a dictionary of pairs": b"cbuiltins\ndict\n]\x85R",
    "a subclass": b"cnumpy.core.multiarray\n_reconstruct\n"
    b"cnumpy.matrixlib.defmatrix\nmatrix\nK\0\x85C\1b\x87R",
    "a known one as a subclass": b"cnumpy.core.multiarray\n_reconstruct\n"
    b"ccollections\nOrderedDict\nK\0\x85C\1b\x87R",
    "a big blank": b"cnumpy.core.multiarray\n_reconstruct\n"
    b"cnumpy\nndarray\nJ\xff\xff\xff\x7f\x85C\1b\x87R",
    "an array as a function": ARRAY + b")R",
    "text as a function": text("system") + b")R",
    "no tuple": b"cnumpy\ndtype\n]R",
    "a dotted name": b"\x8c\5numpy\x8c\x0dndarray.dumps\x93",
    "a name that is a number": b"\x8c\5numpyK\1\x93",
    "numpy's loader": call("numpy", "load", "x"),
    "an id": b"K\1Q",
    "a text id": b"Pabc\n",
    "a buffer": b"\x97",
    "a set": b"\x8f",
    "a frozen set": b"(\x91",
    "text in quotes": b"S'abc'\n",
    "bytes of Python 2": b"U\1a",
    "a number as text": b"I1\n",
    "a long number": b"\x8b" + struct.pack("<i", 2**31 - 1),
    "an unknown opcode": b"\xff",
    "appended to a dictionary": b"}K\1a",
    "set in a list": b"]" + text("a") + b"K\1s",
    "an order that is none": b"cnumpy.core.numeric\n_frombuffer\n(C\0"
    + F4 + b"K\0\x85" + text("A") + b"tR",
    "set in an array": ARRAY + text("a") + b"K\1s",
}  # fmt: skip


@pytest.mark.parametrize("case", ODD)
def test_other_opcodes_and_calls_are_refused(path, case):
    path.write_bytes(opcodes(ODD[case]))
    with pytest.raises(FORMAT, match="nothing was executed"):
        restricted_pickle.read(path)


KEY = text("a")
DAMAGED = {
    "a length of 2^60": b"\x8e" + struct.pack("<Q", 2**60),
    "text of 2^60": b"\x8d" + struct.pack("<Q", 2**60),
    "an array of 2^60": b"\x96" + struct.pack("<Q", 2**60),
    "4 GiB": b"B\xff\xff\xff\xff",
    "4 GiB of text": b"X\xff\xff\xff\xff",
    "a frame": b"\x95" + struct.pack("<Q", 2**60),
    "no operand": b"\x85",
    "no mark": b"t",
    "a mark at the end": b"(",
    "two values": b"NN",
    "nothing": b"",
    "no memo": b"h\5",
    "no value to keep": b"q\0",
    "text that is none": b"X\1\0\0\0\xff",
    "a name without end": b"cnumpy",
    "a long name": b"c" + b"a" * 10_000 + b"\n",
    "bytes above U+00FF": call("_codecs", "encode", "\u0100", "latin1"),
    "an odd number of items": b"}(" + KEY + b"u",
    "one name twice": b"}(" + (KEY + b"K\1") * 2 + b"u",
    "a number as a key": b"}(K\1K\1u",
    "a long whole number": b"\x8a\xff" + b"\1" * 255,
    "trailing bytes": b"}.}",
}


@pytest.mark.parametrize("case", DAMAGED)
def test_damage_is_refused_at_no_cost(path, case):
    path.write_bytes(opcodes(DAMAGED[case]))
    tracemalloc.start()
    try:
        with pytest.raises(FORMAT, match=r"model_state\.pdparams: a pickle"):
            restricted_pickle.read(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 300_000


@pytest.mark.parametrize(
    ("shape", "problem"),
    [
        ((2**62, 2**62), "takes"),
        ((2**40,), "takes"),
        ((2**62 + 1,), "whole numbers"),
        ((-1,), "whole numbers"),
        ((True,), "whole numbers"),
        ((1.0,), "whole numbers"),
        ([32], "whole numbers"),
        (32, "whole numbers"),
        ((1,) * 40, "at most 32"),
        ((31,), "takes 124 bytes, and 128 are there"),
        ((33,), "takes 132 bytes, and 128 are there"),
    ],
)
@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_shapes_that_are_no_shapes(path, shape, problem, protocol):
    function, args, state = VALID[NORM].__reduce__()
    state = (state[0], shape, *state[2:])
    evil = Call(function, *args, state=state)
    save(path, VALID | {NORM: evil}, protocol)
    with pytest.raises(FORMAT, match=f"{NORM}: .*{problem}"):
        paddle.read(path)


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("shape", [(2**40,), (1,)])
def test_shapes_of_what_is_not_read_yet(path, shape, protocol):
    function, args, state = VALID[CONV].__reduce__()
    evil = Call(function, *args, state=(state[0], shape, *state[2:]))
    save(path, VALID | {CONV: evil}, protocol)
    with pytest.raises(FORMAT, match=f"{CONV}: shape .* takes"):
        paddle.read(path)


def test_a_dtype_of_another_size(path):
    function, args, state = VALID[NORM].__reduce__()
    dtype = Call(
        np.dtype, "f4", False, True, state=(3, "<", None, None, None, 8, 4, 0)
    )
    evil = Call(function, *args, state=(*state[:2], dtype, False, state[4]))
    with pytest.raises(FORMAT, match=f"{NORM}: its dtype has parts"):
        paddle.read(save(path, VALID | {NORM: evil}))


@pytest.mark.parametrize("data", [[1.0] * 32, "x" * 128, None, 128])
def test_data_that_are_no_bytes(path, data):
    function, args, state = VALID[NORM].__reduce__()
    evil = Call(function, *args, state=(*state[:4], data))
    with pytest.raises(FORMAT, match=f"{NORM}: its data are .* not bytes"):
        paddle.read(save(path, VALID | {NORM: evil}))


def test_an_array_without_a_state(path):
    evil = Call(*VALID[NORM].__reduce__()[:1], np.ndarray, (0,), b"b")
    with pytest.raises(FORMAT, match=f"{NORM}: the file does not say"):
        paddle.read(save(path, VALID | {NORM: evil}))


@pytest.mark.parametrize("axes", [None, (), (1,), (0, 1), (0.0,), "0", [0]])
def test_axes_in_no_order(path, axes):
    frombuffer = VALID[NORM].__reduce_ex__(5)[0]
    dtype = np.dtype("<f4")
    evil = Call(frombuffer, bytes(128), dtype, (32,), "K", axes)
    with pytest.raises(FORMAT, match=f"{NORM}: its axes have no order of 1"):
        paddle.read(save(path, VALID | {NORM: evil}, 5))


def test_text_that_stands_for_bytes_is_counted(path):
    data = bytearray(pickle.dumps(VALID, 2))
    # 'é' as latin1 bytes, in UTF-8, in the root kernel's data.
    start = data.index(ROOT.encode())
    at = data.index(b"\xc2", start + 1000)
    data[at : at + 2] = b"aa"
    path.write_bytes(bytes(data))
    read = paddle.read(path)
    with pytest.raises(FORMAT, match=f"{ROOT} cannot be read: .* bytes of"):
        dict(read)
    data[at : at + 2] = b"\xff\xff"
    path.write_bytes(bytes(data))
    read = paddle.read(path)
    with pytest.raises(FORMAT, match=f"{ROOT} cannot be read: .* damaged"):
        dict(read)
    data[at : at + 2] = "\u0416".encode()
    path.write_bytes(bytes(data))
    read = paddle.read(path)
    with pytest.raises(FORMAT, match=f"{ROOT} cannot be read: .* damaged"):
        dict(read)


def test_keys_whose_hash_takes_for_ever(path):
    doubled = b"".join(
        b"q" + bytes([i]) + b"h" + bytes([i]) + b"\x86" for i in range(90)
    )
    path.write_bytes(opcodes(b"})", doubled, b"Ns"))
    with pytest.raises(FORMAT, match="keys are text"):
        restricted_pickle.read(path)
    path.write_bytes(opcodes(b"}", KEY, b")", doubled, b"s"))
    with pytest.raises(MISMATCH, match="begins with"):
        paddle.read(path)


def test_deep_nesting(path):
    path.write_bytes(opcodes(b")", b"\x85" * 99))
    with pytest.raises(FORMAT, match="holds a dictionary"):
        paddle.read(path)
    for deeper in (b")" + b"\x85" * 100, b"]" * 101 + b"a" * 100):
        path.write_bytes(opcodes(deeper))
        with pytest.raises(FORMAT, match="more than 100 deep"):
            paddle.read(path)
    path.write_bytes(opcodes(b"(" * 300_000))
    with pytest.raises(FORMAT, match="damaged"):
        paddle.read(path)
    path.write_bytes(opcodes(b"}q\0", KEY, b"h\0s"))
    with pytest.raises(MISMATCH, match="begins with"):
        paddle.read(path)


def test_opcodes_are_limited(path, monkeypatch):
    save(path, VALID)
    monkeypatch.setattr(restricted_pickle, "_MAX_OPCODES", 100)
    with pytest.raises(FORMAT, match="more than 100 opcodes"):
        paddle.read(path)


# Other programs' values, and damage anywhere.


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_plain_containers_are_those_of_pickle(path, protocol):
    shared = ["é", b"\0\xff", bytearray(b"ab"), b"", bytearray()]
    content = {
        "a": [1, -1, 255, 65536, 2**40, -(2**62), 1.5, float("inf")],
        "b": (None, True, False, (), (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4)),
        "c": {"d": {}, "e": [], "f": shared, "g": shared},
        "h": collections.OrderedDict(x=1, y=[{}]),
        "long": "é" * 300,
    }
    assert restricted_pickle.read(save(path, content, protocol)) == content


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_numbers_are_those_of_pickle(path, protocol):
    names = "b1 i1 i2 i4 i8 u1 u2 u4 u8 f2 f4 f8 c8 c16".split()
    rng = np.random.default_rng(0)
    content = {}
    for name in names:
        array = rng.integers(0, 100, (3, 4, 5)).astype(name)
        content[name] = array
        content[f"{name} big"] = array.astype(np.dtype(name).newbyteorder(">"))
        content[f"{name} columns"] = np.asfortranarray(array)
        content[f"{name} turned"] = array.transpose(1, 2, 0)
        content[f"{name} scalar"] = array[0, 0, 0]
        content[f"{name} no axes"] = np.array(array[0, 0, 0])
        content[f"{name} empty"] = array[:0]
    content["long"] = rng.normal(size=(100, 100))
    found = restricted_pickle.read(save(path, content, protocol))
    assert found.keys() == content.keys()
    for name, array in content.items():
        np.testing.assert_array_equal(found[name].read(), array, strict=True)
        assert found[name].read().dtype.str == array.dtype.str


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_every_cut_is_refused(path, protocol):
    data = pickle.dumps(VALID, protocol)
    points = {0, 1, 2, 3, 4, 10, len(data) - 2, len(data) - 1}
    for cut in sorted(points | {len(data) * i // 40 for i in range(40)}):
        path.write_bytes(data[:cut])
        if cut < 2 or data[cut - 1 : cut] != b".":
            assert not paddle.sniff(path)
        with pytest.raises(errors.BitTfError):
            paddle.read(path)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_damage_anywhere_is_refused_or_harmless(path, protocol):
    rng = random.Random(protocol)
    data = pickle.dumps(VALID | {"n": [1, {"a": (2,)}]}, protocol)
    interesting = [
        position
        for name in (NORM, BIAS, HEAD)
        for position in range(data.index(name.encode()), len(data))[:400]
    ]
    path.write_bytes(data)
    refused = 0
    for position in rng.sample(interesting, 150):
        with open(path, "r+b") as file:
            file.seek(position)
            file.write(bytes([data[position] ^ rng.randrange(1, 256)]))
        try:
            paddle.read(path).stored(GAMMA)
        except errors.BitTfError:
            refused += 1
        with open(path, "r+b") as file:
            file.seek(position)
            file.write(data[position : position + 1])
    assert refused > 20


def test_sniff_garbage(tmp_path):
    rng = random.Random(0)
    file = tmp_path / "x.pdparams"
    legacy = pickle.dumps(0x1950A86A20F9469CFC6C, 2)
    for content in (
        b"",
        b".",
        b"\x80",
        b"\x80\2",
        b"\x80\2.",
        b"\x80\1}.",
        b"\x80\6}.",
        b"PK\3\4.",
        legacy + pickle.dumps(1001, 2),
        legacy,
        *(rng.randbytes(size) for size in range(1, 300, 7)),
    ):
        file.write_bytes(content)
        assert not paddle.sniff(file)
    assert not paddle.sniff(tmp_path)
    assert not paddle.sniff(tmp_path / "missing")
    assert not paddle.sniff(tmp_path / "\0")
    assert not paddle.sniff(file / "below")
    with pytest.raises(FileNotFoundError):
        paddle.read(tmp_path / "missing")
    for content in (b"", b"\x80", b"hello", b"PK\3\4"):
        file.write_bytes(content)
        with pytest.raises(FORMAT, match="begins like"):
            paddle.read(file)
