"""dmf report --output=DIR [--metric=fid] NAME=FILE [NAME=FILE ...]

Compares evaluations of flow maps (the JSON files of `dmf evaluate`) by one protocol: prints a table
of a metric against steps, and writes it as report.md, with the curves as distance.png.
"""

from collections.abc import Sequence

from absl import flags
from etils import epath

from dmf import cli
from dmf.typing import InputError


def main(verb: str, arguments: Sequence[str]) -> None:
    """Writes a table and a picture of several evaluations."""
    values = flags.FlagValues()
    flags.DEFINE_string("output", None, "a directory for the report", flag_values=values)
    flags.DEFINE_string("metric", "", "what is shown; the first by default", flag_values=values)
    named = [a for a in arguments if not a.startswith("-")]
    cli.parse(verb, [a for a in arguments if a not in named], values, __doc__)
    cli.require(values, "output")

    from dmf import report

    evaluations = {}
    for argument in named:
        name, _, path = argument.partition("=")
        if not path or not epath.Path(path).exists():
            raise InputError(f"{argument}: give NAME=FILE with a file that dmf evaluate wrote")
        evaluations[name] = report.read(path)
    if not evaluations:
        raise InputError("nothing to compare: give NAME=FILE for each evaluation")
    print(report.write(values.output, evaluations, values.metric))
