"""The tangent of the MeanFlow identity: along which velocity u is differentiated, by what means,
and how du/dt is bounded.

The target of MeanFlow contains du/dt, a derivative of the network that is being trained. Early in
training, and where t - r is large, it can dwarf everything else; the settings here bound it.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dmf.errors import InputError, check_between, check_choice
from dmf.objectives.interpolants import per_sample
from dmf.types import Images, PerSample

VELOCITIES = ("guided", "predicted")


def root_mean_square(x: Images) -> PerSample:
    """[b] root mean square of each sample, in float32.

    >>> root_mean_square(jnp.full((1, 8, 8, 1), -2.0)).tolist()
    [2.0]
    """
    return jnp.sqrt(jnp.mean(x.astype(jnp.float32) ** 2, axis=(1, 2, 3)))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tangent:
    """The derivative du/dt in the target of MeanFlow.

    Attributes:
      velocity: the velocity v of the tangent (v, 1, 0). "guided": the guided velocity that is
        regressed on (MeanFlow, arXiv:2505.13447). "predicted": the network's own velocity
        u(x_t, t, t, y), so that the loss regresses V = u + (t - r) sg(du/dt), a function of x_t
        alone, on the guided velocity (improved MeanFlow, arXiv:2512.02012).
      finite_difference: step h of the central difference (f(+h) - f(-h)) / 2h that replaces
        jax.jvp: a check, and a way out for networks without forward mode; 1e-2 is near the best in
        float32, 1e-5 the least. 0 for jax.jvp.
      max_rms: largest root mean square of du/dt of a sample, which is scaled down to it; 0 for no
        bound.
      normalization: c >= 1e-6 replaces du/dt by du/dt / (its root mean square + c) (sCM,
        arXiv:2410.11081, has 0.1); 0 for none.
      warmup_steps: training steps over which the weight of du/dt rises linearly from 0 to 1 (sCM,
        arXiv:2410.11081); 0 for none.
    """

    velocity: str = "guided"
    finite_difference: float = 0.0
    max_rms: float = 0.0
    normalization: float = 0.0
    warmup_steps: int = 0

    def __post_init__(self):
        check_choice(self, "velocity", VELOCITIES)
        for name in ("finite_difference", "max_rms", "normalization", "warmup_steps"):
            if not getattr(self, name) >= 0:
                raise InputError(name, getattr(self, name), "give 0 (none) or more")
        # Times lie in [0, 1]; a larger normalization leaves nothing of du/dt.
        check_between(self, 0.0, 1.0, "finite_difference")
        check_between(self, 0.0, 1e6, "normalization")
        check_between(self, 0, 10**7, "warmup_steps")
        # Below, float32 has nothing left of a difference, or divides 0 by 0.
        for name, least in (("finite_difference", 1e-5), ("normalization", 1e-6)):
            if 0 < getattr(self, name) < least:
                raise InputError(name, getattr(self, name), f"give 0 (none), or at least {least}")
        if self.max_rms and self.normalization:
            raise InputError(
                "max_rms", self.max_rms,
                f"together with normalization={self.normalization} du/dt would be bounded twice; "
                "set one of them to 0",
            )

    @property
    def is_predicted(self) -> bool:
        """Whether the tangent goes along the network's own velocity."""
        return self.velocity == "predicted"

    def weight(self, step: jax.Array | int | None) -> Float[Array, ""] | None:
        """The weight of du/dt at a training step, in [0, 1]; None where it is 1 throughout."""
        if not self.warmup_steps or step is None:
            return None
        return jnp.minimum(jnp.asarray(step, jnp.float32) / self.warmup_steps, 1.0)

    def bound(self, du_dt: Images, weight: PerSample | None) -> Images:
        """du/dt as it enters the target: scaled down or normalized, then weighted by `weight`."""
        rms = root_mean_square(du_dt)
        if self.max_rms:
            du_dt *= per_sample(jnp.minimum(1.0, self.max_rms / jnp.maximum(rms, 1e-12)), du_dt)
        if self.normalization:
            du_dt /= per_sample(rms + self.normalization, du_dt)
        return du_dt if weight is None else per_sample(weight, du_dt) * du_dt

    def central_difference(
        self, function: Callable[..., Images], primals: Any, tangents: Any
    ) -> tuple[Images, Images]:
        """The value of a function and its derivative along tangents, by a central difference.

        Args:
          function: of the arrays in `primals`.
          primals, tangents: tuples of arrays, as for `jax.jvp`.
        """
        ahead, behind = (
            function(*(x + sign * self.finite_difference * dx
                       for x, dx in zip(primals, tangents, strict=True)))
            for sign in (1, -1)
        )
        return function(*primals), (ahead - behind) / (2 * self.finite_difference)
