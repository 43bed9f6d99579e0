"""The loop that repeats the training step, saves, shows and resumes."""

import functools
import math
import platform
from collections.abc import Callable
from typing import Any

import jax
from clu import parameter_overview
from etils import epath
from flax.traverse_util import flatten_dict
from ml_collections import ConfigDict

from dmf import build, hosts, loading, logs
from dmf import state as states
from dmf.checkpoint import CONFIG_FILE, FORMAT, Checkpoints, latest_step
from dmf.chips import GIB, share_of_peak
from dmf.files import disk_errors, read_json, write_json
from dmf.monitoring import Examiner, Profile, preview
from dmf.sharding import batch_sharding
from dmf.state import TrainState
from dmf.step import abstract_inputs, initial_state, training_step
from dmf.typing import Batch, InputError, Metrics, Params, Stopped
from dmf.watch import Report, Watch

# What may differ when a run is taken up again: what it shows of itself, and how it is computed.
CHANGEABLE = (
    "run", "mesh", "profile", "sampling", "evaluation", "accumulation", "objective.work",
    "objective.bins", "model.scan", "model.remat", "model.attention",
)  # fmt: skip


def check_claim(workdir: epath.PathLike, config: ConfigDict) -> None:
    """Checks that a workdir is new, or holds the run of this config.

    Raises:
      InputError: another run is there.
    """
    path = epath.Path(workdir) / CONFIG_FILE
    if not path.exists():
        return
    both = [flatten_dict(c, sep=".") for c in (read_json(path), _written(config))]
    for field in sorted(both[0].keys() | both[1].keys()):
        a, b = (c.get(field, "unset") for c in both)
        if a != b and not f"{field}.".startswith(tuple(f"{name}." for name in CHANGEABLE)):
            raise InputError(f"workdir={workdir}: it holds another run, whose {field} is {a} "
                             f"and not {b}; choose another workdir, or the same config")


def _written(config: ConfigDict) -> dict[str, Any]:
    return {"format": FORMAT, **loading.plain(config)}


def claim(workdir: epath.Path, config: ConfigDict) -> None:
    """Writes the config into a new workdir, or checks that the run there is this one.

    All processes check; the first writes.

    Raises:
      InputError: another run is there, or the directory cannot be made; nothing is changed.
    """
    check_claim(workdir, config)
    hosts.wait_for_all("workdir checked")
    if hosts.first():
        write_json(workdir / CONFIG_FILE, _written(config))


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
      InputError: a config that cannot be, or a workdir that holds another run; or processes that
        differ in the config, or do not share the workdir.
      RunError: the loss is not finite, the disk is full, or another process was lost.
      Stopped: SIGTERM came; everything is saved.
    """
    with hosts.runtime_errors():
        return _train(config, epath.Path(workdir))


def _train(config: ConfigDict, workdir: epath.Path) -> TrainState:
    hosts.check_same({"workdir": str(workdir), "config": loading.plain(config)})
    hosts.check_shared(workdir)
    built = build.training(config)
    recipe = built.recipe
    init_key, draw_key = jax.random.split(jax.random.key(config.seed))
    make = functools.partial(initial_state, recipe, init_key)
    start = latest_step(workdir)
    pretrained = {} if start else build.pretrained(config, recipe.network, recipe.mesh)
    if not start:
        recipe.freeze.check_given(pretrained)
    examine = Examiner(config, built, workdir) if config.evaluation.every else None
    profile = Profile(config.profile, workdir)
    abstract = jax.eval_shape(make, {})
    where = states.shardings(recipe.mesh, abstract)
    step = training_step(recipe, where)
    # What parts of a step refuse of each other is found when it is traced: here, for the last time
    # before anything is written. The trace is kept for the first step, whose key is on no mesh.
    jax.eval_shape(step, *abstract_inputs(recipe), draw_key)
    claim(workdir, config)
    run = config.run
    with (
        disk_errors(workdir),
        hosts.StopSignal() as stop,
        Checkpoints(
            workdir, keep_last=run.keep_last, keep_every=run.keep_every,
            best_step=examine.best_step if examine else lambda: None,
        ) as checkpoints,
        hosts.runtime_errors(),  # In here too: with a process lost, no save is waited for.
    ):
        state = checkpoints.restore(states.with_shardings(abstract, where)) if start else None
        if state is None:
            start, state = 0, states.create(make, recipe.mesh, pretrained)
            _describe(workdir, abstract.params, built)
        else:
            start = int(state.step)
            done = "nothing left to do" if start >= run.steps else "going on"
            hosts.say(f"{workdir} is at step {start} of {run.steps}: {done}")
        hosts.say(_holds(built, state), each=True)
        take = lambda state, rows: step(state, rows, built.frozen, draw_key)  # noqa: E731
        return _loop(
            config, workdir, built, checkpoints, examine, profile, stop, take, state, start
        )


def _describe(workdir: epath.Path, params: Params, built: build.Training) -> None:
    """Says what is trained and on what, and writes every parameter's shape to a file."""
    overview = parameter_overview.get_parameter_overview(params, include_stats=False)
    if hosts.first():
        (workdir / "parameters.txt").write_text(overview + "\n")
    shape = " x ".join(f"{name} {size}" for name, size in built.recipe.mesh.shape.items())
    kind = jax.devices()[0].device_kind
    count = parameter_overview.count_parameters(params)
    trained = built.recipe.freeze.trained(params)
    of_them = f", {trained:,} of them trained," if trained < count else ""
    hosts.say(f"{count:,} parameters{of_them} on {shape} ({kind}); "
              f"{built.pipeline.batch_size} of {len(built.pipeline.source):,} samples a step")


def _holds(built: build.Training, state: TrainState) -> str:
    """What this process has: devices, its part of the state, and its rows of a batch."""
    own = jax.local_devices()
    size = sum(
        shard.data.nbytes for leaf in jax.tree.leaves(state) for shard in leaf.addressable_shards
    )
    rows = sum(stop - start for start, stop in built.pipeline.spans(
        batch_sharding(built.recipe.mesh)))
    return (f"{platform.node()}, devices {', '.join(str(d.id) for d in own)} of "
            f"{jax.device_count()}, {size / GIB / len(own):.2f} GiB of state on each, {rows} rows "
            "of a batch")


def _due(step: int, every: int, last: int) -> bool:
    """Whether something that happens every so often, and at the end, happens after `step`."""
    return every > 0 and (step % every == 0 or step == last)


def _loop(
    config: ConfigDict,
    workdir: epath.Path,
    built: build.Training,
    checkpoints: Checkpoints,
    examine: Examiner | None,
    profile: Profile,
    stop: hosts.StopSignal,
    step: Callable[[TrainState, Batch], tuple[TrainState, Metrics]],
    state: TrainState,
    start: int,
) -> TrainState:
    run, total = config.run, config.run.steps
    batch_size = built.pipeline.batch_size
    writer = logs.MetricsWriter(workdir, start) if hosts.first() else logs.NoMetrics()
    watch = Watch(
        lambda at: _due(at, run.log_every, total), lambda: checkpoints.latest_step,
        built.recipe.optimizer.skip_nonfinite,
    )  # fmt: skip
    show = preview(config, built, workdir)

    def examined(count: int, state: TrainState) -> None:
        writer.write(count, {f"evaluation/{k}": v for k, v in examine(count, state).items()})

    report = functools.partial(_report, writer, logs.Clock(start, total), built.recipe, total)
    batches = built.pipeline.batches(start, batch_sharding(built.recipe.mesh))
    try:
        if start and _due(start, config.evaluation.every, total) and not examine.has(start):
            examined(start, state)
        for count, batch in zip(range(start + 1, total + 1), batches, strict=False):
            profile.before(count)
            state, metrics = step(state, batch)
            profile.after(count, metrics)
            watch.add(count, metrics)
            stopping = stop.after(count) and count < total
            examining = _due(count, config.evaluation.every, total) and not stopping
            saving = examining or stopping or _due(count, run.checkpoint_every, total)
            # A report waits for the next step to be under way, so that the device never waits for
            # it; but a state is saved only after its own loss and gradient were seen to be finite.
            ready = count if saving or count == total else count - 1
            if saving or _due(ready, run.log_every, total):
                for found in watch.read(ready):
                    found.means["epoch"] = found.step * batch_size / len(built.pipeline.source)
                    report(found)
            if saving:
                writer.flush()
                checkpoints.save(count, state, built.pipeline.position(count))
            if stopping:
                checkpoints.finish()
                raise Stopped(f"told to stop at step {count} of {total}: saved; the same command "
                              "goes on")
            if _due(count, run.sample_every, total):
                show(count, state)
            if examining:
                examined(count, state)
    finally:
        batches.close()
        writer.close()
        profile.close()
    return state


def _report(
    writer: logs.MetricsWriter | logs.NoMetrics,
    clock: logs.Clock,
    recipe: build.Recipe,
    total: int,
    found: Report,
) -> None:
    """Writes and says what the steps since the last report gave, and how fast they went.

    The share of peak is that of the operations that the objective takes at least; what is
    recomputed to save memory is not counted, nor the encoder of alignment.
    """
    count, means, skipped = found
    rate = clock.rate(count)
    images = rate * recipe.batch_size
    speed = {"steps_per_second": rate, "images_per_second": images}
    flops, devices = images * recipe.objective.flops(recipe.network), recipe.mesh.devices
    share = share_of_peak(flops, devices.flat[0].device_kind, devices.size)
    if share is not None:
        speed["share_of_peak"] = share
    writer.write(count, means | speed)
    of_peak = "" if share is None else f"  {share:.1%} of peak"
    left_out = f"  skipped {len(skipped)}, the last at step {skipped[-1]}" if skipped else ""
    loss = means.get("loss", math.nan), means.get("gradient_norm", math.nan)
    hosts.say(f"step {count}/{total}  loss {loss[0]:.4f}  gradient norm {loss[1]:.3g}{left_out}  "
              f"{rate:.2f} steps/s  {images:.0f} images/s{of_peak}  left {clock.left(count)}")
