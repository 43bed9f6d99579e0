"""A condition that is no class label: how much ink a digit has, and where its centre of mass lies.

    dmf train --config=examples/vector_condition.py --workdir=runs/vector --config.run.steps=2000
    python examples/vector_condition.py runs/vector vector.png

The first command trains a flow map with MeanFlow from scratch. Its self guidance needs the null
condition, which is the absence of the vector. The second command samples it at several amounts of
ink, writes a grid of images in which the ink grows from left to right, and prints how closely the
ink of the images follows the ink that was requested.

Three things make a condition: a pytree with `count`, `drop` and `null`; a network that makes it of
what the dataset says of each sample, and embeds it; a dataset whose batches have that in `y`.
"""

import argparse
import dataclasses

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

import dmf
from dmf import default_config
from dmf.data import pixels
from dmf.data.datasets import Dataset, InMemoryDataset, open_dataset
from dmf.models.simple_network import SimpleNetwork
from dmf.objectives import AdaptiveWeighting, MeanFlow, SelfGuidance
from dmf.registry import register
from dmf.types import Condition

# Ink, and the row and the column of the centre of mass.
VALUES = 3


class VectorCondition(flax.struct.PyTreeNode):
    """A vector for each sample, as a condition; the null condition is its absence.

    Attributes:
      values: [b, d] float32 values, standardised.
      present: [b] bool, whether the network is told the values.
    """

    values: jax.Array
    present: jax.Array

    @property
    def count(self):
        return self.values.shape[0]

    def drop(self, dropped):
        return self.replace(present=self.present & ~dropped)

    def null(self):
        return self.replace(present=jnp.zeros_like(self.present))


@dataclasses.dataclass(frozen=True, kw_only=True)
class VectorPerceptron(SimpleNetwork):
    """A residual perceptron whose inputs are all pixels, both times, and a vector.

    Attributes:
      side: height and width of an image.
      width: width of the hidden layers.
      depth: number of residual layers.
    """

    side: int = 8
    width: int = 256
    depth: int = 3
    num_classes = 0  # It knows no class labels.

    @property
    def sample_shape(self):
        return self.side, self.side, 1

    def condition(self, y):
        """Vectors [b, d] as a condition; integers [b], which the commands of `dmf` give to every
        network without classes, become the null condition."""
        if isinstance(y, Condition):
            return y
        if jnp.issubdtype(y.dtype, jnp.integer):
            return VectorCondition(jnp.zeros((*y.shape, VALUES)), jnp.zeros(y.shape, bool))
        return VectorCondition(y, jnp.ones(y.shape[:1], bool))

    def example_condition(self):
        return self.condition(jnp.zeros((1, VALUES)))

    def init(self, key):
        sizes = {"in": (self.side**2 + 8 + VALUES + 1, self.width),
                 **{f"layer_{i}": (self.width, self.width) for i in range(self.depth)},
                 "out": (self.width, self.side**2)}
        keys = jax.random.split(key, len(sizes))
        return {name: jax.random.normal(key, size) / size[0] ** 0.5
                for key, (name, size) in zip(keys, sizes.items(), strict=True)}

    def apply(self, params, x_t, t, r, y):
        y = self.condition(y)
        # The vector is 0 where it is absent, and a last input says whether it is present.
        present = y.present[:, None].astype(x_t.dtype)
        times = jnp.stack([f(scale * time) for time in (t, t - r) for scale in (1, 4)
                           for f in (jnp.sin, jnp.cos)], axis=1)
        inputs = [x_t.reshape(x_t.shape[0], -1), times, present * y.values, present]
        hidden = jnp.concatenate(inputs, axis=1) @ params["in"]
        for i in range(self.depth):
            hidden += jax.nn.silu(hidden) @ params[f"layer_{i}"]
        return (jax.nn.silu(hidden) @ params["out"]).reshape(x_t.shape)


def measured(images: np.ndarray) -> np.ndarray:
    """[n, 3] the mean intensity of images in [0, 1], and the row and column of its centre of mass.

    Args:
      images: [n, h, w, 1] uint8.
    """
    ink = images[..., 0] / 255
    total = ink.sum((1, 2)) + 1e-6
    rows, columns = (np.arange(size) / (size - 1) for size in ink.shape[1:])
    return np.stack([
        ink.mean((1, 2)), ink.sum(2) @ rows / total, ink.sum(1) @ columns / total
    ], axis=1)


def digits_with_vectors(*, split: str, directory: str) -> Dataset:
    """The digits with their measured values, standardised, in place of labels."""
    digits = open_dataset("digits", split=split, directory=directory)
    x = digits.read(range(len(digits)))["x"]
    values = measured(x)
    y = ((values - values.mean(0)) / values.std(0)).astype(np.float32)
    return InMemoryDataset(name="digits_with_vectors", num_classes=0, rows={"x": x, "y": y})


register("model", vector_perceptron=VectorPerceptron)
register("dataset", digits_with_vectors=digits_with_vectors)


def get_config() -> ConfigDict:
    """MeanFlow from scratch, whose guidance contains the unconditional velocity."""
    config = default_config.get_config()
    config.model = default_config.component(VectorPerceptron())
    config.objective = default_config.component(MeanFlow(
        guidance=SelfGuidance(omega=1.0, kappa=0.3), weighting=AdaptiveWeighting(power=0.5),
        label_dropout=0.2,
    ))
    config.data.name = "digits_with_vectors"
    config.optimizer.learning_rate = 1e-3
    config.emas.main.decay = 0.99
    return config


def sampled(workdir: str, ink: np.ndarray, *, steps: int = 4, scale: float = 1.5) -> np.ndarray:
    """Images [n, 8, 8, 1] uint8 at given amounts of ink, their centre of mass in the middle.

    Args:
      workdir: a run of this file.
      ink: [n] amounts of ink in standard deviations from the mean of the digits.
      steps: number of sampling steps.
      scale: scale of classifier-free guidance, on top of that of training; 1 for none.
    """
    flow_map, _ = dmf.load(workdir)
    guided = dmf.classifier_free(flow_map, dmf.SamplingGuidance(scale=scale))
    values = np.zeros((len(ink), VALUES), np.float32)
    values[:, 0] = ink
    y = VectorCondition(jnp.asarray(values), jnp.ones(len(ink), bool))
    noise = jax.random.normal(jax.random.key(0), (len(ink), 8, 8, 1))
    return np.asarray(pixels.to_uint8(dmf.sample(guided, noise, y, steps=steps)))


def main(workdir: str, output: str) -> None:
    """Writes a grid in which the requested ink grows from left to right."""
    columns = np.linspace(-2, 2, 9, dtype=np.float32)
    ink = np.tile(columns, 20)
    images = sampled(workdir, ink)
    obtained = measured(images)[:, 0]
    for requested in columns:
        print(f"requested {requested:+.1f}  mean intensity {obtained[ink == requested].mean():.3f}")
    print(f"correlation of requested and obtained ink {np.corrcoef(ink, obtained)[0, 1]:.3f}")
    shown = images[: 6 * len(columns)]
    pixels.write_png(output, pixels.grid(shown, len(columns), zoom=4))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("workdir", help="a run of this file")
    parser.add_argument("output", help="a .png file to write")
    main(**vars(parser.parse_args()))
