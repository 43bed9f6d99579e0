"""The example of a condition that is no class label is trained, guided and sampled."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
import plugin_files
import pytest
import tiny

from dmf import registry
from dmf.data.build import data, data_loader, dataset
from dmf.models.build import network
from dmf.objectives.build import objective
from dmf.objectives.path_sample import path_sample
from dmf.runtime.sharding import batch_sharding, make_mesh
from dmf.types import Batch, Condition, Network

FILE = tiny.ROOT / "examples" / "vector_condition.py"
PLUGINS = f"--plugins={FILE}"
# A log line at every step waits for it: many unfinished steps on eight devices of one CPU may
# deadlock.
SMALL = ("--config.run.steps=120", "--config.run.log_every=1", "--config.run.sample_every=0",
         "--config.data.batch_size=64")


@pytest.fixture(autouse=True)
def clean_registry():
    """The components that a test registers do not reach the next test."""
    with plugin_files.registered_components():
        yield


@pytest.fixture
def example():
    """The example as a module."""
    with plugin_files.imported(FILE) as module:
        yield module


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A short run of the example."""
    workdir = tmp_path_factory.mktemp("vector") / "run"
    with plugin_files.registered_components():
        assert tiny.dmf("train", f"--config={FILE}", f"--workdir={workdir}", *SMALL) == 0
    return workdir


@pytest.mark.slow
def test_the_condition_steers_the_samples(example, run, tmp_path, capsys):
    """The ink of the images follows the requested ink."""
    example.main(str(run), str(tmp_path / "grid.png"))
    correlation = re.search(r"obtained ink (\S+)", capsys.readouterr().out)[1]
    assert float(correlation) > 0.6
    # 6 rows and 9 columns of 8 x 8 pixels, one pixel apart, enlarged four times.
    assert np.asarray(PIL.Image.open(tmp_path / "grid.png")).shape[:2] == (4 * 55, 4 * 82)


@pytest.mark.slow
def test_guidance_enlarges_the_effect_of_the_condition(example, run):
    ink = np.tile(np.array([-1.5, 1.5], np.float32), 20)
    spreads = []
    for scale in (0.0, 1.0, 2.0):
        obtained = example.measured(example.sampled(str(run), ink, scale=scale))[:, 0]
        spreads.append(obtained[ink > 0].mean() - obtained[ink < 0].mean())
    assert abs(spreads[0]) < 0.3 * spreads[1] < 0.3 * spreads[2]


@pytest.mark.slow
def test_commands_sample_it_without_a_condition(run, tmp_path):
    """They know class labels alone, so that the condition is null."""
    output = tmp_path / "images.npz"
    assert tiny.dmf("sample", f"--checkpoint={run}", PLUGINS, f"--output={output}", "--steps=1",
                    "--count=8") == 0
    assert np.load(output)["arr_0"].shape == (8, 8, 8, 1)


def test_the_condition_follows_the_protocol(example):
    built = example.VectorPerceptron(width=8, depth=1)
    assert isinstance(built, Network)
    y = built.condition(jnp.ones((3, example.VALUES)))
    assert isinstance(y, Condition)
    assert built.condition(y) is y
    assert y.count == 3
    assert y.present.tolist() == [True, True, True]
    assert y.drop(jnp.array([False, True, False])).present.tolist() == [True, False, True]
    assert y.null().present.tolist() == [False, False, False]
    assert built.condition(jnp.zeros(3, jnp.int32)).present.tolist() == [False, False, False]


@pytest.mark.slow
def test_a_null_condition_hides_the_vector(example):
    built = example.VectorPerceptron(width=8, depth=1)
    params = built.init(jax.random.key(0))
    x_t, t = jax.random.normal(jax.random.key(1), (2, 8, 8, 1)), jnp.ones(2)
    values = jax.random.normal(jax.random.key(2), (2, example.VALUES))
    y = built.condition(values)
    u = built.apply(params, x_t, t, t, y.drop(jnp.array([True, False])))
    null = built.apply(params, x_t, t, t, built.condition(2 * values).null())
    np.testing.assert_array_equal(u[0], null[0])
    assert jnp.abs(u[1] - null[1]).max() > 1e-3


def test_batches_have_vectors_which_label_dropout_drops(example):
    config = example.get_config()
    built, settings = network(config.model), data(config.data)
    loader = data_loader(settings, dataset(settings, built), seed=0)
    rows = loader.batch(0, batch_sharding(make_mesh()))
    assert rows.y.shape == (settings.batch_size, example.VALUES)
    assert 0.5 < float(rows.y.std()) < 1.5
    method = objective(config.objective)
    batch = Batch(rows.x / 127.5 - 1, rows.y)
    draws = method.draw(jax.random.key(0), batch)
    sample = path_sample(method.interpolant, built, batch, draws)
    np.testing.assert_array_equal(sample.y.present, ~draws.dropped)
    np.testing.assert_array_equal(sample.y.values, rows.y)
    assert 0 < draws.dropped.sum() < settings.batch_size


def test_measured_values_of_an_image(example):
    """A single white pixel in the last row and the first column."""
    images = np.zeros((1, 8, 8, 1), np.uint8)
    images[0, 7, 0] = 255
    np.testing.assert_allclose(example.measured(images), [[1 / 64, 1.0, 0.0]], atol=1e-5)


def test_its_config_survives_the_round_trip(example):
    config = example.get_config()
    assert registry.to_config(network(config.model)) == config.model.to_dict()
