"""The golden values of improved MeanFlow (`imf_tiny`) and pixel MeanFlow (`pmf_tiny`): the network
of a file, and its parameters by a table of their own, apart from that of `dmf convert`."""

import functools
import re

import golden_values as gv
import jax.numpy as jnp
import numpy as np

from dmf.models.in_context_dit import InContextDiT
from dmf.types import ClassLabels, GuidanceInput, GuidedCondition, Params

NAMES = ("imf_tiny", "pmf_tiny")
_TOKENS = {"class": "label", "omega": "scale", "t_min": "low", "t_max": "high", "time": "interval"}
_EMBEDDERS = {"h": "interval_embedding", "omega": "guidance_embedding/scale",
              "cfg_t_start": "guidance_embedding/low", "cfg_t_end": "guidance_embedding/high"}
# Published names, without "net/" and "_flax_linear/", and ours.
_RENAMED = (
    *((rf"{theirs}_tokens$", f"prefix/{ours}") for theirs, ours in _TOKENS.items()),
    *((rf"{theirs}_embedder/mlp/layers_0", f"{ours}/in") for theirs, ours in _EMBEDDERS.items()),
    *((rf"{theirs}_embedder/mlp/layers_2", f"{ours}/out") for theirs, ours in _EMBEDDERS.items()),
    (r"y_embedder/.*", "label_embedding/embedding"),
    (r"x_embedder/proj1", "patch_reduction"), (r"x_embedder/proj2?", "patch_embedding"),
    (r"pos_embed", "position_embedding"),
    (r"(u|v)_final_layer/norm/kernel", r"\1_head/norm/scale"),
    (r"(u|v)_final_layer", r"\1_head"),
    (r"shared_blocks_(\d+)", r"blocks/\1"), (r"(u|v)_heads_(\d+)", r"\1_head/blocks/\2"),
    (r"attn/(q|k)_norm/kernel", r"attention/\1_norm/scale"),
    (r"attn/(q|k|v|out)_proj", r"attention/\1"), (r"attn_scale", "attention_gate"),
    (r"mlp/w1", "mlp/gate"), (r"mlp/w3", "mlp/in"), (r"mlp/w2", "mlp/out"),
    (r"mlp_scale", "mlp_gate"), (r"norm1/kernel", "attention_norm/scale"),
    (r"norm2/kernel", "mlp_norm/scale"),
)  # fmt: skip


@functools.cache
def network(name: str, **changes) -> InContextDiT:
    golden = gv.load(name).config
    pixels = {"patch_bottleneck": 128, "positions": "rotary_2d", "prediction": "data"}
    return InContextDiT(**{
        "input_size": golden["input_size"], "channels": golden["in_channels"],
        "patch_size": golden["patch_size"], "depth": golden["depth"],
        "head_depth": golden["aux_head_depth"], "width": golden["hidden_size"],
        "heads": golden["num_heads"], "num_classes": golden["num_classes"],
    } | (pixels if name == "pmf_tiny" else {}) | changes)  # fmt: skip


@functools.cache
def params(name: str) -> Params:
    return gv.on_device(from_published(network(name), gv.load(name).below("params/net")))


def from_published(model: InContextDiT, tensors: dict[str, np.ndarray]) -> Params:
    """Parameters, or gradients by them, by our names: a nested dictionary of arrays."""
    flat = {_renamed(name): np.asarray(tensor) for name, tensor in tensors.items()}
    stacks: dict[str, dict[int, np.ndarray]] = {}
    for name in [name for name in flat if "blocks/" in name]:
        stack, index, rest = re.fullmatch(r"(.*blocks)/(\d+)/(.*)", name).groups()
        stacks.setdefault(f"{stack}/{rest}", {})[int(index)] = flat.pop(name)
    flat |= {name: np.stack([s[i] for i in range(len(s))]) for name, s in stacks.items()}
    for name in [name for name in flat if name.endswith("attention/q/kernel")]:
        path = name.removesuffix("q/kernel")
        qkv = np.stack([flat.pop(f"{path}{x}/kernel") for x in "qkv"], axis=2)
        flat[f"{path}qkv/kernel"] = qkv.reshape(*qkv.shape[:3], model.heads, -1)
        out = flat[f"{path}out/kernel"]
        flat[f"{path}out/kernel"] = out.reshape(len(out), model.heads, -1, model.width)
    return _nested({name: _as_matrix(name, tensor) for name, tensor in flat.items()})


def inputs(name: str) -> tuple:
    """x_t, t, r and the condition y of the file."""
    golden, model = gv.load(name), network(name)
    guidance = GuidanceInput(*(golden.vector(part) for part in ("omega", "t_min", "t_max")))
    y = GuidedCondition(ClassLabels(golden.labels("y"), model.num_classes), guidance)
    return jnp.asarray(golden["x"]), golden.vector("t"), golden.vector("r"), y


def _renamed(name: str) -> str:
    name = name.replace("_flax_linear/", "")
    for pattern, replacement in _RENAMED:
        name = re.sub(rf"(?:^|(?<=/)){pattern}", replacement, name)
    return name


def _as_matrix(name: str, tensor: np.ndarray) -> np.ndarray:
    """Convolutions as matrices, and tokens and tables without an axis of length 1."""
    if name.startswith("patch_") and tensor.ndim == 4:
        return tensor.reshape(-1, tensor.shape[-1])
    first_of_one = name.startswith(("prefix/", "label_embedding/", "position_embedding"))
    return tensor[0] if first_of_one and tensor.ndim == 3 else tensor


def _nested(flat: dict[str, np.ndarray]) -> Params:
    tree: dict = {}
    for name, tensor in flat.items():
        *folders, leaf = name.split("/")
        functools.reduce(lambda node, key: node.setdefault(key, {}), folders, tree)[leaf] = tensor
    return tree
