"""The Flax module of the diffusion transformer; `dmf.models.dit.DiT` is its config."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from dmf.models import layers
from dmf.models.block_stack import run_blocks
from dmf.models.linear import Linear, Tokens, Vectors, spread
from dmf.models.parameters import stacked_parameters
from dmf.models.wide_head import wide_head_network
from dmf.types import (
    Features,
    GuidanceInput,
    GuidedCondition,
    Images,
    Network,
    Params,
    PerSample,
    PRNGKey,
    Times,
)

Patches = Float[Array, "b l p"]
# Of the wide head, beside the narrower ones of the trunk.
WideTokens = Float[Array, "b l e"]
# The module that embeds each time of a MeanFlow network.
TIME_EMBEDDINGS = {"t": "time_embedding", "r": "target_embedding", "t-r": "interval_embedding"}


def labels_and_guidance(network: Network, y: Any) -> tuple[jax.Array, GuidanceInput]:
    """The labels [b] and the guidance of a condition; one without guidance has scale 1 in the
    interval [0, 1]."""
    condition = network.condition(y)
    if isinstance(condition, GuidedCondition):
        return network.condition(condition.condition).labels, condition.guidance
    ones = jnp.ones(condition.labels.shape)
    return condition.labels, GuidanceInput(ones, jnp.zeros_like(ones), ones)


def dtype_of(config: Any, part: str) -> jnp.dtype:
    """The dtype that a part of the network is computed in."""
    return jnp.dtype("float32" if part in config.float32_parts else config.dtype)


def block_of(config: Any) -> layers.Block:
    """A block of the network, as a function of its parameters."""
    return layers.Block(
        config.heads, config.mlp_ratio, config.qk_norm, jnp.dtype(config.dtype),
        config.attention, dtype_of(config, "modulation"), jnp.dtype(config.gradient_dtype),
        parent=None,
    )  # fmt: skip


def init_blocks(config: Any, depth: int, key: PRNGKey) -> Params:
    """Parameters of a stack of blocks, each leaf stacked on a leading depth axis."""
    tokens, condition = jnp.zeros((1, 1, config.width)), jnp.zeros((1, config.width))
    return jax.vmap(lambda key: block_of(config).init(key, tokens, condition)["params"])(
        jax.random.split(key, depth)
    )


def blocks_of(module: nn.Module, config: Any, depth: int) -> Params:
    """The parameters "blocks" of a module: a stack of `depth` blocks."""
    init = functools.partial(init_blocks, config, depth)
    return stacked_parameters(module, "blocks", init, depth)


def cast_blocks(config: Any, blocks: Params) -> Params:
    """The parameters of a stack of blocks; for gradients in bfloat16 the kernels of matmuls are
    cast.

    They are cast before the stack is divided into blocks, so that the gradients of the blocks are
    collected in that dtype too: in half the memory of float32.
    """
    if config.gradient_dtype == "float32":
        return blocks

    def cast(path: Any, leaf: jax.Array) -> jax.Array:
        is_kernel = path[-1].key == "kernel"
        return leaf.astype(dtype_of(config, path[0].key)) if is_kernel else leaf

    return jax.tree_util.tree_map_with_path(cast, blocks)


def run_stack(
    config: Any,
    blocks: Params,
    tokens: Tokens,
    conditions: dict[str, layers.Condition],
    block_times: str,
    start: int,
    stop: int,
) -> Tokens:
    """Runs the blocks start, ..., stop - 1 of a stack."""
    block = block_of(config)
    return run_blocks(
        lambda params, *inputs: block.apply({"params": params}, *inputs),
        cast_blocks(config, blocks), tokens, conditions, block_times, start, stop,
        scan=config.scan, remat=config.remat,
    )  # fmt: skip


def final_layer(config: Any) -> layers.FinalLayer:
    """The layer from tokens to patches."""
    patch_values = config.patch_size**2 * config.channels
    return layers.FinalLayer(patch_values, dtype_of(config, "final_layer"))


def to_images(config: Any, patches: Patches) -> Images:
    """Images [b, h, w, c], float32, of the patches that a final layer gives."""
    return layers.unpatchify(patches, config.patch_size).astype(jnp.float32)


def embed(config: Any, patch_embedding: Callable[[Patches], Tokens], x_t: Images) -> Tokens:
    """Patches embedded as tokens [b, l, d], with their positions."""
    table = layers.position_table(config.input_size // config.patch_size, config.width)
    tokens = patch_embedding(layers.patchify(x_t, config.patch_size))
    tokens = tokens.astype(dtype_of(config, "residual"))
    return tokens + jnp.asarray(table, tokens.dtype)[None]


class VelocityHead(nn.Module):
    """Blocks and a final layer of its own, from the tokens of an inner block to the velocity v.

    Attributes:
      config: the `DiT`.
    """

    config: Any

    def setup(self):
        config = self.config
        self.blocks = blocks_of(self, config, config.head_depth)
        self.final = final_layer(config)

    def __call__(self, tokens: Tokens, conditions: dict[str, Vectors]) -> Images:
        """What the head predicts of v [b, h, w, c], float32."""
        config, depth = self.config, self.config.head_depth
        tokens = run_stack(config, self.blocks, tokens, conditions, "t" * depth, 0, depth)
        return to_images(config, self.final(tokens, conditions["t"]))


class WideHeadBlocks(nn.Module):
    """The blocks of a wide head, which are conditioned on the tokens of the trunk.

    The condition of a token is Linear(SiLU(s + c)), with s the token of the trunk and c the
    condition vector of the final layer (RAE, arXiv:2510.11690, whose c has no label).

    Attributes:
      config: the `wide_head_network` of the network.
    """

    config: Any

    def setup(self):
        width, dtype = self.config.width, jnp.dtype(self.config.dtype)
        self.patch_embedding = Linear((width,), layers.xavier, dtype)
        self.condition = Linear((width,), layers.xavier, dtype)
        self.blocks = blocks_of(self, self.config, self.config.depth)

    def __call__(
        self, x_t: Images, tokens: Tokens, vector: Vectors
    ) -> tuple[WideTokens, WideTokens]:
        """The tokens of the head, and the conditions of its final layer: [b, l, e] each.

        Args:
          x_t: [b, h, w, c] the input of the network.
          tokens: [b, l, d] after the last block of the trunk.
          vector: [b, d] condition of the final layer.
        """
        config, depth, dtype = self.config, self.config.depth, jnp.dtype(self.config.dtype)
        condition = tokens.astype(dtype) + spread(vector[:, None, :], tokens.shape, dtype)
        conditions = {"t": self.condition(nn.silu(condition))}
        inner = embed(config, self.patch_embedding, x_t)
        inner = run_stack(config, self.blocks, inner, conditions, "t" * depth, 0, depth)
        return inner, conditions["t"]


class Transformer(nn.Module):
    """Patches, conditioned transformer blocks, final layer.

    Attributes:
      config: the `DiT` whose fields say how large the network is and how it is conditioned.
    """

    config: Any

    def setup(self):
        config, dtype = self.config, jnp.dtype(self.config.dtype)
        self.patch_embedding = Linear((config.width,), layers.xavier, dtype)
        time_dtype = dtype_of(config, "time_embedding")
        self.time_embedding = layers.TimeEmbedding(config.width, time_dtype)
        # In float32, so that the gradients of samples with equal labels are summed in float32.
        self.label_embedding = nn.Embed(
            config.num_classes + 1, config.width, embedding_init=layers.small_normal
        )
        if config.conditioning == "meanflow":
            self.interval_embedding = layers.TimeEmbedding(config.width, time_dtype)
            self.target_embedding = layers.TimeEmbedding(config.width, time_dtype)
        if config.embeds_both_times:
            self.both_embedding = layers.TimeEmbedding(config.width, time_dtype, zero_init=True)
        if config.guidance_input:
            self.guidance_embedding = layers.GuidanceEmbedding(config.width, time_dtype)
        self.blocks = blocks_of(self, config, config.depth)
        self.final = final_layer(config)
        if config.velocity_head:
            self.v_head = VelocityHead(config)
        if config.wide_head.depth:
            self.wide_head = WideHeadBlocks(wide_head_network(config))
        if config.learned_variance:
            self.log_variance = layers.LogVariance()
        if config.alignment_depth:
            self.projector = layers.Projector(
                config.alignment_hidden, config.alignment_width, dtype
            )

    def __call__(self, x_t: Images, t: Times, r: Times, y: Any) -> Images:
        """What the network predicts of the average velocity u [b, h, w, c], float32; see
        `dmf.models.prediction`."""
        conditions = self._conditions(t, r, y)
        tokens = self._run(self._embed(x_t), conditions, 0, self.config.depth)
        return self._predict(tokens, conditions, x_t)

    def encode(self, x_t: Images, t: Times, y: Any) -> Tokens:
        """The tokens [b, l, d] before the first block that depends on r."""
        tokens, depth = self._embed(x_t), self.config.encoder_depth
        if depth == 0:
            return tokens
        condition = self.time_embedding(t) + self._embed_condition(y)
        return self._run(tokens, {"t": condition}, 0, depth)

    def decode(
        self, tokens: Tokens, t: Times, r: Times, y: Any, x_t: Images | None = None
    ) -> Images:
        """The prediction [b, h, w, c], float32, from the tokens of `encode`, and for a wide head
        from the input x_t."""
        conditions, config = self._conditions(t, r, y), self.config
        tokens = self._run(tokens, conditions, config.encoder_depth, config.depth)
        return self._predict(tokens, conditions, x_t)

    def decode_heads(
        self, tokens: Tokens, t: Times, r: Times, y: Any
    ) -> tuple[Images, Images]:
        """The predictions of u and v [b, h, w, c], float32, from the tokens of `encode`."""
        conditions, config = self._conditions(t, r, y), self.config
        cut = config.depth - config.head_depth
        inner = self._run(tokens, conditions, 0, cut)
        tokens = self._run(inner, conditions, cut, config.depth)
        return self._predict(tokens, conditions), self.v_head(inner, conditions)

    def with_features(
        self, x_t: Images, t: Times, r: Times, y: Any
    ) -> tuple[Images, Features]:
        """The prediction, and the projected tokens after block `alignment_depth`."""
        conditions, cut = self._conditions(t, r, y), self.config.alignment_depth
        inner = self._run(self._embed(x_t), conditions, 0, cut)
        tokens = self._run(inner, conditions, cut, self.config.depth)
        return self._predict(tokens, conditions, x_t), self.projector(inner)

    def variance(self, t: Times, r: Times) -> PerSample:
        """The learned log of the expected squared error at (t, r), float32."""
        return self.log_variance(t, r)

    def everything(self, x_t: Images, t: Times, r: Times, y: Any) -> Any:
        """Every output, so that initialisation creates every parameter."""
        variance = self.variance(t, r) if self.config.learned_variance else None
        if self.config.velocity_head:
            variance = variance, self.decode_heads(self._embed(x_t), t, r, y)
        if self.config.alignment_depth:
            return self.with_features(x_t, t, r, y), variance
        return self(x_t, t, r, y), variance

    def _embed(self, x_t: Images) -> Tokens:
        return embed(self.config, self.patch_embedding, x_t)

    def _predict(
        self, tokens: Tokens, conditions: dict[str, Vectors], x_t: Images | None = None
    ) -> Images:
        """The prediction [b, h, w, c], float32, from the tokens after the last block, and for a
        wide head from the input x_t."""
        condition = conditions[self.config.final_layer_time]
        if self.config.wide_head.depth:
            tokens, condition = self.wide_head(x_t, tokens, condition)
        return to_images(self.config, self.final(tokens, condition))

    def _conditions(self, t: Times, r: Times, y: Any) -> dict[str, Vectors]:
        """The condition vectors [b, d] by time letter; a MeanFlow network has one, under "t"."""
        embedded_y, config = self._embed_condition(y), self.config
        if config.conditioning == "meanflow":
            times = {"t": t, "r": r, "t-r": t - r}
            embedded = (getattr(self, TIME_EMBEDDINGS[name])(times[name])
                        for name in config.embedded_times)
            return {"t": sum(embedded, embedded_y)}
        conditions = {"t": self.time_embedding(t) + embedded_y}
        if config.conditioning == "decoupled":
            conditions["r"] = self.time_embedding(r) + embedded_y
        if config.embeds_both_times:
            conditions["b"] = conditions["r"] + self.both_embedding(t - r)
        return conditions

    def _embed_condition(self, y: Any) -> Vectors:
        """The embedding of the label and, for a network that takes guidance as an input, of the
        guidance."""
        labels, guidance = labels_and_guidance(self.config, y)
        embedded = self.label_embedding(labels).astype(self.config.dtype)
        if not self.config.guidance_input:
            return embedded
        return embedded + self.guidance_embedding(*guidance)

    def _run(
        self, tokens: Tokens, conditions: dict[str, Vectors], start: int, stop: int
    ) -> Tokens:
        """Runs the blocks start, ..., stop - 1."""
        times = self.config.resolved_block_times
        return run_stack(self.config, self.blocks, tokens, conditions, times, start, stop)
