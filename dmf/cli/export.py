"""dmf export --checkpoint=DIR --output=DIR [--ema=main]

Writes one set of parameters (Orbax), the config and a model card as a directory of their own.
"""

from collections.abc import Sequence

from absl import flags

from dmf import cli


def main(verb: str, arguments: Sequence[str]) -> None:
    """Exports an average of a run."""
    values = flags.FlagValues()
    flags.DEFINE_string("checkpoint", None, "a run or an export", flag_values=values)
    flags.DEFINE_string("output", None, "a directory to make", flag_values=values)
    flags.DEFINE_string("ema", "main", "which average of a run; '' for none", flag_values=values)
    cli.parse(verb, arguments, values, __doc__)
    cli.require(values, "checkpoint", "output")

    from dmf import build, card, checkpoint

    _, config, params = build.load_network(values.checkpoint, values.ema)
    text = card.model_card(config, params, step=checkpoint.latest_step(values.checkpoint))
    checkpoint.write_export(values.output, params, build.plain(config), text)
    print(values.output)
