"""A machine that reads pickles and can call nothing.

A pickle is a program: it names functions and calls them. Here a name stays a name and a call gives
an object with nothing in it, unless the caller's `build` makes data of it. Nothing is imported, and
memory is bounded by the length of the program.
"""

import pickletools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import IO, Any

from ..errors import quoted

MOST_OPERATIONS = 10_000_000  # a checkpoint with its optimizer's states has about a million

# What these operations carry goes onto the stack as it is.
_LITERALS = {
    *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
    *("STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "SHORT_BINUNICODE", "BINUNICODE"),
    *("BINUNICODE8", "SHORT_BINBYTES", "BINBYTES", "BINBYTES8", "BYTEARRAY8"),
}
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_WITHOUT_EFFECT = {"PROTO", "FRAME", "READONLY_BUFFER"}
_MARK = object()
LONGEST_NAME = 80  # letters of a name that a sentence repeats


@dataclass(frozen=True)
class ForeignName:
    """A class or function that a pickle names."""

    module: str
    name: str

    def __str__(self):
        return quoted(f"{self.module}.{self.name}", LONGEST_NAME)


@dataclass(eq=False)
class InertObject:
    """Stands for what a pickle makes of a foreign class; it is empty.

    Args:
        origin: the class or function that was to make it, None for what only other programs know.
    """

    origin: ForeignName | None = None


@dataclass
class Uses:
    """What a pickle does with a name that it holds."""

    called: bool = False
    called_with_more: bool = False  # than one number or text
    filled: bool = False  # items or a state are put into what the call gives

    @property
    def is_like_an_enum(self) -> bool:
        """Whether it is only called with a value, as members of an enum are written."""
        return self.called and not (self.called_with_more or self.filled)


Build = Callable[[ForeignName, tuple], Any]


@dataclass
class InertMachine:
    """Runs one pickle after another and keeps account of the names in them.

    Args:
        build: data for a call of a name; InertObject for a name that it does not know.
        persistent: data for a reference to something outside of the pickle.
        names: each name that was met and what was done with it, in the order of the file.
    """

    build: Build
    persistent: Callable[[Any], Any]
    names: dict[ForeignName, Uses] = field(default_factory=dict)

    def run(self, stream: IO[bytes] | Any) -> Any:
        """What the pickle at the stream's position describes; the stream is behind it afterwards.

        Raises ValueError, IndexError, KeyError or TypeError for what is no pickle.
        """
        stack: list[Any] = []
        memo: dict[int, Any] = {}
        for operation, argument, _ in islice(pickletools.genops(stream), MOST_OPERATIONS):
            if operation.name == "STOP":
                return stack.pop()
            if operation.name in _LITERALS:
                stack.append(argument)
            elif operation.name in _CONSTANTS:
                stack.append(_CONSTANTS[operation.name])
            elif operation.name in _MEMO:
                _MEMO[operation.name](stack, memo, argument)
            elif operation.name not in _WITHOUT_EFFECT:
                _OPERATIONS[operation.name](self, stack, argument)
        raise ValueError(f"its pickle has more than {MOST_OPERATIONS:,} operations")

    def named(self, module: str, name: str) -> ForeignName:
        """A name, noted."""
        if not (isinstance(module, str) and isinstance(name, str)):
            raise TypeError("a name in its pickle is no text")
        foreign = ForeignName(module, name)
        self.names.setdefault(foreign, Uses())
        return foreign

    def made(self, origin: Any, arguments: Any) -> Any:
        """What stands for a call."""
        if not (isinstance(origin, ForeignName) and isinstance(arguments, (tuple, list))):
            raise TypeError("its pickle calls what is no name")
        if origin.module in ("builtins", "__builtin__") and origin.name == "getattr":
            return self._member(arguments)
        uses = self.names[origin]
        uses.called = True
        if len(arguments) != 1 or not isinstance(arguments[0], (str, int, float)):
            uses.called_with_more = True
        return self.build(origin, tuple(arguments))

    def _member(self, arguments: tuple | list) -> InertObject:
        """A member of an enum, which some versions of Python write as an attribute of its class."""
        owner = arguments[0] if arguments else None
        if isinstance(owner, ForeignName):
            self.names[owner].called = True
            return InertObject(owner)
        return InertObject()

    def fill(self, target: Any) -> None:
        """Note that something is put into an object; nothing is."""
        if isinstance(target, InertObject) and target.origin is not None:
            self.names[target.origin].filled = True


# Operations ---------------------------------------------------------------------------------------


def _since_mark(stack: list) -> list:
    """What lies above the last mark; both leave the stack."""
    position = len(stack) - 1
    while stack[position] is not _MARK:
        position -= 1
        if position < 0:
            raise IndexError("its pickle lacks a mark")
    items = stack[position + 1 :]
    del stack[position:]
    return items


def _last(stack: list, count: int) -> list:
    """The last items; they leave the stack."""
    if len(stack) < count:
        raise IndexError("its pickle takes more than it made")
    items = stack[len(stack) - count :]
    del stack[len(stack) - count :]
    return items


def _pairs(items: list) -> Iterator[tuple[Any, Any]]:
    return zip(items[::2], items[1::2], strict=True)


def _key(value: Any) -> Any:
    """A key of a dictionary: what is not plain becomes an object that equals nothing else.

    So no key is hashed that could be nested without end.
    """
    plain = (str, bytes, int, float, type(None), ForeignName, InertObject)
    return value if isinstance(value, plain) else InertObject()


def _set_items(machine: InertMachine, target: Any, items: list) -> None:
    if not isinstance(target, dict):
        machine.fill(target)
        return
    for key, value in _pairs(items):
        target[_key(key)] = value


def _extend(machine: InertMachine, target: Any, items: list) -> None:
    if isinstance(target, list):
        target.extend(items)
    else:
        machine.fill(target)


def _dictionary(machine: InertMachine, stack: list, _argument: Any) -> None:
    items = _since_mark(stack)
    content: dict = {}
    _set_items(machine, content, items)
    stack.append(content)


def _set_item(machine: InertMachine, stack: list, _argument: Any) -> None:
    items = _last(stack, 2)
    _set_items(machine, stack[-1], items)


def _set_many_items(machine: InertMachine, stack: list, _argument: Any) -> None:
    items = _since_mark(stack)
    _set_items(machine, stack[-1], items)


def _append(machine: InertMachine, stack: list, _argument: Any) -> None:
    items = _last(stack, 1)
    _extend(machine, stack[-1], items)


def _append_many(machine: InertMachine, stack: list, _argument: Any) -> None:
    items = _since_mark(stack)
    _extend(machine, stack[-1], items)


def _tuple_of(count: int) -> Callable[[InertMachine, list, Any], None]:
    def operation(_machine: InertMachine, stack: list, _argument: Any) -> None:
        stack.append(tuple(_last(stack, count)))

    return operation


def _global(machine: InertMachine, stack: list, argument: str) -> None:
    module, _, name = argument.partition(" ")
    stack.append(machine.named(module, name))


def _stack_global(machine: InertMachine, stack: list, _argument: Any) -> None:
    stack.append(machine.named(*_last(stack, 2)))


def _instance(machine: InertMachine, stack: list, argument: str) -> None:
    arguments = _since_mark(stack)
    module, _, name = argument.partition(" ")
    stack.append(machine.made(machine.named(module, name), arguments))


def _object(machine: InertMachine, stack: list, _argument: Any) -> None:
    origin, *arguments = _since_mark(stack)
    stack.append(machine.made(origin, arguments))


def _reduce(machine: InertMachine, stack: list, _argument: Any) -> None:
    stack.append(machine.made(*_last(stack, 2)))


def _new_object_with_keywords(machine: InertMachine, stack: list, _argument: Any) -> None:
    origin, arguments, _keywords = _last(stack, 3)
    stack.append(machine.made(origin, arguments))


def _build_state(machine: InertMachine, stack: list, _argument: Any) -> None:
    _last(stack, 1)
    machine.fill(stack[-1])


def _persistent(machine: InertMachine, stack: list, argument: Any) -> None:
    stack.append(machine.persistent(argument))


def _persistent_from_stack(machine: InertMachine, stack: list, _argument: Any) -> None:
    stack.append(machine.persistent(*_last(stack, 1)))


# The extension registry and buffers outside of the pickle are left out: PyTorch writes neither.
_OPERATIONS: dict[str, Callable[[InertMachine, list, Any], Any]] = {
    "MARK": lambda machine, stack, argument: stack.append(_MARK),
    "POP": lambda machine, stack, argument: stack.pop(),
    "POP_MARK": lambda machine, stack, argument: _since_mark(stack),
    "DUP": lambda machine, stack, argument: stack.append(stack[-1]),
    "EMPTY_LIST": lambda machine, stack, argument: stack.append([]),
    "EMPTY_SET": lambda machine, stack, argument: stack.append([]),
    "EMPTY_DICT": lambda machine, stack, argument: stack.append({}),
    "LIST": lambda machine, stack, argument: stack.append(_since_mark(stack)),
    "FROZENSET": lambda machine, stack, argument: stack.append(_since_mark(stack)),
    "TUPLE": lambda machine, stack, argument: stack.append(tuple(_since_mark(stack))),
    "EMPTY_TUPLE": _tuple_of(0),
    "TUPLE1": _tuple_of(1),
    "TUPLE2": _tuple_of(2),
    "TUPLE3": _tuple_of(3),
    "DICT": _dictionary,
    "SETITEM": _set_item,
    "SETITEMS": _set_many_items,
    "APPEND": _append,
    "APPENDS": _append_many,
    "ADDITEMS": _append_many,
    "GLOBAL": _global,
    "STACK_GLOBAL": _stack_global,
    "INST": _instance,
    "OBJ": _object,
    "REDUCE": _reduce,
    "NEWOBJ": _reduce,
    "NEWOBJ_EX": _new_object_with_keywords,
    "BUILD": _build_state,
    "PERSID": _persistent,
    "BINPERSID": _persistent_from_stack,
}


def _put(stack: list, memo: dict[int, Any], argument: int) -> None:
    memo[argument] = stack[-1]


def _memoize(stack: list, memo: dict[int, Any], _argument: Any) -> None:
    memo[len(memo)] = stack[-1]


def _get(stack: list, memo: dict[int, Any], argument: int) -> None:
    stack.append(memo[argument])


_MEMO: dict[str, Callable[[list, dict[int, Any], Any], None]] = {
    "PUT": _put,
    "BINPUT": _put,
    "LONG_BINPUT": _put,
    "MEMOIZE": _memoize,
    "GET": _get,
    "BINGET": _get,
    "LONG_BINGET": _get,
}
