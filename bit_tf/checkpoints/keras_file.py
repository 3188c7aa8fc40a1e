"""Keras 3's .keras files of this package's own models, as arrays.

A zip archive of config.json, metadata.json and model.weights.h5. The reader
takes the architecture's numbers from the first and arrays from the last:
Keras is not imported, and nothing that a config names is looked up or run.
The writer makes what `model.save` makes, without a model.

Arrays lie where Keras walks: by the attributes of the layers' classes, as
`layers/block_1/units/unit_2/conv_a/vars/0`, the first of a kind without a
number, and variables by the order of their making. Source: keras,
src/saving/saving_lib.py, the same from 3.8 to 3.15.
"""

import dataclasses
import functools
import importlib.metadata
import io
import json
import os
import re
import shutil
import struct
import tempfile
import weakref
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from bit_tf import errors, files, variants
from bit_tf.checkpoints import checkpoint, hdf5, json_files, layout, rename
from bit_tf.checkpoints.facts import KEY, Facts, facts_of

__all__ = [
    "CONFIG",
    "LOOKS_FOR",
    "METADATA",
    "NAME",
    "canonical",
    "config",
    "member",
    "metadata",
    "read",
    "require_suffix",
    "sniff",
    "spell",
    "write",
]

NAME = "keras"
LOOKS_FOR = "a zip archive of config.json and model.weights.h5 (Keras 3)"
CONFIG = "config.json"
METADATA = "metadata.json"

_WEIGHTS = "model.weights.h5"
_CLASS = "bit_tf>ResNetV2"
# Keras reads no dates.
_DATE_SAVED = "1980-01-01@00:00:00"
_MAX_JSON = 1 << 24
_CHUNK = 1 << 20
# Random float32 numbers deflate to nine tenths. Small files of zeros may do
# better than this, and harm nobody.
_MAX_RATIO = 100
_SMALL = 1 << 20
_LOCAL = struct.Struct("<4s5H3I2H")
_ZIP_ERRORS = (
    zipfile.BadZipFile,
    zipfile.LargeZipFile,
    zlib.error,
    struct.error,
    EOFError,
    IndexError,
    NotImplementedError,
    OSError,
    OverflowError,
    RuntimeError,
    ValueError,
)

_SCHEME = rename.Scheme(
    NAME,
    root="layers/root_block/conv/vars/0",
    conv="layers/block_{stage}/units/unit_{layer}/conv_{letter}/vars/0",
    proj="layers/block_{stage}/units/unit_{layer}/conv_proj/vars/0",
    norm="layers/block_{stage}/units/unit_{layer}/norm_{letter}/vars/{leaf}",
    final_norm="layers/group_normalization/vars/{leaf}",
    head_kernel="layers/head/dense/vars/0",
    head_bias="layers/head/dense/vars/1",
    gamma="0",
    beta="1",
    kernel="HWIO",
    head="CN",
)
_FIRST = re.compile(r"\b(block|unit)(?=/)")
_ZEROTH = re.compile(r"\b(block|unit)_0(?=/)")


def spell(name: str) -> str:
    """The HDF5 path of a canonical name; others are left alone."""
    found = _SCHEME.spell(name)
    return found if found == name else _ZEROTH.sub(r"\1", found)


def canonical(path: str) -> str | None:
    """The canonical name of an HDF5 path, or None."""
    return _SCHEME.canonical(_numbered(path))


def _numbered(path: str) -> str:
    # "block_0" is no name of Keras', nor then one of the scheme's.
    return "" if _ZEROTH.search(path) else _FIRST.sub(r"\1_0", path)


def sniff(path: str | os.PathLike[str]) -> bool:
    """Whether a file looks like one of this format; never raises on garbage."""
    try:
        with open(path, "rb") as file:
            if file.read(4) != b"PK\x03\x04":
                return False
            with zipfile.ZipFile(file) as archive:
                return {CONFIG, _WEIGHTS} <= set(archive.namelist())
    except _ZIP_ERRORS:
        return False


def read(path: str | os.PathLike[str]) -> checkpoint.Checkpoint:
    """Opens a .keras file of a `models.ResNetV2`.

    Weights that are stored, as Keras and `write` do, are read in place, and
    their checksum is compared before the first array is given out. Deflated
    ones are inflated to a temporary file, which lives as long as the result.

    Returns:
      A `Checkpoint`. Its numerics and output stride are the config's; preset
      and labels those that `write` recorded in metadata.json.

    Raises:
      FileNotFoundError: there is no such file.
      CheckpointFormatError: the file is not such an archive, is damaged, or
        holds another model.
      CheckpointMismatchError: names or shapes are not those of a BiT-ResNet,
        or not those that the config promises.
    """
    path = Path(path)
    checkpoint.require_file(path)
    with open(path, "rb") as file:
        members = _members(path, file)
        config = _config(path, _json(path, file, members, CONFIG))
        facts = _facts(path, file, members, config)
        weights = _weights(path, file, members[_WEIGHTS])
    try:
        stored = hdf5.datasets(weights.open)
    except errors.CheckpointFormatError as error:
        raise errors.CheckpointFormatError(
            f"{path}: its member {_WEIGHTS} cannot be read: {error}"
        ) from error
    optimizer = [name for name in stored if name.startswith("optimizer/")]
    entries, extra = rename.collect(
        path,
        _SCHEME,
        {
            name: entry._replace(
                load=functools.partial(_load, path, weights, name, entry.load)
            )
            for name, entry in stored.items()
            if name not in optimizer
        },
        _numbered,
    )
    notes = []
    if optimizer:
        notes.append(
            f"skipped optimizer state: optimizer/… ({len(optimizer)} arrays)"
        )
    found = checkpoint.Checkpoint(
        path,
        entries,
        format=NAME,
        facts=facts,
        extra=extra,
        notes=tuple(notes),
        spell=spell,
    )
    if difference := _difference(config, found):
        raise errors.CheckpointMismatchError(
            f"{path}: {CONFIG} and the arrays tell of one model. Received: "
            f"{difference}. {checkpoint.REMEDY}"
        )
    return found


def config(path: str | os.PathLike[str]) -> dict[str, Any]:
    """What config.json of any .keras file holds; nothing of it is run.

    Raises:
      FileNotFoundError: there is no such file.
      CheckpointFormatError: the file is no such archive, or is damaged.
    """
    path = Path(path)
    checkpoint.require_file(path)
    with open(path, "rb") as file:
        return _json(path, file, _members(path, file), CONFIG)


def require_suffix(path: Path) -> None:
    """Refuses a name that Keras would not read a model from.

    Raises:
      CheckpointFormatError: the path does not end in ".keras".
    """
    if path.suffix != ".keras":
        raise errors.CheckpointFormatError(
            "Keras reads a model from a file whose name ends in '.keras'. "
            f"Received: {path.name!r}. Rename it."
        )


def write(
    arrays: Mapping[str, np.ndarray], path: str | os.PathLike[str]
) -> None:
    """Writes what `model.save` writes, from arrays.

    The arrays are taken one at a time, into a file beside the target, which
    is then copied into the archive: it takes the memory of one array, and
    while it runs twice the room on the disk. Two writes of the same arrays
    give the same bytes; therefore the date in metadata.json is of 1980, and
    compiled state there is none. `keras.saving.load_model` reads the file
    where bit_tf.models has been imported.

    Args:
      arrays: canonical name → float array. An attribute `config`, what a
        model's get_config() gives, is written as it is; else one is made of
        the shapes and of the attribute `facts`, in float32, nothing frozen.
      path: the file to write or to replace; it ends in ".keras".

    Raises:
      CheckpointMismatchError: names or shapes are not those of a BiT-ResNet,
        or not those of `config`.
      CheckpointFormatError: an array is not float or holds NaN or infinity,
        or the path has another ending.
      OSError: the file cannot be written.
    """
    path = Path(path)
    require_suffix(path)
    checkpoint.require_place(path)
    shapes = checkpoint.checked_shapes(arrays)
    facts = facts_of(arrays)
    config = getattr(arrays, "config", None)
    config = _default(shapes, facts) if config is None else dict(config)
    if difference := _difference(config, layout.detect(shapes)):
        raise errors.CheckpointMismatchError(
            "A model's config and its arrays tell of one architecture. "
            f"Received: {difference}. Write the config of the same model."
        )
    facts = dataclasses.replace(
        facts,
        numerics=config["numerics"],
        output_stride=config["output_stride"],
    )
    described = {
        "module": "bit_tf.models",
        "class_name": "ResNetV2",
        "config": config,
        "registered_name": _CLASS,
        "build_config": {"input_shape": None},
        "compile_config": {},
    }
    with (
        tempfile.TemporaryDirectory(
            dir=path.parent, prefix=f".{path.name}."
        ) as directory,
        files.new_file(path) as file,
    ):
        weights = Path(directory, _WEIGHTS)
        _write_weights(weights, arrays, shapes, config["name"])
        with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
            archive.writestr(member(METADATA), metadata(facts))
            archive.writestr(member(CONFIG), json.dumps(described))
            info = member(_WEIGHTS, weights.stat().st_size)
            with open(weights, "rb") as source, archive.open(info, "w") as into:
                shutil.copyfileobj(source, into, _CHUNK)
        file.flush()
        _read_back(Path(file.name), shapes, facts)


def member(name: str, size: int = 0) -> zipfile.ZipInfo:
    """What an archive says of a member: stored, and of no date.

    Args:
      name: the member's name.
      size: its bytes if they are known, for zip64 where it is needed.
    """
    info = zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0))
    info.create_system = 3
    info.external_attr = 0o644 << 16
    info.file_size = size
    return info


def metadata(facts: Facts) -> str:
    """The text of metadata.json, with facts that Keras does not read."""
    return json.dumps(
        {
            "keras_version": importlib.metadata.version("keras"),
            "date_saved": _DATE_SAVED,
            KEY: facts.to_json(),
        }
    )


def _difference(
    config: Mapping[str, Any], found: layout.Detected | checkpoint.Checkpoint
) -> str:
    """Says in what a config differs from the arrays' architecture, or ""."""
    for name in ("blocks", "stem_width", "num_classes"):
        promised, held = config[name], getattr(found, name)
        if name == "blocks":
            promised = tuple(promised)
        if promised != held:
            return f"{name}={promised} in the config, and arrays of {held}"
    return ""


def _default(
    shapes: Mapping[str, tuple[int, ...]], facts: Facts
) -> dict[str, Any]:
    """The config of a float32 model with these arrays."""
    blocks, stem_width, num_classes = dataclasses.astuple(layout.detect(shapes))
    known = variants.find_architecture(blocks, stem_width)
    return {
        "name": known.name if known else "resnetv2",
        "trainable": True,
        "blocks": list(blocks),
        "stem_width": stem_width,
        "num_classes": num_classes,
        "output_stride": facts.output_stride,
        "numerics": facts.numerics,
        "frozen": [],
        "dtype": {
            "module": "keras",
            "class_name": "DTypePolicy",
            "config": {"name": "float32"},
            "registered_name": None,
        },
    }


def _write_weights(
    path: Path,
    arrays: Mapping[str, np.ndarray],
    shapes: Mapping[str, tuple[int, ...]],
    model: str,
) -> None:
    import h5py

    with h5py.File(path, "w") as file:
        for group, name in _groups(shapes, model):
            file.create_group(group).attrs["name"] = name
        for name, shape in shapes.items():
            file.create_dataset(
                spell(name), data=checkpoint.take(arrays, name, shape)
            )


def _groups(
    shapes: Mapping[str, tuple[int, ...]], model: str
) -> Iterator[tuple[str, str]]:
    """(path, name of the layer) of every layer's group of variables."""
    yield "vars", model
    yield "layers/input_layer/vars", "images"
    yield "layers/global_average_pooling2d/vars", "pre_logits"
    named: dict[str, str] = {}
    for name in shapes:
        inner, outer = spell(name).split("/"), name.split("/")
        named["/".join(inner[:-1])] = outer[-2]
        if inner[1] != "group_normalization":
            named["/".join([*inner[:2], "vars"])] = outer[0]
        if "units" in inner:
            named["/".join([*inner[:4], "vars"])] = outer[1]
    yield from sorted(named.items())


def _read_back(
    path: Path, shapes: Mapping[str, tuple[int, ...]], facts: Facts
) -> None:
    written = read(path)
    if written.shapes != shapes or written.facts != facts:
        raise errors.CheckpointFormatError(
            f"{path}: what was written must read back the same. Received: "
            f"{len(written)} arrays for {len(shapes)}. The disk or its file "
            "system is at fault; write elsewhere."
        )


class _Member(NamedTuple):
    """Where a member lies in the archive, as both of its records say."""

    offset: int
    compressed: int
    size: int
    crc: int
    deflated: bool


class _Weights(NamedTuple):
    """model.weights.h5: `open` gives it as a file; `verify` may raise."""

    open: Callable[[], BinaryIO]
    verify: Callable[[], None]


class _Window(io.RawIOBase):
    """A part of a file, as a file to read; it closes that file."""

    def __init__(self, path: Path, start: int, size: int):
        self._file = open(path, "rb", buffering=0)  # noqa: SIM115
        self._start, self._size, self._at = start, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._size}
        self._at = max(base[whence] + offset, 0)
        return self._at

    def readinto(self, buffer) -> int:
        view = memoryview(buffer).cast("B")
        view = view[: max(self._size - self._at, 0)]
        self._file.seek(self._start + self._at)
        count = self._file.readinto(view) if view else 0
        self._at += count or 0
        return count or 0

    def close(self) -> None:
        self._file.close()
        super().close()


def _refused(path: Path, what: str) -> errors.CheckpointFormatError:
    return errors.CheckpointFormatError(
        f"{path}: a .keras file is a zip archive of {CONFIG}, {METADATA} and "
        f"{_WEIGHTS}. Received: {what}. {checkpoint.REMEDY}"
    )


def _members(path: Path, file: BinaryIO) -> dict[str, zipfile.ZipInfo]:
    """Reads and checks the archive's directory."""
    length = file.seek(0, os.SEEK_END)
    try:
        with zipfile.ZipFile(file) as archive:
            infos = archive.infolist()
    except _ZIP_ERRORS as error:
        raise _refused(
            path,
            f"{length} bytes that begin like {checkpoint.begins_like(path)}, "
            f"without a whole directory at the end ({error})",
        ) from error
    members: dict[str, zipfile.ZipInfo] = {}
    for info in infos:
        shown = layout.printable(info.filename)
        if info.filename in members:
            raise _refused(path, f"{shown} twice")
        members[info.filename] = info
        if info.flag_bits & 0x1:
            raise _refused(path, f"{shown}, which is encrypted")
        if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise _refused(
                path,
                f"{shown} of compression method {info.compress_type}, where "
                "only stored (0) and deflated (8) members are read",
            )
        if info.header_offset + _LOCAL.size + info.compress_size > length:
            raise _refused(path, f"{shown}, which lies outside the file")
        stored = info.compress_type == zipfile.ZIP_STORED
        if stored and info.compress_size != info.file_size:
            raise _refused(path, f"{shown}, stored, of two different sizes")
        if info.file_size > max(_SMALL, _MAX_RATIO * info.compress_size):
            raise _refused(
                path,
                f"{shown}, {info.compress_size} bytes that claim to inflate "
                f"to {info.file_size}",
            )
    for name in (CONFIG, METADATA, _WEIGHTS):
        if name not in members:
            raise _refused(path, f"an archive without {name}")
        if name != _WEIGHTS and members[name].file_size > _MAX_JSON:
            raise _refused(
                path, f"{name} of {members[name].file_size} bytes, too long"
            )
    return members


def _json(
    path: Path,
    file: BinaryIO,
    members: Mapping[str, zipfile.ZipInfo],
    name: str,
) -> dict[str, Any]:
    """Reads a member that is a JSON object."""
    try:
        with (
            zipfile.ZipFile(file) as archive,
            archive.open(members[name]) as source,
        ):
            # Keras writes NaN and Infinity as Python does.
            return json_files.json_object(
                source.read(_MAX_JSON + 1), constants=True
            )
    except _ZIP_ERRORS as error:
        raise _refused(path, f"{name} that cannot be read ({error})") from error


def _config(path: Path, found: dict[str, Any]) -> dict[str, Any]:
    """The constructor's arguments of a ResNetV2, checked one by one."""
    config = found.get("config")
    if (found.get("class_name"), found.get("registered_name")) != (
        "ResNetV2",
        _CLASS,
    ):
        raise errors.CheckpointFormatError(
            f"{path}: a .keras file that is read here holds a ResNetV2, "
            f"registered as {_CLASS!r}. Received: it holds a {_shown(found)}"
            f"{_about(found)}. Nothing of it was run. Save the ResNetV2 "
            "inside it, if there is one, by itself."
        )
    config = config if isinstance(config, dict) else {}
    blocks = config.get("blocks")
    for name, right in (
        (
            "blocks",
            isinstance(blocks, list) and all(type(n) is int for n in blocks),
        ),
        ("stem_width", type(config.get("stem_width")) is int),
        ("num_classes", type(config.get("num_classes")) is int),
        ("output_stride", _is_stride(config.get("output_stride"))),
        ("numerics", config.get("numerics") in list(variants.NUMERICS)),
    ):
        if not right:
            raise errors.CheckpointFormatError(
                f"{path}: {CONFIG} holds the arguments of models.ResNetV2. "
                f"Received: {name}={errors.brief(config.get(name))}. Correct "
                "it, or save the model again."
            )
    return config


def _shown(found: dict[str, Any]) -> str:
    kind, registered = found.get("class_name"), found.get("registered_name")
    if not isinstance(kind, str):
        return "nameless thing"
    kind = layout.printable(kind[:80])
    if registered in (None, kind):
        return kind
    return f"{kind}, registered as {errors.brief(registered)},"


def _about(found: dict[str, Any]) -> str:
    """What is inside another model, as far as it helps to know."""
    config = found.get("config")
    inner = config.get("layers") if isinstance(config, dict) else None
    inner = inner if isinstance(inner, list) else []
    layers = [layer for layer in inner if isinstance(layer, dict)]
    kinds = {str(layer.get("class_name")) for layer in layers}
    names = {str(layer.get("name")) for layer in layers}
    if "Lambda" in kinds:
        return " with a Lambda layer, which is a program"
    if "block1_unit01_a_conv" in names:
        return (
            " that bit_tf.folded wrote for Keras alone: its kernels have been "
            "standardized, and the weights before that are not in it"
        )
    return ""


def _facts(
    path: Path,
    file: BinaryIO,
    members: Mapping[str, zipfile.ZipInfo],
    config: Mapping[str, Any],
) -> Facts:
    """The config's facts, and those that `write` recorded."""
    numerics, stride = config["numerics"], config["output_stride"]
    recorded = _json(path, file, members, METADATA).get(KEY)
    facts = json_files.recorded_facts(f"{path}: {METADATA}", recorded)
    if facts is None:
        return Facts(numerics, output_stride=stride)
    if (facts.numerics, facts.output_stride) != (numerics, stride):
        raise errors.CheckpointFormatError(
            f"{path}: {METADATA} and {CONFIG} must agree. Received: numerics "
            f"{facts.numerics!r} and {numerics!r}, output_stride "
            f"{facts.output_stride} and {stride}. Correct one of them."
        )
    return facts


def _weights(path: Path, file: BinaryIO, info: zipfile.ZipInfo) -> _Weights:
    """Finds model.weights.h5, and inflates it if it is deflated."""
    file.seek(info.header_offset)
    local = file.read(_LOCAL.size)
    if len(local) < _LOCAL.size or not local.startswith(b"PK\x03\x04"):
        raise _refused(path, f"no member at byte {info.header_offset}")
    fields = _LOCAL.unpack(local)
    if file.read(fields[-2]) != _WEIGHTS.encode():
        raise _refused(path, f"another member where {_WEIGHTS} should be")
    found = _Member(
        file.tell() + fields[-1],
        info.compress_size,
        info.file_size,
        info.CRC,
        info.compress_type == zipfile.ZIP_DEFLATED,
    )
    if found.deflated:
        return _inflated(path, found)
    return _Weights(
        lambda: io.BufferedReader(_Window(path, found.offset, found.size)),
        _Checksum(path, found),
    )


class _Checksum:
    """Compares the checksum of stored bytes, once."""

    def __init__(self, path: Path, found: _Member):
        self._path, self._member, self._right = path, found, False

    def __call__(self) -> None:
        if self._right:
            return
        crc = 0
        with _Window(self._path, self._member.offset, self._member.size) as raw:
            while chunk := raw.read(_CHUNK):
                crc = zlib.crc32(chunk, crc)
        if crc != self._member.crc:
            raise errors.CheckpointFormatError(
                f"the checksum (CRC-32) of {_WEIGHTS} is {crc:08x}, and the "
                f"archive says {self._member.crc:08x}: its bytes have "
                f"changed. {checkpoint.REMEDY}"
            )
        self._right = True


def _inflated(path: Path, found: _Member) -> _Weights:
    """Inflates into a temporary file that goes with the last use of it."""
    directory = tempfile.mkdtemp(prefix="bit_tf.")
    weights = Path(directory, _WEIGHTS)

    def opened() -> BinaryIO:
        return open(weights, "rb")

    weakref.finalize(opened, shutil.rmtree, directory, ignore_errors=True)
    inflate, crc, size = zlib.decompressobj(-15), 0, 0
    with (
        io.BufferedReader(_Window(path, found.offset, found.compressed)) as raw,
        open(weights, "wb") as file,
    ):
        while not inflate.eof and size <= found.size:
            data = inflate.unconsumed_tail or raw.read(_CHUNK)
            try:
                part = inflate.decompress(data, _CHUNK)
            except zlib.error as error:
                raise _refused(
                    path, f"{_WEIGHTS} whose deflated bytes are damaged"
                ) from error
            if not data and not part:
                break
            file.write(part)
            crc, size = zlib.crc32(part, crc), size + len(part)
    if size != found.size or crc != found.crc:
        raise _refused(
            path,
            f"{_WEIGHTS} that inflates to {size} bytes of checksum {crc:08x}, "
            f"where the archive says {found.size} and {found.crc:08x}",
        )
    return _Weights(opened, lambda: None)


def _load(
    path: Path,
    weights: _Weights,
    name: str,
    load: Callable[[], np.ndarray],
) -> np.ndarray:
    try:
        weights.verify()
        return load()
    except errors.CheckpointFormatError as error:
        raise errors.CheckpointFormatError(
            f"{path}: {name} cannot be read: {error}"
        ) from error


def _is_stride(value: Any) -> bool:
    return type(value) is int and value in (32, 16, 8)
