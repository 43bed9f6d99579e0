"""Flow models at 256 that the tables of Decoupled MeanFlow start from (arXiv:2510.24474).

    dmf train --config=configs/sit.py:l2 --workdir=runs/sit_l2

Times are logit-normal, as everywhere in that paper. `xl2_short` has MeanFlow's budget less the
fine-tuning; `l2_repa` is aligned to DINOv2-B (REPA, arXiv:2410.06940), whose patch features its
batches must carry.
"""

import functools

from ml_collections import ConfigDict

from configs import default
from configs.imagenet import STEPS_PER_EPOCH, imagenet, sized
from configs.rows import Row, chosen

_row = functools.partial(Row, paper="arXiv:2510.24474")

ROWS = {
    "b2": _row(changes=sized("B"), note="a third party's teacher of B/2, with guidance: FID 5.16"),
    "l2": _row(changes=sized("L")),
    "l2_repa": _row(
        changes={
            **sized("L"),
            "model.alignment_depth": 8,
            "objective": default.flow_matching(alignment_coefficient=0.5),
            "alignment": {"encoder": "runs/dinov2_b", "dtype": "bfloat16"},
        },
        note="as long as l2: the paper's length is not known here",
    ),
    "xl2_short": _row(
        changes={"run.steps": 160 * STEPS_PER_EPOCH}, note="about 160 epochs, as others quote it"
    ),
}


def get_config(row: str = "l2") -> ConfigDict:
    """The network, for 400 k steps unless the row says otherwise."""
    config = imagenet("XL")
    config.run.steps = 400_000
    config.sampling.steps = (250,)
    return chosen(config, ROWS, row)
