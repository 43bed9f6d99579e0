"""PyTorch files without PyTorch: golden tensors, what stays in the file, and what is refused."""

import os
import pathlib
import pickle
import struct
import tracemalloc
import zipfile

import golden_values as gv
import ml_dtypes
import numpy as np
import pytest

from dmf.checkpoints.convert import pytorch_files
from dmf.checkpoints.convert.name_tables import Tensor
from dmf.checkpoints.convert.pytorch_files import LEGACY_MAGIC, flatten, read
from dmf.checkpoints.convert.pytorch_storages import Storage, StoredTensor
from dmf.checkpoints.convert.safe_pickle import Record
from dmf.errors import InputError

FORMS = ("forms_zip", "forms_legacy")
OTHER_TYPES = {"half": "float16", "bf16": "bfloat16", "i64": "int64", "u8": "uint8",
               "bool_": "bool", "f64": "float64"}  # fmt: skip


def golden(name: str) -> pathlib.Path:
    return gv.FOLDER / f"{name}.pt"


def global_(name: str) -> bytes:
    module, _, last = name.rpartition(".")
    return f"c{module}\n{last}\n".encode()


def code(value) -> bytes:
    """The operations that push a value; bytes are operations already."""
    if isinstance(value, bytes):
        return value
    if isinstance(value, tuple):
        return b"(" + b"".join(map(code, value)) + b"t"
    return pickle.dumps(value, 4)[2:-1]


def storage(kind="torch.FloatStorage", key="0", count=6, *more) -> bytes:
    return code(("storage", global_(kind), key, "cpu", count, *more)) + b"Q"


def tensor(shape, strides, offset=0, kept=None, rebuild="torch._utils._rebuild_tensor_v2", *more):
    """The operations that push a tensor; `more` follows requires_grad and the hooks."""
    rest = (False, {}, *more) if rebuild[-1] in "23" else ()
    kept = storage() if kept is None else kept
    return global_(rebuild) + code((kept, offset, shape, strides, *rest)) + b"R"


SIX = np.arange(6, dtype="<f4").tobytes()


def write_zip(path, structure: bytes, storages=None, *, root="any name", extra=(), **how):
    """A file as `torch.save` lays it out, of operations and the storages' bytes."""
    with zipfile.ZipFile(path, "w", **how) as archive:
        archive.writestr(f"{root}/data.pkl", b"\x80\x02" + structure + b".")
        for name, data in extra:
            archive.writestr(f"{root}/{name}", data)
        for key, data in ({"0": SIX} if storages is None else storages).items():
            archive.writestr(f"{root}/data/{key}", data)
    return path


def write_legacy(path, structure: bytes, storages=None, *, little=True, keys=None):
    """`storages`: key to (number of values, bytes)."""
    storages = {"0": (6, SIX)} if storages is None else storages
    head = (LEGACY_MAGIC, 1001, {"protocol_version": 1001, "little_endian": little})
    parts = [pickle.dumps(part, 2) for part in head] + [b"\x80\x02" + structure + b"."]
    parts.append(pickle.dumps(list(storages) if keys is None else keys, 2))
    parts += [struct.pack("<q", count) + data for count, data in storages.values()]
    path.write_bytes(b"".join(parts))
    return path


WRITERS = pytest.mark.parametrize("write", [write_zip, write_legacy])


@pytest.fixture
def path(tmp_path) -> pathlib.Path:
    return tmp_path / "checkpoint.pt"


def assert_refused(path, message: str, action=read) -> None:
    with pytest.raises(InputError, match=message) as error:
        action(path)
    assert str(error.value).startswith(f"checkpoint {path}: ")
    assert "\n" not in str(error.value) and len(str(error.value)) < 1500
    assert "TypeCheckError" not in str(error.value), "nothing checks annotations when it is used"


@pytest.mark.parametrize("name", FORMS)
def test_every_form_of_tensor_has_its_golden_values(name):
    found = flatten(read(golden(name)))
    with np.load(gv.FOLDER / f"{name}.npz") as file:
        expected = {key.replace("/", "."): file[key] for key in file.files}
    assert found.keys() == expected.keys()
    for key, values in expected.items():
        ours = np.asarray(found[key])
        assert ours.shape == values.shape == found[key].shape, key
        assert ours.dtype == found[key].dtype == OTHER_TYPES.get(key.split(".")[1], np.float32), key
        np.testing.assert_array_equal(ours.astype(values.dtype), values, err_msg=key)
        assert isinstance(found[key], Tensor) and ours.flags.c_contiguous and ours.flags.writeable


@pytest.mark.parametrize("name", FORMS)
def test_what_is_not_a_tensor_comes_as_plain_values(name):
    found = read(golden(name))
    assert list(found) == ["model", "ema", "opt", "args", "steps", "forms"]
    assert type(found["args"]) is Record and found["args"].name == "argparse.Namespace"
    expected = {"lr": 1e-4, "model": "DMFT-XL/2", "flag": True, "none": None, "items": [1, 2]}
    assert found["args"].fields == expected
    assert found["steps"] == 1234 and found["forms"]["size"] == (2, 3)
    assert found["opt"]["param_groups"][0]["betas"] == (0.9, 0.95)


def test_tensors_of_a_network_are_the_golden_ones():
    found = flatten(read(golden("dmf_tiny")))
    expected = gv.load("dmf_tiny").below("params")
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        np.testing.assert_array_equal(np.asarray(found[name]), values, err_msg=name)


def test_values_are_given_in_the_type_that_is_asked_for():
    found = flatten(read(golden("forms_zip")))
    assert np.asarray(found["forms.bf16"], np.float32).dtype == np.float32
    assert np.array(found["forms.half"], copy=True).dtype == np.float16
    with pytest.raises(ValueError):
        np.array(found["forms.half"], copy=False)


LAYOUTS = {
    "whole": ((2, 3), (3, 1), 0, [[0, 1, 2], [3, 4, 5]]),
    "transposed": ((3, 2), (1, 3), 0, [[0, 3], [1, 4], [2, 5]]),
    "part": ((2, 2), (3, 1), 1, [[1, 2], [4, 5]]),
    "stepped": ((3,), (2,), 1, [1, 3, 5]),
    "expanded": ((2, 3), (0, 1), 3, [[3, 4, 5], [3, 4, 5]]),
    "diagonal": ((2,), (4,), 1, [1, 5]),
    "one value": ((), (), 5, 5),
    "one by one": ((1, 1), (2**62, 9), 2, [[2]]),
    "none": ((2, 0), (1, 1), 6, np.zeros((2, 0))),
}
over_layouts = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)


@WRITERS
@over_layouts
def test_layouts(write, layout, path):
    shape, strides, offset, values = layout
    write(path, tensor(shape, strides, offset))
    np.testing.assert_array_equal(np.asarray(read(path)), np.asarray(values, np.float32))


TYPED = "torch._utils._rebuild_tensor_v3"
REBUILDS = {
    "v1": tensor((6,), (1,), 0, None, "torch._utils._rebuild_tensor"),
    "v2": tensor((6,), (1,)),
    "v2 with metadata": tensor((6,), (1,), 0, None, "torch._utils._rebuild_tensor_v2", {}),
    "v3": tensor((6,), (1,), 0, None, TYPED, global_("torch.float32")),
    "parameter": global_("torch._utils._rebuild_parameter")
    + code((tensor((6,), (1,)), True, global_("collections.OrderedDict") + b")R")) + b"R",
    "parameter with state": global_("torch._utils._rebuild_parameter_with_state")
    + code((tensor((6,), (1,)), True, {}, {"a": 1})) + b"R",
    "tensor with state": global_("torch._tensor._rebuild_from_type_v2")
    + code((global_("torch._utils._rebuild_tensor_v2"), global_("torch.Tensor"),
            (storage(), 0, (6,), (1,), False, {}), {"a": 1})) + b"R",
}  # fmt: skip


@WRITERS
@pytest.mark.parametrize("structure", REBUILDS.values(), ids=REBUILDS)
def test_ways_to_pickle_a_tensor(write, structure, path):
    found = np.asarray(read(write(path, structure)))
    np.testing.assert_array_equal(found, np.arange(6, dtype=np.float32))


@WRITERS
@pytest.mark.parametrize(
    "dtype",
    ["float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz", "float8_e8m0fnu",
     "uint16", "uint32", "uint64", "bfloat16", "complex128"],
)  # fmt: skip
def test_types_that_the_storage_does_not_tell(write, dtype, path):
    kind = np.dtype(getattr(ml_dtypes, dtype, dtype))
    values = np.arange(1, 9).astype(kind)
    size = values.nbytes
    kept = storage("torch.storage.UntypedStorage", "0", size)
    structure = tensor((3, 2), (1, 4), 1, kept, TYPED, global_(f"torch.{dtype}"))
    data = values.tobytes()
    write(path, structure, {"0": data if write is write_zip else (size, data)})
    found = np.asarray(read(path))
    assert found.dtype == kind
    np.testing.assert_array_equal(found, values[1:].reshape(-1)[[[0, 4], [1, 5], [2, 6]]])


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [("Double", "f8"), ("Half", "f2"), ("Long", "i8"), ("Int", "i4"), ("Short", "i2"),
     ("Char", "i1"), ("Byte", "u1"), ("ComplexFloat", "c8"), ("ComplexDouble", "c16")],
)  # fmt: skip
def test_types_that_the_storage_tells(kind, dtype, path):
    values = np.array([-3, 1, 2], np.int8).astype(dtype)
    kept = storage(f"torch.{kind}Storage", "0", 3)
    found = np.asarray(read(write_zip(path, tensor((3,), (1,), 0, kept), {"0": values.tobytes()})))
    assert found.dtype == values.dtype
    np.testing.assert_array_equal(found, values)


def test_booleans_are_zero_or_one(path):
    kept = storage("torch.BoolStorage", "0", 4)
    found = np.asarray(read(write_zip(path, tensor((4,), (1,), 0, kept), {"0": b"\0\1\2\xff"})))
    assert found.view(np.uint8).tolist() == [0, 1, 1, 1]


@WRITERS
def test_values_stay_in_the_file_until_they_are_read(write, path):
    write(path, tensor((6,), (1,)))
    found = read(path)
    data = path.read_bytes()
    start = data.index(SIX)
    path.write_bytes(data[:start] + SIX[::-1] + data[start + 24 :])
    if write is write_zip:
        assert_refused(path, "storage '0' is damaged", lambda _: np.asarray(found))
        path.write_bytes(data)
    expected = np.frombuffer(SIX if write is write_zip else SIX[::-1], np.float32)
    for _ in range(2):
        np.testing.assert_array_equal(np.asarray(found), expected)
    path.write_bytes(data[: start + 20])
    assert_refused(path, "cut short", lambda _: np.asarray(found))
    path.unlink()
    assert_refused(path, "No such file", lambda _: np.asarray(found))


def test_damage_is_seen_also_where_a_tensor_does_not_reach(path):
    data = write_zip(path, tensor((2,), (1,))).read_bytes()
    np.testing.assert_array_equal(np.asarray(read(path)), [0, 1])
    path.write_bytes(data.replace(SIX, SIX[:-1] + b"x"))
    assert_refused(path, "storage '0' is damaged", lambda _: np.asarray(read(path)))


def test_large_storage_is_neither_read_nor_believed(path):
    """Of a storage of 2**33 bytes, most of which the file system does not have either."""
    count = 2**31
    whole, part = storage(count=count), storage(count=count)
    structure = code((tensor((count,), (1,), 0, whole), tensor((5,), (2,), count - 9, part)))
    write_legacy(path, structure, {"0": (count, b"")})
    os.truncate(path, path.stat().st_size + 4 * count)
    tracemalloc.start()
    found, last = read(path)
    np.testing.assert_array_equal(np.asarray(last), np.zeros(5, np.float32))
    assert tracemalloc.get_traced_memory()[1] < 2**20
    tracemalloc.stop()
    assert found.shape == (count,)
    os.truncate(path, path.stat().st_size - 1)
    assert_refused(path, "storage '0' goes beyond the end of the file")


def test_checksum_is_not_needed_where_there_is_none(path):
    """PyTorch can be told to write none, and then writes 0."""
    write_zip(path, tensor((6,), (1,)), extra=[("byteorder", b"little")])
    data = bytearray(path.read_bytes())
    for entry in zipfile.ZipFile(path).infolist():
        data[:] = data.replace(struct.pack("<I", entry.CRC), bytes(4))
    path.write_bytes(data)
    np.testing.assert_array_equal(np.asarray(read(path)), np.arange(6, dtype=np.float32))


def test_names_are_paths(path):
    value = b"}" + b"".join(
        code(key) + part + b"s"
        for key, part in {
            "list": b"](" + tensor((1,), (1,)) + b"N" + tensor((2,), (1,)) + b"e",
            3: b"}" + code("x.y") + tensor((3,), (1,)) + b"s",
            "space": global_("argparse.Namespace") + b")\x81}" + code("w")
            + tensor((4,), (1,)) + b"sb",
            "none": code({"a": [1]}),
        }.items()
    )  # fmt: skip
    found = flatten(read(write_zip(path, value)))
    names = {"list.0": (1,), "list.2": (2,), "3.x.y": (3,), "space.w": (4,)}
    assert {name: tensor.shape for name, tensor in found.items()} == names


def stored(*sizes: int) -> dict[str, StoredTensor]:
    nowhere = Storage("nowhere", "0", np.dtype("f4"), 9, 9)
    return {f"w{n}": StoredTensor((n,), np.dtype("f4"), (1,), 0, nowhere) for n in sizes}


@pytest.mark.parametrize(
    ("structure", "message"),
    [
        ({"a": {"w1": stored(1)}, "a.w1": stored(1)}, "two tensors have the name 'a.w1.w1'"),
        ({"a" * 600: {"b" * 600: stored(1)}}, "characters"),
        ([stored(1)] * 11, "more than 10 tensors"),
        ({}, "the file holds a dict without tensors: save its state_dict"),
        (None, "the file holds a NoneType without tensors"),
    ],
)
def test_names_that_cannot_be(structure, message, monkeypatch):
    monkeypatch.setattr(pytorch_files, "MAX_TENSORS", 10)
    with pytest.raises(InputError, match=message):
        flatten(structure)
