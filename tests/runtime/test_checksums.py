"""Damaged checkpoints are never restored; the one before is."""

import json
import pathlib
import random
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_network
import tiny

from dmf.checkpoints import load
from dmf.checkpoints.params import latest_step
from dmf.errors import Damaged, RunError
from dmf.runtime import checksums
from dmf.runtime.sharding import make_mesh, parameter_shardings
from dmf.training.loop import train

pytestmark = pytest.mark.usefixtures("small_network_registered")

STEPS = {"run.steps": 8, "run.checkpoint_every": 4, "run.sample_every": 0}


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> tuple[pathlib.Path, object]:
    """The workdir of a run with checkpoints of steps 4 and 8, and its last parameters."""
    workdir = tmp_path_factory.mktemp("run")
    return workdir, jax.device_get(train(small_network.config(STEPS), workdir).params)


def test_a_checksum_is_the_same_on_any_mesh():
    """Also where eight devices split an array into four parts."""
    a = np.arange(4 * 508 * 16, dtype="f4").reshape(4, 508, 16)
    tree = {"blocks": {"a": a}, "b": np.ones(3)}
    expected = checksums.checksums(tree)
    for sizes in ((8, 1, 1), (1, 8, 1), (2, 2, 2)):
        shardings = parameter_shardings(make_mesh(*sizes), tree)
        assert checksums.checksums(jax.device_put(tree, shardings)) == expected


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int32", "uint8", "bool"])
def test_a_checksum_depends_on_every_bit_and_its_place(dtype):
    x = np.arange(24).reshape(4, 6).astype(jnp.dtype(dtype))
    (original,) = checksums.checksums([x]).values()
    different = {original}
    for byte in range(x.nbytes):
        for bit in range(1 if dtype == "bool" else 8):
            raw = bytearray(x.tobytes())
            raw[byte] ^= 1 << bit
            changed = np.frombuffer(raw, x.dtype).reshape(4, 6)
            (checksum,) = checksums.checksums([changed]).values()
            assert checksum != original
            different.add(checksum)
    assert checksums.checksums([x[::-1]])["0"] not in different
    small, large = (checksums.checksums([np.zeros((n, 3), "f")]) for n in (2, 3))
    assert small != large


def test_arrays_that_are_missing_or_unexpected_are_named():
    with pytest.raises(Damaged, match="b is missing"):
        checksums.check_checksums({"a": 1}, {"a": 1, "b": 2})
    with pytest.raises(Damaged, match="b is not one of the saved arrays"):
        checksums.check_checksums({"a": 1, "b": 2}, {"a": 1})


def flip(path: pathlib.Path, draw: random.Random) -> None:
    raw = bytearray(path.read_bytes())
    for _ in range(8):
        raw[draw.randrange(len(raw))] ^= 1 << draw.randrange(8)
    path.write_bytes(raw)


def truncate(path: pathlib.Path, draw: random.Random) -> None:
    path.write_bytes(path.read_bytes()[: draw.randrange(path.stat().st_size)])


DAMAGES = {"flip": flip, "truncate": truncate, "remove": lambda path, draw: path.unlink()}


@pytest.mark.parametrize("how", [
    "flip", *(pytest.param(how, marks=pytest.mark.slow) for how in ("truncate", "remove"))
])
def test_a_run_takes_the_checkpoint_before_a_damaged_one(run, tmp_path, how, capsys):
    workdir, params = run
    shutil.copytree(workdir, tmp_path / "run")
    newest = tmp_path / "run/checkpoints/8"
    for path in [*(newest / "params").rglob("d/*")]:
        DAMAGES[how](path, random.Random(0))
    load.load_network(tmp_path / "run", "main")
    with pytest.raises(RunError, match=r"damaged .*; try checkpoints/4$"):
        load.load_network(tmp_path / "run", "")
    state = train(small_network.config(STEPS), tmp_path / "run")
    assert "the checkpoint of step 8 is damaged" in capsys.readouterr().err
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(state.params), params)
    assert latest_step(tmp_path / "run") == 8
    assert [p.name for p in (tmp_path / "run/damaged").iterdir()] == ["8"]


def test_an_array_that_is_not_the_saved_one_is_damage(run, tmp_path, capsys):
    """Its files are whole, so that only the checksum tells."""
    workdir, params = run
    shutil.copytree(workdir, tmp_path / "run")
    file = tmp_path / "run/checkpoints/8/checksums/metadata"
    saved = json.loads(file.read_text())
    saved["opt_state"][min(saved["opt_state"])] ^= 1
    file.write_text(json.dumps(saved))
    state = train(small_network.config(STEPS), tmp_path / "run")
    assert "the checkpoint of step 8 is damaged" in capsys.readouterr().err
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(state.params), params)


@pytest.mark.parametrize(("missing", "ema"), [
    ("ema_params_main", "main"), ("params", ""), ("ema_params_main/_METADATA", "main"),
])  # fmt: skip
def test_a_missing_file_is_damage_and_no_wrong_name(run, tmp_path, missing, ema):
    shutil.copytree(run[0], tmp_path / "run")
    path = tmp_path / "run/checkpoints/8" / missing
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    with pytest.raises(RunError, match=r"it is damaged .(the list|\w+ is missing).*checkpoints/4$"):
        load.load_network(tmp_path / "run", ema)
    assert isinstance(load.load_network(tmp_path / "run/checkpoints/4", ema)[2], dict)


def test_if_all_checkpoints_are_damaged_the_run_ends_and_the_last_stays(run, tmp_path):
    shutil.copytree(run[0], tmp_path / "run")
    for path in (tmp_path / "run/checkpoints").glob("*/checksums/metadata"):
        stored = json.loads(path.read_text())
        stored["params"]["log_variance"] ^= 1
        path.write_text(json.dumps(stored))
    with pytest.raises(RunError, match="4: it is damaged .log_variance differs from the"):
        train(small_network.config(STEPS), tmp_path / "run")
    assert latest_step(tmp_path / "run") == 4


def test_a_damaged_export_is_refused(run, tmp_path):
    assert tiny.dmf("export", f"--checkpoint={run[0]}", f"--output={tmp_path}/out") == 0
    load.load_network(tmp_path / "out", "main")
    for path in [*(tmp_path / "out").rglob("d/*")]:
        flip(path, random.Random(1))
    with pytest.raises(RunError, match="out: it is damaged .*make it again"):
        load.load_network(tmp_path / "out", "main")


def test_a_truncated_config_is_named(run, tmp_path):
    shutil.copytree(run[0], tmp_path / "run")
    config = tmp_path / "run/config.json"
    config.write_text(config.read_text()[:100])
    for call in (lambda: train(small_network.config(STEPS), tmp_path / "run"),
                 lambda: load.load_network(tmp_path / "run", "main")):
        with pytest.raises(RunError, match="config.json: it is damaged"):
            call()
