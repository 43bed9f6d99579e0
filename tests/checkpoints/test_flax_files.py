"""Files that flax.training.checkpoints wrote, by themselves and in zip archives, and files that
only look like them: each of those is refused in one line, and costs no memory."""

import os
import shutil
import stat
import struct
import tempfile
import types
import zipfile

import ml_dtypes
import msgpack
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import serialization
from flax.traverse_util import flatten_dict, unflatten_dict
from mutations import mutated
from test_convert_claims import refused_cheaply

from dmf.checkpoints.convert import msgpack_files, namings, zip_archives
from dmf.checkpoints.convert.open_checkpoint import open_checkpoint
from dmf.errors import InputError

TREE = {
    "step": 7,
    "params": {"a": np.arange(12, dtype="f").reshape(3, 4), "half": np.ones(3, np.float16)},
    "ema": {"500": {"brain": np.linspace(0, 1, 5).astype(ml_dtypes.bfloat16)}},
    "odd": {"scalar": np.float32(2.5), "empty": np.zeros((0, 3), "f"), "none": None, "x": -1.5,
            "bits": np.array([True, False]), "zero_d": np.array(3), "text": "y" * 2000,
            "list": [np.int8(3), {"deep": np.ones((2, 1, 2))}], "negative": -200, "raw": b"12"},
}  # fmt: skip


def written(path, tree=None) -> str:
    path.write_bytes(serialization.msgpack_serialize(TREE if tree is None else tree))
    return str(path)


@pytest.mark.parametrize("chunk", [None, 16])
def test_the_arrays_are_those_that_flax_reads(tmp_path, monkeypatch, chunk):
    """Whole and in chunks."""
    if chunk:
        monkeypatch.setattr(serialization, "MAX_CHUNK_SIZE", chunk)
    path = written(tmp_path / "checkpoint_7")
    restored = serialization.msgpack_restore((tmp_path / "checkpoint_7").read_bytes())
    restored["odd"]["list"] = dict(zip("01", restored["odd"]["list"], strict=True))
    expected = {name: leaf for name, leaf in flatten_dict(restored, sep="/").items()
                if isinstance(leaf, np.ndarray | np.generic)}
    found = msgpack_files.read(path)
    assert found.keys() == expected.keys() and len(found) == 9
    for name, array in found.items():
        assert (array.shape, array.dtype) == (expected[name].shape, expected[name].dtype)
        np.testing.assert_array_equal(np.asarray(array), expected[name])
    assert any(len(array.places) > 1 for array in found.values()) == bool(chunk)


def test_what_is_not_converted_is_not_read(tmp_path):
    """A train state of four gigabytes, in a file with holes."""
    body = serialization.msgpack_serialize({"a": np.ones(3, "f")})[1:]
    head = b"\x83\xa5first\xc6" + struct.pack(">I", 2**32 - 1)
    with open(tmp_path / "state", "wb") as file:
        file.write(head)
        file.seek(len(head) + 2**32 - 1)
        file.write(body)
        file.write(b"\xa1b\xc6" + struct.pack(">I", 9))
    refused_cheaply(tmp_path / "state", "state: msgpack at byte .*: cut short: 9 bytes wanted, 0")


def extension(data: bytes, code: int = 1) -> bytes:
    return b"\xc9" + struct.pack(">Ib", len(data), code) + data


def array(shape, dtype, data: bytes) -> bytes:
    return extension(msgpack.packb((shape, dtype, data)))


CHUNKED = b"\x83\xb9" + msgpack_files.CHUNKED.encode()
GOOD = array([2], "float32", b"12345678")
VALUES = {
    b"\x81\xa1a" * 100 + b"\xc0": "nested more than 64 deep",
    b"\xdf\xff\xff\xff\xff": "cut short: 8589934590 bytes wanted, 0 left",
    b"\xdd\xff\xff\xff\xff": "cut short: 4294967295 bytes wanted, 0 left",
    b"\xdb\xff\xff\xff\xff": "cut short: 4294967295 bytes wanted",
    b"\xc6\xff\xff\xff\xff": "cut short: 4294967295 bytes wanted",
    b"\xc9\xff\xff\xff\xff\x01": "cut short: 4294967295 bytes wanted",
    b"\xcb\0\0": "cut short: 8 bytes wanted, 2 left",
    b"\xdd" + struct.pack(">I", 300_000) + b"\xc0" * 300_000: "more than 200000 values",
    extension(b"12345678", 2): "extension type 2: only arrays are read",
    b"\xd6\xff1234": "extension type -1: only arrays are read",
    array([1], "object", b"12345678"): "dtype 'object': only numbers are read",
    array([1], "void64", b"12345678"): "dtype 'void64': only numbers are read",
    array([1], "<U2", b"12345678"): "dtype '<U2': only numbers are read",
    array([1], ["float32"], b"1234"): "dtype 'list': only numbers are read",
    array([-1], "float32", b"1234"): "sizes that are none",
    array([True], "float32", b"1234"): "sizes that are none",
    array([2**62, 2**62], "float32", b"1234"): "of shape .* and dtype float32 with 4 bytes",
    array([1] * 40, "float32", b"1234"): "whose shape is no list of sizes, or a very long one",
    array(3, "float32", b"1234"): "whose shape is no list",
    array([3], "float32", b"1234"): r"an array of shape \(3,\) and dtype float32 with 4 bytes",
    extension(msgpack.packb(([1], "float32", b"1234")) + b"more"): "not as many as it claims",
    extension(b"\x92\x91\x01\xa7float32"): "no list of shape, dtype and bytes",
    b"\x82\xa1b\xc0\xa1b\xc0": "'b' is there twice",
    b"\x81\x90\xc0": "a name that is no short text, but list",
    b"\x81\xda\x07\xd0" + b"n" * 2000 + b"\xc0": "a name that is no short text",
    b"\xa1\xff": "a text that is no UTF-8",
    b"\xc1": "byte 0xc1 begins no value",
    CHUNKED + b"\xc3\xa5shape\x81\xa10\x02\xa6chunks\x81\xa11" + GOOD: "chunks that are missing",
    CHUNKED + b"\xc3\xa5shape\x81\xa10\x05\xa6chunks\x81\xa10" + GOOD: r"of shape \(5,\)",
    CHUNKED + b"\xc3\xa5shape\x81\xa10\xc0\xa6chunks\x81\xa10" + GOOD: "sizes that are none",
    CHUNKED + b"\xc3\xa5shape\xc0\xa6chunks\x80": "without a shape or chunks",
    b"\xc0\xc0": r"no map of msgpack, or more than one \(1 bytes follow\)",
}


def test_a_file_that_is_no_checkpoint_is_one_line(tmp_path):
    path = tmp_path / "checkpoint_1"
    for value, message in VALUES.items():
        path.write_bytes(b"\x81\xa1a" + value)
        refused_cheaply(path, message)
    written(path, {"a": {"b": np.ones(2)}, "a/b": np.ones(2)})
    refused_cheaply(path, "two arrays have the name 'a/b'")


def test_mutated_files_are_one_line(tmp_path):
    good = serialization.msgpack_serialize(TREE)
    path = tmp_path / "checkpoint_1"
    for seed in range(25):
        path.write_bytes(mutated(good, np.random.default_rng(seed)))
        try:
            for found in msgpack_files.read(path).values():
                assert np.asarray(found).shape == found.shape
        except InputError as error:
            assert "\n" not in str(error)
    for end in range(0, len(good), 301):
        path.write_bytes(good[:end])
        with pytest.raises(InputError, match="cut short"):
            msgpack_files.read(path)


# Archives.


@pytest.fixture
def scratch(tmp_path, monkeypatch):
    """The folder of temporary files, which is empty at the end."""
    folder = tmp_path / "scratch"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    yield folder
    assert os.listdir(folder) == [] and sorted(os.listdir(tmp_path)) == ["a.zip", "scratch"]


def entry(name: str, mode: int = stat.S_IFREG | 0o644, method: int = zipfile.ZIP_DEFLATED):
    info = zipfile.ZipInfo(name)
    info.external_attr, info.compress_type = mode << 16, method
    return info


def archive(folder, *entries, data: bytes = b"x" * 1000):
    with zipfile.ZipFile(folder / "a.zip", "w") as file:
        for info in entries:
            file.writestr(info, data)
    return folder / "a.zip"


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize(("entries", "message"), [
    ([entry("../a")], "its file '../a' leads out of the archive"),
    ([entry("a/../../b")], "leads out of the archive"),
    ([entry("/a")], "its file '/a' leads out of the archive"),
    ([entry("a\\b")], "leads out of the archive"),
    ([entry("link", stat.S_IFLNK | 0o777)], "its file 'link' is no regular file"),
    ([entry("a"), entry("a")], "it has two files of one name"),
    ([entry("a"), entry("a/b")], "it cannot be unpacked"),
    ([entry("n" * 300)], "it cannot be unpacked"),
    ([entry("a", method=zipfile.ZIP_BZIP2)], "has a compression that is not known"),
    ([entry("a")] * 0, "it holds no checkpoint of Orbax or Flax"),
    ([entry("checkpoint_1")], "checkpoint_1: it is no checkpoint of Flax"),
])  # fmt: skip
def test_an_archive_that_leads_elsewhere_is_one_line(scratch, entries, message):
    refused_cheaply(archive(scratch.parent, *entries), f"a.zip: .*{message}")


def test_a_damaged_archive_is_one_line(scratch, monkeypatch):
    path = archive(scratch.parent, entry("checkpoint_1", method=zipfile.ZIP_STORED))
    good = path.read_bytes()
    path.write_bytes(good.replace(b"xxx", b"xyx", 1))
    refused_cheaply(path, "it cannot be unpacked; .*Bad CRC-32")
    path.write_bytes(good[: len(good) // 2])
    refused_cheaply(path, "it cannot be unpacked; .*BadZipFile")
    header = good.index(b"PK\1\2")
    path.write_bytes(good[: header + 8] + b"\1" + good[header + 9 :])
    refused_cheaply(path, "its file 'checkpoint_1' is encrypted")
    path.write_bytes(good[: header + 20] + struct.pack("<II", 900, 900) + good[header + 28 :])
    refused_cheaply(path, "it cannot be unpacked")
    path.write_bytes(good)
    monkeypatch.setattr(zip_archives.shutil, "disk_usage",
                        lambda folder: types.SimpleNamespace(free=999))
    refused_cheaply(path, "its files have 1000 bytes, and .*scratch has room for 999; set TMPDIR")


def test_an_archive_that_claims_much_is_not_unpacked(scratch, monkeypatch):
    monkeypatch.setattr(zip_archives, "FREE_BYTES", 2**10)
    path = archive(scratch.parent, entry("checkpoint_1"), data=bytes(2**20))
    refused_cheaply(path, r"its files claim 1048576 bytes, and it has \d+")
    monkeypatch.setattr(zip_archives, "MAX_ENTRIES", 1)
    refused_cheaply(archive(scratch.parent, entry("a"), entry("b")), "it has 2 files; at most 1")


def state(step: int) -> dict:
    """A train state with the tensors that tell a network of MeanFlow, whose average is `step`."""
    names = next(n for n in namings.NAMINGS if n.name == "meanflow").identifying_tensors
    average = unflatten_dict({name: np.full((2, 3), step, "f") for name in names}, sep="/")
    wrong = unflatten_dict({name: np.zeros(2, "f") for name in names}, sep="/")
    return {"step": step, "params": wrong, "ema_params": average, "opt_state": {"0": {"mu": wrong}}}


def assert_last(source, step: int, note: str) -> None:
    opened = open_checkpoint(str(source))
    assert opened.note == f"{note}part 'ema_params', its EMA parameters"
    assert len(opened.tensors) == 2
    for tensor in opened.tensors.values():
        np.testing.assert_array_equal(np.asarray(tensor), np.full((2, 3), step))


def test_of_several_averages_one_is_named(tmp_path):
    """As in the train states of pixel MeanFlow."""
    averages = {"500": state(500)["ema_params"], "1000": state(1000)["ema_params"]}
    path = written(tmp_path / "checkpoint_1", {**state(1), "ema_params": averages})
    with pytest.raises(InputError, match="give one of --key=ema_params/1000, --key=ema_params/500"):
        open_checkpoint(path)
    (tensor, _) = open_checkpoint(path, "ema_params/500").tensors.values()
    assert np.asarray(tensor)[0, 0] == 500


def test_the_last_step_of_an_archive_is_taken_and_said(scratch):
    with zipfile.ZipFile(scratch.parent / "a.zip", "w", zipfile.ZIP_DEFLATED) as file:
        for step in (20, 3):
            data = serialization.msgpack_serialize(state(step))
            file.writestr(f"run/checkpoint_{step}", data)
        file.mkdir("run/other")
    assert_last(scratch.parent / "a.zip", 20, "file run/checkpoint_20; ")


def test_directories_that_flax_wrote(tmp_path):
    """By itself; through Orbax, as later versions do, also packed; through its earlier versions,
    which put all arrays into one file."""
    for step in (9, 10):
        written(tmp_path / f"checkpoint_{step}", state(step))
    assert_last(tmp_path, 10, f"file {tmp_path.name}/checkpoint_10; ")
    ocp.PyTreeCheckpointer().save(tmp_path / "runs/checkpoint_8", state(8))
    assert_last(tmp_path / "runs", 8, "file runs/checkpoint_8; ")
    packed = shutil.make_archive(str(tmp_path / "packed"), "zip", tmp_path / "runs")
    assert_last(packed, 8, "file checkpoint_8; ")
    written(tmp_path / "runs/checkpoint_8/checkpoint", state(11))
    assert_last(tmp_path / "runs", 11, "file checkpoint_8/checkpoint; ")
    written(tmp_path / "runs/checkpoint_8/checkpoint", {"a": "PLACEHOLDER://a"})
    assert_last(tmp_path / "runs", 8, "file runs/checkpoint_8; ")
    (tmp_path / "old/checkpoint_5").mkdir(parents=True)
    written(tmp_path / "old/checkpoint_5/checkpoint", state(5))
    assert_last(tmp_path / "old", 5, "file checkpoint_5/checkpoint; ")
