"""What is computed in float32 inside a network of bfloat16."""

import functools
import re

import golden_values as gv
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from test_dit import TINY, inputs, output, randomised

from dmf import build, loading
from dmf.models.dit import DiT
from dmf.models.layers import FLOAT32
from dmf.typing import Batch, InputError

BLOCKS = 3


def products(text: str) -> int:
    """How many products of float32 matrices there are in a program, as StableHLO."""
    taken = re.findall(r"stablehlo\.dot_general .*: \(tensor<(\S+)>, tensor<(\S+)>\)", text)
    assert taken, "there are products"
    return sum(a.endswith("xf32") and b.endswith("xf32") for a, b in taken)


@functools.cache
def program(*float32: str) -> str:
    """A network in StableHLO, its blocks one by one."""
    fields = {"conditioning": "decoupled", "split_depth": 1, "scan": False, "dtype": "bfloat16"}
    model = DiT(**TINY, **fields, float32=float32)
    params = jax.eval_shape(model.init, jax.random.key(0))
    return jax.jit(model.apply).lower(params, *inputs(model)).as_text()


@pytest.mark.parametrize(
    ("part", "count"),
    [((), 0), (("time_embedding",), 4), (("modulation",), BLOCKS), (("residual",), 0),
     (("final_layer",), 2), (FLOAT32, 4 + BLOCKS + 2)],
    ids=lambda part: str(part),
)  # fmt: skip
def test_each_part_makes_its_products_in_float32(part, count):
    assert products(program(*part)) == count


def test_the_kernels_of_the_modulation_are_not_rounded_before():
    rounded = re.compile(r"\(tensor<3x32x6x32xf32>\) -> tensor<3x32x6x32xbf16>")
    assert rounded.search(program())
    assert not rounded.search(program("modulation"))


def test_normalization_logits_and_softmax_are_in_float32_always():
    """Why they are no choice."""
    assert len(re.findall(r"rsqrt .*xf32>", program())) == 2 * BLOCKS + 1
    assert len(re.findall(r"exponential .*: tensor<2x2x16x16xf32>", program())) == BLOCKS
    assert not re.findall(r"rsqrt .*xbf16>", program())


@pytest.mark.parametrize("part", FLOAT32)
def test_each_part_changes_bfloat16_and_leaves_float32_alone(part):
    model, params = randomised()
    arguments = inputs(model)
    exact = output(model, params, arguments)
    coarse = output(DiT(**TINY, dtype="bfloat16"), params, arguments)
    finer = output(DiT(**TINY, dtype="bfloat16", float32=(part,)), params, arguments)
    assert finer.dtype == jnp.float32
    assert (finer != coarse).any()
    assert np.linalg.norm(finer - exact) < 1.2 * np.linalg.norm(coarse - exact)
    same = output(DiT(**TINY, float32=(part,)), params, arguments)
    np.testing.assert_array_equal(same, exact)


def test_all_of_them_are_nearer_to_float32():
    model, params = randomised()
    arguments = inputs(model)
    exact = output(model, params, arguments)
    errors = [
        np.linalg.norm(output(DiT(**TINY, dtype="bfloat16", float32=parts), params, arguments)
                       - exact)
        for parts in ((), FLOAT32)
    ]  # fmt: skip
    assert 0 < errors[1] < 0.6 * errors[0]


def test_tokens_between_blocks_are_those_of_the_residual():
    for part, dtype in (("modulation", "bfloat16"), ("residual", "float32")):
        model = DiT(**TINY, dtype="bfloat16", float32=(part,))
        params = jax.eval_shape(model.init, jax.random.key(0))
        x_t, t, _, y = inputs(model)
        assert jax.eval_shape(model.encode, params, x_t, t, y).tokens.dtype == dtype


def gradient_of_a_flow_map(**fields):
    """That of the whole objective, tangent and guidance in it, at random parameters."""
    config = tiny.flow_map({f"model.{name}": value for name, value in fields.items()})
    config.objective.guidance.kappa = 0.5
    network, objective = build.network(config), build.objective(config)
    draw = np.random.default_rng(0).standard_normal
    shapes = jax.eval_shape(network.init, jax.random.key(0))
    params = jax.tree.map(lambda leaf: jnp.asarray(0.2 * draw(leaf.shape), "f"), shapes)
    batch = Batch(jnp.asarray(draw((8, *network.sample_shape)), "f"), jnp.arange(8))
    draws = objective.draw(jax.random.key(0), batch)

    def loss(params):
        return objective.loss(network, params, batch, draws, {})[0].sum()

    return gv.jit(jax.grad(loss))(params)


@pytest.mark.parametrize(("scan", "remat"), [(True, "full"), (False, "none")])
def test_a_flow_map_with_all_of_them_has_nearly_the_gradient_of_float32(scan, remat):
    """Of each leaf, and in float32; what is left is from the products that stay in bfloat16."""
    exact = gradient_of_a_flow_map()
    ours = gradient_of_a_flow_map(scan=scan, remat=remat, dtype="bfloat16", float32=FLOAT32)
    leaves = [jax.tree.leaves(tree) for tree in (ours, exact)]
    assert {leaf.dtype for leaf in leaves[0]} == {jnp.dtype("float32")}
    for one, other in zip(*leaves, strict=True):
        gv.assert_near(one, other, 0.03)
    whole, expected = (np.concatenate([np.ravel(leaf) for leaf in tree]) for tree in leaves)
    assert 1e-5 < np.linalg.norm(whole - expected) / np.linalg.norm(expected) < 0.003


def test_a_part_that_is_no_choice_is_named():
    with pytest.raises(InputError, match=r"model\.float32=\('attention_logits',\): choose some of"):
        DiT(**TINY, float32=("attention_logits",))


def test_a_stored_config_holds_which_parts_are_in_float32():
    config = tiny.config({"model.dtype": "bfloat16", "model.float32": ("residual",)})
    stored = loading.as_config(loading.plain(config))
    assert build.network(stored) == build.network(config)
    assert build.network(stored).float32 == ("residual",)
