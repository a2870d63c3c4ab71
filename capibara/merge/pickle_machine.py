"""Reads a pickle without unpickling it: a small machine that knows containers and arrays, and no code.

    opcodes ─► stack of dicts, lists, tuples, numbers, bytes ─► arrays          any other opcode or name ─► DataError

A pickle is a program. The usual remedy, `Unpickler.find_class`, still lets the file call what is allowed with arguments
of its own. Here no name is ever looked up and nothing is ever called: the few names that NumPy and JAX write for an
array (`_reconstruct`, `dtype`, …) are words, and what follows them is checked and read as numbers.
"""

from __future__ import annotations

import pickletools
from collections.abc import Callable
from typing import IO, Any, BinaryIO, cast

import numpy as np

from capibara.errors import DataError

SLACK = 2**16

NUMPY_CODES = ("b1", "f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8")
WIDE_CODES = ("bfloat16", "float8_e4m3fn", "float8_e5m2")

_WORDS = {
    **{(f"numpy.{core}.multiarray", "_reconstruct"): "shell" for core in ("core", "_core")},
    **{(f"numpy.{core}.multiarray", "scalar"): "scalar" for core in ("core", "_core")},
    **{(f"numpy.{core}.numeric", "_frombuffer"): "buffer" for core in ("core", "_core")},
    **{("ml_dtypes", name): name for name in WIDE_CODES},
    ("numpy", "ndarray"): "ndarray",
    ("numpy", "dtype"): "dtype",
    ("jax._src.array", "_reconstruct_array"): "jax",
    ("collections", "OrderedDict"): "dict",
    ("_codecs", "encode"): "encode",
    ("__builtin__", "bytes"): "bytes",
    ("builtins", "bytes"): "bytes",
}
"""What picklers of NumPy 1 and 2 and of JAX write around an array. Each is a word of this module, not the object."""

_HINTS = {
    "torch": " It is PyTorch's: save the state with safetensors.",
    "flax": " Save nnx.to_pure_dict(nnx.state(model, nnx.Param)), with the arrays as NumPy arrays.",
}


class _Word(str):
    """One of the values of `_WORDS`; no pickled string is ever one."""


class _Dtype:
    """A dtype whose byte order is not yet known."""

    def __init__(self, code: str):
        self.code, self.order = code, "<"

    def numpy(self) -> np.dtype:
        if self.code in WIDE_CODES:
            import ml_dtypes

            return np.dtype(getattr(ml_dtypes, self.code))
        return np.dtype(self.order + self.code)


class Shell:
    """An array: first without content, as `_reconstruct` makes it. Attribute `array`: the content, or None."""

    def __init__(self, array: np.ndarray | None = None):
        self.array = array


class Bounded:
    """A file that is never asked for more than it has: a length in a pickle is a claim."""

    def __init__(self, file: BinaryIO, size: int):
        self.file, self.size = file, size
        self.readline, self.tell = file.readline, file.tell

    def read(self, count: int) -> bytes:
        """At most what is left."""
        return self.file.read(min(count, self.size - self.file.tell()))


_MARK = object()


class Machine:
    """A stack, a memo, and how many bytes may still be made."""

    def __init__(self, name: str, size: int):
        self.name, self.budget = name, 2 * size + SLACK
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}

    def run(self, file: Bounded) -> Any:
        """What is on the stack when the pickle ends."""
        try:
            for opcode, value, place in pickletools.genops(cast(IO[bytes], file)):
                if opcode.name == "STOP":
                    return self.stack.pop()
                act = _ACTS.get(opcode.name)
                if act is None:
                    raise self.refused(f"uses the instruction {opcode.name} at byte {place:,}")
                act(self, value)
        except (ValueError, TypeError, IndexError, KeyError, OverflowError, MemoryError) as error:
            if isinstance(error, DataError):
                raise
            raise DataError(f"{self.name} is not a whole pickle ({type(error).__name__}: {error}).") from None
        raise DataError(f"{self.name} is not a whole pickle: it does not end.")

    def refused(self, what: str) -> DataError:
        """The error for what is no container or array."""
        return DataError(
            f"{self.name} {what}; a pickle is read only where it holds arrays in dicts, lists and tuples. Nothing of "
            "it was run. Save the parameters as safetensors."
        )

    def spend(self, count: int) -> None:
        """Takes from the budget of bytes: what is referred to often may not be made often."""
        self.budget -= count
        if self.budget < 0:
            raise self.refused("makes more bytes of arrays than it has")

    def since_mark(self) -> list[Any]:
        """What lies above the last mark; both are taken off."""
        at = len(self.stack) - 1
        while self.stack[at] is not _MARK:
            at -= 1
            if at < 0:
                raise IndexError("an instruction lacks its mark")
        items = self.stack[at + 1 :]
        del self.stack[at:]
        return items

    def push_tuple(self, count: int) -> None:
        """The topmost `count` values become a tuple."""
        if count:
            items = self.stack[-count:]
            if len(items) < count:
                raise IndexError("the stack is empty")
            self.stack[-count:] = [tuple(items)]
        else:
            self.stack.append(())

    def word(self, module: Any, name: Any) -> None:
        """A name that the pickle asks for: one of ours, or refused."""
        found = _WORDS.get((module, name)) if type(module) is str and type(name) is str else None
        if found is None:
            full = f"{module}.{name}"[:200] if type(module) is str and type(name) is str else "a name that is no text"
            hint = _HINTS.get(str(module).split(".")[0], "") if type(module) is str else ""
            error = self.refused(f"asks for {full!r}")
            raise DataError(str(error) + hint)
        self.stack.append(_Word(found))

    def reduce(self, _: Any) -> None:
        """What the pickle would call: a function of this module by its word, or refused."""
        given, word = self.stack.pop(), self.stack.pop()
        if type(word) is not _Word or type(given) is not tuple:
            raise self.refused("calls what is no array")
        if (make := _MAKERS.get(word)) is None:
            raise self.refused(f"calls {str(word)!r}")
        self.stack.append(make(self, *given))

    def build(self, _: Any) -> None:
        """The byte order of a dtype, or the content of an array."""
        state = self.stack.pop()
        target = self.stack[-1]
        if type(target) is _Dtype and type(state) is tuple and len(state) >= 2 and state[1] in ("<", ">", "|", "="):
            if any(part is not None for part in state[2:5]):
                raise self.refused("holds an array of records")
            target.order = ">" if state[1] == ">" else "<"
        elif type(target) is Shell and target.array is None and type(state) is tuple and len(state) == 5:
            target.array = self.array(state[4], state[2], state[1], bool(state[3]))
        else:
            raise self.refused("sets the state of what is no array")

    def array(self, data: Any, dtype: Any, shape: Any, fortran: bool) -> np.ndarray:
        """The numbers in some bytes, where shape and dtype ask for just as many."""
        if type(dtype) is not _Dtype or type(data) not in (bytes, bytearray):
            raise self.refused("holds an array of objects")
        if type(shape) is not tuple or not all(type(size) is int and size >= 0 for size in shape):
            raise self.refused("holds an array whose shape is no shape")
        kind, numbers = dtype.numpy(), 1
        for size in shape:
            numbers *= size
        if numbers * kind.itemsize != len(data):
            raise self.refused(f"holds an array of shape {shape} and {kind} in {len(data):,} bytes")
        self.spend(len(data))
        array = np.frombuffer(data, kind).reshape(shape, order="F" if fortran else "C")
        return np.ascontiguousarray(array, kind.newbyteorder("=")).reshape(shape)

    def set_items(self, pairs: list[Any]) -> None:
        """Keys and values into the dict on top."""
        target = self.stack[-1]
        if type(target) is not dict or len(pairs) % 2:
            raise self.refused("sets items of what is no dict")
        for key, value in zip(pairs[::2], pairs[1::2], strict=True):
            if type(key) not in (str, int):
                raise self.refused(f"has a key of type {type(key).__name__.strip('_').lower()}")
            target[key] = value

    def extend(self, items: list[Any]) -> None:
        """Values onto the list on top."""
        if type(self.stack[-1]) is not list:
            raise self.refused("appends to what is no list")
        self.stack[-1].extend(items)


def _shell(machine: Machine, kind: Any = None, shape: Any = None, code: Any = None) -> Shell:
    if kind != "ndarray" or type(kind) is not _Word:
        raise machine.refused("makes an array of another class")
    return Shell()


def _dtype(machine: Machine, code: Any = None, *rest: Any) -> _Dtype:
    if (type(code) is str and code in NUMPY_CODES) or (type(code) is _Word and code in WIDE_CODES):
        return _Dtype(str(code))
    raise machine.refused(f"holds an array of dtype {code!r}"[:200])


def _scalar(machine: Machine, dtype: Any = None, data: Any = None) -> Shell:
    return Shell(machine.array(data, dtype, (), False))


def _buffer(machine: Machine, data: Any = None, dtype: Any = None, shape: Any = None, order: Any = "C") -> Shell:
    return Shell(machine.array(data, dtype, shape, order == "F"))


def _jax(machine: Machine, word: Any = None, given: Any = None, state: Any = None, *rest: Any) -> Shell:
    if type(word) is not _Word or word != "shell" or type(given) is not tuple:
        raise machine.refused("makes a JAX array of what is no array")
    machine.stack.append(_shell(machine, *given))
    machine.stack.append(state)
    machine.build(None)
    return machine.stack.pop()


def _encode(machine: Machine, text: Any = None, encoding: Any = None) -> bytes:
    if type(text) is not str or encoding != "latin1":
        raise machine.refused("encodes what are no bytes")
    machine.spend(len(text))
    return text.encode("latin1")


def _empty(kind: Callable[[], Any]) -> Callable[..., Any]:
    def make(machine: Machine, *given: Any) -> Any:
        if given:
            raise machine.refused(f"makes {kind.__name__} of something")
        return kind()

    return make


_MAKERS: dict[str, Callable[..., Any]] = {
    "shell": _shell,
    "dtype": _dtype,
    "scalar": _scalar,
    "buffer": _buffer,
    "jax": _jax,
    "encode": _encode,
    "bytes": _empty(bytes),
    "dict": _empty(dict),
}


def _push(machine: Machine, value: Any) -> None:
    machine.stack.append(value)


def _constant(make: Callable[[], Any]) -> Callable[[Machine, Any], None]:
    return lambda machine, _: machine.stack.append(make())


def _put(machine: Machine, index: Any) -> None:
    machine.memo[len(machine.memo) if index is None else index] = machine.stack[-1]


def _stack_global(machine: Machine, _: Any) -> None:
    name, module = machine.stack.pop(), machine.stack.pop()
    machine.word(module, name)


def _tuple_of(count: int) -> Callable[[Machine, Any], None]:
    return lambda machine, _: machine.push_tuple(count)


def _set_item(machine: Machine, _: Any) -> None:
    pair = [machine.stack.pop(), machine.stack.pop()]
    machine.set_items(pair[::-1])


_ACTS: dict[str, Callable[[Machine, Any], None]] = {
    **{name: lambda machine, _: None for name in ("PROTO", "FRAME")},
    **dict.fromkeys(
        ("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT", "STRING", "BINSTRING",
         "SHORT_BINSTRING", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "BINBYTES", "SHORT_BINBYTES",
         "BINBYTES8", "BYTEARRAY8"),
        _push,
    ),
    **dict.fromkeys(("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"), _put),
    **dict.fromkeys(("GET", "BINGET", "LONG_BINGET"), lambda machine, index: machine.stack.append(machine.memo[index])),
    "NONE": _constant(lambda: None),
    "NEWTRUE": _constant(lambda: True),
    "NEWFALSE": _constant(lambda: False),
    "MARK": _constant(lambda: _MARK),
    "EMPTY_DICT": _constant(dict),
    "EMPTY_LIST": _constant(list),
    "EMPTY_TUPLE": _tuple_of(0),
    "TUPLE1": _tuple_of(1),
    "TUPLE2": _tuple_of(2),
    "TUPLE3": _tuple_of(3),
    "TUPLE": lambda machine, _: machine.stack.append(tuple(machine.since_mark())),
    "LIST": lambda machine, _: machine.stack.append(machine.since_mark()),
    "DICT": lambda machine, _: _dict(machine),
    "APPEND": lambda machine, _: machine.extend([machine.stack.pop()]),
    "APPENDS": lambda machine, _: machine.extend(machine.since_mark()),
    "SETITEM": _set_item,
    "SETITEMS": lambda machine, _: machine.set_items(machine.since_mark()),
    "GLOBAL": lambda machine, value: machine.word(*str(value).split(" ", 1)),
    "STACK_GLOBAL": _stack_global,
    "REDUCE": Machine.reduce,
    "BUILD": Machine.build,
}  # fmt: skip
"""What a pickle of containers and arrays needs. Everything else is refused by its absence."""


def _dict(machine: Machine) -> None:
    pairs = machine.since_mark()
    machine.stack.append({})
    machine.set_items(pairs)
