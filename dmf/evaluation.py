"""How far the images of a flow map are from others, a row for each average and number of steps."""

import functools
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from dmf.evaluator import Evaluator, Subject
from dmf.generation import Generator
from dmf.intact import fingerprint
from dmf.protocols import labels_of
from dmf.sharding import on_this_host
from dmf.typing import Params


def evaluate(
    evaluator: Evaluator,
    generator: Generator,
    config: ConfigDict,
    params: Iterable[tuple[str, Params]],
    *,
    steps: Sequence[int],
) -> list[dict[str, Any]]:
    """A row for each average and number of steps of a flow map.

    Args:
      evaluator: of the protocol and the reference.
      generator: of the flow map.
      config: `evaluation` gives count and seed.
      params: of the flow map, by the name of the average, one after the other.
      steps: numbers of steps.

    Raises:
      InputError: what the evaluator or the sampler refuses.
      RunError: samples hold NaN or infinity.
    """
    settings, rows = config.evaluation, []
    labelled = bool(generator.num_classes)
    evaluator.check(generator.image_shape, settings.count, labelled=labelled)
    labels = functools.partial(
        labels_of, num_classes=generator.num_classes, how=evaluator.protocol.labels,
        seed=settings.seed,
    )  # fmt: skip
    for ema, weights in params:
        weights = on_this_host(weights, evaluator.on)
        made_of = {"parameters": fingerprint(weights), "seed": settings.seed, **generator.identity}
        for count in steps:
            generate = generator(
                weights, steps=count, seed=settings.seed, rounding=evaluator.protocol.rounding
            )
            rows.append(evaluator.measure(Subject(
                name=f"{ema or 'parameters'}, {count} step{'s' * (count > 1)}",
                images=lambda indices, generate=generate: generate(indices, labels(indices)),
                count=settings.count,
                shape=generator.image_shape,
                labels=labels(np.arange(settings.count)) if labelled else None,
                row={"ema": ema, "steps": count},
                identity=[made_of, settings.count],
            )))  # fmt: skip
    return rows


def described(config: ConfigDict, generator: Generator) -> dict[str, Any]:
    """What a result says of the flow map and its samples."""
    return {
        "count": config.evaluation.count,
        "seed": config.evaluation.seed,
        **generator.identity,
    }
