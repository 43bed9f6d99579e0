"""The Flax module of the in-context transformer; `dmf.models.in_context_dit.InContextDiT` is its
config."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from dmf.models import layers
from dmf.models.block_stack import run_blocks
from dmf.models.linear import Linear, Tokens, Vectors, scale_tokens, spread
from dmf.models.parameters import parameter, stacked_parameters
from dmf.models.rotary import Rotation, grid_rotation, sequence_rotation
from dmf.models.transformer import labels_and_guidance
from dmf.types import Images, Params, PRNGKey, Size, Times

# The tokens in front of the patches, in this order: how many tokens each input of the network has.
PREFIX = {"label": 8, "scale": 4, "low": 2, "high": 2, "interval": 4}
PREFIX_TOKENS = sum(PREFIX.values())
# Gaussians with these standard deviations times 1 / sqrt(fan in).
embedding_init = nn.initializers.variance_scaling(1.0, "fan_in", "normal")
block_init = nn.initializers.variance_scaling(0.32**2, "fan_in", "normal")


def mlp_width(width: int) -> int:
    """Hidden width of the MLPs: 8/3 of the width, rounded down; above 1024, as published, that
    rounded up to a multiple of 8.

    >>> [mlp_width(width) for width in (768, 1024, 1280)]
    [2048, 2730, 3416]
    """
    hidden = 8 * width // 3
    return hidden if width <= 1024 else -(-hidden // 8) * 8


def rms_norm(dtype: jnp.dtype, name: str | None = None) -> nn.RMSNorm:
    """RMSNorm with a learned scale."""
    return nn.RMSNorm(epsilon=1e-6, dtype=dtype, name=name)


class SwiGLU(nn.Module):
    """The MLP W_out (SiLU(W_gate x) * W_in x), without biases."""

    dtype: jnp.dtype
    gradient_dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Tokens) -> Tokens:
        width, hidden = x.shape[-1], (mlp_width(x.shape[-1]),)
        linear = functools.partial(
            Linear, kernel_init=block_init, dtype=self.dtype, use_bias=False,
            gradient_dtype=self.gradient_dtype,
        )  # fmt: skip
        gated = nn.silu(linear(hidden, name="gate")(x)) * linear(hidden, name="in")(x)
        return linear((width,), name="out")(gated)


class InContextBlock(nn.Module):
    """A transformer block without conditioning: each step is scaled by one learned vector, which is
    zero at initialisation."""

    heads: int
    dtype: jnp.dtype
    attention: str
    gradient_dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Tokens, rotation: Rotation) -> Tokens:
        attend = layers.SelfAttention(
            self.heads, True, self.dtype, self.attention, self.gradient_dtype, block_init,
            use_bias=False, name="attention",
        )  # fmt: skip
        step = attend(rms_norm(self.dtype, "attention_norm")(x), rotation)
        x = x + self._gated("attention_gate", step)
        mlp = SwiGLU(self.dtype, self.gradient_dtype, name="mlp")
        return x + self._gated("mlp_gate", mlp(rms_norm(self.dtype, "mlp_norm")(x)))

    def _gated(self, name: str, step: Tokens) -> Tokens:
        batch, _, width = step.shape
        gate = parameter(self, name, nn.initializers.zeros, (width,))
        return scale_tokens(step, jnp.broadcast_to(gate, (batch, width)), self.dtype)


class BlockStack:
    """The blocks of a trunk or of a head, as functions of their parameters.

    Attributes:
      config: the `InContextDiT`.
      depth: number of blocks.
    """

    def __init__(self, config: Any, depth: int):
        self.config, self.depth = config, depth
        self.block = InContextBlock(
            config.heads, jnp.dtype(config.dtype), config.attention,
            jnp.dtype(config.gradient_dtype), parent=None,
        )  # fmt: skip

    def init(self, key: PRNGKey) -> Params:
        """Parameters of the blocks, each leaf stacked on a leading depth axis."""
        width, heads = self.config.width, self.config.heads
        inputs = jnp.zeros((1, 1, width)), Rotation(*jnp.zeros((2, 1, width // heads)))
        return jax.vmap(lambda key: self.block.init(key, *inputs)["params"])(
            jax.random.split(key, self.depth)
        )

    def params_of(self, module: nn.Module) -> Params:
        """The parameters "blocks" of a module."""
        return stacked_parameters(module, "blocks", self.init, self.depth)

    def cast(self, params: Params) -> Params:
        """The parameters, with the kernels of matmuls in the dtype that their gradients are
        collected in."""
        if self.config.gradient_dtype == "float32":
            return params
        return jax.tree_util.tree_map_with_path(
            lambda path, leaf: leaf.astype(self.config.dtype) if path[-1].key == "kernel" else leaf,
            params,
        )

    def run(
        self, params: Params, tokens: Tokens, start: int = 0, stop: int | None = None
    ) -> Tokens:
        """The tokens after the blocks start, ..., stop - 1; by default all."""
        config = self.config
        return run_blocks(
            lambda params, *inputs: self.block.apply({"params": params}, *inputs),
            self.cast(params), tokens, {"t": rotation(config)}, "t" * self.depth, start,
            self.depth if stop is None else stop, scan=config.scan, remat=config.remat,
        )  # fmt: skip


def rotation(config: Any) -> Rotation:
    """The rotary positions of all tokens."""
    side, width = config.input_size // config.patch_size, config.width // config.heads
    if config.positions == "rotary_2d":
        return grid_rotation(PREFIX_TOKENS, side, width)
    return sequence_rotation(PREFIX_TOKENS + side**2, width)


class GuidanceEmbeddings(nn.Module):
    """The embeddings of 1 - 1 / scale and of the two ends of the interval, by the names of their
    tokens."""

    width: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(
        self, scale: Float[Array, "b"], start: Float[Array, "b"], end: Float[Array, "b"]
    ) -> dict[str, Vectors]:
        inputs = {"scale": 1 - 1 / scale, "low": start, "high": end}
        return {
            name: layers.TimeEmbedding(
                self.width, self.dtype, kernel_init=embedding_init, name=name
            )(value)
            for name, value in inputs.items()
        }


class Head(nn.Module):
    """Blocks, RMSNorm and Linear from each patch token to the values of its patch; the Linear is
    zero at initialisation."""

    config: Any

    def setup(self):
        config, dtype = self.config, jnp.dtype(self.config.dtype)
        self.stack = BlockStack(config, config.head_depth)
        self.blocks = self.stack.params_of(self)
        self.norm = rms_norm(dtype)
        self.linear = Linear(
            (config.patch_size**2 * config.channels,), layers.zeros, dtype,
            output_dtype=jnp.dtype("float32"),
        )  # fmt: skip

    def __call__(self, tokens: Tokens) -> Images:
        """The prediction [b, h, w, c], float32, from the tokens of the trunk."""
        tokens = self.stack.run(self.blocks, tokens)[:, PREFIX_TOKENS:]
        return layers.unpatchify(self.linear(self.norm(tokens)), self.config.patch_size)


class InContextTransformer(nn.Module):
    """Prefix tokens and patches, the blocks of the trunk, one or two heads.

    Attributes:
      config: the `InContextDiT` whose fields say how large the network is and how it is
        conditioned.
    """

    config: Any

    def setup(self):
        config, dtype = self.config, jnp.dtype(self.config.dtype)
        if config.patch_bottleneck:
            self.patch_reduction = Linear((config.patch_bottleneck,), layers.xavier, dtype)
        self.patch_embedding = Linear((config.width,), layers.xavier, dtype)
        token_init = nn.initializers.normal(config.width**-0.5)
        # In float32, so that the gradients of samples with equal labels are summed in float32.
        self.label_embedding = nn.Embed(
            config.num_classes + 1, config.width, embedding_init=token_init
        )
        self.interval_embedding = layers.TimeEmbedding(
            config.width, dtype, kernel_init=embedding_init
        )
        self.guidance_embedding = GuidanceEmbeddings(config.width, dtype)
        self.prefix = self.param("prefix", functools.partial(self._init_prefix, token_init))
        if config.positions == "rotary_2d":
            self.position_embedding = parameter(
                self, "position_embedding", layers.small_normal, (config.tokens, config.width)
            )
        self.stack = BlockStack(config, config.trunk_depth)
        self.blocks = self.stack.params_of(self)
        self.u_head = Head(config)
        if config.velocity_head:
            self.v_head = Head(config)

    def __call__(self, x_t: Images, t: Times, r: Times, y: Any) -> dict[str, Images]:
        """The predictions of all heads."""
        return self.decode(self.encode(x_t, y), t - r, *self.config.head_names)

    def encode(self, x_t: Images, y: Any) -> Tokens:
        """The tokens [b, l, d] before the first block that depends on h = t - r.

        Until then the tokens of h hold the embedding of 0 with the decoupled conditioning, and no
        embedding with that of MeanFlow.
        """
        tokens = self._embed(x_t, y)
        if self.config.conditioning == "meanflow":
            return tokens
        tokens = self._add_to_interval(tokens, self.interval_embedding(jnp.zeros(1)))
        return self.stack.run(self.blocks, tokens, 0, self.config.encoder_depth)

    def decode(self, tokens: Tokens, h: Times, *heads: str) -> dict[str, Images]:
        """The predictions [b, h, w, c], float32, of the heads that are named."""
        config, embedded = self.config, self.interval_embedding(h).astype(jnp.float32)
        if config.conditioning == "decoupled":
            embedded = embedded - self.interval_embedding(jnp.zeros(1)).astype(jnp.float32)
        tokens = self._add_to_interval(tokens, embedded)
        tokens = self.stack.run(self.blocks, tokens, config.encoder_depth)
        return {name: getattr(self, name)(tokens) for name in heads}

    def _init_prefix(self, token_init: Callable[..., jax.Array], key: PRNGKey) -> Params:
        """The learned tokens [count, d] of each input."""
        keys = zip(PREFIX.items(), jax.random.split(key, len(PREFIX)), strict=True)
        return {name: token_init(key, (count, self.config.width)) for (name, count), key in keys}

    def _embed(self, x_t: Images, y: Any) -> Tokens:
        """The prefix and the embedded patches [b, l, d], with the learned positions."""
        config, dtype = self.config, jnp.dtype(self.config.dtype)
        labels, guidance = labels_and_guidance(config, y)
        vectors = {"label": self.label_embedding(labels), **self.guidance_embedding(*guidance)}
        tokens = [self._prefix_tokens(name, vectors.get(name), x_t.shape[0])
                  for name in PREFIX]
        patches = layers.patchify(x_t, config.patch_size)
        if config.patch_bottleneck:
            patches = self.patch_reduction(patches)
        tokens = jnp.concatenate([*tokens, self.patch_embedding(patches)], axis=1)
        if config.positions == "rotary_2d":
            tokens = tokens + spread(self.position_embedding, tokens.shape, dtype)
        return tokens

    def _prefix_tokens(self, name: str, vectors: Vectors | None, batch: Size) -> Tokens:
        """The learned tokens of one input, plus its embedding where there is one.

        Sum and broadcast are in float32, so that gradients are summed over samples in float32.
        """
        tokens = jnp.broadcast_to(self.prefix[name], (batch, *self.prefix[name].shape))
        if vectors is not None:
            tokens = tokens + vectors.astype(jnp.float32)[:, None, :]
        return tokens.astype(self.config.dtype)

    def _add_to_interval(self, tokens: Tokens, vectors: Float[Array, "_ d"]) -> Tokens:
        """The tokens, with vectors [b, d] or [1, d] added to those of h."""
        end = PREFIX_TOKENS
        before, interval, after = jnp.split(tokens, (end - PREFIX["interval"], end), axis=1)
        added = spread(vectors[:, None, :], interval.shape, tokens.dtype)
        return jnp.concatenate([before, interval + added, after], axis=1)
