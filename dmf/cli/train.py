"""dmf train --config=FILE --workdir=DIR [--config.a.b=value ...]

Trains the run of a config in a directory, or resumes it there. To train on several hosts, run the
same command on each: on TPU pods and under SLURM or Open MPI the processes find each other,
elsewhere --coordinator, --processes and --process tell them. On SIGTERM, SIGHUP or Ctrl-C the run
saves and exits with 75; the same command resumes it. At the end it prints the commands that sample
and evaluate the run, and that turn a flow model into a flow map.
"""

import contextlib
import os
import pathlib
import shlex
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from absl import flags as absl_flags
from ml_collections import ConfigDict

from dmf import registry
from dmf.cli import config_flag, flags
from dmf.errors import InputError, RunError

if TYPE_CHECKING:
    import dmf.training.train_state


def train(
    config: ConfigDict | str | os.PathLike,
    workdir: str | os.PathLike,
    overrides: Mapping[str, Any] | None = None,
    *,
    coordinator: str = "",
    processes: int = 0,
    process: int = -1,
) -> "dmf.training.train_state.TrainState":
    """Trains the run of a config in a directory, or resumes it there, as `dmf train` does.

    >>> fields = {"model.depth": 1, "model.width": 16, "model.heads": 1, "run.steps": 2}
    >>> state = dmf.train("dmf:digits_sit", "runs/tiny", fields)
    >>> int(state.step)
    2

    Args:
      config: a config file or a config, see `dmf.config`.
      workdir: directory of the run, local or on a file system that epath knows.
      overrides: values by dotted field, see `dmf.config`.
      coordinator: host:port of the first of several processes, which TPU pods, SLURM and Open MPI
        tell by themselves; empty else.
      processes: number of processes; 0 if they find each other, or if there is one.
      process: number of this process, from 0.

    Returns:
      The train state after the last step.

    Raises:
      InputError: a field that cannot be used, or a workdir that holds another run or in which
        another command is training.
      RunError: the loss is not finite, the disk is full, or another process was lost.
      Stopped: the run received SIGTERM, SIGHUP or Ctrl-C; everything is saved.
    """
    from dmf.checkpoints.located import look_again

    look_again()
    return _train(config_flag.resolved(config, config_flag.as_flags(overrides)), workdir,
                  coordinator, processes, process)


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
    _train(config, values.workdir, values.coordinator, values.processes, values.process)
    from dmf.runtime import processes

    commands = next_commands(config, values.workdir, [*values.plugins, *own], values.config)
    for command in commands:
        processes.log(f"next: {command}")


def _train(
    config: ConfigDict, workdir: str | os.PathLike, coordinator: str, count: int, process: int
) -> Any:
    """Trains the run of a resolved config, connected with the other processes of the run."""
    from dmf.runtime import processes
    from dmf.training.loop import train as train_run

    processes.initialize(coordinator, count, process)
    return train_run(config, workdir)


def _registered() -> set[tuple[str, str]]:
    """(kind, name) of all components."""
    return {(kind, name) for kind in registry.kinds() for name in registry.components(kind)}


def next_commands(
    config: ConfigDict, workdir: str, plugins: Sequence[str], file: str = ""
) -> Iterator[str]:
    """The commands that sample a run, turn it into a flow map, and evaluate it, as they can be
    pasted into a shell.

    Args:
      config: the config of the run.
      workdir: its workdir.
      plugins: the files that register its components.
      file: its config file, as --config gives it.
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
    if flow_map_file := _flow_map_file(file):
        directory = f"{workdir.rstrip('/').removesuffix('_sit')}_dmf"
        yield shlex.join(["dmf", "train", f"--config={flow_map_file}", f"--workdir={directory}",
                          f"--config.init.checkpoint={workdir}", *common[1:]])
    if not _has_few_images(config):
        yield shlex.join(["dmf", "evaluate", *common])
    elif config.model.get("num_classes"):
        yield shlex.join(["dmf", "evaluate", *common, "--metrics=label_agreement"])


def _flow_map_file(file: str) -> str:
    """The config file that turns the flow models of another one into flow maps: NAME_dmf beside
    NAME_sit; "" if there is none."""
    stem = file.removesuffix(".py")
    other = f"{stem.removesuffix('_sit')}_dmf{file[len(stem):]}"
    with contextlib.suppress(InputError):
        if stem.endswith("_sit") and pathlib.Path(flags.shipped_file("--config", other)).exists():
            return other
    return ""


def _has_few_images(config: ConfigDict) -> bool:
    """Whether a run is evaluated by the distance of pixels, for which its dataset has too few
    images."""
    from dmf.data.build import data, dataset_sizes

    settings = config.evaluation
    if settings.protocol != "pixels" or settings.metrics or settings.reference:
        return False
    with contextlib.suppress(InputError, RunError):  # The dataset may be gone by now.
        sizes = dataset_sizes(data(config.data))
        return sizes.samples <= sizes.input_size**2 * sizes.channels
    return False
