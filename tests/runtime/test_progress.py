"""Progress as lines, as one live line in a terminal, and as little as one wants."""

import io
import re
import threading
import time
import types

import pytest

from dmf.runtime import progress
from dmf.runtime.progress import Clock, Progress, Verbosity, waiting

ERASE = "\r\x1b[K"


class Terminal(io.StringIO):
    """Standard error that is a terminal."""

    def isatty(self):
        return True


@pytest.fixture
def printed(monkeypatch):
    """What is printed to a terminal of 20 columns; the live line may change at once."""
    screen = types.SimpleNamespace(stderr=Terminal())
    monkeypatch.setattr(progress, "sys", screen)
    monkeypatch.setattr(progress, "_SCREEN", progress._Screen())
    monkeypatch.setattr(progress, "LIVE_SECONDS", 0.0)
    monkeypatch.setenv("COLUMNS", "20")
    monkeypatch.setenv("TERM", "xterm")
    return lambda: screen.stderr.getvalue()


def test_a_line_stands_above_the_live_line(printed):
    progress.show("step 1")
    progress.log("a line")
    progress.show("step 2")
    progress.end_live_line()
    progress.log("the end")
    assert printed() == (
        f"step 1{ERASE}a line\nstep 1{ERASE}step 2{ERASE}the end\n"
    )


def test_the_live_line_fits_into_the_terminal(printed):
    progress.show("step 1/1000  time left 1:00")
    assert printed() == "step 1/1000  time l"


def test_the_live_line_changes_a_few_times_a_second(printed, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(progress, "LIVE_SECONDS", 0.1)
    monkeypatch.setattr(progress.time, "perf_counter", lambda: now[0])
    for step in range(5):
        progress.show(f"{step}")
        now[0] += 0.06
    assert printed() == f"0{ERASE}2{ERASE}4"


@pytest.mark.parametrize(("verbosity", "expected"), [
    (Verbosity.NORMAL, f"live{ERASE}"), (Verbosity.VERBOSE, f"live{ERASE}step 1\nlive{ERASE}"),
    (Verbosity.QUIET, ""),
])  # fmt: skip
def test_a_live_line_stands_for_the_lines_of_a_series(printed, verbosity, expected):
    progress.set_verbosity(verbosity)
    progress.show("live")
    progress.log_step("step 1")
    progress.end_live_line()
    assert printed() == expected


@pytest.mark.parametrize("term", ["", "dumb"])
def test_without_a_terminal_there_are_lines_alone(printed, monkeypatch, term):
    monkeypatch.setenv("TERM", term or "xterm")
    if not term:
        monkeypatch.setattr(progress.sys, "stderr", io.StringIO())
    progress.show("live")
    progress.log_step("step 1")
    assert printed() == "step 1\n"


def test_quiet_prints_errors_alone(printed):
    progress.set_verbosity(Verbosity.QUIET)
    progress.log("a line")
    progress.log("an error", always=True)
    assert printed() == "an error\n"


def test_the_progress_of_some_work_ends_with_a_line(printed, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    work = Progress("samples", 0, 4, "images")
    work.add(1)
    work.add(3)
    assert printed().startswith("samples: 1/4 images  time left ")
    *_, last = printed().split(ERASE)
    assert last.startswith("samples: 4/4 images  ")
    assert last.endswith(" images/s  time left 0:00\n")
    assert printed().count("\n") == 1


def test_a_long_call_says_how_long_it_has_taken():
    lines, thrice = [], threading.Event()

    def write(line):
        lines.append(line)
        if len(lines) == 3:
            thrice.set()

    with waiting("compiling", write, after=0.01, every=0.02):
        assert thrice.wait(60)
    assert all(re.fullmatch(r"compiling: \d+:\d\d so far", line) for line in lines)
    count = len(lines)
    time.sleep(0.05)
    assert len(lines) == count


def test_a_short_call_says_nothing():
    lines = []
    with waiting("compiling", lines.append, after=5.0):
        pass
    assert lines == []


def test_time_left_is_that_of_the_mean_rate(monkeypatch):
    now = 100.0
    monkeypatch.setattr(time, "perf_counter", lambda: now)
    clock = Clock(done=10, total=110)
    now = 150.0
    assert clock.rate(20) == 0.2
    assert clock.time_left(20) == "7:30"
