"""A tiny run whose newer checkpoint is damaged at random, and what is read of it then."""

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

from benchmarks.kills import TINY, same
from configs import default
from dmf import build, loading, training
from dmf import state as states
from dmf.checkpoint import CHECKPOINTS, Checkpoints
from dmf.state import TrainState
from dmf.step import initial_state
from dmf.typing import InputError, RunError

DAMAGES = ("cut short", "bits flipped", "bytes changed", "file removed", "folder removed")
AS_SAVED, BEFORE, REFUSED, BAD = "as saved", "the one before, said", "refused in one line", "bad"
COLUMNS = [("load", AS_SAVED), ("load", REFUSED), ("load", BAD),
           ("restore", AS_SAVED), ("restore", BEFORE), ("restore", REFUSED), ("restore", BAD)]
OLDER, NEWER = 4, 8
HANG_SECONDS = 60


def _config() -> ConfigDict:
    config = default.get_config()
    config.update_from_flattened_dict(
        {**TINY, "run.checkpoint_every": OLDER, "run.steps": NEWER})
    return config


def damage(folder: Path, how: str, draw: random.Random) -> str:
    """Damages one file or folder below `folder`, drawn alike whatever its size; says which."""
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
    """What a call gives or raises in that time, and what it says."""
    results: queue.Queue[tuple[Any, Exception | None]] = queue.Queue()

    def work() -> None:
        try:
            results.put((call(), None))
        except Exception as error:
            results.put((None, error))

    with contextlib.redirect_stderr(io.StringIO()) as said:
        threading.Thread(target=work, daemon=True).start()
        try:
            found, error = results.get(timeout=seconds)
        except queue.Empty:
            found, error = None, TimeoutError(f"no answer in {seconds} s")
    return found, error, said.getvalue()


class Corruptions:
    """A finished run below `folder`, and what is read of it once it was damaged.

    Attributes:
      hit: how often each damage had each outcome, as (damage, column).
      bad: what must not be, a line each.
    """

    def __init__(self, folder: Path, draw: random.Random):
        self.hit: collections.Counter[tuple[str, tuple[str, str]]] = collections.Counter()
        self.bad: list[str] = []
        self._run, self._draw, self._count = folder / "run", draw, 0
        self._saved: dict[int, Any] = {}
        save = Checkpoints.save

        def kept(manager: Checkpoints, step: int, state: TrainState, position: Any) -> None:
            self._saved[step] = jax.tree.map(np.array, jax.device_get(state))
            save(manager, step, state, position)

        with mock.patch.object(Checkpoints, "save", kept):
            training.train(_config(), self._run)
        recipe = build.training(_config()).recipe
        make = functools.partial(initial_state, recipe, jax.random.key(0))
        abstract = jax.eval_shape(make, {})
        self._abstract = states.with_shardings(abstract, states.shardings(recipe.mesh, abstract))

    def corrupt(self, how: str) -> None:
        """Damages a copy of the run, loads the parameters and restores the state."""
        self._count += 1
        copy = self._run.with_name(f"copy{self._count}")
        shutil.copytree(self._run, copy)
        where = damage(copy / CHECKPOINTS / str(NEWER), how, self._draw)
        for act, call in (("load", self._load), ("restore", self._restore)):
            found, error, said = _within(HANG_SECONDS, functools.partial(call, copy))
            outcome = self._outcome(act, found, error, said)
            self.hit[how, (act, outcome)] += 1
            if outcome == BAD:
                what = f"{type(error).__name__}: {error}" if error else f"other values; {said}"
                self.bad.append(f"{act}, {how}: {where}: {' '.join(what.split())}")
                print(self.bad[-1], flush=True)
        shutil.rmtree(copy, ignore_errors=True)

    def _load(self, workdir: Path) -> Any:
        return jax.device_get(loading.load_network(workdir, "main")[2])

    def _restore(self, workdir: Path) -> Any:
        with Checkpoints(workdir, keep_last=2) as checkpoints:
            return jax.device_get(checkpoints.restore(self._abstract))

    def _outcome(self, act: str, found: Any, error: Exception | None, said: str) -> str:
        if isinstance(error, (InputError, RunError)) and "\n" not in str(error):
            return REFUSED
        newer, older = self._saved[NEWER], self._saved[OLDER]
        if error is None and same(found, newer if act == "restore" else newer.averages["main"]):
            return AS_SAVED
        told = f"the checkpoint of step {NEWER} is damaged" in said
        return BEFORE if error is None and told and same(found, older) else BAD
