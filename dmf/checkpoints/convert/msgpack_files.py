"""Checkpoints that flax.training.checkpoints wrote, read without running anything that they hold.

Such a file is one value of msgpack: maps within maps, whose leaves are arrays as extension types.
`read` returns the arrays by their names. The values of an array stay in the file until
`numpy.asarray` asks for them, so that of a train state only the part that is converted is read.
"""

import dataclasses
import io
import math
import os
import struct
from collections.abc import Iterator, Mapping
from typing import Any

import ml_dtypes
import numpy as np
from etils import epath

from dmf.checkpoints.convert.name_tables import Shape
from dmf.checkpoints.convert.pytorch_storages import DTYPE_NAMES
from dmf.errors import InputError, brief

# Bounds far above the needs of a checkpoint.
MAX_DEPTH = 64
MAX_VALUES = 200_000
MAX_TEXT_BYTES = 1000
MAX_AXES = 32
# Flax cuts arrays of more than 1 GiB, and stores this key with the shape and the chunks.
CHUNKED = "__msgpack_chunked_array__"
# The extension types of an array and of a scalar of NumPy.
_ARRAY_TYPES = (1, 3)
_DTYPES = {name: np.dtype(getattr(ml_dtypes, name, name)) for name in DTYPE_NAMES}
_CONSTANTS = {0xC0: None, 0xC2: False, 0xC3: True}
_NUMBERS = dict(zip(range(0xCA, 0xD4), "fdBHIQbhiq", strict=True))
# The kind of a value whose length follows, and the format of the length.
_LENGTHS = {
    0xC4: ("bytes", "B"), 0xC5: ("bytes", "H"), 0xC6: ("bytes", "I"),
    0xC7: ("extension", "B"), 0xC8: ("extension", "H"), 0xC9: ("extension", "I"),
    0xD9: ("text", "B"), 0xDA: ("text", "H"), 0xDB: ("text", "I"),
    0xDC: ("list", "H"), 0xDD: ("list", "I"), 0xDE: ("map", "H"), 0xDF: ("map", "I"),
}  # fmt: skip
_MAPS = (*range(0x81, 0x90), 0xDE, 0xDF)


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class MsgpackArray:
    """An array whose values are in a file; each call of `numpy.asarray` reads them again.

    Attributes:
      path: path of the file.
      shape: sizes of the axes.
      dtype: dtype of the values; bfloat16 and the 8-bit floats are those of ml_dtypes.
      places: position and number of bytes of each chunk in the file.
    """

    path: str
    shape: Shape
    dtype: np.dtype
    places: tuple[tuple[int, int], ...] = dataclasses.field(repr=False)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """The values, as a new array."""
        if copy is False:
            raise ValueError("an array in a file can only be copied")
        data = np.empty(sum(length for _, length in self.places), np.uint8)
        self._read_into(memoryview(data))
        # Only 0 and 1 may become booleans of NumPy.
        values = data != 0 if self.dtype == np.bool_ else data.view(self.dtype)
        values = values.reshape(self.shape)
        return values if dtype is None else values.astype(dtype, copy=False)

    def _read_into(self, data: memoryview) -> None:
        with open(self.path, "rb") as file:
            first = 0
            for start, length in self.places:
                file.seek(start)
                if file.readinto(data[first : first + length]) != length:
                    raise InputError(self.path, remedy="it is cut short")
                first += length


def is_msgpack(path: epath.Path) -> bool:
    """Whether a file begins with a map of msgpack that is not empty, as no pickle and no zip does.
    """
    with path.open("rb") as file:
        return file.read(1) in [bytes([code]) for code in _MAPS]


def read(path: str | os.PathLike[str]) -> dict[str, MsgpackArray]:
    """Reads the names, shapes and dtypes of the arrays of a file that Flax wrote.

    Args:
      path: the file.

    Returns:
      The arrays by their names, for example "ema_params/net/class_tokens"; none where the file
      holds none.

    Raises:
      InputError: the file cannot be read, is damaged, claims more than it holds, or holds other
        objects than arrays, numbers and texts.
    """
    try:
        with open(path, "rb") as file:
            reader = _Reader(file, os.fspath(path))
            tree = reader.value(0)
    except OSError as error:
        raise InputError("", remedy=f"it cannot be read ({error.strerror})") from None
    if not isinstance(tree, dict) or reader.remaining:
        raise InputError("", remedy="it is no checkpoint of Flax: it holds no map of msgpack, or "
                         f"more than one ({reader.remaining} bytes follow)")
    arrays: dict[str, MsgpackArray] = {}
    for name, array in _leaves(tree, ()):
        if name in arrays:
            raise InputError("", remedy=f"two arrays have the name {name!r}")
        arrays[name] = array
    return arrays


def _leaves(tree: Any, path: tuple[str, ...]) -> Iterator[tuple[str, MsgpackArray]]:
    if isinstance(tree, MsgpackArray):
        yield "/".join(path), tree
    elif isinstance(tree, dict):
        for name, value in tree.items():
            yield from _leaves(value, (*path, name))


class _Reader:
    """Reads the values of a file, no further than its end."""

    def __init__(self, file: io.BufferedIOBase, path: str):
        self._file, self._path = file, path
        self._position, self._values = 0, 0
        self._end = os.fstat(file.fileno()).st_size

    @property
    def remaining(self) -> int:
        """Number of bytes that are left."""
        return self._end - self._position

    def value(self, depth: int) -> Any:
        """The next value: a number, a text, None for bytes, an array, or a dict, which stands for a
        list too."""
        kind, content = self._head()
        if kind == "text":
            return self._text(content)
        if kind == "bytes":
            self._skip(content)
            return None
        if kind == "extension":
            return self._array(content)
        return self._container(kind, content, depth) if kind in ("list", "map") else content

    def _head(self) -> tuple[str, Any]:
        """The kind of the next value, and its length, or the value itself where it is a constant.
        """
        code = self._number("B")
        if code < 0x80 or code >= 0xE0:
            return "constant", code - 256 * (code >= 0xE0)
        if code < 0xA0:
            return "map" if code < 0x90 else "list", code & 15
        if code < 0xC0:
            return "text", code & 31
        if code in _CONSTANTS:
            return "constant", _CONSTANTS[code]
        if code in _NUMBERS:
            return "constant", self._number(_NUMBERS[code])
        if code in _LENGTHS:
            kind, form = _LENGTHS[code]
            return kind, self._number(form)
        if 0xD4 <= code <= 0xD8:
            return "extension", 1 << (code - 0xD4)
        raise self._refused(f"byte {code:#x} begins no value of msgpack")

    def _container(self, kind: str, count: int, depth: int) -> Any:
        self._values += count
        if depth == MAX_DEPTH:
            raise self._refused(f"nested more than {MAX_DEPTH} deep")
        self._require(count * (1 + (kind == "map")))
        if self._values > MAX_VALUES:
            raise self._refused(f"more than {MAX_VALUES} values")
        items: dict[str, Any] = {}
        for i in range(count):
            name = str(i) if kind == "list" else self._name()
            if name in items:
                raise self._refused(f"{name!r} is there twice")
            items[name] = self.value(depth + 1)
        return self._joined(items) if CHUNKED in items else items

    def _name(self) -> str:
        """A name in a map: a text, or a whole number."""
        kind, content = self._head()
        if kind == "text" and content <= MAX_TEXT_BYTES:
            return self._text(content)
        if kind == "constant" and type(content) is int:
            return str(content)
        raise self._refused(f"a name that is no short text, but {kind}")

    def _text(self, length: int) -> str:
        """A text; a long one, which is nothing that is used here, becomes empty."""
        if length > MAX_TEXT_BYTES:
            self._skip(length)
            return ""
        try:
            return self._bytes(length).decode()
        except UnicodeDecodeError as error:
            raise self._refused(f"a text that is no UTF-8 ({brief(error)})") from None

    def _array(self, length: int) -> MsgpackArray:
        """An array: an extension type that holds a list of shape, name of the dtype and bytes."""
        end = self._position + 1 + length
        code = self._number("b")
        self._require(length)
        if code not in _ARRAY_TYPES:
            raise self._refused(f"an object of extension type {code}: only arrays are read")
        if self._head() != ("list", 3):
            raise self._refused("an array that is no list of shape, dtype and bytes")
        shape, dtype = self._shape(), self._dtype()
        kind, count = self._head()
        if kind not in ("bytes", "text") or self._position + count != end:
            raise self._refused("an array whose bytes are not as many as it claims")
        start = self._position
        self._skip(count)
        array = MsgpackArray(self._path, shape, dtype, ((start, count),))
        self._check_size(array)
        return array

    def _shape(self) -> Shape:
        kind, count = self._head()
        if kind != "list" or count > MAX_AXES:
            raise self._refused("an array whose shape is no list of sizes, or a very long one")
        return self._sizes([self._head()[1] for _ in range(count)])

    def _sizes(self, sizes: list[Any]) -> Shape:
        if not all(type(size) is int and 0 <= size < 2**63 for size in sizes):
            raise self._refused("an array whose shape has sizes that are none")
        return tuple(sizes)

    def _dtype(self) -> np.dtype:
        kind, length = self._head()
        name = self._text(length) if kind in ("text", "bytes") else kind
        if name not in _DTYPES:
            raise self._refused(f"an array of dtype {name[:40]!r}: only numbers are read")
        return _DTYPES[name]

    def _check_size(self, array: MsgpackArray) -> None:
        """Raises InputError where an array has not as many bytes as its shape says."""
        stored = sum(length for _, length in array.places)
        if math.prod(array.shape) * array.dtype.itemsize != stored:
            raise self._refused(f"an array of shape {array.shape} and dtype {array.dtype} with "
                                f"{stored} bytes")

    def _joined(self, items: Mapping[str, Any]) -> MsgpackArray:
        """An array that was cut into chunks."""
        shape, chunks = items.get("shape"), items.get("chunks")
        if not isinstance(shape, dict) or not isinstance(chunks, dict) or not chunks:
            raise self._refused("an array in chunks without a shape or chunks")
        parts = [chunks.get(str(i)) for i in range(len(chunks))]
        if not all(isinstance(part, MsgpackArray) and part.dtype == parts[0].dtype
                   for part in parts):
            raise self._refused("an array in chunks that are missing or of several dtypes")
        sizes = self._sizes([shape.get(str(i)) for i in range(len(shape))])
        places = tuple(place for part in parts for place in part.places)
        array = MsgpackArray(self._path, sizes, parts[0].dtype, places)
        self._check_size(array)
        return array

    def _number(self, form: str) -> Any:
        (number,) = struct.unpack(f">{form}", self._bytes(struct.calcsize(form)))
        return number

    def _bytes(self, count: int) -> bytes:
        self._require(count)
        self._position += count
        return self._file.read(count)

    def _skip(self, count: int) -> None:
        self._require(count)
        self._position += count
        self._file.seek(self._position)

    def _require(self, count: int) -> None:
        if count > self.remaining:
            raise self._refused(f"cut short: {count} bytes wanted, {self.remaining} left")

    def _refused(self, problem: str) -> InputError:
        return InputError(f"msgpack at byte {self._position}", remedy=problem)
