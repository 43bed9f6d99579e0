"""What training minimises: flow matching, MeanFlow, and Decoupled MeanFlow.

An objective draws its randomness in one place, `draw(key, batch)`, and computes from it, in
`loss(network, params, batch, draws, frozen)`, one loss a sample and a dictionary of per-sample
metrics. A loss is therefore a pure function of its inputs, and no sample sees another.
`frozen` holds parameters that are not trained; {"teacher": ...} where the guidance asks for one.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp

from dmf.flow import LINEAR, Interpolant, per_sample
from dmf.guidance import Guidance, NoGuidance, SelfGuidance, guided_velocity
from dmf.times import LogitNormal, OrderedPair, TimeSampler
from dmf.typing import (
    Batch,
    Dropped,
    Features,
    FlowMap,
    Images,
    InputError,
    Metrics,
    Network,
    Params,
    PerSample,
    PRNGKey,
)
from dmf.weighting import Adaptive, Cauchy, Uniform, Weighting


class Draws(NamedTuple):
    """The randomness of one look at a batch.

    Attributes:
      noise: [b, h, w, c] standard normal.
      t, r: [b] with 0 <= r <= t <= 1.
      dropped: [b] bool, whether the label is replaced by the null label.
    """

    noise: jax.Array
    t: jax.Array
    r: jax.Array
    dropped: jax.Array


class DecoupledDraws(NamedTuple):
    """Decoupled MeanFlow looks at a batch twice: same dropped labels, independent noise."""

    flow_matching: Draws
    mean_flow: Draws


class Point(NamedTuple):
    """Where on its path each sample is: x_t, the path's velocity there, times, kept labels."""

    x_t: jax.Array
    v_t: jax.Array
    t: jax.Array
    r: jax.Array
    y: jax.Array
    dropped: jax.Array


@runtime_checkable
class Objective(Protocol):
    """Draws, then losses. `learned_variance` tells whether the network needs its head."""

    learned_variance: bool
    alignment: bool
    needs_teacher: bool

    def draw(self, key: PRNGKey, batch: Batch) -> Draws | DecoupledDraws: ...

    def loss(
        self,
        network: Network,
        params: Params,
        batch: Batch,
        draws: Draws | DecoupledDraws,
        frozen: Mapping[str, Params],
    ) -> tuple[PerSample, Metrics]: ...


def squared_error(prediction: Images, target: Images) -> PerSample:
    """Sum over h, w, c of the squared difference, in float32."""
    difference = (prediction - target).astype(jnp.float32)
    return jnp.sum(difference**2, axis=(1, 2, 3))


def _size(x: Images) -> int:
    """Number of values of one sample."""
    return x[0].size


def _drop(key: PRNGKey, rate: float, batch: Batch) -> Dropped:
    return jax.random.bernoulli(key, rate, batch.y.shape)


def _point(interpolant: Interpolant, batch: Batch, draws: Draws, null_label: int) -> Point:
    return Point(
        x_t=interpolant.mix(batch.x, draws.noise, draws.t),
        v_t=interpolant.velocity(batch.x, draws.noise, draws.t),
        t=draws.t,
        r=draws.r,
        y=jnp.where(draws.dropped, null_label, batch.y),
        dropped=draws.dropped,
    )


def _guided(guidance: Guidance, source: FlowMap, point: Point, null_label: int) -> Images:
    x_t, v_t, t, _, y, dropped = point
    return guided_velocity(guidance, source, x_t, t, y, v_t, dropped, null_label)


class Identity(NamedTuple):
    """Both sides of the MeanFlow identity: u, the target without gradient, and du/dt."""

    u: jax.Array
    target: jax.Array
    du_dt: jax.Array


def mean_flow_identity(flow_map: FlowMap, point: Point, v_g: Images) -> Identity:
    """u and its target sg(v_g + (r - t) du/dt), with d/dt along (v_g, 1, 0) for (x_t, t, r).

    MeanFlow, arXiv:2505.13447, the MeanFlow identity (equation 6) and its training target.
    """
    x_t, _, t, r, y, _ = point
    u, du_dt = jax.jvp(
        lambda x_t, t, r: flow_map(x_t, t, r, y),
        (x_t, t, r),
        (v_g, jnp.ones_like(t), jnp.zeros_like(r)),
    )
    target = v_g + per_sample(r - t, x_t) * du_dt
    return Identity(u, *jax.lax.stop_gradient((target, du_dt)))


def _root_mean_square(x: Images) -> PerSample:
    return jnp.sqrt(jnp.mean(x.astype(jnp.float32) ** 2, axis=(1, 2, 3)))


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
    """

    interpolant: Interpolant = LINEAR
    time: TimeSampler = LogitNormal()
    label_dropout: float = 0.1
    alignment_coefficient: float = 0.0
    weighting: Weighting = Uniform()
    needs_teacher = False

    def __post_init__(self):
        _check_dropout(self.label_dropout)

    @property
    def learned_variance(self) -> bool:
        return self.weighting.learned

    @property
    def alignment(self) -> bool:
        return self.alignment_coefficient != 0

    def draw(self, key: PRNGKey, batch: Batch) -> Draws:
        noise_key, time_key, label_key = jax.random.split(key, 3)
        t = self.time(time_key, len(batch.x), self.interpolant)
        noise = jax.random.normal(noise_key, batch.x.shape, batch.x.dtype)
        return Draws(noise, t, t, _drop(label_key, self.label_dropout, batch))

    def loss(
        self,
        network: Network,
        params: Params,
        batch: Batch,
        draws: Draws,
        frozen: Mapping[str, Params],
    ) -> tuple[PerSample, Metrics]:
        del frozen
        x_t, v_t, t, _, y, _ = _point(self.interpolant, batch, draws, network.num_classes)
        if self.alignment:
            u, tokens = network.apply_with_features(params, x_t, t, t, y)
        else:
            u = network.apply(params, x_t, t, t, y)
        error = squared_error(u, v_t)
        metrics = {"flow_matching_error": error / _size(batch.x)}
        loss = self.weighting(error, _size(batch.x), _phi(self, network, params, t, t, metrics))
        if self.alignment:
            distance = cosine_distance(tokens, batch.features)
            metrics["alignment_distance"] = distance
            loss += self.alignment_coefficient * distance
        return loss, metrics


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeanFlow:
    """Regression of u(x_t, t, r, y) on its MeanFlow target (arXiv:2505.13447).

    Attributes:
      interpolant: the path.
      times: distribution of (t, r).
      guidance: of the velocity in target and tangent.
      label_dropout: probability that a label is replaced by the null label.
    """

    interpolant: Interpolant = LINEAR
    times: OrderedPair = OrderedPair(
        first=LogitNormal(mean=-0.4), second=LogitNormal(mean=-0.4), equal_share=0.75
    )
    guidance: NoGuidance | SelfGuidance = NoGuidance()
    label_dropout: float = 0.1
    weighting: Weighting = Adaptive()
    alignment = False
    needs_teacher = False

    def __post_init__(self):
        _check_dropout(self.label_dropout)
        if self.guidance.teacher:
            raise InputError("objective.guidance.name=teacher: MeanFlow guides itself; choose "
                             "none or self, or distil with the decoupled_mean_flow objective")

    @property
    def learned_variance(self) -> bool:
        return self.weighting.learned

    def draw(self, key: PRNGKey, batch: Batch) -> Draws:
        noise_key, time_key, label_key = jax.random.split(key, 3)
        t, r = self.times(time_key, len(batch.x), self.interpolant)
        noise = jax.random.normal(noise_key, batch.x.shape, batch.x.dtype)
        return Draws(noise, t, r, _drop(label_key, self.label_dropout, batch))

    def loss(
        self,
        network: Network,
        params: Params,
        batch: Batch,
        draws: Draws,
        frozen: Mapping[str, Params],
    ) -> tuple[PerSample, Metrics]:
        del frozen
        point = _point(self.interpolant, batch, draws, network.num_classes)
        flow_map = functools.partial(network.apply, params)
        v_g = _guided(self.guidance, _no_gradient(network, params), point, network.num_classes)
        return _mean_flow_loss(self, network, params, flow_map, point, v_g)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecoupledMeanFlow:
    """Half flow matching, half MeanFlow, each on the whole batch (arXiv:2510.24474).

    Attributes:
      interpolant: the path.
      time: distribution of t in the flow-matching half.
      times: distribution of (t, r) in the MeanFlow half.
      guidance: of the velocity in both halves: none, the network's own, or a frozen teacher's.
      label_dropout: probability that a label is replaced by the null label, in both halves.
      teacher: the network of `frozen["teacher"]`, where the guidance is a teacher's.
    """

    interpolant: Interpolant = LINEAR
    time: TimeSampler = LogitNormal()
    times: OrderedPair = OrderedPair(first=LogitNormal(mean=0.4), second=LogitNormal(mean=-1.2))
    guidance: Guidance = NoGuidance()
    label_dropout: float = 0.1
    weighting: Weighting = Cauchy()
    teacher: Network | None = None
    alignment = False

    def __post_init__(self):
        _check_dropout(self.label_dropout)
        if self.guidance.teacher and self.teacher is None:
            raise InputError("objective.guidance.name=teacher: name the teacher's checkpoint in "
                             "config.teacher.checkpoint")

    @property
    def learned_variance(self) -> bool:
        return self.weighting.learned

    @property
    def needs_teacher(self) -> bool:
        return self.guidance.teacher

    def draw(self, key: PRNGKey, batch: Batch) -> DecoupledDraws:
        keys = jax.random.split(key, 5)
        dropped = _drop(keys[0], self.label_dropout, batch)
        noises = [jax.random.normal(k, batch.x.shape, batch.x.dtype) for k in keys[1:3]]
        t = self.time(keys[3], len(batch.x), self.interpolant)
        pair = self.times(keys[4], len(batch.x), self.interpolant)
        return DecoupledDraws(Draws(noises[0], t, t, dropped), Draws(noises[1], *pair, dropped))

    def loss(
        self,
        network: Network,
        params: Params,
        batch: Batch,
        draws: DecoupledDraws,
        frozen: Mapping[str, Params],
    ) -> tuple[PerSample, Metrics]:
        null = network.num_classes
        flow_map = functools.partial(network.apply, params)
        if self.guidance.teacher:
            source = _no_gradient(self.teacher, frozen["teacher"])
        else:
            source = _no_gradient(network, params)

        point = _point(self.interpolant, batch, draws.flow_matching, null)
        v_g = _guided(self.guidance, source, point, null)
        error = squared_error(flow_map(point.x_t, point.t, point.t, point.y), v_g)
        metrics = {"flow_matching_error": error / _size(batch.x)}
        phi = _phi(self, network, params, point.t, point.t, metrics)
        flow_matching = self.weighting(error, _size(batch.x), phi)

        point = _point(self.interpolant, batch, draws.mean_flow, null)
        v_g = _guided(self.guidance, source, point, null)
        mean_flow, more = _mean_flow_loss(self, network, params, flow_map, point, v_g)
        metrics |= more | {"flow_matching_loss": flow_matching, "mean_flow_loss": mean_flow}
        return (flow_matching + mean_flow) / 2, metrics


def _check_dropout(rate: float) -> None:
    if not 0 <= rate <= 1:
        raise InputError(f"objective.label_dropout={rate}: a probability lies in [0, 1]")


def _no_gradient(network: Network, params: Params) -> FlowMap:
    return functools.partial(network.apply, jax.lax.stop_gradient(params))


def _phi(
    objective: Objective,
    network: Network,
    params: Params,
    t: jax.Array,
    r: jax.Array,
    metrics: Metrics,
) -> PerSample | None:
    if not objective.learned_variance:
        return None
    phi = network.log_variance(params, t, r)
    metrics["log_variance"] = phi
    return phi


def _mean_flow_loss(
    objective: MeanFlow | DecoupledMeanFlow,
    network: Network,
    params: Params,
    flow_map: FlowMap,
    point: Point,
    v_g: Images,
) -> tuple[PerSample, Metrics]:
    u, target, du_dt = mean_flow_identity(flow_map, point, v_g)
    error, size = squared_error(u, target), _size(u)
    metrics = {
        "mean_flow_error": error / size,
        "velocity_error": squared_error(u, point.v_t) / size,
        "du_dt_norm": _root_mean_square(du_dt),
    }
    phi = _phi(objective, network, params, point.t, point.r, metrics)
    return objective.weighting(error, size, phi), metrics
