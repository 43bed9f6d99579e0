"""Parameter groups: each parameter takes the step of an optimizer with its rate and its decay."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import small_network

from configs import default
from dmf.errors import InputError
from dmf.training import build
from dmf.training.adafactor import Adafactor
from dmf.training.lion import Lion
from dmf.training.muon import Muon
from dmf.training.optimizer import AdamW

GROUPS = (("blocks/1/.*", 0.5, 1.0), (".*/bias", 1.0, 0.0), ("table", 2.0, 0.5),
          ("blocks/.*/bias", 3.0, 1.0))  # fmt: skip
# Each parameter, its block if it is one of a stack, and its factors.
EXPECTED = {
    ("kernel", 0): (1.0, 1.0), ("kernel", 1): (0.5, 1.0), ("bias", 0): (3.0, 0.0),
    ("bias", 1): (1.5, 0.0), ("table", ()): (2.0, 0.5),
}  # fmt: skip


def tree(seed):
    draw = np.random.default_rng(seed).normal
    return {"blocks": {"in": {"kernel": jnp.float32(draw(size=(2, 4, 3))),
                              "bias": jnp.float32(draw(size=(2, 3)))}},
            "table": jnp.float32(draw(size=(5, 4)))}  # fmt: skip


def leaf(tree, name, block):
    return (tree["table"] if name == "table" else tree["blocks"]["in"][name])[block]


@pytest.mark.parametrize("make", [
    AdamW, pytest.param(Lion, marks=pytest.mark.slow), pytest.param(Muon, marks=pytest.mark.slow),
    pytest.param(Adafactor, marks=pytest.mark.slow),
])  # fmt: skip
def test_each_parameter_has_the_rate_and_the_decay_of_its_groups(make):
    """Through a warm-up, whose first rate is 0, and a skipped step, which counts as a step."""
    finite = (True, False, True)

    @functools.partial(jax.jit, static_argnums=0)
    def updates_of(optimizer):
        transform, params = optimizer.transform(), tree(0)
        state, found = transform.init(params), []
        for i, is_finite in enumerate(finite):
            updates, state = transform.update(tree(i), state, params, finite=jnp.bool_(is_finite))
            found.append(updates)
        return found

    def optimizer(rate=1.0, decay=1.0, **fields):
        return make(learning_rate=0.1 * rate, weight_decay=0.3 * decay, warmup_steps=4,
                    clip_norm=0.0, skip_nonfinite=2, **fields)

    grouped = updates_of(optimizer(groups=GROUPS))
    for (name, block), factors in EXPECTED.items():
        for found, want in zip(grouped, updates_of(optimizer(*factors)), strict=True):
            np.testing.assert_allclose(
                leaf(found, name, block), leaf(want, name, block), rtol=1e-5, atol=1e-7
            )
    assert np.abs(grouped[2]["table"]).max() > 0


@pytest.mark.parametrize(("group", "message"), [
    (("in", 0.0, 1.0), r"=\('in', 0.0, 1.0\): .* positive.*; config.freeze keeps"),
    (("in", float("nan"), 1.0), "=.* positive"),
    (("in", 1.0, -1.0), "=.* from 0 to 1000"),
    (("in", 1.0, 1.0), "=.* no effect"),
    (("in", 1.0, 0.0), "=.* no weight decay .* or set weight_decay"),
    (("in", 2.0), "=.*: give tuples of text, a number, a number"),
])  # fmt: skip
def test_factors_that_cannot_be_used_are_named(group, message):
    with pytest.raises(InputError, match=f"^optimizer.groups{message}"):
        build.optimizer({"name": "adamw", "groups": [list(group)]}, 8)


def test_a_group_must_match_a_parameter_that_is_trained():
    def recipe(groups, freeze=()):
        config = small_network.config({"freeze": freeze})
        config.optimizer = default.component(AdamW(groups=groups))
        return build.recipe(config, build.mesh(config.mesh))

    with small_network.registered():
        recipe((("out", 2.0, 1.0),), freeze=("in",))
        for groups, message in (
            ((("ou", 2.0, 1.0),), "=ou: it matches no whole path; there are 3, for example out"),
            ((("(out", 2.0, 1.0),), r"=\(out: it is no regular expression"),
            ((("in", 2.0, 1.0),), "=in: it matches no whole path; there are 2"),
        ):
            with pytest.raises(InputError, match=f"^optimizer.groups{message}"):
                recipe(groups, freeze=("in",) if "there are 2" in message else ())
    transform = AdamW(groups=(("ou", 2.0, 1.0),)).transform()
    with pytest.raises(InputError, match="^groups=ou: it matches no whole path"):
        transform.init({"out": jnp.ones(2)})
    assert optax.tree.norm(AdamW(groups=(("out", 2.0, 1.0),)).transform().init(
        {"out": jnp.ones(2)})) == 0  # fmt: skip
