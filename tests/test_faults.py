"""The campaign of faults in small; `python -m benchmarks.faults` runs it at length."""

import logging
import random

import pytest

from benchmarks import corruptions
from benchmarks.kills import MOMENTS, PHASES, Kills


# What Orbax's event loops say when they are dropped.
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_damaged_checkpoints_are_never_taken_for_what_was_saved(tmp_path, caplog):
    caplog.set_level(logging.CRITICAL, "asyncio")
    run = corruptions.Corruptions(tmp_path, random.Random(0))
    for how in corruptions.DAMAGES:
        run.corrupt(how)
    assert not run.errors
    outcomes = [outcome for (_, outcome), count in run.outcomes.items() for _ in range(count)]
    restored = [outcome for act, outcome in outcomes if act == "restore"]
    assert len(outcomes) == 2 * len(restored) == 2 * len(corruptions.DAMAGES)
    assert set(restored) <= {corruptions.AS_SAVED, corruptions.OLDER_STATE}


@pytest.mark.parametrize("how", corruptions.DAMAGES)
def test_a_damage_always_changes_something(tmp_path, how):
    for seed in range(20):
        folder = tmp_path / str(seed)
        (folder / "inner").mkdir(parents=True)
        for name in ("a", "inner/b"):
            (folder / name).write_bytes(bytes(range(9)))
        (folder / "empty").touch()
        before = contents(folder)
        said = corruptions.damage(folder, how, random.Random(seed))
        assert contents(folder) != before
        assert said.split()[0] in ("a", "inner", "inner/b", *(["empty"] * (how == "file removed")))


def contents(folder):
    return {path: path.is_file() and path.read_bytes() for path in folder.rglob("*")}


@pytest.mark.slow
def test_a_run_that_is_killed_often_is_the_run_that_never_was(tmp_path):
    kills = Kills(tmp_path, random.Random(0))
    for when in MOMENTS:
        kills.kill(when)
    assert kills.end() == []
    assert kills.hits["saving"] > 0
    assert sum(kills.hits[phase] for phase in PHASES) == len(MOMENTS)
