"""An objective, a time sampler, a network and a dataset of one's own, without touching the package.

    dmf train --config=examples/own.py --workdir=runs/own

docs/extending.md explains each part.
"""

import dataclasses

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from configs import default
from dmf.components import register
from dmf.data.sources import ResidentSource, Source, open_source
from dmf.models.undivided import Undivided
from dmf.objectives import FlowMatching


# A time sampler is called with a key, how many times to draw, and the path.
@dataclasses.dataclass(frozen=True, kw_only=True)
class Powers:
    """t = z^power with z uniform in [0, 1): large powers look at little noise."""

    power: float = 1.0

    def __call__(self, key, count, interpolant):
        return jax.random.uniform(key, (count,)) ** self.power


# An objective draws, and computes a loss for each sample; this one draws as flow matching does.
@dataclasses.dataclass(frozen=True, kw_only=True)
class Huber(FlowMatching):
    """Flow matching by the pseudo-Huber distance, which far outliers weigh less in."""

    delta: float = 0.1

    def loss(self, network, params, batch, draws, frozen):
        x_t = self.interpolant.mix(batch.x, draws.noise, draws.t)
        v_t = self.interpolant.velocity(batch.x, draws.noise, draws.t)
        y = jnp.where(draws.dropped, network.num_classes, batch.y)
        u = network.apply(params, x_t, draws.t, draws.t, y)
        error = jnp.mean((u - v_t) ** 2, axis=(1, 2, 3))
        loss = jnp.sqrt(error + self.delta**2) - self.delta
        return loss, {"flow_matching_error": error}


# A network makes parameters and applies them; `Undivided` gives it the rest of what a network has.
@dataclasses.dataclass(frozen=True, kw_only=True)
class Perceptron(Undivided):
    """Two layers that see all pixels, both times, and the label."""

    side: int = 8
    hidden: int = 256
    num_classes: int = 10

    @property
    def sample_shape(self):
        return self.side, self.side, 1

    def init(self, key):
        inputs, keys = self.side**2 + 2 + self.num_classes + 1, jax.random.split(key)
        return {
            "in": jax.random.normal(keys[0], (inputs, self.hidden)) / inputs**0.5,
            "out": jax.random.normal(keys[1], (self.hidden, self.side**2)) / self.hidden**0.5,
        }

    def apply(self, params, x_t, t, r, y):
        pixels = x_t.reshape(-1, self.side**2)
        labels = jax.nn.one_hot(y, self.num_classes + 1)
        given = jnp.concatenate([pixels, t[:, None], r[:, None], labels], axis=1)
        return (jax.nn.silu(given @ params["in"]) @ params["out"]).reshape(x_t.shape)


# A dataset is a function that opens a `Source`: rows of uint8 images or of moments, and labels.
def negatives(*, split: str, directory: str) -> Source:
    """The digits, black on white."""
    digits = open_source("digits", split=split, directory=directory)
    rows, labels = digits.read(range(len(digits)))
    return ResidentSource(name="negatives", num_classes=10, rows=255 - rows, all_labels=labels)


# What a config calls them. Their fields stand beside the name.
register("time", "powers", Powers)
register("objective", "huber", Huber)
register("model", "perceptron", Perceptron)
register("data", "negatives", negatives)


def get_config() -> ConfigDict:
    """The defaults, but for the four."""
    config = default.get_config()
    config.model = ConfigDict({"name": "perceptron", "hidden": 256})
    config.objective = ConfigDict({
        "name": "huber",
        "delta": 0.1,
        "time": {"name": "powers", "power": 0.5},
        "interpolant": "linear",
        "label_dropout": 0.1,
    })
    config.data.name = "negatives"
    config.optimizer.learning_rate = 1e-3
    config.emas.main.decay = 0.99
    return config
