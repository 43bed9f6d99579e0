"""How long a step may take, and a run, from one chip to 4,096: a model, and nothing measured.

    python -m benchmarks.estimate --chip="TPU v5 lite" --share_of_peak=0.4

A step makes products and sends. Products take samples x FLOP of a sample / (chips x peak x the
share of peak that is assumed). Inside a slice each chip sends what `dmf compile` counts in the
program for sixteen (benchmarks/results/scaling.json), whatever the number of chips, as in a ring.
Between slices each sends its share of the gradients twice. The two bounds are all of it at once,
and one after the other.
"""

import json
from collections.abc import Sequence
from pathlib import Path

from absl import app, flags

from dmf.chips import CHIPS
from dmf.collectives import Collective

_CHIP = flags.DEFINE_string("chip", "TPU v5 lite", "as dmf/chips.py lists it")
_SHARE = flags.DEFINE_float("share_of_peak", 0.4, "what products are assumed to reach")
_NETWORK = flags.DEFINE_float("network", 3.0, "GB/s that a chip sends to another slice")
_SLICE = flags.DEFINE_integer("slice", 256, "chips of the largest slice")
_STEPS = flags.DEFINE_integer("steps", 400_000, "of a run")
_COMPILED = flags.DEFINE_string("compiled", "benchmarks/results/scaling.json", "what was counted")


def counted(path: str) -> tuple[float, float, float]:
    """FLOP of a sample, bytes that a chip sends in a step, and bytes of the parameters, of XL/2 at
    256 on sixteen chips."""
    for key, found in json.loads(Path(path).read_text()).items():
        topology, config, batch, _ = json.loads(key)
        if (topology, config) == ("v5e:4x4", "dmf_xl2_256") and found.get("collectives"):
            sent = sum(Collective(**fields).sent for fields in found["collectives"])
            return found["step_flops"] / batch, sent, found["parameters"]
    raise SystemExit(f"{path}: it has no step of dmf_xl2_256 on v5e:4x4; python -m "
                     "benchmarks.scaling makes it")


def main(_: Sequence[str]) -> None:
    """Prints a row for each number of chips, and its batch."""
    flops, sent, parameters = counted(_COMPILED.value)
    chip = CHIPS[_CHIP.value]
    print("| chips | batch | samples a chip | products ms | links ms | between slices ms | "
          "step ms | days of a run | chip-hours |\n|" + "---|" * 9)
    for chips in (1, 4, 16, 64, 256, 1024, 4096):
        batch = max(256, chips)
        slices = -(-chips // _SLICE.value)
        products = batch / chips * flops / (chip.flops * _SHARE.value)
        links = sent / chip.link if chips > 1 else 0.0
        # Gradients are in bfloat16; every chip of a slice has its share of the sum.
        across = 2 * parameters / 2 / min(chips, _SLICE.value) / (_NETWORK.value * 1e9)
        across = across if slices > 1 else 0.0
        least, most = max(products, links, across), products + links + across
        days = [seconds * _STEPS.value / 86400 for seconds in (least, most)]
        print(f"| {chips:,} | {batch:,} | {batch // chips} | {1e3 * products:.0f} | "
              f"{1e3 * links:.0f} | {1e3 * across:.1f} | {1e3 * least:.0f} to {1e3 * most:.0f} | "
              f"{days[0]:.2g} to {days[1]:.2g} | {24 * days[0] * chips:,.0f} to "
              f"{24 * days[1] * chips:,.0f} |")
    print(f"\nDecoupled MeanFlow, XL/2 at 256: {flops / 1e12:.2f} TFLOP a sample, "
          f"{sent / 2**30:.2f} GiB sent by a chip in a step, {_STEPS.value:,} steps. "
          f"{_CHIP.value}: {chip.flops / 1e12:.0f} TFLOP/s at {_SHARE.value:.0%}, links "
          f"{chip.link / 1e9:.0f} GB/s, {_NETWORK.value:g} GB/s between slices of {_SLICE.value}.")


if __name__ == "__main__":
    app.run(main)
