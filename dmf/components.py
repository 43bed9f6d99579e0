"""From a config to components, by one table of names.

A component of a config is a dictionary with a `name` and the fields of the class that the name
stands for in `COMPONENTS`; where there is but one class, the name may be left out, and where no
field is given, the name alone may stand for both. A field that the class does not have, or a name
that the table does not hold, is an error that says so. A config file may add components of its own
with `register`; docs/extending.md shows each kind.

What a component refuses, it calls by its own field, "std=-1.0: ...", and here it is told where that
stands, "objective.time.std=-1.0: ...". Only what has one place at the top of a config (a model, an
objective, an optimizer) gives the whole name itself.
"""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from dmf import flow, guidance, objectives, optimizer, protocols, samplers, times, weighting
from dmf.encoders.autoencoder import Autoencoder
from dmf.encoders.dinov2 import DinoV2
from dmf.encoders.inception import Inception
from dmf.models.dit import DiT
from dmf.optimizer import AdamW
from dmf.tangents import Tangent
from dmf.typing import InputError, Network
from dmf.work import Work

COMPONENTS: dict[str, dict[str, Any]] = {
    "model": {"dit": DiT},
    # Functions (split, directory) -> `Source`, beside the datasets that dmf/data/sources.py opens.
    "data": {},
    "encoder": {"autoencoder": Autoencoder, "inception": Inception, "dinov2": DinoV2},
    "objective": {
        "flow_matching": objectives.FlowMatching,
        "mean_flow": objectives.MeanFlow,
        "decoupled_mean_flow": objectives.DecoupledMeanFlow,
    },
    "interpolant": {"linear": flow.LINEAR, "cosine": flow.COSINE},
    "time": {"logit_normal": times.LogitNormal, "uniform": times.Uniform},
    "times": {"ordered_pair": times.OrderedPair},
    "guidance": {
        "none": guidance.NoGuidance,
        "self": guidance.SelfGuidance,
        "teacher": guidance.TeacherGuidance,
        "drawn": guidance.DrawnGuidance,
    },
    "weighting": {
        "uniform": weighting.Uniform,
        "adaptive": weighting.Adaptive,
        "cauchy": weighting.Cauchy,
        "released": weighting.Released,
    },
    "tangent": {"tangent": Tangent},
    "work": {"work": Work},
    "optimizer": {"adamw": AdamW},
    "emas": {"constant": optimizer.ConstantEma, "half_life": optimizer.HalfLifeEma},
    "protocol": protocols.PROTOCOLS,
    "sampler": {
        "euler": samplers.Euler,
        "restart": samplers.Restart,
        "ctm": samplers.ConsistencyTrajectory,
        "heun": samplers.Heun,
        "sde": samplers.Diffusion,
    },
}
# Fields that hold a component of a kind with another name.
_KIND = {"first": "time", "second": "time"}


def register(kind: str, name: str, component: Any) -> None:
    """Adds a component to `COMPONENTS[kind]`, for config files that bring their own.

    Args:
      kind: which table.
      name: what configs call it.
      component: a dataclass, whose fields configs may give, or an object of one, which has none
        to give; of "data", a function.

    Raises:
      InputError: there is no such kind.
    """
    lookup(COMPONENTS, kind, "kind")[name] = component


def lookup(table: Mapping[str, Any], name: Any, field: str) -> Any:
    """What a name stands for.

    Raises:
      InputError: the table does not hold it; the message names the field and the choices.
    """
    if name not in table:
        raise InputError(f"{field}={name}: choose one of {', '.join(sorted(table))}")
    return table[name]


def component(kind: str, config: Mapping[str, Any] | ConfigDict, field: str, **more: Any) -> Any:
    """Builds the component that `config.name` stands for, its inner components first.

    Args:
      kind: which table of `COMPONENTS`.
      config: `name` and the component's fields.
      field: where the config stands, for messages.
      more: fields that do not come from the config.

    Raises:
      InputError: an unknown name or field, or values that the component refuses.
    """
    values, table = dict(config), COMPONENTS[kind]
    name = values.pop("name", next(iter(table)) if len(table) == 1 else None)
    found = _registered(kind, name, f"{field}.name")
    known = _fields(found)
    for key, value in values.items():
        if key not in known:
            raise InputError(f"{field}.{key}={value}: {name} has no such field; it has "
                             f"{', '.join(sorted(known)) or 'none'}")
        values[key] = field_value(key, value, f"{field}.{key}")
    return _made(found, name, field, values | more)


def _registered(kind: str, name: Any, field: str) -> Any:
    """What a name stands for: a dataclass, or an object of one."""
    try:
        found = lookup(COMPONENTS[kind], name, field)
    except InputError as error:
        raise InputError(f"{error}; or give the file that registers it, --plugins=FILE") from None
    if not dataclasses.is_dataclass(found):
        raise InputError(f"{field}={name}: {found!r} is no dataclass, whose fields a config could "
                         "give; make it one, frozen and keyword-only")
    return found


def _fields(found: Any) -> dict[str, bool]:
    """The fields that a config may give, and whether it must; an object has them all already."""
    if not isinstance(found, type):
        return {}
    return {field.name: field.default is field.default_factory is dataclasses.MISSING
            for field in dataclasses.fields(found) if field.init}


def _made(found: Any, name: str, field: str, values: Mapping[str, Any]) -> Any:
    """The component of these values, and what it refuses by the whole name of the field."""
    if not isinstance(found, type):
        return found
    known = _fields(found)
    lacking = [key for key, needed in known.items() if needed and key not in values]
    if lacking:
        raise InputError(f"{field}.{lacking[0]}: {name} has no default for it; give one")
    try:
        return found(**values)
    except InputError as error:
        own = re.match(r"(\w+)[.=]", str(error))
        where = f"{field}." if own and own[1] in known else ""
        raise InputError(f"{where}{error}") from None


def field_value(name: str, value: Any, field: str) -> Any:
    """A field's value: a component where it is one, by its fields or by its name."""
    kind = _KIND.get(name, name)
    if isinstance(value, Mapping | ConfigDict):
        return component(kind, value, field)
    if kind in COMPONENTS:
        return _made(_registered(kind, value, field), value, field, {})
    return tuple(value) if isinstance(value, list | tuple) else value


def network(config: ConfigDict) -> Network:
    """The network of `config.model`."""
    return component("model", {"name": "dit", **config.model}, "model")
