"""The mutation check: faults are put into the package one at a time, and a test must find each.

    python -m benchmarks.mutants [--only=NAME,NAME] [--first-only] [--list]

The faults ("mutants") are those of `benchmarks/mutant_lists`: each replaces one text in one file.
They are put into a temporary copy of the checkout: the files that git tracks or does not ignore, as
they are on the disk. With each mutant the tests that it names run first (`python -m pytest -x -q
-n 0`), and, if they all pass, the rest of the default level (the tests not marked slow, `-n 2`),
unless --first-only is given. The first test that fails has found the mutant. At the end, all tests
that found one run without any mutant; a test that fails there too has found nothing.

A line is printed as each mutant ends, and is kept as JSON beside the table. The same command
continues after an interruption: what the named tests found is not repeated as long as the mutant,
these tests, and all files that they may read (`dmf`, `configs`, helpers and data in `tests`) are
the same. The table is written to --output; the exit code is 1 if a mutant was not found.
"""

import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from absl import flags

from benchmarks.machine import machine, start
from benchmarks.mutant_lists import Mutant, all_mutants

_ONLY = flags.DEFINE_list("only", [], "names of the mutants to run; all by default")
_LIST = flags.DEFINE_bool("list", False, "print the mutants and run nothing")
_FIRST_ONLY = flags.DEFINE_bool("first-only", False, "run only the tests that a mutant names")
_TIMEOUT = flags.DEFINE_float("timeout", 1800, "seconds after which a run of tests is killed")
_OUTPUT = flags.DEFINE_string("output", "benchmarks/results/mutants.md", "a .md file for the table")

ROOT = Path(__file__).resolve().parent.parent
MUTANTS = all_mutants()
# It compares the list of mutants with the files, so that it fails in every mutated copy.
_OWN_TEST = "tests/test_mutants.py"
_FAILURE = re.compile(r"^(?:FAILED|ERROR) (.+?)(?: - .*)?$", re.M)


class Result(NamedTuple):
    """What became of a mutant.

    Attributes:
      name: name of the mutant.
      digest: of the mutant and all that the tests it names depend on.
      test: the test that found it; empty if none did.
      is_named: whether the mutant names the file of that test.
      seconds: duration.
    """

    name: str
    digest: str
    test: str
    is_named: bool
    seconds: float

    def __str__(self) -> str:
        place = "" if self.is_named or not self.test else ", in the rest of the tests"
        return f"`{self.test}`{place}" if self.test else "NOT FOUND"


class Copy:
    """A copy of the checkout, in which tests run.

    Attributes:
      folder: the copy.
    """

    def __init__(self, folder: Path, compiled: Path):
        """Copies the checkout.

        Args:
          folder: a folder to make.
          compiled: folder for compiled programs, which all runs of tests share.
        """
        self.folder = folder
        listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
        names = subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=True).stdout
        self._names = sorted(name for name in set(names.split("\0")) if (ROOT / name).is_file())
        for name in self._names:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
        path = os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH")]))
        # Compiled Python is told from its source by time and size, which a mutant may not change.
        self._environment = {"JAX_COMPILATION_CACHE_DIR": str(compiled), **os.environ,
                             "PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1"}
        imported = self.run("-c", "import dmf; print(dmf.__file__)")[1].strip()
        if Path(imported) != folder / "dmf" / "__init__.py":
            sys.exit(f"the tests would import {imported} and not the copy in {folder}")

    def run(self, *arguments: str) -> tuple[int, str]:
        """Runs Python in the copy; returns its exit code and output."""
        with subprocess.Popen(
            [sys.executable, *arguments], cwd=self.folder, env=self._environment, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
        ) as process:  # fmt: skip
            try:
                output, _ = process.communicate(timeout=_TIMEOUT.value)
            except BaseException:
                os.killpg(process.pid, signal.SIGKILL)
                raise
        return process.returncode, output

    def failures(self, *arguments: str) -> list[str]:
        """Runs pytest in the copy; returns the tests that fail.

        Raises:
          RuntimeError: the tests could not run.
        """
        options = ("-q", "--tb=no", "-p", "no:cacheprovider")
        code, output = self.run("-m", "pytest", *options, *arguments)
        failed = _FAILURE.findall(output)
        # With -x, several processes of tests end with 2 at a failure, as at a file with errors.
        ran = code in (0, 1, 2) and " during collection" not in output
        if not ran or bool(failed) != (code > 0):
            raise RuntimeError(f"pytest {' '.join(arguments)} ended with {code}:\n{output[-3000:]}")
        return failed

    def digest(self, mutant: Mutant) -> str:
        """A hash of a mutant and of all files that the tests which it names may read."""
        digest = hashlib.sha256(json.dumps(mutant).encode())
        for name in self._names:
            is_test = name.startswith("tests/") and Path(name).name.startswith("test_")
            if name in mutant.tests or (
                name.startswith(("dmf/", "configs/", "tests/")) and not is_test
            ):
                digest.update(name.encode() + b"\0" + (self.folder / name).read_bytes())
        return digest.hexdigest()[:16]


def problems(mutants: Sequence[Mutant], root: Path) -> list[str]:
    """A line for each mutant that cannot be put into the files below `root`."""
    lines = []
    for mutant in mutants:
        path = root / mutant.file
        count = path.read_text().count(mutant.old) if path.is_file() else 0
        if count != 1 or mutant.old == mutant.new:
            lines.append(f"mutant {mutant.name}: its text occurs {count} times in {mutant.file}, "
                         "and must occur once and be replaced by another")
        lines += [f"mutant {mutant.name}: there is no {test}" for test in mutant.tests
                  if not (root / test).is_file()]
    return lines


def try_mutant(copy: Copy, mutant: Mutant) -> Result:
    """Runs tests with a mutant in the copy until one fails."""
    start, digest, path = time.monotonic(), copy.digest(mutant), copy.folder / mutant.file
    original, named, rest = path.read_text(), [], []
    path.write_text(original.replace(mutant.old, mutant.new))
    try:
        named = copy.failures("-x", "-n", "0", *mutant.tests)
        if not named and not _FIRST_ONLY.value:
            ignored = [f"--ignore={test}" for test in (*mutant.tests, _OWN_TEST)]
            rest = copy.failures("-x", "-n", "2", "--dist=loadfile", *ignored, "tests")
    except subprocess.TimeoutExpired:
        print(f"{mutant.name}: killed after {_TIMEOUT.value:.0f} s", flush=True)
    finally:
        path.write_text(original)
    test = (named + rest or [""])[0]
    return Result(mutant.name, digest, test, bool(named), round(time.monotonic() - start, 1))


def results(copy: Copy, mutants: Sequence[Mutant], log: Path) -> Iterator[Result]:
    """The result of each mutant: from the log where it is known, and otherwise by running tests."""
    lines = log.read_text().splitlines() if log.exists() else []
    known = {result.name: result for result in (Result(*json.loads(line)) for line in lines)}
    for number, mutant in enumerate(mutants, start=1):
        result, note = known.get(mutant.name), " (known)"
        if not (result and result.is_named and result.digest == copy.digest(mutant)):
            result, note = try_mutant(copy, mutant), ""
            with log.open("a") as file:
                file.write(json.dumps(result) + "\n")
        print(f"{number} of {len(mutants)}: {mutant.name}: {result}, {result.seconds:.0f} s{note}",
              flush=True)
        yield result


def without_failures(copy: Copy, found: Sequence[Result]) -> tuple[Result, ...]:
    """The results, where a test that fails without a mutant too has found nothing."""
    tests = sorted({result.test for result in found if result.test})
    print(f"{len(tests)} tests that found a mutant run without one", flush=True)
    failing = copy.failures("-n", "0", *tests) if tests else ()
    for test in failing:
        print(f"it fails without a mutant too: {test}", flush=True)
    return tuple(r._replace(test="") if r.test in failing else r for r in found)


def table(mutants: Mapping[str, Mutant], found: Sequence[Result]) -> list[str]:
    """Lines of Markdown: a row for each mutant, and the sums."""
    count, seconds = sum(bool(result.test) for result in found), sum(r.seconds for r in found)
    named = sum(result.is_named and bool(result.test) for result in found)
    return [
        "| mutant | fault | file | found by | seconds |",
        "|---|---|---|---|---|",
        *(f"| {r.name} | {mutants[r.name].description} | `{mutants[r.name].file}` | "
          + str(r).replace("|", "\\|") + f" | {r.seconds:.0f} |" for r in found),
        "",
        f"{count} of {len(found)} mutants were found, {named} of them by the tests that they name, "
        f"in {seconds / 60:.0f} minutes.",
        "",
    ]


def chosen_mutants() -> dict[str, Mutant]:
    """The mutants of --only, or all, by name."""
    by_name = {mutant.name: mutant for mutant in MUTANTS}
    for name in _ONLY.value:
        if name not in by_name:
            sys.exit(f"--only={name}: there is no such mutant; --list prints them")
    return {name: by_name[name] for name in _ONLY.value or by_name}


def main(arguments: Sequence[str]) -> None:
    """Runs tests with each mutant, prints and writes the table."""
    mutants = chosen_mutants()
    if _LIST.value:
        for mutant in mutants.values():
            print(f"{mutant.name}: {mutant.description} ({mutant.file})")
        return
    if lines := problems(MUTANTS, ROOT):
        sys.exit("\n".join(lines))
    output = Path(_OUTPUT.value).resolve()
    # Told to end, it ends the tests too and removes the copy.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended by SIGTERM; the same command goes on"))
    with tempfile.TemporaryDirectory(prefix="dmf-mutants-") as folder:
        copy = Copy(Path(folder).resolve() / "copy", Path(folder).resolve() / "compiled")
        found = [*results(copy, list(mutants.values()), output.with_suffix(".jsonl"))]
        found = without_failures(copy, found)
    options = [f"--only={','.join(_ONLY.value)}"] * bool(_ONLY.value)
    options += ["--first-only"] * _FIRST_ONLY.value
    command = " ".join(["python -m benchmarks.mutants", *options])
    text = "\n".join([*table(mutants, found), f"`{command}`, on {machine()}."])
    output.write_text(text + "\n")
    print(text)
    sys.exit(not all(result.test for result in found))


if __name__ == "__main__":
    start(main)
