"""Reads pickles as plain data, without running code that they name.

`load` is a stack machine that calls only the constructors of a table. The operations come from the
public `pickletools.genops`; their effects are implemented here. A global is looked up in the table
of the caller and nowhere else: nothing is imported, no attribute is set, and no method of an object
from the stream is called. Time and memory are bounded by the length of the stream: a length that
the stream claims is compared with the bytes it has, and the result is a tree of bounded depth and
size, however often its parts are shared.

Protocols 0 to 5 are read; `pickletools` in the Python library documents them.
"""

import dataclasses
import io
import pickletools
from collections.abc import Callable, Iterator, Mapping, Sized
from typing import Any, no_type_check

from dmf.checkpoints.convert.pickle_source import PickleSource
from dmf.errors import InputError

# Bounds far above the needs of a checkpoint, whose tensors are not in its pickle.
MAX_VALUES = 2**20
MAX_DEPTH = 100
MAX_INTEGER_BITS = 1024
MAX_SHOWN_LENGTH = 100

Constructors = Mapping[str, Callable[..., Any]]


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Global:
    """A global that the table has. REDUCE and similar operations call its constructor; otherwise it
    is an opaque value.

    Attributes:
      name: "module.name".
      constructor: the constructor in the table.
    """

    name: str
    constructor: Callable[..., Any] = dataclasses.field(repr=False)


@dataclasses.dataclass(slots=True, eq=False)
class Record:
    """Stands for an object of a class.

    Attributes:
      name: name of the class.
      fields: attributes of the object by name.
    """

    name: str
    fields: dict[Any, Any] = dataclasses.field(default_factory=dict)

    def build(self, state: Any) -> None:
        """Sets the fields, without a copy: a stream may use one state many times."""
        if type(state) is not dict:
            raise InputError("pickle", remedy=f"the fields of {self.name} are no dict")
        self.fields = state


def load(
    stream: io.BufferedIOBase, constructors: Constructors, persistent: Callable[[Any], Any]
) -> Any:
    """Reads one pickle, and leaves the stream at the byte after it.

    >>> import pickle
    >>> load(io.BytesIO(pickle.dumps({"steps": [1, 2]})), {}, repr)
    {'steps': [1, 2]}

    Args:
      stream: a binary, seekable stream at the first byte of the pickle.
      constructors: a constructor for each "module.name" that may be called. It is called with
        arguments from the stream, and has to check them. Its result is not examined, unless it is a
        plain container.
      persistent: returns the object of a persistent id.

    Returns:
      A structure of constants, tuples, lists, dicts, sets, Records, Globals and results of the
      constructors.

    Raises:
      InputError: the stream is cut short or damaged, uses a global that is not in the table, or is
        larger or nested deeper than any checkpoint is.
    """
    source = PickleSource(stream)
    machine = _Machine(constructors, persistent, source)
    try:
        for count, (opcode, argument, _) in enumerate(pickletools.genops(source)):
            if opcode.name not in _OPERATIONS:
                raise InputError("pickle", remedy=f"refused operation {opcode.name}")
            if count > 2 * MAX_VALUES:
                raise InputError("pickle", remedy=f"more than {2 * MAX_VALUES} operations")
            _OPERATIONS[opcode.name](machine, argument)
    except InputError:
        raise
    except Exception as error:  # what genops raises is not documented
        raise InputError(
            "pickle",
            remedy=f"damaged at byte {source.position} ({type(error).__name__})",
        ) from error
    (result,) = machine.take(1)
    for _ in walk(result):
        pass
    return result


def walk(structure: Any) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """The leaves of nested containers with their paths, in order.

    >>> list(walk({"a": [1, 2]}))
    [(('a', 0), 1), (('a', 1), 2)]

    Raises:
      InputError: there are too many leaves, where a shared one counts as often as it is reached, or
        they are nested too deep, as in a container that holds itself.
    """
    pending = [iter([((), structure)])]
    count = 0
    while pending:
        for path, value in pending[-1]:
            count += 1
            if count > MAX_VALUES:
                raise InputError("pickle", remedy=f"holds more than {MAX_VALUES} values")
            items = _items(value)
            if items is None:
                yield path, value
                continue
            if len(pending) > MAX_DEPTH:
                raise InputError("pickle", remedy=f"nested more than {MAX_DEPTH} deep")
            pending.append(_below(path, items))
            break
        else:
            pending.pop()


def _items(value: Any) -> Iterator[tuple[Any, Any]] | None:
    """Keys and values of a container; None for a leaf, which a set is too: it holds constants."""
    if isinstance(value, Record):
        value = value.fields
    if isinstance(value, dict):
        return iter(value.items())
    return enumerate(value) if isinstance(value, list | tuple) else None


def _below(
    path: tuple[Any, ...], items: Iterator[tuple[Any, Any]]
) -> Iterator[tuple[tuple[Any, ...], Any]]:
    return (((*path, key), value) for key, value in items)


def _shown(name: Any) -> str:
    """A name from the stream for a message: quoted, on one line, and shortened."""
    return repr(str(name)[:MAX_SHOWN_LENGTH])


def plain_key(value: Any) -> Any:
    """Checks a key of a dict or a member of a set, and returns it.

    Only strings and numbers are allowed, whose hashes are fast and cannot be made to collide: the
    hash of a tuple can be slow, and tuples and long integers can be chosen to have equal hashes.

    Raises:
      InputError: the value is neither a string nor a number.
    """
    if value is None or type(value) in (str, bytes, bool, float):
        return value
    if type(value) is int and value.bit_length() < 64:
        return value
    raise InputError(
        "pickle",
        remedy=f"refused a key of type {type(value).__name__}: keys are strings and numbers",
    )


def _in_pairs(values: list[Any]) -> Iterator[tuple[Any, Any]]:
    """The items of [key, value, key, value, ...]."""
    if len(values) % 2:
        raise InputError("pickle", remedy="a key of a dict has no value")
    return zip(map(plain_key, values[::2]), values[1::2], strict=True)


def _first_and_rest(values: list[Any]) -> tuple[Any, tuple[Any, ...]]:
    return (values[0] if values else None), tuple(values[1:])


# It checks its input by hand: no checker of annotations may do it in tests.
@no_type_check
class _Machine:
    """The stack, the marks on it and the memo of one pickle."""

    def __init__(
        self, constructors: Constructors, persistent: Callable[[Any], Any], source: PickleSource
    ):
        self.constructors = constructors
        self.persistent = persistent
        self.source = source
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}
        self.copied = 0

    def push(self, value: Any) -> None:
        if type(value) is int and value.bit_length() > MAX_INTEGER_BITS:
            raise InputError("pickle", remedy=f"an integer of {value.bit_length()} bits")
        self.stack.append(value)

    def take(self, count: int) -> list[Any]:
        """Removes the last values above the last mark, and returns them."""
        if len(self.stack) - (self.marks[-1] if self.marks else 0) < count:
            raise InputError(
                "pickle",
                remedy=f"nothing on the stack at byte {self.source.position}",
            )
        values = self.stack[-count:]
        del self.stack[-count:]
        return values

    def peek(self) -> Any:
        """The last value, which stays on the stack."""
        self.stack += self.take(1)
        return self.stack[-1]

    def mark(self) -> None:
        self.marks.append(len(self.stack))

    def take_marked(self) -> list[Any]:
        """Removes the last mark and the values above it, and returns the values."""
        if not self.marks:
            raise InputError(
                "pickle",
                remedy=f"no mark on the stack at byte {self.source.position}",
            )
        start = self.marks.pop()
        values = self.stack[start:]
        del self.stack[start:]
        return values

    def drop(self) -> None:
        """Removes the last value, or a mark where that is last, as POP does."""
        if self.marks and self.marks[-1] == len(self.stack):
            self.marks.pop()
        else:
            self.take(1)

    def target(self, kind: type) -> Any:
        """The last value, which must be exactly of the type that the operation changes."""
        target = self.peek()
        if type(target) is not kind:
            raise InputError(
                "pickle",
                remedy=f"refused to change a {type(target).__name__} as if it were a "
                       f"{kind.__name__}",
            )
        return target

    def extend(self, values: list[Any]) -> None:
        self.target(list).extend(values)

    def update(self, values: list[Any]) -> None:
        self.target(dict).update(_in_pairs(values))

    def add(self, values: list[Any]) -> None:
        self.target(set).update(map(plain_key, values))

    def get(self, index: int) -> None:
        if index not in self.memo:
            raise InputError("pickle", remedy=f"nothing in the memo at {_shown(index)}")
        self.stack.append(self.memo[index])

    def put(self, index: int) -> None:
        # Longer integers can be chosen so that their hashes collide.
        if not 0 <= index < 2**32:
            raise InputError("pickle", remedy="an index of the memo beyond 32 bits")
        self.memo[index] = self.peek()

    def find(self, module: Any, name: Any) -> Global:
        full = f"{module}.{name}" if type(module) is type(name) is str else "(not a string)"
        if full not in self.constructors:
            raise InputError(
                "pickle",
                remedy=f"refused global {_shown(full)}: only tensors, containers and plain values "
                       "are read",
            )
        return Global(full, self.constructors[full])

    def find_pair(self, names: str) -> Global:
        """The Global of "module name", as `genops` writes it."""
        module, _, name = names.partition(" ")
        return self.find(module, name)

    def call(self, target: Any, arguments: Any, keywords: Any = None) -> None:
        """Pushes the result of the constructor of a Global."""
        if type(target) is not Global or type(arguments) is not tuple or keywords:
            raise InputError(
                "pickle",
                remedy=f"refused to call a {type(target).__name__}, or without a tuple of "
                       "arguments, or with keywords",
            )
        # Arguments from the memo cost a stream few bytes, and a constructor that copies them much
        # memory.
        self.copied += len(arguments) + sum(len(a) for a in arguments if isinstance(a, Sized))
        if self.copied > 4 * self.source.position + 2**16:
            raise InputError("pickle", remedy=f"{target.name} copies more than the stream holds")
        try:
            self.push(target.constructor(*arguments))
        except InputError:
            raise
        except Exception as error:
            raise InputError(
                "pickle",
                remedy=f"{target.name} does not take these arguments ({type(error).__name__})",
            ) from error

    def build(self, state: Any) -> None:
        """Sets the state of a Record. The state of a dict, which stands for an OrderedDict, holds
        attributes that a dict does not have, and is ignored."""
        target = self.peek()
        if isinstance(target, Record):
            target.build(state)
        elif type(target) is not dict:
            raise InputError(
                "pickle",
                remedy=f"refused to set the state of a {type(target).__name__}",
            )

    def require_protocol(self, number: int) -> None:
        if number > 5:
            raise InputError("pickle", remedy=f"protocol {number}: 0 to 5 are known")


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
