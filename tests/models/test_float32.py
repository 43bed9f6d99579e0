"""The parts of a bfloat16 network that are computed in float32."""

import functools
import re

import golden_values as gv
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from test_dit import TINY, inputs, output, randomised

from dmf.checkpoints import load
from dmf.errors import InputError
from dmf.models.abstract_params import abstract_params
from dmf.models.build import network
from dmf.models.dit import DiT
from dmf.models.layers import FLOAT32_PARTS
from dmf.objectives.build import objective
from dmf.types import Batch

BLOCKS = 3


def float32_matmuls(text: str) -> int:
    """Number of matmuls of float32 matrices in a StableHLO program."""
    operands = re.findall(r"stablehlo\.dot_general .*: \(tensor<(\S+)>, tensor<(\S+)>\)", text)
    assert operands, "there are matmuls"
    return sum(a.endswith("xf32") and b.endswith("xf32") for a, b in operands)


@functools.cache
def program(*float32_parts: str) -> str:
    """A network in StableHLO, with unrolled blocks."""
    fields = {"conditioning": "decoupled", "split_depth": 1, "scan": False, "dtype": "bfloat16"}
    model = DiT(**TINY, **fields, float32_parts=float32_parts)
    params = abstract_params(model)
    return jax.jit(model.apply).lower(params, *inputs(model)).as_text()


@pytest.mark.parametrize(
    ("part", "count"),
    [((), 0), (("time_embedding",), 4), (("modulation",), BLOCKS), (("residual",), 0),
     (("final_layer",), 2), (FLOAT32_PARTS, 4 + BLOCKS + 2)],
    ids=lambda part: str(part),
)  # fmt: skip
def test_each_part_has_its_matmuls_in_float32(part, count):
    assert float32_matmuls(program(*part)) == count


def test_the_kernels_of_the_modulation_are_not_rounded_before():
    rounded = re.compile(r"\(tensor<3x32x6x32xf32>\) -> tensor<3x32x6x32xbf16>")
    assert rounded.search(program())
    assert not rounded.search(program("modulation"))


def test_normalization_logits_and_softmax_are_in_float32_always():
    """They are no parts to choose."""
    assert len(re.findall(r"rsqrt .*xf32>", program())) == 2 * BLOCKS + 1
    assert len(re.findall(r"exponential .*: tensor<2x2x16x16xf32>", program())) == BLOCKS
    assert not re.findall(r"rsqrt .*xbf16>", program())


@pytest.mark.parametrize("part", [
    part if part in FLOAT32_PARTS[:2] else pytest.param(part, marks=pytest.mark.slow)
    for part in FLOAT32_PARTS
])
def test_each_part_changes_bfloat16_and_leaves_float32_alone(part):
    model, params = randomised()
    arguments = inputs(model)
    exact = output(model, params, arguments)
    rough = output(DiT(**TINY, dtype="bfloat16"), params, arguments)
    finer = output(DiT(**TINY, dtype="bfloat16", float32_parts=(part,)), params, arguments)
    assert finer.dtype == jnp.float32
    assert (finer != rough).any()
    assert np.linalg.norm(finer - exact) < 1.2 * np.linalg.norm(rough - exact)
    same = output(DiT(**TINY, float32_parts=(part,)), params, arguments)
    np.testing.assert_array_equal(same, exact)


def test_all_of_them_are_nearer_to_float32():
    model, params = randomised()
    arguments = inputs(model)
    exact = output(model, params, arguments)
    errors = [
        np.linalg.norm(output(DiT(**TINY, dtype="bfloat16", float32_parts=parts), params, arguments)
                       - exact)
        for parts in ((), FLOAT32_PARTS)
    ]  # fmt: skip
    assert 0 < errors[1] < 0.6 * errors[0]


def test_tokens_between_blocks_are_those_of_the_residual():
    for part, dtype in (("modulation", "bfloat16"), ("residual", "float32")):
        model = DiT(**TINY, dtype="bfloat16", float32_parts=(part,))
        params = abstract_params(model)
        x_t, t, _, y = inputs(model)
        assert jax.eval_shape(model.encode, params, x_t, t, y).tokens.dtype == dtype


def gradient_of_a_flow_map(**fields):
    """The gradient of a whole objective with tangent and guidance, at random parameters."""
    config = tiny.flow_map({f"model.{name}": value for name, value in fields.items()})
    config.objective.guidance.kappa = 0.5
    model, method = network(config.model), objective(config.objective)
    draw = np.random.default_rng(0).standard_normal
    shapes = abstract_params(model)
    params = jax.tree.map(lambda leaf: jnp.asarray(0.2 * draw(leaf.shape), "f"), shapes)
    batch = Batch(jnp.asarray(draw((8, *model.sample_shape)), "f"), jnp.arange(8))
    draws = method.draw(jax.random.key(0), batch)

    def loss(params):
        return method.loss(model, params, batch, draws, {})[0].sum()

    return gv.jit(jax.grad(loss))(params)


@pytest.mark.slow
@pytest.mark.parametrize(("scan", "remat"), [(True, "full"), (False, "none")])
def test_a_flow_map_with_all_of_them_has_nearly_the_gradient_of_float32(scan, remat):
    """Leaf by leaf; the remaining difference comes from the matmuls that stay in bfloat16."""
    exact = gradient_of_a_flow_map()
    ours = gradient_of_a_flow_map(
        scan=scan, remat=remat, dtype="bfloat16", float32_parts=FLOAT32_PARTS
    )
    leaves = [jax.tree.leaves(tree) for tree in (ours, exact)]
    assert {leaf.dtype for leaf in leaves[0]} == {jnp.dtype("float32")}
    for one, other in zip(*leaves, strict=True):
        gv.assert_near(one, other, 0.03)
    whole, expected = (np.concatenate([np.ravel(leaf) for leaf in tree]) for tree in leaves)
    assert 1e-5 < np.linalg.norm(whole - expected) / np.linalg.norm(expected) < 0.003


def test_a_part_that_is_no_choice_is_named():
    with pytest.raises(InputError, match=r"^float32_parts=\('attention_logits',\): choose any of"):
        DiT(**TINY, float32_parts=("attention_logits",))


def test_a_stored_config_holds_which_parts_are_in_float32():
    config = tiny.config({"model.dtype": "bfloat16", "model.float32_parts": ("residual",)})
    stored = load.config_from_json(load.config_to_json(config))
    assert network(stored.model) == network(config.model)
    assert network(stored.model).float32_parts == ("residual",)
