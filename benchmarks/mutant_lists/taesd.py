"""The mutants of TAESD, an autoencoder without a distribution."""

from benchmarks.mutant_lists.mutant import Mutant

_TAESD = ("tests/models/encoders/test_taesd.py",)

MUTANTS = (
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
)  # fmt: skip
