"""Decoupled MeanFlow in JAX: flow models become flow maps that sample in 1 to 4 steps.

A flow map u(x_t, t, r, y) is the average velocity from time t to time r, x_r = x_t + (r - t) u.
Data is at t = 0 and noise at t = 1. A flow model is one that ignores r. From data to images:

    import dmf, jax

    dmf.train("dmf:digits_sit", "runs/digits_sit")                 # a flow model
    dmf.train("dmf:digits_dmf", "runs/digits_dmf")                 # fine-tuned to a flow map
    dmf.evaluate("runs/digits_dmf", steps=(1, 2, 4))["results"]    # how far from the data

    flow_map, config = dmf.load("runs/digits_dmf")
    noise = jax.random.normal(jax.random.key(0), (10, 8, 8, 1))
    digits = dmf.sample(flow_map, noise, range(10), steps=2)       # [10, 8, 8, 1], about [-1, 1]
    images = dmf.to_uint8(digits)                                  # [10, 8, 8, 1], 0 to 255

Functions that do what a command does, with its settings as arguments:

    config      the config of a run, from a file and overrides   dmf config
    train       train or resume a run                            dmf train
    evaluate    Frechet distances and other scores               dmf evaluate
    convert     a checkpoint of another project to an export     dmf convert

Functions on arrays: `load`, `load_latent_space`, `sample`, `classifier_free`, `autoguidance`,
`to_uint8`. Everything else are parts to build with: networks (`DiT`, `InContextDiT`), objectives
(`FlowMatching`, `MeanFlow`, `DecoupledMeanFlow`) and the types between them; see docs/python.md.

Names are imported when first used, so that `import dmf` costs nothing.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dmf.checkpoints.load import load_latent_space
    from dmf.cli.config import config
    from dmf.cli.convert import convert
    from dmf.cli.evaluate_call import evaluate
    from dmf.cli.load import load
    from dmf.cli.train import train
    from dmf.data.pixels import to_uint8
    from dmf.errors import InputError, RunError
    from dmf.models.dit import DiT
    from dmf.models.in_context_dit import InContextDiT
    from dmf.objectives import DecoupledMeanFlow, FlowMatching, MeanFlow
    from dmf.sampling.guidance import SamplingGuidance, autoguidance, classifier_free
    from dmf.sampling.samplers import sample
    from dmf.types import Batch, ClassLabels, Condition, FlowMap, Network

__version__ = "0.1.0"

# The module that defines each public name.
_HOME = {
    "Batch": "dmf.types",
    "ClassLabels": "dmf.types",
    "Condition": "dmf.types",
    "DecoupledMeanFlow": "dmf.objectives",
    "DiT": "dmf.models.dit",
    "FlowMap": "dmf.types",
    "FlowMatching": "dmf.objectives",
    "InContextDiT": "dmf.models.in_context_dit",
    "InputError": "dmf.errors",
    "MeanFlow": "dmf.objectives",
    "Network": "dmf.types",
    "RunError": "dmf.errors",
    "SamplingGuidance": "dmf.sampling.guidance",
    "autoguidance": "dmf.sampling.guidance",
    "classifier_free": "dmf.sampling.guidance",
    "config": "dmf.cli.config",
    "convert": "dmf.cli.convert",
    "evaluate": "dmf.cli.evaluate_call",
    "load": "dmf.cli.load",
    "load_latent_space": "dmf.checkpoints.load",
    "sample": "dmf.sampling.samplers",
    "to_uint8": "dmf.data.pixels",
    "train": "dmf.cli.train",
}
__all__ = [
    "Batch", "ClassLabels", "Condition", "DecoupledMeanFlow", "DiT", "FlowMap", "FlowMatching",
    "InContextDiT", "InputError", "MeanFlow", "Network", "RunError", "SamplingGuidance",
    "autoguidance", "classifier_free", "config", "convert", "evaluate", "load",
    "load_latent_space", "sample", "to_uint8", "train",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'dmf' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return [*_HOME, "__version__"]
