"""dmf sweep --config=FILE --sweep=FILE --workdir=DIR [--on=local] [--parallel=N]
          [--plugins=FILE,...] [--config.a.b=value ...]

Trains a run for each dictionary of overrides that get_sweep() of the sweep's file gives, in a
directory below the workdir that is called after them; overrides given here hold for all. All
configs are checked before the first run starts. The same command goes on: complete runs are left
alone, others are taken up again. On SIGINT or SIGTERM the runs save, and this ends with 130 or 75;
with 1 if some failed.

--on=local runs them on this machine, --parallel of them at a time, which share the GPUs or cores.
--on=slurm submits them as an array through submitit (pip install 'dmf-jax[sweep]'), at most
--parallel at a time if it is given; --slurm=timeout_min=600,gpus_per_node=8,slurm_partition=NAME.
--on=print prints the commands.
"""

import pathlib
import shlex
import sys
from collections.abc import Sequence

from absl import flags
from ml_collections import ConfigDict

from dmf import cli
from dmf.sweeping import Variant
from dmf.typing import InputError

PLACES = ("local", "slurm", "print")


def main(verb: str, arguments: Sequence[str]) -> None:
    """Runs the sweep, or what is left of it."""
    values = flags.FlagValues()
    for name, default, what in (
        ("config", None, "a file with get_config()"),
        ("sweep", None, "a file with get_sweep()"),
        ("workdir", None, "where the runs are kept, each in a directory of its own"),
        ("on", "local", f"one of {', '.join(PLACES)}"),
        ("slurm", "", "submitit's parameters, as timeout_min=600,slurm_partition=gpu"),
    ):
        flags.DEFINE_string(name, default, what, flag_values=values)
    flags.DEFINE_integer("parallel", 0, "runs at a time; 1 on this machine by default",
                         flag_values=values)  # fmt: skip
    common = cli.parse_beside_overrides(verb, arguments, values, __doc__)
    _check_flags(values)
    cli.leave_accelerators()
    _sweep(values, common)


def _check_flags(values: flags.FlagValues) -> None:
    """Raises InputError for flags that are missing, or do not go together."""
    cli.require(values, "config", "sweep", "workdir")
    if values.on not in PLACES:
        raise InputError(f"--on={values.on}: choose one of {', '.join(PLACES)}")
    if values.slurm and values.on != "slurm":
        raise InputError(f"--slurm={values.slurm}: it goes with --on=slurm")
    if values.parallel < 0 or (values.on == "print" and values.parallel):
        raise InputError(f"--parallel={values.parallel}: give a number of runs at a time, 1 or "
                         "more, with --on=local or --on=slurm")
    if "://" in values.workdir and values.on != "print":
        raise InputError(f"--workdir={values.workdir}: the logs of a sweep need a file system")


def _sweep(values: flags.FlagValues, common: Sequence[str]) -> None:
    from dmf import sweeping

    sys.path.append(str(pathlib.Path.cwd()))  # A sweep file imports its neighbours from here.
    variants = sweeping.variants(sweeping.read(values.sweep))
    _check_apart(variants, common)
    shared = [f"--config={values.config}", *common]
    configs = {v.name: _config([*shared, *v.flags]) for v in variants}
    sweeping.same([(v, configs[v.name].to_json_best_effort(sort_keys=True)) for v in variants])
    _check(variants, configs, on=values.on)
    workdir = values.workdir.rstrip("/")
    plugins = [f"--plugins={','.join(values.plugins)}"] if values.plugins else []
    trains = {v.name: ["train", *shared, *plugins, *v.flags, f"--workdir={workdir}/{v.name}"]
              for v in variants}
    if values.on == "print":
        for arguments in trains.values():
            print(shlex.join(["dmf", *arguments]))
    else:
        _launch(values, trains, configs)


def _check_apart(variants: Sequence[Variant], common: Sequence[str]) -> None:
    """Raises InputError where a field is set both here and by the sweep."""
    for override in common:
        field = override.removeprefix("--config.").partition("=")[0]
        if any(field in variant.overrides for variant in variants):
            raise InputError(f"{override}: the sweep sets {field} too; leave out one of them")


def _config(arguments: Sequence[str]) -> ConfigDict:
    """The config that `dmf train` makes of these arguments."""
    values = flags.FlagValues()
    cli.config_flag(values, arguments)
    return cli.parse("train", arguments, values, "").config


def _check(variants: Sequence[Variant], configs: dict[str, ConfigDict], *, on: str) -> None:
    """Builds what each config asks for.

    Raises:
      InputError: one cannot be; the message names the run and the field.
    """
    for variant in variants:
        try:
            _build(configs[variant.name], on=on)
        except InputError as error:
            raise InputError(f"{variant.name}: {error}") from None


def _build(config: ConfigDict, *, on: str) -> None:
    """Builds the recipe of a config and, where it will run, opens its data and what it starts from.

    The mesh is checked on the devices that runs will have, where those are this process's: CPUs.
    """
    import jax

    from dmf import build, launching, loading
    from dmf.sharding import make_mesh

    elsewhere, init, teacher = on == "print", config.init.checkpoint, config.teacher.checkpoint
    here = on == "local" and launching.on_cpu()
    mesh = build.mesh(config) if here else make_mesh(devices=jax.devices()[:1])
    distilled = None
    if teacher and build.distils(config):
        with build.about("teacher"):
            distilled = build.network(config if elsewhere else loading.read_config(teacher))
    build.recipe(config, mesh, distilled)
    if not elsewhere:
        build.source(config)
    if init and not elsewhere:
        with build.about("init"):
            loading.read_config(init)


def _launch(
    values: flags.FlagValues, trains: dict[str, list[str]], configs: dict[str, ConfigDict]
) -> None:
    """Starts the runs that are not complete, unless another sweep is at it."""
    from dmf import launching, logs, runs
    from dmf.training import check_claim

    workdir = pathlib.Path(values.workdir)
    for name, config in configs.items():
        check_claim(workdir / name, config)
    found = launching.gpus() if values.on == "local" else []
    shares = launching.shares(values.parallel or 1, found)
    with launching.claimed(workdir) as lock:
        left = [
            launching.Job(name=name, directory=workdir / name,
                          command=(sys.executable, "-m", "dmf", *arguments))
            for name, arguments in trains.items()
            if not runs.complete(workdir / name, configs[name].run.steps,
                                 evaluates=configs[name].evaluation.every > 0)
        ]  # fmt: skip
        logs.say(f"{len(trains)} runs in {workdir}, {len(trains) - len(left)} of them complete")
        if values.on == "slurm":
            _submit(values, left)
            return
        pool = launching.Pool(left, shares, lock)
        pool.run()
    launching.told_failures(pool.failures, len(trains))


def _submit(values: flags.FlagValues, jobs: Sequence) -> None:
    from dmf import logs, slurm

    submitted = slurm.submit(
        jobs,
        pathlib.Path(values.workdir) / slurm.FOLDER,
        {**slurm.parameters(values.slurm), **slurm.at_most(values.parallel)},
    )
    for name, job in submitted.items():
        logs.say(f"{name}: {job}")
