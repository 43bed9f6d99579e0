"""The mutants of the wide head and of the times of high dimensions."""

from benchmarks.mutant_lists.mutant import Mutant

_HEAD = ("tests/models/test_wide_head.py",)
_TIMES = ("tests/objectives/test_time_samplers.py",)

MUTANTS = (
    Mutant(
        "wide_head_time", "the wide head is conditioned on t and not on r",
        "dmf/models/transformer.py",
        "tokens, condition = self.wide_head(x_t, tokens, condition)",
        'tokens, condition = self.wide_head(x_t, tokens, conditions["t"])',
        _HEAD,
    ),
    Mutant(
        "wide_head_condition", "the wide head does not see the tokens of the trunk",
        "dmf/models/transformer.py",
        "condition = tokens.astype(dtype) + spread(",
        "condition = spread(",
        _HEAD,
    ),
    Mutant(
        "wide_head_input", "du/dt leaves out that the wide head takes x_t",
        "dmf/models/dit.py",
        "needed = x_t if self.wide_head.depth",
        "needed = jax.lax.stop_gradient(x_t) if self.wide_head.depth",
        _HEAD,
    ),
    Mutant(
        "wide_head_size", "a flow map may have another wide head than its flow model",
        "dmf/models/dit.py",
        '"num_classes", "wide_head", "prediction",',
        '"num_classes", "prediction",',
        ("tests/training/test_initial_checkpoint.py",),
    ),
    Mutant(
        "uniform_shift", "uniform times are not shifted",
        "dmf/objectives/time_samplers.py",
        "return shift_times(jax.random.uniform(key, (count,)), self.shift)",
        "return jax.random.uniform(key, (count,))",
        _TIMES,
    ),
    Mutant(
        "dimension_root", "the shift of many values is their ratio and not its root",
        "dmf/objectives/time_samplers.py",
        "return math.sqrt(values / base)",
        "return values / base",
        _TIMES,
    ),
)  # fmt: skip
