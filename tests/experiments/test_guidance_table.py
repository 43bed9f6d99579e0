"""The table and the plot of a search of guidance, and such searches in other reports."""

import json

import PIL.Image
import pytest
import run_directories
import tiny

from dmf.errors import InputError
from dmf.evaluation.result_rows import best_row
from dmf.experiments import evaluation_report, guidance_search, runs, tables

SCORES = {
    ("main", 1, 1.0, (0.4, 0.65)): 3.0, ("main", 1, 2.0, (0.4, 0.65)): 2.0,
    ("main", 4, 1.0, (0.4, 0.65)): 4.0,
    ("main", 1, 1.0, (0.0, 1.0)): 3.0, ("main", 1, 2.0, (0.0, 1.0)): float("nan"),
    ("", 2, 2.0, (0.0, 1.0)): 1.254,
}  # fmt: skip
ROWS = [{"ema": ema, "steps": steps, "guidance": scale, "interval": list(interval), "count": 60,
         "fid": fid} for (ema, steps, scale, interval), fid in SCORES.items()]  # fmt: skip
SEARCH = {"protocol": {"name": "adm", "metrics": ["fid"]}, "reference": {"name": "real"},
          "results": ROWS}  # fmt: skip


def test_a_table_has_a_column_for_each_scale_and_names_the_best_row():
    assert guidance_search.markdown_table(SEARCH, "fid").splitlines() == [
        "| EMA | steps | interval | scale 1 | scale 2 |",
        "| --- | --- | --- | --- | --- |",
        "| main | 1 | 0.4:0.65 | 3.00 | 2.00 |",
        "| main | 1 | 0.0:1.0 | 3.00 | nan |",
        "| main | 4 | 0.4:0.65 | 4.00 |  |",
        "| parameters | 2 | 0.0:1.0 |  | **1.25** |",
        "",
        "FID. The best row is parameters, 2 steps, guidance 2.0, interval 0.0:1.0: 1.25.",
        "Protocol adm, 60 samples, against real.",
    ]


def test_the_best_row_depends_on_the_metric():
    rows = [{"fid": value, "recall": value} for value in (float("nan"), 2.0, 1.0, 1.0)]
    assert best_row(rows, "fid") is rows[2] and best_row(rows, "recall") is rows[1]
    assert best_row(rows[:1], "fid") is None and best_row(rows, "unknown") is None


def test_reports_tell_the_guidance_of_a_curve(tmp_path, capsys):
    (tmp_path / "search.json").write_text(json.dumps(SEARCH))
    read = evaluation_report.read_evaluation(tmp_path / "search.json")
    table = evaluation_report.markdown_table({"map": read}, "fid")
    assert "| map (main, guidance 1.0, interval 0.4:0.65) | 3.00 |  | 4.00 |" in table
    assert "| map (parameters, guidance 2.0, interval 0.0:1.0) |  | 1.25 |  |" in table
    report = tmp_path / "report"
    assert tiny.dmf("report", f"--output={report}", f"map={tmp_path}/search.json") == 0
    assert guidance_search.is_searched(read)
    picture = PIL.Image.open(report / "guidance.png")
    assert len(picture.convert("RGB").getcolors(maxcolors=2**24)) > 10


def test_a_table_of_runs_has_a_column_for_each_guidance(tmp_path):
    one = {**run_directories.evaluation({1: 2.0}), **SEARCH, "step": 8}
    run_directories.write(tmp_path / "run", evaluations=[one])
    scores = tables.final_scores(runs.find_runs([tmp_path]))
    assert len({score.column for score in scores}) == len(SCORES)
    assert scores[1].column.startswith("fid, 1 step, main, guidance 2.0, interval 0.4:0.65 [")


@pytest.mark.parametrize("fields", [
    {"guidance": "2"}, {"interval": 3}, {"interval": [0.1]}, {"interval": None},
])  # fmt: skip
def test_rows_with_other_guidance_are_refused(tmp_path, fields):
    path = tmp_path / "other.json"
    path.write_text(json.dumps({**SEARCH, "results": [{**ROWS[0], **fields}]}))
    with pytest.raises(InputError, match="other.json: not a file that dmf evaluate wrote"):
        evaluation_report.read_evaluation(path)
