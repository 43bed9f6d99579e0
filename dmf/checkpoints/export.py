"""Exports of parameters, and conversion of the checkpoints of other projects to exports.

An export is a directory that appears when it is complete: `config.json`, `README.md` (the model
card), and by format `params/` (Orbax), `model.safetensors`, or a StableHLO function with its
weights. No export holds a path of the machine that wrote it.
"""

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from typing import Any

import flatbuffers
import numpy as np
from etils import epath
from safetensors.numpy import save_file

from dmf import registry
from dmf.checkpoints import export_parts, load, model_card
from dmf.checkpoints import params as stored_params
from dmf.checkpoints.convert import namings, open_checkpoint
from dmf.checkpoints.export_parts import Parts
from dmf.checkpoints.hub_card import Publication
from dmf.checkpoints.stored_config import without_local_paths
from dmf.errors import InputError
from dmf.models import FROZEN_KINDS
from dmf.models.encoders.autoencoder import Autoencoder
from dmf.objectives.build import interpolant
from dmf.runtime import files, progress
from dmf.runtime.ownership import owned_output
from dmf.sampling import stablehlo
from dmf.sampling.build import sampling
from dmf.types import Params

FORMATS = ("orbax", "safetensors", "stablehlo")


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
        network = decoder and decoder.network
        parts = export_parts.read(source, fields, key, naming, config_class, network, others)
        if decoder:
            _check_channels(autoencoder, decoder.network, parts.network)
            parts = parts._replace(autoencoder=decoder)
        _write_orbax(folder, parts)


def _read_autoencoder(source: str) -> Parts:
    parts = export_parts.read(source, {}, "", "")
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
