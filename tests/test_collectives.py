"""What a compiled program sends is read from its text: kinds, groups, bytes, repetitions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from jax.sharding import NamedSharding, PartitionSpec

from dmf import compiling
from dmf.collectives import Collective, collectives, gathered
from dmf.sharding import make_mesh

# Of every way that XLA writes groups, results and loops; the numbers below follow by hand.
PROGRAM = """
%add (a: f32[], b: f32[]) -> f32[] {
  ROOT %sum = f32[] add(%a, %b)
}

%limit (p: (s32[], f32[8,4])) -> pred[] {
  %constant.1 = s32[]{:T(128)} constant(5)
  ROOT %less = pred[] compare(%i, %constant.1), direction=LT
}

%body (p: (s32[], f32[8,4])) -> (s32[], f32[8,4]) {
  %x = (bf16[8,4]{1,0:T(8,128)}, /*index=1*/f32[2]{0}) all-reduce(%y, %z), replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add
  %w = f32[16,4]{1,0} all-gather(%v), replica_groups=mesh['a'=2,'b'=4] {'a'}, dimensions={0}
}

%known (p: (s32[])) -> (s32[]) {
  %x.2 = (f32[4], f32[4], u32[], u32[]) collective-permute-start(%y.2), source_target_pairs={{0,1},{1,0}}
  %x.3 = f32[4] collective-permute-done(%x.2)
}

ENTRY %main (p: f32[8,4]) -> f32[8,4] {
  %loop = (s32[], f32[8,4]) while(%t), condition=%limit, body=%body
  %other = (s32[]) while(%t2), condition=%limit, body=%known, backend_config={"known_trip_count":{"n":"3"}}
  %g = (f32[4,4], f32[8,4]) all-gather-start(%p), replica_groups=[4,2]<=[2,4]T(1,0), dimensions={0}
  %s = f32[3]{0} reduce-scatter(%q), replica_groups=[2,4]<=[8], dimensions={0}, to_apply=%add
  %far = (bf16[6,8]{1,0}, u32[], token[]) send(%q, %token), channel_id=1, is_host_transfer=true, frontend_attributes={_xla_host_transfer_handler_name="xla_megascale_runtime",_xla_megascale_transfer_type="ALL_REDUCE"}
  %one = f32[64]{0} all-reduce(%q), replica_groups={{0},{1}}, to_apply=%add
}
"""  # noqa: E501


def test_a_program_written_by_hand():
    found = collectives(PROGRAM, devices=8, slices=2)
    assert set(found) == {
        Collective("all-reduce", 4, False, 5, 5 * (8 * 4 * 2 + 2 * 4)),
        # Devices 0 and 4, and so on: one of each slice.
        Collective("all-gather", 2, True, 5 + 1, 5 * 16 * 4 * 4 + 8 * 4 * 4),
        Collective("collective-permute", 2, False, 3, 3 * 4 * 4),
        Collective("reduce-scatter", 4, False, 1, 4 * 3 * 4),
        Collective("all-reduce", 2, True, 1, 6 * 8 * 2),
    }
    assert [c.sent for c in found] == sorted((c.sent for c in found), reverse=True)
    sent = {c.kind: c.sent for c in found if c.group == 4 or c.kind != "all-reduce"}
    assert sent["all-reduce"] == 2 * 3 / 4 * 360
    assert sent["all-gather"] == 1 / 2 * 1408
    assert sent["reduce-scatter"] == 3 / 4 * 48
    assert sent["collective-permute"] == 48


def test_a_sum_in_a_scan_counts_as_often_as_the_scan_runs():
    mesh = make_mesh(8, 1, 1)

    def summed(x):
        def step(carry, row):
            return carry + jax.lax.psum(row * carry.mean(), "data"), None

        return jax.lax.scan(step, jnp.ones(16), x)[0]

    mapped = jax.shard_map(summed, mesh=mesh, in_specs=PartitionSpec(None, None),
                           out_specs=PartitionSpec(), check_vma=False)  # fmt: skip
    text = jax.jit(mapped).lower(jax.ShapeDtypeStruct((7, 16), "f4")).compile().as_text()
    assert collectives(text, 8) == [Collective("all-reduce", 8, False, 7, 7 * 64)]


def test_gathering_what_is_split_is_seen():
    mesh = make_mesh(1, 8, 1)
    split = NamedSharding(mesh, PartitionSpec("fsdp"))
    whole = NamedSharding(mesh, PartitionSpec())
    x = jax.ShapeDtypeStruct((64, 3), "f4", sharding=split)
    text = jax.jit(lambda x: x * 2, out_shardings=whole).lower(x).compile().as_text()
    assert [(result.dtype, result.shape) for result in gathered(text)] == [("f32", (64, 3))]


MESHES = [(8, 1, 1, 1), (2, 2, 2, 1), (1, 8, 1, 1), (2, 2, 1, 2), (1, 4, 2, 1)]


@pytest.fixture(scope="module", params=MESHES, ids=str)
def compiled(request):
    """A step of Decoupled MeanFlow with a network large enough to be split, on eight devices."""
    data, fsdp, tensor, slices = request.param
    fields = {"mesh.data": data, "mesh.fsdp": fsdp, "mesh.tensor": tensor, "mesh.slices": slices,
              "model.width": 64, "model.heads": 4, "model.depth": 6}  # fmt: skip
    return compiling.lowered_step(tiny.flow_map(fields), jax.devices())


def test_no_parameter_is_gathered_whole_but_where_it_lives_whole(compiled):
    """The stack of all blocks is never gathered where each device holds a part of it; and what
    was updated in parts is gathered once."""
    recipe, (state, _, _), lowered = compiled
    text = lowered.compile().as_text()
    stacks = {
        leaf.shape: leaf.sharding.shard_shape(leaf.shape)
        for leaf in jax.tree.leaves(state.params["blocks"])
    }
    split = {shape for shape, part in stacks.items() if part != shape}
    for result in gathered(text):
        assert result.shape not in split, f"{result} gathers a stack that is split"
    size = sum(int(np.prod(leaf.sharding.shard_shape(leaf.shape))) * 4
               for leaf in jax.tree.leaves(state.params))  # fmt: skip
    found = collectives(text, 8, recipe.mesh.shape["slices"])
    between = sum(c.sent for c in found if c.between_slices)
    assert between == 0 or recipe.mesh.shape["slices"] > 1
    if recipe.mesh.shape["fsdp"] == 1:
        # The update of the parameters, and the few arrays that activations need.
        assert sum(c.size for c in found if c.kind == "all-gather") < 1.5 * size


def test_the_state_is_updated_in_place(compiled):
    _, (state, _, _), lowered = compiled
    size = sum(int(np.prod(leaf.sharding.shard_shape(leaf.shape))) * leaf.dtype.itemsize
               for leaf in jax.tree.leaves(state))  # fmt: skip
    assert lowered.compile().memory_analysis().alias_size_in_bytes == size


def test_the_partitioner_copies_nothing_whole_to_move_it(compiled, capfd):
    compiled[2].compile()
    told = capfd.readouterr().err
    assert "rematerialization" not in told, told
