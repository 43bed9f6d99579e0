"""The model card that goes with parameters."""

from collections.abc import Mapping
from typing import Any

import jax

from dmf.typing import Params

_CARD = """# {title}

Written by [dmf](https://pypi.org/project/dmf-jax/), Decoupled MeanFlow in JAX.

| | |
|---|---|
{rows}

{usage}"""

ORBAX = """`params/` is an Orbax checkpoint (`orbax.checkpoint.StandardCheckpointer().restore`), and
`config.json` the config.
"""
FLOW_MAP = """
    dmf sample --checkpoint=DIR --steps=4 --output=samples.png

    flow_map, config = dmf.load("DIR")   # u(x_t, t, r, y), t = 1 is noise
"""
SAFETENSORS = """`model.safetensors` has the names, shapes and layouts of {spelling}, float32;
`config.json` is the config. `dmf convert` reads it back.
"""


def trained(config: Mapping[str, Any], step: int | None) -> str:
    """Where parameters of a run come from."""
    data, steps = config["data"], "?" if step is None else f"{step:,}"
    return (f"trained on {data['name']}, {config['objective']['name']} objective, {steps} steps of "
            f"{data['batch_size']}")


def model_card(config: Mapping[str, Any], params: Params, *, origin: str, usage: str) -> str:
    """The card of a flow map or of a frozen network.

    Args:
      config: as it is stored.
      params: the parameters.
      origin: where they come from.
      usage: what to do with the files.
    """
    rows = _flow_map(config) if "model" in config else _frozen(config["encoder"])
    title = rows.pop("title")
    rows |= {"parameters": f"{sum(w.size for w in jax.tree.leaves(params)):,}", "origin": origin}
    lines = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
    return _CARD.format(title=title, rows=lines, usage=usage)


def _flow_map(config: Mapping[str, Any]) -> dict[str, Any]:
    model = config["model"]
    title = config["data"]["name"]
    if model.get("name", "dit") != "dit":
        return {"title": f"{title}: {model['name']}", "network": f"{model['name']}, of a file that "
                "commands are given by `--plugins=FILE`"}
    split = model["conditioning"] == "decoupled"
    kind = "flow map" if split else model["conditioning"]
    shape = "depth {depth}, width {width}, {heads} heads, patch {patch_size}".format(**model)
    return {
        "title": f"{title}: {kind}",
        "network": f"diffusion transformer, {shape}",
        "input": "{0} x {0} x {1}, {2} classes".format(
            model["input_size"], model["channels"], model["num_classes"]
        ),
        "conditioning": model["conditioning"]
        + (f", split depth {model['split_depth']}" if split else ""),
    }


def _frozen(encoder: Mapping[str, Any]) -> dict[str, Any]:
    fields = {name: value for name, value in encoder.items() if name != "name"}
    return {"title": encoder["name"], **fields}
