"""The papers' ablations on the digits: trains, measures, and writes a page.

    python -m benchmarks.studies --workdir=runs/studies --output=docs/studies.md

Fourteen fine-tunings, a flow model and a MeanFlow for each of three seeds; lengths are chosen for
an hour on 2 quiet cores, and the page says what it took. The same command goes on where it was
interrupted, at any point. `--scale=0.01` tries it, in a workdir of its own, where compiling takes
most of the time.
"""

import pathlib
import shlex
import sys
from collections.abc import Sequence

from absl import app, flags

from dmf.__main__ import keep_compiled

_WORKDIR = flags.DEFINE_string("workdir", "runs/studies", "where runs and measurements are kept")
_OUTPUT = flags.DEFINE_string("output", "docs/studies.md", "the page to write")
_SEEDS = flags.DEFINE_list("seeds", ["0", "1", "2"], "seeds of training and measuring")
_SCALE = flags.DEFINE_float("scale", 1.0, "of all steps and samples", lower_bound=0.0)


def main(_: Sequence[str]) -> None:
    """Does what is left to do, then writes the page."""
    keep_compiled()
    from benchmarks.machine import machine
    from benchmarks.studies import page, units
    from benchmarks.studies.plan import Scale

    workdir, scale = pathlib.Path(_WORKDIR.value), Scale(factor=_SCALE.value)
    folders = {int(seed): workdir / f"seed_{seed}" for seed in _SEEDS.value}
    for seed, folder in folders.items():
        units.work(folder, seed, scale)
    minutes = sum(map(units.seconds, folders.values())) / 60
    command = shlex.join(["python", "-m", "benchmarks.studies", *sys.argv[1:]])
    page.write(pathlib.Path(_OUTPUT.value), list(folders.values()), command=command,
               minutes=minutes, machine=machine())
    print(_OUTPUT.value)


if __name__ == "__main__":
    app.run(main)
