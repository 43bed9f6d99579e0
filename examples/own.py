"""A time sampler, an objective, a network, a dataset and a writer that a config file brings along.

    dmf train --config=examples/own.py --workdir=runs/own

docs/extending.md explains each part.
"""

import csv
import dataclasses

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from dmf import default_config
from dmf.data.datasets import Dataset, InMemoryDataset, open_dataset
from dmf.errors import InputError
from dmf.models.simple_network import SimpleNetwork
from dmf.objectives import FlowMatching
from dmf.objectives.path_sample import path_sample
from dmf.registry import register
from dmf.training.writers import Writer


# A time sampler is called with a key, the number of times to draw, and the path.
@dataclasses.dataclass(frozen=True, kw_only=True)
class Powers:
    """t = z^power with z uniform in [0, 1).

    Attributes:
      power: exponent, positive; larger values give less noisy samples.
    """

    power: float = 1.0

    def __post_init__(self):
        if not self.power > 0:
            raise InputError("power", self.power, "give a positive number")

    def __call__(self, key, count, interpolant):
        return jax.random.uniform(key, (count,)) ** self.power


# An objective draws, and computes a loss for each sample. This one draws as flow matching does.
@dataclasses.dataclass(frozen=True, kw_only=True)
class Huber(FlowMatching):
    """Flow matching by the pseudo-Huber distance, in which outliers weigh less.

    Attributes:
      delta: root mean square error above which the loss grows linearly, positive.
    """

    delta: float = 0.1

    def loss(self, network, params, batch, draws, frozen_params):
        sample = path_sample(self.interpolant, network, batch, draws)
        u = network.apply(params, sample.x_t, sample.t, sample.t, sample.y)
        error = jnp.mean((u - sample.v_t) ** 2, axis=(1, 2, 3))
        loss = jnp.sqrt(error + self.delta**2) - self.delta
        return loss, {"flow_matching_error": error}


# A network has parameters and applies them; `SimpleNetwork` has the other methods of a network.
@dataclasses.dataclass(frozen=True, kw_only=True)
class Perceptron(SimpleNetwork):
    """Two layers whose inputs are all pixels, both times, and the label.

    Attributes:
      side: height and width of an image.
      hidden: width of the hidden layer.
      num_classes: number of class labels.
    """

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
        y = self.condition(y)
        pixels = x_t.reshape(-1, self.side**2)
        labels = jax.nn.one_hot(y.labels, self.num_classes + 1)
        inputs = jnp.concatenate([pixels, t[:, None], r[:, None], labels], axis=1)
        return (jax.nn.silu(inputs @ params["in"]) @ params["out"]).reshape(x_t.shape)


# A dataset is a function that returns a `Dataset`: images or moments of latents, and labels.
def negatives(*, split: str, directory: str) -> Dataset:
    """The digits, black on white."""
    digits = open_dataset("digits", split=split, directory=directory)
    rows = digits.read(range(len(digits)))
    rows["x"] = 255 - rows["x"]
    return InMemoryDataset(name="negatives", num_classes=10, rows=rows)


# A writer is called with the run when training starts or resumes.
class LossTable(Writer):
    """The loss of each logged step, in loss.csv in the workdir."""

    def __init__(self, run):
        self._file = (run.workdir / "loss.csv").open("a" if run.start_step else "w")
        self._table = csv.writer(self._file)

    def write(self, step, scalars):
        if "loss" in scalars:  # The scores of an evaluation come in a call of their own.
            self._table.writerow([step, scalars["loss"]])

    def close(self):
        self._file.close()


# The names that configs choose them by.
register("time_sampler", powers=Powers)
register("objective", huber=Huber)
register("model", perceptron=Perceptron)
register("dataset", negatives=negatives)
register("writer", loss_table=LossTable)


def get_config() -> ConfigDict:
    """The default config with these five components."""
    config = default_config.get_config()
    config.model = default_config.component(Perceptron(hidden=256))
    config.objective = default_config.component(Huber(time_sampler=Powers(power=0.5)))
    config.data.name = "negatives"
    config.run.writers = ("jsonl", "tensorboard", "loss_table")
    config.optimizer.learning_rate = 1e-3
    config.emas.main.decay = 0.99
    return config
