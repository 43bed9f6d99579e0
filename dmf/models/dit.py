"""The diffusion transformer of SiT, MeanFlow and Decoupled MeanFlow.

One network; conditioning is what makes the three models, and nothing else does:

- "flow" (SiT): T(t) + Y(y) everywhere, r is ignored.
- "meanflow": T(t) + H(t - r) + Y(y) everywhere, H a second time embedding.
- "decoupled" (DMF): T(t) + Y(y) in the first `split_depth` blocks, T(r) + Y(y) in the others and
  in the final layer. At r = t this is the flow model, with the same parameters.

The network is cut in two where r comes in: `encode` is what depends on x_t, t and y alone, and
`decode` the rest, so that several velocities at one x_t share the first part.
"""

import dataclasses
import itertools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from dmf.kernels.flash import IMPLEMENTATIONS
from dmf.models import layers
from dmf.models.layers import Tokens, Vectors
from dmf.typing import (
    Features,
    Flops,
    Images,
    InputError,
    Labels,
    Params,
    PerSample,
    PRNGKey,
    Times,
)

CONDITIONINGS = ("flow", "meanflow", "decoupled")
REMAT_POLICIES = {
    "none": None,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}

# DiT, arXiv:2212.09748, table 1; M as in MeanFlow, arXiv:2505.13447.
SIZES = {
    "S": {"depth": 12, "width": 384, "heads": 6},
    "B": {"depth": 12, "width": 768, "heads": 12},
    "M": {"depth": 16, "width": 1024, "heads": 16},
    "L": {"depth": 24, "width": 1024, "heads": 16},
    "XL": {"depth": 28, "width": 1152, "heads": 16},
}


class Hidden(NamedTuple):
    """What the decoder takes of x_t: tokens [b, l, d] in the network's dtype; and t."""

    tokens: jax.Array
    t: jax.Array


@dataclasses.dataclass(frozen=True, kw_only=True)
class DiT:
    """A diffusion transformer over square images or latents; a `Network`.

    Attributes:
      input_size: height and width of its input.
      channels: channels of its input and output.
      patch_size: height and width of a patch.
      depth, width, heads, mlp_ratio: of the transformer; `SIZES` holds the published ones.
      num_classes: number of labels; the label table has one row more, for no label.
      conditioning: "flow", "meanflow" or "decoupled".
      split_depth: how many blocks see t when decoupled; the others see r.
      qk_norm: RMSNorm on queries and keys.
      learned_variance: whether there is a log-variance head (for the cauchy weighting).
      alignment_depth: number of blocks before the projected tokens leave (REPA); 0 for none.
      alignment_width, alignment_hidden: of the projector.
      scan: run the blocks by `lax.scan`, for short compilation, or unrolled.
      remat: what the backward pass recomputes: "none", "dots" (all but matrix products), "full".
      dtype: of the computation, "float32" or "bfloat16"; parameters are float32 always.
      attention: "xla" (the formula), "flash" (kernels), or "auto" for what the device and the
        number of tokens ask for; see `dmf.kernels.flash`.
    """

    input_size: int
    channels: int
    patch_size: int = 2
    depth: int
    width: int
    heads: int
    mlp_ratio: float = 4.0
    num_classes: int
    conditioning: str = "flow"
    split_depth: int | None = None
    qk_norm: bool = False
    learned_variance: bool = False
    alignment_depth: int = 0
    alignment_width: int = 768
    alignment_hidden: int = 2048
    scan: bool = True
    remat: str = "none"
    dtype: str = "float32"
    attention: str = "auto"

    def __post_init__(self):
        check = _check_field
        for name in ("input_size", "channels", "patch_size", "depth", "width", "heads"):
            check(getattr(self, name) >= 1, self, name, "give a whole number >= 1")
        check(self.input_size % self.patch_size == 0, self, "patch_size",
              f"it must divide model.input_size={self.input_size}")
        check(self.width % self.heads == 0, self, "heads",
              f"it must divide model.width={self.width}")
        check(self.width % 4 == 0, self, "width", "the position table needs a multiple of 4")
        check(self.num_classes >= 0, self, "num_classes", "give 0 (unconditional) or more")
        check(self.conditioning in CONDITIONINGS, self, "conditioning",
              f"choose one of {', '.join(CONDITIONINGS)}")
        decoupled = self.conditioning == "decoupled"
        check(decoupled or self.split_depth is None, self, "split_depth",
              f"model.conditioning={self.conditioning} has none; set it to decoupled")
        check(not decoupled or self.split_depth is not None, self, "split_depth",
              f"the decoupled conditioning needs one, from 0 to model.depth={self.depth}")
        check(not decoupled or 0 <= self.split_depth <= self.depth, self, "split_depth",
              f"give a whole number from 0 to model.depth={self.depth}")
        check(0 <= self.alignment_depth <= self.depth, self, "alignment_depth",
              f"give a whole number from 0 (none) to model.depth={self.depth}")
        check(self.remat in REMAT_POLICIES, self, "remat",
              f"choose one of {', '.join(REMAT_POLICIES)}")
        check(self.dtype in ("float32", "bfloat16"), self, "dtype", "choose float32 or bfloat16")
        check(self.attention in IMPLEMENTATIONS, self, "attention",
              f"choose one of {', '.join(IMPLEMENTATIONS)}")

    @property
    def sample_shape(self) -> tuple[int, int, int]:
        """(h, w, c) of one sample."""
        return self.input_size, self.input_size, self.channels

    @property
    def pattern(self) -> str:
        """Which time each block sees, one letter a block; the final layer sees the output's."""
        split = self.split_depth if self.conditioning == "decoupled" else self.depth
        return "t" * split + "r" * (self.depth - split)

    @property
    def encoder_depth(self) -> int:
        """How many blocks come before r does: those of MeanFlow all see t - r."""
        blocks_of_t = itertools.takewhile(lambda source: source == "t", self.pattern)
        return 0 if self.conditioning == "meanflow" else len(list(blocks_of_t))

    @property
    def flops(self) -> Flops:
        """Of one sample: 2 for each multiply-add of the products of matrices.

        The projector and the log-variance head, which do not belong to the flow map, are left out.
        """
        width, length = self.width, (self.input_size // self.patch_size) ** 2
        linears = 2 * width**2 * (4 + 2 * self.mlp_ratio) * length
        attention = 4 * width * length**2
        block = linears + attention + 2 * 6 * width**2
        patches = 2 * width * length * self.patch_size**2 * self.channels
        times = 2 * (256 + width) * width
        early = self.encoder_depth
        return Flops(
            encode=patches + early * block + (times if early else 0),
            decode=patches + (self.depth - early) * block + times + 2 * 2 * width**2,
        )

    def init(self, key: PRNGKey) -> Params:
        """Random parameters in float32: a nested dictionary, block parameters stacked by depth."""
        x = jnp.zeros((1, *self.sample_shape))
        t = jnp.zeros((1,))
        y = jnp.zeros((1,), jnp.int32)
        return _Transformer(self).init(key, x, t, t, y, method="everything")["params"]

    def apply(self, params: Params, x_t: Images, t: Times, r: Times, y: Labels) -> Images:
        """u(x_t, t, r, y) [b, h, w, c], in the dtype of x_t."""
        self._check_input(x_t)
        u = _Transformer(self).apply({"params": params}, x_t, t, r, y)
        return u.astype(x_t.dtype)

    def encode(self, params: Params, x_t: Images, t: Times, y: Labels) -> Hidden:
        """The part of the network that r plays no part in."""
        self._check_input(x_t)
        tokens = _Transformer(self).apply({"params": params}, x_t, t, y, method="encode")
        return Hidden(tokens, t)

    def decode(self, params: Params, hidden: Hidden, r: Times, y: Labels) -> Images:
        """u(x_t, t, r, y) [b, h, w, c], float32, from `hidden = encode(params, x_t, t, y)`."""
        return _Transformer(self).apply({"params": params}, *hidden, r, y, method="decode")

    def apply_with_features(
        self, params: Params, x_t: Images, t: Times, r: Times, y: Labels
    ) -> tuple[Images, Features]:
        """u, and the tokens after block `alignment_depth`, projected, in float32."""
        self._check_input(x_t)
        u, projected = _Transformer(self).apply(
            {"params": params}, x_t, t, r, y, method="with_features"
        )
        return u.astype(x_t.dtype), projected.astype(jnp.float32)

    def log_variance(self, params: Params, t: Times, r: Times) -> PerSample:
        """phi(t, r), in float32."""
        return _Transformer(self).apply({"params": params}, t, r, method="variance")

    def _check_input(self, x_t: Images) -> None:
        if x_t.shape[1:] != self.sample_shape:
            raise InputError(f"x_t has shape {x_t.shape}: this network takes [b, "
                             f"{', '.join(map(str, self.sample_shape))}]")


def _check_field(good: bool, model: DiT, field: str, remedy: str) -> None:
    if not good:
        raise InputError(f"model.{field}={getattr(model, field)}: {remedy}")


class _Transformer(nn.Module):
    config: DiT

    def setup(self):
        config, dtype = self.config, jnp.dtype(self.config.dtype)
        self.patch_embedding = nn.Dense(config.width, kernel_init=layers.xavier, dtype=dtype)
        self.time_embedding = layers.TimeEmbedding(config.width, dtype)
        self.label_embedding = nn.Embed(
            config.num_classes + 1, config.width, embedding_init=layers.small_normal, dtype=dtype
        )
        if config.conditioning == "meanflow":
            self.interval_embedding = layers.TimeEmbedding(config.width, dtype)
        self.blocks = self.param("blocks", self._init_blocks)
        values = config.patch_size**2 * config.channels
        self.final = layers.FinalLayer(values, dtype)
        if config.learned_variance:
            self.log_variance = layers.LogVariance()
        if config.alignment_depth:
            self.projector = layers.Projector(
                config.alignment_hidden, config.alignment_width, dtype
            )

    def __call__(self, x_t: Images, t: Times, r: Times, y: Labels) -> Images:
        """u, in float32."""
        conditions = self._conditions(t, r, y)
        tokens = self._run(self._embed(x_t), conditions, 0, self.config.depth)
        return self._finish(tokens, conditions)

    def encode(self, x_t: Images, t: Times, y: Labels) -> Tokens:
        """Tokens before the first block that sees r."""
        from_t = {"t": self.time_embedding(t) + self.label_embedding(y)}
        return self._run(self._embed(x_t), from_t, 0, self.config.encoder_depth)

    def decode(self, tokens: Tokens, t: Times, r: Times, y: Labels) -> Images:
        """u, in float32, from the tokens of `encode`."""
        conditions, config = self._conditions(t, r, y), self.config
        tokens = self._run(tokens, conditions, config.encoder_depth, config.depth)
        return self._finish(tokens, conditions)

    def with_features(
        self, x_t: Images, t: Times, r: Times, y: Labels
    ) -> tuple[Images, Features]:
        """u, and the tokens after block `alignment_depth`, projected."""
        conditions, cut = self._conditions(t, r, y), self.config.alignment_depth
        inner = self._run(self._embed(x_t), conditions, 0, cut)
        tokens = self._run(inner, conditions, cut, self.config.depth)
        return self._finish(tokens, conditions), self.projector(inner)

    def variance(self, t: Times, r: Times) -> PerSample:
        return self.log_variance(t, r)

    def everything(self, x_t: Images, t: Times, r: Times, y: Labels) -> Any:
        """Touches every parameter, for initialisation."""
        variance = self.variance(t, r) if self.config.learned_variance else None
        if self.config.alignment_depth:
            return self.with_features(x_t, t, r, y), variance
        return self(x_t, t, r, y), variance

    def _embed(self, x_t: Images) -> Tokens:
        config = self.config
        table = layers.position_table(config.input_size // config.patch_size, config.width)
        tokens = self.patch_embedding(layers.patchify(x_t, config.patch_size))
        return tokens + jnp.asarray(table, tokens.dtype)[None]

    def _finish(self, tokens: Tokens, conditions: dict[str, Vectors]) -> Images:
        last = "r" if self.config.conditioning == "decoupled" else "t"
        patches = self.final(tokens, conditions[last])
        return layers.unpatchify(patches, self.config.patch_size).astype(jnp.float32)

    def _conditions(self, t: Times, r: Times, y: Labels) -> dict[str, Vectors]:
        labels = self.label_embedding(y)
        from_t = self.time_embedding(t) + labels
        if self.config.conditioning == "meanflow":
            from_t += self.interval_embedding(t - r)
        if self.config.conditioning == "decoupled":
            return {"t": from_t, "r": self.time_embedding(r) + labels}
        return {"t": from_t}

    def _block(self) -> layers.Block:
        config = self.config
        return layers.Block(
            config.heads, config.mlp_ratio, config.qk_norm, jnp.dtype(config.dtype),
            config.attention, parent=None,
        )  # fmt: skip

    def _init_blocks(self, key: PRNGKey) -> Params:
        """Parameters of all blocks, each leaf stacked on a leading depth axis."""
        tokens = jnp.zeros((1, 1, self.config.width))
        condition = jnp.zeros((1, self.config.width))
        return jax.vmap(lambda key: self._block().init(key, tokens, condition)["params"])(
            jax.random.split(key, self.config.depth)
        )

    def _stack(self) -> Params:
        """The parameters of all blocks, those of products in the type that products take them in.

        Cast here, before each block takes its own, the gradients of a run of blocks come together
        in that type too, in half the memory of float32 where it is bfloat16.
        """
        dtype = jnp.dtype(self.config.dtype)

        def cast(path: Any, leaf: jax.Array) -> jax.Array:
            return leaf.astype(dtype) if path[-1].key in ("kernel", "bias") else leaf

        return jax.tree_util.tree_map_with_path(cast, self.blocks)

    def _run(
        self, tokens: Tokens, conditions: dict[str, Vectors], start: int, stop: int
    ) -> Tokens:
        """Blocks start..stop-1, scanned or unrolled, rematerialised as configured."""
        if start == stop:
            return tokens
        config, block, stack = self.config, self._block(), self._stack()
        sources, whole = config.pattern[start:stop], (start, stop) == (0, config.depth)
        only = conditions[sources[0]] if len(set(sources)) == 1 else None

        def step(tokens: Tokens, given: tuple[Params, jax.Array, jax.Array]) -> Any:
            own, place, sees_r = given
            if config.scan and config.remat != "none" and not whole:
                own = _block_of(stack, place, own)
            condition = only
            if only is None:
                condition = jnp.where(sees_r, conditions["r"], conditions["t"])
            return block.apply({"params": own}, tokens, condition), None

        if config.remat != "none":
            # Inside a scan the loop itself keeps XLA from merging the recomputation away.
            policy = REMAT_POLICIES[config.remat]
            step = jax.checkpoint(step, policy=policy, prevent_cse=not config.scan)
        sees_r = jnp.asarray([source == "r" for source in config.pattern])
        given = (stack, jnp.arange(config.depth), sees_r)
        if config.scan:
            some = given if whole else jax.tree.map(lambda leaf: leaf[start:stop], given)
            return jax.lax.scan(step, tokens, some)[0]
        for i in range(start, stop):
            tokens, _ = step(tokens, jax.tree.map(lambda leaf, i=i: leaf[i], given))
        return tokens


@jax.custom_jvp
def _block_of(stack: Params, place: jax.Array, own: Params) -> Params:
    """One block's parameters, taken from the stack of all; the derivative is that of `own`.

    To scan over a part of a stack, JAX would copy that part. Here the numbers are read in place,
    and `own`, the copy, which gradients go through, is never made.
    """
    return jax.tree.map(lambda leaf: leaf[place], stack)


@_block_of.defjvp
def _tangent_of_block(primals: Any, tangents: Any) -> tuple[Params, Params]:
    return _block_of(*primals), tangents[2]
