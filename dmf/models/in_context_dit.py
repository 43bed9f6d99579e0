"""The in-context transformer of improved MeanFlow and pixel MeanFlow.

Class, guidance and interval h = t - r are tokens in front of the patches (improved MeanFlow,
arXiv:2512.02012); t itself is not an input. A trunk of blocks ends in two heads of the same size:
the average velocity u, and the instantaneous velocity v, which guides training and which sampling
does not need. For pixels (pixel MeanFlow, arXiv:2601.22158) the heads predict data
(`dmf.models.prediction`), patches are embedded through a bottleneck, and positions are those of a
grid.

- "meanflow": the tokens of h hold the embedding of h in every block.
- "decoupled": they hold the embedding of 0 in the first `split_depth` blocks; then its difference
  to that of h is added.
  At r = t this is the "meanflow" network with the same parameters.

As in `dmf.models.dit`, `encode` ends before the first block that depends on r.
"""

import dataclasses
import functools
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from dmf.errors import check_between, check_choice, check_valid
from dmf.models.attention.attention import IMPLEMENTATIONS
from dmf.models.block_stack import REMAT_POLICIES
from dmf.models.in_context_transformer import (
    PREFIX_TOKENS,
    BlockStack,
    InContextTransformer,
    mlp_width,
)
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
from dmf.types import (
    COMPUTE_DTYPES,
    Flops,
    Images,
    Params,
    PRNGKey,
    Times,
)

CONDITIONINGS = ("meanflow", "decoupled")
POSITIONS = ("rotary", "rotary_2d")
# The names of the heads in the parameters: of u and of v.
HEADS = ("u_head", "v_head")
# Improved MeanFlow at patch size 2, head_depth 8 (arXiv:2512.02012).
SIZES = {
    "B": {"depth": 12, "width": 768, "heads": 12},
    "M": {"depth": 24, "width": 768, "heads": 12},
    "L": {"depth": 32, "width": 1024, "heads": 16},
    "XL": {"depth": 48, "width": 1024, "heads": 16},
}
# Pixel MeanFlow at patch size 16 for 256 x 256 and 32 for 512 x 512 (arXiv:2601.22158).
PIXEL_SIZES = {
    "B": {"depth": 16, "width": 768, "heads": 12, "patch_bottleneck": 128},
    "L": {"depth": 32, "width": 1024, "heads": 16, "patch_bottleneck": 128},
    "H": {"depth": 48, "width": 1280, "heads": 16, "patch_bottleneck": 256},
}


class Hidden(NamedTuple):
    """The output of `InContextDiT.encode`.

    Attributes:
      tokens: [b, l, d] in the dtype of the network: the prefix, then the patches.
      t: [b] times of x_t.
      x_t: the input of the network; None where its heads predict velocities.
    """

    tokens: jax.Array
    t: jax.Array
    x_t: jax.Array | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class InContextDiT(SimpleNetwork):
    """A transformer whose conditions are tokens, with two heads; a `dmf.types.Network`.

    >>> model = InContextDiT(input_size=4, channels=4, depth=2, head_depth=1, width=16, heads=2,
    ...                      num_classes=10)
    >>> params = jax.jit(model.init)(jax.random.key(0))
    >>> x_t, t, r = jnp.ones((3, 4, 4, 4)), jnp.ones(3), jnp.zeros(3)
    >>> u, v = jax.jit(model.apply_heads)(params, x_t, t, r, jnp.array([0, 7, 10]))
    >>> u.shape, v.shape
    ((3, 4, 4, 4), (3, 4, 4, 4))

    Attributes:
      input_size: height and width of the input, a multiple of `patch_size`; -1 in a config for
        those of the dataset.
      channels: channels of the input and output, >= 1; -1 in a config for those of the dataset.
      patch_size: height and width of a patch, which becomes one token; >= 1; published: 2 for
        latents, 16 and 32 for pixels.
      patch_bottleneck: channels that patches are reduced to before they are embedded; 0 for none;
        published for pixels: 128, and 256 for widths above 1024.
      depth: blocks of the trunk and of one head together; published: B 12, M 24, L 32, XL 48, for
        pixels B 16, L 32, H 48.
      head_depth: blocks of each head, 1 to `depth` - 1; published: 8.
      width: width of the tokens, a multiple of `heads`; published: B and M 768, L and XL 1024, H
        1280. The hidden width of the MLPs is 8/3 of it, rounded down; above 1024, that rounded up
        to a multiple of 8.
      heads: number of attention heads; published: B and M 12, L, XL and H 16.
      num_classes: number of class labels, 0 for an unconditional network; -1 in a config for that
        of the dataset. The label embedding has one more row, for the null label.
      positions: "rotary" (rotary positions along the whole sequence) or "rotary_2d" (rotary
        positions of the row and the column of each patch, and a learned position table).
      prediction: what the heads predict: "velocity"; or "data" or "noise", of which the network
        makes velocities: u = (x_t - data) / max(t, `min_time`), and u = (noise - x_t) /
        max(1 - t, `min_time`).
      min_time: the least number that prediction="data" or "noise" divides by, from 1e-6 to 1.
      velocity_head: whether there is a second head, for v; sampling needs none.
      conditioning: "meanflow" (all blocks depend on h = t - r) or "decoupled" (the first
        `split_depth` do not).
      split_depth: number of blocks that do not depend on r, 0 to `depth` - `head_depth`, with
        conditioning="decoupled"; None otherwise.
      scan: whether blocks run in a `lax.scan`, which compiles faster than unrolled blocks.
      remat: what the backward pass recomputes: "none", "dots" (all but matmuls) or "full"
        (everything).
      dtype: dtype of the computation, "float32" or "bfloat16"; parameters are always float32.
      gradient_dtype: dtype in which the gradients of the blocks' kernels are collected, and summed
        over devices, where dtype is "bfloat16": "bfloat16" or "float32".
      attention: implementation of attention: "xla" (plain JAX operations), "flash" (kernels, on
        TPUs and NVIDIA GPUs) or "auto" (the faster one for the device and the number of tokens).
    """

    # The fields that a run shares with the checkpoint that it starts from.
    sizes: ClassVar[tuple[str, ...]] = (
        "input_size", "channels", "patch_size", "patch_bottleneck", "depth", "head_depth", "width",
        "heads", "num_classes", "positions", "prediction", "min_time",
    )  # fmt: skip
    label_parameters: ClassVar[tuple[str, ...]] = ("label_embedding",)
    guidance_input: ClassVar[bool] = True

    input_size: int
    channels: int
    patch_size: int = 2
    patch_bottleneck: int = 0
    depth: int
    head_depth: int = 8
    width: int
    heads: int
    num_classes: int
    positions: str = "rotary"
    prediction: str = "velocity"
    min_time: float = DEFAULT_MIN_TIME
    velocity_head: bool = True
    conditioning: str = "meanflow"
    split_depth: int | None = None
    scan: bool = True
    remat: str = "none"
    dtype: str = "float32"
    gradient_dtype: str = "bfloat16"
    attention: str = "auto"

    def __post_init__(self):
        self._check_sizes()
        self._check_conditioning()
        check_choice(self, "remat", REMAT_POLICIES)
        check_choice(self, "attention", IMPLEMENTATIONS)
        check_choice(self, "dtype", COMPUTE_DTYPES)
        check_choice(self, "gradient_dtype", COMPUTE_DTYPES)

    def _check_sizes(self) -> None:
        check = functools.partial(check_valid, self)
        check_between(self, 1, LARGEST_DEPTH, "depth")
        check_between(self, 1, LARGEST_SIZE, "input_size", "channels", "patch_size", "width",
                      "heads")
        check_between(self, 0, LARGEST_SIZE, "patch_bottleneck")
        check_between(self, 0, LARGEST_CLASSES, "num_classes")
        check_choice(self, "positions", POSITIONS)
        check(self.input_size % self.patch_size == 0, "patch_size",
              f"it must divide model.input_size={self.input_size}")
        check(1 <= self.head_depth < self.depth, "head_depth",
              f"give a whole number from 1 to {self.depth - 1}: model.depth={self.depth} counts "
              "the blocks of the trunk and of one head")
        pairs = 4 if self.positions == "rotary_2d" else 2
        check(self.width % (pairs * self.heads) == 0, "heads",
              f"it must divide model.width={self.width} into heads whose width is a multiple of "
              f"{pairs}, for model.positions={self.positions}")

    def _check_conditioning(self) -> None:
        check = functools.partial(check_valid, self)
        decoupled = self.conditioning == "decoupled"
        check_prediction_fields(self)
        check_choice(self, "conditioning", CONDITIONINGS)
        check(decoupled or self.split_depth is None, "split_depth",
              f"model.conditioning={self.conditioning} takes none; set it to decoupled")
        check(not decoupled or self.split_depth in range(self.trunk_depth + 1), "split_depth",
              f"the decoupled conditioning needs a whole number from 0 to {self.trunk_depth}, the "
              "depth of the trunk")

    @property
    def sample_shape(self) -> tuple[int, int, int]:
        """Shape (h, w, c) of one sample."""
        return self.input_size, self.input_size, self.channels

    @property
    def tokens(self) -> int:
        """Length of the sequence: prefix and patches."""
        return PREFIX_TOKENS + (self.input_size // self.patch_size) ** 2

    @property
    def trunk_depth(self) -> int:
        """Number of blocks before the heads."""
        return self.depth - self.head_depth

    @property
    def head_names(self) -> tuple[str, ...]:
        """The names of the heads in the parameters."""
        return HEADS if self.velocity_head else HEADS[:1]

    @property
    def encoder_depth(self) -> int:
        """Number of blocks before the first that depends on r; 0 for a MeanFlow network."""
        return self.split_depth or 0

    @property
    def full_remat(self) -> bool:
        """Whether the backward pass recomputes the whole forward pass."""
        return self.remat == "full"

    @property
    def flops(self) -> Flops:
        """Operations of the matmuls of one sample, 2 for a multiply-add."""
        width, length, patches = self.width, self.tokens, self.tokens - PREFIX_TOKENS
        linears = 2.0 * width * (4 * width + 3 * mlp_width(width)) * length
        block, values = linears + 4 * width * length**2, self.patch_size**2 * self.channels
        embedding = 2 * (256 + width) * width
        reduced = self.patch_bottleneck or values
        reduction = 2 * patches * values * reduced if self.patch_bottleneck else 0
        head = float(self.head_depth * block + 2 * patches * width * values)
        return Flops(
            encode=(reduction + 2 * patches * reduced * width + 3 * embedding
                    + self.encoder_depth * block),
            decode=embedding + (self.trunk_depth - self.encoder_depth) * block + head,
            velocity_head=head if self.velocity_head else 0.0,
        )

    def init(self, key: PRNGKey) -> Params:
        """Random parameters, float32: a nested dictionary, block parameters stacked by depth."""
        x, t = jnp.zeros((1, *self.sample_shape)), jnp.zeros((1,))
        y = jnp.zeros((1,), jnp.int32)
        return InContextTransformer(self).init(key, x, t, t, y)["params"]

    def cast(self, params: Params) -> Params:
        """Parameters, or a gradient by them, with the kernels of the blocks in the dtype that their
        gradients are collected in."""
        cast = BlockStack(self, self.depth).cast
        heads = {name: {**params[name], "blocks": cast(params[name]["blocks"])}
                 for name in self.head_names}
        return {**params, "blocks": cast(params["blocks"]), **heads}

    def apply(self, params: Params, x_t: Images, t: Times, r: Times, y: Any) -> Images:
        """The average velocity u(x_t, t, r, y).

        Args:
          params: parameters, as `init` returns them.
          x_t: [b, input_size, input_size, channels].
          t: [b] times of x_t, in [0, 1].
          r: [b] target times, 0 <= r <= t.
          y: [b] int labels in [0, num_classes], where num_classes is the null label; or a
            `dmf.types.Condition`. One without guidance has scale 1 in the interval [0, 1].

        Returns:
          [b, input_size, input_size, channels] in the dtype of x_t.

        Raises:
          InputError: x_t is of another shape.
        """
        return self.decode(params, self.encode(params, x_t, t, y), r, y).astype(x_t.dtype)

    def velocity(self, params: Params, x_t: Images, t: Times, y: Any) -> Images:
        """v(x_t, t, y) of the last head at r = t, as `apply` returns u: without a velocity head
        this is u(x_t, t, t, y)."""
        hidden = self.encode(params, x_t, t, y)
        return self._velocities(params, hidden, t, self.head_names[-1:])[0].astype(x_t.dtype)

    def encode(self, params: Params, x_t: Images, t: Times, y: Any) -> Hidden:
        """The part of the network that does not depend on r; arguments as of `apply`."""
        check_input(self, x_t)
        tokens = InContextTransformer(self).apply({"params": params}, x_t, y, method="encode")
        return Hidden(tokens, t, input_of_prediction(self, x_t))

    def decode(self, params: Params, hidden: Hidden, r: Times, y: Any) -> Images:
        """u(x_t, t, r, y) [b, h, w, c], float32, from `hidden = encode(params, x_t, t, y)`; the
        hidden tokens have what y says."""
        return self._velocities(params, hidden, r, HEADS[:1])[0]

    def decode_heads(
        self, params: Params, hidden: Hidden, r: Times, y: Any
    ) -> tuple[Images, Images]:
        """(u, v) of one pass, each as `decode` returns u.

        Raises:
          InputError: the network has no velocity head.
        """
        if not self.velocity_head:
            raise no_velocity_head(self)
        u, v = self._velocities(params, hidden, r, HEADS)
        return u, v

    def _velocities(
        self, params: Params, hidden: Hidden, r: Times, heads: tuple[str, ...]
    ) -> list[Images]:
        """The velocities of some heads [b, h, w, c], float32."""
        tokens, t, x_t = hidden
        predicted = InContextTransformer(self).apply(
            {"params": params}, tokens, t - r, *heads, method="decode"
        )
        return [velocity_of(self, predicted[name], x_t, t) for name in heads]
