"""A small flow model of the digits: every field with its default, as `dmf/defaults.py` explains.

    dmf train --config=configs/default.py --workdir=DIR --config.run.steps=1000
"""

from dmf.defaults import (
    decoupled_mean_flow,
    drawn_guidance,
    flow_matching,
    get_config,
    logit_normal,
    mean_flow,
    ordered_pair,
    self_guidance,
    tangent,
    teacher_guidance,
)

__all__ = [
    "decoupled_mean_flow",
    "drawn_guidance",
    "flow_matching",
    "get_config",
    "logit_normal",
    "mean_flow",
    "ordered_pair",
    "self_guidance",
    "tangent",
    "teacher_guidance",
]
