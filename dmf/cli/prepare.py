"""dmf prepare --source=IMAGES --output=DIR --resolution=256 --autoencoder=DIR

Makes a dataset to train on: centre crops of images, as latents of the autoencoder that
--autoencoder names (an export of dmf convert), or as they are without one. IMAGES is a folder of
class folders, a flat folder with a labels file (--labels-file) or without labels, a .zip or .tar of
such, the .tar shards of a WebDataset (a folder of them, or a pattern as 'train-{000..146}.tar'),
parquet files in a folder or of the Hugging Face hub (hf:OWNER/DATASET), or a TFDS name. The same
command resumes where it was interrupted; several processes share the
work with --process=0 --processes=4, --process=1 --processes=4, and so on, each with the same other
flags. With --reference=FILE.npz, --protocol and --inception, statistics of the crops are written in
the same pass, for dmf evaluate. For representation alignment (REPA), --features=DIR stores the
patch features of a DINOv2 (an export of dmf convert), and --keep-images stores the crops that they
can be computed from while training.
"""

import dataclasses
import shlex
from collections.abc import Sequence
from typing import Any

from absl import flags as absl_flags

from dmf.cli import flags
from dmf.errors import InputError
from dmf.runtime import progress
from dmf.runtime.paths import user_path

# Flags that have an effect only beside one of others.
_BESIDE = {
    "dtype": ("autoencoder", "features"), "mirror": ("autoencoder", "features"),
    "keep-images": ("autoencoder",), "features-side": ("features",),
    "protocol": ("reference",), "inception": ("reference",), "dinov2": ("reference",),
}  # fmt: skip


def _define(values: absl_flags.FlagValues) -> None:
    """Defines the flags."""
    text, number = absl_flags.DEFINE_string, absl_flags.DEFINE_integer
    switch = absl_flags.DEFINE_boolean
    text("source", None, "the images: a folder, .zip, .tar, pattern of .tar shards, "
         "hf:OWNER/DATASET or TFDS name", flag_values=values)
    text("output", None, "directory to make", flag_values=values)
    number("resolution", None, "height and width of the crops", flag_values=values)
    text("autoencoder", "", "autoencoder, an export of dmf convert", flag_values=values)
    text("labels-file", "", "labels file of a flat folder", flag_values=values)
    text("split", "train", "split of parquet files or a TFDS name", flag_values=values)
    text("image-column", "", "column of images in parquet files (found by default)",
         flag_values=values)
    text("label-column", "", "column of labels in parquet files ('none' for no labels), or field "
         "of the .json files of a WebDataset (found by default)", flag_values=values)
    number("num-classes", 0, "number of classes of parquet files or a WebDataset; 0 for what the "
           "files state, or the largest label + 1", flag_values=values)
    text("data-directory", "", "where TFDS keeps its datasets", flag_values=values)
    text("reference", "", "an .npz of reference statistics to write", flag_values=values)
    text("protocol", "adm", "protocol of the reference", flag_values=values)
    text("inception", "", "Inception, an export of dmf convert", flag_values=values)
    text("dinov2", "", "DINOv2 of FD-DINOv2, an export of dmf convert", flag_values=values)
    text("features", "", "DINOv2 whose patch features are stored (REPA)", flag_values=values)
    number("features-side", 0, "patches along a side; 0 for one per 2 x 2 latents (16 x 16 pixels)",
           flag_values=values)
    text("name", None, "dataset name; latents by default, images without an autoencoder",
         flag_values=values)
    text("dtype", "float32", "dtype of the encoding, float32 or bfloat16", flag_values=values)
    text("unreadable", "skip", "what to do with unreadable images: skip or fail",
         flag_values=values)
    switch("mirror", True, "also encode mirror images", flag_values=values)
    switch("keep-images", False, "also store the crops, as PNG", flag_values=values)
    number("batch-size", 32, "images encoded at once", flag_values=values)
    number("shard-size", 1024, "images of a shard", flag_values=values)
    number("process", 0, "number of this process, from 0", flag_values=values)
    number("processes", 1, "number of processes that share the work", flag_values=values)
    flags.define_plugins(values)


def main(verb: str, arguments: Sequence[str]) -> None:
    """Prepares a dataset of latents or crops."""
    values = absl_flags.FlagValues()
    _define(values)
    flags.no_arguments(flags.parse(verb, arguments, values, __doc__))
    flags.require(values, "source", "output", "resolution")
    if values.unreadable not in ("skip", "fail"):
        raise InputError("--unreadable", values.unreadable, "choose skip or fail")
    _check_effects(values)

    from dmf.data.prepare import prepare
    from dmf.data.raw_images import open_raw_images
    from dmf.data.shard_writer import PrepareSettings

    autoencoder, params = _autoencoder(values)
    patch_features, encoder_params = _patch_features(values, autoencoder)
    settings = PrepareSettings(
        resolution=values.resolution,
        autoencoder=autoencoder,
        mirror=values.mirror,
        keep_images=values["keep-images"].value,
        patch_features=patch_features,
        shard_size=values["shard-size"].value,
        batch_size=values["batch-size"].value,
        skip_unreadable=values.unreadable == "skip",
        name=_default_name(values) if values.name is None else values.name,
    )
    images = open_raw_images(
        values.source,
        labels=values["labels-file"].value,
        split=values.split,
        directory=values["data-directory"].value,
        image_column=values["image-column"].value,
        label_column=values["label-column"].value,
        class_count=values["num-classes"].value,
    )
    is_complete = prepare(
        images, values.output, settings,
        autoencoder_params=params,
        encoder_params=encoder_params,
        collector=_collector(values, len(images)) if values.reference else None,
        process=values.process,
        processes=values.processes,
    )  # fmt: skip
    if is_complete:
        progress.log(f"next: {_next_command(values, settings, len(images.class_names))}")
    print(values.output)


def _check_effects(values: absl_flags.FlagValues) -> None:
    """Raises InputError for a flag that has no effect on what is prepared."""
    for flag, others in _BESIDE.items():
        if values[flag].present and not any(values[other].value for other in others):
            raise InputError(f"--{flag}", values[flag].value, "it has no effect without "
                             f"--{' or --'.join(others)}; leave it out")


def _default_name(values: absl_flags.FlagValues) -> str:
    return "latents" if values.autoencoder else "images"


def _next_command(values: absl_flags.FlagValues, settings: Any, num_classes: int) -> str:
    """The command that trains on the dataset that `PrepareSettings` describe."""
    from dmf.models.encoders.latent_scaling import LatentScaling

    if settings.autoencoder is None:  # The config takes all sizes from the dataset.
        return shlex.join(["dmf", "train", "--config=dmf:images_sit",
                           f"--workdir={values.output.rstrip('/')}_sit",
                           f"--config.data.directory={values.output}"])
    *_, side, channels = settings.stored_shape
    fields = {
        "data.name": settings.name, "data.directory": values.output,
        "model.num_classes": num_classes, "model.input_size": side,
        "model.channels": channels // 2, "latents.autoencoder": values.autoencoder,
    }  # fmt: skip
    scaling = dataclasses.asdict(settings.autoencoder.default_scaling)
    unscaled = dataclasses.asdict(LatentScaling())
    fields |= {f"latents.{name}": value for name, value in scaling.items()
               if value != unscaled[name]}
    flags_of_config = [f"--config.{name}={value}" for name, value in fields.items()]
    plugins = [f"--plugins={','.join(values.plugins)}"] if values.plugins else []
    return shlex.join(["dmf", "train", "--config=CONFIG.py", "--workdir=WORKDIR", *plugins,
                       *flags_of_config])


def _autoencoder(values: absl_flags.FlagValues) -> tuple[Any, Any]:
    """The autoencoder and its parameters; None without one."""
    if not values.autoencoder:
        return None, None
    from dmf.checkpoints import load
    from dmf.models.encoders.autoencoder import with_dtype

    autoencoder, params = load.load_autoencoder(values.autoencoder)
    return with_dtype(autoencoder, values.dtype), params


def _patch_features(values: absl_flags.FlagValues, autoencoder: Any) -> tuple[Any, Any]:
    """What computes the patch features to store, and its parameters; None without one."""
    if not values.features:
        return None, None
    from dmf.checkpoints import load
    from dmf.models.encoders.patch_features import PatchFeatures

    try:
        encoder, params = load.load_encoder(values.features, "dinov2")
    except InputError as error:
        raise InputError("--features", values.features, "it holds no DINOv2; give the directory "
                         "that dmf convert made of one") from error
    encoder = dataclasses.replace(encoder, dtype=values.dtype)
    # The tokens of a network whose patches are 2 x 2 latents (without an autoencoder, 16 x 16
    # pixels).
    token_pixels = 16 if autoencoder is None else 2 * autoencoder.factor
    side = values["features-side"].value or values.resolution // token_pixels
    return PatchFeatures(encoder=encoder, side=side), params


def _collector(values: absl_flags.FlagValues, count: int) -> Any:
    """What collects reference statistics of the crops."""
    from dmf.data.prepare import REPORTS
    from dmf.default_config import get_config
    from dmf.evaluation.crop_statistics import CropStatistics
    from dmf.evaluation.evaluator import Evaluator
    from dmf.runtime.files import check_output_file

    if not values.reference.endswith(".npz"):
        raise InputError("--reference", values.reference, "give an .npz file to write")
    check_output_file("--reference", values.reference)
    config = get_config()
    for field in ("protocol", "inception", "dinov2"):
        config.evaluation[field] = values[field].value
    return CropStatistics(
        Evaluator(config, "", labelled=False), user_path(values.output) / REPORTS,
        side=values.resolution, count=count, reference=values.reference,
        process=values.process,
    )  # fmt: skip
