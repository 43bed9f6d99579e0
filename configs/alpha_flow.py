"""alpha-Flow at 256 from scratch (arXiv:2510.20771): from flow matching to MeanFlow.

    dmf train --config=configs/alpha_flow.py:xl2 --workdir=runs/alpha_flow_xl2

As published: the network, the guidance and the times of MeanFlow, with r = t for a quarter of the
samples; alpha falls from 1 to 0 between steps 600,000 and 1,000,000 of 1,200,000; targets are
clipped to [-4, 4]. The paper also has r = t for half of the samples, and we have read the schedule
of XL/2 only: B/2 has the same here. The offset of the adaptive weighting is MeanFlow's.
"""

import functools

from ml_collections import ConfigDict

from configs import default
from configs.imagenet import sized
from configs.meanflow import ROWS as MEANFLOW_ROWS
from configs.meanflow import meanflow
from configs.rows import Row, chosen
from dmf.objectives import AlphaFlow, SelfGuidance

_row = functools.partial(Row, paper="arXiv:2510.20771")

ROWS = {
    "b2": _row(fid={1: "5.40", 2: 5.01}, changes=sized("B")),
    "xl2": _row(fid={1: 2.95, 2: 2.34}, changes=MEANFLOW_ROWS["xl2"].changes),
    "xl2_plus": _row(
        fid={1: 2.58, 2: 2.15},
        lacks="we have not read how the training of XL/2+ differs from that of XL/2",
    ),
}


def get_config(row: str = "xl2") -> ConfigDict:
    """The network of MeanFlow, at the published length."""
    config = meanflow("XL")
    config.objective = default.component(AlphaFlow(
        guidance=SelfGuidance(omega=1.0, kappa=0.5), clip=4.0, first_step=600_000,
        last_step=1_000_000,
    ))  # fmt: skip
    config.run.steps = 1_200_000
    return chosen(config, ROWS, row)
