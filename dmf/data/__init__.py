"""From files to batches: datasets, the data loader, image files, and the preparation of datasets.

For those who bring their own images. `datasets` opens datasets by name, `data_loader` makes global
batches of them, and `batch_transform` turns these into samples of the network, on the device.
`prepare` writes datasets of latents or crops from folders, archives, shards, parquet files and TFDS
datasets of images (`raw_images`, `image_files`, `archives`, `webdataset`, `parquet_images`).
`latent_caches` and `latent_shards` read latents that others cached. `image_sets` opens the images
that evaluation measures. `latent_origin` says which autoencoder latents are of. `build` reads
`config.data`.

The room imports `dmf.models` (autoencoders and encoders), `dmf.runtime`, `dmf.registry`,
`dmf.errors` and `dmf.types`. It registers no dataset; `register("dataset", NAME=FUNCTION)` adds
one. A name that is not registered is that of a stored dataset, which
`dmf.data.datasets.open_dataset` opens.
"""

from dmf.registry import define_kind

define_kind("dataset", "A function of split and directory that opens a dataset.")
