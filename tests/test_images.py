"""Pictures that are odd or hostile, and resizing against its originals."""

import base64
import dataclasses
import functools
import io
import itertools
import os
import struct
import subprocess
import sys
import threading
import warnings
import zipfile
import zlib

import keras
import numpy as np
import pytest
import tensorflow as tf
from PIL import Image, ImageFile
from sklearn import datasets

from bit_tf import images
from bit_tf.errors import (
    ImageDecodeError,
    ImageError,
    ImageFetchError,
    ImageRangeError,
    ImageTooLargeError,
    UnknownNameError,
)
from bit_tf.images import decode


@functools.cache
def photo(name="flower.jpg"):
    return datasets.load_sample_image(name)


def noise(*shape, seed=0, dtype=np.uint8):
    high = 256 if dtype == np.uint8 else 65536
    return np.random.default_rng(seed).integers(0, high, shape).astype(dtype)


def saved(pixels, kind, **options):
    picture = pixels
    if not isinstance(pixels, Image.Image):
        picture = Image.fromarray(pixels)
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()


def chunk(name, body, crc=None):
    crc = zlib.crc32(name + body) if crc is None else crc
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", crc)


def png(width, height, depth, colour, rows, *extra):
    """A PNG of given bits; rows with their filter bytes."""
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + b"".join(extra)
        + chunk(b"IDAT", zlib.compress(rows))
        + chunk(b"IEND", b"")
    )


def cut(data, part):
    return data[: int(len(data) * part)]


def flipped(data, place, mask=0xFF):
    damaged = bytearray(data)
    damaged[place] ^= mask
    return bytes(damaged)


def grey(values):
    return np.repeat(np.uint8(values)[..., None], 3, axis=-1)


SMALL = noise(5, 7, 3)
TURNED = np.uint8(
    [[[10] * 3, [20] * 3, [30] * 3], [[40] * 3, [50] * 3, [60] * 3]]
)
ORIENTED = {
    1: [[10, 20, 30], [40, 50, 60]],
    2: [[30, 20, 10], [60, 50, 40]],
    3: [[60, 50, 40], [30, 20, 10]],
    4: [[40, 50, 60], [10, 20, 30]],
    5: [[10, 40], [20, 50], [30, 60]],
    6: [[40, 10], [50, 20], [60, 30]],
    7: [[60, 30], [50, 20], [40, 10]],
    8: [[30, 60], [20, 50], [10, 40]],
}


def oriented(value, kind="PNG"):
    exif = Image.Exif()
    exif[0x0112] = value
    return saved(TURNED, kind, exif=exif.tobytes())


def palette():
    picture = Image.new("P", (2, 1))
    picture.putpalette([200, 0, 0, 0, 100, 0])
    picture.putdata([0, 1])
    return picture


def jpeg_with_exif(exif):
    """A JPEG whose EXIF segment holds any bytes."""
    data = saved(grey(np.full((8, 8), 128)), "JPEG")
    body = b"Exif\0\0" + exif
    return (
        data[:2]
        + b"\xff\xe1"
        + struct.pack(">H", len(body) + 2)
        + body
        + data[2:]
    )


def icon(inner, width=2, height=2):
    entry = struct.pack("<BBBBHHII", width, height, 0, 0, 1, 32, len(inner), 22)
    return struct.pack("<HHH", 0, 1, 1) + entry + inner


def gif_screen(width, height):
    data = saved(palette(), "GIF")
    return data[:6] + struct.pack("<HH", width, height) + data[10:]


def animation(kind):
    frames = [Image.new("RGB", (4, 3), colour) for colour in ("red", "blue")]
    options = {"lossless": True} if kind == "WEBP" else {}
    return saved(
        frames[0], kind, save_all=True, append_images=frames[1:], **options
    )


def data_url(data, head="data:image/png;base64,"):
    return head + base64.b64encode(data).decode()


def zipped():
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("a.png", b"x")
    return file.getvalue()


def closed_file():
    file = io.BytesIO(saved(SMALL, "PNG"))
    file.close()
    return file


def advanced_file():
    file = io.BytesIO(b"junk" + saved(SMALL, "PNG"))
    file.seek(4)
    return file


def closed_picture():
    picture = Image.open(io.BytesIO(saved(SMALL, "PNG")))
    picture.close()
    return picture


class Unreadable:
    def read(self, size):
        raise OSError("the disk is gone")


class Stingy:
    """Gives one byte at a time, as sockets may."""

    def __init__(self, data):
        self.file = io.BytesIO(data)

    def read(self, size):
        return self.file.read(1)


class Tensor:
    def __array__(self, dtype=None, copy=None):
        return SMALL


class OnDevice:
    def __array__(self, dtype=None, copy=None):
        raise TypeError("copy it to the host first")


def bad(error, words):
    return (error, words)


DECODE, TOO_LARGE = ImageDecodeError, ImageTooLargeError
RANGE, FETCH = ImageRangeError, ImageFetchError
DAMAGED = bad(DECODE, "must be whole and undamaged")
UNKNOWN = bad(DECODE, "one of the formats")
JPEG = functools.partial(saved, photo()[:64, :64], "JPEG")
RGBA = np.uint8([[[200, 100, 0, 0], [200, 100, 0, 255], [200, 100, 0, 128]]])
OVER_WHITE = [[[255, 255, 255], [200, 100, 0], [227, 177, 127]]]
DEEP = np.uint16([[0, 128, 129, 257], [32768, 65406, 65407, 65535]])
SHALLOW = grey([[0, 0, 1, 1], [128, 254, 255, 255]])
BOMB = png(100_000, 100_000, 1, 0, b"\0")

# id, what makes the input, and the error with its words or the exact pixels.
TABLE = [
    # Damaged files.
    *(
        (f"{kind} cut at {part}", functools.partial(cut, data, part), DAMAGED)
        for kind, data in [
            ("jpeg", JPEG()),
            ("progressive jpeg", JPEG(progressive=True)),
            ("png", saved(photo()[:64, :64], "PNG")),
            ("gif", saved(photo()[:64, :64], "GIF")),
            ("bmp", saved(photo()[:64, :64], "BMP")),
            ("ppm", saved(photo()[:64, :64], "PPM")),
        ]
        for part in (0.5, 0.9, 0.99)
    ),
    ("tiff cut", lambda: cut(saved(SMALL, "TIFF"), 0.9), DAMAGED),
    (
        "tiff cut before its tags",
        lambda: cut(saved(SMALL, "TIFF", compression="tiff_lzw"), 0.5),
        bad(DECODE, "whole"),
    ),
    ("webp cut", lambda: cut(saved(SMALL, "WEBP"), 0.6), bad(DECODE, "")),
    ("jpeg of two bytes", lambda: JPEG()[:2], UNKNOWN),
    ("jpeg of its head", lambda: JPEG()[:20], bad(DECODE, "")),
    ("png of its signature", lambda: saved(SMALL, "PNG")[:8], bad(DECODE, "")),
    ("gif of its head", lambda: saved(SMALL, "GIF")[:10], bad(DECODE, "")),
    (
        "png with a wrong header checksum",
        lambda: flipped(saved(SMALL, "PNG"), 29),
        bad(DECODE, ""),
    ),
    (
        "png with a wrong pixel checksum",
        lambda: flipped(saved(SMALL, "PNG"), -13),
        bad(DECODE, "undamaged.*IDAT"),
    ),
    ("png without an end", lambda: saved(SMALL, "PNG")[:-12], DAMAGED),
    ("png without pixels", lambda: png(2, 2, 8, 0, b""), DAMAGED),
    ("png of no width", lambda: png(0, 2, 8, 0, b"\0\0"), bad(DECODE, "")),
    (
        "png with a huge text",
        lambda: png(
            *(1, 1, 8, 0, b"\0\5"),
            chunk(b"zTXt", b"k\0\0" + zlib.compress(b"x" * 2**21)),
        ),
        bad(DECODE, "undamaged.*large"),
    ),
    (
        "tiff with a wild offset",
        lambda: b"II*\0" + struct.pack("<I", 10**9),
        bad(DECODE, ""),
    ),
    (
        "tiff without tags",
        lambda: b"II*\0\x08\0\0\0\0\0\0\0\0\0",
        bad(DECODE, ""),
    ),
    ("icon with a wild offset", lambda: icon(b"")[:22], DAMAGED),
    ("icon without pictures", lambda: b"\0\0\1\0\0\0", bad(DECODE, "")),
    # Bombs.
    ("png bomb", lambda: BOMB, bad(TOO_LARGE, "100000|10000000000")),
    (
        "gif bomb",
        lambda: gif_screen(65535, 65535),
        bad(TOO_LARGE, "178956970 pixels"),
    ),
    (
        "png over the limit",
        lambda: png(13378, 13378, 1, 0, b""),
        bad(TOO_LARGE, "178970884"),
    ),
    (
        "icon with a bomb inside",
        lambda: icon(BOMB),
        bad(TOO_LARGE, "100000 × 100000"),
    ),
    (
        "icon with a bitmap bomb",
        lambda: icon(
            struct.pack("<IiiHHIIiiII", 40, 60000, 120000, 1, 32, *[0] * 6)
        ),
        bad(TOO_LARGE, "60000 × 60000"),
    ),
    # What is no picture.
    ("no bytes", lambda: b"", bad(DECODE, "no bytes at all")),
    ("text", lambda: b"hello", bad(DECODE, "5 bytes that begin b'hello'")),
    ("zeros", lambda: bytes(1000), UNKNOWN),
    ("html", lambda: b"\n<!DOCTYPE html><p>404", bad(DECODE, "an HTML page")),
    ("svg", lambda: b"<svg xmlns='x'/>", bad(DECODE, "SVG.*Render it")),
    (
        "svg after a declaration",
        lambda: b"\xef\xbb\xbf<?xml version='1.0'?>\n<svg/>",
        bad(DECODE, "SVG"),
    ),
    (
        "eps",
        lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EOF\n",
        bad(DECODE, "a PostScript file"),
    ),
    ("eps saved by pillow", lambda: saved(SMALL, "EPS"), bad(DECODE, "PostSc")),
    ("pdf", lambda: saved(SMALL, "PDF"), bad(DECODE, "a PDF document")),
    ("zip", zipped, bad(DECODE, "an archive.*Unpack it")),
    ("json", lambda: b'{"error": 404}', bad(DECODE, "JSON text")),
    ("heic", lambda: b"\0\0\0\x18ftypheic" + bytes(20), bad(DECODE, "HEIF")),
    (
        "git lfs",
        lambda: b"version https://git-lfs.github.com/spec/v1\n",
        bad(DECODE, "git lfs pull"),
    ),
    ("tga, not accepted", lambda: saved(SMALL, "TGA"), UNKNOWN),
    # Exact pixels of every format without loss.
    *(
        (f"{kind} exactly", functools.partial(saved, SMALL, kind), SMALL)
        for kind in ("PNG", "BMP", "DIB", "TIFF", "PPM", "JPEG2000")
    ),
    ("webp exactly", lambda: saved(SMALL, "WEBP", lossless=True), SMALL),
    (
        "tiff of lzw",
        lambda: saved(SMALL, "TIFF", compression="tiff_lzw"),
        SMALL,
    ),
    ("icon of png", lambda: icon(saved(SMALL, "PNG"), 7, 5), SMALL),
    (
        "icon of a bitmap",
        lambda: saved(
            Image.new("RGB", (16, 16), (9, 8, 7)), "ICO", bitmap_format="bmp"
        ),
        np.full((16, 16, 3), [9, 8, 7]),
    ),
    ("jpeg of one pixel", lambda: saved(grey([[128]]), "JPEG"), grey([[128]])),
    ("one pixel", lambda: saved(SMALL[:1, :1], "PNG"), SMALL[:1, :1]),
    ("1 by 5000", lambda: saved(noise(1, 5000, 3), "PNG"), noise(1, 5000, 3)),
    ("5000 by 1", lambda: saved(noise(5000, 1, 3), "PNG"), noise(5000, 1, 3)),
    ("bytes after the end", lambda: saved(SMALL, "PNG") + b"tail", SMALL),
    # Modes.
    ("palette", lambda: saved(palette(), "PNG"), [[[200, 0, 0], [0, 100, 0]]]),
    (
        "palette with a clear colour",
        lambda: saved(palette(), "PNG", transparency=0),
        [[[255, 255, 255], [0, 100, 0]]],
    ),
    (
        "palette with alphas",
        lambda: saved(palette(), "PNG", transparency=b"\x80\xff"),
        [[[227, 127, 127], [0, 100, 0]]],
    ),
    (
        "gif with a clear colour",
        lambda: saved(palette(), "GIF", transparency=0),
        [[[255, 255, 255], [0, 100, 0]]],
    ),
    ("rgba over white", lambda: saved(RGBA, "PNG"), OVER_WHITE),
    (
        "rgba webp",
        lambda: saved(RGBA, "WEBP", lossless=True, exact=True),
        OVER_WHITE,
    ),
    (
        "grey and alpha over white",
        lambda: saved(np.uint8([[[100, 0], [100, 255], [100, 128]]]), "PNG"),
        grey([[255, 100, 177]]),
    ),
    (
        "rgb with a clear colour",
        lambda: png(
            2, 1, 8, 2, b"\0\1\2\3\4\5\6", chunk(b"tRNS", b"\0\1\0\2\0\3")
        ),
        [[[255, 255, 255], [4, 5, 6]]],
    ),
    (
        "deep grey with a clear value",
        lambda: png(
            2, 1, 16, 0, b"\0\x10\x10\x20\x20", chunk(b"tRNS", b"\x10\x10")
        ),
        grey([[255, 32]]),
    ),
    ("grey", lambda: saved(SMALL[..., 0], "PNG"), grey(SMALL[..., 0])),
    (
        "grey jpeg",
        lambda: saved(np.full((8, 8), 77, np.uint8), "JPEG"),
        grey(np.full((8, 8), 77)),
    ),
    ("bits", lambda: png(3, 1, 1, 0, b"\0\xa0"), grey([[255, 0, 255]])),
    ("deep grey png", lambda: saved(DEEP, "PNG"), SHALLOW),
    ("deep grey tiff", lambda: saved(DEEP, "TIFF"), SHALLOW),
    (
        "deep grey big-endian",
        lambda: Image.frombytes("I;16B", (4, 2), DEEP.astype(">u2").tobytes()),
        SHALLOW,
    ),
    ("mode I", lambda: Image.fromarray(DEEP.astype(np.int32)), SHALLOW),
    (
        "mode I too deep",
        lambda: Image.fromarray(np.int32([[65536]])),
        bad(RANGE, "0 to 65535.*65536 to 65536"),
    ),
    (
        "mode I negative",
        lambda: Image.fromarray(np.int32([[-1]])),
        bad(RANGE, "-1 to -1"),
    ),
    (
        "mode F",
        lambda: Image.fromarray(np.float32([[0, 0.5, 1]])),
        grey([[0, 128, 255]]),
    ),
    (
        "float tiff of 0..255",
        lambda: saved(np.float32([[0, 200]]), "TIFF"),
        bad(RANGE, r"\[0, 1\].*from 0 to 200"),
    ),
    (
        "cmyk",
        lambda: Image.new("CMYK", (2, 2), (0, 255, 255, 0)),
        np.full((2, 2, 3), [255, 0, 0]),
    ),
    (
        "ycbcr",
        lambda: Image.new("YCbCr", (2, 2), (90, 128, 128)),
        grey(np.full((2, 2), 90)),
    ),
    ("hsv", lambda: Image.new("HSV", (1, 1), (0, 0, 33)), grey([[33]])),
    (
        "mode La",
        lambda: Image.fromarray(np.uint8([[[100, 128]]])).convert("La"),
        grey([[177]]),
    ),
    (
        "mode RGBa",
        lambda: Image.fromarray(RGBA[:, 1:]).convert("RGBa"),
        [[[200, 100, 0], [227, 177, 127]]],
    ),
    ("mode PA", lambda: palette().convert("PA"), [[[200, 0, 0], [0, 100, 0]]]),
    # EXIF.
    *(
        (f"orientation {value}", functools.partial(oriented, value), grey(seen))
        for value, seen in ORIENTED.items()
    ),
    (
        "orientation 6 of tiff",
        lambda: saved(TURNED, "TIFF", tiffinfo={274: 6}),
        grey(ORIENTED[6]),
    ),
    ("orientation 9", lambda: oriented(9), grey(ORIENTED[1])),
    (
        "exif of garbage",
        lambda: jpeg_with_exif(b"garbage" * 9),
        grey(np.full((8, 8), 128)),
    ),
    (
        "exif cut",
        lambda: jpeg_with_exif(b"II*\0\x08\0\0\0\xff\xff\x12"),
        grey(np.full((8, 8), 128)),
    ),
    (
        "exif of orientation as text",
        lambda: jpeg_with_exif(b"II*\0\x08\0\0\0\1\0\x12\1\2\0\4\0\0\0abc\0"),
        grey(np.full((8, 8), 128)),
    ),
    # Animations.
    *(
        (
            f"first frame of {kind}",
            functools.partial(animation, kind),
            np.full((3, 4, 3), [255, 0, 0]),
        )
        for kind in ("GIF", "WEBP", "PNG", "TIFF")
    ),
    # Texts.
    ("data url", lambda: data_url(saved(SMALL, "PNG")), SMALL),
    (
        "data url without type",
        lambda: data_url(saved(SMALL, "PNG"), "data:;base64,"),
        SMALL,
    ),
    (
        "data url in capitals",
        lambda: data_url(saved(SMALL, "PNG"), "DATA:image/png;BASE64,"),
        SMALL,
    ),
    (
        "data url without padding",
        lambda: data_url(saved(SMALL, "PNG")).rstrip("="),
        SMALL,
    ),
    (
        "data url in lines",
        lambda: (
            data_url(saved(SMALL, "PNG"))[:60]
            + "\r\n "
            + data_url(saved(SMALL, "PNG"))[60:]
        ),
        SMALL,
    ),
    (
        "data url of percents",
        lambda: (
            "data:image/png,"
            + "".join(f"%{byte:02x}" for byte in saved(SMALL, "PNG"))
        ),
        SMALL,
    ),
    (
        "data url without comma",
        lambda: "data:image/png;base64",
        bad(DECODE, "has the form data:"),
    ),
    (
        "data url of bad base64",
        lambda: "data:;base64,!!!!",
        bad(DECODE, "has the form data:"),
    ),
    (
        "data url of odd base64",
        lambda: "data:;base64,AAAAA",
        bad(DECODE, "has the form data:"),
    ),
    ("data url of nothing", lambda: "data:,", bad(DECODE, "no bytes at all")),
    ("data url of text", lambda: "data:,hello", bad(DECODE, "begin b'hello'")),
    *(
        (
            f"{scheme} url",
            functools.partial(str, f"{scheme}://host/a.png"),
            bad(FETCH, f"Only http.*{scheme}://host"),
        )
        for scheme in ("ftp", "file", "gs", "s3", "hdfs")
    ),
    ("http url without host", lambda: "HTTP://", bad(FETCH, "has the form")),
    ("no text", lambda: "", bad(FETCH, "path leads to.*No such file")),
    (
        "no such path",
        lambda: "/no/such.png",
        bad(FETCH, "'/no/such.png'.*No such file"),
    ),
    ("windows path", lambda: "C:\\a.png", bad(FETCH, "A path leads to")),
    ("path with zero byte", lambda: "a\0b.png", bad(FETCH, "null (byte|char)")),
    ("path too long", lambda: "a" * 5000, bad(FETCH, "too long")),
    ("directory", lambda: os.curdir, bad(FETCH, "a directory or a device")),
    ("device", lambda: os.devnull, bad(FETCH, "a directory or a device")),
    # Files and other objects.
    ("file", lambda: io.BytesIO(saved(SMALL, "PNG")), SMALL),
    ("file in its middle", advanced_file, SMALL),
    ("file of single bytes", lambda: Stingy(saved(SMALL, "PNG")), SMALL),
    ("file at its end", io.BytesIO, bad(DECODE, "no bytes at all")),
    ("closed file", closed_file, bad(FETCH, "open for reading.*closed")),
    ("failing file", Unreadable, bad(FETCH, "the disk is gone")),
    (
        "text file",
        lambda: io.StringIO("abc"),
        bad(DECODE, "give bytes.*str.*'rb'"),
    ),
    ("picture", lambda: Image.fromarray(SMALL), SMALL),
    (
        "open picture",
        lambda: Image.open(io.BytesIO(saved(SMALL, "PNG"))),
        SMALL,
    ),
    (
        "open picture, cut",
        lambda: Image.open(io.BytesIO(cut(JPEG(), 0.9))),
        DAMAGED,
    ),
    ("closed picture", closed_picture, DAMAGED),
    (
        "empty picture",
        lambda: Image.new("RGB", (0, 5)),
        bad(RANGE, "not empty"),
    ),
    ("bytearray", lambda: bytearray(saved(SMALL, "PNG")), SMALL),
    ("memoryview", lambda: memoryview(b"ab" + saved(SMALL, "PNG"))[2:], SMALL),
    ("array-like", Tensor, SMALL),
    ("tensor", lambda: tf.constant(SMALL), SMALL),
    ("array-like elsewhere", OnDevice, bad(RANGE, "to the host first")),
    ("none", lambda: None, bad(RANGE, "Received: None of type NoneType")),
    ("int", lambda: 3, bad(RANGE, "of type int")),
    ("dict", lambda: {"bytes": b""}, bad(RANGE, "of type dict")),
    ("list of texts", lambda: ["a.png", "b.png"], bad(RANGE, "dtype <U5")),
    ("empty list", list, bad(RANGE, r"Received: \[0\]")),
    ("ragged list", lambda: [[1, 2], [3]], bad(RANGE, "gives no array")),
    ("list of numbers", lambda: [[0, 255], [7, 8]], grey([[0, 255], [7, 8]])),
    # Arrays.
    ("array", lambda: SMALL, SMALL),
    ("grey array", lambda: SMALL[..., 0], grey(SMALL[..., 0])),
    ("grey array of one channel", lambda: SMALL[..., :1], grey(SMALL[..., 0])),
    ("grey and alpha array", lambda: np.uint8([[[100, 128]]]), grey([[177]])),
    ("rgba array", lambda: RGBA, OVER_WHITE),
    ("strided array", lambda: SMALL[::-2, ::3, ::-1], SMALL[::-2, ::3, ::-1]),
    ("fortran array", lambda: np.asfortranarray(SMALL), SMALL),
    ("bool array", lambda: np.array([[True, False]]), grey([[255, 0]])),
    ("deep array", lambda: DEEP, SHALLOW),
    ("deep big-endian array", lambda: DEEP.astype(">u2"), SHALLOW),
    ("int64 array", lambda: SMALL.astype(np.int64), SMALL),
    (
        "int64 array over 255",
        lambda: np.full((2, 2, 3), 256),
        bad(RANGE, r"\[0, 255\].*256 to 256"),
    ),
    (
        "int8 array below 0",
        lambda: np.full((2, 2, 3), -1, np.int8),
        bad(RANGE, "-1 to -1"),
    ),
    (
        "float array",
        lambda: np.array([[0.0, 0.2, 0.5, 1.0]]),
        grey([[0, 51, 128, 255]]),
    ),
    ("half array", lambda: np.float16([[0, 1]]), grey([[0, 255]])),
    (
        "float array of rounding",
        lambda: np.array([[-1e-7, 1 + 1e-7]]),
        grey([[0, 255]]),
    ),
    (
        "float array of 0..255",
        lambda: SMALL.astype(np.float32),
        bad(RANGE, "Divide 0..255 by 255"),
    ),
    (
        "float array of -1..1",
        lambda: np.array([[-1.0, 1.0]]),
        bad(RANGE, "from -1 to 1"),
    ),
    (
        "float array with nan",
        lambda: np.array([[0.5, np.nan]]),
        bad(RANGE, "finite.*nan"),
    ),
    (
        "float array with inf",
        lambda: np.array([[0.5, np.inf]]),
        bad(RANGE, "finite.*inf"),
    ),
    (
        "channels first",
        lambda: noise(3, 9, 9),
        bad(RANGE, r"transpose\(1, 2, 0\)"),
    ),
    ("batch", lambda: noise(2, 5, 5, 3), bad(RANGE, "one by one")),
    ("batch of one", lambda: noise(1, 5, 5, 3), bad(RANGE, "one by one")),
    ("five channels", lambda: noise(9, 9, 5), bad(RANGE, r"\[9, 9, 5\]")),
    ("no channels", lambda: noise(9, 9, 0), bad(RANGE, r"\[9, 9, 0\]")),
    ("no rows", lambda: noise(0, 9, 3), bad(RANGE, r"not empty.*\[0, 9, 3\]")),
    ("scalar array", lambda: np.array(3), bad(RANGE, r"Received: \[\]")),
    ("vector", lambda: noise(9), bad(RANGE, r"Received: \[9\]")),
    (
        "complex array",
        lambda: np.ones((2, 2), complex),
        bad(RANGE, "complex128"),
    ),
    ("object array", lambda: np.array([[None]]), bad(RANGE, "dtype object")),
    ("text array", lambda: np.array([["a"]]), bad(RANGE, "dtype <U1")),
    (
        "date array",
        lambda: np.array([["2020-01-01"]], "M8[D]"),
        bad(RANGE, "datetime64"),
    ),
    (
        "masked array",
        lambda: np.ma.masked_equal(SMALL, SMALL[0, 0, 0]),
        bad(RANGE, "none of them masked"),
    ),
]


@pytest.mark.parametrize(
    ("make", "expected"),
    [pytest.param(make, expected, id=name) for name, make, expected in TABLE],
)
def test_decode(make, expected):
    if isinstance(expected, tuple):
        error, words = expected
        with pytest.raises(ImageError, match=f"(?s){words}") as caught:
            decode(make())
        assert caught.type is error
        assert "Received: " in str(caught.value)
        return
    pixels = decode(make())
    assert pixels.dtype == np.uint8
    assert pixels.flags.c_contiguous
    assert pixels.flags.writeable
    np.testing.assert_array_equal(pixels, expected)


def test_lab_is_converted_by_colour_management():
    middle = decode(Image.new("LAB", (2, 1), (128, 128, 128)))
    np.testing.assert_allclose(middle, np.full((1, 2, 3), 119), atol=2)


@pytest.mark.parametrize("error", [SyntaxError, struct.error, ValueError])
def test_exif_that_cannot_be_parsed_is_no_orientation(monkeypatch, error):
    def getexif(self):
        raise error("not a TIFF file")

    monkeypatch.setattr(Image.Image, "getexif", getexif)
    np.testing.assert_array_equal(decode(Image.fromarray(SMALL)), SMALL)


def test_files_are_read_from_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "http-é.png"
    path.write_bytes(saved(SMALL, "PNG"))
    for given in (path, str(path), path.name):
        np.testing.assert_array_equal(decode(given), SMALL)
    with open(path, "rb") as file:
        np.testing.assert_array_equal(decode(file), SMALL)
    with (
        open(path, encoding="latin-1") as text,
        pytest.raises(ImageDecodeError, match="mode 'rb'"),
    ):
        decode(text)


def test_urls_pass_their_limits_on(monkeypatch):
    def read_url(url, **limits):
        assert limits == {"max_bytes": 5000, "timeout": 3, "public_only": True}
        assert url == "HTTPS://host/a.png"
        return saved(SMALL, "PNG")

    monkeypatch.setattr(images.download, "read_url", read_url)
    limits = {"max_bytes": 5000, "timeout": 3, "public_only": True}
    np.testing.assert_array_equal(decode("HTTPS://host/a.png", **limits), SMALL)


@pytest.mark.parametrize(
    "wrap",
    [bytes, io.BytesIO, data_url, lambda data: Stingy(data + b"x" * 9)],
    ids=["bytes", "file", "data url", "endless"],
)
def test_max_bytes_is_the_largest_file(wrap):
    data = saved(SMALL, "PNG")
    assert decode(wrap(data), max_bytes=len(data) + 9).shape == SMALL.shape
    with pytest.raises(ImageTooLargeError, match=f"{len(data) - 1} bytes"):
        decode(wrap(data), max_bytes=len(data) - 1)


def test_a_file_is_not_read_past_the_limit():
    file = io.BytesIO(bytes(10 * 2**20))
    with pytest.raises(ImageTooLargeError):
        decode(file, max_bytes=2**20)
    assert file.tell() <= 2 * 2**20


@pytest.mark.parametrize(
    "make",
    [
        functools.partial(saved, SMALL, "PNG"),
        functools.partial(Image.fromarray, SMALL),
        lambda: icon(saved(SMALL, "PNG"), 7, 5),
    ],
)
def test_max_pixels_is_the_largest_picture(make):
    assert decode(make(), max_pixels=35).shape == (5, 7, 3)
    with pytest.raises(ImageTooLargeError, match=r"at most 34.*7 × 5"):
        decode(make(), max_pixels=34)


def test_pixels_are_counted_before_they_are_decoded(monkeypatch):
    def load(self):
        raise AssertionError("pixels were decoded")

    data = saved(SMALL, "JPEG")
    monkeypatch.setattr(ImageFile.ImageFile, "load", load)
    with pytest.raises(ImageTooLargeError):
        decode(data, max_pixels=34)


def test_pillow_keeps_its_settings(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 20)
    np.testing.assert_array_equal(decode(saved(SMALL, "PNG")), SMALL)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    with pytest.raises(ImageTooLargeError, match="35 pixels"):
        decode(saved(SMALL, "PNG"))
    assert Image.MAX_IMAGE_PIXELS == 10
    assert ImageFile.LOAD_TRUNCATED_IMAGES is False


def test_ghostscript_is_never_started(monkeypatch):
    def start(*args, **kwargs):
        raise AssertionError("a program was started")

    monkeypatch.setattr(subprocess, "Popen", start)
    binary = b"\xc5\xd0\xd3\xc6" + struct.pack("<II", 32, 100) + bytes(120)
    for data in (saved(SMALL, "EPS"), binary):
        with pytest.raises(ImageDecodeError, match="PostScript"):
            decode(data)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("PNG", {}),
        ("GIF", {}),
        ("JPEG", {}),
        ("JPEG", {"progressive": True}),
        ("BMP", {}),
        ("WEBP", {}),
        ("WEBP", {"lossless": True}),
        ("TIFF", {}),
        ("PPM", {}),
        ("ICO", {}),
    ],
)
def test_a_cut_file_is_an_error_or_the_whole_picture(kind, options):
    data = saved(photo()[100:124, 100:124], kind, **options)
    whole = decode(data)
    for length in range(len(data)):
        try:
            pixels = decode(data[:length])
        except ImageDecodeError:
            continue
        assert length > 0.9 * len(data)
        np.testing.assert_array_equal(pixels, whole)


@pytest.mark.parametrize(
    "kind",
    ["PNG", "GIF", "JPEG", "BMP", "WEBP", "TIFF", "ICO", "JPEG2000", "PPM"],
)
def test_a_damaged_file_gives_a_picture_or_one_of_our_errors(kind):
    data = saved(photo()[100:116, 100:116], kind)
    random = np.random.default_rng(7)
    for _ in range(150):
        damaged = data
        for place in random.integers(0, len(data), 3):
            damaged = flipped(damaged, place, int(random.integers(1, 256)))
        try:
            pixels = decode(damaged, max_pixels=10**6)
        except ImageError:
            continue
        assert pixels.dtype == np.uint8
        assert pixels.shape[2:] == (3,)


def test_threads_leave_the_filters_of_warnings_alone():
    data = saved(SMALL, "PNG")
    before = list(warnings.filters)
    threads = [
        threading.Thread(target=lambda: [decode(data) for _ in range(40)])
        for _ in range(6)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert list(warnings.filters) == before


def test_the_result_is_a_copy():
    source = SMALL.copy()
    decode(source)[:] = 0
    np.testing.assert_array_equal(source, SMALL)


def test_the_module_does_not_load_keras():
    code = (
        "import sys, bit_tf.images; "
        "sys.exit(bool({'keras', 'tensorflow'} & set(sys.modules)))"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("shape", [(5, 7, 3), (2, 5, 7, 3)])
def test_as_float(shape):
    pixels = noise(*shape)
    floats = images.as_float(pixels)
    assert floats.dtype == np.float32
    np.testing.assert_array_equal(floats, pixels / np.float32(255))
    again = images.as_float(floats.astype(np.float64))
    assert again.dtype == np.float32
    np.testing.assert_array_equal(again, floats)
    nearly = images.as_float(np.full(shape, 1 + 5e-7))
    assert nearly.max() == 1


@pytest.mark.parametrize(
    ("image", "words"),
    [
        (np.full((2, 2, 3), 1.1), "finite and lie"),
        (np.full((2, 2, 3), -0.1), "finite and lie"),
        (np.full((2, 2, 3), np.nan), "finite and lie"),
        (np.full((2, 2, 3), 7), "dtype int64"),
        (np.ones((2, 2, 3), bool), "dtype bool"),
        (noise(2, 2), r"shape \(2, 2\)"),
        (noise(2, 2, 4), r"shape \(2, 2, 4\)"),
        (noise(0, 2, 3), "not empty"),
    ],
)
def test_as_float_refuses(image, words):
    with pytest.raises(ImageRangeError, match=words):
        images.as_float(image)


def test_to_unit_range_scales_uint8():
    pixels = noise(2, 3, 4, 3)
    for given in (pixels, tf.constant(pixels)):
        floats = keras.ops.convert_to_numpy(images.to_unit_range(given))
        assert floats.dtype == np.float32
        np.testing.assert_array_equal(floats, images.as_float(pixels))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_to_unit_range_leaves_floats(dtype):
    tensor = tf.cast([[0.0, 0.25, 1.0]], dtype)
    assert images.to_unit_range(tensor) is tensor
    array = np.zeros((1, 2))
    assert images.to_unit_range(array) is array


def test_to_unit_range_in_graphs_and_functional_models():
    pixels = noise(1, 3, 4, 3)
    traced = tf.function(images.to_unit_range)
    for given in (pixels, images.as_float(pixels)):
        floats = traced(tf.constant(given))
        np.testing.assert_allclose(floats, images.as_float(pixels), atol=1e-7)
    for dtype in ("uint8", "float32"):
        symbol = keras.KerasTensor((None, 3, 4, 3), dtype)
        result = images.to_unit_range(symbol)
        assert (result.shape, result.dtype) == ((None, 3, 4, 3), "float32")


@pytest.mark.parametrize(
    "x",
    [
        np.int64([1]),
        tf.constant([1]),
        np.array([True]),
        tf.constant(["a"]),
        np.complex64([1]),
        [0.5],
        np.array([None]),
    ],
)
def test_to_unit_range_refuses_other_dtypes(x):
    with pytest.raises(
        ImageRangeError, match=r"float in \[0,1\] or uint8 in \[0,255\]"
    ):
        images.to_unit_range(x)


SIZES = [
    (480, 480),
    (128, 128),
    (33, 57),
    (1, 1),
    (900, 701),
    (5, 700),
    (427, 640),
]


@pytest.mark.parametrize("method", ["bilinear", "bicubic"])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", ["flower.jpg", "china.jpg"])
def test_resize_without_antialias_is_that_of_tensorflow(name, size, method):
    picture = photo(name)
    expected = tf.image.resize(picture, size, method).numpy() / 255
    for image in (picture, images.as_float(picture)):
        result = images.resize(image, *size, method=method, antialias=False)
        assert result.dtype == np.float32
        assert result.flags.c_contiguous
        np.testing.assert_allclose(result, expected.clip(0, 1), atol=1e-5)


@pytest.mark.parametrize("method", ["bilinear", "bicubic"])
@pytest.mark.parametrize("before", [(1, 1), (1, 9), (2, 3), (7, 5), (31, 2)])
def test_resize_of_small_pictures_is_that_of_tensorflow(before, method):
    picture = noise(*before, 3)
    for size in itertools.product((1, 2, 3, 7, 30), repeat=2):
        result = images.resize(picture, *size, method=method, antialias=False)
        expected = tf.image.resize(picture, size, method).numpy() / 255
        np.testing.assert_allclose(result, expected.clip(0, 1), atol=1e-5)


@pytest.mark.parametrize("method", ["bilinear", "bicubic"])
@pytest.mark.parametrize("size", SIZES)
def test_resize_with_antialias_is_that_of_pillow(size, method):
    chosen = Image.Resampling[method.upper()]
    picture = Image.fromarray(photo()).resize(size[::-1], chosen)
    result = images.resize(photo(), *size, method=method, antialias=True)
    assert result.dtype == np.uint8
    np.testing.assert_array_equal(result, np.asarray(picture))
    floats = images.resize(
        images.as_float(photo()), *size, method=method, antialias=True
    )
    assert floats.dtype == np.float32
    assert 0 <= floats.min() <= floats.max() <= 1
    difference = np.abs(floats - result / 255)
    assert difference.mean() < 0.5 / 255
    # Between its two passes Pillow clips bytes, which bicubic overshoots.
    assert difference.max() < (2 if method == "bilinear" else 12) / 255


@pytest.mark.parametrize(
    ("image", "size", "method", "error", "words"),
    [
        (SMALL, (0, 3), "bilinear", ImageRangeError, "1 or more.*0, 3"),
        (SMALL, (3, -1), "bilinear", ImageRangeError, "1 or more.*3, -1"),
        (SMALL, (3.5, 3), "bilinear", ImageRangeError, "1 or more.*3.5, 3"),
        (SMALL, (3, 3), "nearest", UnknownNameError, "'nearest'"),
        (SMALL, (10**5, 10**5), "bilinear", ImageTooLargeError, "100000"),
        (SMALL[None], (3, 3), "bilinear", ImageRangeError, "one by one"),
        (SMALL[..., :2], (3, 3), "bilinear", ImageRangeError, r"7, 2\)"),
        (SMALL.astype(int), (3, 3), "bilinear", ImageRangeError, "int64"),
        (SMALL / 1.0, (3, 3), "bilinear", ImageRangeError, "Divide"),
    ],
)
@pytest.mark.parametrize("antialias", [True, False])
def test_resize_refuses(image, size, method, error, words, antialias):
    with pytest.raises(error, match=words):
        images.resize(image, *size, method=method, antialias=antialias)


def test_resize_of_long_pictures_stays_small():
    long = np.zeros((1, 2_000_000, 3), np.uint8)
    for image in (long, long.swapaxes(0, 1)):
        small = images.resize(image, 480, 480, antialias=False)
        assert small.shape == (480, 480, 3)
    with pytest.raises(ImageTooLargeError, match="2000000"):
        images.resize(long.swapaxes(0, 1), 480, 480, antialias=True)


def test_presets_are_the_published_ones():
    table = {
        name: dataclasses.astuple(row)[1:6]
        for name, row in images.PRESETS.items()
    }
    assert table == {
        "big_transfer eval": ("squash", 480, None, "bilinear", False),
        "big_transfer eval 128": ("squash", 128, None, "bilinear", False),
        "tfhub": ("none", None, None, "bilinear", False),
        "timm in21k": ("shortest_edge", 256, 224, "bilinear", True),
        "timm in1k": ("shortest_edge", 448, 448, "bilinear", True),
        "timm in1k 480": ("shortest_edge", 480, 480, "bilinear", True),
        "timm distilled": ("shortest_edge", 256, 224, "bicubic", True),
        "timm teacher 384": ("shortest_edge", 384, 384, "bicubic", True),
        "hf bit-50": ("shortest_edge", 448, 448, "bilinear", True),
        "big_vision fewshot": ("squash", 256, 224, "bilinear", False),
        "vectorhub": ("none", None, None, "bilinear", False),
    }
    assert all(row.name == name for name, row in images.PRESETS.items())


@pytest.mark.parametrize("name", images.PRESETS)
@pytest.mark.parametrize("turn", [False, True])
def test_presets_give_the_input_of_models(name, turn):
    picture = photo().swapaxes(0, 1) if turn else photo()
    result = images.preprocess(picture, name)
    row = images.preset(name)
    side = row.crop or row.size
    assert result.shape == ((side, side, 3) if side else picture.shape)
    assert result.dtype == np.float32
    assert 0 <= result.min() < 0.2 < 0.8 < result.max() <= 1
    same = images.preprocess(saved(picture, "PNG"), row)
    np.testing.assert_array_equal(same, result)


@pytest.mark.parametrize("name", ["flower.jpg", "china.jpg"])
def test_big_transfer_presets_are_the_ops_of_tensorflow(name):
    picture = photo(name)
    for preset, size in (("eval", 480), ("eval 128", 128)):
        expected = tf.image.resize(picture, [size, size]) / 255
        result = images.preprocess(picture, f"big_transfer {preset}")
        np.testing.assert_allclose(result, expected, atol=1e-5)
    squashed = tf.image.resize(picture, [256, 256])
    expected = tf.image.central_crop(squashed, 224 / 256) / 255
    result = images.preprocess(picture, "big_vision fewshot")
    np.testing.assert_allclose(result, expected, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "shape", "box"),
    [
        ("timm in21k", (427, 640), (80, 16, 304, 240)),
        ("timm in21k", (640, 427), (16, 80, 240, 304)),
        ("timm in1k", (448, 451), (2, 0, 450, 448)),
        ("hf bit-50", (448, 451), (1, 0, 449, 448)),
        ("timm in1k", (448, 449), (0, 0, 448, 448)),
        ("timm distilled", (500, 500), (16, 16, 240, 240)),
    ],
)
def test_shortest_edge_and_crop_are_those_of_pillow(name, shape, box):
    row = images.preset(name)
    picture = Image.fromarray(noise(*shape, 3))
    short, long = sorted(picture.size)
    edges = {short: row.size, long: int(row.size * long / short)}
    resized = picture.resize(
        tuple(edges[edge] for edge in picture.size),
        Image.Resampling[row.method.upper()],
    )
    result = images.preprocess(picture, name)
    expected = np.asarray(resized.crop(box)) / np.float32(255)
    np.testing.assert_array_equal(result, expected)


@pytest.mark.slow
def test_hf_preset_is_that_of_transformers():
    transformers = pytest.importorskip("transformers")
    processor = transformers.models.bit.image_processing_pil_bit
    prepare = processor.BitImageProcessorPil(
        size={"shortest_edge": 448},
        crop_size={"height": 448, "width": 448},
        resample=Image.Resampling.BILINEAR,
        do_normalize=False,
    )
    for picture in (photo(), noise(448, 451, 3), noise(701, 300, 3)):
        expected = prepare(Image.fromarray(picture), return_tensors="np")
        result = images.preprocess(picture, "hf bit-50")
        np.testing.assert_allclose(
            result.transpose(2, 0, 1), expected["pixel_values"][0], atol=1e-6
        )


def test_a_long_picture_is_not_resized_beyond_memory():
    with pytest.raises(ImageTooLargeError, match="178956970"):
        images.preprocess(noise(1, 20_000, 3), "timm in1k")
    assert images.preprocess(noise(1, 20_000, 3), "big_transfer eval").shape


def test_a_crop_must_lie_inside():
    row = dataclasses.replace(images.preset("timm in21k"), size=200)
    with pytest.raises(ImageRangeError, match="crop 224 of 200"):
        images.preprocess(photo(), row)
    row = dataclasses.replace(row, size=None)
    with pytest.raises(ImageRangeError, match="has a size"):
        images.preprocess(photo(), row)


def test_unknown_presets_name_the_nearest():
    with pytest.raises(UnknownNameError, match="Did you mean 'timm in21k'"):
        images.preset("timm in21")
    with pytest.raises(UnknownNameError, match="'xyzzy'"):
        images.preprocess(photo(), "xyzzy")
    with pytest.raises(UnknownNameError, match="Received: None"):
        images.preset(None)


def test_the_public_names_exist():
    assert all(hasattr(images, name) for name in images.__all__)
