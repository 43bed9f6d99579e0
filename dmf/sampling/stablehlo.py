"""Exports sampling as one function (weights, labels, seed) -> images that runs without `dmf`."""

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax import export
from jaxtyping import Array, Int, UInt8

from dmf.models.dit import DiT
from dmf.models.encoders.latent_space import LatentSpace
from dmf.models.in_context_dit import InContextDiT
from dmf.sampling import generator
from dmf.sampling.build import Sampling
from dmf.types import Network, Params

FUNCTION_FILE, WEIGHTS_FILE = "sample.stablehlo", "weights.safetensors"
PLATFORMS = ("cpu", "cuda", "tpu")
Weights = dict[str, Array]

_CARD = """## Use

`{function}` is a function (weights, labels, seed) -> uint8 images
[n, {height}, {width}, {channels}] in {steps} step{plural}, serialized by `jax.export` for
{platforms}. It needs JAX alone: `flatbuffers/` (by Google, Apache-2.0), with which `jax.export`
reads it, is in this folder. The number of labels n is free; labels are {classes}.

```python
import json, sys
import jax, numpy as np

folder = sys.argv[1] if len(sys.argv) > 1 else "."
size = int.from_bytes(open(f"{{folder}}/{weights}", "rb").read(8), "little")
data = np.memmap(f"{{folder}}/{weights}", mode="r")
header = json.loads(bytes(data[8 : 8 + size]))
weights = {{
    name: data[8 + size :][slice(*entry["data_offsets"])].view(np.float32).reshape(entry["shape"])
    for name, entry in header.items() if name != "__metadata__"
}}
sys.path.append(folder)  # for flatbuffers, where it is not installed
function = jax.export.deserialize(bytearray(open(f"{{folder}}/{function}", "rb").read()))
labels = np.arange(8, dtype=np.int32) % {modulus}
images = jax.jit(function.call)(weights, labels, np.int32(0))
np.save("images.npy", images)
```
"""


def flat_weights(params: Params, autoencoder: Params | None) -> dict[str, np.ndarray]:
    """The weights of the function, by path: `network/...` and `autoencoder/...`.

    Args:
      params: parameters of the network.
      autoencoder: parameters of the autoencoder; None where samples are images.
    """
    parts = {"network": params} | ({"autoencoder": autoencoder} if autoencoder else {})
    return flatten_dict(jax.tree.map(np.asarray, parts), sep="/")


def image_function(
    network: Network, settings: Sampling, latent_space: LatentSpace | None, *, steps: int
) -> Callable[[Weights, Int[Array, "n"], Int[Array, ""]], UInt8[Array, "n h w c"]]:
    """The function (weights, labels, seed) -> images.

    Image i is the i-th image of `dmf sample` with the same labels and seed.

    Args:
      network: network whose flow map is sampled.
      settings: settings of `config.sampling`.
      latent_space: decodes samples to images; None where samples are images.
      steps: number of sampling steps.

    Raises:
      InputError: a sampling field that cannot be used.
    """
    if isinstance(network, DiT | InContextDiT):
        # Attention kernels run on one platform; this function must run on all of them.
        network = dataclasses.replace(network, attention="xla")
    generate = generator.image_function(network, settings, latent_space, steps=steps)

    def images(
        weights: Weights, labels: Int[Array, "n"], seed: Int[Array, ""]
    ) -> UInt8[Array, "n h w c"]:
        indices = jnp.arange(labels.shape[0], dtype=jnp.int32)
        return generate(unflatten_dict(weights, sep="/"), indices, labels, seed).images

    return images


def serialize(function: Callable[..., Array], weights: dict[str, np.ndarray]) -> bytes:
    """Serializes a function by `jax.export`, for `PLATFORMS` and any number of labels.

    Args:
      function: the function of `image_function`.
      weights: its weights, of which the shapes and dtypes count.
    """
    shapes = {name: jax.ShapeDtypeStruct(w.shape, w.dtype) for name, w in weights.items()}
    (count,) = export.symbolic_shape("n")
    labels = jax.ShapeDtypeStruct((count,), jnp.int32)
    seed = jax.ShapeDtypeStruct((), jnp.int32)
    with _without_source_folders():
        exported = export.export(jax.jit(function), platforms=PLATFORMS)(shapes, labels, seed)
        return bytes(exported.serialize())


@contextmanager
def _without_source_folders() -> Iterator[None]:
    """Leaves the folders of source files out of the locations in the functions of JAX."""
    name = "jax_hlo_source_file_canonicalization_regex"
    before = getattr(jax.config, name)
    jax.config.update(name, ".*/")
    try:
        yield
    finally:
        jax.config.update(name, before)


def usage(network: Network, latent_space: LatentSpace | None, *, steps: int) -> str:
    """The section of the model card that says how to run the function without `dmf`.

    Args:
      network: network whose flow map is sampled.
      latent_space: decodes samples to images; None where samples are images.
      steps: number of sampling steps of the function.
    """
    height, width, channels = network.sample_shape
    if latent_space is not None:
        height, width, channels = latent_space.image_shape(network.sample_shape)
    classes = network.num_classes
    return _CARD.format(
        function=FUNCTION_FILE,
        weights=WEIGHTS_FILE,
        platforms=", ".join(PLATFORMS),
        height=height,
        width=width,
        channels=channels,
        steps=steps,
        plural="s" * (steps > 1),
        classes=f"0 to {classes - 1}, and {classes} for the null label" if classes else "0",
        modulus=max(classes, 1),
    )
