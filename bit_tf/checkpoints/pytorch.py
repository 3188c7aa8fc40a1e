"""Weights of the PyTorch family: timm's and Hugging Face transformers'.

They come as .safetensors files, as pickled state dicts (.bin, .pth), in shards
with an index, or as a directory with one of these. Names tell whose they are;
config.json and preprocessor_config.json beside them say the rest.

Source: timm, models/resnetv2.py; transformers, models/bit.
"""

import os
from collections.abc import Callable
from pathlib import Path

from bit_tf import errors
from bit_tf.checkpoints import (
    checkpoint,
    hugging_face,
    json_files,
    layout,
    rename,
    safetensors_file,
    timm,
    torch_file,
)
from bit_tf.checkpoints.facts import KEY, Facts

__all__ = ["LOOKS_FOR", "NAME", "read", "sniff"]

NAME = "pytorch"
LOOKS_FOR = (
    "a .safetensors file, a PyTorch .bin or .pth, an index of such shards, or "
    "a directory with one of them"
)

_SAFETENSORS = "model.safetensors"
_SAFETENSORS_INDEX = "model.safetensors.index.json"
_TORCH = "pytorch_model.bin"
_TORCH_INDEX = "pytorch_model.bin.index.json"
_INDEX_SUFFIX = ".index.json"
_SCHEMES = (rename.TIMM, rename.TRANSFORMERS, rename.TRANSFORMERS_BARE)
# What wraps a network in torch's DataParallel and torch.compile, in Lightning
# and in transformers' TimmWrapper puts before every name.
_WRAPPERS = ("module.", "_orig_mod.", "model.", "timm_model.")
# What the other readers of directories take.
_OTHERS = ("saved_model.pb", "model_state.pdparams")
# timm's resnetv2_50 and others have BiT's names, and batch normalization.
_STATISTICS = (".running_mean", ".running_var")


def sniff(path: str | os.PathLike[str]) -> bool:
    """Whether this reads a file or a directory; never raises on garbage."""
    try:
        path = Path(path)
        if path.is_dir():
            return any(_candidates(path))
        return path.is_file() and _opener(path) is not None
    except (OSError, ValueError):
        return False


def read(path: str | os.PathLike[str]) -> checkpoint.Checkpoint:
    """Opens weights of timm or transformers: their names, shapes and facts.

    Of a directory it takes model.safetensors, model.safetensors.index.json, a
    single other .safetensors, pytorch_model.bin, or
    pytorch_model.bin.index.json, the first that is there; a note names the
    others. Of every name are passed over what programs that wrap networks put
    before it, `module.`, `_orig_mod.`, `model.` and `timm_model.`, also several
    of them; a note says so.

    Returns:
      A `Checkpoint` whose format is "timm" or "transformers". Its path is the
      file that holds the weights, or the directory of shards.

    Raises:
      FileNotFoundError: there is no such file.
      CheckpointFormatError: a file is damaged or hostile, the weights are not
        float, or config.json asks for a network that is not BiT.
      CheckpointMismatchError: names or shapes are not those of a BiT-ResNet,
        or config.json describes another.
      MissingExtraError: a pickled file needs torch, which is not installed.
    """
    path = Path(path)
    notes: tuple[str, ...] = ()
    if path.is_dir():
        path, notes = _chosen(path)
    checkpoint.require_file(path)
    open_file = _opener(path)
    if open_file is None:
        raise errors.CheckpointFormatError(
            f"{path}: weights of timm or transformers are {LOOKS_FOR}. "
            f"Received: {checkpoint.begins_like(path)}. {checkpoint.REMEDY}"
        )
    opened = open_file(path)
    directory = path.parent
    recorded = json_files.recorded_facts(path, opened.metadata.get(KEY))
    if path.name.endswith(_INDEX_SUFFIX):
        path = directory
    notes += opened.notes
    prefix = _prefix(opened)
    if prefix and opened.entries:
        notes += (f"Passed over, before every name: {prefix}",)
    scheme = rename.identify(
        (name.removeprefix(prefix) for name in opened.entries), _SCHEMES
    )
    if scheme is None:
        raise _unknown(path, opened)
    is_timm = scheme is rename.TIMM
    config = None
    if not is_timm or recorded is None:
        config = json_files.read(directory / json_files.CONFIG)
    if config is not None and not is_timm:
        if timm.is_timm(config):
            config = None
        else:
            hugging_face.check_options(directory, config)
    entries, extra = rename.collect(
        path, scheme, opened.entries, lambda name: name.removeprefix(prefix)
    )
    if statistics := [name for name in extra if name.endswith(_STATISTICS)]:
        raise errors.CheckpointMismatchError(
            f"{path}: BiT normalizes groups of channels and keeps no "
            f"statistics of batches. Received: {statistics[0]}, and "
            f"{len(statistics) - 1} more. These are the weights of another "
            "ResNet-v2."
        )

    def described(facts: Facts) -> checkpoint.Checkpoint:
        return checkpoint.Checkpoint(
            path,
            entries,
            format="timm" if is_timm else "transformers",
            facts=facts,
            extra=tuple(sorted({*extra, *opened.extra})),
            notes=notes,
            files=opened.files,
            spell=lambda name: prefix + scheme.spell(name),
        )

    tell = timm.read_facts if is_timm else hugging_face.read_facts
    facts, more = tell(directory, config, described(Facts()), recorded)
    notes += more
    return described(facts)


def _prefix(opened: safetensors_file.Opened) -> str:
    """What programs that wrap networks put before every name, if they did."""
    prefix = ""
    for _ in _WRAPPERS:
        for wrapper in _WRAPPERS:
            longer = prefix + wrapper
            if all(name.startswith(longer) for name in opened.entries):
                prefix = longer
                break
    return prefix


def _unknown(
    path: Path, opened: safetensors_file.Opened
) -> errors.CheckpointMismatchError:
    names = [*opened.entries, *opened.extra]
    shown = ", ".join(layout.printable(name) for name in sorted(names)[:5])
    return errors.CheckpointMismatchError(
        f"{path}: a BiT-ResNet of timm begins with {rename.TIMM.root}, one of "
        f"transformers with {rename.TRANSFORMERS.root} or "
        f"{rename.TRANSFORMERS_BARE.root}. Received: {len(names)} names"
        + (f", the first of them {shown}." if names else ".")
        + " These are the weights of another model."
    )


def _opener(
    path: Path,
) -> Callable[[Path], safetensors_file.Opened] | None:
    """What opens a file, told by its first bytes."""
    if safetensors_file.sniff(path):
        return safetensors_file.tensors
    if torch_file.sniff(path):
        return torch_file.tensors
    if path.name.endswith(_INDEX_SUFFIX):
        with open(path, "rb") as file:
            start = file.read(1 << 20)
        if start.lstrip()[:1] == b"{" and b'"weight_map"' in start:
            if b".safetensors" in start:
                return safetensors_file.sharded
            return torch_file.sharded
    return None


def _candidates(directory: Path) -> tuple[list[Path], list[Path]]:
    """A directory's weights in the order of preference; other .safetensors."""
    single = sorted(
        found
        for found in directory.glob("*.safetensors")
        if found.name != _SAFETENSORS
        and not found.name.startswith(".")
        and found.is_file()
    )
    names = [_SAFETENSORS, _SAFETENSORS_INDEX, _TORCH, _TORCH_INDEX]
    # Beside an index, it is a shard.
    if len(single) == 1 and not (directory / _SAFETENSORS_INDEX).is_file():
        names.insert(2, single[0].name)
    found = [directory / name for name in names]
    return [file for file in found if file.is_file()], single


def _chosen(directory: Path) -> tuple[Path, tuple[str, ...]]:
    candidates, single = _candidates(directory)
    if not candidates:
        names = ", ".join(file.name for file in single[:10])
        raise errors.CheckpointFormatError(
            f"{directory}: a directory of weights holds {_SAFETENSORS}, "
            f"{_TORCH}, one of them in shards with an index, or one other "
            f".safetensors file. Received: {names or 'none of them'}. Give the "
            "path of the file itself."
        )
    taken, *others = candidates
    others += [directory / name for name in _OTHERS]
    names = ", ".join(file.name for file in others if file.is_file())
    if not names:
        return taken, ()
    return taken, (f"Of several, {taken.name} was read, not {names}.",)
