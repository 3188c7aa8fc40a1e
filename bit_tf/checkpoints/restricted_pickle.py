"""Reads pickles of weights without running anything that they say.

A pickle is a program for a small machine, and Python's own machine imports
what it names and calls what it imports. The machine here knows the opcodes
with which plain containers are written, imports nothing, and has nothing that
it could call: a name is compared with a list, and for what a call would make
there is a stand-in.

`read` is for arrays. What stands for a call of `numpy.dtype` is a dtype's
description, which is checked, and not a dtype. An array's data stay in the file
until they are asked for, so that neither a length that a file claims nor one
that it has takes memory.

Source: Lib/pickletools.py of CPython for the opcodes; numpy/core (NumPy 1) and
numpy/_core (NumPy 2) for how arrays are pickled, by protocols 2 to 5.
"""

import codecs
import enum
import math
import os
import pickletools
import re
import struct
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, ClassVar, NamedTuple, NoReturn

import numpy as np

from bit_tf import errors
from bit_tf.checkpoints import checkpoint

__all__ = [
    "HOSTILE",
    "PROTOCOLS",
    "Machine",
    "Span",
    "StandIn",
    "StoredArray",
    "kind",
    "read",
    "shown",
]

PROTOCOLS = (2, 3, 4, 5)

_CHUNK = 1 << 20
# Longer data are left in the file.
_MAX_INLINE = 4096
# 459 arrays take fewer than 50 opcodes each.
_MAX_OPCODES = 1_000_000
_MAX_NAME = 256
# What hashes, compares or frees a value may go down with it.
_MAX_DEPTH = 100
_MAX_RANK = 32
_MAX_SIZE = 2**62
_NUMBER = re.compile(r"[<>=|]?(b1|[iu][1248]|f[248]|c8|c16)")

_RULE = (
    "a pickle of weights holds arrays of numbers, text, and plain containers"
)
HOSTILE = (
    "nothing was executed. Do not open the file with another program; take "
    "the weights from a source that you trust, or as .safetensors."
)


class _Known(enum.Enum):
    """The names that a pickle of arrays has."""

    RECONSTRUCT = enum.auto()
    NDARRAY = enum.auto()
    DTYPE = enum.auto()
    SCALAR = enum.auto()
    FROMBUFFER = enum.auto()
    ENCODE = enum.auto()
    TUPLE = enum.auto()
    LIST = enum.auto()
    DICT = enum.auto()
    BYTES = enum.auto()


_NAMES = {
    "numpy.core.multiarray._reconstruct": _Known.RECONSTRUCT,
    "numpy._core.multiarray._reconstruct": _Known.RECONSTRUCT,
    "numpy.ndarray": _Known.NDARRAY,
    "numpy.dtype": _Known.DTYPE,
    "numpy.core.multiarray.scalar": _Known.SCALAR,
    "numpy._core.multiarray.scalar": _Known.SCALAR,
    "numpy.core.numeric._frombuffer": _Known.FROMBUFFER,
    "numpy._core.numeric._frombuffer": _Known.FROMBUFFER,
    "_codecs.encode": _Known.ENCODE,
    "collections.OrderedDict": _Known.DICT,
    **{
        f"{module}.{name}": known
        for module in ("builtins", "__builtin__")
        for name, known in (
            ("tuple", _Known.TUPLE),
            ("list", _Known.LIST),
            ("dict", _Known.DICT),
            ("bytes", _Known.BYTES),
            ("bytearray", _Known.BYTES),
        )
    },
}


class _Source(NamedTuple):
    """A file, and what tells whether it is still the same."""

    path: Path
    size: int
    modified: int

    @classmethod
    def of(cls, path: Path, file: BinaryIO) -> "_Source":
        status = os.fstat(file.fileno())
        return cls(path, status.st_size, status.st_mtime_ns)


class Span(NamedTuple):
    """Data in the file.

    Attributes:
      offset, size: in bytes.
      kind: "bytes"; "text", UTF-8; or "latin1", bytes that protocol 2 wrote
        as text, in UTF-8.
    """

    offset: int
    size: int
    kind: str


class StandIn:
    """What stands for an object that a pickle would make.

    Attributes:
      what: it is, in words.
    """

    what = "an object"


class _Dtype(StandIn):
    """What stands for `numpy.dtype(code, False, True)` and its state."""

    what = "a dtype"

    def __init__(self, code: str):
        self.code = code
        self.built = False
        self.problem = ""
        if not _NUMBER.fullmatch(code):
            self.problem = f"its dtype is {errors.brief(code)}" + (
                ", Python objects" if code.lstrip("<>=|")[:1] == "O" else ""
            )

    def build(self, order: str) -> None:
        self.built = True
        if not self.problem:
            self.code = order + self.code.lstrip("<>=|")


class StoredArray(StandIn):
    """An array in the pickle, which has not been read yet.

    Attributes:
      shape: as the file says.
      dtype: of any byte order; float64 where there is a problem.
      problem: why it cannot be read, or "".
    """

    what = "an array"

    def __init__(self, source: _Source):
        self.shape: tuple[int, ...] = (0,)
        self.dtype = np.dtype(np.float64)
        self.problem = "the file does not say what it holds"
        self._source = source
        self._data: bytes | Span = b""
        self._stored: tuple[int, ...] = (0,)
        self._axes: tuple[int, ...] = (0,)
        self._built = False

    @property
    def size(self) -> int:
        """The number of values."""
        return math.prod(self.shape)

    def read(self) -> np.ndarray:
        """Reads the array.

        Returns:
          A new array of this shape and dtype, in C or Fortran order.

        Raises:
          CheckpointFormatError: without the array's name: it has a problem, or
            the file is damaged there, or was changed since it was opened.
          OSError: the file cannot be read.
        """
        if self.problem:
            raise errors.CheckpointFormatError(self.problem)
        buffer = np.empty(self.size * self.dtype.itemsize, np.uint8)
        end = 0
        for chunk in self._chunks():
            start, end = end, end + len(chunk)
            if end <= buffer.size:
                buffer[start:end] = np.frombuffer(chunk, np.uint8)
        if end != buffer.size:
            raise errors.CheckpointFormatError(
                f"{end} bytes of data are there for {buffer.size}"
            )
        values = buffer.view(self.dtype)
        return values.reshape(self._stored).transpose(self._axes)

    def _chunks(self) -> Iterator[bytes]:
        if isinstance(self._data, bytes):
            yield self._data
            return
        with open(self._source.path, "rb") as file:
            if _Source.of(self._source.path, file) != self._source:
                raise errors.CheckpointFormatError(
                    "the file was changed since it was opened"
                )
            file.seek(self._data.offset)
            left = self._data.size
            decoder = codecs.getincrementaldecoder("utf-8")()
            while left:
                chunk = file.read(min(left, _CHUNK))
                if not chunk:
                    return
                left -= len(chunk)
                if self._data.kind == "latin1":
                    chunk = _latin1(decoder, chunk, not left)
                yield chunk

    def _build(self, shape: Any, dtype: _Dtype, order: Any, data: Any) -> None:
        """Takes over what the file says; a problem is kept, not raised.

        Args:
          shape: of the array or, if order is a permutation, of its data.
          dtype: of the array.
          order: of its data in memory: "C", "F", or a permutation of axes.
          data: bytes or a Span.
        """
        self._built = True
        if dtype.problem:
            self.problem = dtype.problem
            return
        if (
            not _whole(shape)
            or len(shape) > _MAX_RANK
            or not all(0 <= size <= _MAX_SIZE for size in shape)
        ):
            self.problem = (
                f"a shape is at most {_MAX_RANK} whole numbers from 0 to "
                f"{_MAX_SIZE}"
            )
            return
        axes = tuple(range(len(shape)))
        if order == "F":
            shape, order = shape[::-1], axes[::-1]
        elif order == "C":
            order = axes
        if not _whole(order) or sorted(order) != [*axes]:
            self.problem = f"its axes have no order of {len(axes)}"
            return
        self._stored, self._axes = shape, order
        self.shape = tuple(shape[axis] for axis in order)
        self.dtype = np.dtype(dtype.code)
        nbytes = self.size * self.dtype.itemsize
        if isinstance(data, bytes):
            found, fits = len(data), len(data) == nbytes
        elif isinstance(data, Span) and data.kind == "bytes":
            found, fits = data.size, data.size == nbytes
        elif isinstance(data, Span) and data.kind == "latin1":
            # A byte above 127 takes two: `read` counts them.
            found, fits = data.size, nbytes <= data.size <= 2 * nbytes
        else:
            self.problem = f"its data are {kind(data)}, not bytes"
            return
        self._data = data
        self.problem = (
            ""
            if fits
            else f"shape {self.shape} of {self.dtype} takes {nbytes} bytes, "
            f"and {found} are there"
        )


def read(path: str | os.PathLike[str]) -> Any:
    """Reads a pickle, without the data of its arrays.

    Returns:
      What the pickle holds: dict (of text keys), list, tuple, str, bytes, int,
      float, bool, None, and a `StoredArray` for each array or NumPy scalar.
      Text or bytes of more than 4096 bytes outside an array are opaque.

    Raises:
      FileNotFoundError: there is no such file.
      CheckpointFormatError: the file is no pickle, is damaged, or would import
        or call anything.
    """
    path = Path(path)
    checkpoint.require_file(path)
    with open(path, "rb") as file:
        machine = _Arrays(path, file, _Source.of(path, file))
        content = machine.run()
        machine.end()
    return content


class Machine:
    """Runs the opcodes with which plain containers are pickled.

    A class of this adds names, what stands for their calls, and opcodes.

    Attributes:
      rule: what such a pickle is, in words.
      keys, keys_are: types of keys, and these in words. No container is one: a
        tuple's hash may be made to take for ever, or to end the process.
      longest: number of bytes of a whole number.
      opcodes: more of them, by pickletools' names.
    """

    rule: ClassVar[str] = "a pickle of weights holds plain containers"
    keys: ClassVar[tuple[type, ...]] = (str,)
    keys_are: ClassVar[str] = "text"
    longest: ClassVar[int] = 8
    opcodes: ClassVar[Mapping[str, Callable[[Any], None]]] = {}

    def __init__(self, path: Path, file: BinaryIO, size: int):
        """Makes a machine for the pickles from a file's position on.

        Args:
          path: what messages call it.
          file: it can be sought.
          size: of the file, in bytes.
        """
        self.path = path
        self._file = file
        self._size = size
        self._reset()

    def _reset(self) -> None:
        self._position = self._file.tell()
        self._stack: list[Any] = []
        self._marked: list[list[Any]] = []
        self._memo: dict[int, Any] = {}
        # By id, with the container, so that no other one gets the id.
        self._depths: dict[int, tuple[int, Any]] = {}

    def find(self, name: str) -> Any:
        """What stands for "module.name", or refuses it."""
        self.refuse(f"{shown(name)}{self.near()}; {HOSTILE}")

    def call(self, function: Any, args: tuple) -> Any:
        """What stands for a call, or refuses it.

        It gives no more than it takes, so that many calls make nothing big.
        """
        self.refuse(f"a call of {kind(function)}{self.near()}; {HOSTILE}")

    def build(self, target: Any, state: Any) -> None:
        """Gives an object its state, or refuses that."""
        self.refuse(f"a state for {kind(target)}{self.near()}; {HOSTILE}")

    def run(self) -> Any:
        """Reads one pickle; the file is then at its end.

        Raises:
          CheckpointFormatError: it is damaged, or asks for anything else.
        """
        self._reset()
        start = self._file.read(2)
        if len(start) < 2 or start[0] != 0x80 or start[1] not in PROTOCOLS:
            raise errors.CheckpointFormatError(
                f"{self.path}: {self.rule}, written with protocols "
                f"{PROTOCOLS[0]} to {PROTOCOLS[-1]}. Received: a file that "
                f"begins like {checkpoint.begins_like(self.path)}. "
                f"{checkpoint.REMEDY}"
            )
        self._position += 2
        for _ in range(_MAX_OPCODES):
            code = self.take(1)
            if code == b".":
                result = self.pop()
                if self._stack or self._marked:
                    self.damaged("values are left over at its end")
                return result
            self._step(code)
        self.refuse(
            f"one of more than {_MAX_OPCODES} opcodes. Keep only the weights."
        )

    def end(self) -> None:
        """Refuses a file that goes on."""
        if left := self._size - self._position:
            self.damaged(f"{left} bytes follow its end")

    def _step(self, code: bytes) -> None:
        name = _OPCODES.get(code, f"0x{code.hex()}")
        if name in _DATA:
            self.push(self._data(*_DATA[name]))
        elif name in _NUMBERS:
            self.push(self._number(_NUMBERS[name]))
        elif name in _CONSTANTS:
            self.push(_CONSTANTS[name])
        elif method := _METHODS.get(name) or self.opcodes.get(name):
            method(self)
        else:
            self.refuse(
                f"the opcode {name}{self.near()}, which no weights need; "
                f"{HOSTILE}"
            )

    def take(self, size: int) -> bytes:
        """Reads so many bytes."""
        data = self._file.read(size)
        if len(data) < size:
            self.damaged("it ends before its last opcode")
        self._position += size
        return data

    def _number(self, layout: str) -> Any:
        return struct.unpack(layout, self.take(struct.calcsize(layout)))[0]

    def _data(self, length: str, kind: str) -> Any:
        size = self._number(length)
        if size > self._size - self._position:
            self.damaged(
                f"{size} bytes are promised at byte {self._position}, and the "
                f"file has {self._size}"
            )
        if size <= _MAX_INLINE:
            data = self.take(size)
            return data if kind == "bytes" else self.text(data)
        span = Span(self._position, size, kind)
        self._position = self._file.seek(span.offset + size)
        return span

    def text(self, data: bytes) -> str:
        """Decodes UTF-8."""
        try:
            return data.decode()
        except UnicodeDecodeError as error:
            self.damaged(f"text is UTF-8 ({error})")

    def push(self, value: Any) -> None:
        """Puts a value on the stack."""
        self._stack.append(value)

    def pop(self) -> Any:
        """Takes a value from the stack."""
        if not self._stack:
            self.damaged("an opcode has no operand")
        return self._stack.pop()

    def _pop_mark(self) -> list[Any]:
        if not self._marked:
            self.damaged("an opcode has no mark")
        items, self._stack = self._stack, self._marked.pop()
        return items

    def _top(self) -> Any:
        value = self.pop()
        self.push(value)
        return value

    def _mark(self) -> None:
        self._marked.append(self._stack)
        self._stack = []

    def _frame(self) -> None:
        if self._number("<Q") > self._size - self._position:
            self.damaged("a frame reaches beyond the file")

    def _long(self) -> None:
        size = self._number("B")
        if size > self.longest:
            self.refuse(f"a whole number of {size} bytes{self.near()}.")
        self.push(int.from_bytes(self.take(size), "little", signed=True))

    def _tuple(self, size: int | None = None) -> None:
        if size is None:
            items = tuple(self._pop_mark())
        else:
            items = tuple(reversed([self.pop() for _ in range(size)]))
        self._nest(items, items)
        self.push(items)

    def _nest(self, target: Any, items: Any) -> None:
        """Counts how deep a container is with these items in it."""
        deepest = 0
        for item in items:
            if isinstance(item, (tuple, list, dict)):
                deepest = max(deepest, self._depth(item))
        if deepest >= _MAX_DEPTH:
            self.refuse(
                f"containers in one another, more than {_MAX_DEPTH} deep"
                f"{self.near()}; {HOSTILE}"
            )
        if deepest >= self._depth(target):
            self._depths[id(target)] = deepest + 1, target

    def _depth(self, container: Any) -> int:
        return self._depths.get(id(container), (1,))[0]

    def _append(self, items: list[Any]) -> None:
        target = self._top()
        if type(target) is not list:
            self.refuse(f"items appended to {kind(target)}; {HOSTILE}")
        self._nest(target, items)
        target.extend(items)

    def _set(self, items: list[Any]) -> None:
        target = self._top()
        if not isinstance(target, dict) or len(items) % 2:
            self.refuse(f"items set in {kind(target)}; {HOSTILE}")
        self._nest(target, items[1::2])
        for key, value in zip(items[::2], items[1::2], strict=True):
            if type(key) not in self.keys:
                self.refuse(
                    f"a key that is {kind(key)}{self.near()}; keys are "
                    f"{self.keys_are}."
                )
            if key in target:
                self.refuse(f"the name {shown(str(key))} twice.")
            target[key] = value

    def _setitem(self) -> None:
        value, key = self.pop(), self.pop()
        self._set([key, value])

    def _put(self, layout: str) -> None:
        self._memo[self._number(layout)] = self._top()

    def _memoize(self) -> None:
        self._memo[len(self._memo)] = self._top()

    def _get(self, layout: str) -> None:
        index = self._number(layout)
        if index not in self._memo:
            self.damaged(f"value {index} is used before it is made")
        self.push(self._memo[index])

    def _global(self) -> None:
        module, name = self._line(), self._line()
        self._find(module, name)

    def _line(self) -> str:
        line = self._file.readline(_MAX_NAME)
        if not line.endswith(b"\n"):
            self.damaged("a name does not end")
        self._position += len(line)
        return self.text(line[:-1])

    def _stack_global(self) -> None:
        name, module = self.pop(), self.pop()
        if type(name) is not str or type(module) is not str:
            self.refuse(f"a name that is no text{self.near()}; {HOSTILE}")
        self._find(module, name)

    def _find(self, module: str, name: str) -> None:
        self.push(self.find(f"{module}.{name}"))

    def _reduce(self) -> None:
        args, function = self.pop(), self.pop()
        if type(args) is not tuple:
            self.refuse(f"a call of {kind(function)}{self.near()}; {HOSTILE}")
        self.push(self.call(function, args))

    def _build(self) -> None:
        state, target = self.pop(), self._top()
        self.build(target, state)

    def near(self) -> str:
        """The text that was read last and not used up: mostly a key."""
        for stack in (self._stack, *reversed(self._marked)):
            for value in reversed(stack):
                if type(value) is str:
                    return f" near {shown(value)}"
        return ""

    def refuse(self, received: str) -> NoReturn:
        """Raises what says that such a pickle is not read."""
        raise errors.CheckpointFormatError(
            f"{self.path}: {self.rule}. Received: {received}"
        )

    def damaged(self, problem: str) -> NoReturn:
        """Raises what says that the file is damaged."""
        raise errors.CheckpointFormatError(
            f"{self.path}: a pickle of {self._size} bytes is "
            f"damaged{self.near()}: {problem}. {checkpoint.REMEDY}"
        )


_OPCODES = {
    opcode.code.encode("latin-1"): opcode.name for opcode in pickletools.opcodes
}
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_NUMBERS = {"BININT": "<i", "BININT1": "B", "BININT2": "<H", "BINFLOAT": ">d"}
_DATA = {
    "SHORT_BINBYTES": ("B", "bytes"),
    "BINBYTES": ("<I", "bytes"),
    "BINBYTES8": ("<Q", "bytes"),
    "BYTEARRAY8": ("<Q", "bytes"),
    "SHORT_BINUNICODE": ("B", "text"),
    "BINUNICODE": ("<I", "text"),
    "BINUNICODE8": ("<Q", "text"),
}
_METHODS = {
    "FRAME": Machine._frame,
    "MARK": Machine._mark,
    "LONG1": Machine._long,
    "EMPTY_TUPLE": lambda self: self._tuple(0),
    "TUPLE1": lambda self: self._tuple(1),
    "TUPLE2": lambda self: self._tuple(2),
    "TUPLE3": lambda self: self._tuple(3),
    "TUPLE": Machine._tuple,
    "EMPTY_LIST": lambda self: self.push([]),
    "APPEND": lambda self: self._append([self.pop()]),
    "APPENDS": lambda self: self._append(self._pop_mark()),
    "EMPTY_DICT": lambda self: self.push({}),
    "SETITEM": Machine._setitem,
    "SETITEMS": lambda self: self._set(self._pop_mark()),
    "BINPUT": lambda self: self._put("B"),
    "LONG_BINPUT": lambda self: self._put("<I"),
    "MEMOIZE": Machine._memoize,
    "BINGET": lambda self: self._get("B"),
    "LONG_BINGET": lambda self: self._get("<I"),
    "GLOBAL": Machine._global,
    "STACK_GLOBAL": Machine._stack_global,
    "REDUCE": Machine._reduce,
    "BUILD": Machine._build,
}


class _Arrays(Machine):
    """Makes what stands for NumPy's arrays."""

    rule = _RULE

    def __init__(self, path: Path, file: BinaryIO, source: _Source):
        super().__init__(path, file, source.size)
        self._source = source

    def find(self, name: str) -> _Known:
        known = _NAMES.get(name)
        if known is None:
            self.refuse(
                f"one that would call {shown(name)}{self.near()}; {HOSTILE}"
            )
        return known

    def call(self, function: Any, args: tuple) -> Any:
        if not isinstance(function, _Known):
            return super().call(function, args)
        match function, args:
            case _Known.RECONSTRUCT, (_Known.NDARRAY, (0,), b"b"):
                return StoredArray(self._source)
            case _Known.DTYPE, (str(code), bool(), bool()):
                return _Dtype(code)
            case _Known.SCALAR, (_Dtype() as dtype, data):
                return self._array((), dtype, "C", data)
            case _Known.FROMBUFFER, (
                data,
                _Dtype() as dtype,
                shape,
                ("C" | "F") as order,
            ):
                return self._array(shape, dtype, order, data)
            case _Known.FROMBUFFER, (data, _Dtype() as dtype, shape, "K", axes):
                return self._array(shape, dtype, axes, data)
            case _Known.ENCODE, (text, "latin1"):
                return self._encoded(text)
            case _Known.TUPLE, (tuple(items),):
                return items
            case _Known.LIST, ():
                return []
            case _Known.DICT, ():
                return {}
            case _Known.BYTES, ():
                return b""
            case _Known.BYTES, (bytes() | Span(kind="bytes") as data,):
                return data
            case _Known.BYTES, (text, "latin-1"):
                return self._encoded(text)
        self.refuse(
            f"an unusual call of {function.name.lower()}{self.near()}; "
            f"{HOSTILE}"
        )

    def _array(
        self, shape: Any, dtype: _Dtype, order: Any, data: Any
    ) -> StoredArray:
        array = StoredArray(self._source)
        array._build(shape, dtype, order, data)
        return array

    def _encoded(self, text: Any) -> bytes | Span:
        if isinstance(text, Span) and text.kind == "text":
            return text._replace(kind="latin1")
        if type(text) is not str:
            self.refuse(f"{kind(text)} for text{self.near()}; {HOSTILE}")
        try:
            return text.encode("latin-1")
        except UnicodeEncodeError:
            self.damaged("bytes that were written as text are up to U+00FF")

    def build(self, target: Any, state: Any) -> None:
        match target, state:
            case (
                StoredArray(_built=False),
                (1, shape, _Dtype() as dtype, bool(fortran), data),
            ):
                target._build(shape, dtype, "F" if fortran else "C", data)
                return
            case (
                _Dtype(built=False),
                (3, "<" | ">" | "=" | "|" as order, None, None, None, *rest),
            ) if rest == [-1, -1, 0] or target.problem:
                target.build(order)
                return
            case _Dtype(built=False), (int(), *_):
                target.problem = target.problem or "its dtype has parts"
                target.built = True
                return
        super().build(target, state)


def _whole(value: Any) -> bool:
    """Whether a value is a tuple of whole numbers."""
    return type(value) is tuple and all(type(item) is int for item in value)


def _latin1(
    decoder: codecs.IncrementalDecoder, chunk: bytes, final: bool
) -> bytes:
    try:
        return decoder.decode(chunk, final).encode("latin-1")
    except UnicodeError as error:
        raise errors.CheckpointFormatError(
            f"its data, written as text, are damaged ({error.args[-1]})"
        ) from error


def kind(value: Any) -> str:
    """What a value of a pickle is, in words; its own text could be endless."""
    match value:
        case _Known():
            return f"the name {value.name.lower()}"
        case StandIn():
            return value.what
        case Span():
            return "long text" if value.kind == "text" else "bytes"
        case None:
            return "None"
    return f"a value of type {type(value).__name__}"


def shown(text: str) -> str:
    return repr(text) if len(text) <= 120 else f"{text[:120]!r}…"
