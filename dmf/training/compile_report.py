"""The report of a compiled training step: memory, communication, and bounds of its time."""

from typing import NamedTuple

from dmf.runtime.device_specs import DEVICE_SPECS, GIB, GPU_SHARE_VARIABLES
from dmf.training.compile import CompiledStep
from dmf.training.hlo_collectives import Collective


class Estimate(NamedTuple):
    """The estimated time of a training step in seconds; nothing of it is measured.

    Attributes:
      matmuls: matmuls at the assumed MFU, which includes all other operations.
      within_slices: communication over the links within slices.
      between_slices: communication over the network between slices.
    """

    matmuls: float
    within_slices: float
    between_slices: float

    @property
    def lower_bound(self) -> float:
        """The time if computation and communication overlap completely."""
        return max(self)

    @property
    def upper_bound(self) -> float:
        """The time if they do not overlap at all."""
        return sum(self)


def estimate(compiled: CompiledStep, mfu: float, slice_bandwidth: float) -> Estimate | None:
    """Estimates the time of a training step.

    Args:
      compiled: the compiled step.
      mfu: assumed model FLOPs utilisation, in (0, 1].
      slice_bandwidth: assumed bytes/s that a device sends to other slices.

    Returns:
      The estimate; None for devices that `dmf.runtime.device_specs` does not list.
    """
    specs = DEVICE_SPECS.get(compiled.device)
    if specs is None:
        return None
    sent = {between: sum(c.sent for c in compiled.collectives if c.between_slices == between)
            for between in (False, True)}
    flops_per_device = compiled.step_flops / compiled.devices
    return Estimate(
        matmuls=flops_per_device / (specs.flops * mfu),
        within_slices=sent[False] / specs.link,
        between_slices=sent[True] / slice_bandwidth,
    )


def report(compiled: CompiledStep, mfu: float = 0.4, slice_bandwidth: float = 3e9) -> str:
    """A report of a compiled step in markdown.

    Args:
      compiled: the compiled step.
      mfu: assumed model FLOPs utilisation, in (0, 1].
      slice_bandwidth: assumed bytes/s that a device sends to other slices.
    """
    axes = " x ".join(f"{name} {size}" for name, size in compiled.mesh.items())
    rows = [(name, getattr(compiled, name)) for name in
            ("parameters", "opt_state", "ema_params", "frozen", "batch", "temporaries", "total")]
    lines = [f"{compiled.devices} x {compiled.device}; mesh {axes}; global batch "
             f"{compiled.batch_size}", "", "| memory per device | GiB |", "|---|---|"]
    lines += [f"| {name} | {size / GIB:.2f} |" for name, size in rows if size]
    if compiled.memory is not None:
        verdict = "fits" if compiled.fits else "does not fit"
        lines.append(f"| available | {_available(compiled)}: the step {verdict} |")
    lines += _collectives_table(compiled.collectives)
    tflops = compiled.step_flops / 1e12
    lines += ["", f"{tflops:.4g} TFLOP per step, {tflops / compiled.devices:.4g} per device; "
              f"{compiled.donated / GIB:.2f} GiB of state updated in place; traced in "
              f"{compiled.seconds_to_lower:.0f} s, compiled in {compiled.seconds_to_compile:.0f} s"]
    times = estimate(compiled, mfu, slice_bandwidth) if compiled.fits else None
    return "\n".join(lines + _estimate_lines(compiled, times, mfu, slice_bandwidth))


def _available(compiled: CompiledStep) -> str:
    """The memory that a program may take, in GiB; of a GPU, as a part of its memory."""
    available = f"{compiled.memory / GIB:.2f}"
    if not compiled.device.startswith("NVIDIA"):
        return available
    card = DEVICE_SPECS[compiled.device].memory
    return f"{available} of {card / GIB:.2f} ({GPU_SHARE_VARIABLES[0]})"


def _collectives_table(messages: list[Collective]) -> list[str]:
    """The lines of the table of communication, after an empty line; [] without communication."""
    if not messages:
        return []
    lines = ["", "| collective | devices | count per step | GiB sent per device |",
             "|---|---|---|---|"]
    for c in messages:
        at_least = "" if c.known else "at least "
        lines.append(f"| {c.kind} | {c.group}{' between slices' * c.between_slices} | "
                     f"{at_least}{c.count:,} | {at_least}{c.sent / GIB:.3f} |")
    if not all(c.known for c in messages):
        lines += ["", "at least: some of them are in a loop of unknown length, and count once"]
    return lines


def _estimate_lines(
    compiled: CompiledStep, times: Estimate | None, mfu: float, slice_bandwidth: float
) -> list[str]:
    """The line of the estimated time; [] without an estimate."""
    if times is None:
        return []
    link = DEVICE_SPECS[compiled.device].link
    network = f", {slice_bandwidth / 1e9:g} GB/s between slices" if compiled.slices > 1 else ""
    communication = times.within_slices + times.between_slices
    return [
        f"estimated, not measured: {1e3 * times.lower_bound:.0f} to "
        f"{1e3 * times.upper_bound:.0f} ms per step (matmuls {1e3 * times.matmuls:.0f} ms at "
        f"{mfu:.0%} MFU, all other operations included; communication {1e3 * communication:.0f} ms "
        f"at {link / 1e9:g} GB/s{network}; the lower bound overlaps them, the upper bound does not)"
    ]
