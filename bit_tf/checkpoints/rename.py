"""How each source spells and lays out the arrays of a BiT-ResNet.

One row a source: templates of its names, and the axes of its arrays. A name
is translated by reading it with one row and spelling it with another. Sources:
google-research/big_transfer (bit_pytorch/models.py, bit_jax/models.py),
google-research/big_vision (models/bit_paper.py), timm (models/resnetv2.py),
transformers (models/bit), PaddleNLP (transformers/bit).
"""

import collections
import dataclasses
import functools
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from bit_tf import errors
from bit_tf.checkpoints import checkpoint, layout

__all__ = [
    "BIG_VISION",
    "BIT_JAX",
    "CANONICAL",
    "PADDLE",
    "PADDLE_BARE",
    "SCHEMES",
    "TIMM",
    "TRANSFORMERS",
    "TRANSFORMERS_BARE",
    "Scheme",
    "collect",
    "google_spelling",
    "identify",
]

Shape = tuple[int, ...]


class _Part(NamedTuple):
    """What a name says: which template, and its fields."""

    kind: str
    block: int = 0
    unit: int = 0
    letter: str = ""
    leaf: str = ""


@dataclasses.dataclass(frozen=True)
class Scheme:
    """A source's names and layouts.

    Templates hold {block} (1 … 4) or {stage} (0 … 3); {unit} (01, 02 …) or
    {layer} (0, 1 …); {letter} (a, b, c) or {number} (1, 2, 3); {leaf}.

    Attributes:
      name: of the source.
      root: the root convolution's kernel.
      conv: kernels of a unit's three convolutions.
      proj: the kernel of its projection.
      norm: gamma and beta of its three group normalizations.
      final_norm: gamma and beta of the last one.
      head_kernel, head_bias: the classifier.
      gamma, beta: what stands for {leaf}.
      kernel: axes of kernels, "HWIO" or "OIHW".
      vector: axes of gamma and beta, "C" or "111C".
      head: axes of the classifier's kernel: C features, N classes, and 1.
    """

    name: str
    root: str
    conv: str
    proj: str
    norm: str
    final_norm: str
    head_kernel: str
    head_bias: str
    gamma: str = "weight"
    beta: str = "bias"
    kernel: str = "OIHW"
    vector: str = "C"
    head: str = "NC"

    def canonical(self, name: str) -> str | None:
        """The canonical name of one of this source's names, or None.

        A name counts whatever its numbers are: a fifth block is another
        architecture's, and `layout.check` says so.
        """
        part = self._parse(name)
        return None if part is None else CANONICAL._format(part)

    def spell(self, canonical: str) -> str:
        """This source's name for a canonical name; others are left alone."""
        part = CANONICAL._parse(canonical)
        return canonical if part is None else self._format(part)

    def shape(self, canonical: str, stored: Shape) -> Shape:
        """The canonical shape of what is stored with shape `stored`.

        A shape that does not fit the source's axes is returned as it is, for
        `layout.check` to refuse.
        """
        axes = self._axes(canonical)
        if not _fits(axes, stored):
            return tuple(stored)
        return tuple(stored[axes.index(c)] for c in _canonical_axes(canonical))

    def decode(self, canonical: str, array: np.ndarray) -> np.ndarray:
        """A view of a stored array in the canonical layout."""
        axes = self._axes(canonical)
        if not _fits(axes, array.shape):
            return array
        kept = axes.replace("1", "")
        array = array.reshape([
            n for n, axis in zip(array.shape, axes, strict=True) if axis != "1"
        ])  # fmt: skip
        order = [kept.index(axis) for axis in _canonical_axes(canonical)]
        return array.transpose(order)

    def stored_shape(self, canonical: str, shape: Shape) -> Shape:
        """The shape with which a canonical array is stored."""
        sizes = dict(zip(_canonical_axes(canonical), shape, strict=True))
        return tuple(sizes.get(axis, 1) for axis in self._axes(canonical))

    def encode(self, canonical: str, array: np.ndarray) -> np.ndarray:
        """A view of a canonical array as it is stored."""
        kept = self._axes(canonical).replace("1", "")
        order = [_canonical_axes(canonical).index(axis) for axis in kept]
        return array.transpose(order).reshape(
            self.stored_shape(canonical, array.shape)
        )

    def _axes(self, canonical: str) -> str:
        if canonical == layout.HEAD_KERNEL:
            return self.head
        if canonical == layout.HEAD_BIAS:
            return "N"
        if canonical.endswith("/kernel"):
            return self.kernel
        return self.vector

    @functools.cached_property
    def _patterns(self) -> dict[str, re.Pattern]:
        return {
            kind: _pattern(getattr(self, kind), self.gamma, self.beta)
            for kind in _KINDS
        }

    def _parse(self, name: str) -> _Part | None:
        for kind, pattern in self._patterns.items():
            match = pattern.fullmatch(name)
            if match is None:
                continue
            found = match.groupdict()
            part = _Part(
                kind,
                int(found["block"])
                if "block" in found
                else int(found.get("stage", -1)) + 1,
                int(found["unit"])
                if "unit" in found
                else int(found.get("layer", -1)) + 1,
                found.get("letter") or "0abc"[int(found.get("number", 0))],
                {self.gamma: "gamma", self.beta: "beta"}.get(
                    found.get("leaf", ""), ""
                ),
            )
            # "stages.00" reads as a number, and is no name of the source.
            if self._format(part) == name:
                return part
        return None

    def _format(self, part: _Part) -> str:
        return getattr(self, part.kind).format(
            block=part.block,
            stage=part.block - 1,
            unit=f"{part.unit:02d}",
            layer=part.unit - 1,
            letter=part.letter,
            number="0abc".find(part.letter),
            leaf={"gamma": self.gamma, "beta": self.beta}.get(part.leaf, ""),
        )


_KINDS = ("root conv proj norm final_norm head_kernel head_bias").split()
_FIELD = re.compile(r"\\\{([a-z]+)\\\}")
_NUMBERED = re.compile(r"/standardized_conv2d_[0-9]+/")
_NUMBER = "[0-9]{1,6}"


def _pattern(template: str, gamma: str, beta: str) -> re.Pattern:
    fields = {
        "block": _NUMBER,
        "stage": _NUMBER,
        "unit": _NUMBER,
        "layer": _NUMBER,
        "letter": "[abc]",
        "number": "[123]",
        "leaf": f"{re.escape(gamma)}|{re.escape(beta)}",
    }
    text = re.escape(template)
    return re.compile(
        _FIELD.sub(lambda m: f"(?P<{m[1]}>{fields[m[1]]})", text), re.ASCII
    )


def _canonical_axes(canonical: str) -> str:
    if canonical == layout.HEAD_KERNEL:
        return "CN"
    if canonical == layout.HEAD_BIAS:
        return "N"
    return "HWIO" if canonical.endswith("/kernel") else "C"


def _fits(axes: str, shape: Shape) -> bool:
    return len(shape) == len(axes) and all(
        size == 1 for size, axis in zip(shape, axes, strict=True) if axis == "1"
    )


CANONICAL = Scheme(
    "canonical",
    root=layout.ROOT_KERNEL,
    conv="block{block}/unit{unit}/{letter}/standardized_conv2d/kernel",
    proj="block{block}/unit{unit}/a/proj/standardized_conv2d/kernel",
    norm="block{block}/unit{unit}/{letter}/group_norm/{leaf}",
    final_norm="group_norm/{leaf}",
    head_kernel=layout.HEAD_KERNEL,
    head_bias=layout.HEAD_BIAS,
    gamma="gamma",
    beta="beta",
    kernel="HWIO",
    head="CN",
)
TIMM = Scheme(
    "timm",
    root="stem.conv.weight",
    conv="stages.{stage}.blocks.{layer}.conv{number}.weight",
    proj="stages.{stage}.blocks.{layer}.downsample.conv.weight",
    norm="stages.{stage}.blocks.{layer}.norm{number}.{leaf}",
    final_norm="norm.{leaf}",
    head_kernel="head.fc.weight",
    head_bias="head.fc.bias",
    head="NC11",
)
TRANSFORMERS = Scheme(
    "transformers",
    root="bit.embedder.convolution.weight",
    conv="bit.encoder.stages.{stage}.layers.{layer}.conv{number}.weight",
    proj="bit.encoder.stages.{stage}.layers.{layer}.downsample.conv.weight",
    norm="bit.encoder.stages.{stage}.layers.{layer}.norm{number}.{leaf}",
    final_norm="bit.norm.{leaf}",
    head_kernel="classifier.1.weight",
    head_bias="classifier.1.bias",
)
# BitModel, which has no classifier.
TRANSFORMERS_BARE = dataclasses.replace(
    TRANSFORMERS,
    **{
        field: getattr(TRANSFORMERS, field).removeprefix("bit.")
        for field in ("root", "conv", "proj", "norm", "final_norm")
    },
)
PADDLE = dataclasses.replace(TRANSFORMERS, name="paddle", head="CN")
PADDLE_BARE = dataclasses.replace(TRANSFORMERS_BARE, name="paddle", head="CN")
BIT_JAX = Scheme(
    "bit_jax",
    root="root_block/conv_root/kernel",
    conv="block{block}/unit{unit}/conv{number}/kernel",
    proj="block{block}/unit{unit}/conv_proj/kernel",
    norm="block{block}/unit{unit}/gn{number}/{leaf}",
    final_norm="norm-pre-head/{leaf}",
    head_kernel="conv_head/kernel",
    head_bias="conv_head/bias",
    gamma="scale",
    kernel="HWIO",
    vector="111C",
    head="CN",
)
BIG_VISION = dataclasses.replace(
    BIT_JAX,
    name="big_vision",
    head_kernel="head/kernel",
    head_bias="head/bias",
)
SCHEMES = (
    CANONICAL,
    TIMM,
    TRANSFORMERS,
    TRANSFORMERS_BARE,
    PADDLE,
    PADDLE_BARE,
    BIT_JAX,
    BIG_VISION,
)


def google_spelling(key: str) -> str:
    """A name in Google's own files, without its prefix and numbering.

    Some hold `standardized_conv2d_<N>` for `standardized_conv2d`.
    """
    return _NUMBERED.sub("/standardized_conv2d/", key.removeprefix("resnet/"))


def identify(names: Iterable[str], schemes: Iterable[Scheme]) -> Scheme | None:
    """The scheme that reads most of the names, the first of equals, or None.

    One renamed array, even the root kernel, does not hide the scheme.
    """
    names = list(names)
    counts = collections.Counter(
        {
            index: sum(scheme.canonical(name) is not None for name in names)
            for index, scheme in enumerate(schemes)
        }
    )
    best, count = counts.most_common(1)[0]
    return list(schemes)[best] if count else None


def collect(
    path: Path,
    scheme: Scheme,
    stored: Mapping[str, checkpoint.Entry],
    spelling: Callable[[str], str] = str,
) -> tuple[dict[str, checkpoint.Entry], tuple[str, ...]]:
    """Translates a file's arrays to canonical names and layouts.

    Args:
      path: the file, for messages.
      scheme: how the file spells the arrays.
      stored: name in the file → array as it is stored.
      spelling: the name in the file → the name that `scheme` reads, where a
        file adds a prefix.

    Returns:
      (canonical name → entry, names that are no part of the layout, sorted)

    Raises:
      CheckpointFormatError: two names mean the same array.
      CheckpointMismatchError: an array has another number of axes than the
        source gives it, and might be taken for a canonical one.
    """
    entries: dict[str, checkpoint.Entry] = {}
    extra = []
    problems = []
    for name, entry in stored.items():
        canonical = scheme.canonical(spelling(name))
        if canonical is None:
            extra.append(name)
            continue
        if canonical in entries:
            raise errors.CheckpointFormatError(
                f"{path}: an array has one name. Received: "
                f"{layout.printable(entries[canonical].source)} and "
                f"{layout.printable(name)}, which are both {canonical}. "
                "Remove one of them."
            )
        axes = scheme._axes(canonical)
        if not _fits(axes, entry.shape) and len(entry.shape) == len(
            _canonical_axes(canonical)
        ):
            problems.append(
                f"≠ {canonical} ({layout.printable(name)}): expected "
                f"{len(axes)} axes, {axes}, found {entry.shape}"
            )
        entries[canonical] = checkpoint.Entry(
            scheme.shape(canonical, entry.shape),
            entry.dtype,
            functools.partial(_load, scheme, canonical, entry.load),
            name,
        )
    if problems:
        raise errors.CheckpointMismatchError(
            f"{path}: arrays have the axes that {scheme.name} gives them "
            "(C features, N classes, and 1). Received: "
            f"{len(problems)} with others.\n" + "\n".join(sorted(problems))
        )
    return entries, tuple(sorted(extra))


def _load(
    scheme: Scheme, canonical: str, load: Callable[[], np.ndarray]
) -> np.ndarray:
    return scheme.decode(canonical, load())
