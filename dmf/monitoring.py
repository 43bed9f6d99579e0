"""What a run shows of itself while it goes: grids of samples, and how far they are from data."""

import json
from collections.abc import Callable, Mapping
from typing import Any

import jax
from etils import epath
from ml_collections import ConfigDict

from dmf import build, evaluation, hosts, images
from dmf.evaluator import Evaluator
from dmf.files import write_json
from dmf.generation import Generator, class_grid
from dmf.logs import EVALUATIONS, SAMPLES, evaluation_file
from dmf.protocols import HIGHER_IS_BETTER
from dmf.sharding import local_mesh, on_this_host
from dmf.state import TrainState
from dmf.typing import InputError, Params


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
    folder = workdir / SAMPLES

    def show(count: int, state: TrainState) -> None:
        params = on_this_host(average(state, config.sampling.ema), on)
        if not hosts.first():
            return
        folder.mkdir(parents=True, exist_ok=True)
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
        self._workdir, self._folder = workdir, workdir / EVALUATIONS
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
        """Whether the state after a step was evaluated, as the first process sees it."""
        return hosts.gathered(self._path(step).exists())[0]

    def __call__(self, step: int, state: TrainState) -> dict[str, float]:
        """Evaluates the state after a step; returns the scores by metric, average and steps.

        All processes must call this, and share the work.
        """
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
        return evaluation_file(self._workdir, step)


class Profile:
    """Traces some steps of a run, for XProf or Perfetto, into `profile/` below the workdir.

    Of steps that a resumed run is amid, those that are left; if it is past them it says so.
    """

    def __init__(self, steps: str, workdir: epath.Path):
        """Takes note of what to trace.

        Args:
          steps: FIRST:LAST, both among them; empty for none.
          workdir: of the run.

        Raises:
          InputError: they are no such thing.
        """
        first, _, last = steps.partition(":")
        self._folder = workdir / "profile"
        self._tracing = False
        if not steps:
            self._first = self._last = 0
        elif first.isdigit() and last.isdigit() and 1 <= int(first) <= int(last):
            self._first, self._last = int(first), int(last)
        else:
            raise InputError(f"profile={steps}: give FIRST:LAST, steps counted from 1, as 100:105")

    def before(self, step: int) -> None:
        """To be called before each step."""
        if step > self._last > 0:
            hosts.say(f"profile={self._first}:{self._last}: the run is at step {step}, past them; "
                      "nothing is traced")
            self._last = 0
        if self._first <= step <= self._last and not self._tracing:
            jax.profiler.start_trace(str(self._folder))
            self._first, self._tracing = step, True

    def after(self, step: int, outputs: Any) -> None:
        """To be called after each step, with what it gave."""
        if self._tracing and step == self._last:
            jax.block_until_ready(outputs)
            self.close()
            hosts.say(f"steps {self._first} to {self._last} are traced in {self._folder}")
            self._last = 0

    def close(self) -> None:
        """Ends a trace that is under way."""
        if self._tracing:
            jax.profiler.stop_trace()
            self._tracing = False
