"""Reads pickles of NumPy arrays without running anything that they say.

A pickle is a program for a small machine, and Python's own machine imports
what it names and calls what it imports. The machine here knows the opcodes
with which arrays and plain containers are written, imports nothing, and has
nothing that it could call. A name is compared with a list; what stands for a
call of `numpy.dtype` is a dtype's description, which is checked, and not a
dtype. An array's data stay in the file until they are asked for, so that
neither a length that a file claims nor one that it has takes memory.

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
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, NoReturn

import numpy as np

from bit_tf import errors
from bit_tf.checkpoints import checkpoint

__all__ = ["PROTOCOLS", "StoredArray", "kind", "read"]

PROTOCOLS = (2, 3, 4, 5)

_CHUNK = 1 << 20
# Longer data are left in the file.
_MAX_INLINE = 4096
# 459 arrays take fewer than 50 opcodes each.
_MAX_OPCODES = 1_000_000
_MAX_NAME = 256
_MAX_RANK = 32
_MAX_SIZE = 2**62
_NUMBER = re.compile(r"[<>=|]?(b1|[iu][1248]|f[248]|c8|c16)")

_RULE = (
    "a pickle of weights holds arrays of numbers, text, and plain containers"
)
_HOSTILE = (
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


class _Span(NamedTuple):
    """Data in the file.

    Attributes:
      offset, size: in bytes.
      kind: "bytes"; "text", UTF-8; or "latin1", bytes that protocol 2 wrote
        as text, in UTF-8.
    """

    offset: int
    size: int
    kind: str


class _Dtype:
    """What stands for `numpy.dtype(code, False, True)` and its state."""

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


class StoredArray:
    """An array in the pickle, which has not been read yet.

    Attributes:
      shape: as the file says.
      dtype: of any byte order; float64 where there is a problem.
      problem: why it cannot be read, or "".
    """

    def __init__(self, source: _Source):
        self.shape: tuple[int, ...] = (0,)
        self.dtype = np.dtype(np.float64)
        self.problem = "the file does not say what it holds"
        self._source = source
        self._data: bytes | _Span = b""
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
          data: bytes or a _Span.
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
        elif isinstance(data, _Span) and data.kind == "bytes":
            found, fits = data.size, data.size == nbytes
        elif isinstance(data, _Span) and data.kind == "latin1":
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
        return _Machine(file, _Source.of(path, file)).run()


class _Machine:
    """Runs the opcodes with which arrays and containers are pickled."""

    def __init__(self, file: BinaryIO, source: _Source):
        self._file = file
        self._source = source
        self._position = 0
        self._stack: list[Any] = []
        self._marked: list[list[Any]] = []
        self._memo: dict[int, Any] = {}

    def run(self) -> Any:
        start = self._file.read(2)
        if len(start) < 2 or start[0] != 0x80 or start[1] not in PROTOCOLS:
            raise errors.CheckpointFormatError(
                f"{self._source.path}: {_RULE}, written with protocols "
                f"{PROTOCOLS[0]} to {PROTOCOLS[-1]}. Received: a file that "
                f"begins like {checkpoint.begins_like(self._source.path)}. "
                f"{checkpoint.REMEDY}"
            )
        self._position = 2
        for _ in range(_MAX_OPCODES):
            code = self._take(1)
            if code == b".":
                return self._finish()
            self._step(code)
        self._refuse(
            f"one of more than {_MAX_OPCODES} opcodes. Keep only the weights."
        )

    def _finish(self) -> Any:
        left = self._source.size - self._position
        if left:
            self._damaged(f"{left} bytes follow its end")
        result = self._pop()
        if self._stack or self._marked:
            self._damaged("values are left over at its end")
        return result

    def _step(self, code: bytes) -> None:
        name = _OPCODES.get(code, f"0x{code.hex()}")
        if name in _DATA:
            self._push(self._data(*_DATA[name]))
        elif name in _NUMBERS:
            self._push(self._number(_NUMBERS[name]))
        elif name in _CONSTANTS:
            self._push(_CONSTANTS[name])
        elif name in _METHODS:
            _METHODS[name](self)
        else:
            self._refuse(
                f"the opcode {name}{self._near()}, which no array needs; "
                f"{_HOSTILE}"
            )

    def _take(self, size: int) -> bytes:
        data = self._file.read(size)
        if len(data) < size:
            self._damaged("it ends before its last opcode")
        self._position += size
        return data

    def _number(self, layout: str) -> Any:
        return struct.unpack(layout, self._take(struct.calcsize(layout)))[0]

    def _data(self, length: str, kind: str) -> Any:
        size = self._number(length)
        if size > self._source.size - self._position:
            self._damaged(
                f"{size} bytes are promised at byte {self._position}, and the "
                f"file has {self._source.size}"
            )
        if size <= _MAX_INLINE:
            data = self._take(size)
            return data if kind == "bytes" else self._text(data)
        span = _Span(self._position, size, kind)
        self._position = self._file.seek(span.offset + size)
        return span

    def _text(self, data: bytes) -> str:
        try:
            return data.decode()
        except UnicodeDecodeError as error:
            self._damaged(f"text is UTF-8 ({error})")

    def _push(self, value: Any) -> None:
        self._stack.append(value)

    def _pop(self) -> Any:
        if not self._stack:
            self._damaged("an opcode has no operand")
        return self._stack.pop()

    def _pop_mark(self) -> list[Any]:
        if not self._marked:
            self._damaged("an opcode has no mark")
        items, self._stack = self._stack, self._marked.pop()
        return items

    def _top(self) -> Any:
        value = self._pop()
        self._push(value)
        return value

    def _mark(self) -> None:
        self._marked.append(self._stack)
        self._stack = []

    def _frame(self) -> None:
        if self._number("<Q") > self._source.size - self._position:
            self._damaged("a frame reaches beyond the file")

    def _long(self) -> None:
        size = self._number("B")
        if size > 8:
            self._refuse(f"a whole number of {size} bytes{self._near()}.")
        self._push(int.from_bytes(self._take(size), "little", signed=True))

    def _tuple(self, size: int | None = None) -> None:
        if size is None:
            self._push(tuple(self._pop_mark()))
            return
        items = [self._pop() for _ in range(size)]
        self._push(tuple(reversed(items)))

    def _append(self, items: list[Any]) -> None:
        target = self._top()
        if type(target) is not list:
            self._refuse(f"items appended to {kind(target)}; {_HOSTILE}")
        target.extend(items)

    def _set(self, items: list[Any]) -> None:
        target = self._top()
        if type(target) is not dict or len(items) % 2:
            self._refuse(f"items set in {kind(target)}; {_HOSTILE}")
        for key, value in zip(items[::2], items[1::2], strict=True):
            # A tuple's hash may be made to take for ever.
            if type(key) is not str:
                self._refuse(
                    f"a key that is {kind(key)}{self._near()}; keys are text."
                )
            if key in target:
                self._refuse(f"the name {_shown(key)} twice.")
            target[key] = value

    def _setitem(self) -> None:
        value, key = self._pop(), self._pop()
        self._set([key, value])

    def _put(self, layout: str) -> None:
        self._memo[self._number(layout)] = self._top()

    def _memoize(self) -> None:
        self._memo[len(self._memo)] = self._top()

    def _get(self, layout: str) -> None:
        index = self._number(layout)
        if index not in self._memo:
            self._damaged(f"value {index} is used before it is made")
        self._push(self._memo[index])

    def _global(self) -> None:
        module, name = self._line(), self._line()
        self._find(module, name)

    def _line(self) -> str:
        line = self._file.readline(_MAX_NAME)
        if not line.endswith(b"\n"):
            self._damaged("a name does not end")
        self._position += len(line)
        return self._text(line[:-1])

    def _stack_global(self) -> None:
        name, module = self._pop(), self._pop()
        if type(name) is not str or type(module) is not str:
            self._refuse(f"a name that is no text{self._near()}; {_HOSTILE}")
        self._find(module, name)

    def _find(self, module: str, name: str) -> None:
        known = _NAMES.get(f"{module}.{name}")
        if known is None:
            self._refuse(
                f"one that would call {_shown(f'{module}.{name}')}"
                f"{self._near()}; {_HOSTILE}"
            )
        self._push(known)

    def _reduce(self) -> None:
        args, function = self._pop(), self._pop()
        if type(args) is not tuple or not isinstance(function, _Known):
            self._refuse(
                f"a call of {kind(function)}{self._near()}; {_HOSTILE}"
            )
        self._push(self._stand_in(function, args))

    def _stand_in(self, function: _Known, args: tuple) -> Any:
        """What a call of one of the known names would give.

        It gives no more than it takes, so that many calls make nothing big.
        """
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
            case _Known.BYTES, (bytes() | _Span(kind="bytes") as data,):
                return data
            case _Known.BYTES, (text, "latin-1"):
                return self._encoded(text)
        self._refuse(
            f"an unusual call of {function.name.lower()}{self._near()}; "
            f"{_HOSTILE}"
        )

    def _array(
        self, shape: Any, dtype: _Dtype, order: Any, data: Any
    ) -> StoredArray:
        array = StoredArray(self._source)
        array._build(shape, dtype, order, data)
        return array

    def _encoded(self, text: Any) -> bytes | _Span:
        if isinstance(text, _Span) and text.kind == "text":
            return text._replace(kind="latin1")
        if type(text) is not str:
            self._refuse(f"{kind(text)} for text{self._near()}; {_HOSTILE}")
        try:
            return text.encode("latin-1")
        except UnicodeEncodeError:
            self._damaged("bytes that were written as text are up to U+00FF")

    def _build(self) -> None:
        state, target = self._pop(), self._top()
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
        self._refuse(f"a state for {kind(target)}{self._near()}; {_HOSTILE}")

    def _near(self) -> str:
        """The text that was read last and not used up: mostly a key."""
        for stack in (self._stack, *reversed(self._marked)):
            for value in reversed(stack):
                if type(value) is str:
                    return f" near {_shown(value)}"
        return ""

    def _refuse(self, received: str) -> NoReturn:
        raise errors.CheckpointFormatError(
            f"{self._source.path}: {_RULE}. Received: {received}"
        )

    def _damaged(self, problem: str) -> NoReturn:
        raise errors.CheckpointFormatError(
            f"{self._source.path}: a pickle of {self._source.size} bytes is "
            f"damaged{self._near()}: {problem}. {checkpoint.REMEDY}"
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
    "FRAME": _Machine._frame,
    "MARK": _Machine._mark,
    "LONG1": _Machine._long,
    "EMPTY_TUPLE": lambda self: self._tuple(0),
    "TUPLE1": lambda self: self._tuple(1),
    "TUPLE2": lambda self: self._tuple(2),
    "TUPLE3": lambda self: self._tuple(3),
    "TUPLE": _Machine._tuple,
    "EMPTY_LIST": lambda self: self._push([]),
    "APPEND": lambda self: self._append([self._pop()]),
    "APPENDS": lambda self: self._append(self._pop_mark()),
    "EMPTY_DICT": lambda self: self._push({}),
    "SETITEM": _Machine._setitem,
    "SETITEMS": lambda self: self._set(self._pop_mark()),
    "BINPUT": lambda self: self._put("B"),
    "LONG_BINPUT": lambda self: self._put("<I"),
    "MEMOIZE": _Machine._memoize,
    "BINGET": lambda self: self._get("B"),
    "LONG_BINGET": lambda self: self._get("<I"),
    "GLOBAL": _Machine._global,
    "STACK_GLOBAL": _Machine._stack_global,
    "REDUCE": _Machine._reduce,
    "BUILD": _Machine._build,
}


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
        case StoredArray():
            return "an array"
        case _Dtype():
            return "a dtype"
        case _Span():
            return "long text" if value.kind == "text" else "bytes"
        case None:
            return "None"
    return f"a value of type {type(value).__name__}"


def _shown(text: str) -> str:
    return repr(text) if len(text) <= 120 else f"{text[:120]!r}…"
