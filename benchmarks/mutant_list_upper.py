"""The mutants of the upper rooms: training, experiments and cli."""

from benchmarks.mutant_list import Mutant

_TRAINING = (
    Mutant(
        "ema_params", "the EMA takes the parameters before the step",
        "dmf/training/train_step.py",
        "update_ema(ema, state.ema_params[name], params, state.step, recipe.batch_size),",
        "update_ema(ema, state.ema_params[name], state.params, state.step, recipe.batch_size),",
        ("tests/training/test_optimizer.py", "tests/training/test_gradients.py"),
    ),
    Mutant(
        "ema_decay", "the EMA exchanges decay and 1 - decay",
        "dmf/training/ema.py",
        "lambda a, p: decay * a + (1 - decay) * p, ema_params, params",
        "lambda a, p: decay * p + (1 - decay) * a, ema_params, params",
        ("tests/training/test_optimizer.py",),
    ),
    Mutant(
        "ema_step", "the half-life of the EMA is that of the next step",
        "dmf/training/ema.py",
        "images_seen = step.astype(jnp.float32) * batch_size",
        "images_seen = (step.astype(jnp.float32) + 1) * batch_size",
        ("tests/training/test_optimizer.py",),
    ),
    Mutant(
        "warm_up", "the warm-up is one step longer",
        "dmf/training/optimizer.py",
        "max(self.warmup_steps, 1))",
        "self.warmup_steps + 1)",
        ("tests/training/test_optimizer.py",),
    ),
    Mutant(
        "weight_decay", "there is no weight decay",
        "dmf/training/optimizer.py",
        "eps=self.eps, weight_decay=self.weight_decay",
        "eps=self.eps, weight_decay=0 * self.weight_decay",
        ("tests/training/test_optimizer.py",),
    ),
    Mutant(
        "weight_decay_biases", "biases have no weight decay",
        "dmf/training/optimizer.py",
        "eps=self.eps, weight_decay=self.weight_decay",
        "eps=self.eps, weight_decay=self.weight_decay,\n"
        "            mask=lambda params: jax.tree.map(lambda leaf: leaf.ndim > 1, params),",
        ("tests/training/test_optimizer.py",),
    ),
    Mutant(
        "clip_after", "the update is clipped and not the gradient",
        "dmf/training/optimizer.py",
        "optimizer = optax.chain(clip, adamw)",
        "optimizer = optax.chain(adamw, clip)",
        ("tests/training/test_optimizer.py",),
    ),
    Mutant(
        "nan_applied", "an update that is not finite is applied",
        "dmf/training/train_step.py",
        "params = select_finite(finite, params, state.params)",
        "params = select_finite(finite | ~finite, params, state.params)",
        ("tests/training/test_apply_if_finite.py",),
    ),
    Mutant(
        "nan_moments", "the moments of the optimizer take a gradient that is not finite",
        "dmf/training/apply_if_finite.py",
        "_select_state(finite, inner_state, state.inner_state),",
        "inner_state,",
        ("tests/training/test_apply_if_finite.py",),
    ),
    Mutant(
        "consecutive_skips", "skipped steps count as consecutive when they are not",
        "dmf/training/apply_if_finite.py",
        "jnp.where(finite, 0, state.consecutive_skips + 1),",
        "state.consecutive_skips + ~finite,",
        ("tests/training/test_apply_if_finite.py",),
    ),
    Mutant(
        "microbatch_mean", "gradients of microbatches are summed and not averaged",
        "dmf/training/train_step.py",
        "return jax.tree.map(lambda x: x / microbatches, total)",
        "return total",
        ("tests/training/test_gradients.py",),
    ),
    Mutant(
        "metric_sum", "losses and metrics are summed over the batch",
        "dmf/training/train_step.py",
        "means = jax.tree.map(lambda values: jnp.mean(values, axis=0), metrics)",
        "means = jax.tree.map(lambda values: jnp.sum(values, axis=0), metrics)",
        ("tests/training/test_gradients.py", "tests/training/test_optimizer.py"),
    ),
    Mutant(
        "shard_mean", "gradients that are summed once are not divided by the number of shards",
        "dmf/training/gradient_sum.py",
        ".astype(param.dtype) / shards",
        ".astype(param.dtype)",
        ("tests/training/test_gradient_sum.py",),
    ),
    Mutant(
        "step_key", "every step draws the same noise and times",
        "dmf/training/train_step.py",
        "step_key = jax.random.fold_in(key, step)",
        "step_key = key",
        ("tests/training/test_loop.py",),
    ),
    Mutant(
        "resumed_order", "a resumed run reads its data from the beginning",
        "dmf/training/loop.py",
        "batches = loader.batches(start, sharding)",
        "batches = loader.batches(0, sharding)",
        ("tests/training/test_resume.py",),
    ),
    Mutant(
        "evaluated_ema", "evaluations and grids take the raw parameters",
        "dmf/training/callbacks.py",
        "return state.ema_params[ema] if ema else state.params",
        "return state.params",
        ("tests/training/test_callbacks.py", "tests/training/test_loop.py"),
    ),
    Mutant(
        "best_step", "the checkpoint with the worst score is the best",
        "dmf/training/callbacks.py",
        "choose = max if lookup_metric(metric).higher_is_better else min",
        "choose = min if lookup_metric(metric).higher_is_better else max",
        ("tests/training/test_callbacks.py", "tests/training/test_loop.py"),
    ),
    Mutant(
        "metric_window", "metrics are averaged since the start of the run",
        "dmf/training/metric_accumulator.py",
        "self._finite_rows, self._skipped = [], []",
        "self._skipped = []",
        ("tests/training/test_loop.py", "tests/training/test_apply_if_finite.py"),
    ),
    Mutant(
        "later_metrics", "metrics after the checkpoint that a run resumes from are kept",
        "dmf/training/metrics_writer.py",
        'for row in rows if row["step"] <= start_step)',
        "for row in rows)",
        ("tests/training/test_resume.py",),
    ),
)  # fmt: skip

_EXPERIMENTS = (
    Mutant(
        "complete_run", "a sweep starts complete runs again",
        "dmf/experiments/runs.py",
        "if not step or step < steps:",
        "if not step or step <= steps:",
        ("tests/experiments/test_runs.py", "tests/experiments/test_sweep.py"),
    ),
    Mutant(
        "shared_lock", "two sweeps may hold the lock of a workdir",
        "dmf/experiments/local_launcher.py",
        "fcntl.LOCK_EX | fcntl.LOCK_NB",
        "fcntl.LOCK_SH | fcntl.LOCK_NB",
        ("tests/experiments/test_local_launcher.py",),
    ),
    Mutant(
        "device_parts", "runs that are trained at a time share devices",
        "dmf/experiments/local_launcher.py",
        "return [items[i * size : (i + 1) * size] for i in range(parts)]",
        "return [items[i : i + size] for i in range(parts)]",
        ("tests/experiments/test_local_launcher.py",),
    ),
    Mutant(
        "submitted_twice", "jobs that wait in the queue are submitted again",
        "dmf/experiments/slurm_launcher.py",
        "due = [job for job in jobs if not _is_active(folder, numbers.get(job.name))]",
        "due = list(jobs)",
        ("tests/experiments/test_slurm_launcher.py",),
    ),
    Mutant(
        "last_evaluation", "tables show the numbers of the first evaluation",
        "dmf/experiments/tables.py",
        "last = {run.name: max(run.evaluations, default=None) for run in runs}",
        "last = {run.name: min(run.evaluations, default=None) for run in runs}",
        ("tests/experiments/test_html_report.py", "tests/experiments/test_runs.py"),
    ),
)  # fmt: skip

_CLI = (
    Mutant(
        "misspelt_override", "an override of a field that does not exist is accepted",
        "dmf/cli/overrides.py",
        "            raise override.error(_unknown(name, kind, part))",
        "            return _Slot(part, name, None, Any)",
        ("tests/cli/test_config_flag.py",),
    ),
    Mutant(
        "override_order", "an override of a field may come before its component is chosen",
        "dmf/cli/overrides.py",
        "sorted(parsed, key=lambda o: len(o.path))",
        "sorted(parsed, key=lambda o: -len(o.path))",
        ("tests/cli/test_config_flag.py",),
    ),
    Mutant(
        "whole_number", "a fraction is cut to a whole number",
        "dmf/cli/field_values.py",
        "if not math.isfinite(number) or number != int(number):",
        "if not math.isfinite(number):",
        ("tests/cli/test_config_flag.py",),
    ),
    Mutant(
        "stopped_code", "a run that was told to stop ends like a failed run",
        "dmf/cli/exit_codes.py",
        "return _fail(verb, str(error), error.exit_code)",
        "return _fail(verb, str(error), 1)",
        ("tests/cli/test_command_line.py",),
    ),
    Mutant(
        "evaluate_ema", "dmf evaluate takes the raw parameters whatever --ema is",
        "dmf/cli/evaluate.py",
        "load.load_network(values.checkpoint, ema, mesh=",
        'load.load_network(values.checkpoint, "", mesh=',
        ("tests/cli/test_command_line.py",),
    ),
    Mutant(
        "sample_labels", "dmf sample repeats the first of the labels that were asked for",
        "dmf/cli/sample.py",
        "return chosen[indices % len(chosen)]",
        "return chosen[0 * indices]",
        ("tests/cli/test_command_line.py",),
    ),
)  # fmt: skip

UPPER = (*_TRAINING, *_EXPERIMENTS, *_CLI)
