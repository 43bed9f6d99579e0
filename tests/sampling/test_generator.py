"""The noise of samples: each sample and each step has its own, whatever else is sampled. And
guidance that is chosen when a compiled program is called."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_network

from dmf.errors import InputError
from dmf.models.simple_network import SimpleNetwork
from dmf.runtime.sharding import local_mesh
from dmf.sampling import generator
from dmf.sampling.build import Sampling
from dmf.sampling.generator import Generator, image_function, sample_function
from dmf.sampling.guidance import SamplingGuidance
from dmf.sampling.samplers import EulerMaruyama, Heun, Restart, call_times
from dmf.types import GuidedCondition

COUNT = 64


class Still(SimpleNetwork):
    """A flow map that leaves samples where they are; at t = 1 it leads to `start` times them."""

    num_classes, sample_shape = 0, (4, 4, 1)

    def init(self, key):
        return {"start": jnp.ones(())}

    def apply(self, params, x_t, t, r, y):
        return jnp.where(t[:, None, None, None] == 1, 1 - params["start"], 0.0) * x_t


def sampled(*, steps: int, start: float, indices=range(COUNT), seed: int = 0) -> np.ndarray:
    settings = Sampling(sampler=Restart())
    function = jax.jit(sample_function(Still(), settings, steps=steps))
    indices = jnp.asarray(indices, jnp.int32)
    return np.asarray(
        function({"start": jnp.float32(start)}, indices, jnp.zeros_like(indices), seed)
    )


def test_noise_differs_between_samples_and_steps():
    """With times 1, 2/3, 1/3, 0 the noise is added by hand: x = (1 - t) x_0 + t noise."""
    first = sampled(steps=1, start=1.0)
    second = sampled(steps=2, start=0.0) / 0.5
    third = (sampled(steps=3, start=0.0) - 2 / 3 * 2 / 3 * second) * 3
    noise = np.stack([first, second, third])
    np.testing.assert_allclose(noise.std(axis=(1, 2, 3, 4)), 1.0, atol=0.1)
    rows = noise.reshape(3, -1)
    assert np.abs(np.corrcoef(rows) - np.eye(3)).max() < 0.15
    assert len(np.unique(noise.reshape(3 * COUNT, -1).round(3), axis=0)) == 3 * COUNT


def test_noise_of_a_sample_depends_on_its_index_and_the_seed_alone():
    whole = sampled(steps=2, start=0.5)
    np.testing.assert_allclose(sampled(steps=2, start=0.5, indices=[5, 3]), whole[[5, 3]],
                               rtol=1e-5, atol=1e-6)
    assert np.abs(sampled(steps=2, start=0.5, seed=1) - whole).mean() > 0.1


INDICES, LABELS = np.arange(6, dtype=np.int32), np.asarray([0, 1, 2, 3, 9, 10], np.int32)
GUIDANCES = [SamplingGuidance(scale=scale, interval=(start, end)) for scale, start, end in (
    (1.0, 0.0, 1.0), (2.0, 0.4, 0.65), (3.0, 0.6, 1.0), (3.0, 0.0, 0.2),
)]  # fmt: skip


@pytest.mark.parametrize("guided", [False, True], ids=["classifier_free", "autoguidance"])
def test_generators_under_other_guidance_share_two_programs(guided, monkeypatch):
    made = []
    compiled = generator.map_over_devices
    monkeypatch.setattr(generator, "map_over_devices",
                        lambda *parts: made.append(parts) or compiled(*parts))  # fmt: skip
    params = small_network.PARAMS
    worse = small_network.NETWORK.init(jax.random.key(8))
    settings = Sampling(shift=1.1 + guided / 10)  # so that no earlier test has compiled them
    guide = (small_network.NETWORK, worse) if guided else None
    base = Generator(small_network.NETWORK, settings, None, mesh=local_mesh(1), guide=guide)
    given = {"network": params} | ({"guide": worse} if guided else {})
    images = {}
    for guidance in GUIDANCES:
        images[guidance] = base.with_guidance(guidance)(params, steps=2)(INDICES, LABELS).images
    assert len(made) == 2, "one without guidance, and one for all that have an interval"
    unguided, *others, outside = images.values()
    for each in others:
        assert np.abs(np.asarray(each, int) - unguided).max() > 1
    np.testing.assert_array_equal(outside, unguided)
    alone = Sampling(shift=settings.shift, guidance=GUIDANCES[1])
    function = image_function(small_network.NETWORK, alone, None, steps=2,
                              guide=small_network.NETWORK if guided else None)  # fmt: skip
    expected = function(given, jnp.asarray(INDICES), jnp.asarray(LABELS), 0).images
    assert np.abs(np.asarray(images[GUIDANCES[1]], int) - expected).max() <= 1


def test_guidances_with_the_same_effect_are_found():
    base = Generator(small_network.NETWORK, Sampling(), None, mesh=local_mesh(1))
    none, middle, first, outside = (base.with_guidance(g).guidance_effect for g in GUIDANCES)
    assert none(1) == middle(1) == outside(1) == none(2) == outside(2)
    assert len({none(2), middle(2), first(2)}) == 3
    wider = base.with_guidance(SamplingGuidance(scale=2.0, interval=(0.3, 0.7))).guidance_effect
    assert wider(2) == middle(2) and wider(3) != middle(3), "a step at 1/3"
    with small_network.registered():
        before = base.identity
        after = base.with_guidance(GUIDANCES[1]).identity
    assert after["model"] == before["model"]
    assert after["sampling"]["guidance"] == {"scale": 2.0, "interval": (0.4, 0.65), "channels": 0}


@pytest.mark.parametrize("sampler", [Restart(), Heun(), EulerMaruyama(last_time=0.5)])
def test_the_times_at_which_samplers_call_the_flow_map(sampler):
    assert call_times(sampler, 2) == pytest.approx((1.0, 0.5))
    assert call_times(sampler, 2, 2.0) == pytest.approx((1.0, 2 / 3))


class Asked(SimpleNetwork):
    """A flow map that takes guidance as an input and leads to (scale + start + end) / 10."""

    num_classes, sample_shape, guidance_input = 0, (1, 1, 1), True

    def init(self, key):
        return {}

    def apply(self, params, x_t, t, r, y):
        asked = sum(y.guidance) if isinstance(y, GuidedCondition) else t
        return x_t - asked[:, None, None, None] / 10


def test_guidance_as_an_input_has_one_program_and_no_guide(monkeypatch):
    made = []
    compiled = generator.map_over_devices
    monkeypatch.setattr(generator, "map_over_devices",
                        lambda *parts: made.append(parts) or compiled(*parts))  # fmt: skip
    network = Asked()
    base = Generator(network, Sampling(), None, mesh=local_mesh(1))
    for guidance in GUIDANCES:
        images = base.with_guidance(guidance)({}, steps=1)(INDICES, LABELS).images
        np.testing.assert_allclose(images / 127.5 - 1, sum(guidance.values) / 10, atol=0.01)
    assert len(made) == 1
    assert len({base.with_guidance(g).guidance_effect(1) for g in GUIDANCES}) == len(GUIDANCES)
    with pytest.raises(InputError, match=r"^sampling\.guidance\.guide: .* as an input; leave"):
        Generator(network, Sampling(), None, mesh=local_mesh(1), guide=(network, {}))
    for scale in (0.0, 0.999):
        with pytest.raises(InputError, match=rf"^sampling\.guidance\.scale={scale}: .*from 1 on"):
            base.with_guidance(SamplingGuidance(scale=scale))
