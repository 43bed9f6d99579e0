"""Rows of the result of an evaluation: their names, and the best of them."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

from dmf.evaluation.metrics import find_metric

Row = Mapping[str, Any]


def row_name(row: Row) -> str:
    """What logs call a row.

    >>> row_name({"ema": "", "steps": 1}), guidance_name({"guidance": 2.0, "interval": [0.4, 0.65]})
    ('parameters, 1 step', 'guidance 2.0, interval 0.4:0.65')
    """
    name = f"{row['ema'] or 'parameters'}, {row['steps']} step{'s' * (row['steps'] > 1)}"
    guidance = guidance_name(row)
    return f"{name}, {guidance}" if guidance else name


def guidance_name(row: Row) -> str:
    """The guidance of a row of a search; empty for another row."""
    if "guidance" not in row:
        return ""
    return f"guidance {row['guidance']}, interval {interval_name(row)}"


def interval_name(row: Row) -> str:
    """The interval of a row of a search, as --interval takes it."""
    return ":".join(map(str, row["interval"]))


def best_row(rows: Iterable[Row], metric: str) -> Row | None:
    """The row with the best score, the first of several; None if no score is a number, or the
    metric is not registered.

    >>> best_row([{"fid": 3.0}, {"fid": 2.0}, {"fid": float("nan")}], "fid")
    {'fid': 2.0}

    Args:
      rows: rows of an evaluation.
      metric: name of a metric that all rows have.
    """
    known = find_metric(metric)
    if known is None:
        return None
    choose = max if known.higher_is_better else min
    return choose((row for row in rows if not math.isnan(row[metric])),
                  key=lambda row: row[metric], default=None)  # fmt: skip
