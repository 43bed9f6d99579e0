"""Exports of parameters, and conversion of the checkpoints of other projects to exports.

An export is a directory that appears when it is complete: `config.json`, `README.md` (the model
card), and by format `params/` (Orbax), `model.safetensors`, or a StableHLO function with its
weights. No export holds a path of the machine that wrote it.
"""

import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import flatbuffers
import numpy as np
from etils import epath
from ml_collections import ConfigDict
from safetensors.numpy import save_file

from dmf import registry
from dmf.checkpoints import load, model_card, power_ema
from dmf.checkpoints import params as stored_params
from dmf.checkpoints.convert import format_1, namings, open_checkpoint
from dmf.checkpoints.hub_card import Publication
from dmf.checkpoints.stored_config import without_local_paths
from dmf.errors import InputError, brief
from dmf.models import FROZEN_KINDS
from dmf.models.encoders.autoencoder import Autoencoder
from dmf.objectives.build import interpolant
from dmf.runtime import files, progress
from dmf.runtime.hub import address, is_address
from dmf.runtime.ownership import owned_output
from dmf.runtime.paths import user_path
from dmf.sampling import stablehlo
from dmf.sampling.build import sampling
from dmf.types import Params

_MAX_ERROR_LENGTH = 600
# Dropped tensors that are named; of more, the number is said.
_NAMED = 8
FORMATS = ("orbax", "safetensors", "stablehlo")


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


def convert(
    source: str,
    output: epath.PathLike,
    *,
    fields: Mapping[str, Any],
    others: Sequence[str] = (),
    key: str = "",
    naming: str = "",
    autoencoder: str = "",
    config_class: type | None = None,
) -> None:
    """Converts a checkpoint of another project to an export.

    Args:
      source: a file, a directory or `hf:OWNER/REPO/FILE`, see `open_checkpoint.open_checkpoint`; or
        a run or an export of dmf, also `hf:OWNER/REPO`.
      output: the directory to make.
      fields: fields of the network that its tensors do not tell.
      others: more sources, which have the other tensors of the network.
      key: part of a training file; empty for the EMA parameters if there are any.
      naming: parameter naming scheme of the tensors; empty to detect it.
      autoencoder: source of the autoencoder of the latents; empty for none.
      config_class: the dataclass of a whole config; a config that the file states is checked with
        it, and a network whose file states none gets its defaults.

    Raises:
      InputError: the checkpoint cannot be read or is of no known network; nothing is written.
      RunError: the disk is full or cannot be written.
    """
    with owned_output("output", output), files.new_directory(output) as folder:
        decoder = _read_autoencoder(autoencoder) if autoencoder else None
        parts = _read(source, fields, key, naming, config_class, decoder and decoder.network,
                      others)
        if decoder:
            _check_channels(autoencoder, decoder.network, parts.network)
            parts = parts._replace(autoencoder=decoder)
        _write_orbax(folder, parts)


def _read_autoencoder(source: str) -> Parts:
    parts = _read(source, {}, "", "")
    if "autoencoder" not in parts.config:
        raise InputError("autoencoder", source,
                         f"it holds another network, {type(parts.network).__name__}")
    return parts


def _check_channels(source: str, autoencoder: Autoencoder, network: Any) -> None:
    """Raises InputError where the samples of a network are no latents of an autoencoder."""
    *_, channels = getattr(network, "sample_shape", (0,))
    if channels != autoencoder.latent_channels:
        raise InputError("autoencoder", source, f"its latents have {autoencoder.latent_channels} "
                         f"channels, and the samples of the {type(network).__name__} {channels}")


def _read(
    source: str, fields: Mapping[str, Any], key: str, naming: str,
    config_class: type | None = None, autoencoder: Autoencoder | None = None,
    others: Sequence[str] = (),
) -> Parts:
    """The parts of a run, an export, or a checkpoint of another project.

    A network without a config has the latents of `autoencoder`, or those of Stable Diffusion.
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
    progress.log("; ".join(filter(None, [
        f"{source}: read as {converted.naming.name}", opened.note, converted.naming.notes,
        str(converted.network),
        f"its latents have {converted.scaling}" if converted.scaling else "",
        f"dropped {_some(converted.unused)}" if converted.unused else "",
        note,
    ])))
    origin = f"converted from {_public_name(source)} ({converted.naming.name})"
    inner = _read_autoencoder_of(source)
    return Parts(converted.network, config, converted.params, origin, inner)


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
    return _read(os.fspath(inner), {}, "", "")


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
    step = stored_params.latest_step(directory)
    exported = load.config_to_json(config)
    origin = stored_params.read_origin(directory) or model_card.trained(exported, step, std)
    decoder = open_parts(config.latents.autoencoder, "") if config.latents.autoencoder else None
    return Parts(network, exported, params, origin, decoder)


def write(
    output: epath.PathLike, parts: Parts, *, form: str = "orbax", naming: str = "", steps: int = 4,
    publication: Publication | None = None,
) -> None:
    """Writes an export.

    >>> import jax, tempfile
    >>> from dmf.models import AutoencoderKL
    >>> network = AutoencoderKL(widths=(4,), layers_per_block=1, groups=2)
    >>> shapes = jax.eval_shape(network.init, jax.random.key(0))
    >>> params = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     parts = Parts(network, load.export_config(network, {}), params, "zeros")
    ...     write(f"{folder}/vae", parts, form="safetensors")
    ...     sorted(os.listdir(f"{folder}/vae"))
    ['README.md', 'config.json', 'model.safetensors']

    Args:
      output: the directory to make.
      parts: the network, its config and its parameters.
      form: one of `FORMATS`.
      naming: parameter naming scheme of a safetensors file; empty for the first of the network.
      steps: number of sampling steps of a StableHLO function.
      publication: what the model card says of an export that is pushed to the hub.

    Raises:
      InputError: there is no such format or naming, or the directory is not empty or is being
        written by another command.
      RunError: the disk is full or cannot be written.
    """
    if form not in FORMATS:
        raise InputError("format", form, f"choose one of {', '.join(FORMATS)}")
    with owned_output("output", output), files.new_directory(output) as folder:
        if form == "orbax":
            _write_orbax(folder, parts, publication)
        elif form == "safetensors":
            _write_safetensors(folder, parts, naming, publication)
        else:
            _write_stablehlo(folder, parts, steps, publication)


def write_frozen(output: epath.PathLike, network: Any, params: Params, *, origin: str) -> None:
    """Writes an export of a frozen network of your own, such as an autoencoder, which
    `latents.autoencoder` then names.

    Args:
      output: the directory to make.
      network: an object of a class that is registered under the kind "autoencoder" or "encoder".
      params: its parameters, as its `init` returns them.
      origin: one line that says where the parameters come from.

    Raises:
      InputError: the class is not registered, or the directory is not empty.
      RunError: the disk is full or cannot be written.
    """
    kind = next((kind for kind in FROZEN_KINDS
                 if type(network) in registry.components(kind).values()), None)
    if kind is None:
        raise InputError("network", type(network).__name__, "register the class, for example by "
                         'dmf.registry.register("autoencoder", NAME=CLASS)')
    write(output, Parts(network, {kind: registry.to_config(network, kind)}, params, origin))


def _write_orbax(
    folder: epath.Path, parts: Parts, publication: Publication | None = None
) -> None:
    stored_params.write_params(folder, parts.params)
    if parts.autoencoder is not None:
        _write_orbax(_autoencoder_folder(folder), parts.autoencoder)
    latents = parts.autoencoder is not None
    usage = model_card.orbax_usage(parts.config, publication, latents=latents)
    _write_config_and_card(folder, parts, usage, publication)


def _write_safetensors(
    folder: epath.Path, parts: Parts, naming: str, publication: Publication | None = None
) -> None:
    chosen = namings.naming_of(parts.network, naming)
    tensors = namings.to_named_tensors(parts.network, parts.params, chosen)
    progress.log(f"written as {chosen.name}" + (f"; {chosen.notes}" if chosen.notes else ""))
    stated = {"format": stored_params.FORMAT, **without_local_paths(parts.config)}
    metadata = {"format": "pt", open_checkpoint.CONFIG_KEY: json.dumps(stated)}
    _save(tensors, folder / stored_params.SAFETENSORS_FILE, metadata)
    if parts.autoencoder is not None:
        _write_safetensors(_autoencoder_folder(folder), parts.autoencoder, "")
    latents = parts.autoencoder is not None
    usage = model_card.safetensors_usage(chosen.name, publication, latents=latents)
    _write_config_and_card(folder, parts, usage, publication)


def _autoencoder_folder(folder: epath.Path) -> epath.Path:
    """The folder of the autoencoder in an export, which is made."""
    inner = folder / load.AUTOENCODER
    inner.mkdir()
    return inner


def _write_stablehlo(
    folder: epath.Path, parts: Parts, steps: int, publication: Publication | None
) -> None:
    if "model" not in parts.config:
        raise InputError(
            "format", "stablehlo",
            "the checkpoint holds a frozen network, which makes no images",
        )
    config = load.config_from_json(parts.config)
    decoder = parts.autoencoder
    space = load.build_latent_space(config, decoder.network) if decoder else None
    settings = sampling(config.sampling, interpolant(config.objective))
    function = stablehlo.image_function(parts.network, settings, space, steps=steps)
    weights = stablehlo.flat_weights(parts.params, decoder.params if decoder else None)
    (folder / stablehlo.FUNCTION_FILE).write_bytes(stablehlo.serialize(function, weights))
    _save(weights, folder / stablehlo.WEIGHTS_FILE)
    # `jax.export` reads functions with flatbuffers, a few files of Python (Apache-2.0), which JAX
    # does not install.
    package = os.path.dirname(flatbuffers.__file__)
    unneeded = shutil.ignore_patterns("__pycache__")
    shutil.copytree(package, folder / flatbuffers.__name__, ignore=unneeded)
    usage = stablehlo.usage(parts.network, space, steps=steps)
    usage = model_card.stablehlo_usage(usage, publication)
    _write_config_and_card(folder, parts, usage, publication)


def _save(
    tensors: dict[str, np.ndarray], path: epath.Path, metadata: dict[str, str] | None = None
) -> None:
    """Writes a safetensors file that all users may read; `save_file` lets only the owner."""
    save_file(tensors, path, metadata=metadata)
    os.chmod(path, 0o644)


def _write_config_and_card(
    folder: epath.Path, parts: Parts, usage: str, publication: Publication | None
) -> None:
    text = model_card.model_card(parts.config, parts.params, origin=parts.origin, usage=usage,
                                 publication=publication)
    config = without_local_paths(parts.config)
    stored_params.write_config_and_card(folder, config, text, origin=parts.origin)
