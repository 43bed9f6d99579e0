"""A flow model seen as a flow map, without any training (arXiv:2510.24474).

    dmf evaluate --checkpoint=runs/digits_sit --steps=4,8,16,32 \\
      --output=runs/digits_sit/untrained.json \\
      --config.model.conditioning=decoupled --config.model.split_depth=4

A config here, as `--config=configs/untrained.py:xl2_256`, is that of the flow map: what the
commands of its row make of the flow model's own. Reported, second-hand and without a number: at 16
to 128 Euler steps the flow map already beats the flow model.
"""

from ml_collections import ConfigDict

from configs import digits_sit, sit_xl2_repa_256, sit_xl2_repa_512
from configs.rows import Row, chosen

# The flow model, how many of its blocks keep seeing t, and numbers of sampling steps.
_STARTS = {
    "digits": (digits_sit, 4, (4, 8, 16, 32)),
    "xl2_256": (sit_xl2_repa_256, 20, (16, 32, 64, 128)),
    "xl2_512": (sit_xl2_repa_512, 20, (16, 32, 64, 128)),
}


def _row(name: str) -> Row:
    start, split_depth, steps = _STARTS[name]
    run = f"runs/{start.__name__.rpartition('.')[2]}"
    seen = f"--config.model.conditioning=decoupled --config.model.split_depth={split_depth}"
    if start.get_config().sampling.sampler.name != "euler":
        # The SDE of flow models, and the guidance that goes with it, know nothing of r.
        seen += (" --config.sampling.sampler.name=euler --config.sampling.guidance.scale=1.0")
    return Row(
        paper="arXiv:2510.24474",
        commands=(
            f"dmf evaluate --checkpoint={run} --steps={','.join(map(str, steps))} "
            f"--output={run}/untrained.json {seen}",
            f"dmf export --checkpoint={run} --output={run}_untrained {seen}",
        ),
    )


ROWS = {name: _row(name) for name in _STARTS}


def get_config(row: str = "digits") -> ConfigDict:
    """The flow model's config, its last blocks seeing the time they go to."""
    start, split_depth, steps = _STARTS.get(row, _STARTS["digits"])
    config = start.get_config()
    config.model.conditioning = "decoupled"
    config.model.split_depth = split_depth
    config.sampling.sampler = ConfigDict({"name": "euler"})
    config.sampling.guidance.scale = 1.0
    config.sampling.steps = steps
    return chosen(config, ROWS, row)
