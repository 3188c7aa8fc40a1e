"""The operations of a SavedModel, read from its file; nothing of it is run.

A graph is a program. One for pictures has no reason to open files, start
Python or reach other machines, and one that does so is not loaded.
"""

import collections
import fnmatch
import os
import pathlib
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from bit_tf import errors

__all__ = ["Operations", "read"]

_GRAPH = "saved_model.pb"
_TEXT_GRAPH = "saved_model.pbtxt"
# TensorFlow prefers it to the two others.
_CHUNKED_GRAPH = "saved_model.cpb"
# Messages of protocol buffers are smaller.
_MAX_SIZE = 2**31
_MAX_TEXT_SIZE = 2**28

# Why: names of operations, with shell wildcards.
_REFUSED = {
    "runs Python": "PyFunc PyFuncStateless EagerPyFunc",
    "reads or writes files": "ReadFile WriteFile *MatchingFiles* Save "
    "SaveSlices SaveV2 Restore RestoreSlice RestoreV2 DTensorRestoreV2 "
    "DistributedSave MergeV2Checkpoints LoadAndRemapMatrix "
    "GenerateVocabRemapping InitializeTableFromTextFile "
    "InitializeTableFromTextFileV2 FixedUnigramCandidateSampler RecordInput "
    "Skipgram ImmutableConst DumpTensor CalibrationStatisticsSaver "
    "SaveDataset* LoadDataset* *TFRecord* *FixedLengthRecord* *CSVDataset* "
    "*LMDB* *SqlDataset* *TextLine* *WholeFileReader* CacheDataset* "
    "*Snapshot* CreateSummary* Write*Summary ImportEvent EncodeProto "
    "DecodeProtoV2 FileSystemSetConfiguration DebugIdentity* DebugNanCount "
    "DebugNumericSummary",
    "reaches other processes or machines": "Rpc* DeleteRpcFutureResource "
    "RemoteCall *DataServiceDataset* RegisterDataset* Send Recv _Send _Recv "
    "_Host* Collective* *Nccl* *DistributedTPU*",
    "ends or halts the process": "Abort *SleepDataset",
}
_PATTERNS = {
    why: re.compile("|".join(map(fnmatch.translate, names.split())))
    for why, names in _REFUSED.items()
}
# What the functions have that store and restore all variables, which a
# consumer does not call.
_SAVER = ("MergeV2Checkpoints", "RestoreV2", "SaveV2")
_TABLES = ("InitializeTableFromTextFile", "InitializeTableFromTextFileV2")
_MOST_NAMED = 5


class Operations(NamedTuple):
    """What `read` gives.

    Attributes:
      total: of all operations.
      kinds: of different ones.
      problems: a sentence for each operation that must not be.
      reusable: whether it is a SavedModel of TensorFlow 2, which describes the
        objects that it restores to.
    """

    total: int
    kinds: int
    problems: tuple[str, ...]
    reusable: bool


def read(directory: str | os.PathLike[str]) -> Operations:
    """The operations of a SavedModel.

    Raises:
      VerificationError: its graph cannot be read.
    """
    model = _parsed(pathlib.Path(directory))
    counts: collections.Counter[str] = collections.Counter()
    found: dict[tuple[str, str], int] = collections.Counter()
    for meta in model.meta_graphs:
        graph = _Graph(meta)
        for where, node in graph.nodes():
            counts[node.op] += 1
            if why := graph.refusal(where, node):
                found[node.op, why] += 1
        for asset in meta.asset_file_def:
            if not _is_plain(asset.filename):
                why = "is no file in assets/"
                found[f"the asset {asset.filename!r}", why] += 1
    problems = [
        f"{name} {why}" + (f" ({count} times)" if count > 1 else "")
        for (name, why), count in sorted(found.items())
    ]
    return Operations(
        counts.total(),
        len(counts),
        tuple(problems),
        # With several graphs TensorFlow takes the way of version 1.
        len(model.meta_graphs) == 1
        and bool(model.meta_graphs[0].object_graph_def.nodes),
    )


def _parsed(directory: pathlib.Path) -> Any:
    from google.protobuf import message, text_format
    from tensorflow.core.protobuf import saved_model_pb2 as proto

    path = directory / _GRAPH
    if os.path.lexists(directory / _CHUNKED_GRAPH):
        raise errors.VerificationError(
            f"A SavedModel's graph is in {_GRAPH}. Received: "
            f"{_CHUNKED_GRAPH}, in parts, which tensorflow_hub does not know. "
            "Export the model anew with less than 2 GiB of constants."
        )
    as_text = not path.exists()
    if as_text:
        path = directory / _TEXT_GRAPH
    limit = _MAX_TEXT_SIZE if as_text else _MAX_SIZE
    if not path.is_file():
        raise errors.VerificationError(
            f"A SavedModel's graph is in {_GRAPH} or {_TEXT_GRAPH}. Received: "
            f"{os.fspath(directory)!r}, with neither as a regular file."
        )
    try:
        size = path.stat().st_size
        if size >= limit:
            raise ValueError(f"{size} bytes; the limit is {limit}")
        content = path.read_bytes()
        if as_text:
            model = text_format.Parse(content, proto.SavedModel())
        else:
            model = proto.SavedModel.FromString(content)
        if not model.meta_graphs:
            raise ValueError("no graph in it")
    except (
        OSError,
        ValueError,
        RecursionError,
        message.DecodeError,
        text_format.ParseError,
    ) as error:
        raise errors.VerificationError(
            f"{path.name} is a SavedModel's protocol message. Received: "
            f"another file ({error}). Get the SavedModel again."
        ) from error
    return model


def _is_plain(name: str) -> bool:
    parts = name.split("/")
    return not any(part in ("", ".", "..") or "\0" in part for part in parts)


class _Graph:
    """One graph of a SavedModel, with its functions.

    "" stands for the graph itself where a function's name is expected.
    """

    def __init__(self, meta: Any):
        self._meta = meta
        self._functions: Mapping[str, Any] = {
            function.signature.name: function
            for function in meta.graph_def.library.function
        }
        self._saver = self._of_saver()

    def nodes(self) -> Iterator[tuple[str, Any]]:
        """(function, operation) of all."""
        for node in self._meta.graph_def.node:
            yield "", node
        for name, function in self._functions.items():
            for node in function.node_def:
                yield name, node

    def refusal(self, where: str, node: Any) -> str | None:
        """Why an operation must not be there, or None."""
        from tensorflow.python.framework import op_def_registry

        if node.op in self._functions:
            return None
        if node.op in _SAVER and where in self._saver:
            return None
        if node.op in _TABLES and self._reads_asset(where, node):
            return None
        for why, pattern in _PATTERNS.items():
            if pattern.fullmatch(node.op):
                return why
        stream = (
            node.attr["output_stream"].s
            if "output_stream" in node.attr
            else b""
        )
        if stream.startswith(b"file:"):
            return "reads or writes files"
        if op_def_registry.get(node.op) is None:
            return "is no operation of this TensorFlow"
        return None

    def _of_saver(self) -> frozenset[str]:
        """Functions that only the storing and restoring of variables calls."""
        saver = self._meta.saver_def
        names = {
            name.partition(":")[0]
            for name in (saver.save_tensor_name, saver.restore_op_name)
        }
        ours: list[Any] = []
        others: list[Any] = []
        for node in self._meta.graph_def.node:
            (ours if node.name in names else others).append(node)
        library = self._meta.graph_def.library
        start = {
            *self._called(others),
            *self._meta.object_graph_def.concrete_functions,
            *(row.gradient_func for row in library.gradient),
            *(row.gradient_func for row in library.registered_gradients),
        }
        return self._reached(self._called(ours)) - self._reached(start)

    def _called(self, nodes: Iterable[Any]) -> set[str]:
        found = set()
        for node in nodes:
            found.add(node.op)
            for value in node.attr.values():
                found.add(value.func.name)
                found.update(function.name for function in value.list.func)
                # Gradients are named by text.
                found.add(value.s.decode(errors="replace"))
        return found & self._functions.keys()

    def _reached(self, names: Iterable[str]) -> frozenset[str]:
        found = {name for name in names if name in self._functions}
        todo = list(found)
        while todo:
            called = self._called(self._functions[todo.pop()].node_def)
            todo += called - found
            found |= called
        return frozenset(found)

    def _reads_asset(self, where: str, node: Any) -> bool:
        """Whether a table is filled from a file of the SavedModel's own."""
        objects = self._meta.object_graph_def
        if where not in objects.concrete_functions or len(node.input) < 2:
            return False
        arguments = [
            argument.name
            for argument in self._functions[where].signature.input_arg
        ]
        bound = objects.concrete_functions[where].bound_inputs
        # What is bound comes after the arguments.
        free = len(arguments) - len(bound)
        try:
            number = bound[arguments.index(node.input[1]) - free]
            return objects.nodes[number].WhichOneof("kind") == "asset"
        except (IndexError, ValueError):
            return False
