"""Fault injection: runs are killed again and again, and checkpoints are damaged.

    python -m benchmarks.faults [--kills=100] [--corruptions=100] [--seed=0]

Kills: a tiny run, which saves every second step, is started and killed by SIGKILL at random
moments; then it takes 20 more steps and ends. Its checkpoint must be bit-for-bit that of an
uninterrupted run, and its metrics the same. A start is a fork of a process that has imported dmf
and JAX and has not used a device; the verb `train` runs there as on the command line, in a process
group that is killed as a whole. Half of the kills come while a checkpoint is being written, a
quarter just after one was written, a quarter at any time. The uninterrupted run is `python -m dmf
train`. A loss of power is not tested.

Corruptions: the newer checkpoint of a run with checkpoints of steps 4 and 8 is damaged, each time
in a fresh copy: a file is cut short, 1 to 16 of its bits or bytes change, or a file or a folder is
removed. Then the parameters are loaded, and the train state is restored. The result must be what
was saved, in every bit; or the train state of step 4, with a line in the log; or one line that says
that the checkpoint is damaged.

Tables are written to --output; the exit code is 1 if there was any other outcome.
"""

import logging as stdlib_logging
import os
import random
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from absl import flags, logging

from benchmarks.corruptions import COLUMNS, DAMAGES, Corruptions
from benchmarks.kills import MOMENTS, PHASES, Kills
from benchmarks.machine import machine, start

_KILLS = flags.DEFINE_integer("kills", 100, "number of kills")
_CORRUPTIONS = flags.DEFINE_integer("corruptions", 100, "number of damaged checkpoints")
_SEED = flags.DEFINE_integer("seed", 0, "random seed of the moments and the damages")
_OUTPUT = flags.DEFINE_string("output", "benchmarks/results/faults.md", "a .md file for the tables")


def _table(outcomes: Mapping[tuple[str, tuple[str, str]], int]) -> list[str]:
    total = {how: sum(outcomes[how, column] for column in COLUMNS[:3]) for how in DAMAGES}
    return [
        "| damage | copies | " + " | ".join(f"{act}: {out}" for act, out in COLUMNS) + " |",
        "|---" * (len(COLUMNS) + 2) + "|",
        *(f"| {how} | {total[how]} | "
          + " | ".join(str(outcomes[how, column]) for column in COLUMNS) + " |" for how in DAMAGES),
        f"| all | {sum(total.values())} | "
        + " | ".join(str(sum(outcomes[how, c] for how in DAMAGES)) for c in COLUMNS) + " |",
    ]


def kill(folder: Path, count: int, seed: int) -> tuple[list[str], list[str]]:
    """Kills the run `count` times; returns lines of Markdown, and the errors."""
    start, kills = time.monotonic(), Kills(folder, random.Random(seed))
    for number in range(count):
        kills.kill(MOMENTS[number % len(MOMENTS)])
        print(f"kill {number + 1} of {count}: {dict(kills.hits)}", flush=True)
    kill_seconds = time.monotonic() - start
    errors = kills.end()
    verdict = "differs from" if errors else "is bit-for-bit identical to"
    return [
        "| killed while | kills |",
        "|---|---|",
        *(f"| {phase} | {kills.hits[phase]} |" for phase in PHASES),
        f"| all | {count} |",
        "",
        f"{kills.half_written} partly written checkpoints were left, {kills.cleaned} were removed. "
        f"The run of {kills.steps} steps {verdict} the uninterrupted run ({kills.arrays} arrays). "
        f"{kill_seconds:.0f} s of kills, {time.monotonic() - start:.0f} s with the comparison.",
    ], errors


def corrupt(folder: Path, count: int, seed: int) -> tuple[list[str], list[str]]:
    """Damages `count` checkpoints; returns lines of Markdown, and the errors."""
    start, corruptions = time.monotonic(), Corruptions(folder, random.Random(seed))
    for number in range(count):
        corruptions.corrupt(DAMAGES[number % len(DAMAGES)])
    seconds = time.monotonic() - start
    return [*_table(corruptions.outcomes), "", f"{seconds:.0f} s."], corruptions.errors


def main(arguments: Sequence[str]) -> None:
    """Kills, corrupts, prints and writes the tables."""
    logging.set_verbosity(logging.FATAL)
    stdlib_logging.getLogger("asyncio").setLevel(stdlib_logging.CRITICAL)
    with tempfile.TemporaryDirectory() as folder:
        kill_table, errors = kill(Path(folder), _KILLS.value, _SEED.value)
        corruption_table, more_errors = corrupt(Path(folder), _CORRUPTIONS.value, _SEED.value)
    command = f"python -m benchmarks.faults --kills={_KILLS.value} " \
              f"--corruptions={_CORRUPTIONS.value} --seed={_SEED.value}"
    errors += more_errors
    text = "\n".join([*kill_table, "", *corruption_table, "",
                      *(f"- wrong: {line}" for line in errors),
                      f"`{command}`, on {machine()}."])
    Path(_OUTPUT.value).write_text(text + "\n")
    print(text)
    sys.stdout.flush()
    if errors:
        os._exit(1)  # does not wait for a thread that hangs


if __name__ == "__main__":
    start(main)
