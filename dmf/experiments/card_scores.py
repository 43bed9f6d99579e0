"""The scores of a run or an export, for the model card of what is exported from it."""

import json
import math
from collections.abc import Iterator, Mapping
from typing import Any

from etils import epath

from dmf.checkpoints import load
from dmf.checkpoints.export_parts import Parts
from dmf.checkpoints.hub_card import Score
from dmf.checkpoints.params import is_export, split_step
from dmf.errors import InputError
from dmf.evaluation.result_rows import guidance_name
from dmf.experiments.evaluation_report import Evaluation, metric_title, read_evaluation
from dmf.objectives.build import interpolant
from dmf.runtime.progress import log
from dmf.sampling.build import sampling
from dmf.sampling.generator import unguided_identity
from dmf.training.metrics_writer import evaluation_file

# What the images of a row do not depend on, or what the row itself states.
_NOT_COMPARED = ("steps", "ema", "decode_batch")


def card_scores(
    checkpoint: epath.PathLike, parts: Parts, ema: str, *, step: int | None
) -> tuple[Score, ...]:
    """The scores that `dmf evaluate`, or the evaluation during training, left with a checkpoint.

    Scores of another step, of other EMA parameters, of another network, with a guide, or of other
    sampling than the exported config has are no scores of what is exported: they are left out with
    a line that says so. Guidance that was searched is in the title of a score.

    Args:
      checkpoint: a workdir, one of its checkpoints/STEP, or an export.
      parts: what is exported.
      ema: name of the EMA parameters that are exported; of an export it is ignored.
      step: of the parameters that are exported; None for those of an export.
    """
    paths = [path for path in _files(checkpoint, step) if path.exists()]
    for path in paths:
        try:
            evaluation = read_evaluation(path)
            rows = _own_rows(evaluation, step, None if is_export(checkpoint) else ema)
            _check_images(evaluation, parts, searched="guidance" in rows[0])
        except InputError as error:
            log(f"{path.name}: {error.remedy}; the model card is written without these scores")
            continue
        return tuple(score for row in rows for score in _scores(evaluation, row))
    if not paths:
        log("there is no evaluation: the model card has no scores; dmf evaluate measures some")
    return ()


def _files(checkpoint: epath.PathLike, step: int | None) -> Iterator[epath.Path]:
    """Where evaluations of a checkpoint are by default."""
    folder, asked = split_step(checkpoint)
    yield folder / ("evaluation.json" if asked is None else f"evaluation_{asked}.json")
    if step is not None:
        yield evaluation_file(folder, step)


def _own_rows(
    evaluation: Evaluation, step: int | None, ema: str | None
) -> list[Mapping[str, Any]]:
    """The rows of an evaluation that are about some parameters; of a search of guidance the best.

    Raises:
      InputError: there are none.
    """
    if evaluation.get("step") != step:
        raise InputError("step", remedy=f"it is of step {evaluation.get('step')}, and the "
                         f"checkpoint of {step}")
    rows = [evaluation["best"]] if evaluation.get("best") else evaluation["results"]
    rows = [row for row in rows if ema in (None, row["ema"])]
    if not rows:
        raise InputError("ema", remedy=f"it has no row of the EMA parameters {ema!r}")
    return rows


def _check_images(evaluation: Evaluation, parts: Parts, *, searched: bool) -> None:
    """Raises InputError where an evaluation is of images that the export does not make.

    Args:
      evaluation: the evaluation.
      parts: what is exported.
      searched: whether rows state the scale and the interval of their guidance.
    """
    config = load.config_from_json(parts.config)
    decoder, settings = parts.autoencoder, sampling(config.sampling, interpolant(config.objective))
    latents = decoder and (load.build_latent_space(config, decoder.network), decoder.params)
    made = json.loads(json.dumps(unguided_identity(parts.network, settings, latents)))
    if evaluation.get("model") != made["model"]:
        raise InputError("model", remedy="it is of a network with other fields")
    if "guide" in evaluation:
        raise InputError("guide", remedy="it is of images with a guide, which the export lacks")
    if searched:
        made["sampling"]["guidance"] = _without(made["sampling"]["guidance"], "scale", "interval")
    for section in ("sampling", "latents"):
        stated, own = (_without(each.get(section, {}), *_NOT_COMPARED)
                       for each in (evaluation, made))  # fmt: skip
        if stated != own:
            raise InputError(section, remedy=f"it is of images with another "
                             f"{_first_difference(section, stated, own)}")


def _without(section: Any, *names: str) -> Any:
    """A section without some of its fields; what is no section stays as it is."""
    if not isinstance(section, dict):
        return section
    return {name: value for name, value in section.items() if name not in names}


def _first_difference(name: str, a: Any, b: Any) -> str:
    """The dotted name of the first field in which two sections differ.

    >>> _first_difference("sampling", {"shift": 1.0, "steps": 3}, {"shift": 2.0, "steps": 3})
    'sampling.shift'
    """
    if not (isinstance(a, dict) and isinstance(b, dict)):
        return name
    field = min(field for field in a.keys() | b.keys() if a.get(field) != b.get(field))
    return _first_difference(f"{name}.{field}", a.get(field), b.get(field))


def _scores(evaluation: Evaluation, row: Mapping[str, Any]) -> Iterator[Score]:
    """The scores of a row that are numbers, rounded to five digits."""
    protocol, steps = evaluation["protocol"], row["steps"]
    guidance = guidance_name(row)
    settings = {"steps": steps, "count": row["count"], "protocol": protocol["name"]}
    if guidance:
        settings["guidance"] = guidance
    # The name of a file of statistics, without the folders of this machine.
    reference = epath.Path(evaluation["reference"]["name"]).name
    for metric in protocol["metrics"]:
        value = row.get(metric, math.nan)
        if math.isfinite(value):
            title = f"{metric_title(metric)}, {steps} step{'s' * (steps > 1)}"
            title += f", {guidance}" if guidance else ""
            yield Score(metric, title, float(f"{value:.5g}"), reference, settings)
