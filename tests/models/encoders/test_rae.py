"""RAE: golden values, the names of diffusers and of the release, its config, and its errors."""

import dataclasses
import json
import math

import diffusers_deterministic as dd
import golden_values as gv
import jax
import jax.numpy as jnp
import latent_run
import numpy as np
import pytest
import tiny
from safetensors.numpy import save_file

from dmf.checkpoints import load
from dmf.checkpoints.convert import namings
from dmf.checkpoints.convert.name_tables import Constant, ParamSlice
from dmf.checkpoints.convert.tables.rae import NAMINGS, read_config
from dmf.data.shard_writer import PrepareSettings
from dmf.errors import InputError
from dmf.models import RAE, Autoencoder
from dmf.models.abstract_params import abstract_params

DIFFUSERS, _, _, RELEASED = NAMINGS
SMALL = RAE(latent_channels=64, side=3, patch_size=4, encoder_depth=2, encoder_heads=1,
            decoder_width=16, decoder_depth=2, decoder_heads=2, decoder_hidden=24)
SIZES = {"S": (384, 12), "B": (768, 12)}


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> namings.Converted:
    return dd.read(dd.golden_directory("rae", tmp_path_factory.mktemp("rae")))


def test_golden_values(found):
    """From a directory as diffusers writes it to latents, images, and the same names again."""
    assert found.network == SMALL and isinstance(found.network, Autoencoder)
    golden = gv.load("rae_0")
    dd.assert_same_outputs(found, golden)
    back = namings.to_named_tensors(found.network, found.params, DIFFUSERS)
    for name, shape in golden.config["names"].items():
        if name == "encoder.embeddings.mask_token":
            assert not back.pop(name).any()
        else:
            tolerance = 1e-6 if name == "_latents_std" else 0
            np.testing.assert_allclose(back.pop(name), dd.drawn(name, shape), rtol=tolerance)
    assert not back


# The names of the release by those of diffusers, in this order.
RENAMED = {
    "decoder.decoder": "decoder", "decoder.trainable": "trainable", "encoder.embed": "embed",
    "encoder.encoder": "encoder", "attention.to_q.": "attention.attention.query.",
    "attention.to_k.": "attention.attention.key.", "attention.to_v.": "attention.attention.value.",
    "attention.to_out.0.": "attention.output.dense.", "q_proj": "attention.query",
    "k_proj": "attention.key", "v_proj": "attention.value", "o_proj": "output.dense",
}  # fmt: skip


def release_tensors() -> dict[str, dict[str, np.ndarray]]:
    """The tensors of the golden values as the three files of the release have them; it has no
    mean."""
    parts = {"encoder": {"layernorm.weight": np.ones(64, "f"), "layernorm.bias": np.ones(64, "f")},
             "decoder": {"decoder_pos_embed": SMALL.positions()[None]},
             "statistics": {"var": (dd.drawn("_latents_std", (64, 3, 3)) + 1e-5) ** 2 - 1e-5}}
    for name, shape in gv.load("rae_0").config["names"].items():
        renamed, tensor = name, dd.drawn(name, shape)
        for theirs, release in RENAMED.items():
            renamed = renamed.replace(theirs, release)
        if name.startswith(("encoder.", "decoder.")):
            parts[name[:7]][renamed] = tensor
    return parts


def test_the_release(found, tmp_path):
    """Its three files, in any order, are the same network as the one file of diffusers."""
    parts = release_tensors()
    encoder, decoder, statistics = (tmp_path / part for part in parts)
    for part, tensors in parts.items():
        (tmp_path / part).mkdir()
        save_file(tensors, tmp_path / part / "model.safetensors")
    (encoder / "config.json").write_text(json.dumps({"num_attention_heads": 1}))
    (decoder / "config.json").write_text(json.dumps(
        {"num_attention_heads": 12, "decoder_num_attention_heads": 2}))
    again = dd.read(encoder, statistics, decoder)
    assert again.network == SMALL and again.naming == RELEASED
    assert again.unused == ("embeddings.mask_token", "layernorm.bias", "layernorm.weight")
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), again.params,
                 found.params)
    back = namings.to_named_tensors(again.network, again.params, RELEASED)
    tensors = parts["encoder"] | parts["decoder"] | parts["statistics"]
    assert tensors.keys() - back.keys() == {"layernorm.weight", "layernorm.bias"}
    assert not back.pop("embeddings.mask_token").any()
    for name, tensor in back.items():
        np.testing.assert_allclose(tensor, tensors[name], rtol=2e-6 if name == "var" else 0)
    for sources, message in (
        ([encoder, decoder], "^it has no statistics of the latents .tensor 'var'.; give the file"),
        ([decoder], "^it holds the decoder of a representation autoencoder .RAE. alone; give"),
        ([statistics], "^it holds the statistics of a representation autoencoder .RAE. alone"),
        ([encoder, encoder], "tensor 'embeddings.* is also in another source$"),
    ):
        with pytest.raises(InputError, match=message):
            dd.read(*sources)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["rae", "rae_16", "rae_mean"])
def test_diffusers_computes_the_same(name, tmp_path):
    """Outputs, with a stored mean and without, and a round trip, which diffusers loads again."""
    torch = pytest.importorskip("torch", reason="needs torch, diffusers and transformers")
    pytest.importorskip("diffusers", reason="needs torch, diffusers and transformers")
    pytest.importorskip("transformers", reason="needs torch, diffusers and transformers")
    theirs = dd.autoencoder(name)
    theirs.save_pretrained(tmp_path)
    found = dd.read(tmp_path)
    assert found.network == dataclasses.replace(SMALL, stored_mean=name == "rae_mean",
                                                side=16 if name == "rae_16" else 3)
    dd.assert_same_outputs(found, dd.outputs(theirs))
    back = namings.to_named_tensors(found.network, found.params, found.naming)
    theirs.load_state_dict({key: torch.from_numpy(w) for key, w in back.items()}, strict=True)


def shapes(naming, network) -> dict[str, tuple[int, ...]]:
    return {name: entry.value.shape if isinstance(entry, Constant) else entry.shape
            for name, entry in naming.table(network).items()
            if isinstance(entry, ParamSlice | Constant)}


@pytest.mark.parametrize("naming", NAMINGS, ids=lambda naming: naming.name)
@pytest.mark.parametrize("size", SIZES)
def test_published_sizes_are_read_from_shapes(naming, size):
    width, depth = SIZES[size]
    network = RAE(latent_channels=width, encoder_depth=depth, encoder_heads=width // 64)
    stored = shapes(naming, network)
    assert naming.infer_network(stored, {}) == network
    filled = sum(math.prod(entry.shape) for entry in naming.table(network).values()
                 if isinstance(entry, ParamSlice))
    assert filled == sum(leaf.size for leaf in jax.tree.leaves(abstract_params(network)))
    with pytest.raises(InputError, match=f"^latent_channels=9: its tensors say {width}$"):
        naming.infer_network(stored, {"latent_channels": 9})


def test_an_unpublished_decoder_needs_its_heads():
    with pytest.raises(InputError, match="^decoder_heads: no published decoder has width 16; a co"):
        RELEASED.infer_network(shapes(RELEASED, SMALL), {})


@pytest.mark.parametrize(("fields", "message"), [
    ({"side": 0}, "side=0: give a whole number >= 1"),
    ({"registers": -1}, "registers=-1: give a whole number >= 0"),
    ({"encoder_heads": 7}, "encoder_heads=7: it must divide latent_channels=768"),
    ({"decoder_heads": 7}, "decoder_heads=7: it must divide decoder_width=1152"),
    ({"decoder_width": 18, "decoder_heads": 1}, "decoder_width=18: give a multiple of 4"),
    ({"dtype": "float16"}, "dtype=float16: choose one of float32, bfloat16"),
])  # fmt: skip
def test_fields_are_checked(fields, message):
    with pytest.raises(InputError, match=f"^{message}"):
        RAE(**fields)


@pytest.mark.parametrize(("method", "shape", "message"), [
    ("encode", (1, 8, 8, 3), r"images have shape \(1, 8, 8, 3\): this RAE takes 12 x 12 alone$"),
    ("encode", (1, 12, 12, 1), r"images have shape .*: give \[b, h, w, 3\]"),
    ("decode", (1, 3, 2, 64), r"latents have shape \(1, 3, 2, 64\): this RAE takes 3 x 3 alone$"),
    ("decode", (1, 3, 3, 3), r"latents have shape \(1, 3, 3, 3\): give \[b, h, w, 64\]$"),
])  # fmt: skip
def test_inputs_of_other_shapes_are_refused(method, shape, message):
    with pytest.raises(InputError, match=f"^{message}"):
        getattr(SMALL, method)({}, jnp.zeros(shape))


@pytest.mark.parametrize(("changes", "message"), [
    ({"_class_name": "AutoencoderKL"}, "_class_name=AutoencoderKL: only AutoencoderRAE is known"),
    ({"encoder_type": "mae"}, "encoder_type=mae: only dinov2 is known"),
    ({"encoder_norm_mean": [0.5] * 3}, r"encoder_norm_mean=\[0.5, 0.5, 0.5\]: only "),
    ({"encoder_input_size": 45}, "encoder_input_size=45: give a multiple of 14"),
    ({"image_size": 16}, "image_size=4: another field says 3"),
    ({"patch_size": "4"}, "patch_size=4: give a whole number"),
    ({"gain": 2}, "gain=2: the field is not known, and may change the network"),
])  # fmt: skip
def test_a_config_that_fits_no_rae(changes, message):
    with pytest.raises(InputError, match=message) as error:
        read_config(gv.load("rae_0").config["config"] | changes)
    assert "\n" not in str(error.value)


@pytest.mark.slow
def test_prepare_train_sample_and_decode(tmp_path):
    latent_run.check(dd.golden_directory("rae", tmp_path), tmp_path, channels=64, factor=4, side=3)


def test_another_size_than_the_network_takes_is_refused():
    """Before anything is encoded or decoded."""
    with pytest.raises(InputError, match="^resolution=16: the autoencoder takes images of 12 alo"):
        PrepareSettings(resolution=16, autoencoder=SMALL)
    assert PrepareSettings(resolution=12, autoencoder=SMALL).stored_shape == (2, 3, 3, 128)
    config = tiny.config({"model.channels": 64, "latents.autoencoder": "runs/rae"})
    with pytest.raises(InputError, match=r"^latents.autoencoder=runs/rae: it takes latents of side "
                       r"3 alone, and config.model has \d+$"):
        load.build_latent_space(config, SMALL)
