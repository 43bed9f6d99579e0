"""The layers: a module imports only from layers below its own, and some names stay in few files."""

import ast
import pathlib

import pytest
import tiny

PACKAGE = tiny.ROOT / "dmf"
# From the bottom up. Modules of one group may import each other, two groups of a layer may not.
LAYERS = (
    ({"typing", "sharding", "defaults", "chips"},),
    (
        {"flow", "times"}, {"bins"}, {"scaling"}, {"kernels"}, {"logs", "hosts"}, {"intact"},
        {"collectives"}, {"files"}, {"sweeping"}, {"figures"},
    ),
    (
        {"objectives", "terms", "draws", "work", "identity", "tangents", "guidance", "weighting",
         "samplers"},
        {"models", "encoders"},
    ),
    ({"data"}, {"convert"}, {"metrics"}, {"images"}, {"features"}, {"alignment"}, {"launching"}),
    (
        {"state", "optimizer", "skipping", "checkpoint"}, {"freezing"}, {"watch"}, {"report"},
        {"card"}, {"protocols"}, {"slurm"},
    ),
    ({"components"}, {"references", "statistics"}, {"runs", "summary", "page"}),
    ({"loading"},),
    ({"build"},),
    ({"generation"},),
    ({"surveys"},),
    ({"evaluator", "evaluation"}, {"outputs"}),
    ({"crop_surveys", "shards"},),
    ({"preparation"},),
    ({"stablehlo"},),
    ({"exports"}, {"monitoring"}),
    ({"step"},),
    ({"training"}, {"compiling"}),
    ({"cli"},),
    ({"__main__", "__init__"},),
)
PLACE = {
    name: (height, group)
    for height, layer in enumerate(LAYERS)
    for group, names in enumerate(layer)
    for name in names
}
FILES = sorted(PACKAGE.rglob("*.py"))
READERS_OF_CONFIGS = {
    "defaults", "components", "loading", "build", "generation", "evaluator", "evaluation",
    "monitoring", "stablehlo", "exports", "training", "compiling", "cli",
}
MAKERS_OF_NETWORKS = {"models", "encoders"}


def unit(path: pathlib.Path) -> str:
    """The module or package directly below dmf that a file belongs to."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported(path: pathlib.Path) -> set[str]:
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
    return any(
        name == module or name.startswith(f"{module}.")
        for name in imported(path) for module in modules
    )


def name_of(path: pathlib.Path) -> str:
    return str(path.relative_to(PACKAGE))


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_imports_go_downwards(path):
    mine = unit(path)
    assert mine in PLACE, f"{mine} has no layer"
    height, group = PLACE[mine]
    for name in imported(path):
        first, _, rest = name.partition(".")
        if first != "dmf":
            continue
        other = rest.split(".")[0]
        assert other in PLACE, f"{path} imports {name}, which has no layer"
        below = PLACE[other][0] < height
        assert below or PLACE[other] == (height, group), f"{mine} must not import {other}"


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_only_a_few_read_configs(path):
    if imports(path, "ml_collections"):
        assert unit(path) in READERS_OF_CONFIGS


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_only_networks_are_flax_modules(path):
    if imports(path, "flax.linen"):
        assert unit(path) in MAKERS_OF_NETWORKS


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_nobody_imports_tensorflow_torch_or_private_jax(path):
    assert not imports(path, "tensorflow", "torch", "jax._src", "jax.interpreters")
    assert not imports(path, "clu.metric_writers", "clu.periodic_actions")


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_a_file_is_one_idea_of_at_most_400_lines(path):
    text = path.read_text()
    assert len(text.splitlines()) <= 400
    assert ast.get_docstring(ast.parse(text)), "a file says what it holds"
