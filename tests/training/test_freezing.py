"""Frozen parameters: which ones, that not a bit changes, and the cost of the backward pass."""

import contextlib
import copy
import io
import pathlib
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import small_network
import tiny
from flax.traverse_util import flatten_dict
from ml_collections import ConfigDict
from test_dit import TINY, inputs, random_params

from dmf.checkpoints import load
from dmf.errors import InputError
from dmf.models.abstract_params import abstract_params
from dmf.models.build import network as build_network
from dmf.models.dit import DiT
from dmf.models.in_context_dit import InContextDiT
from dmf.objectives.build import objective as build_objective
from dmf.training import freezing, loop, metrics_writer
from dmf.training.train_state import TrainState
from dmf.types import Batch, Network

FIELDS = {"conditioning": "decoupled", "split_depth": 2, "learned_variance": True}
NETWORK = DiT(**TINY, **FIELDS)


def paths_of(network: DiT, *patterns: str) -> set[str]:
    """The paths of the frozen parameters."""
    paths = set()
    tree = freezing.freeze_mask(patterns, network).mask
    for path, mask in jax.tree_util.tree_leaves_with_path(tree):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        for i in np.flatnonzero(mask):
            paths.add(name.replace("blocks/", f"blocks/{i}/") if mask.ndim else name)
    return paths


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("patch_embedding/kernel", {"patch_embedding/kernel"}),
        ("final/linear/.*", {"final/linear/kernel", "final/linear/bias"}),
        ("blocks/2/mlp/in/kernel", {"blocks/2/mlp/in/kernel"}),
        ("blocks/(0|2)/attention/.*/bias", {f"blocks/{i}/attention/{name}/bias"
                                            for i in (0, 2) for name in ("qkv", "out")}),
    ],
)  # fmt: skip
def test_a_pattern_freezes_the_paths_it_matches_whole(pattern, expected):
    assert paths_of(NETWORK, pattern) == expected


def test_patterns_add_up():
    parts = [paths_of(NETWORK, pattern) for pattern in ("encoder", "final/.*")]
    assert paths_of(NETWORK, "encoder", "final/.*") == parts[0] | parts[1]
    assert not parts[0] & parts[1]


IN_CONTEXT = InContextDiT(**TINY, conditioning="decoupled", split_depth=1, head_depth=1,
                          positions="rotary_2d", prediction="data", patch_bottleneck=7)


@pytest.mark.slow
@pytest.mark.parametrize("model", [NETWORK, IN_CONTEXT], ids=["dit", "in_context_dit"])
def test_the_encoder_is_all_that_encode_depends_on(model):
    """Numbers that are changed show in what is encoded if they are the encoder's."""
    params = random_params(model)
    x_t, t, _, y = inputs(model)
    encode = jax.jit(lambda params: model.encode(params, x_t, t, y).tokens)
    before, mask = encode(params), freezing.freeze_mask(("encoder",), model).mask
    leaves, tree = jax.tree.flatten(params)
    for place, frozen in enumerate(jax.tree.leaves(mask)):
        for block in range(frozen.size):
            part = (block,) if frozen.ndim else ()
            others = list(leaves)
            others[place] = leaves[place].at[part].add(0.5 + jnp.abs(leaves[place][part]))
            shows = bool((encode(jax.tree.unflatten(tree, others)) != before).any())
            assert shows == frozen[part], (place, block)


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        (("blocks/7/.*",), r"freeze=blocks/7/\.\*: it matches no whole path; there are 43, for ex"),
        (("patch_embedding",), "freeze=patch_embedding: .* example patch_embedding/bias, patch_"),
        (("final/.*", "[", "x"), r"freeze=\[: it is no regular expression"),
        ((".*",), r"freeze=\('\.\*',\): all parameters match"),
        (("encoder", "blocks/2/.*", "final/.*", "log_.*"), "all parameters match"),
        ((3,), "freeze=3: it is no regular expression"),
        ("encoder", r"^freeze=encoder: give a tuple of patterns: \('encoder',\)$"),
    ],
)
def test_invalid_patterns_are_refused(patterns, message):
    with pytest.raises(InputError, match=message) as error:
        freezing.freeze_mask(patterns, NETWORK)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("fields", [{"conditioning": "meanflow"},
                                    {"conditioning": "decoupled", "split_depth": 0}])
def test_a_network_without_an_encoder_has_none_to_freeze(fields):
    with pytest.raises(InputError, match=r"freeze=encoder: every block .* model\.split_depth"):
        freezing.freeze_mask(("encoder",), DiT(**TINY, **fields))


# Block 0 of 2 is the encoder's: of some leaves all is frozen, of some a block, of some nothing.
SOME = ("encoder", ".*/qkv/.*")


class Trained(NamedTuple):
    """A run with frozen parameters and weight decay: first and last parameters, and its log."""

    start: dict
    state: TrainState
    freeze_mask: freezing.FreezeMask
    config: ConfigDict
    workdir: pathlib.Path
    log: str


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    config = tiny.flow_map({"init.checkpoint": str(tiny.flow_run()), "freeze": SOME,
                            "optimizer.weight_decay": 0.1, "run.steps": 3,
                            "emas.main.decay": 0.9})
    workdir, log = tmp_path_factory.mktemp("frozen"), io.StringIO()
    with contextlib.redirect_stderr(log):
        state = loop.train(config, workdir)
    start = load.load_network(tiny.flow_run(), "main")[2]
    freeze_mask = freezing.freeze_mask(SOME, build_network(config.model))
    return Trained(start, state, freeze_mask, config, workdir, log.getvalue())


@pytest.mark.slow
def test_not_a_bit_of_what_is_frozen_changes(trained):
    state = trained.state
    trees = (state.params, state.ema_params["main"], state.opt_state[1][0].mu)
    masks = flatten_dict({name: trained.freeze_mask.mask[name] for name in trained.start})
    start, *ends = (flatten_dict(tree) for tree in (trained.start, *trees))
    kinds = set()
    for path, mask in masks.items():
        before, after, ema, moment = (np.asarray(tree[path]) for tree in (start, *ends))
        moved = before.view("u4") != after.view("u4")
        assert not moved[mask].any(), path
        np.testing.assert_array_equal(ema[mask], before[mask])
        assert not moment[mask].any()
        if not mask.all():
            assert moved[~mask].mean() > 0.5, path
            assert (ema[~mask] != before[~mask]).mean() > 0.5
        kinds.add((bool(mask.all()), bool(mask.any())))
    assert len(kinds) == 3


def test_the_norm_and_its_clipping_see_only_what_is_trained(tmp_path):
    """All has a gradient, and all but the last layer is frozen."""
    with small_network.registered():
        fields = {"init.checkpoint": str(small_network.run()), "freeze": ("(?!out).*",),
                  "run.steps": 1, "optimizer.clip_norm": 0.01}
        start = load.load_network(small_network.run(), "main")[2]
        state = loop.train(small_network.config(fields), tmp_path)
    for name in ("in", "log_variance"):
        for tree in (state.params, state.ema_params["main"]):
            np.testing.assert_array_equal(tree[name], start[name])
    assert (np.asarray(state.params["out"]) != start["out"]).any()
    (row,) = metrics_writer.read_metrics(tmp_path)
    # Brought here first: the sum of each leaf would be a program of its own over all devices.
    mu, nu = jax.device_get((state.opt_state[1][0].mu, state.opt_state[1][0].nu))
    assert row["gradient_norm"] > 0.01
    # After one step they are 1 - b1 and 1 - b2 times the clipped gradient and its square.
    assert float(jnp.linalg.norm(mu["out"] / 0.1)) == pytest.approx(0.01, rel=1e-4)
    assert float(optax.tree.norm(mu)) == pytest.approx(0.1 * 0.01, rel=1e-4)
    assert float(optax.tree.sum(nu)) == pytest.approx(0.05 * 0.01**2, rel=1e-4)


@pytest.mark.slow
def test_what_is_frozen_belongs_to_a_run_and_is_told(trained):
    config = copy.deepcopy(trained.config)
    config.freeze = ("encoder",)
    with pytest.raises(InputError, match="it holds another run, whose freeze is"):
        loop.train(config, trained.workdir)
    leaves = jax.tree.leaves(trained.state.params)
    masks = jax.tree.leaves(trained.freeze_mask.mask)
    count = sum(np.broadcast_to(~mask.reshape(-1, *(1,) * (leaf.ndim - 1)), leaf.shape).sum()
                for mask, leaf in zip(masks, leaves, strict=True))
    assert 0 < count < sum(leaf.size for leaf in leaves)
    assert f" parameters ({count:,} trained); mesh " in trained.log


def test_a_number_of_minus_zero_keeps_its_sign():
    mask = {"a": np.array([True, False]), "b": np.array(True)}
    old = {"a": jnp.full((2, 3), -0.0), "b": jnp.full(2, -0.0)}
    new = freezing.FreezeMask(mask=mask).select(old, jax.tree.map(lambda x: x + 0.0, old))
    np.testing.assert_array_equal(np.signbit(new["a"]), [[True] * 3, [False] * 3])
    assert np.signbit(new["b"]).all()


def test_a_network_with_a_frozen_encoder_is_a_network():
    freeze_mask = freezing.freeze_mask(("encoder",), NETWORK)
    network = freeze_mask.stop_encoder_gradient(NETWORK)
    assert network is not NETWORK
    assert isinstance(network, Network)
    assert network.flops == NETWORK.flops
    assert (network.num_classes, network.encoder_depth) == (5, 2)
    assert {network, copy.copy(network)} == {freeze_mask.stop_encoder_gradient(NETWORK)}
    assert freezing.freeze_mask((), NETWORK).stop_encoder_gradient(NETWORK) is NETWORK


def test_a_frozen_encoder_has_every_member_of_a_network():
    """A member that `Network` gains must be handed on too."""
    members = {name for name in vars(Network) if not name.startswith("_")}
    assert members <= set(vars(freezing.FrozenEncoder))


@pytest.mark.parametrize(
    ("patterns", "lacks", "path"),
    [
        (("encoder",), None, "blocks/0/attention/out/bias"),
        (("final/linear/.*",), None, "final/linear/bias"),
        (("encoder",), "guidance_embedding", "guidance_embedding/high/in/bias"),
        (("blocks/2/.*/qkv/kernel",), "blocks", "blocks/2/attention/qkv/kernel"),
        (("encoder",), "log_variance", None),
        (("encoder", "final/.*"), "", None),
        ((), None, None),
    ],
)
def test_frozen_parameters_must_come_from_a_checkpoint(patterns, lacks, path):
    """A checkpoint lacks one part, or there is none."""
    network = DiT(**TINY, **FIELDS, guidance_input=True)
    given = abstract_params(network)
    given = {} if lacks is None else {name: tree for name, tree in given.items() if name != lacks}
    freeze_mask = freezing.freeze_mask(patterns, network)
    if path is None:
        freeze_mask.check_pretrained(given)
        return
    with pytest.raises(InputError) as error:
        freeze_mask.check_pretrained(given)
    message = f"freeze={patterns}: {path} is frozen, but init.checkpoint does not have it; give a"
    assert str(error.value).startswith(message)


def test_a_leaf_alone_may_be_missing():
    """A checkpoint without qk-norm lacks its scales."""
    network = DiT(**TINY, **FIELDS, qk_norm=True)
    plain = jax.eval_shape(NETWORK.init, jax.random.key(0))
    freezing.freeze_mask(("blocks/0/mlp/.*",), network).check_pretrained(plain)
    with pytest.raises(InputError, match=r": blocks/0/attention/k_norm/scale is frozen, but init"):
        freezing.freeze_mask(("blocks/0/.*",), network).check_pretrained(plain)


def gradients(config, network, batch):
    """The gradient of the objective, for all parameters and for those that are not frozen."""
    objective = build_objective(config.objective)
    freeze_mask = freezing.freeze_mask(config.freeze, network)
    draws = objective.draw(jax.random.key(1), batch)

    def whole(params):
        return jnp.mean(objective.loss(network, params, batch, draws, {})[0])

    def part(params):
        network_seen, params = (
            freeze_mask.stop_encoder_gradient(network), freeze_mask.stop_gradient(params)
        )
        return jnp.mean(objective.loss(network_seen, params, batch, draws, {})[0])

    return jax.jit(jax.grad(whole)), jax.jit(jax.grad(part)), freeze_mask


@pytest.mark.slow
def test_the_gradient_is_that_of_the_others_and_nothing_else():
    config = tiny.flow_map({"freeze": SOME})
    config.objective.guidance.kappa = 0.4
    network = build_network(config.model)
    draw = np.random.default_rng(0).standard_normal
    shapes = abstract_params(network)
    params = jax.tree.map(lambda leaf: jnp.asarray(0.2 * draw(leaf.shape), "f"), shapes)
    batch = Batch(jnp.asarray(draw((4, *network.sample_shape)), "f"), jnp.arange(4))
    whole, part, freeze_mask = gradients(config, network, batch)
    expected = freeze_mask.select(jax.tree.map(jnp.zeros_like, params), whole(params))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-3, atol=1e-4), part(params), expected
    )


@pytest.mark.slow
def test_a_frozen_encoder_has_no_backward_pass():
    """Five of six blocks are the encoder's: of forward, tangent and backward (7 forward passes of
    Decoupled MeanFlow), the backward is 4. What the compiler is given tells, before it compiles."""
    fields = {"model.depth": 6, "model.split_depth": 5, "model.scan": False}
    config = tiny.flow_map(fields | {"freeze": ("encoder",)})
    network = build_network(config.model)
    shapes = abstract_params(network)
    batch = Batch(jnp.zeros((4, *network.sample_shape)), jnp.arange(4))
    whole, part, _ = gradients(config, network, batch)
    flops = [grad.lower(shapes).cost_analysis()["flops"] for grad in (whole, part)]
    assert flops[1] < 0.65 * flops[0]


def test_the_command_line_takes_a_pattern(tmp_path, capsys):
    code = tiny.dmf("train", f"--config={tiny.CONFIG}", f"--workdir={tmp_path}/run",
                    "--config.freeze=('final/.*','encodr')")
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert code == 2
    assert "freeze=encodr: it matches no whole path; there are" in line
    assert not any(tmp_path.iterdir())
