"""From a config to all that a run consists of: the builders of every room, and what they refuse."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_network
import tiny
from ml_collections import ConfigDict

import dmf
from configs import default
from dmf.checkpoints import load
from dmf.data.build import data
from dmf.errors import InputError
from dmf.evaluation.build import evaluation
from dmf.models.build import latents, network
from dmf.models.encoders.latent_scaling import LatentScaling
from dmf.models.in_context_dit import InContextDiT
from dmf.objectives import (
    DecoupledMeanFlow,
    DrawnGuidance,
    ImprovedMeanFlow,
    LogitNormal,
    MeanFlow,
    OrderedPair,
    SelfGuidance,
    Shortcut,
    TerminalVelocityMatching,
)
from dmf.objectives.build import objective
from dmf.objectives.interpolants import COSINE, LINEAR
from dmf.sampling.build import guided_flow_map
from dmf.sampling.samplers import ConsistencyTrajectory
from dmf.training import build
from dmf.training.ema import ConstantEma, HalfLifeEma
from dmf.training.optimizer import AdamW

IN_CONTEXT = InContextDiT(input_size=8, channels=1, num_classes=10, depth=3, head_depth=1, width=32,
                          heads=2)


def changed(change) -> ConfigDict:
    """A config with one change."""
    config = tiny.config().unlock()
    change(config)
    return config


def components(**sections):
    """A change that replaces sections of a config by components."""
    def change(config):
        for name, component in sections.items():
            config[name] = default.component(component)

    return change


def test_a_builder_of_each_room_builds_its_section():
    config = tiny.config({
        "data.batch_size": 32, "evaluation.count": 48, "latents.scale": 0.5, "run.steps": 7,
    }, emas={"fast": {"name": "constant", "decay": 0.5}, "slow": {"name": "half_life"}})
    assert network(config.model).width == 32
    assert latents(config.latents).scaling == LatentScaling(scale=0.5)
    assert data(config.data).batch_size == 32
    assert evaluation(config.evaluation).count == 48
    assert build.run(config.run).steps == 7
    assert build.emas(config.emas) == {"fast": ConstantEma(decay=0.5), "slow": HalfLifeEma()}
    assert build.optimizer(config.optimizer, 8) == AdamW(learning_rate=1e-3)
    assert dict(build.mesh(config.mesh).shape) == {"slices": 1, "data": 8, "fsdp": 1, "tensor": 1}


def test_an_objective_has_its_inner_components():
    config = tiny.flow_map()
    config.objective.guidance = default.component(
        SelfGuidance(omega=1.0, kappa=0.6, interval=(0.1, 0.9))
    )
    config.objective.interpolant = "cosine"
    assert objective(config.objective) == DecoupledMeanFlow(
        interpolant=COSINE,
        time_sampler=LogitNormal(mean=0.0, std=1.0),
        time_pair=OrderedPair(
            first=LogitNormal(mean=0.4, std=1.0),
            second=LogitNormal(mean=-1.2, std=1.0),
            equal_probability=0.0,
        ),
        guidance=SelfGuidance(omega=1.0, kappa=0.6, interval=(0.1, 0.9)),
        label_dropout=0.1,
    )


def test_a_stochastic_sampler_follows_the_path_of_training():
    config = tiny.config({"objective.interpolant": "cosine"})
    config.sampling.sampler = ConfigDict({"name": "ctm", "gamma": 0.3})
    settings = build.settings_of_sampling(config)
    assert settings.sampler == ConsistencyTrajectory(gamma=0.3, interpolant=COSINE)
    config.objective.interpolant = "linear"
    assert build.settings_of_sampling(config).sampler.interpolant == LINEAR


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.objective.update(name="flow"), "objective.name=flow: choose one of"),
        (lambda c: c.objective.update(interpolant="cubic"),
         "objective.interpolant.name=cubic: choose one of cosine, linear"),
        (lambda c: c.objective.time_sampler.update(name="beta"),
         "objective.time_sampler.name=beta: choose one"),
        (lambda c: c.objective.time_sampler.update(width=3.0),
         "objective.time_sampler.width=3.0: logit_normal has no such field; it has mean, std"),
        (lambda c: c.objective.weighting.update(power=1.0),
         "objective.weighting.power=1.0: uniform has no such field"),
        (lambda c: c.optimizer.update(name="sgdd"),
         "optimizer.name=sgdd: choose one of adafactor, adamw"),
        (lambda c: c.optimizer.update(eps=0.0), "optimizer.eps=0.0: it must be positive"),
        (lambda c: c.emas.main.update(name="slow"), "emas.main.name=slow: choose one of"),
        (lambda c: c.emas.main.update(decay=1.0), "emas.main.decay=1.0: a decay"),
        (lambda c: c.sampling.update(sampler={"name": "rk4"}), "sampling.sampler.name=rk4: choose"),
        (lambda c: c.sampling.update(sampler={"name": "ctm", "gamma": 2.0}),
         "sampling.sampler.gamma=2.0: the share"),
        (lambda c: c.sampling.update(ema="slow"), "sampling.ema=slow: config.emas has main"),
        (lambda c: c.model.update(heads=3), "model.heads=3: it must divide "),
        (lambda c: c.run.update(steps=0), "run.steps=0: give a whole number >= 1"),
        (lambda c: c.data.update(batch_size=0), "data.batch_size=0: give a whole number >= 1"),
        (lambda c: c.data.update(batch_size=12), "data.batch_size=12: it must be a multiple of 8"),
        (lambda c: c.update(gradient_accumulation=0),
         "gradient_accumulation=0: give a whole number >= 1"),
        (lambda c: c.update(sum_gradients="twice"),
         "sum_gradients=twice: choose one of per_term, once"),
        (lambda c: (c.alignment.update(dtype="int8"),
                    c.objective.update(alignment_coefficient=0.5)),
         "alignment.dtype=int8: choose one of float32, bfloat16"),
        (components(objective=ImprovedMeanFlow()),
         "model.guidance_input=False: a network takes its guidance as an input where"),
        (lambda c: (components(objective=ImprovedMeanFlow())(c),
                    c.model.update(guidance_input=True)),
         "model.velocity_head=False: a network has a head for the velocity where"),
        (components(objective=MeanFlow(guidance=DrawnGuidance()), model=IN_CONTEXT),
         "model.velocity_head=True: a network has a head for the velocity where"),
        (components(objective=ImprovedMeanFlow(interpolant=COSINE),
                    model=dataclasses.replace(IN_CONTEXT, prediction="data")),
         "model.prediction=data: (x_t - x) / t is the velocity of the linear path alone"),
        (lambda c: (components(objective=Shortcut(target_ema="slow"))(c),
                    c.model.update(conditioning="meanflow")),
         "objective.target_ema=slow: config.emas has main; empty takes the network's own"),
        (lambda c: (components(objective=TerminalVelocityMatching())(c),
                    c.model.update(conditioning="meanflow")),
         "model.attention=auto: the gradient goes through a tangent that flash attention takes"),
        (lambda c: c.mesh.update(tensor=3), "mesh=-1x1x3 (data x fsdp x tensor): it must hold"),
        (lambda c: c.teacher.update(checkpoint="/nowhere"),
         "teacher.checkpoint=/nowhere: the objective asks for no teacher"),
    ],
)
def test_a_field_that_cannot_be_used_is_named_in_its_place(change, message):
    config = changed(change)
    with pytest.raises(InputError) as error:
        build.training(config)
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("time_sampler.std", -1.0, "objective.time_sampler.std=-1.0: a logit-normal"),
        ("time_pair.first.std", 0.0, "objective.time_pair.first.std=0.0: a logit-normal"),
        ("time_pair.equal_probability", 1.5, "objective.time_pair.equal_probability=1.5: a prob"),
        ("guidance.kappa", 1.0, "objective.guidance.kappa=1.0: the effective"),
        ("guidance.interval", (0.7, 0.5), "objective.guidance.interval=(0.7, 0.5): give"),
        ("tangent.max_rms", -1.0, "objective.tangent.max_rms=-1.0: give 0"),
        ("compute_sharing.unconditional_microbatches", -1,
         "objective.compute_sharing.unconditional_microbatches=-1: give 0"),
        ("label_dropout", 2.0, "objective.label_dropout=2.0: a probability"),
        ("time_bins", -1, "objective.time_bins=-1: give 0"),
        ("weighting", {"name": "adaptive", "offset": 0.0},
         "objective.weighting.offset=0.0: it is positive"),
        ("time_sampler", "late",
         "objective.time_sampler.name=late: choose one of logit_normal, uniform; or give the"),
        ("time_pair", "ordered_pair",
         "objective.time_pair.first: ordered_pair has no default for it; give one"),
        ("interpolant", {"name": "linear", "alpha": 1.0},
         "objective.interpolant.alpha=1.0: linear has no such field; it has none"),
    ],
)
def test_a_value_that_a_component_refuses_is_named_in_its_place(field, value, message):
    fields = tiny.flow_map().objective.to_dict()
    *parents, last = field.split(".")
    functools.reduce(dict.__getitem__, parents, fields)[last] = value
    with pytest.raises(InputError) as error:
        objective(ConfigDict(fields))
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)


def test_a_loaded_flow_map_is_the_network_at_its_ema_parameters(small_network_registered):
    flow_map, config = dmf.load(small_network.flow_map_run())
    trained, _, ema_params = load.load_network(small_network.flow_map_run(), "main")
    params = load.load_network(small_network.flow_map_run(), "")[2]
    x = jax.random.normal(jax.random.key(0), (8, 8, 8, 1))
    t, r, y = jnp.linspace(0.3, 1.0, 8), jnp.linspace(0.0, 0.3, 8), jnp.arange(8)
    u = flow_map(x, t, r, y)
    np.testing.assert_array_equal(u, trained.apply(ema_params, x, t, r, y))
    assert np.abs(u - trained.apply(params, x, t, r, y)).max() > 1e-6
    assert config.model.hidden == 12
    assert config.objective.name == "decoupled_mean_flow"


def test_guidance_of_a_config_reaches_the_flow_map():
    config = tiny.config({"sampling.guidance.scale": 3.0, "sampling.guidance.interval": (0.0, 0.5)})
    chosen = network(config.model)

    def flow_map(x_t, t, r, y):
        return jnp.broadcast_to(y.labels[:, None, None, None].astype(jnp.float32), x_t.shape)

    x, y = jnp.zeros((2, 8, 8, 1)), chosen.condition(jnp.array([4, 4]))
    guided = guided_flow_map(flow_map, build.settings_of_sampling(config), chosen)
    u = guided(x, jnp.array([0.25, 0.75]), jnp.zeros(2), y)
    # 10 is the null label: 10 + 3 (4 - 10) inside of the interval, 4 outside.
    np.testing.assert_allclose(u[:, 0, 0, 0], [-8.0, 4.0])
