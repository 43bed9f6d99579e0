"""Statistics are the same on any number of devices, in any parts, and after interruptions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

from dmf.errors import InputError, NotFinite
from dmf.evaluation import statistics_collector
from dmf.evaluation.feature_extractors import Extractor
from dmf.evaluation.feature_statistics import Statistics
from dmf.evaluation.statistics_collector import StatisticsCollector
from dmf.runtime import resumable_work
from dmf.runtime.resumable_work import claim_folder
from dmf.runtime.sharding import make_mesh
from dmf.sampling.generator import GeneratedImages

COUNT = 50
IMAGES = np.random.default_rng(0).integers(0, 256, (COUNT, 4, 4, 3)).astype(np.uint8)
WEIGHTS = np.random.default_rng(1).normal(size=(48, 6)).astype("f")


def collector(devices: int = 8, chunk_size: int = 3, part_size: int = 12) -> StatisticsCollector:
    """A collector of one kind of features: a projection of the pixels."""

    def apply(params, images):
        return {"pool3": jnp.tanh(images.reshape(len(images), -1) / 255 @ params["weights"])}

    return StatisticsCollector(
        extractor=Extractor(("pool3",), apply, {"weights": WEIGHTS}),
        mesh=make_mesh(devices=jax.devices()[:devices]),
        chunk_size=chunk_size,
        part_size=part_size,
    )


def read(indices: np.ndarray) -> GeneratedImages:
    return GeneratedImages(IMAGES[indices % COUNT], np.ones(len(indices), bool))


def collect(folder, read=read, **options) -> Statistics:
    return collector(**options).collect(
        read, COUNT, epath.Path(folder), feature_strides={"pool3": 1}, name="test"
    )


def bits(statistics: Statistics) -> tuple[bytes, ...]:
    moments = statistics.moments["pool3"]
    return (moments.mean.tobytes(), moments.scatter.tobytes(),
            statistics.features("pool3").tobytes())  # fmt: skip


def test_it_takes_the_features_of_every_image(tmp_path):
    statistics = collect(tmp_path)
    expected = np.tanh(IMAGES.reshape(COUNT, -1) / 255 @ WEIGHTS)
    np.testing.assert_allclose(statistics.features("pool3"), expected, atol=1e-5)
    moments = statistics.moments["pool3"]
    assert moments.count == COUNT
    np.testing.assert_allclose(moments.covariance, np.cov(expected.T), atol=1e-5)
    assert sorted(p.name for p in tmp_path.iterdir()) == [f"{i:05}.npz" for i in range(5)]


def test_to_the_bit_on_any_number_of_devices(tmp_path):
    one, three, eight = (bits(collect(tmp_path / str(n), devices=n)) for n in (1, 3, 8))
    assert one == three == eight


def test_parts_change_no_more_than_rounding(tmp_path):
    parts = [collect(tmp_path / str(n), part_size=n) for n in (1, 17, 100)]
    assert len(list((tmp_path / "17").iterdir())) == 3, "17 images are 18 in chunks of 3"
    scatter = parts[0].moments["pool3"].scatter
    for other in parts[1:]:
        np.testing.assert_array_equal(other.features("pool3"), parts[0].features("pool3"))
        # What cancels leaves the rounding of what was large.
        np.testing.assert_allclose(other.moments["pool3"].scatter, scatter, rtol=1e-12,
                                   atol=1e-14 * np.abs(scatter).max())  # fmt: skip


@pytest.mark.parametrize("devices", [1, 8])
def test_it_goes_on_where_it_was_interrupted(tmp_path, devices):
    whole, firsts = bits(collect(tmp_path / "whole")), []

    def interrupted(indices: np.ndarray) -> GeneratedImages:
        firsts.append(int(indices[0]))
        if len(firsts) == 3:
            raise KeyboardInterrupt
        return read(indices)

    with pytest.raises(KeyboardInterrupt):
        collect(tmp_path / "cut", interrupted, devices=8)
    assert len(list((tmp_path / "cut").glob("*.npz"))) == 2
    firsts.append(0)  # so that nothing is raised any more
    assert bits(collect(tmp_path / "cut", interrupted, devices=devices)) == whole
    assert min(firsts[4:]) == 24, "finished parts are not made again"


def test_parts_that_are_cut_are_made_again(tmp_path):
    whole = bits(collect(tmp_path))
    first, second, *_ = sorted(tmp_path.iterdir())
    first.write_bytes(b"")
    second.write_bytes(second.read_bytes()[:-20])
    assert bits(collect(tmp_path)) == whole


def test_images_that_are_not_finite_are_counted(tmp_path):
    def some_bad(indices: np.ndarray) -> GeneratedImages:
        return GeneratedImages(IMAGES[indices % COUNT], ~np.isin(indices, [14, 20, 40, 50]))

    with pytest.raises(NotFinite, match="2 of images 12 to 23 hold NaN or infinity, the first of "
                                        "them 14"):
        collect(tmp_path, some_bad)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["00000.npz"]


def test_images_that_are_not_finite_in_another_process_are_told_here(tmp_path, monkeypatch):
    said = "1 of images 12 to 23 hold NaN or infinity"
    monkeypatch.setattr(statistics_collector, "all_gather", lambda problem: [problem, said])
    with pytest.raises(NotFinite, match=said):
        collect(tmp_path)


def test_what_lies_beyond_the_last_image_is_not_looked_at(tmp_path):
    def beyond_bad(indices: np.ndarray) -> GeneratedImages:
        inside = indices < COUNT
        images = np.where(inside[:, None, None, None], IMAGES[indices % COUNT], 7)
        return GeneratedImages(images, inside)

    assert bits(collect(tmp_path / "a", beyond_bad)) == bits(collect(tmp_path / "b"))


def test_work_of_other_settings_is_begun_anew(tmp_path, capsys):
    folder = epath.Path(tmp_path / "work")
    (claim_folder(folder, {"seed": 0, "sizes": (3, 4)}) / "part").write_text("x")
    assert (claim_folder(folder, {"sizes": [3, 4], "seed": 0}) / "part").exists()
    assert not (claim_folder(folder, {"sizes": [3, 4], "seed": 1}) / "part").exists()
    assert "it holds work with other settings, which is deleted" in capsys.readouterr().err


def test_processes_wait_for_each_other_whatever_their_file_systems_show(tmp_path, monkeypatch):
    """Clients of a network file system may see work that another process has deleted."""
    reached = []
    monkeypatch.setattr(resumable_work, "barrier", reached.append)
    monkeypatch.setattr(resumable_work, "is_first_process", lambda: False)
    stale, new = (epath.Path(tmp_path / name / "work") for name in ("stale", "new"))
    stale.mkdir(parents=True)
    (stale / "work.json").write_text('{"seed": 1}')
    for folder in (stale, new):
        claim_folder(folder, {"seed": 0})
    assert reached == [f"{folder} claimed" for folder in (stale, new)]
    assert (stale / "work.json").exists() and not new.exists()


@pytest.mark.parametrize("field", ["chunk_size", "part_size"])
def test_sizes_that_cannot_be(field):
    with pytest.raises(InputError, match=f"^{field}=0: give a whole number >= 1"):
        collector(**{field: 0})


def test_widths_are_known_beforehand():
    assert collector().widths((4, 4, 3)) == {"pool3": 6}
