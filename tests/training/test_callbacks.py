"""A run that evaluates itself: files, metrics, the best checkpoint, and none left out."""

import json
import shutil

import jax.numpy as jnp
import pytest
import small_network
import tiny
from etils import epath

from dmf.errors import InputError
from dmf.training import callbacks, metrics_writer
from dmf.training.loop import train

pytestmark = pytest.mark.usefixtures("small_network_registered")

EVALUATING = {
    "evaluation.every": 2, "evaluation.emas": ("main", ""), "evaluation.steps": (1, 2),
    "evaluation.metrics": ("fd_pixels",), "run.checkpoint_every": 3,
}  # fmt: skip


@pytest.fixture
def scores(monkeypatch):
    """Distances are known: of each evaluation the same four times."""
    known = iter([score for score in (5.0, 1.0, 3.0, 4.0) for _ in range(4)])
    monkeypatch.setattr(callbacks.Evaluator, "_scores", lambda *parts: {"fd_pixels": next(known)})


def checkpoints(workdir) -> list[int]:
    return sorted(int(p.name) for p in (workdir / "checkpoints").iterdir() if p.name.isdigit())


# Files that are no evaluations, or have no score, which a full disk, an editor or a copy may leave.
NO_EVALUATIONS = {
    "00000095.json": "", "00000096.json": '{"results": [', "00000097.json": '{"results": []}',
    "00000098.json": "3", "notes.json": '{"results": [{"fd_pixels": 0}]}',
    "00000099.json": '{"results": [{"fd_pixels": "0"}]}',
    "00000001.json": '{"results": [{"fd_pixels": NaN}]}',
}  # fmt: skip


def test_the_best_checkpoint_is_kept_beside_the_last(tmp_path, scores, capsys):
    """Whatever else lies in the folder of evaluations."""
    names = [f"{step:08}.json" for step in (2, 4, 6, 8)]
    folder = tmp_path / "evaluations"
    folder.mkdir()
    for name, text in NO_EVALUATIONS.items():
        (folder / name).write_text(text)
    train(small_network.config(EVALUATING | {"run.keep_last": 1}), tmp_path)
    said = capsys.readouterr().err
    for name in NO_EVALUATIONS:
        told = f"{folder / name}: it is no evaluation, and is left out"
        assert said.count(told) == (name not in ("00000001.json", "00000099.json"))
        (folder / name).unlink()
    assert sorted(p.name for p in folder.iterdir()) == names
    evaluation = json.loads((folder / names[1]).read_text())
    assert [(row["ema"], row["steps"], row["fd_pixels"]) for row in evaluation["results"]] == [
        ("main", 1, 1.0), ("main", 2, 1.0), ("", 1, 1.0), ("", 2, 1.0)
    ]  # fmt: skip
    assert evaluation["step"] == 4
    assert checkpoints(tmp_path) == [4, 8]
    assert tiny.dmf("sample", f"--checkpoint={tmp_path}/checkpoints/4", "--steps=1",
                    f"--output={tmp_path}/best.png") == 0  # fmt: skip
    rows = [row for row in metrics_writer.read_metrics(epath.Path(tmp_path)) if "loss" not in row]
    names = [f"evaluation/fd_pixels/{ema}/{n}" for ema in ("main", "params") for n in (1, 2)]
    assert [row["step"] for row in rows] == [2, 4, 6, 8]
    del rows[1]["wall_time"]
    assert rows[1] == {"step": 4} | dict.fromkeys(names, 1.0)


@pytest.mark.slow
def test_an_evaluation_that_is_missing_is_made_up_for(tmp_path, monkeypatch):
    """One that was interrupted, or was not asked for when the run was here."""
    shutil.copytree(small_network.run(), tmp_path / "run")
    config = small_network.config({"evaluation.every": 4, "evaluation.steps": (1,)})

    def killed(self, write, path, *what):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(callbacks.Evaluator, "finish", killed)
        train(config, tmp_path / "run")
    assert not list((tmp_path / "run/evaluations").glob("*.json"))
    train(config, tmp_path / "run")
    found = json.loads((tmp_path / "run/evaluations/00000008.json").read_text())
    assert tiny.dmf("evaluate", f"--checkpoint={tmp_path}/run", "--steps=1") == 0
    plain = json.loads((tmp_path / "run/evaluation.json").read_text())
    assert found["results"] == plain["results"]
    last = metrics_writer.read_metrics(epath.Path(tmp_path / "run"))[-1]
    distance = found["results"][0]["fd_pixels"]
    assert last["evaluation/fd_pixels/main/1"] == pytest.approx(distance, rel=1e-6)


@pytest.mark.slow
def test_guidance_is_searched_at_an_evaluation_of_a_run(tmp_path):
    shutil.copytree(small_network.run(), tmp_path / "run")
    train(small_network.config({
        "evaluation.every": 8, "evaluation.steps": (2,), "evaluation.guidance_scales": (1.0, 2.0),
        "evaluation.guidance_intervals": ((0.4, 0.65),), "evaluation.metrics": ("fd_pixels",),
    }), tmp_path / "run")  # fmt: skip
    found = json.loads((tmp_path / "run/evaluations/00000008.json").read_text())
    rows = found["results"]
    assert [(row["guidance"], row["interval"]) for row in rows] == [
        (1.0, [0.4, 0.65]), (2.0, [0.4, 0.65])
    ]  # fmt: skip
    assert found["best"] == min(rows, key=lambda row: row["fd_pixels"])
    last = metrics_writer.read_metrics(epath.Path(tmp_path / "run"))[-1]
    for row in rows:
        name = f"evaluation/fd_pixels/main/2/{row['guidance']}/0.4-0.65"
        assert last[name] == pytest.approx(row["fd_pixels"], rel=1e-6)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"evaluation.emas": ("slow",)}, "evaluation.emas=slow: config.emas has main"),
        ({"evaluation.count": 64}, "evaluation.count=64: fd_pixels needs more than 64 images"),
        ({"evaluation.protocol": "adm"}, "give --inception=DIR"),
        ({"evaluation.guidance_intervals": ((0.2, 0.8),)}, "the only guidance scale is 1, which"),
        ({"evaluation.reference": "nowhere.npz"}, "reference=nowhere.npz: there is no such file"),
    ],
)
def test_what_cannot_be_evaluated_is_found_before_training(tmp_path, fields, message):
    with pytest.raises(InputError, match=message):
        train(small_network.config({"evaluation.every": 2} | fields), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("start", "traced", "said"), [
    (1, True, "steps 2 to 3 are traced in"),
    (3, True, "steps 3 to 3 are traced in"),
    (4, False, "profile_steps=2:3: the run is at step 4, past them; nothing is traced"),
])
def test_steps_are_traced_as_far_as_they_are_left(tmp_path, capsys, start, traced, said):
    profiler = callbacks.Profiler("2:3", epath.Path(tmp_path))
    for step in range(start, 6):
        profiler.before_step(step)
        profiler.after_step(step, jnp.ones(2) * step)
    profiler.close()
    assert bool(list(tmp_path.glob("profile/**/*.xplane.pb"))) == traced
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line


@pytest.mark.parametrize(("fields", "message"), [
    ({"run.sample_every": 2, "sampling.steps": (2, 0)},
     r"sampling.steps=\(2, 0\): sampling needs at least 1 step"),
    ({"run.sample_every": 2, "sampling.steps": (4, 1), "sampling.sampler": {"name": "sde"}},
     r"sampling.steps=\(4, 1\): the sde sampler needs at least 2 steps"),
    ({"run.sample_every": 2, "sampling.steps": ()}, r"sampling.steps=\(\): give one number"),
    ({"evaluation.every": 2, "sampling.steps": (-1,)},
     r"sampling.steps=\(-1,\): sampling needs at least 1 step"),
    ({"evaluation.every": 2, "evaluation.steps": (0,)},
     r"evaluation.steps=\(0,\): sampling needs at least 1 step"),
    ({"evaluation.every": 2, "evaluation.emas": ()}, r"evaluation.emas=\(\): give one name"),
])  # fmt: skip
def test_what_a_later_step_needs_is_checked_before_the_first_one(fields, message, tmp_path):
    config = small_network.config()
    config.update_from_flattened_dict({k: v for k, v in fields.items() if k != "sampling.sampler"})
    config.sampling.sampler = fields.get("sampling.sampler", config.sampling.sampler)
    with pytest.raises(InputError, match=f"^{message}"):
        train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()
