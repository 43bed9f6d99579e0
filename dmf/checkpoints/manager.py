"""The checkpoints of a run: they are saved in the background, and checked when they are restored.

The manager knows no train state: it saves and restores trees of arrays by name.
`dmf.checkpoints.params` describes the files.
"""

import dataclasses
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint import checkpoint_managers

from dmf.checkpoints.params import (
    CHECKPOINTS,
    CHECKSUMS,
    FORMAT,
    POSITION,
    SNAPSHOTS,
    read_checksums,
    read_position,
    single_process_checkpointer,
    tree_handler,
)
from dmf.errors import Damaged, Lost, RunError
from dmf.runtime import heartbeats, processes
from dmf.runtime.checksums import check_checksums, checksums, reading_errors
from dmf.runtime.files import absolute, disk_errors

DAMAGED = "damaged"

Trees = Mapping[str, Any]


@dataclasses.dataclass
class _KeepStep(checkpoint_managers.PreservationPolicy):
    """Preserves the checkpoint of one step.

    Attributes:
      step: returns the step, which may change; None for no step.
    """

    step: Callable[[], int | None]

    def should_preserve(
        self,
        checkpoints: Sequence[Any],
        *,
        context: checkpoint_managers.PreservationContext,
    ) -> Sequence[bool]:
        step = self.step()
        return [checkpoint.step == step for checkpoint in checkpoints]


@dataclasses.dataclass
class _ThinOut(checkpoint_managers.PreservationPolicy):
    """Preserves at most so many snapshots, at multiples of an interval that doubles.

    Attributes:
      every: the first interval.
      keep: maximum number of snapshots.
    """

    every: int
    keep: int

    def interval(self, step: int) -> int:
        """The number of steps between two snapshots when a run has reached a step."""
        interval = self.every
        while step // interval > self.keep:
            interval *= 2
        return interval

    def should_preserve(
        self,
        checkpoints: Sequence[Any],
        *,
        context: checkpoint_managers.PreservationContext,
    ) -> Sequence[bool]:
        interval = self.interval(max((checkpoint.step for checkpoint in checkpoints), default=0))
        few = len(checkpoints) <= self.keep
        return [few or checkpoint.step % interval == 0 for checkpoint in checkpoints]


class CheckpointManager:
    """The checkpoints of one run: saved in the background, the oldest ones deleted.

    It is a context manager, which waits at its end until everything is on disk:

        with CheckpointManager(workdir, keep_last=2) as checkpoints:
            restored = checkpoints.restore(abstract_trees)
            ...
            checkpoints.save(step, trees, data_loader.position(step))
    """

    def __init__(
        self,
        workdir: epath.PathLike,
        *,
        keep_last: int = 1,
        keep_every: int = 0,
        best_step: Callable[[], int | None] = lambda: None,
    ):
        """Opens the checkpoints of a run.

        Args:
          workdir: the workdir of the run.
          keep_last: number of the newest checkpoints that are kept.
          keep_every: the checkpoints of the multiples of this step are kept too; 0 for none.
          best_step: returns the step of the best checkpoint, which is kept too; None for none.

        Raises:
          RunError: the directory cannot be written.
        """
        policies = [checkpoint_managers.LatestN(keep_last), _KeepStep(best_step)]
        if keep_every:
            policies.append(checkpoint_managers.EveryNSteps(keep_every))
        self._open(
            absolute(workdir) / CHECKPOINTS, checkpoint_managers.AnyPreservationPolicy(policies)
        )

    def _open(self, directory: epath.Path, policy: Any, barriers: str | None = None) -> None:
        """Opens a directory; `policy` says which steps are preserved, and `barriers` tells the
        barriers of several managers apart."""
        self._directory = directory
        options = ocp.CheckpointManagerOptions(
            preservation_policy=policy,
            cleanup_tmp_directories=True,
            enable_async_checkpointing=True,
            multiprocessing_options=ocp.options.MultiprocessingOptions(
                barrier_sync_key_prefix=barriers
            ),
        )
        handlers = ocp.handlers.DefaultCheckpointHandlerRegistry()
        handlers.add(None, ocp.args.PyTreeSave, tree_handler())
        with disk_errors(self._directory):
            self._manager = ocp.CheckpointManager(
                self._directory, options=options, handler_registry=handlers
            )

    @property
    def latest_step(self) -> int | None:
        """The step of the newest complete checkpoint; None if there is none."""
        return self._manager.latest_step()

    def save(self, step: int, trees: Trees, position: Mapping[str, Any]) -> None:
        """Starts to save a checkpoint in the background, and raises an error of an earlier save.

        Args:
          step: number of the training step.
          trees: trees of arrays by name, for example `TrainState.trees`.
          position: position of the data loader, plain values for JSON.

        Raises:
          RunError: the disk is full or cannot be written.
        """
        computed = {name: checksums(tree) for name, tree in trees.items()}
        items = {name: ocp.args.PyTreeSave(tree) for name, tree in trees.items()}
        items[POSITION] = ocp.args.JsonSave({"format": FORMAT, "step": step, **position})
        items[CHECKSUMS] = ocp.args.JsonSave(computed)
        with disk_errors(self._directory / str(step)):
            self._manager.save(step, args=ocp.args.Composite(**items))

    def restore(self, abstract: Trees) -> tuple[int, dict[str, Any]] | None:
        """Restores the newest checkpoint that is not damaged.

        Newer checkpoints that are damaged are logged, and moved to `damaged/`.

        Args:
          abstract: trees of `jax.ShapeDtypeStruct` with shardings, by name.

        Returns:
          The step and the trees by name; None if there is no checkpoint.

        Raises:
          RunError: all checkpoints are damaged, or they cannot be read now.
        """
        steps = sorted(self._manager.all_steps(), reverse=True)
        for i, step in enumerate(steps):
            trees, damage = self._restore_step(step, abstract)
            reasons = [reason for reason in processes.all_gather(damage) if reason]
            if not reasons:
                return step, trees
            older = steps[i + 1 :]
            if not older:
                raise RunError(f"{self._directory / str(step)}: it is damaged ({reasons[0]}), and "
                               "there is no other checkpoint; start anew in another workdir")
            processes.log(f"the checkpoint of step {step} is damaged ({reasons[0]}): moved to "
                          f"{DAMAGED}/, restoring that of step {older[0]}")
            self._set_aside(step)
        return None

    def _restore_step(self, step: int, abstract: Trees) -> tuple[dict[str, Any], str]:
        """The trees that were saved at a step, and what is damaged; "" if nothing is.

        Each process reads its shards without waiting for the others, which may fail to.
        """
        folder, trees, damage = self._directory / str(step), {}, ""
        try:
            with reading_errors(), single_process_checkpointer() as checkpointer:
                read_position(folder)
                for name, tree in abstract.items():
                    trees[name] = checkpointer.restore(
                        folder / name, args=ocp.args.StandardRestore(tree)
                    )
                saved = {name: read_checksums(folder / name) for name in trees}
        except Damaged as error:
            damage = str(error)
        if any(processes.all_gather(damage)):
            return {}, damage
        try:
            for name, tree in trees.items():
                check_checksums(checksums(tree), saved[name])
        except Damaged as error:
            return {}, str(error)
        return trees, ""

    def _set_aside(self, step: int) -> None:
        """Moves a damaged checkpoint to `damaged/`, so that it is not restored again."""
        if processes.is_first_process():
            aside = self._directory.parent / DAMAGED
            aside.mkdir(parents=True, exist_ok=True)
            count = len(list(aside.glob(f"{step}*")))
            (self._directory / str(step)).rename(aside / f"{step}{f'.{count}' if count else ''}")
        processes.barrier(f"{step} set aside")
        self._manager.reload()

    def finish(self) -> None:
        """Waits until everything is on disk.

        Raises:
          RunError: the disk is full or cannot be written.
        """
        with disk_errors(self._directory):
            self._manager.wait_until_finished()

    def __enter__(self) -> "CheckpointManager":
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if kind is None:
            self.finish()
            with disk_errors(self._directory):
                self._manager.close()
        elif processes.is_single_process():
            self._close_ignoring_errors()
        elif kind is not Lost:
            # A save in progress waits for other processes, which may never finish.
            closing = threading.Thread(target=self._close_ignoring_errors, daemon=True)
            closing.start()
            closing.join(heartbeats.LOST_SECONDS)

    def _close_ignoring_errors(self) -> None:
        with suppress(Exception):
            self._manager.close()


class SnapshotManager(CheckpointManager):
    """The snapshots of the power EMAs of one run, see `dmf.checkpoints.power_ema`.

    They lie beside the checkpoints, in the same form, and are not deleted with them. They are saved
    at multiples of an interval, which doubles whenever there would be too many; every second one is
    then deleted. What is kept is thus a function of the step, the same in a run that resumes.
    """

    def __init__(self, workdir: epath.PathLike, *, every: int, keep: int):
        """Opens the snapshots of a run.

        Args:
          workdir: the workdir of the run.
          every: the first interval, in steps.
          keep: maximum number of snapshots.

        Raises:
          RunError: the directory cannot be written.
        """
        self._policy = _ThinOut(every, keep)
        self._open(absolute(workdir) / SNAPSHOTS, self._policy, barriers=SNAPSHOTS)

    def due(self, step: int) -> bool:
        """Whether a snapshot belongs to a step, and is not there yet."""
        return step % self._policy.interval(step) == 0 and step > (self.latest_step or 0)
