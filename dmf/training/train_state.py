"""The train state: the arrays that training carries from step to step, sharded from the start."""

from collections.abc import Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from dmf.runtime.sharding import parameter_shardings, replicated, state_shardings
from dmf.types import Params


@flax.struct.dataclass
class TrainState:
    """The state of a run after `step` updates.

    Leaves may also be shapes or shardings.

    Attributes:
      step: int32 scalar, number of updates.
      params: parameters of the network, float32.
      opt_state: state of the optimizer.
      ema_params: exponential moving averages of the parameters, by name.
    """

    step: Any
    params: Any
    opt_state: Any
    ema_params: Any

    @property
    def trees(self) -> dict[str, Any]:
        """The trees of arrays that a checkpoint stores, by name."""
        emas = {f"{EMA_PREFIX}{name}": params for name, params in self.ema_params.items()}
        return {"params": self.params, "opt_state": self.opt_state, **emas}

    def with_trees(self, step: Any, trees: dict[str, Any]) -> "TrainState":
        """The state at a step with the trees of a checkpoint, named as in `trees`."""
        emas = {name: trees[f"{EMA_PREFIX}{name}"] for name in self.ema_params}
        return TrainState(step, trees["params"], trees["opt_state"], emas)


# The tree of the EMA parameters "main" is stored as "ema_params_main".
EMA_PREFIX = "ema_params_"


def initial_train_state(
    params: Params, optimizer: optax.GradientTransformation, ema_names: Sequence[str]
) -> TrainState:
    """The state before the first step.

    Args:
      params: initial parameters.
      optimizer: the gradient transformation.
      ema_names: names of the EMAs, which start at the parameters.
    """
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        opt_state=optimizer.init(params),
        ema_params={name: jax.tree.map(jnp.array, params) for name in ema_names},
    )


def train_state_shardings(mesh: Mesh, abstract: TrainState) -> TrainState:
    """The sharding of each leaf of a train state.

    Args:
      mesh: devices.
      abstract: the state as shapes.
    """
    return TrainState(
        step=replicated(mesh),
        params=parameter_shardings(mesh, abstract.params),
        opt_state=state_shardings(mesh, abstract.opt_state),
        ema_params=state_shardings(mesh, abstract.ema_params),
    )
