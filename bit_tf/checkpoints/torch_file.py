"""The container of PyTorch's .bin, .pth and .pt files: a pickled state dict.

`torch.load` reads them with `weights_only=True`: an unpickler of its own that
makes tensors and plain containers, and calls nothing else that the file names.
What it does call may still take all memory, for ever, or the process with it;
so a machine of `restricted_pickle` goes through the pickles first, and lets
pass what `torch.save` writes of state dicts. The zip archives of today are
mapped into memory, so that a tensor is read when it is asked for, and its
CRC-32 compared; the older files, one pickle after another, are read whole and
kept, and have no checksums.

Source: torch, serialization.py, _utils.py and _weights_only_unpickler.py.
"""

import dataclasses
import functools
import io
import math
import os
import pickle
import re
import struct
import warnings
import zipfile
import zlib
from pathlib import Path
from typing import Any, BinaryIO, ClassVar, NoReturn

import numpy as np

from bit_tf import errors
from bit_tf.checkpoints import checkpoint, layout, restricted_pickle
from bit_tf.checkpoints.safetensors_file import Opened
from bit_tf.checkpoints.safetensors_file import sharded as _sharded

__all__ = ["sharded", "sniff", "tensors"]

_ZIP = b"PK\x03\x04"
# The pickled number 0x1950a86a20f9469cfc6c, without the protocol before it.
_LEGACY = b"\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."
_WRAPPERS = ("state_dict", "model", "state_dict_ema")
_OPTIMIZER = re.compile("optimizer|optim|opt", re.IGNORECASE)
_REFUSAL = re.compile(r"GLOBAL \S+")
_RULE = "a PyTorch checkpoint's pickle makes tensors and plain containers only"
_REMEDY = (
    "Nothing of it was executed. If you trust its source, load it there with "
    "torch and save the tensors alone, as .safetensors."
)
_CHUNK = 1 << 20
_LOCAL_HEADER = 30
_MAX_PICKLE = 1 << 28
_MAX_RANK = 32
_STORAGE = re.compile(r"torch\.(\w+\.)*\w*Storage")
_TENSOR = re.compile(r"torch\._utils\._rebuild_(tensor(_v2|_v3)?|qtensor)")
# What else the loader's own list has, and files of weights have too.
_CALLS = (
    "_codecs.encode",
    "builtins.complex",
    "builtins.set",
    "collections.Counter",
    "collections.OrderedDict",
)

# What zipfile and torch.load raise on damaged files, with UnpicklingError.
_ERRORS = (
    RuntimeError,
    EOFError,
    ArithmeticError,
    LookupError,
    ValueError,
    TypeError,
    AttributeError,
    AssertionError,
    ImportError,
    MemoryError,
    OSError,
    struct.error,
    zipfile.BadZipFile,
)


def sniff(path: str | os.PathLike[str]) -> bool:
    """Whether a file looks like torch's, without torch; never raises."""
    try:
        with open(path, "rb") as file:
            start = file.read(2 + len(_LEGACY))
            if start[:1] == b"\x80" and start[2:] == _LEGACY:
                return True
            if start[: len(_ZIP)] != _ZIP:
                return False
            with zipfile.ZipFile(file) as archive:
                return any(_is_pickle(name) for name in archive.namelist())
    except _ERRORS:
        return False


def tensors(path: str | os.PathLike[str]) -> Opened:
    """Opens a state dict, or a dict that holds one as `state_dict`,
    `model` or `state_dict_ema`.

    Names are as the file has them. What is no tensor is `extra`; optimizer
    state beside a state dict is skipped, and a note says so.

    Raises:
      FileNotFoundError: there is no such file.
      CheckpointFormatError: the file is damaged, its pickle asks for more than
        tensors and plain containers, or a tensor is sparse, quantized or has
        no data.
      MissingExtraError: there is no torch, or one before 2.6, whose
        `weights_only` is known not to be safe.
    """
    path = Path(path)
    checkpoint.require_file(path)
    torch = _torch()
    loaded, described, members, stamp = _unpickled(torch, path)
    if not isinstance(loaded, dict):
        raise errors.CheckpointFormatError(
            f"{path}: a PyTorch checkpoint is a dict of tensors. Received: "
            f"{type(loaded).__name__}. {checkpoint.REMEDY}"
        )
    taken, extra, notes = _wrapped(torch, loaded)
    if taken is not None:
        loaded, described = loaded[taken], described[taken]
    entries: dict[str, checkpoint.Entry] = {}
    problems = []
    # Of a mapping or a tensor in the file, a method may be hidden by a value.
    for name, value in dict.items(loaded):
        if not isinstance(name, str) or not isinstance(value, torch.Tensor):
            extra.append(str(name))
            continue
        value = torch.Tensor.detach(value)
        try:
            dtype = _dtype(torch, value)
            if members is not None:
                members.check_size(value, described[name])
        except ValueError as error:
            problems.append(f"{layout.printable(name)}: {error}")
            continue
        load = functools.partial(
            _load, torch, path, stamp, name, value, dtype, members,
            described[name],
        )  # fmt: skip
        entries[name] = checkpoint.Entry(tuple(value.shape), dtype, load, name)
    if problems:
        raise errors.CheckpointFormatError(
            f"{path}: weights are dense tensors with data. Save them so.\n"
            + "\n".join(problems)
        )
    return Opened(entries, {}, tuple(sorted(extra)), tuple(notes), (path,))


def sharded(path: str | os.PathLike[str]) -> Opened:
    """Opens the shards that a `pytorch_model.bin.index.json` lists."""
    return _sharded(path, tensors)


def _torch() -> Any:
    try:
        torch = errors.import_extra("torch", "torch")
    except errors.MissingExtraError as error:
        raise errors.MissingExtraError(
            f"{error} A .safetensors file of the same weights needs no torch."
        ) from error
    version = re.match(r"(\d+)\.(\d+)", torch.__version__)
    if version is None or tuple(map(int, version.groups())) < (2, 6):
        raise errors.MissingExtraError(
            "Pickled weights need torch 2.6 or later: before, even "
            "weights_only=True could be made to execute code. Received: "
            f"{torch.__version__}. Install it with: pip install 'torch>=2.6'; "
            "a .safetensors file of the same weights needs no torch."
        )
    return torch


def _unpickled(
    torch: Any, path: Path
) -> tuple[Any, Any, "_Members | None", tuple[int, ...]]:
    """Loads the file's value.

    Returns:
      The value; the same with stand-ins for tensors; where these are in a zip
      archive, or None; and what tells whether the file is still the same.
    """
    members = None
    try:
        with open(path, "rb") as file:
            zipped = file.read(len(_ZIP)) == _ZIP
            stamp = _stamp(path)
            file.seek(0)
            if zipped:
                members = _members(path, file)
                described = _scan_zip(torch, path, stamp)
            else:
                described = _scan_legacy(torch, path, file, stamp)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Detected pickle protocol")
            loaded = torch.load(
                path, map_location="cpu", weights_only=True, mmap=zipped
            )
    except errors.CheckpointFormatError:
        raise
    except pickle.UnpicklingError as error:
        # Its own message advises to execute what it refused.
        refusal = _REFUSAL.search(str(error))
        why = "one that is damaged, or asks for more"
        if refusal:
            why = layout.printable(refusal[0])
        raise errors.CheckpointFormatError(
            f"{path}: {_RULE}. Received: {why}. {_REMEDY}"
        ) from None
    except _ERRORS as error:
        raise errors.CheckpointFormatError(
            f"{path}: not a whole PyTorch checkpoint: "
            f"{errors.brief(str(error).split(chr(10))[0])} "
            f"({type(error).__name__}). {checkpoint.REMEDY}"
        ) from error
    return loaded, described, members, stamp


def _scan_zip(torch: Any, path: Path, stamp: tuple[int, ...]) -> Any:
    # Another reader might find another pickle in a hostile archive.
    raw = torch._C.PyTorchFileReader(str(path)).get_record("data.pkl")
    machine = _StateDict(torch, path, io.BytesIO(raw), len(raw), stamp[2])
    return machine.run()


def _scan_legacy(
    torch: Any, path: Path, file: BinaryIO, stamp: tuple[int, ...]
) -> Any:
    machine = _StateDict(torch, path, file, stamp[2], stamp[2])
    for _ in ("the magic number", "the version", "the system"):
        machine.run()
    value = machine.run()
    keys = machine.run()
    # Memory without data would pass for weights.
    if type(keys) is not list or {*map(str, keys)} != {*machine.storages}:
        machine.damaged("its list of storages is not that of its tensors")
    return value


class _Name(restricted_pickle.StandIn):
    """What stands for a class, a function or a dtype."""

    def __init__(self, name: str):
        self.name = name
        self.what = f"the name {name}"


class _Other(restricted_pickle.StandIn):
    """What stands for a value that holds no tensor's data."""

    what = "a value of torch"


class _Ordered(dict[Any, Any]):
    """What stands for an OrderedDict."""


class _Storage(restricted_pickle.StandIn):
    """What stands for the data of one or several tensors."""

    what = "a storage"

    def __init__(self, key: str, size: int):
        self.key = key
        self.size = size


class _Tensor(restricted_pickle.StandIn):
    """What stands for a tensor."""

    what = "a tensor"

    def __init__(self, storage: _Storage, size: int):
        self.storage = storage
        self.size = size


class _StateDict(restricted_pickle.Machine):
    """Goes through the pickle of a state dict or a training checkpoint.

    Attributes:
      storages: by key, as far as the pickle named them.
    """

    rule = _RULE
    keys = (str, int, float, bool, type(None))
    keys_are = "text or numbers"
    longest = 255
    opcodes: ClassVar = {
        "BINPERSID": lambda self: self.push(self._persistent(self.pop())),
        "NEWOBJ": lambda self: self._new(self.pop(), self.pop()),
        "EMPTY_SET": lambda self: self.push(_Other()),
        "SHORT_BINSTRING": lambda self: self.push(
            self.text(self.take(self.take(1)[0]))
        ),
    }

    def __init__(
        self, torch: Any, path: Path, file: BinaryIO, size: int, whole: int
    ):
        """Makes a machine for the pickles in `file`, of so many bytes.

        Args:
          torch: the module.
          path: of the checkpoint.
          file, size: the pickles.
          whole: size of the checkpoint, in bytes.
        """
        super().__init__(path, file, size)
        self.storages: dict[str, _Storage] = {}
        self._torch = torch
        self._unclaimed = whole
        self._uncopied = whole

    def find(self, name: str) -> _Name:
        name = re.sub("^__builtin__", "builtins", name)
        if name not in _CALLS and not name.startswith("torch."):
            self._unknown(name)
        return _Name(name)

    def call(self, function: Any, args: tuple) -> Any:
        if not isinstance(function, _Name):
            return super().call(function, args)
        if _TENSOR.fullmatch(function.name):
            return self._tensor(function.name, args)
        match function.name.removeprefix("torch._utils."), args:
            case "collections.OrderedDict", ():
                return _Ordered()
            case "collections.Counter", ():
                return {}
            case "collections.Counter", (dict() as counts,):
                self._copy(len(counts))
                return dict(counts)
            case "builtins.set", (list() as items,) if all(
                type(item) in self.keys for item in items
            ):
                self._copy(len(items))
                return _Other()
            case "builtins.complex", (int() | float(), int() | float()):
                return _Other()
            case "_codecs.encode", (str() as text, "latin1"):
                self._copy(len(text))
                return _Other()
            case "_codecs.encode", (restricted_pickle.Span() as text, "latin1"):
                self._copy(text.size)
                return _Other()
            case "torch.device", (str(), *index) if _whole(index):
                return _Other()
            case "torch.Size", (tuple() as size,) if _whole(size):
                return size
            case "torch.serialization._get_layout", (str(),):
                return _Other()
            case "_rebuild_meta_tensor_no_storage", (
                _Name(),
                tuple() as size,
                tuple() as stride,
                bool(),
            ) if _whole(size) and _whole(stride):
                return _Other()
            case "_rebuild_sparse_tensor", (_Other(), tuple() as parts) if all(
                part.size <= part.storage.size
                for part in parts
                if isinstance(part, _Tensor)
            ):
                return _Other()
            case "_rebuild_parameter", (_Tensor() as tensor, bool(), _):
                return tensor
            case "_rebuild_parameter_with_state", (
                _Tensor() as tensor,
                bool(),
                _,
                dict() as state,
            ):
                self._check_attributes(state)
                return tensor
            case "torch._tensor._rebuild_from_type_v2", (
                _Name() as rebuild,
                _Name(),
                tuple() as parts,
                dict() as state,
            ) if _TENSOR.fullmatch(rebuild.name):
                self._check_attributes(state)
                return self._tensor(rebuild.name, parts)
        self.refuse(
            f"an unusual call of {layout.printable(function.name)}"
            f"{self.near()}; {restricted_pickle.HOSTILE}"
        )

    def build(self, target: Any, state: Any) -> None:
        if type(target) is not _Ordered or type(state) is not dict:
            super().build(target, state)

    def _new(self, args: Any, made: Any) -> NoReturn:
        """Refuses an object of a class, such as a whole network."""
        if isinstance(made, _Name):
            self._unknown(made.name)
        self.refuse(
            f"a new {restricted_pickle.kind(made)}{self.near()}; "
            f"{restricted_pickle.HOSTILE}"
        )

    def _unknown(self, name: str) -> NoReturn:
        raise errors.CheckpointFormatError(
            f"{self.path}: {_RULE}. Received: GLOBAL "
            f"{layout.printable(name)}. {_REMEDY}"
        )

    def _tensor(self, function: str, args: tuple) -> _Tensor:
        match args:
            case (
                _Storage() as storage,
                int() as offset,
                tuple() as shape,
                tuple() as strides,
                *_,
            ) if (
                offset >= 0
                and _whole(shape)
                and _whole(strides)
                and len(shape) == len(strides) <= _MAX_RANK
            ):
                size = math.prod(shape)
                if function.endswith("qtensor"):
                    self._copy(size)
                last = offset + sum(
                    (n - 1) * stride
                    for n, stride in zip(shape, strides, strict=True)
                )
                if size and last >= storage.size:
                    self.damaged(
                        f"a tensor of shape {shape} reaches beyond its "
                        f"storage of {storage.size} values"
                    )
                return _Tensor(storage, size)
        self.refuse(
            f"an unusual tensor{self.near()}; {restricted_pickle.HOSTILE}"
        )

    def _persistent(self, which: Any) -> _Storage:
        match which:
            case (
                "storage",
                _Name() as kind,
                (str() | int()) as key,
                str(),
                int() as size,
                *view,
            ) if size >= 0 and _STORAGE.fullmatch(kind.name):
                pass
            case ("module", _Name() as network, *_):
                self._unknown(network.name)
            case _:
                self.refuse(
                    f"an unusual storage{self.near()}; "
                    f"{restricted_pickle.HOSTILE}"
                )
        if str(key) not in self.storages:
            self._unclaimed -= size
            if self._unclaimed < 0:
                self.damaged(f"its storages, up to {key}, are not in the file")
            self.storages[str(key)] = _Storage(str(key), size)
        storage = self.storages[str(key)]
        match view:
            case [] | [None]:
                return storage
            case [(str() | int(), int() as offset, int() as part)] if (
                offset >= 0 <= part and offset + part <= storage.size
            ):
                return _Storage(storage.key, part)
        self.refuse(
            f"an unusual view{self.near()}; {restricted_pickle.HOSTILE}"
        )

    def _copy(self, size: int) -> None:
        """Counts what calls make of what the file holds once."""
        self._uncopied -= size
        if self._uncopied < 0:
            self.refuse(
                "calls that make more than the file holds; "
                f"{restricted_pickle.HOSTILE}"
            )

    def _check_attributes(self, state: dict[Any, Any]) -> None:
        for name in state:
            if type(name) is not str or hasattr(self._torch.Tensor, name):
                self.refuse(
                    f"a tensor with its own {layout.printable(str(name))}; "
                    f"{restricted_pickle.HOSTILE}"
                )


def _whole(values: Any) -> bool:
    """Whether values are whole numbers, and none negative."""
    return all(type(value) is int and value >= 0 for value in values)


@dataclasses.dataclass
class _Members:
    """The members of a zip archive that hold tensors' data.

    Attributes:
      path: of the archive.
      by_key: storage's key → member.
      good: keys whose CRC-32 was compared.
    """

    path: Path
    by_key: dict[str, zipfile.ZipInfo]
    good: set[str] = dataclasses.field(default_factory=set)

    def check_size(self, tensor: Any, described: Any) -> None:
        """Raises a ValueError if the member has fewer bytes than are taken."""
        if not isinstance(described, _Tensor):
            return
        key = described.storage.key
        nbytes = tensor.untyped_storage().nbytes()
        found = self.by_key[key].file_size if key in self.by_key else 0
        if nbytes > found:
            raise ValueError(f"data/{key} has {found} bytes of its {nbytes}")

    def check_data(self, described: Any) -> None:
        """Raises a ValueError if the data are not those that were written."""
        if not isinstance(described, _Tensor):
            return
        key = described.storage.key
        if key in self.good or key not in self.by_key:
            return
        with open(self.path, "rb") as file:
            _check_sum(file, self.by_key[key])
        self.good.add(key)


def _members(path: Path, file: BinaryIO) -> _Members:
    """Refuses members that a memory map would misread, or damaged ones."""
    size = os.fstat(file.fileno()).st_size
    with zipfile.ZipFile(file) as archive:
        found = archive.infolist()
        for member in found:
            if (
                member.compress_type != zipfile.ZIP_STORED
                or member.file_size != member.compress_size
                or member.header_offset + member.file_size > size
            ):
                raise ValueError(
                    f"its member {member.filename!a} is compressed or "
                    "reaches beyond the file"
                )
    pickles = [member for member in found if _is_pickle(member.filename)]
    if len(pickles) != 1 or pickles[0].file_size > _MAX_PICKLE:
        raise ValueError("it has no member data.pkl, or several, or a huge one")
    data = pickles[0].filename.removesuffix("data.pkl") + "data/"
    by_key = {}
    for member in found:
        if member.filename.startswith(data):
            by_key[member.filename.removeprefix(data)] = member
        else:
            _check_sum(file, member)
    return _Members(path, by_key)


def _check_sum(file: BinaryIO, member: zipfile.ZipInfo) -> None:
    """Raises a ValueError if a stored member is not what was written."""
    # torch.save may be told to leave it out.
    if not member.CRC:
        return
    file.seek(member.header_offset)
    start = file.read(_LOCAL_HEADER)
    if len(start) < _LOCAL_HEADER:
        raise ValueError(f"its member {member.filename!a} is cut off")
    file.seek(sum(struct.unpack("<HH", start[-4:])), os.SEEK_CUR)
    left, found = member.file_size, 0
    while left and (chunk := file.read(min(left, _CHUNK))):
        left -= len(chunk)
        found = zlib.crc32(chunk, found)
    if left or found != member.CRC:
        raise ValueError(
            f"its member {member.filename!a} is damaged: CRC-32 {found:#010x} "
            f"instead of {member.CRC:#010x}"
        )


def _is_pickle(name: str) -> bool:
    return name == "data.pkl" or name.endswith("/data.pkl")


def _wrapped(
    torch: Any, loaded: dict[Any, Any]
) -> tuple[str | None, list[str], list[str]]:
    """Gives the state dict's name in a checkpoint, the other names, notes."""
    found = [
        name
        for name in _WRAPPERS
        if name in loaded and isinstance(loaded[name], dict) and loaded[name]
    ]
    if not found:
        return None, [], []
    taken = found[0]
    notes = [f"The weights are the file's {taken!r}."]
    if len(found) > 1:
        notes.append(f"Not read: {', '.join(map(repr, found[1:]))}.")
    extra = []
    for name, value in dict.items(loaded):
        if name in found:
            continue
        if isinstance(name, str) and _OPTIMIZER.fullmatch(name):
            notes.append(
                f"skipped optimizer state: {name} "
                f"({_count(torch, value)} arrays)"
            )
        else:
            extra.append(str(name))
    return taken, extra, notes


def _count(torch: Any, value: Any) -> int:
    """Counts the tensors in nested containers, each of these once."""
    count = 0
    seen: set[int] = set()
    left = [value]
    while left:
        item = left.pop()
        if isinstance(item, torch.Tensor):
            count += 1
        elif isinstance(item, (dict, list, tuple)) and id(item) not in seen:
            seen.add(id(item))
            left += dict.values(item) if isinstance(item, dict) else item
    return count


def _dtype(torch: Any, tensor: Any) -> np.dtype:
    """The NumPy dtype of a tensor; a ValueError says why there is none."""
    import ml_dtypes

    if tensor.is_quantized or tensor.layout is not torch.strided:
        kind = "quantized" if tensor.is_quantized else str(tensor.layout)
        raise ValueError(f"it is {kind.removeprefix('torch.')}")
    if tensor.is_meta:
        raise ValueError("it is a meta tensor, without data")
    if tensor.untyped_storage().nbytes() < tensor.numel() * tensor.itemsize:
        raise ValueError(
            f"its shape, {tuple(tensor.shape)}, repeats the same values"
        )
    name = str(tensor.dtype).removeprefix("torch.")
    try:
        return np.dtype(getattr(ml_dtypes, name, name))
    except TypeError:
        raise ValueError(f"its dtype is {name}") from None


def _load(
    torch: Any,
    path: Path,
    stamp: tuple[int, ...],
    name: str,
    tensor: Any,
    dtype: np.dtype,
    members: _Members | None,
    described: Any,
) -> np.ndarray:
    # Reading a map of a file that has shrunk would end the process.
    if not path.is_file() or _stamp(path) != stamp:
        raise errors.CheckpointFormatError(
            f"{path}: {layout.printable(name)} cannot be read: the file is "
            "not what it was when it was opened. Open it again."
        )
    if members is not None:
        try:
            members.check_data(described)
        except ValueError as error:
            raise errors.CheckpointFormatError(
                f"{path}: {layout.printable(name)} cannot be read: {error}. "
                f"{checkpoint.REMEDY}"
            ) from None
    tensor = tensor.resolve_conj().resolve_neg()
    if tensor.dtype == torch.bfloat16:
        return tensor.clone().view(torch.int16).numpy().view(dtype)
    return tensor.numpy().copy()


def _stamp(path: Path) -> tuple[int, ...]:
    found = os.stat(path)
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns
