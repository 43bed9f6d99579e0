"""Every field of a config with values that it was not made for: which are refused, and how.

    python tests/config_fuzz.py [FIELD] [EVERY]      prints every value that is accepted

With EVERY, one of so many values is tried.
"""

import dataclasses
import itertools
import pathlib
import resource
import sys
from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
import small_network
import tiny
from etils import epath
from ml_collections import ConfigDict

from dmf import registry
from dmf.cli.config_flag import complete, overridden
from dmf.data.build import MixturePart
from dmf.default_config import Config
from dmf.errors import InputError
from dmf.training.prepared_run import prepare

# As the command line gives them.
TEXTS = (
    "", " ", "-1", "0", "1", "7", "-0.5", "0.5", "2.5", "1e-30", "1e30", "-1e30", "1e400", "nan",
    "inf", "-inf", "2147483647", "2147483648", "4294967296", "-2147483648",
    "99999999999999999999", "None", "True", "x", "x\ny", "é\0", "../x", "/dev/null", "(1,2)", "()",
    "(-1,)", "(nan,nan)", "(0,inf)", "(0.5,0.25)", "1e1", "'x'", "[[1]]", "{}", "9" * 5000,
    "(" * 300,
)  # fmt: skip
# As a config file gives them.
VALUES = (
    None, True, -1, 0, 2.5, float("nan"), float("inf"), -float("inf"), 1e300, 2**31, 2**63,
    -(2**70),
    "", "x", b"x", (), (1, 2), [1.5], (None,), ("x", ""), {}, {"name": "x"}, {"x": {}}, np.int64(3),
    np.float32(0.5), np.ones(2), object(), len,
)  # fmt: skip
# Fields that a component cannot be built without.
REQUIRED = {
    "dit": {"input_size": 8, "channels": 1, "depth": 2, "width": 8, "heads": 1, "num_classes": 10},
    "in_context_dit": {"input_size": 8, "channels": 1, "depth": 2, "head_depth": 1, "width": 8,
                       "heads": 1, "num_classes": 10},
    "ordered_pair": {"first": {"name": "uniform"}, "second": {"name": "uniform"}},
}


@dataclasses.dataclass(frozen=True)
class Field:
    """A field in a config that has it: dotted name, class, and name within the class."""

    config: ConfigDict
    place: str
    cls: type
    name: str


def base() -> ConfigDict:
    """A run of the smallest network, sampled and evaluated, with a mixture."""
    config = small_network.config({
        "data.batch_size": 8, "run.sample_every": 4, "evaluation.every": 4, "run.steps": 8,
    })
    more = registry.complete(MixturePart, {"name": "digits"})
    config.data.mixture = ConfigDict({"more": more})
    return config


def fields() -> Iterator[Field]:
    """Every field of every group and of every registered component, once."""
    seen = set()

    def walk(config: ConfigDict, kind: Any, place: str) -> Iterator[Field]:
        part = _at(config, place)
        name = part if isinstance(part, str) else part.get("name")
        cls = kind if isinstance(kind, type) else registry.lookup(kind, name)
        if not isinstance(cls, type) or cls in seen or not cls.__module__.startswith("dmf."):
            return
        seen.add(cls)
        for name, field in registry.config_fields(cls).items():
            inner = f"{place}.{name}".lstrip(".")
            kind = registry.field_kind(field)
            yield Field(config, inner, cls, name)
            if registry.holds_by_name(field):
                for key in _at(config, inner):
                    yield from choices(config, kind, f"{inner}.{key}")
            elif kind is not None:
                yield from choices(config, kind, inner)

    def choices(config: ConfigDict, kind: Any, place: str) -> Iterator[Field]:
        yield from walk(config, kind, place)
        for name in [] if isinstance(kind, type) else sorted(registry.components(kind)):
            changed = ConfigDict(config.to_dict())
            _set(changed, place, registry.complete(kind, {"name": name, **REQUIRED.get(name, {})}))
            yield from walk(changed, kind, place)

    yield from walk(base(), Config, "")


def _at(config: Any, place: str) -> Any:
    for name in filter(None, place.split(".")):
        config = config[name]
    return config


def _set(config: ConfigDict, place: str, value: Any) -> None:
    *parents, last = place.split(".")
    part = _at(config, ".".join(parents))
    with part.ignore_type():
        part[last] = ConfigDict(value) if isinstance(value, dict) else value


def outcome(make: Any, workdir: pathlib.Path) -> str:
    """"accepted", "refused: ..." or "traceback: ..." of a config that `make` returns."""
    try:
        prepare(make(), epath.Path(workdir))
    except InputError as error:
        return f"refused: {error}"
    except Exception as error:  # What this file looks for.
        return f"traceback: {type(error).__name__}: {error}"
    return "accepted"


def with_text(field: Field, text: str) -> ConfigDict:
    """The config with an override."""
    return overridden(field.config, [f"--config.{field.place}={text}"])


def with_value(field: Field, value: Any) -> ConfigDict:
    """The config of a file that sets a field."""
    changed = field.config.to_dict()
    *parents, last = field.place.split(".")
    _at(changed, ".".join(parents))[last] = value
    return complete(changed)


def cases() -> Iterator[tuple[Field, Any, Any]]:
    """(field, value, function that makes the config) of every field and value."""
    for field in fields():
        for text in TEXTS:
            yield field, text, lambda f=field, t=text: with_text(f, t)
        for value in VALUES:
            yield field, value, lambda f=field, v=value: with_value(f, v)


def limit_memory() -> None:
    """An allocation beyond 8 GiB raises an error, in place of ending the machine's patience."""
    resource.setrlimit(resource.RLIMIT_DATA, (2**33, resource.getrlimit(resource.RLIMIT_DATA)[1]))


def main(only: str = "", every: str = "1") -> Counter:
    """Tries the cases, prints what is not refused, and counts the outcomes."""
    counts: Counter = Counter()
    limit_memory()
    with small_network.registered():
        for field, value, make in itertools.islice(cases(), 0, None, int(every)):
            if field.place.startswith(only):
                result = outcome(make, tiny.SCRATCH / "nothing_here")
                counts[result.partition(":")[0]] += 1
                if not result.startswith("refused"):
                    print(f"{field.cls.__name__:18} {field.place}={value!r:.60} {result[:300]!r}")
    print(dict(counts))
    return counts


if __name__ == "__main__":
    main(*sys.argv[1:])
