"""How well an autoencoder reconstructs images: rFID, PSNR, SSIM and LPIPS.

Images are encoded to the means of their latents, decoded, and rounded to 8 bits. All numbers
compare these with the images themselves, in one pass: statistics are collected part by part, as of
other evaluations, so that memory does not grow with the images and an interrupted command resumes.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from etils import epath
from jaxtyping import Array, Float, UInt8

from dmf import registry
from dmf.checkpoints.params import FORMAT
from dmf.data.pixels import ROUNDINGS, to_uint8
from dmf.errors import InputError, check_choice
from dmf.evaluation import feature_extractors, image_similarity
from dmf.evaluation.evaluated_images import EvaluatedImages
from dmf.evaluation.feature_extractors import Extractor
from dmf.evaluation.image_similarity import WINDOW, psnr, ssim
from dmf.evaluation.metrics import frechet_distance
from dmf.evaluation.statistics_collector import StatisticsCollector
from dmf.models.encoders.autoencoder import check_images
from dmf.models.encoders.inception import Inception
from dmf.models.encoders.latent_space import LatentSpace
from dmf.models.encoders.lpips import LPIPS
from dmf.models.encoders.tiled_decoding import describe_tiles
from dmf.runtime import processes
from dmf.runtime.checksums import fingerprint
from dmf.runtime.resumable_work import claim_folder
from dmf.runtime.sharding import local_mesh
from dmf.types import Params

# Definitions, which stand in every result.
CONSTANTS = {"psnr_range": image_similarity.LARGEST, "ssim_window": WINDOW,
             "ssim_deviation": image_similarity.DEVIATION,
             "ssim_constants": [image_similarity.K1, image_similarity.K2],
             "latents": "mean", "mean": "per image"}  # fmt: skip

Pixels = UInt8[Array, "n h w c"]
Values = dict[str, Float[Array, "n _"]]
# Of parameters by network, images, and their reconstructions.
Measure = Callable[[Mapping[str, Params], Pixels, Pixels], Float[Array, "n _"]]


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Reconstruction:
    """What measures the reconstructions of an autoencoder.

    Attributes:
      space: encodes and decodes images, `decode_batch` at a time.
      params: parameters of its autoencoder.
      inception: network and parameters for rFID; None for no rFID.
      lpips: network and parameters for LPIPS; None for no LPIPS.
      rounding: how reconstructions become 8 bits, one of `dmf.data.pixels.ROUNDINGS`.
    """

    space: LatentSpace
    params: Params
    inception: tuple[Inception, Params] | None = None
    lpips: tuple[LPIPS, Params] | None = None
    rounding: str = "nearest"

    def __post_init__(self):
        check_choice(self, "rounding", ROUNDINGS)

    def check(self, images: EvaluatedImages) -> None:
        """Checks that images can be measured, and logs which metrics are left out.

        Raises:
          InputError: the autoencoder cannot encode them, or a network is given that cannot measure
            them: they are too few for rFID, or too small for LPIPS.
        """
        shape, autoencoder = images.shape, self.space.autoencoder
        check_images(autoencoder, jnp.zeros((1, *shape)))
        *sides, _ = shape
        latents = (*(side // autoencoder.factor for side in sides), autoencoder.latent_channels)
        with registry.at("sampling"):
            note = describe_tiles(self.space.decode_tiles, latents, autoencoder)
        if note:
            processes.log(note)
        if self.lpips and min(sides) < self.lpips[0].smallest_side:
            raise InputError("lpips", remedy=f"{self.lpips[0].trunk} needs images of "
                             f"{self.lpips[0].smallest_side} x {self.lpips[0].smallest_side}; "
                             f"these are {sides[0]} x {sides[1]}")
        left_out = {
            "rfid": "" if self.inception else "no Inception is given; --inception=DIR",
            "lpips": "" if self.lpips else "no LPIPS is given; --lpips=DIR",
            "ssim": f"images are smaller than its window of {WINDOW}" * (min(sides) < WINDOW),
        }
        for metric, reason in left_out.items():
            if reason:
                processes.log(f"{metric} is left out: {reason}")

    def extractor(self, shape: tuple[int, ...]) -> Extractor:
        """The function of images of a shape (h, w, c) that computes all that metrics need.

        The "features" of an image are its `psnr`, `ssim` and `lpips`, one value each, and where
        there is an Inception the pooled features of both, `pool3` and `reconstructed_pool3`.
        """
        measures = self._measures(shape)

        def apply(params: Mapping[str, Params], images: Pixels) -> Values:
            encoded = self.space.encode(params["autoencoder"], _scaled(images))
            decoded = self.space.decode(params["autoencoder"], encoded)
            rebuilt = to_uint8(decoded, self.rounding)
            finite = jnp.isfinite(decoded).all(axis=(1, 2, 3))[:, None]
            return {name: jnp.where(finite, measure(params, images, rebuilt), jnp.nan)
                    for name, measure in measures.items()}

        networks = {"inception": self.inception, "lpips": self.lpips}
        params = {name: pair[1] for name, pair in networks.items() if pair}
        return Extractor(tuple(sorted(measures)), apply, {"autoencoder": self.params, **params})

    def _measures(self, shape: tuple[int, ...]) -> dict[str, Measure]:
        """The "features" of images and of their reconstructions, by name."""
        measures: dict[str, Measure] = {"psnr": lambda params, a, b: psnr(a, b)[:, None]}
        if min(shape[:2]) >= WINDOW:
            measures["ssim"] = lambda params, a, b: ssim(a, b)[:, None]
        if self.lpips:
            distance = self.lpips[0].apply
            measures["lpips"] = lambda params, a, b: distance(
                params["lpips"], _scaled(_rgb(a)), _scaled(_rgb(b)))[:, None]
        if self.inception:
            features = feature_extractors.extractor(("pool3",), inception=self.inception).apply
            measures["pool3"] = lambda params, a, b: features(params, a)["pool3"]
            measures["reconstructed_pool3"] = lambda params, a, b: features(params, b)["pool3"]
        return measures

    @property
    def identity(self) -> dict[str, Any]:
        """All that numbers depend on besides the images, as JSON."""
        networks = {"autoencoder": self.params}
        networks |= {name: pair[1] for name in ("inception", "lpips")
                     if (pair := getattr(self, name))}
        return {
            "metrics": CONSTANTS, "rounding": self.rounding,
            "latents": registry.to_config(self.space.autoencoder, "autoencoder")
            | {name: getattr(self.space, name)
               for name in ("decode_batch", "decode_dtype", "decode_tiles")},
            "networks": {name: fingerprint(params) for name, params in networks.items()},
            "lpips": self.lpips[0].trunk if self.lpips else "",
        }  # fmt: skip


def measure(
    reconstruction: Reconstruction, images: EvaluatedImages, folder: epath.Path, *,
    chunk_size: int, part_size: int,
) -> dict[str, Any]:  # fmt: skip
    """Measures the reconstructions of images.

    Args:
      reconstruction: the autoencoder and the networks.
      images: to encode and decode.
      folder: for unfinished parts, from which the same call resumes.
      chunk_size, part_size: as of `StatisticsCollector`.

    Returns:
      The result, as JSON: everything that its numbers depend on, and one row in "results" with the
      means over images of psnr (dB), ssim and lpips, and with rfid.

    Raises:
      InputError: the images cannot be measured, or a reconstruction holds NaN or infinity.
    """
    reconstruction.check(images)
    sizes = {"chunk_size": chunk_size, "part_size": part_size}
    collector = StatisticsCollector(
        extractor=reconstruction.extractor(images.shape), mesh=local_mesh(), **sizes
    )
    width = collector.widths(images.shape).get("pool3", 0)
    if images.count <= width:
        raise InputError("images", images.name, f"rfid needs more than {width} images (the feature "
                         f"dimension); got {images.count}; give more, or no --inception")
    settings = {**reconstruction.identity, "settings": sizes}
    folder = claim_folder(folder / "reconstructions", [images.identity, settings])
    statistics = collector.collect(
        images.read, images.count, folder, feature_strides={}, name=images.name
    )
    row = {"protocol": "reconstruction", "count": images.count, **images.row,
           **_scores(statistics.moments)}  # fmt: skip
    device = jax.devices()[0]
    return {"format": FORMAT, "protocol": {"name": "reconstruction"}, **settings,
            "made_on": {"device": device.device_kind, "jax": jax.__version__}, "results": [row]}


def _scores(moments: Mapping[str, Any]) -> dict[str, float]:
    """The metrics, by the moments of the "features" that `Reconstruction.extractor` computes."""
    scores = {name: float(moments[name].mean[0]) for name in ("psnr", "ssim", "lpips")
              if name in moments}
    if "pool3" in moments:
        scores["rfid"] = frechet_distance(moments["pool3"], moments["reconstructed_pool3"])
    return scores


def _rgb(images: Pixels) -> Pixels:
    return images if images.shape[-1] == 3 else jnp.repeat(images, 3, axis=-1)


def _scaled(images: Pixels) -> Float[Array, "n h w c"]:
    return images.astype(jnp.float32) / 127.5 - 1
