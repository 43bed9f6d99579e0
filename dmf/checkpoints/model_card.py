"""The model card of an export."""

from collections.abc import Mapping
from typing import Any

import jax

from dmf.models import FROZEN_KINDS
from dmf.types import Params

_CARD = """# {title}

Written by `dmf`, Decoupled MeanFlow in JAX and Flax.

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
SAFETENSORS = """`model.safetensors` has the names, shapes and layouts of {naming}, float32;
`config.json` is the config. `dmf convert` reads it back.
"""

_NETWORKS = {"dit": "diffusion transformer", "in_context_dit": "in-context transformer"}


def trained(config: Mapping[str, Any], step: int | None, std: float | None = None) -> str:
    """The origin of the parameters of a run, one line; `std` is the width of a synthesised EMA."""
    data, steps = config["data"], "?" if step is None else f"{step:,}"
    return (f"trained on {data['name']}, {config['objective']['name']} objective, {steps} steps of "
            f"{data['batch_size']}" + ("" if std is None else f", EMA of std={std}"))


def model_card(config: Mapping[str, Any], params: Params, *, origin: str, usage: str) -> str:
    """The model card of a network, in Markdown.

    Args:
      config: the config as JSON holds it.
      params: parameters of the network.
      origin: one line that says where the parameters come from.
      usage: how to use the files of the export.
    """
    rows = _network_rows(config) if "model" in config else _frozen_rows(config)
    title = rows.pop("title")
    rows |= {"parameters": f"{sum(w.size for w in jax.tree.leaves(params)):,}", "origin": origin}
    rows = {name: str(value).replace("|", "\\|") for name, value in rows.items()}
    lines = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
    return _CARD.format(title=title, rows=lines, usage=usage)


def _network_rows(config: Mapping[str, Any]) -> dict[str, Any]:
    """The title and the rows of a network that is trained."""
    model = config["model"]
    title = config["data"]["name"]
    network = _NETWORKS.get(model.get("name", "dit"))
    if network is None:
        return {"title": f"{title}: {model['name']}", "network": f"{model['name']}, which the "
                "commands find in the file of `--plugins=FILE`"}
    decoupled = model["conditioning"] == "decoupled"
    kind = "flow map" if decoupled else model["conditioning"]
    shape = "depth {depth}, width {width}, {heads} heads, patch {patch_size}".format(**model)
    return {
        "title": f"{title}: {kind}",
        "network": f"{network}, {shape}",
        "input": "{0} x {0} x {1}, {2} classes".format(
            model["input_size"], model["channels"], model["num_classes"]
        ),
        "conditioning": model["conditioning"]
        + (f", split depth {model['split_depth']}" if decoupled else ""),
    }


def _frozen_rows(config: Mapping[str, Any]) -> dict[str, Any]:
    """The title and the rows of a frozen network."""
    network = next(config[kind] for kind in FROZEN_KINDS if kind in config)
    fields = {name: value for name, value in network.items() if name != "name"}
    return {"title": network["name"], **fields}
