"""From a config to what a run is made of, built and checked before anything is written."""

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

from jax.sharding import Mesh
from ml_collections import ConfigDict

from dmf import guidance
from dmf.components import COMPONENTS, component, field_value, lookup, network
from dmf.data.pipeline import Pipeline
from dmf.data.sources import ImageSource, open_source
from dmf.loading import ADDED, load_network, restore
from dmf.objectives import Objective
from dmf.optimizer import AdamW, Ema
from dmf.samplers import Sampler
from dmf.sharding import batch_divisor, make_mesh
from dmf.typing import FlowMap, InputError, Network, Params


def objective(config: ConfigDict, teacher: Network | None = None) -> Objective:
    """The objective of `config.objective`, with the network of its teacher if it has one."""
    kind = config.objective
    distils = "guidance" in kind and kind.guidance.get("name") == "teacher"
    more = {"teacher": teacher} if teacher is not None and distils else {}
    return component("objective", kind, "objective", **more)


def sampler(config: ConfigDict) -> Sampler:
    """The sampler of `config.sampling`, on the path that the objective trains."""
    chosen = component("sampler", config.sampling.sampler, "sampling.sampler")
    if chosen.stochastic:
        path = lookup(COMPONENTS["interpolant"], config.objective.interpolant, "interpolant")
        chosen = dataclasses.replace(chosen, interpolant=path)
    return chosen


def guided(config: ConfigDict, flow_map: FlowMap) -> FlowMap:
    """The flow map under the guidance of `config.sampling`."""
    chosen = {name: field_value(name, value, name)
              for name, value in config.sampling.guidance.items()}
    return guidance.ClassifierFree(**chosen)(flow_map, config.model.num_classes)


def emas(config: ConfigDict) -> dict[str, Ema]:
    """The averages of `config.emas` by name."""
    return {name: component("emas", ema, f"emas.{name}") for name, ema in config.emas.items()}


def mesh(config: ConfigDict) -> Mesh:
    """The mesh of `config.mesh` over all devices."""
    return make_mesh(**config.mesh)


def source(config: ConfigDict) -> ImageSource:
    """The dataset of `config.data`.

    Raises:
      InputError: it is not there, or its images or labels are not those of `config.model`.
    """
    data, model = config.data, network(config)
    rows = open_source(data.name, split=data.split, directory=data.directory)
    shape = rows.read([0])[0].shape[1:]
    if shape != model.sample_shape:
        raise InputError(f"data.name={data.name}: its images have shape {shape}, but "
                         f"config.model takes {model.sample_shape}; set model.input_size and "
                         "model.channels")
    if model.num_classes and rows.num_classes != model.num_classes:
        raise InputError(f"model.num_classes={model.num_classes}: {data.name} has "
                         f"{rows.num_classes}; 0 trains without labels")
    return dataclasses.replace(rows, num_classes=model.num_classes)


class Training(NamedTuple):
    """Everything that a training step is made of."""

    network: Network
    objective: Objective
    optimizer: AdamW
    emas: dict[str, Ema]
    mesh: Mesh
    pipeline: Pipeline
    frozen: dict[str, Params]


def training(config: ConfigDict) -> Training:
    """Builds and checks everything that `config` asks for, before anything is written.

    Raises:
      InputError: a field that cannot be; the message names it.
    """
    made = network(config)
    on = mesh(config)
    teacher, frozen = None, {}
    if config.teacher.checkpoint:
        with _about("teacher"):
            teacher, _, params = load_network(config.teacher.checkpoint, config.teacher.ema, on=on)
        frozen = {"teacher": params}
    goal = objective(config, teacher)
    check(config, goal, on)
    if teacher is not None and teacher.sample_shape != made.sample_shape:
        raise InputError(f"teacher.checkpoint={config.teacher.checkpoint}: it takes "
                         f"{teacher.sample_shape}, config.model {made.sample_shape}")
    return Training(
        network=made,
        objective=goal,
        optimizer=component("optimizer", config.optimizer, "optimizer"),
        emas=emas(config),
        mesh=on,
        pipeline=Pipeline(
            source=source(config), batch_size=config.data.batch_size, seed=config.seed
        ),
        frozen=frozen if goal.needs_teacher else {},
    )


def check(config: ConfigDict, goal: Objective, on: Mesh) -> None:
    """Raises InputError where parts of a config do not go together."""
    for field, least in (("steps", 1), ("log_every", 1), ("keep_last", 1), ("sample_every", 0),
                         ("checkpoint_every", 0), ("keep_every", 0)):
        if config.run[field] < least:
            raise InputError(f"run.{field}={config.run[field]}: give {least} or more")
    size, parts = config.data.batch_size, batch_divisor(on)
    if config.accumulation < 1:
        raise InputError(f"accumulation={config.accumulation}: give 1 or more")
    if size < 1 or size % (parts * config.accumulation):
        raise InputError(f"data.batch_size={size}: it must be a multiple of {parts} (mesh axes "
                         f"data x fsdp) times accumulation={config.accumulation}")
    if goal.learned_variance and not config.model.learned_variance:
        raise InputError("model.learned_variance=False: the weighting "
                         f"{config.objective.weighting.name} needs the log-variance head; set it "
                         "to True")
    if goal.alignment and not config.model.alignment_depth:
        raise InputError("model.alignment_depth=0: an alignment coefficient needs the block after "
                         "which tokens are projected (8 as published)")
    if config.sampling.ema and config.sampling.ema not in config.emas:
        raise InputError(f"sampling.ema={config.sampling.ema}: config.emas has "
                         f"{', '.join(config.emas) or 'none'}; empty takes the parameters")


def pretrained(config: ConfigDict, network: Network, on: Mesh) -> Params:
    """The parameters of `config.init.checkpoint`, none without it.

    What a flow model lacks (a log-variance head, a second time embedding) is left to be
    initialised, and what only its training used is dropped.
    """
    if not config.init.checkpoint:
        return {}
    with _about("init"):
        return restore(network, config.init.checkpoint, config.init.ema, on=on, missing=ADDED)


@contextmanager
def _about(part: str) -> Iterator[None]:
    """Says which part of the config a complaint is about."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{part}.{error}") from None
