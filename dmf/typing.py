"""The few types that everything else speaks: arrays, batches, networks and flow maps.

A flow map is a function `u(x_t, t, r, y)`: the average velocity between the times t and r, so
that `x_r = x_t + (r - t) u`. Time 0 is data and time 1 is noise, with 0 <= r <= t <= 1. Images
and latents are NHWC; times and per-sample losses are vectors of length b.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
from jaxtyping import Array, Bool, Float, Int, Key

Images = Float[Array, "b h w c"]
Times = Float[Array, "b"]
PerSample = Float[Array, "b"]
Labels = Int[Array, "b"]
Dropped = Bool[Array, "b"]
Features = Float[Array, "b n d"]
PRNGKey = Key[Array, ""]
PRNGKeys = Key[Array, "b"]
Params = Mapping[str, Any]
Metrics = dict[str, jax.Array]

FlowMap = Callable[[jax.Array, jax.Array, jax.Array, jax.Array], jax.Array]


class InputError(ValueError):
    """What a user gave cannot be used; one line says which field, its value and what would do."""


class RunError(RuntimeError):
    """A run cannot go on; one line says what happened, at which step, and what to do."""


class Stopped(RunError):
    """A run was told to stop, and has saved; the same command goes on.

    Attributes:
      exit_code: of a process that ends so: what sysexits.h calls a temporary failure.
    """

    exit_code = 75


class Lost(RunError):
    """Another process of the run is gone."""


class Damaged(RunError):
    """What is on disk is not what was saved."""


class Batch(NamedTuple):
    """Training samples.

    Attributes:
      x: [b, h, w, c] float32, data at t = 0: latents, or pixels in [-1, 1].
      y: [b] int32 labels in [0, num_classes); num_classes itself means "no label".
      features: [b, n, d] patch features of a frozen encoder, for representation alignment.
      images: [b, h, w, c] uint8, what x was made of, where features are yet to be computed.
    """

    x: jax.Array
    y: jax.Array
    features: jax.Array | None = None
    images: jax.Array | None = None


class GuidedLabels(NamedTuple):
    """Labels, and the guidance that is asked of a network which takes it as an input.

    Attributes:
      label: [b] int32, as in a batch.
      scale: [b] of the guidance, 1 for none.
      low, high: [b] ends of the closed interval of times in which it is meant.
    """

    label: jax.Array
    scale: jax.Array
    low: jax.Array
    high: jax.Array


Condition = Labels | GuidedLabels


class Flops(NamedTuple):
    """Floating-point operations of one sample through the two parts of a network."""

    encode: float
    decode: float

    @property
    def forward(self) -> float:
        """Of one forward pass."""
        return self.encode + self.decode


@runtime_checkable
class Network(Protocol):
    """A family of flow maps indexed by parameters; what objectives are written against."""

    @property
    def num_classes(self) -> int:
        """Number of labels; also the null label, which stands for "no label"."""
        ...

    @property
    def sample_shape(self) -> tuple[int, int, int]:
        """(h, w, c) of one sample."""
        ...

    @property
    def encoder_depth(self) -> int:
        """How many blocks `encode` runs: those before r comes in."""
        ...

    @property
    def recomputes(self) -> bool:
        """Whether a backward pass computes all of the forward pass again, for want of memory."""
        ...

    @property
    def flops(self) -> Flops:
        """Of one sample, counting 2 for a multiply-add."""
        ...

    def init(self, key: PRNGKey) -> Params:
        """Random parameters, float32."""
        ...

    def apply(self, params: Params, x_t: Images, t: Times, r: Times, y: Condition) -> Images:
        """Average velocity from t to r; the instantaneous one where r = t."""
        ...

    def encode(self, params: Params, x_t: Images, t: Times, y: Condition) -> Any:
        """What r plays no part in, as a pytree of arrays: `apply` is `decode` of it."""
        ...

    def decode(self, params: Params, hidden: Any, r: Times, y: Condition) -> Images:
        """Average velocity to r, from `hidden = encode(params, x_t, t, y)`."""
        ...

    def apply_with_features(
        self, params: Params, x_t: Images, t: Times, r: Times, y: Condition
    ) -> tuple[Images, Features]:
        """The average velocity, and the projected tokens of an inner block."""
        ...

    def log_variance(self, params: Params, t: Times, r: Times) -> PerSample:
        """The learned log of the expected squared error at (t, r)."""
        ...
