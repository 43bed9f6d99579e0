"""The page and the CSV files hold the numbers of the runs to the last digit, and need nothing."""

import base64
import collections
import csv
import html.parser
import io
import json
import shutil
import subprocess
import urllib.parse

import pytest
import tiny
from run_directories import evaluation, row, write

from dmf.experiments import html_report, plots, runs, tables

VALUES = {1: 0.1 + 0.2, 2: 2 / 3, 4: 1e-7 / 3}


class Tags(html.parser.HTMLParser):
    """The tags of a page, what they refer to, and the JSON in it."""

    def __init__(self, text):
        super().__init__()
        self.references, self.tags, self.open, self.data = [], set(), False, ""
        self.feed(text)
        self.data = json.loads(self.data)

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        self.references += [v for k, v in attributes if k in ("src", "href")]
        self.open = ("id", "data") in attributes

    def handle_data(self, data):
        if self.open:
            self.data += data


BROWSER = shutil.which("chromium") or shutil.which("google-chrome")


class Cells(html.parser.HTMLParser):
    """The text of every cell of a drawn page, row by row, and the number of elements by class."""

    def __init__(self, text):
        super().__init__()
        self.rows, self.open, self.classes = [], False, collections.Counter()
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.classes.update(dict(attributes).get("class", "").split())
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")
        if tag != "wbr":
            self.open = tag in ("td", "th")

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
    table = Tags(text).data["table"]
    assert table["columns"] == names and table["fields"] == 2
    shown = [["" if cell is None else str(cell) for cell in row] for row in table["rows"]]
    assert shown == lines
    assert names[:3] == ["run", "sampling.steps", "seed"]
    assert names[3].startswith("fd_pixels, 1 step")  # Scores follow the fields.
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
    run = two_runs(tmp_path / "sweep # 1") / "seed=1"
    for name in ("starts.json", "train.log"):
        (run / name).write_text("")
    text, _ = report(run.parent, tmp_path / "out")
    page = Tags(text)
    assert not page.tags & {"link", "iframe", "img"} and not page.references
    assert "default-src 'none'" in text and "url(" not in text and "@import" not in text
    assert "Permission is hereby granted" in text and "uPlot (v" in text
    first, second = page.data["runs"]
    picture = base64.b64decode(first["grid"].removeprefix("data:image/png;base64,"))
    assert picture == (run / "samples/00000008.png").read_bytes() and first["grid_step"] == 8
    assert second["grid"] is None and list(second["links"]) == ["config", "metrics"]
    files = ("config.json", "starts.json", "train.log", "metrics.jsonl", "samples/00000008.png")
    linked = [tmp_path / "out" / urllib.parse.unquote(link) for link in first["links"].values()]
    assert [path.resolve() for path in linked] == [run / name for name in files]


def test_all_that_was_logged_can_be_drawn_over_steps_and_wall_clock_time(tmp_path):
    rows = [row(step, error=step / 8, wall_time=1e9 + 900.0 * step) for step in (2, 4)]
    rows.append(row(6, loss=float("nan"), error=1e300))
    folder = tmp_path / "sweep"
    write(folder / "a", {"seed": 1}, metrics=[*rows, row(8, error=0.5)])
    write(folder / "b", {"seed": 2}, metrics=[row(step) for step in range(1, 5001)])
    data = html_report.page_data(runs.find_runs([folder]), tmp_path)
    curves = {curve["title"]: curve["lines"] for curve in data["curves"]}
    assert list(curves) == [
        "loss", "gradient_norm", "steps_per_second", "images_per_second", "error"
    ]
    assert curves["error"] == {0: [[2, 4, 8], [0.25, 0.5, 0.5]]}
    assert curves["loss"][0] == [[2, 4, 8], [0.5, 0.25, 0.125]]
    assert data["runs"][0]["hours"] == {2: 0.0, 4: 0.5} and data["runs"][1]["hours"] == {}
    steps, losses = curves["loss"][1]
    assert data["thinned"] and len(steps) <= 2000 and (steps[0], steps[-1]) == (1, 5000)
    assert (losses[0], losses[-1]) == (1.0, 1 / 5000) and steps == sorted(steps)


@pytest.mark.slow
@pytest.mark.skipif(not BROWSER, reason="it needs Chromium")
def test_a_browser_draws_the_page(tmp_path):
    report(two_runs(tmp_path / "sweep"), tmp_path / "out")
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr",
               f"--user-data-dir={tmp_path}/profile", "--virtual-time-budget=2000", "--dump-dom",
               f"file://{tmp_path}/out/report.html"]  # fmt: skip
    drawn = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    assert "CONSOLE" not in drawn.stderr  # No exception, and nothing that the policy refuses.
    page = Cells(drawn.stdout)
    head, first, second = page.rows
    assert head[:4] == ["run", "sampling.steps", "seed", "fd_pixels"]
    assert first[:6] == ["seed=1", "[1, 2]", "1", "0.3", "0.6667", "3.333e-8"]
    assert second[:4] == ["seed=2", "[1, 3]", "2", "0.5"]
    # The loss, the gradient norm, and two metrics of the evaluations.
    assert page.classes["uplot"] == 4 and page.classes["best"] == 2


def test_a_spike_survives_thinning():
    line = [(step, 100.0 if step == 7777 else 1.0) for step in range(10_000)]
    thin = html_report._thinned(line)
    assert (7777, 100.0) in thin and len(thin) <= 2000


@pytest.mark.parametrize("count", [1, 2000, 2001, 2003, 9_999])
def test_the_first_and_the_last_value_survive_thinning(count):
    line = [(step, float(step % 7)) for step in range(count)]
    line[0], line[-1] = (0, 2.5), (count - 1, 3.5)
    thin = html_report._thinned(line)
    assert (thin[0], thin[-1]) == (line[0], line[-1]) and thin == sorted(thin)
    assert thin == line if count <= 2000 else len(thin) <= 2000


def test_of_curves_those_of_evaluations_say_whether_more_is_better(tmp_path):
    keys = ("evaluation/label_agreement/main/1", "evaluation/fd_pixels/main/1")
    rows = [row(8, label_agreement=0.5, **dict.fromkeys(keys, 0.5))]
    write(tmp_path / "run", metrics=rows, evaluations=[evaluation(VALUES)])
    curves = html_report.page_data(runs.find_runs([tmp_path]), tmp_path)["curves"]
    assert {curve["title"] for curve in curves if curve["higher"]} == {"label_agreement/main/1"}


def test_scores_have_a_line_for_each_run_and_ema(tmp_path):
    found = runs.find_runs([two_runs(tmp_path / "sweep")])
    data = html_report.page_data(found, tmp_path)
    distance, _ = data["scores"]
    assert (distance["title"], distance["protocol"]) == (
        "fd_pixels", "[pixels, 72 samples, against digits]"
    )
    lines = [(line["run"], line["x"], line["y"]) for line in distance["lines"]]
    assert lines == [(0, [1, 2, 4], list(VALUES.values())), (1, [1], [0.5])]
    higher = data["table"]["higher"]
    column = "label_agreement, 1 step, main [pixels, 72 samples, against digits]"
    assert higher[column] and not higher[column.replace("label_agreement", "fd_pixels")]
    assert not higher["loss"] and higher["steps_per_second"]


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
    assert "<bad>" not in text and "3 runs: 1 damaged, 2 unfinished" in text
    assert [run["name"] for run in Tags(text).data["runs"]] == ["<bad>", "new", "none"]


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
    plots.plot_panels(found, ["a", "b"], "guidance scale")
    loss, fid = drawn[0].axes
    assert [line.get_color() for line in loss.lines] == ["C0", "C1"]
    assert [line.get_color() for line in fid.lines] == ["C1"]
    assert (loss.get_yscale(), fid.get_yscale()) == ("log", "linear")
    assert [text.get_text() for text in drawn[0].legends[0].get_texts()] == ["a", "b"]
