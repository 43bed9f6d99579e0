"""Constructors of plain values for `safe_pickle.load`, for the classes that checkpoints hold.

Each constructor checks its arguments, which come from the file, and returns a constant, a plain
container or a `Record`.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Callable
from typing import Any

import numpy as np

from dmf.checkpoints.convert.safe_pickle import Constructors, Global, Record, plain_key
from dmf.errors import InputError


def _items(items: Any) -> Any:
    if type(items) not in (list, tuple, set, frozenset):
        raise InputError("pickle", remedy=f"a container made of a {type(items).__name__}")
    return items


def _dict(items: Any = ()) -> dict[Any, Any]:
    pairs = items.items() if type(items) is dict else _items(items)
    return {plain_key(key): value for key, value in pairs}


def _default_dict(factory: Any = None, items: Any = ()) -> dict[Any, Any]:
    if factory is not None and type(factory) is not Global:
        raise InputError("pickle", remedy="a default that is no type")
    return _dict(items)


def _number(kind: type, *values: Any) -> Any:
    if not {type(value) for value in values} <= {int, float, bool}:
        raise InputError("pickle", remedy=f"a {kind.__name__} that is not made of numbers")
    return kind(*values)


def _string(value: Any = "") -> str:
    if type(value) is not str:
        raise InputError("pickle", remedy="a string that is made of something else")
    return value


def _encode(text: Any, encoding: Any) -> bytes:
    if type(text) is not str or encoding not in ("latin1", "latin-1"):
        raise InputError("pickle", remedy="refused to encode but text as latin1")
    return text.encode("latin1")


def _bytes(value: Any = b"", *encoding: Any) -> bytes:
    if encoding:
        return _encode(value, *encoding)
    if type(value) is not bytes:
        raise InputError("pickle", remedy="bytes that are made of something else")
    return value


def _joined(make: Callable[..., Any], *parts: Any) -> str:
    return str(make(*map(_string, parts)))


def _device(kind: Any, *index: Any) -> str:
    return ":".join([_string(kind), *(str(_number(int, i)) for i in index)])


@dataclasses.dataclass(slots=True, eq=False)
class NumpyType(Record):
    """A pickled dtype of NumPy; `name` is its kind and size, for example "f4"."""

    def build(self, state: Any) -> None:
        """Checks the byte order, which is in the state."""
        if type(state) is not tuple or len(state) < 2 or state[1] not in ("<", "|", "="):
            raise InputError("pickle", remedy="a number of NumPy that is not little-endian")


def _numpy_type(name: Any, align: Any = False, copy: Any = False) -> NumpyType:
    if name not in ("b1", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8"):
        raise InputError("pickle", remedy="a number of NumPy of a type that is not known")
    return NumpyType(name)


def _numpy_scalar(kind: Any, data: Any) -> int | float | bool:
    if type(kind) is not NumpyType or type(data) is not bytes:
        raise InputError("pickle", remedy="a number of NumPy without type or bytes")
    (value,) = np.frombuffer(data, kind.name)
    return value.item()


_BUILTINS: Constructors = {
    "set": lambda items=(): set(map(plain_key, _items(items))),
    "frozenset": lambda items=(): frozenset(map(plain_key, _items(items))),
    "list": lambda items=(): list(_items(items)),
    "tuple": lambda items=(): tuple(_items(items)),
    "dict": _dict,
    "str": _string,
    "unicode": _string,
    "bytes": _bytes,
    "bytearray": _bytes,
    "long": functools.partial(_number, int),
    **{t.__name__: functools.partial(_number, t) for t in (int, float, bool, complex)},
}
_PATHS = {
    pathlib.PurePosixPath: ("PosixPath", "PurePosixPath", "Path", "PurePath"),
    pathlib.PureWindowsPath: ("WindowsPath", "PureWindowsPath"),
}
CONSTRUCTORS: Constructors = {
    **{f"{module}.{name}": make for module in ("builtins", "__builtin__")
       for name, make in _BUILTINS.items()},
    **{f"{module}.{name}": functools.partial(_joined, make)
       for module in ("pathlib", "pathlib._local")
       for make, names in _PATHS.items() for name in names},
    "_codecs.encode": _encode,
    "argparse.Namespace": lambda: Record("argparse.Namespace"),
    "collections.OrderedDict": _dict,
    "collections.defaultdict": _default_dict,
    "numpy.dtype": _numpy_type,
    "numpy.core.multiarray.scalar": _numpy_scalar,
    "numpy._core.multiarray.scalar": _numpy_scalar,
    "torch.Size": _BUILTINS["tuple"],
    "torch.device": _device,
}  # fmt: skip
