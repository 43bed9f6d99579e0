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

from dmf.checkpoints.convert import numpy_pickles
from dmf.errors import InputError
from dmf.evaluation.feature_statistics import Statistics, write_npz
from dmf.evaluation.metric import MetricInput
from dmf.evaluation.running_statistics import Moments, RunningMoments
from dmf.runtime.checksums import fingerprint
from dmf.runtime.files import is_regular_file
from dmf.runtime.paths import user_path

# Names of mean and covariance in an .npz, by kind of features; the first pair that is there counts.
_NPZ_NAMES = {
    "pool3": (("mu", "sigma"), ("ref_mu", "ref_sigma")),
    "spatial": (("mu_s", "sigma_s"),),
    "dinov2": (("mu_dinov2", "sigma_dinov2"),),
    "pixels": (("mu_pixels", "sigma_pixels"),),
}
_PKL_NAMES = {"pool3": "fid", "dinov2": "fd_dinov2"}
_FEATURES = "features_"
# A reference stores the features of about so many images.
STORED_IMAGES = 10_000
_IMAGES, _LABELS = "arr_0", "labels"
_REMEDY = (
    "give an .npz with mu and sigma (ADM's also has mu_s, sigma_s and arr_0), or EDM2's .pkl with "
    "fid and fd_dinov2; dmf evaluate --make-reference makes one"
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reference:
    """Statistics of the images that samples are compared with.

    Attributes:
      name: of the file or the set of images.
      moments: mean and covariance of the features of all images, by kind of features.
      features: features of the images, or of every n-th of them, by kind of features.
      labels: labels of the images whose features are stored; None without labels.
      images: the file itself, if it also holds images (`arr_0`, uint8 NHWC).
    """

    name: str
    moments: Mapping[str, Moments | RunningMoments]
    features: Mapping[str, Float[np.ndarray, "n d"]] = dataclasses.field(default_factory=dict)
    labels: Int64[np.ndarray, "n"] | None = None
    images: epath.Path | None = None

    @functools.cached_property
    def fingerprint(self) -> str:
        """A hash of the moments and the features."""
        moments = {kind: (m.mean, m.covariance) for kind, m in self.moments.items()}
        return fingerprint([moments, self.features])

    def metric_input(self, kind: str) -> MetricInput:
        """What a metric may use of a kind of features."""
        return MetricInput(
            moments=self.moments.get(kind), features=self.features.get(kind), labels=self.labels
        )


def feature_strides(kinds: Collection[str], count: int) -> dict[str, int]:
    """The kinds of features that a reference stores, and the stride n: of every n-th image.

    >>> feature_strides(["pool3"], 50_000)
    {'pool3': 5}

    Args:
      kinds: kinds of features.
      count: number of images of the reference.
    """
    return dict.fromkeys(sorted(kinds), max(1, count // STORED_IMAGES))


def reference_from_statistics(
    name: str, statistics: Statistics, labels: Int64[np.ndarray, "n"] | None
) -> Reference:
    """The reference of a set of images.

    Args:
      name: of the set.
      statistics: of its images, collected with `feature_strides`.
      labels: of all its images, None without labels.
    """
    stride = max(statistics.feature_strides.values(), default=1)
    return Reference(
        name=name,
        moments=statistics.moments,
        features={kind: statistics.features(kind) for kind in statistics.feature_parts},
        labels=None if labels is None else labels[::stride],
    )


def is_statistics_file(path: epath.PathLike) -> bool:
    """Whether `read_reference` reads a file; otherwise it is a set of images."""
    path = user_path(path)
    if path.suffix != ".npz" or not is_regular_file(path):
        return path.suffix in (".npz", ".pkl")
    names = {name for pairs in _NPZ_NAMES.values() for pair in pairs for name in pair}
    with _open_npz(path) as file:
        return bool(names & set(file.files)) or _IMAGES not in file.files


def read_reference(path: epath.PathLike) -> Reference:
    """Reads ADM's or a plain `.npz`, or EDM2's `.pkl`, whose code is not run.

    Raises:
      InputError: there is no such file, it has another layout, or it holds no valid moments.
    """
    path = user_path(path)
    if not is_regular_file(path):
        raise InputError("reference", path, f"there is no such file; {_REMEDY}")
    if path.suffix == ".pkl":
        return _read_pickle(path)
    return _read_npz(path)


@contextlib.contextmanager
def _open_npz(path: epath.Path) -> Iterator[np.lib.npyio.NpzFile]:
    try:
        with np.load(os.fspath(path), allow_pickle=False) as file:
            yield file
    except (ValueError, OSError, EOFError, AttributeError, zipfile.BadZipFile) as error:
        if isinstance(error, InputError):
            raise
        raise InputError("reference", path, f"no .npz, or a damaged one ({error})") from None


def _read_npz(path: epath.Path) -> Reference:
    with _open_npz(path) as file:
        names = set(file.files)
        pairs = {kind: (file[mean], file[covariance])
                 for kind, names_of_kind in _NPZ_NAMES.items()
                 for mean, covariance in names_of_kind[::-1] if {mean, covariance} <= names}
        features = {name.removeprefix(_FEATURES): file[name] for name in sorted(names)
                    if name.startswith(_FEATURES)}
        labels = file[_LABELS] if features and _LABELS in names else None
    moments = {kind: _moments(path, kind, *pair) for kind, pair in pairs.items()}
    if not moments:
        raise InputError(
            "reference", path, f"it has {', '.join(sorted(names)) or 'nothing'}; {_REMEDY}"
        )
    images = path if _IMAGES in names else None
    return Reference(
        name=path.name, moments=moments, features=features, labels=labels, images=images
    )


def _read_pickle(path: epath.Path) -> Reference:
    contents = numpy_pickles.read(path)
    pairs = {kind: contents[name] for kind, name in _PKL_NAMES.items()
             if isinstance(contents, dict) and isinstance(contents.get(name), dict)}
    moments = {kind: _moments(path, kind, pair.get("mu"), pair.get("sigma"))
               for kind, pair in pairs.items()}
    if not moments:
        raise InputError("reference", path, f"no statistics in it; {_REMEDY}")
    return Reference(name=path.name, moments=moments)


def write_reference(path: epath.PathLike, reference: Reference) -> None:
    """Writes statistics as an `.npz`: plain names, ADM's names for spatial features, and dmf's own.

    Raises:
      RunError: the disk is full or cannot be written.
    """
    arrays: dict[str, np.ndarray] = {}
    for kind, moments in reference.moments.items():
        mean, covariance = _NPZ_NAMES[kind][0]
        arrays |= {mean: moments.mean, covariance: moments.covariance}
    arrays |= {_FEATURES + kind: values for kind, values in reference.features.items()}
    if reference.labels is not None:
        arrays[_LABELS] = reference.labels
    write_npz(user_path(path), arrays)


def _moments(path: epath.Path, kind: str, mean: Any, covariance: Any) -> Moments:
    """Checks that arrays of a file are a mean and a covariance."""
    mean, covariance = np.asarray(mean), np.asarray(covariance)
    width = mean.shape[0] if mean.ndim == 1 else -1
    if covariance.shape != (width, width) or mean.dtype.kind != "f" or covariance.dtype.kind != "f":
        raise InputError(
            "reference", path,
            f"{kind} has a mean of shape {mean.shape} and a covariance of shape "
            f"{covariance.shape}, which are no moments",
        )
    mean, covariance = mean.astype(np.float64), covariance.astype(np.float64)
    scale = np.abs(covariance).max(initial=0)
    if not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
        raise InputError("reference", path, f"{kind} holds NaN or infinity")
    if np.abs(covariance - covariance.T).max(initial=0) > 1e-6 * scale:
        raise InputError("reference", path, f"{kind} has a covariance that is not symmetric")
    return Moments(mean, covariance)
