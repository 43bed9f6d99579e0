"""A tiny run whose newer checkpoint is damaged at random, and then loaded and restored."""

import collections
import contextlib
import functools
import io
import os
import queue
import random
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import numpy as np
from ml_collections import ConfigDict

from benchmarks.kills import TINY, is_equal
from configs import default
from dmf.checkpoints import load
from dmf.checkpoints.manager import CheckpointManager
from dmf.checkpoints.params import CHECKPOINTS
from dmf.errors import InputError, RunError
from dmf.training import build, loop
from dmf.training.train_state import EMA_PREFIX
from dmf.training.train_step import abstract_state

DAMAGES = ("cut short", "bits flipped", "bytes changed", "file removed", "folder removed")
AS_SAVED, OLDER_STATE, REFUSED, WRONG = (
    "as saved", "older one, logged", "refused in one line", "wrong"
)
COLUMNS = [("load", AS_SAVED), ("load", REFUSED), ("load", WRONG),
           ("restore", AS_SAVED), ("restore", OLDER_STATE), ("restore", REFUSED),
           ("restore", WRONG)]
OLDER, NEWER = 4, 8
HANG_SECONDS = 60


def _config() -> ConfigDict:
    config = default.get_config()
    config.update_from_flattened_dict(
        {**TINY, "run.checkpoint_every": OLDER, "run.steps": NEWER})
    return config


def damage(folder: Path, how: str, draw: random.Random) -> str:
    """Damages a file or folder below `folder`, each with equal probability; describes how."""
    path = draw.choice(sorted(
        path for path in folder.rglob("*")
        if path.is_dir() == (how == "folder removed")
        and ("removed" in how or path.stat().st_size)))
    name = str(path.relative_to(folder))
    if how == "folder removed":
        shutil.rmtree(path)
    elif how == "file removed":
        path.unlink()
    elif how == "cut short":
        size = draw.randrange(path.stat().st_size)
        name += f" to {size} of {path.stat().st_size} bytes"
        os.truncate(path, size)
    else:
        data, bits = bytearray(path.read_bytes()), how == "bits flipped"
        places = len(data) * 8 if bits else len(data)
        drawn = sorted(draw.sample(range(places), min(draw.randint(1, 16), places)))
        for place in drawn:
            data[place // 8 if bits else place] ^= (
                1 << place % 8 if bits else draw.randrange(1, 256))
        path.write_bytes(data)
        name += f" at {', '.join(map(str, drawn))}"
    return name


def _within(seconds: float, call: Callable[[], Any]) -> tuple[Any, Exception | None, str]:
    """The result or the error of a call within some seconds, and its standard error."""
    results: queue.Queue[tuple[Any, Exception | None]] = queue.Queue()

    def run() -> None:
        try:
            results.put((call(), None))
        except Exception as error:
            results.put((None, error))

    with contextlib.redirect_stderr(io.StringIO()) as log:
        threading.Thread(target=run, daemon=True).start()
        try:
            result, error = results.get(timeout=seconds)
        except queue.Empty:
            result, error = None, TimeoutError(f"no answer in {seconds} s")
    return result, error, log.getvalue()


class Corruptions:
    """A finished run below `folder`, of which damaged copies are loaded and restored.

    Attributes:
      outcomes: how often each damage had each outcome, by (damage, column).
      errors: a line for each wrong outcome.
    """

    def __init__(self, folder: Path, draw: random.Random):
        self.outcomes: collections.Counter[tuple[str, tuple[str, str]]] = collections.Counter()
        self.errors: list[str] = []
        self._run, self._draw, self._count = folder / "run", draw, 0
        self._saved: dict[int, Any] = {}
        save = CheckpointManager.save

        def recording_save(
            manager: CheckpointManager, step: int, trees: Any, position: Any
        ) -> None:
            self._saved[step] = jax.tree.map(np.array, jax.device_get(trees))
            save(manager, step, trees, position)

        with mock.patch.object(CheckpointManager, "save", recording_save):
            loop.train(_config(), self._run)
        recipe = build.training(_config()).recipe
        self._abstract = abstract_state(recipe).trees

    def corrupt(self, how: str) -> None:
        """Damages a copy of the run, loads the parameters and restores the state."""
        self._count += 1
        copy = self._run.with_name(f"copy{self._count}")
        shutil.copytree(self._run, copy)
        where = damage(copy / CHECKPOINTS / str(NEWER), how, self._draw)
        for act, call in (("load", self._load), ("restore", self._restore)):
            result, error, log = _within(HANG_SECONDS, functools.partial(call, copy))
            outcome = self._outcome(act, result, error, log)
            self.outcomes[how, (act, outcome)] += 1
            if outcome == WRONG:
                what = f"{type(error).__name__}: {error}" if error else f"other values; {log}"
                self.errors.append(f"{act}, {how}: {where}: {' '.join(what.split())}")
                print(self.errors[-1], flush=True)
        shutil.rmtree(copy, ignore_errors=True)

    def _load(self, workdir: Path) -> Any:
        return jax.device_get(load.load_network(workdir, "main")[2])

    def _restore(self, workdir: Path) -> Any:
        with CheckpointManager(workdir, keep_last=2) as checkpoints:
            _, trees = checkpoints.restore(self._abstract)
            return jax.device_get(trees)

    def _outcome(self, act: str, result: Any, error: Exception | None, log: str) -> str:
        if isinstance(error, (InputError, RunError)) and "\n" not in str(error):
            return REFUSED
        newer, older = self._saved[NEWER], self._saved[OLDER]
        expected = newer if act == "restore" else newer[f"{EMA_PREFIX}main"]
        if error is None and is_equal(result, expected):
            return AS_SAVED
        logged = f"the checkpoint of step {NEWER} is damaged" in log
        return OLDER_STATE if error is None and logged and is_equal(result, older) else WRONG
