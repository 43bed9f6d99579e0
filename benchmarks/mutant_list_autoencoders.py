"""The mutants of autoencoders: their parts, their scaling, and the datasets of their latents."""

from benchmarks.mutant_list import Mutant

AUTOENCODERS = (
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
)  # fmt: skip
