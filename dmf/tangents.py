"""How a flow map is differentiated along its path: which way, by what means, how far it is trusted.

The target of MeanFlow holds du/dt, a derivative of the network that is being trained. Early on, and
where t - r is large, it can dwarf everything else; the settings here bound it.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dmf.flow import per_sample
from dmf.typing import Images, InputError, PerSample

DIRECTIONS = ("guided", "own")


def root_mean_square(x: Images) -> PerSample:
    """Of each sample, in float32."""
    return jnp.sqrt(jnp.mean(x.astype(jnp.float32) ** 2, axis=(1, 2, 3)))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tangent:
    """The derivative du/dt in the target of MeanFlow.

    Attributes:
      direction: "guided": along the guided velocity that is regressed on (MeanFlow,
        arXiv:2505.13447). "own": along the network's own velocity u(x_t, t, t, y), so that the
        loss regresses V = u + (t - r) sg(du/dt), a function of x_t alone, on the guided velocity
        (improved MeanFlow, arXiv:2512.02012).
      difference: half the step of a central difference in place of the exact derivative: a check,
        and a way out for networks that have none; 1e-2 is near the best in float32. 0 is exact.
      largest: per sample, what the root mean square of du/dt is cut down to; 0 for no bound.
      normalized: du/dt / (its root mean square + this); 0 for none (sCM, arXiv:2410.11081, has
        0.1).
      warmup_steps: over which du/dt is faded in, linearly from 0 (sCM, the same).
    """

    direction: str = "guided"
    difference: float = 0.0
    largest: float = 0.0
    normalized: float = 0.0
    warmup_steps: int = 0

    def __post_init__(self):
        if self.direction not in DIRECTIONS:
            raise InputError(f"direction={self.direction}: choose one of {', '.join(DIRECTIONS)}")
        for name in ("difference", "largest", "normalized", "warmup_steps"):
            if not getattr(self, name) >= 0:
                raise InputError(f"{name}={getattr(self, name)}: give 0 (none) or more")
        if self.largest and self.normalized:
            raise InputError(f"largest={self.largest} and normalized={self.normalized}: choose "
                             "one, set the other to 0")

    @property
    def own(self) -> bool:
        """Whether it takes the network's own velocity."""
        return self.direction == "own"

    def strength(self, step: jax.Array | int | None) -> Float[Array, ""] | None:
        """How much of du/dt counts at a step of training, from 0 to 1; None is all of it."""
        if not self.warmup_steps or step is None:
            return None
        return jnp.minimum(jnp.asarray(step, jnp.float32) / self.warmup_steps, 1.0)

    def bounded(self, du_dt: Images, strength: PerSample | None) -> Images:
        """What stands for du/dt in the target."""
        size = root_mean_square(du_dt)
        if self.largest:
            du_dt *= per_sample(jnp.minimum(1.0, self.largest / jnp.maximum(size, 1e-12)), du_dt)
        if self.normalized:
            du_dt /= per_sample(size + self.normalized, du_dt)
        return du_dt if strength is None else per_sample(strength, du_dt) * du_dt

    def differential(self, function: Callable[..., Any], at: Any, along: Any) -> tuple[Any, Any]:
        """The value of a function and its derivative in a direction, as `jax.jvp` gives them.

        Args:
          function: of the arguments in `at`.
          at: arguments, a tuple of arrays.
          along: their tangents.
        """
        if not self.difference:
            return jax.jvp(function, at, along)
        ahead, behind = (
            function(*(x + side * self.difference * dx for x, dx in zip(at, along, strict=True)))
            for side in (1, -1)
        )
        # What is subtracted carries no gradient, as du/dt carries none.
        return function(*at), (ahead - behind) / (2 * self.difference)
