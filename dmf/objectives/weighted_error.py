"""The error of a prediction, weighted, with the metrics that every error of an objective has."""

from dmf.objectives.distances import squared_error, values_per_sample
from dmf.objectives.loss_weighting import weighted
from dmf.objectives.objective import Objective
from dmf.objectives.time_bins import binned_errors
from dmf.types import Images, Metrics, Network, Params, PerSample, Times


def weighted_error(
    objective: Objective,
    network: Network,
    params: Params,
    name: str,
    prediction: Images,
    target: Images,
    times: tuple[Times, ...],
) -> tuple[PerSample, Metrics]:
    """The weighted squared error |prediction - target|^2.

    Args:
      objective: its `weighting` and `time_bins`.
      network, params: the log-variance head, where the weighting is learned.
      name: name of the error, the first part of the names of its metrics.
      prediction: [b, h, w, c] what is trained.
      target: [b, h, w, c]; the gradient goes through it, too, unless it was stopped.
      times: (t,) of an error at r = t, or (t, r), by which the error is binned.

    Returns:
      [b] losses, and the metrics of each sample: NAME_error, the mean over its values, and, where
      there are any, NAME_error_bins and NAME_log_variance.
    """
    error, size = squared_error(prediction, target), values_per_sample(prediction)
    metrics = {f"{name}_error": error / size}
    metrics |= binned_errors(f"{name}_error", error / size, objective.time_bins, *times)
    phi = None
    if objective.learned_variance:
        phi = network.log_variance(params, times[0], times[-1])
        metrics[f"{name}_log_variance"] = phi
    return weighted(objective.weighting, error, size, phi), metrics
