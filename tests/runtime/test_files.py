"""Files appear under their name only when they are complete."""

import pytest
from etils import epath

from dmf.runtime import files


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
