"""What is on disk: the checkpoints of a run, and exports of parameters alone.

A run keeps, below its workdir, `config.json` and `checkpoints/STEP/` with one Orbax item each for
`params`, `optimizer`, every `average_NAME`, `position`, and the `checksums` of all arrays. An
export is a directory with `params/` (Orbax), `checksums.json`, `config.json` and `README.md`.
Both restore with Orbax alone, both appear under their name only when they are whole, and both are
read only if every array is what was saved.
"""

import dataclasses
import json
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from flax.traverse_util import flatten_dict, unflatten_dict
from orbax.checkpoint import checkpoint_managers

from dmf import hosts, intact
from dmf.files import absolute, disk_errors, read_json, write_json
from dmf.state import TrainState
from dmf.typing import Damaged, InputError, Lost, Params, RunError

FORMAT = 1
CONFIG_FILE = "config.json"
CARD_FILE = "README.md"
CHECKPOINTS = "checkpoints"
DAMAGED = "damaged"
LIVE = "params"
_CHECKSUMS = "checksums"
# Of an array that several devices hold each writes a part, cut by a program of its own. Smaller
# parts than this, in bytes, take longer to compile for than to write whole.
_LEAST_PART = 2**20


def run_of(directory: epath.PathLike) -> tuple[epath.Path, int | None]:
    """A run or an export, and the step where the directory is one of its checkpoints."""
    path = epath.Path(directory)
    if path.parent.name == CHECKPOINTS and path.name.isdigit():
        return path.parent.parent, int(path.name)
    return path, None


def _average_item(name: str) -> str:
    return f"average_{name}"


@dataclasses.dataclass
class _Best(checkpoint_managers.PreservationPolicy):
    """Preserves the checkpoint of one step, which may change."""

    step: Callable[[], int | None]

    def should_preserve(
        self,
        checkpoints: Sequence[Any],
        *,
        context: checkpoint_managers.PreservationContext,
    ) -> Sequence[bool]:
        best = self.step()
        return [checkpoint.step == best for checkpoint in checkpoints]


def _trees(state: TrainState) -> dict[str, Any]:
    """The parts of a state that a checkpoint holds, by the name of their item."""
    averages = {_average_item(name): average for name, average in state.averages.items()}
    return {LIVE: state.params, "optimizer": state.optimizer, **averages}


def _by_itself() -> ocp.Checkpointer:
    """A checkpointer for reading, which waits for no other process."""
    me = jax.process_index()
    options = ocp.options.MultiprocessingOptions(
        primary_host=me, active_processes={me}, barrier_sync_key_prefix=f"process{me}"
    )
    handler = ocp.StandardCheckpointHandler(multiprocessing_options=options)
    return ocp.Checkpointer(handler, multiprocessing_options=options)


def _writing() -> ocp.PyTreeCheckpointHandler:
    """How trees of arrays are written; those of numpy without a copy of them all."""
    arrays = ocp.type_handlers.ArrayHandler(min_slice_bytes_for_replica_parallel=_LEAST_PART)
    of_numpy = ocp.type_handlers.NumpyHandler(deepcopy_host_arrays=False)
    return ocp.PyTreeCheckpointHandler(
        type_handler_registry=ocp.type_handlers.create_type_handler_registry(
            (jax.Array, arrays), (np.ndarray, of_numpy)
        )
    )


class Checkpoints:
    """The checkpoints of one run, written in the background, the oldest dropped."""

    def __init__(
        self,
        workdir: epath.PathLike,
        *,
        keep_last: int = 1,
        keep_every: int = 0,
        best_step: Callable[[], int | None] = lambda: None,
    ):
        self._directory = absolute(workdir) / CHECKPOINTS
        policies = [checkpoint_managers.LatestN(keep_last), _Best(best_step)]
        if keep_every:
            policies.append(checkpoint_managers.EveryNSteps(keep_every))
        options = ocp.CheckpointManagerOptions(
            preservation_policy=checkpoint_managers.AnyPreservationPolicy(policies),
            cleanup_tmp_directories=True,
            enable_async_checkpointing=True,
        )
        handlers = ocp.handlers.DefaultCheckpointHandlerRegistry()
        handlers.add(None, ocp.args.PyTreeSave, _writing())
        with disk_errors(self._directory):
            self._manager = ocp.CheckpointManager(
                self._directory, options=options, handler_registry=handlers
            )

    @property
    def latest_step(self) -> int | None:
        """The step of the newest whole checkpoint."""
        return self._manager.latest_step()

    def save(self, step: int, state: TrainState, position: Mapping[str, Any]) -> None:
        """Starts writing a checkpoint; what an earlier one ran into is raised here.

        Raises:
          RunError: the disk is full or cannot be written.
        """
        trees = _trees(state)
        checksums = {name: intact.checksums(tree) for name, tree in trees.items()}
        items = {name: ocp.args.PyTreeSave(tree) for name, tree in trees.items()}
        items["position"] = ocp.args.JsonSave({"format": FORMAT, **position})
        items[_CHECKSUMS] = ocp.args.JsonSave(checksums)
        with disk_errors(self._directory / str(step)):
            self._manager.save(step, args=ocp.args.Composite(**items))

    def restore(self, abstract: TrainState) -> TrainState | None:
        """The newest state that is what was saved, placed as the leaves of `abstract` say.

        Newer ones that are damaged are said, and moved to `damaged/` beside `checkpoints/`.

        Raises:
          RunError: there are checkpoints, and all are damaged; or they cannot be read now.
        """
        steps = sorted(self._manager.all_steps(), reverse=True)
        for place, step in enumerate(steps):
            state, trouble = self._tried(step, abstract)
            reasons = [reason for reason in hosts.gathered(trouble) if reason]
            if not reasons:
                return state
            older = steps[place + 1 :]
            if not older:
                raise RunError(f"{self._directory / str(step)}: it is damaged ({reasons[0]}), and "
                               "there is no other checkpoint; start anew in another workdir")
            hosts.say(f"the checkpoint of step {step} is damaged ({reasons[0]}): moved to "
                      f"{DAMAGED}/, taking that of step {older[0]}")
            self._set_aside(step)
        return None

    def _tried(self, step: int, abstract: TrainState) -> tuple[TrainState | None, str]:
        """The state saved at a step; or None, and what is wrong with it.

        Each process reads its part without waiting for any other, which may fail to.
        """
        folder, found = self._directory / str(step), {}
        try:
            with intact.reading(), _by_itself() as checkpointer:
                for name, tree in _trees(abstract).items():
                    found[name] = checkpointer.restore(
                        folder / name, args=ocp.args.StandardRestore(tree)
                    )
                saved = {name: _saved_checksums(folder / name) for name in found}
            trouble = ""
        except Damaged as error:
            trouble = str(error)
        if any(hosts.gathered(trouble)):
            return None, trouble
        try:
            for name, tree in found.items():
                intact.check(intact.checksums(tree), saved[name])
        except Damaged as error:
            return None, str(error)
        averages = {name: found[_average_item(name)] for name in abstract.averages}
        count = jax.device_put(np.int32(step), abstract.step.sharding)
        return TrainState(count, found[LIVE], found["optimizer"], averages), ""

    def _set_aside(self, step: int) -> None:
        """Moves a checkpoint where it is not found any more."""
        if hosts.first():
            aside = self._directory.parent / DAMAGED
            aside.mkdir(parents=True, exist_ok=True)
            count = len(list(aside.glob(f"{step}*")))
            (self._directory / str(step)).rename(aside / f"{step}{f'.{count}' if count else ''}")
        hosts.wait_for_all(f"{step} set aside")
        self._manager.reload()

    def finish(self) -> None:
        """Waits until everything is on disk.

        Raises:
          RunError: the disk is full or cannot be written.
        """
        with disk_errors(self._directory):
            self._manager.wait_until_finished()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if kind is None:
            self.finish()
            with disk_errors(self._directory):
                self._manager.close()
        elif hosts.alone():
            self._close_anyhow()
        elif kind is not Lost:
            # What is still being written waits for other processes, which may not come.
            closing = threading.Thread(target=self._close_anyhow, daemon=True)
            closing.start()
            closing.join(hosts.LOST_SECONDS)

    def _close_anyhow(self) -> None:
        with suppress(Exception):
            self._manager.close()


def read_config(directory: epath.PathLike) -> dict[str, Any]:
    """The resolved config of a run or an export.

    Raises:
      InputError: there is none.
    """
    path = run_of(directory)[0] / CONFIG_FILE
    if not path.exists():
        raise InputError(f"checkpoint={directory}: it holds no {CONFIG_FILE}; give the workdir of "
                         "a run or an exported directory")
    config = read_json(path)
    version = config.pop("format", None)
    if version != FORMAT:
        raise InputError(f"checkpoint={directory}: its format is {version}, and this "
                         f"dmf reads {FORMAT}")
    config.pop("origin", None)
    return config


def is_ours(directory: epath.PathLike) -> bool:
    """Whether it is a run, or an export with Orbax parameters."""
    path, _ = run_of(directory)
    return (path / CONFIG_FILE).exists() and any((path / d).exists() for d in (LIVE, CHECKPOINTS))


def read_origin(directory: epath.PathLike) -> str:
    """Where the parameters of an export come from; empty for a run."""
    return read_json(run_of(directory)[0] / CONFIG_FILE).get("origin", "")


def latest_step(workdir: epath.PathLike) -> int | None:
    """The step of the newest whole checkpoint of a run, or of the one that is named; None without
    one."""
    run, step = run_of(absolute(workdir))
    folder = run / CHECKPOINTS
    if step is not None:
        return step if (folder / str(step)).exists() else None
    return ocp.CheckpointManager(folder).latest_step() if folder.exists() else None


def _stored(directory: epath.Path, average: str) -> epath.Path:
    """Where the parameters of a run (its newest checkpoint) or of an export lie."""
    if run_of(directory)[1] is None and (directory / LIVE).exists():
        return directory / LIVE
    if not directory.exists():
        raise InputError(f"checkpoint={directory}: there is no such directory; give the workdir of "
                         "a run or an exported directory")
    step = latest_step(directory)
    if step is None:
        raise InputError(f"checkpoint={directory}: no checkpoint was saved there yet")
    saved = run_of(directory)[0] / CHECKPOINTS / str(step)
    item = saved / (_average_item(average) if average else LIVE)
    if not item.exists() and item.name in _saved_items(saved):
        raise Damaged(f"{item.name} is missing")
    if not item.exists():
        names = [p.name.removeprefix(_average_item("")) for p in saved.glob(_average_item("*"))]
        raise InputError(f"ema={average}: {directory} has {', '.join(sorted(names)) or 'none'}")
    return item


def restore_params(
    directory: epath.PathLike,
    abstract: Params,
    *,
    average: str = "",
    missing: tuple[str, ...] = (),
    surplus: tuple[str, ...] = (),
) -> Params:
    """Parameters of a run or of an export.

    Args:
      directory: a workdir (its newest checkpoint is read), one of its checkpoints/STEP, or an
        export.
      abstract: shapes, dtypes and shardings wanted.
      average: the name of an average, empty for the trained parameters; of no account in an
        export, which holds one set.
      missing: names that the checkpoint may lack, top-level ("projector") or below
        ("blocks/attention/q_norm"), with all that lies below them; left out of the result.
      surplus: names that it may hold in vain.

    Raises:
      InputError: nothing is there, or another architecture; the message names a parameter.
      RunError: what is there is damaged.
    """
    directory = absolute(directory)
    with _intact(directory), _by_itself() as checkpointer:
        path = _stored(directory, average)
        with intact.reading():
            metadata = checkpointer.metadata(path).item_metadata
            if metadata is None:
                raise Damaged(f"the list of arrays of {path.name} cannot be read")
            stored = flatten_dict(getattr(metadata, "tree", metadata), sep="/")
        wanted = flatten_dict(abstract, sep="/")
        for name in sorted(wanted.keys() | stored.keys()):
            if name not in stored and not _below(name, missing):
                raise InputError(f"checkpoint={directory}: of another architecture, it lacks "
                                 f"{name}")
            if name not in wanted and not _below(name, surplus):
                raise InputError(f"checkpoint={directory}: of another architecture, it has "
                                 f"{name}, which config.model does not")
            if name in stored and name in wanted and stored[name].shape != wanted[name].shape:
                raise InputError(
                    f"checkpoint={directory}: of another architecture, {name} has shape "
                    f"{tuple(stored[name].shape)} there and {tuple(wanted[name].shape)} here"
                )
        target = {
            name: wanted.get(name, jax.ShapeDtypeStruct(leaf.shape, leaf.dtype))
            for name, leaf in stored.items()
        }
        with intact.reading():
            saved = _saved_checksums(path)
            restored = checkpointer.restore(
                path, args=ocp.args.StandardRestore(unflatten_dict(target, sep="/"))
            )
        intact.check(intact.checksums(restored), saved)
    restored = flatten_dict(restored, sep="/")
    return unflatten_dict({k: v for k, v in restored.items() if k in wanted}, sep="/")


def _below(name: str, tops: tuple[str, ...]) -> bool:
    """Whether a path is one of some others, or lies below one."""
    return any(f"{name}/".startswith(f"{top}/") for top in tops)


@contextmanager
def _intact(directory: epath.Path) -> Iterator[None]:
    """Says which directory is damaged, and what else may be taken."""
    try:
        yield
    except Damaged as error:
        run, step = run_of(directory)
        taken = latest_step(directory) if step is None else step
        others = [p.name for p in (run / CHECKPOINTS).glob("[0-9]*") if p.name != str(taken)]
        remedy = "make it again"
        if others:
            remedy = f"try {CHECKPOINTS}/{max(others, key=int)}"
        raise RunError(f"checkpoint={directory}: it is damaged ({error}); {remedy}") from None


def _saved_items(saved: epath.Path) -> set[str]:
    """The items that a checkpoint of a run was saved with, as far as can be told."""
    with suppress(OSError, ValueError):
        return set(json.loads((saved / _CHECKSUMS / "metadata").read_text()))
    return {LIVE}


def _saved_checksums(item: epath.Path) -> dict[str, int]:
    """Those of the arrays of an item of a run, or of the parameters of an export."""
    if (item.parent / f"{_CHECKSUMS}.json").exists():
        return json.loads((item.parent / f"{_CHECKSUMS}.json").read_text())
    return json.loads((item.parent / _CHECKSUMS / "metadata").read_text())[item.name]


def write_params(directory: epath.Path, params: Params) -> None:
    """Writes the parameters of an export (Orbax)."""
    with ocp.Checkpointer(_writing()) as checkpointer:
        checkpointer.save(directory / LIVE, args=ocp.args.PyTreeSave(params))
    write_json(directory / f"{_CHECKSUMS}.json", intact.checksums(params))


def describe(directory: epath.Path, config: Mapping[str, Any], card: str, *, origin: str) -> None:
    """Writes the config and the model card of an export, in whatever format it is."""
    write_json(directory / CONFIG_FILE, {"format": FORMAT, "origin": origin, **config})
    (directory / CARD_FILE).write_text(card)
