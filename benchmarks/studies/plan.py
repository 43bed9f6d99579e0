"""What is trained, what is measured of it, and what the papers say of the outcome."""

import copy
import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from configs import default, digits_dmf, digits_meanflow, digits_sit
from dmf import build

FLOW_STEPS, TUNING_STEPS, COUNT = 600, 200, 2500
# Fewer samples than pixels have a singular covariance.
LEAST_COUNT = 72


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scale:
    """How long runs are: all steps and samples times `factor`."""

    factor: float = 1.0

    def steps(self, whole: int) -> int:
        """Of training."""
        return max(2, round(whole * self.factor))

    @property
    def count(self) -> int:
        """Of samples."""
        return max(LEAST_COUNT, round(COUNT * self.factor))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Measure:
    """A run, measured with numbers of sampling steps, and perhaps seen as another network."""

    label: str
    run: str
    steps: tuple[int, ...] = (1, 2, 4)
    seen: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Claim:
    """That one measure has a lower distance than all of some others, at a number of steps."""

    text: str
    lower: str
    higher: tuple[str, ...]
    steps: int = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Study:
    """A table of measures, and claims about them."""

    title: str
    text: str
    measures: tuple[str, ...]
    claims: tuple[Claim, ...]


def _weighted(name: str) -> dict[str, Any]:
    return {"objective.weighting": ConfigDict({"name": name})}


# What each run of fine-tuning changes of configs/digits_dmf.py; all start from "flow".
TUNED: dict[str, dict[str, Any]] = {
    "dmf": {},
    **{f"split_{depth}": {"model.split_depth": depth} for depth in (0, 1, 2, 3, 5, 6)},
    **{f"kappa_{kappa}": {"objective.guidance.kappa": kappa} for kappa in (0.3, 0.6)},
    **{name: _weighted(name) for name in ("released", "adaptive", "uniform")},
    "teacher": {"objective.guidance": default.teacher_guidance(1.0)},
    "own_tangent": {"objective.tangent": default.tangent("own")},
}
RUNS = ("flow", "meanflow", *TUNED)
_MANY = (1, 2, 4, 8, 16, 32)
_AS_FLOW_MAP = {"model.conditioning": "decoupled", "model.split_depth": 4}
MEASURES = {
    "flow": Measure(label="flow model", run="flow", steps=_MANY),
    "untrained": Measure(
        label="the same as a flow map, untrained", run="flow", steps=_MANY, seen=_AS_FLOW_MAP
    ),
    "meanflow": Measure(label="MeanFlow from scratch", run="meanflow"),
    "dmf": Measure(label="Decoupled MeanFlow", run="dmf"),
    **{name: Measure(label=f"split depth {name[-1]}", run=name)
       for name in TUNED if name.startswith("split_")},
    **{name: Measure(label=f"model guidance {name[6:]}", run=name)
       for name in TUNED if name.startswith("kappa_")},
    **{name: Measure(label=f"weighting {name}", run=name)
       for name in ("released", "adaptive", "uniform")},
    "teacher": Measure(label="with a teacher's velocity", run="teacher"),
    "own_tangent": Measure(label="loss of improved MeanFlow", run="own_tangent"),
}
STUDIES = {
    "meanflow": Study(
        title="Against MeanFlow at equal compute",
        text="MeanFlow from scratch, for as many steps as cost what the flow model and its "
        "fine-tuning cost together. With 1,200 and 600 steps in place of 600 and 200, the two are "
        "as close at 1 and 2 steps, and Decoupled MeanFlow is closer from 4 on (README.md).",
        measures=("flow", "meanflow", "dmf"),
        claims=tuple(
            Claim(text=f"closer than MeanFlow (FID {published}, arXiv:2510.24474, second-hand)",
                  lower="dmf", higher=("meanflow",), steps=n)
            for n, published in ((1, "19.3 and 20.6"), (2, "17.3 and 18.1"))
        ),
    ),
    "split": Study(
        title="Split depth",
        text="How many of the 6 blocks see t; the others see r. The row of Decoupled MeanFlow is "
        "4, two thirds.",
        measures=("split_0", "split_1", "split_2", "split_3", "dmf", "split_5", "split_6"),
        claims=(
            Claim(text="two thirds to three quarters of the blocks is best (arXiv:2510.24474)",
                  lower="dmf", higher=tuple(f"split_{depth}" for depth in (0, 1, 2, 3, 5, 6))),
        ),
    ),
    "guidance": Study(
        title="Model guidance",
        text="Strength kappa of the network's own guidance in training, at every time; the row of "
        "Decoupled MeanFlow has none.",
        measures=("dmf", "kappa_0.3", "kappa_0.6"),
        claims=(
            Claim(text="guidance 0.6 is closer than none (FID 19.3 to 4.53, arXiv:2510.24474, "
                  "second-hand)", lower="kappa_0.6", higher=("dmf",)),
        ),
    ),
    "weighting": Study(
        title="Weighting",
        text="What a sample's squared error weighs; the row of Decoupled MeanFlow is cauchy. "
        "Released drifts to log m of the mean square m, which has adaptive's gradient.",
        measures=("dmf", "released", "adaptive", "uniform"),
        claims=tuple(
            Claim(text=f"cauchy is closer than {name} (arXiv:2510.24474 chooses it)", lower="dmf",
                  higher=(name,))
            for name in ("released", "adaptive", "uniform")
        ),
    ),
    "untrained": Study(
        title="Converted without training",
        text="The flow model, its last 2 of 6 blocks made to see r.",
        measures=("flow", "untrained"),
        claims=tuple(
            Claim(text="as a flow map it is closer (at 16 to 128 steps, arXiv:2510.24474, "
                  "second-hand)", lower="untrained", higher=("flow",), steps=n)
            for n in (16, 32)
        ),
    ),
    "teacher": Study(
        title="With a teacher",
        text="The velocity that is regressed on is that of the frozen flow model, unguided, in "
        "place of the path's own. What is published of teachers is of guided ones.",
        measures=("dmf", "teacher"),
        claims=(
            Claim(text="a teacher helps (L/2, guided: FID 3.31 by a third party, and 4.53 without "
                  "one, second-hand)", lower="teacher", higher=("dmf",)),
        ),
    ),
    "own_tangent": Study(
        title="The loss of improved MeanFlow",
        text="The derivative along the network's own velocity, in fine-tuning.",
        measures=("dmf", "own_tangent"),
        claims=(
            Claim(text="it is closer (MeanFlow-XL/2: FID 3.43 to 2.99, arXiv:2512.02012)",
                  lower="own_tangent", higher=("dmf",)),
        ),
    ),
}


def _of_length(config: ConfigDict, steps: int) -> ConfigDict:
    config.run.update(steps=steps, checkpoint_every=steps, sample_every=0, keep_last=1)
    config.optimizer.decay_steps = steps
    config.optimizer.warmup_steps = min(config.optimizer.warmup_steps, steps // 2)
    return config


def _cost(config: ConfigDict) -> float:
    """Operations that a run takes for each sample of a batch."""
    return config.run.steps * build.objective(config).flops(build.network(config))


def config_of(run: str, folder: pathlib.Path, seed: int, scale: Scale) -> ConfigDict:
    """The config of a run.

    Args:
      run: one of `RUNS`.
      folder: where the runs of its seed lie, each in a folder of its name.
      seed: of all draws.
      scale: how long it is.
    """
    if run == "flow":
        config = _of_length(digits_sit.get_config(), scale.steps(FLOW_STEPS))
    elif run == "meanflow":
        spent = sum(_cost(config_of(part, folder, seed, scale)) for part in ("flow", "dmf"))
        one = _cost(_of_length(digits_meanflow.get_config(), 1))
        config = _of_length(digits_meanflow.get_config(), max(2, round(spent / one)))
    else:
        config = _of_length(digits_dmf.get_config(), scale.steps(TUNING_STEPS))
        config.init.checkpoint = str(folder / "flow")
        config.update_from_flattened_dict(copy.deepcopy(TUNED[run]))
        if config.objective.guidance.name == "teacher":
            config.teacher.checkpoint = str(folder / "flow")
    config.seed = seed
    return config
