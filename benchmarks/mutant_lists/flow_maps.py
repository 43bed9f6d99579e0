"""The mutants of shortcut models, consistency training and terminal velocity matching."""

from benchmarks.mutant_lists.mutant import Mutant

_SHORTCUT = ("tests/objectives/test_shortcut.py",)
_CONSISTENCY = ("tests/objectives/test_consistency.py",)
_TERMINAL = ("tests/objectives/test_terminal_velocity_matching.py",)

MUTANTS = (
    Mutant(
        "batch_parts", "joined parts of a batch are in the order of the parts",
        "dmf/objectives/batch_parts.py",
        "groups = math.gcd(len(a), len(b))",
        "groups = 1",
        ("tests/objectives/test_batch_parts.py",),
    ),
    Mutant(
        "shortcut_place", "the second half of a shortcut starts where the first one does",
        "dmf/objectives/shortcut.py",
        "x_s = x_t - per_sample(t - s, x_t) * jax.lax.stop_gradient(first)",
        "x_s = x_t",
        _SHORTCUT,
    ),
    Mutant(
        "shortest_step", "the halves of the shortest step are steps",
        "dmf/objectives/shortcut.py",
        "shortest = t - r <= 2 / objective.shortest_steps",
        "shortest = t - r < 2 / objective.shortest_steps",
        _SHORTCUT,
    ),
    Mutant(
        "shortcut_share", "both losses of a shortcut model have the same weight",
        "dmf/objectives/shortcut.py",
        "(samples[1],), share)",
        "(samples[1],), 1 - share)",
        _SHORTCUT,
    ),
    Mutant(
        "normalized_tangent", "the normalized weighting divides by the squared norm",
        "dmf/objectives/loss_weighting.py",
        "(jnp.sqrt(jax.lax.stop_gradient(error)) + self.offset)",
        "(jax.lax.stop_gradient(error) + self.offset)",
        _CONSISTENCY,
    ),
    Mutant(
        "terminal_tangent", "the gradient does not go through the derivative by r",
        "dmf/objectives/terminal_velocity_matching.py",
        "if not objective.differentiate_tangent:",
        "if objective.differentiate_tangent:",
        _TERMINAL,
    ),
    Mutant(
        "terminal_velocity", "the target is the velocity where the jump starts",
        "dmf/objectives/terminal_velocity_matching.py",
        "x_r = x_t - length * jax.lax.stop_gradient(u)",
        "x_r = x_t",
        _TERMINAL,
    ),
    Mutant(
        "terminal_ema", "the velocity where a jump lands is the network's own, not the EMA's",
        "dmf/objectives/terminal_velocity_matching.py",
        "target = network.apply(fixed, x_r, r, r, y)",
        "target = network.apply(jax.lax.stop_gradient(params), x_r, r, r, y)",
        _TERMINAL,
    ),
    Mutant(
        "terminal_attention", "flash attention is taken where the gradient goes through a tangent",
        "dmf/training/build.py",
        'if trained_by.differentiate_tangent and model.get("attention", "xla") != "xla":',
        'if trained_by.differentiate_tangent and model.get("attention", "xla") == "flash":',
        ("tests/training/test_build.py",),
    ),
)  # fmt: skip
