"""The command of a plan: runs what is not done, then writes the page."""

import pathlib
import shlex
import sys
from collections.abc import Callable, Sequence

from absl import flags

from benchmarks.machine import machine, start
from benchmarks.studies.study import Plan, Scale
from dmf.__main__ import set_compilation_cache


def start_study(module: str, workdir: str, output: str, plan: Callable[[], Plan]) -> None:
    """Parses the flags, runs the units that are not done, then writes the page.

    Args:
      module: name of the module that is run as a program.
      workdir: default directory of runs and evaluations.
      output: default page.
      plan: returns the plan; it is called when compiled programs are cached.
    """
    workdirs = flags.DEFINE_string("workdir", workdir, "directory of runs and evaluations")
    outputs = flags.DEFINE_string("output", output, "the page to write")
    seeds = flags.DEFINE_list("seeds", ["0", "1", "2"], "random seeds of training and evaluation")
    factor = flags.DEFINE_float("scale", 1.0, "factor of all training steps and samples",
                                lower_bound=0.0)  # fmt: skip

    def main(_: Sequence[str]) -> None:
        set_compilation_cache()
        from benchmarks.studies import page, units

        chosen = plan()
        folders = {int(s): pathlib.Path(workdirs.value) / f"seed_{s}" for s in seeds.value}
        for seed, folder in folders.items():
            units.run_units(chosen, folder, seed, Scale(factor=factor.value))
        minutes = sum(map(units.seconds, folders.values())) / 60
        command = shlex.join(["python", "-m", module, *sys.argv[1:]])
        page.write_page(chosen, pathlib.Path(outputs.value), list(folders.values()),
                        command=command, minutes=minutes, machine=machine())
        print(outputs.value)

    start(main)
