"""dmf compile --config=FILE [--topology=v5e:4x4] [--slices=N] [--output=FILE.json] [--config...]

Compiles the training step of a config and says what memory it takes of each device, what devices
send each other, how many floating-point operations it is, how long compiling took, and within which
bounds the time of a step may lie. The devices are those of this machine, or TPU slices that are not
there, as v5e:4x4, v6e:8x8 or v5p:2x2x2 (this takes libtpu: pip install 'dmf-jax[tpu]'). Neither
data nor checkpoints are read. Exits with 1 if the step does not fit.
"""

import math
from collections.abc import Sequence

from absl import flags

from dmf import cli
from dmf.typing import InputError, RunError


def _check(values: flags.FlagValues) -> None:
    """Raises InputError for a flag that is out of range, or that nothing would look at."""
    if values.slices != 1 and not values.topology:
        raise InputError(f"--slices={values.slices}: give --topology too, as v5e:4x4, of which it "
                         "is so many; the devices of this machine say themselves how they lie")
    if not 0 < values.share_of_peak <= 1:
        raise InputError(f"--share_of_peak={values.share_of_peak}: give more than 0, and at most 1")
    if not 0 < values.network < math.inf:
        raise InputError(f"--network={values.network}: give more than 0, in GB/s")


def main(verb: str, arguments: Sequence[str]) -> None:
    """Compiles the training step of a config for devices that may not be there."""
    values = flags.FlagValues()
    cli.config_flag(values, arguments)
    flags.DEFINE_string("topology", "", "a TPU slice; this machine by default", flag_values=values)
    flags.DEFINE_integer("slices", 1, "how many of them", flag_values=values)
    flags.DEFINE_float(
        "share_of_peak", 0.4, "what products are assumed to reach", flag_values=values
    )
    flags.DEFINE_float(
        "network", 3.0, "GB/s that a device is assumed to send to another slice", flag_values=values
    )
    flags.DEFINE_string("output", "", "a .json file for the numbers", flag_values=values)
    cli.parse(verb, arguments, values, __doc__)
    cli.require(values, "config")
    _check(values)
    import jax
    from etils import epath

    from dmf import compiling, files

    topology = values.topology
    devices = compiling.topology_devices(topology, values.slices) if topology else jax.devices()
    found = compiling.compile_step(values.config, devices)
    print(compiling.table(found, values.share_of_peak, values.network * 1e9))
    if values.output:
        told = {"topology": topology, "collectives": [c._asdict() for c in found.collectives]}
        files.write_json(epath.Path(values.output), found._asdict() | told)
    if found.fits is False:
        raise RunError(f"the step does not fit into {found.device}; try a larger mesh.fsdp, "
                       "model.remat=dots or full, or accumulation")
