"""The papers' ablations on the digits: trains, evaluates, and writes a page.

    python -m benchmarks.studies --workdir=runs/studies --output=docs/studies.md

There are fourteen fine-tunings, a flow model, a MeanFlow and two improved MeanFlows for each of
three seeds. All of it takes about an hour on 2 idle cores; the page says how long. The same command
resumes after an interruption at any point. `--scale=0.01` is a quick trial, for a workdir of its
own; most of its time is compilation.
"""

from benchmarks.studies.command import start_study
from benchmarks.studies.study import Plan


def _plan() -> Plan:
    from benchmarks.studies.plan import ABLATIONS

    return ABLATIONS


if __name__ == "__main__":
    start_study("benchmarks.studies", "runs/studies", "docs/studies.md", _plan)
