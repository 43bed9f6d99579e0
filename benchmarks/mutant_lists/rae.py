"""The mutants of RAE, of DINOv2 with registers, and of checkpoints in several files."""

from benchmarks.mutant_lists.mutant import Mutant

_RAE = ("tests/models/encoders/test_rae.py",)

MUTANTS = (
    Mutant(
        "rae_variance", "the release's variances are taken for standard deviations",
        "dmf/checkpoints/convert/tables/rae.py",
        'mean="mean", std="var", std_layout=_VARIANCE,',
        'mean="mean", std="var", std_layout=_DEVIATION,',
        _RAE,
    ),
    Mutant(
        "rae_last_norm", "the last norm of RAE's encoder has a scale and a bias",
        "dmf/models/encoders/rae.py",
        "affine=False, name=",
        "name=",
        _RAE,
    ),
    Mutant(
        "rae_decode_scale", "latents of RAE are decoded as they are normalised",
        "dmf/models/encoders/rae.py",
        'latents = latents * params["encoder"]["std"][None]',
        "pass",
        _RAE,
    ),
    Mutant(
        "dinov2_registers", "register tokens of DINOv2 are taken for patches",
        "dmf/models/encoders/dinov2.py",
        "patches = tokens[:, 1 + config.registers :]",
        "patches = tokens[:, 1 : tokens.shape[1] - config.registers]",
        _RAE,
    ),
    Mutant(
        "network_in_a_network", "an encoder inside of an autoencoder is a part of its own",
        "dmf/checkpoints/convert/training_files.py",
        "if not any(told < other for _, other in parts)})",
        "if told or not any(told < other for _, other in parts)})",
        _RAE,
    ),
)  # fmt: skip
