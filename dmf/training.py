"""The loop that repeats the training step, saves, shows and resumes."""

import collections
import functools
import json
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from clu import parameter_overview
from etils import epath
from flax.traverse_util import flatten_dict
from ml_collections import ConfigDict

from dmf import build, loading, logs
from dmf import state as states
from dmf.checkpoint import (
    CONFIG_FILE,
    FORMAT,
    Checkpoints,
    disk_errors,
    latest_step,
    write_json,
)
from dmf.chips import share_of_peak
from dmf.monitoring import Examiner, preview
from dmf.sharding import batch_sharding
from dmf.state import TrainState
from dmf.step import Step, initial_state, training_step
from dmf.typing import InputError, Metrics, Params, RunError

# What may differ when a run is taken up again: what it shows of itself, and how it is computed.
CHANGEABLE = (
    "run", "mesh", "sampling", "evaluation", "accumulation", "objective.work",
    "model.scan", "model.remat", "model.attention",
)  # fmt: skip

def claim(workdir: epath.Path, config: ConfigDict) -> None:
    """Writes the config into a new workdir, or checks that the run there is this one.

    Raises:
      InputError: another run is there, or the directory cannot be made; nothing is changed.
    """
    path, mine = workdir / CONFIG_FILE, {"format": FORMAT, **loading.plain(config)}
    if path.exists():
        theirs = json.loads(path.read_text())
        both = [flatten_dict(c, sep=".") for c in (theirs, mine)]
        for field in sorted(both[0].keys() | both[1].keys()):
            a, b = (c.get(field, "unset") for c in both)
            if a != b and not f"{field}.".startswith(tuple(f"{name}." for name in CHANGEABLE)):
                raise InputError(f"workdir={workdir}: it holds another run, whose {field} is {a} "
                                 f"and not {b}; choose another workdir, or the same config")
    write_json(path, mine)


class _Watch:
    """Metrics on the device, fetched late and averaged over the steps since the last report; stops
    the run at the first loss that is not finite."""

    def __init__(self, due: Callable[[int], bool], saved: Callable[[], int | None]):
        self._due, self._saved = due, saved
        self._waiting: collections.deque[tuple[int, Metrics]] = collections.deque()
        self._seen: list[Mapping[str, float]] = []

    def add(self, step: int, metrics: Metrics) -> None:
        self._waiting.append((step, metrics))

    def read(self, last: int) -> Iterator[tuple[int, dict[str, float]]]:
        """Fetches all steps up to `last`; gives (step, means) for those where a report is due."""
        count = sum(step <= last for step, _ in self._waiting)
        taken = [self._waiting.popleft() for _ in range(count)]
        values = jax.device_get([metrics for _, metrics in taken])
        for (step, _), row in zip(taken, values, strict=True):
            self._check(step, row)
            self._seen.append(row)
            if self._due(step):
                means = {name: float(np.mean([row[name] for row in self._seen])) for name in row}
                self._seen = []
                yield step, means

    def _check(self, step: int, row: Mapping[str, Any]) -> None:
        if all(math.isfinite(row[name]) for name in ("loss", "gradient_norm")):
            return
        saved = self._saved()
        kept = f"the checkpoint of step {saved}" if saved is not None else "no checkpoint"
        raise RunError(f"the loss is not finite at step {step} (loss {row['loss']}, gradient norm "
                       f"{row['gradient_norm']}): stopped, {kept} is kept; try a lower "
                       "optimizer.learning_rate or a longer warm-up")


def train(config: ConfigDict, workdir: epath.PathLike) -> TrainState:
    """Trains as `config` says, from the newest checkpoint in `workdir` if there is one.

    Writes there `config.json`, `parameters.txt`, `metrics.jsonl`, `events/`, `samples/` and
    `checkpoints/`. The result does not depend on how often the run was interrupted.

    Args:
      config: as `dmf/defaults.py` describes.
      workdir: a directory, local or on a file system that epath knows.

    Returns:
      The state after the last step.

    Raises:
      InputError: a config that cannot be, or a workdir that holds another run.
      RunError: the loss is not finite, or the disk is full.
    """
    workdir = epath.Path(workdir)
    built = build.training(config)
    recipe = built.recipe
    init_key, draw_key = jax.random.split(jax.random.key(config.seed))
    make = functools.partial(initial_state, recipe, init_key)
    start = latest_step(workdir)
    pretrained = {} if start else build.pretrained(config, recipe.network, recipe.mesh)
    examine = Examiner(config, built, workdir) if config.evaluation.every else None
    claim(workdir, config)
    abstract = jax.eval_shape(make, {})
    where = states.shardings(recipe.mesh, abstract)
    run = config.run
    with (
        disk_errors(workdir),
        Checkpoints(
            workdir, keep_last=run.keep_last, keep_every=run.keep_every,
            best_step=examine.best_step if examine else lambda: None,
        ) as checkpoints,
    ):
        if start:
            done = "nothing left to do" if start >= run.steps else "going on"
            logs.say(f"{workdir} is at step {start} of {run.steps}: {done}")
            state = checkpoints.restore(start, states.with_shardings(abstract, where))
        else:
            start, state = 0, states.create(make, recipe.mesh, pretrained)
            _describe(workdir, abstract.params, built)
        step = training_step(recipe, draw_key, where)
        return _loop(config, workdir, built, checkpoints, examine, step, state, start)


def _describe(workdir: epath.Path, params: Params, built: build.Training) -> None:
    """Says what is trained and on what, and writes every parameter's shape to a file."""
    overview = parameter_overview.get_parameter_overview(params, include_stats=False)
    (workdir / "parameters.txt").write_text(overview + "\n")
    shape = " x ".join(f"{name} {size}" for name, size in built.recipe.mesh.shape.items())
    kind = jax.devices()[0].device_kind
    logs.say(f"{parameter_overview.count_parameters(params):,} parameters on {shape} ({kind}); "
             f"{built.pipeline.batch_size} of {len(built.pipeline.source):,} samples a step")


def _due(step: int, every: int, last: int) -> bool:
    """Whether something that happens every so often, and at the end, happens after `step`."""
    return every > 0 and (step % every == 0 or step == last)


def _loop(
    config: ConfigDict,
    workdir: epath.Path,
    built: build.Training,
    checkpoints: Checkpoints,
    examine: Examiner | None,
    step: Step,
    state: TrainState,
    start: int,
) -> TrainState:
    run, total = config.run, config.run.steps
    batch_size = built.pipeline.batch_size
    writer = logs.MetricsWriter(workdir, start)
    watch = _Watch(lambda at: _due(at, run.log_every, total), lambda: checkpoints.latest_step)
    show = preview(config, built, workdir)

    def examined(count: int, state: TrainState) -> None:
        writer.write(count, {f"evaluation/{k}": v for k, v in examine(count, state).items()})

    report = functools.partial(_report, writer, logs.Clock(start, total), built.recipe, total)
    batches = built.pipeline.batches(start, batch_sharding(built.recipe.mesh))
    try:
        if start and _due(start, config.evaluation.every, total) and not examine.has(start):
            examined(start, state)
        for count, batch in zip(range(start + 1, total + 1), batches, strict=False):
            state, metrics = step(state, batch, built.frozen)
            watch.add(count, metrics)
            examining = _due(count, config.evaluation.every, total)
            saving = examining or _due(count, run.checkpoint_every, total)
            # A report waits for the next step to be under way, so that the device never waits for
            # it; but a state is saved only after its own loss and gradient were seen to be finite.
            ready = count if saving or count == total else count - 1
            if saving or _due(ready, run.log_every, total):
                for at, means in watch.read(ready):
                    means["epoch"] = at * batch_size / len(built.pipeline.source)
                    report(at, means)
            if saving:
                checkpoints.save(count, state, built.pipeline.position(count))
            if _due(count, run.sample_every, total):
                show(count, state)
            if examining:
                examined(count, state)
    finally:
        batches.close()
        writer.close()
    return state


def _report(
    writer: logs.MetricsWriter,
    clock: logs.Clock,
    recipe: build.Recipe,
    total: int,
    count: int,
    means: dict[str, float],
) -> None:
    """Writes and says what the steps since the last report gave, and how fast they went.

    The share of peak is that of the operations that the objective takes at least; what is
    recomputed to save memory is not counted.
    """
    rate = clock.rate(count)
    images = rate * recipe.batch_size
    speed = {"steps_per_second": rate, "images_per_second": images}
    flops, devices = images * recipe.objective.flops(recipe.network), recipe.mesh.devices
    share = share_of_peak(flops, devices.flat[0].device_kind, devices.size)
    if share is not None:
        speed["share_of_peak"] = share
    writer.write(count, means | speed)
    of_peak = "" if share is None else f"  {share:.1%} of peak"
    logs.say(f"step {count}/{total}  loss {means['loss']:.4f}  gradient norm "
             f"{means['gradient_norm']:.3g}  {rate:.2f} steps/s  {images:.0f} images/s{of_peak}  "
             f"left {clock.left(count)}")
