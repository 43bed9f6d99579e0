"""The guide of autoguidance: another checkpoint, of samples and conditions of the same kind."""

from collections.abc import Iterable, Iterator
from typing import Any

from etils import epath
from jax.sharding import Mesh
from ml_collections import ConfigDict

from dmf.checkpoints.load import load_network, newest_checkpoint
from dmf.checkpoints.params import split_step
from dmf.errors import InputError
from dmf.models.build import latents, network
from dmf.registry import at
from dmf.runtime.progress import log
from dmf.types import Network, Params


def load_guide(
    directory: epath.PathLike, ema: str, *, config: ConfigDict, mesh: Mesh, scales: Iterable[float]
) -> tuple[tuple[Network, Params], int | None]:
    """The network of a guide with its parameters (autoguidance, arXiv:2406.02507), and the step
    that they are of; None for those of an export.

    Args:
      directory: a run, one of its checkpoints/STEP, or an export.
      ema: name of the EMA parameters of the guide; empty for the raw parameters.
      config: of the flow map that is guided.
      mesh: the mesh to shard the parameters over.
      scales: the guidance scales that are used.

    Raises:
      InputError: there is no such checkpoint or EMA; the guide has other samples, conditions, path
        or latents; one of both takes its guidance as an input; or no scale guides.
      RunError: the checkpoint is damaged.
    """
    if all(scale == 1 for scale in scales):
        raise InputError("guide", directory, "the guidance scale is 1, which is no guidance; give "
                         "another one, --config.sampling.guidance.scale=2")
    log(f"loading {directory}, {ema or 'raw'} parameters")
    with at("guide"):
        checkpoint = newest_checkpoint(directory)
        guide, its_config, params = load_network(checkpoint, ema, mesh=mesh)
    for difference in _differences(network(config.model), guide):
        raise InputError("guide", directory, difference)
    for field, ours, its in data_differences(config, its_config):
        raise InputError("guide", directory, f"its {field} is {its}, and that of the checkpoint "
                         f"{ours}; give a guide of the same path and latents")
    return (guide, params), split_step(checkpoint)[1]


def _differences(guided: Network, guide: Network) -> Iterator[str]:
    """Why a network cannot guide another one, in words."""
    if guided.guidance_input or guide.guidance_input:
        which = "the network" if guided.guidance_input else "it"
        yield f"{which} takes its guidance as an input, which excludes a guide; leave it out"
    if guide.sample_shape != guided.sample_shape:
        yield (f"its samples have shape {guide.sample_shape}, those of the checkpoint "
               f"{guided.sample_shape}; give a guide of the same shape")
    if guide.num_classes != guided.num_classes:
        yield (f"it has {guide.num_classes} classes, the checkpoint {guided.num_classes}; give a "
               "guide of the same condition")


def data_differences(config: ConfigDict, other: ConfigDict) -> Iterator[tuple[str, Any, Any]]:
    """The fields in which two networks were trained on another path or on other latents, each with
    the value of `config` and that of `other`."""
    fields = {"objective.interpolant": [c.objective.get("interpolant") for c in (config, other)]}
    fields |= {f"latents.{name}": [getattr(latents(c.latents), name) for c in (config, other)]
               for name in ("scale", "shift", "mean", "std")}
    for field, (ours, its) in fields.items():
        if ours != its:
            yield field, ours, its
