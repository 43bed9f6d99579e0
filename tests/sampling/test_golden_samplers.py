"""Samples equal those of the published samplers from the same noise."""

import functools

import golden_in_context as gi
import golden_values as gv
import jax
import jax.numpy as jnp
import pytest

from dmf.checkpoints.convert.tables.dit import from_pytorch
from dmf.models.dit import DiT
from dmf.sampling import Euler, EulerMaruyama, Heun, Restart, Sampler
from dmf.sampling.guidance import SamplingGuidance, classifier_free, guidance_as_input
from dmf.sampling.samplers import sample
from dmf.types import ClassLabels, FlowMap, Params

DMF_FILES = ("dmf_tiny", "dmf_tiny_qknorm")
over_dmf_files = pytest.mark.parametrize("name", DMF_FILES)


@functools.cache
def flow_model(name: str) -> tuple[DiT, Params]:
    """The weights of the flow map, as the flow model that they also are."""
    model = gv.dit(gv.load(name), conditioning="flow", learned_variance=True)
    return model, gv.on_device(from_pytorch(model, gv.load(name).below("params")))


@functools.cache
def compiled(model: DiT):
    return gv.jit(model.apply)


def eager(model: DiT, params: Params) -> FlowMap:
    """A flow map compiled by itself, so that the loops around it need no compilation."""

    def flow_map(x_t, t, r, y):
        with jax.disable_jit(False):
            return compiled(model)(params, x_t, t, r, y)

    return flow_map


def samples(name: str, flow_map: FlowMap, sampler: Sampler, steps: int, shift: float = 1.0):
    golden = gv.load(name)
    with jax.disable_jit():
        return sample(
            flow_map,
            golden.images("z"),
            ClassLabels(golden.labels("y"), num_classes=10),
            steps=steps,
            sampler=sampler,
            shift=shift,
            step_noise=noises_of(golden).__getitem__,
        )


def noises_of(golden: gv.Golden) -> jax.Array:
    return jnp.moveaxis(jnp.asarray(golden["noises"], jnp.float32), 2, -1)


def decoupled_map(name: str) -> FlowMap:
    return eager(gv.decoupled(name), gv.decoupled_params(name))


@over_dmf_files
@pytest.mark.parametrize("steps", [1, 2, 4])
@pytest.mark.parametrize("shift", [1.0, 1.5])
def test_euler(name, steps, shift):
    generated = samples(name, decoupled_map(name), Euler(), steps, shift)
    gv.assert_each_near(generated, gv.load(name).images(f"euler/{steps}/{shift}"), 1e-5)


@over_dmf_files
@pytest.mark.parametrize("steps", [1, 2, 4])
def test_restart(name, steps):
    generated = samples(name, decoupled_map(name), Restart(), steps)
    gv.assert_each_near(generated, gv.load(name).images(f"restart/{steps}"), 1e-5)


@over_dmf_files
def test_classifier_free_guidance_of_a_flow_map(name):
    guidance = SamplingGuidance(scale=1.5, interval=(0.1, 0.8))
    generated = samples(name, classifier_free(decoupled_map(name), guidance), Euler(), 4)
    gv.assert_each_near(generated, gv.load(name).images("euler_cfg/4"), 1e-5)


@over_dmf_files
def test_weights_of_a_flow_map_as_a_flow_model(name):
    golden, (model, params) = gv.load(name), flow_model(name)
    inputs = (golden.images("x"), golden.vector("t"), golden.vector("r"), golden.labels("y"))
    velocity = compiled(model)(params, *inputs)
    gv.assert_each_near(velocity, golden.images("sit_v"), 1e-5)


@over_dmf_files
@pytest.mark.parametrize(
    ("key", "sampler", "steps", "scale"),
    [
        ("fm_euler/8/cfg1.5", Euler(), 8, 1.5),
        ("fm_heun/4/cfg1.5", Heun(), 4, 1.5),
        ("fm_sde/8", EulerMaruyama(), 8, 1.0),
    ],
)
def test_flow_model(name, key, sampler, steps, scale):
    flow_map = classifier_free(eager(*flow_model(name)), SamplingGuidance(scale=scale))
    generated = samples(name, flow_map, sampler, steps)
    gv.assert_each_near(generated, gv.load(name).images(key), 1e-5)


@pytest.mark.parametrize("mesh_sizes", [
    (2, 2, 2), pytest.param((2, 1, 4), marks=pytest.mark.slow)], ids=["2x2x2", "2x1x4"])
@pytest.mark.parametrize("scan", [True, pytest.param(False, marks=pytest.mark.slow)],
                         ids=["scan", "unrolled"])
def test_restart_on_a_mesh(mesh_sizes, scan):
    golden, model = gv.load("dmf_tiny"), gv.decoupled("dmf_tiny", scan)
    noises = jnp.swapaxes(noises_of(golden), 0, 1)
    inputs = (golden.images("z"), golden.labels("y"), noises)
    params, inputs = gv.spread(mesh_sizes, gv.decoupled_params("dmf_tiny"), inputs)

    def generate(params, z, y, noises):
        flow_map = functools.partial(model.apply, params)
        return sample(
            flow_map, z, y, steps=4, sampler=Restart(), step_noise=lambda i: noises[:, i]
        )

    gv.assert_each_near(gv.jit(generate)(params, *inputs), golden.images("restart/4"), 1e-5)


@pytest.mark.parametrize("name", ["meanflow_tiny", "meanflow_tiny_kappa"])
@pytest.mark.parametrize("steps", [1, 2, 4])
def test_euler_of_meanflow(name, steps):
    golden = gv.load(name)
    flow_map = eager(gv.meanflow(name), gv.meanflow_params(name))
    with jax.disable_jit():
        generated = sample(flow_map, jnp.asarray(golden["z"]), golden.labels("y"), steps=steps)
    gv.assert_each_near(generated, golden[f"sample/{steps}"], 1e-5)


@pytest.mark.parametrize("name", ["imf_tiny", pytest.param("pmf_tiny", marks=pytest.mark.slow)])
def test_euler_with_guidance_as_an_input(name):
    golden = gv.load(name)
    published = golden.config["sampling"]
    guidance = SamplingGuidance(
        scale=published["omega"], interval=(published["t_min"], published["t_max"])
    )
    model = gi.network(name)
    flow_map = guidance_as_input(eager(model, gi.params(name)), guidance)
    z, y = jnp.asarray(golden["z"]), model.condition(golden.labels("y"))
    for steps in (1, 2, 4):
        with jax.disable_jit():
            generated = sample(flow_map, z, y, steps=steps)
        gv.assert_each_near(generated, golden[f"sample/{steps}"], 1e-5)
