"""Improved MeanFlow at 256 from scratch (arXiv:2512.02012): its loss, and guidance as an input.

    dmf train --config=configs/improved_meanflow.py:xl2 --workdir=runs/improved_meanflow_xl2

The scale and the interval of the guidance are drawn in training and are inputs of the network;
search for the best `--config.sampling.guidance.scale` at sampling. The paper's other changes to the
network, and its length, are not reproduced: the networks are those of MeanFlow, for 240 epochs, so
that the scores are only a rough guide.
"""

import functools

from ml_collections import ConfigDict

from configs import default
from configs.imagenet import sized
from configs.meanflow import meanflow
from configs.rows import Row, chosen
from dmf.objectives import DrawnGuidance, Tangent

_NOTE = "network and length of MeanFlow; search for the best scale"
_row = functools.partial(Row, paper="arXiv:2512.02012", note=_NOTE)

ROWS = {
    "b2": _row(fid={1: 3.39}, changes=sized("B")),
    "m2": _row(fid={1: 2.27}, changes=sized("M")),
    "l2": _row(fid={1: 1.86}, changes=sized("L")),
    "xl2": _row(fid={1: 1.72, 2: 1.54}, changes=sized("XL")),
}


def get_config(row: str = "xl2") -> ConfigDict:
    """MeanFlow's network with guidance as an input; the tangent along the predicted velocity."""
    config = meanflow("XL")
    config.model.guidance_input = True
    config.objective.guidance = default.component(DrawnGuidance())
    config.objective.tangent = default.component(Tangent(velocity="predicted"))
    return chosen(config, ROWS, row)
