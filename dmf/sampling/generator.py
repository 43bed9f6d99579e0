"""Images from a flow map. The noise and the label of image i depend on the seed and i alone.

    keys of the seed and the indices -> noise -> sample -> samples -> decode -> uint8 images
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int, UInt8

from dmf import registry
from dmf.data import pixels
from dmf.errors import InputError, RunError
from dmf.models.abstract_params import abstract_params
from dmf.models.encoders.latent_space import LatentSpace
from dmf.runtime.checksums import fingerprint
from dmf.runtime.memoize import memoized
from dmf.runtime.sharding import map_over_devices, replicate_on_host
from dmf.sampling import samplers
from dmf.sampling.build import Sampling, guided_flow_map
from dmf.sampling.class_labels import class_labels
from dmf.types import Network, Params


class GeneratedImages(NamedTuple):
    """Generated images.

    Attributes:
      images: [n, h, w, c] uint8.
      finite: [n] bool, whether the sample of an image is free of NaN and infinity.
    """

    images: UInt8[Array, "n h w c"]
    finite: Bool[Array, "n"]


ImageFunction = Callable[..., GeneratedImages]
Generate = Callable[[Int[np.ndarray, "n"], Int[np.ndarray, "n"]], GeneratedImages]


def sample_function(
    network: Network, settings: Sampling, *, steps: int
) -> Callable[..., jax.Array]:
    """The function (params, indices, labels, seed) -> samples [n, h, w, c] in float32.

    Sample i depends on the parameters, indices[i], labels[i] and the seed alone.

    Args:
      network: network whose flow map is sampled.
      settings: settings of `config.sampling`.
      steps: number of sampling steps.

    Raises:
      InputError: a sampling field that cannot be used.
    """
    settings.sampler.schedule(steps, settings.shift)

    def generate(
        params: Params, indices: Int[Array, "n"], labels: Int[Array, "n"], seed: int | jax.Array
    ) -> Float[Array, "n h w c"]:
        keys = jax.vmap(lambda i: jax.random.fold_in(jax.random.key(seed), i))(indices)

        def noise(count: jax.Array) -> Float[Array, "n h w c"]:
            step_keys = jax.vmap(lambda key: jax.random.fold_in(key, count))(keys)
            return samplers.noise_like(step_keys, network.sample_shape)

        def flow_map(*inputs: Any) -> jax.Array:
            return network.apply(params, *inputs)

        return samplers.sample(
            guided_flow_map(flow_map, settings, network),
            noise(jnp.zeros((), jnp.int32)),
            network.condition(labels),
            steps=steps,
            sampler=settings.sampler,
            shift=settings.shift,
            step_noise=lambda i: noise(i + 1),
        )

    return generate


def image_function(
    network: Network,
    settings: Sampling,
    latent_space: LatentSpace | None,
    *,
    steps: int,
    rounding: str = "nearest",
) -> ImageFunction:
    """The function (params, indices, labels, seed) -> `GeneratedImages`.

    Args:
      network, settings, steps: as for `sample_function`.
      latent_space: decodes samples to images; None where samples are images.
      rounding: to 8 bits, one of `dmf.data.pixels.ROUNDINGS`.

    Returns:
      A function whose params hold "network" and, with a latent space, "autoencoder".
    """
    generate = sample_function(network, settings, steps=steps)

    def generate_images(
        params: dict[str, Params],
        indices: Int[Array, "n"],
        labels: Int[Array, "n"],
        seed: int | jax.Array,
    ) -> GeneratedImages:
        samples = generate(params["network"], indices, labels, seed)
        if latent_space is not None:
            samples = latent_space.decode(params["autoencoder"], samples)
        finite = jnp.isfinite(samples).all(axis=(1, 2, 3))
        return GeneratedImages(pixels.to_uint8(samples, rounding), finite)

    return generate_images


class Generator:
    """Generates images of a flow map, distributed over the devices of this process."""

    def __init__(
        self,
        network: Network,
        settings: Sampling,
        latents: tuple[LatentSpace, Params] | None,
        *,
        mesh: Mesh,
    ):
        """Checks that the flow map can be sampled with these settings, without computing anything.

        Args:
          network: network whose flow map is sampled.
          settings: settings of `config.sampling`.
          latents: the latent space of the samples and the parameters of its autoencoder; None where
            samples are images.
          mesh: devices of this process.

        Raises:
          InputError: the samples are latents and there is no autoencoder; or a sampling field that
            cannot be used with this network.
        """
        channels = network.sample_shape[-1]
        if latents is None and channels not in pixels.IMAGE_CHANNELS:
            raise InputError(
                "latents.autoencoder", "",
                f"the samples have {channels} channels, which are no image; give "
                "--config.latents.autoencoder=DIR (dmf convert makes one)",
            )
        self.num_classes = network.num_classes
        self.mesh = mesh
        self._network, self._settings = network, settings
        self._latent_space, decoder = latents or (None, None)
        self._frozen_params = {}
        if decoder is not None:
            self._frozen_params = {"autoencoder": replicate_on_host(decoder, mesh)}
        self._check()

    def _check(self) -> None:
        """Traces one sample, so that guidance that the network cannot take is refused early."""
        _trace(self._network, self._settings)

    @functools.cached_property
    def identity(self) -> dict[str, Any]:
        """All that images depend on besides the parameters, the labels and the seed, as JSON."""
        described = {
            "sampling": registry.to_config(self._settings),
            "model": registry.to_config(self._network, "model"),
        }
        if self._latent_space is None:
            return described
        decoder = {"parameters": fingerprint(self._frozen_params)}
        return described | {"latents": dataclasses.asdict(self._latent_space) | decoder}

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(h, w, c) of an image."""
        if self._latent_space is None:
            return self._network.sample_shape
        return self._latent_space.image_shape(self._network.sample_shape)

    def __call__(
        self, params: Params, *, steps: int, seed: int = 0, rounding: str = "nearest"
    ) -> Generate:
        """A function (indices, labels) -> `GeneratedImages`.

        Args:
          params: parameters of the network, on any devices.
          steps: number of sampling steps.
          seed: random seed; the noise of an image depends on it and the index of the image.
          rounding: rounding to 8 bits, one of `dmf.data.pixels.ROUNDINGS`.

        Returns:
          A function of indices and labels, [n] int32 each; n is a multiple of the number of
          devices.

        Raises:
          InputError: a sampling field that cannot be used.
        """
        compiled = _compiled(
            self._network, self._settings, self._latent_space, steps, rounding, self.mesh
        )
        params = {"network": replicate_on_host(params, self.mesh), **self._frozen_params}
        whole = {"params": params, "seed": jnp.int32(seed)}
        return lambda indices, labels: compiled(whole, indices, labels)


@memoized
def _trace(network: Network, settings: Sampling) -> None:
    """Traces the generation of one sample; an error is not remembered."""
    generate = sample_function(network, settings, steps=2)
    index = jax.ShapeDtypeStruct((1,), jnp.int32)
    params = abstract_params(network)
    jax.eval_shape(lambda *inputs: generate(*inputs, 0), params, index, index)


@memoized
def _compiled(
    network: Network, settings: Sampling, latent_space: LatentSpace | None, steps: int,
    rounding: str, mesh: Mesh,
) -> Callable[..., GeneratedImages]:  # fmt: skip
    """The program of `Generator`, to be compiled on its first call."""
    generate = image_function(network, settings, latent_space, steps=steps, rounding=rounding)
    return map_over_devices(
        lambda whole, *parts: generate(whole["params"], *parts, whole["seed"]), mesh
    )


def chunks(count: int, size: int, first: int = 0) -> Iterator[Int[np.ndarray, "size"]]:
    """Indices from `first` to count - 1, `size` at a time; the last chunk may go beyond.

    >>> [chunk.tolist() for chunk in chunks(5, size=3)]
    [[0, 1, 2], [3, 4, 5]]

    Args:
      count: number of indices, if `first` is 0.
      size: number of indices in a chunk.
      first: the first index.
    """
    for start in range(first, count, size):
        yield np.arange(start, start + size, dtype=np.int32)


def finite_images(
    generate: Generate, indices: Int[np.ndarray, "n"], labels: Int[np.ndarray, "n"], *, stop: int
) -> UInt8[np.ndarray, "m h w c"]:
    """The images of those indices that are below `stop`, on the host.

    Raises:
      RunError: one of them comes from a sample that holds NaN or infinity.
    """
    images, finite = jax.device_get(generate(indices, labels))
    inside = indices < stop
    bad = indices[inside & ~finite]
    if len(bad):
        raise RunError(f"{len(bad)} of images {indices[0]} to {indices[inside][-1]} hold NaN or "
                       f"infinity, the first of them {bad[0]}")
    return images[inside]


def class_grid(
    generates: Sequence[Generate], num_classes: int, *, rows: int = 2, multiple_of: int = 1
) -> UInt8[np.ndarray, "H W c"]:
    """A grid of images with one class in each column, the same noise for every function.

    Args:
      generates: functions (indices, labels) -> `GeneratedImages`, whose images stand below each
        other.
      num_classes: number of classes of the network; the grid shows 10 at most.
      rows: number of rows for each function.
      multiple_of: the number of images in a call is a multiple of it, for example the number of
        devices.

    Raises:
      RunError: a sample holds NaN or infinity.
    """
    columns = min(num_classes, 10) or 10
    count = rows * columns
    (indices,) = chunks(count, -(-count // multiple_of) * multiple_of)
    labels = class_labels(indices % columns, num_classes)
    images = np.concatenate(
        [finite_images(generate, indices, labels, stop=count) for generate in generates]
    )
    return pixels.grid(images, columns, zoom=pixels.zoom_factor(images.shape[1]))
