"""dmf sweep --config=FILE --sweep=FILE --workdir=DIR [--launcher=local] [--parallel=N]
          [--plugins=FILE,...] [--config.a.b=value ...]

Trains a run for each dictionary of overrides that get_sweep() of the sweep file returns, in a
directory below the workdir that is named after them; overrides given here hold for all runs. All
configs are checked before the first run starts. The same command resumes the sweep: complete runs
are left alone, others resume. On SIGINT or SIGTERM the runs save, and the command exits with 130 or
75; with 1 if some runs failed.

--launcher=local trains on this machine, --parallel runs at a time, which share the GPUs or cores.
--launcher=slurm submits an array through submitit (pip install submitit), at most
--parallel runs at a time if it is given;
--slurm=timeout_min=600,gpus_per_node=8,slurm_partition=NAME. --launcher=print prints the commands.
"""

import pathlib
import shlex
import sys
from collections.abc import Sequence

from absl import flags as absl_flags
from ml_collections import ConfigDict

from dmf.cli import config_flag, flags
from dmf.errors import InputError
from dmf.experiments.sweeps import Variant
from dmf.runtime.paths import user_path

LAUNCHERS = ("local", "slurm", "print")


def main(verb: str, arguments: Sequence[str]) -> None:
    """Trains the runs of a sweep that are not complete."""
    values = absl_flags.FlagValues()
    for name, default, meaning in (
        ("config", None, "a Python file with get_config()"),
        ("sweep", None, "a Python file with get_sweep()"),
        ("workdir", None, "directory of the sweep; each run has a directory below it"),
        ("launcher", "local", f"one of {', '.join(LAUNCHERS)}"),
        ("slurm", "", "submitit's parameters, as timeout_min=600,slurm_partition=gpu"),
    ):
        absl_flags.DEFINE_string(name, default, meaning, flag_values=values)
    absl_flags.DEFINE_integer("parallel", 0, "runs at a time; 1 on this machine by default",
                              flag_values=values)  # fmt: skip
    common = config_flag.parse_with_overrides(verb, arguments, values, __doc__)
    _check_flags(values)
    flags.use_cpu_only()
    _sweep(values, common)


def _check_flags(values: absl_flags.FlagValues) -> None:
    """Raises InputError for flags that are missing, or do not go together."""
    flags.require(values, "config", "sweep", "workdir")
    if values.launcher not in LAUNCHERS:
        raise InputError("--launcher", values.launcher, f"choose one of {', '.join(LAUNCHERS)}")
    if values.slurm and values.launcher != "slurm":
        raise InputError("--slurm", values.slurm, "it goes with --launcher=slurm")
    if values.parallel < 0 or (values.launcher == "print" and values.parallel):
        raise InputError("--parallel", values.parallel, "give a number of runs at a time, 1 or "
                         "more, with --launcher=local or --launcher=slurm")
    if "://" in values.workdir and values.launcher != "print":
        raise InputError("--workdir", values.workdir, "the logs of a sweep need a file system")
    _check_launcher(values)


def _check_launcher(values: absl_flags.FlagValues) -> None:
    """Raises InputError for flags that the launcher cannot use here."""
    from dmf.experiments import local_launcher, slurm_launcher

    if values.launcher == "local":
        local_launcher.device_shares(values.parallel or 1, local_launcher.visible_gpus())
    elif values.launcher == "slurm":
        slurm_launcher.check_installed()
        slurm_launcher.parse_parameters(values.slurm)


def _sweep(values: absl_flags.FlagValues, common: Sequence[str]) -> None:
    from dmf.experiments import sweeps

    # The config first: where both import from a folder of one name, that of the config is taken.
    base = config_flag.load_config(values.config)
    file = pathlib.Path(user_path(flags.shipped_file("--sweep", values.sweep)))
    with flags.errors_of_file("--sweep", file):
        for place in (file, file.resolve().parent):  # configs/sweeps/FILE imports from configs.
            flags.allow_imports_beside(place)
    variants = sweeps.variants(sweeps.read_sweep(str(file)))
    _check_apart(variants, common)
    configs = {v.name: config_flag.configured(base, [*common, *v.flags])[0]
               for v in variants}
    sweeps.check_distinct(
        [(v, configs[v.name].to_json_best_effort(sort_keys=True)) for v in variants]
    )
    _check_configs(variants, configs, launcher=values.launcher)
    shared = [f"--config={values.config}", *common]
    workdir = values.workdir.rstrip("/")
    plugins = [f"--plugins={','.join(values.plugins)}"] if values.plugins else []
    commands = {v.name: ["train", *shared, *plugins, *v.flags, f"--workdir={workdir}/{v.name}"]
                for v in variants}
    if values.launcher == "print":
        for arguments in commands.values():
            print(shlex.join(["dmf", *arguments]))
    else:
        _launch(values, commands, configs)


def _check_apart(variants: Sequence[Variant], common: Sequence[str]) -> None:
    """Raises InputError where a field is set both here and by the sweep."""
    for override in common:
        field = config_flag.overridden_field(override)
        if any(field in variant.overrides for variant in variants):
            raise InputError(override, remedy=f"the sweep sets {field} too; leave out one of them")


def _check_configs(
    variants: Sequence[Variant], configs: dict[str, ConfigDict], *, launcher: str
) -> None:
    """Builds what each config asks for.

    Raises:
      InputError: a field that cannot be used; the message names the run and the field.
    """
    for variant in variants:
        try:
            _check_config(configs[variant.name], launcher=launcher)
        except InputError as error:
            raise error.within(variant.name) from None


def _check_config(config: ConfigDict, *, launcher: str) -> None:
    """Builds the recipe of a config and, where it will run, opens its data and what it starts from.

    The mesh is checked on the devices that the runs will have, where those are CPUs.
    """
    import jax

    from dmf.checkpoints import load
    from dmf.data.build import data, dataset
    from dmf.experiments import local_launcher
    from dmf.models.build import network
    from dmf.registry import at
    from dmf.runtime.sharding import make_mesh
    from dmf.training import build

    elsewhere = launcher == "print"
    here = launcher == "local" and local_launcher.uses_cpu()
    mesh = build.mesh(config.mesh) if here else make_mesh(devices=jax.devices()[:1])
    teacher_checkpoint, teacher = build.teacher_checkpoint(config).checkpoint, None
    if teacher_checkpoint:
        with at("teacher"):
            its_config = config if elsewhere else load.read_config(teacher_checkpoint)
        teacher = network(its_config.model)
    recipe = build.recipe(config, mesh, teacher)
    if elsewhere:
        return
    dataset(data(config.data), recipe.network)
    if config.init.checkpoint:
        with at("init"):
            load.read_config(config.init.checkpoint)


def _launch(
    values: absl_flags.FlagValues, commands: dict[str, list[str]], configs: dict[str, ConfigDict]
) -> None:
    """Starts the runs that are not complete, unless another sweep is training them."""
    from dmf.experiments import local_launcher, runs
    from dmf.runtime.progress import log
    from dmf.training.loop import check_workdir

    workdir = pathlib.Path(values.workdir)
    for name, config in configs.items():
        check_workdir(workdir / name, config)
    with local_launcher.sweep_lock(workdir) as lock:
        jobs = [
            local_launcher.Job(name=name, directory=workdir / name,
                               command=(sys.executable, "-m", "dmf", *arguments))
            for name, arguments in commands.items()
            if not runs.is_complete(workdir / name, configs[name].run.steps,
                                    evaluates=configs[name].evaluation.every > 0)
        ]  # fmt: skip
        log(f"{len(commands)} runs in {workdir}, {len(commands) - len(jobs)} of them complete")
        if values.launcher == "slurm":
            _submit(values, jobs)
            return
        gpus = local_launcher.visible_gpus()
        shares = local_launcher.device_shares(values.parallel or 1, gpus)
        pool = local_launcher.JobPool(jobs, shares, lock)
        pool.run()
    local_launcher.report_failures(pool.failures, len(commands))


def _submit(values: absl_flags.FlagValues, jobs: Sequence) -> None:
    from dmf.experiments import slurm_launcher
    from dmf.runtime.progress import log

    submitted = slurm_launcher.submit(
        jobs,
        pathlib.Path(values.workdir) / slurm_launcher.FOLDER,
        slurm_launcher.parse_parameters(values.slurm) | slurm_launcher.parallelism(values.parallel),
    )
    for name, job in submitted.items():
        log(f"{name}: {job}")
