"""Plots of evaluations as PNG files."""

import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

from dmf.errors import InputError

# The lines of a panel: points (x, y) by the name of the line.
Lines = Mapping[str, Sequence[tuple[int | float, float]]]
_COLUMNS, _WIDTH, _HEIGHT, _LEGEND_ROW = 3, 4.2, 3.2, 0.22
_STYLES = ("-", "--", ":", "-.")


def new_figure(width: float | int, height: float | int) -> Any:
    """An empty matplotlib figure.

    Args:
      width: in inches.
      height: in inches.

    Raises:
      InputError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise InputError("matplotlib", remedy="plots need it; pip install matplotlib") from None
    return Figure(figsize=(width, height), layout="constrained")


def plain(text: str) -> str:
    """A text that matplotlib shows as it is: a dollar sign begins no formula, a leading
    underscore does not hide a name, and half a character of JSON is written out.

    >>> print(plain("lr=$1"), plain("_base"))
    lr=\\$1  _base
    """
    whole = text.encode(errors="backslashreplace").decode()
    return whole.replace("$", r"\$").replace("_", " _", whole.startswith("_"))


def to_png(figure: Any) -> bytes:
    """A figure as the bytes of a PNG file."""
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=150)
    return file.getvalue()


def plot_panels(panels: Mapping[str, Lines], names: Sequence[str], x_label: str) -> bytes:
    """Plots several panels, three in a row, with one legend for all.

    Args:
      panels: lines by the title of their panel.
      names: names of all lines; their order chooses colours, which are the same in every panel.
      x_label: label of the x axis of every panel.

    Returns:
      The bytes of a PNG file.
    """
    rows, across = math.ceil(len(panels) / _COLUMNS), min(len(panels), _COLUMNS)
    width = max(across, 2) * _WIDTH
    columns = max(1, int(width / (0.6 + 0.08 * max(map(len, names)))))
    legend = _LEGEND_ROW * math.ceil(len(names) / columns)
    figure = new_figure(width, rows * _HEIGHT + legend)
    handles: dict[str, Any] = {}
    for place, (title, lines) in enumerate(panels.items(), start=1):
        axes = figure.add_subplot(rows, across, place)
        for name, points in lines.items():
            handles[name] = _plot_line(axes, points, names.index(name), name)
        _label_axes(axes, title, x_label)
        _scale_axis(axes, lines)
    shown = [name for name in names if name in handles]
    figure.legend(list(map(handles.get, shown)), list(map(plain, shown)),
                  loc="outside lower center", ncols=min(columns, len(shown)), fontsize=8,
                  frameon=False)  # fmt: skip
    return to_png(figure)


def _plot_line(
    axes: Any, points: Sequence[tuple[int | float, float]], index: int, name: str
) -> Any:
    style = _STYLES[index // 10 % len(_STYLES)]
    x, y = [x for x, _ in points], [y for _, y in points]
    marker = "o" if len(points) <= 8 else None
    return axes.plot(x, y, style, color=f"C{index % 10}", marker=marker, markersize=3,
                     linewidth=1.2, label=plain(name))[0]  # fmt: skip


def _label_axes(axes: Any, title: str, x_label: str) -> None:
    axes.set_title(plain(title), fontsize=9)
    axes.set_xlabel(x_label, fontsize=8)
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.3)


def _scale_axis(axes: Any, lines: Lines) -> None:
    """Chooses a logarithmic axis for values over more than a decade."""
    values = [y for points in lines.values() for _, y in points]
    if values and all(y > 0 for y in values) and max(values) > 10 * min(values):
        axes.set_yscale("log")
