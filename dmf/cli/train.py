"""dmf train --config=FILE --workdir=DIR [--config.a.b=value ...]

Started on several hosts, each takes its part: on TPU pods and under SLURM or Open MPI the processes
find each other, elsewhere --coordinator, --processes and --process tell them. On SIGTERM the run
saves and ends with 75; the same command goes on.
"""

from collections.abc import Sequence

from absl import flags

from dmf import cli


def main(verb: str, arguments: Sequence[str]) -> None:
    """Trains, or goes on training, the run of a config in a directory."""
    values = flags.FlagValues()
    cli.config_flag(values, arguments)
    flags.DEFINE_string("workdir", None, "where the run is kept", flag_values=values)
    flags.DEFINE_string(
        "coordinator", "", "host:port of the first of several processes", flag_values=values
    )
    flags.DEFINE_integer("processes", 0, "how many there are", flag_values=values)
    flags.DEFINE_integer("process", -1, "which one this is, from 0", flag_values=values)
    cli.parse(verb, arguments, values, __doc__)
    cli.require(values, "config", "workdir")
    from dmf import hosts
    from dmf.training import train

    hosts.join(values.coordinator, values.processes, values.process)
    train(values.config, values.workdir)
