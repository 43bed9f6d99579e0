"""The mutants of decoding in tiles, previews and reconstructions."""

from benchmarks.mutant_lists.mutant import Mutant

_TILES = ("tests/models/encoders/test_tiled_decoding.py",)
_PREVIEW = ("tests/training/test_preview.py",)
_RECONSTRUCTION = ("tests/evaluation/test_reconstruction.py",)

MUTANTS = (
    Mutant(
        "tile_margin", "pixels near the border of a tile are blended whatever the decoder sees",
        "dmf/models/encoders/tiled_decoding.py",
        "margin = min(decoder_reach(autoencoder) or 0, overlap // 2)",
        "margin = 0",
        _TILES,
    ),
    Mutant(
        "tile_places", "the rows of tiles are exchanged with their columns",
        "dmf/models/encoders/tiled_decoding.py",
        'np.meshgrid(*starts, indexing="ij")',
        'np.meshgrid(*starts[::-1], indexing="xy")',
        _TILES,
    ),
    Mutant(
        "preview_scaling", "a preview autoencoder decodes the run's own latents",
        "dmf/training/preview.py",
        "return dataclasses.replace(build_latent_space(config, preview), scaling=scaling)",
        "return build_latent_space(config, preview)",
        _PREVIEW,
    ),
    Mutant(
        "ssim_window", "the window of SSIM is narrower",
        "dmf/evaluation/image_similarity.py",
        "(2 * DEVIATION**2)",
        "DEVIATION**2",
        _RECONSTRUCTION,
    ),
    Mutant(
        "rfid_pair", "rFID compares images with themselves",
        "dmf/evaluation/reconstruction.py",
        'features(params, b)["pool3"]',
        'features(params, a)["pool3"]',
        _RECONSTRUCTION,
    ),
)  # fmt: skip
