"""Network, tangents, losses and gradients of Decoupled MeanFlow equal the published ones."""

import dataclasses
import functools
from collections.abc import Iterable, Mapping

import golden_values as gv
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dmf.checkpoints.convert.tables.dit import POSITIONS, from_pytorch, to_pytorch
from dmf.models.dit import DiT
from dmf.objectives import (
    CauchyWeighting,
    DecoupledMeanFlow,
    NoGuidance,
    PublishedCauchyWeighting,
    SelfGuidance,
    TeacherGuidance,
)
from dmf.objectives.guidance import Guidance
from dmf.objectives.path_sample import DecoupledDraws, Draws
from dmf.types import Batch, Params

FILES = ("dmf_tiny", "dmf_tiny_qknorm")
GUIDANCES = ("default", "mg", "distill")
# The name of each weighting in the golden files, and whether it is the published one.
WEIGHTINGS = {"cauchy": False, "released": True}
VALUES = 8 * 8 * 4

over_files = pytest.mark.parametrize("name", FILES)


def over_executions(executions: Iterable[str]):
    """The plain execution, and the one with scan and sharding over eight devices; all others are
    slow tests. The file with normalised queries and keys runs in the plain execution alone, as the
    normalisation does not depend on the execution."""
    plain = next(iter(gv.EXECUTIONS))
    fast = {FILES[0]: {plain, "scan-dots-2x2x2"}, FILES[1]: {plain}}
    return pytest.mark.parametrize(("name", "execution"), [
        pytest.param(name, execution, marks=[pytest.mark.slow] * (execution not in fast[name]))
        for name in FILES for execution in executions
    ])


@dataclasses.dataclass(frozen=True)
class SwitchedWeighting:
    """Either weighting, chosen at run time, so that one compilation serves both."""

    published: jax.Array
    learned = True

    def __call__(self, error: jax.Array, size: int, phi: jax.Array) -> jax.Array:
        weightings = PublishedCauchyWeighting(), CauchyWeighting()
        losses = [weighting(error, size, phi) for weighting in weightings]
        return jnp.where(self.published, *losses)


def guidance_of(name: str, kind: str) -> Guidance:
    config = gv.load(name).config
    interval = (config["g_min"], config["g_max"])
    if kind == "mg":
        return SelfGuidance(omega=1.0, kappa=config["omega"]["mg"], interval=interval)
    if kind == "distill":
        return TeacherGuidance(scale=config["omega"]["distill"], interval=interval)
    return NoGuidance()


@functools.cache
def teacher_of(name: str) -> tuple[DiT, Params]:
    model = gv.dit(gv.load(name), conditioning="flow")
    return model, gv.on_device(from_pytorch(model, gv.load(name).below("teacher")))


def inputs_of(golden: gv.Golden) -> tuple[Batch, DecoupledDraws]:
    dropped, t_fm = jnp.asarray(golden["drop"]), golden.vector("t_fm")
    draws = DecoupledDraws(
        Draws(golden.images("eps_fm"), t_fm, t_fm, dropped),
        Draws(golden.images("eps_mf"), golden.vector("t_mf"), golden.vector("r_mf"), dropped),
    )
    return Batch(golden.images("data"), golden.labels("y")), draws


def loss_and_gradient(name: str, kind: str, execution: tuple):
    """A function of whether the weighting is the published one."""
    scan, remat, mesh_sizes = execution
    model, (teacher, teacher_params) = gv.decoupled(name, scan, remat), teacher_of(name)
    frozen = {"teacher": teacher_params} if kind == "distill" else {}

    def mean_loss(params, batch, draws, frozen, published):
        objective = DecoupledMeanFlow(
            guidance=guidance_of(name, kind), weighting=SwitchedWeighting(published),
            teacher=teacher,
        )  # fmt: skip
        loss, metrics = objective.loss(model, params, batch, draws, frozen)
        return jnp.mean(loss), metrics | {"loss": loss}

    params, inputs = gv.spread(mesh_sizes, gv.decoupled_params(name), inputs_of(gv.load(name)))
    compiled = gv.jit(jax.grad(mean_loss, has_aux=True))
    return lambda published: compiled(params, *inputs, frozen, jnp.asarray(published))


def assert_losses(metrics: Mapping[str, jax.Array], expected: Mapping[str, np.ndarray]) -> None:
    for metric, published, scale in (
        ("loss", "loss", 1),
        ("flow_matching_error", "fm_loss", VALUES),
        ("mean_flow_error", "mf_loss", VALUES),
        ("flow_matching_loss", "fm_p_loss", 1),
        ("mean_flow_loss", "mf_p_loss", 1),
    ):
        # A loss is a sum of terms of order one that cancel, each rounded to 1e-7.
        np.testing.assert_allclose(
            scale * metrics[metric], expected[published], 1e-5, 1e-6, err_msg=metric
        )


def assert_gradients(name: str, gradients: Params, golden: gv.Golden, prefix: str) -> None:
    tensors = to_pytorch(gv.decoupled(name), gradients)
    del tensors[POSITIONS]
    np.testing.assert_allclose(gv.norm(tensors), golden[f"{prefix}/grad_norm"], 1e-4)
    expected = golden.below(f"{prefix}/grad")
    assert len(expected) >= 5
    for tensor, gradient in expected.items():
        gv.assert_near(tensors[tensor], gradient, 1e-4)


def assert_objective(name: str, kind: str, execution: tuple) -> None:
    """Losses and gradients equal the golden ones, with both weightings."""
    golden, run = gv.load(name), loss_and_gradient(name, kind, execution)
    for weighting, published in WEIGHTINGS.items():
        gradients, metrics = run(published)
        assert_losses(metrics, golden.below(f"{kind}/{weighting}"))
        assert_gradients(name, gradients, golden, f"{kind}/{weighting}")


# The losses of "mg" are compared in the sharded execution below; outside of the guidance interval
# they are those without guidance.
@pytest.mark.parametrize(("name", "kind"), [
    pytest.param(name, kind,
                 marks=[pytest.mark.slow] * (name != FILES[0] or kind != "distill"))
    for name in FILES for kind in GUIDANCES
])
def test_losses_and_gradients(name, kind):
    assert_objective(name, kind, gv.PLAIN)


@over_executions(list(gv.EXECUTIONS)[1:])
def test_execution_changes_no_loss_and_no_gradient(name, execution):
    kind = "mg" if execution.endswith("dots-2x2x2") else "default"
    assert_objective(name, kind, gv.EXECUTIONS[execution])


@over_executions(gv.EXECUTIONS)
def test_network_and_tangent(name, execution):
    scan, remat, mesh_sizes = gv.EXECUTIONS[execution]
    golden, model = gv.load(name), gv.decoupled(name, scan, remat)

    def outputs(params, x_t, t, r, y, dx):
        def both(x_t, t, r):
            return model.apply(params, x_t, t, r, y), model.log_variance(params, t, r)

        return jax.jvp(both, (x_t, t, r), (dx, jnp.ones_like(t), jnp.zeros_like(r)))

    inputs = (golden.images("x"), golden.vector("t"), golden.vector("r"), golden.labels("y"))
    params, inputs = gv.spread(
        mesh_sizes, gv.decoupled_params(name), (*inputs, golden.images("dx"))
    )
    (u, phi), (du_dt, dphi_dt) = gv.jit(outputs)(params, *inputs)
    gv.assert_each_near(u, golden.images("u"), 1e-5)
    gv.assert_each_near(du_dt, golden.images("du_dt"), 1e-5)
    gv.assert_near(phi, golden.vector("logvar"), 1e-5)
    gv.assert_near(dphi_dt, golden.vector("dlogvar_dt"), 1e-5)
