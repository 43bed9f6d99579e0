"""Runs as no run leaves them: they are told and shown as far as they can be, and end no report."""

import base64
import json
import os

import pytest
import tiny
from etils import epath
from matplotlib import cbook
from run_directories import evaluation, row, write

from dmf.experiments import evaluation_report, html_report, runs
from dmf.experiments.plots import plain

HUGE = int("9" * 400)


def text_file(name, text):
    """Puts a file with some text into a run."""

    def put(run):
        (run / name).parent.mkdir(exist_ok=True)
        (run / name).write_text(text)

    return put


def in_place_of(name):
    """Puts a file where a folder should be."""
    return lambda run: (run / name).write_text("")


def replaced_by_pipe(path):
    """A named pipe, which nobody writes to: who reads it waits for ever."""
    path.parent.mkdir(exist_ok=True)
    path.unlink(missing_ok=True)
    os.mkfifo(path)


def scored(**changes):
    """Puts an evaluation with some parts changed into a run."""
    one = evaluation({1: 2.0}) | changes
    return text_file("evaluations/00000008.json", json.dumps(one))


def rows(**changes):
    return scored(results=[evaluation({1: 2.0})["results"][0] | changes])


# What is put into a run, and what the report says of it; None where it says nothing.
ODD = {
    "large_metric": (text_file("metrics.jsonl", json.dumps(row(8, loss=HUGE)) + "\n"), "line 1"),
    "large_loss": (text_file("metrics.jsonl", json.dumps(row(8, loss=1e308))), None),
    "infinite": (text_file("metrics.jsonl", '{"step": 8, "loss": 1e999}'), None),
    "large_step": (text_file("metrics.jsonl", json.dumps({"step": 10**30, "loss": 1.0})), None),
    "deep_metrics": (text_file("metrics.jsonl", "[" * 50_000 + "\n"), "line 1"),
    "half_a_letter": (text_file("metrics.jsonl", '{"step": 8, "\\ud800": 1}\n'), "line 1"),
    "folder_of_metrics": (lambda run: (run / "metrics.jsonl").mkdir(), None),
    "pipe_of_metrics": (lambda run: replaced_by_pipe(run / "metrics.jsonl"), None),
    "pipe_of_scores": (
        lambda run: replaced_by_pipe(run / "evaluations/00000008.json"), "it is no evaluation",
    ),
    "deep_scores": (text_file("evaluations/00000008.json", "[" * 50_000), "it is no evaluation"),
    "step_of_scores": (scored(step={}), "it is no evaluation"),
    "large_scores": (rows(fd_pixels=HUGE), "it is no evaluation"),
    "text_scores": (rows(fd_pixels="2"), "it is no evaluation"),
    "sampling_steps": (rows(steps=10**30), "it is no evaluation"),
    "no_sampling_steps": (rows(steps=0), "it is no evaluation"),
    "ema": (rows(ema=3), "it is no evaluation"),
    "half_an_ema": (rows(ema="\ud800"), None),
    "protocol": (scored(protocol={"name": [], "metrics": ["fd_pixels"]}), "it is no evaluation"),
    "samples": (in_place_of("samples"), None),
    "name_of_a_grid": (text_file("samples/last.png", ""), "samples/last.png: it is no grid"),
    "no_picture": (text_file("samples/00000009.png", "secret"), "00000009.png: it is no grid"),
    "evaluations": (in_place_of("evaluations"), None),
    "checkpoint": (lambda run: (run / f"checkpoints/{'9' * 200}").mkdir(), None),
    "steps": (text_file("config.json", '{"format": 2, "run": {"steps": "a"}}'), "run.steps='a'"),
    "deep": (text_file("config.json", '{"a": ' * 20 + "1" + "}" * 20), "nested deeper"),
    "cost=$5 or $6^{": (None, None),
    "a|b<c>&\nd": (None, None),
    "_hidden": (None, None),
    os.fsdecode(b"caf\xe9"): (None, None),
}


def test_odd_runs_do_not_end_the_report_of_the_others(tmp_path, capsys):
    folder = tmp_path / "runs"
    write(folder / "good", metrics=[row(8)], evaluations=[evaluation({1: 0.125})], grid=True)
    for name, (put, _) in ODD.items():
        evaluations = [] if put else [evaluation({1: 3.0})]
        run = write(folder / name, metrics=[] if put else [row(8)], evaluations=evaluations)
        if put:
            put(run)
    assert tiny.dmf("report", f"--output={tmp_path}/report", folder) == 0
    page = (tmp_path / "report/report.html").read_text()
    assert "0.125" in page and "caf\\\\xe9" in page and "a|b\\u003cc>&\\nd" in page
    found = {run.name: run for run in runs.find_runs([folder])}
    assert len(found) == len(ODD) + 1
    assert found["good"].status == "complete"
    for name, (_, said) in ODD.items():
        run = found[os.fsencode(name).decode(errors="backslashreplace")]
        told = [damage for damage in run.damages if said and said in damage]
        assert len(told) == len(run.damages) == (said is not None), (name, run.damages)


@pytest.mark.parametrize("what", ["file", "folder"])
def test_a_link_puts_no_other_file_into_a_report(tmp_path, what):
    """Not even a picture of somebody who makes the report."""
    run = write(tmp_path / "run", metrics=[row(8)], grid=True)
    private = tmp_path / "private"
    private.mkdir()
    picture = (run / "samples/00000008.png").read_bytes() + b"private"
    (private / "00000009.png").write_bytes(picture)
    if what == "file":
        (run / "samples/00000009.png").symlink_to(private / "00000009.png")
    else:
        (run / "samples").rename(tmp_path / "samples")
        (run / "samples").symlink_to(private)
    found = runs.find_runs([run])
    assert base64.b64encode(picture).decode() not in html_report.page(found, tmp_path)
    assert found[0].damages == (
        "samples/00000009.png: it is no grid of this run, and is left out",
    )
    assert (found[0].grid is not None) == (what == "file")


@pytest.mark.parametrize("name", ["$5 and $6^{", "_hidden", r"\frac{", "a_b", "$"])
def test_names_are_shown_as_they_are(tmp_path, name):
    assert not cbook.is_math_text(plain(name))
    assert not plain(name).startswith("_")
    path = epath.Path(tmp_path) / "distance.png"
    evaluation_report.plot_metric(path, {name: evaluation({1: 2.0, 2: 1.0})}, "fd_pixels")
    assert path.exists()
