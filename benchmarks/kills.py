"""A tiny run that is killed at random moments, and compared with an uninterrupted run."""

import collections
import contextlib
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import threading
import time
from multiprocessing import forkserver
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import numpy as np
import orbax.checkpoint as ocp

from dmf.checkpoints import manager
from dmf.checkpoints.params import CHECKPOINTS, latest_step
from dmf.cli import train as train_verb
from dmf.cli.exit_codes import run as run_verb
from dmf.runtime import progress
from dmf.training import loop, metrics_writer

ROOT = Path(__file__).resolve().parents[1]
TINY = {"model.depth": 2, "model.width": 32, "model.heads": 2, "data.batch_size": 16,
        "emas.main.decay": 0.5, "run.log_every": 1, "run.sample_every": 0,
        "run.checkpoint_every": 2, "run.keep_last": 2}  # fmt: skip
# Phases in which a kill can hit: before the state is restored, until it is restored, until the
# first step is logged, after that, and while a checkpoint is partly written.
PHASES = ("starting", "restoring", "compiling the first step", "between saves", "saving")
# When a run is killed: at any time up to 1.3 times the time to the first checkpoint of the last
# start, or 0 to 30 ms after one of the first three checkpoints began to be written, or was written.
MOMENTS = ("saving", "any time", "saving", "saved")
# Text of the log line before the first step.
STARTED = "train state per device"
LAST_STEPS = 20
HANG_SECONDS = 300
MANY_STEPS = 10**6
FIRST_START_SECONDS = 10.0
SPEED_METRICS = ("steps_per_second", "images_per_second", "mfu", "data_wait_fraction", "wall_time")


def is_equal(a: Any, b: Any) -> bool:
    """Whether two trees have the same bits."""
    if jax.tree.structure(a) != jax.tree.structure(b):
        return False
    pairs = zip(*(map(np.asarray, jax.tree.leaves(tree)) for tree in (a, b)), strict=True)
    return all((x.dtype, x.shape, x.tobytes()) == (y.dtype, y.shape, y.tobytes())
               for x, y in pairs)


def arrays(folder: Path) -> dict[str, np.ndarray]:
    """Every array of every item of a checkpoint, read with Orbax alone."""
    by_name = {}
    with ocp.StandardCheckpointer() as checkpointer:
        for item in sorted(path.parent for path in folder.glob("*/_METADATA")):
            leaves, _ = jax.tree_util.tree_flatten_with_path(checkpointer.restore(item))
            by_name |= {item.name + jax.tree_util.keystr(path): x for path, x in leaves}
    return by_name


def _arguments(workdir: Path, steps: int) -> list[str]:
    fields = [f"--config.{name}={value}" for name, value in (TINY | {"run.steps": steps}).items()]
    return [f"--config={ROOT}/configs/default.py", f"--workdir={workdir}", *fields]


def _exit_with_parent() -> None:
    multiprocessing.parent_process().join()
    os.kill(os.getpid(), signal.SIGKILL)


def _train(arguments: list[str], log: Path) -> None:
    """Trains in a process of its own; logs also when it begins to restore."""
    os.setsid()
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    with log.open("w") as file:
        os.dup2(file.fileno(), 2)
    restore = manager.CheckpointManager.restore

    def logged_restore(*arguments: Any) -> Any:
        progress.log("restoring")
        return restore(*arguments)

    with mock.patch.object(manager.CheckpointManager, "restore", logged_restore):
        sys.exit(run_verb(train_verb.main, "train", arguments))


def _partial(workdir: Path) -> set[str]:
    """The names of the partly written checkpoints of a run."""
    folder = workdir / CHECKPOINTS
    return {path.name for path in folder.glob("*.orbax-checkpoint-tmp*")}


class Kills:
    """A run below `folder` that is killed again and again.

    Attributes:
      hits: number of kills in each of `PHASES`.
      half_written: number of partly written checkpoints that kills left.
      cleaned: number of those that a later start removed.
      steps: number of steps of the whole run.
      arrays: number of arrays that were compared at the end.
    """

    def __init__(self, folder: Path, draw: random.Random):
        self.hits: collections.Counter[str] = collections.Counter()
        self.half_written = self.cleaned = self.steps = self.arrays = 0
        self._workdir, self._whole, self._log = folder / "killed", folder / "whole", folder / "log"
        self._draw, self._length = draw, FIRST_START_SECONDS
        path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
        self._environment = os.environ | {
            "JAX_COMPILATION_CACHE_DIR": str(folder / "compiled"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "PYTHONPATH": path,
            "PYTHONWARNINGS": "ignore:resource_tracker",  # Killed processes leave semaphores.
        }
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload([__name__, loop.__name__, "tensorboardX"])
        with mock.patch.dict(os.environ, self._environment):
            forkserver.ensure_running()

    def _start(self, steps: int) -> Any:
        self._log.write_text("")
        arguments = _arguments(self._workdir, steps), self._log
        process = self._context.Process(target=_train, args=arguments)
        process.start()
        return process

    def kill(self, when: str) -> None:
        """Starts the run, kills it at a random moment, and counts the phase that the kill hit.

        Args:
          when: one of `MOMENTS`.

        Raises:
          RuntimeError: the run ended before it was killed.
        """
        before, gone, seen, began = _partial(self._workdir), set(), set(), time.monotonic()
        process = self._start(MANY_STEPS)
        saves, until = self._draw.randint(1, 3), began + HANG_SECONDS
        if when == "any time":
            until = began + self._draw.uniform(0, 1.3 * self._length)
        while process.is_alive() and time.monotonic() < until:
            now = _partial(self._workdir)
            gone |= before - now
            if when != "any time" and STARTED in self._log.read_text():
                if now and not seen:
                    self._length = time.monotonic() - began
                seen |= now
                if len(seen if when == "saving" else seen - now) >= saves:
                    time.sleep(self._draw.uniform(0, 0.03))
                    break
            time.sleep(0.001)
        with contextlib.suppress(ProcessLookupError):  # The group is made after the process.
            os.killpg(process.pid, signal.SIGKILL)
        process.kill()
        process.join()
        log, left = self._log.read_text(), _partial(self._workdir)
        if process.exitcode != -signal.SIGKILL:
            raise RuntimeError(f"the run ended by itself with {process.exitcode}: {log}")
        gone |= before - left
        self.cleaned += len(gone)
        self.half_written += len(left - (before - gone))
        marks = {"saving": left - (before - gone), "between saves": "\nstep " in log,
                 PHASES[2]: STARTED in log, "restoring": "restoring" in log}
        self.hits[next((phase for phase, here in marks.items() if here), PHASES[0])] += 1

    def end(self) -> list[str]:
        """Lets the run end; returns its differences to an uninterrupted run, a line each."""
        before = _partial(self._workdir)
        self.steps = (latest_step(self._workdir) or 0) + LAST_STEPS
        process = self._start(self.steps)
        process.join()
        if process.exitcode:
            return [f"the last start ended with {process.exitcode}: {self._log.read_text()}"]
        left = _partial(self._workdir)
        self.cleaned += len(before - left)
        command = [sys.executable, "-m", "dmf", "train", *_arguments(self._whole, self.steps)]
        subprocess.run(command, env=self._environment, check=True, capture_output=True)
        errors = [f"{name} was left" for name in sorted(left)]
        for path in (self._workdir / manager.DAMAGED).glob("*"):
            errors.append(f"a kill damaged the checkpoint of step {path.name}")
        return errors + self._differences()

    def _differences(self) -> list[str]:
        runs = self._workdir, self._whole
        killed, whole = (run / CHECKPOINTS / str(self.steps) for run in runs)
        actual, expected = arrays(killed), arrays(whole)
        self.arrays = len(expected)
        names = sorted(actual.keys() | expected.keys())
        errors = [f"{name} differs" for name in names
                  if not is_equal(actual.get(name), expected.get(name))]
        errors += [f"{name} differs" for name in ("position/metadata", "checksums/metadata")
                if (killed / name).read_bytes() != (whole / name).read_bytes()]
        rows = [[{name: value for name, value in row.items() if name not in SPEED_METRICS}
                 for row in metrics_writer.read_metrics(run)] for run in runs]
        if rows[0] != rows[1]:
            errors.append("metrics.jsonl differs")
        if [row["step"] for row in rows[0]] != list(range(1, self.steps + 1)):
            errors.append("metrics.jsonl has not every step once")
        return errors
