"""Decoding in tiles: the same images where the reach of the decoder permits, blending, its memory,
and what is refused."""

import dataclasses
import functools

import golden_values as gv
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from jax import export

from dmf.checkpoints import load
from dmf.errors import InputError
from dmf.models import TAESD, AutoencoderDC, AutoencoderKL
from dmf.models.encoders.latent_scaling import LatentScaling
from dmf.models.encoders.latent_space import LatentSpace
from dmf.models.encoders.tiled_decoding import decode_in_tiles, tile_starts, tile_weights

SMALL = TAESD(width=4, encoder_blocks=(0, 0), decoder_blocks=(0, 1))
LATENTS = 2 * jax.random.normal(jax.random.key(0), (3, 13, 10, 4))


@functools.cache
def params(network=SMALL):
    draw = np.random.default_rng(1)
    shapes = jax.eval_shape(network.init, jax.random.key(0))
    return jax.tree.map(lambda leaf: draw.normal(0, 0.3, leaf.shape).astype("f"), shapes)


def space(network=SMALL, tiles=(), batch=2) -> LatentSpace:
    return LatentSpace(autoencoder=network, scaling=LatentScaling(scale=0.5), decode_tiles=tiles,
                       decode_batch=batch)


@functools.cache
def decoded(network=SMALL, tiles=()) -> np.ndarray:
    return np.asarray(gv.jit(space(network, tiles).decode)(params(network), LATENTS))


def difference(network, tiles) -> float:
    return float(np.abs(decoded(network, tiles) - decoded(network)).max())


@dataclasses.dataclass(frozen=True)
class Repeat:
    """Latents as pixels, in blocks of 3 x 3."""

    factor, channels, latent_channels, default_scaling = 3, 2, 2, LatentScaling()

    def init(self, key):
        return {}

    def encode(self, params, images):
        return images[:, ::3, ::3]

    def decode(self, params, latents):
        return jnp.repeat(jnp.repeat(latents, 3, axis=1), 3, axis=2)


def test_a_decoder_of_bounded_reach_gives_the_same_images():
    """An overlap of twice the reach is enough, and the least."""
    assert (SMALL.decoder_reach, TAESD().decoder_reach) == (4, 19)
    assert np.abs(decoded()).max() > 1
    assert difference(SMALL, (9, 8)) < 1e-6
    assert difference(SMALL, (9, 7)) > 1e-4


def test_the_reach_is_how_far_a_pixel_sees():
    """The gradient of a pixel of a row of latents; the largest reach is that of a border pixel of
    its latent."""
    wide = jnp.ones((1, 1, 21, 4))
    jacobian = jax.jit(jax.jacrev(lambda x: SMALL.decode(params(), x)[0, 0, 20:22].sum((1,))))(wide)
    seen = np.flatnonzero(np.abs(jacobian).max((0, 1, 2, 4)))
    assert (seen.min(), seen.max()) == (10 - SMALL.decoder_reach, 10 + SMALL.decoder_reach)


@pytest.mark.parametrize(("side", "tile", "overlap"), [
    (13, 6, 2), (13, 5, 4), (8, 4, 0), (7, 6, 3),
])
def test_weights_are_a_partition(side, tile, overlap):
    """Of all pixels; and images of blocks come out as they are, for any place of the last tile."""
    starts = tile_starts(side, tile, overlap)
    assert starts[0] == 0 and starts[-1] == side - tile
    assert max(np.diff(starts)) <= tile - overlap
    for margin in {0, overlap // 2}:
        total = np.zeros(2 * side)
        weights = tile_weights(side, tile, overlap, factor=2, margin=margin)
        for start, row in zip(starts, weights, strict=True):
            assert start == 0 or not row[: 2 * margin].any()
            total[2 * start : 2 * (start + tile)] += row
        np.testing.assert_allclose(total, 1, atol=1e-12)


def test_tiles_lie_where_they_belong():
    """Of images that are not square, one axis of which is shorter than a tile."""
    latents = jax.random.normal(jax.random.key(1), (2, 11, 4, 2))
    whole = Repeat().decode({}, latents)
    for tile, overlap in ((5, 2), (3, 1)):
        decode = functools.partial(Repeat().decode, {})
        tiles = decode_in_tiles(decode, latents, tile=tile, overlap=overlap, autoencoder=Repeat())
        np.testing.assert_allclose(tiles, whole, atol=1e-6)


def test_the_count_can_be_symbolic():
    (n,) = export.symbolic_shape("n")
    decode = gv.jit(lambda x: space(tiles=(9, 8)).decode(params(), x))
    exported = export.export(decode)(jax.ShapeDtypeStruct((n, *LATENTS.shape[1:]), jnp.float32))
    np.testing.assert_allclose(jax.jit(exported.call)(LATENTS), decoded(), atol=1e-6)


@pytest.mark.slow
def test_memory_is_that_of_a_tile():
    def needed(side: int, tiles: tuple[int, ...]) -> int:
        latents = jax.ShapeDtypeStruct((1, side, side, 4), jnp.float32)
        network = AutoencoderKL(widths=(16, 16), layers_per_block=1, groups=4)
        compiled = gv.jit(space(network, tiles).decode).lower(params(network), latents).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert needed(64, (16, 4)) < needed(64, ()) / 4


@pytest.mark.slow
@pytest.mark.parametrize("network", [
    AutoencoderKL(widths=(8, 8), layers_per_block=1, groups=4),
    AutoencoderDC(latent_channels=4, widths=(8, 8), encoder_layers=(1, 1), decoder_layers=(1, 1),
                  attention_from=1, head_dim=8),
], ids=lambda network: type(network).__name__)  # fmt: skip
def test_a_decoder_that_sees_the_whole_image_gives_others(network):
    assert 1e-3 < difference(network, (8, 4)) < 0.5 * np.abs(decoded(network)).max()


def build(network, tiles, **fields) -> LatentSpace:
    fields = {"model.channels": 4, "model.input_size": 16, "sampling.decode_tiles": tiles} | fields
    return load.build_latent_space(tiny.config(fields), network)


@pytest.mark.parametrize("tiles", [(4,), (4, 4), (4, -1), (2, 4), (0, 0), (8, 4, 2)])
def test_tiles_are_checked(tiles):
    with pytest.raises(InputError, match=r"^sampling\.decode_tiles=.*: give the side of a tile and "
                       r"a smaller overlap"):
        build(SMALL, tiles)


def test_tiles_without_effect_are_refused():
    with pytest.raises(InputError, match=r"decode_tiles=\(16, 8\): the latents of an image are "
                       "16 x 16, no larger than a tile; give a smaller side, or"):
        build(SMALL, (16, 8))
    with pytest.raises(InputError, match=r"tiles=\(8, 4\): without latents.autoencoder nothing"):
        load.load_latent_space(tiny.config({"sampling.decode_tiles": (8, 4)}))


def test_an_autoencoder_of_one_size_has_no_tiles():
    class OneSize(TAESD):
        side = 16

    with pytest.raises(InputError, match="OneSize takes latents of side 16 alone; give"):
        build(OneSize(**vars(SMALL)), (9, 8))


def test_a_line_says_where_images_differ(capsys):
    assert build(SMALL, (9, 8)).decode_tiles == (9, 8) and build(SMALL, ()).decode_tiles == ()
    assert capsys.readouterr().err == ""
    build(SMALL, (9, 7))
    assert "decoded whole, as the overlap is less than 8" in capsys.readouterr().err
    build(AutoencoderKL(widths=(8,), groups=4), (9, 8))
    line = "as the decoder of AutoencoderKL sees the whole image"
    assert line in capsys.readouterr().err
