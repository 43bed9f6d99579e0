"""Steps that are not finite: they change nothing, they are logged, and too many end the run."""

import contextlib
import io
import pathlib
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
import small_network

from dmf.errors import InputError, RunError
from dmf.objectives import FlowMatching
from dmf.runtime.sharding import batch_sharding
from dmf.training import build, loop, metrics_writer

pytestmark = pytest.mark.usefixtures("small_network_registered")

FIELDS = {
    "optimizer.skip_nonfinite": 2, "optimizer.schedule": "linear", "optimizer.decay_steps": 100,
    "run.checkpoint_every": 1, "run.keep_last": 9, "run.log_every": 2, "run.steps": 8,
}  # fmt: skip
BAD = (3, 4, 6)


class Run(NamedTuple):
    """A run whose steps 3, 4 and 6 are not finite.

    Attributes:
      state: its last state.
      workdir: has a checkpoint of each step.
      rows: of its metrics by step, where only the last step has a checkpoint.
      log: what the latter prints.
    """

    state: loop.TrainState
    workdir: pathlib.Path
    rows: dict[int, dict[str, float]]
    log: str

    def saved(self, step: int) -> list:
        """Parameters, EMA parameters and moments after a step, as NumPy arrays."""
        folder = self.workdir / "checkpoints" / str(step)
        with ocp.StandardCheckpointer() as reader:
            items = {name: reader.restore(folder / name)
                     for name in ("params", "ema_params_main", "opt_state")}
        adam = items["opt_state"]["inner_state"][1][0]
        return jax.tree.leaves(jax.device_get((items["params"], items["ema_params_main"], adam)))


@pytest.fixture(scope="module")
def poisoned(small_network_registered):
    """Poisons the noise of some steps, whose batches are told from others by their labels."""
    built = build.training(small_network.config())
    original_draw, sharding = FlowMatching.draw, batch_sharding(built.recipe.mesh)
    labels = jnp.stack([
        jax.device_get(built.data_loader.batch(i - 1, sharding).y) for i in BAD
    ])

    def draw(self, key, batch, step):
        draws = original_draw(self, key, batch, step)
        bad = (batch.y[None] == labels).all(axis=1).any()
        return draws._replace(noise=jnp.where(bad, jnp.nan, draws.noise))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FlowMatching, "draw", draw)
        yield


@pytest.fixture(scope="module")
def run(poisoned, tmp_path_factory) -> Run:
    workdir, logged = tmp_path_factory.mktemp("skipping"), tmp_path_factory.mktemp("logged")
    state, log = loop.train(small_network.config(FIELDS), workdir), io.StringIO()
    with contextlib.redirect_stderr(log):  # Each checkpoint has a row of its own.
        loop.train(small_network.config(FIELDS | {"run.checkpoint_every": 0}), logged)
    rows = {row["step"]: row for row in metrics_writer.read_metrics(logged)}
    return Run(state, workdir, rows, log.getvalue())


def same(a: list, b: list) -> bool:
    return all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


def test_a_skipped_step_moves_nothing_and_counts(run):
    states = {step: run.saved(step) for step in range(2, 9)}
    for step in range(3, 9):
        assert same(states[step], states[step - 1]) == (step in BAD), step
    assert all(np.isfinite(leaf).all() for leaf in states[8])
    assert int(run.state.step) == 8
    opt_state = run.state.opt_state
    assert (int(opt_state.total_skips), int(opt_state.consecutive_skips)) == (3, 0)


def test_the_schedule_goes_on(run):
    counts = [leaf for path, leaf in jax.tree_util.tree_leaves_with_path(run.state.opt_state)
              if "count" in jax.tree_util.keystr(path)]
    assert sorted(map(int, counts)) == [8 - len(BAD), 8], "Adam's own, and the schedule's"
    assert run.rows[8]["learning_rate"] == pytest.approx(1e-3 * (1 - 6.5 / 100), rel=1e-5)


def test_means_leave_skipped_steps_out_and_the_count_is_of_all(run):
    assert [run.rows[step]["skipped_steps"] for step in (2, 4, 6, 8)] == [0, 2, 3, 3]
    assert "loss" not in run.rows[4]
    assert run.rows[6]["learning_rate"] == pytest.approx(1e-3 * (1 - 4 / 100), rel=1e-5)
    for row in run.rows.values():
        assert all(np.isfinite(value) for value in row.values())
        assert "consecutive_skipped_steps" not in row


def test_the_log_says_which_steps_were_skipped(run):
    lines = [line for line in run.log.splitlines() if line.startswith("step ")]
    assert ["skipped" in line for line in lines] == [False, True, True, False]
    assert "skipped 2 (last: step 4)" in lines[1]
    assert "skipped 1 (last: step 6)" in lines[2]


def test_one_more_in_a_row_ends_the_run_also_when_resumed(poisoned, tmp_path):
    fields = FIELDS | {"optimizer.skip_nonfinite": 1}
    loop.train(small_network.config(fields | {"run.steps": 3}), tmp_path)
    with pytest.raises(RunError) as error:
        loop.train(small_network.config(fields), tmp_path)
    message = str(error.value)
    assert message.startswith("the loss is not finite at step 4 (loss nan, ")
    assert "after 1 consecutive skipped steps, the maximum of optimizer.skip_nonfinite=1" in message
    assert "the checkpoint of step 3 is kept" in message
    assert "\n" not in message


def test_a_negative_number_is_refused():
    config = small_network.config({"optimizer.skip_nonfinite": -1})
    with pytest.raises(InputError, match=r"^optimizer\.skip_nonfinite=-1: give 0, for none"):
        build.recipe(config, build.mesh(config.mesh))
