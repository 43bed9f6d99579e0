"""The model card of an export."""

from collections.abc import Mapping
from typing import Any

import jax

from dmf.checkpoints import hub_card
from dmf.checkpoints.hub_card import Publication
from dmf.models import FROZEN_KINDS
from dmf.types import Params

_CARD = """{header}# {title}

Written by `dmf`, Decoupled MeanFlow in JAX and Flax.

| | |
|---|---|
{rows}

{usage}"""

_ORBAX = """`params/` is an Orbax checkpoint (`orbax.checkpoint.StandardCheckpointer().restore`),
and `config.json` the config.
"""
_FROZEN = """
Commands of `dmf` take it as `{address}` where they take such a network.
"""
_FLOW_MAP = """
```bash
dmf sample --checkpoint={address} --steps={steps} --output=samples.png
```

The same in Python, without the guidance and the sampler of `config.json`:

```python
{example}
```
"""
_SAFETENSORS = """`model.safetensors` has the names, shapes and layouts of {naming}, float32;
`config.json` is the config. `dmf convert` reads it back:

```bash
dmf convert {address}{file} --output=export{rest}
```
"""
_DOWNLOAD = """
The package `huggingface_hub` downloads this folder:

```bash
hf download {repository} --local-dir=export
```
"""

_NETWORKS = {"dit": "diffusion transformer", "in_context_dit": "in-context transformer"}


def trained(config: Mapping[str, Any], step: int | None, std: float | None = None) -> str:
    """The origin of the parameters of a run, one line; `std` is the width of a synthesised EMA."""
    data, steps = config["data"], "?" if step is None else f"{step:,}"
    return (f"trained on {data['name']}, {config['objective']['name']} objective, {steps} steps of "
            f"{data['batch_size']}" + ("" if std is None else f", EMA of std={std}"))


def orbax_usage(
    config: Mapping[str, Any], publication: Publication | None, *, latents: bool
) -> str:
    """How to use an export with Orbax parameters.

    Args:
      config: the config as JSON holds it.
      publication: of an export that is pushed; None for one on the disk.
      latents: whether the export holds the autoencoder of the latents that the network makes.
    """
    address = publication.address if publication else "DIR"
    if "model" not in config:
        return _ORBAX + _FROZEN.format(address=address)
    steps = max(config["sampling"]["steps"], default=4)
    example = _example(config, address, steps, latents)
    return _ORBAX + _FLOW_MAP.format(address=address, steps=steps, example=example)


def _example(config: Mapping[str, Any], address: str, steps: int, latents: bool) -> str:
    """Lines of Python that load a flow map and, on the linear path, sample from it."""
    shift = config["sampling"]["shift"]
    options = f"steps={steps}" + (f", shift={shift}" if shift != 1 else "")
    load = ["import dmf, jax", "",
            f'flow_map, config = dmf.load("{address}")    # u(x_t, t, r, y), t = 1 is noise']
    sample = [
        "noise = jax.random.normal(jax.random.key(0), (4, *flow_map.network.sample_shape))",
        "labels = jax.numpy.arange(4) % max(flow_map.network.num_classes, 1)",
        f"samples = dmf.sample(flow_map, noise, labels, {options})",
    ]
    decode = ["latent_space, decoder = dmf.load_latent_space(config)    # on the first device",
              "samples = jax.device_put(samples, jax.devices()[0])",
              "samples = latent_space.decode(decoder, samples)"] if latents else []
    pixels = ["images = dmf.to_uint8(samples)    # [4, height, width, channels]"]
    is_linear = config["objective"].get("interpolant", "linear") in ("linear", {"name": "linear"})
    return "\n".join([*load, *sample, *decode, *pixels] if is_linear else load)


def safetensors_usage(naming: str, publication: Publication | None, *, latents: bool) -> str:
    """How to use an export as safetensors.

    Args:
      naming: parameter naming scheme of the file.
      publication: of an export that is pushed; None for one on the disk.
      latents: whether the export holds the autoencoder of the latents that the network makes.
    """
    address, file, rest = "DIR", "", ""
    if publication:
        address, file = publication.address, "/model.safetensors"
        rest = f" --autoencoder={address}/autoencoder{file}" * latents
    return _SAFETENSORS.format(naming=naming, address=address, file=file, rest=rest)


def stablehlo_usage(usage: str, publication: Publication | None) -> str:
    """How to use a StableHLO function: `dmf.sampling.stablehlo.usage`, and on the hub how to
    download it."""
    return usage + _DOWNLOAD.format(repository=publication.repository) if publication else usage


def model_card(
    config: Mapping[str, Any], params: Params, *, origin: str, usage: str,
    publication: Publication | None = None,
) -> str:
    """The model card of a network, in Markdown.

    Args:
      config: the config as JSON holds it.
      params: parameters of the network.
      origin: one line that says where the parameters come from.
      usage: how to use the files of the export.
      publication: of an export that is pushed, whose card has a header; None for one on the disk.
    """
    rows = _network_rows(config) if "model" in config else _frozen_rows(config)
    title = rows.pop("title")
    rows |= {"parameters": f"{sum(w.size for w in jax.tree.leaves(params)):,}", "origin": origin}
    rows = {name: str(value).replace("|", "\\|") for name, value in rows.items()}
    lines = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
    header = hub_card.header(config, publication) if publication else ""
    return _CARD.format(header=header, title=title, rows=lines, usage=usage)


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
