"""Configs of checkpoints as an enemy would write them, and what each verb reads of a config."""

import collections
import copy
import json
import math
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
import tiny
from etils import epath
from ml_collections import ConfigDict

from dmf.checkpoints import export_parts, load, model_card
from dmf.checkpoints.params import FORMAT, write_config_and_card, write_params
from dmf.cli import config_flag
from dmf.errors import InputError, RunError
from dmf.evaluation.evaluator import Evaluator
from dmf.experiments import html_report, runs, tables
from dmf.models.build import network
from dmf.objectives.build import interpolant
from dmf.runtime.sharding import local_mesh
from dmf.sampling.build import sampling
from dmf.sampling.generator import Generator

Change = tuple[str, Any]


def nested(depth: int) -> Any:
    """Dictionaries in dictionaries."""
    value: Any = {}
    for _ in range(depth):
        value = {"a": value}
    return value


VALUES: tuple[Any, ...] = (
    None, True, 0, -1, 2**31 - 1, 2**31, 10**400, 0.5, -0.5, 1e308, math.nan, math.inf, "", "a",
    "\ud800", "a\0b", "../..", "$a|b\n", "é" * 5000, [], [1, 2], ["a"], [[1]], [{}], {},
    {"name": "dit"}, {"name": []}, {"a": 1}, {"a.b": 1}, {"__class__": 1}, nested(12), nested(300),
)  # fmt: skip


def write_export(folder: pathlib.Path, config: ConfigDict) -> dict[str, Any]:
    """Writes an export of a network with zero parameters; returns what its config.json holds."""
    stored = load.config_to_json(config)
    shapes = jax.eval_shape(network(config.model).init, jax.random.key(0))
    folder.mkdir()
    write_params(epath.Path(folder), jax.tree.map(lambda leaf: jax.numpy.zeros_like(leaf), shapes))
    write_config_and_card(epath.Path(folder), stored, "", origin="drawn")
    return {"format": FORMAT, "origin": "drawn", **stored}


def places(value: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """The path of every section and field of a config."""
    if isinstance(value, dict):
        for name, part in value.items():
            yield (*path, name)
            yield from places(part, (*path, name))


def mutations(stored: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Configs with one thing changed, and what it is: every value in every place, every field left
    out, and a field more in every section."""
    for path in places(stored):
        for value in VALUES:
            yield f"{'.'.join(path)}={value!r:.60}", _changed(stored, path, value)
        yield f"{'.'.join(path)} left out", _changed(stored, path)
        for name in ("extra", "update", "items", ""):
            if isinstance(_found(stored, path), dict):
                yield f"{'.'.join(path)} has {name!r}", _changed(stored, (*path, name), 1)


def _found(value: Any, path: tuple[str, ...]) -> Any:
    for name in path:
        value = value[name]
    return value


def _changed(stored: dict[str, Any], path: tuple[str, ...], *values: Any) -> dict[str, Any]:
    changed = copy.deepcopy(stored)
    section = _found(changed, path[:-1])
    if values:
        section[path[-1]] = values[0]
    else:
        del section[path[-1]]
    return changed


def write_config(folder: pathlib.Path, config: Any) -> None:
    """Puts another config.json into an export."""
    (folder / "config.json").write_bytes(json.dumps(config).encode())


# What the verbs do with a config, up to the first computation.


def sample(folder: pathlib.Path) -> None:
    """`dmf sample` up to its program."""
    config = config_flag.overridden_stored(load.read_config(folder), ())
    settings, mesh = sampling(config.sampling, interpolant(config.objective)), local_mesh(1)
    latents = load.load_latent_space(config)
    built, _, params = load.load_network(folder, "", mesh=mesh, config=config)
    generate = Generator(built, settings, latents, mesh=mesh)(params, steps=settings.steps[0])
    assert generate is not None


def evaluate(folder: pathlib.Path) -> None:
    """`dmf evaluate` up to the first image."""
    config = config_flag.overridden_stored(load.read_config(folder), ())
    settings = sampling(config.sampling, interpolant(config.objective))
    evaluator = Evaluator(config, folder / ".parts")
    generator = Generator(network(config.model), settings, None, mesh=evaluator.mesh)
    evaluator.check(generator.image_shape, config.evaluation.count, labelled=True)


def exported(folder: pathlib.Path) -> None:
    """`dmf export` and `dmf convert` up to the first file."""
    config = config_flag.overridden_stored(load.read_config(folder), ())
    parts = export_parts.open_parts(folder, "", config)
    model_card.model_card(parts.config, parts.params, origin=parts.origin, usage="").encode()
    json.dumps(parts.config)


def loaded(folder: pathlib.Path) -> None:
    """`dmf.load`."""
    load.load(folder, ema="")


def report(folder: pathlib.Path) -> None:
    """`dmf report` without its plots, as of a run."""
    run = folder.with_name("run")
    run.mkdir(exist_ok=True)
    (run / "config.json").write_bytes((folder / "config.json").read_bytes())
    found = [runs.read_run(epath.Path(run), "run"), runs.read_run(epath.Path(run), "other")]
    tables.runs_table(found).to_csv().encode()
    html_report.page(found, epath.Path(folder)).encode()


VERBS: dict[str, Callable[[pathlib.Path], None]] = {
    "sample": sample, "evaluate": evaluate, "export": exported, "load": loaded, "report": report,
}  # fmt: skip


def try_mutations(folder: str, number: int) -> None:
    """Prints how often each verb accepts, refuses, or ends in a traceback, of some mutations of an
    export's config, as JSON; and the tracebacks."""
    export_folder = pathlib.Path(folder) / "stranger"
    fields = {"model.depth": 1, "model.width": 8, "model.heads": 1}
    every = list(mutations(write_export(export_folder, tiny.config(fields))))
    counts, tracebacks = collections.Counter(), []
    for index in np.random.default_rng(0).permutation(len(every))[:number]:
        change, config = every[index]
        write_config(export_folder, config)
        for name, verb in VERBS.items():
            try:
                verb(export_folder)
                counts[f"{name} accepted"] += 1
            except (InputError, RunError):
                counts[f"{name} refused"] += 1
            except Exception as error:
                counts[f"{name} traceback"] += 1
                tracebacks.append(f"{name}: {change}: {type(error).__name__}: {error}"[:300])
    print(json.dumps([counts, tracebacks]))
