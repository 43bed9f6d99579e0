"""What a run that resumes must have in common with the run that saved its checkpoint.

The config is compared in `dmf/training/loop.py`; here the samples of the dataset and the parameters
of frozen networks are, which may change though the config names the same paths.
"""

from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

import jax
import numpy as np
from etils import epath

from dmf.checkpoints.params import CHECKPOINTS, read_position
from dmf.data.data_loader import DataLoader
from dmf.errors import Damaged, InputError
from dmf.runtime.checksums import checksums, fingerprint
from dmf.types import Params

# What is saved with a train state, and must be the same when the run resumes.
_SAVED = {
    "seed": "the seed", "rows": "the batch size",
    "dataset_rows": "the number of samples in the dataset", "dataset": "the dataset",
    "teacher_params": "the teacher", "alignment_params": "the encoder of the alignment",
}  # fmt: skip


def position_function(
    data_loader: DataLoader, frozen_params: Mapping[str, Params]
) -> Callable[[int], dict[str, Any]]:
    """The function from a step to `DataLoader.position`, and a hash of each frozen network."""
    frozen = {f"{name}_params": fingerprint(jax.tree.map(np.uint32, checksums(params)))
              for name, params in frozen_params.items()}
    return lambda step: data_loader.position(step) | frozen


def check_position(workdir: epath.Path, position: Callable[[int], Mapping[str, Any]]) -> None:
    """Checks that the newest checkpoint was saved with these data and frozen networks.

    Args:
      workdir: the workdir; one without a checkpoint passes.
      position: what this run saves with the state of a step.

    Raises:
      InputError: the data, the teacher or the encoder of the alignment have changed.
    """
    folders = [path for path in (workdir / CHECKPOINTS).glob("*") if path.name.isdecimal()]
    for folder in sorted(folders, key=lambda path: int(path.name), reverse=True):
        with suppress(Damaged):  # `CheckpointManager.restore` says what is damaged.
            stored, given = read_position(folder), position(int(folder.name))
            for name, what in _SAVED.items():
                if name in stored and stored[name] != given.get(name):
                    raise InputError(
                        "workdir", workdir,
                        f"its run cannot resume, because {what} changed after step {folder.name} "
                        f"(from {stored[name]} to {given.get(name)}); restore the old one, or "
                        "start another run with init.checkpoint",
                    )
            return
