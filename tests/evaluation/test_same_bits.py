"""Images and numbers, to the bit, whatever devices and processes made them and however often they
were begun."""

import hashlib
import json
import os
import pathlib
import signal
import subprocess
import time

import pytest
import tiny

# Images, in parts of 48, which are 16 chunks.
COUNT, PARTS = 240, 5

# Of a search of guidance: no guidance at one step, where t is 1, and three scales at two steps, for
# each EMA. A cell takes four calls of its generator, two for each part.
SEARCH = ("--guidance=1,2,4", "--interval=0.4:0.65", "--ema=main,", "--steps=1,2")
CELLS, DISTINCT, CELL_IMAGES, CALL_IMAGES = 12, 8, 96, 24
# `dmf evaluate` that writes down how many images each call generates, and kills itself at a call.
KILLED_SEARCH = """
import os, signal, sys
from dmf.cli import evaluate, exit_codes
from dmf.sampling.generator import Generator

make, log, calls = Generator.__call__, open(sys.argv[1], "a", buffering=1), []

def counted(self, params, **settings):
    generate = make(self, params, **settings)

    def call(indices, labels):
        calls.append(indices)
        if len(calls) == int(sys.argv[2]):
            os.kill(os.getpid(), signal.SIGKILL)
        print(len(indices), file=log)
        return generate(indices, labels)

    return call

Generator.__call__ = counted
sys.exit(exit_codes.run(evaluate.main, "evaluate", sys.argv[3:]))
"""


def arguments(output: pathlib.Path) -> list[str]:
    return ["sample", f"--checkpoint={tiny.flow_run()}", f"--output={output}", "--steps=8",
            f"--count={COUNT}", "--labels=random"]  # fmt: skip


def environment(devices: int) -> dict[str, str]:
    """The environment of a process with so many devices; of two equal flags the last one counts."""
    flag = f"--xla_force_host_platform_device_count={devices}"
    return tiny.environment() | {"XLA_FLAGS": f"{os.environ['XLA_FLAGS']} {flag}"}


def generated_hash(output: pathlib.Path, devices: int) -> str:
    """Runs the command to its end; the hash of the file it wrote."""
    done = subprocess.run(tiny.command(*arguments(output)), env=environment(devices), check=False,
                          cwd=tiny.ROOT, capture_output=True, text=True, timeout=300)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert [p.name for p in output.parent.iterdir()] == [output.name]
    return hashlib.sha256(output.read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def of_eight(tmp_path_factory) -> str:
    """The hash of what this process makes, which has eight devices."""
    output = tmp_path_factory.mktemp("eight") / "images.npz"
    assert tiny.dmf(*arguments(output)) == 0
    return hashlib.sha256(output.read_bytes()).hexdigest()


@pytest.mark.slow
def test_one_device_makes_what_eight_make(tmp_path, of_eight):
    assert generated_hash(tmp_path / "images.npz", 1) == of_eight


@pytest.mark.slow
def test_killed_on_eight_devices_and_finished_on_three(tmp_path, of_eight):
    process = subprocess.Popen(tiny.command(*arguments(tmp_path / "images.npz")),
                               env=environment(8), cwd=tiny.ROOT, stderr=subprocess.DEVNULL)
    parts = tmp_path / ".images.npz.parts"
    while process.poll() is None and len(list(parts.glob("0*.npy"))) < 2:
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert 2 <= len(list(parts.glob("0*.npy"))) < PARTS
    assert not (tmp_path / "images.npz").exists()
    assert generated_hash(tmp_path / "images.npz", 3) == of_eight


@pytest.mark.slow
def test_two_processes_measure_what_one_measures(tmp_path):
    port = tiny.free_port()
    code = (
        "import jax, sys\n"
        f"jax.distributed.initialize('localhost:{port}', 2, int(sys.argv[1]))\n"
        "from dmf.cli import evaluate, exit_codes\n"
        "sys.exit(exit_codes.run(evaluate.main, 'evaluate', sys.argv[2:]))\n"
    )
    command = ["--steps=1,2", "--count=80", f"--checkpoint={tiny.flow_run()}"]
    together, alone = tmp_path / "together.json", tmp_path / "alone.json"
    processes = [
        subprocess.Popen([*tiny.command(code=code), str(i), *command, f"--output={together}"],
                         env=environment(2), cwd=tiny.ROOT, stderr=subprocess.PIPE, text=True)
        for i in range(2)
    ]  # fmt: skip
    for process in processes:
        _, stderr = process.communicate(timeout=240)
        assert process.returncode == 0, stderr
    assert tiny.dmf("evaluate", *command, f"--output={alone}") == 0
    assert together.read_text() == alone.read_text()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["alone.json", "together.json"]


@pytest.mark.slow
def test_a_search_of_guidance_that_is_killed_in_a_cell_ends_as_one_that_is_not(tmp_path):
    def search(name: str, kill_at: int = 0) -> int:
        return tiny.process(
            tmp_path / f"{name}.log", kill_at, f"--checkpoint={tiny.flow_run()}",
            f"--output={tmp_path}/{name}.json", f"--count={CELL_IMAGES}",
            "--config.evaluation.part_size=48", *SEARCH, code=KILLED_SEARCH,
        ).returncode  # fmt: skip

    def generated(name: str) -> int:
        return sum(map(int, (tmp_path / f"{name}.log").read_text().split()))

    assert search("whole") == 0
    assert len(json.loads((tmp_path / "whole.json").read_text())["results"]) == CELLS
    assert generated("whole") == DISTINCT * CELL_IMAGES
    # In the second part of the third cell, half of which is lost.
    assert search("killed", kill_at=12) == -signal.SIGKILL
    assert generated("killed") == 11 * CALL_IMAGES
    assert not (tmp_path / "killed.json").exists()
    assert search("killed") == 0
    assert generated("killed") == DISTINCT * CELL_IMAGES + CALL_IMAGES
    for suffix in ("json", "md"):
        whole, killed = (tmp_path / f"{name}.{suffix}" for name in ("whole", "killed"))
        assert killed.read_text() == whole.read_text()
