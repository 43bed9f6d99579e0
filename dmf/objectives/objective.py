"""What an objective is: random draws, then a loss for each sample.

An objective draws its randomness in one place, `draw(key, batch, step)`, and computes from it one
loss a sample and a dictionary of metrics a sample: a pure function of its inputs, in which no
sample sees another. `frozen_params` holds parameters that are not trained; {"teacher": ...} where
the guidance is that of a teacher.

A loss may be a weighted sum of terms, each with forward passes of its own. The training step then
differentiates one term after the other, so that what a backward pass stores is that of one term.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp

from dmf.errors import InputError
from dmf.types import Batch, Metrics, Network, Params, PerSample, PRNGKey

# The end of the names of metrics that are sums by bins of time, see `dmf.objectives.time_bins`.
BINS = "_bins"
# Metrics that the training step adds to those of an objective.
_OF_THE_STEP = ("loss", "gradient_norm", "learning_rate")


class Term(NamedTuple):
    """One term of a loss.

    Attributes:
      loss: (params, *inputs) -> [b] losses, and metrics of each sample.
      inputs: pytrees of arrays that carry no gradient.
      weight: factor of the term in the sum.
    """

    loss: Callable[..., tuple[PerSample, Metrics]]
    inputs: tuple[Any, ...]
    weight: float = 1.0


class Sum(tuple[Term, ...]):
    """A sum of terms, written as in the papers: `(Sum([a]) + Sum([b])) / 2`.

    >>> loss = lambda params, x: (params["scale"] * x, {"x": x})
    >>> a, b = (Sum([Term(loss, (jnp.array([x]),))]) for x in (1.0, 3.0))
    >>> losses, metrics = ((a + b) / 2).value({"scale": 2.0})
    >>> losses.tolist()
    [4.0]
    """

    def __add__(self, other: "Sum") -> "Sum":
        return Sum((*self, *other))

    def __truediv__(self, divisor: float | int) -> "Sum":
        return Sum(term._replace(weight=term.weight / divisor) for term in self)

    def value(self, params: Params) -> tuple[PerSample, Metrics]:
        """[b] losses, and the metrics of all terms."""
        losses, metrics = zip(*(term.loss(params, *term.inputs) for term in self), strict=True)
        total = sum(term.weight * each for term, each in zip(self, losses, strict=True))
        return total, {name: value for each in metrics for name, value in each.items()}


@runtime_checkable
class Objective(Protocol):
    """Draws, then losses. A class that is derived from this needs `draw`, `loss` and `flops`; or
    `terms` in place of `loss`, where the loss is a sum.

    Attributes:
      learned_variance: whether the network needs its log-variance head.
      alignment: whether batches need features to align with.
      needs_teacher: whether `frozen_params` must hold a teacher, of the network `teacher`.
      needs_r: whether it trains u at r < t, for which the network must see r.
      guidance_input: whether it gives the network a guidance drawn for each sample, as an input.
      velocity_head: whether it trains a second head of the network, which predicts the velocity.
      differentiate_tangent: whether its gradient goes through a derivative of the network.
      target_ema: name of the EMA whose parameters `frozen_params["target"]` holds; "" for none.
    """

    learned_variance: bool = False
    alignment: bool = False
    needs_teacher: bool = False
    needs_r: bool = False
    guidance_input: bool = False
    velocity_head: bool = False
    differentiate_tangent: bool = False
    target_ema: str = ""

    def draw(
        self, key: PRNGKey, batch: Batch, step: jax.Array | None = None
    ) -> Any:
        """All that is random in a loss, and what depends on the training step.

        Args:
          key: of this step; it determines all draws.
          batch: the samples.
          step: number of the training step; None stands for one after every warm-up.

        Returns:
          A pytree of arrays [b, ...], such as `Draws`, which `loss` and `terms` are given.
        """
        ...

    def loss(
        self,
        network: Network,
        params: Params,
        batch: Batch,
        draws: Any,
        frozen_params: Mapping[str, Params],
    ) -> tuple[PerSample, Metrics]:
        """One loss a sample [b], and metrics of each sample."""
        if type(self).terms is Objective.terms:
            raise NotImplementedError(f"{type(self).__name__} needs a loss, or its terms")
        return self.terms(network, params, batch, draws, frozen_params).value(params)

    def terms(
        self,
        network: Network,
        params: Params,
        batch: Batch,
        draws: Any,
        frozen_params: Mapping[str, Params],
    ) -> Sum:
        """The terms of the loss; by default the loss is the only one. `params` are here for what
        carries no gradient, such as the velocities of the guidance."""

        def loss(params: Params, batch: Batch, draws: Any) -> Any:  # `terms_of` checks it
            return self.loss(network, params, batch, draws, frozen_params)

        return Sum([Term(loss, (batch, draws))])

    def for_run(self, steps: int) -> "Objective":
        """The objective of a run of so many steps; another than this one only where something
        depends on the length of the run and is not given."""
        del steps
        return self

    def flops(self, network: Network) -> float:
        """Operations that the loss and the gradient of a sample take, with nothing computed twice
        and nothing recomputed."""
        ...


def target_params(
    objective: Objective, params: Params, frozen_params: Mapping[str, Params]
) -> Params:
    """The parameters, without gradient, that the targets of an objective are computed with: those
    of its `target_ema`, or the ones that are trained."""
    return jax.lax.stop_gradient(frozen_params["target"] if objective.target_ema else params)


def terms_of(objective: Objective, *inputs: Any) -> Sum:
    """The terms of an objective's loss, each to be differentiated by itself.

    A class that is derived from a sum of terms and has a `loss` of its own is differentiated whole.

    Raises:
      InputError: a term gives no losses [b] or no metrics [b]; when its loss is computed.
    """
    classes = type(objective).__mro__
    rank = {name: next(i for i, cls in enumerate(classes) if name in vars(cls))
            for name in ("loss", "terms")}
    is_sum = rank["terms"] <= rank["loss"]
    terms = objective.terms(*inputs) if is_sum else Objective.terms(objective, *inputs)
    return Sum(term._replace(loss=_checked(type(objective).__name__, term)) for term in terms)


def _checked(name: str, term: Term) -> Callable[..., tuple[PerSample, Metrics]]:
    """The loss of a term of the objective that a class of this name defines, with a check of what
    it returns."""

    def loss(params: Params, *inputs: Any) -> Any:
        outputs, (first, *_) = term.loss(params, *inputs), jax.tree.leaves(inputs)
        check_outputs(name, outputs, first.shape[0])
        return outputs

    return loss


def check_outputs(name: str, outputs: Any, count: int) -> None:
    """Checks what a loss returns.

    >>> check_outputs("Huber", (jnp.float32(0.5), {}), count=16)
    Traceback (most recent call last):
    dmf.errors.InputError: objective=Huber: its loss has shape (); return one loss for each \
sample, here of shape (16,), as jnp.mean(error, axis=(1, 2, 3))

    Args:
      name: name of the class of the objective, for the error.
      outputs: what the loss returned.
      count: number of samples b.

    Raises:
      InputError: it is no pair of losses [b] and of metrics [b] by name.
    """
    is_pair = isinstance(outputs, tuple) and len(outputs) == 2
    if not is_pair or not isinstance(outputs[1], Mapping):
        raise InputError("objective", name, "its loss must return two things, the losses and a "
                         "dictionary of metrics: return loss, {}")
    losses, metrics = outputs
    if jnp.shape(losses) != (count,):
        raise InputError("objective", name, f"its loss has shape {jnp.shape(losses)}; return one "
                         f"loss for each sample, here of shape ({count},), as "
                         "jnp.mean(error, axis=(1, 2, 3))")
    for metric, values in metrics.items():
        if metric in _OF_THE_STEP:
            raise InputError("objective", name, f"its metric {metric} has the name of a metric of "
                             "the training step; choose another name")
        shape = jnp.shape(values)
        if shape != (count,) and not (metric.endswith(BINS) and shape[:1] == (count,)):
            raise InputError("objective", name, f"its metric {metric} has shape {shape}; give one "
                             f"value for each sample, here of shape ({count},)")
