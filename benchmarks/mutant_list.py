"""The mutants of the lower rooms of the package: runtime, objectives and models.

A mutant is a fault that a programmer could make. `benchmarks.mutants` runs the tests with each.
"""

from typing import NamedTuple


class Mutant(NamedTuple):
    """A fault in one file of the package.

    Attributes:
      name: name of the mutant.
      description: what is wrong with it.
      file: path of the file.
      old: text that occurs once in the file.
      new: text that replaces it.
      tests: paths of the test files that run first.
    """

    name: str
    description: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]


_SHARED = (
    Mutant(
        "null_label_zero", "a dropped label becomes class 0 and not the null label",
        "dmf/types.py",
        "jnp.where(dropped, self.num_classes, self.labels)",
        "jnp.where(dropped, 0, self.labels)",
        ("tests/test_conditions.py", "tests/objectives/test_objectives.py"),
    ),
    Mutant(
        "null_condition_zero", "guidance takes class 0 for the null condition",
        "dmf/types.py",
        "jnp.full_like(self.labels, self.num_classes)",
        "jnp.zeros_like(self.labels)",
        ("tests/sampling/test_sampling_guidance.py",),
    ),
    Mutant(
        "unknown_field", "a component ignores fields that it does not have",
        "dmf/registry.py",
        "        if key not in fields:\n            guess",
        "        if key not in fields and not fields:\n            guess",
        ("tests/test_registry.py",),
    ),
)  # fmt: skip

_RUNTIME = (
    Mutant(
        "tensor_rule", "the first matmul of the MLP is split over rows",
        "dmf/runtime/sharding.py",
        '(r"blocks/mlp/in/kernel$", -1)',
        '(r"blocks/mlp/in/kernel$", -2)',
        ("tests/runtime/test_sharding.py",),
    ),
    Mutant(
        "parameter_axis", "parameters are split over the axis data and not fsdp",
        "dmf/runtime/sharding.py",
        'return _shardings(mesh, params, ("fsdp",), copies=False)',
        'return _shardings(mesh, params, ("data",), copies=False)',
        ("tests/runtime/test_sharding.py",),
    ),
    Mutant(
        "batch_axis", "devices of the axis fsdp see the same samples",
        "dmf/runtime/sharding.py",
        'BATCH_AXES = ("slices", "data", "fsdp")',
        'BATCH_AXES = ("slices", "data")',
        ("tests/runtime/test_sharding.py",),
    ),
    Mutant(
        "part_of_an_axis", "an axis that does not divide a dimension does not split it",
        "dmf/runtime/sharding.py",
        "return math.gcd(devices, length if length % TILE_ROWS else length // TILE_ROWS)",
        "return 1",
        ("tests/runtime/test_sharding.py",),
    ),
    Mutant(
        "checksum_order", "the checksum does not depend on the order of the values",
        "dmf/runtime/checksums.py",
        "h = words + index * jnp.uint32(0x9E3779B9)",
        "h = words + 0 * index",
        ("tests/runtime/test_checksums.py",),
    ),
    Mutant(
        "file_in_place", "a file is overwritten in place and not replaced when it is complete",
        "dmf/runtime/files.py",
        "            yield partial\n            sync(partial)\n            partial.replace(path)",
        "            yield path",
        ("tests/runtime/test_files.py",),
    ),
    Mutant(
        "other_work", "a folder of other work is taken for the same work",
        "dmf/runtime/resumable_work.py",
        "if folder.exists() and stored != identity:",
        "if folder.exists() and stored is None:",
        ("tests/sampling/test_image_writers.py",),
    ),
    Mutant(
        "beats", "an owner on another host that beats is taken for dead",
        "dmf/runtime/ownership.py",
        "            if self._content() != content:\n                return False",
        "            if self._content() != content:\n                return True",
        ("tests/runtime/test_ownership.py",),
    ),
    Mutant(
        "taken_lock", "of two that find a dead lock, one removes the lock of the other",
        "dmf/runtime/ownership.py",
        "            if self._content() == content:\n                self._path.unlink()",
        "            if self._content():\n                self._path.unlink()",
        ("tests/runtime/test_ownership.py",),
    ),
)  # fmt: skip

_OBJECTIVES = (
    Mutant(
        "tangent_sign", "the target of MeanFlow adds (t - r) du/dt",
        "dmf/objectives/mean_flow.py",
        "target = v_g - per_sample(",
        "target = v_g + per_sample(",
        ("tests/objectives/test_objectives.py",),
    ),
    Mutant(
        "tangent_of_r", "du/dt is the derivative in r and not in t",
        "dmf/objectives/mean_flow.py",
        "(v, jnp.ones_like(t), jnp.zeros_like(r))",
        "(v, jnp.zeros_like(t), jnp.ones_like(r))",
        ("tests/objectives/test_tangent.py", "tests/objectives/test_compute_sharing.py"),
    ),
    Mutant(
        "target_gradient", "the target of MeanFlow carries a gradient",
        "dmf/objectives/mean_flow.py",
        "jax.lax.stop_gradient(target), (sample.t, sample.r))",
        "target, (sample.t, sample.r))",
        ("tests/objectives/test_compute_sharing.py",),
    ),
    Mutant(
        "times_swapped", "t is the smaller of the two times",
        "dmf/objectives/time_samplers.py",
        "t, r = jnp.maximum(a, b), jnp.minimum(a, b)",
        "r, t = jnp.maximum(a, b), jnp.minimum(a, b)",
        ("tests/objectives/test_time_samplers.py",),
    ),
    Mutant(
        "logit_normal_mean", "the mean of the logit-normal time is multiplied by its deviation",
        "dmf/objectives/time_samplers.py",
        "self.mean + self.std * jax.random.normal(key, (count,))",
        "self.std * (self.mean + jax.random.normal(key, (count,)))",
        ("tests/objectives/test_time_samplers.py",),
    ),
    Mutant(
        "sigmoid_sign", "the logit-normal time of the linear path runs backwards",
        "dmf/objectives/interpolants.py",
        "time_of=jax.nn.sigmoid,",
        "time_of=lambda z: jax.nn.sigmoid(-z),",
        ("tests/objectives/test_interpolants.py", "tests/objectives/test_time_samplers.py"),
    ),
    Mutant(
        "velocity_sign", "the velocity of the linear path is noise + data",
        "dmf/objectives/interpolants.py",
        "alpha_derivative=lambda t: -jnp.ones_like(t),",
        "alpha_derivative=lambda t: jnp.ones_like(t),",
        ("tests/objectives/test_interpolants.py",),
    ),
    Mutant(
        "interval_end", "the end of the guidance interval is not guided",
        "dmf/objectives/interpolants.py",
        "(t <= end + _TIME_ROUNDING)",
        "(t <= end - _TIME_ROUNDING)",
        ("tests/objectives/test_guidance.py",),
    ),
    Mutant(
        "drawn_interval", "drawn guidance acts before the start of its interval",
        "dmf/objectives/guidance.py",
        "(guidance.start <= t) & (t <= guidance.end)",
        "(guidance.start >= t) & (t <= guidance.end)",
        ("tests/objectives/test_guidance.py",),
    ),
    Mutant(
        "guided_coefficient", "the coefficients of the guided velocity do not sum to 1",
        "dmf/objectives/guidance.py",
        "base += per_sample(1 - omega - kappa, v_t) * unconditional",
        "base += per_sample(1 - omega + kappa, v_t) * unconditional",
        ("tests/objectives/test_guidance.py",),
    ),
    Mutant(
        "guided_dropped", "samples whose label was dropped are guided",
        "dmf/objectives/guidance.py",
        "active = in_interval(t, self.interval) & ~dropped",
        "active = in_interval(t, self.interval)",
        ("tests/objectives/test_guidance.py",),
    ),
    Mutant(
        "guided_gradient", "the guided velocity carries a gradient",
        "dmf/objectives/guidance.py",
        "return jax.lax.stop_gradient(v_g)",
        "return v_g",
        ("tests/objectives/test_guidance.py",),
    ),
    Mutant(
        "dropout_inverted", "labels are dropped with one minus the probability",
        "dmf/objectives/path_sample.py",
        "jax.random.bernoulli(key, probability, (len(batch.x),))",
        "jax.random.bernoulli(key, 1 - probability, (len(batch.x),))",
        ("tests/objectives/test_objectives.py",),
    ),
    Mutant(
        "error_mean", "the error of a sample is the mean and not the sum over its values",
        "dmf/objectives/distances.py",
        "return jnp.sum(difference**2, axis=(1, 2, 3))",
        "return jnp.mean(difference**2, axis=(1, 2, 3))",
        ("tests/objectives/test_objectives.py",),
    ),
    Mutant(
        "alignment_sign", "tokens are driven away from the features of the encoder",
        "dmf/objectives/distances.py",
        "return -jnp.mean(jnp.sum(unit[0] * unit[1], axis=-1), axis=-1)",
        "return jnp.mean(jnp.sum(unit[0] * unit[1], axis=-1), axis=-1)",
        ("tests/objectives/test_golden_repa.py", "tests/objectives/test_objectives.py"),
    ),
    Mutant(
        "log_variance_sign", "the error is multiplied by the variance and not divided",
        "dmf/objectives/loss_weighting.py",
        "return jnp.log1p(error / size * jnp.exp(-phi)) + phi / 2",
        "return jnp.log1p(error / size * jnp.exp(phi)) + phi / 2",
        ("tests/objectives/test_loss_weighting.py",),
    ),
    Mutant(
        "adaptive_power", "the adaptive weight has half its power",
        "dmf/objectives/loss_weighting.py",
        "(error + self.offset) ** self.power",
        "(error + self.offset) ** (self.power / 2)",
        ("tests/objectives/test_loss_weighting.py",),
    ),
    Mutant(
        "tangent_bound", "du/dt is scaled up to its bound and never down",
        "dmf/objectives/tangent.py",
        "jnp.minimum(1.0, self.max_rms / jnp.maximum(rms, 1e-12))",
        "jnp.maximum(1.0, self.max_rms / jnp.maximum(rms, 1e-12))",
        ("tests/objectives/test_tangent.py",),
    ),
    Mutant(
        "central_difference", "the central difference is divided by h and not by 2h",
        "dmf/objectives/tangent.py",
        "(ahead - behind) / (2 * self.finite_difference)",
        "(ahead - behind) / self.finite_difference",
        ("tests/objectives/test_tangent.py",),
    ),
    Mutant(
        "loss_sum", "the loss of Decoupled MeanFlow is the sum and not the mean of two losses",
        "dmf/objectives/decoupled_mean_flow.py",
        "return (flow_matching_term + mean_flow_term) / 2",
        "return flow_matching_term + mean_flow_term",
        ("tests/objectives/test_objectives.py", "tests/objectives/test_terms.py"),
    ),
    Mutant(
        "conditional_at_r", "the guided velocity of MeanFlow is taken at r and not at t",
        "dmf/objectives/compute_sharing.py",
        "network.decode(params, hidden, t, y) if needed",
        "network.decode(params, hidden, r, y) if needed",
        ("tests/objectives/test_compute_sharing.py",),
    ),
    Mutant(
        "microbatch_order", "rows of microbatches do not return to their places",
        "dmf/objectives/compute_sharing.py",
        "*computed.shape[2:])[jnp.argsort(order)])",
        "*computed.shape[2:])[order])",
        ("tests/objectives/test_compute_sharing.py",),
    ),
    Mutant(
        "last_time_bin", "t = 1 is in no time bin",
        "dmf/objectives/time_bins.py",
        "jnp.clip(jnp.floor(time * bins), 0, bins - 1)",
        "jnp.clip(jnp.floor(time * bins), 0, bins)",
        ("tests/objectives/test_time_bins.py",),
    ),
)  # fmt: skip

_MODELS = (
    Mutant(
        "split_depth", "one block too many is conditioned on t",
        "dmf/models/dit.py",
        'return "t" * self.split_depth + last * (self.depth - self.split_depth)',
        'return ("t" * (self.split_depth + 1) + last * self.depth)[: self.depth]',
        ("tests/models/test_dit.py",),
    ),
    Mutant(
        "final_layer_time", "the final layer is conditioned on t and not on r",
        "dmf/models/dit.py",
        'self.resolved_block_times[-1] == "b" else "r"',
        'self.resolved_block_times[-1] == "b" else "t"',
        ("tests/models/test_dit.py",),
    ),
    Mutant(
        "interval_time", "a MeanFlow network embeds r - t",
        "dmf/models/transformer.py",
        'times = {"t": t, "r": r, "t-r": t - r}',
        'times = {"t": t, "r": r, "t-r": r - t}',
        ("tests/objectives/test_golden_mean_flow.py",),
    ),
    Mutant(
        "position_axes", "rows and columns of the position table are exchanged",
        "dmf/models/layers.py",
        "for position in (column, row)]",
        "for position in (row, column)]",
        ("tests/models/test_dit.py",),
    ),
    Mutant(
        "qk_norm", "queries and keys are normalized at initialisation only",
        "dmf/models/layers.py",
        "        if self.qk_norm:\n",
        "        if self.qk_norm and self.is_initializing():\n",
        ("tests/sampling/test_golden_samplers.py",),
    ),
    Mutant(
        "time_scale", "times are multiplied by 1000 before they are embedded",
        "dmf/models/layers.py",
        "angles = t.astype(jnp.float32)[:, None] * frequencies[None, :]",
        "angles = 1000 * t.astype(jnp.float32)[:, None] * frequencies[None, :]",
        ("tests/models/test_dit.py",),
    ),
    Mutant(
        "modulation_one", "tokens are multiplied by scale and not by 1 + scale",
        "dmf/models/layers.py",
        "scale_tokens(x, 1 + scale, x.dtype)",
        "scale_tokens(x, scale, x.dtype)",
        ("tests/sampling/test_golden_samplers.py",),
    ),
    Mutant(
        "gelu", "the MLP has the exact GELU and not its tanh approximation",
        "dmf/models/layers.py",
        "(gelu(x))",
        "(nn.gelu(x, approximate=False))",
        ("tests/sampling/test_golden_samplers.py",),
    ),
    Mutant(
        "guidance_scale_input", "the network embeds the guidance scale and not its inverse",
        "dmf/models/layers.py",
        'inputs = {"scale": 1 / scale, "low": start, "high": end}',
        'inputs = {"scale": scale, "low": start, "high": end}',
        ("tests/models/test_dit.py",),
    ),
    Mutant(
        "attention_scale", "logits of attention are divided by the width of a head, not its root",
        "dmf/models/attention/dot_product.py",
        "* q.shape[-1] ** -0.5)",
        "/ q.shape[-1])",
        ("tests/models/attention/test_kernel_sharding.py",
         "tests/sampling/test_golden_samplers.py"),
    ),
    Mutant(
        "scan_order", "scanned blocks run from the last to the first",
        "dmf/models/block_stack.py",
        "return jax.lax.scan(step, tokens, part)[0]",
        "return jax.lax.scan(step, tokens, part, reverse=True)[0]",
        ("tests/models/test_dit.py",),
    ),
    Mutant(
        "remat_blocks", "with remat, the decoder reads the parameters of the first blocks",
        "dmf/models/block_stack.py",
        "inputs = BlockInputs(params, jnp.arange(depth), ",
        "inputs = BlockInputs(params, jnp.arange(depth) - start, ",
        ("tests/models/test_dit.py",),
    ),
    Mutant(
        "latent_scale", "samples are multiplied by the scale of latents to be decoded",
        "dmf/models/encoders/latent_scaling.py",
        "return x / factor + offset",
        "return x * factor + offset",
        ("tests/test_docstring_examples.py",),
    ),
    Mutant(
        "decode_groups", "groups of latents are decoded into overlapping places",
        "dmf/models/encoders/latent_space.py",
        "rows = i * size + jnp.arange(size)",
        "rows = i + jnp.arange(size)",
        ("tests/models/encoders/test_latent_space.py",),
    ),
    Mutant(
        "encoder_deviation", "the encoder gives the variance and not the deviation of latents",
        "dmf/models/encoders/autoencoder_kl.py",
        "jnp.exp(jnp.clip(log_variance, -30, 20) / 2)",
        "jnp.exp(jnp.clip(log_variance, -30, 20))",
        ("tests/models/encoders/test_autoencoder_kl.py",),
    ),
)  # fmt: skip

LOWER = (*_SHARED, *_RUNTIME, *_OBJECTIVES, *_MODELS)
