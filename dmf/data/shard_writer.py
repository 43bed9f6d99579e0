"""A shard of a prepared dataset: images are read, cropped, encoded and written as records."""

import collections
import concurrent.futures
import contextlib
import dataclasses
import io
import os
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
import tensorflow_datasets as tfds
from array_record.python import array_record_module
from etils import epath
from jaxtyping import Array, Float16, UInt8
from tensorflow_datasets.proto import tf_example_pb2

from dmf.data.image_files import UnreadableImage
from dmf.data.image_transforms import center_crop
from dmf.data.pixels import from_uint8, png
from dmf.data.raw_images import RawImages, decoded
from dmf.errors import InputError, RunError, check_at_least
from dmf.models.encoders.autoencoder import Autoencoder, as_moments, latent_side
from dmf.models.encoders.patch_features import PatchFeatures, stored_features
from dmf.runtime.files import new_file, sync
from dmf.runtime.sharding import batch_sharding, local_mesh, replicated
from dmf.types import Params

SPLIT = "train"
RECORDS = "array_record"
# Training reads records at random: one record a chunk. Moments do not compress.
_WRITER_OPTIONS = "group_size:1,uncompressed"

Crops = UInt8[np.ndarray, "n side side 3"]
# From a batch of crops to what a record stores of each.
Encode = Callable[[np.ndarray], Sequence[Any]]


@runtime_checkable
class CropCollector(Protocol):
    """Collects statistics of crops while they are written, shard by shard."""

    @property
    def identity(self) -> Any:
        """What the statistics depend on apart from the crops, as JSON holds it."""
        ...

    def add(self, indices: Sequence[int], pixels: Crops) -> None:
        """Adds crops of the shard that is being written.

        Args:
          indices: indices of the images.
          pixels: the crops, perhaps followed by padding.
        """

    def finish(self, shard: int) -> None:
        """Adds a shard that has been written to the statistics."""

    def write(self) -> None:
        """Writes the statistics of all shards."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PrepareSettings:
    """What a prepared dataset stores.

    Attributes:
      resolution: side of the centre crops, in pixels.
      autoencoder: the autoencoder whose moments are stored; None stores the crops themselves.
      mirror: whether the moments and features of mirror images are stored too.
      keep_images: whether the crops are stored along with the moments, as PNG.
      patch_features: the patch features that are stored too; None for none.
      shard_size: number of images of a shard.
      batch_size: number of images that are encoded at once.
      skip_unreadable: whether images that cannot be read are left out rather than an error.
      name: name of the dataset.
    """

    resolution: int
    autoencoder: Autoencoder | None = None
    mirror: bool = True
    keep_images: bool = False
    patch_features: PatchFeatures | None = None
    shard_size: int = 1024
    batch_size: int = 32
    skip_unreadable: bool = True
    name: str = "latents"

    def __post_init__(self):
        check_at_least(self, 1, "resolution", "shard_size", "batch_size")
        # Of other names, TFDS would refuse the finished dataset, or shards would lie elsewhere.
        if not re.fullmatch(r"[a-z][a-z0-9_]*", self.name):
            raise InputError("name", self.name, "give a name of small letters, digits and _ that "
                             "begins with a letter, for example my_images_256")
        if self.autoencoder is not None and self.resolution % self.autoencoder.factor:
            raise InputError(
                "resolution", self.resolution,
                f"the autoencoder takes multiples of {self.autoencoder.factor}",
            )
        side = self.autoencoder and latent_side(self.autoencoder)
        if side and self.resolution != side * self.autoencoder.factor:
            raise InputError("resolution", self.resolution, "the autoencoder takes images of "
                             f"{side * self.autoencoder.factor} alone")

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """(side, side, 3) of a crop, or (f, h, w, 2c) of its moments."""
        if self.autoencoder is None:
            return self.resolution, self.resolution, 3
        side = self.resolution // self.autoencoder.factor
        return 1 + self.mirror, side, side, 2 * self.autoencoder.latent_channels

    def tfds_features(self, class_names: Sequence[str]) -> tfds.features.FeaturesDict:
        """The TFDS features of the dataset.

        Args:
          class_names: names of the labels; empty for images without labels.
        """
        features: dict[str, Any] = {"name": tfds.features.Text()}
        if self.autoencoder is None:
            features["image"] = _packed(self.stored_shape, np.uint8)
        else:
            features["moments"] = _packed(self.stored_shape, np.float16)
            if self.keep_images:
                features["image"] = tfds.features.Image(
                    shape=(self.resolution, self.resolution, 3), encoding_format="png"
                )
        if self.patch_features is not None:
            shape = (1 + self.mirror, *self.patch_features.shape)
            features["features"] = _packed(shape, np.float16)
        if class_names:
            features["label"] = tfds.features.ClassLabel(names=list(class_names))
        return tfds.features.FeaturesDict(features)

    def encoder(self, params: Params | None) -> Encode:
        """The function from a batch of crops to what is stored of them, on all local devices.

        Args:
          params: parameters of the autoencoder; None without one.

        Raises:
          InputError: the batch size is no multiple of the number of devices.
        """
        if self.autoencoder is None:
            return np.asarray
        return self._on_devices(moments_function(self.autoencoder, mirror=self.mirror), params)

    def feature_encoder(self, params: Params | None) -> Encode:
        """The function from a batch of crops to their patch features, on all local devices.

        Args:
          params: parameters of the encoder of the patch features; None without these.

        Raises:
          InputError: the batch size is no multiple of the number of devices.
        """
        if self.patch_features is None:
            return lambda pixels: [None] * len(pixels)
        return self._on_devices(stored_features(self.patch_features, mirror=self.mirror), params)

    def _on_devices(self, function: Callable[..., jax.Array], params: Params | None) -> Encode:
        mesh = local_mesh()
        if self.batch_size % mesh.size:
            raise InputError(
                "batch_size", self.batch_size,
                f"it must be a multiple of the {mesh.size} devices",
            )
        params = jax.device_put(params, replicated(mesh))
        encode = jax.jit(function, in_shardings=(replicated(mesh), batch_sharding(mesh)))
        return lambda pixels: np.asarray(encode(params, pixels))


def _packed(shape: tuple[int, ...], dtype: type) -> tfds.features.Tensor:
    """A feature that is stored as the bytes of an array."""
    return tfds.features.Tensor(shape=shape, dtype=dtype, encoding="bytes")


class Crop(NamedTuple):
    """A centre crop, or the reason why the image cannot be read.

    Attributes:
      index: index of the image.
      pixels: the crop; None if the image cannot be read.
      reason: why the image cannot be read; empty if it can.
    """

    index: int
    pixels: UInt8[np.ndarray, "side side 3"] | None
    reason: str = ""


def moments_function(
    autoencoder: Autoencoder, *, mirror: bool
) -> Callable[[Params, UInt8[Array, "n s s 3"]], Float16[Array, "n f h w m"]]:
    """The function from images to the moments that a dataset stores.

    Args:
      autoencoder: the autoencoder.
      mirror: whether to store the moments of the mirror image too.

    Returns:
      (params, images [n, s, s, 3] uint8) -> moments [n, f, h, w, 2c] float16, where f is 2 with
      `mirror` and 1 without.
    """

    def moments(params: Params, pixels: UInt8[Array, "n s s 3"]) -> Float16[Array, "n f h w m"]:
        upright = from_uint8(pixels)
        views = [upright, upright[:, :, ::-1]] if mirror else [upright]
        encoded = [jnp.concatenate(as_moments(autoencoder.encode(params, view)), axis=-1)
                   for view in views]
        return jnp.stack(encoded, axis=1).astype(jnp.float16)

    return moments


def shard_name(settings: PrepareSettings, shard: int, num_shards: int) -> str:
    """The file name that TFDS expects of a shard."""
    return f"{settings.name}-{SPLIT}.{RECORDS}-{shard:05}-of-{num_shards:05}"


class ShardWriter:
    """Reads, encodes and writes shards, one after the other."""

    def __init__(
        self,
        images: RawImages,
        output: epath.Path,
        settings: PrepareSettings,
        *,
        num_shards: int,
        autoencoder_params: Params | None,
        encoder_params: Params | None,
        collector: CropCollector | None = None,
    ):
        """Compiles nothing yet; encoders are compiled for the first batch.

        Args:
          images: the images.
          output: directory of the dataset.
          settings: what the dataset stores.
          num_shards: number of shards of the whole dataset.
          autoencoder_params: parameters of the autoencoder; None without one.
          encoder_params: parameters of the encoder of patch features; None without these.
          collector: collects statistics of the crops; None for no statistics.

        Raises:
          InputError: the batch size is no multiple of the number of devices.
        """
        self._images, self._output, self._settings = images, output, settings
        self._num_shards, self._collector = num_shards, collector
        self._features = settings.tfds_features(images.class_names)
        self._serialize = tfds.core.example_serializer.ExampleSerializer(
            self._features.get_serialized_info()
        ).serialize_example
        self._encode = settings.encoder(autoencoder_params)
        self._encode_features = settings.feature_encoder(encoder_params)

    def write(self, shard: int) -> dict[str, Any]:
        """Writes a shard, whole or not at all.

        Returns:
          "length" (number of records), "bytes", "labels" (one a record, none without labels), and
          "skipped" (the name of each image that is left out, and the reason).

        Raises:
          InputError: an image cannot be read, and is not to be skipped.
          RunError: the images are not there any more.
        """
        size = self._settings.shard_size
        indices = range(shard * size, min((shard + 1) * size, len(self._images)))
        final = self._output / shard_name(self._settings, shard, self._num_shards)
        report = {"length": 0, "bytes": 0, "labels": [], "skipped": []}
        with new_file(final) as partial:
            writer = array_record_module.ArrayRecordWriter(os.fspath(partial), _WRITER_OPTIONS)
            with contextlib.closing(writer):
                for crops, pixels in self._batches(indices, report["skipped"]):
                    if self._collector is not None:
                        self._collector.add([crop.index for crop in crops], pixels)
                    for record in self._records(crops, pixels):
                        writer.write(record)
                        report["bytes"] += len(record)
                    report["length"] += len(crops)
                    report["labels"] += self._labels(crops)
        sync(self._output)
        if self._collector is not None:
            self._collector.finish(shard)
        return report

    def _batches(
        self, indices: Sequence[int], skipped: list[dict[str, str]]
    ) -> Iterator[tuple[list[Crop], Crops]]:
        """Batches of crops, and their pixels, which are padded with zeros to the batch size."""
        size, batch = self._settings.batch_size, []
        for crop in self._crops(indices):
            if crop.pixels is None:
                skipped.append({"image": printable(self._images.names[crop.index]),
                                "reason": crop.reason})
                continue
            batch.append(crop)
            if len(batch) == size:
                yield batch, np.stack([crop.pixels for crop in batch])
                batch = []
        if batch:
            pixels = [crop.pixels for crop in batch]
            pixels += [np.zeros_like(pixels[0])] * (size - len(pixels))
            yield batch, np.stack(pixels)

    def _crops(self, indices: Sequence[int]) -> Iterator[Crop]:
        """The crops in order, which threads decode a few batches ahead."""
        ahead, pending = 4 * self._settings.batch_size, collections.deque()
        with concurrent.futures.ThreadPoolExecutor(os.cpu_count(), "decode") as pool:
            for index in indices:
                pending.append(pool.submit(self._crop, index))
                if len(pending) > ahead:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()

    def _crop(self, index: int) -> Crop:
        name = self._images.names[index]
        try:
            with decoded(self._images, index) as image:
                return Crop(index, center_crop(image, self._settings.resolution))
        except UnreadableImage as error:
            reason = error.reason
        except InputError as error:
            reason = str(error)
        except OSError as error:
            raise RunError(f"source: {name} is not there any more ({error}); run the same command "
                           "again when it is") from error
        if not self._settings.skip_unreadable:
            raise InputError(
                "source", remedy=f"{name}: {reason}; --unreadable=skip leaves such images out"
            )
        return Crop(index, None, reason)

    def _records(self, crops: Sequence[Crop], pixels: Crops) -> Iterator[bytes]:
        """The record of each crop of a batch."""
        encoded = zip(crops, self._encode(pixels), self._encode_features(pixels), strict=False)
        for crop, stored, features in encoded:
            record = self._serialize(self._features.encode_example(
                self._example(crop, stored, features)
            ))
            # Features in an example are in the order of a hash, which differs between processes.
            example = tf_example_pb2.Example.FromString(record)
            yield example.SerializeToString(deterministic=True)

    def _example(self, crop: Crop, stored: Any, features: np.ndarray | None) -> dict[str, Any]:
        """The features of a record by name."""
        example: dict[str, Any] = {"name": printable(self._images.names[crop.index])}
        if self._settings.autoencoder is None:
            example["image"] = stored
        else:
            example["moments"] = stored
            if self._settings.keep_images:
                example["image"] = io.BytesIO(png(crop.pixels))
        if features is not None:
            example["features"] = features
        if labels := self._labels([crop]):
            example["label"] = labels[0]
        return example

    def _labels(self, crops: Sequence[Crop]) -> list[int]:
        """The labels of crops; empty without labels."""
        if self._images.labels is None:
            return []
        return [int(self._images.labels[crop.index]) for crop in crops]


def printable(name: str) -> str:
    r"""The name of a file as UTF-8 can hold it: bytes that are no UTF-8 are escaped.

    >>> print(printable(b"caf\xe9.png".decode("utf-8", "surrogateescape")))
    caf\xe9.png
    """
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
