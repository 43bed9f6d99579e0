"""The model card that goes with exported parameters."""

import jax
from ml_collections import ConfigDict

from dmf.typing import Params

_CARD = """# {title}

Exported by [dmf](https://pypi.org/project/dmf-jax/), Decoupled MeanFlow in JAX.

| | |
|---|---|
| network | diffusion transformer, depth {depth}, width {width}, {heads} heads, patch {patch_size} |
| input | {input_size} x {input_size} x {channels}, {num_classes} classes |
| conditioning | {conditioning}{split} |
| parameters | {parameters:,} |
| trained on | {data}, {objective} objective, {steps} steps of {batch_size} |

`params/` is an Orbax checkpoint (`orbax.checkpoint.StandardCheckpointer().restore`), and
`config.json` the config it was trained with.

    dmf sample --checkpoint=DIR --steps=4 --output=samples.png

    flow_map, config = dmf.load(DIR)   # u(x_t, t, r, y), t = 1 is noise
"""


def model_card(config: ConfigDict, params: Params, *, step: int | None) -> str:
    """The card of parameters trained with `config` for `step` steps (None if not known)."""
    model = config.model
    split = model.conditioning == "decoupled"
    return _CARD.format(
        title=f"{config.data.name}: {'flow map' if split else model.conditioning}",
        **{name: model[name] for name in ("depth", "width", "heads", "patch_size", "input_size")},
        **{name: model[name] for name in ("channels", "num_classes", "conditioning")},
        split=f", split depth {model.split_depth}" if split else "",
        parameters=sum(leaf.size for leaf in jax.tree.leaves(params)),
        data=config.data.name,
        objective=config.objective.name,
        steps="?" if step is None else step,
        batch_size=config.data.batch_size,
    )
