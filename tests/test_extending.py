"""The example of components of one's own runs from training to export, and the page shows it."""

import dataclasses
import importlib.util
import json
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from ml_collections import ConfigDict

from dmf import build, components, loading, logs, objectives, training
from dmf.flow import LINEAR
from dmf.guidance import SelfGuidance
from dmf.typing import Batch, InputError
from dmf.weighting import Adaptive
from dmf.work import Work

FILE = tiny.ROOT / "examples" / "own.py"
PLUGINS = f"--plugins={FILE}"
SMALL = ("--config.run.steps=2", "--config.run.sample_every=0", "--config.data.batch_size=16")


def keep_tables(monkeypatch):
    for kind, table in components.COMPONENTS.items():
        monkeypatch.setitem(components.COMPONENTS, kind, dict(table))


@pytest.fixture(autouse=True)
def own_tables(monkeypatch):
    """What a test registers, the next one does not find."""
    keep_tables(monkeypatch)


@pytest.fixture
def own():
    """The example as a module."""
    spec = importlib.util.spec_from_file_location("own", FILE)
    module = sys.modules["own"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    del sys.modules["own"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Two steps of the example, whose names are forgotten after them."""
    workdir = tmp_path_factory.mktemp("own") / "run"
    with pytest.MonkeyPatch.context() as monkeypatch:
        keep_tables(monkeypatch)
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
    assert "is at step 2 of 3: going on" in "".join(capfd.readouterr())
    assert (run / "checkpoints" / "3").exists()


def test_a_checkpoint_runs_no_file_by_itself(run, capfd):
    assert tiny.dmf("sample", f"--checkpoint={run}", f"--output={run}/no.png") == 2
    (line,) = capfd.readouterr().err.strip().splitlines()
    assert re.search("model.name=perceptron: choose one of dit; or give .*--plugins=FILE", line)
    assert tiny.dmf("sample", f"--checkpoint={run}", "--plugins=no.py", "--output=no.png") == 2
    assert "--plugins=no.py: no such file" in capfd.readouterr().err


def test_an_export_without_names_of_others_is_refused(run, tmp_path, capfd):
    output = tmp_path / "safetensors"
    assert tiny.dmf("export", f"--checkpoint={run}", PLUGINS, "--format=safetensors",
                    f"--output={output}") == 2
    assert "no project has names for Perceptron" in capfd.readouterr().err
    assert not output.exists()


def test_an_undivided_network_trains_as_flow_map_by_every_way_of_computing(own):
    network = own.Perceptron(hidden=16)
    params = network.init(jax.random.key(0))
    x = jax.random.normal(jax.random.key(1), (4, 8, 8, 1))
    batch = Batch(x, jnp.arange(4, dtype=jnp.int32))
    losses = []
    for shared in (True, False):
        objective = objectives.DecoupledMeanFlow(
            weighting=Adaptive(), guidance=SelfGuidance(omega=1.0, kappa=0.5),
            work=Work(shared=shared),
        )
        draws = objective.draw(jax.random.key(2), batch)

        def mean(params, objective=objective, draws=draws):
            return jnp.mean(objective.loss(network, params, batch, draws, {})[0])

        losses.append(jax.value_and_grad(mean)(params))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-6), *losses)
    assert jnp.any(losses[0][1]["in"] != 0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Absolute(objectives.Objective):
    """Flow matching by the mean absolute error, and nothing that is not asked for."""

    weight: float = 1.0

    def draw(self, key, batch, step=None):
        noise_key, time_key = jax.random.split(key)
        noise = jax.random.normal(noise_key, batch.x.shape)
        return noise, jax.random.uniform(time_key, (len(noise),))

    def loss(self, network, params, batch, draws, frozen):
        noise, t = draws
        x_t, v_t = LINEAR.mix(batch.x, noise, t), LINEAR.velocity(batch.x, noise, t)
        u = network.apply(params, x_t, t, t, batch.y)
        return self.weight * jnp.mean(jnp.abs(u - v_t), axis=(1, 2, 3)), {}

    def flops(self, network):
        return 3 * network.flops.forward


def test_an_objective_needs_only_draw_loss_and_flops(tmp_path):
    components.register("objective", "absolute", Absolute)
    made = ConfigDict({"name": "absolute", "weight": 2.0})
    config = tiny.config({"run.steps": 2, "run.log_every": 1}, objective=made)
    objective = build.objective(config)
    assert objective == Absolute(weight=2.0)
    assert isinstance(objective, objectives.Objective)
    assert not (objective.learned_variance or objective.alignment or objective.needs_teacher)
    training.train(config, tmp_path)
    first, second = logs.read_metrics(tmp_path)
    assert first["gradient_norm"] > 0
    assert second["loss"] != first["loss"]


def test_an_undivided_network_counts_its_products(own):
    # 64 pixels, 2 times and 11 labels to 16 to 64, 2 for each multiply-add, and little more.
    products = 2 * (77 * 16 + 16 * 64)
    forward = own.Perceptron(hidden=16).flops.forward
    assert products <= forward <= 1.2 * products


def test_what_an_undivided_network_lacks_is_told(own):
    network = own.Perceptron(hidden=16)
    with pytest.raises(InputError, match="has no features to align"):
        network.apply_with_features({}, None, None, None, None)
    with pytest.raises(InputError, match="choose uniform or adaptive"):
        network.log_variance({}, None, None)


def test_a_registered_dataset_is_opened_by_its_name(own):
    config = tiny.config({"data.name": "negatives", "data.classes": (3, 4)})
    rows, labels = build.source(config).read(range(20))
    digits, same = build.source(tiny.config({"data.classes": (3, 4)})).read(range(20))
    np.testing.assert_array_equal(rows, 255 - digits)
    np.testing.assert_array_equal(labels, same)
    assert loading.plain(own.get_config())["data"]["name"] == "negatives"


def test_the_page_shows_the_code_of_the_example():
    page = (tiny.ROOT / "docs" / "extending.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert len(blocks) == 5
    assert all(block in FILE.read_text() for block in blocks)
