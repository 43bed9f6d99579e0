"""Published checkpoints of improved MeanFlow and pixel MeanFlow, in and out again."""

import zipfile

import golden_in_context as gic
import golden_values as gv
import jax
import numpy as np
import pytest
from flax import serialization
from flax.traverse_util import unflatten_dict
from safetensors.numpy import load_file
from test_convert import Shape, converted, same

from dmf.checkpoints import export, export_parts, load
from dmf.checkpoints.convert import namings
from dmf.checkpoints.convert.name_tables import ParamSlice
from dmf.checkpoints.convert.open_checkpoint import open_checkpoint
from dmf.checkpoints.convert.tables import in_context_dit as tables
from dmf.default_config import get_config
from dmf.errors import InputError
from dmf.models.in_context_dit import PIXEL_SIZES, SIZES, InContextDiT
from dmf.types import ClassLabels, GuidanceInput, GuidedCondition

PTH = gv.FOLDER / "imf_tiny.pth"
V_LAYER = {"net.v_final_layer.linear._flax_linear.bias", "net.v_final_layer.norm.weight",
           "net.v_final_layer.linear._flax_linear.weight"}  # fmt: skip


def tree(name: str) -> dict:
    return unflatten_dict(gv.load(name).below("params"), sep="/")


def read(tensors, naming: str = "", **fields) -> namings.Converted:
    return namings.from_named_tensors(tensors, fields, naming=naming)


def of_pth() -> namings.Converted:
    return read(open_checkpoint(str(PTH)).tensors, input_size=8)


@pytest.mark.parametrize("name", gic.NAMES)
def test_the_jax_names_are_those_of_the_golden_values(name):
    """Which hold for the parameters that an independent table gives. All shapes tell is told."""
    given = {"input_size": 8} if name == "imf_tiny" else {}
    found = read(gv.load(name).below("params"), **given)
    assert found.naming.name == "imf" and found.network == gic.network(name)
    same(found.params, gic.params(name))
    back = namings.to_named_tensors(found.network, found.params, found.naming)
    theirs = gv.load(name).below("params")
    assert back.keys() == theirs.keys()
    same(back, theirs)


def test_the_pytorch_names():
    """Of a file without the v head: its last layer is dropped, and u is the golden one."""
    found = of_pth()
    assert found.naming.name == "imf-pytorch" and set(found.unused) == V_LAYER
    network = found.network
    assert network == gic.network("imf_tiny", velocity_head=False)
    with np.load(gv.FOLDER / "imf_tiny_pth.npz") as file:
        golden = gv.Golden(dict(file), {})
    guidance = GuidanceInput(*map(golden.vector, ("omega", "t_min", "t_max")))
    y = GuidedCondition(ClassLabels(golden.labels("y"), network.num_classes), guidance)
    u = gv.jit(network.apply)(
        found.params, golden.images("x"), golden.vector("t"), golden.vector("r"), y
    )
    gv.assert_each_near(u, golden.images("u"), 1e-5)


def test_the_pytorch_names_are_written_back():
    """Also those of the layer that nothing uses, which PyTorch wants to find; and of a v head."""
    found, theirs = of_pth(), open_checkpoint(str(PTH)).tensors
    back = namings.to_named_tensors(found.network, found.params, found.naming)
    assert back.keys() == theirs.keys()
    for name, tensor in back.items():
        expected = np.zeros(theirs[name].shape) if name in V_LAYER else np.asarray(theirs[name])
        np.testing.assert_array_equal(tensor, expected, err_msg=name)
    whole, params = gic.network("imf_tiny"), gic.params("imf_tiny")
    pytorch = namings.to_named_tensors(whole, params, namings.naming_of(whole, "imf-pytorch"))
    again = read(pytorch, input_size=8)
    assert again.network == whole and again.naming.name == "imf-pytorch"
    same(again.params, params)
    without = namings.to_named_tensors(found.network, found.params, namings.naming_of(whole, "imf"))
    same(read(without, input_size=8).params, found.params)


def test_the_pytorch_names_of_pixels():
    """As the code has them; the table of rotary positions is dropped."""
    network, params = gic.network("pmf_tiny"), gic.params("pmf_tiny")
    theirs = namings.to_named_tensors(network, params, namings.naming_of(network, "imf-pytorch"))
    assert theirs["net.class_tokens"].shape == (1, 8, 32)
    assert theirs["net.x_embedder.proj1.weight"].shape == (128, 3, 4, 4)
    assert theirs["net.pos_embed"].shape == (1, 36, 32)
    found = read({**theirs, "net.rope_freqs": np.zeros((16, 8), np.complex64)})
    assert found.network == network and found.unused == ("net.rope_freqs",)
    same(found.params, params)


def test_a_zip_of_a_train_state(tmp_path, capsys):
    """The average of the last step, and latents by channel; out as safetensors and in again."""
    right = tree("imf_tiny")
    wrong = jax.tree.map(np.zeros_like, right)
    with zipfile.ZipFile(tmp_path / "iMF-tiny.zip", "w", zipfile.ZIP_DEFLATED) as file:
        for step, average in ((900, wrong), (1000, right)):
            state = {"step": step, "params": wrong, "ema_params": average,
                     "opt_state": {"0": {"count": np.int32(9), "mu": wrong, "nu": wrong}}}
            file.writestr(f"checkpoint_{step}", serialization.msgpack_serialize(state))
    output = converted(tmp_path, tmp_path / "iMF-tiny.zip", "--input-size=8")
    line = capsys.readouterr().err
    assert "read as imf; file checkpoint_1000; part 'ema_params', its EMA parameters; " in line
    network, config, params = load.load_network(output)
    assert network == gic.network("imf_tiny")
    same(params, gic.params("imf_tiny"))
    assert tuple(config.latents.mean) == tables.SCALING.mean == (
        0.86488, -0.27787343, 0.21616915, 0.3738409)
    assert tuple(config.latents.std) == tables.SCALING.std
    assert config.data.name == "imagenet_latents_64" and config.sampling.shift == 1
    assert "in-context transformer" in (output / "README.md").read_text()
    config.model.velocity_head = False
    assert "v_head" not in load.load_network(output, config=config)[2]
    export.write(tmp_path / "out", export_parts.open_parts(output, ""), form="safetensors")
    same(load_file(tmp_path / "out/model.safetensors"), gv.load("imf_tiny").below("params"))
    again = export_parts.read(str(tmp_path / "out"), {}, "", "")
    assert again.network == network and again.config["latents"]["mean"] == list(tables.SCALING.mean)


@pytest.mark.parametrize("name", ["B", "XL"])
def test_published_sizes_are_read_from_their_shapes(name):
    network = InContextDiT(input_size=32, channels=4, num_classes=1000, **SIZES[name])
    for naming in tables.NAMINGS:
        shapes = shapes_of(naming.table(network))
        assert namings.detect_naming(shapes) is naming
        shapes = {name: shape.shape for name, shape in shapes.items()}
        assert naming.infer_network(shapes, {}) == network
        split = naming.infer_network(shapes, {"split_depth": 3})
        assert (split.conditioning, split.split_depth) == ("decoupled", 3)
        for field, value, message in (("heads", 5, "its tensors say"), ("groups", 8, "no such")):
            with pytest.raises(InputError, match=message):
                naming.infer_network(shapes, {field: value})


@pytest.mark.parametrize(("name", "patch"), [("B", 16), ("H", 32)])
def test_published_sizes_of_pixels_are_read_from_their_shapes(name, patch):
    network = InContextDiT(input_size=16 * patch, channels=3, num_classes=1000, patch_size=patch,
                           positions="rotary_2d", prediction="data", **PIXEL_SIZES[name])
    for naming in tables.NAMINGS:
        shapes = shapes_of(naming.table(network))
        assert naming.infer_network({n: s.shape for n, s in shapes.items()}, {}) == network
    config = load.export_config(network, {}, load.config_to_json(get_config()))
    assert config["latents"]["mean"] == [] and config["latents"]["scale"] == 1
    assert config["data"]["name"] == f"imagenet_{16 * patch}"


def shapes_of(table) -> dict[str, Shape]:
    return {name: Shape(entry.shape) for name, entry in table.items()
            if isinstance(entry, ParamSlice)}
