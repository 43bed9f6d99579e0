"""A tiny run that is killed at random moments, and is compared with one that was not."""

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

from dmf import checkpoint, cli, logs, training
from dmf.cli import train as verb

ROOT = Path(__file__).resolve().parents[1]
TINY = {"model.depth": 2, "model.width": 32, "model.heads": 2, "data.batch_size": 16,
        "emas.main.decay": 0.5, "run.log_every": 1, "run.sample_every": 0,
        "run.checkpoint_every": 2, "run.keep_last": 2}  # fmt: skip
# Where a kill can hit: before the state is asked for, until it is there, until the first report,
# after it, and while a checkpoint is half written.
PHASES = ("starting", "restoring", "compiling the first step", "between saves", "saving")
# When a run is killed: at any time up to 1.3 times what a start last took to its first checkpoint,
# or 0 to 30 ms after one of its first three began to be written, or was written.
WHENS = ("saving", "any time", "saving", "saved")
LAST_STEPS = 20
HANG_SECONDS = 300
GOES_ON = 10**6
FIRST_START_SECONDS = 10.0
SPEED = ("steps_per_second", "images_per_second", "share_of_peak")


def same(a: Any, b: Any) -> bool:
    """Whether two trees hold the same bits."""
    if jax.tree.structure(a) != jax.tree.structure(b):
        return False
    pairs = zip(*(map(np.asarray, jax.tree.leaves(tree)) for tree in (a, b)), strict=True)
    return all((x.dtype, x.shape, x.tobytes()) == (y.dtype, y.shape, y.tobytes())
               for x, y in pairs)


def arrays(folder: Path) -> dict[str, np.ndarray]:
    """Every array of every item of a checkpoint, read with Orbax alone."""
    found = {}
    with ocp.StandardCheckpointer() as checkpointer:
        for item in sorted(path.parent for path in folder.glob("*/_METADATA")):
            leaves, _ = jax.tree_util.tree_flatten_with_path(checkpointer.restore(item))
            found |= {item.name + jax.tree_util.keystr(path): x for path, x in leaves}
    return found


def _arguments(workdir: Path, steps: int) -> list[str]:
    fields = [f"--config.{name}={value}" for name, value in (TINY | {"run.steps": steps}).items()]
    return [f"--config={ROOT}/configs/default.py", f"--workdir={workdir}", *fields]


def _end_with_the_campaign() -> None:
    multiprocessing.parent_process().join()
    os.kill(os.getpid(), signal.SIGKILL)


def _train(arguments: list[str], log: Path) -> None:
    """What a start does, in a process of its own; it also says when it begins to restore."""
    os.setsid()
    threading.Thread(target=_end_with_the_campaign, daemon=True).start()
    with log.open("w") as file:
        os.dup2(file.fileno(), 2)
    restore = checkpoint.Checkpoints.restore

    def told(*given: Any) -> Any:
        logs.say("restoring")
        return restore(*given)

    with mock.patch.object(checkpoint.Checkpoints, "restore", told):
        sys.exit(cli.run(verb.main, "train", arguments))


def _partial(workdir: Path) -> set[str]:
    """The half-written checkpoints of a run."""
    folder = workdir / checkpoint.CHECKPOINTS
    return {path.name for path in folder.glob("*.orbax-checkpoint-tmp*")}


class Kills:
    """A run below `folder`, and what came of killing it.

    Attributes:
      hit: how many kills hit each of `PHASES`.
      half_written: checkpoints that kills left half-written.
      cleaned: those of them that a later start removed.
      steps: of the whole run.
      arrays: that were compared at the end.
    """

    def __init__(self, folder: Path, draw: random.Random):
        self.hit: collections.Counter[str] = collections.Counter()
        self.half_written = self.cleaned = self.steps = self.arrays = 0
        self._workdir, self._whole, self._log = folder / "killed", folder / "whole", folder / "log"
        self._draw, self._length = draw, FIRST_START_SECONDS
        path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
        self._environment = os.environ | {
            "JAX_COMPILATION_CACHE_DIR": str(folder / "compiled"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "PYTHONPATH": path,
            "PYTHONWARNINGS": "ignore:resource_tracker",  # The killed leave semaphores to it.
        }
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload([__name__, training.__name__, "tensorboardX"])
        with mock.patch.dict(os.environ, self._environment):
            forkserver.ensure_running()

    def _start(self, steps: int) -> Any:
        self._log.write_text("")
        given = _arguments(self._workdir, steps), self._log
        process = self._context.Process(target=_train, args=given)
        process.start()
        return process

    def kill(self, when: str) -> None:
        """Starts the run, kills it at a random moment, and sees where that hit.

        Args:
          when: one of `WHENS`.

        Raises:
          RuntimeError: the run ended before that.
        """
        before, gone, seen, began = _partial(self._workdir), set(), set(), time.monotonic()
        process = self._start(GOES_ON)
        saves, until = self._draw.randint(1, 3), began + HANG_SECONDS
        if when == "any time":
            until = began + self._draw.uniform(0, 1.3 * self._length)
        while process.is_alive() and time.monotonic() < until:
            now = _partial(self._workdir)
            gone |= before - now
            if when != "any time" and "devices" in self._log.read_text():
                if now and not seen:
                    self._length = time.monotonic() - began
                seen |= now
                if len(seen if when == "saving" else seen - now) >= saves:
                    time.sleep(self._draw.uniform(0, 0.03))
                    break
            time.sleep(0.001)
        with contextlib.suppress(ProcessLookupError):  # Its group is made a moment after it is.
            os.killpg(process.pid, signal.SIGKILL)
        process.kill()
        process.join()
        said, left = self._log.read_text(), _partial(self._workdir)
        if process.exitcode != -signal.SIGKILL:
            raise RuntimeError(f"the run ended by itself with {process.exitcode}: {said}")
        gone |= before - left
        self.cleaned += len(gone)
        self.half_written += len(left - (before - gone))
        marks = {"saving": left - (before - gone), "between saves": "\nstep " in said,
                 PHASES[2]: "devices" in said, "restoring": "restoring" in said}
        self.hit[next((phase for phase, here in marks.items() if here), PHASES[0])] += 1

    def end(self) -> list[str]:
        """Lets the run end; what is not as in the run that nothing disturbed."""
        before = _partial(self._workdir)
        self.steps = (checkpoint.latest_step(self._workdir) or 0) + LAST_STEPS
        process = self._start(self.steps)
        process.join()
        if process.exitcode:
            return [f"the last start ended with {process.exitcode}: {self._log.read_text()}"]
        left = _partial(self._workdir)
        self.cleaned += len(before - left)
        command = [sys.executable, "-m", "dmf", "train", *_arguments(self._whole, self.steps)]
        subprocess.run(command, env=self._environment, check=True, capture_output=True)
        bad = [f"{name} was left" for name in sorted(left)]
        for path in (self._workdir / checkpoint.DAMAGED).glob("*"):
            bad.append(f"a kill damaged the checkpoint of step {path.name}")
        return bad + self._differences()

    def _differences(self) -> list[str]:
        runs = self._workdir, self._whole
        mine, theirs = (run / checkpoint.CHECKPOINTS / str(self.steps) for run in runs)
        found, wanted = arrays(mine), arrays(theirs)
        self.arrays = len(wanted)
        names = sorted(found.keys() | wanted.keys())
        bad = [f"{name} differs" for name in names if not same(found.get(name), wanted.get(name))]
        bad += [f"{name} differs" for name in ("position/metadata", "checksums/metadata")
                if (mine / name).read_bytes() != (theirs / name).read_bytes()]
        rows = [[{name: value for name, value in row.items() if name not in SPEED}
                 for row in logs.read_metrics(run)] for run in runs]
        if rows[0] != rows[1]:
            bad.append("metrics.jsonl differs")
        if [row["step"] for row in rows[0]] != list(range(1, self.steps + 1)):
            bad.append("metrics.jsonl has not every step once")
        return bad
