"""Reads pickles with arrays of NumPy, in which other projects store statistics."""

import dataclasses
import math
import os
from typing import Any

import numpy as np

from dmf.checkpoints.convert.pickle_constructors import CONSTRUCTORS as PLAIN
from dmf.checkpoints.convert.pickle_constructors import NumpyType
from dmf.checkpoints.convert.safe_pickle import Constructors, Global, Record, load
from dmf.errors import InputError


@dataclasses.dataclass(slots=True, eq=False)
class _Array(Record):
    """An array of numbers.

    Attributes:
      values: the array; None until the state is set.
    """

    values: np.ndarray | None = None

    def build(self, state: Any) -> None:
        """Sets the values from the state: version, shape, dtype, order and bytes."""
        if type(state) is not tuple or len(state) != 5:
            raise InputError("pickle", remedy="an array of NumPy without its state")
        _, shape, kind, by_column, data = state
        self.values = _values(data, kind, shape, "F" if by_column is True else "C")


def _values(data: Any, kind: Any, shape: Any, order: Any) -> np.ndarray:
    sizes = shape if type(shape) is tuple else (None,)
    if type(data) is not bytes or type(kind) is not NumpyType or order not in ("C", "F"):
        raise InputError("pickle", remedy="an array of NumPy without type or bytes")
    if not all(type(size) is int and 0 <= size < 2**31 for size in sizes):
        raise InputError("pickle", remedy="an array of NumPy of no shape")
    dtype = np.dtype(kind.name)
    if math.prod(sizes) * dtype.itemsize != len(data):
        raise InputError(
            "pickle",
            remedy=f"an array of NumPy of shape {sizes} with {len(data)} bytes",
        )
    return np.frombuffer(data, dtype).reshape(sizes, order=order)


def _reconstruct(kind: Any, shape: Any, code: Any) -> _Array:
    if type(kind) is not Global or kind.name != "numpy.ndarray":
        raise InputError("pickle", remedy="an array of a class that is not NumPy's")
    return _Array("numpy.ndarray")


def _from_buffer(data: Any, kind: Any, shape: Any, order: Any) -> _Array:
    return _Array("numpy.ndarray", {}, _values(data, kind, shape, order))


def _opaque(*arguments: Any) -> None:
    raise InputError("pickle", remedy="a type was called, and not only named")


CONSTRUCTORS: Constructors = {
    **PLAIN,
    "numpy.ndarray": _opaque,
    "numpy.core.multiarray._reconstruct": _reconstruct,
    "numpy._core.multiarray._reconstruct": _reconstruct,
    "numpy.core.numeric._frombuffer": _from_buffer,
    "numpy._core.numeric._frombuffer": _from_buffer,
}


def read(path: str | os.PathLike[str]) -> Any:
    """Reads the containers, plain values and arrays of a pickle, without running code.

    Raises:
      InputError: the file cannot be read, is no pickle, is damaged, or holds other objects.
    """
    try:
        with open(path, "rb") as file:
            return _plain(load(file, CONSTRUCTORS, _no_storage))
    except InputError as error:
        raise error.within(os.fspath(path)) from None
    except OSError as error:
        raise InputError(os.fspath(path), remedy=str(error.strerror)) from None


def _no_storage(identity: Any) -> None:
    raise InputError("pickle", remedy="an object that is stored elsewhere")


def _plain(value: Any) -> Any:
    """A structure with the arrays themselves in place of `_Array`."""
    if isinstance(value, _Array):
        if value.values is None:
            raise InputError("pickle", remedy="an array of NumPy without its state")
        return value.values
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_plain(item) for item in value)
    return value
