"""What a host must read, decode and upload per second, on paper; nothing is measured.

    python -m benchmarks.input_rates --chip="TPU v5 lite" --chips-per-host=4 [--mfu=0.4]

The time of a step is the lower bound of `benchmarks.estimate`, whose flags it takes: the faster the
step, the more its input must bring. A host reads and uploads the rows of its own chips. --rate is
what one core reads (`python -m benchmarks.loader`, rows per second and core), --decoded what one
core decodes: the last columns say how many cores a host needs, and "margin" how many times faster
one thread reads than the host needs. --tflop is the cost of a sample for another objective.
"""

from collections.abc import Sequence

from absl import flags

from benchmarks.estimate import compiled_costs, step_time
from benchmarks.machine import start

_HOSTS = flags.DEFINE_list("hosts", ["1", "4", "16", "64"], "numbers of hosts")
_CHIPS = flags.DEFINE_integer("chips-per-host", 4, "chips of a host", lower_bound=1)
_TFLOP = flags.DEFINE_float("tflop", 0.0, "TFLOP per sample; 0: Decoupled MeanFlow as compiled")
_ROW = flags.DEFINE_float("row-kib", 32.0, "KiB of a row: 32 at 256 x 256, 128 at 512 x 512")
_RATE = flags.DEFINE_float("rate", 9400.0, "rows per second that one core reads", lower_bound=1.0)
_DECODED = flags.DEFINE_float("decoded", 540.0, "images per second that one core decodes, where "
                              "the dataset stores images", lower_bound=1.0)  # fmt: skip


def main(_: Sequence[str]) -> None:
    """Prints a row for each number of hosts."""
    costs = compiled_costs()
    if _TFLOP.value:
        costs = costs._replace(flops=_TFLOP.value * 1e12)
    print("| hosts | chips | batch | step ms | rows per host and step | rows/s per host | "
          "MB/s per host, read and uploaded | MB/s of all hosts | margin | cores for PNG images |\n"
          + "|---" * 10 + "|")
    for hosts in map(int, _HOSTS.value):
        chips = hosts * _CHIPS.value
        time = step_time(costs, chips)
        rate = time.batch / hosts / time.least
        megabytes = rate * _ROW.value * 1024 / 1e6
        print(f"| {hosts} | {chips} | {time.batch} | {1e3 * time.least:.0f} | "
              f"{time.batch / hosts:.0f} | {rate:,.0f} | {megabytes:.1f} | "
              f"{hosts * megabytes:,.0f} | {_RATE.value / rate:.0f} | "
              f"{rate / _DECODED.value:.1f} |")
    print(f"\n{flags.FLAGS.chip}, {_CHIPS.value} per host, at {flags.FLAGS.mfu:.0%} MFU; "
          f"{costs.flops / 1e12:.2f} TFLOP per sample, {_ROW.value:g} KiB per row; one core reads "
          f"{_RATE.value:,.0f} rows/s or decodes {_DECODED.value:g} images/s.")


if __name__ == "__main__":
    start(main)
