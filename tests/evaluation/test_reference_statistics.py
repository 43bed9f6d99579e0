"""Reference statistics in the layouts of others, and what is refused of them."""

import os
import pathlib
import pickle

import jax.numpy as jnp
import numpy as np
import pytest

from dmf.checkpoints.convert import numpy_pickles
from dmf.errors import InputError
from dmf.evaluation.reference_statistics import read_reference
from dmf.models.encoders.inception import resize_for_inception

RANDOM = np.random.default_rng(0)


def moments(d: int) -> tuple[np.ndarray, np.ndarray]:
    x = RANDOM.normal(size=(4 * d, d))
    return x.mean(0), np.cov(x.T)


FID, SFID = moments(6), moments(5)
LAYOUTS = {
    "adm.npz": {"mu": FID[0], "sigma": FID[1], "mu_s": SFID[0], "sigma_s": SFID[1],
                "arr_0": np.zeros((3, 4, 4, 3), np.uint8)},
    "plain.npz": {"mu": FID[0], "sigma": FID[1]},
    "reference.npz": {"ref_mu": FID[0].astype("f"), "ref_sigma": FID[1].astype("f")},
}  # fmt: skip


def written(folder: pathlib.Path, name: str, **arrays: np.ndarray) -> pathlib.Path:
    np.savez(folder / name, **arrays)
    return folder / name


@pytest.mark.parametrize("name", LAYOUTS)
def test_npz(tmp_path, name):
    reference = read_reference(written(tmp_path, name, **LAYOUTS[name]))
    np.testing.assert_allclose(reference.moments["pool3"].mean, FID[0], rtol=1e-6)
    np.testing.assert_allclose(reference.moments["pool3"].covariance, FID[1], rtol=1e-5)
    assert reference.moments["pool3"].covariance.dtype == np.float64
    assert ("spatial" in reference.moments) == (reference.images is not None) == (name == "adm.npz")
    assert reference.name == name


@pytest.mark.parametrize("protocol", range(2, 6))
@pytest.mark.parametrize("order", ["C", "F"])
def test_pkl(tmp_path, protocol, order):
    contents = {
        "fid": {"mu": FID[0], "sigma": np.asarray(FID[1], order=order)},
        "fd_dinov2": {"mu": SFID[0], "sigma": SFID[1]},
    }
    path = tmp_path / "edm2.pkl"
    path.write_bytes(pickle.dumps(contents, protocol=protocol))
    reference = read_reference(path)
    np.testing.assert_array_equal(reference.moments["pool3"].covariance, FID[1])
    np.testing.assert_array_equal(reference.moments["dinov2"].mean, SFID[0])


class Harmful:
    def __reduce__(self):
        return os.system, ("touch harmed",)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (Harmful(), "refused global"),
        ({"fid": {"mu": np.array([Harmful()], object)}}, "NumPy of a type|refused global"),
        (np.ma.masked_array([1.0]), "refused global"),
        (np.random.default_rng(0), "refused global"),
    ],
)
def test_a_pickle_runs_nothing(tmp_path, monkeypatch, value, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.pkl").write_bytes(pickle.dumps(value))
    with pytest.raises(InputError, match=message) as error:
        read_reference(tmp_path / "bad.pkl")
    assert "\n" not in str(error.value)
    assert "bad.pkl" in str(error.value)
    assert not (tmp_path / "harmed").exists()


def test_mutated_pickles_give_clean_errors(tmp_path):
    good = pickle.dumps({"fid": {"mu": FID[0], "sigma": FID[1]}})
    path, draw = tmp_path / "mutated.pkl", np.random.default_rng(1)
    refused = 0
    for _ in range(300):
        data = bytearray(good)
        for place in draw.integers(0, len(data), 2):
            data[place] = draw.integers(0, 256)
        path.write_bytes(data[: draw.integers(1, len(data) + 1)])
        try:
            numpy_pickles.read(path)
        except InputError:
            refused += 1
    assert refused > 100


BAD = {
    "nothing": ({"a": FID[0]}, "it has a; give an .npz with mu and sigma"),
    "shapes": ({"mu": FID[0], "sigma": SFID[1]}, "which are no moments"),
    "integers": ({"mu": np.arange(6), "sigma": FID[1]}, "which are no moments"),
    "infinite": ({"mu": FID[0] * np.inf, "sigma": FID[1]}, "pool3 holds NaN or infinity"),
    "asymmetric": ({"mu": FID[0], "sigma": np.triu(FID[1])}, "is not symmetric"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_are_no_statistics(tmp_path, name):
    arrays, message = BAD[name]
    with pytest.raises(InputError, match=message):
        read_reference(written(tmp_path, "bad.npz", **arrays))


def test_files_that_are_none(tmp_path):
    with pytest.raises(InputError, match="there is no such file"):
        read_reference(tmp_path / "nothing.npz")
    (tmp_path / "text.npz").write_text("hello")
    with pytest.raises(InputError, match="no .npz, or a damaged one"):
        read_reference(tmp_path / "text.npz")
    (tmp_path / "other.pkl").write_bytes(pickle.dumps([1, 2]))
    with pytest.raises(InputError, match="no statistics in it"):
        read_reference(tmp_path / "other.pkl")


# How images are resized for Inception.


@pytest.mark.parametrize("side", [32, 256, 299, 400])
def test_resizing_one_by_one(side):
    images = RANDOM.integers(0, 256, (1, side, side, 2)).astype(np.uint8)
    resized = np.asarray(resize_for_inception(jnp.asarray(images)))
    assert resized.shape == (1, 299, 299, 2)
    for i, j in ((0, 0), (7, 130), (298, 298), (150, 298)):
        (y, fy), (x, fx) = (divmod(np.float32(side / 299) * k, 1) for k in (i, j))
        y, x = int(y), int(x)
        below, right = min(y + 1, side - 1), min(x + 1, side - 1)
        pixels = images[0].astype(float)
        top = pixels[y, x] * (1 - fx) + pixels[y, right] * fx
        bottom = pixels[below, x] * (1 - fx) + pixels[below, right] * fx
        expected = (top * (1 - fy) + bottom * fy - 128) / 128
        np.testing.assert_allclose(resized[0, i, j], expected, atol=2e-4)


def test_an_image_of_the_right_size_is_only_scaled():
    images = RANDOM.integers(0, 256, (1, 299, 299, 3)).astype(np.uint8)
    expected = (images.astype(float) - 128) / 128
    np.testing.assert_allclose(resize_for_inception(jnp.asarray(images)), expected, atol=1e-6)
