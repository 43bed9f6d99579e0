"""PyTorch files that are wrong, damaged, mutated or harmful: each is refused in one line, and
nothing in it is run."""

import argparse
import io
import os
import pathlib
import pickle
import struct
import time
import zipfile

import numpy as np
import pytest
from mutations import mutated
from test_pytorch_files import (
    FORMS,
    SIX,
    TYPED,
    WRITERS,
    assert_refused,
    code,
    global_,
    golden,
    storage,
    tensor,
    write_legacy,
    write_zip,
)

from dmf.checkpoints.convert import pytorch_files
from dmf.checkpoints.convert.pytorch_files import LEGACY_MAGIC, flatten, read
from dmf.checkpoints.convert.pytorch_storages import MAX_REPEATED_BYTES
from dmf.errors import InputError


@pytest.fixture
def path(tmp_path) -> pathlib.Path:
    return tmp_path / "file.pt"


FLOAT = global_("torch.float32")
WRONG = {
    "negative size": (tensor((-1,), (1,)), "sizes, strides or an offset"),
    "negative stride": (tensor((6,), (-1,), 5), "sizes, strides or an offset"),
    "negative offset": (tensor((6,), (1,), -1), "sizes, strides or an offset"),
    "a size that is none": (tensor((2.0,), (1,)), "sizes, strides or an offset"),
    "a boolean for a size": (tensor((True,), (1,)), "sizes, strides or an offset"),
    "sizes that are none": (tensor("ab", (1, 1)), "no storage, sizes or strides"),
    "more strides": (tensor((6,), (1, 1)), "1 sizes and 2 strides"),
    "too many axes": (tensor((1,) * 33, (1,) * 33), "33 sizes"),
    "one value too many": (tensor((7,), (1,)), "beyond the storage's end: it needs 7 values"),
    "offset too far": (tensor((6,), (1,), 1), "beyond the storage's end: it needs 7 values"),
    "stride too far": (tensor((2, 3), (4, 1)), "beyond the storage's end: it needs 7 values"),
    "larger type": (tensor((6,), (1,), 0, None, TYPED, global_("torch.float64")), "needs 6 values"),
    "huge": (tensor((2**62,), (1,)), "more values than the file"),
    "huge, expanded": (tensor((2**24, 2), (0, 1)), "more values than the file"),
    "huge product": (tensor((2**31,) * 32, (0,) * 32), "more values than the file"),
    "huge, of no values": (tensor((0, 2**62, 2**62), (0, 0, 0)), "more values than the file"),
    "no storage": (tensor((6,), (1,), 0, b"N"), "no storage"),
    "unknown type": (tensor((6,), (1,), 0, None, TYPED, global_("torch.Size")), "type that is not"),
    "type that is none": (tensor((6,), (1,), 0, None, TYPED, "torch.float32"), "type that is not"),
    "conjugate": (
        tensor((6,), (1,), 0, None, "torch._utils._rebuild_tensor_v2", {"conj": True}), "conjugate"
    ),
    "called type": (FLOAT + b")R", "a type was called"),
    "sparse": (global_("torch._utils._rebuild_sparse_tensor") + b")R", "refused global 'torch._u"),
    "parameter of none": (global_("torch._utils._rebuild_parameter") + b"NNN\x87R", "no tensor"),
    "another class": (
        global_("torch._tensor._rebuild_from_type_v2")
        + code((global_("torch._utils._rebuild_tensor"), global_("builtins.list"), (), {})) + b"R",
        "class that is not PyTorch's",
    ),
    "called as a rebuild": (
        global_("torch._tensor._rebuild_from_type_v2")
        + code((global_("builtins.list"), global_("torch.Tensor"), (), {})) + b"R",
        "class that is not PyTorch's",
    ),
    "missing storage": (storage(key="1"), "storage '1' is not in the "),
    "path for a key": (storage(key="../data.pkl"), "storage '../data.pkl' is not in the "),
    "two claims": (code((storage(), storage(count=5))), "two different things"),
    "two types": (code((storage(), storage("torch.IntStorage"))), "two different things"),
    "claims more": (storage(count=7), "claims (7|28)"),
    "claims none": (storage(count=-1), "number of values that is none"),
    "claims a string": (storage(count="6"), "number of values that is none"),
    "storage of quanta": (storage("torch.QInt8Storage"), "refused global 'torch.QInt8Storage'"),
    "storage of no type": (storage("torch.float32"), "type that is not known"),
    "key that is none": (storage(key=0), "key that is no string"),
    "view": (storage("torch.FloatStorage", "0", 6, ("1", 0, 6)), "view of another"),
    "module": (code(("module", global_("builtins.list"), "a.py", "code")) + b"Q", "persistent id"),
    "id that is none": (b"]Q", "persistent id"),
    "id that is text": (b"Pstorage\n", "persistent id"),
    "id of another kind": (code(("store", FLOAT, "0", "cpu", 6)) + b"Q", "persistent id"),
    "id that is short": (code(("storage",)) + b"Q", "persistent id"),
}  # fmt: skip


@WRITERS
@pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG)
def test_wrong_tensors_are_refused(write, wrong, path):
    structure, message = wrong
    write(path, structure)
    assert_refused(path, message)


def test_repeated_values_are_bounded_by_the_file(path):
    structure = tensor((MAX_REPEATED_BYTES // 24, 6), (0, 1))
    assert np.asarray(read(write_zip(path, structure))).nbytes <= MAX_REPEATED_BYTES


@pytest.mark.parametrize("form", ["zip", "legacy"])
@pytest.mark.parametrize("name", ["os.system", "builtins.eval", "torch.nn.modules.linear.Linear"])
def test_code_in_a_file_is_refused_by_name(name, form, path, tmp_path):
    canary = tmp_path / "canary"
    call = global_(name) + code((f"touch {canary}",)) + b"R"
    structure = b"}" + code("w") + tensor((6,), (1,)) + b"s" + code("x") + call + b"s"
    (write_zip if form == "zip" else write_legacy)(path, structure)
    assert_refused(path, f"refused global '{name}'")
    path.write_bytes(pickle.dumps(None)[:2] + call + b".")
    assert_refused(path, f"refused global '{name}'")
    assert not canary.exists()


def written(path, name: str, data: bytes):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(name, data)


OTHERS = {
    "empty": (lambda p: p.write_bytes(b""), "is empty"),
    "text": (lambda p: p.write_text("version https://git-lfs.github.com/spec/v1\n"), "is not a Py"),
    "directory": (lambda p: p.mkdir(), "is not a file"),
    "nothing": (lambda p: None, "there is no such file"),
    "fifo": (os.mkfifo, "is not a file"),
    "another zip": (lambda p: written(p, "a/b.txt", b"a"), "has no data.pkl"),
    "data.pkl elsewhere": (lambda p: written(p, "data.pkl", b"N."), "has no data.pkl"),
    "no zip": (lambda p: p.write_bytes(b"PK\3\4" + bytes(99)), "not a whole zip"),
    "empty zip": (lambda p: zipfile.ZipFile(p, "w").close(), "is not a PyTorch file"),
    "TorchScript": (
        lambda p: write_zip(p, b"N", extra=[("constants.pkl", b"N."), ("code/a.py", b"")]),
        "TorchScript archive: load it with torch.jit.load",
    ),
    "tar": (lambda p: p.write_bytes(b"sys_info".ljust(257, b"\0") + b"ustar" + bytes(300)), "tar"),
    "big-endian": (lambda p: write_zip(p, b"N", extra=[("byteorder", b"big")]), "big-endian"),
    "big-endian legacy": (lambda p: write_legacy(p, b"N", {}, little=False), "big-endian"),
    "compressed": (
        lambda p: write_zip(p, b"N", compression=zipfile.ZIP_DEFLATED), "is compressed"),
    "pickle": (lambda p: p.write_bytes(pickle.dumps({"a": 1})), "not one of torch.save"),
    "another protocol": (
        lambda p: p.write_bytes(pickle.dumps(LEGACY_MAGIC) + pickle.dumps(7)), "not one of torch"),
    "no list of keys": (lambda p: write_legacy(p, b"N", {}, keys={}), "list of storages"),
    "key twice": (lambda p: write_legacy(p, storage(), keys=["0", "0"]), "one twice"),
    "key of none": (lambda p: write_legacy(p, b"N"), "one that no tensor has"),
    "fewer values": (lambda p: write_legacy(p, storage(), {"0": (5, SIX)}), "claims 6"),
    "fewer bytes": (lambda p: write_legacy(p, storage(), {"0": (6, SIX[1:])}), "beyond the end"),
    "fewer bytes in a zip": (lambda p: write_zip(p, storage(), {"0": SIX[1:]}), "claims 24"),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("other", OTHERS.values(), ids=OTHERS)
def test_other_files_are_refused(other, path):
    make, message = other
    make(path)
    assert_refused(path, message)


def test_entries_that_are_compressed_twice_or_overlapping_are_refused(path, tmp_path):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/data.pkl", b"\x80\x02" + tensor((6,), (1,)) + b".")
        archive.writestr("a/data/0", SIX, zipfile.ZIP_DEFLATED)
    assert_refused(path, "'a/data/0' is compressed")
    write_zip(path, tensor((6,), (1,)))
    with zipfile.ZipFile(path, "a") as archive, pytest.warns(UserWarning, match="Duplicate"):
        archive.writestr("any name/data/0", SIX)
    assert_refused(path, "there twice")
    # Two entries of the directory that stand for the same 40 kB.
    write_zip(path, b"N", {"0": bytes(40_000), "1": b""})
    data = path.read_bytes()
    first = struct.pack("<II", 40_000, 40_000)
    at = data.rindex(b"any name/data/1") - 46
    changed = data[: at + 20] + first + data[at + 28 :]
    path.write_bytes(changed)
    assert_refused(path, "overlap")


@pytest.mark.parametrize(
    ("offset", "message"),
    [(5, "not where"), (2**32, "outside of it"), (2**64 - 1, "outside of it")],
)
def test_entries_that_are_elsewhere_are_refused(offset, message, path):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/data.pkl", b"\x80\x02N.")
        archive.filelist[0].header_offset = offset
    assert_refused(path, message)


def test_pickle_that_is_too_long_is_not_read(path, monkeypatch):
    monkeypatch.setattr(pytorch_files, "MAX_BYTES", 10)
    assert_refused(write_zip(path, code("a" * 10)), "has more than 10 bytes")


def test_encrypted_entries_are_refused(path):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/data.pkl", b"\x80\x02N.")
        archive.filelist[0].flag_bits |= 1
    assert_refused(path, "is encrypted")


def test_damaged_pickle_is_refused_before_it_is_read(path):
    data = write_zip(path, code({"name": "weight"})).read_bytes()
    path.write_bytes(data.replace(b"weight", b"height"))
    assert_refused(path, "'any name/data.pkl' is cut short or damaged")


def test_cut_short_anywhere(path):
    """Of a legacy file each cut is seen at once, of an archive too: its directory is at its end."""
    for name in FORMS:
        data = golden(name).read_bytes()
        for length in [*range(0, 200, 7), *range(200, len(data), 97), len(data) - 1]:
            path.write_bytes(data[:length])
            assert_refused(path, "checkpoint")


def mutated_zip(source: pathlib.Path, path: pathlib.Path, random: np.random.Generator) -> None:
    """The archive with another pickle, and nothing else that is wrong."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(path, "w") as new:
        for entry in old.infolist():
            data = old.read(entry)
            wrong = entry.filename.endswith("/data.pkl")
            new.writestr(entry.filename, mutated(data, random) if wrong else data)


def survives(path: pathlib.Path) -> bool:
    """Whether a damaged file is read; if not, it is refused as it should be. Nothing else."""
    began = time.process_time()
    whole, structure = False, None
    try:
        structure = read(path)
        for tensor in list(flatten(structure).values()):
            size = np.asarray(tensor).nbytes
            assert size <= max(MAX_REPEATED_BYTES, path.stat().st_size)
        whole = True
    except InputError as error:
        # `flatten` does not know the file.
        assert structure is not None or str(error).startswith(f"checkpoint {path}: ")
        assert "\n" not in str(error)
    assert time.process_time() - began < 20
    return whole


@pytest.mark.filterwarnings("ignore:invalid escape sequence")  # in a mutated name
@pytest.mark.parametrize("count", [120, pytest.param(1500, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", ["zip", "legacy", "pickle in a zip"])
def test_mutations_are_read_or_refused(kind, count, path):
    random = np.random.default_rng(0)
    source = golden("forms_legacy" if kind == "legacy" else "forms_zip")
    read_whole = 0
    for _ in range(count):
        if kind == "pickle in a zip":
            mutated_zip(source, path, random)
        else:
            path.write_bytes(mutated(source.read_bytes(), random))
        read_whole += survives(path)
    assert 0 < read_whole < 0.9 * count


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_protocols(protocol, path):
    """PyTorch can be told to pickle by another protocol."""

    class Pickler(pickle.Pickler):
        def persistent_id(self, value):
            return ("storage", value, "0", "cpu", 6) if value is float else None

    stream = io.BytesIO()
    value = {"a": [1, (2.5, None)], "n": argparse.Namespace(b={3}), "s": "x"}
    Pickler(stream, protocol).dump(value)
    found = read(write_zip(path, stream.getvalue()[2:-1]))
    assert found["a"] == value["a"] and found["n"].fields == {"b": {3}}
