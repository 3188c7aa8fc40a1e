"""Decodes and resizes pictures: the only file that knows 255.

A picture becomes uint8 [h, w, 3] RGB through `decode`, float32 in [0, 1]
through `as_float`, and the input of a model through `preprocess`. What is not
a whole picture is an error, never a blank or a partly grey one.
"""

import contextlib
import functools
import io
import math
import os
import re
import struct
import threading
import warnings
import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np
from PIL import Image, ImageCms, UnidentifiedImageError

from bit_tf import download, presets, resampling
from bit_tf.errors import (
    ImageDecodeError,
    ImageError,
    ImageRangeError,
    ImageTooLargeError,
    UnknownNameError,
    brief,
)
from bit_tf.presets import PRESETS, Preset, preset

__all__ = [
    "PRESETS",
    "Preset",
    "as_float",
    "decode",
    "measure",
    "preprocess",
    "preset",
    "resize",
    "to_pil",
    "to_unit_range",
]

_MAX_PIXELS = 178_956_970
_TOLERANCE = 1e-6
_SOURCES = (str, os.PathLike, bytes, bytearray, memoryview)

# EPS and WMF are absent on purpose: they run programs.
_FORMATS = [
    *("JPEG", "PNG", "GIF", "BMP", "DIB", "WEBP", "TIFF", "PPM", "ICO"),
    *("JPEG2000", "AVIF"),
]

_FOREIGN_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    AssertionError,
    ArithmeticError,
    EOFError,
    MemoryError,
    RuntimeError,
    struct.error,
    zlib.error,
    ImageCms.PyCMSError,
)

_ACCEPTED = (
    "a path, an http, https or data URL, bytes, a binary file object, a "
    "PIL.Image.Image, or an array [h, w, 3]"
)

_PNG, _OWN = "Render it to PNG", "Give the address of the picture itself"
_NOT_PICTURES = (
    (rb"\s*<svg|\s*<\?xml.*<svg", "an SVG drawing", _PNG),
    (rb"\s*<(!doctype\s+html|html|head)", "an HTML page", _OWN),
    (rb"%!PS|\xc5\xd0\xd3\xc6", "a PostScript file", _PNG),
    (rb"%PDF", "a PDF document", _PNG),
    (rb"PK\x03\x04|PK\x05\x06|\x1f\x8b", "an archive", "Unpack it"),
    (rb"....ftyp(hei|hev|mif|msf)", "a HEIF picture", "Save it as JPEG"),
    (rb"version https://git-lfs", "a Git LFS pointer", "Run git lfs pull"),
    (rb"\s*[{\[]", "JSON text", _OWN),
)

_ORIENTATIONS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def decode(
    image: Any,
    *,
    max_pixels: int = _MAX_PIXELS,
    max_bytes: int = download.MAX_BYTES,
    timeout: float = download.TIMEOUT,
    public_only: bool = False,
) -> np.ndarray:
    """Decodes one picture.

    Files are JPEG, PNG, GIF, BMP, WebP, TIFF, PPM, ICO, JPEG 2000 or AVIF; of
    an animation, the first frame. The EXIF orientation is applied, what is
    transparent is laid over white, and 16 bits are rounded to 8.

    Args:
      image: a path; an http, https or data URL; bytes; a binary file object,
        read from where it stands; a PIL.Image.Image; or an array [h, w] or
        [h, w, 1 to 4] (grey, grey and alpha, RGB, RGBA) of bool, uint8,
        uint16, other integers in [0, 255], or floats in [0, 1].
      max_pixels: the largest h · w, judged before pixels are decoded.
      max_bytes: the largest file, in bytes.
      timeout: seconds that an http or https URL may take as a whole.
      public_only: refuses URLs of hosts without a public address.

    Returns:
      uint8 [h, w, 3], RGB, in [0, 255]; never the caller's own memory.

    Raises:
      ImageDecodeError: not a picture, or a damaged one.
      ImageTooLargeError: more than max_pixels or max_bytes.
      ImageRangeError: a type, dtype, shape or range that is not accepted.
      ImageFetchError: a file or URL that cannot be read.
    """
    if isinstance(image, Image.Image):
        with _quiet_pillow, _decoding(max_pixels):
            _check_pixels(*image.size, max_pixels)
            return _from_pillow(image)
    if isinstance(image, _SOURCES) or hasattr(image, "read"):
        data = download.read_source(
            image,
            max_bytes=max_bytes,
            timeout=timeout,
            public_only=public_only,
        )
        return _from_bytes(data, max_pixels)
    if hasattr(image, "__array__") or isinstance(image, (list, tuple)):
        return _from_array(image)
    raise ImageRangeError(
        f"An image is {_ACCEPTED}. Received: {brief(image)} of type "
        f"{type(image).__name__}. Pass one of these."
    )


def measure(data: bytes) -> tuple[int, int]:
    """The size that a picture file says it has; its pixels are not decoded.

    Args:
      data: the file's bytes.

    Returns:
      (height, width), before the EXIF orientation; (0, 0) of what decode()
      would refuse for its header.
    """
    with (
        _quiet_pillow,
        contextlib.suppress(ImageError),
        _decoding(_MAX_PIXELS),
    ):
        _check_icon(data, _MAX_PIXELS)
        with Image.open(io.BytesIO(data), formats=_formats()) as picture:
            _check_pixels(*picture.size, _MAX_PIXELS)
            return picture.height, picture.width
    return 0, 0


def as_float(image: np.ndarray) -> np.ndarray:
    """Scales a picture, or a batch, to the range of models.

    Args:
      image: uint8 in [0, 255], or floats in [0, 1]; [h, w, 3] or
        [n, h, w, 3].

    Returns:
      float32 in [0, 1], of the same shape.

    Raises:
      ImageRangeError: another dtype, shape or range.
    """
    image = np.asarray(image)
    _check_shape(image)
    if image.dtype == np.uint8:
        return image.astype(np.float32) / np.float32(255)
    if image.dtype.kind == "f":
        return _unit_floats(image).astype(np.float32)
    raise ImageRangeError(
        "Pictures are uint8 in [0, 255] or floats in [0, 1]. Received: dtype "
        f"{image.dtype}. Cast the array to one of these."
    )


def to_pil(image: np.ndarray) -> Image.Image:
    """A picture to look at or to save.

    Args:
      image: [h, w, 3], uint8 in [0, 255] or floats in [0, 1].

    Raises:
      ImageRangeError: another shape or range.
    """
    return Image.fromarray(_from_array(image))


def to_unit_range(x: Any) -> Any:
    """Scales a tensor inside a model or a graph to the range of models.

    Values are not looked at: floats are taken to be in [0, 1].

    Args:
      x: a tensor of any Keras backend, symbolic or not, or an array; uint8 in
        [0, 255], or floats in [0, 1].

    Returns:
      float32 in [0, 1] for uint8; floats as they are.

    Raises:
      ImageRangeError: another dtype.
    """
    import keras

    received = getattr(x, "dtype", type(x).__name__)
    try:
        dtype = keras.backend.standardize_dtype(received)
        floating = keras.backend.is_float_dtype(dtype)
    except ValueError:
        dtype, floating = str(received), False
    if dtype == "uint8":
        return keras.ops.divide(keras.ops.cast(x, "float32"), 255.0)
    if floating:
        return x
    raise ImageRangeError(
        "Images enter as float in [0,1] or uint8 in [0,255]. Received: "
        f"{dtype}. Cast the images to one of these."
    )


def resize(
    image: np.ndarray,
    height: int,
    width: int,
    *,
    method: str = "bilinear",
    antialias: bool,
) -> np.ndarray:
    """Resizes one picture, as Pillow or as tf.image.resize does.

    Args:
      image: uint8 in [0, 255] or floats in [0, 1], [h, w, 3].
      height: rows of the result.
      width: columns of the result.
      method: "bilinear" or "bicubic".
      antialias: True is Pillow's filter, which timm and transformers use;
        False is that of tf.image.resize without antialias, in float32.

    Returns:
      [height, width, 3]: with antialias, uint8 for uint8 and float32 in
      [0, 1] for floats; without, float32 in [0, 1].

    Raises:
      ImageRangeError: another dtype, shape or range, or no positive size.
      ImageTooLargeError: the result would have over 178956970 pixels.
      UnknownNameError: another method.
    """
    if method not in ("bilinear", "bicubic"):
        raise UnknownNameError(
            "The method is 'bilinear' or 'bicubic'. Received: "
            f"{brief(method)}. Pass one of these."
        )
    image = np.asarray(image)
    if image.ndim != 3:
        raise ImageRangeError(
            f"One picture is [h, w, 3]. Received: shape {image.shape}. Pass "
            "the pictures of a batch one by one."
        )
    for edge in (height, width):
        if not isinstance(edge, (int, np.integer)) or edge < 1:
            raise ImageRangeError(
                "height and width are integers of 1 or more. Received: "
                f"{brief(height)}, {brief(width)}. Pass such a size."
            )
    _check_pixels(width, height, _MAX_PIXELS)
    _check_shape(image)
    if not antialias:
        result = as_float(image)
        taps = resampling.bilinear_taps
        if method == "bicubic":
            taps = resampling.bicubic_taps
        edges = [(0, height), (1, width)]
        if height * image.shape[1] > width * image.shape[0]:
            edges.reverse()
        for axis, edge in edges:
            result = result.swapaxes(0, axis)
            result = resampling.resample(result, *taps(len(result), edge))
            result = result.swapaxes(0, axis)
        return np.ascontiguousarray(np.clip(result, 0, 1))
    _check_pixels(width, image.shape[0], _MAX_PIXELS)
    chosen = Image.Resampling[method.upper()]
    if image.dtype == np.uint8:
        picture = Image.fromarray(np.ascontiguousarray(image))
        return np.array(picture.resize((width, height), chosen))
    channels = [
        np.asarray(Image.fromarray(channel).resize((width, height), chosen))
        for channel in np.ascontiguousarray(as_float(image).transpose(2, 0, 1))
    ]
    return np.clip(np.stack(channels, axis=-1), 0, 1)


def preprocess(image: Any, preset: str | Preset) -> np.ndarray:
    """Prepares one picture as the makers of a checkpoint did.

    Args:
      image: anything that decode() takes; floats [h, w, 3] in [0, 1] are not
        rounded to 8 bits.
      preset: a Preset, or the name of one.

    Returns:
      float32 [h, w, 3], RGB, in [0, 1]: square unless the preset keeps the
      picture's size.

    Raises:
      ImageError: as decode() and resize() do.
      ImageRangeError: the crop is larger than the resized picture.
      UnknownNameError: no such preset.
    """
    row = preset if isinstance(preset, Preset) else presets.preset(preset)
    pixels = _unrounded(image)
    if pixels is None:
        pixels = decode(image)
    if row.resize != "none":
        if row.size is None:
            raise ImageRangeError(
                f"A preset that resizes has a size. Received: {row}. Set it."
            )
        height = width = row.size
        if row.resize == "shortest_edge":
            height, width = _shortest_edge(pixels, row.size)
        pixels = resize(
            pixels, height, width, method=row.method, antialias=row.antialias
        )
    if row.crop is not None:
        pixels = _centre(pixels, row.crop, row.offset)
    return as_float(pixels)


def _unrounded(image: Any) -> np.ndarray | None:
    """Floats [h, w, 3] of any array library as they are; None for others."""
    if not hasattr(image, "__array__") or isinstance(image, Image.Image):
        return None
    values = _values(image)
    if values.dtype.kind == "f" and values.ndim == 3 and values.shape[2] == 3:
        return as_float(values)
    return None


def _shortest_edge(image: np.ndarray, size: int) -> tuple[int, int]:
    height, width = image.shape[:2]
    if height <= width:
        return size, int(size * width / height)
    return int(size * height / width), size


def _centre(image: np.ndarray, crop: int, offset: str) -> np.ndarray:
    height, width = image.shape[:2]
    if not 0 < crop <= min(height, width):
        raise ImageRangeError(
            f"A centre crop lies inside the picture. Received: crop {crop} of "
            f"{height} × {width} pixels. Resize to at least the crop."
        )
    whole = round if offset == "round" else math.floor
    top, left = whole((height - crop) / 2), whole((width - crop) / 2)
    return image[top : top + crop, left : left + crop]


def _check_pixels(width: int, height: int, max_pixels: int) -> None:
    if width * height > max_pixels:
        raise ImageTooLargeError(
            f"A picture may have at most {max_pixels} pixels. Received: "
            f"{width} × {height}. Make the picture smaller, or raise "
            "max_pixels where there is one."
        )


def _check_icon(data: bytes, max_pixels: int) -> None:
    """Judges the pictures inside an ICO, which Pillow decodes on opening."""
    if not data.startswith(b"\0\0\1\0"):
        return
    for entry in range(struct.unpack_from("<H", data, 4)[0]):
        (start,) = struct.unpack_from("<I", data, 6 + 16 * entry + 12)
        if data.startswith(b"\x89PNG", start):
            width, height = struct.unpack_from(">II", data, start + 16)
        elif data.startswith(b"\x0c\0\0\0", start):
            width, height = struct.unpack_from("<HH", data, start + 4)
        else:
            width, height = struct.unpack_from("<ii", data, start + 4)
            height //= 2
        _check_pixels(abs(width), abs(height), max_pixels)


class _QuietPillow:
    """Ignores Pillow's warnings while any thread decodes.

    warnings.catch_warnings alone would leave its filters behind when two
    threads overlap.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._users = 0

    def __enter__(self) -> None:
        with self._lock:
            if self._users == 0:
                self._caught = warnings.catch_warnings()
                self._caught.__enter__()
                warnings.filterwarnings("ignore", module=r"PIL\.")
            self._users += 1

    def __exit__(self, *exc_info: object) -> None:
        with self._lock:
            self._users -= 1
            if self._users == 0:
                self._caught.__exit__(None, None, None)


_quiet_pillow = _QuietPillow()


@contextlib.contextmanager
def _decoding(max_pixels: int) -> Iterator[None]:
    """Turns what Pillow raises on damaged files into our exceptions."""
    try:
        yield
    except ImageError:
        raise
    except Image.DecompressionBombError as error:
        raise ImageTooLargeError(
            f"A picture may have at most {min(max_pixels, _MAX_PIXELS)} "
            f"pixels. Received: {error} Make the picture smaller."
        ) from error
    except _FOREIGN_ERRORS as error:
        raise ImageDecodeError(
            "A picture must be whole and undamaged. Received: one that fails "
            f"with {type(error).__name__}: {error}. Get the file again, or "
            "save it as PNG."
        ) from error


@functools.cache
def _formats() -> tuple[str, ...]:
    """The formats that are accepted and that this build of Pillow reads."""
    Image.init()
    return tuple(name for name in _FORMATS if name in Image.OPEN)


def _from_bytes(data: bytes, max_pixels: int) -> np.ndarray:
    with _quiet_pillow, _decoding(max_pixels):
        _check_icon(data, max_pixels)
        try:
            picture = Image.open(io.BytesIO(data), formats=_formats())
        except UnidentifiedImageError as error:
            raise _not_a_picture(data) from error
        with picture:
            _check_pixels(*picture.size, max_pixels)
            if picture.format == "PNG":
                # Pillow does not look at the checksums of pixels otherwise.
                with Image.open(io.BytesIO(data), formats=["PNG"]) as again:
                    again.verify()
            return _from_pillow(picture)


def _not_a_picture(data: bytes) -> ImageDecodeError:
    head = data[:1024].removeprefix(b"\xef\xbb\xbf")
    what = f"{len(data)} bytes that begin {head[:16]!r}"
    remedy = "Save the picture as PNG or JPEG"
    if not data:
        what, remedy = "no bytes at all", "Check where they come from"
    for pattern, name, advice in _NOT_PICTURES:
        if re.match(pattern, head, re.IGNORECASE | re.DOTALL):
            what, remedy = name, advice
            break
    return ImageDecodeError(
        "A picture is a whole file in one of the formats "
        f"{', '.join(_formats())}. "
        f"Received: {what}. {remedy}."
    )


def _from_pillow(image: Image.Image) -> np.ndarray:
    image.load()
    try:
        turn = _ORIENTATIONS.get(image.getexif().get(0x0112, 1))
    except _FOREIGN_ERRORS:
        turn = None  # Damaged EXIF says nothing of how the picture stands.
    if turn is not None:
        image = image.transpose(turn)
    if image.mode == "F" or image.mode.startswith("I"):
        return _rgb(_deep_grey(image))
    if image.has_transparency_data:
        if image.mode == "La":
            image = image.convert("LA")
        return _rgb(np.asarray(image.convert("RGBA")))
    return _rgb(np.asarray(image.convert("RGB")))


def _deep_grey(image: Image.Image) -> np.ndarray:
    """uint8 [h, w] of Pillow's modes I, I;16 and F."""
    values = np.asarray(image)
    if image.mode == "F" or not values.size:
        return _eight_bits(values)
    low, high = int(values.min()), int(values.max())
    if low < 0 or high > 65535:
        raise ImageRangeError(
            "Grey pictures of more than 8 bits hold 0 to 65535. Received: "
            f"{low} to {high}. Scale the picture to 8 or 16 bits."
        )
    grey = _eight_bits(values.astype(np.uint16))
    hidden = image.info.get("transparency")
    return grey if hidden is None else np.where(values == hidden, 255, grey)


def _values(image: Any) -> np.ndarray:
    try:
        return np.asarray(image)
    except _FOREIGN_ERRORS as error:
        raise ImageRangeError(
            f"An image is {_ACCEPTED}. Received: {brief(image)} of type "
            f"{type(image).__name__}, which gives no array ({error}). Pass "
            "one of these."
        ) from error


def _from_array(image: Any) -> np.ndarray:
    values = _values(image)
    if values.dtype.kind not in "buif" or np.ma.is_masked(image):
        raise ImageRangeError(
            "An array holds bool, integers or floats, none of them masked. "
            f"Received: dtype {values.dtype}. Cast it, or pass the picture's "
            "bytes."
        )
    shape = values.shape
    if len(shape) == 2:
        shape = (*shape, 1)
    if len(shape) != 3 or shape[2] not in (1, 2, 3, 4) or 0 in shape:
        remedy = "Pass [h, w] or [h, w, channels]"
        if len(shape) == 4:
            remedy = "Pass the images of a batch one by one"
        elif len(shape) == 3 and shape[0] in (1, 3, 4) and min(shape[1:]) > 4:
            remedy = "Put the channels last: image.transpose(1, 2, 0)"
        raise ImageRangeError(
            "An array has the shape [h, w] or [h, w, 1 to 4] and is not "
            f"empty. Received: {list(values.shape)}. {remedy}."
        )
    return _rgb(_eight_bits(values))


def _eight_bits(values: np.ndarray) -> np.ndarray:
    """Values of any accepted dtype as uint8."""
    if values.dtype == np.uint8:
        return values
    if values.dtype.kind == "b":
        return values * np.uint8(255)
    if values.dtype.kind == "f":
        return np.rint(_unit_floats(values) * 255).astype(np.uint8)
    if values.dtype.kind == "u" and values.dtype.itemsize == 2:
        return ((values.astype(np.uint32) + 128) // 257).astype(np.uint8)
    low, high = int(values.min()), int(values.max())
    if low < 0 or high > 255:
        raise ImageRangeError(
            f"Integers of dtype {values.dtype} must lie in [0, 255]. Received: "
            f"{low} to {high}. Cast 16-bit pictures to uint16, others to uint8."
        )
    return values.astype(np.uint8)


def _unit_floats(values: np.ndarray) -> np.ndarray:
    low, high = float(values.min()), float(values.max())
    if not (low >= -_TOLERANCE and high <= 1 + _TOLERANCE):
        raise ImageRangeError(
            "Floats must be finite and lie in [0, 1]. Received: values from "
            f"{low:g} to {high:g}. Divide 0..255 by 255, or undo a "
            "normalization."
        )
    return values.clip(0, 1)


def _rgb(pixels: np.ndarray) -> np.ndarray:
    """uint8 [h, w] or [h, w, 1 to 4] as a new [h, w, 3], over white."""
    if not pixels.size:
        raise ImageRangeError(
            f"A picture is not empty. Received: shape {list(pixels.shape)}. "
            "Pass one with pixels."
        )
    if pixels.ndim == 2:
        pixels = pixels[..., None]
    if pixels.shape[-1] in (2, 4):
        alpha = pixels[..., -1:].astype(np.uint16)
        white = 255 * (255 - alpha)
        mixed = (pixels[..., :-1] * alpha + white + 127) // 255
        pixels = mixed.astype(np.uint8)
    if pixels.shape[-1] == 1:
        return np.repeat(pixels, 3, axis=-1)
    return np.array(pixels, order="C")


def _check_shape(image: np.ndarray) -> None:
    if image.ndim not in (3, 4) or image.shape[-1] != 3 or not image.size:
        raise ImageRangeError(
            "Pictures are [h, w, 3] or [n, h, w, 3], and not empty. Received: "
            f"shape {image.shape}. Call decode() for other pictures."
        )
