"""Improved MeanFlow at 256 from scratch (arXiv:2512.02012): its loss, and guidance as an input.

    dmf train --config=configs/improved_meanflow.py:xl2 --workdir=runs/improved_meanflow_xl2

The scale and the interval of the guidance are drawn in training and given to the network; at
sampling, `--config.sampling.guidance.scale` is to be searched for. What else the paper changes of
the network, and its length, are not here: the networks are MeanFlow's, for 240 epochs, so that its
scores are no more than a direction.
"""

import functools

from ml_collections import ConfigDict

from configs import default
from configs.imagenet import sized
from configs.meanflow import meanflow
from configs.rows import Row, chosen

_NOTE = "network and length are MeanFlow's, and the scale is to be searched for"
_row = functools.partial(Row, paper="arXiv:2512.02012", note=_NOTE)

ROWS = {
    "b2": _row(fid={1: 3.39}, changes=sized("B")),
    "m2": _row(fid={1: 2.27}, changes=sized("M")),
    "l2": _row(fid={1: 1.86}, changes=sized("L")),
    "xl2": _row(fid={1: 1.72, 2: 1.54}, changes=sized("XL")),
}


def get_config(row: str = "xl2") -> ConfigDict:
    """MeanFlow's network with guidance as an input, and the loss along its own velocity."""
    config = meanflow("XL")
    config.model.guidance_input = True
    config.objective.guidance = default.drawn_guidance()
    config.objective.tangent = default.tangent("own")
    return chosen(config, ROWS, row)
