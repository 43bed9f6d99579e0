"""The mutants of the checks of components of one's own, and of callbacks."""

from benchmarks.mutant_lists.mutant import Mutant

_CHECKS = ("tests/test_component_checks.py",)

MUTANTS = (
    Mutant(
        "scalar_loss", "the losses of an objective may have any shape",
        "dmf/objectives/objective.py",
        "if jnp.shape(losses) != (count,):",
        "if jnp.ndim(losses) > 1:",
        _CHECKS,
    ),
    Mutant(
        "nan_times", "times that are NaN are taken for times in [0, 1]",
        "dmf/objectives/time_checks.py",
        "if not ((drawn >= 0) & (drawn <= 1)).all():",
        "if ((drawn < 0) | (drawn > 1)).any():",
        _CHECKS,
    ),
    Mutant(
        "sampler_dtype", "a step of a sampler may return x in another dtype",
        "dmf/sampling/sampler_checks.py",
        'f"{jnp.shape(each)} {jnp.result_type(each)}"',
        'f"{jnp.shape(each)}"',
        _CHECKS,
    ),
    Mutant(
        "own_callbacks", "the callbacks that a run names are not called",
        "dmf/training/loop.py",
        "callbacks=(snapshot, prepared.show, evaluate, *prepared.callbacks),",
        "callbacks=(snapshot, prepared.show, evaluate),",
        ("tests/test_extending.py",),
    ),
)  # fmt: skip
