"""Images from a flow map. Noise and label of image i depend on the seed and i alone."""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int, UInt8
from ml_collections import ConfigDict

from dmf import build, images, loading, samplers
from dmf.encoders.latents import LatentSpace
from dmf.intact import fingerprint
from dmf.protocols import labels_of
from dmf.sharding import by_device, on_this_host
from dmf.typing import InputError, Network, Params


class Generated(NamedTuple):
    """Images, and which of them came from samples without NaN or infinity."""

    images: UInt8[Array, "n h w c"]
    finite: Bool[Array, "n"]


ImageFunction = Callable[..., Generated]
Generate = Callable[[Int[np.ndarray, "n"], Int[np.ndarray, "n"]], Generated]


def sampling(network: Network, config: ConfigDict, *, steps: int) -> Callable[..., jax.Array]:
    """The function (params, indices, labels, seed) -> samples [n, h, w, c] in float32.

    Args:
      network: whose flow map is followed.
      config: its `sampling` chooses sampler, shift and guidance.
      steps: number of steps.

    Raises:
      InputError: a sampling field that cannot be.
    """
    sampler, shape = build.sampler(config), network.sample_shape
    sampler.schedule(steps, config.sampling.shift)

    def generate(
        params: Params, indices: Int[Array, "n"], labels: Int[Array, "n"], seed: int | jax.Array
    ) -> Float[Array, "n h w c"]:
        keys = jax.vmap(lambda i: jax.random.fold_in(jax.random.key(seed), i))(indices)

        def noise(count: jax.Array) -> Float[Array, "n h w c"]:
            step_keys = jax.vmap(lambda key: jax.random.fold_in(key, count))(keys)
            return samplers.noise_like(step_keys, shape)

        return samplers.sample(
            build.guided(
                config, lambda *inputs: network.apply(params, *inputs), network.num_classes
            ),
            noise(jnp.zeros((), jnp.int32)),
            labels,
            steps=steps,
            sampler=sampler,
            shift=config.sampling.shift,
            step_noise=lambda i: noise(i + 1),
        )

    return generate


def image_function(
    network: Network,
    config: ConfigDict,
    space: LatentSpace | None,
    *,
    steps: int,
    rounding: str = "nearest",
) -> ImageFunction:
    """The function (params, indices, labels, seed) -> `Generated`.

    Args:
      network, config, steps: as for `sampling`.
      space: how samples become images; None where they are images.
      rounding: to 8 bits, see `dmf.images.ROUNDINGS`.

    Returns:
      A function whose params hold "network" and, with a space, "autoencoder".
    """
    generate = sampling(network, config, steps=steps)

    def make(
        params: dict[str, Params],
        indices: Int[Array, "n"],
        labels: Int[Array, "n"],
        seed: int | jax.Array,
    ) -> Generated:
        samples = generate(params["network"], indices, labels, seed)
        if space is not None:
            samples = space.decode(params["autoencoder"], samples)
        finite = jnp.isfinite(samples).all(axis=(1, 2, 3))
        return Generated(images.to_uint8(samples, rounding), finite)

    return make


class Generator:
    """Makes images of a flow map on the devices of this process, each its share of a call."""

    def __init__(self, network: Network, config: ConfigDict, *, on: Mesh):
        """Reads the autoencoder that the config names.

        Args:
          network: whose flow map is followed.
          config: its `sampling` and `latents`.
          on: a mesh of devices of this process.

        Raises:
          InputError: the samples are latents, and `config.latents` names no autoencoder for them.
        """
        found = loading.latent_space(config)
        if found is None and network.sample_shape[-1] not in (1, 3):
            raise InputError(
                f"latents.autoencoder={config.latents.autoencoder}: the samples have "
                f"{network.sample_shape[-1]} channels, which are no image; give "
                "--config.latents.autoencoder=DIR (dmf convert makes one)"
            )
        self.num_classes = network.num_classes
        self.on = on
        self._network, self._config = network, config
        self._space, decoder = found or (None, None)
        self._frozen = {} if decoder is None else {"autoencoder": on_this_host(decoder, on)}

    @functools.cached_property
    def identity(self) -> dict[str, Any]:
        """What images depend on beside the parameters, the labels and the seed."""
        made_of = {
            "sampling": loading.plain(self._config.sampling),
            "model": loading.described("model", self._network),
        }
        if self._space is None:
            return made_of
        decoder = {"parameters": fingerprint(self._frozen)}
        return made_of | {"latents": dataclasses.asdict(self._space) | decoder}

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(h, w, c) of an image."""
        height, width, channels = self._network.sample_shape
        if self._space is None:
            return height, width, channels
        factor = self._space.autoencoder.factor
        return height * factor, width * factor, self._space.autoencoder.channels

    @functools.cache  # noqa: B019 - a run has one generator
    def _compiled(self, steps: int, rounding: str) -> Callable[..., Generated]:
        make = image_function(
            self._network, self._config, self._space, steps=steps, rounding=rounding
        )
        return by_device(
            lambda whole, *parts: make(whole["params"], *parts, whole["seed"]), self.on
        )

    def __call__(
        self, params: Params, *, steps: int, seed: int = 0, rounding: str = "nearest"
    ) -> Generate:
        """A function (indices, labels) -> `Generated`.

        Args:
          params: of the network, wherever they lie.
          steps: of the sampler.
          seed: with the index of an image, determines its noise.
          rounding: to 8 bits.

        Returns:
          A function of [n] int32 each; n is a multiple of the number of devices.

        Raises:
          InputError: a sampling field that cannot be.
        """
        compiled = self._compiled(steps, rounding)
        params = {"network": on_this_host(params, self.on), **self._frozen}
        whole = {"params": params, "seed": jnp.int32(seed)}
        return lambda indices, labels: compiled(whole, indices, labels)


def chunks(count: int, size: int, first: int = 0) -> Iterator[Int[np.ndarray, "size"]]:
    """Indices from `first` to count - 1, `size` at a time; the last ones may go beyond."""
    for start in range(first, count, size):
        yield np.arange(start, start + size, dtype=np.int32)


def class_grid(
    generates: Sequence[Generate], num_classes: int, *, rows: int = 2, fill: int = 1
) -> UInt8[np.ndarray, "H W c"]:
    """The same noise through several generators, `rows` rows each, a class a column.

    `fill` is what the number of images must be a multiple of.
    """
    columns = min(num_classes, 10) or 10
    count = rows * columns
    (indices,) = chunks(count, -(-count // fill) * fill)
    labels = labels_of(indices % columns, num_classes)
    sheets = [np.asarray(generate(indices, labels).images)[:count] for generate in generates]
    stacked = np.concatenate(sheets)
    return images.grid(stacked, columns, zoom=images.fitting_zoom(stacked.shape[1]))
