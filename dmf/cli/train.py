"""dmf train --config=FILE --workdir=DIR [--config.a.b=value ...]

Trains the run of a config in a directory, or resumes it there. To train on several hosts, run the
same command on each: on TPU pods and under SLURM or Open MPI the processes find each other,
elsewhere --coordinator, --processes and --process tell them. On SIGTERM, SIGHUP or Ctrl-C the run
saves and exits with 75; the same command resumes it.
"""

from collections.abc import Sequence

from absl import flags as absl_flags

from dmf.cli import config_flag, flags


def main(verb: str, arguments: Sequence[str]) -> None:
    """Trains, or resumes, the run of a config in a directory."""
    values = absl_flags.FlagValues()
    text, number = absl_flags.DEFINE_string, absl_flags.DEFINE_integer
    text("workdir", None, "directory of the run", flag_values=values)
    text("coordinator", "", "host:port of the first of several processes", flag_values=values)
    number("processes", 0, "number of processes", flag_values=values)
    number("process", -1, "number of this process, from 0", flag_values=values)
    config = config_flag.parse_with_config(verb, arguments, values, __doc__)
    flags.require(values, "workdir")
    from dmf.runtime import processes
    from dmf.training.loop import train

    processes.initialize(values.coordinator, values.processes, values.process)
    train(config, values.workdir)
