"""Tensors whose values stay in a PyTorch file, and their constructors for pickles.

A tensor is a view of a storage with sizes, strides and an offset, which are checked when the pickle
is read. Its values are read when `numpy.asarray` asks for them, and only those from its first to
its last.
"""

import dataclasses
import functools
import io
import math
import zlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import ml_dtypes
import numpy as np

from dmf.checkpoints.convert.name_tables import Shape
from dmf.checkpoints.convert.safe_pickle import Constructors, Global
from dmf.errors import InputError

# A tensor that repeats its values (with a stride of 0) may have this many bytes, or as many as the
# file.
MAX_REPEATED_BYTES = 2**24
MAX_AXES = 32
MAX_KEY_LENGTH = 100
CHUNK = 2**20
SAVE_AGAIN = "save its state_dict() with torch.save"

DTYPE_NAMES = (
    "float64", "float32", "float16", "bfloat16", "complex64", "complex128", "bool",
    "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64",
    "float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz", "float8_e8m0fnu",
)  # fmt: skip
_DTYPES = {f"torch.{name}": np.dtype(getattr(ml_dtypes, name, name)) for name in DTYPE_NAMES}
_STORAGES = {
    f"torch.{kind}Storage": _DTYPES[f"torch.{name}"]
    for kind, name in {
        "Double": "float64", "Float": "float32", "Half": "float16", "BFloat16": "bfloat16",
        "Long": "int64", "Int": "int32", "Short": "int16", "Char": "int8", "Byte": "uint8",
        "Bool": "bool", "ComplexFloat": "complex64", "ComplexDouble": "complex128",
    }.items()
} | dict.fromkeys(
    ("torch.UntypedStorage", "torch.storage.UntypedStorage", "torch.storage._UntypedStorage"),
    np.dtype("uint8"),
)  # fmt: skip


@dataclasses.dataclass(slots=True, eq=False)
class Storage:
    """A range of bytes in a file.

    Attributes:
      path: path of the file.
      key: key of the storage in the pickle.
      dtype: dtype of the values, as the pickle claims.
      count: number of values, as the pickle claims.
      max_bytes: largest number of bytes that a tensor of this storage may have.
      start: position of the first byte in the file.
      length: number of bytes in the file.
      checksum: CRC-32 of the bytes, which is compared once, before the first read. It is 0 where
        there is none: in a legacy file, and where PyTorch was told to write none.
    """

    path: str
    key: str
    dtype: np.dtype
    count: int
    max_bytes: int
    start: int | None = None
    length: int = 0
    checksum: int = 0

    def place(self, start: int, length: int, end: int) -> None:
        """Sets the place of the bytes in a file.

        Args:
          start: position of the first byte.
          length: number of bytes.
          end: position after the last byte of the file.
        """
        claimed = self.count * self.dtype.itemsize
        if length < claimed:
            raise InputError(
                "", remedy=f"storage {self.key!r} has {length} bytes, and claims {claimed}"
            )
        if start + length > end:
            raise InputError("", remedy=f"storage {self.key!r} goes beyond the end of the file")
        self.start, self.length = start, length

    def read(self, first: int, count: int) -> np.ndarray:
        """Reads `count` bytes of the storage from byte `first` on."""
        try:
            with open(self.path, "rb") as file:
                if count < self.length:
                    self._verify(self._chunks(file))
                file.seek(self.start + first)
                data = np.empty(count, np.uint8)
                if file.readinto(memoryview(data)) != count:
                    raise InputError("", remedy=f"storage {self.key!r} is cut short")
                if count == self.length:
                    self._verify([data])
                return data
        except OSError as error:
            raise InputError(f"checkpoint {self.path}", remedy=f"{error.strerror}") from error
        except InputError as error:
            raise error.within(f"checkpoint {self.path}") from None

    def _chunks(self, file: io.BufferedIOBase) -> Iterator[bytes]:
        file.seek(self.start)
        remaining = self.length
        while remaining and (chunk := file.read(min(remaining, CHUNK))):
            remaining -= len(chunk)
            yield chunk

    def _verify(self, parts: Iterable[Any]) -> None:
        """Compares the checksum with that of the bytes of the whole storage, once."""
        if not self.checksum:
            return
        if functools.reduce(lambda crc, part: zlib.crc32(part, crc), parts, 0) != self.checksum:
            raise InputError(
                f"storage {self.key!r} is damaged",
                remedy="its checksum is not that of its bytes",
            )
        self.checksum = 0


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class StoredTensor:
    """A tensor whose values are in a file; each call of `numpy.asarray` reads them again.

    Attributes:
      shape: sizes of the axes.
      dtype: dtype of the values; bfloat16 and the 8-bit floats are those of ml_dtypes.
      strides: stride of each axis, in values.
      offset: offset of the first value in the storage, in values.
      storage: the storage that holds the values.
    """

    shape: Shape
    dtype: np.dtype
    strides: Shape
    offset: int
    storage: Storage = dataclasses.field(repr=False)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """The values, as a new array in C order."""
        if copy is False:
            raise ValueError("a tensor in a file can only be copied")
        values = self._values()
        return values if dtype is None else values.astype(dtype, copy=False)

    def _values(self) -> np.ndarray:
        if 0 in self.shape:
            return np.empty(self.shape, self.dtype)
        size = self.dtype.itemsize
        data = self.storage.read(self.offset * size, _extent(self.shape, self.strides) * size)
        strides = [stride * size for stride in self.strides]
        if self.dtype == np.bool_:  # only 0 and 1 may become booleans of NumPy
            return np.asarray(np.ndarray(self.shape, np.uint8, data, 0, strides) != 0, order="C")
        return np.asarray(np.ndarray(self.shape, self.dtype, data, 0, strides), order="C")


def _extent(shape: Shape, strides: Shape) -> int:
    """Number of values from the first to the last of a tensor that has some."""
    return 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))


class Storages:
    """The storages that a pickle names.

    Attributes:
      path: path of the file.
      size: number of bytes of the file.
      locate: sets the place of a storage when the pickle names it first.
      by_key: the storages by key.
    """

    def __init__(self, path: str, size: int, locate: Callable[[Storage], None]):
        self.path, self.size, self.locate = path, size, locate
        self.by_key: dict[str, Storage] = {}

    def persistent(self, identity: Any) -> Storage:
        """The storage of a persistent id, ("storage", type, key, device, number of values[, view]).

        Raises:
          InputError: the id is not that of a storage, or contradicts an earlier one.
        """
        if type(identity) is not tuple or len(identity) not in (5, 6) or identity[0] != "storage":
            raise InputError("", remedy="a persistent id is not that of a storage: " + SAVE_AGAIN)
        _, kind, key, _, count, *view = identity
        if type(key) is not str or len(key) > MAX_KEY_LENGTH:
            raise InputError("", remedy="a storage has a key that is no string, or a very long one")
        if type(kind) is not Global or kind.name not in _STORAGES:
            raise InputError("", remedy=f"storage {key!r} has a type that is not known")
        if not _is_size(count):
            raise InputError("", remedy=f"storage {key!r} claims a number of values that is none")
        if view not in ([], [None]):
            raise InputError("", remedy=f"storage {key!r} is a view of another: " + SAVE_AGAIN)
        return self._claimed(key, _STORAGES[kind.name], count)

    def _claimed(self, key: str, dtype: np.dtype, count: int) -> Storage:
        storage = self.by_key.get(key)
        if storage is None:
            storage = Storage(self.path, key, dtype, count, max(MAX_REPEATED_BYTES, self.size))
            self.locate(storage)
            self.by_key[key] = storage
        if (storage.dtype, storage.count) != (dtype, count):
            raise InputError("", remedy=f"storage {key!r} is claimed as two different things")
        return storage


def _is_size(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**63


def _tensor(
    storage: Any, offset: Any, shape: Any, strides: Any, dtype: np.dtype | None = None
) -> StoredTensor:
    """A tensor, after the check that all its values are in the storage, and not absurdly many.

    Raises:
      InputError: an argument is of another type or out of bounds.
    """
    if type(storage) is not Storage or type(shape) is not tuple or type(strides) is not tuple:
        raise InputError("", remedy="a tensor has no storage, sizes or strides")
    name = f"a tensor of storage {storage.key!r}"
    if not len(shape) == len(strides) <= MAX_AXES:
        raise InputError("", remedy=f"{name} has {len(shape)} sizes and {len(strides)} strides")
    if not all(map(_is_size, (offset, *shape, *strides))):
        raise InputError("", remedy=f"{name} has sizes, strides or an offset that are none")
    dtype = dtype or storage.dtype
    if math.prod(max(size, 1) for size in shape) * dtype.itemsize > storage.max_bytes:
        raise InputError(f"{name} has shape {shape}", remedy="more values than the file can hold")
    # PyTorch leaves the stride of a single value open.
    strides = tuple(s if size > 1 else 0 for size, s in zip(shape, strides, strict=True))
    end = offset + _extent(shape, strides)
    if 0 not in shape and end * dtype.itemsize > storage.count * storage.dtype.itemsize:
        raise InputError(f"{name} goes beyond the storage's end", remedy=f"it needs {end} values")
    return StoredTensor(shape, dtype, strides, offset, storage)


def _rebuild(
    storage: Any, offset: Any, shape: Any, strides: Any, gradient: Any = None, hooks: Any = None,
    metadata: Any = None,
) -> StoredTensor:  # fmt: skip
    if metadata not in (None, {}):
        raise InputError("a tensor is a conjugate or a negative view", remedy="save a copy of it")
    return _tensor(storage, offset, shape, strides)


def _rebuild_typed(
    storage: Any, offset: Any, shape: Any, strides: Any, gradient: Any, hooks: Any, dtype: Any,
    metadata: Any = None,
) -> StoredTensor:  # fmt: skip
    if type(dtype) is not Global or dtype.name not in _DTYPES or metadata not in (None, {}):
        raise InputError(
            "", remedy="a tensor has a type that is not known, or is a view that is not"
        )
    return _tensor(storage, offset, shape, strides, _DTYPES[dtype.name])


_REBUILDS: Constructors = {
    "torch._utils._rebuild_tensor": _rebuild,
    "torch._utils._rebuild_tensor_v2": _rebuild,
    "torch._utils._rebuild_tensor_v3": _rebuild_typed,
}
_TENSOR_TYPES = ("torch.Tensor", "torch._tensor.Tensor", "torch.nn.parameter.Parameter")


def _rebuild_parameter(tensor: Any, gradient: Any, hooks: Any, state: Any = None) -> StoredTensor:
    if type(tensor) is not StoredTensor:
        raise InputError("", remedy="a parameter has no tensor")
    return tensor


def _rebuild_from_type(rebuild: Any, kind: Any, arguments: Any, state: Any) -> StoredTensor:
    names = [x.name if type(x) is Global else "" for x in (rebuild, kind)]
    if names[0] not in _REBUILDS or names[1] not in _TENSOR_TYPES or type(arguments) is not tuple:
        raise InputError("", remedy="a tensor is of a class that is not PyTorch's: " + SAVE_AGAIN)
    return _REBUILDS[names[0]](*arguments)


def _opaque(*arguments: Any) -> None:
    raise InputError("", remedy="a type was called, and not only named")


CONSTRUCTORS: Constructors = {
    **_REBUILDS,
    "torch._utils._rebuild_parameter": _rebuild_parameter,
    "torch._utils._rebuild_parameter_with_state": _rebuild_parameter,
    "torch._tensor._rebuild_from_type_v2": _rebuild_from_type,
    **dict.fromkeys((*_DTYPES, *_STORAGES, *_TENSOR_TYPES), _opaque),
}
