"""A shard of a dataset of latents: images are read, cropped, encoded and written as records."""

import collections
import concurrent.futures
import dataclasses
import io
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
import tensorflow_datasets as tfds
from array_record.python import array_record_module
from etils import epath
from jaxtyping import Array, Float16, UInt8
from tensorflow_datasets.proto import tf_example_pb2

from dmf import images
from dmf.alignment import PatchFeatures, stored_features
from dmf.crop_surveys import CropSurvey
from dmf.data.crop import center_crop
from dmf.data.image_files import UnreadableImage
from dmf.encoders.autoencoder import Autoencoder
from dmf.sharding import batch_sharding, make_mesh, replicated
from dmf.typing import InputError, Params, RunError

SPLIT = "train"
RECORDS = "array_record"
# Shards are read at random: one record a chunk; moments do not compress.
_WRITER_OPTIONS = "group_size:1,uncompressed"

# From a batch of crops to what is stored of each.
Encode = Callable[[np.ndarray], Sequence[Any]]


@runtime_checkable
class Images(Protocol):
    """Images with labels in a fixed order, as `dmf.data.image_files.ImageFiles`."""

    names: Sequence[str]
    labels: np.ndarray | None
    class_names: Sequence[str]

    def __len__(self) -> int:
        """How many there are."""

    def image(self, index: int) -> PIL.Image.Image:
        """One, decoded; raises UnreadableImage where that cannot be."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Preparation:
    """What is made of the images.

    Attributes:
      resolution: side of the centre crop.
      autoencoder: whose moments are stored; None stores the crops themselves.
      mirror: whether the moments of the mirror image are stored too.
      keep_images: whether the crop is stored beside the moments, as PNG.
      alignment: what gives the patch features that are stored too, of the mirror image as well with
        `mirror`; None stores none.
      shard_size: images of a shard.
      batch_size: images encoded at once.
      skip_unreadable: whether an image that cannot be read is left out, or ends the work.
      name: of the dataset.
    """

    resolution: int
    autoencoder: Autoencoder | None = None
    mirror: bool = True
    keep_images: bool = False
    alignment: PatchFeatures | None = None
    shard_size: int = 1024
    batch_size: int = 32
    skip_unreadable: bool = True
    name: str = "latents"

    def __post_init__(self):
        for field in ("resolution", "shard_size", "batch_size"):
            if getattr(self, field) < 1:
                raise InputError(f"{field}={getattr(self, field)}: give a whole number >= 1")
        if self.autoencoder is not None and self.resolution % self.autoencoder.factor:
            raise InputError(f"resolution={self.resolution}: the autoencoder takes multiples of "
                             f"{self.autoencoder.factor}")

    @property
    def row_shape(self) -> tuple[int, ...]:
        """Of what is stored for an image: crop, or moments."""
        if self.autoencoder is None:
            return self.resolution, self.resolution, 3
        side = self.resolution // self.autoencoder.factor
        return 1 + self.mirror, side, side, 2 * self.autoencoder.latent_channels

    def features(self, class_names: Sequence[str]) -> tfds.features.FeaturesDict:
        """The features of the dataset."""
        side = self.resolution
        kinds: dict[str, Any] = {"name": tfds.features.Text()}
        if self.autoencoder is None:
            kinds["image"] = tfds.features.Tensor(
                shape=self.row_shape, dtype=np.uint8, encoding="bytes"
            )
        else:
            kinds["moments"] = tfds.features.Tensor(
                shape=self.row_shape, dtype=np.float16, encoding="bytes"
            )
            if self.keep_images:
                kinds["image"] = tfds.features.Image(shape=(side, side, 3), encoding_format="png")
        if self.alignment is not None:
            kinds["features"] = tfds.features.Tensor(
                shape=(1 + self.mirror, *self.alignment.shape), dtype=np.float16, encoding="bytes"
            )
        if class_names:
            kinds["label"] = tfds.features.ClassLabel(names=list(class_names))
        return tfds.features.FeaturesDict(kinds)

    def encoder(self, params: Params | None) -> Encode:
        """What turns a batch of crops into rows, over the devices of this process.

        Raises:
          InputError: the batch does not divide over the devices.
        """
        if self.autoencoder is None:
            return np.asarray
        return self._on_devices(moments_function(self.autoencoder, mirror=self.mirror), params)

    def aligner(self, params: Params | None) -> Encode:
        """What turns a batch of crops into patch features, in the same way."""
        if self.alignment is None:
            return lambda pixels: [None] * len(pixels)
        return self._on_devices(stored_features(self.alignment, mirror=self.mirror), params)

    def _on_devices(self, function: Callable[..., jax.Array], params: Params | None) -> Encode:
        mesh = make_mesh(devices=jax.local_devices())
        if self.batch_size % mesh.size:
            raise InputError(f"batch_size={self.batch_size}: it must be a multiple of the "
                             f"{mesh.size} devices")
        params = jax.device_put(params, replicated(mesh))
        encode = jax.jit(function, in_shardings=(replicated(mesh), batch_sharding(mesh)))
        return lambda pixels: np.asarray(encode(params, pixels))


class Crop(NamedTuple):
    """An image as it goes in, or why it does not."""

    index: int
    pixels: UInt8[np.ndarray, "side side 3"] | None
    why: str = ""


def moments_function(
    autoencoder: Autoencoder, *, mirror: bool
) -> Callable[[Params, UInt8[Array, "n s s 3"]], Float16[Array, "n f h w m"]]:
    """(params, images) -> moments in half precision, of each image and of its mirror image."""

    def moments(params: Params, pixels: UInt8[Array, "n s s 3"]) -> Float16[Array, "n f h w m"]:
        upright = pixels.astype(jnp.float32) / 127.5 - 1
        views = [upright, upright[:, :, ::-1]] if mirror else [upright]
        encoded = [jnp.concatenate(autoencoder.encode(params, view), axis=-1) for view in views]
        return jnp.stack(encoded, axis=1).astype(jnp.float16)

    return moments


def shard_name(preparation: Preparation, shard: int, count: int) -> str:
    """As TFDS calls the files of a split."""
    return f"{preparation.name}-{SPLIT}.{RECORDS}-{shard:05}-of-{count:05}"


class ShardWriter:
    """Reads, encodes and writes one shard after the other."""

    def __init__(
        self,
        source: Images,
        output: epath.Path,
        preparation: Preparation,
        params: Mapping[str, Params | None],
        count: int,
        survey: CropSurvey | None = None,
    ):
        self._source, self._output, self._preparation = source, output, preparation
        self._count, self._survey = count, survey
        self._features = preparation.features(source.class_names)
        self._serialize = tfds.core.example_serializer.ExampleSerializer(
            self._features.get_serialized_info()
        ).serialize_example
        self._encode = preparation.encoder(params["autoencoder"])
        self._align = preparation.aligner(params["alignment"])

    def __call__(self, shard: int) -> dict[str, Any]:
        """Writes a shard, whole or not at all.

        Returns:
          Its report: how many records and bytes, their labels, and which images were skipped.
        """
        size = self._preparation.shard_size
        indices = range(shard * size, min((shard + 1) * size, len(self._source)))
        final = self._output / shard_name(self._preparation, shard, self._count)
        partial = self._output / f".{final.name}.partial"
        written, labels, skipped = 0, [], []
        writer = array_record_module.ArrayRecordWriter(os.fspath(partial), _WRITER_OPTIONS)
        try:
            for crops, pixels in self._batches(indices, skipped):
                if self._survey is not None:
                    self._survey.add([crop.index for crop in crops], pixels)
                stored = zip(crops, self._encode(pixels), self._align(pixels), strict=False)
                for crop, row, features in stored:
                    record = self._record(crop, row, features)
                    writer.write(record)
                    written += len(record)
                    if self._source.labels is not None:
                        labels.append(int(self._source.labels[crop.index]))
        finally:
            writer.close()
        partial.replace(final)
        if self._survey is not None:
            self._survey.finish(shard)
        length = len(indices) - len(skipped)
        return {"length": length, "bytes": written, "labels": labels, "skipped": skipped}

    def _batches(
        self, indices: Sequence[int], skipped: list[dict[str, str]]
    ) -> Iterator[tuple[list[Crop], UInt8[np.ndarray, "n side side 3"]]]:
        """Batches of crops, and their pixels; the pixels of a last one are filled up."""
        size, waiting = self._preparation.batch_size, []
        for crop in self._crops(indices):
            if crop.pixels is None:
                skipped.append({"image": self._source.names[crop.index], "why": crop.why})
                continue
            waiting.append(crop)
            if len(waiting) == size:
                yield waiting, np.stack([crop.pixels for crop in waiting])
                waiting = []
        if waiting:
            filled = [crop.pixels for crop in waiting]
            filled += [np.zeros_like(filled[0])] * (size - len(filled))
            yield waiting, np.stack(filled)

    def _crops(self, indices: Sequence[int]) -> Iterator[Crop]:
        """The crops in order, decoded in threads, a few batches ahead."""
        ahead, waiting = 4 * self._preparation.batch_size, collections.deque()
        with concurrent.futures.ThreadPoolExecutor(os.cpu_count(), "decode") as pool:
            for index in indices:
                waiting.append(pool.submit(self._crop, index))
                if len(waiting) > ahead:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()

    def _crop(self, index: int) -> Crop:
        name = self._source.names[index]
        try:
            image = self._source.image(index)
            return Crop(index, center_crop(image, self._preparation.resolution))
        except UnreadableImage as error:
            why = error.why
        except InputError as error:
            why = str(error)
        except OSError as error:
            raise RunError(f"source: {name} is not there any more ({error}); run the same command "
                           "again when it is") from error
        if not self._preparation.skip_unreadable:
            raise InputError(f"source: {name}: {why}; --unreadable=skip leaves such images out")
        return Crop(index, None, why)

    def _record(self, crop: Crop, row: np.ndarray, features: np.ndarray | None) -> bytes:
        preparation, source = self._preparation, self._source
        values: dict[str, Any] = {"name": source.names[crop.index]}
        if preparation.autoencoder is None:
            values["image"] = row
        else:
            values["moments"] = row
            if preparation.keep_images:
                values["image"] = io.BytesIO(images.png(crop.pixels))
        if features is not None:
            values["features"] = features
        if source.labels is not None:
            values["label"] = int(source.labels[crop.index])
        record = self._serialize(self._features.encode_example(values))
        # The order of features in an example is that of a hash, and another in each process.
        return tf_example_pb2.Example.FromString(record).SerializeToString(deterministic=True)
