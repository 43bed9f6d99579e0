"""The mutants of autoencoders without a distribution."""

from benchmarks.mutant_list import Mutant

_TAESD = ("tests/models/encoders/test_taesd.py",)
_DC = ("tests/models/encoders/test_autoencoder_dc.py",)

AUTOENCODERS = (
    Mutant(
        "taesd_limit", "the decoder of TAESD does not limit latents",
        "dmf/models/encoders/taesd.py",
        "x = jnp.tanh(latents / _LIMIT) * _LIMIT",
        "x = latents",
        _TAESD,
    ),
    Mutant(
        "taesd_block", "a block of TAESD has no ReLU after its sum",
        "dmf/models/encoders/taesd.py",
        "return nn.relu(x + y)",
        "return x + y",
        _TAESD,
    ),
    Mutant(
        "taesd_padding", "strided convolutions of TAESD pad as JAX does and not as PyTorch does",
        "dmf/models/encoders/taesd.py",
        "kernel_size=(3, 3), padding=1)",
        "kernel_size=(3, 3))",
        _TAESD,
    ),
    Mutant(
        "diffusers_fields", "a field of diffusers that is not known is passed over",
        "dmf/checkpoints/convert/config_files.py",
        "elif name not in ignored and name[:1] != \"_\":",
        "elif name in ignored and False:",
        _TAESD,
    ),
    Mutant(
        "dc_mean_of_pixels", "pixels become channels of DC-AE in another order",
        "dmf/models/encoders/autoencoder_dc.py",
        ".transpose(0, 1, 3, 5, 2, 4)",
        ".transpose(0, 1, 3, 2, 4, 5)",
        _DC,
    ),
    Mutant(
        "dc_attention", "attention of DC-AE divides by no sum of weights",
        "dmf/models/encoders/autoencoder_dc.py",
        "/ (weights[..., None] + 1e-15)",
        "/ (0 * weights[..., None] + 1)",
        _DC,
    ),
)  # fmt: skip
