"""dmf export --checkpoint=DIR --output=DIR [--format=orbax] [--ema=main | --ema-std=0.1]
       dmf export --checkpoint=DIR --push=OWNER/REPO --license=apache-2.0 [--private]

Exports one set of parameters with the config and a model card as a directory: --format=orbax for
JAX, safetensors for PyTorch (--naming chooses the parameter naming scheme), or stablehlo: one
function (weights, labels, seed) -> uint8 images with --steps sampling steps, for cpu, cuda and tpu,
that runs without dmf. Fields of the checkpoint's config can be overridden, for example
--config.sampling.guidance.scale=1.5 or --config.latents.autoencoder=DIR.

--push uploads the export to the Hugging Face hub in place of a directory, as one commit. The model
card then has a header for the hub, with --license, the scores of the checkpoint's evaluation.json,
and --datasets. Everybody takes the export as --checkpoint=hf:OWNER/REPO, and as
dmf.load("hf:OWNER/REPO").
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

from absl import flags as absl_flags

from dmf.cli import config_flag, flags
from dmf.errors import InputError

# Flags that are for --push alone, and those that are for one format.
_OF_PUSH = ("license", "datasets", "private", "commit-message")
_OF_FORMAT = {"naming": "safetensors", "steps": "stablehlo"}


def define(values: absl_flags.FlagValues) -> None:
    """Defines the flags."""
    text = absl_flags.DEFINE_string
    text("checkpoint", None, "a run, one of its checkpoints/STEP, an export, or hf:OWNER/REPO",
         flag_values=values)
    text("output", None, "directory to make", flag_values=values)
    text("push", None, "OWNER/REPO on the Hugging Face hub to upload to, in place of --output; it "
         "is made if there is none", flag_values=values)
    text("license", "", "licence of the parameters as the hub names it: apache-2.0, mit, "
         "cc-by-nc-4.0, other, ...", flag_values=values)
    absl_flags.DEFINE_list("datasets", [], "the hub's datasets that the network was trained on, "
                           "OWNER/DATASET,...", flag_values=values)
    absl_flags.DEFINE_boolean("private", False, "make the repository private", flag_values=values)
    text("commit-message", "", "message of the commit on the hub", flag_values=values)
    text("format", "orbax", "orbax, safetensors or stablehlo", flag_values=values)
    text("ema", "main", "EMA parameters to use, also std=0.1; '' for the raw parameters",
         flag_values=values)
    absl_flags.DEFINE_float("ema-std", None, "width of EMA parameters to synthesise from the power "
                            "EMAs of a run, as --ema=std=0.1", flag_values=values)
    text("naming", "", "parameter naming scheme of a safetensors file; the network's own by "
         "default", flag_values=values)
    absl_flags.DEFINE_integer("steps", 4, "sampling steps of a stablehlo function",
                              flag_values=values)


def main(verb: str, arguments: Sequence[str]) -> None:
    """Exports the parameters of a run, an export in another format, or a frozen network."""
    values = absl_flags.FlagValues()
    define(values)
    overrides = config_flag.parse_with_overrides(verb, arguments, values, __doc__)
    publication = _checked(values)
    ema = f"std={values['ema-std'].value}" if values["ema-std"].present else values.ema

    from dmf.checkpoints import export, export_parts, load, push
    from dmf.checkpoints.params import read_config
    from dmf.runtime.progress import log

    log(f"loading {values.checkpoint}")
    config = None
    if overrides or not load.frozen_kind(read_config(values.checkpoint)):
        config = config_flag.overridden_stored(load.read_config(values.checkpoint), overrides)
        _check_options(values, config)
    checkpoint = load.newest_checkpoint(values.checkpoint)
    parts = export_parts.open_parts(checkpoint, ema, config)
    options = {"form": values.format, "naming": values.naming, "steps": values.steps}
    if publication is None:
        export.write(values.output, parts, **options)
        print(values.output)
    else:
        publication = _with_scores(publication, values.checkpoint, checkpoint, parts, ema)
        print(push.push(parts, publication, private=values.private,
                        message=values["commit-message"].value, **options))


def _checked(values: absl_flags.FlagValues) -> Any:
    """The `Publication` of an upload, which is possible as far as this machine knows; None without
    --push.

    Raises:
      InputError: a flag is missing, or does not go together with another one.
    """
    from dmf.runtime.files import check_new_directory

    flags.require(values, "checkpoint")
    if values["ema-std"].present and values["ema"].present:
        raise InputError("--ema-std", values["ema-std"].value, "give it or --ema, not both")
    _check_format(values)
    if not values.push:
        for flag in _OF_PUSH:
            if values[flag].present:
                raise InputError(f"--{flag}", values[flag].value, "it is for --push; leave it out")
        flags.require(values, "output")
        check_new_directory(values.output)
        return None
    if values.output:
        raise InputError("--output", values.output, "--push leaves no directory on this machine; "
                         "leave one of them out")
    from dmf.checkpoints.hub_card import Publication
    from dmf.runtime import hub_upload

    publication = Publication(
        repository=values.push, license=values.license, datasets=tuple(values.datasets)
    )
    hub_upload.check_ready(values.push)
    return publication


def _check_format(values: absl_flags.FlagValues) -> None:
    """Raises InputError for an unknown format, or for a flag of another format."""
    from dmf.checkpoints.export import FORMATS

    if values.format not in FORMATS:
        raise InputError("--format", values.format, f"choose one of {', '.join(FORMATS)}")
    for flag, form in _OF_FORMAT.items():
        if values[flag].present and values.format != form:
            raise InputError(f"--{flag}", values[flag].value, f"it is for --format={form}; leave "
                             "it out")


def _check_options(values: absl_flags.FlagValues, config: Any) -> None:
    """Raises InputError for a naming or a number of steps that the network or its sampler, which
    `config` states, cannot have."""
    from dmf.checkpoints.convert.namings import naming_of
    from dmf.models.build import network
    from dmf.objectives.build import interpolant
    from dmf.sampling.build import sampling

    if values.format == "safetensors":
        naming_of(network(config.model), values.naming)
    if values.format == "stablehlo":
        settings = sampling(config.sampling, interpolant(config.objective))
        settings.check_steps("--steps", (values.steps,))


def _with_scores(publication: Any, given: str, checkpoint: Any, parts: Any, ema: str) -> Any:
    """A publication with the scores that were measured on a checkpoint, which `given` names."""
    from dmf.checkpoints.params import split_step
    from dmf.experiments.card_scores import card_scores

    if "model" not in parts.config:
        return publication
    scores = card_scores(given, parts, ema, step=split_step(checkpoint)[1])
    return dataclasses.replace(publication, scores=scores)
