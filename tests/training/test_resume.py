"""A resumed run is bit-for-bit identical to an uninterrupted one, and may change its mesh."""

import json
import os
import shutil
import signal
import subprocess

import jax
import numpy as np
import pytest
import small_network
import tiny
from etils import epath

from dmf import registry
from dmf.checkpoints import load
from dmf.checkpoints.params import latest_step
from dmf.data.data_loader import DataLoader
from dmf.data.datasets import ConcatenatedDataset, InMemoryDataset, open_dataset
from dmf.errors import InputError, RunError
from dmf.runtime import processes
from dmf.runtime.sharding import batch_sharding, make_mesh
from dmf.training import build, metrics_writer
from dmf.training.loop import claim_workdir, train
from dmf.training.resume import check_position, position_function
from dmf.training.writers import WriterRun

EVERY_STEP = {"run.steps": 30, "run.log_every": 1, "run.checkpoint_every": 5}


def rows(workdir) -> list[dict[str, float]]:
    return metrics_writer.read_metrics(epath.Path(workdir))


def same(a, b) -> None:
    """Both trees hold the same bits."""
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(a), jax.device_get(b))


@pytest.fixture(scope="module")
def whole(tmp_path_factory, small_network_registered):
    """An uninterrupted run of 30 steps: (state, losses)."""
    workdir = tmp_path_factory.mktemp("whole")
    state = train(small_network.config(EVERY_STEP), workdir)
    return state, [row["loss"] for row in rows(workdir)]


def test_a_killed_run_resumes_bit_for_bit(whole, tmp_path):
    fields = [f"--config.{name}={value}" for name, value in EVERY_STEP.items()]
    arguments = [
        "train", f"--config={small_network.CONFIG}", f"--workdir={tmp_path}/run", *fields
    ]  # fmt: skip
    process = subprocess.Popen(
        tiny.command(*arguments),
        env=tiny.environment(), cwd=tiny.ROOT, stderr=subprocess.PIPE, text=True,
    )
    lines = []
    for line in process.stderr:
        lines.append(line)
        if line.startswith("step 15/"):
            os.kill(process.pid, signal.SIGKILL)
            break
    process.stderr.close()
    assert process.wait() == -signal.SIGKILL, lines
    step = latest_step(tmp_path / "run")
    assert step is not None
    assert 5 <= step < 30

    state = train(small_network.config(EVERY_STEP), tmp_path / "run")
    same(state, whole[0])
    assert [row["step"] for row in rows(tmp_path / "run")] == list(range(1, 31))
    assert [row["loss"] for row in rows(tmp_path / "run")] == whole[1]


def test_a_finished_run_is_extended(whole, tmp_path):
    shorter = {"run.steps": 7, "run.checkpoint_every": 50}
    train(small_network.config(EVERY_STEP | shorter), tmp_path)
    assert latest_step(tmp_path) == 7
    state = train(small_network.config(EVERY_STEP | {"run.log_every": 5}), tmp_path)
    same(state, whole[0])
    assert [row["step"] for row in rows(tmp_path)] == [*range(1, 8), 10, 15, 20, 25, 30]


def test_a_finished_run_is_left_alone(tmp_path):
    shutil.copytree(tiny.flow_run(), tmp_path / "run")
    before = rows(tmp_path / "run")
    state = train(tiny.config({"run.sample_every": 4}), tmp_path / "run")
    assert int(state.step) == 8
    assert rows(tmp_path / "run") == before
    same(state.params, load.load_network(tiny.flow_run(), "")[2])


@pytest.mark.slow
def test_a_run_resumes_on_another_mesh(tmp_path, monkeypatch):
    """From one device to eight, split along every axis."""
    train(tiny.config(EVERY_STEP), tmp_path / "whole")
    fields = [{"run.steps": 5}, {"run.steps": 30, "mesh.fsdp": 2, "mesh.tensor": 2}]
    one = make_mesh(1, 1, 1, devices=jax.devices()[:1])
    for overrides, shape in zip(fields, [(1, 1, 1), (2, 2, 2)], strict=True):
        with monkeypatch.context() as patch:
            if shape == (1, 1, 1):
                patch.setattr(build, "mesh", lambda section: one)
            state = train(tiny.config(EVERY_STEP | overrides), tmp_path / "run")
        meshes = {leaf.sharding.mesh for leaf in jax.tree.leaves(state)}
        assert [tuple(mesh.shape.values()) for mesh in meshes] == [(1, *shape)]
    losses, expected = ([row["loss"] for row in rows(tmp_path / name)] for name in ("run", "whole"))
    assert len(losses) == 30
    np.testing.assert_allclose(losses, expected, rtol=1e-5)


def test_metrics_written_after_the_last_checkpoint_are_dropped(tmp_path):
    workdir = epath.Path(tmp_path)
    writer = metrics_writer.JsonLinesWriter(WriterRun(workdir=workdir))
    for step in (1, 2, 3, 4):
        writer.write(step, {"loss": step / 3})
    writer.close()
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 5, "lo')  # cut short by a kill
    assert [row["step"] for row in metrics_writer.read_metrics(workdir)] == [1, 2, 3, 4]
    metrics_writer.JsonLinesWriter(WriterRun(workdir=workdir, start_step=2)).close()
    kept = [(row["step"], row["loss"]) for row in metrics_writer.read_metrics(workdir)]
    assert kept == [(1, 0.3333333), (2, 0.6666667)]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"optimizer.learning_rate": 0.5}, "optimizer.learning_rate is 0.001 and not 0.5"),
        ({"seed": 1}, "seed is 0 and not 1"),
        ({"model.depth": 3}, "model.depth is 2 and not 3"),
        ({"emas.main.decay": 0.1}, "emas.main.decay is 0.5 and not 0.1"),
    ],
)
def test_fields_of_what_is_trained_may_not_change(fields, message, tmp_path):
    run = shutil.copytree(tiny.flow_run(), tmp_path / "run")
    before = (run / "config.json").read_bytes()
    with pytest.raises(InputError, match=f"holds another run, whose {message}"):
        train(tiny.config(fields), run)
    assert (run / "config.json").read_bytes() == before


def test_fields_of_how_it_is_computed_may_change(tmp_path):
    """Each field of `CHANGEABLE`, and a field that an older run does not have."""
    older = tiny.flow_map()
    del older.model.attention
    workdir = epath.Path(tmp_path)
    claim_workdir(workdir, older)
    claim_workdir(workdir, tiny.flow_map({
        "run.steps": 99, "mesh.fsdp": 2, "sampling.shift": 2.0, "evaluation.count": 7,
        "gradient_accumulation": 2, "objective.compute_sharing.unconditional_microbatches": 4,
        "model.scan": False, "model.remat": "full", "model.attention": "xla",
    }))  # fmt: skip
    with pytest.raises(InputError, match="model.scanner is unset and not 1"):
        other = tiny.flow_map()
        with other.unlocked():
            other.model.scanner = 1
        claim_workdir(workdir, other)

@pytest.fixture
def black(tmp_path):
    """A function that trains two more steps on a registered dataset of some rows."""
    rows = {}

    def dataset(*, split, directory):
        return InMemoryDataset(name="black", num_classes=10, rows=rows)

    def continued(x, y, **fields):
        rows.update(x=np.asarray(x, np.uint8).reshape(-1, 8, 8, 1), y=np.asarray(y, np.int32))
        steps = 2 + (latest_step(tmp_path / "run") or 0)
        return train(small_network.config(
            {"data.name": "black", "data.batch_size": 8, "run.steps": steps} | fields
        ), tmp_path / "run")

    with small_network.registered():
        registry.register("dataset", black=dataset)
        yield continued


@pytest.mark.slow
def test_a_run_resumes_on_the_data_that_it_began_with_alone(tmp_path, black):
    x, y = np.zeros((24, 64)), np.zeros(24)
    black(x, y)
    before = (tmp_path / "run/config.json").read_bytes()
    for others, what in (((x[:16], y[:16]), "the number of samples in the dataset"),
                         ((x, y + 1), "the dataset"), ((x + 1, y), "the dataset")):
        with pytest.raises(InputError, match=f"because {what} changed after step 2 .*restore the"):
            black(*others)
    assert (tmp_path / "run/config.json").read_bytes() == before
    assert int(black(x, y).step) == 4


@pytest.mark.parametrize("label", [10, -1])
def test_a_label_beyond_the_classes_is_named_before_the_first_step(tmp_path, black, label):
    with pytest.raises(InputError, match=f"has the label {label}, but the 10 classes have .*0 to"):
        black(np.zeros((24, 64)), [0] * 23 + [label])
    assert not (tmp_path / "run").exists()


def test_a_label_beyond_the_classes_is_named_where_samples_are_not_in_memory():
    rows = {"x": np.zeros((3, 8, 8, 1), np.uint8), "y": np.array([0, 1, 2], np.int32)}
    dataset = ConcatenatedDataset(parts=(
        (InMemoryDataset(name="three", num_classes=2, rows=rows), np.arange(3)),
    ))
    with pytest.raises(InputError, match="data.name=three: a sample has the label 2"):
        DataLoader(dataset=dataset, batch_size=8).batch(0, batch_sharding(make_mesh()))


@pytest.mark.parametrize("renamed", [12, 5])
def test_a_renamed_checkpoint_is_not_taken_for_that_of_its_name(tmp_path, capsys, renamed):
    with small_network.registered():
        run = shutil.copytree(small_network.run(), tmp_path / "run")
        checkpoints = run / "checkpoints"
        shutil.copytree(checkpoints / "8", checkpoints / str(renamed))
        with pytest.raises(RunError, match="it is damaged .it was saved at step 8 in format 2"):
            load.load_network(checkpoints / str(renamed), "")
        state = train(small_network.config({"run.steps": 13}), run)
    assert int(state.step) == 13
    if renamed == 12:
        assert [path.name for path in (run / "damaged").iterdir()] == ["12"]
        assert "step 12 is damaged (it was saved at step 8" in capsys.readouterr().err


def test_a_run_resumes_with_the_teacher_that_it_began_with_alone():
    """A position has a hash of the bits of each frozen network."""
    loader = DataLoader(dataset=open_dataset("digits"), batch_size=8)

    def position(**frozen_params):
        return position_function(loader, frozen_params)

    teacher = {"kernel": np.arange(6, dtype=np.float32)}
    first, other = position(teacher=teacher)(3), position(teacher={"kernel": teacher["kernel"] + 1})
    assert first == position(teacher=jax.tree.map(jax.numpy.asarray, teacher))(3)
    assert first.items() ^ other(3).items() == {
        ("teacher_params", p["teacher_params"]) for p in (first, other(3))
    }
    assert position()(3) == loader.position(3)


def test_processes_of_other_data_do_not_train_together(tmp_path, monkeypatch, black):
    """Here two processes, of which the second has other samples."""
    name, all_gather = "data and frozen networks.dataset", processes.all_gather

    def gathered(value):
        values = all_gather(value)
        return [value, value | {name: "'other'"}] if name in str(value) else values

    monkeypatch.setattr(processes, "all_gather", gathered)
    with pytest.raises(InputError, match=f"^{name}: it is '[0-9a-f]*' on process 0 and 'other'"):
        black(np.zeros((18, 64)), np.zeros(18))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("name", "what"), [
    ("seed", "the seed"), ("rows", "the batch size"), ("dataset", "the dataset"),
    ("dataset_rows", "the number of samples in the dataset"), ("teacher_params", "the teacher"),
    ("alignment_params", "the encoder of the alignment"),
])  # fmt: skip
def test_what_is_saved_of_a_position_is_compared(tmp_path, name, what):
    """With the newest checkpoint; a position of an earlier dmf, which lacks a field, passes."""
    for step, value in ((3, "other"), (4, "same")):
        folder = tmp_path / "checkpoints" / str(step) / "position"
        folder.mkdir(parents=True)
        (folder / "metadata").write_text(json.dumps({"format": 2, "step": step, name: value}))
    check_position(epath.Path(tmp_path), lambda step: {"step": step, name: "same", "new": 1})
    with pytest.raises(InputError, match=f"because {what} changed after step 4 .from same to 7"):
        check_position(epath.Path(tmp_path), lambda step: {"step": step, name: 7})
