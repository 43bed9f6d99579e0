"""Loads the network, the config and the parameters of a run or an export."""

import json
from collections.abc import Mapping
from typing import Any

from etils import epath
from jax.sharding import Mesh
from ml_collections import ConfigDict

from dmf import registry
from dmf.checkpoints import params as stored_params
from dmf.checkpoints import power_ema
from dmf.checkpoints.located import local_directory
from dmf.checkpoints.stored_config import without_foreign_paths
from dmf.data.build import Data, data
from dmf.data.latent_origin import check_origin
from dmf.errors import InputError
from dmf.models import FROZEN_KINDS
from dmf.models.abstract_params import abstract_params
from dmf.models.build import Latents, latents, network
from dmf.models.encoders.autoencoder import Autoencoder, latent_side
from dmf.models.encoders.autoencoder_kl import AutoencoderKL
from dmf.models.encoders.latent_scaling import LatentScaling
from dmf.models.encoders.latent_space import LatentSpace
from dmf.models.encoders.tiled_decoding import describe_tiles
from dmf.models.flow_map import NetworkFlowMap
from dmf.objectives.build import interpolant
from dmf.registry import at
from dmf.runtime.progress import log
from dmf.runtime.sharding import make_mesh, parameter_shardings, with_shardings
from dmf.sampling.build import Sampling, sampling
from dmf.types import Network, Params

# Parameters that only training uses.
_DROPPED_AFTER_TRAINING = ("log_variance", "projector", "v_head")
# The folder of the autoencoder in an export over latents.
AUTOENCODER = "autoencoder"
_LATENTS_OF_512 = 64
# The sections that sampling needs, and what each of them is.
_SECTIONS = {"model": "model", "objective": "objective", "data": Data, "latents": Latents,
             "sampling": Sampling}  # fmt: skip


def load_params(
    network: Network,
    directory: epath.PathLike,
    ema: str,
    *,
    mesh: Mesh,
    allow_missing: tuple[str, ...] = (),
    left_out: tuple[str, ...] = (),
) -> Params:
    """The parameters of a run or an export for a given network, sharded over a mesh.

    Args:
      network: the network, whose parameters may be fewer than those of the checkpoint: parameters
        that only training uses are dropped.
      directory: a workdir, one of its checkpoints/STEP, or an export.
      ema: name of the EMA parameters, or std=WIDTH; empty for the raw parameters.
      mesh: the mesh to shard the parameters over.
      allow_missing: parameters that the checkpoint may lack; they are left out of the result.
      left_out: names at the top of parameters that are left out of the result in any case.

    Raises:
      InputError: there is no checkpoint, no such EMA parameters, or another architecture.
      RunError: the checkpoint is damaged.
    """
    needed = abstract_params(network)
    abstract = {name: part for name, part in needed.items() if name not in left_out}
    target = with_shardings(abstract, parameter_shardings(mesh, abstract))
    allowed = {"allow_missing": allow_missing,
               "allow_unexpected": (*_DROPPED_AFTER_TRAINING, *left_out)}
    std = power_ema.requested_std(ema)
    if std is not None:
        return power_ema.synthesise(directory, target, std, **allowed)
    return stored_params.restore_params(directory, target, ema=ema, **allowed)


def newest_checkpoint(directory: epath.PathLike) -> epath.PathLike:
    """The checkpoints/STEP that a run stands for now, whatever its training saves later: who loads
    several parts of a run, or states its step, asks once. Other directories are returned.

    Args:
      directory: a workdir, one of its checkpoints/STEP, or an export.
    """
    run, asked = stored_params.split_step(directory)
    step = None if stored_params.is_export(directory) else stored_params.latest_step(directory)
    if step is None or asked is not None:
        return directory
    return run / stored_params.CHECKPOINTS / str(step)


def check_params(directory: epath.PathLike, ema: str) -> None:
    """Checks that a run or an export has some parameters, without reading them.

    Args:
      directory: a workdir, one of its checkpoints/STEP, or an export.
      ema: name of the EMA parameters, or std=WIDTH; empty for the raw parameters.

    Raises:
      InputError: there is no checkpoint, or no such EMA parameters, and none that they could be
        synthesised from.
      RunError: the checkpoint is damaged.
    """
    std = power_ema.requested_std(ema)
    if std is None:
        stored_params.check_saved(directory, ema)
    else:
        power_ema.weighted_averages(directory, std)


def config_to_json(config: ConfigDict) -> dict[str, Any]:
    """A config as JSON holds it: dictionaries, lists and plain values.

    >>> config_to_json(ConfigDict({"steps": (1, 2), "guidance": {"scale": 1.5}}))
    {'steps': [1, 2], 'guidance': {'scale': 1.5}}
    """
    return json.loads(config.to_json_best_effort())


def read_config(directory: epath.PathLike) -> ConfigDict:
    """The config of a run or an export.

    Whoever wrote it, nothing that it names is imported. The paths in an export, and those that lead
    into the checkpoint itself, are left empty with a line that says so.

    Raises:
      InputError: there is no config, it has another format, it is of a frozen network, or a section
        that sampling needs cannot be used.
      RunError: it is damaged.
    """
    stored = stored_params.read_config(directory)
    if "model" not in stored and frozen_kind(stored):
        name = frozen_section(stored, directory)["name"]
        raise InputError("checkpoint", directory, f"it holds a frozen network ({name}), no flow "
                         "map")
    stored, left_out = without_foreign_paths(
        stored, stored_params.split_step(directory)[0],
        exported=stored_params.is_export(directory),
    )
    if left_out:
        log(f"checkpoint={directory}: its config names {', '.join(left_out)}, as only a checkpoint "
            "of somebody else does; they are not followed, --config.FIELD=PATH gives paths")
    try:
        config = config_from_json(stored)
    except InputError as error:
        raise error.within(f"checkpoint={directory}") from None
    autoencoder = local_directory(directory) / AUTOENCODER
    if not config.latents.autoencoder and autoencoder.exists():
        config.latents.autoencoder = str(autoencoder)
    return config


def config_from_json(stored: Mapping[str, Any]) -> ConfigDict:
    """The config that JSON holds, with the defaults of the fields that sections of sampling lack.

    Raises:
      InputError: one of these sections is missing, or cannot be used.
    """
    complete = dict(stored)
    for section, kind in _SECTIONS.items():
        if section not in stored:
            raise InputError(section, remedy="the config lacks this section")
        with at(section):
            complete[section] = registry.complete(kind, stored[section])
    config = ConfigDict(complete)
    network(config.model), latents(config.latents), data(config.data)
    sampling(config.sampling, interpolant(config.objective))
    return config


def export_config(
    network: Any, stated: Mapping[str, Any], defaults: Mapping[str, Any] | None = None,
    scaling: LatentScaling | None = None, autoencoder: Autoencoder | None = None,
) -> dict[str, Any]:
    """The config of a network that was converted, for its export.

    Args:
      network: a network that is trained, or a frozen network.
      stated: the config that the converted file states; empty if it states none.
      defaults: a config with every field, for a network whose file states none.
      scaling: the scaling of its latents, for a network whose file states no config; that of the
        autoencoder by default.
      autoencoder: the autoencoder of its latents; that of Stable Diffusion by default.

    Returns:
      The config as JSON holds it; that of a frozen network has one section, its kind.

    Raises:
      InputError: the stated config lacks a section.
    """
    if type(network) not in registry.components("model").values():
        kind = next(kind for kind in FROZEN_KINDS
                    if type(network) in registry.components(kind).values())
        return {kind: registry.to_config(network, kind)}
    missing = (defaults or {}).keys() - stated.keys()
    if stated and missing:
        raise InputError("", remedy=f"the checkpoint states a config without {min(missing)}")
    config = config_from_json(stated or defaults)
    config.model = registry.to_config(network, "model")
    published = autoencoder or AutoencoderKL()
    if not stated and network.channels == published.latent_channels:
        config.latents.update(registry.to_config(scaling or published.default_scaling))
        config.data.name = f"imagenet_latents_{published.factor * network.input_size}"
        # Latents of images of 512 x 512 are sampled with a time shift, as published.
        config.sampling.shift = 1.5 if network.input_size == _LATENTS_OF_512 else 1.0
    elif not stated and network.channels == published.channels:
        config.data.name = f"imagenet_{network.input_size}"
    return config_to_json(config)


def frozen_section(stored: Mapping[str, Any], directory: epath.PathLike) -> dict[str, Any]:
    """The config of the frozen network of an export: its name and fields.

    Raises:
      InputError: the stored config has no such section, or one without a name.
    """
    section = stored.get(frozen_kind(stored))
    if not isinstance(section, dict) or not isinstance(section.get("name"), str):
        raise InputError("checkpoint", directory, "its config is of no network that is known; make "
                         "it again with dmf convert")
    return section


def frozen_kind(stored: Mapping[str, Any]) -> str:
    """The kind of frozen network in a stored config, "autoencoder" or "encoder"; "" if none."""
    return next((kind for kind in FROZEN_KINDS if kind in stored), "")


def read_encoder(directory: epath.PathLike, name: str) -> Any:
    """A frozen network of an export, without its parameters.

    Args:
      directory: an export.
      name: the registered name of the network, for example "dinov2" or "autoencoder_kl".

    Raises:
      InputError: the directory holds no network of that name.
    """
    stored = stored_params.read_config(directory)
    kind = frozen_kind(stored)
    if not kind or frozen_section(stored, directory)["name"] != name:
        raise InputError(name, directory, "it holds no such network; make one with dmf convert")
    with at(kind):
        return registry.build(kind, stored[kind])


def load_encoder(
    directory: epath.PathLike, name: str, *, mesh: Mesh | None = None
) -> tuple[Any, Params]:
    """A frozen network of an export, and its parameters.

    Args:
      directory: an export.
      name: the registered name of the network, for example "dinov2" or "autoencoder_kl".
      mesh: the mesh to shard the parameters over; one device holds them by default.

    Raises:
      InputError: the directory holds no network of that name.
    """
    return _with_params(directory, read_encoder(directory, name), mesh)


def load_autoencoder(
    directory: epath.PathLike, *, mesh: Mesh | None = None
) -> tuple[Autoencoder, Params]:
    """The autoencoder of an export and its parameters, whichever registered autoencoder it is.

    Args:
      directory: an export.
      mesh: the mesh to shard the parameters over; one device holds them by default.

    Raises:
      InputError: the directory holds no autoencoder.
    """
    stored = stored_params.read_config(directory)
    if "autoencoder" not in stored:
        raise InputError(
            "autoencoder", directory, "it holds no autoencoder; make one with dmf convert"
        )
    with at("autoencoder"):
        autoencoder = registry.build("autoencoder", stored["autoencoder"])
    return _with_params(directory, autoencoder, mesh)


def _with_params(
    directory: epath.PathLike, network: Any, mesh: Mesh | None
) -> tuple[Any, Params]:
    """A frozen network and its parameters in an export."""
    abstract = abstract_params(network)
    if mesh is not None:
        abstract = with_shardings(abstract, parameter_shardings(mesh, abstract))
    return network, stored_params.restore_params(directory, abstract)


def load_latent_space(config: ConfigDict) -> tuple[LatentSpace, Params] | None:
    """Loads the autoencoder of `config.latents`.

    Returns:
      The latent space and the parameters of the autoencoder; None if samples are images.

    Raises:
      InputError: a field that cannot be used, or the autoencoder has another number of channels
        than `config.model`, or is not that of the latents of `config.data`.
    """
    directory, tiles = latents(config.latents).autoencoder, config.sampling.get("decode_tiles")
    if not directory:
        if tiles:
            raise InputError("sampling.decode_tiles", tiles, "without latents.autoencoder nothing "
                             "is decoded; leave it empty")
        return None
    autoencoder, params = load_autoencoder(directory)
    space = build_latent_space(config, autoencoder)
    try:
        check_origin(data(config.data).directories, autoencoder, params)
    except InputError as error:
        raise InputError("latents.autoencoder", directory, str(error)) from None
    return space, params


def build_latent_space(config: ConfigDict, autoencoder: Autoencoder) -> LatentSpace:
    """The latent space of `config.latents` with a given autoencoder.

    Raises:
      InputError: the latents have another number of channels than `config.model`, another size
        than the autoencoder takes, or are no larger than a tile of `config.sampling.decode_tiles`.
    """
    settings, shape = latents(config.latents), network(config.model).sample_shape
    if latent_side(autoencoder) not in (None, shape[0]):
        raise InputError("latents.autoencoder", settings.autoencoder,
                         f"it takes latents of side {latent_side(autoencoder)} alone, and "
                         f"config.model has {shape[0]}")
    if autoencoder.latent_channels != shape[-1]:
        raise InputError("latents.autoencoder", settings.autoencoder, "its latents have "
                         f"{autoencoder.latent_channels} channels, config.model has {shape[-1]}")
    decoding = {name: config.sampling[name] for name in ("decode_batch", "decode_dtype")}
    decoding["decode_tiles"] = tuple(config.sampling.decode_tiles)
    with at("sampling"):
        space = LatentSpace(autoencoder=autoencoder, scaling=settings.scaling, **decoding)
        if note := describe_tiles(space.decode_tiles, shape, autoencoder):
            log(note)
    return space


def load_network(
    directory: epath.PathLike,
    ema: str = "main",
    *,
    mesh: Mesh | None = None,
    config: ConfigDict | None = None,
) -> tuple[Network, ConfigDict, Params]:
    """The network, the config and the parameters of a run or an export.

        network, config, params = load_network("runs/digits_dmf")
        velocity = network.apply(params, x_t, t, t, labels)

    Args:
      directory: a workdir, whose newest checkpoint is loaded, one of its checkpoints/STEP, or an
        export.
      ema: name of the EMA parameters of a run, or std=WIDTH for those that are synthesised from its
        power EMAs; empty for the raw parameters. An export holds one set of parameters.
      mesh: the mesh to shard the parameters over; all devices along the axis "data" by default.
      config: a config to use in place of the stored one, for example to load the parameters into
        a network with another split depth.

    Raises:
      InputError: there is no checkpoint, no such EMA parameters, or another architecture; or the
        config says that the network predicts something else than it was trained to.
      RunError: the checkpoint is damaged.
    """
    if config is None:
        config = read_config(directory)
    else:
        _check_prediction(config, directory)
    built = network(config.model)
    mesh = make_mesh() if mesh is None else mesh
    params = load_params(built, directory, ema, mesh=mesh, allow_missing=("log_variance",))
    return built, config, params


def _check_prediction(config: ConfigDict, directory: epath.PathLike) -> None:
    """Raises InputError where a config changes what the network of a checkpoint predicts."""
    stored = registry.complete("model", stored_params.read_config(directory)["model"])
    for name in ("prediction", "min_time"):
        ours, its = (section.get(name) for section in (config.model, stored))
        if ours != its:
            raise InputError(f"model.{name}", ours, f"the network of checkpoint={directory} was "
                             f"trained with {its}; leave it out")


def load(
    directory: epath.PathLike, *, ema: str = "main", config: ConfigDict | None = None
) -> tuple[NetworkFlowMap, ConfigDict]:
    """The flow map of a run or an export, ready to call, and its config; see `load_network`."""
    built, config, params = load_network(directory, ema, config=config)
    return NetworkFlowMap(params=params, network=built), config
