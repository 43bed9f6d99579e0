"""Writers receive the metrics, sample grids and config of a run: files, TensorBoard, trackers.

`run.writers` names them. `dmf/training/__init__.py` registers those of this package; your own
are registered in the same way (docs/extending.md).
"""

import dataclasses
import importlib.util
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath
from jaxtyping import UInt8

from dmf.errors import InputError
from dmf.registry import lookup


@dataclasses.dataclass(frozen=True, kw_only=True)
class WriterRun:
    """The run that a writer writes about.

    Attributes:
      workdir: the workdir of the run.
      start_step: the step that the run starts or resumes at; whatever an earlier process wrote of
        later steps is written again, with the same values if `run.log_every` and what saves
        checkpoints are the same.
      config: the config of the run as nested dictionaries.
      project: project of the run at a tracker; empty for the tracker's default.
    """

    workdir: epath.Path
    start_step: int = 0
    config: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    project: str = ""


class Writer:
    """Receives the metrics and sample grids of a run, in its first process.

    A registered writer is a class (or a function) that is called with a `WriterRun` when training
    starts or resumes. All methods do nothing by default.

    Attributes:
      requires: name of an optional package that it imports; "" for none.
      uses_project: whether it uses `run.project`.
    """

    requires = ""
    uses_project = False

    def __init__(self, run: WriterRun):
        """Starts or resumes writing about a run."""

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """Writes the scalars after a step. A step may have several calls, for example one of its
        loss and one of its evaluation."""

    def write_image(self, step: int, name: str, image: UInt8[np.ndarray, "h w c"]) -> None:
        """Writes an image after a step: grey with one channel, or RGB."""

    def flush(self) -> None:
        """Stores what is buffered; a checkpoint is saved next."""

    def close(self) -> None:
        """Stores what is buffered, and ends."""


class Writers:
    """Several writers as one; none in all processes but the first."""

    def __init__(self, writers: Sequence[Writer] = ()):
        """Combines writers, which are called in this order."""
        self._writers = tuple(writers)

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """Writes the scalars after a step."""
        for writer in self._writers:
            writer.write(step, scalars)

    def write_image(self, step: int, name: str, image: UInt8[np.ndarray, "h w c"]) -> None:
        """Writes an image after a step."""
        for writer in self._writers:
            writer.write_image(step, name, image)

    def flush(self) -> None:
        """Stores what is buffered."""
        for writer in self._writers:
            writer.flush()

    def close(self) -> None:
        """Ends all writers."""
        for writer in self._writers:
            writer.close()


def check_writers(names: Sequence[str], project: str = "") -> None:
    """Checks the names of writers before a run starts.

    Args:
      names: the names, `run.writers`.
      project: `run.project`.

    Raises:
      InputError: a name is unknown or given twice, the package of a writer is not installed, or a
        project is given that no writer uses.
    """
    found = [_registered(name) for name in names]
    for name, writer in zip(names, found, strict=True):
        package = getattr(writer, "requires", "")
        if names.count(name) > 1:
            raise InputError("writers", name, "it is given twice; give each writer once")
        if package and importlib.util.find_spec(package) is None:
            raise InputError("writers", name, f"the package {package} is not installed; pip "
                             f"install {package}")
    if project and not any(getattr(writer, "uses_project", True) for writer in found):
        raise InputError("project", project, "no writer in run.writers uses it; add wandb or "
                         "trackio there, or leave it empty")


def _registered(name: str) -> Any:
    try:
        return lookup("writer", name)
    except InputError as error:
        raise InputError("writers", name, error.remedy) from None


def open_writers(names: Sequence[str], run: WriterRun) -> Writers:
    """Starts the writers of a run.

    Raises:
      InputError: a name is unknown, or a writer cannot start.
    """
    return Writers([_registered(name)(run) for name in names])
