"""Images from a flow map, and how far they are from the data.

Noise and label of sample i depend on the seed and i alone, not on batches or devices.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, UInt8
from ml_collections import ConfigDict

from dmf import build, images, loading, logs, metrics, samplers
from dmf.checkpoint import FORMAT
from dmf.data.samples import pixels
from dmf.sharding import batch_divisor, batch_sharding, replicated
from dmf.typing import InputError, Network, Params

Generate = Callable[[Params, Int[Array, "n"], Int[Array, "n"]], Float[Array, "n h w c"]]
ToImages = Callable[[Any], Float[np.ndarray, "n h w c"]]


def labels_of(indices: np.ndarray, num_classes: int) -> Int[np.ndarray, "n"]:
    """Labels in turn, so that every class has its share; 0 where there are none."""
    return (indices % max(num_classes, 1)).astype(np.int32)


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
            build.guided(config, lambda *inputs: network.apply(params, *inputs)),
            noise(jnp.zeros((), jnp.int32)),
            labels,
            steps=steps,
            sampler=sampler,
            shift=config.sampling.shift,
            step_noise=lambda i: noise(i + 1),
        )

    return generate


def generator(
    network: Network, config: ConfigDict, *, steps: int, seed: int = 0, on: Mesh | None = None
) -> Generate:
    """A compiled function (params, indices, labels) -> samples [n, h, w, c] in float32.

    Args:
      network, config, steps: as for `sampling`.
      seed: with the index of a sample, determines its noise.
      on: mesh over whose data and fsdp axes the samples are split; n must be a multiple.

    Raises:
      InputError: a sampling field that cannot be.
    """
    generate = functools.partial(sampling(network, config, steps=steps), seed=seed)
    if on is None:
        return jax.jit(generate)
    split = batch_sharding(on)
    return jax.jit(generate, in_shardings=(None, split, split), out_shardings=replicated(on))


def generate_all(
    generate: Generate,
    params: Params,
    labels: Int[np.ndarray, "n"],
    batch_size: int,
) -> Iterator[Float[np.ndarray, "b h w c"]]:
    """Samples 0 to n - 1 in batches; the last one is filled up and cut."""
    for start in range(0, len(labels), batch_size):
        indices = np.arange(start, start + batch_size, dtype=np.int32)
        chosen = labels[np.minimum(indices, len(labels) - 1)]
        yield np.asarray(generate(params, indices, chosen))[: len(labels) - start]


def image_decoder(config: ConfigDict) -> ToImages:
    """Samples of the network to images in about [-1, 1].

    Raises:
      InputError: the samples are latents, and `config.latents` names no autoencoder for them.
    """
    found = loading.latent_space(config)
    if found is not None:
        space, params = found
        decode = jax.jit(space.decode)
        return lambda samples: np.asarray(decode(params, samples))
    if config.model.channels not in (1, 3):
        raise InputError(f"latents.autoencoder={config.latents.autoencoder}: the samples have "
                         f"{config.model.channels} channels, which are no image; give "
                         "--config.latents.autoencoder=DIR (dmf convert makes one)")
    return np.asarray


def class_grid(
    generates: Sequence[Generate],
    params: Params,
    num_classes: int,
    *,
    to_images: ToImages = np.asarray,
    rows: int = 2,
    fill: int = 1,
) -> UInt8[np.ndarray, "H W c"]:
    """The same noise through several generators, `rows` rows each, a class a column.

    `fill` is what the number of samples must be a multiple of.
    """
    columns = min(num_classes, 10) or 10
    count = rows * columns
    indices = np.arange(-(-count // fill) * fill, dtype=np.int32)
    labels = labels_of(indices % columns, num_classes)
    sheets = [np.asarray(generate(params, indices, labels))[:count] for generate in generates]
    stacked = images.to_uint8(to_images(np.concatenate(sheets)))
    return images.grid(stacked, columns, zoom=images.fitting_zoom(stacked.shape[1]))


def evaluate(
    network: Network,
    params: Params,
    config: ConfigDict,
    *,
    steps: Sequence[int],
    on: Mesh,
) -> dict[str, Any]:
    """Frechet distance in pixel space, and label agreement, for each number of steps.

    Samples are rounded to 8 bits first, as a picture on disk would be. The reference is the
    dataset of `config.data`.

    Args:
      network, params: the flow map.
      config: `evaluation` gives count, batch size and seed; `sampling` sampler and guidance.
      steps: numbers of steps.
      on: the mesh.

    Returns:
      Settings, the distance between two halves of the reference, and one row per number of steps.

    Raises:
      InputError: the batch size does not divide over the mesh, or fewer samples than values.
    """
    settings = config.evaluation
    if settings.batch_size % batch_divisor(on):
        raise InputError(f"evaluation.batch_size={settings.batch_size}: it must be a multiple of "
                         f"{batch_divisor(on)} (mesh axes data x fsdp)")
    values = int(np.prod(network.sample_shape))
    if settings.count <= values:
        raise InputError(f"evaluation.count={settings.count}: the covariance of {values} values "
                         "needs more samples than that")
    source = build.source(config)
    if len(source.shape) != 3:
        raise InputError(f"data.name={config.data.name}: its rows are latents; distances are "
                         "measured between images")
    rows, reference_labels = source.read(range(len(source)))
    reference = pixels(rows).reshape(len(rows), -1)
    moments = metrics.moments(reference)
    labels = labels_of(np.arange(settings.count), network.num_classes)
    rows = []
    for count in steps:
        clock, samples = logs.Clock(0, settings.count), []
        generate = generator(network, config, steps=count, seed=settings.seed, on=on)
        for part in generate_all(generate, params, labels, settings.batch_size):
            samples.extend(part)
            done = len(samples)
            logs.say(f"{count} steps: {done}/{settings.count} samples, left {clock.left(done)}")
        rounded = images.to_uint8(np.stack(samples)).astype(np.float32) / 127.5 - 1
        flat = rounded.reshape(len(rounded), -1)
        row = {
            "steps": count,
            "frechet_distance": metrics.frechet_distance(moments, metrics.moments(flat)),
        }
        if network.num_classes:
            row["label_agreement"] = metrics.label_agreement(
                reference, reference_labels, flat, labels
            )
        rows.append(row)
        logs.say("  ".join(f"{name} {value:.4g}" for name, value in row.items()))
    return {
        "format": FORMAT,
        "protocol": "pixels",
        "reference": {"name": source.name, "split": config.data.split, "count": len(reference)},
        "reference_halves_distance": metrics.halves_distance(reference),
        "settings": settings.to_dict() | {"sampling": config.sampling.to_dict()},
        "results": rows,
    }
