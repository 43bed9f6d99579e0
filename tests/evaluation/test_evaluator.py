"""Numbers of `dmf evaluate` against plain computations, in every form that images and references
come in, and what it refuses."""

import contextlib
import dataclasses
import json
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
import small_network
import tiny
import tiny_networks

from dmf import registry
from dmf.checkpoints import load
from dmf.data.image_sets import open_image_set
from dmf.evaluation import metrics, reference_statistics
from dmf.evaluation.build import evaluation, protocol
from dmf.evaluation.evaluated_images import evaluated_image_set
from dmf.evaluation.evaluator import Evaluator

pytestmark = pytest.mark.usefixtures("small_network_registered")
COUNT = 60
ADM = ("--protocol=adm", "--inception=I")


@pytest.fixture(autouse=True)
def networks(monkeypatch):
    """Networks are tiny ones, and their directories any names."""
    tiny_networks.install(monkeypatch)


def evaluate(*arguments) -> int:
    return tiny.dmf("evaluate", "--config.evaluation.chunk_size=3", *arguments)


def of_run(output, *arguments) -> dict:
    """An evaluation of the tiny flow model."""
    flags = [f"--checkpoint={small_network.run()}", f"--count={COUNT}", f"--output={output}"]
    assert evaluate(*flags, *arguments) == 0
    return json.loads(output.read_text())


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """An `.npz` of images to compare with."""
    path = tmp_path_factory.mktemp("real") / "real.npz"
    images = np.random.default_rng(0).integers(0, 256, (90, 8, 8, 3)).astype(np.uint8)
    np.savez(path, arr_0=np.sort(images, axis=1))
    return path


@pytest.fixture
def others(tmp_path):
    """An `.npz` of images that are not the real ones."""
    path = tmp_path / "others.npz"
    np.savez(path, arr_0=np.random.default_rng(1).integers(0, 256, (60, 8, 8, 3)).astype(np.uint8))
    return path


def of_images(images, output, *arguments) -> dict:
    """An evaluation of stored images, which is sooner than one of a run."""
    assert evaluate(f"--images={images}", f"--output={output}", *arguments) == 0
    return json.loads(output.read_text())


def plain_distance(a: np.ndarray, b: np.ndarray) -> float:
    """Frechet distance by the textbook, with scipy's root."""
    covariances = [np.cov(x.astype(float), rowvar=False) for x in (a, b)]
    root = scipy.linalg.sqrtm(covariances[0] @ covariances[1]).real
    gap = ((a.mean(0, dtype=float) - b.mean(0, dtype=float)) ** 2).sum()
    return gap + np.trace(covariances[0] + covariances[1] - 2 * root)


def test_every_number_is_that_of_the_stored_features(tmp_path, real):
    result = of_run(tmp_path / "e.json", *ADM, f"--reference={real}", "--steps=2",
                   "--keep-features")  # fmt: skip
    assert evaluate(f"--images={real}", f"--reference={real}", *ADM, "--keep-features",
                    f"--output={tmp_path}/r.json") == 0  # fmt: skip
    samples = np.load(tmp_path / "e_features/main--2-steps.npz")
    reference = np.load(tmp_path / "r_features/real-npz.npz")
    (row,) = result["results"]
    assert (row["protocol"], row["count"], row["ema"], row["steps"]) == ("adm", COUNT, "main", 2)
    for metric, kind in (("fid", "pool3"), ("sfid", "spatial")):
        distance = plain_distance(samples[kind], reference[kind])
        assert row[metric] == pytest.approx(distance, rel=1e-4)
    score = metrics.inception_score(samples["probabilities"])
    assert row["inception_score"] == pytest.approx(score)
    pair = metrics.precision_recall(reference["pool3"], samples["pool3"])
    assert (row["precision"], row["recall"]) == pair


@pytest.mark.slow
def test_kid_is_that_of_the_stored_features(tmp_path, real, others):
    """Against images, the file that is made of them, and ADM's file with images in it."""
    kid = ("--protocol=adm", "--inception=I", "--metrics=kid")
    for path in (tmp_path / "made.npz", tmp_path / "adm.npz"):
        assert evaluate(f"--images={real}", f"--make-reference={path}", *kid) == 0
    stored = dict(np.load(tmp_path / "adm.npz"))
    reference = stored.pop("features_pool3")
    np.savez(tmp_path / "adm.npz", arr_0=np.load(real)["arr_0"], **stored)
    rows = []
    for path in (real, tmp_path / "made.npz", tmp_path / "adm.npz"):
        result = of_images(others, tmp_path / "e.json", *kid, f"--reference={path}",
                           "--keep-features")  # fmt: skip
        rows += result["results"]
    samples = np.load(tmp_path / "e_features/others-npz.npz")["pool3"]
    assert (reference.shape, samples.shape) == ((90, 6), (60, 6))
    expected = metrics.kernel_inception_distance(reference, samples)
    assert [row["kid"] for row in rows] == [expected] * 3
    assert result["protocol"]["metrics"] == ["kid"]


PLUGIN = """
import numpy as np

from dmf.evaluation import Metric
from dmf.registry import register

register("metric", mean_gap=Metric(
    description="Largest difference of the mean pixels.",
    title="Mean gap", features="pixels", needs=("moments",), higher_is_better=False,
    compute=lambda reference, samples: float(
        np.abs(reference.moments.mean - samples.moments.mean).max()
    ),
))
"""


def test_a_plugin_brings_a_metric(tmp_path, real, monkeypatch, capsys):
    monkeypatch.setitem(registry._COMPONENTS, "metric", dict(registry.components("metric")))
    (tmp_path / "plugin.py").write_text(PLUGIN)
    half, output = tmp_path / "half.npz", tmp_path / "e.json"
    np.savez(half, arr_0=np.load(real)["arr_0"][:, ::-1])
    arguments = [f"--images={half}", f"--reference={real}", f"--output={output}",
                 "--metrics=mean_gap"]  # fmt: skip
    assert evaluate(*arguments) == 2
    assert "evaluation.metrics=mean_gap: choose one of" in capsys.readouterr().err
    plugin = f"--plugins={tmp_path}/plugin.py"
    assert evaluate(*arguments, plugin) == 2, "90 images are too few for 192 moments"
    assert "mean_gap needs more than 192 images" in capsys.readouterr().err
    np.savez(half, arr_0=np.load(real)["arr_0"].repeat(3, 0)[:, ::-1])
    np.savez(tmp_path / "real.npz", arr_0=np.load(real)["arr_0"].repeat(3, 0))
    arguments[1] = f"--reference={tmp_path}/real.npz"
    assert evaluate(*arguments, plugin) == 0
    means = np.load(real)["arr_0"].mean(0) / 127.5
    (row,) = json.loads(output.read_text())["results"]
    assert row["mean_gap"] == pytest.approx(np.abs(means - means[::-1]).max(), rel=1e-5)


def test_a_set_is_at_no_distance_from_itself(tmp_path, real):
    assert evaluate(f"--images={real}", f"--reference={real}", *ADM, "--dinov2=D",
                    "--metrics=fid,sfid,fd_dinov2,precision,recall",
                    f"--output={tmp_path}/r.json") == 0  # fmt: skip
    row = json.loads((tmp_path / "r.json").read_text())["results"][0]
    for metric in ("fid", "sfid", "fd_dinov2"):
        assert row[metric] == pytest.approx(0, abs=1e-6)
    assert row["precision"] == row["recall"] == 1


@pytest.mark.slow
def test_a_reference_may_have_any_form(tmp_path, real, others):
    written = tmp_path / "written.npz"
    both = ("--inception=I", "--dinov2=D", "--metrics=fid,fd_dinov2")
    assert evaluate(f"--images={real}", f"--make-reference={written}", *both) == 0
    stored = reference_statistics.read_reference(written)
    fid, dino = stored.moments["pool3"], stored.moments["dinov2"]
    np.savez(tmp_path / "plain.npz", ref_mu=fid.mean, ref_sigma=fid.covariance,
             mu_dinov2=dino.mean, sigma_dinov2=dino.covariance)  # fmt: skip
    pairs = {"fid": fid, "fd_dinov2": dino}
    (tmp_path / "edm2.pkl").write_bytes(pickle.dumps(
        {name: {"mu": np.array(m.mean), "sigma": np.array(m.covariance)}
         for name, m in pairs.items()}
    ))  # fmt: skip
    rows = []
    for reference in (real, written, tmp_path / "plain.npz", tmp_path / "edm2.pkl"):
        output = tmp_path / f"{reference.name}.json"
        result = of_images(others, output, f"--reference={reference}", *both)
        assert result["reference"]["name"] == reference.name
        rows.append(result["results"][0])
    for row in rows[1:]:
        assert row["fid"] == pytest.approx(rows[0]["fid"], rel=1e-9)
        assert row["fd_dinov2"] == pytest.approx(rows[0]["fd_dinov2"], rel=1e-9)


@pytest.mark.slow
def test_adm_takes_precision_and_recall_from_the_images_in_its_file(tmp_path, real):
    written = tmp_path / "written.npz"
    assert evaluate(f"--images={real}", f"--make-reference={written}", *ADM) == 0
    stored = dict(np.load(written))
    assert stored["features_pool3"].shape == (90, 6)
    del stored["features_pool3"]
    np.savez(tmp_path / "adm.npz", arr_0=np.load(real)["arr_0"], **stored)
    from_features, from_images = (
        of_run(tmp_path / f"{path.stem}.json", f"--reference={path}", *ADM, "--steps=1")
        for path in (written, tmp_path / "adm.npz")
    )
    assert from_features["results"] == from_images["results"]


def test_written_samples_measure_as_samples(tmp_path, real):
    """With the rounding and the labels of the protocol."""
    samples = tmp_path / "samples.npz"
    assert tiny.dmf("sample", f"--checkpoint={small_network.run()}", f"--output={samples}",
                    f"--count={COUNT}", "--steps=1", "--labels=random",
                    "--rounding=down") == 0  # fmt: skip
    direct = of_run(tmp_path / "a.json", *ADM, f"--reference={real}", "--steps=1")
    assert evaluate(f"--images={samples}", f"--reference={real}", *ADM,
                    f"--output={tmp_path}/b.json") == 0  # fmt: skip
    written = json.loads((tmp_path / "b.json").read_text())
    for metric in direct["protocol"]["metrics"]:
        assert direct["results"][0][metric] == pytest.approx(written["results"][0][metric])


@pytest.mark.slow
def test_every_setting_stands_beside_the_numbers(tmp_path, real):
    result = of_run(tmp_path / "e.json", *ADM, f"--reference={real}", "--steps=1,2", "--ema=main,",
                   "--label-sampling=balanced", "--rounding=half_up", "--metrics=fid")  # fmt: skip
    assert result["protocol"] == {
        "name": "adm", "metrics": ["fid"], "rounding": "half_up", "label_sampling": "balanced",
        "inception_score_split": 5000, "neighbours": 3,
    }  # fmt: skip
    assert result["networks"]["inception"]["input"].startswith("299 x 299, bilinear")
    assert result["networks"]["inception"]["checkpoint"] == "I"
    assert result["step"] == 8
    assert result["model"]["hidden"] == 12
    assert result["sampling"]["sampler"] == {"name": "euler"}
    assert [(row["ema"], row["steps"]) for row in result["results"]] == [
        ("main", 1), ("main", 2), ("", 1), ("", 2)
    ]  # fmt: skip
    assert len({row["fid"] for row in result["results"]}) == 4
    assert [p.name for p in tmp_path.iterdir()] == ["e.json"], "work under way is taken away"


def test_what_was_interrupted_goes_on(tmp_path, real, monkeypatch, capsys):
    flags = [*ADM, f"--reference={real}", "--steps=1,2"]
    whole = of_run(tmp_path / "whole.json", *flags)
    distance = metrics.frechet_distance

    def interrupted(a, b, calls=[]):  # noqa: B006 - counts
        calls.append(0)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return distance(a, b)

    monkeypatch.setattr(metrics, "frechet_distance", interrupted)
    cut = [f"--checkpoint={small_network.run()}", f"--count={COUNT}",
           f"--output={tmp_path}/cut.json"]
    assert evaluate(*cut, *flags) == 130
    assert not (tmp_path / "cut.json").exists()
    capsys.readouterr()
    again = of_run(tmp_path / "cut.json", *flags)
    assert again["results"] == whole["results"]
    assert "1 step:" not in capsys.readouterr().err, "a finished row is not made again"


@pytest.mark.parametrize(("metric", "parts"), [("fd_pixels", 1), ("fd_pixels", 3),
                                               ("precision", 3)])
def test_the_features_of_an_interrupted_row_are_whole(tmp_path, monkeypatch, metric, parts):
    """Work that was begun without them is begun anew: after a part, or after the row."""
    config = tiny.config({"evaluation.metrics": (metric,), "evaluation.inception": "I"})
    rows = np.random.default_rng(0).integers(0, 256, (72, 3, 3, 1)).astype(np.uint8)
    np.savez(tmp_path / "a.npz", arr_0=rows)
    config.evaluation.reference = str(tmp_path / "a.npz")
    images = evaluated_image_set(open_image_set(config.evaluation.reference))
    reads = []

    def read(*arguments):
        reads.append(arguments)
        if len(reads) > parts:
            raise KeyboardInterrupt
        return images.read(*arguments)

    work = tmp_path / "parts"
    evaluator = Evaluator(config, work)
    assert evaluator.reference.fingerprint
    with contextlib.suppress(KeyboardInterrupt):
        evaluator.measure(dataclasses.replace(images, read=read))
    kept = Evaluator(config, work, features_folder=tmp_path / "features")
    kept.measure(images)
    (file,) = (tmp_path / "features").iterdir()
    assert {len(features) for features in np.load(file).values()} == {72}


def test_a_file_at_the_place_of_the_features_is_refused_at_once(tmp_path, real, capsys):
    (tmp_path / "e_features").touch()
    arguments = [f"--images={real}", f"--reference={real}", f"--output={tmp_path}/e.json"]
    assert evaluate(*arguments, *ADM, "--keep-features") == 2
    assert "e_features: dmf makes a folder there; remove the file\n" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["e_features"]


@pytest.mark.slow
def test_a_row_that_is_cut_is_measured_again(tmp_path, monkeypatch):
    evaluator = Evaluator(tiny.config({"evaluation.metrics": ("fd_pixels",)}), tmp_path)
    images = evaluated_image_set(evaluator.dataset())
    monkeypatch.setattr(Evaluator, "_scores", lambda *parts: {"fd_pixels": 2.0})
    row = evaluator.measure(images)
    (file,) = tmp_path.rglob("row.json")
    for text in ("", "{}", "[]", '{"fd_pixels": '):
        file.write_text(text)
        assert evaluator.measure(images) == row == json.loads(file.read_text()), text
    monkeypatch.setattr(Evaluator, "_scores", None)
    assert evaluator.measure(images) == row, "a finished row is not made again"


@pytest.mark.slow
def test_a_set_that_changed_is_measured_anew(tmp_path, real, monkeypatch):
    images, output = tmp_path / "images.npz", tmp_path / "e.json"
    pixels = np.load(real)["arr_0"]
    np.savez(images, arr_0=pixels[::-1] // 2)
    arguments = [f"--images={images}", f"--reference={real}", *ADM, f"--output={output}"]
    with monkeypatch.context() as patch:
        patch.setattr(metrics, "precision", None)  # so that it ends before the result
        assert evaluate(*arguments) == 1
    np.savez(images, arr_0=pixels)
    assert evaluate(*arguments) == 0
    assert json.loads(output.read_text())["results"][0]["fid"] == pytest.approx(0, abs=1e-6)


BAD = {
    "too few": (["--count=6", "--metrics=fid"], "evaluation.count=6: fid needs more than 6 images "
                                                "(the feature dimension); got 6"),
    "no network": (["--metrics=fd_dinov2"], "give --dinov2=DIR"),
    "no protocol": (["--protocol=fad"], "evaluation.protocol=fad: choose one of adm, edm2"),
    "no metric": (["--metrics=fud"], "evaluation.metrics=fud: choose one of fd_dinov2, fd_pixels"),
    "no rounding": (["--rounding=up"], "evaluation.rounding=up: choose one of nearest"),
    "another width": (["--reference=WIDE"], "its pool3 features have 9 values per image"),
    "no spatial": (["--metrics=sfid", "--reference=WIDE"], "sfid needs those of spatial"),
    "no images": (["--metrics=fid,recall", "--reference=SMALL"], "(arr_0), which recall needs"),
    "few real ones": (["--metrics=fid", "--reference=FEW"], "reference=few.npz: fid needs more"),
    "no features": (["--metrics=kid", "--reference=SMALL"], "(arr_0), which kid needs"),
    "no such file": (["--reference=nowhere.npz"], "reference=nowhere.npz: there is no such file"),
    "no labels": (["--metrics=label_agreement", "--reference=FEW"], "the reference has no labels"),
    "steps": (["--steps=1,x"], "--steps=1,x: give whole numbers"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line(tmp_path, capsys, case):
    for name, width in (("wide", 9), ("small", 6)):
        np.savez(tmp_path / f"{name}.npz", mu=np.zeros(width), sigma=np.eye(width))
    np.savez(tmp_path / "few.npz", arr_0=np.zeros((6, 8, 8, 1), np.uint8))
    arguments, message = BAD[case]
    arguments = [a.replace(name.upper(), f"{tmp_path}/{name}.npz")
                 for name in ("wide",) for a in arguments]  # fmt: skip
    arguments = [a.replace("SMALL", f"{tmp_path}/small.npz").replace("FEW", f"{tmp_path}/few.npz")
                 for a in arguments]  # fmt: skip
    run = small_network.run()
    capsys.readouterr()
    before = sorted(tmp_path.iterdir())
    code = evaluate(f"--checkpoint={run}", "--inception=I", f"--count={COUNT}", "--metrics=fid",
                    f"--output={tmp_path}/e.json", *arguments)  # fmt: skip
    line = capsys.readouterr().err.strip()
    assert code == 2, line
    assert "\n" not in line
    assert message in line
    assert sorted(tmp_path.iterdir()) == before


def test_samples_that_are_not_finite_fail(tmp_path, real, capsys, monkeypatch):
    load_params = load.load_params
    monkeypatch.setattr(load, "load_params", lambda *a, **k: jax.tree.map(
        lambda leaf: leaf * jnp.nan, load_params(*a, **k)
    ))  # fmt: skip
    code = evaluate(f"--checkpoint={small_network.run()}", *ADM, f"--reference={real}", "--steps=1",
                    f"--count={COUNT}", f"--output={tmp_path}/e.json")  # fmt: skip
    assert code == 1
    assert "24 of images 0 to 23 hold NaN or infinity" in capsys.readouterr().err
    assert not (tmp_path / "e.json").exists()


@pytest.mark.slow
def test_no_distance_is_computed_that_was_not_asked_for(tmp_path, monkeypatch):
    """Of label agreement chance is no distance; ten distances of 3,072 x 3,072 take minutes."""
    for name in ("halves_distance", "frechet_distance", "moments"):
        monkeypatch.setattr(metrics, name, lambda *args, **kwargs: pytest.fail("a distance"))
    result = of_run(tmp_path / "e.json", "--metrics=label_agreement", "--steps=1")
    assert "halves_distance" not in result["reference"]
    assert 0 <= result["results"][0]["label_agreement"] <= 1


def test_label_agreement_is_left_out_where_there_are_no_labels():
    settings = evaluation(tiny.config().evaluation)
    assert protocol(settings, labelled=False).metrics == ("fd_pixels",)
    assert protocol(settings, labelled=True).metrics == ("fd_pixels", "label_agreement")
