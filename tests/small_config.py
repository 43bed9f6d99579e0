"""A config file of a run of two layers, for command lines and other processes."""

import pathlib
import sys

from ml_collections import ConfigDict

from configs import default
from dmf import registry

sys.path.append(str(pathlib.Path(__file__).resolve().parent))

import tiny
from two_layers import TwoLayers

if "two_layers" not in registry.components("model"):
    registry.register("model", two_layers=TwoLayers)


def get_config() -> ConfigDict:
    return tiny.config(model=default.component(TwoLayers()))
