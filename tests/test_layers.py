"""The rooms of the package: imports go downwards only, and some libraries stay in few rooms."""

import ast
import pathlib
import statistics

import pytest
import tiny

PACKAGE = tiny.ROOT / "dmf"
# From the top down. A room imports from the rooms below its own; rooms on one line do not import
# each other.
ROOMS = (
    ("__main__", "__init__"),
    ("cli",),
    ("default_config",),
    ("experiments",),
    ("training",),
    ("evaluation",),
    ("checkpoints",),
    ("sampling",),
    ("data",),
    ("models", "objectives"),
    ("runtime",),
    ("registry",),
    ("types",),
    ("errors",),
)
HEIGHT = {room: -height for height, rooms in enumerate(ROOMS) for room in rooms}
FILES = sorted(PACKAGE.rglob("*.py"))
# Who may see a ConfigDict: what turns a config into objects, and what stores one.
CONFIG_READERS = (
    "default_config.py", "*/build.py", "checkpoints/load.py", "training/loop.py",
    "training/callbacks.py", "training/prepared_run.py", "training/initial_checkpoint.py",
    "training/compile.py", "training/preview.py",
    "evaluation/evaluator.py", "checkpoints/export_parts.py",
    "checkpoints/guide.py", "cli/*.py",
)  # fmt: skip
NETWORK_ROOM = "models"


def room_of(path: pathlib.Path) -> str:
    """The room that a file belongs to."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_modules(path: pathlib.Path) -> set[str]:
    """Every module that a file imports, at its top or in a function, as dotted names."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def imports(path: pathlib.Path, *modules: str) -> bool:
    """Whether a file imports one of some modules, or something below one."""
    return any(
        name == module or name.startswith(f"{module}.")
        for name in imported_modules(path) for module in modules
    )


def name_of(path: pathlib.Path) -> str:
    return str(path.relative_to(PACKAGE))


def test_imports_go_downwards():
    for path in FILES:
        room = room_of(path)
        assert room in HEIGHT, f"{name_of(path)}: the list has no such room"
        for name in imported_modules(path):
            package, _, rest = name.partition(".")
            other = rest.split(".")[0]
            if package != "dmf" or not other:
                continue
            assert other in HEIGHT, f"{name_of(path)} imports {name}, which is in no room"
            downwards = HEIGHT[other] < HEIGHT[room] or other == room
            assert downwards, f"{name_of(path)}: {room} must not import {other} ({name})"


def test_every_room_says_what_it_holds():
    for path in PACKAGE.rglob("__init__.py"):
        text = ast.get_docstring(ast.parse(path.read_text()))
        assert text and len(text.split()) > 15, f"{name_of(path)}: what does it hold, and for whom?"


def test_the_plan_is_seen_at_a_glance():
    inside = [path for path in PACKAGE.iterdir() if path.name != "__pycache__"]
    assert sum(path.is_dir() for path in inside) <= 11
    assert sum(path.suffix == ".py" for path in inside) <= 6


def test_only_builders_know_configs():
    for path in FILES:
        if imports(path, "ml_collections"):
            relative = path.relative_to(PACKAGE)
            assert any(relative.match(pattern) for pattern in CONFIG_READERS), name_of(path)


def test_only_networks_are_flax_modules():
    for path in FILES:
        if imports(path, "flax.linen", "flax.nnx"):
            assert room_of(path) == NETWORK_ROOM, name_of(path)


def test_nobody_imports_tensorflow_torch_or_private_jax():
    for path in FILES:
        assert not imports(path, "tensorflow", "torch", "jax._src", "jax.interpreters"), path
        assert not imports(path, "clu.metric_writers", "clu.periodic_actions"), path


def test_a_file_is_one_idea_of_at_most_400_lines():
    for path in FILES:
        text = path.read_text()
        assert len(text.splitlines()) <= 400, name_of(path)
        assert ast.get_docstring(ast.parse(text)), f"{name_of(path)}: what does it hold?"


def test_functions_are_short():
    lengths = {
        f"{name_of(path)}:{node.name}": node.end_lineno - node.lineno + 1
        for path in FILES
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef)
    }
    assert statistics.median(lengths.values()) <= 12
    long = {name: length for name, length in lengths.items() if length > 40}
    assert len(long) <= 18, long


@pytest.mark.parametrize("start", ["types", "runtime", "objectives"])
def test_lower_rooms_run_without_the_upper_ones(start):
    """A room can be imported without those above it."""
    above = [room for room in HEIGHT if HEIGHT[room] > HEIGHT[start] and "__" not in room]
    code = (f"import sys, dmf.{start}; "
            f"bad = [m for m in sys.modules if m.split('.')[:1] == ['dmf'] and "
            f"m.split('.')[1:2] and m.split('.')[1] in {above!r}]; assert not bad, bad")
    result = tiny.process(code=code)
    assert result.returncode == 0, result.stderr
