"""A flow model of one's own images, at 32 x 32 pixels for example.

    dmf prepare --source=IMAGES --output=runs/images_32 --resolution=32
    dmf train --config=configs/images_sit.py --workdir=runs/images_sit \
      --config.data.directory=runs/images_32

The sizes of the network and the number of classes are those of the dataset. To fine-tune a flow
model, add `--config.init.checkpoint=DIR` (README.md, "Your own images"). It is small, so that a
first picture takes minutes; `--config.model.width=256 --config.run.steps=20000` is for a GPU.
Hardware: 2 CPU cores.
"""

from ml_collections import ConfigDict

from configs import default
from dmf.models.build import OF_DATASET, SIZES_OF_DATASET


def get_config() -> ConfigDict:
    """A transformer of 6 blocks of width 64 on 4 x 4 patches. It predicts the data: a velocity is
    as noisy as the noise, which a narrow network cannot pass on."""
    config = default.get_config()
    config.data.name = ""  # data.directory holds it
    config.data.batch_size = 32
    config.model.update(dict.fromkeys(SIZES_OF_DATASET, OF_DATASET))
    config.model.patch_size = 4
    config.model.prediction = "data"
    config.model.scan = False  # six small blocks compile quickly, and run a quarter faster
    config.optimizer.learning_rate = 2e-3
    config.optimizer.warmup_steps = 100
    config.optimizer.schedule = "cosine"
    config.emas.main.decay = 0.99
    config.run.steps = 1000
    config.run.checkpoint_every = 250
    config.run.sample_every = 250
    config.sampling.steps = (1, 4, 32)
    return config
