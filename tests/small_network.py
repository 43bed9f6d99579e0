"""A network of two layers with its parameters, and runs of it."""

import contextlib
import pathlib
from collections.abc import Iterator
from typing import Any

import jax
import plugin_files
import tiny
from ml_collections import ConfigDict
from two_layers import TwoLayers

from configs import default
from dmf import registry
from dmf.objectives import DecoupledMeanFlow

NETWORK = TwoLayers(side=4)
# `config` as a config file, for command lines and other processes.
CONFIG = tiny.ROOT / "tests" / "small_config.py"
PARAMS = NETWORK.init(jax.random.key(7))


@contextlib.contextmanager
def registered() -> Iterator[None]:
    """Within, a config may name the network: `small_network.config`."""
    with plugin_files.registered_components():
        registry.register("model", two_layers=TwoLayers)
        yield


def run() -> pathlib.Path:
    """The workdir of a flow model of this network; copy it to change it."""
    return tiny.shared_run("small", config)


def flow_map_run() -> pathlib.Path:
    """A Decoupled MeanFlow run that started from `run`."""
    return tiny.shared_run("small_flow_map", _flow_map_config)


def _flow_map_config() -> ConfigDict:
    objective = default.component(DecoupledMeanFlow())
    return config({"init.checkpoint": str(run())}, objective=objective)


def config(overrides: dict[str, Any] | None = None, **components: ConfigDict) -> ConfigDict:
    """`tiny.config` with this network."""
    return tiny.config(overrides, model=default.component(TwoLayers()), **components)
