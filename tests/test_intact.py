"""What is on disk and not what was saved is never taken for it; the checkpoint before is."""

import json
import pathlib
import random
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from dmf import intact, loading
from dmf.checkpoint import latest_step
from dmf.sharding import make_mesh, parameter_shardings
from dmf.training import train
from dmf.typing import Damaged, RunError

STEPS = {"run.steps": 8, "run.checkpoint_every": 4, "run.sample_every": 0}


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> tuple[pathlib.Path, object]:
    """A run with the checkpoints of steps 4 and 8, and its last parameters."""
    workdir = tmp_path_factory.mktemp("run")
    return workdir, jax.device_get(train(tiny.config(STEPS), workdir).params)


def test_a_checksum_is_the_same_on_any_mesh():
    tree = {"blocks": {"a": np.arange(4096 * 8, dtype="f4").reshape(4, 512, 16)}, "b": np.ones(3)}
    wanted = intact.checksums(tree)
    for sizes in ((8, 1, 1), (1, 8, 1), (2, 2, 2)):
        where = parameter_shardings(make_mesh(*sizes), tree)
        assert intact.checksums(jax.device_put(tree, where)) == wanted


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int32", "uint8", "bool"])
def test_a_checksum_depends_on_every_bit_and_its_place(dtype):
    x = np.arange(24).reshape(4, 6).astype(jnp.dtype(dtype))
    (wanted,) = intact.checksums([x]).values()
    seen = {wanted}
    for byte in range(x.nbytes):
        for bit in range(1 if dtype == "bool" else 8):
            raw = bytearray(x.tobytes())
            raw[byte] ^= 1 << bit
            (found,) = intact.checksums([np.frombuffer(raw, x.dtype).reshape(4, 6)]).values()
            assert found != wanted
            seen.add(found)
    assert intact.checksums([x[::-1]])["0"] not in seen
    assert intact.checksums([np.zeros((2, 3), "f")]) != intact.checksums([np.zeros((3, 3), "f")])


def test_what_is_missing_or_too_much_is_named():
    with pytest.raises(Damaged, match="b is missing"):
        intact.check({"a": 1}, {"a": 1, "b": 2})
    with pytest.raises(Damaged, match="b is not of what was saved"):
        intact.check({"a": 1, "b": 2}, {"a": 1})


def flip(path: pathlib.Path, draw: random.Random) -> None:
    raw = bytearray(path.read_bytes())
    for _ in range(8):
        raw[draw.randrange(len(raw))] ^= 1 << draw.randrange(8)
    path.write_bytes(raw)


def truncate(path: pathlib.Path, draw: random.Random) -> None:
    path.write_bytes(path.read_bytes()[: draw.randrange(path.stat().st_size)])


DAMAGES = {"flip": flip, "truncate": truncate, "remove": lambda path, draw: path.unlink()}


@pytest.mark.parametrize("how", DAMAGES)
def test_a_run_takes_the_checkpoint_before_a_damaged_one(run, tmp_path, how, capsys):
    workdir, wanted = run
    shutil.copytree(workdir, tmp_path / "run")
    newest = tmp_path / "run/checkpoints/8"
    for path in [*(newest / "params").rglob("d/*")]:
        DAMAGES[how](path, random.Random(0))
    loading.load_network(tmp_path / "run", "main")
    with pytest.raises(RunError, match=r"damaged .*; try checkpoints/4$"):
        loading.load_network(tmp_path / "run", "")
    state = train(tiny.config(STEPS), tmp_path / "run")
    assert "the checkpoint of step 8 is damaged" in capsys.readouterr().err
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(state.params), wanted)
    assert latest_step(tmp_path / "run") == 8
    assert [p.name for p in (tmp_path / "run/damaged").iterdir()] == ["8"]


@pytest.mark.parametrize(("gone", "ema"), [
    ("average_main", "main"), ("params", ""), ("average_main/_METADATA", "main"),
])  # fmt: skip
def test_what_is_missing_is_damage_and_no_wrong_name(run, tmp_path, gone, ema):
    shutil.copytree(run[0], tmp_path / "run")
    lost = tmp_path / "run/checkpoints/8" / gone
    shutil.rmtree(lost) if lost.is_dir() else lost.unlink()
    with pytest.raises(RunError, match=r"it is damaged .(the list|\w+ is missing).*checkpoints/4$"):
        loading.load_network(tmp_path / "run", ema)
    assert isinstance(loading.load_network(tmp_path / "run/checkpoints/4", ema)[2], dict)


def test_where_all_are_damaged_the_run_ends_and_the_last_stays(run, tmp_path):
    shutil.copytree(run[0], tmp_path / "run")
    for path in (tmp_path / "run/checkpoints").glob("*/checksums/metadata"):
        stored = json.loads(path.read_text())
        stored["params"]["final/linear/bias"] ^= 1
        path.write_text(json.dumps(stored))
    with pytest.raises(RunError, match="4: it is damaged .final/linear/bias is not what was saved"):
        train(tiny.config(STEPS), tmp_path / "run")
    assert latest_step(tmp_path / "run") == 4


def test_a_damaged_export_is_refused(run, tmp_path):
    assert tiny.dmf("export", f"--checkpoint={run[0]}", f"--output={tmp_path}/out") == 0
    loading.load_network(tmp_path / "out", "main")
    for path in [*(tmp_path / "out").rglob("d/*")]:
        flip(path, random.Random(1))
    with pytest.raises(RunError, match="out: it is damaged .*make it again"):
        loading.load_network(tmp_path / "out", "main")


def test_a_config_that_was_cut_short_is_told(run, tmp_path):
    shutil.copytree(run[0], tmp_path / "run")
    config = tmp_path / "run/config.json"
    config.write_text(config.read_text()[:100])
    for call in (lambda: train(tiny.config(STEPS), tmp_path / "run"),
                 lambda: loading.load_network(tmp_path / "run", "main")):
        with pytest.raises(RunError, match="config.json: it is damaged"):
            call()
