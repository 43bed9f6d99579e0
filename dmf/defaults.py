"""Every field of a config, with its default, and the components that config files are made of.

Fields that name a component (`name=...`) take that component's own fields beside the name;
`dmf/components.py` lists the components.
"""

from ml_collections import ConfigDict, config_dict


def logit_normal(mean: float = 0.0, std: float = 1.0) -> ConfigDict:
    """Times whose log ratio of noise to data is normal."""
    return ConfigDict({"name": "logit_normal", "mean": mean, "std": std})


def ordered_pair(first: ConfigDict, second: ConfigDict, equal_share: float = 0.0) -> ConfigDict:
    """(t, r) = (max, min) of two draws; a share of samples takes r = t."""
    return ConfigDict(
        {"name": "ordered_pair", "first": first, "second": second, "equal_share": equal_share}
    )


def self_guidance(
    omega: float = 1.0, kappa: float = 0.0, interval: tuple[float, float] = (0.0, 1.0)
) -> ConfigDict:
    """The network guides itself, with effective scale omega / (1 - kappa); 1 and 0 are none, and
    cost nothing."""
    return ConfigDict({"name": "self", "omega": omega, "kappa": kappa, "interval": interval})


def teacher_guidance(scale: float, interval: tuple[float, float] = (0.0, 1.0)) -> ConfigDict:
    """The frozen network of `config.teacher.checkpoint` guides."""
    return ConfigDict({"name": "teacher", "scale": scale, "interval": interval})


def drawn_guidance(kappa: float = 0.0, largest: float = 8.0) -> ConfigDict:
    """Scale and interval are inputs of the network (`model.guidance_input`), drawn in training."""
    return ConfigDict(
        {
            "name": "drawn",
            "kappa": kappa,
            "largest": largest,
            "power": 1.0,
            "low": (0.0, 0.5),
            "high": (0.5, 1.0),
        }
    )


def tangent(direction: str = "guided") -> ConfigDict:
    """How du/dt is taken: see dmf/tangents.py. "own" makes the loss that of improved MeanFlow."""
    return ConfigDict(
        {
            "direction": direction,
            "difference": 0.0,
            "largest": 0.0,
            "normalized": 0.0,
            "warmup_steps": 0,
        }
    )


def work() -> ConfigDict:
    """How losses are computed, at no change of their values: see dmf/work.py."""
    return ConfigDict({"shared": True, "null_parts": 0})


def flow_matching(
    time: ConfigDict | None = None, alignment_coefficient: float = 0.0
) -> ConfigDict:
    """Train a flow model; with an alignment coefficient, aligned to an encoder (REPA)."""
    return ConfigDict(
        {
            "name": "flow_matching",
            "interpolant": "linear",
            "time": time or logit_normal(),
            "label_dropout": 0.1,
            "alignment_coefficient": alignment_coefficient,
            "weighting": {"name": "uniform"},
            "bins": 0,
        }
    )


def mean_flow(guidance: ConfigDict | None = None) -> ConfigDict:
    """Train MeanFlow from scratch."""
    return ConfigDict(
        {
            "name": "mean_flow",
            "interpolant": "linear",
            "times": ordered_pair(logit_normal(-0.4), logit_normal(-0.4), 0.75),
            "guidance": guidance or self_guidance(),
            "tangent": tangent(),
            "label_dropout": 0.1,
            "weighting": {"name": "adaptive", "power": 1.0, "offset": 0.01},
            "work": work(),
            "bins": 0,
        }
    )


def decoupled_mean_flow(guidance: ConfigDict | None = None) -> ConfigDict:
    """Turn a flow model into a flow map."""
    return ConfigDict(
        {
            "name": "decoupled_mean_flow",
            "interpolant": "linear",
            "time": logit_normal(),
            "times": ordered_pair(logit_normal(0.4), logit_normal(-1.2)),
            "guidance": guidance or self_guidance(),
            "tangent": tangent(),
            "label_dropout": 0.1,
            "weighting": {"name": "cauchy"},
            "work": work(),
            "bins": 0,
        }
    )


def get_config() -> ConfigDict:
    """The defaults: a small flow model of the digits."""
    return ConfigDict(
        {
            "seed": 0,
            "model": {
                "input_size": 8,
                "channels": 1,
                "patch_size": 2,
                "depth": 6,
                "width": 64,
                "heads": 4,
                "mlp_ratio": 4.0,
                "num_classes": 10,
                "conditioning": "flow",
                "split_depth": config_dict.placeholder(int),
                "pattern": "split",
                "embedded_times": ("t", "t-r"),
                "guidance_input": False,
                "qk_norm": False,
                "learned_variance": False,
                "alignment_depth": 0,
                "alignment_width": 768,
                "alignment_hidden": 2048,
                "scan": True,
                "remat": "none",
                "dtype": "float32",
                "float32": (),
                "attention": "auto",
            },
            # Where training starts: a run or an export. `ema` names the average of a run.
            "init": {"checkpoint": "", "ema": "main"},
            "teacher": {"checkpoint": "", "ema": "main"},
            # What an objective with an alignment coefficient aligns with: features that a DINOv2,
            # a directory that `dmf convert` made, gives for the images of a batch, computed in
            # `dtype`; or, if there is none, those that the dataset stores. See docs/data.md.
            "alignment": {"encoder": "", "dtype": "float32"},
            # `directory` is a dataset, or where TFDS keeps its datasets. Of `classes`, only rows
            # of these labels, none for all. `mixture` adds datasets by name, each with its `name`,
            # `split`, `directory` and `weight`, beside the first one of `weight`.
            "data": {
                "name": "digits",
                "split": "train",
                "directory": "",
                "batch_size": 128,
                "mirror": False,
                "classes": (),
                "weight": 1.0,
                "mixture": {},
            },
            # What lies between the network's samples x and images: nothing, or the autoencoder of
            # an export, with x = (latent - shift) * scale, or (latent - mean) / std by channel.
            "latents": {"autoencoder": "", "scale": 1.0, "shift": 0.0, "mean": (), "std": ()},
            "objective": flow_matching(),
            # Parameters that are not trained: regular expressions for whole paths, the number of a
            # block second, as "blocks/(0|1)/mlp/.*"; "encoder" is all that sees no r.
            "freeze": (),
            "optimizer": {
                "name": "adamw",
                "learning_rate": 1e-4,
                "b1": 0.9,
                "b2": 0.95,
                "eps": 1e-8,
                "weight_decay": 0.0,
                "clip_norm": 1.0,
                "warmup_steps": 0,
                "schedule": "constant",
                "decay_steps": 0,
                "skip_nonfinite": 0,
            },
            # Parts that a batch is cut into, one after the other, to save memory.
            "accumulation": 1,
            "emas": {"main": {"name": "constant", "decay": 0.9999}},
            # Devices along each axis; -1 takes what the others leave. `slices` are groups that a
            # slower network joins, 0 for as many as the devices say. May change on resume.
            "mesh": {"slices": 0, "data": -1, "fsdp": 1, "tensor": 1},
            # Length and cadence, in steps; 0 is never. May change on resume.
            "run": {
                "steps": 1000,
                "log_every": 100,
                "sample_every": 500,
                "checkpoint_every": 500,
                "keep_last": 2,
                "keep_every": 0,
            },
            # Steps to trace for a profiler, as "100:105". May change on resume.
            "profile": "",
            # How images are made, while training and from the result. `decode_batch` latents are
            # decoded at a time, in float32 or bfloat16, whose error dmf/encoders/latents.py tells.
            "sampling": {
                "sampler": {"name": "euler"},
                "steps": (1, 2, 4),
                "shift": 1.0,
                "guidance": {"scale": 1.0, "interval": (0.0, 1.0)},
                "decode_batch": 8,
                "decode_dtype": "float32",
                "ema": "main",
            },
            # How images are measured, see dmf/protocols.py. `reference` is a file of statistics, or
            # images; empty is the dataset itself. `inception` and `dinov2` are networks that
            # `dmf convert` made. `metrics`, `labels` and `rounding` are the protocol's if empty.
            # A device sees `chunk_size` images at a time; after `part_size` their sums are written.
            # While training, every so many steps (0 is never), of these averages ('' is the
            # parameters) with these numbers of steps (those of `sampling` if empty); the best
            # checkpoint, by the first of each and of the metrics, is kept. May change on resume.
            "evaluation": {
                "protocol": "pixels",
                "reference": "",
                "inception": "",
                "dinov2": "",
                "metrics": (),
                "labels": "",
                "rounding": "",
                "count": 5000,
                "seed": 0,
                "chunk_size": 64,
                "part_size": 5000,
                "every": 0,
                "emas": ("main",),
                "steps": (),
            },
        }
    )
