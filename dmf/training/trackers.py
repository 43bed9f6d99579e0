"""The writers of experiment trackers: Weights & Biases, and Trackio.

Both are optional packages (`pip install wandb` or `trackio`). The
workdir keeps the id of the run at each tracker in `trackers.json`, so that a resumed run continues
it.
"""

import contextlib
import io
import os
import sys
import uuid
from collections.abc import Mapping

import numpy as np
from etils import epath
from jaxtyping import UInt8

from dmf.errors import InputError
from dmf.runtime.files import is_regular_file, read_json, write_json
from dmf.runtime.progress import Verbosity, verbosity
from dmf.training.writers import Writer, WriterRun

IDS_FILE = "trackers.json"
DEFAULT_PROJECT = "dmf"


def tracker_id(workdir: epath.Path, tracker: str) -> str:
    """The id of a run at a tracker: that of `trackers.json`, or a new one, which is stored there.

    Args:
      workdir: the workdir of the run.
      tracker: name of the tracker.

    Raises:
      RunError: the file is damaged.
    """
    path = workdir / IDS_FILE
    ids = read_json(path) if is_regular_file(path) else {}
    if not isinstance(ids.get(tracker), str):
        ids[tracker] = uuid.uuid4().hex[:8]
        write_json(path, ids)
    return ids[tracker]


class WandbWriter(Writer):
    """Weights & Biases, with sample grids and config; WANDB_MODE=offline keeps everything in the
    folder wandb/ of the workdir, for `wandb sync`. WANDB_ENTITY and its other variables apply."""

    requires = "wandb"
    uses_project = True

    def __init__(self, run: WriterRun):
        import wandb

        self._wandb = wandb
        settings = wandb.Settings(console="off", silent=verbosity() is Verbosity.QUIET)
        try:
            self._run = wandb.init(
                project=run.project or os.environ.get("WANDB_PROJECT") or DEFAULT_PROJECT,
                name=run.workdir.name, id=tracker_id(run.workdir, "wandb"), resume="allow",
                dir=None if "://" in os.fspath(run.workdir) else os.fspath(run.workdir),
                config=dict(run.config), settings=settings,
            )  # fmt: skip
        except wandb.Error as error:
            raise InputError("run.writers", "wandb", f"{' '.join(str(error).split())[:200]}; run "
                             "wandb login, or set WANDB_MODE=offline") from None
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def _log(self, step: int, values: Mapping[str, object]) -> None:
        """Logs values of a step. W&B drops values of an earlier step than its newest one, which a
        run may repeat after a kill; they are logged at a later one, with the true step beside."""
        is_new = step >= self._run.step
        self._run.log({"step": step, **values}, step=step if is_new else None)

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        self._log(step, scalars)

    def write_image(self, step: int, name: str, image: UInt8[np.ndarray, "h w c"]) -> None:
        self._log(step, {name: self._wandb.Image(_rgb(image))})

    def close(self) -> None:
        """Ends the run, as failed if an error is being raised."""
        self._run.finish(exit_code=int(sys.exception() is not None))


class TrackioWriter(Writer):
    """Trackio, with sample grids and config: on this machine, for `trackio show`, or where
    TRACKIO_SPACE_ID or TRACKIO_SERVER_URL says. After a kill, repeated steps stand there twice."""

    requires = "trackio"
    uses_project = True

    def __init__(self, run: WriterRun):
        import trackio

        self._trackio = trackio
        with _messages():
            self._run = trackio.init(
                project=run.project or DEFAULT_PROJECT,
                name=f"{run.workdir.name}-{tracker_id(run.workdir, 'trackio')}",
                resume="allow", config=dict(run.config), embed=False,
            )  # fmt: skip

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        self._run.log(dict(scalars), step=step)

    def write_image(self, step: int, name: str, image: UInt8[np.ndarray, "h w c"]) -> None:
        self._run.log({name: self._trackio.Image(_rgb(image))}, step=step)

    def close(self) -> None:
        with _messages():
            self._trackio.finish()


def _messages() -> contextlib.redirect_stdout:
    """A context in which a package prints to standard error, because standard output is for
    results; and to nothing if this process is quiet."""
    is_quiet = verbosity() is Verbosity.QUIET
    return contextlib.redirect_stdout(io.StringIO() if is_quiet else sys.stderr)


def _rgb(image: UInt8[np.ndarray, "h w c"]) -> UInt8[np.ndarray, "h w 3"]:
    """An image with three channels, as trackers take them."""
    return np.broadcast_to(image, (*image.shape[:2], 3))
