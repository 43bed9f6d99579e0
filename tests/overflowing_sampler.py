"""A sampler whose samples are not finite; configs may name it `overflowing` within `registered`."""

import contextlib
import dataclasses
from collections.abc import Iterator

import plugin_files

from dmf import registry
from dmf.sampling.samplers import Euler


@dataclasses.dataclass(frozen=True, kw_only=True)
class Overflowing(Euler):
    """Euler steps, divided by zero."""

    def step(self, flow_map, x, t, t_next, y, noise=None, carry=()):
        x, carry = super().step(flow_map, x, t, t_next, y, noise, carry)
        return x / 0, carry


@contextlib.contextmanager
def registered() -> Iterator[None]:
    with plugin_files.registered_components():
        registry.register("sampler", overflowing=Overflowing)
        yield
