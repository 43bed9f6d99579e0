"""dmf export --checkpoint=DIR --output=DIR [--format=orbax] [--ema=main]

Writes one set of parameters, the config and a model card as a directory of their own:
--format=orbax for JAX, safetensors for PyTorch (--spelling chooses whose names), or stablehlo: one
function (weights, labels, seed) -> uint8 images with --steps steps of the sampler, for cpu, cuda
and tpu, that runs without dmf. Settings of the checkpoint can be overridden, as
--config.sampling.guidance.scale=1.5 or --config.latents.autoencoder=DIR.
"""

from collections.abc import Sequence

from absl import flags

from dmf import cli


def main(verb: str, arguments: Sequence[str]) -> None:
    """Exports an average of a run, an export in another format, or a frozen network."""
    values = flags.FlagValues()
    flags.DEFINE_string("checkpoint", None, "a run or an export", flag_values=values)
    flags.DEFINE_string("output", None, "a directory to make", flag_values=values)
    flags.DEFINE_string("format", "orbax", "orbax, safetensors or stablehlo", flag_values=values)
    flags.DEFINE_string("ema", "main", "which average of a run; '' for none", flag_values=values)
    flags.DEFINE_string("spelling", "", "whose names, for safetensors", flag_values=values)
    flags.DEFINE_integer("steps", 4, "of the sampler, for stablehlo", flag_values=values)
    others = cli.parse_beside_overrides(verb, arguments, values, __doc__)
    cli.require(values, "checkpoint", "output")

    from dmf import exports, loading

    config = cli.overridden(loading.read_config(values.checkpoint), others) if others else None
    parts = exports.opened(values.checkpoint, values.ema, config)
    exports.write(
        values.output, parts, form=values.format, spelling=values.spelling, steps=values.steps
    )
    print(values.output)
