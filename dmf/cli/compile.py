"""dmf compile --config=FILE [--topology=v5e:4x4] [--slices=N] [--output=FILE.json] [--config...]

Compiles the training step of a config ahead of time, and prints the memory it takes on each device,
what devices send each other, its floating-point operations, how long compiling took, and bounds of
the time of a step. The devices are those of this machine, or others that need not be attached: TPU
slices as v5e:4x4, v6e:8x8 or v5p:2x2x2 (this needs libtpu: pip install 'jax[tpu]'), or NVIDIA
GPUs as h100:8, or h100:4x8 for 4 nodes of 8, of a100, a100-40gb, h100 and h200 (this needs JAX for
CUDA, but neither GPU nor driver: pip install 'jax[cuda13]'). A program may take 75% of the memory
of a GPU, or what XLA_CLIENT_MEM_FRACTION says. Neither data nor parameters are read; of an initial
checkpoint only its config, and of a dataset its metadata where sizes are -1. Exits with 1 if the
step does not fit.
"""

import math
from collections.abc import Sequence

from absl import flags as absl_flags

from dmf.cli import config_flag
from dmf.errors import InputError, RunError


def main(verb: str, arguments: Sequence[str]) -> None:
    """Compiles the training step of a config for devices that need not be attached."""
    values = absl_flags.FlagValues()
    text, fraction = absl_flags.DEFINE_string, absl_flags.DEFINE_float
    text("topology", "", "a TPU slice or GPUs; this machine by default", flag_values=values)
    absl_flags.DEFINE_integer("slices", 1, "number of such TPU slices", flag_values=values)
    fraction("mfu", 0.4, "assumed model FLOPs utilisation", flag_values=values)
    fraction("slice-bandwidth", 3.0, "assumed GB/s that a device sends to another slice or node",
             flag_values=values)
    text("output", "", "a .json file for the numbers", flag_values=values)
    config = config_flag.parse_with_config(verb, arguments, values, __doc__)
    _check(values)
    import jax

    from dmf.runtime import files
    from dmf.runtime.paths import user_path
    from dmf.training import compile, compile_report

    if values.output:
        files.check_output_file("--output", values.output)
    topology, bandwidth = values.topology, values["slice-bandwidth"].value * 1e9
    if topology:  # Accelerators of this machine are left to other processes.
        jax.config.update("jax_platforms", "cpu")
    devices = compile.topology_devices(topology, values.slices) if topology else jax.devices()
    compiled = compile.compile_step(config, devices)
    print(compile_report.report(compiled, values.mfu, bandwidth))
    if values.output:
        more = {"topology": topology, "collectives": [c._asdict() for c in compiled.collectives]}
        files.write_json(user_path(values.output), compiled._asdict() | more)
    if compiled.fits is False:
        raise RunError(f"the step does not fit into {compiled.device}; try a larger mesh.fsdp, "
                       "model.remat=dots or full, or gradient_accumulation")


def _check(values: absl_flags.FlagValues) -> None:
    """Raises InputError for a flag that is out of range, or that has no effect."""
    bandwidth = values["slice-bandwidth"].value
    if values.slices != 1 and not values.topology:
        raise InputError("--slices", values.slices, "give --topology too, as v5e:4x4, of which it "
                         "is the number; the devices of this machine tell their slices themselves")
    if not 0 < values.mfu <= 1:
        raise InputError("--mfu", values.mfu, "give more than 0, and at most 1")
    if not 0 < bandwidth < math.inf:
        raise InputError("--slice-bandwidth", bandwidth, "give more than 0, in GB/s")
