"""A report of runs as one self-contained HTML page, and its tables as CSV files.

Everything comes from the directories of the runs. Numbers keep every digit that was written.
"""

import base64
import html
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from etils import epath

from dmf.experiments import plots, tables
from dmf.experiments.runs import Run
from dmf.runtime.files import write_text
from dmf.runtime.paths import user_path

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


def write_report(directory: epath.PathLike, runs: Sequence[Run]) -> epath.Path:
    """Writes report.html, runs.csv, metrics.csv and distances.csv; returns the page.

    Args:
      directory: directory of the report; other files in it are left alone.
      runs: at least one run.

    Raises:
      InputError: matplotlib is not installed; nothing is written.
      RunError: the disk is full or cannot be written.
    """
    directory = user_path(directory)
    files = {
        "runs.csv": tables.runs_table(runs),
        "metrics.csv": tables.metrics_table(runs),
        "distances.csv": tables.scores_table(runs),
    }
    texts = {name: table.to_csv() for name, table in files.items()}
    texts[PAGE] = page(runs)
    for name, text in texts.items():
        # JSON may hold halves of characters, which no file can.
        write_text(directory / name, text.encode(errors="backslashreplace").decode())
    return directory / PAGE


def page(runs: Sequence[Run]) -> str:
    """The page as HTML."""
    count = "1 run" if len(runs) == 1 else f"{len(runs)} runs"
    parts = [
        "<!DOCTYPE html>", '<html lang="en">', "<head>", '<meta charset="utf-8">',
        f"<title>{count}</title>", f"<style>{_STYLE}</style>", "</head>", "<body>",
        f"<h1>{count}: {_count_statuses(run.status for run in runs)}</h1>",
        *_section("Runs", _html_table(tables.runs_table(runs)), "Config fields in which the runs "
                  "differ, their progress, and their last numbers with every digit that was "
                  "written. All "
                  "evaluations in a column have the same protocol, number of samples and "
                  "reference."),
        *_section("Training curves", _training_curves(runs), "Only evaluations with the same "
                  "protocol share a plot."),
        *_section("Distance against sampling steps", _distances(runs), "From the last evaluation "
                  "of each run."),
        *_section("Latest samples", _grids(runs), "The newest grid of each run: two rows of images "
                  "for each number of sampling steps."),
        "</body>", "</html>", "",
    ]  # fmt: skip
    return "\n".join(parts)


def _count_statuses(statuses: Iterable[str]) -> str:
    """The number of runs with each status, in order of appearance.

    >>> _count_statuses(["complete", "failed", "complete"])
    '2 complete, 1 failed'
    """
    counts: dict[str, int] = {}
    for status in statuses:
        counts[status] = counts.get(status, 0) + 1
    return ", ".join(f"{count} {status}" for status, count in counts.items())


def _section(title: str, body: str, note: str) -> list[str]:
    """A section of the page; an empty body becomes a sentence that says so."""
    if not body:
        return [f"<h2>{title}</h2>", "<p>Nothing yet.</p>"]
    return [f"<h2>{title}</h2>", f"<p>{note}</p>", body]


def _html_table(table: tables.Table) -> str:
    head = "".join(f"<th>{_column_title(name)}</th>" for name in table.columns)
    status = table.columns.index("status")
    rows = [
        "<tr>" + "".join(_cell(v, i == status) for i, v in enumerate(row)) + "</tr>"
        for row in table.rows
    ]
    return "\n".join(['<div class="wide"><table>', f"<thead><tr>{head}</tr></thead>", "<tbody>",
                      *rows, "</tbody>", "</table></div>"])  # fmt: skip


def _column_title(name: str) -> str:
    """The name of a column, with the protocol of its evaluations on a line of its own."""
    first, bracket, rest = name.partition(" [")
    breaking = html.escape(first).replace("_", "_<wbr>").replace(".", ".<wbr>")
    return breaking + (f"<i>{html.escape(bracket + rest)}</i>" if bracket else "")


def _cell(value: Any, is_status: bool) -> str:
    """A value with all its digits; the last digits of a long number are small."""
    if value is None:
        return "<td></td>"
    if is_status:
        return f'<td class="{value}">{value}</td>'
    if isinstance(value, float):
        head, tail = _split_digits(repr(value))
        return f"<td>{head}{f'<small>{tail}</small>' if tail else ''}</td>"
    return f"<td>{html.escape(str(value))}</td>"


def _split_digits(number: str) -> tuple[str, str]:
    """A decimal number split after its first significant digits; numbers with an exponent are not
    split."""
    whole, _, fraction = number.partition(".")
    if not fraction.isdigit():
        return number, ""
    zeros = len(fraction) - len(fraction.lstrip("0")) if not whole.lstrip("-0") else 0
    shown = len(whole) + 1 + zeros + max(_DIGITS - len(whole.lstrip("-0")), 1)
    return number[:shown], number[shown:]


def _training_curves(runs: Sequence[Run]) -> str:
    panels = dict(tables.curves(runs))
    names = [run.name for run in runs]
    return _image(plots.plot_panels(panels, names, "training step"), "curves") if panels else ""


def _distances(runs: Sequence[Run]) -> str:
    panels: dict[str, dict[str, list[tuple[int, float]]]] = {}
    final = tables.final_scores(runs)
    several_emas = len({score.ema for score in final}) > 1
    for score in final:
        if score.is_distance:
            lines = panels.setdefault(f"{score.metric}\n[{score.protocol}]", {})
            ema = (score.ema or "parameters") * several_emas
            name = ", ".join(filter(None, (score.run, ema, score.guidance)))
            lines.setdefault(name, []).append((score.steps, score.value))
    if not panels:
        return ""
    names = list(dict.fromkeys(name for lines in panels.values() for name in lines))
    panels = {title: _sorted(lines) for title, lines in panels.items()}
    image = plots.plot_panels(panels, names, "sampling steps", x_is_steps=True)
    return _image(image, "distances")


def _sorted(lines: Mapping[str, list[tuple[int, float]]]) -> dict[str, list[tuple[int, float]]]:
    return {name: sorted(points) for name, points in lines.items()}


def _grids(runs: Sequence[Run]) -> str:
    figures = [
        f"<figure>{_image(run.grid.read_bytes(), run.name)}<figcaption>{html.escape(run.name)}, "
        f"after step {int(run.grid.stem)}</figcaption></figure>"
        for run in runs if run.grid
    ]
    return "\n".join(["<div>", *figures, "</div>"]) if figures else ""


def _image(data: bytes, alternative: str) -> str:
    """A PNG file as part of the page."""
    inline = base64.b64encode(data).decode()
    return f'<img alt="{html.escape(alternative)}" src="data:image/png;base64,{inline}">'
