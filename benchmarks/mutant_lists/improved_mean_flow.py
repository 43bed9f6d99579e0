"""The mutants of improved MeanFlow: its network, the second head, and its objective."""

from benchmarks.mutant_lists.mutant import Mutant

_NETWORK = ("tests/models/test_in_context_dit.py",)
_GOLDEN = ("tests/models/test_golden_in_context.py",)
_LOSS = ("tests/objectives/test_improved_mean_flow.py",)

_NETWORKS = (
    Mutant(
        "rotary_axes", "columns turn the first half of the pairs of a head, and rows the second",
        "dmf/models/rotary.py",
        "for position in (row, column)]",
        "for position in (column, row)]",
        _NETWORK,
    ),
    Mutant(
        "rotary_direction", "tokens are turned backwards",
        "dmf/models/rotary.py",
        "% 2 == 0",
        "% 2 == 1",
        _NETWORK,
    ),
    Mutant(
        "rotary_kind", "a sequence has the positions of a grid",
        "dmf/models/in_context_transformer.py",
        "return sequence_rotation(PREFIX_TOKENS + side**2, width)",
        "return grid_rotation(PREFIX_TOKENS, side, width)",
        _NETWORK,
    ),
    Mutant(
        "in_context_scale", "the in-context network embeds the inverse of the guidance scale",
        "dmf/models/in_context_transformer.py",
        'inputs = {"scale": 1 - 1 / scale,',
        'inputs = {"scale": 1 / scale,',
        _GOLDEN,
    ),
    Mutant(
        "prefix_positions", "patches are left without learned positions",
        "dmf/models/in_context_transformer.py",
        "tokens = tokens + spread(self.position_embedding, tokens.shape, dtype)",
        "tokens = tokens.at[:, :PREFIX_TOKENS].add(self.position_embedding[None, :PREFIX_TOKENS])",
        _GOLDEN,
    ),
    Mutant(
        "encoder_interval", "the encoder of a decoupled network embeds no interval",
        "dmf/models/in_context_transformer.py",
        "tokens = self._add_to_interval(tokens, self.interval_embedding(jnp.zeros(1)))",
        "self.interval_embedding(jnp.zeros(1))",
        _NETWORK,
    ),
    Mutant(
        "min_time", "predicted data is divided by at least 0.05, whatever min_time is",
        "dmf/models/prediction.py",
        "jnp.maximum(t, network.min_time)",
        "jnp.maximum(t, 0.05)",
        _NETWORK,
    ),
    Mutant(
        "velocity_head_cut", "the velocity head of a DiT follows its last block",
        "dmf/models/transformer.py",
        "cut = config.depth - config.head_depth",
        "cut = config.depth",
        ("tests/models/test_velocity_head.py",),
    ),
    Mutant(
        "gate_rule", "the gate of a SwiGLU is split over rows",
        "dmf/runtime/sharding.py",
        '(r"blocks/mlp/gate/kernel$", -1)',
        '(r"blocks/mlp/gate/kernel$", -2)',
        ("tests/runtime/test_sharding.py",),
    ),
)  # fmt: skip

_OBJECTIVE = (
    Mutant(
        "kept_label", "the direction of the tangent of improved MeanFlow drops labels",
        "dmf/objectives/improved_mean_flow.py",
        "self, network, params, sample, network.condition(batch.y), needed",
        "self, network, params, sample, sample.y.condition, needed",
        _LOSS,
    ),
    Mutant(
        "scale_outside", "the velocity head guides outside the interval that was drawn",
        "dmf/objectives/improved_mean_flow.py",
        "jnp.where(in_drawn_interval(t, guidance), guidance.scale, 1.0)",
        "guidance.scale",
        _LOSS,
    ),
    Mutant(
        "needed_rows", "the conditional velocity is skipped where r < t",
        "dmf/objectives/improved_mean_flow.py",
        "needed = apart if",
        "needed = ~apart if",
        _LOSS,
    ),
    Mutant(
        "whole_interval", "the interval of a sample with r = t is not (0, 1)",
        "dmf/objectives/improved_mean_flow.py",
        "jnp.where(apart, start, 0.0), jnp.where(apart, end, 1.0)",
        "start, end",
        _LOSS,
    ),
    Mutant(
        "least_time", "velocities of data are divided by times below the least one",
        "dmf/objectives/path_sample.py",
        "jnp.maximum(draws.t, network.min_time)",
        "draws.t",
        _LOSS,
    ),
    Mutant(
        "drawn_kappa", "the conditional velocity has the coefficient 1 / scale",
        "dmf/objectives/guidance.py",
        "omega, kappa = 1.0, 1 - 1 / guidance.scale",
        "omega, kappa = 1.0, 1 / guidance.scale",
        _LOSS,
    ),
    Mutant(
        "guidance_input_below_1", "guidance as an input may be any positive scale",
        "dmf/sampling/guidance.py",
        "if guidance.scale < 1:",
        "if guidance.scale <= 0:",
        ("tests/sampling/test_sampling_guidance.py", "tests/sampling/test_generator.py"),
    ),
)  # fmt: skip

MUTANTS = (*_NETWORKS, *_OBJECTIVE)
