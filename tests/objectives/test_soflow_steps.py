"""What a step of SoFlow costs, what bfloat16 does to it, and runs over devices and microbatches."""

import dataclasses
import functools
import json

import golden_values as gv
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_network
from test_soflow import DROPPED, NETWORK, PLAIN, PUBLISHED, RATIO, R, T, draws_of, inputs

from configs import default
from dmf.models.dit import DiT
from dmf.objectives import SoFlow
from dmf.objectives.compute_sharing import ComputeSharing
from dmf.objectives.guidance import GuidedVelocity
from dmf.objectives.path_sample import PathSample
from dmf.objectives.soflow import average_velocity_and_target
from dmf.runtime.sharding import batch_sharding, make_mesh
from dmf.training import loop
from dmf.types import Batch

pytestmark = pytest.mark.slow


def flat(tree) -> np.ndarray:
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])


def transformer(conditioning: str) -> DiT:
    split = {"split_depth": 3} if conditioning == "decoupled" else {}
    return DiT(input_size=16, channels=4, num_classes=10, depth=4, width=128, heads=4, scan=False,
               conditioning=conditioning, **split)  # fmt: skip


@pytest.mark.parametrize("conditioning", ["meanflow", "decoupled"])
def test_operations_are_those_that_xla_counts_and_sharing_changes_nothing(conditioning):
    model = transformer(conditioning)
    objective = SoFlow(guidance=PUBLISHED, compute_sharing=ComputeSharing(
        unconditional_microbatches=0
    ))
    draw = np.random.default_rng(0).standard_normal
    batch = Batch(jnp.asarray(draw((8, *model.sample_shape)), "f"), jnp.arange(8))
    params = jax.tree.map(lambda leaf: jnp.asarray(0.1 * draw(leaf.shape), "f"),
                          jax.eval_shape(model.init, jax.random.key(0)))
    draws = draws_of(jnp.asarray(draw(batch.x.shape), "f"), T, R, DROPPED, RATIO)

    def gradient(objective, params):
        return jax.grad(lambda p: objective.loss(model, p, batch, draws, {})[0].mean())(params)

    program = jax.jit(functools.partial(gradient, objective)).lower(params).compile()
    counted = program.cost_analysis()["flops"] / 8
    assert 1 < counted / objective.flops(model) < 1.08
    plain = dataclasses.replace(objective, compute_sharing=PLAIN)
    expected = gv.jit(functools.partial(gradient, plain))(params)
    gv.assert_near(flat(program(params)), flat(expected), 1e-4)


def test_rounding_to_bfloat16_is_divided_by_rho():
    """The root mean square of (1 / rho - 1) (u - u_l) is 0.05 here, that of v - u is 1.05; of a
    network in bfloat16, rounding changes it by 0.02 at rho = 0.1 and by 0.6 at rho = 0.002."""
    draw, count = np.random.default_rng(0).standard_normal, 8
    model = DiT(input_size=16, channels=4, num_classes=10, depth=6, width=192, heads=3,
                conditioning="meanflow")
    params = jax.tree.map(lambda leaf: leaf + 0.02 * jnp.asarray(draw(leaf.shape), "f"),
                          jax.jit(model.init)(jax.random.key(0)))
    x_t, v = (jnp.asarray(draw((count, *model.sample_shape)), "f") for _ in range(2))
    t = jnp.linspace(0.3, 0.95, count)
    labels = model.condition(jnp.zeros(count, jnp.int32))
    r = t * jnp.linspace(0.1, 0.8, count)
    sample = PathSample(x_t, v, t, r, labels, jnp.zeros(count, bool))

    def difference(dtype, ratio):
        network = dataclasses.replace(model, dtype=dtype)
        u, target = gv.jit(functools.partial(
            average_velocity_and_target, SoFlow(), network, params, sample, GuidedVelocity(v, None)
        ))(jnp.full(count, ratio))
        assert float(jnp.std(v - u)) == pytest.approx(1.05, abs=0.02)
        return target - v

    for ratio, rounding in ((0.1, 0.017), (0.002, 0.62)):
        exact = difference("float32", ratio)
        assert float(jnp.std(exact)) == pytest.approx(0.05, abs=0.006)
        error = difference("bfloat16", ratio) - exact
        assert float(jnp.std(error)) == pytest.approx(rounding, rel=0.15)


def test_losses_do_not_depend_on_the_mesh():
    params, *rows = inputs()
    mesh = make_mesh(2, 1, 1, devices=jax.devices()[:2])

    def loss(batch, draws):
        return SoFlow(guidance=PUBLISHED).loss(NETWORK, params, batch, draws, {})[0]

    def sharded(batch, draws):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return loss(batch, draws)

    split = jax.jit(sharded)(*jax.device_put(tuple(rows), batch_sharding(mesh)))
    assert not split.is_fully_replicated
    np.testing.assert_allclose(split, jax.jit(loss)(*rows), rtol=1e-4)


@pytest.mark.parametrize("sum_gradients", ["per_term", "once"])
def test_a_run_trains_over_devices_and_microbatches(tmp_path, sum_gradients):
    objective = SoFlow(guidance=PUBLISHED, time_bins=2)
    fields = {"run.steps": 4, "data.batch_size": 64, "gradient_accumulation": 2,
              "sum_gradients": sum_gradients}
    with small_network.registered():
        config = small_network.config(fields, objective=default.component(objective))
        loop.train(config, tmp_path)
    first, second = metrics_of(tmp_path)
    assert {"flow_matching_error", "consistency_error"} <= set(first)
    assert any(name.startswith("consistency_error/t_") for name in first)
    # Means over two steps each of the schedule over four.
    steps = 0.1 * 0.02 ** (np.arange(4) / 4)
    for row, ratios in ((first, steps[:2]), (second, steps[2:])):
        assert row["consistency_ratio"] == pytest.approx(ratios.mean(), rel=1e-5)
        assert np.isfinite(row["loss"]) and row["loss"] == pytest.approx(1, abs=0.01)


def metrics_of(workdir) -> list[dict[str, float]]:
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
