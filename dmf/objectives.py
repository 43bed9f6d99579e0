"""What training minimises: flow matching, MeanFlow, and Decoupled MeanFlow.

An objective draws its randomness in one place, `draw(key, batch)`, and computes from it, in
`loss(network, params, batch, draws, frozen)`, one loss a sample and a dictionary of per-sample
metrics. A loss is therefore a pure function of its inputs, and no sample sees another.
With bins there are metrics of arrays a sample too, see `dmf.bins`.
`frozen` holds parameters that are not trained; {"teacher": ...} where the guidance asks for one.
Decoupled MeanFlow gives `terms`, of which its loss is the sum, see `dmf.terms`.

How a loss is computed is a choice of its own that changes no number: `dmf.work`.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from dmf import bins
from dmf.draws import DecoupledDraws, Draws, beside, check_rate, drop, point_of
from dmf.flow import LINEAR, Interpolant
from dmf.guidance import DrawnGuidance, Guidance, GuidedVelocity, NoGuidance, SelfGuidance
from dmf.identity import Point, no_gradient
from dmf.tangents import Tangent, root_mean_square
from dmf.terms import Objective, Summed, Term
from dmf.times import LogitNormal, OrderedPair, TimeSampler
from dmf.typing import (
    Batch,
    Features,
    Images,
    InputError,
    Metrics,
    Network,
    Params,
    PerSample,
    PRNGKey,
)
from dmf.weighting import Adaptive, Cauchy, Uniform, Weighting
from dmf.work import Work


def squared_error(prediction: Images, target: Images) -> PerSample:
    """Sum over h, w, c of the squared difference, in float32."""
    difference = (prediction - target).astype(jnp.float32)
    return jnp.sum(difference**2, axis=(1, 2, 3))


def _size(x: Images) -> int:
    """Number of values of one sample."""
    return x[0].size


def cosine_distance(tokens: Features, features: Features) -> PerSample:
    """Minus the mean cosine similarity of tokens and features (REPA, arXiv:2410.06940)."""
    unit = [x / jnp.linalg.norm(x, axis=-1, keepdims=True) for x in (tokens, features)]
    return -jnp.mean(jnp.sum(unit[0] * unit[1], axis=-1), axis=-1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class FlowMatching:
    """Regression of u(x_t, t, t, y) on v_t (arXiv:2210.02747; SiT, arXiv:2401.08740).

    Attributes:
      interpolant: the path.
      time: distribution of t.
      label_dropout: probability that a label is replaced by the null label.
      alignment_coefficient: weight of the alignment with `batch.features` (REPA), 0 for none.
      bins: into how many each time is cut, for metrics of errors by time; 0 for none.
    """

    interpolant: Interpolant = LINEAR
    time: TimeSampler = LogitNormal()
    label_dropout: float = 0.1
    alignment_coefficient: float = 0.0
    weighting: Weighting = Uniform()
    bins: int = 0
    needs_teacher = False

    def __post_init__(self):
        check_rate(self.label_dropout)
        bins.check(self.bins)

    @property
    def learned_variance(self) -> bool:
        return self.weighting.learned

    @property
    def alignment(self) -> bool:
        return self.alignment_coefficient != 0

    def draw(self, key: PRNGKey, batch: Batch, step: jax.Array | None = None) -> Draws:
        del step
        noise_key, time_key, label_key = jax.random.split(key, 3)
        t = self.time(time_key, len(batch.x), self.interpolant)
        noise = jax.random.normal(noise_key, batch.x.shape, batch.x.dtype)
        return Draws(noise, t, t, drop(label_key, self.label_dropout, batch))

    def loss(
        self,
        network: Network,
        params: Params,
        batch: Batch,
        draws: Draws,
        frozen: Mapping[str, Params],
    ) -> tuple[PerSample, Metrics]:
        del frozen
        x_t, v_t, t, _, y, *_ = point_of(self.interpolant, batch, draws, network.num_classes)
        if self.alignment:
            u, tokens = network.apply_with_features(params, x_t, t, t, y)
        else:
            u = network.apply(params, x_t, t, t, y)
        error = squared_error(u, v_t)
        metrics = {"flow_matching_error": error / _size(batch.x)}
        metrics |= bins.binned("flow_matching_error", error / _size(batch.x), self.bins, t)
        phi = _phi(self, "flow_matching", network, params, t, t, metrics)
        loss = self.weighting(error, _size(batch.x), phi)
        if self.alignment:
            distance = cosine_distance(tokens, batch.features)
            metrics["alignment_distance"] = distance
            loss += self.alignment_coefficient * distance
        return loss, metrics

    def flops(self, network: Network) -> float:
        """Forward and backward (2): three forward passes."""
        return 3 * network.flops.forward


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeanFlow:
    """Regression of u(x_t, t, r, y) on its MeanFlow target (arXiv:2505.13447).

    Attributes:
      interpolant: the path.
      times: distribution of (t, r).
      guidance: of the velocity in target and tangent.
      tangent: how du/dt is taken.
      label_dropout: probability that a label is replaced by the null label.
      weighting: of the squared error.
      work: how it is computed.
      bins: into how many each time is cut, for metrics of errors by time; 0 for none.
    """

    interpolant: Interpolant = LINEAR
    times: OrderedPair = OrderedPair(
        first=LogitNormal(mean=-0.4), second=LogitNormal(mean=-0.4), equal_share=0.75
    )
    guidance: NoGuidance | SelfGuidance | DrawnGuidance = NoGuidance()
    tangent: Tangent = Tangent()
    label_dropout: float = 0.1
    weighting: Weighting = Adaptive()
    work: Work = Work()
    bins: int = 0
    alignment = False
    needs_teacher = False

    def __post_init__(self):
        check_rate(self.label_dropout)
        bins.check(self.bins)
        if self.guidance.teacher:
            raise InputError("objective.guidance.name=teacher: MeanFlow guides itself; choose "
                             "none or self, or distil with the decoupled_mean_flow objective")

    @property
    def learned_variance(self) -> bool:
        return self.weighting.learned

    def draw(self, key: PRNGKey, batch: Batch, step: jax.Array | None = None) -> Draws:
        noise_key, time_key, label_key = jax.random.split(key, 3)
        t, r = self.times(time_key, len(batch.x), self.interpolant)
        noise = jax.random.normal(noise_key, batch.x.shape, batch.x.dtype)
        dropped = drop(label_key, self.label_dropout, batch)
        return Draws(noise, t, r, dropped, *beside(self.guidance, self.tangent, key, batch, step))

    def loss(
        self,
        network: Network,
        params: Params,
        batch: Batch,
        draws: Draws,
        frozen: Mapping[str, Params],
    ) -> tuple[PerSample, Metrics]:
        del frozen
        null = network.num_classes
        point = point_of(self.interpolant, batch, draws, null)
        source = no_gradient(network, params)
        (guided,) = self.work.guides(self.guidance, source, [point], null)
        return _mean_flow_loss(self, network, params, point, guided)

    def flops(self, network: Network) -> float:
        """Forward and backward (2), the tangent, and the guidance."""
        guidance = _guidance_flops(self.guidance, network, network.flops.decode)
        return 3 * network.flops.forward + _tangent_flops(self, network) + guidance


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecoupledMeanFlow(Summed):
    """Half flow matching, half MeanFlow, each on the whole batch (arXiv:2510.24474).

    Attributes:
      interpolant: the path.
      time: distribution of t in the flow-matching half.
      times: distribution of (t, r) in the MeanFlow half.
      guidance: of the velocity in both halves: none, the network's own, or a frozen teacher's.
      tangent: how du/dt is taken in the MeanFlow half.
      label_dropout: probability that a label is replaced by the null label, in both halves.
      weighting: of the squared error.
      work: how it is computed.
      bins: into how many each time is cut, for metrics of errors by time; 0 for none.
      teacher: the network of `frozen["teacher"]`, where the guidance is a teacher's.
    """

    interpolant: Interpolant = LINEAR
    time: TimeSampler = LogitNormal()
    times: OrderedPair = OrderedPair(first=LogitNormal(mean=0.4), second=LogitNormal(mean=-1.2))
    guidance: Guidance = NoGuidance()
    tangent: Tangent = Tangent()
    label_dropout: float = 0.1
    weighting: Weighting = Cauchy()
    work: Work = Work()
    bins: int = 0
    teacher: Network | None = None
    alignment = False

    def __post_init__(self):
        check_rate(self.label_dropout)
        bins.check(self.bins)
        if self.guidance.teacher and self.teacher is None:
            raise InputError("objective.guidance.name=teacher: name the teacher's checkpoint in "
                             "config.teacher.checkpoint")

    @property
    def learned_variance(self) -> bool:
        return self.weighting.learned

    @property
    def needs_teacher(self) -> bool:
        return self.guidance.teacher

    def draw(self, key: PRNGKey, batch: Batch, step: jax.Array | None = None) -> DecoupledDraws:
        keys = jax.random.split(key, 5)
        dropped = drop(keys[0], self.label_dropout, batch)
        noises = [jax.random.normal(k, batch.x.shape, batch.x.dtype) for k in keys[1:3]]
        t = self.time(keys[3], len(batch.x), self.interpolant)
        pair = self.times(keys[4], len(batch.x), self.interpolant)
        more = beside(self.guidance, self.tangent, key, batch, step)
        return DecoupledDraws(Draws(noises[0], t, t, dropped, *more),
                              Draws(noises[1], *pair, dropped, *more))

    def terms(
        self,
        network: Network,
        params: Params,
        batch: Batch,
        draws: DecoupledDraws,
        frozen: Mapping[str, Params],
    ) -> list[Term]:
        null = network.num_classes
        looks = [point_of(self.interpolant, batch, look, null) for look in draws]
        if self.guidance.teacher:
            source = no_gradient(self.teacher, frozen["teacher"])
        else:
            source = no_gradient(network, params)
        guides = self.work.guides(self.guidance, source, looks, null)

        def half(loss: Callable[..., tuple[PerSample, Metrics]], name: str) -> Callable[..., Any]:
            def halved(params: Params, point: Point, guided: GuidedVelocity) -> Any:
                losses, metrics = loss(self, network, params, point, guided)
                return losses / 2, metrics | {name: losses}

            return halved

        return [
            Term(half(_flow_matching_loss, "flow_matching_loss"), (looks[0], guides[0])),
            Term(half(_mean_flow_loss, "mean_flow_loss"), (looks[1], guides[1])),
        ]

    def flops(self, network: Network) -> float:
        """Forward and backward of both halves (6), the tangent, and the guidance of both."""
        if self.guidance.teacher:
            guidance = 2 * _guidance_flops(
                self.guidance, self.teacher, self.teacher.flops.forward
            )
        else:
            # The velocity of the flow-matching half is its prediction.
            guidance = sum(_guidance_flops(self.guidance, network, own)
                           for own in (0.0, network.flops.decode))
        return 6 * network.flops.forward + _tangent_flops(self, network) + guidance


def _tangent_flops(objective: "MeanFlow | DecoupledMeanFlow", network: Network) -> float:
    """Of du/dt, and of the network's own velocity where only du/dt wants it."""
    passes = 2 if objective.tangent.difference else 1
    guides = objective.guidance.needs_label and not objective.guidance.teacher
    own = network.flops.decode if objective.tangent.own and not guides else 0.0
    return passes * network.flops.forward + own


def _guidance_flops(guidance: Guidance, source: Network, own: float) -> float:
    """Of the velocities in a guided velocity, the one under the sample's label costing `own`."""
    return guidance.needs_null * source.flops.forward + guidance.needs_label * own


def _phi(
    objective: Objective,
    half: str,
    network: Network,
    params: Params,
    t: jax.Array,
    r: jax.Array,
    metrics: Metrics,
) -> PerSample | None:
    """The learned log-variance, which is added to the metrics by the name of the half it is of."""
    if not objective.learned_variance:
        return None
    phi = network.log_variance(params, t, r)
    metrics[f"{half}_log_variance"] = phi
    return phi


def _flow_matching_loss(
    objective: DecoupledMeanFlow,
    network: Network,
    params: Params,
    point: Point,
    guided: GuidedVelocity,
) -> tuple[PerSample, Metrics]:
    x_t, _, t, _, y, *_ = point
    u = network.apply(params, x_t, t, t, y)
    conditional = u
    if guided.kappa is not None and not objective.work.shared:
        conditional = no_gradient(network, params)(x_t, t, t, y)
    error, size = squared_error(u, guided.at(conditional)), _size(u)
    metrics = {"flow_matching_error": error / size}
    metrics |= bins.binned("flow_matching_error", error / size, objective.bins, t)
    phi = _phi(objective, "flow_matching", network, params, t, t, metrics)
    return objective.weighting(error, size, phi), metrics


def _mean_flow_loss(
    objective: MeanFlow | DecoupledMeanFlow,
    network: Network,
    params: Params,
    point: Point,
    guided: GuidedVelocity,
) -> tuple[PerSample, Metrics]:
    u, target, du_dt = objective.work.identity(network, params, point, guided, objective.tangent)
    error, size = squared_error(u, target), _size(u)
    metrics = {
        "mean_flow_error": error / size,
        "velocity_error": squared_error(u, point.v_t) / size,
        "du_dt_norm": root_mean_square(du_dt),
    }
    metrics |= bins.binned("mean_flow_error", error / size, objective.bins, point.t, point.r)
    phi = _phi(objective, "mean_flow", network, params, point.t, point.r, metrics)
    return objective.weighting(error, size, phi), metrics
