"""What a component of one's own returns is checked: one line names it, and what would be right."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import plugin_files
import pytest
import small_network
import tiny
from etils import epath
from two_layers import TwoLayers

from configs import __main__ as recipes_page
from dmf import registry
from dmf.data.build import data, dataset
from dmf.data.datasets import InMemoryDataset
from dmf.errors import InputError
from dmf.evaluation.metric import score
from dmf.objectives import FlowMatching, Guidance, OrderedPair, UniformTime
from dmf.objectives.build import objective_of_run
from dmf.objectives.guidance import guided_velocity
from dmf.objectives.loss_weighting import weighted
from dmf.objectives.objective import terms_of
from dmf.objectives.time_checks import check_times
from dmf.sampling.samplers import Euler, Sampler, sample
from dmf.training.callback import Callback, open_callbacks
from dmf.training.network_check import check_network
from dmf.types import Batch


def component(**members):
    """A frozen dataclass object with these methods."""
    cls = type("Own", (members.pop("base", object),), members)
    return dataclasses.dataclass(frozen=True, kw_only=True)(cls)()


BATCH = Batch(jnp.zeros((4, 2, 2, 1)), jnp.zeros(4, jnp.int32))
LOSSES = jnp.zeros(4)


@pytest.mark.parametrize(("outputs", "told"), [
    ((jnp.float32(0), {}), "its loss has shape (); return one loss for each sample, here of shape "
     "(4,), as jnp.mean("),
    ((jnp.zeros((4, 2)), {}), "its loss has shape (4, 2); return one"),
    (LOSSES, "its loss must return two things"),
    ((LOSSES, LOSSES), "its loss must return two things"),
    ((LOSSES, {"error": jnp.float32(0)}), "its metric error has shape (); give one value for each"),
    ((LOSSES, {"error": jnp.zeros((4, 2))}), "its metric error has shape (4, 2); give one"),
    ((LOSSES, {"loss": LOSSES}), "its metric loss has the name of a metric of the training step"),
])  # fmt: skip
def test_a_loss_that_is_none_of_each_sample_is_refused(outputs, told):
    own = component(base=FlowMatching, loss=lambda *inputs: outputs)
    (term,) = terms_of(own, small_network.NETWORK, {}, BATCH, (), {})
    with pytest.raises(InputError) as error:
        term.loss({}, *term.inputs)
    assert str(error.value).startswith(f"objective=Own: {told}")


def test_losses_with_metrics_of_each_sample_pass():
    outputs = LOSSES, {"error": LOSSES, "error_bins": jnp.zeros((4, 2, 3))}
    own = component(base=FlowMatching, loss=lambda *inputs: outputs)
    (term,) = terms_of(own, small_network.NETWORK, {}, BATCH, (), {})
    assert term.loss({}, *term.inputs) is outputs


def drawing(value):
    return component(__call__=lambda self, key, count, path: value(count))


@pytest.mark.parametrize(("value", "told"), [
    (lambda n: jnp.full(n, 1.5), "it drew times from 1.5 to 1.5; times lie in [0, 1]"),
    (lambda n: jnp.linspace(-0.25, 1, n), "it drew times from -0.25 to 1; "),
    (lambda n: jnp.full(n, jnp.nan), "it drew times from nan to nan; "),
    (lambda n: jnp.float32(0.5), "of 4096 times it drew an array of shape (); return one time"),
    (lambda n: jnp.zeros((n, 1)), "of 4096 times it drew an array of shape (4096, 1); "),
])  # fmt: skip
def test_a_time_sampler_that_draws_no_times_is_refused(value, told):
    with pytest.raises(InputError) as error:
        check_times(FlowMatching(time_sampler=drawing(value)))
    assert str(error.value).startswith(f"time_sampler=Own: {told}")


def test_times_within_pairs_and_pairs_are_checked_too():
    late = drawing(lambda n: jnp.full(n, 2.0))
    holder = component(__annotations__={"pair": object}, pair=registry.component_field(
        "time_pair", OrderedPair(first=UniformTime(), second=late)))
    with pytest.raises(InputError, match=r"^pair.second=Own: it drew times from 2 to 2"):
        check_times(holder)
    for pair, told in (
        (lambda n: (jnp.zeros(n), jnp.ones(n)), r"pair=Own: it drew pairs with r > t; "),
        (lambda n: jnp.zeros(n), r"pair=Own: it returned a .*; return two arrays, \(t, r\)"),
    ):
        with pytest.raises(InputError, match=told):
            check_times(dataclasses.replace(holder, pair=drawing(pair)))
    check_times(dataclasses.replace(holder, pair=drawing(lambda n: (jnp.ones(n), jnp.zeros(n)))))


def test_a_run_checks_its_times_before_it_is_built():
    late = drawing(lambda n: jnp.full(n, 2.0))
    with plugin_files.registered_components():
        registry.register("time_sampler", late=type(late))
        with pytest.raises(InputError, match=r"^objective.time_sampler=Own: it drew times from 2"):
            objective_of_run({"name": "flow_matching", "time_sampler": "late"}, 8)


def test_losses_of_a_weighting_have_the_shape_of_the_errors():
    own = component(__call__=lambda self, error, size, phi=None: error.mean())
    with pytest.raises(InputError, match=r"^objective.weighting=Own: its losses have shape \(\);"):
        weighted(own, LOSSES, 4)
    assert not component(base=FlowMatching, weighting=own).learned_variance


@pytest.mark.parametrize("coefficients", [(1.0, 0.0), (LOSSES, jnp.float32(0)), LOSSES])
def test_coefficients_of_guidance_are_of_each_sample(coefficients):
    own = component(base=Guidance, coefficients=lambda *inputs: coefficients)
    with pytest.raises(InputError, match=r"^objective.guidance=Own: its coefficients have shapes "):
        guided_velocity(own, LOSSES, LOSSES > 0, BATCH.x, BATCH.x)


def step(after):
    def method(self, flow_map, x, t, t_next, y, noise=None, carry=()):
        return after(x, carry)

    return component(base=Sampler, step=method)


@pytest.mark.parametrize(("sampler", "told"), [
    (step(lambda x, carry: (x[..., 0], carry)),
     "its step returned x of shape and dtype (4, 2, 2) float32; return x at t_next, as "
     "(4, 2, 2, 1) float32"),
    (step(lambda x, carry: (x.astype(jnp.float16), carry)), "its step returned x of shape and "),
    (step(lambda x, carry: x), "its step returned a "),
    (step(lambda x, carry: (x, x)), "its step returned another carry than init, of the shapes "),
    (component(base=Euler, schedule=lambda self, steps, shift: jnp.ones(steps)),
     "its schedule has shape (2,); 2 steps have 3 times, from 1 to 0"),
    (component(base=Euler, schedule=lambda self, steps, shift: jnp.linspace(0.0, 1.0, 3)),
     "its schedule goes from 0 to 1; times fall from 1 to 0"),
    (component(base=Euler, schedule=lambda self, steps, shift: jnp.array([1.0, 1.5, 0.0])),
     "its schedule goes from 1 to 0; times fall from 1 to 0"),
])  # fmt: skip
def test_a_sampler_that_takes_no_steps_is_refused(sampler, told):
    with pytest.raises(InputError) as error:
        sample(lambda x, t, r, y: x, BATCH.x, BATCH.y, steps=2, sampler=sampler)
    assert str(error.value).startswith(f"sampler=Own: {told}")


@pytest.mark.parametrize(("value", "told"), [
    ("high", "metric gap='high': it must compute one number, and computed a str"),
    (None, "metric gap=None: it must compute one number, and computed a NoneType"),
    (np.ones(2), "metric gap=array([1., 1.]): .* computed an array of shape (2,)"),
])  # fmt: skip
def test_a_metric_that_computes_no_number_is_refused(value, told):
    with pytest.raises(InputError) as error:
        score("gap", value)
    assert str(error.value).split(": ")[0] == told.split(": ")[0]
    assert str(error.value).endswith(told.split(".* ")[-1])


def test_numbers_of_every_kind_are_scores():
    assert [score("gap", value) for value in (2, np.float32(2), jnp.float32(2))] == [2.0] * 3


class Flat(TwoLayers):
    def apply(self, params, x_t, t, r, y):
        return x_t[..., 0]


class Listed(TwoLayers):
    def init(self, key):
        return {"layers": [jnp.zeros(2)]}


class Half(TwoLayers):
    def init(self, key):
        return jax.tree.map(lambda leaf: leaf.astype(jnp.float16), super().init(key))


@pytest.mark.parametrize(("network", "told"), [
    (Flat, r"its apply returned u of shape \(4, 2, 2\); return .* of x_t, \(4, 2, 2, 1\)"),
    (Listed, "its init must return nested dictionaries of arrays"),
    (Half, "its parameter in has dtype float16; parameters are float32"),
])
def test_a_network_that_is_no_flow_map_is_refused(network, told):
    with pytest.raises(InputError, match=f"^model={network.__name__}: {told}"):
        check_network(network(side=2), BATCH)
    check_network(TwoLayers(side=2), BATCH)


def test_datasets_that_are_none_are_refused():
    x, y = np.zeros((2, 4, 4, 1)), np.zeros(2, np.int32)
    with pytest.raises(InputError, match=r'^dataset=grey: "x" has dtype float64; images are uint8'):
        InMemoryDataset(name="grey", num_classes=1, rows={"x": x, "y": y})
    with pytest.raises(InputError, match=r"^dataset=grey: its rows differ in number, {'x': 2, 'y'"):
        InMemoryDataset(name="grey", num_classes=1, rows={"x": x.astype(np.uint8), "y": y[:1]})
    with plugin_files.registered_components():
        registry.register("dataset", arrays=lambda *, split, directory: x)
        settings = data(tiny.config({"data.name": "arrays"}).data)
        with pytest.raises(InputError, match=r"^data.name=arrays: its function returned a ndarray"):
            dataset(settings, small_network.NETWORK)


class Quiet(Callback):
    def due(self, step):
        return False

    def __call__(self, step, state):
        """Nothing."""


RUN = (None, None, epath.Path("run"))


def test_callbacks_are_opened_by_their_names():
    with plugin_files.registered_components():
        with pytest.raises(InputError, match=r"^run.callbacks=quiet: give the file that registers"):
            open_callbacks(("quiet",), *RUN)
        registry.register("callback", quiet=Quiet)
        (opened,) = open_callbacks(("quiet",), *RUN)
        assert isinstance(opened, Quiet)
        with pytest.raises(InputError, match=r"^run.callbacks=quiet: it is given twice"):
            open_callbacks(("quiet", "quiet"), *RUN)


@pytest.mark.parametrize(("kind", "base"), [
    ("objective", "dmf.objectives.objective.Objective"), ("callback", "Callback"),
    ("sampler", "Sampler"), ("optimizer", "Optimizer"), ("guidance", "Guidance"),
    ("metric", "Metric"), ("protocol", "Protocol"),
])  # fmt: skip
def test_a_class_of_another_base_is_refused(kind, base):
    with pytest.raises(InputError, match=rf"^{kind}.own=TwoLayers: derive the class .*{base}$"):
        registry.register(kind, own=TwoLayers)


def test_help_about_the_page_of_recipes_writes_nothing(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(recipes_page, "PAGE", tmp_path / "page.md")
    with pytest.raises(SystemExit):
        recipes_page.main(["--help"])
    assert "Writes docs/recipes.md" in capsys.readouterr().out
    assert not (tmp_path / "page.md").exists()
