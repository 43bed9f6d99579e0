"""The stream of a pickle, which reads no more bytes than there are."""

import io
from typing import no_type_check

from dmf.errors import InputError

# Bounds far above the needs of a checkpoint, whose tensors are not in its pickle.
MAX_BYTES = 2**26
MAX_LINE_BYTES = 2**20


# It checks its input by hand: no checker of annotations may do it in tests.
@no_type_check
class PickleSource:
    """The stream as `genops` reads it, which refuses to read more bytes than there are."""

    def __init__(self, stream: io.BufferedIOBase):
        self._stream = stream
        self._start = stream.tell()
        self._remaining = min(stream.seek(0, 2) - self._start, MAX_BYTES)
        stream.seek(self._start)
        self.position = 0

    def tell(self) -> int:
        return self.position

    def read(self, count: int) -> bytes:
        self.require(count)
        return self._advance(self._stream.read(count))

    def readline(self) -> bytes:
        return self._advance(self._stream.readline(min(MAX_LINE_BYTES, self._remaining)))

    def require(self, count: int) -> None:
        """Raises InputError where fewer than `count` bytes are left."""
        if not 0 <= count <= self._remaining:
            raise InputError(
                "pickle",
                remedy=f"cut short at byte {self.position}, or longer than {MAX_BYTES} bytes: "
                       f"{count} wanted, {self._remaining} left",
            )

    def _advance(self, data: bytes) -> bytes:
        self.position += len(data)
        self._remaining -= len(data)
        return data
