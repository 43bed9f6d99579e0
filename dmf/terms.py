"""A loss that is a sum of terms, and its gradient one term after the other.

What the backward pass of a term keeps is gone before the next begins, so that a step takes the
memory of its largest term and not that of their sum.
"""

import abc
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import optax

from dmf.draws import DecoupledDraws, Draws
from dmf.typing import Batch, Metrics, Network, Params, PerSample, PRNGKey


class Term(NamedTuple):
    """One of the terms that add up to a loss.

    Attributes:
      loss: (params, *inputs) -> one value a sample, and metrics.
      inputs: pytrees of arrays, which carry no gradient.
    """

    loss: Callable[..., tuple[PerSample, Metrics]]
    inputs: tuple[Any, ...]


def total(terms: Sequence[Term], params: Params) -> tuple[PerSample, Metrics]:
    """The sum of terms, and the metrics of all."""
    losses, metrics = zip(*(term.loss(params, *term.inputs) for term in terms), strict=True)
    return sum(losses), {name: value for each in metrics for name, value in each.items()}


@runtime_checkable
class Objective(Protocol):
    """Draws, then losses. One that is derived from this needs `draw`, `loss` and `flops` alone.

    Attributes:
      learned_variance: whether the network needs its log-variance head.
      alignment: whether batches need features to align with.
      needs_teacher: whether `frozen` must hold a teacher, of the network `teacher`.
    """

    learned_variance: bool = False
    alignment: bool = False
    needs_teacher: bool = False

    def draw(
        self, key: PRNGKey, batch: Batch, step: jax.Array | None = None
    ) -> Draws | DecoupledDraws:
        """What is random in a loss, and what depends on the step of training; without a step,
        as after any warm-up."""
        ...

    def loss(
        self,
        network: Network,
        params: Params,
        batch: Batch,
        draws: Draws | DecoupledDraws,
        frozen: Mapping[str, Params],
    ) -> tuple[PerSample, Metrics]: ...

    def flops(self, network: Network) -> float:
        """What a sample's loss and gradient take at least, with nothing computed twice."""
        ...


class Summed(Objective):
    """An objective whose loss is a sum. One that is derived from this needs `draw`, `terms` and
    `flops` alone; the training step differentiates one term after the other (`dmf.terms`)."""

    @abc.abstractmethod
    def terms(
        self,
        network: Network,
        params: Params,
        batch: Batch,
        draws: Draws | DecoupledDraws,
        frozen: Mapping[str, Params],
    ) -> list[Term]:
        """What adds up to the loss. The parameters are here for what carries no gradient."""

    def loss(
        self,
        network: Network,
        params: Params,
        batch: Batch,
        draws: Draws | DecoupledDraws,
        frozen: Mapping[str, Params],
    ) -> tuple[PerSample, Metrics]:
        return total(self.terms(network, params, batch, draws, frozen), params)


def terms_of(
    objective: Objective,
    network: Network,
    params: Params,
    batch: Batch,
    draws: Any,
    frozen: Mapping[str, Params],
) -> list[Term]:
    """The terms of an objective; its loss as the only one where that is no sum, or where a class
    derived from one that is has a loss of its own."""
    if isinstance(objective, Summed) and type(objective).loss is Summed.loss:
        return objective.terms(network, params, batch, draws, frozen)

    def loss(params: Params, batch: Batch, draws: Any) -> tuple[PerSample, Metrics]:
        return objective.loss(network, params, batch, draws, frozen)

    return [Term(loss, (batch, draws))]


def mean_gradient(
    terms: Sequence[Term], params: Params, seen: Callable[[Params], Params] = lambda params: params
) -> tuple[Params, Metrics]:
    """The gradient of the mean over samples, and the means of metrics and of `loss`.

    Args:
      terms: what adds up to the loss.
      params: what it is differentiated by.
      seen: of the parameters, what the loss is a function of.
    """

    def mean(params: Params, term: Term, inputs: Any) -> tuple[jax.Array, Metrics]:
        losses, metrics = term.loss(seen(params), *inputs)
        means = jax.tree.map(lambda each: jnp.mean(each, axis=0), {**metrics, "loss": losses})
        return means["loss"], means

    derivative = jax.grad(mean, has_aux=True)
    first, *others = terms
    gradient, means = derivative(params, first, first.inputs)
    for term in others:
        more, its_means = derivative(params, term, after(gradient, term.inputs))
        gradient = jax.tree.map(jnp.add, gradient, more)
        means |= its_means | {"loss": means["loss"] + its_means["loss"]}
    return gradient, means


def after(done: Any, inputs: Any) -> Any:
    """The inputs as they are, but not before all of `done` is computed.

    An optimization barrier alone would say so, were it not that XLA drops those on a CPU.
    """
    done, inputs = jax.lax.optimization_barrier((done, inputs))
    never = optax.tree.norm(done) < -1
    return jax.tree.map(lambda x: jnp.where(never, jnp.zeros_like(x), x), inputs)
