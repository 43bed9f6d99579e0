"""`dmf VERB`: finds the verb and hands it the rest of the line. Nothing heavy is imported here."""

import importlib
import os
import sys
from contextlib import nullcontext

import dmf
from dmf.cli import VERBS
from dmf.runtime import signals

NOTHING_TO_SAVE = ("dmf train: told to stop before there was anything to save; the same command "
                   "starts or resumes the run")
CACHE_VARIABLE = "JAX_COMPILATION_CACHE_DIR"


def usage() -> str:
    """The text that `dmf --help` prints."""
    width = max(map(len, VERBS))
    verbs = "\n".join(f"  {verb:<{width}}  {does}" for verb, does in VERBS.items())
    return f"usage: dmf VERB [--help] [FLAGS]\n       dmf --version\n\n{verbs}"


def set_compilation_cache() -> None:
    """Keeps compiled programs on disk, so that a resumed run starts at once.

    The directory is JAX_COMPILATION_CACHE_DIR, which JAX reads on import; dmf/compiled in the
    user's cache by default. Without a home directory nothing is kept.
    """
    from dmf.errors import InputError
    from dmf.runtime.paths import user_path

    caches = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    given = os.environ.get(CACHE_VARIABLE, os.path.join(caches, "dmf", "compiled"))
    try:
        os.environ[CACHE_VARIABLE] = given and os.fspath(user_path(given))
    except InputError:
        os.environ[CACHE_VARIABLE] = ""


def keep_standard_files_open() -> None:
    """Opens those of the files 0 to 2 that are closed, so that no file of data gets their numbers,
    to which libraries write messages."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)


def main() -> None:
    """The command line; the exit code is that of `dmf.cli.exit_codes.run`."""
    keep_standard_files_open()
    arguments = sys.argv[1:]
    if arguments == ["--version"]:
        print(f"dmf {dmf.__version__}")
        sys.exit(0)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(usage())
        sys.exit(0 if arguments else 2)
    verb, *rest = arguments
    if verb not in VERBS:
        print(f"dmf: {verb}: no such verb; choose one of {', '.join(VERBS)}", file=sys.stderr)
        sys.exit(2)
    with signals.exit_on_signals(NOTHING_TO_SAVE) if verb == "train" else nullcontext():
        set_compilation_cache()
        module = importlib.import_module(f"dmf.cli.{verb}")
        from dmf.cli import exit_codes

        code = exit_codes.run(module.main, verb, rest)
        if code and "dmf.runtime.heartbeats" in sys.modules:
            sys.modules["dmf.runtime.heartbeats"].exit_together(code)
        exit_codes.end(code)


if __name__ == "__main__":
    main()
