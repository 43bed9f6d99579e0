"""Power EMAs of any width, synthesised from snapshots of two, against their definition."""

import itertools
import json
import re
import shutil
import types

import jax
import numpy as np
import pytest
import small_network
import tiny
from etils import epath
from orbax.checkpoint.checkpoint_managers import PreservationContext

from dmf.checkpoints import load, power_ema
from dmf.checkpoints.manager import CheckpointManager, SnapshotManager, _ThinOut
from dmf.checkpoints.params import FORMAT
from dmf.checkpoints.power_ema import Profile, exponent, inner_product, weights
from dmf.errors import InputError, RunError
from dmf.training.loop import train

STDS = {"narrow": 0.05, "wide": 0.1}
EMAS = {name: {"name": "power", "std": std} for name, std in STDS.items()}


def exact_mean(values: np.ndarray, std: float) -> np.ndarray:
    """The power-function average of the values of steps 1, 2, ..., by its definition."""
    powers = np.arange(len(values) + 1) ** (exponent(std) + 1)
    return np.tensordot(np.diff(powers / powers[-1]), values, axes=1)


@pytest.mark.parametrize("std", [0.01, 0.05, 0.1, 0.2, 0.288675, 0.2899])
def test_the_width_is_the_standard_deviation_of_the_profile(std):
    gamma, middles = exponent(std), (np.arange(40_000) + 0.5) / 40_000
    density = (gamma + 1) * middles**gamma / 40_000
    mean = density @ middles
    assert np.sqrt(density @ (middles - mean) ** 2) == pytest.approx(std, rel=1e-3)
    assert std == pytest.approx((gamma + 1) ** 0.5 / ((gamma + 2) * (gamma + 3) ** 0.5))


@pytest.mark.parametrize(("a", "b"), [
    ((3, 2.0), (5, 0.5)), ((5, 0.5), (3, 2.0)), ((4, 1.5), (4, 7)), ((9, -0.02), (2, 6.0)),
])
def test_the_inner_product_is_the_integral(a, b):
    tau = (np.arange(100_000) + 0.5) / 100_000 * 9
    profiles = [np.where(tau <= t, (g + 1) * tau**g / t ** (g + 1), 0.0) for t, g in (a, b)]
    integral = profiles[0] @ profiles[1] * 9 / 100_000
    assert float(inner_product(Profile(*a), Profile(*b))) == pytest.approx(integral, rel=1e-4)


@pytest.mark.parametrize("std", [0.04, 0.07, 0.15, 0.2])
def test_a_width_is_closer_the_more_snapshots_there_are(std):
    errors = []
    for count in (4, 8, 16, 32):
        stored = [Profile(64 * (i + 1) / count, exponent(s)) for i in range(count)
                  for s in STDS.values()]
        found, error = weights(stored, Profile(64, exponent(std)))
        assert found.sum() == pytest.approx(1, abs=1e-9)
        errors.append(error)
    assert all(later < 0.6 * earlier for earlier, later in itertools.pairwise(errors))
    assert errors[-1] < 0.01


STEPS, EVERY = 32, 4


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> tuple[epath.Path, np.ndarray]:
    """A run of 32 steps with snapshots at every fourth, and its parameters after each step."""
    folder = epath.Path(tmp_path_factory.mktemp("power"))
    values = np.random.default_rng(0).normal(size=(STEPS, 3, 5)).cumsum(0).astype(np.float32)
    values[:, 0, 0] = 7.0  # a parameter that does not change

    def trees(step: int) -> dict:
        return {f"ema_params_{name}": {"w": np.float32(exact_mean(values[:step], std))}
                for name, std in STDS.items()}

    (folder / "config.json").write_text(json.dumps({"format": FORMAT, "emas": EMAS}))
    with SnapshotManager(folder, every=EVERY, keep=16) as snapshots:
        for step in range(EVERY, STEPS, EVERY):
            snapshots.save(step, trees(step), {"step": step})
    with CheckpointManager(folder) as checkpoints:
        checkpoints.save(STEPS, {"params": {"w": values[-1]}, **trees(STEPS)}, {"step": STEPS})
    return folder, values


def synthesised(folder: epath.Path, std: float) -> np.ndarray:
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    abstract = {"w": jax.ShapeDtypeStruct((3, 5), np.float32, sharding=sharding)}
    return np.asarray(power_ema.synthesise(folder, abstract, std)["w"])


def test_a_synthesised_average_is_the_exact_one_of_that_width(run, tmp_path, capfd):
    folder, values = run
    np.testing.assert_array_equal(
        synthesised(folder, 0.1), np.float32(exact_mean(values, 0.1)), "a width that was kept"
    )
    fewer = tmp_path / "fewer"
    shutil.copytree(folder, fewer)
    for step in range(EVERY, STEPS, 2 * EVERY):
        shutil.rmtree(fewer / "ema_snapshots" / str(step))
    for std in (0.07, 0.15):
        exact = exact_mean(values, std)
        many, few = (np.abs(synthesised(epath.Path(place), std) - exact).max()
                     for place in (folder, fewer))
        assert many < 0.03 * values.std()
        assert many < few / 1.5
    assert synthesised(folder, 0.15)[0, 0] == pytest.approx(7.0, abs=1e-5)
    told = capfd.readouterr().err
    assert "EMA of std=0.15 at step 32: from 2 power EMAs at 8 steps, its weights are 3.3%" in told


def test_only_averages_of_earlier_steps_belong_to_a_checkpoint(run):
    folder, _ = run
    stored, step = power_ema.stored_averages(folder / "checkpoints/32", 0.1)
    assert step == 32
    assert [average.item.parent.parent.name for average in stored[-4:]] == [
        "ema_snapshots", "ema_snapshots", "checkpoints", "checkpoints"]
    assert len(stored) == 16


def test_what_no_width_can_be_made_of_is_said(run, tmp_path):
    folder, _ = run
    alone = tmp_path / "alone"
    shutil.copytree(folder, alone)
    shutil.rmtree(alone / "ema_snapshots/28")
    with pytest.raises(InputError, match=r"^ema=std=0.01: from 2 power EMAs at 7 steps, its "
                       r"weights are \d+.\d% off; choose a width nearer"):
        synthesised(epath.Path(alone), 0.01)
    next((alone / "ema_snapshots/24").rglob("d/*")).write_bytes(b"")
    with pytest.raises(RunError, match=r"snapshots/24: it is damaged .*; remove it to do without"):
        synthesised(epath.Path(alone), 0.15)
    (alone / "config.json").write_text(json.dumps({"format": FORMAT, "emas": {"main": {}}}))
    with pytest.raises(InputError, match=r"^ema=std=0.1: .* without power EMAs; train with"):
        synthesised(epath.Path(alone), 0.1)
    shutil.rmtree(alone / "checkpoints")
    with pytest.raises(InputError, match=r"^ema=std=0.1: .* is no run with a checkpoint, and "):
        synthesised(epath.Path(alone), 0.1)


@pytest.mark.parametrize("std", ["0.3", "0", "-0.1", "nan", "wide", ""])
def test_a_width_out_of_range_is_refused(std):
    with pytest.raises(InputError, match=rf"^ema.std={re.escape(std)}.*: (the width of|give a)"):
        power_ema.requested_std(f"std={std}")


def test_snapshots_are_thinned_out_and_never_more_than_the_maximum():
    policy, kept = _ThinOut(every=3, keep=6), []
    for step in range(1, 400):
        if step % policy.interval(step) == 0:
            kept.append(step)
            saved = [types.SimpleNamespace(step=step) for step in kept]
            preserved = policy.should_preserve(saved, context=PreservationContext())
            kept = [s.step for s, keep in zip(saved, preserved, strict=True) if keep]
        assert len(kept) <= 6
        assert len(kept) >= min(3, step // 3)
    assert kept == [96, 192, 288, 384]


@pytest.mark.slow
def test_a_run_keeps_its_snapshots_when_it_resumes(tmp_path, capfd):
    fields = {"run.checkpoint_every": 1, "run.keep_last": 12, "run.snapshot_every": 1,
              "run.keep_snapshots": 8, "run.log_every": 12}
    fields |= {"sampling.ema": "wide", "evaluation.emas": ("wide",)}
    with small_network.registered():
        config = small_network.config(fields | {"run.steps": 6}, emas=EMAS)
        train(config, tmp_path)
        assert sorted(p.name for p in (tmp_path / "ema_snapshots").iterdir()) == list("123456")
        shutil.rmtree(tmp_path / "ema_snapshots/6")  # as if killed before it was complete
        config.run.steps = 12
        train(config, tmp_path)
        names = sorted((p.name for p in (tmp_path / "ema_snapshots").iterdir()), key=int)
        assert names == ["2", "4", "6", "8", "10", "12"]
        raw = np.array([load.load_network(tmp_path / f"checkpoints/{step}", "")[2]["out"]
                        for step in range(1, 13)])
        for ema, std, rtol in (
            ("wide", 0.1, 1e-5), ("std=0.1", 0.1, 1e-5), ("std=0.15", 0.15, 2e-2)
        ):
            found = np.asarray(load.load_network(tmp_path, ema)[2]["out"])
            exact = exact_mean(raw.astype(np.float64), std)
            assert np.abs(found - exact).max() < rtol * np.abs(raw - exact).max() + 5e-7, ema
        capfd.readouterr()
        evaluate = ("evaluate", f"--checkpoint={tmp_path}", "--steps=1", "--count=72")
        assert tiny.dmf(*evaluate, "--ema=std=0.15,wide") == 0
        rows = json.loads((tmp_path / "evaluation.json").read_text())["results"]
        assert [row["ema"] for row in rows] == ["std=0.15", "wide"]
        assert tiny.dmf(*evaluate, "--ema=wide,std=0.5") == 2
        arguments = ("export", f"--checkpoint={tmp_path}", f"--output={tmp_path}/export")
        assert tiny.dmf(*arguments, "--ema=wide", "--ema-std=0.1") == 2
        assert "--ema-std=0.1: give it or --ema, not both" in capfd.readouterr().err
        assert tiny.dmf(*arguments, "--ema-std=0.15") == 0
        exported = load.load_network(tmp_path / "export")[2]["out"]
        np.testing.assert_array_equal(exported, found)
        card = (tmp_path / "export/README.md").read_text()
        assert "12 steps of 16, EMA of std=0.15 |" in card
        with pytest.raises(InputError, match="^ema=std=0.15: .*export is no run with a checkpoint"):
            load.load_network(tmp_path / "export", "std=0.15")
