"""Configs of format 1, which earlier versions of dmf wrote into safetensors exports.

Fields of training were renamed since. The parts that an export needs to sample images are kept: the
network, the latent space, the dataset, the sampling settings and the interpolant.
"""

import copy
from collections.abc import Mapping
from typing import Any

from dmf import registry
from dmf.data.build import Data
from dmf.errors import InputError
from dmf.models.build import Latents
from dmf.sampling.build import Sampling

_MODEL_FIELDS = {"pattern": "block_times", "float32": "float32_parts"}
_AUTOENCODERS = {"autoencoder": "autoencoder_kl"}
_SECTIONS = {"data": Data, "latents": Latents, "sampling": Sampling}
_KEPT = ("model", *_SECTIONS, "objective")


def is_format_1(config: Mapping[str, Any]) -> bool:
    """Whether a config that a safetensors file states is of format 1, which states no format."""
    return bool(config) and "format" not in config


def upgrade(
    config: Mapping[str, Any], defaults: Mapping[str, Any] | None
) -> tuple[dict[str, Any], str]:
    """A config of format 1 as one of today.

    Args:
      config: the config that a safetensors file states.
      defaults: a config of today with every field, for a flow map.

    Returns:
      The config of today, and one line for the user that lists the sections that were kept.

    Raises:
      InputError: the config lacks a section.
    """
    if "encoder" in config:
        return _frozen_config(config["encoder"]), ""
    for section in _KEPT:
        if not isinstance(config.get(section), dict):
            raise InputError("", remedy=f"the checkpoint states a config without {section}")
    upgraded = copy.deepcopy(dict(defaults or {}))
    kept, notes = ["model", *_SECTIONS, "objective.interpolant"], []
    upgraded["model"] = {
        "name": "dit",
        **{_MODEL_FIELDS.get(field, field): value for field, value in config["model"].items()},
    }
    for section, cls in _SECTIONS.items():
        try:
            upgraded[section] = registry.complete(cls, config[section])
        except InputError as error:
            kept.remove(section)
            notes.append(str(error.at(section)))
    upgraded["objective"]["interpolant"] = config["objective"].get("interpolant", "linear")
    if config["latents"].get("autoencoder"):
        notes.append("the autoencoder is not in the file, give it with --autoencoder")
    summary = (f"its config is of an earlier dmf: {', '.join(kept)} are kept, all other sections "
               "have their defaults")
    return upgraded, "; ".join([summary, *notes])


def _frozen_config(encoder: Mapping[str, Any]) -> dict[str, Any]:
    """The config of a frozen network; autoencoders were a kind of encoder in format 1."""
    name = encoder.get("name")
    if name in _AUTOENCODERS:
        return {"autoencoder": {**encoder, "name": _AUTOENCODERS[name]}}
    return {"encoder": dict(encoder)}
