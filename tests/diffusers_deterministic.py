"""diffusers' AutoencoderTiny, AutoencoderDC and AutoencoderRAE with drawn weights: golden values,
slow tests.

    python tests/diffusers_deterministic.py

writes the files of `GOLDEN`. It needs torch, diffusers and transformers.
"""

import json
import math
import pathlib

import golden_values as gv
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file

from dmf.checkpoints.convert import namings
from dmf.checkpoints.convert.open_checkpoint import open_together
from dmf.models.encoders.dinov2 import IMAGENET_MEAN, IMAGENET_STD

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
# Latents of 3 x 3 with 64 channels, the width of one head; a latent is 4 x 4 pixels.
_RAE = {
    "encoder_hidden_size": 64, "encoder_num_hidden_layers": 2, "encoder_input_size": 42,
    "decoder_hidden_size": 16, "decoder_num_hidden_layers": 2, "decoder_num_attention_heads": 2,
    "decoder_intermediate_size": 24, "patch_size": 4, "noise_tau": 0.8,
    "latents_std": [[[1.0] * 3] * 3] * 64,
}  # fmt: skip
# The class of diffusers, and the fields of a network of it.
CONFIGS = {
    "taesd": ("AutoencoderTiny", _TINY),
    "taesd3": ("AutoencoderTiny", _TINY | {"latent_channels": 16, "scaling_factor": 0.5,
                                           "shift_factor": 0.25}),
    "dc_sana": ("AutoencoderDC", _SANA),
    "dc_imagenet": ("AutoencoderDC", _IMAGENET),
    "rae": ("AutoencoderRAE", _RAE),
    # As many latents as published; another number has other positions in diffusers.
    "rae_16": ("AutoencoderRAE", _RAE | {"encoder_input_size": 224,
                                         "latents_std": [[[1.0] * 16] * 16] * 64}),
    "rae_mean": ("AutoencoderRAE", _RAE | {"latents_mean": [[[0.0] * 3] * 3] * 64}),
}  # fmt: skip
# The file of golden values by the network.
GOLDEN = {"taesd": "taesd_0", "dc_sana": "autoencoder_dc_0", "rae": "rae_0"}
SEED = 11
_FIXED = {"encoder_mean": IMAGENET_MEAN, "encoder_std": IMAGENET_STD, "_latents_mean": (0,)}


def drawn(key: str, shape) -> np.ndarray:
    """A tensor that is a function of its name; deviations are positive."""
    if math.prod(shape) == len(_FIXED.get(key, ())):
        return np.float32(_FIXED[key]).reshape(shape)
    w = gv.drawn_weights(key, tuple(shape), seed=SEED)
    return 0.5 + np.abs(w) if key.endswith("_std") else w


def autoencoder(name: str):
    """diffusers' network of one of `CONFIGS`, with weights that are functions of their names."""
    import diffusers
    import torch

    class_name, config = CONFIGS[name]
    network = getattr(diffusers, class_name)(**config).eval()
    weights = {key: torch.from_numpy(drawn(key, tensor.shape))
               for key, tensor in network.state_dict().items() if not key.endswith("tracked")}
    network.load_state_dict(weights, strict=False)
    if "encoder_type" in network.config and name != "rae_16":
        # The positions of the release and of masked autoencoders are whole numbers.
        from diffusers.models.embeddings import get_2d_sincos_pos_embed

        table = network.decoder.decoder_pos_embed
        side = math.isqrt(table.shape[1] - 1)
        table.copy_(get_2d_sincos_pos_embed(
            table.shape[-1], side, base_size=side, cls_token=True, extra_tokens=1,
            output_type="pt")[None])
    return network


def outputs(network, side: int = 8, factor: int = 4) -> dict[str, np.ndarray]:
    """Drawn images and latents, and what the network makes of them, channels first.

    RAE takes images of one size, and its images lie in [0, 1].
    """
    import torch

    config, draw = network.config, np.random.default_rng(SEED).standard_normal
    channels, width, is_rae = config.get("latent_channels"), 2 * side, "encoder_type" in config
    if is_rae:
        channels = config.encoder_hidden_size
        side = width = 4 * config.encoder_input_size // 14
    images = draw((2, 3, side, width)).astype("f")
    z = 2 * draw((2, channels, side // factor, width // factor)).astype("f")
    theirs = torch.from_numpy((images + 1) / 2 if is_rae else images)
    with torch.no_grad():
        latents = network.encode(theirs, return_dict=False)[0].numpy()
        decoded = network.decode(torch.from_numpy(z), return_dict=False)[0].numpy()
    decoded = 2 * decoded - 1 if is_rae else decoded
    return {"images_nchw": images, "z": z, "latents": latents, "decoded": decoded}


def read(*sources, **fields) -> namings.Converted:
    """The network and the parameters of a directory or a file, or of several."""
    opened = open_together([str(source) for source in sources])
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
    tensors = {key: drawn(key, shape) for key, shape in golden["names"].items()}
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
