"""Writers: TensorBoard's events, trackers and their run ids, and a writer of one's own in a run."""

import contextlib
import json
import shutil
import sqlite3
import struct
import sys
import types
from typing import ClassVar

import numpy as np
import plugin_files
import pytest
import small_network
from etils import epath
from tensorboardX.proto.event_pb2 import Event

from dmf import registry
from dmf.errors import InputError
from dmf.training import start_record, writers
from dmf.training.loop import train
from dmf.training.trackers import TrackioWriter, WandbWriter
from dmf.training.writers import Writer, WriterRun, Writers, check_writers, open_writers

CONFIG = {"run": {"steps": 8, "writers": ["jsonl"]}, "freeze": []}
GREY = np.arange(20, dtype=np.uint8).reshape(4, 5, 1)


def events(folder) -> list[Event]:
    """The events of all files in a folder, in the order in which the files were begun."""
    found = []
    for path in sorted(folder.iterdir()):
        data = path.read_bytes()
        while data:  # The length, its checksum, the event, its checksum.
            (length,) = struct.unpack("<Q", data[:8])
            found.append(Event.FromString(data[12 : 12 + length]))
            data = data[16 + length :]
    return found


def test_tensorboard_has_scalars_images_hyperparameters_and_the_config(tmp_path):
    run = WriterRun(workdir=epath.Path(tmp_path), start_step=2, config=CONFIG)
    writer = open_writers(("tensorboard",), run)
    writer.write(3, {"loss": 0.5})
    writer.write_image(4, "samples", GREY)
    writer.close()
    values = {value.tag: (event.step, value)
              for event in events(tmp_path / "events") for value in event.summary.value}
    assert values["loss"][0] == 3
    assert values["loss"][1].simple_value == 0.5
    assert values["samples"][0] == 4
    assert (values["samples"][1].image.height, values["samples"][1].image.width) == (4, 5)
    session = values["_hparams_/session_start_info"][1].metadata.plugin_data.content
    assert b"run.steps" in session
    assert b"run.writers" in session
    assert b'"steps": 8' in values["config/text_summary"][1].tensor.string_val[0]


class Recorder(Writer):
    """Keeps what it is told."""

    told: ClassVar[list[tuple]] = []

    def __init__(self, run):
        self.told.append(("start", run.start_step, run.workdir.name, run.config["seed"]))

    def write(self, step, scalars):
        self.told.append(("write", step, sorted(scalars)))

    def write_image(self, step, name, image):
        self.told.append(("image", step, name, image.dtype, image.ndim))

    def close(self):
        self.told.append(("close",))


@pytest.mark.parametrize("every", [0, pytest.param(4, marks=pytest.mark.slow)])
def test_a_writer_of_ones_own_is_told_of_a_run_and_of_its_resume(tmp_path, monkeypatch, every):
    """And `starts.json` has both starts."""
    monkeypatch.setattr(Recorder, "told", [])
    fields = {"run.sample_every": every, "run.writers": ("recorder",), "sampling.steps": (1,)}
    with small_network.registered():
        registry.register("writer", recorder=Recorder)
        config = small_network.config(fields)
        train(config, tmp_path / "run")
        shutil.rmtree(tmp_path / "run/checkpoints/8")
        train(config, tmp_path / "run")
    kinds = [what for what, *_ in Recorder.told]
    assert Recorder.told[0] == ("start", 0, "run", 0)
    assert [entry[1] for entry in Recorder.told if entry[0] == "write"] == [2, 4, 6, 8, 6, 8]
    images = [entry[1:] for entry in Recorder.told if entry[0] == "image"]
    assert images == [(step, "samples", np.uint8, 3) for step in (4, 8, 8) if every]
    assert kinds.count("close") == 2
    resumed = kinds.index("start", 1)
    assert Recorder.told[resumed] == ("start", 4, "run", 0)
    assert kinds[resumed - 1] == "close"
    assert not (tmp_path / "run/metrics.jsonl").exists()
    starts = start_record.read_starts(tmp_path / "run")
    assert [start["step"] for start in starts] == [0, 4]
    assert set(starts[0]) == {"time", "step", "command", "versions", "git_commit", "hosts"}


@pytest.mark.parametrize(("names", "project", "message"), [
    (("jsonl", "tensorbord"), "", "writers=tensorbord: choose one of absent, jsonl, "),
    (("jsonl", "jsonl"), "", "writers=jsonl: it is given twice; give each writer once"),
    (("absent",), "", "writers=absent: the package no_such_package is not installed; pip install "),
    (("jsonl", "tensorboard"), "mine", "project=mine: no writer in run.writers uses it"),
])  # fmt: skip
def test_writers_that_cannot_be_used_are_refused(names, project, message):
    class Absent(Writer):
        requires = "no_such_package"

    with plugin_files.registered_components():
        registry.register("writer", absent=Absent)
        with pytest.raises(InputError) as error:
            check_writers(names, project)
    assert str(error.value).startswith(message)


def test_a_project_is_for_trackers(monkeypatch):
    monkeypatch.setattr(writers.importlib.util, "find_spec", lambda name: name)
    check_writers(("jsonl", "wandb"), "mine")
    check_writers(("trackio",), "mine")
    check_writers(())


def test_several_writers_are_told_the_same_in_their_order():
    told = []

    class Named(Writer):
        def __init__(self, name):
            self.name = name

        def __getattribute__(self, method):
            if method == "name":
                return object.__getattribute__(self, method)
            return lambda *arguments: told.append((self.name, method, *arguments))

    both = Writers((Named("a"), Named("b")))
    both.write(1, {})
    both.write_image(1, "samples", GREY)
    both.flush()
    both.close()
    assert [entry[:2] for entry in told] == [
        (name, method) for method in ("write", "write_image", "flush", "close") for name in "ab"
    ]


class FakeWandb(types.SimpleNamespace):
    """What `WandbWriter` uses of wandb, with a run that is at step 6 when it is resumed."""

    class Error(Exception):
        pass

    def __init__(self):
        self.given, self.logged, self.step, self.code = {}, [], 6, None
        super().__init__(Settings=dict, Image=lambda image: image.shape)

    def init(self, **given):
        self.given = given
        return self

    def define_metric(self, name, **more):
        pass

    def log(self, values, step):
        self.logged.append((step, values))

    def finish(self, exit_code):
        self.code = exit_code


@pytest.fixture
def wandb(monkeypatch):
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    return fake


def test_a_resumed_run_has_the_same_id_at_a_tracker(tmp_path, wandb):
    given = []
    for folder in ("run", "run", "other"):
        run = WriterRun(workdir=epath.Path(tmp_path / folder), config=CONFIG, project="mine")
        run.workdir.mkdir(exist_ok=True)
        WandbWriter(run).close()
        given.append(wandb.given)
    assert given[0]["id"] == given[1]["id"] != given[2]["id"]
    assert (given[0]["project"], given[0]["name"]) == ("mine", "run")
    assert (given[0]["resume"], given[0]["config"]) == ("allow", CONFIG)


def test_no_value_of_a_repeated_step_is_dropped_by_wandb(tmp_path, wandb):
    """W&B drops values of steps before its newest one."""
    writer = WandbWriter(WriterRun(workdir=epath.Path(tmp_path), start_step=4))
    writer.write(4, {"fid": 3.0})
    writer.write(6, {"loss": 1.0})
    writer.write_image(7, "samples", GREY)
    assert wandb.logged == [
        (None, {"step": 4, "fid": 3.0}), (6, {"step": 6, "loss": 1.0}),
        (7, {"step": 7, "samples": (4, 5, 3)}),
    ]  # fmt: skip


@pytest.mark.parametrize(("error", "code"), [(None, 0), (RuntimeError("lost"), 1)])
def test_wandb_knows_whether_a_run_failed(tmp_path, wandb, error, code):
    writer = WandbWriter(WriterRun(workdir=epath.Path(tmp_path)))
    try:
        if error:
            raise error
    except RuntimeError:
        writer.close()
    else:
        writer.close()
    assert wandb.code == code


def test_wandb_without_an_account_is_one_line(tmp_path, wandb, monkeypatch):
    def refuses(self, **given):
        raise FakeWandb.Error("No API key\nconfigured")

    monkeypatch.setattr(FakeWandb, "init", refuses)
    with pytest.raises(InputError, match="run.writers=wandb: No API key configured; run wandb log"):
        WandbWriter(WriterRun(workdir=epath.Path(tmp_path)))


def two_parts(writer, folder, **more) -> None:
    """A run that is resumed at step 4, after it had written step 6."""
    run = dict(workdir=epath.Path(folder), config=CONFIG, project="offline", **more)
    for start, steps in ((0, (2, 4, 6)), (4, (6, 8))):
        part = writer(WriterRun(start_step=start, **run))
        for step in steps:
            part.write(step, {"loss": step / 4})
        part.write_image(steps[-1], "samples", GREY)
        part.close()


@pytest.mark.slow
def test_wandb_offline_keeps_both_parts_of_a_run_under_one_id(tmp_path, monkeypatch):
    pytest.importorskip("wandb", reason="the extra dmf-jax[wandb] is not installed")
    monkeypatch.setenv("WANDB_MODE", "offline")
    two_parts(WandbWriter, tmp_path)
    parts = sorted((tmp_path / "wandb").glob("offline-run-*"))
    assert len({part.name.rpartition("-")[2] for part in parts}) == 1
    assert len(list(tmp_path.glob("wandb/offline-run-*/files/media/images/samples*.png"))) == 2
    stored = b"".join(path.read_bytes() for path in tmp_path.glob("wandb/*/*.wandb"))
    for text in (b"loss", b"run", b"offline"):
        assert text in stored


@pytest.mark.slow
def test_trackio_keeps_both_parts_of_a_run_in_one(tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    pytest.importorskip("trackio", reason="the extra dmf-jax[trackio] is not installed")
    two_parts(TrackioWriter, tmp_path)
    (path,) = (tmp_path / "trackio").glob("offline*.db")
    with contextlib.closing(sqlite3.connect(path)) as database:
        rows = database.execute("select run_name, step, metrics from metrics").fetchall()
        (config,) = database.execute("select distinct config from configs").fetchall()
    assert len({name for name, *_ in rows}) == 1
    assert {step for _, step, _ in rows} == {2, 4, 6, 8}
    assert sum(b"trackio.image" in bytes(metrics) for *_, metrics in rows) == 2
    assert json.loads(config[0])["run"]["steps"] == 8
