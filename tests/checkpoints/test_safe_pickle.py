"""Pickles as data: what is honest comes out whole, and what is not is refused before it costs."""

import argparse
import collections
import copyreg
import io
import os
import pathlib
import pickle

import numpy as np
import pytest
from mutations import mutated

from dmf.checkpoints.convert import safe_pickle
from dmf.checkpoints.convert.pickle_constructors import CONSTRUCTORS
from dmf.checkpoints.convert.pickle_source import MAX_LINE_BYTES
from dmf.checkpoints.convert.safe_pickle import Global, Record, load, walk
from dmf.errors import InputError

PROTOCOLS = range(pickle.HIGHEST_PROTOCOL + 1)
VALUES = {
    "constants": [None, True, False, 0, -1, 255, 65536, -(2**31), 2**63, -(2**200), 0.5, -1e300],
    "strings": ["", "a", "ü\U0001f600", "quote'\"\n\\", "x" * 260, b"", b"\x00\xff", b"y" * 260],
    "nested": {"a": [1, (2,), (3, 4), (5, 6, 7), tuple(range(4))], 3: {"b": {}}, None: [], 1.5: ()},
    "sets": [{1, "a", None}, frozenset({2.5}), set(), frozenset()],
    "numbers": [1 + 2j, complex(0, float("inf"))],
    "long": [list(range(1200)), {str(i): i for i in range(1200)}],
}  # fmt: skip


def read(data: bytes, constructors=CONSTRUCTORS, persistent=lambda identity: identity):
    return load(io.BytesIO(data), constructors, persistent)


def code(value) -> bytes:
    """The operations that push a value."""
    return pickle.dumps(value, 2)[2:-1]


def named(name: str) -> bytes:
    module, _, last = name.rpartition(".")
    return f"c{module}\n{last}\n".encode()


def assert_refused(data: bytes, message: str = "pickle", **how) -> None:
    with pytest.raises(InputError, match=message) as error:
        read(data, **how)
    assert "\n" not in str(error.value) and len(str(error.value)) < 400
    assert "TypeCheckError" not in str(error.value), "nothing checks annotations when it is used"


NAMESPACE = named("argparse.Namespace") + b")\x81"


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("value", VALUES.values(), ids=VALUES)
def test_plain_values_come_back(value, protocol):
    assert read(pickle.dumps(value, protocol)) == value


@pytest.mark.parametrize("protocol", PROTOCOLS[2:])
def test_classes_become_plain_values(protocol):
    ordered = collections.OrderedDict(b=1, a=2)
    ordered.attribute = {"version": 1}  # as PyTorch puts one on a state dict
    grouped = collections.defaultdict(list, {"c": [3]})
    paths = [pathlib.PurePosixPath("/a/b"), pathlib.PurePosixPath("c"), pathlib.PurePosixPath("/")]
    numbers = [np.float64(0.1), np.float32(0.5), np.int64(-3), np.uint8(200), np.bool_(True)]
    spaced = argparse.Namespace(a=1, b=argparse.Namespace(c=[2]))
    read_back = read(
        pickle.dumps([ordered, grouped, paths, numbers, bytearray(b"\xe9"), int, spaced], protocol)
    )
    *plain, kind, record = read_back
    values = [0.1, 0.5, -3, 200, True]
    expected = [{"b": 1, "a": 2}, {"c": [3]}, ["/a/b", "c", "/"], values, b"\xe9"]
    assert plain == expected and list(plain[0]) == ["b", "a"]
    assert [type(x) for x in plain[:2] + plain[3]] == [dict, dict, float, float, int, int, bool]
    assert type(kind) is Global and type(record) is Record
    assert record.name == "argparse.Namespace" and record.fields["a"] == 1
    assert record.fields["b"].fields == {"c": [2]}


def test_parts_that_were_shared_are_shared():
    shared = [1]
    first, second = read(pickle.dumps([shared, shared], 4))
    assert first is second
    one, other = read(NAMESPACE + b"}q\x00b" + NAMESPACE + b"h\x00b\x86.")
    assert one is not other and one.fields is other.fields


def test_pickles_in_a_row_leave_the_stream_behind_them():
    stream = io.BytesIO(b"before" + b"".join(pickle.dumps([p], p) for p in PROTOCOLS) + b"after")
    stream.seek(6)
    assert [load(stream, {}, repr) for _ in PROTOCOLS] == [[p] for p in PROTOCOLS]
    assert stream.read() == b"after"


@pytest.mark.parametrize(
    ("data", "value"),
    [
        (b"S'old'\n.", "old"),
        (b"T\x03\x00\x00\x00oldU\x03old\x86.", ("old", "old")),
        (b"L12345678901234567890L\n.", 12345678901234567890),
        (b"\x8b\x02\x00\x00\x00\xff\x7f.", 32767),
        (b"I01\nI00\nI7\n\x87.", (True, False, 7)),
        (b"(K\x01K\x02K\x03K\x04d.", {1: 2, 3: 4}),
        (b"(K\x01K\x02l.", [1, 2]),
        (b"K\x01K\x020.", 1),  # POP
        (b"K\x01(K\x02K\x031.", 1),  # POP_MARK
        (b"K\x01(0.", 1),  # POP takes the mark
        (b"K\x012\x86.", (1, 1)),  # DUP
        (b"Pid\nK\x05Q\x86.", ("id", 5)),
        (b"(ibuiltins\ncomplex\n.", 0j),
        (b"(K\x01K\x02ibuiltins\ncomplex\n.", 1 + 2j),  # INST
        (b"(" + named("builtins.complex") + b"K\x01K\x02o.", 1 + 2j),  # OBJ
        (named("builtins.complex") + b"K\x01\x85\x81.", 1 + 0j),  # NEWOBJ
        (named("builtins.complex") + b"K\x01\x85}\x92.", 1 + 0j),  # NEWOBJ_EX
        (b"\x8c\x08builtins\x8c\x03set\x93)R.", set()),  # STACK_GLOBAL
        (b"\x96\x02\x00\x00\x00\x00\x00\x00\x00ab.", b"ab"),  # BYTEARRAY8
        (named("collections.OrderedDict") + code(([["a", 1]],)) + b"R.", {"a": 1}),
        (named("collections.defaultdict") + named("builtins.list") + b"\x85R.", {}),
    ],
)
def test_operations_that_python_no_longer_writes(data, value):
    found = read(data)
    assert found == value and type(found) is type(value)


HOSTILE = (
    "os.system", "posix.system", "nt.system", "subprocess.Popen", "builtins.eval", "builtins.exec",
    "builtins.getattr", "builtins.__import__", "__builtin__.apply", "copyreg._reconstructor",
    "copy_reg._reconstructor", "builtins.object", "builtins.type", "operator.attrgetter",
    "torch.load", "torch.storage._load_from_bytes", "numpy.core.multiarray._reconstruct",
    "collections.OrderedDict.__init__", "argparse.Namespace.__class__", "pathlib.os.system",
    "dmf.checkpoints.convert.safe_pickle.load", "functools.partial", "types.FunctionType",
    "pickle.loads",
)  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_other_globals_are_refused_by_name(name, tmp_path):
    canary = tmp_path / "canary"
    module, _, last = name.rpartition(".")
    pair = code(module) + code(last)
    push = named(name)
    argument = code(f"touch {canary}")
    for data in (
        push + argument + b"\x85R.",  # GLOBAL, REDUCE
        pair + b"\x93" + argument + b"\x85R.",  # STACK_GLOBAL
        push + argument + b"\x85\x81.",  # NEWOBJ
        push + argument + b"\x85}\x92.",  # NEWOBJ_EX
        b"(" + push + argument + b"o.",  # OBJ
        b"(" + argument + f"i{module}\n{last}\n.".encode(),  # INST
        named("argparse.Namespace") + b")\x81}X\x0c\x00\x00\x00__setstate__" + push + b"sb.",
        named("collections.defaultdict") + push + b"\x85R.",
        push + b".",
        named("builtins.list") + b"(" + push + b"t\x85R.",
    ):
        assert_refused(data, f"refused global '{name}'", persistent=os.system)
    assert not canary.exists()


def test_what_calls_code_in_python_is_refused(tmp_path):
    """The same by the library's own pickler, which would create the canary on loading."""
    canary = tmp_path / "canary"

    class Touch:
        def __reduce__(self):
            return os.system, (f"touch {canary}",)

    for protocol in PROTOCOLS:
        assert_refused(pickle.dumps({"a": [Touch()]}, protocol), "refused global '.*system'")
    assert not canary.exists()
    pickle.loads(pickle.dumps(Touch()))
    assert canary.exists()


def test_objects_of_other_classes_are_refused():
    for value in (argparse.ArgumentParser, collections.Counter("a"), io.BytesIO(b"a"), range(3)):
        assert_refused(pickle.dumps(value, 2), "refused global")
    assert_refused(pickle.dumps(argparse.Namespace(), 1), "refused global 'copy_reg._recon")
    copyreg.add_extension("dmf_test", "extension", 77)
    try:
        assert_refused(b"\x82\x4d.", "refused operation EXT1")
    finally:
        copyreg.remove_extension("dmf_test", "extension", 77)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"\x83\x01\x00.", "operation EXT2"),
        (b"\x84\x01\x00\x00\x00.", "operation EXT4"),
        (b"\x97.", "operation NEXT_BUFFER"),
        (b"\x98.", "operation READONLY_BUFFER"),
        (named("builtins.set") + b"}b.", "state of a Global"),
        (b"]}b.", "state of a list"),
        (b"K\x01}b.", "state of a int"),
        (NAMESPACE + b"K\x01b.", "no dict"),
        (NAMESPACE + b"N}\x86b.", "no dict"),
        (NAMESPACE + b"K\x01K\x02s.", "refused to change a Record"),
        (named("builtins.set") + b"K\x01K\x02s.", "refused to change a Global"),
        (b")K\x01a.", "refused to change a tuple as if it were a list"),
        (b"}(K\x01e.", "refused to change a dict as if it were a list"),
        (b"](K\x01\x90.", "refused to change a list as if it were a set"),
        (code("os.system") + b")R.", "refused to call a str"),
        (NAMESPACE + b")R.", "refused to call a Record"),
        (named("builtins.set") + b"]R.", "without a tuple"),
        (b"(o.", "refused to call"),
        (named("builtins.dict") + b")}X\x01\x00\x00\x00aK\x01s\x92.", "keywords"),
        (b"](K\x01l0e.", "no mark"),
        (b"t.", "no mark"),
        (b"K\x01(K\x02\x87.", "nothing on the stack"),
        (b"(R.", "nothing on the stack"),
        (b"K\x01K\x02(K\x03\x87.", "nothing on the stack"),
        (b".", "nothing on the stack"),
        (b"h\x05.", "memo at '5'"),
        (b"g-1\n.", "memo at '-1'"),
        (b"]p-1\n.", "memo beyond"),
        (b"q\x00.", "nothing on the stack"),
        (b"}]K\x01s.", "key of type list"),
        (b"})K\x01s.", "key of type tuple"),
        (b"(]\x91.", "key of type list"),
        (b"}" + code(2**64) + b"K\x01s.", "key of type int"),
        (b"}" + named("builtins.set") + b"K\x01s.", "key of type Global"),
        (b"}(K\x01u.", "no value"),
        (b"K\x01K\x02\x93.", "not a string"),
        (b"\x80\x06N.", "protocol 6"),
        (b"\xff.", "damaged at byte"),
        (b"", "cut short"),
        (b"I" + b"9" * 10_000 + b"\n.", "damaged"),
        (b"\x8b\x00\x01\x00\x00" + b"\x7f" * 256 + b".", "integer of 2047 bits"),
        (b"V\\ud800\\uzzzz\n.", "damaged"),
        (b"X\x01\x00\x00\x00\xff.", "damaged"),
        (b"c\\x6f\\n\ns\n.", r"refused global 'o\\n.s'"),
        (b"c" + b"a" * 5000 + b"\nb\n.", "refused global 'aaa"),
        (b"c" + b"a" * MAX_LINE_BYTES + b"\nb\n.", "damaged"),
        (b"\x95\xff\x00\x00\x00\x00\x00\x00\x00N.", "cut short"),
    ],
)
def test_refused(data, message):
    assert_refused(data, message)


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("_codecs.encode", ("a", "rot13")),
        ("_codecs.encode", ("\u1234", "latin1")),
        ("_codecs.encode", (b"a", "latin1")),
        ("_codecs.encode", ()),
        ("builtins.int", ("7", 7)),
        ("builtins.int", (float("inf"),)),
        ("builtins.float", (2**1023 * 2 - 1,)),
        ("builtins.str", ([1],)),
        ("builtins.bytes", (2**40,)),
        ("builtins.bytearray", (2**40,)),
        ("builtins.list", ("abc",)),
        ("builtins.set", ([[]],)),
        ("builtins.dict", ([1, 2],)),
        ("builtins.dict", ([((), 2)],)),
        ("collections.OrderedDict", (1,)),
        ("collections.defaultdict", ("list",)),
        ("argparse.Namespace", (1,)),
        ("pathlib.PosixPath", (1, 2)),
        ("numpy.dtype", ("O8",)),
        ("numpy.dtype", ([],)),
        ("numpy.core.multiarray.scalar", ("f8", b"12345678")),
        ("torch.device", (1,)),
        ("torch.device", ("cuda", "0")),
    ],
)
def test_arguments_that_a_constructor_does_not_take(name, arguments):
    assert_refused(named(name) + code(arguments) + b"R.", "pickle: (?!damaged)")


def test_number_of_numpy_must_fit_its_type():
    kind = named("numpy.dtype") + code(("f8", False, True)) + b"R"
    scalar = named("numpy.core.multiarray.scalar")
    swapped = code((3, ">")) + b"b"
    for data, state in ((b"1234", b""), (b"", b""), (b"1" * 16, b""), (b"1" * 8, swapped)):
        call = scalar + kind + state + b"C" + bytes([len(data)]) + data + b"\x86R."
        assert_refused(call)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_cut_short_anywhere(protocol):
    data = pickle.dumps(VALUES["nested"] | {"s": VALUES["strings"]}, protocol)
    for length in range(len(data)):
        assert_refused(data[:length])


def test_deepest_that_is_read_can_be_compared_and_dropped():
    levels = b")" + b"\x85" * (safe_pickle.MAX_DEPTH - 1) + b"."
    value = read(levels)
    assert value == read(levels)
    assert len(repr(value)) == 3 * safe_pickle.MAX_DEPTH - 1
    assert_refused(b")\x85" + levels[1:], "nested more than")


def test_walk_gives_paths_in_order():
    record = Record("name", {"b": 1, "a": [2, (3,)]})
    found = list(walk({"x": record, 7: {"y": set()}, "z": []}))
    assert found == [(("x", "b"), 1), (("x", "a", 0), 2), (("x", "a", 1, 0), 3), ((7, "y"), set())]


@pytest.mark.filterwarnings("ignore:invalid escape sequence")  # in a mutated name
@pytest.mark.parametrize("count", [300, pytest.param(20_000, marks=pytest.mark.slow)])
def test_mutations_are_read_or_refused(count):
    random = np.random.default_rng(0)
    spaced = argparse.Namespace(a=[np.float64(1)], b=collections.OrderedDict(c={1}))
    value = VALUES["nested"] | {"s": VALUES["strings"], "n": spaced, "z": VALUES["sets"]}
    bases = [pickle.dumps(value, protocol) for protocol in PROTOCOLS[2:]]
    refused = 0
    for trial in range(count):
        data = mutated(bases[trial % len(bases)], random)
        try:
            for _ in walk(read(data)):
                pass
        except InputError as error:
            assert "\n" not in str(error)
            refused += 1
    assert count / 10 < refused < count
