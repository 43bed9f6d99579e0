"""The network beyond the golden files: sizes, patches, initialisation, conditioning, dtypes."""

import functools
import math

import golden_values as gv
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dmf.errors import InputError
from dmf.models import layers
from dmf.models.abstract_params import abstract_params
from dmf.models.dit import SIZES, DiT
from dmf.types import ClassLabels, GuidanceInput, GuidedCondition

TINY = {
    "input_size": 8, "channels": 3, "depth": 3, "width": 32, "heads": 2, "num_classes": 5,
}  # fmt: skip


def count(model: DiT) -> float:
    """Millions of parameters."""
    shapes = abstract_params(model)
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes)) / 1e6


def published(size: str, **changes) -> DiT:
    return DiT(**{"input_size": 32, "channels": 4, "num_classes": 1000, **SIZES[size], **changes})


@functools.cache
def initialised(**changes):
    model = DiT(**TINY | changes)
    return model, gv.jit(model.init)(jax.random.key(0))


def randomised(**changes):
    """With random values also where the initialisation is zero."""
    model = DiT(**TINY | changes)
    return model, random_params(model)


def random_params(model):
    draw = np.random.default_rng(0).standard_normal
    return jax.tree.map(
        lambda leaf: jnp.asarray(0.2 * draw(leaf.shape), "f"), abstract_params(model)
    )


def inputs(model: DiT, seed: int = 0):
    keys = jax.random.split(jax.random.key(seed), 4)
    x_t = jax.random.normal(keys[0], (2, *model.sample_shape))
    t, r = jnp.asarray([0.9, 0.6]), jnp.asarray([0.2, 0.1])
    return x_t, t, r, jnp.asarray([0, min(3, model.num_classes)])


@functools.cache
def compiled(model: DiT):
    return gv.jit(model.apply)


def output(model: DiT, params, arguments) -> jax.Array:
    return compiled(model)(params, *arguments)


@pytest.mark.parametrize(
    ("size", "millions"),
    [("S", 32.9), ("B", 130.3), ("M", 306.7), ("L", 457.8), ("XL", 674.8)],
)
def test_number_of_parameters(size, millions):
    assert abs(count(published(size)) - millions) < 0.12
    second = count(published(size, conditioning="meanflow")) - count(published(size))
    assert 0.2 < second < 1.7
    decoupled = published(size, conditioning="decoupled", split_depth=4)
    assert count(decoupled) == count(published(size))


@pytest.mark.parametrize("patch", [2, 4, 8])
def test_patches_of_the_published_sizes(patch):
    model = published("B", patch_size=patch)
    params = abstract_params(model)
    arguments = jax.eval_shape(lambda: inputs(model))
    assert jax.eval_shape(model.apply, params, *arguments).shape == (2, 32, 32, 4)


def test_output_is_zero_at_initialisation():
    model, params = initialised(learned_variance=True)
    assert not output(model, params, inputs(model)).any()
    assert not model.log_variance(params, *inputs(model)[1:3]).any()


def test_initialisation():
    """Modulations are zero, so that every block is the identity; blocks have different values."""
    _, params = initialised(learned_variance=True)
    for zero in (params["blocks"]["modulation"], params["final"]):
        assert not any(leaf.any() for leaf in jax.tree.leaves(zero))
    mlp = params["blocks"]["mlp"]["in"]
    assert not mlp["bias"].any()
    bound = (6 / (32 + 128)) ** 0.5
    assert 0.9 * bound < jnp.abs(mlp["kernel"]).max() <= bound
    assert (mlp["kernel"][0] != mlp["kernel"][1]).any()
    labels, times = params["label_embedding"]["embedding"], params["time_embedding"]["in"]["kernel"]
    assert abs(labels.std() - 0.02) < 0.004
    assert abs(times.std() - 0.02) < 0.001
    qkv = params["blocks"]["attention"]["qkv"]["kernel"]
    bound = (6 / (32 + 3 * 32)) ** 0.5
    assert 0.9 * bound < jnp.abs(qkv).max() <= bound


@pytest.mark.parametrize("split_depth", [0, 1, 3])
def test_decoupled_is_the_flow_model_where_the_times_are_equal(split_depth):
    flow, params = randomised()
    decoupled = DiT(**TINY, conditioning="decoupled", split_depth=split_depth)
    x_t, t, r, y = inputs(flow)
    expected = output(flow, params, (x_t, t, t, y))
    ours = output(decoupled, params, (x_t, t, t, y))
    np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-5)
    apart = output(decoupled, params, (x_t, t, r, y))
    assert jnp.abs(apart - expected).max() > 1e-3
    np.testing.assert_array_equal(output(flow, params, (x_t, t, r, y)), expected)


def test_block_times_can_be_spelled_out():
    model, params = randomised(conditioning="decoupled", split_depth=2)
    spelled_out = DiT(**TINY, conditioning="decoupled", block_times="ttr")
    np.testing.assert_array_equal(
        output(spelled_out, params, inputs(model)), output(model, params, inputs(model))
    )
    interleaved = DiT(**TINY, conditioning="decoupled", block_times="interleaved")
    assert (interleaved.resolved_block_times, interleaved.encoder_depth) == ("trt", 1)
    ours = output(interleaved, params, inputs(model))
    spelled_out = DiT(**TINY, conditioning="decoupled", block_times="trt")
    expected = output(spelled_out, params, inputs(model))
    np.testing.assert_array_equal(ours, expected)
    assert (ours != output(model, params, inputs(model))).any()


def test_a_decoder_of_both_times_starts_as_one_of_r():
    """Its embedding of t - r is zero at initialisation; with other values it depends on t too."""
    model, _ = randomised(conditioning="decoupled", split_depth=2)
    both = DiT(**TINY, conditioning="decoupled", block_times="both", split_depth=2)
    _, params = randomised(conditioning="decoupled", block_times="both", split_depth=2)
    initial = gv.jit(both.init)(jax.random.key(0))["both_embedding"]
    assert initial["in"]["kernel"].any()
    started = params | {"both_embedding": initial}
    x_t, t, r, y = inputs(model)
    expected = output(model, params, (x_t, t, r, y))
    ours = output(both, started, (x_t, t, r, y))
    np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-6)
    assert (output(both, params, (x_t, t, r, y)) != expected).any()


def test_the_final_layer_is_conditioned_as_the_decoder():
    """Where all blocks are conditioned on t, only the final layer tells the block times apart."""
    outputs = []
    for times, split_depth, final in (("split", 3, "r"), ("both", 3, "b"), ("ttt", None, "r")):
        model = DiT(**TINY, conditioning="decoupled", block_times=times, split_depth=split_depth)
        assert model.final_layer_time == final
        _, params = randomised(conditioning="decoupled", block_times="both", split_depth=3)
        outputs.append(output(model, params, inputs(model)))
    np.testing.assert_array_equal(outputs[0], outputs[2])
    assert (outputs[0] != outputs[1]).any()


@pytest.mark.parametrize(("times", "depends"), [(("t", "r"), "tr"), (("t-r",), "d"), (("t",), "t")])
def test_a_mean_flow_network_depends_on_the_times_that_it_embeds(times, depends):
    model, params = randomised(conditioning="meanflow", embedded_times=times)
    assert ("time_embedding" in params) == ("t" in times)
    x_t, t, r, y = inputs(model)
    first = output(model, params, (x_t, t, r, y))
    moved = {"t": (t + 0.05, r), "r": (t, r + 0.05), "d": (t + 0.05, r + 0.05)}
    changes = {name: (output(model, params, (x_t, *pair, y)) != first).any()
               for name, pair in moved.items()}
    expected = {"tr": (True, True, True), "d": (True, True, False), "t": (True, False, True)}
    assert tuple(map(bool, changes.values())) == expected[depends]


def test_guidance_as_an_input():
    """At initialisation it changes nothing; labels alone mean no guidance; each number matters."""
    plain, _ = randomised()
    model, params = randomised(guidance_input=True)
    x_t, t, r, y = inputs(model)

    def guided(*values: float) -> GuidedCondition:
        guidance = GuidanceInput(*(jnp.full(2, value) for value in values))
        return GuidedCondition(ClassLabels(y, model.num_classes), guidance)

    initial = gv.jit(model.init)(jax.random.key(0))["guidance_embedding"]
    started = params | {"guidance_embedding": initial}
    expected = output(plain, params, (x_t, t, r, y))
    np.testing.assert_allclose(
        output(model, started, (x_t, t, r, guided(3.0, 0.2, 0.8))), expected, rtol=1e-5, atol=1e-6
    )
    bare = output(model, params, (x_t, t, r, y))
    np.testing.assert_array_equal(output(model, params, (x_t, t, r, guided(1.0, 0.0, 1.0))), bare)
    for values in ((3.0, 0.0, 1.0), (1.0, 0.2, 1.0), (1.0, 0.0, 0.8)):
        assert (output(model, params, (x_t, t, r, guided(*values))) != bare).any()


@pytest.mark.parametrize(("conditioning", "scan", "remat"), [
    ("decoupled", False, "none"), ("decoupled", True, "dots"), ("decoupled", False, "full"),
    ("flow", False, "none"), ("meanflow", False, "none"),
])  # fmt: skip
def test_execution_changes_no_output(conditioning, scan, remat):
    split = {"split_depth": 2} if conditioning == "decoupled" else {}
    model, params = randomised(conditioning=conditioning, **split)
    other = DiT(**TINY, conditioning=conditioning, **split, scan=scan, remat=remat)
    expected = output(model, params, inputs(model))
    assert jnp.abs(expected).max() > 0.1
    np.testing.assert_allclose(
        output(other, params, inputs(model)), expected, rtol=1e-4, atol=1e-5
    )


def test_bfloat16_is_near_float32():
    model, params = randomised(qk_norm=True)
    coarse = DiT(**TINY, qk_norm=True, dtype="bfloat16")
    expected = output(model, params, inputs(model))
    ours = output(coarse, params, inputs(model))
    assert ours.dtype == jnp.float32
    gv.assert_near(ours, expected, 0.03)
    assert np.linalg.norm(ours - expected) > 1e-4 * np.linalg.norm(expected)


def test_parameters_are_float32_and_the_output_has_the_dtype_of_the_input():
    model = DiT(**TINY, dtype="bfloat16", learned_variance=True)
    params = abstract_params(model)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    x_t, *others = inputs(model)
    for dtype in (jnp.float32, jnp.bfloat16):
        u = jax.eval_shape(model.apply, params, x_t.astype(dtype), *others)
        assert u.dtype == dtype
    assert jax.eval_shape(model.log_variance, params, *others[:2]).dtype == jnp.float32


def test_the_guidance_scale_is_embedded_by_its_inverse():
    """Every scale from 1 on is then a number in (0, 1], as times are."""
    scale, start, end = jnp.asarray([1.0, 4.0]), jnp.asarray([0.1, 0.2]), jnp.asarray([0.5, 0.9])
    dtype = jnp.dtype("float32")
    module, time = layers.GuidanceEmbedding(8, dtype), layers.TimeEmbedding(8, dtype)
    shapes = jax.eval_shape(module.init, jax.random.key(0), scale, start, end)["params"]
    draw = np.random.default_rng(0).standard_normal
    params = jax.tree.map(lambda leaf: jnp.asarray(draw(leaf.shape), jnp.float32), shapes)
    numbers = {"scale": jnp.asarray([1.0, 0.25]), "low": start, "high": end}
    expected = sum(time.apply({"params": params[name]}, value) for name, value in numbers.items())
    embedded = module.apply({"params": params}, scale, start, end)
    np.testing.assert_allclose(embedded, expected, rtol=1e-5, atol=1e-5)


def test_features_are_taken_after_their_block():
    """A later block changes the velocity and not the features; an earlier one changes both."""
    model, params = randomised(alignment_depth=2, alignment_width=12, alignment_hidden=16)
    apply = gv.jit(model.apply_with_features)
    u, features = apply(params, *inputs(model))
    assert features.shape == (2, 16, 12)
    np.testing.assert_allclose(u, output(model, params, inputs(model)), rtol=1e-5, atol=1e-5)
    for block, reaches in ((1, True), (2, False)):
        bias = params["blocks"]["mlp"]["out"]["bias"].at[block].add(jnp.arange(32.0))
        mlp = params["blocks"]["mlp"] | {"out": params["blocks"]["mlp"]["out"] | {"bias": bias}}
        changed = params | {"blocks": params["blocks"] | {"mlp": mlp}}
        other_u, other_features = apply(changed, *inputs(model))
        assert (other_u != u).any()
        assert (other_features != features).any() == reaches


@pytest.mark.slow
def test_features_can_be_taken_after_the_last_block():
    model, params = randomised(alignment_depth=3, alignment_width=12)
    assert model.apply_with_features(params, *inputs(model))[1].shape == (2, 16, 12)


@pytest.mark.parametrize("scan", [True, pytest.param(False, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "fields",
    [pytest.param({"conditioning": "decoupled", "split_depth": 0}, marks=pytest.mark.slow),
     {"conditioning": "decoupled", "split_depth": 1},
     pytest.param({"conditioning": "decoupled", "split_depth": 3}, marks=pytest.mark.slow),
     {"conditioning": "decoupled", "block_times": "interleaved"},
     pytest.param({"conditioning": "decoupled", "block_times": "both", "split_depth": 1},
                  marks=pytest.mark.slow),
     pytest.param({"conditioning": "decoupled", "block_times": "tbr"}, marks=pytest.mark.slow),
     pytest.param({"conditioning": "flow"}, marks=pytest.mark.slow), {"conditioning": "meanflow"},
     {"conditioning": "meanflow", "embedded_times": ("r",), "guidance_input": True}],
    ids=["all_r", "split", "all_t", "interleaved", "both", "letters", "flow", "meanflow", "of_r"],
)  # fmt: skip
def test_encode_then_decode_equals_apply(fields, scan):
    check_encode_then_decode(scan=scan, **fields)


@pytest.mark.parametrize("remat", ["dots", pytest.param("full", marks=pytest.mark.slow)])
def test_encode_then_decode_equals_apply_with_remat(remat):
    check_encode_then_decode(conditioning="decoupled", split_depth=1, remat=remat)


def check_encode_then_decode(**fields):
    model, params = randomised(**fields)
    x_t, t, r, y = inputs(model)
    decode = gv.jit(model.decode)
    hidden = gv.jit(model.encode)(params, x_t, t, y)
    decoded = decode(params, hidden, r, y)
    np.testing.assert_allclose(decoded, output(model, params, (x_t, t, r, y)), rtol=1e-5, atol=1e-5)
    # The same tokens serve another r.
    other = decode(params, hidden, t, y)
    np.testing.assert_allclose(other, output(model, params, (x_t, t, t, y)), rtol=1e-5, atol=1e-5)


def test_unconditional_network():
    model, params = randomised(num_classes=0)
    assert params["label_embedding"]["embedding"].shape == (1, 32)
    assert jnp.isfinite(output(model, params, inputs(model))).all()


def test_labels_and_the_null_label_differ():
    model, params = randomised()
    x_t, t, r, _ = inputs(model)
    u = [output(model, params, (x_t, t, r, jnp.full(2, y))) for y in (0, 4, model.num_classes)]
    assert all((u[i] != u[j]).any() for i in range(3) for j in range(i))


@pytest.mark.parametrize(
    ("field", "value", "others"),
    [
        *[(name, 0, {}) for name in ("input_size", "channels", "patch_size", "depth")],
        *[(name, 0, {}) for name in ("width", "heads", "alignment_width", "alignment_hidden")],
        *[("mlp_ratio", value, {}) for value in (0.0, -1.0, float("nan"))],
        ("patch_size", 3, {}),
        ("heads", 5, {}),
        ("width", 30, {}),
        ("num_classes", -1, {}),
        ("conditioning", "imf", {}),
        ("split_depth", 2, {}),
        ("split_depth", None, {"conditioning": "decoupled"}),
        ("split_depth", 4, {"conditioning": "decoupled"}),
        ("split_depth", -1, {"conditioning": "decoupled"}),
        ("block_times", "tr", {"conditioning": "decoupled"}),
        ("block_times", "trx", {"conditioning": "decoupled"}),
        ("block_times", "ttr", {}),
        ("split_depth", 2, {"conditioning": "decoupled", "block_times": "ttr"}),
        ("split_depth", None, {"conditioning": "decoupled", "block_times": "both"}),
        *[("embedded_times", times, {"conditioning": "meanflow"})
          for times in (("t", "s"), ("t", "t"), ())],
        ("embedded_times", ("t", "r"), {}),
        ("embedded_times", ("t-r",), {"conditioning": "decoupled", "split_depth": 2}),
        ("alignment_depth", 4, {}),
        ("alignment_depth", -1, {}),
        ("remat", "some", {}),
        ("dtype", "float16", {}),
        ("attention", "fast", {}),
    ],
)  # fmt: skip
def test_bad_fields_are_named(field, value, others):
    with pytest.raises(InputError) as error:
        DiT(**TINY | others | {field: value})
    assert str(error.value).startswith(f"{field}={value}: ")
    assert "\n" not in str(error.value)


def test_input_of_another_size_is_named():
    model, params = initialised()
    x_t, *others = inputs(model)
    with pytest.raises(InputError, match=r"^x_t has shape \(2, 4, 8, 3\): .* \[b, 8, 8, 3\]$"):
        model.apply(params, x_t[:, :4], *others)
