"""Runs that are told to stop, and workdirs that have one owner."""

import os
import signal

import overflowing_sampler
import pytest
import small_network

from dmf.checkpoints.params import latest_step
from dmf.errors import InputError, Stopped
from dmf.training import callbacks
from dmf.training.loop import train

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


def test_a_workdir_in_which_a_run_is_training_is_refused(tmp_path, during):
    def meddle():
        with pytest.raises(InputError, match="^workdir=.*: another command is writing there, proc"):
            train(config(), tmp_path / "run")

    during(meddle)
    assert int(train(config(), tmp_path / "run").step) == 8
    assert not (tmp_path / "run" / ".lock").exists()


def test_samples_that_are_not_finite_make_no_grid_and_end_no_training(tmp_path, capsys):
    with overflowing_sampler.registered():
        fields = {"run.sample_every": 8, "sampling.sampler.name": "overflowing"}
        assert int(train(small_network.config(fields), tmp_path).step) == 8
    assert "step 8: no grid of samples is written: " in capsys.readouterr().err
    assert not list((tmp_path / "samples").iterdir())
