"""dmf export --checkpoint=DIR --output=DIR [--format=orbax] [--ema=main | --ema-std=0.1]

Exports one set of parameters with the config and a model card as a directory: --format=orbax for
JAX, safetensors for PyTorch (--naming chooses the parameter naming scheme), or stablehlo: one
function (weights, labels, seed) -> uint8 images with --steps sampling steps, for cpu, cuda and tpu,
that runs without dmf. Fields of the checkpoint's config can be overridden, for example
--config.sampling.guidance.scale=1.5 or --config.latents.autoencoder=DIR.
"""

from collections.abc import Sequence

from absl import flags as absl_flags

from dmf.cli import config_flag, flags
from dmf.errors import InputError


def main(verb: str, arguments: Sequence[str]) -> None:
    """Exports the parameters of a run, an export in another format, or a frozen network."""
    values = absl_flags.FlagValues()
    text = absl_flags.DEFINE_string
    text("checkpoint", None, "a run, one of its checkpoints/STEP, or an export", flag_values=values)
    text("output", None, "directory to make", flag_values=values)
    text("format", "orbax", "orbax, safetensors or stablehlo", flag_values=values)
    text("ema", "main", "EMA parameters to use, also std=0.1; '' for the raw parameters",
         flag_values=values)
    absl_flags.DEFINE_float("ema-std", None, "width of EMA parameters to synthesise from the power "
                            "EMAs of a run, as --ema=std=0.1", flag_values=values)
    text("naming", "", "parameter naming scheme of a safetensors file; the network's own by "
         "default", flag_values=values)
    absl_flags.DEFINE_integer("steps", 4, "sampling steps of a stablehlo function",
                              flag_values=values)
    overrides = config_flag.parse_with_overrides(verb, arguments, values, __doc__)
    flags.require(values, "checkpoint", "output")
    if values["ema-std"].present and values["ema"].present:
        raise InputError("--ema-std", values["ema-std"].value, "give it or --ema, not both")
    ema = f"std={values['ema-std'].value}" if values["ema-std"].present else values.ema

    from dmf.checkpoints import export, load
    from dmf.checkpoints.params import read_config
    from dmf.runtime.progress import log

    log(f"loading {values.checkpoint}")
    config = None
    if overrides or not load.frozen_kind(read_config(values.checkpoint)):
        config = config_flag.overridden_stored(load.read_config(values.checkpoint), overrides)
    parts = export.open_parts(values.checkpoint, ema, config)
    export.write(
        values.output, parts, form=values.format, naming=values.naming, steps=values.steps
    )
    print(values.output)
