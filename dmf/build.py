"""From a config to components: the only place, with `training` and `evaluation`, that reads one.

A component of a config is a dictionary with a `name` and the fields of the class that the name
stands for in `COMPONENTS`. A field that the class does not have, or a name that the table does not
hold, is an error that says so. A config file may add components of its own with `register`.
"""

import dataclasses
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import jax
from etils import epath
from jax.sharding import Mesh
from ml_collections import ConfigDict, config_dict

from dmf import checkpoint, flow, guidance, objectives, optimizer, samplers, times, weighting
from dmf.data.pipeline import Pipeline
from dmf.data.sources import ImageSource, open_source
from dmf.models.dit import DiT
from dmf.objectives import Objective
from dmf.optimizer import AdamW, Ema
from dmf.samplers import Sampler
from dmf.sharding import batch_divisor, make_mesh, parameter_shardings
from dmf.state import with_shardings
from dmf.typing import FlowMap, InputError, Network, Params

COMPONENTS: dict[str, dict[str, Any]] = {
    "model": {"dit": DiT},
    "objective": {
        "flow_matching": objectives.FlowMatching,
        "mean_flow": objectives.MeanFlow,
        "decoupled_mean_flow": objectives.DecoupledMeanFlow,
    },
    "interpolant": {"linear": flow.LINEAR, "cosine": flow.COSINE},
    "time": {"logit_normal": times.LogitNormal, "uniform": times.Uniform},
    "times": {"ordered_pair": times.OrderedPair},
    "guidance": {
        "none": guidance.NoGuidance,
        "self": guidance.SelfGuidance,
        "teacher": guidance.TeacherGuidance,
    },
    "weighting": {
        "uniform": weighting.Uniform,
        "adaptive": weighting.Adaptive,
        "cauchy": weighting.Cauchy,
        "released": weighting.Released,
    },
    "optimizer": {"adamw": AdamW},
    "emas": {"constant": optimizer.ConstantEma, "half_life": optimizer.HalfLifeEma},
    "sampler": {
        "euler": samplers.Euler,
        "restart": samplers.Restart,
        "ctm": samplers.ConsistencyTrajectory,
        "heun": samplers.Heun,
        "sde": samplers.Diffusion,
    },
}
# Fields that hold a component of a kind with another name.
_KIND = {"first": "time", "second": "time"}
# Parameters that an objective may want and a flow model lacks, and the other way round.
_ADDED = ("log_variance", "interval_embedding", "projector")
_DROPPED = ("log_variance", "projector")


def register(kind: str, name: str, component: Any) -> None:
    """Adds a component to `COMPONENTS[kind]`, for config files that bring their own.

    Raises:
      InputError: there is no such kind.
    """
    _lookup(COMPONENTS, kind, "kind")[name] = component


def _lookup(table: Mapping[str, Any], name: Any, field: str) -> Any:
    if name not in table:
        raise InputError(f"{field}={name}: choose one of {', '.join(sorted(table))}")
    return table[name]


def component(kind: str, config: Mapping[str, Any] | ConfigDict, field: str, **more: Any) -> Any:
    """Builds the component that `config.name` stands for, its inner components first.

    Args:
      kind: which table of `COMPONENTS`.
      config: `name` and the component's fields.
      field: where the config stands, for messages.
      more: fields that do not come from the config.

    Raises:
      InputError: an unknown name or field, or values that the component refuses.
    """
    values = dict(config)
    made = _lookup(COMPONENTS[kind], values.pop("name", None), f"{field}.name")
    known = {f.name for f in dataclasses.fields(made)}
    for name, value in values.items():
        if name not in known:
            raise InputError(f"{field}.{name}={value}: {config['name']} has no such field; it has "
                             f"{', '.join(sorted(known)) or 'none'}")
        values[name] = _value(name, value, f"{field}.{name}")
    return made(**values, **more)


def _value(name: str, value: Any, field: str) -> Any:
    kind = _KIND.get(name, name)
    if isinstance(value, Mapping | ConfigDict):
        return component(kind, value, field)
    if kind in COMPONENTS:
        return _lookup(COMPONENTS[kind], value, field)
    return tuple(value) if isinstance(value, list | tuple) else value


def network(config: ConfigDict) -> Network:
    """The network of `config.model`."""
    fields = dict(config.model)
    return component("model", {"name": fields.pop("name", "dit"), **fields}, "model")


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
        path = _lookup(COMPONENTS["interpolant"], config.objective.interpolant, "interpolant")
        chosen = dataclasses.replace(chosen, interpolant=path)
    return chosen


def guided(config: ConfigDict, flow_map: FlowMap) -> FlowMap:
    """The flow map under the guidance of `config.sampling`."""
    fields = {name: _value(name, value, name) for name, value in config.sampling.guidance.items()}
    return guidance.ClassifierFree(**fields)(flow_map, config.model.num_classes)


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
        return restore(network, config.init.checkpoint, config.init.ema, on=on, missing=_ADDED)


@contextmanager
def _about(part: str) -> Iterator[None]:
    """Says which part of the config a complaint is about."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{part}.{error}") from None


def restore(
    network: Network,
    directory: epath.PathLike,
    ema: str,
    *,
    on: Mesh,
    missing: tuple[str, ...] = (),
) -> Params:
    """Parameters of a run or export for `network`, placed on the mesh."""
    abstract = jax.eval_shape(network.init, jax.random.key(0))
    target = with_shardings(abstract, parameter_shardings(on, abstract))
    return checkpoint.restore_params(
        directory, target, average=ema, missing=missing, surplus=_DROPPED
    )


def plain(config: ConfigDict) -> dict[str, Any]:
    """A config as JSON holds it: tuples as lists, nothing else."""
    return json.loads(config.to_json_best_effort())


def read_config(directory: epath.PathLike) -> ConfigDict:
    """The config that a run or an export was made with."""
    config = ConfigDict(checkpoint.read_config(directory))
    if config.model.split_depth is None:
        # JSON forgets the type of a field that is not set.
        config.model.split_depth = config_dict.placeholder(int)
    return config


def load_network(
    directory: epath.PathLike,
    ema: str = "main",
    *,
    on: Mesh | None = None,
    config: ConfigDict | None = None,
) -> tuple[Network, ConfigDict, Params]:
    """The network, config and parameters of a run or an export.

    Args:
      directory: a workdir or an export.
      ema: which average of a run; empty for the trained parameters themselves.
      on: the mesh to place parameters on; all devices along "data" by default.
      config: in place of the stored one, to see the same parameters as another network.
    """
    config = read_config(directory) if config is None else config
    made = network(config)
    on = make_mesh() if on is None else on
    return made, config, restore(made, directory, ema, on=on, missing=("log_variance",))


def load(directory: epath.PathLike, *, ema: str = "main") -> tuple[FlowMap, ConfigDict]:
    """The flow map of a run or an export, ready to call, and its config.

    Args:
      directory: a workdir, whose newest checkpoint is read, or an export.
      ema: which average of a run; an export holds one set of parameters.

    Returns:
      u(x_t, t, r, y) -> [b, h, w, c], unguided; and the config it was trained with. The flow map
      is a pytree, so that it can be an argument of a jitted function: closed over, its parameters
      would be compiled in.

    Raises:
      InputError: nothing is there, or no such average.
    """
    made, config, params = load_network(directory, ema)
    return jax.tree_util.Partial(made.apply, params), config
