"""The in-context transformer beyond the golden files: positions, conditioning, initialisation,
sizes, operations, gradients in bfloat16."""

import math

import golden_values as gv
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_gradient_sums import coarse_sums

from dmf.errors import InputError
from dmf.models import in_context_dit
from dmf.models.abstract_params import abstract_params
from dmf.models.in_context_dit import PIXEL_SIZES, SIZES, InContextDiT
from dmf.models.in_context_transformer import rotation
from dmf.models.rotary import grid_rotation, rotate, sequence_rotation

TINY = {
    "input_size": 4, "channels": 3, "depth": 3, "head_depth": 1, "width": 16, "heads": 2,
    "num_classes": 5,
}  # fmt: skip
DECOUPLED = {"conditioning": "decoupled", "split_depth": 1}
PIXELS = {"positions": "rotary_2d", "prediction": "data", "patch_bottleneck": 7}


def randomised(**changes):
    """A network, and parameters that are nowhere zero."""
    model = InContextDiT(**TINY | changes)
    draw = np.random.default_rng(0).standard_normal
    shapes = abstract_params(model)
    return model, jax.tree.map(lambda leaf: jnp.asarray(0.3 * draw(leaf.shape), "f"), shapes)


def inputs(model: InContextDiT, count: int = 2):
    x_t = jax.random.normal(jax.random.key(1), (count, *model.sample_shape))
    t, r = jnp.linspace(0.9, 0.6, count), jnp.linspace(0.2, 0.1, count)
    return x_t, t, r, jnp.arange(count) % (model.num_classes + 1)


def test_rotations_entry_by_entry():
    """Pairs as complex numbers, along the sequence and on a grid behind a prefix."""
    x = np.random.default_rng(0).standard_normal((1, 6, 2, 8)).astype("f")
    pairs = x[..., ::2] + 1j * x[..., 1::2]
    along = [[n * 10000 ** (-i / 4) for i in range(4)] for n in range(6)]
    frequencies = (1, 10000 ** (-1 / 2))
    grid = [[0] * 4] * 2 + [[place * w for place in (row, column) for w in frequencies]
                            for row in range(2) for column in range(2)]
    for positions, angles in ((sequence_rotation(6, 8), along), (grid_rotation(2, 2, 8), grid)):
        turned = pairs * np.exp(1j * np.array(angles))[None, :, None]
        ours = rotate(jnp.asarray(x), positions)
        np.testing.assert_allclose(ours[..., ::2], turned.real, atol=1e-6)
        np.testing.assert_allclose(ours[..., 1::2], turned.imag, atol=1e-6)
    assert rotate(jnp.asarray(x, jnp.bfloat16), positions).dtype == jnp.bfloat16


def test_positions_of_a_network():
    for fields, expected in (({}, sequence_rotation(24, 8)), (PIXELS, grid_rotation(20, 2, 8))):
        for ours, theirs in zip(rotation(InContextDiT(**TINY | fields)), expected, strict=True):
            np.testing.assert_array_equal(ours, theirs)


def test_decoupled_is_the_plain_network_at_equal_times():
    """Apart it differs."""
    model, params = randomised()
    decoupled = InContextDiT(**TINY, **DECOUPLED)
    x_t, t, r, y = inputs(model)
    x_t, t, y = jnp.concatenate([x_t, x_t]), jnp.concatenate([t, t]), jnp.concatenate([y, y])

    def outputs(params, r):
        return [one.apply(params, x_t, t, r, y) for one in (model, decoupled)]

    expected, ours = gv.jit(outputs)(params, jnp.concatenate([t[:2], r]))
    np.testing.assert_allclose(ours[:2], expected[:2], rtol=1e-4, atol=1e-5)
    assert jnp.abs(ours[2:] - expected[2:]).max() > 1e-3


@pytest.mark.slow
def test_a_split_at_the_first_block_is_the_plain_network():
    """Other splits give other numbers. v alone is that of both heads; without a head for it, u."""
    model, params = randomised()
    x_t, t, r, y = inputs(model)
    splits = [InContextDiT(**TINY, **DECOUPLED | {"split_depth": n}) for n in (0, 1, 2)]
    expected, *ours = (gv.jit(one.apply)(params, x_t, t, r, y) for one in (model, *splits))
    differences = [float(jnp.abs(u - expected).max()) for u in ours]
    assert differences[0] < 1e-5 < 1e-3 < min(differences[1:]) and len(set(differences)) == 3
    _, v = gv.jit(model.apply_heads)(params, x_t, t, t, y)
    np.testing.assert_allclose(gv.jit(model.velocity)(params, x_t, t, y), v, rtol=1e-4, atol=1e-5)
    bare = InContextDiT(**TINY, velocity_head=False)
    np.testing.assert_array_equal(
        gv.jit(bare.velocity)(params, x_t, t, y), gv.jit(bare.apply)(params, x_t, t, t, y)
    )


def test_predicted_data_gives_velocities(monkeypatch):
    """(x_t - prediction) / max(t, min_time), below and above min_time."""
    model = InContextDiT(**TINY | PIXELS, min_time=0.2)
    x_t, _, r, y = inputs(model)
    predicted = {"u_head": jnp.full_like(x_t, 0.5), "v_head": jnp.full_like(x_t, -0.25)}
    monkeypatch.setattr(in_context_dit.InContextTransformer, "apply", lambda *_, **__: predicted)
    times = jnp.asarray([0.01, 0.8])
    for value, velocity in zip((0.5, -0.25), model.apply_heads({}, x_t, times, r, y), strict=True):
        expected = (x_t - value) / jnp.asarray([0.2, 0.8])[:, None, None, None]
        np.testing.assert_allclose(velocity, expected, rtol=1e-6)


@pytest.mark.slow
def test_initialisation():
    """Standard deviations as published; gates and the last layers are zero."""
    model = InContextDiT(**TINY | PIXELS | {"width": 128, "num_classes": 100})
    params = gv.jit(model.init)(jax.random.key(0))
    stds = {
        "label_embedding/embedding": 128**-0.5, "prefix/label": 128**-0.5,
        "prefix/interval": 128**-0.5, "interval_embedding/in/kernel": 256**-0.5,
        "guidance_embedding/scale/out/kernel": 128**-0.5, "position_embedding": 0.02,
        "blocks/attention/qkv/kernel": 0.32 * 128**-0.5,
        "blocks/attention/out/kernel": 0.32 * 128**-0.5, "blocks/mlp/gate/kernel": 0.32 * 128**-0.5,
        "v_head/blocks/mlp/in/kernel": 0.32 * 128**-0.5,
        "u_head/blocks/mlp/out/kernel": 0.32 * 341**-0.5,
        "patch_reduction/kernel": (2 / (12 + 7)) ** 0.5,
        "patch_embedding/kernel": (2 / (7 + 128)) ** 0.5,
    }  # fmt: skip
    leaves = {jax.tree_util.keystr(path, simple=True, separator="/"): leaf
              for path, leaf in jax.tree.leaves_with_path(params)}
    for name, std in stds.items():
        error = 4 / math.sqrt(2 * leaves[name].size)
        assert leaves[name].std() == pytest.approx(std, rel=error), name
    for name, leaf in leaves.items():
        if name.endswith(("_gate", "bias")) or "head/linear" in name:
            assert not leaf.any(), name
        elif name.endswith("scale") and "norm" in name:
            assert (leaf == 1).all(), name
        else:
            assert leaf.any(), name
    kernels = leaves["blocks/mlp/in/kernel"]
    assert (kernels[0] != kernels[1]).any()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("size", "millions"),
    [("B", 89), ("M", 174), ("L", 409), ("XL", 610)],
)
def test_number_of_parameters(size, millions):
    """Without the head for v, as published."""
    fields = {"input_size": 32, "channels": 4, "num_classes": 1000} | SIZES[size]
    shapes = abstract_params(InContextDiT(**fields, velocity_head=False))
    count = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))
    assert count / 1e6 == pytest.approx(millions, abs=0.6)


def test_the_published_networks_of_pixels():
    for image, patch in ((256, 16), (512, 32)):
        for size in PIXEL_SIZES.values():
            model = InContextDiT(input_size=image, channels=3, patch_size=patch, num_classes=1000,
                                 positions="rotary_2d", prediction="data", **size)  # fmt: skip
            assert model.tokens == 276
            assert (model.patch_bottleneck > 128) == (model.width > 1024)


@pytest.mark.slow
@pytest.mark.parametrize("fields", [{}, DECOUPLED | PIXELS], ids=["plain", "pixels"])
def test_flops_equal_those_of_xla(fields):
    """Of each part, and of the second head."""
    model = InContextDiT(**TINY | {"input_size": 16, "width": 96, "scan": False} | fields)
    params = abstract_params(model)
    x_t, t, r, y = jax.eval_shape(lambda: inputs(model, 4))
    hidden = jax.eval_shape(model.encode, params, x_t, t, y)

    def counted(function, *inputs) -> float:
        return jax.jit(function).lower(params, *inputs).cost_analysis()["flops"] / 4

    flops = model.flops
    one, both = (counted(part, hidden, r, y) for part in (model.decode, model.decode_heads))
    assert 1 < one / flops.decode < 1.1
    assert 1 < (both - one) / flops.velocity_head < 1.1
    assert 1 < counted(model.apply, x_t, t, r, y) / flops.forward < 1.1
    assert flops.encode + flops.decode == flops.forward
    bare = InContextDiT(**TINY, velocity_head=False).flops
    assert bare.velocity_head == 0


def gradient_of_heads(**fields):
    """The gradient of both heads, with the tangent of u in its target, and parameters."""
    model, params = randomised(**DECOUPLED | PIXELS, dtype="bfloat16", **fields)
    x_t, t, r, y = inputs(model, 3)

    def loss(params):
        def heads(x_t, t):
            return model.apply_heads(params, x_t, t, r, y)

        (u, v), (du_dt, _) = jax.jvp(heads, (x_t, t), (x_t, jnp.ones_like(t)))
        return jnp.sum((u - jax.lax.stop_gradient(du_dt)) ** 2 + v**2)

    return jax.grad(loss), params


@pytest.mark.slow
@pytest.mark.parametrize("remat", ["none", "dots", "full"])
def test_no_gradient_is_summed_in_bfloat16(remat):
    """Neither over tokens nor over samples, in scanned blocks with what is recomputed."""
    assert coarse_sums(*gradient_of_heads(remat=remat)) == []


@pytest.mark.slow
def test_bfloat16_is_near_float32():
    """Values and gradients, which are those of float32 for what many samples and tokens share."""
    model, params = randomised(**PIXELS | {"input_size": 32}, gradient_dtype="float32")
    coarse = InContextDiT(**TINY | PIXELS | {"input_size": 32}, dtype="bfloat16",
                          gradient_dtype="float32")  # fmt: skip
    params = jax.tree.map(lambda leaf: 0.3 * leaf, params)
    arguments = inputs(model, 16)

    def loss(params, model):
        u, v = model.apply_heads(params, *arguments)
        return jnp.mean(u**2 + v**2), (u, v)

    (expected, outputs), gradient = jax.jit(jax.value_and_grad(
        lambda params: loss(params, model), has_aux=True))(params)
    (ours, coarse_outputs), coarse_gradient = jax.jit(jax.value_and_grad(
        lambda params: loss(params, coarse), has_aux=True))(params)
    for one, other in zip(coarse_outputs, outputs, strict=True):
        assert one.dtype == jnp.float32
        gv.assert_near(one, other, 0.02)
    assert float(ours) == pytest.approx(float(expected), rel=0.02)
    for name in ("prefix", "position_embedding", "interval_embedding"):
        for one, other in zip(jax.tree.leaves(coarse_gradient[name]),
                              jax.tree.leaves(gradient[name]), strict=True):
            gv.assert_near(one, other, 0.05)


def test_parameters_are_float32_and_outputs_have_the_dtype_of_the_input():
    model = InContextDiT(**TINY, dtype="bfloat16")
    params = abstract_params(model)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    cast = jax.eval_shape(model.cast, params)
    for blocks in (cast["blocks"], cast["u_head"]["blocks"], cast["v_head"]["blocks"]):
        assert blocks["mlp"]["gate"]["kernel"].dtype == jnp.bfloat16
        assert blocks["attention_gate"].dtype == jnp.float32
    x_t, *others = inputs(model)
    for output in jax.eval_shape(model.apply_heads, params, x_t.astype(jnp.bfloat16), *others):
        assert output.dtype == jnp.bfloat16


@pytest.mark.parametrize(
    ("field", "value", "others"),
    [
        ("input_size", 0, {}), ("patch_size", 3, {}), ("patch_bottleneck", -1, {}),
        ("num_classes", -1, {}), ("depth", 5000, {}),
        ("head_depth", 0, {}), ("head_depth", 3, {}),
        ("heads", 3, {}), ("heads", 16, {}),
        ("heads", 8, {"positions": "rotary_2d"}),
        ("positions", "learned", {}),
        ("conditioning", "flow", {}), ("split_depth", 1, {}),
        ("split_depth", None, {"conditioning": "decoupled"}),
        ("split_depth", 3, {"conditioning": "decoupled"}),
        ("split_depth", -1, {"conditioning": "decoupled"}),
        ("remat", "some", {}), ("dtype", "float16", {}), ("gradient_dtype", "half", {}),
        ("attention", "fast", {}),
    ],
)  # fmt: skip
def test_bad_fields_are_named(field, value, others):
    with pytest.raises(InputError) as error:
        InContextDiT(**TINY | others | {field: value})
    assert str(error.value).startswith(f"{field}={value}: ")
    assert "\n" not in str(error.value)


def test_a_head_that_is_not_there_is_named():
    model, params = InContextDiT(**TINY, velocity_head=False), {}
    x_t, t, r, y = inputs(model)
    with pytest.raises(InputError, match=r"^model\.velocity_head=False: .* set it to True$"):
        model.decode_heads(params, in_context_dit.Hidden(x_t[:, 0], t, None), r, y)
    with pytest.raises(InputError, match=r"^x_t has shape \(2, 2, 4, 3\): .* \[b, 4, 4, 3\]$"):
        model.apply(params, x_t[:, :2], t, r, y)
