"""From a config to all that a run consists of, built and checked before anything is written."""

import dataclasses
from collections.abc import Iterable
from typing import Any, NamedTuple

from flax.core import FrozenDict
from jax.sharding import Mesh
from ml_collections import ConfigDict

from dmf.checkpoints.guide import data_differences
from dmf.checkpoints.load import load_encoder, load_network
from dmf.data.batch_transform import BatchTransform
from dmf.data.build import Data, data, data_loader, dataset
from dmf.data.data_loader import DataLoader
from dmf.errors import InputError, check_at_least, check_choice
from dmf.models.abstract_params import abstract_params
from dmf.models.build import latents, network
from dmf.models.encoders.dinov2 import DinoV2
from dmf.models.encoders.patch_features import (
    PatchFeatures,
    check_feature_width,
    check_stored_features,
)
from dmf.objectives.build import interpolant, objective, objective_of_run
from dmf.objectives.objective import Objective
from dmf.objectives.path_sample import check_prediction
from dmf.registry import at, build
from dmf.runtime.sharding import batch_shards, make_mesh
from dmf.sampling.build import Sampling, sampling
from dmf.training.ema import Ema
from dmf.training.freezing import FreezeMask, freeze_mask
from dmf.training.optimizer import Optimizer
from dmf.training.parameter_groups import check_matches
from dmf.training.settings import Alignment, MeshShape, Run, TeacherCheckpoint
from dmf.types import Network, Params

# When gradients are summed over the mesh axes "slices" and "data".
SUM_GRADIENTS = ("per_term", "once")


class Recipe(NamedTuple):
    """What a training step computes: all of a config that needs neither data nor checkpoints.

    Attributes:
      network: the network that is trained.
      objective: draws and losses.
      optimizer: the optimizer of the parameters.
      emas: the EMAs of the parameters by name; hashable, as all of a recipe, so that equal recipes
        share compiled programs.
      mesh: the devices.
      batch_transform: turns rows of the dataset into samples.
      patch_features: computes the patch features of images for representation alignment; None
        without alignment, or if the dataset stores them.
      batch_size: global batch size.
      gradient_accumulation: number of microbatches that a batch is cut into.
      freeze_mask: parameters of the network that are not trained.
      sum_gradients: when gradients are summed over devices, one of `SUM_GRADIENTS`.
    """

    network: Network
    objective: Objective
    optimizer: Optimizer
    emas: FrozenDict[str, Ema]
    mesh: Mesh
    batch_transform: BatchTransform
    patch_features: PatchFeatures | None
    batch_size: int
    gradient_accumulation: int
    freeze_mask: FreezeMask
    sum_gradients: str = "per_term"


class Training(NamedTuple):
    """All that a run consists of.

    Attributes:
      recipe: what a training step computes.
      data_loader: the batches.
      frozen_params: parameters of other networks, which are not trained: "teacher", "alignment".
      sampling: settings of sampling.
      run: length and cadence of the run.
    """

    recipe: Recipe
    data_loader: DataLoader
    frozen_params: dict[str, Params]
    sampling: Sampling
    run: Run


def mesh(section: Any) -> Mesh:
    """The mesh of `config.mesh` over all devices."""
    return make_mesh(**dataclasses.asdict(mesh_shape(section)))


def mesh_shape(section: Any) -> MeshShape:
    """The settings of `config.mesh`."""
    with at("mesh"):
        return build(MeshShape, section)


def run(section: Any) -> Run:
    """The settings of `config.run`."""
    with at("run"):
        return build(Run, section)


def emas(section: Any) -> FrozenDict[str, Ema]:
    """The EMAs of `config.emas` by name."""
    built = {}
    for name, part in section.items():
        with at(f"emas.{name}"):
            built[name] = build("ema", part)
    return FrozenDict(built)


def optimizer(section: Any, steps: int) -> Optimizer:
    """The optimizer of `config.optimizer` for a run of so many steps."""
    with at("optimizer"):
        return build("optimizer", section).for_run(steps)


def alignment(config: ConfigDict) -> Alignment:
    """The settings of `config.alignment`; the defaults in configs that have none."""
    with at("alignment"):
        return build(Alignment, config.get("alignment", {}))


def teacher_checkpoint(config: ConfigDict) -> TeacherCheckpoint:
    """The settings of `config.teacher`.

    Raises:
      InputError: a teacher is given that the objective does not ask for.
    """
    with at("teacher"):
        chosen = build(TeacherCheckpoint, config.teacher)
    if chosen.checkpoint and not objective(config.objective).needs_teacher:
        raise InputError(
            "teacher.checkpoint", chosen.checkpoint,
            "the objective asks for no teacher; set objective.guidance.name=teacher, or leave it "
            "empty",
        )
    return chosen


def settings_of_sampling(config: ConfigDict) -> Sampling:
    """The settings of `config.sampling`, with the interpolant of the objective."""
    return sampling(config.sampling, interpolant(config.objective))


def recipe(
    config: ConfigDict,
    mesh: Mesh,
    teacher: Network | None = None,
    encoder: DinoV2 | None = None,
) -> Recipe:
    """What a training step of a config computes on a mesh.

    Args:
      config: the config of the run.
      mesh: the devices.
      teacher: the network of the teacher, if the objective needs one.
      encoder: the DINOv2 of representation alignment, unless the dataset stores its features.

    Raises:
      InputError: a field that cannot be used; the message names it.
    """
    student, steps = network(config.model), run(config.run).steps
    trained_by = objective_of_run(config.objective, steps, teacher)
    built = Recipe(
        network=student,
        objective=trained_by,
        optimizer=optimizer(config.optimizer, steps),
        emas=emas(config.emas),
        mesh=mesh,
        batch_transform=batch_transform(config),
        patch_features=None,
        batch_size=data(config.data).batch_size,
        gradient_accumulation=config.gradient_accumulation,
        freeze_mask=freeze_mask(config.freeze, student),
        sum_gradients=config.sum_gradients,
    )
    check(config, built)
    if teacher is not None:
        _check_teacher(config, teacher, student)
    if trained_by.alignment and encoder is not None:
        built = built._replace(patch_features=_patch_features(config, encoder))
    return built


def batch_transform(config: ConfigDict) -> BatchTransform:
    """The transform from rows of the dataset to samples."""
    return BatchTransform(scaling=latents(config.latents).scaling, mirror=config.data.mirror)


def training(config: ConfigDict) -> Training:
    """Builds all that the run of a config consists of, and checks it before anything is written.

    Raises:
      InputError: a field that cannot be used; the message names it.
    """
    devices, settings = mesh(config.mesh), data(config.data)
    teacher, frozen_params = _teacher(config, devices)
    trained_by = objective(config.objective, teacher)
    extra, encoder = "", None
    if trained_by.alignment:
        extra = "images" if alignment(config).encoder else "features"
    if extra == "images":
        encoder, frozen_params["alignment"] = _encoder(alignment(config).encoder, devices)
    built = recipe(config, devices, teacher, encoder)
    rows = dataset(settings, built.network, extra)
    if extra == "features":
        _check_stored_features(config, settings, rows)
    return Training(
        recipe=built,
        data_loader=data_loader(settings, rows, seed=config.seed),
        frozen_params=frozen_params,
        sampling=settings_of_sampling(config),
        run=run(config.run),
    )


def _teacher(config: ConfigDict, mesh: Mesh) -> tuple[Network | None, dict[str, Params]]:
    """The network of the teacher and its parameters, where the objective asks for one."""
    named = teacher_checkpoint(config)
    if not objective(config.objective).needs_teacher:
        return None, {}
    if not named.checkpoint:
        raise InputError("teacher.checkpoint", "", "objective.guidance.name=teacher needs the "
                         "directory of a run or an export")
    with at("teacher"):
        teacher, its_config, params = load_network(named.checkpoint, named.ema, mesh=mesh)
    _check_same_data(config, its_config)
    return teacher, {"teacher": params}


def _check_teacher(config: ConfigDict, teacher: Network, student: Network) -> None:
    """Raises InputError where the teacher has other samples or labels than the student."""
    field, directory = "teacher.checkpoint", config.teacher.checkpoint
    if teacher.sample_shape != student.sample_shape:
        raise InputError(field, directory, f"its samples have shape {teacher.sample_shape}, those "
                         f"of config.model {student.sample_shape}")
    if teacher.num_classes != student.num_classes:
        raise InputError(field, directory, f"it has {teacher.num_classes} classes; "
                         f"model.num_classes={student.num_classes} must be the same")


def _check_same_data(config: ConfigDict, teacher: ConfigDict) -> None:
    """Raises InputError where the teacher was trained on another path, or on other latents."""
    for field, ours, its in data_differences(config, teacher):
        raise InputError(
            field, ours,
            f"teacher.checkpoint={config.teacher.checkpoint} was trained with {its}, and must "
            "be of the same path and latents",
        )  # fmt: skip


def _tokens_per_side(config: ConfigDict) -> int:
    return config.model.input_size // config.model.patch_size


def _check_stored_features(config: ConfigDict, settings: Data, rows: Any) -> None:
    """Raises InputError where the features that the dataset stores do not fit the network."""
    check_stored_features(
        rows.read([0])["features"].shape[1:], _tokens_per_side(config) ** 2,
        config.model.alignment_width, mirror=settings.mirror, name=rows.name,
    )  # fmt: skip


def _patch_features(config: ConfigDict, encoder: DinoV2) -> PatchFeatures:
    """Features of as many patches as the network has tokens.

    Raises:
      InputError: their width is not that of `model.alignment_width`.
    """
    settings = alignment(config)
    check_feature_width(
        encoder.width, config.model.alignment_width, f"alignment.encoder={settings.encoder}"
    )
    encoder = dataclasses.replace(encoder, dtype=settings.dtype)
    return PatchFeatures(encoder=encoder, side=_tokens_per_side(config))


def _encoder(directory: str, mesh: Mesh) -> tuple[DinoV2, Params]:
    """The DINOv2 of `config.alignment`, its parameters sharded over a mesh."""
    try:
        return load_encoder(directory, "dinov2", mesh=mesh)
    except InputError as error:
        reason = error.remedy.partition(";")[0]
        raise InputError("alignment.encoder", directory, f"{reason}; give the directory of a "
                         "DINOv2 that dmf convert made") from None


def check(config: ConfigDict, built: Recipe) -> None:
    """Raises InputError if fields of a config do not go together."""
    if not 0 <= config.seed < 2**32:
        raise InputError("seed", config.seed, "give a whole number from 0 to 2^32 - 1")
    run(config.run)
    settings_of_sampling(config)
    teacher_checkpoint(config)
    _check_alignment(config, built)
    _check_batch_size(built)
    _check_network(config, built)
    _check_groups(built)
    chosen = config.sampling.ema
    if chosen and chosen not in built.emas:
        raise InputError("sampling.ema", chosen, f"config.emas has {_listed(built.emas)}; empty "
                         "takes the raw parameters")


def _listed(names: Iterable[str]) -> str:
    return ", ".join(names) or "none"


def _check_alignment(config: ConfigDict, built: Recipe) -> None:
    """Raises InputError if an encoder is given that no objective aligns with."""
    encoder = alignment(config).encoder
    if encoder and not built.objective.alignment:
        raise InputError("alignment.encoder", encoder, "nothing is aligned with it; set "
                         "objective.alignment_coefficient (0.5 as published), or leave it empty")


def _check_batch_size(built: Recipe) -> None:
    size, microbatches, shards = (
        built.batch_size, built.gradient_accumulation, batch_shards(built.mesh)
    )
    check_at_least(built, 1, "gradient_accumulation")
    check_choice(built, "sum_gradients", SUM_GRADIENTS)
    if size % (shards * microbatches):
        raise InputError(
            "data.batch_size", size,
            f"it must be a multiple of {shards} (mesh axes data x fsdp) times "
            f"gradient_accumulation={microbatches}",
        )


def _check_network(config: ConfigDict, built: Recipe) -> None:
    """Raises InputError if the network lacks a part that the objective needs."""
    model, trained_by = config.model, built.objective
    if trained_by.learned_variance and not model.get("learned_variance", True):
        raise InputError("model.learned_variance", False, "the weighting "
                         f"{type(trained_by.weighting).__name__} needs the log-variance head; set "
                         "it to True")
    takes = built.network.guidance_input
    if trained_by.guidance_input != takes:
        raise InputError("model.guidance_input", takes, "a network takes its guidance as an input "
                         "where it is drawn in training; set it to True and "
                         "objective.guidance.name=drawn, or neither")
    if trained_by.velocity_head != built.network.velocity_head:
        raise InputError("model.velocity_head", built.network.velocity_head, "a network has a head "
                         "for the velocity where objective.name=improved_mean_flow trains it; set "
                         "it to True with that objective, and to False with others")
    check_prediction(interpolant(config.objective), built.network)
    if trained_by.needs_r and model.get("conditioning") == "flow":
        raise InputError("model.conditioning", "flow", "this network does not see r, which the "
                         "objective trains; choose meanflow or decoupled")
    if trained_by.differentiate_tangent and model.get("attention", "xla") != "xla":
        raise InputError("model.attention", model.attention, "the gradient goes through a "
                         "tangent that flash attention takes for constant; choose xla, or "
                         "objective.differentiate_tangent=False")
    if trained_by.target_ema and trained_by.target_ema not in built.emas:
        raise InputError("objective.target_ema", trained_by.target_ema, "config.emas has "
                         f"{_listed(built.emas)}; empty takes the network's own parameters")
    if trained_by.alignment and not model.get("alignment_depth", 0):
        raise InputError("model.alignment_depth", 0, "an alignment coefficient needs the block "
                         "after which tokens are projected (8 as published)")


def _check_groups(built: Recipe) -> None:
    """Raises InputError if a parameter group has no parameter that is trained."""
    if built.optimizer.groups:
        params = abstract_params(built.network)
        with at("optimizer"):
            check_matches(built.optimizer.groups, params, built.freeze_mask.mask)
