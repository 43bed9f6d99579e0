"""From a config to components: every name of the table is made, and what cannot be is named."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from ml_collections import ConfigDict

from configs import default
from dmf import build, components, guidance, loading, objectives, samplers, times, weighting
from dmf.flow import COSINE, LINEAR
from dmf.typing import InputError


@pytest.mark.parametrize(
    ("kind", "name"),
    [(kind, name) for kind, table in components.COMPONENTS.items() for name in table
     if kind not in ("model", "interpolant", "protocol")],
)
def test_every_component_is_made_by_its_name(kind, name):
    fields = {"name": name}
    if name == "ordered_pair":
        fields |= {"first": {"name": "uniform"}, "second": {"name": "logit_normal"}}
    if name == "dinov2":
        fields |= {"width": 384, "depth": 12, "heads": 6}
    made = components.component(kind, ConfigDict(fields), kind)
    assert isinstance(made, components.COMPONENTS[kind][name])


def test_components_hold_their_inner_components():
    config = tiny.flow_map()
    config.objective.guidance = default.self_guidance(1.0, 0.6, (0.1, 0.9))
    config.objective.interpolant = "cosine"
    made = build.objective(config)
    assert made == objectives.DecoupledMeanFlow(
        interpolant=COSINE,
        time=times.LogitNormal(mean=0.0, std=1.0),
        times=times.OrderedPair(
            first=times.LogitNormal(mean=0.4, std=1.0),
            second=times.LogitNormal(mean=-1.2, std=1.0),
            equal_share=0.0,
        ),
        guidance=guidance.SelfGuidance(omega=1.0, kappa=0.6, interval=(0.1, 0.9)),
        label_dropout=0.1,
        weighting=weighting.Cauchy(),
    )


def test_a_stochastic_sampler_follows_the_path_of_training():
    config = tiny.config({"objective.interpolant": "cosine"})
    config.sampling.sampler = ConfigDict({"name": "ctm", "gamma": 0.3})
    assert build.sampler(config) == samplers.ConsistencyTrajectory(gamma=0.3, interpolant=COSINE)
    config.objective.interpolant = "linear"
    assert build.sampler(config).interpolant == LINEAR


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda c: c.objective.update(name="flow"), "objective.name=flow: choose one of"),
        (lambda c: c.objective.update(interpolant="cubic"),
         "objective.interpolant=cubic: choose one of cosine, linear"),
        (lambda c: c.objective.time.update(name="beta"), "objective.time.name=beta: choose one"),
        (lambda c: c.objective.time.update(width=3.0),
         "objective.time.width=3.0: logit_normal has no such field; it has mean, std"),
        (lambda c: c.objective.weighting.update(power=1.0),
         "objective.weighting.power=1.0: uniform has no such field"),
        (lambda c: c.optimizer.update(name="lion"), "optimizer.name=lion: choose one of adamw"),
        (lambda c: c.emas.main.update(name="slow"), "emas.main.name=slow: choose one of"),
        (lambda c: c.sampling.update(sampler={"name": "rk4"}), "sampling.sampler.name=rk4: choose"),
        (lambda c: c.model.update(heads=3), "model.heads=3: it must divide model.width=32"),
    ],
)
def test_what_cannot_be_built_is_named(change, named):
    config = tiny.config().unlock()
    change(config)
    with pytest.raises(InputError, match=named.replace(".", r"\.")):
        build.training(config)
        build.sampler(config)


@pytest.mark.parametrize(
    ("field", "value", "named"),
    [
        ("time.std", -1.0, "objective.time.std=-1.0: a logit-normal"),
        ("times.first.std", 0.0, "objective.times.first.std=0.0: a logit-normal"),
        ("times.equal_share", 1.5, "objective.times.equal_share=1.5: a share"),
        ("guidance.kappa", 1.0, "objective.guidance.kappa=1.0: the effective"),
        ("guidance.interval", (0.7, 0.5), "objective.guidance.interval=(0.7, 0.5): give"),
        ("tangent.largest", -1.0, "objective.tangent.largest=-1.0: give 0"),
        ("work.null_parts", -1, "objective.work.null_parts=-1: give 0"),
        ("label_dropout", 2.0, "objective.label_dropout=2.0: a probability"),
        ("bins", -1, "objective.bins=-1: give 0"),
        ("weighting", {"name": "adaptive", "offset": 0.0},
         "objective.weighting.offset=0.0: it is positive"),
        ("time", "late", "objective.time=late: choose one of logit_normal, uniform; or give the"),
        ("times", "ordered_pair",
         "objective.times.first: ordered_pair has no default for it; give one"),
        ("interpolant", {"name": "linear", "alpha": 1.0},
         "objective.interpolant.alpha=1.0: linear has no such field; it has none"),
    ],
)
def test_what_a_component_refuses_is_named_by_where_it_stands(field, value, named):
    fields = tiny.flow_map().objective.to_dict()
    *parents, last = field.split(".")
    functools.reduce(dict.__getitem__, parents, fields)[last] = value
    config = tiny.config(objective=ConfigDict(fields))
    with pytest.raises(InputError) as error:
        build.objective(config)
    assert str(error.value).startswith(named)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda c: c.emas.main.update(decay=1.0), "emas.main.decay=1.0: a decay"),
        (lambda c: c.sampling.update(sampler={"name": "ctm", "gamma": 2.0}),
         "sampling.sampler.gamma=2.0: the share"),
        (lambda c: c.optimizer.update(eps=0.0), "optimizer.eps=0.0: it is positive"),
        (lambda c: c.model.update(heads=3), "model.heads=3: it must divide model.width=32"),
    ],
)
def test_what_stands_elsewhere_is_named_once_and_whole(change, named):
    config = tiny.config().unlock()
    change(config)
    with pytest.raises(InputError) as error:
        build.recipe(config, build.mesh(config))
        build.sampler(config)
    assert str(error.value).startswith(named)


@pytest.mark.parametrize(
    ("field", "name", "expected"),
    [("weighting", "uniform", weighting.Uniform()), ("weighting", "cauchy", weighting.Cauchy()),
     ("time", "uniform", times.Uniform()), ("time", "logit_normal", times.LogitNormal()),
     ("interpolant", "cosine", COSINE)],
)  # fmt: skip
def test_a_component_by_its_name_is_one_without_fields(field, name, expected):
    for value in (name, {"name": name}):
        fields = default.flow_matching().to_dict() | {field: value}
        made = build.objective(tiny.config(objective=ConfigDict(fields)))
        assert getattr(made, field) == expected


def test_a_guidance_and_the_times_of_a_pair_may_be_given_by_name():
    fields = default.decoupled_mean_flow().to_dict() | {"guidance": "none"}
    fields["times"] = {"name": "ordered_pair", "first": "uniform", "second": "logit_normal"}
    made = build.objective(tiny.config(objective=ConfigDict(fields)))
    assert made.guidance == guidance.NoGuidance()
    assert made.times == times.OrderedPair(first=times.Uniform(), second=times.LogitNormal())


def test_what_is_no_dataclass_is_no_component(monkeypatch):
    class Plain:
        pass

    monkeypatch.setitem(components.COMPONENTS, "time", dict(components.COMPONENTS["time"]))
    for name, found in (("plain", Plain), ("function", lambda key, count, path: None)):
        components.register("time", name, found)
        for value, field in ((name, "time"), ({"name": name}, "time.name")):
            fields = default.flow_matching().to_dict() | {"time": value}
            with pytest.raises(InputError, match=f"^objective.{field}={name}: .*is no dataclass"):
                build.objective(tiny.config(objective=ConfigDict(fields)))


def test_a_config_may_bring_a_component_of_its_own(monkeypatch):
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Late:
        after: float = 0.5

        def __call__(self, key, batch_size, interpolant):
            return jax.random.uniform(key, (batch_size,), minval=self.after)

    monkeypatch.setitem(components.COMPONENTS, "time", dict(components.COMPONENTS["time"]))
    components.register("time", "late", Late)
    config = tiny.config(objective=default.flow_matching(ConfigDict({"name": "late"})))
    config.objective.time.after = 0.75
    assert build.objective(config).time == Late(after=0.75)
    with pytest.raises(InputError, match="kind=clock: choose one of"):
        components.register("clock", "late", Late)


def test_a_loaded_flow_map_is_the_network_at_its_average():
    import dmf

    flow_map, config = dmf.load(tiny.flow_map_run())
    network, _, params = loading.load_network(tiny.flow_map_run(), "main")
    live = loading.load_network(tiny.flow_map_run(), "")[2]
    x = jax.random.normal(jax.random.key(0), (8, 8, 8, 1))
    t, r, y = jnp.linspace(0.3, 1.0, 8), jnp.linspace(0.0, 0.3, 8), jnp.arange(8)
    u = flow_map(x, t, r, y)
    np.testing.assert_array_equal(u, network.apply(params, x, t, r, y))
    assert np.abs(u - network.apply(live, x, t, r, y)).max() > 1e-6
    assert config.model.split_depth == 1
    assert config.objective.name == "decoupled_mean_flow"


def test_guidance_of_a_config_reaches_the_flow_map():
    config = tiny.config({"sampling.guidance.scale": 3.0, "sampling.guidance.interval": (0.0, 0.5)})

    def flow_map(x_t, t, r, y):
        return jnp.broadcast_to(y[:, None, None, None].astype(jnp.float32), x_t.shape)

    x, y = jnp.zeros((2, 8, 8, 1)), jnp.array([4, 4])
    u = build.guided(config, flow_map, 10)(x, jnp.array([0.25, 0.75]), jnp.zeros(2), y)
    # 10 is the null label: 10 + 3 (4 - 10) inside, 4 outside.
    np.testing.assert_allclose(u[:, 0, 0, 0], [-8.0, 4.0])
