"""A run in the latents of any autoencoder: convert, prepare, train, sample and decode."""

import pathlib

import image_set
import numpy as np
import tiny

from dmf.training.loop import train


def check(
    source: pathlib.Path, folder: pathlib.Path, *, channels: int, factor: int, side: int = 8
) -> None:
    """Ten training steps in the latents of an autoencoder, and images of the samples.

    Args:
      source: the directory of the autoencoder, as diffusers writes it.
      folder: where everything is written.
      channels: channels of the latents.
      factor: the ratio of an image's height and width to those of its latents.
      side: height and width of the latents.
    """
    pixels = side * factor
    image_set.make(folder / "images", count=20, side=pixels)
    assert tiny.dmf("convert", source, f"--output={folder / 'autoencoder'}") == 0
    assert tiny.dmf(
        "prepare", f"--source={folder / 'images'}", f"--output={folder / 'latents'}",
        f"--autoencoder={folder / 'autoencoder'}", f"--resolution={pixels}", "--batch-size=8",
    ) == 0  # fmt: skip
    config = tiny.config({
        "data.directory": str(folder / "latents"), "data.name": "latents", "data.mirror": True,
        "model.channels": channels, "model.input_size": side, "model.num_classes": 0,
        "model.patch_size": 1 if side % 2 else 2,
        "latents.autoencoder": str(folder / "autoencoder"),
        "run.steps": 10, "run.sample_every": 10, "sampling.steps": (1,),
    })  # fmt: skip
    assert int(train(config, folder / "run").step) == 10
    assert (folder / "run/samples/00000010.png").exists()
    assert tiny.dmf("sample", f"--checkpoint={folder / 'run'}", "--count=3", "--steps=1",
                    "--seed=0", f"--output={folder / 'samples.npz'}") == 0
    with np.load(folder / "samples.npz") as file:
        images = file["arr_0"]
    assert images.shape == (3, pixels, pixels, 3) and images.dtype == np.uint8
    assert images.std() > 1
