"""Fixtures of the tests of datasets."""

import threading

import pytest


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A directory that holds both datasets as ArrayRecord."""
    from tfds_datasets import Sounds, Squares

    directory = tmp_path_factory.mktemp("datasets")
    for builder in (Squares, Sounds):
        builder(data_dir=directory, file_format="array_record").download_and_prepare()
    return str(directory)


@pytest.fixture
def started(monkeypatch) -> list[threading.Thread]:
    """The threads that are started from now on."""
    threads, start = [], threading.Thread.start

    def recorded(thread: threading.Thread) -> None:
        threads.append(thread)
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", recorded)
    return threads
