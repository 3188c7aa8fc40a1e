"""Convolutions in bfloat16, and all else in float32.

A processor with AVX512-BF16 or AMX multiplies bfloat16 up to twice, or eight
times, as fast as float32, and adds the products up in float32. What is between
two convolutions, such as the statistics of a normalization, stays float32.
"""

import functools
import pathlib
from collections.abc import Mapping
from typing import Any

import tensorflow as tf
from absl import logging

from bit_tf import errors

__all__ = ["PRECISIONS", "in_bfloat16", "require"]

PRECISIONS = ("float32", "bfloat16")

_FULL = tf.float32.as_datatype_enum
_HALF = tf.bfloat16.as_datatype_enum
# As Linux names them: x86, and ARM.
_FLAGS = frozenset({"avx512_bf16", "amx_bf16", "bf16"})


def require(precision: str) -> str:
    """Checks the name of a precision.

    Raises:
      UnknownNameError: it is none of PRECISIONS.
    """
    if precision not in PRECISIONS:
        raise errors.UnknownNameError(
            f"A precision is one of {', '.join(PRECISIONS)}. Received: "
            f"{errors.brief(precision)}."
        )
    return precision


def in_bfloat16(
    graph: Any, output: str, captures: Mapping[str, tf.Tensor]
) -> tuple[Any, str, dict[str, tf.Tensor]]:
    """A graph whose float32 convolutions multiply bfloat16.

    Args:
      graph: a GraphDef.
      output: the name of its output.
      captures: what its placeholders stand for, by their outputs' names.

    Returns:
      The GraphDef; the name of its output, of the same type; and what its
      placeholders stand for: kernels are bfloat16.
    """
    _warn_if_slow()
    found = tf.compat.v1.GraphDef()
    found.CopyFrom(graph)
    kept = dict(captures)
    nodes = {node.name: node for node in found.node}
    casts: dict[tuple[str, int], str] = {}

    def cast(text: str, to: int) -> str:
        """The name of a tensor's values in another type."""
        name, _, index = text.partition(":")
        key = f"{name}:{index or 0}", to
        if key not in casts:
            number = len(casts)
            while f"cast_{number}" in nodes:
                number += len(nodes)
            node = found.node.add(name=f"cast_{number}", op="Cast")
            node.input.append(text)
            node.attr["SrcT"].type = _FULL if to == _HALF else _HALF
            node.attr["DstT"].type = to
            nodes[node.name] = node
            casts[key] = node.name
        return casts[key]

    users: dict[str, list[Any]] = {}
    for node in found.node:
        for text in node.input:
            users.setdefault(_source(text), []).append(node)
    for node in [*found.node]:
        if node.op != "Conv2D" or node.attr["T"].type != _FULL:
            continue
        picture, kernel = node.input[:2]
        node.input[0] = cast(picture, _HALF)
        owner = nodes[_source(kernel)]
        captured = kept.get(f"{owner.name}:0")
        if captured is not None and all(
            user.op == "Conv2D" and _source(user.input[0]) != owner.name
            for user in users[owner.name]
        ):
            if captured.dtype == tf.float32:
                kept[f"{owner.name}:0"] = tf.cast(captured, tf.bfloat16)
                owner.attr["dtype"].type = _HALF
        else:
            node.input[1] = cast(kernel, _HALF)
        node.attr["T"].type = _HALF
        back = cast(node.name, _FULL)
        if _source(output) == node.name:
            output = f"{back}:0"
        for user in users.get(node.name, ()):
            for index, text in enumerate(user.input):
                if _source(text) == node.name and not text.startswith("^"):
                    user.input[index] = back
    return found, output, kept


@functools.cache
def _warn_if_slow() -> None:
    """Says so where the processor does not multiply bfloat16."""
    try:
        text = pathlib.Path("/proc/cpuinfo").read_text()
    except OSError:
        return
    lines = text.lower().splitlines()
    flags = {
        flag
        for line in lines
        if line.startswith(("flags", "features"))
        for flag in line.split()
    }
    gpus = tf.config.list_physical_devices("GPU")
    if flags and not flags & _FLAGS and not gpus:
        logging.warning(
            "This processor has no instructions for bfloat16: it will be "
            "slower than float32."
        )


def _source(text: str) -> str:
    """The node of an input."""
    return text.lstrip("^").partition(":")[0]
