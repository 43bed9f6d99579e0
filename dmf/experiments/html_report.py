"""A report of runs as one self-contained HTML page, and its tables as CSV files.

Everything comes from the directories of the runs. The page has the numbers as JSON, and draws them
with the files in `report_page`: uPlot (MIT, its license beside it) and two scripts of our own.
"""

import base64
import importlib.resources
import json
import math
import os
import string
import urllib.parse
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath

from dmf.checkpoints.params import CONFIG_FILE
from dmf.experiments import tables
from dmf.experiments.local_launcher import LOG_FILE
from dmf.experiments.runs import Run
from dmf.runtime.files import absolute, write_text
from dmf.runtime.paths import user_path
from dmf.training.metrics_writer import METRICS_FILE
from dmf.training.start_record import STARTS_FILE

PAGE = "report.html"
_PARTS = importlib.resources.files("dmf.experiments") / "report_page"
# Points of a line on the page; values and steps that axes cannot show are left out.
_MAX_POINTS, _MAX_STEP, _MAX_VALUE = 2000, 2**53, 1e100
# Columns beside scores by which a run may be the best, and whether a higher number is better.
_RANKED = {"loss": False, "steps_per_second": True, "images_per_second": True}


def write_report(directory: epath.PathLike, runs: Sequence[Run]) -> epath.Path:
    """Writes report.html, runs.csv, metrics.csv and distances.csv; returns the page.

    Args:
      directory: directory of the report; other files in it are left alone.
      runs: at least one run.

    Raises:
      RunError: the disk is full or cannot be written.
    """
    directory = user_path(directory)
    files = {
        "runs.csv": tables.runs_table(runs),
        "metrics.csv": tables.metrics_table(runs),
        "distances.csv": tables.scores_table(runs),
    }
    texts = {name: table.to_csv() for name, table in files.items()}
    texts[PAGE] = page(runs, directory)
    for name, text in texts.items():
        # JSON may hold halves of characters, which no file can.
        write_text(directory / name, text.encode(errors="backslashreplace").decode())
    return directory / PAGE


def page(runs: Sequence[Run], directory: epath.PathLike) -> str:
    """The page as HTML, with links to the files of the runs from the directory of the page."""
    count = "1 run" if len(runs) == 1 else f"{len(runs)} runs"
    statuses = Counter(run.status for run in runs)
    data = json.dumps(page_data(runs, directory), allow_nan=False, separators=(",", ":"))
    parts = {
        "title": f"{count}: {', '.join(f'{n} {status}' for status, n in statuses.items())}",
        "library_style": _part("uPlot.min.css"), "style": _part("report.css"),
        "library": _part("uPlot.iife.min.js"), "license": _part("uPlot.LICENSE"),
        "script": _part("plots.js") + _part("report.js"),
        "data": data.replace("<", "\\u003c"),
    }  # fmt: skip
    return string.Template(_part("page.html")).substitute(parts)


def _part(name: str) -> str:
    return (_PARTS / name).read_text()


def page_data(runs: Sequence[Run], directory: epath.PathLike) -> dict[str, Any]:
    """What the page draws, as JSON. Lines name their run by its place in `runs`.

    Args:
      runs: at least one run.
      directory: directory of the page.

    Returns:
      `runs` with name, links and newest grid; `table`, whose `fields` first columns after the name
      are config fields, with `higher` for each column of a measure: whether a higher number is
      better; `protocols` of all evaluations; `curves` and `scores`, the panels of the plots, those
      of `curves` with `higher` too; and `thinned`: whether points of a curve are left out.
    """
    places = {run.name: i for i, run in enumerate(runs)}
    table, final = tables.runs_table(runs), tables.final_scores(runs)
    curves = [(title, {places[name]: _finite(points) for name, points in lines.items()})
              for title, lines in tables.curves(runs)]
    return {
        "runs": [_run(run, directory) for run in runs],
        "table": {
            "columns": table.columns,
            "rows": [[_cell(value) for value in row] for row in table.rows],
            "fields": len(tables.differing_fields(runs)),
            "higher": {score.column: score.higher_is_better for score in final} | _RANKED,
        },
        "protocols": sorted({score.protocol for score in final}),
        "curves": [_curve(title, lines) for title, lines in curves],
        "scores": _score_panels(final, places),
        "thinned": any(len(points) > _MAX_POINTS
                       for _, lines in curves for points in lines.values()),
    }  # fmt: skip


def _run(run: Run, directory: epath.PathLike) -> dict[str, Any]:
    grid = run.grid and base64.b64encode(run.grid.read_bytes()).decode()
    return {
        "name": run.name,
        "links": _links(run, directory),
        "hours": run.hours,
        "grid": grid and f"data:image/png;base64,{grid}",
        "grid_step": run.grid and int(run.grid.stem),
    }


def _links(run: Run, directory: epath.PathLike) -> dict[str, str]:
    """Relative addresses of the files of a run that exist; none where a bucket is involved."""
    files = {"config": CONFIG_FILE, "starts": STARTS_FILE, "log": LOG_FILE, "metrics": METRICS_FILE}
    paths = {title: run.directory / name for title, name in files.items()} | {"grid": run.grid}
    there, here = os.fspath(run.directory), os.fspath(absolute(directory))
    if "://" in there + here:
        return {}
    return {title: urllib.parse.quote(os.fsencode(os.path.relpath(path, here)))
            for title, path in paths.items() if path and path.exists()}


def _cell(value: Any) -> Any:
    """A value as JSON and JavaScript can hold it: other numbers become text."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return str(value) if isinstance(value, int) and abs(value) > _MAX_STEP else value


def _curve(title: str, lines: Mapping[int, Sequence[tuple[int, float]]]) -> dict[str, Any]:
    """A panel of curves. With a protocol it is of an evaluation, and is called METRIC/EMA/STEPS."""
    titled = _titled(title)
    metric = titled["title"].partition("/")[0] if titled["protocol"] else ""
    drawn = {i: _columns(_thinned(points)) for i, points in lines.items() if points}
    return titled | {"higher": tables.higher_is_better(metric), "lines": drawn}


def _titled(title: str) -> dict[str, str]:
    name, _, protocol = title.partition("\n")
    return {"title": name, "protocol": protocol}


def _finite(points: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
    """The points that axes can show, in the order of steps; the tables have the others too."""
    return sorted((x, y) for x, y in points if abs(x) < _MAX_STEP and abs(y) < _MAX_VALUE)


def _thinned(points: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
    """Of a line of too many points the first and the last, and the smallest and the largest of each
    stretch between them, so that no spike is lost."""
    if len(points) <= _MAX_POINTS:
        return list(points)
    first, *between, last = points
    size = -(-2 * len(between) // (_MAX_POINTS - 2))
    stretches = (between[i : i + size] for i in range(0, len(between), size))
    inner = [point for stretch in stretches
             for point in sorted({min(stretch, key=_value), max(stretch, key=_value)})]  # fmt: skip
    return [first, *inner, last]


def _value(point: tuple[int, float]) -> float:
    return point[1]


def _columns(points: Sequence[tuple[int, float]]) -> list[list[float]]:
    return [[x for x, _ in points], [y for _, y in points]]


def _score_panels(final: Sequence[tables.Score], places: Mapping[str, int]) -> list[dict[str, Any]]:
    """A panel of scores against sampling steps for each metric and protocol, with a line for each
    run, EMA and guidance."""
    several_emas = len({score.ema for score in final}) > 1
    panels: dict[str, dict[tuple[str, str], list[tuple[int, float]]]] = {}
    for score in final:
        ema = (score.ema or "parameters") * several_emas
        suffix = "".join(f", {part}" for part in (ema, score.guidance) if part)
        lines = panels.setdefault(f"{score.metric}\n[{score.protocol}]", {})
        lines.setdefault((score.run, suffix), []).append((score.steps, score.value))
    return [
        _titled(title) | {"lines": [
            {"run": places[run], "name": run + suffix, "suffix": suffix}
            | dict(zip("xy", _columns(_finite(points)), strict=True))
            for (run, suffix), points in lines.items()
        ]}
        for title, lines in panels.items()
    ]  # fmt: skip
