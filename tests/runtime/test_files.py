"""Files appear under their name only when they are complete."""

import errno
import os

import pytest
from etils import epath

from dmf.errors import InputError, RunError
from dmf.runtime import files
from dmf.runtime.resumable_work import claim_folder


@pytest.fixture
def cut_short(monkeypatch):
    """A process that is interrupted in the middle of each text that it writes."""

    def write_half(path, text):
        with open(path, "w") as file:
            file.write(text[: len(text) // 2])
        raise KeyboardInterrupt

    return lambda: monkeypatch.setattr(epath.Path("/").__class__, "write_text", write_half)


def test_an_interrupted_write_leaves_the_old_file_whole(tmp_path, cut_short):
    path = epath.Path(tmp_path) / "work.json"
    files.write_json(path, {"step": 1})
    cut_short()
    with pytest.raises(KeyboardInterrupt):
        files.write_json(path, {"step": 2})
    assert files.read_json(path) == {"step": 1}


def test_an_interrupted_write_leaves_no_new_file(tmp_path, cut_short):
    path = epath.Path(tmp_path) / "folder" / "work.json"
    cut_short()
    with pytest.raises(KeyboardInterrupt):
        files.write_json(path, {"step": 1})
    assert not path.exists()


def test_a_pipe_is_not_replaced_by_a_file(tmp_path):
    """Nor is a device, by root."""
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", epath.Path("/dev/null")):
        with pytest.raises(InputError, match=f"{path}: it is a device, a pipe or a socket"):
            files.check_no_device(epath.Path(path))
    with pytest.raises(InputError):
        files.write_json(epath.Path(tmp_path / "pipe"), {})
    assert (tmp_path / "pipe").is_fifo()
    assert [path.name for path in tmp_path.iterdir()] == ["pipe"]


def test_a_directory_appears_when_it_is_complete(tmp_path):
    path = epath.Path(tmp_path) / "export"
    with files.new_directory(path) as folder:
        (folder / "config.json").write_text("{}")
        assert not path.exists()
    assert [p.name for p in path.iterdir()] == ["config.json"]


def test_an_interrupted_directory_is_removed(tmp_path):
    path = epath.Path(tmp_path) / "export"
    with pytest.raises(KeyboardInterrupt):
        with files.new_directory(path) as folder:
            (folder / "config.json").write_text("{}")
            raise KeyboardInterrupt
    assert not any(tmp_path.iterdir())


@pytest.fixture
def other(tmp_path):
    """A file that nothing may change, though links lead to it."""
    path = tmp_path / "elsewhere" / "precious.txt"
    path.parent.mkdir()
    path.write_text("precious")
    yield path
    assert path.read_text() == "precious"


def test_a_link_of_the_name_is_replaced_and_not_followed(tmp_path, other):
    path = epath.Path(tmp_path) / "evaluation.json"
    os.symlink(other, path)
    files.write_json(path, {"step": 1})
    assert not os.path.islink(path)
    assert files.read_json(path) == {"step": 1}


def test_temporary_names_cannot_be_foretold(tmp_path):
    path = epath.Path(tmp_path) / "evaluation.json"
    names = {files.partial_path(path).name for _ in range(9)}
    assert len(names) == 9
    assert all(name.startswith(".evaluation.json.") for name in names)


def test_work_is_not_claimed_through_a_link(tmp_path, other):
    folder = epath.Path(tmp_path) / ".evaluation.json.parts"
    os.symlink(other.parent, folder)
    with pytest.raises(InputError, match="it is a symbolic link to .*elsewhere"):
        claim_folder(folder, {"seed": 1})


def test_a_directory_that_is_being_written_is_left_to_its_process(tmp_path, other):
    path = epath.Path(tmp_path) / "export"
    os.symlink(other.parent, tmp_path / ".export.link.partial")
    with files.new_directory(path) as first:
        (first / "config.json").write_text("{}")
        with pytest.raises(KeyboardInterrupt):
            with files.new_directory(path):
                raise KeyboardInterrupt
    assert [p.name for p in path.iterdir()] == ["config.json"]


def test_a_disk_without_locks_is_written_and_leftovers_stay(tmp_path, monkeypatch):
    """There a leftover may be another process's, which is writing it."""
    def unsupported(*_):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    path, left = epath.Path(tmp_path) / "export", tmp_path / ".export.left.partial"
    left.mkdir()
    with monkeypatch.context() as context:
        context.setattr(files.fcntl, "flock", unsupported)
        with files.new_directory(path):
            pass
    assert path.exists() and left.exists()
    with files.new_directory(path):
        assert not left.exists()


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOSPC])
def test_a_full_disk_is_found_when_a_file_is_synced(tmp_path, monkeypatch, number):
    """But a file system without the operation is no error."""
    def fsync(descriptor):
        raise OSError(number, os.strerror(number))

    path = epath.Path(tmp_path) / "work.json"
    monkeypatch.setattr(os, "fsync", fsync)
    if number == errno.EINVAL:
        files.write_json(path, {"step": 1})
        assert files.read_json(path) == {"step": 1}
    else:
        with pytest.raises(RunError, match="no space left to write"):
            files.write_json(path, {"step": 1})
        assert not any(tmp_path.iterdir())
