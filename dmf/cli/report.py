"""dmf report --output=DIR [--metric=fid] NAME=FILE ... | RUN ...

For directories of runs or sweeps: writes an interactive page, report.html, with how the runs differ
and how far they are, their curves, scores and samples; and the numbers as runs.csv, metrics.csv and
distances.csv.

For evaluations of flow maps, each NAME=FILE one that `dmf evaluate` wrote, with one protocol,
number of samples, reference and feature network: prints a table of a metric against sampling steps,
and writes it as report.md, with the curves as distance.png; where guidance was searched, also the
curves over the guidance scale as guidance.png.
"""

from collections.abc import Sequence

from absl import flags as absl_flags

from dmf.cli import flags
from dmf.errors import InputError
from dmf.runtime.paths import user_path


def main(verb: str, arguments: Sequence[str]) -> None:
    """Writes a report of several runs, or of several evaluations."""
    values = absl_flags.FlagValues()
    text = absl_flags.DEFINE_string
    text("output", None, "directory of the report", flag_values=values)
    text("metric", "", "metric of evaluations that is shown; the first by default",
         flag_values=values)
    named = flags.parse(verb, arguments, values, __doc__)
    flags.require(values, "output")
    directories = [a for a in named if user_path(a).is_dir()]
    if not directories:
        _report_evaluations(values, named)
    elif len(directories) < len(named):
        other = next(a for a in named if a not in directories)
        raise InputError(other, remedy="there is no such directory; a report is of directories of "
                         "runs, or of NAME=FILE, not of both")
    elif values.metric:
        raise InputError("--metric", values.metric, "a report of runs shows all metrics; leave it "
                         "out")
    else:
        _report_runs(values.output, directories)


def _report_runs(output: str, directories: Sequence[str]) -> None:
    flags.use_cpu_only()
    from dmf.experiments import html_report, runs
    from dmf.runtime.ownership import owned_output

    with owned_output("--output", output):
        print(html_report.write_report(output, runs.find_runs(directories)))


def _report_evaluations(values: absl_flags.FlagValues, named: Sequence[str]) -> None:
    from dmf.experiments import evaluation_report, guidance_search
    from dmf.runtime.ownership import owned_output

    evaluations = {}
    for argument in named:
        name, _, path = argument.partition("=")
        if not path or not user_path(path).exists():
            raise InputError(argument, remedy="give NAME=FILE with a file that dmf evaluate wrote, "
                             "or the directory of a run")
        if name in evaluations:
            raise InputError(argument, remedy=f"{name} is given twice; give each evaluation a name "
                             "of its own")
        evaluations[name] = evaluation_report.read_evaluation(path)
    if not evaluations:
        raise InputError("nothing to report", remedy="give NAME=FILE for each evaluation, or the "
                         "directories of runs or sweeps")
    with owned_output("--output", values.output):
        print(evaluation_report.write_report(values.output, evaluations, values.metric))
        searched = {n: e for n, e in evaluations.items() if guidance_search.is_searched(e)}
        if searched:
            metric = values.metric or next(iter(evaluations.values()))["protocol"]["metrics"][0]
            picture = user_path(values.output) / "guidance.png"
            guidance_search.plot_search(picture, searched, metric)
