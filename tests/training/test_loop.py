"""A run: the sharding of its state, the files it writes, and the checkpoints it starts from."""

import dataclasses
import json
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
import pytest
import small_network
import tiny
from etils import epath

from configs import default
from dmf.checkpoints import load
from dmf.checkpoints.params import FORMAT
from dmf.errors import InputError
from dmf.models.build import network as build_network
from dmf.models.in_context_dit import InContextDiT
from dmf.objectives import (
    DecoupledMeanFlow,
    FlowMatching,
    ImprovedMeanFlow,
    MeanFlow,
    SelfGuidance,
    Tangent,
    TeacherGuidance,
)
from dmf.objectives.objective import terms_of
from dmf.runtime import device_specs
from dmf.runtime.sharding import SMALLEST_SPLIT, batch_sharding, make_mesh
from dmf.training import (
    build,
    compile,
    initial_checkpoint,
    loop,
    metrics_writer,
    step_log,
)
from dmf.training.train_step import compiled_train_step, create_train_state

MESHES = {"1": (1, 1, 1), "8": (8, 1, 1), "2x2x2": (2, 2, 2)}
AFTER_EACH_STEP = {"run.log_every": 1, "run.checkpoint_every": 0, "run.steps": 20}


class Sizes(NamedTuple):
    """Numbers of values of a leaf."""

    whole: int
    on_a_device: int


def mesh_of(shape: tuple[int, int, int]) -> jax.sharding.Mesh:
    return make_mesh(*shape, devices=jax.devices()[: int(np.prod(shape))])


def metrics(workdir) -> list[dict[str, float]]:
    return metrics_writer.read_metrics(epath.Path(workdir))


def losses(workdir) -> list[float]:
    return [row["loss"] for row in metrics(workdir)]


@pytest.mark.parametrize(
    ("make", "meshes"),
    [pytest.param(small_network.config, ("1", "8"), id="small"),
     pytest.param(tiny.config, ("1", "2x2x2"), marks=pytest.mark.slow, id="flow"),
     pytest.param(tiny.flow_map, ("1", "2x2x2"), marks=pytest.mark.slow, id="flow_map")],
)
def test_losses_are_the_same_on_every_mesh(make, meshes, tmp_path, monkeypatch):
    curves = {}
    for name in meshes:
        shape = MESHES[name]
        monkeypatch.setattr(build, "mesh", lambda section, shape=shape: mesh_of(shape))
        with small_network.registered():
            loop.train(make(AFTER_EACH_STEP), tmp_path / name)
        curves[name] = losses(tmp_path / name)
    first, second = curves.values()
    assert len(first) == 20
    assert first[-1] < first[0]
    np.testing.assert_allclose(second, first, rtol=1e-5)


def sizes(leaf: jax.Array) -> Sizes:
    return Sizes(leaf.size, leaf.addressable_shards[0].data.size)


@dataclasses.dataclass(frozen=True, kw_only=True)
class NoiseInMetrics(FlowMatching):
    """Has one value of the noise of each sample among its metrics."""

    def loss(self, network, params, batch, draws, frozen_params):
        losses, metrics = super().loss(network, params, batch, draws, frozen_params)
        return losses, metrics | {"noise": draws.noise[:, 0, 0, 0]}


@pytest.fixture(scope="module")
def one_step(small_network_registered):
    """The sizes of a state's leaves, the state, the state after a step, and the noise that this
    step and the next one reported and drew."""
    config = small_network.config({"mesh.data": 2, "mesh.fsdp": 4, "model.hidden": 400})
    built = build.training(config)
    recipe = built.recipe._replace(objective=NoiseInMetrics())
    step = compiled_train_step(recipe)
    before = create_train_state(recipe, jax.random.key(0), {})
    layout = jax.tree.map(sizes, before)
    batch, key = built.data_loader.batch(0, batch_sharding(built.recipe.mesh)), jax.random.key(1)
    after, first = step(before, batch, built.frozen_params, key)
    second = step(jax.tree.map(jnp.copy, after), batch, built.frozen_params, key)[1]
    samples = batch._replace(x=jnp.zeros(batch.x.shape))
    keys = [jax.random.fold_in(jax.random.key(1), i) for i in range(2)]
    drawn = [jnp.mean(NoiseInMetrics().draw(key, samples).noise[:, 0, 0, 0]) for key in keys]
    return layout, before, after, ([first["noise"], second["noise"]], drawn)


def test_no_large_leaf_of_a_state_is_whole_on_a_device(one_step):
    layout, _, after, _ = one_step
    for tree in (layout, jax.tree.map(sizes, after)):
        for name, parts in (("params", 4), ("opt_state", 8), ("ema_params", 8)):
            leaves = jax.tree.leaves(
                getattr(tree, name), is_leaf=lambda leaf: isinstance(leaf, Sizes)
            )
            large = [leaf for leaf in leaves if leaf.whole >= SMALLEST_SPLIT]
            assert len(large) >= 2, "the test needs leaves that are large enough to split"
            assert all(leaf.on_a_device * parts == leaf.whole for leaf in large), name


def test_a_step_takes_over_the_memory_of_the_state_before(one_step):
    _, before, after, _ = one_step
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(before))
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(after))
    assert int(after.step) == 1


def test_every_step_draws_anew_from_the_key_and_its_number(one_step):
    reported, drawn = one_step[-1]
    np.testing.assert_allclose(reported, drawn, rtol=1e-5)
    assert abs(reported[0] - reported[1]) > 1e-3


@pytest.mark.slow
def test_the_same_config_gives_the_same_parameters(tmp_path):
    again = loop.train(tiny.config(), tmp_path)
    _, _, params = load.load_network(tiny.flow_run(), "")
    jax.tree.map(np.testing.assert_array_equal, again.params, params)


def test_a_run_writes_what_it_says():
    workdir = tiny.flow_run()
    stored = json.loads((workdir / "config.json").read_text())
    assert stored.pop("format") == FORMAT
    assert stored == load.config_to_json(tiny.config({"run.sample_every": 4}))
    assert "blocks/attention/qkv/kernel" in (workdir / "parameters.txt").read_text()
    assert any((workdir / "events").iterdir())
    assert sorted(p.name for p in (workdir / "checkpoints").iterdir()) == ["4", "8"]
    assert sorted(p.name for p in (workdir / "samples").iterdir()) == [
        "00000004.png", "00000008.png"
    ]
    # Two rows of ten classes for each of two numbers of steps, enlarged six times, with captions.
    width, height = PIL.Image.open(workdir / "samples/00000008.png").size
    assert width > 6 * 91 and height == 20 + 6 * 37


@pytest.mark.slow
def test_the_mfu_and_waits_are_reported(tmp_path, monkeypatch, capsys):
    """The MFU where the peak is known, and waits for data where they are long."""
    specs = device_specs.DeviceSpec(1e9, 1e9, 1e9)
    monkeypatch.setitem(device_specs.DEVICE_SPECS, jax.devices()[0].device_kind, specs)
    monkeypatch.setattr(step_log, "LOGGED_WAIT", -1.0)
    loop.train(tiny.config({"run.steps": 2}), tmp_path)
    (row,) = metrics(tmp_path)
    network = build.training(tiny.config()).recipe.network
    flops = row["images_per_second"] * 3 * network.flops.forward
    assert row["mfu"] == pytest.approx(flops / (8 * 1e9), rel=1e-4)
    lines = capsys.readouterr().err
    assert f"MFU {row['mfu']:.1%}  time left 0:00" in lines
    assert f"waited for data {row['data_wait_fraction']:.0%} of the time" in lines


def test_metrics_hold_every_reported_step():
    rows = metrics(tiny.flow_run())
    assert [row["step"] for row in rows] == [2, 4, 6, 8]
    expected = {"step", "loss", "flow_matching_error", "gradient_norm", "learning_rate",
                "images_per_second", "steps_per_second", "data_wait_fraction", "epoch",
                "wall_time"}
    for row in rows:
        assert set(row) == expected
        assert row["learning_rate"] == pytest.approx(1e-3)
        assert row["images_per_second"] == pytest.approx(16 * row["steps_per_second"], rel=1e-5)
        assert row["gradient_norm"] > 0 and 0 <= row["data_wait_fraction"] <= 1
        assert row["epoch"] == pytest.approx(row["step"] * 16 / 1797, rel=1e-5)
        assert row["loss"] == pytest.approx(row["flow_matching_error"], rel=1e-5)


def test_metrics_of_a_flow_map_hold_the_raw_errors(small_network_registered):
    for row in metrics(small_network.flow_map_run()):
        assert set(row) >= {"du_dt_norm", "mean_flow_error", "velocity_error",
                            "mean_flow_log_variance"}
        halves = row["flow_matching_loss"] + row["mean_flow_loss"]
        assert row["loss"] == pytest.approx(halves / 2, rel=1e-5)


@pytest.mark.slow
def test_mean_flow_trains(tmp_path):
    fields = {"model.conditioning": "meanflow", "run.steps": 2}
    objective = default.component(MeanFlow(guidance=SelfGuidance(omega=0.5, kappa=0.5)))
    config = tiny.config(fields, objective=objective)
    loop.train(config, tmp_path)
    (row,) = metrics(tmp_path)
    assert {"du_dt_norm", "mean_flow_error", "velocity_error"} <= set(row)
    assert np.isfinite(row["loss"])


@pytest.mark.slow
def test_improved_mean_flow_trains(tmp_path):
    """Over eight devices, by microbatches, with a warm-up and errors by time."""
    model = InContextDiT(input_size=8, channels=1, num_classes=10, depth=3, head_depth=1, width=32,
                         heads=2, conditioning="decoupled", split_depth=1)
    tangent = Tangent(velocity="predicted", warmup_steps=5, max_rms=10.0)
    objective = default.component(ImprovedMeanFlow(time_bins=2, tangent=tangent))
    config = tiny.config({"run.steps": 2, "gradient_accumulation": 2},
                         model=default.component(model), objective=objective)
    loop.train(config, tmp_path)
    (row,) = metrics(tmp_path)
    assert {"du_dt_norm", "mean_flow_error", "velocity_error", "velocity_head_error"} <= set(row)
    assert any(name.startswith("velocity_head_error/t_") for name in row)
    assert np.isfinite(row["loss"]) and row["loss"] == pytest.approx(2, rel=0.01)


def test_checkpoints_are_kept_as_asked(tmp_path):
    cadence = {"run.checkpoint_every": 2, "run.steps": 9, "run.keep_last": 2, "run.keep_every": 4}
    with small_network.registered():
        loop.train(small_network.config(cadence), tmp_path)
    assert sorted(int(p.name) for p in (tmp_path / "checkpoints").iterdir()) == [4, 8, 9]


def test_the_last_step_is_saved_whatever_the_cadence(tmp_path):
    with small_network.registered():
        loop.train(small_network.config({"run.checkpoint_every": 0, "run.steps": 3}), tmp_path)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["3"]


def test_the_first_minutes_are_told_and_the_speed_is_without_them(tmp_path, monkeypatch, capsys):
    compile_step = loop.Loop._compile

    def slowly(*inputs):
        compile_step(*inputs)
        time.sleep(2)

    monkeypatch.setattr(loop.Loop, "_compile", slowly)
    with small_network.registered():
        loop.train(small_network.config({"run.steps": 4, "run.log_every": 4}), tmp_path)
    lines = capsys.readouterr().err.splitlines()
    told = [next(i for i, line in enumerate(lines) if line.startswith(start)) for start in (
        "compiling the training step", "compiled in 0:", "the first step is done", "step 4/4  loss",
    )]  # fmt: skip
    assert told == sorted(told)
    assert metrics(tmp_path)[0]["steps_per_second"] > 4 / 2


def start_of(config) -> dict:
    """The parameters that a run of `config` starts from."""
    recipe = build.training(config).recipe
    pretrained = initial_checkpoint.pretrained(config, recipe.network, recipe.mesh)
    return create_train_state(recipe, jax.random.key(0), pretrained).params


@pytest.mark.parametrize("ema", [pytest.param("main", marks=pytest.mark.slow), ""])
def test_a_flow_map_starts_as_the_flow_model(ema):
    config = tiny.flow_map({"init.checkpoint": str(tiny.flow_run()), "init.ema": ema})
    flow_model, _, flow_params = load.load_network(tiny.flow_run(), ema)
    params = start_of(config)
    network = build_network(config.model)
    fresh = jax.jit(network.init)(jax.random.key(0))
    assert params.keys() - flow_params.keys() == {"log_variance"}
    for name, stored in flow_params.items():
        jax.tree.map(np.testing.assert_array_equal, params[name], stored)
    jax.tree.map(np.testing.assert_array_equal, params["log_variance"], fresh["log_variance"])

    x = jax.random.normal(jax.random.key(2), (8, 8, 8, 1))
    t, y = jnp.linspace(0.1, 1.0, 8), jnp.arange(8)
    u = jax.jit(network.apply)(params, x, t, t, y)
    expected = jax.jit(flow_model.apply)(flow_params, x, t, t, y)
    np.testing.assert_allclose(u, expected, atol=1e-6)


def test_a_run_trains_from_its_initial_checkpoint(tmp_path):
    """The first step of AdamW moves no parameter by more than the learning rate."""
    objective = default.component(DecoupledMeanFlow())
    with small_network.registered():
        run = small_network.run()
        config = small_network.config({"run.steps": 1, "init.checkpoint": str(run)},
                                      objective=objective)
        params = loop.train(config, tmp_path).params
        stored = load.load_network(run, "main")[2]
        fresh = build_network(config.model).init(jax.random.key(0))
    kept = {name: params[name] for name in stored}
    moved = jax.tree.map(lambda a, b: float(abs(a - b).max()), kept, stored)
    assert 0 < max(jax.tree.leaves(moved)) < 1.01 * config.optimizer.learning_rate
    apart = abs(fresh["in"] - stored["in"]).max()
    assert apart > 10 * config.optimizer.learning_rate, "random parameters would be farther away"


def test_a_checkpoint_without_qk_norm_starts_a_network_with_it():
    fields = {"model.qk_norm": True, "init.checkpoint": str(tiny.flow_run())}
    start, stored = start_of(tiny.flow_map(fields)), load.load_network(tiny.flow_run(), "main")[2]
    # Two blocks, and heads 16 wide.
    ones = {"q_norm": {"scale": jnp.ones((2, 16))}, "k_norm": {"scale": jnp.ones((2, 16))}}
    expected = {**stored, "log_variance": start["log_variance"]}
    attention = {**stored["blocks"]["attention"], **ones}
    expected["blocks"] = {**stored["blocks"], "attention": attention}
    jax.tree.map(np.testing.assert_array_equal, start, expected)


def test_only_a_start_may_lack_the_scales_of_qk_norm():
    config = load.read_config(tiny.flow_run())
    config.model.qk_norm = True
    with pytest.raises(InputError, match="lacks blocks/attention/k_norm/scale"):
        load.load_network(tiny.flow_run(), config=config)


@pytest.mark.slow
def test_a_frozen_teacher_guides(tmp_path):
    config = tiny.flow_map({
        "init.checkpoint": str(tiny.flow_run()), "teacher.checkpoint": str(tiny.flow_run()),
        "run.steps": 2,
    })
    config.objective.guidance = default.component(TeacherGuidance(scale=2.0, interval=(0.0, 0.8)))
    before = load.load_network(tiny.flow_run(), "main")[2]
    state = loop.train(config, tmp_path)
    assert int(state.step) == 2
    assert build.training(config).frozen_params["teacher"].keys() == before.keys()
    # The teacher is not in the checkpoint.
    saved = {p.name for p in (tmp_path / "checkpoints/2").iterdir() if p.is_dir()}
    assert saved == {"params", "opt_state", "ema_params_main", "position", "checksums"}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model.learned_variance": False}, "model.learned_variance=False.*set it to True"),
        ({"sampling.ema": "slow"}, "sampling.ema=slow: config.emas has main"),
        ({"gradient_accumulation": 3}, "data.batch_size=16.*gradient_accumulation=3"),
    ],
)
def test_parts_that_do_not_go_together_are_refused(tmp_path, fields, message):
    with pytest.raises(InputError, match=message):
        loop.train(tiny.flow_map(fields), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_run_traces_its_step_once(tmp_path, monkeypatch):
    """Also where a run of the same process resumes it."""
    traced = []
    monkeypatch.setattr("dmf.training.train_step.terms_of",
                        lambda *args: traced.append(1) or terms_of(*args))
    for steps in (1, 2):
        fields = {"run.steps": steps, "optimizer.learning_rate": 0.0123}
        with small_network.registered():
            loop.train(small_network.config(fields), tmp_path)
        assert len(traced) == 1


@pytest.mark.slow
def test_runs_of_one_process_with_equal_recipes_share_their_step():
    def step(fields, **components):
        with small_network.registered():
            config = small_network.config(fields, **components)
            return compiled_train_step(build.training(config).recipe)

    flow_map = {"objective": default.component(DecoupledMeanFlow())}

    same = {"seed": 7, "run.steps": 99, "sampling.steps": (4,)}
    assert step({}) is step(same)
    assert step({}, **flow_map) is step(same, **flow_map)
    for other in ({"optimizer.learning_rate": 0.5}, {"emas.main.decay": 0.9}, {"mesh.fsdp": 2},
                  {"freeze": ("in",)}, {"data.mirror": True},
                  {"gradient_accumulation": 2}):  # fmt: skip
        assert step(other) is not step({}), other


def test_runs_of_other_seeds_find_the_step_compiled():
    lowered = [
        compile.lowered_step(tiny.config({"seed": seed}), jax.devices()).program.as_text()
        for seed in (0, 1)
    ]
    assert lowered[0] == lowered[1]
