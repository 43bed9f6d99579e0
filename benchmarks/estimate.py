"""How long a step may take, and a run, from one chip to 4,096: a model, and nothing measured.

    python -m benchmarks.estimate --chip="TPU v5 lite" --share_of_peak=0.4 [--price=P]

A step makes products and sends. Products take samples x FLOP of a sample / (chips x peak x the
share of peak that is assumed). Inside a slice each chip sends what `dmf compile` counts in the
program for sixteen (benchmarks/results/scaling.json), whatever the number of chips, as in a ring.
Between slices it sends what is counted in the program for two slices of sixteen: its share of sums
of gradients, which is as much smaller as the slices are larger, and goes around a ring of them. The
two bounds are all of it at once, and one after the other. With a price of a chip-hour, which is for
the reader to know, a column says what the chip-hours cost.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from absl import app, flags

from dmf.chips import CHIPS
from dmf.collectives import Collective

_CHIP = flags.DEFINE_enum("chip", "TPU v5 lite", sorted(CHIPS), "as dmf/chips.py lists it")
_SHARE = flags.DEFINE_float("share_of_peak", 0.4, "what products are assumed to reach",
                            lower_bound=1e-3, upper_bound=1.0)  # fmt: skip
_NETWORK = flags.DEFINE_float("network", 3.0, "GB/s that a chip sends to another slice",
                              lower_bound=1e-3)  # fmt: skip
_SLICE = flags.DEFINE_integer("slice", 256, "chips of the largest slice", lower_bound=1)
_STEPS = flags.DEFINE_integer("steps", 400_000, "of a run", lower_bound=1)
_PRICE = flags.DEFINE_float("price", 0.0, "of a chip-hour, in any currency; 0 for no column",
                            lower_bound=0.0)  # fmt: skip
_COMPILED = flags.DEFINE_string("compiled", "benchmarks/results/scaling.json", "what was counted")


class Counted(NamedTuple):
    """FLOP of a sample, and bytes that a chip sends in a step within slices, and between two."""

    flops: float
    within: float
    between: float


def counted(path: str, topology: str) -> Counted:
    """What was compiled of XL/2 at 256 for slices of sixteen chips."""
    for key, found in json.loads(Path(path).read_text()).items():
        on, config, batch, _ = json.loads(key)
        if (on, config) == (topology, "dmf_xl2_256") and found.get("collectives"):
            messages = [Collective(**fields) for fields in found["collectives"]]
            sent = [sum(c.sent for c in messages if c.between_slices == across)
                    for across in (False, True)]
            return Counted(found["step_flops"] / batch, *sent)
    raise SystemExit(f"{path}: it has no step of dmf_xl2_256 on {topology}; python -m "
                     "benchmarks.scaling makes it")


def seconds_between(sent: float, chips: int) -> float:
    """What is sent between slices, of what a chip sends between two of sixteen."""
    slices = -(-chips // _SLICE.value)
    share = 16 / min(chips, _SLICE.value) * 2 * (slices - 1) / slices
    return share * sent / (_NETWORK.value * 1e9)


def main(_: Sequence[str]) -> None:
    """Prints a row for each number of chips, and its batch."""
    flops, sent, _ = counted(_COMPILED.value, "v5e:4x4")
    between = counted(_COMPILED.value, "2 x v5e:4x4").between
    chip, price = CHIPS[_CHIP.value], _PRICE.value
    print("| chips | batch | samples a chip | products ms | links ms | between slices ms | step ms "
          "| days of a run | chip-hours |" + " cost |" * bool(price))
    print("|" + "---|" * (9 + bool(price)))
    for chips in (1, 4, 16, 64, 256, 1024, 4096):
        batch = max(256, chips)
        products = batch / chips * flops / (chip.flops * _SHARE.value)
        links = sent / chip.link if chips > 1 else 0.0
        across = seconds_between(between, chips)
        least, most = max(products, links, across), products + links + across
        days = [seconds * _STEPS.value / 86400 for seconds in (least, most)]
        hours = [24 * each * chips for each in days]
        cost = f" {price * hours[0]:,.0f} to {price * hours[1]:,.0f} |" if price else ""
        print(f"| {chips:,} | {batch:,} | {batch // chips} | {1e3 * products:.0f} | "
              f"{1e3 * links:.0f} | {1e3 * across:.1f} | {1e3 * least:.0f} to {1e3 * most:.0f} | "
              f"{days[0]:.2g} to {days[1]:.2g} | {hours[0]:,.0f} to {hours[1]:,.0f} |{cost}")
    print(f"\nDecoupled MeanFlow, XL/2 at 256: {flops / 1e12:.2f} TFLOP a sample, "
          f"{sent / 2**30:.2f} GiB sent by a chip in a step, and {between / 2**30:.2f} between two "
          f"slices of 16, {_STEPS.value:,} steps. "
          f"{_CHIP.value}: {chip.flops / 1e12:.0f} TFLOP/s at {_SHARE.value:.0%}, links "
          f"{chip.link / 1e9:.0f} GB/s, {_NETWORK.value:g} GB/s between slices of {_SLICE.value}.")


if __name__ == "__main__":
    app.run(main)
