"""What is imported when: nothing heavy before it is needed, TensorFlow and PyTorch never."""

import json

import pytest
import small_network
import tiny

LOADED = "import json, sys; print(json.dumps(sorted({name.split('.')[0] for name in sys.modules})))"


def loaded_after(code: str) -> set[str]:
    done = tiny.process(code=f"{code}\n{LOADED}")
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout.splitlines()[-1]))


def test_the_package_and_its_help_are_light():
    help_text = (
        "import dmf, sys\n"
        "assert not {'jax', 'numpy', 'flax'} & set(sys.modules), 'import dmf is heavy'\n"
        "from dmf import __main__\n"
        "sys.argv = ['dmf', '--help']\n"
        "try: __main__.main()\n"
        "except SystemExit as end: assert end.code == 0"
    )
    assert not {"jax", "numpy", "flax", "absl"} & loaded_after(help_text)


@pytest.mark.slow
def test_a_run_needs_neither_tensorflow_nor_torch(tmp_path):
    poisoned = (
        "import importlib.machinery\n"
        "find = importlib.machinery.PathFinder.find_spec\n"
        "importlib.machinery.PathFinder.find_spec = lambda name, *rest: (\n"
        "    None if name in ('tensorflow', 'torch') else find(name, *rest))\n"
        "from dmf.cli import evaluate, sample, train\n"
        "from dmf.cli.exit_codes import run\n"
        f"config, run_there = '--config={small_network.CONFIG}', '{tmp_path}/run'\n"
        "made = '--checkpoint=' + run_there\n"
        "for verb, arguments in (\n"
        "    (train, [config, '--workdir=' + run_there, '--config.run.sample_every=4']),\n"
        "    (evaluate, [made, '--steps=1']),\n"
        f"    (sample, [made, '--output={tmp_path}/samples.png']),\n"
        "):\n"
        "    assert run(verb.main, 'dmf', arguments) == 0, verb\n"
        "import dmf.checkpoints.convert.tables.dit, dmf.experiments.evaluation_report"
    )
    loaded = loaded_after(poisoned)
    assert {"jax", "grain", "orbax", "tensorflow_datasets"} <= loaded
    assert not {"tensorflow", "torch"} & loaded
    assert (tmp_path / "samples.png").exists()


def test_every_public_name_is_where_the_package_says():
    import dmf

    for name in dir(dmf):
        assert getattr(dmf, name) is not None
