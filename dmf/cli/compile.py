"""dmf compile --config=FILE [--topology=v5e:4x4] [--output=FILE.json] [--config.a.b=value ...]

Compiles the training step of a config and says what memory it takes of each device, how many
floating-point operations it is, and how long compiling took. The devices are those of this machine,
or a TPU slice that is not there, as v5e:4x4, v6e:8x8 or v5p:2x2x2 (this takes libtpu: pip install
'dmf-jax[tpu]'). Neither data nor checkpoints are read. Exits with 1 if the step does not fit.
"""

from collections.abc import Sequence

from absl import flags

from dmf import cli


def main(verb: str, arguments: Sequence[str]) -> None:
    """Compiles the training step of a config for devices that may not be there."""
    values = flags.FlagValues()
    cli.config_flag(values, arguments)
    flags.DEFINE_string("topology", "", "a TPU slice; this machine by default", flag_values=values)
    flags.DEFINE_string("output", "", "a .json file for the numbers", flag_values=values)
    cli.parse(verb, arguments, values, __doc__)
    cli.require(values, "config")
    import jax
    from etils import epath

    from dmf import checkpoint, compiling
    from dmf.typing import RunError

    topology = values.topology
    devices = compiling.topology_devices(topology) if topology else jax.devices()
    found = compiling.compile_step(values.config, devices)
    print(compiling.table(found))
    if values.output:
        checkpoint.write_json(epath.Path(values.output), found._asdict() | {"topology": topology})
    if found.fits is False:
        raise RunError(f"the step does not fit into {found.device}; try a larger mesh.fsdp, "
                       "model.remat=dots or full, or accumulation")
