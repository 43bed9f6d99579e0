"""Frozen parameters: which ones, that not a bit of them changes, and what their backward costs."""

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
import tiny
from flax.traverse_util import flatten_dict
from ml_collections import ConfigDict
from test_dit import TINY, inputs, randomised

from dmf import build, freezing, loading, logs, training
from dmf.models.dit import DiT
from dmf.state import TrainState
from dmf.typing import Batch, InputError, Network

FIELDS = {"conditioning": "decoupled", "split_depth": 2, "learned_variance": True}
NETWORK = DiT(**TINY, **FIELDS)


def paths_of(network: DiT, *patterns: str) -> set[str]:
    """The paths of what is frozen."""
    found = set()
    for path, mask in jax.tree_util.tree_leaves_with_path(freezing.frozen(patterns, network).mask):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        for i in np.flatnonzero(mask):
            found.add(name.replace("blocks/", f"blocks/{i}/") if mask.ndim else name)
    return found


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


def test_the_encoder_is_all_that_encode_depends_on():
    """Numbers that are changed show in what is encoded if they are the encoder's."""
    model, params = randomised(**FIELDS)
    x_t, t, _, y = inputs(model)
    encode = jax.jit(lambda params: model.encode(params, x_t, t, y).tokens)
    before, mask = encode(params), freezing.frozen(("encoder",), model).mask
    leaves, tree = jax.tree.flatten(params)
    for place, frozen in enumerate(jax.tree.leaves(mask)):
        for block in range(frozen.size):
            part = (block,) if frozen.ndim else ()
            others = list(leaves)
            others[place] = leaves[place].at[part].add(0.5 + jnp.abs(leaves[place][part]))
            shows = bool((encode(jax.tree.unflatten(tree, others)) != before).any())
            assert shows == frozen[part], (place, block)


@pytest.mark.parametrize(
    ("patterns", "named"),
    [
        (("blocks/7/.*",), r"freeze=blocks/7/\.\*: it matches no whole path; there are 43, as bl"),
        (("patch_embedding",), "freeze=patch_embedding: .* as patch_embedding/bias, patch_"),
        (("final/.*", "[", "x"), r"freeze=\[: it is no regular expression"),
        ((".*",), r"freeze=\('\.\*',\): all of the parameters"),
        (("encoder", "blocks/2/.*", "final/.*", "log_.*"), "all of the parameters"),
        ((3,), "freeze=3: it is no regular expression"),
        ("encoder", r"^freeze=encoder: a tuple of patterns is wanted; give \('encoder',\)$"),
    ],
)
def test_what_cannot_be_frozen_is_named(patterns, named):
    with pytest.raises(InputError, match=named) as error:
        freezing.frozen(patterns, NETWORK)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("fields", [{"conditioning": "meanflow"},
                                    {"conditioning": "decoupled", "split_depth": 0}])
def test_a_network_without_an_encoder_has_none_to_freeze(fields):
    with pytest.raises(InputError, match=r"freeze=encoder: every block .* model\.split_depth"):
        freezing.frozen(("encoder",), DiT(**TINY, **fields))


# Block 0 of 2 is the encoder's: of some leaves all is frozen, of some a block, of some nothing.
SOME = ("encoder", ".*/qkv/.*")


class Trained(NamedTuple):
    """A run with weight decay that freezes something: where from, where to, and what it said."""

    start: dict
    state: TrainState
    freeze: freezing.Frozen
    config: ConfigDict
    workdir: pathlib.Path
    said: str


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    config = tiny.flow_map({"init.checkpoint": str(tiny.flow_run()), "freeze": SOME,
                            "optimizer.weight_decay": 0.1, "run.steps": 3,
                            "emas.main.decay": 0.9})
    workdir, said = tmp_path_factory.mktemp("frozen"), io.StringIO()
    with contextlib.redirect_stderr(said):
        state = training.train(config, workdir)
    start = loading.load_network(tiny.flow_run(), "main")[2]
    freeze = freezing.frozen(SOME, build.network(config))
    return Trained(start, state, freeze, config, workdir, said.getvalue())


def test_not_a_bit_of_what_is_frozen_changes(trained):
    trees = (trained.state.params, trained.state.averages["main"], trained.state.optimizer[1][0].mu)
    masks = flatten_dict({name: trained.freeze.mask[name] for name in trained.start})
    start, *ends = (flatten_dict(tree) for tree in (trained.start, *trees))
    kinds = set()
    for path, mask in masks.items():
        before, after, average, moment = (np.asarray(tree[path]) for tree in (start, *ends))
        moved = before.view("u4") != after.view("u4")
        assert not moved[mask].any(), path
        np.testing.assert_array_equal(average[mask], before[mask])
        assert not moment[mask].any()
        if not mask.all():
            assert moved[~mask].mean() > 0.5, path
            assert (average[~mask] != before[~mask]).mean() > 0.5
        kinds.add((bool(mask.all()), bool(mask.any())))
    assert len(kinds) == 3


def test_the_norm_and_its_clipping_see_only_what_is_trained(trained):
    """All has a gradient, and all but the bias of the last product is frozen."""
    fields = {"init.checkpoint": str(tiny.flow_run()), "freeze": ("(?!final/linear/bias).*",),
              "run.steps": 1, "optimizer.clip_norm": 0.01}
    state = training.train(tiny.config(fields), trained.workdir / "one")
    (row,) = logs.read_metrics(trained.workdir / "one")
    # Brought here first: the sum of each leaf would be a program of its own over all devices.
    mu, nu = jax.device_get((state.optimizer[1][0].mu, state.optimizer[1][0].nu))
    assert row["gradient_norm"] > 0.01
    # After one step they are 1 - b1 and 1 - b2 times the clipped gradient and its square.
    bias = mu["final"]["linear"]["bias"] / 0.1
    assert float(jnp.linalg.norm(bias)) == pytest.approx(0.01, rel=1e-4)
    assert float(optax.tree.norm(mu)) == pytest.approx(0.1 * 0.01, rel=1e-4)
    assert float(optax.tree.sum(nu)) == pytest.approx(0.05 * 0.01**2, rel=1e-4)


def test_what_is_frozen_belongs_to_a_run_and_is_told(trained):
    config = copy.deepcopy(trained.config)
    config.freeze = ("encoder",)
    with pytest.raises(InputError, match="it holds another run, whose freeze is"):
        training.train(config, trained.workdir)
    leaves = jax.tree.leaves(trained.state.params)
    masks = jax.tree.leaves(trained.freeze.mask)
    count = sum(np.broadcast_to(~mask.reshape(-1, *(1,) * (leaf.ndim - 1)), leaf.shape).sum()
                for mask, leaf in zip(masks, leaves, strict=True))
    assert 0 < count < sum(leaf.size for leaf in leaves)
    assert f" parameters, {count:,} of them trained, on " in trained.said


def test_a_number_of_minus_zero_keeps_its_sign():
    mask = {"a": np.array([True, False]), "b": np.array(True)}
    old = {"a": jnp.full((2, 3), -0.0), "b": jnp.full(2, -0.0)}
    new = freezing.Frozen(mask=mask).kept(old, jax.tree.map(lambda x: x + 0.0, old))
    np.testing.assert_array_equal(np.signbit(new["a"]), [[True] * 3, [False] * 3])
    assert np.signbit(new["b"]).all()


def test_a_network_with_a_frozen_encoder_is_a_network():
    held = freezing.frozen(("encoder",), NETWORK).seen(NETWORK)
    assert held is not NETWORK
    assert isinstance(held, Network)
    assert held.flops == NETWORK.flops
    assert (held.num_classes, held.encoder_depth) == (5, 2)
    assert {held, copy.copy(held)} == {freezing.frozen(("encoder",), NETWORK).seen(NETWORK)}
    with pytest.raises(AttributeError, match="colour"):
        _ = held.colour


@pytest.mark.parametrize(
    ("patterns", "lacks", "named"),
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
def test_what_is_frozen_must_come_from_a_checkpoint(patterns, lacks, named):
    """Of which one part is missing, or all."""
    network = DiT(**TINY, **FIELDS, guidance_input=True)
    given = jax.eval_shape(network.init, jax.random.key(0))
    given = {} if lacks is None else {name: tree for name, tree in given.items() if name != lacks}
    freeze = freezing.frozen(patterns, network)
    if named is None:
        freeze.check_given(given)
        return
    with pytest.raises(InputError) as error:
        freeze.check_given(given)
    said = f"freeze={patterns}: {named} is frozen, but init.checkpoint does not have it; give one"
    assert str(error.value).startswith(said)


def test_a_leaf_alone_may_be_missing():
    """As the scales of qk-norm are where a checkpoint knew of none."""
    network = DiT(**TINY, **FIELDS, qk_norm=True)
    plain = jax.eval_shape(NETWORK.init, jax.random.key(0))
    freezing.frozen(("blocks/0/mlp/.*",), network).check_given(plain)
    with pytest.raises(InputError, match=r": blocks/0/attention/k_norm/scale is frozen, but init"):
        freezing.frozen(("blocks/0/.*",), network).check_given(plain)


def gradients(config, network, batch):
    """That of the objective, whole and as it is with what the config freezes."""
    objective, freeze = build.objective(config), freezing.frozen(config.freeze, network)
    draws = objective.draw(jax.random.key(1), batch)

    def whole(params):
        return jnp.mean(objective.loss(network, params, batch, draws, {})[0])

    def part(params):
        return jnp.mean(
            objective.loss(freeze.seen(network), freeze.held(params), batch, draws, {})[0]
        )

    return jax.jit(jax.grad(whole)), jax.jit(jax.grad(part)), freeze


@pytest.mark.slow
def test_the_gradient_is_that_of_the_others_and_nothing_else():
    config = tiny.flow_map({"freeze": SOME})
    config.objective.guidance.kappa = 0.4
    network = build.network(config)
    draw = np.random.default_rng(0).standard_normal
    shapes = jax.eval_shape(network.init, jax.random.key(0))
    params = jax.tree.map(lambda leaf: jnp.asarray(0.2 * draw(leaf.shape), "f"), shapes)
    batch = Batch(jnp.asarray(draw((4, *network.sample_shape)), "f"), jnp.arange(4))
    whole, part, freeze = gradients(config, network, batch)
    expected = freeze.kept(jax.tree.map(jnp.zeros_like, params), whole(params))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-3, atol=1e-4), part(params), expected
    )


def test_a_frozen_encoder_has_no_backward_pass():
    """Five of six blocks are the encoder's: of forward, tangent and backward (7 forward passes of
    Decoupled MeanFlow), the backward is 4. What the compiler is given tells, before it compiles."""
    fields = {"model.depth": 6, "model.split_depth": 5, "model.scan": False}
    config = tiny.flow_map(fields | {"freeze": ("encoder",)})
    network = build.network(config)
    shapes = jax.eval_shape(network.init, jax.random.key(0))
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
