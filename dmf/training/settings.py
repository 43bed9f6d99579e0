"""The sections of a config that belong to training: checkpoints, alignment, mesh and run."""

import dataclasses

from dmf.errors import check_at_least, check_choice, check_valid
from dmf.types import COMPUTE_DTYPES


@dataclasses.dataclass(frozen=True, kw_only=True)
class InitialCheckpoint:
    """The checkpoint that training starts from.

    Attributes:
      checkpoint: directory of a run or an export, or hf:OWNER/REPO, whose sizes, latents and path
        are those of this run; empty to start from random parameters.
      ema: name of the EMA parameters of a run, or std=WIDTH; empty for the raw parameters.
    """

    checkpoint: str = ""
    ema: str = "main"


@dataclasses.dataclass(frozen=True, kw_only=True)
class TeacherCheckpoint:
    """The checkpoint of the frozen teacher, where the guidance is a teacher's.

    Attributes:
      checkpoint: directory of a run or an export, or hf:OWNER/REPO; empty for no teacher.
      ema: name of the EMA parameters of a run, or std=WIDTH; empty for the raw parameters.
    """

    checkpoint: str = ""
    ema: str = "main"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Alignment:
    """The patch features of representation alignment, for an objective with an alignment
    coefficient: a DINOv2 computes them from the images of a batch, or the dataset stores them
    (docs/data.md).

    Attributes:
      encoder: directory of a DINOv2, an export of `dmf convert`; empty for stored features.
      dtype: dtype that the DINOv2 computes in, float32 or bfloat16.
    """

    encoder: str = ""
    dtype: str = "float32"

    def __post_init__(self):
        check_choice(self, "dtype", COMPUTE_DTYPES)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshShape:
    """Devices along each axis of the mesh. It may change on resume.

    Attributes:
      slices: number of groups of devices that a slower network joins (TPU slices, GPU nodes); 0 for
        as many as the devices report.
      data: number of devices along the data axis, 1 or more; -1 for all remaining devices.
      fsdp: number of devices that parameters are sharded over, 1 or more.
      tensor: number of devices that attention heads and MLP features are sharded over, 1 or more.
    """

    slices: int = 0
    data: int = -1
    fsdp: int = 1
    tensor: int = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """Length and cadence of a run, in training steps. It may change on resume.

    Attributes:
      steps: number of training steps, 1 or more; raise it to extend a finished run.
      log_every: steps between two log lines, 1 or more; a checkpoint has one too.
      sample_every: steps between two grids of samples; 0 for none.
      preview_autoencoder: directory of the autoencoder that decodes these grids, an export of `dmf
        convert`, for example a TAESD; empty for that of `latents.autoencoder`.
      checkpoint_every: steps between two checkpoints; 0 for the last step only.
      keep_last: number of newest checkpoints that are kept, 1 or more.
      keep_every: checkpoints at multiples of this number of steps are kept too; 0 for none.
      snapshot_every: steps between two snapshots of the power EMAs, from which other widths are
        synthesised; doubled whenever there would be more than keep_snapshots; 0 for none.
      keep_snapshots: maximum number of snapshots, 2 or more; each holds every power EMA.
      writers: writers of metrics and sample grids: jsonl, tensorboard, wandb, trackio, or one of
        your own (docs/extending.md); dmf report reads what jsonl writes.
      callbacks: callbacks of your own, which the training loop calls (docs/extending.md).
      project: project of the run at wandb or trackio; empty for dmf, or WANDB_PROJECT at wandb.
    """

    steps: int = 1000
    log_every: int = 100
    sample_every: int = 500
    preview_autoencoder: str = ""
    checkpoint_every: int = 500
    keep_last: int = 2
    keep_every: int = 0
    snapshot_every: int = 100
    keep_snapshots: int = 16
    writers: tuple[str, ...] = ("jsonl", "tensorboard")
    callbacks: tuple[str, ...] = ()
    project: str = ""

    def __post_init__(self):
        check_at_least(self, 1, "steps", "log_every", "keep_last")
        check_at_least(self, 0, "sample_every", "checkpoint_every", "keep_every", "snapshot_every")
        check_at_least(self, 2, "keep_snapshots")
        check_valid(self, self.sample_every or not self.preview_autoencoder, "preview_autoencoder",
                    "run.sample_every=0 makes no grids of samples; leave it empty")
