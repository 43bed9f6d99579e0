"""The papers' ablations on the digits: trains, evaluates, and writes a page.

    python -m benchmarks.studies --workdir=runs/studies --output=docs/studies.md

There are fourteen fine-tunings, a flow model, a MeanFlow and two improved MeanFlows for each of
three seeds. All of it takes about an hour on 2 idle cores; the page says how long. The same command
resumes after an interruption at any point. `--scale=0.01` is a quick trial, for a workdir of its
own; most of its time is compilation.
"""

import pathlib
import shlex
import sys
from collections.abc import Sequence

from absl import flags

from benchmarks.machine import machine, start
from dmf.__main__ import set_compilation_cache

_WORKDIR = flags.DEFINE_string("workdir", "runs/studies", "directory of runs and evaluations")
_OUTPUT = flags.DEFINE_string("output", "docs/studies.md", "the page to write")
_SEEDS = flags.DEFINE_list("seeds", ["0", "1", "2"], "random seeds of training and evaluation")
_SCALE = flags.DEFINE_float("scale", 1.0, "factor of all training steps and samples",
                            lower_bound=0.0)  # fmt: skip


def main(_: Sequence[str]) -> None:
    """Runs the units that are not done, then writes the page."""
    set_compilation_cache()
    from benchmarks.studies import page, units
    from benchmarks.studies.plan import Scale

    workdir, scale = pathlib.Path(_WORKDIR.value), Scale(factor=_SCALE.value)
    folders = {int(seed): workdir / f"seed_{seed}" for seed in _SEEDS.value}
    for seed, folder in folders.items():
        units.run_units(folder, seed, scale)
    minutes = sum(map(units.seconds, folders.values())) / 60
    command = shlex.join(["python", "-m", "benchmarks.studies", *sys.argv[1:]])
    page.write_page(pathlib.Path(_OUTPUT.value), list(folders.values()), command=command,
                    minutes=minutes, machine=machine())
    print(_OUTPUT.value)


if __name__ == "__main__":
    start(main)
