"""Damaged and hostile .npz checkpoints: each is refused, by its array's name.

A row of DAMAGE is (what is done, the error's class, what its message says).
What is done takes the path to write and a valid file's arrays, spelled as
Google spells them.
"""

import gzip
import io
import os
import pickle
import re
import struct
import tracemalloc
import warnings
import zipfile
import zlib

import helpers
import numpy as np
import pytest

from bit_tf import checkpoints, errors
from bit_tf.checkpoints import google_npz

FORMAT = errors.CheckpointFormatError
MISMATCH = errors.CheckpointMismatchError

ROOT = "root_block/standardized_conv2d/kernel"
GAMMA = "block1/unit01/b/group_norm/gamma"
BETA = "block3/unit01/a/group_norm/beta"
CONV = "block2/unit01/c/standardized_conv2d/kernel"
PROJ = "block1/unit01/a/proj/standardized_conv2d/kernel"
BIG = "block4/unit01/b/standardized_conv2d/kernel"
HEAD = "head/conv2d/kernel"
BIAS = "head/conv2d/bias"


def spelled(arrays):
    files = {f"resnet/{name}": array for name, array in arrays.items()}
    if f"resnet/{HEAD}" in files:
        files[f"resnet/{HEAD}"] = files[f"resnet/{HEAD}"][None, None]
    return files


VALID = spelled(helpers.random_arrays((1, 1, 1, 1), 32, 10))
DEEP = spelled(helpers.random_arrays((3, 1, 1, 1), 32, 10))


def npy(array):
    stream = io.BytesIO()
    np.lib.format.write_array(stream, np.asarray(array), allow_pickle=True)
    return stream.getvalue()


def raw_npy(header, data=b"", version=b"\1\0", length=None):
    """A .npy whose header says anything."""
    width = 2 if version == b"\1\0" else 4
    length = len(header) if length is None else length
    return (
        b"\x93NUMPY"
        + version
        + length.to_bytes(width, "little")
        + header
        + data
    )


def head_of(shape, descr="'<f4'", fortran="False"):
    return (
        f"{{'descr': {descr}, 'fortran_order': {fortran}, 'shape': {shape}}}\n"
    ).encode()


def archive(members, **changes):
    """The bytes of a zip of (name, content), written by hand.

    Args:
      members: file name → content.
      changes: of one file's records, {what: (file name, value)}; what is
        method, body, size, compressed, crc, flags, offset, or twice.
    """
    body, directory = [], []
    position = count = 0
    for name, content in members.items():

        def value(what, default, name=name):
            where, new = changes.get(what, (None, None))
            return new if where == name else default

        for _ in range(value("twice", 1)):
            data = value("body", content)
            sizes = struct.pack(
                "<4H3I",
                value("flags", 0),
                value("method", 0),
                0,
                33,
                value("crc", zlib.crc32(content)),
                value("compressed", len(data)),
                value("size", len(content)),
            )
            encoded = name.encode()
            local = b"PK\3\4\x14\0" + sizes + struct.pack("<2H", len(name), 0)
            directory.append(
                b"PK\1\2\x14\3\x14\0"
                + sizes
                + struct.pack(
                    "<5H2I",
                    *(len(name), 0, 0, 0, 0),
                    *(0o644 << 16, value("offset", position)),
                )
                + encoded
            )
            body += [local, encoded, data]
            position += len(local) + len(encoded) + len(data)
            count += 1
    listing = b"".join(directory)
    end = struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, count, count, 0, 0, 0)
    end = end[:12] + struct.pack("<2IH", len(listing), position, 0)
    return b"".join(body) + listing + end


def zipped(arrays, **changes):
    members = {
        f"{key}.npy": value if isinstance(value, bytes) else npy(value)
        for key, value in arrays.items()
    }
    return archive(members, **changes)


def put(name, change):
    """Replaces one array, given as a function of it or as bytes."""

    def damage(path, arrays):
        key = f"resnet/{name}"
        new = change(arrays[key]) if callable(change) else change
        path.write_bytes(zipped(arrays | {key: new}))

    return damage


def files(change):
    """Changes the dictionary of arrays."""

    def damage(path, arrays):
        path.write_bytes(zipped(change(dict(arrays))))

    return damage


def rename(old, new):
    return files(
        lambda a: {new if k == f"resnet/{old}" else k: v for k, v in a.items()}
    )


def without(*parts):
    return files(
        lambda a: {k: v for k, v in a.items() if not any(p in k for p in parts)}
    )


def cast(dtype):
    return put(GAMMA, lambda array: array.astype(dtype))


def with_value(name, position, value, dtype=np.float32):
    def change(array):
        array = array.astype(dtype)
        array.reshape(-1)[position] = value
        return array

    return put(name, change)


def header(*args, data=bytes(128), **kwargs):
    return put(GAMMA, raw_npy(*args, data, **kwargs))


def records(**changes):
    """Changes GAMMA's records in the archive."""

    def damage(path, arrays):
        name = f"resnet/{GAMMA}.npy"
        path.write_bytes(
            zipped(arrays, **{k: (name, v) for k, v in changes.items()})
        )

    return damage


def data(change):
    """Changes the bytes of the whole file."""

    def damage(path, arrays):
        path.write_bytes(change(zipped(arrays)))

    return damage


def flip(name, offset, directory=False):
    """Flips a bit at an offset from a name's place in the file."""

    def change(content):
        member = f"resnet/{name}.npy".encode()
        at = content.rindex(member) if directory else content.index(member)
        content = bytearray(content)
        content[at + offset] ^= 4
        return bytes(content)

    return data(change)


def replace(content):
    return data(lambda _: content)


def deflate(content):
    packer = zlib.compressobj(wbits=-15)
    return packer.compress(content) + packer.flush()


def bomb(mebibytes, start=b""):
    """A deflate stream of zeros, and its size."""
    packer = zlib.compressobj(wbits=-15)
    first = packer.compress(start) + packer.flush(zlib.Z_FULL_FLUSH)
    zeros = packer.compress(bytes(1 << 20)) + packer.flush(zlib.Z_FULL_FLUSH)
    stream = first + zeros * mebibytes + packer.flush()
    return stream, len(start) + (mebibytes << 20)


def bomb_as(name, declared_shape, size=None):
    """1 GiB of zeros under a name, with a header that says a shape."""

    def damage(path, arrays):
        start = raw_npy(head_of(declared_shape))
        stream, full = bomb(1024, start)
        key = f"resnet/{name}"
        length = full if size is None else len(start) + size
        changes = {"body": stream, "method": 8, "size": length}
        path.write_bytes(
            zipped(
                arrays | {key: b""},
                **{k: (f"{key}.npy", v) for k, v in changes.items()},
            )
        )

    return damage


class Evil:
    """Creates a directory when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def pickled(path, arrays):
    evil = np.array([Evil(str(path.with_name("evil")))], dtype=object)
    files(lambda a: a | {f"resnet/{GAMMA}": evil})(path, arrays)


def listed(sign, name):
    return f"{re.escape(sign)} {re.escape(name)}"


def of(name, *rest):
    return ".*".join(map(re.escape, (name, *rest)))


GAMMA_BYTES = npy(VALID[f"resnet/{GAMMA}"])
DEFLATED = deflate(GAMMA_BYTES)

DAMAGE = {
    # Names.
    "renamed": (
        rename(GAMMA, f"resnet/{GAMMA[:-5]}scale"),
        MISMATCH,
        listed("−", GAMMA) + r" \(32,\)(.|\n)*outside(.|\n)*scale",
    ),
    "dropped norm": (without(GAMMA), MISMATCH, listed("−", GAMMA)),
    "dropped projection": (without(PROJ), MISMATCH, listed("−", PROJ)),
    "dropped root": (without(ROOT), MISMATCH, listed("−", ROOT)),
    "dropped root and first norm": (
        without(ROOT, "block1/unit01/a/group_norm/gamma"),
        MISMATCH,
        listed("−", ROOT),
    ),
    "dropped final norm": (
        without("resnet/group_norm/beta"),
        MISMATCH,
        listed("−", "group_norm/beta"),
    ),
    "dropped bias": (without(BIAS), MISMATCH, listed("−", BIAS)),
    "dropped head kernel": (without(HEAD), MISMATCH, listed("−", HEAD)),
    "dropped block": (without("block2/"), MISMATCH, "− block2/unit01"),
    "everything dropped": (files(lambda a: {}), MISMATCH, listed("−", ROOT)),
    "only extra arrays": (
        files(lambda a: {"conv1": np.zeros(3)}),
        MISMATCH,
        listed("−", ROOT) + r"(.|\n)*\+ conv1",
    ),
    "missing unit in the middle": (
        lambda path, _: without("block1/unit02/")(path, DEEP),
        MISMATCH,
        "− block1/unit02",
    ),
    "unit01 missing": (
        lambda path, _: without("block1/unit01/")(path, DEEP),
        MISMATCH,
        "− block1/unit01",
    ),
    "half of the last unit": (
        lambda path, _: without("block1/unit03/c")(path, DEEP),
        MISMATCH,
        listed("−", "block1/unit03/c/group_norm/beta"),
    ),
    "unit gap": (
        rename(GAMMA, "resnet/block1/unit03/b/group_norm/gamma"),
        MISMATCH,
        "− block1/unit02",
    ),
    "unit00": (
        rename(GAMMA, "resnet/block1/unit00/b/group_norm/gamma"),
        MISMATCH,
        listed("+", "block1/unit00/b/group_norm/gamma"),
    ),
    "unit1": (
        rename(GAMMA, "resnet/block1/unit1/b/group_norm/gamma"),
        MISMATCH,
        listed("−", GAMMA),
    ),
    "unit of a billion": (
        rename(GAMMA, "resnet/block1/unit1000000000/b/group_norm/gamma"),
        MISMATCH,
        listed("−", GAMMA),
    ),
    "block5": (
        files(
            lambda a: (
                a
                | {
                    k.replace("block4", "block5"): v
                    for k, v in a.items()
                    if "block4" in k
                }
            )
        ),
        MISMATCH,
        listed("+", "block5/unit01/a/group_norm/beta"),
    ),
    "block0": (
        files(
            lambda a: (
                a | {"resnet/block0/unit01/a/group_norm/beta": np.zeros(32)}
            )
        ),
        MISMATCH,
        listed("+", "block0/unit01/a/group_norm/beta"),
    ),
    "projection in unit02": (
        lambda path, _: files(
            lambda a: (
                a
                | {
                    f"resnet/{PROJ}".replace("unit01", "unit02"): a[
                        f"resnet/{PROJ}"
                    ]
                }
            )
        )(path, DEEP),
        MISMATCH,
        listed("+", PROJ.replace("unit01", "unit02")),
    ),
    "second head": (
        files(
            lambda a: a | {"resnet/head/conv2d_1/kernel": a[f"resnet/{HEAD}"]}
        ),
        MISMATCH,
        listed("+", "head/conv2d_1/kernel"),
    ),
    "collision": (
        files(
            lambda a: (
                a
                | {
                    "resnet/" + CONV.replace("conv2d", "conv2d_3"): a[
                        f"resnet/{CONV}"
                    ]
                }
            )
        ),
        FORMAT,
        of("both", CONV),
    ),
    "collision of numbers": (
        files(
            lambda a: (
                {k: v for k, v in a.items() if CONV not in k}
                | {
                    "resnet/" + CONV.replace("conv2d", f"conv2d_{i}"): a[
                        f"resnet/{CONV}"
                    ]
                    for i in (2, 3)
                }
            )
        ),
        FORMAT,
        of("both", CONV),
    ),
    "another number's spelling": (
        rename(CONV, "resnet/" + CONV.replace("conv2d", "conv2d_x")),
        MISMATCH,
        listed("−", CONV),
    ),
    "one name in capitals": (
        rename(GAMMA, f"resnet/{GAMMA.upper()}"),
        MISMATCH,
        listed("+", GAMMA.upper()),
    ),
    "all names in capitals": (
        files(lambda a: {k.upper(): v for k, v in a.items()}),
        MISMATCH,
        listed("−", ROOT),
    ),
    "one name without prefix": (
        rename(GAMMA, GAMMA),
        MISMATCH,
        listed("−", GAMMA) + r"(.|\n)*" + listed("+", GAMMA),
    ),
    "another prefix": (
        rename(GAMMA, f"resnet50/{GAMMA}"),
        MISMATCH,
        listed("+", f"resnet50/{GAMMA}"),
    ),
    "path upwards": (
        rename(GAMMA, f"resnet/../{GAMMA}"),
        MISMATCH,
        listed("+", f"resnet/../{GAMMA}"),
    ),
    "absolute path": (
        rename(GAMMA, f"/resnet/{GAMMA}"),
        MISMATCH,
        listed("+", f"/resnet/{GAMMA}"),
    ),
    "backslashes": (
        rename(GAMMA, f"resnet/{GAMMA}".replace("/", "\\")),
        MISMATCH,
        listed("−", GAMMA),
    ),
    "control characters": (
        rename(GAMMA, f"resnet/{GAMMA}\x1b[2J"),
        MISMATCH,
        re.escape(r"\x1b[2J"),
    ),
    "another suffix": (
        lambda path, a: path.write_bytes(
            archive(
                {
                    k + (".bin" if GAMMA in k else ".npy"): npy(v)
                    for k, v in a.items()
                }
            )
        ),
        MISMATCH,
        listed("−", GAMMA),
    ),
    # Shapes.
    "1x1 kernel transposed": (
        put(CONV, lambda a: a.swapaxes(2, 3)),
        MISMATCH,
        listed("≠", CONV) + ".*transposed",
    ),
    "one kernel in OIHW": (
        put(BIG, lambda a: a.transpose(3, 2, 0, 1)),
        MISMATCH,
        listed("≠", BIG) + ".*OIHW",
    ),
    "every kernel in OIHW": (
        files(
            lambda a: {
                k: v.transpose(3, 2, 0, 1) if v.ndim == 4 else v
                for k, v in a.items()
            }
        ),
        MISMATCH,
        r"(.|\n)*".join(listed("≠", n) + ".*OIHW" for n in (BIG, HEAD, ROOT)),
    ),
    "root in OIHW": (
        put(ROOT, lambda a: a.transpose(3, 2, 0, 1)),
        MISMATCH,
        listed("≠", ROOT) + ".*OIHW",
    ),
    "root of one channel": (
        put(ROOT, lambda a: a[:, :, :1]),
        MISMATCH,
        listed("≠", ROOT),
    ),
    "root of 5x5": (
        put(ROOT, lambda a: a[:5, :5]),
        MISMATCH,
        listed("≠", ROOT),
    ),
    "root of another width": (
        put(ROOT, lambda a: a.repeat(2, 3)),
        MISMATCH,
        listed("≠", BIG),
    ),
    "width without 32 groups": (
        files(
            lambda a: (
                a
                | {
                    f"resnet/{ROOT}": np.zeros((7, 7, 3, 48), "f4"),
                    "resnet/block1/unit01/a/group_norm/gamma": np.ones(
                        48, "f4"
                    ),
                }
            )
        ),
        MISMATCH,
        of("multiple of 32", ROOT, "48"),
    ),
    "width of 0": (
        put(ROOT, np.zeros((7, 7, 3, 0), "f4")),
        MISMATCH,
        of("multiple of 32", ROOT),
    ),
    "norm of rank 4": (
        put(GAMMA, lambda a: a.reshape(1, 1, 1, -1)),
        MISMATCH,
        listed("≠", GAMMA) + ".*reshaped",
    ),
    "scalar": (put(GAMMA, np.float32(1)), MISMATCH, listed("≠", GAMMA)),
    "empty array": (
        put(GAMMA, np.zeros(0, "f4")),
        MISMATCH,
        listed("≠", GAMMA),
    ),
    "one value short": (
        put(GAMMA, lambda a: a[:-1]),
        MISMATCH,
        listed("≠", GAMMA),
    ),
    "norms of two layers swapped": (
        files(
            lambda a: (
                a
                | {
                    f"resnet/{GAMMA}": a[f"resnet/{BETA}"],
                    f"resnet/{BETA}": a[f"resnet/{GAMMA}"],
                }
            )
        ),
        MISMATCH,
        listed("≠", GAMMA) + r"(.|\n)*" + listed("≠", BETA),
    ),
    "bias of another head": (
        put(BIAS, lambda a: a[:9]),
        MISMATCH,
        listed("≠", BIAS) + r": expected \(10,\), found \(9,\)",
    ),
    "head transposed": (
        put(HEAD, lambda a: a[0, 0].T),
        MISMATCH,
        listed("≠", HEAD) + ".*transposed",
    ),
    "head in OIHW": (
        put(HEAD, lambda a: a.transpose(3, 2, 0, 1)),
        MISMATCH,
        listed("≠", HEAD) + ".*OIHW",
    ),
    "head of 3x3": (
        put(HEAD, np.zeros((3, 3, 1024, 10), "f4")),
        MISMATCH,
        listed("≠", HEAD),
    ),
    "head of rank 3": (
        put(HEAD, lambda a: a[0]),
        MISMATCH,
        listed("≠", HEAD),
    ),
    # Dtypes.
    **{
        f"cast to {dtype}": (cast(dtype), FORMAT, of(GAMMA, "float", shown))
        for dtype, shown in (
            ("int8", "i1"),
            ("int32", "i4"),
            ("int64", "i8"),
            ("uint8", "u1"),
            ("bool", "b1"),
            ("complex64", "c8"),
            ("str", "<U"),
            ("S", "|S"),
            ("object", "|O, Python objects"),
            ("longdouble", "f"),
        )
    },
    "bfloat16 as void": (
        put(GAMMA, lambda a: a.view("V2")[::2]),
        FORMAT,
        of(GAMMA, "V2"),
    ),
    "dates": (
        put(GAMMA, np.zeros(32, "M8[ns]")),
        FORMAT,
        of(GAMMA, "M8"),
    ),
    "structured dtype": (
        put(GAMMA, np.zeros(32, [("a", "f4")])),
        FORMAT,
        of(GAMMA, "('a', '<f4')"),
    ),
    "pickle with a payload": (pickled, FORMAT, of(GAMMA, "never opened")),
    # Values.
    "NaN": (with_value(GAMMA, 3, np.nan), FORMAT, of(GAMMA, "nan", "3 of 32")),
    "NaN as the last value": (with_value(BIG, -1, np.nan), FORMAT, of(BIG)),
    "infinity": (with_value(HEAD, 0, np.inf), FORMAT, of(HEAD, "inf")),
    "minus infinity": (with_value(BETA, 0, -np.inf), FORMAT, of(BETA, "-inf")),
    "float64 over float32": (
        with_value(BIAS, 1, 1e39, np.float64),
        FORMAT,
        of(BIAS, "1e+39"),
    ),
    "float64 NaN": (
        with_value(BIAS, 1, np.nan, np.float64),
        FORMAT,
        of(BIAS, "nan"),
    ),
    "float16 infinity": (
        with_value(BIAS, 1, np.inf, np.float16),
        FORMAT,
        of(BIAS, "inf"),
    ),
    # Headers of arrays.
    "no array": (put(GAMMA, b""), FORMAT, of(GAMMA, "not a .npy")),
    "text for an array": (put(GAMMA, b"hello, world"), FORMAT, of(GAMMA)),
    "wrong magic": (
        put(GAMMA, b"\x92" + GAMMA_BYTES[1:]),
        FORMAT,
        of(GAMMA, "not a .npy"),
    ),
    "version 9": (
        header(head_of("(32,)"), version=b"\t\0"),
        FORMAT,
        of(GAMMA, "9.0"),
    ),
    "version 1.7": (
        header(head_of("(32,)"), version=b"\1\7"),
        FORMAT,
        of(GAMMA, "1.7"),
    ),
    "header of 4 GiB": (
        header(head_of("(32,)"), version=b"\2\0", length=2**32 - 1),
        FORMAT,
        of(GAMMA, "4294967295"),
    ),
    "header of 60 kB": (
        header(head_of("(32,)") + b" " * 60_000),
        FORMAT,
        of(GAMMA, "limit"),
    ),
    "header beyond the data": (
        header(head_of("(32,)"), length=9_999),
        FORMAT,
        of(GAMMA, "within its .npy header"),
    ),
    "cut in the header": (
        put(GAMMA, GAMMA_BYTES[:60]),
        FORMAT,
        of(GAMMA, "within its .npy header"),
    ),
    "cut in the data": (
        put(GAMMA, GAMMA_BYTES[:-1]),
        FORMAT,
        of(GAMMA, "promises 128"),
    ),
    "bytes after the data": (
        put(GAMMA, GAMMA_BYTES + b"\0"),
        FORMAT,
        of(GAMMA, "promises 128"),
    ),
    "shape too large for the data": (
        header(head_of("(33,)")),
        FORMAT,
        of(GAMMA, "promises 132"),
    ),
    "shape of petabytes": (
        header(head_of("(1000000, 1000000, 1000)")),
        FORMAT,
        of(GAMMA, "promises"),
    ),
    "shape that overflows to 32": (
        header(head_of(f"(32, {2**32 + 1}, {2**32 - 1})")),
        FORMAT,
        of(GAMMA, "promises"),
    ),
    "size over 64 bits": (
        header(head_of(f"({2**64 + 32},)")),
        FORMAT,
        of(GAMMA, "integers from 0"),
    ),
    "size of 30000 bits": (
        header(head_of(f"(0x{'f' * 7_500},)")),
        FORMAT,
        of(GAMMA, "integers from 0"),
    ),
    "size of 9000 digits": (
        header(head_of(f"({'9' * 9_000},)")),
        FORMAT,
        of(GAMMA),
    ),
    "rank of 3000": (
        header(head_of("(" + "1," * 3_000 + ")")),
        FORMAT,
        of(GAMMA, "at most 32"),
    ),
    "negative size": (
        header(head_of("(-32,)")),
        FORMAT,
        of(GAMMA, "(-32,)"),
    ),
    "two negative sizes": (
        header(head_of("(-8, -4)")),
        FORMAT,
        of(GAMMA, "(-8, -4)"),
    ),
    "size as a float": (header(head_of("(32.0,)")), FORMAT, of(GAMMA)),
    "size as a bool": (header(head_of("(32, True)")), FORMAT, of(GAMMA)),
    "shape as a list": (header(head_of("[32]")), FORMAT, of(GAMMA)),
    "order as a number": (
        header(head_of("(32,)", fortran="0")),
        FORMAT,
        of(GAMMA, "header is damaged"),
    ),
    "descr as a number": (header(head_of("(32,)", "4")), FORMAT, of(GAMMA)),
    "descr that is unknown": (
        header(head_of("(32,)", "'<f4,'")),
        FORMAT,
        of(GAMMA, "<f4,"),
    ),
    "header with code": (
        header(
            b"{'descr': '<f4', 'fortran_order': False, "
            b"'shape': (__import__('os').mkdir('evil'),)}"
        ),
        FORMAT,
        of(GAMMA, "header is damaged"),
    ),
    "header without shape": (
        header(b"{'descr': '<f4', 'fortran_order': False}"),
        FORMAT,
        of(GAMMA, "header is damaged"),
    ),
    "header with a fourth field": (
        header(head_of("(32,), 'x': 1")),
        FORMAT,
        of(GAMMA, "header is damaged"),
    ),
    "header of nested brackets": (
        header(b"(" * 9_000),
        FORMAT,
        of(GAMMA, "header is damaged"),
    ),
    "header of nested signs": (
        header(head_of("-" * 9_000 + "1")),
        FORMAT,
        of(GAMMA, "header is damaged"),
    ),
    "header with a bad escape": (
        header(head_of("(32,)", r"'<f4\d'")),
        FORMAT,
        of(GAMMA, "header is damaged"),
    ),
    "header of zeros": (header(bytes(100)), FORMAT, of(GAMMA)),
    "header of no text": (
        header(b"\xff" * 100, version=b"\3\0"),
        FORMAT,
        of(GAMMA),
    ),
    # The archive.
    "empty file": (replace(b""), FORMAT, "empty"),
    "blank file": (replace(b"\n\n  \n"), FORMAT, "blank"),
    "directory": (lambda path, _: path.mkdir(), FORMAT, "directory"),
    "web page": (
        replace(b"\n<!DOCTYPE html><title>404</title>"),
        FORMAT,
        "web page",
    ),
    "XML error": (
        replace(b"\xef\xbb\xbf<?xml version='1.0'?><Error>NoSuchKey</Error>"),
        FORMAT,
        "web page",
    ),
    "gzip": (data(lambda c: gzip.compress(c, 1)), FORMAT, "gzip"),
    "HDF5": (replace(b"\x89HDF\r\n\x1a\n" + bytes(99)), FORMAT, "HDF5"),
    "pickle": (replace(pickle.dumps({})), FORMAT, "pickle"),
    "one .npy": (replace(GAMMA_BYTES), FORMAT, "one .npy array"),
    "Git LFS pointer": (
        replace(b"version https://git-lfs.github.com/spec/v1\n"),
        FORMAT,
        "Git LFS",
    ),
    "noise": (
        replace(np.random.default_rng(0).bytes(5_000)),
        FORMAT,
        "unknown bytes",
    ),
    "signature alone": (replace(b"PK\3\4"), FORMAT, "truncated"),
    "truncated by 1 byte": (data(lambda c: c[:-1]), FORMAT, "truncated"),
    "truncated in the directory": (
        data(lambda c: c[: c.index(b"PK\1\2") + 99]),
        FORMAT,
        "truncated",
    ),
    "truncated before the directory": (
        data(lambda c: c[: c.index(b"PK\1\2")]),
        FORMAT,
        "truncated",
    ),
    "truncated in half": (
        data(lambda c: c[: len(c) // 2]),
        FORMAT,
        f"truncated.*{re.escape('Download')}",
    ),
    "start missing": (data(lambda c: c[1_000:]), FORMAT, "outside the file"),
    "hole in the middle": (
        data(lambda c: c[: 2 << 20] + c[3 << 20 :]),
        FORMAT,
        "cannot be read: it lies outside the file",
    ),
    "bit flipped in small data": (
        flip(GAMMA, len(f"resnet/{GAMMA}.npy") + 128),
        FORMAT,
        of(GAMMA, "CRC"),
    ),
    "bit flipped in large data": (
        flip(BIG, 1_000_001),
        FORMAT,
        of(BIG, "CRC"),
    ),
    "bit flipped in a header's padding": (
        flip(GAMMA, len(f"resnet/{GAMMA}.npy") + 120),
        FORMAT,
        of(GAMMA),
    ),
    "bit flipped in a header": (
        flip(GAMMA, len(f"resnet/{GAMMA}.npy") + 20),
        FORMAT,
        of(GAMMA),
    ),
    "bit flipped in a local name": (
        flip(GAMMA, 20),
        FORMAT,
        of(GAMMA, "differ"),
    ),
    "bit flipped in a local signature": (
        flip(GAMMA, -30),
        FORMAT,
        of(GAMMA, "no array begins"),
    ),
    "bit flipped in a local name's length": (
        flip(GAMMA, -4),
        FORMAT,
        of(GAMMA),
    ),
    "bit flipped in a directory name": (
        flip(GAMMA, 20, directory=True),
        MISMATCH,
        listed("−", GAMMA),
    ),
    "bit flipped in a directory signature": (
        flip(GAMMA, -46, directory=True),
        FORMAT,
        "directory",
    ),
    "bit flipped in a directory checksum": (
        flip(GAMMA, -46 + 16, directory=True),
        FORMAT,
        of(GAMMA, "CRC"),
    ),
    "bit flipped in a directory size": (
        flip(GAMMA, -46 + 24, directory=True),
        FORMAT,
        of(GAMMA, "sizes differ"),
    ),
    "bit flipped in a directory offset": (
        flip(GAMMA, -46 + 42, directory=True),
        FORMAT,
        of(GAMMA),
    ),
    "offset beyond the file": (
        records(offset=2**31),
        FORMAT,
        of(GAMMA, "outside the file"),
    ),
    "offset of another array": (records(offset=0), FORMAT, of(GAMMA, "differ")),
    "size beyond the file": (
        records(compressed=2**31, size=2**31),
        FORMAT,
        of(GAMMA, "outside the file"),
    ),
    "encrypted": (records(flags=1), FORMAT, of(GAMMA, "encrypted")),
    "strongly encrypted": (
        records(flags=0x41),
        FORMAT,
        of(GAMMA, "encrypted"),
    ),
    **{
        f"compression method {method}": (
            records(method=method),
            FORMAT,
            of(GAMMA, f"method is {method}"),
        )
        for method in (12, 14, 93, 99)
    },
    "twice": (records(twice=2), FORMAT, of(GAMMA, "twice")),
    "extra array twice": (
        lambda path, a: path.write_bytes(
            zipped(a | {"step": np.zeros(1)}, twice=("step.npy", 2))
        ),
        FORMAT,
        of("step.npy", "twice"),
    ),
    # Deflated arrays.
    "deflated data damaged": (
        records(method=8, body=DEFLATED[:20] + b"\xff\xff" + DEFLATED[22:]),
        FORMAT,
        of(GAMMA),
    ),
    "deflated data that are none": (
        records(method=8, body=b"\xff" * 200),
        FORMAT,
        of(GAMMA, "compressed data"),
    ),
    "deflated data cut": (
        records(method=8, body=DEFLATED[:-9]),
        FORMAT,
        of(GAMMA),
    ),
    "deflated data longer than declared": (
        records(method=8, body=deflate(GAMMA_BYTES + b"\0")),
        FORMAT,
        of(GAMMA, "go on after"),
    ),
    "deflated data of another checksum": (
        records(method=8, body=deflate(GAMMA_BYTES[:-1] + b"\x99")),
        FORMAT,
        of(GAMMA, "CRC"),
    ),
    "more than deflate can hold": (
        records(method=8, body=DEFLATED, size=2**30),
        FORMAT,
        of(GAMMA, "cannot inflate"),
    ),
}

BOMBS = {
    "1 GiB, as its header says": (
        bomb_as(GAMMA, f"({1 << 28},)"),
        MISMATCH,
        listed("≠", GAMMA),
    ),
    "1 GiB, under a small header": (
        bomb_as(GAMMA, "(32,)"),
        FORMAT,
        of(GAMMA, "promises 128"),
    ),
    "1 GiB, declared small": (
        bomb_as(GAMMA, "(32,)", 128),
        FORMAT,
        of(GAMMA, "go on after"),
    ),
    "1 GiB, a wide stem": (
        bomb_as(ROOT, f"(7, 7, 3, {1 << 20})", 4 * 7 * 7 * 3 * (1 << 20)),
        MISMATCH,
        listed("≠", BIG),
    ),
}


def read_all(read, path):
    return dict(read(path).items())


def test_the_rows_start_from_a_valid_file(tmp_path):
    for arrays in (VALID, DEEP):
        (tmp_path / "a.npz").write_bytes(zipped(arrays))
        read = read_all(google_npz.read, tmp_path / "a.npz")
        for name, array in read.items():
            np.testing.assert_array_equal(
                array, arrays[f"resnet/{name}"].reshape(array.shape)
            )
        assert len(read) == len(arrays)
    packed = records(method=8, body=DEFLATED)
    packed(tmp_path / "a.npz", VALID)
    assert len(read_all(checkpoints.read, tmp_path / "a.npz")) == len(VALID)


@pytest.mark.parametrize("row", DAMAGE)
def test_damage(row, tmp_path, monkeypatch):
    damage, error, message = DAMAGE[row]
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "damaged.npz"
    damage(path, VALID)
    with pytest.raises(error, match=message) as raised:
        read_all(google_npz.read, path)
    assert "damaged.npz" in str(raised.value)
    assert "\x1b" not in str(raised.value)
    with pytest.raises(errors.CheckpointError):
        read_all(checkpoints.read, path)
    assert os.listdir(tmp_path) == ["damaged.npz"]


@pytest.mark.parametrize("row", BOMBS)
def test_bombs_take_no_memory(row, tmp_path):
    damage, error, message = BOMBS[row]
    path = tmp_path / "bomb.npz"
    damage(path, VALID)
    tracemalloc.start()
    try:
        with pytest.raises(error, match=message):
            read_all(google_npz.read, path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 32 << 20


def test_a_bomb_beside_the_layout_is_not_opened(tmp_path):
    path = tmp_path / "bomb.npz"
    bomb_as("bomb", f"({1 << 28},)")(path, VALID)
    tracemalloc.start()
    try:
        checkpoint = google_npz.read(path)
        read = {name: checkpoint[name].shape for name in checkpoint}
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert checkpoint.extra == ("resnet/bomb",)
    assert len(read) == len(VALID)
    assert peak < 32 << 20


def test_the_payload_of_the_pickle_works(tmp_path):
    path = tmp_path / "evil.npz"
    pickled(path, VALID)
    with np.load(path, allow_pickle=True) as read:
        read[f"resnet/{GAMMA}"]
    assert (tmp_path / "evil").is_dir()


def test_a_damaged_header_does_not_warn(tmp_path):
    DAMAGE["header with a bad escape"][0](tmp_path / "a.npz", VALID)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with pytest.raises(FORMAT, match=GAMMA):
            google_npz.read(tmp_path / "a.npz")
    assert caught == []


def test_every_damaged_array_is_named_at_once(tmp_path):
    path = tmp_path / "a.npz"
    bad = {
        f"resnet/{GAMMA}": b"",
        f"resnet/{BETA}": np.zeros(256, int),
        f"resnet/{BIAS}": raw_npy(head_of("(-10,)")),
    }
    path.write_bytes(zipped(VALID | bad))
    with pytest.raises(FORMAT) as raised:
        google_npz.read(path)
    for name in (GAMMA, BETA, BIAS):
        assert name in str(raised.value)


def test_random_damage_is_refused_or_harmless(tmp_path):
    """Flips bytes in headers and the directory, or cuts; nothing else."""
    rng = np.random.default_rng(0)
    content = zipped(VALID)
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        starts = [info.header_offset for info in archive.infolist()]
    directory = content.index(b"PK\1\2")
    path = tmp_path / "a.npz"
    refused = 0
    for attempt in range(300):
        damaged = bytearray(content)
        if attempt % 10 == 0:
            del damaged[rng.integers(len(content)) :]
        for _ in range(rng.integers(1, 4)):
            if rng.random() < 0.5:
                at = directory + rng.integers(len(content) - directory)
            else:
                at = rng.choice(starts) + rng.integers(200)
            if at < len(damaged):
                damaged[at] = rng.integers(256)
        path.write_bytes(damaged)
        google_npz.sniff(path)
        try:
            read = google_npz.read(path)
            arrays = {name: read[name] for name in read}
        except errors.CheckpointError:
            refused += 1
            continue
        for name, array in arrays.items():
            original = VALID[f"resnet/{name}"].reshape(array.shape)
            np.testing.assert_array_equal(array, original)
    assert refused > 150
