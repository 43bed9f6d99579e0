"""A flow model seen as a flow map, without any training (arXiv:2510.24474).

    dmf evaluate --checkpoint=runs/digits_sit --steps=4,8,16,32 \\
      --output=runs/digits_sit/untrained.json \\
      --config.model.conditioning=decoupled --config.model.split_depth=4

A config here, as `--config=configs/untrained.py:xl2_256`, is that of the flow map: what the
commands of its row make of the flow model's own. Others quote that at 16 to 128 Euler steps the
flow map already beats the flow model; no number.
"""

from ml_collections import ConfigDict

from configs import digits_sit, sit_xl2_repa_256, sit_xl2_repa_512
from configs.rows import Row, chosen

_STARTS = {
    "digits": (digits_sit, 4),
    "xl2_256": (sit_xl2_repa_256, 20),
    "xl2_512": (sit_xl2_repa_512, 20),
}


def _row(start: str, split_depth: int, steps: str) -> Row:
    seen = f"--config.model.conditioning=decoupled --config.model.split_depth={split_depth}"
    return Row(
        paper="arXiv:2510.24474",
        commands=(
            f"dmf evaluate --checkpoint={start} --steps={steps} --output={start}/untrained.json "
            + seen,
            f"dmf export --checkpoint={start} --output={start}_untrained {seen}",
        ),
    )


ROWS = {
    "digits": _row("runs/digits_sit", 4, "4,8,16,32"),
    "xl2_256": _row("runs/sit_xl2_repa_256", 20, "16,32,64,128"),
    "xl2_512": _row("runs/sit_xl2_repa_512", 20, "16,32,64,128"),
}


def get_config(row: str = "digits") -> ConfigDict:
    """The flow model's config, its last blocks seeing the time they go to."""
    start, split_depth = _STARTS.get(row, _STARTS["digits"])
    config = start.get_config()
    config.model.conditioning = "decoupled"
    config.model.split_depth = split_depth
    return chosen(config, ROWS, row)
