"""A search of guidance at sampling: equal images are generated once, an interrupted search goes on,
and what cannot be searched is refused in one line."""

import json
import shutil

import numpy as np
import pytest
import small_network
import test_generator
import tiny
import tiny_networks
from two_layers import TwoLayers

from dmf.checkpoints import guide, load
from dmf.errors import InputError
from dmf.evaluation import metrics
from dmf.evaluation.build import Evaluation
from dmf.evaluation.evaluator import Evaluator
from dmf.evaluation.flow_map_evaluation import guided_generators
from dmf.runtime.checksums import fingerprint
from dmf.runtime.sharding import local_mesh
from dmf.sampling.build import Sampling
from dmf.sampling.generator import Generator

pytestmark = pytest.mark.usefixtures("small_network_registered")
COUNT = 12
SEARCH = ("--guidance=1,2,4", "--interval=0.4:0.65,0.6:1", "--ema=main,", "--steps=2")
# For each EMA no guidance, and in each interval two scales; times are 1 and 0.5.
DISTINCT, CELLS = 2 * (1 + 2 * 2), 2 * 3 * 2


@pytest.fixture(autouse=True)
def networks(monkeypatch):
    """Networks are tiny ones, and their directories any names."""
    tiny_networks.install(monkeypatch)


@pytest.fixture
def reference(tmp_path):
    """An `.npz` of images to compare with."""
    path = tmp_path / "real" / "real.npz"
    path.parent.mkdir()
    np.savez(path, arr_0=np.random.default_rng(0).integers(0, 256, (40, 8, 8, 1)).astype(np.uint8))
    return path


@pytest.fixture
def generated(monkeypatch):
    """The number of steps and the guidance of each call that generated images."""
    calls, make = [], Generator.__call__

    def counted(self, params, **settings):
        generate = make(self, params, **settings)

        def call(*inputs):
            calls.append((settings["steps"], self.guidance))
            return generate(*inputs)

        return call

    monkeypatch.setattr(Generator, "__call__", counted)
    return calls


def evaluate(output, reference, *flags) -> int:
    return tiny.dmf(
        "evaluate", f"--checkpoint={small_network.run()}", f"--output={output}",
        f"--reference={reference}", f"--count={COUNT}", "--protocol=adm", "--inception=I",
        "--metrics=fid", "--config.evaluation.chunk_size=2", *flags,
    )  # fmt: skip


def test_a_search_is_resumed_and_generates_nothing_twice(
    tmp_path, reference, generated, monkeypatch, capsys
):
    whole, cut = tmp_path / "whole.json", tmp_path / "cut.json"
    loaded, measured = [], []
    load_network, collect = load.load_network, Evaluator.collect_reference
    monkeypatch.setattr(load, "load_network", lambda *a, **k: loaded.append(a[1])
                        or load_network(*a, **k))  # fmt: skip
    monkeypatch.setattr(Evaluator, "collect_reference", lambda *a: measured.append(a)
                        or collect(*a))  # fmt: skip
    assert evaluate(whole, reference, *SEARCH) == 0
    printed = capsys.readouterr().out
    result = json.loads(whole.read_text())
    assert (len(result["results"]), len(generated)) == (CELLS, DISTINCT)
    assert (loaded, len(measured)) == (["main", ""], 1)
    _check_rows(result)
    assert printed.endswith(f"{whole}\n")
    assert printed.removesuffix(f"{whole}\n") == (tmp_path / "whole.md").read_text()
    assert (tmp_path / "whole.png").stat().st_size > 1000

    distance, distances = metrics.frechet_distance, []

    def interrupted(a, b):
        distances.append(0)
        if len(distances) == 4:
            raise KeyboardInterrupt
        return distance(a, b)

    generated.clear()
    with monkeypatch.context() as patch:
        patch.setattr(metrics, "frechet_distance", interrupted)
        assert evaluate(cut, reference, *SEARCH) == 130
    assert len(generated) == 4 and not cut.exists()
    assert evaluate(cut, reference, *SEARCH) == 0
    assert len(generated) == DISTINCT, "the fourth had been generated when it was interrupted"
    assert json.loads(cut.read_text()) == result
    assert (tmp_path / "cut.md").read_text() == (tmp_path / "whole.md").read_text()
    written = {f"{name}.{kind}" for name in ("whole", "cut") for kind in ("json", "md", "png")}
    assert {path.name for path in tmp_path.iterdir() if path != reference.parent} == written


def _check_rows(result):
    """Rows say their guidance; those of equal images are equal, and the best one is named."""
    rows = result["results"]
    fid = {(row["ema"], row["guidance"], *row["interval"]): row["fid"] for row in rows}
    assert len(fid) == CELLS and len(set(fid.values())) == DISTINCT
    for ema in ("main", ""):
        assert fid[ema, 1.0, 0.4, 0.65] == fid[ema, 1.0, 0.6, 1.0]
    assert [row["guidance"] for row in rows[:3]] == [1.0, 2.0, 4.0]
    assert result["best"] == min(rows, key=lambda row: row["fid"])
    assert result["sampling"]["guidance"] == {"channels": 0}, "rows say scale and interval"


@pytest.mark.slow
def test_fields_of_the_config_search_as_the_flags_do(tmp_path, reference, generated):
    """And each row is what its guidance alone gives."""
    fields = ("--config.evaluation.guidance_scales=2,4", "--config.evaluation.emas=('main','')",
              "--config.evaluation.guidance_intervals=0.4:0.65", "--config.evaluation.steps=1,2")
    found = {}
    for name, flags in (
        ("fields", fields),
        ("flags", ("--guidance=2,4", "--interval=0.4:0.65", "--steps=1,2", "--ema=main,")),
        ("alone", ("--config.sampling.guidance.scale=4", "--steps=2",
                   "--config.sampling.guidance.interval=0.4:0.65")),
    ):  # fmt: skip
        assert evaluate(tmp_path / f"{name}.json", reference, *flags) == 0
        found[name] = json.loads((tmp_path / f"{name}.json").read_text())
    assert found["fields"] == found["flags"]
    one, alone = found["fields"]["results"][3], found["alone"]["results"][0]
    assert one == {**alone, "guidance": 4.0, "interval": [0.4, 0.65]}
    at_one_step = [row["fid"] for row in found["fields"]["results"] if row["steps"] == 1]
    assert len(set(at_one_step)) == 2, "at t = 1 nothing lies in the interval: one for each EMA"
    assert "best" not in found["alone"] and not (tmp_path / "alone.md").exists()


@pytest.mark.slow
def test_a_guide_is_searched_as_the_null_condition_is(tmp_path, reference, generated):
    guided = tmp_path / "guided.json"
    assert evaluate(guided, reference, "--guidance=1,3", "--steps=2",
                    f"--guide={small_network.run()}/checkpoints/4") == 0  # fmt: skip
    result = json.loads(guided.read_text())
    assert result["guide"]["step"] == 4 and result["guide"]["ema"] == "main"
    unguided, by_guide = (row["fid"] for row in result["results"])
    itself = tmp_path / "itself.json"
    assert evaluate(itself, reference, "--guidance=3", "--steps=2",
                    f"--guide={small_network.run()}") == 0  # fmt: skip
    (row,) = json.loads(itself.read_text())["results"]
    assert row["fid"] == pytest.approx(unguided, rel=1e-3) != by_guide
    assert len(generated) == 3


def test_a_checkpoint_that_is_saved_meanwhile_changes_nothing(tmp_path, reference, monkeypatch):
    """All parameters, of the guide too, are of the step that the result states."""
    run, output, load_params = tmp_path / "run", tmp_path / "e.json", load.load_params
    shutil.copytree(small_network.run(), run)
    later, loaded = (run / "checkpoints/8").rename(tmp_path / "8"), []

    def and_saves(network, directory, ema, **options):
        params = load_params(network, directory, ema, **options)
        loaded.append((ema, fingerprint(params)))
        if later.exists():
            later.rename(run / "checkpoints/8")
        return params

    with monkeypatch.context() as patch:
        patch.setattr(load, "load_params", and_saves)
        assert evaluate(output, reference, f"--checkpoint={run}", f"--guide={run}", "--guidance=2",
                        "--steps=1", "--ema=main,") == 0  # fmt: skip
    result = json.loads(output.read_text())
    assert result["step"] == result["guide"]["step"] == 4 and not later.exists()
    ours = {ema: fingerprint(load.load_network(run / "checkpoints/4", ema)[2])
            for ema in ("main", "")}
    assert loaded == [(ema, ours[ema]) for ema in ("main", "main", "")]


def test_scale_1_is_no_guidance_as_an_input_either():
    """The interval that stands first makes no difference to the images without guidance."""
    network = test_generator.Asked()
    base = Generator(network, Sampling(), None, mesh=local_mesh(1))
    settings = Evaluation(guidance_scales=(1.0, 2.0), guidance_intervals=((0.4, 0.65), (0.3, 0.7)))
    searched = guided_generators(base, settings)
    assert [fields["guidance"] for fields, _ in searched] == [1.0, 2.0, 1.0, 2.0]
    assert [fields["interval"] for fields, _ in searched][1:3] == [[0.4, 0.65], [0.3, 0.7]]
    assert [guided.guidance.interval for _, guided in searched[::2]] == [(0.0, 1.0)] * 2
    assert len({guided.guidance_effect(1) for _, guided in searched}) == 3


BAD = {
    "upside down": (["--guidance=2", "--interval=0.7:0.3"],
                    "evaluation.guidance_intervals=(0.7, 0.3): give (start, end) with 0 <= start"),
    "half an interval": (["--guidance=2", "--interval=0.7"],
                         "--interval=0.7: give pairs of numbers, for example"),
    "no number": (["--guidance=1,two"], "--guidance=1,two: give numbers, for example (0.5, 1.5)"),
    "negative": (["--guidance=1,-2"], "evaluation.guidance_scales=(1.0, -2.0): give numbers from"),
    "no scale": (["--interval=0.4:0.65"], "the only guidance scale is 1, which is none in every"),
    "no ema": (["--ema=main,slow,"], "ema=slow: RUN/checkpoints/8 has main"),
    "too few steps": (["--steps=2,0"], "evaluation.steps=(2, 0): sampling needs at least 1 step"),
    "no guide": (["--guidance=2", "--guide=nowhere"], "guide.checkpoint=nowhere: it holds no"),
    "no scale for a guide": (["--guide=RUN"], "guide=RUN: the guidance scale is 1, which is no"),
    "no ema of the guide": (["--guidance=2", "--guide=RUN", "--guide-ema=slow"],
                            "guide.ema=slow: RUN/checkpoints/8 has main"),
    "ema of no guide": (["--guide-ema=main"], "--guide-ema=main: it is of --guide=DIR"),
    "of images": (["--checkpoint=", "--images=x.npz", "--guidance=2"],
                  "--guidance=2: it is for samples of a flow map; leave it out"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line(tmp_path, capsys, case):
    run = str(small_network.run())
    flags, message = ([*BAD[case][0]], BAD[case][1].replace("RUN", run))
    capsys.readouterr()
    assert evaluate(tmp_path / "e.json", "x.npz", *(f.replace("RUN", run) for f in flags)) == 2
    lines = [line for line in capsys.readouterr().err.splitlines()
             if not line.startswith("loading ")]  # fmt: skip
    assert len(lines) == 1 and message in lines[0], lines
    assert not any(tmp_path.iterdir())


class Asked(TwoLayers):
    guidance_input = True


@pytest.mark.parametrize(("other", "interpolant", "message"), [
    (TwoLayers(side=4), "linear", r"its samples have shape \(4, 4, 1\), those of the checkpoint "
                                  r"\(8, 8, 1\); give a guide of the same shape"),
    (TwoLayers(num_classes=7), "linear", "it has 7 classes, the checkpoint 10; give a guide of the "
                                         "same condition"),
    (Asked(), "linear", "it takes its guidance as an input, which excludes a guide"),
    (TwoLayers(), "cosine", "its objective.interpolant is cosine, and that of the checkpoint "
                            "linear; give a guide of the same path"),
])  # fmt: skip
def test_a_guide_of_another_kind_is_refused(monkeypatch, other, interpolant, message):
    config = small_network.config({"objective.interpolant": interpolant})
    monkeypatch.setattr(guide, "load_network", lambda *a, **k: (other, config, {}))
    with pytest.raises(InputError, match=f"^guide=DIR: {message}"):
        guide.load_guide("DIR", "main", config=small_network.config(), mesh=local_mesh(1),
                         scales=[1.0, 2.0])  # fmt: skip
