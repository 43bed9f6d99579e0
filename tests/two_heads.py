"""A network with two heads and guidance as an input, whose programs compile in no time."""

import dataclasses

import jax
import jax.numpy as jnp

from dmf.models.simple_network import SimpleNetwork
from dmf.types import GuidanceInput, GuidedCondition


@dataclasses.dataclass(frozen=True, kw_only=True)
class TwoHeads(SimpleNetwork):
    """A perceptron of pixels, both times, label and guidance, with an output for u and one for v.

    Attributes:
      side: height and width of an image.
      hidden: width of the hidden layer.
      num_classes: number of class labels.
      prediction: "velocity" or "data".
      velocity_head: whether it has the output for v.
      guidance_input: whether the guidance is an input.
    """

    side: int = 4
    hidden: int = 12
    num_classes: int = 10
    prediction: str = "velocity"
    min_time: float = 0.05
    velocity_head: bool = True
    guidance_input: bool = True

    @property
    def sample_shape(self):
        return self.side, self.side, 1

    def init(self, key):
        inputs, keys = self.side**2 + 5 + self.num_classes + 1, jax.random.split(key, 3)
        return {
            "in": jax.random.normal(keys[0], (inputs, self.hidden)) / 2,
            "u": jax.random.normal(keys[1], (self.hidden, self.side**2)),
            "v": jax.random.normal(keys[2], (self.hidden, self.side**2)),
        }

    def apply(self, params, x_t, t, r, y):
        return self._velocity(params["u"], self._hidden(params, x_t, t, r, y), x_t, t)

    def apply_heads(self, params, x_t, t, r, y):
        hidden = self._hidden(params, x_t, t, r, y)
        return tuple(self._velocity(params[head], hidden, x_t, t) for head in "uv")

    def velocity(self, params, x_t, t, y):
        return self._velocity(params["v"], self._hidden(params, x_t, t, t, y), x_t, t)

    def _hidden(self, params, x_t, t, r, y):
        y = self.condition(y)
        if not isinstance(y, GuidedCondition):
            one = jnp.ones_like(t)
            y = GuidedCondition(y, GuidanceInput(one, jnp.zeros_like(t), one))
        labels = jax.nn.one_hot(y.condition.labels, self.num_classes + 1)
        numbers = jnp.stack([t, r, *y.guidance], axis=1)
        inputs = jnp.concatenate([x_t.reshape(-1, self.side**2), numbers, labels], axis=1)
        return jnp.tanh(inputs @ params["in"])

    def _velocity(self, head, hidden, x_t, t):
        predicted = (hidden @ head).reshape(x_t.shape)
        if self.prediction == "velocity":
            return predicted
        return (x_t - predicted) / jnp.maximum(t, self.min_time)[:, None, None, None]
