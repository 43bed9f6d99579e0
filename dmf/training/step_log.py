"""The metrics of training steps, averaged: for the writers, and as a line on standard error."""

import math
import platform

import jax

from dmf.checkpoints.manager import CheckpointManager
from dmf.runtime import processes, progress
from dmf.runtime.device_specs import GIB, mfu
from dmf.runtime.progress import Clock
from dmf.training import build
from dmf.training.callbacks import is_due
from dmf.training.data_wait import DataWait
from dmf.training.metric_accumulator import MetricAccumulator, Report
from dmf.training.writers import Writers
from dmf.types import Metrics

# Every process logs a line of its own if its devices wait for data for more than this fraction.
LOGGED_WAIT = 0.1


class StepLog:
    """Logs the metrics of training steps, averaged, with the speed of training."""

    def __init__(
        self,
        training: build.Training,
        checkpoints: CheckpointManager,
        writers: Writers,
        data_wait: DataWait,
        start: int,
    ):
        """Starts at a step.

        Args:
          training: recipe, data loader and settings of the run.
          checkpoints: the checkpoint manager, whose newest step error messages name.
          writers: receive the metrics.
          data_wait: measures how long the devices wait for data.
          start: the step that the run starts or resumes at.
        """
        self._training, self._writers, self._data_wait = training, writers, data_wait
        self._total = training.run.steps
        self._latest: list[str] = []
        self._clock = Clock(start, self._total)
        self._accumulator = MetricAccumulator(
            lambda: checkpoints.latest_step, training.recipe.optimizer.skip_nonfinite
        )

    def start_clock(self, start: int) -> None:
        """Measures the speed from now on, without the compilation."""
        self._clock = Clock(start, self._total)
        self._data_wait.restart()

    def _due(self, step: int) -> bool:
        return is_due(step, self._training.run.log_every, self._total)

    def add(self, step: int, metrics: Metrics, *, saved: bool, up_to_date: bool) -> None:
        """Adds the metrics of a step, and logs what is due.

        A step is logged after the next one was dispatched, so that the device never waits. With
        `up_to_date`, before a save, it is logged now, so that no state is saved whose loss is not
        finite. With `saved`, before a checkpoint, a report is due, so that each step is in one
        report also where the run resumes there.

        Raises:
          RunError: the loss of a step is not finite.
        """
        self._accumulator.add(step, metrics, report=saved or self._due(step))
        ready = step if up_to_date else step - 1
        if up_to_date or self._due(ready):
            for report in self._accumulator.read(ready):
                self._log(report)
        self.show(step)

    def show(self, step: int) -> None:
        """Shows the step that was dispatched last in the live line of a terminal, with the loss and
        the speed of the last report."""
        if not progress.has_live_line():
            return
        parts = [f"step {step}/{self._total}", f"time left {self._clock.time_left(step)}",
                 *self._latest, *_device_memory()]  # fmt: skip
        processes.show("  ".join(parts))

    def _log(self, report: Report) -> None:
        """Writes and prints the mean metrics since the last report, the speed, and the fraction of
        the time for which the devices waited for data."""
        step, means, skipped = report
        loader, speed = self._training.data_loader, self._speed(step)
        means["epoch"] = step * loader.batch_size / len(loader.dataset)
        self._writers.write(step, means | speed)
        loss = f"loss {means.get('loss', math.nan):.4f}"
        rate = [f"{speed['steps_per_second']:.2f} steps/s",
                f"{speed['images_per_second']:.0f} images/s",
                *([f"MFU {speed['mfu']:.1%}"] if "mfu" in speed else [])]  # fmt: skip
        self._latest = [loss, *rate]
        parts = [
            f"step {step}/{self._total}",
            loss,
            f"gradient norm {means.get('gradient_norm', math.nan):.3g}",
            *([f"skipped {len(skipped)} (last: step {skipped[-1]})"] if skipped else []),
            *rate,
            f"time left {self._clock.time_left(step)}",
        ]
        (processes.log if step == self._total else processes.log_step)("  ".join(parts))
        if speed["data_wait_fraction"] > LOGGED_WAIT:
            processes.log(f"host {platform.node()}: its devices waited for data "
                          f"{speed['data_wait_fraction']:.0%} of the time; docs/data.md says what "
                          "a host can read", each=True)

    def _speed(self, step: int) -> dict[str, float]:
        """The speed since the last report, and the fraction of the time for which the devices
        waited for data. The MFU counts the operations of `Objective.flops`, without recomputation.
        """
        recipe = self._training.recipe
        steps_per_second = self._clock.rate(step)
        images_per_second = steps_per_second * recipe.batch_size
        speed = {"steps_per_second": steps_per_second, "images_per_second": images_per_second,
                 "data_wait_fraction": self._data_wait.fraction()}  # fmt: skip
        flops, devices = recipe.objective.flops(recipe.network), recipe.mesh.devices
        share = mfu(images_per_second * flops, devices.flat[0].device_kind, devices.size)
        return speed if share is None else speed | {"mfu": share}


def _device_memory() -> list[str]:
    """The peak memory of a device of this process, where it reports one, as part of a line."""
    stats = jax.local_devices()[0].memory_stats() or {}
    peak = stats.get("peak_bytes_in_use")
    return [] if peak is None else [f"memory {peak / GIB:.1f} GiB"]
