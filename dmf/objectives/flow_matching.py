"""Flow matching: regression of the network on the velocity of the path (arXiv:2210.02747).

The loss here is that of flow models (SiT, arXiv:2401.08740), with or without representation
alignment (REPA, arXiv:2410.06940), and half of that of Decoupled MeanFlow.
"""

import dataclasses
from collections.abc import Mapping

import jax

from dmf.objectives.distances import cosine_distance
from dmf.objectives.guidance import GuidedVelocity
from dmf.objectives.interpolants import LINEAR, Interpolant
from dmf.objectives.loss_weighting import UniformWeighting, Weighting, is_learned
from dmf.objectives.objective import Objective
from dmf.objectives.path_sample import (
    Draws,
    PathSample,
    check_label_dropout,
    draw_label_dropout,
    draw_noise,
    path_sample,
)
from dmf.objectives.time_bins import check_time_bins
from dmf.objectives.time_samplers import LogitNormal, TimeSampler
from dmf.objectives.weighted_error import weighted_error
from dmf.registry import component_field
from dmf.types import Batch, Features, Images, Metrics, Network, Params, PerSample, PRNGKey


@dataclasses.dataclass(frozen=True, kw_only=True)
class FlowMatching(Objective):
    """Train a flow model: regress u(x_t, t, t, y) on v_t (arXiv:2210.02747; SiT, arXiv:2401.08740).

    >>> batch = Batch(x=jnp.zeros((4, 8, 8, 1)), y=jnp.zeros(4, jnp.int32))
    >>> draws = FlowMatching().draw(jax.random.key(0), batch)
    >>> draws.noise.shape, draws.t.shape
    ((4, 8, 8, 1), (4,))

    Attributes:
      interpolant: the path between data and noise.
      time_sampler: distribution of t.
      label_dropout: probability in [0, 1] that the condition of a sample is dropped.
      alignment_coefficient: weight of the cosine distance between projected tokens and the features
        of a frozen encoder (REPA, arXiv:2410.06940; 0.5 as published); 0 for no alignment.
      weighting: from the squared error of a sample to its loss.
      time_bins: number of equal parts of [0, 1] for metrics of the error by t; 0 for none.
    """

    interpolant: Interpolant = component_field("interpolant", LINEAR)
    time_sampler: TimeSampler = component_field("time_sampler", LogitNormal())
    label_dropout: float = 0.1
    alignment_coefficient: float = 0.0
    weighting: Weighting = component_field("weighting", UniformWeighting())
    time_bins: int = 0

    def __post_init__(self):
        check_label_dropout(self.label_dropout)
        check_time_bins(self.time_bins)

    @property
    def learned_variance(self) -> bool:
        """Whether the weighting needs the log-variance head."""
        return is_learned(self.weighting)

    @property
    def alignment(self) -> bool:
        """Whether batches need features to align with."""
        return self.alignment_coefficient != 0

    def draw(self, key: PRNGKey, batch: Batch, step: jax.Array | None = None) -> Draws:
        """Noise, t = r and dropped labels, each from a key of its own."""
        del step
        noise_key, time_key, label_key = jax.random.split(key, 3)
        t = self.time_sampler(time_key, len(batch.x), self.interpolant)
        dropped = draw_label_dropout(label_key, self.label_dropout, batch)
        return Draws(draw_noise(noise_key, batch), t, t, dropped)

    def loss(
        self,
        network: Network,
        params: Params,
        batch: Batch,
        draws: Draws,
        frozen_params: Mapping[str, Params],
    ) -> tuple[PerSample, Metrics]:
        """The weighted squared error of u(x_t, t, t, y), and the alignment (REPA)."""
        del frozen_params
        sample = path_sample(self.interpolant, network, batch, draws)
        u, tokens = self._predict(network, params, sample)
        losses, metrics = weighted_error(
            self, network, params, "flow_matching", u, sample.v_t, (sample.t,)
        )
        if tokens is None:
            return losses, metrics
        distance = cosine_distance(tokens, batch.features)
        metrics["alignment_distance"] = distance
        return losses + self.alignment_coefficient * distance, metrics

    def _predict(
        self, network: Network, params: Params, sample: PathSample
    ) -> tuple[Images, Features | None]:
        """u(x_t, t, t, y), and the projected tokens where they are aligned."""
        inputs = sample.x_t, sample.t, sample.t, sample.y
        if self.alignment:
            return network.apply_with_features(params, *inputs)
        return network.apply(params, *inputs), None

    def flops(self, network: Network) -> float:
        """Operations of a forward and a backward pass: three forward passes."""
        return 3 * network.flops.forward


def flow_matching_loss(
    objective: Objective,
    network: Network,
    params: Params,
    sample: PathSample,
    guided: GuidedVelocity,
) -> tuple[PerSample, Metrics]:
    """The flow-matching loss under guidance: the weighted squared error |u(x_t, t, t, y) - v_g|^2.

    Args:
      objective: its `weighting` and `time_bins`; its `compute_sharing` takes the prediction u for
        the conditional velocity in v_g, which it equals.
      network, params: the flow map u.
      sample: where u is evaluated.
      guided: v_g as a function of the conditional velocity.

    Returns:
      [b] losses, and metrics of each sample.
    """
    x_t, t, y = sample.x_t, sample.t, sample.y
    u = network.apply(params, x_t, t, t, y)
    conditional = u
    if guided.kappa is not None and not objective.compute_sharing.enabled:
        conditional = network.apply(jax.lax.stop_gradient(params), x_t, t, t, y)
    v_g = guided.at(conditional)
    return weighted_error(objective, network, params, "flow_matching", u, v_g, (t,))
