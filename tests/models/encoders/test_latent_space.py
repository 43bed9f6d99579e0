"""The latent space: decoding in groups, its memory, and the identity of its images."""

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

from dmf.checkpoints import load
from dmf.checkpoints.convert.name_tables import to_params
from dmf.checkpoints.convert.tables.autoencoder_kl import NAMINGS
from dmf.data.pixels import to_uint8
from dmf.errors import InputError
from dmf.evaluation.evaluator import Evaluator
from dmf.models.build import network
from dmf.models.encoders.autoencoder_kl import AutoencoderKL
from dmf.models.encoders.latent_scaling import LatentScaling
from dmf.models.encoders.latent_space import LatentSpace
from dmf.objectives.build import interpolant
from dmf.runtime.sharding import local_mesh, map_over_devices
from dmf.sampling import image_writers
from dmf.sampling.build import sampling
from dmf.sampling.generator import Generator

SMALL = AutoencoderKL(widths=(8, 8), layers_per_block=1, groups=4)
LATENTS = jax.random.normal(jax.random.key(0), (11, 4, 4, 4))
SCALING = LatentScaling(scale=0.5, shift=0.25)


@functools.cache
def params(seed: int = 1) -> Any:
    draw = np.random.default_rng(seed)
    shapes = jax.eval_shape(SMALL.init, jax.random.key(0))
    return jax.tree.map(lambda leaf: draw.normal(0, 0.2, leaf.shape).astype("f"), shapes)


def space(size: int, autoencoder: AutoencoderKL = SMALL, dtype: str = "float32") -> LatentSpace:
    return LatentSpace(
        autoencoder=autoencoder, scaling=SCALING, decode_batch=size, decode_dtype=dtype
    )


@functools.cache
def one_by_one() -> np.ndarray:
    decode = gv.jit(lambda x: SMALL.decode(params(), SCALING.invert(x)))
    return np.concatenate([decode(x[None]) for x in LATENTS])


@pytest.mark.parametrize(("count", "size"), [
    (11, 4), *(pytest.param(*case, marks=pytest.mark.slow)
               for case in ((8, 4), (3, 4), (3, 1), (11, 11)))
])
def test_any_count_is_decoded_as_one_by_one(count, size):
    images = gv.jit(space(size).decode)(params(), LATENTS[:count])
    assert images.shape == (count, 8, 8, 3)
    np.testing.assert_allclose(images, one_by_one()[:count], atol=1e-5)


@pytest.mark.parametrize(
    ("count", "size", "rows"),
    [
        (11, 4, [4, 4, 3]),
        *(pytest.param(*case, marks=pytest.mark.slow)
          for case in ((3, 4, [3]), (8, 4, [4, 4]), (5, 1, [1] * 5), (6, 5, [5, 1]))),
    ],
)
def test_each_latent_is_decoded_once(count, size, rows):
    counts = []

    class Counted(AutoencoderKL):
        def decode(self, params, latents):
            jax.debug.callback(lambda latents: counts.append(len(latents)), latents)
            return super().decode(params, latents)

    counted = Counted(**vars(SMALL))
    jax.block_until_ready(gv.jit(space(size, counted).decode)(params(), LATENTS[:count]))
    jax.effects_barrier()
    assert sorted((n for n in counts if n), reverse=True) == rows


def test_no_network_is_called_without_rows():
    """DC-AE cannot reshape what has no values."""

    class Strict(AutoencoderKL):
        def decode(self, params, latents):
            assert latents.shape[0] > 0
            return super().decode(params, latents)

    strict = Strict(**vars(SMALL))
    for count in (8, 3):
        shape = jax.eval_shape(space(4, strict).decode, params(), LATENTS[:count]).shape
        assert shape == (count, 8, 8, 3)


@pytest.mark.slow
def test_memory_is_that_of_a_group():
    def needed(count: int, size: int) -> int:
        latents = jax.ShapeDtypeStruct((count, 16, 16, 4), jnp.float32)
        compiled = gv.jit(space(size).decode).lower(params(), latents).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert needed(32, 2) < 1.5 * needed(16, 2)
    assert needed(32, 32) > 4 * needed(32, 2)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_bits_do_not_depend_on_the_number_of_devices(dtype):
    """Each device decodes five latents, in groups of two and a remaining one."""
    latents = jax.random.normal(jax.random.key(1), (40, 4, 4, 4))
    decode = space(2, dtype=dtype).decode
    eight = map_over_devices(decode, local_mesh(8))(params(), latents)
    for count in (1, 2):
        mapped = map_over_devices(decode, local_mesh(count))
        parts = [mapped(params(), x) for x in jnp.split(latents, 8 // count)]
        np.testing.assert_array_equal(eight, np.concatenate(parts))


def test_bits_do_not_depend_on_other_latents_of_a_group():
    others = jax.random.normal(jax.random.key(2), LATENTS.shape).at[2::4].set(LATENTS[2::4])
    decode = gv.jit(space(4).decode)
    first, second = (np.asarray(decode(params(), x)) for x in (LATENTS, others))
    np.testing.assert_array_equal(first[2::4], second[2::4])
    assert np.abs(first - second)[::4].max() > 0.01


@pytest.mark.slow
def test_bfloat16_in_levels_of_eight_bits():
    """The published decoder, on images whose standard deviation is scaled to half the range."""
    golden = gv.load("vae_0")
    published = AutoencoderKL(widths=(32, 32, 64), layers_per_block=1, groups=8)
    abstract = jax.eval_shape(published.init, jax.random.key(0))
    weights = to_params(NAMINGS[0].table(published), gv.autoencoder_tensors(), abstract)
    exact, rough = (
        gv.jit(space(1, published, dtype).decode)(weights, SCALING.apply(golden.images("z")))
        for dtype in ("float32", "bfloat16")
    )
    gv.assert_near(exact, golden.images("decoded"), 1e-5)
    assert rough.dtype == jnp.float32
    levels = [
        np.asarray(to_uint8((x - exact.mean()) / (2 * exact.std())), int) for x in (exact, rough)
    ]
    difference = np.abs(levels[0] - levels[1])
    assert 0.1 < difference.mean() < 0.8
    assert difference.max() <= 8


@pytest.mark.slow
def test_the_count_can_be_symbolic():
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
        ({"decode_dtype": "float16"}, r"decode_dtype=float16: choose one of float32, bfloat16"),
    ],
)
def test_fields_are_checked(fields, message):
    config = tiny.config({f"sampling.{name}": value for name, value in fields.items()})
    config.model.channels = 4
    with pytest.raises(InputError, match=rf"^sampling\.{message}$"):
        load.build_latent_space(config, SMALL)


def identity(monkeypatch, overrides: dict[str, Any] | None = None, *, seed: int = 1) -> Any:
    monkeypatch.setattr(load, "load_autoencoder", lambda directory: (SMALL, params(seed)))
    fields = {"model.channels": 4, "latents.autoencoder": "any"}
    config = tiny.config(fields | (overrides or {}))
    settings = sampling(config.sampling, interpolant(config.objective))
    latents = load.load_latent_space(config)
    return Generator(network(config.model), settings, latents, mesh=local_mesh(1)).identity


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
def test_images_are_identified_by_what_they_depend_on(monkeypatch, change):
    assert identity(monkeypatch, change) != identity(monkeypatch)


def test_a_decoder_is_identified_by_its_parameters_not_by_its_directory(monkeypatch):
    assert identity(monkeypatch, seed=2) != identity(monkeypatch)
    assert identity(monkeypatch, {"latents.autoencoder": "other"}) == identity(monkeypatch)


@pytest.mark.slow
def test_commands_identify_their_work_by_what_images_depend_on(monkeypatch, tmp_path):
    """So they do not resume parts that were made with another setting."""
    identities = []
    monkeypatch.setattr(
        image_writers, "write_images", lambda *_, identity, **__: identities.append(identity)
    )
    monkeypatch.setattr(
        Evaluator, "measure", lambda _, subject, **__: identities.append(subject.identity) or {}
    )
    for verb in ("sample", "evaluate"):
        output = tmp_path / {"sample": "images.npz", "evaluate": "result.json"}[verb]
        for size in (2, 3):
            assert tiny.dmf(verb, f"--checkpoint={tiny.flow_run()}", f"--output={output}",
                            "--steps=1", f"--config.sampling.decode_batch={size}") == 0
    assert all("'decode_batch': 2" in str(one) for one in identities[::2])
    assert all("'decode_batch': 3" in str(one) for one in identities[1::2])
    assert len(identities) == 4
    assert json.loads(output.read_text())["sampling"]["decode_batch"] == 3


def test_stored_configs_without_decoding_fields_have_the_defaults(monkeypatch):
    stored = load.config_to_json(tiny.config({"model.channels": 4, "sampling.shift": 1.5}))
    for name in ("decode_batch", "decode_dtype"):
        del stored["sampling"][name]
    config = load.config_from_json(stored)
    assert config.sampling.shift == 1.5
    latent_space = load.build_latent_space(config, SMALL)
    assert (latent_space.decode_batch, latent_space.decode_dtype) == (8, "float32")
