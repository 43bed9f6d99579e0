"""Whether a run fits into memory at all: its train state and its batch, before either is made."""

from typing import Any

import jax

from dmf.errors import InputError
from dmf.runtime.device_specs import GIB, device_memory
from dmf.training.train_state import TrainState
from dmf.types import Batch


def check_memory(state: TrainState, rows: Batch) -> None:
    """Checks the least that a run takes; `dmf compile` tells how much it takes in fact.

    Args:
      state: the train state as shapes with shardings.
      rows: a batch of the dataset as shapes with shardings.

    Raises:
      InputError: the train state or the batch takes more memory than the devices have.
    """
    sizes = {"model": (state, "the train state takes {}; choose a smaller model, or shard it over "
                       "more devices (mesh.fsdp)"),
             "data.batch_size": (rows, "a batch takes {}; choose a smaller one")}  # fmt: skip
    for field, (tree, remedy) in sizes.items():
        for device, size in _bytes_by_device(tree).items():
            memory = device_memory(device)
            if memory is not None and size > memory:
                compared = f"{size / GIB:,.1f} GiB of the {memory / GIB:,.1f} GiB of a device"
                raise InputError(field, remedy=remedy.format(compared))


def _bytes_by_device(tree: Any) -> dict[jax.Device, int]:
    """The bytes of a tree of sharded shapes on the devices of this process; those of CPU devices,
    which share one memory, stand at the first."""
    sizes: dict[jax.Device, int] = {}
    for leaf in jax.tree.leaves(tree):
        size = leaf.dtype.itemsize
        for side in leaf.sharding.shard_shape(leaf.shape):
            size *= side
        devices = sorted(leaf.sharding.addressable_devices, key=lambda device: device.id)
        for device in devices:
            place = devices[0] if device.platform == "cpu" else device
            sizes[place] = sizes.get(place, 0) + size
    return sizes
