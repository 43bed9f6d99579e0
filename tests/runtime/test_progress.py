"""Long calls say how long they have taken, and short ones say nothing."""

import time

from dmf.runtime.progress import Clock, waiting


def test_a_long_call_says_how_long_it_has_taken():
    lines = []
    with waiting("compiling", lines.append, after=0.01, every=0.02):
        time.sleep(0.2)
    assert len(lines) >= 3
    assert set(lines) == {"compiling: 0:00 so far"}
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
