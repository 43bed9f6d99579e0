"""The parts of an export, read from a run, another export, or a checkpoint of another project."""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

from etils import epath
from ml_collections import ConfigDict

from dmf import registry
from dmf.checkpoints import load, model_card, power_ema
from dmf.checkpoints import params as stored_params
from dmf.checkpoints.convert import format_1, namings, open_checkpoint
from dmf.errors import InputError, brief
from dmf.models import FROZEN_KINDS
from dmf.models.encoders.autoencoder import Autoencoder
from dmf.runtime import progress
from dmf.runtime.hub import address, is_address
from dmf.runtime.paths import user_path
from dmf.types import Params

_MAX_ERROR_LENGTH = 600
# Dropped tensors that are named; of more, the number is said.
_NAMED = 8


class Parts(NamedTuple):
    """The parts of an export.

    Attributes:
      network: a network that was trained, or a frozen network.
      config: the config as JSON holds it; that of a frozen network has one section, its kind.
      params: parameters of the network.
      origin: one line that says where the parameters come from.
      autoencoder: the autoencoder of the latents that the network makes; None without one.
    """

    network: Any
    config: dict[str, Any]
    params: Params
    origin: str
    autoencoder: "Parts | None" = None


def read(
    source: str, fields: Mapping[str, Any], key: str, naming: str,
    config_class: type | None = None, autoencoder: Autoencoder | None = None,
    others: Sequence[str] = (),
) -> Parts:
    """The parts of a run, an export, or a checkpoint of another project.

    Args:
      source, fields, key, naming, config_class, others: as for `dmf.checkpoints.export.convert`.
      autoencoder: makes the latents of a network without a config; None for those of Stable
        Diffusion.

    Raises:
      InputError: the checkpoint cannot be read, or is of no known network.
    """
    if not others and _is_dmf_checkpoint(source):
        return _read_dmf(source, fields, key)
    opened = open_checkpoint.open_together([source, *others], key)
    defaults = config_class and load.config_to_json(ConfigDict(registry.to_config(config_class())))
    try:
        with _stated_errors(opened.config):
            stated, note = _stated_config(opened.config, defaults)
            known = _stated_network(stated, config_class)
        converted = namings.from_named_tensors(
            opened.tensors, {**known, **fields}, naming=naming, settings=opened.settings,
            neighbour=opened.neighbour,
        )
        with _stated_errors(opened.config):
            config = load.export_config(converted.network, stated, defaults,
                                        converted.scaling, autoencoder)
    except InputError as error:
        if len(str(error)) > _MAX_ERROR_LENGTH:  # it quotes what the file states
            error = InputError("", remedy=f"{brief(error, _MAX_ERROR_LENGTH)} ...")
        raise error.within(source) from None
    _log_reading(source, converted, opened.note, note)
    origin = f"converted from {_public_name(source)} ({converted.naming.name})"
    inner = _read_autoencoder_of(source)
    return Parts(converted.network, config, converted.params, origin, inner)


def _log_reading(source: str, converted: Any, note: str, note_of_config: str) -> None:
    """Says as what a source was read, and what of it was not."""
    progress.log("; ".join(filter(None, [
        f"{source}: read as {converted.naming.name}", note, converted.naming.notes,
        str(converted.network),
        f"its latents have {converted.scaling}" if converted.scaling else "",
        f"dropped {_some(converted.unused)}" if converted.unused else "",
        note_of_config,
    ])))


def _is_dmf_checkpoint(source: str) -> bool:
    """Whether a source is a run or an export; a whole repository of the hub must be an export."""
    if is_address(source):
        wanted = address(source)
        return wanted is not None and not wanted.file
    return stored_params.is_dmf_checkpoint(source)


def _some(names: Sequence[str]) -> str:
    """The first of some names, and how many there are of more."""
    more = len(names) - _NAMED
    return ", ".join(names[:_NAMED]) + (f" and {more} more" if more > 0 else "")


def _read_autoencoder_of(source: str) -> Parts | None:
    """The autoencoder that lies in a safetensors export over latents; None without one."""
    folder = user_path(source)
    inner = folder / load.AUTOENCODER
    if not ((folder / stored_params.SAFETENSORS_FILE).exists() and inner.exists()):
        return None
    return read(os.fspath(inner), {}, "", "")


def _stated_config(
    config: Mapping[str, Any], defaults: Mapping[str, Any] | None
) -> tuple[Mapping[str, Any], str]:
    """The config that a file states, in today's format, and a note for the user.

    Raises:
      InputError: the config is of a later format, or of an earlier one and incomplete.
    """
    if format_1.is_format_1(config):
        return format_1.upgrade(config, defaults)
    if config and config["format"] != stored_params.FORMAT:
        raise InputError("", remedy=f"the config that it states has format {config['format']}, and "
                         f"this dmf reads {stored_params.FORMAT}")
    return {name: value for name, value in config.items() if name != "format"}, ""


def _stated_network(stated: Mapping[str, Any], config_class: type | None) -> dict[str, Any]:
    """The fields of the network in a config that a file states; none if it states none.

    Raises:
      InputError: there is no such network, or another part of the config cannot be used.
    """
    kind = next((kind for kind in ("model", *FROZEN_KINDS) if kind in stated), "")
    if not kind:
        return {}
    if kind == "model" and config_class:
        registry.build(config_class, stated)
    with registry.at(kind):
        network = registry.build(kind, stated[kind])
    return {name: getattr(network, name) for name in stated[kind] if name != "name"}


@contextmanager
def _stated_errors(config: Mapping[str, Any]) -> Iterator[None]:
    """Turns errors about a config that a file states, whatever it holds, into one line.

    Raises:
      InputError: the config cannot be used.
    """
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # its parts may have any type
        if not config:
            raise
        raise InputError("", remedy="the config that it states cannot be used "
                         f"({type(error).__name__}: {brief(error)})") from None


def _public_name(source: str) -> str:
    """The name of a source without the folders of this machine."""
    return source if is_address(source) else epath.Path(source).name


def _read_dmf(directory: str, fields: Mapping[str, Any], key: str) -> Parts:
    """The parts of a run or an export, whose parameters become those of a network with `fields`."""
    if not fields:
        return open_parts(directory, key or "main")
    config = load.read_config(directory)
    config.model.update(fields)
    if "split_depth" in fields:
        config.model.conditioning = "decoupled"
    return open_parts(directory, key or "main", config)


def open_parts(
    directory: epath.PathLike, ema: str, config: ConfigDict | None = None
) -> Parts:
    """The parts of a run or an export.

    Args:
      directory: a workdir, whose newest checkpoint is loaded, one of its checkpoints/STEP, or an
        export.
      ema: name of the EMA parameters of a run, or std=WIDTH; empty for the raw parameters.
      config: a config to use in place of the stored one.

    Raises:
      InputError: there is no checkpoint, or no such EMA parameters.
      RunError: the checkpoint is damaged.
    """
    directory = load.newest_checkpoint(directory)
    stored = stored_params.read_config(directory)
    kind, std = load.frozen_kind(stored), power_ema.requested_std(ema)
    if kind:
        if std is not None:
            raise InputError("ema", ema, f"{directory} holds a frozen network, which has no EMAs")
        network, params = load.load_encoder(
            directory, load.frozen_section(stored, directory)["name"]
        )
        return Parts(network, stored, params, stored_params.read_origin(directory))
    network, config, params = load.load_network(directory, ema, config=config)
    _, step = stored_params.split_step(directory)
    exported = load.config_to_json(config)
    origin = stored_params.read_origin(directory) or model_card.trained(exported, step, std)
    decoder = open_parts(config.latents.autoencoder, "") if config.latents.autoencoder else None
    return Parts(network, exported, params, origin, decoder)
