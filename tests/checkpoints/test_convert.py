"""Checkpoints of other projects, from the file to a network that can be called, and out again."""

import os

import golden_values as gv
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
import tiny
from flax.traverse_util import unflatten_dict
from safetensors.numpy import load_file, save_file

import dmf
from dmf.checkpoints import load
from dmf.checkpoints import params as stored_params
from dmf.checkpoints.convert import namings
from dmf.checkpoints.convert.name_tables import ParamSlice, to_params
from dmf.checkpoints.convert.tables import dit
from dmf.default_config import get_config
from dmf.models.abstract_params import abstract_params
from dmf.models.dit import SIZES, DiT

TINY = {"input_size": 8, "channels": 4, "depth": 3, "width": 24, "heads": 2, "num_classes": 5}
PT = gv.FOLDER / "dmf_tiny.pt"
OF_DMF_TINY = ("--num-heads=4", "--split-depth=2")


def tensors_of(network, table) -> dict[str, np.ndarray]:
    """Random tensors of every name of a table, about as large as trained ones; fixed ones as they
    are."""
    draw = np.random.default_rng(0).standard_normal

    def random(shape):
        return (draw(shape) / np.sqrt(max(np.prod(shape[1:]), 10))).astype("f")

    return {
        name: random(entry.shape) if isinstance(entry, ParamSlice) else entry.value
        for name, entry in table(network).items()
        if isinstance(entry, ParamSlice) or entry.value is not None
    }


def converted(tmp_path, source, *flags: str):
    """The export that `dmf convert` makes."""
    output = tmp_path / "converted"
    assert tiny.dmf("convert", source, f"--output={output}", *flags) == 0
    return output


def refused(capsys, tmp_path, source, *flags: str) -> str:
    """The one line with which `dmf convert` refuses; nothing is left behind."""
    before = sorted(os.listdir(tmp_path))
    assert tiny.dmf("convert", source, f"--output={tmp_path}/converted", *flags) == 2
    line = capsys.readouterr().err.strip()
    assert "\n" not in line
    assert sorted(os.listdir(tmp_path)) == before
    return line


def same(ours, theirs) -> None:
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


# Golden values, through the converter.


def flow_map_of(directory):
    flow_map, config = dmf.load(directory)
    return jax.jit(lambda *inputs: flow_map(*inputs)), config


def test_a_pytorch_file_of_dmf(tmp_path):
    golden = gv.load("dmf_tiny")
    flow_map, config = flow_map_of(converted(tmp_path, PT, *OF_DMF_TINY))
    t, r = golden.vector("t"), golden.vector("r")
    u = flow_map(golden.images("x"), t, r, golden.labels("y"))
    gv.assert_each_near(u, golden.images("u"), 1e-5)
    assert config.model.split_depth == golden.config["dmf_depth"]
    assert config.latents.scale == 0.18215


@pytest.mark.slow
def test_a_training_file_of_repa(tmp_path):
    """Its average is taken, whatever the other parts hold."""
    golden = gv.load("sit_repa_tiny")
    average = {f"ema.{name}": w for name, w in golden.below("params").items()}
    other = {f"model.{name}": np.zeros_like(w) for name, w in golden.below("params").items()}
    save_file({**average, **other}, tmp_path / "repa.safetensors")
    depth = golden.config["repa_depth"]
    flags = ("--key=ema", f"--num-heads={golden.config['model']['num_heads']}",
             f"--alignment-depth={depth}")
    network, _, params = load.load_network(
        converted(tmp_path, tmp_path / "repa.safetensors", *flags)
    )
    t = golden.vector("t")
    v, features = jax.jit(network.apply_with_features)(
        params, golden.images("x"), t, t, golden.labels("y")
    )
    gv.assert_each_near(v, golden.images("v"), 1e-5)
    gv.assert_each_near(features, golden["features"], 1e-5)


@pytest.mark.parametrize("name", [
    pytest.param("meanflow_tiny", marks=pytest.mark.slow), "meanflow_tiny_kappa"])
def test_an_orbax_directory_of_meanflow(tmp_path, name):
    """Of whole training states; the average of the last one is taken."""
    golden = gv.load(name)
    right = unflatten_dict(golden.below("params"), sep="/")
    wrong = jax.tree.map(np.zeros_like, right)
    for step, average in ((900, wrong), (1000, right)):
        state = {
            "step": step,
            "params": {"params": wrong},
            "ema_params": {"params": average},
            "opt_state": [{"mu": np.ones(3)}, {}],
        }
        ocp.PyTreeCheckpointer().save(tmp_path / f"run/checkpoint_{step}", state)
    size = golden.config["model"]
    flags = (f"--num-heads={size['num_heads']}", f"--input-size={size['input_size']}")
    flow_map, config = flow_map_of(converted(tmp_path, tmp_path / "run", *flags))
    assert config.model.conditioning == "meanflow"
    t, r = golden.vector("t"), golden.vector("r")
    u = flow_map(jnp.asarray(golden["data"], jnp.float32), t, r, golden.labels("y"))
    gv.assert_each_near(u, golden["u_at_data"], 1e-5)


@pytest.mark.parametrize("average", ["ema", "swa_net", "state_dict.ema_model.module"])
def test_the_part_that_was_converted_is_said(tmp_path, capsys, average):
    """The EMA parameters, whatever they are called."""
    golden = gv.load("dmf_tiny").below("params")
    raw = {f"state_dict.model.{name}": np.zeros_like(w) for name, w in golden.items()}
    path = tmp_path / "state.safetensors"
    save_file(raw | {f"{average}.{name}": w for name, w in golden.items()}, path)
    output = converted(tmp_path, path, *OF_DMF_TINY)
    part = average.removesuffix(".module")
    assert f"read as dmf; part '{part}', its EMA parameters; " in capsys.readouterr().err
    bias = load.load_network(output)[2]["patch_embedding"]["bias"]
    np.testing.assert_array_equal(bias, golden["x_embedder.proj.bias"])


def test_an_average_that_is_not_known_is_no_raw_network(tmp_path, capsys):
    golden = gv.load("dmf_tiny").below("params")
    raw = {f"model.{name}": np.zeros_like(w) for name, w in golden.items()}
    nameless = {f"model_ema.{name.replace('.', '')}": w for name, w in golden.items()}
    save_file(raw | nameless, tmp_path / "state.safetensors")
    line = refused(capsys, tmp_path, tmp_path / "state.safetensors", *OF_DMF_TINY)
    assert "'model_ema' seems to hold EMA parameters" in line and "give --key=model for" in line


def test_a_part_of_an_orbax_directory_is_named(tmp_path, capsys):
    params = unflatten_dict(gv.load("meanflow_tiny").below("params"), sep="/")
    state = {"params": params, "ema_slow": params, "ema_fast": params, "step": np.int32(3)}
    ocp.PyTreeCheckpointer().save(tmp_path / "run", state)
    line = refused(capsys, tmp_path, tmp_path / "run")
    assert "several of its parts could be meant; give one of --key=ema_fast, --key=ema_slow" in line
    assert "it has no part 'swa' with tensors; it has ema_fast, ema_slow, params, step" in refused(
        capsys, tmp_path, tmp_path / "run", "--key=swa"
    )


FROZEN = {
    "autoencoder_kl": (gv.autoencoder_tensors, "--groups=8"),
    "dinov2": (gv.dinov2_tensors, "--num-heads=4"),
    "inception": (gv.inception_tensors, "--key="),
}


@pytest.mark.parametrize("name", [
    "autoencoder_kl", "dinov2", pytest.param("inception", marks=pytest.mark.slow)
])
def test_a_frozen_network(tmp_path, name):
    """Its golden values are those of the parameters that its table gives, which are these."""
    tensors, flag = FROZEN[name]
    save_file(tensors(), tmp_path / "frozen.safetensors")
    network, params = load.load_encoder(
        converted(tmp_path, tmp_path / "frozen.safetensors", flag), name
    )
    table = namings.naming_of(network, namings.detect_naming(tensors()).name).table(network)
    same(params, to_params(table, tensors(), abstract_params(network)))


# SiT of its first authors: another sign, another direction of time.


def test_sit_is_our_flow_model_backwards(tmp_path):
    model = DiT(**TINY)
    tensors = tensors_of(model, dit.sit_table)
    theirs = dict(tensors)
    for name in ("final_layer.linear.weight", "final_layer.linear.bias"):
        used = tensors[name].reshape(4, 2, 4, *tensors[name].shape[1:])[:, 0]
        theirs[name] = used.reshape(16, *tensors[name].shape[1:])
    unfolded = dit.from_pytorch(model, theirs)
    save_file(tensors, tmp_path / "sit.safetensors")
    flow_map, config = flow_map_of(
        converted(tmp_path, tmp_path / "sit.safetensors", "--num-heads=2", "--naming=sit")
    )
    assert config.model.conditioning == "flow"
    x = jax.random.normal(jax.random.key(0), (4, 8, 8, 4))
    t, y = jnp.asarray([0.0, 0.3, 0.77, 1.0]), jnp.arange(4)
    expected = -jax.jit(model.apply)(unfolded, x, 1 - t, t, y)
    gv.assert_each_near(flow_map(x, t, t, y), expected, 1e-6)


# Round trips.

NETWORKS = {
    "dmf": DiT(
        **TINY, conditioning="decoupled", split_depth=2, learned_variance=True, qk_norm=True
    ),
    "sit": DiT(**TINY),
    "meanflow": DiT(**TINY, conditioning="meanflow"),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_there_and_back(name):
    network = NETWORKS[name]
    naming = namings.naming_of(network, name)
    tensors = tensors_of(network, naming.table)
    given = {"heads": 2} | ({"input_size": 8} if name == "meanflow" else {})
    given |= {"split_depth": 2} if name == "dmf" else {}
    assert namings.detect_naming(tensors) is naming
    conversion = namings.from_named_tensors(tensors, given, naming=name)
    assert conversion.network == network
    back = namings.to_named_tensors(network, conversion.params, naming)
    assert back.keys() == tensors.keys()
    for tensor, values in tensors.items():
        if name == "sit" and tensor.startswith("final_layer.linear"):
            shape = (4, 2, 4, *values.shape[1:])
            assert not back[tensor].reshape(shape)[:, 1].any()
            np.testing.assert_array_equal(
                back[tensor].reshape(shape)[:, 0], values.reshape(shape)[:, 0]
            )
        elif name == "sit" and tensor == "t_embedder.mlp.0.weight":
            gv.assert_near(back[tensor], values, 1e-6)
        else:
            np.testing.assert_array_equal(back[tensor], values, err_msg=tensor)


def test_out_as_safetensors_and_in_again(tmp_path):
    """With the published names, and equal to the bit; the config comes back too."""
    one = converted(tmp_path, PT, *OF_DMF_TINY)
    assert tiny.dmf(
        "export", f"--checkpoint={one}", f"--output={tmp_path}/st", "--format=safetensors"
    ) == 0
    golden = gv.load("dmf_tiny").below("params")
    written = load_file(tmp_path / "st/model.safetensors")
    assert written.keys() == golden.keys()
    for name, values in golden.items():
        assert written[name].dtype == np.float32
        assert written[name].shape == values.shape
        if name != dit.POSITIONS:
            np.testing.assert_array_equal(written[name], values, err_msg=name)
    assert tiny.dmf("convert", tmp_path / "st", f"--output={tmp_path}/two") == 0
    same(load.load_network(one)[2], load.load_network(tmp_path / "two")[2])
    assert stored_params.read_config(one) == stored_params.read_config(tmp_path / "two")
    with ocp.StandardCheckpointer() as reader:
        same(reader.restore(one / "params"), reader.restore(tmp_path / "two/params"))


def test_a_flow_model_of_ours_becomes_a_flow_map(tmp_path):
    assert tiny.dmf(
        "convert", tiny.flow_run(), f"--output={tmp_path}/map", "--split-depth=1"
    ) == 0
    _, config, params = load.load_network(tmp_path / "map")
    assert (config.model.conditioning, config.model.split_depth) == ("decoupled", 1)
    same(params, load.load_network(tiny.flow_run())[2])


# The architecture, from the shapes.


class Shape:
    """A tensor that has only a shape."""

    dtype = np.dtype(np.float32)

    def __init__(self, shape):
        self.shape = shape

    def __array__(self, dtype=None, copy=None):
        raise AssertionError("its values are not needed to tell the architecture")


def shapes_of(network, table) -> dict[str, Shape]:
    return {
        name: Shape(entry.shape if isinstance(entry, ParamSlice) else entry.value.shape)
        for name, entry in table(network).items()
        if isinstance(entry, ParamSlice) or entry.value is not None
    }


@pytest.mark.parametrize("patch", [2, 4, 8])
@pytest.mark.parametrize("size", SIZES)
def test_every_published_size_is_read_from_its_shapes(size, patch):
    network = DiT(
        input_size=32, channels=4, patch_size=patch, num_classes=1000, **SIZES[size]
    )
    for table in (dit.pytorch_table, dit.sit_table, dit.jax_table):
        shapes = shapes_of(network, table)
        naming = namings.detect_naming(shapes)
        read = naming.infer_network({name: s.shape for name, s in shapes.items()}, {})
        assert naming.table is table
        assert read == network


@pytest.mark.parametrize(("side", "shift"), [(32, 1.0), (64, 1.5)])
def test_images_of_512_are_sampled_with_a_shift(side, shift):
    defaults = load.config_to_json(get_config())
    config = load.export_config(DiT(**{**TINY, "input_size": side}), {}, defaults)
    assert config["sampling"]["shift"] == shift
    assert config["data"]["name"] == f"imagenet_latents_{8 * side}"


def test_released_flow_maps_are_split_where_they_were_published():
    network = DiT(
        **{**TINY, **SIZES["XL"]},
        conditioning="decoupled", split_depth=20, learned_variance=True, qk_norm=True,
    )  # fmt: skip
    shapes = {n: s.shape for n, s in shapes_of(network, dit.pytorch_table).items()}
    assert dit.infer_pytorch_network(shapes, {}) == network
    assert dit.infer_pytorch_network(shapes, {"split_depth": 18}).split_depth == 18


@pytest.mark.parametrize(("size", "blocks"), [("B", 4), ("L", 8), ("XL", 8)])
def test_an_aligned_flow_model_is_aligned_where_it_was_published(size, blocks):
    network = DiT(**{**TINY, **SIZES[size]}, alignment_depth=blocks)
    shapes = {n: s.shape for n, s in shapes_of(network, dit.pytorch_table).items()}
    assert dit.infer_pytorch_network(shapes, {}) == network


# The hub.


def hub(tmp_path) -> str:
    """A cache as huggingface_hub lays it out, with one file."""
    repository = tmp_path / "hub" / "models--someone--maps"
    snapshot = repository / "snapshots" / "0123abc"
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs/main").write_text("0123abc")
    (snapshot / "dmf.pt").write_bytes(PT.read_bytes())
    return f"HF_HUB_CACHE={tmp_path}/hub HF_HUB_OFFLINE=1"


@pytest.mark.slow
def test_the_hub(tmp_path):
    """From its cache without a network; what is not there is one line."""
    settings = dict(setting.split("=") for setting in hub(tmp_path).split())
    code = (
        f"import os; os.environ.update({settings!r})\n"
        "from dmf.cli import convert, exit_codes\n"
        f"for file, out in (('dmf.pt', 'one'), ('other.pt', 'two')):\n"
        "    print(exit_codes.run(convert.main, 'convert', ['hf:someone/maps/' + file,\n"
        f"        '--output={tmp_path}/' + out, *{OF_DMF_TINY!r}]))\n"
    )
    done = tiny.process(code=code)
    assert done.stdout.splitlines() == [str(tmp_path / "one"), "0", "2"], done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("dmf convert: hf:someone/maps/other.pt: it cannot be downloaded")
    assert (tmp_path / "one/params").exists()
    assert not (tmp_path / "two").exists()


@pytest.mark.parametrize("source", ["hf:", "hf:owner", "hf:owner/repo/", "hf:owner/repo@v1/"])
def test_an_address_of_the_hub_is_complete(tmp_path, capsys, source):
    assert "give hf:OWNER/REPO/FILE" in refused(capsys, tmp_path, source)
