"""The GPU kernels in a serialized XLA executable: their machine code, grid and shared memory.

XLA stores an executable as a Riegeli record file of Protocol Buffers, compressed by Snappy. The
formats are published: google/riegeli, doc/riegeli_records_file_format.md; google/snappy,
format_description.txt; protobuf.dev/programming-guides/encoding. XLA's messages are not, so a
kernel is found by the form of its message: it holds an ELF file and the dimensions of its launch.
"""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

from dmf.errors import RunError

RIEGELI_SIGNATURE = bytes.fromhex("83af70d10d884a3f0000000000000000")
RIEGELI_BLOCK, BLOCK_HEADER, CHUNK_HEADER = 2**16, 24, 40
ELF = b"\x7fELF"
# Field numbers in XLA's message of a kernel.
NAME, MODULE, BLOCKS, THREADS, SHARED_MEMORY = 1, 2, 3, 4, 6
SIMPLE_CHUNK = b"r"


class Kernel(NamedTuple):
    """A compiled kernel and its launch.

    Attributes:
      name: its name.
      cubin: an ELF file with its machine code.
      blocks: thread blocks of a launch.
      threads: threads of a block.
      shared_memory: bytes that a launch requests for each block.
    """

    name: str
    cubin: bytes
    blocks: int
    threads: int
    shared_memory: int


def kernels(executable: bytes) -> list[Kernel]:
    """The kernels of `compiled.runtime_executable().serialize()`.

    Raises:
      RunError: there are none in it that this reader understands.
    """
    found = [kernel for record in _records(executable) for kernel in _kernels_in(record)]
    if not found:
        raise RunError("no GPU kernel was found in the executable; this JAX stores it otherwise")
    return found


def varint(data: bytes, at: int) -> tuple[int, int]:
    """The integer of variable length at an offset, and the offset after it."""
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return value, at


def unsnap(data: bytes) -> bytes:
    """What a block of Snappy holds, decompressed."""
    size, at = varint(data, 0)
    out = bytearray()
    while len(out) < size:
        tag, at = data[at], at + 1
        if tag & 3 == 0:
            length, at = _literal_length(data, tag, at)
            out += data[at : at + length]
            at += length
        else:
            length, offset, at = _copy(data, tag, at)
            # A copy may reach into what it writes, and then repeats it.
            source = bytes(out[len(out) - offset :])[:length]
            out += (source * -(-length // len(source)))[:length]
    return bytes(out)


def _unsnap_sized(data: bytes) -> bytes:
    """What Riegeli compressed: the size, which Snappy repeats, and a block of Snappy."""
    return unsnap(data[varint(data, 0)[1] :])


COMPRESSIONS = {b"\0": bytes, b"s": _unsnap_sized}


def _literal_length(data: bytes, tag: int, at: int) -> tuple[int, int]:
    length, count = tag >> 2, max(0, (tag >> 2) - 59)
    if count:
        length = int.from_bytes(data[at : at + count], "little")
    return length + 1, at + count


def _copy(data: bytes, tag: int, at: int) -> tuple[int, int, int]:
    """Length and offset of a copy, and the offset of the next tag."""
    if tag & 3 == 1:
        return 4 + (tag >> 2 & 7), (tag >> 5) << 8 | data[at], at + 1
    count = 2 if tag & 3 == 2 else 4
    return (tag >> 2) + 1, int.from_bytes(data[at : at + count], "little"), at + count


def _records(executable: bytes) -> Iterator[bytes]:
    """The records of each Riegeli file within an executable."""
    starts, start = [], -1
    while (start := executable.find(RIEGELI_SIGNATURE, start + 1)) >= 0:
        starts.append(start)
    for start, end in zip(starts, [*starts[1:], len(executable)], strict=True):
        file = executable[start:end]
        # A header of its own interrupts the chunks at each multiple of the block size.
        chunks = b"".join(file[i + BLOCK_HEADER : i + RIEGELI_BLOCK]
                          for i in range(0, len(file), RIEGELI_BLOCK))  # fmt: skip
        yield from _records_of_chunks(chunks)


def _records_of_chunks(chunks: bytes) -> Iterator[bytes]:
    at = 0
    while at + CHUNK_HEADER <= len(chunks):
        size = int.from_bytes(chunks[at + 8 : at + 16], "little")
        kind, data = chunks[at + 24 : at + 25], chunks[at + CHUNK_HEADER :][:size]
        at += CHUNK_HEADER + size
        if kind == SIMPLE_CHUNK and data[:1] in COMPRESSIONS:
            yield from _split(data)


def _split(chunk: bytes) -> Iterator[bytes]:
    """The records of a chunk, which holds their sizes and then their bytes, each compressed."""
    decompress = COMPRESSIONS[chunk[:1]]
    size, at = varint(chunk, 1)
    sizes, values = decompress(chunk[at : at + size]), decompress(chunk[at + size :])
    start = at = 0
    while at < len(sizes):
        size, at = varint(sizes, at)
        yield values[start : start + size]
        start += size


def _kernels_in(message: bytes) -> Iterator[Kernel]:
    """The kernels in a message and in the messages that it holds."""
    if ELF not in message or (fields := _fields(message)) is None:
        return
    by_number = dict(fields)
    cubin = next(_elf_files(by_number.get(MODULE)), None)
    if cubin and {NAME, BLOCKS, THREADS} <= by_number.keys():
        blocks, threads = (math.prod(_integers(by_number[i])) for i in (BLOCKS, THREADS))
        name, shared_memory = by_number[NAME].decode(), by_number.get(SHARED_MEMORY, 0)
        yield Kernel(name, cubin, blocks, threads, shared_memory)
        return
    for _, value in fields:
        if isinstance(value, bytes):
            yield from _kernels_in(value)


def _elf_files(value: Any) -> Iterator[bytes]:
    """The ELF files in a field or below it."""
    if isinstance(value, bytes) and value.startswith(ELF):
        yield value
    elif isinstance(value, bytes) and ELF in value:
        for _, inner in _fields(value) or ():
            yield from _elf_files(inner)


def _integers(message: bytes) -> Iterator[int]:
    """The integers in a message and in the messages that it holds."""
    for _, value in _fields(message) or ():
        if isinstance(value, int):
            yield value
        else:
            yield from _integers(value)


def _fields(data: bytes) -> list[tuple[int, Any]] | None:
    """(number, value) of each field of a message; None if the bytes are no message."""
    fields, at = [], 0
    try:
        while at < len(data):
            key, at = varint(data, at)
            number, wire = key >> 3, key & 7
            if wire == 0:
                value, at = varint(data, at)
            elif wire in (1, 2, 5):
                size, at = varint(data, at) if wire == 2 else ({1: 8, 5: 4}[wire], at)
                value, at = data[at : at + size], at + size
            else:
                return None
            fields.append((number, value))
    except IndexError:
        return None
    return fields if at == len(data) and all(number for number, _ in fields) else None
