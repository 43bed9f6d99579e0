"""The mutants of exports on the Hugging Face hub."""

from benchmarks.mutant_lists.mutant import Mutant

_TESTS = ("tests/checkpoints/test_hub.py",)

MUTANTS = (
    Mutant(
        "hub_other_files", "a push deletes files that are of no export",
        "dmf/checkpoints/push.py",
        'replaces=lambda path: path.partition("/")[0] in _OF_EXPORTS,',
        "replaces=lambda path: True,",
        _TESTS,
    ),
    Mutant(
        "hub_public", "a push that must be private goes to a public repository",
        "dmf/runtime/hub_upload.py",
        "if private and not found.private:",
        "if private and found.private:",
        _TESTS,
    ),
    Mutant(
        "hub_newest", "parameters are those of a newer commit than the config",
        "dmf/runtime/hub.py",
        "revision=first.parent.name, allow_patterns",
        "revision=wanted.revision, allow_patterns",
        _TESTS,
    ),
    Mutant(
        "hub_stale_scores", "a model card has the scores of an earlier step",
        "dmf/experiments/card_scores.py",
        'if evaluation.get("step") != step:',
        "if False:",
        ("tests/experiments/test_card_scores.py",),
    ),
    Mutant(
        "hub_base_model", "a model card names a local directory as the base model",
        "dmf/checkpoints/hub_card.py",
        "return address and address.repository",
        'return config.get("init", {}).get("checkpoint")',
        _TESTS,
    ),
)  # fmt: skip
