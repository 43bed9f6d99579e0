"""A campaign of faults: runs that are killed again and again, and checkpoints that are damaged.

    python -m benchmarks.faults [--kills=100] [--corruptions=100] [--seed=0]

Kills: a tiny run, which saves every second step, is started and ended by SIGKILL at a random moment
until it was killed often enough; then it goes on for 20 steps and ends. It must be the run of that
length that nothing disturbed, bit for bit, metrics too. A start is a fork of a process that has
imported dmf and JAX and has not used a device yet; there the verb `train` runs as on the command
line, in a process group that is killed whole. Half of the kills come while a checkpoint is being
written, a quarter just after one was, a quarter at any time. The undisturbed run is `python -m dmf
train`. The machine itself goes on: what a loss of power does is not tried.

Corruptions: of a run with the checkpoints of steps 4 and 8, each time anew, the newer is damaged:
a file is cut short, 1 to 16 of its bits or bytes change, or a file or a folder is gone. Then the
parameters are loaded, and the state is restored. What comes back must be what was saved, in every
bit; the state may be that of step 4, with a word; or else one line says that there is none.

Writes tables to --output; the exit code is 1 where anything else came out.
"""

import logging as stdlib_logging
import os
import random
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from absl import app, flags, logging

from benchmarks.corruptions import COLUMNS, DAMAGES, Corruptions
from benchmarks.kills import PHASES, WHENS, Kills
from benchmarks.machine import machine

_KILLS = flags.DEFINE_integer("kills", 100, "how often a run is killed")
_CORRUPTIONS = flags.DEFINE_integer("corruptions", 100, "how often a checkpoint is damaged")
_SEED = flags.DEFINE_integer("seed", 0, "of the moments and the damages")
_OUTPUT = flags.DEFINE_string("output", "benchmarks/results/faults.md", "a file for the tables")


def _table(hit: Mapping[tuple[str, tuple[str, str]], int]) -> list[str]:
    total = {how: sum(hit[how, column] for column in COLUMNS[:3]) for how in DAMAGES}
    return [
        "| damage | draws | " + " | ".join(f"{act}: {out}" for act, out in COLUMNS) + " |",
        "|---" * (len(COLUMNS) + 2) + "|",
        *(f"| {how} | {total[how]} | "
          + " | ".join(str(hit[how, column]) for column in COLUMNS) + " |" for how in DAMAGES),
        f"| all | {sum(total.values())} | "
        + " | ".join(str(sum(hit[how, column] for how in DAMAGES)) for column in COLUMNS) + " |",
    ]


def kill(folder: Path, count: int, seed: int) -> tuple[list[str], list[str]]:
    """All kills; gives lines of markdown, and what is wrong."""
    began, kills = time.monotonic(), Kills(folder, random.Random(seed))
    for number in range(count):
        kills.kill(WHENS[number % len(WHENS)])
        print(f"kill {number + 1} of {count}: {dict(kills.hit)}", flush=True)
    killed = time.monotonic() - began
    bad = kills.end()
    verdict = "differs from" if bad else "is, in every bit and every report,"
    return [
        "| killed while | kills |",
        "|---|---|",
        *(f"| {phase} | {kills.hit[phase]} |" for phase in PHASES),
        f"| all | {count} |",
        "",
        f"{kills.half_written} half-written checkpoints were left, {kills.cleaned} cleaned. The "
        f"run of {kills.steps} steps {verdict} the one that nothing disturbed ({kills.arrays} "
        f"arrays). {killed:.0f} s of kills, {time.monotonic() - began:.0f} s with the comparison.",
    ], bad


def corrupt(folder: Path, count: int, seed: int) -> tuple[list[str], list[str]]:
    """All corruptions; gives lines of markdown, and what is wrong."""
    began, corruptions = time.monotonic(), Corruptions(folder, random.Random(seed))
    for number in range(count):
        corruptions.corrupt(DAMAGES[number % len(DAMAGES)])
    return [*_table(corruptions.hit), "", f"{time.monotonic() - began:.0f} s."], corruptions.bad


def main(arguments: Sequence[str]) -> None:
    """Kills, corrupts, prints and writes the tables."""
    logging.set_verbosity(logging.FATAL)
    stdlib_logging.getLogger("asyncio").setLevel(stdlib_logging.CRITICAL)
    with tempfile.TemporaryDirectory() as folder:
        killed, bad = kill(Path(folder), _KILLS.value, _SEED.value)
        corrupted, more = corrupt(Path(folder), _CORRUPTIONS.value, _SEED.value)
    command = f"python -m benchmarks.faults --kills={_KILLS.value} " \
              f"--corruptions={_CORRUPTIONS.value} --seed={_SEED.value}"
    text = "\n".join([*killed, "", *corrupted, "", *(f"- bad: {line}" for line in bad + more),
                      f"`{command}`, on {machine()}."])
    Path(_OUTPUT.value).write_text(text + "\n")
    print(text)
    sys.stdout.flush()
    if bad or more:
        os._exit(1)  # A thread that hangs is not waited for.


if __name__ == "__main__":
    app.run(main)
