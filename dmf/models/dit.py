"""The diffusion transformer of SiT, MeanFlow and Decoupled MeanFlow.

One network; conditioning is what makes the three models, and nothing else does:

- "flow" (SiT): T(t) + Y(y) everywhere, r is ignored.
- "meanflow": T(t) + H(t - r) + Y(y) everywhere, H a second time embedding; or another choice of
  t, r and t - r.
- "decoupled" (DMF): T(t) + Y(y) in the first `split_depth` blocks, T(r) + Y(y) in the others and
  in the final layer. At r = t this is the flow model, with the same parameters. `pattern` gives
  blocks their times in other ways.

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
from dmf.models.stack import REMAT_POLICIES, run_blocks
from dmf.typing import (
    Condition,
    Features,
    Flops,
    GuidedLabels,
    Images,
    InputError,
    Params,
    PerSample,
    PRNGKey,
    Times,
)

CONDITIONINGS = ("flow", "meanflow", "decoupled")
# What a block may see, by a letter: t, r, or both (r, and t - r by an embedding of its own).
SEEN = "trb"
PATTERNS = ("split", "interleaved", "both")
# The embedding of each time that a MeanFlow network may take.
EMBEDDINGS = {"t": "time_embedding", "r": "target_embedding", "t-r": "interval_embedding"}
# DiT, arXiv:2212.09748, table 1; M as in MeanFlow, arXiv:2505.13447.
SIZES = {
    "S": {"depth": 12, "width": 384, "heads": 6},
    "B": {"depth": 12, "width": 768, "heads": 12},
    "M": {"depth": 16, "width": 1024, "heads": 16},
    "L": {"depth": 24, "width": 1024, "heads": 16},
    "XL": {"depth": 28, "width": 1152, "heads": 16},
}


class Hidden(NamedTuple):
    """What the decoder takes of x_t: tokens [b, l, d] in the dtype of the residual; and t."""

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
      pattern: which time each block sees when decoupled: "split" at `split_depth`; "both", split,
        the decoder seeing r and t - r; "interleaved", t and r in turn; or a letter a block, t, r
        or b for both. The final layer sees r, and t - r too if the last block does.
      embedded_times: which times a MeanFlow network embeds, of "t", "r" and "t-r".
      guidance_input: whether labels may come with a guidance, as `GuidedLabels`.
      qk_norm: RMSNorm on queries and keys.
      learned_variance: whether there is a log-variance head (for the cauchy weighting).
      alignment_depth: number of blocks before the projected tokens leave (REPA); 0 for none.
      alignment_width, alignment_hidden: of the projector.
      scan: run the blocks by `lax.scan`, for short compilation, or unrolled.
      remat: what the backward pass recomputes: "none", "dots" (all but matrix products), "full".
      dtype: of the computation, "float32" or "bfloat16"; parameters are float32 always.
      float32: parts of it that are in float32 all the same, some of `layers.FLOAT32`.
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
    pattern: str = "split"
    embedded_times: tuple[str, ...] = ("t", "t-r")
    guidance_input: bool = False
    qk_norm: bool = False
    learned_variance: bool = False
    alignment_depth: int = 0
    alignment_width: int = 768
    alignment_hidden: int = 2048
    scan: bool = True
    remat: str = "none"
    dtype: str = "float32"
    float32: tuple[str, ...] = ()
    attention: str = "auto"

    def __post_init__(self):
        check = self._check
        for name in ("input_size", "channels", "patch_size", "depth", "width", "heads",
                     "alignment_width", "alignment_hidden"):
            check(getattr(self, name) >= 1, name, "give a whole number >= 1")
        check(self.input_size % self.patch_size == 0, "patch_size",
              f"it must divide model.input_size={self.input_size}")
        check(self.width % self.heads == 0, "heads", f"it must divide model.width={self.width}")
        check(self.width % 4 == 0, "width", "the position table needs a multiple of 4")
        check(self.mlp_ratio > 0, "mlp_ratio", "it is positive")
        check(self.num_classes >= 0, "num_classes", "give 0 (unconditional) or more")
        for name, choices in (("conditioning", CONDITIONINGS), ("remat", REMAT_POLICIES),
                              ("attention", IMPLEMENTATIONS)):
            check(getattr(self, name) in choices, name, f"choose one of {', '.join(choices)}")
        self._check_times()
        check(0 <= self.alignment_depth <= self.depth, "alignment_depth",
              f"give a whole number from 0 (none) to model.depth={self.depth}")
        check(self.dtype in ("float32", "bfloat16"), "dtype", "choose float32 or bfloat16")
        check(set(self.float32) <= set(layers.FLOAT32), "float32",
              f"choose some of {', '.join(layers.FLOAT32)}")

    def _check_times(self) -> None:
        check, conditioning = self._check, self.conditioning
        decoupled = conditioning == "decoupled"
        splits = decoupled and self.pattern in ("split", "both")
        check(splits or self.split_depth is None, "split_depth",
              f"model.conditioning={conditioning} with model.pattern={self.pattern} has none; set "
              "them to decoupled and split")
        check(not splits or self.split_depth is not None, "split_depth",
              f"the decoupled conditioning needs one, from 0 to model.depth={self.depth}")
        check(not splits or 0 <= self.split_depth <= self.depth, "split_depth",
              f"give a whole number from 0 to model.depth={self.depth}")
        letters = len(self.pattern) == self.depth and set(self.pattern) <= set(SEEN)
        check(self.pattern in PATTERNS or letters, "pattern",
              f"choose one of {', '.join(PATTERNS)}, or give model.depth={self.depth} letters of "
              "t, r and b")
        check(decoupled or self.pattern == "split", "pattern",
              f"model.conditioning={conditioning} has none; set it to decoupled")
        times = self.embedded_times
        check(bool(times) and set(times) <= set(EMBEDDINGS) and len(set(times)) == len(times),
              "embedded_times", f"give some of {', '.join(EMBEDDINGS)}, each once")
        check(conditioning == "meanflow" or tuple(times) == ("t", "t-r"), "embedded_times",
              f"model.conditioning={conditioning} has no choice; set it to meanflow")

    def _check(self, good: bool, field: str, remedy: str) -> None:
        if not good:
            raise InputError(f"model.{field}={getattr(self, field)}: {remedy}")

    @property
    def sample_shape(self) -> tuple[int, int, int]:
        """(h, w, c) of one sample."""
        return self.input_size, self.input_size, self.channels

    @property
    def sources(self) -> str:
        """What each block sees, one letter a block; the final layer sees the output's."""
        if self.conditioning != "decoupled":
            return "t" * self.depth
        if self.pattern == "interleaved":
            return ("tr" * self.depth)[: self.depth]
        if self.pattern in PATTERNS:
            last = "r" if self.pattern == "split" else "b"
            return "t" * self.split_depth + last * (self.depth - self.split_depth)
        return self.pattern

    @property
    def last_source(self) -> str:
        """What the final layer sees."""
        if self.conditioning != "decoupled":
            return "t"
        return "b" if self.pattern == "both" or self.sources[-1] == "b" else "r"

    @property
    def encoder_depth(self) -> int:
        """How many blocks come before r does: those of MeanFlow all see it."""
        blocks_of_t = itertools.takewhile(lambda source: source == "t", self.sources)
        return 0 if self.conditioning == "meanflow" else len(list(blocks_of_t))

    @property
    def recomputes(self) -> bool:
        """Whether remat is full."""
        return self.remat == "full"

    @property
    def flops(self) -> Flops:
        """Of one sample: 2 for each multiply-add of the products of matrices.

        Of embeddings one in each part counts. The projector and the log-variance head, which do
        not belong to the flow map, are left out.
        """
        width, length = self.width, (self.input_size // self.patch_size) ** 2
        linears, modulation = 2 * width**2 * (4 + 2 * self.mlp_ratio) * length, 12 * width**2
        block = linears + 4 * width * length**2 + modulation
        patches = 2 * width * length * self.patch_size**2 * self.channels
        early, times = self.encoder_depth, 2 * (256 + width) * width
        return Flops(
            encode=patches + early * block + (times if early else 0),
            decode=patches + (self.depth - early) * block + times + 2 * 2 * width**2,
        )

    def init(self, key: PRNGKey) -> Params:
        """Random parameters in float32: a nested dictionary, block parameters stacked by depth."""
        x, t = jnp.zeros((1, *self.sample_shape)), jnp.zeros((1,))
        y = jnp.zeros((1,), jnp.int32)
        return _Transformer(self).init(key, x, t, t, y, method="everything")["params"]

    def apply(self, params: Params, x_t: Images, t: Times, r: Times, y: Condition) -> Images:
        """u(x_t, t, r, y) [b, h, w, c], in the dtype of x_t."""
        self._check_input(x_t)
        return _Transformer(self).apply({"params": params}, x_t, t, r, y).astype(x_t.dtype)

    def encode(self, params: Params, x_t: Images, t: Times, y: Condition) -> Hidden:
        """The part of the network that r plays no part in."""
        self._check_input(x_t)
        tokens = _Transformer(self).apply({"params": params}, x_t, t, y, method="encode")
        return Hidden(tokens, t)

    def decode(self, params: Params, hidden: Hidden, r: Times, y: Condition) -> Images:
        """u(x_t, t, r, y) [b, h, w, c], float32, from `hidden = encode(params, x_t, t, y)`."""
        return _Transformer(self).apply({"params": params}, *hidden, r, y, method="decode")

    def apply_with_features(
        self, params: Params, x_t: Images, t: Times, r: Times, y: Condition
    ) -> tuple[Images, Features]:
        """u, and the tokens after block `alignment_depth`, projected, in float32."""
        self._check_input(x_t)
        transformer, variables = _Transformer(self), {"params": params}
        u, projected = transformer.apply(variables, x_t, t, r, y, method="with_features")
        return u.astype(x_t.dtype), projected.astype(jnp.float32)

    def log_variance(self, params: Params, t: Times, r: Times) -> PerSample:
        """phi(t, r), in float32."""
        return _Transformer(self).apply({"params": params}, t, r, method="variance")

    def _check_input(self, x_t: Images) -> None:
        if x_t.shape[1:] != self.sample_shape:
            raise InputError(f"x_t has shape {x_t.shape}: this network takes [b, "
                             f"{', '.join(map(str, self.sample_shape))}]")


class _Transformer(nn.Module):
    config: DiT

    def setup(self):
        config, dtype = self.config, jnp.dtype(self.config.dtype)
        self.patch_embedding = nn.Dense(config.width, kernel_init=layers.xavier, dtype=dtype)
        of_times = self._dtype("time_embedding")
        self.time_embedding = layers.TimeEmbedding(config.width, of_times)
        self.label_embedding = nn.Embed(
            config.num_classes + 1, config.width, embedding_init=layers.small_normal, dtype=dtype
        )
        if config.conditioning == "meanflow":
            self.interval_embedding = layers.TimeEmbedding(config.width, of_times)
            self.target_embedding = layers.TimeEmbedding(config.width, of_times)
        if "b" in config.sources + config.last_source:
            self.both_embedding = layers.TimeEmbedding(config.width, of_times, silent=True)
        if config.guidance_input:
            self.guidance_embedding = layers.GuidanceEmbedding(config.width, of_times)
        self.blocks = self.param("blocks", self._init_blocks)
        values = config.patch_size**2 * config.channels
        self.final = layers.FinalLayer(values, self._dtype("final_layer"))
        if config.learned_variance:
            self.log_variance = layers.LogVariance()
        if config.alignment_depth:
            self.projector = layers.Projector(
                config.alignment_hidden, config.alignment_width, dtype
            )

    def __call__(self, x_t: Images, t: Times, r: Times, y: Condition) -> Images:
        """u, in float32."""
        conditions = self._conditions(t, r, y)
        tokens = self._run(self._embed(x_t), conditions, 0, self.config.depth)
        return self._finish(tokens, conditions)

    def encode(self, x_t: Images, t: Times, y: Condition) -> Tokens:
        """Tokens before the first block that sees r."""
        tokens, depth = self._embed(x_t), self.config.encoder_depth
        if depth == 0:
            return tokens
        return self._run(tokens, {"t": self.time_embedding(t) + self._asked(y)}, 0, depth)

    def decode(self, tokens: Tokens, t: Times, r: Times, y: Condition) -> Images:
        """u, in float32, from the tokens of `encode`."""
        conditions, config = self._conditions(t, r, y), self.config
        tokens = self._run(tokens, conditions, config.encoder_depth, config.depth)
        return self._finish(tokens, conditions)

    def with_features(
        self, x_t: Images, t: Times, r: Times, y: Condition
    ) -> tuple[Images, Features]:
        """u, and the tokens after block `alignment_depth`, projected."""
        conditions, cut = self._conditions(t, r, y), self.config.alignment_depth
        inner = self._run(self._embed(x_t), conditions, 0, cut)
        tokens = self._run(inner, conditions, cut, self.config.depth)
        return self._finish(tokens, conditions), self.projector(inner)

    def variance(self, t: Times, r: Times) -> PerSample:
        return self.log_variance(t, r)

    def everything(self, x_t: Images, t: Times, r: Times, y: Condition) -> Any:
        """Touches every parameter, for initialisation."""
        variance = self.variance(t, r) if self.config.learned_variance else None
        if self.config.alignment_depth:
            return self.with_features(x_t, t, r, y), variance
        return self(x_t, t, r, y), variance

    def _embed(self, x_t: Images) -> Tokens:
        config = self.config
        table = layers.position_table(config.input_size // config.patch_size, config.width)
        tokens = self.patch_embedding(layers.patchify(x_t, config.patch_size))
        tokens = tokens.astype(self._dtype("residual"))
        return tokens + jnp.asarray(table, tokens.dtype)[None]

    def _finish(self, tokens: Tokens, conditions: dict[str, Vectors]) -> Images:
        patches = self.final(tokens, conditions[self.config.last_source])
        return layers.unpatchify(patches, self.config.patch_size).astype(jnp.float32)

    def _conditions(self, t: Times, r: Times, y: Condition) -> dict[str, Vectors]:
        """What blocks see, by the letter of their source."""
        asked, config = self._asked(y), self.config
        if config.conditioning == "meanflow":
            values = {"t": t, "r": r, "t-r": t - r}
            embedded = (getattr(self, EMBEDDINGS[name])(values[name])
                        for name in config.embedded_times)
            return {"t": sum(embedded, asked)}
        conditions = {"t": self.time_embedding(t) + asked}
        if config.conditioning == "decoupled":
            conditions["r"] = self.time_embedding(r) + asked
        if "b" in config.sources + config.last_source:
            conditions["b"] = conditions["r"] + self.both_embedding(t - r)
        return conditions

    def _asked(self, y: Condition) -> Vectors:
        """The label's vector, and that of the guidance that is asked for: none for bare labels."""
        label = y.label if isinstance(y, GuidedLabels) else y
        embedded = self.label_embedding(label)
        if not self.config.guidance_input:
            return embedded
        if not isinstance(y, GuidedLabels):
            whole = jnp.ones(label.shape)
            y = GuidedLabels(label, whole, jnp.zeros_like(whole), whole)
        return embedded + self.guidance_embedding(y.scale, y.low, y.high)

    def _dtype(self, part: str) -> jnp.dtype:
        """What a part of the network is computed in."""
        return jnp.dtype("float32" if part in self.config.float32 else self.config.dtype)

    def _block(self) -> layers.Block:
        config = self.config
        return layers.Block(
            config.heads, config.mlp_ratio, config.qk_norm, jnp.dtype(config.dtype),
            config.attention, self._dtype("modulation"), parent=None,
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
        def cast(path: Any, leaf: jax.Array) -> jax.Array:
            product = path[-1].key in ("kernel", "bias")
            return leaf.astype(self._dtype(path[0].key)) if product else leaf

        return jax.tree_util.tree_map_with_path(cast, self.blocks)

    def _run(
        self, tokens: Tokens, conditions: dict[str, Vectors], start: int, stop: int
    ) -> Tokens:
        """Blocks start..stop-1, scanned or unrolled, rematerialised as configured."""
        config, block = self.config, self._block()
        return run_blocks(
            lambda own, tokens, condition: block.apply({"params": own}, tokens, condition),
            self._stack(), tokens, conditions, config.sources, start, stop,
            scan=config.scan, remat=config.remat,
        )  # fmt: skip
