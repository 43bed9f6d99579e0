"""From a directory to a network: what runs and exports hold, ready to be called."""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

import jax
from etils import epath
from jax.sharding import Mesh
from ml_collections import ConfigDict, config_dict

from dmf import checkpoint, defaults
from dmf.components import COMPONENTS, component, field_value, network
from dmf.encoders.autoencoder import Autoencoder
from dmf.encoders.latents import LatentSpace
from dmf.models.dit import DiT
from dmf.scaling import STABLE_DIFFUSION_SCALE, Scaling
from dmf.sharding import make_mesh, parameter_shardings
from dmf.state import with_shardings
from dmf.typing import FlowMap, InputError, Network, Params

# Parameters that a run may want and its initial checkpoint lacks: an objective's, embeddings that
# are zero at first, and the scales of qk-norm, which are 1. And those that only training used.
QK_NORM = ("blocks/attention/q_norm", "blocks/attention/k_norm")
ADDED = ("log_variance", "interval_embedding", "target_embedding", "both_embedding",
         "guidance_embedding", "projector", *QK_NORM)  # fmt: skip
_DROPPED = ("log_variance", "projector")
# An export over latents may hold their autoencoder, in a directory of its own.
AUTOENCODER = "autoencoder"
STABLE_DIFFUSION_CHANNELS = 4
_LATENTS_OF_512 = 64


def restore(
    network: Network,
    directory: epath.PathLike,
    ema: str,
    *,
    on: Mesh,
    missing: tuple[str, ...] = (),
) -> Params:
    """Parameters of a run or export for `network`, placed on the mesh."""
    abstract = jax.eval_shape(network.init, jax.random.key(0))
    target = with_shardings(abstract, parameter_shardings(on, abstract))
    return checkpoint.restore_params(
        directory, target, average=ema, missing=missing, surplus=_DROPPED
    )


def plain(config: ConfigDict) -> dict[str, Any]:
    """A config as JSON holds it: tuples as lists, nothing else."""
    return json.loads(config.to_json_best_effort())


def read_config(directory: epath.PathLike) -> ConfigDict:
    """The config that a run or an export was made with.

    Raises:
      InputError: there is none, or it is that of a frozen network.
    """
    stored = checkpoint.read_config(directory)
    if "model" not in stored:
        raise InputError(f"checkpoint={directory}: it holds a frozen network "
                         f"({stored.get('encoder', {}).get('name')}), no flow map")
    config = as_config(stored)
    inside = epath.Path(directory) / AUTOENCODER
    if not config.latents.autoencoder and inside.exists():
        config.latents.autoencoder = str(inside)
    return config


def as_config(stored: Mapping[str, Any]) -> ConfigDict:
    """A config as JSON held it; how it samples, and what it aligns with, may be told in part."""
    config, default = ConfigDict(stored), defaults.get_config()
    config.sampling = {**default.sampling, **config.sampling}
    config.alignment = {**default.alignment, **config.get("alignment", {})}
    if config.model.get("split_depth", 0) is None:
        # JSON forgets the type of a field that is not set.
        config.model.split_depth = config_dict.placeholder(int)
    return config


def described(kind: str, network: Any) -> dict[str, Any]:
    """The fields of a network as a config holds them, its name of `COMPONENTS[kind]` first."""
    names = {made: name for name, made in COMPONENTS[kind].items()}
    return {"name": names[type(network)], **dataclasses.asdict(network)}


def config_of(network: Any, stated: Mapping[str, Any]) -> dict[str, Any]:
    """The config of a network that no run of ours trained, for its export.

    Args:
      network: a flow map, or a frozen network.
      stated: what the checkpoint says of itself, empty if nothing.
    """
    if not isinstance(network, DiT):
        return {"encoder": described("encoder", network)}
    config = defaults.get_config()
    missing = config.keys() - stated.keys() - {"alignment"}
    if stated and missing:
        raise InputError(f"the checkpoint states a config without {min(missing)}")
    config = as_config(stated) if stated else config
    config.model.update(described("model", network))
    if not stated and network.channels == STABLE_DIFFUSION_CHANNELS:
        config.latents.scale = STABLE_DIFFUSION_SCALE
        config.data.name = f"imagenet_latents_{8 * network.input_size}"
        # Latents of images of 512 are sampled with a shift, as published.
        config.sampling.shift = 1.5 if network.input_size == _LATENTS_OF_512 else 1.0
    return plain(config)


def read_encoder(directory: epath.PathLike, name: str) -> Any:
    """A frozen network without its parameters, as `dmf convert` wrote it.

    Args:
      directory: an export.
      name: what `COMPONENTS["encoder"]` calls it.

    Raises:
      InputError: nothing is there, or another network.
    """
    stored = checkpoint.read_config(directory)
    if stored.get("encoder", {}).get("name") != name:
        raise InputError(f"{name}={directory}: it holds no such network; make one with dmf convert")
    return component("encoder", stored["encoder"], "encoder")


def load_encoder(
    directory: epath.PathLike, name: str, *, on: Mesh | None = None
) -> tuple[Any, Params]:
    """A frozen network and its parameters, as `dmf convert` wrote them.

    Args:
      directory: an export.
      name: what `COMPONENTS["encoder"]` calls it.
      on: the mesh to split parameters over; one device has them by default.

    Raises:
      InputError: nothing is there, or another network.
    """
    made = read_encoder(directory, name)
    abstract = jax.eval_shape(made.init, jax.random.key(0))
    if on is not None:
        abstract = with_shardings(abstract, parameter_shardings(on, abstract))
    return made, checkpoint.restore_params(directory, abstract)


def latent_space(config: ConfigDict) -> tuple[LatentSpace, Params] | None:
    """How samples become images, and the parameters it takes; None if samples are images.

    Raises:
      InputError: `config.latents` cannot be, or its autoencoder has not as many channels as
        `config.model`.
    """
    directory = config.latents.autoencoder
    if not directory:
        return None
    autoencoder, params = load_encoder(directory, "autoencoder")
    return latent_space_of(config, autoencoder), params


def scaling(config: ConfigDict) -> Scaling:
    """How the latents of `config` are scaled."""
    fields = {name: value for name, value in config.latents.items() if name != "autoencoder"}
    return Scaling(**{name: field_value(name, value, f"latents.{name}")
                      for name, value in fields.items()})


def latent_space_of(config: ConfigDict, autoencoder: Autoencoder) -> LatentSpace:
    """The latents of `config` in the space of an autoencoder.

    Raises:
      InputError: they have not as many channels as `config.model`, or `config.sampling` says of
        decoding what cannot be.
    """
    channels = network(config).sample_shape[-1]
    if autoencoder.latent_channels != channels:
        raise InputError(f"latents.autoencoder={config.latents.autoencoder}: its latents have "
                         f"{autoencoder.latent_channels} channels, config.model has "
                         f"{channels}")
    return LatentSpace(
        autoencoder=autoencoder,
        scaling=scaling(config),
        decode_batch=config.sampling.decode_batch,
        decode_dtype=config.sampling.decode_dtype,
    )


def load_network(
    directory: epath.PathLike,
    ema: str = "main",
    *,
    on: Mesh | None = None,
    config: ConfigDict | None = None,
) -> tuple[Network, ConfigDict, Params]:
    """The network, config and parameters of a run or an export.

    Args:
      directory: a workdir or an export.
      ema: which average of a run; empty for the trained parameters themselves.
      on: the mesh to place parameters on; all devices along "data" by default.
      config: in place of the stored one, to see the same parameters as another network.
    """
    config = read_config(directory) if config is None else config
    made = network(config)
    on = make_mesh() if on is None else on
    return made, config, restore(made, directory, ema, on=on, missing=("log_variance",))


def load(directory: epath.PathLike, *, ema: str = "main") -> tuple[FlowMap, ConfigDict]:
    """The flow map of a run or an export, ready to call, and its config.

    Args:
      directory: a workdir, whose newest checkpoint is read, or an export.
      ema: which average of a run; an export holds one set of parameters.

    Returns:
      u(x_t, t, r, y) -> [b, h, w, c], unguided; and the config it was trained with. The flow map
      is a pytree, so that it can be an argument of a jitted function: closed over, its parameters
      would be compiled in.

    Raises:
      InputError: nothing is there, or no such average.
    """
    made, config, params = load_network(directory, ema)
    return jax.tree_util.Partial(made.apply, params), config
