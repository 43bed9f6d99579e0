"""The scores of a run or an export, for the model card of what is exported from it."""

import json
import math
from collections.abc import Iterator, Mapping
from typing import Any

from etils import epath

from dmf import registry
from dmf.checkpoints.hub_card import Score
from dmf.checkpoints.params import is_export, split_step
from dmf.errors import InputError
from dmf.evaluation.result_rows import guidance_name
from dmf.experiments.evaluation_report import Evaluation, metric_title, read_evaluation
from dmf.runtime.progress import log
from dmf.training.metrics_writer import evaluation_file


def card_scores(
    checkpoint: epath.PathLike, network: Any, ema: str, *, step: int | None
) -> tuple[Score, ...]:
    """The scores that `dmf evaluate`, or the evaluation during training, left with a checkpoint.

    Scores of another step, of other EMA parameters or of another network are no scores of what is
    exported: they are left out with a line that says so.

    Args:
      checkpoint: a workdir, one of its checkpoints/STEP, or an export.
      network: the network that is exported.
      ema: name of the EMA parameters that are exported; of an export it is ignored.
      step: of the parameters that are exported; None for those of an export.
    """
    paths = [path for path in _files(checkpoint, step) if path.exists()]
    for path in paths:
        try:
            evaluation = read_evaluation(path)
            rows = _own_rows(evaluation, step, network, None if is_export(checkpoint) else ema)
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
    evaluation: Evaluation, step: int | None, network: Any, ema: str | None
) -> list[Mapping[str, Any]]:
    """The rows of an evaluation that are about some parameters; of a search of guidance the best.

    Raises:
      InputError: there are none.
    """
    if evaluation.get("step") != step:
        raise InputError("step", remedy=f"it is of step {evaluation.get('step')}, and the "
                         f"checkpoint of {step}")
    if evaluation.get("model") != json.loads(json.dumps(registry.to_config(network, "model"))):
        raise InputError("model", remedy="it is of a network with other fields")
    rows = [evaluation["best"]] if evaluation.get("best") else evaluation["results"]
    rows = [row for row in rows if ema in (None, row["ema"])]
    if not rows:
        raise InputError("ema", remedy=f"it has no row of the EMA parameters {ema!r}")
    return rows


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
