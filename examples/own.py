"""Components of your own that a config file brings along, one of each kind that a run has.

    dmf train --config=examples/own.py --workdir=runs/own

docs/extending.md explains each part; examples/own_autoencoder.py has an autoencoder.
"""

import csv
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import ConfigDict

from dmf import default_config
from dmf.data.datasets import Dataset, InMemoryDataset, open_dataset
from dmf.errors import InputError, check_at_least, check_between
from dmf.evaluation import Metric, MetricInput, Protocol
from dmf.models.simple_network import SimpleNetwork
from dmf.objectives import LINEAR, Guidance, MeanFlow, Objective
from dmf.objectives.interpolants import Interpolant
from dmf.objectives.path_sample import Draws, path_sample
from dmf.objectives.time_samplers import TimeSampler
from dmf.registry import component_field, register
from dmf.sampling.samplers import Sampler, velocity_at
from dmf.training.callback import Callback
from dmf.training.optimizer import Optimizer, check_decay_rates, check_weight_decay
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


register("time_sampler", powers=Powers)


# An objective draws, and computes a loss for each sample from what it has drawn.
@dataclasses.dataclass(frozen=True, kw_only=True)
class Huber(Objective):
    """Flow matching by the pseudo-Huber distance, in which outliers weigh less. The first steps
    draw uniform times.

    Attributes:
      interpolant: the path between data and noise.
      time_sampler: distribution of t after the first steps.
      uniform_steps: number of the first steps, whose t is uniform, 0 or more.
      label_dropout: probability in [0, 1] that the label of a sample is dropped.
      delta: root mean square error above which the loss grows linearly, positive.
    """

    interpolant: Interpolant = component_field("interpolant", LINEAR)
    time_sampler: TimeSampler = component_field("time_sampler", Powers(power=0.5))
    uniform_steps: int = 0
    label_dropout: float = 0.1
    delta: float = 0.1

    def __post_init__(self):
        check_at_least(self, 0, "uniform_steps")
        check_between(self, 0.0, 1.0, "label_dropout")
        check_between(self, 1e-6, 1e6, "delta")

    def draw(self, key, batch, step=None):
        time_key, uniform_key, noise_key, label_key = jax.random.split(key, 4)
        count = len(batch.x)
        t = self.time_sampler(time_key, count, self.interpolant)
        if step is not None:  # None stands for a step after every warm-up.
            uniform = jax.random.uniform(uniform_key, (count,))
            t = jnp.where(step < self.uniform_steps, uniform, t)
        noise = jax.random.normal(noise_key, batch.x.shape)
        dropped = jax.random.bernoulli(label_key, self.label_dropout, (count,))
        return Draws(noise, t, t, dropped)

    def loss(self, network, params, batch, draws, frozen_params):
        sample = path_sample(self.interpolant, network, batch, draws)
        u = network.apply(params, sample.x_t, sample.t, sample.t, sample.y)
        error = jnp.mean((u - sample.v_t) ** 2, axis=(1, 2, 3))
        loss = jnp.sqrt(error + self.delta**2) - self.delta
        return loss, {"flow_matching_error": error}

    def flops(self, network):
        return 3 * network.flops.forward


register("objective", huber=Huber)


# A weighting turns the squared error of a sample into its loss.
@dataclasses.dataclass(frozen=True, kw_only=True)
class LogWeighting:
    """log(m + offset) of the mean squared error m.

    Attributes:
      offset: bounds the loss from below, positive.
    """

    offset: float = 1e-3

    def __post_init__(self):
        check_between(self, 1e-12, 1e6, "offset")

    def __call__(self, error, size, phi=None):
        return jnp.log(error / size + self.offset)


register("weighting", log=LogWeighting)


# Guidance in training chooses the coefficients omega and kappa of the guided velocity.
@dataclasses.dataclass(frozen=True, kw_only=True)
class FallingGuidance(Guidance):
    """Guidance by the network's own velocities, whose scale falls linearly from `scale` at t = 0 to
    1 at t = 1.

    Attributes:
      scale: guidance scale at t = 0, 1 or more.
    """

    scale: float = 2.0
    needs_conditional = False

    def __post_init__(self):
        check_between(self, 1.0, 1000.0, "scale")

    def coefficients(self, t, dropped, guidance=None):
        omega = jnp.where(dropped, 1.0, self.scale + (1 - self.scale) * t)
        return omega, jnp.zeros_like(t)


register("guidance", falling=FallingGuidance)


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


register("model", perceptron=Perceptron)


# A dataset is a function that returns a `Dataset`: images or moments of latents, and labels.
def negatives(*, split: str, directory: str) -> Dataset:
    """The digits, black on white."""
    digits = open_dataset("digits", split=split, directory=directory)
    rows = digits.read(range(len(digits)))
    rows["x"] = 255 - rows["x"]
    return InMemoryDataset(name="negatives", num_classes=10, rows=rows)


register("dataset", negatives=negatives)


# A sampler takes one step. This one also guides: y.null() is the condition without the label.
@dataclasses.dataclass(frozen=True, kw_only=True)
class GuidedEuler(Sampler):
    """Euler steps under classifier-free guidance, whose scale rises linearly from 1 at t = 1 to
    `scale` at t = 0.

    Attributes:
      scale: guidance scale at t = 0, from 0 to 1000.
    """

    scale: float = 1.5

    def __post_init__(self):
        check_between(self, 0.0, 1000.0, "scale")

    def step(self, flow_map, x, t, t_next, y, noise=None, carry=()):
        u, u_null = (velocity_at(flow_map, x, t, t_next, each) for each in (y, y.null()))
        scale = self.scale + (1 - self.scale) * t
        return x + (t_next - t) * (u_null + scale * (u - u_null)), carry


register("sampler", guided_euler=GuidedEuler)


# An optimizer is an update rule of Optax; learning rates, clipping and groups are inherited.
@dataclasses.dataclass(frozen=True, kw_only=True)
class AdaBelief(Optimizer):
    """AdaBelief of Optax (arXiv:2010.07468), with decoupled weight decay.

    Attributes:
      b1: decay rate of the first moment, in [0, 1).
      b2: decay rate of the second moment, in [0, 1).
      weight_decay: decoupled weight decay, multiplied by the learning rate; 0 for none.
    """

    b1: float = 0.9
    b2: float = 0.999
    weight_decay: float = 0.0

    def __post_init__(self):
        super().__post_init__()
        check_decay_rates(self, "b1", "b2")
        check_weight_decay(self)

    def update_rule(self):
        return optax.chain(
            optax.scale_by_belief(b1=self.b1, b2=self.b2),
            optax.add_decayed_weights(self.weight_decay),
            optax.scale_by_learning_rate(self.rate),
        )


register("optimizer", ada_belief=AdaBelief)


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


register("writer", loss_table=LossTable)


# A callback is called after the steps that it chooses.
class ParameterNorm(Callback):
    """The norm of all parameters after every hundredth step and the last one, as a metric."""

    def __init__(self, config, training, workdir):
        self._last = training.run.steps

    def due(self, step):
        return step % 100 == 0 or step == self._last

    def __call__(self, step, state):
        self.writers.write(step, {"parameter_norm": float(optax.tree.norm(state.params))})


register("callback", parameter_norm=ParameterNorm)


# A metric computes a number; a protocol names metrics, and says how the images are made.
def brightness_gap(reference: MetricInput, samples: MetricInput) -> float:
    """Difference of the mean pixels of all images, in levels of 255."""
    gap = np.mean(samples.moments.mean) - np.mean(reference.moments.mean)
    return float(abs(gap) * 127.5)  # Pixels are features from -1 to 1.


register("metric", brightness_gap=Metric(
    description="Difference of the mean pixels of all images, in levels of 255.",
    title="Brightness gap", features="pixels", needs=("moments",), higher_is_better=False,
    compute=brightness_gap,
))  # fmt: skip
register("protocol", brightness=Protocol(
    metrics=("fd_pixels", "brightness_gap"), rounding="nearest", label_sampling="balanced",
))  # fmt: skip


OBJECTIVES = {
    "huber": Huber(uniform_steps=100),
    "mean_flow": MeanFlow(weighting=LogWeighting(), guidance=FallingGuidance(scale=2.0)),
}


def get_config(objective: str = "huber") -> ConfigDict:
    """The default config with these components; --config=examples/own.py:mean_flow chooses the
    other objective."""
    config = default_config.get_config()
    config.model = default_config.component(Perceptron(hidden=256))
    config.objective = default_config.component(OBJECTIVES[objective])
    config.optimizer = default_config.component(AdaBelief(learning_rate=1e-3))
    config.data.name = "negatives"
    config.sampling.sampler = default_config.component(GuidedEuler(scale=1.5))
    config.evaluation.protocol = "brightness"
    config.run.writers = ("jsonl", "tensorboard", "loss_table")
    config.run.callbacks = ("parameter_norm",)
    config.emas.main.decay = 0.99
    return config
