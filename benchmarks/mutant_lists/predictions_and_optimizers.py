"""The mutants of what networks predict, and of optimizers and their parameter groups."""

from benchmarks.mutant_lists.mutant import Mutant

_PREDICTION = ("tests/models/test_prediction.py",)
_OPTIMIZERS = ("tests/training/test_lion_and_adafactor.py",)
_GROUPS = ("tests/training/test_parameter_groups.py",)

MUTANTS = (
    Mutant(
        "noise_divisor", "the velocity of predicted noise is divided by t",
        "dmf/models/prediction.py",
        "jnp.maximum(1 - t, network.min_time)",
        "jnp.maximum(t, network.min_time)",
        _PREDICTION,
    ),
    Mutant(
        "noise_target", "losses of predicted noise regress on what the noise gives, 0 at t = 1",
        "dmf/objectives/path_sample.py",
        "    return interpolant.velocity(batch.x, draws.noise, draws.t)",
        "    v_t = interpolant.velocity(batch.x, draws.noise, draws.t)\n"
        "    if network.prediction == \"noise\":\n"
        "        v_t = v_t * per_sample(jnp.minimum((1 - draws.t) / network.min_time, 1), x_t)\n"
        "    return v_t",
        _PREDICTION,
    ),
    Mutant(
        "prediction_input", "du/dt of a shared encoder leaves out the input in the division",
        "dmf/models/dit.py",
        "else input_of_prediction(self, x_t)",
        "else input_of_prediction(self, jax.lax.stop_gradient(x_t))",
        _PREDICTION,
    ),
    Mutant(
        "prediction_stored", "a checkpoint is taken for one that predicts something else",
        "dmf/checkpoints/load.py",
        'for name in ("prediction", "min_time"):',
        'for name in ("min_time",):',
        _PREDICTION,
    ),
    Mutant(
        "adafactor_stack", "Adafactor takes the blocks of a stack for one array",
        "dmf/training/adafactor.py",
        "return leaf if STACKED.search(name) else leaf[None], lambda stack",
        "return leaf[None], lambda stack",
        _OPTIMIZERS,
    ),
    Mutant(
        "adafactor_clipping", "the updates of Adafactor have a root mean square of up to 1",
        "dmf/training/adafactor.py",
        "optax.clip_by_block_rms(self.clipping_threshold)",
        "optax.clip_by_block_rms(1.0)",
        _OPTIMIZERS,
    ),
    Mutant(
        "group_decay", "the weight decay of a group is not multiplied by its learning rate",
        "dmf/training/parameter_groups.py",
        "factor[0] * (u - decay * factor[1] * p)",
        "factor[0] * u - decay * factor[1] * p",
        _GROUPS,
    ),
    Mutant(
        "group_overlap", "the last group that matches a parameter replaces the others",
        "dmf/training/parameter_groups.py",
        "factors[name] *= np.stack([np.where(chosen, factor, 1.0) for factor in group])",
        "factors[name] = np.stack([np.where(chosen, factor, old)\n"
        "                                      for factor, old in zip(group, factors[name])])",
        _GROUPS,
    ),
    Mutant(
        "wsd_start", "the stable part of the schedule is as long as its decay should be",
        "dmf/training/optimizer.py",
        "decay, length - decay)",
        "length - decay, decay)",
        ("tests/training/test_optimizer.py",),
    ),
)
