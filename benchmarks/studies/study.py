"""What a study is: runs, their evaluations, and claims about them."""

import dataclasses
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

COUNT = 2500
# With fewer samples than pixels, the covariance is singular.
MIN_COUNT = 72


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scale:
    """The length of runs: all training steps and samples are multiplied by `factor`."""

    factor: float = 1.0

    def steps(self, full: int) -> int:
        """The number of training steps of a run whose full length is given."""
        return max(2, round(full * self.factor))

    @property
    def count(self) -> int:
        """The number of samples."""
        return max(MIN_COUNT, round(COUNT * self.factor))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Measure:
    """An evaluation of a run.

    Attributes:
      label: its name in tables and plots.
      run: name of the run.
      steps: numbers of sampling steps.
      overrides: fields of the config that differ from the run's.
      share: share of the run's training steps after which it is evaluated, in (0, 1]; the run has a
        checkpoint there.
    """

    label: str
    run: str
    steps: tuple[int, ...] = (1, 2, 4)
    overrides: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    share: float = 1.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Claim:
    """The claim that one measure has a lower distance than all of some others.

    Attributes:
      text: the claim in words, with its source.
      lower: name of the measure with the lower distance.
      higher: names of the others.
      steps: number of sampling steps.
    """

    text: str
    lower: str
    higher: tuple[str, ...]
    steps: int = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Study:
    """A table of measures, and claims about them.

    Attributes:
      title: heading of the study.
      text: explanation below the heading.
      measures: names of the measures.
      claims: claims about the measures.
    """

    title: str
    text: str
    measures: tuple[str, ...]
    claims: tuple[Claim, ...]


# The rows of an evaluation by their number of sampling steps, for each seed.
Rows = list[dict[int, Mapping[str, float]]]


def no_sections(
    folders: Sequence[pathlib.Path], plots: pathlib.Path, results: Mapping[str, Rows]
) -> list[str]:
    """No further sections."""
    return []


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """All that one command runs, and the page that it writes.

    Attributes:
      head: the page above its studies; `page.write_page` fills in seeds, command, minutes, count,
        machine, and halves, the distance between two halves of the data.
      runs: names of the training runs, in an order in which they can start from each other.
      config_of: (run, folder of the seed, seed, scale) -> config of the run.
      measures: the evaluations by name.
      studies: the studies by name.
      sections: (folders of the seeds, folder of plots, results) -> further sections of the page.
    """

    head: str
    runs: tuple[str, ...]
    config_of: Callable[[str, pathlib.Path, int, Scale], ConfigDict]
    measures: Mapping[str, Measure]
    studies: Mapping[str, Study]
    sections: Callable[[Sequence[pathlib.Path], pathlib.Path, Mapping[str, Rows]], list[str]] = (
        no_sections
    )
