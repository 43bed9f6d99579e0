"""Callbacks of the training loop, for grids of samples, evaluations and snapshots of power EMAs;
and the profiler."""

import contextlib
import math
import re
from collections.abc import Mapping
from typing import Any

import jax
from etils import epath
from ml_collections import ConfigDict

from dmf.checkpoints.load import load_latent_space
from dmf.checkpoints.manager import SnapshotManager
from dmf.data import pixels
from dmf.errors import InputError, NotFinite
from dmf.evaluation import flow_map_evaluation
from dmf.evaluation.build import evaluated_steps, evaluation
from dmf.evaluation.evaluator import Evaluator
from dmf.evaluation.metrics import lookup_metric
from dmf.runtime import processes
from dmf.runtime.files import write_json
from dmf.runtime.sharding import local_mesh, replicate_on_host
from dmf.sampling.generator import Generator, class_grid, steps_caption
from dmf.training.build import Training
from dmf.training.callback import Callback
from dmf.training.ema import power_emas
from dmf.training.metrics_writer import (
    EVALUATIONS,
    SAMPLES,
    evaluation_file,
    read_evaluation,
)
from dmf.training.preview import load_preview_space
from dmf.training.train_state import EMA_PREFIX, TrainState
from dmf.types import Params

# The name of an evaluation, without its suffix.
_STEP = re.compile(r"[0-9]{1,18}")


def is_due(step: int, every: int, last: int) -> bool:
    """Whether something is due after a step.

    >>> [step for step in range(1, 8) if is_due(step, every=3, last=7)]
    [3, 6, 7]

    Args:
      step: number of the step.
      every: number of steps between two times; 0 for never.
      last: number of the last step, after which it is due too.
    """
    return every > 0 and (step % every == 0 or step == last)


def chosen_params(state: TrainState, ema: str) -> Params:
    """The EMA parameters of a name, or the raw parameters for the empty name."""
    return state.ema_params[ema] if ema else state.params


class SampleGridCallback(Callback):
    """Writes a grid of samples, two rows for each number of sampling steps, to samples/STEP.png
    and to the writers."""

    def __init__(self, config: ConfigDict, training: Training, workdir: epath.Path):
        """Loads the autoencoder of the grids. Latents without an autoencoder have none.

        Args:
          config: the config of the run.
          training: recipe and settings of the run.
          workdir: the workdir of the run.

        Raises:
          InputError: a field of `config.sampling` or an autoencoder that cannot be used.
        """
        self._training, self._folder = training, workdir / SAMPLES
        network = training.recipe.network
        shown = (network.sample_shape[-1] in pixels.IMAGE_CHANNELS or config.latents.autoencoder
                 or training.run.preview_autoencoder)
        self._every = training.run.sample_every if shown else 0
        if training.run.sample_every and not shown:
            processes.log("latents.autoencoder is empty: no grids of samples are written")
        self._mesh, self._generator = local_mesh(), None
        self._class_names = config.data.get("class_names", ())
        if self._every:
            training.sampling.check_steps("sampling.steps", training.sampling.steps)
            space = load_preview_space(config, training.run.preview_autoencoder)
            self._generator = Generator(network, training.sampling, space, mesh=self._mesh)

    def due(self, step: int) -> bool:
        return is_due(step, self._every, self._training.run.steps)

    def is_done(self, step: int) -> bool:
        """Whether the grid of a step exists, according to the first process."""
        return processes.all_gather(self._file(step).exists())[0]

    def _file(self, step: int) -> epath.Path:
        return self._folder / f"{step:08}.png"

    def __call__(self, step: int, state: TrainState) -> None:
        settings, network = self._training.sampling, self._training.recipe.network
        params = replicate_on_host(chosen_params(state, settings.ema), self._mesh)
        if not processes.is_first_process():
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        generates = {steps_caption(n): self._generator(params, steps=n) for n in settings.steps}
        try:
            grid = class_grid(generates, network.num_classes, names=self._class_names,
                              multiple_of=self._mesh.size)
        except NotFinite as error:  # The loss is finite, so that training may go on.
            processes.log(f"step {step}: no grid of samples is written: {error}")
        else:
            pixels.write_png(self._file(step), grid)
            self.writers.write_image(step, SAMPLES, grid)


class EvaluationCallback(Callback):
    """Evaluates the train state, writes the results to evaluations/STEP.json, and writes the scores
    to the metrics as evaluation/METRIC/EMA/STEPS, or .../EMA/STEPS/SCALE/START-END where guidance
    is searched.

    Where samples hold NaN or infinity, the scores in the file are NaN, and training goes on.
    """

    def __init__(self, config: ConfigDict, training: Training, workdir: epath.Path):
        """Opens the reference and loads the networks of evaluation, if the run is evaluated.

        Args:
          config: the config of the run.
          training: recipe and settings of the run.
          workdir: the workdir of the run.

        Raises:
          InputError: a field of `config.evaluation` that cannot be used.
        """
        self._told: set[epath.Path] = set()
        self._settings, self._training = evaluation(config.evaluation), training
        self._workdir, self._folder = workdir, workdir / EVALUATIONS
        if not self._settings.every:
            return
        self._check_emas()
        self._steps = evaluated_steps(self._settings, training.sampling)
        network = training.recipe.network
        labelled = bool(network.num_classes)
        self._evaluator = Evaluator(config, self._folder / ".parts", labelled=labelled)
        self._generator = Generator(
            network, training.sampling, load_latent_space(config), mesh=self._evaluator.mesh
        )
        flow_map_evaluation.guided_generators(self._generator, self._settings)  # checks them
        self._evaluator.check(
            self._generator.image_shape, self._settings.count, labelled=labelled
        )

    def _check_emas(self) -> None:
        known = self._training.recipe.emas
        if not self._settings.emas:
            raise InputError("evaluation.emas", self._settings.emas, "give one name or several, '' "
                             "for the raw parameters; or evaluation.every=0")
        for name in self._settings.emas:
            if name and name not in known:
                raise InputError(
                    "evaluation.emas", name,
                    f"config.emas has {', '.join(known) or 'none'}; empty takes the raw parameters",
                )

    def due(self, step: int) -> bool:
        return is_due(step, self._settings.every, self._training.run.steps)

    def is_done(self, step: int) -> bool:
        """Whether the state after a step is evaluated already, according to the first process."""
        done = read_evaluation(evaluation_file(self._workdir, step)) is not None
        return processes.all_gather(done)[0]

    def __call__(self, step: int, state: TrainState) -> None:
        settings, evaluator = self._settings, self._evaluator
        rows = flow_map_evaluation.evaluate(
            evaluator,
            self._generator,
            settings,
            ((name, chosen_params(state, name)) for name in settings.emas),
            steps=self._steps,
            must_be_finite=False,
        )
        result = flow_map_evaluation.result(
            evaluator, self._generator, settings, rows, step=step
        )
        evaluator.finish(write_json, evaluation_file(self._workdir, step), result)
        self.writers.write(step, {
            f"evaluation/{metric}/{_metric_place(row)}": row[metric]
            for row in rows for metric in evaluator.protocol.metrics if math.isfinite(row[metric])
        })

    def best_step(self) -> int | None:
        """The step whose first row has the best score of the first metric; None without scores."""
        if not self._settings.every or not self._folder.exists():
            return None
        metric = self._evaluator.protocol.metrics[0]
        scores = {path: self._first_score(path, metric) for path in self._folder.glob("*.json")}
        known = {int(path.stem): score for path, score in scores.items() if score is not None}
        choose = max if lookup_metric(metric).higher_is_better else min
        return choose(sorted(known), key=known.get) if known else None

    def _first_score(self, path: epath.Path, metric: str) -> float | None:
        """The score of the first row of a file; None without a finite one. A file that is no
        evaluation is told once."""
        evaluation = read_evaluation(path) if _STEP.fullmatch(path.stem) else None
        if evaluation is None and path not in self._told:
            self._told.add(path)
            processes.log(f"{path}: it is no evaluation, and is left out")
        score = evaluation["results"][0].get(metric) if evaluation else None
        return score if isinstance(score, int | float) and abs(score) < math.inf else None


class SnapshotCallback(Callback):
    """Saves snapshots of the power EMAs in the background; does nothing for a run without them.

    It is a context manager, which waits at its end until everything is on disk.
    """

    def __init__(self, training: Training, workdir: epath.Path):
        """Opens the snapshots.

        Args:
          training: recipe, data loader and settings of the run.
          workdir: the workdir of the run.

        Raises:
          RunError: the directory cannot be written.
        """
        run = training.run
        self._loader = training.data_loader
        self._names = power_emas(training.recipe.emas) if run.snapshot_every else ()
        self._manager = contextlib.nullcontext()
        if self._names:
            self._manager = SnapshotManager(
                workdir, every=run.snapshot_every, keep=run.keep_snapshots
            )

    def due(self, step: int) -> bool:
        """Whether a snapshot belongs to a step, and is not there yet."""
        return bool(self._names) and self._manager.due(step)

    def is_done(self, step: int) -> bool:
        return not self.due(step)

    def __call__(self, step: int, state: TrainState) -> None:
        trees = {f"{EMA_PREFIX}{name}": state.ema_params[name] for name in self._names}
        self._manager.save(step, trees, self._loader.position(step))

    def finish(self) -> None:
        """Waits until all snapshots are on disk."""
        if self._names:
            self._manager.finish()

    def __enter__(self) -> "SnapshotCallback":
        self._manager.__enter__()
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        self._manager.__exit__(kind, error, trace)


def _metric_place(row: Mapping[str, Any]) -> str:
    """The end of the name of a metric of an evaluation: EMA/STEPS, and SCALE/START-END where
    guidance is searched.

    >>> _metric_place({"ema": "main", "steps": 2, "guidance": 1.5, "interval": [0.4, 0.65]})
    'main/2/1.5/0.4-0.65'
    """
    parts = [row["ema"] or "params", row["steps"]]
    if "guidance" in row:
        parts += [row["guidance"], "-".join(map(str, row["interval"]))]
    return "/".join(map(str, parts))


class Profiler:
    """Traces some training steps, for XProf or Perfetto, into the folder profile/ of the workdir.

    A run that resumes within these steps traces the remaining ones; a run that resumes after them
    logs that it traces none.
    """

    def __init__(self, steps: str, workdir: epath.Path):
        """Parses the steps to trace.

        Args:
          steps: "FIRST:LAST", both inclusive; "" for none.
          workdir: the workdir of the run.

        Raises:
          InputError: the text has another form.
        """
        first, _, last = steps.partition(":")
        self._folder = workdir / "profile"
        self._tracing = False
        if not steps:
            self._first = self._last = 0
        elif first.isdecimal() and last.isdecimal() and 1 <= int(first) <= int(last):
            self._first, self._last = int(first), int(last)
        else:
            raise InputError(
                "profile_steps", steps, "give FIRST:LAST, steps counted from 1, for example 100:105"
            )

    @property
    def last_step(self) -> int:
        """The last step to trace; 0 for none."""
        return self._last

    def before_step(self, step: int) -> None:
        """Starts the trace before its first step."""
        if step > self._last > 0:
            processes.log(f"profile_steps={self._first}:{self._last}: the run is at step {step}, "
                          "past them; nothing is traced")
            self._last = 0
        if self._first <= step <= self._last and not self._tracing:
            jax.profiler.start_trace(str(self._folder))
            self._first, self._tracing = step, True

    def after_step(self, step: int, outputs: Any) -> None:
        """Ends the trace after its last step, once the outputs of the step are computed."""
        if self._tracing and step == self._last:
            jax.block_until_ready(outputs)
            self.close()
            processes.log(f"steps {self._first} to {self._last} are traced in {self._folder}")
            self._last = 0

    def close(self) -> None:
        """Ends a trace that is under way."""
        if self._tracing:
            jax.profiler.stop_trace()
            self._tracing = False
