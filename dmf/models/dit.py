"""The diffusion transformer of SiT, MeanFlow and Decoupled MeanFlow.

The three models are one network and differ in its conditioning alone:

- "flow" (SiT): every block is conditioned on T(t) + Y(y); r is ignored.
- "meanflow": every block is conditioned on T(t) + H(t - r) + Y(y), with H a second time embedding;
  `embedded_times` chooses other times.
- "decoupled" (Decoupled MeanFlow): the first `split_depth` blocks are conditioned on T(t) + Y(y),
  the others and the final layer on T(r) + Y(y). At r = t this is the flow model with the same
  parameters. `block_times` assigns times to blocks in other ways.

The network is cut in two before the first block that depends on r: `encode` depends on x_t, t and y
alone, and `decode` is the rest, so that several velocities at one x_t share the first part.
"""

import dataclasses
import functools
import itertools
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from dmf.errors import check_between, check_choice, check_valid
from dmf.models.attention.attention import IMPLEMENTATIONS
from dmf.models.block_stack import REMAT_POLICIES
from dmf.models.dit_flops import dit_flops
from dmf.models.layers import FLOAT32_PARTS
from dmf.models.prediction import (
    DEFAULT_MIN_TIME,
    check_prediction_fields,
    input_of_prediction,
    velocity_of,
)
from dmf.models.simple_network import (
    LARGEST_CLASSES,
    LARGEST_DEPTH,
    LARGEST_SIZE,
    SimpleNetwork,
    check_input,
    no_velocity_head,
)
from dmf.models.transformer import TIME_EMBEDDINGS, Transformer, cast_blocks
from dmf.models.wide_head import WideHead
from dmf.types import (
    COMPUTE_DTYPES,
    Features,
    Flops,
    Images,
    Params,
    PerSample,
    PRNGKey,
    Times,
)

CONDITIONINGS = ("flow", "meanflow", "decoupled")
# The time that a block is conditioned on, by letter: t, r, or both (r and t - r).
TIME_LETTERS = "trb"
BLOCK_TIME_PATTERNS = ("split", "interleaved", "both")
# DiT, arXiv:2212.09748, table 1; M as in MeanFlow, arXiv:2505.13447.
SIZES = {
    "S": {"depth": 12, "width": 384, "heads": 6},
    "B": {"depth": 12, "width": 768, "heads": 12},
    "M": {"depth": 16, "width": 1024, "heads": 16},
    "L": {"depth": 24, "width": 1024, "heads": 16},
    "XL": {"depth": 28, "width": 1152, "heads": 16},
}


def repa_depth(depth: int) -> int:
    """Number of blocks before the tokens that REPA aligns (arXiv:2410.06940).

    >>> [repa_depth(SIZES[size]["depth"]) for size in ("B", "L", "XL")]
    [4, 8, 8]

    Args:
      depth: number of blocks of the network; published are 4 for 12 (B), 8 for 24 and 28 (L, XL).
    """
    return 4 if depth == SIZES["B"]["depth"] else min(8, depth)


class Hidden(NamedTuple):
    """The output of `DiT.encode`.

    Attributes:
      tokens: [b, l, d] in the dtype of the residual stream.
      t: [b] times of x_t.
      x_t: the input of the network; None where it predicts velocities and has no wide head.
    """

    tokens: jax.Array
    t: jax.Array
    x_t: jax.Array | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class DiT(SimpleNetwork):
    """A diffusion transformer over square images or latents; a `dmf.types.Network`.

    >>> model = DiT(input_size=4, channels=4, depth=2, width=16, heads=2, num_classes=10,
    ...             conditioning="decoupled", split_depth=1)
    >>> params = jax.jit(model.init)(jax.random.key(0))
    >>> x_t, t, r = jnp.ones((3, 4, 4, 4)), jnp.ones(3), jnp.zeros(3)
    >>> u = jax.jit(model.apply)(params, x_t, t, r, jnp.array([0, 7, 10]))
    >>> u.shape
    (3, 4, 4, 4)

    Attributes:
      input_size: height and width of the input, a multiple of `patch_size`; -1 in a config for
        those of the dataset.
      channels: channels of the input and output, >= 1; -1 in a config for those of the dataset.
      patch_size: height and width of a patch, which becomes one token; >= 1.
      depth: number of transformer blocks, >= 1; published: S and B 12, M 16, L 24, XL 28.
      width: width of the tokens, a multiple of 4 and of `heads`; published: S 384, B 768, M and L
        1024, XL 1152.
      heads: number of attention heads, which divides `width`; published: S 6, B 12, M, L and XL 16.
      mlp_ratio: hidden width of the MLPs over `width`, > 0.
      num_classes: number of class labels, 0 for an unconditional network; -1 in a config for that
        of the dataset. The label embedding has one more row, for the null label.
      conditioning: how blocks are conditioned on the times: "flow" (SiT: on t), "meanflow" (on
        `embedded_times`) or "decoupled" (Decoupled MeanFlow: the first blocks on t, the last on r).
      split_depth: number of blocks conditioned on t, 0 to `depth`; the other blocks are conditioned
        on r. Required with conditioning="decoupled" and block_times="split" or "both"; None
        otherwise.
      block_times: the time that each block is conditioned on, with conditioning="decoupled":
        "split" (t in the first `split_depth` blocks, then r); "both" (the same, with t - r embedded
        beside r); "interleaved" (t and r in turn); or one letter per block, "t", "r" or "b" for r
        and t - r, for example "ttrrbb". The final layer is conditioned on r, and on t - r too if
        the last block is.
      embedded_times: the times that a network with conditioning="meanflow" embeds: one or more of
        "t", "r" and "t-r", each once.
      prediction: what the network predicts: "velocity"; or "data" or "noise", of which it makes
        velocities: u = (x_t - data) / max(t, `min_time`), and u = (noise - x_t) /
        max(1 - t, `min_time`).
      min_time: the least number that prediction="data" or "noise" divides by, from 1e-6 to 1.
      guidance_input: whether the network takes the guidance scale and interval as an input.
      velocity_head: whether there is a second head, which predicts the velocity v (improved
        MeanFlow, arXiv:2512.02012), with conditioning="meanflow"; sampling needs none.
      head_depth: number of blocks of the velocity head, 1 to `depth`: it has blocks of its own in
        place of the last of the network; published for in-context conditioning: 8.
      wide_head: wide blocks after those of the network, for latents with many channels (RAE,
        arXiv:2510.11690); they are conditioned on the time of the final layer.
      qk_norm: whether queries and keys pass an RMSNorm.
      learned_variance: whether the network has a log-variance head, which the weighting "cauchy"
        needs.
      alignment_depth: number of blocks before the tokens that are aligned with an encoder's
        features (REPA), 0 to `depth`; 0 for no alignment.
      alignment_width: width of the encoder's features, to which the projector maps; >= 1.
      alignment_hidden: hidden width of the projector, >= 1.
      scan: whether blocks run in a `lax.scan`, which compiles faster than unrolled blocks.
      remat: what the backward pass recomputes: "none", "dots" (all but matmuls) or "full"
        (everything).
      dtype: dtype of the computation, "float32" or "bfloat16"; parameters are always float32.
      gradient_dtype: dtype in which the gradients of the blocks' kernels are collected, and summed
        over devices, where dtype is "bfloat16": "bfloat16" or "float32".
      float32_parts: parts computed in float32 where dtype is "bfloat16": any of "time_embedding",
        "modulation", "residual" and "final_layer".
      attention: implementation of attention: "xla" (plain JAX operations), "flash" (kernels, on
        TPUs and NVIDIA GPUs) or "auto" (the faster one for the device and the number of tokens).
    """

    # Beside those of all networks: embeddings, and the scales of qk-norm, which are one at first.
    added_by_training: ClassVar[tuple[str, ...]] = (
        *SimpleNetwork.added_by_training, "interval_embedding", "target_embedding",
        "both_embedding", "guidance_embedding", "blocks/attention/q_norm",
        "blocks/attention/k_norm",
    )  # fmt: skip
    # The fields that a run shares with the checkpoint that it starts from.
    sizes: ClassVar[tuple[str, ...]] = (
        "input_size", "channels", "patch_size", "depth", "width", "heads", "mlp_ratio",
        "num_classes", "wide_head", "prediction", "min_time",
    )  # fmt: skip
    label_parameters: ClassVar[tuple[str, ...]] = ("label_embedding",)

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
    block_times: str = "split"
    embedded_times: tuple[str, ...] = ("t", "t-r")
    prediction: str = "velocity"
    min_time: float = DEFAULT_MIN_TIME
    guidance_input: bool = False
    velocity_head: bool = False
    head_depth: int = 8
    wide_head: WideHead = WideHead()
    qk_norm: bool = False
    learned_variance: bool = False
    alignment_depth: int = 0
    alignment_width: int = 768
    alignment_hidden: int = 2048
    scan: bool = True
    remat: str = "none"
    dtype: str = "float32"
    gradient_dtype: str = "bfloat16"
    float32_parts: tuple[str, ...] = ()
    attention: str = "auto"

    def __post_init__(self):
        self._check_sizes()
        self._check_conditioning()
        self._check_times()
        check_prediction_fields(self)
        self._check_computation()

    def _check_sizes(self) -> None:
        check = functools.partial(check_valid, self)
        check_between(self, 1, LARGEST_DEPTH, "depth")
        check_between(self, 1, LARGEST_SIZE, "input_size", "channels", "patch_size", "width",
                      "heads", "alignment_width", "alignment_hidden")
        check_between(self, 0, LARGEST_CLASSES, "num_classes")
        check(self.input_size % self.patch_size == 0, "patch_size",
              f"it must divide model.input_size={self.input_size}")
        check(self.width % self.heads == 0, "heads", f"it must divide model.width={self.width}")
        check(self.width % 4 == 0, "width", "the position table needs a multiple of 4")
        check(1 <= self.mlp_ratio * self.width <= LARGEST_SIZE, "mlp_ratio",
              f"this ratio times model.width={self.width} must lie from 1 to {LARGEST_SIZE}")
        check(0 <= self.alignment_depth <= self.depth, "alignment_depth",
              f"give a whole number from 0 (none) to model.depth={self.depth}")

    def _check_conditioning(self) -> None:
        check, block_times = functools.partial(check_valid, self), self.block_times
        check(self.conditioning in CONDITIONINGS, "conditioning",
              f"choose one of {', '.join(CONDITIONINGS)}")
        check(not self.velocity_head or self.conditioning == "meanflow", "velocity_head",
              f"model.conditioning={self.conditioning} takes none; set it to meanflow")
        check(self.velocity_head or self.head_depth == DiT.head_depth, "head_depth",
              f"it is that of the velocity head; set model.velocity_head=True, or leave this at "
              f"{DiT.head_depth}")
        check(not (self.velocity_head and self.wide_head.depth), "velocity_head",
              "a network with a wide head has no other; set model.wide_head.depth=0")
        check(not self.velocity_head or 1 <= self.head_depth <= self.depth, "head_depth",
              f"give a whole number from 1 to model.depth={self.depth}")
        splits = self.conditioning == "decoupled" and block_times in ("split", "both")
        check(splits or self.split_depth is None, "split_depth",
              f"model.conditioning={self.conditioning} with model.block_times={block_times} takes "
              "none; set them to decoupled and split")
        check(not splits or self.split_depth is not None, "split_depth",
              f"the decoupled conditioning needs one, from 0 to model.depth={self.depth}")
        check(not splits or 0 <= self.split_depth <= self.depth, "split_depth",
              f"give a whole number from 0 to model.depth={self.depth}")

    def _check_times(self) -> None:
        check = functools.partial(check_valid, self)
        conditioning, block_times = self.conditioning, self.block_times
        spelled_out = len(block_times) == self.depth and set(block_times) <= set(TIME_LETTERS)
        check(block_times in BLOCK_TIME_PATTERNS or spelled_out, "block_times",
              f"choose one of {', '.join(BLOCK_TIME_PATTERNS)}, or give model.depth={self.depth} "
              "letters, each t, r or b")
        check(conditioning == "decoupled" or block_times == "split", "block_times",
              f"model.conditioning={conditioning} has no choice; set it to decoupled")
        times = self.embedded_times
        check(bool(times) and set(times) <= set(TIME_EMBEDDINGS) and len(set(times)) == len(times),
              "embedded_times", f"give one or more of {', '.join(TIME_EMBEDDINGS)}, each once")
        check(conditioning == "meanflow" or tuple(times) == ("t", "t-r"), "embedded_times",
              f"model.conditioning={conditioning} has no choice; set it to meanflow")

    def _check_computation(self) -> None:
        check_choice(self, "remat", REMAT_POLICIES)
        check_choice(self, "attention", IMPLEMENTATIONS)
        check_choice(self, "dtype", COMPUTE_DTYPES)
        check_choice(self, "gradient_dtype", COMPUTE_DTYPES)
        check_valid(self, set(self.float32_parts) <= set(FLOAT32_PARTS), "float32_parts",
                    f"choose any of {', '.join(FLOAT32_PARTS)}")

    @property
    def sample_shape(self) -> tuple[int, int, int]:
        """Shape (h, w, c) of one sample."""
        return self.input_size, self.input_size, self.channels

    @property
    def tokens(self) -> int:
        """Number of patches of the input, each of which is a token."""
        return (self.input_size // self.patch_size) ** 2

    @property
    def resolved_block_times(self) -> str:
        """The time letter of each block: `block_times` written out."""
        if self.conditioning != "decoupled":
            return "t" * self.depth
        if self.block_times == "interleaved":
            return ("tr" * self.depth)[: self.depth]
        if self.block_times in BLOCK_TIME_PATTERNS:
            last = "r" if self.block_times == "split" else "b"
            return "t" * self.split_depth + last * (self.depth - self.split_depth)
        return self.block_times

    @property
    def final_layer_time(self) -> str:
        """The time letter of the final layer."""
        if self.conditioning != "decoupled":
            return "t"
        return "b" if self.block_times == "both" or self.resolved_block_times[-1] == "b" else "r"

    @property
    def embeds_both_times(self) -> bool:
        """Whether a block or the final layer is conditioned on both r and t - r."""
        return "b" in self.resolved_block_times + self.final_layer_time

    @property
    def encoder_depth(self) -> int:
        """Number of blocks before the first that depends on r; 0 for a MeanFlow network."""
        if self.conditioning == "meanflow":
            return 0
        return len(list(itertools.takewhile(lambda time: time == "t", self.resolved_block_times)))

    @property
    def full_remat(self) -> bool:
        """Whether the backward pass recomputes the whole forward pass."""
        return self.remat == "full"

    @property
    def flops(self) -> Flops:
        """Operations of the matmuls of one sample, 2 for a multiply-add."""
        return dit_flops(self)

    def init(self, key: PRNGKey) -> Params:
        """Random parameters, float32: a nested dictionary, block parameters stacked by depth."""
        x, t = jnp.zeros((1, *self.sample_shape)), jnp.zeros((1,))
        y = jnp.zeros((1,), jnp.int32)
        return Transformer(self).init(key, x, t, t, y, method="everything")["params"]

    def cast(self, params: Params) -> Params:
        """Parameters, or a gradient by them, with the kernels of the blocks in the dtype that their
        gradients are collected in."""
        heads = {name: {**params[name], "blocks": cast_blocks(self, params[name]["blocks"])}
                 for name in ("v_head", "wide_head") if name in params}
        return {**params, "blocks": cast_blocks(self, params["blocks"]), **heads}

    def apply(self, params: Params, x_t: Images, t: Times, r: Times, y: Any) -> Images:
        """The average velocity u(x_t, t, r, y).

        Args:
          params: parameters, as `init` returns them.
          x_t: [b, input_size, input_size, channels].
          t: [b] times of x_t, in [0, 1].
          r: [b] target times, 0 <= r <= t.
          y: [b] int labels in [0, num_classes], where num_classes is the null label; or a
            `dmf.types.Condition`.

        Returns:
          [b, input_size, input_size, channels] in the dtype of x_t.

        Raises:
          InputError: x_t is of another shape.
        """
        check_input(self, x_t)
        predicted = Transformer(self).apply({"params": params}, x_t, t, r, y)
        return velocity_of(self, predicted, x_t, t).astype(x_t.dtype)

    def encode(self, params: Params, x_t: Images, t: Times, y: Any) -> Hidden:
        """The part of the network that does not depend on r; arguments as of `apply`."""
        check_input(self, x_t)
        tokens = Transformer(self).apply({"params": params}, x_t, t, y, method="encode")
        needed = x_t if self.wide_head.depth else input_of_prediction(self, x_t)
        return Hidden(tokens, t, needed)

    def decode(self, params: Params, hidden: Hidden, r: Times, y: Any) -> Images:
        """u(x_t, t, r, y) [b, h, w, c], float32, from `hidden = encode(params, x_t, t, y)`."""
        tokens, t, x_t = hidden
        predicted = Transformer(self).apply(
            {"params": params}, tokens, t, r, y, x_t, method="decode"
        )
        return velocity_of(self, predicted, x_t, t)

    def decode_heads(
        self, params: Params, hidden: Hidden, r: Times, y: Any
    ) -> tuple[Images, Images]:
        """(u, v) of one pass, each as `decode` returns u.

        Raises:
          InputError: the network has no velocity head.
        """
        if not self.velocity_head:
            raise no_velocity_head(self)
        (tokens, t, x_t), variables = hidden, {"params": params}
        heads = Transformer(self).apply(variables, tokens, t, r, y, method="decode_heads")
        u, v = (velocity_of(self, predicted, x_t, t) for predicted in heads)
        return u, v

    def apply_with_features(
        self, params: Params, x_t: Images, t: Times, r: Times, y: Any
    ) -> tuple[Images, Features]:
        """u as `apply` returns it, and the projected tokens [b, l, alignment_width] after block
        `alignment_depth`, float32."""
        check_input(self, x_t)
        transformer, variables = Transformer(self), {"params": params}
        predicted, projected = transformer.apply(variables, x_t, t, r, y, method="with_features")
        u = velocity_of(self, predicted, x_t, t)
        return u.astype(x_t.dtype), projected.astype(jnp.float32)

    def log_variance(self, params: Params, t: Times, r: Times) -> PerSample:
        """The learned log of the expected squared error at (t, r): [b] float32."""
        return Transformer(self).apply({"params": params}, t, r, method="variance")
