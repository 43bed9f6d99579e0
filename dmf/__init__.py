"""Decoupled MeanFlow in JAX: flow models become flow maps that sample in 1 to 4 steps.

`flow_map, config = dmf.load(DIR)` gives u(x_t, t, r, y) of a run or an export; `dmf.sample` makes
images from it. Names are imported when first used, so that `import dmf` costs nothing.
"""

import importlib
from typing import Any

__version__ = "0.1.0"

_HOME = {
    "Batch": "dmf.typing",
    "ClassifierFree": "dmf.guidance",
    "DecoupledMeanFlow": "dmf.objectives",
    "DiT": "dmf.models.dit",
    "FlowMap": "dmf.typing",
    "FlowMatching": "dmf.objectives",
    "InputError": "dmf.typing",
    "MeanFlow": "dmf.objectives",
    "Network": "dmf.typing",
    "load": "dmf.loading",
    "sample": "dmf.samplers",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'dmf' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return [*_HOME, "__version__"]
