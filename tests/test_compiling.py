"""Compiling for devices that may not be there: what is counted, what is refused."""

import importlib.util
import json
import subprocess

import jax
import numpy as np
import pytest
import tiny

from configs import default
from dmf import chips, compiling
from dmf.typing import InputError

NOWHERE = {"data.name": "digits", "data.directory": "/nowhere", "init.checkpoint": "/nowhere"}
needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed"
)


def parameters(config) -> int:
    from dmf.components import network

    shapes = jax.eval_shape(network(config).init, jax.random.key(0))
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(shapes))


def test_bytes_of_a_device_follow_from_shapes_and_mesh():
    """Neither the data nor the checkpoint of the config is there."""
    config = tiny.flow_map(NOWHERE)
    found = compiling.compile_step(config, jax.devices())
    count = parameters(config)
    assert found.devices == 8
    assert found.mesh == {"slices": 1, "data": 8, "fsdp": 1, "tensor": 1}
    assert found.parameters == 4 * count
    # Moments and averages are spread over all devices, but for leaves too small to split.
    assert 4 * count / 8 < found.averages < 4 * count / 2
    assert found.optimizer == pytest.approx(2 * found.averages, rel=0.01)
    assert found.batch == 16 // 8 * (64 + 4)
    assert found.total > found.parameters + found.optimizer + found.averages + found.temporaries
    assert found.temporaries > 0
    assert found.memory is None
    assert found.fits is None


def test_parameters_are_split_where_the_mesh_says_so():
    whole, split = (compiling.compile_step(tiny.config({"mesh.fsdp": n}), jax.devices()[:2])
                    for n in (1, 2))
    assert split.parameters < 0.7 * whole.parameters


def test_a_teacher_that_is_not_there_has_the_size_of_the_network():
    config = tiny.flow_map({"teacher.checkpoint": "/nowhere"})
    config.objective = default.decoupled_mean_flow(default.teacher_guidance(1.5))
    found = compiling.compile_step(config, jax.devices()[:1])
    # The teacher has no log-variance head.
    assert found.frozen == found.parameters - 4 * 257


def test_the_command_tells_and_writes_what_was_found(tmp_path, capsys, monkeypatch):
    output = tmp_path / "found.json"
    arguments = ["compile", f"--config={tiny.CONFIG}", f"--output={output}"]
    assert tiny.dmf(*arguments) == 0
    printed = capsys.readouterr().out
    found = json.loads(output.read_text())
    assert f"| temporaries | {found['temporaries'] / 2**30:.2f} |" in printed
    assert "TFLOP a step" in printed
    assert found["batch_size"] == 16

    kind = jax.devices()[0].device_kind
    monkeypatch.setitem(chips.CHIPS, kind, chips.Chip(1e12, found["total"] - 1, 1e9))
    assert tiny.dmf(*arguments) == 1
    captured = capsys.readouterr()
    assert "does NOT fit" in captured.out
    assert captured.err.startswith(f"dmf compile: the step does not fit into {kind}; try")
    monkeypatch.setitem(chips.CHIPS, kind, chips.Chip(1e12, found["total"] + 1, 1e9))
    assert tiny.dmf(*arguments) == 0


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"data.batch_size": 15}, r"data.batch_size=15: it must be a multiple of 8"),
        ({"mesh.tensor": 3}, r"mesh=-1x1x3 .*must hold all 8 devices"),
        ({"model.learned_variance": False}, r"model.learned_variance=False: the weighting cauchy"),
    ],
)
def test_a_config_that_cannot_be_is_refused(overrides, message):
    with pytest.raises(InputError, match=message):
        compiling.compile_step(tiny.flow_map(overrides), jax.devices())


def on_topology(topology: str, *overrides: str) -> subprocess.CompletedProcess:
    """`dmf compile` for a TPU, in a process of its own."""
    arguments = [f"--config={tiny.CONFIG}", f"--topology={topology}", *overrides]
    return subprocess.run(tiny.command("compile", *arguments), check=False, capture_output=True,
                          text=True, cwd=tiny.ROOT)  # fmt: skip


@needs_libtpu
def test_for_a_tpu_that_is_not_there():
    ended = on_topology("v5e:2x4", "--config.mesh.fsdp=2", "--config.model.dtype=bfloat16")
    assert ended.returncode == 0, ended.stderr
    assert "8 x TPU v5 lite, slices 1 x data 4 x fsdp 2 x tensor 1, batch 16" in ended.stdout
    assert "| memory | 16: it fits |" in ended.stdout


@needs_libtpu
@pytest.mark.slow
def test_what_does_not_fit_is_told_by_how_much():
    large = ["depth=48", "width=2048", "input_size=8", "patch_size=1", "heads=4"]
    ended = on_topology("v5e:2x2", "--config.data.batch_size=1024",
                        *(f"--config.model.{field}" for field in large))  # fmt: skip
    assert ended.returncode == 1, ended.stderr
    assert "| memory | 16: it does NOT fit |" in ended.stdout
    assert "dmf compile: the step does not fit into TPU v5 lite; try" in ended.stderr


@needs_libtpu
def test_a_topology_that_cannot_be_is_refused_in_one_line():
    ended = on_topology("v9:2x2")
    assert ended.returncode == 2
    assert "dmf compile: topology=v9:2x2: give one as v5e:4x4" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_without_libtpu_it_says_what_to_install(monkeypatch):
    def absent(*args, **kwargs):
        raise RuntimeError("Unable to load libtpu\nand much more")

    monkeypatch.setattr(compiling.topologies, "get_topology_desc", absent)
    with pytest.raises(InputError, match=r"pip install 'dmf-jax\[tpu\]' \(Unable to load libtpu\)"):
        compiling.topology_devices("v5e:4x4")
