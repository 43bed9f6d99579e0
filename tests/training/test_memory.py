"""What a run cannot fit into is said before anything is made."""

import shutil

import jax
import jax.numpy as jnp
import pytest
from etils import epath
from jax.sharding import NamedSharding, PartitionSpec

from dmf.errors import InputError
from dmf.runtime.sharding import make_mesh
from dmf.training import memory


def sharded(*axes: str | None) -> jax.ShapeDtypeStruct:
    """2^20 float32 numbers as a shape, 4 MiB in all."""
    sharding = NamedSharding(make_mesh(), PartitionSpec(*axes))
    return jax.ShapeDtypeStruct((2**10, 2**10), jnp.float32, sharding=sharding)


@pytest.mark.parametrize(("axes", "copies"), [((), 8), (("data",), 1)])
def test_cpu_devices_share_one_memory(axes, copies, monkeypatch):
    needed = copies * 2**22
    monkeypatch.setattr(memory, "device_memory", lambda device: needed)
    memory.check_memory(sharded(*axes), sharded("data"))
    monkeypatch.setattr(memory, "device_memory", lambda device: needed - 1)
    with pytest.raises(InputError, match=r"^model: the train state takes .* GiB"):
        memory.check_memory(sharded(*axes), ())
    with pytest.raises(InputError, match=r"^data.batch_size: a batch takes"):
        memory.check_memory((), sharded(*axes))


def test_a_checkpoint_needs_room_on_the_disk(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda place: usage._replace(free=2**22))
    memory.check_disk(epath.Path(tmp_path) / "not/there/yet", sharded())
    monkeypatch.setattr(shutil, "disk_usage", lambda place: usage._replace(free=2**22 - 1))
    with pytest.raises(InputError, match=r"^workdir=.*: a checkpoint takes 0.004 GiB"):
        memory.check_disk(epath.Path(tmp_path), sharded())


def test_snapshots_that_are_not_there_yet_need_room_too(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    for step in (1, 2):
        (tmp_path / "ema_snapshots" / str(step)).mkdir(parents=True)
    monkeypatch.setattr(shutil, "disk_usage", lambda place: usage._replace(free=4 * 2**22))
    memory.check_disk(epath.Path(tmp_path), sharded(), {"wide": sharded()}, 5)
    with pytest.raises(InputError, match=r"^run.keep_snapshots=6: .* take 0.020 GiB, and the disk"):
        memory.check_disk(epath.Path(tmp_path), sharded(), {"wide": sharded()}, 6)
