"""What a recipe says of itself: rows of a published table, and the configs that they stand for.

A config file with a table holds `ROWS`, by the name that chooses one: `--config=FILE:NAME`. The
name "" is the file without one. `python -m configs` writes docs/recipes.md from them.
"""

import copy
import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from dmf.typing import InputError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """A row of a table.

    Attributes:
      changes: fields of the file's config by dotted name, and their values here.
      fid: published FID by number of sampling steps, as the paper itself gives it; as text where a
        float would lose a digit.
      quoted: the same, as others quote or measured it.
      paper: where it stands.
      hardware: that it took, where it is published.
      note: what else is to be known.
      lacks: why there is no config of it; empty where there is one.
      commands: how it is run, where that is not training into a directory of its name.
    """

    changes: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    fid: Mapping[int, float | str] = dataclasses.field(default_factory=dict)
    quoted: Mapping[int, float | str] = dataclasses.field(default_factory=dict)
    paper: str = ""
    hardware: str = ""
    note: str = ""
    lacks: str = ""
    commands: tuple[str, ...] = ()


def chosen(config: ConfigDict, rows: Mapping[str, Row], name: str) -> ConfigDict:
    """The config of a row.

    Args:
      config: of the file, which is changed.
      rows: the file's table.
      name: of the row.

    Raises:
      InputError: there is no such row, or no config of it.
      KeyError: a row changes a field that the config does not have.
    """
    if name not in rows:
        built = [known for known, row in rows.items() if not row.lacks]
        raise InputError(f"--config=FILE:{name}: choose one of {' '.join(built)}")
    if rows[name].lacks:
        raise InputError(f"--config=FILE:{name}: {rows[name].lacks}")
    for field, value in rows[name].changes.items():
        *parents, last = field.split(".")
        functools.reduce(ConfigDict.__getitem__, parents, config)[last] = copy.deepcopy(value)
    return config
