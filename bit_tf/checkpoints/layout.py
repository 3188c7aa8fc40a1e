"""Canonical names and shapes of a BiT-ResNet's arrays, as pure functions.

Names are those of Google's .npz files without the leading `resnet/`. Kernels
are HWIO, (height, width, in, out); the head's kernel is (features, classes).
With S = 64 × width factor, the stem's width, and M = S · 2^(B−1):

    root_block/standardized_conv2d/kernel                  (7, 7, 3, S)
    block{B}/unit{UU}/a/group_norm/{gamma,beta}            (Cin,)
    block{B}/unit{UU}/a/standardized_conv2d/kernel         (1, 1, Cin, M)
    block{B}/unit01/a/proj/standardized_conv2d/kernel      (1, 1, Cin, 4M)
    block{B}/unit{UU}/b/group_norm/{gamma,beta}            (M,)
    block{B}/unit{UU}/b/standardized_conv2d/kernel         (3, 3, M, M)
    block{B}/unit{UU}/c/group_norm/{gamma,beta}            (M,)
    block{B}/unit{UU}/c/standardized_conv2d/kernel         (1, 1, M, 4M)
    group_norm/{gamma,beta}                                (32S,)
    head/conv2d/{kernel,bias}                              (32S, N), (N,)

Source: google-research/big_transfer, bit_pytorch/models.py.
"""

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from bit_tf import errors

__all__ = [
    "Detected",
    "ROOT_KERNEL",
    "HEAD_KERNEL",
    "HEAD_BIAS",
    "expected_shapes",
    "detect",
    "check",
    "claims",
    "printable",
]

Shape = tuple[int, ...]

ROOT_KERNEL = "root_block/standardized_conv2d/kernel"
HEAD_KERNEL = "head/conv2d/kernel"
HEAD_BIAS = "head/conv2d/bias"

_GROUPS = 32
_FIRST_GAMMA = "block1/unit01/a/group_norm/gamma"
_UNIT = re.compile(r"block([1-4])/unit([0-9]{2,3})/")
_CLAIMED = re.compile(
    r"root_block/standardized_conv2d/kernel"
    r"|block[0-9]+/unit[0-9]+/[a-z]/"
    r"(group_norm/(gamma|beta)|(proj/)?standardized_conv2d/kernel)"
    r"|group_norm/(gamma|beta)"
    r"|head/[^/]+/(kernel|bias)",
    re.ASCII | re.IGNORECASE,
)


@dataclass(frozen=True)
class Detected:
    """An architecture, as an array of names and shapes tells it.

    Attributes:
      blocks: units in each of the four blocks, such as (3, 4, 6, 3).
      stem_width: channels of the stem, 64 × the width factor.
      num_classes: outputs of the head; 0 without a head.
    """

    blocks: tuple[int, int, int, int]
    stem_width: int
    num_classes: int


def expected_shapes(
    blocks: tuple[int, int, int, int], stem_width: int, num_classes: int
) -> dict[str, Shape]:
    """Gives the names and shapes of an architecture's arrays.

    Args:
      blocks: units in each of the four blocks, each at least 1.
      stem_width: channels of the stem, 64 × the width factor; a multiple of
        32, the number of groups of every group normalization.
      num_classes: outputs of the head; 0 for none.

    Returns:
      canonical name → shape, in the order of the published files (sorted).

    Raises:
      ValueError: the numbers name no BiT-ResNet.
    """
    if len(blocks) != 4 or min(blocks) < 1:
        raise ValueError(
            "A BiT-ResNet has four blocks of at least one unit each. "
            f"Received: blocks={blocks}."
        )
    if stem_width < _GROUPS or stem_width % _GROUPS:
        raise ValueError(
            f"The stem's width is a positive multiple of {_GROUPS}, the "
            f"groups of a group norm. Received: stem_width={stem_width}."
        )
    if num_classes < 0:
        raise ValueError(
            "The number of classes is 0 (no head) or more. "
            f"Received: num_classes={num_classes}."
        )
    shapes: dict[str, Shape] = {ROOT_KERNEL: (7, 7, 3, stem_width)}

    def norm(scope: str, channels: int) -> None:
        for leaf in ("beta", "gamma"):
            shapes[f"{scope}/group_norm/{leaf}"] = (channels,)

    def conv(scope: str, size: int, inputs: int, outputs: int) -> None:
        name = f"{scope}/standardized_conv2d/kernel"
        shapes[name] = (size, size, inputs, outputs)

    channels = stem_width
    for block, units in enumerate(blocks):
        mid = stem_width << block
        for unit in range(units):
            scope = f"block{block + 1}/unit{unit + 1:02d}"
            norm(f"{scope}/a", channels)
            conv(f"{scope}/a", 1, channels, mid)
            if unit == 0:
                conv(f"{scope}/a/proj", 1, channels, 4 * mid)
            norm(f"{scope}/b", mid)
            conv(f"{scope}/b", 3, mid, mid)
            norm(f"{scope}/c", mid)
            conv(f"{scope}/c", 1, mid, 4 * mid)
            channels = 4 * mid
    shapes["group_norm/beta"] = shapes["group_norm/gamma"] = (channels,)
    if num_classes:
        shapes[HEAD_KERNEL] = (channels, num_classes)
        shapes[HEAD_BIAS] = (num_classes,)
    return dict(sorted(shapes.items()))


def claims(name: str) -> bool:
    """Whether a name is of the layout's kind, whatever its numbers and case.

    A file may hold arrays of its own beside a model's, such as an optimizer's
    state. A name that this function claims is not one of those: `block5/…`,
    a second head, or a projection in unit02 mean another architecture.

    Args:
      name: a name without `resnet/`.
    """
    return _CLAIMED.fullmatch(name) is not None


def detect(shapes: Mapping[str, Shape]) -> Detected:
    """Tells the architecture from names and shapes, never from a file name.

    It reads the stem's width from the root kernel, the depth from the numbers
    of the units, and the number of classes from the head. Any depth and width
    will do. It does not compare the other arrays: `check` does.

    Args:
      shapes: canonical name → shape.

    Raises:
      CheckpointMismatchError: there is no root kernel, its width is not a
        multiple of 32, or a block or a unit is missing.
    """
    stem_width = _stem_width(shapes)
    if stem_width < _GROUPS or stem_width % _GROUPS:
        raise errors.CheckpointMismatchError(
            "The stem's width must be a positive multiple of "
            f"{_GROUPS}, the groups of a group norm. Received: {ROOT_KERNEL} "
            f"of shape {shapes.get(ROOT_KERNEL)}, a width of {stem_width}. "
            "This is not a BiT-ResNet, or its kernels are not in HWIO order."
        )
    return Detected(
        blocks=_blocks(shapes),
        stem_width=stem_width,
        num_classes=_num_classes(shapes, 32 * stem_width),
    )


def _stem_width(shapes: Mapping[str, Shape]) -> int:
    root = shapes.get(ROOT_KERNEL)
    if root is not None and len(root) == 4 and root[:3] == (7, 7, 3):
        return root[3]
    # A damaged root kernel is listed by `check` with every other difference.
    first = shapes.get(_FIRST_GAMMA, ())
    if len(first) == 1 and first[0] and first[0] % _GROUPS == 0:
        return first[0]
    if root is not None:
        hint = _hint((7, 7, 3, root[0]), root) if root else ""
        raise errors.CheckpointMismatchError(
            "One array differs from the layout:\n"
            f"≠ {ROOT_KERNEL}: expected (7, 7, 3, 64 × width), found "
            f"{root}{hint}"
        )
    found = ", ".join(printable(name) for name in sorted(shapes)[:5])
    raise errors.CheckpointMismatchError(
        f"A BiT-ResNet begins with the array {ROOT_KERNEL}, and this one does "
        f"not have it. Received: {len(shapes)} arrays of the layout"
        + (f", the first of them {found}." if found else ".")
        + " If they have another architecture's names, this file is of "
        "another format or another model."
        f"\n− {ROOT_KERNEL} (7, 7, 3, 64 × width)"
    )


def _blocks(shapes: Iterable[str]) -> tuple[int, int, int, int]:
    units: dict[int, set[int]] = {1: set(), 2: set(), 3: set(), 4: set()}
    for name in shapes:
        if match := _UNIT.match(name):
            number = int(match[2])
            if number and match[2] == f"{number:02d}":
                units[int(match[1])].add(number)
    missing = [
        f"block{block}/unit{number:02d}"
        for block, numbers in units.items()
        for number in range(1, max(numbers, default=1) + 1)
        if number not in numbers
    ]
    if missing:
        counts = ", ".join(f"block{b}: {len(n)}" for b, n in units.items())
        raise errors.CheckpointMismatchError(
            "The units of each of the four blocks are numbered from unit01 "
            f"without a gap. Received: {counts} units; missing are "
            f"{len(missing)}:\n" + "\n".join(f"− {name}" for name in missing)
        )
    one, two, three, four = (len(numbers) for numbers in units.values())
    return one, two, three, four


def _num_classes(shapes: Mapping[str, Shape], features: int) -> int:
    kernel = shapes.get(HEAD_KERNEL, ())
    if len(kernel) == 2:
        transposed = kernel[0] != features and kernel[1] == features
        return kernel[0] if transposed else kernel[1]
    bias = shapes.get(HEAD_BIAS, ())
    return bias[0] if len(bias) == 1 else 0


def check(
    shapes: Mapping[str, Shape],
    expected: Mapping[str, Shape],
    *,
    allow_extra: bool = False,
    spell: Callable[[str], str] = str,
) -> tuple[str, ...]:
    """Compares names and shapes strictly.

    Args:
      shapes: name → shape, as received.
      expected: name → shape, as it must be.
      allow_extra: accept names that are not expected.
      spell: canonical name → the name in the file, shown beside it.

    Returns:
      The names that are not expected, sorted; empty unless allow_extra.

    Raises:
      CheckpointMismatchError: with every difference in one message, sorted by
        name: − a missing array, + an extra one, ≠ one of another shape.
    """
    missing = expected.keys() - shapes.keys()
    extra = tuple(sorted(shapes.keys() - expected.keys()))
    wrong = {
        name
        for name in expected.keys() & shapes.keys()
        if tuple(shapes[name]) != tuple(expected[name])
    }
    if not missing and not wrong and (allow_extra or not extra):
        return extra
    lines = []
    for name in sorted(missing | wrong | set(extra)):
        shown = printable(name)
        if spell(name) != name:
            shown += f" ({printable(spell(name))})"
        if name in missing:
            lines.append(f"− {shown} {tuple(expected[name])}")
        elif name in wrong:
            want, found = tuple(expected[name]), tuple(shapes[name])
            lines.append(
                f"≠ {shown}: expected {want}, found {found}{_hint(want, found)}"
            )
        else:
            lines.append(f"+ {shown} {tuple(shapes[name])}")
    advice = (
        " An array that is missing under one name and extra under another has "
        "been renamed."
        if missing and extra
        else ""
    )
    raise errors.CheckpointMismatchError(
        f"Names and shapes must be exactly the layout's {len(expected)} "
        f"arrays. Received: {len(shapes)} arrays; {len(missing)} missing (−), "
        f"{len(extra)} extra (+), {len(wrong)} of another shape (≠).{advice}\n"
        + "\n".join(lines)
    )


def _hint(expected: Shape, found: Shape) -> str:
    """Says how a shape came about, if it is a known layout of the other."""
    kernel = (1, 1, *expected) if len(expected) == 2 else expected
    if len(kernel) == 4 and found == (kernel[3], kernel[2], *kernel[:2]):
        return " (OIHW, as PyTorch keeps it: transpose by (2, 3, 1, 0) to HWIO)"
    if len(found) > 1 and sorted(found) == sorted(expected):
        return " (transposed: the same axes in another order)"
    if found and math.prod(found) == math.prod(expected):
        return " (as many values, reshaped)"
    return ""


def printable(name: str) -> str:
    """Gives a name that is safe to print: quoted if it holds controls."""
    return name if name.isprintable() else ascii(name)
