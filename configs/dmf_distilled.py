"""DMF at 256 distilled from a frozen, guided flow model: the start is also the teacher.

    dmf train --config=configs/dmf_distilled.py:b2 --workdir=runs/dmf_distilled_b2

A third party measured these after the method of arXiv:2510.24474, by a protocol that is not given,
nor are its scale, interval and length: interval and length here are those of the published XL run,
the scale is 1.5, and the protocol EDM2's.
"""

import functools

from ml_collections import ConfigDict

from configs import default
from configs.imagenet import imagenet, sized
from configs.rows import Row, chosen

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
    """A flow model as start and as teacher, three quarters of its blocks seeing t."""
    config = imagenet("L")
    config.model.conditioning = "decoupled"
    config.model.split_depth = 18
    config.model.learned_variance = True
    config.objective = default.decoupled_mean_flow(default.teacher_guidance(1.5, (0.0, 0.7)))
    config.run.steps = 400_000
    config.sampling.steps = (1, 2, 4)
    return chosen(config, ROWS, row)
