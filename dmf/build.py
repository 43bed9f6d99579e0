"""From a config to what a run is made of, built and checked before anything is written."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from dmf import guidance
from dmf.alignment import PatchFeatures, check_stored, check_width
from dmf.components import COMPONENTS, component, field_value, network
from dmf.data.pipeline import Pipeline
from dmf.data.samples import ToSamples, sample_shape
from dmf.data.sources import JoinedSource, Source, Unlabelled, open_source
from dmf.encoders.dinov2 import DinoV2
from dmf.freezing import Frozen, frozen
from dmf.loading import ADDED, load_encoder, load_network, restore, scaling
from dmf.objectives import Objective
from dmf.optimizer import AdamW, Ema
from dmf.samplers import Sampler
from dmf.sharding import batch_divisor, make_mesh
from dmf.typing import FlowMap, InputError, Network, Params


def objective(config: ConfigDict, teacher: Network | None = None) -> Objective:
    """The objective of `config.objective`, with the network of its teacher if it has one."""
    more = {"teacher": teacher} if teacher is not None and distils(config) else {}
    return component("objective", config.objective, "objective", **more)


def distils(config: ConfigDict) -> bool:
    """Whether the objective of a config asks for a teacher."""
    kind = config.objective.get("guidance", "")
    return (kind if isinstance(kind, str) else kind.get("name")) == "teacher"


def sampler(config: ConfigDict) -> Sampler:
    """The sampler of `config.sampling`, on the path that the objective trains."""
    chosen = component("sampler", config.sampling.sampler, "sampling.sampler")
    if chosen.stochastic:
        named = config.objective.get("interpolant", "linear")
        path = field_value("interpolant", named, "objective.interpolant")
        chosen = dataclasses.replace(chosen, interpolant=path)
    return chosen


def guided(config: ConfigDict, flow_map: FlowMap, null_label: int) -> FlowMap:
    """The flow map under the guidance of `config.sampling`; a network that takes it as an input
    is asked for it."""
    chosen = {name: field_value(name, value, name)
              for name, value in config.sampling.guidance.items()}
    if config.model.get("guidance_input"):
        return guidance.AskedOf(**chosen)(flow_map)
    return guidance.ClassifierFree(**chosen)(flow_map, null_label)


def emas(config: ConfigDict) -> dict[str, Ema]:
    """The averages of `config.emas` by name."""
    return {name: component("emas", ema, f"emas.{name}") for name, ema in config.emas.items()}


def mesh(config: ConfigDict) -> Mesh:
    """The mesh of `config.mesh` over all devices."""
    return make_mesh(**config.mesh)


def source(config: ConfigDict, beside: str = "") -> Source:
    """The dataset of `config.data`: one, some classes of it, or a mixture.

    Args:
      config: its `data` and its `model`.
      beside: what is read along with rows, "images" or "features" for alignment, or nothing.

    Raises:
      InputError: it is not there, or its rows, its labels or what is beside them are not those of
        `config.model`.
    """
    data, model = config.data, network(config)
    mixed = {"": data, **data.mixture}
    parts = [_part(config, name, dict(fields), model, beside) for name, fields in mixed.items()]
    if beside:
        _check_beside(config, [rows for rows, _ in parts], beside)
    if len(parts) == 1 and not data.classes:
        return parts[0][0]
    return JoinedSource(parts=tuple(parts))


def _part(
    config: ConfigDict, name: str, fields: Mapping[str, Any], model: Network, beside: str
) -> tuple[Source, np.ndarray]:
    """A dataset of the mixture, and which of its rows are taken."""
    field, known = f"data.mixture.{name}" if name else "data", {"name", "split", "directory"}
    unknown = fields.keys() - known - {"weight"} if name else set()
    if unknown:
        raise InputError(f"{field}.{min(unknown)}: a part of a mixture has name, split, directory "
                         "and weight")
    rows = _opened({key: fields[key] for key in known & fields.keys()}, model, beside)
    if sample_shape(rows.shape) != model.sample_shape:
        raise InputError(f"{field}.name={fields['name']}: its images have shape "
                         f"{sample_shape(rows.shape)}, but config.model takes "
                         f"{model.sample_shape}; set model.input_size and model.channels")
    if model.num_classes and rows.num_classes != model.num_classes:
        raise InputError(f"model.num_classes={model.num_classes}: {fields['name']} has "
                         f"{rows.num_classes}; 0 trains without labels")
    to_samples(config).check(rows.shape)
    chosen = _chosen(config.data.classes, rows)
    return (rows if model.num_classes else Unlabelled(rows)), chosen


def _opened(fields: Mapping[str, Any], model: Network, beside: str) -> Source:
    """A dataset by its name: one that was registered, or else one that is stored."""
    opens = COMPONENTS["data"].get(fields["name"])
    if opens is None:
        return open_source(**fields, num_classes=model.num_classes or None, beside=beside)
    if beside:
        raise InputError(f"data.name={fields['name']}: a registered dataset has no {beside} to "
                         "align with; set objective.alignment_coefficient to 0")
    return opens(split=fields.get("split", "train"), directory=fields.get("directory", ""))


def _check_beside(config: ConfigDict, parts: Sequence[Source], beside: str) -> None:
    """Raises InputError where what is read along with rows does not fit the network."""
    shapes = {rows.name: rows.read([0])[2].shape[1:] for rows in parts}
    if len(set(shapes.values())) > 1:
        raise InputError(f"data.mixture: its {beside} have several shapes, {shapes}; make them one "
                         "with dmf prepare")
    if beside == "features":
        for name, shape in shapes.items():
            check_stored(shape, _tokens(config) ** 2, config.model.alignment_width,
                         mirror=config.data.mirror, name=name)  # fmt: skip


def _tokens(config: ConfigDict) -> int:
    """Along each side of an image."""
    return config.model.input_size // config.model.patch_size


def _chosen(classes: Sequence[int], rows: Source) -> np.ndarray:
    """The rows of some classes, or all."""
    if not classes:
        return np.arange(len(rows))
    wrong = [label for label in classes if not 0 <= label < rows.num_classes]
    if wrong:
        raise InputError(f"data.classes={tuple(classes)}: {rows.name} has the labels 0 to "
                         f"{rows.num_classes - 1}, and no {wrong[0]}")
    chosen = np.flatnonzero(np.isin(rows.labels(), classes))
    if not len(chosen):
        raise InputError(f"data.classes={tuple(classes)}: {rows.name} has no row of them")
    return chosen


def weights(config: ConfigDict) -> tuple[float, ...]:
    """How often each part of a mixture is drawn from; none where there is one dataset.

    Raises:
      InputError: a weight that is not positive.
    """
    parts = {"data": config.data} | {
        f"data.mixture.{name}": fields for name, fields in config.data.mixture.items()
    }
    found = {name: float(fields.get("weight", 1.0)) for name, fields in parts.items()}
    for name, weight in found.items():
        if not weight > 0:
            raise InputError(f"{name}.weight={weight}: give a positive number")
    return tuple(found.values()) if len(found) > 1 else ()


def to_samples(config: ConfigDict) -> ToSamples:
    """What makes samples of the dataset's rows."""
    return ToSamples(scaling=scaling(config), mirror=config.data.mirror)


class Recipe(NamedTuple):
    """What a training step computes: all of a config that needs neither data nor checkpoints.

    Attributes:
      alignment: what computes features of images, where the objective aligns with such.
      accumulation: parts that a batch is cut into, one after the other.
      freeze: what of the network's parameters is not trained.
    """

    network: Network
    objective: Objective
    optimizer: AdamW
    emas: dict[str, Ema]
    mesh: Mesh
    to_samples: ToSamples
    alignment: PatchFeatures | None
    batch_size: int
    accumulation: int
    freeze: Frozen


def recipe(
    config: ConfigDict,
    on: Mesh,
    teacher: Network | None = None,
    encoder: DinoV2 | None = None,
) -> Recipe:
    """What a step of `config` computes on a mesh, with a teacher where the objective asks for one,
    and with the encoder that it aligns with unless the dataset stores features.

    Raises:
      InputError: a field that cannot be; the message names it.
    """
    made, goal = network(config), objective(config, teacher)
    check(config, goal, on)
    if teacher is not None:
        _check_teacher(config, teacher, made)
    return Recipe(
        network=made,
        objective=goal,
        optimizer=component("optimizer", config.optimizer, "optimizer"),
        emas=emas(config),
        mesh=on,
        to_samples=to_samples(config),
        alignment=_patch_features(config, encoder) if goal.alignment and encoder else None,
        batch_size=config.data.batch_size,
        accumulation=config.accumulation,
        freeze=frozen(config.freeze, made),
    )


def _check_teacher(config: ConfigDict, teacher: Network, student: Network) -> None:
    """Raises InputError where a teacher is not of the samples and labels of its student."""
    named = f"teacher.checkpoint={config.teacher.checkpoint}"
    if teacher.sample_shape != student.sample_shape:
        raise InputError(f"{named}: its samples have shape {teacher.sample_shape}, those of "
                         f"config.model {student.sample_shape}")
    if teacher.num_classes != student.num_classes:
        raise InputError(f"{named}: it has {teacher.num_classes} classes; model.num_classes="
                         f"{student.num_classes} must be the same")


def _check_same_data(config: ConfigDict, theirs: ConfigDict) -> None:
    """Raises InputError where a teacher was trained on another path, or on other latents."""
    fields = {"objective.interpolant": [c.objective.get("interpolant") for c in (config, theirs)]}
    fields |= {f"latents.{name}": [getattr(scaling(c), name) for c in (config, theirs)]
               for name in ("scale", "shift", "mean", "std")}
    for field, (ours, other) in fields.items():
        if ours != other:
            raise InputError(f"{field}={ours}: teacher.checkpoint={config.teacher.checkpoint} was "
                             f"trained with {other}, and must be of the same path and latents")


def _patch_features(config: ConfigDict, encoder: DinoV2) -> PatchFeatures:
    """As many patches of images as there are tokens.

    Raises:
      InputError: their features have not the width of `config.model`'s projection, or the encoder
        does not compute in the type of `config.alignment`.
    """
    check_width(encoder.width, config.model.alignment_width,
                f"alignment.encoder={config.alignment.encoder}")  # fmt: skip
    try:
        encoder = dataclasses.replace(encoder, dtype=config.alignment.dtype)
    except InputError as error:
        raise InputError(str(error).replace("dinov2", "alignment", 1)) from None
    return PatchFeatures(encoder=encoder, side=_tokens(config))


class Training(NamedTuple):
    """Everything that a run is made of."""

    recipe: Recipe
    pipeline: Pipeline
    frozen: dict[str, Params]


def training(config: ConfigDict) -> Training:
    """Builds and checks everything that `config` asks for, before anything is written.

    Raises:
      InputError: a field that cannot be; the message names it.
    """
    on = mesh(config)
    teacher, encoder, fixed, beside = None, None, {}, ""
    if config.teacher.checkpoint and distils(config):
        with about("teacher"):
            teacher, theirs, params = load_network(
                config.teacher.checkpoint, config.teacher.ema, on=on
            )
        _check_same_data(config, theirs)
        fixed = {"teacher": params}
    goal = objective(config, teacher)
    if goal.alignment:
        beside = "images" if config.alignment.encoder else "features"
    if beside == "images":
        encoder, fixed["alignment"] = _encoder(config, on)
    made = recipe(config, on, teacher, encoder)
    return Training(
        recipe=made,
        pipeline=Pipeline(
            source=source(config, beside),
            batch_size=config.data.batch_size,
            seed=config.seed,
            weights=weights(config),
            beside=beside,
        ),
        frozen=fixed,
    )


def _encoder(config: ConfigDict, on: Mesh) -> tuple[DinoV2, Params]:
    """The network of `config.alignment`, its parameters split over a mesh."""
    directory = config.alignment.encoder
    try:
        return load_encoder(directory, "dinov2", on=on)
    except InputError as error:
        why = str(error).partition(": ")[2].partition(";")[0]
        raise InputError(f"alignment.encoder={directory}: {why}; give the directory of a DINOv2 "
                         "that dmf convert made") from None


def check(config: ConfigDict, goal: Objective, on: Mesh) -> None:
    """Raises InputError where parts of a config do not go together."""
    for field, least in (("steps", 1), ("log_every", 1), ("keep_last", 1), ("sample_every", 0),
                         ("checkpoint_every", 0), ("keep_every", 0)):
        if config.run[field] < least:
            raise InputError(f"run.{field}={config.run[field]}: give {least} or more")
    if config.teacher.checkpoint and not distils(config):
        raise InputError(f"teacher.checkpoint={config.teacher.checkpoint}: nothing is asked of a "
                         "teacher; set objective.guidance.name=teacher, or leave it empty")
    size, parts = config.data.batch_size, batch_divisor(on)
    if config.accumulation < 1:
        raise InputError(f"accumulation={config.accumulation}: give 1 or more")
    if size < 1 or size % (parts * config.accumulation):
        raise InputError(f"data.batch_size={size}: it must be a multiple of {parts} (mesh axes "
                         f"data x fsdp) times accumulation={config.accumulation}")
    if goal.learned_variance and not config.model.get("learned_variance", True):
        raise InputError("model.learned_variance=False: the weighting "
                         f"{type(goal.weighting).__name__} needs the log-variance head; set it "
                         "to True")
    drawn = goal.guidance.drawn if hasattr(goal, "guidance") else False
    takes = config.model.get("guidance_input", False)
    if drawn != takes:
        raise InputError(f"model.guidance_input={takes}: a network takes its guidance as an input "
                         "where it is drawn in training; set it to True and "
                         "objective.guidance.name=drawn, or neither")
    if hasattr(goal, "tangent") and config.model.get("conditioning") == "flow":
        raise InputError("model.conditioning=flow: this network does not see r, which the "
                         "objective teaches; choose meanflow or decoupled")
    if goal.alignment and not config.model.get("alignment_depth", 0):
        raise InputError("model.alignment_depth=0: an alignment coefficient needs the block after "
                         "which tokens are projected (8 as published)")
    if config.sampling.ema and config.sampling.ema not in config.emas:
        raise InputError(f"sampling.ema={config.sampling.ema}: config.emas has "
                         f"{', '.join(config.emas) or 'none'}; empty takes the parameters")


def pretrained(config: ConfigDict, network: Network, on: Mesh) -> Params:
    """The parameters of `config.init.checkpoint`, none without it.

    What a flow model lacks (a log-variance head, a second time embedding, the scales of qk-norm) is
    left to be initialised, and what only its training used is dropped.
    """
    if not config.init.checkpoint:
        return {}
    with about("init"):
        return restore(network, config.init.checkpoint, config.init.ema, on=on, missing=ADDED)


@contextmanager
def about(part: str) -> Iterator[None]:
    """Says which part of the config a complaint is about."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{part}.{error}") from None
