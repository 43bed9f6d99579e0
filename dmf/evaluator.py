"""How far images are from others, by a protocol.

Every number stands with all that it depends on. What is interrupted goes on: the parts of a survey,
and the rows that are finished, lie in a folder beside the result until it is whole.
"""

import dataclasses
import functools
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath
from jaxtyping import Int
from ml_collections import ConfigDict

from dmf import build, features, hosts, loading, metrics
from dmf.checkpoint import FORMAT
from dmf.components import COMPONENTS, lookup
from dmf.data.image_sets import DatasetImages, ImageSet, open_image_set
from dmf.files import write_json
from dmf.generation import Generated
from dmf.intact import fingerprint
from dmf.protocols import DISTANCES, KEEPING, METRICS, Protocol
from dmf.references import (
    Reference,
    holds_statistics,
    kept_of,
    of_statistics,
    read_reference,
)
from dmf.sharding import local_mesh
from dmf.statistics import Statistics, write_npz
from dmf.surveys import ImagesOf, Surveyor, claimed
from dmf.typing import InputError

_FROZEN = ("inception", "dinov2")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Subject:
    """Images to be measured.

    Attributes:
      name: what to call them.
      images: by their indices.
      count: how many.
      shape: (h, w, c).
      labels: the label that each one was made for, None without labels.
      row: what says which they are, in the result.
      identity: tells them from others, for work that was interrupted.
    """

    name: str
    images: ImagesOf
    count: int
    shape: tuple[int, ...]
    labels: Int[np.ndarray, "n"] | None
    row: Mapping[str, Any]
    identity: Any


def protocol(config: ConfigDict, *, labelled: bool) -> Protocol:
    """The protocol of `config.evaluation`, with what the config says otherwise.

    Args:
      config: the config.
      labelled: whether there are labels; without them, label agreement is measured only if asked
        for.

    Raises:
      InputError: no such protocol, metric, rounding or way to draw labels.
    """
    settings = config.evaluation
    named = lookup(COMPONENTS["protocol"], settings.protocol, "evaluation.protocol")
    changes = {field: settings[field] for field in ("rounding", "labels") if settings[field]}
    chosen = tuple(settings.metrics) or tuple(
        name for name in named.metrics if labelled or name != "label_agreement"
    )
    return dataclasses.replace(named, metrics=chosen, **changes)


def image_set_of(images: ImageSet) -> Subject:
    """A set of images, to be measured. A few of them tell it from others of its name and size."""

    def read(indices: Int[np.ndarray, "n"]) -> Generated:
        inside = indices[indices < len(images)]
        rows = np.zeros((len(indices), *images.shape), np.uint8)
        rows[: len(inside)] = images.read(inside)
        return Generated(rows, np.ones(len(indices), bool))

    few = np.unique(np.linspace(0, len(images) - 1, 16).astype(np.int64))
    return Subject(
        name=images.name,
        images=read,
        count=len(images),
        shape=tuple(images.shape),
        labels=images.labels(),
        row={"images": images.name} | ({"notes": images.notes} if images.notes else {}),
        identity=[images.name, len(images), fingerprint(images.read(few))],
    )


class Evaluator:
    """Measures images by one protocol, against one reference."""

    def __init__(
        self,
        config: ConfigDict,
        folder: epath.PathLike,
        *,
        labelled: bool = True,
        features_folder: epath.PathLike | None = None,
    ):
        """Opens the networks that features come from.

        Args:
          config: its `evaluation`; its dataset is the reference unless one is named.
          folder: for work under way.
          labelled: whether there are labels.
          features_folder: for the features of all images; None writes none.

        Raises:
          InputError: a field that cannot be, or a network that is missing.
        """
        self.protocol = protocol(config, labelled=labelled)
        self._config, self._settings = config, config.evaluation
        self._folder = epath.Path(folder)
        self._features_folder = epath.Path(features_folder) if features_folder else None
        self._networks = {
            name: loading.load_encoder(self._settings[name], name)
            for name in _FROZEN if self._settings[name]
        }
        self.on = local_mesh()
        extractor = features.extractor(self.protocol.features, **self._networks)
        self.surveyor = Surveyor(
            extractor=extractor,
            on=self.on,
            chunk_size=self._settings.chunk_size,
            part_size=self._settings.part_size,
        )

    @functools.cached_property
    def _opened(self) -> Reference | Subject:
        """The reference, or the images whose statistics it is."""
        path = self._settings.reference
        if not path:
            return image_set_of(self.dataset())
        if not holds_statistics(path):
            return image_set_of(open_image_set(path, field="reference"))
        found = read_reference(path)
        for metric in self.protocol.metrics:
            if metric in DISTANCES and DISTANCES[metric] not in found.moments:
                raise InputError(f"reference={path}: it has statistics of "
                                 f"{', '.join(found.moments)}, and {metric} needs those of "
                                 f"{DISTANCES[metric]}; give another, or other --metrics")
        if self._lacking(found) and (found.images is None or self._lacking(found) != ["pool3"]):
            needing = [name for name in self.protocol.metrics if name in KEEPING]
            raise InputError(f"reference={path}: it has no images (arr_0), which "
                             f"{', '.join(needing)} need; give another, or other --metrics")
        return found

    def _lacking(self, found: Reference) -> list[str]:
        return [kind for kind in self.protocol.kept if kind not in found.features]

    @functools.cached_property
    def reference(self) -> Reference:
        """What images are compared with, surveyed where it is a set of images.

        Raises:
          InputError: it cannot be read, or lacks what the metrics need.
        """
        found = self._opened
        if isinstance(found, Subject):
            return self.surveyed(found)
        if not self._lacking(found):
            return found
        subject = image_set_of(open_image_set(str(found.images)))
        return dataclasses.replace(found, features=self.surveyed(subject).features)

    def check(self, shape: tuple[int, ...], count: int, *, labelled: bool) -> None:
        """Finds out, before there are any, whether images can be measured.

        Args:
          shape: (h, w, c) of the images.
          count: how many there will be.
          labelled: whether they have labels.

        Raises:
          InputError: they are too few, or not of the reference's width, or lack labels, or the
            reference is not one.
        """
        widths, found = self.surveyor.widths(shape), self._opened
        self.check_count(shape, count, f"evaluation.count={count}")
        if isinstance(found, Subject):
            theirs, name = self.surveyor.widths(found.shape), found.name
        else:
            theirs = {kind: len(moments.mean) for kind, moments in found.moments.items()}
            name = found.name
        for metric in self.protocol.metrics:
            kind = METRICS[metric]
            if metric in DISTANCES and theirs[kind] != widths[kind]:
                raise InputError(f"reference={name}: it has {theirs[kind]} values of {kind} an "
                                 f"image, and images of shape {tuple(shape)} have {widths[kind]}; "
                                 f"{metric} cannot compare them")
        for whose, labels in (("reference", found.labels is not None), ("samples", labelled)):
            if "label_agreement" in self.protocol.metrics and not labels:
                raise InputError(f"evaluation.metrics=label_agreement: the {whose} have no "
                                 "labels; give other --metrics")

    def dataset(self) -> ImageSet:
        """The dataset of the config, as images.

        Raises:
          InputError: its rows are latents.
        """
        source = build.source(self._config)
        if len(source.shape) != 3:
            raise InputError(f"evaluation.reference: {self._config.data.name} has latents, which "
                             "images cannot be compared with; give --reference=FILE")
        return DatasetImages(source=source)

    def surveyed(self, subject: Subject) -> Reference:
        """A set of images as a reference.

        Raises:
          InputError: it has fewer images than a covariance needs.
        """
        self.check_count(subject.shape, subject.count, f"reference={subject.name}")
        keep = kept_of(self.protocol.kept_of_reference, subject.count)
        folder = claimed(self._folder / "reference", [subject.identity, self._identity(), keep])
        statistics = self.surveyor.survey(
            subject.images, subject.count, folder, keep=keep, what="reference"
        )
        return of_statistics(subject.name, statistics, subject.labels)

    def measure(self, subject: Subject) -> dict[str, Any]:
        """One row of a result: what the images are, and their scores.

        Raises:
          InputError: they are too few, or not of the reference's width.
          RunError: some hold NaN or infinity.
        """
        self.check(subject.shape, subject.count, labelled=subject.labels is not None)
        identity = [subject.identity, self._identity(), self.reference.fingerprint]
        name = "".join(c if c.isalnum() else "-" for c in subject.name)
        folder = claimed(self._folder / name, identity)
        finished = folder / "row.json"
        if finished.exists():
            return json.loads(finished.read_text())
        kept = self.protocol.features if self._features_folder else self.protocol.kept
        statistics = self.surveyor.survey(
            subject.images, subject.count, folder,
            keep=dict.fromkeys(kept, 1), what=subject.name,
        )  # fmt: skip
        row = {"protocol": self._settings.protocol, "count": subject.count, **subject.row}
        row |= self._scores(statistics, subject)
        if jax.process_index() == 0:
            if self._features_folder:
                held = {kind: statistics.features(kind) for kind in kept}
                write_npz(self._features_folder / f"{folder.name}.npz", held)
            write_json(finished, row)
        told = "  ".join(f"{metric} {row[metric]:.5g}" for metric in self.protocol.metrics)
        hosts.say(f"{subject.name}: {told}")
        return row

    def _scores(self, statistics: Statistics, subject: Subject) -> dict[str, float]:
        reference, found = self.reference, {}
        for name in self.protocol.metrics:
            kind = METRICS[name]
            if name in DISTANCES:
                found[name] = metrics.frechet_distance(
                    reference.moments[kind], statistics.moments[kind]
                )
            elif name == "inception_score":
                found[name] = statistics.inception_score.score
            elif name == "label_agreement":
                found[name] = metrics.label_agreement(
                    reference.features[kind], reference.labels,
                    statistics.features(kind), subject.labels,
                )  # fmt: skip
            elif name not in found:
                pair = metrics.precision_recall(
                    reference.features[kind], statistics.features(kind)
                )
                both = dict(zip(("precision", "recall"), pair, strict=True))
                found |= {name: both[name] for name in both if name in self.protocol.metrics}
        return found

    def check_count(self, shape: tuple[int, ...], count: int, field: str) -> None:
        """Raises InputError where a covariance would be singular.

        Args:
          shape: (h, w, c) of images.
          count: how many there are.
          field: what the message begins with.
        """
        widths = self.surveyor.widths(shape)
        for metric in self.protocol.metrics:
            width = widths[METRICS[metric]]
            if metric in DISTANCES and count <= width:
                raise InputError(f"{field}: {metric} compares {width} features, and their "
                                 f"covariance is singular of as many images or fewer (here "
                                 f"{count}); give more, or other --metrics")

    def _identity(self) -> Any:
        """What all features depend on."""
        sizes = {field: self._settings[field] for field in ("chunk_size", "part_size")}
        return [dataclasses.asdict(self.protocol), sizes, self._frozen]

    @functools.cached_property
    def _frozen(self) -> dict[str, Any]:
        return {
            name: {"checkpoint": self._settings[name], "parameters": fingerprint(params),
                   "input": features.INPUT[name]}
            for name, (_, params) in self._networks.items()
            if name in {features.NETWORK[kind] for kind in self.protocol.features}
        }

    @functools.cached_property
    def _halves_distance(self) -> float:
        return metrics.halves_distance(self.reference.features["pixels"])

    def result(self, rows: Sequence[Mapping[str, Any]], **more: Any) -> dict[str, Any]:
        """Rows with everything that they depend on."""
        settings = self._settings
        device = jax.devices()[0]
        reference = {"name": self.reference.name, "fingerprint": self.reference.fingerprint}
        if "pixels" in self.reference.features:
            reference["halves_distance"] = self._halves_distance
        constants = {"inception_score_split": metrics.SPLIT, "neighbours": metrics.NEIGHBOURS}
        return {
            "format": FORMAT,
            "protocol": {"name": settings.protocol, **dataclasses.asdict(self.protocol),
                         **constants},
            "reference": reference,
            "networks": self._frozen,
            "settings": {field: settings[field] for field in ("chunk_size", "part_size")},
            "made_on": {"device": device.device_kind, "jax": jax.__version__},
            **more,
            "results": list(rows),
        }

    def finish(self, write: Callable[..., None], path: epath.Path, *what: Any) -> None:
        """Writes what the work was for; what lay beside it is not needed any more."""
        if jax.process_index() == 0:
            write(path, *what)
            if self._folder.exists():
                self._folder.rmtree()
        hosts.wait_for_all(f"{path} written")
