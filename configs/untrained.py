"""A flow model converted to a flow map without training (arXiv:2510.24474).

    dmf evaluate --checkpoint=runs/digits_sit --steps=4,8,16,32 \\
      --output=runs/digits_sit/untrained.json \\
      --config.model.conditioning=decoupled --config.model.split_depth=4

A config of this file, for example `--config=configs/untrained.py:xl2_256`, is that of the flow map,
which the commands of its row make from the config of the flow model. Reported second-hand, without
a number: at 16 to 128 Euler steps the flow map already beats the flow model.
"""

from ml_collections import ConfigDict

from configs import digits_sit, sit_xl2_repa_256, sit_xl2_repa_512
from configs.rows import Row, chosen

# The flow model, the number of its blocks that are conditioned on t, and numbers of sampling steps.
_STARTS = {
    "digits": (digits_sit, 4, (4, 8, 16, 32)),
    "xl2_256": (sit_xl2_repa_256, 20, (16, 32, 64, 128)),
    "xl2_512": (sit_xl2_repa_512, 20, (16, 32, 64, 128)),
}


def _row(name: str) -> Row:
    start, split_depth, steps = _STARTS[name]
    run = f"runs/{start.__name__.rpartition('.')[2]}"
    overrides = f"--config.model.conditioning=decoupled --config.model.split_depth={split_depth}"
    if start.get_config().sampling.sampler.name != "euler":
        # The SDE of flow models, and its guidance, ignore r.
        overrides += (" --config.sampling.sampler.name=euler --config.sampling.guidance.scale=1.0")
    return Row(
        paper="arXiv:2510.24474",
        commands=(
            f"dmf evaluate --checkpoint={run} --steps={','.join(map(str, steps))} "
            f"--output={run}/untrained.json {overrides}",
            f"dmf export --checkpoint={run} --output={run}_untrained {overrides}",
        ),
    )


ROWS = {name: _row(name) for name in _STARTS}


def get_config(row: str = "digits") -> ConfigDict:
    """The flow model's config, with the last blocks conditioned on r."""
    start, split_depth, steps = _STARTS.get(row, _STARTS["digits"])
    config = start.get_config()
    config.model.conditioning = "decoupled"
    config.model.split_depth = split_depth
    config.sampling.sampler = ConfigDict({"name": "euler"})
    config.sampling.guidance.scale = 1.0
    config.sampling.steps = steps
    return chosen(config, ROWS, row)
