"""Shells complete verbs, flags and config fields."""

import shutil
import subprocess

import pytest

from dmf.cli import completion
from dmf.errors import InputError

FLAGS = {"train": ["--workdir=", "--quiet", "--config.run.steps=", "--config.run.seed="],
         "sample": ["--steps="]}  # fmt: skip


def completed(*words: str) -> list[str]:
    """What bash offers for the last word."""
    script = completion.script("bash", FLAGS) + """
COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); compopt() { echo "$2"; }
_dmf; printf '%s\\n' "${COMPREPLY[@]}"
"""
    run = subprocess.run(["bash", "-c", script, "bash", *words], capture_output=True, text=True,
                         check=True)  # fmt: skip
    assert run.stderr == ""
    return run.stdout.split()


@pytest.mark.skipif(not shutil.which("bash"), reason="there is no bash")
def test_bash_completes_verbs_flags_and_fields():
    assert completed("dmf", "") == ["train", "sample", "--help", "--version"]
    assert completed("dmf", "sa") == ["sample"]
    assert completed("dmf", "train", "--q") == ["--quiet"]
    assert completed("dmf", "train", "--w") == ["nospace", "--workdir="]
    assert completed("dmf", "sample", "--w") == []
    assert completed("dmf", "train", "--config.run.st") == ["nospace", "--config.run.steps="]
    assert completed("dmf", "train", "") == []  # A file, by the default of bash.


@pytest.mark.skipif(not shutil.which("zsh"), reason="there is no zsh")
def test_zsh_reads_the_script(tmp_path):
    (tmp_path / "_dmf").write_text(completion.script("zsh", FLAGS))
    subprocess.run(["zsh", "-f", "-n", tmp_path / "_dmf"], check=True)


def test_the_candidates_are_those_of_help():
    found = completion.candidates("sample")
    assert {"--checkpoint=", "--guide-ema=", "--quiet", "--help",
            "--config.sampling.sampler.name="} <= {*found}  # fmt: skip
    assert "--config.run.steps=" not in completion.candidates("components")


@pytest.mark.parametrize("arguments", [[], ["fish"], ["bash", "zsh"]])
def test_another_shell_is_refused(arguments):
    with pytest.raises(InputError, match="shell=.*: give one of bash, zsh"):
        completion.main("completion", arguments)
