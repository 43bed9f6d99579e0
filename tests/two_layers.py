"""A network of two layers, whose programs compile in a fraction of the time of a transformer's."""

import dataclasses

import jax
import jax.numpy as jnp

from dmf.models.simple_network import SimpleNetwork


@dataclasses.dataclass(frozen=True, kw_only=True)
class TwoLayers(SimpleNetwork):
    """A perceptron of pixels, both times and the label; it curves in each of them.

    Attributes:
      side: height and width of an image.
      hidden: width of the hidden layer.
      num_classes: number of class labels.
    """

    side: int = 8
    hidden: int = 12
    num_classes: int = 10

    @property
    def sample_shape(self):
        return self.side, self.side, 1

    def init(self, key):
        inputs, keys = self.side**2 + 2 + self.num_classes + 1, jax.random.split(key, 3)
        return {
            "in": jax.random.normal(keys[0], (inputs, self.hidden)) / 2,
            "out": jax.random.normal(keys[1], (self.hidden, self.side**2)),
            "log_variance": jax.random.normal(keys[2], (2,)),
        }

    def apply(self, params, x_t, t, r, y):
        labels = jax.nn.one_hot(self.condition(y).labels, self.num_classes + 1)
        pixels = x_t.reshape(-1, self.side**2)
        inputs = jnp.concatenate([pixels, t[:, None], r[:, None], labels], axis=1)
        return (jnp.tanh(inputs @ params["in"]) @ params["out"]).reshape(x_t.shape)

    def log_variance(self, params, t, r):
        return jnp.stack([t, r], axis=1) @ params["log_variance"]
