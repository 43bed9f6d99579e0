"""The autoencoder of latent diffusion by the names of its publishers: what tensors it has, and what
PyTorch computes from them. It is written for the tests of these names; computing needs torch.
"""

from collections.abc import Sequence
from typing import Any

import golden_values as gv
import numpy as np

SEED = 5


def shapes(
    widths: Sequence[int], layers: int, channels: int, *, encoder: Sequence[int] = (),
    decoder: Sequence[int] = (), quant: bool = True,
) -> dict[str, tuple[int, ...]]:
    """The shapes of all tensors by name; `encoder` and `decoder` are levels with attention."""
    top = widths[-1]
    found = {"encoder.conv_in": (widths[0], 3, 3, 3), "encoder.norm_out": (top,),
             "encoder.conv_out": (2 * channels, top, 3, 3),
             "decoder.conv_in": (top, channels, 3, 3), "decoder.norm_out": (widths[0],),
             "decoder.conv_out": (3, widths[0], 3, 3)}  # fmt: skip
    if quant:
        found |= {"quant_conv": (2 * channels, 2 * channels, 1, 1),
                  "post_quant_conv": (channels, channels, 1, 1)}
    for part in ("encoder", "decoder"):
        found |= _resnet(f"{part}.mid.block_1", top, top) | _resnet(f"{part}.mid.block_2", top, top)
        found |= _attention(f"{part}.mid.attn_1", top)
    for i, width in enumerate(widths):
        finer, coarser = widths[max(i - 1, 0)], widths[min(i + 1, len(widths) - 1)]
        for j in range(layers):
            found |= _resnet(f"encoder.down.{i}.block.{j}", width if j else finer, width)
            found |= _attention(f"encoder.down.{i}.attn.{j}", width) if i in encoder else {}
        for j in range(layers + 1):
            found |= _resnet(f"decoder.up.{i}.block.{j}", width if j else coarser, width)
            found |= _attention(f"decoder.up.{i}.attn.{j}", width) if i in decoder else {}
        if i + 1 < len(widths):
            found[f"encoder.down.{i}.downsample.conv"] = width, width, 3, 3
        if i:
            found[f"decoder.up.{i}.upsample.conv"] = width, width, 3, 3
    weights = {f"{name}.weight": shape for name, shape in found.items()}
    return weights | {f"{name}.bias": shape[:1] for name, shape in found.items()}


def _resnet(name: str, inputs: int, width: int) -> dict[str, tuple[int, ...]]:
    skip = {f"{name}.nin_shortcut": (width, inputs, 1, 1)} if inputs != width else {}
    return skip | {f"{name}.norm1": (inputs,), f"{name}.conv1": (width, inputs, 3, 3),
                   f"{name}.norm2": (width,), f"{name}.conv2": (width, width, 3, 3)}


def _attention(name: str, width: int) -> dict[str, tuple[int, ...]]:
    layers = {f"{name}.{layer}": (width, width, 1, 1) for layer in ("q", "k", "v", "proj_out")}
    return layers | {f"{name}.norm": (width,)}


def drawn(shapes: dict[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """Weights that are functions of their names."""
    return {name: gv.drawn_weights(name, shape, seed=SEED) for name, shape in shapes.items()}


class Computed:
    """What PyTorch computes from the tensors of an autoencoder, [b, c, h, w]."""

    def __init__(self, tensors: dict[str, np.ndarray], groups: int):
        import torch

        self.w = {name: torch.from_numpy(tensor) for name, tensor in tensors.items()}
        self.groups = groups

    def moments(self, images: Any) -> Any:
        """The mean and the standard deviation of the latents of images."""
        import torch
        from torch.nn import functional

        x, level = self.conv("encoder.conv_in", images), 0
        while f"encoder.down.{level}.block.0.conv1.weight" in self.w:
            x = self.blocks(f"encoder.down.{level}", x)
            if f"encoder.down.{level}.downsample.conv.weight" in self.w:
                x = functional.pad(x, (0, 1, 0, 1))
                x = self.conv(f"encoder.down.{level}.downsample.conv", x, stride=2, padding=0)
            level += 1
        x = self.end("encoder", self.middle("encoder", x))
        x = self.conv("quant_conv", x) if "quant_conv.weight" in self.w else x
        mean, log_variance = torch.chunk(x, 2, dim=1)
        return mean, torch.exp(log_variance.clamp(-30, 20) / 2)

    def images(self, latents: Any) -> Any:
        """The images of latents."""
        from torch.nn import functional

        quantised = "post_quant_conv.weight" in self.w
        x = self.conv("post_quant_conv", latents) if quantised else latents
        x = self.middle("decoder", self.conv("decoder.conv_in", x))
        levels = {int(name.split(".")[2]) for name in self.w if name.startswith("decoder.up.")}
        for level in sorted(levels, reverse=True):
            x = self.blocks(f"decoder.up.{level}", x)
            if level:
                x = functional.interpolate(x, scale_factor=2.0, mode="nearest")
                x = self.conv(f"decoder.up.{level}.upsample.conv", x)
        return self.end("decoder", x)

    def middle(self, part: str, x: Any) -> Any:
        x = self.attention(f"{part}.mid.attn_1", self.resnet(f"{part}.mid.block_1", x))
        return self.resnet(f"{part}.mid.block_2", x)

    def end(self, part: str, x: Any) -> Any:
        from torch.nn import functional

        return self.conv(f"{part}.conv_out", functional.silu(self.norm(f"{part}.norm_out", x)))

    def blocks(self, name: str, x: Any) -> Any:
        j = 0
        while f"{name}.block.{j}.conv1.weight" in self.w:
            x = self.resnet(f"{name}.block.{j}", x)
            if f"{name}.attn.{j}.q.weight" in self.w:
                x = self.attention(f"{name}.attn.{j}", x)
            j += 1
        return x

    def resnet(self, name: str, x: Any) -> Any:
        from torch.nn import functional

        y = self.conv(f"{name}.conv1", functional.silu(self.norm(f"{name}.norm1", x)))
        y = self.conv(f"{name}.conv2", functional.silu(self.norm(f"{name}.norm2", y)))
        has_skip = f"{name}.nin_shortcut.weight" in self.w
        return y + (self.conv(f"{name}.nin_shortcut", x) if has_skip else x)

    def attention(self, name: str, x: Any) -> Any:
        import torch

        y = self.norm(f"{name}.norm", x)
        q, k, v = (self.conv(f"{name}.{layer}", y).flatten(2) for layer in "qkv")
        logits = torch.einsum("bcq,bck->bqk", q, k) * q.shape[1] ** -0.5
        mixed = torch.einsum("bqk,bck->bcq", logits.softmax(-1), v).reshape(x.shape)
        return x + self.conv(f"{name}.proj_out", mixed)

    def norm(self, name: str, x: Any) -> Any:
        from torch.nn import functional

        scale, bias = self.w[f"{name}.weight"], self.w[f"{name}.bias"]
        return functional.group_norm(x, self.groups, scale, bias, eps=1e-6)

    def conv(self, name: str, x: Any, **options: Any) -> Any:
        from torch.nn import functional

        weight = self.w[f"{name}.weight"]
        options = {"padding": weight.shape[-1] // 2} | options
        return functional.conv2d(x, weight, self.w[f"{name}.bias"], **options)
