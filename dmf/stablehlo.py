"""A sampler as one function that runs without `dmf`: weights, labels and a seed to images."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax import export
from jaxtyping import Array, Int, UInt8
from ml_collections import ConfigDict

from dmf import generation
from dmf.encoders.latents import LatentSpace
from dmf.models.dit import DiT
from dmf.typing import Network, Params

FUNCTION_FILE, WEIGHTS_FILE = "sample.stablehlo", "weights.safetensors"
PLATFORMS = ("cpu", "cuda", "tpu")
Weights = dict[str, Array]

_CARD = """## Use

`{function}` is a function of (weights, labels, seed) that makes uint8 images
[n, {height}, {width}, {channels}] in {steps} step{plural}, serialized by `jax.export` for
{platforms}. It needs JAX and nothing else: `flatbuffers/`, which `jax.export` reads it with, lies
beside it (by Google, Apache-2.0). Any number of labels will do, {classes}.

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
    """The parameters of the function, by path: `network/...` and `autoencoder/...`."""
    parts = {"network": params} | ({"autoencoder": autoencoder} if autoencoder else {})
    return flatten_dict(jax.tree.map(np.asarray, parts), sep="/")


def image_function(
    network: Network, config: ConfigDict, space: LatentSpace | None, *, steps: int
) -> Callable[[Weights, Int[Array, "n"], Int[Array, ""]], UInt8[Array, "n h w c"]]:
    """The function (weights, labels, seed) -> images; image i is what `dmf sample` makes as its
    i-th with the same labels and seed."""
    if isinstance(network, DiT):
        # Kernels are of one platform; this function is for all of them.
        network = dataclasses.replace(network, attention="xla")
    make = generation.image_function(network, config, space, steps=steps)

    def images(
        weights: Weights, labels: Int[Array, "n"], seed: Int[Array, ""]
    ) -> UInt8[Array, "n h w c"]:
        indices = jnp.arange(labels.shape[0], dtype=jnp.int32)
        return make(unflatten_dict(weights, sep="/"), indices, labels, seed).images

    return images


def serialized(function: Callable[..., Array], weights: dict[str, np.ndarray]) -> bytes:
    """The function for every platform and any number of labels, as `jax.export` serializes it."""
    shapes = {name: jax.ShapeDtypeStruct(w.shape, w.dtype) for name, w in weights.items()}
    (count,) = export.symbolic_shape("n")
    labels = jax.ShapeDtypeStruct((count,), jnp.int32)
    seed = jax.ShapeDtypeStruct((), jnp.int32)
    exported = export.export(jax.jit(function), platforms=PLATFORMS)(shapes, labels, seed)
    return bytes(exported.serialize())


def usage(network: Network, space: LatentSpace | None, *, steps: int) -> str:
    """How to run the function where `dmf` is not installed."""
    height, width, channels = network.sample_shape
    if space is not None:
        factor = space.autoencoder.factor
        height, width, channels = height * factor, width * factor, space.autoencoder.channels
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
        classes=f"from 0 to {classes - 1}, or {classes} for none" if classes else "all 0",
        modulus=max(classes, 1),
    )
