"""dmf train --config=FILE --workdir=DIR [--config.a.b=value ...]

Trains the run of a config in a directory, or resumes it there. To train on several hosts, run the
same command on each: on TPU pods and under SLURM or Open MPI the processes find each other,
elsewhere --coordinator, --processes and --process tell them. On SIGTERM, SIGHUP or Ctrl-C the run
saves and exits with 75; the same command resumes it. At the end it prints the commands that sample
and evaluate the run.
"""

import shlex
from collections.abc import Iterator, Sequence

from absl import flags as absl_flags
from ml_collections import ConfigDict

from dmf import registry
from dmf.cli import config_flag, flags


def main(verb: str, arguments: Sequence[str]) -> None:
    """Trains, or resumes, the run of a config in a directory."""
    values = absl_flags.FlagValues()
    text, number = absl_flags.DEFINE_string, absl_flags.DEFINE_integer
    text("workdir", None, "directory of the run", flag_values=values)
    text("coordinator", "", "host:port of the first of several processes", flag_values=values)
    number("processes", 0, "number of processes", flag_values=values)
    number("process", -1, "number of this process, from 0", flag_values=values)
    import dmf.default_config  # noqa: F401 - every room registers its components

    known = _registered()
    config = config_flag.parse_with_config(verb, arguments, values, __doc__)
    own = [values.config.partition(":")[0]] if _registered() - known else []
    flags.require(values, "workdir")
    from dmf.runtime import processes
    from dmf.training.loop import train

    processes.initialize(values.coordinator, values.processes, values.process)
    train(config, values.workdir)
    for command in next_commands(config, values.workdir, [*values.plugins, *own]):
        processes.log(f"next: {command}")


def _registered() -> set[tuple[str, str]]:
    """(kind, name) of all components."""
    return {(kind, name) for kind in registry.kinds() for name in registry.components(kind)}


def next_commands(config: ConfigDict, workdir: str, plugins: Sequence[str]) -> Iterator[str]:
    """The commands that sample and evaluate a run, as they can be pasted into a shell.

    Args:
      config: the config of the run.
      workdir: its workdir.
      plugins: the files that register its components.
    """
    from dmf.data.pixels import IMAGE_CHANNELS

    common = [f"--checkpoint={workdir}"]
    common += [f"--plugins={','.join(plugins)}"] if plugins else []
    ema = [] if config.sampling.ema == "main" else [f"--ema={config.sampling.ema}"]
    steps = ",".join(map(str, config.sampling.steps))
    is_image = config.model.get("channels", 3) in IMAGE_CHANNELS or config.latents.autoencoder
    if is_image:
        output = f"--output={workdir.rstrip('/')}/samples.png"
        yield shlex.join(["dmf", "sample", *common, *ema, f"--steps={steps}", output])
    yield shlex.join(["dmf", "evaluate", *common])
