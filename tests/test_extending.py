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
from dmf.checkpoints.export import write_frozen
from dmf.data.build import data, dataset
from dmf.errors import InputError
from dmf.models.abstract_params import abstract_params
from dmf.models.build import network
from dmf.models.encoders.autoencoder import Autoencoder
from dmf.objectives import LINEAR, AdaptiveWeighting, DecoupledMeanFlow, Objective, SelfGuidance
from dmf.objectives.build import objective
from dmf.objectives.compute_sharing import ComputeSharing
from dmf.runtime.sharding import make_mesh
from dmf.sampling.samplers import call_times
from dmf.training import build, loop, metrics_writer
from dmf.training.writers import WriterRun
from dmf.types import Batch, ClassLabels

FILE = tiny.ROOT / "examples" / "own.py"
AUTOENCODER = tiny.ROOT / "examples" / "own_autoencoder.py"
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
    evaluation = json.loads(result.read_text())
    assert evaluation["reference"]["name"] == "negatives"
    assert evaluation["sampling"]["sampler"] == {"name": "guided_euler", "scale": 1.5}
    (row,) = evaluation["results"]
    assert row["protocol"] == "brightness"
    assert 0 < row["brightness_gap"] < 255
    for form in ("orbax", "stablehlo"):
        output = f"--output={tmp_path / form}"
        assert tiny.dmf("export", checkpoint, PLUGINS, f"--format={form}", output) == 0
    exported = f"--checkpoint={tmp_path / 'orbax'}"
    assert tiny.dmf("sample", exported, PLUGINS, steps, "--count=4", f"--output={png}") == 0
    assert png.exists()


def test_the_same_command_resumes(run, own, capfd):
    more = (*SMALL, "--config.run.steps=3")
    assert tiny.dmf("train", f"--config={FILE}", f"--workdir={run}", *more) == 0
    assert "is at step 2 of 3: resuming" in "".join(capfd.readouterr())
    assert (run / "checkpoints" / "3").exists()
    # The callback is called after the last step of each start.
    norms = {row["step"]: row["parameter_norm"] for row in metrics_writer.read_metrics(run)
             if "parameter_norm" in row}
    assert set(norms) == {2, 3}
    flow_map, _ = load.load(run, ema="")
    squares = sum(float(jnp.sum(leaf**2)) for leaf in jax.tree.leaves(flow_map.params))
    assert norms[3] == pytest.approx(squares**0.5, rel=1e-5)


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


def test_the_objective_of_the_example_draws_uniform_times_at_first(own):
    objective = own.Huber(uniform_steps=5, time_sampler=own.Powers(power=50.0))
    batch = Batch(jnp.zeros((64, 8, 8, 1)), jnp.zeros(64, jnp.int32))
    early, late, later = (objective.draw(jax.random.key(0), batch, step).t.mean()
                          for step in (jnp.int32(4), jnp.int32(5), None))
    assert early == pytest.approx(0.5, abs=0.15)
    assert late == later < 0.1


def test_the_guidance_of_the_example_falls_to_none(own):
    t, dropped = jnp.array([0.0, 0.5, 1.0, 0.0]), jnp.array([False, False, False, True])
    omega, kappa = own.FallingGuidance(scale=3.0).coefficients(t, dropped)
    assert omega.tolist() == [3.0, 2.0, 1.0, 1.0]
    assert not kappa.any()


def test_mean_flow_takes_the_weighting_and_the_guidance_of_the_example(own):
    recipe = build.recipe(own.get_config("mean_flow"), make_mesh())
    batch = Batch(jnp.zeros((8, 8, 8, 1)), jnp.arange(8, dtype=jnp.int32))
    params = abstract_params(recipe.network)

    def losses(params, key):
        draws = recipe.objective.draw(key, batch, jnp.int32(0))
        return recipe.objective.loss(recipe.network, params, batch, draws, {})

    values, metrics = jax.eval_shape(losses, params, jax.random.key(0))
    assert values.shape == metrics["mean_flow_error"].shape == (8,)
    assert isinstance(recipe.objective.guidance, own.FallingGuidance)
    weighted = recipe.objective.weighting(jnp.array([0.0, 64.0]), 64)
    np.testing.assert_allclose(weighted, np.log([1e-3, 1.001]), rtol=1e-3)


def test_the_sampler_of_the_example_guides_by_itself(own):
    """u is 1 with a label and 0 without, so that the guided u is the scale."""

    def flow_map(x, t, r, y):
        return jnp.zeros_like(x) + (y.labels < 10)[:, None, None, None]

    y = ClassLabels(jnp.array([3]), num_classes=10)
    step = own.GuidedEuler(scale=3.0).step
    for t, scale in ((1.0, 1.0), (0.5, 2.0)):
        x, carry = step(flow_map, jnp.zeros((1, 1, 1, 1)), jnp.float32(t), jnp.float32(0), y)
        assert (x.item(), carry) == (pytest.approx(-t * scale), ())


@pytest.mark.slow
def test_the_times_of_a_sampler_that_guides_by_itself_are_known(own):
    assert call_times(own.GuidedEuler(), 2) == (1.0, 0.5)


def test_the_autoencoder_of_the_example_is_written_and_read(tmp_path):
    """Grey patches of 2 x 2 pixels have 4 components, so that nothing is lost."""
    with plugin_files.imported(AUTOENCODER) as module:
        module.write_autoencoder(str(tmp_path / "patches"))
        autoencoder, params = load.load_autoencoder(tmp_path / "patches")
        assert autoencoder == module.PatchComponents()
    assert isinstance(autoencoder, Autoencoder)
    images = np.repeat(np.random.default_rng(0).normal(size=(2, 4, 6, 1)), 3, axis=-1)
    latents = autoencoder.encode(params, images.astype("f"))
    assert latents.shape == (2, 2, 3, 4)
    np.testing.assert_allclose(autoencoder.decode(params, latents), images, atol=1e-4)
    assert "fitted to the digits" in (tmp_path / "patches/README.md").read_text()
    with pytest.raises(InputError, match="network=PatchComponents: register the class"):
        registry._COMPONENTS["autoencoder"].pop("patch_components")
        write_frozen(tmp_path / "other", autoencoder, params, origin="")


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
    code = FILE.read_text() + AUTOENCODER.read_text()
    assert len(blocks) == code.count("\nregister(") == 13
    assert all(block in code for block in blocks)


def test_the_page_says_how_each_kind_is_chosen():
    page = (tiny.ROOT / "docs" / "extending.md").read_text()
    named = {kind for row in re.findall(r"^\| (.*?) \|", page, re.MULTILINE)
             for kind in re.findall(r"`(\w+)`", row)}
    assert named | {"encoder"} == set(registry.kinds())
