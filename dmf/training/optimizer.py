"""The optimizers, and the learning-rate schedule that they share."""

import abc
import dataclasses
import functools
from typing import Any

import jax
import numpy as np
import optax

from dmf.errors import InputError, check_at_least, check_choice, check_valid
from dmf.training.apply_if_finite import apply_if_finite
from dmf.training.parameter_groups import Group, by_groups, check_groups

SCHEDULES = ("constant", "cosine", "linear", "wsd")
DEFAULT_DECAY_FRACTION = 0.2
_DECAY_RATE, _NONE = "a decay rate lies in [0, 1), in float32 too", "give 0, for none, or more"


def check_adam(optimizer: Any) -> None:
    """Raises InputError where a field of Adam (b1, b2, eps, weight_decay) is out of range."""
    check_decay_rates(optimizer, "b1", "b2")
    check_valid(optimizer, 0 < optimizer.eps <= 1e6, "eps", "it must be positive, and at most 1e6")
    check_weight_decay(optimizer)


def check_decay_rates(optimizer: Any, *names: str) -> None:
    """Raises InputError where a field is no decay rate in [0, 1), or is 1 in float32."""
    for name in names:
        rate = getattr(optimizer, name)
        check_valid(optimizer, 0 <= rate < 1 and np.float32(rate) < 1, name, _DECAY_RATE)


def check_weight_decay(optimizer: Any) -> None:
    """Raises InputError where the field `weight_decay` is out of range."""
    check_valid(optimizer, 0 <= optimizer.weight_decay <= 100, "weight_decay",
                f"{_NONE}, up to 100")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Optimizer(abc.ABC):
    """What all optimizers share: a learning-rate schedule, clipping of the gradient, parameter
    groups, skipped steps.

    A class derived from it defines `update_rule`, and checks its own fields. A field `weight_decay`
    is decoupled weight decay, multiplied by the learning rate.

    Attributes:
      learning_rate: peak learning rate, which the warm-up ends at; positive.
      clip_norm: maximum global norm of the gradient; 0 for no clipping.
      warmup_steps: number of steps over which the learning rate rises linearly from 0; 0 for no
        warm-up.
      schedule: learning rate after the warm-up: "constant"; "cosine" or "linear" decay to 0; or
        "wsd" (warm-up, stable, decay; arXiv:2404.06395): constant, then linear decay to 0.
      decay_steps: step at which the decay of any schedule but "constant" reaches 0, counted from
        the first step; greater than warmup_steps, and not before the last step of the run; 0 for
        the last step.
      decay_fraction: part of the steps from warmup_steps to decay_steps over which the schedule
        "wsd" decays, in (0, 1]; with 1 it is "linear".
      groups: parameter groups, each (pattern, learning-rate factor, weight-decay factor): a regular
        expression for whole paths, the number of a block second, for example
        (("blocks/(0|1)/.*", 0.5, 1), (".*/bias", 1, 0)). The factors of all groups that match a
        parameter are multiplied.
      skip_nonfinite: maximum number of consecutive steps that are skipped because their loss or
        gradient norm is not finite; one more ends the run; 0 skips none.
    """

    learning_rate: float = 1e-4
    clip_norm: float = 1.0
    warmup_steps: int = 0
    schedule: str = "constant"
    decay_steps: int = 0
    decay_fraction: float = DEFAULT_DECAY_FRACTION
    groups: tuple[Group, ...] = ()
    skip_nonfinite: int = 0

    def __post_init__(self):
        check_choice(self, "schedule", SCHEDULES)
        check_at_least(self, 0, "decay_steps")
        if self.schedule != "constant" and 0 < self.decay_steps <= self.warmup_steps:
            raise InputError("decay_steps", self.decay_steps, f"a {self.schedule} decay ends after "
                             f"warmup_steps={self.warmup_steps}")
        check = functools.partial(check_valid, self)
        check(self.schedule != "constant" or not self.decay_steps, "decay_steps",
              "schedule=constant does not decay; choose cosine, linear or wsd, or leave this at 0")
        check(0 < self.decay_fraction <= 1, "decay_fraction", "give a part of the steps in (0, 1]")
        check(self.schedule == "wsd" or self.decay_fraction == DEFAULT_DECAY_FRACTION,
              "decay_fraction", f"schedule={self.schedule} has none; choose wsd, or leave this at "
              f"{DEFAULT_DECAY_FRACTION}")
        check_groups(self)
        check(self.learning_rate >= 1e-12, "learning_rate", "it must be positive, at least 1e-12")
        check(self.clip_norm >= 0, "clip_norm", _NONE)
        check(0 <= self.warmup_steps <= 10**7, "warmup_steps", f"{_NONE}, up to 10^7")
        check(self.skip_nonfinite >= 0, "skip_nonfinite",
              "give 0, for none, or the maximum number of consecutive skipped steps")

    @abc.abstractmethod
    def update_rule(self) -> optax.GradientTransformation:
        """From clipped gradients to updates, whose learning rate is `rate`."""

    def for_run(self, steps: int) -> "Optimizer":
        """The optimizer of a run, whose decay ends at a step that is known.

        >>> AdamW(schedule="cosine").for_run(600).decay_steps
        600

        Args:
          steps: number of steps of the run.

        Raises:
          InputError: the decay would end before the run.
        """
        if self.schedule == "constant":
            return self
        if 0 < self.decay_steps < steps:
            raise InputError("decay_steps", self.decay_steps, "the learning rate would be 0 from "
                             f"there to run.steps={steps}; give {steps} or more, or 0 to decay "
                             "until the last step")
        # A short run may end within its warm-up.
        end = self.decay_steps or max(steps, self.warmup_steps + 1)
        return dataclasses.replace(self, decay_steps=end)

    def rate(self, step: jax.Array) -> jax.Array:
        """The learning rate of a training step.

        >>> optimizer = AdamW(learning_rate=0.1, warmup_steps=2, schedule="linear", decay_steps=6)
        >>> [round(float(optimizer.rate(jnp.int32(step))), 3) for step in (0, 1, 2, 4, 6)]
        [0.0, 0.05, 0.1, 0.05, 0.0]

        Args:
          step: int scalar, number of steps taken before this one.

        Returns:
          Float scalar in [0, learning_rate].

        Raises:
          InputError: the end of the decay is not known; `for_run` gives it.
        """
        if self.schedule != "constant" and not self.decay_steps:
            raise InputError("decay_steps", 0, "give the step at which the decay ends")
        length = max(self.decay_steps - self.warmup_steps, 1)
        decay = max(round(self.decay_fraction * length), 1)
        after_warmup = {
            "constant": optax.constant_schedule(self.learning_rate),
            "cosine": optax.cosine_decay_schedule(self.learning_rate, length),
            "linear": optax.linear_schedule(self.learning_rate, 0.0, length),
            "wsd": optax.linear_schedule(self.learning_rate, 0.0, decay, length - decay),
        }[self.schedule]
        warmup = optax.linear_schedule(0.0, self.learning_rate, max(self.warmup_steps, 1))
        return optax.join_schedules([warmup, after_warmup], [self.warmup_steps])(step)

    def transform(self) -> optax.GradientTransformation:
        """The gradient transformation of Optax.

        With `skip_nonfinite`, its `update` takes the keyword argument `finite` too, see
        `dmf.training.apply_if_finite`.
        """
        clip = optax.clip_by_global_norm(self.clip_norm) if self.clip_norm else optax.identity()
        rule = self._grouped_rule() if self.groups else self.update_rule()
        optimizer = optax.chain(clip, rule)
        return apply_if_finite(optimizer) if self.skip_nonfinite else optimizer

    def _grouped_rule(self) -> optax.GradientTransformation:
        """The update rule with the factors of the groups."""
        has_decay = "weight_decay" in {field.name for field in dataclasses.fields(self)}
        plain = dataclasses.replace(self, groups=(), **({"weight_decay": 0.0} if has_decay else {}))
        return optax.chain(plain.update_rule(), by_groups(self))


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdamW(Optimizer):
    """AdamW (arXiv:1711.05101) after clipping of the global gradient norm.

    Attributes:
      b1: decay rate of the first moment, in [0, 1).
      b2: decay rate of the second moment, in [0, 1).
      eps: term added to the root of the second moment for numerical stability; positive.
      weight_decay: decoupled weight decay, multiplied by the learning rate; 0 for none.
    """

    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.0

    def __post_init__(self):
        super().__post_init__()
        check_adam(self)

    def update_rule(self) -> optax.GradientTransformation:
        return optax.adamw(
            self.rate, b1=self.b1, b2=self.b2, eps=self.eps, weight_decay=self.weight_decay
        )
