"""Training: the loop, the training step, the optimizer and EMA, metrics, and compiling ahead of
time.

For those who train. It imports `dmf.evaluation`, `dmf.checkpoints`, `dmf.sampling`, `dmf.data`,
`dmf.models`, `dmf.objectives` and what lies below them.
"""

from dmf.registry import define_kind
from dmf.training.adafactor import Adafactor
from dmf.training.callback import Callback
from dmf.training.ema import ConstantEma, HalfLifeEma, PowerEma
from dmf.training.lion import Lion
from dmf.training.metrics_writer import JsonLinesWriter
from dmf.training.muon import Muon
from dmf.training.optimizer import AdamW, Optimizer
from dmf.training.tensorboard_writer import TensorBoardWriter
from dmf.training.trackers import TrackioWriter, WandbWriter

define_kind(
    "optimizer", "The update of the parameters.", Optimizer,
    adamw=AdamW, muon=Muon, lion=Lion, adafactor=Adafactor,
)
define_kind(
    "ema", "An exponential moving average (EMA) of the parameters.",
    constant=ConstantEma, half_life=HalfLifeEma, power=PowerEma,
)
define_kind(
    "writer", "Receives the metrics, sample grids and config of a run.",
    jsonl=JsonLinesWriter, tensorboard=TensorBoardWriter, wandb=WandbWriter, trackio=TrackioWriter,
)
define_kind("callback", "Called by the training loop after some steps.", Callback)
