"""The training step, and the loop that repeats it, saves, shows and resumes."""

import collections
import json
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from clu import parameter_overview
from etils import epath
from flax.traverse_util import flatten_dict
from jax.sharding import NamedSharding, PartitionSpec
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
from dmf.monitoring import Examiner, preview
from dmf.optimizer import averaged
from dmf.sharding import BATCH_AXES, batch_sharding, replicated
from dmf.state import TrainState
from dmf.typing import Batch, InputError, Metrics, Params, PRNGKey, RunError

# Folded into the key of a step for what its rows become; its draws split that key.
_ROWS = 2**31 - 1
# What may differ when a run is taken up again.
CHANGEABLE = ("run", "mesh", "sampling", "evaluation")

Step = Callable[[TrainState, Batch, Mapping[str, Params]], tuple[TrainState, Metrics]]


def _mean_gradient(built: build.Training, parts: int) -> Callable[..., Any]:
    """(params, batch, draws, frozen) -> mean gradient and mean metrics, a part at a time."""

    def loss(params: Params, batch: Batch, draws: Any, frozen: Any) -> tuple[jax.Array, Metrics]:
        losses, metrics = built.objective.loss(built.network, params, batch, draws, frozen)
        return jnp.mean(losses), jax.tree.map(jnp.mean, metrics | {"loss": losses})

    gradient = jax.grad(loss, has_aux=True)
    if parts == 1:
        return gradient

    def cut(x: jax.Array) -> jax.Array:
        # Every part takes an equal share of each device's rows, so that no row moves.
        x = x.reshape(-1, parts, *x.shape[1:]).swapaxes(0, 1)
        split = NamedSharding(built.mesh, PartitionSpec(None, BATCH_AXES))
        return jax.lax.with_sharding_constraint(x, split)

    def accumulated(params: Params, batch: Batch, draws: Any, frozen: Any) -> Any:
        def add(total: Any, part: Any) -> tuple[Any, None]:
            return jax.tree.map(jnp.add, total, gradient(params, *part, frozen)), None

        shapes = jax.eval_shape(gradient, params, batch, draws, frozen)
        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
        total, _ = jax.lax.scan(add, zeros, jax.tree.map(cut, (batch, draws)))
        return jax.tree.map(lambda x: x / parts, total)

    return accumulated


def training_step(
    built: build.Training, key: PRNGKey, where: TrainState, *, accumulation: int = 1
) -> Step:
    """One compiled update: (state, rows, frozen) -> state, metrics. The state is donated.

    Args:
      built: the parts of the step.
      key: of all draws; a step folds in its number, so that a step is a pure function of it.
      where: the state's shardings.
      accumulation: parts that the batch is cut into, one after the other.

    Returns:
      A function whose metrics are float32 means over the batch: `loss`, what the objective
      reports, `gradient_norm` (before clipping) and `learning_rate`.
    """
    optimizer = built.optimizer.transform()
    mean_gradient = _mean_gradient(built, accumulation)
    batch_size = built.pipeline.batch_size

    def step(state: TrainState, rows: Batch, frozen: Any) -> tuple[TrainState, Metrics]:
        step_key = jax.random.fold_in(key, state.step)
        x = built.to_samples.samples(jax.random.fold_in(step_key, _ROWS), rows.x)
        batch = rows._replace(x=x)
        draws = built.objective.draw(step_key, batch)
        gradient, metrics = mean_gradient(state.params, batch, draws, frozen)
        updates, moments = optimizer.update(gradient, state.optimizer, state.params)
        params = optax.apply_updates(state.params, updates)
        averages = {
            name: averaged(ema, state.averages[name], params, state.step, batch_size)
            for name, ema in built.emas.items()
        }
        metrics["gradient_norm"] = optax.tree.norm(gradient)
        metrics["learning_rate"] = jnp.asarray(built.optimizer.rate(state.step), jnp.float32)
        return TrainState(state.step + 1, params, moments, averages), metrics

    return jax.jit(
        step,
        in_shardings=(where, batch_sharding(built.mesh), None),
        out_shardings=(where, replicated(built.mesh)),
        donate_argnums=0,
    )


def claim(workdir: epath.Path, config: ConfigDict) -> None:
    """Writes the config into a new workdir, or checks that the run there is this one.

    Raises:
      InputError: another run is there, or the directory cannot be made; nothing is changed.
    """
    path, mine = workdir / CONFIG_FILE, {"format": FORMAT, **loading.plain(config)}
    if path.exists():
        theirs = json.loads(path.read_text())
        kept = [
            flatten_dict({k: v for k, v in c.items() if k not in CHANGEABLE}, sep=".")
            for c in (theirs, mine)
        ]
        for field in sorted(kept[0].keys() | kept[1].keys()):
            a, b = (c.get(field, "unset") for c in kept)
            if a != b:
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
    init_key, draw_key = jax.random.split(jax.random.key(config.seed))
    optimizer = built.optimizer.transform()
    names = sorted(built.emas)

    def make(pretrained: Params) -> TrainState:
        params = {**built.network.init(init_key), **pretrained}
        return states.initial(params, optimizer, names)

    start = latest_step(workdir)
    pretrained = {} if start else build.pretrained(config, built.network, built.mesh)
    examine = Examiner(config, built, workdir) if config.evaluation.every else None
    claim(workdir, config)
    abstract = jax.eval_shape(make, {})
    where = states.shardings(built.mesh, abstract)
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
            start, state = 0, states.create(make, built.mesh, pretrained)
            _describe(workdir, abstract.params, built)
        step = training_step(built, draw_key, where, accumulation=config.accumulation)
        return _loop(config, workdir, built, checkpoints, examine, step, state, start)


def _describe(workdir: epath.Path, params: Params, built: build.Training) -> None:
    """Says what is trained and on what, and writes every parameter's shape to a file."""
    overview = parameter_overview.get_parameter_overview(params, include_stats=False)
    (workdir / "parameters.txt").write_text(overview + "\n")
    shape = " x ".join(f"{name} {size}" for name, size in built.mesh.shape.items())
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

    clock = logs.Clock(start, total)
    batches = built.pipeline.batches(start, batch_sharding(built.mesh))
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
                    _report(writer, clock, at, total, batch_size, means)
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
    count: int,
    total: int,
    batch_size: int,
    means: dict[str, float],
) -> None:
    rate = clock.rate(count)
    writer.write(count, means | {"steps_per_second": rate, "images_per_second": rate * batch_size})
    logs.say(f"step {count}/{total}  loss {means['loss']:.4f}  gradient norm "
             f"{means['gradient_norm']:.3g}  {rate:.2f} steps/s  {rate * batch_size:.0f} images/s  "
             f"left {clock.left(count)}")
