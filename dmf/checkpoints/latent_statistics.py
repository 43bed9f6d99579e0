"""The mean and the standard deviation of each channel of latents, in a file beside them.

LightningDiT (arXiv:2501.01423) writes it beside cached latents, and publishes it beside VA-VAE: a
file of PyTorch, {"mean": [1, c, 1, 1], "std": [1, c, 1, 1]}. It is read without PyTorch.
"""

from typing import Any

import numpy as np
from etils import epath

from dmf.checkpoints.convert import pytorch_files
from dmf.checkpoints.convert.pytorch_storages import StoredTensor
from dmf.errors import InputError
from dmf.models.encoders.latent_scaling import LatentScaling
from dmf.runtime.files import is_regular_file
from dmf.runtime.paths import user_path

STATISTICS_FILE = "latents_stats.pt"
# Latents have fewer channels.
_MAX_CHANNELS = 2**16


def read_statistics(path: epath.PathLike) -> LatentScaling | None:
    """The scaling by channel that a file states; None where there is no such file.

    >>> read_statistics("/nowhere/latents_stats.pt") is None
    True

    Args:
      path: the file.

    Raises:
      InputError: the file is damaged, or holds something else.
    """
    path = user_path(path)
    if not is_regular_file(path):
        return None
    stored = pytorch_files.read(path)
    try:
        mean, std = (_numbers(stored[name]) for name in ("mean", "std"))
        return LatentScaling(mean=mean, std=std)
    except (LookupError, TypeError, ValueError) as error:
        if isinstance(error, InputError) and error.field not in ("std", "scale"):
            raise error.within(str(path)) from None
        raise InputError(str(path), remedy="it must hold a finite mean and a positive std of each "
                         'channel of latents, as {"mean": [1, c, 1, 1], "std": [1, c, 1, 1]}'
                         ) from None


def _numbers(tensor: Any) -> tuple[float, ...]:
    """The values of a tensor of one axis that is not 1."""
    if not isinstance(tensor, StoredTensor):
        raise TypeError("it is no tensor")
    size = int(np.prod(tensor.shape, dtype=float))
    if not max(tensor.shape, default=0) == size <= _MAX_CHANNELS or not size:
        raise ValueError(f"it has the shape {tensor.shape}")
    values = np.asarray(tensor).astype(np.float64).reshape(-1)
    if not np.isfinite(values).all():
        raise ValueError("a value is not finite")
    return tuple(values.tolist())


def dataset_statistics(directory: str) -> LatentScaling | None:
    """The scaling by channel that lies beside the cached latents of a dataset; None without one.

    Args:
      directory: the directory of the dataset; may be empty.

    Raises:
      InputError: the file is damaged, or holds something else.
    """
    return read_statistics(user_path(directory) / STATISTICS_FILE) if directory else None
