"""Writes docs/recipes.md from the config files.

    python -m configs
"""

import importlib
import pathlib
import re
from collections.abc import Iterator
from types import ModuleType

from configs.rows import Row

FOLDER = pathlib.Path(__file__).resolve().parent
PAGE = FOLDER.parent / "docs" / "recipes.md"
_HEAD = """# Recipes

Every config file, with what was published of it. None of the ImageNet rows was trained here: they
build at full size, and each kind of row takes a training step at a reduced one
(`tests/test_recipes.py`). FID is by number of sampling steps, of 50,000 samples, by the protocol
that the row's config names; numbers in parentheses are second-hand: a paper's as quoted elsewhere,
or a third party's. `--config.data.directory=DIR` names the dataset, see [data.md](data.md).

This page is written by `python -m configs`.
"""


def modules() -> dict[str, ModuleType]:
    """The config files that are recipes, by name."""
    found = {path.stem: importlib.import_module(f"configs.{path.stem}")
             for path in sorted(FOLDER.glob("*.py")) if not path.stem.startswith("__")}
    return {name: module for name, module in found.items() if hasattr(module, "get_config")}


def rows(module: ModuleType) -> dict[str, Row]:
    """The rows of a config file; one, that says nothing, where it has no table."""
    return getattr(module, "ROWS", {"": Row()})


def flag(file: str, row: str) -> str:
    """What chooses a row on the command line."""
    return f"--config=configs/{file}.py" + (f":{row}" if row else "")


def workdir(file: str, row: str) -> str:
    """Where a row is trained, unless one says otherwise; rows that start from it look there."""
    return "runs/" + re.sub(r"[^a-z0-9.-]+", "_", f"{file}_{row}".lower()).strip("_")


def commands(file: str, row: str, told: Row) -> tuple[str, ...]:
    """What runs a row."""
    trains = f"dmf train {flag(file, row)} --workdir={workdir(file, row)}"
    return told.commands or (trains,)


def _scores(row: Row) -> str:
    said = {n: f"{score}" for n, score in row.fid.items()}
    said |= {n: f"({score})" for n, score in row.quoted.items()}
    return ", ".join(f"{said[n]} at {n}" for n in sorted(said))


def _cells(file: str, module: ModuleType, name: str, row: Row) -> list[str]:
    if row.lacks:
        return [f"{name}: not here, {row.lacks}", row.paper, _scores(row), "", "", "", row.note]
    config = module.get_config(*[name] * bool(name))
    runs = [f"`{command}`" for command in commands(file, name, row)]
    steps = "" if row.commands else f"{config.run.steps:,}"
    return ["<br>".join(runs), row.paper, _scores(row), config.evaluation.protocol, steps,
            row.hardware, row.note]


def _section(file: str, module: ModuleType) -> Iterator[str]:
    """A file: what it says of itself, and its rows."""
    yield f"## [{file}](../configs/{file}.py)\n"
    yield module.__doc__.strip() + "\n"
    yield "| command | paper | FID | protocol | steps | hardware | notes |"
    yield "|---|---|---|---|---|---|---|"
    for name, row in rows(module).items():
        yield "| " + " | ".join(_cells(file, module, name, row)) + " |"
    yield ""


def page() -> str:
    """The whole page."""
    lines = [_HEAD]
    for file, module in modules().items():
        lines += _section(file, module)
    return "\n".join(lines).rstrip() + "\n"


if __name__ == "__main__":
    PAGE.write_text(page())
    print(PAGE)
