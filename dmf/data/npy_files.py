"""Arrays in the bytes of .npy and .npz files, without unpickling anything."""

import functools
import io
import zipfile
from collections.abc import Collection

import numpy as np

from dmf.errors import InputError

# The arrays of one sample; more are not unpacked, however small the file is.
MAX_NPZ_BYTES = 2**28
_DAMAGED = "is no .npy file, or a damaged one: write it again with numpy.save"


def npz_arrays(data: bytes, names: Collection[str]) -> dict[str, bytes]:
    """The arrays of an .npz.

    Args:
      data: bytes of the .npz.
      names: names of the arrays to read; those that the file does not hold are left out.

    Returns:
      The bytes of each array, as those of an .npy.

    Raises:
      InputError: the file is damaged, or its arrays have more than `MAX_NPZ_BYTES`; the field of
        the error is empty.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            entries = {entry.filename: entry for entry in archive.infolist()}
            found = {name: entries[f"{name}.npy"] for name in names if f"{name}.npy" in entries}
            if sum(entry.file_size for entry in found.values()) > MAX_NPZ_BYTES:
                raise ValueError(f"more than {MAX_NPZ_BYTES:,} bytes")
            return {name: archive.read(entry) for name, entry in found.items()}
    except Exception as error:  # Python does not document all that zipfile raises.
        reason = f"is no .npz, damaged or too large ({type(error).__name__}): save it anew"
        raise InputError("", remedy=reason) from None


def header_size(data: bytes) -> int:
    """Number of bytes before the values of an .npy, from its first 10 bytes.

    Raises:
      InputError: the bytes are no .npy of version 1, which all arrays of numbers have.
    """
    if data[:8] != b"\x93NUMPY\1\0":
        raise InputError("", remedy=_DAMAGED)
    return 10 + int.from_bytes(data[8:10], "little")


@functools.lru_cache
def parse_header(header: bytes) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Shape, whether the order is Fortran's, and dtype of an .npy.

    Most headers are the same, and to parse one takes longer than to read its file.

    Args:
      header: the first `header_size` bytes.

    Raises:
      InputError: the header is damaged, or the values are not numbers.
    """
    try:
        shape, fortran, dtype = np.lib.format.read_array_header_1_0(io.BytesIO(header[8:]))
    except Exception:  # NumPy does not document all that it raises.
        raise InputError("", remedy=_DAMAGED) from None
    if dtype.kind not in "iuf":  # Never objects: bytes must not become pointers.
        raise InputError("", remedy=f"it holds {dtype}: give numbers")
    return shape, fortran, dtype


def parse_array(data: bytes) -> np.ndarray:
    """The array in the bytes of an .npy, without a copy.

    Raises:
      InputError: the file is damaged, or its values are not numbers.
    """
    start = header_size(data)
    shape, fortran, dtype = parse_header(data[:start])
    try:
        values = np.frombuffer(data, dtype, offset=start)
        return values.reshape(shape, order="F" if fortran else "C")
    except ValueError:  # The size is not that of the shape.
        raise InputError("", remedy=_DAMAGED) from None
