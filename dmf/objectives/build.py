"""From `config.objective` to an objective."""

import dataclasses
from typing import Any

from dmf.objectives.interpolants import Interpolant
from dmf.objectives.objective import Objective
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


def interpolant(section: Any) -> Interpolant:
    """The path that `config.objective` trains on; linear where the objective has none."""
    with at("objective.interpolant"):
        return build("interpolant", section.get("interpolant", "linear"))
