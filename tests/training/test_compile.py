"""Compiling ahead of time: the numbers of the report, and what is refused."""

import importlib.util
import json
import re
import subprocess

import jax
import numpy as np
import pytest
import tiny

from configs import default
from dmf.errors import InputError
from dmf.models.build import network
from dmf.objectives import DecoupledMeanFlow, TeacherGuidance
from dmf.runtime import device_specs, sharding
from dmf.training import compile, compile_report
from dmf.training.hlo_collectives import Collective

NOWHERE = {"data.name": "digits", "data.directory": "/nowhere", "init.checkpoint": "/nowhere"}
needs_cuda = pytest.mark.skipif(
    importlib.util.find_spec("jax_cuda13_plugin") is None, reason="the extra cuda is not installed"
)
needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed"
)


def parameters(config) -> int:
    shapes = jax.eval_shape(network(config.model).init, jax.random.key(0))
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(shapes))


def test_bytes_of_a_device_follow_from_shapes_and_mesh():
    """Neither the data nor the checkpoint of the config is there."""
    config = tiny.config(NOWHERE)
    compiled = compile.compile_step(config, jax.devices())
    count = parameters(config)
    assert compiled.devices == 8
    assert compiled.mesh == {"slices": 1, "data": 8, "fsdp": 1, "tensor": 1}
    assert compiled.parameters == 4 * count
    # Moments and EMA parameters are sharded over all devices, but for leaves too small to split.
    assert 4 * count / 8 < compiled.ema_params < 4 * count / 2
    assert compiled.opt_state == pytest.approx(2 * compiled.ema_params, rel=0.01)
    assert compiled.batch == 16 // 8 * (64 + 4)
    assert compiled.total > (
        compiled.parameters + compiled.opt_state + compiled.ema_params + compiled.temporaries
    )
    assert compiled.temporaries > 0
    assert compiled.memory is None
    assert compiled.fits is None


@pytest.mark.slow
def test_parameters_are_split_where_the_mesh_says_so():
    whole, split = (compile.compile_step(tiny.config({"mesh.fsdp": n}), jax.devices()[:2])
                    for n in (1, 2))
    assert split.parameters < 0.7 * whole.parameters


@pytest.mark.slow
def test_a_teacher_that_is_not_there_has_the_size_of_the_network():
    config = tiny.flow_map({"teacher.checkpoint": "/nowhere"})
    config.objective = default.component(DecoupledMeanFlow(guidance=TeacherGuidance(scale=1.5)))
    compiled = compile.compile_step(config, jax.devices()[:1])
    # The teacher has no log-variance head.
    assert compiled.frozen == compiled.parameters - 4 * 257


def test_the_command_prints_and_writes_the_report(tmp_path, capsys, monkeypatch):
    output = tmp_path / "step.json"
    arguments = ["compile", f"--config={tiny.CONFIG}", f"--output={output}"]
    assert tiny.dmf(*arguments) == 0
    report = capsys.readouterr().out
    numbers = json.loads(output.read_text())
    assert f"| temporaries | {numbers['temporaries'] / 2**30:.2f} |" in report
    assert "TFLOP per step" in report
    assert numbers["batch_size"] == 16

    kind = jax.devices()[0].device_kind
    specs = device_specs.DeviceSpec(1e12, numbers["total"] - 1, 1e9)
    monkeypatch.setitem(device_specs.DEVICE_SPECS, kind, specs)
    assert tiny.dmf(*arguments) == 1
    captured = capsys.readouterr()
    assert "the step does not fit |" in captured.out
    assert captured.err.startswith(f"dmf compile: the step does not fit into {kind}; try")
    specs = device_specs.DeviceSpec(1e12, numbers["total"] + 1, 1e9)
    monkeypatch.setitem(device_specs.DEVICE_SPECS, kind, specs)
    assert tiny.dmf(*arguments) == 0


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"data.batch_size": 15}, r"data.batch_size=15: it must be a multiple of 8"),
        ({"mesh.tensor": 3}, r"mesh=-1x1x3 .*must hold all 8 devices"),
        ({"model.learned_variance": False}, r"model.learned_variance=False: the weighting"),
    ],
)
def test_a_config_that_cannot_be_is_refused(overrides, message):
    with pytest.raises(InputError, match=message):
        compile.compile_step(tiny.flow_map(overrides), jax.devices())


@pytest.mark.slow
@pytest.mark.parametrize("slices", [1, 2])
def test_only_reported_slices_are_joined_by_the_slower_network(monkeypatch, slices):
    """A mesh may divide a slice in two, whose links still join its devices."""
    monkeypatch.setattr(sharding, "_slice_of", lambda device: device.id * slices // 8)
    kind = jax.devices()[0].device_kind
    monkeypatch.setitem(device_specs.DEVICE_SPECS, kind,
                        device_specs.DeviceSpec(1e12, 2**40, 1e9))
    compiled = compile.compile_step(tiny.config({"mesh.slices": 2}), jax.devices())
    assert (compiled.mesh["slices"], compiled.slices) == (2, slices)
    assert any(c.between_slices for c in compiled.collectives) == (slices == 2)
    assert (compile_report.estimate(compiled, 0.4, 3e9).between_slices > 0) == (slices == 2)
    assert ("3 GB/s between slices" in compile_report.report(compiled)) == (slices == 2)


def test_a_loop_of_unknown_length_gives_lower_bounds():
    compiled = compile.CompiledStep(
        "TPU v5 lite", 8, 1, {"slices": 1, "data": 8, "fsdp": 1, "tensor": 1}, 8, 0, 0, 0, 0, 0, 0,
        0, 0, 2**40, 1e12, [Collective("all-reduce", 8, False, 3, 2**30)], 0.0, 0.0,
    )  # fmt: skip
    assert "| all-reduce | 8 | 3 | 1.750 |" in compile_report.report(compiled)
    assert "a loop" not in compile_report.report(compiled)
    open_ended = compiled._replace(collectives=[compiled.collectives[0]._replace(known=False)])
    assert "| all-reduce | 8 | at least 3 | at least 1.750 |" in compile_report.report(open_ended)
    assert "\nat least: some of them are in a loop of unknown " in compile_report.report(open_ended)


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--slices=2", "--slices=2: give --topology too"),
        ("--slices=0", "--slices=0: give --topology too"),
        ("--mfu=0", "--mfu=0.0: give more than 0, and at most 1"),
        ("--mfu=1.5", "--mfu=1.5: give more than 0, and at most 1"),
        ("--mfu=nan", "--mfu=nan: give more than 0, and at most 1"),
        ("--slice-bandwidth=0", "--slice-bandwidth=0.0: give more than 0, in GB/s"),
        ("--slice-bandwidth=-3", "--slice-bandwidth=-3.0: give more than 0, in GB/s"),
    ],
)
def test_flags_that_cannot_be_are_refused(capsys, flag, message):
    assert tiny.dmf("compile", f"--config={tiny.CONFIG}", flag) == 2
    assert capsys.readouterr().err.startswith(f"dmf compile: {message}")


@pytest.mark.parametrize(
    ("size", "expected"), [("15.75G", 15.75 * 2**30), ("512.50M", 512.5 * 2**20), ("7K", 7 * 2**10)]
)
def test_the_size_of_what_is_refused_is_read(monkeypatch, size, expected):
    message = ("RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO "
               f"temporaries ({size}) exceeds available HBM (15.75G).")  # fmt: skip

    def refuse(*args, **kwargs):
        raise jax.errors.JaxRuntimeError(message)

    lowered = jax.jit(lambda x: x).lower(1.0)
    monkeypatch.setattr(type(lowered), "compile", refuse)
    program = compile._compile(lowered, 2**10)
    # More than what there is, also where both are rounded to the same.
    assert expected < program.total < expected + 2
    assert program.temporaries == program.total - 2**10
    assert compile._compile(lowered, 2**40).temporaries == 0


def test_of_a_gpu_a_part_is_available():
    card = device_specs.DEVICE_SPECS["NVIDIA H100 80GB HBM3"].memory
    compiled = compile.CompiledStep(
        "NVIDIA H100 80GB HBM3", 8, 1, {"slices": 1, "data": 8, "fsdp": 1, "tensor": 1}, 8, 0, 0, 0,
        0, 0, 0, 0, 2**30, 0.75 * card, 1e12, [], 0.0, 0.0,
    )  # fmt: skip
    line = "| available | 59.33 of 79.11 (XLA_CLIENT_MEM_FRACTION): the step fits |"
    assert line in compile_report.report(compiled)


def on_topology(topology: str, *overrides: str, config=tiny.CONFIG) -> subprocess.CompletedProcess:
    """`dmf compile` for devices that are not attached, in a process of its own."""
    arguments = [f"--config={config}", f"--topology={topology}", *overrides]
    return subprocess.run(tiny.command("compile", *arguments), check=False, capture_output=True,
                          text=True, cwd=tiny.ROOT)  # fmt: skip


@needs_libtpu
@pytest.mark.slow
def test_for_a_tpu_that_is_not_there():
    ended = on_topology("v5e:2x4", "--config.mesh.fsdp=2", "--config.model.dtype=bfloat16")
    assert ended.returncode == 0, ended.stderr
    mesh = "mesh slices 1 x data 4 x fsdp 2 x tensor 1"
    assert f"8 x TPU v5 lite; {mesh}; global batch 16" in ended.stdout
    assert "| available | 15.75: the step fits |" in ended.stdout


@needs_cuda
@pytest.mark.slow
def test_for_gpus_that_are_not_there(monkeypatch):
    """With neither a GPU nor a driver, and although JAX may use a GPU."""
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    ended = on_topology(
        "a100:2x2", "--config.model.dtype=bfloat16", "--config.model.attention=flash"
    )
    assert ended.returncode == 0, ended.stderr
    assert "4 x NVIDIA A100-SXM4-80GB; mesh slices 2 x data 2 x fsdp 1 x tensor 1;" in ended.stdout
    assert "59.44 of 79.26 (XLA_CLIENT_MEM_FRACTION): the step fits |" in ended.stdout
    assert "| all-reduce | 2 between slices |" in ended.stdout


@needs_cuda
@pytest.mark.slow
def test_a_full_size_config_for_a_node_of_gpus():
    ended = on_topology("h100:8", config="configs/dmf_xl2_256.py")
    assert ended.returncode == 0, ended.stderr
    assert "8 x NVIDIA H100 80GB HBM3; mesh slices 1 x data 8 x fsdp 1 x " in ended.stdout
    # All of the state is updated in place, and activations of 32 samples are in the temporaries.
    size = dict(re.findall(r"\| (\w+) \| ([\d.]+)", ended.stdout))
    assert size["parameters"] == "2.51"
    state = sum(float(size[name]) for name in ("parameters", "opt_state", "ema_params"))
    updated = re.search(r"([\d.]+) GiB of state updated in place", ended.stdout)
    assert float(updated[1]) == pytest.approx(state, abs=0.02)  # rounded numbers
    assert 5 < float(size["temporaries"]) < 12


@needs_libtpu
@pytest.mark.slow
def test_what_does_not_fit_is_told_by_how_much():
    large = ["depth=48", "width=2048", "input_size=8", "patch_size=1", "heads=4"]
    ended = on_topology("v5e:2x2", "--config.data.batch_size=1024",
                        *(f"--config.model.{field}" for field in large))  # fmt: skip
    assert ended.returncode == 1, ended.stderr
    assert "| available | 15.75: the step does not fit |" in ended.stdout
    assert "dmf compile: the step does not fit into TPU v5 lite; try" in ended.stderr


REFUSED = """
import json
import jax
import jax.numpy as jnp
from dmf.runtime import device_specs
from dmf.training import compile

messages = {}
for name in ("v3:2x2", "v5e:2x2", "v5p:2x2x1", "v6e:2x2"):
    (device, *_) = compile.topology_devices(name)
    sharding = jax.sharding.SingleDeviceSharding(device)

    memory = device_specs.DEVICE_SPECS[device.device_kind].memory

    def sort(updated, rows, count=round(memory / 2**12 / 2)):
        return updated + 1, jnp.sort(jnp.broadcast_to(rows, (count, 1024)), axis=0).sum(0)

    shapes = [jax.ShapeDtypeStruct(shape, "f4", sharding=sharding)
              for shape in ((2**18, 1024), (1024,))]
    lowered = jax.jit(sort, donate_argnums=0).lower(*shapes)
    try:
        lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        messages[device.device_kind] = str(error)
print(json.dumps(messages))
"""


@pytest.mark.slow
@needs_libtpu
def test_the_memory_of_tpus_is_what_libtpu_leaves_and_arguments_are_in_what_it_refuses():
    """Of a program that sorts as much as there is, into as much again, beside 1 GiB of what it
    updates in place."""
    ended = tiny.process(code=REFUSED)
    assert ended.returncode == 0, ended.stderr
    messages = json.loads(ended.stdout.splitlines()[-1])
    assert set(messages) == {"TPU v3", "TPU v5 lite", "TPU v5", "TPU v6 lite"}
    for kind, message in messages.items():
        memory = device_specs.DEVICE_SPECS[kind].memory / 2**30
        # Versions of libtpu differ by a hundredth.
        available = re.search(r"exceeds available HBM \(([\d.]+)G\)", message)
        assert float(available[1]) == pytest.approx(memory, abs=0.015)
        assert compile._refused_bytes(message) / 2**30 == pytest.approx(memory + 1, abs=0.02)


@pytest.mark.slow
@needs_libtpu
def test_a_topology_that_cannot_be_is_refused_in_one_line():
    ended = on_topology("v9:2x2")
    assert ended.returncode == 2
    assert "dmf compile: topology=v9:2x2: give one as v5e:4x4" in ended.stderr
    assert "Traceback" not in ended.stderr


TABLE = """
import json
from benchmarks import scaling

tables = {}
for devices, name in (("tpu", "scaling"), ("gpu", "scaling_gpu")):
    results = json.load(open(f"benchmarks/results/{name}.json"))
    cases = list(scaling.cases(results, devices))
    tables[name] = {
        "results": sorted(results),
        "cases": sorted(case.key for case in cases),
        "rows": [scaling.row(case, results[case.key]) for case in cases],
        "error": scaling.row(cases[0], {"error": "why"}),
    }
print(json.dumps(tables))
"""


def test_the_script_makes_the_table_of_what_fits():
    """The results and the documentation have all rows of the stored results, and no others."""
    ended = tiny.process(code=TABLE)
    assert ended.returncode == 0, ended.stderr
    for name, table in json.loads(ended.stdout.splitlines()[-1]).items():
        assert table["cases"] == table["results"]
        rows = "\n".join(table["rows"])
        for page in (f"benchmarks/results/{name}.md", "docs/scaling.md"):
            assert f"\n|{'---|' * 14}\n{rows}\n\n" in (tiny.ROOT / page).read_text()
        assert table["error"].endswith("| why | | | | | | | |")
        assert table["error"].count("|") == rows.partition("\n")[0].count("|")


def test_without_libtpu_it_says_what_to_install(monkeypatch):
    def absent(*args, **kwargs):
        raise RuntimeError("Unable to load libtpu\nand much more")

    monkeypatch.setattr(compile.topologies, "get_topology_desc", absent)
    with pytest.raises(InputError, match=r"pip install 'jax\[tpu\]' \(Unable to load libtpu\)"):
        compile.topology_devices("v5e:4x4")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--topology=b200:8"], "topology=b200:8: give a TPU slice as v5e:4x4"),
        (["--topology=8"], "topology=8: give a TPU slice as v5e:4x4"),
        (["--topology=h100:8", "--slices=2"],
         "slices=2: it counts TPU slices; give GPU nodes as h100:2x8"),
        (["--topology=h100:4x8", "--slices=2"],
         "slices=2: it counts TPU slices; give GPU nodes as h100:8x8"),
        (["--topology=h100:8", "--slices=0"], "slices=0: give 1 or more"),
    ],
)  # fmt: skip
def test_gpus_that_cannot_be_are_refused_in_one_line(capsys, flags, message):
    assert tiny.dmf("compile", f"--config={tiny.CONFIG}", *flags) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"dmf compile: {message}")
    assert error.count("\n") == 1
