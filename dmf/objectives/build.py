"""From `config.objective` to an objective."""

import dataclasses
from typing import Any

from dmf.objectives.interpolants import Interpolant
from dmf.objectives.objective import Objective
from dmf.objectives.time_checks import check_times
from dmf.registry import at, build
from dmf.types import Network


def objective(section: Any, teacher: Network | None = None) -> Objective:
    """The objective of `config.objective`.

    Args:
      section: `config.objective`.
      teacher: the network that guides, where the objective asks for a teacher.

    Raises:
      InputError: a field that cannot be used; the message names it.
    """
    with at("objective"):
        chosen = build("objective", section)
    if chosen.needs_teacher and teacher is not None:
        return dataclasses.replace(chosen, teacher=teacher)
    return chosen


def objective_of_run(section: Any, steps: int, teacher: Network | None = None) -> Objective:
    """The objective of `config.objective` in a run of so many steps, whose times are checked.

    Args:
      section, teacher: as for `objective`.
      steps: number of training steps.

    Raises:
      InputError: a field that cannot be used, or a time sampler that draws no times in [0, 1]; the
        message names it.
    """
    chosen = objective(section, teacher)
    with at("objective"):
        check_times(chosen)
        return chosen.for_run(steps)


def interpolant(section: Any) -> Interpolant:
    """The path that `config.objective` trains on; linear where the objective has none."""
    with at("objective.interpolant"):
        return build("interpolant", section.get("interpolant", "linear"))
