"""What is on disk: the checkpoints of a run, and exports of parameters alone.

A run keeps, below its workdir, `config.json` and `checkpoints/STEP/` with one Orbax item each for
`params`, `optimizer`, every `average_NAME`, and `position`. An export is a directory with
`params/` (Orbax), `config.json` and `README.md`. Both restore with Orbax alone, and both appear
under their name only when they are whole.
"""

import dataclasses
import errno
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from flax.traverse_util import flatten_dict, unflatten_dict
from orbax.checkpoint import checkpoint_managers

from dmf.state import TrainState
from dmf.typing import InputError, Params, RunError

FORMAT = 1
CONFIG_FILE = "config.json"
CARD_FILE = "README.md"
CHECKPOINTS = "checkpoints"
LIVE = "params"


def _absolute(directory: epath.PathLike) -> epath.Path:
    """The directory as Orbax wants it; buckets (gs://...) are absolute already."""
    path = epath.Path(directory)
    return path if "://" in os.fspath(path) else path.expanduser().resolve()


def run_of(directory: epath.PathLike) -> tuple[epath.Path, int | None]:
    """A run or an export, and the step where the directory is one of its checkpoints."""
    path = epath.Path(directory)
    if path.parent.name == CHECKPOINTS and path.name.isdigit():
        return path.parent.parent, int(path.name)
    return path, None


def _average_item(name: str) -> str:
    return f"average_{name}"


@contextmanager
def disk_errors(path: epath.Path) -> Iterator[None]:
    """Turns what a full or broken disk raises, in whatever library, into one line."""
    try:
        yield
    except Exception as error:
        if isinstance(error, (InputError, RunError)):
            raise
        text = str(error)
        full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        if full or any(
            word in text for word in ("No space left", "RESOURCE_EXHAUSTED", "File too large")
        ):
            raise RunError(f"no space left to write {path}: what was finished before is whole; "
                           "free some space and run the same command again") from error
        if isinstance(error, OSError):
            raise RunError(f"cannot write {path}: {text}") from error
        raise


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
        self._directory = _absolute(workdir) / CHECKPOINTS
        policies = [checkpoint_managers.LatestN(keep_last), _Best(best_step)]
        if keep_every:
            policies.append(checkpoint_managers.EveryNSteps(keep_every))
        options = ocp.CheckpointManagerOptions(
            preservation_policy=checkpoint_managers.AnyPreservationPolicy(policies),
            cleanup_tmp_directories=True,
            enable_async_checkpointing=True,
        )
        with disk_errors(self._directory):
            self._manager = ocp.CheckpointManager(self._directory, options=options)

    @property
    def latest_step(self) -> int | None:
        """The step of the newest whole checkpoint."""
        return self._manager.latest_step()

    def save(self, step: int, state: TrainState, position: Mapping[str, Any]) -> None:
        """Starts writing a checkpoint; what an earlier one ran into is raised here.

        Raises:
          RunError: the disk is full or cannot be written.
        """
        items = {
            LIVE: ocp.args.StandardSave(state.params),
            "optimizer": ocp.args.StandardSave(state.optimizer),
            "position": ocp.args.JsonSave({"format": FORMAT, **position}),
        }
        for name, average in state.averages.items():
            items[_average_item(name)] = ocp.args.StandardSave(average)
        with disk_errors(self._directory / str(step)):
            self._manager.save(step, args=ocp.args.Composite(**items))

    def restore(self, step: int, abstract: TrainState) -> TrainState:
        """The state saved at `step`, placed as the leaves of `abstract` say."""
        items = {
            LIVE: ocp.args.StandardRestore(abstract.params),
            "optimizer": ocp.args.StandardRestore(abstract.optimizer),
        }
        for name, average in abstract.averages.items():
            items[_average_item(name)] = ocp.args.StandardRestore(average)
        restored = self._manager.restore(step, args=ocp.args.Composite(**items))
        averages = {name: restored[_average_item(name)] for name in abstract.averages}
        count = jax.device_put(np.int32(step), abstract.step.sharding)
        return TrainState(count, restored[LIVE], restored["optimizer"], averages)

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
        with suppress(Exception) if kind else disk_errors(self._directory):
            self._manager.close()


def write_json(path: epath.Path, value: Any) -> None:
    """Writes JSON so that the file is either the old one or the whole new one."""
    partial = path.parent / f".{path.name}.partial"
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(json.dumps(value, indent=2) + "\n")
        partial.replace(path)


def fingerprint(params: Any) -> str:
    """Tells parameters, or any other tree of arrays, from others."""
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(params):
        # As bytes: a buffer of bfloat16, say, is none that hashlib knows.
        digest.update(np.ascontiguousarray(leaf).reshape(-1).view(np.uint8))
    return digest.hexdigest()[:16]


def read_config(directory: epath.PathLike) -> dict[str, Any]:
    """The resolved config of a run or an export.

    Raises:
      InputError: there is none.
    """
    path = run_of(directory)[0] / CONFIG_FILE
    if not path.exists():
        raise InputError(f"checkpoint={directory}: it holds no {CONFIG_FILE}; give the workdir of "
                         "a run or an exported directory")
    config = json.loads(path.read_text())
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
    return json.loads((run_of(directory)[0] / CONFIG_FILE).read_text()).get("origin", "")


def latest_step(workdir: epath.PathLike) -> int | None:
    """The step of the newest whole checkpoint of a run, or of the one that is named; None without
    one."""
    run, step = run_of(_absolute(workdir))
    folder = run / CHECKPOINTS
    if step is not None:
        return step if (folder / str(step)).exists() else None
    return ocp.CheckpointManager(folder).latest_step() if folder.exists() else None


def _stored(directory: epath.Path, average: str) -> epath.Path:
    """Where the parameters of a run (its newest checkpoint) or of an export lie."""
    if (directory / LIVE).exists():
        return directory / LIVE
    if not directory.exists():
        raise InputError(f"checkpoint={directory}: there is no such directory; give the workdir of "
                         "a run or an exported directory")
    step = latest_step(directory)
    if step is None:
        raise InputError(f"checkpoint={directory}: no checkpoint was saved there yet")
    saved = run_of(directory)[0] / CHECKPOINTS / str(step)
    item = saved / (_average_item(average) if average else LIVE)
    if not item.exists():
        names = [p.name.removeprefix(_average_item("")) for p in saved.glob(_average_item("*"))]
        raise InputError(f"ema={average}: {directory} has {', '.join(sorted(names))}")
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
      missing: top-level names that the checkpoint may lack; left out of the result.
      surplus: top-level names that it may hold in vain.

    Raises:
      InputError: nothing is there, or another architecture; the message names a parameter.
    """
    directory = _absolute(directory)
    path = _stored(directory, average)
    with ocp.StandardCheckpointer() as checkpointer:
        metadata = checkpointer.metadata(path).item_metadata
        stored = flatten_dict(metadata.tree if hasattr(metadata, "tree") else metadata, sep="/")
        wanted = flatten_dict(abstract, sep="/")
        for name in sorted(wanted.keys() | stored.keys()):
            top = name.split("/")[0]
            if name not in stored and top not in missing:
                raise InputError(f"checkpoint={directory}: of another architecture, it lacks "
                                 f"{name}")
            if name not in wanted and top not in surplus:
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
        restored = checkpointer.restore(path, unflatten_dict(target, sep="/"))
    restored = flatten_dict(restored, sep="/")
    return unflatten_dict({k: v for k, v in restored.items() if k in wanted}, sep="/")


@contextmanager
def new_directory(directory: epath.PathLike) -> Iterator[epath.Path]:
    """A directory to write into that appears under its name when it is whole, or not at all.

    Raises:
      InputError: the directory exists and is not empty.
      RunError: the disk is full or cannot be written.
    """
    directory = _absolute(directory)
    if directory.exists() and not (directory.is_dir() and not any(directory.iterdir())):
        raise InputError(f"output={directory}: it exists and is not empty; choose another")
    partial = directory.parent / f".{directory.name}.partial"
    with disk_errors(directory):
        if partial.exists():
            partial.rmtree()
        partial.mkdir(parents=True)
        try:
            yield partial
            if directory.exists():
                directory.rmdir()
            partial.rename(directory)
        except BaseException:
            partial.rmtree()
            raise


def write_params(directory: epath.Path, params: Params) -> None:
    """Writes the parameters of an export (Orbax), arrays of numpy without a copy of them all."""
    handlers = ocp.type_handlers.create_type_handler_registry(
        (jax.Array, ocp.type_handlers.ArrayHandler()),
        (np.ndarray, ocp.type_handlers.NumpyHandler(deepcopy_host_arrays=False)),
    )
    handler = ocp.PyTreeCheckpointHandler(type_handler_registry=handlers)
    with ocp.Checkpointer(handler) as checkpointer:
        checkpointer.save(directory / LIVE, args=ocp.args.PyTreeSave(params))


def describe(directory: epath.Path, config: Mapping[str, Any], card: str, *, origin: str) -> None:
    """Writes the config and the model card of an export, in whatever format it is."""
    write_json(directory / CONFIG_FILE, {"format": FORMAT, "origin": origin, **config})
    (directory / CARD_FILE).write_text(card)
