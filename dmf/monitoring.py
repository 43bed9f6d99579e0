"""What a run shows of itself while it goes: grids of samples, and how far they are from data."""

import json
from collections.abc import Callable, Mapping

from etils import epath
from ml_collections import ConfigDict

from dmf import build, evaluation, images
from dmf.checkpoint import write_json
from dmf.evaluator import Evaluator
from dmf.generation import Generator, class_grid
from dmf.protocols import HIGHER_IS_BETTER
from dmf.sharding import local_mesh, on_this_host
from dmf.state import TrainState
from dmf.typing import InputError, Params

EVALUATIONS = "evaluations"


def average(state: TrainState, name: str) -> Params:
    """The parameters of a state: an average by name, or, without one, those that are trained."""
    return state.averages[name] if name else state.params


def preview(
    config: ConfigDict, built: build.Training, workdir: epath.Path
) -> Callable[[int, TrainState], None]:
    """A function that writes a grid of samples: two rows for each number of steps."""
    network = built.recipe.network
    latents = network.sample_shape[-1] not in (1, 3) and not config.latents.autoencoder
    if latents or not config.run.sample_every:
        return lambda count, state: None
    on = local_mesh()
    generator = Generator(network, config, on=on)
    folder = workdir / "samples"

    def show(count: int, state: TrainState) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        params = on_this_host(average(state, config.sampling.ema), on)
        generates = [generator(params, steps=n) for n in config.sampling.steps]
        sheet = class_grid(generates, network.num_classes, fill=on.size)
        images.write_png(folder / f"{count:08}.png", sheet)

    return show


class Examiner:
    """Evaluates a run as it goes, each time into a file of its own below the workdir."""

    def __init__(self, config: ConfigDict, built: build.Training, workdir: epath.Path):
        """Opens what evaluation needs.

        Args:
          config: its `evaluation`.
          built: the parts of the run.
          workdir: of the run.

        Raises:
          InputError: a field of `config.evaluation` that cannot be.
        """
        self._config = config
        self._folder = workdir / EVALUATIONS
        settings = config.evaluation
        for name in settings.emas:
            if name and name not in config.emas:
                raise InputError(f"evaluation.emas={name}: config.emas has "
                                 f"{', '.join(config.emas) or 'none'}; empty takes the parameters")
        labelled = bool(built.recipe.network.num_classes)
        self._evaluator = Evaluator(config, self._folder / ".parts", labelled=labelled)
        self._generator = Generator(built.recipe.network, config, on=self._evaluator.on)
        self._evaluator.check(self._generator.image_shape, settings.count, labelled=labelled)

    def has(self, step: int) -> bool:
        """Whether the state after a step was evaluated."""
        return self._path(step).exists()

    def __call__(self, step: int, state: TrainState) -> dict[str, float]:
        """Evaluates the state after a step; returns the scores by metric, average and steps."""
        settings = self._config.evaluation
        rows = evaluation.evaluate(
            self._evaluator,
            self._generator,
            self._config,
            ((name, average(state, name)) for name in settings.emas),
            steps=tuple(settings.steps) or tuple(self._config.sampling.steps),
        )
        described = evaluation.described(self._config, self._generator)
        result = self._evaluator.result(rows, step=step, **described)
        self._evaluator.finish(write_json, self._path(step), result)
        return {
            f"{metric}/{row['ema'] or 'params'}/{row['steps']}": row[metric]
            for row in rows for metric in self._evaluator.protocol.metrics
        }

    def best_step(self) -> int | None:
        """The step whose first row is best by the first metric; None before there is one."""
        metric = self._evaluator.protocol.metrics[0]
        found: Mapping[int, float] = {
            int(path.stem): json.loads(path.read_text())["results"][0].get(metric)
            for path in (self._folder.glob("*.json") if self._folder.exists() else ())
        }
        known = {step: score for step, score in found.items() if score is not None}
        choose = max if metric in HIGHER_IS_BETTER else min
        return choose(sorted(known), key=known.get) if known else None

    def _path(self, step: int) -> epath.Path:
        return self._folder / f"{step:08}.json"
