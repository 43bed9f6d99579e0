"""What directories tell: which are runs, what they are called, how they stand, what is damaged."""

import json
import shutil

import pytest
import tiny
from run_directories import evaluation, row, write

from dmf.errors import InputError
from dmf.experiments import local_launcher, runs


def only(directory):
    (found,) = runs.find_runs([directory])
    return found


def test_a_run_that_was_trained_is_read_as_it_is():
    run = only(tiny.flow_run())
    assert (run.status, run.step, run.total_steps, run.damages) == ("complete", 8, 8, ())
    lines = (tiny.flow_run() / "metrics.jsonl").read_text().splitlines()
    assert list(run.metrics) == [json.loads(line) for line in lines]
    assert run.last_value("loss") == run.metrics[-1]["loss"]
    assert run.grid == tiny.flow_run() / "samples/00000008.png"
    assert run.config["model.width"] == 32


def test_runs_are_directories_or_lie_in_them_in_natural_order(tmp_path):
    for name in ("depth=10", "depth=9", "depth=9,b"):
        write(tmp_path / "one" / name)
    write(tmp_path / "two/depth=9")
    (tmp_path / "one/slurm").mkdir()
    write(tmp_path / "one/export")
    (tmp_path / "one/export/params").mkdir()
    names = [run.name for run in runs.find_runs([tmp_path / "one"])]
    assert names == ["depth=9", "depth=9,b", "depth=10"]
    both = [tmp_path / "two", tmp_path / "one", tmp_path / "one/depth=10"]
    assert [run.name for run in runs.find_runs(both)] == [
        "one/depth=9", "one/depth=9,b", "one/depth=10", "two/depth=9"
    ]
    for rate in ("0.001", "0.01", "0.002", "1e-05"):
        write(tmp_path / "rates" / rate)
    rates = [run.name for run in runs.find_runs(sorted((tmp_path / "rates").iterdir()))]
    assert rates == ["1e-05", "0.001", "0.002", "0.01"]
    assert only(tmp_path / "two").name == only(tmp_path / "two/depth=9").name == "depth=9"


def test_runs_in_a_bucket_and_here_are_called_by_their_paths():
    """And runs of one kind by their paths from the folder that has all of them."""
    assert runs._names(["gs://bucket/a", "/runs/a"]) == ["gs://bucket/a", "/runs/a"]
    assert runs._names(["gs://bucket/a/1", "gs://bucket/b/1"]) == ["a/1", "b/1"]
    assert runs._names(["gs://one/a", "gs://two/a"]) == ["one/a", "two/a"]


@pytest.mark.parametrize("name", ["nowhere", "empty", "export"])
def test_a_directory_without_a_run_is_refused(tmp_path, name):
    (tmp_path / "empty").mkdir()
    write(tmp_path / "export")
    (tmp_path / "export/params").mkdir()
    with pytest.raises(InputError, match=f"{name}: it is no run and holds none"):
        runs.find_runs([tmp_path / name])


EVERY = {"evaluation.every": 4}


@pytest.mark.parametrize(
    ("made", "status"),
    [
        ({}, "complete"),
        ({"step": 4}, "unfinished"),
        ({"step": 0}, "unfinished"),
        ({"step": 4, "log": f"why\n{local_launcher.FAILURE_LINE} 1\n"}, "failed"),
        ({"step": 4, "log": f"why\n{local_launcher.FAILURE_LINE} 1\ngoing on\n"}, "unfinished"),
        ({"step": 8, "log": f"why\n{local_launcher.FAILURE_LINE} 1\n"}, "complete"),
        ({"overrides": EVERY}, "unfinished"),
        ({"overrides": EVERY, "evaluations": [evaluation({1: 2.0}, step=4)]}, "unfinished"),
        ({"overrides": EVERY, "evaluations": [evaluation({1: 2.0})]}, "complete"),
        ({"overrides": EVERY, "step": 12}, "complete"),
    ],
)
def test_how_a_run_stands(tmp_path, made, status):
    assert only(write(tmp_path / "run", **made)).status == status


def test_a_run_that_failed_before_it_had_a_config(tmp_path):
    write(tmp_path / "good")
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad/train.log").write_text(f"dmf train: why\n{local_launcher.FAILURE_LINE} 2\n")
    bad, _ = runs.find_runs([tmp_path])
    assert (bad.name, bad.status, bad.step, bad.total_steps) == ("bad", "failed", 0, None)


def test_a_last_line_that_was_cut_short_is_no_damage_and_another_is(tmp_path):
    run = write(tmp_path / "run", metrics=[row(2), row(4), row(6)])
    text = (run / "metrics.jsonl").read_text()
    (run / "metrics.jsonl").write_text(text[:-9])
    assert only(run).status == "complete"
    assert [r["step"] for r in only(run).metrics] == [2, 4]
    lines = text.splitlines(keepends=True)
    for bad in (b'{"st\xff\xfe\n', b"[1]\n", b'{"loss": 1}\n', b'{"step": 3, "loss": "x"}\n'):
        (run / "metrics.jsonl").write_bytes(lines[0].encode() + bad + lines[2].encode())
        found = only(run)
        assert found.damages == ("metrics.jsonl, line 2: it cannot be read",)
        assert found.status == "damaged"
        assert [r["step"] for r in found.metrics] == [2, 6]


@pytest.mark.parametrize(
    ("name", "text", "named"),
    [
        ("config.json", "{", "config.json: it is damaged"),
        ("config.json", '{"format": 99}', "its format is 99"),
        ("evaluations/00000008.json", "{", "evaluations/00000008.json: it is no evaluation"),
        ("evaluations/00000008.json", '{"protocol": "pixels"}', "it is no evaluation"),
        ("evaluations/00000008.json", '{"results": 3}', "it is no evaluation"),
    ],
)
def test_damaged_files_are_told_and_the_rest_is_taken(tmp_path, name, text, named):
    evaluations = [evaluation({1: 2.0}, step=4), evaluation({1: 3.0})]
    run = write(tmp_path / "run", metrics=[row(2)], evaluations=evaluations)
    (run / name).write_text(text)
    found = only(run)
    assert found.status == "damaged"
    (damage,) = found.damages
    assert named in damage
    assert len(found.metrics) == 1 and 4 in found.evaluations


def test_an_evaluation_of_its_own_counts_where_training_made_none(tmp_path):
    run = write(tmp_path / "run")
    (run / "evaluation.json").write_text(json.dumps(evaluation({1: 5.0}, step=8)))
    assert only(run).evaluations[8]["results"][0]["fd_pixels"] == 5.0
    shutil.rmtree(run)
    write(run, evaluations=[evaluation({1: 6.0}, step=4)])
    (run / "evaluation.json").write_text(json.dumps(evaluation({1: 5.0}, step=8)))
    assert list(only(run).evaluations) == [4]
