"""The mutants of the in-context network and of the second head."""

from benchmarks.mutant_list import Mutant

_NETWORK = ("tests/models/test_in_context_dit.py",)
_GOLDEN = ("tests/models/test_golden_in_context.py",)

IN_CONTEXT = (
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
        "dmf/models/in_context_dit.py",
        "jnp.maximum(t, self.min_time)",
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
