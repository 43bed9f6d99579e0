"""A batch in two parts: every row in one of them, by an equal share of each device."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dmf.errors import InputError
from dmf.objectives.batch_parts import check_share, join_batch, split_batch
from dmf.runtime.sharding import batch_sharding, make_mesh


@pytest.mark.parametrize(("count", "share", "second"), [
    (8, 0.25, [3, 7]), (6, 0.5, [1, 3, 5]), (9, 1 / 3, [2, 5, 8]), (5, 0.4, [3, 4]),
])  # fmt: skip
def test_every_row_is_in_one_part_and_comes_back_in_its_place(count, share, second):
    rows = {"x": jnp.arange(2 * count).reshape(count, 2), "y": jnp.arange(count)}
    parts = split_batch(rows, share, "share")
    assert parts[1]["y"].tolist() == second
    assert sorted(parts[0]["y"].tolist() + second) == list(range(count))
    for name, whole in rows.items():
        np.testing.assert_array_equal(join_batch(*parts)[name], whole)


def test_no_row_moves_to_another_device():
    mesh = make_mesh(4, 2, 1)
    rows = jax.device_put(jnp.arange(32), batch_sharding(mesh))

    def split(rows):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return split_batch(rows, 0.25, "share")

    for shard in jax.jit(split)(rows)[1].addressable_shards:
        (here,) = (s.data for s in rows.addressable_shards if s.device == shard.device)
        assert set(np.asarray(shard.data)) <= set(np.asarray(here))


@pytest.mark.parametrize(("make", "message"), [
    (lambda: split_batch(jnp.arange(6), 0.25, "objective.share"),
     r"^objective\.share=0\.25: .* 6 samples.*data\.batch_size"),
    (lambda: split_batch(jnp.arange(2), 0.01, "objective.share"), r"^objective\.share=0\.01: "),
    (lambda: check_share("share", 1.0), r"^share=1\.0: .* between 0 and 1$"),
])  # fmt: skip
def test_a_share_that_cannot_be_taken_is_named(make, message):
    with pytest.raises(InputError, match=message):
        make()
