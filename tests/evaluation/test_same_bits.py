"""Images and numbers, to the bit, whatever devices and processes made them and however often they
were begun."""

import hashlib
import os
import pathlib
import signal
import subprocess
import time

import pytest
import tiny

# Images, in parts of 48, which are 16 chunks.
COUNT, PARTS = 240, 5


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
