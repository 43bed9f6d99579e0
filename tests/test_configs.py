"""Every config file builds, at full size, and says what it is and how to run it."""

import importlib

import jax
import jax.numpy as jnp
import pytest
import tiny

from dmf import build, components
from dmf import state as states
from dmf.typing import Batch

MODULES = {
    path.stem: importlib.import_module(f"configs.{path.stem}")
    for path in sorted((tiny.ROOT / "configs").glob("*.py"))
    if path.stem != "__init__"
}
RECIPES = sorted(name for name, module in MODULES.items() if hasattr(module, "get_config"))


@pytest.mark.parametrize("name", sorted(MODULES))
def test_a_config_says_what_it_is(name):
    lines = (MODULES[name].__doc__ or "").strip().splitlines()
    assert lines
    assert lines[0].endswith((".", ":", ";", ",")) or len(lines) > 1


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_gives_its_command(name):
    assert f"--config=configs/{name}.py" in MODULES[name].__doc__


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_builds_at_full_size(name):
    config = MODULES[name].get_config()
    network = build.network(config)
    objective = build.objective(config, network if config.teacher.checkpoint else None)
    averages = build.emas(config)
    transform = components.component("optimizer", config.optimizer, "optimizer").transform()
    sampler = build.sampler(config)
    for steps in config.sampling.steps:
        assert len(sampler.schedule(steps, config.sampling.shift)) == steps + 1
    build.check(config, objective, build.make_mesh(devices=jax.devices()[:1]))

    def make():
        return states.initial(network.init(jax.random.key(0)), transform, list(averages))

    state = jax.eval_shape(make)
    assert state.params["blocks"]["mlp"]["in"]["kernel"].shape[:2] == (
        config.model.depth, config.model.width
    )
    features = None
    if objective.alignment:
        tokens = (config.model.input_size // config.model.patch_size) ** 2
        features = jnp.zeros((2, tokens, config.model.alignment_width))
    batch = Batch(jnp.zeros((2, *network.sample_shape)), jnp.zeros(2, jnp.int32), features)

    def loss(params):
        draws = objective.draw(jax.random.key(0), batch)
        return objective.loss(network, params, batch, draws, {"teacher": params})

    losses, metrics = jax.eval_shape(loss, state.params)
    assert losses.shape == (2,)
    assert losses.dtype == jnp.float32
    assert all(metric.shape == (2,) for metric in metrics.values())


@pytest.mark.parametrize("name", [name for name in RECIPES if name.startswith("digits")])
def test_a_digits_recipe_finds_its_data(name):
    built = build.training(MODULES[name].get_config())
    assert len(built.pipeline.source) == 1797
    assert built.frozen == {}


def test_the_published_sizes_have_the_published_number_of_parameters():
    # Table 1 of arXiv:2212.09748 at patch 2 and 256 x 256, in millions.
    from dmf.models.dit import SIZES, DiT

    for size, millions in {"S": 33, "B": 130, "L": 458, "XL": 675}.items():
        network = DiT(input_size=32, channels=4, patch_size=2, num_classes=1000, **SIZES[size])
        leaves = jax.tree.leaves(jax.eval_shape(network.init, jax.random.key(0)))
        assert sum(leaf.size for leaf in leaves) / 1e6 == pytest.approx(millions, rel=0.02)
