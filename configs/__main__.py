"""Writes docs/recipes.md from the config files.

    python -m configs
"""

import argparse
import importlib
import pathlib
import re
from collections.abc import Iterator, Sequence
from types import ModuleType

from configs.rows import Row

FOLDER = pathlib.Path(__file__).resolve().parent
PAGE = FOLDER.parent / "docs" / "recipes.md"
_HEAD = """# Recipes

Every config file, with its published scores. None of the ImageNet rows was trained here: they build
at full size, and each kind of row takes a training step at a reduced size
(`tests/test_recipes.py`). FID is given by number of sampling steps, for 50,000 samples and the
protocol of the row's config. Numbers in parentheses are second-hand: quoted elsewhere from a paper,
or measured by a third party. `--config.data.directory=DIR` names the dataset, see
[data.md](data.md).

This page is written by `python -m configs`.
"""


def modules() -> dict[str, ModuleType]:
    """The config files that are recipes, by name."""
    files = {path.stem: importlib.import_module(f"configs.{path.stem}")
             for path in sorted(FOLDER.glob("*.py")) if not path.stem.startswith("__")}
    return {name: module for name, module in files.items() if hasattr(module, "get_config")}


def rows(module: ModuleType) -> dict[str, Row]:
    """The rows of a config file; one empty row if it has no table."""
    return getattr(module, "ROWS", {"": Row()})


def flag(file: str, row: str) -> str:
    """The flag that chooses a row on the command line."""
    return f"--config=configs/{file}.py" + (f":{row}" if row else "")


def workdir(file: str, row: str) -> str:
    """The workdir of a row in the commands of docs/recipes.md, from which other rows start."""
    return "runs/" + re.sub(r"[^a-z0-9.-]+", "_", f"{file}_{row}".lower()).strip("_")


def commands(file: str, name: str, row: Row) -> tuple[str, ...]:
    """The commands that run a row."""
    train = f"dmf train {flag(file, name)} --workdir={workdir(file, name)}"
    return row.commands or (train,)


def _scores(row: Row) -> str:
    scores = {n: f"{score}" for n, score in row.fid.items()}
    scores |= {n: f"({score})" for n, score in row.quoted.items()}
    return ", ".join(f"{scores[n]} at {n}" for n in sorted(scores))


def _cells(file: str, module: ModuleType, name: str, row: Row) -> list[str]:
    if row.lacks:
        return [f"{name}: not here, {row.lacks}", row.paper, _scores(row), "", "", "", row.note]
    config = module.get_config(*[name] * bool(name))
    runs = [f"`{command}`" for command in commands(file, name, row)]
    steps = "" if row.commands else f"{config.run.steps:,}"
    return ["<br>".join(runs), row.paper, _scores(row), config.evaluation.protocol, steps,
            row.hardware, row.note]


def _section(file: str, module: ModuleType) -> Iterator[str]:
    """Yields the lines about a file: its docstring and its rows."""
    yield f"## [{file}](../configs/{file}.py)\n"
    yield module.__doc__.strip() + "\n"
    yield "| command | paper | FID | protocol | steps | hardware | notes |"
    yield "|---|---|---|---|---|---|---|"
    for name, row in rows(module).items():
        yield "| " + " | ".join(_cells(file, module, name, row)) + " |"
    yield ""


def page() -> str:
    """The text of docs/recipes.md."""
    lines = [_HEAD]
    for file, module in modules().items():
        lines += _section(file, module)
    return "\n".join(lines).rstrip() + "\n"


def main(arguments: Sequence[str] | None = None) -> None:
    """Writes the page; `--help` says so and writes nothing."""
    argparse.ArgumentParser(prog="python -m configs", description=__doc__.splitlines()[0]
                            ).parse_args(arguments)
    PAGE.write_text(page())
    print(PAGE)


if __name__ == "__main__":
    main()
