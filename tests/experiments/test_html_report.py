"""The page and the CSV files hold the numbers of the runs to the last digit, and need nothing."""

import base64
import csv
import html.parser
import io
import json
import re

import PIL.Image
import pytest
import tiny
from run_directories import evaluation, row, write

from dmf.experiments import html_report, plots, runs, tables

VALUES = {1: 0.1 + 0.2, 2: 2 / 3, 4: 1e-7 / 3}


class Cells(html.parser.HTMLParser):
    """The text of every cell of a page's table, row by row, and what the page refers to."""

    def __init__(self, text):
        super().__init__()
        self.rows, self.open, self.references, self.tags = [], False, [], set()
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        self.references += [v for k, v in attributes if k in ("src", "href")]
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.open = True
            self.rows[-1].append("")

    def handle_endtag(self, tag):
        if tag in ("td", "th"):
            self.open = False

    def handle_data(self, data):
        if self.open:
            self.rows[-1][-1] += data


def two_runs(folder, **second):
    write(folder / "seed=1", {"seed": 1}, metrics=[row(4), row(8, loss=0.12345678901)],
          evaluations=[evaluation({1: 9.0, 8: 7.0}, step=4), evaluation(VALUES)],
          grid=True)  # fmt: skip
    write(folder / "seed=2", {"seed": 2, "sampling.steps": (1, 3)}, metrics=[row(8)],
          evaluations=[evaluation({1: 0.5}, **second)])  # fmt: skip
    return folder


def report(folder, output, *, of=None):
    assert tiny.dmf("report", f"--output={output}", of or folder) == 0
    text = (output / "report.html").read_text()
    tables = {
        name: list(csv.reader(io.StringIO((output / f"{name}.csv").read_text())))
        for name in ("runs", "metrics", "distances")
    }
    return text, tables


def test_every_number_is_that_of_the_files(tmp_path):
    text, tables = report(two_runs(tmp_path / "sweep"), tmp_path / "out")
    names, *lines = tables["runs"]
    first, second = (dict(zip(names, line, strict=True)) for line in lines)
    assert Cells(text).rows == tables["runs"]
    assert names[:4] == ["run", "sampling.steps", "seed", "steps"]
    assert (first["run"], first["seed"], first["status"]) == ("seed=1", "1", "complete")
    assert (second["sampling.steps"], second["steps"], second["of"]) == ("[1, 3]", "8", "8")
    assert float(first["loss"]) == 0.12345678901
    assert float(first["images_per_second"]) == 1.2345678e-05
    measure = "[pixels, 72 samples, against digits]"
    for steps, value in VALUES.items():
        count = f"{steps} step" if steps == 1 else f"{steps} steps"
        assert float(first[f"fd_pixels, {count}, main {measure}"]) == value
        assert float(first[f"label_agreement, {count}, main {measure}"]) == value / 10
    assert second[f"fd_pixels, 2 steps, main {measure}"] == ""
    assert not any("8 steps" in name for name in names)  # Of an earlier evaluation.
    stated = {(r[0], int(r[1]), r[2]): float(r[3]) for r in tables["metrics"][1:]}
    written = {
        (name, one["step"], metric): value
        for name in ("seed=1", "seed=2")
        for one in map(json.loads, (tmp_path / "sweep" / name / "metrics.jsonl").open())
        for metric, value in one.items() if metric != "step"
    }  # fmt: skip
    assert stated == written
    scores = [dict(zip(tables["distances"][0], r, strict=True)) for r in tables["distances"][1:]]
    found = {(s["run"], int(s["step"]), int(s["steps"])): float(s["value"])
             for s in scores if s["metric"] == "fd_pixels"}  # fmt: skip
    assert found == {("seed=1", 4, 1): 9.0, ("seed=1", 4, 8): 7.0, ("seed=2", 8, 1): 0.5} | {
        ("seed=1", 8, steps): value for steps, value in VALUES.items()
    }


def test_the_page_needs_nothing_beside_it(tmp_path):
    text, _ = report(two_runs(tmp_path / "sweep"), tmp_path / "out")
    cells = Cells(text)
    assert not cells.tags & {"script", "link", "iframe"}
    assert "url(" not in text and "@import" not in text and "http" not in text
    pictures = [base64.b64decode(src.removeprefix("data:image/png;base64,"))
                for src in cells.references]  # fmt: skip
    assert pictures[-1] == (tmp_path / "sweep/seed=1/samples/00000008.png").read_bytes()
    sizes = [PIL.Image.open(io.BytesIO(picture)).size for picture in pictures]
    assert len(sizes) == 3 and all(width > 600 for width, _ in sizes[:2])
    assert "seed=1, after step 8" in text


@pytest.mark.parametrize(
    ("second", "named"),
    [
        ({"protocol": "adm"}, "[adm, 72 samples, against digits]"),
        ({"reference": "others"}, "[pixels, 72 samples, against others]"),
        ({"count": 50}, "[pixels, 50 samples, against digits]"),
        ({"mark": "g"}, "[pixels, 72 samples, against digits, variant "),
    ],
)
def test_numbers_of_two_measures_never_share_a_column_nor_a_panel(tmp_path, second, named):
    folder = two_runs(tmp_path / "sweep", **second)
    for name in ("seed=1", "seed=2"):
        with (folder / name / "metrics.jsonl").open("a") as file:
            file.write(json.dumps({"step": 8, "evaluation/fd_pixels/main/1": 0.5}) + "\n")
    table = tables.runs_table(runs.find_runs([folder]))
    names = table.columns
    first, second = (dict(zip(names, line, strict=True)) for line in table.rows)
    ones = [name for name in names if name.startswith("fd_pixels, 1 step, main ")]
    assert len(ones) == 2 and any(named in name for name in ones)
    assert [bool(first[name]) for name in ones] == [not second[name] for name in ones]
    drawn = dict(tables.curves(runs.find_runs([folder])))
    alike = [lines for title, lines in drawn.items() if title.startswith("fd_pixels/main/1\n[")]
    assert sorted(map(list, alike)) == [["seed=1"], ["seed=2"]]


def test_runs_with_nothing_yet_and_damaged_ones_are_told(tmp_path):
    folder = tmp_path / "sweep"
    write(folder / "new", step=0)
    bad = write(folder / "<bad>", {"seed": 3}, metrics=[row(2), row(4)])
    (bad / "metrics.jsonl").write_text("{\n" + json.dumps(row(4)) + "\n")
    (folder / "none").mkdir()
    (folder / "none/train.log").write_text("dmf train: why\n")
    text, tables = report(folder, tmp_path / "out")
    names, *lines = tables["runs"]
    told = {line[0]: dict(zip(names, line, strict=True)) for line in lines}
    assert told["new"]["note"] == "no metrics yet"
    assert told["new"]["loss"] == "" and told["new"]["status"] == "unfinished"
    assert told["<bad>"]["note"] == "metrics.jsonl, line 1: it cannot be read"
    assert (told["<bad>"]["status"], told["<bad>"]["seed"]) == ("damaged", "3")
    assert told["none"]["note"] == "no metrics yet; it ended before it wrote its config"
    assert (told["none"]["seed"], told["none"]["of"]) == ("", "")
    assert Cells(text).rows == tables["runs"]
    assert "<bad>" not in text and "3 runs: 1 damaged, 2 unfinished" in text
    assert text.count("<p>Nothing yet.</p>") == 2


@pytest.mark.parametrize(
    ("number", "parts"),
    [
        (0.123456, ("0.1234", "56")), (123.456, ("123.4", "56")), (0.00123456, ("0.001234", "56")),
        (70.123456, ("70.12", "3456")), (12345.678, ("12345.6", "78")), (0.5, ("0.5", "")),
        (1.5e-7, ("1.5e-07", "")),
        (float("inf"), ("inf", "")), (-0.123456, ("-0.1234", "56")), (-12.34567, ("-12.34", "567")),
    ],
)  # fmt: skip
def test_a_long_number_is_cut_after_four_digits_and_stays_whole(number, parts):
    assert html_report._split_digits(repr(number)) == parts
    assert re.sub("<.*?>", "", html_report._cell(number, False)) == repr(number)


def test_nothing_is_written_without_matplotlib(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    folder = two_runs(tmp_path / "sweep")
    assert tiny.dmf("report", f"--output={tmp_path}/out", folder) == 2
    assert "pip install 'dmf-jax[report]'" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["RUN", "flow=RUN/config.json"], "flow=RUN/config.json: there is no such directory"),
        (["RUN", "--metric=fid"], "--metric=fid: a report of runs shows all"),
        (["EMPTY"], "EMPTY: it is no run and holds none"),
    ],
)
def test_what_cannot_be_reported_is_one_line(tmp_path, capsys, arguments, named):
    run, empty = write(tmp_path / "run"), tmp_path / "empty"
    empty.mkdir()
    filled = [a.replace("RUN", str(run)).replace("EMPTY", str(empty)) for a in arguments]
    assert tiny.dmf("report", f"--output={tmp_path}/out", *filled) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert named.replace("RUN", str(run)).replace("EMPTY", str(empty)) in line
    assert not (tmp_path / "out").exists()


def test_a_line_keeps_its_colour_in_every_panel(monkeypatch):
    drawn = []
    monkeypatch.setattr(plots, "to_png", lambda figure: drawn.append(figure) or b"")
    found = {"loss": {"a": [(1, 2.0)], "b": [(1, 200.0)]}, "fid": {"b": [(1, 3.0)]}}
    plots.plot_panels(found, ["a", "b"], "training step")
    loss, fid = drawn[0].axes
    assert [line.get_color() for line in loss.lines] == ["C0", "C1"]
    assert [line.get_color() for line in fid.lines] == ["C1"]
    assert (loss.get_yscale(), fid.get_yscale()) == ("log", "linear")
    assert [text.get_text() for text in drawn[0].legends[0].get_texts()] == ["a", "b"]
