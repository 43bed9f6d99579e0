"""Estimated time of a training step and of a run on 1 to 4,096 chips; nothing is measured.

    python -m benchmarks.estimate --chip="TPU v5 lite" --mfu=0.4 [--price=P]

A step computes matmuls and communicates. Matmuls take samples x FLOP per sample / (chips x peak x
MFU). Within a slice, the bytes that a chip sends are those that `dmf compile` counts in the program
for sixteen chips (benchmarks/results/scaling.json); in a ring they do not depend on the number of
chips. Between slices, a chip sends its shard of the gradients around a ring of slices: the bytes
are those of the program for two slices of sixteen chips, and shrink as slices grow. The lower bound
overlaps computation and communication, the upper bound adds them. With the price of a chip-hour, a
column shows the cost.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from absl import flags

from benchmarks.machine import start
from dmf.runtime.device_specs import DEVICE_SPECS
from dmf.training.hlo_collectives import Collective

_CHIP = flags.DEFINE_enum("chip", "TPU v5 lite", sorted(DEVICE_SPECS),
                          "a device of dmf/runtime/device_specs.py")  # fmt: skip
_MFU = flags.DEFINE_float("mfu", 0.4, "assumed model FLOPs utilisation",
                          lower_bound=1e-3, upper_bound=1.0)  # fmt: skip
_BANDWIDTH = flags.DEFINE_float("slice-bandwidth", 3.0, "GB/s that a chip sends to another slice",
                                lower_bound=1e-3)  # fmt: skip
_SLICE = flags.DEFINE_integer("slice", 256, "chips of the largest slice", lower_bound=1)
_STEPS = flags.DEFINE_integer("steps", 400_000, "training steps of a run", lower_bound=1)
_PRICE = flags.DEFINE_float("price", 0.0, "price of a chip-hour, in any currency; 0: no column",
                            lower_bound=0.0)  # fmt: skip
_COMPILED = flags.DEFINE_string("compiled", "benchmarks/results/scaling.json",
                                "the output of benchmarks.scaling")  # fmt: skip


class StepCosts(NamedTuple):
    """The costs of a training step that do not depend on the time it takes.

    Attributes:
      flops: FLOP per sample.
      within: bytes that a chip sends in a step within its slice.
      between: bytes that a chip sends in a step to another slice.
    """

    flops: float
    within: float
    between: float


def step_costs(path: str, topology: str) -> StepCosts:
    """The costs of a step of XL/2 at 256 that was compiled for a topology of 16-chip slices."""
    for key, step in json.loads(Path(path).read_text()).items():
        compiled_for, config, batch, _ = json.loads(key)
        if (compiled_for, config) == (topology, "dmf_xl2_256") and step.get("collectives"):
            collectives = [Collective(**fields) for fields in step["collectives"]]
            sent = [sum(c.sent for c in collectives if c.between_slices == between)
                    for between in (False, True)]
            return StepCosts(step["step_flops"] / batch, *sent)
    raise SystemExit(f"{path}: it has no step of dmf_xl2_256 on {topology}; run python -m "
                     "benchmarks.scaling")


def seconds_between(sent: float, chips: int) -> float:
    """Seconds to communicate between slices.

    Args:
      sent: bytes that a chip sends between two slices of sixteen chips.
      chips: number of chips.
    """
    slices = -(-chips // _SLICE.value)
    share = 16 / min(chips, _SLICE.value) * 2 * (slices - 1) / slices
    return share * sent / (_BANDWIDTH.value * 1e9)


class StepTime(NamedTuple):
    """The estimated time of a step on a number of chips.

    Attributes:
      batch: global batch size: 256, or one sample per chip if there are more.
      matmuls, links, across: seconds of matmuls, and to communicate within and between slices.
    """

    batch: int
    matmuls: float
    links: float
    across: float

    @property
    def least(self) -> float:
        """The lower bound in seconds, where computation and communication overlap."""
        return max(self[1:])

    @property
    def most(self) -> float:
        """The upper bound in seconds, where they do not overlap."""
        return sum(self[1:])


def compiled_costs() -> StepCosts:
    """The costs of a step of XL/2 at 256, as it was compiled."""
    between = step_costs(_COMPILED.value, "2 x v5e:4x4").between
    return step_costs(_COMPILED.value, "v5e:4x4")._replace(between=between)


def step_time(costs: StepCosts, chips: int) -> StepTime:
    """The estimated time of a step on a number of chips."""
    chip, batch = DEVICE_SPECS[_CHIP.value], max(256, chips)
    matmuls = batch / chips * costs.flops / (chip.flops * _MFU.value)
    links = costs.within / chip.link if chips > 1 else 0.0
    return StepTime(batch, matmuls, links, seconds_between(costs.between, chips))


def main(_: Sequence[str]) -> None:
    """Prints a row for each number of chips."""
    costs = compiled_costs()
    chip, price = DEVICE_SPECS[_CHIP.value], _PRICE.value
    print("| chips | batch | samples per chip | matmuls ms | links ms | between slices ms | "
          "step ms | days of a run | chip-hours |" + " cost |" * bool(price))
    print("|" + "---|" * (9 + bool(price)))
    for chips in (1, 4, 16, 64, 256, 1024, 4096):
        time = step_time(costs, chips)
        batch, matmuls, links, across = time
        least, most = time.least, time.most
        days = [seconds * _STEPS.value / 86400 for seconds in (least, most)]
        hours = [24 * each * chips for each in days]
        cost = f" {price * hours[0]:,.0f} to {price * hours[1]:,.0f} |" if price else ""
        print(f"| {chips:,} | {batch:,} | {batch // chips} | {1e3 * matmuls:.0f} | "
              f"{1e3 * links:.0f} | {1e3 * across:.1f} | {1e3 * least:.0f} to {1e3 * most:.0f} | "
              f"{days[0]:.2g} to {days[1]:.2g} | {hours[0]:,.0f} to {hours[1]:,.0f} |{cost}")
    print(f"\nDecoupled MeanFlow, XL/2 at 256: {costs.flops / 1e12:.2f} TFLOP per sample, "
          f"{costs.within / 2**30:.2f} GiB sent per chip and step, and "
          f"{costs.between / 2**30:.2f} between two slices of 16, {_STEPS.value:,} steps. "
          f"{_CHIP.value}: {chip.flops / 1e12:.0f} TFLOP/s at {_MFU.value:.0%}, links "
          f"{chip.link / 1e9:.0f} GB/s, {_BANDWIDTH.value:g} GB/s between slices of "
          f"{_SLICE.value}.")


if __name__ == "__main__":
    start(main)
