"""A fault that a programmer could make; `benchmarks.mutants` runs the tests with each."""

from typing import NamedTuple


class Mutant(NamedTuple):
    """A fault in one file of the package.

    Attributes:
      name: name of the mutant.
      description: what is wrong with it.
      file: path of the file.
      old: text that occurs once in the file.
      new: text that replaces it.
      tests: paths of the test files that run first.
    """

    name: str
    description: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]
