"""A report of runs as one page that needs nothing beside it, and its tables as CSV files.

Everything comes from the directories of the runs, and numbers stand as they were written.
"""

import base64
import html
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from etils import epath

from dmf import figures, summary
from dmf.files import write_text
from dmf.runs import Run

PAGE = "report.html"
_DIGITS = 4
_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; color: #222; background: #fff;
       max-width: 1500px; margin: 2em auto; padding: 0 1.5em; }
h1 { font-size: 1.5em; } h2 { font-size: 1.15em; margin-top: 2em; }
p { max-width: 50em; } img { max-width: 100%; } .wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: 0.82em; font-variant-numeric: tabular-nums; }
th, td { text-align: left; vertical-align: top; padding: 0.3em 0.6em;
         border-bottom: 1px solid #ddd; }
th { border-bottom: 2px solid #888; min-width: 3em; } td:last-child { min-width: 12em; }
th i { display: block; font-weight: normal; font-style: normal; color: #666; }
td small { color: #aaa; font-size: 0.7em; }
.complete { color: #17692f; } .unfinished { color: #8a5a00; }
.failed, .damaged { color: #b00020; font-weight: bold; }
figure { display: inline-block; margin: 0 1.5em 1em 0; max-width: 24em; vertical-align: top; }
figure img { image-rendering: pixelated; } figcaption { font-size: 0.82em; margin-top: 0.3em; }
@media print {
  @page { size: A4 landscape; margin: 12mm; } body { font-size: 9px; margin: 0; max-width: none; }
  h2, p { break-after: avoid; } figure, tr, img { break-inside: avoid; }
  .wide { overflow: visible; } img { max-height: 16cm; }
}
"""


def write(directory: epath.PathLike, runs: Sequence[Run]) -> epath.Path:
    """Writes report.html, runs.csv, metrics.csv and distances.csv; returns the page.

    Args:
      directory: to write to; what else lies there is left alone.
      runs: at least one.

    Raises:
      InputError: matplotlib is not installed; nothing is written.
      RunError: the disk is full or cannot be written.
    """
    directory = epath.Path(directory)
    tables = {
        "runs.csv": summary.of_runs(runs),
        "metrics.csv": summary.of_metrics(runs),
        "distances.csv": summary.of_scores(runs),
    }
    texts = {name: table.as_csv() for name, table in tables.items()}
    texts[PAGE] = _page(runs, tables["runs.csv"])
    for name, text in texts.items():
        write_text(directory / name, text)
    return directory / PAGE


def _page(runs: Sequence[Run], table: summary.Table) -> str:
    several = "1 run" if len(runs) == 1 else f"{len(runs)} runs"
    parts = [
        "<!DOCTYPE html>", '<html lang="en">', "<head>", '<meta charset="utf-8">',
        f"<title>{several}</title>", f"<style>{_STYLE}</style>", "</head>", "<body>",
        f"<h1>{several}: {_counted(run.status for run in runs)}</h1>",
        *_section("Runs", _table(table), "The fields in which their configs differ, how far they "
                  "came, and their last numbers, to the last digit that was written. A column "
                  "holds evaluations by one protocol, number of samples and reference alone."),
        *_section("While training", _curves(runs), "An evaluation is drawn beside others by the "
                  "same measure alone."),
        *_section("Distance against sampling steps", _distances(runs), "Of each run's last "
                  "evaluation."),
        *_section("Newest samples", _grids(runs), "Of each run that drew some, two rows for each "
                  "number of sampling steps."),
        "</body>", "</html>", "",
    ]  # fmt: skip
    return "\n".join(parts)


def _counted(statuses: Iterable[str]) -> str:
    """How many there are of each, in the order of their first."""
    counts: dict[str, int] = {}
    for status in statuses:
        counts[status] = counts.get(status, 0) + 1
    return ", ".join(f"{count} {status}" for status, count in counts.items())


def _section(title: str, body: str, note: str) -> list[str]:
    """A part of the page; it says so where there is nothing to show."""
    if not body:
        return [f"<h2>{title}</h2>", "<p>Nothing yet.</p>"]
    return [f"<h2>{title}</h2>", f"<p>{note}</p>", body]


def _table(table: summary.Table) -> str:
    head = "".join(f"<th>{_title(name)}</th>" for name in table.columns)
    status = table.columns.index("status")
    rows = [
        "<tr>" + "".join(_cell(v, i == status) for i, v in enumerate(row)) + "</tr>"
        for row in table.rows
    ]
    return "\n".join(['<div class="wide"><table>', f"<thead><tr>{head}</tr></thead>", "<tbody>",
                      *rows, "</tbody>", "</table></div>"])  # fmt: skip


def _title(name: str) -> str:
    """A column's name; what it is measured by stands below."""
    first, bracket, rest = name.partition(" [")
    breaking = html.escape(first).replace("_", "_<wbr>").replace(".", ".<wbr>")
    return breaking + (f"<i>{html.escape(bracket + rest)}</i>" if bracket else "")


def _cell(value: Any, is_status: bool) -> str:
    """The whole of a value; of a long number the last digits are small."""
    if value is None:
        return "<td></td>"
    if is_status:
        return f'<td class="{value}">{value}</td>'
    if isinstance(value, float):
        head, tail = _cut(repr(value))
        return f"<td>{head}{f'<small>{tail}</small>' if tail else ''}</td>"
    return f"<td>{html.escape(str(value))}</td>"


def _cut(number: str) -> tuple[str, str]:
    """A decimal after its first significant digits; whole where that would mislead."""
    whole, _, fraction = number.partition(".")
    if not fraction.isdigit():
        return number, ""
    zeros = len(fraction) - len(fraction.lstrip("0")) if not whole.lstrip("-0") else 0
    kept = len(whole) + 1 + zeros + max(_DIGITS - len(whole.lstrip("-0")), 1)
    return number[:kept], number[kept:]


def _curves(runs: Sequence[Run]) -> str:
    found = dict(summary.curves(runs))
    names = [run.name for run in runs]
    return _image(figures.panels(found, names, "training step"), "curves") if found else ""


def _distances(runs: Sequence[Run]) -> str:
    found: dict[str, dict[str, list[tuple[int, float]]]] = {}
    final = summary.final_scores(runs)
    several = len({score.ema for score in final}) > 1
    for score in final:
        if score.is_distance:
            lines = found.setdefault(f"{score.metric}\n[{score.measure}]", {})
            name = score.run + (f", {score.ema or 'parameters'}" if several else "")
            lines.setdefault(name, []).append((score.steps, score.value))
    if not found:
        return ""
    names = list(dict.fromkeys(name for lines in found.values() for name in lines))
    drawn = {title: _sorted(lines) for title, lines in found.items()}
    return _image(figures.panels(drawn, names, "sampling steps", sampling=True), "distances")


def _sorted(lines: Mapping[str, list[tuple[int, float]]]) -> dict[str, list[tuple[int, float]]]:
    return {name: sorted(points) for name, points in lines.items()}


def _grids(runs: Sequence[Run]) -> str:
    shown = [
        f"<figure>{_image(run.grid.read_bytes(), run.name)}<figcaption>{html.escape(run.name)}, "
        f"after step {int(run.grid.stem)}</figcaption></figure>"
        for run in runs if run.grid
    ]
    return "\n".join(["<div>", *shown, "</div>"]) if shown else ""


def _image(data: bytes, said: str) -> str:
    inline = base64.b64encode(data).decode()
    return f'<img alt="{html.escape(said)}" src="data:image/png;base64,{inline}">'
