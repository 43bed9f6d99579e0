"""The mutants of sources of images and latents, and of the names of latent diffusion."""

from benchmarks.mutant_lists.mutant import Mutant

MUTANTS = (
    Mutant(
        "shard_numbers", "the numbers of shards in a pattern lose their zeros",
        "dmf/data/webdataset.py",
        'width = len(first) if first.startswith("0") else 0',
        "width = 0",
        ("tests/data/test_webdataset.py",),
    ),
    Mutant(
        "row_groups", "the first row of a row group is sought in the one before",
        "dmf/data/parquet_images.py",
        'np.searchsorted(self._starts, index, "right")',
        'np.searchsorted(self._starts, index, "left")',
        ("tests/data/test_parquet_images.py",),
    ),
    Mutant(
        "parquet_splits", "a split is the name of the file and not of the folder",
        "dmf/data/parquet_files.py",
        "folders[-1] if folders and stem.isdecimal() else stem",
        "stem",
        ("tests/data/test_parquet_images.py",),
    ),
    Mutant(
        "cached_shards", "rows of cached latents come from the start of their file",
        "dmf/data/latent_shards.py",
        "row = int(wanted[place] - self.starts[shard])",
        "row = int(wanted[place] - self.starts[shard]) // 2",
        ("tests/data/test_latent_shards.py",),
    ),
    Mutant(
        "cached_statistics", "statistics beside cached latents replace a scaling of the config",
        "dmf/cli/config_flag.py",
        "is_scaled = config.latents.mean or any(",
        "is_scaled = any(",
        ("tests/checkpoints/test_latent_statistics.py",),
    ),
    Mutant(
        "levels_of_the_decoder", "levels of the decoder with attention count from the coarsest",
        "dmf/checkpoints/convert/tables/autoencoder_kl.py",
        "tuple(len(levels) - 1 - level for level in reversed(up))",
        "up",
        ("tests/models/encoders/test_autoencoder_ldm.py",),
    ),
)  # fmt: skip
