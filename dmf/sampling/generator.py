"""Images from a flow map. The noise and the label of image i depend on the seed and i alone.

    keys of the seed and the indices -> noise -> sample -> samples -> decode -> uint8 images
"""

import copy
import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int, UInt8

from dmf import registry
from dmf.data import pixels
from dmf.errors import InputError, NotFinite
from dmf.models.abstract_params import abstract_params
from dmf.models.encoders.latent_space import LatentSpace
from dmf.objectives.interpolants import in_interval
from dmf.runtime.checksums import fingerprint
from dmf.runtime.memoize import memoized
from dmf.runtime.sharding import map_over_devices, replicate_on_host
from dmf.sampling import samplers
from dmf.sampling.build import Sampling, guided_flow_map
from dmf.sampling.class_labels import class_labels, label_captions
from dmf.sampling.guidance import SamplingGuidance
from dmf.sampling.sampler_checks import check_schedule
from dmf.types import GuidanceInput, Network, Params


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
    network: Network, settings: Sampling, *, steps: int, guide: Network | None = None
) -> Callable[..., jax.Array]:
    """The function (params, indices, labels, seed, guide_params=None, guidance=None) -> samples
    [n, h, w, c] in float32.

    Sample i depends on the parameters, indices[i], labels[i] and the seed alone. `guidance` has
    scalars in place of the scale and the interval of the settings, see `classifier_free`.

    Args:
      network: network whose flow map is sampled.
      settings: settings of `config.sampling`.
      steps: number of sampling steps.
      guide: the network that guides it by autoguidance; None for none.

    Raises:
      InputError: a sampling field that cannot be used.
    """
    schedule = settings.sampler.schedule(steps, settings.shift)
    check_schedule(settings.sampler, steps, schedule)

    def generate(
        params: Params, indices: Int[Array, "n"], labels: Int[Array, "n"], seed: int | jax.Array,
        guide_params: Params | None = None, guidance: GuidanceInput | None = None,
    ) -> Float[Array, "n h w c"]:  # fmt: skip
        keys = jax.vmap(lambda i: jax.random.fold_in(jax.random.key(seed), i))(indices)

        def noise(count: jax.Array) -> Float[Array, "n h w c"]:
            step_keys = jax.vmap(lambda key: jax.random.fold_in(key, count))(keys)
            return samplers.noise_like(step_keys, network.sample_shape)

        flow_map = functools.partial(network.apply, params)
        guide_map = None if guide is None else functools.partial(guide.apply, guide_params)
        return samplers.sample(
            guided_flow_map(flow_map, settings, network, guide=guide_map, values=guidance),
            noise(jnp.zeros((), jnp.int32)), network.condition(labels), steps=steps,
            sampler=settings.sampler, shift=settings.shift, step_noise=lambda i: noise(i + 1),
        )  # fmt: skip

    return generate


def image_function(
    network: Network,
    settings: Sampling,
    latent_space: LatentSpace | None,
    *,
    steps: int,
    rounding: str = "nearest",
    guide: Network | None = None,
) -> ImageFunction:
    """The function (params, indices, labels, seed, guidance=None) -> `GeneratedImages`.

    Args:
      network, settings, steps, guide: as for `sample_function`.
      latent_space: decodes samples to images; None where samples are images.
      rounding: to 8 bits, one of `dmf.data.pixels.ROUNDINGS`.

    Returns:
      A function whose params hold "network", with a latent space "autoencoder", and with a guide
      "guide".
    """
    generate = sample_function(network, settings, steps=steps, guide=guide)

    def generate_images(
        params: dict[str, Params],
        indices: Int[Array, "n"],
        labels: Int[Array, "n"],
        seed: int | jax.Array,
        guidance: GuidanceInput | None = None,
    ) -> GeneratedImages:
        samples = generate(
            params["network"], indices, labels, seed, params.get("guide"), guidance
        )
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
        guide: tuple[Network, Params] | None = None,
    ):
        """Checks that the flow map can be sampled with these settings, without computing anything.

        Args:
          network: network whose flow map is sampled.
          settings: settings of `config.sampling`.
          latents: the latent space of the samples and the parameters of its autoencoder; None where
            samples are images.
          mesh: devices of this process.
          guide: the network that guides this one by autoguidance, and its parameters; None for
            none.

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
        self._guide, guide_params = guide or (None, None)
        frozen = {"autoencoder": decoder, "guide": guide_params}
        self._frozen_params = {name: replicate_on_host(params, mesh)
                               for name, params in frozen.items() if params is not None}
        self._check()

    def _check(self) -> None:
        """Traces one sample, so that guidance that the network cannot take is refused early."""
        _trace(self._network, self._settings, self._guide)

    def with_guidance(self, guidance: SamplingGuidance) -> "Generator":
        """The generator of the same flow map under another guidance at sampling. Both share their
        compiled programs, see `SamplingGuidance.shared`.

        Raises:
          InputError: guidance that the network cannot take.
        """
        other = copy.copy(self)
        vars(other).pop("identity", None)
        other._settings = dataclasses.replace(self._settings, guidance=guidance)
        other._check()
        return other

    @property
    def guidance(self) -> SamplingGuidance:
        """The guidance at sampling."""
        return self._settings.guidance

    def guidance_effect(self, steps: int) -> Any:
        """What the images depend on of the guidance, as a value that is hashed: two guidances with
        equal values give the same images.

        A network that takes its guidance as an input sees the scale and the interval. Otherwise
        they act where the sampler calls the flow map: an interval in which it does not has no
        effect, and neither has one with scale 1.

        Args:
          steps: number of sampling steps.
        """
        guidance = self.guidance
        if self._network.guidance_input:
            return guidance
        called = samplers.call_times(self._settings.sampler, steps, self._settings.shift)
        within = in_interval(jnp.asarray(called), guidance.interval).tolist()
        return (guidance.scale, *within) if any(within) and not guidance.is_none else None

    @functools.cached_property
    def identity(self) -> dict[str, Any]:
        """All that images depend on besides the parameters, the labels and the seed, as JSON."""
        latents = self._latent_space and (self._latent_space, self._frozen_params["autoencoder"])
        described = unguided_identity(self._network, self._settings, latents)
        if self._guide is not None:
            described["guide"] = {"model": registry.to_config(self._guide, "model"),
                                  "parameters": fingerprint(self._frozen_params["guide"])}
        return described

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
        # A network that takes its guidance as an input has one program for every guidance.
        shared = SamplingGuidance() if self._network.guidance_input else self.guidance.shared
        compiled = _compiled(
            self._network, dataclasses.replace(self._settings, guidance=shared),
            self._latent_space, steps, rounding, self.mesh, self._guide,
        )  # fmt: skip
        params = {"network": replicate_on_host(params, self.mesh), **self._frozen_params}
        values = jax.tree.map(jnp.float32, self.guidance.values)
        whole = {"params": params, "seed": jnp.int32(seed), "guidance": values}
        return lambda indices, labels: compiled(whole, indices, labels)


def unguided_identity(
    network: Network, settings: Sampling, latents: tuple[LatentSpace, Params] | None
) -> dict[str, Any]:
    """`Generator.identity` of a flow map without a guide; the arguments are as for `Generator`."""
    described = {
        "sampling": registry.to_config(settings), "model": registry.to_config(network, "model"),
    }  # fmt: skip
    if latents is not None:
        space, decoder = latents
        described["latents"] = dataclasses.asdict(space) | {"parameters": fingerprint(decoder)}
    return described


@memoized
def _trace(network: Network, settings: Sampling, guide: Network | None) -> None:
    """Traces the generation of one sample; an error is not remembered."""
    generate = sample_function(network, settings, steps=2, guide=guide)
    index = jax.ShapeDtypeStruct((1,), jnp.int32)
    guide_params = None if guide is None else abstract_params(guide)
    jax.eval_shape(
        lambda params, guide_params, *inputs: generate(params, *inputs, 0, guide_params),
        abstract_params(network), guide_params, index, index,
    )  # fmt: skip


@memoized
def _compiled(
    network: Network, settings: Sampling, latent_space: LatentSpace | None, steps: int,
    rounding: str, mesh: Mesh, guide: Network | None,
) -> Callable[..., GeneratedImages]:  # fmt: skip
    """The program of `Generator`, to be compiled on its first call; its scale and interval are
    inputs."""
    generate = image_function(
        network, settings, latent_space, steps=steps, rounding=rounding, guide=guide
    )

    def on_device(whole: dict[str, Any], *parts: jax.Array) -> GeneratedImages:
        return generate(whole["params"], *parts, whole["seed"], whole["guidance"])

    return map_over_devices(on_device, mesh)


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
      NotFinite: one of them comes from a sample that holds NaN or infinity.
    """
    images, finite = jax.device_get(generate(indices, labels))
    inside = indices < stop
    bad = indices[inside & ~finite]
    if len(bad):
        raise NotFinite(f"{len(bad)} of images {indices[0]} to {indices[inside][-1]} hold NaN or "
                        f"infinity, the first of them {bad[0]}")
    return images[inside]


def class_grid(
    generates: Mapping[str, Generate], num_classes: int, *, names: Sequence[str] = (),
    rows: int = 2, multiple_of: int = 1,
) -> UInt8[np.ndarray, "H W c"]:
    """A grid of images with one class in each column, the same noise for every function.

    Args:
      generates: functions (indices, labels) -> `GeneratedImages` by their caption, see
        `steps_caption`, whose images stand below each other.
      num_classes: number of classes of the network; the grid shows 10 at most.
      names: name of each class; empty to call them by their numbers.
      rows: number of rows for each function.
      multiple_of: the number of images in a call is a multiple of it, for example the number of
        devices.

    Raises:
      NotFinite: a sample holds NaN or infinity.
    """
    columns = min(num_classes, 10) or 10
    count = rows * columns
    (indices,) = chunks(count, -(-count // multiple_of) * multiple_of)
    labels = class_labels(indices % columns, num_classes)
    groups = {
        caption: finite_images(generate, indices, labels, stop=count)
        for caption, generate in generates.items()
    }
    side = next(iter(groups.values())).shape[1]
    captions = label_captions(labels[:count], num_classes, names)
    return pixels.captioned_grid(groups, captions, columns, zoom=pixels.zoom_factor(side))


def steps_caption(steps: int) -> str:
    """The caption of images by their number of sampling steps.

    >>> steps_caption(1), steps_caption(4)
    ('1 step', '4 steps')
    """
    return f"{steps} step{'s' * (steps > 1)}"
