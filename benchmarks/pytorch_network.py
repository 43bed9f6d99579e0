"""The training step of Decoupled MeanFlow in PyTorch, as a person would write it there: eleven
forward passes, every formula as it stands.

It is written for the comparison in `benchmarks/pytorch_step.py`, and has what that step needs: the
transformer with decoupled conditioning, the two losses, AdamW and the EMA. Attention is
`scaled_dot_product_attention`, but for the pass with a tangent, for which PyTorch has no kernel.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dmf.models.dit import DiT
from dmf.models.layers import position_table


class Term(NamedTuple):
    """The draws of one loss: noise [b, h, w, c]; times t and r [b]; dropped labels [b] bool."""

    noise: Tensor
    t: Tensor
    r: Tensor
    dropped: Tensor


class Linear(nn.Linear):
    """A linear layer from a kernel and a bias of ours, whose outputs may have several axes."""

    def __init__(self, params: dict, inputs: int):
        kernel = np.asarray(params["kernel"]).reshape(inputs, -1)
        super().__init__(*kernel.shape)
        self.weight.data = torch.from_numpy(kernel.T.copy())
        self.bias.data = torch.from_numpy(np.asarray(params["bias"]).reshape(-1).copy())


def sinusoidal_features(t: Tensor, count: int) -> Tensor:
    """[cos(w t), sin(w t)], [b, count]."""
    half = count // 2
    angles = t[:, None] * 10000.0 ** (-torch.arange(half) / half)
    return torch.cat([angles.cos(), angles.sin()], -1)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """LayerNorm of x, times 1 + scale, plus shift."""
    return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale[:, None]) + shift[:, None]


class Block(nn.Module):
    """A transformer block with adaLN-Zero conditioning."""

    def __init__(self, params: dict, width: int, heads: int, hidden: int):
        super().__init__()
        self.heads = heads
        self.modulation = Linear(params["modulation"]["linear"], width)
        self.qkv = Linear(params["attention"]["qkv"], width)
        self.out = Linear(params["attention"]["out"], width)
        self.mlp_in = Linear(params["mlp"]["in"], width)
        self.mlp_out = Linear(params["mlp"]["out"], hidden)

    def forward(self, x: Tensor, c: Tensor, with_tangent: bool) -> Tensor:
        """Tokens [b, l, d] after the block."""
        shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = self.modulation(F.silu(c)).chunk(6, -1)
        x = x + gate_1[:, None] * self._attend(modulate(x, shift_1, scale_1), with_tangent)
        hidden = F.gelu(self.mlp_in(modulate(x, shift_2, scale_2)), approximate="tanh")
        return x + gate_2[:, None] * self.mlp_out(hidden)

    def _attend(self, x: Tensor, with_tangent: bool) -> Tensor:
        b, length, width = x.shape
        qkv = self.qkv(x).view(b, length, 3, self.heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        if with_tangent:
            logits = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
            o = logits.softmax(-1) @ v
        else:
            o = F.scaled_dot_product_attention(q, k, v)
        return self.out(o.transpose(1, 2).reshape(b, length, width))


class Network(nn.Module):
    """The flow map u(x_t, t, r, y), with the parameters of ours."""

    def __init__(self, model: DiT, params: dict):
        super().__init__()
        self.model, width = model, model.width
        stacked = params["blocks"]
        self.blocks = nn.ModuleList(
            Block(_at(stacked, i), width, model.heads, int(width * model.mlp_ratio))
            for i in range(model.depth)
        )
        self.patch_embedding = Linear(params["patch_embedding"],
                                      model.patch_size**2 * model.channels)
        self.time_in = Linear(params["time_embedding"]["in"], 256)
        self.time_out = Linear(params["time_embedding"]["out"], width)
        labels = np.asarray(params["label_embedding"]["embedding"])
        self.labels = nn.Embedding.from_pretrained(torch.from_numpy(labels.copy()), freeze=False)
        self.final_modulation = Linear(params["final"]["modulation"]["linear"], width)
        self.final = Linear(params["final"]["linear"], width)
        self.log_variance = Linear(params["log_variance"]["linear"], 256)
        table = position_table(model.input_size // model.patch_size, width)
        self.register_buffer("positions", torch.from_numpy(table))

    def forward(
        self, x: Tensor, t: Tensor, r: Tensor, y: Tensor, with_tangent: bool = False
    ) -> Tensor:
        """The average velocity [b, h, w, c]."""
        tokens = self.patch_embedding(self._patches(x)) + self.positions
        conditions = {"t": self._condition(t, y), "r": self._condition(r, y)}
        for block, time in zip(self.blocks, self.model.resolved_block_times, strict=True):
            tokens = block(tokens, conditions[time], with_tangent)
        shift, scale = self.final_modulation(F.silu(conditions["r"])).chunk(2, -1)
        return self._images(self.final(modulate(tokens, shift, scale)))

    def phi(self, t: Tensor, r: Tensor) -> Tensor:
        """The log-variance [b]."""
        features = [sinusoidal_features(time, 128) for time in (t, r)]
        return self.log_variance(torch.cat(features, -1))[:, 0]

    def _condition(self, t: Tensor, y: Tensor) -> Tensor:
        embedded = self.time_out(F.silu(self.time_in(sinusoidal_features(t, 256))))
        return embedded + self.labels(y)

    def _patches(self, x: Tensor) -> Tensor:
        b, patch, side = len(x), self.model.patch_size, self.model.input_size
        x = x.view(b, side // patch, patch, side // patch, patch, -1)
        return x.permute(0, 1, 3, 2, 4, 5).reshape(b, (side // patch) ** 2, -1)

    def _images(self, patches: Tensor) -> Tensor:
        b, patch, side = len(patches), self.model.patch_size, self.model.input_size
        x = patches.view(b, side // patch, side // patch, patch, patch, -1)
        return x.permute(0, 1, 3, 2, 4, 5).reshape(b, side, side, -1)


def _at(stacked: dict, i: int) -> dict:
    """The parameters of block i."""
    return {name: _at(leaf, i) if isinstance(leaf, dict) else leaf[i]
            for name, leaf in stacked.items()}  # fmt: skip


class Step:
    """A training step: the gradient of both losses, clipping, AdamW, EMA.

    Attributes:
      network: is updated by each call.
    """

    def __init__(
        self, network: Network, optimizer: dict, guidance: dict, decay: float, compiled: bool
    ):
        """optimizer: learning rate, b1, b2, eps, weight decay, clip norm; guidance: kappa and
        interval; decay: of the EMA; compiled: whether by `torch.compile`."""
        self.network, self.guidance, self.decay = network, guidance, decay
        self.ema = [p.detach().clone() for p in network.parameters()]
        self.clip_norm = optimizer["clip_norm"]
        self.optimizer = torch.optim.AdamW(
            network.parameters(), lr=optimizer["learning_rate"], eps=optimizer["eps"],
            betas=(optimizer["b1"], optimizer["b2"]), weight_decay=optimizer["weight_decay"],
            fused=True,
        )  # fmt: skip
        self.losses = [torch.compile(loss) if compiled else loss
                       for loss in (self._flow_matching, self._mean_flow)]

    def __call__(self, x: Tensor, y: Tensor, terms: list[Term]) -> float:
        """One update; the mean loss before it."""
        total = 0.0
        for loss_of, term in zip(self.losses, terms, strict=True):
            loss = loss_of(x, torch.where(term.dropped, self.network.model.num_classes, y), term)
            (loss / 2).backward()
            total += loss.item() / 2
        parameters = list(self.network.parameters())
        nn.utils.clip_grad_norm_(parameters, self.clip_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        torch._foreach_lerp_(self.ema, [p.detach() for p in parameters], 1 - self.decay)
        return total

    def _guided(self, x_t: Tensor, v_t: Tensor, y: Tensor, term: Term) -> Tensor:
        """v_t + kappa (conditional - unconditional velocity), without gradient."""
        low, high = self.guidance["interval"]
        active = (term.t >= low) & (term.t <= high) & ~term.dropped
        kappa = torch.where(active, self.guidance["kappa"], 0.0)[:, None, None, None]
        null = torch.full_like(y, self.network.model.num_classes)
        with torch.no_grad():
            conditional, unconditional = (
                self.network(x_t, term.t, term.t, label) for label in (y, null)
            )
        return v_t + kappa * (conditional - unconditional)

    def _flow_matching(self, x: Tensor, y: Tensor, term: Term) -> Tensor:
        x_t, v_t = _path(x, term)
        target = self._guided(x_t, v_t, y, term)
        u = self.network(x_t, term.t, term.t, y)
        return self._weighted(u - target, term.t, term.t)

    def _mean_flow(self, x: Tensor, y: Tensor, term: Term) -> Tensor:
        x_t, v_t = _path(x, term)
        v_g = self._guided(x_t, v_t, y, term)
        u, du_dt = torch.func.jvp(
            lambda x_t, t, r: self.network(x_t, t, r, y, with_tangent=True),
            (x_t, term.t, term.r),
            (v_g, torch.ones_like(term.t), torch.zeros_like(term.r)),
        )
        target = v_g - (term.t - term.r)[:, None, None, None] * du_dt.detach()
        return self._weighted(u - target, term.t, term.r)

    def _weighted(self, error: Tensor, t: Tensor, r: Tensor) -> Tensor:
        """The mean Cauchy loss with the learned variance."""
        phi = self.network.phi(t, r)
        return (torch.log1p(error.square().mean((1, 2, 3)) * (-phi).exp()) + phi / 2).mean()


def _path(x: Tensor, term: Term) -> tuple[Tensor, Tensor]:
    """x_t and v_t on the linear path."""
    t = term.t[:, None, None, None]
    return (1 - t) * x + t * term.noise, term.noise - x

