"""Rows of published tables, and the configs that reproduce them.

A config file with a table has `ROWS`, a dictionary of rows by name; `--config=FILE:NAME` chooses a
row. The name "" is the file without a name. `python -m configs` writes docs/recipes.md from them.
"""

import copy
import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from dmf.errors import InputError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """A row of a table.

    Attributes:
      changes: fields of the file's config that differ in this row, by dotted name.
      fid: FID in the paper itself by number of sampling steps; as text where a float would lose a
        digit.
      quoted: FID that others quote or measured, by number of sampling steps.
      paper: source of the row.
      hardware: published hardware of the run.
      note: further remarks.
      lacks: reason why there is no config of the row; empty if there is one.
      commands: commands that run the row, unless it is trained into the workdir of its name.
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
      config: config of the file, which is changed.
      rows: rows of the file.
      name: name of the row.

    Raises:
      InputError: there is no such row, or no config of it.
      KeyError: a row changes a field that the config does not have.
    """
    if name not in rows:
        built = [known for known, row in rows.items() if not row.lacks]
        raise InputError("--config", f"FILE:{name}", f"choose one of {' '.join(built)}")
    if rows[name].lacks:
        raise InputError("--config", f"FILE:{name}", f"{rows[name].lacks}")
    for field, value in rows[name].changes.items():
        *parents, last = field.split(".")
        functools.reduce(ConfigDict.__getitem__, parents, config)[last] = copy.deepcopy(value)
    return config
