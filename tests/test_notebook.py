"""The notebook: its stored outputs are those of one run, and it still runs."""

import ast
import json
import os
import re
import subprocess
import sys

import pytest
import tiny
from absl import flags as absl_flags

from dmf.cli import flags
from dmf.default_config import get_config
from dmf.runtime import progress

FILE = tiny.ROOT / "examples" / "digits.ipynb"
NOTEBOOK = json.loads(FILE.read_text())
CODE = [cell for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]
SOURCES = ["".join(cell["source"]) for cell in CODE]
TREES = [ast.parse(source) for source in SOURCES]
# The Fréchet distance of (sampler, steps); other machines and versions round otherwise.
RANGES = {
    ("model, euler", 1): (4.5, 11.0), ("model, euler", 4): (0.8, 2.2),
    ("model, heun", 4): (0.4, 1.4), ("untrained", 1): (4.5, 14.0),
    ("map, euler", 1): (0.5, 1.8), ("map, euler", 4): (0.25, 0.8),
}  # fmt: skip
SHORTER = {'"run.steps": 600': '"run.steps": 60, "optimizer.warmup_steps": 10',
           '"run.steps": 300': '"run.steps": 30, "optimizer.warmup_steps": 10',
           "count=2000": "count=200"}  # fmt: skip
# On one device, where little is computed.
FAST_COMPILATION = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
# Runs the cells of stdin as Jupyter does: in one namespace, while an event loop is running.
KERNEL = """
import asyncio, json, sys

async def run(cells):
    names = {"__name__": "__main__"}
    for number, cell in enumerate(cells, 1):
        exec(compile(cell, f"cell {number}", "exec"), names)
        print(f"cell {number} of {len(cells)} ran", flush=True)

asyncio.run(run(json.load(sys.stdin)))
"""


def printed(cells) -> str:
    """What code cells printed."""
    outputs = [output for cell in cells for output in cell["outputs"]]
    return "".join("".join(output.get("text", "")) for output in outputs)


def distances(text: str) -> dict[tuple[str, int], float]:
    """The Fréchet distances of the printed table that `RANGES` names."""
    steps = re.search(r"^ {13}((?: +\d+)+)$", text, re.M)[1].split()
    rows = {name: re.search(rf"^{re.escape(f'{name:<13}')}(.+)$", text, re.M)[1]
            for name, _ in RANGES}  # fmt: skip
    places = {key: 5 * steps.index(str(key[1])) for key in RANGES}
    return {key: float(rows[key[0]][place : place + 5]) for key, place in places.items()}


def test_every_cell_was_run_in_order():
    assert (NOTEBOOK["nbformat"], NOTEBOOK["nbformat_minor"]) == (4, 5)
    ids = [cell["id"] for cell in NOTEBOOK["cells"]]
    assert len(set(ids)) == len(ids)
    assert [cell["execution_count"] for cell in CODE] == list(range(1, len(CODE) + 1))
    kinds = [output["output_type"] for cell in CODE for output in cell["outputs"]]
    assert set(kinds) == {"stream", "display_data"}  # no error
    figures = ["image/png" in output.get("data", {}) for cell in CODE for output in cell["outputs"]]
    assert sum(figures) == sum(source.count("plt.show()") + source.count("\nshow(")
                               for source in SOURCES) - 1  # one is in the definition of `show`
    assert FILE.stat().st_size < 400_000


def test_no_folder_of_a_machine_is_named():
    texts = ["".join(cell["source"]) for cell in NOTEBOOK["cells"]] + [printed(CODE)]
    folder = re.compile(r"/(?:content|home|mnt|opt|root|tmp|usr|Users|var|work)\b|\b[A-Z]:\\")
    assert not [text for text in texts if folder.search(text)]


def test_every_config_and_field_exists():
    strings = {node.value for tree in TREES for node in ast.walk(tree)
               if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    configs = {text.removeprefix("dmf:") for text in strings if text.startswith("dmf:")}
    assert configs == {"digits_sit", "digits_dmf"}
    assert all((tiny.ROOT / "configs" / f"{name}.py").exists() for name in configs)
    fields = {text for text in strings if re.fullmatch(r"[a-z]+(\.(?!json)[a-z_]+)+", text)}
    fields -= {"figure.facecolor", "savefig.facecolor", "font.size"}  # of matplotlib
    assert len(fields) >= 7 and fields <= flattened(get_config().to_dict())


def flattened(part, place=""):
    """The dotted names of the fields of a config."""
    if not isinstance(part, dict):
        return {place}
    return {name for key, value in part.items()
            for name in flattened(value, f"{place}.{key}" if place else key)}


def test_links_lead_somewhere():
    text = "".join("".join(cell["source"]) for cell in NOTEBOOK["cells"])
    targets = [link for link in re.findall(r"\]\(([^)]+)\)", text) if "://" not in link]
    assert len(targets) >= 3 and all((FILE.parent / target).exists() for target in targets)


def test_the_stored_distances_are_in_their_ranges():
    for key, distance in distances(printed(CODE)).items():
        low, high = RANGES[key]
        assert low < distance < high, key


@pytest.mark.slow
def test_it_runs_from_top_to_bottom(tmp_path):
    """With a tenth of its training: the stored outputs are those of the whole."""
    environment = os.environ | {"PYTHONPATH": str(tiny.ROOT), "MPLBACKEND": "agg",
                                "TMPDIR": str(tmp_path), "XLA_FLAGS": FAST_COMPILATION}
    cells = "\0".join(SOURCES)
    for whole, part in SHORTER.items():
        assert whole in cells
        cells = cells.replace(whole, part)
    done = subprocess.run([sys.executable, "-c", KERNEL], input=json.dumps(cells.split("\0")),
                          text=True, cwd=tmp_path, env=environment, capture_output=True,
                          check=False)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert f"cell {len(CODE)} of {len(CODE)} ran" in done.stdout
    assert all(distance > 0 for distance in distances(done.stdout).values())


def test_a_call_from_python_keeps_the_verbosity(monkeypatch):
    """The notebook is quiet; `dmf.evaluate` reads its arguments as flags."""
    monkeypatch.setattr(progress._SCREEN, "verbosity", progress.Verbosity.QUIET)
    flags.parse("evaluate", [], absl_flags.FlagValues(), "")
    assert progress.verbosity() is progress.Verbosity.QUIET
