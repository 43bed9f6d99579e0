"""The base class of networks that define `init` and `apply` alone."""

import functools
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from dmf.errors import InputError
from dmf.types import ClassLabels, Condition, Flops, Images, Params, Times

Inputs = tuple[jax.Array, jax.Array]
# Beyond these, a number is a slip: not even shapes could be computed.
LARGEST_DEPTH, LARGEST_SIZE, LARGEST_CLASSES = 1024, 2**18, 2**24


def no_velocity_head(network: Any) -> InputError:
    """The error of a network that is asked for the output of a head that it lacks."""
    return InputError("model.velocity_head", False, f"this {type(network).__name__} predicts u "
                      "alone; choose a network with a velocity head and set it to True")


def check_input(network: Any, x_t: Images) -> None:
    """Raises InputError where x_t has not the shape that a network takes."""
    if x_t.shape[1:] != network.sample_shape:
        raise InputError(
            f"x_t has shape {x_t.shape}",
            remedy=f"this network takes [b, {', '.join(map(str, network.sample_shape))}]",
        )


class SimpleNetwork:
    """A base class for networks, with all of `dmf.types.Network` but `num_classes`, `sample_shape`,
    `init` and `apply`.

    It is for networks that are not divided into a part before r and a part after: `encode` returns
    its inputs and `decode` runs the whole network. Every objective and sampler works with it, but
    compute sharing saves nothing. `apply` receives class labels or a condition, so it begins with
    `y = self.condition(y)`.

    >>> class Linear(SimpleNetwork):
    ...     num_classes, sample_shape = 0, (2, 2, 1)
    ...
    ...     def init(self, key):
    ...         return {"w": jax.random.normal(key, ())}
    ...
    ...     def apply(self, params, x_t, t, r, y):
    ...         return params["w"] * x_t
    >>> network = Linear()
    >>> params = network.init(jax.random.key(0))
    >>> x_t, t, r, y = jnp.ones((3, 2, 2, 1)), jnp.ones(3), jnp.zeros(3), jnp.zeros(3, jnp.int32)
    >>> hidden = network.encode(params, x_t, t, y)
    >>> bool((network.decode(params, hidden, r, y) == network.apply(params, x_t, t, r, y)).all())
    True
    """

    # Parameters that a run may have and its initial checkpoint may lack.
    added_by_training = ("log_variance", "projector")
    # Parameters at the top whose shapes depend on the number of classes.
    label_parameters: ClassVar[tuple[str, ...]] = ()
    guidance_input = False
    velocity_head = False
    prediction = "velocity"
    min_time = 0.05
    encoder_depth = 0
    full_remat = False

    def cast(self, params: Params) -> Params:
        """The parameters, unchanged."""
        return params

    def condition(self, y: Any) -> Condition:
        """Class labels [b] as a condition; a condition is returned as it is."""
        return y if isinstance(y, Condition) else ClassLabels(y, self.num_classes)

    def encode(self, params: Params, x_t: Images, t: Times, y: Any) -> Inputs:
        """The inputs (x_t, t), unchanged."""
        del params, y
        return x_t, t

    def decode(self, params: Params, hidden: Inputs, r: Times, y: Any) -> Images:
        """The average velocity u(x_t, t, r, y) [b, h, w, c] from hidden = (x_t, t)."""
        x_t, t = hidden
        return self.apply(params, x_t, t, r, y)

    def apply_heads(
        self, params: Params, x_t: Images, t: Times, r: Times, y: Any
    ) -> tuple[Images, Images]:
        """(u, v) of one pass, each as `apply` returns u.

        Raises:
          InputError: the network has no velocity head.
        """
        u, v = self.decode_heads(params, self.encode(params, x_t, t, y), r, y)
        return u.astype(x_t.dtype), v.astype(x_t.dtype)

    def velocity(self, params: Params, x_t: Images, t: Times, y: Any) -> Images:
        """The velocity v of the second head at r = t; without one u(x_t, t, t, y)."""
        if self.velocity_head:
            return self.apply_heads(params, x_t, t, t, y)[1]
        return self.apply(params, x_t, t, t, y)

    def decode_heads(self, *inputs: object) -> None:
        """Not available; a network with a velocity head overrides it.

        Raises:
          InputError: always, as there is no velocity head.
        """
        raise no_velocity_head(self)

    @functools.cached_property
    def flops(self) -> Flops:
        """Operations of one sample as XLA counts them, all in `decode`; 0 if XLA gives no count."""
        x = jax.ShapeDtypeStruct((1, *self.sample_shape), jnp.float32)
        t = jax.ShapeDtypeStruct((1,), jnp.float32)
        params = jax.eval_shape(self.init, jax.random.key(0))
        # Lowered for one fixed platform, so that it also works while a program is traced for
        # another.
        program = jax.jit(self.apply).trace(params, x, t, t, self.example_condition())
        cost = program.lower(lowering_platforms=("cpu",)).cost_analysis() or {}
        return Flops(encode=0.0, decode=float(cost.get("flops", 0.0)))

    def example_condition(self) -> Condition:
        """A condition of one sample, for tracing; override it if conditions are not labels."""
        return self.condition(jnp.zeros((1,), jnp.int32))

    def apply_with_features(self, *inputs: object) -> None:
        """Not available.

        Raises:
          InputError: always, as there are no inner features to align.
        """
        raise InputError(
            "objective.alignment_coefficient",
            remedy=f"{type(self).__name__} has no features to align; set it to 0",
        )

    def log_variance(self, *inputs: object) -> None:
        """Not available.

        Raises:
          InputError: always, as there is no log-variance head.
        """
        raise InputError(
            "objective.weighting",
            remedy=f"{type(self).__name__} learns no variance; choose uniform or adaptive",
        )
