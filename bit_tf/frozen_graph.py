"""A function whose work on its weights is done once: nothing of it is left.

Unlike TensorFlow's converter to constants, this one

* computes what depends on weights alone when it freezes, such as the
  standardized kernels of all convolutions, instead of leaving that to the first
  call, and makes no copies of a model on the way;
* keeps large arrays beside the graph, which may then be of any size: a graph of
  constants is one protocol buffer, at most 2 GiB.
"""

import collections
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import tensorflow as tf
from tensorflow.core.protobuf import config_pb2, meta_graph_pb2
from tensorflow.python.eager import context
from tensorflow.python.framework import op_def_registry
from tensorflow.python.grappler import tf_optimizer

from bit_tf import conv_precision, fast_norms

__all__ = ["freeze"]

# Arrays up to this many bytes are constants of the graph, which TensorFlow's
# optimizers see.
_CONSTANT = 2**16
# Bytes of variables whose share of the graph is computed at once: what comes
# between takes memory, too.
_AT_ONCE = 2**28
# Bytes of kernels in bfloat16 that are constants, too. TensorFlow makes copies
# of a graph: of R50x1's 47 MB they take 1 GB in all.
_KERNELS = 2**26
# These move values between branches, and between a loop's iterations.
_CONTROL_FLOW = frozenset(
    {
        *("Enter", "Exit", "LoopCond", "Merge", "NextIteration", "Switch"),
        *("RefEnter", "RefExit", "RefMerge", "RefNextIteration", "RefSwitch"),
    }
)


def freeze(
    function: Any, precision: str = "float32"
) -> Callable[[tf.Tensor], tf.Tensor]:
    """Computes what depends on the weights alone, once.

    A variable's later values are not seen, unless the function itself changes
    it.

    Args:
      function: a tf.types.experimental.ConcreteFunction that takes and returns
        one tensor.
      precision: "bfloat16" has convolutions multiply bfloat16. A picture's
        values then depend a little on the others of its batch, if one of these
        needs the slower formula of fast_norms.

    Returns:
      A callable with the same values, as far as the precision goes. It keeps
      no variables but those that the function changes.

    Raises:
      UnknownNameError: there is no such precision.
    """
    return _Frozen(function, conv_precision.require(precision))


class _Frozen:
    """What `freeze` returns."""

    def __init__(self, function: Any, precision: str):
        graph = _Graph(function)
        left, result, captures = graph.rest(graph.computed())
        self._argument = graph.argument
        (argument,) = graph.arguments
        self._spec = tf.TensorSpec(argument.shape, argument.dtype)
        # Tables and the like live as long as the function that brought them.
        self._owner = function if graph.needs(captures) else None
        # oneDNN orders a convolution's kernel anew in every call, unless it is
        # a constant: a quarter of the time of one picture in bfloat16.
        self._constants: set[str] = set()
        if precision == "bfloat16":
            left, result, captures = conv_precision.in_bfloat16(
                left, result, captures
            )
            self._constants = _kernels(captures)
        self._captures = captures
        self._left, self._result = left, result
        self._building = threading.Lock()
        self._exact = self._fast = None
        fast = None
        if graph.is_pure():
            fast = fast_norms.rewritten(left, result)
        if fast is None:
            self._exact = self._function(left, [result])
        else:
            self._fast = self._function(fast[0], [result, fast[1]])

    def __call__(self, tensor: tf.Tensor) -> tf.Tensor:
        if self._fast is not None and not tf.is_symbolic_tensor(tensor):
            # The network is a chain: what starts one operation after the other
            # is faster than what looks for those that can start.
            with context.function_executor_type("SINGLE_THREADED_EXECUTOR"):
                output, worst = self._fast(tensor)
            if float(worst) <= fast_norms.LIMIT:
                return output
        with self._building:
            if self._exact is None:
                self._exact = self._function(self._left, [self._result])
        return self._exact(tensor)[0]

    def _function(self, graph: Any, outputs: list[str]) -> Any:
        """A part of the graph, as a function."""
        if self._constants:
            graph = _with_constants(
                graph, {name: self._captures[name] for name in self._constants}
            )

        def call(tensor):
            here = tf.compat.v1.get_default_graph()
            feeds = {
                name: here.capture(value)
                for name, value in self._captures.items()
                if name not in self._constants
            }
            feeds[self._argument] = tensor
            return tf.graph_util.import_graph_def(
                graph, feeds, outputs, name=""
            )

        return tf.compat.v1.wrap_function(call, [self._spec])


class _Graph:
    """A function's graph, without calls, and what of it never changes.

    Attributes:
      arguments: the function's tensors, without those it captured.
      argument: the name of the one.
      output: the name of the output.
    """

    def __init__(self, function: Any):
        graph = function.graph
        self._captures = {
            inner.op.name: outer for outer, inner in graph.captures
        }
        self.arguments = [
            tensor
            for tensor in function.inputs
            if tensor.op.name not in self._captures
        ]
        self.argument = self.arguments[0].name
        (output,) = function.outputs
        self.output = output.name
        self._definition = _inlined(function)
        self._nodes = {node.name: node for node in self._definition.node}
        self._varying, self._inside, self._binding = self._find_varying()
        self._merge()
        variables = {
            id(variable.handle): variable for variable in graph.variables
        }
        # Bytes of the variables, by the names of their handles.
        self._sizes = {
            name: variable.dtype.size * (variable.shape.num_elements() or 0)
            for name, outer in self._captures.items()
            if (variable := variables.get(id(outer))) is not None
        }

    def computed(self) -> dict[str, tf.Tensor]:
        """The values that what varies takes from the rest, by their names."""
        wanted: dict[str, None] = {}
        if _split(self.output)[0] not in self._varying:
            wanted[self.output] = None
        for node in self._before([self.output], fixed=False):
            if node.name not in self._varying:
                continue
            for source, index in _data_inputs(node):
                if source in self._varying:
                    continue
                if self._nodes[source].op != "Const":
                    wanted[f"{source}:{index}"] = None
        found: dict[str, tf.Tensor] = {}
        for names in self._parts(wanted):
            found.update(zip(names, self._compute(names), strict=True))
        return found

    def rest(
        self, values: dict[str, tf.Tensor]
    ) -> tuple[Any, str, dict[str, tf.Tensor]]:
        """What varies, as a graph.

        Args:
          values: what `computed` returned.

        Returns:
          The GraphDef; the name of its output; and the tensors that its
          placeholders stand for, but for the argument, by their outputs' names.
        """
        names = {
            name: self._free_name(number) for number, name in enumerate(values)
        }
        graph = tf.compat.v1.GraphDef(versions=self._definition.versions)
        graph.library.CopyFrom(self._definition.library)
        captures: dict[str, tf.Tensor] = {}
        for name, value in values.items():
            node = graph.node.add(name=names[name])
            node.attr["dtype"].type = value.dtype.as_datatype_enum
            if _is_small(value):
                node.op = "Const"
                node.attr["value"].tensor.CopyFrom(
                    tf.make_tensor_proto(value.numpy())
                )
            else:
                node.op = "Placeholder"
                node.attr["shape"].shape.CopyFrom(value.shape.as_proto())
                captures[f"{names[name]}:0"] = value
        for node in self._before([self.output, self.argument], fixed=False):
            if node.name not in self._varying and node.op != "Const":
                continue
            if node.name in self._captures:
                outer = self._captures[node.name]
                captures[f"{node.name}:0"] = outer
            kept = graph.node.add()
            kept.CopyFrom(node)
            del kept.input[:]
            for text in self._inputs(node.name):
                source, index = _split(text)
                name = text if index is None else f"{source}:{index}"
                kept.input.append(names.get(name, text))
        output = (
            f"{names[self.output]}:0" if self.output in names else self.output
        )
        return graph, output, captures

    def is_pure(self) -> bool:
        """Whether calls do nothing but to compute the output."""
        return not self._inside and not any(
            self._has_effects(node)
            for node in self._before([self.output], fixed=False)
            if node.name in self._varying
        )

    def needs(self, captures: Iterable[str]) -> bool:
        """Whether any of them is a capture of the function itself."""
        return any(_split(name)[0] in self._captures for name in captures)

    def _find_varying(self) -> tuple[set[str], set[str], set[str]]:
        """Nodes whose outputs may differ from call to call.

        Returns:
          Their names; of these, those in branches and loops; and those that
          others wait for, if they say so.
        """
        users: dict[str, list[str]] = collections.defaultdict(list)
        after: dict[str, list[str]] = collections.defaultdict(list)
        for node in self._definition.node:
            for source, index in map(_split, node.input):
                (after if index is None else users)[source].append(node.name)
        reads = {
            node.name
            for node in self._definition.node
            if self._reads(node, users)
        }
        found: set[str] = set()
        stack = [
            node.name
            for node in self._definition.node
            if node.name not in reads and self._is_open(node)
        ]
        while stack:
            name = stack.pop()
            if name in found or name in reads:
                continue
            found.add(name)
            stack += users[name]
        # What is inside a branch or a loop stays there: only control edges tell
        # where a constant is.
        inside: set[str] = set()
        stack = [
            node.name
            for node in self._definition.node
            if node.op in _CONTROL_FLOW
        ]
        while stack:
            name = stack.pop()
            if name not in inside:
                inside.add(name)
                stack += users[name] + after[name]
        # Nodes without outputs pass on what they wait for.
        binding: set[str] = set()
        stack = [
            name
            for name in found | inside
            if name in inside or self._has_effects(self._nodes[name])
        ]
        while stack:
            name = stack.pop()
            if name not in binding:
                binding.add(name)
                stack += [n for n in after[name] if self._nodes[n].op == "NoOp"]
        return found | inside, inside, binding

    def _reads(self, node: Any, users: dict[str, list[str]]) -> bool:
        """Whether it reads a variable that the graph only reads."""
        if node.op != "ReadVariableOp":
            return False
        ((handle, _),) = _data_inputs(node)
        # A call's arguments became such nodes.
        while self._nodes[handle].op == "Identity":
            ((handle, _),) = _data_inputs(self._nodes[handle])
        if handle not in self._captures:
            return False
        stack = [handle]
        while stack:
            for user in users[stack.pop()]:
                if self._nodes[user].op == "Identity":
                    stack.append(user)
                elif self._nodes[user].op != "ReadVariableOp":
                    return False
        return True

    def _is_open(self, node: Any) -> bool:
        """Whether it brings what its inputs do not tell."""
        if node.op == "Placeholder":
            captured = self._captures.get(node.name)
            return captured is None or captured.dtype in (
                tf.resource,
                tf.variant,
            )
        return node.op == "NoOp" or self._has_effects(node)

    def _has_effects(self, node: Any) -> bool:
        """Whether it does more than to compute its outputs."""
        if node.op in ("NoOp", "Placeholder"):
            return False
        known = op_def_registry.get(node.op)
        # A function that could not be put in its place is not known.
        return known is None or known.is_stateful

    def _merge(self) -> None:
        """Has what two nodes compute alike computed by one.

        Two signatures of a model, called side by side, then have one network.
        TensorFlow's optimizer does so where the weights are constants.
        """
        waiting = {
            node.name: len({name for name, _ in _data_inputs(node)})
            for node in self._definition.node
        }
        users = collections.defaultdict(list)
        for node in self._definition.node:
            for source in {name for name, _ in _data_inputs(node)}:
                users[source].append(node.name)
        instead: dict[str, str] = {}
        known: dict[tuple, str] = {}
        ready = [name for name, count in waiting.items() if not count]
        # Loops, whose nodes wait for each other, stay as they are.
        while ready:
            name = ready.pop()
            node = self._nodes[name]
            for index, text in enumerate(node.input):
                source, output = _split(text)
                if output is not None and source in instead:
                    node.input[index] = f"{instead[source]}:{output}"
            for user in users[name]:
                waiting[user] -= 1
                if not waiting[user]:
                    ready.append(user)
            key = self._key(node)
            if key is not None:
                first = known.setdefault(key, name)
                if first != name:
                    instead[name] = first

    def _key(self, node: Any) -> tuple | None:
        """Equal for nodes with equal outputs; None if that is not known."""
        if node.name in self._varying:
            if node.op == "Placeholder" or self._has_effects(node):
                return None
            if node.name in self._inside or len(self._inputs(node.name)) != len(
                list(_data_inputs(node))
            ):
                return None
        elif node.op == "Placeholder":
            return None
        attributes = (
            (name, value.SerializeToString(deterministic=True))
            for name, value in node.attr.items()
            if not name.startswith("_")
        )
        inputs = tuple(
            f"{source}:{index}" for source, index in _data_inputs(node)
        )
        return node.op, node.device, inputs, *sorted(attributes)

    def _before(self, names: Iterable[str], fixed: bool) -> list[Any]:
        """The nodes that tensors come from, in the graph's order.

        Args:
          names: of the tensors.
          fixed: whether what never changes has nodes before it, too.
        """
        found: set[str] = set()
        stack = [_split(name)[0] for name in names]
        while stack:
            name = stack.pop()
            if name not in found:
                found.add(name)
                if fixed or name in self._varying:
                    stack += [_split(text)[0] for text in self._inputs(name)]
        return [node for name, node in self._nodes.items() if name in found]

    def _inputs(self, name: str) -> list[str]:
        """A node's inputs, without control edges that only give an order."""
        inputs = []
        for text in self._nodes[name].input:
            source, index = _split(text)
            if index is not None or (
                name in self._varying and source in self._binding
            ):
                inputs.append(text)
        return inputs

    def _parts(self, names: Iterable[str]) -> Iterator[list[str]]:
        """Names in groups, each of not too many weights."""
        part: list[str] = []
        size = 0
        for name in names:
            here = sum(
                self._sizes.get(node.name, 0)
                for node in self._before([name], fixed=True)
            )
            if part and size + here > _AT_ONCE:
                yield part
                part, size = [], 0
            part.append(name)
            size += here
        if part:
            yield part

    def _compute(self, names: list[str]) -> list[tf.Tensor]:
        """The values of tensors that come from weights alone."""
        graph = tf.compat.v1.GraphDef(versions=self._definition.versions)
        graph.library.CopyFrom(self._definition.library)
        for node in self._before(names, fixed=True):
            kept = graph.node.add()
            kept.CopyFrom(node)
            del kept.input[:]
            kept.input.extend(self._inputs(node.name))
        captured = [
            node.name for node in graph.node if node.name in self._captures
        ]

        def call():
            here = tf.compat.v1.get_default_graph()
            feeds = {
                f"{name}:0": here.capture(self._captures[name])
                for name in captured
            }
            return tf.graph_util.import_graph_def(graph, feeds, names, name="")

        return tf.compat.v1.wrap_function(call, [])()

    def _free_name(self, number: int) -> str:
        """A name that no node has."""
        name = f"computed_{number}"
        while name in self._nodes:
            name += "_"
        return name


def _inlined(function: Any) -> Any:
    """A function's GraphDef with the bodies of what it calls."""
    graph = function.graph.as_graph_def()
    for called in graph.library.function:
        # TensorFlow prefers another implementation, or the call.
        for attribute in ("api_implements", "_noinline"):
            called.attr.pop(attribute, None)
    meta_graph = meta_graph_pb2.MetaGraphDef(graph_def=graph)
    # What grappler keeps.
    names = meta_graph_pb2.CollectionDef()
    names.node_list.value.extend(
        tensor.name for tensor in [*function.inputs, *function.outputs]
    )
    meta_graph.collection_def["train_op"].CopyFrom(names)
    config = config_pb2.ConfigProto()
    options = config.graph_options.rewrite_options
    options.min_graph_nodes = -1
    options.optimizers.append("function")
    graph = tf_optimizer.OptimizeGraph(config, meta_graph)
    for node in graph.node:
        # It names nodes that may go.
        node.attr.pop("_class", None)
    return graph


def _split(text: str) -> tuple[str, int | None]:
    """(node, number of its output) of an input; None for control edges."""
    if text.startswith("^"):
        return text[1:], None
    name, _, index = text.partition(":")
    return name, int(index or 0)


def _data_inputs(node: Any) -> Iterator[tuple[str, int]]:
    for source, index in map(_split, node.input):
        if index is not None:
            yield source, index


def _is_small(value: tf.Tensor) -> bool:
    return value.dtype.is_numpy_compatible and (
        value.dtype.size * value.shape.num_elements() <= _CONSTANT
    )


def _kernels(captures: dict[str, tf.Tensor]) -> set[str]:
    """The names of those in bfloat16, unless they are too many."""
    found = {
        name: value.dtype.size * value.shape.num_elements()
        for name, value in captures.items()
        if value.dtype == tf.bfloat16
    }
    return set(found) if sum(found.values()) <= _KERNELS else set()


def _with_constants(graph: Any, values: dict[str, tf.Tensor]) -> Any:
    """A graph with constants in the place of some placeholders.

    Args:
      graph: a GraphDef.
      values: by the names of the placeholders' outputs.
    """
    found = tf.compat.v1.GraphDef()
    found.CopyFrom(graph)
    for node in found.node:
        value = values.get(f"{node.name}:0")
        if value is not None:
            node.op = "Const"
            node.attr.clear()
            node.attr["dtype"].type = value.dtype.as_datatype_enum
            node.attr["value"].tensor.CopyFrom(
                tf.make_tensor_proto(value.numpy())
            )
    return found
