"""Faults of what users call from Python."""

from benchmarks.mutant_lists.mutant import Mutant

_API = ("tests/test_python_api.py",)

MUTANTS = (
    Mutant(
        "flow_map_labels", "the flow map that is loaded takes labels of no class",
        "dmf/models/flow_map.py",
        "(labels < 0) | (labels > y.num_classes)",
        "labels > 2 * labels.max() + 1",
        _API,
    ),
    Mutant(
        "null_label", "the flow map that is loaded refuses the null label",
        "dmf/models/flow_map.py",
        "| (labels > y.num_classes)]",
        "| (labels >= y.num_classes)]",
        _API,
    ),
    Mutant(
        "load_overrides", "dmf.load takes overrides and does nothing with them",
        "dmf/cli/load.py",
        "    if given:\n",
        "    if not given:\n",
        _API,
    ),
    Mutant(
        "trajectory_start", "the trajectory of samples lacks x at t = 1",
        "dmf/sampling/samplers.py",
        "jnp.concatenate([x_1[None], later])",
        "later",
        ("tests/sampling/test_samplers.py",),
    ),
)  # fmt: skip
