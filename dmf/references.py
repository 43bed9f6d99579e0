"""Statistics of images that samples are compared with, in the layouts they are published in."""

import contextlib
import dataclasses
import functools
import os
import zipfile
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import numpy as np
from etils import epath
from jaxtyping import Float, Int64

from dmf.convert import numpy_pickles
from dmf.intact import fingerprint
from dmf.metrics import Moments, RunningMoments
from dmf.statistics import Statistics, write_npz
from dmf.typing import InputError

# Features, by the names of their mean and covariance in an .npz; the first that is there counts.
_NPZ_NAMES = {
    "pool3": (("mu", "sigma"), ("ref_mu", "ref_sigma")),
    "spatial": (("mu_s", "sigma_s"),),
    "dinov2": (("mu_dinov2", "sigma_dinov2"),),
    "pixels": (("mu_pixels", "sigma_pixels"),),
}
_PKL_NAMES = {"pool3": "fid", "dinov2": "fd_dinov2"}
_KEPT = "features_{}"
# Of a set of images, the features of about so many are kept for precision and recall.
KEPT_IMAGES = 10_000
_IMAGES, _LABELS = "arr_0", "labels"
_REMEDY = (
    "give an .npz with mu and sigma (ADM's also has mu_s, sigma_s and arr_0), or EDM2's .pkl with "
    "fid and fd_dinov2; dmf evaluate --make-reference makes one"
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reference:
    """What samples are compared with.

    Attributes:
      name: of the file or the set of images.
      moments: by kind of feature.
      features: of the images, or of some of them, by kind; for precision and recall.
      labels: of the images whose features are kept, None without labels.
      images: the file itself, if it also holds images (`arr_0`, uint8 NHWC).
    """

    name: str
    moments: Mapping[str, Moments | RunningMoments]
    features: Mapping[str, Float[np.ndarray, "n d"]] = dataclasses.field(default_factory=dict)
    labels: Int64[np.ndarray, "n"] | None = None
    images: epath.Path | None = None

    @functools.cached_property
    def fingerprint(self) -> str:
        """Tells its moments and features from others."""
        moments = {kind: (m.mean, m.covariance) for kind, m in self.moments.items()}
        return fingerprint([moments, self.features])


def kept_of(kinds: Collection[str], count: int) -> dict[str, int]:
    """Kinds of features that a reference of so many images keeps, and that it does so of every n-th
    image."""
    return dict.fromkeys(sorted(kinds), max(1, count // KEPT_IMAGES))


def of_statistics(
    name: str, statistics: Statistics, labels: Int64[np.ndarray, "n"] | None
) -> Reference:
    """A set of images as a reference.

    Args:
      name: of the set.
      statistics: of its images, with the features that `kept_of` says.
      labels: of its images, None without labels.
    """
    stride = max(statistics.keep.values(), default=1)
    return Reference(
        name=name,
        moments=statistics.moments,
        features={kind: statistics.features(kind) for kind in statistics.kept},
        labels=None if labels is None else labels[::stride],
    )


def holds_statistics(path: epath.PathLike) -> bool:
    """Whether a file is to be read by `read_reference`, and is no set of images."""
    path = epath.Path(path)
    if path.suffix != ".npz" or not path.is_file():
        return path.suffix in (".npz", ".pkl")
    names = {name for pairs in _NPZ_NAMES.values() for pair in pairs for name in pair}
    with _npz(path) as file:
        return bool(names & set(file.files)) or _IMAGES not in file.files


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


@contextlib.contextmanager
def _npz(path: epath.Path) -> Iterator[np.lib.npyio.NpzFile]:
    try:
        with np.load(os.fspath(path), allow_pickle=False) as file:
            yield file
    except (ValueError, OSError, EOFError, AttributeError, zipfile.BadZipFile) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"reference={path}: no .npz, or a damaged one ({error})") from None


def _from_npz(path: epath.Path) -> Reference:
    with _npz(path) as file:
        names = set(file.files)
        found = {kind: (file[mean], file[covariance])
                 for kind, pairs in _NPZ_NAMES.items() for mean, covariance in pairs[::-1]
                 if {mean, covariance} <= names}
        kept = {kind: file[_KEPT.format(kind)] for kind in _NPZ_NAMES
                if _KEPT.format(kind) in names}
        labels = file[_LABELS] if kept and _LABELS in names else None
    moments = {kind: _moments(path, kind, *pair) for kind, pair in found.items()}
    if not moments:
        raise InputError(f"reference={path}: it has {', '.join(sorted(names)) or 'nothing'}; "
                         f"{_REMEDY}")
    images = path if _IMAGES in names else None
    return Reference(name=path.name, moments=moments, features=kept, labels=labels, images=images)


def _from_pickle(path: epath.Path) -> Reference:
    held = numpy_pickles.read(path)
    kinds = {kind: held[name] for kind, name in _PKL_NAMES.items()
             if isinstance(held, dict) and isinstance(held.get(name), dict)}
    moments = {kind: _moments(path, kind, pair.get("mu"), pair.get("sigma"))
               for kind, pair in kinds.items()}
    if not moments:
        raise InputError(f"reference={path}: no statistics in it; {_REMEDY}")
    return Reference(name=path.name, moments=moments)


def write_reference(path: epath.PathLike, reference: Reference) -> None:
    """Writes statistics as an `.npz`: plain names, ADM's for spatial features, and our own.

    Raises:
      RunError: the disk is full or cannot be written.
    """
    arrays: dict[str, np.ndarray] = {}
    for kind, moments in reference.moments.items():
        mean, covariance = _NPZ_NAMES[kind][0]
        arrays |= {mean: moments.mean, covariance: moments.covariance}
    arrays |= {_KEPT.format(kind): values for kind, values in reference.features.items()}
    if reference.labels is not None:
        arrays[_LABELS] = reference.labels
    write_npz(epath.Path(path), arrays)


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
