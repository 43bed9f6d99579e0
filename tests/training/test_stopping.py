"""Runs that are told to stop, and workdirs that have one owner."""

import json
import math
import os
import signal

import overflowing_sampler
import pytest
import small_network

from dmf.checkpoints.params import latest_step
from dmf.errors import InputError, Stopped
from dmf.training import callbacks
from dmf.training.loop import train
from dmf.training.metrics_writer import read_metrics

pytestmark = pytest.mark.usefixtures("small_network_registered")


@pytest.fixture
def during(monkeypatch):
    """Sets what happens after the second step of a run."""
    def set_action(act):
        monkeypatch.setattr(callbacks.SampleGridCallback, "__call__",
                            lambda self, step, state: act() if step == 2 else None)  # fmt: skip
    return set_action


def config():
    return small_network.config({"run.sample_every": 2, "run.checkpoint_every": 0})


@pytest.mark.usefixtures("sighup_not_ignored")
@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGINT])
def test_a_run_that_is_told_to_stop_has_saved(tmp_path, during, number):
    during(lambda: os.kill(os.getpid(), number))
    with pytest.raises(Stopped, match="told to stop at step 3 of 8: saved"):
        train(config(), tmp_path / "run")
    assert latest_step(tmp_path / "run") == 3
    during(lambda: None)
    assert int(train(config(), tmp_path / "run").step) == 8
    stopped, whole = ({row["step"]: row["loss"] for row in read_metrics(workdir) if "loss" in row}
                      for workdir in (tmp_path / "run", small_network.run()))
    assert list(stopped) == [2, 3, 4, 6, 8]
    assert (stopped[3] + stopped[4]) / 2 == pytest.approx(whole[4], rel=1e-5)


def test_the_grid_of_the_step_of_a_stop_is_made_up_for(tmp_path, during, monkeypatch):
    every_step = config()
    every_step.run.sample_every = 1
    during(lambda: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(Stopped, match="told to stop at step 3 of 8: saved"):
        train(every_step, tmp_path)
    made = []
    monkeypatch.setattr(callbacks.SampleGridCallback, "__call__",
                        lambda self, step, state: made.append(step))  # fmt: skip
    train(every_step, tmp_path)
    assert made == [3, 4, 5, 6, 7, 8]
    (tmp_path / "samples").mkdir()
    (tmp_path / "samples/00000008.png").touch()
    train(every_step, tmp_path)
    assert made[-1:] == [8] and made.count(8) == 1


def test_a_workdir_in_which_a_run_is_training_is_refused(tmp_path, during):
    def meddle():
        with pytest.raises(InputError, match="^workdir=.*: another command is writing there, proc"):
            train(config(), tmp_path / "run")

    during(meddle)
    assert int(train(config(), tmp_path / "run").step) == 8
    assert not (tmp_path / "run" / ".lock").exists()


def test_samples_that_are_not_finite_make_no_grid_and_no_score_and_end_no_training(
    tmp_path, capsys
):
    fields = {"run.sample_every": 8, "sampling.sampler.name": "overflowing", "evaluation.every": 8,
              "evaluation.steps": (1,), "evaluation.metrics": ("fd_pixels",)}  # fmt: skip
    with overflowing_sampler.registered():
        for evaluated in (True, False):  # A run that goes on does not try again.
            assert int(train(small_network.config(fields), tmp_path).step) == 8
            said = capsys.readouterr().err
            assert "step 8: no grid of samples is written: " in said
            assert ("main, 1 step: 24 of images 0 to 23 hold NaN or infinity" in said) == evaluated
    assert not list((tmp_path / "samples").iterdir())
    (row,) = json.loads((tmp_path / "evaluations/00000008.json").read_text())["results"]
    assert math.isnan(row["fd_pixels"]) and row["steps"] == 1
    assert all(math.isfinite(value) for row in read_metrics(tmp_path) for value in row.values())
