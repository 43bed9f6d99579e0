"""TAESD: golden values, published names, the config of diffusers, and its errors."""

import dataclasses
import math

import diffusers_deterministic as dd
import golden_values as gv
import jax.numpy as jnp
import latent_run
import numpy as np
import pytest
from safetensors.numpy import save_file

from dmf.checkpoints.convert import namings
from dmf.checkpoints.convert.tables.taesd import NAMINGS, infer_network
from dmf.errors import InputError
from dmf.models import TAESD, Autoencoder
from dmf.models.encoders.latent_scaling import LatentScaling

(NAMING,) = NAMINGS
SMALL = TAESD(width=8, encoder_blocks=(1, 2, 0), decoder_blocks=(2, 0, 1))
FLAT = TAESD(channels=1, latent_channels=2, width=4, encoder_blocks=(0,), decoder_blocks=(2,))


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> namings.Converted:
    return dd.read(dd.golden_directory("taesd", tmp_path_factory.mktemp("taesd")))


def test_golden_values(found):
    """From a directory as diffusers writes it to latents, images, and the same tensors again."""
    assert found.network == SMALL and isinstance(found.network, Autoencoder)
    golden = gv.load("taesd_0")
    assert np.abs(golden["z"]).max() > 3, "no latent would be limited"
    dd.assert_same_outputs(found, golden)
    back = namings.to_named_tensors(found.network, found.params, NAMING)
    for name, shape in golden.config["names"].items():
        drawn = gv.drawn_weights(name, shape, seed=golden.config["seed"])
        np.testing.assert_array_equal(back.pop(name), drawn, err_msg=name)
    assert not back


@pytest.mark.slow
@pytest.mark.parametrize("name", ["taesd", "taesd3"])
def test_diffusers_computes_the_same(name, tmp_path):
    """Outputs, and the tensors of a round trip, which diffusers loads again."""
    torch = pytest.importorskip("torch", reason="needs torch and diffusers")
    pytest.importorskip("diffusers", reason="needs torch and diffusers")
    network = dd.autoencoder(name)
    network.save_pretrained(tmp_path)
    found = dd.read(tmp_path)
    dd.assert_same_outputs(found, dd.outputs(network))
    stated = network.config
    expected = LatentScaling(scale=stated.scaling_factor, shift=stated.shift_factor)
    assert found.network.default_scaling == expected
    back = namings.to_named_tensors(found.network, found.params, found.naming)
    network.load_state_dict({key: torch.from_numpy(w) for key, w in back.items()}, strict=True)


@pytest.mark.slow
def test_bfloat16_is_close(found):
    network = dataclasses.replace(found.network, dtype="bfloat16")
    dd.assert_same_outputs(dataclasses.replace(found, network=network), gv.load("taesd_0"), 5e-2)


def test_the_published_network():
    sizes = [math.prod(entry.shape) for entry in NAMING.table(TAESD()).values()]
    assert (TAESD().factor, sum(sizes)) == (8, 2_445_063)


@pytest.mark.parametrize("network", [TAESD(), SMALL, FLAT], ids=["published", "small", "flat"])
def test_the_network_is_inferred(network):
    shapes = {name: entry.shape for name, entry in NAMING.table(network).items()}
    assert infer_network(shapes, {}) == network
    with pytest.raises(InputError, match=f"^width=9: its tensors say {network.width}$"):
        infer_network(shapes, {"width": 9})


@pytest.mark.parametrize(("fields", "message"), [
    ({"width": 0}, "width=0: give a whole number >= 1"),
    ({"encoder_blocks": ()}, r"encoder_blocks=\(\): give a whole number >= 0 for each of at least"),
    ({"decoder_blocks": (1, -1, 1, 1)}, r"decoder_blocks=.*: give a whole number >= 0 for each of"),
    ({"decoder_blocks": (1, 1)}, r"decoder_blocks=\(1, 1\): give as many levels as encoder_bl"),
    ({"default_scaling": LatentScaling(mean=(0.0,) * 3, std=(1.0,) * 3)},
     "default_scaling=.*: give a mean and a std for each of latent_channels=4"),
    ({"dtype": "float16"}, "dtype=float16: choose one of float32, bfloat16"),
])  # fmt: skip
def test_fields_are_checked(fields, message):
    with pytest.raises(InputError, match=f"^{message}"):
        TAESD(**fields)


@pytest.mark.parametrize(("method", "shape", "message"), [
    ("encode", (1, 8, 10, 3), r"images have shape \(1, 8, 10, 3\): .* multiples of 4$"),
    ("encode", (1, 8, 8, 1), r"images have shape .*: give \[b, h, w, 3\]"),
    ("decode", (1, 2, 2, 3), r"latents have shape \(1, 2, 2, 3\): give \[b, h, w, 4\]$"),
])  # fmt: skip
def test_inputs_of_other_shapes_are_refused(method, shape, message):
    with pytest.raises(InputError, match=f"^{message}"):
        getattr(SMALL, method)({}, jnp.zeros(shape))


@pytest.mark.parametrize(("changes", "message"), [
    ({"_class_name": "VQModel"}, "_class_name=VQModel: only AutoencoderTiny is known"),
    ({"encoder_block_out_channels": [8, 8, 16]}, "only one width of all levels is known"),
    ({"decoder_block_out_channels": [4] * 3}, "decoder_block_out_channels=4: another field says 8"),
    ({"num_encoder_blocks": [1, 3, 0]}, r"encoder_blocks=\(1, 3, 0\): its tensors say \(1, 2, 0\)"),
    ({"num_encoder_blocks": 3}, "num_encoder_blocks=3: give "),
    ({"num_decoder_blocks": [2, 0]}, r"decoder_blocks=\(2, 0\): its tensors say \(2, 0, 1\)"),
    ({"latent_channels": 16}, "latent_channels=16: its tensors say 4"),
    ({"latent_channels": True}, "latent_channels=True: give a whole number"),
    ({"act_fn": "silu"}, "act_fn=silu: only relu is known"),
    ({"upsampling_scaling_factor": 4}, "upsampling_scaling_factor=4: only 2 is known"),
    ({"gain": 2}, "gain=2: the field is not known, and may change the network"),
    ({"scaling_factor": "much"}, "it is no scaling of latents"),
])  # fmt: skip
def test_a_config_that_fits_no_taesd(tmp_path, changes, message):
    with pytest.raises(InputError, match=message) as error:
        dd.read(dd.golden_directory("taesd", tmp_path, **changes))
    assert "\n" not in str(error.value)


def parts(part: str, prefix: str) -> dict[str, np.ndarray]:
    """The tensors of the encoder or the decoder alone under other names."""
    names = gv.load("taesd_0").config["names"]
    first = 1 if part == "decoder" and not prefix else 0  # the decoder limits latents at first
    places = ((name.removeprefix(f"{part}.layers.").partition("."), shape)
              for name, shape in names.items() if name.startswith(part))
    return {f"{prefix}{int(place) + first}.{rest}": np.zeros(shape, "f")
            for (place, _, rest), shape in places}


@pytest.mark.parametrize("part", ["encoder", "decoder"])
@pytest.mark.parametrize("released", [True, False], ids=["released", "diffusers"])
def test_a_part_alone(tmp_path, part, released):
    """Files of diffusers, and those of the first release, whose names lack the part."""
    file = tmp_path / "part.safetensors"
    save_file(parts(part, "" if released else f"{part}.layers."), file)
    with pytest.raises(InputError, match=f"^it holds the {part} of an autoencoder .TAESD. without"):
        dd.read(file)


@pytest.mark.slow
def test_prepare_train_sample_and_decode(tmp_path):
    latent_run.check(dd.golden_directory("taesd", tmp_path), tmp_path, channels=4, factor=4)
