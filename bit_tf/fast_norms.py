"""Group normalization with one look at a picture less, where that is exact.

`layers.channel_moments` takes the squares around a number s near the mean:
var x = E[(x − s)²] − (E[x] − s)². That is exact to rounding whatever the mean
is, but every pixel's difference is written and read again. The same variance
is E[x²] − E[x]², of which TensorFlow has the first in one operation that only
reads (EuclideanNorm); in float32 that is as good unless the mean is far larger
than the spread. So a graph is rewritten to the second, and also says how far
its pictures are from where the two differ.
"""

import collections
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

__all__ = ["LIMIT", "rewritten"]

# Mean square over variance of a group, from which the first formula is used.
# Rounding is a relative error of at most 6e-8 of the mean square. Measured at
# 100, a mean ten times the spread: 4e-6 of the normalized values.
LIMIT = 100.0


class _Norm(NamedTuple):
    """Names of one normalization's nodes.

    Attributes:
      x: the tensor.
      mean: E[x] of every channel.
      difference: E[(x − s)²] − (E[x] − s)².
      variance: that, or 0 where it is less.
      by_group: Reshape of the variance to [n, …, groups, channels].
      group_mean: Mean over the channels of a group.
      total: variance and epsilon.
    """

    x: str
    mean: str
    difference: str
    variance: str
    by_group: str
    group_mean: str
    total: str


def rewritten(graph: Any, output: str) -> tuple[Any, str] | None:
    """A graph with every variance from E[x²].

    Args:
      graph: a GraphDef.
      output: the name of its output.

    Returns:
      The GraphDef, and the name of an output more: float32 [], the largest
      mean square over variance of any group. At most LIMIT, and the values are
      those of the graph. None if there is no such normalization.
    """
    nodes = {node.name: node for node in graph.node}
    norms = list(_find(nodes))
    if not norms:
        return None
    found = tf.compat.v1.GraphDef()
    found.CopyFrom(graph)
    build = _Builder(found)
    worst = []
    for norm in norms:
        square = build.mean_square(norm.x)
        of_mean = build.node("Square", [norm.mean])
        build.replace(
            norm.variance, norm.difference, build.node("Sub", [square, of_mean])
        )
        grouped = build.like(norm.by_group, square)
        grouped = build.like(norm.group_mean, grouped)
        ratio = build.node("RealDiv", [grouped, norm.total])
        ratio = build.node("Reshape", [ratio, build.constant([-1])])
        worst.append(build.reduced("Max", ratio, [0], keep=False))
    packed = build.node("Pack", worst, N=len(worst), axis=0)
    last = build.reduced("Max", packed, [0], keep=False)
    return _pruned(found, [output, last]), f"{last}:0"


class _Builder:
    """Adds nodes of float32 to a graph."""

    def __init__(self, graph: Any):
        self._graph = graph
        self._nodes = {node.name: node for node in graph.node}

    def node(self, op: str, inputs: Sequence[str], **attributes: int) -> str:
        """The name of a new node."""
        number = len(self._graph.node)
        name = f"fast_norms_{number}"
        while name in self._nodes:
            name += "_"
        node = self._graph.node.add(name=name, op=op, input=inputs)
        self._nodes[name] = node
        node.attr["T"].type = tf.float32.as_datatype_enum
        for key, value in attributes.items():
            node.attr[key].i = value
        return name

    def constant(self, value: Any) -> str:
        name = self.node("Const", [])
        node = self._graph.node[-1]
        del node.attr["T"]
        tensor = tf.make_tensor_proto(np.asarray(value, np.int32))
        node.attr["dtype"].type = tensor.dtype
        node.attr["value"].tensor.CopyFrom(tensor)
        return name

    def reduced(
        self, op: str, x: str, axes: list[int], keep: bool = True
    ) -> str:
        name = self.node(op, [x, self.constant(axes)])
        node = self._graph.node[-1]
        # The constant came before it.
        node.attr["Tidx"].type = tf.int32.as_datatype_enum
        node.attr["keep_dims"].b = keep
        return name

    def like(self, name: str, x: str) -> str:
        """What a node does, to another tensor."""
        node = self._nodes[name]
        again = self.node(node.op, [x, *node.input[1:]])
        self._graph.node[-1].attr.clear()
        for key, value in node.attr.items():
            self._graph.node[-1].attr[key].CopyFrom(value)
        return again

    def mean_square(self, x: str) -> str:
        """E[x²] of every channel, [n, 1, 1, c]."""
        # Rows before columns, as the mean is taken: rounding errors then grow
        # with the height plus the width.
        norm = self.reduced("EuclideanNorm", x, [1])
        norm = self.reduced("EuclideanNorm", norm, [2])
        sides = self.node(
            "StridedSlice",
            [self._shape(x), *map(self.constant, ([1], [3], [1]))],
        )
        self._type("T", tf.int32)
        self._type("Index", tf.int32)
        pixels = self.reduced("Prod", sides, [0], keep=False)
        self._type("T", tf.int32)
        count = self.node("Cast", [pixels])
        del self._graph.node[-1].attr["T"]
        self._type("SrcT", tf.int32)
        self._type("DstT", tf.float32)
        return self.node("RealDiv", [self.node("Square", [norm]), count])

    def _shape(self, x: str) -> str:
        name = self.node("Shape", [x])
        self._type("out_type", tf.int32)
        return name

    def _type(self, name: str, dtype: tf.DType) -> None:
        self._graph.node[-1].attr[name].type = dtype.as_datatype_enum

    def replace(self, user: str, old: str, new: str) -> None:
        """Has a node take another's output."""
        node = self._nodes[user]
        for index, text in enumerate(node.input):
            if _output(text) == old:
                node.input[index] = new


def _find(nodes: dict[str, Any]) -> Iterable[_Norm]:
    """The normalizations of a graph that are written as in `layers`."""
    users = collections.defaultdict(list)
    for node in nodes.values():
        for text in node.input:
            users[_output(text)].append(node)

    def only(node: Any, op: str) -> Any | None:
        """Its only user, if that is such an operation."""
        found = users[node.name]
        return found[0] if len(found) == 1 and found[0].op == op else None

    for node in nodes.values():
        if node.op != "Maximum":
            continue
        match = _variance(node, nodes)
        step: Any = node
        path = [step]
        for op in ("Reshape", "AddV2", "Mean", "AddV2", "Rsqrt"):
            step = None if step is None else only(step, op)
            path.append(step)
        if match is None or step is None:
            continue
        _, by_group, _, group_mean, total, _ = path
        yield _Norm(
            *match, node.name, by_group.name, group_mean.name, total.name
        )


def _variance(node: Any, nodes: dict[str, Any]) -> tuple[str, str, str] | None:
    """(x, its mean, the difference) of max(E[(x − s)²] − (E[x] − s)², 0)."""

    def inputs(name: str, op: str) -> list[str] | None:
        found = nodes.get(_output(name))
        if found is None or found.op != op:
            return None
        return [text for text in found.input if not text.startswith("^")]

    def mean(name: str) -> str | None:
        """What a mean over rows and columns is taken of."""
        for axis in (2, 1):
            found = inputs(name, "Mean")
            if found is None or _value(nodes.get(_output(found[1]))) != axis:
                return None
            name = found[0]
        return name

    difference = node.input[0]
    if _value(nodes.get(_output(node.input[1]))) != 0:
        return None
    outer = inputs(difference, "Sub")
    squared = outer and mean(outer[0])
    around = squared and inputs(squared, "Square")
    distance = around and inputs(around[0], "Sub")
    rest = outer and inputs(outer[1], "Square")
    shifted = rest and inputs(rest[0], "Sub")
    if not distance or not shifted:
        return None
    x, shift = distance
    if shift != shifted[1] or mean(shifted[0]) != x:
        return None
    return x, shifted[0], _output(difference)


def _value(node: Any) -> float | None:
    """A constant's, if it is a single number."""
    if node is None or node.op != "Const":
        return None
    array = tf.make_ndarray(node.attr["value"].tensor)
    return float(array.reshape(())) if array.size == 1 else None


def _pruned(graph: Any, outputs: Iterable[str]) -> Any:
    """A graph with what its outputs need, and its placeholders."""
    nodes = {node.name: node for node in graph.node}
    needed: set[str] = set()
    stack = [_output(name) for name in outputs]
    while stack:
        name = stack.pop()
        if name not in needed:
            needed.add(name)
            stack += map(_output, nodes[name].input)
    found = tf.compat.v1.GraphDef(
        versions=graph.versions, library=graph.library
    )
    found.node.extend(
        node
        for node in graph.node
        if node.name in needed or node.op == "Placeholder"
    )
    return found


def _output(text: str) -> str:
    """The node of an input."""
    return text.lstrip("^").partition(":")[0]
