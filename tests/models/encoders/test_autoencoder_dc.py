"""DC-AE: golden values, published names, the config of diffusers, and its errors."""

import dataclasses

import diffusers_deterministic as dd
import golden_values as gv
import jax.numpy as jnp
import latent_run
import numpy as np
import pytest
from safetensors.numpy import save_file

from dmf.checkpoints.convert import namings
from dmf.checkpoints.convert.tables.autoencoder_dc import NAMINGS, infer_network, read_config
from dmf.errors import InputError
from dmf.models import Autoencoder, AutoencoderDC
from dmf.models.encoders.latent_scaling import LatentScaling

(NAMING,) = NAMINGS
SMALL = AutoencoderDC(latent_channels=4, widths=(8, 16, 16), encoder_layers=(1, 1, 2),
                      decoder_layers=(1, 1, 2), attention_from=2, head_dim=8)
IMAGENET = dataclasses.replace(
    SMALL, encoder_layers=(0, 1, 1), decoder_layers=(0, 2, 1), attention_scales=(),
    batch_norm=True, downsample="unshuffle", upsample="shuffle",
    default_scaling=LatentScaling(scale=0.25),
)  # fmt: skip
F64C128 = AutoencoderDC(
    latent_channels=128, widths=(128, 256, 512, 512, 1024, 1024, 2048),
    encoder_layers=(0, 4, 8, 2, 2, 2, 2), decoder_layers=(0, 5, 10, 2, 2, 2, 2),
    attention_scales=(), batch_norm=True, downsample="unshuffle", upsample="shuffle",
)  # fmt: skip


def test_golden_values(tmp_path):
    """From a directory as diffusers writes it to latents, images, and the same tensors again."""
    found, golden = dd.read(dd.golden_directory("dc_sana", tmp_path)), gv.load("autoencoder_dc_0")
    assert found.network == SMALL and isinstance(found.network, Autoencoder)
    dd.assert_same_outputs(found, golden)
    back = namings.to_named_tensors(found.network, found.params, NAMING)
    for name, shape in golden.config["names"].items():
        drawn = gv.drawn_weights(name, shape, seed=golden.config["seed"])
        np.testing.assert_array_equal(back.pop(name), drawn, err_msg=name)
    assert not back


@pytest.mark.slow
@pytest.mark.parametrize("side", [8, 32])
@pytest.mark.parametrize(("name", "network"), [("dc_sana", SMALL), ("dc_imagenet", IMAGENET)])
def test_diffusers_computes_the_same(name, network, side, tmp_path):
    """Outputs for few and for many pixels, and a round trip, which diffusers loads again."""
    torch = pytest.importorskip("torch", reason="needs torch and diffusers")
    pytest.importorskip("diffusers", reason="needs torch and diffusers")
    theirs = dd.autoencoder(name)
    theirs.save_pretrained(tmp_path)
    found = dd.read(tmp_path)
    assert found.network == network
    dd.assert_same_outputs(found, dd.outputs(theirs, side))
    back = namings.to_named_tensors(found.network, found.params, found.naming)
    theirs.load_state_dict({key: torch.from_numpy(w) for key, w in back.items()}, strict=True)


@pytest.mark.parametrize("network", [AutoencoderDC(), F64C128, SMALL, IMAGENET],
                         ids=["f32c32", "f64c128", "small", "imagenet"])
def test_the_network_is_inferred(network):
    shapes = {name: getattr(entry, "shape", None) or () for name, entry in
              NAMING.table(network).items()}
    stated = {"head_dim": network.head_dim, "default_scaling": network.default_scaling,
              "widths": network.widths}
    assert infer_network(shapes, stated) == network
    with pytest.raises(InputError, match="^latent_channels=9: its tensors say "):
        infer_network(shapes, {"latent_channels": 9})


def test_the_published_networks():
    assert (AutoencoderDC().factor, F64C128.factor) == (32, 64)
    assert AutoencoderDC().default_scaling == LatentScaling(scale=0.41407)


@pytest.mark.parametrize(("network", "scale"), [(SMALL, 0.41407), (IMAGENET, 1.0)])
def test_a_scaling_that_is_not_stated(network, scale):
    """Without a config.json it is that of SANA for its networks; the default of diffusers is 1."""
    shapes = {name: getattr(entry, "shape", None) or () for name, entry in
              NAMING.table(network).items()}
    assert infer_network(shapes, {"head_dim": 8}).default_scaling == LatentScaling(scale=scale)
    assert read_config({"attention_head_dim": 8}).scaling == LatentScaling()
    assert read_config({}).scaling is None


@pytest.mark.parametrize(("fields", "message"), [
    ({"latent_channels": 7}, "latent_channels=7: it must divide the last of widths="),
    ({"widths": (8,)}, r"widths=\(8,\): give a whole number >= 1 for each of at least two"),
    ({"widths": (8, 64)}, "encoder_layers=.*: give a whole number >= 1 for each of widths="),
    ({"decoder_layers": (1, 0, 1, 1, 1, 1)}, "decoder_layers=.*: give a whole number >= 1 for"),
    ({"widths": (8, 64, 64, 64, 64, 64)}, "widths=.*: each must divide 4 times the one before"),
    ({"head_dim": 48}, r"head_dim=48: it must divide widths=\(128, .* from attention_from on"),
    ({"attention_scales": (4,)}, r"attention_scales=\(4,\): give odd whole numbers >= 1"),
    ({"downsample": "mean"}, "downsample=mean: choose one of conv, unshuffle"),
    ({"upsample": "conv"}, "upsample=conv: choose one of interpolate, shuffle"),
    ({"dtype": "float16"}, "dtype=float16: choose one of float32, bfloat16"),
])  # fmt: skip
def test_fields_are_checked(fields, message):
    with pytest.raises(InputError, match=f"^{message}"):
        AutoencoderDC(**fields)


@pytest.mark.parametrize(("method", "shape", "message"), [
    ("encode", (1, 8, 10, 3), r"images have shape \(1, 8, 10, 3\): .* multiples of 4$"),
    ("decode", (1, 2, 2, 3), r"latents have shape \(1, 2, 2, 3\): give \[b, h, w, 4\]$"),
])  # fmt: skip
def test_inputs_of_other_shapes_are_refused(method, shape, message):
    with pytest.raises(InputError, match=f"^{message}"):
        getattr(SMALL, method)({}, jnp.zeros(shape))


@pytest.mark.parametrize(("changes", "message"), [
    ({"_class_name": "AutoencoderKL"}, "_class_name=AutoencoderKL: only AutoencoderDC is known"),
    ({"encoder_block_types": ["EfficientViTBlock"] + ["ResBlock"] * 2}, "block_types=.* here has"),
    ({"decoder_block_types": ["ResBlock"] * 3}, "decoder_block_types=3: another field says 2"),
    ({"decoder_act_fns": "relu"}, "decoder_act_fns=True: another field says False"),
    ({"decoder_norm_types": "layer_norm"}, "decoder_norm_types=layer_norm: no autoencoder here"),
    ({"downsample_block_type": "mean"}, "downsample_block_type=mean: no autoencoder here has this"),
    ({"encoder_out_shortcut": False}, "encoder_out_shortcut=False: only True is known"),
    ({"attention_head_dim": "8"}, "attention_head_dim=8: give a whole number"),
    ({"gain": 2}, "gain=2: the field is not known, and may change the network"),
])  # fmt: skip
def test_a_config_that_fits_no_autoencoder(changes, message):
    with pytest.raises(InputError, match=message) as error:
        read_config(gv.load("autoencoder_dc_0").config["config"] | changes)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("part", ["encoder", "decoder"])
def test_a_part_alone(tmp_path, part):
    names = gv.load("autoencoder_dc_0").config["names"]
    tensors = {name: np.zeros(shape, "f") for name, shape in names.items() if name.startswith(part)}
    save_file(tensors, tmp_path / "part.safetensors")
    with pytest.raises(InputError, match=f"^it holds the {part} of an autoencoder .DC-AE. without"):
        dd.read(tmp_path / "part.safetensors")


@pytest.mark.slow
def test_prepare_train_sample_and_decode(tmp_path):
    latent_run.check(dd.golden_directory("dc_sana", tmp_path), tmp_path, channels=4, factor=4)
