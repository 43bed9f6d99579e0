"""`dmf VERB`: finds the verb and hands it the rest of the line. Nothing heavy is imported here."""

import importlib
import os
import sys

VERBS = {
    "prepare": "make a dataset of latents or crops from images",
    "compile": "compile a training step, also for TPUs that are not there: memory, FLOPs",
    "train": "train a flow model, MeanFlow or a flow map",
    "sweep": "train many runs: here, under SLURM, or as printed commands",
    "sample": "make images from a run or an export",
    "evaluate": "measure how far samples are from the data",
    "convert": "bring in a checkpoint of another project",
    "export": "take parameters out: Orbax, safetensors or StableHLO",
    "report": "show runs on a page, or compare evaluations in a table",
}


def usage() -> str:
    """What `dmf --help` prints."""
    width = max(map(len, VERBS))
    verbs = "\n".join(f"  {verb:<{width}}  {does}" for verb, does in VERBS.items())
    return f"usage: dmf VERB [--help] [FLAGS]\n\n{verbs}"


def keep_compiled() -> None:
    """What took JAX a second or more to compile is kept on disk, so that a run that is taken up
    again starts at once; JAX_COMPILATION_CACHE_DIR says where instead. JAX reads it on import."""
    caches = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", os.path.join(caches, "dmf", "compiled"))


def main() -> None:
    """The command line; exits as `dmf.cli.run` says."""
    arguments = sys.argv[1:]
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(usage())
        sys.exit(0 if arguments else 2)
    verb, *rest = arguments
    if verb not in VERBS:
        print(f"dmf: {verb}: no such verb; choose one of {', '.join(VERBS)}", file=sys.stderr)
        sys.exit(2)
    keep_compiled()
    module = importlib.import_module(f"dmf.cli.{verb}")
    from dmf.cli import quiet, run

    code = run(module.main, verb, rest)
    if code and "dmf.hosts" in sys.modules:
        sys.modules["dmf.hosts"].leave(code)
    # What background threads of a failed run still say while the process ends was said already.
    quiet()
    sys.exit(code)


if __name__ == "__main__":
    main()
