"""How long the devices wait for data: closed forms on a clock of the test."""

import itertools
import types

import pytest

from dmf.data import data_loader
from dmf.training import data_wait
from dmf.types import Batch

STEPS = 40


class Devices:
    """Devices that compute one step after the other, on a clock that moves where it is waited."""

    def __init__(self, seconds: float):
        self.seconds, self.now, self.free_at, self.steps = seconds, 0.0, 0.0, []

    def dispatch(self) -> "Step":
        self.free_at = max(self.now, self.free_at) + self.seconds
        self.steps.append(Step(self, self.free_at))
        return self.steps[-1]

    def wait_until(self, time: float) -> None:
        self.now = max(self.now, time)


class Step:
    """The outputs of a step."""

    def __init__(self, devices: Devices, done_at: float):
        self.devices, self.done_at = devices, done_at

    def block_until_ready(self) -> "Step":
        self.devices.wait_until(self.done_at)
        return self


class Batches(data_loader.Batches):
    """Batches that are read in a number of seconds each, without a pause."""

    def __init__(self, devices: Devices, seconds: float):
        self.devices = devices
        self.read_at = (seconds * i for i in itertools.count(1))
        self.next_at = next(self.read_at)

    def is_ready(self) -> bool:
        return self.devices.now >= self.next_at

    def __next__(self) -> Batch:
        self.devices.wait_until(self.next_at)
        self.next_at = next(self.read_at)
        return Batch(None, None)


@pytest.mark.parametrize(
    ("compute", "read", "expected"), [(3.0, 4.0, 1 / 4), (4.0, 3.0, 0.0), (1.0, 10.0, 9 / 10)]
)
def test_what_is_counted_is_the_time_in_which_the_devices_have_nothing_to_do(
    monkeypatch, compute, read, expected
):
    devices = Devices(compute)
    clock = types.SimpleNamespace(perf_counter=lambda: devices.now)
    monkeypatch.setattr(data_wait, "time", clock)
    wait = data_wait.DataWait(Batches(devices, read))
    wait.next_batch()
    wait.restart()
    for _ in range(STEPS):
        wait.dispatched(devices.dispatch())
        wait.next_batch()
    assert wait.fraction() == pytest.approx(expected, abs=0.01)
    assert devices.now == pytest.approx(STEPS * max(compute, read), rel=0.1)
    assert wait.fraction() == 0


def test_the_loop_is_never_far_ahead_of_the_devices(monkeypatch):
    devices = Devices(1.0)
    wait = data_wait.DataWait(Batches(devices, 0.0))
    for _ in range(STEPS):
        wait.next_batch()
        wait.dispatched(devices.dispatch())
        assert sum(step.done_at > devices.now for step in devices.steps) <= 2
