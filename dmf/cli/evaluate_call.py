"""`dmf.evaluate`: the verb `evaluate` as a function, for Python."""

import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

from absl import flags as absl_flags

from dmf.cli import config_flag, evaluate_flags, flags
from dmf.cli import evaluate as evaluate_verb


def evaluate(
    checkpoint: str | os.PathLike = "",
    overrides: Mapping[str, Any] | None = None,
    *,
    images: str | os.PathLike = "",
    resolution: int | None = None,
    reference: str | os.PathLike | None = None,
    make_reference: str | os.PathLike | None = None,
    protocol: str | None = None,
    inception: str | os.PathLike | None = None,
    dinov2: str | os.PathLike | None = None,
    metrics: Sequence[str] | None = None,
    label_sampling: str | None = None,
    rounding: str | None = None,
    steps: Sequence[int] | int | None = None,
    count: int | None = None,
    ema: Sequence[str] | str | None = None,
    guidance: Sequence[float] | float | None = None,
    interval: Sequence[tuple[float, float]] | None = None,
    guide: str | os.PathLike | None = None,
    guide_ema: str | None = None,
    output: str | os.PathLike | None = None,
    keep_features: bool | None = None,
    reconstruction: bool | None = None,
    autoencoder: str | os.PathLike | None = None,
) -> dict[str, Any]:
    """Measures how far images are from a reference, as `dmf evaluate` does.

    >>> result = dmf.evaluate("runs/digits_sit", steps=(1, 2), count=72)
    >>> [row["steps"] for row in result["results"]]
    [1, 2]

    Args:
      checkpoint: a run, one of its checkpoints/STEP, an export, or hf:OWNER/REPO for one of the
        Hugging Face hub; empty with `images`.
      overrides: values by dotted field of the config of the checkpoint, as
        {"model.conditioning": "decoupled", "model.split_depth": 4}.
      images: a set of images in place of a flow map: a folder, .zip, .tar or .npz, or a TFDS name.
      resolution: side of a centre crop of `images`, in pixels; None for none.
      reference: statistics or images to compare with; the dataset of the checkpoint by default,
        required with `images`.
      make_reference: an .npz of reference statistics to write, instead of measuring.
      protocol: adm, edm2, meanflow or pixels, which needs no network and is the default.
      inception, dinov2: exports of `dmf.convert`, for the protocols that need them.
      metrics: names of metrics; those of the protocol by default.
      label_sampling: "random" or "balanced" labels; as the protocol by default.
      rounding: "nearest", "half_up" or "down"; as the protocol by default.
      steps: numbers of sampling steps.
      count: number of samples of a flow map.
      ema: names of EMA parameters, also "std=0.1"; "" for the raw parameters.
      guidance: guidance scales to search, >= 0.
      interval: intervals of guided times (start, end) to search, in [0, 1].
      guide: another checkpoint, for autoguidance.
      guide_ema: EMA parameters of `guide`.
      output: a .json file; evaluation.json in the run by default, required with `images` and with
        hf:OWNER/REPO.
      keep_features: whether the features are written too.
      reconstruction, autoencoder: whether `images` are compared with their reconstructions, and the
        export that makes these.

    Returns:
      What the JSON file holds: "results", a row for each number of steps, and every setting that
      the scores depend on; {} with `make_reference`.

    Raises:
      InputError: arguments that cannot be used, or do not go together; they are named as flags.
      RunError: the checkpoint is damaged, or samples are not finite.
    """
    from dmf.checkpoints.located import look_again

    look_again()
    values = absl_flags.FlagValues()
    evaluate_verb.define(values)
    names = tuple(values)
    given = flags.as_arguments(
        checkpoint=checkpoint or None, images=images or None, resolution=resolution,
        reference=reference,
        make_reference=make_reference, protocol=protocol, inception=inception, dinov2=dinov2,
        metrics=metrics, label_sampling=label_sampling, rounding=rounding, steps=steps,
        count=count, ema=ema, guidance=guidance, interval=interval, guide=guide,
        guide_ema=guide_ema, output=output, keep_features=keep_features,
        reconstruction=reconstruction, autoencoder=autoencoder,
    )  # fmt: skip
    given += config_flag.as_flags(overrides)
    fields = config_flag.parse_with_overrides("evaluate", given, values, "")
    evaluate_flags.check_reconstruction(values, names)
    written = evaluate_verb.run(values, fields)
    return {} if make_reference else json.loads(written.read_text())
