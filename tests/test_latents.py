"""Decoding some latents at a time: what it makes, what it costs, and what tells its images."""

import functools
import json
from typing import Any

import golden_values as gv
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from jax import export

from dmf import loading, outputs
from dmf.components import network
from dmf.convert.autoencoder import SPELLINGS
from dmf.convert.names import to_ours
from dmf.encoders.autoencoder import Autoencoder
from dmf.encoders.latents import LatentSpace
from dmf.evaluator import Evaluator
from dmf.generation import Generator
from dmf.images import to_uint8
from dmf.scaling import Scaling
from dmf.sharding import by_device, local_mesh
from dmf.typing import InputError

SMALL = Autoencoder(widths=(8, 8), layers_per_block=1, groups=4)
LATENTS = jax.random.normal(jax.random.key(0), (11, 4, 4, 4))
SCALING = Scaling(scale=0.5, shift=0.25)


@functools.cache
def params(seed: int = 1) -> Any:
    draw = np.random.default_rng(seed)
    shapes = jax.eval_shape(SMALL.init, jax.random.key(0))
    return jax.tree.map(lambda leaf: draw.normal(0, 0.2, leaf.shape).astype("f"), shapes)


def space(size: int, autoencoder: Autoencoder = SMALL, dtype: str = "float32") -> LatentSpace:
    return LatentSpace(
        autoencoder=autoencoder, scaling=SCALING, decode_batch=size, decode_dtype=dtype
    )


@functools.cache
def one_by_one() -> np.ndarray:
    decode = gv.jit(lambda x: SMALL.decode(params(), SCALING.invert(x)))
    return np.concatenate([decode(x[None]) for x in LATENTS])


@pytest.mark.parametrize(("count", "size"), [(8, 4), (11, 4), (3, 4), (3, 1), (11, 11)])
def test_any_count_is_decoded_as_one_by_one(count, size):
    images = gv.jit(space(size).decode)(params(), LATENTS[:count])
    assert images.shape == (count, 8, 8, 3)
    np.testing.assert_allclose(images, one_by_one()[:count], atol=1e-5)


@pytest.mark.parametrize(
    ("count", "size", "rows"),
    [(8, 4, [4, 4]), (11, 4, [4, 4, 3]), (3, 4, [3]), (5, 1, [1] * 5), (6, 5, [5, 1])],
)
def test_nothing_is_decoded_twice(count, size, rows):
    seen = []

    class Counted(Autoencoder):
        def decode(self, params, latents):
            jax.debug.callback(lambda latents: seen.append(len(latents)), latents)
            return super().decode(params, latents)

    counted = Counted(**vars(SMALL))
    jax.block_until_ready(gv.jit(space(size, counted).decode)(params(), LATENTS[:count]))
    jax.effects_barrier()
    assert sorted((n for n in seen if n), reverse=True) == rows


def test_memory_is_that_of_a_group():
    def needed(count: int, size: int) -> int:
        latents = jax.ShapeDtypeStruct((count, 16, 16, 4), jnp.float32)
        compiled = gv.jit(space(size).decode).lower(params(), latents).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert needed(32, 2) < 1.5 * needed(16, 2)
    assert needed(32, 32) > 4 * needed(32, 2)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_bits_do_not_depend_on_the_number_of_devices(dtype):
    """Of a share of five, in groups of two and what is left."""
    latents = jax.random.normal(jax.random.key(1), (40, 4, 4, 4))
    decode = space(2, dtype=dtype).decode
    eight = by_device(decode, local_mesh(8))(params(), latents)
    for count in (1, 2):
        mapped = by_device(decode, local_mesh(count))
        parts = [mapped(params(), x) for x in jnp.split(latents, 8 // count)]
        np.testing.assert_array_equal(eight, np.concatenate(parts))


def test_bits_do_not_depend_on_the_others_of_a_group():
    others = jax.random.normal(jax.random.key(2), LATENTS.shape).at[2::4].set(LATENTS[2::4])
    decode = gv.jit(space(4).decode)
    ours, theirs = (np.asarray(decode(params(), x)) for x in (LATENTS, others))
    np.testing.assert_array_equal(ours[2::4], theirs[2::4])
    assert np.abs(ours - theirs)[::4].max() > 0.01


def test_bfloat16_in_levels_of_eight_bits():
    """Of the published decoder, with images of which one standard deviation is half the range."""
    golden = gv.load("vae_0")
    published = Autoencoder(widths=(32, 32, 64), layers_per_block=1, groups=8)
    abstract = jax.eval_shape(published.init, jax.random.key(0))
    weights = to_ours(SPELLINGS[0].table(published), gv.autoencoder_tensors(), abstract)
    exact, rough = (
        gv.jit(space(1, published, dtype).decode)(weights, SCALING.apply(golden.images("z")))
        for dtype in ("float32", "bfloat16")
    )
    gv.assert_near(exact, golden.images("decoded"), 1e-5)
    assert rough.dtype == jnp.float32
    levels = [
        np.asarray(to_uint8((x - exact.mean()) / (2 * exact.std())), int) for x in (exact, rough)
    ]
    apart = np.abs(levels[0] - levels[1])
    assert 0.1 < apart.mean() < 0.8
    assert apart.max() <= 8


def test_the_count_may_be_a_symbol():
    (n,) = export.symbolic_shape("n")
    shape = jax.ShapeDtypeStruct((n, 4, 4, 4), jnp.float32)
    decode = gv.jit(lambda x: space(4).decode(params(), x))
    function = export.deserialize(export.export(decode)(shape).serialize())
    for count in (11, 8, 1):
        images = jax.jit(function.call)(LATENTS[:count])
        np.testing.assert_allclose(images, one_by_one()[:count], atol=1e-5)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"decode_batch": 0}, r"decode_batch=0: give a whole number >= 1"),
        ({"decode_dtype": "float16"}, r"decode_dtype=float16: choose float32 or bfloat16"),
    ],
)
def test_fields_are_checked(fields, message):
    config = tiny.config({f"sampling.{name}": value for name, value in fields.items()})
    config.model.channels = 4
    with pytest.raises(InputError, match=rf"^sampling\.{message}$"):
        loading.latent_space_of(config, SMALL)


def identity(monkeypatch, overrides: dict[str, Any] | None = None, *, seed: int = 1) -> Any:
    monkeypatch.setattr(loading, "load_encoder", lambda directory, name: (SMALL, params(seed)))
    fields = {"model.channels": 4, "latents.autoencoder": "any"}
    config = tiny.config(fields | (overrides or {}))
    return Generator(network(config), config, on=local_mesh(1)).identity


@pytest.mark.parametrize(
    "change",
    [
        {"sampling.decode_batch": 3},
        {"sampling.decode_dtype": "bfloat16"},
        {"sampling.shift": 1.5},
        {"latents.scale": 0.5},
        {"model.split_depth": 1, "model.conditioning": "decoupled"},
    ],
    ids=str,
)
def test_what_images_depend_on_tells_them(monkeypatch, change):
    assert identity(monkeypatch, change) != identity(monkeypatch)


def test_a_decoder_is_told_by_its_parameters_not_by_its_place(monkeypatch):
    assert identity(monkeypatch, seed=2) != identity(monkeypatch)
    assert identity(monkeypatch, {"latents.autoencoder": "other"}) == identity(monkeypatch)


def test_commands_tell_their_work_by_what_images_depend_on(monkeypatch, tmp_path):
    """So that parts that were made with another setting are not taken up."""
    seen = []
    monkeypatch.setattr(outputs, "write_images", lambda *_, identity, **__: seen.append(identity))
    monkeypatch.setattr(Evaluator, "measure", lambda _, of: seen.append(of.identity) or {})
    for verb in ("sample", "evaluate"):
        output = tmp_path / {"sample": "images.npz", "evaluate": "result.json"}[verb]
        for size in (2, 3):
            assert tiny.dmf(verb, f"--checkpoint={tiny.flow_run()}", f"--output={output}",
                            "--steps=1", f"--config.sampling.decode_batch={size}") == 0
    assert all("'decode_batch': 2" in str(one) for one in seen[::2])
    assert all("'decode_batch': 3" in str(one) for one in seen[1::2])
    assert len(seen) == 4
    assert json.loads(output.read_text())["sampling"]["decode_batch"] == 3


def test_configs_that_do_not_say_how_to_decode(monkeypatch):
    stored = loading.plain(tiny.config({"model.channels": 4, "sampling.shift": 1.5}))
    for name in ("decode_batch", "decode_dtype"):
        del stored["sampling"][name]
    config = loading.as_config(stored)
    assert config.sampling.shift == 1.5
    made = loading.latent_space_of(config, SMALL)
    assert (made.decode_batch, made.decode_dtype) == (8, "float32")
