"""dmf prepare --source=IMAGES --output=DIR --resolution=256 --vae=DIR

Makes a dataset to train on: centre crops of images, as latents of the autoencoder that --vae names
(what dmf convert wrote), or as they are without one. IMAGES is a folder of class folders, a flat
folder with a labels file (--labels) or without labels, a .zip or .tar of such, or a TFDS name. The
same command goes on where it was interrupted; several processes share the work with --process=0
--processes=4, 1 and 4, and so on, each with the same other flags. With --reference=FILE.npz,
--protocol and --inception, statistics of the crops are written in the same pass, for dmf evaluate.
For representation alignment (REPA), --features=DIR stores the patch features of a DINOv2 that dmf
convert made, and --keep-images what they can be computed from while training.
"""

from collections.abc import Sequence

from absl import flags

from dmf import cli
from dmf.typing import InputError


def main(verb: str, arguments: Sequence[str]) -> None:
    """Prepares a dataset of latents or crops."""
    values = flags.FlagValues()
    text, number, switch = flags.DEFINE_string, flags.DEFINE_integer, flags.DEFINE_boolean
    text("source", None, "where the images are", flag_values=values)
    text("output", None, "a directory to make", flag_values=values)
    number("resolution", None, "side of the crops", flag_values=values)
    text("vae", "", "an autoencoder, as dmf convert wrote it", flag_values=values)
    text("labels", "", "labels file of a flat folder", flag_values=values)
    text("split", "train", "of a TFDS name", flag_values=values)
    text("data-directory", "", "where TFDS keeps its datasets", flag_values=values)
    text("reference", "", "an .npz of statistics to write", flag_values=values)
    text("protocol", "adm", "that the reference is for", flag_values=values)
    text("inception", "", "Inception, as dmf convert wrote it", flag_values=values)
    text("dinov2", "", "DINOv2, as dmf convert wrote it", flag_values=values)
    text("features", "", "a DINOv2 whose patch features to store, for REPA", flag_values=values)
    number("features-side", 0, "patches along a side; resolution / 16 if 0", flag_values=values)
    text("name", "latents", "of the dataset", flag_values=values)
    text("dtype", "float32", "of the encoding, float32 or bfloat16", flag_values=values)
    text("unreadable", "skip", "skip or fail: images that cannot be read", flag_values=values)
    switch("mirror", True, "also encode mirror images", flag_values=values)
    switch("keep-images", False, "also store the crops, as PNG", flag_values=values)
    number("batch-size", 32, "images encoded at once", flag_values=values)
    number("shard-size", 1024, "images of a shard", flag_values=values)
    number("process", 0, "which of the processes this is", flag_values=values)
    number("processes", 1, "how many share the work", flag_values=values)
    cli.parse(verb, arguments, values, __doc__)
    cli.require(values, "source", "output", "resolution")
    if values.unreadable not in ("skip", "fail"):
        raise InputError(f"--unreadable={values.unreadable}: choose skip or fail")

    import dataclasses

    from dmf import loading
    from dmf.data.originals import open_originals
    from dmf.preparation import prepare
    from dmf.shards import Preparation

    autoencoder, params = None, None
    if values.vae:
        autoencoder, params = loading.load_encoder(values.vae, "autoencoder")
        autoencoder = dataclasses.replace(autoencoder, dtype=values.dtype)
    alignment, alignment_params = None, None
    if values.features:
        alignment, alignment_params = _alignment(values)
    images = open_originals(
        values.source,
        labels=values.labels,
        split=values.split,
        directory=values["data-directory"].value,
    )
    prepare(
        images,
        values.output,
        Preparation(
            resolution=values.resolution,
            autoencoder=autoencoder,
            mirror=values.mirror,
            keep_images=values["keep-images"].value,
            alignment=alignment,
            shard_size=values["shard-size"].value,
            batch_size=values["batch-size"].value,
            skip_unreadable=values.unreadable == "skip",
            name=values.name,
        ),
        params,
        alignment_params=alignment_params,
        evaluator=_evaluator(values) if values.reference else None,
        reference=values.reference,
        process=values.process,
        processes=values.processes,
    )
    print(values.output)


def _alignment(values: flags.FlagValues):
    """What gives the features to store, and its parameters."""
    import dataclasses

    from dmf import loading
    from dmf.alignment import PatchFeatures

    try:
        encoder, params = loading.load_encoder(values.features, "dinov2")
    except InputError as error:
        raise InputError(f"--features={values.features}: it holds no DINOv2; give the directory "
                         "that dmf convert made of one") from error
    encoder = dataclasses.replace(encoder, dtype=values.dtype)
    # What a latent of the published autoencoders and a patch of two by two of them stand for.
    side = values["features-side"].value or values.resolution // 16
    return PatchFeatures(encoder=encoder, side=side), params


def _evaluator(values: flags.FlagValues):
    from dmf.defaults import get_config
    from dmf.evaluator import Evaluator

    if not values.reference.endswith(".npz"):
        raise InputError(f"--reference={values.reference}: give an .npz file to write")
    config = get_config()
    for field in ("protocol", "inception", "dinov2"):
        config.evaluation[field] = values[field].value
    return Evaluator(config, "", labelled=False)
