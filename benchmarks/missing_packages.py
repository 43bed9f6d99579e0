"""Names, in one line, the packages that dmf and its benchmarks need and this interpreter lacks.

    python -m benchmarks.missing_packages

It needs no packages itself. The exit code is 1 if some are missing. Versions are not compared.
"""

import ast
import re
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

SETUP = Path(__file__).resolve().parent.parent / "setup.py"


def required(setup: Path = SETUP) -> list[str]:
    """The requirements of `install_requires` and of the extra `digits`, with their versions."""
    return sorted(set(_requirements(ast.parse(setup.read_text()))))


def _requirements(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        is_digits = isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "digits"
        is_required = isinstance(node, ast.keyword) and node.arg == "install_requires"
        if is_digits or is_required:
            yield from ast.literal_eval(node.value)


def missing(requirements: list[str]) -> list[str]:
    """Those requirements of which no version is installed."""
    return [each for each in requirements if not _is_installed(re.split(r"[\[>]", each)[0])]


def _is_installed(name: str) -> bool:
    try:
        metadata.distribution(name)
    except metadata.PackageNotFoundError:
        return False
    return True


if __name__ == "__main__":
    absent = missing(required())
    if absent:
        names = " ".join(f"'{each}'" for each in absent)
        sys.exit(f"missing, so that parts will fail: {sys.executable} -m pip install {names}")
