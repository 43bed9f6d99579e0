"""Pickles made to cost much time or memory: they are refused before they do."""

import struct
import time
import tracemalloc

import pytest
from test_safe_pickle import NAMESPACE, assert_refused, code, named

from dmf.checkpoints.convert import safe_pickle
from dmf.checkpoints.convert.safe_pickle import load
from dmf.errors import InputError


def peak_and_seconds(data: bytes, message: str) -> tuple[int, float]:
    """What it costs to refuse a stream."""
    tracemalloc.start()
    began = time.process_time()
    try:
        assert_refused(data, message)
        return tracemalloc.get_traced_memory()[1], time.process_time() - began
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    "operation",
    [b"B", b"X", b"T", b"\x8b", b"\x8d", b"\x8e", b"\x96", b"\x95"],
    ids=["BINBYTES", "BINUNICODE", "BINSTRING", "LONG4", "BINUNICODE8", "BINBYTES8", "BYTEARRAY8",
         "FRAME"],
)  # fmt: skip
@pytest.mark.parametrize("claim", [2**31 - 1, 2**60, 2**63 - 1, 2**64 - 1])
def test_claimed_lengths_are_not_believed(operation, claim, tmp_path):
    width = 4 if operation in b"BXT\x8b" else 8
    data = operation + struct.pack("<Q", claim)[:width] + b"few bytes."
    assert peak_and_seconds(data, "pickle: (cut short|damaged)")[0] < 2**19
    file = tmp_path / "stream"
    file.write_bytes(data)
    with open(file, "rb") as stream, pytest.raises(InputError):
        load(stream, {}, repr)


def doubled(start: bytes, step: bytes, times: int) -> bytes:
    """Each value made of the one before, twice."""
    return start + step * times


LAUGHS = {
    "tuples": doubled(b")", b"2\x86", 60),
    "lists": b"]" + b"".join(b"q%c0](h%ch%ce" % (i, i, i) for i in range(60)),
    "dicts": b"}" + b"".join(b"q%c0}(K\x01h%cK\x02h%cu" % (i, i, i) for i in range(60)),
    "records": b"N" + b"".join(
        b"q%c0" % i + NAMESPACE + b"}(K\x01h%cK\x02h%cub" % (i, i) for i in range(60)),
}  # fmt: skip
CYCLES = {
    "list": b"]2a",
    "dict": b"}q\x00K\x01h\x00s",
    "record": NAMESPACE + b"q\x00}K\x01h\x00sb",
    "through a tuple": b"]q\x00h\x00\x85a",
    "own fields": NAMESPACE + b"}q\x00K\x01h\x00sb",
}
BOMBS = {
    **{f"laughs of {name}": data + b"." for name, data in LAUGHS.items()},
    **{f"laughs as a key: {name}": b"}" + data + b"K\x01s." for name, data in LAUGHS.items()},
    **{f"a {name} in itself": data + b"." for name, data in CYCLES.items()},
    "deep list": b"(" + b"]" * 5000 + b"a" * 4999 + b"l.",
    "deep tuple": b")" + b"\x85" * 5000 + b".",
    "deep dict": b"}K\x01" * 3000 + b"}" + b"s" * 3000 + b".",
    "deep record": b"N" + (b"q\x000" + NAMESPACE + b"}K\x01h\x00sb") * 500 + b".",
    "memo far out": b"]r\xff\xff\xff\xff](h\x00e.",
    "copies of a list": code(([None] * 10_000,)) + b"q\x000(" + (
        named("builtins.list") + b"h\x00R") * 300 + b"l.",
    "copies of a string": code(("x" * 50_000, "latin1")) + b"q\x000(" + (
        named("_codecs.encode") + b"h\x00R") * 300 + b"l.",
    "copies of arguments": code(("a" * 30_000,) * 2) + b"q\x000(" + (
        named("pathlib.PosixPath") + b"h\x00R") * 300 + b"l.",
    "one state for many": code(dict.fromkeys(range(200))) + b"q\x000(" + (
        NAMESPACE + b"h\x00b") * 200 + b"l.",
    "equal hashes": b"}(" + b"".join(code(i * (2**61 - 1)) + b"N" for i in range(5000)) + b"u.",
    "equal hashes in the memo": b"N" + b"".join(b"p%d\n" % (i * (2**61 - 1)) for i in range(5000)),
    "many operations": b"N0" * 2**15 + b"N.",
}  # fmt: skip


WHY = {
    "laughs of": "more than 4096 values", "laughs as": "key of type", "a ": "nested more",
    "deep": "nested more", "memo": "nothing in the memo", "copies": "copies more than the stream",
    "one state": "more than 16384 values", "equal hashes in": "memo beyond 32 bits",
    "equal hashes": "key of type int", "many": "more than 32768 operations",
}  # fmt: skip


@pytest.mark.parametrize("name", BOMBS)
def test_bombs_cost_little(name, monkeypatch):
    """With bounds as far below the real ones as these are below real ones."""
    monkeypatch.setattr(safe_pickle, "MAX_VALUES", 2**12 if name.startswith("laughs") else 2**14)
    message = next(why for start, why in WHY.items() if name.startswith(start))
    peak, seconds = peak_and_seconds(BOMBS[name], message)
    assert peak < 2**21 + 100 * len(BOMBS[name]) and seconds < 60
