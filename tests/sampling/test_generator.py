"""The noise of samples: each sample and each step has its own, whatever else is sampled."""

import jax
import jax.numpy as jnp
import numpy as np

from dmf.models.simple_network import SimpleNetwork
from dmf.sampling.build import Sampling
from dmf.sampling.generator import sample_function
from dmf.sampling.samplers import Restart

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
