"""Whole runs of alpha-Flow, shortcut models, consistency and terminal velocity matching."""

import jax
import numpy as np
import pytest
import small_network
import tiny
from etils import epath

from configs import default
from dmf.errors import InputError
from dmf.objectives import (
    AlphaFlow,
    Consistency,
    SelfGuidance,
    Shortcut,
    Tangent,
    TerminalVelocityMatching,
)
from dmf.runtime.sharding import make_mesh
from dmf.training import build, loop, metrics_writer

OBJECTIVES = {
    # alpha is 1, 1/2 and 0 in three steps.
    "alpha_flow": AlphaFlow(last_step=2, clip=4.0, guidance=SelfGuidance(kappa=0.3), time_bins=2),
    "shortcut": Shortcut(guidance=SelfGuidance(omega=1.5), time_bins=2),
    "consistency": Consistency(tangent=Tangent(warmup_steps=3), time_bins=2),
    "terminal_velocity_matching": TerminalVelocityMatching(
        target_ema="main", guidance=SelfGuidance(omega=1.5, kappa=0.3), time_bins=2
    ),
}
ERRORS = {"alpha_flow": {"mean_flow_error", "alpha"},
          "shortcut": {"flow_matching_error", "self_consistency_error"},
          "consistency": {"mean_flow_error", "du_dt_norm"},
          "terminal_velocity_matching": {"flow_matching_error", "terminal_velocity_error"}}
CONDITIONING = {"meanflow": {"model.conditioning": "meanflow"},
                "decoupled": {"model.conditioning": "decoupled", "model.split_depth": 1}}


FIELDS = {"run.steps": 3, "run.log_every": 1, "run.checkpoint_every": 0, "data.batch_size": 64,
          "gradient_accumulation": 2}


@pytest.mark.slow
@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_run_is_the_same_on_every_mesh(name, tmp_path, monkeypatch):
    """One device, eight, and eight that sum gradients once a step, with two microbatches."""
    rows = {}
    for devices, sums in ((1, "per_term"), (8, "per_term"), (8, "once")):
        mesh = make_mesh(devices, 1, 1, devices=jax.devices()[:devices])
        monkeypatch.setattr(build, "mesh", lambda section, mesh=mesh: mesh)
        workdir = tmp_path / f"{devices}-{sums}"
        with small_network.registered():
            config = small_network.config(FIELDS | {"sum_gradients": sums},
                                          objective=default.component(OBJECTIVES[name]))
            loop.train(config, workdir)
        rows[workdir.name] = metrics_writer.read_metrics(epath.Path(workdir))
    first, *others = rows.values()
    assert len(first) == 3
    for other in others:
        for key in ERRORS[name] | {"loss", "gradient_norm"}:
            np.testing.assert_allclose([row[key] for row in other], [row[key] for row in first],
                                       rtol=1e-4, err_msg=key)


@pytest.mark.slow
@pytest.mark.parametrize("conditioning", CONDITIONING)
@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_transformer_trains(name, conditioning, tmp_path):
    config = tiny.config(FIELDS | CONDITIONING[conditioning] | {"model.attention": "xla"},
                         objective=default.component(OBJECTIVES[name]))
    loop.train(config, tmp_path)
    rows = metrics_writer.read_metrics(epath.Path(tmp_path))
    assert ERRORS[name] <= set(rows[0])
    assert any(key.startswith(f"{error}/t_") for key in rows[0] for error in ERRORS[name])
    if name == "alpha_flow":
        assert [row["alpha"] for row in rows] == [1, 0.5, 0]
    assert np.isfinite([row["loss"] for row in rows]).all()


@pytest.mark.slow
def test_a_share_that_no_microbatch_has_is_named(tmp_path):
    fields = FIELDS | {"data.batch_size": 16, "sum_gradients": "once"}
    with small_network.registered(), pytest.raises(InputError) as error:
        config = small_network.config(fields, objective=default.component(Shortcut()))
        loop.train(config, tmp_path)
    assert str(error.value).startswith("objective.self_consistency_share=0.25: ")
    assert "samples, which is what a microbatch has" in str(error.value)
