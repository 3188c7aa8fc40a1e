"""Flax parameters in .npz files: big_vision's, and big_transfer's bit_jax.

Keys are the parameters' paths, such as `root_block/conv_root/kernel`.
big_vision puts `params/` before them, or `opt/target/` in its older files,
and keeps the optimizer's state beside them. Kernels are HWIO, scales and
biases of group normalizations (1, 1, 1, C), the classifier's kernel (C, N).

Source: google-research/big_vision, models/bit_paper.py and utils.py
(load_params); google-research/big_transfer, bit_jax/models.py.
"""

import collections
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from bit_tf import presets
from bit_tf.checkpoints import checkpoint, layout, npz, rename
from bit_tf.checkpoints.facts import Facts

__all__ = ["NAME", "LOOKS_FOR", "sniff", "read"]

NAME = "flax_npz"
LOOKS_FOR = (
    "a zip archive of .npy members with flax names, such as "
    "root_block/conv_root/kernel"
)

_PREFIXES = ("params/", "opt/target/", "")
_ENOUGH = 5
_BIT_JAX = Facts("google", presets.PRESETS["big_transfer eval"])
_BIG_VISION = Facts("big_vision", presets.PRESETS["big_vision fewshot"])
_NO_FILE = "The layout is inferred: no published file of this format was seen."
_ASSUMED = (
    "The names do not tell big_transfer from big_vision: constants of "
    "big_transfer are assumed. If the weights come from big_vision, whose max "
    'pooling has a border of -inf and not 0, choose numerics="big_vision".'
)
_WHAT = {"opt": "optimizer state", "chrono": "the training's clock"}
# A renamed array's first folder is still one of these.
_MODEL = frozenset(
    ("root_block", "block1", "block2", "block3", "block4", "norm-pre-head")
) | {"head", "conv_head"}


def sniff(path: str | os.PathLike[str]) -> bool:
    """Whether a file looks like one of this format; never raises on garbage.

    True for a zip archive with a flax root kernel among its members, or with
    five names of this format.
    """
    keys, _ = npz.keys(path)
    prefix = _prefix(keys)
    names = set(_names(keys, prefix))
    return rename.BIT_JAX.root in names or (
        sum(_canonical(name) is not None for name in names) >= _ENOUGH
    )


def read(path: str | os.PathLike[str]) -> checkpoint.Checkpoint:
    """Opens a checkpoint: reads the archive's directory and array headers.

    A classifier's kernel of (1, 1, C, N) is read as (C, N).

    Returns:
      A `Checkpoint`. Where keys have a prefix, others are skipped, and its
      `notes` say so, but those that would be the model's without the prefix;
      these are `extra`, like all others where keys have none.

    Raises:
      FileNotFoundError: there is no such file.
      CheckpointFormatError: the file is not a zip archive, is damaged, or
        holds arrays that are not float. Damage inside an array's data is
        found, by its checksum, when the array is read.
      CheckpointMismatchError: names or shapes are not those of a BiT-ResNet.
    """
    path = Path(path)
    keys, _ = npz.keys(path)
    prefix = _prefix(keys)
    found, others = npz.entries(path, _translator)
    if (head := found.get(layout.HEAD_KERNEL)) is not None:
        found[layout.HEAD_KERNEL] = npz.squeezed(head)
    scheme, facts, notes = _origin(prefix, _names(keys, prefix))
    entries, odd = rename.collect(
        path,
        scheme,
        {entry.source: entry for entry in found.values()},
        lambda key: key.removeprefix(prefix),
    )
    skipped = [key for key in others if prefix and _is_skipped(key, prefix)]
    extra = sorted({*odd, *others} - {*skipped})
    return checkpoint.Checkpoint(
        path,
        entries,
        format=NAME,
        facts=facts,
        extra=tuple(extra),
        notes=(*notes, *_told(skipped)),
        spell=lambda name: prefix + scheme.spell(name),
    )


def _canonical(name: str) -> str | None:
    return rename.BIT_JAX.canonical(name) or rename.BIG_VISION.canonical(name)


def _names(keys: Iterable[str], prefix: str) -> list[str]:
    return [key.removeprefix(prefix) for key in keys if key.startswith(prefix)]


def _prefix(keys: Sequence[str]) -> str:
    """The prefix behind which most names are read, the first of equals."""
    counts = [
        sum(_canonical(name) is not None for name in _names(keys, prefix))
        for prefix in _PREFIXES
    ]
    return _PREFIXES[counts.index(max(counts))] if any(counts) else ""


def _translator(keys: Sequence[str]) -> Callable[[str], str | None]:
    prefix = _prefix(keys)

    def canonical(key: str) -> str | None:
        if not key.startswith(prefix):
            return None
        return _canonical(key.removeprefix(prefix))

    return canonical


def _origin(
    prefix: str, names: Iterable[str]
) -> tuple[rename.Scheme, Facts, tuple[str, ...]]:
    """Whose file it is, by its head and its prefix."""
    folders = {name.split("/")[0] for name in names}
    if "conv_head" in folders:
        return rename.BIT_JAX, _BIT_JAX, (_NO_FILE,)
    if prefix or "head" in folders:
        return rename.BIG_VISION, _BIG_VISION, ()
    return rename.BIT_JAX, _BIT_JAX, (_NO_FILE, _ASSUMED)


def _is_skipped(key: str, prefix: str) -> bool:
    folder, slash, _ = key.partition("/")
    return bool(slash) and not key.startswith(prefix) and folder not in _MODEL


def _told(skipped: Sequence[str]) -> tuple[str, ...]:
    counts = collections.Counter(key.split("/")[0] for key in skipped)
    return tuple(
        f"skipped {_WHAT.get(folder, 'what is no model')}: "
        f"{layout.printable(folder)}/… "
        f"({count} {'array' if count == 1 else 'arrays'})"
        for folder, count in sorted(counts.items())
    )
