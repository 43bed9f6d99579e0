"""Networks: those that are trained, and in `encoders` those that are frozen.

Flax Linen stays inside; outside a network is a frozen dataclass with `init` and `apply`. Networks
know nothing of sharding. For those who change an architecture. It imports `dmf.runtime`,
`dmf.registry`, `dmf.errors` and `dmf.types`; objectives lie beside it, and neither imports the
other.
"""

from dmf.models.dit import DiT
from dmf.models.encoders.autoencoder import Autoencoder
from dmf.models.encoders.autoencoder_dc import AutoencoderDC
from dmf.models.encoders.autoencoder_kl import AutoencoderKL
from dmf.models.encoders.dinov2 import DinoV2
from dmf.models.encoders.inception import Inception
from dmf.models.encoders.lpips import LPIPS
from dmf.models.encoders.rae import RAE
from dmf.models.encoders.taesd import TAESD
from dmf.models.in_context_dit import InContextDiT
from dmf.models.wide_head import WideHead
from dmf.registry import define_kind

__all__ = [
    "LPIPS", "RAE", "TAESD", "Autoencoder", "AutoencoderDC", "AutoencoderKL", "DiT", "DinoV2",
    "InContextDiT", "Inception", "WideHead",
]  # fmt: skip

# The kinds of network that `dmf convert` reads and nothing here trains.
FROZEN_KINDS = ("autoencoder", "encoder")

define_kind("model", "The network that is trained.", dit=DiT, in_context_dit=InContextDiT)
define_kind(
    "autoencoder", "The frozen network between images and latents.", autoencoder_kl=AutoencoderKL,
    taesd=TAESD, autoencoder_dc=AutoencoderDC, rae=RAE,
)
define_kind(
    "encoder", "A frozen network that features are measured with.", inception=Inception,
    dinov2=DinoV2, lpips=LPIPS,
)
