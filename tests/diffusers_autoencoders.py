"""diffusers' AutoencoderKL with drawn weights: for slow tests, and for golden values of the default
level.

    python tests/diffusers_autoencoders.py

writes `golden/vae_16.npz` and `golden/vae_16.json`. It needs torch and diffusers.
"""

import json
import pathlib

import golden_values as gv
import numpy as np
from safetensors.numpy import save_file

_TINY = {
    "block_out_channels": [8, 16], "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2, "layers_per_block": 1, "norm_num_groups": 4,
    "sample_size": 8,
}  # fmt: skip
_WITHOUT = {"use_quant_conv": False, "use_post_quant_conv": False}
# The fields of the published autoencoders that are not sizes.
CONFIGS = {
    "sdxl": _TINY | {"latent_channels": 4, "scaling_factor": 0.13025, "force_upcast": True},
    "sd3": _TINY | _WITHOUT | {"latent_channels": 16, "scaling_factor": 1.5305,
                               "shift_factor": 0.0609},
    "flux": _TINY | _WITHOUT | {"latent_channels": 16, "scaling_factor": 0.3611,
                                "shift_factor": 0.1159},
    "attention": _TINY | {
        "latent_channels": 3, "down_block_types": ["DownEncoderBlock2D", "AttnDownEncoderBlock2D"],
        "up_block_types": ["UpDecoderBlock2D", "AttnUpDecoderBlock2D"],
    },
    "post_quant": _TINY | {"latent_channels": 3, "use_quant_conv": False},
}  # fmt: skip
GOLDEN, SEED = "vae_16", 7


def autoencoder(name: str):
    """diffusers' network of one of `CONFIGS`, with weights that are functions of their names."""
    import diffusers
    import torch

    network = diffusers.AutoencoderKL(**CONFIGS[name]).eval()
    drawn = {key: torch.from_numpy(gv.drawn_weights(key, tuple(tensor.shape), seed=SEED))
             for key, tensor in network.state_dict().items()}
    network.load_state_dict(drawn, strict=True)
    return network


def outputs(network) -> dict[str, np.ndarray]:
    """Drawn images and latents, and what the network makes of them, channels first."""
    import torch

    draw, channels = np.random.default_rng(SEED).standard_normal, network.config.latent_channels
    images, z = draw((1, 3, 8, 8)).astype("f"), draw((1, channels, 4, 4)).astype("f")
    with torch.no_grad():
        moments = network.encode(torch.from_numpy(images)).latent_dist
        decoded = network.decode(torch.from_numpy(z)).sample
    return {"images_nchw": images, "z": z, "mean": moments.mean.numpy(),
            "std": moments.std.numpy(), "decoded": decoded.numpy()}


def save(network, folder: pathlib.Path) -> pathlib.Path:
    """A directory of a network, as diffusers writes it."""
    network.save_pretrained(folder)
    return folder


def main() -> None:
    """Writes the golden values."""
    network = autoencoder("sd3")
    np.savez(gv.FOLDER / f"{GOLDEN}.npz", **outputs(network))
    names = {name: list(tensor.shape) for name, tensor in network.state_dict().items()}
    stated = {"seed": SEED, "config": CONFIGS["sd3"], "names": names}
    (gv.FOLDER / f"{GOLDEN}.json").write_text(json.dumps(stated) + "\n")


def golden_directory(folder: pathlib.Path, **changes) -> pathlib.Path:
    """The directory of the autoencoder of the golden values; it needs no diffusers."""
    golden = gv.load(GOLDEN).config
    tensors = {name: gv.drawn_weights(name, shape, seed=golden["seed"])
               for name, shape in golden["names"].items()}
    save_file(tensors, folder / "diffusion_pytorch_model.safetensors")
    config = {"_class_name": "AutoencoderKL", **golden["config"], **changes}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


if __name__ == "__main__":
    main()
