"""The mutants of reports of runs and of the captions of grids."""

from benchmarks.mutant_lists.mutant import Mutant

MUTANTS = (
    Mutant(
        "caption_of_rows", "the caption of steps stands at every row of a grid",
        "dmf/data/pixels.py",
        '["" if start else name], margin',
        "[name], margin",
        ("tests/data/test_pixels.py",),
    ),
    Mutant(
        "repeated_captions", "the captions of classes stand above every row of a grid",
        "dmf/data/pixels.py",
        "if row != above[: len(row)]:",
        "if any(row):",
        ("tests/data/test_pixels.py",),
    ),
    Mutant(
        "natural_order", "runs are sorted by the digits behind the decimal point",
        "dmf/experiments/runs.py",
        r'r"(\d+(?:\.\d+)?(?:e[+-]?\d+)?)"',
        r'r"(\d+)"',
        ("tests/experiments/test_runs.py",),
    ),
    Mutant(
        "lost_spikes", "the page leaves out the spikes of long curves",
        "dmf/experiments/html_report.py",
        "sorted({min(stretch, key=_value), max(stretch, key=_value)})",
        "sorted({min(stretch, key=_value), stretch[-1]})",
        ("tests/experiments/test_html_report.py",),
    ),
    Mutant(
        "hours_of_metrics", "the axis of wall-clock hours is in minutes",
        "dmf/experiments/runs.py",
        "(time - first) / 3600",
        "(time - first) / 60",
        ("tests/experiments/test_html_report.py",),
    ),
)  # fmt: skip
