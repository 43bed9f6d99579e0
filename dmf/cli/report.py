"""dmf report --output=DIR [--metric=fid] NAME=FILE ... | RUN ...

Of the directories of runs, or of sweeps: a page, report.html, with how the runs differ and stand,
their curves, distances and samples; and the numbers as runs.csv, metrics.csv and distances.csv.

Of evaluations of flow maps, each NAME=FILE one that `dmf evaluate` wrote, by one protocol: prints a
table of a metric against steps, and writes it as report.md, with the curves as distance.png.
"""

from collections.abc import Sequence

from absl import flags
from etils import epath

from dmf import cli
from dmf.typing import InputError


def main(verb: str, arguments: Sequence[str]) -> None:
    """Writes a report of several runs, or of several evaluations."""
    values = flags.FlagValues()
    flags.DEFINE_string("output", None, "a directory for the report", flag_values=values)
    flags.DEFINE_string(
        "metric", "", "of evaluations, what is shown; the first by default", flag_values=values
    )
    named = _parsed(verb, arguments, values)
    cli.require(values, "output")
    directories = [a for a in named if epath.Path(a).is_dir()]
    if not directories:
        _of_evaluations(values, named)
    elif len(directories) < len(named):
        other = next(a for a in named if a not in directories)
        raise InputError(f"{other}: there is no such directory; a report is of directories of "
                         "runs, or of NAME=FILE, not of both")
    elif values.metric:
        raise InputError(f"--metric={values.metric}: a report of runs shows all of them; leave it "
                         "out")
    else:
        _of_runs(values.output, directories)


def _parsed(verb: str, arguments: Sequence[str], values: flags.FlagValues) -> list[str]:
    """Reads the flags, before, between and after what is to be reported, which is returned."""
    cli.parse(verb, [a for a in arguments if a in ("-h", "--help")], values, __doc__)
    return values([f"dmf {verb}", *arguments])[1:]


def _of_runs(output: str, directories: Sequence[str]) -> None:
    cli.leave_accelerators()
    from dmf import page, runs

    print(page.write(output, runs.find(directories)))


def _of_evaluations(values: flags.FlagValues, named: Sequence[str]) -> None:
    from dmf import report

    evaluations = {}
    for argument in named:
        name, _, path = argument.partition("=")
        if not path or not epath.Path(path).exists():
            raise InputError(f"{argument}: give NAME=FILE with a file that dmf evaluate wrote, or "
                             "the directory of a run")
        evaluations[name] = report.read(path)
    if not evaluations:
        raise InputError("nothing to report: give the directories of runs or sweeps, or give "
                         "NAME=FILE for each evaluation")
    print(report.write(values.output, evaluations, values.metric))
