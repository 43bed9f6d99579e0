"""DMF at 256 distilled from a frozen, guided flow model: one checkpoint is initial and teacher.

    dmf train --config=configs/dmf_distilled.py:b2 --workdir=runs/dmf_distilled_b2

A third party published the scores, for the method of arXiv:2510.24474, without the protocol, the
guidance scale and interval, and the length. Here the interval and the length are those of the
published XL run, the scale is 1.5, and the protocol is edm2.

L/2 and its teacher fit 8 A100 of 40 or 80 GB with `--config.model.remat=none`: 15.79 of 29.57 GiB
(`dmf compile --config=configs/dmf_distilled.py:l2 --topology=a100-40gb:8
--config.model.remat=none`). B/2 has fewer parameters and activations.
"""

import functools

from ml_collections import ConfigDict

from configs import default
from configs.imagenet import imagenet, sized
from configs.rows import Row, chosen
from dmf.objectives import DecoupledMeanFlow, TeacherGuidance

_row = functools.partial(Row, paper="a third party, after arXiv:2510.24474")


def _from(start: str) -> dict[str, str]:
    return {"init.checkpoint": start, "teacher.checkpoint": start}


ROWS = {
    "b2": _row(
        quoted={1: 5.82, 2: 5.19, 4: 5.19},
        changes=sized("B") | {"model.split_depth": 9} | _from("runs/sit_b2"),
        note="its teacher: 5.16",
    ),
    "l2": _row(
        quoted={1: 3.31, 2: 2.82, 4: 2.68},
        changes=sized("L") | {"model.split_depth": 18} | _from("runs/sit_l2"),
    ),
}


def get_config(row: str = "l2") -> ConfigDict:
    """Three quarters of the blocks are conditioned on t."""
    config = imagenet("L")
    config.model.conditioning = "decoupled"
    config.model.split_depth = 18
    config.model.learned_variance = True
    guidance = TeacherGuidance(scale=1.5, interval=(0.0, 0.7))
    config.objective = default.component(DecoupledMeanFlow(guidance=guidance))
    config.run.steps = 400_000
    config.sampling.steps = (1, 2, 4)
    return chosen(config, ROWS, row)
