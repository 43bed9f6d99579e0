"""Flash attention as networks call it, on any device and any mesh, and when to take it."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

from dmf.kernels import libraries, tangent
from dmf.kernels.formula import Keys, Queries
from dmf.kernels.modes import Attention, differentiable
from dmf.kernels.placement import (
    by_device,
    has_cudnn_attention,
    head_divisor,
    known,
    platform,
)
from dmf.typing import InputError

IMPLEMENTATIONS = ("auto", "xla", "flash")
# From how many keys on flash attention is taken by itself. The formula writes and reads float32
# logits and their softmax, some 10 bytes for each pair of places; a kernel q, k, v and o alone, 8
# bytes a place and channel. With heads 72 wide (128 in memory) that is, at 256 places, 2.5 times
# less, and at 128 no gain worth the kernel's start.
FLASH_FROM = 256


class Kernels(NamedTuple):
    """A library's attention and ours with the tangent, of [b, l, n, d] or, heads first and q
    scaled, of [b, n, l, d]."""

    attend: Attention
    attend_with_tangent: Callable[..., Any]
    heads_first: bool = False


KERNELS = {
    "tpu": Kernels(libraries.on_tpu, tangent.heads_first, heads_first=True),
    "gpu": Kernels(libraries.on_gpu, partial(tangent.attention_with_tangent, platform="gpu")),
    # For tests: much slower than the formula.
    "cpu": Kernels(
        libraries.on_cpu,
        partial(tangent.attention_with_tangent, platform="tpu", interpret=True),
    ),
}


def with_heads_first(attend: Attention) -> Attention:
    """Attention of [b, l, n, d] by a function of [b, n, l, d] that does not scale."""

    def attention(q: Queries, k: Keys, v: Keys) -> Queries:
        swapped = (x.swapaxes(1, 2) for x in (q * q.shape[-1] ** -0.5, k, v))
        return attend(*swapped).swapaxes(1, 2)

    return attention


def flash_attention(q: Queries, k: Keys, v: Keys) -> Queries:
    """softmax(q k^T / sqrt(d)) v for n heads of any width d, without l x s numbers in memory.

    A library's kernel (see `dmf.kernels.libraries`), and one of ours where a tangent is asked for;
    what can be differentiated, and how often, `dmf.kernels.modes.differentiable` says. For which
    device and over which mesh, `dmf.kernels.placement`.

    Args:
      q, k, v: bfloat16 or float32; on GPUs bfloat16 alone.

    Raises:
      InputError: there is no kernel for these arrays, this platform or this mesh.
    """
    if platform() not in KERNELS:
        raise InputError(f"model.attention=flash: there is no kernel for {platform()}; choose "
                         "auto or xla")
    batch, _, heads, _ = q.shape
    *parts, first = KERNELS[platform()]
    attend = differentiable(*(by_device(x, batch, heads, 1 if first else 2) for x in parts))
    return (with_heads_first(attend) if first else attend)(q, k, v)


def choose(name: str, q: Queries, k: Keys) -> str:
    """Which implementation "auto" is for these arrays: "xla" or "flash"; another name is itself.

    It is "flash" on TPUs, and on NVIDIA's GPUs where cuDNN takes the arrays, from FLASH_FROM keys
    on, where the mesh in context divides the heads; "xla", the formula, otherwise, and always
    where there are several devices and no mesh in context to split a kernel by.
    """
    if name != "auto":
        return name
    fast = {"tpu": True, "gpu": has_cudnn_attention() and libraries.cudnn_takes(q)}
    fits = k.shape[1] >= FLASH_FROM and q.shape[2] % head_divisor() == 0
    return "flash" if fast.get(platform(), False) and fits and known() else "xla"
