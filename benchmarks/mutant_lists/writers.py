"""The mutants of writers of metrics, trackers, and progress."""

from benchmarks.mutant_lists.mutant import Mutant

_WRITERS = ("tests/training/test_writers.py",)
_PROGRESS = ("tests/runtime/test_progress.py",)

MUTANTS = (
    Mutant(
        "tracker_id", "a resumed run has a new id at its tracker",
        "dmf/training/trackers.py",
        "if not isinstance(ids.get(tracker), str):",
        "if True:",
        _WRITERS,
    ),
    Mutant(
        "wandb_step", "values of a repeated step are logged where W&B drops them",
        "dmf/training/trackers.py",
        "step=step if is_new else None)",
        "step=step)",
        _WRITERS,
    ),
    Mutant(
        "callback_writers", "callbacks are not given the writers of the run",
        "dmf/training/loop.py",
        "callback.writers = writers",
        "callback.writers = Writers()",
        ("tests/training/test_callbacks.py",),
    ),
    Mutant(
        "start_entries", "a resume replaces what is recorded of earlier starts",
        "dmf/training/start_record.py",
        "[*read_starts(workdir), start_entry(step, hosts)]",
        "[start_entry(step, hosts)]",
        _WRITERS,
    ),
    Mutant(
        "live_line", "a line is printed behind the live line",
        "dmf/runtime/progress.py",
        'text = (_ERASE if self.live else "") + (',
        'text = "" + (',
        _PROGRESS,
    ),
)  # fmt: skip
