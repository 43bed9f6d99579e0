"""Whether a run fits into memory and onto its disk at all, before anything is made."""

import os
import shutil
from typing import Any

import jax
from etils import epath

from dmf.checkpoints.params import SNAPSHOTS
from dmf.errors import InputError
from dmf.runtime.device_specs import GIB, device_memory


def check_memory(state: Any, rows: Any) -> None:
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


def check_disk(
    workdir: epath.Path, state: Any, snapshot: Any = (), keep_snapshots: int = 0
) -> None:
    """Checks that a local disk has room for a checkpoint and the snapshots of power EMAs; that of a
    bucket is not known.

    Args:
      workdir: the workdir, which need not exist.
      state: the train state as shapes.
      snapshot: what a snapshot holds, as shapes.
      keep_snapshots: maximum number of snapshots.

    Raises:
      InputError: they take more bytes than are free.
    """
    if "://" in os.fspath(workdir):
        return
    place = next(parent for parent in (workdir, *workdir.resolve().parents) if parent.exists())
    size, free = _bytes(state), shutil.disk_usage(place).free
    if size > free:
        raise InputError("workdir", workdir, f"a checkpoint takes {size / GIB:,.3f} GiB, and its "
                         f"disk has {free / GIB:,.3f} GiB free")
    missing = max(keep_snapshots - len(list((workdir / SNAPSHOTS).glob("*"))), 0)
    size += missing * _bytes(snapshot)
    if size > free:
        raise InputError(
            "run.keep_snapshots", keep_snapshots,
            f"a checkpoint and these snapshots of the power EMAs take {size / GIB:,.3f} GiB, and "
            f"the disk of workdir has {free / GIB:,.3f} GiB free; keep fewer",
        )


def _bytes(tree: Any) -> int:
    return sum(leaf.dtype.itemsize * leaf.size for leaf in jax.tree.leaves(tree))


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
