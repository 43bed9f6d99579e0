"""Decoupled MeanFlow in JAX: flow models become flow maps that sample in 1 to 4 steps.

`flow_map, config = dmf.load(DIR)` loads u(x_t, t, r, y) from a run or an export, and `dmf.sample`
generates images with it. Names are imported when first used, so that `import dmf` costs nothing.
"""

import importlib
from typing import Any

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
    "SamplingGuidance": "dmf.sampling.guidance",
    "autoguidance": "dmf.sampling.guidance",
    "classifier_free": "dmf.sampling.guidance",
    "load": "dmf.checkpoints.load",
    "sample": "dmf.sampling.samplers",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'dmf' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return [*_HOME, "__version__"]
