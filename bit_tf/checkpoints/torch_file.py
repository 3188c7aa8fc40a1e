"""The container of PyTorch's .bin, .pth and .pt files: a pickled state dict.

`torch.load` reads them with `weights_only=True`: an unpickler of its own that
makes tensors and plain containers, and calls nothing that the file names. The
zip archives of today are mapped into memory, so that a tensor is read when it
is asked for; the older files, one pickle after another, are read whole and
kept.
"""

import functools
import os
import pickle
import re
import struct
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from bit_tf import errors
from bit_tf.checkpoints import checkpoint, layout
from bit_tf.checkpoints.safetensors_file import Opened
from bit_tf.checkpoints.safetensors_file import sharded as _sharded

__all__ = ["sharded", "sniff", "tensors"]

_ZIP = b"PK\x03\x04"
# The pickled number 0x1950a86a20f9469cfc6c, without the protocol before it.
_LEGACY = b"\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."
_WRAPPERS = ("state_dict", "model", "state_dict_ema")
_OPTIMIZER = re.compile("optimizer|optim|opt", re.IGNORECASE)
_REFUSAL = re.compile(r"(?:WeightsUnpickler error:\s*)?([^\n]*GLOBAL[^\n]*)")
_REMEDY = (
    "Nothing of it was executed. If you trust its source, load it there with "
    "torch and save the tensors alone, as .safetensors."
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
    loaded, stamp = _unpickled(path)
    if not isinstance(loaded, Mapping):
        raise errors.CheckpointFormatError(
            f"{path}: a PyTorch checkpoint is a dict of tensors. Received: "
            f"{type(loaded).__name__}. {checkpoint.REMEDY}"
        )
    state, extra, notes = _unwrapped(path, loaded)
    torch = _torch()
    entries: dict[str, checkpoint.Entry] = {}
    problems = []
    for name, value in state.items():
        if not isinstance(name, str) or not isinstance(value, torch.Tensor):
            extra.append(str(name))
            continue
        try:
            dtype = _dtype(torch, value)
        except ValueError as error:
            problems.append(f"{layout.printable(name)}: {error}")
            continue
        entries[name] = checkpoint.Entry(
            tuple(value.shape),
            dtype,
            functools.partial(_load, torch, path, stamp, name, value, dtype),
            name,
        )
    if problems:
        raise errors.CheckpointFormatError(
            f"{path}: weights are dense tensors with data. Save them so.\n"
            + "\n".join(problems)
        )
    return Opened(entries, {}, tuple(sorted(extra)), tuple(notes))


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


def _unpickled(path: Path) -> tuple[Any, tuple[int, ...]]:
    torch = _torch()
    with open(path, "rb") as file:
        zipped = file.read(len(_ZIP)) == _ZIP
    stamp = _stamp(path)
    try:
        if zipped:
            _check_members(path)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Detected pickle protocol")
            loaded = torch.load(
                path, map_location="cpu", weights_only=True, mmap=zipped
            )
    except pickle.UnpicklingError as error:
        # Its own message advises to execute what it refused.
        refusal = _REFUSAL.search(str(error))
        why = refusal[1] if refusal else "one that is damaged, or asks for more"
        raise errors.CheckpointFormatError(
            f"{path}: a PyTorch checkpoint's pickle makes tensors and plain "
            f"containers only. Received: {errors.brief(why)}. {_REMEDY}"
        ) from None
    except _ERRORS as error:
        raise errors.CheckpointFormatError(
            f"{path}: not a whole PyTorch checkpoint: "
            f"{errors.brief(str(error).split(chr(10))[0])} "
            f"({type(error).__name__}). {checkpoint.REMEDY}"
        ) from error
    return loaded, stamp


def _check_members(path: Path) -> None:
    """Refuses members that a memory map would misread."""
    size = path.stat().st_size
    with zipfile.ZipFile(path) as archive:
        for member in archive.infolist():
            if (
                member.compress_type != zipfile.ZIP_STORED
                or member.file_size != member.compress_size
                or member.header_offset + member.file_size > size
            ):
                raise ValueError(
                    f"its member {member.filename!a} is compressed or "
                    "reaches beyond the file"
                )
        if not any(_is_pickle(name) for name in archive.namelist()):
            raise ValueError("it has no member data.pkl")


def _is_pickle(name: str) -> bool:
    return name == "data.pkl" or name.endswith("/data.pkl")


def _unwrapped(
    path: Path, loaded: Mapping[Any, Any]
) -> tuple[Mapping[Any, Any], list[str], list[str]]:
    """Gives the state dict, what else is no part of it, and notes."""
    found = [
        name
        for name in _WRAPPERS
        if isinstance(loaded.get(name), Mapping) and loaded[name]
    ]
    if not found:
        return loaded, [], []
    taken = found[0]
    notes = [f"The weights are the file's {taken!r}."]
    if len(found) > 1:
        notes.append(f"Not read: {', '.join(map(repr, found[1:]))}.")
    extra = []
    for name, value in loaded.items():
        if name in found:
            continue
        if isinstance(name, str) and _OPTIMIZER.fullmatch(name):
            notes.append(
                f"skipped optimizer state: {name} ({_count(value)} arrays)"
            )
        else:
            extra.append(str(name))
    return loaded[taken], extra, notes


def _count(value: Any) -> int:
    """Counts the tensors in nested containers, each of these once."""
    torch = _torch()
    count = 0
    seen: set[int] = set()
    left = [value]
    while left:
        item = left.pop()
        if isinstance(item, torch.Tensor):
            count += 1
        elif isinstance(item, (Mapping, list, tuple)) and id(item) not in seen:
            seen.add(id(item))
            left += item.values() if isinstance(item, Mapping) else item
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
) -> np.ndarray:
    # Reading a map of a file that has shrunk would end the process.
    if not path.is_file() or _stamp(path) != stamp:
        raise errors.CheckpointFormatError(
            f"{path}: {layout.printable(name)} cannot be read: the file is "
            "not what it was when it was opened. Open it again."
        )
    tensor = tensor.detach().resolve_conj().resolve_neg()
    if tensor.dtype == torch.bfloat16:
        return tensor.clone().view(torch.int16).numpy().view(dtype)
    return tensor.numpy().copy()


def _stamp(path: Path) -> tuple[int, ...]:
    found = os.stat(path)
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns
