"""An export of a small flow model, and what `dmf evaluate` writes of it."""

import json

import small_network
import tiny_exports
from two_layers import TwoLayers

from dmf.checkpoints import export, load
from dmf.sampling.build import Sampling
from dmf.sampling.generator import unguided_identity

NETWORK = TwoLayers()
PARAMS = tiny_exports.params(NETWORK)
ROW = {"protocol": "pixels", "count": 72, "ema": "main", "steps": 2, "fd_pixels": 0.123456,
       "label_agreement": float("nan")}  # fmt: skip


def parts() -> export.Parts:
    return export.Parts(NETWORK, load.config_to_json(small_network.config()), PARAMS, "drawn")


def evaluation(**fields) -> str:
    """What `dmf evaluate` writes of the export above, as far as the model card reads it."""
    stated = {
        "protocol": {"name": "pixels", "metrics": ["fd_pixels", "label_agreement"]},
        "reference": {"name": "/home/me/digits"}, "step": None, "results": [ROW],
    }  # fmt: skip
    return json.dumps(unguided_identity(NETWORK, Sampling(), None) | stated | fields)
