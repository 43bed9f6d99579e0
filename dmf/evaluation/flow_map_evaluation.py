"""How far the images of a flow map are from a reference, a row for each set of EMA parameters,
guidance at sampling and number of sampling steps. Equal images are generated once.

    EMA parameters -> guidance intervals -> guidance scales -> numbers of steps
"""

import dataclasses
import functools
import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from dmf.errors import InputError
from dmf.evaluation.build import Evaluation
from dmf.evaluation.evaluated_images import EvaluatedImages
from dmf.evaluation.evaluator import Evaluator
from dmf.evaluation.result_rows import Row, best_row, row_name
from dmf.runtime import processes
from dmf.runtime.checksums import fingerprint
from dmf.runtime.sharding import replicate_on_host
from dmf.sampling.class_labels import class_labels
from dmf.sampling.generator import Generate, Generator
from dmf.types import Params


def guided_generators(
    generator: Generator, settings: Evaluation
) -> list[tuple[dict[str, Any], Generator]]:
    """The generators of the guidance scales and intervals that are searched, each with the fields
    of its rows; without a search, the generator alone, whose rows have no such fields.

    Scale 1 is no guidance, in every interval.

    Args:
      generator: of the flow map; its guidance has the scale or the interval that is not searched.
      settings: of `config.evaluation`.

    Raises:
      InputError: guidance that the network cannot take, or intervals without guidance.
    """
    if not settings.searches_guidance:
        return [({}, generator)]
    base = generator.guidance
    scales = tuple(dict.fromkeys(settings.guidance_scales)) or (base.scale,)
    intervals = tuple(dict.fromkeys(settings.guidance_intervals)) or (base.interval,)
    if settings.guidance_intervals and set(scales) == {1}:
        raise InputError("evaluation.guidance_intervals", intervals, "the only guidance scale is "
                         "1, which is none in every interval; give evaluation.guidance_scales too")
    return [
        ({"guidance": float(scale), "interval": list(interval)}, generator.with_guidance(
            dataclasses.replace(base, scale=scale, interval=(0.0, 1.0) if scale == 1 else interval)
        ))
        for interval in intervals for scale in scales
    ]  # fmt: skip


def evaluate(
    evaluator: Evaluator, generator: Generator, settings: Evaluation,
    params: Iterable[tuple[str, Params]], *, steps: Sequence[int], must_be_finite: bool = True,
) -> list[Row]:  # fmt: skip
    """Evaluates a flow map.

    Args:
      evaluator: of the protocol and the reference.
      generator: of the flow map.
      settings: of `config.evaluation`, for count, seed, and the guidance that is searched.
      params: pairs of the name of EMA parameters ('' for the raw parameters) and the parameters.
      steps: numbers of sampling steps.
      must_be_finite: whether NaN or infinity in samples is an error; otherwise a row of NaN.

    Returns:
      A row for each set of parameters, interval, scale and number of steps. Rows of equal images
      have equal scores, which are measured once.

    Raises:
      InputError: the evaluator or the sampler refuses its input.
      NotFinite: samples hold NaN or infinity.
    """
    generators = guided_generators(generator, settings)
    labelled = bool(generator.num_classes)
    evaluator.check(generator.image_shape, settings.count, labelled=labelled)
    rows: list[Row] = []
    measured: dict[Any, Row] = {}
    for ema, ema_params in params:
        ema_params = replicate_on_host(ema_params, evaluator.mesh)
        mark = fingerprint(ema_params)
        for (guidance, guided), count in itertools.product(generators, steps):
            fields = {"ema": ema, "steps": count, **guidance}
            key = mark, count, guided.guidance_effect(count) if guidance else None
            if key in measured:
                processes.log(f"{row_name(fields)}: the same images as {row_name(measured[key])}")
            else:
                images = _images(evaluator, guided, settings, ema_params, mark, fields)
                measured[key] = evaluator.measure(images, must_be_finite=must_be_finite)
            rows.append({**measured[key], **fields})
    return rows


def _images(
    evaluator: Evaluator, generator: Generator, settings: Evaluation, params: Params, mark: str,
    fields: Mapping[str, Any],
) -> EvaluatedImages:  # fmt: skip
    """The images of one set of parameters, guidance and number of steps.

    Args:
      evaluator: of the protocol.
      generator: of the flow map under the guidance.
      settings: of `config.evaluation`.
      params: the parameters, on every device.
      mark: their fingerprint.
      fields: of the row.
    """
    generate = generator(
        params, steps=fields["steps"], seed=settings.seed, rounding=evaluator.protocol.rounding
    )
    identity = {"parameters": mark, "seed": settings.seed, **generator.identity}
    return dataclasses.replace(
        _samples(generator, generate, settings, evaluator.protocol.label_sampling),
        name=row_name(fields), row=fields, identity=[identity, settings.count],
    )  # fmt: skip


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


def result(
    evaluator: Evaluator,
    generator: Generator,
    settings: Evaluation,
    rows: Sequence[Row],
    **source: Any,
) -> dict[str, Any]:
    """Rows with everything that their numbers depend on, see `Evaluator.result`; where guidance was
    searched, also the best row.

    Args:
      evaluator, generator, settings: as for `evaluate`.
      rows: that `evaluate` returned.
      source: fields that say where the parameters come from.
    """
    described = {"count": settings.count, "seed": settings.seed, **generator.identity}
    if settings.searches_guidance:
        sampling = described["sampling"]
        stated = {name: value for name, value in sampling["guidance"].items()
                  if name not in ("scale", "interval")}  # fmt: skip
        described["sampling"] = {**sampling, "guidance": stated}
        described["best"] = best_row(rows, evaluator.protocol.metrics[0])
    return evaluator.result(rows, **source, **described)
