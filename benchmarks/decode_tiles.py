"""Decoding an image whole and in tiles: memory, as the compiler reports it, and the difference.

    python -m benchmarks.decode_tiles --nodifferences [--pixels=1024 --tiles=512,128 --names=kl]

For the memory, programs are compiled for this machine, in float32, for one image and autoencoders
of the published sizes; nothing is decoded. For the difference, small autoencoders with random
parameters decode one random latent of 32 x 32, whose mean varies over the image. The tables are
printed, and written with --output=FILE.md.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from absl import flags

from benchmarks.machine import machine, start
from dmf.models import TAESD, AutoencoderDC, AutoencoderKL
from dmf.models.abstract_params import abstract_params
from dmf.models.encoders.latent_scaling import LatentScaling
from dmf.models.encoders.latent_space import LatentSpace

_PIXELS = flags.DEFINE_integer("pixels", 1024, "side of the image")
_TILES = flags.DEFINE_list("tiles", ["512", "128"], "side and overlap of the tiles, in pixels")
_NAMES = flags.DEFINE_list("names", ["kl", "taesd"], "autoencoders: kl, taesd, dc")
_DIFFERENCES = flags.DEFINE_boolean("differences", True, "also compare images of small networks")
_OUTPUT = flags.DEFINE_string("output", "", "a .md file for the table")

NETWORKS = {"kl": AutoencoderKL(), "taesd": TAESD(), "dc": AutoencoderDC()}

SMALL = {
    "kl": AutoencoderKL(widths=(32, 32, 64), layers_per_block=1, groups=8),
    "taesd": TAESD(width=16, encoder_blocks=(0, 0, 0), decoder_blocks=(1, 1, 1)),
    "dc": AutoencoderDC(widths=(16, 32, 32), encoder_layers=(1, 1, 1), decoder_layers=(1, 1, 1),
                        attention_from=2),
}  # fmt: skip
OVERLAPS = (0, 4, 8, 12)
# Programs for CPUs are not optimised, which takes minutes and changes no buffer.
_FAST = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


def needed(network: Any, tiles: tuple[int, ...]) -> int:
    """The bytes of temporary buffers of decoding one image."""
    side = _PIXELS.value // network.factor
    space = LatentSpace(autoencoder=network, scaling=LatentScaling(), decode_batch=1,
                        decode_tiles=tiles)  # fmt: skip
    latents = jax.ShapeDtypeStruct((1, side, side, network.latent_channels), jnp.float32)
    lowered = jax.jit(space.decode).lower(abstract_params(network), latents)
    compiled = lowered.compile(_FAST if jax.default_backend() == "cpu" else None)
    return compiled.memory_analysis().temp_size_in_bytes


def row(name: str) -> str:
    """The row of an autoencoder."""
    network = NETWORKS[name]
    tiles = tuple(int(pixels) // network.factor for pixels in _TILES.value)
    whole, parts = (needed(network, chosen) / 2**20 for chosen in ((), tiles))
    return (f"| {type(network).__name__}, factor {network.factor} | {tiles} | {whole:,.0f} | "
            f"{parts:,.0f} | {whole / parts:.1f} |")


def difference_row(name: str) -> str:
    """The row of the differences of a small autoencoder, in levels, where images have a standard
    deviation of 64."""
    network, keys = SMALL[name], jax.random.split(jax.random.key(0), 3)
    shape = (1, 32, 32, network.latent_channels)
    means = jax.random.normal(keys[0], (1, 4, 4, network.latent_channels))
    latents = jax.image.resize(means, shape, "cubic") + jax.random.normal(keys[1], shape) / 2
    params, images = network.init(keys[2]), []
    for tiles in ((), *((16, overlap) for overlap in OVERLAPS)):
        space = LatentSpace(autoencoder=network, scaling=LatentScaling(), decode_tiles=tiles)
        images.append(jax.jit(space.decode)(params, latents))
    levels = 64 / images[0].std()
    gaps = [jnp.abs(image - images[0]) * levels for image in images[1:]]
    cells = " | ".join(f"{gap.mean():.2f} ({gap.max():.1f})" for gap in gaps)
    return f"| {type(network).__name__} | {cells} |"


def main(arguments: Sequence[str]) -> None:
    """Prints and writes the tables."""
    lines = ["| autoencoder | `decode_tiles` | whole, MiB | in tiles, MiB | ratio |",
             "|---|---|---|---|---|", *map(row, _NAMES.value), "",
             f"Temporary memory of decoding one image of {_PIXELS.value} x {_PIXELS.value} in "
             f"float32, compiled on {machine()}."]  # fmt: skip
    if _DIFFERENCES.value:
        lines += [
             "", f"| small autoencoder | {' | '.join(f'(16, {o})' for o in OVERLAPS)} |",
             "|---|---|---|---|---|", *map(difference_row, _NAMES.value), "",
             "Difference from whole decoding by `decode_tiles`, in levels of 255 of images with a "
             "standard deviation of 64: mean (maximum)."]  # fmt: skip
    print("\n".join(lines))
    if _OUTPUT.value:
        Path(_OUTPUT.value).write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    start(main)
