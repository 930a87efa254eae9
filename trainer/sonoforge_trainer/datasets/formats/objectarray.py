"""NumPy object arrays (.npy with a pickle inside), read without unpickling anything.

A pickle is a program that may call anything. Here `pickletools` takes it apart into operations, and only those that
build dictionaries, lists, texts, numbers and NumPy arrays are followed. Names of functions are compared and never
looked up or imported, so nothing in the file can run. Everything else is refused.
"""

from __future__ import annotations

import pickletools
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from sonoforge_trainer.datasets.record import read_file
from sonoforge_trainer.shards.faults import ImageError

_LIMIT = 2**30
_MARK = object()
_ARRAY_KINDS = "biuf"


@dataclass(frozen=True)
class _Name:
    """A global that a pickle names; only these are understood."""

    what: str


@dataclass
class _Array:
    """An array that is waiting for its state."""

    value: Any = None


@dataclass
class _Type:
    """A dtype: its text, then its byte order."""

    text: str
    order: str = "|"


_KNOWN = {
    ("numpy.core.multiarray", "_reconstruct"): "reconstruct",
    ("numpy._core.multiarray", "_reconstruct"): "reconstruct",
    ("numpy", "ndarray"): "ndarray",
    ("numpy", "dtype"): "dtype",
    ("_codecs", "encode"): "encode",
}
_OPAQUE = (_Name, _Array, _Type)


def read_dictionary(path: Path) -> dict[Any, Any]:
    """The dictionary of dictionaries, lists, texts, numbers and arrays of numbers that `np.save` kept.

    Raises ImageError for everything else.
    """
    data = read_file(path)
    if len(data) > _LIMIT:
        raise ImageError(f"the .npy file has more than {_LIMIT} bytes")
    found = _Machine().run(data[_pickle_start(data) :])
    if not isinstance(found, np.ndarray) or found.shape != () or not isinstance(found.item(), dict):
        raise ImageError("the .npy file holds something else than one dictionary")
    return dict(found.item())


def _pickle_start(data: bytes) -> int:
    """Where the pickle of one object begins, behind the .npy header (numpy.lib.format). Raises ImageError."""
    wide = data[6:7] in (b"\2", b"\3")
    start = 12 if wide else 10
    if data[:6] != b"\x93NUMPY" or len(data) < start:
        raise ImageError("not a .npy file")
    end = start + int.from_bytes(data[8:start], "little")
    # The header is a literal of three keys; of one object it can be told by its text, so nothing is evaluated.
    text = "".join(data[start:end].decode("latin-1").split())
    if text not in (
        "{'descr':'|O','fortran_order':False,'shape':(),}",
        "{'descr':'|O','fortran_order':False,'shape':()}",
    ):
        raise ImageError("the .npy file holds something else than one dictionary")
    return end


@dataclass
class _Machine:
    """The stack of a pickle, for the operations that data need."""

    stack: list[Any] = field(default_factory=list)
    memo: dict[int, Any] = field(default_factory=dict)
    finished: dict[int, Any] = field(default_factory=dict)

    def run(self, data: bytes) -> Any:
        try:
            for operation, argument, _position in pickletools.genops(data):
                if operation.name == "STOP":
                    return self._plain(self.stack.pop())
                _step(operation.name)(self, argument)
        except ImageError:
            raise
        except (ValueError, IndexError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
            raise ImageError("the .npy file's pickle is broken") from None
        raise ImageError("the .npy file's pickle is truncated")

    def pop_to_mark(self) -> list[Any]:
        """Everything above the last mark, which goes as well."""
        items: list[Any] = []
        while (item := self.stack.pop()) is not _MARK:
            items.append(item)
        return items[::-1]

    def named(self, module: str, name: str) -> None:
        what = _KNOWN.get((module, name))
        if what is None:
            raise ImageError(
                "the .npy file's pickle names a function that is no part of an array; it was not looked up, and the "
                "file is refused: it may be hostile"
            )
        self.stack.append(_Name(what))

    def reduce(self) -> None:
        """A call: of the three functions that arrays are made with."""
        arguments, function = self.stack.pop(), self.stack.pop()
        if not isinstance(function, _Name) or not isinstance(arguments, tuple):
            raise ImageError("the .npy file's pickle calls something that is no function of arrays")
        if function.what == "reconstruct" and arguments[0] == _Name("ndarray"):
            self.stack.append(_Array())
        elif function.what == "dtype" and isinstance(arguments[0], str):
            self.stack.append(_Type(arguments[0]))
        elif function.what == "encode" and isinstance(arguments[0], str) and arguments[1:] == ("latin1",):
            self.stack.append(arguments[0].encode("latin1"))  # how Python 2 compatible pickles keep bytes
        else:
            raise ImageError("the .npy file's pickle calls a function of arrays in an unknown way")

    def build(self) -> None:
        """The state of an array or of its dtype."""
        state, target = self.stack.pop(), self.stack[-1]
        if isinstance(target, _Type):
            target.order = state[1]
        elif isinstance(target, _Array):
            target.value = self._array(*state[1:5])
        else:
            raise ImageError("the .npy file's pickle sets the state of something that is no array")

    def _array(self, shape: tuple[int, ...], kind: _Type, fortran: bool, content: Any) -> Any:
        if not isinstance(kind, _Type) or any(not isinstance(n, int) or n < 0 for n in shape):
            raise ImageError("the .npy file's pickle has an array of an unknown form")
        if kind.text.startswith("O"):
            if shape != () or len(content) != 1:
                raise ImageError("the .npy file holds an array of objects; only one dictionary is read")
            whole = np.empty((), object)
            whole[()] = self._plain(content[0])
            return whole
        dtype = np.dtype((kind.order if kind.order in "<>" else "") + kind.text)
        if dtype.kind not in _ARRAY_KINDS or not isinstance(content, bytes):
            raise ImageError("the .npy file's pickle has an array that is not of numbers")
        if int(np.prod(shape, dtype=object)) * dtype.itemsize != len(content):
            raise ImageError("the .npy file's pickle has an array whose size does not fit its bytes")
        return np.frombuffer(content, dtype).reshape(shape, order="F" if fortran else "C")

    def _plain(self, value: Any) -> Any:
        """Without the stand-ins of this machine; what is shared is made once, so that the file bounds the work."""
        if isinstance(value, _Array) and value.value is not None:
            return value.value
        if isinstance(value, _OPAQUE) or value is _MARK:
            raise ImageError("the .npy file's pickle ends with something that is no data")
        if not isinstance(value, dict | list | tuple):
            return value
        if id(value) not in self.finished:
            if isinstance(value, dict):
                made: Any = {key: self._plain(item) for key, item in value.items()}
            else:
                made = type(value)(self._plain(item) for item in value)
            self.finished[id(value)] = made
        return self.finished[id(value)]


Step = Callable[[_Machine, Any], None]


def _step(name: str) -> Step:
    found = _STEPS.get(name)
    if found is None:
        raise ImageError(
            f"the .npy file's pickle uses {name}; only dictionaries and arrays of numbers are read, and nothing is run"
        )
    return found


def _push(make: Callable[[Any], Any]) -> Step:
    return lambda machine, argument: machine.stack.append(make(argument))


def _put(machine: _Machine, place: Any) -> None:
    machine.memo[int(place)] = machine.stack[-1]


def _set_items(machine: _Machine, items: list[Any]) -> None:
    target = machine.stack[-1]
    if not isinstance(target, dict):
        raise ImageError("the .npy file's pickle fills something that is no dictionary")
    target.update(zip(items[::2], items[1::2], strict=True))


def _append(machine: _Machine, items: list[Any]) -> None:
    target = machine.stack[-1]
    if not isinstance(target, list):
        raise ImageError("the .npy file's pickle fills something that is no list")
    target.extend(items)


def _tuple(machine: _Machine, length: int) -> None:
    items = machine.stack[len(machine.stack) - length :]
    if len(items) < length or _MARK in items:
        raise IndexError
    del machine.stack[len(machine.stack) - length :]
    machine.stack.append(tuple(items))


def _stack_global(machine: _Machine, _argument: Any) -> None:
    name, module = machine.stack.pop(), machine.stack.pop()
    machine.named(str(module), str(name))


_NUMBERS = ("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT")
_TEXTS = ("BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8")
_STEPS: dict[str, Step] = {
    **{name: _push(lambda argument: argument) for name in (*_NUMBERS, *_TEXTS)},
    "PROTO": lambda _machine, _argument: None,
    "FRAME": lambda _machine, _argument: None,
    "NONE": _push(lambda _: None),
    "NEWTRUE": _push(lambda _: True),
    "NEWFALSE": _push(lambda _: False),
    "EMPTY_DICT": _push(lambda _: {}),
    "EMPTY_LIST": _push(lambda _: []),
    "EMPTY_TUPLE": _push(lambda _: ()),
    "MARK": _push(lambda _: _MARK),
    "TUPLE": lambda machine, _: machine.stack.append(tuple(machine.pop_to_mark())),
    "TUPLE1": lambda machine, _: _tuple(machine, 1),
    "TUPLE2": lambda machine, _: _tuple(machine, 2),
    "TUPLE3": lambda machine, _: _tuple(machine, 3),
    "SETITEM": lambda machine, _: _set_items(machine, [machine.stack.pop(-2), machine.stack.pop()]),
    "SETITEMS": lambda machine, _: _set_items(machine, machine.pop_to_mark()),
    "APPEND": lambda machine, _: _append(machine, [machine.stack.pop()]),
    "APPENDS": lambda machine, _: _append(machine, machine.pop_to_mark()),
    "BINPUT": _put,
    "LONG_BINPUT": _put,
    "MEMOIZE": lambda machine, _: _put(machine, len(machine.memo)),
    "BINGET": lambda machine, place: machine.stack.append(machine.memo[place]),
    "LONG_BINGET": lambda machine, place: machine.stack.append(machine.memo[place]),
    "GLOBAL": lambda machine, argument: machine.named(*argument.split(" ", 1)),
    "STACK_GLOBAL": _stack_global,
    "REDUCE": lambda machine, _: machine.reduce(),
    "BUILD": lambda machine, _: machine.build(),
}
"""What each operation does to the stack; the names are those of the pickle protocols 0 to 5."""
