"""Pictures of several runs: metrics against training steps, distances against sampling steps."""

import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

from dmf.typing import InputError

# A line of a panel: its name, and its points.
Lines = Mapping[str, Sequence[tuple[int, float]]]
_COLUMNS, _WIDTH, _HEIGHT, _LEGEND_ROW = 3, 4.2, 3.2, 0.22
_STYLES = ("-", "--", ":", "-.")


def blank(width: float | int, height: float | int) -> Any:
    """An empty figure of matplotlib, in inches.

    Raises:
      InputError: it is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise InputError("matplotlib: pictures need it; pip install 'dmf-jax[report]'") from None
    return Figure(figsize=(width, height), layout="constrained")


def png(figure: Any) -> bytes:
    """A figure as a PNG file."""
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=150)
    return file.getvalue()


def panels(
    found: Mapping[str, Lines], names: Sequence[str], x_label: str, *, sampling: bool = False
) -> bytes:
    """A panel for each title, three in a row, and one legend for all.

    Args:
      found: lines by the title of their panel.
      names: of all lines, in the order of their colours, which are the same in every panel.
      x_label: of every panel.
      sampling: whether x is a number of sampling steps, which is drawn at its logarithm.

    Returns:
      A PNG file.
    """
    rows, across = math.ceil(len(found) / _COLUMNS), min(len(found), _COLUMNS)
    width = max(across, 2) * _WIDTH
    columns = max(1, int(width / (0.6 + 0.08 * max(map(len, names)))))
    legend = _LEGEND_ROW * math.ceil(len(names) / columns)
    figure = blank(width, rows * _HEIGHT + legend)
    handles: dict[str, Any] = {}
    for place, (title, lines) in enumerate(found.items(), start=1):
        axes = figure.add_subplot(rows, across, place)
        for name, points in lines.items():
            handles[name] = _draw(axes, points, names.index(name), name)
        _dress(axes, title, x_label, lines, sampling=sampling)
    shown = [name for name in names if name in handles]
    figure.legend([handles[name] for name in shown], shown, loc="outside lower center",
                  ncols=min(columns, len(shown)), fontsize=8, frameon=False)  # fmt: skip
    return png(figure)


def _draw(axes: Any, points: Sequence[tuple[int, float]], index: int, name: str) -> Any:
    style = _STYLES[index // 10 % len(_STYLES)]
    x, y = zip(*points, strict=True)
    marker = "o" if len(points) <= 8 else None
    return axes.plot(x, y, style, color=f"C{index % 10}", marker=marker, markersize=3,
                     linewidth=1.2, label=name)[0]  # fmt: skip


def _dress(axes: Any, title: str, x_label: str, lines: Lines, *, sampling: bool) -> None:
    axes.set_title(title, fontsize=9)
    axes.set_xlabel(x_label, fontsize=8)
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.3)
    values = [y for points in lines.values() for _, y in points]
    if all(y > 0 for y in values) and max(values) > 10 * min(values):
        axes.set_yscale("log")
    if sampling:
        steps = sorted({x for points in lines.values() for x, _ in points})
        axes.set_xscale("log")
        axes.set_xticks(steps, [str(n) for n in steps])
        axes.minorticks_off()
