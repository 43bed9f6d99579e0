"""dmf train --config=FILE --workdir=DIR [--config.a.b=value ...]"""

from collections.abc import Sequence

from absl import flags

from dmf import cli


def main(verb: str, arguments: Sequence[str]) -> None:
    """Trains, or goes on training, the run of a config in a directory."""
    values = flags.FlagValues()
    cli.config_flag(values, arguments)
    flags.DEFINE_string("workdir", None, "where the run is kept", flag_values=values)
    cli.parse(verb, arguments, values, __doc__)
    cli.require(values, "config", "workdir")
    from dmf.training import train

    train(values.config, values.workdir)
