"""Directories as runs leave them, written by hand."""

import json

import numpy as np
import PIL.Image
import tiny

from dmf.checkpoints import load
from dmf.checkpoints.params import FORMAT


def evaluation(values, *, step=8, protocol="pixels", reference="digits", mark="f", count=72):
    """An evaluation of the average "main" by number of sampling steps, in two metrics."""
    rows = [{"ema": "main", "steps": steps, "fd_pixels": value, "label_agreement": value / 10}
            for steps, value in values.items()]
    return {
        "protocol": {"name": protocol, "metrics": ["fd_pixels", "label_agreement"]},
        "reference": {"name": reference, "fingerprint": mark},
        "count": count, "networks": {}, "step": step, "results": rows,
    }  # fmt: skip


def row(step, **values):
    """A line of metrics."""
    return {"step": step, "loss": 1 / step, "gradient_norm": 1 / 3, "steps_per_second": 7.25,
            "images_per_second": 1.2345678e-05, **values}  # fmt: skip


def write(directory, overrides=None, *, step=8, metrics=(), evaluations=(), grid=False, log=""):
    """A run at a step, whose config has some fields replaced."""
    config = load.config_to_json(tiny.config(overrides))
    (directory / "checkpoints").mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps({"format": FORMAT, **config}))
    if step:
        (directory / "checkpoints" / str(step)).mkdir()
    if metrics:
        lines = "".join(json.dumps(one) + "\n" for one in metrics)
        (directory / "metrics.jsonl").write_text(lines)
    for one in evaluations:
        path = directory / "evaluations" / f"{one['step']:08}.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(one))
    if grid:
        (directory / "samples").mkdir()
        for at in (4, 8):
            picture = PIL.Image.fromarray(np.full((5, 6), at * 20, np.uint8))
            picture.save(directory / f"samples/{at:08}.png")
    if log:
        (directory / "train.log").write_text(log)
    return directory
