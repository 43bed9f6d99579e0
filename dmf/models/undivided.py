"""A network given by `init` and `apply` alone, for objectives and samplers to use all the same."""

import functools

import jax
import jax.numpy as jnp

from dmf.typing import Condition, Flops, Images, InputError, Params, Times

Whole = tuple[jax.Array, jax.Array]


class Undivided:
    """What a `Network` has beside `num_classes`, `sample_shape`, `init` and `apply`, for networks
    without a part that r plays no part in: `encode` leaves all to `decode`, at the price of what
    `dmf.work` would have shared."""

    encoder_depth = 0
    recomputes = False

    def encode(self, params: Params, x_t: Images, t: Times, y: Condition) -> Whole:
        """x_t and t as they are."""
        del params, y
        return x_t, t

    def decode(self, params: Params, hidden: Whole, r: Times, y: Condition) -> Images:
        """All of the network."""
        x_t, t = hidden
        return self.apply(params, x_t, t, r, y)

    @functools.cached_property
    def flops(self) -> Flops:
        """Of one sample, as XLA counts them; 0 where it does not."""
        x = jax.ShapeDtypeStruct((1, *self.sample_shape), jnp.float32)
        t, y = (jax.ShapeDtypeStruct((1,), dtype) for dtype in (jnp.float32, jnp.int32))
        params = jax.eval_shape(self.init, jax.random.key(0))
        # For one platform, so that it can be asked for while something else is being compiled.
        program = jax.jit(self.apply).trace(params, x, t, t, y)
        cost = program.lower(lowering_platforms=("cpu",)).cost_analysis() or {}
        return Flops(encode=0.0, decode=float(cost.get("flops", 0.0)))

    def apply_with_features(self, *inputs: object) -> None:
        """Raises InputError: there are no inner features to align."""
        raise InputError(f"objective.alignment_coefficient: {type(self).__name__} has no features "
                         "to align; set it to 0")

    def log_variance(self, *inputs: object) -> None:
        """Raises InputError: there is no log-variance head."""
        raise InputError(f"objective.weighting: {type(self).__name__} learns no variance; choose "
                         "uniform or adaptive")
