"""From noise to images: samplers, guidance at sampling, the generator, and files of images.

For everyone who makes images. It imports `dmf.data`, `dmf.models`, `dmf.objectives` and what lies
below them.
"""

from dmf.sampling.samplers import (
    AdamsBashforth,
    ConsistencyTrajectory,
    Euler,
    EulerMaruyama,
    Heun,
    Restart,
    Sampler,
)

__all__ = [
    "AdamsBashforth",
    "ConsistencyTrajectory",
    "Euler",
    "EulerMaruyama",
    "Heun",
    "Restart",
    "Sampler",
]
