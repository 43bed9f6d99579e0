"""What training carries from step to step, made sharded and never whole on one device."""

from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from dmf.sharding import parameter_shardings, replicated, state_shardings
from dmf.typing import Params


@flax.struct.dataclass
class TrainState:
    """The state of a run after `step` updates.

    Leaves may also be shapes or shardings.

    Attributes:
      step: int32 scalar.
      params: of the network, float32.
      optimizer: of the optimizer.
      averages: exponential moving averages of the parameters, by name.
    """

    step: Any
    params: Any
    optimizer: Any
    averages: Any


def initial(params: Params, optimizer: optax.GradientTransformation, emas: list[str]) -> TrainState:
    """The state before the first step; averages start at the parameters."""
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        optimizer=optimizer.init(params),
        averages={name: jax.tree.map(jnp.array, params) for name in emas},
    )


def shardings(mesh: Mesh, abstract: TrainState) -> TrainState:
    """Where each leaf of a state lives."""
    return TrainState(
        step=replicated(mesh),
        params=parameter_shardings(mesh, abstract.params),
        optimizer=state_shardings(mesh, abstract.optimizer),
        averages=state_shardings(mesh, abstract.averages),
    )


def with_shardings(abstract: Any, where: Any) -> Any:
    """A tree of shapes that knows where it will live, for restoring into."""
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        abstract,
        where,
    )


def create(make: Callable[..., TrainState], mesh: Mesh, *inputs: Any) -> TrainState:
    """Runs `make` under jit so that each device makes only its own part."""
    where = shardings(mesh, jax.eval_shape(make, *inputs))
    return jax.jit(make, out_shardings=where)(*inputs)
