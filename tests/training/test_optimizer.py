"""The optimizer and the EMAs against closed forms, and gradient accumulation against none."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import small_network
import tiny
from etils import epath

from configs import default
from dmf.checkpoints.power_ema import exponent
from dmf.errors import InputError
from dmf.objectives import DrawnGuidance
from dmf.training.ema import ConstantEma, HalfLifeEma, PowerEma, update_ema
from dmf.training.loop import train
from dmf.training.metrics_writer import read_metrics
from dmf.training.optimizer import AdamW

NAN = float("nan")
PARAMS = {"a": jnp.array([1.0, -2.0]), "b": jnp.array([[0.5], [3.0]])}


def updated_params(optimizer: AdamW, gradient, steps: int = 1):
    transform = optimizer.transform()
    params, state = PARAMS, transform.init(PARAMS)
    for _ in range(steps):
        updates, state = transform.update(gradient, state, params)
        params = optax.apply_updates(params, updates)
    return params


@pytest.mark.parametrize("steps", [1, 3])
def test_adamw_is_the_published_update(steps):
    rate, b1, b2, eps, decay = 0.1, 0.8, 0.9, 1e-3, 0.02
    gradient = {"a": np.array([0.3, -0.1]), "b": np.array([[0.2], [0.4]])}
    optimizer = AdamW(
        learning_rate=rate, b1=b1, b2=b2, eps=eps, weight_decay=decay, clip_norm=0.0
    )
    params = updated_params(optimizer, jax.tree.map(jnp.float32, gradient), steps)
    for name, p in PARAMS.items():
        p, m, v = np.asarray(p, np.float64), 0.0, 0.0
        for t in range(1, steps + 1):
            m = b1 * m + (1 - b1) * gradient[name]
            v = b2 * v + (1 - b2) * gradient[name] ** 2
            m_hat, v_hat = m / (1 - b1**t), v / (1 - b2**t)
            p = p - rate * (m_hat / (np.sqrt(v_hat) + eps) + decay * p)
        np.testing.assert_allclose(params[name], p, rtol=1e-6)


def test_a_gradient_is_clipped_to_the_global_norm():
    # With a large epsilon the step is proportional to the gradient, so that clipping shows.
    plain = AdamW(learning_rate=1.0, eps=1e6, clip_norm=0.0)
    clipped = AdamW(learning_rate=1.0, eps=1e6, clip_norm=2.5)
    gradient = {"a": jnp.array([3.0, 0.0]), "b": jnp.array([[0.0], [4.0]])}  # of norm 5
    small = jax.tree.map(lambda g: g * 0.1, gradient)

    def update(optimizer, gradient):
        transform = optimizer.transform()
        return float(transform.update(gradient, transform.init(PARAMS), PARAMS)[0]["b"][1, 0])

    assert update(clipped, gradient) == pytest.approx(update(plain, gradient) / 2, rel=1e-5)
    assert update(clipped, small) == update(plain, small)


@pytest.mark.parametrize(
    ("schedule", "step", "share"),
    [
        ("constant", 0, 0.0), ("constant", 5, 0.5), ("constant", 10, 1.0), ("constant", 900, 1.0),
        ("cosine", 5, 0.5), ("cosine", 10, 1.0), ("cosine", 60, 0.5), ("cosine", 110, 0.0),
        ("cosine", 35, (1 + np.cos(np.pi / 4)) / 2), ("cosine", 500, 0.0),
        ("linear", 5, 0.5), ("linear", 10, 1.0), ("linear", 35, 0.75), ("linear", 110, 0.0),
        ("wsd", 5, 0.5), ("wsd", 10, 1.0), ("wsd", 90, 1.0), ("wsd", 95, 0.75), ("wsd", 110, 0.0),
    ],
)
def test_the_learning_rate_warms_up_and_decays(schedule, step, share):
    end = 0 if schedule == "constant" else 110
    optimizer = AdamW(learning_rate=4e-3, warmup_steps=10, schedule=schedule, decay_steps=end)
    assert float(optimizer.rate(jnp.int32(step))) == pytest.approx(4e-3 * share, abs=1e-9)


def test_without_a_warm_up_the_first_step_has_the_full_rate():
    optimizer = AdamW(learning_rate=4e-3, schedule="cosine", decay_steps=100)
    assert float(optimizer.rate(jnp.int32(0))) == pytest.approx(4e-3)


def test_a_decay_of_all_steps_is_linear():
    fields = {"warmup_steps": 2, "decay_steps": 12}
    wsd = AdamW(schedule="wsd", decay_fraction=1.0, **fields)
    steps = jnp.arange(14)
    np.testing.assert_array_equal(wsd.rate(steps), AdamW(schedule="linear", **fields).rate(steps))
    assert AdamW(schedule="wsd").for_run(600).decay_steps == 600


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"schedule": "triangle"}, "schedule=triangle: choose one of constant"),
        ({"schedule": "cosine", "warmup_steps": 9, "decay_steps": 9},
         "decay_steps=9: a cosine decay ends after warmup_steps=9"),
        ({"decay_steps": 9}, "decay_steps=9: schedule=constant does not decay"),
        ({"schedule": "linear", "decay_fraction": 0.1}, "decay_fraction=0.1: schedule=linear has"),
        ({"schedule": "wsd", "decay_fraction": 0.0}, "decay_fraction=0.0: give a part of the"),
        ({"schedule": "wsd", "decay_fraction": NAN}, "decay_fraction=nan: give a part of the"),
        ({"skip_nonfinite": -1}, "skip_nonfinite=-1: give 0, for none"),
        ({"warmup_steps": -1}, "warmup_steps=-1: give 0"),
        *[({name: value}, f"{name}={value}: {remedy}") for name, values, remedy in (
            ("learning_rate", (0.0, -1.0, NAN), "it must be positive"),
            ("b1", (-0.1, 1.0, NAN), "a decay rate lies in"),
            ("b2", (-0.1, 1.0, 1 - 1e-8, NAN), "a decay rate lies in"),
            ("eps", (0.0, -1e-8, NAN), "it must be positive"),
            ("weight_decay", (-0.1, NAN), "give 0"),
            ("clip_norm", (-1.0, NAN), "give 0"),
        ) for value in values],
    ],
)  # fmt: skip
def test_invalid_fields_of_the_optimizer_are_refused(fields, message):
    with pytest.raises(InputError, match=f"^{message}") as error:
        AdamW(**fields)
    assert "\n" not in str(error.value)


def ema_of_series(ema, values, batch_size=4):
    ema_params = {"w": jnp.float32(values[0])}
    for step, value in enumerate(values[1:]):
        ema_params = update_ema(ema, ema_params, {"w": jnp.float32(value)}, step, batch_size)
    return float(ema_params["w"])


def test_a_constant_ema_is_a_geometric_sum():
    values = np.array([1.0, 4.0, -2.0, 0.5, 3.0])
    weights = 0.7 ** np.arange(4, -1, -1) * np.array([1, 0.3, 0.3, 0.3, 0.3])
    ema = ConstantEma(decay=0.7)
    assert ema_of_series(ema, values) == pytest.approx(weights @ values, rel=1e-6)


@pytest.mark.parametrize("std", [0.05, 0.25])
def test_a_power_ema_weighs_steps_by_a_power_of_their_number(std):
    values = np.random.default_rng(0).normal(size=21)
    gamma = exponent(std)
    weights = np.diff(np.arange(21) ** (gamma + 1)) / 20 ** (gamma + 1)
    found = ema_of_series(PowerEma(std=std), values)
    assert found == pytest.approx(weights @ values[1:], abs=1e-5)
    # Late in a run float32 still tells the decay rate from 1.
    rate = PowerEma(std=std).rate(jnp.int32(10**6 - 1), 256)
    assert 1 - float(rate) == pytest.approx((gamma + 1) * 1e-6, abs=4e-8)


def test_an_ema_halves_its_distance_in_one_half_life():
    # From 1 to 0, in batches of 4: 25 steps are the 100 images of one half-life.
    values = np.array([1.0] + [0.0] * 25)
    ema = HalfLifeEma(images=100.0, ramp=0.0)
    assert ema_of_series(ema, values) == pytest.approx(0.5, rel=1e-5)


def test_a_decay_ends_with_the_run_unless_it_is_given():
    cosine = AdamW(schedule="cosine", warmup_steps=10)
    assert cosine.for_run(600).decay_steps == 600
    longer = AdamW(schedule="cosine", decay_steps=700)
    assert longer.for_run(600).decay_steps == 700
    assert AdamW().for_run(600) == AdamW()
    with pytest.raises(InputError, match="^decay_steps=500: .* run.steps=600; give 600 or more, "):
        AdamW(schedule="linear", decay_steps=500).for_run(600)
    assert cosine.for_run(4).decay_steps == 11, "a run may end within its warm-up"
    with pytest.raises(InputError, match="^decay_steps=0: give the step at which the decay ends"):
        cosine.rate(jnp.int32(3))
    with pytest.raises(InputError, match="^decay_steps=-1: give a whole number >= 0"):
        AdamW(schedule="cosine", decay_steps=-1)


@pytest.mark.slow
def test_a_run_that_is_extended_does_not_train_at_rate_zero(tmp_path):
    fields = {"optimizer.schedule": "linear", "run.log_every": 1}
    with small_network.registered():
        for steps in (4, 8):
            train(small_network.config(fields | {"run.steps": steps}), tmp_path)
        rates = [row["learning_rate"] for row in read_metrics(epath.Path(tmp_path))]
        expected = [1 - i / 4 for i in range(4)] + [1 - i / 8 for i in range(4, 8)]
        np.testing.assert_allclose(rates, 1e-3 * np.array(expected), rtol=1e-4)
        given = fields | {"run.steps": 12, "optimizer.decay_steps": 8}
        with pytest.raises(InputError, match="^optimizer.decay_steps=8: the learning rate"):
            train(small_network.config(given), tmp_path)
        train(small_network.config(given | {"optimizer.decay_steps": 16}), tmp_path)
    rates = [row["learning_rate"] for row in read_metrics(epath.Path(tmp_path))]
    np.testing.assert_allclose(rates[8:], [1e-3 * (1 - i / 16) for i in range(8, 12)], rtol=1e-4)


def test_the_half_life_ramps_up_with_the_images_seen():
    ema = HalfLifeEma(images=1000.0, ramp=0.05)
    for step, half_life in ((0, 0), (1, 0.2), (100, 20), (5000, 1000), (90_000, 1000)):
        decay = 0.5 ** (4 / half_life) if half_life else 0.0
        assert float(ema.rate(jnp.int32(step), 4)) == pytest.approx(decay, rel=1e-5, abs=1e-9)


@pytest.mark.parametrize(
    ("make", "field", "value"),
    [(ConstantEma, "decay", 1.0), (ConstantEma, "decay", NAN),
     (ConstantEma, "decay", 1 - 1e-8), (HalfLifeEma, "images", 1e10), (HalfLifeEma, "images", 0.0),
     (PowerEma, "std", 0.29), (PowerEma, "std", 0.0), (PowerEma, "std", NAN),
     (HalfLifeEma, "images", NAN), (HalfLifeEma, "ramp", -1.0), (HalfLifeEma, "ramp", NAN)],
)  # fmt: skip
def test_invalid_fields_of_an_ema_are_refused(make, field, value):
    with pytest.raises(InputError, match=f"^{field}={value}: "):
        make(**{field: value})


def test_a_run_has_several_emas(tmp_path):
    emas = {
        "still": {"name": "constant", "decay": 0.999999},
        "live": {"name": "constant", "decay": 0.0},
        "ramped": {"name": "half_life", "images": 64.0, "ramp": 0.5},
        "power": {"name": "power", "std": 0.2},
    }
    fields = {"run.steps": 3, "sampling.ema": "live", "run.snapshot_every": 2}
    with small_network.registered():
        state = train(small_network.config(fields, emas=emas), tmp_path)
    assert set(state.ema_params) == set(emas)
    at = {name: params["out"] for name, params in state.ema_params.items()}
    live = np.asarray(state.params["out"])
    np.testing.assert_array_equal(at["live"], live)
    assert 0 < np.abs(at["ramped"] - live).max() < np.abs(at["still"] - live).max()
    assert 0 < np.abs(at["power"] - live).max() < np.abs(at["still"] - live).max()
    assert [path.name for path in tmp_path.glob("ema_snapshots/*")] == ["2"]
    assert (tmp_path / "ema_snapshots/2/ema_params_power").exists()
    assert not (tmp_path / "ema_snapshots/2/ema_params_live").exists()


def drawn_guidance(fields):
    """A run with drawn guidance and a warm-up of the tangent: all that its draws may contain."""
    config = tiny.flow_map(fields | {
        "model.guidance_input": True, "init.checkpoint": str(tiny.flow_run()),
        "objective.tangent.warmup_steps": 2,
    })
    config.objective.guidance = default.component(DrawnGuidance(kappa=0.5))
    return config


@pytest.mark.slow
@pytest.mark.parametrize("make", [
    small_network.config, tiny.config, drawn_guidance,
])
def test_accumulation_changes_nothing(make, tmp_path):
    runs = {
        "whole": {},
        "quarters": {"gradient_accumulation": 4, "mesh.data": 2, "mesh.fsdp": 2, "mesh.tensor": 2},
    }
    fields = {"data.batch_size": 32, "run.steps": 3, "optimizer.eps": 1e-3}
    flat = {}
    for name, overrides in runs.items():
        with small_network.registered():
            params = train(make(fields | overrides), tmp_path / name).params
        flat[name] = jax.flatten_util.ravel_pytree(jax.device_get(params))[0]
    for name in runs:
        np.testing.assert_allclose(flat[name], flat["whole"], atol=1e-6, err_msg=name)
