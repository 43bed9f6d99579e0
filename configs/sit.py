"""Flow models at 256 of every size, plain and with representation alignment.

    dmf train --config=configs/sit.py:l2 --workdir=runs/sit_l2

The tables of Decoupled MeanFlow (arXiv:2510.24474) start from some of them; the others are in no
table, and have the same settings. Times are logit-normal, like everywhere in that paper.
`xl2_short` has MeanFlow's budget without the fine-tuning. Rows that end in `repa` are aligned to
DINOv2-B (REPA, arXiv:2410.06940), whose patch features their batches must carry: after block 8, and
after block 4 of the 12 of S and B.

XL/2 fits 16 TPU v5e and 8 A100 of 40 GB (sit_xl2.py, sit_xl2_repa_256.py); the smaller sizes have
fewer parameters and activations, and were not compiled.
"""

import dataclasses

from ml_collections import ConfigDict

from configs import default
from configs.imagenet import STEPS_PER_EPOCH, imagenet, sized
from configs.rows import Row, chosen
from dmf.models.dit import SIZES, repa_depth
from dmf.objectives import FlowMatching

_PAPER = "arXiv:2510.24474"
_ALIGNED = {
    "objective": default.component(FlowMatching(alignment_coefficient=0.5)),
    "alignment": {"encoder": "runs/dinov2_b", "dtype": "bfloat16"},
}
_DETAILS = {
    "b2": {"paper": _PAPER, "note": "a third party's teacher of B/2, with guidance: FID 5.16"},
    "l2": {"paper": _PAPER},
    "l2_repa": {"paper": _PAPER, "note": "as long as l2: the paper's length is not known here"},
    # `configs.__main__.workdir` would give the workdir of sit_xl2.py.
    "xl2": {"commands": ("dmf train --config=configs/sit.py:xl2 --workdir=runs/sit_xl2_400k",),
            "note": "400,000 steps; sit_xl2 is the published run"},
}  # fmt: skip

ROWS = {f"{size.lower()}2": Row(changes=sized(size)) for size in SIZES}
ROWS |= {
    f"{size.lower()}2_repa": Row(changes={
        **sized(size), **_ALIGNED, "model.alignment_depth": repa_depth(SIZES[size]["depth"]),
    })
    for size in SIZES
}  # fmt: skip
ROWS |= {name: dataclasses.replace(ROWS[name], **details) for name, details in _DETAILS.items()}
ROWS["xl2_short"] = Row(
    changes={"run.steps": 160 * STEPS_PER_EPOCH},
    paper=_PAPER,
    note="about 160 epochs, as others quote it",
)


def get_config(row: str = "l2") -> ConfigDict:
    """The network, for 400 k steps unless the row changes that."""
    config = imagenet("XL")
    config.run.steps = 400_000
    config.sampling.steps = (250,)
    return chosen(config, ROWS, row)
