"""Which scores of evaluations stand in the model card of an export."""

import pytest
from small_export import ROW, evaluation, parts

from dmf import registry
from dmf.checkpoints import export
from dmf.experiments.card_scores import card_scores
from dmf.sampling.build import Sampling
from dmf.sampling.guidance import SamplingGuidance
from dmf.sampling.samplers import Heun

pytestmark = pytest.mark.usefixtures("small_network_registered")

SAMPLED = registry.to_config(Sampling())


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """An export of a small flow model."""
    folder = tmp_path_factory.mktemp("exports") / "small"
    export.write(folder, parts())
    return folder


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"step": 600}, "it is of step 600, and the checkpoint of None"),
        ({"model": {"name": "two_layers"}}, "it is of a network with other fields"),
        ({"results": []}, "not a file that dmf evaluate wrote"),
        ({"guide": {}}, "it is of images with a guide, which the export lacks"),
        ({"sampling": SAMPLED | {"shift": 2.0}},
         "it is of images with another sampling.shift"),
        ({"sampling": registry.to_config(Sampling(guidance=SamplingGuidance(scale=2.0)))},
         "it is of images with another sampling.guidance.scale"),
        ({"sampling": registry.to_config(Sampling(sampler=Heun()))},
         "it is of images with another sampling.sampler.name"),
        ({"sampling": 3}, "it is of images with another sampling"),
        ({"latents": {"parameters": "1"}}, "it is of images with another latents.parameters"),
    ],
)
def test_scores_of_something_else_are_left_out(exported, capsys, fields, words):
    (exported / "evaluation.json").write_text(evaluation(**fields))
    assert card_scores(exported, parts(), "main", step=None) == ()
    assert f"evaluation.json: {words}; the model card" in capsys.readouterr().err


def test_the_scores_of_a_run_are_those_of_its_parameters(tmp_path, capsys):
    run = tmp_path / "run"
    for step in (4, 8):  # Names alone: no parameters are read.
        (run / f"checkpoints/{step}/params").mkdir(parents=True)
        (run / f"checkpoints/{step}/_CHECKPOINT_METADATA").write_text("{}")
    path = run / "evaluation.json"
    rows = [ROW, ROW | {"ema": "", "fd_pixels": 3.0}]
    path.write_text(evaluation(step=8, results=rows))
    values = [[score.value for score in card_scores(run, parts(), ema, step=8)]
              for ema in ("main", "", "std=0.1")]
    assert values == [[0.12346], [3.0], []]
    assert "it has no row of the EMA parameters 'std=0.1'" in capsys.readouterr().err
    best = ROW | {"guidance": 2.0, "interval": [0.0, 0.5], "fd_pixels": 1.0}
    searched = SAMPLED | {"guidance": {"channels": 0}}
    path.write_text(evaluation(step=8, results=[best, ROW], best=best, sampling=searched))
    (score,) = card_scores(run, parts(), "main", step=8)
    assert score.title == "Frechet distance, 2 steps, guidance 2.0, interval 0.0:0.5"
    (run / "evaluations").mkdir()
    (run / "evaluations/00000004.json").write_text(evaluation(step=4))
    assert card_scores(run / "checkpoints/4", parts(), "main", step=4)
