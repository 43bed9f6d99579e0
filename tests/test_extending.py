"""The example of components in a config file runs from training to export; the page shows it."""

import dataclasses
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import plugin_files
import pytest
import small_network
import tiny
from etils import epath
from ml_collections import ConfigDict
from two_layers import TwoLayers

from dmf import registry
from dmf.checkpoints import load
from dmf.data.build import data, dataset
from dmf.errors import InputError
from dmf.models.build import network
from dmf.objectives import LINEAR, AdaptiveWeighting, DecoupledMeanFlow, Objective, SelfGuidance
from dmf.objectives.build import objective
from dmf.objectives.compute_sharing import ComputeSharing
from dmf.training import loop, metrics_writer
from dmf.training.writers import WriterRun
from dmf.types import Batch

FILE = tiny.ROOT / "examples" / "own.py"
PLUGINS = f"--plugins={FILE}"
SMALL = ("--config.run.steps=2", "--config.run.sample_every=0", "--config.data.batch_size=16")


@pytest.fixture(autouse=True)
def clean_registry():
    """The components that a test registers do not reach the next test."""
    with plugin_files.registered_components():
        yield


@pytest.fixture
def own():
    """The example as a module."""
    with plugin_files.imported(FILE) as module:
        yield module


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of two steps of the example."""
    workdir = tmp_path_factory.mktemp("own") / "run"
    with plugin_files.registered_components():
        assert tiny.dmf("train", f"--config={FILE}", f"--workdir={workdir}", *SMALL) == 0
    return workdir


def test_the_example_is_trained_sampled_measured_and_exported(run, tmp_path):
    checkpoint, steps = f"--checkpoint={run}", "--steps=1"
    png, result, images = tmp_path / "own.png", tmp_path / "own.json", tmp_path / "own.npz"
    assert tiny.dmf("sample", checkpoint, PLUGINS, steps, "--count=8", f"--output={images}") == 0
    assert np.load(images)["arr_0"].shape == (8, 8, 8, 1)
    assert tiny.dmf("evaluate", checkpoint, PLUGINS, steps, "--count=72", f"--output={result}") == 0
    assert json.loads(result.read_text())["reference"]["name"] == "negatives"
    for form in ("orbax", "stablehlo"):
        output = f"--output={tmp_path / form}"
        assert tiny.dmf("export", checkpoint, PLUGINS, f"--format={form}", output) == 0
    exported = f"--checkpoint={tmp_path / 'orbax'}"
    assert tiny.dmf("sample", exported, PLUGINS, steps, "--count=4", f"--output={png}") == 0
    assert png.exists()


def test_the_same_command_resumes(run, capfd):
    more = (*SMALL, "--config.run.steps=3")
    assert tiny.dmf("train", f"--config={FILE}", f"--workdir={run}", *more) == 0
    assert "is at step 2 of 3: resuming" in "".join(capfd.readouterr())
    assert (run / "checkpoints" / "3").exists()


def test_a_checkpoint_runs_no_file_by_itself(run, capfd):
    assert tiny.dmf("sample", f"--checkpoint={run}", f"--output={run}/no.png") == 2
    (line,) = capfd.readouterr().err.strip().splitlines()
    assert re.search("model.name=perceptron: choose one of dit, .*; or give .*--plugins=FILE", line)
    assert tiny.dmf("sample", f"--checkpoint={run}", "--plugins=no.py", "--output=no.png") == 2
    assert "--plugins=no.py: no such file" in capfd.readouterr().err


def test_an_export_without_a_naming_is_refused(run, tmp_path, capfd):
    output = tmp_path / "safetensors"
    assert tiny.dmf("export", f"--checkpoint={run}", PLUGINS, "--format=safetensors",
                    f"--output={output}") == 2
    assert "no project has names for Perceptron" in capfd.readouterr().err
    assert not output.exists()


def test_a_simple_network_has_the_same_loss_with_and_without_compute_sharing(own):
    network = own.Perceptron(hidden=16)
    params = network.init(jax.random.key(0))
    x = jax.random.normal(jax.random.key(1), (4, 8, 8, 1))
    batch = Batch(x, jnp.arange(4, dtype=jnp.int32))
    losses = []
    for shared in (True, False):
        objective = DecoupledMeanFlow(
            weighting=AdaptiveWeighting(), guidance=SelfGuidance(omega=1.0, kappa=0.5),
            compute_sharing=ComputeSharing(enabled=shared),
        )
        draws = objective.draw(jax.random.key(2), batch)

        def mean(params, objective=objective, draws=draws):
            return jnp.mean(objective.loss(network, params, batch, draws, {})[0])

        losses.append(jax.jit(jax.value_and_grad(mean))(params))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-6), *losses)
    assert jnp.any(losses[0][1]["in"] != 0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Absolute(Objective):
    """Flow matching by the mean absolute error, with no optional part of an objective."""

    weight: float = 1.0

    def draw(self, key, batch, step=None):
        noise_key, time_key = jax.random.split(key)
        noise = jax.random.normal(noise_key, batch.x.shape)
        return noise, jax.random.uniform(time_key, (len(noise),))

    def loss(self, network, params, batch, draws, frozen_params):
        noise, t = draws
        x_t, v_t = LINEAR.interpolate(batch.x, noise, t), LINEAR.velocity(batch.x, noise, t)
        u = network.apply(params, x_t, t, t, batch.y)
        return self.weight * jnp.mean(jnp.abs(u - v_t), axis=(1, 2, 3)), {}

    def flops(self, network):
        return 3 * network.flops.forward


def test_an_objective_needs_only_draw_loss_and_flops(tmp_path):
    registry.register("objective", absolute=Absolute)
    registry.register("model", two_layers=TwoLayers)
    section = ConfigDict({"name": "absolute", "weight": 2.0})
    config = small_network.config({"run.steps": 2, "run.log_every": 1}, objective=section)
    built = objective(config.objective)
    assert built == Absolute(weight=2.0)
    assert isinstance(built, Objective)
    assert not (built.learned_variance or built.alignment or built.needs_teacher)
    assert not (built.needs_r or built.guidance_input)
    loop.train(config, tmp_path)
    first, second = metrics_writer.read_metrics(tmp_path)
    assert first["gradient_norm"] > 0
    assert second["loss"] != first["loss"]


def test_a_simple_network_counts_its_operations(own):
    # 64 pixels, 2 times and 11 labels to 16 to 64, 2 for each multiply-add, and little more.
    matmuls = 2 * (77 * 16 + 16 * 64)
    forward = own.Perceptron(hidden=16).flops.forward
    assert matmuls <= forward <= 1.2 * matmuls


def test_a_simple_network_refuses_alignment_and_learned_variance(own):
    network = own.Perceptron(hidden=16)
    with pytest.raises(InputError, match="has no features to align"):
        network.apply_with_features({}, None, None, None, None)
    with pytest.raises(InputError, match="choose uniform or adaptive"):
        network.log_variance({}, None, None)


def opened(config: ConfigDict):
    return dataset(data(config.data), network(config.model))


def test_a_registered_dataset_is_opened_by_its_name(own):
    config = tiny.config({"data.name": "negatives", "data.classes": (3, 4)})
    rows = opened(config).read(range(20))
    digits = opened(tiny.config({"data.classes": (3, 4)})).read(range(20))
    np.testing.assert_array_equal(rows["x"], 255 - digits["x"])
    np.testing.assert_array_equal(rows["y"], digits["y"])
    assert load.config_to_json(own.get_config())["data"]["name"] == "negatives"


def test_the_writer_continues_its_table_when_a_run_resumes(own, tmp_path):
    for start, loss in ((0, 0.5), (2, 0.25)):
        writer = own.LossTable(WriterRun(workdir=epath.Path(tmp_path), start_step=start))
        writer.write(start + 2, {"loss": loss, "gradient_norm": 1.0})
        writer.write(start + 2, {"evaluation/fd_pixels/main/1": 3.0})
        writer.close()
    assert (tmp_path / "loss.csv").read_text().split() == ["2,0.5", "4,0.25"]


def test_the_page_shows_the_code_of_the_example():
    page = (tiny.ROOT / "docs" / "extending.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert len(blocks) == 6
    assert all(block in FILE.read_text() for block in blocks)
