"""How far images are from a reference, by a protocol.

A result states everything that its numbers depend on. An interrupted evaluation resumes: until the
result is written, finished parts of the statistics and finished rows lie in a folder beside it.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from etils import epath
from ml_collections import ConfigDict

from dmf.checkpoints import load
from dmf.checkpoints.params import FORMAT
from dmf.data.build import data, dataset
from dmf.data.image_sets import DatasetImages, ImageSet, open_image_set
from dmf.errors import InputError, NotFinite, RunError
from dmf.evaluation import feature_extractors, metrics, requirements
from dmf.evaluation.build import evaluation, protocol
from dmf.evaluation.evaluated_images import EvaluatedImages, evaluated_image_set
from dmf.evaluation.feature_statistics import Statistics, write_npz
from dmf.evaluation.metric import score
from dmf.evaluation.reference_statistics import (
    Reference,
    feature_strides,
    is_statistics_file,
    read_reference,
    reference_from_statistics,
)
from dmf.evaluation.statistics_collector import StatisticsCollector
from dmf.models.build import network
from dmf.runtime import processes
from dmf.runtime.checksums import fingerprint
from dmf.runtime.files import read_json, refuse_link, write_json
from dmf.runtime.progress import waiting
from dmf.runtime.resumable_work import claim_folder, finish_work
from dmf.runtime.sharding import local_mesh

_NETWORKS = ("inception", "dinov2")


class Evaluator:
    """Evaluates images by one protocol, against one reference."""

    def __init__(
        self,
        config: ConfigDict,
        folder: epath.PathLike,
        *,
        labelled: bool = True,
        features_folder: epath.PathLike | None = None,
    ):
        """Loads the networks that features come from.

        Args:
          config: of the run; its dataset is the reference unless `config.evaluation` names another.
          folder: for unfinished work.
          labelled: whether images have labels.
          features_folder: where the features of all images are written; None writes none.

        Raises:
          InputError: a field that cannot be used, a missing network, or a folder that is a
            symbolic link or a file.
        """
        self._config, self._settings = config, evaluation(config.evaluation)
        self.protocol = protocol(self._settings, labelled=labelled)
        self._folder = epath.Path(folder)
        self._features_folder = epath.Path(features_folder) if features_folder else None
        for written in filter(None, (self._folder, self._features_folder)):
            refuse_link(written)
            if written.exists() and not written.is_dir():
                raise InputError("output", written, "dmf makes a folder there; remove the file")
        self._networks = {
            name: load.load_encoder(getattr(self._settings, name), name)
            for name in _NETWORKS if getattr(self._settings, name)
        }
        self.mesh = local_mesh()
        self.collector = StatisticsCollector(
            extractor=feature_extractors.extractor(self.protocol.features, **self._networks),
            mesh=self.mesh,
            chunk_size=self._settings.chunk_size,
            part_size=self._settings.part_size,
        )

    # The reference.

    def dataset(self) -> ImageSet:
        """The dataset of the config, as images.

        Raises:
          InputError: it holds latents.
        """
        rows = dataset(data(self._config.data), network(self._config.model))
        if len(rows.shape) != 3:
            raise InputError(
                "evaluation.reference",
                remedy=f"{self._config.data.name} has latents, which images cannot be compared "
                       "with; give --reference=FILE",
            )
        return DatasetImages(dataset=rows)

    @functools.cached_property
    def _opened_reference(self) -> Reference | EvaluatedImages:
        """The reference, or the images whose statistics have to be collected."""
        path = self._settings.reference
        if not path:
            return evaluated_image_set(self.dataset())
        if not is_statistics_file(path):
            return evaluated_image_set(open_image_set(path, field="reference"))
        reference = read_reference(path)
        requirements.check_reference_file(self.protocol, reference, path=path)
        return reference

    @functools.cached_property
    def reference(self) -> Reference:
        """The statistics that images are compared with, collected if the reference is images.

        Raises:
          InputError: the reference cannot be read, or lacks what the metrics need.
        """
        opened = self._opened_reference
        if isinstance(opened, EvaluatedImages):
            return self.collect_reference(opened)
        if not requirements.missing_features(self.protocol, opened):
            return opened
        images = evaluated_image_set(open_image_set(str(opened.images)))
        return dataclasses.replace(opened, features=self.collect_reference(images).features)

    def collect_reference(self, images: EvaluatedImages) -> Reference:
        """The statistics of a set of images, as a reference.

        Raises:
          InputError: there are too few images for a covariance.
        """
        self.check_image_count(images.shape, images.count, field="reference", value=images.name)
        strides = feature_strides(self.protocol.stored_reference_features, images.count)
        folder = claim_folder(
            self._folder / "reference", [images.identity, self._features_identity, strides]
        )
        statistics = self.collector.collect(
            images.read, images.count, folder, feature_strides=strides, name="reference"
        )
        return reference_from_statistics(images.name, statistics, images.labels)

    # Checks before any image is generated.

    def check(self, shape: tuple[int, ...], count: int, *, labelled: bool) -> None:
        """Checks that images can be evaluated, before they are generated.

        Args:
          shape: (h, w, c) of the images.
          count: number of images.
          labelled: whether they have labels.

        Raises:
          InputError: there are too few images, their features do not have the reference's width,
            labels are missing, or the reference cannot be used.
        """
        reference = self._opened_reference
        self.check_image_count(shape, count, field="evaluation.count", value=count)
        if isinstance(reference, EvaluatedImages):
            reference_widths = self.collector.widths(reference.shape)
            self.check_image_count(
                reference.shape, reference.count, field="reference", value=reference.name
            )
        else:
            reference_widths = {k: len(moments.mean) for k, moments in reference.moments.items()}
        requirements.check_same_features(
            self.protocol, self.collector.widths(shape), reference_widths,
            reference=reference.name, shape=shape,
        )  # fmt: skip
        requirements.check_labels(
            self.protocol, reference=reference.labels is not None, samples=labelled
        )

    def check_image_count(
        self, shape: tuple[int, ...], count: int, *, field: str, value: Any
    ) -> None:
        """Checks that the covariances of the features are not singular.

        Args:
          shape: (h, w, c) of the images.
          count: number of images.
          field, value: what the error is about.

        Raises:
          InputError: there are too few images.
        """
        requirements.check_image_count(
            self.protocol, self.collector.widths(shape), count, field=field, value=value
        )

    # Rows and results.

    def measure(self, images: EvaluatedImages, *, must_be_finite: bool = True) -> dict[str, Any]:
        """One row of a result: which images it is of, and their metrics.

        Args:
          images: the images.
          must_be_finite: whether NaN or infinity in an image is an error; otherwise the metrics are
            NaN, and a line says so.

        Raises:
          InputError: the images cannot be evaluated, see `check`.
          NotFinite: some images hold NaN or infinity, and must not.
        """
        try:
            return self._measure(images)
        except NotFinite as error:
            if must_be_finite:
                raise
            processes.log(f"{images.name}: {error}")
            return self._described(images) | dict.fromkeys(self.protocol.metrics, math.nan)

    def _measure(self, images: EvaluatedImages) -> dict[str, Any]:
        """The row of images that are finite.

        Raises:
          InputError: the images cannot be evaluated, see `check`.
          NotFinite: some images hold NaN or infinity.
        """
        self.check(images.shape, images.count, labelled=images.labels is not None)
        stored = self.protocol.features if self._features_folder else self.protocol.stored_features
        # A row that was finished without its features is another one: their file is missing.
        identity = [images.identity, self._features_identity, self.reference.fingerprint,
                    sorted(stored), self._features_folder is not None]
        folder_name = "".join(c if c.isalnum() else "-" for c in images.name)
        folder = claim_folder(self._folder / folder_name, identity)
        row_file = folder / "row.json"
        if (finished := self._finished_row(row_file)) is not None:
            return finished
        statistics = self.collector.collect(
            images.read, images.count, folder,
            feature_strides=dict.fromkeys(stored, 1), name=images.name,
        )  # fmt: skip
        row = self._described(images) | self._scores(statistics, images)
        if jax.process_index() == 0:
            if self._features_folder:
                features = {kind: statistics.features(kind) for kind in stored}
                write_npz(self._features_folder / f"{folder.name}.npz", features)
            write_json(row_file, row)
        scores = "  ".join(f"{metric} {row[metric]:.5g}" for metric in self.protocol.metrics)
        processes.log(f"{images.name}: {scores}")
        return row

    def _described(self, images: EvaluatedImages) -> dict[str, Any]:
        """A row without metrics."""
        return {"protocol": self._settings.protocol, "count": images.count, **images.row}

    def _finished_row(self, path: epath.Path) -> dict[str, Any] | None:
        """The row that an earlier process has measured; None without one that can be read."""
        try:
            row = read_json(path) if path.exists() else {}
        except RunError as error:
            processes.log(f"{error}; it is measured again")
            row = {}
        return row if set(self.protocol.metrics) <= row.keys() else None

    def _scores(self, statistics: Statistics, images: EvaluatedImages) -> dict[str, float]:
        """The metrics of the protocol, by name."""
        return {
            name: score(name, metric.compute(
                self.reference.metric_input(metric.features),
                statistics.metric_input(metric.features, images.labels),
            ))
            for name, metric in self.protocol.metrics_by_name.items()
        }

    def result(self, rows: Sequence[Mapping[str, Any]], **description: Any) -> dict[str, Any]:
        """Rows, with everything that their numbers depend on.

        Args:
          rows: that `measure` returned.
          description: further fields of the result.
        """
        device = jax.devices()[0]
        return {
            "format": FORMAT,
            "protocol": {"name": self._settings.protocol, **dataclasses.asdict(self.protocol),
                         **metrics.CONSTANTS},
            "reference": {"name": self.reference.name, "fingerprint": self.reference.fingerprint,
                          **self._baseline},
            "networks": self._networks_identity,
            "settings": self._sizes,
            "made_on": {"device": device.device_kind, "jax": jax.__version__},
            **description,
            "results": list(rows),
        }

    def finish(self, write: Callable[..., None], path: epath.Path, *contents: Any) -> None:
        """Writes the output and removes the folder of unfinished work, see `finish_work`."""
        finish_work(self._folder, write, path, *contents)

    @functools.cached_property
    def _baseline(self) -> dict[str, float]:
        """What chance alone amounts to, by the first metric that has a baseline."""
        for metric in self.protocol.metrics_by_name.values():
            if metric.baseline and metric.features in self.reference.features:
                reference = self.reference.metric_input(metric.features)
                with waiting("the distance of random halves of the reference", processes.log):
                    return {"halves_distance": metric.baseline(reference)}
        return {}

    # What features depend on.

    @property
    def _sizes(self) -> dict[str, int]:
        return {field: getattr(self._settings, field) for field in ("chunk_size", "part_size")}

    @property
    def _features_identity(self) -> Any:
        """Everything but the images that features depend on."""
        return [dataclasses.asdict(self.protocol), self._sizes, self._networks_identity]

    @functools.cached_property
    def _networks_identity(self) -> dict[str, Any]:
        used = {feature_extractors.NETWORK[kind] for kind in self.protocol.features}
        return {
            name: {"checkpoint": getattr(self._settings, name), "parameters": fingerprint(params),
                   "input": feature_extractors.INPUT[name]}
            for name, (_, params) in self._networks.items() if name in used
        }
