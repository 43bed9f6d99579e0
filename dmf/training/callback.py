"""What a callback of the training loop is, and the callbacks that `run.callbacks` names.

`callbacks.py` has those of this package, which other fields of the config set; your own are
registered under the kind "callback" (docs/extending.md).
"""

import abc
from collections.abc import Sequence
from typing import Any

from etils import epath

from dmf.errors import InputError
from dmf.registry import lookup
from dmf.training.train_state import TrainState
from dmf.training.writers import Writers


class Callback(abc.ABC):
    """Something that the training loop does after some steps, in all processes together, and after
    the checkpoint of the step where one is due. A registered callback is a class that is derived
    from this one.

    Attributes:
      writers: receive its metrics and images; the loop sets them.
    """

    writers = Writers()

    def __init__(self, config: Any, training: Any, workdir: epath.Path):
        """Called when training starts or resumes, before anything is written.

        Args:
          config: the config of the run, a ConfigDict.
          training: recipe and settings of the run, a `dmf.training.build.Training`.
          workdir: the workdir of the run.
        """
        del config, training, workdir

    @abc.abstractmethod
    def due(self, step: int) -> bool:
        """Whether the loop calls it after a step."""

    def is_done(self, step: int) -> bool:
        """Whether nothing is left to do after a step at which a run resumes; all processes call it.

        The run may have been stopped or killed after the checkpoint of the step and before the
        call, so that the loop makes up for the call where this is False. By default it is True: no
        step has two calls, and one at which the run was stopped may have none.
        """
        del step
        return True

    @abc.abstractmethod
    def __call__(self, step: int, state: TrainState) -> None:
        """Acts on the train state after a step, whose arrays are sharded over the mesh and are
        donated to the next step."""


def open_callbacks(
    names: Sequence[str], config: Any, training: Any, workdir: epath.Path
) -> tuple[Callback, ...]:
    """The callbacks of some names, in their order.

    Args:
      names: `run.callbacks`.
      config, training, workdir: as for `Callback`.

    Raises:
      InputError: a name is unknown or given twice, or what a callback refuses.
    """
    opened = []
    for name in names:
        if names.count(name) > 1:
            raise InputError("run.callbacks", name, "it is given twice; give each callback once")
        try:
            registered = lookup("callback", name)
        except InputError as error:
            raise InputError("run.callbacks", name, error.remedy) from None
        opened.append(registered(config, training, workdir))
    return tuple(opened)
