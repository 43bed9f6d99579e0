"""The mutants of the notebook."""

from benchmarks.mutant_lists.mutant import Mutant

MUTANTS = (
    Mutant(
        "notebook_field", "the notebook sets a field that no config has",
        "examples/digits.ipynb",
        r"\"run.checkpoint_every\": 0",
        r"\"run.save_every\": 0",
        ("tests/test_notebook.py",),
    ),
    Mutant(
        "notebook_config", "the notebook names a config that does not exist",
        "examples/digits.ipynb",
        "dmf:digits_dmf",
        "dmf:digits_flow_map",
        ("tests/test_notebook.py",),
    ),
    Mutant(
        "notebook_order", "a cell of the notebook was run again after a change",
        "examples/digits.ipynb",
        '"execution_count": 5,',
        '"execution_count": 15,',
        ("tests/test_notebook.py",),
    ),
)  # fmt: skip
