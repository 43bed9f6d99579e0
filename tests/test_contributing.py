"""The skeletons of components in CONTRIBUTING.md are true to the code: they run as they stand."""

import dataclasses
import re
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

import dmf.default_config  # noqa: F401 - every room registers its components
from dmf import registry
from dmf.data.datasets import Dataset, InMemoryDataset
from dmf.evaluation.metric import Metric, MetricInput
from dmf.evaluation.running_statistics import Moments
from dmf.models import DiT
from dmf.models.encoders.autoencoder import Autoencoder
from dmf.models.encoders.latent_scaling import LatentScaling
from dmf.objectives import FlowMatching
from dmf.objectives.path_sample import path_sample
from dmf.sampling.samplers import Sampler, sample, velocity_at
from dmf.types import Batch, Condition

# What a skeleton imports at the top of its file.
IMPORTS = {
    "dataclasses": dataclasses, "jnp": jnp, "np": np, "flax": flax, "Any": Any,
    "register": registry.register, "FlowMatching": FlowMatching, "path_sample": path_sample,
    "Sampler": Sampler, "velocity_at": velocity_at, "Metric": Metric, "MetricInput": MetricInput,
    "LatentScaling": LatentScaling, "Dataset": Dataset, "InMemoryDataset": InMemoryDataset,
}  # fmt: skip


@pytest.fixture(autouse=True)
def skeletons(monkeypatch):
    """The names that the skeletons define; what they register is forgotten after the test."""
    tables = {kind: dict(table) for kind, table in registry._COMPONENTS.items()}
    monkeypatch.setattr(registry, "_COMPONENTS", tables)
    page = (tiny.ROOT / "CONTRIBUTING.md").read_text()
    names = {"__name__": __name__, **IMPORTS}
    for code in re.findall(r"```python\n(.*?)```", page, re.DOTALL):
        exec(code, names)
    return names


def test_the_objective_has_a_loss_per_sample():
    network = DiT(input_size=4, channels=1, depth=1, width=8, heads=1, num_classes=10)
    objective = registry.build("objective", {"name": "absolute_flow_matching"})
    batch = Batch(jnp.ones((3, 4, 4, 1)), jnp.arange(3))

    @jax.jit
    def losses(key):
        draws = objective.draw(key, batch)
        return objective.loss(network, network.init(key), batch, draws, {})[0]

    # The network starts at 0, so that the errors are those of the velocity itself.
    assert losses(jax.random.key(1)).shape == (3,)
    assert (losses(jax.random.key(1)) > 0).all()


def test_the_sampler_has_second_order():
    """For dx/dt = x from t = 1 to 0, halving the steps divides the error by about 4."""
    midpoint = registry.build("sampler", "midpoint")
    noise, labels = jnp.ones((1, 1, 1, 1)), jnp.zeros(1, jnp.int32)
    errors = [
        abs(float(sample(lambda x, t, r, y: x, noise, labels, steps=n, sampler=midpoint).squeeze())
            - np.exp(-1))
        for n in (8, 16)
    ]
    assert 3.5 < errors[0] / errors[1] < 4.5


def test_the_metric_is_a_distance_of_means():
    metric = registry.lookup("metric", "mean_distance")
    inputs = [MetricInput(moments=Moments(np.array(mean), np.eye(2)))
              for mean in ([0.0, 0.0], [3.0, 4.0])]
    assert metric.compute(*inputs) == 5.0


def test_the_autoencoder_decodes_what_it_encodes():
    autoencoder = registry.build("autoencoder", "space_to_depth")
    assert isinstance(autoencoder, Autoencoder)
    images = jax.random.normal(jax.random.key(0), (2, 4, 6, 3))
    latents = autoencoder.encode({}, images)
    assert latents.shape == (2, 2, 3, autoencoder.latent_channels)
    np.testing.assert_array_equal(autoencoder.decode({}, latents), images)


def test_the_dataset_reads_rows():
    dataset = registry.lookup("dataset", "noise_images")(split="train", directory="")
    assert isinstance(dataset, Dataset)
    assert dataset.read([1, 5])["x"].shape == (2, *dataset.shape)


def test_the_condition_drops_to_its_null(skeletons):
    condition = skeletons["VectorCondition"](vectors=jnp.ones((3, 2)))
    assert isinstance(condition, Condition)
    dropped = condition.drop(jnp.ones(3, bool))
    np.testing.assert_array_equal(dropped.vectors, condition.null().vectors)
