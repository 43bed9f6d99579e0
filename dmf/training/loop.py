"""The training loop: repeats the training step, logs, saves, shows, evaluates and resumes.

    built = training(config)                          everything is checked here, before any file
    state = restored checkpoint, or initial state
    for step, batch in data loader:          read ahead by a thread; training/data_wait.py
        state, metrics = train_step(state, batch)
        log metrics -> save a checkpoint -> stop after a signal -> sample grid -> evaluation
"""

import dataclasses
import platform
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
from clu import parameter_overview
from etils import epath
from flax.traverse_util import flatten_dict
from ml_collections import ConfigDict

from dmf.checkpoints import load
from dmf.checkpoints.manager import CheckpointManager
from dmf.checkpoints.params import CONFIG_FILE, FORMAT, check_format, latest_step
from dmf.errors import InputError, Stopped
from dmf.runtime import ownership, processes
from dmf.runtime.device_specs import GIB
from dmf.runtime.files import disk_errors, read_json, write_json, write_text
from dmf.runtime.paths import user_path
from dmf.runtime.progress import duration, end_live_line, waiting
from dmf.runtime.sharding import batch_sharding
from dmf.training import build
from dmf.training.callback import Callback
from dmf.training.callbacks import EvaluationCallback, Profiler, SnapshotCallback, is_due
from dmf.training.data_wait import DataWait
from dmf.training.prepared_run import prepare
from dmf.training.resume import check_position, position_function
from dmf.training.start_record import record_start
from dmf.training.step_log import StepLog
from dmf.training.train_state import TrainState
from dmf.training.train_step import create_train_state
from dmf.training.writers import WriterRun, Writers, open_writers
from dmf.types import Batch, Metrics, Params

# Fields that may change when a run resumes: its length, with the ends of the schedules of its
# learning rate and of its objective, its outputs, how it is computed, and the names of its classes.
CHANGEABLE = (
    "run", "mesh", "profile_steps", "sampling", "evaluation", "gradient_accumulation",
    "sum_gradients", "optimizer.decay_steps", "objective.last_step",
    "objective.compute_sharing", "objective.time_bins", "model.scan", "model.remat",
    "model.attention", "data.class_names",
)  # fmt: skip


def train(config: ConfigDict, workdir: epath.PathLike) -> TrainState:
    """Trains the run of a config, from the newest checkpoint in `workdir` if there is one.

    It writes `config.json`, `starts.json`, `parameters.txt`, `samples/`, `evaluations/`,
    `checkpoints/` and, with power EMAs, `ema_snapshots/` there, and what `run.writers` write:
    `metrics.jsonl` and `events/` by default. A resumed run is bit-for-bit identical to an
    uninterrupted one.

    Args:
      config: all fields of `dmf.default_config.Config`.
      workdir: a directory, local or on a file system that epath knows.

    Returns:
      The train state after the last step.

    Raises:
      InputError: a field that cannot be used, or a workdir that holds another run or in which
        another command is training; or processes that differ in the config, or do not share the
        workdir.
      RunError: the loss is not finite, the disk is full, or another process was lost.
      Stopped: the run received SIGTERM, SIGHUP or Ctrl-C; everything is saved.
    """
    workdir = user_path(workdir)
    with processes.runtime_errors():
        processes.check_same({"workdir": str(workdir), "config": load.config_to_json(config)})
        processes.check_shared(workdir)
        with ownership.owned(workdir / ownership.LOCK_FILE, "workdir", workdir):
            return _train(config, workdir)


def _train(config: ConfigDict, workdir: epath.Path) -> TrainState:
    with waiting("loading the dataset and the networks", processes.log):
        prepared = prepare(config, workdir)
    config, training = prepared.config, prepared.training
    step, evaluate = prepared.step, prepared.evaluate
    init_key, draw_key = prepared.keys
    position = position_function(training.data_loader, training.frozen_params)
    processes.check_same({"data and frozen networks": position(0)})
    check_workdir(workdir, config)
    check_position(workdir, position)
    claim_workdir(workdir, config)
    with (
        disk_errors(workdir),
        processes.StopSignal() as stop,
        CheckpointManager(
            workdir, keep_last=training.run.keep_last, keep_every=training.run.keep_every,
            best_step=evaluate.best_step,
        ) as checkpoints,
        SnapshotCallback(training, workdir) as snapshot,
        processes.runtime_errors(),  # Inside too: with a process lost, no save is waited for.
    ):
        state = None
        if latest_step(workdir):
            state = _restore(checkpoints, prepared.abstract)
        if state is None:
            state = create_train_state(training.recipe, init_key, prepared.pretrained)
            _describe(workdir, prepared.abstract.params, training)
        else:
            done = "nothing left to do" if state.step >= training.run.steps else "resuming"
            processes.log(f"{workdir} is at step {int(state.step)} of {training.run.steps}: {done}")
        processes.log(_placement(training, state), each=True)
        if state.step < training.run.steps:
            record_start(workdir, int(state.step))
        return Loop(
            training=training,
            workdir=workdir,
            train_step=lambda state, rows: step(state, rows, training.frozen_params, draw_key),
            compile_step=lambda *inputs: step.lower(
                *inputs, training.frozen_params, draw_key
            ).compile(),
            checkpoints=checkpoints,
            position=position,
            open_writers=lambda start: _open_writers(config, workdir, start),
            evaluate=evaluate,
            snapshot=snapshot,
            callbacks=(snapshot, prepared.show, evaluate, *prepared.callbacks),
            profiler=prepared.profiler,
            stop=stop,
        ).run(state)


def _restore(checkpoints: CheckpointManager, abstract: TrainState) -> TrainState | None:
    """The newest saved state, sharded like the leaves of `abstract`; None without a checkpoint."""
    restored = checkpoints.restore(abstract.trees)
    if restored is None:
        return None
    step, trees = restored
    return abstract.with_trees(jax.device_put(jax.numpy.int32(step), abstract.step.sharding), trees)


def _open_writers(config: ConfigDict, workdir: epath.Path, start: int) -> Writers:
    """The writers of this process: those of the config in the first process, none in others."""
    if not processes.is_first_process():
        return Writers()
    settings = build.run(config.run)
    run = WriterRun(workdir=workdir, start_step=start, config=load.config_to_json(config),
                    project=settings.project)  # fmt: skip
    return open_writers(settings.writers, run)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Loop:
    """The loop over training steps.

    Attributes:
      training: recipe, data loader and settings of the run.
      workdir: the workdir of the run.
      train_step: (state, rows) -> (state, metrics).
      compile_step: compiles `train_step` for (state, rows), which it does not touch.
      checkpoints: saves the train state.
      position: what is saved with the state of a step, see `position_function`.
      open_writers: start step -> the writers of this process.
      evaluate: the evaluation callback; a state that it evaluates is saved first.
      snapshot: saves the power EMAs; no checkpoint is saved before the snapshots of earlier steps.
      callbacks: all callbacks, called in this order after a step is logged and saved.
      profiler: traces some steps.
      stop: says whether the run has received a signal to stop, from its first step on.
    """

    training: build.Training
    workdir: epath.Path
    train_step: Callable[[TrainState, Batch], tuple[TrainState, Metrics]]
    compile_step: Callable[[TrainState, Batch], Any]
    checkpoints: CheckpointManager
    position: Callable[[int], Mapping[str, Any]]
    open_writers: Callable[[int], Writers]
    evaluate: EvaluationCallback
    snapshot: SnapshotCallback
    callbacks: tuple[Callback, ...]
    profiler: Profiler
    stop: processes.StopSignal

    def run(self, state: TrainState) -> TrainState:
        """Trains from the step of a state to the last step.

        Args:
          state: the initial or the restored train state; it is donated.

        Returns:
          The train state after the last step.

        Raises:
          RunError: the loss is not finite.
          Stopped: the run received a signal to stop; the state is saved.
        """
        start, total = int(state.step), self.training.run.steps
        writers = self.open_writers(start)
        for callback in self.callbacks:
            callback.writers = writers
        loader, sharding = self.training.data_loader, batch_sharding(self.training.recipe.mesh)
        batches = loader.batches(start, sharding)
        data_wait = DataWait(batches)
        log = StepLog(self.training, self.checkpoints, writers, data_wait, start)
        try:
            for callback in self.callbacks if start else ():
                if callback.due(start) and not callback.is_done(start):
                    callback(start, state)
            for step in range(start + 1, total + 1):
                batch = data_wait.next_batch()
                if step == start + 1:
                    self._compile(state, batch)
                    log.start_clock(start)
                self.profiler.before_step(step)
                state, metrics = self.train_step(state, batch)
                data_wait.dispatched(metrics)
                self.profiler.after_step(step, metrics)
                if step == start + 1:
                    jax.block_until_ready(metrics)
                    self.stop.listen()
                    every = self.training.run.log_every
                    processes.log(f"the first step is done; a line follows every {every} steps")
                stopping = self.stop.after(step) and step < total
                saving = stopping or self._saves_after(step)
                up_to_date = saving or self.snapshot.due(step)
                log.add(step, metrics, saved=saving, up_to_date=up_to_date)
                if saving:
                    writers.flush()
                    self.snapshot.finish()
                    self.checkpoints.save(step, state.trees, self.position(step))
                if stopping:
                    self.checkpoints.finish()
                    raise Stopped(f"told to stop at step {step} of {total}: saved; the same "
                                  "command resumes the run")
                for callback in self.callbacks:
                    if callback.due(step):
                        callback(step, state)
        finally:
            batches.close()
            end_live_line()
            writers.close()
            self.profiler.close()
        return state

    def _compile(self, state: TrainState, batch: Batch) -> None:
        """Compiles the training step, which may take minutes, and says so."""
        processes.log("compiling the training step")
        with waiting("compiling the training step", processes.log):
            began = time.perf_counter()
            self.compile_step(state, batch)
        processes.log(f"compiled in {duration(time.perf_counter() - began)}")

    def _saves_after(self, step: int) -> bool:
        """Whether a checkpoint is due, as after the last step; what is evaluated is saved too."""
        run = self.training.run
        return (self.evaluate.due(step) or is_due(step, run.checkpoint_every, run.steps)
                or step == run.steps)


def check_workdir(workdir: epath.PathLike, config: ConfigDict) -> None:
    """Checks that a workdir is new, or holds the run of this config.

    Raises:
      InputError: another run is there, or one of another format.
    """
    path = epath.Path(workdir) / CONFIG_FILE
    if not path.exists():
        return
    check_format(workdir, field="workdir")
    stored, given = (flatten_dict(c, sep=".") for c in (read_json(path), _stored(config)))
    for field in sorted(stored.keys() | given.keys()):
        a, b = (c.get(field, "unset") for c in (stored, given))
        if a != b and not f"{field}.".startswith(tuple(f"{name}." for name in CHANGEABLE)):
            raise InputError("workdir", workdir, f"it holds another run, whose {field} is {a} and "
                             f"not {b}; choose another workdir, or the same config")


def _stored(config: ConfigDict) -> dict[str, Any]:
    """The config as `config.json` holds it."""
    return {"format": FORMAT, **load.config_to_json(config)}


def claim_workdir(workdir: epath.Path, config: ConfigDict) -> None:
    """Writes the config into a new workdir, or checks that the run there is this one.

    All processes check; the first writes.

    Raises:
      InputError: another run is there, or the directory cannot be made; nothing is changed.
    """
    check_workdir(workdir, config)
    processes.barrier("workdir checked")
    if processes.is_first_process():
        write_json(workdir / CONFIG_FILE, _stored(config))


def _describe(workdir: epath.Path, params: Params, training: build.Training) -> None:
    """Logs the sizes of network, mesh, batch and dataset; writes all parameter shapes to a file."""
    overview = parameter_overview.get_parameter_overview(params, include_stats=False)
    if processes.is_first_process():
        write_text(workdir / "parameters.txt", overview + "\n")
    recipe, loader = training.recipe, training.data_loader
    mesh = " x ".join(f"{name} {size}" for name, size in recipe.mesh.shape.items())
    count = parameter_overview.count_parameters(params)
    trained = recipe.freeze_mask.count_trained(params)
    trained_count = f" ({trained:,} trained)" if trained < count else ""
    processes.log(
        f"{count:,} parameters{trained_count}; mesh {mesh} ({jax.devices()[0].device_kind}); "
        f"global batch {loader.batch_size}; dataset {len(loader.dataset):,} samples"
    )


def _placement(training: build.Training, state: TrainState) -> str:
    """The devices of this process, their train state in GiB, and the local batch."""
    devices = jax.local_devices()
    size = sum(
        shard.data.nbytes for leaf in jax.tree.leaves(state) for shard in leaf.addressable_shards
    )
    spans = training.data_loader.spans(batch_sharding(training.recipe.mesh))
    rows = sum(stop - start for start, stop in spans)
    numbers = ", ".join(str(device.id) for device in devices)
    return (f"host {platform.node()}: device{'s' * (len(devices) > 1)} {numbers} of "
            f"{jax.device_count()}, {size / GIB / len(devices):.2f} GiB train state per device, "
            f"local batch {rows}")
