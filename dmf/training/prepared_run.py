"""All that a run needs from its first step to its last, built and checked before anything is
written."""

from typing import Any, NamedTuple

import jax
from etils import epath
from ml_collections import ConfigDict

from dmf.checkpoints.latent_statistics import STATISTICS_FILE, dataset_statistics
from dmf.checkpoints.load import load_latent_space
from dmf.checkpoints.params import latest_step
from dmf.data.build import class_names, data, names_to_store
from dmf.data.latent_origin import stated_origins
from dmf.errors import InputError
from dmf.models.build import latents
from dmf.models.encoders.latent_scaling import LatentScaling
from dmf.registry import at
from dmf.runtime import processes
from dmf.runtime.sharding import batch_sharding
from dmf.training import build, initial_checkpoint
from dmf.training.abstract_inputs import abstract_inputs
from dmf.training.callback import Callback, open_callbacks
from dmf.training.callbacks import EvaluationCallback, Profiler, SampleGridCallback
from dmf.training.ema import power_emas
from dmf.training.memory import check_disk, check_memory
from dmf.training.network_check import check_network
from dmf.training.train_state import TrainState
from dmf.training.train_step import abstract_state, compiled_train_step
from dmf.training.writers import check_writers
from dmf.types import Params


class PreparedRun(NamedTuple):
    """All that a run needs, built and checked.

    Attributes:
      config: the config of the run, with the names of its classes.
      training: recipe, data loader and settings of the run.
      step: the training step, traced already.
      keys: random keys of the initial parameters and of the draws.
      abstract: the train state as shapes with shardings.
      pretrained: the parameters that a new run starts from.
      show, evaluate: the callbacks of sample grids and of evaluations.
      callbacks: those that `run.callbacks` names.
      profiler: traces some steps.
    """

    config: ConfigDict
    training: build.Training
    step: Any
    keys: jax.Array
    abstract: TrainState
    pretrained: Params
    show: SampleGridCallback
    evaluate: EvaluationCallback
    callbacks: tuple[Callback, ...]
    profiler: Profiler


def prepare(config: ConfigDict, workdir: epath.Path) -> PreparedRun:
    """Builds and checks all that a run needs from its first step to its last; writes nothing.

    Args:
      config: all fields of `dmf.default_config.Config`.
      workdir: the workdir of the run.

    Raises:
      InputError: a field that cannot be used; the message names it.
    """
    training = build.training(config)
    config = _with_class_names(config)
    with at("run"):
        check_writers(training.run.writers, training.run.project)
    _report_scaling(config)
    _check_autoencoder(config)
    rows = training.data_loader.abstract_batch(batch_sharding(training.recipe.mesh))
    check_network(training.recipe.network, rows)
    prepared = PreparedRun(
        config=config,
        training=training,
        step=compiled_train_step(training.recipe),
        keys=jax.random.split(jax.random.key(config.seed)),
        abstract=abstract_state(training.recipe),
        pretrained=_pretrained(config, training, latest_step(workdir)),
        show=SampleGridCallback(config, training, workdir),
        evaluate=EvaluationCallback(config, training, workdir),
        callbacks=open_callbacks(training.run.callbacks, config, training, workdir),
        profiler=Profiler(config.profile_steps, workdir),
    )
    _check_profile_steps(config, prepared.profiler, training.run.steps)
    check_memory(prepared.abstract, rows)
    _check_disk(workdir, prepared.abstract, training)
    # Tracing the step finds what its parts refuse of each other. The first step uses this trace,
    # because its key is on no mesh either.
    jax.eval_shape(prepared.step, *abstract_inputs(training.recipe, rows), prepared.keys[1])
    return prepared


def _with_class_names(config: ConfigDict) -> ConfigDict:
    """The config with the names of its classes, which the samples of the run are called by where
    the dataset is not at hand."""
    named, settings = config.copy_and_resolve_references(), data(config.data)
    if config.model.get("num_classes") and not settings.class_names:
        named.data.class_names = names_to_store(class_names(settings))
    return named


def _report_scaling(config: ConfigDict) -> None:
    """Says where `config.latents` scales latents otherwise than their autoencoder or the statistics
    beside them state; a scaling by channel is meant to, unless these are far from it."""
    ours = latents(config.latents).scaling
    directories = data(config.data).directories
    for place, directory in directories.items():
        statistics = dataset_statistics(directory)
        if statistics and not ours.mean:
            processes.log(f"latents.scale={ours.scale}, latents.shift={ours.shift}: "
                          f"{STATISTICS_FILE} in {place}.directory states a mean and a standard "
                          "deviation of each channel")
        elif statistics and _are_far(statistics, ours):
            processes.log(f"{STATISTICS_FILE} in {place}.directory={directory} states a mean that "
                          "is more than a standard deviation from latents.mean: its latents may be "
                          "of another autoencoder")
    for place, origin in stated_origins(directories).items():
        if origin.scaling != ours and not ours.mean:
            processes.log(f"latents.scale={ours.scale}, latents.shift={ours.shift}: the "
                          f"autoencoder of {place}.directory states {origin.scaling}")


def _are_far(theirs: LatentScaling, ours: LatentScaling) -> bool:
    """Whether the mean of a channel is more than a standard deviation from another one."""
    pairs = zip(theirs.mean, ours.mean, ours.std, strict=False)
    return any(abs(mean - our_mean) > our_std for mean, our_mean, our_std in pairs)


def _check_autoencoder(config: ConfigDict) -> None:
    """Raises InputError where the latents of the dataset are of another autoencoder than
    `config.latents` names, in a run that decodes none: the callbacks of others load it."""
    is_loaded = config.run.sample_every or config.evaluation.every
    stated = config.latents.autoencoder and stated_origins(data(config.data).directories)
    if stated and not is_loaded:
        load_latent_space(config)


def _check_disk(workdir: epath.Path, state: TrainState, training: build.Training) -> None:
    """Raises InputError where the disk has no room for a checkpoint and the snapshots."""
    kept = training.run.keep_snapshots if training.run.snapshot_every else 0
    names = power_emas(training.recipe.emas)
    check_disk(workdir, state, {name: state.ema_params[name] for name in names}, kept)


def _check_profile_steps(config: ConfigDict, profiler: Profiler, steps: int) -> None:
    """Raises InputError for steps to trace that lie beyond the last step of the run."""
    if profiler.last_step > steps:
        raise InputError("profile_steps", config.profile_steps, "the run ends at "
                         f"run.steps={steps}")


def _pretrained(
    config: ConfigDict, training: build.Training, resumed_step: int | None
) -> Params:
    """The parameters that a new run starts from; {} for a run that resumes."""
    if resumed_step:
        return {}
    recipe = training.recipe
    params = initial_checkpoint.pretrained(config, recipe.network, recipe.mesh)
    recipe.freeze_mask.check_pretrained(params)
    return params
