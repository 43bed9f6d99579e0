"""Every row of every config file builds at full size, takes a step at a reduced one, is told."""

import functools
import re
from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax.traverse_util import flatten_dict
from ml_collections import ConfigDict

from configs import __main__ as recipes
from configs import default, meanflow_b4_ablations, rows
from dmf.checkpoints import load
from dmf.evaluation.protocols import PROTOCOLS
from dmf.models import RAE, AutoencoderDC
from dmf.models.abstract_params import abstract_params
from dmf.models.build import network, sizes_of_dataset
from dmf.objectives import FlowMatching
from dmf.objectives.build import interpolant, objective
from dmf.runtime.sharding import make_mesh
from dmf.sampling.build import Sampling, guided_flow_map, sampling
from dmf.training import build
from dmf.training.abstract_inputs import abstract_inputs
from dmf.training.train_step import abstract_state, compiled_train_step, create_train_state

MODULES = recipes.modules()
ROWS = {
    f"{file}:{name}": (module, name, row)
    for file, module in MODULES.items()
    for name, row in recipes.rows(module).items()
}
BUILT = [key for key, (_, _, row) in ROWS.items() if not row.lacks]


@functools.cache
def _made(key: str) -> ConfigDict:
    """The config of a row; one that takes its sizes from a dataset gets those of small images."""
    module, name, _ = ROWS[key]
    config, sizes = module.get_config(*[name] * bool(name)), {"num_classes": 10, "channels": 3}
    config.model.update({size: sizes.get(size, 32) for size in sizes_of_dataset(config.model)})
    return config


def config_of(key: str) -> ConfigDict:
    return _made(key).copy_and_resolve_references()


def settings_of(config: ConfigDict) -> Sampling:
    """The settings of sampling."""
    return sampling(config.sampling, interpolant(config.objective))


def program(config: ConfigDict) -> tuple:
    """What rows must share for their training steps to be one program but for its constants."""
    fields = flatten_dict(config.to_dict())
    chosen = {name: value for name, value in fields.items()
              if name[0] == "model" or (name[0] == "objective" and name[-1] == "name")}
    guidance = getattr(objective(config.objective), "guidance", None)
    needs = guidance and (guidance.needs_conditional, guidance.needs_unconditional)
    aligned = bool(config.objective.get("alignment_coefficient"))
    return needs, aligned, config.freeze, *sorted(chosen.items())


def reduced(config: ConfigDict) -> ConfigDict:
    """The same kind of run: two narrow blocks on a 4 x 4 grid of patches."""
    model, size = config.model, config.model.patch_size
    split = model.split_depth and 1
    model.update(input_size=4 * size, depth=2, width=32, heads=2, num_classes=10, remat="none")
    model.update(split_depth=split, scan=True)
    if model.name == "in_context_dit":
        model.update(head_depth=1, patch_bottleneck=min(model.patch_bottleneck, 8))
    else:
        if model.wide_head.depth:
            model.wide_head.update(depth=1, width=64, heads=2)
        model.update(channels=min(model.channels, 32))
        model.update(alignment_depth=min(model.alignment_depth, 1))
        model.update(alignment_width=16, alignment_hidden=16)
    config.data.batch_size = 8
    config.optimizer.warmup_steps = 0
    return config


@functools.cache
def reduced_program(key: str) -> tuple:
    return program(reduced(config_of(key)))


def kinds(keys: Iterable[str]) -> list[str]:
    """The first row of each program, but for the size of its network."""
    return list({reduced_program(key): key for key in reversed(list(keys))}.values())


STEPPED = kinds(key for key in BUILT if not ROWS[key][2].commands)
# The last row of each objective and conditioning.
TRACED = {(_made(key).objective.name, _made(key).model.get("conditioning")): key
          for key in reversed(kinds(BUILT))}.values()


@pytest.mark.parametrize("file", sorted(MODULES))
def test_a_file_says_what_it_is_and_gives_a_command_that_runs_a_row(file):
    first = MODULES[file].__doc__.strip().splitlines()[0]
    assert first.endswith(".")
    told = " ".join(MODULES[file].__doc__.replace("\\\n", " ").split())
    runs = [command for name, row in recipes.rows(MODULES[file]).items() if not row.lacks
            for command in recipes.commands(file, name, row)]
    assert any(command in told for command in runs) or file == "default"


@pytest.mark.parametrize("key", BUILT)
def test_a_row_is_a_run_that_can_be(key):
    config = config_of(key)
    config.teacher.checkpoint = ""
    teacher = network(config.model) if ROWS[key][0].__name__.endswith("distilled") else None
    recipe = build.recipe(config, make_mesh(devices=jax.devices()[:1]), teacher)
    assert recipe.network.depth == config.model.depth
    sampler = settings_of(config).sampler
    for steps in config.sampling.steps:
        assert len(sampler.schedule(steps, config.sampling.shift)) == steps + 1
    assert config.evaluation.protocol in PROTOCOLS


@pytest.mark.parametrize("key", [
    pytest.param(key, marks=() if key in TRACED else pytest.mark.slow) for key in kinds(BUILT)
])
def test_a_row_has_its_shapes_at_full_size(key):
    config = config_of(key)
    recipe = build.recipe(config, make_mesh(devices=jax.devices()[:1]),
                          network(config.model) if config.teacher.checkpoint else None)
    state = abstract_state(recipe)
    trunk = getattr(recipe.network, "trunk_depth", config.model.depth)
    assert state.params["blocks"]["mlp"]["in"]["kernel"].shape[:2] == (trunk, config.model.width)
    _, rows, frozen = abstract_inputs(recipe)
    (count,) = rows.y.shape

    def loss(params, rows, frozen):
        batch = recipe.batch_transform.batch(jax.random.key(1), rows)
        draws = recipe.objective.draw(jax.random.key(0), batch)
        return recipe.objective.loss(recipe.network, params, batch, draws, frozen)

    losses, metrics = jax.eval_shape(loss, state.params, rows, frozen)
    assert losses.shape == (count,)
    assert losses.dtype == jnp.float32
    # SoFlow's metrics are those of a quarter of the batch, or of the rest.
    assert {metric.shape for metric in metrics.values()} <= {
        (rows,) for rows in (count, count // 4, count - count // 4)
    }


@pytest.mark.slow
@pytest.mark.parametrize("key", STEPPED)
def test_a_row_takes_a_step(key):
    config = reduced(config_of(key))
    mesh = make_mesh(devices=jax.devices()[:1])
    teacher = network(config.model) if config.teacher.checkpoint else None
    recipe = build.recipe(config, mesh, teacher)
    numbers = np.random.default_rng(0)
    state, batch, frozen = abstract_inputs(recipe)

    def drawn(leaf: jax.ShapeDtypeStruct) -> jax.Array:
        if jnp.issubdtype(leaf.dtype, jnp.integer):
            made = numbers.integers(0, 10, leaf.shape)
        else:
            made = numbers.normal(size=leaf.shape)
        return jax.device_put(made.astype(leaf.dtype), leaf.sharding)

    # A network that starts at zero has no gradient but in its last layer.
    params = jax.tree.map(lambda leaf: 0.1 * drawn(leaf), state.params)
    start = create_train_state(recipe, jax.random.key(0), params)
    before = jax.device_get(start.params)
    step = compiled_train_step(recipe)
    inputs = jax.tree.map(drawn, (batch, frozen))
    after, metrics = step(start, *inputs, jax.random.key(1))
    assert int(after.step) == 1
    assert jnp.isfinite(metrics["loss"])
    moved = jax.tree.map(lambda a, b: bool(np.any(a != b)), before, jax.device_get(after.params))
    mask = recipe.freeze_mask.mask or jax.tree.map(lambda _: np.False_, before)
    assert moved == jax.tree.map(lambda frozen: not frozen.all(), mask)


def test_each_row_has_a_place_of_its_own_where_those_that_start_from_it_look():
    trained = [key for key in BUILT if not ROWS[key][2].commands]
    places = {recipes.workdir(*key.split(":")) for key in trained}
    assert len(places) == len(trained)
    for key in BUILT:
        config = config_of(key)
        assert {config.init.checkpoint, config.teacher.checkpoint} - {""} <= places, key


@pytest.mark.parametrize("file", [name for name in MODULES if name.startswith("digits")])
def test_a_digits_recipe_finds_its_data(file):
    built = build.training(MODULES[file].get_config())
    assert len(built.data_loader.dataset) == 1797
    assert built.frozen_params == {}


@pytest.mark.parametrize("key", [k for k in BUILT if k.startswith("untrained")])
def test_what_is_seen_as_a_flow_map_is_sampled_as_one(key):
    """The samplers of flow models ask for velocities alone, in which nothing is seen of r."""
    config, asked = config_of(key), []

    def flow_map(x, t, r, y):
        asked.append((float(t[0]), float(r[0])))
        return x

    x, y = jnp.zeros((1, 2, 2, 1)), jnp.zeros(1, jnp.int32)
    settings = settings_of(config)
    guided = guided_flow_map(flow_map, settings, network(config.model))
    settings.sampler.step(guided, x, jnp.float32(0.5), jnp.float32(0.25), y, None, ())
    assert asked == [(0.5, 0.25)]


def test_rows_change_what_they_say_and_nothing_else():
    def fields(config):
        return flatten_dict(load.config_to_json(config), sep=".")

    base = fields(meanflow_b4_ablations.get_config())
    for name, expected in {
        "p=0.5": {"objective.weighting.power": 0.5},
        "share=100": {"objective.time_pair.equal_probability": 0.0},
        "guidance=3": {"objective.guidance.omega": 3.0},
        "kappa=0.5": {"objective.guidance.kappa": 0.5},
        "tangent=v,1,0": {},
    }.items():
        changed = fields(meanflow_b4_ablations.get_config(name))
        assert changed == base | expected, name


def test_a_row_of_which_there_is_none_is_refused_with_those_there_are(capfd, tmp_path):
    for file, row, told in (
        ("dmf_l2", "split=17", "choose one of base guided .*split=20 decoder_only$"),
        ("meanflow_b4_ablations", "tangent=wrong", "the tangent is that of the identity"),
    ):
        config = f"--config={tiny.ROOT}/configs/{file}.py:{row}"
        assert tiny.dmf("train", config, f"--workdir={tmp_path}/run") == 2
        (line,) = capfd.readouterr().err.strip().splitlines()
        assert re.search(f"--config=FILE:{row}: {told}", line)
    assert not (tmp_path / "run").exists()


def test_two_configs_of_a_row_share_nothing():
    row = rows.Row(changes={"objective": default.component(FlowMatching())})
    first, second = (rows.chosen(default.get_config(), {"x": row}, "x") for _ in range(2))
    first.objective.time_sampler.mean = 3.0
    assert second.objective.time_sampler.mean == 0.0


def test_the_page_is_that_of_the_files():
    assert recipes.PAGE.read_text() == recipes.page(), "write it again: python -m configs"


def test_the_published_sizes_have_the_published_number_of_parameters():
    # Table 1 of arXiv:2212.09748 at patch 2 and 256 x 256, in millions.
    from dmf.models.dit import SIZES, DiT

    for size, millions in {"S": 33, "B": 130, "L": 458, "XL": 675}.items():
        network = DiT(input_size=32, channels=4, patch_size=2, num_classes=1000, **SIZES[size])
        leaves = jax.tree.leaves(abstract_params(network))
        assert sum(leaf.size for leaf in leaves) / 1e6 == pytest.approx(millions, rel=0.02)


@pytest.mark.parametrize(("row", "blocks"), [("b2", 4), ("l2", 8), ("xl2", 8)])
def test_representations_are_aligned_after_the_published_block(row, blocks):
    assert config_of(f"sit:{row}_repa").model.alignment_depth == blocks


@pytest.mark.parametrize(("file", "autoencoder", "resolution"),
                         [("rae_256", RAE(), 256), ("dc_ae_512", AutoencoderDC(), 512)])
def test_recipes_in_other_latents_fit_their_autoencoder(file, autoencoder, resolution):
    config = config_of(f"{file}:dmf")
    space = load.build_latent_space(config, autoencoder)
    assert space.scaling == autoencoder.default_scaling
    assert autoencoder.factor * config.model.input_size == resolution


def test_the_learning_rate_of_rae_falls_to_a_tenth_from_epoch_40_to_epoch_800():
    recipe = build.recipe(config_of("rae_256:flow"), make_mesh(devices=jax.devices()[:1]))
    rates = [float(recipe.optimizer.rate(jnp.int32(1251 * epoch))) for epoch in (0, 40, 420, 800)]
    np.testing.assert_allclose(rates, [2e-4, 2e-4, 1.1e-4, 2e-5], rtol=1e-3)


def test_sit_is_sampled_with_guidance_of_three_channels():
    assert settings_of(config_of("sit_xl2:")).guidance.channels == 3
