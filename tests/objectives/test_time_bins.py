"""Mean errors by time, against loops over samples."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_network
import tiny
from etils import epath

from dmf.checkpoints import load
from dmf.errors import InputError
from dmf.objectives import DecoupledMeanFlow, time_bins
from dmf.training import build, loop, metrics_writer
from dmf.types import Batch

BINS = 4


def samples(seed: int, count: int):
    """Errors and times r <= t; some times are 0, 1 or on an edge."""
    random = np.random.default_rng(seed)
    t, r = random.uniform(0, 0.7, (2, count))
    t[:3], r[:3] = (1.0, 1.0, 0.5), (0.0, 1.0, 0.25)
    return random.uniform(0, 5, count), np.maximum(t, r), np.minimum(t, r)


def means_of(*parts) -> dict[str, float]:
    """The metrics of several steps, each with a part of the samples."""
    metrics = [time_bins.binned_errors("error", jnp.float32(error), BINS, *map(jnp.float32, times))
               for error, *times in parts]
    (name,) = metrics[0]
    step_means = [jnp.mean(each[name], axis=0) for each in metrics]
    return time_bins.bin_means(name, np.mean(step_means, axis=0))


def expected_by_loop(error, *times) -> dict[str, float]:
    cells: dict[str, list[float]] = {}
    for e, *its_times in zip(error, *times, strict=True):
        edges = [min(int(time * BINS), BINS - 1) / BINS for time in its_times]
        spans = [f"{axis}_{edge:.2f}-{edge + 0.25:.2f}"
                 for axis, edge in zip("tr", edges, strict=False)]
        cells.setdefault("/".join(["error", *spans]), []).append(e)
    return {name: np.mean(values) for name, values in cells.items()}


@pytest.mark.parametrize("axes", [1, 2])
def test_each_cell_is_the_mean_over_the_samples_of_all_steps_in_it(axes):
    parts = [samples(seed, 40)[: 1 + axes] for seed in range(3)]
    expected = expected_by_loop(*(np.concatenate(rows) for rows in zip(*parts, strict=True)))
    means = means_of(*parts)
    assert means.keys() == expected.keys()
    for name in expected:
        assert means[name] == pytest.approx(expected[name], rel=1e-5), name


def test_cells_without_samples_are_left_out():
    error, t, r = samples(0, 3)
    assert means_of((error, t, r)) == pytest.approx({
        "error/t_0.75-1.00/r_0.00-0.25": error[0], "error/t_0.75-1.00/r_0.75-1.00": error[1],
        "error/t_0.50-0.75/r_0.25-0.50": error[2],
    })  # fmt: skip


@pytest.mark.parametrize("count", [3, 7, time_bins.MAX_TIME_BINS])
def test_names_differ_and_tensorboard_accepts_them(count):
    times = jnp.arange(count) / count + 1e-4
    (metric,) = time_bins.binned_errors("error", times, count, times).items()
    names = list(time_bins.bin_means(metric[0], np.asarray(jnp.mean(metric[1], axis=0))))
    assert len(set(names)) == count
    assert all(re.fullmatch(r"[-/\w.]+", name) for name in names)


def test_without_bins_there_is_no_metric():
    assert time_bins.binned_errors("error", jnp.ones(2), 0, jnp.ones(2)) == {}


def test_the_cells_of_an_objective_hold_its_errors():
    network, objective = small_network.NETWORK, DecoupledMeanFlow(time_bins=3)
    params = small_network.PARAMS
    batch = Batch(jax.random.normal(jax.random.key(1), (8, *network.sample_shape)), jnp.arange(8))
    draws = objective.draw(jax.random.key(2), batch)
    metrics = jax.jit(lambda p: objective.loss(network, p, batch, draws, {})[1])(params)
    for name, draw, axes in (("flow_matching_error", draws.flow_matching, 1),
                             ("mean_flow_error", draws.mean_flow, 2)):
        pairs = np.asarray(metrics[f"{name}_bins"])
        assert pairs.shape == (8, 2, *(3,) * axes)
        for i in range(8):
            cell = tuple(int(time[i] * 3) for time in (draw.t, draw.r)[:axes])
            expected = np.zeros(pairs.shape[1:])
            expected[(slice(None), *cell)] = metrics[name][i], 1
            np.testing.assert_allclose(pairs[i], expected, rtol=1e-6)


@pytest.mark.slow
def test_a_run_reports_cells(tmp_path):
    """A single cell holds the mean error over steps and microbatches."""
    fields = {"objective.time_bins": 1, "gradient_accumulation": 2, "run.steps": 2}
    with small_network.registered():
        loop.train(small_network.config(fields), tmp_path)
    (row,) = metrics_writer.read_metrics(tmp_path)
    assert row["flow_matching_error/t_0.00-1.00"] == pytest.approx(row["flow_matching_error"])
    assert not any("bins" in name for name in row)


def test_bins_may_change_on_resume(tmp_path):
    workdir = epath.Path(tmp_path)
    loop.claim_workdir(workdir, tiny.flow_map())
    loop.claim_workdir(workdir, tiny.flow_map({"objective.time_bins": 3}))
    assert load.read_config(workdir).objective.time_bins == 3


@pytest.mark.parametrize("objective", [tiny.config, tiny.flow_map])
@pytest.mark.parametrize("count", [-1, time_bins.MAX_TIME_BINS + 1])
def test_an_invalid_number_of_bins_is_refused(objective, count):
    with pytest.raises(InputError, match=rf"^objective\.time_bins={count}: give 0, for none"):
        build.objective(objective({"objective.time_bins": count}).objective)
