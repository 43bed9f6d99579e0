"""The registry: every component is built by its name, and errors name the field in its place."""

import dataclasses

import jax
import pytest
from ml_collections import ConfigDict

from dmf import default_config, registry
from dmf.errors import InputError
from dmf.objectives import DecoupledMeanFlow, LogitNormal, OrderedPair, SelfGuidance, UniformTime
from dmf.objectives.interpolants import COSINE

# Fields that have no default.
REQUIRED = {
    "dinov2": {"width": 384, "depth": 12, "heads": 6},
    "dit": {"input_size": 8, "channels": 1, "depth": 2, "width": 32, "heads": 2, "num_classes": 10},
    "in_context_dit": {"input_size": 8, "channels": 1, "depth": 2, "head_depth": 1, "width": 32,
                       "heads": 2, "num_classes": 10},
    "ordered_pair": {"first": {"name": "uniform"}, "second": {"name": "logit_normal"}},
}
# Other tests register components too.
CLASSES = [
    (kind, name) for kind in registry.kinds()
    for name, component in registry.components(kind).items()
    if isinstance(component, type) and dataclasses.is_dataclass(component)
    and component.__module__.startswith("dmf.")
]


@pytest.fixture
def time_samplers(monkeypatch):
    """The table of time samplers is restored after the test."""
    monkeypatch.setitem(registry._COMPONENTS, "time_sampler",
                        dict(registry.components("time_sampler")))


@pytest.mark.parametrize(("kind", "name"), CLASSES)
def test_every_component_is_built_by_its_name(kind, name):
    component = registry.build(kind, {"name": name, **REQUIRED.get(name, {})})
    assert isinstance(component, registry.components(kind)[name])


@pytest.mark.parametrize(("kind", "name"), CLASSES)
def test_a_component_becomes_a_config_and_the_same_component_again(kind, name):
    component = registry.build(kind, {"name": name, **REQUIRED.get(name, {})})
    config = registry.to_config(component, kind)
    assert config["name"] == name
    assert registry.build(kind, ConfigDict(config)) == component
    assert registry.complete(kind, config) == config


@pytest.mark.parametrize(("kind", "name"), CLASSES)
def test_every_field_of_a_component_is_documented(kind, name):
    cls = registry.components(kind)[name]
    docs = registry.field_docs(cls)
    assert [field for field in registry.config_fields(cls) if not docs.get(field)] == []
    assert registry.summary(cls)


def test_every_field_of_a_config_is_documented():
    def undocumented(cls: type, place: str) -> list[str]:
        docs, missing = registry.field_docs(cls), []
        for name, field in registry.config_fields(cls).items():
            missing += [] if docs.get(name) else [f"{place}{name}"]
            group = registry.field_kind(field)
            if isinstance(group, type):
                missing += undocumented(group, f"{place}{name}.")
        return missing

    assert undocumented(default_config.Config, "") == []


def test_every_kind_has_a_description():
    assert registry.kinds()["sampler"]
    assert all(registry.kinds().values())


@pytest.mark.parametrize("name", ["linear", "cosine"])
def test_an_object_is_a_component_without_fields(name):
    interpolant = registry.components("interpolant")[name]
    assert registry.build("interpolant", name) is interpolant
    assert registry.build("interpolant", {"name": name}) is interpolant
    assert registry.to_config(interpolant, "interpolant") == name
    with pytest.raises(InputError, match="^alpha=1.0: .* has no such field; it has none"):
        registry.build("interpolant", {"name": name, "alpha": 1.0})


def test_a_name_alone_stands_for_the_defaults():
    assert registry.build("time_sampler", "logit_normal") == LogitNormal()
    pair = registry.build("time_pair", {
        "name": "ordered_pair", "first": "uniform", "second": "logit_normal",
    })
    assert pair == OrderedPair(first=UniformTime(), second=LogitNormal())


def test_inner_components_are_built_too():
    guidance = SelfGuidance(omega=1.0, kappa=0.6, interval=(0.1, 0.9))
    expected = DecoupledMeanFlow(guidance=guidance, interpolant=COSINE, label_dropout=0.2)
    config = registry.to_config(expected)
    assert config["interpolant"] == "cosine"
    assert config["guidance"]["name"] == "self"
    assert registry.build("objective", config) == expected


def test_defaults_are_those_of_the_dataclass():
    assert registry.default_config("time_sampler", "logit_normal") == {
        "name": "logit_normal", "mean": LogitNormal().mean, "std": LogitNormal().std,
    }
    assert "first" not in registry.default_config("time_pair", "ordered_pair")


def test_a_config_is_completed_by_defaults():
    config = registry.complete("objective", {
        "name": "flow_matching", "time_sampler": {"name": "logit_normal", "std": 2.0},
    })
    assert config["time_sampler"] == registry.to_config(LogitNormal(std=2.0))
    assert config["interpolant"] == "linear"


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("flow", "name=flow: choose one of .*flow_matching, improved_mean_flow, mean_flow"),
        ({}, "name=None: choose one of"),
        ({"name": "flow"}, "name=flow: choose one of .*decoupled_mean_flow, "),
        ({"time_sampler": "late"}, "time_sampler.name=late: choose one of logit_normal, uniform"),
        ({"time_sampler": {"name": "uniform", "std": 1.0}},
         "time_sampler.std=1.0: uniform has no such field; it has shift"),
        ({"time_sampler": {"name": "logit_normal", "st": 1.0}},
         "time_sampler.st=1.0: logit_normal has no such field; did you mean std?"),
        ({"time_sampler": {"name": "logit_normal", "std": -1.0}}, "time_sampler.std=-1.0: "),
        ({"time_samplers": "uniform"}, "time_samplers=uniform: .* did you mean time_sampler?"),
        ({"time_sampler": 3}, "time_sampler.*=3: give a dictionary of its fields, or the name"),
        ({"name": "mean_flow", "time_pair": "ordered_pair"},
         "time_pair.first: ordered_pair has no default for it; give one"),
        ({"name": "mean_flow", "time_pair": {"name": "ordered_pair", "first": "uniform",
                                             "second": {"name": "logit_normal", "std": 0.0}}},
         "time_pair.second.std=0.0: "),
    ],
)
def test_errors_name_the_field_in_its_place(config, message):
    if isinstance(config, dict) and config:
        config = {"name": "flow_matching", **config}
    with pytest.raises(InputError, match=f"^{message}") as error:
        registry.build("objective", config)
    assert "\n" not in str(error.value)
    with pytest.raises(InputError) as placed, registry.at("objective"):
        registry.build("objective", config)
    assert str(placed.value) == f"objective.{error.value}"


def test_a_plugin_registers_a_component(time_samplers):
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Late:
        after: float = 0.5

        def __call__(self, key, count, interpolant):
            return jax.random.uniform(key, (count,), minval=self.after)

    registry.register("time_sampler", late=Late)
    objective = {"name": "flow_matching", "time_sampler": {"name": "late", "after": 0.75}}
    assert registry.build("objective", objective).time_sampler == Late(after=0.75)
    assert registry.to_config(Late()) == {"name": "late", "after": 0.5}
    with pytest.raises(InputError, match="kind=clock: choose one of autoencoder"):
        registry.register("clock", late=Late)


def test_a_component_must_be_a_dataclass(time_samplers):
    class Plain:
        pass

    registry.register("time_sampler", plain=Plain, function=lambda key, count, path: None)
    for name in ("plain", "function"):
        for config in (name, {"name": name}):
            with pytest.raises(InputError, match=f"^name={name}: .* is no dataclass"):
                registry.build("time_sampler", config)


def test_an_unregistered_component_has_no_config():
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Unknown:
        field: int = 0

    with pytest.raises(InputError, match="kind=sampler: no component of this kind is a Unknown"):
        registry.to_config(Unknown(), "sampler")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 2**31, -(10**20)])
def test_numbers_that_no_field_takes_are_refused(value):
    """Wherever they stand: in a component, in one within it, in a list, or among named parts."""
    bad = str(value)
    for kind, config, field in (
        ("time_sampler", {"name": "logit_normal", "mean": value}, "mean"),
        ("objective", {"name": "flow_matching",
                       "time_sampler": {"name": "logit_normal", "std": value}}, "time_sampler.std"),
        ("optimizer", {"name": "adamw", "weight_decay": value}, "weight_decay"),
        ("optimizer", {"name": "adamw", "warmup_steps": value}, "warmup_steps"),
    ):
        with pytest.raises(InputError) as error:
            registry.build(kind, config)
        assert str(error.value).startswith(f"{field}={bad}: give a ")
    with pytest.raises(InputError, match=r"^interval=\[0.1, .*\]: give a "):
        registry.build("guidance", {"name": "self", "interval": [0.1, value]})
