"""The writer of TensorBoard event files: scalars, sample grids, the config and hyperparameters."""

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict
from jaxtyping import UInt8

from dmf.training.writers import Writer, WriterRun

FOLDER = "events"


class TensorBoardWriter(Writer):
    """TensorBoard event files in the folder events/ of the workdir.

    A run that resumes purges the events of later steps. The tab HParams has every field of the
    config, and the tab Text has the config as JSON.
    """

    def __init__(self, run: WriterRun):
        from tensorboardX import SummaryWriter

        self._events = SummaryWriter(str(run.workdir / FOLDER), purge_step=run.start_step + 1)
        if run.config:
            self._write_config(run.config)

    def _write_config(self, config: Mapping[str, Any]) -> None:
        from tensorboardX.summary import hparams

        experiment, session, _ = hparams(hyperparameters(config), {"loss": 0.0})
        for summary in (experiment, session):
            self._events.file_writer.add_summary(summary)
        lines = json.dumps(config, indent=2, default=str).splitlines()
        self._events.add_text("config", "\n".join(f"    {line}" for line in lines))

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        for name, value in scalars.items():
            self._events.add_scalar(name, value, step)

    def write_image(self, step: int, name: str, image: UInt8[np.ndarray, "h w c"]) -> None:
        self._events.add_image(name, image, step, dataformats="HWC")

    def flush(self) -> None:
        self._events.flush()

    def close(self) -> None:
        self._events.close()


def hyperparameters(config: Mapping[str, Any]) -> dict[str, bool | int | float | str]:
    """The fields of a config by dotted name; values that are no numbers, as text.

    >>> hyperparameters({"run": {"steps": 8}, "freeze": ("a", "b")})
    {'run.steps': 8, 'freeze': "('a', 'b')"}

    Args:
      config: nested dictionaries.
    """
    flat = flatten_dict(dict(config), sep=".")
    return {name: value if isinstance(value, bool | int | float | str) else str(value)
            for name, value in flat.items()}
