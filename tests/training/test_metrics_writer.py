"""Metrics are kept, by whatever means a file system takes them, and told where they are damaged."""

import json
import os

import pytest
from etils import epath

from dmf.training import metrics_writer
from dmf.training.writers import WriterRun


def written(folder, *steps, start=0):
    """Metrics of some steps, by a writer that begins after `start`."""
    run = WriterRun(workdir=epath.Path(folder), start_step=start)
    writer = metrics_writer.JsonLinesWriter(run)
    for step in steps:
        writer.write(step, {"loss": step / 4})
    return writer


def steps(folder):
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["step"] for line in lines]


@pytest.fixture
def bucket(tmp_path, monkeypatch):
    """A folder that takes files as a whole alone, as buckets do."""
    kind, opens = type(epath.Path(tmp_path)), type(epath.Path(tmp_path)).open

    def open_whole(path, mode="r", **more):
        assert "a" not in mode, "a bucket has no append"
        return opens(path, mode, **more)

    monkeypatch.setattr(kind, "open", open_whole)
    monkeypatch.setattr(metrics_writer, "_is_remote", lambda path: True)
    return tmp_path


def test_a_bucket_has_every_row_at_the_end_and_after_a_resume(bucket):
    written(bucket, 1, 2, 3).close()
    assert steps(bucket) == [1, 2, 3]
    written(bucket, 3, 4, start=2).close()
    assert steps(bucket) == [1, 2, 3, 4]


def test_a_bucket_has_what_was_written_a_minute_ago(bucket, monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(metrics_writer.time, "monotonic", lambda: now[0])
    written(bucket, 1, 2).close()
    writer = written(bucket, 3, start=2)
    assert steps(bucket) == [1, 2]
    now[0] += 61
    writer.write(4, {"loss": 1.0})
    assert steps(bucket) == [1, 2, 3, 4]
    writer.write(5, {"loss": 1.0})
    assert steps(bucket) == [1, 2, 3, 4]  # Not at every row: each time it is the whole file.
    now[0] += 61
    writer.write(6, {"loss": 1.0})
    assert steps(bucket) == [1, 2, 3, 4, 5, 6]


def test_a_kill_while_a_bucket_is_written_loses_nothing(bucket, monkeypatch):
    written(bucket, 1, 2).close()
    writer, kind = written(bucket, 3, start=2), type(epath.Path(bucket))

    def killed(path, text):
        path.write_bytes(text[:3].encode())
        raise KeyboardInterrupt

    monkeypatch.setattr(kind, "write_text", killed)
    with pytest.raises(KeyboardInterrupt):
        writer.close()
    assert steps(bucket) == [1, 2]


def test_what_is_a_bucket_is_seen_by_its_name(tmp_path):
    assert metrics_writer._is_remote(epath.Path("gs://bucket/run"))
    assert not metrics_writer._is_remote(epath.Path(tmp_path))


def test_a_row_of_a_local_file_is_there_at_once(tmp_path):
    writer = written(tmp_path, 1)
    assert steps(tmp_path) == [1]
    os.rename(tmp_path / "metrics.jsonl", tmp_path / "moved")  # The same file is open all along.
    writer.write(2, {"loss": 1.0})
    assert len((tmp_path / "moved").read_text().splitlines()) == 2
    writer.close()


BAD = (b'{"st\xff\xfe\n', b"[1]\n", b"3\n", b'{"loss": 1}\n', b'{"step": 1, "loss": "x"}\n', b"{\n")


@pytest.mark.parametrize("bad", BAD)
def test_a_bad_line_takes_no_other_with_it(tmp_path, capsys, bad):
    written(tmp_path, 1, 2, 3).close()
    path = tmp_path / "metrics.jsonl"
    first, *others = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(first + bad + b"".join(others))
    assert [row["step"] for row in metrics_writer.read_metrics(tmp_path)] == [1, 2, 3]
    assert metrics_writer.parse_metrics(tmp_path)[1] == [2]
    written(tmp_path, 4, start=3).close()
    assert steps(tmp_path) == [1, 2, 3, 4]
    (line,) = capsys.readouterr().err.splitlines()
    assert line == f"{path}, line 2: it cannot be read, and is left out"


@pytest.mark.parametrize("cut", [b'{"step": 4, "lo', b'{"step": 4, "lo\xc3'])
def test_a_last_line_that_was_cut_short_is_neither_read_nor_told(tmp_path, capsys, cut):
    written(tmp_path, 1, 2).close()
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(cut)
    rows, bad = metrics_writer.parse_metrics(tmp_path)
    assert ([row["step"] for row in rows], bad) == ([1, 2], [])
    written(tmp_path, 3, start=2).close()
    assert steps(tmp_path) == [1, 2, 3] and capsys.readouterr().err == ""


def test_a_run_without_metrics_has_no_rows(tmp_path):
    assert metrics_writer.parse_metrics(tmp_path) == ([], [])


def test_a_bucket_has_the_metrics_before_the_checkpoint(bucket):
    writer = written(bucket, 1)
    writer.flush()
    assert steps(bucket) == [1]
    writer.write(2, {"loss": 1.0})
    writer.close()
    assert steps(bucket) == [1, 2]


def test_a_flush_leaves_a_local_file_open(tmp_path):
    writer = written(tmp_path, 1)
    writer.flush()
    writer.write(2, {"loss": 1.0})
    writer.close()
    assert steps(tmp_path) == [1, 2]


def test_a_row_has_its_wall_time(tmp_path, monkeypatch):
    monkeypatch.setattr(metrics_writer.time, "time", lambda: 1_700_000_000.12345)
    written(tmp_path, 1).close()
    assert metrics_writer.read_metrics(tmp_path) == [
        {"step": 1, "wall_time": 1_700_000_000.123, "loss": 0.25}
    ]
