"""The parameters of a run or an export on disk, and the files beside them.

A run stores, below its workdir, `config.json` and `checkpoints/STEP/` with one Orbax item each for
`params`, `opt_state` and every `ema_params_NAME`, and `position` and `checksums` as JSON; and
`ema_snapshots/STEP/` of the same form, with the power EMAs alone (`manager.SnapshotManager`). An
export is a directory with `params/` (Orbax), `checksums.json`, `config.json` and `README.md`. Both
can be restored with Orbax alone, both appear under their name only when they are complete, and both
are restored only if every array is what was saved.
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from flax.traverse_util import flatten_dict, unflatten_dict

from dmf.checkpoints import stored_config
from dmf.checkpoints.located import local_directory
from dmf.checkpoints.orbax_files import check_stored, tree_metadata
from dmf.errors import Damaged, InputError, RunError
from dmf.runtime.checksums import check_checksums, checksums, reading_errors
from dmf.runtime.files import absolute, is_regular_file, write_json
from dmf.types import Params

FORMAT = 2
CONFIG_FILE = "config.json"
CARD_FILE = "README.md"
SAFETENSORS_FILE = "model.safetensors"
CHECKPOINTS = "checkpoints"
SNAPSHOTS = "ema_snapshots"
PARAMS = "params"
EMA_PREFIX = "ema_params_"
CHECKSUMS = "checksums"
POSITION = "position"
# Each of the devices that hold an array writes a slice of it, cut by a program that is compiled for
# it. To compile takes longer than to write slices smaller than this, in bytes, whole.
_MIN_REPLICA_SLICE_BYTES = 2**20


def split_step(directory: epath.PathLike) -> tuple[epath.Path, int | None]:
    """The run or export of a directory, and the step of a directory that is one of its checkpoints.

    >>> [str(part) for part in split_step("runs/digits/checkpoints/600")]
    ['runs/digits', '600']
    >>> [str(part) for part in split_step("runs/digits")]
    ['runs/digits', 'None']
    """
    path = local_directory(directory)
    if path.parent.name == CHECKPOINTS and path.name.isdecimal():
        return path.parent.parent, int(path.name)
    return path, None


def single_process_checkpointer() -> ocp.Checkpointer:
    """A checkpointer for reading that does not wait for other processes."""
    process = jax.process_index()
    options = ocp.options.MultiprocessingOptions(
        primary_host=process,
        active_processes={process},
        barrier_sync_key_prefix=f"process{process}",
    )
    handler = ocp.StandardCheckpointHandler(multiprocessing_options=options)
    return ocp.Checkpointer(handler, multiprocessing_options=options)


def tree_handler() -> ocp.PyTreeCheckpointHandler:
    """The handler that writes trees of arrays; arrays of numpy are written without a copy."""
    jax_arrays = ocp.type_handlers.ArrayHandler(
        min_slice_bytes_for_replica_parallel=_MIN_REPLICA_SLICE_BYTES
    )
    numpy_arrays = ocp.type_handlers.NumpyHandler(deepcopy_host_arrays=False)
    return ocp.PyTreeCheckpointHandler(
        type_handler_registry=ocp.type_handlers.create_type_handler_registry(
            (jax.Array, jax_arrays), (np.ndarray, numpy_arrays)
        )
    )


def read_config(directory: epath.PathLike) -> dict[str, Any]:
    """The resolved config of a run or an export.

    Raises:
      InputError: there is no config, or it is of another format.
      RunError: it is damaged.
    """
    path = split_step(directory)[0] / CONFIG_FILE
    if not is_regular_file(path):
        raise InputError(
            "checkpoint", directory,
            f"it holds no {CONFIG_FILE}; give the workdir of a run or an exported directory",
        )
    check_format(directory)
    config = stored_config.read(path)
    return {name: value for name, value in config.items() if name not in ("format", "origin")}


def check_format(directory: epath.PathLike, *, field: str = "checkpoint") -> None:
    """Checks that this dmf reads a run or an export; a directory without a config passes.

    Args:
      directory: a workdir, one of its checkpoints/STEP, or an export.
      field: name of the flag or field that gives the directory, for the message.

    Raises:
      InputError: the directory has another format.
    """
    folder = split_step(directory)[0]
    if not is_regular_file(folder / CONFIG_FILE):
        return
    version = stored_config.read(folder / CONFIG_FILE).get("format")
    if version == FORMAT:
        return
    if not isinstance(version, int) or version > FORMAT:
        raise InputError(field, directory, f"its format is {version}, and this dmf reads {FORMAT}; "
                         "use the dmf that wrote it")
    if (folder / SAFETENSORS_FILE).exists():
        remedy = "bring it in with dmf convert"
    else:
        remedy = "export it with that dmf as --format=safetensors, and bring it in with dmf convert"
    raise InputError(field, directory, f"an earlier dmf wrote it (format {version}); {remedy}")


def is_dmf_checkpoint(directory: epath.PathLike) -> bool:
    """Whether a directory is a run, or an export with Orbax parameters."""
    path, _ = split_step(directory)
    return (path / CONFIG_FILE).exists() and any((path / d).exists() for d in (PARAMS, CHECKPOINTS))


def is_export(directory: epath.PathLike) -> bool:
    """Whether a directory is an export with Orbax parameters, and no run."""
    path, step = split_step(directory)
    return step is None and (path / PARAMS).exists()


def read_origin(directory: epath.PathLike) -> str:
    """The origin of the parameters of an export; empty for a run."""
    return stored_config.read(split_step(directory)[0] / CONFIG_FILE).get("origin", "")


def latest_step(workdir: epath.PathLike) -> int | None:
    """The step of the newest complete checkpoint of a run; None if there is none.

    Args:
      workdir: a workdir, or one of its checkpoints/STEP, whose step is returned if it exists.
    """
    run, step = split_step(absolute(local_directory(workdir)))
    folder = run / CHECKPOINTS
    if step is not None:
        return step if (folder / str(step)).exists() else None
    return ocp.CheckpointManager(folder).latest_step() if folder.exists() else None


def read_position(checkpoint: epath.Path) -> dict[str, Any]:
    """What the position of a checkpoint of a run holds, see `DataLoader.position`.

    Args:
      checkpoint: `checkpoints/STEP` of a run.

    Raises:
      Damaged: it cannot be read, or was saved at another step: the directory was renamed.
    """
    with reading_errors():
        position = json.loads((checkpoint / POSITION / "metadata").read_text())
        step, version = position["step"], position["format"]
    if (step, version) != (int(checkpoint.name), FORMAT):
        raise Damaged(f"it was saved at step {step} in format {version}")
    return position


def check_saved(directory: epath.PathLike, ema: str) -> None:
    """Checks that a run or an export has some parameters, without reading them.

    Args:
      directory: a workdir, one of its checkpoints/STEP, or an export.
      ema: name of the EMA parameters, empty for the raw parameters; ignored for an export.

    Raises:
      InputError: there is no checkpoint, or no such EMA parameters; the message lists those there
        are.
      RunError: the checkpoint is damaged.
    """
    directory = absolute(local_directory(directory))
    check_format(directory)
    with _damage_reported(directory):
        _params_item(directory, ema)


def restore_params(
    directory: epath.PathLike,
    abstract: Params,
    *,
    ema: str = "",
    allow_missing: tuple[str, ...] = (),
    allow_unexpected: tuple[str, ...] = (),
) -> Params:
    """Restores the parameters of a run or an export.

    Args:
      directory: a workdir (its newest checkpoint is restored), one of its checkpoints/STEP, or an
        export.
      abstract: tree of `jax.ShapeDtypeStruct` with the shapes, dtypes and shardings to restore to.
      ema: name of the EMA parameters, empty for the raw parameters; ignored for an export, which
        holds one set.
      allow_missing: parameters of `abstract` that the checkpoint may lack; they are left out of the
        result. A name is a path ("blocks/attention/q_norm") or a folder of parameters
        ("projector").
      allow_unexpected: parameters of the checkpoint that `abstract` may lack, named likewise.

    Returns:
      The parameters in the structure of `abstract`.

    Raises:
      InputError: there is no checkpoint, or it has another format or architecture; the message
        names a parameter.
      RunError: the checkpoint is damaged.
    """
    directory = absolute(local_directory(directory))
    check_format(directory)
    with _damage_reported(directory):
        return restore_item(
            directory, _params_item(directory, ema), abstract,
            allow_missing=allow_missing, allow_unexpected=allow_unexpected,
        )


def restore_item(
    directory: epath.Path,
    item: epath.Path,
    abstract: Params,
    *,
    allow_missing: tuple[str, ...] = (),
    allow_unexpected: tuple[str, ...] = (),
) -> Params:
    """Restores the parameters of one Orbax item of a run or an export.

    Args:
      directory: the run or the export, for error messages.
      item: the item, for example `ema_params_main` of a checkpoint.
      abstract, allow_missing, allow_unexpected: as for `restore_params`.

    Raises:
      InputError: it has another architecture.
      Damaged: it is not what was saved.
    """
    with single_process_checkpointer() as checkpointer:
        stored = _stored_shapes(item)
        expected = flatten_dict(abstract, sep="/")
        _check_architecture(directory, stored, expected, allow_missing, allow_unexpected)
        with reading_errors():
            check_stored(item, stored)
        target = {
            name: expected.get(name, jax.ShapeDtypeStruct(leaf.shape, leaf.dtype))
            for name, leaf in stored.items()
        }
        restored = _restore_item(checkpointer, item, unflatten_dict(target, sep="/"))
    flat = flatten_dict(restored, sep="/")
    return unflatten_dict({name: w for name, w in flat.items() if name in expected}, sep="/")


def _params_item(directory: epath.Path, ema: str) -> epath.Path:
    """The Orbax item of the parameters of an export, or of the newest checkpoint of a run.

    Raises:
      InputError: there is no checkpoint, or it has no such EMA parameters.
      Damaged: the item was saved, and is missing; or the checkpoint is that of another step.
    """
    run, step = split_step(directory)
    if is_export(directory):
        return directory / PARAMS
    if not directory.exists():
        raise InputError(
            "checkpoint", directory,
            "there is no such directory; give the workdir of a run or an exported directory",
        )
    if (directory / SAFETENSORS_FILE).exists():
        raise InputError("checkpoint", directory, f"it holds {SAFETENSORS_FILE}; bring it in with "
                         "dmf convert")
    step = latest_step(directory)
    if step is None:
        raise InputError("checkpoint", directory, "no checkpoint was saved there yet")
    saved = run / CHECKPOINTS / str(step)
    read_position(saved)
    item = saved / (f"{EMA_PREFIX}{ema}" if ema else PARAMS)
    if item.exists():
        return item
    if item.name in _saved_item_names(saved):
        raise Damaged(f"{item.name} is missing")
    names = sorted(p.name.removeprefix(EMA_PREFIX) for p in saved.glob(f"{EMA_PREFIX}*"))
    raise InputError("ema", ema, f"{directory} has {', '.join(names) or 'none'}")


def _stored_shapes(item: epath.Path) -> dict[str, Any]:
    """Metadata with the shape and dtype of each array of an item, by its path.

    Raises:
      Damaged: the metadata cannot be read.
    """
    with reading_errors():
        metadata = tree_metadata(item)
        if metadata is None:
            raise Damaged(f"the list of arrays of {item.name} cannot be read")
        return flatten_dict(metadata, sep="/")


def _restore_item(checkpointer: ocp.Checkpointer, item: epath.Path, target: Params) -> Params:
    """The arrays of an item.

    Raises:
      Damaged: the arrays are not what was saved.
    """
    with reading_errors():
        saved = read_checksums(item)
        restored = checkpointer.restore(item, args=ocp.args.StandardRestore(target))
    check_checksums(checksums(restored), saved)
    return restored


def _check_architecture(
    directory: epath.Path,
    stored: Mapping[str, Any],
    expected: Mapping[str, Any],
    allow_missing: tuple[str, ...],
    allow_unexpected: tuple[str, ...],
) -> None:
    """Raises InputError where a checkpoint has not the expected parameters."""
    for name in sorted(expected.keys() | stored.keys()):
        problem = ""
        if name not in stored:
            if not is_within(name, allow_missing):
                problem = f"it lacks {name}"
        elif name not in expected:
            if not is_within(name, allow_unexpected):
                problem = f"it has {name}, which config.model does not"
        elif stored[name].shape != expected[name].shape:
            problem = (f"{name} has shape {tuple(stored[name].shape)} in the checkpoint and "
                       f"{tuple(expected[name].shape)} in this config")
        if problem:
            raise InputError("checkpoint", directory, f"it has another architecture, {problem}")


def is_within(name: str, folders: tuple[str, ...]) -> bool:
    """Whether a path is one of `folders`, or lies below one of them."""
    return any(f"{name}/".startswith(f"{folder}/") for folder in folders)


@contextmanager
def _damage_reported(directory: epath.Path) -> Iterator[None]:
    """Turns damage into an error that names the directory, and another checkpoint if there is one.

    Raises:
      RunError: a checkpoint is damaged.
    """
    try:
        yield
    except Damaged as error:
        run, step = split_step(directory)
        damaged = latest_step(directory) if step is None else step
        # A save that runs or was interrupted has a name that ends in more than digits.
        others = {int(path.name) for path in (run / CHECKPOINTS).glob("[0-9]*")
                  if path.name.isdecimal()} - {damaged}  # fmt: skip
        remedy = f"try {CHECKPOINTS}/{max(others)}" if others else "make it again"
        raise RunError(f"checkpoint={directory}: it is damaged ({error}); {remedy}") from None


def _saved_item_names(checkpoint: epath.Path) -> set[str]:
    """The names of the items that a checkpoint of a run was saved with, as far as can be told."""
    with suppress(OSError, ValueError):
        return set(json.loads((checkpoint / CHECKSUMS / "metadata").read_text()))
    return {PARAMS}


def read_checksums(item: epath.Path) -> dict[str, int]:
    """The checksum of each array of an item of a run or an export, by its path."""
    exported = item.parent / f"{CHECKSUMS}.json"
    if exported.exists():
        return json.loads(exported.read_text())
    return json.loads((item.parent / CHECKSUMS / "metadata").read_text())[item.name]


def write_params(directory: epath.Path, params: Params) -> None:
    """Writes the parameters of an export with Orbax, and their checksums."""
    with ocp.Checkpointer(tree_handler()) as checkpointer:
        checkpointer.save(directory / PARAMS, args=ocp.args.PyTreeSave(params))
    write_json(directory / f"{CHECKSUMS}.json", checksums(params))


def write_config_and_card(
    directory: epath.Path, config: Mapping[str, Any], card: str, *, origin: str
) -> None:
    """Writes the config of an export, as JSON holds it, with the origin of its parameters, and its
    model card."""
    write_json(directory / CONFIG_FILE, {"format": FORMAT, "origin": origin, **config})
    (directory / CARD_FILE).write_text(card)
