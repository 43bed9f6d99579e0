"""Statistics of images that samples are compared with, in the layouts they are published in."""

import dataclasses
import os
import zipfile
from collections.abc import Mapping
from typing import Any

import numpy as np
from etils import epath

from dmf.convert import numpy_pickles
from dmf.metrics import Moments
from dmf.typing import InputError

# What is measured, by the names of mean and covariance in a file; the first that is there counts.
_NPZ_NAMES = {
    "fid": (("mu", "sigma"), ("ref_mu", "ref_sigma")),
    "sfid": (("mu_s", "sigma_s"),),
    "fd_dinov2": (("mu_dinov2", "sigma_dinov2"),),
}
_IMAGES = "arr_0"
_REMEDY = (
    "give an .npz with mu and sigma (ADM's also has mu_s, sigma_s and arr_0), or EDM2's .pkl with "
    "fid and fd_dinov2"
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reference:
    """What samples are compared with.

    Attributes:
      name: of the file.
      moments: by "fid" (Inception's pool3), "sfid" (its spatial features), "fd_dinov2".
      images: the file itself, if it also holds images (`arr_0`, uint8 NHWC).
    """

    name: str
    moments: Mapping[str, Moments]
    images: epath.Path | None = None


def read_reference(path: epath.PathLike) -> Reference:
    """Reads ADM's or a plain `.npz`, or EDM2's `.pkl`, of which nothing is run.

    Raises:
      InputError: there is no such file, it has another layout, or what it holds are no moments.
    """
    path = epath.Path(path)
    if not path.is_file():
        raise InputError(f"reference={path}: there is no such file; {_REMEDY}")
    if path.suffix == ".pkl":
        return _from_pickle(path)
    return _from_npz(path)


def _from_npz(path: epath.Path) -> Reference:
    try:
        with np.load(os.fspath(path), allow_pickle=False) as file:
            names = set(file.files)
            found = {kind: (file[mean], file[covariance])
                     for kind, pairs in _NPZ_NAMES.items() for mean, covariance in pairs[::-1]
                     if {mean, covariance} <= names}
    except (ValueError, OSError, EOFError, AttributeError, zipfile.BadZipFile) as error:
        raise InputError(f"reference={path}: no .npz, or a damaged one ({error})") from None
    moments = {kind: _moments(path, kind, *pair) for kind, pair in found.items()}
    if not moments:
        raise InputError(f"reference={path}: it has {', '.join(sorted(names)) or 'nothing'}; "
                         f"{_REMEDY}")
    return Reference(name=path.name, moments=moments, images=path if _IMAGES in names else None)


def _from_pickle(path: epath.Path) -> Reference:
    held = numpy_pickles.read(path)
    kinds = held.keys() & _NPZ_NAMES.keys() if isinstance(held, dict) else set()
    pairs = {kind: held[kind] for kind in sorted(kinds) if isinstance(held[kind], dict)}
    moments = {kind: _moments(path, kind, pair.get("mu"), pair.get("sigma"))
               for kind, pair in pairs.items()}
    if not moments:
        raise InputError(f"reference={path}: no statistics in it; {_REMEDY}")
    return Reference(name=path.name, moments=moments)


def _moments(path: epath.Path, kind: str, mean: Any, covariance: Any) -> Moments:
    """Checks that these are a mean and a covariance."""
    mean, covariance = np.asarray(mean), np.asarray(covariance)
    width = mean.shape[0] if mean.ndim == 1 else -1
    if covariance.shape != (width, width) or mean.dtype.kind != "f" or covariance.dtype.kind != "f":
        raise InputError(f"reference={path}: {kind} has a mean of shape {mean.shape} and a "
                         f"covariance of shape {covariance.shape}, which are no moments")
    mean, covariance = mean.astype(np.float64), covariance.astype(np.float64)
    scale = np.abs(covariance).max(initial=0)
    if not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
        raise InputError(f"reference={path}: {kind} holds NaN or infinity")
    if np.abs(covariance - covariance.T).max(initial=0) > 1e-6 * scale:
        raise InputError(f"reference={path}: {kind} has a covariance that is not symmetric")
    return Moments(mean, covariance)
