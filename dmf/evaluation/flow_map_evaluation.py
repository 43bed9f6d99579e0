"""How far the images of a flow map are from a reference, a row for each set of EMA parameters and
number of sampling steps."""

import dataclasses
import functools
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from dmf.evaluation.build import Evaluation
from dmf.evaluation.evaluated_images import EvaluatedImages
from dmf.evaluation.evaluator import Evaluator
from dmf.runtime.checksums import fingerprint
from dmf.runtime.sharding import replicate_on_host
from dmf.sampling.class_labels import class_labels
from dmf.sampling.generator import Generate, Generator
from dmf.types import Params


def evaluate(
    evaluator: Evaluator,
    generator: Generator,
    settings: Evaluation,
    params: Iterable[tuple[str, Params]],
    *,
    steps: Sequence[int],
) -> list[dict[str, Any]]:
    """Evaluates a flow map.

    Args:
      evaluator: of the protocol and the reference.
      generator: of the flow map.
      settings: of `config.evaluation`, for count and seed.
      params: pairs of the name of EMA parameters ('' for the raw parameters) and the parameters.
      steps: numbers of sampling steps.

    Returns:
      A row for each set of parameters and number of steps.

    Raises:
      InputError: the evaluator or the sampler refuses its input.
      RunError: samples hold NaN or infinity.
    """
    labelled = bool(generator.num_classes)
    evaluator.check(generator.image_shape, settings.count, labelled=labelled)
    rows = []
    for ema, ema_params in params:
        ema_params = replicate_on_host(ema_params, evaluator.mesh)
        identity = {"parameters": fingerprint(ema_params), "seed": settings.seed,
                    **generator.identity}
        for count in steps:
            generate = generator(
                ema_params, steps=count, seed=settings.seed, rounding=evaluator.protocol.rounding
            )
            images = _samples(generator, generate, settings, evaluator.protocol.label_sampling)
            rows.append(evaluator.measure(dataclasses.replace(
                images,
                name=f"{ema or 'parameters'}, {count} step{'s' * (count > 1)}",
                row={"ema": ema, "steps": count},
                identity=[identity, settings.count],
            )))  # fmt: skip
    return rows


def _samples(
    generator: Generator, generate: Generate, settings: Evaluation, label_sampling: str
) -> EvaluatedImages:
    """Samples with their labels, not yet named."""
    labels = functools.partial(
        class_labels, num_classes=generator.num_classes, label_sampling=label_sampling,
        seed=settings.seed,
    )  # fmt: skip
    return EvaluatedImages(
        name="samples",
        read=lambda indices: generate(indices, labels(indices)),
        count=settings.count,
        shape=generator.image_shape,
        labels=labels(np.arange(settings.count)) if generator.num_classes else None,
        row={},
        identity=None,
    )


def sample_description(settings: Evaluation, generator: Generator) -> dict[str, Any]:
    """The fields of a result that describe the flow map and its samples."""
    return {"count": settings.count, "seed": settings.seed, **generator.identity}
