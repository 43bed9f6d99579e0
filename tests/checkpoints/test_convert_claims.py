"""Checkpoints that claim more than they hold are refused before anything of that size is made."""

import functools
import json
import pathlib
import re

import golden_values as gv
import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax.traverse_util import unflatten_dict
from safetensors.numpy import save_file
from test_convert import OF_DMF_TINY, refused
from test_pytorch_files import code, storage, tensor, write_legacy, write_zip

from dmf.checkpoints import load
from dmf.checkpoints import params as stored_params
from dmf.checkpoints.convert.open_checkpoint import open_checkpoint
from dmf.checkpoints.convert.pytorch_storages import MAX_REPEATED_BYTES
from dmf.default_config import get_config
from dmf.errors import InputError, RunError


def state_dict(**tensors: bytes) -> bytes:
    """The operations that push a dict of tensors."""
    return b"}" + b"".join(code(name) + pushed + b"s" for name, pushed in tensors.items())


def peak_memory() -> int:
    """The largest resident memory of this process in bytes, since it was last reset."""
    status = pathlib.Path("/proc/self/status").read_text()
    return 1024 * int(re.search(r"VmHWM:\s+(\d+) kB", status)[1])


def refused_cheaply(source, message: str) -> None:
    """Opening it ends in one line, and takes little memory.

    `tracemalloc` cannot measure this: Python 3.11 may crash when it is stopped while threads of
    TensorStore allocate.
    """
    pathlib.Path("/proc/self/clear_refs").write_text("5")  # Resets the peak.
    before = peak_memory()
    with pytest.raises(InputError, match=message) as error:
        open_checkpoint(str(source))
    assert peak_memory() - before < 2**26
    assert str(source) in str(error.value) and "\n" not in str(error.value)


# PyTorch files.


@pytest.mark.parametrize("write", [write_zip, write_legacy])
def test_repeated_values_are_bounded_in_sum(tmp_path, write):
    """Each of these tensors is within the bound of one."""
    repeated = tensor((MAX_REPEATED_BYTES // 24, 6), (0, 1))
    path = write(tmp_path / "bomb.pt", state_dict(**{f"w{i}": repeated for i in range(200)}))
    refused_cheaply(path, r"its tensors claim 3355\d* bytes, and it has \d+")


def test_tensors_that_share_a_storage_are_read(tmp_path):
    """Tied weights, views and expanded views."""
    count = 2**20
    tensors = {f"tied{i}": tensor((count,), (1,), 0, storage(count=count)) for i in range(4)}
    tensors["row"] = tensor((8, 4), (0, 1), 2, storage(count=count))
    path = write_zip(tmp_path / "tied.pt", state_dict(**tensors),
                     {"0": np.arange(count, dtype="<f4").tobytes()})
    found = open_checkpoint(str(path)).tensors
    np.testing.assert_array_equal(found["tied3"], np.arange(count, dtype=np.float32))
    np.testing.assert_array_equal(found["row"], [[2, 3, 4, 5]] * 8)


# Directories of Orbax.

@functools.cache
def meanflow() -> dict:
    return unflatten_dict(gv.load("meanflow_tiny").below("params"), sep="/")


@pytest.fixture
def orbax_directory(tmp_path) -> pathlib.Path:
    """A checkpoint whose chunks are files by themselves."""
    ocp.PyTreeCheckpointer(use_ocdbt=False).save(tmp_path / "run", {"params": meanflow()})
    return tmp_path / "run"


def an_array(directory: pathlib.Path) -> pathlib.Path:
    """The folder of the last array."""
    return sorted(path.parent for path in directory.glob("*/.zarray"))[-1]


def claim(array: pathlib.Path, **fields) -> None:
    metadata = json.loads((array / ".zarray").read_text())
    (array / ".zarray").write_text(json.dumps({**metadata, **fields}))


@pytest.mark.parametrize("chunks", [[2**25, 2**25], [16, 16]])
def test_an_orbax_directory_that_claims_petabytes(orbax_directory, chunks):
    claim(an_array(orbax_directory), shape=[2**25, 2**25], chunks=chunks)
    refused_cheaply(orbax_directory, r"its arrays claim 45035\d* bytes, and its files hold \d+")


def test_chunks_that_are_not_stored_are_no_zeros(orbax_directory):
    array = an_array(orbax_directory)
    (chunk,) = (path for path in array.iterdir() if path.name != ".zarray")
    chunk.rename(orbax_directory / "elsewhere")
    refused_cheaply(orbax_directory, "it is damaged .*has 0 of 1 chunks")


def test_orbax_metadata_that_is_damaged(orbax_directory):
    claim(an_array(orbax_directory), shape=[-1])
    refused_cheaply(orbax_directory, "it is damaged")
    (orbax_directory / "_METADATA").write_text("{")
    refused_cheaply(orbax_directory, "it is damaged")


def test_an_export_that_claims_what_its_config_claims(tmp_path):
    """One array of four terabytes, of which nothing but the metadata is stored."""
    ocp.PyTreeCheckpointer(use_ocdbt=False).save(tmp_path / "params", {"a": np.zeros(3, "f")})
    claim(tmp_path / "params/a", shape=[2**40], chunks=[2**40])
    (tmp_path / "config.json").write_text('{"format": 2}')
    (tmp_path / "checksums.json").write_text('{"a": 0}')
    with pytest.raises(RunError, match="it is damaged .its arrays claim 4398046511104 bytes"):
        stored_params.restore_params(tmp_path, {"a": jax.ShapeDtypeStruct((2**40,), np.float32)})
    claim(tmp_path / "params/a", shape=[4], chunks=[1])
    with pytest.raises(RunError, match="it is damaged .its array 'a' has 1 of 4 chunks"):
        stored_params.restore_params(tmp_path, {"a": jax.ShapeDtypeStruct((4,), np.float32)})


# The config that a safetensors file states.


@pytest.mark.parametrize(("field", "value", "message"), [
    ("depth", 10**18, "model.depth=1000000000000000000: "),
    ("depth", 10**6, "depth=1000000: "),
    ("depth", 5, "depth=5: its tensors say 4"),
    ("width", 10**9, "width=1000000000: "),
    ("width", 64, "width=64: its tensors say 48"),
    ("input_size", 10**9, "input_size=1000000000: "),
    ("num_classes", 10**9, "num_classes=1000000000: "),
    ("num_classes", 11, "num_classes=11: its tensors say 10"),
    ("mlp_ratio", float("inf"), "model.mlp_ratio=inf: give a finite number"),
    ("mlp_ratio", "wide", ""),
    ("mlp_ratio", 3.0, "mlp_ratio=3.0: its tensors say 4.0"),
    ("heads", 10**18, "heads=1000000000000000000: "),
    ("alignment_depth", 10**18, "alignment_depth=1000000000000000000: "),
    ("split_depth", 10**18, "split_depth=1000000000000000000: "),
    ("block_times", "t" * 10**6, "block_times=ttt"),
    ("remat", "n" * 10**6, "remat=nnn"),
])  # fmt: skip
def test_a_stated_network_is_that_of_the_tensors(tmp_path, capsys, field, value, message):
    config = stated_config()
    stated = {**config, "format": 2, "model": {**config["model"], field: value}}
    path = tmp_path / "model.safetensors"
    tensors = gv.load("dmf_tiny").below("params")
    save_file(tensors, path, metadata={"dmf.config": json.dumps(stated)})
    line = refused(capsys, tmp_path, path)
    assert message in line and len(line) < 1000
    del tensors["pos_embed"]
    save_file(tensors, path, metadata={"dmf.config": json.dumps(stated)})
    assert message in refused(capsys, tmp_path, path)


@functools.cache
def stated_config() -> dict:
    """The config that the tiny flow map states of itself."""
    network = gv.decoupled("dmf_tiny")
    return load.export_config(network, {}, load.config_to_json(get_config()))


@pytest.mark.parametrize("text", ["[" * 10**5, '{"a":' * 10**5, '{"format": 1e999}', "{}}"])
def test_a_stated_config_that_is_none(tmp_path, capsys, text):
    path = tmp_path / "model.safetensors"
    save_file(gv.load("dmf_tiny").below("params"), path, metadata={"dmf.config": text})
    assert "model.safetensors: " in refused(capsys, tmp_path, path, *OF_DMF_TINY)
