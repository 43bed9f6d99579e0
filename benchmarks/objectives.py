"""All objectives on one network of the digits, at equal compute: trains, evaluates, writes a page.

    python -m benchmarks.objectives --workdir=runs/objectives --output=docs/objectives.md

Each objective trains a flow map from scratch, and fine-tunes a flow model, for each of three seeds.
All of it takes about an hour on 2 idle cores; the page says how long. The same command resumes
after an interruption at any point. `--scale=0.01` is a quick trial, for a workdir of its own; most
of its time is compilation.
"""

from benchmarks.studies.command import start_study
from benchmarks.studies.study import Plan


def _plan() -> Plan:
    from benchmarks.studies.objectives_page import COMPARISON

    return COMPARISON


if __name__ == "__main__":
    start_study("benchmarks.objectives", "runs/objectives", "docs/objectives.md", _plan)
