"""Pickles as plain data: a stack machine of our own that calls nothing but what a table holds.

The operations come from the public `pickletools.genops`; what they do is written here. A global
is a name looked up in the caller's table and nowhere else: nothing is imported, no attribute is
set, no method of an object from the stream is called. What a stream can cost is bounded by its
length: what it claims is held against what it has, and what comes out is a tree of bounded depth
and size, however often its parts are shared.

Protocol: `pickletools` in the Python library, protocols 0 to 5.
"""

import dataclasses
import io
import pickletools
from collections.abc import Callable, Iterator, Mapping, Sized
from typing import Any, no_type_check

from dmf.typing import InputError

# Bounds far above what a checkpoint needs: its tensors are not in its pickle.
LONGEST = 2**26
LONGEST_LINE = 2**20
MOST_VALUES = 2**20
DEEPEST = 100
LARGEST_INTEGER = 1024
SHOWN = 100

Constructors = Mapping[str, Callable[..., Any]]


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Global:
    """A name that the table holds. REDUCE and its kin call it; else it is an opaque value."""

    name: str
    constructor: Callable[..., Any] = dataclasses.field(repr=False)


@dataclasses.dataclass(slots=True, eq=False)
class Record:
    """What an object of a class becomes: the name of the class and the object's fields."""

    name: str
    fields: dict[Any, Any] = dataclasses.field(default_factory=dict)

    def build(self, state: Any) -> None:
        """Takes the fields. They are not copied: a stream may name one state many times."""
        if type(state) is not dict:
            raise InputError(f"pickle: the fields of {self.name} are no dict")
        self.fields = state


def load(
    stream: io.BufferedIOBase, constructors: Constructors, persistent: Callable[[Any], Any]
) -> Any:
    """Reads one pickle, and leaves the stream behind it.

    Args:
      stream: binary and seekable, at the pickle's first byte.
      constructors: what "module.name" stands for. They are called with what the stream says, so
        they check it; what they return is not looked into, unless it is a plain container.
      persistent: gives the object of a persistent id.

    Returns:
      Constants, tuples, lists, dicts, sets, Records, Globals and what the table made.

    Raises:
      InputError: the stream is cut short or damaged, asks for what is not in the table, or is
        larger, deeper or longer to walk than any checkpoint is.
    """
    source = _Source(stream)
    machine = _Machine(constructors, persistent, source)
    try:
        for count, (opcode, argument, _) in enumerate(pickletools.genops(source)):
            if opcode.name not in _OPERATIONS:
                raise InputError(f"pickle: refused operation {opcode.name}")
            if count > 2 * MOST_VALUES:
                raise InputError(f"pickle: more than {2 * MOST_VALUES} operations")
            _OPERATIONS[opcode.name](machine, argument)
    except InputError:
        raise
    except Exception as error:  # what genops raises is not documented
        raise InputError(
            f"pickle: damaged at byte {source.position} ({type(error).__name__})"
        ) from error
    (result,) = machine.take(1)
    for _ in walk(result):
        pass
    return result


def walk(structure: Any) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """The leaves of nested containers with their paths, in order.

    Raises:
      InputError: there are too many, counting a shared one as often as it is met, or they lie
        too deep; so of a container that holds itself.
    """
    pending = [iter([((), structure)])]
    count = 0
    while pending:
        for path, value in pending[-1]:
            count += 1
            if count > MOST_VALUES:
                raise InputError(f"pickle: holds more than {MOST_VALUES} values")
            items = _items(value)
            if items is None:
                yield path, value
                continue
            if len(pending) > DEEPEST:
                raise InputError(f"pickle: nested more than {DEEPEST} deep")
            pending.append(_below(path, items))
            break
        else:
            pending.pop()


def _items(value: Any) -> Iterator[tuple[Any, Any]] | None:
    """Keys and values of a container; sets are leaves, as they hold constants only."""
    if isinstance(value, Record):
        value = value.fields
    if isinstance(value, dict):
        return iter(value.items())
    return enumerate(value) if isinstance(value, list | tuple) else None


def _below(
    path: tuple[Any, ...], items: Iterator[tuple[Any, Any]]
) -> Iterator[tuple[tuple[Any, ...], Any]]:
    return (((*path, key), value) for key, value in items)


# What is checked here is checked by hand: no checker of annotations may stand in for it in tests.
@no_type_check
class _Source:
    """The stream as genops reads it: what it does not have is refused, not attempted."""

    def __init__(self, stream: io.BufferedIOBase):
        self._stream = stream
        self._start = stream.tell()
        self._left = min(stream.seek(0, 2) - self._start, LONGEST)
        stream.seek(self._start)
        self.position = 0

    def tell(self) -> int:
        return self.position

    def read(self, count: int) -> bytes:
        self.require(count)
        return self._advance(self._stream.read(count))

    def readline(self) -> bytes:
        return self._advance(self._stream.readline(min(LONGEST_LINE, self._left)))

    def require(self, count: int) -> None:
        """Raises InputError where fewer bytes are left."""
        if not 0 <= count <= self._left:
            raise InputError(f"pickle: cut short at byte {self.position}, or longer than "
                             f"{LONGEST} bytes: {count} wanted, {self._left} left")

    def _advance(self, data: bytes) -> bytes:
        self.position += len(data)
        self._left -= len(data)
        return data


def _shown(name: Any) -> str:
    """A name from the stream in a message: quoted, on one line, and not too long."""
    return repr(str(name)[:SHOWN])


def plain_key(value: Any) -> Any:
    """A key of a dict or a member of a set, whose hash is quick and cannot be made to collide:
    that of a tuple can be slow, and those of tuples and of long integers can be equal.

    Raises:
      InputError: it is neither a string nor a number.
    """
    if value is None or type(value) in (str, bytes, bool, float):
        return value
    if type(value) is int and value.bit_length() < 64:
        return value
    raise InputError(f"pickle: refused a key of type {type(value).__name__}: keys are strings "
                     "and numbers")


def _in_pairs(values: list[Any]) -> Iterator[tuple[Any, Any]]:
    """The items of [key, value, key, value, ...]."""
    if len(values) % 2:
        raise InputError("pickle: a key of a dict has no value")
    return zip(map(plain_key, values[::2]), values[1::2], strict=True)


def _first_and_rest(values: list[Any]) -> tuple[Any, tuple[Any, ...]]:
    return (values[0] if values else None), tuple(values[1:])


@no_type_check
class _Machine:
    """The stack, the marks on it and the memo of one pickle."""

    def __init__(
        self, constructors: Constructors, persistent: Callable[[Any], Any], source: _Source
    ):
        self.constructors = constructors
        self.persistent = persistent
        self.source = source
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}
        self.copied = 0

    def push(self, value: Any) -> None:
        if type(value) is int and value.bit_length() > LARGEST_INTEGER:
            raise InputError(f"pickle: an integer of {value.bit_length()} bits")
        self.stack.append(value)

    def take(self, count: int) -> list[Any]:
        """The last values, which go; none from below the last mark."""
        if len(self.stack) - (self.marks[-1] if self.marks else 0) < count:
            raise InputError(f"pickle: nothing on the stack at byte {self.source.position}")
        values = self.stack[-count:]
        del self.stack[-count:]
        return values

    def peek(self) -> Any:
        """The last value, which stays."""
        self.stack += self.take(1)
        return self.stack[-1]

    def mark(self) -> None:
        self.marks.append(len(self.stack))

    def take_marked(self) -> list[Any]:
        """The values above the last mark, which go with it."""
        if not self.marks:
            raise InputError(f"pickle: no mark on the stack at byte {self.source.position}")
        start = self.marks.pop()
        values = self.stack[start:]
        del self.stack[start:]
        return values

    def drop(self) -> None:
        """POP takes a mark too."""
        if self.marks and self.marks[-1] == len(self.stack):
            self.marks.pop()
        else:
            self.take(1)

    def changed(self, kind: type) -> Any:
        """The last value, exactly of the kind that the operation changes."""
        target = self.peek()
        if type(target) is not kind:
            raise InputError(f"pickle: refused to change a {type(target).__name__} as if it were "
                             f"a {kind.__name__}")
        return target

    def extend(self, values: list[Any]) -> None:
        self.changed(list).extend(values)

    def update(self, values: list[Any]) -> None:
        self.changed(dict).update(_in_pairs(values))

    def add(self, values: list[Any]) -> None:
        self.changed(set).update(map(plain_key, values))

    def get(self, index: int) -> None:
        if index not in self.memo:
            raise InputError(f"pickle: nothing in the memo at {_shown(index)}")
        self.stack.append(self.memo[index])

    def put(self, index: int) -> None:
        # Longer integers can be chosen so that their hashes collide.
        if not 0 <= index < 2**32:
            raise InputError("pickle: an index of the memo beyond 32 bits")
        self.memo[index] = self.peek()

    def find(self, module: Any, name: Any) -> Global:
        full = f"{module}.{name}" if type(module) is type(name) is str else "(not a string)"
        if full not in self.constructors:
            raise InputError(f"pickle: refused global {_shown(full)}: only tensors, containers and "
                             "plain values are read")
        return Global(full, self.constructors[full])

    def find_pair(self, names: str) -> Global:
        """The Global of "module name", as genops puts it."""
        module, _, name = names.partition(" ")
        return self.find(module, name)

    def call(self, target: Any, arguments: Any, keywords: Any = None) -> None:
        """Pushes what a Global makes of its arguments."""
        if type(target) is not Global or type(arguments) is not tuple or keywords:
            raise InputError(f"pickle: refused to call a {type(target).__name__}, or without a "
                             "tuple of arguments, or with keywords")
        # Arguments from the memo cost a stream few bytes, and who copies them much memory.
        self.copied += len(arguments) + sum(len(a) for a in arguments if isinstance(a, Sized))
        if self.copied > 4 * self.source.position + 2**16:
            raise InputError(f"pickle: {target.name} copies more than the stream holds")
        try:
            self.push(target.constructor(*arguments))
        except InputError:
            raise
        except Exception as error:
            raise InputError(f"pickle: {target.name} does not take these arguments "
                             f"({type(error).__name__})") from error

    def build(self, state: Any) -> None:
        """The state of a Record is its fields; that of a dict, which an OrderedDict has become,
        is attributes that a dict has not."""
        target = self.peek()
        if isinstance(target, Record):
            target.build(state)
        elif type(target) is not dict:
            raise InputError(f"pickle: refused to set the state of a {type(target).__name__}")

    def require_protocol(self, number: int) -> None:
        if number > 5:
            raise InputError(f"pickle: protocol {number}: 0 to 5 are known")


_CONSTANTS = (
    "INT BININT BININT1 BININT2 LONG LONG1 LONG4 FLOAT BINFLOAT STRING BINSTRING SHORT_BINSTRING "
    "UNICODE SHORT_BINUNICODE BINUNICODE BINUNICODE8 BINBYTES SHORT_BINBYTES BINBYTES8"
)
# m is the machine, a the argument in the stream.
_OPERATIONS: dict[str, Callable[[_Machine, Any], Any]] = {
    **dict.fromkeys(_CONSTANTS.split(), _Machine.push),
    **dict.fromkeys(("GET", "BINGET", "LONG_BINGET"), _Machine.get),
    **dict.fromkeys(("PUT", "BINPUT", "LONG_BINPUT"), _Machine.put),
    "MEMOIZE": lambda m, a: m.put(len(m.memo)),
    "BYTEARRAY8": lambda m, a: m.push(bytes(a)),
    "NONE": lambda m, a: m.push(None),
    "NEWTRUE": lambda m, a: m.push(True),
    "NEWFALSE": lambda m, a: m.push(False),
    "EMPTY_LIST": lambda m, a: m.push([]),
    "EMPTY_TUPLE": lambda m, a: m.push(()),
    "EMPTY_DICT": lambda m, a: m.push({}),
    "EMPTY_SET": lambda m, a: m.push(set()),
    "LIST": lambda m, a: m.push(m.take_marked()),
    "TUPLE": lambda m, a: m.push(tuple(m.take_marked())),
    "DICT": lambda m, a: m.push(dict(_in_pairs(m.take_marked()))),
    "FROZENSET": lambda m, a: m.push(frozenset(map(plain_key, m.take_marked()))),
    "TUPLE1": lambda m, a: m.push(tuple(m.take(1))),
    "TUPLE2": lambda m, a: m.push(tuple(m.take(2))),
    "TUPLE3": lambda m, a: m.push(tuple(m.take(3))),
    "APPEND": lambda m, a: m.extend(m.take(1)),
    "APPENDS": lambda m, a: m.extend(m.take_marked()),
    "SETITEM": lambda m, a: m.update(m.take(2)),
    "SETITEMS": lambda m, a: m.update(m.take_marked()),
    "ADDITEMS": lambda m, a: m.add(m.take_marked()),
    "MARK": lambda m, a: m.mark(),
    "POP_MARK": lambda m, a: m.take_marked(),
    "POP": lambda m, a: m.drop(),
    "DUP": lambda m, a: m.push(m.peek()),
    "GLOBAL": lambda m, a: m.push(m.find_pair(a)),
    "STACK_GLOBAL": lambda m, a: m.push(m.find(*m.take(2))),
    "REDUCE": lambda m, a: m.call(*m.take(2)),
    "NEWOBJ": lambda m, a: m.call(*m.take(2)),
    "NEWOBJ_EX": lambda m, a: m.call(*m.take(3)),
    "OBJ": lambda m, a: m.call(*_first_and_rest(m.take_marked())),
    "INST": lambda m, a: m.call(m.find_pair(a), tuple(m.take_marked())),
    "BUILD": lambda m, a: m.build(*m.take(1)),
    "PERSID": lambda m, a: m.push(m.persistent(a)),
    "BINPERSID": lambda m, a: m.push(m.persistent(*m.take(1))),
    "PROTO": _Machine.require_protocol,
    "FRAME": lambda m, a: m.source.require(a),
    "STOP": lambda m, a: None,
}
