"""The mutants of autoencoders: their parts, their scaling, and the datasets of their latents."""

from benchmarks.mutant_lists.mutant import Mutant

_DC = ("tests/models/encoders/test_autoencoder_dc.py",)

MUTANTS = (
    Mutant(
        "quant_convolutions", "an autoencoder has both quant convolutions or none",
        "dmf/checkpoints/convert/tables/autoencoder_kl.py",
        'any(name.startswith("post_quant_conv.") for name in shapes)',
        'any(name.startswith("quant_conv.") for name in shapes)',
        ("tests/models/encoders/test_autoencoder_kl.py",),
    ),
    Mutant(
        "autoencoder_scaling", "the scaling in config.json is not kept with the autoencoder",
        "dmf/checkpoints/convert/config_files.py",
        '{"default_scaling": scaling} if scaling else {}',
        "{}",
        ("tests/models/encoders/test_autoencoder_kl_diffusers.py",),
    ),
    Mutant(
        "unstated_scaling", "16 channels have the scale of Stable Diffusion where none is stated",
        "dmf/checkpoints/convert/tables/autoencoder_kl.py",
        'unscaled = {} if told["latent_channels"] == 4 else ',
        "unscaled = {} if True else ",
        ("tests/models/encoders/test_autoencoder_kl.py",),
    ),
    Mutant(
        "latent_origin", "latents are told apart by their decoder too",
        "dmf/data/latent_origin.py",
        'params.get("encoder", params)',
        "params",
        ("tests/data/test_latent_origin.py",),
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
