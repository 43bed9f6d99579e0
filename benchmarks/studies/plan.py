"""The papers' ablations: the runs, their evaluations, and the claims of the papers about them."""

import copy
import pathlib
from typing import Any

from ml_collections import ConfigDict

from benchmarks.studies.study import Claim, Measure, Plan, Scale, Study
from configs import default, digits_dmf, digits_meanflow, digits_sit
from dmf.models.build import network
from dmf.models.in_context_dit import InContextDiT
from dmf.objectives import ImprovedMeanFlow, Tangent, TeacherGuidance
from dmf.objectives.build import objective

FLOW_STEPS, TUNING_STEPS = 600, 200
HEAD = """# Studies on the digits

These studies repeat the papers' ImageNet ablations on the 8 x 8 digits, where a run takes a minute.
The tables show the Fréchet distance to the data in pixel space, and in parentheses the label
agreement: the share of samples that a classifier assigns to the label they were generated for.
Values are mean and standard deviation over {seeds} seeds. All fine-tunings of a seed start from
the same flow model. Whether a published finding holds is computed: it holds if it does in every
seed, and is open if it holds in some seeds. The results say nothing about other data.

    {command}

wrote this page, with {count:,} samples per number, on {machine}.
Its runs and evaluations, one after the other, took {minutes:.0f} minutes.
Two random halves of the data differ by {halves:.2f}.
"""


def _weighted(name: str) -> dict[str, Any]:
    return {"objective.weighting": ConfigDict({"name": name})}


# The changes of each fine-tuning to configs/digits_dmf.py; all start from "flow".
TUNED: dict[str, dict[str, Any]] = {
    "dmf": {},
    **{f"split_{depth}": {"model.split_depth": depth} for depth in (0, 1, 2, 3, 5, 6)},
    **{f"kappa_{kappa}": {"objective.guidance.kappa": kappa} for kappa in (0.3, 0.6)},
    **{name: _weighted(name) for name in ("published_cauchy", "adaptive", "uniform")},
    "teacher": {"objective.guidance": default.component(TeacherGuidance(scale=1.0))},
    "predicted_tangent": {"objective.tangent": default.component(Tangent(velocity="predicted"))},
}


def _improved(**conditioning: Any) -> dict[str, Any]:
    model = InContextDiT(
        input_size=8, channels=1, depth=6, head_depth=2, width=64, heads=4, num_classes=10,
        scan=False, **conditioning,
    )  # fmt: skip
    # Warm-up and horizon of the EMA in proportion to a run a quarter as long as MeanFlow's.
    return {"model": default.component(model), "objective": default.component(ImprovedMeanFlow()),
            "optimizer.warmup_steps": 25, "emas.main.decay": 0.96}


# The changes of each run from scratch to configs/digits_meanflow.py; each run costs as much as
# "flow" and "dmf" together.
FROM_SCRATCH: dict[str, dict[str, Any]] = {
    "meanflow": {},
    "improved": _improved(),
    "improved_decoupled": _improved(conditioning="decoupled", split_depth=4),
}
RUNS = ("flow", "meanflow", *TUNED, "improved", "improved_decoupled")
_MANY = (1, 2, 4, 8, 16, 32)
_AS_FLOW_MAP = {"model.conditioning": "decoupled", "model.split_depth": 4}
MEASURES = {
    "flow": Measure(label="flow model", run="flow", steps=_MANY),
    "untrained": Measure(
        label="the same parameters as a flow map, untrained", run="flow", steps=_MANY,
        overrides=_AS_FLOW_MAP,
    ),
    "meanflow": Measure(label="MeanFlow from scratch", run="meanflow"),
    "dmf": Measure(label="Decoupled MeanFlow", run="dmf"),
    **{name: Measure(label=f"split depth {name[-1]}", run=name)
       for name in TUNED if name.startswith("split_")},
    **{name: Measure(label=f"model guidance {name[6:]}", run=name)
       for name in TUNED if name.startswith("kappa_")},
    **{name: Measure(label=f"weighting {name}", run=name)
       for name in ("published_cauchy", "adaptive", "uniform")},
    "teacher": Measure(label="with a teacher's velocity", run="teacher"),
    "predicted_tangent": Measure(label="loss of improved MeanFlow", run="predicted_tangent"),
    "improved": Measure(label="improved MeanFlow from scratch", run="improved"),
    "improved_decoupled": Measure(label="the same, decoupled", run="improved_decoupled"),
}
STUDIES = {
    "meanflow": Study(
        title="Against MeanFlow at equal compute",
        text="MeanFlow is trained from scratch with as much compute as the flow model and its "
        "fine-tuning together. With 1,200 and 600 steps instead of 600 and 200, the two methods "
        "are tied at 1 and 2 steps, and Decoupled MeanFlow has the lower distance from 4 steps on "
        "(README.md).",
        measures=("flow", "meanflow", "dmf"),
        claims=tuple(
            Claim(text=f"lower distance than MeanFlow (FID {published}, arXiv:2510.24474, "
                  "second-hand)", lower="dmf", higher=("meanflow",), steps=n)
            for n, published in ((1, "19.3 and 20.6"), (2, "17.3 and 18.1"))
        ),
    ),
    "split": Study(
        title="Split depth",
        text="The number of blocks, of 6, that are conditioned on t; the others are conditioned on "
        "r. Decoupled MeanFlow uses 4, two thirds.",
        measures=("split_0", "split_1", "split_2", "split_3", "dmf", "split_5", "split_6"),
        claims=(
            Claim(text="a split at two thirds to three quarters of the blocks is best "
                  "(arXiv:2510.24474)", lower="dmf",
                  higher=tuple(f"split_{depth}" for depth in (0, 1, 2, 3, 5, 6))),
        ),
    ),
    "guidance": Study(
        title="Model guidance",
        text="The strength kappa of model guidance in training, at all times t. Decoupled MeanFlow "
        "in the first row has none.",
        measures=("dmf", "kappa_0.3", "kappa_0.6"),
        claims=(
            Claim(text="guidance 0.6 lowers the distance (FID 19.3 to 4.53, arXiv:2510.24474, "
                  "second-hand)", lower="kappa_0.6", higher=("dmf",)),
        ),
    ),
    "weighting": Study(
        title="Weighting",
        text="The weighting of the squared error of a sample; Decoupled MeanFlow in the first row "
        "uses cauchy. published_cauchy drifts to log m of the mean squared error m, which has the "
        "gradient of adaptive.",
        measures=("dmf", "published_cauchy", "adaptive", "uniform"),
        claims=tuple(
            Claim(text=f"cauchy has a lower distance than {name} (arXiv:2510.24474 uses cauchy)",
                  lower="dmf", higher=(name,))
            for name in ("published_cauchy", "adaptive", "uniform")
        ),
    ),
    "untrained": Study(
        title="Converted without training",
        text="The parameters of the flow model, with the last 2 of 6 blocks conditioned on r.",
        measures=("flow", "untrained"),
        claims=tuple(
            Claim(text="the flow map has the lower distance (at 16 to 128 steps, "
                  "arXiv:2510.24474, second-hand)", lower="untrained", higher=("flow",), steps=n)
            for n in (16, 32)
        ),
    ),
    "teacher": Study(
        title="With a teacher",
        text="The network regresses on the unguided velocity of the frozen flow model instead of "
        "the velocity of the path. Published results use guided teachers.",
        measures=("dmf", "teacher"),
        claims=(
            Claim(text="a teacher lowers the distance (L/2, guided: FID 3.31 by a third party, and "
                  "4.53 without a teacher, second-hand)", lower="teacher", higher=("dmf",)),
        ),
    ),
    "predicted_tangent": Study(
        title="The loss of improved MeanFlow",
        text="Fine-tuning with the derivative along the velocity that the network predicts.",
        measures=("dmf", "predicted_tangent"),
        claims=(
            Claim(text="it lowers the distance (MeanFlow-XL/2: FID 3.43 to 2.99, arXiv:2512.02012)",
                  lower="predicted_tangent", higher=("dmf",)),
        ),
    ),
    "improved": Study(
        title="Improved MeanFlow, and its network with decoupled conditioning",
        text="The in-context network of improved MeanFlow with about as many parameters as the "
        "others: 6 blocks of width 64, of which the last 2 are a head, and 2 blocks of the second "
        "head. Decoupled, its first 4 blocks do not see t - r. Both are trained from scratch with "
        "the compute of MeanFlow. With its 20 tokens beside the 16 patches, its second head and "
        "the velocities of its guidance, a step costs about 4 times as much, so that there are "
        "about a quarter of the steps, with warm-up and the horizon of the EMA in proportion. "
        "Guidance is drawn in training; samples have scale 1. So short a run leaves these networks "
        "far from trained: the table compares them with each other, and shows what their steps "
        "cost on images of 16 patches.",
        measures=("meanflow", "dmf", "improved", "improved_decoupled"),
        claims=(
            *(Claim(text="improved MeanFlow has a lower distance than MeanFlow (XL/2: FID "
                    f"{published}, arXiv:2512.02012)", lower="improved", higher=("meanflow",),
                    steps=n)
              for n, published in ((1, "1.72 and 3.43"), (2, "1.54 and 2.93"))),
            *(Claim(text="decoupled conditioning lowers the distance of improved MeanFlow (not "
                    "published by anyone)", lower="improved_decoupled", higher=("improved",),
                    steps=n)
              for n in (1, 2, 4)),
        ),
    ),
}


def _with_steps(config: ConfigDict, steps: int) -> ConfigDict:
    config.run.update(steps=steps, checkpoint_every=steps, sample_every=0, keep_last=1)
    config.optimizer.warmup_steps = min(config.optimizer.warmup_steps, steps // 2)
    return config


def _cost(config: ConfigDict) -> float:
    """The operations of a run, per sample of a batch."""
    return config.run.steps * objective(config.objective).flops(network(config.model))


def config_of(run: str, folder: pathlib.Path, seed: int, scale: Scale) -> ConfigDict:
    """The config of a run.

    Args:
      run: one of `RUNS`.
      folder: folder of the seed, which holds a workdir for each run.
      seed: random seed of the run.
      scale: length of the run.
    """
    if run == "flow":
        config = _with_steps(digits_sit.get_config(), scale.steps(FLOW_STEPS))
    elif run in FROM_SCRATCH:
        config = digits_meanflow.get_config()
        config.update_from_flattened_dict(copy.deepcopy(FROM_SCRATCH[run]))
        total_cost = sum(_cost(config_of(part, folder, seed, scale)) for part in ("flow", "dmf"))
        config.run.steps = 1
        config = _with_steps(config, max(2, round(total_cost / _cost(config))))
    else:
        config = _with_steps(digits_dmf.get_config(), scale.steps(TUNING_STEPS))
        config.init.checkpoint = str(folder / "flow")
        config.update_from_flattened_dict(copy.deepcopy(TUNED[run]))
        if config.objective.guidance.name == "teacher":
            config.teacher.checkpoint = str(folder / "flow")
    config.seed = seed
    return config


ABLATIONS = Plan(
    head=HEAD, runs=RUNS, config_of=config_of, measures=MEASURES, studies=STUDIES
)
