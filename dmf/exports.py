"""Parameters come in from other projects, and go out to everyone.

Each is one directory that appears when it is whole: `config.json`, `README.md` (the model card),
and by format `params/` (Orbax), `model.safetensors`, or a function of StableHLO with its weights.
"""

import json
import os
import shutil
from collections.abc import Mapping
from typing import Any, NamedTuple

import flatbuffers
import numpy as np
from etils import epath
from ml_collections import ConfigDict
from safetensors.numpy import save_file

from dmf import card, checkpoint, files, loading, logs, stablehlo
from dmf.convert import published, sources
from dmf.encoders.autoencoder import Autoencoder
from dmf.typing import InputError, Params

FORMATS = ("orbax", "safetensors", "stablehlo")


class Parts(NamedTuple):
    """What an export is made of: a network with its config, and the autoencoder of its latents."""

    network: Any
    config: dict[str, Any]
    params: Params
    origin: str
    autoencoder: "Parts | None" = None


def convert(
    source: str,
    output: epath.PathLike,
    *,
    given: Mapping[str, Any],
    key: str = "",
    spelling: str = "",
    autoencoder: str = "",
) -> None:
    """Writes a checkpoint of another project as an export of ours.

    Args:
      source: a file, directory or `hf:OWNER/REPO/FILE`, as `sources.open_source` takes it.
      output: a directory to make.
      given: fields of the network, where its tensors do not tell them.
      key: which part of a training file; an average by default.
      spelling: whose names they are; found out by default.
      autoencoder: the source of the autoencoder whose latents the network makes.

    Raises:
      InputError: the checkpoint cannot be read or is of no known network; nothing is written.
      RunError: the disk is full or cannot be written.
    """
    with files.new_directory(output) as folder:
        parts = _read(source, given, key, spelling)
        if autoencoder:
            decoder = _read(autoencoder, {}, "", "")
            if not isinstance(decoder.network, Autoencoder):
                raise InputError(f"autoencoder={autoencoder}: it holds another network, "
                                 f"{type(decoder.network).__name__}")
            parts = parts._replace(autoencoder=decoder)
        _write_orbax(folder, parts)


def _read(source: str, given: Mapping[str, Any], key: str, spelling: str) -> Parts:
    """A checkpoint of ours or of another project."""
    if checkpoint.is_ours(source):
        return _changed(source, given, key)
    found = sources.open_source(source, key)
    stated = found.config
    kind = "model" if "model" in stated else "encoder"
    known = {name: tuple(value) if isinstance(value, list) else value
             for name, value in stated.get(kind, {}).items() if name != "name"}
    try:
        made = published.convert(found.tensors, {**known, **given}, spelling=spelling)
        config = loading.config_of(made.network, stated)
    except InputError as error:
        raise InputError(f"{source}: {error}") from None
    told = [f"{source}: read as {made.spelling.name}", made.spelling.notes, str(made.network)]
    if made.dropped:
        told.append(f"dropped {', '.join(made.dropped)}")
    logs.say("; ".join(filter(None, told)))
    origin = f"converted from {source} ({made.spelling.name})"
    return Parts(made.network, config, made.params, origin)


def _changed(directory: str, given: Mapping[str, Any], key: str) -> Parts:
    """A run or an export of ours, seen as another network of the same parameters."""
    if not given:
        return opened(directory, key or "main")
    config = loading.read_config(directory)
    config.model.update(given)
    if "split_depth" in given:
        config.model.conditioning = "decoupled"
    return opened(directory, key or "main", config)


def opened(
    directory: epath.PathLike, ema: str, config: ConfigDict | None = None
) -> Parts:
    """A run or an export, to be exported.

    Args:
      directory: a workdir, whose newest checkpoint is read, or an export.
      ema: which average of a run.
      config: in place of the stored one.

    Raises:
      InputError: nothing is there, or no such average.
    """
    stored = checkpoint.read_config(directory)
    if "encoder" in stored:
        network, params = loading.load_encoder(directory, stored["encoder"]["name"])
        return Parts(network, stored, params, checkpoint.read_origin(directory))
    network, config, params = loading.load_network(directory, ema, config=config)
    step = checkpoint.latest_step(directory)
    plain = loading.plain(config)
    origin = checkpoint.read_origin(directory) or card.trained(plain, step)
    decoder = opened(config.latents.autoencoder, "") if config.latents.autoencoder else None
    return Parts(network, plain, params, origin, decoder)


def write(
    output: epath.PathLike, parts: Parts, *, form: str = "orbax", spelling: str = "", steps: int = 4
) -> None:
    """Writes an export.

    Args:
      output: a directory to make.
      parts: what goes in.
      form: one of `FORMATS`.
      spelling: whose names a safetensors file has; the first that the network has by default.
      steps: of the sampler, that a function of StableHLO takes.

    Raises:
      InputError: no such format or spelling, or the directory is not empty.
      RunError: the disk is full or cannot be written.
    """
    if form not in FORMATS:
        raise InputError(f"format={form}: choose one of {', '.join(FORMATS)}")
    with files.new_directory(output) as folder:
        if form == "orbax":
            _write_orbax(folder, parts)
        elif form == "safetensors":
            _write_safetensors(folder, parts, spelling)
        else:
            _write_stablehlo(folder, parts, steps)


def _write_orbax(folder: epath.Path, parts: Parts) -> None:
    checkpoint.write_params(folder, parts.params)
    if parts.autoencoder is not None:
        parts.config["latents"]["autoencoder"] = ""
        inside = folder / loading.AUTOENCODER
        inside.mkdir()
        _write_orbax(inside, parts.autoencoder)
    _describe(folder, parts, card.ORBAX + card.FLOW_MAP * ("model" in parts.config))


def _write_safetensors(folder: epath.Path, parts: Parts, spelling: str) -> None:
    chosen = published.spelling_of(parts.network, spelling)
    tensors = published.spelled(parts.network, parts.params, chosen)
    logs.say(f"written as {chosen.name}" + (f"; {chosen.notes}" if chosen.notes else ""))
    stated = {"format": "pt", sources.CONFIG_KEY: json.dumps(parts.config)}
    _save(tensors, folder / sources.WEIGHTS_FILE, stated)
    _describe(folder, parts, card.SAFETENSORS.format(spelling=chosen.name))


def _write_stablehlo(folder: epath.Path, parts: Parts, steps: int) -> None:
    if "model" not in parts.config:
        raise InputError("format=stablehlo: the checkpoint holds a frozen network, which makes no "
                         "images")
    config = loading.as_config(parts.config)
    decoder = parts.autoencoder
    space = loading.latent_space_of(config, decoder.network) if decoder else None
    function = stablehlo.image_function(parts.network, config, space, steps=steps)
    weights = stablehlo.flat_weights(parts.params, decoder.params if decoder else None)
    (folder / stablehlo.FUNCTION_FILE).write_bytes(stablehlo.serialized(function, weights))
    _save(weights, folder / stablehlo.WEIGHTS_FILE)
    # What jax.export reads with, and JAX does not install: a few files of Python (Apache-2.0).
    package = os.path.dirname(flatbuffers.__file__)
    unneeded = shutil.ignore_patterns("__pycache__")
    shutil.copytree(package, folder / flatbuffers.__name__, ignore=unneeded)
    _describe(folder, parts, stablehlo.usage(parts.network, space, steps=steps))


def _save(
    tensors: dict[str, np.ndarray], path: epath.Path, metadata: dict[str, str] | None = None
) -> None:
    """Writes a safetensors file that others may read, which `save_file` does not let them."""
    save_file(tensors, path, metadata=metadata)
    os.chmod(path, 0o644)


def _describe(folder: epath.Path, parts: Parts, usage: str) -> None:
    text = card.model_card(parts.config, parts.params, origin=parts.origin, usage=usage)
    checkpoint.describe(folder, parts.config, text, origin=parts.origin)
