"""The faults that the tests must find: every other file here has a list of them, MUTANTS."""

import importlib
import pkgutil

from benchmarks.mutant_lists.mutant import Mutant

__all__ = ["Mutant", "all_mutants"]


def all_mutants() -> tuple[Mutant, ...]:
    """The mutants of all lists, in the order of the names of their files."""
    names = sorted(module.name for module in pkgutil.iter_modules(__path__))
    lists = (importlib.import_module(f"{__name__}.{name}") for name in names if name != "mutant")
    return tuple(mutant for each in lists for mutant in each.MUTANTS)
