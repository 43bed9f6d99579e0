"""A flow model of emoji in colour, 32 x 32 pixels: the start of launch/emoji.sh.

    python examples/emoji.py --output=runs/emoji
    dmf prepare --source=runs/emoji --output=runs/emoji_32 --resolution=32
    dmf train --config=configs/emoji_sit.py --workdir=runs/emoji_sit

Hardware: 2 CPU cores.
"""

from ml_collections import ConfigDict

from configs import images_sit


def get_config() -> ConfigDict:
    """The network of images_sit with 8 blocks of width 128."""
    config = images_sit.get_config()
    config.data.directory = "runs/emoji_32"
    config.data.batch_size = 64
    config.model.depth = 8
    config.model.width = 128
    config.emas.main.decay = 0.995
    config.run.steps = 2400
    config.run.checkpoint_every = 400
    config.run.sample_every = 400
    return config
