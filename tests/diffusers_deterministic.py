"""diffusers' AutoencoderTiny and AutoencoderDC with drawn weights: golden values, slow tests.

    python tests/diffusers_deterministic.py

writes the files of `GOLDEN`. It needs torch and diffusers.
"""

import json
import pathlib

import golden_values as gv
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file

from dmf.checkpoints.convert import namings
from dmf.checkpoints.convert.open_checkpoint import open_checkpoint

_TINY = {
    "encoder_block_out_channels": [8] * 3, "decoder_block_out_channels": [8] * 3,
    "num_encoder_blocks": [1, 2, 0], "num_decoder_blocks": [2, 0, 1],
}  # fmt: skip
# As published for SANA, and as published for ImageNet; the sizes are small.
_SANA = {
    "latent_channels": 4, "attention_head_dim": 8, "downsample_block_type": "Conv",
    "upsample_block_type": "interpolate", "scaling_factor": 0.41407,
    "decoder_norm_types": "rms_norm", "decoder_act_fns": "silu",
} | {f"{part}_{name}": value for part in ("encoder", "decoder") for name, value in {
    "block_types": ["ResBlock", "ResBlock", "EfficientViTBlock"],
    "block_out_channels": [8, 16, 16],
    "layers_per_block": [1, 1, 2],
    "qkv_multiscales": [[], [], [5]],
}.items()}  # fmt: skip
_IMAGENET = _SANA | {
    "downsample_block_type": "pixel_unshuffle", "upsample_block_type": "pixel_shuffle",
    "decoder_norm_types": ["batch_norm"] * 2 + ["rms_norm"],
    "decoder_act_fns": ["relu"] * 2 + ["silu"], "scaling_factor": 0.25,
    "encoder_layers_per_block": [0, 1, 1], "decoder_layers_per_block": [0, 2, 1],
    "encoder_qkv_multiscales": [[]] * 3, "decoder_qkv_multiscales": [[]] * 3,
}  # fmt: skip
# The class of diffusers, and the fields of a network of it.
CONFIGS = {
    "taesd": ("AutoencoderTiny", _TINY),
    "taesd3": ("AutoencoderTiny", _TINY | {"latent_channels": 16, "scaling_factor": 0.5,
                                           "shift_factor": 0.25}),
    "dc_sana": ("AutoencoderDC", _SANA),
    "dc_imagenet": ("AutoencoderDC", _IMAGENET),
}  # fmt: skip
# The file of golden values by the network.
GOLDEN = {"taesd": "taesd_0", "dc_sana": "autoencoder_dc_0"}
SEED = 11


def autoencoder(name: str):
    """diffusers' network of one of `CONFIGS`, with weights that are functions of their names."""
    import diffusers
    import torch

    class_name, config = CONFIGS[name]
    network = getattr(diffusers, class_name)(**config).eval()
    drawn = {key: torch.from_numpy(gv.drawn_weights(key, tuple(tensor.shape), seed=SEED))
             for key, tensor in network.state_dict().items() if not key.endswith("tracked")}
    network.load_state_dict(drawn, strict=False)
    return network


def outputs(network, side: int = 8, factor: int = 4) -> dict[str, np.ndarray]:
    """Drawn images and latents, and what the network makes of them, channels first."""
    import torch

    draw, channels = np.random.default_rng(SEED).standard_normal, network.config.latent_channels
    images = draw((2, 3, side, 2 * side)).astype("f")
    z = 2 * draw((2, channels, side // factor, 2 * side // factor)).astype("f")
    with torch.no_grad():
        latents = network.encode(torch.from_numpy(images), return_dict=False)[0]
        decoded = network.decode(torch.from_numpy(z), return_dict=False)[0]
    return {"images_nchw": images, "z": z, "latents": latents.numpy(), "decoded": decoded.numpy()}


def read(folder, **fields) -> namings.Converted:
    """The network and the parameters of a directory or a file."""
    opened = open_checkpoint(str(folder))
    return namings.from_named_tensors(opened.tensors, fields, neighbour=opened.neighbour)


def assert_same_outputs(found: namings.Converted, theirs, tolerance=1e-5) -> None:
    """Compares what a converted network makes with what `outputs` returned."""
    params = gv.on_device(found.params)
    first = lambda name: np.moveaxis(theirs[name], 1, -1)  # noqa: E731
    ours = gv.jit(lambda params, images, z: (
        found.network.encode(params, images), found.network.decode(params, z)
    ))(params, first("images_nchw"), first("z"))
    for mine, name in zip(ours, ("latents", "decoded"), strict=True):
        assert mine.dtype == jnp.float32
        gv.assert_near(mine, first(name), tolerance)


def golden_directory(name: str, folder: pathlib.Path, **changes) -> pathlib.Path:
    """The directory of a network of golden values, as diffusers writes it, without diffusers."""
    golden = gv.load(GOLDEN[name]).config
    tensors = {key: gv.drawn_weights(key, shape, seed=golden["seed"])
               for key, shape in golden["names"].items()}
    save_file(tensors, folder / "diffusion_pytorch_model.safetensors")
    (folder / "config.json").write_text(json.dumps({**golden["config"], **changes}))
    return folder


def main() -> None:
    """Writes the golden values."""
    for name, file in GOLDEN.items():
        network = autoencoder(name)
        np.savez(gv.FOLDER / f"{file}.npz", **outputs(network))
        names = {key: list(tensor.shape) for key, tensor in network.state_dict().items()}
        config = {"_class_name": CONFIGS[name][0], **CONFIGS[name][1]}
        stated = {"seed": SEED, "config": config, "names": names}
        (gv.FOLDER / f"{file}.json").write_text(json.dumps(stated) + "\n")


if __name__ == "__main__":
    main()
