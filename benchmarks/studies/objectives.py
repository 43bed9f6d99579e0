"""The comparison of objectives: one network, one batch size, equal operations, two starts."""

import dataclasses
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

from ml_collections import ConfigDict

from benchmarks.studies.study import Claim, Measure, Scale, Study
from configs import digits_dmf, digits_sit
from dmf import registry
from dmf.models.build import network
from dmf.objectives.build import objective

# Operations of a run from scratch; those of the flow model and of a fine-tuning are half as many.
BUDGET = 1.3e12
BATCH_SIZE = 64
# Evaluations of a run, at equal shares of its steps.
PARTS = 4
MANY = (1, 2, 4, 8)
HEAD = f"""# Objectives at equal compute

Every objective trains the same network on the 8 x 8 digits: the transformer of
`configs/digits_sit.py` with MeanFlow conditioning, in batches of {BATCH_SIZE}, with the times, the
weighting and the other settings that each objective has by default, which follow its paper, and
without guidance. Improved MeanFlow has a velocity head of 2 blocks beside it and takes its guidance
as an input; samples have scale 1. Consistency training warms its tangent up over a tenth of its
steps, and its samples take several steps by restarts. Shortcut models and terminal velocity
matching take their targets from the EMA. Only the rows "Decoupled MeanFlow" have decoupled
conditioning, with its loss, and flow models are conditioned on t alone.

Compute is `objective.flops(network)`, the matrix products of a training step by our own count, and
equal for all rows but the flow model that others start from. From scratch, a run has all of it.
Otherwise half of it trains a flow model, which is the same for all objectives of a seed, and half
fine-tunes it. Learning rates are those of `configs/digits_sit.py` from scratch and of
`configs/digits_dmf.py` for fine-tuning, and are not tuned for any objective. Warm-up and the
horizon of the EMA are a twelfth of the steps.

The tables show the Fréchet distance to the data in pixel space, and in parentheses the label
agreement: the share of samples that a classifier assigns to the label they were generated for.
Values are mean and standard deviation over {{seeds}} seeds. Whether a published finding holds is
computed: it holds if it does in every seed, and is open if it holds in some seeds. The results say
nothing about other data, or about longer training.

    {{command}}

wrote this page, with {{count:,}} samples per number, on {{machine}}.
The times of its runs and evaluations add up to {{minutes:.0f}} minutes; several processes that are
given other `--seeds` of the same workdir run side by side.
Two random halves of the data differ by {{halves:.2f}}.
"""


def _no_fields(steps: int) -> Mapping[str, Any]:
    """No field of the objective differs from its default."""
    return {}


def _ema_target(steps: int) -> Mapping[str, Any]:
    """The targets are those of the EMA parameters, as published."""
    return {"target_ema": "main"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Method:
    """A row of the comparison.

    Attributes:
      label: its name in tables and plots.
      objective: name of the objective.
      fields: fields of the objective that differ from its defaults, in a run of so many steps.
      sampler: the sampler of its flow maps.
      conditioning: fields of the network.
      from_flow: whether a flow model can be fine-tuned with it.
    """

    label: str
    objective: str
    fields: Callable[[int], Mapping[str, Any]] = _no_fields
    sampler: str = "euler"
    conditioning: Mapping[str, Any] = dataclasses.field(
        default_factory=lambda: {"conditioning": "meanflow"}
    )
    from_flow: bool = True


METHODS = {
    # A flow model does not see r.
    "flow_matching": Method(label="flow matching", objective="flow_matching", from_flow=False,
                            conditioning={"conditioning": "flow"}),
    "mean_flow": Method(label="MeanFlow", objective="mean_flow"),
    # A flow model lacks the velocity head.
    "improved_mean_flow": Method(label="improved MeanFlow", objective="improved_mean_flow",
                                 from_flow=False),
    "alpha_flow": Method(label="alpha-Flow", objective="alpha_flow"),
    "soflow": Method(label="SoFlow", objective="soflow"),
    "shortcut": Method(label="shortcut", objective="shortcut", fields=_ema_target),
    # The tangent is warmed up over a tenth of the run. It learns jumps to data alone.
    "consistency": Method(label="consistency", objective="consistency", sampler="restart",
                          fields=lambda steps: {"tangent.warmup_steps": steps // 10}),
    "terminal_velocity_matching": Method(label="terminal velocity matching",
                                         objective="terminal_velocity_matching",
                                         fields=_ema_target),
    "decoupled_mean_flow": Method(label="loss of Decoupled MeanFlow",
                                  objective="decoupled_mean_flow"),
    "decoupled": Method(label="Decoupled MeanFlow", objective="decoupled_mean_flow",
                        conditioning={"conditioning": "decoupled", "split_depth": 4}),
}
# Runs: the method, whether it starts from the flow model, and its share of the budget.
RUNS = {
    "flow": ("flow_matching", False, 0.5),
    **{f"{name}_scratch": (name, False, 1.0) for name in METHODS},
    **{f"{name}_flow": (name, True, 0.5) for name, m in METHODS.items() if m.from_flow},
}


def _objective(method: Method, steps: int) -> ConfigDict:
    """The section `config.objective` of a run of so many steps."""
    section = ConfigDict(registry.default_config("objective", method.objective))
    section.update_from_flattened_dict(method.fields(steps))
    return section


def config_of(run: str, folder: pathlib.Path, seed: int, scale: Scale) -> ConfigDict:
    """The config of a run.

    Args:
      run: one of `RUNS`.
      folder: folder of the seed, which holds a workdir for each run.
      seed: random seed of the run.
      scale: length of the run.
    """
    name, from_flow, share = RUNS[run]
    method, config = METHODS[name], digits_sit.get_config()
    config.seed, config.data.batch_size = seed, BATCH_SIZE
    config.objective = _objective(method, PARTS)
    built = objective(config.objective)
    config.model.update(**method.conditioning, learned_variance=built.learned_variance,
                        guidance_input=built.guidance_input, velocity_head=built.velocity_head)
    # Terminal velocity matching differentiates a tangent, which flash attention does not.
    config.model.attention = "xla"
    if built.velocity_head:
        config.model.head_depth = 2
    config.sampling.sampler = ConfigDict(registry.default_config("sampler", method.sampler))
    if from_flow:
        config.init.checkpoint = str(folder / "flow")
        config.optimizer.learning_rate = digits_dmf.get_config().optimizer.learning_rate
    operations = BATCH_SIZE * built.flops(network(config.model))
    parts = share * scale.factor * BUDGET / operations / PARTS
    return _with_steps(config, method, PARTS * max(1, round(parts)))


def _with_steps(config: ConfigDict, method: Method, steps: int) -> ConfigDict:
    """The config with a length, and with all that is a share of it."""
    config.objective = _objective(method, steps)
    config.run.update(steps=steps, checkpoint_every=steps // PARTS, log_every=steps // PARTS,
                      sample_every=0, keep_last=PARTS)
    config.optimizer.update(decay_steps=steps, warmup_steps=steps // 12)
    config.emas.main.decay = max(0.0, 1 - 12 / steps)
    return config


def label(run: str) -> str:
    """The name of a run in tables."""
    name, from_flow, _ = RUNS[run]
    if run == "flow":
        return "flow model, half of the compute"
    return METHODS[name].label + (" from the flow model" if from_flow else " from scratch")


MEASURES = {
    **{run: Measure(label=label(run), run=run, steps=MANY) for run in RUNS},
    **{f"{run}_{part}": Measure(label=label(run), run=run, steps=(1,), share=part / PARTS)
       for run in RUNS if run != "flow" for part in range(1, PARTS)},
}


def _claims(text: str, lower: str, higher: str, published: Mapping[int, str]) -> list[Claim]:
    """A claim for each number of sampling steps, with its published numbers."""
    return [Claim(text=f"{text} ({numbers})", lower=lower, higher=(higher,), steps=steps)
            for steps, numbers in published.items()]


SCRATCH_CLAIMS = (
    *_claims("improved MeanFlow has a lower distance than MeanFlow", "improved_mean_flow_scratch",
             "mean_flow_scratch", {1: "XL/2: FID 1.72 and 3.43, arXiv:2512.02012",
                                   2: "XL/2: FID 1.54 and 2.93, arXiv:2512.02012"}),
    *_claims("alpha-Flow has a lower distance than MeanFlow", "alpha_flow_scratch",
             "mean_flow_scratch", {1: "B/2: FID 5.40 and 6.04, arXiv:2510.20771",
                                   2: "B/2: FID 5.01 and 5.17, arXiv:2510.20771"}),
    *_claims("SoFlow has a lower distance than MeanFlow", "soflow_scratch", "mean_flow_scratch",
             {1: "XL/2: FID 2.96, arXiv:2512.15657, and 3.43",
              2: "XL/2: FID 2.66, arXiv:2512.15657, and 2.93"}),
    *_claims("MeanFlow has a lower distance than shortcut models", "mean_flow_scratch",
             "shortcut_scratch", {1: "XL/2: FID 3.43 and 10.60, arXiv:2505.13447"}),
    *_claims("MeanFlow has a lower distance than consistency training", "mean_flow_scratch",
             "consistency_scratch", {1: "XL/2: FID 3.43 and, in discrete time, 34.24, "
                                        "arXiv:2505.13447"}),
    *_claims("terminal velocity matching has a lower distance than MeanFlow",
             "terminal_velocity_matching_scratch", "mean_flow_scratch",
             {1: "XL/2: FID 3.29, arXiv:2511.19797, and 3.43"}),
)
FLOW_CLAIMS = (
    *_claims("Decoupled MeanFlow from a flow model has a lower distance than MeanFlow from scratch",
             "decoupled_flow", "mean_flow_scratch",
             {1: "FID 19.3 and 20.6, arXiv:2510.24474, second-hand",
              2: "FID 17.3 and 18.1, arXiv:2510.24474, second-hand"}),
    *_claims("decoupled conditioning has a lower distance than MeanFlow's, with the loss of "
             "Decoupled MeanFlow", "decoupled_flow", "decoupled_mean_flow_flow",
             {1: "arXiv:2510.24474", 4: "arXiv:2510.24474"}),
    *_claims("to fine-tune a flow model is better than to train from scratch, with Decoupled "
             "MeanFlow", "decoupled_flow", "decoupled_scratch", {1: "arXiv:2510.24474"}),
)


STUDIES = {
    "scratch": Study(
        title="From scratch",
        text="The whole compute with one objective, from random parameters.",
        measures=tuple(run for run in RUNS if run.endswith("_scratch")),
        claims=SCRATCH_CLAIMS,
    ),
    "flow": Study(
        title="From a flow model",
        text="Half of the compute trains a flow model, and half fine-tunes it. The first row is "
        "the flow model itself; the last two are from scratch.",
        measures=(*(run for run in RUNS if run == "flow" or run.endswith("_flow")),
                  "mean_flow_scratch", "decoupled_scratch"),
        claims=FLOW_CLAIMS,
    ),
}
