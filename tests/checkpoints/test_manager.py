"""What is on disk restores with Orbax alone, appears only when whole, and says what is wrong."""

import errno
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
import small_network
import tiny

from dmf.checkpoints import load
from dmf.checkpoints import params as stored_params
from dmf.checkpoints.manager import CheckpointManager
from dmf.checkpoints.params import restore_params
from dmf.errors import InputError, RunError
from dmf.runtime import checksums
from dmf.runtime.checksums import fingerprint
from dmf.runtime.files import new_directory
from dmf.runtime.sharding import make_mesh, state_shardings, with_shardings
from dmf.training.train_state import TrainState

PARAMS = {"a": {"kernel": jnp.arange(6.0).reshape(2, 3)}, "b": jnp.ones(4)}


def state(step: int = 0) -> TrainState:
    scaled = jax.tree.map(lambda x: x * (step + 1), PARAMS)
    emas = {"main": jax.tree.map(lambda x: -x, scaled), "slow": scaled}
    return TrainState(jnp.int32(step), scaled, {"moment": jnp.full(3, step)}, emas)


def abstract(tree):
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree
    )


def same(a, b) -> None:
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.fixture
def saved(tmp_path):
    """A directory with the checkpoints of steps 3 and 5."""
    with CheckpointManager(tmp_path, keep_last=2) as checkpoints:
        for step in (3, 5):
            checkpoints.save(step, state(step).trees, {"step": step, "rows": 16 * step})
    return tmp_path


def test_a_state_comes_back_as_it_was(saved):
    with CheckpointManager(saved) as checkpoints:
        assert checkpoints.latest_step == 5
        step, trees = checkpoints.restore(abstract(state().trees))
    assert step == 5
    same(trees, state(5).trees)
    same(state().with_trees(jnp.int32(step), trees), state(5))


@pytest.mark.parametrize("before, after", [(8, 6), (5, 8), (8, 1)])
def test_a_state_is_restored_into_other_parts(tmp_path, before, after):
    """Eight devices hold four parts of the moment, each twice; six hold six, five hold five."""
    tree = {"moment": jnp.arange(36.0 * 130).reshape(36, 130)}
    old, new = (state_shardings(make_mesh(devices=jax.devices()[:n]), tree)
                for n in (before, after))  # fmt: skip
    with CheckpointManager(tmp_path) as checkpoints:
        checkpoints.save(1, {"opt_state": jax.device_put(tree, old)}, {})
        checkpoints.finish()
        _, trees = checkpoints.restore({"opt_state": with_shardings(tree, new)})
    same(trees["opt_state"], tree)
    assert trees["opt_state"]["moment"].sharding == new["moment"]


def test_every_item_restores_with_orbax_alone(saved):
    folder = saved / "checkpoints/5"
    with ocp.StandardCheckpointer() as reader:
        same(reader.restore(folder / "params"), state(5).params)
        same(reader.restore(folder / "ema_params_slow"), state(5).ema_params["slow"])
    position = json.loads((folder / "position/metadata").read_text())
    assert position == {"format": 2, "step": 5, "rows": 80}


COMPILED = "/jax/core/compile/backend_compile_duration"


@pytest.mark.parametrize(("values", "programs"), [(1024, 0), (8 * 2**18, len(jax.devices()))])
def test_only_large_arrays_are_cut_to_be_saved(tmp_path, values, programs):
    everywhere = jax.sharding.NamedSharding(jax.make_mesh((8,), ("data",)), jax.P())
    small = jax.device_put(jnp.ones(8), everywhere)
    params = {"kernel": jax.device_put(jnp.arange(float(values)), everywhere)}
    now = TrainState(small, params, {"moment": small}, {})
    for tree in (now.params, now.opt_state):
        checksums.checksums(tree)
    compiled = []
    listen = lambda event, seconds, **_: compiled.append(event)  # noqa: E731
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        with CheckpointManager(tmp_path) as checkpoints:
            checkpoints.save(1, now.trees, {})
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    assert compiled.count(COMPILED) == programs
    same(restore_params(tmp_path, abstract(params)), params)


@pytest.mark.parametrize(("ema", "expected"), [
    ("", state(5).params), ("main", state(5).ema_params["main"]),
])
def test_parameters_of_a_run_are_those_of_its_newest_checkpoint(saved, ema, expected):
    same(restore_params(saved, abstract(PARAMS), ema=ema), expected)


def test_parameters_that_were_saved_at_another_step_are_refused(saved):
    """Every file of them is whole; beside them a save was interrupted."""
    for left in ("7.orbax-checkpoint-tmp", "7²"):
        (saved / "checkpoints" / left).mkdir()
    shutil.rmtree(saved / "checkpoints/5/params")
    shutil.copytree(saved / "checkpoints/3/params", saved / "checkpoints/5/params")
    with pytest.raises(RunError, match="damaged .*differs from the saved array.*try checkpoints/3"):
        restore_params(saved, abstract(PARAMS))


@pytest.mark.parametrize(
    ("wanted", "named"),
    [
        ({"a": PARAMS["a"]}, "it has b, which config.model does not"),
        ({**PARAMS, "c": jnp.ones(2)}, "it lacks c"),
        ({**PARAMS, "b": jnp.ones(7)}, r"b has shape \(4,\) in the checkpoint and \(7,\)"),
    ],
)
def test_another_architecture_is_refused(saved, wanted, named):
    with pytest.raises(InputError, match=f"it has another architecture, {named}"):
        restore_params(saved, abstract(wanted))


def test_names_that_may_be_missing_or_in_vain(saved):
    wanted = {"a": PARAMS["a"], "c": jnp.ones(2)}
    found = restore_params(saved, abstract(wanted), allow_missing=("c",), allow_unexpected=("b",))
    same(found, {"a": state(5).params["a"]})


def test_of_what_is_below_a_name_some_may_be_missing(saved):
    wanted = {**PARAMS, "a": {**PARAMS["a"], "norm": {"scale": jnp.ones(2)}}}
    found = restore_params(saved, abstract(wanted), allow_missing=("a/norm",))
    same(found, state(5).params)
    for others in ((), ("a/nor",), ("a/norm/scale/0",), ("norm",)):
        with pytest.raises(InputError, match="it lacks a/norm/scale"):
            restore_params(saved, abstract(wanted), allow_missing=others)


def test_ema_params_that_are_not_there_are_refused(saved):
    with pytest.raises(InputError, match=r"ema=fast.*main, slow"):
        restore_params(saved, abstract(PARAMS), ema="fast")


def test_a_directory_without_a_checkpoint_is_refused(tmp_path):
    with pytest.raises(InputError, match="no checkpoint"):
        restore_params(tmp_path, abstract(PARAMS))
    with pytest.raises(InputError, match=r"holds no config\.json"):
        stored_params.read_config(tmp_path)


def test_a_later_format_is_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"format": 99}')
    with pytest.raises(InputError, match="format is 99.*reads 2"):
        stored_params.read_config(tmp_path)


def test_an_export_restores_with_orbax_alone(tmp_path):
    assert tiny.dmf("export", f"--checkpoint={tiny.flow_run()}", f"--output={tmp_path}/out") == 0
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "README.md", "checksums.json", "config.json", "params"
    ]
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    with ocp.StandardCheckpointer() as reader:
        exported = reader.restore(tmp_path / "out/params")
        average = reader.restore(tiny.flow_run() / "checkpoints/8/ema_params_main")
    same(exported, average)
    card = (tmp_path / "out/README.md").read_text()
    count = sum(leaf.size for leaf in jax.tree.leaves(exported))
    assert f"{count:,}" in card
    assert "8 steps of 16" in card


def test_an_export_is_a_checkpoint(tmp_path, small_network_registered):
    tiny.dmf("export", f"--checkpoint={small_network.flow_map_run()}", f"--output={tmp_path}/out")
    _, config, params = load.load_network(tmp_path / "out", "main")
    _, run_config, average = load.load_network(small_network.flow_map_run(), "main")
    same(params, average)
    expected = load.config_to_json(run_config)
    assert expected["init"]["checkpoint"] == str(small_network.run())
    expected["init"]["checkpoint"] = ""
    assert load.config_to_json(config) == expected
    moved = shutil.move(tmp_path / "out", tmp_path / "elsewhere")
    same(load.load_network(moved, "main")[2], average)


def test_an_export_does_not_write_over_anything(tmp_path):
    (tmp_path / "note").write_text("mine")
    with pytest.raises(InputError, match="exists and is not empty; choose another"):
        with new_directory(tmp_path):
            raise AssertionError("it was given something to write into")
    assert [p.name for p in tmp_path.iterdir()] == ["note"]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_a_full_disk_says_so_and_leaves_nothing_half_made(tmp_path, monkeypatch, number):
    def full(*arguments, **options):
        raise OSError(number, "it is full")

    monkeypatch.setattr(stored_params, "write_json", full)
    with pytest.raises(RunError, match="no space left to write .*free some space"):
        with new_directory(tmp_path / "out") as folder:
            stored_params.write_params(folder, PARAMS)
            stored_params.write_config_and_card(folder, {}, "card", origin="")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("ema", ["", "main", "slow"])
def test_a_checkpoint_by_its_step_has_ema_params_too(saved, ema):
    restored = restore_params(saved / "checkpoints/3", abstract(PARAMS), ema=ema)
    same(restored, state(3).ema_params[ema] if ema else state(3).params)


def test_a_full_disk_keeps_the_checkpoints_before(saved, monkeypatch):
    with CheckpointManager(saved, keep_last=5) as checkpoints:
        def full(*arguments, **options):
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(checkpoints._manager, "save", full)
        with pytest.raises(RunError, match="no space left.*finished before are complete"):
            checkpoints.save(7, state(7).trees, {"step": 7})
    assert stored_params.latest_step(saved) == 5
    same(restore_params(saved, abstract(PARAMS)), state(5).params)


def test_a_fingerprint_tells_any_arrays_from_others():
    for dtype in ("float32", "float64", "bfloat16", "bool"):
        ones = {"a": np.ones((2, 3), jnp.dtype(dtype)), "b": np.ones((), jnp.dtype(dtype))}
        other = {**ones, "b": np.zeros((), jnp.dtype(dtype))}
        assert fingerprint(ones) == fingerprint(jax.tree.map(np.copy, ones)) != fingerprint(other)
